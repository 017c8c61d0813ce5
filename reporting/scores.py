"""What a confusion matrix says about a classifier: precision and recall, the simplest classifier beside it, the error range.

Entry [i, j] of a matrix (C, C) counts the test texts of class i that were predicted as class j.
"""

import numpy as np

from training.evaluation import f1_per_class, macro_f1

RESAMPLES = 1000  # of the bootstrap
CONFIDENCE = 0.95


def per_class(matrix: np.ndarray) -> np.ndarray:
    """(C, 4): support (the texts of the class), precision, recall and F1 of each class. NaN for 0 / 0."""
    right, support, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore"):
        return np.stack([support, right / predicted, right / support, f1_per_class(matrix)], axis=1)


def macro(matrix: np.ndarray) -> np.ndarray:
    """(4,): the texts of all classes, and the mean of the others over the classes that occur or are predicted.

    There 0 / 0 counts as 0, as in scikit-learn.
    """
    scores = per_class(matrix)[matrix.any(axis=0) | matrix.any(axis=1)]
    return np.array([matrix.sum(), *np.nan_to_num(scores[:, 1:]).mean(axis=0)])


def majority_baseline(matrix: np.ndarray) -> tuple[int, np.ndarray]:
    """The class with the most test texts, and the matrix of a classifier that always predicts it."""
    always = np.zeros_like(matrix)
    largest = int(matrix.sum(axis=1).argmax())
    always[:, largest] = matrix.sum(axis=1)
    return largest, always


def confidence_interval(matrix: np.ndarray) -> tuple[float, float]:
    """Of the macro-F1: what other test parts of this size, from the same source, would mostly give.

    The percentile interval of the bootstrap (Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3): as
    many test texts as there are, drawn with replacement, RESAMPLES times. A draw changes only how often each pair of a true
    and a predicted class is there, so it is a draw of the matrix. The seed of the training is not part of the chance.
    """
    cells = np.nonzero(matrix)
    counts, resampled = matrix[cells], np.zeros_like(matrix)
    random, scores = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        resampled[cells] = random.multinomial(counts.sum(), counts / counts.sum())
        scores.append(macro_f1(resampled))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(scores, [tail, 1 - tail])
    return float(low), float(high)
