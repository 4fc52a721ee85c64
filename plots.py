"""Draws the figures, from the JSON lines in run folders and nothing else.

    python plots.py pareto runs/*                   # fine-tuned score against pretraining time, frontier marked
    python plots.py pareto runs/* --task RTE --x tokens --linear
    python plots.py pareto runs/* --published       # with the papers' points, as hollow markers
    python plots.py pareto runs/* --metric loss     # held-out MLM loss in place of the score
    python plots.py loss runs/*                     # MLM loss against tokens, training and held-out
    python plots.py masking runs/*                  # masking rate, and the held-out loss under it
    python plots.py throughput runs/*               # tokens per second and MFU against sequence length
    python plots.py glue runs/* --baseline NAME     # heat map: tasks of the last checkpoints against one run's

Each writes plots/<figure>.png (or --out) and an .svg beside it, whole or not at all, in seconds; 1,000 runs of
10,000 log lines take under 20 s. A run may still be training: damaged and half-written lines are skipped and
counted. All settings of a figure: python plots.py <figure> --help
"""

import glob as globbing
import json
import math
import os
import sys
import textwrap
from collections import defaultdict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib

matplotlib.use("Agg")  # files only: works without a display
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe & Ito's colour-blind-safe palette without its yellow (pale on white) and its black (the frontier's);
# markers and dashes say the same again, for readers of a grey print. Unknown families come after the known.
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
DASHES = ["-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (9, 3)), (0, (3, 1, 1, 1, 1, 1))]
FAMILIES = ["mosaic", "bert"]
GLUE = {"MNLI", "QQP", "QNLI", "SST-2", "CoLA", "STS-B", "MRPC", "RTE"}
PUBLISHED = Path(__file__).parent / "results" / "published.json"
BASIC = ["step", "tokens", "loss"]
LOGGED = [*BASIC, "accuracy", "masking", "tok_per_s", "mfu", "train_seconds", "gpu_seconds", "dollars"]
NEEDED = {
    "train": BASIC,
    "eval": BASIC,
    "glue": ["step", "score", "majority"],
}  # a record without these numbers is damaged
COSTS = {  # --x: name, key in a fine-tuning record, key in log.jsonl, units
    "seconds": ("time", "pretrain_seconds", "train_seconds", {"seconds": 1, "minutes": 60, "hours": 3600}),
    "gpu_hours": ("device-hours", "pretrain_gpu_seconds", "gpu_seconds", {"": 3600}),
    "dollars": ("dollars", "pretrain_dollars", "dollars", {"": 1}),
    "tokens": ("tokens", "tokens", "tokens", {"": 1, "thousands": 1e3, "millions": 1e6, "billions": 1e9}),
}
plt.rcParams.update({
    "figure.figsize": (6.6, 4.4), "figure.constrained_layout.use": True, "savefig.dpi": 200, "font.size": 9,
    "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "0.3", "axes.axisbelow": True,
    "grid.color": "0.92", "xtick.color": "0.3", "ytick.color": "0.3", "legend.frameon": False,
    "legend.fontsize": 8, "legend.handlelength": 3.2, "lines.linewidth": 1.6, "svg.hashsalt": "plots",
})  # fmt: skip

Runs = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(help="run folders: runs/*")]
Out = Annotated[str, tyro.conf.arg(help="the .png to write; an .svg goes beside it")]
Cost = Annotated[Literal["seconds", "gpu_hours", "dollars", "tokens"], tyro.conf.arg(help="horizontal axis")]
# A checkpoint: cost x, mean score y, its standard error err (nan if nothing tells), of how many runs and seeds.
Point = namedtuple("Point", "series family step x y err n_runs n_seeds")


# ---------------------------------------------------------------------------------------------- reading
@dataclass
class Run:
    """A run folder. train, eval: an (n,) float64 array per name in LOGGED, nan where a record lacks it."""

    path: Path
    family: str
    preset: str
    device: str
    train: dict[str, np.ndarray]
    eval: dict[str, np.ndarray]
    glue: list[dict]


def read_jsonl(path: Path, stride: float = 1) -> tuple[list[dict], int]:
    """The records of a .jsonl file, and the number of damaged or half-written lines, which are left out.
    Parsing is most of the work, so with stride > 1 a training line that looks whole is parsed only if its
    line number divides by stride (inf: never)."""
    records, skipped = [], 0
    with open(path, "rb") as f:
        for i, line in enumerate(f):
            if i % stride and b'"train"' in line and line.count(b"{") == 1 and line.endswith(b"}\n"):
                continue
            try:
                record = json.loads(line)
                whole = all(isinstance(record[k], int | float) for k in NEEDED.get(record["type"], ()))
            except (ValueError, KeyError, TypeError, RecursionError):
                whole = False
            if whole:
                records.append(record)
            skipped += not whole and bool(line.strip())
    return records, skipped


def table(records: list[dict], kind: str) -> dict[str, np.ndarray]:
    """The records of one type as {name: (n,) float64} by increasing step. A resumed run repeats steps: the
    last record of a step wins."""
    steps = {r["step"]: r for r in records if r["type"] == kind}
    rows = [[v if isinstance(v := steps[s].get(k), int | float) else math.nan for k in LOGGED] for s in sorted(steps)]
    return dict(zip(LOGGED, np.array(rows, float).reshape(-1, len(LOGGED)).T))


def load(paths: tuple[str, ...], logs: bool = True) -> list[Run]:
    """Reads the run folders among paths; patterns are expanded, other things mentioned and left out. logs=False
    leaves out training records. No run folder: one line and exit 1."""
    given = [Path(q) for p in paths for q in (sorted(globbing.glob(p)) if globbing.has_magic(p) else [p])]
    folders = [p for p in dict.fromkeys(given) if (p / "log.jsonl").is_file() or (p / "glue").is_dir()]
    if others := [p for p in given if p not in set(folders) and p.name != PUBLISHED.name]:
        note(f"no run folder (no log.jsonl in it), left out: {listed(others)}")
    if not folders:
        raise SystemExit(f"error: no run folder in {listed(paths) or 'an empty list'}; give some, e.g. runs/*")
    # Parses at most ~20,000 training lines of a run and ~500,000 of all: 4 s, and as fine as the eye can see.
    budget, runs, damaged = min(6e6, 1.5e8 / len(folders)), [], {}
    for path in folders:
        log, records, damaged[path] = path / "log.jsonl", [], 0
        for file in [log, *sorted(path.glob("glue/*.jsonl"))]:
            if file.is_file():
                stride = math.inf if not logs else math.ceil(file.stat().st_size / budget)
                found, skipped = read_jsonl(file, stride if file == log else 1)
                records += found
                damaged[path] += skipped
        headers = [r for r in records if r["type"] == "header"]
        # A job that was run again (same task, checkpoint and seed) counts once, by its last record.
        jobs = [{**r, "task": str(r.get("task"))} for r in records if r["type"] == "glue" and math.isfinite(r["score"])]
        glue = list({(r["task"], str(r.get("checkpoint")), str(r.get("seed"))): r for r in jobs}.values())
        about = {**(glue[-1] if glue else {}), **(headers[-1] if headers else {})}
        on = [(f"{n}× " if (n := r.get("world_size", 1)) != 1 else "") + str(r.get("device")) for r in headers or glue]
        runs.append(Run(path, str(about.get("family")), str(about.get("preset")),
                        " then ".join(dict.fromkeys(on)) or "unknown device",
                        table(records, "train"), table(records, "eval"), glue))  # fmt: skip
    if skipped := sum(damaged.values()):
        note(f"skipped {skipped} damaged or unfinished line(s), most of them in {max(damaged, key=damaged.get)}")
    return runs


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def listed(items: list, most: int = 5) -> str:
    return ", ".join(map(str, items[:most])) + f" and {len(items) - most} more" * (len(items) > most)


# ------------------------------------------------------------------------------------------- statistics
def standard_error(values: list[float]) -> float:
    """Standard error of the mean, s / sqrt(n) with s over n - 1; nan for fewer than two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def frontier(x: list[float], y: list[float], lower: bool = False) -> np.ndarray:
    """(n,) bool: the points that no other beats, by being no dearer, no worse, and better in one of the two.
    lower=True: a smaller y is better."""
    x, y = np.asarray(x, float), np.asarray(y, float) * (-1 if lower else 1)
    on, best = np.zeros(len(x), bool), (math.nan, -math.inf)
    for i in np.lexsort((-y, x)):  # cheapest first, the best of equal cost first
        if y[i] > best[1] or (x[i], y[i]) == best:
            on[i], best = True, (x[i], y[i])
    return on


def points(records: list[dict], x: str) -> list[Point]:
    """Averages records (keys series, family, path, step, task, score, and the cost x) into Points.

    A run's score: mean over seeds, then over tasks. Runs of one series at one step are replicates: averaged,
    with the error over runs. A single run has the error over its fine-tuning seeds, tasks taken as
    independent: sqrt(sum of squared errors) / tasks, to which a task with one seed adds nothing.
    """
    groups, costs = defaultdict(lambda: defaultdict(lambda: defaultdict(list))), defaultdict(list)
    for r in records:
        if isinstance(r.get(x), int | float) and math.isfinite(r[x]):
            key = r["series"], r["family"], r["step"]
            groups[key][r["path"]][r["task"]].append(r["score"])
            costs[key].append(r[x])
    out = []
    for key, by_run in groups.items():
        jobs = [scores for by_task in by_run.values() for scores in by_task.values()]
        y = [float(np.mean([np.mean(scores) for scores in by_task.values()])) for by_task in by_run.values()]
        errors = [e for scores in jobs if not math.isnan(e := standard_error(scores))]
        err = standard_error(y) if len(y) > 1 else math.hypot(*errors) / len(jobs) if errors else math.nan
        out.append(Point(*key, float(np.mean(costs[key])), float(np.mean(y)), err, len(y), max(map(len, jobs))))
    return sorted(out, key=lambda p: (p.series, p.x))


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over `window` values, fewer at the ends; nan values are passed over."""
    ok, ones = np.isfinite(y), np.ones(max(1, min(window, len(y))))
    with np.errstate(invalid="ignore"):
        return np.convolve(np.where(ok, y, 0.0), ones, "same") / np.convolve(ok, ones, "same") if len(y) else y


def published_points(tasks: list[str], x: Cost) -> list[tuple[str, np.ndarray, list[float]]]:
    """(name and hardware, costs in the units of the logs, scores in %) from results/published.json: averages
    if tasks are GLUE's eight, else the mean of the tasks' own scores, where they were published."""
    found = []
    for p in json.loads(PUBLISHED.read_text(encoding="utf-8"))["points"]:
        hours, price = np.array(p["hours"]), p["dollars_per_gpu_hour"] or math.nan
        costs = {
            "seconds": hours * 3600,
            "gpu_hours": hours * 3600 * p["n_gpus"],
            "dollars": hours * p["n_gpus"] * price,
        }
        costs["tokens"] = np.array(p.get("tokens_billion", math.nan)) * 1e9
        own = [np.mean([p.get("per_task", {}).get(task, math.nan) for task in tasks])]
        score = p["score"] if set(tasks) == GLUE else own
        if np.isfinite(costs[x]).all() and np.isfinite(score).all():
            found.append((", ".join(filter(None, [p["name"], p["label"], p["hardware"]])), costs[x], score))
    if not found:
        note(f"no published point has both {x} and a score for {listed(tasks, 8)}")
    return found


# ---------------------------------------------------------------------------------------------- drawing
def name_series(runs: list[Run], by_run: bool) -> dict[Path, str]:
    """What to call each run's line: its folder, or its family (its preset where a family has several)."""
    folders, presets = [run.path.name for run in runs], defaultdict(set)
    for run in runs:
        presets[run.family].add(run.preset)
    if by_run:
        return {r.path: r.path.name if folders.count(r.path.name) == 1 else str(r.path) for r in runs}
    return {r.path: r.family if len(presets[r.family]) == 1 else r.preset for r in runs}


def styles(series: dict[str, str]) -> dict[str, dict]:
    """Colour, dashes and marker of each series, given {series: family}. Of several families each has one colour."""
    families = sorted(set(series.values()), key=lambda f: (FAMILIES.index(f) if f in FAMILIES else 99, f))
    out = {}
    for i, name in enumerate(sorted(series, key=lambda name: (families.index(series[name]), name))):
        colour = COLOURS[(families.index(series[name]) if len(families) > 1 else i) % len(COLOURS)]
        out[name] = {"color": colour, "linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}
    return out


def cost_axis(ax, x: Cost, top: float, log: bool = False) -> float:
    """Labels and scales a cost axis that reaches top (seconds, dollars, tokens); returns the unit to divide by."""
    cost, _, _, units = COSTS[x]
    unit = max((u for u in units if units[u] * 3 <= top), key=units.get, default=next(iter(units)))
    ax.set_xlabel(f"pretraining {cost} ({unit})" if unit else f"pretraining {cost}")
    if log:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.9g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    return units[unit]


def finish(fig, out: str, title: str, lines: list[str], handles: list) -> None:
    """Title, small grey lines under it, a legend below the axes where it covers nothing; then writes out as
    .png and .svg, both complete before either takes its name."""
    text = "\n".join(row for line in lines if line for row in textwrap.wrap(line, 100))
    fig.axes[0].set_title(title, pad=8 + 10.5 * (text.count("\n") + 1) if text else 6)
    small = {"va": "bottom", "fontsize": 7.5, "color": "0.35"}
    fig.axes[0].annotate(text, (0, 1), (0, 5), "axes fraction", "offset points", **small)
    if len(handles) > 30:
        handles = [*handles[:29], plt.Line2D([], [], ls="", label=f"and {len(handles) - 29} more")]
    if handles:
        columns = max(1, min(len(handles), 105 // (max(len(h.get_label()) for h in handles) + 10)))
        fig.legend(handles=handles, loc="outside lower center", ncols=columns)
        fig.set_figheight(fig.get_figheight() + 0.18 * (math.ceil(len(handles) / columns) - 2))
    targets = [Path(out).with_suffix(".png"), Path(out).with_suffix(".svg")]
    parts = [t.with_name(f".{t.name}.{os.getpid()}") for t in targets]
    try:
        targets[0].parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(parts[0], format="png")
        fig.savefig(parts[1], format="svg", metadata={"Date": None})  # the same data gives the same file
        for part, target in zip(parts, targets):
            part.replace(target)
    finally:
        for part in filter(Path.exists, parts):
            part.unlink()
        plt.close(fig)
    print(*targets, sep="\n")


# ---------------------------------------------------------------------------------------------- figures
def pareto_records(runs: list[Run], metric: str, x: Cost, task: str, by: str) -> tuple[list[dict], list[str]]:
    """What pareto draws, as records for points(), and the tasks averaged: `task`, or all that every
    checkpoint has. Held-out records become fine-tuning records of a task named like the metric."""
    _, key, log_key, _ = COSTS[x]
    records, have = [], defaultdict(set)
    for run in runs:
        own, held_out = run.glue, run.eval
        if metric != "glue":
            cost = held_out[log_key]
            if len(run.train["step"]) and np.isnan(cost).any():  # held-out records carry only some of the costs
                cost = np.interp(held_out["step"], run.train["step"], run.train[log_key])
            rows = zip(held_out["step"].tolist(), held_out[metric].tolist(), cost.tolist())
            own = [{"task": metric, "step": s, "score": v, key: c} for s, v, c in rows if s and math.isfinite(v)]
        records += [{**r, "path": run.path, "family": run.family, "device": run.device} for r in own]
    what = "fine-tuning result (glue/*.jsonl)" if metric == "glue" else f"held-out {metric}"
    if not records:
        raise SystemExit(f"error: no {what} in {listed([run.path for run in runs])} yet; nothing drawn")
    if without := sorted({run.path for run in runs} - {r["path"] for r in records}):
        note(f"no {what} yet, left out: {listed(without)}")
    for r in records:
        have[r["path"], r["step"]].add(r["task"])
    known, shared = sorted(set.union(*have.values())), sorted(set.intersection(*have.values()))
    tasks = [task] * (task in known) if task else shared
    if not tasks:
        why = f"no result for task {task}" if task else "the checkpoints have no task in common"
        raise SystemExit(f"error: {why}; choose one with --task: {listed(known, 20)}")
    if not task and len(shared) < len(known):
        note(f"left out, as not every checkpoint has them: {listed(sorted(set(known) - set(shared)), 20)}")
    records = [r for r in records if r["task"] in tasks]
    used = {r["path"] for r in records}
    names = name_series([run for run in runs if run.path in used], by == "run")
    return [{**r, "series": names[r["path"]]} for r in records], tasks


def pareto(runs: Runs, out: Out = "plots/pareto.png", x: Cost = "seconds", task: str = "",
           metric: Literal["glue", "loss", "accuracy"] = "glue", by: Literal["family", "run"] = "family",
           log: bool = False, linear: bool = False, published: bool = False) -> None:  # fmt: skip
    """Score against what pretraining cost: a line per family through its checkpoints, the frontier marked.

    Args:
        task: one fine-tuning task; without it, the mean over the tasks all checkpoints share.
        metric: glue = fine-tuned score; loss, accuracy = of masked tokens in held-out text.
        by: a line per family (per preset where a family has several), or per run.
        log: logarithmic cost axis. Without --log or --linear the range decides.
        linear: linear cost axis.
        published: add the points of results/published.json as hollow markers, as does naming that file.
    """
    if log and linear:
        raise SystemExit("error: --log and --linear exclude each other; give one")
    if published and metric != "glue":
        raise SystemExit(f"error: the published points are GLUE scores; --published does not go with --metric {metric}")
    records, tasks = pareto_records(load(runs, logs=metric != "glue"), metric, x, task, by)
    trained = [p for p in points(records, COSTS[x][1]) if p.step > 0 and p.x > 0]
    untrained = points([r for r in records if r.get("checkpoint") == "random"], "step")
    if not trained:
        raise SystemExit(f"error: no trained checkpoint has a {COSTS[x][1]} above 0; try another --x")
    if costless := sorted({r["series"] for r in records} - {p.series for p in trained}):
        note(f"no {COSTS[x][1]} known, left out: {listed(costless)}")
    n_seeds, n_runs = max(p.n_seeds for p in trained), max(p.n_runs for p in trained)
    if n_runs > 1:
        note("runs of one family, preset and step are averaged as replicates; --by run keeps them apart")
    published = (published or any(Path(p).name == PUBLISHED.name for p in runs)) and metric == "glue"
    others = published_points(tasks, x) if published else []
    costs = np.concatenate([[p.x for p in trained], *[cost for _, cost, _ in others]])
    log = log or (not linear and costs.max() > 10 * costs.min())
    scale, is_loss = (1, True) if metric == "loss" else (100, False)

    fig, ax = plt.subplots()
    ax.margins(y=0.08)
    unit = cost_axis(ax, x, costs.max(), log)
    handles, at_edge = [], {"transform": ax.get_yaxis_transform(), "clip_on": False, "zorder": 4, "mfc": "white"}
    for name, style in styles({p.series: p.family for p in trained}).items():
        line = np.array([(p.x / unit, p.y * scale, p.err * scale) for p in trained if p.series == name])
        ax.errorbar(*line.T, ls="", elinewidth=1, capsize=2.5, color=style["color"])
        handles += ax.plot(line[:, 0], line[:, 1], label=name, ms=5.5, zorder=3, **style)
        for p in [p for p in untrained if p.series == name]:
            ax.plot(0, p.y * scale, ms=6, **style, **at_edge)
    if untrained:
        look = {"ls": "", "marker": "o", "mfc": "white", "color": "0.3"}
        handles.append(plt.Line2D([], [], label="not pretrained (at the left edge)", **look))
    hollow = {"color": "0.4", "mfc": "white", "ls": ":", "lw": 0.9, "ms": 5, "zorder": 2}
    for i, (name, cost, score) in enumerate(others):
        handles += ax.plot(cost / unit, score, label=name, marker=MARKERS[i % len(MARKERS)], **hollow)
    left, right = ax.get_xlim()
    best = frontier([p.x for p in trained], [p.y for p in trained], lower=is_loss)
    fx, fy = np.array(sorted((p.x / unit, p.y * scale) for p, on in zip(trained, best) if on)).T
    band = {"color": "0.85", "lw": 4, "marker": "o", "ms": 11, "mfc": "none", "mec": "black", "mew": 0.9}
    ax.step([*fx, right], [*fy, fy[-1]], where="post", markevery=range(len(fx)), zorder=1.5, **band)
    handles.append(plt.Line2D([], [], label="Pareto frontier", **band))
    ax.set_xlim(left if log else 0, right)
    majority = [np.mean([r["majority"] for r in records if r["task"] == t]) for t in tasks if metric == "glue"]
    if majority:
        level = 100 * np.mean(majority)
        ax.axhline(level, ls=(0, (1, 2)), lw=1, color="0.4", zorder=1)
        look = {"va": "center", "fontsize": 7.5, "color": "0.35"}
        ax.annotate("majority\nclass", (1, level), (4, 0), ax.get_yaxis_transform(), "offset points", **look)

    measures = {m for r in records for m in r.get("metrics") or {}}
    one = f"{tasks[0]} dev {measures.pop() if len(measures) == 1 else 'score'}"
    many = "GLUE dev average" if set(tasks) == GLUE else f"Mean dev score of {len(tasks)} tasks"
    what = {"glue": many if len(tasks) > 1 else one, "loss": "Held-out MLM loss", "accuracy": "Held-out MLM accuracy"}[
        metric
    ]
    ax.set_ylabel(f"{what} ({'nats' if is_loss else '%'})")
    facts = [f"{n_seeds} fine-tuning seed{'s' * (n_seeds > 1)}"] if metric == "glue" else []
    facts += [f"{n_runs} runs per point"] * (n_runs > 1)
    facts += ["bars: ± 1 standard error"] * any(p.err > 0 for p in trained)
    on_device = defaultdict(set)
    for r in records:
        on_device[r["device"]].add(r["series"])
    if len(on_device) == 1:
        lines = [" · ".join([*facts, f"on {records[0]['device']}"])]
    else:
        where = "; ".join(f"{listed(sorted(series))} on {device}" for device, series in on_device.items())
        warning = "Different devices" + ", so these costs do not compare" * (x != "tokens")
        lines = [" · ".join(facts), f"{warning}: {where}"]
    if len(tasks) > 1 and set(tasks) != GLUE:
        lines.append(f"tasks: {', '.join(tasks)}")
    if others:
        lines.append("hollow: published, on the hardware named; protocols differ, sources in results/published.json")
    finish(fig, out, f"{what} against pretraining {COSTS[x][0]}", lines, handles)


def curves(runs: tuple[str, ...], out: str, x: Cost, title: str, panels: dict[str, dict], *lines: str) -> None:
    """Draws log fields of every run against cost, panels below each other: {y label: {"train" or "eval": field}}.
    Held-out points have markers. More than ten runs are drawn thin and named by family, not one by one."""
    loaded = [r for r in load(runs) if len(r.train["step"]) + len(r.eval["step"])]
    if not loaded:
        raise SystemExit("error: no training or held-out record in these run folders yet; nothing drawn")
    few, key = len(loaded) <= 10, COSTS[x][2]
    names = name_series(loaded, by_run=few)
    style = styles({names[r.path]: r.family for r in loaded})
    fig, axes = plt.subplots(len(panels), sharex=True, squeeze=False, figsize=(6.6, 3.4 + len(panels)))
    unit = cost_axis(axes[-1, 0], x, max(np.nanmax([0.0, *r.train[key], *r.eval[key]]) for r in loaded))
    for ax, (label, sources) in zip(axes[:, 0], panels.items()):
        ax.set_ylabel(label)
        for run in loaded:
            line = {**style[names[run.path]], "lw": 1.5 if few else 0.7, "ms": 5 if few else 3}
            if "eval" in sources:
                linestyle = "" if "train" in sources else line["linestyle"]
                ax.plot(run.eval[key] / unit, run.eval[sources["eval"]], **{**line, "linestyle": linestyle})
            if name := sources.get("train"):
                at, y = run.train[key] / unit, run.train[name] * (100 if name == "masking" else 1)
                some = np.linspace(0, len(y) - 1, min(len(y), 1000 if few else 100)).astype(int)  # keeps the svg small
                if name == "loss" and few:
                    ax.plot(at[some], y[some], color=line["color"], lw=0.6, alpha=0.25)
                y = smooth(y, len(y) // 30) if name == "loss" else y
                ax.plot(at[some], y[some], **{**line, "marker": "", "alpha": 1 if few else 0.5})
        if "eval" not in sources:
            ax.set_ylim(bottom=0)
    finish(fig, out, title, list(lines), [plt.Line2D([], [], label=name, ms=5, **s) for name, s in style.items()])


def loss(runs: Runs, out: Out = "plots/loss.png", x: Cost = "tokens") -> None:
    """Masked-language-modelling loss of each run: training (raw and smoothed) and held-out."""
    how = "line: training loss, smoothed, at the run's own masking rate · markers: held-out text"
    panels = {"MLM loss (nats per masked token)": {"train": "loss", "eval": "loss"}}
    curves(runs, out, x, f"Masked language modelling loss against pretraining {COSTS[x][0]}", panels, how)


def masking(runs: Runs, out: Out = "plots/masking.png", x: Cost = "tokens") -> None:
    """The masking rate of each run, and below it what it did: the loss on held-out text."""
    panels = {"masked tokens (%)": {"train": "masking"}, "held-out MLM loss (nats)": {"eval": "loss"}}
    curves(runs, out, x, "Masking rate, and the held-out loss under it", panels)


def throughput(runs: Runs, out: Out = "plots/throughput.png") -> None:
    """Real tokens per second, and model FLOPs utilisation where it was logged, against sequence length."""
    loaded, lengths = [r for r in load(runs) if np.isfinite(r.train["tok_per_s"]).any()], {}
    for run in loaded:
        try:
            lengths[run.path] = int(json.loads((run.path / "config.json").read_text())["train"]["seq_len"])
        except (OSError, ValueError, KeyError, TypeError):
            lengths[run.path] = 0
    if without := [r.path for r in loaded if not lengths[r.path]]:
        note(f"no train.seq_len in config.json, left out: {listed(without)}")
    loaded = [r for r in loaded if lengths[r.path]]
    if not loaded:
        raise SystemExit("error: no run with tok_per_s in log.jsonl and seq_len in config.json; nothing drawn")
    names, ticks = name_series(loaded, by_run=False), sorted({lengths[r.path] for r in loaded})
    style = styles({names[r.path]: r.family for r in loaded})
    panels = {"real tokens per second": ("tok_per_s", 1), "MFU (%)": ("mfu", 100)}
    panels = {k: v for k, v in panels.items() if any(np.isfinite(r.train[v[0]]).any() for r in loaded)}
    fig, axes = plt.subplots(len(panels), sharex=True, squeeze=False, figsize=(6.6, 1.8 + 1.8 * len(panels)))
    for ax, (label, (key, scale)) in zip(axes[:, 0], panels.items()):
        for i, (name, look) in enumerate(style.items()):
            values = {n: [r.train[key] for r in loaded if (names[r.path], lengths[r.path]) == (name, n)] for n in ticks}
            values = {n: v[np.isfinite(v)] for n in ticks if len(v := np.concatenate([*values[n], []]))}
            low, mid, high = np.array([np.percentile(v, [10, 50, 90]) * scale for v in values.values() if len(v)]).T
            at = [ticks.index(n) + 0.06 * (i - (len(style) - 1) / 2) for n in values]  # side by side
            ax.errorbar(at, mid, [mid - low, high - mid], label=name, elinewidth=1, capsize=2.5, ms=5.5, **look)
        ax.set(ylabel=label, ylim=(0, None))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.9g}"))
    axes[-1, 0].set_xticks(range(len(ticks)), ticks)
    axes[-1, 0].set(xlabel="sequence length (tokens)", xlim=(-0.5, len(ticks) - 0.5))
    where = f"median and 10th to 90th percentile of the log · on {'; '.join(dict.fromkeys(r.device for r in loaded))}"
    finish(fig, out, "Training throughput", [where], axes[0, 0].get_legend_handles_labels()[0])


def glue(runs: Runs, out: Out = "plots/glue.png", baseline: str = "") -> None:
    """Heat map of the last checkpoint of each run: score per task, and the difference to a baseline run.

    Args:
        baseline: folder name of the run to compare with; the first one by default.
    """
    loaded = [r for r in load(runs, logs=False) if r.glue]
    names = name_series(loaded, by_run=True)
    last = {r.path: max(g["step"] for g in r.glue) for r in loaded}
    rows = {names[r.path]: [g for g in r.glue if g["step"] == last[r.path]] for r in loaded}
    if not rows:
        raise SystemExit("error: no fine-tuning result (glue/*.jsonl) in these run folders yet; nothing drawn")
    baseline = baseline or next(iter(rows))
    if len(rows) > 60:
        raise SystemExit(f"error: {len(rows)} runs are too many rows for a heat map; give at most 60")
    if baseline not in rows:
        raise SystemExit(f"error: no fine-tuned run {baseline}; --baseline is one of {listed(list(rows), 10)}")
    tasks = sorted({g["task"] for row in rows.values() for g in row})
    scores = [[[100 * g["score"] for g in row if g["task"] == t] for t in tasks] for row in rows.values()]
    scores = np.array([[np.mean(seeds) if seeds else math.nan for seeds in row] for row in scores])
    shared = np.isfinite(scores).all(0)
    if shared.sum() > 1:
        scores, tasks = np.column_stack([scores, scores[:, shared].mean(1)]), [*tasks, f"mean of {shared.sum()}"]
    gain = scores - scores[list(rows).index(baseline)]
    limit = np.nanmax(np.abs(gain), initial=1.0)
    fig, ax = plt.subplots(figsize=(2.8 + 0.75 * len(tasks), 1.3 + 0.42 * len(rows)))
    image = ax.pcolormesh(np.ma.masked_invalid(gain), cmap="PuOr", vmin=-limit, vmax=limit, ec="white", lw=1.5)
    for (i, j), score in np.ndenumerate(scores):
        text = "–" if math.isnan(score) else f"{score:.1f}"
        if list(rows)[i] != baseline and math.isfinite(gain[i, j]):
            text += f"\n{gain[i, j]:+.1f}"
        colour = "white" if image.to_rgba(gain[i, j])[:3] @ np.array([0.299, 0.587, 0.114]) < 0.5 else "black"
        ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=7.5, color=colour)
    ax.set_xticks(np.arange(len(tasks)) + 0.5, tasks)
    ax.set_yticks(np.arange(len(rows)) + 0.5, [f"{name}, step {row[0]['step']}" for name, row in rows.items()])
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.invert_yaxis()
    fig.colorbar(image, label="points", aspect=12).outline.set_visible(False)
    finish(fig, out, f"Dev scores (%), and points above {baseline}", [], [])


if __name__ == "__main__":
    figures = {figure.__name__: figure for figure in (pareto, loss, masking, throughput, glue)}
    try:
        tyro.extras.subcommand_cli_from_dict(figures, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    except OSError as e:  # a file that cannot be read or written
        raise SystemExit(f"error: {e.filename}: {e.strerror}") from None
