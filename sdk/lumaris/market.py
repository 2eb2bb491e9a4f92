"""Finding sellers and agreeing with one: from the directory to a contract both signed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass
from functools import partial

import trio
from msgspec import structs

from lumaris.demands import Demands
from lumaris.log_watch import LogWatch
from lumaris.quoting import REPLY_S, Asker, Offered, Round, Wish
from lumaris_overlay.notice_upkeep import follow_notices
from lumaris_overlay.ports import AdvertEvent, Notice, Overlay
from lumaris_overlay.validate import AdvertGate, refuse_revoked_seller
from lumaris_protocol import agreements, codec, matching
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.key_list import TrustedKeys
from lumaris_protocol.keys import KeyPair, PeerId
from lumaris_protocol.limits import DIRECTORY_ADVERTS_MAX
from lumaris_protocol.matching import Match, MatchReport
from lumaris_protocol.messages.advert import Advert, Verification
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.messages.notice import CheckpointNotice, KeyList
from lumaris_protocol.offer_index import OfferIndex
from lumaris_protocol.revocations import RevokedSet

log = logging.getLogger(__name__)

_QUIET_S = 0.5
# The overlay forgets a place that nobody sought for some minutes; asking costs a round trip.
_SEEK_AGAIN_S = 60.0
_PLACES_MAX = 64
_FIRST_SELLER_S = 5.0  # how long a search waits for the first matching advert of a fresh overlay
# Sellers a search names beyond those needed, so that some may refuse and no one owner has them all.
_SPARE = 15


@dataclass(frozen=True)
class BuyerTerms:
    """Who we are on which network, with the coordinator's certificate."""

    network: str
    coordinator: Callable[[], str]  # what new agreements name
    fee_bps: int
    certificate: Callable[[], bytes]
    token: Callable[[], str]
    trusted: TrustedKeys | None = None  # every key of the coordinator that counts
    log: LogWatch | None = None  # compares the heads of the receipts log that we are shown

    @property
    def coordinators(self) -> Set[PeerId]:
        """What certificates and receipts may be signed with."""
        alone: Set[PeerId] = frozenset((PeerId(self.coordinator()),))
        return self.trusted if self.trusted is not None else alone


class SellerError(LumarisError):
    """A seller failed us before any work began; `seller` is not asked again for the same job."""

    def __init__(self, seller: str, error: LumarisError) -> None:
        super().__init__(error.code, error.message, hint=error.hint)
        self.seller = seller


class Market:
    """The buyer's view of the network."""

    def __init__(self, overlay: Overlay, key: KeyPair, terms: BuyerTerms) -> None:
        self._overlay, self._key, self._terms = overlay, key, terms
        self._index = OfferIndex()
        self._changed = trio.Event()
        self._settled = False
        self._sought: dict[tuple[tuple[str, ...], bool], float] = {}
        self.revoked = self._revoked = RevokedSet()
        self.on_revoked: Callable[[], None] = lambda: None
        gate = AdvertGate(terms.network, terms.coordinators, self._revoked)
        self._demands = Demands(overlay, key, gate, terms.certificate, self._put)
        self._asker = Asker(overlay, key, terms.network, terms.certificate, self._revoked)

    @property
    def adverts(self) -> tuple[Signed[Advert], ...]:
        """Every advert known now."""
        return self._current().adverts

    async def follow(self) -> None:
        """Keep the view current, for as long as the client lives."""
        async with self._overlay.adverts() as events, trio.open_nursery() as nursery:
            nursery.start_soon(self._demands.run)
            nursery.start_soon(self._follow_notices)
            async for event in events:
                self._take(event)
            nursery.cancel_scope.cancel()

    async def _follow_notices(self) -> None:
        """Sellers that the coordinator no longer vouches for are not matched; `on_revoked` is
        called when there are more of them."""
        await follow_notices(self._overlay, self._revoked, clock=time.time, heard=self._heed)

    def _heed(self, notice: Notice, peers: frozenset[str]) -> None:
        if notice.kind == KeyList.TYPE and self._terms.trusted is not None:
            try:
                self._terms.trusted.learn(notice.envelope)
            except LumarisError as error:
                log.warning("key list not taken code=%s", error.code)
        if notice.kind == CheckpointNotice.TYPE and self._terms.log is not None:
            self._terms.log.heard(notice.envelope)
        if peers:
            self.on_revoked()
        for seller in peers:
            held = self._index.get(seller)
            if held is not None and self._is_revoked(held.message):
                self._index.remove(seller)
                self._tell()

    def _is_revoked(self, advert: Advert) -> bool:
        try:
            refuse_revoked_seller(self._revoked, advert)
        except EnvelopeError:
            return True
        return False

    async def settle_in(self) -> None:
        """Wait until the first adverts of a fresh overlay are in, and no more follow at once."""
        with trio.move_on_after(_FIRST_SELLER_S):
            while not len(self._index):
                await self._changed.wait()
            while True:
                with trio.move_on_after(_QUIET_S) as quiet:
                    await self._changed.wait()
                if quiet.cancelled_caught:
                    break
        self._settled = True

    async def search(self, needs: Requirements, *, lease_s: int, count: int = 1) -> MatchReport:
        """The best sellers that fit, more than `count` of them as far as there are.

        Waits a little for the first ones of a network just joined, and asks all sellers when none
        of those known fits. Raises LumarisError `no_sellers` or `no_offers` with the counts of what
        excluded whom.
        """
        await self._seek(needs)
        with trio.move_on_after(_FIRST_SELLER_S):
            while not len(self._current()):
                await self._changed.wait()
        report = self._find(needs, lease_s, count)
        if len(self._index) and not self._settled and len(report.matches) < count:
            await self.settle_in()  # a network just joined is still telling us about itself
            report = self._find(needs, lease_s, count)
        if not report.matches and await self._ask_everybody(needs, lease_s):
            report = self._find(needs, lease_s, count)
        if not report.matches:
            raise no_match(report.seen, report.excluded, matching.needed_features(needs))
        return report

    async def change(self, timeout_s: float) -> None:
        """Wait for the next change of the directory, at most `timeout_s`."""
        with trio.move_on_after(timeout_s):
            await self._changed.wait()

    async def quotes(
        self,
        needs: Requirements,
        report: MatchReport,
        *,
        lease_s: int,
        cap_nanos: int,
        verification: Verification,
        count: int = 1,
    ) -> list[Offered]:
        """Signed quotes of the best sellers, cheapest first, at most `count`.

        Others that answered were declined. Raises LumarisError with the last refusal when nobody
        quotes; nothing is held then, nor when this is cancelled.
        """
        wish = Wish(needs, lease_s, cap_nanos, verification)

        def more(asked: frozenset[str]) -> tuple[Match, ...]:
            if report.fitting <= len(report.matches):
                return ()
            others = structs.replace(needs, excluded=(*needs.excluded, *asked))
            return self._find(others, lease_s, count).matches

        ask = partial(self._asker.ask, wish)
        return await Round(ask, report.matches, more, count=count).run()

    async def agree(self, offered: Offered) -> tuple[Contract, KeyPair]:
        """Sign the agreement and take the seller's signature; with our new session key.

        The stream stays open: closing it before the session begins frees the seller's capacity.
        Raises LumarisError; then there is no agreement.
        """
        session_key = KeyPair(os.urandom(32))
        draft = agreements.draft(
            offered.request,
            offered.quote,
            buyer_session_key=session_key.peer_id,
            coordinator=self._terms.coordinator(),
            fee_bps=self._terms.fee_bps,
            now=int(time.time()),
        )
        ours = codec.sign(draft, self._key, self._terms.network)
        try:
            with trio.fail_after(REPLY_S):
                await offered.stream.send(Kind.ENVELOPE, ours.data)
                theirs = await offered.stream.expect(Kind.ENVELOPE)
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
            raise RefusedError("unreachable", "The seller went away before signing.") from None
        contract = agreements.join(ours.data, theirs, network=self._terms.network)
        return contract, session_key

    async def _seek(self, needs: Requirements) -> None:
        """Have the overlay look where such sellers are; in an undivided market they are here."""
        place = (needs.regions, bool(needs.resources.gpus))
        now = trio.current_time()
        if now - self._sought.get(place, -_SEEK_AGAIN_S) < _SEEK_AGAIN_S:
            return
        self._sought.pop(place, None)
        while len(self._sought) >= _PLACES_MAX:
            del self._sought[next(iter(self._sought))]
        self._sought[place] = now
        try:
            await self._overlay.seek(needs)
        except LumarisError as error:
            log.info("sellers not sought code=%s", error.code)

    async def _ask_everybody(self, needs: Requirements, lease_s: int) -> bool:
        """Whether a seller that we did not know has answered."""
        anyone = structs.replace(needs, excluded=())
        if needs.excluded and self._find(anyone, lease_s, 1).matches:
            return False  # those that could answer are known, and were excluded
        return await self._demands.ask(anyone, lease_s)

    # --- the directory ---

    def _current(self) -> OfferIndex:
        self._index.expire(time.time())
        return self._index

    def _find(self, needs: Requirements, lease_s: int, count: int) -> MatchReport:
        index = self._current()
        report = index.search(needs, lease_s=lease_s, count=count + _SPARE)
        if report.matches:
            return report
        # What is free changes faster than adverts travel; a seller that has it all is asked.
        idle = index.search(needs, lease_s=lease_s, count=count + _SPARE, as_if_idle=True)
        return idle if idle.matches else report

    def _take(self, event: AdvertEvent) -> None:
        held = self._index.get(event.seller)
        if held is not None and held.message.seq > event.seq:
            return  # the seller itself told us something newer
        if event.envelope is None:
            self._index.remove(event.seller)
            self._tell()
            return
        try:
            advert = codec.open_signed(
                event.envelope, Advert, network=self._terms.network, signer=event.seller
            )
        except LumarisError as error:
            log.warning("advert refused seller=%s code=%s", event.seller, error.code)
            return
        self._put(advert)

    def _put(self, advert: Signed[Advert]) -> None:
        """Take in what is newer; a full directory takes in no new seller."""
        if self._is_revoked(advert.message):
            return
        held = self._index.get(advert.message.seller)
        if held is None and len(self._index) >= DIRECTORY_ADVERTS_MAX:
            return
        if held is None or advert.message.seq >= held.message.seq:
            self._index.put(advert)
            self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def no_match(seen: int, excluded: Mapping[str, int], features: Collection[str]) -> LumarisError:
    """Why nobody fits, with the constraint that excludes most first and the features asked for."""
    if not seen:
        return LumarisError("no_sellers")
    counts = sorted(excluded.items(), key=lambda item: -item[1])
    words = {"feature_missing": f" of {', '.join(sorted(features))}"}
    reasons = ", ".join(f"{code}{words.get(code, '')} {count}" for code, count in counts)
    return LumarisError("no_offers", f"None of {seen} sellers fits ({reasons}).")
