"""A trained classifier: from a run folder or an adapter folder to labels for new texts."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from common.errors import UserError
from common.files import read_json
from data import evaluation_batches, tokenize
from lora import PeftModel
from lora.adapter import PREFIX, read_adapter
from lora.config import CONFIG_FILE
from model import DistilBertForSequenceClassification, load_pretrained
from training.device import cast_frozen_matrices, choose_device, choose_dtype
from training.evaluation import ModelRunner, compute_logits

CHUNK = 1024  # texts in memory at a time


@dataclass(frozen=True)
class Classifier:
    runner: ModelRunner
    tokenizer: Tokenizer
    label_names: list[str]
    max_length: int

    def label(self, texts: Iterable[str]) -> Iterator[dict[str, Any]]:
        """{"text", "label", "score", "scores"} for each text, in order. Takes CHUNK texts at a time."""
        remaining = iter(texts)
        while chunk := list(itertools.islice(remaining, CHUNK)):
            tokenized = tokenize(self.tokenizer, chunk, self.max_length)
            batches = evaluation_batches(tokenized.lengths, self.runner.tokens)
            logits = np.empty((len(chunk), len(self.label_names)), dtype=np.float32)
            logits[np.concatenate(batches)] = compute_logits(self.runner, tokenized, batches)  # back in the order of the texts
            scores = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores /= scores.sum(axis=1, keepdims=True)  # softmax
            for text, row in zip(chunk, scores.astype(float), strict=True):
                predicted = int(row.argmax())
                by_name = dict(zip(self.label_names, row, strict=True))
                yield {"text": text, "label": self.label_names[predicted], "score": row[predicted], "scores": by_name}


def load_classifier(folder: Path, model: str | None = None, device: str = "auto", max_length: int = 256) -> Classifier:
    """Load a run folder, an adapter folder (ours or peft's) or a whole model, as `--method full` writes it.

    The adapter is merged into the base model that it names, or into `model`. Raises UserError if the folder holds neither
    adapter nor model, or an adapter of another base model.
    """
    folder = next((folder / name for name in ("adapter", "model") if (folder / name).is_dir()), folder)
    if (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file():
        if model is not None:
            raise UserError(f"{folder} is a whole model and needs no base model. Leave out --model")
        label_names = read_label_names(folder)
        classifier, tokenizer = load_pretrained(str(folder), len(label_names))
        return Classifier(make_runner(classifier, device, max_length), tokenizer, label_names, max_length)
    config, tensors = read_adapter(folder)
    name = config.base_model_name_or_path if model is None else model
    if name is None:
        raise UserError(f"{folder} does not name its base model. Pass it with --model")
    head = tensors.get(f"{PREFIX}classifier.weight")
    if head is None or head.dim() != 2:
        raise UserError(f"{folder} has no classifier head: it was trained for another task")
    label_names = [f"LABEL_{i}" for i in range(len(head))]  # the default names in transformers
    if (path := folder / "label_names.json").exists():
        label_names = read_json(path, list)
        if len(label_names) != len(head) or not all(isinstance(name, str) for name in label_names):
            raise UserError(f"{path} must be a list of {len(head)} strings, one name for each class of the adapter")

    classifier, tokenizer = load_pretrained(name, len(head), config.revision if model is None else None)
    PeftModel.from_pretrained(classifier, folder).merge_and_unload()  # in float32
    return Classifier(make_runner(classifier, device, max_length), tokenizer, label_names, max_length)


def read_label_names(model: Path) -> list[str]:
    """The names of the classes in a whole model's config.json."""
    path = model / "config.json"
    names = read_json(path).get("id2label")
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
        raise UserError(f"{path} names no classes (id2label), so this is a base model. Train it, or pass an adapter folder")
    return [str(names[str(i)]) for i in range(len(names))]


def make_runner(model: DistilBertForSequenceClassification, device_name: str, max_length: int) -> ModelRunner:
    if not 3 <= max_length <= (longest := model.config.max_position_embeddings):
        raise UserError(f"--max-length is {max_length}. For this model it must be between 3 and {longest}")
    device = choose_device(device_name)
    dtype, _ = choose_dtype("auto", device)
    cast_frozen_matrices(model.requires_grad_(False).to(device), dtype)
    return ModelRunner(model, device, dtype)
