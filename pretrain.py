"""Pretrain an encoder with masked language modelling.

    python pretrain.py mosaic-tiny --data data/docstrings --max_minutes 3  # a laptop, minutes
    python pretrain.py mosaic-base --data data/c4                     # one GPU, the paper's recipe
    torchrun --nproc_per_node 8 pretrain.py mosaic-base --data data/c4     # one node: same batches
    python pretrain.py nano-base --cooldown_from runs/nano-base/ckpt/step_00014000    # anneal it
    python pretrain.py mosaic-base --start_from mosaicml/mosaic-bert-base --data data/my_corpus
    python pretrain.py mosaic-base --help                        # every setting, with its default

The same command again continues a run where it was killed, or says that it is finished. Results go
to runs/<name>/: config.json, log.jsonl, ckpt/step_*/ (weights others can read + trainer state).

Expect (paper, 8 A100-80GB, 70,000 steps of 4,096 × 128 tokens of C4): MosaicBERT-Base reaches GLUE
79.6 after 1.1 hours, 83.2 after 4.6 hours. On today's GPUs with this code: not measured yet.

This file is the loop; settings and schedules are in recipes.py, batches in batches.py, what a run
begins from and saves in checkpoint.py, what it says and costs in runlog.py.
"""

import math
import signal
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import kernels
import recipes
from batches import EVAL_MICRO_TOKENS, Batch, Batches, count_masked, mask_tokens, one_mask_each
from checkpoint import State, lock_run, resolve_start
from machine import pick_device, pick_dtype, processes
from model import MaskedLM, find_checkpoints
from recipes import TrainConfig
from runlog import Clock, RunLog


def make_optimizers(cfg: TrainConfig, model: MaskedLM, device: torch.device
                    ) -> list[tuple[torch.optim.Optimizer, float]]:
    """(optimizer, its peak learning rate): AdamW on everything, as the paper (biases and norms
    decayed too), or Muon on the layers' matrices and AdamW on the rest."""
    adam = dict(lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay,
                fused=device.type != "mps")
    if cfg.optimizer == "adamw":
        return [(torch.optim.AdamW(model.parameters(), **adam), cfg.lr)]
    hidden = [p for p in model.encoder.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(hidden, lr=cfg.muon_lr, weight_decay=cfg.weight_decay, momentum=0.95)
    return [(torch.optim.AdamW(rest, **adam), cfg.lr), (muon, cfg.muon_lr)]


def wrap(model: MaskedLM, cfg: TrainConfig, device: torch.device, world: int) -> torch.nn.Module:
    """The model as the loop calls it: compiled if wanted, its gradients averaged over processes."""
    if cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda"):
        if cfg.model.activation_checkpointing:
            # in one graph, torch 2.11 cannot recompute layers whose inputs vary in length
            for layer in model.encoder.layers:
                layer.compile()
        else:
            model = torch.compile(model)
    if world == 1:
        return model
    # the only buffers are ALiBi's slopes, the same everywhere: broadcasting them costs a collective
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 renames it
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


# ----------------------------------------------------------------------------- micro-batches
def pin(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Tensors of the host, ready for copies to `device` that the host does not wait for."""
    return [t.pin_memory() if device.type == "cuda" else t for t in tensors]


def build(batches: Batches, m: int, device: torch.device) -> Batch:
    """Micro-batch m, pinned."""
    batch = batches(m)
    flat = {k: t for k, t in batch._asdict().items() if isinstance(t, Tensor)}
    return batch._replace(**dict(zip(flat, pin(device, *flat.values()))))


def build_ahead(batches: Batches, first: int, step: int, device: torch.device
                ) -> Iterator[tuple[int, Batch]]:
    """Micro-batches first, first + step, ..., each built in a thread while the one before it is
    computed."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(build, batches, first, device)
        for m in count(first, step):
            batch = coming.result()
            coming = pool.submit(build, batches, m + step, device)
            yield m, batch


def model_inputs(ids: Tensor, cu_seqlens: Tensor, masked_idx: Tensor, labels: Tensor, seq_len: int,
                 device: torch.device, types: Tensor | None = None) -> dict:
    """A batch as arguments of MaskedLM: ids and types (T,), cu_seqlens (B+1,), masked_idx and
    labels (M,)."""
    flat = dict(cu_seqlens=cu_seqlens, masked_idx=masked_idx, labels=labels)
    flat = {k: t.to(device, non_blocking=True) for k, t in flat.items()}
    for t in flat.values():  # their lengths vary; without this, a compilation for each
        torch._dynamo.maybe_mark_dynamic(t, 0)
    if types is not None:
        flat["token_type_ids"] = types.to(device, non_blocking=True)
    return dict(input_ids=ids.to(device, non_blocking=True), max_seqlen=seq_len, **flat)


@torch.no_grad()
def ask_teacher(teacher, inputs: dict, autocast) -> Tensor:
    """A teacher's gradient for model.DecoderLoss, (M, V) in its logits' dtype: its softmax minus
    the label, at the masked positions."""
    with autocast:
        logits = teacher(**{k: v for k, v in inputs.items() if k != "labels"})
    kernels.masked_cross_entropy(logits, inputs["labels"], keep_gradient=True)
    torch._dynamo.maybe_mark_dynamic(logits, 0)
    return logits


def masked_inputs(batches: Batches, m: int, batch: Batch, n_masked: int, corruption: str, seed: int,
                  device: torch.device) -> dict:
    """Micro-batch m with `n_masked` tokens masked, as arguments of MaskedLM on the device."""
    ids, *masked = mask_tokens(batch, batches.tokenizer, n_masked, corruption, seed, m, device)
    how = batches.seq_len, device, batch.token_type_ids
    return model_inputs(ids, batch.cu_seqlens, *masked, *how)


def training_inputs(batches: Batches, m: int, batch: Batch, n_masked: int, cfg: TrainConfig,
                    device: torch.device, teacher, autocast) -> dict:
    """masked_inputs() with what the teacher, if there is one, says of them."""
    how = n_masked, cfg.corruption, cfg.seed, device
    inputs = masked_inputs(batches, m, batch, *how)
    if teacher is not None:
        inputs["teacher_gradient"] = ask_teacher(teacher, inputs, autocast)
    return inputs


@torch.no_grad()
def evaluate(forward, model: MaskedLM, cfg: TrainConfig, batches: Batches, autocast
             ) -> dict[str, float]:
    """Loss, accuracy and pseudo-perplexity on validation tokens and 15 % masks that depend on the
    data and seq_len and nothing else. `forward` is `model` as the loop calls it."""
    (rank, world), device = processes(), next(model.parameters()).device
    model.eval()
    totals = torch.zeros(6, dtype=torch.float64, device="cpu" if device.type == "mps" else device)

    def add_up(inputs: dict, into: Tensor) -> None:
        torch._dynamo.maybe_mark_dynamic(inputs["input_ids"], 0)  # lengths vary: compiled once
        with autocast:
            loss, n_correct = forward(**inputs)
        into += torch.stack([loss, n_correct]).to(into)

    for m in range(rank, max(1, cfg.eval_tokens // batches.micro_tokens), world):
        batch, n_masked = build(batches, m, device), count_masked(batches, m, 0.15)
        add_up(masked_inputs(batches, m, batch, n_masked, "80/10/10", 0, device), totals[:2])
        totals[4] += n_masked
    alone = one_mask_each(batches(0), batches.tokenizer, cfg.pppl_tokens, EVAL_MICRO_TOKENS)
    for ids, cu_seqlens, masked_idx, labels in list(alone)[rank::world]:
        flat = pin(device, ids, cu_seqlens, masked_idx, labels)
        add_up(model_inputs(*flat, cfg.seq_len, device), totals[2:4])
        totals[5] += len(labels)
    if world > 1:
        dist.all_reduce(totals)
    model.train()
    loss, n_correct, loss_alone, _, n, n_alone = totals.tolist()
    found = {"loss": round(loss / n, 5), "accuracy": round(n_correct / n, 5)}
    if n_alone:  # Salazar et al. 2020, arXiv 1910.14659
        found["pseudo_perplexity"] = round(math.exp(min(loss_alone / n_alone, 700.0)), 3)
    return found


# ----------------------------------------------------------------------------- the loop
class StopSignal:
    """SIGTERM or SIGINT: the loop finishes its step, saves and leaves."""

    received = False

    def __init__(self):
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, lambda *_: setattr(self, "received", True))


def agree(seconds: float, stop: bool, group: dist.ProcessGroup | None) -> tuple[float, bool]:
    """One clock and one decision for all processes: the latest, and whether any wants to stop."""
    if group is None:
        return seconds, stop
    agreed = torch.tensor([seconds, float(stop)], dtype=torch.float64)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    return agreed[0].item(), bool(agreed[1])


def due(every: int | float, step: int, before: float, after: float) -> bool:
    """Whether what happens every `every` steps, or shares of the run, falls into this step, which
    took the run from the share `before` to `after`. 1 is each step, 1.0 the whole run."""
    if isinstance(every, int) or every > 1:  # earlier versions kept steps as 10.0
        return step % int(every) == 0
    return math.floor(after / every + 1e-9) > math.floor(before / every + 1e-9)


def compile_now(forward, model: MaskedLM, teacher, cfg: TrainConfig, batches: Batches, m: int,
                autocast) -> None:
    """A forward and backward for nothing, so that compilation is not counted as training."""
    device = next(model.parameters()).device
    n_masked = count_masked(batches, m, recipes.masking_rate(cfg.masking, 0.5))
    batch, how = build(batches, m, device), (cfg, device, teacher, autocast)
    for narrow in {cfg.narrow_layers, 1}:
        inputs = training_inputs(batches, m, batch, n_masked, *how)
        with autocast:
            loss, _ = forward(**inputs, narrow_layers=narrow)
        loss.backward()
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()


def train(preset: str, cfg: TrainConfig) -> Path:
    """Run or continue one pretraining; returns the run folder."""
    rank, world = processes()
    try:
        device = pick_device(cfg.device)
        start = resolve_start(preset, cfg, world)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    if start.own and start.progress["finished"]:
        print(f"{start.run} is finished: {start.own}")
        return start.run
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    host = dist.new_group(backend="gloo") if world > 1 else None  # agrees without the device
    lock = lock_run(start, host)  # noqa: F841 (held while training)
    batches, dtype = start.batches, pick_dtype(cfg.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    torch.manual_seed(cfg.seed)
    model = MaskedLM(cfg.model).to(device)
    state = State(model, make_optimizers(cfg, model, device))
    state.begin(start, cfg)
    forward = wrap(model, cfg, device, world)
    teacher = start.teacher and wrap(start.teacher.to(device).eval(), cfg, device, 1)
    log, stop = RunLog(preset, cfg, start, state, host), StopSignal()
    ahead = build_ahead(batches, state.micro + rank, world, device)
    model.train()
    if cfg.compile == "on" or device.type == "cuda":
        compile_now(forward, model, teacher, cfg, batches, state.micro + rank, autocast)
    clock = Clock(state.train_seconds, device)
    progress = min(recipes.share_done(cfg, state), 1 - 1e-9)  # time was up in a save: a step more
    while progress < 1.0:
        rate = recipes.masking_rate(cfg.masking, recipes.stem_done(state.branch, progress))
        scale = recipes.lr_scale(cfg, state.branch, progress)
        narrow = recipes.narrow_layers(cfg, state.branch, progress)
        n_micro = cfg.batch_tokens // cfg.micro_tokens  # over all processes
        numbers = range(state.micro, state.micro + n_micro)
        masked = {m: count_masked(batches, m, rate) for m in numbers}
        n_masked = sum(masked.values())
        for i in range(n_micro // world):
            m, batch = next(ahead)
            torch.manual_seed(cfg.seed * 1_000_003 + m)  # dropout depends on the micro-batch only
            inputs = training_inputs(batches, m, batch, masked[m], cfg, device, teacher, autocast)
            syncs = world == 1 or i == n_micro // world - 1
            with nullcontext() if syncs else forward.no_sync():
                with autocast:
                    # the loss is a sum over masked tokens
                    loss, n_correct = forward(**inputs, narrow_layers=narrow)
                # so the mean is right whatever the split; DDP averages over processes: undo that
                (loss * (world / n_masked)).backward()
            log.add(loss, n_correct, masked[m], batch.n_documents)
        if cfg.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer, peak_lr in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak_lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        state.step += 1
        state.tokens += cfg.batch_tokens
        state.micro += n_micro
        state.train_seconds, stopping = agree(clock.now(), stop.received, host)
        before, progress = progress, recipes.share_done(cfg, state)
        leaving = stopping or progress >= 1.0
        if leaving or state.step % cfg.log_every == 0:
            log.train(state, progress, cfg.lr * scale, rate, leaving)
        save = leaving or due(cfg.checkpoint_every, state.step, before, progress)
        if save or due(cfg.eval_every, state.step, before, progress):
            with clock.paused():
                state.train_seconds = clock.seconds
                if save and not state.is_finite():
                    raise log.diverged(f"the weights are not finite after step {state.step:,}")
                if progress >= 1.0 or not stopping:  # who asks to stop may not wait long
                    found = evaluate(forward, model, cfg, start.eval_batches, autocast)
                    log.eval(state, progress, found)
                if save and rank == 0:
                    facts = {**log.so_far(state), **log.identity, "finished": progress >= 1.0}
                    log.say(f"saved {state.save(start, facts)}")
        if stopping and progress < 1.0:
            log.say(f"stopped at step {state.step:,}; the same command continues")
            break
    log.close()
    ahead.close()
    if world > 1:
        # freeing the DDP wrapper holds the GIL and joins gloo's threads, which may still need it to
        # let go of the last reduction's tensors: a deadlock (torch 2.13). They get it in here
        dist.barrier(host)
        dist.destroy_process_group()
    return start.run


def read_command_line(args: list[str]) -> tuple[str, TrainConfig]:
    """Preset and settings; a branch has its stem's settings where none is given. ValueError (one
    line) for what a branch cannot be."""
    how = dict(args=args, description=__doc__, use_underscores=True)
    cfg = tyro.extras.overridable_config_cli(recipes.make_presets(), **how)
    if cfg.cooldown_from:
        stem = (find_checkpoints(cfg.cooldown_from) or [Path(cfg.cooldown_from)])[-1]
        if not (stem / "trainer.pt").is_file():
            raise ValueError(f"--cooldown_from {stem}: no checkpoint; give runs/x/ckpt/step_<step>")
        preset, trained = recipes.run_config(stem.parents[1])
        if args[0] != preset:
            raise ValueError(f"{stem} is of preset {preset}, not {args[0]}")
        name = f"{stem.parents[1].name}-cooldown-{int(stem.name[5:])}"
        inherited = replace(trained, data=(), start_from="", name=name)
        cfg = tyro.extras.overridable_config_cli({preset: ("", inherited)}, **how)
        cfg.cooldown_from, cfg.data = str(stem), cfg.data or trained.data
        for k in ("model", "optimizer", "max_steps", "max_tokens", "max_minutes"):
            if getattr(cfg, k) != getattr(trained, k):
                raise ValueError(f"a cool-down keeps its run's --{k}; --cooldown is its length")
    return args[0], cfg


def main() -> None:
    try:
        settings = read_command_line(sys.argv[1:])
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    train(*settings)


if __name__ == "__main__":
    main()
