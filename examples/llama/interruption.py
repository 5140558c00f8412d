"""Lets a loop finish its step before the process ends."""

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["caught_signals"]

_STOPPING = (
    "Stopping after this step. A compilation that is running ends first. The run then saves a "
    "checkpoint. A second Ctrl-C stops at once, without saving."
)


def _print_on_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def caught_signals(
    announce: Callable[[str], None] = _print_on_stderr,
) -> Iterator[list[signal.Signals]]:
    """Collects the first SIGINT (Ctrl-C) or SIGTERM; a second one raises KeyboardInterrupt.

    Args:
      announce: Called in another thread as soon as the first one arrives. Python runs a signal's
        handler in the main thread, which may be in the middle of a compilation of many seconds.

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
        with _announced(frozenset(previous), announce):
            yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _announced(
    numbers: frozenset[signal.Signals], announce: Callable[[str], None]
) -> Iterator[None]:
    """Announces the first of these signals from a thread of its own."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while received := reader.recv(1):
            if received[0] in numbers:
                announce(_STOPPING)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        watcher.join()
        reader.close()
