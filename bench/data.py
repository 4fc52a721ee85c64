"""Times text -> token shards against `datasets` over `tokenizers`: same documents, same vocabulary.

    python -m bench.data                        # the offline docstrings; a minute on two cores
    python -m bench.data "corpus/*.jsonl.zst"   # any file, folder or "glob*" of prepare_c4.py

Each whole path is a process of its own that goes from zstd-compressed JSON lines to files a trainer
maps. Ours is prepare_c4.py with a given tokenizer; the peer is datasets.load_dataset, then
.map(batched=True) over the tokenizer that export/huggingface.py makes of ours, with only the ids
kept, as uint16. "Per core" is bytes of text over CPU seconds of all threads and processes. Imports
and training the tokenizer are not counted. Numbers are medians of repetitions that take turns.
"""

import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro

import prepare_c4
from corpus import sources
from corpus.shards import Corpus
from corpus.tokenizer import Tokenizer
from machine import read_command_line, report_path, write_report
from records import BadInput

PIECES = 16  # files the sample is cut into, so that several workers have something to do
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@dataclasses.dataclass
class Config:
    source: tyro.conf.Positional[str] = "docstrings"  # or a file, folder or glob
    megabytes: int = 48  # 10^6 bytes of text taken from it, a share of every file
    vocab_size: int = 30_528  # entries of the tokenizer, trained on that text
    repeats: int = 3  # timed runs of everything
    out: str = ""  # where to write; default results/data-<device>.json


# ---------------------------------------------------------------------------------- the two paths
def run_peer(source: str, vocabulary: str, out: str, _workers: int) -> None:
    """load_dataset("json"), then .map(batched) into out/ids.arrow."""
    import datasets
    import tokenizers

    peer = tokenizers.Tokenizer.from_file(vocabulary)

    def encode(batch: dict) -> dict:
        peer.encode_special_tokens = True  # "[MASK]" is ordinary text; pickling forgets it
        encodings = peer.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [e.ids for e in encodings]}

    files = sorted(map(str, Path(source).iterdir()))
    data = datasets.load_dataset("json", data_files=files, split="train", cache_dir=out)
    data.map(encode, batched=True, remove_columns=data.column_names,
             features=datasets.Features({"ids": datasets.List(datasets.Value("uint16"))}),
             cache_file_name=f"{out}/ids.arrow")


def run_ours(source: str, vocabulary: str, out: str, workers: int) -> None:
    sources.ITEM_BYTES = 1  # every file is a work item, for several workers
    prepare_c4.prepare(prepare_c4.Config(source, out, tokenizer=vocabulary, workers=workers))


def child() -> None:
    """One whole path in a process of its own; prints wall and CPU seconds."""
    who, source, vocabulary, out, workers = sys.argv[1:]
    import pyarrow  # noqa: F401, imports are not counted
    import tokenizers  # noqa: F401

    if who == "peer":
        import datasets  # noqa: F401
    started, before = time.perf_counter(), os.times()
    {"ours": run_ours, "peer": run_peer}[who](source, vocabulary, out, int(workers))
    wall, cpu = time.perf_counter() - started, sum(os.times()[:4]) - sum(before[:4])
    print("\nMEASURED", wall, cpu)


def measure(who: str, source: Path, vocabulary: Path, out: Path, workers: int) -> dict:
    """Run one path; -> {"wall_s", "cpu_s"}."""
    command = [sys.executable, "-c", "from bench.data import child; child()", who, str(source),
               str(vocabulary), str(out), str(workers)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1],
                            env=os.environ | ONE_THREAD | {"HF_HUB_OFFLINE": "1"})
    if result.returncode:
        raise BadInput(f"the path {who} failed on {source}: {result.stderr.strip()[-300:]}")
    wall, cpu = map(float, result.stdout.rsplit("MEASURED ", 1)[1].split())
    return {"wall_s": wall, "cpu_s": cpu}


# ------------------------------------------------------------------------------- what is measured
def write_sample(cfg: Config, folder: Path) -> list[str]:
    """Documents of the source, written as folder/*.jsonl.zst."""
    import zstandard

    settings = prepare_c4.Config(cfg.source, tokenizer_bytes=cfg.megabytes * 1_000_000)
    prepare_c4.begin("reading the documents")
    texts = list(prepare_c4.sample(sources.find_items(cfg.source).train, settings))
    if len(texts) < 10 * PIECES:
        raise BadInput(f"{cfg.source} gives {len(texts)} documents, {10 * PIECES} are needed")
    folder.mkdir()
    for i in range(PIECES):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[i::PIECES]]
        (folder / f"{i:02}.jsonl.zst").write_bytes(zstandard.compress("".join(lines).encode(), 3))
    return texts


def same_documents(folder: Path, arrow: Path) -> bool:
    """Whether our shards and the peer's arrow file hold the same documents, in whatever order."""
    import datasets

    digest = lambda ids: hashlib.sha256(np.asarray(ids, np.uint16).tobytes()).digest()
    splits = Corpus(folder), Corpus(folder, "val")
    ours = (corpus[i] for corpus in splits for i in range(len(corpus)))
    theirs = (row["ids"] for row in datasets.Dataset.from_file(str(arrow)).with_format("numpy"))
    return sorted(map(digest, ours)) == sorted(map(digest, theirs))


def bench(cfg: Config, work: Path) -> dict:
    """Everything that is measured, in plain numbers; `work` is an empty folder."""
    from export.huggingface import fast_tokenizer

    texts, load = write_sample(cfg, work / "zst"), os.getloadavg()[0]
    size = sum(len(t.encode()) for t in texts) / 1e6
    os.environ |= ONE_THREAD
    tokenizer = Tokenizer.train(texts, cfg.vocab_size)
    tokenizer.save(work / "ours")
    peer = fast_tokenizer(tokenizer)
    peer.encode_special_tokens = True
    peer.save(str(work / "peer.json"))
    paths = {"datasets.map": ("peer", "peer.json", 1), "ours": ("ours", "ours", 1)}
    if (cores := os.cpu_count() or 1) > 1:
        paths[f"ours, {cores} workers"] = "ours", "ours", cores
    runs: dict[str, list[dict]] = {name: [] for name in paths}
    for repeat in range(cfg.repeats):
        for name, (who, vocabulary, workers) in paths.items():
            out = work / f"{name} {repeat}"
            runs[name].append(measure(who, work / "zst", work / vocabulary, out, workers))
            print(f"{repeat + 1}/{cfg.repeats} {name}: {runs[name][-1]['cpu_s']:.2f} CPU s")
    rows = {name: {key: statistics.median(r[key] for r in rs) for key in rs[0]}
            for name, rs in runs.items()}
    for row in rows.values():
        row |= {"mb_per_cpu_s": size / row["cpu_s"], "mb_per_s": size / row["wall_s"]}
    return {
        "settings": dataclasses.asdict(cfg), "cores": cores, "load_at_start": load,
        "documents": len(texts), "megabytes": size, "paths": rows,
        "ratio_per_core": rows["ours"]["mb_per_cpu_s"] / rows["datasets.map"]["mb_per_cpu_s"],
        "same_documents": same_documents(work / "ours 0", work / "datasets.map 0/ids.arrow")}


def run(cfg: Config) -> None:
    """Measure, print the table, write the JSON."""
    import torch

    report_path("data", torch.device("cpu"), cfg.out)
    with tempfile.TemporaryDirectory() as folder:
        try:
            body = bench(cfg, Path(folder))
        except BadInput as e:
            raise SystemExit(f"error: python -m bench.data: {e}") from None
    print(f"\n{'whole path':24}{'MB/CPU s':>9}{'MB/s':>9}")
    for name, row in body["paths"].items():
        print(f"{name:24}{row['mb_per_cpu_s']:9.1f}{row['mb_per_s']:9.1f}")
    same = "the same" if body["same_documents"] else "NOT the same"
    print(f"ours / datasets.map per core: {body['ratio_per_core']:.1f}; all token ids {same}\n"
          f"wrote {write_report('data', body, torch.device('cpu'), cfg.out)}")


if __name__ == "__main__":
    run(read_command_line(Config, prog="python -m bench.data", about=__doc__))
