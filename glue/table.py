"""Records of fine-tunings, one a line of <run>/glue/<task>.jsonl, and the table of them."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import sem, ttest_ind

from glue.tasks import TASKS


def identity(record: dict[str, Any]) -> str:
    """What a result depends on. weights: a run pretrained anew under its old name is another."""
    names = ("task", "checkpoint", "seed", "data", "weights", "recipe")
    return json.dumps({name: record.get(name) for name in names}, sort_keys=True)


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line in one write, on a line of its own even when a kill has cut the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
        cut = f.read(1) not in (b"", b"\n")
        f.write(b"\n" * cut + json.dumps(record).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def gain(a: list[float], b: list[float]) -> str:
    """How much higher the scores `a` are than `b`: "+1.5 ± 0.5 (p 0.03)", with the standard error
    and Welch's t-test. With one seed, or seeds that do not differ, the difference alone."""
    difference = f"{np.mean(a) - np.mean(b):+.1f}"
    if min(len(a), len(b)) < 2 or not (np.ptp(a) or np.ptp(b)):
        return difference
    p = ttest_ind(a, b, equal_var=False).pvalue
    return f"{difference} ± {np.hypot(sem(a), sem(b)):.1f} (p {p:.2g})"


def mean_of_tasks(scores: dict[str, dict[int, float]]) -> list[float]:
    """{task: {seed: score}} -> the mean over tasks for each seed; where tasks differ in their
    seeds, as in upstream's recipe, the mean of the tasks' means alone."""
    first, *others = scores.values()
    if all(by_seed.keys() == first.keys() for by_seed in others):
        return [np.mean([by_seed[seed] for by_seed in scores.values()]) for seed in first]
    return [np.mean([np.mean(list(by_seed.values())) for by_seed in scores.values()])]


def table(records: list[dict[str, Any]]) -> str:
    """Scores in percent, a row for each start, a column for each task: mean ± standard deviation
    (number of seeds). Below, what pretraining gained over random weights where both are there."""
    there = dict.fromkeys(r["task"] for r in records)
    tasks = sorted(there, key=[*TASKS, *there].index)
    glues_own = {name for name, task in TASKS.items() if task.sizes}
    official = {r["task"] for r in records if r["official"] or r["task"] not in glues_own}
    starts: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for r in sorted(records, key=lambda r: (r["run"], r["step"])):
        scores = starts.setdefault((r["run"], r["checkpoint"]), {task: {} for task in tasks})
        scores[r["task"]][r["seed"]] = 100 * r["score"]
    several = len(tasks) > 1
    head = ["", *(task + "*" * (task not in official) for task in tasks)]
    head += [f"{len(tasks)}-task mean, last evaluation"] * several
    majority = {r["task"]: f"{100 * r['majority']:.1f}" for r in reversed(records)}
    lines, gains = [head, ["majority", *(majority[task] for task in tasks)]], []
    for (run, checkpoint), scores in starts.items():
        row = [run if checkpoint == run else f"{run} {Path(checkpoint).name}"]
        by_task = {task: list(by_seed.values()) for task, by_seed in scores.items()}
        cells = [f"{np.mean(s):.1f}" + (f" ± {np.std(s, ddof=1):.1f} ({len(s)})" if s[1:] else "")
                 for s in by_task.values()]
        lines.append(row + cells + [f"{np.mean(mean_of_tasks(scores)):.2f}"] * several)
        random = starts.get((run, "random"))
        if random and checkpoint != "random":
            cells = [gain(s, list(random[task].values())) for task, s in by_task.items()]
            cells += [gain(mean_of_tasks(scores), mean_of_tasks(random))] * several
            gains.append(row + cells)
    if gains:
        lines += [["gained over random weights, ± standard error (p of Welch's t-test):"], *gains]
    if len(official) < len(tasks):
        lines.append(["* a subset of the rows, not the official task"])
    first, *widths = (max(len(line[i]) for line in lines if len(line) > max(i, 1))
                      for i in range(len(head)))
    return "\n".join("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], widths)]).rstrip()
                     for line in lines)
