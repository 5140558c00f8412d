"""How long steps take, measured when their results are there and not when they are dispatched."""

import collections
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import jax

__all__ = ["StepTimes"]

T = TypeVar("T")

_STEPS_TIMED = 10_000


class StepTimes:
    """The times of the last steps.

    A step may be dispatched while the one before still runs. Its time therefore begins where the
    one before ended, or where it was dispatched itself if that was later, such as after an
    evaluation.

    Args:
      clock: Seconds from any beginning.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._ended = -math.inf
        self._seconds: collections.deque[float] = collections.deque(maxlen=_STEPS_TIMED)

    def begin(self) -> float:
        """Returns the time at which a step begins, for `wait`."""
        return self._clock()

    def wait(self, began: float, result: T) -> T:
        """Waits for what a step returned, records the step's time and returns the result."""
        result = jax.block_until_ready(result)
        ended = self._clock()
        self._seconds.append(ended - max(began, self._ended))
        self._ended = ended
        return result

    def __len__(self) -> int:
        """Returns how many steps have a time."""
        return len(self._seconds)

    def median(self, last: int | None = None) -> float:
        """Returns the median time in seconds.

        Args:
          last: How many of the last steps to look at. None: all but the first, which also starts
            threads, allocates memory and loads the program; the first if there is no other.
        """
        first = min(1, len(self) - 1) if last is None else max(0, len(self) - last)
        return statistics.median(itertools.islice(self._seconds, first, None))
