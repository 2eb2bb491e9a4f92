"""What the database tells of the coordinator's condition, asked at most every METRICS_KEPT_S."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from lumaris_coordinator.bounds import METRICS_KEPT_S
from lumaris_coordinator.events import outbox
from lumaris_coordinator.store.port import Connection, first
from lumaris_coordinator.webhooks import store as webhooks

if TYPE_CHECKING:
    from lumaris_coordinator.app import Coordinator

Gauge = tuple[str, str, float]


class Gauges:
    """(name, kind, value) of everything that is not counted in memory."""

    def __init__(self) -> None:
        self._kept: list[Gauge] = []
        self._until = 0.0
        self._asking = anyio.Lock()

    async def read(self, coordinator: Coordinator) -> list[Gauge]:
        """The gauges, those of the database no older than METRICS_KEPT_S."""
        async with self._asking:
            if anyio.current_time() >= self._until:
                audit = await coordinator.ledger.audit()
                now = coordinator.context.now()
                found = await coordinator.store.scan(lambda connection: _look(connection, now))
                self._kept = [*found, ("unbalanced", "gauge", int(not audit["balanced"]))]
                self._until = anyio.current_time() + METRICS_KEPT_S
        return [*self._kept, *_in_memory(coordinator), *coordinator.money.reconciliation.gauges()]


def _in_memory(coordinator: Coordinator) -> list[Gauge]:
    stats, health = coordinator.store.writer.stats, coordinator.store.health()
    mean = stats.operations / stats.commits if stats.commits else 0.0
    overlay = coordinator.overlay
    found: list[Gauge] = [
        ("up", "gauge", int(health.writes)),
        ("commits_total", "counter", stats.commits),
        ("operations_total", "counter", stats.operations),
        ("failed_batches_total", "counter", stats.failed_batches),
        ("batch_size_mean", "gauge", mean),
        ("batch_size_max", "gauge", stats.batch_largest),
        ("queue_depth", "gauge", health.queue_depth),
        ("last_commit_seconds", "gauge", health.last_commit_s),
        ("event_streams", "gauge", coordinator.events.streams),
        ("events_handed_out", "gauge", coordinator.events.last),
        ("overlay_up", "gauge", int(overlay is not None and overlay.connected)),
        ("offers", "gauge", len(coordinator.offers)),
    ]
    if health.free_bytes is not None:
        found.append(("disk_free_bytes", "gauge", health.free_bytes))
    return found


def _look(connection: Connection, now: int) -> list[Gauge]:
    # Each has a partial index of these very states.
    escrows = first(
        connection, "SELECT count(*) FROM escrow WHERE state IN ('held', 'claimed', 'disputed')"
    )
    # A disputed one has no timer but its dispute's.
    due = first(
        connection,
        "SELECT coalesce(min(settle_by), ?) FROM escrow WHERE state IN ('held', 'claimed')",
        (now,),
    )
    log = first(connection, "SELECT count(*), coalesce(max(size), 0) FROM checkpoint")
    witnesses = first(
        connection,
        "SELECT count(DISTINCT witness) FROM cosignature"
        " WHERE size = (SELECT max(size) FROM cosignature)",
    )
    assert escrows is not None
    assert due is not None
    assert log is not None
    assert witnesses is not None
    endpoints = webhooks.backlog(connection)
    return [
        ("events_head", "gauge", outbox.head(connection)),
        ("escrows_open", "gauge", int(escrows[0])),
        ("timer_overdue_seconds", "gauge", max(0, now - int(due[0]))),
        ("log_size", "gauge", int(log[1])),
        ("checkpoints_total", "counter", int(log[0])),
        ("witnesses", "gauge", int(witnesses[0])),
        ("webhooks", "gauge", endpoints["all"]),
        ("webhooks_busy", "gauge", endpoints["busy"]),
        ("webhooks_failing", "gauge", endpoints["failing"]),
        ("webhooks_disabled", "gauge", endpoints["disabled"]),
    ]
