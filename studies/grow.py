"""A trained encoder as one twice as wide and some layers deeper, to pretrain on from.

    python -m studies.grow runs/nano-tiny --n_layers 4 --out runs/grown
    python pretrain.py nano-small --start_from runs/grown --data data/mine

The large one computes what the small one does (bert2BERT's function-preserving form, Chen et al.
2021, arXiv 2110.07143; its copies of a unit would stay equal, so here the weights that read them
differ by noise that cancels). Heads keep their number, so their slopes, and become twice as wide.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor

from corpus.tokenizer import Tokenizer
from machine import script
from model import MaskedLM, find_folder
from records import BadInput, make_folder


@dataclass
class Config:
    run: tyro.conf.Positional[str]  # run folder or checkpoint
    out: str  # folder for the weights and their tokenizer
    n_layers: int = 0  # of the large one; 0: as many as now
    seed: int = 0


@torch.no_grad()
def grow(small: MaskedLM, n_layers: int, seed: int = 0) -> MaskedLM:
    """`small` with every vector of width d as [x; x], and layers on top that change nothing.

    RoPE: a head of width 2D has the frequencies of one of width D at its even pairs and new ones
    between. There queries begin at 0, so scores are those of before."""
    cfg, random = small.cfg, torch.Generator().manual_seed(seed)
    large = MaskedLM(replace(cfg, d_model=2 * cfg.d_model, d_ff=2 * cfg.d_ff, n_layers=n_layers))
    heads, top = cfg.n_heads, cfg.n_layers - 1

    def twice(w: Tensor, n_out: int = 1, n_in: int = 1) -> Tensor:
        """(o, i) -> (2o, 2i): rows and columns twice within each of their n_out and n_in groups."""
        w = w.unflatten(0, (n_out, -1)).unflatten(2, (n_in, -1))
        w = torch.cat([w, w], 1) / 2
        noise = torch.randn(w.shape, generator=random) * 0.014  # 0.7 of a new weight
        return torch.cat([w + noise, w - noise], 3).flatten(2).flatten(0, 1)

    def qkv(w: Tensor) -> Tensor:
        """(3 d, i) -> (6 d, 2 i), or the bias as (3 d, 1) -> (6 d, 2)."""
        q, k, v = w.chunk(3)
        n = cfg.d_model // 2 if "rope" in cfg.position else heads  # RoPE turns pairs of columns
        q, k = (twice(x, n) * 2**0.25 for x in (q, k))  # 1/√(2D)
        q.unflatten(0, (n, 2, -1))[:, 1] = 0
        return torch.cat([q, k, twice(v, heads)])

    new, old = large.state_dict(), small.state_dict()
    for name in new:
        parts = name.split(".")
        if added := parts[1] == "layers" and int(parts[2]) > top:
            parts[2] = str(top)
        w = old[".".join(parts)]
        ends_layer = "mlp_norm" in name and cfg.norm == "post"
        if added and (".attention_out." in name or ".mlp.out." in name):
            value = torch.zeros_like(new[name])
        elif (added and "attention_norm" in name and cfg.norm == "post") or (
                ends_layer and top <= int(parts[2]) and name.split(".")[2] != str(n_layers - 1)):
            # LN of a normalised x is x, without gain and bias: these move to the last layer
            value = torch.full_like(new[name], float(name.endswith("weight")))
        elif name == "head.decoder.bias":
            value = w
        elif w.dim() == 1:
            value = qkv(w[:, None]).sum(1) if "qkv" in name else torch.cat([w, w])
            value = value / 2 if name.startswith("head.norm") else value  # logits sum two halves
        elif "embeddings" in name or "decoder" in name:
            value = torch.cat([w, w], 1)
        elif "qkv" in name:
            value = qkv(w)
        else:
            halves = 2 if cfg.mlp == "geglu" and "mlp.inp" in name else 1
            value = twice(w, halves, heads if "attention_out" in name else 1)
        new[name].copy_(value)
    return large


def write_grown(cfg: Config) -> None:
    """Grow a checkpoint and write it with its tokenizer, whole or not at all. BadInput for fewer
    layers than now, and for a folder that is there, which may hold a run."""
    source, out = find_folder(cfg.run), Path(cfg.out)
    small, tokenizer = MaskedLM.from_pretrained(source), Tokenizer.load(source)
    n_layers = cfg.n_layers or small.cfg.n_layers
    if n_layers < small.cfg.n_layers:
        raise BadInput(f"--n_layers {n_layers}: {source} has {small.cfg.n_layers} already")
    if out.exists():
        raise BadInput(f"--out {out} exists; remove it or give another")
    make_folder(out.parent)
    large, unfinished = grow(small, n_layers, cfg.seed), out.with_name(f".{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    large.save_pretrained(unfinished)
    tokenizer.save(unfinished)
    unfinished.rename(out)
    print(f"wrote {out}: {small.n_params():,} -> {large.n_params():,} parameters")


main = script(write_grown, Config)

if __name__ == "__main__":
    main()
