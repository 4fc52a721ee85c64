"""The kernels against their references, and the properties that catch what an error bound misses.

The same tests run twice. In this process they hold the CPU backend to their claims. Then
`test_the_triton_kernels_in_the_interpreter` runs this file again in a process with
TRITON_INTERPRET=1, where they hold the Triton kernels to them, in numpy, without a GPU. On a GPU:
test_kernels_gpu.py.
"""

import random
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import python
from oracle import EDGES, assert_close_to_exact, draw, offsets, oracles, with_grad
from torch._dynamo.testing import CompileCounter

import kernels
from kernels import alibi_slopes, geglu, masked_cross_entropy, varlen_attention

TRITON = kernels.INTERPRET
BACKEND = "triton" if TRITON else "cpu"
triton_only = pytest.mark.skipif(
    not TRITON, reason="of the Triton kernels: runs in the interpreter's process")
cpu_only = pytest.mark.skipif(TRITON, reason="a claim about the CPU backend")


if TRITON:  # the interpreter cuts bf16 off where hardware rounds to nearest: twice the error
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    truncate = InterpreterBuilder.create_fp_trunc

    def round_to_nearest_even(builder, x, dtype):
        if dtype.scalar.is_bf16() and x.dtype.scalar.is_fp32():
            bits = x.data.view(np.uint32)
            bits = bits + (0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
            x = TensorHandle(bits.view(np.float32), x.dtype)
        return truncate(builder, x, dtype)

    InterpreterBuilder.create_fp_trunc = round_to_nearest_even


def attend(qkv, dout, lengths, slopes, **kwargs):
    """[out, dqkv] of the backend under test."""
    kwargs = dict(max_seqlen=max(lengths, default=0), slopes=slopes, backend=BACKEND) | kwargs
    return with_grad(lambda x: varlen_attention(x, offsets(lengths), **kwargs), qkv, dout=dout)


# ----------------------------------------------------------------------------- attention
ALL = ["float32", "bfloat16", "float16"]
CASES = [
    # lengths, heads, head dimension, slopes times (None: no ALiBi), ratio, RoPE's base, dtypes
    (EDGES, 1, 64, 1.0, 8.0, 0.0, ["float32", "bfloat16"]),
    ([129, 1, 257], 1, 64, 1.0, 1.0, 0.0, ["float16"]),
    ([0, 1, 15, 16, 17, 63, 64], 12, 32, 1.0, 1.0, 0.0, ALL),
    ([65, 1, 127, 128, 17], 2, 64, 1.0, 8.0, 1e3, ALL),
    ([17, 1, 33], 16, 16, 8.0, 1.0, 0.0, ["float32"]),  # steep: the nearest key alone
    ([5, 150], 16, 16, 8.0, 8.0, 0.0, ["float32"]),
    ([17, 100], 12, 32, 1e-3, 1.0, 1e3, ["float32"]),  # flat
    ([300], 12, 32, 1e-3, 1.0, 0.0, ["bfloat16"]), ([40, 130], 1, 128, None, 1.0, 0.0, ["float32"]),
    ([40, 130, 257], 1, 48, None, 1.0, 1e2, ["float32", "bfloat16"]),
    ([0, 0], 2, 16, 1.0, 1.0, 0.0, ["float32"]),
]


@pytest.mark.parametrize(("case", "dtype"), [(c, d) for c in CASES for d in c[-1]], ids=str)
def test_error_is_at_most_twice_torchs(case, dtype):
    lengths, H, D, steepness, ratio, rope_base, _ = case
    slopes = None if steepness is None else alibi_slopes(H, ratio) * steepness
    qkv, dout = draw(lengths, H, D, getattr(torch, dtype))
    ours = attend(qkv, dout, lengths, slopes, rope_base=rope_base)
    if sum(lengths):
        exact, torchs = oracles(qkv, dout, lengths, slopes, rope_base)
        assert_close_to_exact(ours, torchs, exact)
    else:
        assert ours[1].shape == qkv.shape


def test_random_shapes():
    rng = random.Random(0)
    for seed in range(6 if TRITON else 40):
        n_documents = rng.randint(1, 6)
        draw_length = lambda: rng.choice([0, 1, rng.randint(2, 64), rng.randint(2, 200)])
        lengths = [draw_length() for _ in range(n_documents)] + [1]
        H, D = rng.choice([1, 2, 3]), rng.choice([16, 32, 80])
        slopes = rng.choice([None, alibi_slopes(H), alibi_slopes(H, 8.0), alibi_slopes(H, 0.3)])
        rope_base = rng.choice([0.0, 10.0, 1000.0])
        qkv, dout = draw(lengths, H, D, seed=seed)
        exact, torchs = oracles(qkv, dout, lengths, slopes, rope_base)
        how = dict(max_seqlen=max(lengths) + rng.choice([0, 100]), rope_base=rope_base)
        name = f"lengths {lengths}, H {H}, D {D}, RoPE {rope_base}, slopes {slopes}"
        assert_close_to_exact(attend(qkv, dout, lengths, slopes, **how), torchs, exact, name)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("lengths", [[30, 150], [30, 100]], ids=str)
@pytest.mark.parametrize("scores", ["10", "60", "negative"])
def test_large_scores_do_not_overflow(scores, lengths, dtype):
    """Scores of some 10^4 (fp16, which ends at 65504: 10^2). In fp32 the bound is twice PyTorch's
    error and `atom`: the backward rebuilds p = exp2(s - lse) from a score and an lse rounded anew,
    so p is off by some 2^-22 |s| of itself, where PyTorch keeps the p it has normalised. Negative:
    with lse below -128, exp2(0 - lse) of a masked key is infinite, and times its zero NaN."""
    H, dtype = 4, getattr(torch, dtype)
    qkv, dout = draw(lengths, H, 16, dtype)
    if scores == "negative":
        qkv[:, 0] += 8
        qkv[:, 1] -= 8
    else:
        qkv[:, :2] *= int(scores) if dtype != torch.float16 else 10
    documents = (x.double().transpose(0, 1) for x in qkv[:, :2].split(lengths))
    largest = max((q.transpose(0, 1) @ k.permute(1, 2, 0)).abs().max() / 4 for q, k in documents)
    exact, torchs = oracles(qkv, dout, lengths, alibi_slopes(H))
    atom = 2**-22 * largest.item() if dtype == torch.float32 else 2e-6
    assert_close_to_exact(attend(qkv, dout, lengths, alibi_slopes(H)), torchs, exact, atom=atom)


@triton_only
@pytest.mark.parametrize("config", sorted(set(kernels.ATTENTION_CONFIGS.values())), ids=str)
def test_every_launch_setting_computes_the_same(config, monkeypatch):
    """The interpreter runs Hopper's settings; on other chips tiles have other sizes."""
    lengths, slopes = [3, 0, 135, 7], alibi_slopes(1, 8.0)
    qkv, dout = draw(lengths, 1, 16)
    expected = attend(qkv, dout, lengths, slopes)
    everywhere = dict.fromkeys(kernels.ATTENTION_CONFIGS, config)
    monkeypatch.setattr(kernels, "ATTENTION_CONFIGS", everywhere)
    ours = attend(qkv, dout, lengths, slopes)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("lengths", [[5, 64, 1, 33, 0], [5, 128, 1, 33], [5, 200, 1, 130]], ids=str)
def test_packed_equals_alone_and_repeats_bitwise(lengths):
    how = dict(max_seqlen=max(lengths), rope_base=1e3)
    qkv, dout = draw(lengths, 2, 32)
    packed, again = (attend(qkv, dout, lengths, alibi_slopes(2), **how) for _ in range(2))
    assert all(map(torch.equal, packed, again))
    documents = zip(qkv.split(lengths), dout.split(lengths))
    alone = [attend(x, g, [len(x)], alibi_slopes(2), **how) for x, g in documents]
    for a, b in zip(packed, map(torch.cat, zip(*alone))):
        # the CPU pads documents of like length together, which may move the last bit
        assert torch.equal(a, b) if TRITON else torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [[20, 1, 50, 3], [20, 1, 140, 3], [20, 128, 1, 257]], ids=str)
def test_nan_in_neighbours_or_slack_never_leaks(lengths):
    slopes, slack, T = alibi_slopes(1), 7, sum(lengths)
    qkv, dout = draw(lengths, 1, 32, slack=slack)
    clean = attend(qkv, dout, lengths, slopes, rope_base=1e3)
    for poison in (float("nan"), float("inf")):
        for victim in range(0, len(lengths), 2):
            bad = [torch.full_like(x, poison) for x in (qkv, dout)]
            for x, good in zip(bad, (qkv, dout)):
                x[:T].split(lengths)[victim].copy_(good[:T].split(lengths)[victim])
            for a, b in zip(attend(*bad, lengths, slopes, rope_base=1e3), clean):
                assert torch.equal(a[:T].split(lengths)[victim], b[:T].split(lengths)[victim])
                assert (a[T:] == 0).all()


def test_rope_turns_pairs_of_columns_and_sees_distances_alone():
    x = torch.randn(2, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = kernels.rotate(x, kernels.rope_table(7, 4, 100.0, dtype=torch.float64))
    for m in range(7):
        for d, angle in enumerate((torch.tensor(float(m)), torch.tensor(m / 10.0))):  # 100^(-2/4)
            turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]]).double()
            before, after = (t[:, m, 2 * d : 2 * d + 2] for t in (x, turned))
            torch.testing.assert_close(after, before @ turn.T, atol=1e-6, rtol=0)
    table = kernels.rope_table(99, 4, 100.0, dtype=torch.float64)
    places = (kernels.rotate(x, table[i : i + 7]) for i in (0, 90))
    torch.testing.assert_close(*(turned @ turned.mT for turned in places))


@triton_only
def test_offsets_beyond_2_to_the_31():
    """The document sits past element 2^31 of qkv; 32-bit row offsets would read other memory."""
    n, H, D, stride = 130, 1, 16, 2**24
    T = 2**31 // stride + n
    qkv = torch.empty(T * stride, dtype=torch.float16)  # never touched, but for its end
    qkv = qkv.as_strided((T, 3, H, D), (stride, H * D, D, 1))
    small, dout = draw([n], H, D, torch.float16)
    qkv[-n:] = small
    cu, slopes = torch.tensor([T - n, T], dtype=torch.int32), alibi_slopes(H)
    out, lse = kernels._attention_triton(qkv, cu, slopes, 1e3, n)
    dout = torch.cat([torch.zeros(T - n, H, D, dtype=dout.dtype), dout])
    dqkv = kernels._attention_triton(qkv, cu, slopes, 1e3, n, (dout, out, lse))
    alone = attend(small, dout[-n:], [n], slopes, rope_base=1e3)
    assert all(map(torch.equal, (out[-n:], dqkv[-n:]), alone))
    logits = torch.empty(3 * 2**30, dtype=torch.float16).as_strided((3, 9), (2**30, 1))
    logits[:] = torch.arange(9)
    assert masked_cross_entropy(logits, torch.tensor([8, 8, 0]))[1] == 2


def test_slopes_are_mosaicberts():
    """At a power of two 2^(-8/n) and its powers; between, the half-steps of the one above."""
    assert torch.equal(alibi_slopes(8)[:, 0], 2.0 ** -torch.arange(1.0, 9))
    twelve = [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]
    assert torch.equal(alibi_slopes(12)[:, 0], 2.0 ** -torch.tensor(twelve))
    assert torch.equal(alibi_slopes(16)[:, 1], 2.0 ** -(torch.arange(1.0, 17) / 2))
    assert alibi_slopes(4, 8.0).mul(256).tolist() == [[64, 512], [128, 16], [4, 32], [8, 1]]


@cpu_only
def test_dropout_draws_the_same_mask_in_the_backward():
    lengths, H, p = [3, 0, 7, 6], 2, 0.3
    cu, how = offsets(lengths), dict(dropout_p=p, seed=torch.tensor(5), rope_base=10.0)
    qkv = draw(lengths, H, 8, torch.float64, slack=2)[0].requires_grad_()
    f = lambda x: varlen_attention(x, cu, 7, alibi_slopes(H, 8.0), **how)
    assert torch.autograd.gradcheck(f, (qkv,))
    a, b = (varlen_attention(qkv, cu, 7, dropout_p=p) for _ in range(2))
    assert not torch.equal(a, b), "without a seed every call draws anew"
    ones = torch.ones(1, 3, 1, 16).repeat(400, 1, 1, 1)
    out = varlen_attention(ones, offsets([400]), 400, dropout_p=p, seed=torch.tensor(1))
    assert abs(out.mean().item() - 1) < 0.01, "dropout keeps the mean"


@cpu_only
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_weights_kept_for_the_backward_are_those_computed_again(dropout_p):
    """Up to 512 tokens an eager CPU keeps them."""
    lengths, how = [3, 0, 40, 33], dict(rope_base=1e3, dropout_p=dropout_p, seed=torch.tensor(5))
    qkv, dout = draw(lengths, 2, 16, torch.bfloat16)
    kept, again = (attend(qkv, dout, lengths, alibi_slopes(2, 8.0), max_seqlen=n, **how)
                   for n in (512, 513))
    assert all(map(torch.equal, kept, again))


@cpu_only
def test_one_long_document_among_many_short_ones_stays_within_memory(monkeypatch):
    """Scores are held for one length class, and one block of queries, at a time."""
    monkeypatch.setattr(kernels, "SCORE_BUDGET", 20_000)
    lengths = [3] * 500 + [900] + [2] * 500
    held, weights = [], kernels._group_weights
    spy = lambda *args: held.append(weights(*args)) or held[-1]
    monkeypatch.setattr(kernels, "_group_weights", spy)
    qkv, dout = draw(lengths, 2, 16)
    ours = attend(qkv, dout, lengths, alibi_slopes(2), rope_base=1e3)
    assert max(scores.numel() for scores in held) <= 20_000
    exact, torchs = oracles(qkv, dout, lengths, alibi_slopes(2), 1e3)
    assert_close_to_exact(ours, torchs, exact)


@cpu_only
@pytest.mark.parametrize("rope_base", [0.0, 100.0])
@pytest.mark.parametrize("slopes", [None, alibi_slopes(2, 8.0)], ids=["no ALiBi", "ALiBi"])
@pytest.mark.parametrize("lengths", [[5], [3, 9, 1, 7], [4, 0, 6]])
def test_the_padded_attention_is_the_reference(lengths, slopes, rope_base):
    """Its device-independent arithmetic: with rows behind the last document and a longer bound."""
    T, S = sum(lengths), max(lengths) + 2
    qkv, dout = draw(lengths, 2, 16, torch.float64, slack=3)
    how = dict(max_seqlen=S, rope_base=rope_base)
    padded = attend(qkv, dout, lengths, slopes, backend="padded", **how)
    exact, _ = oracles(qkv[:T], dout[:T], lengths, slopes, rope_base)
    torch.testing.assert_close([x[:T] for x in padded], exact)
    assert not padded[0][T:].any() and not padded[1][T:].any()


@cpu_only
def test_the_padded_attention_drops_weights_and_keeps_their_mean():
    lengths = [40, 56]
    qkv = torch.zeros(96, 3, 2, 16)
    qkv[:, 2] = 1.0
    torch.manual_seed(0)
    how = dict(dropout_p=0.1, backend="padded")
    out = torch.stack([varlen_attention(qkv, offsets(lengths), 56, **how) for _ in range(50)])
    assert out.mean().item() == pytest.approx(1.0, abs=5e-3)
    for n, part in zip(lengths, out.split(lengths, dim=1)):  # n weights, kept with p 0.9 and / 0.9
        assert part.std().item() == pytest.approx((0.1 / 0.9 / n) ** 0.5, rel=0.1)


# ----------------------------------------------------------------------------- rows, pointwise
@cpu_only
@pytest.mark.parametrize("shape", [(50,), (50, 3), (50, 2, 700)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gather_and_scatter_move_rows_and_their_gradients(shape, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(dtype)
    index = torch.randperm(50, generator=g)[:21]
    index[[2, 7]] = -1  # fillers
    kept = index >= 0
    dout = torch.randn(21, *shape[1:], generator=g).to(dtype)
    out, grad = with_grad(lambda x: kernels.gather_rows(x, index), x, dout=dout)
    assert torch.equal(out[kept], x[index[kept]]) and (out[~kept] == 0).all()
    expected = torch.zeros_like(x).index_copy(0, index[kept], dout[kept])
    assert torch.equal(grad, expected)
    out, grad = with_grad(lambda x: kernels.scatter_rows(x, index, 50), dout, dout=x)
    assert torch.equal(out, expected)
    assert torch.equal(grad[kept], x[index[kept]]) and (grad[~kept] == 0).all()


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("shape", [(7, 192), (6, 3000), (3, 14), (1, 2), (0, 64)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_geglu(shape, dtype, p):
    if p and not TRITON:
        pytest.skip("a CPU draws its masks with torch")
    g = torch.Generator().manual_seed(0)
    h = (3 * torch.randn(shape, generator=g)).to(getattr(torch, dtype))
    dout = torch.randn(shape[0], shape[1] // 2, generator=g).to(h)
    seed = torch.tensor(2**61 + 987_654_321_987)
    plain = lambda h: kernels.geglu_reference(h, p, seed)
    f = (lambda h: torch.ops.nanomosaic.geglu(h, None, seed, p)) if p else geglu
    calls = (plain, h.double()), (plain, h), (f, h)
    exact, torchs, ours = (with_grad(f, x, dout=dout) for f, x in calls)
    if h.numel():
        assert_close_to_exact(ours, torchs, exact)
        dropped = kernels.geglu_reference(torch.ones_like(h), p, seed) == 0
        assert (ours[0][dropped] == 0).all() and (bool(dropped.any()) is (p > 0) or len(h) < 3)


@triton_only
def test_the_normal_distribution_of_geglu_is_as_exact_as_torchs_and_ends_well():
    ends = [float("inf"), -1e38, -30.0, -13.0, 0.0, 1e38]
    x = torch.cat([torch.linspace(-9, 9, 3001), torch.tensor(ends)])[:, None]
    h = torch.cat([x, torch.ones_like(x)], 1)
    ours, grad = with_grad(geglu, h, dout=torch.ones_like(x))
    exact, exact_grad = with_grad(kernels.geglu_reference, h.double(), dout=torch.ones_like(x))
    assert torch.isfinite(grad[:-6]).all() and torch.equal(ours[-6:], exact[-6:].float())
    assert (ours - exact)[:-6].abs().max() < 1.2e-6 and (grad - exact_grad)[:-6].abs().max() < 1e-6


@cpu_only
@pytest.mark.parametrize(("drop", "columns"), [(kernels.hash_dropout, 1),
                                               (kernels.geglu_reference, 2)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropouts_hash_keeps_the_mean_the_variance_and_independence(drop, columns, p):
    """Of neighbours in a row, of rows, of the two columns that share a word, of seeds that differ
    in a bit of the low half, and of seeds as they are drawn: within 4.5 standard errors."""
    rows, width = 1024, 768
    n, seed, x = rows * width, 2**61 + 12_345, torch.ones(rows, width * columns)
    mask = lambda seed: drop(x, p, torch.tensor(seed)).ne(0).double() - (1 - p)  # less its mean
    kept = mask(seed)
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.mean()) < 4.5 * sigma / n**0.5
    for axis, count in (0, rows), (1, width):  # a binomial in each row and column
        z = kept.sum(axis) / (sigma * count**0.5)
        assert abs(z.var() - 1) < 4.5 * (2 / z.numel()) ** 0.5
    shifts = [(0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (1, 1), (0, width // 2), (1, width // 2)]
    others = [kept.roll(shift, (0, 1)) for shift in shifts]
    torch.manual_seed(0)
    seeds = [seed ^ 1 << bit for bit in range(32)]
    seeds += [int(kernels.new_seed(x)) for _ in range(20)]
    others += map(mask, seeds)
    for i, other in enumerate(others):
        z = (kept * other).sum() / (sigma**2 * n**0.5)
        assert abs(z) < 4.5, (i, z)
    y = kernels.hash_dropout(torch.ones(n), p, torch.tensor(seed))
    assert y.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)
    assert y.var().item() == pytest.approx(p / (1 - p), rel=0.02)


@cpu_only
def test_a_compiled_graph_makes_the_same_mask_again_in_the_backward_and_another_in_each_call():
    @torch.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    def f(x):
        return kernels.hash_dropout(x, 0.3, kernels.new_seed(x)) * 2

    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        for _ in range(2):
            y, grad = with_grad(f, torch.ones(4_000), dout=torch.ones(4_000))
            assert torch.equal(y, grad)
            masks.append(y != 0)
    same = [[torch.equal(a, b) for b in masks].index(True) for a in masks]
    assert same == [0, 1, 0, 1, 4, 5], "the seed decides, and no two calls have the same"


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("V", [7, 1000, 4097])
def test_masked_cross_entropy_leaves_its_gradient_and_counts_like_argmax(V, dtype):
    g = torch.Generator().manual_seed(0)
    logits, labels = 4 * torch.randn(9, V, generator=g), torch.randint(V, (9,), generator=g)
    labels[5:] = logits[5:].argmax(1)
    logits[5, labels[5] - 1] = logits[5, labels[5]]  # equal: the lower id is the first
    logits[6, 2] = logits[6, 4] = 30.0
    labels[6] = 2
    logits = logits.to(getattr(torch, dtype))
    (losses, correct, exact), (low, _, low_exact) = (
        kernels.cross_entropy_reference(x, labels) for x in (logits.double(), logits))
    consumed = logits.clone()
    loss, n_correct = masked_cross_entropy(consumed, labels)
    assert torch.equal(consumed, logits), "nothing is written unless asked for"
    assert n_correct == correct.sum() >= 3
    assert masked_cross_entropy(consumed, labels, keep_gradient=True)[0] == loss
    torchs = low.sum(), low_exact.to(logits.dtype)  # stored in the dtype of the logits
    assert_close_to_exact((loss, consumed), torchs, (losses.sum(), exact))
    assert masked_cross_entropy(logits[:0], labels[:0])[0] == 0


# ----------------------------------------------------------------------------- the ops in PyTorch
def test_opcheck_of_every_op():
    lengths, ops, opcheck = [3, 0, 20], torch.ops.nanomosaic, Mock(wraps=torch.library.opcheck)
    qkv, dout = draw(lengths, 2, 16, slack=1)
    cu, slopes, seed = offsets(lengths), alibi_slopes(2), torch.tensor(1)
    for args in ((slopes, None, 0.0, 20, 0.0), (None, None, 1e3, 200, 0.0),
                 (slopes, seed, 1e3, 20, 0.1)):
        if not (TRITON and args[-1]):
            opcheck(ops.attention, (qkv.requires_grad_(), cu, *args, TRITON))
            saved = [x.detach() for x in (qkv, *ops.attention(qkv, cu, *args, TRITON))]
            opcheck(ops.attention_backward, (dout, *saved, cu, *args, TRITON))
    opcheck(ops.cross_entropy_, (torch.randn(3, 9), torch.tensor([3, 1, 8]), True))
    if TRITON:  # elsewhere `geglu` takes other ways
        h, seed = torch.randn(3, 8, requires_grad=True), torch.tensor(1)
        opcheck(ops.geglu, (h, None, seed, 0.1))
        opcheck(ops.geglu, (h.detach(), torch.randn(3, 4), None, 0.0))
    names = re.findall(r'"nanomosaic::(\w+)"', Path(kernels.__file__).read_text())
    checked = {str(call.args[0]) for call in opcheck.call_args_list}
    assert checked == {f"nanomosaic.{name}" for name in names if TRITON or name != "geglu"}


def test_compiles_whole_and_once():
    """One graph, and no recompilation when the documents of a batch change."""
    count = CompileCounter()

    @torch.compile(fullgraph=True, backend=count)
    def f(qkv, cu, slopes, weight):
        out = varlen_attention(qkv * 2, cu, 64, slopes, rope_base=1e3, backend=BACKEND).flatten(1)
        logits = geglu(kernels.gather_rows(out, cu[:-1].long())) @ weight
        labels = cu[:-1] % 2 + torch.zeros_like(cu[:-1], dtype=torch.int64)
        return logits.square().sum() + masked_cross_entropy(logits * 1, labels)[0]

    weight = torch.randn(16, 2)
    for lengths in ([3, 20, 7], [10, 10, 10], [28, 1, 1]):
        args = draw(lengths, 2, 16)[0].requires_grad_(), offsets(lengths), alibi_slopes(2), weight
        grads = (torch.autograd.grad(g(*args), args[0]) for g in (f, torch._dynamo.disable(f)))
        torch.testing.assert_close(*grads)
    assert count.frame_count == 1


ZEROS = torch.zeros(10, 3, 2, 16)
BAD = {
    r"got torch.Size\(\[10, 96\]\)": dict(qkv=ZEROS.flatten(1)),
    "floats, .* got .* torch.int64": dict(qkv=ZEROS.long()),
    "rows contiguous": dict(qkv=ZEROS.transpose(2, 3)),
    "must be .B.1,. int32": dict(cu_seqlens=offsets([4, 6]).long()),
    r"go up from 0 to at most 10: \[1": dict(cu_seqlens=offsets([4, 5]) + 1),
    r"to at most 10: \[0, 9, 3": dict(cu_seqlens=offsets([9, -6, 7])),
    r"to at most 10: \[0, 11": dict(cu_seqlens=offsets([11])),
    "does not fit max_seqlen=5": dict(max_seqlen=5),
    r"slopes must be \(2, 2\) float32": dict(slopes=torch.ones(2)),
    "no dropout": dict(dropout_p=0.1, backend="triton"),
}
BAD |= {
    "head dimension 24 is not": dict(qkv=torch.zeros(10, 3, 2, 24)),
    "head dimension 144 is not": dict(qkv=torch.zeros(10, 3, 2, 144)),
    "got .* torch.float64": dict(qkv=ZEROS.double()),
} if TRITON else {"runs on CUDA tensors": dict(backend="triton")}


@pytest.mark.parametrize("problem", BAD)
def test_bad_input_is_refused_in_one_line(problem):
    good = dict(qkv=ZEROS, cu_seqlens=offsets([4, 6]), max_seqlen=6, backend=BACKEND)
    varlen_attention(**good)
    with pytest.raises(ValueError, match=f"^.*{problem}.*$"):
        varlen_attention(**good | BAD[problem])


# ----------------------------------------------------------------------------- other processes
@pytest.mark.skipif(TRITON, reason="this is that process")
def test_the_triton_kernels_in_the_interpreter():
    triton = pytest.importorskip("triton", reason="triton is not installed here")
    version = lambda text: tuple(int(x) for x in text.split(".")[:2])
    if version(triton.__version__) < (3, 7) and version(np.__version__) >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 cannot run a loop with numpy 2.4 or newer")
    options = "-p", "no:cacheprovider", "--durations=5"
    print(python("-m", "pytest", *options, __file__, TRITON_INTERPRET="1").stdout)


@cpu_only
def test_works_without_triton():
    code = """import sys; sys.modules['triton'] = None
import torch, kernels
x = torch.randn(10, 3, 2, 16, requires_grad=True)
cu = torch.tensor([0, 4, 10], dtype=torch.int32)
kernels.varlen_attention(x, cu, 6, kernels.alibi_slopes(2)).sum().backward()
print(kernels.attention_backend('cuda'))"""
    assert python("-c", code).stdout.startswith("('padded', 'triton is not installed")
