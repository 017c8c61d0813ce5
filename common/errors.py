"""UserError, the one class of error for what the user can fix, and how the command line reports it."""

import contextlib
import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from lora.errors import UserError

# the errors of the system that come from names, permissions and devices, not from this program
ENVIRONMENT = errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EROFS, errno.EIO, errno.EMFILE


def most_like(word: str, known: Iterable[str]) -> str | None:
    """The known word that a mistyped one most likely stands for, if there is one."""
    by_lower_case = {other.lower(): other for other in known}
    close = difflib.get_close_matches(word.lower(), by_lower_case, 1, 0.7)
    return by_lower_case[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message about a mistyped word. Empty if no known word is like it."""
    close = most_like(word, known)
    return f". Did you mean {close}?" if close else ""


class HubUnreachable(UserError):
    """The hub does not answer, and the cache on this machine lacks the file."""


class NotOnHub(UserError):
    """The hub has no such repository."""


class FileNotOnHub(UserError):
    """The repository has no such file."""


class Stopped(KeyboardInterrupt):
    """A signal ended the program. The command line prints the message and exits with 128 + the signal's number.

    In a notebook it is what stopping a cell raises, with a message.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


class Output:
    """Standard output or error. After a write that fails (a full disk, a closed pipe), all further output is dropped.

    `error` keeps the failure, which is raised at once if the output is `needed`.
    """

    def __init__(self, stream: TextIO | None, needed: bool):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 - None: it was closed before the program began
        self.needed = needed
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, write: Callable[..., object], *text: str) -> None:
        try:
            write(*text)
        except OSError as error:
            self.error = self.error or error
            with contextlib.suppress(OSError):  # the text in its buffer is dropped, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.needed:
                raise self.error from None


def run_cli(program: str, run: Callable[[], object], needs_output: bool = True) -> int:
    """Run a program. Returns 0 if it succeeds, 2 after printing a UserError in one line, and 128 + n if signal n ended it.

    If standard output cannot be written, a program that needs it stops at once; another one goes on to its end.
    """
    if "training.interrupt" in sys.modules:  # the libraries are loaded: Ctrl-C is an exception again
        signal.signal(signal.SIGINT, signal.default_int_handler)
    streams = sys.stdout, sys.stderr
    sys.stdout = output = Output(sys.stdout, needs_output)
    sys.stderr = Output(sys.stderr, needed=False)
    try:
        if needs_output and streams[0] is None:
            raise UserError("standard output is closed, so there is no place for the answer. Send it to a file")
        run()
        output.flush()
        if output.error:
            raise output.error
        return 0
    except UserError as error:
        print(f"{program}:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:  # Ctrl-C, or Stopped
        print(f"{program}: {str(stopped) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(stopped, "signal", signal.SIGINT)
    except OSError as error:
        if error is output.error and isinstance(error, BrokenPipeError):  # as after `| head`, which needs no more
            return 0
        if error is not output.error and error.errno not in ENVIRONMENT:
            raise
        where = "standard output" if error is output.error else error.filename or "a file"
        print(f"{program}: {where}: {error.strerror}. Mend that, or name another one", file=sys.stderr)
        return 2
    finally:
        output.needed = False
        output.flush()  # otherwise Python does it at exit, and ends with another status if that fails
        sys.stdout, sys.stderr = streams
