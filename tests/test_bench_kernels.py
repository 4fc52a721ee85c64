"""bench.py's door and what bench_kernels.py counts; the timing itself needs a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import machine
from bench import kernels as bench_kernels
from bench.kernels import attempt, attention_cost, draw_lengths, matmul_shapes, pointwise_bytes, print_row, rates
from model import PRESETS, EncoderConfig, MaskedLM

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def bench(*args):
    return subprocess.run([sys.executable, "bench.py", *args], capture_output=True, text=True, cwd=ROOT)


def test_the_door_names_its_modes_without_importing_them():
    result = bench("--help")
    assert result.returncode == 0 and all(f"bench.py {mode}" in result.stdout for mode in ("kernels", "step", "data"))
    result = bench("speed")
    assert result.returncode == 1 and result.stderr == "error: bench.py speed: the modes are kernels, step, data\n"
    code = "import sys, bench; sys.argv = ['', '--help']; bench.main(); print([m for m in sys.modules if 'torch' in m])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout
    assert out.endswith("[]\n"), "torch takes seconds"


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_without_a_gpu_it_is_one_line():
    result = bench("kernels")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: python -m bench.kernels: no CUDA device") and result.stderr.count("\n") == 1


def test_the_lengths_and_peers_are_the_promised_ones():
    assert bench_kernels.Config().lengths == (128, 256, 512, 1024, 2048, 4096, 8192)
    x = torch.zeros(8, 3, 1, 16)
    assert list(bench_kernels.attention_peers(x, x[:, 0], [4, 4], torch.ones(1), device="cpu")) == [
        "ours",
        "flex_attention, compiled",
        "padded SDPA with bias",
        "padded SDPA cuDNN, no bias",
        "varlen_attn, no bias",
    ]


@pytest.mark.parametrize("lengths", [[16, 16], [5, 16, 9]])
def test_the_padded_peer_computes_what_ours_does(lengths):
    g = torch.Generator().manual_seed(0)
    qkv, dout = torch.randn(sum(lengths), 3, 2, 16, generator=g), torch.randn(sum(lengths), 2, 16, generator=g)
    peers = bench_kernels.attention_peers(qkv, dout, lengths, torch.tensor([0.5, 0.1]), device="cpu")
    forward, (x,), gradient = peers["ours"]()
    out = forward()
    out.backward(gradient)
    forward, padded, gradient = peers["padded SDPA with bias"]()
    theirs = forward()
    theirs.backward(gradient)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (B, n)
    torch.testing.assert_close(theirs.transpose(1, 2)[real], out, atol=1e-5, rtol=1e-4)
    for ours, leaf in zip(x.grad.unbind(1), padded):
        torch.testing.assert_close(leaf.grad.transpose(1, 2)[real], ours, atol=1e-5, rtol=1e-4)


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
    # two documents, of 2 and 3 tokens, one head of 16: q k^T is (4 + 9) * 16 multiply-adds, p v as many
    # one (T, H, D) is 5 * 16 bf16 numbers
    assert attention_cost([2, 3], 1, 16) == {
        "forward": (2 * 2 * 13 * 16, 4 * 160),
        "backward": (5 * 2 * 13 * 16, 7 * 160),
    }
    # mosaic-base at S = 128, T = 65,536: 25.8 GFLOP, 403 MB
    flops, n_bytes = attention_cost([128] * 512, 12, 64)["forward"]
    assert round(flops / 1e9, 1) == 25.8 and round(n_bytes / 1e6) == 403
    # 10 tokens, 4 wide, feed-forward 8, 100 entries, 3 masked
    assert pointwise_bytes(10, 4, 8, 100, 3) == {
        "geglu": (160 * 3, 160 * 5),
        "add_layer_norm": (80 * 3, 80 * 4),
        "masked_cross_entropy": (600, 600),
        "gather_rows (unpad)": (24 + 24, 24 + 80),
        "scatter_rows (pad)": (24 + 80, 24 + 24),
    }


def test_matmuls_are_those_of_mosaic_base():
    shapes = matmul_shapes(65_536, 768, 3_072, 30_528, 19_660)
    modules = MaskedLM(EncoderConfig(**PRESETS["mosaic-base"] | {"n_layers": 1})).modules()
    sizes = sorted((m.in_features, m.out_features) for m in modules if isinstance(m, torch.nn.Linear))
    assert sorted((i, o) for _, i, o in shapes.values()) == sizes


def test_rates_divide_by_the_slower_of_the_two_limits(capsys):
    roofline = {"tflops": 500.0, "gb_per_s": 4000.0}
    by_flops = rates(2.0, 0.5e12, 1e9, roofline)  # 1 ms of arithmetic, 0.25 ms of traffic
    assert by_flops == {"ms": 2.0, "tflops": 250.0, "gb_per_s": 500.0, "roofline": 0.5}
    assert rates(2.0, 0.5e12, 6e9, roofline)["roofline"] == pytest.approx(0.75)
    print_row({"provider": "ours", "forward": by_flops}, "128", "tflops", "TFLOP/s")
    print_row({"provider": "flex"} | attempt(lambda: 1 / 0), "128", "tflops", "TFLOP/s")
    ours, failed = capsys.readouterr().out.splitlines()
    assert ours.split() == ["128", "ours", "forward", "2.000", "ms", "250", "TFLOP/s", "50%"]
    assert failed.endswith("did not run: ZeroDivisionError: division by zero")


def test_the_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = machine.write_report("kernels", {"settings": {"a": 1}}, CPU, str(tmp_path / "new" / "r.json"))
    report = json.loads(path.read_text())
    assert report["device"] == machine.hardware_name(CPU), "of the device that was measured, not of one that is there"
    assert set(report) == {"device", "torch", "triton", "revision", "command", "time", "settings"}
    with pytest.raises(TypeError):
        machine.write_report("kernels", {"a": object()}, CPU, str(path))
    assert json.loads(path.read_text()) == report and list(path.parent.iterdir()) == [path]
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="error: the report cannot be written"):
        machine.write_report("kernels", {}, CPU, str(tmp_path / "file" / "r.json"))
