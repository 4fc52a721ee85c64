"""The encoder of model.py as a transformers model: the hand-written half of the file that export_hf.py writes.

export_hf.py replaces the two import lines of our own modules below by the source of what they name, so the exported
modeling_nanomosaicbert.py stands alone (torch and transformers, no Triton) and changes when model.py does. The layers
are flat there too, but a padded batch stays padded, as transformers' own encoders do: T = B·S rows, every "document"
S long, the padding hidden by the attention's bias. That traces to ONNX and compiles; it saves no padding.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from kernels import alibi_bias, alibi_slopes
from model import Attention, Encoder, EncoderConfig, LayerNorm, MlmHead


def varlen_attention(qkv, cu_seqlens, max_seqlen, slopes, *, rope_base, tiles, dropout_p=0.0, **_):
    """kernels.varlen_attention of B documents of S = max_seqlen rows: qkv (B·S, 3, H, D) -> (B·S, H, D).

    ALiBi and the padding are in `tiles`, the argument model.py hands through unread: (1 or B, H, S, S) or None.
    """
    T, _, H, D = qkv.shape
    q, k, v = qkv.view(-1, max_seqlen, 3, H, D).permute(2, 0, 3, 1, 4)  # (B, H, S, D) each
    if rope_base:
        frequency = rope_base ** (torch.arange(0, D, 2, device=qkv.device) / -D)
        angle = torch.arange(max_seqlen, device=qkv.device)[:, None] * frequency  # (S, D/2)
        q, k = rotate(q, angle), rotate(k, angle)
    bias = None if tiles is None else tiles.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias, dropout_p).transpose(1, 2).reshape(T, H, D)


def rotate(x, angle):
    """Columns 2d and 2d + 1 of x (B, H, S, D) turned by `angle` (S, D/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return torch.stack(turned, -1).flatten(-2).to(x.dtype)


def gather_rows(x, rows):
    """Rows `rows` (R,) of x (T, d)."""
    return x[rows]


def geglu(h):
    """gelu(gate) * up of the two halves of h (T, 2 d_ff)."""
    gate, up = h.chunk(2, dim=-1)
    return F.gelu(gate) * up


Dropout = nn.Dropout


class NanoMosaicBertConfig(PretrainedConfig):
    """Every field of EncoderConfig, and what transformers wants to know."""

    model_type = "nanomosaicbert"
    attribute_map = {  # noqa: RUF012 (transformers' own idiom)
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "max_positions",
        "type_vocab_size": "n_token_types",
    }

    def __init__(self, pad_token_id: int = 0, tie_word_embeddings: bool = True, **kwargs):
        for name, value in EncoderConfig().to_dict().items():
            setattr(self, name, kwargs.pop(name, value))
        super().__init__(**kwargs)
        self.pad_token_id, self.tie_word_embeddings = pad_token_id, tie_word_embeddings  # transformers 4 has set both

    def encoder_config(self) -> EncoderConfig:
        return EncoderConfig(**{name: getattr(self, name) for name in EncoderConfig().to_dict()})


def refuse(unused: dict) -> None:
    """What other models take and these do not: peft and transformers pass it switched off. ValueError for the rest."""
    if wanted := [name for name, value in unused.items() if value is not None and value is not False]:
        raise ValueError(f"nanoMosaicBERT models do not take {', '.join(wanted)}")


class NanoMosaicBertPreTrainedModel(PreTrainedModel):
    config_class = NanoMosaicBertConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the losses are means: Trainer has to divide by its accumulated batches itself
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As Pretrained.init_weights of model.py. transformers asks for what a checkpoint does not hold."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, Attention) and module.slopes is not None:
            module.slopes.copy_(alibi_slopes(module.n_heads, self.config.alibi_ratio))

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """transformers' own, keeping the rows a multiple of vocab_multiple, as the encoder will expect."""
        multiple = math.lcm(pad_to_multiple_of or 1, self.config.vocab_multiple)
        return super().resize_token_embeddings(new_num_tokens, multiple, mean_resizing)

    def _set_gradient_checkpointing(self, enable: bool = True, **_) -> None:
        self.base_model.cfg.activation_checkpointing = enable


class NanoMosaicBertModel(NanoMosaicBertPreTrainedModel):
    """Ids (B, S) -> last_hidden_state (B, S, d), zero at the padding."""

    def __init__(self, config: NanoMosaicBertConfig):
        super().__init__(config)
        encoder = Encoder(config.encoder_config())
        self.cfg = encoder.cfg
        self.embeddings, self.layers, self.final_norm = encoder.embeddings, encoder.layers, encoder.final_norm
        self.post_init()

    flat = Encoder.flat

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word = value

    def attention_bias(self, real: Tensor | None, S: int, device: torch.device) -> Tensor | None:
        """ALiBi, and -inf on the keys that are padding: (1, H, S, S), or (B, H, S, S) with `real` (B, S) bool."""
        bias = None
        if "alibi" in self.cfg.position:
            i = torch.arange(S, device=device)
            slopes = alibi_slopes(self.cfg.n_heads, self.cfg.alibi_ratio).to(device)
            bias = alibi_bias(slopes, i, i)[None]
        if real is None:
            return bias
        real = real | ~real.any(1, keepdim=True)  # a row of nothing but padding would be NaN in ONNX
        bias = torch.zeros(1, 1, S, S, device=device) if bias is None else bias
        return bias.masked_fill(~real[:, None, None, :], -torch.inf)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **unused,
    ):
        refuse(unused)
        B, S = input_ids.shape
        device = input_ids.device
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        real = None if attention_mask is None else attention_mask.bool()
        back = None
        if real is not None and self.cfg.position == "learned":
            # positions count from the first real token: rows padded on the left are turned, and turned back below
            place, first = torch.arange(S, device=device), real.int().argmax(1, keepdim=True)
            turn, back = (place + first) % S, (place - first) % S  # (B, S)
            input_ids, types, real = input_ids.gather(1, turn), types.gather(1, turn), real.gather(1, turn)
        cu_seqlens = torch.arange(B + 1, device=device, dtype=torch.int32) * S
        bias = self.attention_bias(real, S, device)
        x = self.flat(input_ids.reshape(-1), cu_seqlens, S, types.reshape(-1), bias).view(B, S, -1)
        if real is not None:
            x = x * real[..., None]
        if back is not None:
            x = x.gather(1, back[..., None].expand(x.shape))
        output = BaseModelOutput(last_hidden_state=x)
        return output.to_tuple() if return_dict is False else output


class NanoMosaicBertForMaskedLM(NanoMosaicBertPreTrainedModel):
    """logits (B, S, vocab_size), without the rows that pad the embedding; loss: mean over labels other than -100."""

    _tied_weights_keys = {"head.decoder.weight": "encoder.embeddings.word.weight"}  # noqa: RUF012

    def __init__(self, config: NanoMosaicBertConfig):
        super().__init__(config)
        self.encoder = NanoMosaicBertModel(config)
        self.head = MlmHead(self.encoder.cfg)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head.decoder = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **unused,
    ):
        refuse(unused)
        x = self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state
        logits = self.head(x)[..., : self.config.vocab_size]
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        output = MaskedLMOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


class NanoMosaicBertForSequenceClassification(NanoMosaicBertPreTrainedModel):
    """Pooler (Linear + tanh on the first token) -> dropout -> Linear: logits (B, num_labels)."""

    def __init__(self, config: NanoMosaicBertConfig):
        super().__init__(config)
        self.encoder = NanoMosaicBertModel(config)
        self.pooler = nn.Linear(config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **unused,
    ):
        refuse(unused)
        x = self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state
        if attention_mask is None:
            x = x[:, 0]
        else:
            x = x[torch.arange(x.shape[0], device=x.device), attention_mask.int().argmax(1)]  # len() is fixed in ONNX
        logits = self.classifier(self.dropout(torch.tanh(self.pooler(x)))).float()
        # regression, one label or several: as config.problem_type says, or the labels' dtype
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output


class NanoMosaicBertForTokenClassification(NanoMosaicBertPreTrainedModel):
    """Dropout -> Linear on every token: logits (B, S, num_labels)."""

    def __init__(self, config: NanoMosaicBertConfig):
        super().__init__(config)
        self.encoder = NanoMosaicBertModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **unused,
    ):
        refuse(unused)
        x = self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state
        logits = self.classifier(self.dropout(x)).float()
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        output = TokenClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output
