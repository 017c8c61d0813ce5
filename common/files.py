"""The disk: files read with a clear error, and written whole or not at all."""
# ruff: noqa: F401 - some of the names of lora.files are imported for the other folders

import contextlib
import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from common.errors import UserError, most_like
from lora.files import flush, partial_name, read_bytes, read_json, read_safetensors, replacing, resolve, write_file, writing

with contextlib.suppress(ImportError):  # Windows
    import fcntl

PARTIAL = re.compile(r"\..*\.[0-9a-f]{8}\.partial")  # what lora.files.partial_name gives


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def new_folder(folder: Path | str) -> Iterator[Path]:
    """Write a folder whole or not at all: the block fills a temporary sibling, which is then flushed to disk and renamed.

    A link is followed. An empty folder is replaced, and keeps its permissions. One with the same files already stays as it is,
    because a resumed run writes again what it wrote before it was killed. Any other is refused with a UserError. If the block
    raises, nothing is left behind. What a killed process left behind, the next one removes.
    """
    final = resolve(folder)
    temporary = partial_name(final)
    with writing(folder):
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(final.with_name(glob.escape(final.name[:40])))
        temporary.mkdir()
        try:
            with locked(temporary):
                if final.is_dir():
                    shutil.copystat(final, temporary)
                    with contextlib.suppress(OSError):  # of another group than our own
                        shutil.chown(temporary, group=final.stat().st_gid)
                yield temporary
                for path in [*temporary.rglob("*"), temporary]:
                    flush(path)
                if contents(final) != contents(temporary) or not any(temporary.iterdir()):
                    refuse_to_overwrite(final)
                    os.replace(temporary, final)
                    flush(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def contents(folder: Path) -> dict[Path, str | bool]:
    """Each file in a folder, with its sha256."""
    return {f.relative_to(folder): f.is_file() and sha256_of_file(f) for f in folder.rglob("*") if not f.is_dir()}


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Write a text file whole or not at all: the block fills a temporary sibling, which then takes the place of `path`.

    Half a character, which has no UTF-8, is written as an escape: \\ud800. What a killed process left, the next one removes.
    """
    if is_special(path):
        raise UserError(f"{path} is not a file. Name another one")
    remove_partials(resolve(path).with_name(glob.escape(path.name[:40])))
    with writing(path), replacing(path) as new, new.open("w", -1, "utf-8", "backslashreplace", "") as file, locked(new):
        yield file


def is_special(path: Path) -> bool:
    """Whether there is something that no file may replace: a device, a pipe, a loop of links, or what the shell has opened."""
    is_opened = os.path.abspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    return is_opened or (os.path.lexists(resolve(path)) and not path.is_file())


def remove_partials(pattern: Path) -> None:
    """Remove what killed processes left that wrote files or folders of such names. Those of a process that lives are locked."""
    for path in pattern.parent.glob(f".{pattern.name}.*"):
        if PARTIAL.fullmatch(path.name):
            with contextlib.suppress(OSError, UserError), locked(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def nearest(path: Path) -> str:
    """The end of an error message about a path that is not there: the existing one that it most likely stands for."""
    while not os.path.isdir(path.parent):
        path = path.parent  # the first part that is not there
    close = None
    if not os.path.lexists(path):
        with contextlib.suppress(OSError):
            close = most_like(path.name, [name for name in os.listdir(path.parent) if not name.startswith(".")])
    return f". Did you mean {path.parent / close}?" if close else ""


def is_empty(path: Path) -> bool:
    """Whether nothing is there, or a folder without files. A temporary file that a killed process left does not count."""
    if path.is_dir():
        return all(map(is_empty, path.iterdir()))
    return not os.path.lexists(path) or PARTIAL.fullmatch(path.name) is not None


def refuse_to_overwrite(folder: Path) -> None:
    """Raises UserError unless `folder` is new or empty, and not the current one."""
    with writing(folder):
        if not is_empty(folder):
            raise UserError(f"{folder} exists and is not an empty folder: name another folder, or move it away")
    if resolve(folder) == Path.cwd():
        raise UserError(f"{folder} is the current folder: name another folder")


def require_writable(folder: Path) -> None:
    """Raises UserError if nothing can be written into `folder`, which need not exist yet. Leaves nothing behind."""
    folder = resolve(folder)
    with writing(folder):
        missing = [path for path in [folder, *folder.parents] if not os.path.lexists(path)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        finally:
            for path in missing:
                with contextlib.suppress(OSError):  # it was never made
                    path.rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Lock a folder, and give its handle. Raises UserError if another process has locked it."""
    handle = None
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # Windows and some network file systems have no locks
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another process uses the run folder {folder}. Wait for it, or end it") from error
        yield handle
