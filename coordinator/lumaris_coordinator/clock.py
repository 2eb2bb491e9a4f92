"""A clock that deadlines can be held to: it never goes back and follows jumps slowly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

# How much faster or slower than real time a wall clock that jumped is followed: a step of a minute
# is made good in ten, and crosses no deadline on the way.
_SLEW: Final = 0.1


def _elapsed() -> float:
    """Seconds of real time, those in which the machine slept included."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class SteadyClock:
    """The wall clock's time, smoothed against one that counts seconds and knows no date.

    Call it for the seconds since 1970. Any thread may.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = _elapsed,
    ) -> None:
        self._wall, self._elapsed = wall, elapsed
        self._guard = threading.Lock()
        self._now, self._seen = wall(), elapsed()

    def __call__(self) -> float:
        """Seconds since 1970."""
        with self._guard:
            seen = self._elapsed()
            passed, self._seen = max(0.0, seen - self._seen), seen
            expected = self._now + passed
            error = self._wall() - expected
            self._now = expected + max(-_SLEW * passed, min(_SLEW * passed, error))
            return self._now
