"""Reads files in which words have labels (names, parts of speech): rows {"words": [...], "labels":
[...]}, CoNLL (a word and its label a line, an empty line after each sentence), CoNLL-U."""

from collections.abc import Iterator
from pathlib import Path

from glue.files import Source, Split, read_lines, read_table
from glue.tasks import Task

CONLLU = ["id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc"]


def blocks(source: Path) -> Iterator[list[tuple[int, list[str]]]]:
    """(line number, columns) of the lines between two empty ones."""
    block = []
    for n, line in [*read_lines(source), (0, "")]:
        if line.strip():
            block.append((n, line.split("\t") if "\t" in line else line.split()))
        elif block:
            yield block
            block = []


def kind_of_words(source: Source) -> str:
    """"words", "CoNLL" or "CoNLL-U", as above; "" for a file with other content."""
    if isinstance(source, str) or source.suffix in (".jsonl", ".parquet"):
        return "words" if "words" in read_table(source)[0] else ""
    found = list(blocks(source))
    lines = [cells for block in found for _, cells in block if cells[0][0] != "#"]
    if lines and len(lines[0]) == len(CONLLU) and lines[0][0][0].isdigit():
        return "CoNLL-U"
    return "CoNLL" if lines and len(found) > 1 and len(lines[0]) > 1 else ""


def read_words(source: Path, task: Task, labelled: bool = True) -> Split:
    """The sentences of a file. ValueError names the line of the first that cannot be used."""
    kind, column = kind_of_words(source) or "CoNLL", task.label_columns[0]
    rows = []  # line number, words, labels
    if kind == "words":
        names, table = read_table(source)
        column = next((c for c in task.label_columns if c in names), "words" * (not labelled))
        if not column:
            raise ValueError(f"{source}: no column {' or '.join(task.label_columns)}; its columns "
                             f"are {', '.join(names)}")
        at = names.index("words"), names.index(column)
        rows = [(n, *(row[i] for i in at)) for n, row in table]
    elif kind == "CoNLL-U" and labelled and column not in CONLLU:
        raise ValueError(f"{source} is CoNLL-U: say which of its columns, e.g. --column upos")
    else:
        form, least = (1, len(CONLLU)) if kind == "CoNLL-U" else (0, 1 + labelled)
        at = CONLLU.index(column) if kind == "CoNLL-U" and labelled else -1
        for block in blocks(source):
            if kind == "CoNLL-U":  # no words are: comments, 1-2 (written as one), 8.1 (not written)
                block = [(n, cells) for n, cells in block if cells[0].isdigit()]
            if short := [n for n, cells in block if len(cells) < least]:
                raise ValueError(f"{source}:{short[0]}: this line lacks a word or its label")
            words, labels = ([cells[i] for _, cells in block] for i in (form, at))
            if words and words != ["-DOCSTART-"]:
                rows.append((block[0][0], words, labels))
    split = Split(str(source), [[]], [], [])
    for n, words, labels in rows:
        if problem := problem_with(words, labels if labelled else words):
            raise ValueError(f"{source}:{n}: {problem}")
        split.words.append(list(map(str, words)))
        split.texts[0].append(" ".join(split.words[-1]))
        split.labels += [labels] * labelled
        split.lines.append(n)
    if not rows:
        raise ValueError(f"{source}: not one sentence")
    return split


def problem_with(words: list, labels: list) -> str:
    """What is wrong with a sentence, "" if nothing is."""
    for what, values in (("words", words), ("labels", labels)):
        if not isinstance(values, list):
            return f"{what}: {values!r:.40} is no list"
        if odd := [v for v in values if not isinstance(v, str | int) or not str(v).strip()]:
            return f"{odd[0]!r} among the {what}"
    if not words:
        return "an empty sentence"
    return "" if len(words) == len(labels) else f"{len(words)} words, {len(labels)} labels"
