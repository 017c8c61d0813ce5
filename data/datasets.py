"""A name or a folder -> train and test texts, integer labels and label names, every row checked as it is read.

Three forms of `train` and `test` are understood:
  .jsonl                 {"text": ..., "label": 0 or "name", "label_text": "name" (optional)}, one object a line
  .csv with a header     columns `text` and `label` (a number or a name), and perhaps `label_text`
  .csv without           AG News' own: "class","title","description", classes from 1, their names in classes.txt if it is there
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.hub import hub_file

AG_NEWS = "SetFit/ag_news"  # the hub's copy of AG News as train.jsonl and test.jsonl
SAMPLE = Path(__file__).parent / "sample"  # a small corpus in AG News' classes, written for this project
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
    line: int  # of the file, from 1
    text: str
    label: int | str
    label_text: str | None = None


def load_dataset(name_or_path: str) -> Dataset:
    """Read `ag_news` (from the hub), `sample` (embedded) or a folder with train and test as .jsonl or .csv.

    Raises UserError, with file and line, for whatever cannot be trained on; HubUnreachable if the hub does not answer.
    """
    folder = Path(name_or_path)
    if name_or_path == "sample":
        train, test = SAMPLE / "train.jsonl", SAMPLE / "test.jsonl"
    elif name_or_path == "ag_news":
        train, test = (hub_file(AG_NEWS, f"{part}.jsonl", repo_type="dataset") for part in ("train", "test"))
    elif os.path.isdir(folder):  # unlike Path.is_dir, it has an answer for a name that is too long
        train, test = _find(folder)
    elif os.path.isfile(folder):
        raise UserError(f"{folder} is a file: name a folder that holds train{folder.suffix} and test{folder.suffix}")
    else:
        raise UserError(f"there is no data set {name_or_path!r}: name a folder, or one of ag_news and sample")

    train_rows, test_rows = list(_read(train)), list(_read(test))
    names = _label_names(train, train_rows)
    if all(row.label == train_rows[0].label for row in train_rows):
        label = _short(repr(train_rows[0].label))
        raise UserError(f"{train}: every row has the label {label}; there must be two classes at least")
    numbers = {label: i for i, label in enumerate(names)}
    called = {row.label: row.label_text for row in train_rows if row.label_text}
    return Dataset(_split(train, train_rows, numbers, called), _split(test, test_rows, numbers, called), list(names.values()))


def _find(folder: Path) -> tuple[Path, Path]:
    found = [suffix for suffix in (".jsonl", ".csv") if (folder / f"train{suffix}").exists()]
    if len(found) != 1:
        is_there = "both train.jsonl and train.csv" if found else "neither train.jsonl nor train.csv"
        raise UserError(f"{folder} holds {is_there}; one of them is needed")
    train, test = folder / f"train{found[0]}", folder / f"test{found[0]}"
    if not test.exists():
        raise UserError(f"{folder} holds {train.name} but no {test.name}: put some rows aside to test on")
    return train, test


def _read(path: Path) -> Iterator[Row]:
    """The rows of one file, each with a text and a label; where they come from is all that differs."""
    rows = _read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path)
    empty = True
    try:
        for row in rows:
            for what, value in [("text", row.text), ("label", str(row.label))]:
                if not value.strip():
                    raise UserError(f"{path}, line {row.line}: the {what} is empty; fill it in or remove the row")
            for value in (row.text, str(row.label), row.label_text or ""):
                value.isascii() or value.encode()  # JSON can smuggle in half a character, which nobody can read
            empty = False
            yield row
    except UnicodeDecodeError as error:
        line = 1 + path.read_bytes().count(b"\n", 0, _bad_byte(path))
        raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{path}, line {row.line}: half a surrogate pair is no character; remove it") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if empty:
        raise UserError(f"{path} holds no rows")


def _bad_byte(path: Path) -> int:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise UserError(f"{path}, line {number}: not JSON ({reason}); want one whole object a line") from error
            if not isinstance(fields, dict) or "text" not in fields or "label" not in fields:
                raise UserError(f'{path}, line {number}: want an object with "text" and "label"')
            text, label, label_text = fields["text"], fields["label"], fields.get("label_text")
            if not isinstance(text, str):
                raise UserError(f"{path}, line {number}: the text {_short(json.dumps(text))} is no string; put it in quotes")
            if isinstance(label, bool) or not isinstance(label, int | str):
                label = _short(json.dumps(label))
                raise UserError(f"{path}, line {number}: the label {label} is neither a whole number nor a name; make it one")
            yield Row(number, text, label, label_text if isinstance(label_text, str) else None)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_TEXT)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header: list[str] | None = None
            line = 1  # where the row begins; reader.line_num is where it ends
            for fields in reader:
                if fields and header is None:
                    names = [name.strip().lower() for name in fields]
                    header = names if "text" in names and "label" in names else []
                    if header:
                        fields = []
                if fields and header:
                    yield _named_row(path, line, header, fields)
                elif fields:
                    yield _ag_news_row(path, line, fields)
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}, line {line}: the row that begins here is not CSV ({error}); mend its quotes") from error


def _named_row(path: Path, line: int, header: list[str], fields: list[str]) -> Row:
    if len(fields) != len(header):
        raise UserError(f"{path}, line {line}: {len(fields)} fields, and the header names {len(header)}: quote the texts")
    row = dict(zip(header, fields, strict=True))
    return Row(line, row["text"], _number(row["label"]), row.get("label_text"))


def _ag_news_row(path: Path, line: int, fields: list[str]) -> Row:
    if len(fields) != 3:
        raise UserError(
            f'{path}, line {line}: {len(fields)} fields, and "class","title","description" are 3: '
            "quote the texts, or begin with a header that names text and label"
        )
    label, title, description = fields
    number = _number(label)
    if isinstance(number, str):
        raise UserError(f"{path}, line {line}: the class {_short(repr(label))} is not a number from 1")
    return Row(line, f"{title} {description}", number)


def _number(label: str) -> int | str:
    label = label.strip()
    return int(label) if label.isdecimal() and len(label) < 10 else label


def _short(text: str) -> str:
    """What a message shows of a value that may be a whole article, in the wrong column."""
    return text if len(text) <= 60 else text[:57] + "..."


def _read_class_names(path: Path) -> list[str] | None:
    try:
        names = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8: {error}") from error
    names = [name.strip() for name in names if name.strip()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path} names {_short(repr(twice[0]))} twice; each class needs a name of its own")
    return names


def _label_names(path: Path, rows: list[Row]) -> dict[int | str, str]:
    """The labels of the training rows in order, each with what it is called."""
    first = rows[0].label
    names: dict[int | str, str] = {}
    labels: dict[str, int | str] = {}
    for row in rows:
        name = row.label_text or str(row.label)
        where, label, called = f"{path}, line {row.line}", _short(repr(row.label)), _short(repr(name))
        if type(row.label) is not type(first):
            raise UserError(f"{where}: the label {label} in a file that began with {_short(repr(first))}; keep to one kind")
        if (before := names.setdefault(row.label, name)) != name:
            raise UserError(f"{where}: label {label} is called {called}, and {_short(repr(before))} before; keep one name")
        if (other := labels.setdefault(name, row.label)) != row.label:
            raise UserError(f"{where}: label {label} is called {called}, as {_short(repr(other))} is; give each its own name")
    if isinstance(first, str):
        return {label: names[label] for label in sorted(names)}
    start = 0 if 0 in names else 1
    if path.suffix == ".csv" and (listed := _read_class_names(path.parent / "classes.txt")):
        numbered: dict[int | str, str] = dict(enumerate(listed, start))
        for row in rows:
            if row.label not in numbered:
                raise UserError(
                    f"{path}, line {row.line}: label {row.label} has no name among the {len(listed)} in classes.txt"
                )
        return numbered
    numbers = range(start, start + len(names))
    if absent := sorted(set(numbers) - set(names)):
        there = ", ".join(_short(str(label)) for label in sorted(names)[:10])
        raise UserError(f"{path}: the labels are {there}, so {absent[0]} never occurs; number them without gaps from 0 or 1")
    return {label: names[label] for label in numbers}


def _split(path: Path, rows: list[Row], numbers: dict[int | str, int], called: dict[int | str, str]) -> Split:
    labels = np.empty(len(rows), dtype=np.int64)
    for i, row in enumerate(rows):
        if row.label not in numbers:
            label, known = _short(repr(row.label)), ", ".join(_short(repr(label)) for label in list(numbers)[:10])
            raise UserError(f"{path}, line {row.line}: label {label} is none of the training part's: {known}")
        if row.label_text and (name := called.get(row.label, row.label_text)) != row.label_text:
            label, text, known = (_short(repr(value)) for value in (row.label, row.label_text, name))
            raise UserError(
                f"{path}, line {row.line}: label {label} is called {text}, and {known} in the training part; keep one"
            )
        labels[i] = numbers[row.label]
    return Split([row.text for row in rows], labels)
