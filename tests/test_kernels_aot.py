"""Every launch setting of kernels.py compiles ahead of time for every supported chip, without a GPU: no register
spills, shared memory within the chip's limit, and wgmma (Hopper's matrix instructions) on sm_90.

Triton ships NVIDIA's assembler, so a CPU machine can tell. `pytest -s tests/test_kernels_aot.py` prints the table;
sm_80 and sm_90 at D = 64 and 128 always run, the other chips and dimensions are marked slow.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import kernels

triton = pytest.importorskip("triton", reason="triton is not installed here")
if kernels.INTERPRET:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # a program's limit; CUDA C++ guide, table of limits
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# what every launch passes, whatever the dtype of the activations
POINTERS = {"cu_seqlens": "i32", "tiles": "i32", "indices": "i64", "labels": "i64"} | dict.fromkeys(
    ["lse", "delta", "slopes", "mean", "rstd", "weight", "bias", "dweight", "dbias", "losses", "correct"], "fp32"
)
SCALARS = {"scale": "fp32", "eps": "fp32", "z_loss": "fp32"} | dict.fromkeys(
    ["n", "width", "stride", "n_tokens", "n_tiles", "n_rows", "n_columns", "n_documents", "ignore_index"], "i32"
)


def compile_for(chip, kernel, options, dtype):
    """Compile as the launch would: pointers and row strides divisible by 16. Returns the compiled kernel."""
    constants = {k: v for k, v in options.items() if k in kernel.arg_names}
    signature, hints = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = SCALARS.get(name) or "*" + POINTERS.get(name, dtype)
        if name in ("stride", "width", "n_columns") or signature[name][0] == "*":
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    launch = {k: v for k, v in options.items() if k not in constants}
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=launch)


def attention_rows(chip, D, dtype):
    """(kernel, options) of every attention kernel that can be launched on this chip at this head dimension."""
    capability = (chip // 10, chip % 10)
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    config = kernels._attention_config(torch_dtype, D, capability)
    launches = [(kernels._attn_fwd_loop, "fwd", 1000)]
    launches += [(kernels._attn_bwd_loop, name, 1000) for name in ("dq", "dkdv")]
    for n in (64, 128):
        if n <= config["one_tile"]:
            launches += [(kernels._attn_fwd_one_tile, "fwd", n), (kernels._attn_bwd_one_tile, "", n)]
    for kernel, name, n in launches:
        _, split, options = kernels._attention_constants(kernel, name, config, D, torch_dtype, n)
        yield kernel, options | {"ALIBI": True, "H": 12, "SPLIT": split}


def check(chip, rows, dtype, tmp_path, wgmma=False):
    bad = []
    for kernel, options in rows:
        compiled = compile_for(chip, kernel, options, dtype)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{x}:(\d+)", usage)[1]) for x in ("REG", "STACK"))
        shared = compiled.metadata.shared / 1024
        has_wgmma = "wgmma" in compiled.asm["ptx"]
        name = kernel.__name__.strip("_") + {True: " dkdv", False: " dq"}.get(options.get("KEYS"), "")
        shape = "x".join(str(options[k]) for k in ("BLOCK", "HELD", "STEP", "ROWS") if k in options)
        row = (
            f"sm_{chip:<3} {name:18} {dtype} D {options.get('D', '-'):<3} tile {shape:8} "
            f"warps {options.get('num_warps', 4)} stages {options.get('num_stages', 3)}: {registers:3} registers, "
            f"{stack} bytes spilled, {shared:5.1f} KB shared{', wgmma' * has_wgmma}"
        )
        print(row)
        if stack or shared > SHARED_KB[chip] or (wgmma and not has_wgmma):
            bad.append(row)
    assert not bad, "\n".join(["these settings spill, do not fit, or miss wgmma:", *bad])


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("chip", [80, 90])
def test_attention(chip, D, tmp_path):
    check(chip, attention_rows(chip, D, "bf16"), "bf16", tmp_path, wgmma=chip == 90)


def pointwise_rows():
    """(kernel, options) at the widths of mosaic-base: d 768, feed-forward 3072, vocabulary 30528; and wider."""
    yield kernels._zero_slack, {"BLOCK": 1024} | kernels.FUSION
    for scatter in (False, True):
        yield kernels._copy_rows, {"SCATTER": scatter, "ROWS": 4, "BLOCK": 1024} | kernels.FUSION
    for kernel in (kernels._geglu_fwd, kernels._geglu_bwd):
        yield kernel, {"BLOCK": 1024} | kernels.FUSION
    for width in (768, 4096):
        for kernel in (kernels._layer_norm_fwd, kernels._layer_norm_bwd):
            yield kernel, kernels._layer_norm_options(width) | {"RESIDUAL": True}
    yield kernels._cross_entropy_rows, kernels._cross_entropy_options(30528) | {"WRITE": True}


@pytest.mark.parametrize("chip", [80, 90])
def test_pointwise(chip, tmp_path):
    check(chip, pointwise_rows(), "bf16", tmp_path)


def test_row_offsets_of_the_pointwise_kernels_have_64_bits():
    """Row times width passes 2^31 with 700,000 tokens of 3,072: only a block size may be multiplied in 32 bits."""
    for kernel, options in pointwise_rows():
        code = compile_for(90, kernel, options, "bf16").asm["ttir"]
        constants = set(re.findall(r"(%\S+) = arith\.constant", code))
        for a, b, kind in re.findall(r"arith\.muli (%\S+), (%\S+) : (\S+)", code):
            assert "i64" in kind or {a, b} & constants, f"{kernel.__name__}: {a} * {b} in {kind}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("chip", SHARED_KB)
def test_pointwise_on_every_chip(chip, dtype, tmp_path):
    check(chip, pointwise_rows(), dtype, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("D", [16, 32, 64, 96, 128])
@pytest.mark.parametrize("chip", SHARED_KB)
def test_attention_on_every_chip(chip, D, tmp_path):
    check(chip, attention_rows(chip, D, "bf16"), "bf16", tmp_path, wgmma=chip == 90)


@pytest.mark.slow
@pytest.mark.parametrize("chip", SHARED_KB)
def test_attention_without_alibi_and_tile_table(chip, tmp_path):
    rows = [(k, o | {"ALIBI": False, "SPLIT": 0}) for k, o in attention_rows(chip, 64, "fp16")]
    check(chip, rows, "fp16", tmp_path, wgmma=chip == 90)


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("chip", SHARED_KB)
def test_attention_in_fp32(chip, D, tmp_path):
    check(chip, attention_rows(chip, D, "fp32"), "fp32", tmp_path)
