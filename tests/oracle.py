"""What the kernels are held to: attention as the paper writes it, in float64 and in the dtype at hand."""

import torch

EDGES = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 512, 1000]


def offsets(lengths, device="cpu") -> torch.Tensor:
    """cu_seqlens of documents of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def turn(x, base):
    """RoPE as a matrix: x (H, n, D) times the block rotation of each position."""
    n, D = x.shape[1:]
    turns = torch.zeros(n, D, D, dtype=torch.float64)
    for d in range(0, D, 2):
        angle = torch.arange(n) * base ** (-d / D)
        turns[:, d, d] = turns[:, d + 1, d + 1] = angle.double().cos()
        turns[:, d, d + 1], turns[:, d + 1, d] = -angle.sin(), angle.sin()
    return torch.einsum("nde,hne->hnd", turns.to(x), x)


def oracle(qkv, lengths, slopes, rope_base=0.0):
    """Attention one document at a time, in the dtype of qkv."""
    outs = []
    for document in qkv.split(lengths):
        q, k, v = document.permute(1, 2, 0, 3)  # (H, n, D) each
        i = torch.arange(len(document), device=qkv.device)
        if rope_base:
            q, k = (turn(x, rope_base) for x in (q, k))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if slopes is not None:
            slope = torch.where(i < i[:, None], slopes[:, :1, None], slopes[:, 1:, None]).to(q)
            scores = scores - slope * (i[:, None] - i).abs()
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs)


def with_grad(f, *inputs, dout):
    """[f(*inputs), the gradient of each input]."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = f(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out))]


def oracles(qkv, dout, lengths, slopes, rope_base=0.0):
    """[out, dqkv] in float64, and as PyTorch's own arithmetic in the dtype of qkv has them."""
    return [with_grad(lambda x: oracle(x, lengths, slopes, rope_base), x, dout=dout) for x in (qkv.double(), qkv)]


def draw(lengths, H, D, dtype=torch.float32, slack=0, seed=0, device="cpu"):
    """Random qkv (T, 3, H, D) and dout (T, H, D)."""
    g = torch.Generator(device).manual_seed(seed)
    T = sum(lengths) + slack
    make = lambda *shape: torch.randn(*shape, generator=g, device=device).to(dtype)
    return make(T, 3, H, D), make(T, H, D)


def assert_close_to_exact(ours, torchs, exact, name="", atom=2e-6):
    """The error of ours is at most twice that of PyTorch's own arithmetic in the same dtype; both against float64.
    `atom`: a few fp32 roundings of the largest value; in a document of one token PyTorch makes none."""
    for what, a, b, e in zip(("out", "gradient", "gradient 2", "gradient 3", "gradient 4"), ours, torchs, exact):
        assert torch.isfinite(a).all(), f"{name} {what}: not finite"
        error, allowed = (a.double() - e).abs().max().item(), (b.double() - e).abs().max().item()
        print(f"{name} {a.dtype} {what}: largest error {error:.2e}, PyTorch's {allowed:.2e}")
        assert error <= 2 * allowed + atom * max(1, e.abs().max().item()), f"{name} {what}: {error:.2e}, {allowed:.2e}"
