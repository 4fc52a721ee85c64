"""Pretrain an encoder with masked language modelling.

    python pretrain.py mosaic-tiny --data data/docstrings --max_minutes 3          # a laptop, minutes
    python pretrain.py mosaic-base --data data/c4                                  # one GPU, the paper's recipe
    torchrun --nproc_per_node 8 pretrain.py mosaic-base --data data/c4             # one node: the same batches
    python pretrain.py mosaic-base --help                                          # every setting, with its default

The same command again continues a run where it was killed, or says that it is finished. Results go to
runs/<name>/: config.json, log.jsonl (one JSON object a line), ckpt/step_*/ (weights others can read + trainer state).

Expect (paper, 8×A100-80GB, 70,000 steps of 4,096×128 tokens, C4): MosaicBERT-Base reaches GLUE 79.6 after 1.1 hours,
83.2 after 4.6 hours. On today's GPUs with this code: not measured yet, see README.md.

Batches come from batches.py, the model from model.py; this file is settings, schedules, checkpoints and the loop.
"""

import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from batches import Batch, Batches, count_masked, mask_tokens
from corpus import Corpus, Tokenizer, write_atomically
from kernels import attention_backend, attention_tiles
from machine import PEAK_BF16_TFLOPS, git_revision, pick_device, pick_dtype
from model import PRESETS, EncoderConfig, MaskedLM, find_checkpoints, flops_per_token

# ----------------------------------------------------------------------------- config


@dataclass
class TrainConfig:
    """One run. Shares are of the whole run, whose length is max_steps, max_tokens or max_minutes."""

    data: str = "data/c4"  # folder made by prepare_c4.py
    name: str = ""  # run folder under `out`; default: the preset's name
    out: str = "runs"
    model: EncoderConfig = field(default_factory=EncoderConfig)

    max_steps: int = 70_000  # length of the run in optimizer steps; used where the next two are 0
    max_tokens: int = 0  # ... or in real tokens
    max_minutes: float = 0.0  # ... or in minutes of training: the schedules follow the clock

    seq_len: int = 128  # tokens a document is cut at, [CLS] and [SEP] counted
    documents: Literal["first", "all"] = "first"  # first: one window of each (the paper); all: every window
    batch_tokens: int = 524_288  # tokens of a step over all processes (the paper: 4,096 × 128)
    micro_tokens: int = 65_536  # tokens of one forward and backward; lower it when memory runs out

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on the hidden matrices, adamw on everything else
    lr: float = 5e-4  # peak of adamw
    muon_lr: float = 0.02  # peak of muon
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.02  # torch's; = 1e-5 of the paper's decoupled decay at lr 5e-4
    grad_clip: float = 0.0  # largest gradient norm; 0: none, as the paper
    schedule: Literal["linear", "wsd"] = "linear"  # after the warm-up; wsd: flat, then down
    warmup: float = 0.06  # share of the run
    cooldown: float = 0.2  # wsd: share of the run at the end that anneals
    final_lr: float = 0.02  # learning rate at the end, as a share of the peak

    masking: str = "constant:0.3"  # constant:p | linear:p:q | cosine:p:q | step:p:q@share
    corruption: Literal["80/10/10", "mask"] = "80/10/10"  # hidden tokens: [MASK]/random/kept, or all [MASK]

    eval_every: float = 0.05  # share of the run (below 1) or steps
    eval_tokens: int = 1_048_576  # of the validation split; for one seq_len always the same tokens and 15 % masks
    checkpoint_every: float = 0.1  # share of the run (below 1) or steps; all are kept
    log_every: int = 10  # steps

    seed: int = 17
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls; weights stay float32
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on for CUDA
    gpu_dollars_per_hour: float = 2.2  # assumed price of one GPU; a CPU is counted as free


# what may differ when a run is continued; everything else would make it another run
FREE_TO_CHANGE = {
    "out",
    "data",
    "eval_every",
    "checkpoint_every",
    "log_every",
    "gpu_dollars_per_hour",
    "device",
    "compile",
}

# tokens of one forward in evaluation: fixed, so that runs with other micro_tokens see the same tokens and masks
EVAL_MICRO_TOKENS = 8_192

PAPER = dict(lr=5e-4, weight_decay=0.02)
# BERT-large and MosaicBERT-Large: lr 2e-4 and the same decoupled decay, 1e-5 / 2e-4 = 0.05
PAPER_LARGE = dict(lr=2e-4, weight_decay=0.05, max_steps=178_000, micro_tokens=32_768)
LAPTOP = dict(  # small encoders, minutes on two cores: documents are scarce, so every window is used
    documents="all",
    batch_tokens=4_096,
    micro_tokens=4_096,
    optimizer="muon",  # validation loss 4.93 against adamw's 5.32 after the same 2.5 M tokens (LOG.md, 2026-11-20)
    lr=2e-3,
    eval_tokens=65_536,
    max_steps=2_000,
)


def make_presets() -> dict[str, tuple[str, TrainConfig]]:
    """Name -> (one line of help, its TrainConfig)."""
    presets = {}
    for name, shape in PRESETS.items():
        family, size = name.split("-")
        recipe = {"base": PAPER, "large": PAPER_LARGE}.get(size, LAPTOP)
        masking = "constant:0.3" if family == "mosaic" else "constant:0.15"
        shape_line = f"{shape['n_layers']} layers, {shape['d_model']} wide"
        config = TrainConfig(model=EncoderConfig(**shape), masking=masking, **recipe)
        presets[name] = (f"{'MosaicBERT' if family == 'mosaic' else 'BERT'}, {shape_line}", config)
    return presets


def check_config(cfg: TrainConfig, world_size: int) -> None:
    """Refuse settings that cannot work, in one line each."""
    try:
        cfg.model.check()
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    if cfg.seq_len < 3:
        raise SystemExit(f"error: --seq_len {cfg.seq_len}: a document needs [CLS], a token and [SEP], so at least 3")
    if cfg.model.position == "learned" and cfg.seq_len > cfg.model.max_positions:
        raise SystemExit(
            f"error: --seq_len {cfg.seq_len} is beyond the {cfg.model.max_positions} learned positions; "
            "raise --model.max_positions too"
        )
    if cfg.micro_tokens < cfg.seq_len:
        raise SystemExit(f"error: --micro_tokens {cfg.micro_tokens} is below --seq_len {cfg.seq_len}")
    if cfg.batch_tokens < 1 or cfg.batch_tokens % (cfg.micro_tokens * world_size):
        raise SystemExit(
            f"error: --batch_tokens {cfg.batch_tokens} is not a multiple of --micro_tokens {cfg.micro_tokens} "
            f"× {world_size} processes"
        )
    if min(cfg.max_steps, cfg.max_tokens, cfg.max_minutes) < 0 or not (
        cfg.max_steps or cfg.max_tokens or cfg.max_minutes
    ):
        raise SystemExit("error: give the run a length: --max_steps, --max_tokens or --max_minutes above 0")
    for name in ("eval_every", "checkpoint_every", "log_every", "eval_tokens"):
        if getattr(cfg, name) <= 0:
            raise SystemExit(f"error: --{name} {getattr(cfg, name)}: must be above 0")
    masking_rate(cfg.masking, 0.0)


# ----------------------------------------------------------------------------- schedules


def learning_rate(cfg: TrainConfig, done: float) -> float:
    """Factor on the peak learning rate when the share `done` (0..1) of the run is over."""
    if done < cfg.warmup:
        return done / cfg.warmup
    start = cfg.warmup if cfg.schedule == "linear" else 1.0 - cfg.cooldown
    if done <= start:
        return 1.0
    return 1.0 + (cfg.final_lr - 1.0) * min((done - start) / (1.0 - start), 1.0)


def masking_rate(spec: str, done: float) -> float:
    """Share of tokens to hide when the share `done` of the run is over.

    Falling rates beat constant ones: +0.46 GLUE for linear:0.3:0.15 over constant:0.15 on BERT-base
    (Ankner et al. 2023, arXiv 2305.15096).
    """
    try:
        kind, _, numbers = spec.partition(":")
        numbers, _, at = numbers.partition("@")
        p, q = (
            ([float(x) for x in numbers.split(":")] * 2)[:2] if kind == "constant" else map(float, numbers.split(":"))
        )
        share = {
            "constant": lambda: 0.0,
            "linear": lambda: done,
            "cosine": lambda: 0.5 - 0.5 * math.cos(math.pi * done),
            "step": lambda: float(done >= float(at)),
        }[kind]()
    except (KeyError, ValueError):
        raise SystemExit(
            f"error: --masking {spec!r}: write constant:0.3, linear:0.3:0.15, cosine:0.3:0.15 or step:0.3:0.15@0.5"
        ) from None
    if not (0.0 < p < 1.0 and 0.0 < q < 1.0):
        raise SystemExit(f"error: --masking {spec!r}: rates must be between 0 and 1")
    return p + (q - p) * min(share, 1.0)


# ----------------------------------------------------------------------------- device, processes


def corpus_digest(folder: str) -> str:
    """Names the exact corpus: meta.json holds a checksum of every file."""
    return hashlib.sha256((Path(folder) / "meta.json").read_bytes()).hexdigest()[:16]


# ----------------------------------------------------------------------------- checkpoints


def save_checkpoint(run: Path, step: int, model: MaskedLM, tokenizer: Tokenizer, trainer: dict, progress: dict) -> Path:
    """Write ckpt/step_<step>/ under a temporary name, fsync, rename: a kill leaves a whole folder or none."""
    final = run / "ckpt" / f"step_{step:08d}"
    temp = final.with_suffix(".tmp")
    shutil.rmtree(temp, ignore_errors=True)
    try:
        model.save_pretrained(temp)
        tokenizer.save(temp)
        torch.save(trainer, temp / "trainer.pt")
        (temp / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")
        for path in [*temp.iterdir(), temp]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        shutil.rmtree(final, ignore_errors=True)  # only there if the same step is saved twice
        os.rename(temp, final)
    except Exception as e:  # a full disk is an OSError here, a SafetensorError or RuntimeError from those below
        shutil.rmtree(temp, ignore_errors=True)
        why = str(getattr(e, "strerror", None) or e).splitlines()[0]
        raise SystemExit(f"error: could not write {final} ({why}); earlier checkpoints are untouched") from e
    return final


# ----------------------------------------------------------------------------- the loop


class Clock:
    """Seconds of training: stopped while evaluating, saving and compiling."""

    def __init__(self, seconds: float, device: torch.device):
        self.seconds, self.device, self.since = seconds, device, None

    def now(self) -> float:
        return self.seconds + (time.perf_counter() - self.since if self.since is not None else 0.0)

    def start(self) -> None:
        self.since = time.perf_counter()

    def stop(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds, self.since = self.now(), None


def make_optimizers(cfg: TrainConfig, model: MaskedLM, device: torch.device) -> list[torch.optim.Optimizer]:
    """AdamW on everything, as the paper (biases and norms decayed too), or Muon on the layers' matrices."""
    adam = dict(lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=device.type != "mps")
    if cfg.optimizer == "adamw":
        return [torch.optim.AdamW(model.parameters(), **adam)]
    hidden = [p for p in model.encoder.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.AdamW(rest, **adam),
        torch.optim.Muon(hidden, lr=cfg.muon_lr, weight_decay=cfg.weight_decay, momentum=0.95),
    ]


def train(preset: str, cfg: TrainConfig) -> Path:
    """Run or continue one pretraining; returns the run folder."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_config(cfg, world)
    run = Path(cfg.out) / (cfg.name or preset)

    try:
        device = pick_device(cfg.device, int(os.environ.get("LOCAL_RANK", 0)))
        corpus, val_corpus = Corpus(cfg.data, "train"), Corpus(cfg.data, "val")
        tokenizer = Tokenizer.load(corpus.tokenizer_dir)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    dtype = pick_dtype(cfg.dtype, device)
    cfg.model.vocab_size = tokenizer.vocab_size
    batches = Batches(corpus, tokenizer, cfg.seq_len, cfg.micro_tokens, cfg.documents, cfg.seed)
    eval_batches = Batches(val_corpus, tokenizer, cfg.seq_len, min(EVAL_MICRO_TOKENS, cfg.eval_tokens), "all", seed=0)

    # -- what was here before: same settings continue, other settings are refused
    settings = asdict(cfg) | {"preset": preset, "corpus": corpus_digest(cfg.data)}
    checkpoints = find_checkpoints(run)
    if checkpoints and (run / "config.json").is_file():
        old = json.loads((run / "config.json").read_text())["train"]
        now = json.loads(json.dumps(settings))
        differ = [k for k in now if k not in FREE_TO_CHANGE and now[k] != old.get(k)]
        if differ:
            what = ", ".join(k if k in ("model", "corpus") else f"{k} {old.get(k)} -> {now[k]}" for k in differ)
            raise SystemExit(f"error: {run} holds a run with other settings ({what}); give this one another --name")
    progress = json.loads((checkpoints[-1] / "progress.json").read_text()) if checkpoints else {}
    if progress.get("finished"):
        print(f"{run} is finished: {checkpoints[-1]}")
        return run

    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    control = dist.new_group(backend="gloo") if world > 1 else None  # host-side agreement, no device sync

    # -- model and optimizers
    torch.manual_seed(cfg.seed)
    model = MaskedLM(cfg.model).to(device)
    optimizers = make_optimizers(cfg, model, device)
    step, tokens, micro, seconds = 0, 0, 0, 0.0
    if checkpoints:
        restored = MaskedLM.from_pretrained(checkpoints[-1])
        model.load_state_dict(restored.state_dict())
        trainer = torch.load(checkpoints[-1] / "trainer.pt", map_location=device, weights_only=True)
        for optimizer, state in zip(optimizers, trainer["optimizers"]):
            optimizer.load_state_dict(state)
        step, tokens, micro, seconds = (trainer[k] for k in ("step", "tokens", "micro", "train_seconds"))
    use_compile = cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")
    forward = torch.compile(model) if use_compile else model
    if world > 1:
        # the only buffers are ALiBi's slopes, the same everywhere: broadcasting them would cost a collective a step
        ids = [device.index] if device.type == "cuda" else None
        forward = DistributedDataParallel(forward, device_ids=ids, broadcast_buffers=False)

    # -- what is said about it
    gpus = world if device.type == "cuda" else 0
    price = cfg.gpu_dollars_per_hour if gpus else 0.0
    family = preset.split("-")[0]
    hardware = torch.cuda.get_device_name() if gpus else device.type
    backend, reason = (
        attention_backend(device.type) if cfg.model.attention == "auto" else (cfg.model.attention, "asked for")
    )
    identity = dict(
        run=run.name, family=family, preset=preset, device=hardware, world_size=world, revision=git_revision()
    )
    n_params = model.n_params()
    flops = flops_per_token(cfg.model, batches.effective_length(), masking_rate(cfg.masking, 0.5))
    peak = next((t for gpu, t in PEAK_BF16_TFLOPS.items() if gpus and gpu in hardware), None)
    log_file = None
    if rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        config = {"train": settings, "model": cfg.model.to_dict(), "n_params": n_params, **identity}
        write_atomically(run / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        for leftover in run.glob("ckpt/step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        mode = "a" if checkpoints else "w"  # what a run wrote that died before its first checkpoint is of no use
        log_file = open(run / "log.jsonl", mode, buffering=1)  # noqa: SIM115 (lives as long as the process)
        default = make_presets()[preset][1]
        changed = [
            f"{prefix}{f.name}={getattr(a, f.name)}"
            for a, b, prefix in ((cfg, default, ""), (cfg.model, default.model, "model."))
            for f in fields(a)
            if f.name != "model" and getattr(a, f.name) != getattr(b, f.name)
        ]
        print(f"{preset}: {n_params:,} parameters, changed: {', '.join(changed) or 'nothing'}")
        print(f"attention: {backend} ({reason}); {world} × {hardware}, {str(dtype).removeprefix('torch.')}")
        print(f"data: {len(corpus):,} documents, {corpus.n_tokens:,} tokens, {batches.n_windows:,} windows an epoch")
        if step:
            print(f"continuing at step {step:,} from {checkpoints[-1]}")

    def log(kind: str, **values) -> None:
        if log_file:
            log_file.write(json.dumps({"type": kind, **values}) + "\n")

    log(
        "header",
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["pretrain.py", *sys.argv[1:]]),
        torch=torch.__version__,
        n_params=n_params,
        flops_per_token=flops,
        gpu_dollars_per_hour=price,
        **identity,
    )

    # what earlier lives of this run cost, perhaps on another number of GPUs
    resumed_at = seconds
    paid_seconds, paid_dollars = progress.get("gpu_seconds", 0.0), progress.get("dollars", 0.0)

    def spent(train_seconds: float) -> dict:
        gpu_seconds = (train_seconds - resumed_at) * world
        return {
            "train_seconds": round(train_seconds, 3),
            "gpu_seconds": round(paid_seconds + gpu_seconds, 3),
            "dollars": round(paid_dollars + gpu_seconds / 3600 * price, 4),
        }

    def build(m: int, source: Batches = batches) -> tuple[Batch, Tensor | None]:
        """A micro-batch and, for the Triton kernels, the list of what to do in it. Runs on a thread."""
        batch = source(m)
        tiles = attention_tiles(batch.cu_seqlens) if backend == "triton" else None
        if device.type == "cuda":  # pinned, so that the copy to the device does not wait
            batch.input_ids, batch.special = batch.input_ids.pin_memory(), batch.special.pin_memory()
            batch.cu_seqlens, tiles = batch.cu_seqlens.pin_memory(), tiles.pin_memory() if tiles is not None else None
        return batch, tiles

    def loss_of(m: int, batch: Batch, tiles: Tensor | None, seed: int, rate: float, source: Batches):
        """Loss summed over the masked tokens, and how many were guessed right."""
        corruption = cfg.corruption if source is batches else "80/10/10"
        n_masked = count_masked(source, m, rate)
        ids, masked_idx, labels = mask_tokens(batch, tokenizer, n_masked, corruption, seed, m, device)
        flat = dict(cu_seqlens=batch.cu_seqlens.to(device, non_blocking=True), masked_idx=masked_idx, labels=labels)
        if tiles is not None:
            flat["tiles"] = tiles.to(device, non_blocking=True)
        for t in flat.values():  # their lengths vary; without this, a compilation for each
            torch._dynamo.maybe_mark_dynamic(t, 0)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return forward(ids, max_seqlen=cfg.seq_len, **flat)

    sums_device = "cpu" if device.type == "mps" else device  # MPS has no float64

    @torch.no_grad()
    def evaluate() -> tuple[float, float]:
        """MLM loss and accuracy on validation tokens and 15 % masks that depend on seq_len and nothing else."""
        model.eval()
        n = max(1, cfg.eval_tokens // eval_batches.micro_tokens)
        totals = torch.zeros(3, dtype=torch.float64, device=sums_device)
        for m in range(rank, n, world):
            loss, right = loss_of(m, *build(m, eval_batches), 0, 0.15, eval_batches)
            totals[:2] += torch.stack([loss, right]).to(totals)
            totals[2] += count_masked(eval_batches, m, 0.15)
        if world > 1:
            dist.all_reduce(totals)
        model.train()
        loss_sum, right, count = totals.tolist()
        return loss_sum / count, right / count

    def done_at(step: int, tokens: int, seconds: float) -> float:
        if cfg.max_minutes:
            return seconds / (60 * cfg.max_minutes)
        return tokens / cfg.max_tokens if cfg.max_tokens else step / cfg.max_steps

    def due(every: float, before: float, after: float) -> bool:
        """Whether an event that happens every `every` (share of the run, or steps) falls into this step."""
        if every >= 1:
            return step % int(every) == 0
        return math.floor(after / every + 1e-9) > math.floor(before / every + 1e-9)

    def diverged(what: str) -> SystemExit:
        good = (find_checkpoints(run) or ["none"])[-1]
        return SystemExit(
            f"error: {what} at step {step} (rank {rank}); last good checkpoint: {good}; "
            "try a lower --lr or --grad_clip 1 under another --name"
        )

    # -- signals: finish the step, save, leave
    asked_to_stop = False

    def stop_soon(signum, frame):
        nonlocal asked_to_stop
        asked_to_stop = True

    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, stop_soon)

    n_micro = cfg.batch_tokens // cfg.micro_tokens  # of a step, over all processes
    mine = (m for first in itertools.count(micro, n_micro) for m in range(first + rank, first + n_micro, world))
    pool = ThreadPoolExecutor(1)  # the next micro-batch is built while this one is computed
    ahead = pool.submit(build, next(mine))
    bar = tqdm(total=100, unit="%", disable=rank != 0 or not sys.stderr.isatty(), bar_format="{l_bar}{bar}| {postfix}")
    model.train()

    done = done_at(step, tokens, seconds)  # not the clock: ranks must agree
    if use_compile:  # one forward and backward for nothing, so that compilation is not counted as training
        loss_of(micro + rank, *ahead.result(), cfg.seed, masking_rate(cfg.masking, done), batches)[0].backward()
        for p in model.parameters():
            p.grad = None
    clock = Clock(seconds, device)
    clock.start()
    window = torch.zeros(2, dtype=torch.float64, device=sums_device)
    window_masked, window_tokens, window_documents, window_start = 0, 0, 0, clock.now()
    while done < 1.0:
        rate, factor = masking_rate(cfg.masking, done), learning_rate(cfg, done)
        # the loss is a sum; dividing by the masked tokens of the whole batch makes the mean right whatever the split
        total_masked = sum(count_masked(batches, m, rate) for m in range(micro, micro + n_micro))
        for i in range(n_micro // world):
            (batch, tiles), m = ahead.result(), micro + rank + i * world
            ahead = pool.submit(build, next(mine))
            torch.manual_seed(cfg.seed * 1_000_003 + m)  # dropout too depends on nothing but the micro-batch
            last = i == n_micro // world - 1
            with nullcontext() if last or world == 1 else forward.no_sync():
                loss, right = loss_of(m, batch, tiles, cfg.seed, rate, batches)
                (loss * (world / total_masked)).backward()  # DDP averages over processes: undo that
            window += torch.stack([loss.detach(), right]).to(window)
            window_documents += batch.n_documents * world
        if cfg.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer, lr in zip(optimizers, (cfg.lr, cfg.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, tokens, micro = step + 1, tokens + cfg.batch_tokens, micro + n_micro
        window_masked, window_tokens = window_masked + total_masked, window_tokens + cfg.batch_tokens

        before, elapsed, stopping = done, clock.now(), asked_to_stop  # a signal may come at any moment: read it once
        if world > 1:  # one clock and one decision for all
            agreed = torch.tensor([elapsed, float(stopping)], dtype=torch.float64)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=control)
            elapsed, stopping = agreed[0].item(), bool(agreed[1])
        done = done_at(step, tokens, elapsed)
        finished = done >= 1.0
        leaving = finished or stopping

        if step % cfg.log_every == 0 or leaving:
            if world > 1:
                dist.all_reduce(window)
            loss_sum, right = window.tolist()  # the only synchronisation with the device, every log_every steps
            seconds = clock.now() - window_start
            tok_per_s = window_tokens / seconds
            mean_loss, accuracy = loss_sum / window_masked, right / window_masked
            mfu = tok_per_s * flops / (peak * 1e12 * world) if peak else None
            padding_avoided = 1.0 - window_tokens / (window_documents * cfg.seq_len)
            log(
                "train",
                step=step,
                tokens=tokens,
                loss=round(mean_loss, 5),
                accuracy=round(accuracy, 5),
                lr=cfg.lr * factor,
                masking=round(rate, 4),
                tok_per_s=round(tok_per_s),
                mfu=mfu and round(mfu, 4),
                padding_avoided=round(padding_avoided, 4),
                peak_mem_gb=round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpus else None,
                **spent(elapsed),
            )
            if not math.isfinite(mean_loss):
                raise diverged(f"the loss is {mean_loss}")
            line = (
                f"step {step:,} {min(done, 1):4.0%} | loss {mean_loss:.3f} acc {accuracy:.3f} | "
                f"lr {cfg.lr * factor:.1e} mask {rate:.2f} | {tok_per_s:,.0f} tok/s"
                + (f" MFU {mfu:.1%}" if mfu else "")
                + f" | {elapsed:,.0f} s"
            )
            if rank == 0 and bar.disable and (step % (10 * cfg.log_every) == 0 or leaving):
                print(line, flush=True)
            bar.set_postfix_str(line)
            bar.update(min(done, 1) * 100 - bar.n)
            window.zero_()
            window_masked, window_tokens, window_documents, window_start = 0, 0, 0, clock.now()

        checkpoint_due = leaving or due(cfg.checkpoint_every, before, done)
        if checkpoint_due or due(cfg.eval_every, before, done):
            clock.stop()
            if checkpoint_due and not all(bool(w.isfinite().all()) for w in model.parameters()):
                raise diverged("the weights are not finite")
            if finished or not stopping:  # who asks to stop may not wait long: save at once
                loss, accuracy = evaluate()
                log(
                    "eval",
                    step=step,
                    tokens=tokens,
                    loss=round(loss, 5),
                    accuracy=round(accuracy, 5),
                    **spent(clock.seconds),
                )
                if rank == 0:
                    tqdm.write(f"step {step:,} {min(done, 1):4.0%} | validation loss {loss:.3f} acc {accuracy:.3f}")
            if checkpoint_due and rank == 0:
                counters = {"step": step, "tokens": tokens, "micro": micro, "train_seconds": clock.seconds}
                trainer = {"optimizers": [o.state_dict() for o in optimizers], **counters}
                state = {"step": step, "tokens": tokens, **spent(clock.seconds), **identity, "finished": finished}
                path = save_checkpoint(run, step, model, tokenizer, trainer, state)
                tqdm.write(f"saved {path}")
            clock.start()
        if stopping and not finished:
            if rank == 0:
                tqdm.write(f"stopped at step {step:,}; the same command continues")
            break
    bar.close()
    pool.shutdown(cancel_futures=True)
    if world > 1:
        dist.destroy_process_group()
    return run


def main() -> None:
    """Command line: preset first, then any setting."""
    presets = make_presets()
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-") and sys.argv[1] not in presets:
        raise SystemExit(f"error: unknown preset {sys.argv[1]!r}; choose from {', '.join(presets)}")
    cfg = tyro.extras.overridable_config_cli(presets, use_underscores=True)
    train(sys.argv[1], cfg)


if __name__ == "__main__":
    main()
