"""What a pretraining run says and what it costs. log.jsonl holds one JSON object a line: a "header"
each time the run is begun or continued, "train" every --log_every steps, "eval" per evaluation."""

import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from checkpoint import Start, State
from kernels import attention_backend
from machine import device_name, git_revision, peak_tflops, pick_dtype, processes
from model import find_checkpoints, flops_per_token
from recipes import FREE_TO_CHANGE, PLACES, TrainConfig, flat, make_presets, mean_masking_rate
from records import to_json, write_atomically


class Clock:
    """Seconds of training from now on: evaluation, saving and compilation are not counted."""

    def __init__(self, seconds: float, device: torch.device):
        self.seconds, self.device, self.since = seconds, device, time.perf_counter()

    def now(self) -> float:
        return self.seconds + time.perf_counter() - self.since

    @contextmanager
    def paused(self) -> Iterator[None]:
        if self.device.type == "cuda":  # what is queued belongs to training
            torch.cuda.synchronize()
        self.seconds = self.now()
        yield
        self.since = time.perf_counter()


class RunLog:
    """Log and costs of one run. Every process calls it; the first one prints and writes."""

    def __init__(self, preset: str, cfg: TrainConfig, start: Start, state: State,
                 host: dist.ProcessGroup | None = None):
        self.cfg, self.run, self.host, paid = cfg, start.run, host, start.progress
        self.rank, self.world = processes()
        self.device = device = next(state.model.parameters()).device
        name, on_gpu = device_name(device), device.type == "cuda"
        self.price = cfg.gpu_dollars_per_hour if on_gpu else 0.0
        self.peak = peak_tflops(name) if on_gpu else None
        rate, length = mean_masking_rate(cfg.masking), start.batches.effective_length()
        stem = 0.0 if state.branch else 1.0 - cfg.cooldown
        narrow = 1 + stem * (min(cfg.narrow_layers, cfg.model.n_layers) - 1)
        self.flops = flops_per_token(cfg.model, length, rate, narrow)
        if start.teacher:  # forward only
            self.flops += flops_per_token(start.teacher.cfg, length, rate) / 3
        # earlier lives of the run, perhaps on other GPUs; a branch has cost what its stem had
        self.paid = state.train_seconds, paid.get("gpu_seconds", 0.0), paid.get("dollars", 0.0)
        family = preset.split("-")[0]
        if cfg.start_from:
            family = "bert" if cfg.model.position == "learned" else "mosaic"
        self.identity = dict(
            run=start.run.name, family=paid.get("family", family), preset=preset, device=name,
            world_size=self.world, revision=git_revision())
        sums_on = "cpu" if device.type == "mps" else device  # MPS has no float64
        self.sums = torch.zeros(2, dtype=torch.float64, device=sums_on)
        self.clear(state)
        silent = self.rank > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=100, unit="%", disable=silent, bar_format="{l_bar}{bar}| {postfix}")
        self.file = self.board = None
        if self.rank == 0:
            self.open(start, state.model.n_params())
            self.banner(start, state)

    def open(self, start: Start, n_params: int) -> None:
        """config.json, log.jsonl and, if asked for, the run on Weights & Biases."""
        config = {"train": start.settings, "model": asdict(self.cfg.model),
                  "n_params": n_params, **self.identity}
        write_atomically(self.run / "config.json", to_json(config))
        path = self.run / "log.jsonl"
        torn = start.own and path.is_file() and not path.read_bytes().endswith(b"\n")
        # of a run that never saved, what it wrote is of no use
        self.file = open(path, "a" if start.own else "w", buffering=1)  # noqa: SIM115
        self.file.write("\n" if torn else "")  # a kill has cut the last line
        self.write(
            "header", step=self.since[0], time=datetime.now(UTC).isoformat(timespec="seconds"),
            command=shlex.join(["pretrain.py", *sys.argv[1:]]), torch=torch.__version__,
            n_params=n_params, flops_per_token=self.flops, gpu_dollars_per_hour=self.price,
            cooldown_from=self.cfg.cooldown_from, **self.identity)
        if self.cfg.wandb:
            import wandb

            fixed = {k: v for k, v in start.settings.items() if k not in FREE_TO_CHANGE | PLACES}
            key = hashlib.sha256(json.dumps(fixed).encode()).hexdigest()[:8]
            self.board = wandb.init(project="nanoMosaicBERT", id=f"{self.run.name}-{key}",
                                    name=self.run.name, config=config, resume="allow")

    def banner(self, start: Start, state: State) -> None:
        """What is about to run: settings, attention, data, where it goes on."""
        cfg, branch, batches = self.cfg, state.branch, start.batches
        preset, device = self.identity["preset"], self.identity["device"]
        now, default = (flat(asdict(c)) for c in (cfg, make_presets()[preset][1]))
        changed = [f"{k}={v}" for k, v in now.items() if v != default[k]]
        print(f"{preset}: {state.model.n_params():,} parameters, changed: {', '.join(changed)}")
        asked = cfg.model.attention, cfg.model.attention_dropout
        attention, reason = attention_backend(self.device.type, *asked)
        dtype = str(pick_dtype(cfg.dtype, self.device)).removeprefix("torch.")
        print(f"attention: {attention} ({reason}); {self.world} × {device}, {dtype}")
        n_documents, n_tokens = len(batches.lengths), sum(c.n_tokens for c in batches.corpora)
        length = branch.length if branch else cfg.max_tokens or cfg.max_steps * cfg.batch_tokens
        epoch, mixed = batches.epoch_tokens(), start.settings["shares"]
        epochs = "" if cfg.max_minutes or mixed else f"; {length / epoch:.3g} epochs planned"
        print(f"data: {n_documents:,} documents, {n_tokens:,} tokens; an epoch: "
              f"{batches.n_windows:,} windows, {epoch:,} tokens with [CLS] and [SEP]{epochs}")
        if start.own:
            print(f"continuing at step {state.step:,} from {start.own}")
        elif branch:
            print(f"annealing {start.checkpoint} over {branch.length:,} tokens, "
                  f"from {state.tokens:,} to {state.tokens + branch.length:,}")

    def write(self, kind: str, **values) -> None:
        """One line of log.jsonl; its numbers to Weights & Biases."""
        if self.file:
            self.file.write(json.dumps({"type": kind, **values}) + "\n")
        if self.board and kind != "header":
            step = values.pop("step")
            self.board.log({f"{kind}/{k}": v for k, v in values.items() if v is not None}, step)

    def so_far(self, state: State) -> dict[str, float]:
        """Steps, tokens and costs of the whole run."""
        began_at, paid_seconds, paid_dollars = self.paid
        gpu_seconds = (state.train_seconds - began_at) * self.world
        return {"step": state.step, "tokens": state.tokens,
                "train_seconds": round(state.train_seconds, 3),
                "gpu_seconds": round(paid_seconds + gpu_seconds, 3),
                "dollars": round(paid_dollars + gpu_seconds / 3600 * self.price, 4)}

    def clear(self, state: State) -> None:
        """Begin to sum up for the next line."""
        self.sums.zero_()
        self.n_masked = self.n_documents = 0
        self.since = state.step, state.tokens, state.train_seconds

    def add(self, loss: Tensor, n_correct: Tensor, n_masked: int, n_documents: int) -> None:
        """Count a micro-batch of this process: loss summed over its masked tokens, and how many of
        them were predicted right. No wait for the device."""
        self.sums += torch.stack([loss.detach(), n_correct]).to(self.sums)
        self.n_masked, self.n_documents = self.n_masked + n_masked, self.n_documents + n_documents

    def train(self, state: State, progress: float, lr: float, rate: float, last: bool) -> None:
        """A line about the steps since the one before; the only wait for the device. SystemExit if
        their loss is not finite or more than twice what knowing nothing costs, log(vocabulary)."""
        step, tokens, seconds = self.since
        own = [*self.sums.tolist(), self.n_masked, self.n_documents]
        sums = torch.tensor(own, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(sums, group=self.host)
        loss, n_correct, n_masked, n_documents = sums.tolist()
        loss, accuracy, tokens = loss / n_masked, n_correct / n_masked, state.tokens - tokens
        tok_per_s = tokens / (state.train_seconds - seconds)
        mfu = tok_per_s * self.flops / (self.peak * 1e12 * self.world) if self.peak else None
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        self.write(
            "train", **self.so_far(state), loss=round(loss, 5), accuracy=round(accuracy, 5), lr=lr,
            masking=round(rate, 4), tok_per_s=round(tok_per_s), mfu=mfu and round(mfu, 4),
            peak_mem_gb=memory and round(memory / 2**30, 2),
            padding_avoided=round(1 - tokens / (n_documents * self.cfg.seq_len), 4))
        if not loss < 2 * math.log(self.cfg.model.vocab_size):  # so nan, too
            raise self.diverged(f"the loss is {loss:.1f} in steps {step + 1:,} to {state.step:,}")
        line = (f"step {state.step:,} {min(progress, 1):4.0%} | loss {loss:.3f} acc {accuracy:.3f}"
                f" | lr {lr:.1e} mask {rate:.2f} | {tok_per_s:,.0f} tok/s"
                f"{f' MFU {mfu:.1%}' if mfu else ''} | {state.train_seconds:,.0f} s")
        if self.bar.disable and (state.step % (10 * self.cfg.log_every) == 0 or last):
            self.say(line)
        self.bar.set_postfix_str(line)
        self.bar.update(min(progress, 1) * 100 - self.bar.n)
        self.clear(state)

    def eval(self, state: State, progress: float, found: dict[str, float]) -> None:
        """A line about an evaluation, `found` by pretrain.evaluate()."""
        self.write("eval", **self.so_far(state), **found)
        self.say(f"step {state.step:,} {min(progress, 1):4.0%} | "
                 f"validation loss {found['loss']:.3f} acc {found['accuracy']:.3f}")

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def diverged(self, what: str) -> SystemExit:
        """The end of a run that cannot go on, in the words of the first process."""
        good = (find_checkpoints(self.run) or ["none"])[-1]
        text = f"error: {what}; last good checkpoint: {good}; try a lower --lr or --grad_clip 1"
        return SystemExit(f"{text} under another --name" if self.rank == 0 else 1)

    def close(self) -> None:
        self.bar.close()
        if self.board:
            self.board.finish()
