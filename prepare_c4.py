"""Turn a corpus into token shards and a tokenizer of its own.

    python prepare_c4.py docstrings --vocab_size 8192            # offline: the installed packages
    python prepare_c4.py corpus.jsonl.gz --out data/mine         # a file, a folder or a "glob*" of
                                                                 #   .jsonl .txt (.gz ...) .parquet
    python prepare_c4.py c4 --max_docs 10000                     # streams allenai/c4 from the hub
    python prepare_c4.py hub:HuggingFaceFW/fineweb:sample-10BT   # any other: hub:owner/name:config

The docstrings take about 15 seconds on two cores and give some 11 MB. Encoding runs at 20 to
30 MB/s per core; before it the tokenizer is trained at about 5 MB/s. The folder receives the
tokenizer, the shards (corpus/shards.py has their format) and, last, meta.json. Killed at any
moment, the same command continues and ends with the same bytes. Held-out documents are chosen by a
hash of their text, so copies of a document never end up on both sides. `python -m corpus.inspect
FOLDER` shows what a folder holds.
"""

import contextlib
import dataclasses
import glob
import hashlib
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from corpus.docstrings import n_dev_examples, write_word_order_task
from corpus.shards import FORMAT, Corpus, ShardWriter
from corpus.sources import SUFFIXES, find_items, item_documents
from corpus.tokenizer import Tokenizer, valid_unicode
from machine import script
from records import BadInput, listed, lock, read_json, to_json, write_atomically


@dataclasses.dataclass
class Config:
    # docstrings | c4 | hub:owner/name[:config] | file, folder or glob of .jsonl .txt .parquet
    source: str
    out: str = ""  # folder to write; "" = data/<name of the source>
    vocab_size: int = 30528  # entries, 5 specials among them; a multiple of 64 suits tensor cores
    lowercase: bool = True  # --no_lowercase keeps capitals
    tokenizer_bytes: int = 2_000_000_000  # of text that the tokenizer is trained on
    tokenizer: str = ""  # a Hugging Face tokenizer.json or a prepared folder's; "" = train one
    max_docs: int = 0  # read at most this many documents; 0 = all
    val_fraction: float = 0.005  # held out where the source has no validation split of its own
    task_examples: int = 0  # training examples of a word-order task from more held-out text
    shard_tokens: int = 100_000_000  # tokens per shard, about
    text_key: str = "text"  # key (JSON) or column (parquet, hub) that holds the text
    # what is a document of a .txt; paragraph: the lines between two blank lines
    text_unit: Literal["paragraph", "line", "file"] = "paragraph"
    skip_bad: bool = False  # count unusable lines and damaged files instead of stopping at one
    workers: int = 0  # processes; 0 = one per core; does not change the result


# ------------------------------------------------------------------------- documents and splits
def documents(item: tuple, cfg: Config, skipped: Counter | None = None) -> Iterator[str]:
    """Stripped, non-empty documents of one item. Bad records raise, or --skip_bad counts them."""
    skipped = Counter(bad=3) if skipped is None else skipped  # nobody counts: report nothing
    for text in item_documents(item, cfg.text_key, cfg.text_unit):
        if isinstance(text, BadInput):
            if not cfg.skip_bad:
                raise BadInput(f"{text}; fix it or pass --skip_bad")
            skipped["bad"] += 1
            if skipped["bad"] <= 3:
                print(f"skipped: {text}", file=sys.stderr, flush=True)
        elif text := valid_unicode(text.strip()):
            yield text
        else:
            skipped["empty"] += 1


def sample(items: list[tuple], cfg: Config) -> Iterator[str]:
    """The first documents of every item, a fair share of --tokenizer_bytes from each; of the hub
    eight files, since each costs a connection and C4's are shuffled. With --max_docs the documents
    that it lets through."""
    room, left = cfg.tokenizer_bytes, cfg.max_docs or sys.maxsize
    items = items[:8] if items[0][0] == "hub" else items
    for n, item in enumerate(items):
        share = room if cfg.max_docs else room / (len(items) - n)
        stream = documents(item, cfg)
        while share > 0 and left > 0 and (text := next(stream, None)) is not None:
            yield text
            size = len(text.encode())
            share, room, left = share - size, room - size, left - 1
            count_progress(size)


def document_key(text: str) -> int:
    """63-bit hash of the lowercased text, as most models see it; it decides the split."""
    digest = hashlib.blake2b(text.lower().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def choose_cuts(items: list[tuple], cfg: Config, own_validation: bool) -> tuple[int, int]:
    """Keys below the first number are validation, then up to the second the labelled task."""
    keys, size = set(), 0
    for text in sample(items, cfg):
        keys.add(document_key(text))
        size += len(text.encode())
        if len(keys) > 10_000:  # only the smallest matter, and for the task how much text there is
            keys = set(sorted(keys)[:100])
            if not cfg.task_examples:
                break
    if len(keys) < 2:
        raise BadInput(f"the corpus {cfg.source} has {len(keys)} different documents, at least 2 "
                       "are needed; see --max_docs; a .txt of one text a line needs "
                       "--text_unit line")
    few = sorted(keys)[min(8, len(keys) // 4)]  # a small corpus also gets up to eight of them
    val = 0 if own_validation else max(int(cfg.val_fraction * 2**63), few, min(keys) + 1)
    # about one passage in 400 characters becomes an example (measured on docstrings and C4)
    wanted = cfg.task_examples and 400 * (cfg.task_examples + n_dev_examples(cfg.task_examples))
    return val, val + int(min(0.3, wanted / size) * 2**63)


# ------------------------------------------------------------------------------ text into shards
PARTS = ".parts"  # inside the folder: what an unfinished preparation has done
PROGRESS = None  # shared by all processes: bytes read, time of begin() and of the last report
TOKENIZER: Tokenizer | None = None
VALIDATION_KEYS: set[int] = set()  # of documents in a validation split of the source's own


def load_shared(progress, out: str, kind: str) -> None:
    global PROGRESS, TOKENIZER, VALIDATION_KEYS
    PROGRESS, TOKENIZER = progress, Tokenizer.load(out)
    paths = (Path(out) / PARTS).glob("v*.json") if kind == "t" else []
    VALIDATION_KEYS = {key for path in paths for key in read_json(path)["keys"]}


def start_worker(*shared) -> None:
    """In a worker process: leave Ctrl-C to the parent, and die with it (also by SIGKILL)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    load_shared(*shared)


def begin(what: str) -> None:
    """Say what begins, and count from zero."""
    global PROGRESS
    PROGRESS = multiprocessing.get_context("spawn").Array("d", [0, time.time(), time.time()])
    print(what, flush=True)


def count_progress(n_bytes: int) -> None:
    """Add to what all processes have read; one of them reports it every five seconds."""
    with PROGRESS.get_lock():
        PROGRESS[0] += n_bytes
        megabytes, (started, reported), now = PROGRESS[0] / 1e6, PROGRESS[1:], time.time()
        if now - reported > 5:
            PROGRESS[2] = now
            print(f"  {megabytes:,.0f} MB, {megabytes / (now - started):.1f} MB/s", flush=True)


def encode_item(name: str, item: tuple, cfg: Config, cuts: tuple[int, int], threads: int) -> bool:
    """Encode one item into parts of about shard_tokens each; -> whether --max_docs is reached.

    A part's record is written last and says how many documents were read, so that a killed run
    continues behind the last part. Items named v… are a validation split of the source's own.
    """
    parts, kind = Path(cfg.out) / PARTS, name[0]
    finished = [read_json(p) for p in sorted(parts.glob(f"{name}_*.json"))]
    limit = sys.maxsize
    if cfg.max_docs:  # counts over the items of a kind, which encode_all() takes in turn then
        limit = max(100, int(cfg.val_fraction * cfg.max_docs)) if kind == "v" else cfg.max_docs
        limit -= sum(read_json(p)["read"] for p in parts.glob(f"{kind}*.json"))
    if finished and finished[-1]["last"]:
        return limit <= 0
    skipped: Counter = Counter()
    stream = documents(item, cfg, skipped)
    for _ in islice(stream, sum(r["read"] for r in finished)):
        pass
    for part in count(len(finished)):
        skipped.clear()
        stem = parts / f"{name}_{part:06d}"
        record = encode_part(stem, stream, skipped, cfg, cuts, limit, threads)
        write_atomically(Path(f"{stem}.json"), to_json(record | {"skipped": skipped}))
        limit -= record["read"]
        if record["last"]:
            return limit <= 0


def encode_part(stem: Path, stream: Iterator[str], skipped: Counter, cfg: Config,
                cuts: tuple[int, int], limit: int, threads: int) -> dict:
    """Encode the next shard_tokens of a stream, at most `limit` documents, into stem.train and
    stem.val; -> what the part's record says."""
    writers = {split: ShardWriter(Path(f"{stem}.{split}")) for split in ("train", "val")}
    record = {"read": 0, "tokens": 0, "last": False, "keys": [], "task": []}
    while not record["last"] and record["tokens"] < cfg.shard_tokens:
        batch, size = [], 0
        for text in islice(stream, max(0, limit - record["read"])):
            batch.append(text)
            if (size := size + len(text)) >= min(1 << 20, cfg.shard_tokens):
                break
        for text, ids in zip(batch, TOKENIZER.encode_arrays(batch, threads)):
            key = document_key(text)
            if len(ids) == 0:  # a Hugging Face normalizer may leave nothing
                skipped["empty"] += 1
            elif key in VALIDATION_KEYS:
                skipped["copies of validation documents"] += 1
            elif cuts[0] <= key < cuts[1]:
                record["task"].append(text)
            else:
                split = "val" if key < cuts[0] else "train"
                writers[split].add(ids, len(text.encode()))
                record["keys"] += [key] * (split == "val")
                record["tokens"] += len(ids)
        record |= {"read": record["read"] + len(batch), "last": not batch}
        count_progress(size)
    return record | {"shards": {split: writer.close() for split, writer in writers.items()}}


def encode_all(cfg: Config, own: list[tuple], items: list[tuple], cuts: tuple[int, int]) -> None:
    """Encode every item, in several processes where neither --max_docs nor a single item forbids
    it; what one process does it does on several threads."""
    cores = cfg.workers or os.cpu_count() or 1
    begin("encoding")
    # all of "v" is validation; "t" leaves out copies of it
    for kind, group, edges in (("v", own, (2**63, 2**63)), ("t", items, cuts)):
        jobs = [(f"{kind}{i:06d}", item, cfg, edges) for i, item in enumerate(group)]
        workers = 1 if cfg.max_docs else min(cores, len(jobs))
        if workers <= 1:
            load_shared(PROGRESS, cfg.out, kind)
            any(encode_item(*job, cores) for job in jobs)  # until one says that it is enough
            continue
        fresh = multiprocessing.get_context("spawn")  # a fork beside threads can deadlock
        with ProcessPoolExecutor(workers, fresh, start_worker, (PROGRESS, cfg.out, kind)) as pool:
            futures = [pool.submit(encode_item, *job, cores // workers) for job in jobs]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                for worker in multiprocessing.active_children():  # what they finished is kept
                    worker.kill()
                raise


def assemble(cfg: Config, settings: dict, left_out: Sequence[str]) -> dict:
    """Turn the finished parts into numbered shards, the task and, last, meta.json. A kill in
    between is fine: every step either was done or is done again."""
    out = Path(cfg.out)
    records = {p.with_suffix(""): read_json(p) for p in sorted((out / PARTS).glob("[tv]*.json"))}
    shards: list[dict] = []
    val = ShardWriter(out / "val_00000")  # one of all parts: each holds little
    for stem, record in records.items():
        if (counts := record["shards"]["train"])["documents"]:
            names = {ending: f"train_{len(shards):05d}.{ending}" for ending in ("bin", "idx")}
            for ending, name in names.items():
                with contextlib.suppress(FileNotFoundError):  # renamed before a kill
                    os.replace(f"{stem}.train.{ending}", out / name)
            shards.append({"split": "train"} | names | counts)
        ids = np.fromfile(f"{stem}.val.bin", "<u2")
        for start, end in pairwise(np.fromfile(f"{stem}.val.idx", "<i8").tolist()):
            val.add(ids[start:end], 0)
        val.bytes += record["shards"]["val"]["bytes"]
    shards.append({"split": "val", "bin": "val_00000.bin", "idx": "val_00000.idx"} | val.close())
    if len(shards) == 1 or shards[-1]["documents"] == 0:
        raise BadInput(f"{cfg.source} left no document for train or none for val; change "
                       "--val_fraction or use a larger corpus")
    tokenizer = Tokenizer.load(out)
    skipped = sum((Counter(r["skipped"]) for r in records.values()), Counter())
    if left_out:
        skipped[f"files of other kinds: {listed(left_out)}"] = len(left_out)
    files = {name: hashlib.sha256((out / name).read_bytes()).hexdigest()
             for name in (tokenizer.file_name(tokenizer.meta["kind"]), "tokenizer.meta.json")}
    meta = {"format": FORMAT, "source": cfg.source, "settings": settings,
            "skipped": dict(sorted(skipped.items())), "tokenizer_files": files, "shards": shards}
    meta |= {k: tokenizer.meta[k] for k in ("vocab_size", "lowercase", "special_ids")}
    if cfg.task_examples:
        held_out = [text for record in records.values() for text in record["task"]]
        meta["task"] = write_word_order_task(held_out, out / "task", cfg.task_examples)
    write_atomically(out / "meta.json", to_json(meta))
    return meta


# ---------------------------------------------------------------------------- the whole of it
@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against a second process. If it is empty at the end it is removed again."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file = lock(folder / ".lock")
    except BlockingIOError:
        raise BadInput(f"another prepare_c4.py is working on {folder}; wait for it") from None
    try:
        yield
    finally:
        file.close()
        (folder / ".lock").unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()


def check_folder(out: Path, settings: dict) -> dict | None:
    """What an earlier run has written into `out`: its meta.json, or its progress.json, or None.
    BadInput when that was of other settings, or the folder holds other files."""
    found = [p for p in (out / "meta.json", out / "progress.json") if p.exists()]
    if not found:
        if foreign := [p.name for p in out.iterdir() if p.name[0] != "."]:
            raise BadInput(f"{out} holds other files ({foreign[0]}); choose another --out")
        return None
    state = read_json(found[0])
    for key, value in settings.items():
        if (old := state["settings"].get(key)) != value:
            raise BadInput(f"{out} was begun with another {key} ({old}); choose another --out or "
                           "delete it")
    return state


def prepare(cfg: Config) -> dict:
    """Run or continue the whole preparation; -> meta.json's content. BadInput for bad input."""
    started = time.time()
    path = Path(cfg.source.removeprefix("hub:").split(":")[0])
    name = SUFFIXES.sub("", path.parent.name if glob.has_magic(path.name) else path.name)
    cfg = dataclasses.replace(cfg, out=cfg.out or f"data/{name or 'corpus'}")
    if not 0 < cfg.val_fraction < 1 or cfg.shard_tokens <= 0:
        raise BadInput("--val_fraction must lie between 0 and 1, --shard_tokens above 0")
    items, own, identity, left_out = find_items(cfg.source)
    given = Tokenizer.load(cfg.tokenizer) if cfg.tokenizer else None
    # what the written bytes depend on; where the corpus and the tokenizer lie is no part of it
    settings = dataclasses.asdict(cfg) | {
        "corpus": hashlib.sha256(identity.encode()).hexdigest(),
        "tokenizer": hashlib.sha256(given.vocabulary).hexdigest() if given else ""}
    for key in ("source", "out", "skip_bad", "workers"):
        del settings[key]
    out = Path(cfg.out)
    with locked(out):
        state = check_folder(out, settings)
        if state is None or not (out / "tokenizer.meta.json").exists():
            begin("choosing held-out documents")
            cuts = choose_cuts(items, cfg, bool(own)) if not own or cfg.task_examples else (0, 0)
            if given is None:
                begin("training the tokenizer")
                texts = (text for text in sample(items, cfg) if document_key(text) >= cuts[1])
                given = Tokenizer.train(texts, cfg.vocab_size, cfg.lowercase)
            # only now is anything written: a bad corpus leaves nothing behind
            state = {"settings": settings, "cuts": cuts}
            write_atomically(out / "progress.json", to_json(state))
            given.save(out)
        if "shards" in state:
            print(f"{out} is already complete with these settings")
        else:
            (out / PARTS).mkdir(exist_ok=True)
            for leftover in out.rglob("*.tmp"):
                leftover.unlink()
            encode_all(cfg, own, items, state["cuts"])
            state = assemble(cfg, settings, left_out)
        shutil.rmtree(out / PARTS, ignore_errors=True)
        (out / "progress.json").unlink(missing_ok=True)
    summarize(out, state, time.time() - started)
    return state


def summarize(out: Path, meta: dict, seconds: float) -> None:
    n_documents, n_tokens, size = (
        sum(s[key] for s in meta["shards"]) for key in ("documents", "tokens", "bytes"))
    print(f"{n_documents:,} documents ({len(Corpus(out, 'val')):,} of them held out), "
          f"{n_tokens:,} tokens, {size / 1e6:,.1f} MB, {seconds:.0f} s")
    if n_documents < 10_000:
        longest = max(Corpus(out, split).lengths.max() for split in ("train", "val"))
        if longest > n_tokens / 2:
            print(f"one document is {longest / n_tokens:.0%} of the corpus; each "
                  f"{meta['settings']['text_unit']} of a .txt was taken as one, see --text_unit")
    for why, n in meta["skipped"].items():
        print(f"skipped: {n:,} {why}")
    for name, n in meta.get("task", {}).items():
        print(f"labelled task: {n:,} examples in {out}/task/{name}.tsv")
    print(f"folder: {out}\nnext:   python pretrain.py mosaic-tiny --data {out}")


main = script(prepare, Config, positional=True, resumes=True)

if __name__ == "__main__":
    main()
