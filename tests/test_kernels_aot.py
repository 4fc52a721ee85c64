"""Every launch setting of kernels.py compiles ahead of time for every supported chip, without a
GPU: no register spills, shared memory within the chip's limit, wgmma (Hopper's matrix instructions)
on sm_90.

Triton ships NVIDIA's assembler, so a CPU machine can tell. `pytest -s tests/test_kernels_aot.py`
prints the table; sm_80 and sm_90 at D = 64 and 128 always run, other chips and dimensions are slow.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import kernels

triton = pytest.importorskip("triton", reason="triton is not installed here")
if kernels.INTERPRET:
    pytest.skip("TRITON_INTERPRET: nothing is compiled in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

# a program's limit; CUDA C++ guide, table of limits
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# what every launch passes, whatever the dtype of the activations
POINTERS = {"cu_seqlens": "i32", "labels": "i64", "seed": "i64"}
POINTERS |= dict.fromkeys(["lse", "delta", "slopes", "rope", "losses", "correct"], "fp32")
SCALARS = dict.fromkeys(["width", "half", "dropped", "stride", "n_tokens", "n_tiles", "n_columns",
                         "n_documents"], "i32") | {"scale": "fp32"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_for(chip, kernel, options, dtype):
    """Compile as the launch would: pointers and row strides divisible by 16."""
    constants = {k: v for k, v in options.items() if k in kernel.arg_names}
    signature, hints = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = SCALARS.get(name) or "*" + POINTERS.get(name, dtype)
        if name in ("stride", "width", "half", "n_columns") or signature[name][0] == "*":
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    launch = {k: v for k, v in options.items() if k not in constants}
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=launch)


def attention_rows(chip, D, dtype, **changes):
    """(kernel, options) of every attention kernel that can be launched on this chip at this head
    dimension; slopes=None or rope=None in `changes`: without ALiBi, without RoPE."""
    rope = "rope" not in changes
    config = kernels._attention_config(DTYPES[dtype], D, (chip // 10, chip % 10), rope)
    names = ["fwd", "dq", "dkdv"] + ["rope", "rope back"] * rope
    launches = [(name, 1000) for name in names]
    launches += [(name, n) for n in (64, 128) if n <= config["one_tile"] for name in ("fwd", "bwd")]
    for name, n in launches:
        kernel, options = kernels._attention_options(name, config, D, n)
        loop = {"rope": None} if "HELD" in options else {}  # _rope_rows has turned q and k before
        yield kernel, options | {"H": 12, "D": D} | loop | changes


def other_rows():
    yield kernels._zero_slack, {"BLOCK": 1024} | kernels.FUSION
    yield kernels._cross_entropy_rows, kernels.CROSS_ENTROPY_OPTIONS | {"WRITE": True}
    for seed in ({}, {"seed": None}):  # with dropout, without
        yield kernels._geglu, kernels.GEGLU_OPTIONS | {"BACKWARD": False, "dout": None} | seed
        yield kernels._geglu, kernels.GEGLU_OPTIONS | {"BACKWARD": True} | seed


def check(chip, rows, dtype, tmp_path, wgmma=False):
    bad = []
    for kernel, options in rows:
        compiled = compile_for(chip, kernel, options, dtype)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [CUOBJDUMP, "-res-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{x}:(\d+)", usage)[1]) for x in ("REG", "STACK"))
        shared = compiled.metadata.shared / 1024
        has_wgmma = "wgmma" in compiled.asm["ptx"]
        dots = "tt.dot" in compiled.asm["ttir"]
        row = (f"sm_{chip:<3} {kernel.__name__[1:]:19} {dtype}: {registers:3} registers, {stack} "
               f"bytes spilled, {shared:5.1f} KB shared{', wgmma' * has_wgmma}; {options}")
        print(row)
        if stack or shared > SHARED_KB[chip] or (wgmma and dots and not has_wgmma):
            bad.append(row)
    assert not bad, "\n".join(["these settings spill, do not fit, or miss wgmma:", *bad])


def slow(*values) -> list:
    return [pytest.param(x, marks=pytest.mark.slow) for x in values]


CHIPS = [80, 90, *slow(86, 89, 100, 120)]


@pytest.mark.parametrize("D", [64, 128, *slow(16, 32, 96)])
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("changes", [dict(rope=None), {}], ids=["ALiBi", "ALiBi and RoPE"])
def test_attention(chip, D, changes, tmp_path):
    check(chip, attention_rows(chip, D, "bf16", **changes), "bf16", tmp_path, wgmma=chip == 90)


@pytest.mark.parametrize("changes", [{}, dict(rope=None)], ids=["RoPE", "no positions"])
def test_attention_without_alibi(changes, tmp_path):
    check(90, attention_rows(90, 64, "bf16", slopes=None, **changes), "bf16", tmp_path, wgmma=True)


@pytest.mark.parametrize("dtype", ["bf16", *slow("fp16", "fp32")])
@pytest.mark.parametrize("chip", CHIPS)
def test_cross_entropy_geglu_and_slack(chip, dtype, tmp_path):
    check(chip, other_rows(), dtype, tmp_path)


def test_row_offsets_have_64_bits():
    """Row times width passes 2^31 at 70,000 rows of 30,528: 32 bits are for block sizes alone."""
    for kernel, options in other_rows():
        code = compile_for(90, kernel, options, "bf16").asm["ttir"]
        constants = set(re.findall(r"(%\S+) = arith\.constant", code))
        for a, b, kind in re.findall(r"arith\.muli (%\S+), (%\S+) : (\S+)", code):
            assert "i64" in kind or {a, b} & constants, f"{kernel.__name__}: {a} * {b} in {kind}"


@pytest.mark.slow
@pytest.mark.parametrize("chip", SHARED_KB)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_attention_without_positions_in_other_dtypes(chip, dtype, tmp_path):
    rows = attention_rows(chip, 64, dtype, slopes=None, rope=None)
    check(chip, rows, dtype, tmp_path, wgmma=chip == 90 and dtype == "fp16")
    check(chip, attention_rows(chip, 128, "fp32"), "fp32", tmp_path)
