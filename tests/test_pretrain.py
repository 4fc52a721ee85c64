"""pretrain.py: schedules, one global batch, nothing lost on a kill, one line for bad input."""

import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, prepare_texts, python, refused, some_documents, wordpiece
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import checkpoint
import pretrain
import recipes
from batches import Batches, count_masked, mask_tokens
from checkpoint import State
from corpus.shards import Corpus
from corpus.tokenizer import Tokenizer
from model import EncoderConfig, MaskedLM, find_checkpoints
from recipes import TrainConfig, lr_scale, masking_rate, mean_masking_rate, narrow_layers
from records import read_json

SHAPE = "--model.n_layers 1 --model.d_model 32 --model.d_ff 64 --model.n_heads 2"
SMALL = ("--seq_len 32 --batch_tokens 512 --micro_tokens 512 --device cpu --dtype float32 "
         "--log_every 1 --eval_tokens 512 --pppl_tokens 40")
FAST = f"{SHAPE} {SMALL}"
NEVER = 1_000_000  # steps
CPU = torch.device("cpu")


# ------------------------------------------------------------ running it
def command(corpus, out, args, preset="mosaic-tiny") -> list[str]:
    return ["pretrain.py", preset, "--data", str(corpus), "--out", str(out), *args.split()]


def live(argv: list[str], env: dict[str, str], output: str, fault) -> None:
    """What a process of `Life` does: pretrain.py from the command line on, with a `fault`."""
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = argv
    sys.stdout = sys.stderr = open(output, "a", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that a killed process would leak
    if fault:
        fault()
    pretrain.main()


@cache
def forks():
    """Processes that have imported everything begin in milliseconds: this file needs eighty."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_pretrain", "torch._dynamo"])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])):
        multiprocessing.forkserver.ensure_running()
    return context


class Life:
    """pretrain.py in `procs` processes, as torchrun has them, until it ends or is killed."""

    def __init__(self, corpus, out, args, preset="mosaic-tiny", procs=1, fault=None):
        out.parent.mkdir(parents=True, exist_ok=True)
        self.output = out.with_name(f"{out.name}-{time.time_ns()}.txt")
        self.output.touch()
        argv = command(corpus, out, args, preset)
        with socket.socket() as s:
            s.bind(("localhost", 0))
            where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(s.getsockname()[1]),
                     "WORLD_SIZE": str(procs)}
        self.processes = []
        for rank in range(procs):
            env = where | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if procs > 1 else {}
            job = (argv, env, str(self.output), fault)
            self.processes.append(forks().Process(target=live, args=job, daemon=True))
            self.processes[-1].start()

    def wait_for(self, text: str) -> None:
        while text not in self.output.read_text():
            assert any(p.is_alive() for p in self.processes), self.output.read_text()
            time.sleep(0.005)

    def send(self, signum: int) -> None:
        for p in self.processes:
            if p.is_alive():
                os.kill(p.pid, signum)

    def end(self) -> tuple[list[int], str]:
        """Exit codes by rank, and what was said."""
        for p in self.processes:
            p.join(timeout=240)
        hung = [p.kill() for p in self.processes if p.is_alive()]
        assert not hung, f"hangs: {self.output.read_text()}"
        return [p.exitcode for p in self.processes], self.output.read_text()


def run(*args, code=0, **kwargs) -> str:
    codes, output = Life(*args, **kwargs).end()
    assert set(codes) == {code}, (codes, output)
    return output


@pytest.fixture
def here(monkeypatch, capsys):
    """As `run` (or with all of argv), but in this process, so that its parts can be replaced. One
    thread, as the processes of `run` have: sums of two differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its handlers

    def go(*args, **kwargs) -> str:
        argv = args[0] if isinstance(args[0], list) else command(*args, **kwargs)
        monkeypatch.setattr(sys, "argv", argv)
        capsys.readouterr()
        pretrain.main()
        return capsys.readouterr().out

    yield go
    torch.set_num_threads(threads)


# ------------------------------------------------- faults built into a process
def die_at(name: str, nth: int) -> None:
    """Kill this process when it calls the function of this name, os.rename, for the nth time."""
    module, function = name.split(".")
    original, calls = getattr(sys.modules[module], function), count(1)

    def call(*args, **kwargs):
        if next(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(sys.modules[module], function, call)


def spoil_forward(nth: int, signum: int = 0, rank: int = 0) -> None:
    """In the nth training forward (from 1) of `rank`: a signal, or a loss that is not finite."""
    if int(os.environ.get("RANK", 0)) != rank:
        return
    original, calls = MaskedLM.forward, count(1)

    def forward(self, *args, **kwargs):
        loss, n_correct = original(self, *args, **kwargs)
        now = self.training and next(calls) == nth
        if now and signum:
            os.kill(os.getpid(), signum)
        return loss * math.nan if now and not signum else loss, n_correct

    MaskedLM.forward = forward


# ------------------------------------------------------------ reading what it wrote
def records(folder: Path, kind: str) -> dict[int, dict]:
    """step -> record; the last one of a step counts."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {r["step"]: r for r in lines if r["type"] == kind}


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([r["loss"] for _, r in sorted(records(folder, "train").items())],
                        dtype=torch.float64)


def assert_same_curve(a: Path, b: Path) -> None:
    torch.testing.assert_close(losses(a), losses(b), atol=2e-5, rtol=0)  # the log has five digits


def settings(folder: Path) -> dict:
    return read_json(folder / "config.json")["train"]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"ckpt/step_{step:08d}/model.safetensors")


def assert_finite(checkpoint: Path) -> None:
    saved = load_file(checkpoint / "model.safetensors")
    assert all(w.isfinite().all() for w in saved.values())


def assert_same_run(a: Path, b: Path) -> None:
    """To the last bit, and nothing is left half-written."""
    last = [find_checkpoints(run)[-1] for run in (a, b)]
    model, same = ((path / "model.safetensors").read_bytes() for path in last)
    assert model == same
    states = [torch.load(path / "trainer.pt", weights_only=True) for path in last]
    flat = [torch.utils._pytree.tree_flatten(s | {"train_seconds": 0})[0] for s in states]
    for x, y in zip(*flat, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    assert torch.equal(losses(a), losses(b)) and not list(b.glob("ckpt/*.tmp"))


# -------------------------------------------------- corpora and a finished run
@pytest.fixture(scope="module")
def other_corpus(corpus_dir, tmp_path_factory):
    """Other documents, the same tokenizer."""
    return prepare_texts(tmp_path_factory.mktemp("other"), some_documents(600)[400:],
                   tokenizer=str(corpus_dir))


@pytest.fixture(scope="module")
def foreign_corpus(tmp_path_factory):
    """Another tokenizer of the same size."""
    folder = tmp_path_factory.mktemp("foreign")
    return prepare_texts(folder, some_documents(600)[400:], vocab_size=800)


STEM = f"{FAST} --micro_tokens 256 --optimizer adamw --lr 1e-2 --max_steps 50"
STEM += " --checkpoint_every 10 --eval_every 50 --pppl_tokens 256 --masking linear:0.3:0.15"
STEM += (NARROW := " --model.n_layers 2 --narrow_layers 2")


@pytest.fixture(scope="module")
def stem(corpus_dir, tmp_path_factory):
    """A finished run, cool-down from step 40 to 50; muon's bfloat16 makes 1e-3 of a last bit."""
    out = tmp_path_factory.mktemp("stem")
    run(corpus_dir, out, STEM, preset="nano-tiny")
    return out / "nano-tiny"


CURVE = f"{FAST} --micro_tokens 128 --max_steps 50 --masking linear:0.1:0.4"
CURVE += " --eval_every 25 --checkpoint_every 25"
# muon's bfloat16 makes 1e-3 of 1e-7: at a higher lr the curves part by 4e-5 in 50 steps
OPTIMIZER = {"mosaic-tiny": "--optimizer adamw --lr 1e-2", "bert-tiny": "--optimizer muon"}


@pytest.fixture(scope="module")
def curve(corpus_dir, tmp_path_factory):
    """preset, processes -> folder of a run of 50 steps, each of four micro-batches."""

    @cache
    def folder(preset: str, procs: int) -> Path:
        out = tmp_path_factory.mktemp(f"{preset}-{procs}")
        run(corpus_dir, out, f"{CURVE} {OPTIMIZER[preset]}", preset=preset, procs=procs)
        return out / preset

    return folder


# ------------------------------------------------------------ schedules
@pytest.mark.parametrize(("spec", "mean", "values"), [  # values at 0, 1/4, 1/2 and 1 of the run
    ("constant:0.3", 0.3, [0.3, 0.3, 0.3, 0.3]),
    ("linear:0.3:0.15", 0.225, [0.3, 0.2625, 0.225, 0.15]),
    ("cosine:0.3:0.15", 0.225, [0.3, 0.225 + 0.075 * math.cos(math.pi / 4), 0.225, 0.15]),
    ("step:0.3:0.15@0.5", 0.225, [0.3, 0.3, 0.15, 0.15]),
])
def test_masking_schedules(spec, mean, values):
    assert [masking_rate(spec, done) for done in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(values)
    assert mean_masking_rate(spec) == pytest.approx(mean, abs=2e-4), "of a thousand points"


def test_1_is_every_step_and_1_0_the_whole_run():
    due_at = lambda every: [s for s in range(1, 41) if pretrain.due(every, s, (s - 1) / 40, s / 40)]
    assert due_at(1) == [*range(1, 41)] and due_at(1.0) == [40] == due_at(40)
    assert due_at(10) == due_at(10.0) == due_at(0.25) == [10, 20, 30, 40]
    flags = ["mosaic-tiny", "--eval_every", "1", "--checkpoint_every", "1.0"]
    _, cfg = pretrain.read_command_line(flags)
    assert due_at(cfg.eval_every) == due_at(1) and due_at(cfg.checkpoint_every) == [40]


@pytest.mark.parametrize("spec", ["", "0.3", "constant", "linear:0.3", "step:0.3:0.15",
                                  "wave:0.1:0.2", "constant:1.5", "constant:0.3:0.15",
                                  "linear:0.3:0.15@0.5", "cosine:0.3:0.15:0.1"])
def test_a_masking_schedule_that_cannot_be_read_is_one_line(spec):
    with pytest.raises(ValueError, match="--masking"):
        masking_rate(spec, 0.0)


def test_learning_rate_schedules():
    linear = TrainConfig(schedule="linear", warmup=0.1, final_lr=0.02)
    scales = [lr_scale(linear, None, done) for done in (0, 0.05, 0.1, 0.55, 1.0)]
    assert scales == pytest.approx([0, 0.5, 1, 0.51, 0.02])
    wsd = TrainConfig(schedule="wsd", warmup=0.1, cooldown=0.2, final_lr=0.0)
    scales = [lr_scale(wsd, None, done) for done in (0.05, 0.1, 0.8, 0.9, 1.0)]
    assert scales == pytest.approx([0.5, 1, 1, 0.5, 0])


def test_layers_are_narrow_until_the_cooldown_and_never_in_a_branch():
    cfg, branch = TrainConfig(narrow_layers=3, cooldown=0.2), recipes.Branch(512, 0.5, 1.0, 512)
    assert [narrow_layers(cfg, None, done) for done in (0, 0.79, 0.8, 1.0)] == [3, 3, 1, 1]
    assert narrow_layers(cfg, branch, 0.0) == 1


def test_paper_recipes():
    presets = {name: cfg for name, (_, cfg) in recipes.make_presets().items()}
    for name in ("mosaic-base", "mosaic-large", "bert-base", "bert-large"):
        cfg = presets[name]
        expected = ("constant:0.3", 0.0) if "mosaic" in name else ("constant:0.15", 0.1)
        assert (cfg.masking, cfg.model.attention_dropout) == expected
        assert cfg.lr == (5e-4 if "base" in name else 2e-4)
        assert (cfg.optimizer, cfg.schedule, cfg.batch_tokens) == ("adamw", "linear", 4_096 * 128)
        assert (cfg.betas, cfg.eps, cfg.warmup, cfg.final_lr) == ((0.9, 0.98), 1e-6, 0.06, 0.02)
        # torch's decay is lr × wd; the paper's is 1e-5 whatever the learning rate
        assert cfg.lr * cfg.weight_decay == pytest.approx(1e-5)
    nano = dict(optimizer="muon", schedule="wsd", masking="linear:0.3:0.15")
    tiny = dict(masking="constant:0.4", muon_lr=0.01)
    for size, own in {"base": {}, "tiny": tiny, "small": tiny | dict(narrow_layers=4)}.items():
        mosaic = presets[f"mosaic-{size}"]
        model = replace(mosaic.model, position="rope-alibi", alibi_ratio=8.0)
        assert presets[f"nano-{size}"] == replace(mosaic, model=model, **nano | own)


# ------------------------------------------------------------ a run
def test_a_run_learns_logs_and_leaves_checkpoints_others_can_read(corpus_dir, tokenizer, tmp_path):
    """From the shell, as a user does it."""
    flags = f"{FAST} --max_steps 60 --lr 1e-2 --log_every 10 --eval_every .05 --checkpoint_every .5"
    done = python(*command(corpus_dir, tmp_path, flags), OMP_NUM_THREADS="1")
    folder = tmp_path / "mosaic-tiny"
    assert "attention: cpu" in done.stdout and "1 × cpu" in done.stdout
    corpus = Corpus(corpus_dir, "train")
    n_windows = sum(math.ceil(n / 30) for n in corpus.lengths)  # 30 tokens of text in each
    an_epoch = corpus.n_tokens + 2 * n_windows
    assert f"an epoch: {n_windows:,} windows, {an_epoch:,} tokens" in done.stdout
    assert f"{60 * 512 / an_epoch:.3g} epochs planned" in done.stdout
    train, evals = records(folder, "train"), records(folder, "eval")
    assert sorted(train) == list(range(10, 61, 10)) and len(evals) == 20
    assert train[60]["loss"] < train[10]["loss"] - 0.3
    assert evals[60]["loss"] < evals[3]["loss"] - 0.3
    assert evals[60]["pseudo_perplexity"] < evals[3]["pseudo_perplexity"]
    assert train[60]["tokens"] == 60 * 512 and train[60]["masking"] == 0.3
    assert train[60]["mfu"] is None and train[60]["dollars"] == 0
    assert train[60]["gpu_seconds"] == train[60]["train_seconds"] > train[10]["train_seconds"] > 0
    stream = Batches([corpus], tokenizer, 32, 512, "all", settings(folder)["seed"])
    windows = sum(stream(m).n_documents for m in range(50, 60))  # since step 50
    assert train[60]["padding_avoided"] == pytest.approx(1 - 10 * 512 / (windows * 32), abs=1e-4)
    speeds = [r["tok_per_s"] for r in train.values()]  # evaluation and saving do not count
    assert min(speeds) <= train[60]["tokens"] / train[60]["train_seconds"] <= max(speeds)
    header = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert (header["type"], header["family"]) == ("header", "mosaic")
    assert "pretrain.py mosaic-tiny" in header["command"]
    config = read_json(folder / "config.json")
    assert config["model"]["d_model"] == 32 and config["train"]["lr"] == 1e-2
    half, last = find_checkpoints(folder)
    assert (half.name, last.name) == ("step_00000030", "step_00000060")
    progress = read_json(last / "progress.json")
    assert progress["finished"] and progress["step"] == 60 and progress["tokens"] == 60 * 512
    assert Tokenizer.load(last).same_as(tokenizer)
    assert weights(folder, 60)["encoder.embeddings.word.weight"].shape == (832, 32)
    assert "is finished" in run(corpus_dir, tmp_path, flags)
    other = run(corpus_dir, tmp_path, f"{FAST} --max_steps 60 --lr 1e-3", code=1)
    assert other.strip().count("\n") == 0 and "lr 0.01 -> 0.001" in other and "--name" in other


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizers_hold_every_parameter_once_with_the_settings_given(kind):
    cfg = TrainConfig(optimizer=kind, lr=3e-4, muon_lr=7e-3, betas=(0.8, 0.7), eps=1e-5,
                      weight_decay=0.3)
    shape = dict(vocab_size=64, n_layers=2, n_heads=2, d_model=16, d_ff=16, position="learned")
    model = MaskedLM(EncoderConfig(**shape))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [g for o, _ in pretrain.make_optimizers(cfg, model, CPU) for g in o.param_groups]
    assert sorted(names[id(p)] for g in groups for p in g["params"]) == sorted(names.values())
    adam, *muon = groups
    found = [adam[k] for k in ("lr", "betas", "eps", "weight_decay")]
    assert found == [3e-4, (0.8, 0.7), 1e-5, 0.3] and len(muon) == (kind == "muon")
    assert all((g["lr"], g["weight_decay"], g["momentum"]) == (7e-3, 0.3, 0.95) for g in muon)
    matrices = r"encoder\.layers\.\d\.(attention\.qkv|attention_out|mlp\.inp|mlp\.out)\.weight"
    expected = {name for name in names.values() if kind == "muon" and re.fullmatch(matrices, name)}
    assert {names[id(p)] for g in muon for p in g["params"]} == expected


def test_each_optimizer_steps_at_its_own_rate(curve):
    run = curve("bert-tiny", 1)
    saved = torch.load(run / "ckpt/step_00000025/trainer.pt", weights_only=True)
    adam, muon = (o["param_groups"][0]["lr"] for o in saved["optimizers"])
    assert adam == records(run, "train")[25]["lr"] < 2e-3
    assert muon == pytest.approx(10 * adam), "0.02 and 2e-3 at the peak"


def predictions(model: MaskedLM, batches: Batches, n: int, rate: float, seed: int):
    """(logits, labels) of the masked tokens of each of the first n micro-batches."""
    for m in range(n):
        batch, n_masked = batches(m), count_masked(batches, m, rate)
        ids, masked, labels = mask_tokens(batch, batches.tokenizer, n_masked, "80/10/10", seed, m,
                                          CPU)
        yield model(ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batches.seq_len,
                    masked_idx=masked), labels


@torch.no_grad()
def loss_and_accuracy(*args) -> dict[str, float]:
    """Of all masked tokens of these predictions(), as a record of the log has them."""
    logits, labels = map(torch.cat, zip(*predictions(*args)))
    return {"loss": F.cross_entropy(logits, labels).item(),
            "accuracy": (logits.argmax(-1) == labels).double().mean().item()}


def assert_has(record: dict, found: dict[str, float]) -> None:
    """The log has five digits."""
    assert {k: record[k] for k in found} == pytest.approx(found, abs=2e-5)


@pytest.mark.parametrize(("clip", "documents"), [(0.0, "first"), (0.0, "all"), (0.1, "all")])
def test_a_step_follows_the_gradient_of_the_mean_over_the_whole_batch(
        corpus_dir, tmp_path, monkeypatch, here, clip, documents):
    """SGD in AdamW's place, which would not feel a wrong scale. All else follows --seed."""
    sgd = lambda cfg, model, _: [(torch.optim.SGD(model.parameters()), cfg.lr)]
    monkeypatch.setattr(pretrain, "make_optimizers", sgd)
    args = f"{FAST} --micro_tokens 128 --max_steps 1 --warmup 0 --lr 0.5 --seed 3 --pppl_tokens 0"
    here(corpus_dir, tmp_path, f"{args} --documents {documents} --grad_clip {clip}")
    folder, tokenizer = tmp_path / "mosaic-tiny", Tokenizer.load(corpus_dir)
    torch.manual_seed(3)
    model = MaskedLM(EncoderConfig(**read_json(folder / "config.json")["model"]))
    batches = Batches([Corpus(corpus_dir)], tokenizer, 32, 128, documents, 3)
    found = predictions(model, batches, 4, 0.3, 3)
    losses = [F.cross_entropy(*x, reduction="none") for x in found]
    if documents == "all":
        assert len({len(x) for x in losses}) > 1, "other numbers of masks in each"
    torch.cat(losses).mean().backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm > 0.1
    scale = 0.5 * (clip / norm if clip else 1)
    after = weights(folder, 1)
    for name, p in model.named_parameters():
        torch.testing.assert_close(after[name], p.detach() - scale * p.grad, atol=1e-6, rtol=1e-4,
                                   msg=name)


def test_the_log_has_loss_and_accuracy_of_the_masked_tokens(stem, corpus_dir, tmp_path, here):
    args = f"{SMALL} --micro_tokens 128 --max_steps 2 --lr 0 --seed 3 --log_every 2"
    here(corpus_dir, tmp_path, f"{args} --optimizer adamw --start_from {stem}")
    batches = Batches([Corpus(corpus_dir)], Tokenizer.load(corpus_dir), 32, 128, "all", 3)
    found = loss_and_accuracy(MaskedLM.from_pretrained(stem), batches, 8, 0.3, 3)
    assert found["accuracy"] > 0
    assert_has(records(tmp_path / "mosaic-tiny", "train")[2], found)


def test_dropout_differs_by_micro_batch_and_bf16_autocasts(corpus_dir, tmp_path, monkeypatch, here):
    original, seeds, dtypes = MaskedLM.forward, [], set()

    def spy(self, *args, **kwargs):
        seeds.extend([torch.initial_seed()] * self.training)
        dtypes.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MaskedLM, "forward", spy)
    for seed in (1, 2):
        args = f"{FAST} --micro_tokens 128 --max_steps 2 --pppl_tokens 0 --dtype bfloat16"
        here(corpus_dir, tmp_path, f"{args} --seed {seed} --name s{seed}")
    assert len({*seeds}) == len(seeds) == 16 and dtypes == {torch.bfloat16}


def test_time_of_evaluation_is_not_training_time(corpus_dir, tmp_path, monkeypatch, here):
    original = pretrain.one_mask_each
    monkeypatch.setattr(pretrain, "one_mask_each", lambda *a: time.sleep(1) or original(*a))
    here(corpus_dir, tmp_path, f"{FAST} --max_steps 8 --eval_every 2 --checkpoint_every 8")
    train = records(tmp_path / "mosaic-tiny", "train")
    assert train[8]["train_seconds"] - train[2]["train_seconds"] < 1, "with three evaluations"


def test_a_time_budget_is_kept_and_the_schedule_follows_the_clock(corpus_dir, tmp_path):
    args = f"{FAST} --max_minutes 0.05 --checkpoint_every 0.25"
    run(corpus_dir, tmp_path, args)
    train = records(tmp_path / "mosaic-tiny", "train")
    last = train[max(train)]
    assert 3.0 <= last["train_seconds"] < 4.5
    file = find_checkpoints(tmp_path / "mosaic-tiny")[-1] / "progress.json"  # killed just before
    file.write_text(file.read_text().replace('"finished": true', '"finished": false'))
    run(corpus_dir, tmp_path, args)
    assert max(records(tmp_path / "mosaic-tiny", "train")) == max(train) + 1
    assert "is finished" in run(corpus_dir, tmp_path, args)
    half = min(train.values(), key=lambda r: abs(r["train_seconds"] - 1.5))
    assert half["lr"] / 2e-3 == pytest.approx(1 - 0.98 * (half["train_seconds"] / 3 - 0.06) / 0.94,
                                              abs=0.1)


def test_wandb_receives_the_numbers_of_the_log(corpus_dir, tmp_path, monkeypatch, here):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Mock())
    here(corpus_dir, tmp_path, f"{FAST} --max_steps 6 --eval_every 3 --checkpoint_every 3 --wandb")
    begun, board = wandb.init.call_args.kwargs, wandb.init.return_value
    assert begun["config"]["train"]["max_steps"] == 6 and begun["resume"] == "allow"
    board.finish.assert_called_once_with()
    logged = [call.args for call in board.log.call_args_list]
    assert [step for _, step in logged] == [1, 2, 3, 3, 4, 5, 6, 6]
    for numbers, step in logged:
        (kind,) = {name.split("/")[0] for name in numbers}
        record = records(tmp_path / "mosaic-tiny", kind)[step]
        assert {f"{kind}/{k}": v for k, v in record.items() if k not in ("type", "step")
                and v is not None} == numbers


# ------------------------------------------------------------ one global batch
@pytest.mark.parametrize(("preset", "procs"), [("mosaic-tiny", 2), ("mosaic-tiny", 4),
                                               ("bert-tiny", 2)])
def test_the_loss_curve_does_not_depend_on_processes_or_accumulation(curve, preset, procs):
    """Dropout on, rising masking rate, other numbers of masks in each micro-batch."""
    one, several = curve(preset, 1), curve(preset, procs)
    assert len(losses(one)) == 50
    assert_same_curve(several, one)
    for step in (25, 50):
        a, b = records(one, "eval")[step], records(several, "eval")[step]
        assert a["loss"] == pytest.approx(b["loss"], abs=1.1e-5)
        assert a["pseudo_perplexity"] == pytest.approx(b["pseudo_perplexity"], rel=1e-5)


def torchrun(script: str | Path, argv: list[str], *options: str) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "torch.distributed.run", *options, str(script), *argv[1:]]
    return subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def test_two_nodes_of_torchrun_have_the_loss_curve_of_one_process(curve, corpus_dir, tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    meet = f"--nnodes 2 --nproc_per_node 1 --rdzv_id x --rdzv_endpoint localhost:{port}"
    meet = f"{meet} --rdzv_backend c10d".split()
    argv = command(corpus_dir, tmp_path, f"{CURVE} {OPTIMIZER['mosaic-tiny']}")
    agents = [torchrun("pretrain.py", argv, *meet) for _ in range(2)]
    outputs = [a.communicate(timeout=120)[0] for a in agents]
    assert [a.returncode for a in agents] == [0, 0], outputs
    assert_same_curve(tmp_path / "mosaic-tiny", curve("mosaic-tiny", 1))
    two, one = settings(tmp_path / "mosaic-tiny"), settings(curve("mosaic-tiny", 1))
    assert two | {"out": ""} == one | {"out": ""}


def test_a_rank_that_is_killed_ends_the_job_and_torchrun_says_why(corpus_dir, tmp_path):
    script = tmp_path / "with_a_fault.py"
    script.write_text(f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
                      "import pretrain, test_pretrain\n"
                      "test_pretrain.spoil_forward(30, 9, rank=1)\npretrain.main()\n")
    argv = command(corpus_dir, tmp_path, f"{CURVE} --checkpoint_every 5")
    process = torchrun(script, argv, "--standalone", "--nproc_per_node", "2")
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "SIGKILL" in output and "rank      : 1" in output
    kept = find_checkpoints(tmp_path / "mosaic-tiny")
    assert [p.name for p in kept] == ["step_00000005", "step_00000010"]


# ------------------------------------------------------------ nothing lost
def test_resume_is_bit_exact_after_sigkill(corpus_dir, tmp_path):
    """Killed before the trainer's state is written, an fsync, within a step, and at the rename."""
    args = f"{FAST} --max_steps 40 --lr 1e-2 --checkpoint_every 5 --eval_every 10 --optimizer muon"
    run(corpus_dir, tmp_path / "whole", args)
    deaths = [partial(die_at, "torch.save", 2), partial(die_at, "os.fsync", 9),
              partial(spoil_forward, 8, signal.SIGKILL), partial(die_at, "os.rename", 3)]
    said = [run(corpus_dir, tmp_path / "killed", args, fault=fault, code=-9) for fault in deaths]
    last = run(corpus_dir, tmp_path / "killed", args)
    assert "continuing at step" not in said[0] and "continuing at step 20" in last
    assert all(f"continuing at step {n} " in text for n, text in zip((5, 5, 10), said[1:])), said
    assert_same_run(tmp_path / "whole/mosaic-tiny", tmp_path / "killed/mosaic-tiny")


def test_a_taught_run_resumes_bit_exactly_and_is_that_of_two_processes(stem, corpus_dir, tmp_path):
    args = f"{FAST} --max_steps 10 --micro_tokens 256 --lr 1e-2 --checkpoint_every 2 --eval_every 5"
    args += " --pairs 0.5"  # and NARROW, where the shape is not brought
    for name, procs in ("whole", 1), ("two", 2):
        run(corpus_dir, tmp_path / name, f"{args}{NARROW} --teacher {stem}", procs=procs)
    copy = shutil.copytree(stem, tmp_path / "copy")
    for at, how in (stem, dict(fault=partial(die_at, "os.rename", 3), code=-9)), (copy, {}):
        said = run(corpus_dir, tmp_path / "killed", f"{args}{NARROW} --teacher {at}", **how)
    assert "continuing at step 4 " in said
    run(corpus_dir, tmp_path / "alone", args + NARROW)
    begun = f"{args} --start_from {tmp_path}/alone/mosaic-tiny --teacher".replace(SHAPE, "")
    run(corpus_dir, tmp_path / "begun", f"{begun} {stem}")
    said = run(corpus_dir, tmp_path / "begun", f"{begun} {tmp_path}/alone/mosaic-tiny", code=1)
    assert "the run was taught by other weights than" in said, "not a name of its other weights"
    branch = f"--cooldown_from {tmp_path}/whole/mosaic-tiny/ckpt/step_00000004 --teacher"
    said = run(corpus_dir, tmp_path / "branch", f"{branch} {tmp_path}/alone/mosaic-tiny")
    assert "annealing" in said, "by another teacher"
    whole, killed, two, alone = (tmp_path / k / "mosaic-tiny" for k in
                                 ("whole", "killed", "two", "alone"))
    assert_same_run(whole, killed)
    assert_same_curve(whole, two)
    assert losses(whole)[0] == losses(alone)[0] and losses(whole)[-1] != losses(alone)[-1]


@pytest.mark.slow
def test_resume_is_bit_exact_after_twenty_kills_at_random_moments(corpus_dir, tmp_path):
    args = f"{FAST} --max_steps 400 --lr 1e-2 --checkpoint_every 2 --eval_every 10 --optimizer muon"
    run(corpus_dir, tmp_path / "whole", args)
    moments = random.Random(0)
    for _ in range(20):
        life = Life(corpus_dir, tmp_path / "killed", args)
        life.wait_for("saved")
        time.sleep(moments.uniform(0.0, 0.1))  # steps, evaluation, the next checkpoints
        life.send(signal.SIGKILL)
        codes, output = life.end()
        assert codes == [-signal.SIGKILL], f"too short to be killed 20 times: {output}"
    run(corpus_dir, tmp_path / "killed", args)
    assert_same_run(tmp_path / "whole/mosaic-tiny", tmp_path / "killed/mosaic-tiny")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_saves_exits_0_and_the_same_command_continues(corpus_dir, tmp_path, signum):
    args = f"{FAST} --max_steps 400 --checkpoint_every {NEVER}"
    life = Life(corpus_dir, tmp_path, args)
    life.wait_for("validation")
    life.send(signum)
    codes, output = life.end()
    assert codes == [0] and output.count("the same command continues") == 1
    (saved,) = find_checkpoints(tmp_path / "mosaic-tiny")
    step = read_json(saved / "progress.json")["step"]
    assert 0 < step < 400
    assert f"continuing at step {step}" in run(corpus_dir, tmp_path, args)


def test_a_run_goes_on_with_another_number_of_processes(corpus_dir, tmp_path):
    """Its curve stays the same and its cost adds up."""
    args = f"{FAST} --micro_tokens 256 --lr 1e-2 --max_steps 24 --checkpoint_every 8"
    run(corpus_dir, tmp_path / "one", args)
    folder = tmp_path / "two/mosaic-tiny"
    stop = partial(spoil_forward, 8, signal.SIGTERM)
    run(corpus_dir, tmp_path / "two", args, procs=2, fault=stop)
    first = read_json(find_checkpoints(folder)[-1] / "progress.json")
    assert first["step"] == 8
    assert first["gpu_seconds"] == pytest.approx(2 * first["train_seconds"], abs=0.01)
    run(corpus_dir, tmp_path / "two", args)
    assert_same_curve(folder, tmp_path / "one/mosaic-tiny")
    last = read_json(folder / "ckpt/step_00000024/progress.json")
    alone = last["train_seconds"] - first["train_seconds"]
    assert last["gpu_seconds"] == pytest.approx(first["gpu_seconds"] + alone, abs=0.01)
    assert last["dollars"] == 0


@pytest.mark.parametrize("room", [1_000, 150_000])
def test_a_full_disk_leaves_the_earlier_checkpoint(corpus_dir, tmp_path, room):
    """The weights do not fit, or only the trainer's state: one line, nothing half-written."""
    resource = pytest.importorskip("resource")
    model = MaskedLM(EncoderConfig(vocab_size=800, n_layers=1, n_heads=2, d_model=32, d_ff=64))
    state = State(model, [(torch.optim.SGD(model.parameters(), momentum=1), 1.0)], step=1)
    model(torch.ones(1, 8, dtype=torch.int64)).sum().backward()
    state.optimizers[0][0].step()  # momentum: as large as the weights
    batches = SimpleNamespace(tokenizer=Tokenizer.load(corpus_dir))
    start = SimpleNamespace(run=tmp_path, batches=batches)
    earlier, state.step = state.save(start, {"step": 1}), 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with refused("could not write ", "step_00000002 ", "earlier checkpoints are untouched"):
            state.save(start, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "ckpt").iterdir()) == [earlier]


def test_an_exploding_loss_leaves_no_bad_checkpoint(corpus_dir, tmp_path):
    args = f"{FAST} --max_steps 50 --lr 1e30 --warmup 0.5 --checkpoint_every 1 --eval_every 50"
    output = run(corpus_dir, tmp_path, f"{args} --log_every 20", code=1)
    assert "Traceback" not in output and ("error: the loss " in output
                                          or "error: the weights are not" in output)
    kept = find_checkpoints(tmp_path / "mosaic-tiny")
    assert str(kept[-1]) in output if kept else "last good checkpoint: none" in output
    for saved in kept:
        assert_finite(saved)


def test_a_run_that_never_saved_may_start_again_with_other_settings(corpus_dir, tmp_path):
    """Out of memory in the first step: lower --micro_tokens, same name."""
    folder = tmp_path / "mosaic-tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"train": {"micro_tokens": 1}')  # cut short, too
    (folder / "ckpt/step_00000005.tmp").mkdir(parents=True)
    run(corpus_dir, tmp_path, f"{FAST} --max_steps 2")
    assert [p.name for p in (folder / "ckpt").iterdir()] and not list(folder.glob("ckpt/*.tmp"))


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_loss_that_is_not_finite_ends_the_run(corpus_dir, tmp_path, log_every):
    args = f"{FAST} --max_steps 30 --lr 1e-2 --eval_every 30 --micro_tokens 256"
    args += f" --checkpoint_every 2 --log_every {log_every}"
    fault = partial(spoil_forward, 15, rank=1)
    output = run(corpus_dir, tmp_path, args, procs=2, fault=fault, code=1)
    (last,) = (line for line in output.splitlines() if line.startswith("error"))
    assert f"the loss is nan in steps {16 - log_every} to 15; " in last and "step_00000014" in last
    kept = find_checkpoints(tmp_path / "mosaic-tiny")
    assert kept[-1].name == "step_00000014" and "Traceback" not in output
    assert_finite(kept[-1])


# ------------------------------------------------------------ torch.compile
@pytest.mark.parametrize(("preset", "graphs"), [
    ("mosaic-tiny", 2), ("bert-tiny", 2), (f"nano-tiny{NARROW} --pairs 0.5 --teacher", 4)])
def test_training_and_evaluation_compile_once(stem, corpus_dir, tmp_path, monkeypatch, here, preset,
                                              graphs):
    """Though numbers of documents, of masked tokens and, in evaluation, of tokens vary."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    args = f"{FAST} --micro_tokens 256 --max_steps 4 --eval_every 2 --compile on --eval_tokens 256"
    torch._dynamo.reset()
    preset, _, more = preset.partition(" ")
    here(corpus_dir, tmp_path, f"{args} {more} {stem}" if more else args, preset)
    assert counter.frame_count == graphs


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--model.activation_checkpointing", "--teacher STEM"])
def test_two_compiled_processes_have_the_curve_of_eager_ones(stem, corpus_dir, tmp_path, more):
    """DistributedDataParallel cuts the compiled graph at its buckets of gradients."""
    args = f"{FAST} --max_steps 8 --eval_every 8 --micro_tokens 256 --optimizer adamw --lr 1e-2"
    args = f"{args} {more.replace('STEM', str(stem))}"
    for mode in ("off", "on"):
        run(corpus_dir, tmp_path / mode, f"{args} --compile {mode}", procs=2)
    eager, compiled = (losses(tmp_path / mode / "mosaic-tiny") for mode in ("off", "on"))
    assert eager[0] - eager[-1] > 0.1
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=0)


# ------------------------------------------------------------ cool-down branches
def branch(stem: Path, step: int, *args: str) -> list[str]:
    return ["pretrain.py", "nano-tiny", "--cooldown_from", str(stem / f"ckpt/step_{step:08d}"),
            *args]


def test_a_branch_where_the_cooldown_begins_ends_with_the_weights_of_the_run_itself(stem, here):
    """Masking from 30 to 15 % too, and no layer narrow. Settings come from the stem; cost and
    tokens count on."""
    said = here(branch(stem, 40))
    folder = stem.with_name("nano-tiny-cooldown-40")
    assert "annealing" in said and "step_00000040" in said
    before, theirs = weights(stem, 40), weights(stem, 50)
    assert not all(torch.equal(w, before[k]) for k, w in theirs.items())
    torch.testing.assert_close(weights(folder, 50), theirs, atol=1e-6, rtol=0)
    a, b = records(folder, "train"), records(stem, "train")
    assert min(a) == 41 and max(a) == 50
    for step in a:
        for k in ("tokens", "loss", "lr", "masking"):
            assert a[step][k] == pytest.approx(b[step][k], abs=1e-4), (step, k)
    begun, branched = records(stem, "header")[0], records(folder, "header")[40]
    assert begun["flops_per_token"] < branched["flops_per_token"], "its narrow layers are counted"
    own = {"name", "cooldown_from", "began_from"}
    assert {k for k, v in settings(folder).items() if v != settings(stem)[k]} == own
    paid = read_json(stem / "ckpt/step_00000040/progress.json")
    progress = read_json(folder / "ckpt/step_00000050/progress.json")
    assert progress["tokens"] == 50 * 512 and progress["finished"]
    for k in ("gpu_seconds", "train_seconds"):
        assert progress[k] > a[41][k] > paid[k] > 0
    assert "is finished" in here(branch(stem, 40))


def as_660131b_named_them(path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    names = {"tokens": "tokens", "share_done": "done", "lr_scale": "factor", "length": "length"}
    saved["branch"] = {names[k]: v for k, v in saved["branch"].items()}
    torch.save(saved | {"changed_at": None, "skipped": (0, 0)}, path)


def test_a_killed_branch_continues_to_the_same_bits(stem, corpus_dir, tmp_path):
    args = f"--cooldown_from {stem}/ckpt/step_00000040 --checkpoint_every 2 --eval_every 10 --name"
    kill = partial(spoil_forward, 8, signal.SIGKILL)
    stop = partial(spoil_forward, 6, signal.SIGTERM)
    faults = {"whole": [], "stopped": [(stop, 0)],
              "killed": [(partial(die_at, "os.rename", 2), -9), (kill, -9)]}
    for name, lives in faults.items():
        for fault, code in [*lives, (None, 0)]:
            if name == "stopped" and not fault:
                as_660131b_named_them(find_checkpoints(tmp_path / name)[-1] / "trainer.pt")
            output = run(corpus_dir, tmp_path, f"{args} {name}", "nano-tiny", 1, fault, code=code)
        assert ("continuing at step" in output) == bool(lives)
        assert_same_run(tmp_path / "whole", tmp_path / name)


def test_a_branch_may_differ_in_any_other_setting(stem, other_corpus, tmp_path, here):
    here(branch(stem, 40, "--data", str(other_corpus), "--cooldown", "0.5", "--out", str(tmp_path),
                "--eval_tokens", "256"))
    folder = tmp_path / "nano-tiny-cooldown-40"
    ours, theirs = settings(folder), settings(stem)
    own = {"name", "cooldown_from", "began_from", "data", "corpus", "cooldown", "out"}
    assert {k for k, v in ours.items() if v != theirs[k]} == own | {"eval_tokens"}
    train, of_stem = records(folder, "train"), records(stem, "train")
    assert max(train) == 80, "half of the new whole"
    assert train[41]["lr"] == pytest.approx(of_stem[40]["lr"]), "from the stem's at once"
    assert train[41]["loss"] != of_stem[41]["loss"]


def test_a_branch_goes_on_from_where_a_run_with_a_time_budget_or_another_branch_is():
    stem = TrainConfig(max_minutes=1, schedule="wsd", warmup=0.1, final_lr=0.0)
    there = SimpleNamespace(step=5, tokens=2_560, train_seconds=30.0, branch=None)
    first = recipes.branch_off(stem, there, cooldown=0.2)
    assert first == recipes.Branch(tokens=2_560, share_done=0.5, lr_scale=1.0, length=640)
    there.tokens, there.branch = 2_560 + 320, first
    assert recipes.share_done(stem, there) == lr_scale(stem, first, 0.5) == 0.5
    assert recipes.stem_done(first, 0.5) == 0.75, "masking goes through the stem's other half"
    second = recipes.branch_off(stem, there, cooldown=0.5)
    assert second == recipes.Branch(tokens=2_880, share_done=0.75, lr_scale=0.5, length=2_880)
    assert lr_scale(stem, second, 0.0) == 0.5 and lr_scale(stem, second, 0.5) == 0.25


@pytest.mark.parametrize(("args", "message"), [
    ("mosaic-tiny --cooldown_from STEM", "is of preset nano-tiny, not mosaic-tiny"),
    ("nano-tiny --cooldown_from STEM --optimizer muon", "keeps its run's --"),
    ("nano-tiny --cooldown_from STEM --model.n_layers 3", "keeps its run's --"),
    ("nano-tiny --cooldown_from no/such/step_00000001", "no/such/step_00000001: no checkpoint"),
    ("nano-tiny --cooldown-from=no/such/run", "no/such/run: no checkpoint"),
    ("nano-tiny --cooldown_from STEM --max_steps 60", "keeps its run's --max_steps"),
    ("nano-tiny --cooldown_from STEM --start_from elsewhere", "give one of them"),
    ("nano-tiny --cooldown_from STEM --data FOREIGN", "not the tokenizer of the data"),
])
def test_a_branch_that_cannot_be_is_one_line(stem, foreign_corpus, tmp_path, here, args, message):
    args = args.replace("STEM", str(stem / "ckpt/step_00000040"))
    args = args.replace("FOREIGN", str(foreign_corpus)).split()
    with refused(message):
        here(["pretrain.py", args[0], "--out", str(tmp_path / "runs"), *args[1:]])
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------ mixtures
def test_a_mixture_is_drawn_by_its_shares_and_other_shares_are_another_run(
        corpus_dir, other_corpus, tmp_path, monkeypatch, here):
    monkeypatch.setattr(pretrain, "mask_tokens", masked := Mock(wraps=pretrain.mask_tokens))
    args = f"{FAST} --micro_tokens 256 --max_steps 2 --data"
    go = lambda a, b: here(f"{corpus_dir}:{a}", tmp_path, f"{args} {other_corpus}:{b}")
    go(0.8, 0.2)
    seen = {tuple(call.args[0].input_ids.tolist()) for call in masked.call_args_list}
    for split, documents, seed in (("train", "all", 17), ("val", "all", 0)):
        corpora = [Corpus(folder, split) for folder in (corpus_dir, other_corpus)]
        how = Tokenizer.load(corpus_dir), 32, 256 if seed else 512, documents, seed, [0.8, 0.2]
        assert tuple(Batches(corpora, *how)(0).input_ids.tolist()) in seen, split
    assert "is finished" in go(0.8, 0.2)
    with refused("other settings", "shares"):
        go(0.6, 0.4)


def test_shares_are_read_as_written_and_refused_if_missing_or_never_drawn():
    assert recipes.read_mixture(()) == (["data/c4"], None)
    assert recipes.read_mixture(("a", "b/c:d")) == (["a", "b/c:d"], None)
    assert recipes.read_mixture(("a:7", "b:.3")) == (["a", "b"], [7.0, 0.3])
    for data in ("a:0.7", "b"), ("a:0", "b:0"), ("a:0.0001", "b:1"), ("a:0", "b:1"):
        with pytest.raises(ValueError, match="--data a:0"):
            recipes.read_mixture(data)


# ------------------------------------------------------------ evaluation
def held_out(corpus_dir: Path, micro_tokens: int) -> Batches:
    corpus, tokenizer = Corpus(corpus_dir, "val"), Tokenizer.load(corpus_dir)
    return Batches([corpus], tokenizer, 32, micro_tokens, "all", 0)


def small_evaluation() -> None:
    pretrain.EVAL_MICRO_TOKENS = checkpoint.EVAL_MICRO_TOKENS = 128


@torch.no_grad()
@pytest.mark.parametrize("procs", [1, 2])
def test_evaluation_adds_up_over_micro_batches_and_processes(corpus_dir, tmp_path, procs):
    args = f"{FAST} --micro_tokens 256 --max_steps 20 --eval_every 20 --optimizer adamw"
    args += " --lr 3e-2 --warmup 0 --eval_tokens 4096"
    run(corpus_dir, tmp_path, args, procs=procs, fault=small_evaluation)
    found = records(tmp_path / "mosaic-tiny", "eval")[20]
    model, batches = MaskedLM.from_pretrained(tmp_path / "mosaic-tiny"), held_out(corpus_dir, 128)
    assert found["accuracy"] > 0
    assert_has(found, loss_and_accuracy(model.eval(), batches, 4096 // 128, 0.15, 0))
    batch, alone = batches(0), []
    for i in (~batch.special).nonzero().flatten()[:40]:
        hidden = batch.input_ids.index_fill(0, i, batches.tokenizer.mask_id)
        logits = model(hidden, cu_seqlens=batch.cu_seqlens, max_seqlen=32, masked_idx=i[None])
        alone.append(F.cross_entropy(logits, batch.input_ids[i][None]).item())
    assert found["pseudo_perplexity"] == pytest.approx(np.exp(np.mean(alone)), rel=1e-4)


def test_evaluation_is_the_same_whatever_the_training_settings(stem, corpus_dir, tmp_path):
    """Before a first step has changed the weights; --start_from brings those of the stem."""
    expected = records(stem, "eval")[50]
    args = f"{SMALL} --max_steps 2 --eval_every 1 --pppl_tokens 256 --start_from {stem}"
    for i, (other, procs) in enumerate([
            ("--seed 1 --masking linear:0.5:0.1 --corruption mask --documents first", 1),
            ("--micro_tokens 128 --batch_tokens 1024", 2)]):
        run(corpus_dir, tmp_path / str(i), f"{args} {other}", procs=procs)
        found = records(tmp_path / str(i) / "mosaic-tiny", "eval")  # lr 0 in step 1
        for k, precision in (("loss", 1.1e-5), ("accuracy", 1.1e-5),
                             ("pseudo_perplexity", 1e-5 * expected["pseudo_perplexity"])):
            assert found[1][k] == pytest.approx(expected[k], abs=precision)
        assert found[2]["loss"] != found[1]["loss"], "the second step does change them"


# ------------------------------------------------------------ weights from elsewhere
@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A BERT as transformers saves it, with a WordPiece vocabulary: 640 rows for 600 tokens."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("bert")
    wordpiece(folder / "tokenizer.json", some_documents(400), 600)
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(BertConfig(vocab_size=640, max_position_embeddings=64, type_vocab_size=1,
                               **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert_corpus(bert, tmp_path_factory) -> Path:
    return prepare_texts(tmp_path_factory.mktemp("wordpiece"), some_documents(300),
                   tokenizer=str(bert / "tokenizer.json"))


START = f"{SMALL} --max_steps 8 --lr 1e-2 --checkpoint_every 4 --eval_every 1 --optimizer adamw"


def test_pretraining_goes_on_from_a_bert_saved_by_transformers(bert, bert_corpus, tmp_path, here):
    """That they compute the same: test_model.py."""
    args = f"{START} --start_from {bert}"
    run(bert_corpus, tmp_path / "whole", args, preset="bert-tiny")
    folder = tmp_path / "whole/bert-tiny"
    theirs, found = MaskedLM.from_pretrained(bert).eval(), records(folder, "eval")
    # the first step has a learning rate of 0
    assert_has(found[1], loss_and_accuracy(theirs, held_out(bert_corpus, 512), 1, 0.15, 0))
    assert found[8]["loss"] < found[1]["loss"]
    assert Tokenizer.load(folder / "ckpt/step_00000008").same_as(Tokenizer.load(bert_corpus))
    run(bert_corpus, tmp_path / "killed", args, "bert-tiny",
        fault=partial(die_at, "os.rename", 2), code=-9)
    assert "continuing at step 4" in run(bert_corpus, tmp_path / "killed", args, "bert-tiny")
    assert_same_run(tmp_path / "whole/bert-tiny", tmp_path / "killed/bert-tiny")
    stem = folder / "ckpt/step_00000004"  # a branch of such a run keeps the shape that was brought
    here(["pretrain.py", "bert-tiny", "--cooldown_from", str(stem), "--cooldown", "0.5"])
    brought = weights(tmp_path / "whole/bert-tiny-cooldown-4", 8)
    assert brought["encoder.embeddings.word.weight"].shape == (640, 32)


@pytest.fixture
def official(corpus_dir, tmp_path) -> Path:
    """As MosaicBERT comes: no tokenizer, as many rows as prepare_c4.py's vocabularies have."""
    shape = dict(n_layers=1, n_heads=2, d_model=32, d_ff=48)
    vocab_size = Tokenizer.load(corpus_dir).vocab_size
    MaskedLM(EncoderConfig(vocab_size=vocab_size, **shape)).save_pretrained(tmp_path / "official")
    return tmp_path / "official"


@pytest.mark.parametrize(("weights_of", "data", "more", "message"), [
    ("official", "own", "", "another tokenizer (none is beside it, so bert-base-uncased's) than"),
    ("stem", "foreign", "", "trained with another tokenizer than"),
    ("bert", "own", "", "trained with another tokenizer than"),
    ("stem", "bert", "", "trained with another tokenizer than"),
    ("stem", "own", "--model.n_layers 1", "leave out --model.n_layers"),
    ("stem", "foreign", "--teacher", "trained with another tokenizer than"),
    ("stem", "own", "--model.vocab_multiple 1 --teacher", "predicts 832 entries, this model 800"),
    ("bert", "bert", "--seq_len 300 --teacher", "--seq_len 300 is beyond"),
    ("bert", "bert", "--pairs 0.5 --teacher", "knows one token type; --pairs needs two"),
    ("no/such/folder/anywhere", "own", "", "no checkpoint here"),
])
def test_weights_that_do_not_fit_the_data_are_one_line(request, corpus_dir, foreign_corpus,
                                                       bert_corpus, tmp_path, here, weights_of,
                                                       data, more, message):
    made = weights_of in ("stem", "bert", "official")
    source = request.getfixturevalue(weights_of) if made else weights_of
    folder = {"own": corpus_dir, "foreign": foreign_corpus, "bert": bert_corpus}[data]
    with refused(message, "" if more else str(source)):
        more = more if more.endswith("--teacher") else f"{more} --start_from"
        here(folder, tmp_path / "runs", f"{START} {more} {source}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("flag", "key", "verb"), [
    ("--start_from", "began_from", "began from"), ("--teacher", "taught_by", "was taught by")])
def test_a_run_knows_earlier_weights(stem, corpus_dir, tmp_path, here, flag, key, verb):
    shutil.copytree(stem, tmp_path / "first")
    argv = command(corpus_dir, tmp_path, f"{START} {flag} {tmp_path / 'first'} --name second")
    here(argv)
    assert settings(tmp_path / "second")[key][0].endswith("first/ckpt/step_00000050")
    shutil.copytree(tmp_path / "first/ckpt/step_00000050", tmp_path / "first/ckpt/step_00000060")
    assert "is finished" in here(argv), "that the first was trained further changes nothing"
    progress = tmp_path / "first/ckpt/step_00000050/progress.json"
    again = progress.read_text().replace('"train_seconds": ', '"train_seconds": 1')
    progress.write_text(again)  # trained anew
    with refused(f"the run {verb} other weights than"):
        here(argv)
    for file in progress.parent.iterdir():
        file.unlink()
    with refused("step_00000050 has no weights"):
        here(argv)


def test_the_positions_are_those_of_the_weights(corpus_dir, tokenizer, tmp_path, here):
    """The preset has 512."""
    model = conftest.random_mlm(tokenizer, position="learned", max_positions=600)
    conftest.save_checkpoint(tmp_path / "s", tokenizer, model)
    args = f"{SMALL} --micro_tokens 700 --batch_tokens 700 --max_steps 1 --start_from {tmp_path}/s"
    here(corpus_dir, tmp_path, f"{args} --seq_len 600", "bert-tiny")
    with refused("beyond the 600 learned positions"):
        here(corpus_dir, tmp_path, f"{args} --seq_len 601 --name longer", "bert-tiny")


def test_weights_from_elsewhere_go_with_another_way_to_train_them(stem, corpus_dir, tmp_path, here):
    more = "--model.output_dropout 0.25 --model.activation_checkpointing"
    args = f"{SMALL} --max_steps 2 --start_from {stem} {more}"
    assert "saved" in here(corpus_dir, tmp_path, args)
    brought, now = settings(stem)["model"], settings(tmp_path / "mosaic-tiny")["model"]
    assert now == brought | {"output_dropout": 0.25, "activation_checkpointing": True}
    assert "is finished" in here(corpus_dir, tmp_path, args)
    with refused("other settings (model.output_dropout 0.25 -> 0.5)"):
        here(corpus_dir, tmp_path, args.replace("0.25", "0.5"))


GONE = {"grad_reduce": "float32", "skip_nan": False, "ramp_from": 0, "ramp_tokens": 0}
MIXTURE = {"folders": None, "shares": None, "later": None, "change": 2.0}


def test_a_run_of_an_earlier_version_goes_on(stem, corpus_dir, tmp_path, here):
    """Settings that did not exist yet have their default; those that are gone had theirs."""
    shutil.copytree(stem, tmp_path / "nano-tiny")
    config = tmp_path / "nano-tiny/config.json"
    facts = read_json(config)
    assert facts["train"].pop("grad_clip") == 0.0 and facts["train"]["model"].pop("norm") == "post"
    assert facts["train"].pop("betas") == [0.9, 0.98] and facts["train"].pop("shares") is None
    of_meta = hashlib.sha256((corpus_dir / "meta.json").read_bytes()).hexdigest()[:16]
    facts["train"] |= GONE | {"mixture": MIXTURE, "corpus": [of_meta]}
    config.write_text(json.dumps(facts))
    assert "is finished" in here(corpus_dir, tmp_path, STEM, preset="nano-tiny")
    assert "annealing" in here(branch(tmp_path / "nano-tiny", 40, "--name", "of-it"))
    with refused("grad_clip 0.0 -> 1.0"):
        here(corpus_dir, tmp_path, f"{STEM} --grad_clip 1", preset="nano-tiny")
    facts["train"]["corpus"] = ["0123456789abcdef"]
    config.write_text(json.dumps(facts))
    with refused("not the corpus"):
        here(branch(tmp_path / "nano-tiny", 40, "--name", "of-a-corpus-prepared-anew"))
    assert not (tmp_path / "of-a-corpus-prepared-anew").exists()


@pytest.mark.parametrize("used", [
    {"skip_nan": True}, {"ramp_from": 512, "ramp_tokens": 9}, {"grad_reduce": "bfloat16"},
    {"mixture": MIXTURE | {"shares": [1, 0], "later": [0, 1], "change": 0.5}}, {"model": 1}])
def test_a_run_that_used_what_is_gone_is_refused(stem, tmp_path, here, used):
    facts = read_json(stem / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"train": facts["train"] | GONE | used}))
    with pytest.raises(ValueError, match=r"earlier version|not the settings of a run") as e:
        recipes.read_settings(tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_where_folders_lie_and_what_they_are_called_is_no_part_of_a_run(
        stem, corpus_dir, other_corpus, tmp_path, monkeypatch, here):
    """Data copied or linked, run moved and renamed: it goes on to the same bits. Weights too."""
    shutil.copytree(stem, tmp_path / "moved/renamed")
    shutil.rmtree(tmp_path / "moved/renamed/ckpt/step_00000050")
    shutil.copytree(corpus_dir, tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    args = f"{STEM} --name renamed"
    with refused("other settings (corpus)"):
        here(other_corpus, "moved", args, preset="nano-tiny")
    assert "continuing at step 40" in here("./link", "moved", args, preset="nano-tiny")
    assert_same_run(stem, tmp_path / "moved/renamed")
    begun = f"{START} --name begun --start_from"
    here("copy", "runs", f"{begun} moved/renamed")
    (tmp_path / "moved").rename(tmp_path / "again")
    for place in ("again/renamed", "./again/renamed/ckpt/step_00000050", "moved/renamed"):
        assert "is finished" in here("copy", "runs", f"{begun} {place}")
    with refused("the run began from other weights than"):
        here("copy", "runs", f"{begun} again/renamed/ckpt/step_00000030")
    with refused("began_from, start_from"):
        here("copy", "runs", begun.replace("--start_from", ""))


@pytest.mark.parametrize("procs", [1, 2])
def test_one_run_owns_its_folder_while_it_lives(corpus_dir, tmp_path, procs):
    args = f"{FAST} --max_steps 100000 --checkpoint_every {NEVER} --eval_every {NEVER}"
    first = Life(corpus_dir, tmp_path / "x", args)
    first.wait_for("step 10 ")
    config = (tmp_path / "x/mosaic-tiny/config.json").read_bytes()
    second = f"{FAST} --micro_tokens 256 --max_steps 3"
    output = run(corpus_dir, tmp_path / "x", second, procs=procs, code=1)
    refusals = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(refusals) == 1 and "another process trains in" in refusals[0]
    assert "Traceback" not in output
    assert (tmp_path / "x/mosaic-tiny/config.json").read_bytes() == config
    first.send(signal.SIGKILL)
    first.end()
    run(corpus_dir, tmp_path / "x", second, procs=procs)
    assert max(records(tmp_path / "x/mosaic-tiny", "train")) == 3


def test_a_folder_that_cannot_be_written_is_refused_first(corpus_dir, tmp_path, monkeypatch, here):
    (tmp_path / "file").write_text("")
    with refused("cannot write to", "another --out"):
        here(corpus_dir, tmp_path / "file", f"{FAST} --max_steps 2")
    (tmp_path / "runs/mosaic-tiny/ckpt").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "ckpt")  # root may write it
    with refused("Permission denied"):
        here(corpus_dir, tmp_path / "runs", f"{FAST} --max_steps 2")
    assert not (tmp_path / "runs/mosaic-tiny/log.jsonl").exists()


# ----------------------------------------------------- no waits for the device
RECIPES = ["--optimizer adamw",
           "--optimizer muon --masking linear:0.3:0.15 --grad_clip 1 --narrow_layers 2"]


class CountWaits(TorchDispatchMode):
    """Counts operations for which a GPU's host would wait: a value read, a shape that depends on
    values. Copies to the host are not seen here; the test on a GPU sees those."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2",
             "bincount")

    def __init__(self):
        super().__init__()
        self.waits, self.calls = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        self.waits += func.overloadpacket.__name__ in self.WAITS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_add_no_wait_for_the_device(corpus_dir, tmp_path, here, recipe):
    """Forward, backward, optimizer and bookkeeping: twice the steps, as many waits (for the log,
    evaluation and saving). Saving waits once however many weights it has to find finite."""
    counts = {}
    for steps, more in ((6, ""), (12, ""), (6, "--model.n_layers 2")):
        quiet = f"{FAST} --micro_tokens 256 --log_every {NEVER} --eval_every {NEVER}"
        quiet += " --model.attention padded"  # the CPU backend reads the documents' lengths
        args = f"{quiet} --checkpoint_every {NEVER} {recipe} --max_steps {steps} {more}"
        with CountWaits() as counts[steps, more]:
            here(corpus_dir, tmp_path / f"{steps}{more}", args)
    few, twice, deeper = counts.values()
    assert twice.calls > few.calls + 6 * 100, "the steps are seen"
    assert few.waits == twice.waits == deeper.waits > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("compile", ["on", "off"])
# PyTorch's gradient of the embedding has another path above 3,072
@pytest.mark.parametrize("micro_tokens", [256, 8_192])
def test_no_step_waits_for_the_gpu(corpus_dir, tmp_path, monkeypatch, here, recipe, compile,
                                   micro_tokens):
    """PyTorch raises where the host would wait, from the second step to the last but one."""
    original = recipes.lr_scale

    def watched(cfg, branch, done):  # as a step begins; the first may compile, the last is logged
        torch.cuda.set_sync_debug_mode("error" if 0 < done < 0.95 else "default")
        return original(cfg, branch, done)

    monkeypatch.setattr(recipes, "lr_scale", watched)
    args = f"{SHAPE} {SMALL}".replace("--device cpu --dtype float32", "--device cuda")
    args += f" --micro_tokens {micro_tokens} --batch_tokens {4 * micro_tokens} --compile {compile}"
    args += f" --max_steps 20 --log_every {NEVER} --eval_every {NEVER} --checkpoint_every {NEVER}"
    try:
        here(corpus_dir, tmp_path, f"{args} --model.n_layers 2 {recipe}")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------- bad input: one line each
@pytest.mark.parametrize(("args", "message"), [
    ("--model.position learned --seq_len 1024", "beyond the 512 learned positions"),
    ("--pairs 0.5 --model.n_token_types 1", "--pairs 0.5: give a share up to 1"),
    ("--data OWN --data FOREIGN", "have different tokenizers; prepare all but"),
    ("--eval_every 2.5", "--eval_every 2.5: give whole steps, or a share of"),
    ("--pairs 0.5 --seq_len 9", "--pairs 0.5: windows have 9 tokens"),
    ("--micro_tokens 64", "--micro_tokens 64 is below --seq_len"),
    ("--data no/such/folder:0.5", "error: no/such/folder holds"), ("--device cuda", "sees no CUDA"),
    ("--batch_tokens 1000", "not a multiple of --micro_tokens"), ("--data=", "holds no meta.json"),
    ("--cooldown 1.0", "--cooldown 1.0 are shares of one run"), ("--seed -1", "--seed -1: too low"),
    ("--betas 0.9 1", "--betas (0.9, 1.0): give two below 1"),
    ("--seq_len 2", "--seq_len 2: [CLS], a token and [SEP]"), ("--masking constant:2", "--masking"),
    ("--warmup 0.9 --cooldown 0.2", "are shares of one run"),
    ("--max_minutes nan", "--max_minutes nan: no number"),
    ("--weight_decay -1", "--weight_decay -1.0: too low"),
    ("--model.n_heads 5", "not a multiple of n_heads 5"),
    ("--narrow_layers 0", "--narrow_layers 0: too low"), ("--max_steps 0", "give the run a length"),
    ("--pppl_tokens -1", "--pppl_tokens -1: too low"), ("--data no/such/folder", "no/such/folder"),
    ("--grad_clip -1", "--grad_clip -1.0: too low"), ("--eval_every 0", "--eval_every 0: too low"),
    ("--eval_tokens 2", "--eval_tokens 2: too low"), (f"--seed {2**43}", "give one below 2^43"),
])
def test_bad_settings_are_one_line_and_leave_nothing(
        here, tmp_path, corpus_dir, foreign_corpus, args, message):
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    args += " --data OWN" * ("--data" not in args)
    args = args.replace("OWN", str(corpus_dir)).replace("FOREIGN", str(foreign_corpus))
    with refused(message):
        here(["pretrain.py", "mosaic-tiny", "--out", str(tmp_path / "runs"), *args.split()])
    assert not (tmp_path / "runs").exists()
