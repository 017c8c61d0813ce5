"""A trained classifier, from the folder that a run or peft left to labels for texts."""

import itertools
from collections.abc import Iterable, Iterator
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


def load_classifier(
    folder: Path, model: str | None, device_name: str, max_length: int
) -> tuple[ModelRunner, Tokenizer, list[str]]:
    """A classifier, its tokenizer, and the label names: the base model that the adapter names (or `model`) with the adapter
    merged in, or a whole model, such as --method full leaves.

    Raises UserError if the folder holds neither, or an adapter for another base model.
    """
    folder = next((folder / name for name in ("adapter", "model") if (folder / name).is_dir()), folder)
    if (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file():
        if model is not None:
            raise UserError(f"{folder} is a whole model, which wants no base model: leave out --model")
        names = label_names(folder)
        base, tokenizer = load_pretrained(str(folder), len(names))
        return ready(base, device_name, max_length), tokenizer, names
    config, tensors = read_adapter(folder)
    name = config.base_model_name_or_path if model is None else model
    if name is None:
        raise UserError(f"{folder} does not say which model it was trained on: name it with --model")
    head = tensors.get(f"{PREFIX}classifier.weight")
    if head is None or head.dim() != 2:
        raise UserError(f"{folder} holds no classifier: it was trained for something else")
    names = [f"LABEL_{i}" for i in range(len(head))]  # as transformers calls them
    if (path := folder / "label_names.json").exists():
        names = read_json(path, list)
        if len(names) != len(head) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path} does not name the adapter's {len(head)} classes: write a list of as many strings")

    base, tokenizer = load_pretrained(name, len(head), config.revision if model is None else None)
    PeftModel.from_pretrained(base, folder).merge_and_unload()  # in float32; from here on LoRA costs nothing
    return ready(base, device_name, max_length), tokenizer, names


def label_names(model: Path) -> list[str]:
    """The classes' names as a whole model's config.json has them."""
    path = model / "config.json"
    names = read_json(path).get("id2label")
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
        raise UserError(f"{path} names no classes (id2label): it is a base model, and wants an adapter or training")
    return [str(names[str(i)]) for i in range(len(names))]


def ready(model: DistilBertForSequenceClassification, device_name: str, max_length: int) -> ModelRunner:
    if not 3 <= max_length <= (longest := model.config.max_position_embeddings):
        raise UserError(f"--max-length is {max_length}; this model reads from 3 to {longest} tokens")
    device = choose_device(device_name)
    dtype = choose_dtype("auto", device)
    cast_frozen_matrices(model.requires_grad_(False).to(device), dtype)
    return ModelRunner(model, device, dtype)


def label(
    forward: ModelRunner, tokenizer: Tokenizer, names: list[str], texts: Iterable[str], max_length: int
) -> Iterator[dict[str, Any]]:
    """{"text", "label", "score", "scores"} for each text, in order, with CHUNK of them in memory at a time."""
    rest = iter(texts)
    while chunk := list(itertools.islice(rest, CHUNK)):
        tokenized = tokenize(tokenizer, chunk, max_length)
        batches = evaluation_batches(tokenized.lengths, forward.tokens)
        logits = np.empty((len(chunk), len(names)), dtype=np.float32)
        logits[np.concatenate(batches)] = compute_logits(forward, tokenized, batches)  # back in the order of the texts
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))  # softmax
        scores /= scores.sum(axis=1, keepdims=True)
        for text, row in zip(chunk, scores.astype(float), strict=True):
            best = int(row.argmax())
            yield {"text": text, "label": names[best], "score": row[best], "scores": dict(zip(names, row, strict=True))}
