"""What a pretraining run is: every setting, the recipes, and the schedules as pure functions.

    python pretrain.py mosaic-base --help          # this file, as flags

mosaic-*, bert-*: the paper's recipe (Portes et al. 2023, arXiv 2312.17482) for either shape; small
and tiny are for CPUs, with a recipe of their own. nano-*: MosaicBERT's with what has won since.
"""

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import tyro

from model import PRESETS, EncoderConfig
from records import BadInput


@dataclass
class TrainConfig:
    """One run. Shares are of the whole, whose length is max_steps, max_tokens or max_minutes.
    Defaults that presets change (rates, masking, lengths): PAPER, LAPTOP, NANO, make_presets."""

    # folders made by prepare_c4.py, default data/c4. Several are read as one: --data a --data b; as
    # a mixture with shares of documents (of windows, with --documents all): --data a:7 --data b:3
    data: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    name: str = ""  # run folder under `out`; default: the preset's name
    out: str = "runs"
    model: EncoderConfig = field(default_factory=EncoderConfig)

    start_from: str = ""  # weights and shape to begin with: own, MosaicBERT's, BERT's; or hub name
    cooldown_from: str = ""  # checkpoint to anneal over the last `cooldown` of the new whole
    teacher: str = ""  # an encoder whose predictions are half of the target: as start_from

    max_steps: int = 70_000  # length of the run in optimizer steps; used where the next two are 0
    max_tokens: int = 0  # ... or in real tokens
    max_minutes: float = 0.0  # ... or in minutes of training: the schedules follow the clock

    seq_len: int = 128  # tokens a document is cut at, [CLS] and [SEP] counted
    documents: Literal["first", "all"] = "first"  # windows of each: one (the paper) or every one
    pairs: float = 0.0  # share of windows whose second half becomes a noisy copy of the first
    batch_tokens: int = 524_288  # tokens of a step over all processes (the paper: 4,096 × 128)
    micro_tokens: int = 65_536  # tokens of one forward and backward; lower it when memory runs out

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: on the hidden matrices, adamw on the rest
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
    corruption: Literal["80/10/10", "mask"] = "80/10/10"  # [MASK]/random/kept, or all [MASK]
    narrow_layers: int = 1  # last layers computed where masked only, but for the last `cooldown`

    eval_every: int | float = 0.05  # steps (1, 200) or share of the run (0.05; 1.0: at its end)
    eval_tokens: int = 1_048_576  # of the validation split; always the same, 15 % masked
    pppl_tokens: int = 1_024  # of these, masked one at a time for the pseudo-perplexity; 0: none
    checkpoint_every: int | float = 0.1  # as eval_every; all are kept
    log_every: int = 10  # steps
    wandb: bool = False  # also log to Weights & Biases (pip install wandb)

    seed: int = 17
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls; weights stay float32
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on for CUDA
    gpu_dollars_per_hour: float = 2.2  # assumed price of one GPU; time of a CPU is logged at $0


# what may differ when a run is continued; everything else would make it another run
FREE_TO_CHANGE = {"out", "eval_every", "checkpoint_every", "log_every", "wandb",
                  "gpu_dollars_per_hour", "device", "compile"}
# where things are, which is free too: what they hold must be the same (see checkpoint.py)
PLACES = {"name", "out", "data", "start_from", "cooldown_from", "teacher"}
# settings of earlier versions, and the only value at which their runs can be continued
GONE = {"grad_reduce": "float32", "skip_nan": False, "ramp_from": 0, "ramp_tokens": 0,
        "later": None}  # shares of --data that change

PAPER = dict(lr=5e-4, weight_decay=0.02)
# BERT-large, MosaicBERT-Large: lr 2e-4 and the same decoupled decay, 1e-5 / 2e-4 = 0.05
PAPER_LARGE = dict(lr=2e-4, weight_decay=0.05, max_steps=178_000, micro_tokens=32_768)
# small encoders, minutes on two cores: documents are scarce, so every window is used. muon:
# validation loss 4.93 against adamw's 5.32 after the same 2.5 M tokens (docs/LOG.md)
LAPTOP = dict(documents="all", batch_tokens=4_096, micro_tokens=4_096, optimizer="muon", lr=2e-3,
              eval_every=0.1, eval_tokens=65_536, pppl_tokens=256, max_steps=2_000)
NANO = dict(optimizer="muon", schedule="wsd", masking="linear:0.3:0.15")
NANO_LAPTOP = NANO | dict(muon_lr=0.01, masking="constant:0.4")  # by ablations (docs/LOG.md)
# loss 4.23 against 4.41 in the time of 3 M tokens; in nano-tiny's minutes word order suffers (LOG)
NANO_SMALL = NANO_LAPTOP | dict(narrow_layers=4)
# symmetric ALiBi is blind to left and right; with these two the loss is 0.9 nats lower (LOG.md)
NANO_MODEL = dict(position="rope-alibi", alibi_ratio=8.0)


def make_presets() -> dict[str, tuple[str, TrainConfig]]:
    """Name -> (one line of help, its TrainConfig)."""
    presets = {}
    for name, shape in PRESETS.items():
        family, size = name.split("-")
        recipe = {"base": PAPER, "large": PAPER_LARGE}.get(size, LAPTOP)
        recipe = recipe | dict(masking="constant:0.3" if family == "mosaic" else "constant:0.15")
        line = f"BERT, {shape['n_layers']} layers, {shape['d_model']} wide"
        cfg = TrainConfig(model=EncoderConfig(**shape), **recipe)
        presets[name] = ("Mosaic" * (family == "mosaic") + line, cfg)
        if family == "mosaic":
            nano = {"small": NANO_SMALL, "tiny": NANO_LAPTOP}.get(size, NANO)
            cfg = TrainConfig(model=EncoderConfig(**shape | NANO_MODEL), **recipe | nano)
            presets[f"nano-{size}"] = (f"Mosaic{line}, our recipe", cfg)
    return presets


def flat(settings: dict) -> dict:
    """Settings by the names of their flags: model.d_model for {"model": {"d_model": ...}}."""
    settings = dict(settings)
    return {f"model.{k}": v for k, v in settings.pop("model").items()} | settings


def read_settings(run: Path) -> dict:
    """Settings of a run folder as this version has them: a new one at its default, which leaves
    earlier runs what they were. ValueError naming the file if that cannot be."""
    try:
        settings = json.loads((run / "config.json").read_text())["train"]
        mixture = settings.pop("mixture", None) or {}
        gone = {k: (settings | mixture).get(k, v) for k, v in GONE.items()}
        if gone != GONE:
            raise ValueError(f"made by an earlier version with {gone}, which this one has not")
        settings["shares"] = mixture.get("shares", settings.get("shares"))
        defaults = json.loads(json.dumps(asdict(TrainConfig())))  # lists for tuples, as in the file
        model = asdict(EncoderConfig(**defaults["model"] | settings["model"]))  # renamed values too
        return defaults | settings | {"model": model}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{run}/config.json: not the settings of a run ({e!r})") from None


def run_config(run: Path) -> tuple[str, TrainConfig]:
    """Preset and settings a run folder was trained with; ValueError as read_settings."""
    known = read_settings(run)
    known |= {k: tuple(known[k]) for k in ("data", "betas")}
    known["model"] = EncoderConfig(**known["model"])
    return known["preset"], TrainConfig(**{f.name: known[f.name] for f in fields(TrainConfig)})


def check_config(cfg: TrainConfig, world_size: int) -> None:
    """BadInput or ValueError (one line) for settings that would fail late or train something
    else."""
    lengths = cfg.max_steps, cfg.max_tokens, cfg.max_minutes
    passes = cfg.batch_tokens / max(cfg.micro_tokens * world_size, 1)
    lowest = dict.fromkeys(("eval_every", "checkpoint_every", "log_every"), 1e-9)
    lowest |= dict.fromkeys(("seed", "lr", "muon_lr", "grad_clip", "pppl_tokens"), 0)
    lowest |= dict(eps=0, weight_decay=0, final_lr=0, narrow_layers=1, eval_tokens=3)
    low = [f"--{k} {getattr(cfg, k)}" for k, least in lowest.items() if getattr(cfg, k) < least]
    odd = [f"--{k} {every}" for k in ("eval_every", "checkpoint_every")
           if (every := getattr(cfg, k)) > 1 and every % 1]
    flags = [(k, v) for k, v in flat(asdict(cfg)).items() if isinstance(v, float)]
    endless = [f"--{k} {v}" for k, v in flags if not math.isfinite(v)]
    for wrong, why in [
        (endless, f"{', '.join(endless)}: no number"),
        (cfg.seed >= 2**43, f"--seed {cfg.seed}: give one below 2^43"),
        (not all(0 <= b < 1 for b in cfg.betas), f"--betas {cfg.betas}: give two below 1"),
        (cfg.seq_len < 3, f"--seq_len {cfg.seq_len}: [CLS], a token and [SEP] need at least 3"),
        (cfg.model.position == "learned" and cfg.seq_len > cfg.model.max_positions,
         f"--seq_len {cfg.seq_len} is beyond the {cfg.model.max_positions} learned positions; "
         "raise --model.max_positions too"),
        (cfg.micro_tokens < cfg.seq_len,
         f"--micro_tokens {cfg.micro_tokens} is below --seq_len {cfg.seq_len}"),
        (passes < 1 or passes % 1, f"--batch_tokens {cfg.batch_tokens} is not a multiple of "
         f"--micro_tokens {cfg.micro_tokens} × {world_size} processes"),
        (min(lengths) < 0 or not any(lengths),
         "give the run a length: --max_steps, --max_tokens or --max_minutes above 0"),
        (low, f"{', '.join(low)}: too low"),
        (odd, f"{', '.join(odd)}: give whole steps, or a share of the run up to 1.0"),
        (min(cfg.warmup, cfg.cooldown) < 0 or cfg.cooldown == 1 or cfg.warmup + cfg.cooldown > 1,
         f"--warmup {cfg.warmup} and --cooldown {cfg.cooldown} are shares of one run"),
        (not 0 <= cfg.pairs <= 1 or (cfg.pairs and cfg.model.n_token_types < 2),
         f"--pairs {cfg.pairs}: give a share up to 1; the model needs two token types"),
        (cfg.pairs and cfg.seq_len < 10,
         f"--pairs {cfg.pairs}: windows have {cfg.seq_len} tokens; raise --seq_len to 10"),
        (cfg.cooldown_from and cfg.start_from,
         "--cooldown_from goes on with a run, --start_from begins one; give one of them"),
    ]:
        if wrong:
            raise BadInput(why)
    masking_rate(cfg.masking, 0.0)
    cfg.model.check()


def read_mixture(data: tuple[str, ...]) -> tuple[list[str], list[float] | None]:
    """--data flags, each folder or folder:share -> folders; shares, or None for one corpus of all.
    ValueError (one line) if some have a share and some not, or one would never be drawn."""
    read = [re.fullmatch(r"(.*?)(?::(\d*\.?\d+))?", d).groups() for d in data or ("data/c4",)]
    folders, given = [folder for folder, _ in read], [share for _, share in read]
    if not any(given):
        return folders, None
    shares = [float(share or 0) for share in given]
    if None in given or min(shares) < 1e-3 * sum(shares) or not sum(shares):
        raise ValueError(f"--data {' '.join(data)}: give every folder a share of at least 0.001 of "
                         "all, or none, as in --data a:0.7 --data b:0.3")
    return folders, shares


# ----------------------------------------------------------------------------- schedules
@dataclass
class Branch:
    """A cool-down that leaves a run (the stem) at one of its checkpoints. Its learning rate falls
    from the stem's at once; masking goes through the rest of the stem's schedule meanwhile."""

    tokens: int  # of the stem at the checkpoint
    share_done: float  # of the stem's run there
    lr_scale: float  # on the peak learning rate there
    length: int  # tokens of the branch


def share_done(cfg: TrainConfig, state) -> float:
    """Share of the run, or of the branch, that is done; `state`: step, tokens, train_seconds and
    branch so far, as checkpoint.State has them."""
    if state.branch:
        return (state.tokens - state.branch.tokens) / state.branch.length
    if cfg.max_minutes:
        return state.train_seconds / (60 * cfg.max_minutes)
    return state.tokens / cfg.max_tokens if cfg.max_tokens else state.step / cfg.max_steps


def lr_scale(cfg: TrainConfig, branch: Branch | None, progress: float) -> float:
    """Scale on the peak learning rate at `progress` (0..1) through the run, or the branch."""
    if branch:
        return branch.lr_scale + (cfg.final_lr - branch.lr_scale) * min(progress, 1.0)
    if progress < cfg.warmup:
        return progress / cfg.warmup
    start = cfg.warmup if cfg.schedule == "linear" else 1.0 - cfg.cooldown
    if progress <= start:
        return 1.0
    return 1.0 + (cfg.final_lr - 1.0) * min((progress - start) / (1.0 - start), 1.0)


def narrow_layers(cfg: TrainConfig, branch: Branch | None, progress: float) -> int:
    """Layers that go on at the masked positions only: in the end, and in a branch, the last, as a
    finished encoder is used at every position."""
    return 1 if branch or progress >= 1.0 - cfg.cooldown else cfg.narrow_layers


def stem_done(branch: Branch | None, progress: float) -> float:
    """How far through the whole run (0..1) the masking is."""
    return branch.share_done + (1.0 - branch.share_done) * progress if branch else progress


def branch_off(stem: TrainConfig, state, cooldown: float) -> Branch:
    """A cool-down that takes the share `cooldown` of the whole, from the `state` of a checkpoint
    of the run `stem`, itself perhaps a branch."""
    progress = share_done(stem, state)
    length = max(1, round(state.tokens * cooldown / (1.0 - cooldown)))
    there = min(stem_done(state.branch, progress), 1.0)
    return Branch(state.tokens, there, lr_scale(stem, state.branch, progress), length)


def masking_rate(spec: str, progress: float) -> float:
    """Share of tokens to mask at `progress` (0..1) through the run. Falling rates beat constant
    ones: +0.46 GLUE for linear:0.3:0.15 against constant:0.15 on BERT-base (Ankner et al. 2023,
    arXiv 2305.15096). BadInput if `spec` cannot be read."""
    try:
        kind, _, numbers = spec.partition(":")
        p, *rest = map(float, numbers.replace("@", ":").split(":"))
        q, share = {
            "constant": lambda: (p, 0.0),
            "linear": lambda q: (q, progress),
            "cosine": lambda q: (q, 0.5 - 0.5 * math.cos(math.pi * progress)),
            "step": lambda q, at: (q, float(progress >= at)),
        }[kind](*rest)
    except (KeyError, ValueError, TypeError):  # no such kind; no number; too many or too few
        p = q = share = math.nan
    if not (0.0 < p < 1.0 and 0.0 < q < 1.0):
        raise BadInput(f"--masking {spec!r}: write constant:0.3, linear:0.3:0.15, cosine:0.3:0.15 "
                       "or step:0.3:0.15@0.5, with rates between 0 and 1")
    return p + (q - p) * min(share, 1.0)


def mean_masking_rate(spec: str) -> float:
    """Share of tokens masked over a whole run: what its FLOPs and its speed depend on."""
    return fmean(masking_rate(spec, i / 1000) for i in range(1001))
