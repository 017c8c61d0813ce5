"""Ctrl-C and SIGTERM end a run between two steps, and the message says how to resume it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from common.errors import Stopped
from training.checkpoint import newest_first


class Signals:
    """Within `with Signals(run) as signals:`, SIGINT (Ctrl-C) and SIGTERM raise Stopped, which says how to resume.

    Within `with signals.delayed():`, the first signal only sets `received`, so that the step can be finished.
    """

    def __init__(self, run: Path):
        self.run, self.received, self.delay = run, 0, False

    def __enter__(self) -> "Signals":
        is_main = threading.current_thread() is threading.main_thread()  # no other thread gets signals, or may ask for them
        numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        self.before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if not self.delay or self.received:
            self.stop(number)
        self.received = number

    @contextlib.contextmanager
    def delayed(self) -> Iterator[None]:
        self.delay = True
        try:
            yield
        finally:
            self.delay = False
        if self.received:  # after the last step
            self.stop(self.received)

    def stop(self, number: int) -> None:
        resume = f". To continue: python train.py --resume {self.run}" if newest_first(self.run) else ""
        raise Stopped(f"stopped by {signal.Signals(number).name}{resume}", number)
