"""The disk: files read with a clear error, and written whole or not at all."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from common.errors import UserError
from lora.files import flush, make_folder, read_bytes, read_header, read_json, read_safetensors, why, write_file  # noqa: F401


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def new_folder(folder: Path | str) -> Iterator[Path]:
    """Write a folder whole or not at all: the block fills a temporary sibling, which is then flushed to disk and renamed.

    `folder` must be new or empty. If the block raises, nothing is left behind.
    """
    folder = Path(folder)
    refuse_to_overwrite(folder)
    prefix = f".{folder.name[:40]}."  # names have a limit
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as name:
            temporary = Path(name)
            yield temporary
            umask = os.umask(0)  # the only way to read it is to set it
            os.umask(umask)
            for path in [*temporary.rglob("*"), temporary]:
                path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)  # the temporary folder is private
                flush(path)
            os.replace(temporary, folder)
            flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Write a text file whole or not at all: the block fills a temporary sibling, which then takes the place of `path`.

    Half a character, which has no UTF-8, is written as an escape such as \\ud800.
    """
    try:
        path = path.resolve()  # not the link, but what it points to
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file: name another one")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {why(error)}") from error
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            yield file
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {why(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # already renamed, or never written
            temporary.unlink()


def refuse_to_overwrite(folder: Path) -> None:
    """Raises UserError unless `folder` is new or empty, and not the current one."""
    try:
        is_taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        is_current = os.path.realpath(folder) == os.getcwd()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be written: {why(error)}; name another folder") from error
    if is_taken:
        raise UserError(f"{folder} exists and is not an empty folder: name another folder, or move it away")
    if is_current:
        raise UserError(f"{folder} is the current folder: name another folder")


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, and flush it to disk."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
