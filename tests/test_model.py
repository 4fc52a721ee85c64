"""model.py: equal to the originals, flat equals padded, every switch does what it is for."""

from pathlib import Path
from unittest.mock import Mock, patch

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, randomize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

import kernels
from model import PRESETS, Encoder, EncoderConfig, MaskedLM, SequenceClassifier, TokenClassifier

GOLDEN = ROOT / "../shared/golden/mosaicbert_small.safetensors"
SMALL = dict(vocab_size=101, n_layers=2, n_heads=2, d_model=32, d_ff=48, vocab_multiple=1)
NO_DROPOUT = dict(embedding_dropout=0.0, attention_dropout=0.0, output_dropout=0.0, mlp_dropout=0.0)
LENGTHS = [7, 1, 12, 3]


def small(**changes) -> EncoderConfig:
    return EncoderConfig(**{**SMALL, **changes})


def flat_batch(lengths=LENGTHS, vocab=101, seed=0):
    g = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.randint(5, vocab, (int(cu[-1]),), generator=g), cu, max(lengths)


def padded_batch(lengths=LENGTHS, vocab=101, seed=0):
    """The same documents as flat_batch, right-padded with garbage."""
    ids, cu, S = flat_batch(lengths, vocab, seed)
    out = torch.full((len(lengths), S), 3)
    mask = torch.zeros_like(out)
    for b, n in enumerate(lengths):
        out[b, :n] = ids[cu[b] : cu[b] + n]
        mask[b, :n] = 1
    return out, mask


# ----------------------------------------------------------------------------- exactness
def test_parameter_counts_are_the_papers():
    counts = {"mosaic-base": 137_400_384, "mosaic-large": 435_221_312}
    counts |= {"bert-base": 109_518_912, "bert-large": 335_180_608}
    with torch.device("meta"):
        for preset, n in counts.items():
            assert MaskedLM(EncoderConfig(**PRESETS[preset])).n_params() == n, preset


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip("golden vectors of upstream MosaicBERT are not in a plain clone")
    with safe_open(GOLDEN, "pt") as f:
        vectors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        return vectors | {"config": f.metadata()["config"]}


def upstream_folder(golden, folder: Path, prefixes=("mlm.",)) -> Path:
    weights = {k.split(".", 1)[1]: v for k, v in golden.items() if k.startswith(prefixes)}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(golden["config"])
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    return folder


def test_mosaicbert_matches_upstream(golden, tmp_path):
    """Hidden states, logits, loss: lengths 40 17 1 33 8 3, two segments."""
    model = MaskedLM.from_pretrained(upstream_folder(golden, tmp_path)).eval()
    inputs = golden["input_ids"], golden["attention_mask"], golden["token_type_ids"]
    torch.testing.assert_close(model.encoder(*inputs), golden["hidden"], atol=1e-5, rtol=0)
    real = golden["attention_mask"].bool()
    loss, logits = model(*inputs, labels=golden["labels"])
    torch.testing.assert_close(logits[real], golden["logits"][real], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss.reshape(1), golden["loss"], atol=1e-5, rtol=0)
    assert not logits[~real].any(), "padded positions are zero"


def test_mosaicbert_gradients_match_upstream_on_the_masked_only_path(golden, tmp_path):
    model = MaskedLM.from_pretrained(upstream_folder(golden, tmp_path)).eval()
    real = golden["attention_mask"].bool()
    labels = golden["labels"][real]
    masked_idx = (labels != -100).nonzero().squeeze(1)
    cu = torch.cat([torch.zeros(1), real.sum(1).cumsum(0)]).int()
    args = dict(cu_seqlens=cu, max_seqlen=40, masked_idx=masked_idx, labels=labels[masked_idx])
    ids, types = (golden[k][real] for k in ("input_ids", "token_type_ids"))
    loss, _ = model(ids, token_type_ids=types, **args)
    (loss / len(masked_idx)).backward()
    # read upstream's gradients through the same renaming as its weights
    folder = upstream_folder(golden, tmp_path / "gradients", ("grad.",))
    gradients = dict(MaskedLM.from_pretrained(folder).named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name].data, atol=1e-5, rtol=1e-4, msg=name)


def test_mosaicbert_classifier_matches_upstream(golden, tmp_path):
    folder = upstream_folder(golden, tmp_path, ("mlm.", "seqcls."))
    model = SequenceClassifier.from_pretrained(folder).eval()
    assert model.n_labels == 3 and not model.new_keys
    logits = model(golden["input_ids"], golden["attention_mask"], golden["token_type_ids"])
    torch.testing.assert_close(logits, golden["seqcls_logits"], atol=1e-5, rtol=0)


def hf_config(**changes):
    shape = dict(vocab_size=97, hidden_size=36, num_hidden_layers=3, num_attention_heads=3,
                 intermediate_size=50, max_position_embeddings=33, type_vocab_size=3)
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertConfig(**{**shape, **dropout, **changes})


@pytest.mark.parametrize("lengths", [[9, 33, 1, 17], [5]])
@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification"])
def test_bert_matches_transformers_with_every_gradient(tmp_path, lengths, head):
    theirs = randomize(getattr(transformers, f"BertFor{head}")(hf_config(num_labels=4)))
    theirs.save_pretrained(tmp_path / "w")
    ids, mask = padded_batch(lengths, vocab=97)
    place = torch.arange(ids.numel()).reshape(ids.shape)
    cls = MaskedLM if head == "MaskedLM" else SequenceClassifier
    ours, inputs = cls.from_pretrained(tmp_path / "w").eval(), (ids, mask, place % 3)
    if head == "MaskedLM":
        real, labels = mask.bool(), torch.where((place % 4 == 0) & mask.bool(), ids, -100)
        loss, logits = ours(*inputs, labels=labels)
    else:
        real, labels, logits = ..., torch.arange(len(lengths)), ours(*inputs)
        loss = F.cross_entropy(logits, labels)
    expected = theirs(*inputs, labels=labels)
    torch.testing.assert_close(logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    loss.backward()
    expected.loss.backward()
    with torch.no_grad():  # their gradients by our names: through the same loader as the weights
        for p in theirs.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    theirs.save_pretrained(tmp_path / "g")
    gradients = dict(cls.from_pretrained(tmp_path / "g").named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name].data, atol=1e-5, rtol=1e-4, msg=name)


# ----------------------------------------------------------------------------- flat and padded
@pytest.mark.parametrize("position", ["alibi", "learned", "rope"])
def test_flat_equals_padded_on_either_side(position):
    model = MaskedLM(small(position=position)).eval()
    ids, cu, S = flat_batch()
    flat_logits = model(ids, cu_seqlens=cu, max_seqlen=S)
    right = padded_batch()
    left = [torch.stack([row.roll(S - n) for row, n in zip(x, LENGTHS)]) for x in right]
    for padded, mask in (right, left):
        logits = model(padded, mask)[mask.bool()]
        torch.testing.assert_close(logits, flat_logits, atol=1e-6, rtol=1e-5)


POSITIONS = [  # settings, blind to the order of a document
    (dict(position="alibi"), True), (dict(position="alibi", alibi_ratio=8.0), False),
    (dict(position="rope"), False), (dict(position="rope-alibi", alibi_ratio=8.0), False),
    (dict(position="learned"), False)]


@torch.no_grad()
@pytest.mark.parametrize(("position", "blind"), POSITIONS, ids=str)
def test_order_matters_and_only_symmetric_alibi_is_blind_to_direction(position, blind):
    """A document read from its end: MosaicBERT's hidden states are the reversed ones."""
    model = randomize(Encoder(small(**position)))
    ids, cu, S = flat_batch([12])
    swapped = ids[[0, 1, 2, 8, 4, 5, 6, 7, 3, 9, 10, 11]]
    hidden, reverse, other = (model.flat(x, cu, S) for x in (ids, ids.flip(0), swapped))
    error = (reverse - hidden.flip(0)).abs().max()
    assert (error < 1e-4) if blind else (error > 0.05), error
    assert (hidden[0] - other[0]).abs().max() > 1e-4


@pytest.mark.parametrize(("position", "_"), POSITIONS, ids=str)
def test_a_document_does_not_see_its_neighbours(position, _):
    model = Encoder(small(**position)).eval()
    ids, cu, S = flat_batch()
    packed = model.flat(ids, cu, S)
    for a, b in zip(cu[:-1].tolist(), cu[1:].tolist()):
        alone = model.flat(ids[a:b], torch.tensor([0, b - a], dtype=torch.int32), b - a)
        torch.testing.assert_close(packed[a:b], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_masked_only_equals_full_in_value_and_gradient(norm):
    ids, cu, S = flat_batch()
    idx, results = torch.tensor([1, 5, 7, 20]), []
    for masked_only in (True, False):
        torch.manual_seed(0)
        model = MaskedLM(small(norm=norm, masked_only_last_layer=masked_only, **NO_DROPOUT))
        args = dict(cu_seqlens=cu, max_seqlen=S, masked_idx=idx, labels=ids[idx])
        loss, n_correct = model(ids, **args)
        loss.backward()
        results.append((loss, n_correct, {k: p.grad for k, p in model.named_parameters()}))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_through_narrow_layers_the_masked_go_on_and_the_others_stay_as_they_were(norm):
    (ids, cu, S), idx = flat_batch(), torch.tensor([1, 5, 7, 20])
    model = MaskedLM(small(norm=norm, n_layers=3, **NO_DROPOUT)).double()
    encoder, masked, results = model.encoder, torch.zeros(len(ids), 1).index_fill(0, idx, 1), []
    for by_hand in (True, False):
        model.zero_grad()
        if by_hand:
            x = encoder.embeddings(ids, cu)
            for i, layer in enumerate(encoder.layers):
                x = torch.where((masked == 1) | (i == 0), layer(x, cu, S, None), x)
            logits = model.head(x[idx] if norm == "post" else encoder.final_norm(x[idx]))
        else:
            logits = model(ids, cu_seqlens=cu, max_seqlen=S, masked_idx=idx, narrow_layers=2)
        logits.logsumexp(1).sum().backward()
        results.append((logits, {k: p.grad for k, p in model.named_parameters()}))
    torch.testing.assert_close(*results, atol=1e-10, rtol=0)
    wide = model(ids, cu_seqlens=cu, max_seqlen=S, masked_idx=idx)
    assert not torch.allclose(wide, results[0][0], atol=1e-6)


def test_each_matmul_sees_real_tokens_and_the_last_ones_only_the_masked():
    """Rows of the linear layers in their order: nothing is padded again on the training path."""
    (ids, cu, S), idx, linear = flat_batch(), torch.tensor([2, 9, 11]), F.linear
    T, M = len(ids), len(idx)
    for masked_only, narrow, expected in [
            (True, 1, [T] * 5 + [M] * 5), (False, 1, [T] * 8 + [M] * 2),
            (True, 9, [T] + [M] * 3 + [T] + [M] * 5)]:
        model, seen = MaskedLM(small(masked_only_last_layer=masked_only)), []
        count = lambda x, *rest, seen=seen: (seen.append(len(x)), linear(x, *rest))[1]
        with patch.object(F, "linear", count):
            model(ids, cu_seqlens=cu, max_seqlen=S, masked_idx=idx, labels=ids[idx],
                  narrow_layers=narrow)
        assert seen == expected


def test_classifiers_flat_equal_padded_and_need_labels():
    ids, cu, S = flat_batch()
    padded, mask = padded_batch()
    for cls, real, n in (SequenceClassifier, ..., 4), (TokenClassifier, mask.bool(), sum(LENGTHS)):
        model = cls(small(), 3).eval()
        flat = model(ids, cu_seqlens=cu, max_seqlen=S)
        assert flat.shape == (n, 3) and flat.dtype == torch.float32
        torch.testing.assert_close(flat, model(padded, mask)[real], atol=1e-6, rtol=1e-5)
        with pytest.raises(ValueError, match="n_labels"):
            cls(small(), 0)


# ----------------------------------------------------------------------------- long, empty, odd
@pytest.mark.parametrize("mode", ["fp32", "autocast", "bf16"])
def test_loss_and_gradients_are_finite_on_adversarial_inputs(mode):
    """One document of 8,192, though configs say 128, among 500 of 3, length-1 and empty ones."""
    torch.manual_seed(0)
    model = MaskedLM(small(n_layers=1, n_heads=1))
    model = model.bfloat16() if mode == "bf16" else model
    ids, cu, S = flat_batch([3] * 250 + [8_192, 1, 0, 1] + [3] * 250)
    idx = torch.arange(0, len(ids), 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        loss, _ = model(ids, cu_seqlens=cu, max_seqlen=S, masked_idx=idx, labels=ids[idx])
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_row_of_padding_gives_finite_output():
    ids, mask = padded_batch()
    mask[1] = 0
    hidden = Encoder(small())(ids, mask)
    assert torch.isfinite(hidden).all() and not hidden[1].any()
    model = SequenceClassifier(small(), 3)
    out = model(ids, mask)
    out.sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(x).all() for x in (out, *grads))


def test_inputs_that_cannot_be_encoded_are_refused_with_a_sentence():
    (ids, mask), model = padded_batch(), Encoder(small())
    holed = mask.clone()
    holed[2, 4] = 0
    for wrong, sentence in ((holed, "hole"), (torch.zeros_like(mask), "hides every token")):
        with pytest.raises(ValueError, match=sentence):
            model(ids, wrong)
    with pytest.raises(ValueError, match="learned positions"):
        Encoder(small(position="learned", max_positions=11)).flat(*flat_batch())


# ----------------------------------------------------------------------------- switches
def output(seed=0, train=False, **changes):
    torch.manual_seed(seed)
    model = randomize(Encoder(small(**changes))).train(train)
    torch.manual_seed(seed)
    return model.flat(*flat_batch())


@torch.no_grad()
def test_pre_norm_is_torchs():
    cfg = small(norm="pre", mlp="gelu", position="learned", max_positions=12)
    model = randomize(Encoder(cfg))
    names = {"self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention_out.",
             "linear1.": "mlp.inp.", "linear2.": "mlp.out.", "norm1.": "attention_norm.",
             "norm2.": "mlp_norm."}
    ids, cu = torch.randint(5, 101, (12,)), torch.tensor([0, 12], dtype=torch.int32)
    x = model.embeddings(ids, cu, None)[None]
    for layer in model.layers:
        how = dict(activation=F.gelu, layer_norm_eps=1e-12, batch_first=True, norm_first=True)
        theirs = torch.nn.TransformerEncoderLayer(32, 2, 48, 0.0, **how)
        own = dict(layer.named_parameters())
        ends = "weight", "bias"
        theirs.load_state_dict({a + end: own[b + end] for a, b in names.items() for end in ends})
        x = theirs.eval()(x)
    expected = F.layer_norm(x[0], (32,), model.final_norm.weight, model.final_norm.bias, 1e-12)
    torch.testing.assert_close(model.flat(ids, cu, 12), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mlp", ["geglu", "gelu"])
def test_weights_begin_as_berts(mlp):
    torch.manual_seed(0)
    cfg = small(vocab_size=500, d_model=64, d_ff=96, mlp=mlp, position="learned")
    for model in (MaskedLM(cfg), SequenceClassifier(cfg, 9)):
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                assert (p == float("norm.weight" in name)).all(), name
            else:
                assert p.std().item() == pytest.approx(0.02, rel=0.15), name


def test_dropout_keeps_the_mean():
    for p in (0.1, 0.4):
        torch.manual_seed(0)
        y = Encoder(small(embedding_dropout=p)).embeddings.dropout(torch.ones(200_000))
        assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.01)
        assert y.max().item() == pytest.approx(1 / (1 - p), rel=1e-3)


@pytest.mark.parametrize("place", NO_DROPOUT)
def test_dropout_switch(place):
    still = output(**NO_DROPOUT)
    torch.testing.assert_close(output(train=True, **NO_DROPOUT), still)
    assert (output(train=True, **{**NO_DROPOUT, place: 0.4}) - still).abs().max() > 1e-3
    torch.testing.assert_close(output(**{**NO_DROPOUT, place: 0.4}), still)


def test_mlp_dropout_sits_where_upstream_has_it():
    """geglu: before the last projection, which mixes its zeros; gelu: after it, where they stay."""
    x = torch.randn(50, 32)
    torch.manual_seed(0)
    gated = Encoder(small(mlp_dropout=0.5)).layers[0].mlp(x)
    plain = Encoder(small(mlp="gelu", mlp_dropout=0.5)).layers[0].mlp(x)
    assert (gated == 0).float().mean() < 0.01 and 0.4 < (plain == 0).float().mean() < 0.6


def test_classifier_dropout_switch():
    ids, cu, S = flat_batch()
    for p, same in ((0.0, True), (0.5, False)):
        torch.manual_seed(0)
        model = SequenceClassifier(small(**NO_DROPOUT, classifier_dropout=p), 8)
        a, b = (model(ids, cu_seqlens=cu, max_seqlen=S) for _ in range(2))
        assert torch.equal(a, b) is same


@pytest.mark.parametrize(("dropout", "now"), [(0.1, "auto"), (0.0, "cpu")])
def test_attention_of_a_config_of_an_earlier_run_is_renamed(dropout, now):
    assert EncoderConfig(attention="reference", attention_dropout=dropout).attention == now


def test_activation_checkpointing_recomputes_and_changes_nothing():
    ids, cu, S = flat_batch()
    grads, calls = [], []
    for on in (False, True):
        torch.manual_seed(0)
        model = MaskedLM(small(activation_checkpointing=on))
        model.encoder.layers[0].mlp.register_forward_hook(forward := Mock(return_value=None))
        torch.manual_seed(1)
        idx = torch.tensor([3, 8])
        loss, _ = model(ids, cu_seqlens=cu, max_seqlen=S, masked_idx=idx, labels=ids[idx])
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
        calls.append(forward.call_count)
    assert calls == [1, 2]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("changes", "sentence"), [
    (dict(d_model=33), "not a multiple of n_heads"),
    (dict(attention_dropout=0.1, attention="triton"), "leave attention at auto"),
    (dict(mlp="swiglu"), "choose from geglu, gelu"), (dict(mlp_dropout=1.0), "must be in"),
    (dict(n_layers=0), "at least 1"), (dict(position="learned", max_positions=0), "at least 1"),
    (dict(alibi_ratio=0.0), "alibi_ratio is 0.0"), (dict(rope_base=0.0), "rope_base is 0.0"),
    (dict(position="rope", d_model=66, n_heads=2), "pairs of columns"),
])
def test_invalid_combinations_are_refused_with_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Encoder(small(**changes))


def test_low_precision_layernorm_runs_in_the_autocast_dtype_and_is_near_fp32():
    x = torch.randn(500, 64) * 3 + 1
    exact = F.layer_norm(x.double(), (64,))
    errors = {}
    for low in (True, False):
        norm = Encoder(small(d_model=64, low_precision_norm=low)).embeddings.norm
        torch.testing.assert_close(norm(x).double(), exact, atol=1e-5, rtol=1e-5)  # no autocast
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(x)
        assert y.dtype == (torch.bfloat16 if low else torch.float32)
        errors[low] = (y.double() - exact).abs().max().item()
    # bf16 keeps 8 bits: values up to ~4 are off by at most a few 2^-7; fp32 by almost nothing
    assert errors[False] < 1e-5 < errors[True] < 0.04


# ----------------------------------------------------------------------------- loading and saving
def test_saved_and_loaded_is_bit_for_bit_the_same(tmp_path):
    untied, bert = dict(tie_head=False, norm="pre"), dict(position="learned", mlp="gelu")
    for i, changes in enumerate([{}, untied, bert]):
        model = randomize(MaskedLM(small(**changes)))
        model.save_pretrained(tmp_path / str(i))
        again = MaskedLM.from_pretrained(tmp_path / str(i))
        assert again.cfg == model.cfg and not again.new_keys
        for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
            assert torch.equal(a, b), name
    MaskedLM(small(attention="triton")).save_pretrained(tmp_path)  # as trained on CUDA
    assert MaskedLM.from_pretrained(tmp_path).cfg.attention == "auto"


def test_encoder_and_heads_load_from_a_masked_lm_checkpoint(tmp_path):
    model = randomize(MaskedLM(small()))
    model.save_pretrained(tmp_path)
    ids, mask = padded_batch()
    expected = model.encoder(ids, mask)
    torch.testing.assert_close(Encoder.from_pretrained(tmp_path).eval()(ids, mask), expected)
    classifier = SequenceClassifier.from_pretrained(tmp_path, 2, classifier_dropout=0.3).eval()
    torch.testing.assert_close(classifier.encoder(ids, mask), expected)
    assert {k.split(".")[0] for k in classifier.new_keys} == {"pooler", "classifier"}
    assert classifier.cfg.classifier_dropout == 0.3
    classifier.save_pretrained(tmp_path / "classifier")
    again = SequenceClassifier.from_pretrained(tmp_path / "classifier").eval()
    torch.testing.assert_close(again(ids, mask), classifier(ids, mask))
    assert TokenClassifier.from_pretrained(tmp_path, n_labels=7).n_labels == 7
    Encoder.from_pretrained(tmp_path).save_pretrained(tmp_path / "encoder")
    again = Encoder.from_pretrained(tmp_path / "encoder").eval()
    torch.testing.assert_close(again(ids, mask), expected)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"layer_norm_eps": 1e-3}])
def test_pytorch_bin_and_tensorflow_names_load(tmp_path, changes):
    """bert-base-uncased: LayerNorm gamma and beta, a pooler and next-sentence weights. An untied
    decoder and another epsilon are kept."""
    hf = randomize(BertForMaskedLM(hf_config(**changes)))
    hf.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in state.items()}
    old = {k.replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in old.items()}
    old["bert.embeddings.position_ids"] = torch.arange(33)[None]
    for name in "cls.seq_relationship.weight", "bert.pooler.dense.weight", "bert.pooler.dense.bias":
        old[name] = torch.zeros(3)
    torch.save(old, tmp_path / "pytorch_model.bin")
    ids, mask = padded_batch(vocab=97)
    ours, theirs = MaskedLM.from_pretrained(tmp_path).eval()(ids, mask), hf(ids, mask).logits
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-5, rtol=1e-5)


def test_damaged_weights_are_one_line_naming_the_file(tmp_path):
    MaskedLM(small()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"^.*model\.safetensors is damaged.*$"):
        MaskedLM.from_pretrained(tmp_path)
    file.unlink()
    torch.save({"x": Path("/")}, tmp_path / "pytorch_model.bin")  # a pickle that holds no weights
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged"):
        MaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(("stated", "meant"), [(None, 0.25), (0.0, 0.0), (0.5, 0.5)])
def test_a_berts_classifier_dropout_is_its_hidden_one_unless_stated(tmp_path, stated, meant):
    config = hf_config(hidden_dropout_prob=0.25, classifier_dropout=stated)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    assert SequenceClassifier.from_pretrained(tmp_path, n_labels=2).cfg.classifier_dropout == meant


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.pop("encoder.layers.1.mlp.out.bias"), "missing: encoder.layers.1.mlp.out.b"),
    (lambda w: w.pop("head.dense.weight"), "missing: head.dense.weight"),
    (lambda w: w.update(extra=torch.zeros(1)), "unexpected: extra"),
    (lambda w: w.update({"head.norm.weight": torch.zeros(3)}),
     r"head.norm.weight: .*\[3\].* from checkpoint, .* current model is .*\[32\]"),
])
def test_weights_that_do_not_fit_are_named_in_one_line(tmp_path, change, message):
    MaskedLM(small()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"^.*{message}.*$"):
        MaskedLM.from_pretrained(tmp_path)


def test_a_hub_name_is_looked_up_in_the_hubs_cache(tmp_path, monkeypatch):
    """What a login node has fetched is found on a node without network."""
    model = MaskedLM(small())
    cached = tmp_path / "models--acme--encoder"
    model.save_pretrained(cached / "snapshots/0123abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = MaskedLM.from_pretrained("acme/encoder")
    assert all(map(torch.equal, found.parameters(), model.parameters()))


def test_missing_folders_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no-such/model: neither a folder here nor found on"):
        MaskedLM.from_pretrained("no-such/model")
    with pytest.raises(ValueError, match=r"config\.json"):
        MaskedLM.from_pretrained(tmp_path / "nothing")
    (tmp_path / "weights").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "weights/model.safetensors")
    for folder, config, message in (
        (tmp_path, "{", r"config\.json cannot be read"),
        (tmp_path, '{"model_type": "nanomosaicbert"}', r"no model\.safetensors"),
        (tmp_path / "weights", '{"model_type": "gpt2"}', "gpt2"),
        (tmp_path / "weights", '{"vocab_size": 9}', r"config\.json has no 'num_hidden_layers'")):
        (folder / "config.json").write_text(config)
        with pytest.raises(ValueError, match=message):
            MaskedLM.from_pretrained(folder)


@pytest.mark.parametrize(("dtype", "trained", "taught"), [
    (torch.float32, "", False), (torch.bfloat16, "", False), (torch.float32, "decoder.bias", False),
    (torch.float32, "", True), (torch.bfloat16, "", True)])
def test_the_fused_head_has_the_gradients_of_the_plain_one(dtype, trained, taught):
    """Loss, hits and every gradient of head.loss against decoder and cross entropy, scaled; though
    nothing but `trained` may want one. Taught: half of the target is another's softmax."""
    torch.manual_seed(0)
    model = MaskedLM(small(vocab_size=128, n_layers=1)).train()
    torch.nn.init.normal_(model.head.decoder.weight)
    x, labels = torch.randn(20, 32), torch.randint(128, (20,))
    theirs, label = 3 * torch.randn(20, 128), F.one_hot(labels, 128)
    target = (label + theirs.softmax(1)) / 2 if taught else label.float()
    for name, p in model.head.named_parameters():
        p.requires_grad_(name.startswith(trained))
    wanted = [p for p in model.head.parameters() if p.requires_grad]

    def gradients(loss_of):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            loss, n_correct = loss_of()
        return [loss.detach(), n_correct, *torch.autograd.grad(loss / 7, wanted)]

    kernels.masked_cross_entropy(theirs, labels, keep_gradient=True)
    fused = gradients(lambda: model.head.loss(x, labels, theirs if taught else None))

    def plain_loss():
        logits = model.head(x).float()
        n_correct = (logits.argmax(-1) == labels).sum().float()
        # the loss is that of the labels in both
        about_labels = F.cross_entropy(logits, labels, reduction="sum")
        mixed = F.cross_entropy(logits, target, reduction="sum")
        return mixed + (about_labels - mixed).detach(), n_correct

    plain = gradients(plain_loss)
    for a, b in zip(fused, plain):
        assert (a - b).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * b.norm()


def test_an_empty_document_has_no_part_in_its_neighbours_gradient():
    torch.manual_seed(0)
    model = SequenceClassifier(small(vocab_size=128), 2).eval()
    ids, grads = torch.randint(5, 128, (5,)), []
    for cu in ([0, 4, 5], [0, 4, 5, 5], [0, 0, 4, 5]):
        logits = model(ids, cu_seqlens=torch.tensor(cu, dtype=torch.int32), max_seqlen=4)
        real = torch.tensor(cu).diff() > 0
        word, loss = model.encoder.embeddings.word.weight, logits[real].square().sum()
        grads.append(torch.autograd.grad(loss, word)[0])
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])
