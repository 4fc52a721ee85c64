"""What a script runs on and how it is called: device, dtype, speed, git revision, command lines.

torch and tyro are imported where they are needed: scripts that use neither start at once.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from records import make_folder, to_json, write_atomically

if TYPE_CHECKING:
    import torch

PEAK_BF16_TFLOPS = {  # dense, from the data sheets; part of the GPU's name (the first that fits)
    "H200 NVL": 835.5, "H200": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4,
    "A100": 312.0, "GB200": 2500.0, "B200": 2250.0, "L40S": 362.0, "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def read_command_line(config: type, args: list[str] | None = None, positional=False) -> Any:
    """A `config` from the command line `args`, default sys.argv[1:]. tyro says what does not fit,
    exit code 2; --help begins with the docstring of config's file. `positional`: required fields
    are given without --name."""
    import tyro

    file = sys.modules[config.__module__]
    prog = file.__spec__ and f"python -m {file.__spec__.name}"
    # a switch has one flag: --no_x where x is on by default, else --x
    options = [tyro.conf.FlagCreatePairsOff] + [tyro.conf.PositionalRequiredArgs] * positional
    return tyro.cli(config, args=args, prog=prog, description=file.__doc__, use_underscores=True,
                    config=options)


def script(run: Callable[[Any], Any], config: type, positional=False, resumes=False
           ) -> Callable[..., Any]:
    """main(args): `run` with read_command_line(config, args, positional). Its ValueErrors and
    OSErrors are the user's to mend: they end the process with one line. `resumes`: the same command
    again goes on after an error or Ctrl-C."""
    def main(args: list[str] | None = None) -> Any:
        cfg = read_command_line(config, args, positional)
        try:
            return run(cfg)
        except (ValueError, OSError, BrokenProcessPool) as e:  # the last: a worker out of memory
            again = "; once that is mended the same command continues"
            again *= resumes and not isinstance(e, ValueError)
            raise SystemExit(f"error: {e}".splitlines()[0] + again) from None
        except KeyboardInterrupt:
            if resumes:
                raise SystemExit("stopped; the same command continues") from None
            raise

    return main


def peak_tflops(gpu: str) -> float | None:
    """Dense bf16 TFLOP/s of the GPU of this name; None: not in the table."""
    return next((peak for part, peak in PEAK_BF16_TFLOPS.items() if part in gpu), None)


def processes() -> tuple[int, int]:
    """This process's number and how many there are: torchrun's RANK and WORLD_SIZE, else 0, 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device(kind: str) -> torch.device:
    """The device called `kind`; "auto": the best there is. torchrun's processes take the GPUs in
    turn. ValueError if it is missing."""
    import torch

    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if kind == "auto":
        kind = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    if not {"cuda": has_cuda, "mps": has_mps, "cpu": True}[kind]:
        raise ValueError(f"--device {kind}: torch sees no {kind.upper()} device")
    if kind == "cpu":  # batches of new shapes compile matmuls; the 1,024 oneDNN keeps fill 3 GB
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    if kind == "cuda":
        rank = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(kind)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto": bf16 where the hardware multiplies it (CUDA; CPUs with AMX
    or AVX512-BF16, where it is about 6 times as fast), else fp32."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    fast = device.type == "cuda" or (device.type == "cpu" and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()))
    return torch.bfloat16 if fast else torch.float32


def git_revision() -> str:
    """Short hash of the checkout, with "+" when files are changed; "unknown" outside git."""
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    how = dict(cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL)
    try:
        return subprocess.check_output(describe, **how).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    """The GPU's name, else the device's type: what a run says it ran on."""
    if device.type != "cuda":
        return device.type
    import torch

    return torch.cuda.get_device_name(device).removeprefix("NVIDIA ")


def hardware_name(device: torch.device) -> str:
    """The GPU's name, else the processor's: what timings are of."""
    if device.type == "cuda":
        return device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def failure(error: Exception) -> str:
    """Kind of the error and its first lines: what a benchmark lists a failed contender with."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def report_path(mode: str, device: torch.device, out: str = "") -> Path:
    """Where a benchmark's report goes: `out` or results/<mode>-<device>.json. BadInput if it cannot
    be written there: call this before the work too."""
    slug = re.sub(r"[^a-z0-9]+", "-", hardware_name(device).lower()).strip("-")
    path = Path(out or Path(__file__).parent / "results" / f"{mode}-{slug}.json")
    make_folder(path.parent, "give another --out")
    return path


def write_report(mode: str, body: dict, device: torch.device, out: str = "") -> Path:
    """Write a benchmark's `body` under a header (device, versions, revision, command, time) where
    report_path() says; returns that."""
    import torch

    from kernels import TRITON_VERSION

    header = {"device": hardware_name(device), "torch": torch.__version__, "triton": TRITON_VERSION,
              "revision": git_revision(), "command": shlex.join(["python", *sys.orig_argv[1:]]),
              "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    path = report_path(mode, device, out)
    write_atomically(path, to_json(header | body))
    return path
