"""The group-commit writer: many requests, one disk sync.

One thread owns the only connection that writes. It takes everything that is waiting, runs each
operation in its own savepoint inside one transaction, commits, and only then tells the callers.
Nothing lingers on purpose: what queued up during the last commit is the next batch, so the batch
grows with the load and a lone request waits for no one.

An operation that raises loses its savepoint and nothing else. When the transaction itself fails,
nobody is told that anything happened, and the connection is opened anew.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import anyio
import anyio.lowlevel
import anyio.to_thread

from lumaris_coordinator.bounds import WRITE_S_MAX, WRITER_BATCH_MAX, WRITER_QUEUE_MAX
from lumaris_coordinator.store.port import Connection
from lumaris_protocol.errors import LumarisError

log = logging.getLogger(__name__)

T = TypeVar("T")
Operation = Callable[[Connection], T]


class BatchHook(Protocol):
    """Something that follows the batches: the receipts log. Called in the writer's thread."""

    def opened(self, connection: Connection) -> None:
        """The connection is new; what was seen of uncommitted batches is void."""

    def before_commit(self, connection: Connection, now: int) -> None:
        """All operations of the batch have run."""

    def committed(self) -> None:
        """The batch is durable."""


@dataclass(eq=False)
class _Job:
    operation: Operation[Any]
    done: anyio.Event = field(default_factory=anyio.Event)
    value: Any = None
    error: Exception | None = None


@dataclass
class WriterStats:
    """Counted since the start."""

    commits: int = 0
    operations: int = 0
    failed_batches: int = 0
    batch_largest: int = 0


class Writer:
    """Submit operations; they are durable when `submit` returns."""

    def __init__(
        self,
        connect: Callable[[], Connection],
        *,
        hooks: Sequence[BatchHook] = (),
        clock: Callable[[], float],
        queue_max: int = WRITER_QUEUE_MAX,
        batch_max: int = WRITER_BATCH_MAX,
    ) -> None:
        self._connect = connect
        self._hooks = tuple(hooks)
        self._clock = clock
        self._queue_max, self._batch_max = queue_max, batch_max
        self._pending: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._stopping = True
        self._connection: Connection | None = None
        self._post: Callable[..., object] | None = None
        self.stats = WriterStats()

    @property
    def depth(self) -> int:
        """Operations that wait."""
        return len(self._pending)

    @property
    def alive(self) -> bool:
        """Whether operations are taken and the store is open."""
        return not self._stopping and self._connection is not None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open the store and run the thread; on the way out everything queued is still written."""
        self._connection = self._open()
        # asyncio and trio each have one thread-safe way in; anyio's own blocks the calling thread.
        native: Any = anyio.lowlevel.current_token().native_token
        self._post = getattr(native, "call_soon_threadsafe", None) or native.run_sync_soon
        self._stopping = False
        thread = threading.Thread(target=self._run, name="lumaris-writer", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._wake:
                self._stopping = True
                self._wake.notify()
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(thread.join, WRITE_S_MAX)
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    async def submit(self, operation: Operation[T]) -> T:
        """Run an operation in the next batch; its result once that is durable.

        Raises what the operation raises, and LumarisError `busy` when the queue is full, when the
        commit failed or when it takes too long. After the last, the same request may be repeated:
        every operation here is idempotent.
        """
        job = _Job(operation)
        with self._wake:
            if self._stopping:
                raise LumarisError("busy", "The coordinator is shutting down.")
            if len(self._pending) >= self._queue_max:
                raise LumarisError("busy")
            self._pending.append(job)
            self._wake.notify()
        with anyio.move_on_after(WRITE_S_MAX):
            await job.done.wait()
        if not job.done.is_set():
            raise _unconfirmed()
        if job.error is not None:
            raise job.error
        return cast("T", job.value)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._pending and not self._stopping:
                    self._wake.wait()
                if not self._pending:
                    return
                size = min(len(self._pending), self._batch_max)
                batch = [self._pending.popleft() for _ in range(size)]
            self._commit(batch)
            self._deliver(batch)

    def _commit(self, batch: list[_Job]) -> None:
        try:
            if self._connection is None:
                self._connection = self._open()
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            for job in batch:
                _run_one(connection, job)
            for hook in self._hooks:
                hook.before_commit(connection, int(self._clock()))
            connection.execute("COMMIT")
        except Exception:
            log.exception("a batch of %d operations was not committed", len(batch))
            self.stats.failed_batches += 1
            self._drop()
            for job in batch:
                job.value = None
                job.error = _unconfirmed()
            return
        self.stats.commits += 1
        self.stats.operations += len(batch)
        self.stats.batch_largest = max(self.stats.batch_largest, len(batch))
        for hook in self._hooks:
            hook.committed()

    def _open(self) -> Connection:
        connection = self._connect()
        try:
            for hook in self._hooks:
                hook.opened(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _drop(self) -> None:
        """Let go of a connection whose transaction failed; closing it rolls back what is left."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except Exception:
                log.exception("the failed connection could not be closed")

    def _deliver(self, batch: list[_Job]) -> None:
        assert self._post is not None
        try:
            self._post(_set_all, batch)
        except RuntimeError:
            # The event loop has ended (trio's RunFinishedError is one too): nobody waits any more.
            log.debug("%d results came after the end of the event loop", len(batch))


def _run_one(connection: Connection, job: _Job) -> None:
    """One operation in its savepoint. Raises only when the transaction itself is gone."""
    connection.execute("SAVEPOINT operation")
    try:
        job.value = job.operation(connection)
    except Exception as error:
        job.error = error
        connection.execute("ROLLBACK TO operation")
    connection.execute("RELEASE operation")


def _unconfirmed() -> LumarisError:
    """Refused for all we know; a disk that failed in the commit may have kept it all the same."""
    return LumarisError(
        "busy",
        "The write could not be confirmed: it is not known whether it was kept and money moved.",
        hint="Repeat the same request: it is applied once at most.",
    )


def _set_all(batch: list[_Job]) -> None:
    for job in batch:
        job.done.set()
