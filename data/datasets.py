"""Data sets to train on: which files they consist of, what their labels are called, and which rows train and which test."""

import contextlib
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import FileNotOnHub, HubUnreachable, UserError, did_you_mean
from common.files import nearest
from data.tables import JSON, SUFFIXES, NoColumn, Row, Wanted, choose_columns, folded, is_unicode, read_rows, row_error, shown

AG_NEWS = "SetFit/ag_news"  # the hub's copy of AG News as train.jsonl and test.jsonl
SAMPLE = Path(__file__).parent / "sample"  # a small corpus with AG News' classes, written for this project
TEST_SHARE = 0.1
PARTS = {"train": ("train", "training"), "test": ("test",), "validation": ("validation", "valid", "val", "dev")}
ON_HUB = (".jsonl", ".csv", ".tsv", ".json")  # the files of a data set on the hub are looked for in this order


@dataclass(frozen=True)
class Split:
    texts: list[str]
    labels: np.ndarray  # (N,) int64

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: np.ndarray) -> "Split":
        return Split([self.texts[i] for i in indices], self.labels[indices])

    def sample(self, limit: int | None, seed: int) -> "Split":
        """At most `limit` examples, in their order, with each class as frequent as before."""
        return self if limit is None or limit >= len(self) else self.take(stratified(self.labels, limit, seed))


@dataclass(frozen=True)
class Dataset:
    train: Split
    test: Split
    label_names: list[str]  # label i is called label_names[i]
    validation: Split | None = None
    commit: str | None = None  # if it comes from the hub
    notes: tuple[str, ...] = ()  # what the user should know, a line each

    def limited(self, train_limit: int | None, test_limit: int | None, seed: int) -> "Dataset":
        """Raises UserError if a class would not be trained on."""
        if train_limit is not None and train_limit < len(self.label_names):
            raise UserError(f"--train-limit is {train_limit}, but there are {len(self.label_names)} classes to train on")
        return replace(self, train=self.train.sample(train_limit, seed), test=self.test.sample(test_limit, seed))

    def with_validation(self, share: float | None, seed: int) -> "Dataset":
        """With a validation part: the file that the data set has, or a share of the training part. None: no share."""
        dataset = self
        if share is not None:
            if self.validation is not None:
                raise UserError("the data set has a validation part: leave out --validation-share, or name one file")
            train, validation = _put_aside(self.train, share, seed)
            dataset = replace(self, train=train, validation=validation)
        if dataset.validation is None:
            return dataset
        note = f"{len(dataset.validation):,} other examples choose the best state of the run (the validation part)"
        return replace(dataset, notes=(*dataset.notes, note))


class LabelledRow(NamedTuple):
    path: Path
    line: int
    text: str
    label: int | str
    name: str | None  # of the label, from label_text


class Part(NamedTuple):
    path: Path
    rows: list[LabelledRow]
    columns: str  # what was read from which column


def load_dataset(
    name_or_path: str,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    test_share: float | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> Dataset:
    """Read `sample` (embedded), `ag_news` or user/name (from the hub), a folder with train and test, or one file.

    Without a test part, `test_share` of the training part is put aside as one. `data/tables.py` lists the forms of files.
    Raises UserError, with file and line, for data that cannot be trained on; HubUnreachable if the hub does not answer.
    """
    paths, commit = _find_parts(name_or_path, revision)
    if test_share is not None and "test" in paths:
        raise UserError(f"{name_or_path} has a test part, {paths['test'].name}: leave out --test-share, or name one file")
    wanted = Wanted(text_columns, label_column, labelled=True)
    train = _read_part(paths["train"], wanted)
    names = _label_names(train)
    is_told = (text_columns and label_column) or train.columns.lower() == PLAIN
    notes = [] if is_told else [f"{train.path.name}: {train.columns}"]
    splits = {"train": _split(train, names)}
    for part, path in paths.items():
        try:
            splits[part] = splits.get(part) or _split(_read_part(path, wanted), names)
        except NoColumn as error:
            raise UserError(f"{error}. Or test on a share of the training part: --dataset {paths['train']}") from error
    if "test" not in splits:
        whole, share = splits["train"], TEST_SHARE if test_share is None else test_share
        splits["train"], splits["test"] = _put_aside(whole, share, seed)
        size = f"{len(splits['test']):,} of {len(whole):,} rows"
        notes.append(f"{train.path.name}: {size} are put aside to test on (--test-share {share:g})")
    label_names = list(names.values())
    spellings: dict[str, str] = {}
    for name in label_names:
        if (other := spellings.setdefault(name.casefold(), name)) != name:
            notes.append(f"the classes {shown(other)} and {shown(name)} differ only in case; if they are one, spell them alike")
    return Dataset(splits["train"], splits["test"], label_names, splits.get("validation"), commit, tuple(notes))


def read_texts(path: Path | None) -> Iterator[str]:
    """The texts of a file, or of standard input (None), one at a time, so that the file may be larger than memory.

    Raises UserError, with file and line, for a row that cannot be read.
    """
    return (row.text for row in read_rows(path))


def stratified(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The sorted indices of `size` examples, drawn at random. Each class is as frequent as before, and has one if it can."""
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))  # in the queue of its class, from 0 to 1: the first of each class come first
    for label in np.unique(labels):
        queue = order[labels[order] == label]
        place[queue] = np.arange(len(queue)) / len(queue)
    return np.sort(order[np.argsort(place[order], kind="stable")[:size]])


def _put_aside(whole: Split, share: float, seed: int) -> tuple[Split, Split]:
    """What is left to train on, and a share. Each class has at least one example in the first, and, if it has two, in both."""
    num_labels = len(np.unique(whole.labels))
    kept = stratified(whole.labels, num_labels, seed)
    rest = np.setdiff1d(np.arange(len(whole)), kept)
    if not len(rest):
        raise UserError("the training part has only one row of each class: add rows, some of which are put aside")
    size = max(round(share * len(whole)), len(np.unique(whole.labels[rest])))
    test = rest[stratified(whole.labels[rest], size, seed)]
    return whole.take(np.setdiff1d(np.arange(len(whole)), test)), whole.take(test)


# The files


def _find_parts(name_or_path: str, revision: str | None) -> tuple[dict[str, Path], str | None]:
    """The files of the parts, by "train", "test" and "validation", and the commit if they come from the hub."""
    path = Path(name_or_path)
    if name_or_path == "sample":
        parts = {"train": SAMPLE / "train.jsonl", "test": SAMPLE / "test.jsonl"}
    elif name_or_path == "ag_news":
        return _parts_on_hub(AG_NEWS, revision)
    elif os.path.isdir(path):  # Path.is_dir raises OSError for a name that is too long
        parts = _parts_in_folder(path)
    elif os.path.isfile(path):
        parts = {"train": path}
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path, re.ASCII) and path.suffix.lower() not in SUFFIXES[:-1]:
        return _parts_on_hub(name_or_path, revision)
    else:
        raise UserError(
            f"there is no data set {name_or_path!r}: name a file, a folder, user/name on the hub, or one of ag_news and sample"
            + (did_you_mean(name_or_path, ["ag_news", "sample"]) or nearest(path))
        )
    if revision is not None:
        raise UserError(f"{name_or_path} is on this machine and has no revisions: leave out --dataset-revision")
    return parts, None


def _parts_in_folder(folder: Path) -> dict[str, Path]:
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    parts: dict[str, Path] = {}
    for part, stems in PARTS.items():
        found = [path for path in paths if path.stem.lower() in stems and path.suffix.lower() in SUFFIXES]
        if len(found) > 1:
            raise UserError(f"{folder} contains both {found[0].name} and {found[1].name}: move one of them away")
        parts.update((part, path) for path in found)
    if "train" not in parts:
        listed = ", ".join([path.name for path in paths[:10]] + ["..."] * (len(paths) > 10)) or "nothing"
        remedy = "rename one of its files, or name the file in place of the folder"
        raise UserError(f"{folder} contains no train.csv, .tsv or .jsonl, but {listed}: {remedy}")
    return parts


def _parts_on_hub(name: str, revision: str | None) -> tuple[dict[str, Path], str]:
    from common.hub import hub_file  # here: the client takes 0.15 s to import, and a folder needs none

    errors: list[UserError] = []
    for folder, suffix in itertools.product(("", "data/"), ON_HUB):
        try:
            train = hub_file(name, f"{folder}train{suffix}", revision, repo_type="dataset")
        except (FileNotOnHub, HubUnreachable) as error:
            errors.append(error)
            continue
        parts, commit = {"train": train}, train.parents[folder.count("/")].name  # the cache names the folder after it
        with contextlib.suppress(FileNotOnHub):
            parts["test"] = hub_file(name, f"{folder}test{suffix}", commit, repo_type="dataset")
        return parts, commit
    if isinstance(errors[0], HubUnreachable):
        raise errors[0]
    raise UserError(
        f"the data set {name} has no train{', train'.join(ON_HUB)} on the hub, neither in its root nor in data/: "
        "download it, save it in one of these forms, and name the file"
    )


# The labels

PLAIN = "text from text, label from label"


def _read_part(path: Path, wanted: Wanted) -> Part:
    rows: list[LabelledRow] = []
    empty: list[tuple[Path, int, str]] = []
    columns, name_column = PLAIN, ""
    is_folder = path.is_dir() and not path.suffix
    if not is_folder and not path.is_file():
        raise UserError(f"{path} is not a regular file")
    table = ((path, row) for row in read_rows(path, wanted.text, wanted.label, labelled=True))
    for source, (line, text, label, fields) in _class_folders(path) if is_folder else table:
        if fields and not rows:
            texts, column = choose_columns(path, line, fields, wanted)
            columns = f"text from {' + '.join(texts)}, label from {column}"
            if line == 1 and path.suffix.lower() not in JSON:
                columns += "; the file has no header"
            name_column = next((key for key in fields if folded(key) == "label_text" and folded(str(column)) == "label"), "")
        if fields and not any(str(value).strip() for value in fields.values()):
            continue  # Excel writes such rows
        if isinstance(label, str):
            label = unicodedata.normalize("NFC", label.strip())
            label = int(label) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", label) else label
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise row_error(source, line, f"the label {shown(label)} is neither a whole number nor a name; make it one")
        empty += [(source, line, what) for what, value in [("text", text), ("label", str(label))] if not value.strip()]
        name = fields.get(name_column)
        name = unicodedata.normalize("NFC", name.strip()) if isinstance(name, str) else None
        if not is_unicode(f"{label}{name}"):
            raise row_error(source, line, "the label contains half a character (a lone surrogate); remove it")
        rows.append(LabelledRow(source, line, text, label, name))
    if empty:
        source, line, what = empty[0]
        message = f"the {what} is empty; fill it in or remove the row"
        if len(empty) > 1:
            counts = Counter(what for *_, what in empty)
            numbers = " and ".join(f"{count:,} {what}{'s' * (count > 1)}" for what, count in counts.items())
            message = f"the {what} is empty. In all, {numbers} are empty{_places(path, empty)}; fill them in or remove the rows"
        raise row_error(source, line, message)
    if not rows:
        raise UserError(f"{path} has no rows" + ", that is no folder for each class with .txt files in it" * is_folder)
    return Part(path, rows, columns)


def _places(path: Path, empty: list[tuple[Path, int, str]]) -> str:
    """Where the first ten are: the lines of a table, or the files of a folder."""
    places = list(
        dict.fromkeys(str(line) if source == path else f"{source.parent.name}/{source.name}" for source, line, _ in empty)
    )
    kind = "lines" if empty[0][0] == path else "files"
    return f" ({kind} {', '.join(places[:10] + ['...'] * (len(places) > 10))})"


def _class_folders(folder: Path) -> Iterator[tuple[Path, Row]]:
    """The form of IMDb: a folder for each class, and in it a file for each text. IMDb's `unsup` has no labels."""
    for path in sorted(folder.glob("*/*.txt")):
        if path.parent.name != "unsup":
            yield path, Row(1, "\n".join(read_texts(path)), path.parent.name, {})


def _label_names(part: Part) -> dict[int | str, str]:
    """label -> name, of the training rows. Classes are numbered in this order: by number or by alphabet."""
    first = part.rows[0].label
    names: dict[int | str, str] = {}
    labels: dict[str, int | str] = {}
    for path, line, _, label, named in part.rows:
        name, message = named or str(label), None
        if type(label) is not type(first):
            message = f"the label {shown(label)} after {shown(first)}; use either numbers or names"
        elif (before := names.setdefault(label, name)) != name:
            message = f"label {shown(label)} is called {shown(name)} here and {shown(before)} before; choose one name"
        elif (other := labels.setdefault(name, label)) != label:
            message = f"labels {shown(other)} and {shown(label)} are both called {shown(name)}; give each its own name"
        if message:
            raise row_error(path, line, message)
    if len(names) == 1:
        raise UserError(f"{part.path}: every row has the label {shown(first)}; at least two classes are needed")
    if isinstance(first, int) and part.path.suffix.lower() == ".csv" and (listed := _listed_names(part.path)):
        listed_names: dict[int | str, str] = dict(enumerate(listed, start := 0 if 0 in names else 1))
        for path, line, _, label, _ in part.rows:
            if label not in listed_names:
                message = f"label {shown(label)} does not fit the {len(listed)} classes in classes.txt"
                raise row_error(path, line, f"{message}; number them from {start} to {start + len(listed) - 1}")
        return {label: listed_names[label] for label in sorted(names)}
    counts = Counter(row.label for row in part.rows)
    single = sum(count == 1 for count in counts.values())
    if len(names) > 2 and single > len(part.rows) / 2:
        raise UserError(
            f"{part.path}: {single} of {len(part.rows)} rows have a label that no other row has ({part.columns}). "
            "Name the columns with --text-column and --label-column (by number if the file has no header)"
        )
    return {label: names[label] for label in sorted(names)}


def _listed_names(table: Path) -> list[str]:
    path = table.with_name("classes.txt")
    names = [name.strip() for name in read_texts(path) if name.strip()] if path.exists() else []
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{path} lists {shown(twice[0])} twice; each class needs a name of its own")
    return names


def _split(part: Part, names: dict[int | str, str]) -> Split:
    for path, line, _, label, named in part.rows:
        if (name := names.get(label)) is None:
            known = ", ".join(map(shown, list(names)[:10]))
            message = f"label {shown(label)} is not in the training part, which has {known}"
            raise row_error(path, line, message + did_you_mean(str(label), map(str, names)))
        if named and name not in (named, str(label)):
            message = f"label {shown(label)} is called {shown(named)}, but {shown(name)} in the training part"
            raise row_error(path, line, f"{message}; choose one name")
    numbers = {label: number for number, label in enumerate(names)}
    return Split([row.text for row in part.rows], np.array([numbers[row.label] for row in part.rows], dtype=np.int64))
