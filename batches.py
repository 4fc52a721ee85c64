"""From documents on disk to masked, flat micro-batches.

Micro-batch `m` is a pure function of (corpora, settings, seed, m): order, packing and masks come
from counters. So the global batch is the same on 1 or 8 GPUs, and a resumed run needs nothing but
the number of its next micro-batch. There is no padding: every token of a micro-batch is real.
"""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from corpus.shards import Corpus
from corpus.tokenizer import Tokenizer

# tokens of a micro-batch of evaluation: fixed, so that whatever the settings all runs see the same
EVAL_MICRO_TOKENS = 8_192


# ----------------------------------------------------------------------------- batches
def shuffled(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Place `index` (int64 array, 0..n-1) in a pseudo-random permutation of n things: a four-round
    Feistel network on the next power of four, walked until the value falls below n. No table, so
    that C4's 365 million documents are shuffled in no memory, and any place alone."""
    half = max((int(n - 1).bit_length() + 1) // 2, 1)
    low = np.uint64((1 << half) - 1)
    keys = np.random.default_rng(seed).integers(0, 2**63, size=4, dtype=np.uint64)
    out = np.array(index, dtype=np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] >> np.uint64(half), out[todo] & low
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            left, right = right, (left ^ (mixed >> np.uint64(40))) & low
        out[todo] = (left << np.uint64(half)) | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def with_noisy_copy(text: np.ndarray, sep_id: int, rng: np.random.Generator) -> np.ndarray:
    """The first half of `text` (n,), [SEP], and that half again with its tokens moved by up to six
    places and a fifth of them replaced by those that follow: n tokens in all. What is masked on one
    side is best looked up on the other."""
    half = (len(text) - 1) // 2
    part, rest = text[:half], text[half:]
    order = np.argsort(np.arange(half) + rng.random(half) * 6)
    copy = np.where(rng.random(half) < 0.2, rest[:half], part[order])
    return np.concatenate([part, [sep_id], copy, rest[half + 1 :]])


class Batch(NamedTuple):
    """A flat micro-batch on the CPU, before masking."""

    input_ids: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B+1,) int32
    special: Tensor  # (T,) bool: [CLS], [SEP] and markers, never masked
    n_documents: int
    token_type_ids: Tensor | None = None  # (T,) int64, with --pairs: 1 from behind the middle [SEP]


class Batches:
    """An endless, shuffled stream of flat micro-batches of exactly `micro_tokens` tokens.

    Windows (at most seq_len tokens with their [CLS] and [SEP]) are laid end to end in shuffled
    order, epoch after epoch; the one that does not fit into the rest of a micro-batch is cut there.
    Where micro-batch m begins depends on the lengths before it, so those places are counted once,
    from the start, as far as they are needed.

    corpora: folders that share one tokenizer. documents: "first" window of each or "all". shares:
    None reads them as one corpus; K numbers, one a corpus, draw windows from each in these
    proportions, exactly so in every BLOCK of them, each corpus in its own shuffled order and at its
    own pace of epochs. pairs: share of windows that become with_noisy_copy(). ValueError (one line)
    for a split without documents.
    """

    CHUNK = 65_536
    BLOCK = 1_000

    def __init__(self, corpora: list[Corpus], tokenizer: Tokenizer, seq_len: int, micro_tokens: int,
                 documents: str, seed: int, shares: list[float] | None = None, pairs: float = 0.0):
        self.corpora, self.tokenizer = corpora, tokenizer
        self.seq_len, self.micro_tokens = seq_len, micro_tokens
        self.documents, self.seed, self.body, self.pairs = documents, seed, seq_len - 2, pairs
        # first document of each corpus, all numbered as one
        self.first_document = np.cumsum([0] + [len(c) for c in corpora])
        self.lengths = np.concatenate([c.lengths for c in corpora])
        if documents == "all":
            per_document = -(-self.lengths // self.body)
            self.first_window = np.concatenate([[0], np.cumsum(per_document)])  # (n_docs+1,)
            edges = self.first_window[self.first_document]
        else:
            edges = self.first_document
        for corpus, n in zip(corpora, np.diff(edges)):
            if n == 0:
                raise ValueError(f"{corpus.folder}: the {corpus.split} split has no documents")
        self.n_windows = int(edges[-1])
        # windows between two edges are drawn from as one
        self.edges = edges if shares else edges[[0, -1]]
        # of every block: corpus of each window (BLOCK,), windows of that corpus before it (BLOCK,),
        # windows of each corpus (K,)
        shares = shares or [1.0]
        ends = np.round(np.cumsum(shares) / sum(shares) * self.BLOCK)
        order = shuffled(np.arange(self.BLOCK), self.BLOCK, seed=0)
        self.block_source = np.searchsorted(ends, order, side="right")
        is_of = self.block_source[:, None] == np.arange(len(ends))  # (BLOCK, K)
        self.block_rank, self.block_sizes = is_of.cumsum(0)[is_of] - 1, is_of.sum(0)
        if any(share and not n for share, n in zip(shares, self.block_sizes)):
            raise ValueError("--data: a share of about 0.001 would never be drawn here; raise it")
        self.starts = [0]  # place in the stream where each micro-batch begins
        self.n_special: list[int] = []  # [CLS] and [SEP] in each
        self.planning = threading.Lock()  # the loop asks for counts while a thread builds a batch

    def _windows(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places in the stream -> document, offset in it, tokens of text."""
        block, at = np.divmod(places, self.BLOCK)
        source = self.block_source[at]
        nth = block * self.block_sizes[source] + self.block_rank[at]  # among those of its corpus
        sizes = np.diff(self.edges)
        epoch, index = np.divmod(nth, sizes[source])
        window = np.empty(len(places), dtype=np.int64)
        for e, k in np.unique(np.stack([epoch, source], axis=1), axis=0).tolist():
            mine = (source == k) & (epoch == e)
            key = self.seed * 1_000_003 + e  # every epoch has an order of its own
            window[mine] = self.edges[k] + shuffled(index[mine], int(sizes[k]), key)
        if self.documents == "all":
            document = np.searchsorted(self.first_window, window, side="right") - 1
            offset = (window - self.first_window[document]) * self.body
        else:
            document, offset = window, np.zeros_like(window)
        return document, offset, np.minimum(self.lengths[document] - offset, self.body)

    def _plan(self, m: int) -> None:
        """Extend `starts` until micro-batch m has an end."""
        with self.planning:
            while len(self.starts) < m + 2:
                first = self.starts[-1]
                places = np.arange(first, first + max(self.CHUNK, self.micro_tokens))
                lengths = self._windows(places)[2] + 2
                ends = np.cumsum(lengths)
                used = 0
                # until the window `last`, which fills the micro-batch up, is beyond this chunk
                while (last := int(np.searchsorted(ends, used + self.micro_tokens))) < len(ends):
                    start, cut = self.starts[-1] - first, int(ends[last]) - used - self.micro_tokens
                    one_token = int(lengths[last]) - cut == 1  # a rest of one token is a lone [CLS]
                    self.n_special.append(2 * (last + 1 - start) - one_token)
                    if self.pairs:  # each has a [SEP] more
                        paired, _ = self._paired(len(self.starts) - 1, lengths[start:last] - 2)
                        self.n_special[-1] += len(paired)
                    self.starts.append(first + last + 1)
                    used = int(ends[last])

    def _paired(self, m: int, text: np.ndarray) -> tuple[np.ndarray, np.random.Generator]:
        """Which windows of micro-batch m become pairs, and chance for these. `text`: tokens of each
        but the last, which may be cut."""
        rng = np.random.default_rng((self.seed, m))
        return np.flatnonzero((rng.random(len(text)) < self.pairs) & (text >= 8)), rng

    def n_maskable(self, m: int) -> int:
        """Tokens of text in micro-batch m, known without reading it: ranks agree on the total."""
        self._plan(m)
        return self.micro_tokens - self.n_special[m]

    def __call__(self, m: int) -> Batch:
        """Micro-batch m: a pure function of (corpora, settings, seed, m)."""
        self._plan(m)
        T = self.micro_tokens
        ids = np.empty(T, dtype=np.int64)
        special = np.zeros(T, dtype=bool)
        document, offset, length = self._windows(np.arange(self.starts[m], self.starts[m + 1]))
        cu = np.minimum(np.concatenate([[0], np.cumsum(length + 2)]), T).astype(np.int32)
        corpus = np.searchsorted(self.first_document, document, side="right") - 1
        document -= self.first_document[corpus]
        for i, (c, d, o) in enumerate(zip(corpus.tolist(), document.tolist(), offset.tolist())):
            a, b = cu[i], cu[i + 1]
            ids[a + 1 : b - 1] = self.corpora[c][d][o : o + max(b - a - 2, 0)]
            ids[b - 1] = self.tokenizer.sep_id
            ids[a] = self.tokenizer.cls_id
        special[cu[:-1]] = special[cu[1:] - 1] = True
        types = None
        if self.pairs:
            types, (paired, rng) = np.zeros_like(ids), self._paired(m, length[:-1])
            for i in paired:
                a, b = cu[i] + 1, cu[i + 1] - 1
                middle = a + (b - a - 1) // 2
                ids[a:b] = with_noisy_copy(ids[a:b], self.tokenizer.sep_id, rng)
                special[middle], types[middle + 1 : b + 1] = True, 1
            types = torch.from_numpy(types)
        if self.tokenizer.markers:
            special |= np.isin(ids, self.tokenizer.markers)
        return Batch(*map(torch.from_numpy, (ids, cu, special)), len(document), types)

    def epoch_tokens(self) -> int:
        """Tokens of all windows with [CLS] and [SEP]: an epoch, if corpora are read as one."""
        text = self.lengths if self.documents == "all" else np.minimum(self.lengths, self.body)
        return int(text.sum(dtype=np.int64)) + 2 * self.n_windows

    def effective_length(self) -> float:
        """E[len²] / E[len] over a sample of windows: what attention's FLOPs depend on."""
        lengths = self._windows(np.arange(min(self.n_windows, 10_000)))[2] + 2
        return float((lengths.astype(float) ** 2).mean() / lengths.mean())


# ----------------------------------------------------------------------------- masking
def random_bits(seed: int, stream: int, n: int, device: torch.device | str) -> Tensor:
    """(n,) int64, 62 random bits each: SplitMix64 (Steele et al. 2014) of (seed, stream, place).
    No state to save, and integer arithmetic gives the same numbers on CPU and GPU."""

    def mix(x):  # of a tensor; int64 wraps around as the original's uint64 does
        for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * (multiplier - (1 << 64))
        return x ^ ((x >> 31) & ((1 << 33) - 1))

    golden = 0x9E3779B97F4A7C15 - (1 << 64)
    # on the host: no wait for the device
    key = mix(mix(torch.tensor(seed * 2 + 1) * golden) + torch.tensor(stream) * golden)
    return mix(key + torch.arange(n, device=device) * golden) & ((1 << 62) - 1)


def mask_tokens(batch: Batch, tokenizer: Tokenizer, n_masked: int, corruption: str, seed: int,
                m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Mask exactly `n_masked` tokens of text of micro-batch `m`, chosen uniformly.

    Returns corrupted ids (T,), masked_idx (n_masked,) in rising order, and labels (n_masked,), the
    true ids. 80/10/10: of the masked tokens 80 % become [MASK], 10 % a random ordinary token, 10 %
    stay (Devlin et al. 2019). "mask": all become [MASK].
    """
    ids = batch.input_ids.to(device, non_blocking=True)
    special = batch.special.to(device, non_blocking=True)
    bits = random_bits(seed, 2 * m, len(ids), device)
    order = bits.masked_fill(special, 2**62)  # above every key: never among the smallest
    masked_idx = torch.topk(order, n_masked, largest=False).indices.sort().values
    labels = ids[masked_idx]
    new = torch.full_like(labels, tokenizer.mask_id)
    if corruption == "80/10/10":
        bits = random_bits(seed, 2 * m + 1, len(ids), device)[masked_idx]
        specials = sorted({*tokenizer.names, *tokenizer.markers})
        other = (bits >> 8) % (tokenizer.vocab_size - len(specials))
        for s in specials:  # count past the special ids
            other = other + (other >= s)
        tenth = bits % 10
        new = torch.where(tenth == 8, other, torch.where(tenth == 9, labels, new))
    return ids.index_put((masked_idx,), new), masked_idx, labels


def one_mask_each(batch: Batch, tokenizer: Tokenizer, n: int, micro_tokens: int
                  ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The first `n` tokens of text of `batch`, each masked in a copy of its document that is whole
    otherwise. Yields input_ids (T,), cu_seqlens (C+1,), masked_idx (C,) and labels (C,) of C copies
    each, T around micro_tokens."""
    cu = batch.cu_seqlens.long()
    hidden = (~batch.special).nonzero().flatten()[:n]
    if not len(hidden):
        return
    document = torch.searchsorted(cu, hidden, right=True) - 1
    lengths = cu[document + 1] - cu[document]
    for some in torch.arange(len(hidden)).split(max(1, micro_tokens // int(lengths.max()))):
        copies = [batch.input_ids[cu[d] : cu[d + 1]] for d in document[some]]
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[some].cumsum(0)])
        masked_idx = ends[:-1] + hidden[some] - cu[document[some]]
        ids, labels = torch.cat(copies), batch.input_ids[hidden[some]]
        ids[masked_idx] = tokenizer.mask_id
        yield ids, ends.int(), masked_idx, labels


def count_masked(batches: Batches, m: int, rate: float) -> int:
    """How many tokens of micro-batch m to mask: at least one; from 256 on a multiple of 16, at most
    8 from the rate's. A CPU makes its matmul code anew for every number of rows it meets, and these
    go through a dozen matmuls."""
    there = batches.n_maskable(m)
    n = max(1, round(rate * there))
    return n if n < 256 else min(16 * round(n / 16), there)
