"""What is printed about the data before training, so that a wrong table shows, and about each class after it."""

import math

import numpy as np

from data import Dataset
from training.evaluation import Examples, f1_per_class

MOST = 20  # classes that are listed


def describe_data(dataset: Dataset, train: Examples, test: Examples, max_length: int) -> list[str]:
    """A line for each class, the accuracy of the simplest answer, and what may be wrong."""
    names, number = dataset.label_names, len(dataset.label_names)
    counts = [np.bincount(part.labels, minlength=number) for part in (train, test)]
    rows = zip(names[:MOST], *(count.tolist() for count in counts), strict=False)
    width = name_width(names[:MOST])
    lines = [f"  {name:<{width}} {trained:,} + {tested:,}" for name, trained, tested in rows]
    if number > MOST:
        lines.append(f"  and {number - MOST} more classes")
    largest = int(counts[1].argmax())
    lines.append(f"  always {names[largest]!r}: accuracy {counts[1][largest] / counts[1].sum():.3f}")

    if missing := [names[label] for label in np.flatnonzero(counts[1] == 0)]:
        listed = ", ".join([repr(name) for name in missing[:MOST]] + ["..."] * (len(missing) > MOST))
        lines.append(f"{len(missing)} of {number} classes are not in the test part, and are not tested: {listed}")
    if cut := train.texts.cut + test.texts.cut:
        lines.append(f"{cut:,} of {len(train.labels) + len(test.labels):,} texts are cut at {max_length} tokens (--max-length)")
    trained_on = set(map(plain, dataset.train.texts))
    if known := sum(plain(text) in trained_on for text in dataset.test.texts):
        lines.append(f"{known:,} of {len(test.labels):,} test texts are also in the training part: the scores will be too good")
    return lines


def name_width(names: list[str]) -> int:
    """Of the column of names: from 20 to 40 characters."""
    return min(40, max(20, *map(len, names)))


def plain(text: str) -> str:
    """The text without the differences that nobody sees: case, and which and how many spaces."""
    return " ".join(text.casefold().split())


def describe_scores(matrix: np.ndarray, label_names: list[str]) -> list[str]:
    """A line for each class with its F1, and a line if a class that occurs is never predicted. The matrix is (C, C)."""
    f1s = ["does not occur" if math.isnan(f1) else f"{f1:.4f}" for f1 in f1_per_class(matrix)]
    width = name_width(label_names)
    lines = [f"  F1 of {name:<{width}} {f1}" for name, f1 in zip(label_names, f1s, strict=True)]
    occurs, predicted = matrix.any(axis=1), matrix.any(axis=0)
    if (occurs & ~predicted).any():
        lines.append(f"  predicts {predicted.sum()} of {len(label_names)} classes")
    return lines
