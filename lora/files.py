"""Reading what an adapter folder holds, and writing it whole or not at all."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lora.errors import UserError


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON object (or list) in a file. Raises UserError if it is missing or anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON in UTF-8 ({error}): fetch or write it again") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} holds a JSON {type(value).__name__} where a {kind.__name__} was expected")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, by name. Raises UserError if it is missing, cut short or of another format."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing (weights are read from safetensors files only)") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): fetch or write it again") from error


def make_folder(folder: Path | str) -> Path:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be written: {why(error)}") from error
    return Path(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary sibling, flushed to disk, then renamed. Makes its folder, but no more:
    where that one's own folder has vanished, something is wrong."""
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
        with contextlib.suppress(OSError, ValueError):  # it was renamed, or there is no folder for it
            temporary.unlink()


def flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows has no handle for a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def why(error: OSError | ValueError) -> str:
    """What the system says, or Python of a name that is none (with a NUL, or half a character)."""
    return getattr(error, "strerror", None) or str(error)
