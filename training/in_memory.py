"""For `fit` in train.py: texts and labels in memory are checked, and written as the table that a run reads."""

import contextlib
import dataclasses
import json
import os
import shutil
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, did_you_mean
from common.files import is_empty, new_folder, refuse_to_overwrite
from training.options import Options
from training.trained_folder import LABELS_FILE

Label = str | int | bool
NOT_HERE = ("dataset", "text_column", "label_column", "dataset_revision", "resume")  # options of a run that reads a file


def check_keywords(keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `fit` as options of a run. None is an option that is left out.

    Raises UserError for an unknown one, or a value of another type.
    """
    known = {item.name: item for item in dataclasses.fields(Options) if item.name not in NOT_HERE}
    checked: dict[str, Any] = {}
    for name, value in keywords.items():
        if name not in known:
            hint = did_you_mean(name, known) or ". Its options are those of `python train.py --help` but for the data"
            raise UserError(f"fit has no option {name!r}{hint}")
        if value is None:  # left out
            continue
        item = known[name]
        kind = next(kind for kind in (bool, int, float, str) if kind in (item.type, *typing.get_args(item.type)))
        if isinstance(value, np.generic):
            value = value.item()
        if kind is str and isinstance(value, os.PathLike):
            value = str(value)
        is_tuple = isinstance(item.default, tuple)
        values = list(value) if is_tuple and isinstance(value, list | tuple) else [value]
        accepted = (int, float) if kind is float else (kind,)
        if not all(type(one) in accepted for one in values):
            raise UserError(f"{name} is {value!r}. Its type must be {kind.__name__}{', or a list of them' * is_tuple}")
        checked[name] = tuple(values) if is_tuple else value
    return checked


@contextlib.contextmanager
def as_table(
    texts: Iterable[str], labels: Iterable[Label], test: tuple[Iterable[str], Iterable[Label]] | None, run: Path
) -> Iterator[Path]:
    """Write the rows into a folder beside the run's, RUN-data, where `--resume` finds them. The block runs on this folder.

    The labels themselves go beside the rows, so that in what is trained numbers stay numbers. If the run leaves nothing to
    resume, the folder is removed. Raises UserError for rows that cannot be trained on.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("fit runs in one process. Write the rows to a file, and use torchrun train.py --dataset FILE")
    parts = {"train": check_rows("texts", texts, "labels", labels)}
    if test is not None:
        parts["test"] = check_rows("the test texts", test[0], "the test labels", test[1])
    classes = sorted({label for _, label in parts["train"]})
    if len(classes) == 1:
        raise UserError(f"every label is {classes[0]!r}. At least two classes are needed")
    numbers = {label: number for number, label in enumerate(classes)}
    for _, label in parts.get("test", []):
        if label not in numbers or type(label) is not type(classes[0]):
            raise UserError(f"the test labels contain {label!r}, which is not among the labels to train on")
    refuse_to_overwrite(run)
    data = run.with_name(f"{run.name}-data")
    with new_folder(data) as new:
        (new / LABELS_FILE).write_text(json.dumps(classes) + "\n")
        for part, rows in parts.items():
            # by number, so that the order of the classes is that of `classes`; a run takes their names from label_text
            lines = [json.dumps({"text": text, "label": numbers[label], "label_text": str(label)}) for text, label in rows]
            (new / f"{part}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    try:
        yield data
    finally:
        if is_empty(run):
            shutil.rmtree(data, ignore_errors=True)


def check_rows(name: str, texts: Iterable[str], label_name: str, labels: Iterable[Label]) -> list[tuple[str, Label]]:
    """Pairs of a text and its label. Lists, arrays and columns of pandas will do."""
    rows = check_texts(texts, name)
    values = [label.item() if isinstance(label, np.generic) else label for label in labels]
    if len(rows) != len(values):
        raise UserError(f"{name}: {len(rows):,}, {label_name}: {len(values):,}. Give one label for each text")
    if not rows:
        raise UserError(f"{name}: the list is empty. Give at least two texts of each class")
    for i, label in enumerate(values):
        if type(label) not in (str, int, bool):
            raise UserError(f"{label_name}[{i}] is {brief(label)}. A label is a string, a whole number or a boolean")
        if type(label) is not type(values[0]):
            raise UserError(f"{label_name}[{i}] is {label!r} after {values[0]!r}. Give either names or numbers")
    return list(zip(rows, values, strict=True))


def check_texts(texts: Iterable[str], name: str = "texts") -> list[str]:
    """The texts as a list. Raises UserError for one that is not a string, and for a single string."""
    if isinstance(texts, str):
        raise UserError(f"{name}: this is one string. Put it into a list: [text]")
    rows = list(texts)
    for i, text in enumerate(rows):
        if not isinstance(text, str):
            raise UserError(f"{name}[{i}] is {brief(text)}. A text is a string")
    return [str(text) for text in rows]  # a string of NumPy is a str as well, but not quite


def brief(value: object) -> str:
    return f"{' '.join(repr(value).split())[:60]}, of type {type(value).__name__}"
