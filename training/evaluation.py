"""From example numbers to logits to macro-F1, by hand."""

import math
import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.errors import UserError
from data import TokenizedTexts, evaluation_batches, pad
from training.distributed import Distributed
from training.fast_cpu import fast_if_cpu

# Padded tokens that go through the model at a time. On a CPU twice as many train no faster and take 300 MB more; a GPU wants
# more work at a time (this number has not been measured).
TOKENS, TOKENS_ON_GPU = 1024, 16384


class ModelRunner:
    """From example numbers to logits, in training as in evaluation: pad, move to the device, run under autocast.

    The model's frozen weights have the type and the values that they will keep (see fast.py).
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        self.model, self.device, self.dtype = model, device, dtype
        self.fast = fast_if_cpu(model, device)
        self.tokens = TOKENS if device.type == "cpu" else TOKENS_ON_GPU

    def __call__(self, texts: TokenizedTexts, batch: np.ndarray) -> torch.Tensor:
        """Logits (B, num_labels) in float32."""
        input_ids, mask = pad(texts, batch)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32), self.fast:
            return self.model(self.move(input_ids), self.move(mask)).float()

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device; to a GPU from pinned memory, so that it copies while the processor goes on."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor.to(self.device)


def compute_logits(
    forward: ModelRunner, texts: TokenizedTexts, batches: list[np.ndarray], bar: tqdm | None = None
) -> np.ndarray:
    """(N, num_labels) float32 of the N texts in `batches`, in that order. Leaves the model in evaluation mode.

    Raises UserError if the model computes what is no finite number.
    """
    rows: list[np.ndarray] = []
    forward.model.eval()
    with torch.inference_mode():
        for batch in batches:
            rows.append(forward(texts, batch).cpu().numpy())
            if bar is not None:
                bar.update(len(batch))
    logits = np.concatenate(rows)
    if not np.isfinite(logits).all():
        raise UserError("the model computes no finite numbers: try a smaller --learning-rate, or --dtype float32")
    return logits


def evaluate(
    forward: ModelRunner, texts: TokenizedTexts, labels: np.ndarray, num_labels: int, processes: Distributed, what: str
) -> np.ndarray:
    """The confusion matrix over all texts: every process counts its share, and the counts are summed."""
    matrix = np.zeros((num_labels, num_labels), dtype=np.int64)
    if batches := processes.shard(evaluation_batches(texts.lengths, forward.tokens)):
        with progress_bar(sum(map(len, batches)), what, leave=False, quiet=not processes.is_main) as bar:
            predictions = compute_logits(forward, texts, batches, bar).argmax(axis=1)
        matrix = confusion_matrix(labels[np.concatenate(batches)], predictions, num_labels)
    return processes.all_reduce(torch.from_numpy(matrix).to(forward.device)).cpu().numpy()


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> np.ndarray:
    """(C, C) int64: entry [i, j] counts the examples of class i that were taken for class j."""
    matrix = np.zeros((num_labels, num_labels), dtype=np.int64)
    np.add.at(matrix, (labels, predictions), 1)
    return matrix


def f1_per_class(matrix: np.ndarray) -> np.ndarray:
    """(C,) F1 = 2 TP / (2 TP + FP + FN): the diagonal against its row and its column; NaN for 0 / 0."""
    with np.errstate(invalid="ignore"):
        return 2 * np.diag(matrix) / (matrix.sum(axis=0) + matrix.sum(axis=1))


def macro_f1(matrix: np.ndarray) -> float:
    """The mean F1 of the classes that occur or are predicted; any other is left out, as scikit-learn's `f1_score` does."""
    return float(np.nanmean(f1_per_class(matrix)))


def scores(matrix: np.ndarray, names: list[str]) -> dict[str, Any]:
    """What results.json says of a confusion matrix; the F1 of a class that neither occurs nor is predicted is null."""
    per_class = [None if math.isnan(f1) else float(f1) for f1 in f1_per_class(matrix)]
    return {
        "macro_f1": macro_f1(matrix),
        "accuracy": float(np.trace(matrix) / matrix.sum()),
        "confusion_matrix": matrix.tolist(),
        "per_class_f1": dict(zip(names, per_class, strict=True)),
    }


def progress_bar(total: int | None, what: str, leave: bool = True, quiet: bool = False) -> tqdm:
    interval = 0.2 if sys.stderr.isatty() else 10.0  # seconds: a log wants fewer lines than a screen
    return tqdm(total=total, desc=what, unit=" examples", mininterval=interval, leave=leave, disable=quiet)
