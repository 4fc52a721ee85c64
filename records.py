"""Reads what plots.py draws: run folders, sweeps' records, benchmark reports. Damaged lines are skipped and counted."""

import glob as globbing
import json
import math
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PUBLISHED = Path(__file__).parent / "results" / "published.json"
BUDGETS = {  # what sweep.py's --equal makes its budgets be
    "tokens": "tokens",
    "flops": "training FLOPs",
    "time": "tokens of the first preset, and its time for the others",
}
BASIC = ["step", "tokens", "loss"]
LOGGED = [*BASIC, "accuracy", "pseudo_perplexity", "masking", "tok_per_s", "mfu"]
LOGGED += ["train_seconds", "gpu_seconds", "dollars"]
NEEDED = {
    "train": BASIC,
    "eval": BASIC,
    "glue": ["step", "score", "majority"],
    "sweep": ["step", "tokens", "seed", "budget", "value", "train_seconds", "gpu_seconds", "dollars", "world_size"],
}  # a record without these numbers is damaged


class BadInput(ValueError):
    """Something the user can mend, in one line: what, where, what to do."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that a kill at any moment leaves the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def to_json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, advice: str = "prepare the folder again") -> dict:
    """A small JSON object of ours. BadInput when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        problem = "it holds no JSON object"
    except (OSError, ValueError) as e:
        problem = str(e)
    raise BadInput(f"{path} cannot be read ({problem}); {advice}") from None


@dataclass
class Run:
    """A run folder. train, eval: an (n,) float64 array per name in LOGGED, nan where a record lacks it. settings: the
    flags of pretrain.py, those of the model among them."""

    path: Path
    family: str
    preset: str
    device: str
    settings: dict
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
                needed = {k: record[k] for k in NEEDED.get(record["type"], ())}
                if record["type"] == "train" and needed["loss"] is None:
                    needed["loss"] = math.nan  # every step of the window was skipped
                whole = all(isinstance(value, int | float) for value in needed.values())
            except (ValueError, KeyError, TypeError, RecursionError):
                whole = False
            if whole:
                records.append(record)
            skipped += not whole and bool(line.strip())
    return records, skipped


def table(records: list[dict], kind: str) -> dict[str, np.ndarray]:
    """The records of one type as {name: (n,) float64} by increasing step. A resumed run repeats steps: the last record
    of a step wins, and what a killed life did beyond the step that the next began at is forgotten."""
    steps: dict[float, dict] = {}
    for r in records:
        if r["type"] == "header" and isinstance(began := r.get("step"), int):
            steps = {step: of_step for step, of_step in steps.items() if step <= began}
        elif r["type"] == kind:
            steps[r["step"]] = r
    rows = [[v if isinstance(v := steps[s].get(k), int | float) else math.nan for k in LOGGED] for s in sorted(steps)]
    return dict(zip(LOGGED, np.array(rows, float).reshape(-1, len(LOGGED)).T))


def expand(paths: tuple[str, ...]) -> list[Path]:
    """Patterns expanded, each path once."""
    return list(
        dict.fromkeys(Path(q) for p in paths for q in (sorted(globbing.glob(p)) if globbing.has_magic(p) else [p]))
    )


def read_settings(folder: Path) -> dict:
    """The settings in config.json, the model's among the others; {} if they cannot be read."""
    try:
        settings = dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))["train"])
        return {k: v for k, v in settings.items() if k != "model"} | dict(settings.get("model", {}))
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def read_sweep(path: Path) -> list[dict]:
    """The runs' rows in a sweep's records.jsonl; none if it is no sweep's. Damaged lines are left out and counted."""
    rows, skipped = read_jsonl(path) if path.is_file() else ([], 0)
    if skipped:
        note(f"skipped {skipped} damaged or unfinished line(s) in {path}")
    words = {"run", "preset", "variant", "family", "metric", "equal", "device"}
    return [r for r in rows if r["type"] == "sweep" and r.keys() >= words]


def runs_of_sweep(path: Path, rows: list[dict]) -> list[Run]:
    """A sweep's rows as the runs that they came from, each with one checkpoint, its last."""
    runs, by_run = [], defaultdict(list)
    for r in rows:
        costs = {f"pretrain_{cost}": r[f"train_{cost}" if cost == "seconds" else cost]
                 for cost in ("seconds", "gpu_seconds", "dollars")}  # fmt: skip
        by_run[r["run"]].append(r | costs)
    for name, own in by_run.items():
        one, metrics = own[0], {r["metric"]: r["value"] for r in own}
        held_out = [one | metrics | {"type": "eval"}] if "loss" in metrics else []
        jobs = [(r, i, score) for r in own for i, score in enumerate(r.get("values", ()))]
        tuned = [r | {"task": r["metric"], "seed": i, "score": score, "metrics": dict.fromkeys(r["measures"])}
                 for r, i, score in jobs]  # fmt: skip
        device = f"{one['world_size']}× " * (one["world_size"] != 1) + str(one["device"])
        settings = {"variant": one["variant"], "sweep": path.parent.name}
        runs.append(Run(path.parent / name, one["family"], one["preset"], device, settings,
                        table([], "train"), table(held_out, "eval"), tuned))  # fmt: skip
    return runs


def of_one_kind(jobs: list[dict]) -> tuple[list[dict], int]:
    """Fine-tunings that may be averaged, and how many may not. Of a task and checkpoint those with the recipe, data and
    weights of the last one; a job that was run again (same seed too) counts once, by its last record."""

    def key(r: dict, *names: str) -> str:
        return json.dumps([r.get(name) for name in names], sort_keys=True)

    of, kind = ("task", "checkpoint"), ("recipe", "data", "weights")
    last = {key(r, *of): key(r, *kind) for r in jobs}
    kept = {key(r, *of, "seed"): r for r in jobs if key(r, *kind) == last[key(r, *of)]}
    return list(kept.values()), len({key(r, *of, *kind, "seed") for r in jobs}) - len(kept)


def load(paths: tuple[str, ...], logs: bool = True) -> list[Run]:
    """Reads the run folders and sweeps among paths; patterns are expanded, other things mentioned and left out.
    logs=False leaves out training records. No run: one line and exit 1."""
    given = expand(paths)
    folders = [p for p in given if (p / "log.jsonl").is_file() or (p / "glue").is_dir()]
    sweeps = [p if p.suffix == ".jsonl" else p / "records.jsonl" for p in given if p not in set(folders)]
    runs = [run for path in sweeps for run in runs_of_sweep(path, read_sweep(path))]
    of_sweeps = {run.path.parent for run in runs}
    found = {*folders, *of_sweeps, *(p / "records.jsonl" for p in of_sweeps)}
    if others := [p for p in given if p not in found and p.name != PUBLISHED.name]:
        note(f"no run folder (no log.jsonl in it) and no sweep (records.jsonl), left out: {listed(others)}")
    if not folders and not runs:
        raise SystemExit(f"error: no run folder in {listed(paths) or 'an empty list'}; give some, e.g. runs/*")
    # Parses at most ~20,000 training lines of a run and ~500,000 of all: 4 s, and as fine as the eye can see.
    budget, damaged = min(6e6, 1.5e8 / max(1, len(folders))), {}
    for path in folders:
        log, records, damaged[path] = path / "log.jsonl", [], 0
        for file in [log, *sorted(path.glob("glue/*.jsonl"))]:
            if file.is_file():
                stride = math.inf if not logs else math.ceil(file.stat().st_size / budget)
                lines, skipped = read_jsonl(file, stride if file == log else 1)
                records += lines
                damaged[path] += skipped
        headers = [r for r in records if r["type"] == "header"]
        jobs = [{**r, "task": str(r.get("task"))} for r in records if r["type"] == "glue" and math.isfinite(r["score"])]
        glue, older = of_one_kind(jobs)
        if older:
            note(f"{path}: {older} fine-tuning(s) with another recipe, data or weights than the last, left out")
        about = {**(glue[-1] if glue else {}), **(headers[-1] if headers else {})}
        on = [(f"{n}× " if (n := r.get("world_size", 1)) != 1 else "") + str(r.get("device")) for r in headers or glue]
        runs.append(Run(path, str(about.get("family")), str(about.get("preset")),
                        " then ".join(dict.fromkeys(on)) or "unknown device", read_settings(path) | {"sweep": ""},
                        table(records, "train"), table(records, "eval"), glue))  # fmt: skip
    if skipped := sum(damaged.values()):
        note(f"skipped {skipped} damaged or unfinished line(s), most of them in {max(damaged, key=damaged.get)}")
    return runs


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def listed(items: list, most: int = 5) -> str:
    return ", ".join(map(str, items[:most])) + f" and {len(items) - most} more" * (len(items) > most)


def read_reports(paths: tuple[str, ...], key: str) -> list[dict]:
    """The benchmark reports (results/*.json, as bench.py writes them) among paths that have `key`; the rest is said."""
    reports = []
    for path in [p for p in expand(paths) if p.suffix == ".json" and p.name != PUBLISHED.name]:
        try:
            reports += [report] if key in dict(report := json.loads(path.read_text(encoding="utf-8"))) else []
        except (OSError, ValueError, TypeError) as e:
            note(f"cannot be read, left out: {path} ({e})")
    return reports
