"""What a report reads and computes from the folder of a run that has ended."""

import json
import math
import re
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_bytes, read_json
from lora import LoRALinear, PeftModel
from model import load_pretrained
from reporting.geometry import Geometry, geometry
from training.checkpoint import newest_first
from training.evaluation import progress_bar
from training.inference import load_classifier
from training.loading import data_sha256, load_data, require_weights, tokenize_examples
from training.options import Options

VALIDATION = "validation_macro_f1"  # only in the lines of metrics.jsonl that have looked
CURVES = ("step", "loss", "learning_rate", VALIDATION)
Layers = dict[str, dict[int, Geometry]]  # {"q_lin": {0: ..., 1: ...}, "v_lin": ...}: kind of module, number of layer


def read_results(folder: Path) -> dict[str, Any]:
    """results.json. Raises UserError if there is none: the run has not ended, or the folder is not a run."""
    path = folder / "results.json"
    if path.exists():
        return read_json(path)
    if newest_first(folder):
        raise UserError(f"the run in {folder} has not ended. Finish it first: python train.py --resume {folder}")
    raise UserError(f"{folder} is not a finished run: results.json not found. Pass a folder that train.py wrote")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl. An empty list if the file is missing or damaged: the report can do without it."""
    try:
        lines = [json.loads(line) for line in read_bytes(path).decode().splitlines()]
        metrics = [{key: float(line[key]) for key in CURVES if key in line or key != VALIDATION} for line in lines]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):  # a UserError is a ValueError
        return []
    return metrics if all(math.isfinite(value) for line in metrics for value in line.values()) else []


def find_mistakes(folder: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers for the test texts that are labelled wrong, each with its "truth", the highest score first.

    Raises UserError if the model or the data can no longer be loaded, or the data has changed.
    """
    options = Options(**results["options"])
    dataset = load_data(results["dataset"], options, results.get("dataset_commit"))
    test = dataset.test
    classifier = load_classifier(folder, max_length=options.max_length)
    tokenized = tokenize_examples(dataset, classifier.tokenizer, options.max_length)
    if data_sha256(*tokenized) != results["sha256"]["data"] or dataset.label_names != classifier.label_names:
        raise UserError(f"the data set {results['dataset']} has changed since the run")
    mistakes = []
    with progress_bar(len(test), "label", leave=False) as bar:
        for answer, label in zip(classifier.label(test.texts), test.labels, strict=True):
            truth = classifier.label_names[label]
            if answer["label"] not in ("", truth):  # "": the tokenizer finds nothing in the text
                mistakes.append(answer | {"truth": truth})
            bar.update()
    return sorted(mistakes, key=lambda answer: -answer["score"])


def read_geometry(folder: Path, results: dict[str, Any]) -> Layers:
    """The geometry of each adapted layer. Raises UserError if the adapter or its base model cannot be loaded."""
    commit = results["commit"] or results["options"]["revision"]
    base, _ = load_pretrained(results["model"], len(results["after"]["per_class_f1"]), commit)
    require_weights(results["model"], commit, results["sha256"])
    PeftModel.from_pretrained(base, folder / "adapter")
    layers: Layers = {}
    for name, module in base.named_modules():
        if isinstance(module, LoRALinear):
            kind, number = place(name)
            layers.setdefault(kind, {})[number] = geometry(module)
    return layers


def place(name: str) -> tuple[str, int]:
    """`distilbert.transformer.layer.3.attention.q_lin` -> ("q_lin", 3); 0 if the name has no number."""
    number = re.search(r"\.(\d+)\.", name)
    return name.rpartition(".")[2], int(number[1]) if number else 0
