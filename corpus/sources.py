"""Documents of any source, for prepare_c4.py: files, a dataset of the Hugging Face hub, docstrings.

find_items() cuts a source into work items and item_documents() reads one, always in the same order;
a BadInput, naming file and line, stands for what is unusable.
"""

import bz2
import fnmatch
import functools
import glob
import gzip
import hashlib
import importlib.metadata
import io
import json
import lzma
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from corpus.docstrings import collect_docstrings
from records import BadInput

KINDS = ".jsonl .ndjson .json .txt (also .gz .zst .bz2 .xz) or .parquet"
SUFFIXES = re.compile(
    r"\.(?:(jsonl|ndjson|json|txt)(?:\.(?:gz|zst|bz2|xz))?|parquet)$", re.IGNORECASE)
ITEM_BYTES = 8 << 20  # input files are grouped into work items of at least this size


def open_file(path: str) -> BinaryIO:
    """The decompressed bytes of a file. Reading one that is cut short raises."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".zst":
        import pyarrow  # zstandard's own reader ends a cut file silently

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)(path, "rb")


def decode(data: bytes, where: str) -> "str | BadInput":
    try:  # files that begin with a byte order mark and were joined have it in the middle
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        return BadInput(f"{where} is not UTF-8 (byte {e.start + 1})")


def lines_of(path: str) -> Iterator[tuple[str, "str | BadInput"]]:
    """("path:line number", the line) of a text file; a BadInput where it is not UTF-8."""
    with open_file(path) as f:
        for n, line in enumerate(f, 1):
            where = f"{path}:{n}"
            yield where, decode(line.removesuffix(b"\n").removesuffix(b"\r"), where)


def text_in(row: object, key: str, where: str) -> "str | BadInput":
    text = row.get(key) if isinstance(row, dict) else None
    if isinstance(text, bytes):  # a binary column
        return decode(text, where)
    if isinstance(text, str):
        return text
    return BadInput(f"{where} has no text under the key {key!r} (see --text_key)")


def table_documents(tables: Iterable, key: str, where: str) -> Iterator["str | BadInput"]:
    """Documents of arrow tables or batches. Row by row it takes twice the time."""
    first = 1
    for table in tables:
        there = key in table.schema.names
        column = table.column(key).to_pylist() if there else [None] * len(table)
        for n, text in enumerate(column, first):
            yield text_in({key: text}, key, f"{where} row {n}")
        first += len(table)


def text_documents(path: str, unit: str) -> Iterator["str | BadInput"]:
    """Lines, paragraphs (blocks between blank lines) or the whole of a plain text file."""
    block: list[str] = []
    for _, line in lines_of(path):
        if isinstance(line, BadInput):
            yield line
            continue
        blank = not line.strip()
        if not blank or unit == "file":
            block.append(line)
        if block and (unit == "line" or (unit == "paragraph" and blank)):
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def json_documents(path: str, key: str) -> Iterator["str | BadInput"]:
    """Documents of JSON lines, or of one array of objects, which is read whole."""
    with open_file(path) as f:
        if f.peek(1 << 12).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            try:
                rows = json.loads(f.read())
            except (ValueError, RecursionError):
                pass  # lines then, and the first that is wrong is named
            else:
                yield from (text_in(row, key, f"{path} item {n}") for n, row in enumerate(rows, 1))
                return
    for where, line in lines_of(path):
        if isinstance(line, BadInput):
            yield line
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                yield BadInput(f"{where} is not JSON ({e})")
            else:
                yield text_in(row, key, where)


def file_documents(path: str, key: str, unit: str) -> Iterator["str | BadInput"]:
    """Documents of one file; a BadInput stands for each record that holds none, and for the rest of
    a damaged file."""
    kind = SUFFIXES.search(path)[1]
    try:
        if kind is None:
            import pyarrow.parquet

            parquet = pyarrow.parquet.ParquetFile(path)
            columns = [key] if key in parquet.schema_arrow.names else None
            yield from table_documents(parquet.iter_batches(1024, columns=columns), key, path)
        elif kind.lower() == "txt":
            yield from text_documents(path, unit)
        else:
            yield from json_documents(path, key)
    except Exception as e:  # gzip, zlib and pyarrow each raise their own for damaged data
        yield BadInput(f"{path} is damaged or cut short ({e})")


@functools.cache
def hub_splits(path: str, name: str | None) -> dict:
    """Streaming splits of a hub dataset, or of a local folder laid out like one. BadInput when it
    cannot be had."""
    import datasets
    import huggingface_hub

    try:
        if not os.path.isdir(path):  # `datasets` would retry for minutes
            huggingface_hub.HfApi().dataset_info(path, timeout=10)
        return datasets.load_dataset(path, name, streaming=True)
    except Exception as e:  # of several libraries
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise BadInput(f"cannot stream {path} from the Hugging Face hub ({why}); "
                       "use a local corpus") from None


def hub_documents(path: str, name: str | None, split: str, index: int, key: str
                  ) -> Iterator["str | BadInput"]:
    """Documents of one file of a hub dataset."""
    dataset = hub_splits(path, name)[split]
    where = f"{path} {split} file {index}"
    tables = dataset.shard(dataset.num_shards, index).with_format("arrow").iter(1000)
    try:
        yield from table_documents(tables, key, where)
    except Exception as e:  # after minutes of retries by the libraries below
        raise BadInput(f"{where} broke off ({e!r:.200}); the same command continues") from None


class Source(NamedTuple):
    """A source cut into work items, each read by one process."""

    train: list[tuple]
    validation: list[tuple]  # a split of the source's own
    # changes when the content does, as far as can be told without reading all of it
    identity: str
    left_out: Sequence[str] = ()  # names of files of no kind that can be read


def find_items(source: str) -> Source:
    """BadInput when there is no such source, or nothing in it that can be read."""
    if source == "docstrings":
        packages = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
        return Source([("docstrings",)], [], sys.version + ", ".join(packages))
    if source == "c4" or source.startswith("hub:"):
        path = "allenai/c4:en" if source == "c4" else source.removeprefix("hub:")
        path, _, name = path.partition(":")
        splits = hub_splits(path, name or None)
        if "train" not in splits:
            raise BadInput(f"the dataset {path} has no split train, only {', '.join(splits)}")
        files = {split: range(splits[split].num_shards) for split in splits}
        train, val = ([("hub", path, name or None, split, i) for i in files.get(split, ())]
                      for split in ("train", "validation"))
        return Source(train, val, f"{path} {name} {len(train)} {len(val)}")
    found = find_files(source)
    readable = [p for p in found if os.path.isfile(p) and SUFFIXES.search(p)]
    usable = each_once(readable)
    if not usable:
        what = f"holds no {KINDS}" if found or os.path.isdir(source) else "does not exist"
        raise BadInput(f"the corpus {source} {what}; others: docstrings, c4, hub:owner/name, "
                       "a folder, a quoted glob")
    items, group, size = [], [], 0
    for path in usable:  # small files share an item: ten thousand of them are not as many shards
        group.append(path)
        size += os.path.getsize(path)
        if size >= ITEM_BYTES or path == usable[-1]:
            items.append(("files", group))
            group, size = [], 0
    left_out = [os.path.basename(path) for path in each_once({*found} - {*readable})]
    return Source(items, [], " ".join(map(file_identity, usable)), left_out)


def each_once(paths: Iterable[str]) -> list[str]:
    """Sorted, and of several paths to one file the first."""
    return sorted({os.path.realpath(path): path for path in sorted(paths, reverse=True)}.values())


def find_files(source: str) -> list[str]:
    """The files of a path or pattern, sorted. Folders (also x.parquet, as Spark writes) are walked,
    each once by its real path, so that links may loop; hidden files and folders are not taken."""
    todo, tail, files, walked = [source], "", [], set()
    if not os.path.exists(source):  # "**" is walked here: glob would never end where links loop
        head, deep, tail = source.partition("**")
        todo = glob.glob(head or "." if deep else source)
    while todo:
        path = todo.pop()
        if not os.path.isdir(path):
            files.append(path)
        elif (real := os.path.realpath(path)) not in walked:
            walked.add(real)
            todo += [os.path.join(path, name) for name in os.listdir(path) if name[0] != "."]
    below = re.compile(".*" + fnmatch.translate(tail).replace(".*", "[^/]*"), re.DOTALL)
    return sorted(path for path in files if not tail or below.match(path))


def file_identity(path: str) -> str:
    """Kind, size and a hash of the first and last 64 kB of a file, whatever it is called."""
    with open(path, "rb") as f:
        size, ends = os.path.getsize(path), f.read(1 << 16)
        f.seek(max(0, size - (1 << 16)))
        ends += f.read()
    kind = SUFFIXES.search(path)[0].lower()
    return f"{kind} {size} {hashlib.blake2b(ends, digest_size=8).hexdigest()}"


def item_documents(item: tuple, key: str, unit: str) -> Iterator["str | BadInput"]:
    """Documents of one work item as they are, always in the same order."""
    if item[0] == "files":
        return (text for path in item[1] for text in file_documents(path, key, unit))
    return hub_documents(*item[1:], key) if item[0] == "hub" else iter(collect_docstrings())
