"""studies/long_context.py: the same hidden tokens at every length, the losses of a plain model."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import prepare_texts, random_mlm, refused, save_checkpoint, some_documents

from corpus.shards import Corpus
from corpus.tokenizer import Tokenizer
from studies.long_context import draw, evaluate, long_documents, main, windows

FP32 = torch.float32


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory):
    """Twelve documents of several thousand tokens, made of short ones."""
    short = some_documents(240)
    texts = ["\n\n".join(short[i::12]) for i in range(12)]
    return prepare_texts(tmp_path_factory.mktemp("long"), texts, vocab_size=500, val_fraction=0.3)


@pytest.fixture(scope="module")
def tokenizer(long_corpus) -> Tokenizer:
    return Tokenizer.load(long_corpus)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    return save_checkpoint(folder, tokenizer, random_mlm(tokenizer))


def texts_of(corpus, n=3, tokens=254):
    return long_documents(Corpus(corpus, "train"), tokens, n, join=False)[0]


def test_windows_hold_the_text_between_cls_and_sep(tokenizer):
    ids = torch.arange(100, 125)
    flat, cu, place = windows(ids, 10, tokenizer)
    assert torch.equal(flat[place], ids)
    assert cu.tolist() == [0, 10, 20, 30, 33]
    for a, b in pairwise(cu.tolist()):
        assert flat[a] == tokenizer.cls_id and flat[b - 1] == tokenizer.sep_id
    assert len(flat) == len(ids) + 2 * 4, "nothing else is in them"


def test_losses_are_those_of_each_window_alone_and_of_the_same_tokens(long_corpus, tokenizer):
    """Recomputed window by window with the padded front door, from what the model was given."""
    model, seen, lengths = random_mlm(tokenizer), [], (32, 64, 256)
    note = lambda _, args, kwargs: seen.append((args[0], kwargs))
    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    rows = evaluate(model, tokenizer, texts_of(long_corpus), lengths, FP32)
    hook.remove()
    texts, tokens = [torch.from_numpy(t.astype(np.int64)) for t in texts_of(long_corpus)], []
    for k, (length, row) in enumerate(zip(lengths, rows)):
        losses = []
        for text, (flat, kwargs) in zip(texts, seen[k::3]):
            truth, _, place = windows(text, length, tokenizer)
            cu, hidden = kwargs["cu_seqlens"].tolist(), kwargs["masked_idx"]
            assert max(np.diff(cu)) <= length
            tokens.append(torch.searchsorted(place, hidden).tolist())  # where in the text
            for a, b in pairwise(cu):
                here = hidden[(hidden >= a) & (hidden < b)]
                logits = model(flat[None, a:b])[0, here - a]
                losses.append(F.cross_entropy(logits, truth[here], reduction="none"))
        assert row["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=2e-5)
        assert sum(b["n"] for b in row["by_position"]) == 3 * round(0.15 * 254)
    assert tokens[:3] == tokens[3:6] == tokens[6:] and tokens[0] != tokens[1]


def test_positions_and_gains_add_up(long_corpus, tokenizer):
    texts = texts_of(long_corpus)
    first, last = evaluate(random_mlm(tokenizer), tokenizer, texts, (32, 256), FP32)
    assert (first["gain"], first["gain_stderr"]) == (0, 0)
    assert last["gain"] == pytest.approx(first["loss"] - last["loss"], abs=2e-5)
    assert last["gain_stderr"] > 0
    for row in (first, last):
        bins = row["by_position"]
        assert bins[0]["from"] == 1 and bins[-1]["to"] == row["length"] - 1
        assert all(a["to"] + 1 == b["from"] for a, b in pairwise(bins))
        for key in ("loss", "gain"):
            mean = sum(b["n"] * b[key] for b in bins) / sum(b["n"] for b in bins)
            assert mean == pytest.approx(row[key], abs=2e-5)
    assert [b["from"] for b in last["by_position"]] == [1, 32, 64, 128]


def test_a_model_that_needs_far_context_gains_from_long_windows(tokenizer):
    """Random ids repeated every 100 tokens can be known from windows of 256, not of 64."""

    class Copies(torch.nn.Linear):
        """Predicts what stands 100 places before, where that is in the window."""

        def forward(self, flat, cu_seqlens, max_seqlen, masked_idx):
            start = cu_seqlens[torch.searchsorted(cu_seqlens, masked_idx, right=True) - 1]
            logits = torch.zeros(len(masked_idx), tokenizer.vocab_size)
            known = masked_idx - 100 > start
            logits[known, flat[masked_idx[known] - 100]] = 9.0
            return logits

    text = np.resize(np.random.default_rng(0).integers(10, 490, 100), 254)
    texts = [text.astype(np.uint16)] * 2
    short, long = evaluate(Copies(1, 1), tokenizer, texts, (64, 256), FP32)
    assert short["loss"] == pytest.approx(np.log(tokenizer.vocab_size), abs=1e-3)
    assert long["gain"] > 1
    by_position = {b["from"]: b["gain"] for b in long["by_position"]}
    assert by_position[1] == pytest.approx(0, abs=1e-4) and by_position[128] > 2


def test_documents_are_the_first_long_ones_or_joined_neighbours(long_corpus):
    corpus = Corpus(long_corpus, "train")
    lengths = corpus.lengths
    middle = int(np.sort(lengths)[len(lengths) // 2])
    texts, available = long_documents(corpus, middle, 2, join=False)
    assert available == (lengths >= middle).sum()
    long = np.flatnonzero(lengths >= middle)
    assert all(np.array_equal(t, corpus[int(i)][:middle]) for t, i in zip(texts, long))
    assert len(texts) == 2
    n = int(lengths[0] + 5)  # one document is not enough, two are
    texts, available = long_documents(corpus, n, 100, join=True)
    assert np.array_equal(texts[0], np.concatenate([corpus[0], corpus[1]])[:n])
    assert np.array_equal(texts[1][: lengths[2]], corpus[2][:n])  # the next begins behind
    assert len(texts) == available < len(lengths)


def test_a_record_and_a_figure_are_written(checkpoint, long_corpus, tmp_path, capsys):
    args = ["--data", str(long_corpus), "--lengths", "32", "128", "--split", "train"]
    for out in (tmp_path, tmp_path / "again"):
        main([str(checkpoint), *args, "--documents", "3", "--out", str(out)])
    record, again = [json.loads((out / "long-context-checkpoint.json").read_text())
                     for out in (tmp_path, tmp_path / "again")]
    assert record["type"] == "long_context" and record["lengths"] == again["lengths"]
    assert (record["documents"], record["masked"]) == (3, 3 * round(0.15 * 126))
    assert [row["length"] for row in record["lengths"]] == [32, 128]
    assert re.search(r": \d+ texts of 126 tokens or more, 3 taken", capsys.readouterr().out)
    assert (tmp_path / "long-context-checkpoint.png").read_bytes().startswith(b"\x89PNG")
    draw([record, record | {"run": "another", "seq_len": 64}], tmp_path / "two.png")


def test_bad_input_is_one_line_and_nothing_is_measured(
        checkpoint, long_corpus, corpus_dir, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("studies.long_context.evaluate", None)
    learned, gone = tmp_path / "learned", tmp_path / "gone"
    save_checkpoint(learned, tokenizer, random_mlm(tokenizer, position="learned", max_positions=64))
    (tmp_path / "file").touch()
    for run, data, more, expected in (
        (checkpoint, long_corpus, "--lengths 128 99999", "no val document has 99,997 tokens"),
        (learned, long_corpus, "--lengths 32 65", "learned has 64 learned positions; give"),
        (checkpoint, corpus_dir, "--lengths 32", "has another vocabulary than"),
        (checkpoint, long_corpus, "--lengths 2", "--lengths of 3 or more"),
        (gone, long_corpus, "--lengths 32", "gone: no checkpoint here"),
        (checkpoint, gone, "--lengths 32", "gone holds no meta.json"),
        (checkpoint, long_corpus, f"--lengths 32 --out {tmp_path / 'file' / 'out'}", "file/out")):
        with refused(expected):
            main([str(run), "--data", str(data), "--out", str(tmp_path / "out"), *more.split()])
    assert not (tmp_path / "out").exists()
