"""plots.py, records.py: what is read from run folders and computed; pictures that can be read."""

import json
import math
import os
import xml.etree.ElementTree as ElementTree
from itertools import product
from pathlib import Path
from unittest.mock import Mock, patch

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT, python
from matplotlib.axis import XTick, YTick

import plots
import records


# ------------------------------------------------------------------------- made-up run folders
def train_line(step, loss=5.0, **extra):
    record = {"type": "train", "step": step, "tokens": step * 1000, "loss": loss, "accuracy": 0.2}
    record |= {"lr": 1e-3, "tok_per_s": 9000.0, "mfu": 0.5, "train_seconds": step * 0.5}
    return record | {"gpu_seconds": step * 1.0, "dollars": step * 0.001} | extra


def glue_line(step, score, task="RTE", seed=19, **extra):
    record = {"type": "glue", "task": task, "step": step, "seed": seed, "score": score,
              "metrics": {"accuracy": score}, "majority": 0.5, "tokens": step * 1000,
              "checkpoint": f"ckpt/step_{step:08d}" if step else "random", "family": "from glue",
              "pretrain_seconds": step * 0.5, "pretrain_gpu_seconds": step * 1.0,
              "pretrain_dollars": step * 0.001, "device": "fine-tuning device"}
    return record | {"preset": "from glue"} | extra


def as_lines(found):
    """Records, or bytes to be written as they are."""
    return b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in found)


def make_run(folder, lines=(), glue=(), family="mosaic", preset="mosaic-tiny", device="a CPU",
             header=True):
    (folder / "glue").mkdir(parents=True, exist_ok=True)
    about = dict(type="header", device=device, world_size=1, family=family, preset=preset)
    (folder / "log.jsonl").write_bytes(as_lines([about] * header + list(lines)))
    (folder / "glue" / "all.jsonl").write_bytes(as_lines(glue))
    return str(folder)


def full_run(folder, level=0.0, rate=1.0, tasks=("RTE", "CoLA"), seeds=(1, 2, 3), **about):
    loss = lambda s: 3 + 6 * math.exp(-s / 200) - level
    log = [train_line(s, loss(s), train_seconds=s * rate) for s in range(10, 801, 10)]
    log += [train_line(s, loss(s) + 0.1) | {"type": "eval"} for s in range(100, 801, 100)]
    glue = [glue_line(s, 0.5 + 0.04 * k + level * bool(s) + 0.003 * seed, task, seed,
                      pretrain_seconds=s * rate)
            for k, s in enumerate([0, 100, 200, 400, 800]) for task in tasks for seed in seeds]
    return make_run(folder, log, glue, **about)


def sweep_row(preset, variant, seed, budget, metric, value, equal="tokens"):
    """A row of a sweep's records.jsonl; its run costs budget / 1000 seconds."""
    name = f"{preset}{'+' * bool(variant)}{variant}-s{seed}-{budget}"
    row = {"type": "sweep", "run": name, "preset": preset, "variant": variant, "seed": seed,
           "family": preset.split("-")[0], "budget": budget, "equal": equal, "tokens": budget,
           "step": budget // 1000, "train_seconds": budget / 1000, "gpu_seconds": budget / 1000,
           "dollars": 0.01, "device": "a CPU", "world_size": 1, "metric": metric, "value": value}
    if metric not in ("loss", "accuracy"):
        row |= {"values": [value - 0.01, value + 0.01], "majority": 0.5, "measures": ["accuracy"]}
    return row


def make_sweep(folder, presets=("mosaic-tiny", "bert-tiny"), variants=("", "adamw", "wide"),
               budgets=(10_000, 20_000), equal="tokens"):
    """results/<name>/ of a sweep: variant number v is better by v × (0.10, 0.12, 0.14) for seeds
    1, 2, 3."""
    rows = [{"type": "speed", "tok_per_s": [1.0]}]
    for preset, (v, variant), seed, budget in product(presets, enumerate(variants), (1, 2, 3),
                                                      budgets):
        gain, key = v * (0.08 + 0.02 * seed), (preset, variant, seed, budget)
        rows.append(sweep_row(*key, "loss", 5.0 - budget / 1e5 - gain + seed, equal))
        rows.append(sweep_row(*key, "RTE", 0.6 + gain / 10, equal))
    folder.mkdir(parents=True)
    (folder / "records.jsonl").write_bytes(as_lines(rows))
    return str(folder)


def load(*folders):
    return records.read_runs([Path(f) for f in folders])


@pytest.fixture(autouse=True)
def nothing_left_open():
    yield
    plt.close("all")


@pytest.fixture
def two_runs(tmp_path):
    mosaic = full_run(tmp_path / "runs" / "mosaic-a", level=0.1)
    bert = full_run(tmp_path / "runs" / "bert-a", rate=0.8, family="bert", preset="bert-tiny")
    return mosaic, bert


@pytest.fixture
def drawn(tmp_path):
    """Draws a figure and returns it, still open (matplotlib's Figure), after it was written."""

    def draw(figure, *paths, out="p.png", **kwargs):
        kept = []
        with patch("plots.plt.close", kept.append):
            figure(paths, out=str(tmp_path / out), **kwargs)
        return kept[0]

    return draw


# ------------------------------------------------------------------------------------- reading
def test_of_a_resumed_run_the_last_record_of_a_step_counts(tmp_path):
    """What a killed life did beyond the step that the next began at is forgotten: with
    --max_minutes the second may end at a smaller step than the first had come to."""
    again = {"type": "header", "device": "a CPU"}
    log = [train_line(10, 9.0), train_line(20, 8.0), train_line(30, 7.0), again]
    (run,) = load(make_run(tmp_path / "r", [*log, train_line(20, 6.0), train_line(30, 5.0)]))
    assert run.train["step"].tolist() == [10, 20, 30]
    assert run.train["loss"].tolist() == [9.0, 6.0, 5.0]
    log[-1] = again | {"step": 20}
    (run,) = load(make_run(tmp_path / "r", [*log, train_line(25, 6.0)]))
    assert run.train["step"].tolist() == [10, 20, 25]


def test_damaged_lines_are_skipped_and_counted(tmp_path, capsys):
    half = json.dumps(train_line(20)).encode()[:40]
    lines = [
        train_line(10),
        half + b'{"type": "header", "device": "a CPU"}\n',  # killed, then resumed
        b"\x00\xff\x00\n", b"[1, 2]\n", b"17\n",
        b"\n",  # an empty line is not damage
        {"type": "train", "step": 25, "tokens": 1},  # no loss
        {"type": "train", "step": "x", "tokens": 1, "loss": 2.0},
        {"type": "something else"},  # not for us, not damaged
        b"[" * 100_000 + b"\n",
        train_line(30, accuracy=None, dollars="?"),  # optional fields may be absent
        half,  # being written right now
    ]
    (run,) = load(make_run(tmp_path / "r", lines, [glue_line(10, 0.5), b'{"type": "glue", "ta\n']))
    assert run.train["step"].tolist() == [10, 30]
    assert math.isnan(run.train["accuracy"][1]) and math.isnan(run.train["dollars"][1])
    assert len(run.glue) == 1
    assert "skipped 9 damaged" in capsys.readouterr().err  # 8 in the log, 1 in glue


def test_only_fine_tunings_like_the_last_are_averaged_each_job_once(tmp_path, capsys):
    paper = [glue_line(10, 0.5, seed=s, recipe={"lr": 1e-5}, weights="aa") for s in range(5)]
    sane = [glue_line(10, 0.7, seed=s, recipe={"lr": 1e-4}, weights="aa") for s in range(3)]
    cola = [glue_line(10, 0.9, "CoLA", recipe={"lr": 1e-5}, weights="aa")]
    again = sane[0] | {"score": 0.8}
    (run,) = load(make_run(tmp_path / "a", [], [*paper, *cola, *sane, again]))
    assert sorted((g["task"], g["seed"], g["score"]) for g in run.glue) == [
        ("CoLA", 19, 0.9), ("RTE", 0, 0.8), ("RTE", 1, 0.7), ("RTE", 2, 0.7)]
    assert "left out 5 fine-tuning(s) unlike the last" in capsys.readouterr().err


def test_device_and_family_are_those_of_pretraining(tmp_path):
    moved = {"type": "header", "device": "NVIDIA H200", "world_size": 8, "family": "bert"}
    folder = make_run(tmp_path / "r", [train_line(10), moved], [glue_line(10, 0.5)])
    (run,) = load(folder)
    assert (run.device, run.family) == ("a CPU then 8× NVIDIA H200", "bert")
    (run,) = load(make_run(tmp_path / "s", [], [glue_line(10, 0.5)], header=False))
    assert (run.device, run.family) == ("fine-tuning device", "from glue")


# ---------------------------------------------------------------------------------- statistics
def test_frontier_is_the_points_that_no_other_dominates():
    rng = np.random.default_rng(0)
    for lower in (False, True) * 100:
        x, y = rng.integers(0, 6, (2, 12)).astype(float)
        z = -y if lower else y
        beats = lambda j, i: x[j] <= x[i] and z[j] >= z[i] and (x[j] < x[i] or z[j] > z[i])  # noqa: B023
        beaten = [any(beats(j, i) for j in range(12)) for i in range(12)]
        assert plots.frontier(x, y, lower).tolist() == [not b for b in beaten]
    # two clocks that were to stop at the same minute: a thousandth of a second buys no place
    assert plots.frontier([60.07, 60.08, 120], [68, 87, 86], False).tolist() == [False, True, False]


def score(run, task, value, at=10, cost=4.0):
    return {"line": "l", "run": run, "at": at, "trained": True, "task": task, "score": value,
            "cost": cost}


def test_error_of_one_run_is_over_its_seeds():
    scores = {"RTE": [0.60, 0.62, 0.64], "CoLA": [0.1, 0.3], "MNLI": [0.8]}
    (p,) = plots.points([score("a", t, s) for t in scores for s in scores[t]])
    assert p.y == pytest.approx((0.62 + 0.2 + 0.8) / 3)  # tasks weigh the same
    rte, cola = 0.02 / math.sqrt(3), 0.1  # s = 0.02 of 3 seeds, 0.1414 of 2; one seed tells nothing
    assert p.err == pytest.approx(math.sqrt(rte**2 + cola**2) / 3)
    assert (p.n_runs, p.n_seeds, p.x) == (1, 3, 4.0)


def test_error_of_replicate_runs_is_over_runs_not_over_all_seeds():
    runs = {"a": [0.60, 0.62], "b": [0.70, 0.72], "c": [0.80, 0.82]}
    (p,) = plots.points([score(r, "RTE", s) for r in runs for s in runs[r]])
    assert p.y == pytest.approx(0.71) and p.err == pytest.approx(0.1 / math.sqrt(3))
    assert p.n_runs == 3


def test_only_tasks_that_all_checkpoints_have_are_averaged(tmp_path, capsys):
    jobs = [glue_line(10, 0.6, "RTE"), glue_line(10, 0.2, "CoLA"), glue_line(20, 0.7, "RTE")]
    found = plots.checkpoints(load(make_run(tmp_path / "r", [], jobs)), [], "glue", "seconds")
    assert plots.of_shared_tasks(found, "")[1] == ["RTE"]
    assert "not every checkpoint has them: CoLA" in capsys.readouterr().err
    scores, tasks = plots.of_shared_tasks(found, "CoLA")
    assert tasks == ["CoLA"] and [r["score"] for r in scores] == [0.2]


def test_a_line_has_the_shortest_name_that_no_other_line_has(tmp_path):
    folders = [full_run(tmp_path / p, preset=p) for p in ("mosaic-tiny", "mosaic-small")]
    folders += [full_run(tmp_path / f"n{i}", family="nano", preset="nano-tiny") for i in range(2)]
    folders += [full_run(tmp_path / "x" / "n0", family="nano", preset="nano-tiny")]
    folders += [full_run(tmp_path / "b", family="bert", preset="bert-tiny")]
    names = plots.name_lines({run.path: run.names for run in load(*folders)})
    assert list(names.values()) == ["mosaic-tiny", "mosaic-small", str(tmp_path / "n0"), "n1",
                                    str(tmp_path / "x" / "n0"), "bert"]


def test_a_family_has_the_same_colour_in_every_figure():
    alone = plots.styles({"bert": "bert", "mosaic": "mosaic"})
    crowd = {"aaa": "aaa", "bert-tiny": "bert", "bert-big": "bert", "mosaic": "mosaic"}
    crowd = plots.styles(crowd)
    colours = {name: look["color"] for name, look in crowd.items()}
    assert alone["bert"]["color"] == colours["bert-tiny"] == colours["bert-big"]
    assert alone["mosaic"]["color"] == colours["mosaic"] != colours["aaa"]
    assert len({(str(s["ls"]), s["marker"]) for s in crowd.values()}) == 4  # without colour
    nano = plots.styles({"nano-tiny": "nano", "nano-small": "nano"})  # alone: told apart by colour
    assert [look["color"] for look in nano.values()] == plots.COLOURS[2:4]


# ------------------------------------------------------------------------------------- figures
def visible_texts(fig):
    """(text, box in pixels) of all that is written: titles, labels, tick labels, legend, notes."""
    fig.canvas.draw()
    beyond = set()  # tick labels outside the limits exist, but are not drawn
    for ax in fig.axes:
        for kind, axis in ((XTick, ax.xaxis), (YTick, ax.yaxis)):
            low, high = sorted(axis.get_view_interval())
            outside = [t for t in ax.findobj(kind) if not low <= t.get_loc() <= high]
            beyond |= {id(label) for t in outside for label in (t.label1, t.label2)}
    texts = [t for t in fig.findobj(plt.Text)
             if t.get_visible() and t.get_text().strip() and id(t) not in beyond]
    return [(t.get_text(), t.get_window_extent()) for t in texts]


def overlaps(fig):
    texts, page = visible_texts(fig), fig.bbox
    pairs = [(a, b) for i, (a, box) in enumerate(texts) for b, other in texts[:i]
             if box.shrunk(0.98, 0.9).overlaps(other)]
    outside = [t for t, box in texts if min(box.x0, box.y0) < -1
               or box.x1 > page.x1 + 1 or box.y1 > page.y1 + 1]
    return pairs, outside


def texts_of(fig):
    return " ".join(" ".join(t.get_text() for t in fig.findobj(plt.Text)).split())


@pytest.mark.parametrize("name", ["pareto", "loss", "ablation"])
def test_a_figure_is_whole_and_its_texts_do_not_overlap(name, two_runs, tmp_path, drawn, capsys):
    paths = (make_sweep(tmp_path / "s"),) if name == "ablation" else two_runs
    fig = drawn(getattr(plots, name), *paths, out="new/folder/a.5.png")
    out = tmp_path / "new" / "folder" / "a.5.png"
    assert capsys.readouterr().out == f"{out}\n" and plt.imread(out).shape[1] > 600
    assert list(out.parent.iterdir()) == [out]  # no temporary left
    assert len(visible_texts(fig)) > 8 and overlaps(fig) == ([], [])
    drawn(getattr(plots, name), *paths, out="a.svg")
    drawn(getattr(plots, name), *paths, out="b.svg")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_failed_drawing_leaves_the_old_file(two_runs, tmp_path, monkeypatch):
    (tmp_path / "p.png").write_text("old")
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        plots.pareto(two_runs, out=str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["p.png"]


def test_no_text_overlaps_in_a_crowded_pareto(tmp_path, drawn):
    names = [f"a run with quite a long name, number {i}" for i in range(8)]
    runs = [full_run(tmp_path / name, level=i / 50, tasks=sorted(plots.GLUE), rate=3 + i,
                     device=f"a device called {i % 2}") for i, name in enumerate(names)]
    for options in ({"x": "tokens"}, {"published": True}, {"published": True, "x": "gpu_hours"}):
        assert overlaps(drawn(plots.pareto, *runs, **options)) == ([], []), options


def test_pareto_rings_the_frontier_and_shows_baselines(two_runs, drawn):
    fig = drawn(plots.pareto, *two_runs, task="RTE", x="gpu_hours")
    ax = fig.axes[0]
    (ring,) = [line for line in ax.lines if line.get_markersize() == 11]
    # both cost the same; mosaic is better by 10 points
    expected = [(100, 64.6), (200, 68.6), (400, 72.6), (800, 76.6)]
    assert list(zip(ring.get_xdata()[:-1] * 3600, ring.get_ydata())) == [
        pytest.approx(p) for p in expected]
    at_edge = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert [line.get_ydata()[0] for line in at_edge] == pytest.approx([50.6, 50.6])
    text = texts_of(fig)
    assert "RTE dev accuracy against pretraining device-hours" in text and "majority class" in text
    assert "3 fine-tuning seeds · bars: ± 1 standard error · on a CPU" in text
    assert any(np.allclose(line.get_ydata(), 50.0) for line in ax.lines)  # the majority class
    text = texts_of(drawn(plots.pareto, *two_runs))
    assert "Mean of 2 dev scores" in text and "tasks: CoLA, RTE" in text


def test_pareto_says_when_devices_differ(tmp_path, drawn):
    runs = full_run(tmp_path / "a", device="A100"), full_run(tmp_path / "b", device="H200")
    text = texts_of(drawn(plots.pareto, *runs))
    assert "on A100, H200" in text and "different devices, so these costs do not compare" in text
    assert "different devices" not in texts_of(drawn(plots.pareto, *runs, x="tokens"))


def test_weights_of_unknown_cost_are_not_shown_as_untrained(tmp_path, drawn, capsys):
    downloaded = [glue_line(0, 0.9, checkpoint="model.safetensors", pretrain_seconds=None)]
    other = make_run(tmp_path / "b", [], downloaded, family="other")
    fig = drawn(plots.pareto, full_run(tmp_path / "a"), other, task="RTE")
    assert f"no glue with seconds known yet, left out: {other}" in capsys.readouterr().err
    assert len([line for line in fig.axes[0].lines if line.get_markerfacecolor() == "white"]) == 1


def test_axis_is_logarithmic_when_the_costs_span_more_than_ten(tmp_path, drawn):
    for steps, scale in (((10, 100, 900), "log"), ((100, 900), "linear")):
        run = make_run(tmp_path / "r", [], [glue_line(s, 0.6) for s in steps])
        assert drawn(plots.pareto, run).axes[0].get_xscale() == scale


def test_published_points_have_sources_and_are_shown_beside_glue_averages_only(tmp_path, drawn):
    data = json.loads(plots.PUBLISHED.read_text(encoding="utf-8"))
    for p in data["points"]:
        assert p["mark"] in data["marks"] and p["source"] and p["hardware"] and p["protocol"]
        assert len(p["hours"]) == len(p["score"])
    costs = {x: {name: (list(cost), score) for name, cost, score in plots.published_points(x)}
             for x in plots.COSTS}
    name = "MosaicBERT-Base, abstract, 8× A100-80GB"
    assert costs["seconds"][name] == ([pytest.approx(1.13 * 3600)], [79.6])
    assert costs["gpu_hours"][name] == ([pytest.approx(8 * 1.13 * 3600)], [79.6])
    assert costs["dollars"][name][0] == [pytest.approx(20, abs=0.1)]
    assert not any("Cramming" in name for name in costs["dollars"])  # no price was published
    run = full_run(tmp_path / "r", tasks=sorted(plots.GLUE), seeds=(1,))
    fig = drawn(plots.pareto, run, published=True)
    assert name in texts_of(fig) and "GLUE dev average" in texts_of(fig)
    with pytest.raises(SystemExit, match="GLUE's eight tasks"):
        plots.pareto((run,), published=True, task="RTE")


def test_loss_is_drawn_as_it_was_logged_each_family_in_its_colour(two_runs, tmp_path, drawn):
    fig = drawn(plots.loss, *two_runs, full_run(tmp_path / "n", family="nano", preset="nano-tiny"))
    held_out = [line for line in fig.axes[0].lines if line.get_linestyle() == "None"]
    assert [line.get_color() for line in held_out] == plots.COLOURS[:3]
    assert list(held_out[0].get_xdata() * 1000) == list(range(100_000, 800_001, 100_000))
    assert held_out[1].get_ydata()[0] == pytest.approx(3.1 + 6 * math.exp(-0.5))
    raw = [line for line in fig.axes[0].lines if line.get_linewidth() == 0.6]
    assert [len(line.get_xdata()) for line in raw] == [80] * 3
    smooth = [line for line in fig.axes[0].lines if line.get_linewidth() == 1.6][1]
    assert smooth.get_ydata()[40] == pytest.approx(raw[0].get_ydata()[40], abs=0.05)
    assert [t.get_text() for t in fig.legends[0].texts] == ["mosaic", "bert", "nano"]
    many = [make_run(tmp_path / f"many{i}", [train_line(10), train_line(20)]) for i in range(31)]
    assert drawn(plots.loss, *many).legends[0].texts[-1].get_text() == "and 2 more"


def test_a_sweeps_records_draw_what_its_run_folders_would(tmp_path, drawn, capsys):
    folder = make_sweep(tmp_path / "results" / "s", variants=("", "wide"))
    with open(Path(folder) / "records.jsonl", "a") as f:
        f.write('{"type": "sweep", "run"\n')
    fig = drawn(plots.pareto, str(tmp_path / "results" / "*"))
    lines = {line.get_label(): line for line in fig.axes[0].lines}
    assert {"mosaic", "mosaic, wide", "bert", "bert, wide"} <= lines.keys()
    assert list(lines["mosaic"].get_xdata()) == [10, 20]
    assert list(lines["mosaic"].get_ydata()) == pytest.approx([60, 60])
    text = texts_of(fig)
    assert "2 fine-tuning seeds · 3 runs per point" in text and "RTE dev accuracy" in text
    assert "skipped 1 damaged" in capsys.readouterr().err
    twin = make_sweep(tmp_path / "twin" / "s", presets=("mosaic-tiny",), variants=("",))
    fig = drawn(plots.pareto, folder, twin)
    assert f"{twin}: mosaic-tiny" in texts_of(fig) and "bert, wide" in texts_of(fig)
    fig = drawn(plots.pareto, folder, metric="loss", x="dollars")
    (line,) = [line for line in fig.axes[0].lines if line.get_label() == "bert"]
    assert list(line.get_ydata()) == pytest.approx([6.9, 6.8])


def test_blimp_is_read_from_beside_the_run_the_record_of_most_pairs(tmp_path, drawn):
    runs = []
    for family, level in (("mosaic", 0.6), ("bert", 0.5), ("nano", 0.7)):
        runs.append(make_run(tmp_path / family, [train_line(10)], family=family))
        lines = [train_line(step) | {"type": "blimp", "score": level + step / 1000 - few / 100,
                                     "stderr": 0.01, "n_pairs": 67 * (20 if few else 1000)}
                 for step in (20, 40) for few in (False, True)]
        (tmp_path / family / "blimp.jsonl").write_bytes(as_lines(lines))
    fig = drawn(plots.pareto, *runs, metric="blimp")
    lines = {line.get_label(): line for line in fig.axes[0].lines}
    assert list(lines["nano"].get_ydata()) == pytest.approx([72, 74])
    assert list(lines["nano"].get_xdata()) == [10, 20]
    assert [lines[f].get_color() for f in ("mosaic", "bert", "nano")] == plots.COLOURS[:3]
    assert "Accuracy on BLiMP (%)" in texts_of(fig) and "bars: ± 1 standard error" in texts_of(fig)
    (bar,) = fig.axes[0].containers[0].lines[2]  # the record's stderr, 0.01
    assert np.ptp(bar.get_segments()[0][:, 1]) == pytest.approx(2)
    assert overlaps(fig) == ([], [])


def test_names_are_text(tmp_path, drawn):
    names = ["lr[1]", "lr1", "$1$ or $x^", "50%", "_a b", "läuft", "{x}", "a\\b", "2*"]
    runs = [full_run(tmp_path / "runs" / name) for name in names]
    for figure in (plots.pareto, plots.loss):
        fig = drawn(figure, *runs)
        shown = [text.get_text().strip() for text in fig.legends[0].texts]
        assert shown[: len(names)] == sorted(names)
    one = drawn(plots.loss, runs[0], str(tmp_path / "runs" / "lr[2-9]"), out="lr[1] $.png")
    assert [t.get_text() for t in one.legends[0].texts] == ["mosaic"]
    assert (tmp_path / "lr[1] $.png").is_file()
    found, _ = records.find((str(tmp_path / "runs" / "lr[1]"), str(tmp_path / "runs" / "l*1")))
    assert [path.name for path in found] == ["lr[1]", "lr1"]  # a pattern where no path is
    sweep = make_sweep(tmp_path / "a [b] $c$", variants=("", "$x$"))
    assert "$x$" in texts_of(drawn(plots.ablation, sweep))
    assert "mosaic, $x$" in texts_of(drawn(plots.pareto, sweep))


# ------------------------------------------------------------------------------------ ablation
def gains(ax):
    return [round(c.lines[0].get_xdata()[0], 6) for c in ax.containers]


def test_ablation_is_the_paired_difference_with_its_confidence_interval(tmp_path, drawn):
    fig = drawn(plots.ablation, make_sweep(tmp_path / "s"))
    (ax,) = fig.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["adamw", "wide"]
    assert gains(ax) == [-0.12, -0.24] * 2  # the spread of 1 nat over seeds is paired away
    low, high = ax.containers[0].lines[2][0].get_segments()[0][:, 0]
    half = 4.302653 * 0.02 / math.sqrt(3)  # Student's 97.5 % point; differences 0.10, 0.12, 0.14
    assert [low, high] == pytest.approx([-0.12 - half, -0.12 + half], abs=1e-5)
    assert "20,000 tokens" in texts_of(fig) and "n = 3" in texts_of(fig)


def test_each_sweep_has_its_own_panel_at_its_largest_budget(tmp_path, drawn):
    """At equal tokens and at equal time; two of one kind are told apart by name, never paired."""
    small = make_sweep(tmp_path / "small")
    large = make_sweep(tmp_path / "large", variants=("", "wide", "adamw"), budgets=(7_000, 140_000))
    timed = make_sweep(tmp_path / "time", variants=("", "wide"), equal="time")
    fig = drawn(plots.ablation, small, large, timed)
    below = [ax.get_xlabel().split("\n")[1] for ax in fig.axes]
    assert below == ["at equal tokens, small", "at equal tokens, large", "at equal time"]
    for ax, expected in zip(fig.axes, ([-0.12, -0.24], [-0.24, -0.12], [-0.12])):  # adamw, wide
        assert gains(ax) == expected * 2
    text = texts_of(fig)
    assert "20,000 tokens, 140,000 tokens, 20,000 tokens of the first preset, and its time" in text
    said = [[t.get_text() for t in ax.texts if t.get_text() == "not run"] for ax in fig.axes]
    assert [len(texts) for texts in said] == [0, 0, 2]  # adamw of two presets
    assert overlaps(fig) == ([], [])
    first, *others = [ax.get_position() for ax in fig.axes]
    assert others[0].x0 - first.x1 < 0.1  # the title does not push them apart


def test_an_effect_that_may_be_chance_has_a_hollow_marker_and_one_seed_no_bar(tmp_path, drawn):
    values = {"": (5.0, 5.2, 5.1), "maybe": (4.9, 5.3, 5.0), "surely": (4.0, 4.2, 4.11),
              "once": (4.5,)}
    rows = [sweep_row("mosaic-tiny", v, seed, 10_000, "loss", x)
            for v, xs in values.items() for seed, x in enumerate(xs)]
    (tmp_path / "records.jsonl").write_bytes(as_lines(rows))
    fig = drawn(plots.ablation, str(tmp_path))
    maybe, surely, once = fig.axes[0].containers
    faces = [c.lines[0].get_markerfacecolor() for c in (maybe, surely, once)]
    assert [face == "white" for face in faces] == [True, False, True]
    assert "n = 1, 3" in texts_of(fig)


# -------------------------------------------------------------------------------- command line
def test_command_line_expands_patterns_and_mentions_what_it_left_out(two_runs, tmp_path):
    make_run(tmp_path / "runs" / "no-glue-yet", [train_line(10)])
    (tmp_path / "runs" / "empty").mkdir()
    args = "pareto", "runs/*", "--task", "RTE", "--x", "tokens"
    done = python(ROOT / "plots.py", *args, cwd=tmp_path)
    assert done.stdout == "plots/pareto.png\n"
    assert "no glue with tokens known yet, left out: runs/no-glue-yet" in done.stderr
    assert "no run folder and no sweep, left out: runs/empty" in done.stderr


@pytest.mark.parametrize(("args", "says"), [
    ("pareto", "no run folder and no sweep in nothing"),
    ("loss nothing/*", "no run folder and no sweep in nothing/*"),
    ("pareto runs/bare", "nothing drawn"), ("loss runs/bare", "nothing drawn"),
    ("ablation runs/a", "no variant in runs/a"),
    ("pareto runs/a --task WNLI", "choose one with --task: CoLA, RTE"),
    ("pareto runs/free --x dollars", "try another --x"),
    ("pareto runs/a --metric loss --published", "GLUE's eight tasks"),
    ("pareto runs/a --out runs/a/log.jsonl/p.png", "log.jsonl"),
    ("ablation runs/a --out runs/a/log.jsonl/p.png", "log.jsonl"),  # before anything is read
    ("loss runs/a --out runs", "runs"),
    ("pareto runs/a --out p.txt", "--out p.txt: Format 'txt' is not supported"),
])
def test_bad_input_is_one_line_and_writes_nothing(args, says, tmp_path):
    full_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "bare")
    make_run(tmp_path / "runs" / "free", [], [glue_line(10, 0.5, pretrain_dollars=0.0)])
    files = lambda: sorted(path for path in tmp_path.rglob("*") if path.is_file())
    before = files()
    done = python(ROOT / "plots.py", *args.split(), code=1, cwd=tmp_path)
    (error,) = (line for line in done.stderr.splitlines() if not line.startswith("note: "))
    assert error.startswith("error: ") and says in error
    assert done.stdout == "" and files() == before


def test_needs_no_torch(two_runs, tmp_path):
    code = "import sys; sys.modules['torch'] = None; import plots; plots.loss(tuple(sys.argv[1:]))"
    python("-c", code, *two_runs, cwd=tmp_path)


@pytest.mark.slow
def test_a_thousand_runs_of_ten_thousand_lines_take_under_20_s_and_little_memory(tmp_path):
    lines = [train_line(s, 3 + 6 * math.exp(-s / 2000), padding=0.23) for s in range(1, 10_001)]
    first = Path(make_run(tmp_path / "0000", lines))
    for i in range(1, 1000):  # hard links: every file is read, without filling the disk
        (tmp_path / f"{i:04d}").mkdir()
        os.link(first / "log.jsonl", tmp_path / f"{i:04d}" / "log.jsonl")
    # VmHWM: ru_maxrss of a new process begins with what its parent had
    code = """if True:
        import plots, sys, time
        plots.loss((sys.argv[1],), out=sys.argv[2])
        peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
        print(time.process_time(), peak, file=sys.stderr)"""
    done = python("-c", code, tmp_path / "0*", tmp_path / "p.png", OMP_NUM_THREADS="1")
    cpu_seconds, kib = map(float, done.stderr.split())  # the machine may be busy with other things
    print(f"{cpu_seconds:.1f} s of CPU, {kib / 1024:.0f} MiB")
    assert cpu_seconds < 20 and kib < 400 * 1024
