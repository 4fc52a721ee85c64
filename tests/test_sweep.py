"""sweep/: the plan, the queue that survives kills, and the statistics.

Most tests run the real sweep.run on stand-ins for pretrain.py and finetune_glue.py, which take no
time; the last one, slow, runs the real ones.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from conftest import ROOT, python

from records import BadInput
from sweep import run as sweep
from sweep.leaderboard import leaderboard, short, verdict, with_error

# A stand-in trains nothing: it writes what the real one would, counts its calls, and can be told
# to fail or to wait.
RECIPES = """
from dataclasses import dataclass
from pathlib import Path
@dataclass
class TrainConfig:
    lr: float = 1.0
    batch_tokens: int = 100
    warmup: float = 0.06
    cooldown: float = 0.2
    schedule: str = "linear"
    seq_len: int = 128
    max_tokens: int = 0
    seed: int = 0
    data: tuple[str, ...] = ()
    out: str = ""
    name: str = ""
    cooldown_from: str = ""
    checkpoint_every: float = 0.1
    eval_tokens: int = 1
def make_presets():
    new = TrainConfig(lr=2.0 if Path("new-recipe").exists() else 1.0)
    return {"mosaic-tiny": ("", new), "bert-tiny": ("", TrainConfig())}
check_config = lambda cfg, world_size: None
"""
PRETRAIN = """
import json, os, sys, time, tyro
from dataclasses import asdict
from pathlib import Path
from recipes import make_presets
preset, cfg = sys.argv[1], tyro.extras.overridable_config_cli(make_presets(), use_underscores=True)
run, settings, tokens = Path(cfg.out, cfg.name), json.loads(json.dumps(asdict(cfg))), cfg.max_tokens
with open("calls", "a") as f:
    f.write(f"{cfg.name} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
if cfg.lr == 666 and not Path("repaired").exists():
    print("step 1"); raise SystemExit("error: the loss is nan at step 7")
if Path("halfway").exists():
    raise SystemExit(0)
while Path("wait").exists():
    time.sleep(0.02)
if cfg.cooldown_from:
    stem = json.loads(Path(cfg.cooldown_from, "progress.json").read_text())
    settings = stem["settings"]
    tokens = round(stem["tokens"] / (1 - settings["cooldown"]))
run.mkdir(parents=True, exist_ok=True)
if (run / "config.json").exists() and json.loads((run / "config.json").read_text()) != settings:
    raise SystemExit(f"error: {run} holds a run with other settings")
(run / "config.json").write_text(json.dumps(settings))
every = int(cfg.checkpoint_every) if cfg.checkpoint_every >= 1 else 10**9
last = -(-tokens // settings["batch_tokens"])
for step in [*([] if cfg.cooldown_from else range(every, last, every)), last]:
    n = min(step * settings["batch_tokens"], tokens)
    seconds = n / (200 if preset == "bert-tiny" else 100)
    progress = {"step": step, "tokens": n, "train_seconds": seconds, "gpu_seconds": seconds,
                "dollars": n / 1e6, "finished": step == last, "settings": settings}
    folder = run / "ckpt" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "progress.json").write_text(json.dumps(progress))
loss = 5 - tokens / 1e4 + 0.01 * settings["seed"] + 0.1 * (preset == "bert-tiny")
head = {"type": "header", "family": preset.split("-")[0], "preset": preset, "device": "a CPU",
        "world_size": 1, "revision": "abc", "n_params": 7, "command": " ".join(sys.argv)}
held_out = {"type": "eval", "step": last, "tokens": tokens, "loss": loss, "accuracy": 0.5}
log = "".join(json.dumps(r) + "\\n" for r in (head, held_out))
(run / "log.jsonl").write_text('{"dam\\n' + log)
"""
FINETUNE_GLUE = """
import argparse, json, shlex, sys
from pathlib import Path
cli = argparse.ArgumentParser()
cli.add_argument("run", type=Path)
cli.add_argument("--task", default="RTE,CoLA")
cli.add_argument("--lr", type=float, default=0.0)
cfg = cli.parse_args()
run = cfg.run
with open("calls", "a") as f:
    f.write(f"finetune {run.name}\\n")
step = max(int(p.name[5:]) for p in run.glob("ckpt/step_*"))
(run / "glue").mkdir(exist_ok=True)
command = shlex.join(["finetune_glue.py", *sys.argv[1:]])
for task in cfg.task.split(","):
    line = {"type": "glue", "task": task, "step": step, "majority": 0.5, "command": command}
    line |= {"metrics": {"accuracy": 0.6}}
    lines = [line | {"seed": s, "score": 0.6 + 0.02 * s + cfg.lr} for s in (1, 2)]
    lines += [lines[0] | {"score": 0.1, "command": "older"}, lines[0] | {"step": 1}]  # not asked
    with open(run / "glue" / f"{task}.jsonl", "a") as f:
        f.write("".join(json.dumps(r) + "\\n" for r in lines))
"""


@pytest.fixture
def stand_ins(tmp_path):
    for name in ("recipes", "pretrain", "finetune_glue"):
        (tmp_path / f"{name}.py").write_text(globals()[name.upper()])
    shutil.copytree(ROOT / "sweep", tmp_path / "sweep")
    return tmp_path


def start(folder, *args, **env):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=env)
    command = [sys.executable, "-m", "sweep.run", *map(str, args)]
    return subprocess.Popen(command, start_new_session=True, **pipes)


def run(folder, *args, code=0, **env):
    process = start(folder, *args, **env)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    return output


def calls(folder):
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def names(folder):
    return [line.split()[0] for line in calls(folder)]


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def rows(folder, name="sweep"):
    lines = (folder / "results" / name / "records.jsonl").read_text().splitlines()
    return [*map(json.loads, lines)]


def of(r):
    return r["preset"] + f"+{r['variant']}" * bool(r["variant"])


ONE = ["mosaic-tiny", "--seeds", 1, "--budgets", 10_000]
TWO = [*ONE, 20_000]


# ---------------------------------------------------------------------------------------- plan
def test_every_budget_branches_off_a_checkpoint_and_ends_at_its_tokens(stand_ins):
    budgets = 10_200, 30_600, 40_800  # rounded to steps of all four
    run(stand_ins, *ONE[:-1], *budgets, "--vary", "wide:batch_tokens=250", "slow:cooldown=0.25",
        "linear:schedule=linear")
    found = {(of(r), r["budget"]): r for r in rows(stand_ins) if r["metric"] == "loss"}
    assert len(found) == len(calls(stand_ins)) == 12  # no branch has failed
    for change in ("", "+wide", "+slow", "+linear"):
        runs = [found["mosaic-tiny" + change, b] for b in budgets]
        assert [r["tokens"] for r in runs] == [10_000, 30_000, 40_000]
        linear = change == "+linear"  # each of its budgets is a run of its own
        assert ["--cooldown_from" in r["command"] for r in runs] == [not linear] * 2 + [False]


def test_equal_time_scales_the_tokens_by_the_speeds_of_a_sweep(stand_ins):
    run(stand_ins, "mosaic-tiny", "bert-tiny", *TWO[1:], "--name", "tokens")
    args = [*TWO[1:], "--name", "time", "--speeds_of", "results/tokens"]
    run(stand_ins, "mosaic-tiny", "bert-tiny", *args)
    found = {(of(r), r["budget"]): r for r in rows(stand_ins, "time")}
    assert {k: r["tokens"] for k, r in found.items()} == {
        ("mosaic-tiny", 1e4): 1e4, ("mosaic-tiny", 2e4): 2e4,
        ("bert-tiny", 1e4): 2e4, ("bert-tiny", 2e4): 4e4}  # it is twice as fast
    assert {r["train_seconds"] for (_, budget), r in found.items() if budget == 1e4} == {100}
    assert {r["equal"] for r in found.values()} == {"time"}
    assert "## 10K tokens of the first preset, and its time for the others" in (
        stand_ins / "results/time/leaderboard.md").read_text()
    said = run(stand_ins, "mosaic-tiny", *args, "--vary", "new:lr=3", code=1)
    assert said == ("error: --speeds_of results/tokens: no run of mosaic-tiny+new with a seed and "
                    "budget of mosaic-tiny\n")
    said = run(stand_ins, "bert-tiny", *args, code=1)
    assert "holds a sweep with first preset mosaic-tiny -> bert-tiny" in said


def test_a_dry_run_prints_the_jobs_and_runs_none(stand_ins):
    said = run(stand_ins, *ONE[:-1], 9e6, 18e6, "--finetune=--task RTE", "--dry_run")
    assert "4 of 4 jobs to do" in said and "--cooldown_from" in said and "finetune_glue.py" in said
    run(stand_ins, *ONE, "--dry_run")  # it decides nothing
    assert not calls(stand_ins) and not (stand_ins / "results").exists()


def test_a_name_is_text_and_what_blimp_says_of_its_runs_is_read(stand_ins):
    name = "50% of [a] $x$ ü"
    run(stand_ins, *ONE, "--name", name)
    blimp = {"type": "blimp", "tokens": 1, "train_seconds": 1, "gpu_seconds": 1, "dollars": 0}
    lines = [blimp | {"step": step, "n_pairs": n, "score": score}  # of 100 steps
             for step, n, score in ((100, 3350, 0.61), (100, 67, 0.99), (50, 67_000, 0.5))]
    path = stand_ins / "runs" / name / "mosaic-tiny-s1-10K" / "blimp.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in lines))
    said = run(stand_ins, *ONE, "--name", name)  # reads what is there since
    assert {r["metric"]: r["value"] for r in rows(stand_ins, name)}["blimp"] == 0.61
    assert "| held-out loss (nats) | BLiMP (%) |" in said and "| 4.0100 | 61.0 |" in said
    for name in ("", "a/b", ".."):
        assert "give the name of a folder" in run(stand_ins, *ONE, "--name", name, code=1)


def test_what_would_mix_two_sweeps_is_refused(stand_ins):
    (stand_ins / "data").mkdir()
    (stand_ins / "data" / "meta.json").write_text("one")
    run(stand_ins, *ONE, "--data", "data")
    before = rows(stand_ins)
    said = run(stand_ins, *ONE, "--data", "data", "--vary", "wide:batch_tokens=350", code=1)
    assert "holds a sweep with tokens [10000] -> [9800]; give this one another --name" in said
    said = run(stand_ins, *TWO, "--data", "data", code=1)
    assert said.startswith("error: runs/sweep holds a sweep with --budgets [10000.0] -> ")
    (stand_ins / "data" / "meta.json").write_text("another")  # prepared anew under its name
    assert "corpus" in run(stand_ins, *ONE, "--data", "data", code=1)
    said = run(stand_ins, *ONE, "--out", "elsewhere", code=1)  # as results that come with a clone
    assert "results/sweep holds results of other runs than in elsewhere/sweep" in said
    assert rows(stand_ins) == before and len(calls(stand_ins)) == 1


# --------------------------------------------------------------------------------------- queue
def test_the_same_command_again_runs_only_what_is_new_or_gone_or_changed(stand_ins):
    args = [*ONE, "--finetune=--task RTE"]
    run(stand_ins, *args)
    first = calls(stand_ins)
    assert len(first) == 2
    assert "0 of 2 jobs to do" in run(stand_ins, *args) and calls(stand_ins) == first
    args += ["--seeds", 1, 2, "--vary", "fast:lr=3"]
    run(stand_ins, *args)
    assert len(calls(stand_ins)) == 8 and calls(stand_ins)[:2] == first
    found = {(of(r), r["seed"], r["metric"]): r for r in rows(stand_ins)}
    assert len(found) == len(rows(stand_ins)) == 2 * 2 * 3
    # by this command, of this checkpoint; and what the stand-in adds for a seed
    assert found["mosaic-tiny+fast", 2, "RTE"]["values"] == [0.62, 0.64]
    losses = [found["mosaic-tiny", seed, "loss"]["value"] for seed in (1, 2)]
    assert losses[1] - losses[0] == pytest.approx(0.01)
    shutil.rmtree(stand_ins / "runs/sweep/mosaic-tiny-s2-10K/ckpt")
    run(stand_ins, *args)
    assert names(stand_ins)[8:] == ["mosaic-tiny-s2-10K", "finetune"]
    (stand_ins / "new-recipe").touch()  # the preset is another one now: old runs are not its base
    said = run(stand_ins, *args, code=1)
    assert "failed: mosaic-tiny-s1-10K: error: " in said and "holds a run with other" in said


def test_fine_tuning_can_change_without_pretraining_again(stand_ins):
    def values(*finetune):
        run(stand_ins, *ONE, *[f"--finetune={flags}" for flags in finetune])
        return {r["metric"]: r["values"] for r in rows(stand_ins) if "values" in r}

    assert values("--task RTE,CoLA") == {"RTE": [0.62, 0.64], "CoLA": [0.62, 0.64]}
    assert values("--task RTE --lr 0.1") == {"RTE": pytest.approx([0.72, 0.74])}
    assert values("--task RTE,CoLA") == {"RTE": [0.62, 0.64], "CoLA": [0.62, 0.64]}
    assert values("--task CoLA", "--task RTE --lr 0.1") == {  # one after the other
        "CoLA": [0.62, 0.64], "RTE": pytest.approx([0.72, 0.74])}
    assert names(stand_ins) == ["mosaic-tiny-s1-10K", *["finetune"] * 4]
    said = run(stand_ins, *ONE, "--finetune=--tusk RTE", code=1)
    assert "failed: mosaic-tiny-s1-10K-finetune: " in said
    said = run(stand_ins, *ONE, "--finetune=--task 'RTE", code=1)
    assert said == "error: --flags or --finetune: No closing quotation\n"


def test_a_killed_sweep_continues_and_its_orphaned_script_is_waited_for(stand_ins):
    (stand_ins / "wait").touch()
    killed = start(stand_ins, *TWO)
    wait_for(lambda: calls(stand_ins))
    killed.kill()
    killed.wait()
    again = start(stand_ins, *TWO)
    time.sleep(2)
    assert len(calls(stand_ins)) == 1  # no second script where the first still writes
    (stand_ins / "wait").unlink()
    assert again.wait(timeout=60) == 0
    assert names(stand_ins) == ["mosaic-tiny-s1-20K"] * 2 + ["mosaic-tiny-s1-10K"]


def test_a_stopped_sweep_stops_its_scripts(stand_ins):
    (stand_ins / "wait").touch()
    stopped = start(stand_ins, *ONE, "--seeds", 1, 2, "--workers", 2)
    wait_for(lambda: len(calls(stand_ins)) == 2)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate(timeout=30)[0]
    assert "stopped; the same command continues" in said and stopped.returncode == 1
    (stand_ins / "wait").unlink()
    time.sleep(0.3)
    assert not list(stand_ins.glob("runs/sweep/*/ckpt"))


def test_workers_share_the_queue_and_each_has_its_gpu(stand_ins):
    args = [*TWO, "--seeds", 1, 2, 3, "--workers", 3]
    run(stand_ins, *args, CUDA_VISIBLE_DEVICES="5,7,9")
    runs, gpus = zip(*map(str.split, calls(stand_ins)))
    assert len(runs) == len(set(runs)) == 6 and set(gpus[:3]) == {"5", "7", "9"}


def test_a_failed_job_does_not_end_the_sweep_and_is_tried_again(stand_ins):
    args = [*TWO, "--vary", "bad:lr=666"]
    said = run(stand_ins, *args, code=1)
    assert "failed: mosaic-tiny+bad-s1-20K: error: the loss is nan at step 7" in said
    assert "mosaic-tiny+bad-s1-10K: not run, as mosaic-tiny+bad-s1-20K failed" in said
    assert {of(r) for r in rows(stand_ins)} == {"mosaic-tiny"}
    assert "the loss is nan" in (stand_ins / "results" / "sweep" / "leaderboard.md").read_text()
    n = len(calls(stand_ins))
    (stand_ins / "repaired").touch()
    assert "Failed" not in run(stand_ins, *args) and len(calls(stand_ins)) == n + 2
    (stand_ins / "halfway").touch()  # to leave without an error, before the end
    said = run(stand_ins, *ONE, "--name", "halfway", code=1)
    assert "failed: mosaic-tiny-s1-10K: stopped early" in said
    assert not list((stand_ins / "results/halfway").iterdir())


@pytest.mark.parametrize("folder", ["out", "results"])
def test_a_folder_that_cannot_be_written_to_is_found_out_first(stand_ins, folder):
    (stand_ins / "file").touch()
    said = run(stand_ins, *ONE, f"--{folder}", "file/x", code=1)
    assert said.startswith("error: file/x") and not calls(stand_ins)


@pytest.mark.parametrize(("settings", "says"), [
    (dict(presets=("mosaic-tiny", "gpt")), "no preset gpt"),
    (dict(presets=()), "at least one preset"), (dict(vary=("adamw",)), "write NAME:flag=value"),
    (dict(vary=("a:lr",)), "write NAME:flag=value"),
    (dict(vary=("a:lr=1", "a:lr=2")), "the same name"),
    (dict(vary=("a:seed=1",)), "--seed is set by the sweep"),
    (dict(flags="--max-tokens 7"), "--max_tokens is set by the sweep"),
    (dict(vary=("a:seq_len=1",)), "--seq_len 1"),
    (dict(vary=("a:seq_len=64",)), "losses are on other text"),
    (dict(budgets=(1e6, 1e6)), "different whole numbers"),
    (dict(budgets=(1_000_001, 2_000_000)), "multiples of 20,480 tokens"),
    (dict(budgets=(2_048_000, 65_536_000)), "branch off in the warm-up"),
])
def test_bad_input_is_one_line(settings, says):
    cfg = sweep.Config(**dict(presets=("mosaic-tiny",)) | settings)
    with pytest.raises(BadInput, match=rf"^[^\n]*{re.escape(says)}[^\n]*$"):
        sweep.tokens_of_budgets(cfg, sweep.make_variants(cfg), {})


def test_a_variant_overrides_the_common_flags_and_can_switch():
    flags = "--lr 1 --model.no_bias --betas 0.8 0.9"
    vary = "v:lr=2,model.bias=True", "off:model.bias=False"
    base, v, off = sweep.make_variants(sweep.Config(("mosaic-tiny",), flags=flags, vary=vary))
    assert (base.cfg.lr, base.cfg.model.bias, base.cfg.betas) == (1.0, False, (0.8, 0.9))
    assert (v.cfg.lr, v.cfg.model.bias, v.cfg.betas) == (2.0, True, (0.8, 0.9))
    assert off.cfg.model.bias is False


# --------------------------------------------------------------------------------- statistics
def row(variant, seed, value, metric="loss", preset="base"):
    return dict(type="sweep", run=f"{preset}+{variant}-s{seed}", preset=preset, variant=variant,
                equal="tokens", tokens=1_000_000, gpu_seconds=3600.0 * seed, dollars=2.0,
                device="H200", world_size=8, revision="abc", command="pretrain.py", seed=seed,
                value=value, metric=metric, budget=1e6, n_params=7)


def test_the_table_is_what_is_computed_by_hand():
    records = [row("", s, v) for s, v in zip((1, 2, 3), (4.0, 4.2, 4.4))]
    records += [row("x", s, v) for s, v in zip((1, 2, 3), (4.1, 4.3, 4.6))]
    text = leaderboard(records, {"job 9": "error: no"}, "t", "python -m sweep.run")
    # s.e. = 0.2 / sqrt 3; differences 0.1, 0.1, 0.2: mean 0.1333, s.e. 0.0333
    assert "| 1 | base | 4.2000 ± 0.1155 | 3 | 7 | 1M | 2 | 2.00 |" in text
    assert "| 2 | base+x | 4.3333 ± 0.1453 |" in text and "On 8× H200; revision abc." in text
    p = 1 - 4 / math.sqrt(2 + 4**2)  # of t = 4 with 2 degrees of freedom: 1 - t / sqrt(2 + t²)
    assert (f"| base+x | base | 1M | held-out loss (nats) | 0.1333 ± 0.0333 | 3 | {p:.2g} | "
            "not distinguishable |") in text
    assert "- job 9: error: no" in text


def test_only_seeds_that_both_have_are_compared_and_tasks_are_averaged_over_complete_runs():
    records = [row(v, s, 4.0 + s) for v in ("", "x") for s in (1, 2)] + [row("", 3, 9.0)]
    records += [row(v, s, 0.5 + 0.1 * s, t)
                for v in ("", "x") for s in (1, 2) for t in ("RTE", "CoLA")]
    records += [row("", 3, 0.9, "RTE")]  # its CoLA is missing
    text = leaderboard(records, {}, "t", "c")
    assert "| 1 | base | 65.00 ± 5.00 | 6.6667 ± 1.2019 | 3 |" in text
    assert "| base+x | base | 1M | mean of 2 tasks (%) | 0.00 ± 0.00 | 2 | – | no test: the" in text
    assert "| base | 73.3 ± 8.8 | 65.0 ± 5.0 |" in text  # RTE of three seeds, CoLA of two


def test_a_variant_without_all_seeds_has_no_rank():
    """Seed 1 is the hard one here: alone, the better variant looks worse."""
    records = [row("", s, v) for s, v in ((1, 5.0), (2, 4.0), (3, 4.0))] + [row("x", 1, 4.6)]
    text = leaderboard(records, {}, "t", "c")
    assert "| 1 | base | 4.3333" in text and "| – | base+x | 4.6000 | 1 |" in text
    assert "| base+x | base | 1M | held-out loss (nats) | -0.4000 | 1 |" in text


def test_presets_are_compared_with_the_same_variant_and_variants_with_their_preset():
    what = [(preset, variant) for preset in ("a", "b") for variant in ("", "x")]
    records = [row(variant, s, i + s / 10, preset=preset)
               for i, (preset, variant) in enumerate(what) for s in (1, 2)]
    tests = leaderboard(records, {}, "t", "c").partition("## Does A beat B?")[2]
    compared = [line.split(" | ")[:2] for line in tests.splitlines() if "held-out" in line]
    assert compared == [["| a", "b"], ["| a+x", "b+x"], ["| a+x", "a"], ["| b+x", "b"]]


def test_verdicts_and_numbers():
    assert verdict([1.0], [2.0], lower=True) == ("–", "no test: one seed")
    # equal differences are no certainty: two examples of 277 more for each seed
    same = verdict([142 / 277, 144 / 277, 150 / 277], [140 / 277, 142 / 277, 148 / 277], False)
    assert same == ("–", "no test: the same difference for all")
    assert verdict([1.0, 1.1, 1.2], [2.0, 2.1, 2.3], lower=True)[1] == "better"
    assert verdict([1.0, 1.1, 1.2], [2.0, 2.1, 2.3], lower=False)[1] == "worse"
    assert verdict([1.0, 2.0, 3.0], [1.1, 1.8, 3.05], lower=True)[1] == "not distinguishable"
    assert [with_error(v, 1) for v in ([1.0], [], [1.0, 3.0])] == ["1.0", "–", "2.0 ± 1.0"]
    assert [short(x) for x in (0, 1500, 2.007e6, 1.5e15)] == ["0", "1.5K", "2.01M", "1.5P"]


@pytest.mark.slow
def test_a_sweep_with_the_real_scripts(corpus_dir, tmp_path):
    labelled = "sentence\tlabel\n" + "".join(f"text number {i}\t{i % 2}\n" for i in range(40))
    (tmp_path / "task.tsv").write_text(labelled)
    flags = ("--model.n_layers 1 --model.d_model 32 --model.d_ff 64 --model.n_heads 2 --seq_len 32 "
             "--batch_tokens 512 --micro_tokens 512 --eval_tokens 512 --eval_every 0.5 "
             "--pppl_tokens 0 --device cpu")
    tune = "--task task.tsv --eval task.tsv --task_name parity --seeds 1 --epochs 1 --max_len 16"
    args = ["mosaic-tiny", "--data", corpus_dir, "--seeds", 1, "--budgets", 10_240, 20_480]
    args += [f"--flags={flags}", f"--finetune={tune} --device cpu"]
    args += ["--vary", "linear:schedule=linear"]
    run_it = partial(python, "-m", "sweep.run", *args, cwd=tmp_path, OMP_NUM_THREADS="1")
    run_it()
    found = {(of(r), r["budget"], r["metric"]): r for r in rows(tmp_path)}
    assert len(found) == 2 * 2 * 3
    for name in ("mosaic-tiny", "mosaic-tiny+linear"):
        for budget in (10_240, 20_480):
            loss = found[name, budget, "loss"]
            assert loss["tokens"] == budget and loss["step"] == budget // 512
            assert 5 < loss["value"] < 9 and 0 <= found[name, budget, "parity"]["value"] <= 1
    assert "--cooldown_from" in found["mosaic-tiny", 10_240, "loss"]["command"]
    assert "0 of 8 jobs to do" in run_it().stdout
