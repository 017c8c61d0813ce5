"""Rows with their labels, written as a table that keeps every column of the input."""

import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

from common.errors import UserError
from common.files import new_file
from data.tables import Row, row_error, shown

DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": ""}


class TableWriter:
    """Writes the fields of each row, and behind them its label and score, which is empty if it is None.

    They are called `label` and `score`, or `predicted_label` and `predicted_score` if the first row has one of these already.
    """

    def __init__(self, file: TextIO, delimiter: str):
        self.file, self.delimiter = file, delimiter  # "" for JSON Lines
        self.columns: list[str] = []  # of the first row
        # The line end that csv is left with decides what it quotes: \r, too.
        lines = SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n"))
        self.table = csv.writer(lines, delimiter=delimiter or ",")

    def write(self, path: Path | None, row: Row, label: str, score: float | None) -> None:
        """`path` is where the row is from, for a message. Raises UserError for a row with fields that there is no place for."""
        if not self.columns:
            self.columns = list(row.fields)
            self.added = ["label", "score"]
            if not set(self.added).isdisjoint(self.columns):
                self.added = ["predicted_label", "predicted_score"]
            if self.delimiter:
                self.table.writerow([*self.columns, *self.added])
        for name in row.fields:
            if name in self.added:
                raise row_error(path, row.line, f"there is a field {shown(name)} already; rename it")
            if self.delimiter and name not in self.columns:
                raise row_error(path, row.line, f"the first row has no field {shown(name)}; write --output as .jsonl")
        fields = row.fields | dict(zip(self.added, [label, None if score is None else round(score, 6)], strict=True))
        if self.delimiter:
            values = [fields.get(name) for name in (*self.columns, *self.added)]
            self.table.writerow(v if isinstance(v, str | None) else json.dumps(v, ensure_ascii=False) for v in values)
        else:
            self.file.write(json.dumps(fields, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def open_table(path: Path) -> Iterator[TableWriter]:
    """A new table, by its suffix: .csv, .tsv, .jsonl or .ndjson. It is there, whole, when the block ends without an error.

    Raises UserError for another suffix, and if the file cannot be written.
    """
    delimiter = DELIMITERS.get(path.suffix.lower())
    if delimiter is None:
        raise UserError(f"{path}: a table is written as {', '.join(DELIMITERS)}. Choose one of these suffixes")
    with new_file(path) as file:
        yield TableWriter(file, delimiter)
