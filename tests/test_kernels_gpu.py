"""The Triton kernels on the device itself, in bf16: the claims of test_kernels.py again, then a random soak."""

import random
import time
from functools import partial

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import EDGES, assert_close_to_exact, oracles, with_grad

import kernels
from kernels import (
    add_layer_norm,
    alibi_slopes,
    attention_tiles,
    gather_rows,
    geglu,
    masked_cross_entropy,
    scatter_rows,
    varlen_attention,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the Triton kernels cannot run here"),
]
offsets = partial(oracle.offsets, device="cuda")
ATOM = 1e-5  # fp32 products are three tf32 ones here


def draw(lengths, H, D, dtype=torch.bfloat16, **kwargs):
    return oracle.draw(lengths, H, D, dtype, device="cuda", **kwargs)


def attend(qkv, dout, lengths, slopes, **kwargs):
    kwargs = {"max_seqlen": max(lengths), "backend": "triton"} | kwargs
    return with_grad(lambda x: varlen_attention(x, offsets(lengths), slopes=slopes, **kwargs), qkv, dout=dout)


def assert_at_most_twice_torchs_error(qkv, dout, lengths, slopes, name="", **kwargs):
    exact, torchs = oracles(qkv, dout, lengths, slopes)
    assert_close_to_exact(attend(qkv, dout, lengths, slopes, **kwargs), torchs, exact, name, ATOM)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("H", "D"), [(1, 16), (2, 32), (12, 64), (16, 64), (2, 80), (3, 128)])
@pytest.mark.parametrize("longest", [64, 128, 1000])
def test_error_is_at_most_twice_torchs(H, D, dtype, longest):
    lengths = [n for n in EDGES if n <= longest]
    for steepness in (1.0, 8.0, 1e-3, None):
        slopes = None if steepness is None else alibi_slopes(H).cuda() * steepness
        assert_at_most_twice_torchs_error(*draw(lengths, H, D, dtype), lengths, slopes)


@pytest.mark.parametrize("lengths", [[5, 64, 1, 33], [5, 128, 1, 33], [5, 700, 1, 130]], ids=str)
def test_packed_equals_alone_and_repeats_bitwise(lengths):
    slopes, bound = alibi_slopes(12).cuda(), max(lengths)
    qkv, dout = draw(lengths, 12, 64)
    packed = attend(qkv, dout, lengths, slopes)
    alone = [attend(x, g, [len(x)], slopes, max_seqlen=bound) for x, g in zip(qkv.split(lengths), dout.split(lengths))]
    assert all(torch.equal(a, b) for a, b in zip(packed, map(torch.cat, zip(*alone))))
    tiles = attention_tiles(offsets(lengths)).cuda()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(packed, attend(qkv, dout, lengths, slopes, tiles=tiles)))


@pytest.mark.parametrize("lengths", [[20, 1, 50, 3], [20, 128, 1, 33], [20, 128, 1, 257]], ids=str)
def test_nan_in_neighbours_or_slack_never_leaks(lengths):
    slopes, slack = alibi_slopes(12).cuda(), 1000
    qkv, dout = draw(lengths, 12, 64, slack=slack)
    T = sum(lengths)
    clean = attend(qkv, dout, lengths, slopes)
    for victim in range(len(lengths)):
        bad_qkv, bad_dout = torch.full_like(qkv, float("nan")), torch.full_like(dout, float("nan"))
        for bad, good in ((bad_qkv, qkv), (bad_dout, dout)):
            bad[:T].split(lengths)[victim].copy_(good[:T].split(lengths)[victim])
        for a, b in zip(attend(bad_qkv, bad_dout, lengths, slopes), clean):
            assert torch.equal(a[:T].split(lengths)[victim], b[:T].split(lengths)[victim])
            assert (a[T:] == 0).all()


@pytest.mark.parametrize("n", [128, 300, 1024])
def test_reversing_a_document_reverses_the_result(n):
    qkv, dout = draw([n], 2, 64, torch.float32)
    slopes = alibi_slopes(2).cuda()
    for a, b in zip(attend(qkv.flip(0), dout.flip(0), [n], slopes), attend(qkv, dout, [n], slopes)):
        torch.testing.assert_close(a.flip(0), b, rtol=1e-4, atol=1e-5)


def test_without_slope_it_is_scaled_dot_product_attention():
    qkv, dout = draw([500], 2, 64)
    sdpa = lambda x: F.scaled_dot_product_attention(*x.permute(1, 2, 0, 3)[:, None])[0].transpose(0, 1)
    for a, b in zip(attend(qkv, dout, [500], None), with_grad(sdpa, qkv, dout=dout)):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_offsets_beyond_2_to_the_31():
    T, H, D = 950_000, 12, 64  # T * 3 * H * D = 2.19e9 elements: 4.4 GB of qkv
    lengths = [1000] * (T // 1000)
    qkv, dout = draw(lengths, H, D)
    slopes = alibi_slopes(H).cuda()
    whole = attend(qkv, dout, lengths, slopes)
    last = attend(qkv[-1000:], dout[-1000:], [1000], slopes)
    assert all(torch.equal(a[-1000:], b) for a, b in zip(whole, last))


def test_rows_move_bitwise():
    x = torch.randn(5000, 768, device="cuda", dtype=torch.bfloat16)
    index = torch.randperm(5000, device="cuda")[:1501]
    index[7] = -1
    kept = index >= 0
    out = gather_rows(x, index)
    assert torch.equal(out[kept], x[index[kept]]) and (out[7] == 0).all()
    assert torch.equal(scatter_rows(out, index, 5000)[index[kept]], x[index[kept]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_pointwise_kernels_error_is_at_most_twice_torchs(dtype):
    g = torch.Generator("cuda").manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, device="cuda").to(dtype)
    wide = lambda xs: [x.double() for x in xs]

    plain = lambda h: F.gelu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]
    h, dout = make(1000, 6144), make(1000, 3072)
    exact, torchs = (with_grad(plain, x, dout=dout) for x in (h.double(), h))
    assert_close_to_exact(with_grad(geglu, h, dout=dout), torchs, exact, "geglu", ATOM)

    plain = lambda x, r, w, b: F.layer_norm(x + r, (768,), w, b)
    inputs, dout = [make(1000, 768), make(1000, 768), make(768), make(768)], make(1000, 768)
    exact, torchs = with_grad(plain, *wide(inputs), dout=dout), with_grad(plain, *inputs, dout=dout)
    ours, again = (with_grad(add_layer_norm, *inputs, dout=dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again))
    assert_close_to_exact(ours, torchs, exact, "add_layer_norm", ATOM)

    logits, labels = make(100, 30528), torch.randint(30528, (100,), device="cuda")
    labels[::7] = -100
    plain = lambda x: F.cross_entropy(x, labels, reduction="sum")
    exact, torchs = (with_grad(f, x, dout=torch.ones((), device="cuda")) for f, x in (
        (plain, logits.double()), (lambda x: plain(x.float()), logits)))  # fmt: skip
    ours = with_grad(lambda x: masked_cross_entropy(x * 1, labels)[0], logits, dout=torch.ones((), device="cuda"))
    assert_close_to_exact(ours, torchs, exact, "masked_cross_entropy", ATOM)


def test_compiled_training_step_makes_no_host_synchronisation():
    lengths = [100, 300, 28]
    qkv, _ = draw(lengths, 12, 64)
    slopes, cu = alibi_slopes(12).cuda(), offsets(lengths)
    tiles, index = attention_tiles(cu).cuda(), torch.arange(0, 400, 3, device="cuda")

    @torch.compile(fullgraph=True)
    def f(qkv):
        out = varlen_attention(qkv * 2, cu, 300, slopes, tiles=tiles).flatten(1)
        return gather_rows(out, index).float().sum()

    f(qkv.requires_grad_()).backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        f(qkv).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
def test_berts_attention_is_torchs_and_with_dropout_it_never_waits_for_the_gpu(compiled):
    lengths = [100, 300, 28]
    (qkv, dout), cu = draw(lengths, 12, 64), offsets(lengths)
    assert_at_most_twice_torchs_error(qkv, dout, lengths, None, backend="padded")
    attention = lambda x: varlen_attention(x * 2, cu, 300, dropout_p=0.1, backend="padded")
    f = torch.compile(attention, fullgraph=True) if compiled else attention
    f(qkv.requires_grad_()).backward(dout)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        f(qkv).backward(dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_sixty_seconds_of_random_shapes():
    rng, until, seed = random.Random(0), time.monotonic() + 60, 0
    while time.monotonic() < until:
        seed += 1
        longest = rng.choice([64, 128, 300, 2000])
        lengths = [rng.choice([0, 1, longest, rng.randint(1, longest)]) for _ in range(rng.randint(1, 12))] + [1]
        H, D = rng.choice([1, 2, 12, 16]), rng.choice([16, 32, 48, 64, 96, 128])
        slopes = rng.choice([None, alibi_slopes(H).cuda(), alibi_slopes(H).cuda() * 10])
        tiles = attention_tiles(offsets(lengths)).cuda() if rng.random() < 0.5 else None
        qkv, dout = draw(lengths, H, D, rng.choice([torch.bfloat16, torch.float16]), seed=seed)
        name = f"seed {seed}, lengths {lengths}, H {H}, D {D}"
        assert_at_most_twice_torchs_error(qkv, dout, lengths, slopes, name, tiles=tiles, max_seqlen=longest)
    print(f"{seed} shapes, chip family {kernels._chip_family(torch.cuda.get_device_capability())}")
