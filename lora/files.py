"""Read JSON and safetensors files with clear errors, and write files whole or not at all."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lora.errors import UserError

LARGEST_JSON = 1 << 26  # bytes; the parsed value may take 20 times as many


def read_bytes(path: Path, largest: int = LARGEST_JSON) -> bytes:
    """The content of a regular file. Raises UserError for anything else, such as a pipe that never ends, or too many bytes."""
    if check_regular(path) > largest:
        raise UserError(f"{path} has more than {largest:,} bytes, which is too much for such a file. Fetch or write it again")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def check_regular(path: Path) -> int:
    """The size of a regular file, in bytes. Raises UserError if it is missing, or a folder, a device or a pipe."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {why(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file. Fetch or write it again")
    return status.st_size


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON value in a file, of type `kind`. Raises UserError if it is missing, damaged or of another type."""
    content = read_bytes(path)
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON in UTF-8 ({error}). Fetch or write it again") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} contains a JSON {type(value).__name__}, not a {kind.__name__}. Fetch or write it again")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name, as a map of the file: copy them before the file can change.

    Raises UserError if it is missing, cut short or of another format.
    """
    with _safetensors_errors(path):
        return safetensors.torch.load_file(path)


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The type ("F32") and the shape of each tensor in a safetensors file, without reading a tensor. Raises as above."""
    with _safetensors_errors(path), safetensors.safe_open(path, framework="pt") as file:
        parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
        return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in parts.items()}


@contextlib.contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    if not os.path.lexists(path):
        raise UserError(f"{path} is missing. Weights are read from safetensors files only")
    check_regular(path)
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}). Fetch or write it again") from error


def make_folder(folder: Path | str) -> Path:
    """Create a folder, and its parents, if it does not exist. Raises UserError if that fails."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be written: {why(error)}") from error
    return Path(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary file beside it, flushed to disk, then renamed.

    Creates the file's folder but not the folders above: if those are gone, something is wrong. Raises UserError.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.write_bytes(content)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {why(error)}") from error
    finally:
        with contextlib.suppress(OSError, ValueError):  # already renamed, or never written
            temporary.unlink()


def flush(path: Path) -> None:
    """Make sure that a file or folder is on the disk, not only in the system's memory."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def why(error: OSError | ValueError) -> str:
    """The reason for an error in words: the system's, or Python's for an impossible name (with a NUL in it, for example)."""
    return getattr(error, "strerror", None) or str(error)
