"""Asking everybody: a signed demand for what the directory does not show, and the answers to it.

A demand is gossiped to all sellers of the shard; those that fit open a stream to us and send their
fresh advert, which is checked like any other and goes into the directory. Nothing is agreed by
that: the ordinary request for a quote follows.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio
from msgspec import structs

from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.libp2p.addresses import (
    DIALS_MAX,
    endpoint_of,
    same_ip,
    scope_of,
    split_circuit,
)
from lumaris_overlay.ports import Overlay, OverlayStream
from lumaris_overlay.tasks import StrangerLog
from lumaris_overlay.validate import AdvertGate
from lumaris_protocol import codec, ids, matching
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import KeyPair, PeerId
from lumaris_protocol.limits import DEMAND_ADDRESSES_MAX, DEMAND_LIFETIME_S_MAX, TENDERS_MAX
from lumaris_protocol.messages.advert import Advert
from lumaris_protocol.messages.demand import Demand
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.protocols import TENDER, TenderHeader

log = logging.getLogger(__name__)

# Sellers answer within a fifth of a second of hearing of it.
_FIRST_S = 1.0
_MORE_S = 0.3
_SERVE_S = 1.0
_READ_S = 5.0
_OPEN_MAX = 8
_ANSWERED_MAX = 1_024
_ANSWERING_MAX = 2 * TENDERS_MAX


@dataclass
class _Open:
    """A demand that may still be answered."""

    demand: Demand
    until: float
    left: int
    answered: set[str] = field(default_factory=set)
    news: trio.Event = field(default_factory=trio.Event)


class Demands:
    """Our demands. `run` answers the sellers' streams while one is open."""

    def __init__(
        self,
        overlay: Overlay,
        key: KeyPair,
        gate: AdvertGate,
        certificate: Callable[[], bytes],
        take: Callable[[Signed[Advert]], None],
    ) -> None:
        self._overlay, self._key, self._gate = overlay, key, gate
        self._certificate, self._take = certificate, take
        self._open: dict[str, _Open] = {}
        self._wanted, self._serving = trio.Event(), trio.Event()
        self._answering = 0
        self._strangers = StrangerLog(log)

    async def run(self) -> None:
        """Answer sellers for as long as the client lives, whenever a demand of ours is open."""
        while True:
            await self._wanted.wait()
            try:
                async with self._overlay.serve(TENDER, self._answer):
                    self._serving.set()
                    while self._expire():  # noqa: ASYNC110 - others may be opened meanwhile
                        await trio.sleep_until(max(item.until for item in self._open.values()))
                    self._serving = trio.Event()  # who asks from here on waits for the next turn
            except LumarisError as error:
                # Another program of this user has a demand open on the same overlay.
                log.info("tenders not served code=%s", error.code)
                self._open.clear()
            self._wanted, self._serving = trio.Event(), trio.Event()
            if self._expire():
                self._wanted.set()

    async def ask(self, needs: Requirements, lease_s: int) -> bool:
        """Ask every seller once for this and wait a little; whether one that fits has answered.

        While the demand is open the same is not asked again.
        """
        needs = structs.replace(needs, excluded=())
        if len(self._expire()) >= _OPEN_MAX or any(
            (item.demand.requirements, item.demand.lease_s) == (needs, lease_s)
            for item in self._open.values()
        ):
            return False
        try:
            signed = await self._draft(needs, lease_s)
        except (LumarisError, ValueError) as error:  # ValueError: too many words for a demand
            log.info("demand not made error=%r", error)
            return False
        opened = self._note(signed.message)
        try:
            await self._publish(signed.data)
        except LumarisError as error:
            log.info("demand not published code=%s", error.code)
            self._open.pop(signed.message.demand, None)
            return False
        with trio.move_on_after(_FIRST_S):
            await opened.news.wait()
            await trio.sleep(_MORE_S)
        return opened.news.is_set()

    def _note(self, demand: Demand) -> _Open:
        until = trio.current_time() + DEMAND_LIFETIME_S_MAX
        opened = self._open[demand.demand] = _Open(demand, until, demand.answers_max)
        self._wanted.set()
        return opened

    async def _publish(self, data: bytes) -> None:
        with trio.move_on_after(_SERVE_S):
            await self._serving.wait()
            await self._overlay.publish_demand(data)
            return
        raise LumarisError("not_running", "Answers to demands are not served.")

    async def _draft(self, needs: Requirements, lease_s: int) -> Signed[Demand]:
        reach = await self._overlay.reachability()
        own = f"/p2p/{self._key.peer_id}"
        addresses = _on_one_ip([each for each in reach.addresses if each.endswith(own)])
        now = math.floor(time.time())
        demand = Demand(
            demand=ids.make_id("demand", os.urandom(ids.ID_RANDOM_BYTES)),
            buyer=self._key.peer_id,
            certificate=self._certificate(),
            requirements=needs,
            lease_s=lease_s,
            answers_max=TENDERS_MAX,
            addresses=tuple(addresses[:DEMAND_ADDRESSES_MAX]),
            issued_at=now,
            expires_at=now + DEMAND_LIFETIME_S_MAX,
        )
        return codec.sign(demand, self._key, self._gate.network)

    def _expire(self) -> dict[str, _Open]:
        now = trio.current_time()
        self._open = {name: item for name, item in self._open.items() if item.until > now}
        return self._open

    async def _answer(self, stream: OverlayStream) -> None:
        """One seller's tender."""
        if self._answering >= _ANSWERING_MAX:
            await stream.reset()
            return
        self._answering += 1
        try:
            with trio.move_on_after(_READ_S):
                await self._read(FramedStream(stream), stream.peer)
        except LumarisError as error:
            self._strangers.note(stream.peer, error.code, error.message)
            await stream.reset()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._answering -= 1

    async def _read(self, framed: FramedStream, peer: PeerId) -> None:
        header = await framed.expect_header(TenderHeader)
        opened = self._expire().get(header.demand)
        if opened is None or not opened.left or peer in opened.answered:
            raise RefusedError("not_found", "No open demand of ours waits for this.")
        if len(opened.answered) < _ANSWERED_MAX:
            opened.answered.add(peer)
        advert = self._gate.check(await framed.expect(Kind.ENVELOPE), time.time())
        if advert.signer != peer:
            raise RefusedError("wrong_signer", "A tender with another seller's advert.")
        opened.left -= 1
        self._take(advert)
        demand = opened.demand
        if not matching.explain(demand.requirements, advert.message, lease_s=demand.lease_s):
            opened.news.set()


def _on_one_ip(addresses: Sequence[str]) -> list[str]:
    """Those that a demand may name: all direct ones on one IP, the widest seen, and circuits."""
    found = [(each, endpoint_of(each)) for each in addresses]
    direct = [(each, place[0]) for each, place in found if place is not None]
    widest = next(
        (ip for _, ip in direct if scope_of(ip) == "public"), direct[0][1] if direct else ""
    )
    named = [each for each, ip in direct if same_ip(ip, widest)][:DIALS_MAX]
    return named + [each for each in addresses if split_circuit(each) is not None]
