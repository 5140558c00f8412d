"""Lets a loop finish its step before the process ends."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

__all__ = ["caught_signals"]


@contextlib.contextmanager
def caught_signals() -> Iterator[list[signal.Signals]]:
    """Collects the first SIGINT (Ctrl-C) or SIGTERM; a second one raises KeyboardInterrupt.

    Yields:
      The signals caught so far: empty until one arrives.
    """
    caught: list[signal.Signals] = []

    def catch(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number))

    previous = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
