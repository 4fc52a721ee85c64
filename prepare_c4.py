"""Turn a corpus into token shards and a tokenizer of its own, and read them back.

    python prepare_c4.py docstrings --vocab_size 8192            # offline: docstrings of the installed packages
    python prepare_c4.py corpus.jsonl.gz --out data/mine         # a file, a folder or a "glob*" of .jsonl(.gz|.zst),
                                                                 #   .parquet, .txt(.gz|.zst)
    python prepare_c4.py c4 --max_docs 10000                     # streams allenai/c4 "en" from the Hugging Face hub
    python prepare_c4.py hub:HuggingFaceFW/fineweb:sample-10BT   # any hub dataset, hub:owner/name[:config]
    python prepare_c4.py c4 --out data/c4-0 --part 0/4           # one of four machines
    python prepare_c4.py inspect data/c4 --verify                # statistics, samples, histogram, checksums

The docstrings take about 15 seconds on two cores and give some 11 MB. Encoding runs at about 20 MB/s per core; before
it the tokenizer is trained at about 5 MB/s on at most --train_tokenizer_on of text. The folder receives
train_*.bin/.idx and val_*.bin/.idx (flat uint16 ids without specials; int64 offsets of the documents),
tokenizer.tiktoken, tokenizer.meta.json and, last, meta.json: a folder without it is unfinished. Killed at any moment,
the same command continues and ends with the same bytes. Documents are stripped of outer white space; empty ones are
counted and left out. A .txt holds one document per block of lines between blank lines. Held-out documents are chosen
by a hash of their text, so copies of a document never end up on both sides.
"""

import base64
import contextlib
import dataclasses
import errno
import functools
import glob
import gzip
import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import urllib.request
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import count, islice, pairwise
from pathlib import Path

import numpy as np
import tiktoken

try:
    import fcntl  # the lock on a folder
    import resource
except ImportError:  # Windows: no lock, and no limit on open files that matters
    fcntl = resource = None

FORMAT = 1  # version of the data folder and of tokenizer.meta.json
SPECIALS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
N_FIXED = len(SPECIALS) + 256  # ids every vocabulary of ours has
# One pattern for the trainer (Oniguruma) and for tiktoken (Rust): contractions, words with their leading space, numbers
# in groups of three digits, punctuation, white space of which the last space goes to the word behind it. White space
# is bounded: with \s+(?!\S) a run of a million spaces overflows tiktoken's stack.
PATTERN = (
    r"['’](?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])| ?[\p{L}\p{M}]+| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+|\s{1,32}(?!\S)|\s{1,32}"
)


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


def read_json(path: Path) -> dict:
    """A small JSON object of ours. BadInput when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        problem = "it holds no JSON object"
    except (OSError, ValueError) as e:
        problem = str(e)
    raise BadInput(f"{path} cannot be read ({problem}); prepare the folder again") from None


def valid_unicode(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ------------------------------------------------------------------------------------------------------- tokenizer
class Tokenizer:
    """Byte-level BPE run by tiktoken, or a Hugging Face tokenizer.json run by `tokenizers`.

    Our own vocabulary: ids 0-4 are [PAD] [UNK] [CLS] [SEP] [MASK], 5-260 the bytes 0-255, then the merges in the order
    they were learned. decode(encode(s)) == s.lower() (== s with lowercase=False) for every Unicode string; a lone
    surrogate becomes U+FFFD. A Hugging Face vocabulary keeps its own ids and its own losses.

    Attributes: vocab_size, lowercase, pad_id, unk_id, cls_id, sep_id, mask_id.
    """

    def __init__(self, vocabulary: bytes, meta: dict):
        """`vocabulary`: content of tokenizer.tiktoken or tokenizer.json; `meta`: as made by train() or from_hf()."""
        self.vocabulary, self.meta = vocabulary, meta
        self.vocab_size, self.lowercase = meta["vocab_size"], meta["lowercase"]
        self.names = {i: name for name, i in meta["special_ids"].items()}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (meta["special_ids"][n] for n in SPECIALS)
        self.hf = self.bpe = None
        if meta["kind"] == "huggingface":
            import tokenizers

            self.hf = tokenizers.Tokenizer.from_str(vocabulary.decode("utf-8"))
            self.hf.no_truncation()
            self.hf.no_padding()
            self.hf.encode_special_tokens = True  # "[MASK]" written in a corpus is ordinary text
        else:
            ranks = {base64.b64decode(t): int(r) for t, r in (x.split() for x in vocabulary.splitlines())}
            self.bpe = tiktoken.Encoding(
                "mosaic", pat_str=meta["pattern"], mergeable_ranks=ranks, special_tokens=meta["special_ids"]
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> "Tokenizer":
        """Learn a byte-level BPE of exactly `vocab_size` entries; the same texts give the same bytes.

        BadInput when vocab_size is not in 261..65536 or more than the texts can reach.
        """
        if not N_FIXED <= vocab_size <= 65536:
            raise BadInput(f"--vocab_size {vocab_size} must be {N_FIXED}..65536 (5 specials, 256 bytes; uint16 ids)")
        import tokenizers
        from tokenizers import pre_tokenizers

        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
        learner = tokenizers.Tokenizer(tokenizers.models.BPE())
        learner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIALS),
            min_frequency=2,
            initial_alphabet=sorted(byte_level.alphabet()),
            show_progress=False,
        )
        learner.train_from_iterator((valid_unicode(t.lower() if lowercase else t) for t in texts), trainer)
        # The trainer writes each byte as one printable character: itself where it is printable, else 256, 257, …
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = sorted(set(range(256)) - set(printable))
        byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}
        learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
        tokens = [bytes([b]) for b in range(256)]
        tokens += [bytes(byte_of[c] for c in token) for token, _ in learned if len(token) > 1]
        if (reached := len(tokens) + len(SPECIALS)) != vocab_size:
            raise BadInput(
                f"the corpus is too small for --vocab_size {vocab_size}: it reaches {reached} tokens; "
                "choose at most that, or a larger corpus"
            )
        lines = (b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens, len(SPECIALS)))
        meta = {"kind": "tiktoken", "vocab_size": vocab_size, "lowercase": lowercase}
        return cls(b"".join(lines), meta | {"special_ids": dict(SPECIALS), "pattern": PATTERN})

    @classmethod
    def from_hf(cls, path: Path) -> "Tokenizer":
        """A Hugging Face tokenizer.json (WordPiece, BPE, Unigram) as it is. BadInput when it is none, or when it lacks
        a mask, padding, unknown, start or end token."""
        try:
            text = path.read_text(encoding="utf-8")
            import tokenizers

            vocab = tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
        except Exception as e:  # `tokenizers` raises bare Exception
            raise BadInput(f"{path} is not a Hugging Face tokenizer.json ({e})") from None
        ids = {ours: vocab.get(ours, vocab.get(roberta)) for ours, roberta in zip(
            SPECIALS, ("<pad>", "<unk>", "<s>", "</s>", "<mask>"))}  # fmt: skip
        if missing := [name for name, i in ids.items() if i is None]:
            raise BadInput(f"{path} has no token {', '.join(missing)} (nor RoBERTa's name for it); an encoder needs it")
        if (size := max(vocab.values()) + 1) > 65536:
            raise BadInput(f"{path} has {size} tokens; token ids on disk are uint16, at most 65536")
        # it does its own lowercasing; here that is only reported
        normalizer = json.dumps(json.loads(text).get("normalizer"))
        lowercase = '"lowercase": true' in normalizer or '"Lowercase"' in normalizer
        meta = {"kind": "huggingface", "vocab_size": size, "lowercase": lowercase, "special_ids": ids}
        return cls(text.encode(), meta)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load from a folder written by save() (a data folder, a checkpoint) or from a tokenizer.json.

        BadInput when the files are missing or damaged.
        """
        path = Path(path)
        if path.is_dir() and (path / "tokenizer.meta.json").exists():
            meta = read_json(path / "tokenizer.meta.json")
            file = path / ("tokenizer.json" if meta.get("kind") == "huggingface" else "tokenizer.tiktoken")
            try:
                vocabulary = file.read_bytes()
                if hashlib.sha256(vocabulary).hexdigest() != meta.pop("sha256") or meta.pop("format") != FORMAT:
                    raise ValueError("it is not the one tokenizer.meta.json describes")
                return cls(vocabulary, meta)
            except (OSError, KeyError, ValueError) as e:
                raise BadInput(f"{file} cannot be used ({e}); prepare the folder again") from None
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise BadInput(f"no tokenizer at {path}: give a tokenizer.json or a folder made by prepare_c4.py")
        return cls.from_hf(file)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.tiktoken (or tokenizer.json) and tokenizer.meta.json, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ("tokenizer.json" if self.hf else "tokenizer.tiktoken"), self.vocabulary)
        meta = {"format": FORMAT, "sha256": hashlib.sha256(self.vocabulary).hexdigest()} | self.meta
        write_atomically(folder / "tokenizer.meta.json", to_json(meta))

    def encode(self, text: str) -> list[int]:
        """Token ids without specials. "[MASK]" written in `text` is ordinary text."""
        return self.encode_arrays([text])[0].tolist()

    def encode_with_masks(self, text: str) -> list[int]:
        """As encode(), but each "[MASK]" (any case) becomes mask_id. White space before it is dropped: the token it
        stands for carries its own leading space."""
        first, *others = (self.encode(part) for part in re.split(r"\s*\[mask\]", text, flags=re.IGNORECASE))
        return first + [i for part in others for i in (self.mask_id, *part)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """encode() of each text, on all cores."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: list[str], threads: int = 0) -> list[np.ndarray]:
        """encode() of each text as (n,) uint16 arrays, on `threads` threads (0: one per core)."""
        if self.hf:
            encodings = self.hf.encode_batch_fast([valid_unicode(t) for t in texts], add_special_tokens=False)
            return [np.asarray(e.ids, np.uint16) for e in encodings]

        def one(text: str) -> np.ndarray:  # encode_to_numpy is a fifth faster than a list of Python ints
            text = valid_unicode(text.lower() if self.lowercase else text)
            return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

        threads = min(threads or os.cpu_count() or 1, len(texts))
        if threads <= 1:
            return [one(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:  # tiktoken releases the GIL
            return list(pool.map(one, texts))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are skipped, bytes that are no UTF-8 become U+FFFD."""
        kept = [i for i in map(int, ids) if i not in self.names]
        if bad := [i for i in kept if not 0 <= i < self.vocab_size]:
            raise ValueError(f"token id {bad[0]} is outside the vocabulary of {self.vocab_size}")
        return self.hf.decode(kept) if self.hf else self.bpe.decode(kept)

    def token_text(self, token_id: int) -> str:
        """One id for display: " the", "##ing", "[MASK]"."""
        if token_id in self.names:
            return self.names[token_id]
        return (self.hf.id_to_token(token_id) or "") if self.hf else self.decode([token_id])


# ---------------------------------------------------------------------------------------------------------- reader
class Corpus:
    """Memory-mapped documents of one split of a prepared folder: len(c), c[i], c.lengths.

    Opening checks each file's size against meta.json and the tokenizer's checksum; verify=True also reads all shards
    and checks theirs. BadInput (one line naming the file) for what does not match.

    Attributes: folder, tokenizer_dir (Path), split, meta (dict), n_tokens (int).
    """

    def __init__(self, folder: str | Path, split: str = "train", verify: bool = False):
        self.folder = self.tokenizer_dir = Path(folder)
        self.split = split
        if not (self.folder / "meta.json").exists():
            state = "unfinished; run the same prepare_c4.py command again" if self.folder.is_dir() else "missing"
            raise BadInput(f"{self.folder} holds no meta.json: the preparation is {state}")
        self.meta = read_json(self.folder / "meta.json")
        if self.meta.get("format") != FORMAT:
            raise BadInput(f"{self.folder}/meta.json is of format {self.meta.get('format')}, not {FORMAT}")
        try:
            shards = [s for s in self.meta["shards"] if s["split"] == split]
            checks = [(name, None, digest) for name, digest in self.meta["tokenizer_files"].items()]
            for s in shards:
                checks.append((s["bin"], 2 * s["tokens"], s["bin_sha256"] if verify else None))
                checks.append((s["idx"], 8 * s["documents"] + 8, s["idx_sha256"] if verify else None))
            for name, size, digest in checks:
                self._check(self.folder / name, size, digest)
        except (KeyError, TypeError, AttributeError) as e:
            raise BadInput(f"{self.folder}/meta.json is damaged ({e!r}); prepare the folder again") from None
        if not shards:
            raise BadInput(f"{self.folder}/meta.json lists no shard of split {split!r}")
        if resource:  # a memory map keeps its file open: all of C4 has 3,500, twice what a process may open by default
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft != resource.RLIM_INFINITY and soft < 2 * len(shards) + 512:
                wanted = 2 * len(shards) + 512 if hard == resource.RLIM_INFINITY else min(hard, 2 * len(shards) + 512)
                resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        # np.asarray: slicing a plain array over the map is several times faster than slicing a memmap
        self.bins = [np.asarray(np.memmap(self.folder / s["bin"], "<u2", "r")) for s in shards]
        self.idxs = [np.asarray(np.memmap(self.folder / s["idx"], "<i8", "r")) for s in shards]
        for s, idx in zip(shards, self.idxs):
            if idx[0] != 0 or idx[-1] != s["tokens"]:
                raise BadInput(f"{self.folder / s['idx']} does not end at the {s['tokens']} tokens of meta.json")
        self.first = np.cumsum([0] + [s["documents"] for s in shards]).tolist()  # index of each shard's first document
        self.n_tokens = sum(s["tokens"] for s in shards)

    def _check(self, path: Path, size: int | None, digest: str | None) -> None:
        if not path.is_file():
            raise BadInput(f"{path} is listed in meta.json but missing; prepare the folder again")
        if size is not None and (found := path.stat().st_size) != size:
            raise BadInput(f"{path} has {found} bytes, meta.json says {size}; prepare the folder again")
        if digest is not None:
            with open(path, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != digest:
                    raise BadInput(f"{path} does not have the sha256 in meta.json; prepare the folder again")

    def __len__(self) -> int:
        return self.first[-1]

    def __getitem__(self, i: int) -> np.ndarray:
        """Token ids of document i, a read-only (n,) uint16 view of the file."""
        if not 0 <= i < self.first[-1]:
            raise IndexError(f"document {i} of {self.first[-1]}")
        shard = bisect_right(self.first, i) - 1
        idx, j = self.idxs[shard], i - self.first[shard]
        return self.bins[shard][idx[j] : idx[j + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """(n_docs,) int64: tokens of each document, specials not counted."""
        return np.concatenate([np.diff(idx) for idx in self.idxs])


# ------------------------------------------------------------------------------------------- source: documentation
FUNCTION_WORDS = set(re.findall(r"\w+", "a an and are as at be by can for from if in is it of on or that the this to"))
MARKUP = [  # reStructuredText and Markdown -> the words a reader sees
    (re.compile(r":[\w:+-]+:`(?:~[\w.]*\.)?([^`<]*?)(?:\s*<[^>`]*>)?`"), r"\1"),
    (re.compile(r"\[`+(?:~[\w.]*\.)?([^`]+)`+\](?:\([^)]*\))?"), r"\1"),
    (re.compile(r"\[([^\]]+)\]\([^)\s]+\)"), r"\1"),
    (re.compile(r"`+~?([^`]+?)(?:\s*<[^>`]*>)?`+_*"), r"\1"),
    (re.compile(r"(?<![\w*])\*{1,2}([^*\n]+)\*{1,2}(?![\w*])"), r"\1"),
    (re.compile(r"\s*\[[\w#]+\]_"), ""),
]
HEAD = re.compile(  # a bullet, ":param x:", "x (int, optional): ", "x : array": a new paragraph starts here
    r"(?:[-*+•]|\(?\d{1,2}[.)])\s+|:\w[^:]{0,60}:\s*|[\w.*`, ]{1,40}(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?\s?:(?:\s+|$)"
)
TRIPLE_QUOTED = re.compile(r'''("""|\'{3})(.*?)(?<!\\)\1''', re.DOTALL)
TOP_LEVEL = re.compile(r"^(?:@|class |def |async def )", re.MULTILINE)


def prose(docstring: str) -> list[str]:
    """Paragraphs of English prose in a docstring, one line each: no code, doctests, tables, titles or markup."""
    paragraphs, lines = [], []
    indent, skipping, fenced = None, False, False

    def flush() -> None:
        text = " ".join(lines)
        lines.clear()
        if len(text) < 20 or text[-1] not in ".!?:":
            return
        for pattern, words in MARKUP:
            text = pattern.sub(words, text)
        words = text.split()
        known = sum(w.lower() in FUNCTION_WORDS for w in words)
        letters, odd = len(re.findall(r"[A-Za-z ]", text)), len(re.findall(r"[{}<>=|\\_@#$\[\]/~^]", text))
        english = len(words) >= 6 and known >= 0.15 * len(words) and letters >= 0.9 * len(text)
        if english and text[0].isupper() and odd <= len(text) / 60:
            paragraphs.append(" ".join(words))

    for line in [*inspect.cleandoc(docstring).splitlines(), ""]:
        bare = line.strip()
        if bare.startswith("```"):
            fenced = not fenced
        skipping = bool(bare) and (skipping or bare.startswith((">>>", "```", "In [")))  # to the next blank line
        if not bare or fenced or skipping or bare.startswith("..") or not re.search(r"\w", bare):
            flush()
            indent = None
            continue
        now = len(line) - len(line.lstrip())
        head = HEAD.match(bare)
        if head or indent not in (None, now):
            flush()
        rest = bare[head.end() :] if head else bare
        if rest and not (head and re.search(r"\w+ :", head[0])):  # after NumPy's "x : " comes a type, no prose
            lines.append(rest)
        indent = None if head else now
    return paragraphs


def docstrings_of(path: str) -> list[list[str]]:
    """Prose of a .py file: a list of paragraphs for the module and for each top-level class or function.

    A documentation string is a triple-quoted string that begins a line. Finding them so takes under a third of the
    time of ast.parse (13 s of CPU against 42 s for 290 MB of packages) and finds add_docstr(torch.abs, "...") too;
    the code it may take for one is dropped by prose().
    """
    source = Path(path).read_text(encoding="utf-8", errors="replace")
    tops = [m.start() for m in TOP_LEVEL.finditer(source)]
    groups: dict[int, list[str]] = {}
    for match in TRIPLE_QUOTED.finditer(source):
        start = match.start()
        if not source[source.rfind("\n", 0, start) + 1 : start].strip(" \trRuU"):
            groups.setdefault(bisect_right(tops, start), []).extend(prose(match[2]))
    return list(groups.values())


@functools.cache
def collect_docstrings() -> list[str]:
    """The offline corpus: English documentation strings of the standard library and of every installed package.

    No code, no comments, no test folders. A paragraph is dropped when at least half of its five-word sequences were
    seen before (libraries repeat theirs hundreds of times); 1.3 % of the eight-word sequences left are repeats. A
    document is a class, a function or a few short ones of one file, 500 characters where the file has them. Sorted by
    path, then shuffled by a hash, so the same packages give the same documents in the same order.
    """
    paths: list[str] = []
    for key in ("stdlib", "purelib"):
        for folder, inner, names in os.walk(sysconfig.get_paths()[key]):
            inner[:] = [d for d in inner if d not in ("tests", "test", "idle_test", "site-packages", "__pycache__")]
            paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    print(f"docstrings: reading {len(paths):,} source files of the installed packages", flush=True)
    with worker_pool(os.cpu_count() or 1) as pool:
        files = list(pool.map(docstrings_of, sorted(paths), chunksize=64))
    seen: set[int] = set()
    documents = []
    for groups in files:
        document: list[str] = []
        for group in groups:
            for paragraph in group:
                words = re.findall(r"[a-z]+", paragraph.lower())
                # crc32 because Python's own hash of a string differs between runs
                shingles = {zlib.crc32(" ".join(words[i : i + 5]).encode()) for i in range(max(1, len(words) - 4))}
                if 2 * len(shingles & seen) < len(shingles):
                    document.append(paragraph)
                seen |= shingles
            if document and (sum(map(len, document)) >= 500 or group is groups[-1]):
                documents.append("\n".join(document))
                document = []
    return sorted(documents, key=lambda d: hashlib.blake2b(d.encode(), digest_size=8).digest())


# ------------------------------------------------------------------------------------------- source: files and hub
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
        tail = b""
        for block in blocks_of(path):
            *lines, tail = (tail + block).split(b"\n")
            yield from lines
        yield tail

    for n, line in enumerate(raw(), 1):
        try:
            yield f"{path}:{n}", line.decode("utf-8")
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


@functools.cache
def hub_splits(path: str, name: str | None) -> dict:
    """Streaming splits of a hub dataset, or of a local folder laid out like one. BadInput, within seconds, when the
    hub cannot be reached: its own libraries would retry for minutes."""
    try:
        if not os.path.isdir(path):
            if os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("", "0", "FALSE", "NO", "OFF"):
                raise OSError("HF_HUB_OFFLINE is set")
            endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            urllib.request.urlopen(f"{endpoint}/api/datasets/{path}", timeout=10).close()
        import datasets

        return datasets.load_dataset(path, name, streaming=True)
    except Exception as e:  # any of several libraries
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise BadInput(f"cannot stream {path} from the Hugging Face hub ({why}); use a local corpus") from None


def hub_documents(path: str, name: str | None, split: str, index: int, key: str) -> Iterator["str | BadInput"]:
    """Documents of one file of a hub dataset."""
    dataset = hub_splits(path, name)[split]
    try:
        for n, row in enumerate(dataset.shard(dataset.num_shards, index), 1):
            yield text_in(row, key, f"{path} {split} file {index} row {n}")
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
        what = "is no .jsonl(.gz|.zst), .parquet or .txt(.gz|.zst)" if paths else "does not exist"
        raise BadInput(f"the corpus {source} {what}; others: docstrings, c4, hub:owner/name, a folder, a quoted glob")
    items, group, size = [], [], 0
    for path in usable:  # small files share an item: ten thousand of them are not ten thousand shards
        group.append(path)
        size += os.path.getsize(path)
        if size >= ITEM_BYTES or path == usable[-1]:
            items.append(("files", group))
            group, size = [], 0
    return items, [], ", ".join(f"{os.path.basename(p)} {os.path.getsize(p)}" for p in usable)


def documents(item: tuple, cfg: "Config", skipped: Counter | None = None) -> Iterator[str]:
    """Stripped, valid, non-empty documents of one item, always in the same order. Bad records raise, or are counted
    with --skip_bad."""
    if item[0] == "files":
        texts = (text for path in item[1] for text in file_documents(path, cfg.text_key))
    else:
        texts = hub_documents(*item[1:], cfg.text_key) if item[0] == "hub" else collect_docstrings()
    skipped = Counter(bad=3) if skipped is None else skipped  # nobody counts: report nothing
    for text in texts:
        if isinstance(text, BadInput):
            if not cfg.skip_bad:
                raise BadInput(f"{text}; mend it or pass --skip_bad")
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
    if len(keys) < 2:
        raise BadInput(f"the corpus {cfg.source} has {len(keys)} different documents; at least 2 are needed")
    few = sorted(keys)[min(8, len(keys) // 4)]  # a small corpus also gets up to eight held-out documents
    val = 0 if own_validation else max(int(cfg.val_fraction * 2**63), few, min(keys) + 1)
    # about one passage in 400 characters becomes an example (measured on docstrings and C4)
    share = min(0.3, (cfg.task_examples + n_dev_examples(cfg.task_examples)) * 400 / size) if cfg.task_examples else 0
    return val, val + int(share * 2**63)


# ------------------------------------------------------------------------------------------------- a labelled task
SWAPS = 3  # pairs of words exchanged in a disturbed passage
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def n_dev_examples(n_train: int) -> int:
    return max(500, n_train // 5)


def passages(document: str) -> Iterator[list[str]]:
    """Whole sentences, 8-30 words together, none used twice, with enough plain words to exchange."""
    for paragraph in document.splitlines():
        words: list[str] = []
        for sentence in SENTENCE_END.split(paragraph.strip()):
            words += sentence.split()
            if len(words) >= 8:
                plain = {w for w in words[1:] if w.isalpha() and w.islower()}
                fits = len(words) <= 30 and len(plain) >= 2 * SWAPS and words[-1][-1] in ".!?"
                if fits and not any('"' in w for w in words):
                    yield words
                words = []


def write_word_order_task(documents: Iterable[str], folder: Path, n_train: int, seed: int) -> dict[str, int]:
    """Write train.tsv and dev.tsv in SST-2's format: is this passage in its own word order (1) or disturbed (0)?

    Half of the passages are kept; in the others SWAPS random pairs of different lowercase words (never the first,
    none with punctuation, so neither gives the answer away) are exchanged. Every passage is used once, train and
    dev come from different documents. n_train and max(500, n_train / 5) examples, both scaled down together where
    the text does not suffice. Returns {"train": n, "dev": n}.
    """
    rng = random.Random(seed)
    pools = [found for text in sorted(set(documents)) if (found := [" ".join(p) for p in passages(text)])]
    rng.shuffle(pools)
    wanted = {"dev": n_dev_examples(n_train), "train": n_train}
    scale = min(1.0, sum(map(len, pools)) / sum(wanted.values()))
    seen: set[str] = set()
    written = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, n in wanted.items():
        chosen: list[str] = []
        while pools and len(chosen) < int(n * scale):
            chosen += [p for p in pools.pop() if p.lower() not in seen and not seen.add(p.lower())]
        rng.shuffle(chosen)
        rows = ["sentence\tlabel"]
        for i, passage in enumerate(chosen[: int(n * scale) // 2 * 2]):
            words = passage.split()
            if i % 2 == 0:
                first_at = {w: k for k, w in reversed([*enumerate(words)][1:]) if w.isalpha() and w.islower()}
                spots = rng.sample(sorted(first_at.values()), 2 * SWAPS)
                for a, b in zip(spots[::2], spots[1::2]):
                    words[a], words[b] = words[b], words[a]
            rows.append(f"{' '.join(words)}\t{i % 2}")
        body = rows[1:]
        rng.shuffle(body)
        write_atomically(folder / f"{name}.tsv", ("\n".join(rows[:1] + body) + "\n").encode())
        written[name] = len(body)
    return written


# ---------------------------------------------------------------------------------------------------------- writer
PARTS = ".parts"  # inside the folder: what an unfinished preparation has done


class ShardWriter:
    """One .bin/.idx pair, streamed to disk under a temporary name."""

    def __init__(self, stem: Path):
        self.stem, self.offsets, self.bytes, self.sha = stem, array("q", [0]), 0, hashlib.sha256()
        self.file = open(f"{stem}.bin.tmp", "wb")  # noqa: SIM115

    def add(self, ids: np.ndarray, n_bytes: int) -> None:
        data = ids.astype("<u2", copy=False).tobytes()
        self.file.write(data)
        self.sha.update(data)
        self.offsets.append(self.offsets[-1] + len(ids))
        self.bytes += n_bytes

    def close(self) -> dict:
        """Make both files durable under their names; -> counts and checksums."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(f"{self.stem}.bin.tmp", f"{self.stem}.bin")
        idx = np.asarray(self.offsets, dtype="<i8").tobytes()
        write_atomically(Path(f"{self.stem}.idx"), idx)
        return {
            "documents": len(self.offsets) - 1,
            "tokens": self.offsets[-1],
            "bytes": self.bytes,
            "bin_sha256": self.sha.hexdigest(),
            "idx_sha256": hashlib.sha256(idx).hexdigest(),
        }


def encode_item(name: str, item: tuple, cfg: "Config", cuts: tuple[int, int], threads: int) -> bool:
    """Encode one item into parts of about shard_tokens each; -> whether a limit is reached.

    A part's record is written last and says how many documents were read, so that a killed run continues behind the
    last part. Items named v… are a validation split of the source's own; of the others the hash decides.
    """
    parts, tokenizer, validation = Path(cfg.out) / PARTS, Tokenizer.load(cfg.out), name[0] == "v"
    own = {k for p in parts.glob("v*.keys") for k in np.fromfile(p, "<i8").tolist()}
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
            for text, ids in zip(batch, tokenizer.encode_arrays(batch, threads)):
                if n_tokens + tokens >= max_tokens:
                    break
                read += 1
                key = document_key(text)
                if len(ids) == 0:  # a Hugging Face normalizer may leave nothing
                    skipped["empty"] += 1
                elif not validation and key in own:
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
        write_atomically(Path(f"{stem}.task"), to_json(held_out))
        write_atomically(Path(f"{stem}.keys"), np.asarray(keys, "<i8").tobytes())
        record = {"read": read, "tokens": tokens, "last": last, "skipped": dict(skipped), "shards": shards}
        write_atomically(Path(f"{stem}.json"), to_json(record))


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
        held_out = [text for stem, _ in records for text in json.loads(Path(f"{stem}.task").read_bytes())]
        meta["task"] = write_word_order_task(held_out, out / "task", cfg.task_examples, cfg.seed)
    write_atomically(out / "meta.json", to_json(meta))
    return meta


# ---------------------------------------------------------------------------------------------------- command line
@dataclasses.dataclass
class Config:
    source: str  # docstrings | c4 | hub:owner/name[:config] | file, folder or glob of .jsonl(.gz|.zst) .parquet .txt
    out: str = ""  # folder to write; "" = data/<name of the source>
    vocab_size: int = 30528  # entries of the tokenizer with its 5 specials; a multiple of 64 suits tensor cores
    lowercase: bool = True  # lowercase the text
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
        finally:
            (folder / ".lock").unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()


PROGRESS = None  # shared by all workers while progress_shown(): documents, bytes, 1 = a worker failed, stop


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


def start_worker(progress) -> None:
    """In a worker process: share the counters, leave Ctrl-C to the parent, and die with it (also by SIGKILL)."""
    global PROGRESS
    PROGRESS = progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Fresh processes, since forking one that runs threads can deadlock."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (PROGRESS,))


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
        if state is None or not (out / "tokenizer.meta.json").exists():
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
                for name, item in jobs:
                    if encode_item(name, item, cfg, cuts, cores):
                        break
                continue
            with worker_pool(workers) as pool:
                futures = [pool.submit(encode_item, *job, cfg, cuts, cores // workers) for job in jobs]
                try:
                    for future in as_completed(futures):
                        future.result()
                except BaseException:
                    PROGRESS[2] = 1
                    pool.shutdown(cancel_futures=True)
                    raise


def summarize(cfg: Config, meta: dict, seconds: float) -> None:
    corpus, tokenizer = Corpus(cfg.out, verify=cfg.verify), Tokenizer.load(cfg.out)
    Corpus(cfg.out, "val", verify=cfg.verify)
    documents, tokens, size = (sum(s[key] for s in meta["shards"]) for key in ("documents", "tokens", "bytes"))
    texts = [tokenizer.decode(corpus[i]) for i in range(min(1000, len(corpus)))]
    fertility = int(corpus.lengths[: len(texts)].sum()) / max(1, sum(len(text.split()) for text in texts))
    print(
        f"{documents:,} documents, {tokens:,} tokens, {size / 1e6:,.1f} MB, vocabulary {meta['vocab_size']:,} "
        f"({size / tokens:.2f} bytes/token, {fertility:.2f} tokens/word), {seconds:.0f} s"
    )
    for why, n in meta["skipped"].items():
        print(f"skipped: {n:,} {why}")
    for name, n in meta.get("task", {}).items():
        wanted = cfg.task_examples if name == "train" else n_dev_examples(cfg.task_examples)
        fewer = "" if n >= wanted - 1 else f" (of {wanted:,} asked for: the held-out text gives no more)"
        print(f"labelled task: {n:,} examples in {cfg.out}/task/{name}.tsv{fewer}")
    print(f"folder: {cfg.out}\nnext:   python pretrain.py --data {cfg.out}")


@dataclasses.dataclass
class Inspect:
    folder: str  # a folder made by prepare_c4.py
    split: str = "train"  # train | val
    verify: bool = False  # read every file and check its sha256
    samples: int = 3  # documents to print
    compare: tuple[str, ...] = ()  # tokenizer.json files to measure on the same text
    png: str = ""  # the histogram as a picture; "" = <folder>/lengths.png


def inspect_folder(cfg: Inspect) -> None:
    """Print what a prepared folder holds: counts, document lengths, what windows keep, what padding would waste."""
    corpus = Corpus(cfg.folder, cfg.split, verify=cfg.verify)
    tokenizer, lengths = Tokenizer.load(corpus.tokenizer_dir), corpus.lengths
    title = f"{cfg.folder} {cfg.split}: {len(corpus):,} documents, {corpus.n_tokens:,} tokens"
    verified = ", checksums verified" if cfg.verify else ""
    print(f"{title}, {len(corpus.bins)} shards, vocabulary {tokenizer.vocab_size:,}{verified}")
    edges = [0, *(2**k for k in range(3, 15)), sys.maxsize]
    shares = np.histogram(lengths, edges)[0] / len(lengths)
    print(f"tokens per document: median {np.median(lengths):.0f}, mean {lengths.mean():.0f}, longest {lengths.max():,}")
    for low, high, share in zip(edges, edges[1:], shares):
        print(f"{low:7,} - {f'{high - 1:,}' if high < sys.maxsize else '':7} {share:6.1%} {'#' * round(60 * share)}")
    for window in (128, 512):
        kept = np.minimum(lengths + 2, window)  # with [CLS] and [SEP]
        share, padding = (kept - 2).sum() / corpus.n_tokens, 1 - kept.mean() / window
        print(f"window {window}: the first keeps {share:.1%} of the tokens; a padded batch is {padding:.1%} padding")
    chosen = np.random.default_rng(0).choice(len(corpus), min(len(corpus), 1000), replace=False).tolist()
    texts = [tokenizer.decode(corpus[i]) for i in chosen]
    words, size = sum(len(t.split()) for t in texts), sum(len(t.encode()) for t in texts)
    counts = {"this folder": sum(len(corpus[i]) for i in chosen)}
    for path in cfg.compare:
        import tokenizers

        other = tokenizers.Tokenizer.from_file(path).encode_batch_fast(texts, add_special_tokens=False)
        counts[path] = sum(map(len, other))
    for name, n in counts.items():
        print(f"fertility, {len(texts)} documents: {n / words:.2f} tokens/word, {size / n:.2f} bytes/token  {name}")
    for i, text in list(zip(chosen, texts))[: cfg.samples]:
        print(f"--- document {i:,}, {len(corpus[i]):,} tokens: {' '.join(text.split())[:400]}")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.figure(figsize=(7, 3.5), layout="constrained")
    plt.hist(lengths, bins=np.geomspace(1, lengths.max() + 1, 60))
    plt.xscale("log")
    plt.xlabel("tokens per document")
    plt.ylabel("documents")
    plt.title(title)
    plt.savefig(path := cfg.png or f"{cfg.folder}/lengths.png")
    print(f"histogram: {path}")


def main() -> None:
    import tyro

    options = {"config": (tyro.conf.PositionalRequiredArgs,), "use_underscores": True}
    try:
        if sys.argv[1:2] == ["inspect"]:
            inspect_folder(tyro.cli(Inspect, args=sys.argv[2:], prog="prepare_c4.py inspect", **options))
        else:
            prepare(tyro.cli(Config, description=__doc__, **options))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command continues") from None
    except BadInput as e:
        raise SystemExit(f"error: {e}") from None
    except BrokenProcessPool:
        raise SystemExit("error: a worker process died (out of memory?); the same command continues") from None
    except OSError as e:
        what = "the disk is full" if e.errno == errno.ENOSPC else e.strerror or str(e)
        raise SystemExit(f"error: {what} ({e.filename}); once that is mended the same command continues") from None


if __name__ == "__main__":
    main()
