"""Counters in memory, and the Prometheus text of all that is measured."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from lumaris_coordinator.store.port import Connection

if TYPE_CHECKING:
    from lumaris_coordinator.store.writer import WriterStats

# Seconds. A commit is a disk's sync; a request is that and the work around it.
_COMMIT_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0)
_REQUEST_S: Final = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_BATCH: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SWITCHED: Final = 101
_EVENTS: Final = "GET /v1/events"


class Histogram:
    """Counts by upper bound, cumulative only when written."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Something was measured."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> list[str]:
        """The Prometheus lines."""
        found, total = [f"# TYPE {name} histogram"], 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*found, f"{name}_sum {self._sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """Requests by route, and commits. A route is its template, so strangers make no new ones."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self._took = Histogram(_REQUEST_S)
        self.commits = Commits()

    def count(self, route: str, status: int, took_s: float) -> None:
        """A request was answered."""
        self.requests[route, status] += 1
        if status != _SWITCHED and route != _EVENTS:  # a stream's length is not a latency
            self._took.add(took_s)

    def text(self, gauges: Iterable[tuple[str, str, float]]) -> str:
        """The Prometheus text exposition, with (name, kind, value) of what is read elsewhere."""
        lines = ["# TYPE lumaris_requests_total counter"]
        lines += [
            f'lumaris_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        lines += self._took.lines("lumaris_request_seconds")
        lines += self.commits.took.lines("lumaris_commit_seconds")
        lines += self.commits.batch.lines("lumaris_batch_operations")
        for name, kind, value in gauges:
            lines += [f"# TYPE lumaris_{name} {kind}", f"lumaris_{name} {value:.15g}"]
        return "\n".join(lines) + "\n"


class Commits:
    """A hook of the writer: how long a batch's commit takes, and how many operations it holds.

    Called in the writer's thread alone; what reads it may see a batch late.
    """

    def __init__(self) -> None:
        self.took, self.batch = Histogram(_COMMIT_S), Histogram(_BATCH)
        self.stats: WriterStats | None = None  # of the writer that it is a hook of
        self._begun, self._counted = 0.0, 0

    def opened(self, connection: Connection) -> None:
        """Nothing is measured of that."""

    def followed(self, connection: Connection) -> None:
        """Other replicas measure their own commits."""

    def before_commit(self, connection: Connection, now: int) -> None:
        """The operations have run: what follows is the commit."""
        self._begun = time.perf_counter()

    def committed(self) -> None:
        """The batch is durable, and counted in the writer's statistics."""
        self.took.add(time.perf_counter() - self._begun)
        if self.stats is not None:
            self.batch.add(self.stats.operations - self._counted)
            self._counted = self.stats.operations
