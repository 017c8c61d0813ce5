"""The network: files of the Hugging Face hub, through its own client and its cache."""

import contextlib
import functools
import os
import re
import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path

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

from common.errors import UserError
from common.files import sha256_of_file

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


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().split("\n")[0] or type(cause).__name__
