"""sweep.py and leaderboard.py: the plan, the queue that survives kills, and the statistics.

Most tests run the real sweep.py on stand-ins for pretrain.py and finetune_glue.py, which take no time; the last one,
slow, runs the real ones.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweep import run as sweep
from sweep.leaderboard import leaderboard, short, verdict, with_error

REPO = Path(__file__).parents[1]

# A stand-in trains nothing: it writes what the real one would, counts its calls, and can be told to fail or to wait.
RECIPES = """
from dataclasses import dataclass, field
from pathlib import Path
@dataclass
class EncoderConfig:
    vocab_size: int = 0
@dataclass
class TrainConfig:
    lr: float = 1.0
    model: EncoderConfig = field(default_factory=EncoderConfig)
    batch_tokens: int = 100
    warmup: float = 0.06
    cooldown: float = 0.2
    schedule: str = "linear"
    masking: str = "constant:0.3"
    ramp_from: int = 0
    seq_len: int = 128
    max_tokens: int = 0
    max_steps: int = 0
    seed: int = 0
    data: str = ""
    out: str = ""
    name: str = ""
    cooldown_from: str = ""
    checkpoint_every: float = 0.1
    eval_every: float = 0.1
    log_every: int = 10
    eval_tokens: int = 1
    pppl_tokens: int = 0
FREE_TO_CHANGE = {"eval_every", "log_every"}
def make_presets():
    new = TrainConfig(masking="constant:0.4") if Path("new-recipe").exists() else TrainConfig()
    return {"mosaic-tiny": ("", new), "bert-tiny": ("", TrainConfig())}
def check_config(cfg, world_size):
    pass
def known_settings(settings):
    return settings
def mean_masking_rate(spec):
    return sum(map(float, (spec.split(":") * 2)[1:3])) / 2 if spec.startswith("linear") else float(spec[9:])
"""
MACHINE = """
import tyro
def hardware_name(device): return "a CPU"
def pick_device(kind): return None
def read_command_line(config, args=None, about=""): return tyro.cli(config, args=args, use_underscores=True)
"""  # without torch, which takes three seconds to import
PRETRAIN = """
import json, os, sys, time, tyro
from dataclasses import asdict
from pathlib import Path
from recipes import make_presets
preset, cfg = sys.argv[1], tyro.extras.overridable_config_cli(make_presets(), use_underscores=True)
run = Path(cfg.out, cfg.name)
timing = cfg.max_steps > 0
if timing:
    with open("timed", "a") as f:
        f.write(f"{cfg.name} {cfg.masking}\\n")
if not timing:
    with open("calls", "a") as f:
        f.write(f"{cfg.name} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ.get('RANK')}\\n")
if cfg.lr == 666 and not Path("repaired").exists():
    print("step 1"); raise SystemExit("error: the loss is nan at step 7")
if Path("halfway").exists() and not timing:
    raise SystemExit(0)
if Path("wait").exists() and not timing:
    Path("started").touch()
    while Path("wait").exists():
        time.sleep(0.02)
if cfg.cooldown_from:
    origin = Path(cfg.cooldown_from)
    if not (origin / "progress.json").is_file():
        raise SystemExit(f"error: no checkpoint {origin}")
    old = json.loads((origin / "progress.json").read_text())
    cfg.batch_tokens, cfg.seed, cfg.cooldown = old["batch_tokens"], old["seed"], old["cooldown"]
    tokens = round(old["tokens"] / (1 - cfg.cooldown))
    config = json.loads((origin.parents[1] / "config.json").read_text())
else:
    tokens = cfg.max_tokens or cfg.max_steps * cfg.batch_tokens
    corpus = Path("corpus").read_text() if Path("corpus").exists() else "a"
    config = {"train": asdict(cfg) | {"corpus": [corpus]}}
run.mkdir(parents=True, exist_ok=True)
(run / "config.json").write_text(json.dumps(config))
every = int(cfg.checkpoint_every) if cfg.checkpoint_every >= 1 else 10**9
last = -(-tokens // cfg.batch_tokens)
def save(step):
    n = min(step * cfg.batch_tokens, tokens)
    progress = {"step": step, "tokens": n, "train_seconds": n / 100, "gpu_seconds": n / 100, "dollars": n / 1e6}
    progress |= {"finished": step == last, "batch_tokens": cfg.batch_tokens, "seed": cfg.seed, "cooldown": cfg.cooldown}
    folder = run / "ckpt" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "progress.json").write_text(json.dumps(progress))
for step in [*([] if cfg.cooldown_from else range(every, last, every)), last]:
    save(step)
loss = 5 - tokens / 1e4 + 0.01 * cfg.seed + 0.1 * (preset == "bert-tiny")
head = {"type": "header", "family": preset.split("-")[0], "preset": preset, "device": "a CPU", "world_size": 1,
        "revision": "abc", "n_params": 7, "flops_per_token": 10.0 if preset == "bert-tiny" else 5.0,
        "command": " ".join(sys.argv)}
speed = 2000.0 if preset == "bert-tiny" else 1000.0
train = [{"type": "train", "step": i, "tokens": i, "loss": 9.0, "tok_per_s": speed * (0.1 if i == 1 else 1)}
         for i in (1, 2, 3)]
log = [head, *train, {"type": "eval", "step": last, "tokens": tokens, "loss": loss, "accuracy": 0.5}]
(run / "log.jsonl").write_text('{"dam\\n' + "".join(json.dumps(r) + "\\n" for r in log))
"""
FINETUNE = """
import json, shlex, sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
import tyro

@dataclass
class Config:
    run: tyro.conf.Positional[str]
    task: str = "RTE,CoLA"
    eval: str = ""
    lr: float = 0.0

def pick_tasks(cfg):
    return [SimpleNamespace(name=name) for name in cfg.task.split(",")]

if __name__ == "__main__":
    cfg = tyro.cli(Config)
    run = Path(cfg.run)
    with open("calls", "a") as f:
        f.write(f"finetune {run.name}\\n")
    step = max(int(p.name[5:]) for p in run.glob("ckpt/step_*"))
    (run / "glue").mkdir(exist_ok=True)
    command = shlex.join(["finetune_glue.py", *sys.argv[1:]])
    for task in cfg.task.split(","):
        lines = [{"type": "glue", "task": task, "step": step, "seed": s, "score": 0.6 + 0.02 * s + cfg.lr,
                  "majority": 0.5, "metrics": {"accuracy": 0.6}, "command": command} for s in (1, 2)]
        lines += [lines[0] | {"score": 0.1, "command": "older"}, lines[0] | {"step": 1}]  # not asked for now
        with open(run / "glue" / f"{task}.jsonl", "a") as f:
            f.write("".join(json.dumps(r) + "\\n" for r in lines))
"""


@pytest.fixture
def stand_ins(tmp_path):
    stand_ins = {"recipes": RECIPES, "machine": MACHINE, "pretrain": PRETRAIN, "finetune_glue": FINETUNE}
    for name, text in stand_ins.items():
        (tmp_path / f"{name}.py").write_text(text)
    shutil.copytree(REPO / "sweep", tmp_path / "sweep")
    return tmp_path


def start(folder, *args, **env):
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"} | env
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=env)
    return subprocess.Popen([sys.executable, "-m", "sweep.run", *map(str, args)], **pipes)


def run(folder, *args, code=0, **env):
    process = start(folder, *args, **env)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    return output


def calls(folder):
    return (folder / "calls").read_text().split("\n")[:-1] if (folder / "calls").exists() else []


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def rows(folder, kind="sweep", name="sweep"):
    lines = (folder / "results" / name / "records.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["type"] == kind]


# ----------------------------------------------------------------------------------------------------- plan
def test_every_budget_branches_off_a_checkpoint_and_ends_at_its_tokens(stand_ins):
    args = ["mosaic-tiny", "--seeds", 1, "--budgets", 10_200, 30_600, 40_800]  # rounded to steps of all three
    run(stand_ins, *args, "--vary", "wide:batch_tokens=250", "slow:cooldown=0.25")
    tokens = {(r["arm"], r["budget"]): r["tokens"] for r in rows(stand_ins) if r["metric"] == "loss"}
    assert len(tokens) == 9  # no branch has failed
    for arm in ("mosaic-tiny", "mosaic-tiny+wide", "mosaic-tiny+slow"):
        assert [tokens[arm, b] for b in (10_200, 30_600, 40_800)] == [10_000, 30_000, 40_000]
    stems = [c for c in calls(stand_ins) if "-40.8K" in c]
    assert len(stems) == 3 and len(calls(stand_ins)) == 9


def test_a_linear_variant_gets_a_run_of_its_own_for_each_budget(stand_ins):
    run(stand_ins, "mosaic-tiny", "--seeds", 1, "--budgets", 10_000, 20_000, "--vary", "linear:schedule=linear")
    commands = {r["run"]: r["command"] for r in rows(stand_ins)}
    assert "--schedule wsd --max" not in commands["mosaic-tiny+linear-s1-10K"]
    assert "--max_tokens 10000" in commands["mosaic-tiny+linear-s1-10K"]
    assert "--cooldown_from" in commands["mosaic-tiny-s1-10K"]
    run(stand_ins, "mosaic-tiny", "--name", "free", "--seeds", 1, "--budgets", 10_000, 20_000, "--no_stem")
    assert not any("cooldown_from" in r["command"] or "schedule" in r["command"] for r in rows(stand_ins, name="free"))


def test_equal_flops_and_equal_time_scale_the_tokens_by_what_was_measured(stand_ins):
    args = ["mosaic-tiny", "bert-tiny", "--seeds", 1]
    run(stand_ins, *args, "--name", "flops", "--equal", "flops", "--budgets", 100_000, 200_000)
    found = {(r["preset"], r["budget"]): r for r in rows(stand_ins, name="flops")}
    assert {r["flops"] for r in found.values() if r["budget"] == 200_000} == {200_000}
    assert found["bert-tiny", 100_000]["tokens"] == 10_000 and found["mosaic-tiny", 100_000]["tokens"] == 20_000
    run(stand_ins, *args, "--name", "time", "--equal", "time", "--budgets", 10_000, 20_000)
    found = {(r["preset"], r["budget"]): r["tokens"] for r in rows(stand_ins, name="time")}
    assert found == {
        ("mosaic-tiny", 1e4): 1e4,
        ("mosaic-tiny", 2e4): 2e4,
        ("bert-tiny", 1e4): 2e4,
        ("bert-tiny", 2e4): 4e4,
    }
    (_, fast) = rows(stand_ins, "speed", "time")
    assert fast["arm"] == "bert-tiny" and fast["ratio"] == 2.0 and fast["tok_per_s"] == [2000.0] * 5


def test_every_seed_of_a_sweep_reaches_pretraining(stand_ins):
    run(stand_ins, "mosaic-tiny", "--seeds", 1, 2, "--budgets", 10_000)
    loss = {r["seed"]: r["value"] for r in rows(stand_ins) if r["metric"] == "loss"}
    assert loss[2] - loss[1] == pytest.approx(0.01)  # what the stand-in adds for a seed


def test_a_falling_masking_rate_is_timed_at_its_mean(stand_ins):
    vary = ["--vary", "falling:masking=linear:0.3:0.1"]
    run(stand_ins, "mosaic-tiny", "--seeds", 1, "--budgets", 2e4, *vary, "--dry_run")
    timed = (stand_ins / "timed").read_text().splitlines()
    assert timed == ["mosaic-tiny-0 constant:0.3000", "mosaic-tiny+falling-0 constant:0.2000"]


def test_a_dry_run_prints_the_jobs_and_their_time_and_runs_none(stand_ins):
    said = run(stand_ins, "mosaic-tiny", "--seeds", 1, 2, "--budgets", 9e6, 18e6, "--finetune=--task RTE", "--dry_run")
    assert "mosaic-tiny-s2-9M (1,800 s): " in said and "--cooldown_from" in said and "finetune_glue.py" in said
    # stems of 18,000 s and branches of a fifth of 9,000 s, two each, at 1,000 tokens/s
    assert "8 of 8 jobs to do, about 11.00 hours without evaluation, and 4 fine-tunings" in said
    run(stand_ins, "mosaic-tiny", "--seeds", 1, "--budgets", 9e6, "--dry_run")  # it decides nothing
    assert not calls(stand_ins) and not (stand_ins / "results").exists()


def test_what_would_change_the_length_of_old_runs_is_refused(stand_ins):
    args = ["mosaic-tiny", "--seeds", 1, "--budgets", 10_200]
    run(stand_ins, *args)
    said = run(stand_ins, *args, "--vary", "wide:batch_tokens=350", code=1)
    assert "holds a sweep with tokens [10200] -> [10500]" in said and "another --name" in said
    timed = ["--equal", "time", "--seeds", 1, "--budgets", 10_000, "--name", "time"]
    run(stand_ins, "mosaic-tiny", *timed)
    said = run(stand_ins, "bert-tiny", "mosaic-tiny", *timed, code=1)
    assert "holds a sweep with first preset mosaic-tiny -> bert-tiny" in said


# ---------------------------------------------------------------------------------------------------- queue
def test_the_same_command_again_runs_nothing_and_more_seeds_run_only_those(stand_ins):
    args = ["mosaic-tiny", "--budgets", 10_000, 20_000, "--finetune=--task RTE,CoLA"]
    run(stand_ins, *args, "--seeds", 1)
    first = calls(stand_ins)
    assert len(first) == 4
    said = run(stand_ins, *args, "--seeds", 1)
    assert calls(stand_ins) == first and "0 of 4 jobs to do" in said
    run(stand_ins, *args, "--seeds", 1, 2, "--vary", "fast:lr=3")
    assert len(calls(stand_ins)) == 16 and calls(stand_ins)[:4] == first
    values = {(r["arm"], r["seed"], r["metric"]): r for r in rows(stand_ins)}
    assert values["mosaic-tiny+fast", 2, "RTE"]["values"] == [
        0.62,
        0.64,
    ]  # by this command, of this checkpoint
    assert len(rows(stand_ins)) == 2 * 2 * 2 * 4


def test_fine_tuning_can_change_without_pretraining_again(stand_ins):
    args = ["mosaic-tiny", "--budgets", 10_000, "--seeds", 1]
    values = {}
    for flags in ("--task RTE,CoLA", "--task RTE --lr 0.1", "--task RTE,CoLA"):
        run(stand_ins, *args, f"--finetune={flags}")
        values[flags] = {r["metric"]: r["values"] for r in rows(stand_ins) if "values" in r}
    assert values["--task RTE --lr 0.1"] == {"RTE": pytest.approx([0.72, 0.74])}
    assert values["--task RTE,CoLA"] == {"RTE": [0.62, 0.64], "CoLA": [0.62, 0.64]}
    assert [c.split()[0] for c in calls(stand_ins)] == ["mosaic-tiny-s1-10K", *["finetune"] * 3]
    said = run(stand_ins, *args, "--finetune=--tusk RTE", code=2)
    assert "--tusk" in said and "job" not in said


def test_tasks_can_be_fine_tuned_by_several_calls_one_after_the_other(stand_ins):
    args = ["mosaic-tiny", "--budgets", 10_000, "--seeds", 1, "--finetune=--task RTE"]
    run(stand_ins, *args)
    run(stand_ins, *args, "--finetune=--task CoLA --lr 0.1")
    assert [c.split()[0] for c in calls(stand_ins)] == ["mosaic-tiny-s1-10K", "finetune", "finetune"]
    values = {r["metric"]: r["values"] for r in rows(stand_ins) if "values" in r}
    assert values == {"RTE": [0.62, 0.64], "CoLA": pytest.approx([0.72, 0.74])}
    said = run(stand_ins, *args, "--finetune=--task CoLA,RTE --lr 0.1", code=1)
    assert said == "error: two --finetune are for RTE; their scores would be mixed\n"
    said = run(stand_ins, *args, "--finetune=--task 'RTE", code=1)
    assert said.splitlines()[-1] == "error: --finetune: --task 'RTE: No closing quotation"


def test_what_has_changed_or_gone_since_is_not_taken_for_done(stand_ins):
    args = ["mosaic-tiny", "--seeds", 1, 2, "--budgets", 10_000, "--finetune=--task RTE"]
    run(stand_ins, *args)
    shutil.rmtree(stand_ins / "runs/sweep/mosaic-tiny-s1-10K/ckpt")
    (stand_ins / "calls").unlink()
    run(stand_ins, *args)
    assert [c.split()[0] for c in calls(stand_ins)] == ["mosaic-tiny-s1-10K"]
    progress = stand_ins / "runs/sweep/mosaic-tiny-s2-10K/ckpt/step_00000100/progress.json"
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"train_seconds": 7.0}))  # trained anew
    run(stand_ins, *args)
    assert [c.split() for c in calls(stand_ins)][1:] == [["finetune", "mosaic-tiny-s2-10K"]]

    (stand_ins / "new-recipe").touch()  # the preset is another one now: old runs are not its base
    said = run(stand_ins, *args, "--vary", "fast:lr=3", code=1)
    assert "mosaic-tiny-s1-10K was trained with other settings (masking); delete it or give another --name" in said
    assert {r["arm"] for r in rows(stand_ins) if r["metric"] == "RTE"} == {"mosaic-tiny", "mosaic-tiny+fast"}
    (stand_ins / "new-recipe").unlink()
    (stand_ins / "corpus").write_text("b")  # prepared anew under its name
    said = run(stand_ins, *args, "--vary", "slow:lr=0.1", code=1)
    assert "were trained on different corpora of one name; delete one" in said


def test_losses_on_other_held_out_text_are_not_compared(stand_ins):
    args = ["mosaic-tiny", "--seeds", 1, "--budgets", 10_000, "--vary", "long:seq_len=256"]
    assert "losses are on other text; add --finetune" in run(stand_ins, *args, code=1)
    run(stand_ins, *args, "--finetune=--task RTE")
    assert {(r["arm"], r["metric"]) for r in rows(stand_ins)} == {
        ("mosaic-tiny", "loss"), ("mosaic-tiny", "accuracy"), ("mosaic-tiny", "RTE"), ("mosaic-tiny+long", "RTE")
    }  # fmt: skip


def test_a_killed_sweep_continues_and_its_orphaned_script_is_waited_for(stand_ins):
    (stand_ins / "wait").touch()
    args = ["mosaic-tiny", "--seeds", 1, "--budgets", 10_000, 20_000]
    killed = start(stand_ins, *args)
    wait_for((stand_ins / "started").exists)
    killed.kill()
    killed.wait()
    again = start(stand_ins, *args)
    assert "jobs to do" in again.stdout.readline()
    time.sleep(3)
    assert len(calls(stand_ins)) == 1  # not a second script in the folder where the first is still writing
    (stand_ins / "wait").unlink()
    assert again.wait(timeout=60) == 0
    assert [c.split()[0] for c in calls(stand_ins)] == ["mosaic-tiny-s1-20K"] * 2 + ["mosaic-tiny-s1-10K"]


def test_a_stopped_sweep_stops_its_script(stand_ins):
    (stand_ins / "wait").touch()
    stopped = start(stand_ins, "mosaic-tiny", "--seeds", 1, "--budgets", 10_000)
    wait_for((stand_ins / "started").exists)
    stopped.send_signal(signal.SIGTERM)
    assert "stopped; the same command continues" in stopped.communicate(timeout=30)[0] and stopped.returncode == 1
    (stand_ins / "wait").unlink()
    time.sleep(0.3)
    assert not list(stand_ins.glob("runs/sweep/*/ckpt"))


def test_workers_share_the_queue_and_each_has_its_gpu(stand_ins):
    args = ["mosaic-tiny", "--seeds", 1, 2, 3, 4, "--budgets", 10_000, 20_000]
    shared = {"WORLD_SIZE": "3", "CUDA_VISIBLE_DEVICES": "5,7,9", "MASTER_PORT": "1"}
    workers = [start(stand_ins, *args, RANK=str(i), LOCAL_RANK=str(i), **shared) for i in range(3)]
    said = [w.communicate(timeout=60)[0] for w in workers]
    assert [w.returncode for w in workers] == [0, 0, 0], said
    names, gpus, ranks = zip(*map(str.split, calls(stand_ins)))
    assert len(names) == len(set(names)) == 8
    assert set(gpus) <= {"5", "7", "9"} and len(set(gpus)) > 1 and set(ranks) == {"None"}
    assert ["rank" in s for s in said] == [True, False, False]  # one of them writes the results


def test_a_failed_job_does_not_end_the_sweep_and_is_tried_again(stand_ins):
    args = ["mosaic-tiny", "--seeds", 1, 2, "--budgets", 10_000, 20_000]
    (stand_ins / "repaired").touch()  # while the speeds are measured
    run(stand_ins, *args, "--vary", "bad:lr=666", "--dry_run")
    (stand_ins / "repaired").unlink()
    said = run(stand_ins, *args, "--vary", "bad:lr=666", code=1)
    assert "failed: mosaic-tiny+bad-s1-20K: error: the loss is nan at step 7" in said
    assert "mosaic-tiny+bad-s1-10K: not run, as mosaic-tiny+bad-s1-20K failed" in said
    assert {r["arm"] for r in rows(stand_ins)} == {"mosaic-tiny"}
    assert "the loss is nan" in (stand_ins / "results" / "sweep" / "leaderboard.md").read_text()
    n = len(calls(stand_ins))
    (stand_ins / "repaired").touch()
    assert "Failed" not in run(stand_ins, *args, "--vary", "bad:lr=666")
    assert len(calls(stand_ins)) == n + 4


def test_a_pretraining_that_stopped_before_its_end_is_not_done(stand_ins):
    (stand_ins / "halfway").touch()
    said = run(stand_ins, "mosaic-tiny", "--seeds", 1, "--budgets", 10_000, code=1)
    assert "failed: mosaic-tiny-s1-10K: stopped before its end" in said and not (stand_ins / "results").exists()


def test_a_variant_that_cannot_even_be_timed_is_listed_and_the_others_run(stand_ins):
    said = run(stand_ins, "mosaic-tiny", "--seeds", 1, "--budgets", 10_000, "--vary", "bad:lr=666", code=1)
    assert "failed: timing mosaic-tiny+bad: error: the loss is nan at step 7" in said
    assert {r["arm"] for r in rows(stand_ins)} == {"mosaic-tiny"}


def test_a_variant_that_cannot_be_timed_changes_no_tokens_of_the_others(stand_ins):
    """Equal tokens are whole steps of all arms, of 100 and of 350, also while one of them fails."""
    args = ["mosaic-tiny", "--seeds", 1, "--budgets", 10_200, "--vary", "big:batch_tokens=350,lr=666"]
    run(stand_ins, *args, code=1)
    assert {(r["arm"], r["tokens"]) for r in rows(stand_ins)} == {("mosaic-tiny", 10_500)}
    (stand_ins / "repaired").touch()
    run(stand_ins, *args)
    assert {(r["arm"], r["tokens"]) for r in rows(stand_ins)} == {("mosaic-tiny", 10_500), ("mosaic-tiny+big", 10_500)}
    assert calls(stand_ins).count("mosaic-tiny-s1-10.2K None None") == 1


def test_results_of_a_sweep_whose_runs_are_elsewhere_are_not_overwritten(stand_ins):
    """As those that come with a clone."""
    args = ["mosaic-tiny", "--seeds", 1, "--budgets", 10_000]
    run(stand_ins, *args)
    before = rows(stand_ins)
    said = run(stand_ins, *args, "--seeds", 2, "--out", "elsewhere", code=1)
    assert "results/sweep holds results of other runs than in elsewhere/sweep; give another --name" in said
    assert rows(stand_ins) == before


def test_other_settings_under_the_same_name_are_refused(stand_ins):
    run(stand_ins, "mosaic-tiny", "--seeds", 1, "--budgets", 10_000)
    said = run(stand_ins, "mosaic-tiny", "--seeds", 1, "--budgets", 10_000, 20_000, code=1)
    assert said.startswith("error: runs/sweep holds a sweep with --budgets [10000.0] -> ")
    assert len(calls(stand_ins)) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(presets=("mosaic-tiny", "gpt")), "unknown preset 'gpt'"),
        (dict(presets=()), "at least one preset"),
        (dict(vary=("adamw",)), "write NAME:flag=value"),
        (dict(vary=("a:lr",)), "write NAME:flag=value"),
        (dict(vary=("a:lr=1", "a:lr=2")), "the same name"),
        (dict(vary=("a:seed=1",)), "--seed is set by the sweep"),
        (dict(flags="--max_tokens 7"), "--max_tokens is set by the sweep"),
        (dict(flags="7"), "before the first --flag"),
        (dict(vary=("a:seq_len=1",)), "--seq_len 1"),
        (dict(vary=("ramp:ramp_from=4096,ramp_tokens=9",)), "no branches with a batch ramp"),
        (dict(budgets=(1e6, 1e6)), "different whole numbers"),
        (dict(budgets=(1_000_001, 2_000_000)), "more than 100 checkpoints"),
        (dict(budgets=(5000, 10000)), "multiples of 20,480 tokens"),
        (dict(budgets=(2_048_000, 65_536_000)), "branch off in the warm-up"),
    ],
)
def test_bad_input_is_one_line(settings, says):
    cfg = sweep.Config(**dict(presets=("mosaic-tiny",)) | settings)

    def plan():
        arms = sweep.make_arms(cfg)
        sweep.tokens_of_budgets(cfg, arms, {arm.name: {"flops_per_token": 1.0, "ratio": 1.0} for arm in arms})

    with pytest.raises(SystemExit) as e:
        plan()
    assert str(e.value).startswith("error: ") and says in str(e.value) and "\n" not in str(e.value)


def test_a_variant_overrides_the_common_flags_and_can_switch():
    cfg = sweep.Config(
        ("mosaic-tiny",), flags="--lr 1 --model.no_bias --betas 0.8 0.9", vary=("v:lr=2,model.bias=True",)
    )
    base, variant = sweep.make_arms(cfg)
    assert (base.cfg.lr, base.cfg.model.bias, base.cfg.betas) == (1.0, False, (0.8, 0.9))
    assert (variant.cfg.lr, variant.cfg.model.bias, variant.cfg.betas) == (2.0, True, (0.8, 0.9))
    assert sweep.make_arms(sweep.Config(("mosaic-tiny",), vary=("v:model.bias=False",)))[1].cfg.model.bias is False


# ------------------------------------------------------------------------------------------------- statistics
def row(arm, seed, value, metric="loss", budget=1e6, variant=""):
    fixed = dict(type="sweep", run=f"{arm}-s{seed}", preset="base", equal="tokens", tokens=1_000_000, flops=2e12)
    fixed |= dict(
        gpu_seconds=3600.0 * seed, dollars=2.0, device="H200", world_size=8, revision="abc", command="pretrain.py"
    )
    return fixed | dict(arm=arm, seed=seed, value=value, metric=metric, budget=budget, variant=variant, n_params=7)


def test_the_table_is_what_is_computed_by_hand():
    a, b = [4.0, 4.2, 4.4], [4.1, 4.3, 4.6]
    records = [row("base", s, v) for s, v in zip((1, 2, 3), a)]
    records += [row("base+x", s, v, variant="x") for s, v in zip((1, 2, 3), b)]
    text = leaderboard(records, {"job 9": "error: no"}, "t", "python -m sweep.run")
    # s.e. = 0.2 / sqrt 3; differences 0.1, 0.1, 0.2: mean 0.1333, s.e. 0.0333, t = 4 with 2 degrees of freedom
    assert "| 1 | base | 4.2000 ± 0.1155 | 3 | 7 | 1M | 2.00e+12 | 2 | 2.00 | 8 × H200 | abc |" in text
    assert "| 2 | base+x | 4.3333 ± 0.1453 |" in text
    p = 1 - 4 / math.sqrt(2 + 4**2)  # two-sided, Student with 2 degrees of freedom: 1 - t / sqrt(2 + t²)
    assert (
        f"| base+x | base | 1M | held-out loss (nats) | 0.1333 ± 0.0333 | 3 | {p:.2g} | not distinguishable |" in text
    )
    assert "- job 9: error: no" in text


def test_only_seeds_that_both_have_are_compared_and_tasks_are_averaged_over_complete_runs():
    records = [row(arm, s, 4.0 + s) for arm in ("base", "other") for s in (1, 2)] + [row("base", 3, 9.0)]
    records += [row(arm, s, 0.5 + 0.1 * s, t) for arm in ("base", "other") for s in (1, 2) for t in ("RTE", "CoLA")]
    records += [row("base", 3, 0.9, "RTE")]  # its CoLA is missing
    text = leaderboard(records, {}, "t", "c")
    assert "| 1 | base | 65.00 ± 5.00 | 6.6667 ± 1.2019 | 3 |" in text and "mean of 2 tasks (%)" in text
    assert "| base | other | 1M | mean of 2 tasks (%) | 0.00 ± 0.00 | 2 | – | the same difference" in text
    assert "| base | 73.3 ± 8.8 | 65.0 ± 5.0 |" in text  # RTE of three seeds, CoLA of two


def test_an_arm_without_all_seeds_has_no_rank():
    """Seed 1 is the hard one here: alone, the better arm looks worse."""
    records = [row("base", s, v) for s, v in ((1, 5.0), (2, 4.0), (3, 4.0))]
    records += [row("base+x", 1, 4.6, variant="x")]
    text = leaderboard(records, {}, "t", "c")
    assert "| 1 | base | 4.3333" in text and "| – | base+x | 4.6000 | 1 |" in text
    assert "| base+x | base | 1M | held-out loss (nats) | -0.4000 | 1 |" in text


def test_presets_are_compared_with_the_same_variant_and_variants_with_their_preset():
    arms = [(preset, variant) for preset in ("a", "b") for variant in ("", "x")]
    records = [
        row(f"{preset}+{variant}".rstrip("+"), s, i + s / 10, variant=variant) | {"preset": preset}
        for i, (preset, variant) in enumerate(arms)
        for s in (1, 2)
    ]
    tests = leaderboard(records, {}, "t", "c").partition("## Does A beat B?")[2]
    compared = [line.split(" | ")[:2] for line in tests.splitlines() if "held-out" in line]
    assert compared == [["| a", "b"], ["| a+x", "b+x"], ["| a+x", "a"], ["| b+x", "b"]]


def test_equal_differences_are_no_certainty():
    a, b = [142 / 277, 144 / 277, 150 / 277], [140 / 277, 142 / 277, 148 / 277]  # two examples more for each seed
    assert verdict(a, b, lower=False) == ("–", "the same difference for every seed: no test")


def test_one_seed_is_no_evidence():
    assert verdict([1.0], [2.0], lower=True) == ("–", "one seed: no test")
    assert verdict([1.0, 1.1, 1.2], [2.0, 2.1, 2.3], lower=True)[1] == "better"
    assert verdict([1.0, 1.1, 1.2], [2.0, 2.1, 2.3], lower=False)[1] == "worse"
    assert verdict([1.0, 2.0, 3.0], [1.1, 1.8, 3.05], lower=True)[1] == "not distinguishable"
    assert (with_error([1.0], 2), with_error([], 2), with_error([1.0, 3.0], 1)) == ("1.00", "–", "2.0 ± 1.0")


def test_numbers_are_short():
    assert [short(x) for x in (0, 7, 999, 1500, 2e6, 2.007e6)] == ["0", "7", "999", "1.5K", "2M", "2.01M"]
    assert [short(x) for x in (1e9, 1.5e15)] == ["1B", "1.5P"]


# ------------------------------------------------------------------------------------------------- for real
@pytest.mark.slow
def test_a_sweep_with_the_real_scripts(corpus_dir, tmp_path):
    labelled = "sentence\tlabel\n" + "".join(f"text number {i}\t{i % 2}\n" for i in range(40))
    (tmp_path / "task.tsv").write_text(labelled)
    shape = "--model.n_layers 1 --model.d_model 32 --model.d_ff 64 --model.n_heads 2 --seq_len 32 --batch_tokens 512"
    flags = f"{shape} --micro_tokens 512 --eval_tokens 512 --eval_every 0.5 --pppl_tokens 0 --device cpu"
    tune = "--task task.tsv --eval task.tsv --task_name parity --seeds 1 --epochs 1 --max_len 16 --device cpu"
    args = ["mosaic-tiny", "--data", corpus_dir, "--seeds", "1", "--budgets", "10240", "20480", "--timing_steps", "6"]
    args += [f"--flags={flags}", f"--finetune={tune}", "--vary", "linear:schedule=linear"]
    command = [sys.executable, "-m", "sweep.run", *map(str, args)]
    how = dict(cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {(r["arm"], r["budget"], r["metric"]): r for r in rows(tmp_path)}
    assert len(found) == 2 * 2 * 3
    for arm in ("mosaic-tiny", "mosaic-tiny+linear"):
        for budget in (10_240, 20_480):
            row = found[arm, budget, "loss"]
            assert row["tokens"] == budget and row["step"] == budget // 512 and 5 < row["value"] < 9
            assert 0 <= found[arm, budget, "parity"]["value"] <= 1
    assert "--cooldown_from" in found["mosaic-tiny", 10_240, "loss"]["command"]
    again = subprocess.run(command, **how)
    assert again.returncode == 0 and "0 of 8 jobs to do" in again.stdout
