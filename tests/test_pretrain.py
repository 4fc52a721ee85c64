"""pretrain.py: schedules, one global batch, nothing lost on a kill, one line for bad input."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pretrain
from corpus import Tokenizer
from model import EncoderConfig, MaskedLM
from pretrain import TrainConfig, learning_rate, masking_rate

ROOT = Path(__file__).parents[1]
TINY = "--model.n_layers 1 --model.d_model 32 --model.d_ff 64 --model.n_heads 2 --seq_len 32 --batch_tokens 512"
FAST = f"{TINY} --micro_tokens 512 --dtype float32 --device cpu --eval_tokens 512 --log_every 1"


def command(corpus, out, args, preset="mosaic-tiny", procs=1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(procs)] if procs > 1 else []
    return [sys.executable, *launcher, "pretrain.py", preset, "--data", str(corpus), "--out", str(out), *args.split()]


def start(*args, **kwargs) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command(*args, **kwargs), cwd=ROOT, env=env, **pipes)


def run(*args, code=0, **kwargs) -> str:
    process = start(*args, **kwargs)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == code, output
    return output


def records(folder: Path, kind: str) -> dict[int, dict]:
    """step -> record; the last one of a step counts."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {r["step"]: r for r in lines if r["type"] == kind}


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([r["loss"] for _, r in sorted(records(folder, "train").items())], dtype=torch.float64)


def assert_same_checkpoint(a: Path, b: Path) -> None:
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    states = [torch.load(p / "trainer.pt", weights_only=True) for p in (a, b)]
    for state in states:
        state.pop("train_seconds")
    flat = [torch.utils._pytree.tree_flatten(s)[0] for s in states]
    assert len(flat[0]) == len(flat[1])
    for x, y in zip(*flat):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


# ----------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("spec", "values"),  # at 0, 1/4, 1/2 and 1 of the run
    [
        ("constant:0.3", [0.3, 0.3, 0.3, 0.3]),
        ("linear:0.3:0.15", [0.3, 0.2625, 0.225, 0.15]),
        ("cosine:0.3:0.15", [0.3, 0.15 + 0.075 * (1 + math.cos(math.pi / 4)), 0.225, 0.15]),
        ("step:0.3:0.15@0.5", [0.3, 0.3, 0.15, 0.15]),
    ],
)
def test_masking_schedules(spec, values):
    assert [masking_rate(spec, done) for done in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(values)


@pytest.mark.parametrize("spec", ["", "0.3", "constant", "linear:0.3", "step:0.3:0.15", "wave:0.1:0.2", "constant:1.5"])
def test_a_masking_schedule_that_cannot_be_read_is_one_line(spec):
    with pytest.raises(SystemExit, match="error: --masking"):
        masking_rate(spec, 0.0)


def test_learning_rate_schedules():
    linear = TrainConfig(schedule="linear", warmup=0.1, final_lr=0.02)
    assert [learning_rate(linear, d) for d in (0, 0.05, 0.1, 0.55, 1.0)] == pytest.approx([0, 0.5, 1, 0.51, 0.02])
    wsd = TrainConfig(schedule="wsd", warmup=0.1, cooldown=0.2, final_lr=0.0)
    assert [learning_rate(wsd, d) for d in (0.05, 0.1, 0.8, 0.9, 1.0)] == pytest.approx([0.5, 1, 1, 0.5, 0])


def test_paper_recipes():
    presets = pretrain.make_presets()
    for name, (_, cfg) in presets.items():
        assert name.split("-")[1] in ("tiny", "small") or cfg.batch_tokens == 4_096 * 128
        assert cfg.masking == ("constant:0.3" if name.startswith("mosaic") else "constant:0.15")
    base, large = presets["mosaic-base"][1], presets["mosaic-large"][1]
    assert (base.lr, base.betas, base.eps, base.warmup, base.final_lr) == (5e-4, (0.9, 0.98), 1e-6, 0.06, 0.02)
    for cfg in (base, large):  # torch's decay is lr × wd; the paper's is 1e-5 whatever the learning rate
        assert cfg.lr * cfg.weight_decay == pytest.approx(1e-5)
    assert presets["bert-base"][1].model.attention_dropout == 0.1
    assert base.model.attention_dropout == 0.0


# ----------------------------------------------------------------------------- a run


def test_a_run_learns_logs_and_leaves_checkpoints_others_can_read(corpus_dir, tmp_path):
    out = run(corpus_dir, tmp_path, f"{FAST} --max_steps 60 --lr 1e-2 --log_every 10 --checkpoint_every 0.5")
    folder = tmp_path / "mosaic-tiny"
    assert "attention: reference" in out and "1 × cpu" in out
    train, evals = records(folder, "train"), records(folder, "eval")
    assert sorted(train) == list(range(10, 61, 10)) and len(evals) == 20
    assert train[60]["loss"] < train[10]["loss"] - 0.3
    assert evals[60]["loss"] < evals[3]["loss"] - 0.3
    assert train[60]["tokens"] == 60 * 512 and train[60]["masking"] == 0.3
    assert train[60]["mfu"] is None and train[60]["dollars"] == 0
    assert train[60]["gpu_seconds"] == train[60]["train_seconds"] > train[10]["train_seconds"] > 0
    assert 0 < train[60]["padding_avoided"] < 1
    whole_run = train[60]["tokens"] / train[60]["train_seconds"]  # evaluation and saving in between do not count
    assert min(r["tok_per_s"] for r in train.values()) <= whole_run <= max(r["tok_per_s"] for r in train.values())
    header = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert (
        header["type"] == "header" and header["family"] == "mosaic" and "pretrain.py mosaic-tiny" in header["command"]
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["d_model"] == 32 and config["train"]["lr"] == 1e-2 and config["preset"] == "mosaic-tiny"
    steps = [p.name for p in pretrain.find_checkpoints(folder)]
    assert steps == ["step_00000030", "step_00000060"]
    last = folder / "ckpt" / steps[-1]
    progress = json.loads((last / "progress.json").read_text())
    assert progress["finished"] and progress["step"] == 60 and progress["tokens"] == 60 * 512
    assert (last / "tokenizer.tiktoken").read_bytes() == (corpus_dir / "tokenizer.tiktoken").read_bytes()
    assert load_file(last / "model.safetensors")["encoder.embeddings.word.weight"].shape == (832, 32)
    again = run(corpus_dir, tmp_path, f"{FAST} --max_steps 60 --lr 1e-2 --log_every 10 --checkpoint_every 0.5")
    assert "is finished" in again
    other = run(corpus_dir, tmp_path, f"{FAST} --max_steps 60 --lr 1e-3", code=1)
    assert other.strip().count("\n") == 0 and "lr 0.01 -> 0.001" in other and "--name" in other


def test_muon_wsd_falling_masks_and_clipping_learn_too(corpus_dir, tmp_path):
    recipe = "--optimizer muon --schedule wsd --masking linear:0.3:0.15 --grad_clip 1 --lr 1e-2 --documents first"
    run(corpus_dir, tmp_path, f"{FAST} --max_tokens 20480 --log_every 10 {recipe}", preset="bert-tiny")
    train = records(tmp_path / "bert-tiny", "train")
    assert max(train) == 40 and train[40]["loss"] < train[10]["loss"]
    assert train[40]["masking"] == pytest.approx(0.3 - 0.15 * 39 / 40, abs=1e-3)
    assert train[20]["lr"] == pytest.approx(1e-2) and train[40]["lr"] < 2e-3


def test_a_time_budget_is_kept_and_the_schedule_follows_the_clock(corpus_dir, tmp_path):
    run(corpus_dir, tmp_path, f"{FAST} --max_minutes 0.05 --checkpoint_every 0.25")
    train = records(tmp_path / "mosaic-tiny", "train")
    last = train[max(train)]
    assert 3.0 <= last["train_seconds"] < 4.5
    half = min(train.values(), key=lambda r: abs(r["train_seconds"] - 1.5))
    assert half["lr"] / 2e-3 == pytest.approx(1 - 0.98 * (half["train_seconds"] / 3 - 0.06) / 0.94, abs=0.1)


# ----------------------------------------------------------------------------- one global batch


@pytest.mark.parametrize("preset", ["mosaic-tiny", "bert-tiny"])
def test_the_loss_curve_does_not_depend_on_processes_or_accumulation(corpus_dir, tmp_path, preset):
    """Dropout on, rising masking rate, micro-batches with different numbers of masked tokens."""
    args = f"{FAST} --micro_tokens 128 --max_steps 20 --lr 1e-2 --masking linear:0.1:0.4 --eval_every 10"
    curves = {}
    for procs in (1, 2, 4) if preset == "mosaic-tiny" else (1, 2):
        run(corpus_dir, tmp_path / str(procs), args, preset=preset, procs=procs)
        curves[procs] = losses(tmp_path / str(procs) / preset)
        assert len(curves[procs]) == 20
        torch.testing.assert_close(curves[procs], curves[1], atol=1.1e-5, rtol=0)  # the log keeps five digits
        a, b = (records(tmp_path / str(n) / preset, "eval")[20]["loss"] for n in (1, procs))
        assert a == pytest.approx(b, abs=1.1e-5)


# ----------------------------------------------------------------------------- nothing lost


def test_resume_is_bit_exact_after_sigkill(corpus_dir, tmp_path):
    """Killed during steps, evaluation and checkpoint writes; weights and optimizer equal to the last bit."""
    args = f"{FAST} --max_steps 240 --lr 1e-2 --checkpoint_every 20"
    run(corpus_dir, tmp_path / "whole", args)
    kills = 0
    for delay in (0.05, 0.1, 0.0, 0.02, 0.15):  # after the first checkpoint of each life
        process = start(corpus_dir, tmp_path / "killed", args)
        for line in process.stdout:
            if "saved" in line:
                break
        time.sleep(delay)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    run(corpus_dir, tmp_path / "killed", args)
    assert kills >= 3, "the run must be long enough to be killed"
    whole, killed = (tmp_path / name / "mosaic-tiny" / "ckpt" / "step_00000240" for name in ("whole", "killed"))
    assert_same_checkpoint(whole, killed)
    assert torch.equal(losses(whole.parents[1]), losses(killed.parents[1]))


def test_sigterm_saves_exits_0_and_the_same_command_continues(corpus_dir, tmp_path):
    args = f"{FAST} --max_steps 400 --checkpoint_every 1000"
    process = start(corpus_dir, tmp_path, args)
    for line in process.stdout:
        if "validation" in line:
            break
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "the same command continues" in output
    (checkpoint,) = pretrain.find_checkpoints(tmp_path / "mosaic-tiny")
    step = json.loads((checkpoint / "progress.json").read_text())["step"]
    assert 0 < step < 400
    assert f"continuing at step {step}" in run(corpus_dir, tmp_path, args)


def test_a_run_goes_on_with_another_number_of_processes(corpus_dir, tmp_path):
    args = f"{FAST} --micro_tokens 256 --lr 1e-2 --max_steps 24 --checkpoint_every 8"
    run(corpus_dir, tmp_path / "one", args)
    process = start(corpus_dir, tmp_path / "two", args, procs=2)
    for line in process.stdout:
        if "step_00000008" in line:
            break
    process.terminate()
    process.communicate(timeout=60)
    run(corpus_dir, tmp_path / "two", args)
    torch.testing.assert_close(
        losses(tmp_path / "two/mosaic-tiny"), losses(tmp_path / "one/mosaic-tiny"), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("room", [1_000, 150_000])
def test_a_full_disk_leaves_the_earlier_checkpoint(corpus_dir, tmp_path, room):
    """The weights do not fit, or they do and the trainer's state does not: one line, nothing half-written."""
    resource = pytest.importorskip("resource")
    model = MaskedLM(EncoderConfig(vocab_size=800, n_layers=1, n_heads=2, d_model=32, d_ff=64))
    trainer = {"x": torch.zeros(100_000)}
    args = tmp_path, 1, model, Tokenizer.load(corpus_dir), trainer, {"step": 1}
    earlier = pretrain.save_checkpoint(*args)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(SystemExit, match=r"error: could not write .*step_00000002 .*earlier checkpoints") as e:
            pretrain.save_checkpoint(args[0], 2, *args[2:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(e.value)
    assert list((tmp_path / "ckpt").iterdir()) == [earlier]


@pytest.mark.parametrize("log_every", [1, 20])
def test_an_exploding_loss_stops_the_run_and_no_bad_checkpoint_is_kept(corpus_dir, tmp_path, log_every):
    args = f"{FAST} --max_steps 50 --lr 1e30 --warmup 0.5 --checkpoint_every 1 --eval_every 50 --log_every {log_every}"
    output = run(corpus_dir, tmp_path, args, code=1)
    assert "Traceback" not in output and ("error: the loss is" in output or "error: the weights are not" in output)
    kept = pretrain.find_checkpoints(tmp_path / "mosaic-tiny")
    assert str(kept[-1]) in output if kept else "last good checkpoint: none" in output
    for checkpoint in kept:
        assert all(w.isfinite().all() for w in load_file(checkpoint / "model.safetensors").values())


def test_a_run_that_never_saved_may_start_again_with_other_settings(corpus_dir, tmp_path):
    """Out of memory in the first step: lower --micro_tokens, same name."""
    folder = tmp_path / "mosaic-tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"train": {"micro_tokens": 1}')  # cut short, too
    (folder / "ckpt/step_00000005.tmp").mkdir(parents=True)
    run(corpus_dir, tmp_path, f"{FAST} --max_steps 2")
    assert [p.name for p in (folder / "ckpt").iterdir()] and not list(folder.glob("ckpt/*.tmp"))


def test_cost_adds_up_over_lives_with_other_numbers_of_processes(corpus_dir, tmp_path):
    args = f"{FAST} --micro_tokens 256 --max_steps 60 --checkpoint_every 10"
    process = start(corpus_dir, tmp_path, args, procs=2)
    for line in process.stdout:
        if "step_00000010" in line:
            break
    process.terminate()
    process.communicate(timeout=60)
    checkpoint = pretrain.find_checkpoints(tmp_path / "mosaic-tiny")[-1]
    first = json.loads((checkpoint / "progress.json").read_text())
    assert first["gpu_seconds"] == pytest.approx(2 * first["train_seconds"], abs=0.01)
    run(corpus_dir, tmp_path, args)
    last = json.loads((tmp_path / "mosaic-tiny/ckpt/step_00000060/progress.json").read_text())
    alone = last["train_seconds"] - first["train_seconds"]
    assert last["gpu_seconds"] == pytest.approx(first["gpu_seconds"] + alone, abs=0.01) and last["dollars"] == 0


# ----------------------------------------------------------------------------- bad input: one line each


@pytest.mark.parametrize(
    ("preset", "args", "message"),
    [
        ("mosaic-huge", "", "unknown preset 'mosaic-huge'; choose from mosaic-base"),
        ("mosaic-tiny", "--seq_len 2", "--seq_len 2: a document needs"),
        ("mosaic-tiny", "--batch_tokens 1000", "not a multiple of --micro_tokens"),
        ("mosaic-tiny", "--micro_tokens 64", "--micro_tokens 64 is below --seq_len"),
        ("mosaic-tiny", "--max_steps 0", "give the run a length"),
        ("mosaic-tiny", "--masking constant:2", "--masking"),
        ("mosaic-tiny", "--model.n_heads 5", "not a multiple of n_heads 5"),
        ("bert-tiny", "--seq_len 1024", "beyond the 512 learned positions"),
        ("mosaic-tiny", "--device cuda", "sees no CUDA"),
        ("mosaic-tiny", "--data no/such/folder", "no/such/folder"),
        ("mosaic-tiny", "--model.attention_dropout 0.1", "attention='reference'"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(monkeypatch, capsys, tmp_path, corpus_dir, preset, args, message):
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    argv = ["pretrain.py", preset, "--out", str(tmp_path / "runs"), *args.split()]
    monkeypatch.setattr(sys, "argv", argv if "--data" in args else [*argv, "--data", str(corpus_dir)])
    with pytest.raises(SystemExit) as e:
        pretrain.main()
    text = str(e.value.code)
    assert text.startswith("error: ") and message in text and "\n" not in text
    assert not (tmp_path / "runs").exists()


def test_a_corpus_that_disagrees_with_its_meta_is_named(corpus_dir, tmp_path, monkeypatch):
    import shutil

    broken = shutil.copytree(corpus_dir, tmp_path / "broken")
    shard = next(broken.glob("train_*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    monkeypatch.setattr(
        sys, "argv", ["pretrain.py", "mosaic-tiny", "--data", str(broken), "--out", str(tmp_path / "r")]
    )
    with pytest.raises(SystemExit, match=f"error: .*{shard.name}"):
        pretrain.main()
    assert not (tmp_path / "r").exists()
