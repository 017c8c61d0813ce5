"""Files: from the hub or a folder, checked as they are read; onto the disk whole or not at all."""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import safetensors.torch

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # of the client's two ways to fetch a file, the one that is tested here
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import UserError

LEAST = 30_000  # bytes of a file that the hub has to send in a while
constants.DOWNLOAD_CHUNK_SIZE = 1 << 17  # as large are the pieces in which a file is seen to grow


class HubUnreachable(UserError):
    """The hub does not answer and its cache on this machine lacks the file."""


@functools.cache
def hub_is_reachable(seconds: float = 8.0) -> bool:
    """Whether the hub answers at all, asked once a run and decided within `seconds`.

    In a thread of its own, because a name server that does not answer ignores every time-out given to a socket.
    """
    answers = []

    def ask() -> None:
        try:
            url = hf_hub_url("distilbert/distilbert-base-uncased", "config.json")
            metadata = get_hf_file_metadata(url, timeout=seconds / 2)
            answers.append(metadata.commit_hash is not None)  # else it is the log-in page of some network
        except HfHubHTTPError as error:  # "no such file" is an answer, too; "out of order" is none
            answers.append(error.response is not None and error.response.status_code < 500)
        except Exception:  # offline mode, no route, no name, no certificate: all of them mean no
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers and answers[0])


def hub_file(repo_id: str, filename: str, revision: str | None = None, repo_type: str = "model") -> Path:
    """The path of a file of the hub, in the hub client's cache, downloaded if it is not there yet.

    Raises HubUnreachable if the hub does not answer and the cache lacks the file, and UserError if there is no such
    repository, revision or file.
    """
    what = {"model": "model", "dataset": "data set"}[repo_type]
    try:
        if hub_is_reachable():
            return _download(repo_id, filename, revision, repo_type)
        # hf_hub_download would use the network even if told not to: its telemetry asks the hub, and waits for the name server
        cached = try_to_load_from_cache(repo_id, filename, revision=revision, repo_type=repo_type)
        if isinstance(cached, str):
            return Path(cached)
    except HFValidationError:
        raise UserError(f"{repo_id!r} is neither a folder nor the name of a {what} on the hub: check the spelling") from None
    except RevisionNotFoundError:
        raise UserError(f"the {what} {repo_id} has no revision {revision!r} on the hub: check the spelling") from None
    except GatedRepoError:
        raise UserError(f"the {what} {repo_id} is gated: ask for access on its page, then run 'hf auth login'") from None
    except RepositoryNotFoundError:
        raise UserError(f"there is no {what} {repo_id!r}, neither as a folder here nor on {constants.ENDPOINT}") from None
    except LocalEntryNotFoundError as error:
        raise UserError(f"the hub did not deliver {filename} of {repo_id} ({_reason(error)}): try again") from error
    except EntryNotFoundError:
        raise UserError(f"the {what} {repo_id} has no {filename} on the hub; nothing else is read in its place") from None
    except PermissionError as error:
        raise UserError(f"the hub's cache cannot be written: {error}; set HF_HOME to a folder that can") from error
    except Exception as error:  # whatever the network library of this version of the client raises half-way
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests", "huggingface_hub", "builtins"):
            raise UserError(f"the download of {filename} of {repo_id} broke off ({_reason(error)}): try again") from error
        raise
    raise HubUnreachable(
        f"{constants.ENDPOINT} cannot be reached and the cache on this machine lacks {filename} of the {what} {repo_id}: "
        "connect and try again, or name a folder"
    )


def _download(repo_id: str, filename: str, revision: str | None, repo_type: str) -> Path:
    """`hf_hub_download`, given up when next to nothing comes: by itself it waits, and tries again, for minutes.

    Raises TimeoutError then, OSError if a large file is not the one that was promised, and all that the client raises.
    """
    answer: Future[str] = Future()

    def ask() -> None:
        try:
            answer.set_result(hf_hub_download(repo_id, filename, revision=revision, repo_type=repo_type))
        except Exception as error:
            answer.set_exception(error)

    known = isinstance(try_to_load_from_cache(repo_id, filename, revision=revision, repo_type=repo_type), str)
    threading.Thread(target=ask, daemon=True).start()
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type) / "blobs"
    patience = 2 * constants.HF_HUB_DOWNLOAD_TIMEOUT  # 20 seconds, if the environment does not say another
    size, since = 0, time.monotonic()
    while not wait([answer], timeout=0.2).done:
        if abs(_size_so_far(blobs) - size) >= LEAST:
            size, since = _size_so_far(blobs), time.monotonic()
        elif time.monotonic() - since > patience:
            raise TimeoutError(f"the hub sent less than {LEAST:,} bytes in {patience} seconds")
    path = Path(answer.result())
    blob = path.resolve()
    if not known and re.fullmatch("[0-9a-f]{64}", blob.name) and sha256_of_file(path) != blob.name:
        path.unlink()
        blob.unlink()
        raise OSError("what came is not the file that was promised: its sha256 differs")
    return path


def _size_so_far(blobs: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # it became a whole file at this moment
        return sum(path.stat().st_size for path in blobs.glob("*.incomplete"))
    return 0


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().split("\n")[0] or type(cause).__name__


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


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in the header of a safetensors file. Raises UserError if it is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error


@contextlib.contextmanager
def new_folder(folder: Path | str) -> Iterator[Path]:
    """Within the block, a temporary sibling to fill; after it, flushed to disk and renamed to `folder`, which must be new
    or empty. If the block raises, nothing is left behind."""
    folder = Path(folder)
    refuse_to_overwrite(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}.", dir=folder.parent))  # no longer than a name may be
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())  # as if it had not been made in private
            _flush(path)
        os.replace(temporary, folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_to_overwrite(folder: Path) -> None:
    """Raises UserError if there is anything at `folder` that a new run or model would mix with."""
    try:
        full = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
        here = folder.resolve() == Path.cwd()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be written: {_why(error)}; name another folder") from error
    if full:
        raise UserError(f"{folder} exists and is not an empty folder: name another, or move it away")
    if here:
        raise UserError(f"{folder} is the folder that you are in: name another")


def refuse_if_unwritable(folder: Path) -> None:
    """Raises UserError now if `new_folder(folder)` would later, when its content has been computed. Leaves nothing behind."""
    missing = [path for path in [folder, *folder.parents] if not path.exists()]
    try:
        with new_folder(folder):
            pass
    finally:
        for path in missing:
            with contextlib.suppress(OSError, ValueError):  # it could not be made
                path.rmdir()


def make_folder(folder: Path | str) -> Path:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be written: {_why(error)}") from error
    return Path(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary sibling, flushed to disk, then renamed. Makes its folder, but no more:
    where that one's own folder has vanished, something is wrong."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.write_bytes(content)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {_why(error)}") from error
    finally:
        with contextlib.suppress(OSError, ValueError):  # it was renamed, or there is no folder for it
            temporary.unlink()


def append_line(path: Path, line: str) -> None:
    """Append to a file, and flush it to disk."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows has no handle for a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _why(error: OSError | ValueError) -> str:
    """What the system says, or Python of a name that is none (with a NUL, or half a character)."""
    return getattr(error, "strerror", None) or str(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
