"""Times whole training steps (data, forward, backward, optimizer) against transformers' encoders.

    python -m bench.step                                     # base and large on a GPU, 4 layers × 256 on a CPU
    python -m bench.step --sizes base --seq_lens 128 --data data/c4

Contenders, all in this run and in turns: our MosaicBERT shape (30 % masking) and BERT shape (15 %), through the
batches, masking, model and optimizer of pretrain.py; transformers' BertForMaskedLM (15 %) and ModernBertForMaskedLM
(30 %) of the same layers, width and vocabulary, on batches padded to seq_len, with SDPA. Every one eager and compiled,
with the same autocast, dropout and fused AdamW. One that does not run is listed with its reason.

tok/s counts real tokens, never padding, and excludes compilation, which "first step" shows. Numbers are medians over
the rounds, ratios medians of the ratios within a round. MFU is model.flops_per_token (the head on masked tokens only)
times real tok/s over the GPU's peak. On a GPU the parts are timed by events, so "data" is what the GPU waits for.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from batches import Batch, Batches, count_masked, mask_tokens
from bench.kernels import C4_QUANTILES
from corpus.shards import Corpus
from corpus.tokenizer import SPECIALS, Tokenizer
from kernels import attention_backend
from machine import (
    device_name,
    failure,
    hardware_name,
    peak_tflops,
    pick_device,
    pick_dtype,
    read_command_line,
    write_report,
)
from model import MaskedLM, flops_per_token
from pretrain import build, make_optimizers, model_inputs
from recipes import make_presets, masking_rate

PARTS = ("data", "forward", "backward", "optimizer")


@dataclass
class Config:
    sizes: tuple[Literal["base", "large", "small", "tiny"], ...] = ()  # default: base large on a GPU, small elsewhere
    seq_lens: tuple[int, ...] = (128, 512)  # documents are cut here, and the peers' padded to it
    data: str = ""  # folder made by prepare_c4.py; default: random ids in documents as long as C4's, 30,528 entries
    # real tokens of a step; default: 32,768 on a GPU (an eager peer of base size needs some 40 GB for them), else what
    # pretrain.py's preset of that size has
    micro_tokens: int = 0
    dropout: float = 0.1  # of every contender; the attention's too, except in the MosaicBERT shape and ModernBERT
    compile: Literal["both", "on", "off"] = "both"
    rounds: int = 5  # each contender has one turn in each
    steps: int = 4  # of a turn
    warmup: int = 3  # steps before the first round
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls; weights stay float32
    profile: str = ""  # text file for the kernels of three steps of the first contender that ran, by time
    out: str = ""  # where to write; default results/step-<device>.json


# ----------------------------------------------------------------------------- data


class RandomCorpus:
    """Looks like a Corpus to Batches: documents of C4's lengths, ids as unequally frequent as words."""

    folder, split = "random ids", "train"

    def __init__(self, vocab_size: int, n_documents: int = 5_000):
        rng = np.random.default_rng(0)
        at = rng.uniform(0, 100, n_documents)
        self.lengths = np.interp(at, np.linspace(0, 100, len(C4_QUANTILES)), C4_QUANTILES).astype(np.int64)
        self.ends = self.lengths.cumsum()
        span = vocab_size - len(SPECIALS)
        self.ids = (len(SPECIALS) - 1 + span ** rng.uniform(0, 1, self.ends[-1])).astype(np.uint16)  # Zipf's law

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.ids[self.ends[i] - self.lengths[i] : self.ends[i]]


def open_data(folder: str) -> tuple[Corpus | RandomCorpus, Tokenizer | SimpleNamespace]:
    """The documents, and their tokenizer or what masking needs of one."""
    if folder:
        corpus = Corpus(folder)
        return corpus, Tokenizer.load(corpus.folder)
    special_ids = {f"{name.strip('[]').lower()}_id": i for name, i in SPECIALS.items()}
    return RandomCorpus(30_528), SimpleNamespace(vocab_size=30_528, **special_ids)


def first_documents(batch: Batch, n: int) -> Batch:
    """The flat batch of the first `n` documents of `batch`."""
    end = int(batch.cu_seqlens[n])
    return Batch(batch.input_ids[:end], batch.cu_seqlens[: n + 1], batch.special[:end], n)


def padded(
    ids: Tensor, masked_idx: Tensor, labels: Tensor, cu_seqlens: Tensor, seq_len: int, pad_id: int
) -> dict[str, Tensor]:
    """A flat masked batch as transformers takes it: input_ids, attention_mask, labels (B, S), labels -100 elsewhere."""
    real = torch.arange(seq_len) < cu_seqlens.diff()[:, None]  # (B, S)
    flat_labels = torch.full_like(ids, -100)
    flat_labels[masked_idx] = labels
    out = {"input_ids": torch.full(real.shape, pad_id), "labels": torch.full(real.shape, -100)}
    out["input_ids"][real], out["labels"][real] = ids, flat_labels
    return out | {"attention_mask": real.long()}


# ----------------------------------------------------------------------------- contenders


@dataclass
class Contender:
    """A model in training. `build(m)` makes micro-batch m on a thread, as pretrain.py does; `inputs(m, built)` masks
    tokens and brings it to the device: (arguments of `loss`, real tokens)."""

    name: str
    model: nn.Module
    optimizers: list[tuple[torch.optim.Optimizer, float]]  # each with its learning rate
    build: Callable[[int], Any]
    inputs: Callable[[int, Any], tuple[dict, int]]
    loss: Callable[..., Tensor]
    flops: float  # useful FLOPs of a real token
    padding: float = 0.0  # share of the positions that are padding
    ahead: Future | None = None
    m: int = 0
    first_step: float = 0.0  # seconds, with compilation
    resident: int = 0  # bytes it keeps on the GPU between steps
    peak: int = 0
    turns: list[dict[str, float]] = field(default_factory=list)  # per turn: tok_per_s, and ms of each part of a step


def ours(cfg: Config, family: str, size: str, seq_len: int, compiled: bool, source, device) -> Contender:
    """The MosaicBERT or BERT shape, by the functions pretrain.py's loop calls."""
    corpus, tokenizer = source
    recipe = make_presets()[f"{family}-{size}"][1]
    dropouts = {f"{kind}_dropout": cfg.dropout for kind in ("embedding", "output", "mlp")}
    attention_dropout = cfg.dropout if family == "bert" else 0.0
    shape = replace(
        recipe.model, vocab_size=tokenizer.vocab_size, attention_dropout=attention_dropout, **dropouts,
    )  # fmt: skip
    recipe = replace(recipe, model=shape, optimizer="adamw", micro_tokens=cfg.micro_tokens or recipe.micro_tokens)
    shape.check()
    model = MaskedLM(shape).to(device)
    forward = torch.compile(model) if compiled else model
    batches = Batches([corpus], tokenizer, seq_len, recipe.micro_tokens, "first", recipe.seed)
    rate = masking_rate(recipe.masking, 0.0)
    triton = attention_backend(device.type, shape.attention, attention_dropout)[0] == "triton"

    def inputs(m, built):
        batch, tiles = built
        n_masked = count_masked(batches, m, rate)
        ids, masked_idx, labels = mask_tokens(batch, tokenizer, n_masked, recipe.corruption, recipe.seed, m, device)
        return model_inputs(ids, batch.cu_seqlens, tiles, masked_idx, labels, seq_len, device), len(ids)

    return Contender(
        f"{family}-{size}", model, make_optimizers(recipe, model, device),
        lambda m: build(batches, m, triton, device), inputs,
        lambda **x: forward(**x)[0] / len(x["labels"]), flops_per_token(shape, batches.effective_length(), rate),
    )  # fmt: skip


def theirs(cfg: Config, family: str, size: str, seq_len: int, compiled: bool, source, device) -> Contender:
    """transformers' BertForMaskedLM or ModernBertForMaskedLM of the same shape, on padded batches of a fixed number of
    documents: as many as our step has."""
    import transformers

    corpus, tokenizer = source
    recipe = make_presets()[f"{family}-{size}"][1]
    recipe = replace(recipe, optimizer="adamw", micro_tokens=cfg.micro_tokens or recipe.micro_tokens)
    shape = replace(recipe.model, vocab_size=tokenizer.vocab_size)
    same = dict(
        vocab_size=shape.padded_vocab_size, hidden_size=shape.d_model, num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads, intermediate_size=shape.d_ff, attn_implementation="sdpa",
        pad_token_id=tokenizer.pad_id, max_position_embeddings=shape.max_positions,
    )  # fmt: skip
    if family == "bert":
        name = "BertForMaskedLM"
        dropouts = dict(hidden_dropout_prob=cfg.dropout, attention_probs_dropout_prob=cfg.dropout)
        model = transformers.BertForMaskedLM(transformers.BertConfig(**same, **dropouts))
    else:
        name = "ModernBertForMaskedLM"
        dropouts = dict(embedding_dropout=cfg.dropout, mlp_dropout=cfg.dropout)
        ends = dict(cls_token_id=tokenizer.cls_id, sep_token_id=tokenizer.sep_id)
        ends |= dict(bos_token_id=tokenizer.cls_id, eos_token_id=tokenizer.sep_id)
        sparse = dict(sparse_prediction=True)  # its head on the masked tokens only, as ours and as its authors train
        model = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**same, **dropouts, **ends, **sparse))
    model.to(device).train()
    forward = torch.compile(model) if compiled else model
    plan = Batches([corpus], tokenizer, seq_len, recipe.micro_tokens, "first", recipe.seed)
    n = plan(0).n_documents
    batches = Batches([corpus], tokenizer, seq_len, n * seq_len, "first", recipe.seed)  # holds at least n
    rate = masking_rate(recipe.masking, 0.0)

    def build(m):
        batch = first_documents(batches(m), n)
        n_masked = max(1, round(rate * int((~batch.special).sum())))
        flat = mask_tokens(batch, tokenizer, n_masked, recipe.corruption, recipe.seed, m, torch.device("cpu"))
        out = padded(*flat, batch.cu_seqlens, seq_len, tokenizer.pad_id)
        return {k: x.pin_memory() if device.type == "cuda" else x for k, x in out.items()}, len(batch.input_ids)

    def inputs(m, built):
        out, n_real = built
        return {k: x.to(device, non_blocking=True) for k, x in out.items()}, n_real

    return Contender(
        name, model, make_optimizers(recipe, model, device), build, inputs,
        lambda **x: forward(**x).loss, flops_per_token(shape, batches.effective_length(), rate),
        padding=1 - build(0)[1] / (n * seq_len),
    )  # fmt: skip


# ----------------------------------------------------------------------------- timing


class Marks:
    """Moments on the device's own clock."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def __call__(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            if self.device.type == "mps":
                torch.mps.synchronize()
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self.marks)]
        return [b - a for a, b in pairwise(self.marks)]


def take_turn(c: Contender, steps: int, device: torch.device, dtype: torch.dtype, pool: ThreadPoolExecutor) -> dict:
    """Train `steps` steps: {tok_per_s of real tokens, ms of each part of a step}."""
    c.ahead = c.ahead or pool.submit(c.build, c.m)
    c.ahead.result()
    mark, n_real = Marks(device), 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    mark()
    for _ in range(steps):
        built, m = c.ahead.result(), c.m
        c.m += 1
        c.ahead = pool.submit(c.build, c.m)  # built while this one is computed
        inputs, n = c.inputs(m, built)
        n_real += n
        mark()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = c.loss(**inputs)
        mark()
        loss.backward()
        mark()
        for optimizer, _ in c.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mark()
    seconds = mark.seconds()
    if device.type == "cuda":
        c.peak = max(c.peak, torch.cuda.max_memory_allocated() - before)
    c.ahead.result()  # it must not run into the next contender's turn
    return {"tok_per_s": n_real / sum(seconds)} | {
        f"{part}_ms": 1e3 * sum(seconds[i::4]) / steps for i, part in enumerate(PARTS)
    }


def mfu(tok_per_s: float, flops: float, device: str) -> float | None:
    """Share of the GPU's peak that the useful FLOPs reach; None where the peak is not known."""
    peak = peak_tflops(device)
    return tok_per_s * flops / (peak * 1e12) if peak else None


def compare(cfg: Config, size: str, seq_len: int, source, device: torch.device, dtype: torch.dtype) -> dict:
    """All contenders of one size and length, in turns: rows of the table, and the ratios between them."""
    torch._dynamo.reset()
    modes = {"both": (False, True), "on": (True,), "off": (False,)}[cfg.compile]
    pool = ThreadPoolExecutor(1)
    running, rows = [], []
    wanted = [(make, family, c) for make in (ours, theirs) for family in ("mosaic", "bert") for c in modes]
    for make, family, compiled in wanted:
        label = f"{'ours' if make is ours else 'transformers'}, {family}{', compiled' if compiled else ''}"
        try:
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            torch.manual_seed(0)
            c = make(cfg, family, size, seq_len, compiled, source, device)
            c.name += ", compiled" if compiled else ""
            start = time.perf_counter()
            take_turn(c, 1, device, dtype, pool)
            c.first_step = time.perf_counter() - start
            take_turn(c, cfg.warmup, device, dtype, pool)
            print(f"{c.name}: first step {c.first_step:.1f} s", flush=True)
            c.peak, c.resident = 0, torch.cuda.memory_allocated() - before if device.type == "cuda" else 0
            running.append(c)
        except Exception as error:  # whatever a contender raises is the finding
            rows.append({"name": label, "failed": failure(error)})
    failed = {}
    for _ in range(cfg.rounds):
        for c in running:
            if c.name not in failed:
                try:
                    c.turns.append(take_turn(c, cfg.steps, device, dtype, pool))
                except Exception as error:
                    failed[c.name] = failure(error)
    done = [c for c in running if c.name not in failed]
    if cfg.profile and done:
        with torch.profiler.profile() as trace:
            take_turn(done[0], 3, device, dtype, pool)
        by = f"self_{device.type if device.type == 'cuda' else 'cpu'}_time_total"
        table = trace.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=90)
        with open(cfg.profile, "a", encoding="utf-8") as f:
            f.write(f"{size}, {seq_len}, {done[0].name}, 3 steps\n{table}\n")
    pool.shutdown()
    rows += [{"name": name, "failed": why} for name, why in failed.items()]
    for c in done:
        row = {key: statistics.median(t[key] for t in c.turns) for key in c.turns[0]}
        gigabytes = round((c.resident + c.peak) / 2**30, 2) if device.type == "cuda" else None
        rows.append({
            "name": c.name, "n_params": sum(p.numel() for p in c.model.parameters()), **row,
            "mfu": mfu(row["tok_per_s"], c.flops, device_name(device)) if device.type == "cuda" else None,
            "peak_mem_gb": gigabytes, "padding": c.padding, "first_step_s": c.first_step,
            "rounds": [t["tok_per_s"] for t in c.turns],
        })  # fmt: skip
    ratios = {
        a.name: {
            b.name: statistics.median(x["tok_per_s"] / y["tok_per_s"] for x, y in zip(a.turns, b.turns))
            for b in done
            if "ForMaskedLM" in b.name
        }
        for a in done
        if "ForMaskedLM" not in a.name
    }
    return {"size": size, "seq_len": seq_len, "contenders": rows, "ratios": ratios}


# ----------------------------------------------------------------------------- the report


def print_comparison(result: dict) -> None:
    """The table of one size and length, and below it the ratios."""
    print(f"\n{result['size']}, documents cut at {result['seq_len']}")
    heads = [f"{part} ms" for part in PARTS] + ["first step s"]
    print(f"{'':36}{'tok/s':>10}{'MFU':>7}{'GB':>6}" + "".join(f"{head:>14}" for head in heads))
    for row in result["contenders"]:
        if "failed" in row:
            print(f"{row['name']:36}did not run: {row['failed']}")
            continue
        share = f"{row['mfu']:7.1%}" if row["mfu"] else f"{'-':>7}"
        memory = f"{row['peak_mem_gb']:6.1f}" if row["peak_mem_gb"] else f"{'-':>6}"
        parts = "".join(f"{row[f'{p}_ms']:14.1f}" for p in PARTS)
        print(f"{row['name']:36}{row['tok_per_s']:10,.0f}{share}{memory}{parts}{row['first_step_s']:14.1f}")
    for name, others in result["ratios"].items():
        for other, ratio in others.items():
            print(f"{name:24} {ratio:6.2f} × {other}", flush=True)


def run(cfg: Config) -> dict:
    """Measure, print, write the report; returns what was written."""
    if min(cfg.rounds, cfg.steps, cfg.warmup) < 1:
        raise SystemExit("error: --rounds, --steps and --warmup must be at least 1")
    if min(cfg.seq_lens, default=0) < 3:
        raise SystemExit("error: --seq_lens: a document needs [CLS], a token and [SEP], so at least 3")
    try:
        device = pick_device(cfg.device)
        source = open_data(cfg.data)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    dtype = pick_dtype(cfg.dtype, device)
    if device.type == "cuda" and not cfg.micro_tokens:
        cfg = replace(cfg, micro_tokens=32_768)
    sizes = cfg.sizes or (("base", "large") if device.type == "cuda" else ("small",))
    print(f"{hardware_name(device)}, {torch.get_num_threads()} threads, {dtype}, dropout {cfg.dropout}")
    results = []
    for size in sizes:
        for seq_len in cfg.seq_lens:
            results.append(compare(cfg, size, seq_len, source, device, dtype))
            print_comparison(results[-1])
            if device.type == "cuda":
                torch.cuda.empty_cache()
            body = {"settings": asdict(cfg), "dtype": str(dtype), "threads": torch.get_num_threads()}
            body["results"] = results
            # after each: a kill loses the next one at most
            print(f"wrote {write_report('step', body, device, cfg.out)}", flush=True)
    return body


if __name__ == "__main__":
    run(read_command_line(Config, prog="python -m bench.step", about=__doc__))
