"""The one class of error for what the user can mend, and what the command line makes of it."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """What is wrong, where, and what to do, in one line. The command line prints it and exits with status 2.

    Anything else that is raised is a bug and keeps its traceback.
    """


def exit_status(program: str, run: Callable[[], object]) -> int:
    """Run a program: 0 if it ends well, 2 and one line on standard error if the user must mend something, 130 after Ctrl-C."""
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
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
