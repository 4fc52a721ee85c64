"""The eight GLUE tasks and labelled files of one's own: where text and labels are, how answers are judged.

finetune_glue.py trains on what load_data() here returns. The official files have no quoting (a quote is a character),
CoLA's have no header, QQP's has broken rows, and the names of columns differ from the hub's; all of it is in TASKS.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
from scipy.stats import pearsonr, spearmanr, t
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from corpus.sources import ask_hub

# ----------------------------------------------------------------------------- tasks and recipes


@dataclass(frozen=True)
class Recipe:
    """What a job is trained with. weight_decay is torch's AdamW's: upstream's decoupled decay / lr."""

    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    n_seeds: int = 1  # of SEEDS


@dataclass(frozen=True)
class Task:
    """A task; `sizes` are set for GLUE's own eight only."""

    name: str
    recipe: Recipe
    columns: tuple[tuple[str, ...], ...]  # text columns: the first set that the file has
    label_columns: tuple[str, ...]
    labels: tuple[str, ...] = ()  # in the hub's order; () for regression, and for one's own until the file is read
    metrics: tuple[str, ...] = ("accuracy",)  # their mean is the score
    sizes: tuple[int, ...] = ()  # official rows: train, dev (MNLI: matched and mismatched)

    @property
    def regression(self) -> bool:
        return self.metrics == ("spearman",)

    def splits(self, kind: str) -> tuple[str, ...]:
        """Files of kind "dev" or "test", as the official folders name them."""
        return (f"{kind}_matched", f"{kind}_mismatched") if self.name == "MNLI" else (kind,)


SEEDS = (19, 8364, 717, 10536, 90166)  # upstream's
SANE = Recipe(lr=4e-5, weight_decay=0.01, epochs=5, batch_size=16, n_seeds=3)  # cramming's lr, epochs and batch
OWN = Recipe(lr=5e-5, weight_decay=0.1, epochs=3, batch_size=32)
PAIR, BINARY, NLI = ("sentence1", "sentence2"), ("0", "1"), ("entailment", "neutral", "contradiction")
ENTAILED, ACC_F1 = ("entailment", "not_entailment"), ("accuracy", "f1")
# Recipes: mosaicml/examples, yamls/finetuning/glue/mosaic-bert-base-uncased.yaml. Its decoupled decay is lr/10, so 0.1
# for torch, except for RTE. QQP's official size is the hub's, which has dropped the broken rows.
TASKS = {
    task.name: task
    for task in (
        Task("MNLI", Recipe(5e-5, 0.1, 3, 48), (PAIR, ("premise", "hypothesis")), ("gold_label", "label"), NLI,
             sizes=(392_702, 9_815, 9_832)),
        Task("QQP", Recipe(3e-5, 0.1, 5, 16), (("question1", "question2"),), ("is_duplicate", "label"), BINARY, ACC_F1,
             sizes=(363_846, 40_430)),
        Task("QNLI", Recipe(1e-5, 0.1, 10, 16), (("question", "sentence"),), ("label",), ENTAILED,
             sizes=(104_743, 5_463)),
        Task("SST-2", Recipe(3e-5, 0.1, 3, 16, 3), (("sentence",),), ("label",), BINARY, sizes=(67_349, 872)),
        Task("CoLA", Recipe(5e-5, 0.1, 10, 32, 4), (("sentence",),), ("label",), BINARY, ("matthews",),
             sizes=(8_551, 1_043)),
        Task("RTE", Recipe(1e-5, 1.0, 3, 16, 5), (PAIR,), ("label",), ENTAILED, sizes=(2_490, 277)),
        Task("MRPC", Recipe(8e-5, 0.1, 10, 32, 5), (("#1 String", "#2 String"), PAIR), ("Quality", "label"), BINARY,
             ACC_F1, sizes=(3_668, 408)),
        Task("STS-B", Recipe(3e-5, 0.1, 10, 32, 5), (PAIR,), ("score", "label"), metrics=("spearman",),
             sizes=(5_749, 1_500)),
    )
}  # fmt: skip
FROM_MNLI = ("RTE", "MRPC", "STS-B")  # small, and better started from the model fine-tuned on MNLI
COLA_HEADER = ["source", "label", "mark", "sentence"]  # its train and dev files come without one; its test file has it

# Dev scores as published, in the order of TASKS, for orientation.
PUBLISHED = {
    "MosaicBERT-Base, 70k steps (model card)": (84.95, 90.29, 90.74, 92.46, 55.11, 81.36, 90.03, 89.27),
    "BERT-Base (Portes et al. S3, as ModernBERT quotes it)": (85.4, 91.4, 91.6, 93.1, 59.0, 78.2, 89.5, 89.4),
    "MosaicBERT-Base, longest run (ditto)": (85.6, 92.0, 91.4, 93.5, 58.2, 83.0, 89.0, 90.3),
    "BERT-Large (ditto)": (86.3, 90.9, 92.8, 93.3, 56.2, 83.8, 87.8, 90.6),
}

# ----------------------------------------------------------------------------- reading

KINDS = (".tsv", ".jsonl", ".parquet")
Source = Path | tuple[str, str]  # a file, or (config, split) of nyu-mll/glue on the hub
FRACTION = re.compile(r"[-+]?(\d*\.\d+|\d+\.)(e[-+]?\d+)?|nan", re.IGNORECASE)


@dataclass
class Split:
    """The n rows of one file that can be used."""

    where: str
    texts: list[list[str]]  # one or two columns of n strings
    labels: list[Any]  # n raw values; empty when the rows have none
    lines: list[int]  # n line numbers
    broken: list[int] = field(default_factory=list)  # lines left out: a text or the label is missing
    empty: list[int] = field(default_factory=list)  # lines with an empty text, which are kept

    def digest(self, start: int = 0) -> int:
        """crc32 of every text and label."""
        for column in (*self.texts, map(str, self.labels)):
            start = zlib.crc32("\t".join(column).encode("utf-8", "replace"), start)
        return start


@dataclass
class Data:
    """A task's files, read: y has int64 classes or float32 values for "train" and each dev split."""

    task: Task
    train: Split
    devs: dict[str, Split]
    y: dict[str, np.ndarray]
    official: bool  # a GLUE task with the official number of rows
    digest: str  # results belong to these rows and no others
    notes: list[str]  # what the user should know about the files, one line each


def locate(glue_dir: str, task: str, split: str) -> Source:
    """The official .tsv in glue_dir, or the hub's parquet if that is there; without glue_dir the hub itself."""
    config, hub_split = task.lower().replace("-", ""), split.replace("dev", "validation")
    if not glue_dir:
        return config, hub_split
    parquet = sorted(Path(glue_dir).glob(f"{config}/{hub_split}-*.parquet"))
    file = "diagnostic/diagnostic.tsv" if task == "AX" else f"{task}/{split}.tsv"
    return parquet[0] if parquet else Path(glue_dir) / file


def read_table(source: Source, header: list[str] | None = None) -> tuple[list[str], Iterator[tuple[int, Any]]]:
    """Column names, and (line number, values) of each row, of a .tsv, .jsonl or .parquet file or a hub split.

    header: names for a .tsv that has no header line. ValueError (one line) for what is missing or damaged.
    """
    if isinstance(source, tuple):
        try:
            ask_hub("nyu-mll/glue")
        except HTTPError:
            pass  # it answers, if not this; `datasets` may know better
        except OSError:
            os.environ["HF_HUB_OFFLINE"] = "1"  # `datasets` takes what it has kept, and does not retry
        try:
            import datasets  # takes seconds, and only the hub needs it

            columns = datasets.load_dataset("nyu-mll/glue", source[0], split=source[1])[:]
        except Exception as e:  # the hub client raises a dozen kinds
            what = f"nyu-mll/glue {source[0]} {source[1]}: not available from the Hugging Face Hub"
            raise ValueError(f"{what} ({type(e).__name__}); give --glue_dir") from None
        return list(columns), enumerate(zip(*columns.values()), 1)
    if not source.is_file():
        raise ValueError(f"{source} is missing")
    if source.suffix == ".parquet":
        import pyarrow.parquet

        try:
            columns = pyarrow.parquet.read_table(source).to_pydict()
        except (OSError, ValueError) as e:
            raise ValueError(f"{source} is not a parquet file ({e})") from None
        return list(columns), enumerate(zip(*columns.values()), 1)
    if source.suffix not in KINDS:
        raise ValueError(f"{source}: unknown kind of file; give {', '.join(KINDS)}")
    try:  # utf-8-sig: MRPC's original files begin with a byte order mark; a lone \r inside a text ends no line
        lines = source.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").rstrip("\n").split("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{source} is not UTF-8 text (byte {e.start})") from None
    if lines == [""]:
        raise ValueError(f"{source} is empty")
    if source.suffix == ".tsv":
        first = 1 if header else 2
        return header or lines[0].split("\t"), ((first + i, x.split("\t")) for i, x in enumerate(lines[first - 1 :]))
    rows = []
    for n, line in enumerate(lines, 1):
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError):
            raise ValueError(f"{source}:{n}: not a JSON object") from None
    names = list(rows[0])
    return names, ((n, [row.get(name) for name in names]) for n, row in enumerate(rows, 1))


def read_split(source: Source, task: Task, labelled: bool = True) -> Split:
    """Texts and raw labels of one file. Rows that lack a text or a label are counted and left out of a GLUE file
    (the official QQP has some), and are an error in one's own. ValueError names file, line and column."""
    plain = task.name == "CoLA" and labelled and isinstance(source, Path) and source.suffix == ".tsv"
    names, rows = read_table(source, COLA_HEADER if plain else None)
    where = str(source) if isinstance(source, Path) else f"nyu-mll/glue {source[0]} {source[1]}"
    texts = next((c for c in task.columns if set(c) <= set(names)), ())
    label = next(([c] for c in task.label_columns if c in names), []) if labelled else []
    if not texts or (labelled and not label):
        wanted = " or ".join(task.label_columns if texts else map("+".join, task.columns))
        raise ValueError(f"{where}: no column {wanted}; its columns are {', '.join(map(str, names[:12]))}")
    at = [names.index(c) for c in (*texts, *label)]
    split = Split(where, [[] for _ in texts], [], [])
    for line, row in rows:
        values = [row[i] if i < len(row) else None for i in at]
        no_label = ("", "-") if task.name == "MNLI" else ("",)  # "-": MNLI's raters disagreed
        if None in values or (label and str(values[-1]).strip() in no_label):
            if not (task.sizes and labelled):  # a test row cannot be left out: every row is to be answered
                raise ValueError(f"{where}:{line}: this row lacks a text{' or its label' * labelled}")
            split.broken.append(line)
            continue
        if len(row) > len(names) and not task.sizes:
            raise ValueError(f"{where}:{line}: {len(row)} columns, the header has {len(names)}; a tab inside a text?")
        for column, text in zip(split.texts, values):
            column.append(str(text))
        if not all(str(text).strip() for text in values[: len(texts)]):
            split.empty.append(line)
        split.labels += values[len(texts) :]
        split.lines.append(line)
    if not split.lines:
        raise ValueError(f"{where}: not one row with a text{' and a label' * labelled}")
    return split


def infer_labels(split: Split) -> tuple[str, ...]:
    """The labels of a training file, sorted (as numbers if all are). ValueError when there is only one."""
    names = {str(label) for label in split.labels}
    if len(names) < 2:
        raise ValueError(f"{split.where}: every row has the label {names.pop()!r}; there is nothing to learn")
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def to_numbers(split: Split, task: Task) -> np.ndarray:
    """Raw labels -> (n,) int64 classes, or float32 for regression. ValueError names the first bad line."""
    known = {name: i for i, name in enumerate(task.labels)}
    if task.sizes:  # the hub has class numbers where the official files have names
        known |= {str(i): i for i in range(len(task.labels))}
    y = []
    for line, label in zip(split.lines, split.labels):
        if task.regression:
            try:
                value = float(label)
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value):
                raise ValueError(f"{split.where}:{line}: label {label!r} is not a number, which regression needs")
        elif FRACTION.fullmatch(str(label)):
            raise ValueError(f"{split.where}:{line}: label {label} is not a class; to predict numbers add --regression")
        elif (value := known.get(str(label))) is None:
            some = ", ".join(task.labels[:8]) + ", ..." * (len(task.labels) > 8)
            raise ValueError(f"{split.where}:{line}: unknown label {label!r}; known: {some}")
        y.append(value)
    return np.array(y, dtype=np.float32 if task.regression else np.int64)


def load_data(task: Task, sources: dict[str, Source]) -> Data:
    """Read "train" and the dev splits of a task and check them. ValueError (one line) for what cannot be used; what
    can be used but should be known is in Data.notes."""
    if task.name == "MNLI" and isinstance(m := sources["dev_mismatched"], Path) and not m.exists():
        sources = {name: s for name, s in sources.items() if name != "dev_mismatched"}  # a subset may come without
    splits = {name: read_split(source, task) for name, source in sources.items()}
    if not task.sizes and not task.regression:
        task = replace(task, labels=infer_labels(splits["train"]))
    y = {name: to_numbers(split, task) for name, split in splits.items()}
    counts = [len(split.lines) for split in splits.values()]
    about = f"{task.name}: " + ", ".join(f"{name} {n:,}" for name, n in zip(splits, counts))
    # to 1 in 10,000: the official QQP file and the hub's differ by three rows
    official = len(counts) == len(task.sizes) and all(abs(n - s) <= s / 1e4 for n, s in zip(counts, task.sizes))
    if task.sizes:
        sizes = ", ".join(f"{n:,}" for n in task.sizes)
        about += ": official size" if official else f": subset of {counts[0]:,} rows, not the official task ({sizes})"
    elif task.labels:
        about += f", {len(task.labels)} classes: {', '.join(task.labels[:8])}" + ", ..." * (len(task.labels) > 8)
    notes, digest = [about], zlib.crc32(b"regression") if task.regression and not task.sizes else 0
    for name, split in splits.items():
        digest = split.digest(digest)
        for lines, what in (
            (split.broken, "broken rows (a text or the label is missing) left out"),
            (split.empty, "rows with an empty text, kept"),
        ):
            if lines:
                notes.append(f"{split.where}: {len(lines):,} {what}; the first in line {lines[0]:,}")
        if absent := [label for i, label in enumerate(task.labels) if i not in y[name]]:
            notes.append(f"warning: {split.where} has no row of class {', '.join(absent[:8])}")
    return Data(task, splits.pop("train"), splits, y, official, f"{digest:08x}", notes)


# ----------------------------------------------------------------------------- metrics


def metric(name: str, y: np.ndarray, answers: np.ndarray) -> float:
    """accuracy, f1 (of class 1), matthews, pearson or spearman. Constant answers correlate with nothing: 0."""
    if name == "accuracy":
        return float(accuracy_score(y, answers))
    if name == "f1":
        return float(f1_score(y, answers, zero_division=0.0))
    if len(np.unique(y)) < 2 or len(np.unique(answers)) < 2:
        return 0.0
    if name == "matthews":
        return float(matthews_corrcoef(y, answers))
    return float({"pearson": pearsonr, "spearman": spearmanr}[name](y, answers).statistic)


def judge(task: Task, y: dict[str, np.ndarray], answers: dict[str, np.ndarray]) -> tuple[dict[str, float], float]:
    """All metrics by name (MNLI: accuracy_m and accuracy_mm; regression: pearson beside spearman), and the score,
    which is the mean of those in task.metrics, as upstream."""
    suffix = {"dev_matched": "_m", "dev_mismatched": "_mm"}
    counted = {m + suffix.get(dev, ""): metric(m, y[dev], a) for dev, a in answers.items() for m in task.metrics}
    beside = {"pearson": metric("pearson", y["dev"], answers["dev"])} if task.regression else {}
    return counted | beside, float(np.mean(list(counted.values())))


def majority(data: Data) -> float:
    """Score of always answering the commonest training label; 0 for regression."""
    if data.task.regression:
        return 0.0
    commonest = np.bincount(data.y["train"]).argmax()
    return judge(data.task, data.y, {dev: np.full_like(data.y[dev], commonest) for dev in data.devs})[1]


# ----------------------------------------------------------------------------- the table

# the metrics of the other average; accuracy where nothing is said
NINE = {"MNLI": ("accuracy_m", "accuracy_mm"), "QQP": ("f1",), "MRPC": ("f1",)}
NINE |= {"CoLA": ("matthews",), "STS-B": ("spearman",)}


def percent(metrics: dict[str, float]) -> str:
    """{"accuracy": 0.61} -> "accuracy 61.0"."""
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in metrics.items())


def gain(pairs: list[tuple[list[float], list[float]]]) -> str:
    """(scores of a start, scores of another) for each task -> how much higher the first are, in the mean of the tasks:
    "+1.5 ± 0.5 (p 0.03)", with its standard error and a two-sided p for unequal variances (Welch 1947; of one task the
    usual t-test). With one seed, or seeds that do not differ, the difference alone."""
    difference = np.mean([np.mean(a) - np.mean(b) for a, b in pairs])
    groups = [scores for pair in pairs for scores in pair]
    if min(map(len, groups)) < 2 or not any(map(np.ptp, groups)):
        return f"{difference:+.1f}"
    parts = [np.var(x, ddof=1) / len(x) if np.ptp(x) else 0.0 for x in groups]  # var is not 0 for equal floats
    error = np.sqrt(sum(parts)) / len(pairs)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, groups))
    return f"{difference:+.1f} ± {error:.1f} (p {2 * t.sf(abs(difference) / error, freedom):.2g})"


def table(records: list[dict[str, Any]]) -> str:
    """Scores in percent, a row for each start, a column for each task: mean ± standard deviation (number of seeds).
    Below, what pretraining gained over random weights, where both are there, and published scores."""
    tasks = sorted({r["task"] for r in records}, key=[*TASKS, *(r["task"] for r in records)].index)
    whole = {r["task"] for r in records if r["official"] or r["task"] not in TASKS}
    starts: dict[str, dict[str, list]] = {}
    for r in sorted(records, key=lambda r: (r["run"], r["step"])):
        name = r["run"] if r["run"] == r["checkpoint"] else f"{r['run']} {Path(r['checkpoint']).name}"
        starts.setdefault(name, {task: [] for task in tasks})[r["task"]].append(r)

    head = ["", *(task if task in whole else f"{task}*" for task in tasks)]
    if tasks == list(TASKS):
        head += ["8-task mean, last evaluation", "9-number mean, best evaluation"]
    elif len(tasks) > 1:
        head += [f"mean of {len(tasks)} tasks"]
    majorities = {r["task"]: f"{100 * r['majority']:.1f}" for r in reversed(records)}
    lines = [head, ["majority", *(majorities[task] for task in tasks)], *score_rows(starts, tasks)]
    if gains := gain_rows(starts, tasks):
        lines += [["gained over random weights, ± standard error (p of Welch's t-test):"], *gains]
    if set(tasks) & set(TASKS):
        lines += [["published dev scores, for orientation:"], *published_rows(tasks)]
    if len(whole) < len(tasks):
        lines.append(["* a subset of the rows, not the official task"])
    widths = [max(len(line[i]) for line in lines if len(line) > max(i, 1)) for i in range(len(head))]
    rows = [[line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))] for line in lines]
    return "\n".join("  ".join(row).rstrip() for row in rows)


def score_rows(starts: dict[str, dict[str, list]], tasks: list[str]) -> list[list[str]]:
    """A row for each start: its scores, their mean over the tasks, and of all eight the 9-number mean."""
    rows = []
    for name, by_task in starts.items():
        scores = [[100 * r["score"] for r in by_task[task]] for task in tasks]
        row = [name]
        row += [f"{np.mean(s):.1f} ± {np.std(s, ddof=1):.1f} ({len(s)})" if s[1:] else f"{s[0]:.1f}" for s in scores]
        if len(tasks) > 1:
            row.append(f"{np.mean([np.mean(s) for s in scores]):.2f}")
        if tasks == list(TASKS):
            best = [
                np.mean([max(100 * epoch.get(m, math.nan) for epoch in r["history"]) for r in by_task[task]])
                for task in tasks
                for m in NINE.get(task, ("accuracy",))
            ]
            row.append("no MNLI-mm" if np.isnan(best).any() else f"{np.mean(best):.2f}")
        rows.append(row)
    return rows


def gain_rows(starts: dict[str, dict[str, list]], tasks: list[str]) -> list[list[str]]:
    """A row for each start whose run has random weights beside it: `gain` for each task and for their mean."""
    rows = []
    for name, by_task in starts.items():
        random = starts.get(f"{by_task[tasks[0]][0]['run']} random")
        if random is None or random is by_task:
            continue
        pairs = [tuple([100 * r["score"] for r in of[task]] for of in (by_task, random)) for task in tasks]
        row = [name, *(gain([pair]) for pair in pairs)]
        rows.append([*row, gain(pairs)] if len(tasks) > 1 else row)
    return rows


def published_rows(tasks: list[str]) -> list[list[str]]:
    """PUBLISHED, for these tasks; their mean where all of them are GLUE's."""
    rows = []
    for name, scores in PUBLISHED.items():
        known = dict(zip(TASKS, scores))
        row = [name, *(f"{known[task]:.1f}" if task in known else "" for task in tasks)]
        if len(tasks) > 1 and set(tasks) <= set(known):
            row.append(f"{np.mean([known[task] for task in tasks]):.2f}")
        rows.append(row)
    return rows
