"""What the pipeline runs on without a network: the documentation strings of the installed Python
packages, and a labelled task that any corpus can give: was the order of a passage's words
disturbed? A crude cousin of CoLA, in SST-2's file format.
"""

import functools
import hashlib
import inspect
import multiprocessing
import os
import random
import re
import sysconfig
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from records import write_atomically

# ------------------------------------------------------------------------- source: documentation
FUNCTION_WORDS = set(re.findall(
    r"\w+", "a an and are as at be by can for from if in is it of on or that the this to"))
MARKUP = [  # reStructuredText and Markdown -> the words a reader sees
    (re.compile(r":[\w:+-]+:`(?:~[\w.]*\.)?([^`<]*?)(?:\s*<[^>`]*>)?`"), r"\1"),
    (re.compile(r"\[`+(?:~[\w.]*\.)?([^`]+)`+\](?:\([^)]*\))?"), r"\1"),
    (re.compile(r"\[([^\]]+)\]\([^)\s]+\)"), r"\1"),
    (re.compile(r"`+~?([^`]+?)(?:\s*<[^>`]*>)?`+_*"), r"\1"),
    (re.compile(r"(?<![\w*])\*{1,2}([^*\n]+)\*{1,2}(?![\w*])"), r"\1"),
    (re.compile(r"\s*\[[\w#]+\]_"), ""),
]
HEAD = re.compile(  # a bullet, ":param x:", "x (int, optional): ", "x : array": a new paragraph
    r"(?:[-*+•]|\(?\d{1,2}[.)])\s+|:\w[^:]{0,60}:\s*"
    r"|[\w.*`, ]{1,40}(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?\s?:(?:\s+|$)"
)
TRIPLE_QUOTED = re.compile(r'''("""|\'{3})(.*?)(?<!\\)\1''', re.DOTALL)
TOP_LEVEL = re.compile(r"^(?:@|class |def |async def )", re.MULTILINE)


def clean_paragraph(lines: list[str]) -> str | None:
    """The lines as one, without markup; None if they are not English prose."""
    text = " ".join(lines)
    if len(text) < 20 or text[-1] not in ".!?:":
        return None
    for pattern, words in MARKUP:
        text = pattern.sub(words, text)
    words = text.split()
    known = sum(w.lower() in FUNCTION_WORDS for w in words)
    letters = len(re.findall(r"[A-Za-z ]", text))
    odd = len(re.findall(r"[{}<>=|\\_@#$\[\]/~^]", text))
    english = len(words) >= 6 and known >= 0.15 * len(words) and letters >= 0.9 * len(text)
    return " ".join(words) if english and text[0].isupper() and odd <= len(text) / 60 else None


def prose(docstring: str) -> list[str]:
    """Paragraphs of English prose in a docstring, one line each: no code, tables or markup."""
    blocks: list[list[str]] = [[]]
    indent, skipping, fenced = None, False, False
    for line in inspect.cleandoc(docstring).splitlines():
        bare = line.strip()
        if bare.startswith("```"):
            fenced = not fenced
        skipping = bool(bare) and (skipping or bare.startswith((">>>", "```", "In [")))
        if fenced or skipping or bare.startswith("..") or not re.search(r"\w", bare):
            blocks.append([])
            indent = None
            continue
        now = len(line) - len(line.lstrip())
        head = HEAD.match(bare)
        if head or indent not in (None, now):
            blocks.append([])
        rest = bare[head.end() :] if head else bare
        # after NumPy's "x : " comes a type, no prose
        if rest and not (head and re.search(r"\w+ :", head[0])):
            blocks[-1].append(rest)
        indent = None if head else now
    return [text for block in blocks if (text := clean_paragraph(block))]


def docstrings_of(path: str) -> list[list[str]]:
    """Prose of a .py file: a list of paragraphs for the module and for each top-level class or
    function. Taking every triple-quoted string that begins a line needs a third of ast.parse's time
    (13 s of CPU against 42 s for 290 MB of packages) and finds add_docstr(torch.abs, "...") too."""
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
    """The offline corpus, from the standard library and every installed package, without tests.

    A paragraph is dropped when at least half of its five-word sequences were seen before (libraries
    repeat theirs hundreds of times). A document is a class, a function or a few short ones of one
    file, 500 characters where the file has them. Shuffled by a hash: the same packages give the
    same documents in the same order.
    """
    skipped = {"tests", "test", "idle_test", "site-packages", "__pycache__"}
    paths: list[str] = []
    for key in ("stdlib", "purelib"):
        for folder, inner, names in os.walk(sysconfig.get_paths()[key]):
            inner[:] = [d for d in inner if d not in skipped]
            paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    print(f"docstrings: reading {len(paths):,} source files of installed packages", flush=True)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        files = list(pool.map(docstrings_of, sorted(paths), chunksize=64))
    seen: set[int] = set()
    documents = []
    for groups in files:
        document: list[str] = []
        for i, group in enumerate(groups, 1):
            for paragraph in group:
                words = re.findall(r"[a-z]+", paragraph.lower())
                fives = (words[k : k + 5] for k in range(max(1, len(words) - 4)))
                # crc32 because Python's own hash of a string differs between runs
                shingles = {zlib.crc32(" ".join(five).encode()) for five in fives}
                if 2 * len(shingles & seen) < len(shingles):
                    document.append(paragraph)
                seen |= shingles
            if document and (sum(map(len, document)) >= 500 or i == len(groups)):
                documents.append("\n".join(document))
                document = []
    return sorted(documents, key=lambda d: hashlib.blake2b(d.encode(), digest_size=8).digest())


# ------------------------------------------------------------------------------- a labelled task
SWAPS = 3  # pairs of words exchanged in a disturbed passage
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def n_dev_examples(n_train: int) -> int:
    return max(500, n_train // 5)


def plain_words(words: list[str]) -> dict[str, int]:
    """The different lowercase words without punctuation after the first, with their places."""
    places = reversed([*enumerate(words)][1:])
    return {w: i for i, w in places if w.isalpha() and w.islower()}


def passages(document: str) -> Iterator[list[str]]:
    """Whole sentences, 8-30 words together, none twice, with enough plain words to exchange."""
    for paragraph in document.splitlines():
        words: list[str] = []
        for sentence in SENTENCE_END.split(paragraph.strip()):
            words += sentence.split()
            if len(words) >= 8:
                whole = len(words) <= 30 and words[-1][-1] in ".!?" and '"' not in "".join(words)
                if whole and len(plain_words(words)) >= 2 * SWAPS:
                    yield words
                words = []


def write_word_order_task(documents: Iterable[str], folder: Path, n_train: int) -> dict[str, int]:
    """Write train.tsv and dev.tsv: is this passage in its own word order (1) or disturbed (0)?

    In half of the passages SWAPS random pairs of different lowercase words (never the first, none
    with punctuation, so neither gives the answer away) are exchanged. Every passage is used once,
    train and dev come from different documents. n_train and max(500, n_train / 5) examples, both
    scaled down where the text does not suffice. Returns {"train": n, "dev": n}.
    """
    rng = random.Random(0)
    pools = [[" ".join(words) for words in passages(text)] for text in sorted(set(documents))]
    pools = [pool for pool in pools if pool]
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
        rows = []
        for i, passage in enumerate(chosen[: int(n * scale) // 2 * 2]):
            words = passage.split()
            if i % 2 == 0:
                spots = rng.sample(sorted(plain_words(words).values()), 2 * SWAPS)
                for a, b in zip(spots[::2], spots[1::2]):
                    words[a], words[b] = words[b], words[a]
            rows.append(f"{' '.join(words)}\t{i % 2}\n")
        rng.shuffle(rows)
        write_atomically(folder / f"{name}.tsv", ("sentence\tlabel\n" + "".join(rows)).encode())
        written[name] = len(rows)
    return written
