"""From example indices to logits to macro-F1.

training      a batch of 16 texts -> this process's shard -> micro-batches -> logits (B, C) -> loss
evaluation    all texts -> micro-batches -> this process's shard -> logits (B, C) -> predictions (N,) -> confusion matrix (C, C)
              -> macro-F1

A micro-batch has at most 1,024 tokens on a CPU, padding included. Each process predicts its shard, and all get all predictions.
"""

import math
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import UserError
from data import TokenizedTexts, evaluation_batches, pad
from training.distributed import Distributed
from training.fast_cpu import fast_if_cpu

# Tokens in one micro-batch, padding included. On a CPU, twice as many train no faster and take 300 MB more. A GPU needs more
# work at a time; the best number for it has not been measured.
TOKENS, TOKENS_ON_GPU = 1024, 16384


class Examples(NamedTuple):
    texts: TokenizedTexts
    labels: np.ndarray  # (N,) int64


class Predictions(NamedTuple):
    labels: np.ndarray  # (N,) int64
    scores: np.ndarray  # (N,) float32: the softmax of the predicted class


class ModelRunner:
    """Computes logits for example indices, in training and in evaluation: pads, moves to the device, runs under autocast.

    Freeze, cast and merge the model's weights first: training/fast_cpu.py keeps its own copy of them.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        self.model, self.device, self.dtype = model, device, dtype
        self.fast = fast_if_cpu(model, device, dtype)
        self.tokens = TOKENS if device.type == "cpu" else TOKENS_ON_GPU

    def __call__(self, texts: TokenizedTexts, micro_batch: np.ndarray) -> Tensor:
        """Logits (B, C) in float32 for B example indices and C classes."""
        input_ids, mask = pad(texts, micro_batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16), self.fast:
            return self.model(self.to_device(input_ids), self.to_device(mask)).float()

    def to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":  # a copy from pinned memory does not block the CPU
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def compute_logits(
    runner: ModelRunner, texts: TokenizedTexts, micro_batches: list[np.ndarray], bar: tqdm | None = None
) -> np.ndarray:
    """(N, C) float32 logits of the N texts in `micro_batches`, in that order. Leaves the model in evaluation mode.

    Raises UserError if a logit is NaN or infinite.
    """
    rows: list[np.ndarray] = []
    runner.model.eval()
    with torch.inference_mode():
        for micro_batch in micro_batches:
            rows.append(runner(texts, micro_batch).cpu().numpy())
            if bar is not None:
                bar.update(len(micro_batch))
    logits = np.concatenate(rows)
    if not np.isfinite(logits).all():
        raise UserError("the model's output contains NaN or infinity. Try a smaller --learning-rate, or --dtype float32")
    return logits


def evaluate(runner: ModelRunner, examples: Examples, num_labels: int, processes: Distributed, title: str | None) -> np.ndarray:
    """The confusion matrix (C, C) over all examples. Shows a progress bar if it has a title."""
    return confusion_matrix(examples.labels, predict(runner, examples.texts, processes, title).labels, num_labels)


def predict(runner: ModelRunner, texts: TokenizedTexts, processes: Distributed, title: str | None) -> Predictions:
    """The predicted class of each text, and its score. Each process predicts its shard, and the shards are put together once.

    Shows a progress bar if it has a title.
    """
    predicted = np.zeros((2, len(texts.lengths)), dtype=np.float32)  # labels (whole numbers up to 2**24 are exact) and scores
    if shard := processes.shard(evaluation_batches(texts.lengths, runner.tokens)):
        with progress_bar(sum(map(len, shard)), title or "", leave=False, quiet=not (title and processes.is_main)) as bar:
            logits = compute_logits(runner, texts, shard, bar)
        highest = logits.max(axis=1, keepdims=True)
        predicted[:, np.concatenate(shard)] = logits.argmax(axis=1), 1 / np.exp(logits - highest).sum(axis=1)
    # the texts of other shards are zero here, so the sum over the processes has each text's own values
    labels, scores = processes.all_reduce(torch.from_numpy(predicted).to(runner.device)).cpu().numpy()
    return Predictions(labels.astype(np.int64), scores)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> np.ndarray:
    """(C, C) int64: entry [i, j] counts the examples of class i that were predicted as class j."""
    matrix = np.zeros((num_labels, num_labels), dtype=np.int64)
    np.add.at(matrix, (labels, predictions), 1)
    return matrix


def f1_per_class(matrix: np.ndarray) -> np.ndarray:
    """(C,) F1 = 2 TP / (2 TP + FP + FN): twice the diagonal over row sum plus column sum. NaN for 0 / 0."""
    with np.errstate(invalid="ignore"):
        return 2 * np.diag(matrix) / (matrix.sum(axis=0) + matrix.sum(axis=1))


def macro_f1(matrix: np.ndarray) -> float:
    """The mean F1 of the classes that occur or are predicted. Other classes are left out, as in scikit-learn's `f1_score`."""
    return float(np.nanmean(f1_per_class(matrix)))


def scores(matrix: np.ndarray, label_names: list[str]) -> dict[str, Any]:
    """The scores in results.json. The F1 of a class that neither occurs nor is predicted is null."""
    per_class = [None if math.isnan(f1) else float(f1) for f1 in f1_per_class(matrix)]
    return {
        "macro_f1": macro_f1(matrix),
        "accuracy": float(np.trace(matrix) / matrix.sum()),
        "confusion_matrix": matrix.tolist(),
        "per_class_f1": dict(zip(label_names, per_class, strict=True)),
    }


def progress_bar(total: int | None, title: str, leave: bool = True, quiet: bool = False, at_once: bool = True) -> tqdm:
    """A bar on standard error. In a log file it writes a line every ten seconds; the first one is `at_once` or after ten."""
    interval = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log file needs fewer lines than a screen
    delay = 0.0 if at_once else interval
    return tqdm(total=total, desc=title, unit=" examples", mininterval=interval, leave=leave, disable=quiet, delay=delay)
