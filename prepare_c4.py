"""Turn a corpus into token shards and a tokenizer of its own, and read them back.

    python prepare_c4.py docstrings --vocab_size 8192            # offline: docstrings of the installed packages
    python prepare_c4.py corpus.jsonl.gz --out data/mine         # a file, a folder or a "glob*" of .jsonl(.gz|.zst),
                                                                 #   .parquet, .txt(.gz|.zst)
    python prepare_c4.py c4 --max_docs 10000                     # streams allenai/c4 "en" from the Hugging Face hub
    python prepare_c4.py hub:HuggingFaceFW/fineweb:sample-10BT   # any hub dataset, hub:owner/name[:config]
    python prepare_c4.py c4 --out data/c4-0 --part 0/4           # one of four machines; train on all four with
                                                                 #   pretrain.py --data data/c4-0 --data data/c4-1 ...
    python prepare_c4.py inspect data/c4 --verify                # statistics, samples, histogram, checksums

The docstrings take about 15 seconds on two cores and give some 11 MB. Encoding runs at 20 to 30 MB/s per core; before
it the tokenizer is trained at about 5 MB/s on at most --train_tokenizer_on of text. The folder receives
train_*.bin/.idx and val_*.bin/.idx (flat uint16 ids without specials; int64 offsets of the documents),
tokenizer.tiktoken, tokenizer.meta.json and, last, meta.json: a folder without it is unfinished. Killed at any moment,
the same command continues and ends with the same bytes. Documents are stripped of outer white space; empty ones are
counted and left out. A .txt holds one document per block of lines between blank lines. Held-out documents are chosen by
a hash of their text, so copies of a document never end up on both sides.
"""

import contextlib
import dataclasses
import errno
import glob
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import count, islice, pairwise
from pathlib import Path

import numpy as np

from corpus.docstrings import n_dev_examples, write_word_order_task
from corpus.inspect import CACHED, print_fertility
from corpus.shards import FORMAT, Corpus, ShardWriter
from corpus.sources import SUFFIXES, find_items, item_documents
from corpus.tokenizer import N_FIXED, Tokenizer, valid_unicode
from records import BadInput, read_json, to_json, write_atomically

try:
    import fcntl
except ImportError:  # Windows: no lock on the folder
    fcntl = None


def documents(item: tuple, cfg: "Config", skipped: Counter | None = None) -> Iterator[str]:
    """Stripped, valid, non-empty documents of one item, always in the same order. Bad records raise, or are counted
    with --skip_bad."""
    skipped = Counter(bad=3) if skipped is None else skipped  # nobody counts: report nothing
    for text in item_documents(item, cfg.text_key):
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


def sample(items: list[tuple], cfg: "Config", room: float) -> Iterator[str]:
    """The first documents of every item, a fair share of `room` bytes from each; of the hub eight files, since each
    costs a connection and C4's are shuffled. With a limit on the documents, those the limit lets through."""
    left = cfg.max_docs or sys.maxsize
    limited = bool(cfg.max_docs or cfg.max_tokens)
    items = items[:8] if items[0][0] == "hub" else items
    for n, item in enumerate(items):
        share = room if limited else room / (len(items) - n)
        stream = documents(item, cfg)
        while share > 0 and left > 0 and (text := next(stream, None)) is not None:
            yield text
            size = len(text.encode())
            share, room, left = share - size, room - size, left - 1
            count_progress(1, size)


def document_key(text: str) -> int:
    """63-bit hash that decides a document's split. Of the lowercased text: most models see no other."""
    return int.from_bytes(hashlib.blake2b(text.lower().encode(), digest_size=8).digest(), "little") >> 1


def choose_cuts(items: list[tuple], cfg: "Config", own_validation: bool) -> tuple[int, int]:
    """Keys below the first number are validation, those up to the second the labelled task, the rest train."""
    keys, size = set(), 0
    # twice as many bytes as tokens are read for sure, so some held-out documents come before --max_tokens ends it
    for text in sample(items, cfg, min(parse_size(cfg.train_tokenizer_on), 2 * cfg.max_tokens or sys.maxsize)):
        keys.add(document_key(text))
        size += len(text.encode())
        if len(keys) > 10_000:  # only the smallest matter, and for the task how much text there is
            keys = set(sorted(keys)[:100])
            if not cfg.task_examples:
                break
    if len(keys) < 2:
        within = " within --max_docs and --max_tokens" if cfg.max_docs or cfg.max_tokens else ""
        raise BadInput(f"the corpus {cfg.source} has {len(keys)} different documents{within}; at least 2 are needed")
    few = sorted(keys)[min(8, len(keys) // 4)]  # a small corpus also gets up to eight held-out documents
    val = 0 if own_validation else max(int(cfg.val_fraction * 2**63), few, min(keys) + 1)
    # about one passage in 400 characters becomes an example (measured on docstrings and C4)
    share = min(0.3, (cfg.task_examples + n_dev_examples(cfg.task_examples)) * 400 / size) if cfg.task_examples else 0
    return val, val + int(share * 2**63)


# ---------------------------------------------------------------------------------------------------------- writer
PARTS = ".parts"  # inside the folder: what an unfinished preparation has done


def encode_item(name: str, item: tuple, cfg: "Config", cuts: tuple[int, int], threads: int) -> bool:
    """Encode one item into parts of about shard_tokens each; -> whether a limit is reached.

    A part's record is written last and says how many documents were read, so that a killed run continues behind the
    last part. Items named v… are a validation split of the source's own; of the others the hash decides.
    """
    parts, validation = Path(cfg.out) / PARTS, name[0] == "v"
    # limits count over all items of a kind, which encode_all() takes one after the other when one is set
    limited = cfg.max_docs or cfg.max_tokens
    before = [read_json(p) for p in parts.glob(f"{name[0]}*.json")] if limited else []
    n_docs, n_tokens = sum(r["read"] for r in before), sum(r["tokens"] for r in before)
    max_docs, max_tokens = cfg.max_docs or sys.maxsize, cfg.max_tokens or sys.maxsize
    if validation:  # a small sample of the corpus gets a small validation split
        max_docs = max(100, int(cfg.val_fraction * max_docs))
        max_tokens = max(10_000, int(cfg.val_fraction * max_tokens))
    done = [read_json(p) for p in sorted(parts.glob(f"{name}_*.json"))]
    last = bool(done and done[-1]["last"])
    skipped: Counter = Counter()
    stream = documents(item, cfg, skipped)
    for _ in islice(stream, 0 if last else sum(r["read"] for r in done)):
        pass
    for part in count(len(done)):
        if last:
            return n_docs >= max_docs or n_tokens >= max_tokens
        skipped.clear()
        stem = parts / f"{name}_{part:06d}"
        writers = {split: ShardWriter(Path(f"{stem}.{split}")) for split in ("train", "val")}
        read, tokens, keys, held_out = 0, 0, [], []
        while not last and tokens < cfg.shard_tokens:
            batch, size = [], 0
            for text in islice(stream, max(0, max_docs - n_docs - read) if n_tokens + tokens < max_tokens else 0):
                batch.append(text)
                if (size := size + len(text)) >= min(1 << 20, cfg.shard_tokens):
                    break
            last = not batch
            for text, ids in zip(batch, TOKENIZER.encode_arrays(batch, threads)):
                if n_tokens + tokens >= max_tokens:
                    break
                read += 1
                key = document_key(text)
                if len(ids) == 0:  # a Hugging Face normalizer may leave nothing
                    skipped["empty"] += 1
                elif not validation and key in VALIDATION_KEYS:
                    skipped["copies of validation documents"] += 1
                elif not validation and cuts[0] <= key < cuts[1]:
                    held_out.append(text)
                else:
                    writers["val" if validation or key < cuts[0] else "train"].add(ids, len(text.encode()))
                    keys += [key] if validation else []
                    tokens += len(ids)
            count_progress(len(batch), size)
        shards = {split: writer.close() for split, writer in writers.items()}
        n_docs, n_tokens = n_docs + read, n_tokens + tokens
        record = {"read": read, "tokens": tokens, "last": last, "skipped": dict(skipped), "shards": shards}
        write_atomically(Path(f"{stem}.json"), to_json(record | {"keys": keys, "task": held_out}))


def assemble(cfg: "Config", settings: dict) -> dict:
    """Turn the finished parts into the numbered shards, the task and, last, meta.json. A kill in between is fine:
    every step either was done or is done again."""
    out, parts = Path(cfg.out), Path(cfg.out) / PARTS
    records = [(p.with_suffix(""), read_json(p)) for p in sorted(parts.glob("[tv]*.json"))]
    shards: list[dict] = []
    skipped: Counter = Counter()
    n_val, val = 0, None
    for stem, record in records:
        skipped.update(record["skipped"])
        if (info := record["shards"]["train"])["documents"]:
            name = f"train_{len(shards):05d}"
            for ending in (".bin", ".idx"):
                if os.path.exists(f"{stem}.train{ending}"):
                    os.replace(f"{stem}.train{ending}", out / (name + ending))
            shards.append({"split": "train", "bin": name + ".bin", "idx": name + ".idx"} | info)
    for stem, record in records:
        if (info := record["shards"]["val"])["documents"]:
            val = val or ShardWriter(out / f"val_{n_val:05d}")
            bounds, ids = np.fromfile(f"{stem}.val.idx", "<i8").tolist(), np.fromfile(f"{stem}.val.bin", "<u2")
            for start, end in pairwise(bounds):
                val.add(ids[start:end], 0)
            val.bytes += info["bytes"]
        if val and (val.offsets[-1] >= cfg.shard_tokens or stem == records[-1][0]):
            name = f"val_{n_val:05d}"
            shards.append({"split": "val", "bin": name + ".bin", "idx": name + ".idx"} | val.close())
            n_val, val = n_val + 1, None
    for split in ("train", "val"):
        if split not in {s["split"] for s in shards}:
            raise BadInput(f"{cfg.source} left no document for {split}; change --val_fraction or use a larger corpus")
    tokenizer = Tokenizer.load(out)
    names = ["tokenizer.json" if tokenizer.hf else "tokenizer.tiktoken", "tokenizer.meta.json"]
    meta = {
        "format": FORMAT,
        "source": cfg.source,
        "vocab_size": tokenizer.vocab_size,
        "lowercase": tokenizer.lowercase,
        "special_ids": tokenizer.meta["special_ids"],
        "settings": settings,
        "skipped": dict(sorted(skipped.items())),
        "tokenizer_files": {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names},
        "shards": shards,
    }
    if cfg.task_examples:
        held_out = [text for _, record in records for text in record["task"]]
        meta["task"] = write_word_order_task(held_out, out / "task", cfg.task_examples, cfg.seed)
    write_atomically(out / "meta.json", to_json(meta))
    return meta


# ---------------------------------------------------------------------------------------------------- command line
@dataclasses.dataclass
class Config:
    # docstrings | c4 | hub:owner/name[:config] | file, folder or glob of .jsonl(.gz|.zst) .parquet .txt
    source: str
    out: str = ""  # folder to write; "" = data/<name of the source>
    vocab_size: int = 30528  # entries of the tokenizer with its 5 specials; a multiple of 64 suits tensor cores
    lowercase: bool = True  # --no_lowercase keeps capitals
    train_tokenizer_on: str = "2GB"  # bytes of text the tokenizer is trained on (500MB, 2GB, ...)
    tokenizer: str = ""  # reuse a tokenizer: a Hugging Face tokenizer.json or a prepared folder; "" = train one
    max_docs: int = 0  # read at most this many documents; 0 = all
    max_tokens: int = 0  # stop when this many tokens are written; 0 = all
    val_fraction: float = 0.005  # held-out share where the source has no validation split; at least a few documents
    task_examples: int = 0  # training examples of a word-order task from further held-out text; 0 = no task
    shard_tokens: int = 100_000_000  # tokens per shard, about
    text_key: str = "text"  # key (JSON) or column (parquet, hub) that holds the text
    skip_bad: bool = False  # count and report unusable lines and damaged files instead of stopping at the first
    verify: bool = False  # read everything back at the end and check every sha256
    part: str = "0/1"  # i/n: every n-th work item from the i-th, for n machines; all train the same tokenizer
    workers: int = 0  # processes; 0 = one per core; does not change the result
    seed: int = 0  # of the labelled task


def parse_size(text: str) -> int:
    """2GB -> 2_000_000_000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]?)b?", text.strip().lower())
    if not match or float(match[1]) <= 0:
        raise BadInput(f"--train_tokenizer_on {text!r} is not a size like 500MB or 2GB")
    return int(float(match[1]) * 1000 ** "_kmgt".index(match[2] or "_"))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against a second process. A folder that is empty at the end is removed again."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as f:
        try:
            if fcntl:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"another prepare_c4.py is working on {folder}; wait for it") from None
        try:
            yield
        except OSError as e:  # a full disk does not tell its name
            e.filename = e.filename or str(folder)
            raise
        finally:
            (folder / ".lock").unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()


# what every process that encodes holds
PROGRESS = None  # shared by all of them while progress_shown(): documents, bytes, 1 = one failed, stop
TOKENIZER: Tokenizer | None = None
VALIDATION_KEYS: set[int] = set()  # of the documents in a validation split of the source's own


def load_shared(progress, out: str) -> None:
    global PROGRESS, TOKENIZER, VALIDATION_KEYS
    PROGRESS, TOKENIZER = progress, Tokenizer.load(out)
    VALIDATION_KEYS = {key for p in (Path(out) / PARTS).glob("v*.json") for key in read_json(p)["keys"]}


def count_progress(n_docs: int, n_bytes: int) -> None:
    if PROGRESS is not None:
        with PROGRESS.get_lock():
            PROGRESS[0] += n_docs
            PROGRESS[1] += n_bytes
        if PROGRESS[2]:
            raise BadInput("another worker failed")


@contextlib.contextmanager
def progress_shown(what: str) -> Iterator[None]:
    """Report documents and MB/s of all workers: one line kept current on a terminal, else a line every five seconds."""
    global PROGRESS
    PROGRESS = multiprocessing.get_context("spawn").Array("q", 3)
    done, started, tty = threading.Event(), time.time(), sys.stdout.isatty()

    def show() -> None:
        finished = False
        while not finished:
            finished = done.wait(0.2 if tty else 5)
            n, size, seconds = PROGRESS[0], PROGRESS[1] / 1e6, max(0.01, time.time() - started)
            line = f"{what}: {n:,} documents, {size:,.1f} MB, {size / seconds:.1f} MB/s, {seconds:.0f} s"
            print(line, end="\r" if tty and not finished else "\n", flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def start_worker(*shared) -> None:
    """In a worker process: leave Ctrl-C to the parent, and die with it (also by SIGKILL)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    load_shared(*shared)


def prepare(cfg: Config) -> dict:
    """Run or continue the whole preparation; -> meta.json's content. BadInput (one line) for a fault of the input."""
    started = time.time()
    path = Path(cfg.source.removeprefix("hub:").split(":")[0])  # --out: from corpus/*.jsonl the folder's name
    name = SUFFIXES.sub("", path.parent.name if glob.has_magic(path.name) else path.name)
    cfg = dataclasses.replace(cfg, out=cfg.out or f"data/{name or 'corpus'}")
    if not re.fullmatch(r"\d+/\d+", cfg.part) or not (part := [int(n) for n in cfg.part.split("/")])[0] < part[1]:
        raise BadInput(f"--part {cfg.part!r} must be i/n with 0 <= i < n")
    if not 0 < cfg.val_fraction < 1:
        raise BadInput(f"--val_fraction {cfg.val_fraction} must lie between 0 and 1")
    if cfg.shard_tokens <= 0 or min(cfg.max_docs, cfg.max_tokens, cfg.task_examples, cfg.workers) < 0:
        raise BadInput("--shard_tokens must be positive; --max_docs, --max_tokens, ... must not be negative")
    if not N_FIXED <= cfg.vocab_size <= 65536:
        raise BadInput(f"--vocab_size {cfg.vocab_size} must be {N_FIXED}..65536 (5 specials, 256 bytes; uint16 ids)")
    parse_size(cfg.train_tokenizer_on)
    out, parts = Path(cfg.out), Path(cfg.out) / PARTS
    items, own, fingerprint = find_items(cfg.source)
    if part[0] >= len(items):
        raise BadInput(f"--part {cfg.part}: {cfg.source} divides into {len(items)} at most; small files count as one")
    settings = dataclasses.asdict(cfg) | {"fingerprint": hashlib.sha256(fingerprint.encode()).hexdigest()}
    for key in ("out", "skip_bad", "verify", "workers"):
        del settings[key]  # these do not change what is written
    with locked(out):
        state = next((read_json(p) for p in (out / "meta.json", out / "progress.json") if p.exists()), None)
        if state is None and (foreign := [p.name for p in out.iterdir() if p.name[0] != "."]):
            raise BadInput(f"{out} holds other files ({foreign[0]}); choose another --out")
        if state is not None and (old := state.get("settings", {})) != settings:
            key = next((k for k in settings if old.get(k) != settings[k]), "format")
            change = "the corpus changed" if key == "fingerprint" else f"{key} was {old.get(key)!r}"
            raise BadInput(f"{out} was begun with other settings ({change}); choose another --out or delete it")
        made = (out / "tokenizer.meta.json").exists()
        if made and cfg.tokenizer and Tokenizer.load(cfg.tokenizer).vocabulary != Tokenizer.load(out).vocabulary:
            raise BadInput(f"{out} was made with another tokenizer than {cfg.tokenizer} has now; choose another --out")
        if state is None or not made:
            cuts = (0, 0)
            if not own or cfg.task_examples:
                with progress_shown("choosing held-out documents"):
                    cuts = choose_cuts(items, cfg, bool(own))
            if cfg.tokenizer:
                tokenizer = Tokenizer.load(cfg.tokenizer)
            else:
                with progress_shown("training the tokenizer"):
                    texts = sample(items, cfg, parse_size(cfg.train_tokenizer_on))
                    texts = (text for text in texts if document_key(text) >= cuts[1])
                    tokenizer = Tokenizer.train(texts, cfg.vocab_size, cfg.lowercase)
            # only now is anything written: a bad corpus leaves nothing behind
            write_atomically(out / "progress.json", to_json({"settings": settings, "cuts": cuts}))
            tokenizer.save(out)
        elif "shards" not in state:
            cuts = state["cuts"]
            print(f"continuing in {out}")
        if state is None or "shards" not in state:
            parts.mkdir(exist_ok=True)
            for leftover in out.rglob("*.tmp"):
                leftover.unlink()
            encode_all(cfg, own, items, cuts)
            meta = assemble(cfg, settings)
        else:
            print(f"{out} is already complete with these settings")
            meta = state
        shutil.rmtree(parts, ignore_errors=True)
        (out / "progress.json").unlink(missing_ok=True)
    summarize(cfg, meta, time.time() - started)
    return meta


def encode_all(cfg: Config, own: list[tuple], items: list[tuple], cuts: tuple[int, int]) -> None:
    """Encode every item of this machine's part, in several processes where neither a limit nor a single item
    forbids it; what one process does it does on several threads."""
    cores = cfg.workers or os.cpu_count() or 1
    first, step = map(int, cfg.part.split("/"))
    train = [(f"t{i:06d}", item) for i, item in enumerate(items)][first::step]
    with progress_shown("encoding"):
        # validation first: train leaves out its copies
        for jobs in ([(f"v{i:06d}", item) for i, item in enumerate(own)], train):
            workers = 1 if cfg.max_docs or cfg.max_tokens else min(cores, len(jobs))
            if workers <= 1:
                load_shared(PROGRESS, cfg.out)
                for name, item in jobs:
                    if encode_item(name, item, cfg, cuts, cores):
                        break
                continue
            fresh = multiprocessing.get_context("spawn")  # forking a process that runs threads can deadlock
            with ProcessPoolExecutor(workers, fresh, start_worker, (PROGRESS, cfg.out)) as pool:
                futures = [pool.submit(encode_item, *job, cfg, cuts, cores // workers) for job in jobs]
                try:
                    for future in as_completed(futures):
                        future.result()
                except BaseException:
                    PROGRESS[2] = 1
                    pool.shutdown(cancel_futures=True)
                    raise


def summarize(cfg: Config, meta: dict, seconds: float) -> None:
    for split in ("train", "val"):
        Corpus(cfg.out, split, verify=cfg.verify)
    documents, tokens, size = (sum(s[key] for s in meta["shards"]) for key in ("documents", "tokens", "bytes"))
    print(f"{documents:,} documents, {tokens:,} tokens, {size / 1e6:,.1f} MB, {seconds:.0f} s")
    print_fertility(cfg.out, tuple(CACHED))
    for why, n in meta["skipped"].items():
        print(f"skipped: {n:,} {why}")
    for name, n in meta.get("task", {}).items():
        wanted = cfg.task_examples if name == "train" else n_dev_examples(cfg.task_examples)
        fewer = "" if n >= wanted - 1 else f" (of {wanted:,} asked for: the held-out text gives no more)"
        print(f"labelled task: {n:,} examples in {cfg.out}/task/{name}.tsv{fewer}")
    others = "" if cfg.part == "0/1" else " --data ... (the folders of the other parts)"
    print(f"folder: {cfg.out}\nnext:   python pretrain.py mosaic-tiny --data {cfg.out}{others}")


def main() -> None:
    from machine import read_command_line  # not needed by the workers, which import this file

    try:
        prepare(read_command_line(Config, about=__doc__, positional=True))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command continues") from None
    except BadInput as e:
        raise SystemExit(f"error: {e}") from None
    except BrokenProcessPool:
        raise SystemExit("error: a worker process died (out of memory?); the same command continues") from None
    except OSError as e:
        what = "the disk is full" if e.errno == errno.ENOSPC else e.strerror or str(e)
        raise SystemExit(f"error: {what} ({e.filename}); once that is fixed the same command continues") from None


if __name__ == "__main__":
    main()
