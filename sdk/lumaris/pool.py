"""Open sessions: bought once, used for many orders, closed and settled when idle.

A session is one negotiation and one grant; every further order to the same seller skips both.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

import trio
from msgspec import structs

from lumaris.images import Image
from lumaris.jobs import JobRequest, Plan
from lumaris.market import Market, SellerError, no_match
from lumaris.quoting import Offered
from lumaris.session import Session
from lumaris.settling import Settling
from lumaris.store import Store
from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.ports import Overlay
from lumaris_overlay.tasks import shielded
from lumaris_protocol import agreements, matching, pricing
from lumaris_protocol.agreements import Contract
from lumaris_protocol.coordinator_api import TRANSIENT
from lumaris_protocol.effects import Send
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.machines.buyer import BuyerSession
from lumaris_protocol.matching import MatchReport
from lumaris_protocol.messages.advert import Feature, Resources, Verification
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.offer_index import OfferIndex

log = logging.getLogger(__name__)

LEASE_S = 3600
_IDLE_S = 15.0
_SWEEP_S = 1.0
_DECLINE_S = 2.0

Approve = Callable[[Plan], Awaitable[bool]]


class Pool:
    """The buyer's sessions. `run` keeps it tidy; `close_all` settles everything."""

    def __init__(
        self,
        market: Market,
        overlay: Overlay,
        store: Store,
        settling: Settling,
        *,
        network: str,
        currency: str,
        transfer_rate: Rate | None = None,
    ) -> None:
        self._market, self._overlay = market, overlay
        self._store, self._settling = store, settling
        self._network, self._currency = network, currency
        self._transfer_rate = transfer_rate
        self._nursery: trio.Nursery | None = None
        self._sessions: dict[str, tuple[Session, Requirements]] = {}

    async def run(self, nursery: trio.Nursery) -> None:
        """Close sessions nobody used for a while."""
        self._nursery = nursery
        while True:
            await trio.sleep(_SWEEP_S)
            idle_since = trio.current_time() - _IDLE_S
            for session, _ in list(self._sessions.values()):
                if not session.live and session.used_at < idle_since:
                    nursery.start_soon(self.close, session)

    def attach(self, nursery: trio.Nursery) -> None:
        """The nursery that sessions live in."""
        self._nursery = nursery

    def needs(self, request: JobRequest, image: Image) -> Requirements:
        """What a request asks of a seller."""
        return Requirements(
            resources=Resources(
                cpu_millis=request.cpu_millis,
                memory_bytes=request.memory_bytes,
                disk_bytes=request.disk_bytes,
                gpus=request.gpus,
            ),
            tier=image.tier,
            assurances=request.assurances,
            egress=request.egress,
            features=_features(request),
            image=image.digest if image.tier != "wasm" else None,
            image_fetched=image.tier != "wasm" and image.fetched,
            regions=request.regions,
            currency=self._currency,
        )

    def find_idle(self, needs: Requirements, *, wall_s: int, cost_nanos_max: int) -> Session | None:
        """An open session without orders that fits and still covers an order of `wall_s`."""
        for session, had in self._sessions.values():
            free = (
                not session.live
                and not session.over.is_set()
                and session.seller not in needs.excluded
            )
            whole_nanos = pricing.order_nanos(session.machine.terms, wall_s * 1000)
            covers = session.remaining_nanos >= min(whole_nanos, cost_nanos_max)
            if free and covers and _same(had, needs):
                session.used_at = trio.current_time()  # the sweeper leaves it alone
                return session
        return None

    async def buy(
        self,
        needs: Requirements,
        *,
        cap_nanos: int,
        count: int = 1,
        approve: Approve | None = None,
    ) -> list[Session]:
        """Open up to `count` sessions with different sellers, each with its own cap.

        Raises LumarisError when none could be opened; then nothing is held that is not returned.
        """
        report = await self._market.search(needs, lease_s=LEASE_S, count=count)
        offered = await self._market.quotes(
            needs,
            report,
            lease_s=LEASE_S,
            cap_nanos=cap_nanos,
            verification=_verification(needs),
            count=count,
        )
        chosen = offered
        if approve is not None:
            chosen = await self._approved(offered, report, needs, cap_nanos, approve)
        sessions: list[Session] = []
        errors: list[LumarisError] = []

        async def open_one(item: Offered) -> None:
            try:
                sessions.append(await self._open(item, needs))
            except LumarisError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for item in chosen:
                nursery.start_soon(open_one, item)
        if not sessions:
            raise errors[0]
        return sessions

    async def buy_from(
        self,
        seller: str,
        needs: Requirements,
        *,
        cap_nanos: int,
        approve: Approve | None = None,
    ) -> Session:
        """Open a session with this seller and with nobody else.

        Raises LumarisError: `unreachable` when it offers nothing now, or what keeps it from
        fitting; nothing is held then.
        """
        index = OfferIndex()
        for advert in self._market.adverts:
            if advert.message.seller == seller:
                index.put(advert)
        if not len(index):
            raise LumarisError("unreachable", f"{seller} offers nothing now.")
        # What is free changes faster than adverts travel: the seller itself says whether it has it.
        report = index.search(needs, lease_s=LEASE_S, count=1, as_if_idle=True)
        if not report.matches:
            raise no_match(report.seen, report.excluded, matching.needed_features(needs))
        offered = await self._market.quotes(
            needs,
            report,
            lease_s=LEASE_S,
            cap_nanos=cap_nanos,
            verification=_verification(needs),
        )
        if approve is not None:
            offered = await self._approved(offered, report, needs, cap_nanos, approve)
        return await self._open(offered[0], needs)

    async def close(self, session: Session) -> None:
        """End a session by agreement and settle it."""
        if self._sessions.pop(session.session, None) is None:
            return
        await session.close()
        await self.settle()

    def end_revoked(self) -> None:
        """End the sessions of which a party was revoked since it agreed, and settle them."""
        for session, _ in self._sessions.values():
            agreement = session.machine.contract.agreement
            parties = agreement.buyer, agreement.seller
            if self._market.revoked.ends(*parties, agreed_at=agreement.issued_at):
                session.revoke()
                assert self._nursery is not None, "attach comes first"
                self._nursery.start_soon(self.close, session)

    async def close_all(self) -> None:
        """End every session and settle what can be settled now."""
        async with trio.open_nursery() as nursery:
            for session, _ in list(self._sessions.values()):
                self._sessions.pop(session.session, None)
                nursery.start_soon(session.close)
        await self.settle()

    async def settle(self) -> None:
        """Settle what has ended; open sessions are left alone."""
        await self._settling.settle_all(skip=frozenset(self._sessions))

    async def _approved(
        self,
        chosen: list[Offered],
        report: MatchReport,
        needs: Requirements,
        cap_nanos: int,
        approve: Approve,
    ) -> list[Offered]:
        """Ask before money is held; a quote that lapsed meanwhile is fetched anew at its price."""
        kept = False
        try:
            if not await approve(plan_of(chosen[0], chosen[1:], report)):
                raise LumarisError("declined")
            kept = chosen[0].quote.message.hold_until > time.time()
        finally:
            if not kept:
                with shielded(_DECLINE_S):
                    for item in chosen:
                        await item.decline()
        if kept:
            return chosen
        again = await self._market.quotes(
            needs,
            report,
            lease_s=LEASE_S,
            cap_nanos=cap_nanos,
            verification=_verification(needs),
            count=len(chosen),
        )
        if again[0].price_nanos > chosen[0].price_nanos:
            for item in again:
                await item.decline()
            raise LumarisError("quote_expired", "The price rose while you decided; try again.")
        return again

    async def _open(self, offered: Offered, needs: Requirements) -> Session:
        try:
            return await self._begin(offered, needs)
        finally:
            await offered.stream.aclose()

    async def _begin(self, offered: Offered, needs: Requirements) -> Session:
        seller = offered.quote.message.seller
        try:
            contract, key = await self._market.agree(offered)
        except LumarisError as error:
            raise SellerError(seller, error) from None
        # From here to the session's start money may be held: giving up half-way would lose track.
        with trio.CancelScope(shield=True):
            grant = await self._fetch_grant(contract)
            machine = BuyerSession(contract, key, network=self._network, now=trio.current_time())
            opening = machine.open(grant)
            first = opening[0]
            assert isinstance(first, Send)
            region = offered.advert.message.region
            session = Session(
                machine,
                self._overlay,
                self._store,
                region=region,
                transfer_rate=self._transfer_rate,
            )
            await self._store.keep_grant(session.session, grant, first.data)
            assert self._nursery is not None, "attach comes first"
            self._sessions[session.session] = (session, needs)
            self._nursery.start_soon(session.run, opening)
        await session.ready.wait()
        if session.over.is_set():
            self._sessions.pop(session.session, None)
            raise SellerError(seller, LumarisError(session.reason or "unreachable"))
        return session

    async def _fetch_grant(self, contract: Contract) -> bytes:
        """The grant of a stored agreement. Raises LumarisError; then nothing is held, or the
        session stays unsettled until that is known."""
        await self._store.add_session(contract, now=time.time())
        try:
            grant = await self._settling.grant(contract.by_buyer, contract.by_seller)
            agreements.open_grant(
                grant,
                contract,
                network=self._network,
                coordinator=contract.agreement.coordinator,
                now=time.time(),
            )
        except LumarisError as error:
            if error.code not in TRANSIENT:
                await self._store.set_state(contract.agreement.session, "settled", error.code)
            raise
        return grant


def plan_of_session(session: Session, cap_nanos: int) -> Plan:
    """What one more order in an open session is bought for."""
    agreement, terms = session.machine.contract.agreement, session.machine.terms
    return Plan(
        seller=session.seller,
        region=session.region,
        quote=agreement.agreement,
        rate_nanos_per_s=terms.rate_nanos_per_s,
        start_nanos=terms.start_nanos,
        cap_nanos=min(cap_nanos, session.remaining_nanos),
        currency=terms.currency,
        hold_until=agreement.ends_at,
        considered=(),
        excluded={},
        seen=1,
    )


def plan_of(best: Offered, others: list[Offered], report: MatchReport) -> Plan:
    """What will be bought, and what else was considered."""
    quote, terms = best.quote.message, best.quote.message.terms
    asked = {best.quote.message.seller}
    considered = [
        (item.quote.message.seller, item.advert.message.region, item.price_nanos) for item in others
    ]
    asked |= {seller for seller, _, _ in considered}
    considered += [
        (match.advert.message.seller, match.advert.message.region, match.lease_nanos)
        for match in report.matches
        if match.advert.message.seller not in asked
    ]
    return Plan(
        seller=quote.seller,
        region=best.advert.message.region,
        quote=quote.quote,
        rate_nanos_per_s=terms.rate_nanos_per_s,
        start_nanos=terms.start_nanos,
        cap_nanos=terms.cap_nanos,
        currency=terms.currency,
        hold_until=quote.hold_until,
        considered=considered,
        excluded=report.excluded,
        seen=report.seen,
    )


def _verification(needs: Requirements) -> Verification:
    """A wasm guest is deterministic, so running it again settles a doubt; others have evidence."""
    return "det" if needs.tier == "wasm" else "evid"


def _features(request: JobRequest) -> tuple[Feature, ...]:
    """What the seller's runtime must offer for this request, beside what follows from the rest."""
    features = set[Feature](request.features)
    if request.gpus:
        features.add("gpu")
    if request.stdin:
        features.add("stdin")
    return tuple(sorted(features))


def _same(had: Requirements, needs: Requirements) -> bool:
    return structs.replace(had, excluded=()) == structs.replace(needs, excluded=())
