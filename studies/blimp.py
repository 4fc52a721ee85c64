"""Does an encoder know grammar? Of two sentences it should find the grammatical one likelier.

    git clone https://github.com/alexwarstadt/blimp
    python -m studies.blimp runs/mosaic-base --blimp_dir blimp/data       # 67 files of 1,000 pairs
    python -m studies.blimp runs/a runs/b --blimp_dir blimp/data --pairs 50 --checkpoints all
    python -m studies.blimp runs/a --blimp_dir Zorro/sentences/babyberta  # a child's vocabulary

A sentence's score is its pseudo-log-likelihood: each token is masked in turn and its
log-probability summed (Salazar et al. 2020, arXiv 1910.14659). Chance is 50 %. BabyLM 2023's
baselines, on its choice of BLiMP's pairs: RoBERTa-base 69.5 after 10 M words, 75.1 after 100 M.
Each checkpoint becomes a line of <run>/blimp.jsonl (zorro.jsonl), in place of an older one of the
same checkpoint and --pairs. 50 pairs a file: 2 minutes for a 4 x 256 encoder on one core.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

from corpus.tokenizer import Tokenizer
from machine import pick_device, pick_dtype, script
from model import MaskedLM, find_checkpoints, find_folder
from records import make_folder, read_json, write_atomically


@dataclass
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders, checkpoints, Hugging Face BERTs
    blimp_dir: str  # folder with the files of BLiMP or of Zorro
    pairs: int = 0  # of each file, the first ones; 0: all
    checkpoints: Literal["latest", "all"] = "latest"  # of each run
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls


def read_pairs(folder: str, n: int = 0) -> tuple[str, list[tuple[str, str, str, str]]]:
    """"blimp" or "zorro", and (file, phenomenon, good, bad sentence) of a file's first `n` pairs.

    BLiMP: JSON lines; its paper counts s-selection as argument structure. Zorro: pairs of lines,
    the wrong one first; its phenomenon is the file's name up to the last hyphen."""
    files = sorted(Path(folder).glob("*.jsonl")) or sorted(Path(folder).glob("*.txt"))
    if not files:
        raise ValueError(f"--blimp_dir {folder} has no *.jsonl (BLiMP) and no *.txt (Zorro)")
    is_blimp, pairs = files[0].suffix == ".jsonl", []
    for path in files:
        lines, of_file = path.read_text(encoding="utf-8").rstrip("\n").split("\n"), []
        if is_blimp:
            try:
                for row in map(json.loads, lines):
                    group = row["linguistics_term"].replace("s-selection", "argument_structure")
                    of_file.append((path.stem, group, row["sentence_good"], row["sentence_bad"]))
            except (KeyError, ValueError, TypeError) as e:
                what = f"no key {e}" if isinstance(e, KeyError) else f"no JSON object ({e})"
                raise ValueError(f"{path}, line {len(of_file) + 1}: {what}") from None
        elif len(lines) % 2:
            raise ValueError(f"{path}: {len(lines):,} lines; Zorro has two a pair")
        else:
            group = path.stem.rsplit("-", 1)[0]
            of_file = [(path.stem, group, *pair) for pair in zip(lines[1::2], lines[::2])]
        if not 0 <= n <= len(of_file):
            raise ValueError(f"--pairs {n:,}: {path} has {len(of_file):,}; 0 takes all")
        pairs += of_file[: n or None]
    return "blimp" if is_blimp else "zorro", pairs


@torch.no_grad()
def pseudo_log_likelihoods(model: MaskedLM, tokenizer: Tokenizer, sentences: list[str],
                           dtype: torch.dtype, bar: tqdm) -> np.ndarray:
    """(n,) float64, nats: of each sentence, the sum over its tokens of the log-probability where
    that token alone is masked. Puts the model in eval mode; `bar` counts masked sentences."""
    device, model = next(model.parameters()).device, model.eval()
    ids = [[tokenizer.cls_id, *x, tokenizer.sep_id] for x in tokenizer.encode_batch(sentences)]
    lengths = np.array([len(x) for x in ids])
    scores = torch.zeros(len(ids), dtype=torch.float64)
    micro_tokens = 65_536 if device.type == "cuda" else 8_192  # a CPU is as fast with 2,048
    bar.reset(total=int((lengths - 2).sum()))
    for L in np.unique(lengths[lengths > 2]).tolist():  # of one length: no padding, no ragged copy
        members = torch.from_numpy(np.flatnonzero(lengths == L))
        rows = torch.tensor([ids[i] for i in members])  # (sentences of this length, L)
        for some in torch.arange(len(rows) * (L - 2)).split(max(1, micro_tokens // L)):
            row, position = some // (L - 2), some % (L - 2) + 1
            masked_idx = torch.arange(len(some)) * L + position
            flat = rows[row].flatten()  # (copies · L,)
            labels, flat[masked_idx] = flat[masked_idx].to(device), tokenizer.mask_id
            cu_seqlens = torch.arange(len(some) + 1, dtype=torch.int32, device=device) * L
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(flat.to(device), cu_seqlens=cu_seqlens, max_seqlen=L,
                               masked_idx=masked_idx.to(device))  # (copies, V)
            logits = logits[:, : model.cfg.vocab_size].float()  # without the rows that pad it
            loss = F.cross_entropy(logits, labels, reduction="none")
            scores.index_add_(0, members[row], -loss.cpu().double())
            bar.update(len(some))
    return scores.numpy()


def accuracies(pairs: list[tuple[str, str, str, str]], scores: np.ndarray) -> dict:
    """Shares of pairs whose good sentence scores higher (equal is wrong), by file and phenomenon;
    `score`: their mean, `stderr`: its binomial error. scores (2n,): good and bad in turn."""
    correct, shares = scores[::2] > scores[1::2], []
    for names in np.array([row[:2] for row in pairs]).T:
        groups = {name: correct[names == name] for name in dict.fromkeys(names.tolist())}
        shares.append({name: round(float(hits.mean()), 5) for name, hits in groups.items()})
    variances = [hits.var() / len(hits) for hits in groups.values()]  # p (1 - p) / n
    stderr, score = sum(variances) ** 0.5 / len(groups), np.mean([*shares[1].values()])
    result = {"score": round(float(score), 5), "stderr": round(float(stderr), 5)}
    return result | {"phenomena": shares[1], "files": shares[0]}


def evaluate(run: str, checkpoint: Path, benchmark: str, pairs: list, cfg: Config) -> None:
    """Score one checkpoint: a table on the screen, a line in the run's record."""
    model = MaskedLM.from_pretrained(checkpoint)
    is_step = checkpoint.parent.name == "ckpt"
    home = checkpoint.parents[1] if is_step else Path(run)
    home = home if home.is_dir() else Path("runs", run.replace("/", "--"))  # a name on the hub
    make_folder(home, "give a copy of the run that can be written to")
    path = home / f"{benchmark}.jsonl"
    earlier = [json.loads(line) for line in path.open()] if path.is_file() else []
    progress = read_json(file) if (file := checkpoint / "progress.json").is_file() else {}
    sentences = [sentence for *_, good, bad in pairs for sentence in (good, bad)]
    device, began = pick_device(cfg.device), time.perf_counter()
    args = model.to(device), Tokenizer.load(checkpoint), sentences, pick_dtype(cfg.dtype, device)
    with tqdm(unit=" masked", desc=f"{home.name} {checkpoint.name}", disable=None) as bar:
        scores = pseudo_log_likelihoods(*args, bar)
    seconds, result = round(time.perf_counter() - began, 2), accuracies(pairs, scores)
    this = {"checkpoint": f"ckpt/{checkpoint.name}" if is_step else home.name, "pairs": cfg.pairs}
    record = {"type": benchmark, "run": home.name} | progress | this | result
    record |= {"n_pairs": len(pairs), "n_masked": bar.total, "seconds": seconds}
    speed = f"{len(pairs):,} pairs, {bar.total / seconds:,.0f} masked sentences a second"
    print(f"\n{home.name} {checkpoint.name}: {speed}")
    print(*(f"{k:26}{v:6.1%}" for k, v in sorted(result["phenomena"].items())), sep="\n")
    print(f"{'mean':26}{result['score']:6.1%} ± {result['stderr']:.1%}")
    new = [r for r in earlier if not this.items() <= r.items()] + [record]
    write_atomically(path, "".join(json.dumps(r) + "\n" for r in new).encode())
    print(f"wrote {path}")


def evaluate_runs(cfg: Config) -> None:
    """Score every checkpoint asked for. ValueError (one line) for bad input."""
    if not cfg.runs:
        raise ValueError("give a run")
    benchmark, pairs = read_pairs(cfg.blimp_dir, cfg.pairs)
    for run in cfg.runs:
        steps = find_checkpoints(run) if cfg.checkpoints == "all" else []
        for checkpoint in steps or [find_folder(run)]:
            evaluate(run, checkpoint, benchmark, pairs, cfg)


main = script(evaluate_runs, Config)

if __name__ == "__main__":
    main()
