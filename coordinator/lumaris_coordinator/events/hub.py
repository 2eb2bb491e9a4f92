"""One reader of the outbox per process, and the live subscribers that it tells.

A subscriber costs no queries of its own while it keeps up: events are read once, encoded once and
handed to whom they concern. One that connects first reads the past in pages, then goes live; one
that lags behind is let go with its place, from which it may resume.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

from lumaris_coordinator.bounds import (
    EVENT_STREAMS_MAX,
    EVENT_STREAMS_PER_ADDRESS_MAX,
    EVENT_STREAMS_PER_PRINCIPAL_MAX,
    EVENTS_BATCH_MAX,
    EVENTS_LAG_MAX,
    EVENTS_PAGE_MAX,
    EVENTS_POLL_S,
)
from lumaris_coordinator.events import outbox
from lumaris_coordinator.events.outbox import Event
from lumaris_coordinator.store.port import Connection
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris_coordinator.identity.service import Caller
    from lumaris_coordinator.store.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """An event, encoded once for all who receive it."""

    id: int
    kind: str
    data: bytes

    @property
    def sse(self) -> bytes:
        """The event as a Server-Sent Event. JSON has no line breaks, so it is one data line."""
        return b"id: %d\nevent: %s\ndata: %s\n\n" % (self.id, self.kind.encode(), self.data)


def line_of(event: Event) -> Line:
    """An event as it is sent."""
    return Line(event.id, event.kind, event.encode())


class Subscription:
    """What a live reader has not read yet, at most EVENTS_LAG_MAX events of it."""

    def __init__(self) -> None:
        self.lines: deque[Line] = deque()
        self.lagging = False
        self.wake = anyio.Event()

    def push(self, line: Line) -> None:
        """Hand over an event, or note that the reader is too slow and forget what waits."""
        if self.lagging:
            return
        if len(self.lines) >= EVENTS_LAG_MAX:
            self.lagging = True
            self.lines.clear()
        else:
            self.lines.append(line)
        self.wake.set()


class Hub:
    """Reads the outbox as it grows. `run` is its one task."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.last = 0
        self.closing = False
        self._by_party: dict[str, set[Subscription]] = {}
        self._streams: Counter[str] = Counter()
        self._addresses: Counter[str] = Counter()
        self._listeners: list[Callable[[Sequence[Event]], None]] = []

    @property
    def streams(self) -> int:
        """Open streams."""
        return self._streams.total()

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> None:
        """Call it with each batch of new events, in the event loop."""
        self._listeners.append(listener)

    async def start(self) -> None:
        """Begin after what is there already."""
        self.last = await self.store.read(outbox.head)

    async def run(self) -> None:
        """Follow the outbox until cancelled. A lost wake-up costs EVENTS_POLL_S of delay."""
        heard = 0
        while True:
            with anyio.move_on_after(EVENTS_POLL_S):
                heard = await self.store.bus.woken(heard)
            try:
                await self.pump()
            except Exception:
                log.exception("the outbox could not be read; it is tried again")
                await anyio.sleep(EVENTS_POLL_S)

    async def pump(self) -> None:
        """Hand out all events that are committed by now."""
        while True:
            events = await self.store.read(self._newer)
            for event in events:
                self._hand_out(event)
            if events:
                self.last = events[-1].id
                for listener in self._listeners:
                    listener(events)
            if len(events) < EVENTS_BATCH_MAX:
                return

    def _newer(self, connection: Connection) -> list[Event]:
        return outbox.newer(connection, after=self.last, limit=EVENTS_BATCH_MAX)

    def _hand_out(self, event: Event) -> None:
        found = [self._by_party[party] for party in event.parties if party in self._by_party]
        if found:
            line = line_of(event)
            for subscription in set[Subscription]().union(*found):
                subscription.push(line)

    def close(self) -> None:
        """End every stream; their readers resume with whoever serves next."""
        self.closing = True
        for subscriptions in self._by_party.values():
            for subscription in subscriptions:
                subscription.wake.set()

    def open(self, caller: Caller, *, after: int | None, address: str = "") -> Follower:
        """A reader of the caller's events. Close it when done. An `address` holds a bounded number
        of them, "" is none in particular.

        Raises LumarisError `too_many`, or `busy` when the coordinator has no stream left or ends.
        """
        if self.closing:
            raise LumarisError("busy", "The coordinator is shutting down.")
        if self._streams[caller.id] >= EVENT_STREAMS_PER_PRINCIPAL_MAX:
            raise LumarisError("too_many", "Too many event streams are open for this account.")
        if self.streams >= EVENT_STREAMS_MAX:
            raise LumarisError("busy", "All event streams are taken.")
        if address and self._addresses[address] >= EVENT_STREAMS_PER_ADDRESS_MAX:
            raise LumarisError("too_many", "Too many event streams are open from this address.")
        self._streams[caller.id] += 1
        if address:
            self._addresses[address] += 1
        return Follower(self, caller, self.last if after is None else after, address=address)

    def subscribe(self, parties: frozenset[str]) -> Subscription:
        """Receive what concerns the parties from now on."""
        found = Subscription()
        for party in parties:
            self._by_party.setdefault(party, set()).add(found)
        return found

    def unsubscribe(self, parties: frozenset[str], subscription: Subscription) -> None:
        """Receive no more."""
        for party in parties:
            members = self._by_party.get(party, set())
            members.discard(subscription)
            if not members:
                self._by_party.pop(party, None)

    def release(self, caller: Caller, address: str) -> None:
        """A stream of the caller's has ended."""
        for open_, name in ((self._streams, caller.id), (self._addresses, address)):
            open_[name] -= 1
            if open_[name] <= 0:
                del open_[name]


def parties_of(caller: Caller) -> frozenset[str]:
    """Whose events a caller may see: its own, and those of the peers that belong to it."""
    return caller.peers | {caller.id}


class Follower:
    """One reader: the past in pages, then what happens."""

    def __init__(self, hub: Hub, caller: Caller, after: int, *, address: str = "") -> None:
        self.cursor = after
        self._hub, self._caller, self._address = hub, caller, address
        self._parties = parties_of(caller)
        self._live: Subscription | None = None
        self._catch_up_to: int | None = None

    @property
    def lagging(self) -> bool:
        """Whether the reader was too slow: nothing follows, it must come back with its cursor."""
        return self._live is not None and self._live.lagging

    async def next(self, *, wait_s: float) -> list[Line]:
        """The next events, in order and each once; none after `wait_s` of silence, when lagging,
        and when the hub closes."""
        found = await self._past()
        if found or self._live is None:
            return found
        live = self._live
        if not live.lines and not live.lagging and not self._hub.closing:
            with anyio.move_on_after(wait_s):
                await live.wake.wait()
        found = [line for line in live.lines if line.id > self.cursor]
        live.lines.clear()
        live.wake = anyio.Event()
        if live.lagging:
            return []
        return self._advance(found)

    async def _past(self) -> list[Line]:
        while self._live is None or self._catch_up_to is not None:
            if self._live is not None and self.cursor >= (self._catch_up_to or 0):
                self._catch_up_to = None
                break
            page = await self._hub.store.read(
                lambda connection: outbox.newer_of(
                    connection, self._parties, after=self.cursor, limit=EVENTS_PAGE_MAX
                )
            )
            if page:
                return self._advance([line_of(event) for event in page])
            if self._live is None:
                # What was committed until now is read once more; what follows is handed over.
                self._catch_up_to = self._hub.last
                self._live = self._hub.subscribe(self._parties)
            else:
                self._catch_up_to = None
        return []

    def _advance(self, lines: list[Line]) -> list[Line]:
        if lines:
            self.cursor = lines[-1].id
        return lines

    def close(self) -> None:
        """Give the place back."""
        if self._live is not None:
            self._hub.unsubscribe(self._parties, self._live)
        self._hub.release(self._caller, self._address)
