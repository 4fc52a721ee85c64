"""Labelled texts as flat batches: examples end to end, without padding."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from glue.files import Split


@dataclass
class Encoded:
    """n examples [CLS] a [SEP] (b [SEP]) end to end, tokenised once."""

    ids: np.ndarray  # (tokens,) int32
    starts: np.ndarray  # (n+1,) int64: example i is ids[starts[i] : starts[i+1]]
    first: np.ndarray  # (n,) int64: its tokens of type 0, [CLS] a [SEP]
    words: np.ndarray | None = None  # (tokens,) int64: the word that begins here, else -1
    n_labels: int = 0  # labels: one for each example, or each word
    n_cut: int = 0  # examples that were longer than max_len

    def tokens(self, index: np.ndarray) -> np.ndarray:
        """(T,) places in ids of the tokens of examples `index` (B,), one example after another."""
        lengths = self.starts[index + 1] - self.starts[index]
        first = np.repeat(self.starts[index] - (lengths.cumsum() - lengths), lengths)
        return first + np.arange(len(first))

    def batch(self, index: np.ndarray, device: torch.device) -> dict[str, Any]:
        """Examples `index` (B,) as a flat batch: arguments of a classifier. T is the sum of their
        lengths, up to a multiple of 64 filled with rows of no example: a CPU makes its matmul code
        anew for every T it meets."""
        lengths, tokens = self.starts[index + 1] - self.starts[index], self.tokens(index)
        types = tokens >= np.repeat(self.starts[index] + self.first[index], lengths)
        filled = (np.pad(x, (0, -len(x) % 64)).astype(np.int64) for x in (self.ids[tokens], types))
        arrays = *filled, np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        names = ("input_ids", "token_type_ids", "cu_seqlens")
        batch = {k: torch.from_numpy(x).to(device) for k, x in zip(names, arrays)}
        return batch | {"max_seqlen": int(lengths.max())}

    def labels(self, index: np.ndarray) -> np.ndarray:
        """Of each row of a batch's logits, (B,) or with words (T,), the number of its label, -1 for
        rows without one: only a word's first token has its label."""
        if self.words is None:
            return index
        words = self.words[self.tokens(index)]
        return np.pad(words, (0, -len(words) % 64), constant_values=-1)


def encode(split: Split, tokenizer, max_len: int) -> Encoded:
    """Tokenise a file's texts, cut to max_len tokens, of a pair the longer first."""
    if split.words:
        return encode_words(split.words, tokenizer, max_len)
    columns = [tokenizer.encode_batch(column) for column in split.texts]
    between = getattr(tokenizer, "n_between", 1)  # RoBERTa has two separators between a and b
    room, n_cut = max_len - 2 - (len(columns) - 1) * between, 0
    flat, first = [], []
    for a, *rest in zip(*columns):
        b = rest[0] if rest else []
        if len(a) + len(b) > room:
            n_cut += 1
            a = a[: max(room - len(b), room - room // 2)] if rest else a[:room]
            b = b[: room - len(a)]
        example = [tokenizer.cls_id, *a, *[tokenizer.sep_id] * (between if rest else 1)]
        first.append(len(example))
        flat.append([*example, *b, tokenizer.sep_id] if rest else example)
    return pack(flat, first, n_labels=len(flat), n_cut=n_cut)


def encode_words(sentences: list[list[str]], tokenizer, max_len: int) -> Encoded:
    """Words are tokenised as in their sentence: with the blank before them."""
    texts = [" " * (i > 0) + word for words in sentences for i, word in enumerate(words)]
    pieces = enumerate(ids or [tokenizer.unk_id] for ids in tokenizer.encode_batch(texts))
    flat, begins, n_cut = [], [], 0
    for sentence in sentences:
        ids, where = [tokenizer.cls_id], [-1]
        for word, piece in itertools.islice(pieces, len(sentence)):
            ids += piece
            where += [word, *[-1] * (len(piece) - 1)]
        n_cut += len(ids) >= max_len
        flat.append([*ids[: max_len - 1], tokenizer.sep_id])
        begins += [*where[: max_len - 1], -1]
    first, n = list(map(len, flat)), len(texts)
    return pack(flat, first, words=np.array(begins), n_labels=n, n_cut=n_cut)


def pack(examples: list[list[int]], first: list[int], **more) -> Encoded:
    starts = np.cumsum([0, *map(len, examples)])
    return Encoded(np.concatenate(examples).astype(np.int32), starts, np.array(first), **more)
