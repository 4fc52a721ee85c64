"""Any encoder that transformers knows, behind the flat calls of our own, so that a comparison is fair.

    model, tokenizer = HFClassifier("roberta-base", n_labels=2), HFTokenizer("roberta-base")

Used by finetune_glue.py --hf: same examples, order, optimizer and evaluation as our checkpoints; only the padding,
which such a model cannot do without, is its own.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from corpus.tokenizer import valid_unicode

logging.set_verbosity_error()  # it reports every new classifier in ten lines
logging.disable_progress_bar()

# how transformers' configs call the dropout of embeddings, layers and classifier
DROPOUTS = (
    "hidden_dropout_prob", "classifier_dropout", "dropout", "seq_classif_dropout", "embedding_dropout", "mlp_dropout",
    "hidden_dropout", "pooler_dropout",
)  # fmt: skip


class HFClassifier(nn.Module):
    """Any transformers encoder behind the flat call of SequenceClassifier; it pads inside, as it knows no other way.

    pretrained=False: random weights of that shape. n_positions: rows of its position table that a text can use, inf
    where it has none.
    """

    def __init__(self, path: str, n_labels: int, dropout: float | None = None, pretrained: bool = True):
        super().__init__()
        try:
            config = AutoConfig.from_pretrained(path, num_labels=n_labels)
            known = [name for name in DROPOUTS if hasattr(config, name)]
            if dropout is not None and not known:
                raise ValueError("it has no dropout that --dropout could set")
            for name in known if dropout is not None else ():
                setattr(config, name, dropout)
            # fp32 whatever the file holds: AdamW's small steps are lost in bf16 weights
            if pretrained:
                how = dict(config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True)
                self.model, report = AutoModelForSequenceClassification.from_pretrained(path, **how)
                new = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
                body = f"{self.model.base_model_prefix}."
                if lost := sorted(k for k in new if k.startswith(body) and ".pooler." not in k):
                    raise ValueError(f"its file has no {lost[0]} of the right shape")
            else:
                self.model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        except Exception as e:  # transformers raises a dozen kinds
            raise ValueError(f"--hf {path}: transformers cannot load it ({first_line(e)})") from None
        self.typed = (getattr(config, "type_vocab_size", None) or 0) > 1
        self.n_positions = math.inf
        # RoBERTa counts positions from padding_idx + 1: the rows before are out of a text's reach
        for name, m in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(m, nn.Embedding):
                self.n_positions = m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1)

    @property
    def classifier(self) -> nn.Linear:
        """The last layer: d_model -> n_labels."""
        n_labels = self.model.config.num_labels
        return [m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == n_labels][-1]

    def compile(self, **how) -> None:
        """torch.compile what is transformers'; the padding before it depends on the data and stays outside."""
        self.model.compile(**how)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Flat (T,) ids, those behind the last document ignored -> logits (B, n_labels)."""
        lengths = cu_seqlens.diff().long()
        real = torch.arange(max_seqlen, device=lengths.device) < lengths[:, None]  # (B, S)
        padded = real.new_zeros((2, *real.shape), dtype=torch.long)
        padded[0] = self.model.config.pad_token_id or 0
        padded[:, real] = torch.stack([input_ids, token_type_ids])[:, : cu_seqlens[-1]]
        types = {"token_type_ids": padded[1]} if self.typed else {}
        return self.model(input_ids=padded[0], attention_mask=real.long(), **types).logits

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


class HFTokenizer:
    """What encode() needs of a transformers tokenizer. ValueError (one line) when there is none, when it has no start
    or end token, and when the model beside it has fewer tokens."""

    def __init__(self, path: str):
        try:
            self.hf = AutoTokenizer.from_pretrained(path)
            config = AutoConfig.from_pretrained(path)
            n = config.vocab_size
        except Exception as e:
            raise ValueError(f"--hf {path}: no tokenizer and config ({first_line(e)})") from None
        self.cls_id, self.sep_id = self.hf.cls_token_id, self.hf.sep_token_id
        if self.cls_id is None or self.sep_id is None:
            raise ValueError(f"--hf {path}: its tokenizer has no [CLS] and [SEP]; an encoder needs them")
        if (highest := max(self.hf.get_vocab().values())) >= n:
            raise ValueError(f"--hf {path}: the model has {n} tokens, the tokenizer there {highest + 1}")
        self.n_between = max(1, self.hf.num_special_tokens_to_add(pair=True) - 2)  # 0 in all: it leaves them to us
        self.vocabulary = repr(sorted(self.hf.get_vocab().items())).encode()
        self.revision = getattr(config, "_commit_hash", None) or ""  # of a model of the hub

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.hf([valid_unicode(t) for t in texts], add_special_tokens=False, verbose=False)["input_ids"]


def first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]
