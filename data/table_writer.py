"""Rows with their labels, written as a table that keeps every column of the input."""

import contextlib
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from common.errors import UserError
from common.files import new_file
from data.tables import Row, row_error, shown

JSON, DELIMITERS = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}


class TableWriter:
    """Writes the fields of each row, and behind them its label and score, which is empty if it is None.

    They are called `label` and `score`, or `predicted_label` and `predicted_score` if the first row has one of these already.
    """

    def __init__(self, suffix: str, file: TextIO):
        self.suffix, self.file = suffix, file
        self.columns: list[str] = []  # of the first row
        self.added: tuple[str, str] = ("label", "score")

    def write(self, path: Path | None, row: Row, label: str, score: float | None) -> None:
        """`path` is where the row is from, for a message. Raises UserError for a row with fields that there is no place for."""
        if not self.columns:
            self.columns = list(row.fields)
            if not set(self.added).isdisjoint(self.columns):
                self.added = ("predicted_label", "predicted_score")
            if self.suffix in DELIMITERS:
                self.write_values([*self.columns, *self.added])
        for name in row.fields:
            if name in self.added:
                raise row_error(path, row.line, f"there is a field {shown(name)} already; rename it")
            if self.suffix in DELIMITERS and name not in self.columns:
                raise row_error(path, row.line, f"the first row has no field {shown(name)}; write --output as .jsonl")
        answer = [label, None if score is None else round(score, 6)]
        if self.suffix in DELIMITERS:
            self.write_values([*(row.fields.get(name) for name in self.columns), *answer])
        else:
            fields = row.fields | dict(zip(self.added, answer, strict=True))
            self.file.write(json.dumps(fields, ensure_ascii=False) + "\n")

    def write_values(self, values: list[Any]) -> None:
        cells = [value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False) for value in values]
        line = io.StringIO(newline="")
        csv.writer(line, delimiter=DELIMITERS[self.suffix]).writerow(cells)  # its line end decides what it quotes: \r, too
        self.file.write(line.getvalue().removesuffix("\r\n") + "\n")


@contextlib.contextmanager
def open_table(path: Path) -> Iterator[TableWriter]:
    """A new table, by its suffix: .csv, .tsv, .jsonl or .ndjson. It is there, whole, when the block ends without an error.

    Raises UserError for another suffix, and if the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in (*JSON, *DELIMITERS):
        raise UserError(f"{path}: a table is written as {', '.join((*DELIMITERS, *JSON))}. Choose one of these suffixes")
    with new_file(path) as file:
        yield TableWriter(suffix, file)
