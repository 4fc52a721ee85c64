"""Claims about bench_data.py: it runs on any corpus, compares equals, and its report says what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import some_documents

from bench import data as bench_data
from corpus.tokenizer import Tokenizer
from prepare_c4 import Config, prepare

ROOT = Path(__file__).resolve().parents[1]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def test_report_of_a_small_run_holds_every_number(tmp_path):
    source = write(
        tmp_path / "c.jsonl", ["ΟΔΟΣ [MASK] [SEP] in a text", *some_documents(300)]
    )  # each needs care to be equal
    small = ["--megabytes", "0.4", "--vocab_size", "600", "--repeats", "1", "--workers", "1", "--growth", "3"]
    command = [sys.executable, "-m", "bench.data", str(source), *small, "--out", str(tmp_path / "r.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["same_documents"] and report["encoding_alone"]["documents_that_differ"] == 0
    assert {*report["paths"]} == {"datasets.map", ".json.gz", ".json.gz through datasets", ".jsonl.zst, 1 workers"}
    for path in report["paths"].values():
        assert path["mb_per_cpu_s"] == pytest.approx(report["megabytes"] / path["cpu_s"])
    ours, peer = (report["paths"][name]["cpu_s"] for name in (".jsonl.zst, 1 workers", "datasets.map"))
    assert report["ratio_per_core"] == pytest.approx(peer / ours)
    c4 = report["paths"][".json.gz through datasets"]["mb_per_cpu_s"]
    assert report["c4"]["hours_on_16_cores"] == pytest.approx(800e9 / 1e6 / c4 / 16 / 3600)
    assert report["memory"]["megabytes"][1] == 3 * report["megabytes"] and min(report["memory"]["peak_mb"]) > 20
    assert report["reader_million_tokens_per_s"] > 0
    for line in ("ours / datasets.map per core", "the same", "on 16 cores", "assuming", "peak memory", "reader"):
        assert line in done.stdout


def test_the_comparison_sees_one_wrong_id(tmp_path):
    import datasets

    source = write(tmp_path / "c.jsonl", some_documents(60))
    prepare(Config(str(source), str(tmp_path / "o"), vocab_size=400, workers=1))
    encoded = Tokenizer.load(tmp_path / "o").encode_batch([t.strip() for t in some_documents(60)])

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


def test_peak_memory_is_that_of_the_timed_process(tmp_path, monkeypatch):
    source = write(tmp_path / "c.jsonl", some_documents(60))
    prepare(Config(str(source), str(tmp_path / "o"), vocab_size=400, workers=1))
    ballast = np.ones(400 << 17)  # 400 MB here must not show there
    done = bench_data.measure("ours", source, tmp_path / "o", tmp_path / "again")
    assert ballast.nbytes / 1e6 > done["peak_mb"] > 20 and done["cpu_s"] > 0 and done["wall_s"] > 0


def test_an_unusable_corpus_is_one_line(tmp_path):
    for source, message in (
        (tmp_path / "none.jsonl", "does not exist"),
        (write(tmp_path / "few.jsonl", ["a b"]), "needed"),
    ):
        with pytest.raises(SystemExit, match=rf"^error: bench\.py data: [^\n]*{message}[^\n]*$"):
            bench_data.run(bench_data.Config(source=str(source)))
