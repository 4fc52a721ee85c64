"""The kernels against float64, and the properties that catch what an error bound misses.

The same tests run twice. In this process they hold the PyTorch references to their claims. Then
`test_the_triton_kernels_in_the_interpreter` runs this file again in a process with TRITON_INTERPRET=1, where they hold
the Triton kernels to them, in numpy, without a GPU. On a GPU: test_kernels_gpu.py.
"""

import functools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import EDGES, assert_close_to_exact, draw, offsets, oracles, with_grad

import kernels
from kernels import (
    add_layer_norm,
    alibi_slopes,
    attention_tiles,
    gather_rows,
    geglu,
    masked_cross_entropy,
    pad,
    scatter_rows,
    unpad,
    varlen_attention,
)

ROOT = Path(__file__).parents[1]
TRITON = kernels.INTERPRET
BACKEND = "triton" if TRITON else "cpu"
triton_only = pytest.mark.skipif(
    not TRITON, reason="a claim about the Triton kernels: runs in the interpreter's process"
)


if TRITON:  # the interpreter cuts bf16 off where hardware rounds to nearest: twice the error, and not the kernels'
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    truncate = InterpreterBuilder.create_fp_trunc

    def round_to_nearest_even(builder, x, dtype):
        if dtype.scalar.is_bf16() and x.dtype.scalar.is_fp32():
            bits = x.data.view(np.uint32)
            x = TensorHandle((bits + (0x7FFF + (bits >> 16 & 1))).view(np.float32), x.dtype)
        return truncate(builder, x, dtype)

    InterpreterBuilder.create_fp_trunc = round_to_nearest_even


def attend(qkv, dout, lengths, slopes, **kwargs):
    """[out, dqkv] of the backend under test."""
    kwargs = {"max_seqlen": max(lengths, default=0), "backend": BACKEND} | kwargs
    return with_grad(lambda x: varlen_attention(x, offsets(lengths), slopes=slopes, **kwargs), qkv, dout=dout)


# ----------------------------------------------------------------------------- attention

CASES = [
    # lengths, heads, head dimension, slopes times, dtypes
    (EDGES, 1, 64, 1.0, ["float32", "bfloat16"]),
    ([129, 1, 257], 1, 64, 1.0, ["float16"]),
    ([0, 1, 15, 16, 17, 63, 64], 12, 32, 1.0, ["float32", "bfloat16", "float16"]),
    ([65, 1, 127, 128, 17], 2, 64, 1.0, ["float32", "bfloat16", "float16"]),
    ([17, 1, 33], 16, 16, 8.0, ["float32"]),  # steep: the nearest key alone
    ([5, 150], 16, 16, 8.0, ["float32"]),
    ([17, 100], 12, 32, 1e-3, ["float32"]),  # flat
    ([300], 12, 32, 1e-3, ["bfloat16"]),
    ([40, 130], 1, 128, None, ["float32"]),  # no ALiBi
    ([40, 130], 1, 48, 1.0, ["float32"]),
    ([0, 0], 2, 16, 1.0, ["float32"]),
]


@pytest.mark.parametrize(("case", "dtype"), [(c, d) for c in CASES for d in c[-1]], ids=str)
def test_error_is_at_most_twice_torchs(case, dtype):
    lengths, H, D, steepness, _ = case
    dtype = getattr(torch, dtype)
    slopes = None if steepness is None else alibi_slopes(H) * steepness
    qkv, dout = draw(lengths, H, D, dtype)
    exact, torchs = oracles(qkv, dout, lengths, slopes)
    if sum(lengths):
        assert_close_to_exact(attend(qkv, dout, lengths, slopes), torchs, exact)
    else:
        assert attend(qkv, dout, lengths, slopes)[1].shape == qkv.shape


def test_random_shapes():
    rng = random.Random(0)
    for seed in range(6 if TRITON else 40):
        lengths = [rng.choice([0, 1, rng.randint(2, 64), rng.randint(2, 200)]) for _ in range(rng.randint(1, 6))]
        H, D = rng.choice([1, 2, 3]), rng.choice([16, 32, 80])
        qkv, dout = draw(lengths, H, D, seed=seed)
        slopes = rng.choice([None, alibi_slopes(H), alibi_slopes(H, 8.0), alibi_slopes(H, 0.3)])
        rope_base = 0.0 if TRITON else rng.choice([0.0, 10.0, 1000.0])
        exact, torchs = oracles(qkv, dout, lengths, slopes, rope_base)
        tiles = attention_tiles(offsets(lengths)) if seed % 2 else None
        bound = max(lengths) + rng.choice([0, 100])
        if sum(lengths):
            how = dict(tiles=tiles, max_seqlen=bound, rope_base=rope_base)
            name = f"lengths {lengths}, H {H}, D {D}, RoPE {rope_base}, slopes {slopes}"
            assert_close_to_exact(attend(qkv, dout, lengths, slopes, **how), torchs, exact, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("times", "lengths"), [(60, [30, 150]), (60, [30, 100]), (10, [30, 150]), (10, [30, 100])])
def test_large_scores_do_not_overflow(times, lengths, dtype):
    """Scores of some 10^4 (fp16, which ends at 65504: 10^2). In bf16 and fp16 the bound is twice PyTorch's error, as
    everywhere. In fp32 it cannot be: the backward rebuilds p = exp2(s - lse) from a score and an lse rounded anew, so p
    is off by some roundings of the largest score, 2^-22 |s| of itself, where PyTorch keeps the p it has normalised
    (errors of a peaked softmax then cancel). That is `atom`; below |s| = 10 it is nothing."""
    H, dtype = 4, getattr(torch, dtype)
    qkv, dout = draw(lengths, H, 16, dtype)
    qkv[:, :2] *= times if dtype != torch.float16 else min(times, 10)
    q, k = qkv[:, :2].double().transpose(0, 1)
    largest = max(
        (a.transpose(0, 1) @ b.permute(1, 2, 0)).abs().max() / 4 for a, b in zip(q.split(lengths), k.split(lengths))
    )
    exact, torchs = oracles(qkv, dout, lengths, alibi_slopes(H))
    atom = 2**-22 * largest.item() if dtype == torch.float32 else 2e-6
    assert_close_to_exact(attend(qkv, dout, lengths, alibi_slopes(H)), torchs, exact, atom=atom)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lengths", [[3, 50], [3, 150]], ids=str)
def test_very_negative_scores_do_not_overflow(lengths, dtype):
    """With lse below -128, exp2(0 - lse) of a masked key is infinite, and infinity times its zero is NaN."""
    qkv, dout = draw(lengths, 1, 16, getattr(torch, dtype))
    qkv[:, 0] += 8
    qkv[:, 1] -= 8
    exact, torchs = oracles(qkv, dout, lengths, alibi_slopes(1))
    atom = 2**-22 * 330 if dtype == "float32" else 2e-6  # scores down to -330: see above
    assert_close_to_exact(attend(qkv, dout, lengths, alibi_slopes(1)), torchs, exact, atom=atom)


@triton_only
@pytest.mark.parametrize("config", sorted({str(sorted(c.items())) for c in kernels.ATTENTION_CONFIGS.values()}))
def test_every_launch_setting_computes_the_same(config, monkeypatch):
    """The interpreter runs Hopper's settings; those of the other chips hold other tiles, and split the table's."""
    lengths = [3, 0, 135, 7]
    qkv, dout = draw(lengths, 1, 16)
    expected = attend(qkv, dout, lengths, alibi_slopes(1))
    monkeypatch.setattr(kernels, "_attention_config", lambda *_: dict(eval(config)))
    for tiles in (None, attention_tiles(offsets(lengths))):
        for a, b in zip(attend(qkv, dout, lengths, alibi_slopes(1), tiles=tiles), expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("lengths", [[5, 64, 1, 33], [5, 128, 1, 33], [5, 200, 1, 130]], ids=str)
def test_packed_equals_alone(lengths):
    slopes, bound = alibi_slopes(2), max(lengths)
    qkv, dout = draw(lengths, 2, 32)
    packed = attend(qkv, dout, lengths, slopes)
    alone = [attend(x, g, [len(x)], slopes, max_seqlen=bound) for x, g in zip(qkv.split(lengths), dout.split(lengths))]
    for a, b in zip(packed, map(torch.cat, zip(*alone))):
        # the reference pads documents of like length together, which may move the last bit
        assert torch.equal(a, b) if TRITON else torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [[5, 64, 1, 33, 0], [5, 150, 1, 130, 0]], ids=str)
def test_permuting_documents_permutes_results(lengths):
    slopes, order = alibi_slopes(2), [3, 1, 4, 0, 2]
    qkv, dout = draw(lengths, 2, 32)
    shuffle = lambda x: torch.cat([x.split(lengths)[i] for i in order])
    for a, b in zip(
        attend(shuffle(qkv), shuffle(dout), [lengths[i] for i in order], slopes), attend(qkv, dout, lengths, slopes)
    ):
        assert torch.equal(a, shuffle(b))


@pytest.mark.parametrize("lengths", [[20, 1, 50, 3], [20, 1, 140, 3], [20, 128, 1, 257]], ids=str)
def test_nan_in_neighbours_or_slack_never_leaks(lengths):
    slopes, slack = alibi_slopes(1), 7
    qkv, dout = draw(lengths, 1, 32, slack=slack)
    T = sum(lengths)
    clean = attend(qkv, dout, lengths, slopes)
    for poison in (float("nan"), float("inf")):
        for victim in range(0, len(lengths), 2):
            bad_qkv, bad_dout = qkv.clone(), dout.clone()
            for x in (bad_qkv, bad_dout):
                x[T:] = poison
                for i, document in enumerate(x[:T].split(lengths)):
                    if i != victim:
                        document.fill_(poison)
            for a, b in zip(attend(bad_qkv, bad_dout, lengths, slopes), clean):
                assert torch.equal(a[:T].split(lengths)[victim], b[:T].split(lengths)[victim])
                assert (a[T:] == 0).all()


@pytest.mark.parametrize("slopes", [None, torch.zeros(2, 2)], ids=["none", "zero"])
@pytest.mark.parametrize("n", [50, 150])
def test_without_slope_it_is_scaled_dot_product_attention(n, slopes):
    qkv, dout = draw([n], 2, 64)
    sdpa = lambda x: F.scaled_dot_product_attention(*x.permute(1, 2, 0, 3)).transpose(0, 1)
    for a, b in zip(attend(qkv, dout, [n], slopes), with_grad(sdpa, qkv, dout=dout)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("n", [64, 100, 256, 300])
def test_reversing_a_document_reverses_the_result(n):
    """Symmetry of |i - j|: a causal mask, or a sign error on one side of the diagonal, breaks it."""
    qkv, dout = draw([n], 1, 32)
    for a, b in zip(attend(qkv.flip(0), dout.flip(0), [n], alibi_slopes(1)), attend(qkv, dout, [n], alibi_slopes(1))):
        torch.testing.assert_close(a.flip(0), b, rtol=1e-5, atol=2e-6)


def test_backward_repeats_bitwise():
    lengths = [70, 150]
    qkv, dout = draw(lengths, 2, 32)
    first, again = (attend(qkv, dout, lengths, alibi_slopes(2)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@triton_only
def test_the_two_paths_agree():
    """A bound above 128 sends short documents through the loop kernels."""
    lengths = [1, 64, 100, 128]
    qkv, dout = draw(lengths, 2, 32)
    for a, b in zip(
        attend(qkv, dout, lengths, alibi_slopes(2)), attend(qkv, dout, lengths, alibi_slopes(2), max_seqlen=129)
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("lengths", [[3, 0, 64, 17], [3, 0, 300, 128, 129]], ids=str)
def test_the_tile_table_gives_the_same_bits(lengths):
    cu, B = offsets(lengths), len(lengths)
    tiles = attention_tiles(cu)
    rows = [(int(d), r) for d, t in tiles for r in range(t * kernels.TILE, min(lengths[d], (t + 1) * kernels.TILE))]
    assert sorted(rows) == [(d, r) for d in range(B) for r in range(lengths[d])], "each row in exactly one tile"
    of = [lengths[d] for d in tiles[:, 0]]
    assert of == sorted(of, reverse=True), "longest documents first"
    qkv, dout = draw(lengths, 2, 32)
    without = attend(qkv, dout, lengths, alibi_slopes(2))
    for table in (tiles, attention_tiles(cu, pad_to=len(tiles) + 3)):
        assert all(torch.equal(a, b) for a, b in zip(without, attend(qkv, dout, lengths, alibi_slopes(2), tiles=table)))
    with pytest.raises(ValueError, match="pad_to"):
        attention_tiles(cu, pad_to=1)


@triton_only
def test_offsets_beyond_2_to_the_31():
    """The document sits past element 2^31 of qkv; 32-bit row offsets would read other memory."""
    n, H, D, stride = 130, 1, 16, 2**24
    T = 2**31 // stride + n
    qkv = torch.empty(T * stride, dtype=torch.float16).as_strided((T, 3, H, D), (stride, H * D, D, 1))  # never touched
    small, dout = draw([n], H, D, torch.float16)
    qkv[-n:] = small
    cu, slopes = torch.tensor([T - n, T], dtype=torch.int32), alibi_slopes(H)
    out, lse = kernels._attention_triton(qkv, cu, slopes, None, n)
    dout = torch.cat([torch.zeros(T - n, H, D, dtype=dout.dtype), dout])
    dqkv = kernels._attention_backward_triton(dout, qkv, out, lse, cu, slopes, None, n)
    for a, b in zip((out[-n:], dqkv[-n:]), attend(small, dout[-n:], [n], slopes)):
        assert torch.equal(a, b)


@triton_only
def test_rows_beyond_2_to_the_31():
    """Of tensors that are reserved but, but for their last row, never touched."""
    width = 2**15
    x = torch.empty(2**16 + 2, width, dtype=torch.float16)
    x[-1] = torch.arange(width)
    assert torch.equal(gather_rows(x, torch.tensor([len(x) - 1]), backend="triton")[0], x[-1])
    stride = 2**30
    logits = torch.empty(3 * stride, dtype=torch.float16).as_strided((3, 9), (stride, 1))
    logits[:] = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 0, 8])
    loss, _ = masked_cross_entropy(logits, labels, backend="triton")
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels, reduction="sum"))


def test_slopes_are_mosaicberts():
    assert torch.equal(alibi_slopes(8)[:, 0], 2.0 ** -torch.arange(1.0, 9))
    twelve = [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]
    assert torch.equal(alibi_slopes(12)[:, 0], 2.0 ** -torch.tensor(twelve))
    assert torch.equal(alibi_slopes(16)[:, 1], 2.0 ** -(torch.arange(1.0, 17) / 2))
    assert alibi_slopes(4, 8.0).mul(256).tolist() == [[64, 512], [128, 16], [4, 32], [8, 1]]


@pytest.mark.skipif(TRITON, reason="dropout is the reference's alone")
def test_dropout_draws_the_same_mask_in_the_backward():
    lengths, H, p = [3, 0, 7, 6], 2, 0.3
    qkv = draw(lengths, H, 8, torch.float64, slack=2)[0].requires_grad_()
    f = lambda x: varlen_attention(x, offsets(lengths), 7, alibi_slopes(H), dropout_p=p, seed=torch.tensor(5))
    assert torch.autograd.gradcheck(f, (qkv,))
    a, b = (varlen_attention(qkv, offsets(lengths), 7, dropout_p=p) for _ in range(2))
    assert not torch.equal(a, b), "without a seed every call draws anew"
    ones = torch.ones(1, 3, 1, 16).repeat(400, 1, 1, 1)
    out = varlen_attention(ones, offsets([400]), 400, dropout_p=p, seed=torch.tensor(1))
    assert abs(out.mean().item() - 1) < 0.01, "dropout keeps the mean"


@pytest.mark.skipif(TRITON, reason="about the reference")
def test_one_long_document_among_many_short_ones_stays_within_memory(monkeypatch):
    """Scores are held for one length class, and one block of queries, at a time."""
    monkeypatch.setitem(kernels.SCORE_BUDGET, "cpu", 20_000)
    lengths = [3] * 500 + [900] + [2] * 500
    largest = 0
    scores = kernels._group_scores

    def spy(*args):
        nonlocal largest
        s = scores(*args)
        largest = max(largest, s.numel())
        return s

    monkeypatch.setattr(kernels, "_group_scores", spy)
    qkv, dout = draw(lengths, 2, 16)
    ours = attend(qkv, dout, lengths, alibi_slopes(2))
    assert largest <= 20_000
    exact, torchs = oracles(qkv, dout, lengths, alibi_slopes(2))
    assert_close_to_exact(ours, torchs, exact)


# ----------------------------------------------------------------------------- rows


@pytest.mark.parametrize("shape", [(50,), (50, 3), (50, 768), (50, 2, 700)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gather_and_scatter_move_rows_and_their_gradients(shape, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(dtype)
    index = torch.randperm(50, generator=g)[:21]
    index[[2, 7]] = -1  # fillers
    kept = index >= 0
    dout = torch.randn(21, *shape[1:], generator=g).to(dtype)
    out, grad = with_grad(lambda x: gather_rows(x, index, backend=BACKEND), x, dout=dout)
    assert torch.equal(out[kept], x[index[kept]]) and (out[~kept] == 0).all()
    expected = torch.zeros_like(x).index_copy(0, index[kept], dout[kept])
    assert torch.equal(grad, expected)
    out, grad = with_grad(lambda x: scatter_rows(x, index, 50, backend=BACKEND), dout, dout=x)
    assert torch.equal(out, expected)
    assert torch.equal(grad[kept], x[index[kept]]) and (grad[~kept] == 0).all()


@pytest.mark.parametrize("rope_base", [0.0, 100.0])
@pytest.mark.parametrize("slopes", [None, alibi_slopes(2, 8.0)], ids=["no ALiBi", "ALiBi"])
@pytest.mark.parametrize("lengths", [[5], [3, 9, 1, 7], [4, 0, 6]])
def test_the_padded_attention_is_the_cpus(lengths, slopes, rope_base):
    """Its device-independent arithmetic: with rows behind the last document and a longer bound."""
    T, S = sum(lengths) + 3, max(lengths) + 2
    qkv, dout = draw([T], 2, 16, torch.float64)
    dout[sum(lengths) :] = 0
    args = offsets(lengths), S, slopes
    attention = lambda x, backend: varlen_attention(x, *args, rope_base=rope_base, backend=backend)
    padded, cpu = (
        with_grad(functools.partial(attention, backend=b), qkv, dout=dout) for b in ("padded", "cpu")
    )
    torch.testing.assert_close(padded, cpu)
    assert not padded[0][sum(lengths) :].any() and not padded[1][sum(lengths) :].any()


def test_the_padded_attention_of_bert_on_a_gpu_drops_weights_and_keeps_their_mean():
    T, lengths = 96, [40, 56]
    cu = torch.tensor([0, 40, 96], dtype=torch.int32)
    qkv = torch.zeros(T, 3, 2, 16)
    qkv[:, 2] = 1.0
    torch.manual_seed(0)
    out = torch.stack([kernels._attention_padded(qkv, cu, 56, None, 0.0, 0.1) for _ in range(50)])
    assert out.mean().item() == pytest.approx(1.0, abs=5e-3)
    for n, part in zip(lengths, out.split(lengths, dim=1)):  # a mean of n weights, each kept with p 0.9 and / 0.9
        assert part.std().item() == pytest.approx((0.1 / 0.9 / n) ** 0.5, rel=0.1)


def test_unpad_then_pad_is_the_identity_on_real_tokens():
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]])
    x = torch.randn(3, 5, 4, requires_grad=True)
    flat, index, cu, longest = unpad(x, mask)
    assert index.tolist() == [0, 1, 10, 12, 13, 14]
    assert cu.tolist() == [0, 2, 2, 6] and cu.dtype == torch.int32 and longest == 4
    padded = pad(flat, index, 3, 5)
    assert torch.equal(padded, x * mask[:, :, None])
    (grad,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(grad, mask[:, :, None].expand_as(x).float())
    ids = torch.arange(15).view(3, 5)
    assert unpad(ids, mask.bool())[0].tolist() == index.tolist()


# ----------------------------------------------------------------------------- pointwise


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def three_ways(ours, torchs, inputs, dtype, dout):
    """[out, gradients] of our function and PyTorch's in `dtype`, and of PyTorch's in float64."""
    low = [x.to(dtype) for x in inputs]
    exact = with_grad(torchs, *[x.double() for x in low], dout=dout.to(dtype))
    return with_grad(ours, *low, dout=dout), with_grad(torchs, *low, dout=dout), exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 2 * 96), (2, 3, 2 * 1500), (1, 2), (0, 64)], ids=str)
def test_geglu(shape, dtype):
    g = torch.Generator().manual_seed(0)
    h = 3 * torch.randn(shape, generator=g)
    dout = torch.randn(*shape[:-1], shape[-1] // 2, generator=g)
    plain = lambda h: F.gelu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]
    results = three_ways(lambda h: geglu(h, backend=BACKEND), plain, [h], dtype, dout)
    if h.numel():
        assert_close_to_exact(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(11, 768), (2, 3, 100), (1, 16)], ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_layer_norm(shape, with_residual, dtype):
    g = torch.Generator().manual_seed(0)
    x, residual, dout = (torch.randn(shape, generator=g) for _ in range(3))
    x = 3 * x + 5
    weight, bias = (torch.randn(shape[-1], generator=g) for _ in range(2))
    inputs = [x, residual, weight, bias] if with_residual else [x, weight, bias]
    split = lambda args: args if with_residual else (args[0], None, *args[1:])
    ours = lambda *args: add_layer_norm(*split(args), 1e-5, backend=BACKEND)
    plain = lambda *args: F.layer_norm(sum(args[:-2]), args[-1].shape, args[-2], args[-1], 1e-5)
    assert_close_to_exact(*three_ways(ours, plain, inputs, dtype, dout))


def test_layer_norm_repeats_bitwise_and_keeps_fp32_parameter_gradients():
    g = torch.Generator().manual_seed(0)
    x, dout = torch.randn(50, 64, generator=g).bfloat16(), torch.randn(50, 64, generator=g).bfloat16()
    weight, bias = torch.ones(64), torch.zeros(64)
    f = lambda x, w, b: add_layer_norm(x, None, w, b, backend=BACKEND)
    first, again = (with_grad(f, x, weight, bias, dout=dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert first[2].dtype == torch.float32
    torch.testing.assert_close(first[3], dout.double().sum(0).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [7, 1000, 4097])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_masked_cross_entropy(V, z_loss, dtype):
    g = torch.Generator().manual_seed(0)
    logits, labels = 4 * torch.randn(9, V, generator=g), torch.randint(V, (9,), generator=g)
    labels[4] = -100

    def plain(x):
        lse = x.logsumexp(-1)[labels >= 0]
        return F.cross_entropy(x, labels, reduction="sum") + z_loss * (lse * lse).sum()

    def ours(x):
        return masked_cross_entropy(x * 1, labels, z_loss=z_loss, backend=BACKEND)[0]

    low, g = logits.to(dtype), torch.tensor(1 / 8)
    # PyTorch under autocast: fp32 arithmetic on low-precision logits, gradient stored in low precision
    torchs = with_grad(lambda x: plain(x.float()), low, dout=g)
    assert_close_to_exact(with_grad(ours, low, dout=g), torchs, with_grad(plain, low.double(), dout=g))


def test_cross_entropy_overwrites_its_logits_and_counts_like_argmax():
    logits = torch.zeros(5, 6)
    logits[1, 4] = logits[2, 2] = logits[2, 5] = 3.0
    labels = torch.tensor([0, 4, 5, -100, 1])  # right: row 0, row 1; in row 2 an equal logit comes first
    consumed = logits.clone()
    loss, n_correct = masked_cross_entropy(consumed, labels, backend=BACKEND)
    assert n_correct.item() == 2 and torch.equal(consumed, logits), "without a gradient to write, nothing is written"
    leaf = logits.clone().requires_grad_()
    consumed = leaf * 1
    loss, _ = masked_cross_entropy(consumed, labels, backend=BACKEND)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(consumed.detach(), grad) and (grad[3] == 0).all()
    assert masked_cross_entropy(torch.zeros(0, 6), labels[:0], backend=BACKEND)[0].item() == 0
    with pytest.raises(ValueError, match="label 6 is outside"):
        masked_cross_entropy(logits, labels + 2, backend=BACKEND)


# ----------------------------------------------------------------------------- the ops in PyTorch


def test_opcheck_of_every_op():
    checked = set()

    def check(op, args):
        torch.library.opcheck(op, args)
        checked.add(str(op))

    lengths = [3, 0, 20]
    qkv, dout = draw(lengths, 2, 16, slack=1)
    cu, slopes, seed = offsets(lengths), alibi_slopes(2), torch.tensor(1)
    ops, rows = torch.ops.nanomosaic, torch.tensor([3, 1, -1])
    tiles = attention_tiles(cu)
    for args in (
        (slopes, tiles, None, 0.0, 20, 0.0), (None, None, None, 0.0, 200, 0.0),
        (slopes, None, seed, 1e3, 20, 0.1),
    ):
        if TRITON and args[-1]:
            continue
        check(ops.attention, (qkv.requires_grad_(), cu, *args, TRITON))
        saved = ops.attention(qkv, cu, *args, TRITON)
        saved = [x.detach() for x in (qkv, *saved)]
        check(ops.attention_backward, (dout, *saved, cu, *args, TRITON))
    check(ops.gather_rows, (torch.randn(5, 7, requires_grad=True), rows, TRITON))
    check(ops.scatter_rows, (torch.randn(3, 7, requires_grad=True), rows, 6, TRITON))
    h, x, w = (torch.randn(*shape, requires_grad=True) for shape in ((3, 8), (3, 7), (7,)))
    check(ops.geglu, (h, TRITON))
    check(ops.geglu_backward, (torch.randn(3, 4), h.detach(), TRITON))
    for residual in (None, torch.randn(3, 7)):
        check(ops.add_layer_norm, (x, residual, w, w, 1e-5, TRITON))
        saved = (x.detach(), residual, w.detach(), torch.zeros(3), torch.ones(3))
        check(ops.add_layer_norm_backward, (torch.randn(3, 7), *saved, TRITON))
    check(ops.cross_entropy_, (torch.randn(3, 9), rows, 0.1, -1, True, TRITON))
    check(ops.sum_losses, (torch.randn(3, 9, requires_grad=True), torch.randn(3)))
    assert checked == {
        f"nanomosaic.{name}" for name in re.findall(r'"nanomosaic::(\w+)"', Path(kernels.__file__).read_text())
    }


def test_compiles_whole_and_once():
    """One graph, and no recompilation when the documents of a batch change."""
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    @torch.compile(fullgraph=True, backend=count)
    def f(qkv, cu, slopes, weight, bias):
        out = varlen_attention(qkv * 2, cu, 64, slopes, backend=BACKEND).flatten(1)
        x = gather_rows(out, cu[:-1], backend=BACKEND)
        x = add_layer_norm(x, x * 2, weight, bias, backend=BACKEND)
        logits = geglu(x, backend=BACKEND) @ weight.view(16, 2)
        return masked_cross_entropy(
            logits, cu[:-1] % 2 + torch.zeros_like(cu[:-1], dtype=torch.int64), backend=BACKEND
        )[0]

    weight, bias = torch.randn(32), torch.randn(32)
    for lengths in ([3, 20, 7], [10, 10, 10], [28, 1, 1]):
        qkv, cu, slopes = draw(lengths, 2, 16)[0].requires_grad_(), offsets(lengths), alibi_slopes(2)
        f(qkv, cu, slopes, weight, bias).backward()
        g, qkv.grad = qkv.grad, None
        torch._dynamo.disable(f)(qkv, cu, slopes, weight, bias).backward()
        torch.testing.assert_close(g, qkv.grad)
    assert graphs == 1


BAD = {
    "qkv must be": lambda a: a | {"qkv": a["qkv"].flatten(1)},
    "int64; supported": lambda a: a | {"qkv": a["qkv"].long()},
    "rows of qkv must be contiguous": lambda a: a | {"qkv": a["qkv"].transpose(2, 3)},
    "must be .B.1,. int32": lambda a: a | {"cu_seqlens": a["cu_seqlens"].long()},
    "start at 0": lambda a: a | {"cu_seqlens": a["cu_seqlens"] + 1},
    "decreases at position 2": lambda a: a | {"cu_seqlens": torch.tensor([0, 9, 3, 10], dtype=torch.int32)},
    "beyond the 10 rows": lambda a: a | {"cu_seqlens": torch.tensor([0, 11], dtype=torch.int32)},
    "longer than max_seqlen=5": lambda a: a | {"max_seqlen": 5},
    r"slopes must be \(2, 2\) float32": lambda a: a | {"slopes": torch.ones(2)},
    "tiles must be": lambda a: a | {"tiles": torch.zeros(3, 2)},
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_input_is_refused_in_one_line(problem):
    good = {"qkv": torch.zeros(10, 3, 2, 16), "cu_seqlens": offsets([4, 6]), "max_seqlen": 6, "backend": BACKEND}
    varlen_attention(**good)
    with pytest.raises(ValueError, match=problem) as error:
        varlen_attention(**BAD[problem](good))
    assert "\n" not in str(error.value)


def test_other_bad_input_is_refused_in_one_line(monkeypatch):
    x, cu, ints = torch.zeros(10, 3, 2, 16), offsets([10]), torch.ones(2, 3, dtype=torch.int64)
    for problem, f in {
        "cu_seqlens is on meta, qkv on cpu": lambda: kernels._check_attention(x, cu.to("meta"), None, None, 10, TRITON),
        "backend is": lambda: varlen_attention(x, cu, 10, backend="fast"),
        "out of range": lambda: gather_rows(x, torch.tensor([10])),
        "indices must be": lambda: scatter_rows(x, torch.zeros(10), 10),
        "do not match": lambda: unpad(x, torch.ones(9, 3)),
        "is odd": lambda: geglu(torch.ones(2, 3)),
        "residual": lambda: add_layer_norm(torch.ones(2, 3), torch.ones(2, 4), torch.ones(3), torch.ones(3)),
        "weight and bias": lambda: add_layer_norm(torch.ones(2, 3), None, torch.ones(4), torch.ones(3)),
        "contiguous last axis": lambda: masked_cross_entropy(torch.ones(3, 4).t(), torch.zeros(4, dtype=torch.int64)),
        "h is int64; supported": lambda: geglu(torch.ones(2, 4).long(), backend=BACKEND),
        "x is int64; supported": lambda: add_layer_norm(ints, None, torch.ones(3), torch.ones(3), backend=BACKEND),
        "logits is int64; supported": lambda: masked_cross_entropy(ints, ints[:, 0], backend=BACKEND),
    }.items():
        with pytest.raises(ValueError, match=problem) as error:
            f()
        assert "\n" not in str(error.value)
    monkeypatch.setattr(kernels, "CHECK_VALUES", True)  # on a GPU: NANOMOSAIC_CHECK=1
    with pytest.raises(ValueError, match="an index appears twice"):
        gather_rows(x, torch.tensor([3, 3]))
    if TRITON:
        for problem, f in {
            "no dropout": lambda: varlen_attention(x, cu, 10, dropout_p=0.1, backend="triton"),
            "head dimension 24 is not": lambda: varlen_attention(torch.zeros(10, 3, 2, 24), cu, 10, backend="triton"),
            "head dimension 144 is not": lambda: varlen_attention(torch.zeros(10, 3, 2, 144), cu, 10, backend="triton"),
            "h is float64": lambda: geglu(torch.ones(2, 4).double(), backend="triton"),
            "float64; supported": lambda: varlen_attention(x.double(), cu, 10, backend="triton"),
        }.items():
            with pytest.raises(ValueError, match=problem):
                f()
    elif kernels.HAS_TRITON:
        with pytest.raises(ValueError, match="needs a CUDA tensor"):
            varlen_attention(x, cu, 10, backend="triton")


# ----------------------------------------------------------------------------- in a process of their own


def run(*args, **env):
    result = subprocess.run([sys.executable, *args], env=os.environ | env, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.skipif(TRITON, reason="this is that process")
def test_the_triton_kernels_in_the_interpreter():
    triton = pytest.importorskip("triton", reason="triton is not installed here")
    version = lambda text: tuple(int(x) for x in text.split(".")[:2])
    if version(triton.__version__) < (3, 7) and version(np.__version__) >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 cannot run a loop with numpy 2.4 or newer")
    print(run("-m", "pytest", "-p", "no:cacheprovider", "--durations=5", __file__, TRITON_INTERPRET="1"))


@pytest.mark.skipif(TRITON, reason="once is enough")
@pytest.mark.parametrize(
    ("stub", "expected"),
    [
        ("sys.modules['triton'] = None", "('padded', 'triton is not installed"),
        ("import triton; triton.__version__ = '3.5.1'", "kernels.py needs triton >= 3.6, found 3.5.1"),
    ],
)
def test_works_without_triton_and_refuses_an_old_one(stub, expected):
    if "import" in stub:
        pytest.importorskip("triton", reason="triton is not installed here")
    out = run(
        "-c",
        f"import sys; {stub}\n"
        "import torch, kernels\n"
        "x = torch.randn(10, 3, 2, 16, requires_grad=True)\n"
        "cu = torch.tensor([0, 4, 10], dtype=torch.int32)\n"
        "kernels.varlen_attention(x, cu, 6, kernels.alibi_slopes(2)).sum().backward()\n"
        "kernels.pad(*kernels.unpad(torch.ones(2, 3), torch.ones(2, 3))[:2], 2, 3)\n"
        "try: print(kernels.attention_backend('cuda'))\n"
        "except ValueError as e: print(e)\n",
    )
    assert out.startswith(expected)


@pytest.mark.skipif(TRITON, reason="once is enough")
def test_an_old_torch_is_refused_in_one_line():
    code = "import torch; torch.__version__ = '2.10.1+cpu'; import kernels"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert result.stderr == "error: kernels.py needs torch >= 2.11, found 2.10.1+cpu: see requirements.txt\n"
