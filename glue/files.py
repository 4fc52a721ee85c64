"""Reads labelled files: GLUE's official .tsv, the hub's parquet, and files of one's own.

One's own: a .tsv with a header, .jsonl or .parquet, with one text or two and a label; or words with
a label each (names, parts of speech): rows {"words": [...], "labels": [...]}, CoNLL (word and label
a line, an empty line after a sentence) or CoNLL-U. The official files have no quoting (a quote is a
character), CoLA's have no header, QQP's has broken rows; glue/tasks.py knows their columns.
"""

import json
import math
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from glue.tasks import Task, evaluate

Source = Path | str  # a file, or "nyu-mll/glue rte validation" of the hub
COLA_HEADER = ["source", "label", "mark", "sentence"]  # its train and dev files have none
CONLLU = ["id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc"]


@dataclass
class Split:
    """The n rows of one file that can be used."""

    where: str
    texts: list[list[str]]  # one or two columns of n strings
    labels: list[Any]  # n raw values, of words a list for each row; empty when there are none
    lines: list[int]  # n line numbers
    form: str = ""  # "tsv", "CoNLL-U" ...
    words: list[list[str]] = field(default_factory=list)  # n sentences, if words have the labels
    broken: list[int] = field(default_factory=list)  # lines left out: no text or no label
    encoded: dict = field(default_factory=dict)  # what tokenizers have made of it

    @property
    def lengths(self) -> list[int]:
        """Labels in each row."""
        return [len(words) for words in self.words] or [1] * len(self.lines)

    def flat_labels(self) -> list[tuple[int, Any]]:
        """(line, label) of each text or word."""
        rows = self.labels if self.words else ([label] for label in self.labels)
        return [(line, label) for line, labels in zip(self.lines, rows) for label in labels]

    def digest(self, start: int = 0) -> int:
        """crc32 of every text and label."""
        for column in (*self.texts, map(str, self.labels)):
            start = zlib.crc32("\t".join(column).encode("utf-8", "replace"), start)
        return start


@dataclass
class Data:
    """A task's files, read. y: int64 classes or float32 values of "train" and of each dev split."""

    task: Task
    train: Split
    devs: dict[str, Split]
    y: dict[str, np.ndarray]
    facts: dict[str, Any]  # of its records. data: results belong to these rows and no others
    notes: list[str]  # what the user should know about the files, one line each


def locate(glue_dir: str, task: Task) -> dict[str, Source]:
    """"train" and the dev splits: the official .tsv in glue_dir, or the hub's parquet if that is
    there; without glue_dir the hub itself. MNLI may come without its mismatched half."""
    config, sources = task.name.lower().replace("-", ""), {}
    for split in ("train", *task.devs):
        hub_split = split.replace("dev", "validation")
        file = Path(glue_dir, task.name, f"{split}.tsv")
        file = next(Path(glue_dir).glob(f"{config}/{hub_split}-*.parquet"), file)
        if not glue_dir or split != "dev_mismatched" or file.exists():
            sources[split] = file if glue_dir else f"nyu-mll/glue {config} {hub_split}"
    return sources


def read_table(source: Source, task: Task, labelled: bool) -> tuple[str, list[str], Iterable]:
    """What a file is, its column names, and (line number, {column: value}) of each row: of a .jsonl
    or .parquet file, a hub split, CoNLL or CoNLL-U, else .tsv. ValueError for what is damaged."""
    if isinstance(source, str) or source.suffix.lower() == ".parquet":
        try:
            if isinstance(source, str):
                import datasets  # takes seconds, and only the hub needs it

                path, config, split = source.split()
                columns = datasets.load_dataset(path, config, split=split)[:]
            else:
                import pyarrow.parquet

                columns = pyarrow.parquet.read_table(source).to_pydict()
        except Exception as e:  # the hub's client raises a dozen kinds
            where = " from the Hugging Face Hub (give --glue_dir)" * isinstance(source, str)
            raise ValueError(f"{source} cannot be read{where}: {type(e).__name__}") from None
        rows = (dict(zip(columns, values)) for values in zip(*columns.values()))
        return "parquet", list(columns), enumerate(rows, 1)
    try:  # utf-8-sig: MRPC's original files begin with a byte order mark
        text = source.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").rstrip("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"{source} is not UTF-8 text (byte {e.start})") from None
    lines = list(enumerate(text.split("\n"), 1))  # a lone \r inside a text ends no line
    if source.suffix.lower() in (".jsonl", ".ndjson"):
        rows = []
        for n, line in lines:
            try:
                rows.append((n, {**json.loads(line)}))
            except (ValueError, TypeError):
                raise ValueError(f"{source}:{n}: not a JSON object") from None
        return "rows", list(rows[0][1]), rows
    if not task.sizes and (found := read_conll(source, lines, task, labelled)):
        return found[0], ["words", task.label_columns[0]], found[1]
    names = COLA_HEADER if task.name == "CoLA" and labelled else lines.pop(0)[1].split("\t")
    rows = [(n, line.split("\t")) for n, line in lines]
    if not task.sizes and (odd := [(n, len(row)) for n, row in rows if len(row) > len(names)]):
        raise ValueError(f"{source}:{odd[0][0]}: {odd[0][1]} columns, the header has {len(names)}; "
                         "a tab inside a text?")
    return "tsv", names, ((n, dict(zip(names, row))) for n, row in rows)


def read_conll(source: Path, lines: list[tuple[int, str]], task: Task, labelled: bool):
    """Form, and (line number, words and labels) of each sentence, of CoNLL or CoNLL-U; None for
    other content."""
    blocks = [[(n, line.split("\t") if "\t" in line else line.split()) for n, line in block]
              for full, block in groupby(lines, lambda line: bool(line[1].strip())) if full]
    first = next((row for block in blocks for _, row in block if row[0][:1] != "#"), [""])
    column = task.label_columns[0]
    if len(first) == len(CONLLU) and first[0][:1].isdigit():
        if labelled and column not in CONLLU:
            raise ValueError(f"{source} is CoNLL-U: say which of its columns, e.g. --column upos")
        form, word, label, least = "CoNLL-U", 1, CONLLU.index(column) if labelled else 1, 10
        # no words are: comments, 1-2 (words written as one), 8.1 (a word that is not written)
        blocks = [[row for row in block if row[1][0].isdigit()] for block in blocks]
    elif task.words or (len(blocks) > 1 and len(first) > 1):
        form, word, label, least = "CoNLL", 0, -1, 1 + labelled
        blocks = [block for block in blocks if block[0][1][0] != "-DOCSTART-"]
    else:
        return None
    if short := [n for block in blocks for n, row in block if len(row) < least]:
        raise ValueError(f"{source}:{short[0]}: this line lacks a word or its label")
    return form, [(block[0][0], {"words": [row[word] for _, row in block],
                                 column: [row[label] for _, row in block]})
                  for block in blocks if block]


def read_split(source: Source, task: Task, labelled: bool = True) -> Split:
    """Texts, or words, and raw labels of one file. Rows that lack a text or a label are counted and
    left out of a GLUE file (the official QQP has some), and are an error in one's own and in rows
    to predict, which must all be answered. ValueError names file, line and column."""
    form, names, rows = read_table(source, task, labelled)
    texts = next((c for c in task.columns if set(c) <= set(names)), ())
    label = next(([c] for c in task.label_columns if c in names), []) if labelled else []
    if not texts or (labelled and not label):
        wanted = " or ".join(task.label_columns if texts else map("+".join, task.columns))
        found = ", ".join(map(str, names[:12]))
        raise ValueError(f"{source}: no column {wanted}; its columns are {found}")
    split = Split(str(source), [[] for _ in texts], [], [], form=form)
    for line, row in rows:
        values, problem = [row.get(column) for column in (*texts, *label)], ""
        lists = label and not split.lines and all(isinstance(value, list) for value in values)
        if task.words or split.words or lists:
            if not (problem := problem_of_words(*values)):
                split.words.append(list(map(str, values[0])))
                values[0] = " ".join(split.words[-1])
        elif odd := [v for v in values if v is not None and not is_text(v)]:
            problem = f"{odd[0]!r:.60} is neither a text nor a label"
        elif None in values or (label and not str(values[-1]).strip()):
            if task.sizes and labelled:
                split.broken.append(line)
                continue
            problem = f"this row lacks a text{' or its label' * labelled}"
        if problem:
            raise ValueError(f"{source}:{line}: {problem}")
        for column, text in zip(split.texts, values):
            column.append(str(text))
        split.labels += values[len(texts) :]
        split.lines.append(line)
    if not split.lines:
        raise ValueError(f"{source}: not one row with a text{' and a label' * labelled}")
    return split


def problem_of_words(words: list, *labels: list) -> str:
    """What is wrong with a sentence of words and their labels, "" if nothing is."""
    for what, values in zip(("words", "labels"), (words, *labels)):
        if not isinstance(values, list):
            return f"{what}: {values!r:.60} is no list"
        if odd := [v for v in values if not is_text(v) or not str(v).strip()]:
            return f"{odd[0]!r} among the {what}"
    n = [len(values) for values in (words, *labels)]
    return f"{n[0]} words, {n[1]} labels" if n[0] != n[-1] else "" if words else "an empty sentence"


def is_text(value: object) -> bool:
    """Not a list, bytes, or the NaN that pandas writes for what is missing."""
    return isinstance(value, str | int | float) and value == value


def class_name(label: object) -> str:
    """1.0, which pandas makes of a column of integers with a gap, is class 1."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(label))


def find_labels(split: Split) -> tuple[str, ...]:
    """The labels of a training file, sorted (as numbers if all are)."""
    names = sorted({class_name(label) for _, label in split.flat_labels()})
    if len(names) < 2:
        raise ValueError(f"{split.where}: every row has the label {names[0]!r}")
    for name in names:
        if re.fullmatch(r"-?\d*\.\d+(e-?\d+)?", name):
            raise ValueError(f"{split.where}: label {name} is not a class; for numbers add "
                             "--regression")
        if re.search(r"[\t\r\n]", name):
            raise ValueError(f"{split.where}: label {name!r} has a tab or line end in it")
    return tuple(sorted(names, key=int) if all(re.fullmatch(r"-?\d+", n) for n in names) else names)


def to_numbers(split: Split, task: Task) -> np.ndarray:
    """Raw labels of texts or words -> (n,) int64 classes, or float32 for regression. ValueError
    names the line."""
    known, y = {name: i for i, name in enumerate(task.labels)}, []
    if task.sizes:  # the hub has class numbers where the official files have names
        known |= {str(i): i for i in range(len(task.labels))}
    for line, label in split.flat_labels():
        try:
            y.append(float(label) if task.regression else known[class_name(label)])
        except (KeyError, TypeError, ValueError):
            y.append(math.nan)
        if not math.isfinite(y[-1]):
            why = "is no number" if task.regression else f"is not one of {listed(task.labels)}"
            raise ValueError(f"{split.where}:{line}: label {label!r} {why}")
    return np.array(y, dtype=np.float32 if task.regression else np.int64)


def listed(labels: tuple[str, ...]) -> str:
    """At most eight, with quotes where there are blanks around one."""
    names = [name if name == name.strip() else repr(name) for name in labels[:8]]
    return ", ".join(names) + ", ..." * (len(labels) > 8)


def load_data(task: Task, sources: dict[str, Source]) -> Data:
    """Read "train" and the dev splits of a task and check them. ValueError (one line) for what
    cannot be used; what can be used but should be known is in Data.notes."""
    train = read_split(sources["train"], task)
    task = replace(task, words=bool(train.words))
    devs = {name: read_split(sources[name], task) for name in sources if name != "train"}
    splits = {"train": train, **devs}
    if not task.sizes and not task.regression:
        task = replace(task, labels=find_labels(train))
        if task.words and all(re.fullmatch(r"O|[BIESLU]-.+", label) for label in task.labels):
            task = replace(task, metrics=("entity_f1",))
    y, majority = {name: to_numbers(split, task) for name, split in splits.items()}, 0.0
    if not task.regression:
        commonest = np.bincount(y["train"]).argmax()
        constant = {name: np.full_like(y[name], commonest) for name in devs}
        majority = evaluate(task, y, constant, {name: devs[name].lengths for name in devs})["score"]
    digest = zlib.crc32(b"regression") if task.regression and not task.sizes else 0
    counts = [len(split.lines) for split in splits.values()]
    # to 1 in 10,000: the official QQP file and the hub's differ by three rows
    official = len(counts) == len(task.sizes) and np.allclose(counts, task.sizes, rtol=1e-4)
    notes = [f"{task.name}: " + ", ".join(f"{name} {n:,}" for name, n in zip(splits, counts))]
    if task.sizes and not official:
        notes[0] += ": a subset, not the official task's " + ", ".join(f"{n:,}" for n in task.sizes)
    elif task.labels:
        notes[0] += f", {len(task.labels)} classes: {listed(task.labels)}"
    if task.words:
        notes[0] += f"; {train.form} with a label for each word, metric {task.metrics[0]}"
    for split in splits.values():
        digest = split.digest(digest)
        if split.broken:
            notes.append(f"{split.where}: {len(split.broken):,} rows that lack a text or the label "
                         f"left out; the first in line {split.broken[0]:,}")
    facts = {"data": f"{digest:08x}", "majority": majority, "official": bool(official),
             "n_train": counts[0], "n_dev": sum(counts[1:])}
    return Data(task, train, devs, y, facts, notes)
