"""The Triton kernels on the device itself, in bf16: the claims of test_kernels.py, then a soak."""

import random
import time
from functools import partial

import oracle
import pytest
import torch
from oracle import EDGES, assert_close_to_exact, oracles, with_grad

import kernels
from kernels import alibi_slopes, masked_cross_entropy, varlen_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device for the kernels"),
]
offsets = partial(oracle.offsets, device="cuda")
ATOM = 1e-5  # fp32 products are three tf32 ones here


def draw(lengths, H, D, dtype=torch.bfloat16, **kwargs):
    return oracle.draw(lengths, H, D, dtype, device="cuda", **kwargs)


def slopes_of(H, ratio=1.0):
    return alibi_slopes(H, ratio).cuda()


def attend(qkv, dout, lengths, slopes, **kwargs):
    kwargs = dict(max_seqlen=max(lengths), slopes=slopes, backend="triton") | kwargs
    return with_grad(lambda x: varlen_attention(x, offsets(lengths), **kwargs), qkv, dout=dout)


def check_error(qkv, dout, lengths, slopes, name="", rope_base=0.0, **kwargs):
    """At most twice PyTorch's."""
    exact, torchs = oracles(qkv, dout, lengths, slopes, rope_base)
    ours = attend(qkv, dout, lengths, slopes, rope_base=rope_base, **kwargs)
    assert_close_to_exact(ours, torchs, exact, name, ATOM)


def without_waiting(step):
    """Run `step` once to compile, then with an error where the host would wait for the GPU."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("H", "D"), [(1, 16), (2, 32), (12, 64), (16, 64), (2, 80), (3, 128)])
@pytest.mark.parametrize("longest", [64, 128, 1000])
def test_error_is_at_most_twice_torchs(H, D, dtype, longest):
    lengths = [n for n in EDGES if n <= longest]
    for steepness, ratio, rope_base in ((1, 1, 0), (8, 8, 0), (1e-3, 8, 1e3), (None, 1, 1e3)):
        slopes = None if steepness is None else slopes_of(H, ratio) * steepness
        check_error(*draw(lengths, H, D, dtype), lengths, slopes, rope_base=float(rope_base))


@pytest.mark.parametrize("lengths", [[5, 64, 1, 33], [5, 128, 1, 33], [5, 700, 1, 130]], ids=str)
def test_packed_equals_alone_and_repeats_bitwise(lengths):
    how = dict(slopes=slopes_of(12, 8.0), max_seqlen=max(lengths), rope_base=1e3)
    qkv, dout = draw(lengths, 12, 64)
    packed = attend(qkv, dout, lengths, **how)
    documents = zip(qkv.split(lengths), dout.split(lengths))
    alone = [attend(x, g, [len(x)], **how) for x, g in documents]
    assert all(torch.equal(a, b) for a, b in zip(packed, map(torch.cat, zip(*alone))))
    for _ in range(20):
        again = attend(qkv, dout, lengths, **how)
        assert all(torch.equal(a, b) for a, b in zip(packed, again))


@pytest.mark.parametrize("lengths", [[20, 1, 50, 3], [20, 128, 1, 33], [20, 128, 1, 257]], ids=str)
def test_nan_in_neighbours_or_slack_never_leaks(lengths):
    slopes, slack, T = slopes_of(12), 1000, sum(lengths)
    qkv, dout = draw(lengths, 12, 64, slack=slack)
    clean = attend(qkv, dout, lengths, slopes, rope_base=1e3)
    for victim in range(len(lengths)):
        bad = [torch.full_like(x, float("nan")) for x in (qkv, dout)]
        for x, good in zip(bad, (qkv, dout)):
            x[:T].split(lengths)[victim].copy_(good[:T].split(lengths)[victim])
        for a, b in zip(attend(*bad, lengths, slopes, rope_base=1e3), clean):
            assert torch.equal(a[:T].split(lengths)[victim], b[:T].split(lengths)[victim])
            assert (a[T:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("width", "p"), [(3072, 0.1), (3072, 0.0), (301, 0.5)])
def test_geglu_with_dropout_has_the_references_mask_and_at_most_twice_torchs_error(width, p, dtype):
    g, seed = torch.Generator("cuda").manual_seed(0), torch.tensor(2**61 + 99, device="cuda")
    h = (3 * torch.randn(500, 2 * width, generator=g, device="cuda")).to(dtype)
    dout = torch.randn(500, width, generator=g, device="cuda").to(dtype)
    reference = lambda h: kernels.geglu_reference(h, p, seed)
    ours = lambda h: torch.ops.nanomosaic.geglu(h, None, seed if p else None, p)
    ours = with_grad(ours, h, dout=dout)
    exact, torchs = (with_grad(reference, x, dout=dout) for x in (h.double(), h))
    assert_close_to_exact(ours, torchs, exact, atom=ATOM)
    assert (ours[0][reference(torch.ones_like(h)) == 0] == 0).all()


def test_compiled_dropout_keeps_the_mean_and_its_backward_has_the_same_mask():
    f = torch.compile(lambda x: kernels.dropout(x, 0.1), fullgraph=True)
    x, calls = torch.ones(1000, 768, device="cuda"), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        y, grad = with_grad(f, x, dout=x)
        assert torch.equal(y, grad) and abs(y.mean() - 1) < 2e-3
        calls.append(y)
    assert torch.equal(calls[0], calls[1]) and not torch.equal(calls[0], calls[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_cross_entropys_error_is_at_most_twice_torchs(dtype):
    g = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(100, 30528, generator=g, device="cuda").to(dtype)
    labels = torch.randint(30528, (100,), device="cuda", generator=g)
    exact, low = (kernels.cross_entropy_reference(x, labels) for x in (logits.double(), logits))
    loss, n_correct = masked_cross_entropy(logits, labels, keep_gradient=True)
    assert n_correct == exact[1].sum()
    torchs = low[0].sum(), low[2].to(dtype)
    assert_close_to_exact((loss, logits), torchs, (exact[0].sum(), exact[2]), atom=ATOM)


@pytest.mark.parametrize("compiled", [False, True])
def test_berts_attention_is_torchs_and_with_dropout_it_never_waits_for_the_gpu(compiled):
    lengths = [100, 300, 28]
    (qkv, dout), cu = draw(lengths, 12, 64), offsets(lengths)
    check_error(qkv, dout, lengths, None, backend="padded")
    f = lambda x: varlen_attention(x * 2, cu, 300, dropout_p=0.1, backend="padded")
    f, qkv = torch.compile(f, fullgraph=True) if compiled else f, qkv.requires_grad_()
    without_waiting(lambda: f(qkv).backward(dout))


@pytest.mark.slow
def test_sixty_seconds_of_random_shapes():
    rng, until, seed = random.Random(0), time.monotonic() + 60, 0
    while time.monotonic() < until:
        seed += 1
        longest = rng.choice([64, 128, 300, 2000])
        draw_length = lambda longest=longest: rng.choice([0, 1, longest, rng.randint(1, longest)])
        lengths = [draw_length() for _ in range(rng.randint(1, 12))] + [1]
        H, D = rng.choice([1, 2, 12, 16]), rng.choice([16, 32, 48, 64, 96, 128])
        slopes = rng.choice([None, slopes_of(H), slopes_of(H, 8.0) * 10])
        qkv, dout = draw(lengths, H, D, rng.choice([torch.bfloat16, torch.float16]), seed=seed)
        how = dict(max_seqlen=longest, rope_base=rng.choice([0.0, 1e3]))
        check_error(qkv, dout, lengths, slopes, f"seed {seed}, {lengths}, H {H}, D {D}", **how)
    print(f"{seed} shapes")
