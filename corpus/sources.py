"""Documents of any source, for prepare_c4.py: the files of a corpus, a dataset of the Hugging Face hub, docstrings.

find_items() cuts a source into work items and item_documents() reads one, always in the same order. What is unusable
comes as a BadInput in its place, naming file and line, so that the caller may stop or count.
"""

import functools
import glob
import gzip
import importlib.metadata
import json
import os
import re
import sys
import urllib.request
from collections.abc import Iterator

from corpus.docstrings import collect_docstrings
from records import BadInput

SUFFIXES = re.compile(r"\.(?:(?:jsonl?|txt)(?:\.gz|\.zst)?|parquet)$")
ITEM_BYTES = 8 << 20  # input files are grouped into work items of at least this size


def blocks_of(path: str) -> Iterator[bytes]:
    """Decompressed bytes of a .gz, .zst or plain file, about a megabyte at a time. EOFError when it is cut short."""
    if not path.endswith(".zst"):
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as f:
            while block := f.read(1 << 20):
                yield block
        return
    import zstandard

    frame = None
    with open(path, "rb") as f:
        while block := f.read(1 << 18):
            while block:  # decompressobj and not stream_reader, which ends a cut file silently
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends inside a zstd frame")


def lines_of(path: str) -> Iterator[tuple[str, "str | BadInput"]]:
    """("path:line number", the line) of a text file; a BadInput stands for a line that is not UTF-8."""

    def raw() -> Iterator[bytes]:
        pieces: list[bytes] = []  # of a line that may be longer than a block
        for block in blocks_of(path):
            end, *lines = block.split(b"\n")
            pieces.append(end)
            if lines:
                yield b"".join(pieces)
                yield from lines[:-1]
                pieces = lines[-1:]
        yield b"".join(pieces)

    for n, line in enumerate(raw(), 1):
        try:
            yield f"{path}:{n}", line.removesuffix(b"\r").decode("utf-8-sig" if n == 1 else "utf-8")
        except UnicodeDecodeError as e:
            yield f"{path}:{n}", BadInput(f"{path}:{n} is not UTF-8 (byte {e.start + 1} of the line)")


def text_in(row: object, key: str, where: str) -> "str | BadInput":
    text = row.get(key) if isinstance(row, dict) else None
    return text if isinstance(text, str) else BadInput(f"{where} has no text under the key {key!r} (see --text_key)")


def file_documents(path: str, key: str) -> Iterator["str | BadInput"]:
    """Documents of one file; a BadInput stands for each record that holds none, and for the rest of a damaged file."""
    kind = re.sub(r"\.(gz|zst)$", "", path)
    try:
        if kind.endswith(".parquet"):
            import pyarrow.parquet

            parquet = pyarrow.parquet.ParquetFile(path)
            if key not in (names := parquet.schema_arrow.names):
                yield BadInput(f"{path} has no column {key!r}, only {', '.join(names)} (see --text_key)")
                return
            rows = (row for batch in parquet.iter_batches(1024, columns=[key]) for row in batch.to_pylist())
            yield from (text_in(row, key, f"{path} row {n}") for n, row in enumerate(rows, 1))
        elif kind.endswith(".txt"):
            block: list[str] = []
            for _, line in lines_of(path):
                if isinstance(line, BadInput):
                    yield line
                elif line.strip():
                    block.append(line)
                elif block:
                    yield "\n".join(block)
                    block = []
            if block:
                yield "\n".join(block)
        else:
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
    except Exception as e:  # gzip, zlib, zstandard and pyarrow each raise their own for damaged data
        yield BadInput(f"{path} is damaged or cut short ({e})")


@functools.cache  # once it has answered
def ask_hub(path: str) -> None:
    """OSError, within seconds, when the hub cannot be asked about a dataset: its own libraries retry for minutes."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("", "0", "FALSE", "NO", "OFF"):
        raise OSError("HF_HUB_OFFLINE is set")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    urllib.request.urlopen(f"{endpoint}/api/datasets/{path}", timeout=10).close()


@functools.cache
def hub_splits(path: str, name: str | None) -> dict:
    """Streaming splits of a hub dataset, or of a local folder laid out like one. BadInput when it cannot be had."""
    try:
        if not os.path.isdir(path):
            ask_hub(path)
        import datasets

        return datasets.load_dataset(path, name, streaming=True)
    except Exception as e:  # any of several libraries
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise BadInput(f"cannot stream {path} from the Hugging Face hub ({why}); use a local corpus") from None


def hub_documents(path: str, name: str | None, split: str, index: int, key: str) -> Iterator["str | BadInput"]:
    """Documents of one file of a hub dataset. Arrow batches: row by row it takes twice the time."""
    dataset = hub_splits(path, name)[split]
    n = 0
    try:
        for table in dataset.shard(dataset.num_shards, index).with_format("arrow").iter(1000):
            column = table[key].to_pylist() if key in table.column_names else [None] * len(table)
            for text in column:
                n += 1
                yield text_in({key: text}, key, f"{path} {split} file {index} row {n}")
    except Exception as e:  # after minutes of retries by the libraries below
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise BadInput(f"{path} {split} file {index} broke off ({why}); the same command continues") from None


def find_items(source: str) -> tuple[list[tuple], list[tuple], str]:
    """Cut a source into work items, each read by one process: (train, its own validation split, fingerprint).

    The fingerprint changes when the source does, as far as can be told without reading it.
    """
    if source == "docstrings":
        packages = sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions())
        return [("docstrings",)], [], sys.version + ", ".join(packages)
    if source == "c4" or source.startswith("hub:"):
        path, _, name = ("allenai/c4:en" if source == "c4" else source.removeprefix("hub:")).partition(":")
        splits = hub_splits(path, name or None)
        if "train" not in splits:
            raise BadInput(f"the dataset {path} has no split named train, only {', '.join(splits)}")
        train, val = (
            [("hub", path, name or None, split, i) for i in range(splits[split].num_shards if split in splits else 0)]
            for split in ("train", "validation")
        )
        return train, val, f"{len(train)} {len(val)}"
    pattern = os.path.join(glob.escape(source), "**") if os.path.isdir(source) else source
    paths = [source] if os.path.isfile(source) else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    usable = [p for p in paths if SUFFIXES.search(p)]
    if not usable:
        there = "holds" if os.path.isdir(source) else "is" if paths else ""
        what = f"{there} no .jsonl(.gz|.zst), .parquet or .txt(.gz|.zst)" if there else "does not exist"
        raise BadInput(f"the corpus {source} {what}; others: docstrings, c4, hub:owner/name, a folder, a quoted glob")
    items, group, size = [], [], 0
    for path in usable:  # small files share an item: ten thousand of them are not ten thousand shards
        group.append(path)
        size += os.path.getsize(path)
        if size >= ITEM_BYTES or path == usable[-1]:
            items.append(("files", group))
            group, size = [], 0
    return items, [], ", ".join(f"{os.path.basename(p)} {os.path.getsize(p)}" for p in usable)


def item_documents(item: tuple, key: str) -> Iterator["str | BadInput"]:
    """Documents of one work item as they are, always in the same order."""
    if item[0] == "files":
        return (text for path in item[1] for text in file_documents(path, key))
    return hub_documents(*item[1:], key) if item[0] == "hub" else iter(collect_docstrings())
