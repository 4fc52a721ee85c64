"""The tokenizer of an export: transformers' fast one, for text that is split into words as well.

export.huggingface puts this file beside tokenizer.json, where trust_remote_code finds it. In a
byte-level vocabulary a word carries the space before it, so the words of a list get theirs back:
their tokens are those of the joined text, where others would run them together.
"""

from transformers import PreTrainedTokenizerFast
from transformers.utils import logging


def with_spaces(words):
    """A list of words, or of such lists, or of pairs: each word but the first behind a space."""
    if words and isinstance(words[0], list | tuple):
        return [with_spaces(inner) for inner in words]
    return words and [" " * (i > 0) + word for i, word in enumerate(words)]


class NanoMosaicBertTokenizer(PreTrainedTokenizerFast):
    @classmethod
    def from_pretrained(cls, *args, add_prefix_space: bool = False, **kwargs):
        if add_prefix_space:
            logging.get_logger(__name__).warning(
                "add_prefix_space is left out: lists of words get the spaces between them without "
                "it, and the first word of a text has none, as in pretraining"
            )
        return super().from_pretrained(*args, **kwargs)

    def __call__(self, text=None, text_pair=None, *args, is_split_into_words=False,
                 return_tensors=None, **kw):
        if not is_split_into_words:
            return super().__call__(text, text_pair, *args, return_tensors=return_tensors, **kw)
        pair = with_spaces(text_pair)
        out = super().__call__(with_spaces(text), pair, *args, is_split_into_words=True, **kw)
        single = not isinstance(out["input_ids"][0], list)
        if "offset_mapping" in out:  # within a word, which had no space
            rows = [out["offset_mapping"]] if single else out["offset_mapping"]
            rows = [[tuple(max(x - bool(word), 0) for x in ends) for ends, word in zip(row, words)]
                    for row, words in zip(rows, map(out.word_ids, range(len(rows))))]
            out["offset_mapping"] = rows[0] if single else rows
        return out.convert_to_tensors(return_tensors, prepend_batch_axis=single)

    def encode(self, text, text_pair=None, **kwargs):
        return self(text, text_pair, **kwargs)["input_ids"]
