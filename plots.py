"""Draws the figures, from run folders and what is committed in results/, and nothing else.

    python plots.py pareto runs/*                   # fine-tuned score against pretraining time, frontier marked
    python plots.py pareto runs/* --task RTE --x tokens --linear
    python plots.py pareto runs/* --published       # with the papers' points, as hollow markers
    python plots.py pareto results/shapes --metric loss      # a sweep's records; held-out loss in place of the score
    python plots.py ablation results/optimizer      # what each variant of a sweep changes, with confidence intervals
    python plots.py loss runs/*                     # MLM loss against tokens, training and held-out
    python plots.py masking runs/*                  # masking rate, and the held-out loss under it
    python plots.py throughput runs/* results/step-*.json    # tokens per second and MFU, ours and peers
    python plots.py kernels results/kernels-h200.json        # attention against its peers and the roofline
    python plots.py glue runs/* --baseline NAME     # heat map: tasks of the last checkpoints against one run's

Each writes plots/<figure>.png (or --out) and an .svg beside it, whole or not at all, in seconds; 1,000 runs of
10,000 log lines take under 20 s. A run may still be training: damaged and half-written lines are skipped and
counted. All settings of a figure: python plots.py <figure> --help
"""

import itertools
import json
import math
import os
import textwrap
from collections import Counter, defaultdict, namedtuple
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import matplotlib

matplotlib.use("Agg")  # files only: works without a display
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from records import BUDGETS, PUBLISHED, Run, expand, listed, load, note, read_reports, read_sweep

# Okabe & Ito's colour-blind-safe palette without its yellow (pale on white) and its black (the frontier's);
# markers and dashes say the same again, for readers of a grey print. Unknown families come after the known.
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
DASHES = ["-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (9, 3)), (0, (3, 1, 1, 1, 1, 1))]
FAMILIES = ["mosaic", "bert", "nano"]
HATCHES = ["", "////", "....", "xxxx", "----", "++++"]
GLUE = {"MNLI", "QQP", "QNLI", "SST-2", "CoLA", "STS-B", "MRPC", "RTE"}
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

Runs = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(help="run folders runs/*, sweeps results/*")]
Out = Annotated[str, tyro.conf.arg(help="the .png to write; an .svg goes beside it")]
Cost = Annotated[Literal["seconds", "gpu_hours", "dollars", "tokens"], tyro.conf.arg(help="horizontal axis")]
# A checkpoint: cost x, mean score y, its standard error err (nan if nothing tells), of how many runs and seeds.
# at: its step; the minutes planned for it, rounded, where a run's length is in minutes.
Point = namedtuple("Point", "series family at x y err n_runs n_seeds")
# Settings in which replicates of one run may differ: these and its seed. Other differences make other lines.
FREE = {"seed", "name", "out", "data", "preset", "device", "compile", "wandb", "micro_tokens", "gpu_dollars_per_hour"}
FREE |= {"max_steps", "max_tokens", "max_minutes", "eval_every", "eval_tokens", "pppl_tokens", "checkpoint_every"}
FREE |= {"log_every", "cooldown_from", "began_from", "skip_nan", "grad_reduce", "attention"}


# ------------------------------------------------------------------------------------------- statistics
def standard_error(values: list[float]) -> float:
    """Standard error of the mean, s / sqrt(n) with s over n - 1; nan for fewer than two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def extent(counts: Iterable[int]) -> str:
    """ "3", or "1 to 3" where they differ."""
    found = sorted(set(counts))
    return " to ".join(map(str, dict.fromkeys((found[0], found[-1]))))


def frontier(x: list[float], y: list[float], lower: bool = False, same: float = 0.01) -> np.ndarray:
    """(n,) bool: the points that no other beats, by being better and no more expensive, or as good and cheaper. Costs
    that differ by less than the share `same` are equal. lower=True: a smaller y is better."""
    x, y = np.asarray(x, float), np.asarray(y, float) * (-1 if lower else 1)
    beaten = [((y > b) & (x <= a * (1 + same)) | (y >= b) & (x < a * (1 - same))).any() for a, b in zip(x, y)]
    return ~np.array(beaten, bool) & np.isfinite(y)


def points(records: list[dict], x: str) -> list[Point]:
    """Averages records (keys series, family, path, at, planned, task, score, and the cost x) into Points.

    A run's score: mean over seeds, then over tasks. Runs of one series at one budget are replicates: averaged,
    with the error over runs; not so the middle of a run with the end of a shorter one, which differ in `planned`.
    A single run has the error over its fine-tuning seeds, tasks taken as independent: sqrt(sum of squared errors) /
    tasks, to which a task with one seed adds nothing.
    """
    groups, costs = defaultdict(lambda: defaultdict(lambda: defaultdict(list))), defaultdict(list)
    for r in records:
        if isinstance(r.get(x), int | float) and math.isfinite(r[x]):
            key = r["series"], r["family"], r["at"], r.get("planned")
            groups[key][r["path"]][r["task"]].append(r["score"])
            costs[key].append(r[x])
    out = []
    for key, by_run in groups.items():
        jobs = [scores for by_task in by_run.values() for scores in by_task.values()]
        y = [float(np.mean([np.mean(scores) for scores in by_task.values()])) for by_task in by_run.values()]
        errors = [e for scores in jobs if not math.isnan(e := standard_error(scores))]
        err = standard_error(y) if len(y) > 1 else math.hypot(*errors) / len(jobs) if errors else math.nan
        out.append(Point(*key[:3], float(np.mean(costs[key])), float(np.mean(y)), err, len(y), max(map(len, jobs))))
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
        hours, price = np.array(p["hours"]), p.get("dollars_per_gpu_hour") or math.nan
        costs = {
            "seconds": hours * 3600,
            "gpu_hours": hours * 3600 * p["n_gpus"],
            "dollars": hours * p["n_gpus"] * price,
        }
        costs["tokens"] = np.array(p.get("tokens_billion", math.nan)) * 1e9
        own = [np.mean([p.get("per_task", {}).get(task, math.nan) for task in tasks])]
        score = p["score"] if set(tasks) == GLUE else own
        if np.isfinite(costs[x]).all() and np.isfinite(score).all():
            found.append((", ".join(filter(None, [p["name"], p.get("label"), p["hardware"]])), costs[x], score))
    if not found:
        note(f"no published point has both {x} and a score for {listed(tasks, 8)}")
    return found


# ---------------------------------------------------------------------------------------------- drawing
def name_series(runs: list[Run], by_run: bool) -> dict[Path, str]:
    """What to call each run's line: its folder; or its family (its preset where a family has several), with the
    settings that differ among the runs of its preset. Runs with one name are replicates."""
    folders, presets = [run.path.name for run in runs], defaultdict(set)
    if by_run:
        return {r.path: r.path.name if folders.count(r.path.name) == 1 else str(r.path) for r in runs}
    for run in runs:
        presets[run.family].add(run.preset)
    names, differing = {}, {}
    for preset in {r.preset for r in runs}:
        settings = [{k: str(v) for k, v in r.settings.items()} for r in runs if r.preset == preset and r.settings]
        differing[preset] = [k for k in dict.fromkeys(k for own in settings for k in own)
                             if k not in FREE and len({own[k] for own in settings if k in own}) > 1]  # fmt: skip
    for r in runs:
        what = [f"{k} {v}" for k in differing[r.preset] if (v := r.settings.get(k)) not in (None, "")]
        names[r.path] = ", ".join([r.family if len(presets[r.family]) == 1 else r.preset, *what])
    return names


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
    # not in the layout: its width would push panels beside the first away; the title's pad keeps its height free
    small = {"va": "bottom", "fontsize": 7.5, "color": "0.35", "in_layout": False}
    fig.axes[0].annotate(text, (0, 1), (0, 5), "axes fraction", "offset points", **small)
    if len(handles) > 30:
        handles = [*handles[:29], plt.Line2D([], [], ls="", label=f"and {len(handles) - 29} more")]
    if handles:
        columns = max(1, min(len(handles), 105 // (max(len(h.get_label()) for h in handles) + 10)))
        fig.legend(handles=handles, loc="outside lower center", ncols=columns)
        fig.set_figheight(fig.get_figheight() + 0.18 * (math.ceil(len(handles) / columns) - 2))
    if not Path(out).name or out.endswith("/") or Path(out).is_dir() or Path(out).suffix in (".pdf", ".jpg", ".jpeg"):
        raise SystemExit(f"error: --out {out}: give the .png to write; an .svg goes beside it")
    stem = Path(out).with_suffix("") if Path(out).suffix in (".png", ".svg") else Path(out)
    targets = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
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
# a run's length in its settings, the first that is not 0 -> what has reached it in a record, in units of that
LENGTHS = {"max_minutes": (COSTS["seconds"][1], 60), "max_tokens": ("tokens", 1), "max_steps": ("step", 1)}


def reached_its_length(record: dict, settings: dict) -> bool:
    """Whether this checkpoint is the end of its run as it was planned; True where the settings do not say."""
    for name, (key, unit) in LENGTHS.items():
        if settings.get(name):
            return (record.get(key) or 0) >= settings[name] * unit
    return True


def planned_minute(record: dict, minutes: float | None) -> float:
    """Where replicates are at the same place: the step, or of a run of so many minutes the nearest twentieth of it."""
    if not minutes or not record["step"]:
        return record["step"]
    return minutes * round(20 * (record.get(COSTS["seconds"][1]) or 0) / (60 * minutes)) / 20


def pareto_records(runs: list[Run], metric: str, x: Cost, task: str, by: str) -> tuple[list[dict], list[str]]:
    """What pareto draws, as records for points(), and the tasks averaged: `task`, or all that every
    checkpoint has. Held-out records become fine-tuning records of a task named like the metric."""
    _, key, log_key, _ = COSTS[x]
    records, have = [], defaultdict(set)
    # of a stem and its cool-down branches only the ends are annealed, so only these make a line
    stems = {(Path(b).parts[-3:] or ("",))[0] for run in runs if (b := run.settings.get("cooldown_from"))}
    for run in runs:
        own, held_out = run.glue, run.eval
        if metric != "glue":
            columns = [held_out[c].tolist() for c in ("step", metric, log_key, "train_seconds", "tokens")]
            rows = [dict(zip(("step", "score", key, COSTS["seconds"][1], "tokens"), row)) for row in zip(*columns)]
            own = [{"task": metric, **r} for r in rows if r["step"] and math.isfinite(r["score"])]
        branch, end = bool(run.settings.get("cooldown_from")), max((r["step"] for r in own), default=0)
        if run.path.name in stems:
            own = [r for r in own if not r["step"] or (r["step"] == end and reached_its_length(r, run.settings))]
        elif branch:
            own = [r for r in own if r["step"] in (0, end)]
        about = {"path": run.path, "family": run.family, "device": run.device}
        lengths = {k: v for k in LENGTHS if (v := run.settings.get(k))}
        for r in own:
            annealed = branch or not r["step"] or reached_its_length(r, run.settings)
            at = planned_minute(r, run.settings.get("max_minutes"))
            records.append({**r, **about, "at": at, "planned": None if annealed else str(lengths)})
    last = {}  # of a run only the last checkpoint before a planned minute: two of them are not two replicates
    for r in records:
        last[r["path"], r["at"]] = max(r["step"], last.get((r["path"], r["at"]), 0))
    records = [r for r in records if r["step"] == last[r["path"], r["at"]]]
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
           metric: Literal["glue", "loss", "accuracy", "pseudo_perplexity"] = "glue",
           by: Literal["family", "run"] = "family",
           log: bool = False, linear: bool = False, published: bool = False) -> None:  # fmt: skip
    """Score against what pretraining cost: a line per family through its checkpoints, the frontier marked.

    Args:
        task: one fine-tuning task; without it, the mean over the tasks all checkpoints share.
        metric: glue = fine-tuned score; loss, accuracy, pseudo_perplexity = of masked tokens in held-out text.
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
    trained = [p for p in points(records, COSTS[x][1]) if p.at > 0 and p.x > 0]
    untrained = points([r for r in records if r.get("checkpoint") == "random"], "step")
    if not trained:
        raise SystemExit(f"error: no trained checkpoint has a {COSTS[x][1]} above 0; try another --x")
    if costless := sorted({r["series"] for r in records} - {p.series for p in trained}):
        note(f"no {COSTS[x][1]} known, left out: {listed(costless)}")
    if any(p.n_runs > 1 for p in trained):
        note("runs that differ in nothing but their seed are averaged at equal budgets; --by run keeps them apart")
    published = (published or any(Path(p).name == PUBLISHED.name for p in runs)) and metric == "glue"
    others = published_points(tasks, x) if published else []
    costs = np.concatenate([[p.x for p in trained], *[cost for _, cost, _ in others]])
    log = log or (not linear and costs.max() > 10 * costs.min())
    scale, is_loss = (100, False) if metric in ("glue", "accuracy") else (1, True)

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
    what, unit_of_it = {
        "glue": (many if len(tasks) > 1 else one, " (%)"),
        "loss": ("Held-out MLM loss", " (nats)"),
        "accuracy": ("Held-out MLM accuracy", " (%)"),
        "pseudo_perplexity": ("Held-out pseudo-perplexity", ""),
    }[metric]
    ax.set_ylabel(what + unit_of_it)
    seeds, replicates = extent(p.n_seeds for p in trained), extent(p.n_runs for p in trained)
    facts = [f"{seeds} fine-tuning seed{'s' * (seeds != '1')}"] if metric == "glue" else []
    facts += [f"{replicates} runs per point"] * (replicates != "1")
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
        lines.append(
            "hollow: published, on the hardware named and by other protocols, so neither costs nor scores compare "
            "exactly; sources in results/published.json"
        )
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


def logged_speeds(paths: tuple[str, ...]) -> list[tuple]:
    """(series, family, seq_len, device, tok/s, MFU) of each run, the last two as (n,) arrays over its log."""
    loaded = [r for r in load(paths) if np.isfinite(r.train["tok_per_s"]).any()] if paths else []
    if without := [r.path for r in loaded if not isinstance(r.settings.get("seq_len"), int)]:
        note(f"no train.seq_len in config.json, left out: {listed(without)}")
    loaded = [r for r in loaded if r.path not in without]
    names = name_series([replace(r, settings={}) for r in loaded], by_run=False)  # a line per family or preset
    return [(names[r.path], r.family, r.settings["seq_len"], r.device, r.train["tok_per_s"], r.train["mfu"])
            for r in loaded]  # fmt: skip


def measured_speeds(paths: tuple[str, ...]) -> tuple[list[tuple], dict[str, dict]]:
    """The same of python -m bench.step's contenders, ours and peers, over its rounds; and {series: {seq_len: tok/s at the
    GPU's peak}} of our MosaicBERT shapes."""
    speeds, peaks = [], defaultdict(dict)
    for device, r in [(report["device"], r) for report in read_reports(paths, "results") for r in report["results"]]:
        for c in [c for c in r["contenders"] if "failed" not in c]:
            name, compiled = c["name"].removesuffix(", compiled"), c["name"].endswith(", compiled")
            ours = name.endswith(f"-{r['size']}")
            series = ", ".join([name, *[r["size"]] * (not ours), *["compiled"] * compiled])
            family, rounds = name.split("-")[0] if ours else "transformers", np.array(c["rounds"])
            mfu = rounds * ((c["mfu"] or math.nan) / c["tok_per_s"])
            speeds.append((series, family, r["seq_len"], device, rounds, mfu))
            if c["mfu"] and family == "mosaic":
                peaks[name][r["seq_len"]] = c["tok_per_s"] / c["mfu"]
    return speeds, peaks


def throughput(runs: Runs, out: Out = "plots/throughput.png") -> None:
    """Real tokens per second, and model FLOPs utilisation where it is known, against sequence length: of runs, and of
    python -m bench.step (results/step-*.json), with its peers and the GPU's peak."""
    speeds, peaks = measured_speeds(runs)
    speeds += logged_speeds(tuple(str(p) for p in expand(runs) if p.suffix != ".json"))
    if not speeds:
        raise SystemExit("error: no run with tok_per_s in log.jsonl and seq_len in config.json; nothing drawn")
    devices = list(dict.fromkeys(row[3] for row in speeds))
    if len(devices) > 1:
        speeds = [(f"{row[0]} on {row[3]}", *row[1:]) for row in speeds]
    ticks, style = sorted({n for _, _, n, *_ in speeds}), styles({name: family for name, family, *_ in speeds})
    panels = {"real tokens per second": (4, 1), "MFU (%)": (5, 100)}
    panels = {k: v for k, v in panels.items() if any(np.isfinite(row[v[0]]).any() for row in speeds)}
    fig, axes = plt.subplots(len(panels), sharex=True, squeeze=False, figsize=(6.6, 1.8 + 1.8 * len(panels)))
    for ax, (label, (column, scale)) in zip(axes[:, 0], panels.items()):
        for i, (name, look) in enumerate(style.items()):
            values = {n: [row[column] for row in speeds if (row[0], row[2]) == (name, n)] for n in ticks}
            values = {n: u for n, v in values.items() if len(u := (w := np.concatenate([*v, []]))[np.isfinite(w)])}
            mid = np.array([np.percentile(v, [10, 50, 90]) * scale for v in values.values()]).reshape(-1, 3)
            at = [ticks.index(n) + 0.06 * (i - (len(style) - 1) / 2) for n in values]  # side by side
            bars = np.abs(mid[:, [0, 2]] - mid[:, [1]]).T
            ax.errorbar(at, mid[:, 1], bars, label=name, elinewidth=1, capsize=2.5, ms=5.5, **look)
        ax.set_ylabel(label)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.9g}"))
    handles = axes[0, 0].get_legend_handles_labels()[0]
    for i, (name, peak) in enumerate(peaks.items()):
        look = {"color": "0.45", "lw": 1.2, "ls": DASHES[2 + i % 2], "label": f"{name} at the GPU's peak"}
        handles += axes[0, 0].plot([ticks.index(n) for n in sorted(peak)], [peak[n] for n in sorted(peak)], **look)
    for ax in axes.flat:
        ax.set_ylim(bottom=0)
    axes[-1, 0].set_xticks(range(len(ticks)), ticks)
    axes[-1, 0].set(xlabel="sequence length (tokens)", xlim=(-0.5, len(ticks) - 0.5))
    where = "median and 10th to 90th percentile · " + (f"on {devices[0]}" if len(devices) == 1 else "different devices")
    finish(fig, out, "Training throughput", [where], handles)


def kernels(reports: Runs, out: Out = "plots/kernels.png") -> None:
    """Attention forward and backward, ours, peers and the roofline: bars from results/kernels-<gpu>.json."""
    found = read_reports(reports, "attention")
    if len(found) != 1:
        what = f"{len(found)} kernel reports in {listed(list(reports)) or 'an empty list'}"
        raise SystemExit(f"error: {what}; give one, as in results/kernels-h200.json")
    rows, settings = found[0]["attention"], found[0]["settings"]
    providers, groups = list(dict.fromkeys(r["provider"] for r in rows)), defaultdict(list)
    for name in dict.fromkeys(r["documents"] for r in rows):
        groups["C4's, cut at this" if "C4" in name else "all the same"].append(name)
    fig, axes = plt.subplots(2, len(groups), sharey="row", squeeze=False, figsize=(1 + 4 * len(groups), 5.4))
    width = 0.84 / len(providers)
    for ax, (part, names) in zip(axes.flat, itertools.product(("forward", "backward"), groups.values())):
        for i, provider in enumerate(providers):
            timed = {r["documents"]: r[part] for r in rows if r["provider"] == provider and part in r}
            look = {"color": COLOURS[i % len(COLOURS)], "hatch": HATCHES[i % len(HATCHES)], "ec": "white", "lw": 0}
            at = {n: x + (i - (len(providers) - 1) / 2) * width for x, n in enumerate(names) if n in timed}
            ax.bar(at.values(), [timed[n]["tflops"] for n in at], width, label=provider, **look)
            for n in at:  # what the hardware allows is the same for all
                level = timed[n]["tflops"] / timed[n]["roofline"]
                ax.hlines(level, names.index(n) - 0.45, names.index(n) + 0.45, color="black", lw=1.4)
        ax.set_xticks(range(len(names)), [n.split()[-1] for n in names], fontsize=8)
        ax.grid(axis="x", visible=False)
    for row, part in zip(axes, ("forward", "backward")):
        row[0].set_ylabel(f"{part} (TFLOP/s)")
    for ax, group in zip(axes[1], groups):
        ax.set_xlabel(f"tokens per document ({group})")
    failed = Counter(r["provider"] for r in rows if "failed" in r)
    shape = f"{settings['tokens']:,} tokens, {settings['heads']} heads of {settings['head_dim']}, bf16"
    failures = "; ".join(f"{name} ({n} of {len(rows) // len(providers)})" for name, n in failed.items())
    lines = [f"{shape} · on {found[0]['device']}", f"did not run: {failures}" * bool(failed)]
    handles = []
    for bar, provider in [(bars[0], bars.get_label()) for bars in axes[0, 0].containers if bars]:
        look = {"fc": bar.get_facecolor(), "hatch": bar.get_hatch(), "ec": "white"}
        handles.append(plt.Rectangle((0, 0), 1, 1, label=provider, **look))
    handles.append(plt.Line2D([], [], color="black", lw=1.4, label="roofline measured in the same run"))
    finish(fig, out, "Attention kernels", lines, handles)


def ablation(sweeps: Runs, out: Out = "plots/ablation.png", budget: float = 0.0) -> None:
    """What each variant of a sweep changes, against its preset as it is: the mean difference over the seeds that both
    have, and the 95 % confidence interval of a paired t-test. From sweep.py's results/<name>/records.jsonl; sweeps at
    equal tokens, FLOPs and time get panels of their own.

    Args:
        budget: as given to sweep.py; the largest one by default.
    """
    from scipy.stats import t  # takes a second

    files = [p if p.suffix == ".jsonl" else p / "records.jsonl" for p in expand(sweeps)]
    found = {path.parent: rows for path, rows in zip(files, map(read_sweep, files)) if any(r["variant"] for r in rows)}
    if not found:
        raise SystemExit(f"error: no variant in {listed(list(sweeps)) or 'an empty list'}; give sweeps run with --vary")
    budgets = sorted({r["budget"] for rows in found.values() for r in rows if r["variant"]})
    if budget and budget not in budgets:
        raise SystemExit(f"error: no variant ran with that budget; --budget is one of {listed(budgets, 9)}")
    rows, values, lengths = [], defaultdict(dict), {}  # lengths: sweep -> budget
    for sweep, own in found.items():
        have = {r["budget"] for r in own if r["variant"]}
        if budget and budget not in have:
            note(f"no variant with that budget, left out: {sweep}")
            continue
        lengths[sweep] = budget or max(have)
        rows += [r | {"sweep": sweep} for r in own if r["budget"] == lengths[sweep]]
    for r in rows:
        scale = 1 if r["metric"] == "loss" else 100
        values[r["sweep"], r["preset"], r["variant"], r["metric"]][r["seed"]] = r["value"] * scale
    presets = list(dict.fromkeys(r["preset"] for r in rows))
    variants = list(dict.fromkeys(r["variant"] for r in rows if r["variant"]))
    equals, panels = {r["sweep"]: r["equal"] for r in rows}, {}  # panels: (sweep, label) -> metrics
    for sweep in equals:
        panels[sweep, "held-out loss (nats) — left is better"] = ["loss"]
        if tasks := sorted({metric for of, _, _, metric in values if of == sweep} - {"loss", "accuracy"}):
            name = tasks[0] if len(tasks) == 1 else f"mean of {len(tasks)} tasks"
            panels[sweep, f"{name} (points) — right is better"] = tasks
    style = styles({preset: preset.split("-")[0] for preset in presets})
    size = 3.2 + 2.7 * len(panels), max(3.4, 1.8 + (0.2 + 0.16 * len(presets)) * len(variants))
    fig, axes = plt.subplots(1, len(panels), sharey=True, squeeze=False, figsize=size)
    counts = set()
    for ax, ((sweep, label), metrics) in zip(axes[0], panels.items()):
        for (i, preset), (j, variant) in itertools.product(enumerate(presets), enumerate(variants)):
            pairs = [(values[sweep, preset, variant, m], values[sweep, preset, "", m]) for m in metrics]
            seeds = set.intersection(*[x.keys() & y.keys() for x, y in pairs])
            gains = [float(np.mean([x[seed] - y[seed] for x, y in pairs])) for seed in seeds]
            at = j + 0.6 * (i - (len(presets) - 1) / 2) / len(presets)
            if not gains:
                look = {"ha": "right", "va": "center", "fontsize": 7, "color": "0.5"}
                why = "no seed in common" if any(x for x, _ in pairs) else "not run"
                ax.text(0.99, at, why, transform=ax.get_yaxis_transform(), **look)
            else:
                spread = len(gains) > 1 and max(gains) - min(gains) > 1e-9  # none: no more certain than one seed
                half = t.ppf(0.975, len(gains) - 1) * standard_error(gains) if spread else math.nan
                look = {**style[preset], "mfc": style[preset]["color"] if abs(np.mean(gains)) > half else "white"}
                look |= {"linestyle": "", "elinewidth": 1.2, "capsize": 3, "ms": 6}
                ax.errorbar(np.mean(gains), at, xerr=half, **look)
                counts.add(len(gains))
        ax.axvline(0, color="0.3", lw=1, zorder=1)
        ax.xaxis.set_major_locator(plt.MaxNLocator(5))
        kind = dict(flops="FLOPs").get(equals[sweep], equals[sweep])
        alone = list(equals.values()).count(equals[sweep]) == 1
        ax.set_xlabel(f"{label}\nat equal {kind}" + ("" if alone else f", {sweep.name}"))
        ax.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(variants)), variants)
    axes[0, 0].set_ylim(len(variants) - 0.5, -0.5)
    n = f"n = {extent(counts)}" if counts else "no seed in common"
    said = listed(list(dict.fromkeys(f"{lengths[sweep]:,.9g} {BUDGETS[equal]}" for sweep, equal in equals.items())))
    what = f"{said} · on {listed(sorted({r['device'] for r in rows}))}"
    lines = [f"variant − preset as it is, paired by seed, {n} · {what}"]
    lines += ["bars: 95 % confidence interval of each alone · filled marker: 0 is outside"]
    lines[-1] += " · no bar: shorter than the marker, or one seed"
    handles = [plt.Line2D([], [], label=name, **{**look, "linestyle": ""}) for name, look in style.items()]
    finish(fig, out, "What each change does", lines, handles)


def glue(runs: Runs, out: Out = "plots/glue.png", baseline: str = "") -> None:
    """Heat map of the last checkpoint of each run: score per task, and the difference to a baseline run.

    Args:
        baseline: folder name of the run to compare with; the first one by default.
    """
    loaded = [r for r in load(runs, logs=False) if r.glue]
    names = name_series(loaded, by_run=True)
    rows = {}
    for r in loaded:  # weights from elsewhere have step 0, as have the random ones they are compared with
        trained = [g for g in r.glue if g.get("checkpoint") != "random"] or r.glue
        last = max(g["step"] for g in trained)
        rows[names[r.path]] = [g for g in trained if g["step"] == last]
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
    ticks = [f"{name}, step {row[0]['step']}" for name, row in rows.items()]
    fig, ax = plt.subplots(figsize=(2.2 + 0.07 * max(map(len, ticks)) + 0.75 * len(tasks), 1.5 + 0.42 * len(rows)))
    image = ax.pcolormesh(np.ma.masked_invalid(gain), cmap="PuOr", vmin=-limit, vmax=limit, ec="white", lw=1.5)
    for (i, j), score in np.ndenumerate(scores):
        text = "–" if math.isnan(score) else f"{score:.1f}"
        if list(rows)[i] != baseline and math.isfinite(gain[i, j]):
            text += f"\n{gain[i, j]:+.1f}"
        dark = math.isfinite(gain[i, j]) and image.to_rgba(gain[i, j])[:3] @ np.array([0.299, 0.587, 0.114]) < 0.5
        ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
    ax.set_xticks(np.arange(len(tasks)) + 0.5, tasks)
    ax.set_yticks(np.arange(len(rows)) + 0.5, ticks)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.invert_yaxis()
    fig.colorbar(image, label="points", aspect=12).outline.set_visible(False)
    finish(fig, out, "Dev scores (%)", [f"below: points above {baseline}"] * (len(rows) > 1), [])


if __name__ == "__main__":
    figures = {figure.__name__: figure for figure in (pareto, loss, masking, throughput, kernels, ablation, glue)}
    try:
        tyro.extras.subcommand_cli_from_dict(
            figures, description=__doc__, use_underscores=True, config=[tyro.conf.FlagCreatePairsOff])
    except OSError as e:  # a file that cannot be read or written
        raise SystemExit(f"error: {e.filename}: {e.strerror}") from None
