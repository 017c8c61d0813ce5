"""The network: files of the Hugging Face hub, through the hub's own client and its cache."""

import contextlib
import functools
import inspect
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # the client has two ways to fetch a file; only the other one is tested here
from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import tqdm

from common.errors import FileNotOnHub, HubUnreachable, NotOnHub, UserError
from common.files import sha256_of_file

MIN_BYTES = 30_000  # that must arrive within twice the client's time-out, or the download is given up
UNPROMISED = 1 << 28  # bytes; more must be promised before they are sent
constants.DOWNLOAD_CHUNK_SIZE = 1 << 17  # the steps in which a partial file grows on disk, where progress is measured


class BoundedDownload(tqdm):
    """The client's progress bar. It gives up a file that is longer than the hub promised: an endless one, or a gzip bomb."""

    n: float

    def update(self, n: float | None = 1) -> None:
        received = self.n + (n or 0)
        super().update(n)
        self.n = received  # also of a bar that is not shown
        if received > (self.total or UNPROMISED):
            raise OSError("the hub sent more than it promised")


@functools.cache
def hub_is_reachable(seconds: float = 8.0) -> bool:
    """Whether the hub answers within `seconds`. Asked once per run."""
    url = hf_hub_url("distilbert/distilbert-base-uncased", "config.json")
    try:
        answer = _in_thread(get_hf_file_metadata, url, timeout=seconds / 2).result(seconds)
        return answer.commit_hash is not None  # the log-in page of a guest network has none
    except errors.HfHubHTTPError as error:  # "no such file" is an answer; a failing server is not
        return error.response is not None and error.response.status_code < 500
    except Exception:  # offline mode, no route, no name, no certificate, no answer in time
        return False


def hub_file(repo_id: str, filename: str, revision: str | None = None, repo_type: str = "model") -> Path:
    """The path of a file of the hub in the client's cache, downloaded if it is not there yet.

    Raises HubUnreachable if the hub does not answer and the cache lacks the file, NotOnHub or FileNotOnHub if it does not
    exist, and UserError if the revision does not exist, or the download fails.
    """
    kind = {"model": "model", "dataset": "data set"}[repo_type]
    try:
        if hub_is_reachable():
            return _download(repo_id, filename, revision, repo_type)
        # not hf_hub_download(local_files_only=True): its telemetry would still wait for the network
        cached = try_to_load_from_cache(repo_id, filename, revision=revision, repo_type=repo_type)
        if isinstance(cached, str):
            return Path(cached)
        if cached is not None:  # the cache remembers that there is none
            raise errors.EntryNotFoundError("in the cache")
    except errors.RevisionNotFoundError:
        raise UserError(f"the {kind} {repo_id} has no revision {revision!r} on the hub: check the spelling") from None
    except errors.GatedRepoError:
        raise UserError(f"the {kind} {repo_id} is gated: ask for access on its page, then run 'hf auth login'") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise NotOnHub(f"there is no {kind} {repo_id!r}, neither as a folder here nor on {constants.ENDPOINT}") from None
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"the hub did not deliver {filename} of {repo_id} ({_reason(error)}): try again") from error
    except errors.EntryNotFoundError:
        raise FileNotOnHub(f"the {kind} {repo_id} has no {filename} on the hub, and no other file can replace it") from None
    except PermissionError as error:
        raise UserError(f"the hub's cache cannot be written: {error}; set HF_HOME to a folder that can") from error
    except Exception as error:  # the network libraries below the client raise errors of their own
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests", "huggingface_hub", "builtins"):
            raise UserError(f"the download of {filename} of {repo_id} failed ({_reason(error)}): try again") from error
        raise
    raise HubUnreachable(
        f"{constants.ENDPOINT} cannot be reached, and the cache on this machine lacks {filename} of the {kind} {repo_id}: "
        "connect and try again, or name a folder"
    )


def _download(repo_id: str, filename: str, revision: str | None, repo_type: str) -> Path:
    """`hf_hub_download`, but given up when almost nothing arrives; the client alone would wait and retry for minutes.

    Raises TimeoutError then, OSError if a large file's sha256 is wrong, and the client's own errors.
    """
    is_cached = isinstance(try_to_load_from_cache(repo_id, filename, revision=revision, repo_type=repo_type), str)
    can_bound = "tqdm_class" in inspect.signature(hf_hub_download).parameters  # not in the clients before 1.0
    bounded = {"tqdm_class": BoundedDownload} if can_bound else {}
    download = _in_thread(hf_hub_download, repo_id, filename, revision=revision, repo_type=repo_type, **bounded)
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=repo_type) / "blobs"
    patience = 2 * constants.HF_HUB_DOWNLOAD_TIMEOUT  # 20 seconds, unless the environment sets another time-out
    size, since = 0, time.monotonic()
    while not wait([download], timeout=0.2).done:
        if abs(_partial_size(blobs) - size) >= MIN_BYTES:
            size, since = _partial_size(blobs), time.monotonic()
        elif time.monotonic() - since > patience:
            raise TimeoutError(f"the hub sent less than {MIN_BYTES:,} bytes in {patience} seconds")
    path = Path(download.result())
    blob = path.resolve()  # a large file is stored under its sha256
    if not is_cached and re.fullmatch("[0-9a-f]{64}", blob.name) and sha256_of_file(path) != blob.name:
        path.unlink()
        blob.unlink()
        raise OSError("the file that arrived is damaged: its sha256 differs")
    return path


def _in_thread(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> "Future[Any]":
    """Call it in a daemon thread, which can be abandoned: a name server that does not answer ignores all time-outs."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments, **keywords))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def _partial_size(blobs: Path) -> int:
    with contextlib.suppress(FileNotFoundError):  # it was completed, and renamed, at this moment
        return sum(path.stat().st_size for path in blobs.glob("*.incomplete"))
    return 0


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().split("\n")[0] or type(cause).__name__
