"""Labelled texts to train on, and texts to label: one reader for every form of file, which checks each row as it reads.

.jsonl                 {"text": ..., "label": 0 or "name", "label_text": "name" (optional)}, one object per line
.csv with a header     columns `text` and `label` (a number or a name), optionally `label_text`; others are ignored
.csv without a header  AG News' own form: "class","title","description", with class names in classes.txt if it exists
other files, stdin     one text per line; they can be labelled, not trained on
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.hub import hub_file
from data.tables import is_unicode, read_rows, row_error, shown

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
class LabelledRow:
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
    return (row.text for row in read_rows(path))


def _find_parts(folder: Path) -> tuple[Path, Path]:
    suffixes = [suffix for suffix in (".jsonl", ".csv") if (folder / f"train{suffix}").exists()]
    if len(suffixes) != 1:
        raise UserError(f"{folder} contains {'both' if suffixes else 'neither'} of train.jsonl and train.csv; one is needed")
    train, test = folder / f"train{suffixes[0]}", folder / f"test{suffixes[0]}"
    if not test.exists():
        raise UserError(f"{folder} contains {train.name} but not {test.name}: move some rows there to test on")
    return train, test


def _labelled_rows(path: Path) -> list[LabelledRow]:
    rows = []
    for line, text, label, fields in read_rows(path, labelled=True):
        name = fields.get("label_text")
        if path.suffix == ".csv":  # where numbers are strings, too
            label = label.strip()
            label = int(label) if label.isdecimal() and len(label) < 10 else label
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise row_error(path, line, f"the label {shown(label)} is neither a whole number nor a name; make it one")
        for what, value in [("text", text), ("label", str(label))]:
            if not value.strip():
                raise row_error(path, line, f"the {what} is empty; fill it in or remove the row")
        if not is_unicode(f"{label}{name}"):
            raise row_error(path, line, "the label contains half a character (a lone surrogate); remove it")
        rows.append(LabelledRow(line, text, label, name if isinstance(name, str) else None))
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def _label_names(path: Path, rows: list[LabelledRow]) -> dict[int | str, str]:
    """label -> name, of the training rows. Classes are numbered in this order: by number or by alphabet."""
    earliest = rows[0].label
    names: dict[int | str, str] = {}
    labels: dict[str, int | str] = {}
    for row in rows:
        name, message = row.name or str(row.label), None
        if type(row.label) is not type(earliest):
            message = f"the label {shown(row.label)} after {shown(earliest)}; use either numbers or names"
        elif (before := names.setdefault(row.label, name)) != name:
            message = f"label {shown(row.label)} is called {shown(name)} here and {shown(before)} before; choose one name"
        elif (other := labels.setdefault(name, row.label)) != row.label:
            message = f"labels {shown(other)} and {shown(row.label)} are both called {shown(name)}; give each its own name"
        if message:
            raise row_error(path, row.line, message)
    if len(names) == 1:
        raise UserError(f"{path}: every row has the label {shown(earliest)}; at least two classes are needed")
    if isinstance(earliest, int):
        start, classes = 0 if 0 in names else 1, f"{len(names)} classes"
        if path.suffix == ".csv" and (listed := _listed_names(path.with_name("classes.txt"))):
            names, classes = dict(enumerate(listed, start)), f"{len(listed)} classes in classes.txt"
        last = start + len(names) - 1
        for row in rows:
            if row.label not in range(start, last + 1):
                message = f"label {shown(row.label)} does not fit the {classes}; number them from {start} to {last}"
                raise row_error(path, row.line, message)
    return {label: names[label] for label in sorted(names)}


def _listed_names(path: Path) -> list[str]:
    names = [name.strip() for name in read_texts(path) if name.strip()] if path.exists() else []
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path} lists {shown(name)} twice; each class needs a name of its own")
    return names


def _split(path: Path, rows: list[LabelledRow], names: dict[int | str, str]) -> Split:
    numbers = {label: number for number, label in enumerate(names)}
    for row in rows:
        name = names.get(row.label)
        if name is None:
            known = ", ".join(shown(label) for label in list(names)[:10])
            raise row_error(path, row.line, f"label {shown(row.label)} is not in the training part, which has {known}")
        if row.name and name not in (row.name, str(row.label)):
            message = f"label {shown(row.label)} is called {shown(row.name)}, but {shown(name)} in the training part"
            raise row_error(path, row.line, f"{message}; choose one name")
    return Split([row.text for row in rows], np.array([numbers[row.label] for row in rows], dtype=np.int64))
