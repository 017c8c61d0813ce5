"""A trained classifier: from a run folder or an adapter folder to labels for new texts."""

import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from common.errors import HubUnreachable, NotOnHub, UserError
from common.files import read_json
from data import Row, evaluation_batches, slices, tokenize
from lora import PeftModel
from lora.adapter import PREFIX, read_adapter
from lora.config import CONFIG_FILE
from model import (
    EMBEDDED,
    DistilBertForSequenceClassification,
    load_pretrained,
    read_max_length,
    read_model_config,
    read_tokenizer,
    weights_sha256,
)
from training.device import DTYPES, FLOATS, cast_frozen_matrices, choose_device, choose_dtype, dtype_name
from training.evaluation import ModelRunner, compute_logits

CHUNK, CHARACTERS = 1024, 1 << 24  # texts, and characters, in memory at a time
AGREEMENT = 0.99  # of the labels, between int8 and float32, or int8 is not chosen
PATIENCE = 0.05  # seconds to wait for the next text, before those that have come are labelled
# where a tensor's name in transformers begins -> the kind of model
KINDS = {"bert": "a BERT", "roberta": "a RoBERTa", "electra": "an ELECTRA", "albert": "an ALBERT", "deberta": "a DeBERTa"}


@dataclass(frozen=True)
class Classifier:
    runner: ModelRunner
    tokenizer: Tokenizer
    label_names: list[str]
    max_length: int
    multi_label: bool = False  # scores by the sigmoid, each class for itself, instead of the softmax
    arithmetic: str = "float32"  # and why it was chosen

    def label(self, texts: Iterable[str], threshold: float = 0.0) -> Iterator[dict[str, Any]]:
        """{"text", "label", "score", "scores"} for each text, in order. Takes CHUNK texts at a time, fewer if they are long.

        A text in which the tokenizer finds nothing, and one with a score below `threshold`, has the label "" and a "reason".
        """
        for chunk in slices(texts, CHUNK, CHARACTERS):
            tokenized = tokenize(self.tokenizer, chunk, self.max_length)
            batches = evaluation_batches(tokenized.lengths, self.runner.tokens)
            logits = np.empty((len(chunk), len(self.label_names)), dtype=np.float32)
            logits[np.concatenate(batches)] = compute_logits(self.runner, tokenized, batches)  # back in the order of the texts
            scores = probabilities(logits, self.multi_label)
            for text, length, row in zip(chunk, tokenized.lengths, scores.astype(float), strict=True):
                if length == 2:  # [CLS] and [SEP]
                    yield {"text": text, "label": "", "score": None, "scores": {}, "reason": "the text is empty"}
                    continue
                predicted = int(row.argmax())
                by_name = dict(zip(self.label_names, row, strict=True))
                answer = {"text": text, "label": self.label_names[predicted], "score": row[predicted], "scores": by_name}
                if row[predicted] < threshold:
                    answer |= {"label": "", "reason": f"the score is below {threshold:g}"}
                yield answer


def in_parts(rows: Iterable[Row], wait: bool = True) -> Iterator[list[Row]]:
    """The rows in lists of at most CHUNK, fewer if their texts have CHARACTERS together.

    Without `wait` a list also ends when no further row comes within PATIENCE seconds.
    """
    part: list[Row] = []
    characters = 0
    for row in rows if wait else as_they_come(rows):
        if row is not None:
            part.append(row)
            characters += len(row.text)
        if part and (row is None or len(part) == CHUNK or characters >= CHARACTERS):
            yield part
            part, characters = [], 0
    if part:
        yield part


def as_they_come(rows: Iterable[Row]) -> Iterator[Row | None]:
    """Each row, and None when no further one has come within PATIENCE seconds. A thread reads a little ahead."""
    arrived: queue.Queue[Row | Exception] = queue.Queue(16)

    def read() -> None:
        try:
            for row in rows:
                arrived.put(row)
            arrived.put(StopIteration())
        except Exception as error:
            arrived.put(error)

    threading.Thread(target=read, daemon=True).start()  # a daemon: it may be waiting for input when the program ends
    while True:
        try:
            row = arrived.get(timeout=PATIENCE)
        except queue.Empty:
            yield None
            row = arrived.get()
        if isinstance(row, StopIteration):
            return
        if isinstance(row, Exception):
            raise row
        yield row


def probabilities(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    """(N, C): the softmax over the classes, or the sigmoid of each logit."""
    if multi_label:
        return 0.5 + 0.5 * np.tanh(0.5 * logits)  # 1 / (1 + exp(-x)), without overflow
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    return scores / scores.sum(axis=1, keepdims=True)


def load_classifier(
    folder: Path,
    model: str | None = None,
    device: str = "auto",
    max_length: int | None = None,
    dtype: str = "auto",
    sample: Sequence[str] = (),
) -> Classifier:
    """Load a run folder, an adapter folder (ours or peft's) or a whole model, as `--method full` writes it.

    The adapter is merged into the base model that it names, or into `model`. Texts are cut to `max_length` tokens [what the
    folder's tokenizer files say, otherwise as many as the model reads]. With a `sample` of texts, dtype "auto" can be int8: if
    it is the fastest here and the sample gets the labels of float32, but for 1 %. Raises UserError if the folder holds neither
    adapter nor model, an adapter of another base model, or a model that does not classify.
    """
    folder = next((folder / name for name in ("adapter", "model") if (folder / name).is_dir()), folder)
    if (path := folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file():
        if model is not None:
            raise UserError(f"{folder} is a whole model and needs no base model. Leave out --model")
        classifier, tokenizer = load_pretrained(str(folder), None)
        num_labels = classifier.config.num_labels
        names = classes_named_in(model_config := read_json(path), path) or default_names(num_labels)
        if len(names) != num_labels:
            raise UserError(f"{path} names {len(names)} classes, but the head is for {num_labels}. Mend id2label")
        multi_label = is_multi_label(model_config, num_labels)
    else:
        config, tensors = read_adapter(folder)
        num_labels = count_classes(folder, tensors)
        name, revision = (config.base_model_name_or_path, config.revision) if model is None else (model, None)
        if name is None:
            raise UserError(f"{folder} does not name its base model. Pass it with --model")
        classifier, tokenizer = load_base(folder, name, revision, num_labels, chosen=model is not None)
        if (folder / "tokenizer.json").is_file():
            tokenizer = read_tokenizer(folder / "tokenizer.json", classifier.config)
        names, multi_label = read_classes(folder, name, revision, num_labels)
        PeftModel.from_pretrained(classifier, folder).merge_and_unload()  # in float32

    longest = classifier.config.max_position_embeddings
    if max_length is None:
        max_length = min(read_max_length(folder) or longest, longest)
    if not 3 <= max_length <= longest:
        raise UserError(f"--max-length is {max_length}. For this model it must be between 3 and {longest}")
    runner = ModelRunner(classifier.requires_grad_(False), choose_device(device), torch.float32)
    return in_dtype(Classifier(runner, tokenizer, names, max_length, multi_label), dtype, sample)


def in_dtype(exact: Classifier, name: str, sample: Sequence[str]) -> Classifier:
    """A classifier in float32, changed to the arithmetic with that name (see `load_classifier`)."""
    model, device = exact.runner.model, exact.runner.device
    dtype, reason = choose_dtype(name, device, DTYPES if sample else FLOATS)
    if dtype == torch.int8 and sample:
        rounded = replace(exact, runner=ModelRunner(model, device, dtype))
        pairs = list(zip(exact.label(sample), rounded.label(sample), strict=True))
        same = sum(one["label"] == other["label"] for one, other in pairs)
        change = max(abs(one["scores"][key] - other["scores"][key]) for one, other in pairs for key in one["scores"])
        agreement = f"{same} of {len(sample)} labels as in float32, and a score moves by {change:.3f} at most"
        if name != "auto" or same >= AGREEMENT * len(sample):
            return replace(rounded, arithmetic=f"int8 ({reason}; {agreement})")
        dtype, reason = choose_dtype("auto", device)
        reason += f"; not int8: {agreement}"
    cast_frozen_matrices(model.to(device), dtype)
    return replace(exact, runner=ModelRunner(model, device, dtype), arithmetic=f"{dtype_name(dtype)} ({reason})")


def load_base(
    folder: Path, name: str, revision: str | None, num_labels: int, chosen: bool
) -> tuple[DistilBertForSequenceClassification, Tokenizer]:
    """The base model of the adapter in `folder`: the one that the adapter names, or another that the user has `chosen`.

    Raises UserError if it cannot be found, or if its weights are not those that the run's results.json says it was trained
    on. If the user chose it, this is only reported.
    """
    try:
        loaded = load_pretrained(name, num_labels, revision)
    except (NotOnHub, HubUnreachable) as error:
        if chosen:
            raise
        reason = "the hub cannot be reached" if isinstance(error, HubUnreachable) else "the hub has no such model"
        message = f"{folder / CONFIG_FILE} names the base model {name!r}, which is not a folder here, and {reason}"
        raise type(error)(f"{message}. Pass the base model with --model") from error
    if folder.name == "adapter" and (message := changed_weights(folder.parent, name)):
        if not chosen:
            raise UserError(f"{message}. Restore them, or pass --model {name} to use them as they are")
        print(message, file=sys.stderr)
    return loaded


def changed_weights(run: Path, base: str) -> str:
    """What to report if the weights in the folder `base` are not those in the results.json of `run`; otherwise ""."""
    if base == EMBEDDED or not os.path.isdir(base) or not (run / "results.json").is_file():
        return ""
    sha256 = read_json(run / "results.json").get("sha256")
    if not isinstance(sha256, dict) or sha256.get("weights") in (None, weights_sha256(base)):
        return ""
    return f"the weights in {base} are not those that {run} was trained on: their sha256 differs"


def count_classes(folder: Path, tensors: dict[str, Tensor]) -> int:
    """The classes in an adapter's head. Raises UserError for an adapter of another kind of model or for another task."""
    for key in sorted(tensors):
        part = key.removeprefix(PREFIX).partition(".")[0]
        if part not in ("distilbert", "pre_classifier", "classifier"):
            kind = KINDS.get(part, "another kind of model")
            remedy = "Only adapters of DistilBERT are supported, and of BERT if they were trained here"
            raise UserError(f"{folder}: its base is {kind}, with {key.removeprefix(PREFIX)}. {remedy}")
    head = tensors.get(f"{PREFIX}classifier.weight")
    if head is None or head.dim() != 2 or not head.numel():
        raise UserError(f"{folder} has no classifier head: it was trained for another task")
    return len(head)


def read_classes(folder: Path, base: str, revision: str | None, num_labels: int) -> tuple[list[str], bool]:
    """The names of an adapter's classes, and whether several can hold at once: from label_names.json, which training here
    writes, or else from the base model's config.json, as in transformers."""
    if (path := folder / "label_names.json").exists():
        names = read_json(path, list)
        if len(names) != num_labels or not all(isinstance(name, str) for name in names) or len(set(names)) < num_labels:
            raise UserError(f"{path} must be a list of {num_labels} different strings, one for each class of the adapter")
        return names, False
    base_config = read_model_config(base, revision)
    names = classes_named_in(base_config, Path(base)) or []
    return names if len(names) == num_labels else default_names(num_labels), is_multi_label(base_config, num_labels)


def classes_named_in(model_config: dict[str, Any], path: Path) -> list[str] | None:
    """The names of the classes in a config.json; None if it has none: transformers leaves out LABEL_0 and LABEL_1."""
    names = model_config.get("id2label")
    if names is None:
        return None
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
        raise UserError(f"{path}: id2label must name the classes 0, 1, 2 ... Mend it")
    if len(set(map(str, names.values()))) < len(names):
        raise UserError(f"{path}: id2label gives two classes the same name. Mend it")
    return [str(names[str(i)]) for i in range(len(names))]


def default_names(num_labels: int) -> list[str]:
    return [f"LABEL_{i}" for i in range(num_labels)]  # as in transformers


def is_multi_label(model_config: dict[str, Any], num_labels: int) -> bool:
    """Whether each class has a probability of its own, as transformers decides it."""
    kind = model_config.get("problem_type")
    if kind not in (None, "single_label_classification", "multi_label_classification"):
        raise UserError(f"the model's config.json has the problem_type {kind!r}: it has no classes. Use it with transformers")
    return kind == "multi_label_classification" or num_labels == 1
