"""Times the kernels against their peers on the GPU at hand, and writes what it found to results/.

    python -m bench.kernels                    # everything -> results/kernels-<gpu>.json
    python -m bench.kernels --lengths 128 512  # some document lengths only

Every number is the median of device-timed runs on random bf16 data (zeros run faster), with the L2
cache overwritten between runs and compilation left out. "roofline" is the share reached of the
speed that the hardware allows: FLOPs at the rate of a large matrix product or bytes at that of a
large copy, both measured in the same run. A peer that does not run is listed with its reason.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch._functorch.config
import torch.nn.functional as F

import kernels
from machine import failure, report_path, script, write_report

# Tokens per document at percentiles of C4's length distribution, without [CLS] and [SEP]: the first
# 3,000 documents of its train split under a vocabulary of 30,528, mean 472. 2 % of the documents
# hold a fifth of the tokens.
C4_QUANTILES = [11, 51, 69, 86, 103, 123, 146, 171, 197, 227, 264, 307, 351, 406, 464, 547, 645,
                770, 1013, 1453, 2651, 3565, 7852, 13607]
C4_PERCENT = [*range(0, 100, 5), 98, 99, 99.9, 100]


@dataclass
class Config:
    lengths: tuple[int, ...] = (128, 512, 1024, 4096, 8192)  # tokens per document; C4 is cut there
    tokens: int = 65_536  # tokens in a batch
    heads: int = 12
    head_dim: int = 64
    vocab: int = 30_528
    masked: float = 0.3  # share of the tokens that reach the cross entropy
    repeats: int = 30  # timed runs of each function
    out: str = ""  # where to write; default results/kernels-<gpu>.json


# ----------------------------------------------------------------------------------------- timing
class Timer:
    """Median milliseconds of a function on the device."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        # 1 GB: writing it empties the L2 cache
        self.flush = torch.empty(2**28, dtype=torch.int32, device="cuda")

    def __call__(self, f) -> float:
        for _ in range(3):
            f()
        events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(self.repeats)]
        for start, end in events:
            self.flush.zero_()
            torch.cuda._sleep(2_000_000)  # a millisecond, for what the host needs long to launch
            start.record()
            f()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)


def measured_roofline(timer: Timer) -> dict:
    """TFLOP/s of an 8192^3 bf16 product and GB/s of a 1 GB copy (its reads and its writes)."""
    a, b = random(8192, 8192), random(8192, 8192)
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return {"tflops": 2 * 8192**3 / timer(lambda: a @ b) / 1e9,
            "gb_per_s": 2 * source.nbytes / timer(lambda: target.copy_(source)) / 1e6}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def rates(ms: float, flops: float, n_bytes: float, roofline: dict) -> dict:
    """One timing as {ms, tflops, gb_per_s, roofline (0..1)}."""
    floor = max(flops / roofline["tflops"] / 1e9, n_bytes / roofline["gb_per_s"] / 1e6)
    return {"ms": ms, "tflops": flops / ms / 1e9, "gb_per_s": n_bytes / ms / 1e6,
            "roofline": floor / ms}


def measure(what: str, provider: str, unit: str, case: Callable, costs: dict, timer: Timer,
            roofline: dict) -> dict:
    """The row of one provider: forward and backward of case() = (function, inputs, gradient of its
    output), at `costs` = {part: (FLOPs, bytes)}. One that fails must not end the benchmark. Prints
    the row in `unit`, TFLOP/s or GB/s."""
    row, text = {"what": what, "provider": provider}, ""
    try:
        f, inputs, gradient = case()
        times = {"forward": timer(lambda: f(*inputs))}
        out = f(*inputs)  # after the timing: the cross entropy overwrites its input
        times["backward"] = timer(
            lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True))
        for part, ms in times.items():
            row[part] = rates(ms, *costs[part], roofline)
            speed = row[part]["tflops" if unit == "TFLOP/s" else "gb_per_s"]
            text += f"{part} {ms:8.3f} ms {speed:6.0f} {unit} {row[part]['roofline']:4.0%}   "
    except Exception as error:  # whatever a peer raises is the finding
        torch.cuda.empty_cache()
        row["failed"] = failure(error)
        text = f"did not run: {row['failed']}"
    print(f"{what:22} {provider:26} {text}", flush=True)
    return row


# -------------------------------------------------------------------------------------- attention
def draw_lengths(n: int, tokens: int, c4: bool) -> list[int]:
    """Document lengths that fill `tokens`: all n, or C4's with [CLS] and [SEP], cut at n."""
    lengths = torch.full((tokens // n + 1,), n)
    if c4:
        percent = 100 * torch.rand(tokens // 8, generator=torch.Generator().manual_seed(0)).numpy()
        drawn = np.interp(percent, C4_PERCENT, C4_QUANTILES)
        lengths = torch.from_numpy(drawn).long().add(2).clamp(max=n)
    ends = lengths.cumsum(0).clamp(max=tokens)
    return [x for x in ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist() if x]


def attention_cost(lengths: list[int], heads: int, head_dim: int) -> dict:
    """{"forward" | "backward": (FLOPs, bytes that must move in bf16)}: two matrix products, then
    five; q, k, v in, out out, then q, k, v, dout in and dq, dk, dv out. No biases, no padding."""
    flops = 4 * sum(n * n for n in lengths) * heads * head_dim
    unit = 2 * sum(lengths) * heads * head_dim
    return {"forward": (flops, 4 * unit), "backward": (2.5 * flops, 7 * unit)}


def attention_peers(qkv, dout, lengths: list[int], slopes, device: str = "cuda") -> dict:
    """{name: -> (function, inputs, output gradient)}. Peers get their layout free, untimed."""
    T, _, H, D = qkv.shape
    n, B = max(lengths), len(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    sizes = torch.tensor(lengths, device=device)
    document = torch.arange(B, device=device).repeat_interleave(sizes, output_size=T).int()

    def leaves(*xs):
        return [x.detach().contiguous().requires_grad_() for x in xs]

    def ours():
        f = lambda x: kernels.varlen_attention(x, cu, n, slopes)
        return f, leaves(qkv), dout

    def flash():  # FlashAttention 2; 3 has no ALiBi
        from flash_attn import flash_attn_varlen_func

        f = lambda q, k, v: flash_attn_varlen_func(
            q, k, v, cu, cu, n, n, alibi_slopes=slopes[:, 0].contiguous())
        return f, leaves(*qkv.unbind(1)), dout

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        same = lambda b, h, i, j: document[i] == document[j]
        alibi = lambda score, b, h, i, j: score - slopes[h, 0] * (i - j).abs()
        mask = torch.compile(create_block_mask)(same, None, None, T, T, device=device)
        compiled = torch.compile(flex_attention, dynamic=False)
        f = lambda q, k, v: compiled(q, k, v, score_mod=alibi, block_mask=mask)
        x = leaves(*qkv.permute(1, 2, 0, 3)[:, None])  # 3 of (1, H, T, D)
        return f, x, dout.transpose(0, 1)[None].contiguous()

    def padded_sdpa():
        i = torch.arange(n, device=device)
        real = i < sizes[:, None]  # (B, n)
        x, g = qkv.new_zeros(B, n, 3, H, D), dout.new_zeros(B, n, H, D)
        x[real], g[real] = qkv, dout
        bias = (-slopes[:, :1, None] * (i[:, None] - i).abs()).to(qkv.dtype)  # (H, n, n)
        bias = bias.expand(B, H, n, n).masked_fill(~real[:, None, None], float("-inf"))
        x = leaves(*x.permute(2, 0, 3, 1, 4))  # 3 of (B, H, n, D)
        f = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return f, x, g.transpose(1, 2).contiguous()

    return {"ours": ours, "flash_attn": flash, "flex_attention, compiled": flex,
            "padded SDPA with bias": padded_sdpa}


def bench_attention(cfg: Config, timer: Timer, roofline: dict, n: int) -> list[dict]:
    """Ours and the peers on documents of n tokens, and on C4's cut at n."""
    T, H, D = cfg.tokens, cfg.heads, cfg.head_dim
    qkv, dout = random(T, 3, H, D), random(T, H, D)
    slopes = kernels.alibi_slopes(H).cuda()
    rows = []
    for c4 in (False, True):
        lengths = draw_lengths(n, T, c4)
        costs, what = attention_cost(lengths, H, D), f"{'C4 up to' if c4 else 'all'} {n}"
        for name, case in attention_peers(qkv, dout, lengths, slopes).items():
            rows.append(measure(what, name, "TFLOP/s", case, costs, timer, roofline))
            time.sleep(0.5)  # the clock recovers from the power limit
    return rows


# -------------------------------------------------------------------------------------- pointwise
def pointwise_bytes(T: int, d: int, V: int, M: int) -> dict:
    """{kernel: bytes that must move in bf16, (forward, backward)}."""
    ff = 4 * d
    return {
        "geglu, dropout 0.1": (6 * T * ff, 10 * T * ff),  # h in, product out; both in, dh out
        "masked_cross_entropy": (2 * M * V, 2 * M * V),  # logits in; gradient out
    }


class FusedCrossEntropy(torch.autograd.Function):
    """Ours, whose gradient is there after the forward, as model.py uses it."""

    @staticmethod
    def forward(ctx, logits, labels):
        loss, _ = kernels.masked_cross_entropy(logits, labels, keep_gradient=True)
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx, scale):
        return ctx.saved_tensors[0] * scale, None


def bench_pointwise(cfg: Config, timer: Timer, roofline: dict) -> list[dict]:
    """Each kernel and its compiled reference."""
    T, d, V, M = cfg.tokens, cfg.heads * cfg.head_dim, cfg.vocab, int(cfg.masked * cfg.tokens)
    labels = torch.randint(V, (M,), device="cuda")
    cases = {  # ours, reference, input, output
        "geglu, dropout 0.1": (
            lambda x: kernels.geglu(x, 0.1),
            lambda x: F.dropout(kernels.geglu_reference(x), 0.1), (T, 8 * d), (T, 4 * d)),
        "masked_cross_entropy": (
            lambda x: FusedCrossEntropy.apply(x, labels),
            lambda x: F.cross_entropy(x.float(), labels, reduction="sum"), (M, V), ()),
    }
    rows = []
    for name, n_bytes in pointwise_bytes(T, d, V, M).items():
        costs = {part: (0, n) for part, n in zip(("forward", "backward"), n_bytes)}
        ours, reference, shape, out = cases[name]
        for provider, f in (("ours", ours), ("compiled reference", torch.compile(reference))):
            case = lambda f=f, shape=shape, out=out: (
                f, [random(*shape).requires_grad_()], random(*out) if out else None)
            rows.append(measure(name, provider, "GB/s", case, costs, timer, roofline))
    return rows


def run(cfg: Config) -> None:
    """Time every kernel and its peers, print the table, write the JSON."""
    if not torch.cuda.is_available():
        raise SystemExit("error: python -m bench.kernels: no CUDA device here, and the kernels can "
                         "only be timed on one")
    report_path("kernels", torch.device("cuda"), cfg.out)
    torch.manual_seed(0)
    # else a compiled peer refuses to run its backward more than once
    torch._functorch.config.donated_buffer = False
    timer = Timer(cfg.repeats)
    roofline = measured_roofline(timer)
    print(f"roofline: {roofline['tflops']:.0f} TFLOP/s, {roofline['gb_per_s']:.0f} GB/s")
    report = {"settings": asdict(cfg), "roofline": roofline, "attention": []}
    parts = [("attention", lambda n=n: bench_attention(cfg, timer, roofline, n))
             for n in cfg.lengths]
    parts.append(("pointwise", lambda: bench_pointwise(cfg, timer, roofline)))
    for part, bench in parts:
        report[part] = report.get(part, []) + bench()
        # after each part: a kill loses the rest only
        path = write_report("kernels", report, torch.device("cuda"), cfg.out)
        print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    script(run, Config)()
