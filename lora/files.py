"""Read JSON and safetensors files with clear errors, and write files whole or not at all."""

import contextlib
import json
import os
import shutil
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
    if regular_size(path) > largest:
        raise UserError(f"{path} has more than {largest:,} bytes, which is too much for such a file. Fetch or write it again")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def regular_size(path: Path) -> int:
    """The size of a file, in bytes. Raises UserError if it is missing, or a folder, a device or a pipe."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        hint = ". Weights are read from safetensors files only" if path.suffix == ".safetensors" else ""
        raise UserError(f"{path} is missing{hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not path.is_file():
        raise UserError(f"{path} is not a regular file. Fetch or write it again")
    return size


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
    regular_size(path)
    try:
        return safetensors.torch.load_file(path)
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


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """In this block, an error of the system is a UserError that says that `path` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def make_folder(folder: Path | str) -> Path:
    """Create a folder, and its parents, if it does not exist. Raises UserError if that fails."""
    with writing(folder):
        resolve(folder).mkdir(parents=True, exist_ok=True)
        Path(folder).stat()  # fails for a/../b where there is no a
    return Path(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary file beside it, flushed to disk, then renamed.

    A link is followed, and a file that is replaced keeps its permissions. Creates the file's folder but not the folders above:
    if those are gone, something is wrong. Raises UserError.
    """
    with writing(path):
        resolve(path).parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(path, temporary)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The block writes a temporary file, which is flushed to disk and takes the place of `path`, or of what it links to."""
    file = resolve(path)
    if os.path.lexists(file) and not file.is_file():  # a device, a pipe, a loop of links
        raise UserError(f"{path} is not a file. Name another one")
    temporary = partial_name(file)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, file)
        flush(file.parent)
    finally:
        temporary.unlink(missing_ok=True)  # if it was not renamed


def partial_name(path: Path) -> Path:
    """A new name beside `path`: .NAME.1f3a9c02.partial. (NAME is cut, because names have a limit.)"""
    return path.with_name(f".{path.name[:40]}.{os.urandom(4).hex()}.partial")


def resolve(path: Path | str) -> Path:
    """The absolute path, links followed. Raises UserError for an impossible name, with a NUL in it for example."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def flush(path: Path) -> None:
    """Make sure that a file or folder is on the disk, not only in the system's memory."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
