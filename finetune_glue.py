"""Fine-tune encoders on GLUE, or on a labelled file of your own, and print the table.

    python finetune_glue.py runs/mosaic-base                                   # the eight tasks, from the hub
    python finetune_glue.py runs/mosaic-base --task RTE,CoLA --glue_dir glue   # official .tsv files, or parquet
    python finetune_glue.py runs/a runs/b --task SST-2 --checkpoints all --from_scratch       # for a Pareto plot
    python finetune_glue.py runs/a --task spam/train.tsv --eval spam/dev.tsv --predict new.tsv         # any task
    torchrun --nproc_per_node 8 finetune_glue.py runs/mosaic-base              # 8 workers (GPUs, cores), one queue

A start is a run folder (its latest checkpoint), a checkpoint folder, a folder with official MosaicBERT or Hugging Face
BERT weights and their tokenizer.json, or with --hf any encoder that transformers knows. Each finished job (start, task,
seed) is a line of <run>/glue/<task>.jsonl; the same command again does what is missing and prints the table again. A
task of one's own also gets its answers to --eval, in <run>/glue/predictions.

Expect: published 8-task means on the dev sets are 84.3 for MosaicBERT-Base after 70,000 steps on C4, 83.5 for BERT-Base
(Portes et al. 2023). Scores of this code's own checkpoints, and GPU minutes: not measured yet.

Two averages, often confused, are printed: "8-task mean, last evaluation" is the paper's (a task's mean over metrics and
seeds, then the mean of the tasks); "9-number mean, best evaluation" has MNLI-m and -mm apart, F1 for QQP and MRPC, and
each number at its best epoch. RTE, MRPC and STS-B start from the start's own MNLI model if there is one.
"""

import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from corpus.tokenizer import Tokenizer
from glue import tasks as glue
from glue.tasks import Data, Recipe, Split, Task
from kernels import attention_backend
from machine import device_name, git_revision, pick_device, pick_dtype, read_command_line
from model import SequenceClassifier, find_checkpoints, weights_checksum

# ----------------------------------------------------------------------------- config


@dataclass
class Config:
    """Fine-tune encoders on GLUE, or on a labelled file of your own."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # run folders, or folders with weights
    checkpoints: str = "latest"  # of a run folder: latest, all, or steps, comma separated
    from_scratch: bool = False  # also start from random weights of the same shape: what is pretraining worth?
    hf: str = ""  # also start from these transformers encoders (folder or hub name, comma separated), same harness

    task: str = ""  # GLUE names, comma separated, default all eight; or your own training file: .tsv, .jsonl, .parquet
    glue_dir: str = ""  # folder with <task>/train.tsv, dev.tsv, test.tsv; default: nyu-mll/glue from the hub
    eval: str = ""  # your own task: the file it is evaluated on; a .tsv has a header and no quoting
    task_name: str = ""  # ... its name in records and plots; default: the training file's, or its folder's for train.*
    text_columns: str = ""  # ... one or two; default sentence1,sentence2, or sentence
    label_column: str = "label"
    regression: bool = False  # the label is a number: loss MSE, metrics Spearman and Pearson
    predict: str = ""  # rows to label with the fine-tuned model of the one --task; written below <run>/glue/predictions
    submission: str = ""  # folder to fill with test set predictions in the GLUE leaderboard's format, first seed

    recipe: Literal["mosaic", "sane"] = "mosaic"  # upstream's table, or one recipe for all tasks
    lr: float | None = None  # this and the next four override the recipe
    weight_decay: float | None = None  # torch's; upstream's decoupled value is this times lr
    epochs: int | None = None
    batch_size: int | None = None  # examples
    seeds: str = ""  # comma separated
    dropout: float | None = None  # of embeddings, layers and classifier; default: the checkpoint's
    max_len: int = 256  # tokens of an example with [CLS] and [SEP]; the longer of two texts is cut first
    no_mnli_start: bool = False  # RTE, MRPC and STS-B start from the checkpoint like the others

    compile: Literal["auto", "on", "off"] = "auto"  # auto: on for CUDA; a small encoder's job on a CPU is over sooner
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bf16 where the hardware multiplies it
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


# what the leaderboard takes; WNLI is left out of every average here, as in the paper
SUBMISSION = ("CoLA", "SST-2", "MRPC", "STS-B", "MNLI-m", "MNLI-mm", "QNLI", "QQP", "RTE", "WNLI", "AX")


# ----------------------------------------------------------------------------- flat batches


@dataclass
class Encoded:
    """n examples [CLS] a [SEP] (b [SEP]) end to end, tokenised once."""

    ids: np.ndarray  # (tokens,) int32
    starts: np.ndarray  # (n+1,) int64: example i is ids[starts[i] : starts[i+1]]
    first: np.ndarray  # (n,) int64: its tokens of type 0, [CLS] a [SEP]

    def batch(self, index: np.ndarray, device: torch.device) -> dict[str, Any]:
        """Examples `index` (B,) as a flat batch: arguments of SequenceClassifier. T is the sum of their lengths, up to
        a multiple of 64 filled with rows of no example: a CPU makes its matmul code anew for every T it meets."""
        lengths = self.starts[index + 1] - self.starts[index]
        cu_seqlens = np.concatenate([[0], lengths.cumsum()])
        place = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)  # (T,) within the example
        ids = self.ids[np.repeat(self.starts[index], lengths) + place]
        types = place >= np.repeat(self.first[index], lengths)

        rest = (0, -len(ids) % 64)
        arrays = np.pad(ids, rest).astype(np.int64), np.pad(types, rest).astype(np.int64), cu_seqlens.astype(np.int32)
        ids, types, cu_seqlens = (send(array, device) for array in arrays)
        return dict(input_ids=ids, token_type_ids=types, cu_seqlens=cu_seqlens, max_seqlen=int(lengths.max()))


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def encode(texts: list[list[str]], tokenizer: Tokenizer, max_len: int) -> Encoded:
    """Tokenise one or two columns of n texts, cut to max_len tokens; of a pair the longer text is cut first."""
    columns = [tokenizer.encode_batch(column) for column in texts]
    between = getattr(tokenizer, "n_between", 1)  # RoBERTa has two separators between a and b
    room = max_len - 2 - (len(columns) - 1) * between
    flat, starts, first = [], [0], []
    for a, *rest in zip(*columns):
        b = rest[0] if rest else []
        if len(a) + len(b) > room:
            a = a[: max(room - len(b), room - room // 2)] if rest else a[:room]
            b = b[: room - len(a)]
        example = [tokenizer.cls_id, *a, *[tokenizer.sep_id] * (between if rest else 1)]
        first.append(len(example))
        if rest:
            example += [*b, tokenizer.sep_id]
        flat.append(np.array(example, dtype=np.int32))
        starts.append(starts[-1] + len(example))
    return Encoded(np.concatenate(flat), np.array(starts), np.array(first))


# ----------------------------------------------------------------------------- training


def train(model: nn.Module, data: Encoded, y: np.ndarray, recipe: Recipe, seed: int, dtype: torch.dtype, bar: tqdm):
    """Fine-tune `model` in place; an iterator of the mean training loss after each epoch.

    y (n,): int64 classes (cross entropy) or float32 values (MSE). AdamW(0.9, 0.98), 6 % linear warm-up then linear to
    0, decay on every parameter, all as upstream; unlike upstream the examples are shuffled, anew in every epoch, from
    `seed`, and not sorted by length: without padding that saves nothing. ValueError when the loss is not finite.
    """
    device = next(model.parameters()).device
    settings = dict(lr=recipe.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=recipe.weight_decay)
    optimizer = torch.optim.AdamW(model.parameters(), **settings, fused=device.type != "mps")
    n_batches = math.ceil(len(y) / recipe.batch_size)
    steps, step = n_batches * recipe.epochs, 0
    warmup = max(1, round(0.06 * steps))
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        order = np.random.default_rng([seed, epoch]).permutation(len(y))
        total = torch.zeros((), device=device)
        for index in np.array_split(order, range(recipe.batch_size, len(y), recipe.batch_size)):
            done = (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)
            optimizer.param_groups[0]["lr"] = recipe.lr * done
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(**data.batch(index, device)).float()  # (B, n_labels)
            wanted = send(y[index], device)
            loss = F.cross_entropy(logits, wanted) if y.dtype == np.int64 else F.mse_loss(logits[:, 0], wanted)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()  # read once an epoch: reading it every step would wait for the GPU
            step += 1
            bar.update()
        if not math.isfinite(mean := total.item() / n_batches):
            raise ValueError(f"seed {seed}: the loss is {mean} in epoch {epoch}; lower --lr")
        yield mean


def compile_model(model: nn.Module, data: Encoded, dtype: torch.dtype) -> float:
    """torch.compile `model` in place for every T, B and max_seqlen, and compile now, with a forward and backward and a
    forward in evaluation for nothing. Returns the seconds it took. Weights and random numbers stay as they were."""
    began, device = time.perf_counter(), next(model.parameters()).device
    # two graphs for each shape of encoder and number of classes; the default of 8 would end in silent eager calls
    torch._dynamo.config.recompile_limit = 64
    model.compile(dynamic=True)
    batch = data.batch(np.arange(min(16, len(data.first))), device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for training in (True, False):
            model.train(training)
            with torch.set_grad_enabled(training), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(**batch).float()
            if training:
                logits.sum().backward()
    model.zero_grad(set_to_none=True)
    return round(time.perf_counter() - began, 3)


@torch.no_grad()
def predict(model: nn.Module, data: Encoded, dtype: torch.dtype) -> np.ndarray:
    """Logits (n, n_labels) float32, in the order of the examples; batches of like lengths, 16,384 tokens each."""
    model.eval()
    device = next(model.parameters()).device
    lengths = np.diff(data.starts)
    order = np.argsort(lengths, kind="stable")
    cuts = np.flatnonzero(np.diff(lengths[order].cumsum() // 16_384)) + 1
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = torch.cat([model(**data.batch(index, device)).float() for index in np.split(order, cuts)])
    return logits.cpu().numpy()[np.argsort(order)]


# ----------------------------------------------------------------------------- where to start


@dataclass
class Start:
    """Weights to fine-tune from, and where the results go."""

    folder: Path  # config.json, weights, tokenizer
    out: Path  # <run>/glue
    run: str
    checkpoint: str  # "ckpt/step_00000100", "random", or the name of a foreign folder
    progress: dict[str, Any] = field(default_factory=dict)  # what pretraining has cost; empty for a foreign one
    weights: str = ""  # tells these weights from others that were there under the same name
    hf: str = ""  # name for transformers, when it is to run the model

    @property
    def name(self) -> str:
        return self.run if self.checkpoint == self.run else f"{self.run} {Path(self.checkpoint).name}"


def find_starts(cfg: Config) -> list[Start]:
    """The starts asked for, each once. ValueError (one line) for a folder without any, for a step that is not there,
    for two starts of one name, and for a checkpoint that does not fit the tokenizer beside it."""
    starts = []
    for path in map(Path, cfg.runs):
        if (path / "config.json").is_file() and not (path / "ckpt").is_dir():
            folders = [path]
        elif not path.is_dir():
            raise ValueError(f"{path} is not a folder; give a run folder, or one with config.json and weights")
        elif not (folders := find_checkpoints(path)):
            raise ValueError(f"{path}/ckpt has no complete checkpoint; pretrain.py writes them")
        elif cfg.checkpoints == "latest":
            folders = folders[-1:]
        elif cfg.checkpoints != "all":
            steps = integers("checkpoints", cfg.checkpoints)
            if missing := sorted(set(steps) - {int(p.name[5:]) for p in folders}):
                raise ValueError(f"{path} has no checkpoint of step {missing[0]}")
            folders = [p for p in folders if int(p.name[5:]) in steps]
        for folder in folders:
            inside = folder.resolve().parent.name == "ckpt"
            run = folder.parents[1] if folder is not path else folder.resolve().parents[1] if inside else folder
            name = f"ckpt/{folder.name}" if inside else folder.resolve().name
            progress = folder / "progress.json"
            progress = json.loads(progress.read_text()) if progress.is_file() else {}
            try:
                n = json.loads((folder / "config.json").read_text()).get("vocab_size")
            except ValueError:
                raise ValueError(f"{folder}/config.json is damaged: not JSON") from None
            tokenizer = Tokenizer.load(folder)
            # ours state the exact size, official ones may have rounded it up to a multiple of 64 or 128
            if not n or not tokenizer.vocab_size <= n < tokenizer.vocab_size + 128:
                raise ValueError(f"{folder}: the model has {n} tokens, the tokenizer there {tokenizer.vocab_size}")
            shape = zlib.crc32((folder / "config.json").read_bytes(), zlib.crc32(tokenizer.vocabulary))
            weights = f"{weights_checksum(folder, shape):08x}"
            starts.append(Start(folder, run / "glue", run.resolve().name, name, progress, weights))
        if cfg.from_scratch:
            starts.append(from_scratch(starts[-1], shape))
    for name in filter(None, cfg.hf.split(",")):
        from glue.hf_encoder import HFTokenizer  # transformers takes seconds to import

        tokenizer = HFTokenizer(name)  # refuses what cannot work before the first job
        local = Path(name).is_dir()
        run = f"{Path(name).resolve().name if local else name.replace('/', '--')}-transformers"  # not our own BERT's
        out = (Path(name) if local else Path("runs", run)) / "glue"
        shape = zlib.crc32(Path(name, "config.json").read_bytes() if local else b"", zlib.crc32(tokenizer.vocabulary))
        weights = weights_checksum(Path(name), shape) if local else zlib.crc32(tokenizer.revision.encode(), shape)
        starts.append(Start(Path(name), out, run, run, weights=f"{weights:08x}", hf=name))
        if cfg.from_scratch:
            starts.append(from_scratch(starts[-1], shape))
    if not starts:
        raise ValueError("give a run folder, or a folder with config.json and weights; --help shows everything")
    starts = list({(s.out.resolve(), s.run, s.checkpoint): s for s in starts}.values())  # named twice, run once
    names = [s.name for s in starts]
    if twins := [s for s in starts if names.count(s.name) > 1]:
        raise ValueError(f"{twins[0].out.parent} and {twins[1].out.parent} are both called {twins[0].name}; rename one")
    return starts


def from_scratch(start: Start, shape: int) -> Start:
    """Random weights of the same shape: another start in the same folder, which has cost nothing."""
    nothing = dict(step=0, tokens=0, train_seconds=0.0, gpu_seconds=0.0, dollars=0.0)
    return replace(start, checkpoint="random", progress=start.progress | nothing, weights=f"{shape:08x}")


def load_model(start: Start, weights: Path, n_labels: int, dropout: float | None, seed: int) -> nn.Module:
    """Classifier from the folder `weights` (the start's, or that of its MNLI model); its last layer is always new."""
    torch.manual_seed(seed)
    if start.hf:
        from glue.hf_encoder import HFClassifier

        fresh = start.checkpoint == "random" and weights == start.folder
        model = HFClassifier(start.hf if weights == start.folder else str(weights), n_labels, dropout, not fresh)
    else:
        kinds = ("embedding", "output", "mlp", "classifier") if dropout is not None else ()
        overrides = {f"{kind}_dropout": dropout for kind in kinds}
        model = SequenceClassifier.from_pretrained(weights, n_labels=n_labels, **overrides)
        if start.checkpoint == "random" and weights == start.folder:
            torch.manual_seed(seed)
            return SequenceClassifier(model.cfg, n_labels)
        if "classifier.weight" in model.new_keys:
            return model
    nn.init.normal_(model.classifier.weight, std=0.02)  # what its classes were means nothing to this task
    nn.init.zeros_(model.classifier.bias)
    return model


def load_tokenizer(start: Start):
    """The start's own: a Tokenizer, or what transformers has for it."""
    if start.hf:
        from glue.hf_encoder import HFTokenizer

        return HFTokenizer(start.hf)
    return Tokenizer.load(start.folder)


# ----------------------------------------------------------------------------- jobs and their records


@dataclass
class Job:
    """One fine-tuning: a start, a task, a seed."""

    start: Start
    data: Data
    seed: int
    recipe: Recipe
    record: dict[str, Any]  # what is known before it runs
    weights: Path  # folder to start from: the start's, or that of its MNLI model
    after: str = ""  # identity of the MNLI job that makes those weights
    keep: Path | None = None  # MNLI's first seed: where its weights are kept for the others
    outputs: dict[Path, Split] = field(default_factory=dict)  # rows to predict, and the file for the answers

    @property
    def path(self) -> Path:
        return self.start.out / f"{self.data.task.name}.jsonl"

    def finished(self) -> dict[str, Any] | None:
        """The job's record, if it has run and what it left for others is still there."""
        if self.keep and maker(self.keep) != identity(self.record):
            return None
        for record in reversed(read_records(self.path)):
            written = record.get("predictions", {})
            if identity(record) == identity(self.record) and all(
                written.get(str(path)) == fingerprint(path, rows) for path, rows in self.outputs.items()
            ):
                return record
        return None


def identity(record: dict[str, Any]) -> str:
    """What a result depends on. weights: a run pretrained anew under its old name is another start."""
    names = ("task", "checkpoint", "seed", "data", "weights", "recipe")
    return json.dumps({name: record.get(name) for name in names}, sort_keys=True)


def maker(weights: Path) -> str:
    """Identity of the job whose fine-tuned weights are kept in a folder, "" for none."""
    return (weights / "job.json").read_text() if (weights / "job.json").is_file() else ""


def fingerprint(path: Path, rows: Split) -> str:
    """Of an answer file and the rows it answers; "" when it is not there."""
    return f"{rows.digest():08x} {zlib.crc32(path.read_bytes()):08x}" if path.is_file() else ""


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a .jsonl file. A line damaged by a kill is skipped: its job runs again."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            if record["type"] == "glue" and "score" in record:
                records.append(record)
        except (ValueError, KeyError, TypeError):
            continue
    return records


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line in one write, on a line of its own even when a kill has cut the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 1))
        cut = f.read(1) not in (b"", b"\n")
        f.write(b"\n" * cut + json.dumps(record).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def make_jobs(cfg: Config, starts: list[Start], data: dict[str, Data], about: dict[str, Any]) -> list[Job]:
    """Every start × task × seed in the order to run them: MNLI, then the long ones, then what starts from MNLI."""
    jobs = []
    asked = {k: v for k in ("lr", "weight_decay", "epochs", "batch_size") if (v := getattr(cfg, k)) is not None}
    majorities = {name: glue.majority(d) for name, d in data.items()}
    to_predict = {name: outputs(cfg, d) for name, d in data.items()}
    for start in starts:
        mnli = start.out / "mnli" / Path(start.checkpoint).name
        cost = start.progress
        after = maker(mnli)  # an earlier call may have made one, of these very weights
        if cfg.no_mnli_start or json.loads(after or "{}").get("weights") != start.weights:
            after = ""
        for name in sorted(data, key=lambda name: name != "MNLI"):
            d = data[name]
            recipe = replace(glue.SANE if cfg.recipe == "sane" else d.task.recipe, **asked)
            seeds = integers("seeds", cfg.seeds) if cfg.seeds else glue.SEEDS[: recipe.n_seeds]
            from_mnli = name in glue.FROM_MNLI and after != ""
            settings = {k: v for k, v in asdict(recipe).items() if k != "n_seeds"}
            settings |= {k: getattr(cfg, k) for k in ("max_len", "dropout", "dtype")}
            settings["start"] = f"MNLI {zlib.crc32(after.encode()):08x}" if from_mnli else "checkpoint"
            for seed in seeds:
                record = {
                    "type": "glue", "task": name, "run": start.run, "checkpoint": start.checkpoint, "seed": seed,
                    "step": cost.get("step", 0), "tokens": cost.get("tokens"), "recipe": settings, "data": d.digest,
                    "weights": start.weights,
                    "pretrain_seconds": cost.get("train_seconds"), "pretrain_gpu_seconds": cost.get("gpu_seconds"),
                    "pretrain_dollars": cost.get("dollars"), "family": cost.get("family", "other"),
                    "preset": cost.get("preset", start.run), "majority": majorities[name], "official": d.official,
                    "n_train": len(d.train.lines), "n_dev": sum(len(dev.lines) for dev in d.devs.values()), **about,
                }  # fmt: skip
                weights, made_by = (mnli, after) if from_mnli else (start.folder, "")
                job = Job(start, d, seed, recipe, record, weights, made_by)
                if name == "MNLI" and seed == seeds[0] and not cfg.no_mnli_start:
                    job.keep, after = mnli, identity(record)
                if not cfg.submission or seed == seeds[0]:
                    stem = f"{name}_{Path(start.checkpoint).name}_seed{seed}"
                    folder = Path(cfg.submission) if cfg.submission else start.out / "predictions"
                    job.outputs = {folder / file.replace("*", stem): rows for file, rows in to_predict[name].items()}
                jobs.append(job)

    def turn(job: Job) -> tuple[bool, bool, int]:
        """What starts from MNLI's model last, what makes that model first, else the longest first."""
        return job.after != "", job.keep is None, -len(job.data.train.lines) * job.recipe.epochs

    return sorted(jobs, key=turn)


def outputs(cfg: Config, data: Data) -> dict[str, Split]:
    """Files to write for a task and the rows they are about; "*" stands for task, checkpoint and seed."""
    task = data.task
    if not cfg.submission:
        answers = {"*.tsv": data.devs["dev"]} if cfg.eval else {}
        if cfg.predict:
            path = Path(cfg.predict)
            answers[f"*_{path.stem}.tsv"] = glue.read_split(path, task, labelled=False)
        return answers
    names = {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"}
    sources = {names.get(s, task.name): glue.locate(cfg.glue_dir, task.name, s) for s in task.splits("test")}
    if task.name == "MNLI" and (not isinstance(ax := glue.locate(cfg.glue_dir, "AX", "test"), Path) or ax.is_file()):
        sources["AX"] = ax  # the diagnostic set is answered by the MNLI model
    return {f"{name}.tsv": glue.read_split(s, task, labelled=False) for name, s in sources.items()}


def write_answers(path: Path, task: Task, logits: np.ndarray) -> None:
    """index <tab> prediction, as the leaderboard wants it: a label's name, or a number (STS-B's within 0 and 5)."""
    values = logits[:, 0].clip(0, 5) if task.name == "STS-B" else logits[:, 0]
    answers = (
        [f"{v:.3f}" if task.name == "STS-B" else f"{v:.6g}" for v in values]
        if task.regression
        else [task.labels[i] for i in logits.argmax(1)]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text("".join(f"{i}\t{a}\n" for i, a in [("index", "prediction"), *enumerate(answers)]))
    unfinished.replace(path)


def run_job(job: Job, cfg: Config, device: torch.device, dtype: torch.dtype, cache: dict, alone: bool) -> None:
    """Fine-tune, evaluate after every epoch, write the record. `cache` holds what has been tokenised; alone: there is
    no other worker. ValueError when another command has taken the MNLI model away that this job starts from."""
    while job.after and maker(job.weights) != job.after:  # another worker is still at MNLI
        if alone:
            raise ValueError(f"{job.weights} has been replaced by another command; repeat this one when that has ended")
        time.sleep(1)
    show_bar = alone and sys.stderr.isatty()
    task, y, start = job.data.task, job.data.y, job.start
    model = load_model(start, job.weights, len(task.labels) or 1, cfg.dropout, job.seed).to(device)
    tokenizer = load_tokenizer(start)
    max_len = cfg.max_len
    if start.hf or model.cfg.position == "learned":
        max_len = min(max_len, model.n_positions if start.hf else model.cfg.max_positions)
    if max_len < cfg.max_len:
        print(f"{start.name}: texts are cut at its {max_len} learned positions, not at --max_len {cfg.max_len}")

    def encoded(split: Split) -> Encoded:
        key = (zlib.crc32(tokenizer.vocabulary), split.where, len(split.lines), max_len)  # unlabelled it may have more
        if key not in cache:
            cache[key] = encode(split.texts, tokenizer, max_len)
        return cache[key]

    title = f"{task.name} · {start.name} · seed {job.seed}"
    steps = math.ceil(len(y["train"]) / job.recipe.batch_size) * job.recipe.epochs
    train_set, history = encoded(job.data.train), []
    compiled = cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")
    compile_seconds = compile_model(model, train_set, dtype) if compiled else None
    began = said = time.perf_counter()
    with tqdm(total=steps, desc=title, leave=False, disable=not show_bar) as bar:
        for loss in train(model, train_set, y["train"], job.recipe, job.seed, dtype, bar):
            logits = {name: predict(model, encoded(split), dtype) for name, split in job.data.devs.items()}
            answers = {name: x[:, 0] if task.regression else x.argmax(1) for name, x in logits.items()}
            metrics, score = glue.judge(task, y, answers)
            history.append({"epoch": len(history) + 1, "loss": round(loss, 5), "score": score, **metrics})
            if not show_bar and len(history) < job.recipe.epochs and time.perf_counter() - said > 20:
                said = time.perf_counter()
                print(f"{title}: epoch {len(history)}, loss {loss:.3f}, {glue.percent(metrics)}", flush=True)
    seconds = round(time.perf_counter() - began, 3)
    for path, rows in job.outputs.items():
        write_answers(path, task, predict(model, encoded(rows), dtype))
    if job.keep and maker(job.keep) != identity(job.record):  # else it is there and others may be reading it
        unfinished = job.keep.with_name(f".{job.keep.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        (unfinished / "job.json").write_text(identity(job.record))
        shutil.rmtree(job.keep, ignore_errors=True)
        unfinished.rename(job.keep)
    job.record |= {"metrics": metrics, "score": score, "history": history, "finetune_seconds": seconds}
    job.record |= {"compile_seconds": compile_seconds}  # not part of finetune_seconds; null: not compiled
    job.record |= {"predictions": {str(path): fingerprint(path, rows) for path, rows in job.outputs.items()}}
    append_record(job.path, job.record | {"time": datetime.now(UTC).isoformat(timespec="seconds")})
    source = "its MNLI model" if job.after else "random weights" if start.checkpoint == "random" else "the checkpoint"
    against = "" if task.regression else f"majority {100 * job.record['majority']:.1f}, "
    print(f"{title}, from {source}: {glue.percent(metrics)} ({against}{seconds:.0f} s)", flush=True)


# ----------------------------------------------------------------------------- main


def integers(flag: str, text: str) -> list[int]:
    """ "19,8364" -> [19, 8364]."""
    if not re.fullmatch(r"\d{1,18}(,\d{1,18})*", text):
        raise ValueError(f"--{flag} {text}: give whole numbers, comma separated")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def pick_tasks(cfg: Config) -> dict[Task, dict[str, Any]]:
    """The tasks asked for and where their files are. ValueError (one line) for settings that make no sense."""
    for name, least in (("max_len", 8), ("epochs", 1), ("batch_size", 1), ("lr", 0.0), ("weight_decay", 0.0)):
        if (value := getattr(cfg, name)) is not None and value < least:
            raise ValueError(f"--{name} {value}: give at least {least}")
    if cfg.dropout is not None and not 0 <= cfg.dropout < 1:
        raise ValueError(f"--dropout {cfg.dropout}: give a share of at least 0 and below 1")
    path = Path(cfg.task).resolve()
    names = cfg.task.split(",") if cfg.task else list(glue.TASKS)
    unknown = [name for name in names if name not in glue.TASKS]
    if (cfg.eval and not unknown) or (path.suffix in glue.KINDS and not cfg.eval):
        raise ValueError("a task of your own takes both files: --task path/to/train.tsv --eval path/to/dev.tsv")
    if not cfg.eval:
        changed = dict(task_name="", text_columns="", regression=False, label_column="label")
        if own := [name for name, default in changed.items() if getattr(cfg, name) != default]:
            raise ValueError(f"--{own[0]} is for a task of your own: --task path/to/train.tsv --eval path/to/dev.tsv")
        if unknown:
            known = ", ".join(glue.TASKS)
            raise ValueError(f"unknown task {unknown[0]!r}; known: {known}, or a {', '.join(glue.KINDS)} file")
        tasks = {
            glue.TASKS[n]: {s: glue.locate(cfg.glue_dir, n, s) for s in ("train", *glue.TASKS[n].splits("dev"))}
            for n in names
        }
    else:
        name = cfg.task_name or (path.parent.name if path.stem == "train" else path.stem)
        if not name or name in (*glue.TASKS, "loss", "accuracy") or set(name) & set(",*/\\"):
            taken = "GLUE's, loss or accuracy"
            raise ValueError(f"{name!r} cannot name your task: give a --task_name without , * / that is not {taken}")
        columns = (tuple(cfg.text_columns.split(",")),) if cfg.text_columns else (glue.PAIR, ("sentence",))
        if len(columns[0]) > 2:
            raise ValueError(f"--text_columns {cfg.text_columns}: at most two")
        metrics = ("spearman",) if cfg.regression else ("accuracy",)
        task = Task(name, glue.OWN, columns, (cfg.label_column,), metrics=metrics)
        tasks = {task: {"train": Path(cfg.task), "dev": Path(cfg.eval)}}
    if cfg.predict and len(tasks) > 1:
        raise ValueError("--predict needs one --task: the rows are of one kind")
    if cfg.submission and (cfg.eval or cfg.predict):
        raise ValueError("--submission is for GLUE's own tasks, and without --predict")
    return tasks


def finetune(cfg: Config) -> None:
    """Run the jobs that have not run yet, alone or as one of torchrun's workers, and print the table. ValueError (one
    line) for bad input; all texts and labels are read and checked before the first job."""
    rank, world, local_rank = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = pick_device(cfg.device, local_rank)
    dtype = pick_dtype(cfg.dtype, device)
    tasks, starts = pick_tasks(cfg), find_starts(cfg)
    if cfg.submission and len(starts) > 1:
        raise ValueError("--submission takes one start: its files have one name each")
    data = {task.name: glue.load_data(task, sources) for task, sources in tasks.items()}
    hardware = device_name(device)
    command = shlex.join(["finetune_glue.py", *sys.argv[1:]])
    jobs = make_jobs(cfg, starts, data, {"device": hardware, "revision": git_revision(), "command": command})
    if rank == 0:
        print("\n".join(note for d in data.values() for note in d.notes))
        backend, why = attention_backend(device.type)
        what = f"attention of MosaicBERT shapes: {backend} ({why})"
        print(f"{len(jobs)} jobs, {world} × {hardware}, {str(dtype)[6:]}; {what}", flush=True)
    # one counter hands out the jobs, so that no worker waits for another's long task
    store = next(dist.rendezvous("env://"))[0] if world > 1 else dist.HashStore()
    cache: dict = {}
    skipped = 0
    while (i := store.add("next job", 1) - 1) < len(jobs):
        if record := jobs[i].finished():
            skipped += 1
            if record.get("command") != command:  # sweep.py takes the scores of the command it gave
                append_record(jobs[i].path, record | {"command": command})
        else:
            run_job(jobs[i], cfg, device, dtype, cache, alone=world == 1)
    if skipped:
        print(f"{skipped} jobs had been finished before and were skipped", flush=True)
    store.add("workers done", 1)
    while rank == 0 and store.add("workers done", 0) < world:
        time.sleep(0.1)
    if rank == 0:
        print(f"\n{glue.table([record for job in jobs if (record := job.finished())])}\n")
        written = [job.path for job in jobs] + [path for job in jobs for path in job.outputs]
        print("written:", ", ".join(dict.fromkeys(map(str, written))))
        if cfg.submission and (missing := [n for n in SUBMISSION if not Path(cfg.submission, f"{n}.tsv").is_file()]):
            print(f"not made, but part of a submission: {', '.join(f'{n}.tsv' for n in missing)}")


def main(args: list[str] | None = None) -> None:
    """Command line; `args` replaces sys.argv[1:] in tests."""
    cfg = read_command_line(Config, args)
    try:
        finetune(cfg)
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
