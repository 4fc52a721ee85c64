"""Hand a checkpoint to the Hugging Face world: transformers, sentence-transformers, ONNX.

    python -m export.huggingface runs/mosaic-base --out hf/mosaic-base        # any shape
    python -m export.huggingface runs/bert-base --out hf/bert-base --bert     # as BertForMaskedLM
    python -m export.huggingface runs/mosaic-base --out hf/onnx --onnx        # also onnx/model.onnx
    python -m export.huggingface path/to/mosaic-bert --out hf/again           # official weights

    AutoTokenizer.from_pretrained("hf/mosaic-base", trust_remote_code=True)
    AutoModelForMaskedLM.from_pretrained("hf/mosaic-base", trust_remote_code=True)

The folder holds weights, a fast tokenizer, a model card with the facts of the run, and modeling.py
and tokenization.py for trust_remote_code; with --bert transformers' own BERT runs. Our scripts read
it as a checkpoint. Seconds; a minute for --onnx (pip install onnx onnxscript).
"""

import base64
import logging
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from torch import nn

from corpus.tokenizer import BYTE_CHARS, SPECIALS, Tokenizer
from machine import script
from model import BERT_NAMES, Encoder, MaskedLM, SequenceClassifier, TokenClassifier, find_folder
from recipes import run_config
from records import make_folder, read_json, read_jsonl, to_json, write_atomically

HEADS = {  # our class -> the ends of transformers' name for it and of Auto's, its pipeline
    MaskedLM: ("ForMaskedLM", "ForMaskedLM", "fill-mask"),
    SequenceClassifier: (*["ForSequenceClassification"] * 2, "text-classification"),
    TokenClassifier: (*["ForTokenClassification"] * 2, "token-classification"),
    Encoder: ("Model", "", "feature-extraction"),
}


@dataclass
class Config:
    run: tyro.conf.Positional[str]  # run folder, checkpoint, MosaicBERT or BERT folder or name
    out: str  # folder to write; must not exist
    bert: bool = False  # as transformers' own BERT, without code; only for BERT's shape
    onnx: bool = False  # also write onnx/model.onnx
    tokenizer: str = ""  # folder or tokenizer.json; default: the checkpoint's own


def fast_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The same vocabulary as a `tokenizers` tokenizer: equal ids for every text without the name of
    a special token in it.

    A tokenizer.json is passed through. Ours is rebuilt from its ranks: every way to join two tokens
    into a third is a merge, in the order of the third's rank, which is what tiktoken does.
    """
    if tokenizer.hf:
        fast = tokenizers.Tokenizer.from_str(tokenizer.vocabulary.decode())
    else:
        lines = (line.split() for line in tokenizer.vocabulary.splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        name = {token: "".join(BYTE_CHARS[b] for b in token) for token in ranks}
        merges = []
        for token in sorted(ranks, key=ranks.get):
            halves = ((token[:i], token[i:]) for i in range(1, len(token)))
            merges += [(name[a], name[b]) for a, b in halves if a in ranks and b in ranks]
        vocab = tokenizer.meta["special_ids"] | {name[token]: rank for token, rank in ranks.items()}
        # tiktoken looks a whole word up before it merges; so does ignore_merges
        fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
        if tokenizer.lowercase:  # Lowercase goes letter by letter, Python knows the final sigma
            sigma = r"\p{Cased}\p{Case_Ignorable}*\KΣ(?!\p{Case_Ignorable}*\p{Cased})"
            final = normalizers.Replace(tokenizers.Regex(sigma), "ς")
            fast.normalizer = normalizers.Sequence([final, normalizers.Lowercase()])
        split = pre_tokenizers.Split(tokenizers.Regex(tokenizer.meta["pattern"]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        fast.decoder = decoders.ByteLevel()
        # offsets begin at the word, not at the space before it
        fast.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
        for name in tokenizer.meta["special_ids"]:  # the token [MASK] stands for carries its space
            special = tokenizers.AddedToken(name, lstrip=name == "[MASK]", normalized=False)
            fast.add_special_tokens([special])
    if fast.encode("").ids != [tokenizer.cls_id, tokenizer.sep_id]:
        cls, sep = (fast.id_to_token(i) for i in (tokenizer.cls_id, tokenizer.sep_id))
        frame = processors.TemplateProcessing(
            single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(cls, tokenizer.cls_id), (sep, tokenizer.sep_id)])
        own = [fast.post_processor] if fast.post_processor else []  # it trims offsets only
        fast.post_processor = processors.Sequence([*own, frame])
    return fast


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> str:
    """tokenizer.json and tokenizer_config.json, what AutoTokenizer reads; of our own vocabulary
    also the files our scripts read. Returns the name of the mask."""
    fast = fast_tokenizer(tokenizer)
    fast.no_truncation()
    fast.no_padding()
    fast.save(str(folder / "tokenizer.json"))
    ids = tokenizer.meta["special_ids"]
    specials = {f"{name[1:-1].lower()}_token": fast.id_to_token(ids[name]) for name in SPECIALS}
    others = [str(t) for i, t in fast.get_added_tokens_decoder().items()
              if t.special and i not in ids.values()]
    code = {}
    if isinstance(fast.decoder, decoders.ByteLevel):  # so that lists of words get their spaces
        own = Path(__file__).with_name("tokenization.py")
        shutil.copy(own, folder / "tokenization_nanomosaicbert.py")
        name = "tokenization_nanomosaicbert.NanoMosaicBertTokenizer"
        code = {"auto_map": {"AutoTokenizer": [None, name]}}
    write_atomically(folder / "tokenizer_config.json", to_json(code | specials | {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False, "additional_special_tokens": others}))
    if not tokenizer.hf:
        tokenizer.save(folder)
    return specials["mask_token"]


def write_model(model: nn.Module, tokenizer: Tokenizer, labels: dict, folder: Path) -> None:
    """config.json, model.safetensors (both readable by model.py as well) and the code."""
    model.save_pretrained(folder)
    if isinstance(model, SequenceClassifier):  # pooler and classifier are one module there
        weights = load_file(folder / "model.safetensors")
        for end in ("weight", "bias"):
            weights[f"classifier.pooler.{end}"] = weights.pop(f"pooler.{end}")
            weights[f"classifier.out.{end}"] = weights.pop(f"classifier.{end}")
        save_file(weights, folder / "model.safetensors")
    auto = {f"AutoModel{auto}": end for end, auto, _ in HEADS.values()}
    auto |= {f"AutoModel{end}": end for end in ("ForMultipleChoice", "ForQuestionAnswering")}
    auto["AutoConfig"] = "Config"
    shutil.copy(Path(__file__).with_name("modeling.py"), folder / "modeling_nanomosaicbert.py")
    auto = {k: f"modeling_nanomosaicbert.NanoMosaicBert{end}" for k, end in auto.items()}
    write_atomically(folder / "config.json", to_json(read_json(folder / "config.json") | labels | {
        "architectures": ["NanoMosaicBert" + HEADS[type(model)][0]], "auto_map": auto,
        "pad_token_id": tokenizer.pad_id, "tie_word_embeddings": model.cfg.tie_head}))


def write_bert(model: nn.Module, tokenizer: Tokenizer, labels: dict, folder: Path) -> None:
    """config.json and model.safetensors of transformers' BERT. ValueError for what is no BERT."""
    cfg, dropout = model.cfg, model.cfg.output_dropout
    bert = dict(position="learned", mlp="gelu", norm="post", bias=True, tie_head=True,
                embedding_dropout=dropout, mlp_dropout=dropout)
    is_ = {name: getattr(cfg, name) for name in bert}
    if wrong := [f"{k} is {is_[k]}, not {v}" for k, v in bert.items() if is_[k] != v]:
        raise ValueError(f"--bert: this is no BERT ({'; '.join(wrong)}); leave the flag out")
    weights = {}
    for name, tensor in model.state_dict().items():
        name = f"encoder.{name}" if isinstance(model, Encoder) else name
        for ours, theirs in BERT_NAMES.items():
            name = name.replace(ours, theirs)
        if isinstance(model, Encoder):
            name = name.removeprefix("bert.")
        if ".Wqkv." in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3)):
                weights[name.replace("Wqkv", part)] = piece.contiguous()
        elif name != "cls.predictions.decoder.weight":  # tied
            weights[name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_atomically(folder / "config.json", to_json({
        "model_type": "bert", "architectures": ["Bert" + HEADS[type(model)][0]],
        "vocab_size": cfg.padded_vocab_size, "type_vocab_size": cfg.n_token_types,
        "hidden_size": cfg.d_model, "intermediate_size": cfg.d_ff, "hidden_act": "gelu",
        "num_hidden_layers": cfg.n_layers, "num_attention_heads": cfg.n_heads,
        "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": cfg.attention_dropout,
        "classifier_dropout": cfg.classifier_dropout, "layer_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_positions, "pad_token_id": tokenizer.pad_id, **labels}))


def write_onnx(auto: str, folder: Path, remote_code: bool) -> None:
    """onnx/model.onnx of the exported model: int64 input_ids, attention_mask, token_type_ids
    (batch, length) -> logits. Weights beyond ONNX's 2 GB are put beside it."""
    import transformers

    how = dict(trust_remote_code=remote_code, return_dict=False)
    model = getattr(transformers, auto).from_pretrained(folder, **how)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # misses torchvision, not needed here
    names = ["input_ids", "attention_mask", "token_type_ids"]
    inputs = tuple(torch.ones(2, 9, dtype=torch.long) for _ in names)  # one thrice is one input
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    (folder / "onnx").mkdir()
    with warnings.catch_warnings(action="ignore"):  # of its own deprecated calls
        torch.onnx.export(
            model.eval(), inputs, folder / "onnx/model.onnx", dynamo=True, verbose=False,
            input_names=names, output_names=["logits" if "For" in auto else "last_hidden_state"],
            dynamic_shapes=dict.fromkeys(names, sizes),
            external_data=model.num_parameters() * 4 > 1.5e9)


def run_facts(checkpoint: Path) -> dict:
    """What a pretraining run left beside its checkpoint; {} for one that belongs to no run."""
    run = checkpoint.parent.parent
    if checkpoint.parent.name != "ckpt" or not (run / "config.json").is_file():
        return {}
    run_config(run)  # refuses a run of another version
    facts = read_json(run / "config.json") | read_json(checkpoint / "progress.json")
    lines, _ = read_jsonl(run / "log.jsonl")
    facts["command"] = next((x["command"] for x in lines if x["type"] == "header"), "")
    evals = [x for x in lines if x["type"] == "eval" and x["step"] <= facts["step"]]
    return facts | {"eval": evals[-1] if evals else None}


def model_card(model: nn.Module, tokenizer: Tokenizer, source: str, facts: dict, **fields) -> str:
    """README.md of the exported folder: what the model is, how it was made, how to use it, and its
    limits. `fields`: bert, mask, max_length."""
    case = "lowercased" if tokenizer.lowercase else "cased"
    rows = {"vocabulary": f"{tokenizer.vocab_size:,} entries, {case}"}
    if facts:
        train, told = facts["train"], facts["eval"]
        data = ", ".join(f"`{folder}`" for folder in train["data"] or ["data/c4"])
        start = train["cooldown_from"] or train["start_from"] or "random weights"
        rows |= {
            "data": f"{data} (corpus {', '.join(train['corpus'])}), {train['documents']} windows "
                    f"of {train['seq_len']} tokens",
            "training": f"{facts['tokens']:,} tokens, {facts['step']:,} steps of "
                        f"{train['batch_tokens']:,}, masking {train['masking']}, from {start}",
            "held-out loss": "not measured" if not told else f"{told['loss']} (accuracy "
                f"{told['accuracy']:.1%}, 15 % masked, step {told['step']:,})",
            "cost": f"{facts['world_size']} × {facts['device']}, "
                    f"{facts['train_seconds'] / 3600:.2f} hours, ${facts['dollars']} at "
                    f"${train['gpu_dollars_per_hour']} per GPU hour (CPU time is logged at $0)",
            "command": f"`python {facts['command']}`, nanoMosaicBERT {facts['revision']}",
        }
    else:
        rows["exported from"] = f"`{source}`, by nanoMosaicBERT"
    return Path(__file__).with_name("card.md").read_text(encoding="utf-8").format(
        **fields, auto=f"AutoModel{HEADS[type(model)][1]}", pipeline=HEADS[type(model)][2],
        position=model.cfg.position, name=Path(facts.get("run", source)).name,
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        family="BERT's shape (Devlin et al. 2019)" if fields["bert"]
        else "MosaicBERT's family (Portes et al. 2023)",
        trust="" if fields["bert"] else ", trust_remote_code=True")


def export(cfg: Config) -> None:
    """Write the folder whole, or nothing. ValueError, in one line, for what cannot be exported."""
    out = Path(cfg.out)
    if out.exists():
        raise ValueError(f"--out {out} exists; remove it or give another")
    make_folder(out.parent)
    checkpoint = find_folder(cfg.run)
    config = read_json(checkpoint / "config.json", "give another checkpoint")
    # an export that transformers has fine-tuned keeps the old "head"; ours have no architectures
    kind = (config.get("architectures") or [config.get("head", "BertForMaskedLM")])[0]
    kind = kind.replace("ForPreTraining", "ForMaskedLM")  # its next-sentence head is left out
    heads = {name: head for head, (end, *_) in HEADS.items()
             for name in (head.__name__, f"Bert{end}", f"NanoMosaicBert{end}")}
    if kind not in heads:
        known = ", ".join(c.__name__ for c in HEADS)
        raise ValueError(f"{checkpoint}: {kind} cannot be exported, only {known}")
    head = heads[kind]
    model = head.from_pretrained(checkpoint)
    tokenizer = Tokenizer.load(cfg.tokenizer or checkpoint)
    if tokenizer.vocab_size > model.cfg.padded_vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size:,} entries, the model "
                         f"{model.cfg.padded_vocab_size:,}: {checkpoint} was trained with another")
    facts, labels, names = run_facts(checkpoint), {}, config.get("id2label", {})
    if isinstance(model, SequenceClassifier | TokenClassifier):
        labels = {"num_labels": model.n_labels, "problem_type": config.get("problem_type")}
        if len(names) == model.n_labels:
            label2id = {name: int(i) for i, name in names.items()}
            labels |= {"id2label": names, "label2id": label2id}
    max_length = facts.get("train", {}).get("seq_len", model.cfg.max_positions)
    unfinished = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        (write_bert if cfg.bert else write_model)(model, tokenizer, labels, unfinished)
        mask = write_tokenizer(tokenizer, unfinished, max_length)
        fields = dict(bert=cfg.bert, mask=mask, max_length=max_length)
        card = model_card(model, tokenizer, cfg.run, facts, **fields)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        if cfg.onnx:
            write_onnx(f"AutoModel{HEADS[head][1]}", unfinished, remote_code=not cfg.bert)
        unfinished.rename(out)
    except ImportError as e:
        raise ValueError(f"--onnx needs: pip install onnx onnxscript ({e})") from None
    except SafetensorError as e:  # a full disk
        raise ValueError(e) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    print(f"wrote {out}: {', '.join(files)}")


main = script(export, Config)

if __name__ == "__main__":
    main()
