"""Imported before the large libraries, which take seconds: until `run_cli`, Ctrl-C ends the program with one line.

(As an exception in the middle of an import it would show a traceback, or be taken for a missing library.)
"""

import os
import signal
from types import FrameType


def stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored, as in the background
    signal.signal(signal.SIGINT, stop)
