"""Claims about bench/data.py: it compares equals, and its report says what it measured."""

import json
import os

import datasets
import pytest
from conftest import prepare_texts, python, some_documents, write_jsonl

from bench import data as bench_data
from corpus.tokenizer import Tokenizer


def test_report_of_a_small_run_holds_every_number(tmp_path):
    # each word of the first document needs care to be equal
    texts = ["ΟΔΟΣ [MASK] [SEP] in a text", *some_documents(300)]
    source = write_jsonl(tmp_path / "c.jsonl", texts)
    small = "--megabytes", 1, "--vocab_size", 600, "--repeats", 1, "--out", tmp_path / "r.json"
    result = python("-m", "bench.data", source, *small)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["same_documents"] and {"datasets.map", "ours"} <= report["paths"].keys()
    for path in report["paths"].values():
        assert path["mb_per_cpu_s"] == pytest.approx(report["megabytes"] / path["cpu_s"])
    ours, peer = (report["paths"][name]["cpu_s"] for name in ("ours", "datasets.map"))
    assert report["ratio_per_core"] == pytest.approx(peer / ours)
    assert "ours / datasets.map per core" in result.stdout and "the same" in result.stdout


def test_the_comparison_sees_one_wrong_id(tmp_path):
    prepared = prepare_texts(tmp_path, some_documents(60), vocab_size=400)
    encoded = Tokenizer.load(prepared).encode_batch([t.strip() for t in some_documents(60)])

    def same() -> bool:
        features = datasets.Features({"ids": datasets.List(datasets.Value("uint16"))})
        folder = tmp_path / f"arrow{len(os.listdir(tmp_path))}"
        datasets.Dataset.from_dict({"ids": encoded}, features=features).save_to_disk(folder)
        return bench_data.same_documents(prepared, next(folder.glob("*.arrow")))

    assert same()
    encoded[7][0] += 1
    assert not same()
    encoded[7][0] -= 1
    del encoded[7]
    assert not same()
