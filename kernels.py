"""The kernels of nanoMosaicBERT, each Triton kernel below the plain PyTorch it must equal.

A flat batch is `T` tokens in a row plus `cu_seqlens (B+1,) int32`: document b owns rows
cu_seqlens[b] to cu_seqlens[b+1]. Documents may be empty, so a fixed-size cu_seqlens may end in
repeats of its last value; rows after that ("slack") come out as zero and get a zero gradient.

Attention and cross entropy are `torch.library` ops: opaque to torch.compile, so no graph breaks,
and none is compiled anew when the documents change. On CUDA the Triton kernels run, elsewhere the
code under "the CPU backend"; with TRITON_INTERPRET=1 Triton runs on a CPU. No kernel uses atomics:
the same input gives the same bits. Numbers in the comments count instructions and registers of this
file's sm_90 code (triton 3.9), or are arithmetic with an H200's 788 TFLOP/s and 4.3 TB/s; nothing
here has been timed yet, which `python -m bench.kernels` does.
"""

import functools
import itertools
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    TRITON_VERSION = triton.__version__
except ImportError:  # macOS, Windows: the decorators below must still parse, nothing of triton runs
    TRITON_VERSION = ""

    class triton:
        jit = staticmethod(lambda fn=None, **_: fn if fn is not None else (lambda f: f))

    class tl:
        constexpr = staticmethod(lambda x: x)


LOG2E = math.log2(math.e)
FUSION = {"enable_fp_fusion": True}  # a * b + c rounds once; triton 3.10 no longer does by itself
INTERPRET = TRITON_VERSION != "" and os.environ.get("TRITON_INTERPRET") == "1"  # read by triton too


def attention_backend(device_type: str, attention="auto", dropout=0.0) -> tuple[str, str]:
    """Which attention runs on `device_type` ("cuda", "cpu", ...), and why, for a banner line:
    "triton", "cpu" (PyTorch, tuned for CPUs) or "padded" (PyTorch's own on a padded batch) as asked
    for, "auto" by device and by the dropout of the attention weights."""
    if attention != "auto":
        return attention, "asked for"
    if device_type != "cuda":
        return "cpu", f"Triton kernels need CUDA; on {device_type} PyTorch does it"
    if not TRITON_VERSION:
        return "padded", "triton is not installed: PyTorch on a padded batch"
    if dropout > 0:
        return "padded", "the Triton kernel has no dropout: PyTorch on a padded batch"
    return "triton", f"CUDA and triton {TRITON_VERSION}"


def _use_triton(x: Tensor) -> bool:
    return TRITON_VERSION != "" and (x.is_cuda or INTERPRET)


def _wide(x: Tensor) -> Tensor:
    """fp32 for what is narrower; fp32 and fp64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


# ----------------------------------------------------------------------------- position
def alibi_slopes(n_heads: int, ratio: float = 1.0) -> Tensor:
    """ALiBi's slopes of each head, (n_heads, 2) float32: for keys to the left and to the right.

    s = 2^(-8(h+1)/n) where n is a power of two; else the slopes of the power of two below, then
    every other one of the power of two above (Press et al. 2022; MosaicBERT's order). With a ratio
    other than 1 left and right differ: even heads have (s, ratio * s), odd heads (ratio * s, s)
    (forms for encoders: ofirpress/attention_with_linear_biases, issue 5)."""
    n = 2 ** int(math.log2(n_heads))
    slopes = [2.0 ** (-8 * (h + 1) / n) for h in range(n)]
    slopes += [2.0 ** (-4 * (h + 1) / n) for h in range(0, 2 * (n_heads - n), 2)]
    pairs = [(s, ratio * s) if h % 2 == 0 else (ratio * s, s) for h, s in enumerate(slopes)]
    return torch.tensor(pairs, dtype=torch.float32)


def alibi_bias(slopes: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """What ALiBi adds to the scores of queries at i (n,) and keys at j (m,): (H, n, m)."""
    ahead = j - i[:, None]
    slope = torch.where(ahead <= 0, slopes[:, 0, None, None], slopes[:, 1, None, None])
    return -slope * ahead.abs()


def rope_table(n: int, D: int, base: float, device=None, dtype=torch.float32) -> Tensor:
    """RoPE's rotations (Su et al. 2021) of positions 0 to n - 1, (n, D/2) complex: columns 2d and
    2d + 1 of a query or key at position m turn by the angle m * base^(-2d/D)."""
    dtype = torch.promote_types(dtype, torch.float32)
    frequency = base ** (torch.arange(0, D, 2, device=device, dtype=dtype) / -D)
    angle = torch.arange(n, device=device)[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle)


_kept_rope_table = functools.lru_cache(maxsize=16)(rope_table)  # not where autograd saves it


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (..., n, D) with its pairs of columns turned by `table` (n, D/2), in fp32 or wider."""
    x = torch.view_as_complex(_wide(x).unflatten(-1, (-1, 2))) * table
    return torch.view_as_real(x).flatten(-2)


# ----------------------------------------------------------------------------- attention
def attention_reference(qkv: Tensor, cu_seqlens: Tensor, slopes: Tensor | None = None,
                        rope_base: float = 0.0) -> Tensor:
    """What every attention of this file must equal: qkv (T, 3, H, D) -> (T, H, D), one document at
    a time, matmuls in the dtype of qkv, softmax in fp32 or wider. Arguments: varlen_attention."""
    out = torch.zeros_like(qkv[:, 0])
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        q, k, v = qkv[begin:end].permute(1, 2, 0, 3)  # (H, n, D) each
        if rope_base:
            table = rope_table(end - begin, q.shape[-1], rope_base, q.device, q.dtype)
            q, k = rotate(q, table).to(q.dtype), rotate(k, table).to(k.dtype)
        scores = _wide(q @ k.mT) * q.shape[-1] ** -0.5
        if slopes is not None:
            i = torch.arange(end - begin, device=q.device)
            scores = scores + alibi_bias(slopes.to(scores.dtype), i, i)
        out[begin:end] = (scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1)
    return out


# At 128 tokens and D = 64 the forward does 64 FLOP per byte of q, k, v and out, and a Hopper chip
# needs 180 to be busy: below some 370 tokens attention moves bytes, above it multiplies. Two paths:
#   one tile  documents of up to 128 tokens: a program owns a whole (document, head), reads each
#             byte once, needs no online softmax, and does all of the backward: 7 (T, H, D) tensors
#             of traffic, not two kernels' 12
#   loop      longer ones: the forward, then dq, then dk and dv, each holding one tile of one
#             (document, head) and stepping over the others
# Conventions
#   head      the fastest index of the programs: those running together read whole rows of qkv
#   units     scores and lse are in log2 units (exp2 is the hardware's exponential)
#   i, j      query and key position inside the document
#   n         the document's length; rows from n on are a neighbour's: never read, they load as zero
#   offsets   of rows: 64 bits from the start of qkv to a tile, 32 bits inside it

LOG2_E = tl.constexpr(LOG2E)
UPCAST = tl.constexpr(INTERPRET)  # the interpreter's bf16 arithmetic is silently wrong
PRECISION = tl.constexpr("ieee" if INTERPRET else "tf32x3")  # of fp32 operands; others have none


@triton.jit
def _load_rows(base, stride, n, ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """A (ROWS, D) tile at `base`, columns filled up with zeros to a power of two; if MASKED, rows
    from n on are zero."""
    DP: tl.constexpr = triton.next_power_of_2(D)
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, DP)[None, :]
    if MASKED or D < DP:
        mask = ((r < n) if MASKED else (r >= 0)) & (c < D)
        x = tl.load(base + r * stride + c, mask=mask, other=0.0)
    else:
        x = tl.load(base + r * stride + c)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _turn(x, rope, at, n, D: tl.constexpr, BACK: tl.constexpr):
    """Rows x of queries or keys at position `at` of a document of n, or (BACK) their gradient,
    turned by RoPE's table of cosines and sines, (max_seqlen, D/2, 2). A pair of columns is in one
    thread's registers, before a matrix product and after."""
    PAIRS: tl.constexpr = [x.shape[0], x.shape[1] // 2, 2]
    table = _load_rows(rope + at * D, D, n - at, x.shape[0], D, True)
    cos, sin = tl.split(tl.reshape(table, PAIRS))
    sin = -sin if BACK else sin
    a, b = tl.split(tl.reshape(x.to(tl.float32), PAIRS))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), x.shape).to(x.dtype)


@triton.jit
def _store_rows(base, stride, n, x, D: tl.constexpr):
    r = tl.arange(0, x.shape[0])[:, None]
    c = tl.arange(0, x.shape[1])[None, :]
    tl.store(base + r * stride + c, x.to(base.dtype.element_ty), mask=(r < n) & (c < D))


@triton.jit
def _locate(cu_seqlens, n_tiles, H: tl.constexpr, ROWS: tl.constexpr):
    """This program's head, the document's first row and length, and the tile's first row in it, of
    n_tiles tiles a document; those past its end leave at once."""
    pid = tl.program_id(0)
    first = tl.load(cu_seqlens + pid // H // n_tiles)
    n = tl.load(cu_seqlens + pid // H // n_tiles + 1) - first
    return (pid % H).to(tl.int64), first.to(tl.int64), n, (pid // H) % n_tiles * ROWS


@triton.jit
def _load_slopes(slopes, head):
    """A head's slopes for keys to the left and to the right, in log2 units."""
    left, right = 0.0, 0.0
    if slopes is not None:
        left = tl.load(slopes + 2 * head) * LOG2_E
        right = tl.load(slopes + 2 * head + 1) * LOG2_E
    return left, right


@triton.jit
def _add_alibi(s, left, right, x):
    """s - left x where x = i - j is positive, s + right x where negative: mean slope times |x| and
    half the difference times x, two multiply-adds; the bits of s - slope |x| if both are equal."""
    s -= (left + right) * 0.5 * tl.abs(x).to(tl.float32)
    return s - (left - right) * 0.5 * x.to(tl.float32)


@triton.jit(do_not_specialize=["n_tokens", "n_tiles"])
def _attn_one_tile(qkv, out, dout, lse, dqkv, cu_seqlens, slopes, rope, n_tokens, stride, n_tiles,
                   scale, BACKWARD: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
                   ROWS: tl.constexpr):
    """A document of at most ROWS tokens: its scores are one tile, and a plain softmax will do. The
    backward is five matmuls where separate dq and dk/dv kernels need seven, and has delta_i = sum_j
    p_ij dp_ij in registers: `out` is not read at all."""
    head, first, n, i0 = _locate(cu_seqlens, n_tiles, H, ROWS)
    if i0 >= n:
        return
    base = qkv + first * stride + head * D
    q = _load_rows(base, stride, n, ROWS, D, True)
    k = _load_rows(base + H * D, stride, n, ROWS, D, True)
    v = _load_rows(base + 2 * H * D, stride, n, ROWS, D, True)
    if rope is not None:
        q, k = _turn(q, rope, 0, n, D, False), _turn(k, rope, 0, n, D, False)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    i = tl.arange(0, ROWS)
    if slopes is not None:
        left, right = _load_slopes(slopes, head)
        x = i.to(tl.float32)[:, None] - i.to(tl.float32)[None, :]
        s -= tl.maximum(left * x, -right * x)  # by _add_alibi 144 registers, 127 so: two fit an SM
    row = (first * H + head) * D
    if not BACKWARD:
        s = tl.where(i[None, :] < n, s, float("-inf"))
        m = tl.max(s, 1)
        p = tl.exp2(s - m[:, None])
        total = tl.sum(p, 1)
        o = tl.dot(p.to(out.dtype.element_ty).to(v.dtype), v, input_precision=PRECISION)
        _store_rows(out + row, H * D, n, o / total[:, None], D)
        tl.store(lse + head * n_tokens + first + i, m + tl.log2(total), mask=i < n)
    else:
        do = _load_rows(dout + row, H * D, n, ROWS, D, True)
        # +inf, not 0, for rows past the end: their p is then exactly 0 whatever the score
        row_lse = tl.load(lse + head * n_tokens + first + i, mask=i < n, other=float("inf"))
        p = tl.where(i[None, :] < n, tl.exp2(s - row_lse[:, None]), 0.0)
        grad = dqkv + (first * H * 3 + head) * D
        p_low = tl.trans(p.to(dout.dtype.element_ty).to(do.dtype))
        dv = tl.dot(p_low, do, input_precision=PRECISION)
        _store_rows(grad + 2 * H * D, 3 * H * D, n, dv, D)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(qkv.dtype.element_ty).to(q.dtype)
        dq = tl.dot(ds, k, input_precision=PRECISION) * (scale / LOG2_E)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * (scale / LOG2_E)
        if rope is not None:
            dq, dk = _turn(dq, rope, 0, n, D, True), _turn(dk, rope, 0, n, D, True)
        _store_rows(grad, 3 * H * D, n, dq, D)
        _store_rows(grad + H * D, 3 * H * D, n, dk, D)


# Longer documents loop over tiles. ALiBi goes by side of the diagonal: left of it |i - j| = i - j,
# so the bias is a ramp over the columns, the same for every tile, plus a number per row that only
# meets the running maximum (forward) or lse (backward). Off-diagonal tiles then need no abs and no
# mask: the forward's 128 x 128 step is 533 instructions against 832 for the general body. SIDE = -1
# is left of the diagonal, +1 right of it; 0 is the general body, for the diagonal and for the
# ragged tail, peeled off so that it alone pays for masks.
@triton.jit
def _side(SIDE: tl.constexpr, at, HELD: tl.constexpr, STEP: tl.constexpr, n):
    """Where the loop of one side begins and ends, and where its last step jumps to. A program holds
    rows `at` to at + HELD and steps over the others; HELD is a multiple of STEP."""
    after = at + HELD
    full = n // STEP * STEP  # end of the last whole tile
    if SIDE == 0:
        tail = (full >= after) & (full < n)
        begin, end = at, tl.where(tail, after + STEP, tl.minimum(after, n))
    elif SIDE == -1:
        begin, end = 0, at
    else:
        begin, end = after, full
    return begin, end, full


@triton.jit(do_not_specialize=["n_tokens", "n_tiles"])
def _attn_fwd_loop(qkv, out, lse, cu_seqlens, slopes, rope, n_tokens, stride, n_tiles, scale,
                   H: tl.constexpr, D: tl.constexpr, HELD: tl.constexpr, STEP: tl.constexpr):
    """HELD queries of a document against all its keys, STEP at a time, with an online softmax."""
    head, first, n, i0 = _locate(cu_seqlens, n_tiles, H, HELD)
    if i0 >= n:
        return
    left, right = _load_slopes(slopes, head)
    base = qkv + first * stride + head * D
    q = _load_rows(base + stride.to(tl.int64) * i0, stride, n - i0, HELD, D, True)
    acc = tl.zeros(q.shape, tl.float32)
    m = tl.full([HELD], float("-inf"), tl.float32)
    total = tl.zeros([HELD], tl.float32)
    i = i0 + tl.arange(0, HELD)
    column = tl.arange(0, STEP)
    for SIDE in tl.static_range(-1, 2):
        begin, end, tail = _side(SIDE, i0, HELD, STEP, n)
        for step in tl.range(begin, end, STEP, num_stages=1 if SIDE == 0 else None):
            j0 = tl.where(step < i0 + HELD, step, tail) if SIDE == 0 else step
            at = base + stride.to(tl.int64) * j0
            k = _load_rows(at + H * D, stride, n - j0, STEP, D, SIDE == 0)
            v = _load_rows(at + 2 * H * D, stride, n - j0, STEP, D, SIDE == 0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            row_bias = tl.zeros([HELD], tl.float32)
            if SIDE == 0:
                if slopes is not None:
                    x = (i - j0).to(tl.float32)[:, None] - column.to(tl.float32)[None, :]
                    s = _add_alibi(s, left, right, x)
                s = tl.where(column[None, :] < n - j0, s, float("-inf"))
            elif slopes is not None:
                slope = right if SIDE == 1 else -left
                s -= slope * column.to(tl.float32)[None, :]
                row_bias = slope * (i - j0).to(tl.float32)
            m_new = tl.maximum(m, tl.max(s, 1) + row_bias)
            p = tl.exp2(s - (m_new - row_bias)[:, None])
            shrink = tl.exp2(m - m_new)
            total = total * shrink + tl.sum(p, 1)
            p_low = p.to(out.dtype.element_ty).to(v.dtype)
            acc = tl.dot(p_low, v, acc * shrink[:, None], input_precision=PRECISION)
            m = m_new
    row = first + i0
    _store_rows(out + (row * H + head) * D, H * D, n - i0, acc / total[:, None], D)
    tl.store(lse + head * n_tokens + first + i, m + tl.log2(total), mask=i < n)


@triton.jit(do_not_specialize=["n_tokens", "n_tiles"])
def _attn_bwd_loop(qkv, out, dout, lse, delta, dqkv, cu_seqlens, slopes, rope, n_tokens, stride,
                   n_tiles, scale, KEYS: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
                   HELD: tl.constexpr, STEP: tl.constexpr):
    """The gradient of HELD rows against all rows of the document, STEP at a time: dq of queries, or
    (KEYS, scores transposed) dk and dv of keys. Both are s = x x'^T, dp = y y'^T, dx += ds x', x
    being q or k, y do or v. dq runs first and leaves delta_i = sum_d out_id dout_id for dk:
    FlashAttention's "preprocess" without a launch."""
    head, first, n, at = _locate(cu_seqlens, n_tiles, H, HELD)
    if at >= n:
        return
    left, right = _load_slopes(slopes, head)
    if KEYS:  # a query to the left sees the key on its right
        left, right = right, left
    base = qkv + first * stride + head * D
    do_base = dout + (first * H + head) * D
    stat = head * n_tokens + first
    i = at + tl.arange(0, HELD)
    column = tl.arange(0, STEP)
    here = base + stride.to(tl.int64) * at
    if KEYS:
        x = _load_rows(here + H * D, stride, n - at, HELD, D, True)
        y = _load_rows(here + 2 * H * D, stride, n - at, HELD, D, True)
    else:
        row = (first + at) * H * D + head * D
        x = _load_rows(here, stride, n - at, HELD, D, True)
        y = _load_rows(dout + row, H * D, n - at, HELD, D, True)
        o = _load_rows(out + row, H * D, n - at, HELD, D, True)
        row_delta = tl.sum(o.to(tl.float32) * y.to(tl.float32), 1)
        tl.store(delta + stat + i, row_delta, mask=i < n)
        row_lse = tl.load(lse + stat + i, mask=i < n, other=float("inf"))
    dx = tl.zeros(x.shape, tl.float32)
    dv = tl.zeros(x.shape, tl.float32)
    for SIDE in tl.static_range(-1, 2):
        begin, end, tail = _side(SIDE, at, HELD, STEP, n)
        for step in tl.range(begin, end, STEP, num_stages=1 if SIDE == 0 else None):
            to = tl.where(step < at + HELD, step, tail) if SIDE == 0 else step
            there = base + stride.to(tl.int64) * to
            if KEYS:
                do_there = do_base + to.to(tl.int64) * H * D
                x_to = _load_rows(there, stride, n - to, STEP, D, SIDE == 0)
                y_to = _load_rows(do_there, H * D, n - to, STEP, D, SIDE == 0)
            else:
                x_to = _load_rows(there + H * D, stride, n - to, STEP, D, SIDE == 0)
                y_to = _load_rows(there + 2 * H * D, stride, n - to, STEP, D, SIDE == 0)
            s = tl.dot(x, tl.trans(x_to), input_precision=PRECISION) * scale
            if KEYS and SIDE == 0:  # lse = +inf past the last query makes p exactly 0 there
                real = column < n - to
                of_row = tl.load(lse + stat + to + column, mask=real, other=float("inf"))[None, :]
                of_delta = tl.load(delta + stat + to + column, mask=real, other=0.0)[None, :]
            elif KEYS:
                of_row = tl.load(lse + stat + to + column)[None, :]
                of_delta = tl.load(delta + stat + to + column)[None, :]
            else:
                of_row, of_delta = row_lse[:, None], row_delta[:, None]
            if slopes is not None:
                slope = right if SIDE == 1 else -left
                if SIDE == 0:  # in integers: floats would take 18 registers more, and 255 are near
                    s = _add_alibi(s, left, right, i[:, None] - to - column[None, :])
                elif KEYS:
                    s += slope * (i - at).to(tl.float32)[:, None]
                    of_row += slope * (to - at + column).to(tl.float32)[None, :]
                else:
                    s -= slope * column.to(tl.float32)[None, :]
                    of_row -= slope * (i - to).to(tl.float32)[:, None]
            p = tl.exp2(s - of_row)
            if SIDE == 0 and not KEYS:
                # p past the end must be 0 before it meets a zero key: exp2(0 - lse) can be inf, and
                # inf * 0 is NaN. dk and dv need no mask: keys past the end are not stored.
                p = tl.where(column[None, :] < n - to, p, 0.0)
            if KEYS:
                p_low = p.to(dout.dtype.element_ty).to(y.dtype)
                dv = tl.dot(p_low, y_to, dv, input_precision=PRECISION)
            dp = tl.dot(y, tl.trans(y_to), input_precision=PRECISION)
            ds = (p * (dp - of_delta)).to(qkv.dtype.element_ty).to(x.dtype)
            dx = tl.dot(ds, x_to, dx, input_precision=PRECISION)
    grad = dqkv + ((first + at) * H * 3 + head) * D
    if KEYS:
        grad += H * D
        _store_rows(grad + H * D, 3 * H * D, n - at, dv, D)
    _store_rows(grad, 3 * H * D, n - at, dx * (scale / LOG2_E), D)


@triton.jit(do_not_specialize=["n_tokens", "n_tiles"])
def _rope_rows(qkv, out, cu_seqlens, slopes, rope, n_tokens, stride, n_tiles, scale,
               BACK: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """RoPE for the loop kernels, which would spill with it inside and turn a key once for every
    tile of queries: out (T, 3, H, D) is qkv with q and k turned, or (BACK, in place) dqkv turned
    back. At d = 768 in bf16 that moves 9 KB a token and layer forward, 15 KB backward."""
    head, first, n, at = _locate(cu_seqlens, n_tiles, H, ROWS)
    if at >= n:
        return
    for part in tl.static_range(2 if BACK else 3):
        column = (part * H + head) * D
        x = _load_rows(qkv + (first + at) * stride + column, stride, n - at, ROWS, D, True)
        x = _turn(x, rope, at, n, D, BACK) if part < 2 else x
        _store_rows(out + (first + at) * 3 * H * D + column, 3 * H * D, n - at, x, D)


@triton.jit(do_not_specialize=["n_documents", "n_tokens"])
def _zero_slack(x, cu_seqlens, n_documents, n_tokens, width, BLOCK: tl.constexpr):
    """Rows of x (n_tokens, width) behind the last document become zero; usually there are none."""
    begin = tl.load(cu_seqlens + n_documents).to(tl.int64) * width
    end = n_tokens.to(tl.int64) * width
    for at in tl.range(begin + tl.program_id(0) * BLOCK, end, BLOCK * tl.num_programs(0)):
        offset = at + tl.arange(0, BLOCK)
        tl.store(x + offset, tl.zeros([BLOCK], x.dtype.element_ty), mask=offset < end)


# Launch settings, a fixed table: autotuning could pick others on another day, and with them other
# bits. By chip family (fp32 has its own, on tf32x3 matmuls: slow, for checks) and D up to: the
# longest document of the one-tile kernels, then (rows held, rows per step, warps, stages) of the
# loop kernels. Chosen by static evidence (no spill, fits shared memory: tests/test_kernels_aot.py
# prints it), not yet by timing.
ATTENTION_CONFIGS = {  # one_tile, fwd, dq, dkdv
    ("hopper", 64): (128, (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2)),
    ("hopper", 128): (128, (128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3)),
    ("blackwell", 64): (128, (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2)),
    ("blackwell", 128): (128, (128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
    ("others", 64): (64, (128, 64, 8, 3), (128, 32, 8, 2), (128, 32, 8, 2)),
    ("others", 128): (64, (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    ("fp32", 64): (0, (32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1)),
    ("fp32", 128): (0, (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1))}


def _attention_config(dtype: torch.dtype, D: int, capability: tuple, rope: bool) -> dict:
    family = {9: "hopper", 10: "blackwell"}.get(capability[0], "others")  # 8.0, 8.6, 8.9, 12.0
    family = "fp32" if dtype == torch.float32 and not INTERPRET else family
    config = ATTENTION_CONFIGS[family, 64 if D <= 64 else 128]
    config = dict(zip(("one_tile", "fwd", "dq", "dkdv"), config))
    if rope and (D > 64 or family == "others"):  # the one-tile backward would spill
        config["one_tile"] = 0
    return config


def _attention_options(name: str, config: dict, D: int, max_seqlen: int):
    """(kernel, block sizes and launch options) for "fwd", "bwd" (of one tile), "dq", "dkdv", "rope"
    or "rope back"."""
    if name.startswith("rope"):
        return _rope_rows, {"ROWS": 128, "BACK": name == "rope back", "num_warps": 8} | FUSION
    if max_seqlen <= config["one_tile"]:
        rows = 64 if max_seqlen <= 64 else 128
        warps = 8 if rows == 128 or (D > 64 and name == "bwd") else 4
        options = {"ROWS": rows, "BACKWARD": name == "bwd", "num_warps": warps, "num_stages": 1}
        return _attn_one_tile, options | FUSION
    rows, step, warps, stages = config[name]
    options = {"HELD": rows, "STEP": step, "num_warps": warps, "num_stages": stages} | FUSION
    if name == "fwd":
        return _attn_fwd_loop, options
    return _attn_bwd_loop, options | {"KEYS": name == "dkdv"}


def _launch(name, pointers, qkv, cu_seqlens, slopes, rope, max_seqlen, config):
    T, _, H, D = qkv.shape
    kernel, options = _attention_options(name, config, D, max_seqlen)
    n_tiles = triton.cdiv(max_seqlen, options.get("HELD") or options["ROWS"])
    if programs := H * n_tiles * (len(cu_seqlens) - 1):
        kernel[(programs,)](
            *pointers, cu_seqlens, slopes, rope, T, pointers[0].stride(0), n_tiles,
            LOG2E * D**-0.5, H=H, D=D, **options)


def _attention_triton(qkv, cu_seqlens, slopes, rope_base, max_seqlen, backward_of=None):
    """out (T, H, D) and lse (H, T), in log2 units; with backward_of = (dout, out, lse), dqkv."""
    T, _, H, D = qkv.shape
    capability = torch.cuda.get_device_capability(qkv.device) if qkv.is_cuda else (9, 0)
    config = _attention_config(qkv.dtype, D, capability, bool(rope_base))
    one_tile, rope = max_seqlen <= config["one_tile"], None
    if rope_base:
        rope = torch.view_as_real(_kept_rope_table(max_seqlen, D, rope_base, qkv.device))
    launch = qkv, cu_seqlens, slopes, rope, max_seqlen, config
    like = functools.partial(torch.empty_like, qkv, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(qkv):
        if rope_base and not one_tile:
            turned = like()
            _launch("rope", (qkv, turned), *launch)
            qkv = turned
        if backward_of is None:
            result = qkv.new_empty(T, H, D)
            lse = qkv.new_zeros(H, T, dtype=torch.float32)  # zeros: slack rows are an output too
            pointers = (qkv, result, None, lse, None) if one_tile else (qkv, result, lse)
            _launch("fwd", pointers, *launch)
        else:
            dout, out, lse = (x.contiguous() for x in backward_of)
            result = like()
            if one_tile:
                _launch("bwd", (qkv, None, dout, lse, result), *launch)
            else:
                pointers = qkv, out, dout, lse, torch.empty_like(lse), result
                _launch("dq", pointers, *launch)
                _launch("dkdv", pointers, *launch)
            if rope_base and not one_tile:
                _launch("rope back", (result, result), *launch)
        width = math.prod(result.shape[1:])
        _zero_slack[(64,)](result, cu_seqlens, len(cu_seqlens) - 1, T, width, BLOCK=1024, **FUSION)
    return (result, lse) if backward_of is None else result


# ----------------------------------------------------------------------------- masked cross entropy
def cross_entropy_reference(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits (M, V), labels (M,) -> (losses (M,), 1.0 where argmax is the label (M,), gradient of
    the summed loss (M, V)), in fp32 or wider."""
    log_p = _wide(logits).log_softmax(-1)
    losses = -log_p.gather(1, labels[:, None])[:, 0]
    correct = (logits.argmax(-1) == labels).to(losses.dtype)
    return losses, correct, log_p.exp() - F.one_hot(labels, logits.shape[1])


# The logits (M, V) are the largest tensor of the step. One program per row reads it twice (the
# second time from L2: a row of 30,528 bf16 is 61 KB) and leaves the gradient of the summed loss
# where the logits were: no fp32 copy, no softmax kept, no second (M, V) buffer; 4 bytes per logit
# move where the unfused fp32 loss moves over 20. (Scaling the gradient afterwards would move 4 more
# into a second buffer: model.py scales what is multiplied with it instead.)
@triton.jit
def _cross_entropy_rows(logits, labels, losses, correct, stride, n_columns, WRITE: tl.constexpr,
                        BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    label = tl.load(labels + row)
    target = tl.load(at + label).to(tl.float32)
    c = tl.arange(0, BLOCK)
    top = -float("inf")
    total = tl.zeros([BLOCK], tl.float32)
    for c0 in tl.range(0, n_columns, BLOCK):
        x = tl.load(at + c0 + c, mask=c < n_columns - c0, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total *= tl.exp2((top - higher) * 1.4426950408889634)
        total += tl.exp2((x - higher) * 1.4426950408889634)
        top = higher
    lse = top + tl.log(tl.sum(total, 0))
    tl.store(losses + row, lse - target)
    beaten = tl.zeros([BLOCK], tl.int32)  # by an equal logit of a lower id, as argmax would have it
    for c0 in tl.range(0, n_columns, BLOCK):
        x = tl.load(at + c0 + c, mask=c < n_columns - c0, other=-float("inf")).to(tl.float32)
        beaten += ((x == top) & (c0 + c < label)).to(tl.int32)
        if WRITE:
            g = tl.exp2((x - lse) * 1.4426950408889634) - tl.where(c0 + c == label, 1.0, 0.0)
            tl.store(at + c0 + c, g.to(logits.dtype.element_ty), mask=c < n_columns - c0)
    tl.store(correct + row, tl.where((target == top) & (tl.sum(beaten, 0) == 0), 1.0, 0.0))


CROSS_ENTROPY_OPTIONS = {"BLOCK": 4096, "num_warps": 8, **FUSION}


# ----------------------------------------------------------------------------- GeGLU and dropout
def drop_threshold(dropout_p: float) -> tuple[int, float]:
    """(n, scale): n of 2^16 are dropped, what stays is scaled."""
    dropped = min(round(dropout_p * 2**16), 2**16 - 1)
    return dropped, 2**16 / (2**16 - dropped)


def random_words(counter: Tensor, seed: Tensor) -> Tensor:
    """32 random bits, int32, for each counter (int32) under `seed` (0-dim int64): a hash of three
    multiplications (the golden ratio's, without which neighbouring rows correlate, and lowbias32's,
    github.com/skeeto/hash-prospector), keyed twice. 12 instructions; Philox, which torch.compile
    would take, has 100."""
    # ^ first: Inductor would put a product of the counter into its index, which overflows
    x = (counter ^ seed.to(torch.int32)) * (0x9E3779B9 - 2**32)
    x = (x ^ x >> 16 & 0xFFFF) * 0x7FEB352D
    x = (x ^ x >> 15 & 0x1FFFF ^ (seed >> 32).to(torch.int32)) * (0x846CA68B - 2**32)
    return x ^ x >> 16 & 0xFFFF


def hash_dropout(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Dropout whose mask is a function of `seed` and the place in x, for graphs that are compiled:
    part of the kernels around it, and nothing is kept for the backward."""
    dropped, scale = drop_threshold(dropout_p)
    place = torch.arange(x.numel(), device=x.device, dtype=torch.int32).view(x.shape)
    return torch.where((random_words(place, seed) >> 16 & 0xFFFF) >= dropped, x * scale, 0)


def geglu_reference(h: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """gelu(h[:, :I]) * h[:, I:] with the exact (erf) GELU, then dropout: (T, 2I) -> (T, I). A word
    of random bits serves two columns, I/2 apart."""
    gate, up = h.chunk(2, -1)
    out = F.gelu(gate) * up
    if not dropout_p:
        return out
    (T, width), (dropped, scale) = out.shape, drop_threshold(dropout_p)
    half = -(-width // 2)
    words = torch.arange(T * half, device=h.device, dtype=torch.int32).view(T, half)
    words = random_words(words, seed)
    bits = torch.cat([words & 0xFFFF, words >> 16 & 0xFFFF], 1)[:, :width]
    return torch.where(bits >= dropped, out * scale, 0)


# The largest pointwise work of MosaicBERT's step: 16 bytes an element of the product, forward and
# backward. For (65536, 3072) on an H200 Inductor's code takes 0.50 + 1.42 ms, this kernel 0.28 and
# 0.47 by its bytes, 0.19 and 0.26 by its instructions (modelled, bench/dryrun.py): nothing is
# computed twice, the mask is made again instead of kept, and the normal distribution is one
# exponential, 2^P(|x|), P a polynomial of degree 8 fitted to log2 of its tail on [0, 5.5]. It is
# off by 8e-8 at most, like torch's erf, and P goes on falling behind 5.5.
@triton.jit
def _normal_cdf(x):
    a = tl.abs(x)
    p = 1.75862260e-5 - 1.03554987e-6 * a
    p = p * a - 8.33473023e-5
    p = p * a - 3.78513418e-4
    p = p * a + 7.36334361e-3
    p = p * a - 5.26888110e-2
    p = p * a - 4.59150314e-1
    p = p * a - 1.15111160
    tail = tl.exp2(p * a - 0.99999988)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _random_words(counter, key):
    x = (counter.to(tl.uint32) ^ key.to(tl.uint32)) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ (key >> 32).to(tl.uint32)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["dropped"])
def _geglu(h, dout, out, seed, width, half, dropped, scale, BACKWARD: tl.constexpr,
           BLOCK: tl.constexpr):
    """Two blocks of a row of `out`: the product, or (BACKWARD) the gradient of h."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if seed is not None:
        words = _random_words(row * half + lane, tl.load(seed))
    for side in tl.static_range(2):
        c = lane + side * half
        mask = (lane < half) & (c < width)
        at = row * 2 * width + c
        gate = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h + at + width, mask=mask, other=0.0).to(tl.float32)
        cdf = _normal_cdf(gate)
        kept = 1.0
        if seed is not None:
            bits = words >> 16 if side else words & 0xFFFF
            kept = tl.where(bits >= dropped, scale, 0.0)
        if BACKWARD:
            dy = tl.load(dout + row * width + c, mask=mask, other=0.0).to(tl.float32) * kept
            pdf = 0.3989422804 * tl.exp2(gate * gate * -0.7213475204)
            dgate = dy * up * (cdf + gate * pdf)
            tl.store(out + at, dgate.to(out.dtype.element_ty), mask=mask)
            tl.store(out + at + width, (dy * gate * cdf).to(out.dtype.element_ty), mask=mask)
        else:
            y = gate * cdf * up * kept
            tl.store(out + row * width + c, y.to(out.dtype.element_ty), mask=mask)


GEGLU_OPTIONS = {"BLOCK": 512, "num_warps": 2, **FUSION}


# ----------------------------------------------------------------------------- the CPU backend
# Tuned PyTorch, what a CPU user trains with: documents of like length as one padded batch, scores
# and other fp32 copies in blocks that stay in the cache, rows moved by one index each way.

SCORE_BUDGET = 2**21  # the largest block, in elements: 8 MB of fp32 stay in a CPU's cache


def _group_weights(q, k, slopes, valid, i0):
    """Attention weights of queries i0, i0+1, ... over all keys, fp32 or fp64: (b, H, s_q, s)."""
    scores = _wide(q @ k.mT).mul_(q.shape[-1] ** -0.5)
    if slopes is not None:
        i = torch.arange(i0, i0 + q.shape[2], device=q.device)
        scores += alibi_bias(slopes.to(scores.dtype), i, torch.arange(k.shape[2], device=q.device))
    if valid is not None:  # masked_fill_ takes a CPU ten times as long
        scores += torch.where(valid[:, :, None], 0.0, -math.inf).to(scores.dtype)
    return torch.softmax(scores, -1, out=scores)


@functools.lru_cache(maxsize=4)  # the layers of a step, forward and backward, have the same
def _cpu_layout(cu: tuple[int, ...], T: int, J: int, H: int, device: torch.device):
    """Documents of like length become one padded batch of b: how (T, J, H, D), its rows of D
    counted through, becomes the groups' (J, b, H, s, D) and they become it again: [(rows (J, b, H,
    s) to take, valid (b, 1, s) or None if nothing is padded)], and (T * J * H,) rows of the groups
    end to end, or the one after them for what is in no document. A document joins a group when it
    wastes less than a quarter of its row and the scores fit SCORE_BUDGET."""
    starts, lens = torch.tensor(cu[:-1], dtype=torch.int64), torch.tensor(cu).diff()
    order = torch.argsort(lens, descending=True, stable=True)
    order_lens, back = lens[order].tolist(), torch.full((T * J * H,), -1, device=device)
    j, h = torch.arange(J, device=device)[:, None, None, None], torch.arange(H, device=device)
    groups, size, first = [], 0, 0
    while first < len(order_lens) and order_lens[first] > 0:
        s, last = order_lens[first], first + 1
        most = max(1, SCORE_BUDGET // (H * s * s))
        longer_than = max(0.75 * s - 16, 0)
        while last < len(lens) and last - first < most and order_lens[last] > longer_than:
            last += 1
        members = order[first:last]
        n, position = lens[members, None], torch.arange(s)
        # a padded position repeats its own document's last row: nothing of a neighbour is read
        rows = (starts[members, None] + torch.minimum(position, n - 1)).to(device)
        take = (rows[:, None] * J + j) * H + h[:, None]
        place = torch.arange(size, size + take.numel(), device=device).view_as(take)
        valid = None if order_lens[last - 1] == s else (position < n).to(device)[:, None]
        real = slice(None) if valid is None else valid.expand_as(take)
        back[take[real]] = place[real]
        groups.append((take, valid))
        size, first = size + take.numel(), last
    return groups, torch.where(back < 0, size, back)


def _take(x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.reshape(-1, x.shape[-1]).index_select(0, rows.flatten())
    return x.to(dtype).view(*rows.shape, -1)


def _put(parts: list[Tensor], back: Tensor, like: Tensor) -> Tensor:
    """The inverse: the groups' parts in order to a tensor like `like`; what is in none is zero."""
    D = like.shape[-1]
    zero = torch.zeros(1, D, dtype=parts[0].dtype if parts else like.dtype, device=like.device)
    x = torch.cat([*(part.reshape(-1, D) for part in parts), zero])
    return x.index_select(0, back).to(like.dtype).view(like.shape)


def _rotate_(x: Tensor, table: Tensor) -> Tensor:
    """`rotate` in place, in half the time."""
    wide = _wide(x)
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(table)
    return x if wide is x else x.copy_(wide)


def keep_mask(like: Tensor, dropout_p: float,
              generator: torch.Generator | None = None) -> tuple[Tensor, float]:
    """Dropout's mask: (bool like `like`, False with probability dropout_p rounded to 2^-16; the
    scale of what stays). 16 bits decide, cut from 64: a CPU draws those much faster than floats."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()]
    dropped, scale = drop_threshold(dropout_p)
    return (bits >= dropped - 2**15).view(like.shape), scale


def _dropped(p: Tensor, generator, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """Weights p with dropout, and its scaled mask, fp32 or fp64."""
    if generator is None:
        return p, None
    keep, scale = keep_mask(p, dropout_p, generator)
    mask = keep.view(torch.int8).to(_wide(p[:0]).dtype).mul_(scale)
    return (p * mask).to(p.dtype), mask


def _cpu_groups(qkv, cu_seqlens, slopes, rope_base, max_seqlen):
    """What forward and backward step over: (q, k, v (b, H, s, D), RoPE's table (s, D/2) or None,
    [(queries, their weights over all keys)]) of each group of documents. bf16 stays for the
    matmuls, as CPUs that have it are 6 times faster; no CPU has fp16."""
    (T, J, H, D), cu, device = qkv.shape, tuple(cu_seqlens.tolist()), qkv.device
    dtype, table = torch.float32 if qkv.dtype == torch.float16 else qkv.dtype, None
    if rope_base:
        table = _kept_rope_table(max_seqlen, D, rope_base, device, qkv.dtype)
    for take, valid in _cpu_layout(cu, T, J, H, device)[0]:
        q_k_v, (_, b, _, s) = _take(qkv, take, dtype), take.shape
        turn = None if table is None else table[:s]
        if turn is not None:
            _rotate_(q_k_v[:2], turn)
        q, k, v = q_k_v
        n = max(1, SCORE_BUDGET // (b * H * s))  # queries at a time
        yield q, k, v, turn, (
            (slice(i, i + n), _group_weights(q[:, :, i : i + n], k, slopes, valid, i).to(dtype))
            for i in range(0, s, n))


def _attention_cpu(qkv, cu_seqlens, groups, dropout_p, seed):
    """out (T, H, D)."""
    generator = torch.Generator(qkv.device).manual_seed(int(seed)) if dropout_p > 0 else None
    parts = []
    for _, _, v, _, weights in groups:
        part = [_dropped(p, generator, dropout_p)[0] @ v for _, p in weights]
        parts.append(torch.cat(part, 2) if len(part) > 1 else part[0])
    T, _, H, _ = qkv.shape
    _, back = _cpu_layout(tuple(cu_seqlens.tolist()), T, 1, H, qkv.device)
    return _put(parts, back, qkv[:, 0])


def _add(total: Tensor | None, x: Tensor) -> Tensor:
    return x if total is None else _wide(x).add_(total)


def _attention_backward_cpu(dout, cu_seqlens, groups, dropout_p, seed):
    """The five matmuls of the backward: dqkv (T, 3, H, D)."""
    (T, H, D), cu, parts = dout.shape, tuple(cu_seqlens.tolist()), []
    layout = [_cpu_layout(cu, T, J, H, dout.device) for J in (1, 3)]
    generator = torch.Generator(dout.device).manual_seed(int(seed)) if dropout_p > 0 else None
    for (q, k, v, turn, weights), (take, valid) in zip(groups, layout[0][0]):
        do = _take(dout, take[0], q.dtype)
        if valid is not None:
            do *= valid[..., None]
        grad, dk, dv = q.new_empty(3, *q.shape), None, None
        for i, p in weights:
            dropped, mask = _dropped(p, generator, dropout_p)
            dv = _add(dv, dropped.mT @ do[:, :, i])
            dp = do[:, :, i] @ v.mT
            dp = dp if mask is None else dp.mul_(mask)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            grad[0, :, :, i] = ds @ k
            dk = _add(dk, ds.mT @ q[:, :, i])
        grad[1], grad[2] = dk, dv
        if turn is not None:
            _rotate_(grad[:2], turn.conj_physical())  # a lazy conj() is lost in a compiled graph
        grad[:2].mul_(D**-0.5)
        parts.append(grad)
    return _put(parts, layout[1][1], dout.new_empty(T, 3, H, D))


class _AttentionCpu(torch.autograd.Function):
    """The eager CPU's: keeps q, k, v as they were multiplied and, of documents up to 512 tokens,
    the weights, 2 bytes a score: 4 MB a layer for 4,096 tokens in documents of 128, 4 heads."""

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, slopes, seed, rope_base, max_seqlen, dropout_p):
        _check_attention(qkv, cu_seqlens, slopes, max_seqlen, False)
        groups = _cpu_groups(qkv, cu_seqlens, slopes, rope_base, max_seqlen)
        groups = [(*group, list(weights)) for *group, weights in groups]
        ctx.saved = cu_seqlens, groups, dropout_p, seed
        return _attention_cpu(qkv, cu_seqlens, groups, dropout_p, seed)

    @staticmethod
    def backward(ctx, dout):
        return _attention_backward_cpu(dout, *ctx.saved), *[None] * 6


def _cross_entropy_cpu(logits, labels, write):
    losses, correct = [], []
    # the reference in 1.3 (fp32) to 3 times less time: blocks of rows in one fp32 buffer, whose
    # pages stay mapped and in the cache
    rows = max(64, SCORE_BUDGET // logits.shape[1])
    block = _wide(logits.new_empty(0)).new_empty(rows, logits.shape[1])
    for x, y in zip(logits.split(rows), labels[:, None].split(rows)):
        p, own = block[: len(x)].copy_(x), x.gather(1, y)
        top = p.amax(1, keepdim=True)
        hit = own == top
        likely = hit[:, 0].nonzero()[:, 0]  # argmax, slow on a CPU, only settles ties
        hit[likely] = x[likely].argmax(1, keepdim=True) == y[likely]
        correct.append(hit)
        torch.softmax(p, 1, out=p)  # its largest is 1 / sum: half the time of log_softmax and exp
        losses.append(top - p.amax(1, keepdim=True).log() - own)
        if write:
            x.copy_(p.scatter_add_(1, y, -torch.ones_like(losses[-1])))
    return torch.cat(losses)[:, 0], torch.cat(correct)[:, 0].to(losses[0].dtype)


class _GegluCpu(torch.autograd.Function):
    """Blocks of rows whose fp32 copies stay in the cache; only the projection is kept."""

    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        out = h.new_empty(len(h), h.shape[1] // 2)
        block = max(256, 2**18 // out.shape[1])
        for x, y in zip(h.split(block), out.split(block)):
            gate, up = map(_wide, x.chunk(2, 1))  # as contiguous copies: GELU takes 2/3 of the time
            y.copy_(F.gelu(gate).mul_(up))
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        dh, width = torch.empty_like(h), dout.shape[1]
        block = max(256, 2**18 // width)
        for x, y, dx in zip(h.split(block), dout.split(block), dh.split(block)):
            gate, up, dy = *map(_wide, x.chunk(2, 1)), _wide(y)
            dx[:, :width] = torch.ops.aten.gelu_backward(dy * up, gate)
            dx[:, width:] = F.gelu(gate).mul_(dy)
        return dh


# ----------------------------------------------------------------------------- padded
def _attention_padded(qkv, cu_seqlens, max_seqlen, slopes, rope_base, dropout_p):
    """Attention as one padded batch (B, max_seqlen) through PyTorch's own: out (T, H, D). For BERT
    on a GPU, whose dropout of the attention weights the Triton kernel does not have; it never waits
    for the host. Dropout follows torch's generator of the device."""
    cu, row = cu_seqlens.long(), torch.arange(len(qkv), device=qkv.device)
    B = len(cu) - 1
    # B for rows behind the last document (torch 2.11 cannot compile bucketize of a slice)
    document = torch.searchsorted(cu_seqlens[1:], row.int(), right=True)
    place = torch.where(document < B, document * max_seqlen + row - cu[document], -1)
    padded = scatter_rows(qkv, place, B * max_seqlen).unflatten(0, (B, max_seqlen))
    q, k, v = padded.permute(2, 0, 3, 1, 4)  # (B, H, S, D) each
    if rope_base:
        table = rope_table(max_seqlen, q.shape[-1], rope_base, q.device, q.dtype)
        q, k = rotate(q, table).to(q.dtype), rotate(k, table).to(k.dtype)
    i = torch.arange(max_seqlen, device=qkv.device)
    mask = (i < cu.diff()[:, None])[:, None, None]  # (B, 1, 1, S)
    if slopes is not None:
        mask = torch.where(mask, alibi_bias(slopes, i, i).to(q.dtype), -math.inf)  # (B, H, S, S)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    return gather_rows(out.transpose(1, 2).flatten(0, 1), place)


# ----------------------------------------------------------------------------- ops and functions
def _check_attention(qkv, cu_seqlens, slopes, max_seqlen, use_triton):
    (H, D), cu = qkv.shape[-2:], cu_seqlens
    dtypes = [torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (not use_triton)
    flat = qkv.dim() == 4 and qkv.shape[1] == 3 and qkv.stride()[1:] == (H * D, D, 1)
    problem = ""
    if qkv.dtype not in dtypes or not flat:
        problem = f"qkv must be (T, 3, H, D) floats, rows contiguous; got {qkv.shape} {qkv.dtype}"
    elif use_triton and (D % 16 or not 16 <= D <= 128):
        problem = f"head dimension {D} is not a multiple of 16 from 16 to 128"
    elif slopes is not None and (slopes.shape, slopes.dtype) != ((H, 2), torch.float32):
        problem = f"slopes must be ({H}, 2) float32, got {slopes.shape} {slopes.dtype}"
    elif cu.dtype != torch.int32 or cu.dim() != 1 or len(cu) == 0:
        problem = f"cu_seqlens must be (B+1,) int32, got {cu.shape} {cu.dtype}"
    elif not cu.is_cuda:  # a look at values costs a synchronisation there
        lens = cu.diff().tolist()
        if int(cu[0]) != 0 or int(cu[-1]) > len(qkv) or min(lens, default=0) < 0:
            problem = f"cu_seqlens must go up from 0 to at most {len(qkv)}: {cu.tolist()}"
        elif max(lens, default=0) > max_seqlen:
            problem = f"a document of {max(lens)} tokens does not fit max_seqlen={max_seqlen}"
    if problem:
        raise ValueError(f"varlen_attention: {problem}")


@torch.library.custom_op("nanomosaic::attention", mutates_args=())
def _attention(qkv: Tensor, cu_seqlens: Tensor, slopes: Tensor | None, seed: Tensor | None,
               rope_base: float, max_seqlen: int, dropout_p: float,
               use_triton: bool) -> tuple[Tensor, Tensor]:
    _check_attention(qkv, cu_seqlens, slopes, max_seqlen, use_triton)
    if use_triton:
        return _attention_triton(qkv, cu_seqlens, slopes, rope_base, max_seqlen)
    groups = _cpu_groups(qkv, cu_seqlens, slopes, rope_base, max_seqlen)
    no_lse = _wide(qkv.new_empty(0)).new_zeros(qkv.shape[2], len(qkv))  # needed by Triton's alone
    return _attention_cpu(qkv, cu_seqlens, groups, dropout_p, seed), no_lse


@_attention.register_fake
def _(qkv, *_):
    T, _, H, D = qkv.shape
    return qkv.new_empty(T, H, D), _wide(qkv.new_empty(0)).new_empty(H, T)


@torch.library.custom_op("nanomosaic::attention_backward", mutates_args=())
def _attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
                        slopes: Tensor | None, seed: Tensor | None, rope_base: float,
                        max_seqlen: int, dropout_p: float, use_triton: bool) -> Tensor:
    if use_triton:
        saved = dout, out, lse
        return _attention_triton(qkv, cu_seqlens, slopes, rope_base, max_seqlen, saved)
    groups = _cpu_groups(qkv, cu_seqlens, slopes, rope_base, max_seqlen)
    return _attention_backward_cpu(dout, cu_seqlens, groups, dropout_p, seed)


_attention_backward.register_fake(lambda dout, qkv, *_: qkv.new_empty(qkv.shape))


def _attention_save(ctx, inputs, output):
    qkv, *tensors = inputs[:4]
    ctx.settings = inputs[4:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output, *tensors)


def _attention_grad(ctx, dout, _dlse):
    return _attention_backward(dout, *ctx.saved_tensors, *ctx.settings), *[None] * 7


_attention.register_autograd(_attention_grad, setup_context=_attention_save)


def varlen_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, slopes: Tensor | None = None,
                     *, rope_base: float = 0.0, dropout_p: float = 0.0, seed: Tensor | None = None,
                     backend="auto") -> Tensor:
    """Attention inside each document of a flat batch, with ALiBi, RoPE, both or neither:

    out_i = sum_j softmax_j(q_i . k_j / sqrt(D) - slope |i - j|) v_j over the rows j of i's own
    document, the slope one for j < i and one for j > i, q and k turned by RoPE first.

    qkv         (T, 3, H, D), rows contiguous; bf16, fp16, fp32 (slow on a GPU), on a CPU fp64 too;
                Triton: D a multiple of 16 up to 128
    cu_seqlens  (B+1,) int32 on qkv's device, from 0, non-decreasing
    max_seqlen  no document is longer; it picks the kernel, so keep it fixed in training
    slopes      (H, 2) fp32 (`alibi_slopes`), or None for no bias; never given a gradient
    rope_base   of RoPE's wavelengths (`rope_table`), positions count inside each document; 0: none
    dropout_p   dropout of the attention weights, "cpu" and "padded" only. cpu: `seed` (0-dim int64
                CPU tensor) fixes the mask and is drawn from torch's CPU generator when None;
                padded: torch's generator of the device decides
    backend     "auto", "triton", "cpu" or "padded": see `attention_backend`

    Returns out (T, H, D), dtype of qkv. ValueError in one line for what breaks the above."""
    backend, _ = attention_backend(qkv.device.type, backend, dropout_p)
    if backend == "padded":
        return _attention_padded(qkv, cu_seqlens, max_seqlen, slopes, rope_base, dropout_p)
    if backend == "triton" and (dropout_p > 0 or not _use_triton(qkv)):
        problem = "has no dropout" if dropout_p > 0 else "runs on CUDA tensors"
        raise ValueError(f"varlen_attention: Triton {problem}; choose another backend")
    if dropout_p > 0 and seed is None:
        seed = torch.randint(2**62, (), dtype=torch.int64)
    settings = rope_base, max_seqlen, dropout_p
    kept = qkv.requires_grad and torch.is_grad_enabled() and max_seqlen <= 512
    if backend == "cpu" and kept and not torch.compiler.is_compiling():
        return _AttentionCpu.apply(qkv, cu_seqlens, slopes, seed, *settings)
    return _attention(qkv, cu_seqlens, slopes, seed, *settings, backend == "triton")[0]


@torch.library.custom_op("nanomosaic::cross_entropy_", mutates_args=("logits",))
def _cross_entropy_(logits: Tensor, labels: Tensor, write: bool) -> tuple[Tensor, Tensor]:
    if not len(labels):
        return tuple(_wide(logits.new_empty(0)) for _ in range(2))
    if not _use_triton(logits):
        return _cross_entropy_cpu(logits, labels, write)
    losses, correct = (logits.new_empty(len(labels), dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(logits):
        _cross_entropy_rows[(len(labels),)](
            logits, labels, losses, correct, logits.stride(0), logits.shape[1], WRITE=write,
            **CROSS_ENTROPY_OPTIONS)
    return losses, correct


@_cross_entropy_.register_fake
def _(logits, labels, write):
    like = _wide(logits.new_empty(0))
    return tuple(like.new_empty(labels.shape[0]) for _ in range(2))


def masked_cross_entropy(logits: Tensor, labels: Tensor, keep_gradient=False):
    """Sum over rows of the cross entropy, and how many rows have the largest logit at their label:
    (loss_sum, n_correct), fp32 and 0-dim. Divide by the number of rows yourself: the host knows it.

    logits (M, V) fp32, bf16 or fp16, last axis contiguous, without a gradient of their own; with
    keep_gradient they are **overwritten** by the gradient of the sum. labels (M,) int64 below V."""
    assert logits.stride(1) == 1 and labels.shape == logits.shape[:1], (logits.shape, labels.shape)
    losses, correct = _cross_entropy_(logits.detach(), labels, keep_gradient)
    return losses.sum(), correct.sum()


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` (M,) int64 of x (R, ...): (M, ...), without a host synchronisation. Each index
    appears once, but for negative ones: fillers, so that M can be a fixed size. They read a row of
    zeros, and their gradient is dropped."""
    filler = (indices < 0).view(-1, *[1] * (x.dim() - 1))
    return x.index_select(0, indices.clamp(min=0)).masked_fill(filler, 0)


def scatter_rows(x_flat: Tensor, indices: Tensor, n_rows: int) -> Tensor:
    """The inverse of `gather_rows`: row m of x_flat (M, ...) goes to row indices[m] of (n_rows,
    ...), the other rows are zero. Indices are unique; negative ones are dropped."""
    out = x_flat.new_zeros(n_rows + 1, *x_flat.shape[1:])  # fillers fall into the last, cut off
    return out.index_copy(0, torch.where(indices < 0, n_rows, indices), x_flat)[:n_rows]


@torch.library.custom_op("nanomosaic::geglu", mutates_args=())
def _geglu_op(h: Tensor, dout: Tensor | None, seed: Tensor | None, dropout_p: float) -> Tensor:
    """The product, or with its gradient the one of h."""
    h, T, width = h.contiguous(), len(h), h.shape[1] // 2
    half, (dropped, scale) = triton.cdiv(width, 2), drop_threshold(dropout_p)
    out = h.new_empty(T, width) if dout is None else torch.empty_like(h)
    dout = dout if dout is None else dout.contiguous()
    if T:
        with torch.cuda.device_of(h):
            _geglu[T, triton.cdiv(half, GEGLU_OPTIONS["BLOCK"])](
                h, dout, out, seed, width, half, dropped, scale, BACKWARD=dout is not None,
                **GEGLU_OPTIONS)
    return out


@_geglu_op.register_fake
def _(h, dout, *_):
    return h.new_empty(h.shape[0], h.shape[1] // (2 if dout is None else 1))


def _geglu_save(ctx, inputs, output):
    h, _, seed, ctx.dropout_p = inputs
    ctx.save_for_backward(h, seed)


def _geglu_grad(ctx, dout):
    h, seed = ctx.saved_tensors
    return _geglu_op(h, dout, seed, ctx.dropout_p), None, None, None


_geglu_op.register_autograd(_geglu_grad, setup_context=_geglu_save)


def new_seed(x: Tensor) -> Tensor:
    """Of one call, from torch's generator of x's device."""
    return torch.randint(2**62, (), dtype=torch.int64, device=x.device)


def dropout(x: Tensor, dropout_p: float) -> Tensor:
    """F.dropout, whose mask alone takes an eager CPU a tenth of MosaicBERT's step. In a compiled
    CUDA graph by `hash_dropout`."""
    compiling = torch.compiler.is_compiling()
    if dropout_p and x.is_cuda and compiling:
        return hash_dropout(x, dropout_p, new_seed(x))
    if not dropout_p or x.device.type != "cpu" or compiling:
        return F.dropout(x, dropout_p)
    keep, scale = keep_mask(x, dropout_p)
    return (x * keep.view(torch.int8).to(x.dtype)).mul_(scale)  # from bool it takes 3 times as long


def geglu(h: Tensor, dropout_p: float = 0.0) -> Tensor:
    """`geglu_reference`, dtype of h. MosaicBERT's order: the first half is the gate (Shazeer 2020).

    Triton on CUDA. An eager CPU has a function of its own: 0.72 s against 1.10 forward and backward
    at (8192, 6144) fp32, one thread."""
    if _use_triton(h) and h.dtype != torch.float64:
        return _geglu_op(h, None, new_seed(h) if dropout_p else None, dropout_p)
    if h.device.type == "cpu" and not torch.compiler.is_compiling():
        return dropout(_GegluCpu.apply(h), dropout_p)
    return dropout(geglu_reference(h), dropout_p)
