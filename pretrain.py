"""Pretrain an encoder with masked language modelling.

    python pretrain.py mosaic-tiny --data data/docstrings --max_minutes 3          # a laptop, minutes
    python pretrain.py mosaic-base --data data/c4                                  # one GPU, the paper's recipe
    torchrun --nproc_per_node 8 pretrain.py mosaic-base --data data/c4             # one node: the same batches
    python pretrain.py nano-base --cooldown_from runs/nano-base/ckpt/step_00014000 # anneal a checkpoint of a run
    python pretrain.py mosaic-base --start_from mosaicml/mosaic-bert-base --data data/mine    # your own domain
    python pretrain.py mosaic-base --help                                          # every setting, with its default

The same command again continues a run where it was killed, or says that it is finished. Results go to
runs/<name>/: config.json, log.jsonl (one JSON object a line), ckpt/step_*/ (weights others can read + trainer state).

Expect (paper, 8×A100-80GB, 70,000 steps of 4,096×128 tokens, C4): MosaicBERT-Base reaches GLUE 79.6 after 1.1 hours,
83.2 after 4.6 hours. On today's GPUs with this code: not measured yet, see README.md.

Settings and schedules come from recipes.py, batches from batches.py, the model from model.py; this file is checkpoints
and the loop.
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
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from batches import Batch, Batches, count_masked, mask_tokens, one_mask_each
from corpus.shards import Corpus
from corpus.tokenizer import Tokenizer
from kernels import attention_backend, attention_tiles
from machine import device_name, git_revision, peak_tflops, pick_device, pick_dtype
from model import (
    NOT_IN_THE_WEIGHTS,
    EncoderConfig,
    MaskedLM,
    find_checkpoints,
    find_folder,
    flops_per_token,
    weights_checksum,
)
from recipes import (
    FREE_TO_CHANGE,
    Branch,
    Mixture,
    TrainConfig,
    batch_at,
    branch_off,
    check_config,
    done_at,
    known_settings,
    learning_rate,
    make_presets,
    masking_rate,
    mean_masking_rate,
    read_mixture,
    run_config,
)
from records import write_atomically

# tokens of one forward in evaluation: fixed, so that runs with other micro_tokens see the same tokens and masks
EVAL_MICRO_TOKENS = 8_192


# ----------------------------------------------------------------------------- what a run starts from


def corpus_digest(folder: str) -> str:
    """Names the exact corpus: meta.json holds a checksum of every file."""
    return hashlib.sha256((Path(folder) / "meta.json").read_bytes()).hexdigest()[:16]


def open_corpora(folders: list[str]) -> tuple[list[Corpus], list[Corpus], Tokenizer]:
    """Both splits of each folder, and the tokenizer they share. ValueError (one line) if they do not."""
    corpora = [Corpus(folder, "train") for folder in folders]
    tokenizers = [Tokenizer.load(c.folder) for c in corpora]
    for corpus, tokenizer in zip(corpora, tokenizers):
        if not tokenizer.same_as(tokenizers[0]):
            raise ValueError(
                f"{corpus.folder} and {corpora[0].folder} have different tokenizers; "
                f"prepare one with --tokenizer {corpora[0].folder}"
            )
    return corpora, [Corpus(folder, "val") for folder in folders], tokenizers[0]


def load_start(start_from: str, tokenizer: Tokenizer, data: str) -> MaskedLM:
    """Weights to continue pretraining from. ValueError (one line) if their vocabulary is not that of the data."""
    folder = find_folder(start_from)
    model = MaskedLM.from_pretrained(folder)
    n, rows = tokenizer.vocab_size, model.cfg.padded_vocab_size
    same = n <= rows < n + 128  # official tables are rounded up to a multiple of 64 or 128
    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer.meta.json").is_file():
        theirs = Tokenizer.load(folder)
        same &= tokenizer.same_as(theirs)
        what = "another tokenizer"
    else:  # the official MosaicBERT comes without one: it was trained with bert-base-uncased's
        same &= bool(tokenizer.hf)  # 30,528 entries is what a vocabulary of our own has too
        what = "another tokenizer (none is beside it, so bert-base-uncased's)"
    if not same:
        raise ValueError(
            f"--start_from {start_from}: trained with {what} than {data}; prepare the data with "
            "prepare_c4.py --tokenizer and its tokenizer"
        )
    return model


def look_back(
    preset: str, cfg: TrainConfig, run: Path, mixture: Mixture, tokenizer: Tokenizer
) -> tuple[dict, Path | None, MaskedLM | None]:
    """What this run is and what it begins from: the settings for its config.json, its own newest checkpoint, weights
    of --start_from; None where there is none. cfg.model gets the vocabulary of the data, or the shape of those weights.

    ValueError (one line) if the folder holds another run, or if it, the stem or the weights do not go with the data."""
    path, checkpoints = run / "config.json", find_checkpoints(run)
    if checkpoints and not path.is_file():
        raise ValueError(f"{run} has checkpoints but no config.json; put it back or choose another --name")
    old = known_settings(json.loads(path.read_text())["train"]) if checkpoints else {}
    start = None
    if cfg.start_from:
        default = make_presets()[preset][1].model
        asked = {k: v for k, v in asdict(cfg.model).items() if v != getattr(default, k)}
        if flags := [f"--model.{k}" for k in asked if k not in NOT_IN_THE_WEIGHTS]:
            raise ValueError(f"--start_from brings a shape of its own; leave out {' '.join(flags)}")
        if not old:
            start = load_start(cfg.start_from, tokenizer, mixture.folders[0])
        cfg.model = replace(start.cfg if start else EncoderConfig(**old["model"]), **asked)
    elif not cfg.cooldown_from:  # a branch keeps its stem's, whose table may have been brought by --start_from
        cfg.model.vocab_size = tokenizer.vocab_size
    data = {"corpus": [corpus_digest(f) for f in mixture.folders], "mixture": asdict(mixture) | {"folders": None}}
    settings = asdict(cfg) | {"preset": preset, "began_from": old.get("began_from")} | data
    if cfg.cooldown_from and not tokenizer.same_as(Tokenizer.load(cfg.cooldown_from)):
        raise ValueError(f"--cooldown_from {cfg.cooldown_from}: trained with another tokenizer than the data's")
    if cfg.cooldown_from and not old:
        stem = Path(cfg.cooldown_from).parents[1]
        stem_settings = json.loads((stem / "config.json").read_text())["train"]
        if list(cfg.data) == stem_settings["data"] and data["corpus"] != stem_settings["corpus"]:
            raise ValueError(f"{', '.join(mixture.folders)}: not the corpus {stem} was trained on")
    if settings["began_from"]:
        folder, checksum = settings["began_from"]
        if Path(folder).is_dir() and weights_checksum(Path(folder)) != checksum:
            raise ValueError(f"{run} began from other weights than {folder} has now; give another --name")
    elif cfg.cooldown_from or cfg.start_from:
        source = Path(cfg.cooldown_from) if cfg.cooldown_from else find_folder(cfg.start_from)
        settings["began_from"] = [str(source), weights_checksum(source)]
    settings = json.loads(json.dumps(settings))
    if differ := [k for k in settings if old and k not in FREE_TO_CHANGE and settings[k] != old.get(k)]:
        long = ("model", "corpus", "mixture")
        what = ", ".join(k if k in long else f"{k} {old.get(k)} -> {settings[k]}" for k in differ)
        raise ValueError(f"{run} holds a run with other settings ({what}); give this one another --name")
    return settings, checkpoints[-1] if checkpoints else None, start


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


def dollars(gpu_seconds: float, per_hour: float) -> float:
    """What a GPU of this price costs for so long."""
    return gpu_seconds / 3600 * per_hour


def make_optimizers(
    cfg: TrainConfig, model: MaskedLM, device: torch.device
) -> list[tuple[torch.optim.Optimizer, float]]:
    """(optimizer, its peak learning rate): AdamW on everything, as the paper (biases and norms decayed too), or Muon
    on the layers' matrices and AdamW on the rest."""
    adam = dict(lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=device.type != "mps")
    if cfg.optimizer == "adamw":
        return [(torch.optim.AdamW(model.parameters(), **adam), cfg.lr)]
    hidden = [p for p in model.encoder.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        (torch.optim.AdamW(rest, **adam), cfg.lr),
        (torch.optim.Muon(hidden, lr=cfg.muon_lr, weight_decay=cfg.weight_decay, momentum=0.95), cfg.muon_lr),
    ]


def build(source: Batches, m: int, use_triton: bool, device: torch.device) -> tuple[Batch, Tensor | None]:
    """Micro-batch m and, for the Triton kernels, the list of what to do in it, ready to be copied to the device."""
    batch = source(m)
    tiles = attention_tiles(batch.cu_seqlens) if use_triton else None
    if device.type == "cuda":  # pinned, so that the copy does not wait
        batch.input_ids, batch.special = batch.input_ids.pin_memory(), batch.special.pin_memory()
        batch.cu_seqlens, tiles = batch.cu_seqlens.pin_memory(), tiles.pin_memory() if tiles is not None else None
    return batch, tiles


def model_inputs(
    ids: Tensor,
    cu_seqlens: Tensor,
    tiles: Tensor | None,
    masked_idx: Tensor,
    labels: Tensor,
    seq_len: int,
    device: torch.device,
) -> dict:
    """A flat, masked batch as arguments of MaskedLM: ids (T,), cu_seqlens (B+1,), masked_idx and labels (M,)."""
    flat = dict(cu_seqlens=cu_seqlens.to(device, non_blocking=True), masked_idx=masked_idx, labels=labels)
    if tiles is not None:
        flat["tiles"] = tiles.to(device, non_blocking=True)
    for t in flat.values():  # their lengths vary; without this, a compilation for each
        torch._dynamo.maybe_mark_dynamic(t, 0)
    return dict(input_ids=ids, max_seqlen=seq_len, **flat)


def train(preset: str, cfg: TrainConfig) -> Path:
    """Run or continue one pretraining; returns the run folder."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_config(cfg, world)
    run, mixture = Path(cfg.out) / (cfg.name or preset), read_mixture(cfg.data)
    try:
        device = pick_device(cfg.device, int(os.environ.get("LOCAL_RANK", 0)))
        corpora, val_corpora, tokenizer = open_corpora(mixture.folders)
        settings, own, start = look_back(preset, cfg, run, mixture, tokenizer)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    check_config(cfg, world)  # once more: the shape may be that of the weights it starts from
    # a run goes on from its own newest checkpoint, a branch begins at its stem's
    origin = own or (Path(cfg.cooldown_from) if cfg.cooldown_from else None)
    progress = json.loads((origin / "progress.json").read_text()) if origin else {}
    if device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise SystemExit(f"error: more processes than the {torch.cuda.device_count()} GPUs of this machine")
    dtype = pick_dtype(cfg.dtype, device)
    stream = (cfg.micro_tokens, cfg.documents, cfg.seed, mixture.shares)
    batches = Batches(corpora, tokenizer, cfg.seq_len, *stream)
    eval_stream = (min(EVAL_MICRO_TOKENS, cfg.eval_tokens), "all", 0, mixture.shares)
    eval_batches = Batches(val_corpora, tokenizer, cfg.seq_len, *eval_stream)

    if own and progress.get("finished"):
        print(f"{run} is finished: {own}")
        return run

    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    control = dist.new_group(backend="gloo") if world > 1 else None  # host-side agreement, no device sync

    # -- model and optimizers
    torch.manual_seed(cfg.seed)
    model = MaskedLM(cfg.model).to(device)
    optimizers = make_optimizers(cfg, model, device)
    step, tokens, micro, seconds = 0, 0, 0, 0.0
    branch, changed_at = None, None  # micro-batch at which the shares of the corpora changed
    if start:
        model.load_state_dict(start.state_dict())
    if origin:
        model.load_state_dict(MaskedLM.from_pretrained(origin).state_dict())
        trainer = torch.load(origin / "trainer.pt", map_location=device, weights_only=True)
        for (optimizer, _), state in zip(optimizers, trainer["optimizers"]):
            optimizer.load_state_dict(state)
        step, tokens, micro, seconds = (trainer[k] for k in ("step", "tokens", "micro", "train_seconds"))
        branch, changed_at = trainer["branch"] and Branch(**trainer["branch"]), trainer["changed_at"]
    if cfg.cooldown_from and not own:
        branch = branch_off(run_config(origin.parents[1])[1], branch, cfg.cooldown, trainer)
        if branch.done < mixture.change:  # data of the branch's own, whose change has not come
            changed_at = None
    if changed_at is not None:
        batches.change_shares(changed_at, mixture.later)
    use_compile = cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda")
    forward = torch.compile(model) if use_compile else model
    if world > 1:
        # the only buffers are ALiBi's slopes, the same everywhere: broadcasting them would cost a collective a step
        ids = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 renames the argument
            forward = DistributedDataParallel(forward, device_ids=ids, broadcast_buffers=False)
        if cfg.grad_reduce == "bfloat16":
            # inside a lambda: by its name torch refuses this hook on gloo, which does add up bfloat16
            forward.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))

    # -- what is said about it
    gpus = world if device.type == "cuda" else 0
    price = cfg.gpu_dollars_per_hour if gpus else 0.0
    family = preset.split("-")[0]
    if "family" in progress:
        family = progress["family"]
    elif cfg.start_from:
        family = "bert" if cfg.model.position == "learned" else "mosaic"
    hardware = device_name(device)
    dropout = cfg.model.attention_dropout
    backend, reason = attention_backend(device.type, cfg.model.attention, dropout)
    identity = dict(
        run=run.name, family=family, preset=preset, device=hardware, world_size=world, revision=git_revision()
    )
    n_params = model.n_params()
    flops = flops_per_token(cfg.model, batches.effective_length(), mean_masking_rate(cfg.masking))
    peak = peak_tflops(hardware) if gpus else None
    log_file = board = None
    if rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        config = {"train": settings, "model": asdict(cfg.model), "n_params": n_params, **identity}
        write_atomically(run / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        for leftover in run.glob("ckpt/step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        mode = "a" if own else "w"  # what a run wrote that died before its first checkpoint is of no use
        log_file = open(run / "log.jsonl", mode, buffering=1)  # noqa: SIM115 (lives as long as the process)
        if log_file.tell() and (run / "log.jsonl").read_bytes()[-1:] != b"\n":
            log_file.write("\n")  # a kill has cut the last line
        if cfg.wandb:
            import wandb

            fixed = {k: v for k, v in settings.items() if k not in FREE_TO_CHANGE}
            name = f"{run.name}-{hashlib.sha256(json.dumps(fixed).encode()).hexdigest()[:8]}"
            board = wandb.init(project="nanoMosaicBERT", id=name, name=run.name, config=config, resume="allow")
        default = make_presets()[preset][1]
        changed = [
            f"{prefix}{f.name}={getattr(a, f.name)}"
            for a, b, prefix in ((cfg, default, ""), (cfg.model, default.model, "model."))
            for f in fields(a)
            if f.name != "model" and getattr(a, f.name) != getattr(b, f.name)
        ]
        shape = f", shape of {cfg.start_from}" if cfg.start_from else ""
        print(f"{preset}{shape}: {n_params:,} parameters, changed: {', '.join(changed) or 'nothing'}")
        print(f"attention: {backend} ({reason}); {world} × {hardware}, {str(dtype).removeprefix('torch.')}")
        n_documents, n_tokens, epoch = sum(map(len, corpora)), sum(c.n_tokens for c in corpora), batches.epoch_tokens()
        planned = branch.length if branch else cfg.max_tokens or cfg.max_steps * cfg.batch_tokens
        epochs = "" if cfg.max_minutes or mixture.shares else f"; {planned / epoch:.3g} epochs planned"
        print(f"data: {n_documents:,} documents, {n_tokens:,} tokens")
        print(f"an epoch: {batches.n_windows:,} windows, {epoch:,} tokens with [CLS] and [SEP]{epochs}")
        if device.type == "cpu" and cfg.micro_tokens > 8_192:
            print(f"on a CPU --micro_tokens {cfg.micro_tokens} takes many GB and minutes a step; 4096 is plenty")
        if own:
            print(f"continuing at step {step:,} from {origin}")
        elif branch:
            print(f"annealing {origin} over {branch.length:,} tokens, from {tokens:,} to {tokens + branch.length:,}")

    def log(kind: str, **values) -> None:
        if log_file:
            log_file.write(json.dumps({"type": kind, **values}) + "\n")
        if board and kind != "header" and "step" in values:
            numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
            board.log(numbers, step=values["step"])

    log(
        "header",
        step=step,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["pretrain.py", *sys.argv[1:]]),
        torch=torch.__version__,
        n_params=n_params,
        flops_per_token=flops,
        gpu_dollars_per_hour=price,
        cooldown_from=cfg.cooldown_from,
        **identity,
    )

    # what earlier lives of this run cost, perhaps on another number of GPUs; a branch has cost what its stem had
    resumed_at = seconds
    paid_seconds, paid_dollars = progress.get("gpu_seconds", 0.0), progress.get("dollars", 0.0)

    def spent(train_seconds: float) -> dict:
        gpu_seconds = (train_seconds - resumed_at) * world
        return {
            "train_seconds": round(train_seconds, 3),
            "gpu_seconds": round(paid_seconds + gpu_seconds, 3),
            "dollars": round(paid_dollars + dollars(gpu_seconds, price), 4),
        }

    use_triton = backend == "triton"

    def loss_of(m: int, batch: Batch, tiles: Tensor | None, seed: int, rate: float, source: Batches):
        """Loss summed over the masked tokens, and how many were guessed right."""
        corruption = cfg.corruption if source is batches else "80/10/10"
        n_masked = count_masked(source, m, rate)
        ids, masked_idx, labels = mask_tokens(batch, tokenizer, n_masked, corruption, seed, m, device)
        return guess(ids, batch.cu_seqlens, tiles, masked_idx, labels)

    def guess(*flat: Tensor | None):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return forward(**model_inputs(*flat, cfg.seq_len, device))

    sums_device = "cpu" if device.type == "mps" else device  # MPS has no float64

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        """On validation tokens and 15 % masks that depend on the data and seq_len and nothing else."""
        model.eval()
        totals = torch.zeros(5, dtype=torch.float64, device=sums_device)
        for m in range(rank, max(1, cfg.eval_tokens // eval_batches.micro_tokens), world):
            loss, right = loss_of(m, *build(eval_batches, m, use_triton, device), 0, 0.15, eval_batches)
            totals[:2] += torch.stack([loss, right]).to(totals)
            totals[2] += count_masked(eval_batches, m, 0.15)
        alone = one_mask_each(eval_batches(0), tokenizer, cfg.pppl_tokens, EVAL_MICRO_TOKENS)
        for ids, cu_seqlens, masked_idx, labels in list(alone)[rank::world]:
            tiles = attention_tiles(cu_seqlens) if use_triton else None
            loss, _ = guess(ids.to(device), cu_seqlens, tiles, masked_idx.to(device), labels.to(device))
            totals[3:] += torch.stack([loss, loss.new_tensor(len(labels))]).to(totals)
        if world > 1:
            dist.all_reduce(totals)
        model.train()
        loss_sum, right, count, alone_sum, alone_count = totals.tolist()
        found = {"loss": round(loss_sum / count, 5), "accuracy": round(right / count, 5)}
        if alone_count:  # Salazar et al. 2020, arXiv 1910.14659
            found["pseudo_perplexity"] = round(math.exp(min(alone_sum / alone_count, 700.0)), 3)
        return found

    def over_at(step: int, tokens: int, seconds: float) -> float:
        """Share of this run, or of this branch, that is over."""
        return branch.over(tokens) if branch else done_at(cfg, step, tokens, seconds)

    def due(every: float, step: int, before: float, after: float) -> bool:
        """Whether an event that happens every `every` (share of the run, or steps) falls into this step."""
        if every >= 1:
            return step % int(every) == 0
        return math.floor(after / every + 1e-9) > math.floor(before / every + 1e-9)

    def diverged(what: str) -> SystemExit:
        good = (find_checkpoints(run) or ["none"])[-1]
        message = f"error: {what}; last good checkpoint: {good}; try a lower --lr or --grad_clip 1 under another --name"
        return SystemExit(message if rank == 0 else 1)

    # -- signals: finish the step, save, leave
    asked_to_stop = False

    def stop_soon(signum, frame):
        nonlocal asked_to_stop
        asked_to_stop = True

    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, stop_soon)

    coming = itertools.count(micro + rank, world)  # the micro-batches of this process
    pool = ThreadPoolExecutor(1)  # the next micro-batch is built while this one is computed
    ahead = pool.submit(build, batches, next(coming), use_triton, device)
    bar = tqdm(total=100, unit="%", disable=rank != 0 or not sys.stderr.isatty(), bar_format="{l_bar}{bar}| {postfix}")
    model.train()

    over = over_at(step, tokens, seconds)  # not the clock: ranks must agree
    if use_compile or use_triton:  # one forward and backward for nothing: compilation is not counted as training
        loss_of(micro + rank, *ahead.result(), cfg.seed, masking_rate(cfg.masking, 0.5), batches)[0].backward()
        for p in model.parameters():
            p.grad = None
        if gpus:
            torch.cuda.synchronize()
    clock = Clock(seconds, device)
    clock.start()
    window = torch.zeros(2, dtype=torch.float64, device=sums_device)  # loss summed, right guesses
    skipped, skipped_in_a_row = trainer["skipped"] if origin else (0, 0)
    window_masked, window_tokens, window_documents, window_step, window_start = 0, 0, 0, step, clock.now()
    while over < 1.0:
        done = branch.schedule(over) if branch else over
        rate = masking_rate(cfg.masking, done)
        factor = branch.learning_rate(cfg, over) if branch else learning_rate(cfg, done)
        batch_tokens = batch_at(cfg, tokens)
        n_micro = batch_tokens // cfg.micro_tokens  # over all processes
        # the loss is a sum; dividing by the masked tokens of the whole batch makes the mean right whatever the split
        total_masked = sum(count_masked(batches, m, rate) for m in range(micro, micro + n_micro))
        if changed_at is None and done >= mixture.change:  # from the next step on: this one's batches are on their way
            changed_at = micro + n_micro
            batches.change_shares(changed_at, mixture.later)
        sums = torch.zeros_like(window)
        for i in range(n_micro // world):
            (batch, tiles), m = ahead.result(), micro + rank + i * world
            ahead = pool.submit(build, batches, next(coming), use_triton, device)
            torch.manual_seed(cfg.seed * 1_000_003 + m)  # dropout too depends on nothing but the micro-batch
            last = i == n_micro // world - 1
            with nullcontext() if last or world == 1 else forward.no_sync():
                loss, right = loss_of(m, batch, tiles, cfg.seed, rate, batches)
                (loss * (world / total_masked)).backward()  # DDP averages over processes: undo that
            sums += torch.stack([loss.detach(), right]).to(sums)
            window_documents += batch.n_documents * world
        if cfg.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        step, tokens, micro = step + 1, tokens + batch_tokens, micro + n_micro
        window_tokens += batch_tokens
        # the gradient is summed over processes, so all of them see the same
        if cfg.skip_nan and not bool(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).isfinite()):
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            if not bool(sums.isfinite().all()):
                tqdm.write(f"step {step:,}: skipped, the loss of rank {rank} is not finite")
            elif rank == 0:
                tqdm.write(f"step {step:,}: skipped, the gradient is not finite")
            if skipped_in_a_row == 20:
                raise diverged(f"20 steps in a row were skipped, until step {step:,}")
        else:
            skipped_in_a_row = 0
            for optimizer, peak_lr in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = peak_lr * factor
                optimizer.step()
            window += sums
            window_masked += total_masked
        for optimizer, _ in optimizers:
            optimizer.zero_grad(set_to_none=True)

        before, elapsed, stopping = over, clock.now(), asked_to_stop  # a signal may come at any moment: read it once
        if world > 1:  # one clock and one decision for all
            agreed = torch.tensor([elapsed, float(stopping)], dtype=torch.float64)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=control)
            elapsed, stopping = agreed[0].item(), bool(agreed[1])
        over = over_at(step, tokens, elapsed)
        finished = over >= 1.0
        leaving = finished or stopping

        if step % cfg.log_every == 0 or leaving:
            all_sums = [window]
            if world > 1:
                all_sums = [torch.empty_like(window) for _ in range(world)]
                dist.all_gather(all_sums, window)
            per_rank = torch.stack(all_sums).tolist()  # the only wait for the device, every log_every steps
            loss_sum, right = map(sum, zip(*per_rank))
            seconds = clock.now() - window_start
            tok_per_s = window_tokens / seconds
            mean_loss, accuracy = loss_sum / max(window_masked, 1), right / max(window_masked, 1)
            mfu = tok_per_s * flops / (peak * 1e12 * world) if peak else None
            padding_avoided = 1.0 - window_tokens / (window_documents * cfg.seq_len)
            log(
                "train",
                step=step,
                tokens=tokens,
                loss=round(mean_loss, 5) if window_masked else None,  # every step was skipped
                accuracy=round(accuracy, 5) if window_masked else None,
                lr=cfg.lr * factor,
                masking=round(rate, 4),
                batch_tokens=batch_tokens,
                skipped_steps=skipped,
                tok_per_s=round(tok_per_s),
                mfu=mfu and round(mfu, 4),
                padding_avoided=round(padding_avoided, 4),
                peak_mem_gb=round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpus else None,
                **spent(elapsed),
            )
            where = f"in step {step:,}" if step == window_step + 1 else f"in steps {window_step + 1:,} to {step:,}"
            if not math.isfinite(mean_loss):
                bad = [str(r) for r, (s, _) in enumerate(per_rank) if not math.isfinite(s)]
                who = "all ranks" if 1 < len(bad) == world else f"rank {', '.join(bad)}"
                raise diverged(f"the loss is {mean_loss} {where} ({who})")
            if mean_loss > 2 * math.log(cfg.model.vocab_size):  # knowing nothing costs log(vocabulary)
                raise diverged(f"the loss has exploded to {mean_loss:.1f} {where} (all ranks)")
            learnt = f"loss {mean_loss:.3f} acc {accuracy:.3f}" if window_masked else "all steps skipped"
            line = (
                f"step {step:,} {min(over, 1):4.0%} | {learnt} | "
                f"lr {cfg.lr * factor:.1e} mask {rate:.2f} | {tok_per_s:,.0f} tok/s"
                + (f" MFU {mfu:.1%}" if mfu else "")
                + f" | {elapsed:,.0f} s"
            )
            if rank == 0 and bar.disable and (step % (10 * cfg.log_every) == 0 or leaving):
                print(line, flush=True)
            bar.set_postfix_str(line)
            bar.update(min(over, 1) * 100 - bar.n)
            window.zero_()
            window_masked, window_tokens, window_documents, window_step, window_start = 0, 0, 0, step, clock.now()

        checkpoint_due = leaving or due(cfg.checkpoint_every, step, before, over)
        if checkpoint_due or due(cfg.eval_every, step, before, over):
            clock.stop()
            if checkpoint_due and not all(bool(w.isfinite().all()) for w in model.parameters()):
                raise diverged(f"the weights are not finite after step {step:,} (all ranks)")
            if finished or not stopping:  # who asks to stop may not wait long: save at once
                found = evaluate()
                log("eval", step=step, tokens=tokens, **found, **spent(clock.seconds))
                if rank == 0:
                    said = f"validation loss {found['loss']:.3f} acc {found['accuracy']:.3f}"
                    tqdm.write(f"step {step:,} {min(over, 1):4.0%} | {said}")
            if checkpoint_due and rank == 0:
                counters = {"step": step, "tokens": tokens, "micro": micro, "train_seconds": clock.seconds}
                counters |= {"branch": branch and asdict(branch), "changed_at": changed_at}
                counters |= {"skipped": (skipped, skipped_in_a_row)}
                trainer = {"optimizers": [optimizer.state_dict() for optimizer, _ in optimizers], **counters}
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
    if board:
        board.finish()
    if world > 1:
        dist.destroy_process_group()
    return run


def find_stem(args: list[str]) -> Path | None:
    """The checkpoint that --cooldown_from names on the command line (a run folder: its newest), if it is there."""
    for i, arg in enumerate(args):
        flag, _, value = arg.partition("=")
        if flag.replace("-", "_") == "__cooldown_from":
            path = Path(value or next(iter(args[i + 1 :]), ""))
            path = (find_checkpoints(path) or [path])[-1]
            if not (path / "trainer.pt").is_file():
                raise SystemExit(f"error: --cooldown_from {path}: no checkpoint; give runs/<name>/ckpt/step_<number>")
            return path
    return None


def main() -> None:
    """Command line: preset first, then any setting. A branch has its stem's settings where none is given."""
    presets, args = make_presets(), sys.argv[1:]
    if args and not args[0].startswith("-") and args[0] not in presets:
        raise SystemExit(f"error: unknown preset {args[0]!r}; choose from {', '.join(presets)}")
    stem = find_stem(args)
    if stem:
        try:
            preset, stem_cfg = run_config(stem.parents[1])
        except ValueError as e:
            raise SystemExit(f"error: {e}") from None
        if args[0] != preset:
            raise SystemExit(f"error: {stem} is of preset {preset}, not {args[0]}")
        name = f"{stem.parents[1].name}-cooldown-{int(stem.name[5:])}"
        inherited = replace(stem_cfg, data=(), start_from="", name=name)
        presets = {preset: (presets[preset][0], inherited)}
    cfg = tyro.extras.overridable_config_cli(presets, description=__doc__, use_underscores=True)
    if stem:
        cfg.cooldown_from, cfg.data = str(stem), cfg.data or stem_cfg.data
        if (cfg.model, cfg.optimizer) != (stem_cfg.model, stem_cfg.optimizer):
            raise SystemExit("error: a cool-down keeps the --model and the --optimizer of its run")
        if any(getattr(cfg, k) != getattr(stem_cfg, k) for k in ("max_steps", "max_tokens", "max_minutes")):
            raise SystemExit("error: --cooldown alone says how long a cool-down is; leave out --max_steps and the like")
    train(args[0], cfg)


if __name__ == "__main__":
    main()
