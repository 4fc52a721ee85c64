"""fill_mask.py: the right number of answers, real probabilities, words for a reader."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import refused, save_checkpoint, wordpiece
from transformers import BertConfig, BertForMaskedLM

from corpus.tokenizer import Tokenizer
from fill_mask import fill_mask, main, show
from model import EncoderConfig, MaskedLM

TEXTS = ["the cat sat on the mat.", "the dog sat on the cat.", "a man walks\n", "naïve café"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 290)


@pytest.fixture
def run(tmp_path, tokenizer) -> Path:
    """A run folder with two checkpoints; the later one has learned that every mask is " cat"."""
    for step in (1, 2):
        torch.manual_seed(0)
        shape = dict(n_layers=1, n_heads=2, d_model=16, d_ff=16)
        model = MaskedLM(EncoderConfig(tokenizer.vocab_size, **shape))
        if step == 2:
            with torch.no_grad():
                model.head.decoder.bias[tokenizer.encode(" cat")[0]] = 9.0
                model.head.decoder.bias[tokenizer.vocab_size :] = 99.0  # only pad the vocabulary
        save_checkpoint(tmp_path / f"runs/x/ckpt/step_{step:08d}", tokenizer, model, step=step)
    return tmp_path / "runs/x"


def test_every_mask_gets_top_k_answers_with_probabilities(run, tokenizer):
    model = MaskedLM.from_pretrained(run / "ckpt/step_00000002").train()
    answers = fill_mask(model, tokenizer, "the [MASK] sat on the [mask].", top_k=4)
    assert [(len(a), a[0][0]) for a in answers] == [(4, " cat")] * 2
    (everything,) = fill_mask(model, tokenizer, "[MASK]", top_k=10**6)
    assert sum(p for _, p in everything) == pytest.approx(1)


def test_words_are_clean_and_fragments_are_quoted():
    shown = {" cat": "cat", "é": "é", " ": "' '", "\n": r"'\n'", "\ufffd": repr("\ufffd"), "": "''"}
    assert {token: show(token) for token in shown} == shown


def test_a_hugging_face_bert_answers_as_transformers_does(tmp_path, capsys):
    vocabulary = wordpiece(tmp_path / "elsewhere.json", TEXTS, 90)
    tokenizer = Tokenizer.load(vocabulary)
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = BertConfig(vocab_size=tokenizer.vocab_size, **shape, initializer_range=0.5)
    theirs, text = BertForMaskedLM(config).eval(), "the [MASK] sat on"
    theirs.save_pretrained(tmp_path)
    with refused("no tokenizer at"):
        main([str(tmp_path), text])
    main([str(tmp_path), text, "--tokenizer", str(vocabulary)])
    ids = torch.tensor([[tokenizer.cls_id, *tokenizer.encode_with_masks(text), tokenizer.sep_id]])
    best = [x.tolist() for x in theirs(ids).logits[0, 2].softmax(-1).topk(3)]
    expected = [f"{tokenizer.hf.id_to_token(t)} {p:.3f}" for p, t in zip(*best)]
    assert capsys.readouterr().out.splitlines()[-1].strip() == "   ".join(expected)


def test_a_tokenizer_too_large_for_the_model_is_refused(tmp_path, run):
    larger = Tokenizer.train([*TEXTS, *(f"word{i} {i:x}{i:x}" for i in range(3000))] * 2, 400)
    larger.save(tmp_path / "larger")
    with refused("the tokenizer has 400 entries, the model 320: not its"):
        main([str(run), "a [MASK]", "--tokenizer", str(tmp_path / "larger")])


def test_a_run_folder_means_its_latest_checkpoint_and_answers_are_three(run, capsys):
    texts = ["the [MASK] sat on the [MASK].", "a [MASK]."]
    main([str(run), *texts])
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == texts
    answers = [block.splitlines()[1:] for block in blocks]
    assert [len(lines) for lines in answers] == [2, 1]  # a line for each mask
    for line in answers[0] + answers[1]:
        assert re.fullmatch(r"  cat 0\.\d{3}(   .+ 0\.\d{3}){2}", line)


def test_json_is_a_line_for_each_sentence(run, tokenizer, capsys):
    texts = ['the [MASK] "sat" on the [MASK]', "naïve [MASK]"]
    main([str(run), *texts, "--json", "--top_k", "2"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in found] == texts
    model = MaskedLM.from_pretrained(run)
    for row in found:
        expected = fill_mask(model, tokenizer, row["text"], 2)
        for mask, answers in zip(row["masks"], expected, strict=True):
            assert [x["token"] for x in mask] == [token for token, _ in answers]
            p = [x["probability"] for x in mask]
            assert p == pytest.approx([p for _, p in answers], abs=1e-6)


def test_without_sentences_it_asks_until_an_empty_line(run, capsys, monkeypatch):
    lines = iter(["the [MASK] sat", "no hole here", "a [MASK]", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    main([str(run)])
    captured = capsys.readouterr()
    assert captured.out.count("  cat 0.") == 2  # a slip of the pen does not end the session
    assert "no [MASK] in 'no hole here'" in captured.out


def test_bad_input_gets_one_line(tmp_path, run):
    for args, expected in (
        ([str(tmp_path / "gone"), "a [MASK]"], "gone: no checkpoint here"),
        ([str(tmp_path), "a [MASK]"], "no checkpoint"),
        ([str(run), "nothing hidden"], "no [MASK] in 'nothing hidden'"),
        ([str(run), "a [MASK]", "--top_k", "0"], "--top_k 0")):
        with refused(expected):
            main(args)
