"""bench/dryrun.py: pretrain.py's loop on a CUDA chip that is not there. Each run is a process,
because it changes what torch.cuda says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, python, refused

pytest.importorskip("triton", reason="triton is not installed here")
if not shutil.which("g++"):
    pytest.skip("the dry run needs g++, which is not installed here", allow_module_level=True)

import plots
from bench.dryrun import main
from recipes import make_presets

# in each micro-batch a wait and a copy from memory that is not pinned; then an index by a mask
PLANTS = """
import pretrain
mask_tokens, n = pretrain.mask_tokens, iter(range(99))

def planted(batch, *args):
    ids, masked_idx, labels = mask_tokens(batch, *args)
    float(labels.float().mean()), batch.special.clone().to("cuda", non_blocking=True)
    return ids[ids > 5] if next(n) == 2 else ids, masked_idx, labels

pretrain.mask_tokens = planted
"""


def dry_run(out: Path, *arguments: str, **how) -> dict:
    """The report."""
    python("-m", "bench.dryrun", *arguments, "--out", out, **how)
    return json.loads(out.read_text())


@pytest.mark.parametrize("preset", ["mosaic-base", "bert-base"])
def test_a_step_waits_for_nothing_and_every_operation_has_a_kernel(preset, tmp_path):
    result = dry_run(tmp_path / "out.json", preset, "--layers", "2")
    assert result["unexpected"] == []
    assert result["waits"] == {"log": 2, "evaluation": 2, "checkpoint": 2}
    rows = {(row["phase"], row["kernel"]): row for row in result["kernels"]}
    adamw = rows["optimizer", "_fused_adamw_"]["gb"]  # a micro-batch's eighth of 32 bytes a weight
    assert result["fixed_gb"] == pytest.approx(8 * adamw / 2, rel=0.01)
    if preset == "bert-base":  # attention in one kernel, as on a chip: no scores are written
        assert rows["forward", "_scaled_dot_product_efficient_attention"]["launches"] == 2
    else:  # of a micro-batch: 2 layers, forward and backward
        assert rows["forward", "_attn_one_tile"]["launches"] == 2
        assert rows["backward", "_attn_one_tile"]["launches"] == 2
        # kept of a token, in bf16 rows of d = 768: a layer's 4 of attention, 12 of GeGLU and some 6
        # of residuals and norms, the last one's 6 and 30 % of 16, 30 % of 30,528 logits
        kept = (result["peak_gb"] - result["fixed_gb"]) * 1e9 / 65_536 / (2 * 768)
        assert kept == pytest.approx(22 + 6 + 0.3 * 16 + 0.3 * 30_528 / 768, rel=0.1)
        gemms = sum(row["tflop"] for row in rows.values() if "mm" in row["kernel"])
        # 6 FLOPs a weight and token; of layer 2 after the attention and of the head on 30 % of them
        d, ff = 768, 3_072
        weights = 2 * 3 * d * d + 1.3 * (d * d + 3 * d * ff) + 0.3 * (d * d + d * 30_528)
        assert gemms == pytest.approx(6 * 65_536 * weights / 1e12, rel=0.03)


@pytest.mark.parametrize("preset", sorted({*make_presets()} - {"mosaic-base", "bert-base"}))
def test_nor_does_a_step_of_any_other_preset(preset, tmp_path):
    result = dry_run(tmp_path / "out.json", preset, "--layers", "2")
    assert result["unexpected"] == []
    assert result["waits"] == {"log": 2, "evaluation": 2, "checkpoint": 2}


def test_planted_waits_and_copies_are_found(tmp_path):
    planted = f"{PLANTS}\nfrom bench.dryrun import main\nmain()"
    arguments = "mosaic-base", "--layers", "1", "--out", tmp_path / "out.json"
    done = python("-c", planted, *arguments, code=1)
    for what in ("wait (item)", "wait (index)", "blocking copy"):
        assert f"masking: {what} at" in done.stderr, done.stderr


@pytest.fixture(scope="module")
def oldest_torch(tmp_path_factory) -> Path:
    """A Python with the oldest torch of requirements.txt, where its wheels can be had: 5 GB."""
    wanted = "torch==" + re.search(r"torch>=([\d.]+)", (ROOT / "requirements.txt").read_text())[1]
    python = tmp_path_factory.mktemp("oldest") / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    pip = [python, "-m", "pip", "install", "-q", f"{wanted}.*", "triton", "-r", "requirements.txt"]
    done = subprocess.run(pip, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{wanted} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("torch", ["newest", "oldest"])
@pytest.mark.parametrize("preset", ["mosaic-base", "bert-base"])
def test_compiled_in_two_graphs_without_breaks(preset, torch, request, tmp_path):
    """One for training and one for evaluation, whatever the lengths of the documents; no spills."""
    exe = sys.executable if torch == "newest" else request.getfixturevalue("oldest_torch")
    result = dry_run(tmp_path / "out.json", preset, "--layers", "2", "--compile", exe=exe)
    assert (result["graphs"], result["graph_breaks"], result["unexpected"]) == (2, 0, [])
    assert any("triton_" in row["kernel"] for row in result["kernels"])


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_through_without_one(tmp_path):
    """Six minutes on two busy cores."""
    env = os.environ | {"DRY": "1", "OUT": str(tmp_path), "DATA": str(tmp_path / "data"),
                        "PYTHON": sys.executable}
    done = subprocess.run(["bash", "bench/on_gpu.sh"], env=env, cwd=ROOT, capture_output=True,
                          text=True)
    summary = (tmp_path / "summary.txt").read_text()
    assert done.returncode == 0 and summary.count("exit 0") == 6, done.stdout[-6000:]
    for row in json.loads((tmp_path / "kernels.json").read_text())["attention"]:
        assert row["provider"] != "ours" or "failed" not in row, row
    step = json.loads((tmp_path / "step.json").read_text())["results"][0]["contenders"]
    assert not [row for row in step if "-tiny" in row["name"] and "failed" in row]


def test_the_figure_knows_the_kernels_by_part(tmp_path):
    parts = {
        "forward mm 65536 x 768 x 6144": "matmuls", "backward _attn_one_tile": "attention",
        "forward _zero_slack": "attention", "backward _geglu": "GeGLU, GELU",
        "forward _scaled_dot_product_efficient_attention": "attention",
        "backward triton_per_fused_add_native_layer_norm_backward_sum_8":
            "LayerNorm, residuals, dropout",
        "forward _cross_entropy_rows": "cross entropy", "optimizer _fused_adamw_": "rest",
        "backward triton_red_fused_sum_view_13": "bias gradients"}
    assert {kernel: plots.part_of(kernel) for kernel in parts} == parts
    reports = sorted(map(str, (ROOT / "results").glob("dryrun-*.json")))
    plots.dryrun(reports, out=str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(("arguments", "what"), [
    (["mosaic-base", "--chip", "H900"], "--chip H900: choose "),
    (["mosaic-huge"], "--preset mosaic-huge: choose ")])
def test_what_is_not_known_gets_one_line(arguments, what):
    with refused(what):
        main(arguments)
