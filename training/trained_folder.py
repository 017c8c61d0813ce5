"""What a folder holds that a user names: a run, an adapter or a whole model. From there to the network and its classes."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from common.errors import HubUnreachable, NotOnHub, UserError
from common.files import read_json
from lora import PeftModel
from lora.adapter import PREFIX, read_adapter
from lora.config import CONFIG_FILE
from model import (
    EMBEDDED,
    DistilBertForSequenceClassification,
    config_sha256,
    load_pretrained,
    read_max_length,
    read_model_config,
    read_tokenizer,
    weights_sha256,
)
from training.run_folder import require_ended

LABELS_FILE = "label_names.json"
PARTS = ("adapter", "model")  # of a run, each of which can be labelled with
# where a tensor's name in transformers begins -> the kind of model
KINDS = {"bert": "a BERT", "roberta": "a RoBERTa", "electra": "an ELECTRA", "albert": "an ALBERT", "deberta": "a DeBERTa"}


@dataclass(frozen=True)
class Trained:
    model: DistilBertForSequenceClassification  # in float32, with the adapter merged into it
    tokenizer: Tokenizer
    classes: list[Any]  # their names, or numbers
    multi_label: bool  # whether several classes can hold at once
    max_length: int  # tokens
    folder: Path  # of the adapter or model


def read_trained(folder: Path, base: str | None) -> Trained:
    """What is in a folder; `base` replaces the base model that an adapter names. Raises UserError as `load_classifier`."""
    require_ended(folder)
    if not any((folder / name).is_file() for name in ("config.json", CONFIG_FILE)):  # of a run that holds one
        folder = next((folder / part for part in PARTS if (folder / part).is_dir()), folder)
    is_whole = (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file()
    if is_whole:
        if base is not None:
            raise UserError(f"{folder} is a whole model and needs no base model. Leave out --model")
        name, revision = str(folder), None
        model, tokenizer = load_pretrained(name, None)
        num_labels = model.config.num_labels
    else:
        config, tensors = read_adapter(folder)
        num_labels = count_classes(folder, tensors)
        named, revision = (config.base_model_name_or_path, config.revision) if base is None else (base, None)
        if named is None:
            raise UserError(f"{folder} does not name its base model. Pass it with --model")
        name = named
        model, tokenizer = load_base(folder, name, revision, num_labels, chosen=base is not None)
        if (folder / "tokenizer.json").is_file():
            tokenizer = read_tokenizer(folder / "tokenizer.json", model.config)
        PeftModel.from_pretrained(model, folder).merge_and_unload()
    classes, multi_label = read_classes(folder, name, revision, num_labels, is_whole)
    longest = model.config.max_position_embeddings
    return Trained(model, tokenizer, classes, multi_label, min(read_max_length(folder) or longest, longest), folder)


def run_results(folder: Path) -> dict:
    """The results.json of the run that `folder` is, or is a part of. Empty if there is none."""
    path = (folder.parent if folder.name in PARTS else folder) / "results.json"
    return read_json(path) if path.is_file() else {}


def load_base(
    folder: Path, name: str, revision: str | None, num_labels: int, chosen: bool
) -> tuple[DistilBertForSequenceClassification, Tokenizer]:
    """The base model of the adapter in `folder`: the one that the adapter names, or another that the user has `chosen`.

    Raises UserError if it cannot be found, or if its weights or config.json are not those that the run's results.json says it
    was trained on. If the user chose it, this is only reported.
    """
    try:
        loaded = load_pretrained(name, num_labels, revision)
    except (NotOnHub, HubUnreachable) as error:
        if chosen:
            raise
        reason = "the hub cannot be reached" if isinstance(error, HubUnreachable) else "the hub has no such model"
        message = f"{folder / CONFIG_FILE} names the base model {name!r}, which is not a folder here, and {reason}"
        raise type(error)(f"{message}. Pass the base model with --model") from error
    if name != EMBEDDED and os.path.isdir(name):
        recorded = run_results(folder).get("sha256")
        now = {"weights": weights_sha256(name), "config": config_sha256(loaded[0].config)}
        if isinstance(recorded, dict) and (changed := [what for what in now if recorded.get(what, now[what]) != now[what]]):
            message = f"{name} is not what {folder.parent} was trained on: the sha256 of its {' and '.join(changed)} differs"
            if not chosen:
                raise UserError(f"{message}. Restore it, or pass --model {name} to use it as it is")
            print(message, file=sys.stderr)
    return loaded


def count_classes(folder: Path, tensors: dict[str, Tensor]) -> int:
    """The classes in an adapter's head. Raises UserError for an adapter of another kind of model or for another task."""
    for key in sorted(name.removeprefix(PREFIX) for name in tensors):
        part = key.partition(".")[0]
        if part not in ("distilbert", "pre_classifier", "classifier"):
            remedy = "Only adapters of DistilBERT are supported, and of BERT if they were trained here"
            raise UserError(f"{folder}: its base is {KINDS.get(part, 'another kind of model')}, with {key}. {remedy}")
    head = tensors.get(f"{PREFIX}classifier.weight")
    if head is None or head.dim() != 2 or not head.numel():
        raise UserError(f"{folder} has no classifier head: it was trained for another task")
    return len(head)


def read_classes(folder: Path, base: str, revision: str | None, num_labels: int, is_whole: bool) -> tuple[list[Any], bool]:
    """The classes, and whether several can hold at once. They come from label_names.json, if the folder has one, or else from
    the config.json of the (base) model, as in transformers.

    They are names; or whole numbers or booleans, if `fit` got such labels.
    """
    if (path := folder / LABELS_FILE).exists():
        classes = read_json(path, list)
        kinds = {type(label) for label in classes}
        if len(classes) != num_labels or kinds not in ({str}, {int}, {bool}) or len(set(classes)) < num_labels:
            raise UserError(f"{path} must list {num_labels} different names, or numbers, one for each class. Mend it")
        return classes, False
    config, source = read_model_config(base, revision), f"{base}/config.json"
    kind = config.get("problem_type")
    if kind not in (None, "single_label_classification", "multi_label_classification"):
        raise UserError(f"{source} has the problem_type {kind!r}: it has no classes. Use it with transformers")
    default = {str(i): f"LABEL_{i}" for i in range(num_labels)}  # transformers does not write these names
    by_number = default if config.get("id2label") is None else config["id2label"]
    if not isinstance(by_number, dict) or sorted(by_number) != sorted(map(str, range(len(by_number)))):
        raise UserError(f"{source}: id2label must name the classes 0, 1, 2 ... Mend it")
    if len(by_number) != num_labels:
        if is_whole:
            raise UserError(f"{source} names {len(by_number)} classes, but the head is for {num_labels}. Mend id2label")
        by_number = default  # those of the base model are of another task
    names = [str(by_number[str(i)]) for i in range(num_labels)]
    if len(set(names)) < num_labels:
        raise UserError(f"{source}: id2label gives two classes the same name. Mend it")
    return names, kind == "multi_label_classification" or num_labels == 1
