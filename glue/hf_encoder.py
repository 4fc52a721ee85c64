"""finetune_glue.py --hf: any encoder that transformers knows behind the flat calls of our own; only
the padding, which such a model cannot do without, is its own."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.tokenizer import valid_unicode

try:
    import transformers as hf
except ImportError as e:
    raise SystemExit(f"error: --hf: {e}; pip install -r requirements-dev.txt") from None

hf.utils.logging.set_verbosity_error()  # it reports every new classifier in ten lines
hf.utils.logging.disable_progress_bar()


class HFClassifier(nn.Module):
    """Any transformers encoder behind the flat call of SequenceClassifier, or of TokenClassifier.

    pretrained=False: random weights of that shape. n_positions: rows of its position table that a
    text can use, inf where it has none. ValueError for weights that are not all there.
    """

    def __init__(self, path: Path, n_labels: int, dropout: float | None = None, pretrained=True,
                 words=False):
        super().__init__()
        self.words = words
        auto = getattr(hf, f"AutoModelFor{'Token' if words else 'Sequence'}Classification")
        config = hf.AutoConfig.from_pretrained(path, num_labels=n_labels)
        # of embeddings, layers and classifier: each kind of encoder has its own names for them
        for name in config.to_dict() if dropout is not None else ():
            if "dropout" in name and "attention" not in name:
                setattr(config, name, dropout)
        if pretrained:  # fp32 whatever the file holds: AdamW's small steps are lost in bf16 weights
            self.model, report = auto.from_pretrained(
                path, config=config, dtype=torch.float32, ignore_mismatched_sizes=True,
                output_loading_info=True)
            new = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
            body = f"{self.model.base_model_prefix}."
            if lost := sorted(k for k in new if k.startswith(body) and ".pooler." not in k):
                raise ValueError(f"--hf {path}: its file has no {lost[0]} of the right shape")
        else:
            self.model = auto.from_config(config, dtype=torch.float32)
        self.typed = (getattr(config, "type_vocab_size", None) or 0) > 1
        # RoBERTa counts positions from padding_idx + 1: the rows before are out of a text's reach
        self.n_positions = next((
            m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1)
            for name, m in self.model.named_modules()
            if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)), math.inf)

    def compile(self, **how) -> None:
        """torch.compile what is transformers'; the padding before it depends on the data."""
        self.model.compile(**how)

    def forward(self, input_ids, token_type_ids, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Flat (T,) ids, those behind the last document ignored -> logits (B or T, n_labels)."""
        lengths = cu_seqlens.diff().long()
        real = torch.arange(max_seqlen, device=lengths.device) < lengths[:, None]  # (B, S)
        padded = real.new_zeros((2, *real.shape), dtype=torch.long)
        padded[0] = self.model.config.pad_token_id or 0
        padded[:, real] = torch.stack([input_ids, token_type_ids])[:, : cu_seqlens[-1]]
        types = {"token_type_ids": padded[1]} if self.typed else {}
        logits = self.model(input_ids=padded[0], attention_mask=real.long(), **types).logits
        return F.pad(logits[real], (0, 0, 0, len(input_ids) - real.sum())) if self.words else logits

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


class HFTokenizer:
    """What encode() needs of a transformers tokenizer. ValueError without a start or end token."""

    def __init__(self, path: Path):
        self.hf = hf.AutoTokenizer.from_pretrained(path)
        self.cls_id, self.sep_id = self.hf.cls_token_id, self.hf.sep_token_id
        self.unk_id = self.hf.unk_token_id
        self.vocab_size = max(self.hf.get_vocab().values()) + 1
        if self.cls_id is None or self.sep_id is None:
            raise ValueError(f"--hf {path}: its tokenizer has no [CLS] and [SEP]")
        # of a pair; a tokenizer that adds no special tokens leaves one to us
        self.n_between = max(1, self.hf.num_special_tokens_to_add(pair=True) - 2)
        self.vocabulary = repr(sorted(self.hf.get_vocab().items())).encode()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        texts = [valid_unicode(text) for text in texts]
        return self.hf(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def save(self, folder: Path) -> None:
        self.hf.save_pretrained(folder)
