"""Small files on disk, written whole or not at all; and what plots.py draws: run folders, sweeps'
records, benchmark reports. A run may still be training: damaged lines are skipped and counted."""

import glob
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: lock() only opens the file
    fcntl = None

BUDGETS = {  # what a sweep's budgets are, by what is equal in it
    "tokens": "tokens",
    "time": "tokens of the first preset, and its time for the others",
}
BASIC = ["step", "tokens", "loss"]
LOGGED = [*BASIC, "accuracy", "pseudo_perplexity", "train_seconds", "gpu_seconds", "dollars"]
NEEDED = {  # a record without these numbers is damaged
    "train": BASIC,
    "eval": BASIC,
    "glue": ["step", "score", "majority"],
    "blimp": ["step", "score", "n_pairs", "tokens", "train_seconds", "gpu_seconds", "dollars"],
    "sweep": ["step", "tokens", "seed", "budget", "value", "train_seconds", "gpu_seconds",
              "dollars", "world_size"],
}


class BadInput(ValueError):
    """Something the user can mend, in one line: what, where, what to do."""


def make_folder(folder: Path, advice: str = "give --out") -> None:
    """Make a folder and see that it can be written to: BadInput now, not after hours of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise BadInput(f"{folder} cannot be written to ({e.strerror}); {advice}") from None


def lock(path: Path, wait: bool = False) -> IO:
    """Own `path` (an OS lock) while the returned file is open, here or in a process that inherits
    it. BlockingIOError if another process owns it; with `wait`, until it does no longer."""
    file = open(path, "a")  # noqa: SIM115
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    return file


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that a kill at any moment leaves the old file or the new one, never half of
    one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, advice: str = "prepare the folder again") -> dict:
    """A small JSON object of ours. BadInput when it is missing or damaged."""
    try:
        if not isinstance(value := json.loads(path.read_text(encoding="utf-8")), dict):
            raise ValueError("it holds no JSON object")
        return value
    except (OSError, ValueError) as e:
        raise BadInput(f"{path} cannot be read ({e}); {advice}") from None


def read_jsonl(path: Path, stride: float = 1) -> tuple[list[dict], int]:
    """The records of a .jsonl file, none if it is missing, and the number of damaged or half-
    written lines, which are left out. Parsing is most of the work: of training lines that look
    whole, only every `stride`-th is read (inf: none)."""
    records, skipped = [], 0
    for i, line in enumerate(path.read_bytes().splitlines() if path.is_file() else []):
        if i % stride and b'"train"' in line and line.count(b"{") == 1 and line.endswith(b"}"):
            continue
        try:
            record = json.loads(line)
            needed = [record[k] for k in NEEDED.get(record["type"], ())]
            whole = all(isinstance(value, int | float) for value in needed)
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if whole:
            records.append(record)
        skipped += not whole and bool(line.strip())
    return records, skipped


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def listed(items: Sequence, most: int = 5) -> str:
    more = f" and {len(items) - most} more" * (len(items) > most)
    return ", ".join(map(str, items[:most])) + more


def standard_error(values: list[float]) -> float:
    """Standard error of the mean, s / sqrt(n) with s over n - 1; nan for fewer than two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def paired_test(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """(p, low, high) of a two-sided paired t-test: is the mean of x - y 0, and its 95 % confidence
    interval. All nan for fewer than two pairs, and where all pairs differ by the same: of scores of
    few examples that happens by chance."""
    if len(x) < 2 or np.ptp(np.subtract(x, y)) < 1e-9:
        return math.nan, math.nan, math.nan
    from scipy.stats import ttest_rel  # takes a second

    test = ttest_rel(x, y)
    return float(test.pvalue), *map(float, test.confidence_interval(0.95))


@dataclass
class Run:
    """A run folder. train, eval: an (n,) float64 array for each name in LOGGED, nan where a record
    lacks it; glue: the fine-tunings' records."""

    path: Path
    family: str
    preset: str
    device: str
    train: dict[str, np.ndarray]
    eval: dict[str, np.ndarray]
    glue: list[dict]

    @property
    def names(self) -> list[str]:
        """What it may be called, shortest first."""
        return [self.family, self.preset, self.path.name, str(self.path)]


def find(patterns: tuple[str, ...]) -> tuple[list[Path], list[Path]]:
    """(run folders, sweeps' records.jsonl) among paths and patterns, each once. What is neither is
    mentioned and left out. SystemExit, one line, if nothing is left."""
    found = [[p] if Path(p).exists() else sorted(glob.glob(p)) or [p] for p in patterns]
    runs, sweeps, others = [], [], []
    for path in dict.fromkeys(Path(p) for own in found for p in own):
        records = path if path.suffix == ".jsonl" else path / "records.jsonl"
        if (path / "log.jsonl").is_file() or (path / "glue").is_dir():
            runs.append(path)
        elif records.is_file():
            sweeps.append(records)
        else:
            others.append(path)
    if not runs + sweeps:
        raise SystemExit(f"error: no run folder and no sweep in {listed(patterns) or 'nothing'}")
    if others:
        note(f"no run folder and no sweep, left out: {listed(others)}")
    return runs, list(dict.fromkeys(sweeps))


def columns(records: list[dict], kind: str) -> dict[str, np.ndarray]:
    """The records of one type as {name: (n,) float64} by increasing step. A resumed run repeats
    steps: the last record of a step counts, and what a killed process did beyond the step at which
    the next one began is forgotten."""
    steps = {}
    for r in records:
        if r["type"] == "header" and isinstance(began := r.get("step"), int):
            steps = {step: own for step, own in steps.items() if step <= began}
        elif r["type"] == kind:
            steps[r["step"]] = r
    rows = [[v if isinstance(v := steps[s].get(k), int | float) else math.nan for k in LOGGED]
            for s in sorted(steps)]
    return dict(zip(LOGGED, np.array(rows, float).reshape(-1, len(LOGGED)).T))


def of_one_kind(jobs: list[dict]) -> tuple[list[dict], int]:
    """Fine-tunings that may be averaged, and how many may not. Of a task and checkpoint those with
    the recipe, data and weights of the last one; a job that was run again (same seed too) counts
    once, by its last record."""

    def key(r: dict, *names: str) -> str:
        return json.dumps([r.get(name) for name in names], sort_keys=True)

    of, kind = ("task", "checkpoint"), ("recipe", "data", "weights")
    last = {key(r, *of): key(r, *kind) for r in jobs}
    kept = {key(r, *of, "seed"): r for r in jobs if key(r, *kind) == last[key(r, *of)]}
    return list(kept.values()), len({key(r, *of, *kind, "seed") for r in jobs}) - len(kept)


def hardware(record: dict) -> str:
    """ "8× H200" """
    n = record.get("world_size") or 1
    return f"{n}× " * (n != 1) + str(record.get("device"))


def read_runs(folders: list[Path], train: bool = True) -> list[Run]:
    """The runs in these folders; train=False leaves out their training lines."""
    runs, damaged = [], {}
    for path in folders:
        log = path / "log.jsonl"
        # ~500,000 training lines of all runs take 4 s, and are finer than the eye sees
        size = len(folders) * log.stat().st_size if log.is_file() else 0
        stride = math.ceil(size / 1.5e8) or 1 if train else math.inf
        records, damaged[path] = read_jsonl(log, stride)
        headers, jobs = [r for r in records if r["type"] == "header"], []
        for file in sorted(path.glob("glue/*.jsonl")):
            lines, skipped = read_jsonl(file)
            jobs += [r for r in lines if r["type"] == "glue" and math.isfinite(r["score"])]
            damaged[path] += skipped
        jobs, older = of_one_kind([{**r, "task": str(r.get("task"))} for r in jobs])
        if older:
            note(f"{path}: left out {older} fine-tuning(s) unlike the last in recipe, data, model")
        about = {**(jobs[-1] if jobs else {}), **(headers[-1] if headers else {})}
        devices = dict.fromkeys(map(hardware, headers or jobs))
        runs.append(Run(path, str(about.get("family")), str(about.get("preset")),
                        " then ".join(devices) or "unknown device",
                        columns(records, "train"), columns(records, "eval"), jobs))
    if skipped := sum(damaged.values()):
        most = max(damaged, key=damaged.get)
        note(f"skipped {skipped} damaged or unfinished line(s), most of them in {most}")
    return runs


def read_blimp(run: Path) -> dict[int, dict]:
    """{step: its record of most pairs} of what studies.blimp found for a run's checkpoints."""
    found = sorted(read_jsonl(run / "blimp.jsonl")[0], key=lambda r: r["n_pairs"])
    return {r["step"]: r for r in found}


def read_sweep(path: Path) -> list[dict]:
    """The runs' rows in a sweep's records.jsonl."""
    rows, skipped = read_jsonl(path)
    if skipped:
        note(f"skipped {skipped} damaged or unfinished line(s) in {path}")
    needed = {"run", "preset", "variant", "family", "metric", "equal", "device"}
    return [r for r in rows if r["type"] == "sweep" and r.keys() >= needed]
