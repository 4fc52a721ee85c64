"""Ask a pretrained encoder for missing words.

    python fill_mask.py runs/mosaic-base "paris is the [MASK] of france."
    python fill_mask.py runs/mosaic-base             # asks for sentences until an empty one
    python fill_mask.py runs/mosaic-base "she [MASK] home." --top_k 10 --json
    python fill_mask.py bert-base-uncased "the [MASK] sat on the [MASK]." "she [MASK] home."
    python fill_mask.py mosaicml/mosaic-bert-base --tokenizer path/to/bert "a [MASK]."

A run folder means its latest checkpoint. A checkpoint, an exported folder, and official MosaicBERT
or Hugging Face BERT weights (a folder, or a name on the hub) work too. Seconds on a laptop.
"""

import json
from contextlib import suppress
from dataclasses import dataclass

import torch
import tyro

from corpus.tokenizer import Tokenizer
from machine import script
from model import MaskedLM, find_folder


@dataclass
class Config:
    run: tyro.conf.Positional[str]  # run folder, checkpoint, MosaicBERT or BERT folder or name
    sentences: tyro.conf.Positional[tuple[str, ...]] = ()  # with [MASK]s; none: asked for
    top_k: int = 3  # answers for each mask
    json: bool = False  # one line a sentence: {"text": ..., "masks": [[{"token", "probability"}]]}
    tokenizer: str = ""  # tokenizer.json, or a folder with one; default: the model's own


@torch.no_grad()
def fill_mask(model: MaskedLM, tokenizer: Tokenizer, text: str, top_k: int = 3) -> list[list]:
    """For each [MASK] of `text`, in order: the top_k (token text, probability), likeliest first.

    All are predicted at once, each as if the others stayed masked; the model is put in eval mode.
    ValueError when there is no [MASK], or the text is too long for learned positions.
    """
    ids = [tokenizer.cls_id, *tokenizer.encode_with_masks(text), tokenizer.sep_id]
    ids = torch.tensor(ids)  # (T,)
    masked_idx = (ids == tokenizer.mask_id).nonzero().flatten()  # (M,)
    if not len(masked_idx):
        raise ValueError(f"no [MASK] in {text!r}")
    documents = dict(cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32), max_seqlen=len(ids))
    logits = model.eval()(ids, masked_idx=masked_idx, **documents)  # (M, V)
    probabilities = logits[:, : tokenizer.vocab_size].float().softmax(-1)  # no padding rows
    values, tokens = probabilities.topk(min(top_k, tokenizer.vocab_size))
    rows = zip(tokens.tolist(), values.tolist())
    return [[(tokenizer.token_text(t), p) for t, p in zip(*row)] for row in rows]


def show(token: str) -> str:
    """A token as a reader wants it: " the" -> "the"; what is no word by itself, quoted."""
    word = token.strip()
    return word if word and word.isprintable() and "\ufffd" not in word else repr(token)


def print_answers(model: MaskedLM, tokenizer: Tokenizer, text: str, cfg: Config) -> None:
    """The sentence, and a line of answers for each of its masks; or all of it as a line of JSON."""
    answers = fill_mask(model, tokenizer, text, cfg.top_k)
    if cfg.json:
        masks = [[{"token": t, "probability": round(p, 6)} for t, p in mask] for mask in answers]
        print(json.dumps({"text": text, "masks": masks}, ensure_ascii=False))
    else:
        lines = ("  " + "   ".join(f"{show(t)} {p:.3f}" for t, p in mask) for mask in answers)
        print(f"\n{text}", *lines, sep="\n")


def answer(cfg: Config) -> None:
    """Answer each sentence, given or asked for. ValueError for what cannot be answered."""
    if cfg.top_k < 1:
        raise ValueError(f"--top_k {cfg.top_k}: give at least 1")
    folder = find_folder(cfg.run)
    model = MaskedLM.from_pretrained(folder)
    tokenizer = Tokenizer.load(cfg.tokenizer or folder)
    if (n := tokenizer.vocab_size) > (rows := model.cfg.padded_vocab_size):
        raise ValueError(f"the tokenizer has {n} entries, the model {rows}: not its tokenizer")
    for text in cfg.sentences:
        print_answers(model, tokenizer, text, cfg)
    with suppress(EOFError, KeyboardInterrupt):
        while not cfg.sentences and (text := input("\nsentence with [MASK]: ").strip()):
            try:
                print_answers(model, tokenizer, text, cfg)
            except ValueError as e:  # a slip of the pen does not end the questions
                print(e)


main = script(answer, Config)

if __name__ == "__main__":
    main()
