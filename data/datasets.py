"""Labelled texts to train on, and texts to label: one reader for every form of file, which checks each row as it reads.

.jsonl                 {"text": ..., "label": 0 or "name", "label_text": "name" (optional)}, one object per line
.csv with a header     columns `text` and `label` (a number or a name), optionally `label_text`; others are ignored
.csv without a header  AG News' own form: "class","title","description", with class names in classes.txt if it exists
other files, stdin     one text per line; they can be labelled, not trained on
"""

import csv
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError

AG_NEWS = "SetFit/ag_news"  # the hub's copy of AG News as train.jsonl and test.jsonl
SAMPLE = Path(__file__).parent / "sample"  # a small corpus with AG News' classes, written for this project
LONGEST_TEXT = 1 << 24  # characters in one field of a CSV file


@dataclass(frozen=True)
class Split:
    texts: list[str]
    labels: np.ndarray  # (N,) int64

    def __len__(self) -> int:
        return len(self.texts)

    def first(self, limit: int | None) -> "Split":
        return Split(self.texts[:limit], self.labels[:limit])


@dataclass(frozen=True)
class Dataset:
    train: Split
    test: Split
    label_names: list[str]  # label i is called label_names[i]


@dataclass(frozen=True)
class Row:
    line: int
    text: str
    label: int | str
    name: str | None  # of the label, from label_text


def load_dataset(name_or_path: str) -> Dataset:
    """Read `ag_news` (from the hub), `sample` (embedded) or a folder with train and test as .jsonl or .csv.

    Raises UserError, with file and line, for data that cannot be trained on; HubUnreachable if the hub does not answer.
    """
    folder = Path(name_or_path)
    if name_or_path == "sample":
        train, test = SAMPLE / "train.jsonl", SAMPLE / "test.jsonl"
    elif name_or_path == "ag_news":
        from common.hub import hub_file  # here: predict.py reads texts, and needs no hub

        train, test = (hub_file(AG_NEWS, f"{part}.jsonl", repo_type="dataset") for part in ("train", "test"))
    elif os.path.isdir(folder):  # Path.is_dir raises OSError for a name that is too long
        train, test = _find_parts(folder)
    elif os.path.isfile(folder):
        raise UserError(f"{folder} is a file: name a folder that contains train{folder.suffix} and test{folder.suffix}")
    else:
        raise UserError(f"there is no data set {name_or_path!r}: name a folder, or one of ag_news and sample")
    train_rows, test_rows = _labelled_rows(train), _labelled_rows(test)
    names = _label_names(train, train_rows)
    return Dataset(_split(train, train_rows, names), _split(test, test_rows, names), list(names.values()))


def read_texts(path: Path | None) -> Iterator[str]:
    """The texts of a file, or of standard input (None), one at a time, so that the file may be larger than memory.

    Raises UserError, with file and line, for a row that cannot be read.
    """
    for line, fields in read_rows(path):
        yield _text(path, line, fields)


def read_rows(path: Path | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, fields) of each row of a file, or of standard input (None). A row's line is where it begins, counted from 1.

    Reads no further than asked. Raises UserError, with file and line, for anything that is not UTF-8, JSON or CSV.
    """
    parse = {".jsonl": _json_rows, ".csv": _csv_rows}.get(path.suffix.lower() if path else "", _text_rows)
    source = 0 if path is None else path  # 0 is standard input
    try:
        # Bytes that are not UTF-8 become lone surrogates, in which _utf8_lines sees the line that they are in.
        with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="", closefd=path is not None) as file:
            yield from parse(path, _utf8_lines(path, file))
    except OSError as error:
        raise UserError(f"{path or 'standard input'} cannot be read: {error.strerror}") from error


def _utf8_lines(path: Path | None, file: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not _is_unicode(line):
            raise _row_error(path, number, "not UTF-8; save the file as UTF-8")
        yield line


def _text_rows(path: Path | None, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        yield number, {"text": line.rstrip("\r\n")}


def _json_rows(path: Path | None, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise _row_error(path, number, f"not JSON ({reason}); write one whole object per line") from error
        if not isinstance(fields, dict):
            raise _row_error(path, number, 'not a JSON object; write {"text": ...} on each line')
        yield number, fields


def _csv_rows(path: Path | None, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = _csv_values(path, lines)
    for line, values in itertools.islice(rows, 1):
        columns = [column.strip().lower() for column in values]
        if is_ag_news := len(values) == 3 and columns[0].isdecimal():  # there is no header
            rows, columns = itertools.chain([(line, values)], rows), ["class", "title", "description"]
        elif "text" not in columns:
            raise _row_error(path, line, 'no column is called "text"; begin the file with a header such as text,label')
    for line, values in rows:
        if len(values) != len(columns):
            raise _row_error(path, line, f"{len(values)} fields, but {len(columns)} columns; put quotes around each text")
        fields = dict(zip(columns, values, strict=True))
        if is_ag_news:
            fields = {"text": f"{fields['title']} {fields['description']}", "label": fields["class"]}
        yield line, fields


def _csv_values(path: Path | None, lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(LONGEST_TEXT)
    reader = csv.reader(lines, strict=True)
    start = 1  # the line where the next row begins: a quoted text may span several
    try:
        for values in reader:
            if values:  # not a blank line
                yield start, values
            start = reader.line_num + 1
    except csv.Error as error:
        raise _row_error(path, start, f"the row that begins here is not CSV ({error}); check its quotes") from error


def _text(path: Path | None, line: int, fields: dict[str, Any]) -> str:
    if "text" not in fields:
        raise _row_error(path, line, '"text" is missing; each row needs one')
    text = fields["text"]
    if not isinstance(text, str):
        raise _row_error(path, line, f"the text {_shown(text)} is not a string; put it in quotes")
    if not _is_unicode(text):
        raise _row_error(path, line, "the text contains half a character (a lone surrogate); remove it")
    return text


def _is_unicode(text: str) -> bool:
    """Whether it has no lone surrogate, which comes from a byte that is not UTF-8 or from a JSON escape such as \\ud800."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _row_error(path: Path | None, line: int, message: str) -> UserError:
    return UserError(f"{path or 'standard input'}, line {line}: {message}")


def _shown(value: object) -> str:
    """A value in a message: short, since it may be a whole article in the wrong column."""
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _find_parts(folder: Path) -> tuple[Path, Path]:
    suffixes = [suffix for suffix in (".jsonl", ".csv") if (folder / f"train{suffix}").exists()]
    if len(suffixes) != 1:
        raise UserError(f"{folder} contains {'both' if suffixes else 'neither'} of train.jsonl and train.csv; one is needed")
    train, test = folder / f"train{suffixes[0]}", folder / f"test{suffixes[0]}"
    if not test.exists():
        raise UserError(f"{folder} contains {train.name} but not {test.name}: move some rows there to test on")
    return train, test


def _labelled_rows(path: Path) -> list[Row]:
    rows = []
    for line, fields in read_rows(path):
        text = _text(path, line, fields)
        if "label" not in fields:
            raise _row_error(path, line, '"label" is missing; each row needs one')
        label, name = fields["label"], fields.get("label_text")
        if path.suffix == ".csv":  # where numbers are strings, too
            label = label.strip()
            label = int(label) if label.isdecimal() and len(label) < 10 else label
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise _row_error(path, line, f"the label {_shown(label)} is neither a whole number nor a name; make it one")
        for what, value in [("text", text), ("label", str(label))]:
            if not value.strip():
                raise _row_error(path, line, f"the {what} is empty; fill it in or remove the row")
        if not _is_unicode(f"{label}{name}"):
            raise _row_error(path, line, "the label contains half a character (a lone surrogate); remove it")
        rows.append(Row(line, text, label, name if isinstance(name, str) else None))
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def _label_names(path: Path, rows: list[Row]) -> dict[int | str, str]:
    """label -> name, of the training rows. Classes are numbered in this order: by number or by alphabet."""
    earliest = rows[0].label
    names: dict[int | str, str] = {}
    labels: dict[str, int | str] = {}
    for row in rows:
        name, message = row.name or str(row.label), None
        if type(row.label) is not type(earliest):
            message = f"the label {_shown(row.label)} after {_shown(earliest)}; use either numbers or names"
        elif (before := names.setdefault(row.label, name)) != name:
            message = f"label {_shown(row.label)} is called {_shown(name)} here and {_shown(before)} before; choose one name"
        elif (other := labels.setdefault(name, row.label)) != row.label:
            message = f"labels {_shown(other)} and {_shown(row.label)} are both called {_shown(name)}; give each its own name"
        if message:
            raise _row_error(path, row.line, message)
    if len(names) == 1:
        raise UserError(f"{path}: every row has the label {_shown(earliest)}; at least two classes are needed")
    if isinstance(earliest, int):
        start, classes = 0 if 0 in names else 1, f"{len(names)} classes"
        if path.suffix == ".csv" and (listed := _listed_names(path.with_name("classes.txt"))):
            names, classes = dict(enumerate(listed, start)), f"{len(listed)} classes in classes.txt"
        last = start + len(names) - 1
        for row in rows:
            if row.label not in range(start, last + 1):
                message = f"label {_shown(row.label)} does not fit the {classes}; number them from {start} to {last}"
                raise _row_error(path, row.line, message)
    return {label: names[label] for label in sorted(names)}


def _listed_names(path: Path) -> list[str]:
    names = [name.strip() for name in read_texts(path) if name.strip()] if path.exists() else []
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path} lists {_shown(name)} twice; each class needs a name of its own")
    return names


def _split(path: Path, rows: list[Row], names: dict[int | str, str]) -> Split:
    numbers = {label: number for number, label in enumerate(names)}
    for row in rows:
        name = names.get(row.label)
        if name is None:
            known = ", ".join(_shown(label) for label in list(names)[:10])
            raise _row_error(path, row.line, f"label {_shown(row.label)} is not in the training part, which has {known}")
        if row.name and name not in (row.name, str(row.label)):
            message = f"label {_shown(row.label)} is called {_shown(row.name)}, but {_shown(name)} in the training part"
            raise _row_error(path, row.line, f"{message}; choose one name")
    return Split([row.text for row in rows], np.array([numbers[row.label] for row in rows], dtype=np.int64))
