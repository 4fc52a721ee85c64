"""Draws the figures, from run folders and what is committed in results/, and nothing else.

    python plots.py pareto runs/*              # fine-tuned score against pretraining time
    python plots.py pareto runs/* --published  # with the papers' points, as hollow markers
    python plots.py pareto results/shapes --metric loss     # a sweep's records; held-out loss
    python plots.py loss runs/*                # MLM loss against tokens, training and held-out
    python plots.py ablation results/ablation-tokens results/ablation-time   # a sweep's variants
    python plots.py dryrun results/dryrun-*.json   # where a step's time goes on a GPU, modelled

Each writes plots/<figure>.png, or --out, in seconds; 1,000 runs of 10,000 log lines take under
20 s. A run may still be training. All settings of a figure: python plots.py <figure> --help
"""

import io
import itertools
import json
import math
import re
import textwrap
from collections import Counter, defaultdict, namedtuple
from pathlib import Path
from typing import Annotated, Literal

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.font_manager import get_font_names
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy.ndimage import uniform_filter1d

import records
from records import Run, find, listed, note, read_sweep, standard_error

PUBLISHED = Path(__file__).parent / "results" / "published.json"
# Okabe & Ito's colour-blind-safe palette without its yellow (pale on white) and its black (the
# frontier's); markers and dashes say the same again, for readers of a grey print
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
DASHES = ["-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (9, 3)), (0, (3, 1, 1, 1, 1, 1))]
FAMILIES = ["mosaic", "bert", "nano"]  # each has its colour in all figures; others come after them
GLUE = {"MNLI", "QQP", "QNLI", "SST-2", "CoLA", "STS-B", "MRPC", "RTE"}
COSTS = {  # --x: name, key in logs, units
    "seconds": ("time", "train_seconds", {"seconds": 1, "minutes": 60, "hours": 3600}),
    "gpu_hours": ("device-hours", "gpu_seconds", {"": 3600}),
    "dollars": ("dollars", "dollars", {"": 1}),
    "tokens": ("tokens", "tokens", {"": 1, "thousands": 1e3, "millions": 1e6, "billions": 1e9}),
}
METRICS = {  # --metric: name, unit, scale
    "glue": ("Dev score", " (%)", 100),
    "loss": ("Held-out MLM loss", " (nats)", 1),
    "accuracy": ("Held-out MLM accuracy", " (%)", 100),
    "pseudo_perplexity": ("Held-out pseudo-perplexity", "", 1),
    "blimp": ("Accuracy on BLiMP", " (%)", 100),
}
# for run names in Chinese, where one is installed
FONTS = {"Noto Sans CJK SC", "Noto Sans CJK JP", "Hiragino Sans", "Microsoft YaHei", "SimHei"}
plt.switch_backend("Agg")  # files only: works without a display
plt.style.use(Path(__file__).with_suffix(".mplstyle"))
plt.rcParams["font.family"] = ["DejaVu Sans", *sorted(FONTS & set(get_font_names()))]

Paths = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(help="runs/*, results/*")]
Out = Annotated[str, tyro.conf.arg(help="file to write: .png, .svg or .pdf")]
Cost = Annotated[Literal[*COSTS], tyro.conf.arg(help="horizontal axis")]
# a checkpoint: cost x, mean score y, its standard error err (nan if nothing tells)
Point = namedtuple("Point", "line trained x y err n_runs n_seeds")


def frontier(x: list[float], y: list[float], lower: bool, same: float = 0.01) -> np.ndarray:
    """(n,) bool: the points that no other beats, by being better (lower=True: smaller) and no more
    expensive, or as good and cheaper. Costs that differ by less than the share `same` are equal."""
    x, y = np.asarray(x, float), np.asarray(y, float) * (-1 if lower else 1)
    beaten = [((y > b) & (x <= a * (1 + same)) | (y >= b) & (x < a * (1 - same))).any()
              for a, b in zip(x, y)]
    return ~np.array(beaten, bool)


def points(scores: list[dict]) -> list[Point]:
    """Averages scores (keys line, at, trained, run, task, score, cost) into Points, by cost.

    A run's score: mean over seeds, then over tasks. A sweep's runs of one preset, variant and
    budget (one `line`, one `at`) are averaged, with the error over runs. A single run has the
    error over its fine-tuning seeds, tasks taken as independent: sqrt(sum of squared errors) /
    tasks, to which a task with one seed adds nothing; of BLiMP, the record's.
    """
    groups, costs = defaultdict(lambda: defaultdict(lambda: defaultdict(list))), defaultdict(list)
    recorded = {}
    for r in scores:
        key = r["line"], r["trained"], r["at"]
        groups[key][r["run"]][r["task"]].append(r["score"])
        costs[key].append(r["cost"])
        recorded[key] = r.get("stderr", math.nan)
    found = []
    for key, runs in groups.items():
        jobs = [job for tasks in runs.values() for job in tasks.values()]
        y = [np.mean([np.mean(job) for job in tasks.values()]) for tasks in runs.values()]
        errors = [e for job in jobs if not math.isnan(e := standard_error(job))]
        of_one = math.hypot(*errors) / len(jobs) if errors else recorded[key]
        err = standard_error(y) if len(y) > 1 else of_one
        found.append(Point(*key[:2], np.mean(costs[key]), np.mean(y), err, len(y),
                           max(map(len, jobs))))
    return sorted(found, key=lambda p: p.x)


def published_points(x: Cost) -> list[tuple[str, np.ndarray, list[float]]]:
    """(name and hardware, costs in the units of the logs, GLUE averages in %) of
    results/published.json, of the points whose cost is known."""
    found = []
    for p in records.read_json(PUBLISHED)["points"]:
        hours, price = np.array(p["hours"]), p.get("dollars_per_gpu_hour") or math.nan
        cost = {"seconds": hours * 3600, "gpu_hours": hours * 3600 * p["n_gpus"],
                "dollars": hours * p["n_gpus"] * price,
                "tokens": np.array(p.get("tokens_billion", math.nan)) * 1e9}[x]
        if np.isfinite(cost).all():
            name = ", ".join(filter(None, [p["name"], p.get("label"), p["hardware"]]))
            found.append((name, cost, p["score"]))
    return found


def name_lines(options: dict[object, list[str]]) -> dict[object, str]:
    """{line: names it could have, shortest first} -> the first that no other line could have."""
    taken = Counter(name for names in options.values() for name in set(names))
    return {line: next((n for n in names if taken[n] == 1), names[-1])
            for line, names in options.items()}


def styles(families: dict[str, str]) -> dict[str, dict]:
    """Colour, dashes and marker of each line, given {its name: its family}. Families are told
    apart by colour; where there is one only, its lines are, beginning with its own colour."""
    known = list(dict.fromkeys([*FAMILIES, *sorted(set(families.values()))]))
    place = {name: known.index(family) for name, family in families.items()}
    alone, looks = len(set(place.values())) == 1, {}
    for i, name in enumerate(sorted(place, key=lambda name: (place[name], name))):
        looks[name] = {"color": COLOURS[(place[name] + i * alone) % len(COLOURS)],
                       "ls": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}
    return looks


def cost_axis(ax, x: Cost, top: float, log: bool = False) -> float:
    """Labels and scales a cost axis that reaches top; returns the unit to divide by."""
    cost, _, units = COSTS[x]
    unit = [next(iter(units)), *(u for u in units if units[u] * 3 <= top)][-1]
    ax.set_xlabel(f"pretraining {cost}" + f" ({unit})" * bool(unit))
    if log:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.9g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    return units[unit]


def finish(fig, out: str, title: str, lines: list[str], handles: list) -> None:
    """Title, small grey lines under it, a legend below the axes where it covers nothing; then
    writes `out`, whole or not at all. SystemExit where matplotlib knows no such format."""
    text = "\n".join(row for line in lines for row in textwrap.wrap(line, 100))
    fig.axes[0].set_title(title, pad=8 + 10.5 * (text.count("\n") + 1))
    # not in the layout: its width would push other panels away; the title's pad keeps it free
    fig.axes[0].annotate(text, (0, 1), (0, 5), "axes fraction", "offset points", va="bottom",
                         fontsize=7.5, color="0.35", in_layout=False)
    if len(handles) > 30:
        handles[29:] = [plt.Line2D([], [], ls="", label=f"and {len(handles) - 29} more")]
    labels = [h.get_label() for h in handles]
    columns = max(1, min(len(handles), 105 // (max(map(len, labels)) + 10)))
    labels = [" " * label.startswith("_") + label for label in labels]  # else it is left out
    fig.legend(handles, labels, loc="outside lower center", ncols=columns)
    fig.set_figheight(fig.get_figheight() + 0.18 * (math.ceil(len(handles) / columns) - 2))
    picture, kind = io.BytesIO(), Path(out).suffix[1:] or "png"
    try:  # without a date the same data gives the same file
        fig.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else None)
    except ValueError as e:
        raise SystemExit(f"error: --out {out}: {e}") from None
    plt.close(fig)
    records.write_atomically(Path(out), picture.getvalue())
    print(out)


def checkpoints(runs: list[Run], sweeps: list[Path], metric: str, x: Cost) -> list[dict]:
    """The scores that pareto draws, for points(), with family, device, measures and majority. A
    line is a run, its points at its steps, or a preset and variant of a sweep, at its budgets.
    Held-out records are fine-tunings of a task named like the metric."""
    log_key = COSTS[x][1]
    key = "tokens" if x == "tokens" else "pretrain_" + log_key.removeprefix("train_")
    names, found = {run.path: run.names for run in runs}, []
    for run in runs:
        about = {"line": run.path, "run": run.path, "family": run.family, "device": run.device}
        own = [r for r in run.glue if r["step"] or r.get("checkpoint") == "random"]
        if metric == "blimp":
            own = records.read_blimp(run.path).values()
            own = [r | {"task": metric, key: r[log_key]} for r in own]
        elif metric != "glue":
            table = zip(*(run.eval[c].tolist() for c in ("step", metric, log_key)))
            own = [{"task": metric, "step": step, "score": score, key: cost}
                   for step, score, cost in table if step and math.isfinite(score)]
        found += [r | about | {"at": r["step"], "trained": r["step"] > 0, "cost": r.get(key),
                               "measures": list(r.get("metrics", ()))} for r in own]
    for sweep, r in [(path.parent, r) for path in sweeps for r in read_sweep(path)]:
        variant, own = r["variant"], (r["family"], r["preset"], f"{sweep}: {r['preset']}")
        line = sweep, r["preset"], variant
        names[line] = [name + f", {variant}" * bool(variant) for name in own]
        about = {"line": line, "run": r["run"], "task": r["metric"], "at": r["budget"],
                 "trained": True, "cost": r[log_key], "measures": r.get("measures", ()),
                 "device": records.hardware(r)}
        scores = r.get("values", ()) if metric == "glue" else [r["value"]]
        found += [r | about | {"score": score} for score in scores
                  if metric in ("glue", r["metric"])]
    if not found:
        given = listed([run.path for run in runs] + sweeps)
        raise SystemExit(f"error: no result for --metric {metric} in {given}; nothing drawn")
    lines = name_lines(names)
    return [r | {"line": lines[r["line"]]} for r in found]


def of_shared_tasks(scores: list[dict], task: str) -> tuple[list[dict], list[str]]:
    """The scores of `task`, without it of the tasks that every checkpoint has; and the tasks."""
    have = defaultdict(set)
    for r in scores:
        have[r["line"], r["run"], r["at"]].add(r["task"])
    known, shared = sorted(set.union(*have.values())), sorted(set.intersection(*have.values()))
    tasks = [task] * (task in known) if task else shared
    if not tasks:
        why = f"no result for task {task}" if task else "the checkpoints have no task in common"
        raise SystemExit(f"error: {why}; choose one with --task: {listed(known, 20)}")
    if not task and (others := sorted(set(known) - set(shared))):
        note(f"left out, as not every checkpoint has them: {listed(others, 20)}")
    return [r for r in scores if r["task"] in tasks], tasks


def draw_points(ax, found: list[Point], families: dict[str, str], lower: bool) -> list:
    """Lines, points of untrained weights and the frontier; returns the legend's handles."""
    trained, handles = [p for p in found if p.trained], []
    for name, look in styles({p.line: families[p.line] for p in trained}).items():
        x, y, err = np.array([(p.x, p.y, p.err) for p in trained if p.line == name]).T
        ax.errorbar(x, y, err, ls="", elinewidth=1, capsize=2.5, color=look["color"])
        handles += ax.plot(x, y, label=name, ms=5.5, zorder=3, **look)
        for p in [p for p in found if p.line == name and not p.trained]:
            ax.plot(0, p.y, ms=6, mfc="white", zorder=4, clip_on=False,
                    transform=ax.get_yaxis_transform(), **look)
    if len(trained) < len(found):
        handles.append(plt.Line2D([], [], label="not pretrained (at the left edge)", ls="",
                                  marker="o", mfc="white", color="0.3"))
    best = frontier([p.x for p in trained], [p.y for p in trained], lower)
    x, y = zip(*sorted((p.x, p.y) for p, on in zip(trained, best) if on))
    left, right = ax.get_xlim()
    look = {"color": "0.85", "lw": 4, "marker": "o", "ms": 11, "mfc": "none", "mec": "black",
            "mew": 0.9, "label": "Pareto frontier"}
    ax.step([*x, right], [*y, y[-1]], where="post", markevery=range(len(x)), zorder=1.5, **look)
    ax.set_xlim(0 if ax.get_xscale() == "linear" else left, right)
    return [*handles, plt.Line2D([], [], **look)]


def pareto(paths: Paths, out: Out = "plots/pareto.png", x: Cost = "seconds", task: str = "",
           metric: Literal[*METRICS] = "glue", published: bool = False) -> None:
    """Score against what pretraining cost, logarithmic where that spans more than a factor of ten:
    a line per run through its checkpoints, per preset and variant through a sweep's budgets.

    Args:
        task: one fine-tuning task; without it, the mean over the tasks all checkpoints share.
        metric: glue = fine-tuned score; blimp = of python -m studies.blimp; the others are of
            masked tokens in held-out text.
        published: add GLUE averages of results/published.json as hollow markers.
    """
    folders, sweeps = find(paths)
    records.make_folder(Path(out).parent)
    runs = records.read_runs(folders, train=False)
    scores, tasks = of_shared_tasks(checkpoints(runs, sweeps, metric, x), task)
    used = [r | {"cost": r["cost"] if r["trained"] else 0} for r in scores
            if not r["trained"] or (isinstance(r["cost"], int | float) and r["cost"] > 0)]
    found = points(used)
    if not (costs := [p.x for p in found if p.trained]):
        raise SystemExit(f"error: no trained checkpoint has {x} above 0; try another --x")
    if without := sorted({run.path for run in runs} - {r["run"] for r in used}):
        note(f"no {metric} with {x} known yet, left out: {listed(without)}")
    if published and set(tasks) != GLUE:
        raise SystemExit("error: published scores are means of GLUE's eight tasks, these not")
    others = published_points(x) if published else []
    costs = np.concatenate([costs, *[cost for _, cost, _ in others]])

    fig, ax = plt.subplots()
    unit = cost_axis(ax, x, costs.max(), log=costs.max() > 10 * costs.min())
    what, unit_of_score, scale = METRICS[metric]
    found = [p._replace(x=p.x / unit, y=p.y * scale, err=p.err * scale) for p in found]
    handles = draw_points(ax, found, {r["line"]: r["family"] for r in scores}, lower=scale == 1)
    for (name, cost, score), marker in zip(others, itertools.cycle(MARKERS)):
        handles += ax.plot(cost / unit, score, label=name, marker=marker, color="0.4", mfc="white",
                           ls=":", lw=0.9, ms=5, zorder=2)
    n_seeds, n_runs = [listed(sorted({p[i] for p in found if p.trained})) for i in (-1, -2)]
    facts = [f"{n_runs} runs per point"] * (n_runs != "1")
    if metric == "glue":
        measures = {measure for r in scores for measure in r["measures"]}
        measure = measures.pop() if len(measures) == 1 else "score"
        what = "GLUE dev average" if set(tasks) == GLUE else f"Mean of {len(tasks)} dev scores"
        what = f"{tasks[0]} dev {measure}" if len(tasks) == 1 else what
        facts.insert(0, f"{n_seeds} fine-tuning seed" + "s" * (n_seeds != "1"))
        level = 100 * np.mean([*{r["task"]: r["majority"] for r in scores}.values()])
        ax.axhline(level, ls=(0, (1, 2)), lw=1, color="0.4", zorder=1)
        ax.annotate("majority\nclass", (1, level), (4, 0), ax.get_yaxis_transform(),
                    "offset points", va="center", fontsize=7.5, color="0.35")
    ax.set_ylabel(what + unit_of_score)
    devices = sorted({r["device"] for r in scores})
    facts += ["bars: ± 1 standard error"] * any(p.err > 0 for p in found)
    lines = [" · ".join([*facts, f"on {listed(devices)}"])]
    if len(devices) > 1 and x != "tokens":
        lines.append("different devices, so these costs do not compare")
    if len(tasks) > 1 and set(tasks) != GLUE:
        lines.append(f"tasks: {', '.join(tasks)}")
    if others:
        lines.append("hollow: published, by other protocols; sources: results/published.json")
    finish(fig, out, f"{what} against pretraining {COSTS[x][0]}", lines, handles)


def loss(paths: Paths, out: Out = "plots/loss.png", x: Cost = "tokens") -> None:
    """Masked-language-modelling loss of each run: training (raw and smoothed) and held-out."""
    folders, _ = find(paths)
    records.make_folder(Path(out).parent)
    runs = [run for run in records.read_runs(folders)
            if len(run.train["step"]) + len(run.eval["step"])]
    if not runs:
        raise SystemExit(f"error: no log of a run in {listed(paths)}; nothing drawn")
    key, names = COSTS[x][1], name_lines({run.path: run.names for run in runs})
    looks = styles({names[run.path]: run.family for run in runs})
    fig, ax = plt.subplots()
    unit = cost_axis(ax, x, max(np.nanmax([0, *r.train[key], *r.eval[key]]) for r in runs))
    for run in runs:
        look = looks[names[run.path]] | {"ms": 5}
        ax.plot(run.eval[key] / unit, run.eval["loss"], **look | {"ls": ""})
        if n := len(y := run.train["loss"]):
            at = run.train[key] / unit
            some = np.linspace(0, n - 1, min(n, 1000)).astype(int)  # a small .svg
            ax.plot(at[some], y[some], color=look["color"], lw=0.6, alpha=0.25)
            y = uniform_filter1d(y, max(1, n // 30), mode="nearest")  # running mean
            ax.plot(at[some], y[some], **look | {"marker": ""})
    ax.set_ylabel("MLM loss (nats per masked token)")
    how = "line: training loss, smoothed, at the run's own masking rate · markers: held-out text"
    handles = [plt.Line2D([], [], label=name, ms=5, **look) for name, look in looks.items()]
    finish(fig, out, f"MLM loss against pretraining {COSTS[x][0]}", [how], handles)


def ablation(paths: Paths, out: Out = "plots/ablation.png") -> None:
    """What each variant of a sweep does to held-out loss, against its preset as it is: the mean
    difference over the seeds that both have, with its 95 % confidence interval. Each sweep, at its
    largest budget that has variants, has a panel."""
    _, sweeps = find(paths)
    records.make_folder(Path(out).parent)
    first, losses = {}, defaultdict(dict)  # sweep: a row; (sweep, preset, variant): {seed: loss}
    for path in sweeps:
        rows = [r for r in read_sweep(path) if r["metric"] == "loss"]
        budget = max((r["budget"] for r in rows if r["variant"]), default=None)
        for r in [r for r in rows if r["budget"] == budget]:
            first.setdefault(path.parent, r)
            losses[path.parent, r["preset"], r["variant"]][r["seed"]] = r["value"]
    if not first:
        raise SystemExit(f"error: no variant in {listed(paths)}; give sweeps run with --vary")
    presets = list(dict.fromkeys(preset for _, preset, _ in losses))
    variants = list(dict.fromkeys(variant for *_, variant in losses if variant))
    looks, counts = styles({preset: preset.split("-")[0] for preset in presets}), set()
    n, kinds = len(variants), [row["equal"] for row in first.values()]
    size = 3.2 + 2.7 * len(first), max(3.4, 1.8 + (0.2 + 0.16 * len(presets)) * n)
    fig, axes = plt.subplots(1, len(first), sharey=True, squeeze=False, figsize=size)
    for ax, sweep, kind in zip(axes[0], first, kinds):
        for (i, preset), (j, name) in itertools.product(enumerate(presets), enumerate(variants)):
            own, base = losses[sweep, preset, name], losses[sweep, preset, ""]
            at = j + 0.6 * (i - (len(presets) - 1) / 2) / len(presets)
            if not (seeds := own.keys() & base.keys()):
                why = "no seed in common" if own else "not run"
                ax.text(0.99, at, why, ha="right", va="center", fontsize=7, color="0.5",
                        transform=ax.get_yaxis_transform())
                continue
            counts.add(len(seeds))
            x, y = [[of[seed] for seed in seeds] for of in (own, base)]
            p, low, high = records.paired_test(x, y)
            ax.errorbar(np.mean(x) - np.mean(y), at, xerr=(high - low) / 2, elinewidth=1.2,
                        capsize=3, ms=6, mfc=looks[preset]["color"] if p < 0.05 else "white",
                        **looks[preset] | {"ls": ""})
        ax.axvline(0, color="0.3", lw=1, zorder=1)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        where = f"at equal {kind}" + f", {sweep.name}" * (kinds.count(kind) > 1)
        ax.set_xlabel(f"held-out loss (nats) — left is better\n{where}")
        ax.grid(axis="y", visible=False)
    axes[0, 0].set(yticks=range(n), yticklabels=variants, ylim=(n - 0.5, -0.5))
    budgets = dict.fromkeys(f"{row['budget']:,.9g} {records.BUDGETS[row['equal']]}"
                            for row in first.values())
    devices = sorted({records.hardware(row) for row in first.values()})
    lines = [f"variant − preset as it is, paired by seed, n = {listed(sorted(counts)) or 0} · "
             f"{listed([*budgets])} · on {listed(devices)}",
             "bars: 95 % confidence interval, each alone · filled: 0 is outside · no bar: one seed"]
    handles = [plt.Line2D([], [], label=k, **look | {"ls": ""}) for k, look in looks.items()]
    finish(fig, out, "What each change does", lines, handles)


PARTS = {  # of a step, as bench.dryrun names its kernels: the first that is found
    "matmuls": r" (add)?mm \d", "attention": "attn|attention|slack",
    "GeGLU, GELU": "_geglu|_gelu_",
    "LayerNorm, residuals, dropout": "layer_norm", "cross entropy": "cross_entropy",
    "bias gradients": "_sum_", "rest": ""}


def part_of(kernel: str) -> str:
    return next(part for part, like in PARTS.items() if re.search(like, kernel))


def dryrun(paths: Paths, out: Out = "plots/dryrun.png") -> None:
    """Where the time of a step goes on a GPU, modelled: a bar for each report of bench.dryrun."""
    reports = [json.loads(Path(path).read_text()) for path in paths]
    records.make_folder(Path(out).parent)
    fig, ax = plt.subplots(figsize=(6.6, 1.6 + 0.4 * len(reports)))
    colours = dict(zip(PARTS, [*COLOURS, "0.75"]))
    for y, report in enumerate(reports):
        ms, scale = Counter(), 65_536 / report["micro_tokens"]
        for row in report["kernels"]:
            ms[part_of(f"{row['phase']} {row['kernel']}")] += row["ms"] * scale
        left = 0.0
        for part, colour in colours.items():
            ax.barh(y, ms[part], 0.6, left, color=colour)
            left += ms[part]
    ax.set_xlabel("milliseconds for 65,536 tokens")
    ax.set(yticks=range(len(reports)), ylim=(len(reports) - 0.5, -0.5), yticklabels=[
        f"{r['preset']}\n{r['modelled_tok_per_s'] / 1e3:,.0f}k tok/s, MFU {r['modelled_mfu']:.0%}"
        for r in reports])
    line = f"MODELLED for one {reports[0]['chip']} by bench.dryrun: nothing here is timed"
    handles = [plt.Rectangle((0, 0), 1, 1, color=c, label=part) for part, c in colours.items()]
    finish(fig, out, "Where a step's time goes", [line], handles)


if __name__ == "__main__":
    figures = {figure.__name__: figure for figure in (pareto, loss, ablation, dryrun)}
    try:
        tyro.extras.subcommand_cli_from_dict(figures, description=__doc__, use_underscores=True,
                                             config=[tyro.conf.FlagCreatePairsOff])
    except (OSError, records.BadInput) as e:  # a file that cannot be read or written
        raise SystemExit(f"error: {e}") from None
