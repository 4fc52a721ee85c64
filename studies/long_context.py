"""How does an encoder trained on short windows do on long ones? The same masks, more context.

    python prepare_c4.py books.jsonl --out data/books --tokenizer data/c4  # the models' vocabulary
    python -m studies.long_context runs/mosaic-base --data data/books    # at 128, 512, 2,048, 8,192
    python -m studies.long_context runs/a runs/b --data data/books --lengths 128 1024
    python -m studies.long_context runs/mosaic-base --data data/pieces --join   # books in pieces

From each document the text of the longest window is taken and 15 % of it masked, once. Then it is
cut into windows of each length: what differs is only how much context a window holds. With ALiBi
the loss should fall beyond the length trained at, or at least not rise (Press et al. 2022 saw
both). Each run becomes results/long-context-<run>.json, all of them one figure.
"""

import math
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor

import plots
from batches import Batch, mask_tokens
from corpus.shards import Corpus
from corpus.tokenizer import Tokenizer
from machine import pick_device, pick_dtype, script, write_report
from model import MaskedLM, find_folder
from records import make_folder, read_json, standard_error


@dataclass
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders (latest checkpoints), or checkpoints
    data: str  # folder made by prepare_c4.py with the models' tokenizer
    lengths: tuple[int, ...] = (128, 512, 2_048, 8_192)  # tokens of a window, with [CLS] and [SEP]
    documents: int = 20  # how many to take, the first ones that are long enough
    join: bool = False  # neighbouring documents are pieces of one: join them to the length needed
    split: str = "val"  # or train, for a folder that no model has seen
    out: str = "results"  # folder of the records and the figure
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"


def long_documents(corpus: Corpus, n_tokens: int, limit: int,
                   join: bool) -> tuple[list[np.ndarray], int]:
    """The first `limit` texts of n_tokens ids, and how many there are in all; each document, or
    with `join` each run of neighbours, gives one. ValueError when there is none."""
    groups, pieces, have = [], [], 0  # documents of each text
    for i, length in enumerate(corpus.lengths.tolist()):
        pieces, have = ([*pieces, i], have + length) if join else ([i], length)
        if have >= n_tokens:
            groups.append(pieces)
            pieces, have = [], 0
    if not groups:
        longest = int(corpus.lengths.max(initial=0))
        raise ValueError(f"{corpus.folder}: no {corpus.split} document has {n_tokens:,} tokens "
                         f"(the longest: {longest:,}); give smaller --lengths, or --join if "
                         "neighbours are pieces of one")
    texts = [np.concatenate([corpus[i] for i in group])[:n_tokens] for group in groups[:limit]]
    return texts, len(groups)


def windows(ids: Tensor, length: int, tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Text ids (N,) cut into windows of `length` with [CLS] and [SEP]: flat ids (T,), cu_seqlens
    (B+1,) int32, and the place (N,) of each token of the text among them."""
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
def evaluate(model: MaskedLM, tokenizer: Tokenizer, texts: list[np.ndarray],
             lengths: tuple[int, ...], dtype: torch.dtype) -> list[dict]:
    """For each length: mean loss (nats) and accuracy over the masked tokens, and the loss by
    position in the window. 15 % of each text is hidden, 80/10/10, the same tokens at every length.
    `gain`: how much lower the loss of the same tokens is than at the first length; `gain_stderr`:
    its standard error over the texts, None for a single one."""
    device = next(model.parameters()).device
    losses = {length: [] for length in lengths}  # of each text (3, M): loss, correct, position
    for m, text in enumerate(texts):
        ids = torch.from_numpy(text.astype(np.int64))
        all_of_it = Batch(ids, torch.tensor([0, len(ids)]), torch.zeros(len(ids), dtype=bool), 1)
        ids, masked, labels = mask_tokens(all_of_it, tokenizer, round(0.15 * len(ids)), "80/10/10",
                                          0, m, device)
        for length in lengths:
            flat, cu_seqlens, place = windows(ids, length, tokenizer)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(flat, cu_seqlens=cu_seqlens, max_seqlen=length,
                               masked_idx=place[masked]).float()
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            rows = loss, (logits.argmax(-1) == labels).float(), masked % (length - 2) + 1
            losses[length].append(torch.stack(rows).cpu().double().numpy())
    result = []
    for length in lengths:
        loss, correct, position = np.concatenate(losses[length], axis=1)
        gain = np.concatenate(losses[lengths[0]], axis=1)[0] - loss  # (tokens,), token by token
        error = round(standard_error(gain.reshape(len(texts), -1).mean(1)), 5)
        edges = [1, *(2**k for k in range(5, 31) if 2**k < length), length]  # 1..31, 32..63, …
        bins = [(a, b - 1, (position >= a) & (position < b)) for a, b in pairwise(edges)]
        result.append({
            "length": length, "loss": round(loss.mean(), 5), "accuracy": round(correct.mean(), 5),
            "gain": round(gain.mean(), 5), "gain_stderr": error if len(texts) > 1 else None,
            "by_position": [
                {"from": a, "to": b, "n": int(here.sum()), "loss": round(loss[here].mean(), 5),
                 "gain": round(gain[here].mean(), 5)} for a, b, here in bins if here.any()]})
    return result


def draw(records: list[dict], path: Path) -> None:
    """Left: loss against the window's length, a line a run. Right: how much lower the loss at each
    position in a window is than that of the same tokens in the shortest windows."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    looks = plots.styles({record["run"]: record["family"] or "" for record in records})
    lengths, handles = [row["length"] for row in records[0]["lengths"]], []
    dashes = dict(zip(lengths[1:], cycle([":", "--", "-", "-."])))
    for record in records:
        look = looks[record["run"]] | {"ls": "-", "ms": 4}
        handles += axes[0].plot(lengths, [row["loss"] for row in record["lengths"]],
                                label=record["run"], **look)
        for row in record["lengths"][1:]:
            place = [(b["from"] * b["to"]) ** 0.5 for b in row["by_position"]]
            gains = [b["gain"] for b in row["by_position"]]
            axes[1].plot(place, gains, **look | {"ls": dashes[row["length"]]})
    handles += [plt.Line2D([], [], color="0.3", ls=ls, label=f"windows of {n:,}")
                for n, ls in dashes.items()]
    gain = f"gain over windows of {lengths[0]:,} (nats)"
    for ax, x, y in zip(axes, ("window (tokens)", "position in the window"),
                        ("MLM loss (nats)", gain)):
        ax.set(xlabel=x, ylabel=y, xscale="log")
        ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
        ax.minorticks_off()
        for record in records:
            ax.axvline(record["seq_len"] or 0, color="0.7", lw=1, zorder=0)
    lines = ["the same masked tokens at each length · grey line: length trained at"]
    plots.finish(figure, str(path), "More context than in training", lines, handles)


def load(run: str, cfg: Config, tokenizer: Tokenizer) -> tuple[MaskedLM, dict]:
    """A run's model, and what its record says of it. ValueError (one line) where it does not fit
    the data or the lengths."""
    checkpoint, of = find_folder(run), {}
    model = MaskedLM.from_pretrained(checkpoint).eval()
    if not tokenizer.same_as(Tokenizer.load(checkpoint)):
        raise ValueError(f"{cfg.data} has another vocabulary than {run}; prepare it with "
                         f"--tokenizer {checkpoint}")
    if model.cfg.position == "learned" and max(cfg.lengths) > model.cfg.max_positions:
        raise ValueError(f"{run} has {model.cfg.max_positions} learned positions; give --lengths "
                         "up to that")
    if checkpoint.parent.name == "ckpt":  # else seq_len and step are None: no run of ours
        of = read_json(checkpoint.parents[1] / "config.json")["train"]
        of = {"seq_len": of["seq_len"]} | read_json(checkpoint / "progress.json")
    return model, {"type": "long_context", "run": of.get("run", Path(run).resolve().name),
                   "family": of.get("family"), "position": model.cfg.position,
                   "seq_len": of.get("seq_len"), "step": of.get("step"),
                   "pretrain_tokens": of.get("tokens")}


def measure_runs(cfg: Config) -> None:
    """Measure every run, then write the records and the figure. ValueError (one line) for what does
    not fit, before anything is measured."""
    if not cfg.runs or not cfg.lengths or min(cfg.lengths) < 3 or max(cfg.lengths) < 6:
        raise ValueError("give a run, and --lengths of 3 or more, the longest 6 or more")
    corpus, out, device = Corpus(cfg.data, cfg.split), Path(cfg.out), pick_device(cfg.device)
    tokenizer, dtype = Tokenizer.load(corpus.folder), pick_dtype("auto", device)
    texts, n = long_documents(corpus, max(cfg.lengths) - 2, max(cfg.documents, 1), cfg.join)
    print(f"{cfg.data}: {n:,} texts of {len(texts[0]):,} tokens or more, {len(texts):,} taken")
    models, records = zip(*[load(run, cfg, tokenizer) for run in cfg.runs])
    if len({record["run"] for record in records}) < len(records):
        raise ValueError("two of these are of one run, so their files would have one name")
    make_folder(out)
    about = {"documents": len(texts), "masked": len(texts) * round(0.15 * len(texts[0])),
             "dtype": str(dtype).removeprefix("torch.")}
    for model, record in zip(models, records):
        lengths = evaluate(model.to(device), tokenizer, texts, cfg.lengths, dtype)
        record |= about | {"lengths": lengths}
        path = out / f"long-context-{record['run']}.json"
        write_report("long-context", record, device, str(path))
        print(f"\n{path}: trained at {record['seq_len']}\nwindow    loss   accuracy   gain")
        for row in lengths:
            print(f"{row['length']:6,}  {row['loss']:.4f}   {row['accuracy']:8.1%}   "
                  f"{row['gain']:+.4f} ± {row['gain_stderr'] or math.nan:.4f}")
    draw(records, path.with_suffix(".png") if len(records) == 1 else out / "long-context.png")


main = script(measure_runs, Config)

if __name__ == "__main__":
    main()
