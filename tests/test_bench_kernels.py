"""What bench/kernels.py counts, and that its peers compute the same; timing itself needs a GPU."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import python

import machine
from bench import kernels as bench_kernels
from bench.kernels import attention_cost, draw_lengths, pointwise_bytes, rates
from kernels import alibi_slopes, attention_reference

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_without_a_gpu_it_is_one_line():
    result = python("-m", "bench.kernels", code=1)
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: python -m bench.kernels: no CUDA device")


@pytest.mark.parametrize("lengths", [[16, 16], [5, 16, 9]])
def test_peers_compute_what_ours_does(lengths, monkeypatch):
    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, n_q, n_k, *, alibi_slopes):
        """What its documentation says of it: slopes (H,) fp32, bias -slope |i - j|."""
        assert alibi_slopes.shape == (2,) and cu_q is cu_k and n_q == n_k == max(lengths)
        slopes = alibi_slopes[:, None].expand(2, 2)
        return attention_reference(torch.stack([q, k, v], 1), cu_q, slopes)

    stand_in = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    g = torch.Generator().manual_seed(0)
    T = sum(lengths)
    qkv, dout = torch.randn(T, 3, 2, 16, generator=g), torch.randn(T, 2, 16, generator=g)
    peers = bench_kernels.attention_peers(qkv, dout, lengths, alibi_slopes(2), device="cpu")
    f, x, gradient = peers["ours"]()
    out = f(*x)
    out.backward(gradient)
    f, flash, gradient = peers["flash_attn"]()
    torch.testing.assert_close(f(*flash), out)
    f(*flash).backward(gradient)
    f, padded, gradient = peers["padded SDPA with bias"]()
    theirs = f(*padded)
    theirs.backward(gradient)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (B, n)
    torch.testing.assert_close(theirs.transpose(1, 2)[real], out, atol=1e-5, rtol=1e-4)
    for ours, leaf, flat in zip(x[0].grad.unbind(1), padded, flash):
        torch.testing.assert_close(leaf.grad.transpose(1, 2)[real], ours, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(flat.grad, ours)


def test_document_lengths_fill_the_batch():
    assert draw_lengths(128, 300, c4=False) == [128, 128, 44]
    for n in (128, 8192):
        lengths = draw_lengths(n, 65_536, c4=True)
        assert sum(lengths) == 65_536 and max(lengths) <= n and min(lengths) > 0
        assert lengths == draw_lengths(n, 65_536, c4=True), "the same documents in every run"
    lengths = draw_lengths(100_000, 4_000_000, c4=True)
    assert 430 < sum(lengths) / len(lengths) < 520, "C4's mean is 472"
    assert 240 < sorted(lengths)[len(lengths) // 2] < 290, "and its median 264"


def test_flops_and_bytes_are_those_counted_by_hand():
    # two documents, of 2 and 3 tokens, one head of 16: q k^T is (4 + 9) * 16 multiply-adds, p v as
    # many; one (T, H, D) is 5 * 16 bf16 numbers
    assert attention_cost([2, 3], 1, 16) == {
        "forward": (2 * 2 * 13 * 16, 4 * 160), "backward": (5 * 2 * 13 * 16, 7 * 160)}
    # mosaic-base at S = 128, T = 65,536: 25.8 GFLOP, 403 MB
    flops, n_bytes = attention_cost([128] * 512, 12, 64)["forward"]
    assert round(flops / 1e9, 1) == 25.8 and round(n_bytes / 1e6) == 403
    # 10 tokens, 4 wide, 100 entries, 3 masked
    assert pointwise_bytes(10, 4, 100, 3) == {
        "geglu, dropout 0.1": (2 * 10 * 48, 2 * 10 * 80), "masked_cross_entropy": (600, 600)}


def test_rates_divide_by_the_slower_of_the_two_limits(capsys):
    roofline = {"tflops": 500.0, "gb_per_s": 4000.0}
    by_flops = rates(2.0, 0.5e12, 1e9, roofline)  # 1 ms of arithmetic, 0.25 ms of traffic
    assert by_flops == {"ms": 2.0, "tflops": 250.0, "gb_per_s": 500.0, "roofline": 0.5}
    assert rates(2.0, 0.5e12, 6e9, roofline)["roofline"] == pytest.approx(0.75)
    x = torch.ones(3, requires_grad=True)
    costs = {"forward": (0.5e12, 1e9), "backward": (0.5e12, 6e9)}
    timer = lambda f: f() is not None and 2.0
    case = lambda: (lambda x: 2 * x, [x], torch.ones(3))
    row = bench_kernels.measure("128", "ours", "TFLOP/s", case, costs, timer, roofline)
    assert row["forward"] == by_flops and row["backward"]["roofline"] == pytest.approx(0.75)
    broken = lambda: 1 / 0
    row = bench_kernels.measure("128", "flex", "TFLOP/s", broken, costs, timer, roofline)
    assert row["failed"] == "ZeroDivisionError: division by zero"
    ours, failed = capsys.readouterr().out.splitlines()
    assert ours.split()[:8] == ["128", "ours", "forward", "2.000", "ms", "250", "TFLOP/s", "50%"]
    assert failed.endswith("did not run: ZeroDivisionError: division by zero")


def test_the_report_is_written_whole_or_not_at_all(tmp_path):
    body = {"settings": {"a": 1}}
    path = machine.write_report("kernels", body, CPU, str(tmp_path / "new" / "r.json"))
    report = json.loads(path.read_text())
    assert report["device"] == machine.hardware_name(CPU), "of what was measured"
    assert set(report) == {"device", "torch", "triton", "revision", "command", "time", "settings"}
    with pytest.raises(TypeError):
        machine.write_report("kernels", {"a": object()}, CPU, str(path))
    assert json.loads(path.read_text()) == report and list(path.parent.iterdir()) == [path]
