"""Hand a checkpoint to the Hugging Face world: transformers, sentence-transformers, ONNX.

    python -m export.huggingface runs/mosaic-base --out hf/mosaic-base              # any shape; code travels with the weights
    python -m export.huggingface runs/bert-base --out hf/bert-base --bert           # BERT's shape: BertForMaskedLM, no code
    python -m export.huggingface runs/mosaic-base --out hf/mosaic-base --onnx       # also onnx/model.onnx, any batch and length
    python -m export.huggingface path/to/mosaic-bert --out hf/again                 # official MosaicBERT weights, without Triton

    AutoTokenizer.from_pretrained("hf/mosaic-base", trust_remote_code=True)
    AutoModelForMaskedLM.from_pretrained("hf/mosaic-base", trust_remote_code=True)   # AutoModel, ...Classification too
    SentenceTransformer("hf/mosaic-base", trust_remote_code=True)                    # the mean of the hidden states

The folder holds weights, a fast tokenizer, a model card with the run's facts, and modeling_nanomosaicbert.py: the
classes of model.py, copied, behind the transformers interface of modeling_hf.py. Our own scripts read the folder as
they read a checkpoint. Seconds, and a minute more for --onnx (which needs the packages onnx and onnxscript).
"""

import ast
import base64
import json
import logging
import re
import shutil
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from torch import Tensor

from corpus.tokenizer import BYTE_CHARS, SPECIALS, Tokenizer
from machine import read_command_line
from model import MaskedLM, Pretrained, SequenceClassifier, TokenClassifier, find_folder
from recipes import run_config
from records import read_json, read_jsonl

# our class -> the end of transformers' name for it
HEADS = {
    MaskedLM: "ForMaskedLM",
    SequenceClassifier: "ForSequenceClassification",
    TokenClassifier: "ForTokenClassification",
}

PIPELINES = {MaskedLM: "fill-mask", SequenceClassifier: "text-classification", TokenClassifier: "token-classification"}


@dataclass
class Config:
    """Hand a checkpoint to the Hugging Face world."""

    run: tyro.conf.Positional[str]  # run folder (its latest checkpoint), checkpoint, MosaicBERT or BERT folder or name
    out: str  # folder to write; must not exist
    bert: bool = False  # as transformers' own BERT, without code; only for BERT's shape
    onnx: bool = False  # also write onnx/model.onnx
    tokenizer: str = ""  # folder or tokenizer.json; default: the checkpoint's own
    max_length: int = 0  # where the tokenizer cuts when asked to; 0: the length trained at, or the learned positions


# ----------------------------------------------------------------------------- the code that travels

# methods that stay here: they train, load, or take flat batches
LEFT_OUT = {
    "Pretrained": {"n_params", "save_pretrained", "from_pretrained"},
    "Encoder": {"forward"},
    "MlmHead": {"loss"},
}


def definitions(source: str) -> dict[str, ast.stmt]:
    """Name -> the top-level statement of `source` that defines or imports it."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node for t in targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
    return found


def source_of(node: ast.stmt, lines: list[str]) -> str:
    """The text of a top-level statement, decorators included, without the methods LEFT_OUT."""
    dropped = set()
    for method in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(method, ast.FunctionDef) and method.name in LEFT_OUT.get(node.name, ()):
            first = min([method.lineno, *(d.lineno for d in method.decorator_list)])
            dropped |= set(range(first, method.end_lineno + 1))
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
    kept = [lines[i - 1] for i in range(first, node.end_lineno + 1) if i not in dropped]
    return "\n".join(kept).rstrip()


def modeling_source(model_py: str, kernels_py: str, wrapper_py: str) -> str:
    """The text of modeling_nanomosaicbert.py.

    It is wrapper_py (modeling_hf.py) with its imports from model.py and kernels.py replaced by the source of what they
    name and of all that uses in turn. What the wrapper defines itself takes the place of ours of that name.
    ValueError when something needed exists only for Triton.
    """
    files = {"kernels": kernels_py, "model": model_py}
    known = {file: definitions(source) for file, source in files.items()}
    wrapper = ast.parse(wrapper_py)
    replaced = {name for name, n in definitions(wrapper_py).items() if not isinstance(n, ast.Import | ast.ImportFrom)}
    plain, named = set(), defaultdict(set)  # `import x as y` lines; module -> names imported from it
    wanted, pieces = [], {}

    def take_import(node: ast.Import | ast.ImportFrom, names: list[ast.alias]) -> None:
        if isinstance(node, ast.Import):
            plain.update(ast.unparse(ast.Import([name])) for name in names)
        elif node.module in files:
            wanted.extend((node.module, name.name) for name in names)
        else:
            named[node.module] |= {ast.unparse(name) for name in names}

    imports = [n for n in wrapper.body if isinstance(n, ast.Import | ast.ImportFrom)]
    for node in imports:
        take_import(node, node.names)
    while wanted:
        file, name = wanted.pop()
        if (file, name) in pieces or name in replaced:
            continue
        node = known[file].get(name)
        if node is None:
            raise ValueError(f"{file}.py defines no {name}, which modeling_hf.py imports")
        if isinstance(node, ast.Import | ast.ImportFrom):
            take_import(node, [a for a in node.names if (a.asname or a.name) == name])
            continue
        text = source_of(node, files[file].splitlines())
        used = {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
        if used & {"triton", "tl"} or "torch.library" in text:
            raise ValueError(f"{file}.py: {name} is no plain PyTorch; define it in modeling_hf.py")
        pieces[file, name] = (file, node.lineno, text)
        wanted += [(file, n) for n in used if n in known[file]]

    head = '"""Made by export_hf.py of nanoMosaicBERT from model.py, kernels.py and modeling_hf.py: edit those."""'
    lines = sorted(plain) + [f"from {m} import {', '.join(sorted(names))}" for m, names in sorted(named.items())]
    copied = [text for _, _, text in sorted(set(pieces.values()))]
    own = "\n".join(wrapper_py.splitlines()[imports[-1].end_lineno :]).strip()
    return "\n\n\n".join([head + "\n\n" + "\n".join(lines), *copied, own]) + "\n"


# ----------------------------------------------------------------------------- tokenizer


def fast_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The same vocabulary as a `tokenizers` tokenizer: equal ids for every text without a special token's name in it.

    A tokenizer.json is passed through. Ours is rebuilt from its ranks: byte-level BPE with every way to join two tokens
    into a third as a merge, in the order of the third's rank, which is what tiktoken does with ranks alone.
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
        if tokenizer.lowercase:  # Python's lower() knows the final sigma, Lowercase goes letter by letter
            sigma = tokenizers.Regex(r"\p{Cased}\p{Case_Ignorable}*\KΣ(?!\p{Case_Ignorable}*\p{Cased})")
            fast.normalizer = normalizers.Sequence([normalizers.Replace(sigma, "ς"), normalizers.Lowercase()])
        split = pre_tokenizers.Split(tokenizers.Regex(tokenizer.meta["pattern"]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        fast.decoder = decoders.ByteLevel()
        for special in tokenizer.meta["special_ids"]:  # " [MASK]": the token it stands for carries its own space
            mask = special == "[MASK]"
            fast.add_special_tokens([tokenizers.AddedToken(special, lstrip=mask, normalized=False, special=True)])
    if fast.encode("").ids != [tokenizer.cls_id, tokenizer.sep_id]:
        cls, sep = (fast.id_to_token(i) for i in (tokenizer.cls_id, tokenizer.sep_id))
        frame = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(cls, tokenizer.cls_id), (sep, tokenizer.sep_id)],
        )
        own = fast.post_processor  # a byte-level one trims offsets only
        fast.post_processor = processors.Sequence([own, frame]) if own else frame
    return fast


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> str:
    """tokenizer.json and tokenizer_config.json, what AutoTokenizer reads. Returns the name of its mask."""
    fast = fast_tokenizer(tokenizer)
    fast.no_truncation()
    fast.no_padding()
    fast.save(str(folder / "tokenizer.json"))
    specials = {f"{n[1:-1].lower()}_token": fast.id_to_token(tokenizer.meta["special_ids"][n]) for n in SPECIALS}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **specials,
    }
    write_json(folder / "tokenizer_config.json", config)
    return specials["mask_token"]


# ----------------------------------------------------------------------------- weights and configuration


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def label_config(model: Pretrained, config: dict) -> dict:
    """The part of config.json about a classifier's labels: as the `config` it comes from names them, or numbered."""
    n, names = getattr(model, "n_labels", 0), config.get("id2label", {})
    if not n:
        return {}
    if set(names) != {str(i) for i in range(n)}:
        names = {str(i): f"LABEL_{i}" for i in range(n)}
    kind = {"problem_type": config["problem_type"]} if config.get("problem_type") else {}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}} | kind


def write_model(model: Pretrained, tokenizer: Tokenizer, labels: dict, folder: Path) -> None:
    """config.json, model.safetensors (both readable by model.py as well) and the code."""
    model.save_pretrained(folder)
    name = "NanoMosaicBert"
    auto = {"AutoConfig": "Config", "AutoModel": "Model"} | {f"AutoModel{end}": end for end in HEADS.values()}
    extra = {
        "architectures": [name + HEADS[type(model)]],
        "auto_map": {auto_class: f"modeling_nanomosaicbert.{name}{end}" for auto_class, end in auto.items()},
        "pad_token_id": tokenizer.pad_id,
        "tie_word_embeddings": model.cfg.tie_head,
        **labels,
    }
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | extra)
    here = Path(__file__).parents[1]
    sources = [(here / f).read_text(encoding="utf-8") for f in ("model.py", "kernels.py", "export/modeling.py")]
    (folder / "modeling_nanomosaicbert.py").write_text(modeling_source(*sources), encoding="utf-8")


BERT_NAMES = {  # ours -> Hugging Face's; query, key and value, one matrix here, are three there
    r"^encoder\.embeddings\.word\.": "bert.embeddings.word_embeddings.",
    r"^encoder\.embeddings\.token_type\.": "bert.embeddings.token_type_embeddings.",
    r"^encoder\.embeddings\.position\.": "bert.embeddings.position_embeddings.",
    r"^encoder\.embeddings\.norm\.": "bert.embeddings.LayerNorm.",
    r"^encoder\.layers\.": "bert.encoder.layer.",
    r"\.attention\.qkv\.": ".attention.self.qkv.",
    r"\.attention_out\.": ".attention.output.dense.",
    r"\.attention_norm\.": ".attention.output.LayerNorm.",
    r"\.mlp\.inp\.": ".intermediate.dense.",
    r"\.mlp\.out\.": ".output.dense.",
    r"\.mlp_norm\.": ".output.LayerNorm.",
    r"^head\.dense\.": "cls.predictions.transform.dense.",
    r"^head\.norm\.": "cls.predictions.transform.LayerNorm.",
    r"^head\.decoder\.bias$": "cls.predictions.bias",
    r"^pooler\.": "bert.pooler.dense.",
}


def write_bert(model: Pretrained, tokenizer: Tokenizer, labels: dict, folder: Path) -> None:
    """config.json and model.safetensors of transformers' own BERT. ValueError for what is no BERT, naming why."""
    cfg = model.cfg
    dropouts = {cfg.embedding_dropout, cfg.output_dropout, cfg.mlp_dropout}
    required = {"position": "learned", "mlp": "gelu", "norm": "post", "bias": True, "tie_head": True}
    wrong = [f"{name} is {getattr(cfg, name)}, not {v}" for name, v in required.items() if getattr(cfg, name) != v]
    if wrong or len(dropouts) > 1:
        wrong += ["the three hidden dropouts differ"] * (len(dropouts) > 1)
        raise ValueError(f"--bert: this is no BERT ({'; '.join(wrong)}); leave the flag out")
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "head.decoder.weight":  # tied
            continue
        for pattern, replacement in BERT_NAMES.items():
            name = re.sub(pattern, replacement, name)
        parts = ("query", "key", "value") if ".qkv." in name else ("",)
        for part, piece in zip(parts, tensor.chunk(len(parts))):
            weights[name.replace("qkv", part)] = piece.contiguous()
    config = {
        "model_type": "bert",
        "architectures": ["Bert" + HEADS[type(model)]],
        "vocab_size": cfg.padded_vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "intermediate_size": cfg.d_ff,
        "hidden_act": "gelu",
        "hidden_dropout_prob": cfg.output_dropout,
        "attention_probs_dropout_prob": cfg.attention_dropout,
        "classifier_dropout": cfg.classifier_dropout,
        "max_position_embeddings": cfg.max_positions,
        "type_vocab_size": cfg.n_token_types,
        "layer_norm_eps": cfg.norm_eps,
        "pad_token_id": tokenizer.pad_id,
        **labels,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_sentence_transformer(model: Pretrained, folder: Path, max_length: int) -> None:
    """What SentenceTransformer(folder) reads: hidden states -> their mean -> unit length, as model.SentenceEmbedder."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    pooling = {"word_embedding_dimension": model.cfg.d_model, "pooling_mode_mean_tokens": True}
    write_json(folder / "1_Pooling/config.json", pooling)
    (folder / "2_Normalize").mkdir()


def write_onnx(folder: Path, remote_code: bool) -> None:
    """onnx/model.onnx of the exported model: int64 input_ids, attention_mask, token_type_ids (batch, length) ->
    logits. Weights beyond ONNX's 2 GB are put beside it."""
    import onnx
    import transformers

    end = json.loads((folder / "config.json").read_text())["architectures"][0].split("For")[1]
    auto = getattr(transformers, f"AutoModelFor{end}")
    model = auto.from_pretrained(folder, trust_remote_code=remote_code).eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
            return self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here uses
    inputs = tuple(torch.ones(2, 9, dtype=torch.long) for _ in range(3))  # one tensor used twice would be one input
    names = ["input_ids", "attention_mask", "token_type_ids"]
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    (folder / "onnx").mkdir()
    with warnings.catch_warnings(action="ignore"):  # of its own deprecated calls
        torch.onnx.export(
            Logits().eval(), inputs, folder / "onnx/model.onnx",
            input_names=names, output_names=["logits"], dynamic_shapes={n: {0: batch, 1: length} for n in names},
            dynamo=True, external_data=model.num_parameters() * 4 > 1.5e9, verbose=False,
        )  # fmt: skip
    for put in onnx.load(folder / "onnx/model.onnx", load_external_data=False).graph.input:
        if not all(axis.dim_param for axis in put.type.tensor_type.shape.dim):
            raise ValueError(f"--onnx: {put.name} has been traced with a fixed size; this model cannot be exported")


# ----------------------------------------------------------------------------- model card


def run_facts(checkpoint: Path) -> dict:
    """What a pretraining run left beside its checkpoint: {} for a checkpoint that belongs to none."""
    run = checkpoint.parent.parent
    if checkpoint.parent.name != "ckpt" or not (run / "config.json").is_file():
        return {}
    run_config(run)  # refuses a run of another version
    facts = read_json(run / "config.json") | read_json(checkpoint / "progress.json")
    lines, _ = read_jsonl(run / "log.jsonl") if (run / "log.jsonl").is_file() else ([], 0)
    facts["command"] = next((x["command"] for x in lines if x["type"] == "header"), "")
    evals = [x for x in lines if x["type"] == "eval" and x["step"] <= facts["step"]]
    return facts | {"eval": evals[-1] if evals else None}


def model_card(
    model: Pretrained, tokenizer: Tokenizer, mask: str, source: str, facts: dict, max_length: int, bert: bool
) -> str:
    """README.md of the exported folder: what it is, how it was made, how to use it, what it cannot do."""
    cfg, trust = model.cfg, "" if bert else ", trust_remote_code=True"
    end = HEADS[type(model)]
    positions = {"alibi": "ALiBi", "rope": "RoPE", "rope-alibi": "RoPE and ALiBi"}.get(cfg.position)
    rows = {
        "parameters": f"{model.n_params():,}",
        "shape": f"{cfg.n_layers} layers, {cfg.n_heads} heads, {cfg.d_model} wide, feed-forward {cfg.d_ff} ({cfg.mlp})",
        "positions": f"{positions}, no table and no limit" if positions else f"{cfg.max_positions}, learned",
        "vocabulary": f"{tokenizer.vocab_size:,} entries, {'lowercased' if tokenizer.lowercase else 'cased'}",
    }
    if facts:
        train, result = facts["train"], facts["eval"]
        at = f", step {result['step']:,}" if result and result["step"] != facts["step"] else ""
        held_out = f"{result['loss']} ({result['accuracy']:.1%} right, 15 % masked{at})" if result else "none"
        gpus, hours = f"{facts['world_size']} × {facts['device']}", facts["train_seconds"] / 3600
        folders = ", ".join(f"`{folder}`" for folder in train["data"] or ["data/c4"])
        windows = f"{train['documents']} windows of {train['seq_len']} tokens"
        rows |= {
            "data": f"{folders} (corpus {', '.join(train['corpus'])}), {windows}",
            "trained on": f"{facts['tokens']:,} tokens, {facts['step']:,} steps of {train['batch_tokens']:,}",
            "started from": train["cooldown_from"] or train["start_from"] or "random weights",
            "masking": f"{train['masking']}, {train['corruption']}",
            "held-out loss": held_out,
            "hardware": f"{gpus}, {hours:.2f} hours of training",
            "cost": f"${facts['dollars']}, at ${train['gpu_dollars_per_hour']} a GPU hour; a CPU is counted as free",
            "code": f"nanoMosaicBERT {facts['revision']}",
            "command": f"`python {facts['command']}`",
        }
    else:
        rows["source"] = f"`{source}`"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    usage = f"""from transformers import AutoModel{end}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModel{end}.from_pretrained("."{trust})"""
    code = (
        "`modeling_nanomosaicbert.py` (transformers 4 or 5) is plain PyTorch, copied from the classes that trained it. "
    )
    family = (
        "The shape is BERT's (Devlin et al. 2019)."
        if bert
        else "An encoder in the family of MosaicBERT (Portes et al. 2023); `config.json` has its ingredients."
    )
    longer = f"The tokenizer cuts at {max_length} tokens when asked to. "
    if positions:
        longer += f"{positions} accepts longer texts; how well it does there has to be measured. "
    return f"""---
library_name: transformers
pipeline_tag: {PIPELINES[type(model)]}
mask_token: "{mask}"
tags: [encoder, {"bert" if bert else "mosaicbert, alibi, sentence-transformers"}]
---

# {Path(facts.get("run", source)).name}

Made with nanoMosaicBERT. {family}

| | |
|---|---|
{table}

```python
{usage}
```

{"" if bert else code}`SentenceTransformer("."{trust})` gives the mean of the hidden states,
which nothing has trained to be near each other for like texts.

## Limits

{longer}It has seen nothing but its training data, repeats the biases of that text, and has had no safety training.
Fine-tune it before use; `fill-mask` shows what it learned, not what is true.
"""


# ----------------------------------------------------------------------------- command line


def export(cfg: Config) -> Path:
    """Write the folder whole, or nothing. ValueError, in one line, for what cannot be exported."""
    out = Path(cfg.out)
    if out.exists():
        raise ValueError(f"--out {out} exists; remove it or give another")
    checkpoint = find_folder(cfg.run)
    config = read_json(checkpoint / "config.json", "give another checkpoint")
    # an export that transformers has fine-tuned keeps the old "head"; our checkpoints have no architectures
    kind = (config.get("architectures") or [config.get("head", "BertForMaskedLM")])[0]
    head = next((c for c, end in HEADS.items() if kind == c.__name__ or kind.endswith(end)), None)
    if head is None:
        raise ValueError(f"{checkpoint}: a {kind} cannot be exported, only {', '.join(c.__name__ for c in HEADS)}")
    model = head.from_pretrained(checkpoint)
    tokenizer = Tokenizer.load(cfg.tokenizer or checkpoint)
    if tokenizer.vocab_size > model.cfg.padded_vocab_size:
        entries = f"{tokenizer.vocab_size:,} entries, the model {model.cfg.padded_vocab_size:,}"
        raise ValueError(f"the tokenizer has {entries}: it is not the one {checkpoint} was trained with")
    facts = run_facts(checkpoint)
    limit = model.cfg.max_positions
    max_length = cfg.max_length or facts.get("train", {}).get("seq_len", limit)
    if max_length < 3 or (model.cfg.position == "learned" and max_length > limit):
        raise ValueError(f"--max_length {max_length}: give 3 or more, and with learned positions at most {limit}")

    unfinished = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        (write_bert if cfg.bert else write_model)(model, tokenizer, label_config(model, config), unfinished)
        mask = write_tokenizer(tokenizer, unfinished, max_length)
        if not tokenizer.hf:
            tokenizer.save(unfinished)  # as it was trained, for our own scripts
        write_sentence_transformer(model, unfinished, max_length)
        card = model_card(model, tokenizer, mask, cfg.run, facts, max_length, cfg.bert)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        if cfg.onnx:
            if model.cfg.position == "learned" and not cfg.bert:
                raise ValueError("--onnx: learned positions need --bert; other shapes with them cannot be traced")
            write_onnx(unfinished, remote_code=not cfg.bert)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def main(args: list[str] | None = None) -> None:
    """Command line; `args` replaces sys.argv[1:] in tests."""
    cfg = read_command_line(Config, args)
    try:
        out = export(cfg)
    except (ValueError, OSError, SafetensorError) as e:
        raise SystemExit(f"error: {e}") from None
    except ImportError as e:
        raise SystemExit(f"error: --onnx needs two more packages; pip install onnx onnxscript ({e})") from None
    print(f"wrote {out}: " + ", ".join(sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())))


if __name__ == "__main__":
    main()
