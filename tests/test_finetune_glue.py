"""finetune_glue.py and glue/: official files through the real path, scores computed by hand."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import DEFAULT, Mock, patch

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, python, refused, save_checkpoint, write_jsonl
from safetensors.torch import load_file, save_file
from scipy.stats import ttest_ind
from torch._dynamo.utils import counters
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, pipeline

import finetune_glue
from corpus.tokenizer import Tokenizer
from export import huggingface
from finetune_glue import build_model, fine_tune, main, predict
from glue.encode import Encoded, encode
from glue.files import Split, load_data, locate, read_split, to_numbers
from glue.hf_encoder import HFClassifier, HFTokenizer
from glue.starts import Start
from glue.table import table
from glue.tasks import FROM_MNLI, OWN, TASKS, Task, evaluate, metric
from model import EncoderConfig, MaskedLM, SequenceClassifier, find_checkpoints
from records import read_jsonl

DATA = ROOT / "../shared/data"
WORDS = "the a man woman dog cat house is was not very good bad runs sleeps in on river fine awful"
WORDS = WORDS.split()
ON_CPU = ["--device", "cpu"]
QUICK = ["--epochs", "1", "--batch_size", "8", "--lr", "1e-3", "--dtype", "float32", *ON_CPU]
LEARN = ["--epochs", "12", "--batch_size", "16", "--lr", "3e-3", "--dropout", "0", *ON_CPU,
         "--seeds", "5"]


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(3, 9)))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    rng = np.random.default_rng(0)
    return Tokenizer.train([sentence(rng) for _ in range(400)], 300)


def write_checkpoint(run: Path, tokenizer: Tokenizer, step: int, **shape) -> Path:
    folder = run / f"ckpt/step_{step:08d}"
    small = dict(n_layers=2, n_heads=2, d_model=32, d_ff=48, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(step)
    progress = dict(step=step, tokens=100 * step, train_seconds=step / 2, gpu_seconds=step / 2,
                    dollars=0.5, family="mosaic", preset="small")
    model = MaskedLM(EncoderConfig(**small | shape))
    return save_checkpoint(folder, tokenizer, model, **progress)


@pytest.fixture
def run(tmp_path, tokenizer) -> Path:
    return write_checkpoint(tmp_path / "runs/small", tokenizer, 10).parents[1]


# the official headers; what is neither text nor label is filled with "-"
HEADERS = {
    "MNLI": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
            "sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label",
    "QQP": "id qid1 qid2 question1 question2 is_duplicate", "QNLI": "index question sentence label",
    "SST-2": "sentence label", "CoLA": "source label mark sentence",
    "RTE": "index sentence1 sentence2 label",
    "MRPC": "Quality,#1 ID,#2 ID,#1 String,#2 String",
    "STS-B": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
}


def official_rows(task: str, n: int, seed: int) -> list[dict[str, str]]:
    """n rows as the official file of `task` has them, every label in turn, with a quote."""
    rng = np.random.default_rng([seed, *task.encode()])
    spec, out = TASKS[task], []
    for i in range(n):
        row = dict.fromkeys(re.split("," if task == "MRPC" else " ", HEADERS[task]), "-")
        for column in spec.columns[0]:
            row[column] = ('"' if i % 3 == 0 else "") + sentence(rng)
        value = str(round(rng.uniform(0, 5), 3))
        row[spec.label_columns[0]] = value if spec.regression else spec.labels[i % len(spec.labels)]
        out.append(row)
    return out


def write_tsv(path: Path, rows: list[dict[str, str]], header: bool = True, extra: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(rows[0])] * header + ["\t".join(row.values()) for row in rows]
    path.write_text("\n".join(lines) + "\n" + extra, encoding="utf-8")


@pytest.fixture(scope="session")
def glue_dir(tmp_path_factory) -> Path:
    """All eight tasks in the official layout, small; MNLI, QQP with the broken rows they have."""
    root = tmp_path_factory.mktemp("glue")
    broken = {"MNLI": "7\t8\ttorn\n",
              "QQP": "1\t2\t3\thow is the\ncat?\tthe cat\t1\n9\t9\t9\ta\tb\t\n"}
    for name, task in TASKS.items():
        header, rows = name != "CoLA", official_rows(name, 24, 0)
        write_tsv(root / name / "train.tsv", rows, header, broken.get(name, ""))
        for split in task.devs:
            write_tsv(root / name / f"{split}.tsv", official_rows(name, 12, len(split)), header)
    return root


def texts_only(*columns: list[str]) -> Split:
    return Split("", list(columns), [], [])


def records(run: Path) -> dict[str, list[dict]]:
    return {path.stem: read_jsonl(path)[0] for path in (run / "glue").glob("*.jsonl")}


def fine_tuned(run: Path, *args: str, task: str = "toy") -> list[dict]:
    """All records of the run's task after this command."""
    main([str(run), *args])
    return records(run)[task]


def refuses(message: str, *args: object) -> None:
    with refused(message):
        main([*map(str, args)])


@pytest.fixture
def printed(capsys):
    """What main() prints with these arguments."""

    def call(*args: object) -> str:
        capsys.readouterr()
        main([*map(str, args)])
        return capsys.readouterr().out

    return call


def test_every_task_runs_on_files_in_the_official_formats(run, glue_dir, printed):
    out = printed(run, "--glue_dir", glue_dir, "--seeds", "1", *QUICK)
    found = records(run)
    assert set(found) == set(TASKS)
    expected = {"CoLA": {"matthews"}, "STS-B": {"spearman", "pearson"}, "QQP": {"accuracy", "f1"},
                "MRPC": {"accuracy", "f1"}, "MNLI": {"accuracy_m", "accuracy_mm"}}
    for task, (record,) in found.items():
        assert set(record["metrics"]) == expected.get(task, {"accuracy"})
        counted = [v for k, v in record["metrics"].items() if k != "pearson"]
        assert record["score"] == pytest.approx(np.mean(counted))
        assert (record["n_train"], record["n_dev"]) == (24, 24 if task == "MNLI" else 12)
        assert record["checkpoint"] == "ckpt/step_00000010"
        costs = [record[k] for k in ("step", "tokens", "pretrain_seconds", "pretrain_dollars")]
        assert costs == [10, 1000, 5.0, 0.5]
        assert record["recipe"]["start"].startswith("MNLI" if task in FROM_MNLI else "checkpoint")
        assert not record["official"]
        assert f"{task} · small step_00000010 · seed 1" in out
        assert f"{task}: train 24" in out
    assert "QQP/train.tsv: 3 rows that lack a text or the label left out; the first in" in out
    assert "MNLI/train.tsv: 1 rows that lack" in out and out.count("; the first in line 26") == 2
    assert out.count(": a subset, not the official task's ") == 8
    assert out.count("from its MNLI model") == 3
    assert "8-task mean, last evaluation" in out
    assert f"{np.mean([100 * record['score'] for (record,) in found.values()]):.2f}" in out


@pytest.mark.parametrize("task", TASKS)
def test_tsv_and_parquet_and_hub_read_the_same(task, tmp_path, monkeypatch):
    spec, rows = TASKS[task], official_rows(task, 9, 0)
    write_tsv(tmp_path / "train.tsv", rows, header=task != "CoLA")
    labels = [r[spec.label_columns[0]] for r in rows]
    hub = {c: [r[o] for r in rows] for c, o in zip(spec.columns[-1], spec.columns[0])}
    numbers = map(float, labels) if spec.regression else map(spec.labels.index, labels)
    hub["label"] = list(numbers)
    pq.write_table(pa.table(hub), tmp_path / "train.parquet")
    load_dataset = Mock(return_value=datasets.Dataset.from_dict(hub))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources = [tmp_path / "train.tsv", tmp_path / "train.parquet", locate("", spec)["train"]]
    tsv, *others = (read_split(source, spec) for source in sources)
    config = task.lower().replace("-", "")
    load_dataset.assert_called_once_with("nyu-mll/glue", config, split="train")
    assert len(tsv.texts) == (1 if task in ("SST-2", "CoLA") else 2)
    assert tsv.texts[0][0].startswith('"')  # a quote is a character, it opens nothing
    for other in others:
        assert tsv.texts == other.texts
        assert to_numbers(tsv, spec).tolist() == to_numbers(other, spec).tolist()


def test_lines_end_at_line_feeds_only(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"sentence\tlabel\r\none\rtext\t1\r\nanother\t0\r\n")
    split = read_split(tmp_path / "x.tsv", TASKS["SST-2"])
    assert (split.texts, split.labels) == ([["one\rtext", "another"]], ["1", "0"])


def test_parquet_in_the_hub_layout_is_found(tmp_path):
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/validation-00000-of-00001.parquet").touch()
    here = locate(str(tmp_path), TASKS["SST-2"])
    assert here["dev"].name == "validation-00000-of-00001.parquet"
    assert here["train"] == tmp_path / "SST-2/train.tsv"
    assert locate("", TASKS["STS-B"])["dev"] == "nyu-mll/glue stsb validation"
    assert locate("", TASKS["MNLI"])["dev_mismatched"] == "nyu-mll/glue mnli validation_mismatched"
    assert list(locate(str(tmp_path), TASKS["MNLI"])) == ["train", "dev_matched"]


@pytest.mark.skipif(not (DATA / "glue").is_dir(), reason="the official files are not in this clone")
@pytest.mark.parametrize("task", ["SST-2", "CoLA", "RTE", "MRPC", "STS-B"])
def test_official_files_have_their_official_size(task):
    data = load_data(TASKS[task], locate(str(DATA / "glue"), TASKS[task]))
    assert data.facts["official"] and "subset" not in data.notes[0]
    assert len(data.train.lines) == TASKS[task].sizes[0]
    assert not any("lack" in note for note in data.notes)


def test_labels_are_in_the_hubs_order_and_recipes_upstreams():
    assert TASKS["MNLI"].labels == ("entailment", "neutral", "contradiction")
    assert TASKS["QNLI"].labels == TASKS["RTE"].labels == ("entailment", "not_entailment")
    assert all(TASKS[t].labels == ("0", "1") for t in ("QQP", "MRPC", "SST-2", "CoLA"))
    decay = {name: t.recipe.weight_decay * t.recipe.lr for name, t in TASKS.items()}  # decoupled
    assert decay == pytest.approx({"MNLI": 5e-6, "QQP": 3e-6, "QNLI": 1e-6, "SST-2": 3e-6,
                                   "CoLA": 5e-6, "RTE": 1e-5, "MRPC": 8e-6, "STS-B": 3e-6})
    recipes = [(r.epochs, r.batch_size, r.n_seeds) for r in (t.recipe for t in TASKS.values())]
    assert recipes == [(3, 48, 1), (5, 16, 1), (10, 16, 1), (3, 16, 3), (10, 32, 4), (3, 16, 5),
                       (10, 32, 5), (10, 32, 5)]


def test_small_tasks_start_from_mnli_only_when_it_is_there(run, glue_dir, printed):
    common = ["--glue_dir", glue_dir, "--seeds", "1", *QUICK]
    rte = run, "--task", "RTE", *common
    assert "from the checkpoint" in printed(*rte)
    printed(run, "--task", "MNLI", *common)
    assert "from its MNLI model" in printed(*rte), "another start is another job"
    assert "1 jobs had been finished before" in printed(*rte, "--no_mnli_start")
    plain, warm = records(run)["RTE"]
    assert plain["history"][0]["loss"] != warm["history"][0]["loss"]
    assert SequenceClassifier.from_pretrained(run / "glue/mnli/step_00000010").n_labels == 3
    # a run pretrained anew under its old name does not inherit the old MNLI model
    progress = run / "ckpt/step_00000010/progress.json"
    progress.write_text(progress.read_text().replace("5.0", "6.0"))
    assert "from the checkpoint" in printed(*rte)


def test_metrics_are_those_computed_by_hand():
    y, answers = np.array([1, 1, 1, 1, 0, 0, 0]), np.array([1, 1, 1, 0, 0, 0, 1])
    assert metric("accuracy", y, answers) == 5 / 7
    assert metric("f1", y, answers) == 0.75  # of four ones three are found, one too many is
    assert metric("matthews", y, answers) == pytest.approx((3 * 2 - 1 * 1) / (4 * 3))
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 8.0])
    assert metric("pearson", a, b) == pytest.approx(13 / math.sqrt(5 * 41))  # less their means
    assert metric("spearman", a, b) == pytest.approx(1 - 6 * (1 + 1) / (4 * 15))  # ranks 1 2 4 3


def test_mnli_matched_and_mismatched_keep_their_names():
    y = {s: np.array([0, 1, 2, 0]) for s in TASKS["MNLI"].devs}
    answers = {"dev_matched": np.array([0, 1, 2, 0]), "dev_mismatched": np.zeros(4, int)}
    expected = {"score": 0.75, "accuracy_m": 1.0, "accuracy_mm": 0.5}
    assert evaluate(TASKS["MNLI"], y, answers, dict.fromkeys(y)) == expected


@pytest.mark.filterwarnings("error")
def test_constant_answers_score_zero_without_a_warning():
    y, same = np.array([1, 0, 1, 1]), np.zeros(4, dtype=int)
    for name in ("f1", "matthews", "pearson", "spearman"):
        assert metric(name, y, same) == metric(name, same, same) == 0.0
    assert metric("matthews", same, y) == 0.0


def test_majority_is_the_score_of_the_commonest_training_label(glue_dir, tmp_path):
    rows = official_rows("MRPC", 12, 0)
    for row in rows[:9]:
        row["Quality"] = "1"
    write_tsv(tmp_path / "train.tsv", rows)
    sources = {"train": tmp_path / "train.tsv", "dev": glue_dir / "MRPC/dev.tsv"}
    expected = (0.5 + 2 * 6 / (2 * 6 + 6)) / 2  # 6 of 12: accuracy 0.5, F1 2/3
    assert load_data(TASKS["MRPC"], sources).facts["majority"] == pytest.approx(expected)


def test_the_mean_is_the_mean_of_task_means_at_the_last_evaluation():
    last = {"MNLI": 0.7, "QQP": 0.8, "QNLI": 0.5, "SST-2": 0.9, "CoLA": 0.4, "RTE": 0.6,
            "MRPC": 0.7, "STS-B": 0.3}
    rows = [dict(task=task, run="r", checkpoint="random", step=0, seed=seed, majority=0.1,
                 official=task != "QQP", score=score + 0.02 * seed)
            for task, score in last.items() for seed in range(2 if task == "MNLI" else 1)]
    text = table(rows)
    row = next(line for line in text.splitlines() if line.startswith("r random"))
    mean = np.mean([71, 80, 50, 90, 40, 60, 70, 30])  # MNLI: 70 and 72
    assert row.split()[-1] == f"{mean:.2f}"
    assert "71.0 ± 1.4 (2)" in row
    assert "QQP*" in text and "* a subset" in text
    assert "2-task mean" in table([r for r in rows if r["task"] in ("CoLA", "RTE")])


def test_the_table_says_what_pretraining_gained_over_random_weights():
    scores = {"CoLA": ([0.10, 0.12, 0.17], [0.10, 0.11, 0.13]),
              "RTE": ([0.70, 0.74, 0.66], [0.52, 0.50, 0.54])}
    rows = [dict(task=task, run="r", checkpoint=checkpoint, step=step, seed=seed, majority=0.5,
                 official=True, score=score)
            for task, both in scores.items()
            for (checkpoint, step), some in zip([("ckpt/step_00000007", 7), ("random", 0)], both)
            for seed, score in enumerate(some)]

    def gains(rows):
        lines = table(rows).splitlines()
        return lines[next(i for i, line in enumerate(lines) if line.startswith("gained")) + 1]

    cells = re.findall(r"(\S+) ± (\S+) \(p (\S+)\)", gains(rows))
    means = [np.mean([of[i] for of in scores.values()], axis=0) for i in (0, 1)]  # of each seed
    for cell, (a, b) in zip(cells, [*scores.values(), means], strict=True):
        error = math.sqrt(sum(np.var(x, ddof=1) / len(x) for x in (a, b))) * 100
        p = ttest_ind(a, b, equal_var=False).pvalue
        assert cell == (f"{100 * (np.mean(a) - np.mean(b)):+.1f}", f"{error:.1f}", f"{p:.2g}")
    one_seed = [r for r in rows if r["task"] == "RTE" and r["seed"] == 0]
    assert gains(one_seed).split()[-1] == "+18.0"
    fewer = [r for r in rows if r["task"] == "RTE" or r["seed"] == 0]  # upstream's seeds differ
    assert gains(fewer).split()[-1] == "+9.0"
    assert "random weights" not in table([r for r in rows if r["step"] == 7])
    # collapsed runs: in floating point the variance of 146/277, three times, is not 0
    same = [r | {"score": (146 if r["step"] else 131) / 277} for r in rows if r["task"] == "CoLA"]
    assert gains(same).split()[-1] == "+5.4"
    foreign = [r | {"run": "my bert"} | ({"checkpoint": "my bert"} if r["step"] else {})
               for r in one_seed]
    assert gains(foreign).split() == ["my", "bert", "+18.0"]


def test_pairs_are_cut_longest_first(tokenizer):
    a, b = [" ".join(["the"] * 12)], [" ".join(["dog"] * 4)]
    n_a, n_b = len(tokenizer.encode(a[0])), len(tokenizer.encode(b[0]))
    assert n_a > n_b
    both = texts_only(a, b)
    whole = encode(both, tokenizer, 256)
    assert whole.ids.tolist() == [tokenizer.cls_id, *tokenizer.encode(a[0]), tokenizer.sep_id,
                                  *tokenizer.encode(b[0]), tokenizer.sep_id]
    cut = encode(both, tokenizer, 3 + n_a + n_b - 2)  # two tokens too many: both leave the longer
    assert cut.first.tolist() == [n_a]  # [CLS] + n_a - 2 + [SEP]
    assert cut.ids[n_a:].tolist() == [*tokenizer.encode(b[0]), tokenizer.sep_id]
    tight = encode(both, tokenizer, 3 + 5)  # 5 tokens for both: 3 and 2
    assert (tight.first.tolist(), len(tight.ids)) == ([5], 8) and (whole.n_cut, cut.n_cut) == (0, 1)
    assert len(encode(texts_only(a), tokenizer, 8).ids) == 8


def test_flat_batches_equal_padded_ones(tokenizer):
    rng = np.random.default_rng(3)
    texts = [[sentence(rng) for _ in range(7)] for _ in "ab"]
    data = encode(texts_only(*texts), tokenizer, 20)
    torch.manual_seed(0)
    shape = dict(vocab_size=300, n_layers=2, n_heads=2, d_model=32, d_ff=48, max_positions=20)
    model = SequenceClassifier(EncoderConfig(**shape, position="learned"), 3).eval()
    index = np.array([4, 0, 6, 2])
    batch = data.batch(index, torch.device("cpu"))
    assert batch["input_ids"].dtype == torch.int64 and batch["cu_seqlens"].dtype == torch.int32
    assert len(batch["input_ids"]) == len(batch["token_type_ids"])
    assert batch["cu_seqlens"][-1] < len(batch["input_ids"])  # rows of no example
    assert len(batch["input_ids"]) % 64 == 0
    ids, mask, types = (torch.zeros(4, 20, dtype=torch.long) for _ in range(3))
    for row, i in enumerate(index):
        example = data.ids[data.starts[i] : data.starts[i + 1]]
        ids[row, : len(example)] = torch.from_numpy(example)
        mask[row, : len(example)] = 1
        types[row, data.first[i] : len(example)] = 1
    torch.testing.assert_close(model(**batch), model(ids, mask, types))


def test_predict_keeps_the_order_over_many_batches():
    class Echo(torch.nn.Linear):  # answers with the first token of each example
        def forward(self, input_ids, token_type_ids, cu_seqlens, max_seqlen):
            return input_ids[cu_seqlens[:-1].long()].float()[:, None]

    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 200, 900)  # about 90,000 tokens: several batches
    starts = np.concatenate([[0], lengths.cumsum()])
    ids = np.repeat(np.arange(900), lengths).astype(np.int32)
    data = Encoded(ids, starts, lengths, n_labels=900)
    assert predict(Echo(1, 1), data, torch.float32)[:, 0].tolist() == list(range(900))


def toy_task(folder: Path, n: int = 160) -> list[str]:
    """Label: does the sentence say "good"? A task of one's own; returns its arguments."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        words = sentence(rng).replace("good", "fine").split()
        words[rng.integers(len(words))] = "good" if i % 2 else "bad"
        rows.append({"sentence": " ".join(words), "label": "positive" if i % 2 else "negative"})
    write_tsv(folder / "toy/train.tsv", rows[: n * 3 // 4])
    write_tsv(folder / "toy/dev.tsv", rows[n * 3 // 4 :])
    return ["--task", str(folder / "toy/train.tsv"), "--eval", str(folder / "toy/dev.tsv")]


def test_a_learnable_task_is_learned_and_numbers_are_reproducible(run, tmp_path, capsys):
    task = toy_task(tmp_path)
    (first,) = fine_tuned(run, *task, *LEARN)  # named after its folder
    assert first["majority"] == 0.5 and first["score"] > 0.9
    assert len(first["history"]) == 12
    assert first["history"][-1]["accuracy"] == first["metrics"]["accuracy"]
    assert "2 classes: negative, positive" in capsys.readouterr().out
    (run / "glue/toy.jsonl").unlink()
    (second,) = fine_tuned(run, *task, *LEARN)
    assert second["history"] == first["history"]
    assert fine_tuned(run, *task, *LEARN[:-1], "6")[-1]["history"] != first["history"]


@pytest.mark.parametrize("hf", [False, True])
def test_from_scratch_is_the_same_shape_with_random_weights(run, tmp_path, printed, hf):
    if hf:
        write_hf_bert(run := tmp_path / "bert")
    args = [*toy_task(tmp_path, 40), "--from_scratch", "--seeds", "1", *QUICK]
    out = printed(*["--hf"] * hf, run, *args)
    pretrained, random = records(run)["toy"]
    assert pretrained["checkpoint"] == ("bert-transformers" if hf else "ckpt/step_00000010")
    facts = [random[k] for k in ("checkpoint", "step", "tokens", "pretrain_seconds", "family")]
    assert facts == ["random", 0, 0, 0, "other" if hf else "mosaic"]
    assert pretrained["history"] != random["history"]
    assert "from random weights" in out and "gained over random weights" in out


def test_the_rate_warms_up_and_falls_to_zero_and_every_epoch_is_shuffled_anew(monkeypatch):
    rates, settings, seen, orders = [], {}, [], []

    class Optimizer(torch.optim.AdamW):
        def step(self):
            settings.update(self.param_groups[0])
            rates.append(settings["lr"])
            return super().step()

    class Model(torch.nn.Linear):
        def forward(self, input_ids, cu_seqlens, **_):
            seen.append((self.training, input_ids[: cu_seqlens[-1]].tolist()))
            return self.weight.expand(len(cu_seqlens) - 1, 1)

    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    data = Encoded(np.arange(49, dtype=np.int32), np.arange(50), np.ones(49, int), n_labels=49)
    recipe = replace(TASKS["RTE"].recipe, epochs=10, batch_size=5)
    for seed in (7, 8):
        seen.clear()
        model = Model(1, 1)
        evaluate = lambda model=model: {"score": predict(model, data, torch.float32)[0, 0]}
        history, _ = fine_tune(model, data, np.zeros(49, np.float32), recipe, seed, torch.float32,
                               evaluate)
        assert [h["epoch"] for h in history] == list(range(1, 11))
        assert [training for training, _ in seen] == [*[True] * 10, False] * 10
        assert [len(batch) for _, batch in seen] == [*[5] * 9, 4, 49] * 10
        orders += [[i for _, batch in seen[n : n + 10] for i in batch] for n in range(0, 110, 11)]
    assert all(sorted(order) == list(range(49)) for order in orders)
    assert len(set(map(tuple, orders))) == 20
    assert len(rates) == 200
    assert rates[:6] == pytest.approx([1e-5 * k / 6 for k in range(1, 7)])  # 6 % of 100 steps
    assert rates[5] == max(rates) and rates[99] == pytest.approx(1e-5 / 94)
    assert settings.items() >= dict(betas=(0.9, 0.98), eps=1e-6, weight_decay=1.0).items()


def test_model_heeds_seed_and_dropout(tmp_path):
    cfg = EncoderConfig(vocab_size=64, n_layers=1, n_heads=2, d_model=16, d_ff=16)
    MaskedLM(cfg).save_pretrained(tmp_path)
    start = Start(tmp_path, tmp_path, "r", "r", {}, "", "", None)
    a, b, again = (build_model(start, TASKS["RTE"], 0.25, seed) for seed in (1, 2, 1))
    assert torch.equal(a.classifier.weight, again.classifier.weight)
    assert not torch.equal(a.classifier.weight, b.classifier.weight)
    kinds = {"embedding", "output", "mlp", "classifier"}
    assert {getattr(a.cfg, f"{k}_dropout") for k in kinds} == {0.25}
    a.save_pretrained(tmp_path / "tuned")  # a classifier of other classes, of the same number
    tuned = build_model(replace(start, folder=tmp_path / "tuned"), TASKS["RTE"], 0.25, 1)
    assert not torch.equal(a.classifier.weight, tuned.classifier.weight)
    assert torch.equal(a.pooler.weight, tuned.pooler.weight)


def test_compiled_once_for_every_batch_and_for_every_seed(tokenizer, monkeypatch):
    rng = np.random.default_rng(0)
    texts = [[sentence(rng) for _ in range(57)] for _ in "ab"]
    data = encode(texts_only(*texts), tokenizer, 40)
    y, recipe = np.arange(57) % 2, replace(OWN, epochs=2, batch_size=8)
    assert len(y) % recipe.batch_size == 1  # a single example in the last batch
    kinds = ("embedding", "output", "mlp", "classifier")
    cfg = EncoderConfig(vocab_size=300, n_layers=1, n_heads=2, d_model=32, d_ff=48,
                        **{f"{kind}_dropout": 0.0 for kind in kinds})
    torch._dynamo.reset()
    losses, logits, graphs = [], [], []
    for compiled in (False, True, True):
        torch.manual_seed(0)
        model = SequenceClassifier(cfg, 2)
        if compiled:  # what dynamo traces and guards does not depend on the backend; this is fast
            model.compile(dynamic=True, backend="aot_eager")
        before = counters["stats"]["unique_graphs"]
        history, _ = fine_tune(model, data, y, recipe, 1, torch.float32, lambda: {"score": 0.0})
        losses.append([h["loss"] for h in history])
        logits.append(predict(model, data, torch.float32))
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert graphs[0] == graphs[2] == 0
    assert graphs[1] <= 3  # training, evaluation, and torch treats sizes of 1 apart
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)
    assert losses[2] == losses[1]


def test_regression_on_jsonl_with_two_named_columns(run, tmp_path):
    rng = np.random.default_rng(0)
    for name, n in (("train", 96), ("dev", 32)):
        rows = []
        for _ in range(n):
            k = int(rng.integers(0, 5))
            left = " ".join(["dog"] * k + ["cat"] * (4 - k))
            rows.append({"left": left, "right": sentence(rng), "grade": k / 2})
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    files = ["--task", str(tmp_path / "train.jsonl"), "--eval", str(tmp_path / "dev.jsonl")]
    files += ["--task_name", "dogs"]
    columns = ["--text_columns", "left,right", "--label_column", "grade", "--regression"]
    (record,) = fine_tuned(run, *files, *columns, *LEARN, task="dogs")
    assert record["majority"] == 0.0 and set(record["metrics"]) == {"spearman", "pearson"}
    assert record["score"] == record["metrics"]["spearman"] > 0.7
    message = "train.jsonl: label 0.5 is not a class; for numbers add --regression"
    refuses(message, run, *files, *columns[:-1], *LEARN)


@pytest.mark.parametrize(("path", "name"), [("spam/train.tsv", "spam"), ("data/spam.tsv", "spam"),
                                            ("spam/train-v2.jsonl", "train-v2")])
def test_a_task_of_ones_own_is_named_after_its_file_or_folder(path, name):
    cfg = finetune_glue.Config(task=path, eval="dev.tsv")
    assert [task.name for task in finetune_glue.pick_tasks(cfg)] == [name]
    assert [t.name for t in finetune_glue.pick_tasks(replace(cfg, task_name="ham"))] == ["ham"]


def test_predictions_cover_unlabelled_rows_and_on_eval_make_the_score(run, tmp_path, printed):
    task = toy_task(tmp_path)
    texts = ["sentence", "the dog is good", "a cat was bad", "the river is good"]
    (tmp_path / "new.tsv").write_text("\n".join(texts) + "\n")
    args = [*task, *LEARN, "--predict", str(tmp_path / "new.tsv")]
    (record,) = fine_tuned(run, *args)
    path = run / "glue/predictions/toy_step_00000010_seed5_new.tsv"
    assert path.read_text() == "index\tprediction\n0\tpositive\n1\tnegative\n2\tpositive\n"
    of_eval = path.with_stem(path.stem.removesuffix("_new"))
    answers, truth = ([line.split("\t")[1] for line in file.read_text().splitlines()[1:]]
                      for file in (of_eval, Path(task[3])))
    correct = [a == b for a, b in zip(answers, truth, strict=True)]
    assert record["score"] == pytest.approx(np.mean(correct))
    assert "1 jobs had been finished before" in printed(run, *args)
    path.unlink()  # asked for and gone: the job is not finished
    main([str(run), *args])
    assert path.exists()
    (tmp_path / "new.tsv").write_text("index\tsentence\n0\ta\n5\n")
    refuses("new.tsv:3: this row lacks a text", run, *args)


TAG = ["--epochs", "16", "--batch_size", "4", "--lr", "3e-3", "--dropout", "0", "--seeds", "5",
       "--dtype", "float32", *ON_CPU]
TAGS = {"the": "DET", "a": "DET", "man": "NOUN", "woman": "NOUN", "dog": "NOUN", "cat": "NOUN"}


def tagged(n: int, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """n sentences, each word with its label."""
    rng = np.random.default_rng(seed)
    sentences = [sentence(rng).split() for _ in range(n)]
    return [(words, [TAGS.get(word, "X") for word in words]) for words in sentences]


def write_words(path: Path, rows: list, labelled: bool = True) -> Path:
    """Sentences of words in the form that the suffix says."""
    if path.suffix in (".jsonl", ".NDJSON"):
        return write_jsonl(path, [{"words": words, "labels": labels} for words, labels in rows])
    if path.suffix == ".conllu":
        text = ["# newdoc"]
        for words, labels in rows:
            text += ["# sent_id = 1", "1-2\tboth" + "\t_" * 8]
            text += ["\t".join([f"{i}", w, "_", y, *"_" * 6])
                     for i, (w, y) in enumerate(zip(words, labels), 1)]
            text += ["8.1\tunsaid" + "\t_" * 8, ""]
    else:
        lines = [[f"{w} {y}" if labelled else w for w, y in zip(*row)] + [""] for row in rows]
        text = ["-DOCSTART- O", "", *(line for row in lines for line in row)]
    path.write_text("\n".join(text) + "\n")
    return path


def words_task(**changes) -> Task:
    return Task("pos", OWN, (("words",),), ("label", "labels"), **changes)


@pytest.mark.parametrize("suffix", [".jsonl", ".NDJSON", ".conllu", ".txt"])
def test_words_are_read_alike_from_every_form_and_it_is_said(suffix, tmp_path):
    rows = tagged(30)
    files = {n: write_words(tmp_path / f"{n}{suffix}", rows) for n in ("train", "dev")}
    task = replace(words_task(), label_columns=("upos" if suffix == ".conllu" else "labels",))
    data = load_data(task, files)
    assert data.train.words == [words for words, _ in rows]
    assert data.task.labels == ("DET", "NOUN", "X")
    assert [data.task.labels[i] for i in data.y["dev"]] == [y for _, ys in rows for y in ys]
    form = {".conllu": "CoNLL-U", ".txt": "CoNLL"}.get(suffix, "rows")
    assert data.notes == ["pos: train 30, dev 30, 3 classes: DET, NOUN, X; "
                          f"{form} with a label for each word, metric accuracy"]


def test_the_first_sub_word_has_the_label_and_what_is_cut_off_none(tokenizer):
    words = ["the", "riverhouse", "?", "dogs"]
    split = Split("", [[" ".join(words)] * 2], [], [1, 2], words=[words, words[:1]])
    data = encode(split, tokenizer, 99)
    alone = tokenizer.encode(" ".join(words))
    assert data.ids[: data.starts[1]].tolist() == [tokenizer.cls_id, *alone, tokenizer.sep_id]
    begins = np.flatnonzero(data.words >= 0)
    assert data.words[begins].tolist() == [0, 1, 2, 3, 4]
    starts = [len(tokenizer.encode(" ".join(words[:i]))) + 1 for i in range(4)]
    assert begins[:4].tolist() == starts
    assert data.labels(np.array([1]))[:3].tolist() == [-1, 4, -1]
    cut = encode(split, tokenizer, starts[3] + 1)
    assert (cut.words.max(), (cut.words >= 0).sum(), cut.n_cut, cut.n_labels) == (4, 4, 1, 5)

    class Echo(torch.nn.Linear):
        def forward(self, input_ids, **_):
            return input_ids[:, None].float()

    found = predict(Echo(1, 1), cut, torch.float32)[:, 0]
    assert found[[0, 4]].tolist() == [tokenizer.encode("the")[0]] * 2
    assert np.isnan(found[3])


def test_entities_count_only_when_whole(tmp_path):
    names = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")
    y = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "I-LOC", "O"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "I-LOC", "B-PER"]]
    flat = [np.array([names.index(label) for row in side for label in row])
            for side in (y, predicted)]
    task = words_task(words=True, labels=names, metrics=("entity_f1",))
    found = evaluate(task, {"dev": flat[0]}, {"dev": flat[1]}, {"dev": [4, 3]})
    assert found["score"] == found["entity_f1"] == pytest.approx(2 * 2 / (4 + 3))  # 2 of 3, of 4
    nothing = evaluate(task, {"dev": flat[0]}, {"dev": np.full(7, 4)}, {"dev": [4, 3]})
    assert nothing["score"] == 0.0
    rows = list(zip([["a"] * 4, ["b"] * 3], y))
    file = write_words(tmp_path / "names.txt", rows)  # what they are measured by without a word
    assert load_data(words_task(), {"train": file, "dev": file}).task.metrics == ("entity_f1",)


def test_words_are_tagged_predicted_cut_and_exported(run, tmp_path, printed):
    files = {n: write_words(tmp_path / f"{n}.jsonl", tagged(120, seed))
             for seed, n in enumerate(("train", "dev"))}
    new = write_words(tmp_path / "new.txt", tagged(9, 5), labelled=False)
    task = ["--task", files["train"], "--eval", files["dev"], "--task_name", "pos"]
    args = [*task, *TAG, "--predict", new, "--save", "--from_scratch", "--max_len", "14"]
    out, found = printed(run, *args), records(run)["pos"]
    assert "of 120 texts are cut at the 14 tokens of small step_00000010; words beyond are X" in out
    assert found[0]["score"] > 0.8
    folder, name = run / "glue/predictions", "pos_step_00000010_seed5"
    read = [read_split(folder / f"{name}{end}.conll", words_task()) for end in ("", "_new")]
    for split, rows in zip(read, (tagged(120, 1), tagged(9, 5))):
        assert split.words == [words for words, _ in rows]  # one label for each word
    true, predicted = ([label for row in rows for label in row]
                       for rows in ([ys for _, ys in tagged(120, 1)], read[0].labels))
    assert found[0]["score"] == pytest.approx(np.mean(np.array(true) == predicted))
    huggingface.main([str(run / "glue/models" / name), "--out", str(tmp_path / "hf")])
    tagger = pipeline("token-classification", str(tmp_path / "hf"), trust_remote_code=True)
    n_whole = 0
    for words, labels in zip(read[1].words, read[1].labels):
        if len(tokens := tagger(" ".join(words))) <= 12:  # it was not cut
            ends = np.cumsum([len(word) + 1 for word in words])
            first = [next(t for t in tokens if t["end"] > max(end - len(word) - 2, 0))
                     for word, end in zip(words, ends)]
            assert [token["entity"] for token in first] == labels
            n_whole += 1
    assert n_whole > 2


def test_bad_files_of_words_get_one_line_with_the_row(run, tmp_path):
    good = [json.dumps({"words": w, "labels": y}) for w, y in tagged(8)]
    uneven = '{"words": ["a", "b"], "labels": ["X"]}'
    for suffix, line, extra, message in (
        ("jsonl", uneven, "", "dev.jsonl:9: 2 words, 1 labels"),
        ("jsonl", '{"words": [], "labels": []}', "", "dev.jsonl:9: an empty sentence"),
        ("jsonl", '{"words": "a b", "labels": ["X"]}', "", ":9: words: 'a b' is no list"),
        ("jsonl", '{"words": ["a", " "], "labels": ["X", "X"]}', "", ":9: ' ' among the words"),
        ("jsonl", '{"words": ["a"], "labels": [null]}', "", ":9: None among the labels"),
        ("jsonl", '{"words": ["a"], "labels": ["SO"]}', "", ":9: label 'SO' is not one of DET"),
        ("jsonl", good[0], "--column tags", "no column tags; its columns are words, labels"),
        ("txt", "alone", "", "dev.txt:4: this line lacks a word or its label"),
        ("txt", "a SO", "", "dev.txt:4: label 'SO' is not one of DET"),
        ("conllu", "9\tshort", "--column upos", "dev.conllu:2: this line lacks a word"),
        ("conllu", "", "", "train.conllu is CoNLL-U: say which of its columns, e.g. --column upos"),
    ):
        train = write_words(tmp_path / f"train.{suffix}", tagged(8))
        dev = tmp_path / f"dev.{suffix}"
        lines = {"jsonl": [*good, line], "txt": ["the DET", "cat NOUN", "", line],
                 "conllu": ["1\tthe\t_\tDET" + "\t_" * 6, line]}
        dev.write_text("\n".join(lines[suffix]) + "\n")
        args = ["--task", train, "--eval", dev, "--task_name", "pos", *extra.split()]
        refuses(message, run, *args, *QUICK)


def test_finished_jobs_are_skipped_and_a_torn_line_runs_again(run, tmp_path, tokenizer, printed):
    write_checkpoint(run, tokenizer, 20)
    args = run, *toy_task(tmp_path, 40), "--checkpoints", "all", *QUICK, "--seeds"
    printed(*args, "1")
    before = (run / "glue/toy.jsonl").read_bytes()
    out = printed(*args, "1,2")
    assert "2 jobs had been finished before" in out
    assert "(2)" in out  # the table has both seeds
    assert (run / "glue/toy.jsonl").read_bytes().startswith(before)
    assert len(records(run)["toy"]) == 4
    whole = (run / "glue/toy.jsonl").read_bytes()
    (run / "glue/toy.jsonl").write_bytes(whole[:-40])  # killed while writing
    assert len(records(run)["toy"]) == 3
    assert "3 jobs had been finished before" in printed(*args, "1,2")
    again = records(run)["toy"]
    assert [r["history"] for r in again] == [json.loads(x)["history"] for x in whole.splitlines()]
    with open(tmp_path / "toy/train.tsv", "a") as f:
        f.write("the good river\tpositive\n")
    printed(*args, "1")  # other data is another job
    assert len(records(run)["toy"]) == 6


def test_other_weights_or_shapes_under_the_old_name_are_another_start(tmp_path, tokenizer, printed):
    write_hf_bert(tmp_path / "bert")
    args = [*toy_task(tmp_path, 40), "--seeds", "1", "--max_len", "24", *QUICK]
    foreign = tmp_path / "bert", "--hf", tmp_path / "bert", *args
    printed(*foreign)
    assert "2 jobs had been finished before" in printed(*foreign)
    weights = tmp_path / "bert/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")  # trained on, and saved in place
    assert "finished before" not in printed(*foreign)

    run = tmp_path / "runs/small"
    for shape in ({}, {"d_ff": 64}):
        shutil.rmtree(run / "ckpt", ignore_errors=True)
        write_checkpoint(run, tokenizer, 10, **shape)  # with the same clock
        assert "finished before" not in printed(run, "--from_scratch", *args)
    names = [r["checkpoint"] for r in records(run)["toy"]]
    assert names == ["ckpt/step_00000010", "random"] * 2


def test_the_longest_job_is_first_and_what_starts_from_mnli_last(run, glue_dir, monkeypatch):
    ran = []
    monkeypatch.setattr(finetune_glue, "run_job", lambda job, *_, **__: ran.append(job))
    monkeypatch.setattr(finetune_glue, "table", lambda records: "")
    tasks = ["--task", "RTE,SST-2,CoLA,MNLI,MRPC", "--seeds", "1", *ON_CPU]
    main([str(run), "--glue_dir", str(glue_dir), *tasks])
    names = [job.data.task.name for job in ran]
    assert names[0] == "CoLA"  # 10 epochs of as many rows, not 3
    assert names[3:] == ["MRPC", "RTE"]


def test_a_score_that_another_command_asks_for_is_noted_under_it_too(run, tmp_path, monkeypatch):
    args = [str(run), *toy_task(tmp_path, 40), "--seeds", "1", *QUICK]
    for command in (["a"], ["b"], ["b"], ["a", "--compile", "off"]):
        monkeypatch.setattr(sys, "argv", ["finetune_glue.py", *command])
        main(args)
    found, commands = records(run)["toy"], ["a", "b", "a --compile off"]
    assert [r["command"] for r in found] == [f"finetune_glue.py {c}" for c in commands]
    assert all(r | {"command": ""} == found[0] | {"command": ""} for r in found)  # it ran once


def test_checkpoints_can_be_chosen(run, tmp_path, tokenizer, printed):
    write_checkpoint(run, tokenizer, 20)
    unfinished = write_checkpoint(run, tokenizer, 30)
    (unfinished / "model.safetensors").unlink()
    (run / "ckpt/.step_00000040.tmp").mkdir()
    assert [p.name for p in find_checkpoints(run)] == ["step_00000010", "step_00000020"]
    args = [*toy_task(tmp_path, 40), "--seeds", "1", *QUICK]
    printed(run, *args)
    printed(run / "ckpt/step_00000010", *args)
    again = printed(run, "--checkpoints", "all", *args)  # the same starts by another name
    assert "2 jobs had been finished before" in again
    assert [r["step"] for r in records(run)["toy"]] == [20, 10]


def test_two_workers_share_the_jobs_and_get_the_same_numbers(run, glue_dir, tmp_path, tokenizer):
    write_checkpoint(tmp_path / "runs/other", tokenizer, 10)
    tasks = ["--task", "RTE,MNLI,SST-2", "--glue_dir", str(glue_dir), "--seeds", "1,2", *QUICK]
    main([str(run), *tasks])
    command = ["finetune_glue.py", tmp_path / "runs/other", *tasks]
    workers = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command
    ended = python(*workers, OMP_NUM_THREADS="1")
    assert ended.stdout.count("3-task mean") == 1  # one table
    alone, shared = records(run), records(tmp_path / "runs/other")
    for task in ("RTE", "MNLI", "SST-2"):
        numbers = [{r["seed"]: r["history"] for r in found[task]} for found in (alone, shared)]
        assert len(numbers[0]) == 2 and numbers[0] == numbers[1]


def test_a_killed_job_goes_on_from_its_last_epoch_as_if_never_stopped(run, tmp_path, monkeypatch):
    args = [*toy_task(tmp_path, 80), "--epochs", "4", "--seeds", "1", "--lr", "1e-3",
            "--dropout", "0.1", *ON_CPU]
    (whole,) = fine_tuned(run, *args)
    (run / "glue/toy.jsonl").unlink()
    monkeypatch.setattr(finetune_glue, "SAVE_EVERY", 0)
    epochs = [DEFAULT, DEFAULT, KeyboardInterrupt, DEFAULT, DEFAULT]  # the third again
    evaluations = Mock(wraps=finetune_glue.evaluate, side_effect=epochs)
    monkeypatch.setattr(finetune_glue, "evaluate", evaluations)
    with pytest.raises(KeyboardInterrupt):
        main([str(run), *args])
    (state,) = (run / "glue").glob(".toy-*.pt")
    (resumed,) = fine_tuned(run, *args)
    assert evaluations.call_count == 5
    assert resumed["history"] == whole["history"] and not state.exists()


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step(run, tmp_path):
    args = [str(run), *toy_task(tmp_path, 40), "--seeds", "1", *QUICK]
    (run / "glue").write_text("")  # root, who runs some tests, may write to every folder
    with patch("finetune_glue.fine_tune", lambda *_: pytest.fail("it began")):
        refuses(f"{run}/glue cannot be written to (File exists); give --out", *args)
    main([*args, "--out", str(tmp_path / "results")])
    assert len(records(tmp_path / "results/small")["toy"]) == 1


def write_hf_bert(folder: Path) -> None:
    """A random Hugging Face BERT with a WordPiece tokenizer.json."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    BertTokenizer({word: i for i, word in enumerate([*specials, *WORDS])}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=5 + len(WORDS), hidden_size=32, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=48, max_position_embeddings=24)
    BertForSequenceClassification(config).save_pretrained(folder)


def test_a_hugging_face_bert_is_tuned_by_our_model_and_by_transformers(tmp_path, glue_dir, printed):
    bert = str(tmp_path / "bert")
    write_hf_bert(tmp_path / "bert")
    theirs, ours = HFClassifier(bert, 2).eval(), SequenceClassifier.from_pretrained(bert)
    texts = read_split(glue_dir / "RTE/dev.tsv", TASKS["RTE"])
    data, same = (encode(texts, t, 24) for t in (HFTokenizer(bert), Tokenizer.load(bert)))
    assert data.ids.tolist() == same.ids.tolist()
    logits = [predict(model, data, torch.float32) for model in (theirs, ours)]
    np.testing.assert_allclose(*logits, atol=1e-5)
    common = ["--glue_dir", str(glue_dir), "--task", "MNLI,RTE", "--seeds", "1", *QUICK]
    for hf, name in ((), "bert"), (["--hf"], "bert-transformers"):  # two engines, two starts
        out = printed(*hf, bert, *common, "--max_len", "20")
        assert f"{name} · seed 1, from its MNLI model" in out
    assert [r["run"] for r in records(tmp_path / "bert")["RTE"]] == ["bert", "bert-transformers"]
    refuses(str(glue_dir), "--hf", glue_dir, *common)
    rows = [(words, ["B-WHO" if y == "NOUN" else "O" for y in labels])
            for words, labels in tagged(90)]
    file = str(write_words(tmp_path / "who.txt", rows))
    main(["--hf", bert, "--task", file, "--eval", file, *TAG, "--max_len", "24"])
    (record,) = records(tmp_path / "bert")["who"]
    assert record["score"] == record["metrics"]["entity_f1"] > 0.8 and record["majority"] == 0.0


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "distilbert"])
def test_any_transformers_encoder_reads_the_flat_batch_as_its_own(kind, tmp_path):
    small = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=48, pad_token_id=1, bos_token_id=0, eos_token_id=2,
                 cls_token_id=0, sep_token_id=2)
    small["max_position_embeddings"] = 26 if kind == "roberta" else 24
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **small)
    encoder = transformers.AutoModelForMaskedLM.from_config(config).to(torch.bfloat16)
    encoder.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = HFClassifier(str(tmp_path), 3, dropout=0.0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # the file is bf16
    assert model.n_positions == (math.inf if kind == "modernbert" else 24)
    dropouts = {k: m.p for k, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert not any(p for k, p in dropouts.items() if not re.search(r"attention\.(self\.)?drop", k))
    lengths = [9, 3, 24]
    ids = torch.randint(5, 60, (sum(lengths),))
    cu = torch.tensor([0, 9, 12, 36], dtype=torch.int32)
    model.eval()
    flat = model(ids, torch.zeros_like(ids), cu, 24)
    alone = torch.cat([model.model(part[None]).logits for part in ids.split(lengths)])
    torch.testing.assert_close(flat, alone, atol=1e-5, rtol=1e-4)


def test_pairs_are_parted_for_a_transformers_tokenizer_that_adds_nothing_itself(tmp_path):
    write_hf_bert(tmp_path)
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    transformers.PreTrainedTokenizerFast(tokenizer_object=bare, **special).save_pretrained(tmp_path)
    tokenizer = HFTokenizer(str(tmp_path))
    assert tokenizer.hf.num_special_tokens_to_add(pair=True) == 0
    data = encode(texts_only(["the cat"], ["a dog"]), tokenizer, 24)
    assert data.ids.tolist() == [2, vocabulary["the"], vocabulary["cat"], 3, vocabulary["a"],
                                 vocabulary["dog"], 3]
    (cut,) = tokenizer.encode_batch(["the \ud800 cat"])  # half of an emoji is unknown
    assert cut == [vocabulary[w] for w in ["the", "[UNK]", "cat"]]


def test_transformers_weights_that_do_not_fit_are_refused(tmp_path):
    write_hf_bert(tmp_path)
    file, name = tmp_path / "model.safetensors", "bert.encoder.layer.1.output.dense.weight"
    weights = load_file(file)
    for damaged in ({k: v for k, v in weights.items() if k != name},
                    weights | {name: torch.zeros(3, 3)}):
        save_file(damaged, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"its file has no {name} of the right shape"):
            HFClassifier(str(tmp_path), 2)


def test_texts_are_cut_at_learned_positions(tmp_path, tokenizer, printed):
    write_checkpoint(tmp_path / "runs/bert", tokenizer, 10, position="learned", max_positions=9)
    args = [*toy_task(tmp_path, 40), "--seeds", "1", *QUICK]
    assert "texts are cut at the 9 tokens of bert" in printed(tmp_path / "runs/bert", *args)


def test_bad_files_get_one_line(run, tmp_path, monkeypatch):
    task = toy_task(tmp_path, 40)
    train_file, dev_file = tmp_path / "toy/train.tsv", tmp_path / "toy/dev.tsv"
    train, dev = train_file.read_text(), dev_file.read_text()
    for train_text, dev_text, extra, message in (
        (train.replace("label", "target", 1), dev, "", "no column label or labels; its columns"),
        (train.replace("sentence", "text", 1), dev, "", "no column sentence1+sentence2 or"),
        (train, dev, "--text_columns nothing", "no column nothing"),
        (train, dev + "a cat\tso-so\n", "", "dev.tsv:12: label 'so-so' is not one of negative,"),
        (train, dev + "a cat\t-\n", "", "label '-' is not one of"),  # "no label" in MNLI only
        (train + "a cat\t0.5\n", dev, "", "train.tsv: label 0.5 is not a class; for numbers add"),
        (train, dev, "--regression", "train.tsv:2: label 'negative' is no number"),
        (train + "a cat\n", dev, "", "train.tsv:32: this row lacks a text or its label"),
        (train + "a\tcat\t0\n", dev, "",
         "train.tsv:32: 3 columns, the header has 2; a tab inside a text?"),
        (train.replace("negative", "positive"), dev, "", "every row has the label 'positive'"),
        ("", dev, "", "train.tsv: no column sentence1+sentence2 or sentence"),
        ("sentence\tlabel\n", dev, "", "not one row"),
        ("sentence\tlabel\n\udcff\t1\n", dev, "", "is not UTF-8 text")):
        train_file.write_text(train_text, errors="surrogateescape")
        dev_file.write_text(dev_text)
        refuses(message, run, *task, *QUICK, *extra.split())
    rte = run, "--task", "RTE"
    refuses("RTE/train.tsv", *rte, "--glue_dir", tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Path("/no\n route").read_text())
    refuses("cannot be read from the Hugging Face Hub (give --glue_dir): FileNotFoundError", *rte)
    assert not (run / "glue").exists()  # nothing half-written


def test_bad_settings_get_one_line(run, tmp_path, tokenizer):
    task = toy_task(tmp_path, 40)
    refuses("unknown task 'SST2'; known: MNLI, QQP", run, "--task", "SST2")
    refuses("gone: neither a folder here nor found on the hub", "gone", *task)
    refuses("give a run folder", *task)
    refuses("'1;2'", run, *task, "--seeds", "1;2")
    refuses("--epochs 0", run, *task, "--epochs", "0")
    refuses("dropout", run, *task, "--dropout", "2")
    refuses("'RTE' cannot name", run, "--task", "RTE", *task[2:])
    refuses("or one of your own: --task train.tsv --eval", run, *task[:2])
    for name in ("RTE", "a/b", "a,b", "loss"):
        refuses(f"{name!r} cannot name", run, *task, "--task_name", name)
    write_checkpoint(tmp_path / "elsewhere/small", tokenizer, 10)
    both = run, tmp_path / "elsewhere/small"
    refuses("are both called small step_00000010; rename one", *both, *task)
    refuses("lower --lr", run, *task, "--lr", "1e30", "--epochs", "2", "--seeds", "1")
    folder = write_checkpoint(tmp_path / "runs/odd", tokenizer, 10, vocab_size=900)
    refuses("the model has 900 tokens, the tokenizer there", folder, *task)
    write_hf_bert(tmp_path / "bert")
    (tmp_path / "bert/model.safetensors").unlink()
    for start in ([], ["--hf"]):
        refuses("bert has no weights (", *start, tmp_path / "bert", *task)


@pytest.mark.parametrize(("rows", "message"), [
    ('{"sentence": "a", "label": 1}\n{"sentence": \n', "x.jsonl:2: not a JSON object"),
    ("no parquet", "x.parquet cannot be read"),
    ([{"sentence": b"a", "label": 1}], "x.parquet:1: b'a' is neither a text nor a label"),
    ([{"sentence": ["a", "b"], "label": 1}], "x.jsonl:1: ['a', 'b'] is neither a text nor a label"),
    ([{"sentence": math.nan, "label": 1}], "x.jsonl:1: nan is neither a text nor a label"),
    ([{"sentence": "a", "label": math.nan}], "x.jsonl:1: nan is neither"),
    ([{"sentence": "a", "label": "x\ty"}, {"sentence": "a", "label": "z"}],
     "x.jsonl: label 'x\\ty' has a tab or line end in it"),
])
def test_what_is_no_text_and_no_label_is_refused(rows, message, run, tmp_path):
    file = tmp_path / re.match(r"x\.\w+", message)[0]
    refuses(file.name, run, "--task", file, "--eval", file)  # it is not there
    if isinstance(rows, str):
        file.write_text(rows)
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        write_jsonl(file, rows)
    refuses(message, run, "--task", file, "--eval", file, *QUICK)


def test_whole_numbers_with_a_point_are_classes_and_blanks_in_labels_are_quoted(tmp_path):
    task = Task("x", OWN, (("sentence",),), ("label",))
    for labels, dev, classes in (([1.0, 2.0, 10.0], [2, 1], "1, 2, 10"),
                                 (["pos", "neg", "pos "], ["neg"], "neg, pos, 'pos '")):
        for name, some in (("train", labels), ("dev", dev)):
            rows = [{"sentence": "a", "label": label} for label in some]
            write_jsonl(tmp_path / f"{name}.jsonl", rows)
        files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "dev")}
        data = load_data(task, files)
        assert data.notes[0].endswith(f"3 classes: {classes}")
        assert [data.task.labels[i] for i in data.y["dev"]] == list(map(str, dev))


def test_a_regression_head_starts_at_the_mean_and_is_a_job_of_its_own(run, tmp_path, monkeypatch):
    numbers = [70 + i % 5 for i in range(len(WORDS))]
    write_tsv(tmp_path / "grades/train.tsv",
              [{"sentence": w, "label": str(n)} for w, n in zip(WORDS, numbers)])
    file, seen = str(tmp_path / "grades/train.tsv"), []
    fine_tune = finetune_glue.fine_tune
    monkeypatch.setattr(finetune_glue, "fine_tune", lambda model, *rest: (
        seen.append(model.classifier.bias[0].item()), fine_tune(model, *rest))[1])
    args = ["--task", file, "--eval", file, "--seeds", "1", *QUICK]
    main([str(run), *args])
    found = fine_tuned(run, *args, "--regression", task="grades")
    assert [set(r["metrics"]) for r in found] == [{"accuracy"}, {"spearman", "pearson"}]
    assert seen == [0, pytest.approx(np.mean(numbers))]
    answers = (run / "glue/predictions/grades_step_00000010_seed1.tsv").read_text()
    assert re.search(r"\t7\d\.\d{4}\n", answers)  # six digits
    assert found[1]["history"][0]["loss"] < 10  # from 0: about 5,000
