"""What a pretraining run is: every setting, the recipes, and the schedules as pure functions.

    python pretrain.py mosaic-base --help          # this file, as flags

mosaic-*, bert-*: the recipe of the paper (Portes et al. 2023, arXiv 2312.17482) for either shape; its small and tiny
sizes are for CPUs and have a recipe of their own. nano-*: MosaicBERT's shape with what has won since (LOG.md).
"""

import importlib.util
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import tyro

from model import PRESETS, EncoderConfig


@dataclass
class TrainConfig:
    """One run. Shares are of the whole run, whose length is max_steps, max_tokens or max_minutes."""

    # folders made by prepare_c4.py, default data/c4. Several are read as one: --data a --data b; as a mixture with
    # shares of documents (of windows, with --documents all): --data a:0.7 --data b:0.3; with other shares from a
    # place of the run on: --data a:0.7:0.2@0.8 --data b:0.3:0.8@0.8
    data: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    name: str = ""  # run folder under `out`; default: the preset's name
    out: str = "runs"
    model: EncoderConfig = field(default_factory=EncoderConfig)

    start_from: str = ""  # weights and shape to begin with: own checkpoint, MosaicBERT or BERT (folder or hub name)
    cooldown_from: str = ""  # checkpoint whose run to branch off: anneal it over the last `cooldown` of the new whole

    max_steps: int = 70_000  # length of the run in optimizer steps; used where the next two are 0
    max_tokens: int = 0  # ... or in real tokens
    max_minutes: float = 0.0  # ... or in minutes of training: the schedules follow the clock

    seq_len: int = 128  # tokens a document is cut at, [CLS] and [SEP] counted
    documents: Literal["first", "all"] = "first"  # first: one window of each (the paper); all: every window
    batch_tokens: int = 524_288  # tokens of a step over all processes (the paper: 4,096 × 128)
    ramp_from: int = 0  # tokens of the first step; the batch grows from here to batch_tokens in steps of this size
    ramp_tokens: int = 0  # ... over this many tokens; 0: no ramp
    micro_tokens: int = 65_536  # tokens of one forward and backward; lower it when memory runs out

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on the hidden matrices, adamw on everything else
    lr: float = 5e-4  # peak learning rate of adamw
    muon_lr: float = 0.02  # peak learning rate of muon
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.02  # as torch counts it, times lr: 0.02 × 5e-4 is the paper's 1e-5
    grad_clip: float = 0.0  # largest gradient norm; 0: none, as the paper
    schedule: Literal["linear", "wsd"] = "linear"  # after the warm-up; wsd: flat, then down
    warmup: float = 0.06  # share of the run
    cooldown: float = 0.2  # wsd and cooldown_from: share of the run at the end that anneals
    final_lr: float = 0.02  # learning rate at the end, as a share of the peak

    masking: str = "constant:0.3"  # constant:p | linear:p:q | cosine:p:q | step:p:q@share
    corruption: Literal["80/10/10", "mask"] = "80/10/10"  # masked tokens: [MASK]/random/kept, or all [MASK]

    eval_every: float = 0.05  # share of the run (below 1) or steps
    eval_tokens: int = 1_048_576  # of the validation split; for one seq_len always the same tokens and 15 % masks
    pppl_tokens: int = 1_024  # of these, masked one at a time for the pseudo-perplexity; 0: none
    checkpoint_every: float = 0.1  # share of the run (below 1) or steps; all are kept
    log_every: int = 10  # steps
    wandb: bool = False  # also log to Weights & Biases (pip install wandb)
    skip_nan: bool = False  # leave out a step whose gradient is not finite, at the price of a wait for the device each

    seed: int = 17
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls; weights stay float32
    grad_reduce: Literal["float32", "bfloat16"] = "float32"  # dtype in which processes add up their gradients
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on for CUDA
    gpu_dollars_per_hour: float = 2.2  # assumed price of one GPU; a CPU is counted as free


# what may differ when a run is continued; everything else would make it another run
FREE_TO_CHANGE = {
    "out",
    "eval_every",
    "checkpoint_every",
    "log_every",
    "wandb",
    "gpu_dollars_per_hour",
    "device",
    "compile",
}

PAPER = dict(lr=5e-4, weight_decay=0.02)
# BERT-large and MosaicBERT-Large: lr 2e-4 and the same decoupled decay, 1e-5 / 2e-4 = 0.05
PAPER_LARGE = dict(lr=2e-4, weight_decay=0.05, max_steps=178_000, micro_tokens=32_768)
LAPTOP = dict(  # small encoders, minutes on two cores: documents are scarce, so every window is used
    documents="all",
    batch_tokens=4_096,
    micro_tokens=4_096,
    optimizer="muon",  # validation loss 4.93 against adamw's 5.32 after the same 2.5 M tokens (LOG.md, 2026-11-20)
    lr=2e-3,
    eval_every=0.1,
    eval_tokens=65_536,
    pppl_tokens=256,
    max_steps=2_000,
)
NANO = dict(optimizer="muon", schedule="wsd", masking="linear:0.3:0.15")
# the small ones, by ablations on nano-tiny with three seeds (LOG.md, 2026-11-21)
NANO_LAPTOP = NANO | dict(muon_lr=0.01, masking="constant:0.4")


def make_presets() -> dict[str, tuple[str, TrainConfig]]:
    """Name -> (one line of help, its TrainConfig)."""
    presets = {}
    for name, shape in PRESETS.items():
        family, size = name.split("-")
        recipe, ours = {"base": (PAPER, NANO), "large": (PAPER_LARGE, NANO)}.get(size, (LAPTOP, NANO_LAPTOP))
        recipe = recipe | dict(masking="constant:0.3" if family == "mosaic" else "constant:0.15")
        line = f"{shape['n_layers']} layers, {shape['d_model']} wide"
        family_name = "MosaicBERT" if family == "mosaic" else "BERT"
        presets[name] = (f"{family_name}, {line}", TrainConfig(model=EncoderConfig(**shape), **recipe))
        if family == "mosaic":
            nano = TrainConfig(model=EncoderConfig(**shape), **recipe | ours)
            presets[f"nano-{size}"] = (f"MosaicBERT with our recipe, {line}", nano)
    return presets


def known_settings(settings: dict) -> dict:
    """Settings of a config.json with the default for each that did not exist yet: a new switch that is off by default
    leaves earlier runs what they were."""
    defaults = json.loads(json.dumps(asdict(TrainConfig())))  # lists for tuples, as in the file
    model = asdict(EncoderConfig(**defaults["model"] | settings["model"]))  # renamed values too
    return defaults | settings | {"model": model}


def run_config(run: Path) -> tuple[str, TrainConfig]:
    """Preset and settings a run folder was trained with. ValueError naming the file if it cannot be read."""
    path = run / "config.json"
    try:
        settings = json.loads(path.read_text())["train"]
        preset, known = settings["preset"], known_settings(settings)
        known |= dict(model=EncoderConfig(**known["model"]), data=tuple(known["data"]), betas=tuple(known["betas"]))
        return preset, TrainConfig(**{f.name: known[f.name] for f in fields(TrainConfig)})
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: not the settings of a run of this version ({type(e).__name__}: {e})") from None


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
        fits = next((m for m in range(cfg.micro_tokens, 0, -1) if cfg.batch_tokens % (m * world_size) == 0), 0)
        hint = f"; --micro_tokens {fits} fits" if fits >= cfg.seq_len else ""
        raise SystemExit(
            f"error: --batch_tokens {cfg.batch_tokens} is not a multiple of --micro_tokens {cfg.micro_tokens} "
            f"× {world_size} processes{hint}"
        )
    if (cfg.ramp_tokens > 0) != (cfg.ramp_from > 0):
        raise SystemExit("error: a batch ramp needs both --ramp_from and --ramp_tokens")
    if cfg.ramp_from and (cfg.ramp_from % (cfg.micro_tokens * world_size) or cfg.batch_tokens % cfg.ramp_from):
        raise SystemExit(
            f"error: --ramp_from {cfg.ramp_from} must be a multiple of --micro_tokens {cfg.micro_tokens} × "
            f"{world_size} processes and divide --batch_tokens {cfg.batch_tokens}"
        )
    if min(cfg.max_steps, cfg.max_tokens, cfg.max_minutes) < 0 or not (
        cfg.max_steps or cfg.max_tokens or cfg.max_minutes
    ):
        raise SystemExit("error: give the run a length: --max_steps, --max_tokens or --max_minutes above 0")
    for name in ("eval_every", "checkpoint_every", "log_every", "eval_tokens"):
        if getattr(cfg, name) <= 0:
            raise SystemExit(f"error: --{name} {getattr(cfg, name)}: must be above 0")
    if not (0 <= cfg.warmup < 1 and 0 <= cfg.cooldown < 1 and cfg.warmup + cfg.cooldown <= 1):
        raise SystemExit(f"error: --warmup {cfg.warmup} and --cooldown {cfg.cooldown} are shares of one run")
    if cfg.cooldown_from and not cfg.cooldown:
        raise SystemExit("error: --cooldown_from needs a --cooldown above 0: the share of the run that anneals")
    if cfg.cooldown_from and cfg.start_from:
        raise SystemExit("error: --cooldown_from goes on with a run, --start_from begins one; give one of them")
    not_negative = ("seed", "lr", "muon_lr", "eps", "weight_decay", "grad_clip", "pppl_tokens", "gpu_dollars_per_hour")
    for name in not_negative:
        if getattr(cfg, name) < 0:
            raise SystemExit(f"error: --{name} {getattr(cfg, name)}: must not be below 0")
    if not all(0 <= beta < 1 for beta in cfg.betas):
        raise SystemExit(f"error: --betas {' '.join(map(str, cfg.betas))}: both must be in [0, 1)")
    if cfg.wandb and importlib.util.find_spec("wandb") is None:
        raise SystemExit("error: --wandb needs its package; pip install wandb")
    masking_rate(cfg.masking, 0.0)
    read_mixture(cfg.data)


# ----------------------------------------------------------------------------- schedules


def done_at(cfg: TrainConfig, step: int, tokens: int, seconds: float) -> float:
    """Share of the run that is over after so many steps, tokens and seconds of training."""
    if cfg.max_minutes:
        return seconds / (60 * cfg.max_minutes)
    return tokens / cfg.max_tokens if cfg.max_tokens else step / cfg.max_steps


def learning_rate(cfg: TrainConfig, done: float) -> float:
    """Factor on the peak learning rate when the share `done` (0..1) of the run is over."""
    if done < cfg.warmup:
        return done / cfg.warmup
    start = cfg.warmup if cfg.schedule == "linear" else 1.0 - cfg.cooldown
    if done <= start:
        return 1.0
    return 1.0 + (cfg.final_lr - 1.0) * min((done - start) / (1.0 - start), 1.0)


@dataclass
class Branch:
    """A cool-down that leaves a run (the stem) at one of its checkpoints.

    Its learning rate falls from the stem's at once; what else follows the run (masking, shares of the corpora) goes
    through the rest of the stem's schedule in the time the branch has.
    """

    tokens: int  # of the stem at the checkpoint
    done: float  # share of the stem's run that was over there
    factor: float  # on the peak learning rate there
    length: int  # tokens of the branch

    def over(self, tokens: int) -> float:
        """Share of the branch (0..1) that is over after `tokens` in all."""
        return (tokens - self.tokens) / self.length

    def learning_rate(self, cfg: TrainConfig, over: float) -> float:
        """Factor on the peak learning rate."""
        return self.factor + (cfg.final_lr - self.factor) * min(over, 1.0)

    def schedule(self, over: float) -> float:
        """Where in the stem's run (0..1) the other schedules stand."""
        return self.done + (1.0 - self.done) * over


def branch_off(stem: TrainConfig, branch: Branch | None, cooldown: float, trainer: dict) -> Branch:
    """A cool-down that takes the share `cooldown` of the whole, from a checkpoint of the run `stem`, or of its own
    `branch`; `trainer` has the counters of that checkpoint."""
    tokens = trainer["tokens"]
    over = branch.over(tokens) if branch else done_at(stem, trainer["step"], tokens, trainer["train_seconds"])
    there = branch.schedule(over) if branch else over
    factor = branch.learning_rate(stem, over) if branch else learning_rate(stem, there)
    return Branch(tokens, min(there, 1.0), factor, max(1, round(tokens * cooldown / (1.0 - cooldown))))


def batch_at(cfg: TrainConfig, tokens: int) -> int:
    """Tokens of the step that begins after `tokens`: from ramp_from to batch_tokens, in steps of ramp_from."""
    if tokens >= cfg.ramp_tokens:
        return cfg.batch_tokens
    return cfg.ramp_from * (1 + (cfg.batch_tokens // cfg.ramp_from - 1) * tokens // cfg.ramp_tokens)


def masking_rate(spec: str, done: float) -> float:
    """Share of tokens to mask when the share `done` of the run is over.

    Falling rates beat constant ones: +0.46 GLUE for linear:0.3:0.15 over constant:0.15 on BERT-base
    (Ankner et al. 2023, arXiv 2305.15096).
    """
    try:
        kind, _, numbers = spec.partition(":")
        p, *rest = map(float, numbers.replace("@", ":").split(":"))
        q, share = {
            "constant": lambda: (p, 0.0),
            "linear": lambda q: (q, done),
            "cosine": lambda q: (q, 0.5 - 0.5 * math.cos(math.pi * done)),
            "step": lambda q, at: (q, float(done >= at)),
        }[kind](*rest)
    except (KeyError, ValueError, TypeError):  # no such kind; not a number; too many or too few of them
        raise SystemExit(
            f"error: --masking {spec!r}: write constant:0.3, linear:0.3:0.15, cosine:0.3:0.15 or step:0.3:0.15@0.5"
        ) from None
    if not (0.0 < p < 1.0 and 0.0 < q < 1.0):
        raise SystemExit(f"error: --masking {spec!r}: rates must be between 0 and 1")
    return p + (q - p) * min(share, 1.0)


def mean_masking_rate(spec: str) -> float:
    """Share of tokens masked over a whole run: what its FLOPs and its speed depend on."""
    return fmean(masking_rate(spec, i / 1000) for i in range(1001))


@dataclass
class Mixture:
    """Folders, the shares of documents to draw from each (None: all as one corpus), and later shares from `change`."""

    folders: list[str]
    shares: list[float] | None
    later: list[float] | None
    change: float  # share of the run; above 1: never


def read_mixture(data: tuple[str, ...]) -> Mixture:
    """--data flags, each folder, folder:share or folder:share:later@change -> Mixture."""
    number = r"(\d*\.?\d+)"
    read = [re.fullmatch(rf"(.*?)(?::{number}(?::{number}@{number})?)?", d).groups() for d in data or ("data/c4",)]
    folders = [folder for folder, *_ in read]
    weighted, changes = {p is not None for _, p, _, _ in read}, {float(at) for *_, at in read if at}
    if weighted == {False}:
        return Mixture(folders, None, None, 2.0)
    shares = [float(p or 0) for _, p, _, _ in read]
    later = [float(q or p or 0) for _, p, q, _ in read]
    if weighted == {True, False} or len(changes) > 1 or not (sum(shares) and sum(later)) or max(changes, default=0) > 1:
        raise SystemExit(
            f"error: --data {' '.join(data)}: give every folder a share or none, as in --data a:0.7 --data b:0.3; "
            "shares may change once, as in --data a:0.7:0.2@0.8 --data b:0.3:0.8@0.8"
        )
    drawn = [(p / sum(shares), q / sum(later)) for p, q in zip(shares, later)]
    if any(0 < share < 1e-3 for both in drawn for share in both) or not all(map(any, drawn)):
        raise SystemExit(
            f"error: --data {' '.join(data)}: a share below 0.001 of all would never be drawn; leave the folder out"
        )
    return Mixture(folders, shares, later if changes else None, max(changes, default=2.0))
