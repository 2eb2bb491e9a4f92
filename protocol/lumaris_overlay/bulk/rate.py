"""A token bucket for worker threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from lumaris_protocol.limits import KIB

# Slower than this, an honest transfer of one chunk would look like a stall to the other side.
RATE_BYTES_PER_S_MIN = 64 * KIB
_BURST_S = 0.1


class Rate:
    """At most so many bytes a second over all transfers that share it. Thread-safe."""

    def __init__(self, bytes_per_s: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        if bytes_per_s < RATE_BYTES_PER_S_MIN:
            raise ValueError(f"a rate below {RATE_BYTES_PER_S_MIN} bytes/s looks like a stall")
        self.bytes_per_s, self._clock = bytes_per_s, clock
        self._lock = threading.Lock()
        self._paid_until = clock()

    def reserve(self, size_bytes: int) -> float:
        """Seconds to wait before these bytes may be sent, or after they were received."""
        with self._lock:
            now = self._clock()
            start = max(self._paid_until, now - _BURST_S)
            self._paid_until = start + size_bytes / self.bytes_per_s
            return max(0.0, self._paid_until - now)


def make_rate(bytes_per_s: int | None) -> Rate | None:
    """A bucket, or None for no cap. Raises ValueError for a rate that looks like a stall."""
    return None if bytes_per_s is None else Rate(bytes_per_s)
