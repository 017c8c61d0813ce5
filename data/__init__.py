"""The text: data sets read and checked, tokenised once, and cut into batches."""

from data.batching import TokenizedTexts, evaluation_batches, micro_batches, pad, tokenize, training_batches
from data.datasets import AG_NEWS, Dataset, Split, load_dataset
from data.texts import read_texts

__all__ = [
    "AG_NEWS",
    "Dataset",
    "Split",
    "TokenizedTexts",
    "evaluation_batches",
    "load_dataset",
    "micro_batches",
    "pad",
    "read_texts",
    "tokenize",
    "training_batches",
]
