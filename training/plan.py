"""How many epochs, about how many minutes, and how much each class counts: what depends on the size of the data."""

import math

import numpy as np
import torch
from torch import nn

from training.loading import Inputs
from training.options import MIN_EPOCHS, MIN_STEPS, Options


def plan(rows: int, options: Options) -> tuple[int, int]:
    """Epochs and steps. Unless --epochs is typed: as many epochs as make MIN_STEPS steps, and at least MIN_EPOCHS."""
    steps = math.ceil(rows / options.batch_size)  # of one epoch
    epochs = options.epochs or max(MIN_EPOCHS, math.ceil(MIN_STEPS / steps))
    return epochs, epochs * steps


def describe_plan(inputs: Inputs, options: Options, seconds: float | None) -> str:
    """A line about the training that follows. `seconds`: how long the evaluation of the test part has taken, if it was done.

    A token costs about three times as much in training as in evaluation. The minutes are a guess: a small test part says
    little, and other programs may run.
    """
    rows = len(inputs.train.labels)
    epochs, steps = plan(rows, options)
    line = f"{epochs} {'epoch' if epochs == 1 else 'epochs'} of {steps // epochs:,} steps = {steps:,} steps"
    if seconds is None:
        return line
    trained, tested = (int(part.texts.lengths.sum()) for part in (inputs.train, inputs.test))
    minutes = math.ceil(3 * epochs * seconds * trained / tested / 60)
    return f"{line}, about {minutes:,} minutes" if minutes > 1 else f"{line}, about a minute or less"


def loss_function(labels: np.ndarray, num_labels: int, options: Options) -> nn.CrossEntropyLoss:
    """The summed cross-entropy of a micro-batch, with the options' label smoothing and weights of classes."""
    weight = torch.from_numpy(balanced_weights(labels, num_labels)) if options.class_weights == "balanced" else None
    return nn.CrossEntropyLoss(weight, reduction="sum", label_smoothing=options.label_smoothing)


def balanced_weights(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """(C,) float32: for each class the number of examples / (C * the number of its own), as in scikit-learn.

    Their mean over the training examples is 1, so the loss keeps its size.
    """
    counts = np.bincount(labels, minlength=num_labels)
    return (len(labels) / (num_labels * counts)).astype(np.float32)
