"""What this machine has and what it is running: device, fast dtype, peak speed, git revision; a benchmark's report."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from kernels import TRITON_VERSION

PEAK_BF16_TFLOPS = {  # dense, from the data sheets; part of the GPU's name (the first that fits) -> its peak
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_tflops(gpu: str) -> float | None:
    """Dense bf16 TFLOP/s of the GPU of this name; None where it is not in the table."""
    return next((peak for part, peak in PEAK_BF16_TFLOPS.items() if part in gpu), None)


def pick_device(kind: str, local_rank: int = 0) -> torch.device:
    """The device called `kind`; "auto": the best there is. Ranks take the GPUs in turn. ValueError if it is missing."""
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch sees no MPS device")
    if kind == "cpu":  # a step needs some 60 compiled matmuls, most batches new ones; oneDNN's 1,024 fill 3 GB
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
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


def device_name(device: torch.device) -> str:
    """The GPU's name, else the device's type: what a run says it ran on."""
    return torch.cuda.get_device_name(device).removeprefix("NVIDIA ") if device.type == "cuda" else device.type


def hardware_name(device: torch.device) -> str:
    """The GPU's name, else the processor's: what timings are of."""
    if device.type == "cuda":
        return device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def failure(error: Exception) -> str:
    """What a failed contender is listed with: the kind of the error and its first line, cut at 200 characters."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def write_report(mode: str, body: dict, device: torch.device, out: str = "") -> Path:
    """Write `body` under a header (device, versions, revision, command, time) as JSON, whole or not at all; where to:
    `out`, or results/<mode>-<device>.json. Returns the path. Each bench_<mode>.py's run(cfg) calls it at its end, or
    whenever a part is done: print(f"wrote {write_report('step', body, device, cfg.out)}"). SystemExit, one line, if it
    cannot be written."""
    header = {
        "device": hardware_name(device),
        "torch": torch.__version__,
        "triton": TRITON_VERSION,
        "revision": git_revision(),
        "command": shlex.join(["python", *sys.argv]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    slug = re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-")
    path = Path(out or Path(__file__).parent / "results" / f"{mode}-{slug}.json")
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(header | body, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        raise SystemExit(f"error: the report cannot be written: {error}") from None
    return path
