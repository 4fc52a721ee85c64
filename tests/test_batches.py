"""batches.py: exact micro-batches, a pure function of (seed, m), and honest masking."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import prepare_texts, some_documents

from batches import Batch, Batches, count_masked, mask_tokens, one_mask_each, random_bits, shuffled
from corpus.shards import Corpus

T, S = 1_024, 64


def make(corpus_dir, tokenizer, documents="all", split="train", seed=3, micro_tokens=T,
         seq_len=S, **more) -> Batches:
    how = tokenizer, seq_len, micro_tokens, documents, seed
    return Batches([Corpus(corpus_dir, split)], *how, **more)


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
        specials = b.special.nonzero().flatten().tolist()
        assert set(specials) == {*starts.tolist(), *ends.tolist()}
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


def test_micro_batch_m_does_not_depend_on_what_was_asked_before(corpus_dir, tokenizer):
    forward, direct = make(corpus_dir, tokenizer), make(corpus_dir, tokenizer)
    in_order = [forward(m) for m in range(31)]
    for m in (30, 7, 0):
        b = direct(m)
        assert torch.equal(b.input_ids, in_order[m].input_ids)
        assert torch.equal(b.cu_seqlens, in_order[m].cu_seqlens)
    assert not torch.equal(make(corpus_dir, tokenizer, seed=4)(0).input_ids, in_order[0].input_ids)


@pytest.mark.parametrize("pairs", [0.0, 0.5])
def test_long_streams_cross_epochs_and_planning_chunks(corpus_dir, tokenizer, monkeypatch, pairs):
    monkeypatch.setattr(Batches, "CHUNK", 100)
    small, large = (make(corpus_dir, tokenizer, pairs=pairs) for _ in range(2))
    m = 2 * small.n_windows * S // T
    assert small.n_maskable(m) == int((~small(m).special).sum()), "counted from far away"
    monkeypatch.undo()
    assert torch.equal(small(m).input_ids, large(m).input_ids)
    assert large.starts[m] > large.n_windows, "the test reaches the second epoch"


def test_pairs_are_a_text_and_its_noisy_copy_in_two_segments(corpus_dir, tokenizer):
    """Their share of the windows; counted before they are built; others stay what they were."""
    plain, paired = make(corpus_dir, tokenizer), make(corpus_dir, tokenizer, pairs=0.5)
    n_windows, n_pairs, common = 0, 0, []
    for m in range(60):
        b, old, sep = paired(m), plain(m), tokenizer.sep_id
        assert int((~b.special).sum()) == paired.n_maskable(m)
        for i, j in zip(b.cu_seqlens[:-2].tolist(), b.cu_seqlens[1:-1].tolist()):
            ids, types = b.input_ids[i:j].tolist(), b.token_type_ids[i:j].tolist()
            n_windows += j - i >= 10
            if 1 not in types:
                assert ids == old.input_ids[i:j].tolist()
                continue
            half = (j - i - 3) // 2
            assert [k for k, x in enumerate(ids) if x == sep] == [half + 1, j - i - 1]
            assert types == [0] * (half + 2) + [1] * (j - i - half - 2)
            first, second = ids[1 : half + 1], ids[half + 2 : 2 * half + 2]
            assert old.input_ids[i + 1 : i + 1 + half].tolist() == first
            common.append(len({*first} & {*second}) / len({*first}))
            n_pairs += 1
    assert 0.4 < n_pairs / n_windows < 0.6 and 0.8 < np.mean(common) < 0.95


def test_threads_may_ask_at_once(corpus_dir, tokenizer, monkeypatch):
    """The loop counts while the next batch is built; a plan once had micro-batches twice."""
    serial = make(corpus_dir, tokenizer)
    serial.n_maskable(300)
    for _ in range(5):
        batches = make(corpus_dir, tokenizer)
        monkeypatch.setattr(Batches, "CHUNK", 100)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(batches.n_maskable, [300] * 8))
        assert batches.starts[:301] == serial.starts[:301]
        assert batches.n_special[:300] == serial.n_special[:300]


# ----------------------------------------------------------------------------- mixtures
@pytest.fixture(scope="module")
def corpora(corpus_dir, tmp_path_factory) -> list[Corpus]:
    """Three corpora of different sizes with one tokenizer."""
    texts, found = some_documents(700), [Corpus(corpus_dir)]
    for a, b in ((400, 460), (460, 700)):
        folder = tmp_path_factory.mktemp("more")
        found.append(Corpus(prepare_texts(folder, texts[a:b], tokenizer=str(corpus_dir))))
    return found


def mixture(corpora, tokenizer, shares, documents="all", seed=3, seq_len=S) -> Batches:
    return Batches(corpora, tokenizer, seq_len, T, documents, seed, shares)


def drawn(batches: Batches, places: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Windows at these places of the stream: corpus of each, and its document and offset."""
    document, offset, _ = batches._windows(places)
    source = np.searchsorted(batches.first_document, document, side="right") - 1
    return source, list(zip(document.tolist(), offset.tolist()))


@pytest.mark.parametrize("shares", [[0.7, 0.2, 0.1], [1, 1, 2], [0.001, 0.998, 0.001],
                                    [0.0, 1.0, 3.0]])
@pytest.mark.parametrize("documents", ["first", "all"])
def test_every_block_of_1000_windows_has_exactly_the_shares(corpora, tokenizer, shares, documents):
    batches = mixture(corpora, tokenizer, shares, documents)
    source, windows = drawn(batches, np.arange(20_000))
    expected = [round(1_000 * s / sum(shares)) for s in shares]
    for block in source.reshape(20, 1_000):
        assert np.bincount(block, minlength=3).tolist() == expected
    if shares[0] == 0.7:  # mixed within the block, too: 5 standard deviations of a random order
        assert abs(np.bincount(source[:200], minlength=3) - [140, 40, 20]).max() < 30
    for k, n in enumerate(np.diff(batches.edges).tolist()):
        mine = [w for w, s in zip(windows, source) if s == k]
        epochs = [tuple(mine[begin : begin + n]) for begin in range(0, len(mine), n)]
        assert all(len({*epoch}) == len(epoch) for epoch in epochs), "each window once in an epoch"
        assert len({*epochs}) == len(epochs), "every epoch has an order of its own"


def test_a_share_that_rounding_makes_none_is_refused(corpora, tokenizer):
    with pytest.raises(ValueError, match="would never be drawn"):
        mixture(corpora, tokenizer, [1.5, 1, 997.5])


def test_folders_without_shares_are_one_corpus_every_document_once_an_epoch(corpora, tokenizer):
    for documents in ("first", "all"):
        batches = mixture(corpora, tokenizer, None, documents)
        counts = Counter(drawn(batches, np.arange(batches.n_windows))[1])
        assert set(counts.values()) == {1}
        assert {d for d, _ in counts} == set(range(sum(map(len, corpora))))
        source, _ = drawn(batches, np.arange(batches.n_windows // 2))  # with half of each
        found, all_of = np.bincount(source, minlength=3), np.diff(batches.first_document)
        if documents == "first":
            assert (abs(found - all_of / 2) < 5 * np.sqrt(all_of) / 2).all()


def test_text_of_a_batch_is_the_text_of_its_documents_numbered_across_folders(corpora, tokenizer):
    batches, texts = mixture(corpora, tokenizer, None), [text for c in corpora for text in c]
    document, offset, _ = batches._windows(np.arange(batches.n_windows))
    ids, cu = batches(0).input_ids, batches(0).cu_seqlens.tolist()
    for d, o, a, b in zip(document, offset, cu[:-1], cu[1:]):
        assert ids[a + 1 : b - 1].tolist() == texts[d][o : o + b - a - 2].tolist()


# ----------------------------------------------------------------------------- masking
def masked(corpus_dir, tokenizer, m, rate=0.3, corruption="80/10/10", seed=5):
    batches = make(corpus_dir, tokenizer, micro_tokens=4_096)
    batch = batches(m)
    n = count_masked(batches, m, rate)
    return batch, n, *mask_tokens(batch, tokenizer, n, corruption, seed, m, torch.device("cpu"))


def test_effective_length_weighs_by_tokens(corpus_dir, tokenizer):
    batches = make(corpus_dir, tokenizer, "first", seq_len=32)
    lengths = [min(len(d), 30) + 2 for d in Corpus(corpus_dir)]
    assert batches.effective_length() == pytest.approx(sum(n * n for n in lengths) / sum(lengths))


def test_exactly_the_asked_number_is_hidden_and_never_a_special_token(corpus_dir, tokenizer):
    for rate, corruption in ((0.15, "80/10/10"), (0.3, "mask"), (0.9, "80/10/10")):
        batch, n, ids, idx, labels = masked(corpus_dir, tokenizer, 2, rate, corruption)
        assert n == len(idx) == len(idx.unique())
        assert n == 16 * round(round(rate * int((~batch.special).sum())) / 16)
        assert torch.equal(idx, idx.sort().values) and not batch.special[idx].any()
        assert torch.equal(labels, batch.input_ids[idx])
        untouched = torch.ones_like(batch.special).index_fill(0, idx, False)
        assert torch.equal(ids[untouched], batch.input_ids[untouched])
        assert (ids[idx] == tokenizer.mask_id).all() == (corruption == "mask")


def test_number_to_hide_is_exact_where_small_and_never_more_than_there_is():
    for there, rate, n in ((1_000, 0.2, 200), (1_000, 0.3, 304), (3, 0.1, 1), (300, 0.999, 300),
                           (1_710, 0.15, 256)):
        assert count_masked(SimpleNamespace(n_maskable=lambda m, there=there: there), 0, rate) == n


def test_corruption_shares_are_80_10_10(corpus_dir, tokenizer):
    counts = np.zeros(3)
    for m in range(12):
        _, _, ids, idx, labels = masked(corpus_dir, tokenizer, m)
        is_mask, is_kept = ids[idx] == tokenizer.mask_id, ids[idx] == labels
        counts += [int(x.sum()) for x in (is_mask, ~is_mask & ~is_kept, is_kept)]
    expected = counts.sum() * np.array([0.8, 0.1, 0.1])
    assert ((counts - expected) ** 2 / expected).sum() < 13.8, "chi-square, 2 degrees, p = 0.001"


def test_masks_repeat_with_the_seed_and_differ_between_batches(corpus_dir, tokenizer):
    a, b, other = (masked(corpus_dir, tokenizer, m)[2] for m in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, other)
    assert not torch.equal(a, masked(corpus_dir, tokenizer, 1, seed=6)[2])


def test_random_bits_are_fixed_numbers_for_ever():
    """Checkpoints are resumed years later. Recomputed here with Python's integers."""

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, stream in ((0, 0), (17, 123_456_789)):
        key = (mix((seed * 2 + 1) * golden % 2**64) + stream * golden) % 2**64
        expected = [mix((mix(key) + i * golden) % 2**64) % 2**62 for i in range(50)]
        assert random_bits(seed, stream, 50, "cpu").tolist() == expected


def test_random_tokens_are_uniform_and_never_special_where_the_specials_lie_inside_the_vocabulary():
    """As BERT's do: [PAD] 0, [UNK] 100, [CLS] 101, [SEP] 102, [MASK] 103; and two markers."""
    names, markers, n = [0, 100, 101, 102, 103], [120, 199], 200_000
    bert = SimpleNamespace(vocab_size=200, names=names, markers=markers, mask_id=103)
    batch = Batch(torch.full((n,), 150), torch.tensor([0, n], dtype=torch.int32),
                  torch.zeros(n, dtype=torch.bool), 1)
    ids, idx, _ = mask_tokens(batch, bert, n // 2, "80/10/10", 7, 0, torch.device("cpu"))
    counts = torch.bincount(ids[idx], minlength=200)
    assert len(counts) == 200 and counts[[0, 100, 101, 102, *markers]].sum() == 0
    counts = counts[[i for i in range(200) if i not in {*names, *markers, 150}]].double()
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert counts.mean() > 40 and chi < 262, "191 degrees, p = 0.0005"


def test_every_place_in_a_document_and_in_the_batch_is_hidden_as_often(corpus_dir, tokenizer):
    """Near [CLS], near [SEP], and over the micro-batch."""
    hits, chances = np.zeros((3, S)), np.zeros((3, S))
    for m in range(24):
        batch, _, _, idx, _ = masked(corpus_dir, tokenizer, m)
        cu = batch.cu_seqlens.numpy()
        text = np.flatnonzero(~batch.special)
        for places, into in ((idx.numpy(), hits), (text, chances)):
            document = np.searchsorted(cu, places, side="right") - 1
            into[0] += np.bincount(places - cu[document], minlength=S)
            into[1] += np.bincount(cu[document + 1] - 1 - places, minlength=S)
            into[2] += np.bincount(places * S // 4_096, minlength=S)
    assert hits[:2, 0].sum() == 0, "no [CLS], no [SEP]"
    expected = chances * (hits.sum(1) / chances.sum(1))[:, None]
    chi = ((hits - expected) ** 2 / np.maximum(expected, 1e-9)).sum(1)
    assert (chi < 107).all(), "chi-square, 61 to 63 degrees, p = 0.0005"


def test_one_mask_each_hides_every_token_once_in_a_whole_document(corpus_dir, tokenizer):
    batch = make(corpus_dir, tokenizer, split="val")(0)
    whole = {tuple(d.tolist()) for d in batch.input_ids.tensor_split(batch.cu_seqlens[1:-1].long())}
    text, n = (~batch.special).nonzero().flatten(), 300
    for micro_tokens in (1, 500, 10**6):
        pieces = list(one_mask_each(batch, tokenizer, n, micro_tokens))
        assert torch.equal(torch.cat([labels for *_, labels in pieces]), batch.input_ids[text[:n]])
        assert all(len(ids) <= max(micro_tokens, S) for ids, *_ in pieces)
        for ids, cu_seqlens, masked_idx, labels in pieces:
            assert (ids == tokenizer.mask_id).sum() == len(labels) == len(cu_seqlens) - 1
            restored = ids.index_put((masked_idx,), labels)
            assert {tuple(d.tolist())
                    for d in restored.tensor_split(cu_seqlens[1:-1].long())} <= whole
    assert list(one_mask_each(batch, tokenizer, 0, 500)) == []
    every = one_mask_each(batch, tokenizer, 10**6, 500)
    assert sum(len(labels) for *_, labels in every) == len(text)
