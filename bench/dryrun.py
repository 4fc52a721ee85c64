"""What a GPU would be asked to do, without one: pretrain.py's loop on tensors without numbers.

    python -m bench.dryrun mosaic-base --layers 2              # eager; 7 s
    python -m bench.dryrun mosaic-base --layers 12 --compile   # through Inductor; a minute

The real pretrain.train() makes two steps, each with an evaluation and a checkpoint. torch.cuda
answers as if the chip were there, tensors on it are fake, host work is real, Triton launches are
counted. Milliseconds are MODELLED: of each launch the longest of its bytes at 90 % of the chip's
bandwidth, its FLOPs at 70 % of its bf16 peak (GEMMs of these sizes in public tables of H100 and
H200), its instructions through the narrowest of the chip's pipes (Triton kernels, which are
compiled for it) and 2 us. Bytes: its arguments, each once; attention counts full windows.

Errors: a wait of the host for the GPU other than one a line of the log, evaluation or checkpoint, a
blocking copy in a step, an operation without a CUDA kernel. Needs g++.
"""

import ctypes
import functools
import io
import json
import math
import re
import runpy
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections import Counter, defaultdict
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

import checkpoint
import kernels
import model
import pretrain
import recipes
import runlog
from bench.step import open_data
from machine import peak_tflops, report_path, script, write_report

try:
    import triton
    from triton.runtime.jit import JITFunction, MockTensor
except ImportError:
    raise SystemExit("error: the dry run needs triton, which is not installed here") from None

ROOT = Path(__file__).resolve().parents[1]
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CHIPS = {  # compute capability, multiprocessors, GHz under load, TB/s: data sheets
    "H200": (90, 132, 1.755, 4.8), "H100": (90, 132, 1.755, 3.35), "A100": (80, 108, 1.41, 2.04),
    "B200": (100, 148, 1.85, 8.0), "L40S": (89, 142, 2.52, 0.864),
    "RTX 4090": (89, 128, 2.52, 1.01)}
# instructions of warps that a multiprocessor takes in a clock (CUDA C++ guide, throughput of 9.0):
# of any kind, of integers and conversions, of products of integers, of memory, special functions
PIPES = {4: "", 2: "LOP3 PLOP3 IADD3 IADD ISETP SHF SEL FSEL FSETP FMNMX PRMT LEA IMNMX VIADD "
         "VIMNMX I2FP F2FP IABS SGXT BMSK MOV", 2.0001: "IMAD", 1: "LDG STG LDS STS LD ST SHFL",
         0.5: "MUFU I2F F2I F2F FRND POPC"}
WAITING = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "bincount"}
FREE = {"detach", "lift_fresh", "_unsafe_view", "_reshape_alias", "device"}  # without a kernel
COLUMNS = ("phase", "kernel", "launches", "gb", "tflop", "ms")  # of a micro-batch
SCALES = np.array([1, 1e-9, 1e-12, 1e3])
IN_A_STEP = ("masking", "forward", "backward", "optimizer", "loop")


@dataclass
class Config:
    preset: str
    layers: int = 0  # 0: the preset's
    compile: bool = False
    micro_tokens: int = 0  # 0: the preset's
    chip: str = "H200"
    out: str = ""  # default: results/dryrun-<preset>-<layers>-<eager or compiled>-<chip>.json


def install_fake_device() -> None:
    """Compile and load fake_cuda.cpp. SystemExit, one line, without a compiler."""
    source, there = Path(__file__).with_name("fake_cuda.cpp"), Path(torch.__file__).parent
    links = f"-I{there}/include", f"-L{there}/lib", "-lc10", "-ltorch_cpu"
    with tempfile.NamedTemporaryFile(suffix=".so") as library:
        command = ["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", library.name, *links]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise SystemExit("error: the dry run needs g++ (apt install g++)") from None
        except subprocess.CalledProcessError:
            problem = f"torch {torch.__version__} has no CUDA code that fake_cuda.cpp fits"
            raise SystemExit(f"error: {problem}; the dry run is known to work with 2.13") from None
        ctypes.CDLL(library.name).install()


def pretend(chip: str) -> None:
    """Make torch.cuda and Triton answer as on a machine with this chip. For the whole process."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    def pin(tensor):
        (pinned := tensor.clone()).is_pinned_here = True
        return pinned

    install_fake_device()
    sm, processors, *_ = CHIPS[chip]
    properties = SimpleNamespace(
        name=chip, major=sm // 10, minor=sm % 10, multi_processor_count=processors, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, gcnArchName="")
    answers = dict(
        is_available=True, device_count=1, current_device=0, set_device=None, synchronize=None,
        _lazy_init=None, get_device_properties=properties, set_rng_state=None,
        is_current_stream_capturing=False,
        get_rng_state=torch.zeros(16, dtype=torch.uint8),
        current_stream=SimpleNamespace(cuda_stream=0, device_index=0))
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.device = torch.cuda.device_of = torch.cuda._DeviceGuard = nullcontext
    torch._C._ensureCUDADeviceGuardSet = fake_tensor.init_gpu_context = lambda *_: None
    FakeTensorMode.avoid_device_init = True
    torch.Tensor.pin_memory, torch.nn.Module.to = pin, move
    target = GPUTarget("cuda", sm, 32)
    driver.set_active(SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, is_active=lambda: True,
        get_current_stream=lambda *_: 0, get_active_torch_device=lambda: torch.device("cuda", 0)))


def move(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Module.to, which cannot turn a real parameter into a fake one. Tied weights stay tied."""
    moved = functools.cache(lambda x: torch.nn.Parameter(x.detach().to(device)))
    for m in module.modules():
        m._parameters.update({k: moved(x) for k, x in m._parameters.items() if x is not None})
        m._buffers.update({k: x.to(device) for k, x in m._buffers.items() if x is not None})
    return module


def fused_attention(q, k, v, attn_mask, dropout_p):
    """F.scaled_dot_product_attention as on a chip, where BERT's mask leads to cuDNN's kernel or to
    this one, of the same bytes and FLOPs. Without a driver PyTorch writes the scores out instead.
    """
    bias = torch.where(attn_mask, 0.0, -torch.inf).to(q.dtype).expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, torch.is_grad_enabled(), dropout_p)[0]


def count_instructions(kernel) -> tuple[np.ndarray, np.ndarray, int]:
    """Clocks of a warp in each of PIPES: outside of loops, in one trip through each loop; and the
    bytes that spill."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        text = subprocess.run([CUOBJDUMP, "-res-usage", "-sass", file.name], capture_output=True,
                              text=True, check=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)(.*?);", text)
    code = [(int(at, 16), name, rest) for at, name, rest in found]
    end = max(at for at, name, _ in code if name == "EXIT")
    jumps = [(int(to[1], 16), at) for at, name, rest in code if name == "BRA" and at < end
             and (to := re.search(r"0x([0-9a-f]+)", rest))]
    counts = [Counter(), Counter()]
    for at, name, _ in code:
        if at <= end:
            counts[any(first <= at <= last for first, last in jumps)][name] += 1
    unrolled = max(1, counts[1]["LDG"] // max(1, kernel.asm["ptx"].count("ld.global")))
    once, loop = (np.array([sum(n for name, n in count.items() if not of or name in of.split())
                            / rate for rate, of in PIPES.items()]) for count in counts)
    return once, loop / unrolled, int(re.search(r"STACK:(\d+)", text)[1])


def through_inductor(recorder: "Recorder") -> None:
    """torch.compile as it is, up to the launch of the kernels that Inductor has generated."""
    import torch._C._dynamo.guards as guards
    import torch._inductor.config as config
    from torch._inductor.fx_passes import pad_mm
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner, GridExpr

    def launch(tuner, *args, **_):
        meta = tuner.inductor_meta

        def clocks(config, kernel):
            known = dict(zip(tuner.fn.arg_names, args)) | config.kwargs
            grid = GridExpr.from_meta(meta, config).eval_slow(known)
            trips = known.get("r0_numel", 1) / known.get("R0_BLOCK", np.inf)
            trips = known["RSPLIT_SIZE"] / known["XBLOCK"] if "RSPLIT_SIZE" in known else trips
            return recorder.clocks(kernel, grid, max(1, trips))

        def fastest():  # as autotuning would have it
            if not hasattr(tuner, "compiled"):
                tuner.compiled = [tuner._precompile_config(c).kernel for c in tuner.configs]
            return min(map(clocks, tuner.configs, tuner.compiled))

        recorder.launch(meta["kernel_name"], int(1e9 * (meta.get("kernel_num_gb") or 0)),
                        clocks=fastest)

    config.compile_threads, config.force_disable_caches = 1, True
    config.benchmark_kernel = True  # each kernel then knows the bytes it moves
    pad_mm._should_pad = lambda *_, **__: False  # it would time both on the device
    triton_helpers.set_driver_to_gpu = lambda: None  # ours is active
    torch._C._cuda_getCurrentRawStream = lambda *_: 0
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda")
    guards._reinterpret_tensor = lambda x, size, stride, offset=0: x.as_strided(
        size, stride, x.storage_offset() + offset)
    config.joint_graph_constant_folding = False  # it computes constants on the device
    CachingAutotuner.precompile, CachingAutotuner.run = lambda *_, **__: None, launch


class Recorder(TorchDispatchMode):
    """Counts what runs on the fake device, by phase. Work of the host is done for real."""

    is_infra_mode = classmethod(lambda cls: True)  # under other modes Dynamo compiles nothing

    def __init__(self, chip: str):
        super().__init__()
        _, processors, ghz, bandwidth = CHIPS[chip]
        # bytes, FLOPs, clocks of a multiprocessor in a second
        self.rates = 0.9e12 * bandwidth, 0.7e12 * peak_tflops(chip), 1e9 * ghz * processors
        self.code, self.in_op = {}, False  # what was counted in the kernels compiled
        self.phase, self.calls, self.waits, self.unexpected = "setup", *(Counter() for _ in "123")
        self.kernels = defaultdict(lambda: np.zeros(4))  # launches, bytes, FLOPs, seconds
        self.storages, self.live, self.fixed, self.peak = WeakIdKeyDictionary(), 0, 0, 0  # bytes
        ops = [x for x in vars(kernels).values() if isinstance(x, torch.library.CustomOpDef)]
        self.bodies = {op._qualname: op._init_fn for op in ops}

    def within(self, phase: str, function):
        """`function`, whose kernels and waits belong to this phase where the loop calls it."""
        def run(*args, **kwargs):
            self.calls[phase] += 1
            before = self.phase
            self.phase = phase if before in ("setup", "loop") else before
            self.fixed = self.live if self.phase == phase == "forward" else self.fixed
            result = function(*args, **kwargs)
            self.phase = "loop" if phase == "optimizer" else before
            return result

        return run

    def note(self, what: str) -> None:
        """Something unexpected, with the innermost lines of the project that it came from."""
        own = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT][-2:]
        lines = " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in own)
        self.unexpected[f"{self.phase}: {what} at {lines or 'autograd'}"] += 1

    def wait(self, what: str) -> None:
        self.waits[self.phase] += 1
        if self.phase in IN_A_STEP or self.waits[self.phase] > self.calls[self.phase]:
            self.note(f"wait ({what})")

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the host gets to see."""
        self.wait("copy to the host")
        with unset_fake_temporarily():
            return torch.ones(tensor.shape, dtype=tensor.dtype)

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the memory of a tensor as long as anything refers to it."""
        storage = tensor.untyped_storage()
        if storage not in self.storages:
            self.storages[storage] = size = -(-storage.nbytes() // 512) * 512  # as the allocator
            self.add(size)
            weakref.finalize(storage, self.add, -size)

    def add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def clocks(self, kernel, grid: tuple, trips: float) -> float:
        """Clocks of one multiprocessor that a launch takes in the narrowest pipe, each of the
        kernel's loops making `trips`."""
        if kernel.hash not in self.code:
            self.code[kernel.hash] = once, loop, stack = count_instructions(kernel)
            if stack:
                self.unexpected[f"{kernel.name} spills {stack} bytes"] += 1
        once, loop, _ = self.code[kernel.hash]
        return math.prod(grid) * kernel.metadata.num_warps * (once + trips * loop).max()

    def launch(self, name: str, moved: int, flops: int = 0, clocks=lambda: 0) -> None:
        """A kernel. What runs in less than 10 us by its bytes is not compiled."""
        seconds = max(moved / self.rates[0], flops / self.rates[1], 2e-6)
        if seconds > 1e-5 and self.phase in IN_A_STEP:
            seconds = max(seconds, clocks() / self.rates[2])
        self.kernels[self.phase, name] += (1, moved, flops, seconds)

    def own(self, kernel, *args, grid: tuple, warmup: bool, **options) -> None:
        """A Triton kernel of kernels.py. Of an op the first one gets all of its bytes and FLOPs."""
        def clocks():
            known = dict(zip(kernel.arg_names, args)) | options
            loop = known["n_columns"] / known["BLOCK"] if "n_columns" in known else 0
            dtypes = [x.dtype if torch.is_tensor(x) else x for x in args]
            compiled = self.compile(kernel, *map(MockTensor.wrap_dtype, dtypes), grid=grid,
                                    warmup=True, **options)
            return self.clocks(compiled, grid, loop)

        (moved, flops), self.of_op = self.of_op, (0, 0)
        self.launch(kernel.__name__, moved, flops, clocks)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        leaves = tree_leaves((args, kwargs))
        inputs = [x for x in leaves if torch.is_tensor(x)]
        on_gpu = any(x.is_cuda for x in inputs)
        to_gpu = any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves)
        if not to_gpu and not any(isinstance(x, FakeTensor) for x in inputs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            self.wait("item")
            return 1.0 if inputs[0].is_floating_point() else 1
        by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in inputs[1:])
        if on_gpu and (name in WAITING or by_mask):
            self.note(f"wait ({name})")
            if not name.startswith("index_put"):  # a shape that depends on numbers: here is the end
                raise RuntimeError(f"the host waits for the GPU: {'; '.join(self.unexpected)}")
        out = func(*args, **kwargs)
        if name == "_to_copy" and on_gpu and not out.is_cuda:
            return self.to_host(out)
        from_host = name in ("_to_copy", "copy_") and not inputs[-1].is_cuda
        if from_host and self.phase in IN_A_STEP and not hasattr(inputs[-1], "is_pinned_here"):
            self.note("blocking copy")
        for x in tree_leaves(out):
            if torch.is_tensor(x) and x.is_cuda and not self.in_op:
                self.hold(x)
        given = {a.name: x for a, x in zip(func._schema.arguments, args)} | kwargs
        written = [given.get(a.name) for a in func._schema.arguments
                   if a.alias_info and a.alias_info.is_write and a.name != "out"]
        new = [x for x in tree_leaves(out) if all(x is not y for y in inputs)]
        read = [] if name.startswith("new_") or name.endswith("_like") else inputs
        moved = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
                    for x in [*read, *tree_leaves(written), *new] if torch.is_tensor(x))
        if func._schema.name in self.bodies:  # of kernels.py: its own body makes the launches
            if not given.get("use_triton", True):
                self.note(f"{name} without a CUDA kernel")
            self.of_op = moved, 0
            if "qkv" in given:  # attention: two matmuls forward, five backward
                per_pair, n = (10 if "dout" in given else 4), given["max_seqlen"]
                unread = given["out"].nbytes if "dout" in given and n <= 128 else 0
                self.of_op = moved - unread, per_pair * given["qkv"].numel() // 3 * n
            self.in_op = True  # its results are held already
            with self:
                self.bodies[func._schema.name](*args, **kwargs)
            self.in_op = False
        elif not func.is_view and name not in FREE and "empty" not in name:
            flops = flop_registry.get(func._overloadpacket, lambda *_, **__: 0)(*args, out_val=out)
            if "mm" in name:
                a, b = [x for x in args if torch.is_tensor(x)][-2:]
                name = f"{name} {' x '.join(map(str, (*a.shape, b.shape[-1])))}"
            self.launch(name, moved, flops)
            if torch.version.cuda and not torch._C._dispatch_has_computed_kernel_for_dispatch_key(
                    func.name(), "CUDA"):
                self.note(f"{func.name()} has no CUDA kernel")
        return out


def start(chip: str) -> Recorder:
    """The chip is there, and what is asked of it recorded. For the whole process."""
    pretend(chip)
    recorder = Recorder(chip)
    recorder.compile = JITFunction.run
    JITFunction.run = lambda *args, **options: recorder.own(*args, **options)
    FakeTensor.tolist = lambda tensor: recorder.to_host(tensor).tolist()
    model.save_file = torch.save = lambda weights, path, **_: Path(path).write_bytes(b"")
    through_inductor(recorder)
    return recorder


def rehearse(module: str, *args: str) -> None:
    """`python -m module args` as on an H200, without numbers: does it run through?"""
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda _: 1.0)
    torch.cuda.Event, torch.cuda._sleep = (lambda **_: event), (lambda _: None)
    torch.accelerator.synchronize = lambda: None
    recorder, sys.argv = start("H200"), [module, *args]
    with FakeTensorMode(allow_non_fake_inputs=True), recorder:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def dry_run(cfg: Config) -> dict:
    """Two steps of two micro-batches with an evaluation and a checkpoint after each, and what they
    asked of the chip. Once a process. ValueError, one line, for what it does not know."""
    presets = recipes.make_presets()
    for flag, value, known in (("--chip", cfg.chip, CHIPS), ("--preset", cfg.preset, presets)):
        if value not in known:
            raise ValueError(f"{flag} {value}: choose from {', '.join(known)}")
    recorder, wrap = start(cfg.chip), pretrain.wrap
    pretrain.wrap = lambda *args: recorder.within("forward", wrap(*args))
    for phase, owner, name in [
        ("masking", pretrain, "mask_tokens"), ("masking", pretrain, "model_inputs"),
        ("backward", torch.Tensor, "backward"), ("optimizer", torch.optim.AdamW, "step"),
        ("optimizer", torch.optim.Muon, "step"), ("evaluation", pretrain, "evaluate"),
        ("checkpoint", checkpoint.State, "is_finite"), ("log", runlog.RunLog, "train")]:
        setattr(owner, name, recorder.within(phase, getattr(owner, name)))
    torch.nn.functional.scaled_dot_product_attention = fused_attention
    corpus, tokenizer = open_data("")  # random ids in documents as long as C4's
    corpus.n_tokens = int(corpus.lengths.sum())
    tokenizer.save = tokenizer.same_as = lambda _: None
    checkpoint.Corpus, checkpoint.corpus_digests = lambda *_: corpus, lambda *_: ["random ids"]
    checkpoint.Tokenizer = SimpleNamespace(load=lambda _: tokenizer)

    preset = presets[cfg.preset][1]
    preset = replace(preset, micro_tokens=cfg.micro_tokens or preset.micro_tokens)
    shape = replace(preset.model, n_layers=cfg.layers or preset.model.n_layers)
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        settings = replace(
            preset, model=shape, data=("random ids",), out=folder, max_steps=2, max_minutes=0,
            max_tokens=0, batch_tokens=2 * preset.micro_tokens, device="cuda", eval_every=1,
            compile="on" if cfg.compile else "off", checkpoint_every=1, log_every=1,
            eval_tokens=32_768, pppl_tokens=64)
        with FakeTensorMode(allow_non_fake_inputs=True), recorder:
            try:
                run = pretrain.train(cfg.preset, settings)
            except RuntimeError as error:
                raise SystemExit(f"error: {error}") if recorder.unexpected else error from None
        if recorder.calls["evaluation"] < 2:  # only a signal ends it earlier
            raise SystemExit("error: the dry run was stopped before its second step")
        header = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    times = dict.fromkeys(IN_A_STEP, recorder.calls["backward"])  # the optimizer's are the preset's
    times["optimizer"] = recorder.calls["optimizer"] * preset.batch_tokens / preset.micro_tokens
    # of these micro-batches 2 of 5 add to a gradient that is there
    adding = (1 - preset.micro_tokens / preset.batch_tokens) / 0.4
    scales = {("backward", "add_"): adding} | {("optimizer", x): 0 for x in ("zeros", "zeros_like")}
    totals = {key: sums * SCALES * scales.get(key, 1) for key, sums in recorder.kernels.items()}
    rows = [dict(zip(COLUMNS, (*key, *(sums / times[key[0]]).tolist())))
            for key, sums in totals.items() if key[0] in times]
    tok_per_s = preset.micro_tokens / sum(row["ms"] for row in rows) * 1e3
    mfu = tok_per_s * header["flops_per_token"] / peak_tflops(cfg.chip) / 1e12
    counters = torch._dynamo.utils.counters
    peak, fixed = recorder.peak / 1e9, recorder.fixed / 1e9
    # 5 % for what the allocator cannot use, 1 GB for CUDA itself
    fits = {gb: int((0.95 * gb - 1 - fixed) / (peak - fixed) * preset.micro_tokens)
            for gb in (24, 40, 80, 141)}
    return dict(
        preset=cfg.preset, layers=shape.n_layers, chip=cfg.chip, compiled=cfg.compile,
        micro_tokens=preset.micro_tokens, modelled_tok_per_s=tok_per_s, modelled_mfu=mfu,
        peak_gb=peak, fixed_gb=fixed, fits=fits,
        waits=dict(recorder.waits), graphs=counters["stats"]["unique_graphs"],
        graph_breaks=sum(counters["graph_break"].values()),
        unexpected=[f"{n} x {what}" for what, n in recorder.unexpected.items()],
        kernels=sorted(rows, key=lambda row: -row["ms"]))


def show(result: dict, n: int = 30) -> None:
    """The `n` kernels of a micro-batch that take longest, and what was not expected."""
    rows = [[*row.values()] for row in result["kernels"]]
    rows.insert(n, ["all", "", *np.sum([row[2:] for row in rows], axis=0)])
    print("\n{:10}{:58}{:>10}{:>10}{:>10}{:>10}".format(*COLUMNS))
    for phase, kernel, *numbers in rows[: n + 1]:
        print(f"{phase:10}{kernel[:57]:58}" + "".join(f"{x:10.3f}" for x in numbers))
    print(f"MODELLED, {result['chip']}, micro-batches of {result['micro_tokens']:,}: "
          f"{result['modelled_tok_per_s']:,.0f} tokens/s, MFU {result['modelled_mfu']:.1%}")
    print(f"peak {result['peak_gb']:.1f} GB, {result['fixed_gb']:.1f} of it weights, gradients and "
          f"optimizer; largest micro-batch by GB of the GPU: {result['fits']}")
    print(f"{result['graphs']} graphs, {result['graph_breaks']} breaks, waits {result['waits']}")
    print(*(f"unexpected: {line}" for line in result["unexpected"]), sep="\n")


def run(cfg: Config) -> None:
    """Show and write the report; exit code 1 if something unexpected is in it."""
    report_path("dryrun", torch.device("cpu"), cfg.out)
    show(result := dry_run(cfg))
    name = f"{cfg.preset}-{result['layers']}-{'compiled' if cfg.compile else 'eager'}-{cfg.chip}"
    out = cfg.out or f"{ROOT}/results/dryrun-{name.lower().replace(' ', '-')}.json"
    print(f"wrote {write_report('dryrun', result, torch.device('cpu'), out)}")
    raise SystemExit(bool(result["unexpected"]))


main = script(run, Config, positional=True)

if __name__ == "__main__":
    if sys.argv[1:2] == ["rehearse"]:
        rehearse(*sys.argv[2:])
    else:
        main()
