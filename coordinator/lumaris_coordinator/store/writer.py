"""The group-commit writer: many requests, one disk sync.

One thread owns the only connection that writes. It takes everything that is waiting, runs each
operation in its own savepoint inside one transaction, commits, and only then tells the callers.
Nothing lingers on purpose: what queued up during the last commit is the next batch, so the batch
grows with the load and a lone request waits for no one.

Two threads that both run Python share one interpreter, and hand it over at every statement. So
where a statement waits for nothing, the operations run in the event loop's thread, a few at a time;
the writer's own begins and commits, which is what waits for the disk.

An operation that raises loses its savepoint and nothing else. Over a line an error may be noticed
late; then the operations after it run again, each of them waited for. When the transaction itself
fails, nobody is told that anything happened, and the connection is opened anew. A batch that could
not even begin changed nothing, so it is tried again for a while: a database that restarts costs its
callers a moment and no answer. While it fails, the writer tries by itself, ever more rarely, so
that it is well again before the next request asks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import anyio
import anyio.lowlevel
import anyio.to_thread

from lumaris_coordinator.bounds import (
    OPERATIONS_PER_TURN_MAX,
    WRITE_AGAIN_S_MAX,
    WRITE_S_MAX,
    WRITER_BATCH_MAX,
    WRITER_QUEUE_MAX,
    WRITER_REST_S,
    WRITER_REST_S_MAX,
    WRITER_STALLED_QUEUE_MAX,
    WRITER_STALLED_S,
)
from lumaris_coordinator.store.bus import Bus
from lumaris_coordinator.store.port import Connection, Late, all_rows
from lumaris_coordinator.store.turns import Turn
from lumaris_protocol.errors import LumarisError

log = logging.getLogger(__name__)

T = TypeVar("T")
Operation = Callable[[Connection], T]


class BatchHook(Protocol):
    """Something that follows the batches: the receipts log. Called in the writer's thread."""

    def opened(self, connection: Connection) -> None:
        """The connection is new; what was seen of uncommitted batches is void."""

    def followed(self, connection: Connection) -> None:
        """Other replicas may have committed since; nothing of ours is uncommitted."""

    def before_commit(self, connection: Connection, now: int) -> None:
        """All operations of the batch have run."""

    def committed(self) -> None:
        """The batch is durable."""


@dataclass(eq=False)
class _Job:
    operation: Operation[Any]
    since: float = field(default_factory=time.monotonic)
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
    committed_at: float = field(default_factory=time.monotonic)  # monotonic seconds


def _no_failure(_error: Exception) -> bool:
    return False


class Writer:
    """Submit operations; they are durable when `submit` returns.

    `failed` tells an error of the database itself, which ends the batch, from one of an operation.
    `follows` says that others write as well, `local` that statements wait for nothing: then the
    operations run in the event loop's thread. `probe` is written to find out whether a database
    that failed is well again.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        *,
        hooks: Sequence[BatchHook] = (),
        clock: Callable[[], float],
        failed: Callable[[Exception], bool] = _no_failure,
        follows: bool = False,
        local: bool = False,
        probe: Operation[None] | None = None,
        queue_max: int = WRITER_QUEUE_MAX,
        batch_max: int = WRITER_BATCH_MAX,
    ) -> None:
        self._connect = connect
        self._hooks = tuple(hooks)
        self._clock = clock
        self._failed, self._follows, self._probe = failed, follows, probe
        self._local = local
        self._queue_max, self._batch_max = queue_max, batch_max
        self._pending: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._stopping = True
        self._to_follow = False
        self._rest = 0.0  # above 0 while it fails
        self._connection: Connection | None = None
        self._post: Callable[..., object] | None = None
        self.bus = Bus()
        self.stats = WriterStats()

    @property
    def depth(self) -> int:
        """Operations that wait."""
        return len(self._pending)

    @property
    def alive(self) -> bool:
        """Whether operations are taken and the last batch was kept."""
        return not self._stopping and self._connection is not None and not self._rest

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open the store and run the thread; on the way out everything queued is still written."""
        self._connection = self._open()
        # asyncio and trio each have one thread-safe way in; anyio's own blocks the calling thread.
        native: Any = anyio.lowlevel.current_token().native_token
        self._post = getattr(native, "call_soon_threadsafe", None) or native.run_sync_soon
        self._stopping, self._rest = False, 0.0
        self.stats.committed_at = time.monotonic()
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

        Raises what the operation raises, and LumarisError `busy` when the queue is full or stands
        still, when the commit failed or when it takes too long. After the last two the same request
        may be repeated: every operation here is idempotent. An operation may run twice in one
        batch, of which only the second run counts: it changes nothing but the database.
        """
        job = _Job(operation)
        with self._wake:
            if self._stopping:
                raise LumarisError("busy", "The coordinator is shutting down.")
            if len(self._pending) >= self._queue_max or self._stalled(job.since):
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

    def follow(self) -> None:
        """Another replica committed: let the hooks see it, then wake the bus."""
        with self._wake:
            self._to_follow = True
            self._wake.notify()

    def _stalled(self, now: float) -> bool:
        """A few may always wait, however slow the disk: they do not get in each other's way."""
        waiting = self._pending
        return len(waiting) >= WRITER_STALLED_QUEUE_MAX and (
            now - waiting[0].since > WRITER_STALLED_S
        )

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._rest and not self._stopping:
                    self._wake.wait_for(lambda: self._stopping, self._rest)
                else:
                    self._wake.wait_for(lambda: self._pending or self._to_follow or self._stopping)
                if not self._pending and self._stopping:
                    return
                following, self._to_follow = self._to_follow, False
                size = min(len(self._pending), self._batch_max)
                batch = [self._pending.popleft() for _ in range(size)]
            if batch or self._rest:
                self._write(batch)
            elif following:
                self._catch_up()

    def _write(self, batch: list[_Job]) -> None:
        """One batch, or while the database fails an attempt to write anything at all."""
        jobs = batch or ([_Job(self._probe)] if self._probe else [])
        begun = False
        try:
            if self._connection is None:
                self._connection = self._open()
            connection = self._connection
            connection.execute("BEGIN IMMEDIATE")
            begun = True
            self._commit(connection, jobs)
        except (Exception, Late):
            self._fail(batch, begun=begun)
            return
        self._rest = 0.0
        self.stats.commits += 1
        self.stats.operations += len(jobs)
        self.stats.batch_largest = max(self.stats.batch_largest, len(jobs))
        self.stats.committed_at = time.monotonic()
        for hook in self._hooks:
            hook.committed()
        self._deliver(batch, news=True)

    def _commit(self, connection: Connection, jobs: list[_Job]) -> None:
        if self._follows:
            for hook in self._hooks:
                hook.followed(connection)
        if self._local and self._post is not None:
            for start in range(0, len(jobs), OPERATIONS_PER_TURN_MAX):
                self._run_in_loop(connection, jobs[start : start + OPERATIONS_PER_TURN_MAX])
        else:
            self._run_all(connection, jobs)
        for hook in self._hooks:
            hook.before_commit(connection, int(self._clock()))
        connection.execute("COMMIT")

    def _run_in_loop(self, connection: Connection, jobs: list[_Job]) -> None:
        assert self._post is not None
        turn = Turn(partial(self._run_all, connection, jobs))
        try:
            self._post(turn.run)
        except RuntimeError:  # as in `_deliver`: the event loop has ended
            turn.run()
        turn.wait()

    def _run_all(self, connection: Connection, jobs: list[_Job]) -> None:
        """The operations in turn. After a late error those that followed it run once more, each of
        them now waited for: many failures must not each repeat the rest of the batch."""
        start, alone = 0, False
        while True:
            index = start
            try:
                for index in range(start, len(jobs)):
                    self._run_one(connection, jobs[index], alone=alone)
                _settle(connection)
            except Late as late:
                failed = index - late.ago
                if self._failed(late.cause) or failed < start:
                    raise
                jobs[failed].value, jobs[failed].error = None, late.cause
                connection.execute("ROLLBACK TO operation")
                connection.execute("RELEASE operation")
                start, alone = failed + 1, True
            else:
                return

    def _run_one(self, connection: Connection, job: _Job, *, alone: bool) -> None:
        """One operation in its savepoint. Raises when the transaction itself is lost, and `Late`
        when an operation before it turns out to have failed."""
        job.value = job.error = None
        connection.execute("SAVEPOINT operation")
        try:
            job.value = job.operation(connection)
            if alone:
                _settle(connection)
            connection.execute("RELEASE operation")
        except Exception as error:
            if self._failed(error):
                raise
            job.value, job.error = None, error
            connection.execute("ROLLBACK TO operation")
            connection.execute("RELEASE operation")

    def _fail(self, batch: list[_Job], *, begun: bool) -> None:
        """Nobody is acknowledged. Who waits only since a moment for a batch that did not begin
        goes back in line."""
        now = time.monotonic()
        patient = not begun and not self._stopping
        again = [job for job in batch if patient and now - job.since < WRITE_AGAIN_S_MAX]
        lost = batch[: len(batch) - len(again)]
        log.log(
            logging.DEBUG if not batch else logging.ERROR,
            "a batch of %d operations was not committed, %d are tried again",
            len(batch),
            len(again),
            exc_info=True,
        )
        self.stats.failed_batches += bool(batch)
        self._rest = min(2 * self._rest or WRITER_REST_S, WRITER_REST_S_MAX)
        self._drop()
        for job in lost:
            job.value = None
            job.error = _unconfirmed()
        with self._wake:
            self._pending.extendleft(reversed(again))
        self._deliver(lost, news=False)

    def _catch_up(self) -> None:
        try:
            if self._connection is None:
                self._connection = self._open()
            for hook in self._hooks:
                hook.followed(self._connection)
        except Exception:
            self._fail([], begun=False)
            return
        self._deliver([], news=True)

    def _open(self) -> Connection:
        """A new connection, which the hooks have read while nobody else writes."""
        connection = self._connect()
        try:
            connection.execute("BEGIN IMMEDIATE")
            for hook in self._hooks:
                hook.opened(connection)
            connection.execute("ROLLBACK")
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

    def _deliver(self, batch: list[_Job], *, news: bool) -> None:
        assert self._post is not None
        try:
            self._post(self._finish, batch, news)
        except RuntimeError:
            # The event loop has ended (trio's RunFinishedError is one too): nobody waits any more.
            log.debug("%d results came after the end of the event loop", len(batch))

    def _finish(self, batch: list[_Job], news: bool) -> None:
        for job in batch:
            job.done.set()
        if news:
            self.bus.wake()


def _settle(connection: Connection) -> None:
    """Whoever reads knows that what was written before has happened."""
    all_rows(connection, "SELECT 1")


def _unconfirmed() -> LumarisError:
    """Refused for all we know; a disk that failed in the commit may have kept it all the same."""
    return LumarisError(
        "busy",
        "The write could not be confirmed: it is not known whether it was kept and money moved.",
        hint="Repeat the same request: it is applied once at most.",
    )
