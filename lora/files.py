"""Read JSON and safetensors files with clear errors, and write files whole or not at all."""

import contextlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lora.errors import UserError

LARGEST_JSON = 1 << 26  # bytes; the parsed value may take 20 times as many


def read_bytes(path: Path, largest: int = LARGEST_JSON) -> bytes:
    """The content of a regular file. Raises UserError for anything else, such as a pipe that never ends, or too many bytes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file. Fetch or write it again")
    if status.st_size > largest:
        raise UserError(f"{path} has {status.st_size:,} bytes. More than {largest:,} are not read. Fetch or write it again")
    return path.read_bytes()


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON value in a file, of type `kind`. Raises UserError if it is missing, damaged or of another type."""
    try:
        value = json.loads(read_bytes(path).decode())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON in UTF-8 ({error}). Fetch or write it again") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} contains a JSON {type(value).__name__}, not a {kind.__name__}. Fetch or write it again")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name. Raises UserError if it is missing, cut short or of another format."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Weights are read from safetensors files only") from None
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
