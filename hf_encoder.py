"""Any encoder that transformers knows, behind the flat calls of our own, so that a comparison is fair.

    model, tokenizer = HFClassifier("roberta-base", n_labels=2), HFTokenizer("roberta-base")

Used by finetune_glue.py --hf: same examples, order, optimizer and evaluation as our checkpoints; only the padding,
which such a model cannot do without, is its own.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer


class HFClassifier(nn.Module):
    """Any transformers encoder behind the flat call of SequenceClassifier; it pads inside, as it knows no other way."""

    def __init__(self, path: str, n_labels: int, dropout: float | None = None):
        super().__init__()
        try:
            config = AutoConfig.from_pretrained(path, num_labels=n_labels)
            for name in ("hidden_dropout_prob", "classifier_dropout") if dropout is not None else ():
                setattr(config, name, dropout)
            self.model = AutoModelForSequenceClassification.from_pretrained(
                path, config=config, ignore_mismatched_sizes=True
            )
        except (OSError, ValueError) as e:
            raise ValueError(f"--hf {path}: transformers cannot load it ({str(e).splitlines()[0]})") from None
        self.typed = (getattr(config, "type_vocab_size", None) or 0) > 1

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Flat (T,) ids -> logits (B, n_labels)."""
        lengths = cu_seqlens.diff().long()
        real = torch.arange(max_seqlen, device=lengths.device) < lengths[:, None]  # (B, S)
        padded = real.new_zeros((2, *real.shape), dtype=torch.long)
        padded[0] = self.model.config.pad_token_id or 0
        padded[:, real] = torch.stack([input_ids, token_type_ids])
        types = {"token_type_ids": padded[1]} if self.typed else {}
        return self.model(input_ids=padded[0], attention_mask=real.long(), **types).logits

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


class HFTokenizer:
    """What encode() needs of a transformers tokenizer."""

    def __init__(self, path: str):
        try:
            self.hf = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as e:
            raise ValueError(f"--hf {path}: no tokenizer ({str(e).splitlines()[0]})") from None
        self.cls_id, self.sep_id = self.hf.cls_token_id, self.hf.sep_token_id
        self.n_between = self.hf.num_special_tokens_to_add(pair=True) - 2
        self.vocabulary = repr(sorted(self.hf.get_vocab().items())).encode()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.hf(texts, add_special_tokens=False, verbose=False)["input_ids"]
