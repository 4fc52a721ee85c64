"""export_hf.py: transformers, sentence-transformers and ONNX give what our model gives, on the same tokens."""

import base64
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import some_documents
from safetensors import safe_open
from safetensors.torch import save_file

from corpus.tokenizer import Tokenizer
from export import huggingface as export_hf
from export.huggingface import fast_tokenizer, main, modeling_source
from fill_mask import fill_mask
from model import EncoderConfig, MaskedLM, SentenceEmbedder, SequenceClassifier, TokenClassifier
from pretrain import load_start, train
from recipes import TrainConfig, make_presets

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "../shared/golden/mosaicbert_small.safetensors"
SHAPE = dict(n_layers=2, n_heads=2, d_model=32, d_ff=48, embedding_dropout=0.0, output_dropout=0.0, mlp_dropout=0.0)
BERT = SHAPE | dict(position="learned", mlp="gelu", max_positions=64, low_precision_norm=False)
ODD = [
    "ΟΔΥΣΣΕΥΣ ΚΑΙ Α.Σ. ΑΣ'Α 'Σ' ΣΣ Σ",  # the final sigma, and sigmas that only look final
    "İstanbul IĞDIR ß ẞ ǅ ﬁ Å",
    "naïve cafe\u0301 e\u0301\u0301\u0301 \u200d👩‍👩‍👧‍👦🏽 \U0001f1e9\U0001f1ea",
    "日本語のテキスト 한국어 العربية עברית हिन्दी ไทย",
    "\t\ttabs\r\nand\u2028lines\x0b\x0c  \u3000 \xa0 " + " " * 100 + "\n" * 70 + "end ",
    "²³¼ ١٢٣ 1234567890 Ⅻ x²" + "-" * 99 + "=" * 64 + "a" * 200,
    "\x00\x7f\ufeff\ufffd\ue000 don't DON'T we’ll",
    "",
]


def randomized(model, seed=0):
    """Weights large enough that a wrong one shows: N(0, 0.02) and zero biases hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(corpus_dir) -> Tokenizer:
    return Tokenizer.load(corpus_dir)


def checkpoint(folder: Path, tokenizer: Tokenizer, model) -> Path:
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def random_mlm(tokenizer, **shape) -> MaskedLM:
    return randomized(MaskedLM(EncoderConfig(tokenizer.vocab_size, **(SHAPE | shape))))


@pytest.fixture(scope="module")
def run(corpus_dir, tokenizer, tmp_path_factory) -> Path:
    """A finished pretraining run of two steps, its weights made random and large afterwards."""
    settings = dict(max_steps=2, seq_len=32, batch_tokens=256, micro_tokens=256, eval_tokens=256, pppl_tokens=0)
    where = dict(data=(str(corpus_dir),), out=str(tmp_path_factory.mktemp("runs")), name="tiny-run")
    path = train("mosaic-tiny", TrainConfig(**where, **settings, device="cpu", model=EncoderConfig(**SHAPE)))
    random_mlm(tokenizer).save_pretrained(path / "ckpt/step_00000002")
    return path


@pytest.fixture(scope="module")
def exported(run) -> Path:
    out = run.parent / "exported"
    main([str(run), "--out", str(out), "--onnx"])
    return out


def load(auto: str, folder: Path, **kwargs):
    import transformers

    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def batch(side: str = "right", seed: int = 0):
    """ids, mask and segments (4, 24) of 24, 1, 9 and 17 tokens, garbage in the padding."""
    g = torch.Generator().manual_seed(seed)
    ids, types = torch.randint(5, 90, (4, 24), generator=g), torch.randint(0, 2, (4, 24), generator=g)
    mask = (torch.arange(24) < torch.tensor([24, 1, 9, 17])[:, None]).long()
    return ids, mask.flip(1) if side == "left" else mask, types


def assert_near(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------- transformers


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mosaic", {}),
        ("three-heads", dict(n_heads=3, d_model=36)),  # ALiBi's slopes for no power of two
        ("learned", BERT),
        ("rope", dict(position="rope-alibi", alibi_ratio=8.0)),
        ("ablation", dict(norm="pre", bias=False, tie_head=False, position="learned", max_positions=30, d_ff=40)),
    ],
)
def test_logits_equal_ours_padded_on_either_side_or_not(tokenizer, tmp_path, name, shape):
    ours = random_mlm(tokenizer, **shape)
    checkpoint(tmp_path / "in", tokenizer, ours)
    main([str(tmp_path / "in"), "--out", str(tmp_path / name)])
    theirs = load("AutoModelForMaskedLM", tmp_path / name)
    with torch.no_grad():
        for side in ("right", "left"):
            ids, mask, types = batch(side)
            real, logits = mask.bool(), theirs(ids, mask, types).logits
            assert logits.shape[-1] == tokenizer.vocab_size, "no logits for the rows that pad the vocabulary"
            assert_near(logits[real], ours(ids, mask, types)[real][:, : tokenizer.vocab_size])
            hidden = load("AutoModel", tmp_path / name)(ids, mask, types).last_hidden_state
            assert_near(hidden, ours.encoder(ids, mask, types))
        assert_near(theirs(ids).logits, ours(ids)[..., : tokenizer.vocab_size])
    if "alibi" in ours.cfg.position:  # no weight of the checkpoint, so transformers asks for it
        assert torch.equal(theirs.encoder.layers[-1].attention.slopes, ours.encoder.layers[-1].attention.slopes)


def test_loss_and_every_gradient_equal_ours(tokenizer, tmp_path):
    ours = random_mlm(tokenizer, vocab_multiple=1)
    checkpoint(tmp_path / "in", tokenizer, ours)
    main([str(tmp_path / "in"), "--out", str(tmp_path / "gradients")])
    theirs = load("AutoModelForMaskedLM", tmp_path / "gradients")
    ids, mask, types = batch()
    labels = torch.where((torch.arange(24) % 3 == 0) & mask.bool(), ids, -100)
    loss, _ = ours(ids, mask, types, labels=labels)
    output = theirs(ids, mask, types, labels=labels)
    assert_near(output.loss, loss)
    loss.backward()
    output.loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(gradients[name].grad, p.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("cls", "auto"),
    [
        (SequenceClassifier, "AutoModelForSequenceClassification"),
        (TokenClassifier, "AutoModelForTokenClassification"),
    ],
)
def test_classifiers_equal_ours(run, tokenizer, tmp_path, cls, auto):
    ours = randomized(cls.from_pretrained(run, n_labels=3))
    checkpoint(tmp_path / "in", tokenizer, ours)
    main([str(tmp_path / "in"), "--out", str(tmp_path / cls.__name__)])
    theirs = load(auto, tmp_path / cls.__name__)
    assert theirs.config.num_labels == 3
    for side in ("right", "left"):
        ids, mask, types = batch(side)
        real = mask.bool() if cls is TokenClassifier else ...
        with torch.no_grad():
            assert_near(theirs(ids, mask, types).logits[real], ours(ids, mask, types)[real])
    again = cls.from_pretrained(tmp_path / cls.__name__)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values()))


def test_a_masked_lm_loads_as_classifier_with_a_new_head(exported):
    for auto, shape in (("SequenceClassification", (4, 5)), ("TokenClassification", (4, 24, 5))):
        model = load(f"AutoModelFor{auto}", exported, num_labels=5)
        ids, mask, _ = batch()
        assert model(ids, mask).logits.shape == shape
        assert 0.01 < model.classifier.weight.std() < 0.03
        assert not model.classifier.bias.any()


def test_exported_weights_come_back_bit_for_bit(run, exported):
    before, after = (MaskedLM.from_pretrained(f).state_dict() for f in (run, exported))
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_the_folder_needs_neither_triton_nor_this_project(exported, tmp_path):
    ids, mask, _ = batch()
    code = f"""
import sys
for name in ("triton", "model", "kernels", "corpus"):
    sys.modules[name] = None  # importing it fails
import torch
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained({str(exported)!r}, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.tensor({ids.tolist()}), torch.tensor({mask.tolist()})).logits, "logits.pt")
"""
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, capture_output=True)
    real = mask.bool()
    ours = MaskedLM.from_pretrained(exported).eval()(ids, mask).detach()
    assert_near(torch.load(tmp_path / "logits.pt")[real], ours[real][:, : torch.load(tmp_path / "logits.pt").shape[-1]])


def test_trainer_fine_tunes_and_the_result_loads_here_and_there(exported, tmp_path):
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer = load_tokenizer(exported)
    texts = ("returns a list of numbers", "the number of items"), ("raises an error", "it is not found there")
    data = [{**tokenizer(t), "label": label} for label, group in enumerate(texts) for t in group] * 6
    model = load("AutoModelForSequenceClassification", exported, num_labels=2)
    args = TrainingArguments(
        str(tmp_path / "work"), max_steps=12, learning_rate=0.02, logging_steps=1, gradient_checkpointing=True,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, per_device_train_batch_size=12,
    )  # fmt: skip
    collate = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, args, train_dataset=data, data_collator=collate, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    trainer.save_model(str(tmp_path / "tuned"))
    inputs = collate(data[:4])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        expected = model.eval()(ids, mask).logits
        assert_near(load("AutoModelForSequenceClassification", tmp_path / "tuned")(ids, mask).logits, expected)
        assert_near(SequenceClassifier.from_pretrained(tmp_path / "tuned").eval()(ids, mask), expected)


def test_a_fine_tuned_export_is_exported_again_with_its_labels(exported, tmp_path):
    names = {0: "neg", 1: "neutral", 2: "pos"}
    more = dict(num_labels=3, id2label=names, label2id={v: k for k, v in names.items()})
    model = load("AutoModelForSequenceClassification", exported, problem_type="multi_label_classification", **more)
    model.save_pretrained(tmp_path / "tuned")
    load_tokenizer(exported).save_pretrained(tmp_path / "tuned")
    main([str(tmp_path / "tuned"), "--out", str(tmp_path / "again")])
    again = load("AutoModelForSequenceClassification", tmp_path / "again")
    assert again.config.id2label == names and again.config.problem_type == "multi_label_classification"
    ids, mask, types = batch()
    with torch.no_grad():
        assert_near(again(ids, mask, types).logits, model(ids, mask, types).logits)


def test_arguments_of_other_models_may_be_given_switched_off(exported):
    """peft and transformers' pipelines do."""
    ids, mask, _ = batch()
    for auto in ("", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"):
        model = load(f"AutoModel{auto}", exported)
        plain = model(ids, mask, return_dict=False)[0]
        off = dict(inputs_embeds=None, output_attentions=False, output_hidden_states=None)
        assert torch.equal(model(ids, mask, return_dict=False, **off)[0], plain)
        with pytest.raises(ValueError, match="do not take output_hidden_states"):
            model(ids, mask, output_hidden_states=True)


@pytest.mark.parametrize("multiple", [None, 8, 48])
def test_more_tokens_can_be_added_and_saved(exported, tmp_path, multiple):
    model = load("AutoModelForMaskedLM", exported)
    before = model(batch()[0]).logits
    model.resize_token_embeddings(before.shape[-1] + 40, pad_to_multiple_of=multiple)
    model.save_pretrained(tmp_path / "larger")
    after = load("AutoModelForMaskedLM", tmp_path / "larger")(batch()[0]).logits
    assert after.shape[-1] >= before.shape[-1] + 40
    assert_near(after[..., : before.shape[-1]], before)


def test_official_mosaicbert_weights_run_as_upstream_ran_them(tmp_path):
    if not GOLDEN.exists():
        pytest.skip("golden vectors of upstream MosaicBERT are not in a plain clone")
    with safe_open(GOLDEN, "pt") as f:
        golden = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        config = f.metadata()["config"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/config.json").write_text(config)
    weights = {k.removeprefix("mlm."): v.contiguous() for k, v in golden.items() if k.startswith("mlm.")}
    save_file(weights, tmp_path / "in/model.safetensors")
    Tokenizer.train(some_documents(50), 290).save(tmp_path / "in")
    main([str(tmp_path / "in"), "--out", str(tmp_path / "official")])
    inputs = [golden[k] for k in ("input_ids", "attention_mask", "token_type_ids")]
    output = load("AutoModelForMaskedLM", tmp_path / "official")(*inputs, labels=golden["labels"])
    real = golden["attention_mask"].bool()
    assert_near(output.logits[real], golden["logits"][real])
    assert_near(output.loss.reshape(1), golden["loss"])


# ----------------------------------------------------------------------------- the code that travels


def sources() -> list[str]:
    return [(ROOT / f).read_text(encoding="utf-8") for f in ("model.py", "kernels.py", "export/modeling.py")]


def test_the_export_holds_the_code_of_today_and_follows_a_change_in_model_py(exported):
    model_py, *others = sources()
    today = modeling_source(model_py, *others)
    assert (exported / "modeling_nanomosaicbert.py").read_text(encoding="utf-8") == today
    assert "F.gelu(self.dense(x))" in model_py
    assert "F.relu(self.dense(x))" in modeling_source(model_py.replace("F.gelu(self", "F.relu(self"), *others)


def test_a_new_helper_in_model_py_travels_too():
    model_py, *others = sources()
    changed = model_py.replace("return self.dropout(self.norm(x))", "return self.dropout(twice(self.norm(x)))")
    assert changed != model_py
    changed += "\n\ndef twice(x):\n    return stack([x, x]).sum(0) * FACTOR\n\n\nFACTOR = 1\n"
    changed = changed.replace("from torch import Tensor\n", "from torch import Tensor, stack\n")
    text = modeling_source(changed, *others)
    for piece in ("def twice(x)", "FACTOR = 1", "from torch import Tensor, stack"):
        assert piece in text


def test_code_that_only_triton_can_run_is_refused():
    model_py, *others = sources()
    changed = model_py.replace("x = self.word(input_ids)", "x = _attn_fwd_loop(self.word(input_ids))")
    assert changed != model_py
    changed += "\nfrom kernels import _attn_fwd_loop\n"
    with pytest.raises(ValueError, match=r"kernels\.py: _attn_fwd_loop is no plain PyTorch"):
        modeling_source(changed, *others)


# ----------------------------------------------------------------------------- tokenizer


def test_tokens_equal_ours_on_10_000_lines_and_odd_unicode(exported, tokenizer):
    lines = [line[:400] for text in some_documents(3000) for line in text.split("\n")][:10_000] + ODD
    fast = load_tokenizer(exported)
    assert fast.is_fast
    for line, ours, theirs in zip(lines, tokenizer.encode_batch(lines), fast(lines)["input_ids"]):
        assert theirs == [tokenizer.cls_id, *ours, tokenizer.sep_id], line


def test_every_unicode_character_gives_the_same_tokens():
    from unicodedata import category

    cased = Tokenizer.train(some_documents(50), 300, lowercase=False)
    lowercase = Tokenizer.train(some_documents(50), 300)
    known = [c for c in map(chr, range(0x110000)) if category(c) not in ("Cs", "Cn")]  # Cn: newer than this Python
    lines = ["a".join(known[i : i + 50]) for i in range(0, len(known), 50)]
    for ours in (cased, lowercase):
        theirs = [e.ids for e in fast_tokenizer(ours).encode_batch(lines, add_special_tokens=False)]
        assert theirs == ours.encode_batch(lines)


def test_a_word_in_the_vocabulary_needs_no_merges():
    """As tiktoken: "xyz" is a token although no two tokens join to it, and "aab" takes the lowest rank first."""
    ours = Tokenizer.train(some_documents(50), 261)
    lines = [line.split() for line in ours.vocabulary.splitlines()]
    extra = [b"xyz", b"ab", b"aab", b"aa", b"ba", b"bab"]
    lines += [[base64.b64encode(token), b"%d" % (261 + i)] for i, token in enumerate(extra)]
    ours = Tokenizer(b"\n".join(b" ".join(line) for line in lines), ours.meta | {"vocab_size": 267})
    fast = fast_tokenizer(ours)
    assert ours.encode("xyz") == [261]
    words = ["".join(letters) for n in range(1, 8) for letters in itertools.product("abc", repeat=n)]
    words.append("xyz")
    assert [fast.encode(w, add_special_tokens=False).ids for w in words] == ours.encode_batch(words)


def test_pairs_masks_and_decoding(exported, tokenizer):
    fast = load_tokenizer(exported)
    a, b = tokenizer.encode("The cat"), tokenizer.encode("it SAT.")
    both = fast("The cat", "it SAT.")
    assert both["input_ids"] == [tokenizer.cls_id, *a, tokenizer.sep_id, *b, tokenizer.sep_id]
    assert both["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert fast("the [MASK] is")["input_ids"][1:-1] == tokenizer.encode_with_masks("the [MASK] is")
    assert fast.decode(fast("The naïve  cat\n")["input_ids"], skip_special_tokens=True) == "the naïve  cat\n"
    ids = (fast.pad_token_id, fast.unk_token_id, fast.cls_token_id, fast.sep_token_id, fast.mask_token_id)
    assert ids == tuple(getattr(tokenizer, f"{n}_id") for n in ("pad", "unk", "cls", "sep", "mask"))
    assert fast.model_max_length == 32, "the length the run was trained at"
    assert len(fast) == tokenizer.vocab_size


def wordpiece(folder: Path) -> Path:
    """A small tokenizer.json as BERT's: WordPiece, its own ids and template."""
    from tokenizers import BertWordPieceTokenizer

    learner = BertWordPieceTokenizer()
    learner.train_from_iterator(some_documents(100), vocab_size=500, show_progress=False)
    learner.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_hugging_face_tokenizer_is_passed_through(tmp_path):
    ours = Tokenizer.load(wordpiece(tmp_path))
    checkpoint(tmp_path / "in", ours, random_mlm(ours))
    main([str(tmp_path / "in"), "--out", str(tmp_path / "wordpiece")])
    fast, text = load_tokenizer(tmp_path / "wordpiece"), "Naïve cats, unbelievably [MASK]!"
    assert fast(text)["input_ids"] == [ours.cls_id, *ours.encode_with_masks(text), ours.sep_id]
    assert fast(["a", "b c d"], padding=True)["input_ids"][0][-1] == ours.pad_id


def test_a_byte_level_tokenizer_of_others_frames_texts_too(tmp_path):
    """RoBERTa's kind: its post-processor only trims offsets, so [CLS] and [SEP] have to be added."""
    from tokenizers import ByteLevelBPETokenizer

    learner = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learner.train_from_iterator(some_documents(100), 400, special_tokens=specials, show_progress=False)
    learner.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path / "tokenizer.json")
    checkpoint(tmp_path / "in", ours, random_mlm(ours))
    main([str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    fast = load_tokenizer(tmp_path / "out")
    for text in ("the cat", ""):
        assert fast(text)["input_ids"] == [ours.cls_id, *ours.encode(text), ours.sep_id]
    assert Tokenizer.load(tmp_path / "out").same_as(ours), "our own scripts take it for what it is"
    assert not Tokenizer.load(wordpiece(tmp_path)).same_as(ours)


# ----------------------------------------------------------------------------- pipelines, sentences, ONNX


def test_the_fill_mask_pipeline_answers_as_fill_mask_does(run, exported, tokenizer):
    from transformers import pipeline

    model, text = MaskedLM.from_pretrained(run), "return the [MASK] of items"
    answers = pipeline("fill-mask", model=str(exported), trust_remote_code=True, device="cpu")(text, top_k=4)
    (expected,) = fill_mask(model, tokenizer, text, 4)
    assert [a["token_str"] for a in answers] == [token for token, _ in expected]
    assert [a["score"] for a in answers] == pytest.approx([p for _, p in expected], rel=1e-4)


def test_our_own_scripts_read_the_folder_as_the_checkpoint(run, exported, tokenizer, tmp_path):
    text = "return the [MASK] of items"
    ours = fill_mask(MaskedLM.from_pretrained(run), tokenizer, text, 4)
    for name in (None, "tokenizer.json"):  # the folder; and the same vocabulary as others write it
        theirs = Tokenizer.load(exported / name if name else exported)
        assert fill_mask(MaskedLM.from_pretrained(exported), theirs, text, 4) == ours
        assert [theirs.token_text(i) for i in range(800)] == [tokenizer.token_text(i) for i in range(800)]
    load_start(str(exported), tokenizer, "data")  # not refused as another tokenizer's


def test_sentence_transformers_encodes_as_sentence_embedder(run, exported, tokenizer):
    from sentence_transformers import SentenceTransformer

    texts = ["Return the number of items.", "x", "a longer sentence, with several words in it"]
    vectors = SentenceTransformer(str(exported), trust_remote_code=True, device="cpu").encode(texts)
    ours = SentenceEmbedder.from_pretrained(run).eval()
    for text, vector in zip(texts, vectors):
        ids = torch.tensor([[tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id]])
        assert_near(torch.from_numpy(vector), ours(ids)[0].detach())


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 24), (2, 130), (7, 5)])
def test_onnx_runs_any_batch_and_length_with_our_logits(run, exported, shape):
    import onnxruntime

    g = torch.Generator().manual_seed(0)
    ids, types = torch.randint(5, 90, shape, generator=g), torch.randint(0, 2, shape, generator=g)
    mask = (torch.arange(shape[1]) < torch.randint(1, shape[1] + 1, (shape[0], 1), generator=g)).long()
    mask[3:4] = 0  # a row of nothing but padding
    session = onnxruntime.InferenceSession(exported / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": types.numpy()}
    logits = torch.from_numpy(session.run(["logits"], inputs)[0])
    assert logits.isfinite().all()
    ours = MaskedLM.from_pretrained(run).eval()(ids, mask, types).detach()[..., : logits.shape[-1]]
    torch.testing.assert_close(logits[mask.bool()], ours[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("cls", "shape"),
    [(SequenceClassifier, {}), (TokenClassifier, dict(position="rope-alibi", alibi_ratio=8.0))],
)
def test_classifiers_run_in_onnx_for_any_batch(run, tokenizer, tmp_path, cls, shape):
    import onnxruntime

    ours = randomized(cls.from_pretrained(run, n_labels=3, **shape))
    checkpoint(tmp_path / "in", tokenizer, ours)
    main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--onnx"])
    session = onnxruntime.InferenceSession(tmp_path / "out/onnx/model.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 2, 4):
        ids, mask, types = (x[:n] for x in batch("left"))
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": types.numpy()}
        logits = torch.from_numpy(session.run(["logits"], inputs)[0])
        real = mask.bool() if cls is TokenClassifier else ...
        torch.testing.assert_close(logits[real], ours(ids, mask, types).detach()[real], atol=1e-4, rtol=0)


def test_an_onnx_graph_of_one_batch_size_is_refused(run, tokenizer, tmp_path, monkeypatch):
    checkpoint(tmp_path / "in", tokenizer, randomized(SequenceClassifier.from_pretrained(run, n_labels=3)))
    fixed = (ROOT / "export/modeling.py").read_text().replace("torch.arange(x.shape[0],", "torch.arange(len(x),")
    source = export_hf.modeling_source
    monkeypatch.setattr(export_hf, "modeling_source", lambda model, kernels, _: source(model, kernels, fixed))
    with pytest.raises(SystemExit, match="input_ids has been traced with a fixed size"):
        main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--onnx"])
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- continued pretraining


MOSAIC_NAMES = {  # ours -> upstream MosaicBERT's
    "encoder.layers.": "bert.encoder.layer.",
    "encoder.embeddings.word.": "bert.embeddings.word_embeddings.",
    "encoder.embeddings.token_type.": "bert.embeddings.token_type_embeddings.",
    "encoder.embeddings.norm.": "bert.embeddings.LayerNorm.",
    ".attention.qkv.": ".attention.self.Wqkv.",
    ".attention_out.": ".attention.output.dense.",
    ".attention_norm.": ".attention.output.LayerNorm.",
    ".mlp.inp.": ".mlp.gated_layers.",
    ".mlp.out.": ".mlp.wo.",
    ".mlp_norm.": ".mlp.layernorm.",
    "head.dense.": "cls.predictions.transform.dense.",
    "head.norm.": "cls.predictions.transform.LayerNorm.",
    "head.decoder.": "cls.predictions.decoder.",
}


def save_as_upstream(model: MaskedLM, folder: Path) -> None:
    """config.json and pytorch_model.bin as the official MosaicBERT checkpoints have them."""
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in MOSAIC_NAMES.items():
            name = name.replace(ours, theirs)
        weights[name] = tensor
    torch.save(weights, folder / "pytorch_model.bin")
    config = dict(vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.0}))


def test_mosaicbert_goes_on_with_its_vocabulary_on_other_text_and_is_exported(tmp_path):
    """Its table is padded to a multiple of 64 and it comes without a tokenizer, as the official ones."""
    import prepare_c4

    vocabulary, start = wordpiece(tmp_path), tmp_path / "official"
    before = randomized(MaskedLM(EncoderConfig(512, **SHAPE)))
    start.mkdir()
    save_as_upstream(before, start)
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in some_documents(150)))
    source, data = str(tmp_path / "mine.jsonl"), str(tmp_path / "data")
    settings = dict(tokenizer=str(vocabulary), val_fraction=0.1, workers=1)
    prepare_c4.prepare(prepare_c4.Config(source=source, out=data, **settings))
    assert Tokenizer.load(data).vocabulary == vocabulary.read_bytes()

    length = dict(max_steps=12, eval_every=6, seq_len=32, batch_tokens=512, micro_tokens=512, eval_tokens=512)
    where = dict(start_from=str(start), data=(data,), out=str(tmp_path), name="mine", device="cpu")
    shape = make_presets()["mosaic-base"][1].model  # gives way to that of the weights
    run = train("mosaic-base", TrainConfig(**where, **length, pppl_tokens=0, lr=0.01, model=shape))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if line["type"] == "eval"]
    assert losses[-1] < losses[0]
    after = MaskedLM.from_pretrained(run)
    for (name, old), new in zip(before.state_dict().items(), after.state_dict().values()):
        assert old.shape == new.shape, name
        assert not torch.equal(old, new) or name == "encoder.embeddings.token_type.weight", name

    main([str(run), "--out", str(tmp_path / "mine-hf")])
    fast, ids = load_tokenizer(tmp_path / "mine-hf"), batch()[0]
    assert fast("unbelievable cats")["input_ids"][1:-1] == Tokenizer.load(data).encode("unbelievable cats")
    assert_near(load("AutoModelForMaskedLM", tmp_path / "mine-hf")(ids).logits, after.eval()(ids))
    assert str(start) in (tmp_path / "mine-hf/README.md").read_text()


# ----------------------------------------------------------------------------- BERT


def test_bert_shapes_become_plain_bert_without_code(tokenizer, tmp_path):
    from transformers import AutoModelForMaskedLM

    ours = random_mlm(tokenizer, **BERT)
    checkpoint(tmp_path / "in", tokenizer, ours)
    out = tmp_path / "bert"
    main([str(tmp_path / "in"), "--out", str(out), "--bert", "--onnx"])
    assert not list(out.glob("*.py"))
    theirs = AutoModelForMaskedLM.from_pretrained(out).eval()
    assert type(theirs).__name__ == "BertForMaskedLM"
    ids, mask, types = batch()
    real = mask.bool()
    with torch.no_grad():
        expected = ours(ids, mask, types)[real]
        assert_near(theirs(ids, mask, types).logits[real], expected)
    again = MaskedLM.from_pretrained(out).state_dict()
    assert all(torch.equal(again[k], v) for k, v in ours.state_dict().items())

    import onnxruntime

    session = onnxruntime.InferenceSession(out / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": types.numpy()}
    logits = torch.from_numpy(session.run(["logits"], inputs)[0])
    torch.testing.assert_close(logits[real], expected, atol=1e-4, rtol=0)


def test_a_bert_classifier_becomes_a_plain_bert_classifier(tokenizer, tmp_path):
    from transformers import AutoModelForSequenceClassification

    ours = randomized(SequenceClassifier(EncoderConfig(tokenizer.vocab_size, **BERT), 3))
    checkpoint(tmp_path / "in", tokenizer, ours)
    main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--bert"])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids, mask, types = batch()
    with torch.no_grad():
        assert_near(theirs(ids, mask, types).logits, ours(ids, mask, types))


# ----------------------------------------------------------------------------- the folder


def test_the_model_card_holds_the_runs_facts(run, exported):
    card = (exported / "README.md").read_text(encoding="utf-8")
    train_settings = json.loads((run / "config.json").read_text())["train"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    loss = [line["loss"] for line in log if line["type"] == "eval"][-1]
    facts = (
        "tiny-run",
        *train_settings["corpus"],
        "512 tokens, 2 steps of 256",
        f"| held-out loss | {loss} ",
        "1 × cpu",
    )
    for fact in (*facts, "constant:0.3", "$0.0", "# Limits", "pretrain.py", "pipeline_tag: fill-mask"):
        assert fact in card, fact


def test_bad_input_gets_one_line_and_leaves_nothing(run, tokenizer, tmp_path):
    bert = checkpoint(tmp_path / "in-bert", tokenizer, random_mlm(tokenizer, **BERT))
    bare = tmp_path / "in-bare"
    random_mlm(tokenizer).save_pretrained(bare)
    small = checkpoint(tmp_path / "in-small", tokenizer, random_mlm(Tokenizer.train(some_documents(50), 270)))
    encoder = tmp_path / "in-encoder"
    random_mlm(tokenizer).encoder.save_pretrained(encoder)
    out = tmp_path / "out"
    for args, expected in (
        ([str(tmp_path / "gone")], "gone: no checkpoint here"),
        ([str(bare)], "no tokenizer at"),
        ([str(small)], "not the one"),
        ([str(encoder)], "a Encoder cannot be exported"),
        ([str(run), "--bert"], r"--bert: this is no BERT \(position is alibi, not learned; mlp is geglu, not gelu\)"),
        ([str(bert), "--onnx"], "--onnx: learned positions need --bert"),
        ([str(bert), "--max_length", "65"], "--max_length 65"),
    ):
        with pytest.raises(SystemExit) as e:
            main([*args, "--out", str(out)])
        message = str(e.value)
        assert message.startswith("error: ")
        assert "\n" not in message
        assert re.search(expected, message), message
    with pytest.raises(SystemExit, match="in-bert exists"):
        main([str(run), "--out", str(bert)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in-bare", "in-bert", "in-encoder", "in-small"]


def test_a_failure_half_way_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_hf, "model_card", lambda *a: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(SystemExit, match="no space left"):
        main([str(run), "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
