"""Texts to label, one at a time, from a file or standard input of any size."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from common.errors import UserError
from data.datasets import LONGEST_TEXT


def read_texts(path: Path | None) -> Iterator[str]:
    """The texts of a .jsonl or .csv file (its field `text`), or of any other file or standard input (None), a line each.

    Raises UserError, with file and line, for what cannot be read.
    """
    csv.field_size_limit(LONGEST_TEXT)
    if path is None:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # whatever the terminal's language
        yield from _read(sys.stdin, "standard input", "")
        return
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from _read(file, str(path), path.suffix.lower())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _read(file: TextIO, name: str, suffix: str) -> Iterator[str]:
    line = 0
    try:
        if suffix == ".csv":
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
            for row in reader:
                line = reader.line_num
                text = row.get("text")
                if text is None:
                    raise UserError(f"{name}, line {line}: want a field `text`, named in the first line")
                if None in row:  # else the rest of a text after its comma would be lost
                    raise UserError(f"{name}, line {line}: more fields than the first line names: quote the texts")
                yield text
        for line, content in enumerate(file, 1):  # noqa: B007 - for the errors below
            if suffix != ".jsonl":
                yield content.rstrip("\r\n")
            elif content.strip():
                yield _text_of(content)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{name}, after line {line}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    except (ValueError, RecursionError, KeyError, TypeError, csv.Error) as error:  # ValueError: also a number of 5,000 digits
        want = "CSV" if suffix == ".csv" else 'an object with a string "text"'
        raise UserError(f"{name}, line {line}: want {want} ({error})") from error


def _text_of(line: str) -> str:
    text = json.loads(line)["text"]
    if not isinstance(text, str):
        raise TypeError("text is no string")
    text.encode()  # JSON can smuggle in half a character
    return text
