"""Ask a pretrained encoder for missing words.

    python fill_mask.py runs/mosaic-base "paris is the [MASK] of france."
    python fill_mask.py runs/mosaic-base "the [MASK] sat on the [MASK]." "she [MASK] home." --top_k 3
    python fill_mask.py runs/mosaic-base                     # asks for sentences until an empty one
    python fill_mask.py bert-base-uncased "paris is the [MASK] of france."
    python fill_mask.py mosaicml/mosaic-bert-base --tokenizer path/to/bert-base-uncased "she [MASK] home."

A run folder means its latest checkpoint. A checkpoint folder, what export_hf.py wrote, and official MosaicBERT or
Hugging Face BERT weights (a folder, or a name on the hub) work too; --tokenizer is for weights that have none beside
them. Seconds on a laptop.
"""

from dataclasses import dataclass

import torch
import tyro

from corpus.tokenizer import Tokenizer
from machine import read_command_line
from model import MaskedLM, find_folder


@dataclass
class Config:
    """Ask a pretrained encoder for missing words."""

    run: tyro.conf.Positional[str]  # run folder (its latest checkpoint), checkpoint, MosaicBERT or BERT folder or name
    sentences: tyro.conf.Positional[tuple[str, ...]] = ()  # with one [MASK] or more; none: asked for
    top_k: int = 5  # answers for each mask
    tokenizer: str = ""  # tokenizer.json, or a folder with one; default: the model's own


@torch.no_grad()
def fill_mask(model: MaskedLM, tokenizer: Tokenizer, text: str, top_k: int = 5) -> list[list[tuple[str, float]]]:
    """For each [MASK] of `text`, in order: the top_k (token text, probability), likeliest first.

    All masks are predicted at once, each as if the others stayed masked. The model is put in eval mode.
    ValueError when there is no [MASK], or the text is too long for learned positions.
    """
    ids = torch.tensor([tokenizer.cls_id, *tokenizer.encode_with_masks(text), tokenizer.sep_id])  # (T,)
    masked_idx = (ids == tokenizer.mask_id).nonzero().flatten()  # (M,)
    if not len(masked_idx):
        raise ValueError(f"no [MASK] in {text!r}")
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    logits = model.eval()(ids, cu_seqlens=cu_seqlens, max_seqlen=len(ids), masked_idx=masked_idx)  # (M, V)
    probabilities = logits[:, : tokenizer.vocab_size].float().softmax(-1)  # without the rows that pad the vocabulary
    values, tokens = probabilities.topk(min(top_k, tokenizer.vocab_size))
    return [[(tokenizer.token_text(t), p) for t, p in zip(*row)] for row in zip(tokens.tolist(), values.tolist())]


def show(token: str) -> str:
    """A token as a reader wants it: " the" -> "the"; what is no word by itself, quoted: "\\n" -> "'\\\\n'"."""
    word = token.strip()
    return word if word and word.isprintable() and "\ufffd" not in word else repr(token)


def print_answers(model: MaskedLM, tokenizer: Tokenizer, sentence: str, top_k: int) -> None:
    """The sentence, and a line of answers for each of its masks."""
    answers = fill_mask(model, tokenizer, sentence, top_k)
    print(f"\n{sentence}", *("  " + "   ".join(f"{show(t)} {p:.3f}" for t, p in a) for a in answers), sep="\n")


def main(args: list[str] | None = None) -> None:
    """Command line; `args` replaces sys.argv[1:] in tests."""
    cfg = read_command_line(Config, args)
    try:
        if cfg.top_k < 1:
            raise ValueError(f"--top_k {cfg.top_k}: give at least 1")
        folder = find_folder(cfg.run)
        model, tokenizer = MaskedLM.from_pretrained(folder), Tokenizer.load(cfg.tokenizer or folder)
        if tokenizer.vocab_size > model.cfg.padded_vocab_size:
            sizes = f"the tokenizer has {tokenizer.vocab_size:,} entries, the model {model.cfg.padded_vocab_size:,}"
            raise ValueError(f"{sizes}: it was trained with another")
        for sentence in cfg.sentences:
            print_answers(model, tokenizer, sentence, cfg.top_k)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    while not cfg.sentences:
        try:
            if not (sentence := input("\nsentence with [MASK]: ").strip()):
                break
            print_answers(model, tokenizer, sentence, cfg.top_k)
        except ValueError as e:
            print(e)
        except (EOFError, KeyboardInterrupt):
            break


if __name__ == "__main__":
    main()
