"""Read JSON and safetensors files with clear errors, and write files whole or not at all."""

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
    """The JSON value in a file, of type `kind`. Raises UserError if it is missing, damaged or of another type."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
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


def find_folder(model_id: str | Path, hub: dict[str, Any], files: tuple[str, ...]) -> Path:
    """`model_id` if it can be a folder, or else where these files of the hub's repository "owner/name" are stored now.

    hub: options of huggingface_hub.hf_hub_download, such as revision and token. Raises UserError if a file cannot be fetched.
    """
    owner, _, name = str(model_id).partition("/")
    if not owner or not name or "/" in name or os.path.exists(owner):
        return Path(model_id)
    try:
        from huggingface_hub import hf_hub_download

        paths = [hf_hub_download(str(model_id), file, **hub) for file in files]
        return Path(paths[0]).parent
    except Exception as error:  # of the network, the hub or its client; or there is no client
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{model_id} is not a folder, and the hub does not give it: {reason}") from error


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
