"""A small prepared corpus for the tests that train: C4 where it is at hand, else docstrings."""

import ast
import itertools
import json
import os
from pathlib import Path

import pytest

# tests download nothing; read when the hub's client is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import prepare_c4

C4 = Path(__file__).parents[1] / "../shared/data/c4/c4_train.jsonl"


def some_documents(n: int) -> list[str]:
    """`n` real English documents of very different lengths."""
    if C4.exists():
        with open(C4, encoding="utf-8") as f:
            return [json.loads(line)["text"] for line in itertools.islice(f, n)]
    texts = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                texts.append(ast.get_docstring(node) or "")
    return sorted({*texts} - {""})[:n]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def prepare_texts(folder: Path, texts: list[str], **options) -> Path:
    """The folder that prepare_c4.py makes of these texts, in `folder`."""
    source, out = write_jsonl(folder / "documents.jsonl", texts), folder / "prepared"
    options |= dict(source=str(source), out=str(out), val_fraction=0.1, workers=1)
    prepare_c4.prepare(prepare_c4.Config(**options))
    return out


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    """A folder as prepare_c4.py makes it: 400 documents, 800 vocabulary entries."""
    folder = tmp_path_factory.mktemp("corpus")
    return prepare_texts(folder, some_documents(400), vocab_size=800)
