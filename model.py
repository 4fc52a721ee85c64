"""The encoder: MosaicBERT and the BERT it is compared with, each ingredient a switch.

    from model import MaskedLM, EncoderConfig, PRESETS
    model = MaskedLM(EncoderConfig(**PRESETS["mosaic-base"]))            # 137,400,384 parameters
    model = MaskedLM.from_pretrained("runs/mine/ckpt/step_00000400")     # own checkpoint
    model = MaskedLM.from_pretrained("mosaicml/mosaic-bert-base")        # official MosaicBERT
    model = MaskedLM.from_pretrained("bert-base-uncased")                # Hugging Face BERT

Two ways in. The training path is flat: documents lie end to end in one `(T,)` row of ids,
`cu_seqlens (B+1,)` says where each begins, and padding never exists. The front door takes the usual
`(B, S)` ids with a mask, drops the padding once before the embedding and puts it back at the end.

What MosaicBERT (Portes et al. 2023, arXiv 2312.17482) changes in BERT, and where to find it below:
  ALiBi instead of learned positions     Attention       no position table, no longest text
  GeGLU instead of GELU                  FeedForward     +25 % parameters, better at every budget
  no attention dropout                   Attention       what lets flash attention be used at all
  no padding                             Encoder         every matmul sees real tokens only
  low-precision LayerNorm                LayerNorm       half the bytes of the memory-bound step
  vocabulary a multiple of 64            Embeddings      tensor cores like it
  head, last layer: masked tokens only   Layer, MlmHead  saves 70 % of both
"""

import json
import pickle
import re
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from records import read_json


# ----------------------------------------------------------------------------- config
@dataclass
class EncoderConfig:
    """Shape and ingredients of an encoder; each is a flag of pretrain.py (--model.n_layers 6)."""

    vocab_size: int = 30_528  # entries of the tokenizer
    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768  # width of the residual stream
    d_ff: int = 3_072  # width of the feed-forward; of each of the two halves for geglu
    position: Literal["alibi", "learned", "rope", "rope-alibi"] = "alibi"
    alibi_ratio: float = 1.0  # slopes of one side over the other's; 1 (MosaicBERT): order-blind
    rope_base: float = 1_000.0  # longest wavelength 2 pi base tokens
    max_positions: int = 512  # rows of the position table; ALiBi has no table and no limit
    mlp: Literal["geglu", "gelu"] = "geglu"
    # post: LN(x + f(x)), as BERT; pre: x + f(LN(x)) and a final LN
    norm: Literal["post", "pre"] = "post"
    low_precision_norm: bool = True  # LayerNorm in the autocast dtype instead of fp32
    bias: bool = True  # in the linear layers; geglu's first has none in either case, as upstream
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.0  # on the attention weights; Triton has none, so "padded" runs
    output_dropout: float = 0.1  # after attention's output projection
    mlp_dropout: float = 0.1  # geglu: before the last projection (MosaicBERT); gelu: after (BERT)
    classifier_dropout: float = 0.1  # before the classifiers of fine-tuning
    # auto: Triton on CUDA (padded with attention_dropout), cpu elsewhere
    attention: Literal["auto", "triton", "cpu", "padded"] = "auto"
    masked_only_last_layer: bool = True  # last layer after attention: on the rows asked for only
    vocab_multiple: int = 64  # pad the embedding to a multiple of this
    tie_head: bool = True  # the MLM decoder is the transposed embedding
    # recompute each layer in the backward: less memory, a third more FLOPs
    activation_checkpointing: bool = False
    n_token_types: int = 2
    norm_eps: float = 1e-12

    def __post_init__(self):
        if self.attention == "reference":  # config.json of runs up to revision 660131b
            self.attention = "auto" if self.attention_dropout else "cpu"

    def check(self) -> None:
        """Refuse what cannot work: ValueError with one sentence. Every model calls this first."""
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
            if name.endswith("_dropout") and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} is {value}; it must be in [0, 1)")
            if name in ("alibi_ratio", "rope_base", "norm_eps") and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be above 0")
            allowed = getattr(field.type, "__args__", None)
            if allowed and value not in allowed:
                raise ValueError(f"{name} is {value!r}; choose from {', '.join(allowed)}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.attention_dropout and self.attention == "triton":
            raise ValueError("attention_dropout: Triton's kernel has none, leave attention at auto")
        if "rope" in self.position and (width := self.d_model // self.n_heads) % 2:
            raise ValueError(f"RoPE turns pairs of columns: {width} a head is odd")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


# How a model computes and is trained, but not what its weights are: weights from elsewhere go with
# any of these.
NOT_IN_THE_WEIGHTS = {
    "embedding_dropout", "attention_dropout", "output_dropout", "mlp_dropout", "classifier_dropout",
    "attention", "low_precision_norm", "masked_only_last_layer", "activation_checkpointing"}
MOSAIC = dict(position="alibi", mlp="geglu", attention_dropout=0.0, low_precision_norm=True)
BERT = dict(position="learned", mlp="gelu", attention_dropout=0.1, low_precision_norm=False)
BASE = dict(n_layers=12, n_heads=12, d_model=768, d_ff=3_072)
LARGE = dict(n_layers=24, n_heads=16, d_model=1_024, d_ff=4_096)
# For CPUs. Short runs never see a document often enough to overfit, so hidden dropout is off.
CPU = dict(embedding_dropout=0.0, output_dropout=0.0, mlp_dropout=0.0)
SMALL = CPU | dict(n_layers=4, n_heads=4, d_model=256, d_ff=1_024)
TINY = CPU | dict(n_layers=3, n_heads=4, d_model=128, d_ff=512)
SIZES = {"base": BASE, "large": LARGE, "small": SMALL, "tiny": TINY}
PRESETS = {f"{family}-{size}": shape | ingredients
           for family, ingredients in (("mosaic", MOSAIC), ("bert", BERT))
           for size, shape in SIZES.items()}


def flops_per_token(cfg: EncoderConfig, s_eff: float, masked_share: float,
                    narrow_layers: float = 1.0) -> float:
    """Training FLOPs (forward + backward) per real token, the numerator of MFU.

    `6 N_layers + 12 L d s_eff + 6 p (d² + d V)`: every weight of a layer does 2 FLOPs forward and 4
    backward, attention's two matmuls see `s_eff` keys a token (E[len²]/E[len] over the documents),
    the MLM head runs on the masked share `p` only. Embeddings are look-ups and count nothing. The
    last layer's saving is not subtracted, so that the number compares with other codebases; that of
    more `narrow_layers`, a mean over the run, is.
    """
    d, ff = cfg.d_model, cfg.d_ff
    behind_attention = d * d + (2 if cfg.mlp == "gelu" else 3) * d * ff
    layers = cfg.n_layers * (3 * d * d + behind_attention)
    layers -= (narrow_layers - 1) * (1 - masked_share) * behind_attention
    head = 6 * masked_share * (d * d + d * cfg.padded_vocab_size)
    return 6 * layers + 12 * cfg.n_layers * d * s_eff + head


# ----------------------------------------------------------------------------- layers
class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, in the autocast dtype when `low_precision` is set.

    Under autocast PyTorch runs LayerNorm in fp32: it reads and writes twice the bytes of bf16 in a
    step that is bound by memory. MosaicBERT casts input, weight and bias down and switches autocast
    off; the kernel still sums in fp32. Without autocast the switch has no effect.
    """

    def __init__(self, cfg: EncoderConfig):
        super().__init__(cfg.d_model, cfg.norm_eps)
        self.low_precision = cfg.low_precision_norm

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device) if self.low_precision else torch.float32
        with torch.autocast(device, enabled=False):
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)


class Dropout(nn.Dropout):
    """nn.Dropout with faster masks."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.dropout(x, self.p) if self.training and self.p else x


class Embeddings(nn.Module):
    """Word + token type (+ learned position) -> LayerNorm -> dropout, on flat ids."""

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        # MosaicBERT: 30,522 entries become 30,528 = 64 · 477, which tensor cores multiply faster
        self.word = nn.Embedding(cfg.padded_vocab_size, cfg.d_model)
        self.token_type = nn.Embedding(cfg.n_token_types, cfg.d_model)
        # MosaicBERT: no position table; ALiBi puts distance on the scores, so nothing is outgrown
        learned = cfg.position == "learned"
        self.position = nn.Embedding(cfg.max_positions, cfg.d_model) if learned else None
        self.norm = LayerNorm(cfg)
        self.dropout = Dropout(cfg.embedding_dropout)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, token_type_ids=None) -> Tensor:
        types = token_type_ids
        types = self.token_type.weight[0] if types is None else self.token_type(types)
        x = self.word(input_ids) + types  # (T, d)
        if self.position is not None:
            place = torch.arange(len(input_ids), device=input_ids.device)
            # (T,) which document a token is in; rows behind the last one clamp to some position
            document = torch.searchsorted(cu_seqlens[1:], place, right=True)
            place = place - cu_seqlens[document]
            x = x + self.position(place.clamp(max=self.position.num_embeddings - 1))
        return self.dropout(self.norm(x))


class Attention(nn.Module):
    """Multi-head self-attention inside each document, with ALiBi where the config says so.

    ALiBi (Press et al. 2022) adds -slope_h·|i - j| to the scores; |.| because an encoder looks both
    ways. With no table and no (B, H, S, S) bias, a model trained at 128 tokens runs at 8,192.
    """

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.asked = cfg.attention, cfg.attention_dropout
        # MosaicBERT: none. It would be drawn inside the flash kernel, and "often slows things down"
        self.dropout = cfg.attention_dropout
        self.qkv = nn.Linear(cfg.d_model, 3 * cfg.d_model, bias=cfg.bias)
        self.rope_base = cfg.rope_base if "rope" in cfg.position else 0.0
        alibi = "alibi" in cfg.position
        slopes = kernels.alibi_slopes(cfg.n_heads, cfg.alibi_ratio) if alibi else None
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int):
        T, d = x.shape
        qkv = self.qkv(x).view(T, 3, self.n_heads, d // self.n_heads)  # (T, 3, H, D)
        dropout = self.dropout if self.training else 0.0
        # the seed makes the backward draw the forward's mask again instead of keeping it
        seed = torch.randint(2**62, (), dtype=torch.int64) if dropout else None
        slopes = None if self.slopes is None else self.slopes.float()
        # in evaluation the backend of training
        backend, _ = kernels.attention_backend(x.device.type, *self.asked)
        how = dict(rope_base=self.rope_base, dropout_p=dropout, seed=seed)
        out = kernels.varlen_attention(qkv, cu_seqlens, max_seqlen, slopes, backend=backend, **how)
        return out.view(T, d)


class FeedForward(nn.Module):
    """GeGLU (MosaicBERT) or GELU (BERT), exact erf in both.

    GeGLU: `out(gelu(a) * b)`, a and b the halves of one projection (Shazeer 2020). MosaicBERT keeps
    d_ff at BERT's 3,072 for each half: more parameters, and still better at equal time.
    """

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.gated = cfg.mlp == "geglu"
        width, bias = (2 * cfg.d_ff, False) if self.gated else (cfg.d_ff, cfg.bias)
        self.inp = nn.Linear(cfg.d_model, width, bias=bias)
        self.out = nn.Linear(cfg.d_ff, cfg.d_model, bias=cfg.bias)
        self.dropout = Dropout(cfg.mlp_dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)  # (T, 2 d_ff) or (T, d_ff)
        if not self.gated:
            return self.dropout(self.out(F.gelu(h)))
        # MosaicBERT: dropout sits on the product, before the last projection; BERT has it behind
        return self.out(kernels.geglu(h, self.dropout.p if self.training else 0.0))


class Layer(nn.Module):
    """Attention and feed-forward with residuals. What follows attention runs on `rows` only."""

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.pre_norm = cfg.norm == "pre"
        self.attention = Attention(cfg)
        self.attention_out = nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.bias)
        self.attention_norm = LayerNorm(cfg)
        self.mlp = FeedForward(cfg)
        self.mlp_norm = LayerNorm(cfg)
        self.dropout = Dropout(cfg.output_dropout)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, rows) -> Tensor:
        h = self.attention_norm(x) if self.pre_norm else x
        h = self.attention(h, cu_seqlens, max_seqlen)  # (T, d)
        # MosaicBERT: the last layer needs keys and values everywhere, the rest only on `rows`
        if rows is not None:
            h, x = kernels.gather_rows(h, rows), kernels.gather_rows(x, rows)  # (R, d)
        h = self.dropout(self.attention_out(h))
        if self.pre_norm:
            x = x + h
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + h)
        return self.mlp_norm(x + self.mlp(x))


# ----------------------------------------------------------------------------- encoder
class Pretrained(nn.Module):
    """What the encoder and the models with a head share: initialisation, saving, loading."""

    def __init__(self, cfg: EncoderConfig, n_labels: int = 1):
        super().__init__()
        cfg.check()
        if n_labels < 1:
            raise ValueError(f"n_labels is {n_labels}; give at least 1 (1 = regression)")
        self.cfg, self.n_labels = cfg, n_labels
        self.new_keys: list[str] = []  # by from_pretrained: parameters the checkpoint did not have

    def init_weights(self) -> None:
        """BERT's initialisation: matrices, embeddings N(0, 0.02), biases 0, LayerNorm 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def n_params(self) -> int:
        """Number of parameters, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder` (made if missing)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": "nanomosaicbert", "head": type(self).__name__, **asdict(self.cfg)}
        if isinstance(self, SequenceClassifier | TokenClassifier):
            config["n_labels"] = self.n_labels
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tied = {"head.decoder.weight"} if self.cfg.tie_head else set()  # stored as the embedding
        weights = {k: v.contiguous() for k, v in self.state_dict().items() if k not in tied}
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path, n_labels: int | None = None, **overrides):
        """Load an own checkpoint, an official MosaicBERT or a Hugging Face BERT.

        path_or_name: folder with config.json and model.safetensors or pytorch_model.bin, or a name
        on the hub. n_labels: for the classifiers; None takes the checkpoint's, another number than
        its gets a new classifier. overrides: fields of EncoderConfig, e.g. `mlp_dropout=0.0`.
        The encoder's weights must be there, all of them, in their shapes, and nothing else; a head
        the checkpoint lacks is initialised and named in `.new_keys`. Otherwise one-line ValueError.
        """
        folder = find_folder(path_or_name)
        config = read_json(folder / "config.json", "give another checkpoint")
        weights = _read_weights(folder)
        if config.get("model_type") == "nanomosaicbert":
            kwargs = {f.name: config[f.name] for f in fields(EncoderConfig) if f.name in config}
            # in an export the pooler is part of the classifier, see ClassificationHead there
            for theirs, ours in ("classifier.pooler", "pooler"), ("classifier.out", "classifier"):
                weights = {k.replace(theirs, ours): v for k, v in weights.items()}
        else:
            try:
                kwargs, weights = _from_hf_layout(config, weights)
            except KeyError as e:
                raise ValueError(f"{folder}/config.json has no {e}") from None
        if kwargs.get("attention") == "triton":  # what auto is where it runs
            kwargs["attention"] = "auto"
        cfg = replace(EncoderConfig(**kwargs), **overrides)
        if not issubclass(cls, SequenceClassifier | TokenClassifier):
            model = cls(cfg)
        else:
            stored = len(weights.get("classifier.weight", ()))
            model = cls(cfg, n_labels or stored)
            if model.n_labels != stored:  # a classifier for other classes is of no use
                weights = {k: v for k, v in weights.items() if not k.startswith("classifier.")}
        _load_weights(model, weights, str(path_or_name))
        return model


class Encoder(Pretrained):
    """Token ids in, hidden states out."""

    def __init__(self, cfg: EncoderConfig):
        super().__init__(cfg)
        self.embeddings = Embeddings(cfg)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layers))
        self.final_norm = LayerNorm(cfg) if cfg.norm == "pre" else None
        self.init_weights()

    def flat(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, token_type_ids=None,
             rows: Tensor | None = None, narrow_layers: int = 1) -> Tensor:
        """The training path. Padding does not exist here.

        input_ids (T,) int64 · cu_seqlens (B+1,) int32, from 0 to at most T, repeats allowed (empty
        documents) · max_seqlen: no document is longer · token_type_ids (T,), default all 0 · rows
        (R,) int64: those wanted. Returns (T, d), or (R, d) with `rows`. Rows behind the last
        document mean nothing.

        narrow_layers: the last ones, in which after attention only `rows` go on (NarrowBERT, Li et
        al. 2023, arXiv 2301.04761). With more than one, which is for training, the others leave
        these layers as they came in, keys and values for `rows` (none of them negative).
        """
        if self.cfg.position == "learned" and max_seqlen > self.cfg.max_positions:
            raise ValueError(
                f"a document of {max_seqlen} tokens does not fit the {self.cfg.max_positions} "
                "learned positions; cut it, raise max_positions, or use ALiBi")
        x = self.embeddings(input_ids, cu_seqlens, token_type_ids)
        n = len(self.layers)
        for i, layer in enumerate(self.layers):
            last = i == n - 1
            narrow = not last or self.cfg.masked_only_last_layer
            narrow = rows is not None and i >= n - narrow_layers and narrow
            args = (x, cu_seqlens, max_seqlen, rows if narrow else None)
            if self.cfg.activation_checkpointing and self.training:
                h = checkpoint(layer, *args, use_reentrant=False)
            else:
                h = layer(*args)
            x = h if last or not narrow else x.index_copy(0, rows, h.to(x.dtype))
        if rows is not None and not self.cfg.masked_only_last_layer:
            x = kernels.gather_rows(x, rows)
        return x if self.final_norm is None else self.final_norm(x)

    def forward(self, *inputs, **documents) -> Tensor:
        """Hidden states: (B, S, d) of a padded batch, zero at the padding; (T, d) of a flat one.

        Here and in every head `inputs` are input_ids, attention_mask and token_type_ids, the last
        two optional; `documents` make a batch flat: cu_seqlens and max_seqlen.
        """
        flat, padding = _as_flat(*inputs, **documents)
        return _pad_again(self.flat(**flat), padding)


def _as_flat(input_ids: Tensor, attention_mask=None, token_type_ids=None, **documents):
    """Either batch -> arguments of Encoder.flat, and what _pad_again needs (None: it was flat)."""
    if documents.get("cu_seqlens") is not None:
        return dict(input_ids=input_ids, token_type_ids=token_type_ids, **documents), None
    if input_ids.dim() != 2:
        shape = tuple(input_ids.shape)
        raise ValueError(f"input_ids has shape {shape}; without cu_seqlens it must be (B, S)")
    real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    if bool((real[:, 1:] & ~real[:, :-1]).sum(1).add(real[:, 0]).gt(1).any()):
        raise ValueError("attention_mask has a hole inside a row; documents must be contiguous")
    if not bool(real.any()):
        raise ValueError("attention_mask hides every token of the batch")
    lengths, where = real.sum(1), real.flatten().nonzero()[:, 0].to(input_ids.device)  # (B,), (T,)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(input_ids.device, torch.int32)
    ids = input_ids.reshape(-1)[where]
    flat = dict(input_ids=ids, cu_seqlens=cu_seqlens, max_seqlen=int(lengths.max()))
    if token_type_ids is not None:
        flat["token_type_ids"] = token_type_ids.reshape(-1)[where]
    return flat, (where, input_ids.shape)


def _pad_again(x: Tensor, padding: tuple | None) -> Tensor:
    """(T, d) -> (B, S, d) with zeros where there was padding; untouched if there was none."""
    if padding is None:
        return x
    where, (B, S) = padding
    return kernels.scatter_rows(x, where, B * S).view(B, S, -1)


# ----------------------------------------------------------------------------- heads
class DecoderLoss(torch.autograd.Function):
    """Vocabulary matmul and masked cross entropy in one: h (M, d), weight (V, d), bias (V,), labels
    (M,) -> (loss summed over M, number of correct predictions).

    teacher_gradient (M, V), overwritten logits of a teacher as kernels.masked_cross_entropy leaves
    them, makes the target half the label, half the teacher's softmax q: with student's softmax p
    and one-hot label y, (p - y) - (q - y) / 2 = p - (y + q) / 2. The loss returned is the label's.

    The cross entropy leaves its gradient where the logits were. Scaling that (M, V) by the gradient
    from above would take a second one of them; here the scale goes onto h and onto the results,
    which are small.
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, teacher_gradient):
        gradient = F.linear(h, weight, bias)  # the logits, for now
        loss, n_correct = kernels.masked_cross_entropy(gradient, labels, keep_gradient=True)
        if teacher_gradient is not None:
            gradient.sub_(teacher_gradient, alpha=0.5)
        ctx.save_for_backward(h, weight, gradient)
        ctx.mark_non_differentiable(n_correct)
        return loss, n_correct

    @staticmethod
    def backward(ctx, scale: Tensor, _) -> tuple[Tensor, Tensor, Tensor, None, None]:
        h, weight, gradient = ctx.saved_tensors
        to_bias = gradient.sum(0) * scale
        return gradient @ weight * scale, gradient.t() @ (h * scale), to_bias, None, None


class MlmHead(nn.Module):
    """Linear -> GELU -> LayerNorm -> vocabulary, the last one tied to the word embedding."""

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.dense = nn.Linear(cfg.d_model, cfg.d_model)
        self.norm = LayerNorm(cfg)
        self.decoder = nn.Linear(cfg.d_model, cfg.padded_vocab_size)

    def transform(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))

    def loss(self, x: Tensor, labels: Tensor, teacher_gradient=None) -> tuple[Tensor, Tensor]:
        """x (M, d), labels (M,) -> (loss summed over M, number of correct predictions), fp32."""
        h, device, decoder = self.transform(x), x.device.type, self.decoder
        if not torch.is_grad_enabled():
            return kernels.masked_cross_entropy(decoder(h), labels)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        weight, bias = decoder.weight.to(dtype), decoder.bias.to(dtype)
        return DecoderLoss.apply(h.to(dtype), weight, bias, labels, teacher_gradient)


class MaskedLM(Pretrained):
    """Encoder with the masked-language-model head."""

    def __init__(self, cfg: EncoderConfig):
        super().__init__(cfg)
        self.encoder = Encoder(cfg)
        self.head = MlmHead(cfg)
        self.init_weights()
        if cfg.tie_head:
            self.head.decoder.weight = self.encoder.embeddings.word.weight

    def forward(self, *inputs, labels: Tensor | None = None, masked_idx=None, teacher_gradient=None,
                narrow_layers: int = 1, **documents):
        """Flat (with cu_seqlens): input_ids (T,), masked_idx (M,) rows to predict, labels (M,) true
            ids. Returns logits (M, V), or with labels (loss summed over M, number of correct
            predictions), fp32: a sum, because only the trainer knows how many masked tokens the
            whole batch has over all processes. teacher_gradient (M, V): see DecoderLoss;
            narrow_layers: see Encoder.flat.
        Padded: input_ids, attention_mask, labels (B, S), labels -100 where nothing is to be
            predicted. Returns logits (B, S, V), or with labels (mean loss, logits).
        """
        flat, padding = _as_flat(*inputs, **documents)
        how = dict(rows=masked_idx, narrow_layers=narrow_layers)
        h = self.encoder.flat(**flat, **how)  # (M, d) flat, (T, d) padded
        if labels is not None and padding is None:
            return self.head.loss(h, labels, teacher_gradient)
        logits = self.head(h)
        if labels is None:
            return _pad_again(logits, padding)
        loss = F.cross_entropy(logits.float(), labels.reshape(-1)[padding[0]])
        return loss, _pad_again(logits, padding)


class SequenceClassifier(Pretrained):
    """Pooler (Linear + tanh on [CLS]) -> dropout -> Linear. One label: regression.

    Returns logits (B, n_labels) in fp32. Only the [CLS] row of the last layer is computed after
    attention. ValueError without labels.
    """

    def __init__(self, cfg: EncoderConfig, n_labels: int):
        super().__init__(cfg, n_labels)
        self.encoder = Encoder(cfg)
        self.pooler = nn.Linear(cfg.d_model, cfg.d_model)
        self.dropout = Dropout(cfg.classifier_dropout)
        self.classifier = nn.Linear(cfg.d_model, n_labels)
        self.init_weights()

    def forward(self, *inputs, **documents) -> Tensor:
        """Flat (T,) ids with cu_seqlens, or padded (B, S) ones with a mask -> (B, n_labels)."""
        flat, _ = _as_flat(*inputs, **documents)
        cu = flat["cu_seqlens"].long()
        cls = torch.where(cu[1:] > cu[:-1], cu[:-1], -1)  # an empty document has no row of its own
        h = self.encoder.flat(**flat, rows=cls)  # (B, d)
        h = h.masked_fill((cu[1:] == cu[:-1]).unsqueeze(-1), 0.0)
        return self.classifier(self.dropout(torch.tanh(self.pooler(h)))).float()


class TokenClassifier(Pretrained):
    """Dropout -> Linear on every token: named entities, part of speech. Logits in fp32."""

    def __init__(self, cfg: EncoderConfig, n_labels: int):
        super().__init__(cfg, n_labels)
        self.encoder = Encoder(cfg)
        self.dropout = Dropout(cfg.classifier_dropout)
        self.classifier = nn.Linear(cfg.d_model, n_labels)
        self.init_weights()

    def forward(self, *inputs, **documents) -> Tensor:
        """Flat: logits (T, n_labels). Padded: logits (B, S, n_labels)."""
        h = self.encoder(*inputs, **documents)
        return self.classifier(self.dropout(h)).float()


# ----------------------------------------------------------------------------- loading
def find_checkpoints(run: str | Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first (empty list: none).

    pretrain.py renames a checkpoint into place when it is whole, so step_<number> is complete and
    step_*.tmp is not.
    """
    found = {int(p.name[5:]): p for p in Path(run).glob("ckpt/step_*") if p.name[5:].isdigit()}
    return [p for _, p in sorted(found.items()) if (p / "model.safetensors").is_file()]


def find_folder(path_or_name: str | Path) -> Path:
    """A run folder means its newest checkpoint; other local folders are taken as they are; the rest
    is looked up on the hub. ValueError, one line, where there is nothing."""
    name, path = str(path_or_name), Path(path_or_name)
    path = (find_checkpoints(path) or [path])[-1]
    if (path / "config.json").is_file():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(f"{name}: no checkpoint here; give a run folder or one with config.json")
    from huggingface_hub import snapshot_download

    files = ["config.json", "*.safetensors", "pytorch_model.bin", "tokenizer*.json", "vocab.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as e:  # the hub client raises a dozen kinds; the user needs one line
        kind = type(e).__name__
        raise ValueError(f"{name}: neither a folder here nor found on the hub ({kind})") from e


def weights_checksum(folder: Path, start: int = 0) -> int:
    """crc32, going on from `start`, of what tells the weights in a folder from others that were
    there under its name: a checkpoint's progress.json, as no other has cost the same; else the
    weights. ValueError without."""
    progress = folder / "progress.json"
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not (files := [progress] if progress.is_file() else weights):
        raise ValueError(f"{folder} has no weights (*.safetensors, pytorch_model.bin)")
    for path in files:
        with open(path, "rb") as f:
            while part := f.read(1 << 24):
                start = zlib.crc32(part, start)
    return start


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        if (path := folder / "model.safetensors").is_file():
            return load_file(path)
        if (path := folder / "pytorch_model.bin").is_file():
            return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path} is damaged ({str(e).splitlines()[0]})") from None
    raise ValueError(f"{folder}: no model.safetensors and no pytorch_model.bin")


# Our name -> Hugging Face BERT's, replaced in this order in either direction. Wqkv is MosaicBERT's:
# BERT keeps query, key and value apart.
BERT_NAMES = {
    "encoder.embeddings.": "bert.embeddings.",
    "embeddings.word.": "embeddings.word_embeddings.",
    "embeddings.token_type.": "embeddings.token_type_embeddings.",
    "embeddings.position.": "embeddings.position_embeddings.",
    "embeddings.norm.": "embeddings.LayerNorm.",
    "encoder.layers.": "bert.encoder.layer.",
    ".attention.qkv.": ".attention.self.Wqkv.",
    ".attention_out.": ".attention.output.dense.",
    ".attention_norm.": ".attention.output.LayerNorm.",
    ".mlp.inp.": ".intermediate.dense.",
    ".mlp.out.": ".output.dense.",
    ".mlp_norm.": ".output.LayerNorm.",
    "pooler.": "bert.pooler.dense.",
    "head.dense.": "cls.predictions.transform.dense.",
    "head.norm.": "cls.predictions.transform.LayerNorm.",
    "head.decoder.bias": "cls.predictions.bias",
    "head.decoder.": "cls.predictions.decoder.",
}
MOSAIC_NAMES = BERT_NAMES | {
    ".mlp.inp.": ".mlp.gated_layers.", ".mlp.out.": ".mlp.wo.", ".mlp_norm.": ".mlp.layernorm."}


def _from_hf_layout(config: dict, weights: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """config.json and weights of MosaicBERT or BERT -> EncoderConfig's fields, our names."""
    for key, known in ("model_type", "bert"), ("hidden_act", "gelu"):
        if config.get(key, known) != known:
            raise ValueError(f"config.json: {key} {config[key]!r}; only {known!r} is known")
    mosaic, out = any(".self.Wqkv." in name for name in weights), {}
    for name, tensor in weights.items():
        if name.endswith("position_ids") or name.startswith("cls.seq_relationship."):
            continue  # a constant, and next-sentence prediction, which nobody kept
        if name.startswith(("embeddings.", "encoder.", "pooler.")):  # a bare BertModel
            name = f"bert.{name}"
        # bert-base-uncased still has TensorFlow's names for LayerNorm
        name = name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
        for ours, theirs in (MOSAIC_NAMES if mosaic else BERT_NAMES).items():
            name = name.replace(theirs, ours)
        out[name] = tensor
    for name in [n for n in out if ".attention.self.query." in n]:
        q_k_v = [out.pop(name.replace("query", part), None) for part in ("query", "key", "value")]
        if any(t is None for t in q_k_v):
            raise ValueError(f"{name}: its key or value is missing from the weights")
        out[name.replace("self.query", "qkv")] = torch.cat(q_k_v)
    word = out.get("encoder.embeddings.word.weight")
    dropout, kwargs = config.get("hidden_dropout_prob", 0.1), MOSAIC if mosaic else BERT
    classifier_dropout = config.get("classifier_dropout")
    if not mosaic:
        kwargs = kwargs | dict(attention_dropout=config.get("attention_probs_dropout_prob", 0.1))
    return kwargs | dict(
        vocab_size=config["vocab_size"] if word is None else len(word),  # MosaicBERT's: 30,528 rows
        vocab_multiple=1, tie_head=config.get("tie_word_embeddings", True),
        n_layers=config["num_hidden_layers"], n_heads=config["num_attention_heads"],
        d_model=config["hidden_size"], d_ff=config["intermediate_size"],
        max_positions=config.get("max_position_embeddings", 512),
        n_token_types=config.get("type_vocab_size", 2),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        embedding_dropout=dropout, output_dropout=dropout, mlp_dropout=dropout,
        classifier_dropout=dropout if classifier_dropout is None else classifier_dropout,
    ), out


def _load_weights(model: Pretrained, weights: dict[str, Tensor], source: str) -> None:
    """Copy `weights` (our names) into `model`. ValueError, one line, for what does not fit."""
    if isinstance(model, Encoder):  # stored without the prefix that the models with a head give it
        weights = {k.removeprefix("encoder."): v for k, v in weights.items()}
    elif not any(k.startswith("encoder.") for k in weights):
        weights = {f"encoder.{k}": v for k, v in weights.items()}
    head = r"^(head|pooler|classifier|qa_outputs)\."
    word = weights.get("encoder.embeddings.word.weight")
    if isinstance(model, MaskedLM) and model.cfg.tie_head and word is not None:
        weights = {**weights, "head.decoder.weight": word}
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as e:  # its last line names a tensor of the wrong shape
        problem = str(e).splitlines()[-1].strip()
        raise ValueError(f"{source} does not fit this model; {problem}") from None
    needs_head = isinstance(model, MaskedLM)  # its head is part of what was pretrained
    lost = [k for k in missing if needs_head or not re.match(head, k)]
    unknown = [k for k in unexpected if not re.match(head, k)]
    if names := lost or unknown:
        problem = f"{'missing' if lost else 'unexpected'}: {', '.join(names[:4])}"
        raise ValueError(f"{source} does not fit this model; {problem} ({len(names)} in all)")
    model.new_keys = missing
