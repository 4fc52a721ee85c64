"""Pretrain, cool down and fine-tune every preset × variant × seed × budget; then rank, and test what beats what.

    python -m sweep.run mosaic-tiny bert-tiny --name shapes --data data/docstrings --budgets 2e6 4e6 8e6 \\
        --flags="--seq_len 32" --finetune="--task RTE,CoLA --glue_dir glue --seeds 1,2"
    python -m sweep.run mosaic-tiny --name optimizer --data data/docstrings --budgets 4e6 --equal time \\
        --vary adamw:optimizer=adamw,lr=2e-3 nobias:model.bias=False      # an ablation, against mosaic-tiny as it is
    torchrun --nproc_per_node 8 sweep.py ...                               # 8 workers, a GPU each, one queue
    python -m sweep.run ... --dry_run                                          # the jobs, and how long they will take

One stem is trained for each preset, variant and seed, as long as the largest budget (--schedule wsd); for every smaller
budget a cool-down branches off it, so budgets of 1, 2 and 4 cost 4.6 and not 7. Variants with schedule=linear, and all
with --no_stem, get a run for each budget. Jobs are calls of pretrain.py and finetune_glue.py, each shown in
<out>/<name>/.jobs/. The same command again continues where it was killed and tries again what failed.

Results: results/<name>/leaderboard.md, and records.jsonl, a line per run and metric, which plots.py draws:
    python plots.py pareto results/shapes;  python plots.py ablation results/optimizer
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import IO, Annotated, Literal

import tyro

import finetune_glue
from machine import hardware_name, pick_device, read_command_line
from recipes import (
    FREE_TO_CHANGE,
    TrainConfig,
    check_config,
    known_settings,
    make_presets,
    mean_masking_rate,
)
from records import read_jsonl, to_json, write_atomically
from sweep.leaderboard import leaderboard, short

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HERE = Path(__file__).parents[1]
OURS = {"data", "out", "name", "seed", "max_steps", "max_tokens", "max_minutes", "checkpoint_every", "cooldown_from"}
FIXED = ("data", "budgets", "equal", "no_stem", "flags")


@dataclass
class Config:
    """A sweep. Under the same name, presets, seeds, variants and fine-tuning can change later; the rest stays, and so
    do the tokens of a run: a variant with another batch may need another name."""

    presets: tyro.conf.Positional[tuple[str, ...]]  # of pretrain.py; the first is the base of --equal time
    name: str = "sweep"  # of the folders in `out` and `results`
    data: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # as pretrain.py's
    seeds: tuple[int, ...] = (1, 2, 3)  # of pretraining: batches, masks and initial weights
    budgets: tuple[float, ...] = (2e6, 4e6, 8e6)  # tokens of a run; with --equal flops training FLOPs
    # tokens: every run of a budget sees as many; flops: as many as the FLOPs buy it; time: as many as it gets through
    # while the first preset sees the budget, by speeds measured in turns before the sweep starts
    equal: Literal["tokens", "flops", "time"] = "tokens"
    vary: tuple[str, ...] = ()  # variants of every preset: NAME:flag=value,flag=value of pretrain.py
    no_stem: bool = False  # a run of its own for each budget, with the preset's own schedule
    flags: str = ""  # of every pretrain.py, in quotes
    # flags of a finetune_glue.py for every run, in quotes; none: held-out loss only. Several are run one after the
    # other: --finetune="--task SST-2 --epochs 1" --finetune="--task CoLA,RTE --epochs 3"
    finetune: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    timing_steps: int = 30  # steps of the measurement of speed, for each preset and variant
    out: str = "runs"
    results: str = "results"
    dry_run: bool = False  # measure the speeds, print the jobs and their time, and stop


# ----------------------------------------------------------------------------- what to run


@dataclass
class Arm:
    """A preset, or a variant of one: what is compared."""

    name: str
    preset: str
    variant: str  # "" for the preset as it is
    words: list[str]  # of its command lines
    cfg: TrainConfig
    stem: bool  # smaller budgets branch off the largest one's run

    @property
    def before_cooldown(self) -> Fraction:
        """Share of a run before the branching point; 1 where nothing branches."""
        return 1 - Fraction(self.cfg.cooldown).limit_denominator(100) if self.stem else Fraction(1)

    @property
    def measure(self) -> tuple[int, int]:
        """What the held-out text depends on."""
        return self.cfg.seq_len, self.cfg.eval_tokens


@dataclass
class Job:
    """One call of a script: pretraining, or the fine-tuning of what it made."""

    name: str
    command: list[str]
    run: Path
    arm: Arm
    seed: int
    budget: float
    tokens: int = 0  # to pretrain; 0: a fine-tuning
    after: str = ""  # name of the job that has to be done before


def words_of(flags: str, name: str) -> list[str]:
    """Flags in quotes, as a shell would split them. SystemExit (one line) for an unbalanced quote."""
    try:
        return shlex.split(flags)
    except ValueError as e:
        raise SystemExit(f"error: {name}: {flags}: {e}") from None


def read_flags(words: list[str]) -> dict[str, list[str]]:
    """["--lr", "1", "--model.no_bias"] -> {"lr": ["--lr", "1"], "model.bias": ["--model.no_bias"]}."""
    settings: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            key = re.sub(r"(^|\.)no_", r"\1", word[2:].partition("=")[0].replace("-", "_"))
            settings[key] = []
        elif not settings:
            raise SystemExit(f"error: --flags: {word!r} stands before the first --flag")
        settings[key].append(word)
    return settings


def read_variant(text: str) -> tuple[str, dict[str, list[str]]]:
    """ "adamw:optimizer=adamw,lr=2e-3" -> its name and its flags, as read_flags."""
    name, colon, pairs = text.partition(":")
    parts = [pair.partition("=") for pair in pairs.split(",")]
    if not (re.fullmatch(r"[\w.-]+", name) and colon and all(key and eq for key, eq, _ in parts)):
        raise SystemExit(f"error: --vary {text}: write NAME:flag=value,flag=value, as in adamw:optimizer=adamw,lr=2e-3")
    words = []
    for key, _, value in parts:
        switch = {"True": [f"--{key}"], "False": ["--" + re.sub(r"(\w+)$", r"no_\1", key)]}
        words += switch.get(value, [f"--{key}", *value.split()])
    return name, read_flags(words)


def make_arms(cfg: Config) -> list[Arm]:
    """The arms in order: each preset as it is, then its variants. SystemExit (one line) for settings that cannot be."""
    presets, common = make_presets(), read_flags(words_of(cfg.flags, "--flags"))
    variants = [("", {}), *map(read_variant, cfg.vary)]
    if unknown := [p for p in cfg.presets if p not in presets]:
        raise SystemExit(f"error: unknown preset {unknown[0]!r}; choose from {', '.join(presets)}")
    if not (cfg.presets and cfg.seeds and cfg.budgets):
        raise SystemExit("error: a sweep needs at least one preset, one seed and one budget")
    arms = []
    for preset in cfg.presets:
        for variant, own in variants:
            settings = common | own
            if taken := OURS & set(settings):
                raise SystemExit(f"error: --{min(taken)} is set by the sweep; leave it out of --flags and --vary")
            if not cfg.no_stem:
                settings = {"schedule": ["--schedule", "wsd"]} | settings
            words = [word for flag in settings.values() for word in flag]
            config = tyro.extras.overridable_config_cli(presets, args=[preset, *words], use_underscores=True)
            check_config(config, 1)
            stem = not cfg.no_stem and config.schedule == "wsd" and len(cfg.budgets) > 1
            if stem and (config.ramp_from or not config.cooldown):
                raise SystemExit(
                    f"error: {preset} {variant}: no branches with a batch ramp or cooldown 0; use --no_stem"
                )
            arms.append(Arm(f"{preset}+{variant}" if variant else preset, preset, variant, words, config, stem))
    if len({arm.name for arm in arms}) < len(arms):
        raise SystemExit("error: two presets or two variants have the same name")
    return arms


def tokens_of_budgets(cfg: Config, arms: list[Arm], speeds: dict[str, dict]) -> dict[str, dict[float, int]]:
    """{arm: {budget: tokens}}. Budgets are whole multiples of a unit, and the unit is rounded to whole steps on both
    sides of the branching point, so that each branches off a checkpoint exactly; with equal tokens, to the same
    number for all arms. SystemExit (one line) where the rounding would change a budget by more than 5 %."""
    if any(b != int(b) or b < 1 for b in cfg.budgets) or len(set(cfg.budgets)) < len(cfg.budgets):
        raise SystemExit("error: --budgets: give different whole numbers, as in 2e6 4e6 8e6")
    unit = math.gcd(*map(int, cfg.budgets))
    if max(cfg.budgets) / unit > 100:
        raise SystemExit(
            f"error: --budgets have the common unit {unit:,}, so more than 100 checkpoints; choose multiples"
        )
    grains = {arm.name: arm.cfg.batch_tokens * arm.before_cooldown.denominator for arm in arms}
    if cfg.equal == "tokens":
        grains = dict.fromkeys(grains, math.lcm(*grains.values()))
    tokens = {}
    for arm in arms:
        if arm.stem and min(cfg.budgets) * arm.before_cooldown < arm.cfg.warmup * max(cfg.budgets):
            raise SystemExit(
                f"error: {arm.name}: the smallest budget would branch off in the warm-up of the largest one's run; "
                "choose budgets that are closer, or --no_stem"
            )
        wanted, grain = unit, grains[arm.name]
        if cfg.equal != "tokens":
            wanted *= speeds[arm.name]["ratio"] if cfg.equal == "time" else 1 / speeds[arm.name]["flops_per_token"]
        n = round(wanted / grain)
        if abs(n * grain - wanted) > 0.05 * wanted:
            raise SystemExit(
                f"error: {arm.name}: the budgets' unit is {wanted:,.0f} tokens, no whole number of steps on both sides "
                f"of the branching point; choose budgets in multiples of {grain:,} tokens, or larger ones"
            )
        tokens[arm.name] = {b: int(b) // unit * n * grain for b in cfg.budgets}
    return tokens


def make_jobs(cfg: Config, arms: list[Arm], tokens: dict[str, dict[float, int]]) -> list[Job]:
    """The jobs in the order to run them, seed by seed; a stem before its branches, a model before its fine-tuning.
    tokens: as from tokens_of_budgets."""
    jobs = []
    for seed, arm in product(cfg.seeds, arms):
        sizes, stem = tokens[arm.name], None
        for budget in sorted(sizes, reverse=True):
            branching = sizes[budget] * arm.before_cooldown  # tokens
            name = f"{arm.name}-s{seed}-{short(budget)}"
            run = Path(cfg.out, cfg.name, name)
            command = pretrain(arm, run)
            if stem:
                checkpoint = stem.run / "ckpt" / f"step_{int(branching / arm.cfg.batch_tokens):08d}"
                command += ["--cooldown_from", str(checkpoint)]
                job = Job(name, command, run, arm, seed, budget, sizes[budget] - int(branching), stem.name)
            else:
                steps = math.gcd(*sizes.values()) * arm.before_cooldown / arm.cfg.batch_tokens
                every = int(steps) if arm.stem else 0.25
                command += [*data_flags(cfg), "--max_tokens", str(sizes[budget]), "--seed", str(seed)]
                command += ["--checkpoint_every", str(every), *arm.words]
                job = Job(name, command, run, arm, seed, budget, sizes[budget])
                stem = job if arm.stem else None
            jobs.append(job)
            for i, flags in enumerate(cfg.finetune, 1):
                command = [sys.executable, str(HERE / "finetune_glue.py"), str(run), *shlex.split(flags)]
                tuning = f"{name}-finetune" + (f"-{i}" if i > 1 else "")
                jobs.append(Job(tuning, command, run, arm, seed, budget, after=jobs[-1].name))
    return jobs


def pretrain(arm: Arm, run: Path) -> list[str]:
    return [sys.executable, str(HERE / "pretrain.py"), arm.preset, "--out", str(run.parent), "--name", run.name]


def data_flags(cfg: Config) -> list[str]:
    return [word for folder in cfg.data for word in ("--data", folder)]


# ----------------------------------------------------------------------------- running it


def claim(path: Path, wait: bool = False) -> IO | None:
    """The open file of a lock, or None while somebody else holds it. The lock is gone when the last process that has
    the file is: a job whose worker was killed is taken again, but not while its script is still running."""
    file = open(path, "a")  # noqa: SIM115 (open as long as the lock is held)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return file
    except OSError:
        file.close()
        return None


def read_json(path: Path) -> dict:
    """A JSON file's object; {} if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_log(path: Path) -> list[dict]:
    """The records of a .jsonl file without its damaged lines; none if it is missing."""
    return read_jsonl(path)[0] if path.is_file() else []


def progress(run: Path) -> dict:
    """progress.json of the last checkpoint of a run; {} before there is one."""
    return read_json(max(run.glob("ckpt/step_????????/progress.json"), default=run / "none"))


def recipe_of(settings: dict) -> dict:
    """Settings of a run, as JSON has them, without those that the sweep, its data or a mere repetition decide."""
    recipe = {k: v for k, v in settings.items() if k not in OURS | FREE_TO_CHANGE}
    recipe["model"] = {k: v for k, v in recipe["model"].items() if k != "vocab_size"}
    return json.loads(json.dumps(recipe))


def other_settings(job: Job) -> str:
    """The settings in which a finished run differs from its arm today, as when a preset has changed; "" for none."""
    trained = read_json(job.run / "config.json").get("train", {"model": {}})
    trained, now = recipe_of(known_settings(trained)), recipe_of(asdict(job.arm.cfg))
    if now.get("start_from"):
        del now["model"]  # those weights bring their own
    return ", ".join(k for k, v in now.items() if trained.get(k) != v)


def call(command: list[str], output: Path, lock: IO) -> str:
    """Runs a script, its output into a file. Returns "" or the line that says why it failed."""
    torchrun = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_.*|TORCHELASTIC.*)")
    env = {k: v for k, v in os.environ.items() if not torchrun.fullmatch(k)}
    if "LOCAL_RANK" in os.environ:  # one GPU for each of torchrun's workers
        if not (visible := os.environ.get("CUDA_VISIBLE_DEVICES", "")):
            import torch

            visible = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = visible.split(",")
        env["CUDA_VISIBLE_DEVICES"] = gpus[int(os.environ["LOCAL_RANK"]) % len(gpus)]
    with open(output, "wb") as f:
        child = subprocess.Popen(command, stdout=f, stderr=f, env=env, pass_fds=(lock.fileno(),))
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.terminate()  # pretrain.py saves a checkpoint and leaves
            child.wait()
            raise
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or [f"exit code {code}"])[-1][:300] if code else ""


def measure_speeds(cfg: Config, arms: list[Arm], state: Path, started: float) -> dict[str, dict]:
    """{arm: tok_per_s of each round, ratio to the first arm's, flops_per_token ..., or error}. Arms not timed before
    run a few steps, in turns with the first; five rounds where the speeds decide how long the runs are, else one. They
    mask the mean share of a run: where it falls, it would fall faster here, and each step would be a shape of its own.
    """
    path, rounds, steps = state / "speed.json", 5 if cfg.equal == "time" else 1, cfg.timing_steps
    few = ["--log_every", str(max(1, steps // 6)), "--checkpoint_every", "0.99", "--eval_every", "0.99"]
    few += ["--max_steps", str(steps), "--pppl_tokens", "0"]
    with claim(state / "speed.lock", wait=True) as lock:
        known, here = read_json(path), [hardware_name(pick_device("auto")), steps, *data_flags(cfg)]
        words = {arm.name: [*here, json.dumps(recipe_of(asdict(arm.cfg)))] for arm in arms}
        same = {k: v for k, v in known.items() if v["words"] == words.get(k) and v.get("against") == arms[0].name}
        valid = {k for k, v in same.items() if v.get("ratio") or v.get("failed_at", 0) >= started}
        new = [arm for arm in arms if arm.name not in valid]
        group = [arms[0], *[a for a in new if a is not arms[0]]] if new else []
        turns, about = defaultdict(list), defaultdict(dict)
        for i, arm in [(i, arm) for i in range(rounds) for arm in group]:
            if "error" in about[arm.name]:
                continue
            print(f"timing {arm.name}, round {i + 1} of {rounds}", flush=True)
            run = state / "timing" / f"{arm.name}-{i}"
            shutil.rmtree(run, ignore_errors=True)
            command = [*pretrain(arm, run), *data_flags(cfg), *arm.words, *few]
            command += ["--masking", f"constant:{mean_masking_rate(arm.cfg.masking):.4f}"]
            command += ["--eval_tokens", str(max(8192, arm.cfg.seq_len))]
            error, log = call(command, state / f"timing-{arm.name}.log", lock), read_log(run / "log.jsonl")
            speeds = [r["tok_per_s"] for r in log if r.get("type") == "train"][1:]  # the first has the start in it
            if error or not speeds:
                about[arm.name] = {"error": error or "no speed: too few --timing_steps", "failed_at": time.time()}
                continue
            turns[arm.name].append(median(speeds))
            header = next(r for r in log if r.get("type") == "header")
            about[arm.name] = {k: header.get(k) for k in ("flops_per_token", "n_params", "device", "revision")}
        shutil.rmtree(state / "timing", ignore_errors=True)
        for arm in new:
            if cfg.equal == "time" and "error" not in about[arm.name] and not turns[arms[0].name]:
                about[arm.name] = {"error": f"{arms[0].name} could not be timed beside it", "failed_at": time.time()}
            known[arm.name] = about[arm.name] | {"words": words[arm.name], "against": arms[0].name}
            if "error" not in about[arm.name]:
                ratios = [a / b for a, b in zip(turns[arm.name], turns[arms[0].name])]
                known[arm.name] |= {"tok_per_s": turns[arm.name], "ratio": median(ratios) if ratios else None}
        write_atomically(path, to_json(known))
    return {arm.name: known[arm.name] for arm in arms}


def work(jobs: list[Job], state: Path, started: float) -> dict[str, str]:
    """Takes jobs until all are done or have failed, whoever runs them. Returns {job: its error}."""
    waiting, failed = {job.name: job for job in jobs}, {}

    def settled(job: Job) -> bool:
        mark = read_json(state / f"{job.name}.json")
        if mark.get("failed_at", 0) >= started:
            failed[job.name] = mark["error"]
        elif job.after in failed:
            failed[job.name] = f"not run, as {job.after} failed"
        if job.name in failed or "error" in mark or mark.get("command") != job.command[1:]:
            return job.name in failed
        if not job.tokens:
            return mark.get("of") == progress(job.run)  # not of a run that has been trained anew since
        finished = bool(progress(job.run).get("finished"))
        if finished and (differ := other_settings(job)):
            failed[job.name] = f"{job.run} was trained with other settings ({differ}); delete it or give another --name"
        return finished

    while waiting:
        before = len(waiting)
        for job in list(waiting.values()):
            if not settled(job):
                if job.after in waiting or not (lock := claim(state / f"{job.name}.lock")):
                    continue
                with lock:
                    if not settled(job):  # another worker may have done it between the two looks
                        began = time.time()
                        error = call(job.command, state / f"{job.name}.log", lock)
                        if not error and job.tokens and not progress(job.run).get("finished"):
                            error = "stopped before its end"
                        seconds = round(time.time() - began, 1)
                        mark = {"error": error, "failed_at": time.time()} if error else {"seconds": seconds}
                        mark |= {} if job.tokens else {"of": progress(job.run)}
                        write_atomically(state / f"{job.name}.json", to_json(mark | {"command": job.command[1:]}))
                        n = len(jobs) - len(waiting) + 1
                        print(f"{n}/{len(jobs)} {job.name}: {error or f'{seconds:,.0f} s'}", flush=True)
                    settled(job)
            del waiting[job.name]
        if len(waiting) == before:
            time.sleep(1)  # what is left is being run by others
    return failed


# ----------------------------------------------------------------------------- results


def collect(cfg: Config, jobs: list[Job]) -> list[dict]:
    """A row for each finished run and metric. value: loss in nats per masked token of held-out text; accuracy and
    the tasks fine-tuned as asked for now, as shares of 1, the mean of `values`, one for each fine-tuning seed."""
    rows, asked = [], {shlex.join(["finetune_glue.py", *job.command[2:]]) for job in jobs if not job.tokens}
    corpora = {}
    for job in [job for job in jobs if job.tokens]:
        done, log = progress(job.run), read_log(job.run / "log.jsonl")
        header = next((r for r in reversed(log) if r.get("type") == "header"), {})
        held_out = [r for r in log if r.get("type") == "eval" and r.get("step") == done.get("step")]
        if not (done.get("finished") and header and held_out):
            continue
        corpora[str(read_json(job.run / "config.json").get("train", {}).get("corpus"))] = job.run
        row = {"type": "sweep", "run": job.name, "arm": job.arm.name, "preset": job.arm.preset}
        row |= {"variant": job.arm.variant, "seed": job.seed, "budget": job.budget, "equal": cfg.equal}
        row |= {k: done.get(k) for k in ("step", "tokens", "train_seconds", "gpu_seconds", "dollars")}
        row |= {k: header.get(k) for k in ("family", "device", "world_size", "n_params", "revision", "command")}
        row["flops"] = header["flops_per_token"] * done["tokens"]
        if job.arm.measure == jobs[0].arm.measure:  # losses on other text are not comparable
            rows += [row | {"metric": m, "value": held_out[-1][m]} for m in ("loss", "accuracy")]
        for path in sorted(job.run.glob("glue/*.jsonl")) if asked else ():
            found = [r for r in read_jsonl(path)[0] if r["step"] == done["step"] and r.get("command") in asked]
            if last := {r["seed"]: r for r in found}:
                scores, one = [r["score"] for r in last.values()], next(iter(last.values()))
                more = {"majority": one.get("majority"), "measures": list(one.get("metrics", {}))}
                rows.append(row | {"metric": one["task"], "value": mean(scores), "values": scores} | more)
    if len(corpora) > 1:
        (first, second, *_) = corpora.values()
        raise SystemExit(f"error: {first} and {second} were trained on different corpora of one name; delete one")
    return rows


# ----------------------------------------------------------------------------- main


def announce(cfg: Config, jobs: list[Job], speeds: dict[str, dict], state: Path, workers: int) -> None:
    """Print how much there is to do and how long it will take; with --dry_run every job too. A fine-tuning takes as
    long as those before; evaluation while pretraining is not in the estimate."""
    done = {job.name: read_json(state / f"{job.name}.json").get("seconds") for job in jobs}
    tuned, left = [done[job.name] for job in jobs if not job.tokens and done[job.name]], []
    for job in jobs:
        seconds = job.tokens / median(speeds[job.arm.name]["tok_per_s"]) if job.tokens else median(tuned or [0])
        if done[job.name] is None:
            left.append(seconds)
        if cfg.dry_run:
            text = "done" if done[job.name] is not None else f"{seconds:,.0f} s" if seconds else "not timed yet"
            print(f"{job.name} ({text}): {shlex.join(job.command[1:])}")
    more = f", and {left.count(0)} fine-tunings that were not timed yet" * bool(left.count(0))
    hours = f"{sum(left) / workers / 3600:.2f} hours without evaluation"
    print(f"{len(left)} of {len(jobs)} jobs to do, about {hours}{more}", flush=True)


def sweep(cfg: Config) -> int:
    """Run or continue a sweep; returns the exit code. SystemExit (one line) for bad input."""
    rank, workers = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    started = time.time()  # what failed before is tried again
    if fcntl is None:
        raise SystemExit("error: sweep.py needs the file locks of Linux and macOS; on Windows run it in WSL")
    if not re.fullmatch(r"\w[\w.-]*", cfg.name):
        raise SystemExit(f"error: --name {cfg.name!r} names folders: use letters, digits, . _ and -")
    arms, state = make_arms(cfg), Path(cfg.out, cfg.name, ".jobs")
    tuned: list[str] = []
    for flags in cfg.finetune:
        asked = read_command_line(finetune_glue.Config, ["run", *words_of(flags, "--finetune")])
        try:
            tuned += [task.name for task in finetune_glue.pick_tasks(asked)]
        except ValueError as e:
            raise SystemExit(f"error: --finetune: {e}") from None
    if twice := {task for task in tuned if tuned.count(task) > 1}:
        raise SystemExit(f"error: two --finetune are for {min(twice)}; their scores would be mixed")
    if len({arm.measure for arm in arms}) > 1 and not cfg.finetune:
        raise SystemExit("error: with other --seq_len or --eval_tokens losses are on other text; add --finetune")
    now = json.loads(json.dumps({k: getattr(cfg, k) for k in FIXED}))
    if cfg.equal == "time":
        now["first preset"] = cfg.presets[0]
    if cfg.equal == "tokens":  # the same for all arms: whole steps of each; what cannot be is refused here
        now["tokens"] = [*tokens_of_budgets(cfg, arms, {})[arms[0].name].values()]
    folder = Path(cfg.results, cfg.name)
    state.mkdir(parents=True, exist_ok=True)
    with claim(state / "sweep.lock", wait=True):
        old = read_json(state / "sweep.json")
        if differ := "; ".join(f"{'--' * (k in FIXED)}{k} {v} -> {now[k]}" for k, v in old.items() if now.get(k) != v):
            raise SystemExit(f"error: {state.parent} holds a sweep with {differ}; give this one another --name")
        if not old and (folder / "records.jsonl").exists():
            raise SystemExit(f"error: {folder} holds results of other runs than in {state.parent}; give another --name")
        if not cfg.dry_run:
            write_atomically(state / "sweep.json", to_json(now))
    speeds = measure_speeds(cfg, arms, state, started)
    failed = {f"timing {name}": s["error"] for name, s in speeds.items() if "error" in s}
    if f"timing {arms[0].name}" in failed and cfg.equal == "time":
        raise SystemExit(f"error: the first preset cannot be timed: {failed[f'timing {arms[0].name}']}")
    runnable = [arm for arm in arms if "error" not in speeds[arm.name]]
    # equal tokens come from the steps of all arms, so that one that fails today changes nothing for the others
    tokens = tokens_of_budgets(cfg, arms if cfg.equal == "tokens" else runnable, speeds)
    jobs = make_jobs(cfg, runnable, tokens)
    if rank == 0:
        announce(cfg, jobs, speeds, state, workers)
    if cfg.dry_run:
        return int(bool(failed))
    failed |= work(jobs, state, started)
    if rank:
        return 0
    rows = collect(cfg, jobs)
    if rows:
        folder.mkdir(parents=True, exist_ok=True)
        keep = ("tok_per_s", "ratio", "flops_per_token", "n_params", "device", "revision")
        timed = [(arm.name, s) for arm in arms if "error" not in (s := speeds[arm.name])]
        rows = [*[{"type": "speed", "arm": name} | {k: s[k] for k in keep} for name, s in timed], *rows]
        write_atomically(folder / "records.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode())
        report = leaderboard(rows, failed, cfg.name, shlex.join(["python", "sweep.py", *sys.argv[1:]]))
        write_atomically(folder / "leaderboard.md", report.encode())
        print(f"\n{report}\nwritten: {folder}/leaderboard.md, {folder}/records.jsonl")
    for job, error in failed.items():
        print(f"failed: {job}: {error}", file=sys.stderr)
    return int(bool(failed))


def main() -> None:
    """Command line: presets first, then any setting."""

    def stop(signum, frame):
        raise KeyboardInterrupt

    cfg = read_command_line(Config, about=__doc__)
    signal.signal(signal.SIGTERM, stop)
    try:
        raise SystemExit(sweep(cfg))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command continues") from None
    except OSError as e:
        raise SystemExit(f"error: {e.filename or 'a file'}: {e.strerror}") from None


if __name__ == "__main__":
    main()
