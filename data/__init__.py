"""The text: data sets are read and checked, tokenised once, and divided into batches."""
# ruff: noqa: F401 - imported for the other folders

from data.batching import TokenizedTexts, evaluation_batches, micro_batches, pad, slices, tokenize, training_batches
from data.datasets import AG_NEWS, Dataset, Split, load_dataset, read_texts
from data.table_writer import TableWriter, open_table
from data.tables import Row, read_rows
