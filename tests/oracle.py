"""What the kernels are held to: the references of kernels.py in float64 and in low precision."""

import torch

from kernels import attention_reference

EDGES = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 512, 1000]


def offsets(lengths, device="cpu") -> torch.Tensor:
    """cu_seqlens of documents of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def with_grad(f, *inputs, dout):
    """[f(*inputs), the gradient of each input]."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = f(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out))]


def oracles(qkv, dout, lengths, slopes, rope_base=0.0):
    """[out, dqkv] of the reference in float64, and in the dtype of qkv."""
    args = offsets(lengths, qkv.device), slopes, rope_base
    attention = lambda x: attention_reference(x, *args)
    return [with_grad(attention, x, dout=dout) for x in (qkv.double(), qkv)]


def draw(lengths, H, D, dtype=torch.float32, slack=0, seed=0, device="cpu"):
    """Random qkv (T, 3, H, D) and dout (T, H, D)."""
    g = torch.Generator(device).manual_seed(seed)
    T = sum(lengths) + slack
    make = lambda *shape: torch.randn(*shape, generator=g, device=device).to(dtype)
    return make(T, 3, H, D), make(T, H, D)


def assert_close_to_exact(ours, torchs, exact, name="", atom=2e-6):
    """The error of ours is at most twice that of PyTorch's own arithmetic in the same dtype; both
    against float64. `atom`: a few fp32 roundings of the largest value; in a document of one token
    PyTorch makes none."""
    for what, a, b, e in zip(("out", "gradient"), ours, torchs, exact):
        assert torch.isfinite(a).all(), f"{name} {what}: not finite"
        error, allowed = ((x.double() - e).abs().max().item() for x in (a, b))
        print(f"{name} {a.dtype} {what}: largest error {error:.2e}, PyTorch's {allowed:.2e}")
        bound = 2 * allowed + atom * max(1, e.abs().max().item())
        assert error <= bound, f"{name} {what}: {error:.2e}, PyTorch's {allowed:.2e}"
