"""python -m bench.step: what it counts, what it feeds the peers, and that it runs on a CPU."""

import json

import pytest
import torch

from batches import Batches
from bench import step as bench_step
from bench.step import Config, RandomCorpus, first_documents, mfu, open_data, ours, padded, run, theirs
from model import EncoderConfig, flops_per_token

CPU = torch.device("cpu")
TINY = Config(
    sizes=("tiny",), seq_lens=(32,), micro_tokens=256, rounds=2, steps=1, warmup=1, compile="off", device="cpu"
)


def test_every_contender_runs_on_a_cpu(tmp_path):
    report = run(Config(**{**vars(TINY), "out": str(tmp_path / "step.json")}))
    assert json.loads((tmp_path / "step.json").read_text())["results"] == report["results"]
    rows = {row["name"]: row for row in report["results"][0]["contenders"]}
    assert set(rows) == {"mosaic-tiny", "bert-tiny", "BertForMaskedLM", "ModernBertForMaskedLM"}
    for row in rows.values():
        assert row["tok_per_s"] > 0 and all(row[f"{part}_ms"] > 0 for part in bench_step.PARTS)
        assert row["mfu"] is None and row["peak_mem_gb"] is None, "neither is known on a CPU"
    ratios = report["results"][0]["ratios"]
    assert set(ratios) == {"mosaic-tiny", "bert-tiny"} and set(ratios["bert-tiny"]) == set(rows) - set(ratios)


def test_a_profile_names_the_kernels_of_the_first_contender(tmp_path):
    run(Config(**{**vars(TINY), "profile": str(tmp_path / "profile.txt"), "out": str(tmp_path / "step.json")}))
    text = (tmp_path / "profile.txt").read_text()
    assert text.startswith("tiny, 32, mosaic-tiny, 3 steps") and "aten::addmm" in text and "Self CPU time total" in text


def test_a_ratio_is_the_median_of_the_rounds_ratios(tmp_path):
    result = run(Config(**{**vars(TINY), "rounds": 3, "out": str(tmp_path / "step.json")}))["results"][0]
    a, b = ({r["name"]: r["rounds"] for r in result["contenders"]}[n] for n in ("bert-tiny", "BertForMaskedLM"))
    assert result["ratios"]["bert-tiny"]["BertForMaskedLM"] == sorted(x / y for x, y in zip(a, b))[1]


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
            assert batch["input_ids"].shape == (documents, 128), "every batch of a peer has one shape"
            assert n == batch["attention_mask"].sum() < batch["input_ids"].numel()
            assert (batch["labels"] != -100).sum() == round(share * (n - 2 * documents)), "[CLS] and [SEP] stay"


def test_padded_holds_the_flat_batch_and_nothing_else():
    batch = first_documents(Batches([RandomCorpus(500, 50)], open_data("")[1], 16, 64, "first", 0)(0), 3)
    masked_idx, labels = torch.tensor([1, 20]), torch.tensor([7, 8])
    out = padded(batch.input_ids, masked_idx, labels, batch.cu_seqlens, 16, pad_id=0)
    real = out["attention_mask"].bool()
    assert real.sum(1).tolist() == batch.cu_seqlens.diff().tolist()
    assert torch.equal(out["input_ids"][real], batch.input_ids) and not out["input_ids"][~real].any()
    assert torch.equal(out["labels"][real].ne(-100).nonzero()[:, 0], masked_idx)
    assert out["labels"][out["labels"] != -100].tolist() == [7, 8]


def test_peers_have_our_shape():
    """BERT's to the last parameter; ModernBERT, without biases and token types, within 2 %."""
    source = open_data("")
    size = lambda make, family: sum(
        p.numel() for p in make(TINY, family, "tiny", 32, False, source, CPU).model.parameters()
    )
    assert size(theirs, "bert") == size(ours, "bert")
    assert size(theirs, "mosaic") == pytest.approx(size(ours, "mosaic"), rel=0.02)


def test_mfu_is_the_hand_computed_share_of_the_peak():
    # one layer, d 64, ff 256, V 128, 10 keys a token, 25 % masked: 6 (4·64² + 2·64·256) + 12·64·10 + 1.5 (64² + 64·128)
    cfg = EncoderConfig(vocab_size=128, n_layers=1, n_heads=1, d_model=64, d_ff=256, mlp="gelu")
    flops = flops_per_token(cfg, 10, 0.25)
    assert flops == 6 * 49_152 + 7_680 + 18_432 == 321_024
    assert mfu(1e9, flops, "NVIDIA H200") == pytest.approx(321_024e9 / 989.4e12)
    assert mfu(1e9, flops, "NVIDIA H200 NVL") == pytest.approx(321_024e9 / 835.5e12)  # slower than its namesake
    assert mfu(1e9, flops, "an unknown GPU") is None


def test_a_contender_that_fails_is_listed_with_its_reason(monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("no such model\nand more")

    monkeypatch.setattr(bench_step, "theirs", broken)
    rows = run(Config(**{**vars(TINY), "out": str(tmp_path / "step.json")}))["results"][0]["contenders"]
    failed = {row["name"]: row["failed"] for row in rows if "failed" in row}
    assert failed == {f"transformers, {family}": "RuntimeError: no such model" for family in ("mosaic", "bert")}


@pytest.mark.parametrize(("setting", "says"), [({"rounds": 0}, "--rounds"), ({"seq_lens": (2,)}, "--seq_lens")])
def test_settings_that_cannot_work_are_refused_in_one_line(setting, says):
    with pytest.raises(SystemExit, match=f"^error: .*{says}"):
        run(Config(**{**vars(TINY), **setting}))


def test_a_missing_corpus_is_refused_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*nowhere"):
        run(Config(**{**vars(TINY), "data": str(tmp_path / "nowhere")}))
