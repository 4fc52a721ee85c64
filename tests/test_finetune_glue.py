"""finetune_glue.py, glue_tasks.py, hf_encoder.py: official files through the real path, judged by hand."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ttest_ind

import finetune_glue
from corpus.tokenizer import Tokenizer
from finetune_glue import encode, find_checkpoints, main, predict, read_records, train
from glue import tasks as glue
from model import EncoderConfig, MaskedLM, SequenceClassifier

REPO = Path(__file__).parents[1]
DATA = REPO / "../shared/data"
WORDS = "the a man woman dog cat house is was not very good bad runs sleeps in on river fine awful"
WORDS = WORDS.split()
QUICK = ["--epochs", "1", "--batch_size", "8", "--lr", "1e-3", "--device", "cpu", "--dtype", "float32"]


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(3, 9)))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    rng = np.random.default_rng(0)
    return Tokenizer.train([sentence(rng) for _ in range(400)], 300)


def write_checkpoint(run: Path, tokenizer: Tokenizer, step: int, **shape) -> Path:
    folder = run / f"ckpt/step_{step:08d}"
    small = dict(n_layers=2, n_heads=2, d_model=32, d_ff=48)
    torch.manual_seed(step)
    MaskedLM(EncoderConfig(**{**small, "vocab_size": tokenizer.vocab_size, **shape})).save_pretrained(folder)
    tokenizer.save(folder)
    progress = dict(step=step, tokens=100 * step, train_seconds=step / 2, gpu_seconds=step / 2, dollars=0.5)
    (folder / "progress.json").write_text(json.dumps({**progress, "family": "mosaic", "preset": "small"}))
    return folder


@pytest.fixture
def run(tmp_path, tokenizer) -> Path:
    write_checkpoint(tmp_path / "runs/small", tokenizer, 10)
    return tmp_path / "runs/small"


# the official headers; what is neither text nor label is filled with "-"
HEADERS = {
    "MNLI": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
    "sentence2_parse sentence1 sentence2 label1 gold_label",
    "QQP": "id qid1 qid2 question1 question2 is_duplicate",
    "QNLI": "index question sentence label",
    "SST-2": "sentence label",
    "CoLA": "source label mark sentence",
    "RTE": "index sentence1 sentence2 label",
    "MRPC": "Quality,#1 ID,#2 ID,#1 String,#2 String",
    "STS-B": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
}


def official_rows(task: str, n: int, seed: int, labelled: bool = True) -> list[dict[str, str]]:
    """n rows as the official file of `task` has them, every label in turn, with a quote and an apostrophe."""
    rng = np.random.default_rng([seed, *task.encode()])
    spec, out = glue.TASKS[task], []
    for i in range(n):
        row = dict.fromkeys(re.split("," if task == "MRPC" else " ", HEADERS[task]), "-")
        for column in spec.columns[0]:
            row[column] = ('"' if i % 3 == 0 else "") + sentence(rng)
        label = str(round(rng.uniform(0, 5), 3)) if spec.regression else spec.labels[i % len(spec.labels)]
        row[spec.label_columns[0]] = label
        if not labelled:
            del row[spec.label_columns[0]]
        out.append(row)
    return out


def write_tsv(path: Path, rows: list[dict[str, str]], header: bool = True, extra: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(rows[0])] * header + ["\t".join(row.values()) for row in rows]
    path.write_text("\n".join(lines) + "\n" + extra, encoding="utf-8")


@pytest.fixture(scope="session")
def glue_dir(tmp_path_factory) -> Path:
    """All eight tasks in the official layout, small; MNLI and QQP with the broken rows they are known for."""
    root = tmp_path_factory.mktemp("glue")
    for task in glue.TASKS:
        broken = {"MNLI": "7\t8\ttorn\n", "QQP": "1\t2\t3\thow is the\ncat?\tthe cat\t1\n9\t9\t9\ta\tb\t\n"}.get(
            task, ""
        )
        header = task != "CoLA"
        write_tsv(root / task / "train.tsv", official_rows(task, 24, 0), header, broken)
        for split in glue.TASKS[task].splits("dev"):
            write_tsv(root / task / f"{split}.tsv", official_rows(task, 12, len(split)), header)
        for split in glue.TASKS[task].splits("test"):
            write_tsv(root / task / f"{split}.tsv", official_rows(task, 5, len(split), labelled=False))
    return root


def records(run: Path) -> dict[str, list[dict]]:
    return {path.stem: read_records(path) for path in (run / "glue").glob("*.jsonl")}


def fails(capsys, args: list[str]) -> str:
    """The one line that main() ends with on bad input."""
    with pytest.raises(SystemExit) as e:
        main(args)
    message = str(e.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


# ----------------------------------------------------------------------------- the eight tasks


def test_every_task_runs_on_files_in_the_official_formats(run, glue_dir, capsys):
    main([str(run), "--glue_dir", str(glue_dir), "--seeds", "1", *QUICK])
    out, found = capsys.readouterr().out, records(run)
    assert set(found) == set(glue.TASKS)
    for task, (record,) in found.items():
        expected = {"CoLA": {"matthews"}, "STS-B": {"spearman", "pearson"}, "MNLI": {"accuracy_m", "accuracy_mm"}}
        expected |= {"QQP": {"accuracy", "f1"}, "MRPC": {"accuracy", "f1"}}
        assert set(record["metrics"]) == expected.get(task, {"accuracy"})
        counted = [v for k, v in record["metrics"].items() if k != "pearson"]
        assert record["score"] == pytest.approx(np.mean(counted))
        assert record["n_train"] == 24
        assert record["n_dev"] == (24 if task == "MNLI" else 12)
        assert record["checkpoint"] == "ckpt/step_00000010"
        assert (record["step"], record["tokens"], record["pretrain_seconds"]) == (10, 1000, 5.0)
        assert record["recipe"]["start"].startswith("MNLI" if task in glue.FROM_MNLI else "checkpoint")
        assert not record["official"]
        assert f"{task} · small step_00000010 · seed 1" in out
        assert f"{task}: train 24" in out
    assert "QQP/train.tsv: 3 broken rows (a text or the label is missing) left out; the first in line 26" in out
    assert "MNLI/train.tsv: 1 broken rows" in out
    assert out.count("subset of 24 rows, not the official task") == 8
    assert out.count("from its MNLI model") == 3
    assert "8-task mean, last evaluation" in out
    assert "9-number mean, best evaluation" in out
    mean = np.mean([100 * record["score"] for (record,) in found.values()])
    assert f"{mean:.2f}" in out


@pytest.mark.parametrize("task", glue.TASKS)
def test_tsv_and_hub_parquet_read_the_same(task, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    spec, rows = glue.TASKS[task], official_rows(task, 9, 0)
    write_tsv(tmp_path / "train.tsv", rows, header=task != "CoLA")
    labels = [r[spec.label_columns[0]] for r in rows]
    hub = {c: [r[o] for r in rows] for c, o in zip(spec.columns[-1], spec.columns[0])}
    hub["label"] = [float(x) for x in labels] if spec.regression else [spec.labels.index(x) for x in labels]
    pq.write_table(pa.table(hub), tmp_path / "train.parquet")
    tsv, parquet = (glue.read_split(tmp_path / f"train.{kind}", spec) for kind in ("tsv", "parquet"))
    assert tsv.texts == parquet.texts
    assert len(tsv.texts) == (1 if task in ("SST-2", "CoLA") else 2)
    assert tsv.texts[0][0].startswith('"')  # a quote is a character, it opens nothing
    assert glue.to_numbers(tsv, spec).tolist() == glue.to_numbers(parquet, spec).tolist()
    if task == "MNLI":
        assert glue.to_numbers(tsv, spec).tolist() == [0, 1, 2] * 3  # entailment, neutral, contradiction, as the hub


def test_the_hub_reads_as_the_files_do(tmp_path, monkeypatch):
    import datasets

    rows, asked = official_rows("RTE", 9, 0), []
    columns = {c: [r[c] for r in rows] for c in ("sentence1", "sentence2")}
    columns["label"] = [glue.TASKS["RTE"].labels.index(r["label"]) for r in rows]

    def hub(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    write_tsv(tmp_path / "train.tsv", rows)
    task = glue.TASKS["RTE"]
    here, there = glue.read_split(tmp_path / "train.tsv", task), glue.read_split(glue.locate("", "RTE", "dev"), task)
    assert asked == [("nyu-mll/glue", "rte", "validation")]
    assert here.texts == there.texts
    assert glue.to_numbers(here, task).tolist() == glue.to_numbers(there, task).tolist()


def test_lines_end_at_line_feeds_only(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"sentence\tlabel\r\none\rtext\t1\r\nanother\t0\r\n")
    split = glue.read_split(tmp_path / "x.tsv", glue.TASKS["SST-2"])
    assert (split.texts, split.labels) == ([["one\rtext", "another"]], ["1", "0"])


def test_labels_are_in_the_hubs_order():
    assert glue.TASKS["MNLI"].labels == ("entailment", "neutral", "contradiction")
    assert glue.TASKS["QNLI"].labels == glue.TASKS["RTE"].labels == ("entailment", "not_entailment")
    assert all(glue.TASKS[task].labels == ("0", "1") for task in ("QQP", "MRPC", "SST-2", "CoLA"))


def test_parquet_in_the_hub_layout_is_found(tmp_path):
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/validation-00000-of-00001.parquet").touch()
    assert glue.locate(str(tmp_path), "SST-2", "dev").name == "validation-00000-of-00001.parquet"
    assert glue.locate(str(tmp_path), "SST-2", "train") == tmp_path / "SST-2/train.tsv"
    assert glue.locate("", "STS-B", "dev") == ("stsb", "validation")
    assert glue.locate("", "MNLI", "dev_mismatched") == ("mnli", "validation_mismatched")


@pytest.mark.skipif(not (DATA / "glue").is_dir(), reason="the official files are not in this clone")
@pytest.mark.parametrize("task", ["SST-2", "CoLA", "RTE", "MRPC", "STS-B"])
def test_official_files_have_their_official_size(task):
    sources = {s: glue.locate(str(DATA / "glue"), task, s) for s in ("train", "dev")}
    data = glue.load_data(glue.TASKS[task], sources)
    assert data.official
    assert "official size" in data.notes[0]
    assert len(data.train.lines) == glue.TASKS[task].sizes[0]
    assert not any("broken" in note for note in data.notes)


def test_recipe_is_upstreams():
    decay = {name: task.recipe.weight_decay * task.recipe.lr for name, task in glue.TASKS.items()}  # decoupled
    assert decay == pytest.approx(
        {"MNLI": 5e-6, "QQP": 3e-6, "QNLI": 1e-6, "SST-2": 3e-6, "CoLA": 5e-6, "RTE": 1e-5, "MRPC": 8e-6, "STS-B": 3e-6}
    )
    jobs = {name: (t.recipe.epochs, t.recipe.batch_size, t.recipe.n_seeds) for name, t in glue.TASKS.items()}
    assert jobs["MNLI"] == (3, 48, 1)
    assert jobs["QQP"] == (5, 16, 1)
    assert jobs["QNLI"] == (10, 16, 1)
    assert jobs["SST-2"] == (3, 16, 3)
    assert jobs["CoLA"] == (10, 32, 4)
    assert jobs["RTE"] == (3, 16, 5)
    assert jobs["MRPC"] == jobs["STS-B"] == (10, 32, 5)


def test_small_tasks_start_from_mnli_only_when_it_is_there(run, glue_dir, capsys):
    common = ["--glue_dir", str(glue_dir), "--seeds", "1", *QUICK]
    main([str(run), "--task", "RTE", *common])
    assert "from the checkpoint" in capsys.readouterr().out
    main([str(run), "--task", "MNLI", *common])
    capsys.readouterr()
    main([str(run), "--task", "RTE", *common])  # another start is another job; MNLI's model is still there
    assert "from its MNLI model" in capsys.readouterr().out
    main([str(run), "--task", "RTE", "--no_mnli_start", *common])
    assert "1 jobs had been finished before" in capsys.readouterr().out
    plain, warm = records(run)["RTE"]
    assert plain["history"][0]["loss"] != warm["history"][0]["loss"]
    folder = run / "glue/mnli/step_00000010"
    assert SequenceClassifier.from_pretrained(folder).n_labels == 3
    # a run pretrained anew under its old name does not inherit the old MNLI model
    progress = run / "ckpt/step_00000010/progress.json"
    progress.write_text(progress.read_text().replace('"train_seconds": 5.0', '"train_seconds": 6.0'))
    main([str(run), "--task", "RTE", *common])
    assert "from the checkpoint" in capsys.readouterr().out


# ----------------------------------------------------------------------------- metrics


def test_metrics_are_those_computed_by_hand():
    y, answers = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 1, 0, 0, 0, 1, 0, 1])
    tp, tn, fp, fn = 3, 3, 1, 1
    assert glue.metric("accuracy", y, answers) == 6 / 8
    assert glue.metric("f1", y, answers) == 2 * tp / (2 * tp + fp + fn)
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert glue.metric("matthews", y, answers) == pytest.approx(matthews)
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 8.0])
    pearson = np.sum((a - a.mean()) * (b - b.mean())) / math.sqrt(np.sum((a - 2.5) ** 2) * np.sum((b - 5.5) ** 2))
    assert glue.metric("pearson", a, b) == pytest.approx(pearson)
    assert glue.metric("spearman", a, b) == pytest.approx(1 - 6 * (0 + 0 + 1 + 1) / (4 * 15))  # ranks 1 2 4 3


def test_mnli_matched_and_mismatched_keep_their_names(glue_dir):
    y = {s: np.array([0, 1, 2, 0]) for s in ("dev_matched", "dev_mismatched")}
    answers = {"dev_matched": np.array([0, 1, 2, 0]), "dev_mismatched": np.zeros(4, int)}
    assert glue.judge(glue.TASKS["MNLI"], y, answers) == ({"accuracy_m": 1.0, "accuracy_mm": 0.5}, 0.75)
    cfg = finetune_glue.Config(glue_dir=str(glue_dir), submission="out")
    files = finetune_glue.outputs(cfg, SimpleNamespace(task=glue.TASKS["MNLI"]))
    assert {name: Path(rows.where).stem for name, rows in files.items()} == {
        "MNLI-m.tsv": "test_matched",
        "MNLI-mm.tsv": "test_mismatched",
    }


def test_constant_answers_score_zero_without_a_warning():
    y, same = np.array([1, 0, 1, 1]), np.zeros(4, dtype=int)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert glue.metric("f1", y, same) == 0.0
        assert glue.metric("f1", same, same) == 0.0
        assert glue.metric("matthews", y, same) == 0.0
        assert glue.metric("matthews", same, y) == 0.0
        for name in ("pearson", "spearman"):
            assert glue.metric(name, y.astype(float), np.full(4, 2.5)) == 0.0


def test_majority_is_the_score_of_the_commonest_training_label(glue_dir, tmp_path):
    rows = official_rows("MRPC", 12, 0)
    for row in rows[:9]:
        row["Quality"] = "1"
    write_tsv(tmp_path / "train.tsv", rows)
    task = glue.TASKS["MRPC"]
    data = glue.load_data(task, {"train": tmp_path / "train.tsv", "dev": glue_dir / "MRPC/dev.tsv"})
    assert glue.majority(data) == pytest.approx((0.5 + 2 * 6 / (2 * 6 + 6)) / 2)  # 6 of 12: accuracy 0.5, F1 2/3


def test_both_averages_are_what_they_are_called():
    metrics = {
        "MNLI": {"accuracy_m": 0.8, "accuracy_mm": 0.6}, "QQP": {"accuracy": 0.9, "f1": 0.7}, "QNLI": {"accuracy": 0.5},
        "SST-2": {"accuracy": 0.9}, "CoLA": {"matthews": 0.4}, "RTE": {"accuracy": 0.6},
        "MRPC": {"accuracy": 0.8, "f1": 0.6}, "STS-B": {"spearman": 0.3, "pearson": 0.9},
    }  # fmt: skip
    rows = []
    for task, last in metrics.items():
        better = {k: v + 0.1 for k, v in last.items()}
        score = np.mean([v for k, v in last.items() if k != "pearson"])
        common = dict(task=task, run="r", checkpoint="random", step=0, majority=0.1, official=task != "QQP")
        rows.append(dict(**common, score=score, history=[better, last]))
        rows.append(dict(**common, score=score + 0.02, history=[better, last]))
    text = glue.table(rows)
    row = next(line for line in text.splitlines() if line.startswith("r random"))
    eight = np.mean([70, 80, 50, 90, 40, 60, 70, 30]) + 1  # + half of the second seed's 2 points
    nine = np.mean([80, 60, 70, 50, 90, 40, 60, 60, 30]) + 10
    assert row.split()[-2:] == [f"{eight:.2f}", f"{nine:.2f}"]
    assert "71.0 ± 1.4 (2)" in row  # MNLI: 70 and 72
    assert "QQP*" in text
    assert "* a subset" in text
    assert "84.28" in next(line for line in text.splitlines() if "model card" in line)
    five = glue.table([r for r in rows if r["task"] in ("CoLA", "RTE")])
    assert "mean of 2 tasks" in five
    assert "8-task" not in five


def test_the_table_says_what_pretraining_gained_over_random_weights():
    scores = {"RTE": ([0.70, 0.74, 0.66], [0.52, 0.50, 0.54]), "CoLA": ([0.10, 0.12, 0.17], [0.10, 0.11])}
    rows = [
        dict(task=task, run="r", checkpoint=checkpoint, step=step, majority=0.5, official=True, score=score, history=[])
        for task, both in scores.items()
        for (checkpoint, step), some in zip([("ckpt/step_00000007", 7), ("random", 0)], both)
        for score in some
    ]
    (row,) = [line for line in glue.table(rows).splitlines() if line.startswith("r step_00000007  ") and "(p " in line]
    cells = re.findall(r"(\S+) ± (\S+) \(p (\S+)\)", row)
    errors = [math.sqrt(sum(np.var(x, ddof=1) / len(x) for x in both)) * 100 for both in scores.values()]
    p = {task: f"{ttest_ind(*both, equal_var=False).pvalue:.2g}" for task, both in scores.items()}
    assert cells[0] == ("+2.5", f"{errors[1]:.1f}", p["CoLA"])
    assert cells[1] == ("+18.0", f"{errors[0]:.1f}", p["RTE"])
    assert cells[2][:2] == ("+10.2", f"{math.hypot(*errors) / 2:.1f}")  # (18 + 2.5) / 2; errors are independent
    assert 0.001 < float(cells[2][2]) < 0.05
    one_seed = [r for r in rows if r["task"] == "RTE" and r["score"] in (0.70, 0.52)]
    assert glue.table(one_seed).splitlines()[5].split()[-1] == "+18.0"
    assert "random weights" not in glue.table([r for r in rows if r["step"] == 7])
    # collapsed runs: every seed answers the same, and in floating point the variance of 146/277 is not 0
    same = [r | {"score": 146 / 277 if r["step"] else 131 / 277} for r in rows if r["task"] == "CoLA"] * 2
    assert glue.table(same).splitlines()[5].split()[-1] == "+5.4"
    foreign = [r | ({"run": "my bert"} | ({"checkpoint": "my bert"} if r["step"] else {})) for r in one_seed]
    assert glue.table(foreign).splitlines()[5].split() == ["my", "bert", "+18.0"]


# ----------------------------------------------------------------------------- flat batches


def test_pairs_are_cut_longest_first(tokenizer):
    a, b = [" ".join(["the"] * 12)], [" ".join(["dog"] * 4)]
    n_a, n_b = len(tokenizer.encode(a[0])), len(tokenizer.encode(b[0]))
    assert n_a > n_b
    whole = encode([a, b], tokenizer, 256)
    assert whole.ids.tolist() == [
        tokenizer.cls_id, *tokenizer.encode(a[0]), tokenizer.sep_id, *tokenizer.encode(b[0]), tokenizer.sep_id,
    ]  # fmt: skip
    cut = encode([a, b], tokenizer, 3 + n_a + n_b - 2)  # two tokens too many: both leave the longer
    assert cut.first.tolist() == [n_a]  # [CLS] + n_a - 2 + [SEP]
    assert cut.ids[n_a:].tolist() == [*tokenizer.encode(b[0]), tokenizer.sep_id]
    tight = encode([a, b], tokenizer, 3 + 5)  # 5 tokens for both: 3 and 2
    assert (tight.first.tolist(), len(tight.ids)) == ([5], 8)
    assert len(encode([a], tokenizer, 8).ids) == 8


@pytest.mark.parametrize("position", ["alibi", "learned"])
def test_flat_batches_equal_padded_ones_in_logits_and_gradients(position, tokenizer):
    rng = np.random.default_rng(3)
    texts = [[sentence(rng) for _ in range(7)] for _ in "ab"]
    data = encode(texts, tokenizer, 20)
    torch.manual_seed(0)
    shape = dict(vocab_size=300, n_layers=2, n_heads=2, d_model=32, d_ff=48, max_positions=20)
    model = SequenceClassifier(EncoderConfig(**shape, position=position), 3).eval()
    index = np.array([4, 0, 6, 2])
    batch = data.batch(index, torch.device("cpu"))
    assert batch["input_ids"].dtype == torch.int64
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["cu_seqlens"][-1] < len(batch["input_ids"]) == len(batch["token_type_ids"])  # rows of no example
    assert len(batch["input_ids"]) % 64 == 0
    ids, mask, types = (torch.zeros(4, 20, dtype=torch.long) for _ in range(3))
    for row, i in enumerate(index):
        example = data.ids[data.starts[i] : data.starts[i + 1]]
        ids[row, : len(example)] = torch.from_numpy(example)
        mask[row, : len(example)] = 1
        types[row, data.first[i] : len(example)] = 1
    torch.testing.assert_close(model(**batch), model(ids, mask, types))
    gradients = []
    for logits in (model(**batch), model(ids, mask, types)):
        model.zero_grad()
        logits.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    logits = predict(model, data, torch.float32)  # in batches sorted by length, but in the examples' order
    np.testing.assert_allclose(logits[index], model(**batch).detach(), atol=1e-5)


def test_predict_keeps_the_order_over_many_batches():
    class Echo(torch.nn.Linear):  # answers with the first token of each example
        def forward(self, input_ids, token_type_ids, cu_seqlens, max_seqlen):
            return input_ids[cu_seqlens[:-1].long()].float()[:, None]

    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 200, 900)  # about 90,000 tokens: several batches
    starts = np.concatenate([[0], lengths.cumsum()])
    ids = np.repeat(np.arange(900), lengths).astype(np.int32)
    data = finetune_glue.Encoded(ids, starts, lengths)
    assert predict(Echo(1, 1), data, torch.float32)[:, 0].tolist() == list(range(900))


# ----------------------------------------------------------------------------- training


def test_gradients_equal_hugging_face_bert(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = BertForSequenceClassification(config).train()
    theirs.save_pretrained(tmp_path)
    ours = SequenceClassifier.from_pretrained(tmp_path).train()
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 120, (4, 11), generator=g)
    mask = (torch.arange(11) < torch.tensor([[11], [3], [7], [5]])).long()
    types, y = (torch.arange(11) > 2).long().expand(4, 11) * mask, torch.tensor([0, 2, 1, 1])
    loss = F.cross_entropy(ours(ids, mask, types), y)
    loss.backward()
    reference = theirs(input_ids=ids, attention_mask=mask, token_type_ids=types, labels=y).loss
    reference.backward()
    torch.testing.assert_close(loss, reference)
    named = dict(theirs.named_parameters())
    pairs = {
        "encoder.embeddings.word.weight": "bert.embeddings.word_embeddings.weight",
        "encoder.embeddings.position.weight": "bert.embeddings.position_embeddings.weight",
        "encoder.embeddings.token_type.weight": "bert.embeddings.token_type_embeddings.weight",
        "encoder.layers.0.mlp.inp.weight": "bert.encoder.layer.0.intermediate.dense.weight",
        "encoder.layers.1.mlp_norm.weight": "bert.encoder.layer.1.output.LayerNorm.weight",
        "pooler.weight": "bert.pooler.dense.weight",
        "classifier.weight": "classifier.weight",
        "classifier.bias": "classifier.bias",
    }
    for mine, other in pairs.items():
        torch.testing.assert_close(ours.get_parameter(mine).grad, named[other].grad, atol=1e-6, rtol=1e-4)
    q_k_v = [named[f"bert.encoder.layer.0.attention.self.{n}.weight"].grad for n in ("query", "key", "value")]
    qkv = ours.get_parameter("encoder.layers.0.attention.qkv.weight").grad
    torch.testing.assert_close(qkv, torch.cat(q_k_v), atol=1e-6, rtol=1e-4)


def toy_task(folder: Path, n: int = 160) -> list[str]:
    """Label: does the sentence say "good"? Written as a task of one's own; returns its arguments."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        words = sentence(rng).replace("good", "fine").split()
        words[rng.integers(len(words))] = "good" if i % 2 else "bad"
        rows.append({"sentence": " ".join(words), "label": "positive" if i % 2 else "negative"})
    write_tsv(folder / "toy/train.tsv", rows[: n * 3 // 4])
    write_tsv(folder / "toy/dev.tsv", rows[n * 3 // 4 :])
    return ["--task", str(folder / "toy/train.tsv"), "--eval", str(folder / "toy/dev.tsv")]


LEARN = ["--epochs", "12", "--batch_size", "16", "--lr", "3e-3", "--dropout", "0", "--device", "cpu", "--seeds", "5"]


def test_a_learnable_task_is_learned_and_numbers_are_reproducible(run, tmp_path, capsys):
    task = toy_task(tmp_path)
    main([str(run), *task, *LEARN])
    (first,) = records(run)["toy"]  # named after its folder
    assert first["majority"] == 0.5
    assert first["score"] > 0.9
    assert len(first["history"]) == 12
    assert first["history"][-1]["accuracy"] == first["metrics"]["accuracy"]
    assert "2 classes: negative, positive" in capsys.readouterr().out
    (run / "glue/toy.jsonl").unlink()
    main([str(run), *task, *LEARN])
    (second,) = records(run)["toy"]
    assert second["history"] == first["history"]
    main([str(run), *task, *LEARN[:-1], "6"])
    assert records(run)["toy"][-1]["history"] != first["history"]  # another seed: another head, another order


def test_from_scratch_is_the_same_shape_with_random_weights(run, tmp_path, capsys):
    main([str(run), *toy_task(tmp_path, 40), "--from_scratch", "--seeds", "1", *QUICK])
    pretrained, random = records(run)["toy"]
    assert (random["checkpoint"], random["step"], random["tokens"], random["pretrain_seconds"]) == ("random", 0, 0, 0.0)
    assert random["family"] == "mosaic"
    assert pretrained["history"] != random["history"]
    assert "from random weights" in capsys.readouterr().out


def test_transformers_encoders_start_from_random_weights_too(tmp_path, capsys):
    write_hf_bert(tmp_path / "bert")
    main(["--hf", str(tmp_path / "bert"), *toy_task(tmp_path, 40), "--from_scratch", "--seeds", "1", *QUICK])
    pretrained, random = records(tmp_path / "bert")["toy"]
    assert (pretrained["checkpoint"], random["checkpoint"]) == ("bert-transformers", "random")
    assert pretrained["history"] != random["history"]
    assert "gained over random weights" in capsys.readouterr().out


def test_learning_rate_warms_up_and_ends_at_zero(tokenizer, monkeypatch):
    rates, settings = [], {}

    class Spy(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            settings.update(kwargs)
            super().__init__(*args, **kwargs)

        def step(self):
            rates.append(self.param_groups[0]["lr"])
            return super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    rng = np.random.default_rng(0)
    data = encode([[sentence(rng) for _ in range(50)]], tokenizer, 16)
    model = SequenceClassifier(EncoderConfig(vocab_size=300, n_layers=1, n_heads=2, d_model=16, d_ff=16), 2)
    recipe = replace(glue.TASKS["RTE"].recipe, epochs=10, batch_size=5)
    bar = finetune_glue.tqdm(disable=True)
    losses = list(train(model, data, np.arange(50) % 2, recipe, 0, torch.float32, bar))
    assert len(losses) == 10
    assert len(rates) == 100
    assert rates[:6] == pytest.approx([1e-5 * k / 6 for k in range(1, 7)])  # 6 % of 100 steps
    assert rates[5] == max(rates)
    assert rates[-1] == pytest.approx(1e-5 / 94)
    assert (settings["betas"], settings["eps"], settings["weight_decay"]) == ((0.9, 0.98), 1e-6, 1.0)


def test_every_epoch_trains_with_dropout_in_an_order_of_its_seed_and_no_answer_has_it():
    seen = []

    class Spy(torch.nn.Linear):
        def forward(self, input_ids, cu_seqlens, **_):
            seen.append((self.training, input_ids[: cu_seqlens[-1]].tolist()))
            return self.weight.expand(len(cu_seqlens) - 1, 1)

    data = finetune_glue.Encoded(np.arange(10, dtype=np.int32), np.arange(11), np.ones(10, dtype=int))
    recipe, bar, orders = glue.Recipe(0.0, 0.0, 2, 10), finetune_glue.tqdm(disable=True), {}
    for seed in (7, 8):
        seen.clear()
        model = Spy(1, 1)
        for _ in train(model, data, np.zeros(10, np.float32), recipe, seed, torch.float32, bar):
            predict(model, data, torch.float32)
        assert [training for training, _ in seen] == [True, False] * 2
        orders[seed] = seen[0][1]
    assert orders[7] != orders[8]


def test_load_model_heeds_seed_and_dropout(tmp_path):
    MaskedLM(EncoderConfig(vocab_size=64, n_layers=1, n_heads=2, d_model=16, d_ff=16)).save_pretrained(tmp_path)
    start = finetune_glue.Start(tmp_path, tmp_path, "r", "r")
    a, b, again = (finetune_glue.load_model(start, tmp_path, 2, 0.25, seed) for seed in (1, 2, 1))
    assert torch.equal(a.classifier.weight, again.classifier.weight)
    assert not torch.equal(a.classifier.weight, b.classifier.weight)
    kinds = {"embedding", "output", "mlp", "classifier"}
    assert {getattr(a.cfg, f"{k}_dropout") for k in kinds} == {0.25}


def test_examples_are_shuffled_anew_every_epoch_and_each_is_seen_once():
    seen = []

    class Spy(torch.nn.Linear):
        def forward(self, input_ids, cu_seqlens, **_):
            seen.append(input_ids[: cu_seqlens[-1]].tolist())
            return self.weight.expand(len(cu_seqlens) - 1, 1)

    data = finetune_glue.Encoded(np.arange(10, dtype=np.int32), np.arange(11), np.ones(10, dtype=int))
    recipe = glue.Recipe(lr=0.0, weight_decay=0.0, epochs=2, batch_size=4)
    bar = finetune_glue.tqdm(disable=True)
    list(train(Spy(1, 1), data, np.zeros(10, dtype=np.float32), recipe, 7, torch.float32, bar))
    assert [len(batch) for batch in seen] == [4, 4, 2] * 2
    epochs = [[i for batch in half for i in batch] for half in (seen[:3], seen[3:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1] != list(range(10))


def test_compiled_once_for_every_batch_and_for_every_seed(tokenizer, monkeypatch):
    from torch._dynamo.utils import counters

    compile_ = torch.nn.Module.compile  # what dynamo traces and guards does not depend on the backend; this one is fast
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_(self, backend="aot_eager", **how))
    rng = np.random.default_rng(0)
    data = encode([[sentence(rng) for _ in range(57)] for _ in "ab"], tokenizer, 40)
    y, recipe, bar = np.arange(57) % 2, replace(glue.OWN, epochs=2, batch_size=8), finetune_glue.tqdm(disable=True)
    assert len(y) % recipe.batch_size == 1  # a single example in the last batch
    cfg = EncoderConfig(
        vocab_size=300, n_layers=1, n_heads=2, d_model=32, d_ff=48, embedding_dropout=0.0, output_dropout=0.0,
        mlp_dropout=0.0, classifier_dropout=0.0,
    )  # fmt: skip
    torch._dynamo.reset()
    losses, logits, graphs = [], [], []
    for compiled in (False, True, True):
        torch.manual_seed(0)
        model = SequenceClassifier(cfg, 2)
        if compiled:
            finetune_glue.compile_model(model, data, torch.float32)
        before = counters["stats"]["unique_graphs"]
        losses.append(list(train(model, data, y, recipe, 1, torch.float32, bar)))
        logits.append(predict(model, data, torch.float32))
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert graphs[0] == graphs[2] == 0
    assert graphs[1] <= 1  # torch treats sizes of 1 apart
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)
    assert losses[2] == losses[1]


def test_compiling_leaves_weights_and_random_numbers_as_they_were(tokenizer, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: None)  # the warm-up is what could change them
    data = encode([["the cat", "a dog runs"]], tokenizer, 20)
    model = SequenceClassifier(EncoderConfig(vocab_size=300, n_layers=1, n_heads=2, d_model=16, d_ff=16), 2)
    weights, random = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    finetune_glue.compile_model(model, data, torch.float32)
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip(model.parameters(), weights, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.slow
def test_compiled_and_eager_jobs_agree(run, tmp_path):
    args = [str(run), *toy_task(tmp_path), *LEARN]
    main([*args, "--compile", "off"])
    (eager,) = records(run)["toy"]
    (run / "glue/toy.jsonl").unlink()
    main([*args, "--compile", "on"])
    (compiled,) = records(run)["toy"]
    assert eager["compile_seconds"] is None
    assert compiled["compile_seconds"] > 0
    losses = [[epoch["loss"] for epoch in record["history"]] for record in (eager, compiled)]
    np.testing.assert_allclose(losses[1][:3], losses[0][:3], atol=2e-3)
    np.testing.assert_allclose(
        losses[1], losses[0], atol=2e-2
    )  # where the loss falls steeply, rounding moves it a little
    assert compiled["score"] == pytest.approx(eager["score"], abs=0.05)


# ----------------------------------------------------------------------------- tasks of one's own


def test_regression_on_jsonl_with_two_named_columns(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, n in (("train", 96), ("dev", 32)):
        rows = []
        for _ in range(n):
            k = int(rng.integers(0, 5))
            pair = {"left": " ".join(["dog"] * k + ["cat"] * (4 - k)), "right": sentence(rng), "grade": k / 2}
            rows.append(json.dumps(pair))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    files = ["--task", str(tmp_path / "train.jsonl"), "--eval", str(tmp_path / "dev.jsonl"), "--task_name", "dogs"]
    columns = ["--text_columns", "left,right", "--label_column", "grade", "--regression"]
    main([str(run), *files, *columns, *LEARN])
    (record,) = records(run)["dogs"]
    assert record["majority"] == 0.0
    assert set(record["metrics"]) == {"spearman", "pearson"}
    assert record["score"] == record["metrics"]["spearman"] > 0.7
    message = fails(capsys, [str(run), *files, *columns[:-1], *LEARN])  # forgot --regression
    assert "train.jsonl:" in message
    assert "--regression" in message


@pytest.mark.parametrize(
    ("path", "name"), [("spam/train.tsv", "spam"), ("data/spam.tsv", "spam"), ("spam/train-v2.jsonl", "train-v2")]
)
def test_a_task_of_ones_own_is_named_after_its_file_or_folder(path, name):
    (task,) = finetune_glue.pick_tasks(finetune_glue.Config(task=path, eval="dev.tsv"))
    assert task.name == name
    (task,) = finetune_glue.pick_tasks(finetune_glue.Config(task=path, eval="dev.tsv", task_name="ham"))
    assert task.name == "ham"


def test_answers_to_the_evaluation_file_are_written_and_make_the_score(run, tmp_path):
    task = toy_task(tmp_path)
    main([str(run), *task, *LEARN])
    (record,) = records(run)["toy"]
    lines = (run / "glue/predictions/toy_step_00000010_seed5.tsv").read_text().splitlines()[1:]
    truth = [line.split("\t")[1] for line in Path(task[3]).read_text().splitlines()[1:]]
    right = [line.split("\t")[1] == label for line, label in zip(lines, truth, strict=True)]
    assert record["score"] == pytest.approx(np.mean(right))


def test_small_values_are_written_to_six_digits_and_sts_b_as_the_leaderboard_has_it(tmp_path):
    clicks = glue.Task("clicks", glue.OWN, (("sentence",),), ("label",), metrics=("spearman",))
    for task, values, answers in (
        (clicks, [0.0011234, 0.0011235, -7.0], ["0.0011234", "0.0011235", "-7"]),
        (glue.TASKS["STS-B"], [2.71828, 5.5, -0.1], ["2.718", "5.000", "0.000"]),
    ):
        finetune_glue.write_answers(tmp_path / "answers.tsv", task, np.float32(values)[:, None])
        lines = (tmp_path / "answers.tsv").read_text().splitlines()
        assert [line.split("\t")[1] for line in lines] == ["prediction", *answers]


def test_a_test_file_with_a_broken_row_is_refused(run, glue_dir, tmp_path, capsys):
    shutil.copytree(glue_dir / "RTE", tmp_path / "glue/RTE")
    with open(tmp_path / "glue/RTE/test.tsv", "a") as f:
        f.write("5\tonly one text\n")
    args = ["--glue_dir", str(tmp_path / "glue"), "--task", "RTE", "--submission", str(tmp_path / "out")]
    assert "RTE/test.tsv:7: this row lacks a text" in fails(capsys, [str(run), *args, *QUICK])
    assert not (tmp_path / "out").exists()


def test_predictions_are_written_for_unlabelled_rows(run, tmp_path, capsys):
    task = toy_task(tmp_path)
    (tmp_path / "new.tsv").write_text("sentence\nthe dog is good\na cat was bad\nthe river is good\n")
    args = [str(run), *task, *LEARN, "--predict", str(tmp_path / "new.tsv")]
    main(args)
    path = run / "glue/predictions/toy_step_00000010_seed5_new.tsv"
    assert path.read_text() == "index\tprediction\n0\tpositive\n1\tnegative\n2\tpositive\n"
    capsys.readouterr()
    main(args)
    assert "1 jobs had been finished before" in capsys.readouterr().out
    path.unlink()  # asked for and gone: the job is not finished
    main(args)
    assert path.exists()


def test_submission_has_the_leaderboards_files(run, glue_dir, tmp_path, capsys):
    args = [str(run), "--seeds", "1,2", "--submission", str(tmp_path / "out"), *QUICK]
    main([*args, "--glue_dir", str(glue_dir)])
    assert "not made, but part of a submission: WNLI.tsv, AX.tsv" in capsys.readouterr().out
    with_diagnostic = tmp_path / "glue"
    shutil.copytree(glue_dir, with_diagnostic)
    rows = official_rows("RTE", 5, 0, labelled=False)
    write_tsv(with_diagnostic / "diagnostic/diagnostic.tsv", rows)  # where the official download has it
    kept = run / "glue/mnli/step_00000010/model.safetensors"
    before = kept.stat().st_mtime_ns
    main([*args, "--glue_dir", str(with_diagnostic)])
    assert "not made, but part of a submission: WNLI.tsv\n" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before  # MNLI ran again for its answers; others may be reading its weights
    names = {"MNLI-m", "MNLI-mm", "QQP", "QNLI", "SST-2", "CoLA", "RTE", "MRPC", "STS-B", "AX"}
    assert {path.stem for path in (tmp_path / "out").iterdir()} == names
    for name in names:
        lines = (tmp_path / f"out/{name}.tsv").read_text().splitlines()
        assert lines[0] == "index\tprediction"
        assert [line.split("\t")[0] for line in lines[1:]] == list("01234")
        answers = {line.split("\t")[1] for line in lines[1:]}
        if name == "STS-B":
            assert all(0 <= float(a) <= 5 for a in answers)
        else:
            assert answers <= set(glue.TASKS["MNLI" if name == "AX" else name.split("-m")[0]].labels)


def test_rows_to_predict_may_be_the_tasks_own_file_with_rows_that_training_leaves_out(run, glue_dir, tmp_path):
    shutil.copytree(glue_dir / "QQP", tmp_path / "glue/QQP")
    dev = tmp_path / "glue/QQP/dev.tsv"
    lines = dev.read_text().splitlines()
    lines.insert(1, lines[1].rpartition("\t")[0] + "\t")  # the first row, once without its label
    dev.write_text("\n".join(lines) + "\n")
    args = ["--glue_dir", str(tmp_path / "glue"), "--task", "QQP", "--seeds", "1", "--predict", str(dev)]
    main([str(run), *args, *QUICK])
    answers = (run / "glue/predictions/QQP_step_00000010_seed1_dev.tsv").read_text().splitlines()
    assert len(answers) == 1 + 13


# ----------------------------------------------------------------------------- jobs


def test_finished_jobs_are_skipped_and_a_torn_line_runs_again(run, tmp_path, capsys):
    write_checkpoint(run, Tokenizer.load(run / "ckpt/step_00000010"), 20)
    task = toy_task(tmp_path, 40)
    args = [str(run), *task, "--checkpoints", "all", *QUICK]
    main([*args, "--seeds", "1"])
    capsys.readouterr()
    before = (run / "glue/toy.jsonl").read_bytes()
    main([*args, "--seeds", "1,2"])
    out = capsys.readouterr().out
    assert "2 jobs had been finished before" in out
    assert "(2)" in out  # the table has both seeds
    assert (run / "glue/toy.jsonl").read_bytes().startswith(before)
    assert len(records(run)["toy"]) == 4
    whole = (run / "glue/toy.jsonl").read_bytes()
    (run / "glue/toy.jsonl").write_bytes(whole[:-40])  # killed while writing
    assert len(records(run)["toy"]) == 3
    main([*args, "--seeds", "1,2"])
    assert "3 jobs had been finished before" in capsys.readouterr().out
    again = records(run)["toy"]
    assert [r["history"] for r in again] == [json.loads(line)["history"] for line in whole.splitlines()]
    with open(tmp_path / "toy/train.tsv", "a") as f:
        f.write("the good river\tpositive\n")
    main([*args, "--seeds", "1"])  # other data is another job
    assert len(records(run)["toy"]) == 6


def test_numbers_read_as_classes_and_as_values_are_two_jobs(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [{"sentence": sentence(rng), "label": str(i % 5)} for i in range(40)]
    write_tsv(tmp_path / "stars/train.tsv", rows)
    args = [str(run), "--task", str(tmp_path / "stars/train.tsv"), "--eval", str(tmp_path / "stars/train.tsv")]
    main([*args, "--seeds", "1", *QUICK])
    main([*args, "--seeds", "1", *QUICK, "--regression"])
    assert [set(r["metrics"]) for r in records(run)["stars"]] == [{"accuracy"}, {"spearman", "pearson"}]
    assert "finished before" not in capsys.readouterr().out


def test_other_weights_or_another_shape_under_the_old_name_are_another_start(tmp_path, tokenizer, capsys):
    write_hf_bert(tmp_path / "bert")
    args = [*toy_task(tmp_path, 40), "--seeds", "1", "--max_len", "24", *QUICK]
    foreign = [str(tmp_path / "bert"), "--hf", str(tmp_path / "bert"), *args]
    main(foreign)
    main(foreign)
    assert "2 jobs had been finished before" in capsys.readouterr().out
    weights = tmp_path / "bert/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")  # trained on, and saved in place
    main(foreign)
    assert "finished before" not in capsys.readouterr().out

    run = tmp_path / "runs/small"
    scratch = [str(run), "--from_scratch", *args]
    for shape in ({}, {"d_ff": 64}):
        shutil.rmtree(run / "ckpt", ignore_errors=True)
        write_checkpoint(run, tokenizer, 10, **shape)  # with the same clock
        main(scratch)
    assert "finished before" not in capsys.readouterr().out
    assert [r["checkpoint"] for r in records(run)["toy"]] == ["ckpt/step_00000010", "random"] * 2


def test_mnli_is_first_and_then_what_takes_longest(run, glue_dir, monkeypatch):
    ran = []
    monkeypatch.setattr(finetune_glue, "run_job", lambda job, *_, **__: ran.append((job.data.task.name, job.seed)))
    monkeypatch.setattr(glue, "table", lambda records: "")
    main([str(run), "--glue_dir", str(glue_dir), "--task", "RTE,SST-2,CoLA,MNLI", "--seeds", "1,2", "--device", "cpu"])
    assert ran[0] == ("MNLI", 1)  # RTE waits for it
    assert [task for task, _ in ran[1:3]] == ["CoLA", "CoLA"]  # as many rows as the others here, but 10 epochs to 3
    assert {task for task, _ in ran[-2:]} == {"RTE"}


def test_an_mnli_model_that_was_taken_away_ends_the_command(run, glue_dir, capsys, monkeypatch):
    args = [str(run), "--glue_dir", str(glue_dir), "--seeds", "1", *QUICK]
    main([*args, "--task", "MNLI"])
    made = finetune_glue.make_jobs

    def then_another_command(*args):
        jobs = made(*args)
        (run / "glue/mnli/step_00000010/job.json").write_text("{}")
        return jobs

    monkeypatch.setattr(finetune_glue, "make_jobs", then_another_command)
    assert "has been replaced by another command" in fails(capsys, [*args, "--task", "RTE"])


def test_a_score_that_another_command_asks_for_is_noted_under_that_command_too(run, tmp_path, monkeypatch):
    args = [str(run), *toy_task(tmp_path, 40), "--seeds", "1", *QUICK]
    for command in (["a"], ["b"], ["b"], ["a", "--compile", "off"]):
        monkeypatch.setattr(sys, "argv", ["finetune_glue.py", *command])
        main(args)
    found = records(run)["toy"]
    assert [r["command"] for r in found] == [f"finetune_glue.py {c}" for c in ("a", "b", "a --compile off")]
    assert all(r | {"command": ""} == found[0] | {"command": ""} for r in found)  # it ran once


def test_checkpoints_can_be_chosen(run, tmp_path, tokenizer, capsys):
    write_checkpoint(run, tokenizer, 20)
    unfinished = write_checkpoint(run, tokenizer, 30)
    (unfinished / "model.safetensors").unlink()
    (run / "ckpt/.step_00000040.tmp").mkdir()
    assert [p.name for p in find_checkpoints(run)] == ["step_00000010", "step_00000020"]
    args = [*toy_task(tmp_path, 40), "--seeds", "1", *QUICK]
    main([str(run), *args])
    main([str(run), "--checkpoints", "10", *args])
    main([str(run / "ckpt/step_00000010"), *args])  # the same start by its own name
    assert "1 jobs had been finished before" in capsys.readouterr().out
    assert [r["step"] for r in records(run)["toy"]] == [20, 10]
    assert "no checkpoint of step 15" in fails(capsys, [str(run), "--checkpoints", "10,15", *args])


def test_two_workers_share_the_jobs_and_end_with_the_same_numbers(run, glue_dir, tmp_path, tokenizer):
    write_checkpoint(tmp_path / "runs/other", tokenizer, 10)
    tasks = ["--task", "RTE,MNLI,SST-2", "--glue_dir", str(glue_dir), "--seeds", "1,2", *QUICK]
    main([str(run), *tasks])
    workers = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*workers, str(REPO / "finetune_glue.py"), str(tmp_path / "runs/other"), *tasks]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean of 3 tasks") == 1  # one table
    alone, shared = records(run), records(tmp_path / "runs/other")
    for task in ("RTE", "MNLI", "SST-2"):
        numbers = [{r["seed"]: r["history"] for r in found[task]} for found in (alone, shared)]
        assert len(numbers[0]) == 2
        assert numbers[0] == numbers[1]


# ----------------------------------------------------------------------------- other starts


def write_hf_bert(folder: Path) -> None:
    """A random Hugging Face BERT with a WordPiece tokenizer.json."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: i for i, word in enumerate([*specials, *WORDS])}
    tok = HFTokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tok.normalizer, tok.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    PreTrainedTokenizerFast(tokenizer_object=tok, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=24,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)


def test_hugging_face_bert_is_fine_tuned_by_our_model_and_by_transformers(tmp_path, glue_dir, capsys):
    from glue.hf_encoder import HFClassifier, HFTokenizer

    write_hf_bert(tmp_path / "bert")
    theirs, ours = HFClassifier(str(tmp_path / "bert"), 2).eval(), SequenceClassifier.from_pretrained(tmp_path / "bert")
    texts = glue.read_split(glue_dir / "RTE/dev.tsv", glue.TASKS["RTE"]).texts
    data = encode(texts, HFTokenizer(str(tmp_path / "bert")), 24)
    same = encode(texts, Tokenizer.load(tmp_path / "bert"), 24)
    assert data.ids.tolist() == same.ids.tolist()
    np.testing.assert_allclose(predict(theirs, data, torch.float32), predict(ours, data, torch.float32), atol=1e-5)
    common = ["--glue_dir", str(glue_dir), "--task", "MNLI,RTE", "--seeds", "1", "--max_len", "20", *QUICK]
    main([str(tmp_path / "bert"), *common])
    out = capsys.readouterr().out
    assert "bert · seed 1, from its MNLI model" in out
    main(["--hf", str(tmp_path / "bert"), *common])  # another engine is another start
    assert "bert-transformers · seed 1, from its MNLI model" in capsys.readouterr().out
    assert [r["run"] for r in records(tmp_path / "bert")["RTE"]] == ["bert", "bert-transformers"]
    assert "no tokenizer and config" in fails(capsys, ["--hf", str(glue_dir), *common])


def write_hf_encoder(folder: Path, kind: str) -> None:
    """A tiny random encoder of `kind`, pretrained-style (masked LM head), without a tokenizer."""
    import transformers as hf

    small = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    special = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2)
    torch.manual_seed(0)
    model = {
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**small, max_position_embeddings=24)),
        "roberta": lambda: hf.RobertaForMaskedLM(
            hf.RobertaConfig(**small, max_position_embeddings=26, type_vocab_size=1)
        ),
        "modernbert": lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(**small, **special)),
        "distilbert": lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(vocab_size=60, dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=24)
        ),
    }[kind]()
    model.to(torch.bfloat16).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "distilbert"])
def test_any_transformers_encoder_reads_the_flat_batch_as_its_own(kind, tmp_path):
    from glue.hf_encoder import HFClassifier

    write_hf_encoder(tmp_path, kind)
    torch.manual_seed(0)
    model = HFClassifier(str(tmp_path), 3, dropout=0.0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # the file is bf16
    assert model.n_positions == (math.inf if kind == "modernbert" else 24)
    dropouts = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert not any(p for name, p in dropouts.items() if not re.search(r"attention\.(self\.)?dropout$", name))
    assert model.classifier.out_features == 3
    lengths = [9, 3, 24]
    ids = torch.randint(5, 60, (sum(lengths),))
    cu = torch.tensor([0, 9, 12, 36], dtype=torch.int32)
    model.eval()
    flat = model(ids, torch.zeros_like(ids), cu, 24)
    alone = torch.cat([model.model(part[None]).logits for part in ids.split(lengths)])
    torch.testing.assert_close(flat, alone, atol=1e-5, rtol=1e-4)


def test_a_transformers_tokenizer_that_adds_nothing_itself_still_has_its_pairs_parted(tmp_path):
    from tokenizers import Tokenizer as Bare
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from glue.hf_encoder import HFTokenizer

    write_hf_bert(tmp_path)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    bare = Bare(models.WordLevel(vocabulary, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=bare, **special).save_pretrained(tmp_path)
    tokenizer = HFTokenizer(str(tmp_path))
    assert tokenizer.hf.num_special_tokens_to_add(pair=True) == 0
    data = encode([["the cat"], ["a dog"]], tokenizer, 24)
    assert data.ids.tolist() == [vocabulary[w] for w in ["[CLS]", "the", "cat", "[SEP]", "a", "dog", "[SEP]"]]
    (cut,) = tokenizer.encode_batch(["the \ud800 cat"])  # half of an emoji is unknown, not an exception
    assert cut == [vocabulary[w] for w in ["the", "[UNK]", "cat"]]


def test_transformers_weights_that_do_not_fit_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    from glue.hf_encoder import HFClassifier, HFTokenizer

    write_hf_bert(tmp_path)
    config, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    weights, written = load_file(file), config.read_text()
    name = "bert.encoder.layer.1.output.dense.weight"
    save_file({k: v for k, v in weights.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"its file has no {name} of the right shape"):
        HFClassifier(str(tmp_path), 2)
    save_file(weights | {name: torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"its file has no {name} of the right shape"):
        HFClassifier(str(tmp_path), 2)
    config.write_text(re.sub(r'"vocab_size": \d+', '"vocab_size": 9', written))
    with pytest.raises(ValueError, match="the model has 9 tokens, the tokenizer there"):
        HFTokenizer(str(tmp_path))


def test_texts_are_cut_at_learned_positions(tmp_path, tokenizer, capsys):
    write_checkpoint(tmp_path / "runs/bert", tokenizer, 10, position="learned", max_positions=9)
    main([str(tmp_path / "runs/bert"), *toy_task(tmp_path, 40), "--seeds", "1", *QUICK])
    assert "cut at its 9 learned positions, not at --max_len 256" in capsys.readouterr().out


# ----------------------------------------------------------------------------- bad input


def test_bad_files_get_one_line(run, tmp_path, capsys):
    task = toy_task(tmp_path, 40)
    train_file, dev_file = tmp_path / "toy/train.tsv", tmp_path / "toy/dev.tsv"
    good_train, good_dev = train_file.read_text(), dev_file.read_text()
    args = [str(run), *task, *QUICK]

    def message(train: str = good_train, dev: str = good_dev, extra: tuple[str, ...] = ()) -> str:
        train_file.write_text(train)
        dev_file.write_text(dev)
        return fails(capsys, [*args, *extra])

    assert "no column label; its columns are sentence, target" in message(good_train.replace("label", "target", 1))
    assert "no column sentence1+sentence2 or sentence" in message(good_train.replace("sentence", "text", 1))
    assert "no column nothing" in message(extra=("--text_columns", "nothing"))
    assert "dev.tsv:12: unknown label 'so-so'; known: negative, positive" in message(dev=good_dev + "a cat\tso-so\n")
    assert "train.tsv:32: label 0.5 is not a class; to predict numbers add --regression" in message(
        good_train + "a cat\t0.5\n"
    )
    assert "train.tsv:2: label 'negative' is not a number" in message(extra=("--regression",))
    assert "train.tsv:32: this row lacks a text or its label" in message(good_train + "a cat\n")
    assert "train.tsv:32: 3 columns, the header has 2; a tab inside a text?" in message(good_train + "a\tcat\t0\n")
    assert "unknown label '-'" in message(dev=good_dev + "a cat\t-\n")  # it means "no label" in MNLI only
    assert "every row has the label 'positive'" in message(good_train.replace("negative", "positive"))
    assert "train.tsv is empty" in message("")
    assert "not one row" in message("sentence\tlabel\n")
    train_file.write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    assert "is not UTF-8 text" in fails(capsys, args)
    (tmp_path / "x.jsonl").write_text('{"sentence": "a", "label": 1}\n{"sentence": \n')
    files = ["--task", str(tmp_path / "x.jsonl"), "--eval", str(tmp_path / "x.jsonl"), *QUICK]
    assert "x.jsonl:2: not a JSON object" in fails(capsys, [str(run), *files])
    assert "gone.tsv is missing" in fails(capsys, [str(run), "--task", "gone.tsv", "--eval", str(dev_file)])
    assert "RTE/train.tsv is missing" in fails(capsys, [str(run), "--task", "RTE", "--glue_dir", str(tmp_path)])
    assert not (run / "glue").exists()  # nothing half-written


def test_bad_settings_get_one_line(run, tmp_path, tokenizer, capsys):
    task = toy_task(tmp_path, 40)
    assert "unknown task 'SST2'; known: MNLI, QQP" in fails(capsys, [str(run), "--task", "SST2"])
    assert "is not a folder" in fails(capsys, ["gone", *task])
    (tmp_path / "empty").mkdir()
    assert "no complete checkpoint" in fails(capsys, [str(tmp_path / "empty"), *task])
    assert "give a run folder" in fails(capsys, task)
    assert "--seeds 1;2" in fails(capsys, [str(run), *task, "--seeds", "1;2"])
    assert "--seeds 18446744073709551616" in fails(capsys, [str(run), *task, "--seeds", str(2**64)])
    assert "--epochs 0" in fails(capsys, [str(run), *task, "--epochs", "0"])
    assert "--dropout 2.0: give a share" in fails(capsys, [str(run), *task, "--dropout", "2"])
    assert "--label_column is for a task of your own" in fails(capsys, [str(run), "--label_column", "grade"])
    assert "takes both files: --task path/to/train.tsv --eval" in fails(capsys, [str(run), *task[:2]])
    assert "takes both files: --task path/to/train.tsv --eval" in fails(capsys, [str(run), "--task", "RTE", *task[2:]])
    assert "takes both files: --task path/to/train.tsv --eval" in fails(capsys, [str(run), *task[2:]])
    assert "--regression is for a task of your own" in fails(capsys, [str(run), "--task", "RTE", "--regression"])
    for name in ("RTE", "a/b", "a,b", "loss"):
        assert f"{name!r} cannot name your task" in fails(capsys, [str(run), *task, "--task_name", name])
    write_checkpoint(tmp_path / "elsewhere/small", tokenizer, 10)
    assert "are both called small step_00000010; rename one" in fails(
        capsys, [str(run), str(tmp_path / "elsewhere/small"), *task]
    )
    assert "lower --lr" in fails(capsys, [str(run), *task, "--lr", "1e30", "--epochs", "2", "--seeds", "1"])
    if not torch.cuda.is_available():
        assert "--device cuda" in fails(capsys, [str(run), *task, "--device", "cuda"])
    folder = write_checkpoint(tmp_path / "runs/odd", tokenizer, 10, vocab_size=900)
    assert f"{folder}: the model has 900 tokens, the tokenizer there 300" in fails(capsys, [str(folder), *task])
    write_hf_bert(tmp_path / "bert")
    (tmp_path / "bert/model.safetensors").unlink()
    for start in ([], ["--hf"]):
        assert "bert has no weights (*.safetensors, pytorch_model.bin)" in fails(
            capsys, [*start, str(tmp_path / "bert"), *task]
        )


def test_an_unreachable_hub_gets_one_line(run, capsys, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = fails(capsys, [str(run), "--task", "RTE", *QUICK])
    assert "not available from the Hugging Face Hub (ConnectionError); give --glue_dir" in message


def test_what_can_be_used_but_should_be_known_is_said(run, tmp_path, capsys):
    args = [str(run), *toy_task(tmp_path, 40), "--seeds", "1", *QUICK]
    dev = tmp_path / "toy/dev.tsv"
    dev.write_text("sentence\tlabel\nthe cat\tpositive\n\tpositive\n")
    main(args)
    out = capsys.readouterr().out
    assert "dev.tsv: 1 rows with an empty text, kept; the first in line 3" in out
    assert f"warning: {dev} has no row of class negative" in out
