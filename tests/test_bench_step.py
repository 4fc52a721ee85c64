"""python -m bench.step: what it counts, what it feeds the peers, and that it runs on a CPU."""

import json
from unittest.mock import Mock

import pytest
import torch

from batches import Batches
from bench import step as bench_step
from bench.step import Config, RandomCorpus, mfu, open_data, ours, padded, run, theirs
from model import PRESETS, EncoderConfig, flops_per_token

CPU = torch.device("cpu")
TINY = dict(sizes=("tiny",), seq_lens=(32,), micro_tokens=256, rounds=3, steps=1, warmup=1,
            compile="off", device="cpu")


def test_every_contender_runs_on_a_cpu_and_a_ratio_is_the_median_of_the_rounds(tmp_path):
    report = run(Config(**TINY, out=str(tmp_path / "step.json")))
    assert json.loads((tmp_path / "step.json").read_text())["results"] == report["results"]
    (result,) = report["results"]
    rows = {row["name"]: row for row in result["contenders"]}
    ours, peers = {"mosaic-tiny", "bert-tiny"}, {"BertForMaskedLM", "ModernBertForMaskedLM"}
    assert set(rows) == ours | peers and set(result["ratios"]) == ours
    assert all(row["tok_per_s"] > 0 and row["mfu"] is None for row in rows.values())
    assert set(result["ratios"]["bert-tiny"]) == peers
    a, b = (rows[name]["rounds"] for name in ("bert-tiny", "BertForMaskedLM"))
    median = sorted(x / y for x, y in zip(a, b))[1]
    assert result["ratios"]["bert-tiny"]["BertForMaskedLM"] == median


def test_only_real_tokens_are_counted():
    source, cfg = open_data(""), Config(micro_tokens=1024)
    for family, share in (("bert", 0.15), ("mosaic", 0.3)):
        c = ours(cfg, family, "tiny", 128, False, source, CPU)
        inputs, n = c.inputs(0, c.build(0))
        assert n == 1024 == len(inputs["input_ids"]) == inputs["cu_seqlens"][-1]
        peer = theirs(cfg, family, "tiny", 128, False, source, CPU)
        documents = len(inputs["cu_seqlens"]) - 1
        for m in range(4):
            batch, n = peer.inputs(m, peer.build(m))
            assert batch["input_ids"].shape == (documents, 128), "all batches have one shape"
            assert n == batch["attention_mask"].sum() < batch["input_ids"].numel()
            n_masked = (batch["labels"] != -100).sum()
            assert n_masked == round(share * (n - 2 * documents)), "[CLS] and [SEP] stay"


def test_padded_holds_the_flat_batch_and_nothing_else():
    batch = Batches([RandomCorpus(500, 50)], open_data("")[1], 16, 64, "first", 0)(0)
    masked_idx, labels = torch.tensor([1, 20]), torch.tensor([7, 8])
    out = padded(batch.input_ids, masked_idx, labels, batch.cu_seqlens, 16, pad_id=0)
    real = out["attention_mask"].bool()
    assert real.sum(1).tolist() == batch.cu_seqlens.diff().tolist()
    assert torch.equal(out["input_ids"][real], batch.input_ids)
    assert not out["input_ids"][~real].any()
    assert torch.equal(out["labels"][real].ne(-100).nonzero()[:, 0], masked_idx)
    assert out["labels"][out["labels"] != -100].tolist() == [7, 8]


def test_peers_have_our_shape():
    """BERT's to the last parameter; ModernBERT, without biases and token types, within 2 %."""
    def size(make, family: str) -> int:
        c = make(Config(**TINY), family, "tiny", 32, False, open_data(""), CPU)
        return sum(p.numel() for p in c.model.parameters())

    assert size(theirs, "bert") == size(ours, "bert")
    assert size(theirs, "mosaic") == pytest.approx(size(ours, "mosaic"), rel=0.02)


def test_mfu_is_the_share_of_the_peak():
    assert mfu(1e9, 321_024, "NVIDIA H200") == pytest.approx(321_024e9 / 989.4e12)
    assert mfu(1e9, 321_024, "NVIDIA H200 NVL") == pytest.approx(321_024e9 / 835.5e12)
    assert mfu(1e9, 321_024, "an unknown GPU") is None


def test_flops_formula_gives_the_published_figure():
    mosaic = EncoderConfig(**PRESETS["mosaic-base"])
    assert flops_per_token(mosaic, 128, 0.3) == pytest.approx(736.9e6, rel=1e-3)
    saved = 6 * 4 * 0.7 * (768**2 + 3 * 768 * 3_072)  # what is behind attention, in four layers
    assert flops_per_token(mosaic, 128, 0.3, 5) == pytest.approx(736.9e6 - saved, rel=1e-3)
    bert = EncoderConfig(**PRESETS["bert-base"])
    assert flops_per_token(bert, 128, 0.15) == pytest.approx(545.4e6, rel=1e-3)


def test_a_contender_that_fails_is_listed_with_its_reason(monkeypatch, tmp_path):
    failing = Mock(__name__="theirs", side_effect=RuntimeError("no such model\nand more"))
    monkeypatch.setattr(bench_step, "theirs", failing)
    (result,) = run(Config(**TINY, out=str(tmp_path / "step.json")))["results"]
    failed = {row["name"]: row["failed"] for row in result["contenders"] if "failed" in row}
    reason = "RuntimeError: no such model and more"
    assert failed == {f"theirs, {family}": reason for family in ("mosaic", "bert")}


def test_a_report_that_cannot_be_written_is_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_step, "compare", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written to .*give another"):
        run(Config(**TINY, out=str(tmp_path / "file/r.json")))
