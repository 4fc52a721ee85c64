"""plots.py: what is read from a run folder, what is computed from it, and that the pictures can be read."""

import json
import math
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axis import XTick, YTick

import plots
import records

REPO = Path(plots.__file__).parent


# ------------------------------------------------------------------------------------------ fake run folders
def train_line(step, loss=5.0, **extra):
    record = {"type": "train", "step": step, "tokens": step * 1000, "loss": loss, "accuracy": 0.2, "lr": 1e-3}
    record |= {"masking": 0.3, "tok_per_s": 9000.0 + step, "mfu": 0.5, "train_seconds": step * 0.5}
    return record | {"gpu_seconds": step * 1.0, "dollars": step * 0.001} | extra


def glue_line(step, score, task="RTE", seed=19, **extra):
    record = {"type": "glue", "task": task, "step": step, "seed": seed, "score": score, "metrics": {"accuracy": score}}
    record |= {"checkpoint": f"ckpt/step_{step:08d}" if step else "random", "majority": 0.5, "tokens": step * 1000}
    record |= {"pretrain_seconds": step * 0.5, "pretrain_gpu_seconds": step * 1.0, "pretrain_dollars": step * 0.001}
    return record | {"device": "fine-tuning device", "family": "from glue", "preset": "from glue"} | extra


def make_run(
    folder, lines=(), glue=(), family="mosaic", preset="mosaic-tiny", device="a CPU", seq_len=128, header=True
):
    """Writes a run folder. Lines are records, or bytes to be written as they are."""
    (folder / "glue").mkdir(parents=True, exist_ok=True)
    about = {"type": "header", "device": device, "world_size": 1, "family": family, "preset": preset}
    as_bytes = lambda r: r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n"
    (folder / "log.jsonl").write_bytes(b"".join(map(as_bytes, [about] * header + list(lines))))
    for task in {r["task"] if isinstance(r, dict) else "RTE" for r in glue}:
        own = [r for r in glue if (r["task"] if isinstance(r, dict) else "RTE") == task]
        (folder / "glue" / f"{task}.jsonl").write_bytes(b"".join(map(as_bytes, own)))
    (folder / "config.json").write_text(json.dumps({"train": {"seq_len": seq_len}, "family": family}))
    return str(folder)


def full_run(folder, level=0.0, rate=1.0, tasks=("RTE", "CoLA"), seeds=(1, 2, 3), **about):
    steps = range(10, 801, 10)
    log = [train_line(s, 3 + 6 * math.exp(-s / 200) - level, train_seconds=s * rate) for s in steps]
    log += [{**train_line(s, 3.1 + 6 * math.exp(-s / 200) - level), "type": "eval"} for s in range(100, 801, 100)]
    glue = [
        glue_line(s, 0.5 + 0.04 * k + level * bool(s) + 0.003 * seed, task, seed, pretrain_seconds=s * rate)
        for k, s in enumerate([0, 100, 200, 400, 800])
        for task in tasks
        for seed in seeds
    ]
    return make_run(folder, log, glue, **about)


def sweep_row(preset, variant, seed, budget, metric, value):
    """A row of a sweep's records.jsonl; its run costs budget / 1000 seconds."""
    name = f"{preset}{'+' * bool(variant)}{variant}-s{seed}-{budget}"
    row = {"type": "sweep", "run": name, "preset": preset, "variant": variant, "family": preset.split("-")[0]}
    row |= {"seed": seed, "budget": budget, "equal": "tokens", "step": budget // 1000, "tokens": budget}
    row |= {"train_seconds": budget / 1000, "gpu_seconds": budget / 1000, "dollars": 0.01, "device": "a CPU"}
    if metric not in ("loss", "accuracy"):
        row |= {"values": [value - 0.01, value + 0.01], "majority": 0.5, "measures": ["accuracy"]}
    return row | {"world_size": 1, "metric": metric, "value": value}


def make_sweep(folder, presets=("mosaic-tiny", "bert-tiny"), variants=("", "adamw", "wide"), seeds=(1, 2, 3)):
    """results/<name>/ of a sweep: two budgets, variant number v better by v × (0.10, 0.12, 0.14) for seeds 1, 2, 3."""
    rows = []
    for preset, (v, variant), seed, budget in product(presets, enumerate(variants), seeds, (10_000, 20_000)):
        gain = v * (0.08 + 0.02 * seed)
        arm = (preset, variant, seed, budget)
        rows += [sweep_row(*arm, "loss", 5.0 - budget / 1e5 - gain + seed), sweep_row(*arm, "RTE", 0.6 + gain / 10)]
    folder.mkdir(parents=True)
    speed = {"type": "speed", "arm": "x", "tok_per_s": [1.0]}
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [speed, *rows]))
    return str(folder)


def kernel_report(path, lengths=(128, 512, 4096, 8192)):
    """As python -m bench.kernels writes it: ours at 50 % and a peer at 25 % of the roofline; one failure."""
    rows = []
    for n, c4 in product(lengths, (False, True)):
        for provider, share in (("ours", 0.5), ("flex_attention, compiled", 0.25)):
            timing = {"ms": 1.0, "tflops": n * share / 10, "gb_per_s": 1.0, "roofline": share}
            rows.append({"documents": f"C4 up to {n}" if c4 else str(n), "provider": provider})
            rows[-1] |= {"forward": timing, "backward": timing | {"tflops": n * share / 5}}
    rows.append({"documents": "128", "provider": "varlen_attn", "failed": "ImportError: no"})
    settings = {"tokens": 65_536, "heads": 12, "head_dim": 64}
    path.write_text(json.dumps({"device": "H200", "settings": settings, "attention": rows, "pointwise": []}))
    return str(path)


def step_report(path):
    """As python -m bench.step writes it: ours at 50 % MFU, a peer at 20 %, one that failed."""
    ours = {
        "name": "mosaic-base, compiled",
        "tok_per_s": 100_000.0,
        "mfu": 0.5,
        "rounds": [90_000.0, 100_000.0, 110_000.0],
    }
    peer = {"name": "BertForMaskedLM", "tok_per_s": 40_000.0, "mfu": 0.2, "rounds": [40_000.0]}
    failed = {"name": "transformers, mosaic", "failed": "ImportError: no"}
    results = [{"size": "base", "seq_len": n, "contenders": [ours, peer, failed], "ratios": {}} for n in (128, 512)]
    path.write_text(json.dumps({"device": "H200", "results": results}))
    return str(path)


@pytest.fixture(autouse=True)
def nothing_left_open():
    yield
    plt.close("all")


@pytest.fixture
def two_runs(tmp_path):
    mosaic = full_run(tmp_path / "runs" / "mosaic-a", level=0.1)
    return mosaic, full_run(tmp_path / "runs" / "bert-a", rate=0.8, family="bert", preset="bert-tiny")


def drawn(monkeypatch, figure, *args, **kwargs):
    """Draws a figure and returns it, still open (matplotlib's Figure), after it was written to disk."""
    kept = []
    monkeypatch.setattr(plots.plt, "close", kept.append)
    figure(*args, **kwargs)
    monkeypatch.undo()
    return kept[0]


# --------------------------------------------------------------------------------------------------- reading
def test_last_record_of_a_repeated_step_wins(tmp_path):
    log = [train_line(10, 9.0), train_line(20, 8.0), train_line(30, 7.0), {"type": "header", "device": "a CPU"}]
    run = plots.load((make_run(tmp_path / "r", [*log, train_line(20, 6.0), train_line(30, 5.0)]),))[0]
    assert run.train["step"].tolist() == [10, 20, 30]
    assert run.train["loss"].tolist() == [9.0, 6.0, 5.0]


def test_what_a_killed_life_did_beyond_the_step_that_the_next_began_at_is_forgotten(tmp_path):
    """With --max_minutes the second life may end at a smaller step than the first had come to."""
    first = [train_line(s, 9.0) for s in (100, 200, 300)]
    again = {"type": "header", "device": "a CPU", "step": 200}
    run = plots.load((make_run(tmp_path / "r", [*first, again, train_line(250, 7.0)]),))[0]
    assert run.train["step"].tolist() == [100, 200, 250]


def test_damaged_lines_are_skipped_and_counted(tmp_path, capsys):
    half = json.dumps(train_line(20)).encode()[:40]
    lines = [
        train_line(10),
        half + json.dumps({"type": "header", "device": "a CPU"}).encode() + b"\n",  # killed, then resumed
        b"\x00\xff\x00\n",
        b"[1, 2]\n",
        b"17\n",
        b"\n",  # an empty line is not damage
        {"type": "train", "step": 25, "tokens": 1},  # no loss
        train_line(40, loss=None),  # every step skipped: whole
        {"type": "train", "step": "x", "tokens": 1, "loss": 2.0},
        {"type": "something else"},  # not for us, not damaged
        b"[" * 100_000 + b"\n",
        train_line(30, mfu=None, dollars="?"),  # optional fields may be absent
        half,  # being written right now
    ]
    run = plots.load((make_run(tmp_path / "r", lines, [glue_line(10, 0.5), b'{"type": "glue", "ta\n']),))[0]
    assert run.train["step"].tolist() == [10, 30, 40] and math.isnan(run.train["loss"][2])
    assert math.isnan(run.train["mfu"][1]) and math.isnan(run.train["dollars"][1])
    assert len(run.glue) == 1
    assert "skipped 9 damaged" in capsys.readouterr().err  # 8 in the log, 1 in glue


def test_a_job_run_again_counts_once_by_its_last_line(tmp_path):
    jobs = [glue_line(10, 0.5, seed=1), glue_line(10, 0.6, seed=2), glue_line(10, 0.9, seed=1)]
    run = plots.load((make_run(tmp_path / "r", [], jobs),))[0]
    assert sorted(r["score"] for r in run.glue) == [0.6, 0.9]


def test_fine_tunings_of_another_recipe_data_or_weights_are_not_averaged_with_the_last(tmp_path, capsys):
    paper = [glue_line(10, 0.5, seed=s, recipe={"lr": 1e-5}, weights="aa") for s in range(5)]
    sane = [glue_line(10, 0.7, seed=s, recipe={"lr": 1e-4}, weights="aa") for s in range(3)]
    other_task = [glue_line(10, 0.9, "CoLA", recipe={"lr": 1e-5}, weights="aa")]
    (run,) = plots.load((make_run(tmp_path / "a", [], [*paper, *other_task, *sane, sane[0]]),))
    assert sorted((g["task"], g["seed"], g["score"]) for g in run.glue) == [
        ("CoLA", 19, 0.9), ("RTE", 0, 0.7), ("RTE", 1, 0.7), ("RTE", 2, 0.7)]  # fmt: skip
    assert "5 fine-tuning(s) with another recipe, data or weights than the last, left out" in capsys.readouterr().err


def test_device_and_family_are_those_of_pretraining(tmp_path):
    moved = [train_line(10), {"type": "header", "device": "NVIDIA H200", "world_size": 8, "family": "bert"}]
    run = plots.load((make_run(tmp_path / "r", moved, [glue_line(10, 0.5)]),), logs=False)[0]
    assert (run.device, run.family) == ("a CPU then 8× NVIDIA H200", "bert")
    run = plots.load((make_run(tmp_path / "s", [], [glue_line(10, 0.5)], header=False),))[0]
    assert (run.device, run.family) == ("fine-tuning device", "from glue")


def test_strided_reading_keeps_held_out_records_and_sees_damage(tmp_path):
    lines = []
    for step in range(1, 1001):
        lines.append(train_line(step))
        if step % 100 == 0:
            lines += [{**train_line(step), "type": "eval"}, b'{"type": "train", "st{"type": "train", "step": 3}\n']
    make_run(tmp_path / "r", lines)
    found, skipped = records.read_jsonl(tmp_path / "r" / "log.jsonl", stride=7)
    kinds = [r["type"] for r in found]
    assert (kinds.count("eval"), kinds.count("header"), skipped) == (10, 1, 10)
    assert 130 < kinds.count("train") <= 145
    found, _ = records.read_jsonl(tmp_path / "r" / "log.jsonl", stride=math.inf)
    assert {r["type"] for r in found} == {"eval", "header"}


# ------------------------------------------------------------------------------------------------ statistics
def test_frontier_is_the_non_dominated_points():
    # (1, 5) is cheapest; (2, 5) is no better than it; (3, 7) and (6, 9) improve; (4, 6), (5, 7), (7, 8) do not.
    x, y = [1, 2, 3, 4, 5, 6, 7], [5, 5, 7, 6, 7, 9, 8]
    assert plots.frontier(x, y).tolist() == [True, False, True, False, False, True, False]
    assert plots.frontier([3, 1, 2], [7, 5, 6], lower=True).tolist() == [False, True, False]
    assert plots.frontier([2, 2, 2], [1, 3, 3]).tolist() == [False, True, True]  # equals do not beat each other
    assert plots.frontier([], []).tolist() == []
    # two clocks that were to stop at the same minute: a thousandth of a second buys no place
    assert plots.frontier([60.074, 60.084, 120], [68, 87, 86]).tolist() == [False, True, False]


def test_frontier_equals_its_definition_on_random_points():
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, y = rng.integers(0, 6, (2, 12)).astype(float)
        beaten = [
            any(x[j] <= x[i] and y[j] >= y[i] and (x[j] < x[i] or y[j] > y[i]) for j in range(12)) for i in range(12)
        ]
        assert plots.frontier(x, y).tolist() == [not b for b in beaten]


def test_standard_error_by_hand():
    assert plots.standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx(math.sqrt(5 / 3) / 2)
    assert math.isnan(plots.standard_error([1.0]))


def record(path, task, score, step=10, **extra):
    return {"series": "s", "family": "f", "path": path, "at": step, "task": task, "score": score, "cost": 4.0} | extra


def test_error_of_one_run_is_over_its_seeds():
    scores = {"RTE": [0.60, 0.62, 0.64], "CoLA": [0.1, 0.3], "MNLI": [0.8]}
    (p,) = plots.points([record("a", t, s) for t in scores for s in scores[t]], "cost")
    assert p.y == pytest.approx((0.62 + 0.2 + 0.8) / 3)  # tasks weigh the same, however many seeds
    rte, cola = 0.02 / math.sqrt(3), 0.1  # s = 0.02 of 3 seeds; s = 0.1414 of 2; one seed tells nothing
    assert p.err == pytest.approx(math.sqrt(rte**2 + cola**2) / 3)
    assert (p.n_runs, p.n_seeds, p.x) == (1, 3, 4.0)


def test_error_of_replicate_runs_is_over_runs_not_over_all_seeds():
    runs = {"a": [0.60, 0.62], "b": [0.70, 0.72], "c": [0.80, 0.82]}
    (p,) = plots.points([record(r, "RTE", s) for r in runs for s in runs[r]], "cost")
    assert p.y == pytest.approx(0.71)
    assert p.err == pytest.approx(0.1 / math.sqrt(3))
    assert p.n_runs == 3


def test_a_record_without_the_cost_is_left_out():
    assert plots.points([record("a", "RTE", 0.5, cost=None), record("a", "RTE", 0.5, cost=math.nan)], "cost") == []


def test_smoothing_keeps_a_constant_and_passes_over_nan():
    assert plots.smooth(np.full(9, 2.0), 4) == pytest.approx(np.full(9, 2.0))
    assert plots.smooth(np.array([1.0, math.nan, 3.0]), 3) == pytest.approx([1.0, 2.0, 3.0])
    assert len(plots.smooth(np.array([]), 0)) == 0


def test_only_tasks_that_all_checkpoints_have_are_averaged(tmp_path, capsys):
    jobs = [glue_line(10, 0.6, "RTE"), glue_line(10, 0.2, "CoLA"), glue_line(20, 0.7, "RTE")]
    runs = plots.load((make_run(tmp_path / "r", [], jobs),))
    assert plots.pareto_records(runs, "glue", "seconds", "", "family")[1] == ["RTE"]
    assert "CoLA" in capsys.readouterr().err
    assert plots.pareto_records(runs, "glue", "seconds", "CoLA", "family")[1] == ["CoLA"]


def test_presets_of_a_family_are_lines_of_their_own(tmp_path):
    folders = [full_run(tmp_path / p, preset=p) for p in ("mosaic-tiny", "mosaic-small")]
    folders += [full_run(tmp_path / f"bert-{i}", family="bert", preset="bert-tiny") for i in range(2)]
    runs = plots.load(tuple(folders))
    assert list(plots.name_series(runs, by_run=False).values()) == ["mosaic-tiny", "mosaic-small", "bert", "bert"]
    assert list(plots.name_series(runs, by_run=True).values()) == ["mosaic-tiny", "mosaic-small", "bert-0", "bert-1"]


def test_a_family_has_the_same_colour_in_every_figure():
    alone = plots.styles({"bert": "bert", "mosaic": "mosaic"})
    crowd = plots.styles({"aaa": "aaa", "bert-tiny": "bert", "bert-big": "bert", "mosaic": "mosaic"})
    assert alone["bert"]["color"] == crowd["bert-tiny"]["color"] == crowd["bert-big"]["color"]
    assert alone["mosaic"]["color"] == crowd["mosaic"]["color"]
    assert len({(str(s["linestyle"]), s["marker"]) for s in crowd.values()}) == 4  # told apart without colour


# ---------------------------------------------------------------------------------------------------- figures
FIGURES = ["pareto", "loss", "masking", "throughput", "glue", "kernels", "ablation"]


@pytest.fixture
def inputs(two_runs, tmp_path):
    """{figure: what it draws}."""
    reports = (kernel_report(tmp_path / "kernels-h200.json"),)
    steps = (*two_runs, step_report(tmp_path / "step-h200.json"))
    return dict.fromkeys(FIGURES, two_runs) | {
        "kernels": reports,
        "throughput": steps,
        "ablation": (make_sweep(tmp_path / "s"),),
    }


@pytest.mark.parametrize("name", FIGURES)
def test_png_and_svg_are_written_and_whole(name, inputs, tmp_path, capsys):
    out = tmp_path / "new" / "folder" / f"{name}.png"
    getattr(plots, name)(inputs[name], out=str(out))
    assert plt.imread(out).shape[1] > 600
    assert ElementTree.parse(out.with_suffix(".svg")).getroot().tag.endswith("svg")
    assert capsys.readouterr().out.split() == [str(out), str(out.with_suffix(".svg"))]
    assert sorted(p.name for p in out.parent.iterdir()) == [f"{name}.png", f"{name}.svg"]  # no temporary left


def test_a_dot_in_the_name_is_part_of_it(two_runs, tmp_path):
    for name in ("lr-0.5", "lr-0.25"):
        plots.loss(two_runs, out=str(tmp_path / "p" / name))
    assert {p.name for p in (tmp_path / "p").iterdir()} == {
        f"lr-0.{n}.{s}" for n in ("5", "25") for s in ("png", "svg")
    }


def test_the_same_data_gives_the_same_svg(two_runs, tmp_path):
    for out in ("a.png", "b.png"):
        plots.pareto(two_runs, out=str(tmp_path / out))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_failed_drawing_leaves_the_old_file(two_runs, tmp_path, monkeypatch):
    (tmp_path / "p.png").write_text("old")

    def full_disk(self, path, **_):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full_disk)
    with pytest.raises(OSError, match="No space"):
        plots.pareto(two_runs, out=str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["p.png"]


def visible_texts(fig):
    """(text, box in pixels) of all that is written: titles, labels, tick labels, legend, annotations."""
    fig.canvas.draw()
    beyond = set()  # tick labels outside the limits exist, but are not drawn
    for ax in fig.axes:
        for kind, axis in ((XTick, ax.xaxis), (YTick, ax.yaxis)):
            low, high = sorted(axis.get_view_interval())
            outside = [t for t in ax.findobj(kind) if not low <= t.get_loc() <= high]
            beyond |= {id(label) for t in outside for label in (t.label1, t.label2)}
    texts = [t for t in fig.findobj(plt.Text) if t.get_visible() and t.get_text().strip() and id(t) not in beyond]
    return [(t.get_text(), t.get_window_extent()) for t in texts]


def overlaps(fig):
    texts = visible_texts(fig)
    pairs = [
        (a, b) for i, (a, box) in enumerate(texts) for b, other in texts[:i] if box.shrunk(0.98, 0.9).overlaps(other)
    ]
    outside = [
        t for t, box in texts if box.x0 < -1 or box.y0 < -1 or box.x1 > fig.bbox.x1 + 1 or box.y1 > fig.bbox.y1 + 1
    ]
    return pairs, outside


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps_or_is_cut_off(name, inputs, tmp_path, monkeypatch):
    fig = drawn(monkeypatch, getattr(plots, name), inputs[name], out=str(tmp_path / "p.png"))
    assert len(visible_texts(fig)) > 8
    assert overlaps(fig) == ([], [])


def test_no_text_overlaps_in_a_crowded_pareto(tmp_path, monkeypatch):
    glue = sorted(plots.GLUE)
    runs = [full_run(tmp_path / f"a run with quite a long name, number {i}", level=i / 50, tasks=glue, rate=3 + i,
                     device=f"a device called {i % 2}", preset=f"size {i}") for i in range(8)]  # fmt: skip
    for options in ({"by": "run"}, {"published": True}, {"published": True, "x": "gpu_hours", "linear": True}):
        fig = drawn(monkeypatch, plots.pareto, tuple(runs), out=str(tmp_path / "p.png"), **options)
        assert overlaps(fig) == ([], []), options


def texts_of(fig):
    return " ".join(" ".join(t.get_text() for t in fig.findobj(plt.Text)).split())


def test_pareto_rings_the_frontier_and_shows_baselines(two_runs, tmp_path, monkeypatch):
    fig = drawn(monkeypatch, plots.pareto, two_runs, out=str(tmp_path / "p.png"), task="RTE", linear=True)
    ax = fig.axes[0]
    (ring,) = [line for line in ax.lines if line.get_markersize() == 11]
    # bert is cheaper (0.8 s per step) but worse by 10 points, so only its first checkpoint is on the frontier.
    expected = [(80, 54.6), (100, 64.6), (200, 68.6), (400, 72.6), (800, 76.6)]
    assert list(zip(ring.get_xdata()[:-1] * 60, ring.get_ydata())) == [pytest.approx(p) for p in expected]
    assert ax.get_xlim()[0] == 0
    at_edge = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
    assert [line.get_ydata()[0] for line in at_edge] == pytest.approx([50.6, 50.6])
    text = texts_of(fig)
    assert "RTE dev accuracy against pretraining time" in text and "majority class" in text
    assert "3 fine-tuning seeds" in text and "± 1 standard error" in text and "on a CPU" in text
    assert any(np.allclose(line.get_ydata(), 50.0) for line in ax.lines)  # the majority class


def test_pareto_says_when_devices_differ(tmp_path, monkeypatch):
    runs = full_run(tmp_path / "a", device="A100"), full_run(tmp_path / "b", device="H200", family="bert")
    fig = drawn(monkeypatch, plots.pareto, runs, out=str(tmp_path / "p.png"))
    assert "Different devices, so these costs do not compare: mosaic on A100; bert on H200" in texts_of(fig)
    fig = drawn(monkeypatch, plots.pareto, runs, out=str(tmp_path / "p.png"), x="tokens")
    assert "Different devices: mosaic on A100; bert on H200" in texts_of(fig)


def test_weights_of_unknown_cost_are_not_shown_as_untrained(tmp_path, monkeypatch, capsys):
    downloaded = [glue_line(0, 0.9, checkpoint="model.safetensors", pretrain_seconds=None)]
    runs = full_run(tmp_path / "a"), make_run(tmp_path / "b", [], downloaded, family="other")
    fig = drawn(monkeypatch, plots.pareto, runs, out=str(tmp_path / "p.png"), task="RTE")
    assert "no pretrain_seconds known, left out: other" in capsys.readouterr().err
    assert len([line for line in fig.axes[0].lines if line.get_markerfacecolor() == "white"]) == 1  # a's


def test_axis_is_logarithmic_when_the_costs_span_more_than_ten(tmp_path, monkeypatch):
    run = make_run(tmp_path / "r", [], [glue_line(s, 0.6) for s in (10, 100, 900)])
    scale = lambda **k: drawn(monkeypatch, plots.pareto, (run,), str(tmp_path / "p.png"), **k).axes[0].get_xscale()
    assert (scale(), scale(linear=True)) == ("log", "linear")
    run = make_run(tmp_path / "r", [], [glue_line(s, 0.6) for s in (100, 900)])
    assert (scale(), scale(log=True)) == ("linear", "log")


def test_published_points_are_sourced_and_only_shown_where_comparable(capsys):
    data = json.loads(plots.PUBLISHED.read_text(encoding="utf-8"))
    for p in data["points"]:
        assert p["mark"] in data["marks"] and p["source"] and p["hardware"] and p["protocol"]
        assert len(p["hours"]) == len(p["score"])
    seconds = {name: (cost, score) for name, cost, score in plots.published_points(sorted(plots.GLUE), "seconds")}
    cost, score = seconds["MosaicBERT-Base, abstract, 8× A100-80GB"]
    assert (list(cost), score) == ([pytest.approx(1.13 * 3600)], [79.6])
    dollars = {name: cost for name, cost, _ in plots.published_points(sorted(plots.GLUE), "dollars")}
    assert dollars["MosaicBERT-Base, abstract, 8× A100-80GB"] == pytest.approx(20, abs=0.1)
    assert not any("Cramming" in name for name in dollars)  # no price was published
    rte = {name: score for name, _, score in plots.published_points(["RTE"], "gpu_hours")}
    assert rte["MosaicBERT-Base, model card, 8× A100-80GB"] == [81.36]
    assert not any("Fig. 1B" in name for name in rte)  # the curve is of averages
    assert plots.published_points(["my-own-task"], "seconds") == [] and "no published point" in capsys.readouterr().err


def test_throughput_is_the_median_of_the_log(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / f"{n}", [train_line(s) for s in range(1, 100)], seq_len=n) for n in (128, 512)]
    fig = drawn(monkeypatch, plots.throughput, tuple(runs), out=str(tmp_path / "p.png"))
    assert fig.axes[0].lines[0].get_ydata().tolist() == [9050.0, 9050.0]
    assert fig.axes[1].lines[0].get_ydata().tolist() == [50.0, 50.0]
    assert [t.get_text() for t in fig.axes[1].get_xticklabels()] == ["128", "512"]


def test_throughput_shows_peers_and_the_gpu_at_its_peak(tmp_path, monkeypatch):
    fig = drawn(monkeypatch, plots.throughput, (step_report(tmp_path / "step.json"),), out=str(tmp_path / "p.png"))
    speeds = {line.get_label(): line.get_ydata() for line in fig.axes[0].lines}
    assert list(speeds["mosaic-base at the GPU's peak"]) == [200_000, 200_000]
    text = texts_of(fig)
    assert "mosaic-base, compiled" in text and "BertForMaskedLM, base" in text and "on H200" in text
    mfu = {tuple(bar.get_ydata()) for bar in fig.axes[1].lines if len(bar.get_ydata()) == 2}
    assert {(50.0, 50.0), (20.0, 20.0)} <= mfu


def test_kernel_bars_are_the_rates_and_the_roofline_is_above_each_group(tmp_path, monkeypatch):
    fig = drawn(monkeypatch, plots.kernels, (kernel_report(tmp_path / "k.json"),), out=str(tmp_path / "p.png"))
    assert len(fig.axes) == 4
    for ax, factor in zip(fig.axes, (0.1, 0.1, 0.2, 0.2)):
        ours, peer, *_ = ax.containers
        assert [bar.get_height() for bar in ours] == pytest.approx([n * 0.5 * factor for n in (128, 512, 4096, 8192)])
        assert [bar.get_height() for bar in peer] == pytest.approx([n * 0.25 * factor for n in (128, 512, 4096, 8192)])
        roofs = {round(c.get_segments()[0][0][1], 6) for c in ax.collections}
        assert roofs == {round(n * factor, 6) for n in (128, 512, 4096, 8192)}
        assert [t.get_text() for t in ax.get_xticklabels()] == ["128", "512", "4096", "8192"]
    assert "did not run: varlen_attn (1 of " in texts_of(fig)


def test_ablation_is_the_paired_difference_with_its_confidence_interval(tmp_path, monkeypatch):
    fig = drawn(monkeypatch, plots.ablation, (make_sweep(tmp_path / "s"),), out=str(tmp_path / "p.png"))
    loss, score = fig.axes
    assert score.get_position().x0 - loss.get_position().x1 < 0.1  # the text above the first does not push it away
    assert [t.get_text() for t in loss.get_yticklabels()] == ["adamw", "wide"]
    means = sorted(round(c.lines[0].get_xdata()[0], 6) for c in loss.containers)
    assert means == [-0.24, -0.24, -0.12, -0.12]  # the spread of 1 nat over seeds is paired away
    (low, high), *_ = [c.lines[2][0].get_segments()[0][:, 0] for c in loss.containers]
    half = (
        4.302653 * 0.02 / math.sqrt(3)
    )  # Student's 97.5 % point of 2 degrees of freedom; differences 0.10, 0.12, 0.14
    assert (low, high) == (pytest.approx(-0.12 - half, abs=1e-5), pytest.approx(-0.12 + half, abs=1e-5))
    assert sorted(round(c.lines[0].get_xdata()[0], 6) for c in score.containers) == [1.2, 1.2, 2.4, 2.4]
    assert "20,000 tokens" in texts_of(fig) and "n = 3" in texts_of(fig)
    fig = drawn(monkeypatch, plots.ablation, (str(tmp_path / "s"),), out=str(tmp_path / "p.png"), budget=10_000)
    assert "10,000 tokens" in texts_of(fig)


def test_sweeps_at_equal_tokens_and_at_equal_time_are_drawn_apart(tmp_path, monkeypatch):
    at_tokens, at_time = make_sweep(tmp_path / "tokens"), make_sweep(tmp_path / "time", variants=("", "wide", "adamw"))
    records = Path(at_time, "records.jsonl")
    records.write_text(records.read_text().replace('"equal": "tokens"', '"equal": "time"'))
    fig = drawn(monkeypatch, plots.ablation, (at_tokens, at_time), out=str(tmp_path / "p.png"))
    assert [ax.get_xlabel().split("\n")[1] for ax in fig.axes] == ["at equal tokens"] * 2 + ["at equal time"] * 2
    for ax, gains in zip(fig.axes, ([-0.12, -0.24], [1.2, 2.4], [-0.24, -0.12], [2.4, 1.2])):  # rows: adamw, wide
        assert [round(c.lines[0].get_xdata()[0], 6) for c in ax.containers[:2]] == gains
    assert "20,000 tokens of the first preset, and its time for the others" in texts_of(fig)


def test_a_variant_that_one_sweep_has_not_run_is_said_to_be_so(tmp_path, monkeypatch):
    one, other = make_sweep(tmp_path / "tokens"), make_sweep(tmp_path / "time", variants=("", "wide"))
    records = Path(other, "records.jsonl")
    records.write_text(records.read_text().replace('"equal": "tokens"', '"equal": "time"'))
    fig = drawn(monkeypatch, plots.ablation, (one, other), out=str(tmp_path / "p.png"))
    said = [[t.get_text() for t in ax.texts if t.get_text() == "not run"] for ax in fig.axes]
    assert [len(texts) for texts in said] == [0, 0, 2, 2]  # adamw of two presets
    assert overlaps(fig) == ([], [])


def test_two_sweeps_of_one_kind_are_never_paired_and_each_has_its_largest_budget(tmp_path, monkeypatch, capsys):
    small, large = make_sweep(tmp_path / "small"), make_sweep(tmp_path / "large", variants=("", "wide", "adamw"))
    records = Path(large, "records.jsonl")
    own = [r for line in records.read_text().splitlines() if (r := json.loads(line))["type"] == "sweep"]
    moved = [r | {"budget": 7 * r["budget"], "value": r["value"] + r["seed"]} for r in own]
    records.write_text("".join(json.dumps(r) + "\n" for r in moved))
    fig = drawn(monkeypatch, plots.ablation, (small, large), out=str(tmp_path / "p.png"))
    below = [ax.get_xlabel().split("\n")[1] for ax in fig.axes[::2]]
    assert below == ["at equal tokens, small", "at equal tokens, large"]
    for ax, gains in zip(fig.axes[::2], ([-0.12, -0.24], [-0.24, -0.12])):  # rows: adamw, wide
        assert [round(c.lines[0].get_xdata()[0], 6) for c in ax.containers[:2]] == gains
    assert "20,000 tokens, 140,000 tokens" in texts_of(fig)
    drawn(monkeypatch, plots.ablation, (small, large), out=str(tmp_path / "p.png"), budget=20_000)
    assert "no variant with that budget, left out: " in capsys.readouterr().err


def test_an_effect_that_may_be_chance_has_a_hollow_marker_and_one_seed_no_bar(tmp_path, monkeypatch):
    folder = tmp_path / "s"
    folder.mkdir()
    values = [("", (5.0, 5.2, 5.1)), ("maybe", (4.9, 5.3, 5.0)), ("surely", (4.0, 4.2, 4.11)), ("once", (4.5,))]
    rows = [sweep_row("mosaic-tiny", v, seed, 10_000, "loss", x) for v, xs in values for seed, x in enumerate(xs)]
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    fig = drawn(monkeypatch, plots.ablation, (str(folder),), out=str(tmp_path / "p.png"))
    maybe, surely, once = fig.axes[0].containers
    faces = [c.lines[0].get_markerfacecolor() for c in (maybe, surely, once)]
    assert [face == "white" for face in faces] == [True, False, True]
    assert "n = 1 to 3" in texts_of(fig)


# ------------------------------------------------------------------------------- replicates, stems, sweeps
def configured(folder, **settings):
    """Gives a run folder a config.json with these settings."""
    shape = {"mlp": settings.pop("mlp", "geglu")}
    (Path(folder) / "config.json").write_text(json.dumps({"train": {"seq_len": 128, "model": shape, **settings}}))
    return folder


def test_runs_that_differ_in_their_seed_are_replicates_and_others_are_not(tmp_path):
    def series(**settings):
        names = [f"r{i}-{len(list(tmp_path.iterdir()))}" for i in range(2)]
        folders = [full_run(tmp_path / name) for name in names]
        for i, folder in enumerate(folders):
            configured(folder, name=names[i], seed=i, **{k: v[i] for k, v in settings.items()})
        return sorted(set(plots.name_series(plots.load(tuple(folders)), by_run=False).values()))

    assert series(max_tokens=(1, 2), checkpoint_every=(0.1, 5), cooldown_from=("", "x")) == ["mosaic"]
    assert series(cooldown_from=("", "x"), began_from=(None, ["x", 1])) == ["mosaic"]
    assert series(optimizer=("adamw", "muon")) == ["mosaic, optimizer adamw", "mosaic, optimizer muon"]
    assert series(mlp=("gelu", "geglu")) == ["mosaic, mlp geglu", "mosaic, mlp gelu"]


def test_of_a_stem_and_its_branches_only_the_annealed_ends_are_drawn(tmp_path, monkeypatch):
    def log(*steps):
        return [{**train_line(s, 9 - s / 100), "type": "eval"} for s in steps]

    stem = configured(make_run(tmp_path / "stem", log(100, 200, 300, 400)), schedule="wsd", seed=1)
    of = str(tmp_path / "stem" / "ckpt" / "step_00000080")
    branch = configured(make_run(tmp_path / "branch", log(90, 101)), schedule="wsd", seed=1, cooldown_from=of)
    fig = drawn(monkeypatch, plots.pareto, (stem, branch), out=str(tmp_path / "p.png"), metric="loss", x="tokens")
    (line,) = [line for line in fig.axes[0].lines if line.get_label() == "mosaic"]
    assert list(line.get_xdata() * 1000) == [101_000, 400_000]
    fig = drawn(monkeypatch, plots.pareto, (stem,), out=str(tmp_path / "p.png"), metric="loss", x="tokens")
    (line,) = [line for line in fig.axes[0].lines if line.get_label() == "mosaic"]
    assert len(line.get_xdata()) == 4  # without branches it is a run like others


def test_three_stems_and_their_branches_are_two_points_of_three_runs(tmp_path):
    """began_from names the checkpoint, so it differs in every branch."""
    runs = []
    for seed in (1, 2, 3):
        stem = make_run(
            tmp_path / f"stem{seed}", [{**train_line(s, 5 + seed - s / 1e3), "type": "eval"} for s in (800, 1000)]
        )
        runs.append(configured(stem, schedule="wsd", seed=seed, max_steps=1000, began_from=None))
        of = f"{stem}/ckpt/step_00000400"
        branch = make_run(tmp_path / f"branch{seed}", [{**train_line(500, 5 + seed), "type": "eval"}])
        settings = dict(schedule="wsd", seed=seed, max_steps=1000, cooldown_from=of, began_from=[of, seed])
        runs.append(configured(branch, **settings))
    found, _ = plots.pareto_records(plots.load(tuple(runs)), "loss", "tokens", "", "family")
    assert [(p.series, p.at, p.n_runs, p.y) for p in plots.points(found, "tokens")] == [
        ("mosaic", 500, 3, 7.0), ("mosaic", 1000, 3, 6.0)]  # fmt: skip


def test_the_middle_of_a_run_is_no_replicate_of_the_end_of_a_shorter_one(tmp_path):
    short = [{**train_line(1000, 4.0), "type": "eval"}]
    long = [{**train_line(1000, 5.0), "type": "eval"}, {**train_line(2000, 3.5), "type": "eval"}]
    runs = (configured(make_run(tmp_path / "short", short), max_steps=1000, seed=1),
            configured(make_run(tmp_path / "long", long), max_steps=2000, seed=2))  # fmt: skip
    found, _ = plots.pareto_records(plots.load(runs), "loss", "tokens", "", "family")
    assert sorted((p.at, p.n_runs, p.y) for p in plots.points(found, "tokens")) == [
        (1000, 1, 4.0), (1000, 1, 5.0), (2000, 1, 3.5)]  # fmt: skip


def test_the_last_checkpoint_of_a_stem_that_is_still_going_is_not_drawn_as_its_end(tmp_path):
    stem = make_run(tmp_path / "stem", [{**train_line(s), "type": "eval"} for s in (100, 200)])
    of = f"{stem}/ckpt/step_00000100"
    branch = make_run(tmp_path / "branch", [{**train_line(125), "type": "eval"}])
    runs = configured(stem, max_tokens=300_000), configured(branch, max_tokens=300_000, cooldown_from=of)
    found, _ = plots.pareto_records(plots.load(runs), "loss", "tokens", "", "family")
    assert [r["step"] for r in found] == [125]


def test_runs_of_so_many_minutes_are_averaged_at_the_same_minute(tmp_path):
    runs = []
    for seed, speed in ((1, 1.0), (2, 1.1)):
        glue = [glue_line(round(s * speed), 0.5 + seed / 10, pretrain_seconds=s + seed) for s in (60, 120)]
        runs.append(configured(make_run(tmp_path / f"r{seed}", [], glue), max_minutes=2, seed=seed))
    found, _ = plots.pareto_records(plots.load(tuple(runs)), "glue", "seconds", "", "family")
    first, second = plots.points(found, "pretrain_seconds")
    assert (first.at, first.n_runs, first.x, first.y) == (1.0, 2, 61.5, pytest.approx(0.65))
    assert (second.at, second.n_runs) == (2.0, 2)


def test_two_checkpoints_of_one_planned_minute_are_not_two_replicates(tmp_path):
    glue = [glue_line(s, 0.5 + s / 1000, pretrain_seconds=s) for s in (60, 118, 120)]
    run = configured(make_run(tmp_path / "r", [], glue), max_minutes=2, seed=1)
    found, _ = plots.pareto_records(plots.load((run,)), "glue", "seconds", "", "family")
    first, second = plots.points(found, "pretrain_seconds")
    assert (second.at, second.n_seeds, second.y) == (2.0, 1, pytest.approx(0.62))
    assert first.at == 1.0


def test_a_sweeps_records_draw_what_its_run_folders_would(tmp_path, monkeypatch, capsys):
    folder = make_sweep(tmp_path / "results" / "s", variants=("",))
    with open(Path(folder) / "records.jsonl", "a") as f:
        f.write('{"type": "sweep", "run"\n')
    fig = drawn(monkeypatch, plots.pareto, (str(tmp_path / "results" / "*"),), out=str(tmp_path / "p.png"))
    (line,) = [line for line in fig.axes[0].lines if line.get_label() == "mosaic"]
    assert list(line.get_xdata()) == [10, 20] and list(line.get_ydata()) == pytest.approx([60, 60])
    text = texts_of(fig)
    assert "2 fine-tuning seeds · 3 runs per point" in text and "RTE dev accuracy" in text
    assert "skipped 1 damaged" in capsys.readouterr().err
    fig = drawn(monkeypatch, plots.pareto, (folder,), out=str(tmp_path / "p.png"), metric="loss", x="dollars")
    (line,) = [line for line in fig.axes[0].lines if line.get_label() == "bert"]
    assert list(line.get_ydata()) == pytest.approx([6.9, 6.8])


def test_heat_map_compares_last_checkpoints_with_the_baseline(tmp_path, monkeypatch):
    a = make_run(tmp_path / "a", [], [glue_line(10, 0.2), glue_line(20, 0.6, seed=1), glue_line(20, 0.7, seed=2)])
    b = make_run(tmp_path / "b", [], [glue_line(30, 0.5), glue_line(30, 0.3, "CoLA")])
    fig = drawn(monkeypatch, plots.glue, (a, b), out=str(tmp_path / "p.png"), baseline="b")
    cells = [t.get_text() for t in fig.axes[0].texts if t.get_text()]
    assert cells == ["–", "65.0\n+15.0", "30.0", "50.0", "below: points above b"]
    assert fig.axes[0].texts[0].get_color() == "black"  # on an empty cell, which is white


def test_heat_map_does_not_mix_foreign_weights_with_the_random_ones_of_their_shape(tmp_path, monkeypatch):
    """Both have step 0."""
    downloaded = make_run(tmp_path / "a", [], [glue_line(0, 0.8, checkpoint="model.safetensors"), glue_line(0, 0.5)])
    control = make_run(tmp_path / "b", [], [glue_line(0, 0.5)])
    fig = drawn(monkeypatch, plots.glue, (downloaded, control), out=str(tmp_path / "p.png"))
    assert [t.get_text() for t in fig.axes[0].texts][:2] == ["80.0", "50.0\n-30.0"]


@pytest.mark.parametrize("tasks", [("RTE",), ("RTE", "CoLA", "MRPC")])
def test_heat_map_has_room_for_long_names(tmp_path, monkeypatch, tasks):
    runs = [full_run(tmp_path / f"evidence-mosaic-small-26M-{i}", level=i / 10, tasks=tasks) for i in range(2)]
    fig = drawn(monkeypatch, plots.glue, tuple(runs), out=str(tmp_path / "p.png"))
    assert overlaps(fig) == ([], [])


# ------------------------------------------------------------------------------------------------ command line
def run_cli(*args, cwd):
    command = [sys.executable, str(REPO / "plots.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_command_line_expands_patterns_and_mentions_what_it_left_out(two_runs, tmp_path):
    make_run(tmp_path / "runs" / "no-glue-yet", [train_line(10)])
    (tmp_path / "runs" / "empty").mkdir()
    done = run_cli("pareto", "runs/*", "--task", "RTE", "--x", "tokens", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["plots/pareto.png", "plots/pareto.svg"]
    assert "no fine-tuning result (glue/*.jsonl) yet, left out: runs/no-glue-yet" in done.stderr
    assert "no run folder (no log.jsonl in it) and no sweep (records.jsonl), left out: runs/empty" in done.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["pareto"], "no run folder"),
        (["loss", "nothing/*"], "no run folder"),
        (["pareto", "runs/bare"], "nothing drawn"),
        (["loss", "runs/bare"], "nothing drawn"),
        (["masking", "runs/bare"], "nothing drawn"),
        (["throughput", "runs/bare"], "nothing drawn"),
        (["kernels", "runs/a"], "0 kernel reports in runs/a"),
        (["ablation", "runs/a"], "no variant in runs/a"),
        (["glue", "runs/bare"], "nothing drawn"),
        (["pareto", "runs/a", "--task", "WNLI"], "choose one with --task: CoLA, RTE"),
        (["pareto", "runs/a", "--log", "--linear"], "exclude each other"),
        (["pareto", "runs/free", "--x", "dollars"], "try another --x"),
        (["pareto", "runs/a", "--metric", "loss", "--published"], "does not go with --metric loss"),
        (["glue", "runs/a", "--baseline", "z"], "--baseline is one of a"),
        (["pareto", "runs/a", "--out", "runs/a/log.jsonl/p.png"], "log.jsonl"),
        (["pareto", "runs/a", "--out", "."], "--out .: give the .png to write"),
        (["pareto", "runs/a", "--out", "p.pdf"], "--out p.pdf: give the .png to write"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(args, says, tmp_path):
    full_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "bare")
    make_run(tmp_path / "runs" / "free", [], [glue_line(10, 0.5, pretrain_dollars=0.0)])
    before = sorted(tmp_path.rglob("*"))
    done = run_cli(*args, cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert re.match(r"error: ", errors[0]) and says in errors[0]
    assert done.stdout == "" and sorted(tmp_path.rglob("*")) == before


def test_needs_no_torch(two_runs, tmp_path):
    code = "import sys; sys.modules['torch'] = None; import plots; plots.loss(tuple(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *two_runs], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPO)}
    )
    assert done.returncode == 0


def test_a_share_of_a_thousand_runs_takes_its_share_of_20_s(tmp_path):
    lines = [train_line(s, 3 + 6 * math.exp(-s / 2000)) for s in range(1, 10_001)]
    first = Path(make_run(tmp_path / "00", lines))
    for i in range(1, 20):
        (tmp_path / f"{i:02d}").mkdir()
        os.link(first / "log.jsonl", tmp_path / f"{i:02d}" / "log.jsonl")
    # as of 1,000 runs: each may keep 500,000 / 1,000 lines
    started = time.process_time()
    kept = [records.read_jsonl(tmp_path / f"{i:02d}" / "log.jsonl", stride=20)[0] for i in range(20)]
    assert time.process_time() - started < 0.02 * 20  # CPU seconds: the machine may be busy with other things
    assert max(map(len, kept)) <= 510


@pytest.mark.slow
def test_a_thousand_runs_of_ten_thousand_lines_take_under_20_s_and_little_memory(tmp_path):
    lines = [
        train_line(s, 3 + 6 * math.exp(-s / 2000), padding_avoided=0.23, peak_mem_gb=None) for s in range(1, 10_001)
    ]
    first = Path(make_run(tmp_path / "0000", lines, [glue_line(100, 0.5), glue_line(200, 0.6)]))
    for i in range(1, 1000):  # hard links: every file is read, without filling the disk with 3 GB
        (tmp_path / f"{i:04d}").mkdir()
        os.link(first / "log.jsonl", tmp_path / f"{i:04d}" / "log.jsonl")
    code = "import plots, resource, sys; plots.loss((sys.argv[1],), out=sys.argv[2]); "
    code += "u = resource.getrusage(resource.RUSAGE_SELF); "
    # VmHWM: ru_maxrss of a new process begins with what its parent had
    code += "peak = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]; "
    code += "print(u.ru_utime + u.ru_stime, peak, file=sys.stderr)"
    command = [sys.executable, "-c", code, str(tmp_path / "0*"), str(tmp_path / "p.png")]
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    cpu_seconds, kib = map(float, done.stderr.split())  # CPU seconds: the machine may be busy with other things
    print(f"{time.perf_counter() - started:.1f} s, of which {cpu_seconds:.1f} s of CPU; {kib / 1024:.0f} MiB")
    assert cpu_seconds < 20 and kib < 400 * 1024
