"""What a prepared folder holds: `python -m corpus.inspect data/<name>`.

Counts, document lengths, what windows keep of them, what padding would waste, tokens per word and
bytes per token, and a few documents.
"""

import dataclasses
import sys

import numpy as np

from corpus.shards import Corpus
from corpus.tokenizer import Tokenizer
from machine import script


@dataclasses.dataclass
class Config:
    folder: str  # a folder made by prepare_c4.py
    split: str = "train"  # train | val
    verify: bool = False  # read every file and check its sha256
    samples: int = 3  # documents to print


def inspect_folder(cfg: Config) -> None:
    """Print what the folder holds. BadInput when it or a tokenizer cannot be read."""
    corpus = Corpus(cfg.folder, cfg.split, verify=cfg.verify)
    tokenizer, lengths = Tokenizer.load(corpus.folder), corpus.lengths
    print(f"{cfg.folder} {cfg.split}: {len(corpus):,} documents, {corpus.n_tokens:,} tokens, "
          f"{len(corpus.bins)} shards, vocabulary {tokenizer.vocab_size:,}"
          + ", checksums verified" * cfg.verify)
    print(f"tokens per document: median {np.median(lengths):.0f}, mean {lengths.mean():.0f}, "
          f"longest {lengths.max():,}")
    edges = [0, *(2**k for k in range(3, 15)), sys.maxsize]
    for low, n in zip(edges, np.histogram(lengths, edges)[0]):
        share = n / len(lengths)
        print(f"from {low:6,} {share:6.1%} {'#' * round(60 * share)}")
    for window in (128, 512):
        kept = np.minimum(lengths + 2, window)  # with [CLS] and [SEP]
        share, padding = (kept - 2).sum() / corpus.n_tokens, 1 - kept.mean() / window
        print(f"window {window}: the first keeps {share:.1%} of the tokens; "
              f"a padded batch is {padding:.1%} padding")
    chosen = np.random.default_rng(0).permutation(len(corpus))[:1000].tolist()
    texts = [tokenizer.decode(corpus[i]) for i in chosen]
    n, words = sum(len(corpus[i]) for i in chosen), sum(len(text.split()) for text in texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    print(f"on {len(texts):,} documents: {n / max(1, words):.2f} tokens/word, "
          f"{n_bytes / n:.2f} bytes/token")
    for i, text in zip(chosen[: max(0, cfg.samples)], texts):
        print(f"--- document {i:,}, {len(corpus[i]):,} tokens: {' '.join(text.split())[:400]}")


if __name__ == "__main__":
    script(inspect_folder, Config, positional=True)()
