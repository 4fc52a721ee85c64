"""Where fine-tunings start: checkpoints of runs, foreign weights, random ones of the same shape."""

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from corpus.tokenizer import Tokenizer
from model import find_checkpoints, find_folder, weights_checksum

COSTS = {"step": "step", "tokens": "tokens", "pretrain_seconds": "train_seconds",
         "pretrain_gpu_seconds": "gpu_seconds", "pretrain_dollars": "dollars"}  # here, in progress


@dataclass
class Start:
    """Weights to fine-tune from, and where the results go."""

    folder: Path  # config.json and weights: its own, or those of its MNLI model
    out: Path  # <run>/glue
    run: str
    checkpoint: str  # "ckpt/step_00000100", "random", or the name of a foreign folder
    facts: dict[str, Any]  # of its records: what pretraining has cost, if it was ours
    weights: str  # tells these weights from others that were there under the same name
    shape: str  # of the encoder and its vocabulary: what tells random weights apart
    tokenizer: Any  # a Tokenizer, or what transformers has for it
    foreign: bool = False  # transformers runs the model
    fresh: bool = False  # of the folder's weights only the shape is taken

    @property
    def name(self) -> str:
        return " ".join(dict.fromkeys([self.run, Path(self.checkpoint).name]))


def find_start(folder: Path, given: str, foreign: bool, out: str) -> Start:
    """The start in a folder with weights, which `given` on the command line led to. ValueError for
    a tokenizer that does not fit."""
    if foreign:
        from glue.hf_encoder import HFTokenizer  # transformers takes seconds to import
    real, progress = folder.resolve(), folder / "progress.json"
    ours = real.parent.name == "ckpt"
    inside = folder if folder.parent.name == "ckpt" else real
    home = inside.parents[1] if ours else Path(given)
    run = home.resolve().name + "-transformers" * foreign  # not our own BERT of these weights
    if out or not home.is_dir():  # no folder: the weights are from the hub
        home = Path(out or "runs", run)
    tokenizer = HFTokenizer(folder) if foreign else Tokenizer.load(folder)
    config = (folder / "config.json").read_bytes()
    n, n_own = json.loads(config).get("vocab_size", 0), tokenizer.vocab_size
    if not n_own <= n < n_own + 128:  # others may have rounded it up to a multiple of 128
        raise ValueError(f"{folder}: the model has {n} tokens, the tokenizer there {n_own}")
    shape = zlib.crc32(config, zlib.crc32(tokenizer.vocabulary))
    cost = {"step": 0} | (json.loads(progress.read_text()) if progress.is_file() else {})
    facts = {"family": cost.get("family", "other"), "preset": cost.get("preset", run)}
    facts |= {name: cost.get(key) for name, key in COSTS.items()}
    return Start(folder, home / "glue", run, f"ckpt/{real.name}" if ours else run, facts,
                 f"{weights_checksum(folder, shape):08x}", f"{shape:08x}", tokenizer, foreign)


def find_starts(cfg) -> list[Start]:
    """The starts that finetune_glue's settings ask for, each once. ValueError for a folder without
    any, and for two of one name."""
    asked = [(name, False) for name in cfg.runs] + [(n, True) for n in cfg.hf.split(",") if n]
    if not asked:
        raise ValueError("give a run folder, or one with config.json and weights; see --help")
    starts: dict[str, Start] = {}
    for given, foreign in asked:
        folders = find_checkpoints(given) or [find_folder(given)]
        for folder in folders if cfg.checkpoints == "all" else folders[-1:]:
            start = find_start(folder, given, foreign, cfg.out)
            random = replace(start, checkpoint="random", weights=start.shape, fresh=True,
                             facts=start.facts | dict.fromkeys(COSTS, 0))
            for one in [start, random] if cfg.from_scratch else [start]:
                if (twin := starts.setdefault(one.name, one)).out.resolve() != one.out.resolve():
                    raise ValueError(f"{twin.out.parent} and {one.out.parent} are both called "
                                     f"{one.name}; rename one")
    return list(starts.values())
