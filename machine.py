"""What this machine has and what it is running: device, fast dtype, peak speed, git revision."""

import subprocess
from pathlib import Path

import torch

PEAK_BF16_TFLOPS = {  # dense, from the data sheets; part of the GPU's name -> its peak
    "H200": 989.4,
    "H100": 989.4,
    "A100": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def pick_device(kind: str, local_rank: int = 0) -> torch.device:
    """The device called `kind`; "auto": the best there is. Ranks take the GPUs in turn. ValueError if it is missing."""
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch sees no MPS device")
    if kind == "cuda":
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(kind)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto": bf16 where the hardware multiplies it (CUDA; CPUs with AMX or AVX512-BF16, where
    it is about 6 times as fast), else fp32."""
    if name != "auto":
        return getattr(torch, name)
    fast_cpu = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if device.type == "cuda" or fast_cpu else torch.float32


def git_revision() -> str:
    """Short hash of the checkout, with "+" when files are changed; "unknown" outside git."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
