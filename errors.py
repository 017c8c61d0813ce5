"""The one class of error for what the user can mend, and what the command line makes of it."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """What is wrong, where, and what to do, in one line. The command line prints it and exits with status 2.

    Anything else that is raised is a bug and keeps its traceback.
    """


class Stopped(Exception):
    """A signal ended the program; the command line prints the message and exits with 128 + the signal's number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def exit_status(program: str, run: Callable[[], object]) -> int:
    """Run a program. Its status: 0 if it ends well, 2 with one line on standard error if the user must mend something, and
    128 + n if signal n ended it."""
    try:
        run()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # whoever reads has read enough: `| head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
