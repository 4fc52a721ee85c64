"""Fine-tune encoders on GLUE, or on a labelled file of your own, and print the table.

    python finetune_glue.py runs/mosaic-base                             # eight tasks from the hub
    python finetune_glue.py runs/mosaic-base --task RTE,CoLA --glue_dir glue_data  # official files
    python finetune_glue.py runs/a runs/b --task SST-2 --checkpoints all --from_scratch
    python finetune_glue.py runs/a --task spam/train.tsv --eval spam/dev.tsv --predict new.tsv
    python finetune_glue.py runs/a --task train.conllu --eval dev.conllu --column upos --save
    torchrun --nproc_per_node 8 finetune_glue.py runs/mosaic-base        # 8 workers, one queue

A start is a run folder (its latest checkpoint), a checkpoint, a folder with official MosaicBERT or
Hugging Face BERT weights and their tokenizer.json, or with --hf any encoder that transformers
knows. Each finished job (start, task, seed) is a line of <run>/glue/<task>.jsonl; the same command
again does what is missing and prints the table. RTE, MRPC and STS-B begin from the start's own MNLI
model if there is one. glue/files.py says what a file of your own may look like.

Expect: published 8-task means on the dev sets are 84.3 for MosaicBERT-Base after 70,000 steps on
C4, 83.5 for BERT-Base (Portes et al. 2023): the last evaluation, mean of metrics, seeds, tasks.
"""

import itertools
import json
import math
import os
import shlex
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn
from tqdm import tqdm

from glue.encode import Encoded, encode
from glue.files import Data, Source, Split, load_data, locate, read_split
from glue.starts import Start, find_starts
from glue.table import append_record, identity, table
from glue.tasks import FROM_MNLI, OWN, PAIR, SANE, SEEDS, TASKS, Recipe, Task, evaluate
from kernels import attention_backend
from machine import device_name, git_revision, pick_device, pick_dtype, processes, script
from model import SequenceClassifier, TokenClassifier
from records import make_folder, read_json, read_jsonl, to_json, write_atomically

SAVE_EVERY = 60  # seconds of training that a kill may cost, and the rest of an epoch


@dataclass
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # run folders, or folders with weights
    checkpoints: Literal["latest", "all"] = "latest"  # of a run folder; one: give its own folder
    from_scratch: bool = False  # also start from random weights: what is pretraining worth?
    hf: str = ""  # also these transformers encoders (folder or hub name, comma separated)

    task: str = ""  # GLUE names, comma separated, default all; or the training file of your own
    eval: str = ""  # your own task: the file to evaluate on
    task_name: str = ""  # its name in records and plots; default: that of its file or folder
    text_columns: str = ""  # one or two; default sentence1,sentence2, sentence, or words
    label_column: Annotated[str, tyro.conf.arg(aliases=["--column"])] = ""  # default label, labels
    regression: bool = False  # the label is a number: loss MSE, metrics Spearman and Pearson
    predict: str = ""  # rows to label with the fine-tuned models; in <run>/glue/predictions
    save: bool = False  # keep the models, for `python -m export.huggingface`, in <run>/glue/models
    out: str = ""  # results go to <out>/<run>/glue; default: into the run folders
    glue_dir: str = ""  # folder with <task>/train.tsv and dev.tsv; default: nyu-mll/glue of the hub

    recipe: Literal["mosaic", "sane"] = "mosaic"  # upstream's table, or one recipe for all tasks
    lr: float | None = None  # this and the next four override the recipe
    weight_decay: float | None = None  # torch's; upstream's decoupled value is this times lr
    epochs: int | None = None
    batch_size: int | None = None  # examples
    seeds: str = ""  # comma separated
    dropout: float | None = None  # of embeddings, layers, classifier; default: the checkpoint's
    max_len: int = 256  # tokens with [CLS] and [SEP]; the longer of two texts is cut first
    no_mnli_start: bool = False  # RTE, MRPC and STS-B start from the checkpoint like the others

    compile: Literal["auto", "on", "off"] = "auto"  # auto: on for CUDA
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bf16 where the hardware has it
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def fine_tune(model: nn.Module, examples: Encoded, y: np.ndarray, recipe: Recipe, seed: int,
              dtype: torch.dtype, evaluate: Callable[[], dict], title="", bar=False,
              state: Path | None = None) -> tuple[list[dict], float]:
    """Fine-tune `model` in place. Returns the loss and what evaluate() says after each epoch, and
    the seconds it took.

    y: for each example or word an int64 class (cross entropy) or a float32 value (MSE).
    AdamW(0.9, 0.98), 6 % linear warm-up then linear to 0, decay on every parameter, all as
    upstream; unlike upstream, examples are shuffled anew in every epoch, from `seed`. state: file
    with a long job's last epoch, from which it goes on as if never stopped. ValueError when the
    loss is not finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), eps=1e-6,
                                  weight_decay=recipe.weight_decay, fused=device.type != "mps")
    n, history, began = len(examples.first), [], time.perf_counter()
    steps = math.ceil(n / recipe.batch_size) * recipe.epochs
    warmup = max(1, round(0.06 * steps))
    if state and state.is_file():
        history, seconds = load_state(state, model, optimizer)
        began -= seconds
    last_save, step = time.perf_counter(), len(history) * (steps // recipe.epochs)
    for epoch in range(len(history) + 1, recipe.epochs + 1):
        total = torch.zeros((), device=device)
        model.train()
        order = np.random.default_rng([seed, epoch]).permutation(n)
        batches = np.array_split(order, range(recipe.batch_size, n, recipe.batch_size))
        for index in tqdm(batches, f"{title}, epoch {epoch}", leave=False, disable=not bar):
            scale = (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)
            optimizer.param_groups[0]["lr"] = recipe.lr * scale
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(**examples.batch(index, device)).float()  # (B or T, n_labels)
            at = examples.labels(index)
            target = torch.from_numpy(np.where(at < 0, -100, y[at])).to(device)  # -100: no loss
            loss = F.mse_loss(logits[:, 0], target) if target.is_floating_point() else (
                F.cross_entropy(logits, target))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()  # read once an epoch: reading it every step waits for the GPU
            step += 1
        if not math.isfinite(mean := total.item() / len(batches)):
            raise ValueError(f"{title}: the loss is {mean} in epoch {epoch}; lower --lr")
        history.append({"epoch": epoch, "loss": round(mean, 5), **evaluate()})
        if state and epoch < recipe.epochs and time.perf_counter() - last_save > SAVE_EVERY:
            save_state(state, model, optimizer, history, time.perf_counter() - began)
            last_save, score = time.perf_counter(), 100 * history[-1]["score"]
            print(f"{title}: epoch {epoch}, loss {mean:.3f}, score {score:.1f}", flush=True)
    return history, round(time.perf_counter() - began, 3)


def save_state(path: Path, model: nn.Module, optimizer, history: list, seconds: float) -> None:
    """All that the next epoch depends on, written whole or not at all."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history,
             "seconds": seconds,
             "random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_state(path: Path, model: nn.Module, optimizer) -> tuple[list, float]:
    """What save_state() wrote; returns the history and the seconds it took."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"][0])
    torch.cuda.set_rng_state_all(state["random"][1:])
    return state["history"], state["seconds"]


@torch.no_grad()
def predict(model: nn.Module, data: Encoded, dtype: torch.dtype) -> np.ndarray:
    """Logits (n, n_labels) float32 of each example, or of each word (NaN: it was cut off), in their
    order; batches of like lengths, 16,384 tokens each."""
    model.eval()
    device = next(model.parameters()).device
    lengths = np.diff(data.starts)
    order = np.argsort(lengths, kind="stable")
    cuts = np.flatnonzero(np.diff(lengths[order].cumsum() // 16_384)) + 1
    parts = np.split(order, cuts)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = torch.cat([model(**data.batch(i, device)).float() for i in parts]).cpu().numpy()
    at = np.concatenate([data.labels(i) for i in parts])
    found = np.full((data.n_labels, logits.shape[1]), np.nan, np.float32)
    found[at[at >= 0]] = logits[at >= 0]
    return found


def build_model(start: Start, task: Task, dropout: float | None, seed: int) -> nn.Module:
    """A classifier of texts or words on the start's weights; its last layer is new."""
    n_labels = len(task.labels) or 1
    torch.manual_seed(seed)
    if start.foreign:
        from glue.hf_encoder import HFClassifier

        return HFClassifier(start.folder, n_labels, dropout, not start.fresh, task.words)
    head = TokenClassifier if task.words else SequenceClassifier
    kinds = ("embedding", "output", "mlp", "classifier") if dropout is not None else ()
    overrides = {f"{kind}_dropout": dropout for kind in kinds}
    model = head.from_pretrained(start.folder, n_labels=n_labels, **overrides)
    if start.fresh:
        torch.manual_seed(seed)
        return head(model.cfg, n_labels)
    if "classifier.weight" not in model.new_keys:  # its old classes mean nothing here
        nn.init.normal_(model.classifier.weight, std=0.02)
        nn.init.zeros_(model.classifier.bias)
    return model


@dataclass
class Job:
    """One fine-tuning: a start, a task, a seed."""

    start: Start
    data: Data
    recipe: Recipe
    record: dict[str, Any]  # what is known before it runs
    outputs: dict[Path, Split]  # rows to predict, and where to
    keep: Path | None  # where its model is kept, MNLI's for RTE, MRPC and STS-B

    @property
    def path(self) -> Path:
        return self.start.out / f"{self.data.task.name}.jsonl"

    def finished(self) -> dict[str, Any] | None:
        """The job's record, if it has run and what it left for others is still there."""
        asked, mine = self.record["predictions"], identity(self.record)
        there = all(path.is_file() for path in self.outputs)
        if not there or (self.keep and made_by(self.keep) != mine):
            return None
        return next((r for r in reversed(read_jsonl(self.path)[0]) if identity(r) == mine
                     and asked.items() <= r.get("predictions", {}).items()), None)


def made_by(weights: Path) -> str:
    """Identity of the job whose fine-tuned weights are kept in a folder, "" for none."""
    return (weights / "job.json").read_text() if (weights / "job.json").is_file() else ""


def make_jobs(cfg: Config, starts: list[Start], data: dict[str, Data], about: dict) -> list[Job]:
    """Every start x task x seed, the longest first. What can start from an MNLI model does, if it
    is there by now."""
    jobs, to_predict = [], {}  # file -> rows; "*" stands for task, checkpoint and seed
    names = ("lr", "weight_decay", "epochs", "batch_size")
    given = {k: v for k in names if (v := getattr(cfg, k)) is not None}
    for d in data.values():
        to_predict |= {"*": d.devs["dev"]} if cfg.eval else {}
        if cfg.predict:
            rows = read_split(Path(cfg.predict), d.task, labelled=False)
            to_predict[f"*_{Path(cfg.predict).stem}"] = rows
    for start, (name, d) in itertools.product(starts, data.items()):
        recipe = replace(SANE if cfg.recipe == "sane" else d.task.recipe, **given)
        seeds = list(map(int, cfg.seeds.split(","))) if cfg.seeds else SEEDS[: recipe.n_seeds]
        settings = {k: getattr(recipe, k) for k in names} | {"start": "checkpoint"}
        settings |= {k: getattr(cfg, k) for k in ("max_len", "dropout", "dtype")}
        place, begin = Path(start.checkpoint).name, start
        mnli = start.out / "mnli" / place
        if name in FROM_MNLI and not cfg.no_mnli_start and (by := made_by(mnli)) and (
                json.loads(by)["weights"] == start.weights):  # not an older run's of this name
            begin = replace(start, folder=mnli, fresh=False)
            settings["start"] = f"MNLI {zlib.crc32(by.encode()):08x}"
        for seed in dict.fromkeys(seeds):
            stem, kind = f"{name}_{place}_seed{seed}", ".conll" if d.task.words else ".tsv"
            outputs = {start.out / "predictions" / (file.replace("*", stem) + kind): rows
                       for file, rows in to_predict.items()}
            record = {"type": "glue", "run": start.run, "checkpoint": start.checkpoint,
                      "weights": start.weights, **start.facts, **about, "task": name,
                      "seed": seed, "recipe": settings, **d.facts, "predictions":
                      {path.name: f"{rows.digest():08x}" for path, rows in outputs.items()}}
            keep = start.out / "models" / stem if cfg.save else None
            if name == "MNLI" and seed == seeds[0] and not cfg.no_mnli_start:
                keep = mnli
            jobs.append(Job(begin, d, recipe, record, outputs, keep))
    return sorted(jobs, key=lambda job: -job.record["n_train"] * job.recipe.epochs)


def run_job(job: Job, cfg: Config, device: torch.device, dtype: torch.dtype, bar: bool) -> None:
    """Load, tokenise, fine-tune, predict, write the record. bar: show progress."""
    task, y, start, seed = job.data.task, job.data.y, job.start, job.record["seed"]
    model = build_model(start, task, cfg.dropout, seed).to(device)
    if cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda"):
        # Once for all jobs of a process. Two graphs for each shape of encoder and number of
        # classes: after the default of 8 it would run eagerly.
        torch._dynamo.config.recompile_limit = 64
        model.compile(dynamic=True)
    max_len, commonest = cfg.max_len, 0 if task.regression else np.bincount(y["train"]).argmax()
    if start.foreign or model.cfg.position == "learned":
        max_len = min(max_len, model.n_positions if start.foreign else model.cfg.max_positions)
    if task.regression:  # from 0 the first epoch would be spent on finding the mean
        head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        nn.init.constant_(head.bias, y["train"].mean())

    def encoded(split: Split) -> Encoded:
        key, cache = (zlib.crc32(start.tokenizer.vocabulary), max_len), split.encoded
        if key not in cache:
            cache[key] = encode(split, start.tokenizer, max_len)
            if n := cache[key].n_cut:
                beyond = f"; words beyond are {task.labels[commonest]}" if task.words else ""
                print(f"{split.where}: {n:,} of {len(split.lines):,} texts are cut at the "
                      f"{max_len} tokens of {start.name}{beyond}", flush=True)
        return cache[key]

    def answers(split: Split) -> np.ndarray:
        """(n,) values, or classes: a word that was cut off has the commonest."""
        logits = predict(model, encoded(split), dtype)
        classes = np.where(np.isnan(logits[:, 0]), commonest, logits.argmax(1))
        return logits[:, 0] if task.regression else classes

    def evaluate_devs() -> dict:
        return evaluate(task, y, {name: answers(dev) for name, dev in job.data.devs.items()},
                        {name: dev.lengths for name, dev in job.data.devs.items()})

    title, mine = f"{task.name} · {start.name} · seed {seed}", identity(job.record)
    state = job.path.with_name(f".{task.name}-{zlib.crc32(mine.encode()):08x}.pt")
    history, seconds = fine_tune(model, encoded(job.data.train), y["train"], job.recipe, seed,
                                 dtype, evaluate_devs, title, bar, state)
    for path, rows in job.outputs.items():
        write_predictions(path, task, rows, answers(rows))
    if job.keep and made_by(job.keep) != mine:  # else others may be reading it
        (job.keep / "job.json").unlink(missing_ok=True)
        model.save_pretrained(job.keep)
        start.tokenizer.save(job.keep)
        labels = {"id2label": dict(enumerate(task.labels))}
        config = read_json(job.keep / "config.json") | labels
        write_atomically(job.keep / "config.json", to_json(config))
        write_atomically(job.keep / "job.json", mine.encode())
    metrics = {k: v for k, v in history[-1].items() if k not in ("epoch", "loss", "score")}
    append_record(job.path, job.record | {
        "metrics": metrics, "score": history[-1]["score"], "history": history,
        "finetune_seconds": seconds,
        "time": datetime.now(UTC).isoformat(timespec="seconds")})
    state.unlink(missing_ok=True)
    source = "its MNLI model" if job.record["recipe"]["start"] != "checkpoint" else (
        "random weights" if start.fresh else "the checkpoint")
    scores = ", ".join(f"{name} {100 * value:.1f}" for name, value in metrics.items())
    print(f"{title}, from {source}: {scores} ({seconds:.0f} s)", flush=True)


def write_predictions(path: Path, task: Task, rows: Split, answers: np.ndarray) -> None:
    """index <tab> prediction, a label's name or a number to six digits; of words CoNLL's form."""
    names = [f"{value:.6g}" if task.regression else task.labels[value] for value in answers]
    lines = ["index\tprediction", *(f"{i}\t{name}" for i, name in enumerate(names))]
    if rows.words:
        left = iter(names)
        lines = [line for words in rows.words
                 for line in (*(f"{' '.join(word.split())}\t{next(left)}" for word in words), "")]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def pick_tasks(cfg: Config) -> dict[Task, dict[str, Source]]:
    """The tasks asked for and where their files are. ValueError for settings that make no sense."""
    for name, least in (("max_len", 8), ("epochs", 1), ("batch_size", 1)):
        if (value := getattr(cfg, name)) is not None and value < least:
            raise ValueError(f"--{name} {value}: give at least {least}")
    if not cfg.eval:
        names = cfg.task.split(",") if cfg.task else list(TASKS)
        if unknown := [name for name in names if name not in TASKS]:
            raise ValueError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}, or one of "
                             "your own: --task train.tsv --eval dev.tsv")
        return {TASKS[name]: locate(cfg.glue_dir, TASKS[name]) for name in names}
    train, dev = Path(cfg.task), Path(cfg.eval)
    name = cfg.task_name or (train.resolve().parent.name if train.stem == "train" else train.stem)
    if name in (*TASKS, "", "loss", "accuracy") or set(name) & set(",*/\\"):
        raise ValueError(f"{name!r} cannot name a task of your own: give another --task_name")
    columns = ((tuple(cfg.text_columns.split(",")),) if cfg.text_columns else
               (PAIR, ("sentence",), *[("words",)] * (not cfg.regression)))
    metrics = ("spearman",) if cfg.regression else ("accuracy",)
    labels = (cfg.label_column,) if cfg.label_column else ("label", "labels")
    task = Task(name, OWN, columns, labels, metrics=metrics)
    return {task: {"train": train, "dev": dev}}


def finetune(cfg: Config) -> None:
    """Run the jobs that have not run yet, alone or as one of torchrun's workers, and print the
    table. ValueError for bad input; all files are read and checked before the first job."""
    (rank, world), device = processes(), pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    tasks, starts = pick_tasks(cfg), find_starts(cfg)
    data = {task.name: load_data(task, sources) for task, sources in tasks.items()}
    command = shlex.join(["finetune_glue.py", *sys.argv[1:]])
    about = {"device": device_name(device), "revision": git_revision(), "command": command}
    backend, why = attention_backend(device.type)
    jobs, skipped = make_jobs(cfg, starts, data, about), 0
    if rank == 0:
        print("\n".join(note for d in data.values() for note in d.notes))
        print(f"{len(jobs)} jobs, {world} x {about['device']}, {str(dtype)[6:]}; attention of "
              f"MosaicBERT shapes: {backend} ({why})", flush=True)
    for out in {job.start.out for job in jobs if not job.finished()}:
        make_folder(out)
    # one counter hands out the jobs, so that no worker waits for another's long task
    store = next(dist.rendezvous("env://"))[0] if world > 1 else dist.HashStore()
    for last in (False, True):  # what can start from an MNLI model waits for all others
        if last:
            jobs = make_jobs(cfg, starts, data, about)  # with the MNLI models that are there now
        some = [job for job in jobs if (job.data.task.name in FROM_MNLI) == last]
        while (i := store.add(f"next job {last}", 1) - 1) < len(some):
            if record := some[i].finished():
                skipped += 1
                if record.get("command") != command:  # a sweep takes the scores of its command
                    append_record(some[i].path, record | {"command": command})
            else:
                run_job(some[i], cfg, device, dtype, bar=world == 1 and sys.stderr.isatty())
        store.add(f"workers done {last}", 1)
        while (rank == 0 or not last) and store.add(f"workers done {last}", 0) < world:
            time.sleep(0.1)
    if skipped:
        print(f"{skipped} jobs had been finished before and were skipped", flush=True)
    if rank == 0:
        print(f"\n{table([record for job in jobs if (record := job.finished())])}\n")
        written = [path for job in jobs for path in (job.path, *job.outputs, job.keep) if path]
        print("written:", ", ".join(dict.fromkeys(map(str, written))))


main = script(finetune, Config)

if __name__ == "__main__":
    main()
