"""The kernels of nanoMosaicBERT, each beside the plain PyTorch that says what it computes.

    varlen_attention                         softmax(q k^T / sqrt(D) - slope |i - j|) v inside each document of a batch
    gather_rows, scatter_rows, unpad, pad    padded (B, S, ...) <-> flat (T, ...), and the masked rows
    geglu                                    gelu(a) * b on the two halves of one projection
    add_layer_norm                           LayerNorm(x + residual)
    masked_cross_entropy                     the summed loss, with its gradient left where the logits were

A flat batch is `T` tokens in a row plus `cu_seqlens (B+1,) int32`: document b owns rows cu_seqlens[b] to
cu_seqlens[b+1]. Empty documents are legal, so a fixed-size cu_seqlens may end in repeats of its last value; rows after
cu_seqlens[-1] ("slack") are never read, come out as zero and get a zero gradient.

Every function is a `torch.library` op: opaque to torch.compile (no graph break, no recompile when the documents
change), with a fake version and a gradient. On CUDA the Triton kernels run; elsewhere, or without triton, the
reference does. The reference is what a CPU user trains with, so it is written to be quick too. No kernel uses atomics:
the same input gives the same bits. TRITON_INTERPRET=1 runs the Triton kernels on a CPU, NANOMOSAIC_CHECK=1 also checks
what only the GPU knows (cu_seqlens, indices, labels).

Numbers in the comments are instruction and register counts of this file's own sm_90 code (triton 3.9), or arithmetic
with an H200's 788 TFLOP/s and 4.3 TB/s. Nothing here has been timed yet; `python -m bench.kernels` does that.
"""

import functools
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl

    TRITON_VERSION = triton.__version__
    TRITON_TOO_OLD = tuple(int(x) for x in TRITON_VERSION.split(".")[:2]) < (3, 6)
    HAS_TRITON = not TRITON_TOO_OLD
except ImportError:  # macOS, Windows: the decorators below must still parse, nothing of triton runs
    TRITON_VERSION, TRITON_TOO_OLD, HAS_TRITON = "", False, False

    class triton:
        jit = staticmethod(lambda fn=None, **_: fn if fn is not None else (lambda f: f))

    class tl:
        constexpr = None


if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 11):
    raise SystemExit(f"error: kernels.py needs torch >= 2.11, found {torch.__version__}: see requirements.txt")

LOG2E = math.log2(math.e)
FUSION = {"enable_fp_fusion": True}  # a * b + c in one instruction and rounding; triton 3.10 no longer does by itself
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # triton itself reads it when it is imported
CHECK_VALUES = os.environ.get("NANOMOSAIC_CHECK") == "1"  # looking at values costs a synchronisation on a GPU


def attention_backend(
    device_type: str, attention: str = "auto", dropout: float = 0.0
) -> tuple[str, str]:
    """Which attention runs on `device_type` ("cuda", "cpu", ...), and why, for a banner line.

    attention: "triton", "cpu" (PyTorch, tuned for CPUs) or "padded" (PyTorch's own on a padded
    batch) as it is, "auto" by device and by the dropout of the attention weights.
    Returns (one of those three, a sentence). ValueError for CUDA with a triton that is too old."""
    if attention != "auto":
        return attention, "asked for"
    if device_type != "cuda":
        return "cpu", f"Triton kernels need CUDA; on {device_type} PyTorch does it"
    if TRITON_TOO_OLD:
        raise ValueError(
            f"kernels.py needs triton >= 3.6, found {TRITON_VERSION}: upgrade torch, or triton alone"
        )
    if not HAS_TRITON:
        return "padded", "triton is not installed: PyTorch on a padded batch"
    if dropout > 0:
        return "padded", "the Triton kernel has no dropout: PyTorch on a padded batch"
    return "triton", f"CUDA and triton {TRITON_VERSION}"


def _use_triton(x: Tensor, backend: str = "auto") -> bool:
    if backend in ("cpu", "padded"):
        return False
    if backend not in ("auto", "triton"):
        raise ValueError(f'kernels: backend is auto, triton, cpu or padded, not "{backend}"')
    if backend == "auto":
        return attention_backend(x.device.type)[0] == "triton"
    if not HAS_TRITON:
        raise ValueError('kernels: backend="triton" needs triton >= 3.6')
    if x.device.type != "cuda" and not INTERPRET:
        raise ValueError(f'kernels: backend="triton" needs a CUDA tensor, this one is on {x.device.type}')
    return True


def _check_dtype(name: str, x: Tensor, use_triton: bool) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (not use_triton)
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {str(x.dtype)[6:]}; supported are {', '.join(str(d)[6:] for d in dtypes)}")


# ---------------------------------------------------------------------------------------------------------------------
# Attention: the reference
# ---------------------------------------------------------------------------------------------------------------------


def alibi_slopes(n_heads: int, ratio: float = 1.0) -> Tensor:
    """ALiBi's slopes of each head, (n_heads, 2) float32: for keys to the left and to the right.

    s = 2^(-8(h+1)/n) where n is a power of two; else the slopes of the power of two below, then
    every other one of the power of two above (Press et al. 2022; MosaicBERT's order). With a ratio
    other than 1 even heads have (s, ratio * s), odd heads (ratio * s, s): then left and right differ
    (forms for encoders: ofirpress/attention_with_linear_biases, issue 5)."""
    if n_heads < 1:
        raise ValueError(f"alibi_slopes: n_heads must be at least 1, got {n_heads}")
    n = 2 ** int(math.log2(n_heads))
    slopes = [2.0 ** (-8 * (h + 1) / n) for h in range(n)]
    slopes += [2.0 ** (-4 * (h + 1) / n) for h in range(2 * n)][0::2][: n_heads - n]
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
    frequency = base ** (torch.arange(0, D, 2, device=device, dtype=torch.float64) / -D)
    angle = torch.arange(n, device=device)[:, None] * frequency
    return torch.polar(torch.ones_like(angle), angle).to(torch.promote_types(dtype, torch.complex64))


_kept_rope_table = functools.lru_cache(maxsize=16)(rope_table)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (..., n, D) with its pairs of columns turned by `table` (n, D/2), its conjugate turns back."""
    x = torch.view_as_complex(_wide(x).unflatten(-1, (-1, 2))) * table
    return torch.view_as_real(x).flatten(-2)


# The largest score tensor the reference holds, in elements: 2^21 fp32 = 8 MB stay in a CPU's cache; a GPU takes 1 GB,
# as each group of documents costs it a hundred launches and a few waits.
SCORE_BUDGET = {"cpu": 2**21, "cuda": 2**28}


def _score_budget(device: torch.device) -> int:
    return SCORE_BUDGET.get(device.type, SCORE_BUDGET["cpu"])


def _length_groups(cu_seqlens: Tensor, n_heads: int) -> list[tuple[Tensor, Tensor | None]]:
    """Documents of like length side by side, so that they can be computed as one padded batch.

    Returns [(rows (b, s) int64, valid (b, s) bool or None if nothing is padded), ...]. A document joins a group when
    it wastes less than a quarter of its row and the group's score tensor stays within the SCORE_BUDGET."""
    cu = cu_seqlens.detach().cpu().long()
    lens = cu[1:] - cu[:-1]
    order = torch.argsort(lens, descending=True, stable=True)
    order_lens = lens[order].tolist()
    groups, first = [], 0
    while first < len(order_lens) and order_lens[first] > 0:
        s, last = order_lens[first], first + 1
        most = max(1, _score_budget(cu_seqlens.device) // (n_heads * s * s))
        while last < len(order_lens) and last - first < most and order_lens[last] > max(0.75 * s - 16, 0):
            last += 1
        members = order[first:last]
        start, n = cu[members, None], lens[members, None]
        position = torch.arange(s)
        # a padded position repeats its own document's last row, so nothing of a neighbour is ever read
        rows = start + torch.minimum(position, n - 1)
        valid = None if order_lens[last - 1] == s else position < n
        device = cu_seqlens.device
        groups.append((rows.to(device), None if valid is None else valid.to(device)))
        first = last
    return groups


def _wide(x: Tensor) -> Tensor:
    """fp32 for what is narrower; fp32 and fp64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def _matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the reference multiplies in: bf16 stays (CPUs that have it are 6 times faster), fp16 becomes fp32 (no CPU
    has it). Softmax and sums are fp32 or wider in any case."""
    return torch.float32 if dtype == torch.float16 else dtype


def _group_scores(q, k, slopes, valid, i0):
    """Scores of queries i0, i0+1, ... against all keys, natural-log units, fp32 or fp64: (b, H, s_q, s)."""
    scores = _wide(q @ k.transpose(-1, -2)).mul_(q.shape[-1] ** -0.5)
    if slopes is not None:
        i = torch.arange(i0, i0 + q.shape[2], device=q.device)
        scores += alibi_bias(slopes.to(scores.dtype), i, torch.arange(k.shape[2], device=q.device))
    if valid is not None:
        scores.masked_fill_(~valid[:, None, None, :], -math.inf)
    return scores


def _split_heads(x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (b, s) of x (T, ..., H, D) as a contiguous (..., b, H, s, D)."""
    x = x[rows].to(dtype)
    return (x.permute(2, 0, 3, 1, 4) if x.dim() == 5 else x.permute(0, 2, 1, 3)).contiguous()


def _merge_heads_into(out: Tensor, x: Tensor, rows: Tensor, valid: Tensor | None) -> None:
    """Write x (b, H, s, D) to rows (b, s) of out (T, H, D), leaving out the padded positions."""
    x = x.transpose(1, 2).to(out.dtype)
    if valid is None:
        out[rows.flatten()] = x.flatten(0, 1)
    else:
        out[rows[valid]] = x[valid]


def keep_mask(like: Tensor, dropout_p: float, generator: torch.Generator | None = None) -> tuple[Tensor, float]:
    """Dropout's mask: (bool like `like`, False with probability dropout_p rounded to 2^-16; the factor on what stays).

    16 random bits decide, cut from 64: a CPU draws those several times as fast as as many floats."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()]
    dropped = min(round(dropout_p * 2**16), 2**16 - 1)  # of 2^16
    return (bits >= dropped - 2**15).view(like.shape), 2**16 / (2**16 - dropped)


def _dropout_mask(like: Tensor, generator: torch.Generator | None, dropout_p: float) -> Tensor | None:
    if generator is None:
        return None
    keep, factor = keep_mask(like, dropout_p, generator)
    return keep.to(like.dtype).mul_(factor)


def _generator(seed: Tensor | None, dropout_p: float, device: torch.device) -> torch.Generator | None:
    return torch.Generator(device).manual_seed(int(seed)) if dropout_p > 0 else None


def _attention_reference(qkv, cu_seqlens, slopes, rope_base, max_seqlen, dropout_p, seed):
    """The forward pass in plain PyTorch: (out (T, H, D), lse (H, T)), lse the log2 of each row's softmax sum."""
    T, _, H, D = qkv.shape
    dtype = _matmul_dtype(qkv.dtype)
    table = _kept_rope_table(max_seqlen, D, rope_base, qkv.device, qkv.dtype) if rope_base else None
    out = qkv.new_zeros(T, H, D)
    lse = torch.zeros(T, H, 1, dtype=torch.promote_types(dtype, torch.float32), device=qkv.device)
    generator = _generator(seed, dropout_p, qkv.device)
    for rows, valid in _length_groups(cu_seqlens, H):
        (b, s), o, row_lse = rows.shape, [], []
        q, k, v = _split_heads(qkv, rows, dtype)  # (b, H, s, D) each
        if table is not None:
            q, k = (rotate(x, table[:s]).to(dtype) for x in (q, k))
        chunk = max(1, _score_budget(qkv.device) // (b * H * s))  # one long document is cut into blocks of queries
        for i0 in range(0, s, chunk):
            p = _group_scores(q[:, :, i0 : i0 + chunk], k, slopes, valid, i0)
            m = p.amax(-1, keepdim=True)
            p.sub_(m).exp_()
            total = p.sum(-1, keepdim=True)
            row_lse.append((m + total.log()) * LOG2E)
            mask = _dropout_mask(p, generator, dropout_p)
            p = p if mask is None else p.mul_(mask)
            o.append(_wide(p.to(dtype) @ v) / total)
        _merge_heads_into(out, torch.cat(o, 2), rows, valid)
        _merge_heads_into(lse, torch.cat(row_lse, 2), rows, valid)
    return out, lse.squeeze(-1).t().contiguous()


def _attention_backward_reference(
    dout, qkv, out, lse, cu_seqlens, slopes, rope_base, max_seqlen, dropout_p, seed
):
    """The five matmuls of the backward pass: dqkv (T, 3, H, D). P is rebuilt from the scores and lse."""
    _, _, H, D = qkv.shape
    dtype = _matmul_dtype(qkv.dtype)
    table = _kept_rope_table(max_seqlen, D, rope_base, qkv.device, qkv.dtype) if rope_base else None
    dqkv = torch.zeros_like(qkv, memory_format=torch.contiguous_format)
    lse = lse.t().unsqueeze(-1)
    generator = _generator(seed, dropout_p, qkv.device)
    for rows, valid in _length_groups(cu_seqlens, H):
        b, s = rows.shape
        q, k, v = _split_heads(qkv, rows, dtype)
        if table is not None:
            q, k = (rotate(x, table[:s]).to(dtype) for x in (q, k))
        do, o = _split_heads(dout, rows, dtype), _split_heads(out, rows, dtype)
        row_lse = _split_heads(lse, rows, lse.dtype) / LOG2E  # (b, H, s, 1)
        if valid is not None:
            do.masked_fill_(~valid[:, None, :, None], 0)
        delta = (_wide(do) * o).sum(-1, keepdim=True)
        dq, dk, dv = (torch.zeros_like(x, dtype=delta.dtype) for x in (q, k, v))
        chunk = max(1, _score_budget(qkv.device) // (b * H * s))
        for i0 in range(0, s, chunk):
            i = slice(i0, i0 + chunk)
            p = _group_scores(q[:, :, i], k, slopes, valid, i0).sub_(row_lse[:, :, i]).exp_()
            mask = _dropout_mask(p, generator, dropout_p)
            dv += (p if mask is None else p * mask).to(dtype).transpose(-1, -2) @ do[:, :, i]
            ds = _wide(do[:, :, i] @ v.transpose(-1, -2))
            ds = (ds if mask is None else ds.mul_(mask)).sub_(delta[:, :, i]).mul_(p).to(dtype)
            dq[:, :, i] = ds @ k
            dk += ds.transpose(-1, -2) @ q[:, :, i]
        if table is not None:
            back = table[:s].conj_physical()  # a lazy conj() is lost in an op of a compiled graph
            dq, dk = rotate(dq, back), rotate(dk, back)
        for j, grad in enumerate((dq.mul_(D**-0.5), dk.mul_(D**-0.5), dv)):
            _merge_heads_into(dqkv[:, j], grad, rows, valid)
    return dqkv


def _attention_padded(qkv, cu_seqlens, max_seqlen, slopes, rope_base, dropout_p):
    """Attention as one padded batch (B, max_seqlen) through PyTorch's own: out (T, H, D). For BERT
    on a GPU, whose dropout of the attention weights the Triton kernel does not have; it never waits
    for the host. Dropout follows torch's generator of the device."""
    cu, row = cu_seqlens.long(), torch.arange(len(qkv), device=qkv.device)
    B = len(cu) - 1
    document = torch.bucketize(row, cu[1:], right=True)  # B for rows behind the last document
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


# ---------------------------------------------------------------------------------------------------------------------
# Attention: Triton
# ---------------------------------------------------------------------------------------------------------------------
# At 128 tokens and D = 64 the forward does 64 FLOP per byte of q, k, v and out, and a Hopper chip needs 180 to be busy:
# below some 370 tokens attention moves bytes, above it multiplies. Hence two paths.
#   one tile      documents of up to 128 tokens: a program owns a whole (document, head), reads each byte once, needs no
#                 online softmax, and does all of the backward: 7 (T, H, D) tensors of traffic, not two kernels' 12
#   loop          longer ones: the forward, then dq, then dk and dv, each holding one tile and stepping over the others
#
# Conventions of the attention kernels
#   one program   one tile of one (document, head); the head is the fastest index, so that programs running together
#                 read whole rows of qkv and share a document's K and V through L2
#   units         scores and lse in log2 units (exp2 is the hardware's exponential): scale and slope carry log2(e)
#   i, j          query and key position inside the document: ALiBi does not see where the document was packed
#   n             the document's length; rows from n on belong to a neighbour: never read, they load as zero
#   UP            upcast after loading, True in the interpreter, whose bf16 arithmetic is silently wrong
#   DP            the power of two from D on; columns beyond D load as zero
#   row offsets   64 bits from the start of qkv to a tile, 32 bits inside it

TILE = 128  # rows per entry of the tile table, and the longest document of the one-tile path


@triton.jit
def _load_rows(
    base, stride, n, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr, UP: tl.constexpr
):
    """A (ROWS, DP) tile at `base`; if MASKED, rows from n on are zero."""
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, DP)[None, :]
    if MASKED or D < DP:
        x = tl.load(base + r * stride + c, mask=((r < n) if MASKED else (r >= 0)) & (c < D), other=0.0)
    else:
        x = tl.load(base + r * stride + c)
    if UP:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store_rows(base, stride, n, x, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, DP)[None, :]
    tl.store(base + r * stride + c, x.to(base.dtype.element_ty), mask=(r < n) & (c < D))


@triton.jit
def _locate(cu_seqlens, tiles, n_tiles, H: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
    """This program's head, the document's first row and length, and the tile's first row within the document.
    SPLIT programs share an entry of the tile table; SPLIT = 0: no table, n_tiles programs for every document."""
    pid = tl.program_id(0)
    head = pid % H
    if SPLIT > 0:
        entry = pid // H // SPLIT
        document = tl.load(tiles + 2 * entry)
        tile = tl.load(tiles + 2 * entry + 1) * SPLIT + (pid // H) % SPLIT
    else:
        document = pid // H // n_tiles
        tile = (pid // H) % n_tiles
    first = tl.load(cu_seqlens + document)
    n = tl.load(cu_seqlens + document + 1) - first
    return head.to(tl.int64), first.to(tl.int64), n, tile * BLOCK


@triton.jit
def _two_slopes(slopes, head):
    """A head's slopes for keys to the left and to the right, in log2 units."""
    left = tl.load(slopes + 2 * head) * 1.4426950408889634
    return left, tl.load(slopes + 2 * head + 1) * 1.4426950408889634


@triton.jit
def _add_alibi(s, left, right, x):
    """s - left x where x = i - j is positive, s + right x where it is negative: as mean |x| and half
    the difference times x, two multiply-adds, and the bits of s - slope |x| where both are equal."""
    s -= (left + right) * 0.5 * tl.abs(x).to(tl.float32)
    return s - (left - right) * 0.5 * x.to(tl.float32)


@triton.jit
def _one_tile(
    qkv, slopes, first, head, n, stride, scale, ALIBI: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """q, k, v (BLOCK, DP) of one head of a whole document, and its scores (BLOCK, BLOCK)."""
    base = qkv + first * stride + head * D
    q = _load_rows(base, stride, n, BLOCK, D, DP, True, UP)
    k = _load_rows(base + H * D, stride, n, BLOCK, D, DP, True, UP)
    v = _load_rows(base + 2 * H * D, stride, n, BLOCK, D, DP, True, UP)
    s = tl.dot(q, tl.trans(k), input_precision=PREC) * scale
    if ALIBI:
        left, right = _two_slopes(slopes, head)
        x = tl.arange(0, BLOCK).to(tl.float32)
        s = _add_alibi(s, left, right, x[:, None] - x[None, :])
    return q, k, v, s


@triton.jit(do_not_specialize=["n_tokens", "n_tiles"])
def _attn_fwd_one_tile(
    qkv, out, lse, cu_seqlens, tiles, slopes, n_tokens, stride, n_tiles, scale,
    ALIBI: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """A document of at most BLOCK tokens: its whole score matrix is one tile, and a plain softmax will do."""
    head, first, n, i0 = _locate(cu_seqlens, tiles, n_tiles, H, BLOCK, SPLIT)
    if i0 >= n:
        return
    _q, _k, v, s = _one_tile(qkv, slopes, first, head, n, stride, scale, ALIBI, H, BLOCK, D, DP, PREC, UP)
    i = tl.arange(0, BLOCK)
    s = tl.where(i[None, :] < n, s, float("-inf"))
    m = tl.max(s, 1)
    p = tl.exp2(s - m[:, None])
    total = tl.sum(p, 1)
    o = tl.dot(p.to(out.dtype.element_ty).to(v.dtype), v, input_precision=PREC) / total[:, None]
    _store_rows(out + (first * H + head) * D, H * D, n, o, BLOCK, D, DP)
    tl.store(lse + head * n_tokens + first + i, m + tl.log2(total), mask=i < n)


@triton.jit(do_not_specialize=["n_tokens", "n_tiles"])
def _attn_bwd_one_tile(
    qkv, dout, lse, dqkv, cu_seqlens, tiles, slopes, n_tokens, stride, n_tiles, scale,
    ALIBI: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """All of a short document's backward in one program: five matmuls where separate dq and dk/dv kernels need seven.
    delta_i = sum_j p_ij dp_ij comes from registers, so `out` is not read at all."""
    head, first, n, i0 = _locate(cu_seqlens, tiles, n_tiles, H, BLOCK, SPLIT)
    if i0 >= n:
        return
    q, k, v, s = _one_tile(qkv, slopes, first, head, n, stride, scale, ALIBI, H, BLOCK, D, DP, PREC, UP)
    do = _load_rows(dout + (first * H + head) * D, H * D, n, BLOCK, D, DP, True, UP)
    i = tl.arange(0, BLOCK)
    # +inf, not 0, for rows past the end: their p is then exactly 0 whatever the score
    row_lse = tl.load(lse + head * n_tokens + first + i, mask=i < n, other=float("inf"))
    p = tl.where(i[None, :] < n, tl.exp2(s - row_lse[:, None]), 0.0)
    grad = dqkv + (first * H * 3 + head) * D
    dv = tl.dot(tl.trans(p.to(dout.dtype.element_ty).to(do.dtype)), do, input_precision=PREC)
    _store_rows(grad + 2 * H * D, 3 * H * D, n, dv, BLOCK, D, DP)
    dp = tl.dot(do, tl.trans(v), input_precision=PREC)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(qkv.dtype.element_ty).to(q.dtype)
    unit = scale * 0.6931471805599453  # back from log2 units
    dq = tl.dot(ds, k, input_precision=PREC) * unit
    _store_rows(grad, 3 * H * D, n, dq, BLOCK, D, DP)
    dk = tl.dot(tl.trans(ds), q, input_precision=PREC) * unit
    _store_rows(grad + H * D, 3 * H * D, n, dk, BLOCK, D, DP)


# Longer documents loop over tiles. ALiBi goes by side of the diagonal: left of it |i - j| = i - j, so the bias is a
# ramp over the columns, the same for every tile, plus a number per row that only meets the running maximum (forward)
# or lse (backward). Off-diagonal tiles then need no abs and no mask: the forward's 128 x 128 step is 533 instructions
# against 768 for the general body. SIDE = -1 is left of the diagonal, +1 right of it; 0 is
# the general body, for the diagonal and for the ragged tail, peeled off so that it alone pays for masks.


@triton.jit
def _side(SIDE: tl.constexpr, at, HELD: tl.constexpr, STEP: tl.constexpr, n):
    """Where the loop of one side begins and ends, and where its last step jumps to. A program holds rows `at` to
    at + HELD and steps over the others; HELD is a multiple of STEP."""
    right = at + HELD
    full = n // STEP * STEP  # end of the last whole tile
    if SIDE == 0:
        begin, end = at, tl.where((full >= right) & (full < n), right + STEP, tl.minimum(right, n))
    elif SIDE == -1:
        begin, end = 0, at
    else:
        begin, end = right, full
    return begin, end, full


@triton.jit(do_not_specialize=["n_tokens", "n_tiles"])
def _attn_fwd_loop(
    qkv, out, lse, cu_seqlens, tiles, slopes, n_tokens, stride, n_tiles, scale,
    ALIBI: tl.constexpr, H: tl.constexpr, HELD: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """HELD queries of a document against all its keys, STEP at a time, with an online softmax."""
    head, first, n, i0 = _locate(cu_seqlens, tiles, n_tiles, H, HELD, SPLIT)
    if i0 >= n:
        return
    left, right = 0.0, 0.0
    if ALIBI:
        left, right = _two_slopes(slopes, head)
    base = qkv + first * stride + head * D
    q = _load_rows(base + stride.to(tl.int64) * i0, stride, n - i0, HELD, D, DP, True, UP)
    acc = tl.zeros([HELD, DP], tl.float32)
    m = tl.full([HELD], float("-inf"), tl.float32)
    total = tl.zeros([HELD], tl.float32)
    i = i0 + tl.arange(0, HELD)
    column = tl.arange(0, STEP)
    for SIDE in tl.static_range(-1, 2):
        begin, end, tail = _side(SIDE, i0, HELD, STEP, n)
        for step in tl.range(begin, end, STEP, num_stages=1 if SIDE == 0 else None):
            j0 = tl.where(step < i0 + HELD, step, tail) if SIDE == 0 else step
            at = base + stride.to(tl.int64) * j0
            k = _load_rows(at + H * D, stride, n - j0, STEP, D, DP, SIDE == 0, UP)
            v = _load_rows(at + 2 * H * D, stride, n - j0, STEP, D, DP, SIDE == 0, UP)
            s = tl.dot(q, tl.trans(k), input_precision=PREC) * scale
            row_bias = tl.zeros([HELD], tl.float32)
            if SIDE == 0:
                if ALIBI:
                    x = (i - j0).to(tl.float32)[:, None] - column.to(tl.float32)[None, :]
                    s = _add_alibi(s, left, right, x)
                s = tl.where(column[None, :] < n - j0, s, float("-inf"))
            elif ALIBI:
                slope = right if SIDE == 1 else -left
                s -= slope * column.to(tl.float32)[None, :]
                row_bias = slope * (i - j0).to(tl.float32)
            m_new = tl.maximum(m, tl.max(s, 1) + row_bias)
            p = tl.exp2(s - (m_new - row_bias)[:, None])
            shrink = tl.exp2(m - m_new)
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(out.dtype.element_ty).to(v.dtype), v, acc * shrink[:, None], input_precision=PREC)
            m = m_new
    row = first + i0
    _store_rows(out + (row * H + head) * D, H * D, n - i0, acc / total[:, None], HELD, D, DP)
    tl.store(lse + head * n_tokens + row + i - i0, m + tl.log2(total), mask=i < n)


@triton.jit(do_not_specialize=["n_tokens", "n_tiles"])
def _attn_bwd_loop(
    qkv, out, dout, lse, delta, dqkv, cu_seqlens, tiles, slopes, n_tokens, stride, n_tiles, scale,
    KEYS: tl.constexpr, ALIBI: tl.constexpr, H: tl.constexpr, HELD: tl.constexpr, STEP: tl.constexpr,
    SPLIT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PREC: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """The gradient of HELD rows against all rows of the document, STEP at a time: dq of queries, or (KEYS, scores
    transposed) dk and dv of keys. Both are s = x x'^T, dp = y y'^T, dx += ds x', where x is q or k, y is do or v.
    dq runs first and leaves delta_i = sum_d out_id dout_id for dk: FlashAttention's "preprocess" without a launch."""
    head, first, n, at = _locate(cu_seqlens, tiles, n_tiles, H, HELD, SPLIT)
    if at >= n:
        return
    left, right = 0.0, 0.0
    if ALIBI:
        left, right = _two_slopes(slopes, head)
        if KEYS:  # a query to the left sees the key on its right
            left, right = right, left
    base = qkv + first * stride + head * D
    do_base = dout + (first * H + head) * D
    stat = head * n_tokens + first
    i = at + tl.arange(0, HELD)
    column = tl.arange(0, STEP)
    here = base + stride.to(tl.int64) * at
    if KEYS:
        x = _load_rows(here + H * D, stride, n - at, HELD, D, DP, True, UP)
        y = _load_rows(here + 2 * H * D, stride, n - at, HELD, D, DP, True, UP)
    else:
        row = (first + at) * H * D + head * D
        x = _load_rows(here, stride, n - at, HELD, D, DP, True, UP)
        y = _load_rows(dout + row, H * D, n - at, HELD, D, DP, True, UP)
        o = _load_rows(out + row, H * D, n - at, HELD, D, DP, True, UP)
        row_delta = tl.sum(o.to(tl.float32) * y.to(tl.float32), 1)
        tl.store(delta + stat + i, row_delta, mask=i < n)
        row_lse = tl.load(lse + stat + i, mask=i < n, other=float("inf"))
    dx = tl.zeros([HELD, DP], tl.float32)
    dv = tl.zeros([HELD, DP], tl.float32)
    for SIDE in tl.static_range(-1, 2):
        begin, end, tail = _side(SIDE, at, HELD, STEP, n)
        for step in tl.range(begin, end, STEP, num_stages=1 if SIDE == 0 else None):
            to = tl.where(step < at + HELD, step, tail) if SIDE == 0 else step
            there = base + stride.to(tl.int64) * to
            if KEYS:
                x_to = _load_rows(there, stride, n - to, STEP, D, DP, SIDE == 0, UP)
                y_to = _load_rows(do_base + to.to(tl.int64) * H * D, H * D, n - to, STEP, D, DP, SIDE == 0, UP)
            else:
                x_to = _load_rows(there + H * D, stride, n - to, STEP, D, DP, SIDE == 0, UP)
                y_to = _load_rows(there + 2 * H * D, stride, n - to, STEP, D, DP, SIDE == 0, UP)
            s = tl.dot(x, tl.trans(x_to), input_precision=PREC) * scale
            if KEYS and SIDE == 0:  # lse = +inf past the last query makes p exactly 0 there
                of_row = tl.load(lse + stat + to + column, mask=column < n - to, other=float("inf"))[None, :]
                of_delta = tl.load(delta + stat + to + column, mask=column < n - to, other=0.0)[None, :]
            elif KEYS:
                of_row = tl.load(lse + stat + to + column)[None, :]
                of_delta = tl.load(delta + stat + to + column)[None, :]
            else:
                of_row, of_delta = row_lse[:, None], row_delta[:, None]
            if ALIBI:
                slope = right if SIDE == 1 else -left
                if SIDE == 0:  # in integers: the float form takes 18 registers more, and 255 are near
                    s = _add_alibi(s, left, right, i[:, None] - to - column[None, :])
                elif KEYS:
                    s += slope * (i - at).to(tl.float32)[:, None]
                    of_row += slope * (to - at + column).to(tl.float32)[None, :]
                else:
                    s -= slope * column.to(tl.float32)[None, :]
                    of_row -= slope * (i - to).to(tl.float32)[:, None]
            p = tl.exp2(s - of_row)
            if SIDE == 0 and not KEYS:
                # p past the end must be 0 before it meets a zero key: exp2(0 - lse) can be inf, and inf * 0 is NaN.
                # dk and dv need no such mask: keys past the end fill rows that are not stored.
                p = tl.where(column[None, :] < n - to, p, 0.0)
            if KEYS:
                dv = tl.dot(p.to(dout.dtype.element_ty).to(y.dtype), y_to, dv, input_precision=PREC)
            dp = tl.dot(y, tl.trans(y_to), input_precision=PREC)
            ds = (p * (dp - of_delta)).to(qkv.dtype.element_ty).to(x.dtype)
            dx = tl.dot(ds, x_to, dx, input_precision=PREC)
    grad = dqkv + ((first + at) * H * 3 + head) * D
    if KEYS:
        grad += H * D
        _store_rows(grad + H * D, 3 * H * D, n - at, dv, HELD, D, DP)
    _store_rows(grad, 3 * H * D, n - at, dx * (scale * 0.6931471805599453), HELD, D, DP)


@triton.jit(do_not_specialize=["n_documents", "n_tokens"])
def _zero_slack(x, cu_seqlens, n_documents, n_tokens, width, BLOCK: tl.constexpr):
    """Rows of x (n_tokens, width) that belong to no document become zero; usually there are none."""
    begin = tl.load(cu_seqlens + n_documents).to(tl.int64) * width
    end = n_tokens.to(tl.int64) * width
    step = BLOCK * tl.num_programs(0)
    for at in tl.range(begin + tl.program_id(0) * BLOCK, end, step):
        offset = at + tl.arange(0, BLOCK)
        tl.store(x + offset, tl.zeros([BLOCK], x.dtype.element_ty), mask=offset < end)


# Launch settings, a fixed table: autotuning could pick others on another day, and with them other bits. By chip
# family (fp32 has its own on every chip, on tf32x3 matmuls: slow, for checks) and D up to: the longest document of the
# one-tile kernels, then (rows held, rows per step, warps, stages) of the loop kernels. Chosen by static evidence (no
# spill, fits shared memory: tests/test_kernels_aot.py prints it), not yet by timing.
ATTENTION_CONFIGS = {
    ("hopper", 64): {"one_tile": 128, "fwd": (128, 128, 8, 2), "dq": (128, 64, 8, 3), "dkdv": (128, 64, 8, 2)},
    ("hopper", 128): {"one_tile": 128, "fwd": (128, 64, 8, 2), "dq": (128, 32, 8, 2), "dkdv": (128, 32, 8, 3)},
    ("blackwell", 64): {"one_tile": 128, "fwd": (128, 64, 8, 3), "dq": (128, 64, 8, 2), "dkdv": (128, 64, 8, 2)},
    ("blackwell", 128): {"one_tile": 128, "fwd": (128, 32, 8, 2), "dq": (128, 32, 8, 2), "dkdv": (128, 32, 8, 2)},
    ("others", 64): {"one_tile": 64, "fwd": (128, 64, 8, 3), "dq": (128, 32, 8, 2), "dkdv": (128, 32, 8, 2)},
    ("others", 128): {"one_tile": 64, "fwd": (64, 32, 4, 2), "dq": (64, 32, 8, 2), "dkdv": (64, 32, 8, 2)},
    ("fp32", 64): {"one_tile": 0, "fwd": (32, 16, 4, 1), "dq": (32, 16, 4, 1), "dkdv": (32, 16, 4, 1)},
    ("fp32", 128): {"one_tile": 0, "fwd": (16, 16, 4, 1), "dq": (16, 16, 8, 1), "dkdv": (16, 16, 4, 1)},
}


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)  # not CUDA: the interpreter


def _chip_family(capability: tuple[int, int]) -> str:
    return {9: "hopper", 10: "blackwell"}.get(capability[0], "others")  # others: 8.0, 8.6, 8.9, 12.0


def _attention_config(dtype: torch.dtype, D: int, capability: tuple[int, int]) -> dict:
    wide = 64 if D <= 64 else 128
    if INTERPRET:
        return ATTENTION_CONFIGS["hopper", wide]
    return ATTENTION_CONFIGS["fp32" if dtype == torch.float32 else _chip_family(capability), wide]


def _attention_constants(kernel, name, config, D: int, dtype, max_seqlen: int) -> tuple[int, int, dict]:
    """(rows held by a program, programs per tile-table entry, the constexprs and launch options of `kernel`), which is
    launched for `name`: "fwd", "dq" or "dkdv"."""
    DP = max(16, triton.next_power_of_2(D))
    options = {"D": D, "DP": DP, "UP": INTERPRET, "PREC": "tf32", **FUSION}
    if dtype == torch.float32:
        options["PREC"] = "ieee" if INTERPRET else "tf32x3"
    if kernel in (_attn_fwd_one_tile, _attn_bwd_one_tile):
        rows = 64 if max_seqlen <= 64 else 128
        warps = 8 if rows == 128 or (DP == 128 and kernel is _attn_bwd_one_tile) else 4
        return TILE, 1, options | {"BLOCK": rows, "num_warps": warps, "num_stages": 1}
    rows, step, warps, stages = config[name]
    options |= {"HELD": rows, "STEP": step, "num_warps": warps, "num_stages": stages}
    return rows, TILE // rows, options if name == "fwd" else options | {"KEYS": name == "dkdv"}


def attention_tiles(cu_seqlens: Tensor, pad_to: int = 0) -> Tensor:
    """The work list of the attention kernels, built on the CPU together with the batch: (n, 2) int32 pairs of document
    and tile of TILE rows in it, longest documents first, so that no program starts in vain and no long one starts late.

    `pad_to` fills up with empty entries to a fixed size (for CUDA graphs; T // TILE + B is always enough)."""
    lens = cu_seqlens.cpu().long().diff()
    order = torch.argsort(lens, descending=True, stable=True)
    n_tiles = (lens[order] + TILE - 1) // TILE
    document = order.repeat_interleave(n_tiles)
    tile = torch.arange(len(document)) - (n_tiles.cumsum(0) - n_tiles).repeat_interleave(n_tiles)
    if pad_to and pad_to < len(document):
        raise ValueError(f"attention_tiles: pad_to={pad_to} is less than the {len(document)} tiles of this batch")
    tiles = torch.tensor([[0, 2**20]], dtype=torch.int32).repeat(max(pad_to, len(document)), 1)  # far past any end
    tiles[: len(document)] = torch.stack([document, tile], 1)
    return tiles


def _attention_launch(kernel, name, pointers, qkv, cu_seqlens, slopes, tiles, max_seqlen, config):
    T, _, H, D = qkv.shape
    rows, split, options = _attention_constants(kernel, name, config, D, qkv.dtype, max_seqlen)
    n_tiles = triton.cdiv(max_seqlen, rows)
    programs = H * (n_tiles * (len(cu_seqlens) - 1) if tiles is None else len(tiles) * split)
    if programs > 0:
        kernel[(programs,)](
            *pointers, cu_seqlens, tiles, slopes, T, qkv.stride(0), n_tiles, LOG2E * D**-0.5,
            ALIBI=slopes is not None, H=H, SPLIT=0 if tiles is None else split, **options,
        )  # fmt: skip


def _attention_triton(qkv, cu_seqlens, slopes, tiles, max_seqlen):
    T, _, H, D = qkv.shape
    out = qkv.new_empty(T, H, D)
    lse = qkv.new_zeros(H, T, dtype=torch.float32)  # zeros: slack rows are an output too, and must not vary
    config = _attention_config(qkv.dtype, D, _capability(qkv))
    kernel = _attn_fwd_one_tile if max_seqlen <= config["one_tile"] else _attn_fwd_loop
    with torch.cuda.device_of(qkv):
        _attention_launch(kernel, "fwd", (qkv, out, lse), qkv, cu_seqlens, slopes, tiles, max_seqlen, config)
        _zero_slack[(64,)](out, cu_seqlens, len(cu_seqlens) - 1, T, H * D, BLOCK=1024, **FUSION)
    return out, lse


def _attention_backward_triton(dout, qkv, out, lse, cu_seqlens, slopes, tiles, max_seqlen):
    T, _, H, D = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    config = _attention_config(qkv.dtype, D, _capability(qkv))
    launch = qkv, cu_seqlens, slopes, tiles, max_seqlen, config
    with torch.cuda.device_of(qkv):
        if max_seqlen <= config["one_tile"]:
            _attention_launch(_attn_bwd_one_tile, "", (qkv, dout, lse, dqkv), *launch)
        else:
            delta = torch.empty_like(lse)
            for name in ("dq", "dkdv"):
                _attention_launch(_attn_bwd_loop, name, (qkv, out, dout, lse, delta, dqkv), *launch)
        _zero_slack[(64,)](dqkv, cu_seqlens, len(cu_seqlens) - 1, T, 3 * H * D, BLOCK=1024, **FUSION)
    return dqkv


# ---------------------------------------------------------------------------------------------------------------------
# Attention: the op
# ---------------------------------------------------------------------------------------------------------------------


def _check_attention(qkv, cu_seqlens, slopes, tiles, max_seqlen, use_triton):
    problem = ""
    _check_dtype("varlen_attention: qkv", qkv, use_triton)
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        problem = f"qkv must be (T, 3, H, D), got {tuple(qkv.shape)}"
    elif qkv.stride()[1:] != (qkv.shape[2] * qkv.shape[3], qkv.shape[3], 1):
        problem = f"the rows of qkv must be contiguous, its strides are {qkv.stride()}; call .contiguous() on it"
    elif use_triton and (qkv.shape[3] % 16 or not 16 <= qkv.shape[3] <= 128):
        problem = f"head dimension {qkv.shape[3]} is not a multiple of 16 from 16 to 128"
    elif cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        problem = f"cu_seqlens must be (B+1,) int32, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
    elif slopes is not None and (slopes.shape != (qkv.shape[2], 2) or slopes.dtype != torch.float32):
        problem = f"slopes must be ({qkv.shape[2]}, 2) float32, got {tuple(slopes.shape)} {slopes.dtype}"
    elif tiles is not None and (tiles.dtype != torch.int32 or tiles.dim() != 2 or tiles.shape[1] != 2):
        problem = f"tiles must be (n, 2) int32 from attention_tiles, got {tuple(tiles.shape)} {tiles.dtype}"
    else:
        for name, x in (("cu_seqlens", cu_seqlens), ("slopes", slopes), ("tiles", tiles)):
            if x is not None and x.device != qkv.device:
                problem = f"{name} is on {x.device}, qkv on {qkv.device}"
    if not problem and (CHECK_VALUES or not cu_seqlens.is_cuda):
        first, last, lens = int(cu_seqlens[0]), int(cu_seqlens[-1]), cu_seqlens.diff()
        if first != 0:
            problem = f"cu_seqlens must start at 0, it starts at {first}"
        elif len(lens) and int(lens.min()) < 0:
            problem = f"cu_seqlens decreases at position {int(lens.argmin()) + 1}"
        elif last > len(qkv):
            problem = f"cu_seqlens ends at {last}, beyond the {len(qkv)} rows of qkv"
        elif len(lens) and int(lens.max()) > max_seqlen:
            problem = f"a document of {int(lens.max())} tokens is longer than max_seqlen={max_seqlen}"
    if problem:
        raise ValueError(f"varlen_attention: {problem}")


@torch.library.custom_op("nanomosaic::attention", mutates_args=())
def _attention(
    qkv: Tensor, cu_seqlens: Tensor, slopes: Tensor | None, tiles: Tensor | None, seed: Tensor | None,
    rope_base: float, max_seqlen: int, dropout_p: float, use_triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_attention(qkv, cu_seqlens, slopes, tiles, max_seqlen, use_triton)
    if use_triton:
        return _attention_triton(qkv, cu_seqlens, slopes, tiles, max_seqlen)
    return _attention_reference(qkv, cu_seqlens, slopes, rope_base, max_seqlen, dropout_p, seed)


@_attention.register_fake
def _(qkv, cu_seqlens, slopes, tiles, seed, rope_base, max_seqlen, dropout_p, use_triton):
    T, _, H, D = qkv.shape
    lse_dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty(T, H, D), qkv.new_empty(H, T, dtype=lse_dtype)


@torch.library.custom_op("nanomosaic::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, slopes: Tensor | None,
    tiles: Tensor | None, seed: Tensor | None, rope_base: float, max_seqlen: int, dropout_p: float,
    use_triton: bool,
) -> Tensor:  # fmt: skip
    if use_triton:
        return _attention_backward_triton(dout.contiguous(), qkv, out, lse, cu_seqlens, slopes, tiles, max_seqlen)
    return _attention_backward_reference(
        dout, qkv, out, lse, cu_seqlens, slopes, rope_base, max_seqlen, dropout_p, seed
    )


_attention_backward.register_fake(lambda dout, qkv, *_: qkv.new_empty(qkv.shape))


def _attention_save(ctx, inputs, output):
    qkv, cu_seqlens, slopes, tiles, seed, *ctx.settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, cu_seqlens, slopes, tiles, seed)


def _attention_grad(ctx, dout, _dlse):
    dqkv = _attention_backward(dout, *ctx.saved_tensors, *ctx.settings)
    return dqkv, *[None] * 8


_attention.register_autograd(_attention_grad, setup_context=_attention_save)


def varlen_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, slopes: Tensor | None = None, *, rope_base: float = 0.0,
    tiles: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Attention inside each document of a flat batch, with ALiBi, RoPE, both or neither: out
    (T, H, D), dtype of qkv.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(D) - slope |i - j|) v_j over the rows j of i's own
    document, the slope one for j < i and one for j > i, q and k turned by RoPE first.

    qkv         (T, 3, H, D) bf16, fp16 or fp32 (slow on a GPU; the reference also takes fp64), its rows contiguous.
                Triton: D a multiple of 16 up to 128
    cu_seqlens  (B+1,) int32 on qkv's device, from 0, non-decreasing
    max_seqlen  the longest document, or any bound above it (it picks the kernel, so keep it fixed in training)
    slopes      (H, 2) fp32 (`alibi_slopes`), or None for no bias; never given a gradient
    rope_base   of RoPE's wavelengths (`rope_table`), positions count from the start of each document;
                0: no RoPE
    tiles       the work list of `attention_tiles`, on qkv's device; None launches a rectangular grid
    dropout_p   dropout of the attention weights, "cpu" and "padded" only. cpu: `seed` (0-dim int64
                CPU tensor) fixes the mask and is drawn from torch's CPU generator when None;
                padded: torch's generator of the device decides
    backend     "auto", "triton", "cpu" or "padded": see `attention_backend`

    ValueError, in one line, for an argument that breaks the above."""
    backend, _ = attention_backend(qkv.device.type, backend, dropout_p)
    use_triton = _use_triton(qkv, backend)
    if dropout_p > 0 and use_triton:
        raise ValueError('varlen_attention: the Triton kernel has no dropout; backend "padded" has')
    if backend == "padded":
        return _attention_padded(qkv, cu_seqlens, max_seqlen, slopes, rope_base, dropout_p)
    if rope_base and use_triton:
        raise ValueError('varlen_attention: RoPE has no Triton kernel yet; backend "padded" has it')
    if dropout_p > 0 and seed is None:
        seed = torch.randint(2**62, (), dtype=torch.int64)
    settings = rope_base, max_seqlen, dropout_p, use_triton
    out, _ = _attention(qkv, cu_seqlens, slopes, tiles, seed, *settings)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Unpad and pad: rows in, rows out
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"])
def _copy_rows(src, dst, indices, n, width, SCATTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dst[m] = src[indices[m]], or dst[indices[m]] = src[m] if SCATTER: each byte is read and written once."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(indices + m, mask=m < n, other=-1).to(tl.int64)
    for c0 in tl.range(0, width, BLOCK):
        c = c0 + tl.arange(0, BLOCK)[None, :]
        real = (row >= 0)[:, None] & (c < width)
        if SCATTER:
            x = tl.load(src + m[:, None] * width + c, mask=real)
            tl.store(dst + row[:, None] * width + c, x, mask=real)
        else:
            x = tl.load(src + row[:, None] * width + c, mask=real, other=0)
            tl.store(dst + m[:, None] * width + c, x, mask=(m < n)[:, None] & (c < width))


def _copy_rows_launch(src, dst, indices, scatter):
    n, width = len(indices), math.prod(src.shape[1:])
    if n * width:
        block = min(1024, max(16, triton.next_power_of_2(width)))
        rows = 4096 // block
        with torch.cuda.device_of(src):
            _copy_rows[(triton.cdiv(n, rows),)](
                src.contiguous(), dst, indices, n, width, SCATTER=scatter, ROWS=rows, BLOCK=block, **FUSION
            )
    return dst


def _check_rows(name, indices, n_rows):
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: indices must be (M,) int64 or int32, got {tuple(indices.shape)} {indices.dtype}")
    if CHECK_VALUES or not indices.is_cuda:
        kept = indices[indices >= 0]
        if len(kept) and int(kept.max()) >= n_rows:
            raise ValueError(f"{name}: index {int(kept.max())} is out of range, there are {n_rows} rows")
        if CHECK_VALUES and len(kept.unique()) != len(kept):
            raise ValueError(f"{name}: an index appears twice")


@torch.library.custom_op("nanomosaic::gather_rows", mutates_args=())
def _gather_rows(x: Tensor, indices: Tensor, use_triton: bool) -> Tensor:
    _check_rows("gather_rows", indices, len(x))
    if use_triton:
        return _copy_rows_launch(x, x.new_empty(len(indices), *x.shape[1:]), indices, False)
    rows = x.index_select(0, indices.clamp(min=0))
    rows[indices < 0] = 0
    return rows


@torch.library.custom_op("nanomosaic::scatter_rows", mutates_args=())
def _scatter_rows(x: Tensor, indices: Tensor, n_rows: int, use_triton: bool) -> Tensor:
    _check_rows("scatter_rows", indices, n_rows)
    out = x.new_zeros(n_rows, *x.shape[1:])
    if use_triton:
        return _copy_rows_launch(x, out, indices, True)
    kept = indices >= 0
    out[indices[kept]] = x[kept]
    return out


def _rows_save(ctx, inputs, output):
    x, indices, *_, ctx.use_triton = inputs
    ctx.n_rows = x.shape[0]
    ctx.save_for_backward(indices)


_gather_rows.register_fake(lambda x, indices, _: x.new_empty(indices.shape[0], *x.shape[1:]))
_scatter_rows.register_fake(lambda x, indices, n_rows, _: x.new_empty(n_rows, *x.shape[1:]))
# each other's gradient, because no row is taken twice
_gather_rows.register_autograd(
    lambda ctx, g: (_scatter_rows(g, ctx.saved_tensors[0], ctx.n_rows, ctx.use_triton), None, None),
    setup_context=_rows_save,
)
_scatter_rows.register_autograd(
    lambda ctx, g: (_gather_rows(g, ctx.saved_tensors[0], ctx.use_triton), None, None, None),
    setup_context=_rows_save,
)


def gather_rows(x: Tensor, indices: Tensor, *, backend: str = "auto") -> Tensor:
    """Rows `indices` (M,) of x (R, ...): (M, ...), with a gradient and without a host synchronisation.

    An index may appear once only (the gradient is a plain scatter). A negative index is a filler: it reads a row of
    zeros and its gradient is dropped, so that M can be a fixed size."""
    return _gather_rows(x, indices, _use_triton(x, backend))


def scatter_rows(x_flat: Tensor, indices: Tensor, n_rows: int, *, backend: str = "auto") -> Tensor:
    """The inverse of `gather_rows`: row m of x_flat (M, ...) goes to row indices[m] of (n_rows, ...), the other rows
    are zero. Indices are unique; negative ones are dropped."""
    return _scatter_rows(x_flat, indices, n_rows, _use_triton(x_flat, backend))


def unpad(x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Drop the padding of a batch: x (B, S, ...), attention_mask (B, S) -> (x_flat (T, ...), indices (T,) int64 into
    the B*S rows, cu_seqlens (B+1,) int32, max_seqlen).

    The mask is non-zero on real tokens, which may sit anywhere in a row. A mask on the GPU costs a synchronisation,
    one on the CPU costs none; training batches are flat from the start and never come here."""
    if x.shape[:2] != attention_mask.shape:
        raise ValueError(f"unpad: x {tuple(x.shape)} and attention_mask {tuple(attention_mask.shape)} do not match")
    mask = attention_mask != 0
    lens = mask.sum(1)
    cu_seqlens = F.pad(lens.cumsum(0), (1, 0)).to(torch.int32)
    max_seqlen = int(lens.max()) if lens.numel() else 0
    indices = mask.flatten().nonzero().squeeze(1)
    indices, cu_seqlens = indices.to(x.device, non_blocking=True), cu_seqlens.to(x.device, non_blocking=True)
    return gather_rows(x.flatten(0, 1), indices), indices, cu_seqlens, max_seqlen


def pad(x_flat: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad`: (T, ...) -> (batch, seqlen, ...), zero where there is no token."""
    return scatter_rows(x_flat, indices, batch * seqlen).unflatten(0, (batch, seqlen))


# ---------------------------------------------------------------------------------------------------------------------
# GeGLU
# ---------------------------------------------------------------------------------------------------------------------
# The largest pointwise cost of a layer: 2I values in and I out per token, then 3I in and 2I out in the backward; at
# I = 3,072 that is 11.4 ns a token against 72 ns for the layer's matrix products (arithmetic, H200). The kernels read
# both halves where the projection left them and write one gradient buffer: nothing is sliced, concatenated or kept but
# the projection itself. Arithmetic in fp32 whatever the storage.


@triton.jit
def _geglu_fwd(h, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(h + row * 2 * width + c, mask=c < width, other=0.0).to(tl.float32)
    up = tl.load(h + row * 2 * width + width + c, mask=c < width, other=0.0).to(tl.float32)
    y = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * up
    tl.store(out + row * width + c, y.to(out.dtype.element_ty), mask=c < width)


@triton.jit
def _geglu_bwd(dout, h, dh, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(h + row * 2 * width + c, mask=c < width, other=0.0).to(tl.float32)
    up = tl.load(h + row * 2 * width + width + c, mask=c < width, other=0.0).to(tl.float32)
    dy = tl.load(dout + row * width + c, mask=c < width, other=0.0).to(tl.float32)
    cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    pdf = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    at = dh + row * 2 * width + c
    tl.store(at, (dy * up * (cdf + gate * pdf)).to(dh.dtype.element_ty), mask=c < width)
    tl.store(at + width, (dy * gate * cdf).to(dh.dtype.element_ty), mask=c < width)


def _geglu_launch(kernel, *tensors, rows, width):
    if rows * width:
        block = min(1024, max(16, triton.next_power_of_2(width)))
        with torch.cuda.device_of(tensors[0]):
            kernel[(rows, triton.cdiv(width, block))](*tensors, width, BLOCK=block, **FUSION)
    return tensors[-1]


@torch.library.custom_op("nanomosaic::geglu", mutates_args=())
def _geglu(h: Tensor, use_triton: bool) -> Tensor:
    _check_dtype("geglu: h", h, use_triton)
    rows, width = h.shape[0], h.shape[1] // 2
    if use_triton:
        return _geglu_launch(_geglu_fwd, h.contiguous(), h.new_empty(rows, width), rows=rows, width=width)
    out = h.new_empty(rows, width)
    block = max(256, 2**18 // width)
    for x, y in zip(h.split(block), out.split(block)):  # the fp32 copies stay in the cache
        gate, up = _wide(x).chunk(2, 1)
        y.copy_(F.gelu(gate).mul_(up))
    return out


@torch.library.custom_op("nanomosaic::geglu_backward", mutates_args=())
def _geglu_backward(dout: Tensor, h: Tensor, use_triton: bool) -> Tensor:
    rows, width = dout.shape
    if use_triton:
        dh = h.new_empty(rows, 2 * width)
        return _geglu_launch(_geglu_bwd, dout.contiguous(), h.contiguous(), dh, rows=rows, width=width)
    dh = h.new_empty(rows, 2 * width)
    block = max(256, 2**18 // width)
    for x, y, dx in zip(h.split(block), dout.split(block), dh.split(block)):
        (gate, up), dy = _wide(x).chunk(2, 1), _wide(y)
        dx[:, :width] = torch.ops.aten.gelu_backward(dy * up, gate)
        dx[:, width:] = F.gelu(gate).mul_(dy)
    return dh


def _geglu_save(ctx, inputs, output):
    h, ctx.use_triton = inputs
    ctx.save_for_backward(h)


_geglu.register_fake(lambda h, _: h.new_empty(h.shape[0], h.shape[1] // 2))
_geglu_backward.register_fake(lambda dout, h, _: h.new_empty(h.shape))
_geglu.register_autograd(
    lambda ctx, dout: (_geglu_backward(dout, *ctx.saved_tensors, ctx.use_triton), None), setup_context=_geglu_save
)


def geglu(h: Tensor, *, backend: str = "auto") -> Tensor:
    """gelu(h[..., :I]) * h[..., I:] with the exact (erf) GELU: (..., 2I) -> (..., I), dtype of h. MosaicBERT's order:
    the first half is the gate (Shazeer 2020). ValueError if the last axis is odd."""
    if h.shape[-1] % 2:
        raise ValueError(f"geglu: the last axis holds two halves, its size {h.shape[-1]} is odd")
    return _geglu(h.flatten(0, -2), _use_triton(h, backend)).unflatten(0, h.shape[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# Residual add and LayerNorm
# ---------------------------------------------------------------------------------------------------------------------
# y = (z - mean) rstd weight + bias with z = x + residual: 3 values moved in the forward, 4 in the backward. z is summed
# in fp32 and never stored; the backward, which needs it, reads x and residual again, which costs what reading a stored
# z would have saved in writing it. Statistics are fp32 (T,). For the parameter gradients four programs per processor
# walk over the rows with fp32 sums in registers and leave one partial row each, added at the end in a fixed order.


@triton.jit
def _layer_norm_fwd(
    x, residual, weight, bias, y, mean, rstd, width, eps, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    real = c < width
    z = tl.load(x + row * width + c, mask=real, other=0.0).to(tl.float32)
    if RESIDUAL:
        z += tl.load(residual + row * width + c, mask=real, other=0.0).to(tl.float32)
    mu = tl.sum(z, 0) / width
    centred = tl.where(real, z - mu, 0.0)
    r = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    w = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=real, other=0.0).to(tl.float32)
    tl.store(y + row * width + c, (centred * r * w + b).to(y.dtype.element_ty), mask=real)
    tl.store(mean + row, mu)
    tl.store(rstd + row, r)


@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm_bwd(
    dy, x, residual, weight, mean, rstd, dz, dweight, dbias, n_rows, width, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    real = c < width
    w = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(program, n_rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * width + c
        z = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
        if RESIDUAL:
            z += tl.load(residual + at, mask=real, other=0.0).to(tl.float32)
        g = tl.load(dy + at, mask=real, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        xhat = tl.where(real, (z - tl.load(mean + row)) * r, 0.0)
        dw += g * xhat
        db += g
        wg = w * g
        grad = r * (wg - tl.sum(wg, 0) / width - xhat * (tl.sum(wg * xhat, 0) / width))
        tl.store(dz + at, grad.to(dz.dtype.element_ty), mask=real)
    at = program.to(tl.int64) * width + c
    tl.store(dweight + at, dw, mask=real)
    tl.store(dbias + at, db, mask=real)


def _layer_norm_options(width: int) -> dict:
    block = max(16, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256)), **FUSION}


@torch.library.custom_op("nanomosaic::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, use_triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_dtype("add_layer_norm: x", x, use_triton)
    rows, width = x.shape
    if use_triton:
        y = x.new_empty(rows, width)
        mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
        if rows:
            with torch.cuda.device_of(x):
                _layer_norm_fwd[(rows,)](
                    x.contiguous(), None if residual is None else residual.contiguous(), weight, bias, y, mean, rstd,
                    width, eps, RESIDUAL=residual is not None, **_layer_norm_options(width),
                )  # fmt: skip
        return y, mean, rstd
    z = _wide(x) if residual is None else _wide(x) + _wide(residual)
    var, mean = torch.var_mean(z, 1, correction=0)
    rstd = (var + eps).rsqrt()
    y = (z - mean[:, None]) * rstd[:, None] * _wide(weight) + _wide(bias)
    return y.to(x.dtype), mean, rstd


@_add_layer_norm.register_fake
def _(x, residual, weight, bias, eps, use_triton):
    stat = x.new_empty(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x.new_empty(x.shape), stat, torch.empty_like(stat)


@torch.library.custom_op("nanomosaic::add_layer_norm_backward", mutates_args=())
def _add_layer_norm_backward(
    dy: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, use_triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape
    if use_triton:
        programs = 4 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
        programs = max(1, min(programs, rows))
        dz = x.new_empty(rows, width)
        dweight, dbias = (x.new_empty(programs, width, dtype=torch.float32) for _ in range(2))
        with torch.cuda.device_of(x):
            _layer_norm_bwd[(programs,)](
                dy.contiguous(), x.contiguous(), None if residual is None else residual.contiguous(), weight, mean,
                rstd, dz, dweight, dbias, rows, width, RESIDUAL=residual is not None, **_layer_norm_options(width),
            )  # fmt: skip
        return dz, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype)
    z = _wide(x) if residual is None else _wide(x) + _wide(residual)
    xhat, dy = (z - mean[:, None]) * rstd[:, None], _wide(dy)
    wg = dy * _wide(weight)
    dz = rstd[:, None] * (wg - wg.mean(1, True) - xhat * (wg * xhat).mean(1, True))
    return dz.to(x.dtype), (dy * xhat).sum(0).to(weight.dtype), dy.sum(0).to(weight.dtype)


_add_layer_norm_backward.register_fake(
    lambda dy, x, residual, weight, *_: (x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(weight))
)


def _layer_norm_save(ctx, inputs, output):
    x, residual, weight, _, _, ctx.use_triton = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, residual, weight, mean, rstd)


def _layer_norm_grad(ctx, dy, _dmean, _drstd):
    dz, dweight, dbias = _add_layer_norm_backward(dy, *ctx.saved_tensors, ctx.use_triton)
    return dz, None if ctx.saved_tensors[1] is None else dz, dweight, dbias, None, None


_add_layer_norm.register_autograd(_layer_norm_grad, setup_context=_layer_norm_save)


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> Tensor:
    """LayerNorm(x + residual) over the last axis: (..., N), dtype of x, statistics and parameter gradients in fp32.

    residual is None or like x; weight and bias (N,) may stay fp32 when x is bf16 (no cast to low precision is needed).
    ValueError where shapes or dtypes do not fit."""
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"add_layer_norm: x {tuple(x.shape)} {x.dtype}, residual {tuple(residual.shape)} {residual.dtype}"
        )
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(f"add_layer_norm: weight and bias must be ({x.shape[-1]},), got {tuple(weight.shape)}")
    flat = None if residual is None else residual.flatten(0, -2)
    y, _, _ = _add_layer_norm(x.flatten(0, -2), flat, weight, bias, eps, _use_triton(x, backend))
    return y.unflatten(0, x.shape[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# Masked cross entropy
# ---------------------------------------------------------------------------------------------------------------------
# The logits (M, V) are the largest tensor of the step. One program per row reads it twice (the second time from L2: a
# row of 30,528 bf16 is 61 KB) and leaves the gradient of the summed loss where the logits were: no fp32 copy, no
# softmax kept, no second (M, V) buffer; 4 bytes per logit move where the unfused fp32 loss moves over 20. (Scaling the
# gradient afterwards would move 4 more into a second buffer: model.py scales what is multiplied with it instead.)


@triton.jit
def _cross_entropy_rows(
    logits, labels, losses, correct, stride, n_columns, z_loss, ignore_index, WRITE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    label = tl.load(labels + row)
    kept = label != ignore_index
    target = tl.load(at + tl.where(kept, label, 0)).to(tl.float32)
    c = tl.arange(0, BLOCK)
    top = -float("inf")
    total = tl.zeros([BLOCK], tl.float32)
    for c0 in tl.range(0, n_columns, BLOCK):
        x = tl.load(at + c0 + c, mask=c < n_columns - c0, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp2((top - higher) * 1.4426950408889634) + tl.exp2((x - higher) * 1.4426950408889634)
        top = higher
    lse = top + tl.log(tl.sum(total, 0))
    tl.store(losses + row, tl.where(kept, lse - target + z_loss * lse * lse, 0.0))
    slope = tl.where(kept, 1 + 2 * z_loss * lse, 0.0)
    beaten = tl.zeros([BLOCK], tl.int32)  # by an equal logit of a lower id, as argmax would have it
    for c0 in tl.range(0, n_columns, BLOCK):
        x = tl.load(at + c0 + c, mask=c < n_columns - c0, other=-float("inf")).to(tl.float32)
        beaten += ((x == top) & (c0 + c < label)).to(tl.int32)
        if WRITE:
            g = tl.exp2((x - lse) * 1.4426950408889634) * slope - tl.where((c0 + c == label) & kept, 1.0, 0.0)
            tl.store(at + c0 + c, g.to(logits.dtype.element_ty), mask=c < n_columns - c0)
    right = kept & (target == top) & (tl.sum(beaten, 0) == 0)
    tl.store(correct + row, tl.where(right, 1.0, 0.0))


def _cross_entropy_reference(logits, labels, z_loss, ignore_index, write):
    losses, correct = [], []
    # blocks of rows in one fp32 buffer of 8 MB: it stays in the cache, and fresh pages would cost
    # a CPU more than the arithmetic
    rows = max(64, 2**21 // logits.shape[1])
    block = _wide(logits.new_empty(0)).new_empty(rows, logits.shape[1])
    for x, y in zip(logits.split(rows), labels.split(rows)):
        kept = (y != ignore_index)[:, None]
        target = torch.where(kept, y[:, None], 0)
        own = x.gather(1, target)
        right = (own == x.amax(1, keepdim=True)) & kept
        likely = right[:, 0].nonzero()[:, 0]  # argmax, slow on a CPU, only settles ties
        right[likely] = x[likely].argmax(1, keepdim=True) == target[likely]
        correct.append(right)
        p = block[: len(x)].copy_(x)
        torch.log_softmax(p, 1, out=p)
        own_log = p.gather(1, target)
        lse = own - own_log
        losses.append((z_loss * lse * lse - own_log) * kept)
        if write:
            p.exp_()
            if z_loss:
                p.mul_(1 + 2 * z_loss * lse)
            p.scatter_add_(1, target, -torch.ones_like(own_log))
            x.copy_(p if bool(kept.all()) else p.mul_(kept))
    return torch.cat(losses)[:, 0], torch.cat(correct)[:, 0].to(losses[0].dtype)


@torch.library.custom_op("nanomosaic::cross_entropy_", mutates_args=("logits",))
def _cross_entropy_(
    logits: Tensor, labels: Tensor, z_loss: float, ignore_index: int, write: bool, use_triton: bool
) -> tuple[Tensor, Tensor]:
    _check_dtype("masked_cross_entropy: logits", logits, use_triton)
    if CHECK_VALUES or not labels.is_cuda:
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= logits.shape[1]))
        if bool(bad.any()):
            raise ValueError(
                f"masked_cross_entropy: label {int(labels[bad][0])} is outside the {logits.shape[1]} columns of logits"
            )
    if not use_triton and len(labels):
        return _cross_entropy_reference(logits, labels, z_loss, ignore_index, write)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses, correct = (logits.new_empty(len(labels), dtype=dtype) for _ in range(2))
    if len(labels):
        with torch.cuda.device_of(logits):
            _cross_entropy_rows[(len(labels),)](
                logits, labels, losses, correct, logits.stride(0), logits.shape[1], z_loss, ignore_index,
                WRITE=write, **_cross_entropy_options(logits.shape[1]),
            )  # fmt: skip
    return losses, correct


@_cross_entropy_.register_fake
def _(logits, labels, z_loss, ignore_index, write, use_triton):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(logits.new_empty(labels.shape[0], dtype=dtype) for _ in range(2))


def _cross_entropy_options(n_columns: int) -> dict:
    return {"BLOCK": min(4096, max(16, triton.next_power_of_2(n_columns))), "num_warps": 8, **FUSION}


@torch.library.custom_op("nanomosaic::sum_losses", mutates_args=())
def _sum_losses(gradient: Tensor, losses: Tensor) -> Tensor:
    return losses.sum()


_sum_losses.register_fake(lambda gradient, losses: losses.new_empty(()))
# By now `gradient`, the caller's logits, already holds d(sum of losses)/d(logits); this hands it to autograd.
_sum_losses.register_autograd(
    lambda ctx, g: (ctx.saved_tensors[0] * g, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


def masked_cross_entropy(
    logits: Tensor, labels: Tensor, *, z_loss: float = 0.0, ignore_index: int = -100, keep_gradient: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum over rows of cross entropy + z_loss lse^2 (lse: log of the softmax sum), and how many rows were right.

    logits (M, V) fp32, bf16 or fp16, last axis contiguous; **consumed**: where it requires a gradient, or with
    keep_gradient (for an autograd.Function of the caller's), it holds its own gradient afterwards.
    labels (M,) int64, rows with `ignore_index` count for nothing. Returns (loss_sum, n_correct), both fp32 and
    0-dim: divide by the number of rows yourself (it is known on the host, so no synchronisation is needed).
    ValueError where shapes or dtypes do not fit."""
    if logits.dim() != 2 or logits.stride(1) != 1 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"masked_cross_entropy: needs logits (M, V) with a contiguous last axis and labels (M,) int64, got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)} {labels.dtype}"
        )
    write = keep_gradient or (torch.is_grad_enabled() and logits.requires_grad)
    # detached: the overwriting itself is no step of the computation that autograd should see
    args = z_loss, ignore_index, write, _use_triton(logits, backend)
    losses, correct = _cross_entropy_(logits.detach(), labels, *args)
    return _sum_losses(logits, losses), correct.sum()
