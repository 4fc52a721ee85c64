"""How does an encoder trained on short windows do on long ones? The same masks, more and more context.

    python prepare_c4.py books.jsonl --out data/books --tokenizer data/c4      # long documents, the model's vocabulary
    python -m studies.long_context runs/mosaic-base --data data/books                  # at 128, 512, 2,048 and 8,192 tokens
    python -m studies.long_context runs/a runs/b --data data/books --lengths 128 1024 --documents 50
    python -m studies.long_context runs/mosaic-base --data data/pieces --join --split train   # books that come in pieces

From each document the text of the longest window is taken and 15 % of it masked, once. Then it is cut into windows of
each length and the same masked tokens are predicted from each: what differs is only how much context a window holds.
With ALiBi the loss should fall beyond the length trained at, or at least not rise (Press et al. 2022 saw both).
Learned positions end at their table. Each run becomes results/long-context-<run>.json, all of them one figure.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor

from batches import Batch, mask_tokens
from corpus.shards import Corpus
from corpus.tokenizer import Tokenizer
from machine import device_name, git_revision, pick_device, pick_dtype, read_command_line
from model import MaskedLM, find_folder
from records import read_json, to_json, write_atomically


@dataclass
class Config:
    """MLM loss of the same masked tokens in windows of several lengths."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders (their latest checkpoints), or checkpoints
    data: str  # folder made by prepare_c4.py with the models' tokenizer
    lengths: tuple[int, ...] = (128, 512, 2_048, 8_192)  # tokens of a window, [CLS] and [SEP] counted
    documents: int = 20  # how many to take, the first ones that are long enough
    join: bool = False  # neighbouring documents are pieces of one: join them until they are long enough
    split: str = "val"  # or train, for a folder that no model has seen
    out: str = "results"  # folder of the records and the figure
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls


def long_documents(corpus: Corpus, n_tokens: int, limit: int, join: bool) -> tuple[list[np.ndarray], int]:
    """The first `limit` texts of n_tokens ids, and how many there are in all; each document, or with `join` each run of
    neighbours, gives one. ValueError when there is none."""
    if not join:
        long = np.flatnonzero(corpus.lengths >= n_tokens)
        texts, available = [corpus[int(i)][:n_tokens] for i in long[:limit]], len(long)
    else:
        texts, available, pieces, have = [], 0, [], 0
        for i, length in enumerate(corpus.lengths.tolist()):
            pieces, have = [*pieces, i], have + length
            if have >= n_tokens:
                available += 1
                if len(texts) < limit:
                    texts.append(np.concatenate([corpus[j] for j in pieces])[:n_tokens])
                pieces, have = [], 0
    if not texts:
        longest = int(corpus.lengths.max(initial=0))
        raise ValueError(
            f"{corpus.folder}: no {corpus.split} document has {n_tokens:,} tokens (the longest: {longest:,}); "
            "give smaller --lengths, longer documents, or --join if neighbours are pieces of one"
        )
    return texts, available


def windows(ids: Tensor, length: int, tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Text ids (N,) cut into windows of `length` with [CLS] and [SEP]: flat ids (T,), cu_seqlens (B+1,) int32, and the
    place (N,) of each token of the text among them."""
    body = length - 2
    place = torch.arange(len(ids), device=ids.device)
    place = place + 2 * (place // body) + 1
    lengths = [min(body, len(ids) - i) + 2 for i in range(0, len(ids), body)]
    cu_seqlens = torch.tensor([0, *lengths], device=ids.device).cumsum(0).int()
    flat = ids.new_full((int(cu_seqlens[-1]),), tokenizer.sep_id)
    flat[cu_seqlens[:-1].long()] = tokenizer.cls_id
    flat[place] = ids
    return flat, cu_seqlens, place


@torch.no_grad()
def evaluate(
    model: MaskedLM, tokenizer: Tokenizer, texts: list[np.ndarray], lengths: tuple[int, ...], dtype: torch.dtype
) -> list[dict]:
    """For each length: mean loss (nats) and accuracy over the masked tokens, and the loss by position in the window.

    15 % of each text is hidden, 80/10/10, the same tokens at every length. `gain`: how much lower the loss of the same
    tokens is than at the first length; `gain_stderr`: its standard error over the texts, None for a single one.
    """
    device = next(model.parameters()).device
    losses = {length: [] for length in lengths}  # of each text: (M,) loss, right or not, position in the window
    for m, text in enumerate(texts):
        ids = torch.from_numpy(text.astype(np.int64))
        everything = Batch(ids, torch.tensor([0, len(ids)]), torch.zeros(len(ids), dtype=torch.bool), 1)
        ids, masked, labels = mask_tokens(everything, tokenizer, round(0.15 * len(ids)), "80/10/10", 0, m, device)
        for length in lengths:
            flat, cu_seqlens, place = windows(ids, length, tokenizer)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(flat, cu_seqlens=cu_seqlens, max_seqlen=length, masked_idx=place[masked]).float()
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            rows = loss, (logits.argmax(-1) == labels).float(), masked % (length - 2) + 1
            losses[length].append(torch.stack(rows).cpu().double().numpy())
    result = []
    for length in lengths:
        loss, right, position = np.concatenate(losses[length], axis=1)
        gain = np.concatenate(losses[lengths[0]], axis=1)[0] - loss  # (tokens,), token by token
        by_text = gain.reshape(len(texts), -1).mean(1)
        edges = [1, *(2**k for k in range(5, 31) if 2**k < length), length]  # 1..31, 32..63, 64..127, …
        bins = [(a, b, (position >= a) & (position < b)) for a, b in pairwise(edges)]
        stderr = by_text.std(ddof=1) / len(texts) ** 0.5 if len(texts) > 1 else None
        result.append({
            "length": length,
            "loss": round(loss.mean(), 5),
            "accuracy": round(right.mean(), 5),
            "gain": round(gain.mean(), 5),
            "gain_stderr": None if stderr is None else round(stderr, 5),
            "by_position": [
                {"from": a, "to": b - 1, "n": int(here.sum()), "loss": round(loss[here].mean(), 5),
                 "gain": round(gain[here].mean(), 5)}
                for a, b, here in bins if here.any()
            ],
        })  # fmt: skip
    return result


def draw(records: list[dict], path: Path) -> None:
    """Left: loss against the window's length, a line a run. Middle: by position in the window. Right: how much lower
    there than that of the same tokens in the shortest window; position alone shows which tokens are hard, not why."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for record, marker in zip(records, "osD^vP*X" * len(records)):
        rows = record["lengths"]
        (line,) = left.plot([r["length"] for r in rows], [r["loss"] for r in rows], marker=marker, label=record["run"])
        for row, style in zip(rows, ["-.", ":", "--", "-"] * len(rows)):
            place = [(b["from"] * b["to"]) ** 0.5 for b in row["by_position"]]
            name = f"{record['run']}, {row['length']:,}" if len(records) > 1 else f"windows of {row['length']:,}"
            look = dict(color=line.get_color(), marker=marker, ms=4, label=name)
            middle.plot(place, [b["loss"] for b in row["by_position"]], style, **look)
            if row is not rows[0]:
                right.plot(place, [b["gain"] for b in row["by_position"]], style, **look)
        for axis in (left, middle, right):
            axis.axvline(record["seq_len"] or 0, color="0.7", lw=1, zorder=0)
    lengths = [row["length"] for row in records[0]["lengths"]]
    right.axhline(0, color="0.3", lw=0.8, zorder=0)
    left.set(xlabel="window (tokens); grey: trained at", ylabel="MLM loss of the same masked tokens (nats)")
    middle.set(xlabel="position in the window (tokens)", ylabel="MLM loss there (nats)")
    right.set(xlabel="position in the window (tokens)", ylabel=f"gain over windows of {lengths[0]:,} (nats)")
    for axis in (left, middle, right):
        axis.set_xscale("log")
        axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axis.minorticks_off()
        axis.grid(color="0.93")
        axis.legend(fontsize=7, frameon=False)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)
    temporary.replace(path)


def describe(run: str, cfg: Config, texts: list[np.ndarray], available: int, tokenizer: Tokenizer) -> dict:
    """What a run's record says besides the losses. ValueError (one line) where the run does not fit the data or the
    lengths."""
    checkpoint = find_folder(run)
    shape = MaskedLM.from_pretrained(checkpoint).cfg
    if not tokenizer.same_as(Tokenizer.load(checkpoint)):
        raise ValueError(f"{cfg.data} has another vocabulary than {run}; prepare it with --tokenizer {checkpoint}")
    if shape.position == "learned" and max(cfg.lengths) > shape.max_positions:
        raise ValueError(f"{run} has {shape.max_positions} learned positions; give --lengths up to that")
    device = pick_device(cfg.device)
    pretraining = {}
    if checkpoint.parent.name == "ckpt":
        config = json.loads((checkpoint.parent.parent / "config.json").read_text())
        pretraining = {"seq_len": config["train"]["seq_len"]} | json.loads((checkpoint / "progress.json").read_text())
    return {
        "type": "long_context",
        "run": pretraining.get("run", Path(run).resolve().name),
        "family": pretraining.get("family"),
        "position": shape.position,
        "seq_len": pretraining.get("seq_len"),  # it was trained at; None for a checkpoint of no run of ours
        "step": pretraining.get("step"),
        "pretrain_tokens": pretraining.get("tokens"),
        "data": cfg.data,
        "split": cfg.split,
        "join": cfg.join,
        "documents": len(texts),
        "available": available,
        "masked": len(texts) * round(0.15 * len(texts[0])),
        "windows": list(cfg.lengths),
        "dtype": str(pick_dtype(cfg.dtype, device)).removeprefix("torch."),
        "device": device_name(device),
        "revision": git_revision(),
        "command": shlex.join(["long_context.py", *sys.argv[1:]]),
    }


def measure_runs(cfg: Config) -> None:
    """Measure every run, then write the records and the figure. ValueError (one line) for what does not fit, before
    anything is measured."""
    if not cfg.runs or not cfg.lengths or min(cfg.lengths) < 3 or max(cfg.lengths) < 6 or cfg.documents < 1:
        raise ValueError("give a run, --lengths of 3 or more, the longest 6 or more, and --documents of 1 or more")
    corpus = Corpus(cfg.data, cfg.split)
    tokenizer = Tokenizer.load(corpus.folder)
    texts, available = long_documents(corpus, max(cfg.lengths) - 2, cfg.documents, cfg.join)
    print(f"{cfg.data}: {available:,} texts of {len(texts[0]):,} tokens or more, {len(texts):,} taken")
    records = [describe(run, cfg, texts, available, tokenizer) for run in cfg.runs]
    if len({record["run"] for record in records}) < len(records):
        raise ValueError("two of these are of one run, and their files would have one name; measure them one by one")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"long-context-{record['run']}.json" for record in records]
    for path, record in zip(paths, records):
        old = read_json(path, "give another --out") if path.is_file() else {}
        same = ("data", "split", "join", "step", "documents", "masked", "windows", "dtype")
        if differ := [k for k in same if old and old.get(k) != record[k]]:
            what = ", ".join(f"{k} {old.get(k)} -> {record[k]}" for k in differ)
            raise ValueError(f"{path} holds another measurement ({what}); give another --out")
    device = pick_device(cfg.device)
    for path, run, record in zip(paths, cfg.runs, records):
        model = MaskedLM.from_pretrained(find_folder(run)).to(device).eval()
        record["lengths"] = evaluate(model, tokenizer, texts, cfg.lengths, pick_dtype(cfg.dtype, device))
        write_atomically(path, to_json(record))
        print(f"\n{record['run']}, trained at {record['seq_len']}: wrote {path}\nwindow    loss   accuracy   gain")
        for row in record["lengths"]:
            error = f" ± {row['gain_stderr']:.4f}" if row["gain_stderr"] else ""
            print(f"{row['length']:6,}  {row['loss']:.4f}   {row['accuracy']:8.1%}   {row['gain']:+.4f}{error}")
    figure = out / ("long-context.png" if len(records) > 1 else f"long-context-{records[0]['run']}.png")
    draw(records, figure)
    print(f"\nwrote {figure}")


def main(args: list[str] | None = None) -> None:
    """Command line; `args` replaces sys.argv[1:] in tests."""
    cfg = read_command_line(Config, args)
    try:
        measure_runs(cfg)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    except OSError as e:
        raise SystemExit(f"error: {e.filename}: {e.strerror}") from None


if __name__ == "__main__":
    main()
