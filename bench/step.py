"""Times whole training steps (data, forward, backward, optimizer) against transformers' encoders.

    python -m bench.step                      # base and large on a GPU, 4 layers × 256 on a CPU
    python -m bench.step --sizes base --seq_lens 128 --data data/c4

In turns: our MosaicBERT shape (30 % masking) and BERT shape (15 %), through the batches, masking,
model and optimizer of pretrain.py; transformers' BertForMaskedLM (15 %) and ModernBertForMaskedLM
(30 %) of the same layers, width and vocabulary, on batches padded to seq_len, with SDPA. Every one
eager and compiled, with the same autocast, dropout and fused AdamW. One that does not run is listed
with its reason.

tok/s counts real tokens, never padding; compilation is in "first step" only. Numbers are medians
over the rounds, ratios medians of the ratios within a round.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import machine
from batches import Batch, Batches, count_masked, mask_tokens
from bench.kernels import C4_PERCENT, C4_QUANTILES
from corpus.shards import Corpus
from corpus.tokenizer import SPECIALS, Tokenizer
from model import MaskedLM, flops_per_token
from pretrain import build, make_optimizers, masked_inputs
from recipes import TrainConfig, make_presets, masking_rate


@dataclass
class Config:
    # default: base large on a GPU, small elsewhere
    sizes: tuple[Literal["base", "large", "small", "tiny"], ...] = ()
    seq_lens: tuple[int, ...] = (128, 512)  # documents are cut here, and the peers' padded to it
    data: str = ""  # folder made by prepare_c4.py; default: random ids in documents as long as C4's
    # real tokens of a step; default: 32,768 on a GPU (an eager peer of base size needs 40 GB for
    # them), else what pretrain.py's preset of that size has
    micro_tokens: int = 0
    dropout: float = 0.1  # also of the attention's weights in the BERT shape
    compile: Literal["both", "on", "off"] = "both"
    rounds: int = 5  # each contender has one turn in each
    steps: int = 4  # of a turn
    warmup: int = 3  # steps before the first round
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matmuls; weights stay float32
    out: str = ""  # where to write; default results/step-<device>.json


class RandomCorpus(list):
    """Like a Corpus: documents of C4's lengths, ids as unequally frequent as words (Zipf's law)."""

    folder, split = "random ids", "train"

    def __init__(self, vocab_size: int, n_documents: int = 5_000):
        rng = np.random.default_rng(0)
        percent = rng.uniform(0, 100, n_documents)
        self.lengths = np.interp(percent, C4_PERCENT, C4_QUANTILES).astype(np.int64)
        ends = self.lengths.cumsum()
        ranks = (vocab_size - len(SPECIALS)) ** rng.uniform(0, 1, ends[-1])
        super().__init__(np.split((len(SPECIALS) - 1 + ranks).astype(np.uint16), ends[:-1]))


def open_data(folder: str) -> tuple[Corpus | RandomCorpus, Tokenizer | SimpleNamespace]:
    """The documents, and their tokenizer or what masking needs of one."""
    if folder:
        return Corpus(folder), Tokenizer.load(folder)
    ids = {f"{name.strip('[]').lower()}_id": i for name, i in SPECIALS.items()}
    return RandomCorpus(30_528), SimpleNamespace(vocab_size=30_528, names=ids.values(), markers=[],
                                                 **ids)


def padded(ids: Tensor, masked_idx: Tensor, labels: Tensor, cu_seqlens: Tensor, seq_len: int,
           pad_id: int) -> dict[str, Tensor]:
    """A flat masked batch as transformers takes it: input_ids, attention_mask, labels (B, S)."""
    real = torch.arange(seq_len) < cu_seqlens.diff()[:, None]  # (B, S)
    flat_labels = torch.full_like(ids, -100)
    flat_labels[masked_idx] = labels
    out = {"input_ids": torch.full(real.shape, pad_id), "labels": torch.full(real.shape, -100)}
    out["input_ids"][real], out["labels"][real] = ids, flat_labels
    return out | {"attention_mask": real.long()}


@dataclass
class Contender:
    """A model in training; inputs(m, build(m)) are (arguments of `loss`, real tokens)."""

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
    rounds: list[float] = field(default_factory=list)  # real tokens a second in each


def recipe_of(cfg: Config, family: str, size: str, vocab_size: int) -> TrainConfig:
    """pretrain.py's preset with AdamW and the same dropout everywhere."""
    recipe = make_presets()[f"{family}-{size}"][1]
    shape = replace(recipe.model, vocab_size=vocab_size, embedding_dropout=cfg.dropout,
                    output_dropout=cfg.dropout, mlp_dropout=cfg.dropout,
                    attention_dropout=cfg.dropout if family == "bert" else 0.0)
    shape.check()
    micro_tokens = cfg.micro_tokens or recipe.micro_tokens
    return replace(recipe, model=shape, optimizer="adamw", micro_tokens=micro_tokens)


def ours(cfg: Config, family: str, size: str, seq_len: int, compiled: bool, source, device
         ) -> Contender:
    """The MosaicBERT or BERT shape, by the functions pretrain.py's loop calls."""
    corpus, tokenizer = source
    recipe = recipe_of(cfg, family, size, tokenizer.vocab_size)
    shape, seed = recipe.model, recipe.seed
    model = MaskedLM(shape).to(device)
    forward = torch.compile(model) if compiled else model
    batches = Batches([corpus], tokenizer, seq_len, recipe.micro_tokens, "first", seed)
    rate = masking_rate(recipe.masking, 0.0)

    def inputs(m, batch):
        how = count_masked(batches, m, rate), recipe.corruption, seed, device
        return masked_inputs(batches, m, batch, *how), len(batch.input_ids)

    return Contender(
        f"{family}-{size}", model, make_optimizers(recipe, model, device),
        lambda m: build(batches, m, device), inputs,
        lambda **x: forward(**x)[0] / len(x["labels"]),
        flops_per_token(shape, batches.effective_length(), rate))


def peer_model(cfg: Config, family: str, shape, tokenizer) -> nn.Module:
    """transformers' BertForMaskedLM or ModernBertForMaskedLM of that shape."""
    import transformers

    same = dict(
        vocab_size=shape.padded_vocab_size, hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers, num_attention_heads=shape.n_heads,
        intermediate_size=shape.d_ff, attn_implementation="sdpa", pad_token_id=tokenizer.pad_id,
        max_position_embeddings=shape.max_positions)
    if family == "bert":
        dropouts = dict(hidden_dropout_prob=cfg.dropout, attention_probs_dropout_prob=cfg.dropout)
        return transformers.BertForMaskedLM(transformers.BertConfig(**same, **dropouts))
    # its head on the masked tokens only, as ours and as its authors train
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(
        **same, embedding_dropout=cfg.dropout, mlp_dropout=cfg.dropout, sparse_prediction=True,
        cls_token_id=tokenizer.cls_id, sep_token_id=tokenizer.sep_id,
        bos_token_id=tokenizer.cls_id, eos_token_id=tokenizer.sep_id))


def theirs(cfg: Config, family: str, size: str, seq_len: int, compiled: bool, source, device
           ) -> Contender:
    """The peer on padded batches of a fixed number of documents: as many as our step has."""
    corpus, tokenizer = source
    recipe = recipe_of(cfg, family, size, tokenizer.vocab_size)
    model = peer_model(cfg, family, recipe.model, tokenizer).to(device).train()
    forward = torch.compile(model) if compiled else model
    flat = lambda n_tokens: Batches([corpus], tokenizer, seq_len, n_tokens, "first", recipe.seed)
    n = flat(recipe.micro_tokens)(0).n_documents
    batches = flat(n * seq_len)  # holds at least n
    rate = masking_rate(recipe.masking, 0.0)

    def build(m):
        whole = batches(m)
        end = int(whole.cu_seqlens[n])
        batch = Batch(whole.input_ids[:end], whole.cu_seqlens[: n + 1], whole.special[:end], n)
        n_masked = max(1, round(rate * int((~batch.special).sum())))
        masked = mask_tokens(batch, tokenizer, n_masked, recipe.corruption, recipe.seed, m,
                             torch.device("cpu"))
        out = padded(*masked, batch.cu_seqlens, seq_len, tokenizer.pad_id)
        pinned = {k: x.pin_memory() if device.type == "cuda" else x for k, x in out.items()}
        return pinned, len(batch.input_ids)

    def inputs(m, built):
        out, n_real = built
        return {k: x.to(device, non_blocking=True) for k, x in out.items()}, n_real

    return Contender(
        type(model).__name__, model, make_optimizers(recipe, model, device), build, inputs,
        lambda **x: forward(**x).loss,
        flops_per_token(recipe.model, batches.effective_length(), rate),
        padding=1 - build(0)[1] / (n * seq_len))


def tokens_per_s(c: Contender, steps: int, device: torch.device, dtype: torch.dtype,
                 pool: ThreadPoolExecutor) -> float:
    """Train `steps` steps; real tokens a second, the wait for batches included."""
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    c.ahead = c.ahead or pool.submit(c.build, c.m)
    c.ahead.result()
    synchronize()
    started, n_real = time.perf_counter(), 0
    for _ in range(steps):
        built, m = c.ahead.result(), c.m
        c.m += 1
        c.ahead = pool.submit(c.build, c.m)  # built while this one is computed
        inputs, n = c.inputs(m, built)
        n_real += n
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = c.loss(**inputs)
        loss.backward()
        for optimizer, _ in c.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    synchronize()
    speed = n_real / (time.perf_counter() - started)
    c.ahead.result()  # it must not run into the next contender's turn
    return speed


def mfu(tok_per_s: float, flops: float, device: str) -> float | None:
    """Share of the GPU's peak that the useful FLOPs reach; None where the peak is not known."""
    peak = machine.peak_tflops(device)
    return tok_per_s * flops / (peak * 1e12) if peak else None


def compare(cfg: Config, size: str, seq_len: int, source, device: torch.device,
            dtype: torch.dtype) -> dict:
    """All contenders of one size and length, in turns: rows of the table, and their ratios, also
    printed."""
    torch._dynamo.reset()
    modes = {"both": (False, True), "on": (True,), "off": (False,)}[cfg.compile]
    running, failed = [], {}
    with ThreadPoolExecutor(1) as pool:
        for make, family, compiled in itertools.product((ours, theirs), ("mosaic", "bert"), modes):
            suffix = ", compiled" * compiled
            try:
                torch.manual_seed(0)
                c = make(cfg, family, size, seq_len, compiled, source, device)
                c.name += suffix
                start = time.perf_counter()
                tokens_per_s(c, 1, device, dtype, pool)
                c.first_step = time.perf_counter() - start
                tokens_per_s(c, cfg.warmup, device, dtype, pool)
                print(f"{c.name}: first step {c.first_step:.1f} s", flush=True)
                running.append(c)
            except Exception as error:  # whatever a contender raises is the finding
                failed[f"{make.__name__}, {family}{suffix}"] = machine.failure(error)
        for c in running * cfg.rounds:
            c.rounds.append(tokens_per_s(c, cfg.steps, device, dtype, pool))
    print(f"\n{size}, documents cut at {seq_len}")
    print(f"{'':32}{'tok/s':>10}{'MFU':>8}{'first step':>13}")
    rows, ratios = [{"name": name, "failed": why} for name, why in failed.items()], {}
    for row in rows:
        print(f"{row['name']:32}did not run: {row['failed']}")
    for c in running:
        speed = statistics.median(c.rounds)
        share = mfu(speed, c.flops, machine.device_name(device))
        print(f"{c.name:32}{speed:10,.0f}{f'{share:.1%}' if share else '-':>8}"
              f"{c.first_step:11.1f} s")
        rows.append({
            "name": c.name, "tok_per_s": speed, "rounds": c.rounds, "padding": c.padding,
            "mfu": share, "first_step_s": c.first_step,
            "n_params": sum(p.numel() for p in c.model.parameters())})
    for a, b in itertools.product(running, running):
        if "ForMaskedLM" in b.name and "ForMaskedLM" not in a.name:
            ratio = statistics.median(x / y for x, y in zip(a.rounds, b.rounds))
            ratios.setdefault(a.name, {})[b.name] = ratio
            print(f"{a.name:24} {ratio:6.2f} × {b.name}", flush=True)
    return {"size": size, "seq_len": seq_len, "contenders": rows, "ratios": ratios}


def run(cfg: Config) -> dict:
    """Measure, print, write the report; returns what was written."""
    device, source = machine.pick_device(cfg.device), open_data(cfg.data)
    machine.report_path("step", device, cfg.out)
    dtype = machine.pick_dtype(cfg.dtype, device)
    if device.type == "cuda" and not cfg.micro_tokens:
        cfg = replace(cfg, micro_tokens=32_768)
    sizes = cfg.sizes or (("base", "large") if device.type == "cuda" else ("small",))
    threads = torch.get_num_threads()
    print(f"{machine.hardware_name(device)}, {threads} threads, {dtype}, dropout {cfg.dropout}")
    body = {"settings": asdict(cfg), "dtype": str(dtype), "threads": threads, "results": []}
    for size, seq_len in [(size, seq_len) for size in sizes for seq_len in cfg.seq_lens]:
        body["results"].append(compare(cfg, size, seq_len, source, device, dtype))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        # after each: a kill loses the next one at most
        print(f"wrote {machine.write_report('step', body, device, cfg.out)}", flush=True)
    return body


if __name__ == "__main__":
    machine.script(run, Config)()
