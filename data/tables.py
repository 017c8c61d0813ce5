"""One reader for every form of file: from the file to rows, one at a time, each with its line, its text and its fields.

.jsonl .ndjson .json        one JSON object per line, or one array of objects
.csv .tsv                   a header and columns, separated by , ; | or tab. Without a header: see `_columns`
.txt, no suffix, stdin      one text per line; to train on, a table like .csv

UTF-8, or UTF-16 with Excel's mark at its beginning.
"""

import contextlib
import csv
import io
import itertools
import json
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError, did_you_mean
from common.files import nearest

JSON, TABLES, TEXTS = (".jsonl", ".ndjson", ".json"), (".csv", ".tsv"), (".txt", "")
SUFFIXES = (*JSON, *TABLES, *TEXTS)
TEXT_COLUMNS = (("text",), ("title", "description"))  # unless they are named: the first that is there. The second is AG News'
LABEL_COLUMNS = ("label", "class", "class index")
LONGEST_TEXT, LONGEST_LINE = 1 << 24, 1 << 29  # characters in one field of a CSV file; in one line, which may be a JSON array
JSON_REMEDY = "write one whole object per line, or one array of objects"
SAMPLE_LINES = 100  # read ahead to see the delimiter, and whether there is a header


class NoColumn(UserError):
    """A table lacks a column that is needed."""


class Row(NamedTuple):
    line: int  # where it begins, counted from 1
    text: str
    label: Any  # as the file has it; None if there is no column for it
    fields: dict[str, Any]  # all of them, by the name of the column


class Wanted(NamedTuple):
    """The columns that the user named, and whether each row must have a label."""

    text: Sequence[str] = ()
    label: str | None = None
    labelled: bool = False


def read_rows(
    path: Path | None, text_columns: Sequence[str] = (), label_column: str | None = None, *, labelled: bool = False
) -> Iterator[Row]:
    """The rows of a file, or of standard input (None), one at a time, so that the file may be larger than memory.

    The columns may be named, or numbered from 1 if the file has no header; several columns of text are joined by spaces.
    With `labelled` each row must have a label, and a .txt is a table, too. Raises UserError, with file and line, for a row
    that cannot be read.
    """
    wanted = Wanted(text_columns, label_column, labelled)
    names: Sequence[str] = ()
    for line, fields in _read_fields(path, wanted):
        if not names:
            names, label = choose_columns(path, line, fields, wanted)
        if missing := [name for name in ([*names, label] if labelled else names) if name not in fields]:
            raise row_error(path, line, f'"{missing[0]}" is missing; each row needs one')
        for value in (fields[name] for name in names):
            if not isinstance(value, str):
                raise row_error(path, line, f"the text {shown(value)} is not a string; put it in quotes")
        text = " ".join([fields[name] for name in names])
        if not is_unicode(text):
            raise row_error(path, line, "the text contains half a character (a lone surrogate); remove it")
        yield Row(line, text, fields.get(label) if label else None, fields)


def choose_columns(path: Path | None, line: int, fields: dict[str, Any], wanted: Wanted) -> tuple[Sequence[str], str | None]:
    """The columns with the text, and the one with the label (None if there is none), from the names or the first row.

    Of two columns, one of which has a known name, the other one is the other. Raises UserError if a column is not there.
    """
    columns = list(fields)
    known = {folded(name): name for name in reversed(columns)} | {name: name for name in columns}

    def find(names: Iterable[str]) -> list[str]:
        return [known.get(name) or known.get(folded(name)) or "" for name in names]

    text = next(filter(all, map(find, [wanted.text] if wanted.text else TEXT_COLUMNS)), [])
    label = next(filter(None, find([wanted.label] if wanted.label else LABEL_COLUMNS)), None)
    if len(columns) == 2 and (text or label):
        other = [name for name in columns if name not in (*text, label)]
        text = text or ([] if wanted.text else [name for name in other if not _is_number(str(fields[name]))])
        label = label or (None if wanted.label or not other else other[0])
    if not text or (wanted.labelled and label is None):
        missing = (wanted.label or "label") if text else next((name for name in wanted.text if not find([name])[0]), "text")
        found = ", ".join(f"{name} ({shown(fields[name])})" if name.isdecimal() else shown(name) for name in columns[:20])
        options = "the columns with --text-column and --label-column" if wanted.labelled else "the column with --text-column"
        remedy = f"Name {options} (by number if the file has no header)"
        message = f'no column is called "{missing}"; there are {found}. {remedy}{did_you_mean(missing, columns)}'
        raise NoColumn(str(row_error(path, line, message)))
    return text, label


def folded(name: str) -> str:
    """Names of columns are compared without regard to case."""
    return unicodedata.normalize("NFC", name.strip()).casefold()


def is_unicode(text: str) -> bool:
    """Whether it has no lone surrogate, which comes from a byte that is not UTF-8 or from a JSON escape such as \\ud800."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def row_error(path: Path | None, line: int, message: str) -> UserError:
    return UserError(f"{path or 'standard input'}, line {line}: {message}")


def shown(value: object) -> str:
    """A value in a message: short, since it may be a whole article in the wrong column."""
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# From the file to lines


def _read_fields(path: Path | None, wanted: Wanted) -> Iterator[tuple[int, dict[str, Any]]]:
    suffix = path.suffix.lower() if path else ""
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: a {suffix} file is not read; save it as .csv, .tsv, .jsonl or .json")
    is_text = suffix in TEXTS and not wanted.labelled
    try:
        with open(0 if path is None else path, "rb", closefd=path is not None) as binary:  # 0 is standard input
            start = binary.peek(2)[:2]
            encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
            if b"\0" in start and not is_text:  # no table in UTF-8 begins so
                encoding = "utf-16-be" if start[0] == 0 else "utf-16-le"
            # Bytes that are not UTF-8 become lone surrogates, in which _utf8_lines sees the line that they are in.
            lines = _utf8_lines(path, io.TextIOWrapper(binary, encoding, "surrogateescape", newline=""))
            if is_text:
                yield from ((number, {"text": line.rstrip("\r\n")}) for number, line in enumerate(lines, 1))
            elif suffix in JSON:
                yield from _json_rows(path, lines)
            else:
                yield from _table_rows(path, lines, wanted, "\t,;|" if suffix == ".tsv" else ",;\t|")
    except OSError as error:
        hint = nearest(path) if path else ""
        raise UserError(f"{path or 'standard input'} cannot be read: {error.strerror}{hint}") from error
    except UnicodeError as error:
        raise UserError(f"{path or 'standard input'} begins as UTF-16, but is not; save the file as UTF-8") from error


def _utf8_lines(path: Path | None, file: io.TextIOWrapper) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), ""), 1):
        if len(line) > LONGEST_LINE:
            raise row_error(path, number, f"longer than {LONGEST_LINE:,} characters; split it")
        if not is_unicode(line):
            place = len(re.split("[\udc80-\udcff]", line)[0])
            excerpt = line[max(0, place - 12) : place + 12].encode("utf-8", "surrogateescape").decode("cp1252", "replace")
            command = f"iconv -f WINDOWS-1252 -t UTF-8 {shlex.quote(str(path)) if path else ''} > NEW_FILE"
            guess = "" if "\ufffd" in excerpt else f" (if {shown(excerpt.strip())} reads right: {command})"
            raise row_error(path, number, f"not UTF-8{guess}; save the file as UTF-8")
        yield line


# From lines to fields


def _json_rows(path: Path | None, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """One object per line, or one array of objects; each with the line where it begins."""
    is_first = True
    for number, text in enumerate(lines, 1):
        if is_first and text.lstrip().startswith("["):
            yield from _array_rows(path, number, text + "".join(lines))
        elif text.strip():
            is_first, text = False, text.rstrip("\r\n")
            fields, end = _object_at(path, number, number, text, len(text) - len(text.lstrip()))
            if text[end:].strip():
                raise row_error(path, number, f"not JSON (more than one value, at column {end + 1}); {JSON_REMEDY}")
            yield number, fields


def _array_rows(path: Path | None, first_line: int, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    line, before = first_line, 0
    mark = re.compile(r"\s*\[\s*(\])?").match(text)
    while mark and not mark[1]:
        line, before = line + text.count("\n", before, mark.end()), mark.end()
        fields, end = _object_at(path, first_line, line, text, mark.end())
        yield line, fields
        mark = re.compile(r"\s*(?:,|(\]))\s*").match(text, end)
    if not mark or text[mark.end() :].strip():
        raise row_error(path, line, f"not JSON (after this object there is neither a comma nor the end); {JSON_REMEDY}")


def _object_at(path: Path | None, first_line: int, line: int, text: str, start: int) -> tuple[dict[str, Any], int]:
    """The JSON object at `start` of a text that begins on `first_line`, and where it ends. The object begins on `line`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(fields := dict(pairs)) < len(pairs):
            name = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise row_error(path, line, f"{shown(name)} is there twice; remove one of the two")
        return fields

    try:
        fields, end = json.JSONDecoder(object_pairs_hook=once).raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            reason, line = f"{error.msg} at column {error.colno}", first_line + error.lineno - 1
        raise row_error(path, line, f"not JSON ({reason}); {JSON_REMEDY}") from error
    if not isinstance(fields, dict):
        raise row_error(path, line, 'not a JSON object; write {"text": ...} on each line')
    return fields, end


def _table_rows(
    path: Path | None, lines: Iterator[str], wanted: Wanted, delimiters: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(LONGEST_TEXT)
    sample = list(itertools.islice(lines, SAMPLE_LINES))
    start = 1
    if sample and (told := re.fullmatch(r'"?sep=(.)"?\s*', sample[0])):  # Excel's own way
        start, delimiters, sample = 2, told[1], sample[1:]
    samples = {delimiter: _sample_values(sample, delimiter) for delimiter in delimiters}
    delimiter = max(samples, key=lambda delimiter: _fit(samples[delimiter]))
    rows = _values(path, itertools.chain(sample, lines), delimiter, start)
    for line, values in itertools.islice(rows, 1):
        columns, header = _columns(values, samples[delimiter], wanted)
        if twice := [name for name, times in Counter(map(folded, columns)).items() if times > 1]:
            raise row_error(path, line, f"two columns are called {shown(twice[0])}; rename one of them")
        choose_columns(path, line, dict(zip(columns, values, strict=True)), wanted)
        if not header:
            rows = itertools.chain([(line, values)], rows)
    for line, values in rows:
        if values == header and len(header) > 1:
            raise row_error(path, line, "the header once more; remove the row")
        if len(values) != len(columns) and (len(values) < len(columns) or any(values[len(columns) :])):
            remedy = "write each row on one line" if delimiter == "\t" else "put quotes around each text"
            raise row_error(path, line, f"{len(values)} fields, but {len(columns)} columns; {remedy}")
        yield line, dict(zip(columns, values, strict=False))  # empty fields at the end are Excel's


def _fit(rows: list[list[str]]) -> tuple[float, int]:
    """How well a delimiter fits: by the share of rows with as many fields as the first, then by the number of fields."""
    fields = [len(values) for values in rows]
    return (fields.count(fields[0]) / len(fields), fields[0]) if fields and fields[0] > 1 else (0, 0)


def _sample_values(sample: list[str], delimiter: str) -> list[list[str]]:
    rows: list[list[str]] = []
    with contextlib.suppress(UserError):  # also in the middle of a row
        rows.extend(values for _, values in _values(None, iter(sample), delimiter, 1))
    return rows


def _columns(first: list[str], sample: list[list[str]], wanted: Wanted) -> tuple[list[str], list[str]]:
    """The names of the columns, and the header; the header is empty if the first row is data, and the columns are numbered.

    The first row is data if one of its cells is a number, or comes again in its column. Then two columns are a text and a
    label, the one with fewer values; three may be AG News' class, title and description.
    """
    typed = [*wanted.text, *filter(None, [wanted.label])]
    by_number = bool(typed) and all(name.isdecimal() for name in typed)
    numbers = [str(number) for number in range(1, len(first) + 1)]
    names = [cell.strip() or number for cell, number in zip(first, numbers, strict=True)]
    columns = [[row[i] for row in sample if i < len(row)] for i in range(len(first))]
    is_data = any(_is_number(cell) or (cell and columns[i].count(cell) > 1) for i, cell in enumerate(first))
    if {"text", *LABEL_COLUMNS, *TEXT_COLUMNS[1]} & set(map(folded, names)):
        is_data = False
    elif by_number and not wanted.labelled:
        is_data = True  # rather a header too many than a text too few
    elif typed and not by_number:
        is_data = False
    if not is_data:
        return numbers if by_number else names, first
    if not by_number and len(first) == 2:
        spread = [(len(set(column)), sum(map(len, column))) for column in columns]
        return (["text", "label"] if spread[1] < spread[0] else ["label", "text"]), []
    if not by_number and len(first) == 3 and first[0].strip().isdecimal():
        return ["class", "title", "description"], []
    return numbers, []


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", cell.strip()) is not None


def _values(path: Path | None, lines: Iterator[str], delimiter: str, start: int) -> Iterator[tuple[int, list[str]]]:
    """The fields of each row that is not a blank line. With tabs a row is one line, and a quote within a text is only that."""
    if delimiter == "\t":
        for number, line in enumerate(lines, start):
            if line.strip("\r\n"):
                try:
                    yield number, next(csv.reader([line], delimiter=delimiter, strict=True))
                except csv.Error:
                    yield number, line.rstrip("\r\n").split(delimiter)
        return
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    begin = start  # the line where the next row begins: a quoted text may span several
    try:
        for values in reader:
            if values:
                yield begin, values
            begin = reader.line_num + start
    except csv.Error as error:
        raise row_error(path, begin, f"the row that begins here is not CSV ({error}); check its quotes") from error
