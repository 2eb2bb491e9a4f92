"""Many jobs over several sellers: a queue, a few sessions that draw from it, and replacements."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import trio
from msgspec import structs

from lumaris import artifacts
from lumaris.buyer import RETRY_S, RETRYABLE, Buyer, new_job
from lumaris.images import Image
from lumaris.jobs import JobRequest, JobResult, Observer, not_run
from lumaris.market import SellerError
from lumaris.session import Session
from lumaris_overlay.tasks import background
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.execution import File
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.money import Nanos

# Orders in flight for each session. More hide the round trip of short jobs; but what waits at a
# slow seller is kept from a quick one, so a short map uses fewer.
_PIPELINE_MAX = 8
_PIPELINE_SHARE = 8
# Sessions bought for each one wanted: a market where every seller fails must end, too.
_SESSIONS_SHARE = 4


@dataclass
class _Item:
    """One job."""

    index: int
    job: str
    request: JobRequest
    inputs: tuple[File, ...]
    attempts: int = 0
    spent_nanos: int = 0


class FanOut:
    """One map."""

    def __init__(
        self,
        buyer: Buyer,
        image: Image,
        requests: Sequence[JobRequest],
        sellers: int,
        budget_nanos: int,
        observe: Observer,
        on_result: Callable[[int, JobResult], None] | None,
    ) -> None:
        self._buyer, self._image, self._requests = buyer, image, requests
        self._queue: deque[_Item] = deque()
        self._shape, self._wanted = requests[0], max(1, min(sellers, len(requests)))
        self._budget_nanos, self._observe, self._on_result = budget_nanos, observe, on_result
        per_seller = len(requests) // (self._wanted * _PIPELINE_SHARE)
        self._depth = max(1, min(_PIPELINE_MAX, per_seller))
        self._results: list[JobResult | None] = [None] * len(requests)
        self._left = len(requests)
        self._active: dict[str, Session] = {}
        self._paid_before: dict[str, int] = {}  # in an active session, and not by this map
        self._bought = 0
        self._failed: set[str] = set()
        self._spent_nanos = 0  # by sessions that are over
        self._changed = trio.Event()

    async def run(self) -> list[JobResult]:
        """Until every job has a result, in the order of the requests.

        Raises LumarisError while nothing was bought; after that each failure is its job's result.
        """
        for index, request in enumerate(self._requests):
            inputs = await artifacts.describe_inputs(request.inputs) if request.inputs else ()
            self._queue.append(_Item(index, new_job(), request, inputs))
        async with background() as nursery:
            while self._left:
                if self._queue and len(self._active) < self._wanted:
                    await self._recruit(nursery)
                if self._left:
                    self._changed = trio.Event()
                    with trio.move_on_after(RETRY_S):
                        await self._changed.wait()
        return [result for result in self._results if result is not None]

    async def _recruit(self, nursery: trio.Nursery) -> None:
        needs = self._buyer.pool.needs(self._shape, self._image)
        while (missing := self._wanted - len(self._active)) > 0:
            busy = tuple(session.seller for session in self._active.values())
            needs = structs.replace(needs, excluded=(*self._failed, *busy))
            session = self._find_idle(needs)
            if session is None:
                break
            self._begin(session, nursery)
        if not missing:
            return
        try:
            sessions = await self._buyer.buy(
                needs, cap_nanos=self._cap_of_one(missing), count=missing
            )
        except LumarisError as error:
            self._on_no_seller(error)
            return
        for session in sessions:
            self._begin(session, nursery)

    def _find_idle(self, needs: Requirements) -> Session | None:
        """A session that was bought before and cannot cost more than is left of the budget."""
        shape, left = self._shape, self._budget_nanos - self._spent_nanos - self._held_nanos
        while True:
            session = self._buyer.pool.find_idle(
                needs, wall_s=shape.wall_s, cost_nanos_max=shape.max_cost_nanos
            )
            if session is None or session.remaining_nanos <= left:
                return session
            needs = structs.replace(needs, excluded=(*needs.excluded, session.seller))

    def _begin(self, session: Session, nursery: trio.Nursery) -> None:
        self._bought += 1
        self._active[session.session] = session
        self._paid_before[session.session] = session.machine.tab.due_nanos
        nursery.start_soon(self._drive, session)

    @property
    def _held_nanos(self) -> int:
        """What the active sessions may still cost and have cost this map."""
        return sum(
            session.machine.terms.cap_nanos - self._paid_before[name]
            for name, session in self._active.items()
        )

    def _cap_of_one(self, missing: int) -> int:
        """The cap of each new session; one share stays back for replacements.

        Raises LumarisError `budget_exceeded` when nothing is left to buy with.
        """
        left = self._budget_nanos - self._spent_nanos - self._held_nanos
        cap_nanos = left // (missing + 1)
        if cap_nanos <= 0 or self._bought >= _SESSIONS_SHARE * self._wanted:
            raise LumarisError("budget_exceeded")
        return cap_nanos

    def _on_no_seller(self, error: LumarisError) -> None:
        """Go on with the sellers we have; without any, try again or give up."""
        if isinstance(error, SellerError):
            self._bought += 1  # its grant may be held
            self._failed.add(error.seller)
        if self._active:
            return
        if self._failed and error.code != "budget_exceeded":
            if not isinstance(error, SellerError):
                self._failed.clear()  # nobody else is left: those that failed get another chance
                self._bought += 1
            return
        if not self._bought:
            raise error
        for item in list(self._queue):
            self._queue.remove(item)
            self._end(item, not_run(item.job, error))

    async def _drive(self, session: Session) -> None:
        """Keep a session busy until it ends or nothing is left."""
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(self._depth):
                    nursery.start_soon(self._draw, session)
        finally:
            del self._active[session.session]
            before = self._paid_before.pop(session.session)
            self._spent_nanos += session.machine.tab.due_nanos - before
            self._changed.set()

    async def _draw(self, session: Session) -> None:
        while not session.over.is_set():
            if not self._queue:
                if not self._left:
                    return
                changed = self._changed
                with trio.move_on_after(RETRY_S):
                    await changed.wait()
                continue
            item = self._queue.popleft()
            left = item.request.max_cost_nanos - item.spent_nanos
            try:
                result = await self._buyer.order(
                    session,
                    replace(item.request, max_cost_nanos=left),
                    self._image,
                    item.inputs,
                    self._observe,
                    job=item.job,
                    attempt=item.attempts + 1,
                )
            except LumarisError as error:
                if not session.over.is_set():
                    self._end(item, not_run(item.job, error))
                    continue
                self._queue.appendleft(item)  # the session ended before the order left
                return
            self._take(item, result)

    def _take(self, item: _Item, result: JobResult) -> None:
        item.attempts += 1
        item.spent_nanos += result.cost_nanos
        left = item.request.max_cost_nanos - item.spent_nanos
        if result.reason in RETRYABLE and item.attempts < item.request.attempts and left > 0:
            self._failed.add(result.seller)
            self._queue.appendleft(item)
            self._changed.set()
        else:
            self._end(item, replace(result, cost_nanos=Nanos(item.spent_nanos)))

    def _end(self, item: _Item, result: JobResult) -> None:
        self._results[item.index] = result
        self._left -= 1
        if self._on_result is not None:
            self._on_result(item.index, result)
        self._changed.set()
