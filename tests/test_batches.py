"""batches.py: exact micro-batches, a pure function of (seed, m), and honest masking."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from batches import Batches, count_masked, mask_tokens, random_bits, shuffled
from corpus import Corpus, Tokenizer

T, S = 1_024, 64


@pytest.fixture(scope="module")
def tokenizer(corpus_dir):
    return Tokenizer.load(corpus_dir)


def make(corpus_dir, tokenizer, documents="all", split="train", seed=3, micro_tokens=T, seq_len=S) -> Batches:
    return Batches([Corpus(corpus_dir, split)], tokenizer, seq_len, micro_tokens, documents, seed)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 255, 1_000, 70_000])
def test_shuffled_is_a_permutation_and_depends_on_the_seed(n):
    order = shuffled(np.arange(n), n, seed=1)
    assert np.array_equal(np.sort(order), np.arange(n))
    if n > 100:
        assert not np.array_equal(order, shuffled(np.arange(n), n, seed=2))
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 4 / n**0.5, "neighbours are spread"


@pytest.mark.parametrize("documents", ["first", "all"])
def test_every_micro_batch_is_exactly_full_of_whole_documents(corpus_dir, tokenizer, documents):
    batches = make(corpus_dir, tokenizer, documents)
    for m in range(20):
        b = batches(m)
        assert b.input_ids.shape == (T,) and int(b.cu_seqlens[0]) == 0 and b.cu_seqlens[-1] == T
        lengths = b.cu_seqlens.diff()
        assert len(lengths) == b.n_documents and lengths.min() > 0 and lengths.max() <= S
        starts, ends = b.cu_seqlens[:-1].long(), b.cu_seqlens[1:].long() - 1
        assert (b.input_ids[starts] == tokenizer.cls_id).all()
        assert (b.input_ids[ends[lengths > 1]] == tokenizer.sep_id).all()
        assert set(b.special.nonzero().flatten().tolist()) == set(starts.tolist()) | set(ends.tolist())
        assert (b.input_ids[~b.special] > tokenizer.mask_id).all(), "text holds no special tokens"
        assert batches.n_maskable(m) == int((~b.special).sum())


def test_an_epoch_shows_every_window_once_and_the_next_one_in_another_order(corpus_dir, tokenizer):
    batches = make(corpus_dir, tokenizer)
    corpus = Corpus(corpus_dir)
    expected = {(d, o) for d in range(len(corpus)) for o in range(0, len(corpus[d]), S - 2)}
    orders = []
    for epoch in range(2):
        places = np.arange(batches.n_windows) + epoch * batches.n_windows
        document, offset, length = batches._windows(places)
        orders.append(list(zip(document.tolist(), offset.tolist())))
        assert set(orders[-1]) == expected and len(orders[-1]) == len(expected)
        assert length.min() > 0 and length.max() == S - 2
    assert orders[0] != orders[1]


def test_text_of_a_batch_is_the_text_of_its_documents(corpus_dir, tokenizer):
    batches, corpus = make(corpus_dir, tokenizer), Corpus(corpus_dir)
    document, offset, _ = batches._windows(np.arange(batches.n_windows))
    ids, cu = batches(0).input_ids, batches(0).cu_seqlens.tolist()
    for d, o, a, b in zip(document, offset, cu[:-1], cu[1:]):
        assert ids[a + 1 : b - 1].tolist() == corpus[d][o : o + b - a - 2].tolist()


def test_micro_batch_m_does_not_depend_on_what_was_asked_before(corpus_dir, tokenizer):
    forward, direct = make(corpus_dir, tokenizer), make(corpus_dir, tokenizer)
    in_order = [forward(m) for m in range(31)]  # more than one epoch of this corpus would be further still
    for m in (30, 7, 0):
        b = direct(m)
        assert torch.equal(b.input_ids, in_order[m].input_ids) and torch.equal(b.cu_seqlens, in_order[m].cu_seqlens)
    assert not torch.equal(make(corpus_dir, tokenizer, seed=4)(0).input_ids, in_order[0].input_ids)


def test_long_streams_cross_epochs_and_planning_chunks(corpus_dir, tokenizer, monkeypatch):
    monkeypatch.setattr(Batches, "CHUNK", 100)
    small, m = make(corpus_dir, tokenizer), 2 * make(corpus_dir, tokenizer).n_windows * S // T
    monkeypatch.undo()
    large = make(corpus_dir, tokenizer)
    assert small.starts[-1] == 0 and torch.equal(small(m).input_ids, large(m).input_ids)
    assert large.starts[m] > large.n_windows, "the test reaches the second epoch"


def test_threads_may_ask_at_once(corpus_dir, tokenizer, monkeypatch):
    """The loop counts while the next batch is built; an unguarded plan once came out with micro-batches twice."""
    serial = make(corpus_dir, tokenizer)
    serial.n_maskable(300)
    for _ in range(5):
        batches = make(corpus_dir, tokenizer)
        monkeypatch.setattr(Batches, "CHUNK", 100)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(batches.n_maskable, [300] * 8))
        assert batches.starts[:301] == serial.starts[:301] and batches.n_special[:300] == serial.n_special[:300]


# ----------------------------------------------------------------------------- masking


def masked(corpus_dir, tokenizer, m, rate=0.3, corruption="80/10/10", seed=5):
    batches = make(corpus_dir, tokenizer, micro_tokens=4_096)
    batch = batches(m)
    n = count_masked(batches, m, rate)
    return batch, n, *mask_tokens(batch, tokenizer, n, corruption, seed, m, torch.device("cpu"))


def test_exactly_the_asked_number_is_hidden_and_never_a_special_token(corpus_dir, tokenizer):
    for rate in (0.15, 0.3, 0.9):
        batch, n, ids, idx, labels = masked(corpus_dir, tokenizer, 2, rate)
        assert n == round(rate * int((~batch.special).sum())) == len(idx) == len(idx.unique())
        assert torch.equal(idx, idx.sort().values) and not batch.special[idx].any()
        assert torch.equal(labels, batch.input_ids[idx])
        untouched = torch.ones_like(batch.special).index_fill(0, idx, False)
        assert torch.equal(ids[untouched], batch.input_ids[untouched])


def test_corruption_shares_are_80_10_10(corpus_dir, tokenizer):
    counts, other_ids = np.zeros(3), []
    for m in range(12):
        _, _, ids, idx, labels = masked(corpus_dir, tokenizer, m)
        new = ids[idx]
        is_mask, is_kept = new == tokenizer.mask_id, new == labels
        counts += [int(is_mask.sum()), int((~is_mask & ~is_kept).sum()), int(is_kept.sum())]
        other_ids += new[~is_mask & ~is_kept].tolist()
    expected = counts.sum() * np.array([0.8, 0.1, 0.1])
    assert ((counts - expected) ** 2 / expected).sum() < 13.8, "chi-square, 2 degrees, p = 0.001"
    assert min(other_ids) > tokenizer.mask_id and max(other_ids) < tokenizer.vocab_size
    quarters = np.histogram(other_ids, bins=4, range=(5, tokenizer.vocab_size))[0]
    expected = len(other_ids) / 4
    assert ((quarters - expected) ** 2 / expected).sum() < 16.3, "random tokens are uniform: 3 degrees, p = 0.001"


def test_all_mask_corruption_hides_everything(corpus_dir, tokenizer):
    _, _, ids, idx, _ = masked(corpus_dir, tokenizer, 0, corruption="mask")
    assert (ids[idx] == tokenizer.mask_id).all()


def test_masks_are_uniform_over_places(corpus_dir, tokenizer):
    hits, chances = np.zeros(16), np.zeros(16)
    for m in range(16):
        batch, _, _, idx, _ = masked(corpus_dir, tokenizer, m)
        hits += np.histogram(idx, bins=16, range=(0, 4_096))[0]
        chances += np.histogram(np.flatnonzero(~batch.special), bins=16, range=(0, 4_096))[0]
    expected = chances * hits.sum() / chances.sum()
    assert ((hits - expected) ** 2 / expected).sum() < 37.7, "chi-square, 15 degrees, p = 0.001"


def test_masks_repeat_with_the_seed_and_differ_between_batches(corpus_dir, tokenizer):
    a, b, other = (masked(corpus_dir, tokenizer, m)[2] for m in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    assert not torch.equal(a, masked(corpus_dir, tokenizer, 1, seed=6)[2])


def test_random_bits_are_fixed_numbers_for_ever():
    """Checkpoints are resumed years later: these values must not change. Recomputed here with Python integers."""

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, stream in ((0, 0), (17, 123_456_789)):
        key = (mix((seed * 2 + 1) * golden % 2**64) + stream * golden) % 2**64
        expected = [mix((mix(key) + i * golden) % 2**64) % 2**62 for i in range(50)]
        assert random_bits(seed, stream, 50, "cpu").tolist() == expected
