"""Times text -> token shards against `datasets` over `tokenizers`: same documents, same vocabulary.

    python -m bench.data                        # the offline docstrings; a minute on two cores
    python -m bench.data "corpus/*.jsonl.zst"   # any file, folder or "glob*" of prepare_c4.py

Either path goes from zstd-compressed JSON lines to files a trainer maps. Ours is prepare_c4.py with
a given tokenizer; the peer is datasets.load_dataset, then .map(batched=True) over the tokenizer
that export/huggingface.py makes of ours, with only the ids kept, as uint16. "Per core" is bytes of
text over CPU seconds of all threads and processes. Imports and training the tokenizer are not
counted. Numbers are medians of repetitions that take turns.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro

import prepare_c4
from corpus.shards import Corpus
from corpus.sources import find_items
from corpus.tokenizer import Tokenizer
from machine import report_path, script, write_report

ONE_CORE = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclasses.dataclass
class Config:
    source: tyro.conf.Positional[str] = "docstrings"  # or a file, folder or glob
    megabytes: int = 48  # 10^6 bytes of text taken from it, a share of every file
    vocab_size: int = 30_528  # entries of the tokenizer, trained on that text
    repeats: int = 3  # timed runs of either path
    out: str = ""  # where to write; default results/data-<device>.json


def ours(text: str, tokenizer: str, out: str) -> None:
    """prepare_c4.py, with a given tokenizer."""
    prepare_c4.prepare(prepare_c4.Config(text, out, tokenizer=tokenizer, workers=1))


def peer(text: str, tokenizer: str, out: str) -> None:
    """load_dataset("json"), then .map(batched) into out/ids.arrow."""
    import datasets
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(tokenizer)

    def encode(batch: dict) -> dict:
        theirs.encode_special_tokens = True  # "[MASK]" is ordinary text; pickling forgets it
        encodings = theirs.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"ids": [e.ids for e in encodings]}

    data = datasets.load_dataset("json", data_files=text, split="train", cache_dir=out)
    data.map(encode, batched=True, remove_columns=data.column_names,
             features=datasets.Features({"ids": datasets.List(datasets.Value("uint16"))}),
             cache_file_name=f"{out}/ids.arrow")


def timed(path, *arguments: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one path; what it prints is left out."""
    started, before = time.perf_counter(), os.times()
    with contextlib.redirect_stdout(io.StringIO()):
        path(*map(str, arguments))
    return time.perf_counter() - started, sum(os.times()[:4]) - sum(before[:4])


def same_documents(folder: Path, arrow: Path) -> bool:
    """Whether our shards and the peer's arrow file hold the same documents, in whatever order."""
    import datasets

    digest = lambda ids: hashlib.sha256(np.asarray(ids, np.uint16).tobytes()).digest()
    splits = Corpus(folder), Corpus(folder, "val")
    mine = (corpus[i] for corpus in splits for i in range(len(corpus)))
    theirs = (row["ids"] for row in datasets.Dataset.from_file(str(arrow)).with_format("numpy"))
    return sorted(map(digest, mine)) == sorted(map(digest, theirs))


def bench(cfg: Config, work: Path) -> dict:
    """Everything that is measured, in plain numbers; `work` is an empty folder."""
    os.environ |= ONE_CORE
    import datasets  # noqa: F401, imports are not counted
    import zstandard

    from export.huggingface import fast_tokenizer

    prepare_c4.begin("reading the documents")
    settings = prepare_c4.Config(cfg.source, tokenizer_bytes=cfg.megabytes * 1_000_000)
    texts = list(prepare_c4.sample(find_items(cfg.source).train, settings))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (work / "text.jsonl.zst").write_bytes(zstandard.compress(lines.encode(), 3))
    size = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = Tokenizer.train(texts, cfg.vocab_size)
    tokenizer.save(work / "ours")
    fast_tokenizer(tokenizer).save(str(work / "datasets.map"))
    paths = {"datasets.map": peer, "ours": ours}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for repeat in range(cfg.repeats):
        for name, path in paths.items():
            places = work / "text.jsonl.zst", work / name, work / f"{name} {repeat}"
            runs[name].append(timed(path, *places))
            print(f"{repeat + 1}/{cfg.repeats} {name}: {runs[name][-1][1]:.2f} CPU s")
    rows = {}
    for name, own in runs.items():
        wall, cpu = map(statistics.median, zip(*own))
        rows[name] = {"cpu_s": cpu, "mb_per_cpu_s": size / cpu, "mb_per_s": size / wall}
    return {
        "settings": dataclasses.asdict(cfg), "documents": len(texts), "megabytes": size,
        "paths": rows, "ratio_per_core": rows["datasets.map"]["cpu_s"] / rows["ours"]["cpu_s"],
        "same_documents": same_documents(work / "ours 0", work / "datasets.map 0/ids.arrow")}


def run(cfg: Config) -> None:
    """Measure, print the table, write the JSON."""
    import torch

    report_path("data", cpu := torch.device("cpu"), cfg.out)
    with tempfile.TemporaryDirectory() as folder:
        body = bench(cfg, Path(folder))
    print(f"\n{'whole path':16}{'MB/CPU s':>9}{'MB/s':>9}")
    for name, row in body["paths"].items():
        print(f"{name:16}{row['mb_per_cpu_s']:9.1f}{row['mb_per_s']:9.1f}")
    same = "the same" if body["same_documents"] else "NOT the same"
    print(f"ours / datasets.map per core: {body['ratio_per_core']:.1f}; all token ids {same}\n"
          f"wrote {write_report('data', body, cpu, cfg.out)}")


if __name__ == "__main__":
    script(run, Config)()
