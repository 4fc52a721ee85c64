"""studies/blimp.py: the scores of a plain loop in transformers, accuracies by hand, the record."""

import json
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import SHAPE, random_mlm, refused, save_checkpoint, some_documents
from tqdm import tqdm
from transformers import AutoModelForMaskedLM

from export import huggingface as export
from machine import pick_dtype
from model import EncoderConfig, MaskedLM, SequenceClassifier
from studies.blimp import accuracies, main, pseudo_log_likelihoods, read_pairs

PAIR = ("It barks.", "It bark.")
LINE = '{"linguistics_term": "npi", "sentence_good": "It barks.", "sentence_bad": "It bark."}\n'


def exported(tokenizer, folder, write=export.write_model, **shape):
    """A random model, ours and as transformers loads it."""
    model = random_mlm(tokenizer, **shape)
    write(model, tokenizer, {}, folder)
    return model, AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()


def scores_of(tokenizer, sentences, model, dtype=torch.float32):
    return pseudo_log_likelihoods(model, tokenizer, sentences, dtype, tqdm(disable=True))


@torch.no_grad()
def plain_loop(tokenizer, sentences, model, batch_size=32) -> np.ndarray:
    """The same scores as one writes them with transformers: padded batches of masked copies."""
    ids = [[tokenizer.cls_id, *tokenizer.encode(s), tokenizer.sep_id] for s in sentences]
    copies = torch.tensor([(s, i) for s, x in enumerate(ids) for i in range(1, len(x) - 1)])
    scores = torch.zeros(len(ids), dtype=torch.float64)
    for of, at in (some.T for some in copies.split(batch_size)):
        n, rows = torch.arange(len(of)), [torch.tensor(ids[s]) for s in of]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        labels, padded[n, at] = padded[n, at], tokenizer.mask_id
        logits = model(padded.clamp(min=0), attention_mask=(padded >= 0).long()).logits[n, at]
        scores.index_add_(0, of, logits.log_softmax(-1)[n, labels].double())
    return scores.numpy()


@pytest.mark.parametrize(("write", "shape"), [(export.write_model, dict(norm="pre")), (
    export.write_bert, dict(position="learned", mlp="gelu", vocab_multiple=1))])
def test_scores_equal_a_plain_loop_in_transformers(tokenizer, tmp_path, write, shape):
    ours, theirs = exported(tokenizer, tmp_path, write, **shape)
    texts = tokenizer, [t[:n] for t, n in zip(some_documents(24), [8, 30, 30, 31, 90] * 5)]
    assert np.abs(scores_of(*texts, ours) - plain_loop(*texts, theirs)).max() < 1e-4


@pytest.mark.slow
def test_five_times_as_fast_as_transformers(tokenizer, tmp_path):
    """CPU seconds at 4 x 256: as the command runs (bf16 where the CPU has it) and in fp32, against
    transformers in fp32 and batches of 32, its fastest. `pytest -m slow -s` prints the ratios."""
    shape = dict(n_layers=4, n_heads=4, d_model=256, d_ff=1_024, vocab_size=30_528)
    ours, theirs = exported(tokenizer, tmp_path, **shape)
    sentences, seconds = [t[:n] for n in (30, 45, 60) for t in some_documents(40)], []
    dtype = pick_dtype("auto", torch.device("cpu"))
    for function, *args in 3 * [(scores_of, ours, dtype), (scores_of, ours), (plain_loop, theirs)]:
        start = time.process_time()
        function(tokenizer, sentences, *args)
        seconds.append(time.process_time() - start)
    *own, plain = np.median(np.reshape(seconds, (3, 3)), axis=0)
    print(f"\ntimes as fast in {dtype} and in fp32:", ratios := plain / own)
    assert ratios[0] > (5 if dtype == torch.bfloat16 else 2.5)


def test_accuracies_are_means_of_files_and_phenomena_with_a_binomial_error():
    pairs = [("f", "x")] * 4 + [("g", "x")] * 4 + [("h", "y")] * 2
    result = accuracies(pairs, np.array([1, 0] * 5 + [0, 1, 0, 1, 1, 1] + [3, 2, 2, 3]))
    assert result["files"] == {"f": 1, "g": 0.25, "h": 0.5}
    assert result["phenomena"] == {"x": 0.625, "y": 0.5}
    assert (result["score"], result["stderr"]) == (0.5625, 0.1964)  # sqrt(15/512 + 1/8) / 2


def test_a_run_gets_a_record_a_checkpoint_and_bad_input_one_line(tokenizer, tmp_path, monkeypatch):
    def folder_with(name: str, text: str) -> str:
        (path := tmp_path / name).parent.mkdir()
        path.write_text(text)
        return str(path.parent)

    blimp = folder_with("blimp/a.jsonl", LINE.replace("npi", "s-selection") * 3)
    zorro = folder_with("zorro/filler-gap-x.txt", f"{PAIR[1]}\n{PAIR[0]}\n" * 3)
    assert read_pairs(blimp, 2) == ("blimp", [("a", "argument_structure", *PAIR)] * 2)
    assert read_pairs(zorro) == ("zorro", [("filler-gap-x", "filler-gap", *PAIR)] * 3)
    run, config = tmp_path / "run", EncoderConfig(tokenizer.vocab_size, **SHAPE)
    for step in (10, 20):
        where, progress = run / f"ckpt/step_{step:08d}", dict(step=step, train_seconds=step / 2)
        save_checkpoint(where, tokenizer, MaskedLM(config), **progress)
    for more in (["--checkpoints", "all"], [], ["--pairs", "1"]):
        main([str(run), "--blimp_dir", blimp, *more])
    records = [json.loads(line) for line in (run / "blimp.jsonl").read_text().splitlines()]
    assert [(r["step"], r["pairs"]) for r in records] == [(10, 0), (20, 0), (20, 1)]
    assert {"type": "blimp", "train_seconds": 10, "n_pairs": 3}.items() <= records[1].items()
    SequenceClassifier(config, 2).save_pretrained(tmp_path / "tuned")
    no_key = folder_with("no_key/npi.jsonl", LINE + LINE.replace("_bad", "_worse"))
    for path, folder, n, message in [
        (run, str(run / "ckpt"), 0, "no *.jsonl"),
        (run, no_key, 0, "npi.jsonl, line 2: no key 'sentence_bad'"),
        (run, folder_with("odd/case.txt", "1\n2\n3\n"), 0, "case.txt: 3 lines"),
        (run, blimp, 4, "a.jsonl has 3"),
        (tmp_path / "tuned", blimp, 0, "tuned does not fit this model; missing: head")]:
        with refused(message):
            main([str(path), "--blimp_dir", folder, "--pairs", str(n)])
    with refused("give a run"):
        main(["--blimp_dir", blimp])

    full = Mock(side_effect=OSError("it cannot be written"))
    monkeypatch.setattr("studies.blimp.make_folder", full)
    monkeypatch.setattr("studies.blimp.pseudo_log_likelihoods", None)  # refused before the work
    with refused("it cannot be written"):
        main([str(run), "--blimp_dir", blimp])
