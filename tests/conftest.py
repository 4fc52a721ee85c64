"""What several files of tests use: a small prepared corpus (C4 where it is at hand, else
docstrings), weights, tokenizers, other processes, and what a refusal looks like."""

import itertools
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

# tests download nothing; read when the hub's client is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import prepare_c4
from corpus.docstrings import docstrings_of
from corpus.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
C4 = ROOT / "../shared/data/c4/c4_train.jsonl"
SHAPE = dict(n_layers=2, n_heads=2, d_model=32, d_ff=48, embedding_dropout=0.0, output_dropout=0.0,
             mlp_dropout=0.0)
ODD = [
    "ΟΔΥΣΣΕΥΣ ΚΑΙ Α.Σ. ΑΣ'Α 'Σ' ΣΣ Σ",  # the final sigma, and sigmas that only look final
    "İstanbul IĞDIR ß ẞ ǅ ﬁ Å",
    "naïve cafe\u0301 e\u0301\u0301\u0301 \u200d👩‍👩‍👧‍👦🏽 \U0001f1e9\U0001f1ea",
    "日本語のテキスト 한국어 العربية עברית हिन्दी ไทย",
    "\t\ttabs\r\nand\u2028lines\x0b\x0c  \u3000 \xa0 " + " " * 100 + "\n" * 70 + "end ",
    "²³¼ ١٢٣ 1234567890 Ⅻ x²" + "-" * 99 + "=" * 64 + "a" * 200,
    "\x00\x7f\ufeff\ufffd\ue000 don't DON'T we’ll",
    "",
]


def some_documents(n: int) -> list[str]:
    """`n` real English documents of very different lengths."""
    if C4.exists():
        with open(C4, encoding="utf-8") as f:
            return [json.loads(line)["text"] for line in itertools.islice(f, n)]
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    groups = {tuple(group) for file in files for group in docstrings_of(str(file))}
    return sorted(text for group in groups if len(text := "\n".join(group)) > 100)[:n]


def write_jsonl(path: Path, rows: list) -> Path:
    """A line for each row, or for each text."""
    lines = [json.dumps({"text": row} if isinstance(row, str) else row) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def prepare_texts(folder: Path, texts: list[str], **options) -> Path:
    """The folder that prepare_c4.py makes of these texts, in `folder`."""
    source, out = write_jsonl(folder / "documents.jsonl", texts), folder / "prepared"
    options = dict(source=str(source), out=str(out), val_fraction=0.1, workers=1) | options
    prepare_c4.prepare(prepare_c4.Config(**options))
    return out


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    """A folder as prepare_c4.py makes it: 400 documents, 800 vocabulary entries."""
    folder = tmp_path_factory.mktemp("corpus")
    return prepare_texts(folder, some_documents(400), vocab_size=800)


@pytest.fixture(scope="session")
def tokenizer(corpus_dir):
    return Tokenizer.load(corpus_dir)


@contextmanager
def refused(*parts: str):
    """The block ends with exit and one line, "error: ...", that holds these parts."""
    with pytest.raises(SystemExit) as e:
        yield
    line = str(e.value)
    assert line.startswith("error: ") and "\n" not in line, line
    assert all(part in line for part in parts), line


def python(*args, code: int = 0, cwd: Path = ROOT, timeout: float = 1800, exe=sys.executable,
           **env: str) -> subprocess.CompletedProcess:
    """A new Python with these arguments, to which this project is known; it exits with `code`.
    TimeoutExpired, and it is killed with SIGKILL, after `timeout` seconds."""
    how = dict(env=os.environ | {"PYTHONPATH": str(ROOT)} | env, capture_output=True, text=True)
    done = subprocess.run([exe, *map(str, args)], cwd=cwd, timeout=timeout, **how)
    assert done.returncode == code, done.stdout[-8000:] + done.stderr[-4000:]
    return done


def randomize(model, seed: int = 0):
    """Weights large enough that a wrong one shows: N(0, 0.02) and zero biases hide mistakes."""
    import torch

    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += torch.randn(p.shape, generator=g) * 0.1
    return model.eval()


def random_mlm(tokenizer: Tokenizer, **shape):
    """A small MaskedLM with weights as `randomize` makes them."""
    from model import EncoderConfig, MaskedLM

    sizes = dict(vocab_size=tokenizer.vocab_size) | SHAPE | shape
    return randomize(MaskedLM(EncoderConfig(**sizes)))


def save_checkpoint(folder: Path, tokenizer: Tokenizer, model, **progress) -> Path:
    model.save_pretrained(folder)
    tokenizer.save(folder)
    if progress:
        (folder / "progress.json").write_text(json.dumps(progress))
    return folder


def wordpiece(file: Path, texts: list[str], vocab_size: int, *markers: str) -> Path:
    """A small tokenizer.json as BERT's: WordPiece, its own ids and template."""
    from tokenizers import BertWordPieceTokenizer

    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    learner.add_special_tokens(list(markers))
    learner.save(str(file))
    return file
