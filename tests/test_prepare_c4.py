"""Claims about prepare_c4.py and corpus/: tokenizer, data folder, sources, restart, bad input."""

import bz2
import dataclasses
import gzip
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import DEFAULT, Mock, patch

import conftest
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
import zstandard
from conftest import ODD, ROOT, python, refused, some_documents, write_jsonl
from transformers import BertTokenizer, PreTrainedTokenizerFast

import prepare_c4
from batches import Batches
from corpus import docstrings as offline
from corpus import inspect, sources
from corpus.docstrings import SWAPS, write_word_order_task
from corpus.shards import Corpus
from corpus.tokenizer import Tokenizer
from prepare_c4 import Config, prepare


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return some_documents(600)


@pytest.fixture(scope="session")
def tokenizer(texts) -> Tokenizer:
    return Tokenizer.train(texts, 2048)


@pytest.fixture(scope="session")
def jsonl(texts, tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "docs.jsonl", texts)


def settings(source: Path | str, out: Path, **changes) -> Config:
    small = {"vocab_size": 512, "tokenizer_bytes": 300_000, "workers": 1}
    return Config(str(source), str(out), **(small | changes))


def content(folder: Path) -> dict[str, bytes]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def shards(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if name != "meta.json"}


def decoded(folder: Path, *splits: str) -> list[str]:
    """The documents of a prepared folder as its tokenizer writes them."""
    tokenizer = Tokenizer.load(folder)
    corpora = [Corpus(folder, split) for split in splits or ("train", "val")]
    return [tokenizer.decode(c[i]) for c in corpora for i in range(len(c))]


@pytest.fixture
def refusal(monkeypatch):
    """The command line says this of these arguments, in one line."""

    def refuse(message: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["prepare_c4.py", *map(str, arguments)])
        with refused(message):
            prepare_c4.main()

    return refuse


# ---------------------------------------------------------------------------------------- tokenizer
def test_round_trip_is_exact_for_any_unicode(tokenizer, texts):
    rng, odd = random.Random(0), [*ODD, "[MASK] [CLS] <|endoftext|> [PAD]"]
    odd += [" " * 1_000_000 + "a" + "\n " * 100_000 + "z" * 100_000 + "!" * 100_000]
    ranges = (0, 0xD800), (0xE000, 0x110000), (0, 128)
    wild = ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(300))
            for _ in range(200)]
    for text in odd + wild + texts[:200]:
        assert tokenizer.decode(tokenizer.encode(text)) == text.lower()
    cased = Tokenizer.train(texts[:100], 400, lowercase=False)
    for text in odd + wild:
        assert cased.decode(cased.encode(text)) == text
    # half of an emoji, which UTF-8 cannot hold
    assert tokenizer.decode(tokenizer.encode("a \ud800 b")) == "a \ufffd b"
    assert tokenizer.encode_batch(["\udfff"] * 20)[0] == tokenizer.encode("\udfff")


def test_training_is_deterministic_and_saving_keeps_every_id(tokenizer, texts, tmp_path):
    assert Tokenizer.train(iter(texts), 2048).vocabulary == tokenizer.vocabulary
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode_batch(texts) == [tokenizer.encode(t) for t in texts]
    assert (again.vocab_size, again.lowercase) == (2048, True)
    again.save(tmp_path / "b")
    assert content(tmp_path / "b") == {k: v for k, v in content(tmp_path).items() if "/" not in k}


def test_ids_are_specials_then_bytes_then_merges(tokenizer):
    names = ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id")
    assert [getattr(tokenizer, name) for name in names] == [*range(5)]
    assert tokenizer.encode("\x00") == [5]
    assert tokenizer.decode(range(2048))  # every id decodes
    assert max(max(tokenizer.encode(t), default=0) for t in ODD) < 2048
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([2048])
    with pytest.raises(ValueError, match="65536"):
        Tokenizer.train(["x"], 65537)


def test_only_encode_with_masks_takes_special_names_for_more_than_text(tokenizer):
    assert min(tokenizer.encode("[MASK] [CLS][PAD]")) >= 5
    ids = tokenizer.encode_with_masks("The capital  [mask] of [MASK].")
    assert ids.count(tokenizer.mask_id) == 2
    assert [tokenizer.token_text(i) for i in ids].count("[MASK]") == 2
    assert tokenizer.decode(ids) == "the capital of.", "white space before a mask belongs to it"


@pytest.fixture(scope="session")
def wordpiece(texts, tmp_path_factory) -> Path:
    return conftest.wordpiece(tmp_path_factory.mktemp("hf") / "tokenizer.json", texts[:200], 1500)


def test_hugging_face_tokenizer_is_used_as_it_is(wordpiece, texts, tmp_path):
    ours, theirs = Tokenizer.load(wordpiece), PreTrainedTokenizerFast(tokenizer_file=str(wordpiece))
    for text in texts[:50]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.lowercase and ours.names[ours.mask_id] == "[MASK]"
    assert ours.mask_id not in ours.encode("the [MASK] is")
    assert ours.encode_with_masks("the [MASK] is").count(ours.mask_id) == 1
    source = write_jsonl(tmp_path / "c.jsonl", texts)
    meta = prepare(settings(source, tmp_path / "o", tokenizer=str(wordpiece)))
    assert meta["vocab_size"] == Tokenizer.load(tmp_path / "o").vocab_size == ours.vocab_size
    assert decoded(tmp_path / "o")[0] in [ours.decode(ours.encode(t)) for t in texts]


def test_special_tokens_that_a_tokenizer_json_brings_are_themselves(wordpiece, texts, tmp_path):
    entities = tokenizers.Tokenizer.from_file(str(wordpiece))
    entities.add_special_tokens(["[E1]", "[/E1]"])
    entities.add_tokens(["<number>"])  # no special one: a word that may be masked
    entities.save(str(tmp_path / "tokenizer.json"))
    marked = [f"[E1] {text} [/E1] [MASK] [SEP]" for text in texts[:150]]
    source = write_jsonl(tmp_path / "c.jsonl", marked)
    prepare(settings(source, tmp_path / "o", tokenizer=str(tmp_path / "tokenizer.json")))
    ours, corpus = Tokenizer.load(tmp_path / "o"), Corpus(tmp_path / "o")
    markers = [entities.token_to_id(name) for name in ("[E1]", "[/E1]")]
    number = entities.token_to_id("<number>")
    assert ours.markers == markers and ours.encode("a <number>")[-1] == number
    for i in range(len(corpus)):
        assert [int((corpus[i] == marker).sum()) for marker in markers] == [1, 1]
        assert not np.isin(corpus[i], [ours.mask_id, ours.sep_id, ours.cls_id]).any()
    assert decoded(tmp_path / "o")[0].startswith("[E1] ")
    batch = Batches([corpus], ours, 64, 2048, "first", seed=0)(0)
    is_marker = np.isin(batch.input_ids, markers)
    assert is_marker.sum() > 20 and batch.special[is_marker].all(), "never masked"


def test_a_folder_with_only_a_vocab_txt_is_read(wordpiece, texts, tmp_path):
    vocab = json.loads(wordpiece.read_text())["model"]["vocab"]
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.get)) + "\n")
    for lowercase in (True, False):
        config = {"do_lower_case": lowercase, "tokenizer_class": "BertTokenizer"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        theirs = BertTokenizer.from_pretrained(tmp_path)
        for ours in (Tokenizer.load(tmp_path), Tokenizer.load(tmp_path / "vocab.txt")):
            assert (ours.lowercase, ours.vocab_size) == (lowercase, 1500)
            for text in [*texts[:30], "Élan 北京 x"]:
                assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    (tmp_path / "added_tokens.json").write_text('{"[/E1]": 1501, "[E1]": 1500}')  # a user's markers
    marked = Tokenizer.load(tmp_path)
    assert marked.vocab_size == 1502 and marked.encode("[E1] x [/E1]")[::2] == [1500, 1501]
    (tmp_path / "vocab.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"vocab\.txt is no tokenizer\.json or vocab\.txt"):
        Tokenizer.load(tmp_path)


def test_damaged_tokenizer_is_named(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.tiktoken").write_bytes(tokenizer.vocabulary[:-20])
    with pytest.raises(ValueError, match=r"tokenizer\.tiktoken cannot be used"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "x.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"x\.json is no tokenizer\.json"):
        Tokenizer.load(tmp_path / "x.json")


# ------------------------------------------------------------------------------------- data folders
def test_every_document_is_there_once_and_reads_back(texts, jsonl, tmp_path):
    prepare(settings(jsonl, tmp_path / "o", shard_tokens=30_000, task_examples=20))
    train = Corpus(tmp_path / "o", "train", verify=True)
    assert len(train.bins) > 3  # several shards, or the global index is not tested
    kept, written = decoded(tmp_path / "o"), [t.strip().lower() for t in texts]
    assert set(kept) < set(written), "the rest is held out for the task"
    assert sorted(kept) == sorted(t for t in written if t in set(kept))
    lengths = [len(train[i]) for i in range(len(train))]
    assert train.lengths.dtype == np.int32 and train.lengths.tolist() == lengths
    assert train.n_tokens == sum(lengths) and train[0].dtype == np.uint16
    assert not train[0].flags.writeable
    with pytest.raises(IndexError):
        train[len(train)]


def test_splits_never_overlap_and_the_tokenizer_sees_train_only(texts, tmp_path, monkeypatch):
    seen_by_tokenizer, train = [], Tokenizer.train
    spy = lambda documents, *a: train(seen_by_tokenizer.extend(documents) or seen_by_tokenizer, *a)
    monkeypatch.setattr(Tokenizer, "train", spy)
    copies = texts + texts[:200] + [t.upper() for t in texts[200:300]]
    source = write_jsonl(tmp_path / "c.jsonl", copies)
    prepare(settings(source, tmp_path / "o", val_fraction=0.3, task_examples=50))
    seen, held_out = ({*decoded(tmp_path / "o", split)} for split in ("train", "val"))
    assert len(held_out) > 0.2 * len(seen) and not seen & held_out
    assert len(seen_by_tokenizer) > 20 and {text.lower() for text in seen_by_tokenizer} <= seen
    rest = [" ".join(t.lower().split()) for t in texts if t.strip().lower() not in seen | held_out]
    files = [(tmp_path / f"o/task/{name}.tsv").read_text() for name in ("train", "dev")]
    kept = [line.removesuffix("\t1").lower() for file in files for line in file.splitlines()
            if line.endswith("\t1")]
    assert len(kept) > 25 and all(any(passage in text for text in rest) for passage in kept)


def test_a_small_corpus_gets_some_validation_documents(texts, tmp_path):
    prepare(settings(write_jsonl(tmp_path / "c.jsonl", texts[:40]), tmp_path / "o"))
    assert 1 <= len(Corpus(tmp_path / "o", "val")) <= 10
    source = write_jsonl(tmp_path / "c.jsonl", ["a very long text " * 100_000, *texts[:60]])
    prepare(settings(source, tmp_path / "p", tokenizer_bytes=3_000_000))  # behind a huge first one
    assert len(Corpus(tmp_path / "p", "val")) >= 1


def test_same_corpus_gives_the_same_bytes_whatever_the_workers(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ITEM_BYTES", 100_000)  # several work items out of small files
    for i in range(6):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", texts[i * 100 : (i + 1) * 100])
    options = {"shard_tokens": 20_000, "val_fraction": 0.1, "task_examples": 30}
    prepare(settings(tmp_path / "in", tmp_path / "a", **options))
    prepare(settings(tmp_path / "in", tmp_path / "b", **options, workers=2))
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "a").iterdir() if "0" not in p.name) == [
        "meta.json", "task", "tokenizer.meta.json", "tokenizer.tiktoken"]  # fmt: skip


def test_max_docs_stops_between_and_within_items(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ITEM_BYTES", 1)
    for i in range(20):
        write_jsonl(tmp_path / "in" / f"{i:02}.jsonl", texts[i * 10 : (i + 1) * 10])
    monkeypatch.setattr(sources, "open_file", opened := Mock(wraps=sources.open_file))
    prepare(settings(tmp_path / "in", tmp_path / "o", max_docs=25))
    assert len({*map(str, opened.call_args_list)}) == 3  # the other files are not even opened
    assert {*decoded(tmp_path / "o")} == {t.strip().lower() for t in texts[:25]}


def test_the_same_text_in_every_format_gives_the_same_shards(texts, tmp_path):
    plain = [t.replace("\n", " ").strip() for t in texts[:150]]
    source = write_jsonl(tmp_path / "c.jsonl", plain)
    data = source.read_bytes()
    files = {
        "c.jsonl.gz": gzip.compress(data[:5000]) + gzip.compress(data[5000:]),
        "c.jsonl.zst": zstandard.compress(data[:7000]) + zstandard.compress(data[7000:]),
        "c.ndjson.bz2": bz2.compress(data), "C.JSONL.XZ": lzma.compress(data),
        "c.json": json.dumps([{"text": text} for text in plain], indent=1).encode(),
        "c.txt": ("\n\n".join(plain) + "\n").encode()}
    for name, packed in files.items():
        (tmp_path / name).write_bytes(packed)
    table = pa.table({"text": plain, "url": plain})
    pa.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=40)
    (tmp_path / "spark.parquet").mkdir()  # a folder, as Spark writes it; its column holds bytes
    rows = [text.encode() for text in plain]
    for i, part in enumerate((rows[:70], rows[70:])):
        table = pa.table({"text": part})
        pa.parquet.write_table(table, tmp_path / f"spark.parquet/part-{i}.parquet")
    (tmp_path / "spark.parquet" / "_SUCCESS").touch()
    globs = "spark.parquet/part-?.parquet", "spar*.parquet"
    for name in ("c.jsonl", *files, "c.parquet", *globs):
        meta = prepare(settings(tmp_path / name, tmp_path / "out" / name))
        assert shards(tmp_path / "out" / name) == shards(tmp_path / "out" / "c.jsonl"), name
    assert meta["skipped"] == {"files of other kinds: _SUCCESS": 1}


def test_marks_and_line_ends_of_windows_and_very_long_lines_change_nothing(texts, tmp_path):
    plain = [" ".join(t.split()) for t in texts[:150]] + ["a long line " * 100_000, "two\nlines"]
    source = write_jsonl(tmp_path / "c.jsonl", plain)
    prepare(settings(source, tmp_path / "jsonl"))
    blocks = "\n\n".join(plain).encode()
    for name, data in (("bom.jsonl", source.read_bytes()), ("bom.txt", blocks)):
        half = data.index(b"\n\n" if name == "bom.txt" else b"\n", len(data) // 2) + 1
        data = data[:half] + b"\xef\xbb\xbf" + data[half:]  # two files that were joined
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
        prepare(settings(tmp_path / name, tmp_path / "o" / name))
        assert shards(tmp_path / "o" / name) == shards(tmp_path / "jsonl"), name


def test_every_file_counts_once_and_what_is_left_out_is_named(texts, tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", texts[:100])
    prepare(settings(tmp_path / "in", tmp_path / "o"))
    for name in ("b.jsonl", "c.jsonl.gz", "d.jsonl.zst", "e.txt", "f.doc", ".hidden.doc"):
        (tmp_path / "in" / name).touch()
    for link, target in (("in/self", "."), ("in/b", "../in"), ("in/z.jsonl", "a.jsonl"),
                         ("in/gone.jsonl", "nowhere"), ("link", "in")):
        (tmp_path / link).symlink_to(target)
    for i, source in enumerate(("link", "in/**/*")):
        meta = prepare(settings(tmp_path / source, tmp_path / str(i)))
        assert shards(tmp_path / str(i)) == shards(tmp_path / "o"), source
        assert meta["skipped"] == {"files of other kinds: f.doc, gone.jsonl": 2}


def test_text_unit_says_what_a_document_of_a_txt_is(tmp_path, capsys):
    lines = [f"this is text number {i} of the file" for i in range(80)]
    source = tmp_path / "c.txt"
    source.write_text("\n".join(lines[:60]) + "\n\n" + "\n".join(lines[60:]) + "\n")
    for unit, documents in (("line", lines), ("paragraph", ["\n".join(lines[:60]),
                                                            "\n".join(lines[60:])])):
        prepare(settings(source, tmp_path / unit, vocab_size=280, text_unit=unit))
        assert sorted(decoded(tmp_path / unit)) == sorted(documents)
        hint = "one document is 75% of the corpus; each paragraph of a .txt was taken as one"
        assert (hint in capsys.readouterr().out) == (unit == "paragraph")
    with pytest.raises(ValueError, match=r"1 different documents.*needs --text_unit line"):
        prepare(settings(source, tmp_path / "file", text_unit="file"))


def test_odd_lines_of_json_are_read_or_counted(tmp_path):
    """NUL, CR, lone surrogates, joined emoji, one character, NaN, lists, white space, no newline at
    the end."""
    odd = ['"\\u0000 nul"', '"\\r cr"', '"\\ud800 half"', '"👩\u200d🔬 joined"', '"x"', "NaN",
           '["list"]', '""', '" \\n\\t "', '"\\u2028"']
    lines = [f'{{"text": {text}}}' for text in odd] + GOOD
    (tmp_path / "odd.jsonl").write_text("\n".join(lines), encoding="utf-8")
    meta = prepare(settings(tmp_path / "odd.jsonl", tmp_path / "o", vocab_size=300, skip_bad=True))
    assert sum(s["documents"] for s in meta["shards"]) == 5 + len(GOOD)
    assert meta["skipped"] == {"bad": 2, "empty": 3}


def test_text_without_spaces_trains_in_seconds_and_is_encoded_as_before(texts, tmp_path):
    rng = random.Random(0)
    sequences = ["".join(rng.choices("acgt", k=400_000)) for _ in range(6)]
    started = time.process_time()
    dna = Tokenizer.train(sequences, 512)
    ids = dna.encode(sequences[0])
    assert time.process_time() - started < 30, "the square of a word's length is minutes"
    assert dna.decode(ids) == sequences[0] and len(ids) < 130_000
    cut = [sequences[0][i : i + 256] for i in range(0, 400_000, 256)]
    assert len(ids) < sum(map(len, dna.encode_batch(cut))), "only training cuts long words"
    assert max(map(len, re.findall(r"\w+", " ".join(texts)))) < 256, "no word of English is cut"


# ------------------------------------------------------------------------------------------ restart
def test_killed_at_random_moments_ends_with_the_same_bytes(texts, tmp_path):
    source = write_jsonl(tmp_path / "c.jsonl", texts)
    options = ["--vocab_size", 600, "--shard_tokens", 15_000, "--task_examples", 40]
    options += ["--val_fraction", 0.1]
    started = time.time()
    python("prepare_c4.py", source, "--out", tmp_path / "whole", *options)
    seconds = time.time() - started  # many times more on a busy machine
    rng, kills = random.Random(1), 0
    for attempt in range(40):  # later attempts get longer, so that it ends some time
        timeout = seconds * (rng.uniform(0.1, 0.8) + 0.05 * attempt)
        try:
            python("prepare_c4.py", source, "--out", tmp_path / "cut", *options, timeout=timeout)
            break
        except subprocess.TimeoutExpired:
            kills += 1
    assert kills >= 1 and content(tmp_path / "cut") == content(tmp_path / "whole")


def test_killed_at_every_kind_of_step_ends_with_the_same_bytes(texts, tmp_path):
    """It dies at its n-th rename, for n over the whole run; no reader accepts what it leaves."""
    source = write_jsonl(tmp_path / "c.jsonl", texts[:300])
    config = settings(source, tmp_path / "whole", shard_tokens=15_000, task_examples=20,
                      val_fraction=0.1)
    Killed = type("Killed", (BaseException,), {})
    with patch("os.replace", wraps=os.replace) as renames:
        prepare(config)
    for step in range(0, renames.call_count, 4):
        out = tmp_path / f"cut{step}"
        effects = [*[DEFAULT] * step, Killed]
        with patch("os.replace", wraps=os.replace, side_effect=effects), pytest.raises(Killed):
            prepare(dataclasses.replace(config, out=str(out)))
        with pytest.raises(ValueError, match=r"meta\.json"):
            Corpus(out)
        prepare(dataclasses.replace(config, out=str(out)))
        assert content(out) == content(tmp_path / "whole"), step


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")
def test_workers_die_with_a_killed_parent_and_the_rest_is_done_later(texts, hub_folder, tmp_path):
    for i in range(2, 8):
        rows = "".join(json.dumps({"text": f"{text} {i}"}) + "\n" for text in texts * 4)
        path = hub_folder / "en" / f"c4-train.0000{i}-of-00008.json.gz"
        path.write_bytes(gzip.compress(rows.encode()))
    flags = "--vocab_size 600 --shard_tokens 100000 --tokenizer_bytes 1000000 --workers 2"
    command = "prepare_c4.py", f"hub:{hub_folder}:en", *flags.split(), "--out"
    python(*command, tmp_path / "whole")
    n_shards, kills = len([*(tmp_path / "whole").glob("train_*.bin")]), 0
    while kills < 20:
        killed = [sys.executable, *map(str, command), str(tmp_path / "cut")]
        process = subprocess.Popen(killed, cwd=ROOT)
        n_parts = lambda: len([*(tmp_path / "cut").glob(".parts/t*.json")])
        wanted = n_parts() + n_shards // 4
        while process.poll() is None and n_parts() < wanted:
            time.sleep(0.05)
        if process.poll() is not None:
            break
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        deadline = time.time() + 10
        while any(Path(f"/proc/{w}").exists() for w in workers) and time.time() < deadline:
            time.sleep(0.1)
        assert len(workers) >= 2 and not any(Path(f"/proc/{w}").exists() for w in workers)
    assert process.returncode == 0 and kills >= 2
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_complete_folder_stays_and_other_settings_are_refused(jsonl, wordpiece, tmp_path, capsys):
    config = settings(jsonl, tmp_path / "o", tokenizer=str(wordpiece))
    prepare(config)
    before = content(tmp_path / "o")
    start = time.time()
    prepare(config)
    assert "already complete" in capsys.readouterr().out and time.time() - start < 2
    (tmp_path / "docs.jsonl").write_bytes(jsonl.read_bytes() + b"\n")
    (tmp_path / "t.json").write_text(wordpiece.read_text().replace('"the"', '"tha"'))
    for key, value, name in (("vocab_size", 600, r"vocab_size \(512\)"),
                             ("tokenizer", str(tmp_path / "t.json"), "tokenizer"),
                             ("source", str(tmp_path / "docs.jsonl"), "corpus")):
        with pytest.raises(ValueError, match=f"o was begun with another {name}.*; choose another"):
            prepare(dataclasses.replace(config, **{key: value}))
    assert content(tmp_path / "o") == before


def test_a_moved_corpus_and_a_moved_folder_continue(wordpiece, texts, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "c.jsonl", texts[:200])
    tokenizer = Path(shutil.copy(wordpiece, tmp_path / "tokenizer.json"))
    config = settings(source, tmp_path / "o", tokenizer=str(tokenizer), shard_tokens=5_000)
    prepare(config)
    monkeypatch.setattr(prepare_c4, "assemble", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(dataclasses.replace(config, out=str(tmp_path / "cut")))
    monkeypatch.undo()
    (tmp_path / "elsewhere").mkdir()
    moved = [path.rename(tmp_path / "elsewhere" / f"new-{path.name}")
             for path in (source, tokenizer, tmp_path / "cut")]
    (tmp_path / "link").symlink_to(moved[2])
    source, tokenizer, _ = map(str, moved)
    monkeypatch.setattr(prepare_c4, "choose_cuts", lambda *_: pytest.fail("began anew"))
    for out in (tmp_path / "link", tmp_path / "o"):
        prepare(dataclasses.replace(config, source=source, tokenizer=tokenizer, out=str(out)))
    old, new = (json.loads((tmp_path / out / "meta.json").read_text()) for out in ("o", "link"))
    assert new.pop("source") == source != old.pop("source") and old == new
    assert shards(moved[2]) == shards(tmp_path / "o")


def test_a_folder_that_cannot_be_written_is_found_first(jsonl, tmp_path, monkeypatch, refusal):
    (tmp_path / "file").touch()
    monkeypatch.setattr(prepare_c4, "choose_cuts", lambda *_: pytest.fail("began to read"))
    refusal("Not a directory: ", jsonl, "--out", tmp_path / "file" / "o")


def test_a_second_process_on_one_folder_is_refused(jsonl, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "o").mkdir()
    with open(tmp_path / "o" / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another prepare_c4\.py is working"):
            prepare(settings(jsonl, tmp_path / "o"))


def test_a_folder_with_other_files_is_refused(jsonl, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.tex\)"):
        prepare(settings(jsonl, tmp_path))
    assert (tmp_path / "thesis.tex").exists()


def test_full_disk_is_one_line(jsonl, tmp_path, monkeypatch, refusal):
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(prepare_c4, "write_atomically", full)
    message = "No space left on device; once that is mended the same command continues"
    refusal(message, jsonl, "--out", tmp_path / "o", "--vocab_size", 400)


# ---------------------------------------------------------------------------------------- bad input
GOOD = [json.dumps({"text": f"document number {i} speaks about the number {i * i} and others"})
        for i in range(40)]
LINES = "\n".join(GOOD).encode()
BAD_FILES = {  # name: content, what is said of it
    "notjson.jsonl": ("\n".join([*GOOD[:2], "{oops", *GOOD[2:]]).encode(), ":3 is not JSON"),
    "nokey.jsonl": (b'{"txt": "a"}\n' + LINES, ":1 has no text under the key 'text'"),
    "null.jsonl": (LINES + b'\n{"text": null}', ":41 has no text under the key 'text'"),
    "list.jsonl": (b"[1]\n" + LINES, ":1 has no text"),
    "deep.jsonl": (b"[" * 100_000 + b"\n" + LINES, ":1 is not JSON"),
    "bytes.jsonl": (LINES + b'\n{"text": "\xff"}', ":41 is not UTF-8 (byte 11"),
    "bytes.txt": ("\n\n".join(GOOD).encode() + b"\n\nab\xff", ":81 is not UTF-8 (byte 3"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-20], " is damaged or cut short"),
    "not.jsonl.gz": (b"plain text", " is damaged or cut short"),
    "not.jsonl.zst": (b"plain text", " is damaged or cut short"),
    "not.parquet": (b"plain text, no parquet", " is damaged or cut short"),
    "empty.jsonl": (b"", " has 0 different documents"),
    "blank.txt": (b"\n \n\n", " has 0 different documents"),
    "one.jsonl": ("\n".join([GOOD[0]] * 9).encode(), " has 1 different documents"),
    "small.jsonl": (LINES, "too small for --vocab_size 5000: it reaches "),
    "corpus.doc": (b"word", " holds no .jsonl .ndjson"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_input_is_one_line_and_leaves_nothing(name, tmp_path, refusal):
    data, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    message = name * (name != "small.jsonl") + message
    refusal(message, tmp_path / name, "--out", tmp_path / "data/o", "--vocab_size", 5000)
    assert not (tmp_path / "data/o").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (("nowhere.jsonl",), "the corpus nowhere.jsonl does not exist"),
    (("docstrings", "--val_fraction", 1), "--val_fraction must lie between 0 and 1"),
])
def test_a_bad_command_line_is_one_line_and_leaves_nothing(arguments, message, tmp_path, refusal):
    refusal(message, *arguments, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_cut_zst_is_noticed_wherever_it_is_cut(tmp_path):
    whole = zstandard.compress(LINES)
    for end in range(1, len(whole), 37):
        (tmp_path / "c.jsonl.zst").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"c\.jsonl\.zst is damaged or cut short"):
            prepare(settings(tmp_path / "c.jsonl.zst", tmp_path / "o"))


def test_skip_bad_counts_instead(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("notjson.jsonl", "nokey.jsonl", "bytes.jsonl", "bytes.txt"):
        (tmp_path / "in" / name).write_bytes(BAD_FILES[name][0])
    (tmp_path / "in" / "cut.jsonl.gz").write_bytes(gzip.compress(LINES)[:-20])
    meta = prepare(settings(tmp_path / "in", tmp_path / "o", vocab_size=300, skip_bad=True))
    assert meta["skipped"]["bad"] == 5
    assert "skipped: " in (err := capsys.readouterr().err) and "bytes.jsonl:41 is not UTF-8" in err


def test_inspect_reports_what_the_lengths_say(jsonl, tmp_path, capsys):
    prepare(settings(jsonl, tmp_path / "o"))
    lengths, before = Corpus(tmp_path / "o").lengths, content(tmp_path / "o")
    capsys.readouterr()
    inspect.inspect_folder(inspect.Config(str(tmp_path / "o"), verify=True, samples=2))
    printed = capsys.readouterr().out
    kept = sum(min(n, 126) for n in lengths.tolist()) / lengths.sum()
    padding = 1 - sum(min(n + 2, 512) for n in lengths.tolist()) / (512 * len(lengths))
    assert f"{len(lengths):,} documents, {lengths.sum():,} tokens" in printed
    assert f"window 128: the first keeps {kept:.1%} of the tokens" in printed
    assert f"a padded batch is {padding:.1%} padding" in printed
    texts = decoded(tmp_path / "o", "train")
    words, size = sum(len(t.split()) for t in texts), sum(len(t.encode()) for t in texts)
    fertility = f"{lengths.sum() / words:.2f} tokens/word, {size / lengths.sum():.2f} bytes/token"
    assert fertility in printed and printed.count("--- document") == 2
    assert content(tmp_path / "o") == before, "it reads only"
    done = python("-m", "corpus.inspect", "nowhere", code=1)
    assert done.stderr.startswith("error: nowhere holds no meta.json")


def test_reader_opens_more_shards_than_files_may_be_open(texts, tmp_path):
    config = settings(write_jsonl(tmp_path / "c.jsonl", texts), tmp_path / "o", shard_tokens=900)
    n_shards = len([s for s in prepare(config)["shards"] if s["split"] == "train"])
    assert n_shards > 100
    code = ("import resource, sys; from corpus.shards import Corpus;"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (150, 4096)); c = Corpus(sys.argv[1]);"
            "print(sum(len(c[i]) for i in range(len(c))) == c.n_tokens)")
    assert python("-c", code, tmp_path / "o").stdout.strip() == "True"


def test_reader_names_the_file_that_does_not_match(jsonl, tmp_path):
    prepare(settings(jsonl, folder := tmp_path / "o"))
    meta = json.loads((folder / "meta.json").read_text())
    as_json = lambda value: lambda _: json.dumps(value).encode()
    for name, change, message in [
        ("train_00000.bin", lambda b: b[:-2], "train_00000.bin has"),
        ("train_00000.bin", lambda b: b"\0\0" + b[2:], "train_00000.bin does not have the sha256"),
        ("train_00000.idx", lambda b: b + b, "train_00000.idx has"),
        ("train_00000.idx", lambda b: b[:-8] + b[:8], "train_00000.idx does not end at"),
        ("meta.json", lambda _: b"{", "meta.json cannot be read"),
        ("meta.json", as_json(meta | {"format": 9}), "meta.json is of format 9"),
        ("meta.json", as_json(meta | {"shards": 3}), "meta.json is damaged"),
        ("tokenizer.tiktoken", lambda _: b"", "tokenizer.tiktoken does not have the sha256")]:
        saved = (folder / name).read_bytes()
        (folder / name).write_bytes(change(saved))
        with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(message)}[^\n]*$"):
            Corpus(folder, verify=name == "train_00000.bin")
        (folder / name).write_bytes(saved)
    for name, message in [
        ("train_00000.bin", r"train_00000\.bin is listed in meta\.json but missing"),
        ("meta.json", r"holds no meta\.json; `python prepare_c4.py SOURCE --out .*` prepares it")]:
        (folder / name).unlink()
        with pytest.raises(ValueError, match=message):
            Corpus(folder)


# ---------------------------------------------------------------------------- hub, docstrings, task
@pytest.fixture
def hub_folder(texts, tmp_path) -> Path:
    """A local dataset laid out as allenai/c4 is on the hub."""
    folder = tmp_path / "c4"
    (folder / "en").mkdir(parents=True)
    splits = "".join(f"  - split: {split}\n    path: en/c4-{split}.*.json.gz\n"
                     for split in ("train", "validation"))
    header = f"---\nconfigs:\n- config_name: en\n  data_files:\n{splits}---\n"
    (folder / "README.md").write_text(header)
    rows = [json.dumps({"text": t, "url": "http://x"}) + "\n" for t in texts[:300]]
    pieces = {"train.00000-of-00002": rows[:120] + rows[-10:],
              "train.00001-of-00002": rows[120:240], "validation.00000-of-00001": rows[240:]}
    for name, piece in pieces.items():
        (folder / "en" / f"c4-{name}.json.gz").write_bytes(gzip.compress("".join(piece).encode()))
    return folder


def test_c4_streams_through_datasets_and_keeps_its_own_validation(hub_folder, texts, tmp_path):
    meta = prepare(settings(f"hub:{hub_folder}:en", tmp_path / "o"))
    assert decoded(tmp_path / "o", "val") == [t.strip().lower() for t in texts[240:300]]
    # ten documents of the validation split were put into train as well: they are left out there
    assert decoded(tmp_path / "o", "train") == [t.strip().lower() for t in texts[:240]]
    assert meta["skipped"] == {"copies of validation documents": 10}
    where = r"validation file 0 row 1 has no text under the key 'body'"
    with pytest.raises(ValueError, match=where):
        prepare(settings(f"hub:{hub_folder}:en", tmp_path / "key", text_key="body",
                         tokenizer=str(tmp_path / "o")))


def test_unreachable_hub_is_one_line_within_seconds(tmp_path):
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    for env in ({"HF_HUB_OFFLINE": "1"}, closed):
        start = time.time()
        done = python("prepare_c4.py", "c4", "--out", tmp_path / "o", code=1, **env)
        assert done.stderr.count("\n") == 1 and time.time() - start < 20
        assert done.stderr.startswith("error: cannot stream allenai/c4 from the Hugging Face hub")
        assert not (tmp_path / "o").exists()


def test_importing_stays_light():
    heavy = "datasets", "pyarrow", "tokenizers", "transformers", "torch", "tyro"
    code = f"import sys, prepare_c4; print([m for m in {heavy} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_prose_keeps_english_and_drops_code_tables_and_markup():
    docstring = "\n\n".join([
        "Return the :class:`~torch.Tensor` of the *first* value, which is ``None`` for\n"
        "an empty list [1]_.",
        "Parameters\n----------\n"
        "x : array_like\n    The values that are to be sorted in the given order.",
        ">>> a = f(1)\nThe output of this is not prose at all.",
        "Args:\n    n (`int`, *optional*, defaults to 3):\n"
        "        How many of the values to keep in the result.",
        "====  =====\na     b\n====  =====",
        "```python\nThis would be the code of the example in it.\n```"])
    assert offline.prose(docstring) == [
        "Return the Tensor of the first value, which is None for an empty list.",
        "The values that are to be sorted in the given order.",
        "How many of the values to keep in the result."]


@pytest.mark.slow
def test_docstrings_of_this_environment_are_ten_megabytes():
    documents = offline.collect_docstrings()
    assert sum(map(len, documents)) > 10e6 and len(set(documents)) == len(documents)


def test_word_order_task_is_balanced_disjoint_and_only_moves_words(texts, tmp_path):
    counts = write_word_order_task(texts, tmp_path / "a", 200)
    assert write_word_order_task(reversed(texts), tmp_path / "b", 200) == counts
    assert content(tmp_path / "a") == content(tmp_path / "b")
    real = {tuple(sorted(words)): (words, i)
            for i, text in enumerate(texts) for words in offline.passages(text)}
    documents = {}
    for name in ("train", "dev"):
        header, *lines = (tmp_path / "a" / f"{name}.tsv").read_text().splitlines()
        assert header == "sentence\tlabel" and len(lines) == counts[name] > 100
        rows = [(sentence.split(), label) for sentence, label in (r.split("\t") for r in lines)]
        assert sum(label == "1" for _, label in rows) * 2 == len(rows)
        used = {tuple(sorted(words)) for words, _ in rows}
        assert len(used) == len(rows), "no passage is used twice, neither kept nor disturbed"
        documents[name] = {real[words][1] for words in used}
        for words, label in rows:
            assert 8 <= len(words) <= 30 and '"' not in "".join(words)
            moved = sum(a != b for a, b in zip(real[tuple(sorted(words))][0], words))
            assert moved == (0 if label == "1" else 2 * SWAPS)
    assert len(documents["train"] & documents["dev"]) <= 3, "a stock phrase may stand in several"
