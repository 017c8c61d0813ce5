"""The one class of error for what the user can mend, and what the command line makes of it."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from lora.errors import UserError

__all__ = ["Stopped", "UserError", "run_cli"]


class Stopped(Exception):
    """A signal ended the program; the command line prints the message and exits with 128 + the signal's number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


class Output:
    """Standard output or error. After a write that fails (the disk is full, the reader has gone) all else goes nowhere.

    The failure is kept as `error` and, where nothing but the output is wanted, raised: UserError or BrokenPipeError.
    """

    def __init__(self, stream: TextIO | None, raises: bool):
        self.stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 - None: it was closed from the start
        self.raises = raises
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._watch():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._watch():
            self.stream.flush()

    @contextlib.contextmanager
    def _watch(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            with contextlib.suppress(OSError):  # what is left in buffers goes nowhere as well
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.raises:
                self.raise_error()

    def raise_error(self) -> None:
        """Raises what went wrong, if anything did."""
        if isinstance(self.error, BrokenPipeError):
            raise self.error
        if self.error is not None:
            raise UserError(f"standard output cannot be written: {self.error.strerror}")


def run_cli(program: str, run: Callable[[], object], needs_output: bool = True) -> int:
    """Run a program. Its status: 0 if it ends well, 2 with one line on standard error if the user must mend something, and
    128 + n if signal n ended it. One that does not need its output goes on to its end when that cannot be written."""
    streams = sys.stdout, sys.stderr
    sys.stdout = output = Output(sys.stdout, raises=needs_output)
    sys.stderr = Output(sys.stderr, raises=False)
    try:
        run()
        output.flush()
        output.raise_error()
        return 0
    except BrokenPipeError:  # whoever reads has read enough: `| head` is no error
        return 0
    except UserError as error:
        print(f"{program}:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"{program}: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    finally:
        output.raises = False
        output.flush()  # lest Python try when it ends, and fail with a status of its own
        sys.stdout, sys.stderr = streams
