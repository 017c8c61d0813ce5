"""What a report reads and computes from the folder of a run that has ended."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import read_bytes, read_json
from data import read_rows
from lora import LoRALinear, PeftModel
from model import load_pretrained
from reporting.geometry import Geometry, geometry
from training.evaluation import confusion_matrix
from training.loading import require_weights
from training.run_folder import require_ended, run_around

VALIDATION = "validation_macro_f1"  # only in the lines of metrics.jsonl that have looked
CURVES = ("step", "loss", "learning_rate", VALIDATION)
Layers = dict[str, dict[int, Geometry]]  # {"q_lin": {0: ..., 1: ...}, "v_lin": ...}: kind of module, number of layer


def read_results(folder: Path) -> dict[str, Any]:
    """results.json. Raises UserError if there is none: the run has not ended, or the folder is not a run."""
    require_ended(folder)
    path = folder / "results.json"
    if not path.exists():
        hint = run_around(folder) or ". Pass a folder that train.py wrote"
        raise UserError(f"{folder} is not a finished run: results.json not found{hint}")
    return read_json(path)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl. An empty list if the file is missing or damaged: the report can do without it."""
    try:
        lines = [json.loads(line) for line in read_bytes(path).decode().splitlines()]
        metrics = [{key: float(line[key]) for key in CURVES if key in line or key != VALIDATION} for line in lines]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):  # a UserError is a ValueError
        return []
    return metrics if all(math.isfinite(value) for line in metrics for value in line.values()) else []


def class_names(results: dict[str, Any]) -> list[str]:
    return list(results["after"]["per_class_f1"])


def read_matrix(results: dict[str, Any]) -> np.ndarray:
    """The confusion matrix (C, C) after training. Raises ValueError if it is not one."""
    matrix = np.array(results["after"]["confusion_matrix"], dtype=np.int64)
    if matrix.shape != 2 * (len(class_names(results)),) or matrix.min() < 0 or not matrix.any():
        raise ValueError("confusion_matrix")
    return matrix


def read_mistakes(folder: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl where the predicted label is not the true one, the highest score first.

    Raises UserError if the file is missing or damaged, or is not of this run.
    """
    path = folder / "predictions.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing: a run of an older version has none")
    numbers = {name: number for number, name in enumerate(class_names(results))}
    lines = [row.fields for row in read_rows(path, ["text"], "label", labelled=True)]
    try:
        pairs = [(numbers[line["label"]], numbers[line["predicted"]]) for line in lines]
        if not all(0 <= line["score"] <= 1 for line in lines):
            raise ValueError("a score is not between 0 and 1")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error!r})") from error
    true, predicted = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    if confusion_matrix(true, predicted, len(numbers)).tolist() != results["after"]["confusion_matrix"]:
        raise UserError(f"{path} does not belong to results.json: its predictions give another confusion matrix")
    wrong = [line for line in lines if line["label"] != line["predicted"]]
    return sorted(wrong, key=lambda line: -line["score"])


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
