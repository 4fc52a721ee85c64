"""What a pretraining run begins from, and the checkpoints that it leaves in runs/<name>/.

ckpt/step_<number>/    model.safetensors, config.json and the tokenizer, for others to read;
                       trainer.pt (optimizers and counters to go on with), progress.json (costs)

A run is the same run if corpora, tokenizer, settings that change numbers and the weights begun from
are the same. Where folders lie and what they are called is no part of it.
"""

import errno
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

import recipes
from batches import EVAL_MICRO_TOKENS, Batches
from corpus.shards import Corpus
from corpus.tokenizer import Tokenizer
from machine import processes
from model import NOT_IN_THE_WEIGHTS, MaskedLM, find_checkpoints, find_folder, weights_checksum
from recipes import FREE_TO_CHANGE, PLACES, Branch, EncoderConfig, TrainConfig
from records import lock, read_json


# ------------------------------------------------------------------------ what a run begins from
@dataclass
class Start:
    """What a run is and what it begins from."""

    run: Path
    settings: dict  # for its config.json
    batches: Batches  # to train on
    eval_batches: Batches
    own: Path | None  # the run's newest checkpoint
    checkpoint: Path | None  # to load: its own newest, or for a new branch the stem's
    weights: MaskedLM | None  # of --start_from, for a new run
    teacher: MaskedLM | None
    progress: dict  # progress.json of `checkpoint`; {} without


def corpus_digests(corpora: list[Corpus], recorded: list[str] | None = None) -> list[str]:
    """Names what the folders hold, wherever they are: vocabulary and shards by their checksums.
    A run of revision 660131b keeps what it has `recorded`, checksums of meta.json."""
    held, metas = [], [(c.folder / "meta.json").read_bytes() for c in corpora]
    for c in corpora:
        shards = [[s["split"], s["bin_sha256"], s["idx_sha256"]] for s in c.meta["shards"]]
        held.append(json.dumps([c.meta["tokenizer_files"], shards], sort_keys=True).encode())
    old, new = ([hashlib.sha256(x).hexdigest()[:16] for x in some] for some in (metas, held))
    return old if old == recorded else new


def load_start(start_from: str, tokenizer: Tokenizer, data: str, flag="--start_from") -> MaskedLM:
    """Weights of an earlier run. ValueError (one line) if their vocabulary is not the data's."""
    folder = find_folder(start_from)
    model = MaskedLM.from_pretrained(folder)
    files = "tokenizer.json", "tokenizer.meta.json", "vocab.txt"
    if any((folder / name).is_file() for name in files):
        same, note = tokenizer.same_as(Tokenizer.load(folder)), ""
    else:  # as the official MosaicBERT; 30,528 entries is what a vocabulary of our own has too
        same, note = bool(tokenizer.hf), " (none is beside it, so bert-base-uncased's)"
    # official tables are rounded up to a multiple of 64 or 128
    if not same or not 0 <= model.cfg.padded_vocab_size - tokenizer.vocab_size < 128:
        raise ValueError(f"{flag} {start_from}: trained with another tokenizer{note} than "
                         f"{data}; prepare the data with prepare_c4.py --tokenizer and that one")
    return model


# what a run does with earlier weights, and the flags that name them
EARLIER = {"began_from": ("began from", "cooldown_from", "start_from"),
           "taught_by": ("was taught by", "teacher")}


def earlier_weights(given: str, old: dict, key: str) -> tuple[list | None, Path | None]:
    """([folder, checksum], where they are now) of the weights that the flags of EARLIER[key] name;
    (None, None) without. A run that goes on, with the settings `old`, keeps what is recorded even
    if those weights are gone since: (recorded, None). ValueError if others are in their place now,
    or in the place that is given instead."""
    if not given:
        return None, None
    if not (recorded := old.get(key)):
        folder = find_folder(given)
        return [str(folder), weights_checksum(folder)], folder
    (verb, *flags), folder, checksum = EARLIER[key], Path(recorded[0]), recorded[1]
    places = [folder] if folder.is_dir() else []
    if given not in [old[flag] for flag in flags]:  # moved, or something else
        places = [p for p in (find_folder(given), Path(given) / "ckpt" / folder.name) if p.is_dir()]
    same = [p for p in places if weights_checksum(p) == checksum]
    if places and not same:
        raise ValueError(f"the run {verb} other weights than {places[0]} has now; "
                         "give this one another --name")
    return recorded, (same or [None])[0]


def load_teacher(cfg: TrainConfig, folder: Path | None, tokenizer: Tokenizer, data: str
                 ) -> MaskedLM:
    """The teacher in `folder`. ValueError (one line) if it cannot teach a run like this one."""
    if folder is None:
        raise ValueError(f"--teacher {cfg.teacher}: its weights are gone; give where they are now")
    teacher = load_start(str(folder), tokenizer, data, "--teacher")
    if teacher.cfg.padded_vocab_size != cfg.model.padded_vocab_size:
        raise ValueError(f"--teacher {folder} predicts {teacher.cfg.padded_vocab_size} entries, "
                         f"this model {cfg.model.padded_vocab_size}; give both one vocab_multiple")
    if cfg.pairs and teacher.cfg.n_token_types < 2:
        raise ValueError(f"--teacher {folder} knows one token type; --pairs needs two")
    if teacher.cfg.position == "learned" and cfg.seq_len > teacher.cfg.max_positions:
        raise ValueError(f"--teacher {folder} knows {teacher.cfg.max_positions} positions; "
                         f"--seq_len {cfg.seq_len} is beyond them")
    return teacher


def resolve_start(preset: str, cfg: TrainConfig, world_size: int = 1) -> Start:
    """What a run is and what it begins from. cfg.model gets the vocabulary of the data, or the
    shape of the weights of --start_from. ValueError (one line) for settings that cannot work, a
    folder with another run, and weights that do not go with the data."""
    no_shape_yet = replace(cfg, model=EncoderConfig()) if cfg.start_from else cfg
    recipes.check_config(no_shape_yet, world_size)
    run = Path(cfg.out) / (cfg.name or preset)
    folders, shares = recipes.read_mixture(cfg.data)
    corpora = [Corpus(folder) for folder in folders]
    tokenizer, *others = (Tokenizer.load(corpus.folder) for corpus in corpora)
    if not all(map(tokenizer.same_as, others)):
        raise ValueError(f"{', '.join(folders)} have different tokenizers; prepare all but the "
                         f"first with --tokenizer {folders[0]}")
    stream = cfg.seq_len, cfg.micro_tokens, cfg.documents, cfg.seed, shares
    batches = Batches(corpora, tokenizer, *stream, cfg.pairs)
    stream = cfg.seq_len, min(EVAL_MICRO_TOKENS, cfg.eval_tokens), "all", 0, shares
    eval_batches = Batches([Corpus(folder, "val") for folder in folders], tokenizer, *stream)
    own = (find_checkpoints(run) or [None])[-1]
    old = recipes.read_settings(run) if own else {}
    weights = None
    if cfg.start_from:
        default = recipes.make_presets()[preset][1].model
        asked = {k: v for k, v in asdict(cfg.model).items() if v != getattr(default, k)}
        if flags := [f"--model.{k}" for k in asked if k not in NOT_IN_THE_WEIGHTS]:
            raise ValueError(f"--start_from brings a shape of its own; leave out {' '.join(flags)}")
        if not own:
            weights = load_start(cfg.start_from, tokenizer, folders[0])
        cfg.model = replace(weights.cfg if weights else EncoderConfig(**old["model"]), **asked)
        recipes.check_config(cfg, world_size)
    elif not cfg.cooldown_from:  # a branch keeps its stem's, which --start_from may have brought
        cfg.model.vocab_size = tokenizer.vocab_size
    stem = {}
    if cfg.cooldown_from and not own:
        if not tokenizer.same_as(Tokenizer.load(cfg.cooldown_from)):
            raise ValueError(f"--cooldown_from {cfg.cooldown_from}: not the tokenizer of the data")
        stem = recipes.read_settings(Path(cfg.cooldown_from).parents[1])
        same = corpus_digests(corpora, stem["corpus"]) == stem["corpus"]
        if [*cfg.data] == stem["data"] and not same:
            raise ValueError(f"{', '.join(folders)}: not the corpus that the stem was trained on")

    began_from, _ = earlier_weights(cfg.cooldown_from or cfg.start_from, old, "began_from")
    known = old or (stem if cfg.teacher == stem.get("teacher") else {})  # a branch may have another
    taught_by, folder = earlier_weights(cfg.teacher, known, "taught_by")
    settings = asdict(cfg) | {"preset": preset, "began_from": began_from, "taught_by": taught_by}
    settings |= {"corpus": corpus_digests(corpora, old.get("corpus")), "shares": shares}
    settings = json.loads(json.dumps(settings))  # lists for tuples, as in the file
    now, before = recipes.flat(settings), recipes.flat(old or settings)
    differ = [k for k in now if k not in FREE_TO_CHANGE | PLACES and now[k] != before.get(k)]
    places = "start_from", "cooldown_from", "teacher"
    differ += [k for k in places if bool(now[k]) != bool(before.get(k))]
    if differ:
        long = "corpus", "shares", "began_from", "taught_by"
        what = [k if k in long else f"{k} {before.get(k)} -> {now[k]}" for k in differ]
        raise ValueError(f"{run} holds a run with other settings ({', '.join(what)}); "
                         "give this one another --name")
    checkpoint = own or (Path(cfg.cooldown_from) if cfg.cooldown_from else None)
    progress = read_json(checkpoint / "progress.json") if checkpoint else {}
    teacher = None
    if taught_by and not (own and progress["finished"]):
        teacher = load_teacher(cfg, folder, tokenizer, folders[0])
    return Start(run, settings, batches, eval_batches, own, checkpoint, weights, teacher, progress)


def lock_run(start: Start, host: dist.ProcessGroup | None = None) -> IO | None:
    """Own the run folder while the returned file is open, and remove what a killed run left half-
    written. SystemExit (one line) on all processes, the group `host`, if that cannot be."""
    file, found, rank = None, [None], processes()[0]
    if rank == 0:
        try:
            start.run.mkdir(parents=True, exist_ok=True)
            file = lock(start.run / ".lock")
            places = [start.run / name for name in (".", "ckpt", "config.json", "log.jsonl")]
            if not all(os.access(p, os.W_OK) for p in places if p.exists()):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if (find_checkpoints(start.run) or [None])[-1] != start.own:
                found = [f"{start.run} was trained on just now; the same command continues it"]
            for leftover in start.run.glob("ckpt/step_*.tmp"):
                shutil.rmtree(leftover)
        except BlockingIOError:
            found = [f"another process trains in {start.run}; give this run another --name"]
        except OSError as e:
            found = [f"cannot write to {start.run} ({e.strerror}); choose another --out"]
    if host:
        dist.broadcast_object_list(found, src=0, group=host)
    if found[0]:
        raise SystemExit(f"error: {found[0]}" if rank == 0 else 1)
    return file


# ----------------------------------------------------------------------------- checkpoints
@dataclass
class State:
    """All that training changes: what a checkpoint holds and a resumed run goes on with."""

    model: MaskedLM
    optimizers: list[tuple[torch.optim.Optimizer, float]]  # each with its peak learning rate
    step: int = 0
    tokens: int = 0
    micro: int = 0  # micro-batches so far, over all processes: the number of the next
    train_seconds: float = 0.0  # without evaluation, saving and compilation
    branch: Branch | None = None

    def begin(self, start: Start, cfg: TrainConfig) -> None:
        """Take over weights, optimizers and counters that the run begins with."""
        if start.weights:
            self.model.load_state_dict(start.weights.state_dict())
        if not start.checkpoint:
            return
        self.model.load_state_dict(MaskedLM.from_pretrained(start.checkpoint).state_dict())
        device = next(self.model.parameters()).device
        path = start.checkpoint / "trainer.pt"
        trainer = torch.load(path, map_location=device, weights_only=True)
        for (optimizer, _), saved in zip(self.optimizers, trainer["optimizers"]):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.micro = (trainer[k] for k in ("step", "tokens", "micro"))
        self.train_seconds = trainer["train_seconds"]
        # by position: revision 660131b had other names for the same four
        self.branch = trainer["branch"] and Branch(*trainer["branch"].values())
        if not start.own:
            _, stem = recipes.run_config(start.checkpoint.parents[1])
            self.branch = recipes.branch_off(stem, self, cfg.cooldown)

    def is_finite(self) -> bool:
        """Whether all weights are; the host waits for the device once."""
        return bool(torch.stack([w.isfinite().all() for w in self.model.parameters()]).all())

    def save(self, start: Start, progress: dict) -> Path:
        """Write ckpt/step_<step>/ under a temporary name, fsync, rename: a kill leaves a whole
        folder or none. SystemExit (one line) if it cannot be written."""
        final = start.run / "ckpt" / f"step_{self.step:08d}"
        temporary = final.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        trainer = {k: getattr(self, k) for k in ("step", "tokens", "micro", "train_seconds")}
        trainer |= {"branch": self.branch and asdict(self.branch),
                    "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers]}
        try:
            self.model.save_pretrained(temporary)
            start.batches.tokenizer.save(temporary)
            torch.save(trainer, temporary / "trainer.pt")
            (temporary / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")
            for path in [*temporary.iterdir(), temporary]:
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
            shutil.rmtree(final, ignore_errors=True)  # only there if the same step is saved twice
            os.rename(temporary, final)
        except Exception as e:  # a full disk is an OSError, or a RuntimeError from libraries below
            shutil.rmtree(temporary, ignore_errors=True)
            why = str(getattr(e, "strerror", None) or e).splitlines()[0]
            raise SystemExit(f"error: could not write {final} ({why}); "
                             "earlier checkpoints are untouched") from e
        return final
