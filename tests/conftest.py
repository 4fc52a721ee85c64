"""A small prepared corpus for the tests that train: real C4 text where it is at hand, else Python's own docstrings."""

import ast
import itertools
import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests download nothing; read when the hub's client is imported

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
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node):
                texts.append(ast.get_docstring(node))
    return sorted(set(texts))[:n]


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    """A folder as prepare_c4.py makes it: 400 documents, 800 vocabulary entries."""
    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in some_documents(400)), encoding="utf-8")
    out = folder / "prepared"
    prepare_c4.prepare(prepare_c4.Config(source=str(source), out=str(out), vocab_size=800, val_fraction=0.1, workers=1))
    return out
