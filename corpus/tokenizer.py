"""Tokenizer: byte-level BPE run by tiktoken, or a Hugging Face tokenizer.json."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from records import BadInput, read_json, to_json, write_atomically

FORMAT = 1  # version of tokenizer.meta.json
SPECIALS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
ROBERTA = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")  # its names for them
N_FIXED = len(SPECIALS) + 256  # ids every vocabulary of ours has
# Letters of a longer word are cut here for training: its time grows with the square of a word's
# length, and DNA is one word. Encoding does not cut.
LONGEST_WORD = 256
# One pattern for the trainer (Oniguruma) and for tiktoken (Rust): contractions, words with their
# leading space, numbers in groups of three digits, punctuation, white space. GPT-2's \s+(?!\S)
# hands the last of several spaces to the word behind them; a look-ahead costs a third of tiktoken's
# speed (35 against 50 MB/s), overflows its stack on a run of a million spaces, and changes the
# number of tokens by less than 0.1 % (C4, Wikipedia, IMDB).
PATTERN = (
    r"['’](?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])"
    r"| ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s{1,32}")
# Byte-level BPE in `tokenizers` writes a byte as one printable character: itself where it is one,
# else 256, 257, …
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_CHARS = {b: chr(b) for b in PRINTABLE}
BYTE_CHARS |= {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
CHAR_BYTES = {char: byte for byte, char in BYTE_CHARS.items()}


def valid_unicode(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tokenizer:
    """Byte-level BPE run by tiktoken, or a Hugging Face tokenizer.json run by `tokenizers`.

    Our own vocabulary: ids 0-4 are [PAD] [UNK] [CLS] [SEP] [MASK], 5-260 the bytes 0-255, then the
    merges in the order they were learned. decode(encode(s)) == s.lower() (== s with
    lowercase=False) for every Unicode string; a lone surrogate becomes U+FFFD. A Hugging Face
    vocabulary keeps its own ids and its own losses.

    Attributes: vocab_size, lowercase, pad_id, unk_id, cls_id, sep_id, mask_id; markers, the ids of
    further special tokens that a tokenizer.json brings. In a text these are themselves, while the
    name of one of the five, "[MASK]", is ordinary text.
    """

    def __init__(self, vocabulary: bytes, meta: dict):
        """`vocabulary`: content of tokenizer.tiktoken or tokenizer.json; `meta`: as in train()."""
        self.vocabulary, self.meta = vocabulary, meta
        self.vocab_size, self.lowercase = meta["vocab_size"], meta["lowercase"]
        ids = [meta["special_ids"][name] for name in SPECIALS]
        self.names = dict(zip(ids, SPECIALS))
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        self.hf, self.bpe, self.markers = None, None, []
        if meta["kind"] == "huggingface":
            import tokenizers

            content = json.loads(vocabulary)
            for token in content["added_tokens"]:
                if token["special"] and token["id"] not in self.names:
                    self.markers.append(token["id"])
                    token["special"] = False
            self.hf = tokenizers.Tokenizer.from_str(json.dumps(content))
            self.hf.no_truncation()
            self.hf.no_padding()
            self.hf.encode_special_tokens = True  # those that still are special: as text
        else:
            pairs = (line.split() for line in vocabulary.splitlines())
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            self.bpe = tiktoken.Encoding("mosaic", pat_str=meta["pattern"], mergeable_ranks=ranks,
                                         special_tokens=meta["special_ids"])

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> "Tokenizer":
        """Learn a byte-level BPE of exactly `vocab_size` entries; the same texts give the same
        bytes. BadInput when vocab_size is not in 261..65536 or more than the texts can reach."""
        if not N_FIXED <= vocab_size <= 65536:
            raise BadInput(f"--vocab_size {vocab_size} must be {N_FIXED}..65536 "
                           "(5 specials, 256 bytes; uint16 ids)")
        import tokenizers
        from tokenizers import pre_tokenizers

        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        pattern = tokenizers.Regex(PATTERN.replace("]+", f"]{{1,{LONGEST_WORD}}}"))
        split = pre_tokenizers.Split(pattern, "isolated")
        learner = tokenizers.Tokenizer(tokenizers.models.BPE())
        learner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIALS), min_frequency=2, show_progress=False,
            initial_alphabet=sorted(byte_level.alphabet()))
        texts = (valid_unicode(t.lower() if lowercase else t) for t in texts)
        learner.train_from_iterator(texts, trainer)
        learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
        tokens = [bytes([b]) for b in range(256)]
        tokens += [bytes(CHAR_BYTES[c] for c in token) for token, _ in learned if len(token) > 1]
        if (reached := len(tokens) + len(SPECIALS)) != vocab_size:
            raise BadInput(f"the corpus is too small for --vocab_size {vocab_size}: it reaches "
                           f"{reached} tokens; choose at most that, or a larger corpus")
        numbered = enumerate(tokens, len(SPECIALS))
        lines = (b"%s %d\n" % (base64.b64encode(token), i) for i, token in numbered)
        meta = {"kind": "tiktoken", "vocab_size": vocab_size, "lowercase": lowercase,
                "special_ids": dict(SPECIALS), "pattern": PATTERN}
        return cls(b"".join(lines), meta)

    @classmethod
    def from_hf(cls, path: Path) -> "Tokenizer":
        """A Hugging Face tokenizer.json (WordPiece, BPE, Unigram) as it is, or BERT's vocab.txt.
        BadInput when it is neither, or lacks a mask, padding, unknown, start or end token."""
        import tokenizers

        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".txt":  # BERT's older format; its settings lie beside it
                file = path.with_name("tokenizer_config.json")
                given = read_json(file) if file.is_file() else {}
                old = tokenizers.BertWordPieceTokenizer(
                    str(path), lowercase=given.get("do_lower_case", True),
                    strip_accents=given.get("strip_accents"),
                    handle_chinese_chars=given.get("tokenize_chinese_chars", True))
                file = path.with_name("added_tokens.json")
                added = read_json(file) if file.is_file() else {}
                old.add_special_tokens(sorted(added, key=added.get))  # in the order of their ids
                text = old.to_str()
            vocab = tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
        except Exception as e:  # `tokenizers` raises bare Exception
            raise BadInput(f"{path} is no tokenizer.json or vocab.txt ({e})") from None
        ids = {name: vocab.get(name, vocab.get(other)) for name, other in zip(SPECIALS, ROBERTA)}
        if missing := ", ".join(name for name, i in ids.items() if i is None):
            raise BadInput(f"{path} lacks {missing} (or RoBERTa's names), which an encoder needs")
        if (size := max(vocab.values()) + 1) > 65536:
            raise BadInput(f"{path} has {size} tokens; ids on disk are uint16, at most 65536")
        # it does its own lowercasing; here that is only reported
        normalizer = json.dumps(json.loads(text).get("normalizer"))
        lowercase = '"lowercase": true' in normalizer or '"Lowercase"' in normalizer
        return cls(text.encode(), {"kind": "huggingface", "vocab_size": size,
                                   "lowercase": lowercase, "special_ids": ids})

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load from a folder written by save() (a data folder, a checkpoint) or from a
        tokenizer.json. BadInput when the files are missing or damaged."""
        path = Path(path)
        if path.is_dir() and (path / "tokenizer.meta.json").exists():
            meta = read_json(path / "tokenizer.meta.json")
            file = path / cls.file_name(meta.get("kind"))
            try:
                vocabulary = file.read_bytes()
                sha256, version = meta.pop("sha256"), meta.pop("format")
                if hashlib.sha256(vocabulary).hexdigest() != sha256 or version != FORMAT:
                    raise ValueError("it is not the one tokenizer.meta.json describes")
                return cls(vocabulary, meta)
            except (OSError, KeyError, ValueError) as e:
                raise BadInput(f"{file} cannot be used ({e}); prepare the folder again") from None
        for file in (path, path / "tokenizer.json", path / "vocab.txt"):
            if file.is_file():
                return cls.from_hf(file)
        raise BadInput(f"no tokenizer at {path}: give a tokenizer.json, a vocab.txt or a folder "
                       "made by prepare_c4.py")

    @staticmethod
    def file_name(kind: str) -> str:
        return "tokenizer.json" if kind == "huggingface" else "tokenizer.tiktoken"

    def save(self, folder: str | Path) -> None:
        """Write the vocabulary and tokenizer.meta.json, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / self.file_name(self.meta["kind"]), self.vocabulary)
        meta = {"format": FORMAT, "sha256": hashlib.sha256(self.vocabulary).hexdigest()}
        write_atomically(folder / "tokenizer.meta.json", to_json(meta | self.meta))

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether both number the same tokens alike, however their files are written."""
        if self.hf and other.hf:
            return self.hf.get_vocab() == other.hf.get_vocab() and self.lowercase == other.lowercase
        if self.hf or other.hf:  # ours, and what export.huggingface has made of it
            texts = ([t.token_text(i) for i in range(t.vocab_size)] for t in (self, other))
            return next(texts) == next(texts)
        return (self.vocabulary, self.meta) == (other.vocabulary, other.meta)

    def encode(self, text: str) -> list[int]:
        """Token ids without specials. "[MASK]" written in `text` is ordinary text."""
        return self.encode_arrays([text])[0].tolist()

    def encode_with_masks(self, text: str) -> list[int]:
        """As encode(), but each "[MASK]" (any case) becomes mask_id. White space before it is
        dropped: the token it stands for carries its own leading space."""
        first, *others = map(self.encode, re.split(r"\s*\[mask\]", text, flags=re.IGNORECASE))
        return first + [i for part in others for i in (self.mask_id, *part)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """encode() of each text, on all cores."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: list[str], threads: int = 0) -> list[np.ndarray]:
        """encode() of each text as (n,) uint16 arrays, on `threads` threads (0: one per core)."""
        if self.hf:
            texts = [valid_unicode(t) for t in texts]
            encodings = self.hf.encode_batch_fast(texts, add_special_tokens=False)
            return [np.asarray(e.ids, np.uint16) for e in encodings]

        def encode(texts: list[str]) -> list[np.ndarray]:  # a fifth faster than as lists of ints
            texts = (valid_unicode(t.lower() if self.lowercase else t) for t in texts)
            return [self.bpe.encode_to_numpy(t, disallowed_special=()).astype(np.uint16)
                    for t in texts]

        n = threads or os.cpu_count() or 1
        shares = [texts[i * len(texts) // n : (i + 1) * len(texts) // n] for i in range(n)]
        with ThreadPoolExecutor(n) as pool:  # tiktoken releases the GIL
            return [ids for found in pool.map(encode, shares) for ids in found]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are skipped, bytes that are no UTF-8 become U+FFFD."""
        kept = [i for i in map(int, ids) if i not in self.names]
        if bad := [i for i in kept if not 0 <= i < self.vocab_size]:
            raise ValueError(f"token id {bad[0]} is outside the vocabulary of {self.vocab_size}")
        return self.hf.decode(kept) if self.hf else self.bpe.decode(kept)

    def token_text(self, token_id: int) -> str:
        """One id for display: " the", "##ing", "[MASK]"."""
        if token_id in self.names:
            return self.names[token_id]
        if not self.hf:
            return self.decode([token_id])
        name = self.hf.id_to_token(token_id) or ""
        if type(self.hf.decoder).__name__ != "ByteLevel" or not CHAR_BYTES.keys() >= set(name):
            return name
        return bytes(CHAR_BYTES[c] for c in name).decode("utf-8", "replace")
