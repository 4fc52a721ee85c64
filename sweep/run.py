"""Pretrain, cool down, fine-tune each preset × variant × seed × budget; rank; test what beats what.

    python -m sweep.run mosaic-tiny bert-tiny --name shapes --data data/docstrings \\
        --budgets 2e6 4e6 8e6 --flags="--seq_len 32" --finetune="--task RTE,CoLA --seeds 1,2"
    python -m sweep.run mosaic-tiny --name change --data data/docstrings --budgets 4e6 \\
        --vary adamw:optimizer=adamw,lr=2e-3 nobias:model.bias=False  # an ablation, equal tokens
    python -m sweep.run ... --name change-time --speeds_of results/change  # and at equal time
    python -m sweep.run ... --workers 8       # at a time, each on a GPU of its own where there are

One stem is trained for each preset, variant and seed, as long as the largest budget (--schedule
wsd); for every smaller budget a cool-down branches off it, so budgets of 1, 2 and 4 cost 4.6 and
not 7. Variants with schedule=linear get a run for each budget. Jobs are calls of pretrain.py and
finetune_glue.py, each shown in <out>/<name>/.jobs/. The same command again continues where it was
killed and tries again what failed. Results: results/<name>/leaderboard.md, and records.jsonl for
plots.py pareto and plots.py ablation. Linux and macOS.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import IO, Annotated

import tyro

import recipes
import records
from machine import script
from records import BadInput, make_folder, read_json, read_jsonl, to_json, write_atomically
from sweep.leaderboard import leaderboard, name_of, short

ROOT = Path(__file__).parents[1]
OURS = {"data", "out", "name", "seed", "max_steps", "max_tokens", "max_minutes", "cooldown_from",
        "checkpoint_every"}


@dataclass
class Config:
    """A sweep. Under the same name, presets, seeds, variants and fine-tuning can change later; the
    rest stays, and so do the tokens of a run: a variant with another batch may need another."""

    presets: tyro.conf.Positional[tuple[str, ...]]  # of pretrain.py
    name: str = "sweep"  # of the folders in `out` and `results`
    data: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # as pretrain.py's
    seeds: tuple[int, ...] = (1, 2, 3)  # of pretraining: batches, masks and initial weights
    budgets: tuple[float, ...] = (2e6, 4e6, 8e6)  # tokens of a run
    # folder of a sweep's results: at equal time, each variant gets the tokens that it gets through
    # while the first preset sees the budget, by its speed there; without it, at equal tokens
    speeds_of: str = ""
    vary: tuple[str, ...] = ()  # variants of every preset: NAME:flag=value,flag=value
    flags: str = ""  # of every pretrain.py, in quotes
    # flags of a finetune_glue.py for every run, in quotes; none: held-out loss only. Several run
    # one after the other: --finetune="--task SST-2 --epochs 1" --finetune="--task CoLA,RTE"
    finetune: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    workers: int = 1  # jobs at a time
    out: str = "runs"
    results: str = "results"
    dry_run: bool = False  # print the jobs and stop


@dataclass
class Variant:
    """What is compared: a preset as it is, or with other settings."""

    name: str  # "mosaic-tiny", "mosaic-tiny+adamw"
    preset: str
    change: str  # "adamw"; "" for the preset as it is
    flags: list[str]  # of its pretrain.py
    cfg: recipes.TrainConfig
    stem: Fraction  # share of a run before smaller budgets branch off; 1 where none does


@dataclass
class Job:
    """One call of a script: pretraining, or the fine-tuning of what it made."""

    name: str
    command: list[str]
    run: Path
    variant: Variant
    seed: int
    budget: float
    after: str  # name of the job that has to be finished before; "": none
    pretrains: bool = True  # else it fine-tunes

    def mark(self, state: Path) -> Path:
        """The file that is there when it has finished, named by its command and settings; of a
        fine-tuning by the run that it starts from."""
        of = self.variant.cfg if self.pretrains else progress(self.run)
        return state / f"{self.name}-{zlib.crc32(repr((self.command[1:], of)).encode()):08x}"

    def is_finished(self, state: Path) -> bool:
        return self.mark(state).exists() and bool(progress(self.run).get("finished"))


def read_variant(text: str) -> tuple[str, list[str]]:
    """ "adamw:optimizer=adamw,lr=2e-3" -> its name and its flags."""
    name, colon, pairs = text.partition(":")
    parts, flags = [pair.partition("=") for pair in pairs.split(",")], []
    if not (re.fullmatch(r"[\w.-]+", name) and colon and all(key and eq for key, eq, _ in parts)):
        raise BadInput(f"--vary {text}: write NAME:flag=value,flag=value, as in "
                       "adamw:optimizer=adamw,lr=2e-3")
    for key, _, value in parts:
        off = "--" + re.sub(r"(\w+)$", r"no_\1", key)
        flags += {"True": [f"--{key}"], "False": [off]}.get(value, [f"--{key}", *value.split()])
    return name, flags


def make_variants(cfg: Config) -> list[Variant]:
    """Each preset as it is, then its variants. BadInput for impossible settings."""
    presets, variants = recipes.make_presets(), []
    if unknown := set(cfg.presets) - presets.keys():
        raise BadInput(f"no preset {min(unknown)}; choose from {', '.join(presets)}")
    if not (cfg.presets and cfg.seeds and cfg.budgets):
        raise BadInput("a sweep needs at least one preset, one seed and one budget")
    for preset, (change, own) in product(cfg.presets, [("", []), *map(read_variant, cfg.vary)]):
        flags = ["--schedule", "wsd", *shlex.split(cfg.flags), *own]  # of two the last counts
        given = [flag[2:].partition("=")[0] for flag in flags if flag[:2] == "--"]
        if taken := OURS & {flag.replace("-", "_") for flag in given}:
            raise BadInput(f"--{min(taken)} is set by the sweep; leave it out")
        config = tyro.extras.overridable_config_cli(presets, args=[preset, *flags],
                                                    use_underscores=True)
        recipes.check_config(config, 1)
        branches = config.schedule == "wsd" and len(cfg.budgets) > 1
        stem = 1 - Fraction(config.cooldown * branches).limit_denominator(100)
        name = preset + f"+{change}" * bool(change)
        variants.append(Variant(name, preset, change, flags, config, stem))
    if len({v.name for v in variants}) < len(variants):
        raise BadInput("two presets or two variants have the same name")
    if len({(v.cfg.seq_len, v.cfg.eval_tokens) for v in variants}) > 1:
        raise BadInput("with other --seq_len or --eval_tokens losses are on other text; "
                       "give such variants a sweep of their own")
    return variants


def measured_ratios(cfg: Config, variants: list[Variant]) -> dict[str, float]:
    """{variant: its tokens a second over those of the first preset} in the sweep of --speeds_of,
    {} without one: medians over the runs of one seed and budget, trained one after the other."""
    speeds, ratios = defaultdict(dict), {}
    if not cfg.speeds_of:
        return ratios
    for r in records.read_sweep(Path(cfg.speeds_of, "records.jsonl")):
        speeds[name_of(r)][r["seed"], r["budget"]] = r["tokens"] / r["train_seconds"]
    for name in [v.name for v in variants]:
        own, first = speeds[name], speeds[variants[0].name]
        if not (both := own.keys() & first.keys()):
            raise BadInput(f"--speeds_of {cfg.speeds_of}: no run of {name} with a seed "
                           f"and budget of {variants[0].name}")
        ratios[name] = median(own[run] / first[run] for run in both)
    return ratios


def tokens_of_budgets(cfg: Config, variants: list[Variant],
                      ratios: dict[str, float]) -> dict[str, dict[float, int]]:
    """{variant: {budget: tokens}}; at equal time their number follows the `ratios` of speeds, which
    are empty at equal tokens. Budgets are whole multiples of a unit, and the unit is rounded to
    whole steps on both sides of the branching point, so that each branches off a checkpoint
    exactly; at equal tokens, to the same number for all. BadInput where that would change a budget
    by more than 5 %."""
    if any(b != int(b) or b < 1 for b in cfg.budgets) or len(set(cfg.budgets)) < len(cfg.budgets):
        raise BadInput("--budgets: give different whole numbers, as in 2e6 4e6 8e6")
    unit, tokens = math.gcd(*map(int, cfg.budgets)), {}
    grains = {v.name: v.cfg.batch_tokens * v.stem.denominator for v in variants}
    if not ratios:
        grains = dict.fromkeys(grains, math.lcm(*grains.values()))
    for v in variants:
        if min(cfg.budgets) * v.stem < v.cfg.warmup * max(cfg.budgets) * (v.stem < 1):
            raise BadInput(f"{v.name}: the smallest budget would branch off in the warm-"
                           "up of the largest one's run; choose closer budgets")
        grain, wanted = grains[v.name], unit * ratios.get(v.name, 1)
        n = round(wanted / grain)
        if abs(n * grain - wanted) > 0.05 * wanted:
            raise BadInput(f"{v.name}: the budgets' unit of {wanted:,.0f} tokens is not a "
                           "whole number of steps on both sides of the branching point; choose "
                           f"budgets in multiples of {grain:,} tokens, or larger ones")
        tokens[v.name] = {b: int(b) // unit * n * grain for b in cfg.budgets}
    return tokens


def make_jobs(cfg: Config, variants: list[Variant],
              tokens: dict[str, dict[float, int]]) -> list[Job]:
    """The jobs in the order to run them, seed by seed; a stem before its branches, a model before
    its fine-tuning. tokens: as from tokens_of_budgets."""
    jobs, data = [], [word for folder in cfg.data for word in ("--data", folder)]
    for seed, v in product(cfg.seeds, variants):
        sizes, stem = tokens[v.name], ""
        for budget in sorted(sizes, reverse=True):
            name = f"{v.name}-s{seed}-{short(budget)}"
            run = Path(cfg.out, cfg.name, name)
            command = [sys.executable, str(ROOT / "pretrain.py"), v.preset]
            command += ["--out", str(run.parent), "--name", name]
            if stem:
                step = int(sizes[budget] * v.stem) // v.cfg.batch_tokens
                checkpoint = run.with_name(stem) / "ckpt" / f"step_{step:08d}"
                command += ["--cooldown_from", str(checkpoint)]
            else:
                steps = math.gcd(*sizes.values()) * v.stem / v.cfg.batch_tokens
                every = str(int(steps) if v.stem < 1 else 0.25)
                command += [*data, "--max_tokens", str(sizes[budget]), "--seed", str(seed)]
                command += ["--checkpoint_every", every, *v.flags]
            jobs.append(Job(name, command, run, v, seed, budget, after=stem))
            stem = stem or name * (v.stem < 1)
            for i, flags in enumerate(cfg.finetune, 1):
                script = [sys.executable, str(ROOT / "finetune_glue.py"), str(run)]
                jobs.append(Job(f"{name}-finetune" + f"-{i}" * (i > 1),
                                script + shlex.split(flags), run, v, seed, budget,
                                after=jobs[-1].name, pretrains=False))
    return jobs


def progress(run: Path) -> dict:
    """progress.json of the last checkpoint of a run; {} before there is one."""
    found = max(run.glob("ckpt/step_????????/progress.json"), default=None)
    return read_json(found) if found else {}


def start(command: list[str], output: Path, lock: IO, worker: int) -> subprocess.Popen:
    """Starts a script on the GPU of its worker, if there are GPUs, its output into a file. While it
    runs it holds the sweep's lock, whatever becomes of this process."""
    env = dict(os.environ)
    if not (gpus := env.get("CUDA_VISIBLE_DEVICES", "")) and worker:
        import torch

        gpus = ",".join(map(str, range(torch.cuda.device_count())))
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[worker % len(gpus.split(","))]
    with open(output, "wb") as f:
        return subprocess.Popen(command, stdout=f, stderr=f, env=env, pass_fds=(lock.fileno(),))


def work(jobs: list[Job], state: Path, lock: IO, workers: int) -> dict[str, str]:
    """Runs the jobs that are not finished, `workers` at a time. Returns {job: its error}. A script
    sees itself what of its work is finished, and refuses to go on with other settings."""
    waiting = [job for job in jobs if not job.is_finished(state)]
    running, failed, n = {}, {}, len(jobs) - len(waiting)  # running: worker -> job, process, start
    try:
        while waiting or running:
            for worker in {*range(workers)} - running.keys():
                ahead = {job.name for job in waiting} | {job.name for job, *_ in running.values()}
                if job := next((job for job in waiting if job.after not in ahead), None):
                    waiting.remove(job)
                    if job.after in failed:
                        failed[job.name] = f"not run, as {job.after} failed"
                        continue
                    process = start(job.command, state / f"{job.name}.log", lock, worker)
                    running[worker] = job, process, time.time()
            for worker, (job, process, began) in [*running.items()]:
                if process.poll() is None:
                    continue
                del running[worker]
                n, said = n + 1, f"{time.time() - began:,.0f} s"
                if not process.returncode and progress(job.run).get("finished"):
                    job.mark(state).touch()
                else:  # its last line says why
                    output = (state / f"{job.name}.log").read_text(errors="replace").strip()
                    last = (output or "stopped early").splitlines()[-1][:300]
                    said = failed[job.name] = f"{last} (exit code {process.returncode})"
                print(f"{n}/{len(jobs)} {job.name}: {said}", flush=True)
            time.sleep(0.1)
    finally:  # pretrain.py saves a checkpoint and leaves
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
    return failed


def collect(cfg: Config, jobs: list[Job]) -> list[dict]:
    """A row for each finished run and metric. value: loss in nats per masked token of held-out
    text; accuracy, blimp where studies.blimp has scored the run, and the tasks fine-tuned as asked
    for now, as shares of 1, the mean of `values`, one for each fine-tuning seed."""
    rows = []
    asked = {shlex.join(["finetune_glue.py", *j.command[2:]]) for j in jobs if not j.pretrains}
    for job in [job for job in jobs if job.pretrains]:
        end, (log, _) = progress(job.run), read_jsonl(job.run / "log.jsonl")
        header = next((r for r in reversed(log) if r["type"] == "header"), {})
        held_out = [r for r in log if r["type"] == "eval" and r["step"] == end.get("step")]
        if not (end.get("finished") and header and held_out):
            continue
        row = {"type": "sweep", "run": job.name, "preset": job.variant.preset, "seed": job.seed,
               "variant": job.variant.change, "budget": job.budget,
               "equal": "time" if cfg.speeds_of else "tokens"}
        row |= {k: end[k] for k in ("step", "tokens", "train_seconds", "gpu_seconds", "dollars")}
        about = "family", "device", "world_size", "n_params", "revision", "command"
        row |= {k: header.get(k) for k in about}
        rows += [row | {"metric": m, "value": held_out[-1][m]} for m in ("loss", "accuracy")]
        if grammar := records.read_blimp(job.run).get(end["step"]):
            rows.append(row | {"metric": "blimp", "value": grammar["score"]})
        for path in sorted(job.run.glob("glue/*.jsonl")):
            found = [r for r in read_jsonl(path)[0]
                     if r["step"] == end["step"] and r.get("command") in asked]
            if found:  # of two --finetune for one task the later counts
                last, command = found[-1], found[-1]["command"]
                scores = {r["seed"]: r["score"] for r in found if r["command"] == command}
                values = [*scores.values()]
                rows.append(row | {"metric": last["task"], "value": mean(values), "values": values,
                                   "majority": last["majority"], "measures": [*last["metrics"]]})
    return rows


def check_sweep(cfg: Config, tokens: dict, state: Path, results: Path) -> None:
    """BadInput for what would mix two sweeps under one name."""
    metas = [Path(re.sub(r":[\d.]+$", "", folder), "meta.json") for folder in cfg.data]
    now = {"--data": cfg.data, "--budgets": cfg.budgets, "--flags": cfg.flags,
           "--equal": "time" if cfg.speeds_of else "tokens",
           "corpus": [zlib.crc32(path.read_bytes()) for path in metas if path.is_file()]}
    if cfg.speeds_of:
        now["first preset"] = cfg.presets[0]
    else:  # the same for all
        now["tokens"] = [*next(iter(tokens.values())).values()]
    now, before = json.loads(json.dumps(now)), state / "sweep.json"
    old = read_json(before) if before.is_file() else {}
    if differ := "; ".join(f"{k} {v} -> {now.get(k)}" for k, v in old.items() if now.get(k) != v):
        raise BadInput(f"{state.parent} holds a sweep with {differ}; give this one "
                       "another --name")
    if not old and (results / "records.jsonl").exists():
        raise BadInput(f"{results} holds results of other runs than in {state.parent}; "
                       "give another --name")
    if not cfg.dry_run:
        make_folder(results)
        write_atomically(before, to_json(now))


def sweep(cfg: Config) -> int:
    """Run or continue a sweep; returns the exit code. BadInput for what cannot work."""
    if not cfg.name.strip(".") or Path(cfg.name).name != cfg.name:
        raise BadInput(f"--name {cfg.name!r}: give the name of a folder, without a path")
    try:
        for flags in (cfg.flags, *cfg.finetune):
            shlex.split(flags)
    except ValueError as e:
        raise BadInput(f"--flags or --finetune: {e}") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a KeyboardInterrupt
    variants, results = make_variants(cfg), Path(cfg.results, cfg.name)
    tokens = tokens_of_budgets(cfg, variants, measured_ratios(cfg, variants))
    state = Path(cfg.out, cfg.name, ".jobs")
    if cfg.workers > 1:  # else each would take all cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // cfg.workers)))
    make_folder(state)
    lock = records.lock(state / "lock", wait=True)  # for the scripts of a sweep that was killed
    check_sweep(cfg, tokens, state, results)
    jobs = make_jobs(cfg, variants, tokens)
    left = [job for job in jobs if not job.is_finished(state)]
    print(f"{len(left)} of {len(jobs)} jobs to do", flush=True)
    if cfg.dry_run:
        print(*[f"{job.name}: {shlex.join(job.command[1:])}" for job in left], sep="\n")
        return 0
    failed = work(jobs, state, lock, max(cfg.workers, 1))
    if rows := collect(cfg, jobs):
        lines = "".join(json.dumps(r) + "\n" for r in rows)
        write_atomically(results / "records.jsonl", lines.encode())
        command = shlex.join(["python", "-m", "sweep.run", *sys.argv[1:]])
        report = leaderboard(rows, failed, cfg.name, command)
        write_atomically(results / "leaderboard.md", report.encode())
        print(f"\n{report}\nwritten: {results}/leaderboard.md, {results}/records.jsonl")
    for job, error in failed.items():
        print(f"failed: {job}: {error}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(script(sweep, Config, resumes=True)())
