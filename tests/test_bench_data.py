"""Claims about bench/data.py: it compares equals, and its report says what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import some_documents, write_jsonl

from bench import data as bench_data
from corpus.tokenizer import Tokenizer
from prepare_c4 import Config, prepare

ROOT = Path(__file__).resolve().parents[1]


def test_report_of_a_small_run_holds_every_number(tmp_path):
    # each word of the first document needs care to be equal
    texts = ["ΟΔΟΣ [MASK] [SEP] in a text", *some_documents(300)]
    source = write_jsonl(tmp_path / "c.jsonl", texts)
    small = ["--megabytes", "1", "--vocab_size", "600", "--repeats", "1"]
    command = [sys.executable, "-m", "bench.data", str(source), *small]
    result = subprocess.run([*command, "--out", str(tmp_path / "r.json")], cwd=ROOT,
                            capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["same_documents"] and {"datasets.map", "ours"} <= report["paths"].keys()
    for path in report["paths"].values():
        assert path["mb_per_cpu_s"] == pytest.approx(report["megabytes"] / path["cpu_s"])
    ours, peer = (report["paths"][name]["cpu_s"] for name in ("ours", "datasets.map"))
    assert report["ratio_per_core"] == pytest.approx(peer / ours)
    assert "ours / datasets.map per core" in result.stdout and "the same" in result.stdout


def test_the_comparison_sees_one_wrong_id(tmp_path):
    import datasets

    source = write_jsonl(tmp_path / "c.jsonl", some_documents(60))
    prepare(Config(str(source), str(tmp_path / "o"), vocab_size=400, workers=1))
    texts = [t.strip() for t in some_documents(60)]
    encoded = Tokenizer.load(tmp_path / "o").encode_batch(texts)

    def same() -> bool:
        features = datasets.Features({"ids": datasets.List(datasets.Value("uint16"))})
        folder = tmp_path / f"arrow{len(os.listdir(tmp_path))}"
        datasets.Dataset.from_dict({"ids": encoded}, features=features).save_to_disk(folder)
        return bench_data.same_documents(tmp_path / "o", next(folder.glob("*.arrow")))

    assert same()
    encoded[7][0] += 1
    assert not same()
    encoded[7][0] -= 1
    del encoded[7]
    assert not same()


def test_an_unusable_corpus_is_one_line(tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", ["a b"])
    for source, message in ((tmp_path / "none.jsonl", "does not exist"), (few, "too small")):
        with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
            bench_data.run(bench_data.Config(source=str(source)))
