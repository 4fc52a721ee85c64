"""studies/grow.py: the large encoder computes what the small one does, and can become more."""

import pytest
import torch
from conftest import random_mlm, refused, save_checkpoint

from corpus.tokenizer import Tokenizer
from model import MaskedLM
from studies.grow import grow, main

INPUTS = dict(input_ids=torch.arange(90) * 7 % 320, max_seqlen=50,
              cu_seqlens=torch.tensor([0, 40, 90], dtype=torch.int32))


@pytest.mark.parametrize("shape", [dict(position="rope-alibi", alibi_ratio=8.0), dict(
    position="learned", mlp="gelu", norm="pre"), dict(tie_head=False, bias=False),
    dict(d_model=33, n_heads=3)])
@pytest.mark.parametrize("n_layers", [2, 4])
def test_a_grown_encoder_has_the_logits_of_the_small_one(tokenizer, shape, n_layers):
    small = random_mlm(tokenizer, **shape)
    large = grow(small, n_layers)
    assert (large.cfg.d_model, large.cfg.n_layers) == (2 * small.cfg.d_model, n_layers)
    assert (large(**INPUTS) - small(**INPUTS)).abs().max() < 1e-5


def test_no_two_units_of_a_layer_learn_the_same(tokenizer):
    large = grow(random_mlm(tokenizer, position="rope-alibi"), 2)
    large(**INPUTS, masked_idx=torch.arange(20), labels=torch.arange(20))[0].backward()
    for p in [p for p in large.encoder.layers.parameters() if p.dim() == 2]:
        rows = p.grad[p.grad.abs().sum(1) > 0]
        assert len(rows) and torch.cdist(rows, rows).fill_diagonal_(1).min() > 1e-6


def test_the_command_writes_weights_with_their_tokenizer(tokenizer, tmp_path):
    save_checkpoint(tmp_path / "small", tokenizer, random_mlm(tokenizer))
    main([str(tmp_path / "small"), "--n_layers", "3", "--out", str(tmp_path / "large")])
    assert MaskedLM.from_pretrained(tmp_path / "large").cfg.n_layers == 3
    assert tokenizer.same_as(Tokenizer.load(tmp_path / "large"))
    with refused("--n_layers 1: ", " has 2 already"):
        main([str(tmp_path / "small"), "--n_layers", "1", "--out", str(tmp_path / "other")])
    with refused("small exists; remove it"):
        main([str(tmp_path / "small"), "--out", str(tmp_path / "small")])
