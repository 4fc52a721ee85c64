"""Times the kernels against their peers on the GPU at hand, and writes what it found to results/.

    python -m bench.kernels                    # everything -> results/kernels-<gpu>.json
    python -m bench.kernels --lengths 128 512  # some document lengths only

Every number is the median of device-timed runs on random bf16 data (zeros run faster), with the L2 cache overwritten
between runs. "roofline" is the share reached of the speed that the hardware allows: FLOPs at the rate of a large matrix
product or bytes at the rate of a large copy, whichever takes longer, both measured in the same run. A peer that does
not run is listed with its reason. Compilation is not timed.
"""

import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch._functorch.config
import torch.nn.functional as F

import kernels
from machine import failure, read_command_line, write_report

# Tokens per document at each 5 % of C4's length distribution, without [CLS] and [SEP]: the first 3,000 documents of its
# train split under a vocabulary of 30,528, mean 472. The tail: 2 % of the documents hold a fifth of the tokens.
C4_QUANTILES = [11, 51, 69, 86, 103, 123, 146, 171, 197, 227, 264, 307, 351, 406, 464, 547, 645, 770, 1013, 1453, 13607]
C4_TAIL = {98: 2651, 99: 3565, 99.9: 7852}  # percentile: tokens


@dataclass
class Config:
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)  # tokens per document, and where C4's are cut
    tokens: int = 65_536  # tokens in a batch
    heads: int = 12
    head_dim: int = 64
    d_ff: int = 3_072  # width of one half of the feed-forward
    vocab: int = 30_528
    masked: float = 0.3  # share of the tokens that reach the cross entropy
    repeats: int = 30  # timed runs of each function
    out: str = ""  # where to write; default results/kernels-<gpu>.json


# ----------------------------------------------------------------------------- timing


class Timer:
    """Median milliseconds of a function on the device."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        # 1 GB: writing it empties the L2 cache
        self.flush = torch.empty(2**28, dtype=torch.int32, device="cuda")

    def __call__(self, f) -> float:
        for _ in range(3):
            f()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        for start, end in pairs:
            self.flush.zero_()
            torch.cuda._sleep(2_000_000)  # a millisecond, for what the host needs long to launch
            start.record()
            f()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)


def measured_roofline(timer: Timer) -> dict:
    """TFLOP/s of an 8192^3 bf16 product and GB/s of a 2 GB copy (its reads and its writes)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return {
        "tflops": 2 * 8192**3 / timer(lambda: a @ b) / 1e9,
        "gb_per_s": 2 * source.nbytes / timer(lambda: target.copy_(source)) / 1e6,
    }


def rates(ms: float, flops: float, n_bytes: float, roofline: dict) -> dict:
    """One timing as {ms, tflops, gb_per_s, roofline (0..1)}."""
    floor = max(flops / roofline["tflops"] / 1e9, n_bytes / roofline["gb_per_s"] / 1e6)
    return {"ms": ms, "tflops": flops / ms / 1e9, "gb_per_s": n_bytes / ms / 1e6, "roofline": floor / ms}


def attempt(f) -> dict:
    """f(), or {"failed": the first line of its error}: one peer must not end the benchmark."""
    try:
        return f()
    except Exception as error:  # whatever a peer raises is the finding
        torch.cuda.empty_cache()
        return {"failed": failure(error)}


# ----------------------------------------------------------------------------- attention


def draw_lengths(n: int, tokens: int, c4: bool) -> list[int]:
    """Document lengths that fill `tokens`: all n, or C4's with [CLS] and [SEP] cut at n; the last is cut to fit."""
    if c4:
        g = torch.Generator().manual_seed(0)
        percent = 100 * torch.rand(tokens // 8, generator=g).numpy()
        at = [*range(0, 100, 5), *C4_TAIL, 100]
        drawn = np.interp(percent, at, [*C4_QUANTILES[:-1], *C4_TAIL.values(), C4_QUANTILES[-1]])
        lengths = torch.from_numpy(drawn).long().add(2).clamp(max=n)
    else:
        lengths = torch.full((tokens // n + 1,), n)
    ends = lengths.cumsum(0).clamp(max=tokens)
    return [x for x in ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist() if x]


def attention_cost(lengths: list[int], heads: int, head_dim: int) -> dict:
    """{"forward" | "backward": (FLOPs, bytes that must move in bf16)}: two matrix products, then five; q, k, v in and
    out out, then q, k, v and dout in and dq, dk, dv out. The peers' biases, masks and padding are not counted."""
    flops = 4 * sum(n * n for n in lengths) * heads * head_dim
    unit = 2 * sum(lengths) * heads * head_dim
    return {"forward": (flops, 4 * unit), "backward": (2.5 * flops, 7 * unit)}


def pointwise_bytes(T: int, d: int, ff: int, V: int, M: int) -> dict:
    """{kernel: bytes that must move in bf16, (forward, backward)}; one number a row or a column is not counted."""
    return {
        "geglu": (2 * 3 * T * ff, 2 * 5 * T * ff),  # two halves in, one out; they and its gradient in, two out
        "add_layer_norm": (2 * 3 * T * d, 2 * 4 * T * d),  # x, residual in, y out; they and dy in, dz out
        "masked_cross_entropy": (
            2 * M * V,
            2 * M * V,
        ),  # logits in, gradient out (ours: in the forward)
        "gather_rows (unpad)": (2 * 2 * M * d, 2 * (M + T) * d),  # its backward is a scatter, zeros included
        "scatter_rows (pad)": (2 * (M + T) * d, 2 * 2 * M * d),
    }


def attention_peers(qkv, dout, lengths: list[int], slopes, device: str = "cuda") -> dict:
    """{name: function that returns (forward, inputs, output gradient)}. Peers get their layout for free, untimed."""
    T, _, H, D = qkv.shape
    n, B = max(lengths), len(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    document = torch.arange(B, device=device).repeat_interleave(torch.tensor(lengths, device=device)).int()
    uniform = n * B == T

    def leaves(*xs):
        return [x.detach().contiguous().requires_grad_() for x in xs]

    def ours():
        tiles = kernels.attention_tiles(cu).to(device)
        x = leaves(qkv)
        return (lambda: kernels.varlen_attention(*x, cu, n, slopes, tiles=tiles)), x, dout

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        same = lambda b, h, i, j: document[i] == document[j]
        alibi = lambda score, b, h, i, j: score - slopes[h, 0] * (i - j).abs()
        mask = torch.compile(create_block_mask)(same, None, None, T, T, device=device)
        f = torch.compile(flex_attention, dynamic=False)
        x = leaves(*qkv.permute(1, 2, 0, 3)[:, None])  # 3 of (1, H, T, D)
        return (lambda: f(*x, score_mod=alibi, block_mask=mask)), x, dout.transpose(0, 1)[None].contiguous()

    def padded():
        x = torch.zeros(B, n, 3, H, D, device=device, dtype=qkv.dtype)
        g = torch.zeros(B, n, H, D, device=device, dtype=qkv.dtype)
        for i, (a, b) in enumerate(zip(qkv.split(lengths), dout.split(lengths))):
            x[i, : len(a)], g[i, : len(b)] = a, b
        return leaves(*x.permute(2, 0, 3, 1, 4)), g.transpose(1, 2).contiguous()  # 3 of (B, H, n, D), and (B, H, n, D)

    def sdpa_bias():
        x, g = padded()
        i = torch.arange(n, device=device)
        bias = (-slopes[:, :1, None] * (i[:, None] - i).abs()).to(qkv.dtype)[None].expand(B, H, n, n)
        if not uniform:
            past = i >= torch.tensor(lengths, device=device)[:, None]  # (B, n)
            bias = bias.masked_fill(past[:, None, None, :], float("-inf"))
        return (lambda: F.scaled_dot_product_attention(*x, attn_mask=bias)), x, g

    def cudnn():
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if not uniform:
            raise ValueError("without a mask it cannot hide the padding of unequal lengths")
        x, g = padded()

        def f():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(*x)

        return f, x, g

    def varlen():
        from torch.nn.attention.varlen import varlen_attn

        x = leaves(*qkv.transpose(0, 1))  # 3 of (T, H, D)
        return (lambda: varlen_attn(*x, cu, cu, n, n)), x, dout

    return {
        "ours": ours,
        "flex_attention, compiled": flex,
        "padded SDPA with bias": sdpa_bias,
        "padded SDPA cuDNN, no bias": cudnn,
        "varlen_attn, no bias": varlen,
    }


def bench_attention(cfg: Config, timer: Timer, roofline: dict, n: int) -> list[dict]:
    """Ours and the peers on documents of n tokens, and on C4's cut at n."""
    T, H, D = cfg.tokens, cfg.heads, cfg.head_dim
    qkv = torch.randn(T, 3, H, D, device="cuda", dtype=torch.bfloat16)
    dout = torch.randn(T, H, D, device="cuda", dtype=torch.bfloat16)
    slopes = kernels.alibi_slopes(H).cuda()
    rows = []
    for c4 in (False, True):
        lengths = draw_lengths(n, T, c4)
        cost = attention_cost(lengths, H, D)
        for name, make in attention_peers(qkv, dout, lengths, slopes).items():

            def run(make=make, cost=cost):
                f, x, g = make()
                out = f()
                with torch.no_grad():
                    forward = timer(f)
                backward = timer(lambda: torch.autograd.grad(out, x, g, retain_graph=True))
                return {
                    "forward": rates(forward, *cost["forward"], roofline),
                    "backward": rates(backward, *cost["backward"], roofline),
                }

            row = {"documents": f"C4 up to {n}" if c4 else str(n), "provider": name} | attempt(run)
            print_row(row, row["documents"], "tflops", "TFLOP/s")
            rows.append(row)
            time.sleep(0.5)  # the clock recovers from the power limit
    return rows


# ----------------------------------------------------------------------------- matmul


def matmul_shapes(T: int, d: int, ff: int, V: int, M: int) -> dict[str, tuple[int, int, int]]:
    """The encoder's linear layers: (rows, in, out) of each, so 2 rows·in·out FLOPs forward and twice that backward."""
    return {
        "queries, keys, values": (T, d, 3 * d),
        "attention out": (T, d, d),
        "feed-forward in": (T, d, 2 * ff),
        "feed-forward out": (T, ff, d),
        "MLM transform": (M, d, d),
        "MLM decoder": (M, d, V),
    }


def bench_matmul(cfg: Config, timer: Timer, roofline: dict) -> list[dict]:
    """What cuBLAS reaches on the shapes of a step: the ceiling of the whole model."""
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    rows = []
    d = cfg.heads * cfg.head_dim
    for name, (n, i, o) in matmul_shapes(cfg.tokens, d, cfg.d_ff, cfg.vocab, int(cfg.masked * cfg.tokens)).items():
        x, weight, dy = make(n, i), make(o, i), make(n, o)
        cost = 2 * n * i * o, 2 * (n * i + i * o + n * o), roofline
        row = {"matmul": name, "shape": [n, i, o], "provider": "cuBLAS, bf16"} | attempt(
            lambda x=x, weight=weight, dy=dy, cost=cost: {
                "forward": rates(timer(lambda: F.linear(x, weight)), *cost),
                "input gradient": rates(timer(lambda: dy @ weight), *cost),
                "weight gradient": rates(timer(lambda: dy.t() @ x), *cost),
            }
        )
        print_row(row, name, "tflops", "TFLOP/s")
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------- pointwise


def bench_pointwise(cfg: Config, timer: Timer, roofline: dict) -> list[dict]:
    """Each kernel and its compiled reference: forward and backward against the bytes that must move."""
    T, d, ff, V = cfg.tokens, cfg.heads * cfg.head_dim, cfg.d_ff, cfg.vocab
    M = int(cfg.masked * T)
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(V, (M,), device="cuda")
    where = torch.randperm(T, device="cuda")[:M].sort().values
    weight, bias = torch.randn(d, device="cuda"), torch.randn(d, device="cuda")

    def plain_geglu(h):
        gate, up = h.chunk(2, -1)
        return F.gelu(gate) * up

    def plain_norm(x, residual, weight, bias):
        return F.layer_norm(x + residual, (d,), weight.to(x.dtype), bias.to(x.dtype), 1e-12)

    def plain_loss(logits):
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    cases = {  # ours, reference, inputs
        "geglu": (kernels.geglu, plain_geglu, [make(T, 2 * ff)]),
        "add_layer_norm": (
            lambda x, r, w, b: kernels.add_layer_norm(x, r, w, b, 1e-12), plain_norm,
            [make(T, d), make(T, d), weight, bias],
        ),
        "masked_cross_entropy": (
            lambda x: kernels.masked_cross_entropy(x, labels)[0], plain_loss, [make(M, V)],
        ),
        "gather_rows (unpad)": (lambda x: kernels.gather_rows(x, where), lambda x: x[where], [make(T, d)]),
        "scatter_rows (pad)": (
            lambda x: kernels.scatter_rows(x, where, T), lambda x: x.new_zeros(T, d).index_copy(0, where, x),
            [make(M, d)],
        ),
    }  # fmt: skip
    rows = []
    for name, (forward_bytes, backward_bytes) in pointwise_bytes(T, d, ff, V, M).items():
        ours, reference, inputs = cases[name]
        for provider, f in (("ours", ours), ("compiled reference", torch.compile(reference))):

            def run(f=f, inputs=inputs, forward_bytes=forward_bytes, backward_bytes=backward_bytes):
                inputs = [x.detach().requires_grad_() for x in inputs]
                forward = timer(lambda: f(*inputs))
                out = f(*inputs)  # after the timing: the cross entropy overwrites its input
                g = torch.randn_like(out)
                backward = timer(lambda: torch.autograd.grad(out, inputs, g, retain_graph=True))
                return {
                    "forward": rates(forward, 0, forward_bytes, roofline),
                    "backward": rates(backward, 0, backward_bytes, roofline),
                    "both": rates(forward + backward, 0, forward_bytes + backward_bytes, roofline),
                }

            row = {"kernel": name, "provider": provider} | attempt(run)
            print_row(row, name, "gb_per_s", "GB/s")
            rows.append(row)
    return rows


def print_row(row: dict, what: str, key: str, unit: str) -> None:
    if "failed" in row:
        print(f"{what:20} {row['provider']:28} did not run: {row['failed']}", flush=True)
        return
    parts = [
        f"{name} {t['ms']:8.3f} ms {t[key]:6.0f} {unit} {t['roofline']:4.0%}"
        for name, t in row.items()
        if isinstance(t, dict)
    ]
    print(f"{what:20} {row['provider']:28} {'   '.join(parts)}", flush=True)


def run(cfg: Config) -> None:
    """Time every kernel and its peers, print the table, write the JSON."""
    if cfg.repeats < 1:
        raise SystemExit(f"error: --repeats {cfg.repeats}: give at least 1")
    if not torch.cuda.is_available():
        raise SystemExit("error: python -m bench.kernels: no CUDA device here, and the kernels can only be timed on one")
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # else a compiled peer refuses to run its backward more than once
    timer = Timer(cfg.repeats)
    roofline = measured_roofline(timer)
    print(f"roofline of this run: {roofline['tflops']:.0f} TFLOP/s, {roofline['gb_per_s']:.0f} GB/s")
    report = {"settings": asdict(cfg), "roofline": roofline, "attention": []}

    def write() -> None:  # after each part: a kill loses the rest only
        print(f"wrote {write_report('kernels', report, torch.device('cuda'), cfg.out)}", flush=True)

    for n in cfg.lengths:
        report["attention"] += bench_attention(cfg, timer, roofline, n)
        write()
    for part, bench in (("matmul", bench_matmul), ("pointwise", bench_pointwise)):
        report[part] = bench(cfg, timer, roofline)
        write()


if __name__ == "__main__":
    run(read_command_line(Config, prog="python -m bench.kernels", about=__doc__))
