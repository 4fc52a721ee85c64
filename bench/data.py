"""Times text -> token shards against `datasets` over `tokenizers`, on the same documents and the same vocabulary.

    python -m bench.data                          # the offline docstrings; about a minute on two cores
    python -m bench.data "corpus/*.jsonl.zst"     # a file, folder or "glob*" of .jsonl(.gz|.zst), .parquet, .txt

Each whole path is a process of its own that goes from compressed JSON lines to files a trainer maps. Ours is
prepare_c4.py with a given tokenizer. The peer is datasets.load_dataset, then .map(batched=True) over the tokenizer that
export_hf.py makes of ours, called in `tokenizers` itself (no masks, no special tokens), with only the ids kept, as
uint16. "Per core" is bytes of text over CPU seconds of all threads and processes, which other work on the machine
disturbs less than the wall time. Imports and training the tokenizer are not counted. Numbers are medians of repetitions
that take turns; MB are 10^6 bytes of UTF-8 text.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import re
import resource
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
from machine import read_command_line, write_report
from records import BadInput

C4_DOCUMENTS, C4_BYTES = 365e6, 800e9  # the train split of C4 "en": documents, bytes of text
HERE = Path(__file__).parents[1]
PIECES = 16  # files the sample is cut into, so that several workers have something to do
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@dataclasses.dataclass
class Config:
    source: tyro.conf.Positional[str] = (
        "docstrings"  # docstrings | file, folder or glob of .jsonl(.gz|.zst) .parquet .txt
    )
    megabytes: float = 48  # text taken from it, a share of every file
    vocab_size: int = 30_528  # entries of the tokenizer, trained on that text
    repeats: int = 3  # timed runs of everything
    workers: tuple[int, ...] = ()  # numbers of processes to compare with 1; default 2, 4, ... up to the cores there are
    growth: int = 10  # peak memory is compared between the sample and this many copies of it
    out: str = ""  # where to write; default results/data-<device>.json


# ----------------------------------------------------------------------------- the two paths


def run_peer(source: str, vocabulary: str, out: str, _workers: int) -> None:
    """load_dataset("json"), then .map(batched) into out/ids.arrow."""
    import datasets
    import tokenizers

    peer = tokenizers.Tokenizer.from_file(vocabulary)

    def encode(batch: dict) -> dict:
        peer.encode_special_tokens = True  # "[MASK]" in a text is ordinary text; pickling forgets it
        return {"ids": [e.ids for e in peer.encode_batch_fast(batch["text"], add_special_tokens=False)]}

    files = sorted(map(str, Path(source).iterdir()))
    data = datasets.load_dataset("json", data_files=files, split="train", cache_dir=out)
    features = datasets.Features({"ids": datasets.List(datasets.Value("uint16"))})
    options = {"batched": True, "remove_columns": data.column_names, "features": features}
    data.map(encode, **options, cache_file_name=f"{out}/ids.arrow")


def run_ours(source: str, vocabulary: str, out: str, workers: int) -> None:
    sources.ITEM_BYTES = 1  # every file is a work item, for several workers
    prepare_c4.prepare(prepare_c4.Config(source, out, tokenizer=vocabulary, workers=workers))


def child() -> None:
    """One whole path in a process of its own; prints wall seconds, CPU seconds and the peak MB of a process."""
    who, source, vocabulary, out, workers = sys.argv[1:]
    import huggingface_hub  # noqa: F401, imports are not counted, neither ours
    import tokenizers  # noqa: F401

    if who == "peer" or source.startswith("hub:"):
        import datasets  # noqa: F401
    started, before = time.perf_counter(), os.times()
    {"ours": run_ours, "peer": run_peer}[who](source, vocabulary, out, int(workers))
    wall, cpu = time.perf_counter() - started, sum(os.times()[:4]) - sum(before[:4])  # of finished child processes too
    own, children = (resource.getrusage(x).ru_maxrss for x in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    if sys.platform == "linux":  # where ru_maxrss remembers the process this one was started from
        own = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    print("\nMEASURED", wall, cpu, max(own, children) / (1e6 if sys.platform == "darwin" else 1e3))


def measure(who: str, source: Path | str, vocabulary: Path, out: Path, workers: int = 1) -> dict:
    """Run one path; -> {"wall_s", "cpu_s", "peak_mb"}, the peak being that of its largest process."""
    command = [sys.executable, "-c", "import bench_data; bench_data.child()"]
    command += [who, str(source), str(vocabulary), str(out), str(workers)]
    env = os.environ | ONE_THREAD | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE)
    if done.returncode:
        raise BadInput(f"the path {who} failed on {source}: {(done.stderr.strip().splitlines() or ['?'])[-1][:300]}")
    numbers = map(float, done.stdout.rsplit("MEASURED ", 1)[1].split())
    return dict(zip(("wall_s", "cpu_s", "peak_mb"), numbers))


# ----------------------------------------------------------------------------- what is measured


def write_sample(cfg: Config, work: Path) -> list[str]:
    """Documents of the source, written as zst/*.jsonl.zst, `growth` times in big/ and, as C4 is on the hub, in gz/."""
    import zstandard

    items = sources.find_items(cfg.source)[0]
    texts = list(prepare_c4.sample(items, prepare_c4.Config(cfg.source), cfg.megabytes * 1e6))
    if len(texts) < 10 * PIECES:
        raise BadInput(f"{cfg.source} gives {len(texts)} documents, {10 * PIECES} are needed; choose a larger corpus")
    for folder in ("zst", "big", "gz/en"):
        (work / folder).mkdir(parents=True)
    layout = "configs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/*.json.gz\n"
    (work / "gz/README.md").write_text(f"---\n{layout}---\n")
    for i in range(PIECES):
        piece = texts[i * len(texts) // PIECES : (i + 1) * len(texts) // PIECES]
        rows = [{"text": t, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.com/page"} for t in piece]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (work / f"zst/{i:02}.jsonl.zst").write_bytes(zstandard.compress(lines, 3))
        (work / f"gz/en/c4-train.{i:05}.json.gz").write_bytes(gzip.compress(lines, 6))
        for copy in range(cfg.growth):
            os.link(work / f"zst/{i:02}.jsonl.zst", work / f"big/{copy:02}-{i:02}.jsonl.zst")
    return texts


def encoding_alone(texts: list[str], tokenizer: Tokenizer, peer, repeats: int) -> dict:
    """Lowercasing and encoding on one thread, MB per CPU second, and in how many documents any id differs."""
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(repeats):
        started = time.process_time()
        ours = tokenizer.encode_arrays(texts, 1)
        seconds["ours"].append(time.process_time() - started)
        started = time.process_time()
        theirs = peer.encode_batch_fast(texts, add_special_tokens=False)
        seconds["peer"].append(time.process_time() - started)
    size = sum(len(t.encode()) for t in texts) / 1e6
    rates = {who: size / statistics.median(s) for who, s in seconds.items()}
    differ = sum(a.tolist() != b.ids for a, b in zip(ours, theirs))
    return rates | {"ratio": rates["ours"] / rates["peer"], "documents": len(texts), "documents_that_differ": differ}


def same_documents(folder: Path, arrow: Path) -> bool:
    """Whether our shards and the peer's arrow file hold the same documents, id by id, in whatever order."""
    import datasets

    digest = lambda ids: hashlib.blake2b(np.asarray(ids, np.uint16).tobytes(), digest_size=16).digest()
    ours = (corpus[i] for corpus in (Corpus(folder), Corpus(folder, "val")) for i in range(len(corpus)))
    theirs = (row["ids"] for row in datasets.Dataset.from_file(str(arrow)).with_format("numpy"))
    return sorted(map(digest, ours)) == sorted(map(digest, theirs))


def reader_rate(folder: Path, seconds: float = 2.0) -> float:
    """Million tokens per CPU second of one process that assembles batches of 8,192 tokens, documents cut at 128."""
    from batches import Batches  # here, so that the timed processes do not hold torch

    batches = Batches([Corpus(folder)], Tokenizer.load(folder), 128, 8192, "first", seed=0)
    batches(0)
    started, m = time.process_time(), 0
    while (used := time.process_time() - started) < seconds:
        m += 1
        batches(m)
    return m * batches.micro_tokens / used / 1e6


def bench(cfg: Config, work: Path) -> dict:
    """Everything that is measured, in plain numbers; `work` is an empty folder for temporary files."""
    from export.huggingface import fast_tokenizer

    cores = os.cpu_count() or 1
    counts = sorted({1, *(cfg.workers or [*(2**k for k in range(10) if 2**k < cores), cores])})
    texts = write_sample(cfg, work)
    size = sum(len(t.encode()) for t in texts) / 1e6
    load = os.getloadavg()[0]
    print(f"{len(texts):,} documents, {size:.1f} MB; load {load:.1f} on {cores} cores", flush=True)
    os.environ |= ONE_THREAD
    tokenizer = Tokenizer.train(texts, cfg.vocab_size)
    tokenizer.save(work / "ours")
    peer = fast_tokenizer(tokenizer)
    peer.encode_special_tokens = True
    peer.save(str(work / "peer.json"))
    alone = encoding_alone(texts[:: max(1, int(size / 10))], tokenizer, peer, cfg.repeats)  # about 10 MB

    paths = {  # name: what runs, its source, its vocabulary, processes
        "datasets.map": ("peer", work / "zst", work / "peer.json", 1),
        ".json.gz": ("ours", work / "gz/en", work / "ours", 1),
        ".json.gz through datasets": ("ours", f"hub:{work}/gz:en", work / "ours", 1),
    } | {f".jsonl.zst, {n} workers": ("ours", work / "zst", work / "ours", n) for n in counts}
    runs: dict[str, list[dict]] = {name: [] for name in paths}
    for repeat in range(cfg.repeats):
        for name, path in paths.items():
            out = work / f"out {name} {repeat}"
            runs[name].append(done := measure(*path[:3], out, path[3]))
            seconds = f"{done['cpu_s']:7.2f} CPU s {done['wall_s']:7.2f} s"
            print(f"{repeat + 1}/{cfg.repeats} {name:26}{seconds}", flush=True)
    first = work / "out .jsonl.zst, 1 workers 0"
    big = measure("ours", work / "big", work / "ours", work / "out big", counts[-1])

    middle = {name: {key: statistics.median(r[key] for r in rs) for key in rs[0]} for name, rs in runs.items()}
    rates = {
        name: {"mb_per_cpu_s": size / m["cpu_s"], "mb_per_s": size / m["wall_s"]} | m for name, m in middle.items()
    }
    ours, c4 = rates[".jsonl.zst, 1 workers"], rates[".json.gz through datasets"]
    widest = rates[f".jsonl.zst, {counts[-1]} workers"]
    return {
        "settings": dataclasses.asdict(cfg),
        "cores": cores,
        "load_at_start": load,
        "documents": len(texts),
        "megabytes": size,
        "paths": rates,
        "ratio_per_core": ours["mb_per_cpu_s"] / rates["datasets.map"]["mb_per_cpu_s"],
        "same_documents": same_documents(first, work / "out datasets.map 0/ids.arrow"),
        "encoding_alone": alone,
        "scaling": {n: ours["wall_s"] / rates[f".jsonl.zst, {n} workers"]["wall_s"] for n in counts},
        "memory": {"megabytes": [size, cfg.growth * size], "peak_mb": [widest["peak_mb"], big["peak_mb"]]},
        "reader_million_tokens_per_s": reader_rate(first),
        "c4": {
            "hours_on_16_cores": C4_BYTES / 1e6 / c4["mb_per_cpu_s"] / 16 / 3600,
            "documents": C4_DOCUMENTS,
            "bytes": C4_BYTES,
            "assumptions": "16 cores like this machine's, each as fast as one alone; .json.gz through datasets from a "
            "local disk, so the network keeps up; documents like these; the tokenizer is trained already",
        },
    }


def run(cfg: Config) -> None:
    """Measure, print the table, write the JSON. SystemExit, one line, for a corpus that cannot be measured on."""
    if cfg.repeats < 1:
        raise SystemExit(f"error: --repeats {cfg.repeats}: give at least 1")
    import torch

    with tempfile.TemporaryDirectory() as folder:
        try:
            body = bench(cfg, Path(folder))
        except BadInput as e:
            raise SystemExit(f"error: python -m bench.data: {e}") from None
    print(f"\n{'whole path, per core':34}{'MB/CPU s':>9}{'MB/s':>9}{'peak MB':>9}")
    for name, row in body["paths"].items():
        print(f"{name:34}{row['mb_per_cpu_s']:9.1f}{row['mb_per_s']:9.1f}{row['peak_mb']:9.0f}")
    alone, memory, c4 = body["encoding_alone"], body["memory"], body["c4"]
    scaling = ", ".join(f"{n}: {x:.2f}" for n, x in body["scaling"].items())
    same = "the same" if body["same_documents"] else "NOT the same"
    (small, large), (least, most) = memory["megabytes"], memory["peak_mb"]
    print(
        f"ours / datasets.map per core: {body['ratio_per_core']:.1f}; token ids of all documents: {same}\n"
        f"encoding alone: {alone['ours']:.1f} and {alone['peer']:.1f} MB/s per core, ratio {alone['ratio']:.1f}; "
        f"{alone['documents_that_differ']} of {alone['documents']:,} documents differ\n"
        f"speed-up of wall time by workers: {scaling} (load at the start {body['load_at_start']:.1f})\n"
        f"peak memory of the largest process: {least:.0f} MB for {small:.0f} MB of text, {most:.0f} for {large:.0f}\n"
        f"reader: {body['reader_million_tokens_per_s']:.1f} million tokens/s of batches in one process\n"
        f"all of C4 ({C4_DOCUMENTS / 1e6:.0f} M documents, {C4_BYTES / 1e9:.0f} GB) on 16 cores: "
        f"{c4['hours_on_16_cores']:.1f} hours, assuming {c4['assumptions']}"
    )
    print(f"wrote {write_report('data', body, torch.device('cpu'), cfg.out)}")


if __name__ == "__main__":
    run(read_command_line(Config, prog="python -m bench.data", about=__doc__))
