"""The encoder of nanoMosaicBERT as a transformers model, in plain PyTorch.

export.huggingface puts this file beside the weights, and trust_remote_code runs it: it needs torch
and transformers (tried: 5.24, 4.57), nothing else of the project and no Triton. The parameters are
those of model.py by the same names, but for the classifier's. A batch stays padded and the
attention's bias hides the padding: that traces to TorchScript, exports to ONNX and compiles.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers import modeling_outputs as outputs
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple

try:  # LoRA on the attention's input projection, as peft does for BERT, where none is named
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA

    LORA["nanomosaicbert"] = ["qkv"]
except ImportError:
    pass

FIELDS = dict(  # of EncoderConfig in model.py, as far as they matter here
    vocab_size=30_528, n_layers=12, n_heads=12, d_model=768, d_ff=3_072, position="alibi",
    alibi_ratio=1.0, rope_base=1_000.0, max_positions=512, mlp="geglu", norm="post", bias=True,
    embedding_dropout=0.1, attention_dropout=0.0, output_dropout=0.1, mlp_dropout=0.1,
    classifier_dropout=0.1, vocab_multiple=64, n_token_types=2, norm_eps=1e-12,
)


class NanoMosaicBertConfig(PretrainedConfig):
    """The shape and the ingredients of the encoder, under our names and under transformers'."""

    model_type = "nanomosaicbert"
    attribute_map = {  # noqa: RUF012 (transformers' own idiom)
        "hidden_size": "d_model", "num_hidden_layers": "n_layers", "intermediate_size": "d_ff",
        "num_attention_heads": "n_heads", "max_position_embeddings": "max_positions",
        "type_vocab_size": "n_token_types"}

    def __init__(self, pad_token_id: int = 0, tie_word_embeddings: bool = True, **kwargs):
        for name, value in FIELDS.items():
            setattr(self, name, kwargs.pop(name, value))
        super().__init__(**kwargs)
        self.pad_token_id, self.tie_word_embeddings = pad_token_id, tie_word_embeddings

    @property
    def n_rows(self) -> int:
        """Of the embedding: vocab_size, rounded up."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def to_dict(self) -> dict:
        """With transformers' names too: peft's prompt tuning looks for num_attention_heads here."""
        return super().to_dict() | {name: getattr(self, name) for name in self.attribute_map}


def alibi_slopes(n_heads: int, ratio: float) -> Tensor:
    """(n_heads, 2), for keys to the left and to the right: 2^(-8 (h + 1) / n) where n is a power of
    two, else those of the power of two below, then every other one of the power above (Press et al.
    2022); one side's times `ratio`, by turns."""
    n = 2 ** int(math.log2(n_heads))
    slopes = [2.0 ** (-8 * (h + 1) / n) for h in range(n)]
    above = [2.0 ** (-4 * (h + 1) / n) for h in range(0, 2 * n, 2)]
    slopes = enumerate(slopes + above[: n_heads - n])
    return torch.tensor([(ratio * s, s) if h % 2 else (s, ratio * s) for h, s in slopes])


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """RoPE (Su et al. 2021): columns 2d and 2d + 1 of x (B, H, S, D) turned by `angle` (B, 1, S,
    D/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return torch.stack(turned, -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: NanoMosaicBertConfig):
        super().__init__()
        self.n_heads, self.dropout = config.n_heads, config.attention_dropout
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=config.bias)

    def forward(self, x: Tensor, bias: Tensor | None, angle: Tensor | None, weights_too: bool):
        """x (B, S, d), bias for the scores (B, H, S, S) or what broadcasts to it, RoPE's angles ->
        (B, S, d), and with weights_too the attention weights (B, H, S, S)."""
        B, S, d = x.shape
        qkv = self.qkv(x).view(B, S, 3, self.n_heads, d // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, S, D) each
        if angle is not None:
            q, k = rotate(q, angle), rotate(k, angle)
        bias = None if bias is None else bias.to(q.dtype)
        dropout, weights = self.dropout if self.training else 0.0, None
        if weights_too:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            weights = (scores if bias is None else scores + bias).softmax(-1)
            h = F.dropout(weights, dropout) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v, bias, dropout)
        return h.transpose(1, 2).reshape(B, S, d), weights


class FeedForward(nn.Module):
    def __init__(self, config: NanoMosaicBertConfig):
        super().__init__()
        self.gated = config.mlp == "geglu"
        width, bias = (2 * config.d_ff, False) if self.gated else (config.d_ff, config.bias)
        self.inp = nn.Linear(config.d_model, width, bias=bias)
        self.out = nn.Linear(config.d_ff, config.d_model, bias=config.bias)
        self.dropout = nn.Dropout(config.mlp_dropout)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.dropout(self.out(F.gelu(self.inp(x))))
        gate, up = self.inp(x).chunk(2, dim=-1)
        return self.out(self.dropout(F.gelu(gate) * up))


class Layer(GradientCheckpointingLayer):
    def __init__(self, config: NanoMosaicBertConfig):
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = Attention(config)
        self.attention_out = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.attention_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.mlp = FeedForward(config)
        self.mlp_norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.output_dropout)

    def forward(self, x: Tensor, *how):
        h = self.attention_norm(x) if self.pre_norm else x
        h, weights = self.attention(h, *how)
        x = x + self.dropout(self.attention_out(h))
        if self.pre_norm:
            return x + self.mlp(self.mlp_norm(x)), weights
        x = self.attention_norm(x)
        return self.mlp_norm(x + self.mlp(x)), weights


class Embeddings(nn.Module):
    def __init__(self, config: NanoMosaicBertConfig):
        super().__init__()
        self.word = nn.Embedding(config.n_rows, config.d_model)
        self.token_type = nn.Embedding(config.n_token_types, config.d_model)
        learned = config.position == "learned"
        self.position = nn.Embedding(config.max_positions, config.d_model) if learned else None
        self.norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(config.embedding_dropout)

    def forward(self, words: Tensor, types: Tensor | None, position_ids: Tensor) -> Tensor:
        """words (B, S, d), token types (B, S), position_ids (1 or B, S) -> (B, S, d)."""
        x = words + (self.token_type.weight[0] if types is None else self.token_type(types))
        x = x if self.position is None else x + self.position(position_ids)
        return self.dropout(self.norm(x))


class MlmHead(nn.Module):
    def __init__(self, config: NanoMosaicBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, config.norm_eps)
        self.decoder = nn.Linear(config.d_model, config.n_rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(x))))


class ClassificationHead(nn.Module):
    """First token -> linear, tanh -> dropout -> linear. One module, as peft saves by its name."""

    def __init__(self, config: NanoMosaicBertConfig, n_out: int):
        super().__init__()
        self.pooler = nn.Linear(config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out = nn.Linear(config.d_model, n_out)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """x (B, S, d), mask (B, S) -> (B, n_out); with padding on the left, [CLS] is not at 0."""
        cls = x[:, 0] if attention_mask is None else (
            x[torch.arange(x.shape[0], device=x.device), attention_mask.int().argmax(1)])
        return self.out(self.dropout(torch.tanh(self.pooler(cls)))).float()


class NanoMosaicBertPreTrainedModel(PreTrainedModel):
    config_class = NanoMosaicBertConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # losses are means: Trainer divides by its accumulated batches
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, *args, **kw):
        """transformers' own; the rows stay a multiple of vocab_multiple, as Embeddings has them."""
        multiple = math.lcm(pad_to_multiple_of or 1, self.config.vocab_multiple)
        return super().resize_token_embeddings(new_num_tokens, multiple, *args, **kw)


class NanoMosaicBertModel(NanoMosaicBertPreTrainedModel):
    """Ids (B, S) -> last_hidden_state (B, S, d), zero at the padding."""

    def __init__(self, config: NanoMosaicBertConfig):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        pre = config.norm == "pre"
        self.final_norm = nn.LayerNorm(config.d_model, config.norm_eps) if pre else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word = value

    def attention_bias(self, real: Tensor | None, position_ids: Tensor) -> Tensor | None:
        """ALiBi, and -inf on the keys that are padding: (1 or B, 1 or H, 1 or S, S), or None."""
        bias = None
        if "alibi" in self.config.position:
            ahead = (position_ids[:, None, :] - position_ids[:, :, None])[:, None]  # (B, 1, S, S)
            slopes = alibi_slopes(self.config.n_heads, self.config.alibi_ratio).to(ahead.device)
            left, right = slopes[:, :, None, None].unbind(1)  # (H, 1, 1) each
            bias = -torch.where(ahead <= 0, left, right) * ahead.abs()
        if real is None:
            return bias
        real = real | ~real.any(1, keepdim=True)  # a row of nothing but padding would be NaN
        hide = torch.zeros_like(real, dtype=torch.float32).masked_fill(~real, -torch.inf)
        return hide[:, None, None] if bias is None else bias + hide[:, None, None]

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None,
                inputs_embeds=None, output_attentions=None, output_hidden_states=None, **unused):
        """input_ids, or inputs_embeds (B, S, d) in their place; the rest as transformers' BertModel
        takes it. ValueError for what only decoders have."""
        if wanted := [k for k, v in unused.items() if v is not None and v is not False]:
            raise ValueError(f"{type(self).__name__} does not take {', '.join(wanted)}: an encoder "
                             "has no cache, cross-attention or head mask; leave them out, or None")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if attention_mask is not None and attention_mask.dim() != 2:
            shape = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask has shape {shape}; give one of (batch, length)")
        config = self.config
        words = self.embeddings.word(input_ids) if inputs_embeds is None else inputs_embeds
        real = None if attention_mask is None else attention_mask.bool()
        if position_ids is None:
            position_ids = torch.arange(words.shape[1], device=words.device)[None]
            if real is not None and config.position == "learned":  # count from the first real token
                position_ids = (real.long().cumsum(1) - 1).clamp(min=0)
        x = self.embeddings(words, token_type_ids, position_ids)
        bias, angle = self.attention_bias(real, position_ids), None
        if "rope" in config.position:
            D = config.d_model // config.n_heads
            frequency = config.rope_base ** (torch.arange(0, D, 2, device=words.device) / -D)
            angle = position_ids[:, None, :, None] * frequency  # (1 or B, 1, S, D/2)
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        weights_too = output_attentions or config._attn_implementation == "eager"
        states, attentions = (), ()
        for layer in self.layers:
            states += (x,)
            x, weights = layer(x, bias, angle, weights_too)
            attentions += (weights,)
        x = x if self.final_norm is None else self.final_norm(x)
        x = x if real is None else x * real[..., None]
        return outputs.BaseModelOutput(x, (*states, x) if output_hidden_states else None,
                                       attentions if output_attentions else None)


class Headed(NanoMosaicBertPreTrainedModel):
    """The encoder and a head; loss_function is what transformers has for a class of this name."""

    def __init__(self, config: NanoMosaicBertConfig):
        super().__init__(config)
        self.encoder = NanoMosaicBertModel(config)
        self.add_head(config)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kw):
        out = self.encoder(input_ids, attention_mask, token_type_ids, return_dict=True, **kw)
        logits, loss = self.logits(out.last_hidden_state, attention_mask), None
        if labels is not None:
            what = dict(config=self.config, vocab_size=self.config.vocab_size)
            loss = self.loss_function(logits=logits, pooled_logits=logits, labels=labels, **what)
        return self.output(loss, logits, out.hidden_states, out.attentions)


class NanoMosaicBertForMaskedLM(Headed):
    """logits (B, S, vocab_size), without the rows that pad the embedding."""

    output = outputs.MaskedLMOutput
    _tied_weights_keys = {"head.decoder.weight": "encoder.embeddings.word.weight"}  # noqa: RUF012

    def add_head(self, config: NanoMosaicBertConfig) -> None:
        self.head = MlmHead(config)

    def get_output_embeddings(self) -> nn.Module:
        return self.head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head.decoder = value

    def logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.head(x)[..., : self.config.vocab_size]


class NanoMosaicBertForSequenceClassification(Headed):
    """logits (B, num_labels); the loss is as config.problem_type or the labels' dtype says."""

    output = outputs.SequenceClassifierOutput

    def add_head(self, config: NanoMosaicBertConfig) -> None:
        self.classifier = ClassificationHead(config, config.num_labels)

    def logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.classifier(x, mask)


class NanoMosaicBertForMultipleChoice(Headed):
    """Ids (B, n_choices, S) -> logits (B, n_choices); labels (B,)."""

    def add_head(self, config: NanoMosaicBertConfig) -> None:
        self.classifier = ClassificationHead(config, 1)

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **kw):
        kw |= dict(input_ids=input_ids, token_type_ids=token_type_ids)
        kw["attention_mask"] = attention_mask
        n = (input_ids if kw.get("inputs_embeds") is None else kw["inputs_embeds"]).shape[1]
        kw = {k: x.flatten(0, 1) if isinstance(x, Tensor) else x for k, x in kw.items()}
        out = self.encoder(return_dict=True, **kw)
        logits = self.classifier(out.last_hidden_state, kw["attention_mask"]).view(-1, n)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return outputs.MultipleChoiceModelOutput(loss, logits, out.hidden_states, out.attentions)


class NanoMosaicBertForTokenClassification(Headed):
    """Dropout -> linear on every token: logits (B, S, num_labels)."""

    output = outputs.TokenClassifierOutput

    def add_head(self, config: NanoMosaicBertConfig) -> None:
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.d_model, config.num_labels)

    def logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.classifier(self.dropout(x)).float()


class NanoMosaicBertForQuestionAnswering(Headed):
    """Linear on every token: start_logits and end_logits (B, S) of the answer's span."""

    def add_head(self, config: NanoMosaicBertConfig) -> None:
        self.qa_outputs = nn.Linear(config.d_model, 2)

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None,
                start_positions=None, end_positions=None, **kw):
        out = self.encoder(input_ids, attention_mask, token_type_ids, return_dict=True, **kw)
        (start, end), loss = self.qa_outputs(out.last_hidden_state).float().unbind(-1), None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions)
        states = out.hidden_states, out.attentions
        return outputs.QuestionAnsweringModelOutput(loss, start, end, *states)
