"""Counters in memory, and their Prometheus text."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lumaris_coordinator.store.writer import Writer


class Metrics:
    """Requests by route. A route is its template, so strangers cannot make new ones."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()

    def count(self, route: str, status: int) -> None:
        """A request was answered."""
        self.requests[route, status] += 1

    def text(self, writer: Writer) -> str:
        """The Prometheus text exposition."""
        stats = writer.stats
        mean = stats.operations / stats.commits if stats.commits else 0.0
        lines = ["# TYPE lumaris_requests_total counter"]
        lines += [
            f'lumaris_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        for name, kind, value in (
            ("commits_total", "counter", stats.commits),
            ("operations_total", "counter", stats.operations),
            ("failed_batches_total", "counter", stats.failed_batches),
            ("batch_size_mean", "gauge", f"{mean:.3f}"),
            ("batch_size_max", "gauge", stats.batch_largest),
            ("queue_depth", "gauge", writer.depth),
        ):
            lines += [f"# TYPE lumaris_{name} {kind}", f"lumaris_{name} {value}"]
        return "\n".join(lines) + "\n"
