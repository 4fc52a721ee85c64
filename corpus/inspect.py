"""What a prepared folder holds: `python prepare_c4.py inspect data/<name>`.

Counts, document lengths, what windows keep of them, what padding would waste, a few documents, and the fertility of the
vocabulary: tokens per word and bytes per token on held-out text, beside other vocabularies.
"""

import contextlib
import dataclasses
import sys

import numpy as np
import tiktoken

from corpus.shards import Corpus
from corpus.tokenizer import Tokenizer
from machine import read_command_line
from records import BadInput

CACHED = {  # vocabularies the fertility is compared with where a cache has them: name -> repositories of the hub
    "gpt2": ("openai-community/gpt2", "gpt2"),
    "bert-base-uncased": ("google-bert/bert-base-uncased", "bert-base-uncased"),
}


def count_tokens(name: str, texts: list[str]) -> int | None:
    """Tokens of the texts in a tokenizer.json or one of CACHED; None where no cache has it: nothing is downloaded."""
    if name == "gpt2":  # tiktoken's cache, and only that
        from unittest import mock

        with contextlib.suppress(OSError), mock.patch("tiktoken.load.read_file", side_effect=OSError):
            return sum(map(len, tiktoken.get_encoding("gpt2").encode_ordinary_batch(texts)))
    import huggingface_hub
    import tokenizers

    found = [huggingface_hub.try_to_load_from_cache(hub, "tokenizer.json") for hub in CACHED.get(name, ())]
    path = next((p for p in found if isinstance(p, str)), None) if name in CACHED else name
    if path is None:
        return None
    try:
        other = tokenizers.Tokenizer.from_file(path)
    except Exception as e:  # `tokenizers` raises bare Exception
        raise BadInput(f"--compare {name} is no tokenizer.json, {' or '.join(CACHED)} ({e})") from None
    other.no_truncation()
    other.no_padding()
    return sum(map(len, other.encode_batch_fast(texts, add_special_tokens=False)))


def print_fertility(folder: str, others: tuple[str, ...]) -> None:
    """Tokens per word and bytes per token on up to 1,000 held-out documents, beside other vocabularies."""
    corpus, tokenizer = Corpus(folder, "val"), Tokenizer.load(folder)
    chosen = np.random.default_rng(0).choice(len(corpus), min(len(corpus), 1000), replace=False).tolist()
    texts = [tokenizer.decode(corpus[i]) for i in chosen]
    words, size = max(1, sum(len(t.split()) for t in texts)), sum(len(t.encode()) for t in texts)
    counts = {f"this folder, {tokenizer.vocab_size:,} entries": sum(len(corpus[i]) for i in chosen)}
    print(f"on {len(texts):,} held-out documents{' (lowercased)' if tokenizer.lowercase else ''}:")
    for name, n in (counts | {name: count_tokens(name, texts) for name in others}).items():
        rate = f"{n / words:.2f} tokens/word, {size / n:.2f} bytes/token" if n else "not at hand"
        print(f"  {name}: {rate}")


@dataclasses.dataclass
class Inspect:
    """What a prepared folder holds: counts, document lengths, padding, samples, fertility, a histogram."""

    folder: str  # a folder made by prepare_c4.py
    split: str = "train"  # train | val
    verify: bool = False  # read every file and check its sha256
    samples: int = 3  # documents to print
    compare: tuple[str, ...] = tuple(CACHED)  # vocabularies beside ours: these where a cache has them, tokenizer.json
    png: str = ""  # the histogram as a picture; "" = <folder>/lengths.png


def inspect_folder(cfg: Inspect) -> None:
    """Print what a prepared folder holds: counts, document lengths, what windows keep, what padding would waste."""
    if cfg.samples < 0:
        raise BadInput("--samples must not be negative")
    corpus = Corpus(cfg.folder, cfg.split, verify=cfg.verify)
    tokenizer, lengths = Tokenizer.load(corpus.folder), corpus.lengths
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
    print_fertility(cfg.folder, cfg.compare)
    chosen = np.random.default_rng(0).choice(len(corpus), min(len(corpus), cfg.samples), replace=False).tolist()
    for i in chosen:
        print(f"--- document {i:,}, {len(corpus[i]):,} tokens: {' '.join(tokenizer.decode(corpus[i]).split())[:400]}")
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
    """Command line: a prepared folder, then what to show of it."""
    try:
        inspect_folder(read_command_line(Inspect, prog="python -m corpus.inspect", positional=True))
    except BadInput as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
