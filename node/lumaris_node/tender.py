"""Answers buyers that ask everybody: a demand that this node fits gets its fresh advert.

A demand reaches every seller of a shard at once, so the answers are spread over a moment, and what
they may cost this node is bounded for each buyer and in all. The buyer's ordinary request for a
quote follows, and only that holds capacity.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

import msgspec
import trio
from msgspec import structs

from lumaris_node.capability.advert import AdvertPublisher
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.libp2p.addresses import DialPace, dialable
from lumaris_overlay.ports import DemandEvent, Overlay
from lumaris_overlay.tasks import StrangerLog
from lumaris_overlay.validate import DemandGate, TokenBuckets
from lumaris_protocol import matching
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import DEMAND_LIFETIME_S_MAX
from lumaris_protocol.messages.advert import Advert, Resources
from lumaris_protocol.messages.demand import Demand
from lumaris_protocol.protocols import TENDER, TenderHeader

log = logging.getLogger(__name__)

# A thousand sellers that fit are five a millisecond; the buyer waits five times as long.
_SPREAD_S = 0.2
_SEND_S = 5.0
_ANSWERING_MAX = 16
# Demands looked at: two signatures each, so these cost at most 1 % of a core.
_PER_S, _BURST = 20, 100
_SEEN_MAX = 4_096


class Tenders:
    """The answering of demands. `counts` says how they ended, for the owner's "why no jobs"."""

    def __init__(
        self,
        overlay: Overlay,
        adverts: AdvertPublisher,
        gate: DemandGate,
        *,
        free: Callable[[], Resources],
        clock: Callable[[], float],
        rng: random.Random | None = None,
    ) -> None:
        self._overlay, self._adverts, self._gate = overlay, adverts, gate
        self._free, self._clock = free, clock
        self._rng = rng or random.Random()  # noqa: S311 - only spreads answers in time
        self._all = TokenBuckets(per_s=_PER_S, burst=_BURST, names_max=1)
        self._seen: dict[str, float] = {}
        self._pace = DialPace()
        self._answering = 0
        self._strangers = StrangerLog(log)
        self.counts: dict[str, int] = {}

    async def run(self) -> None:
        """Answer for as long as the node sells."""
        async with self._overlay.demands() as events, trio.open_nursery() as nursery:
            async for event in events:
                demand = self._consider(event)
                if demand is not None:
                    self._answering += 1
                    nursery.start_soon(self._answer, demand)

    def _consider(self, event: DemandEvent) -> Demand | None:
        """The demand, when it is one to answer: new, valid, within bounds, and we fit."""
        now = time.monotonic()
        if self._answering >= _ANSWERING_MAX or not self._all.take("", now):
            self._count("busy")
            return None
        try:
            demand = self._gate.check(event.envelope, self._clock()).message
        except LumarisError as error:
            self._strangers.note(event.buyer, error.code, error.message)
            return None
        if not self._first_time(demand.demand, now) or not self._gate.admit(demand.buyer, now):
            return None
        fits = self._fits(demand)
        self._count("answered" if fits else "unfit")
        return demand if fits else None

    def _fits(self, demand: Demand) -> bool:
        if demand.buyer == self._overlay.peer_id:
            return False  # who buys and sells with one key does not buy from itself
        try:
            advert = self._adverts.current().message
        except LumarisError:
            return False
        now = structs.replace(advert, free=self._free())
        return not matching.explain(demand.requirements, now, lease_s=demand.lease_s)

    def _first_time(self, name: str, now: float) -> bool:
        if name in self._seen:
            return False
        # A demand is refused as expired before it is forgotten here.
        old = now - 4 * DEMAND_LIFETIME_S_MAX
        while self._seen and (
            len(self._seen) >= _SEEN_MAX or next(iter(self._seen.values())) < old
        ):
            del self._seen[next(iter(self._seen))]
        self._seen[name] = now
        return True

    async def _answer(self, demand: Demand) -> None:
        try:
            await trio.sleep(self._rng.uniform(0, _SPREAD_S))
            with trio.move_on_after(_SEND_S):
                await self._send(demand, await self._fresh())
        except LumarisError as error:
            log.info("tender not delivered buyer=%s code=%s", demand.buyer, error.code)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the buyer has enough answers
        finally:
            self._answering -= 1

    async def _fresh(self) -> Signed[Advert]:
        """An advert that says what is free now; everybody else is told too."""
        if self._adverts.current().message.free != self._free():
            await self._adverts.publish()
        return self._adverts.current()

    async def _places(self, demand: Demand) -> tuple[str, ...]:
        """Where to dial the buyer: every fitting seller does, so nowhere that hurts another."""
        connected = {peer.peer for peer in await self._overlay.peers()}
        if demand.buyer in connected:
            return ()
        known = await self._overlay.reachability()
        relays = connected.union(known.relays)
        named = dialable(demand.addresses, own=known.addresses, relays=relays)
        return self._pace.admit(named, time.monotonic())

    async def _send(self, demand: Demand, advert: Signed[Advert]) -> None:
        addresses = await self._places(demand)
        stream = FramedStream(
            await self._overlay.open_stream(demand.buyer, TENDER, addresses=addresses)
        )
        self._pace.answered(addresses)
        try:
            header = TenderHeader(demand=demand.demand)
            await stream.send(Kind.HEADER, msgspec.json.encode(header))
            await stream.send(Kind.ENVELOPE, advert.data)
            await stream.stream.send_eof()
            await stream.receive()  # the buyer closes when it has read it
        finally:
            await stream.aclose()

    def _count(self, outcome: str) -> None:
        self.counts[outcome] = self.counts.get(outcome, 0) + 1
