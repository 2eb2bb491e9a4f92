"""Finding sellers and agreeing with one: from the directory to a contract both signed."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import trio
from msgspec import structs

from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.ports import AdvertEvent, Overlay
from lumaris_protocol import agreements, codec, ids, matching, pricing
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import QUOTE_HOLD_S_MAX
from lumaris_protocol.matching import Match, MatchReport
from lumaris_protocol.messages.advert import Advert, Verification
from lumaris_protocol.messages.negotiation import (
    Quote,
    QuoteRequest,
    Requirements,
)
from lumaris_protocol.protocols import NEGOTIATE

log = logging.getLogger(__name__)

_QUOTES_AT_ONCE = 3
_REPLY_S = 3.0
_QUIET_S = 0.5
_FIRST_SELLER_S = 5.0  # how long a search waits for the first matching advert of a fresh overlay


@dataclass
class Offered:
    """A seller's signed quote, with the stream on which it can still be accepted."""

    request: Signed[QuoteRequest]
    quote: Signed[Quote]
    advert: Signed[Advert]
    stream: FramedStream

    @property
    def price_nanos(self) -> int:
        """What one order over the whole lease costs: what quotes are compared by."""
        quote = self.quote.message
        return quote.terms.start_nanos + quote.terms.rate_nanos_per_s * quote.lease_s

    async def decline(self) -> None:
        """Let it go; the seller frees the capacity at once."""
        await self.stream.aclose()


@dataclass(frozen=True)
class BuyerTerms:
    """Who we are on which network, with the coordinator's certificate."""

    network: str
    coordinator: str
    fee_bps: int
    certificate: Callable[[], bytes]
    token: Callable[[], str]


class SellerError(LumarisError):
    """A seller failed us before any work began; `seller` is not asked again for the same job."""

    def __init__(self, seller: str, error: LumarisError) -> None:
        super().__init__(error.code, error.message, hint=error.hint)
        self.seller = seller


class Market:
    """The buyer's view of the network."""

    def __init__(self, overlay: Overlay, key: KeyPair, terms: BuyerTerms) -> None:
        self._overlay, self._key, self._terms = overlay, key, terms
        self._adverts: dict[str, Signed[Advert]] = {}
        self._changed = trio.Event()

    @property
    def adverts(self) -> tuple[Signed[Advert], ...]:
        """Every advert known now."""
        now = time.time()
        live = [advert for advert in self._adverts.values() if advert.message.expires_at > now]
        return tuple(live)

    async def follow(self) -> None:
        """Keep the view current, for as long as the client lives."""
        async with self._overlay.adverts() as events:
            async for event in events:
                self._take(event)

    async def settle_in(self) -> None:
        """Wait until the first adverts of a fresh overlay are in, and no more follow at once."""
        with trio.move_on_after(_FIRST_SELLER_S):
            while not self._adverts:
                await self._changed.wait()
            while True:
                with trio.move_on_after(_QUIET_S) as quiet:
                    await self._changed.wait()
                if quiet.cancelled_caught:
                    return

    def _take(self, event: AdvertEvent) -> None:
        if event.envelope is None:
            self._adverts.pop(event.seller, None)
        else:
            try:
                advert = codec.open_signed(
                    event.envelope, Advert, network=self._terms.network, signer=event.seller
                )
            except LumarisError as error:
                log.warning("advert refused seller=%s code=%s", event.seller, error.code)
                return
            self._adverts[event.seller] = advert
        self._changed.set()
        self._changed = trio.Event()

    async def search(self, needs: Requirements, *, lease_s: int, count: int = 1) -> MatchReport:
        """Sellers that fit; waits a little for the first ones of a network just joined.

        Raises LumarisError `no_sellers` or `no_offers` with the counts of what excluded whom.
        """
        with trio.move_on_after(_FIRST_SELLER_S):
            while not self.adverts:
                await self._changed.wait()
        if len(self.adverts) < count:
            await self.settle_in()  # a network just joined is still telling us about itself
        report = self._match(needs, lease_s)
        if not report.matches:
            # What is free changes faster than adverts travel; a seller that has it all is asked.
            report = self._match(needs, lease_s, as_if_idle=True)
        if not report.matches:
            raise no_match(self._match(needs, lease_s))
        return report

    async def change(self, timeout_s: float) -> None:
        """Wait for the next change of the directory, at most `timeout_s`."""
        with trio.move_on_after(timeout_s):
            await self._changed.wait()

    def _match(self, needs: Requirements, lease_s: int, *, as_if_idle: bool = False) -> MatchReport:
        adverts = self.adverts
        if as_if_idle:
            adverts = tuple(
                replace(item, message=structs.replace(item.message, free=item.message.total))
                for item in adverts
            )
        return matching.match(needs, adverts, lease_s=lease_s)

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
        """Signed quotes of the best sellers, cheapest first; asks the next ones when some refuse.

        Raises LumarisError with the last refusal when nobody quotes.
        """
        offered: list[Offered] = []
        refusals: list[LumarisError] = []
        queue = list(report.matches)
        while queue and len(offered) < count:
            batch = queue[: max(_QUOTES_AT_ONCE, count - len(offered))]
            queue = queue[len(batch) :]

            async def ask(match: Match) -> None:
                try:
                    offered.append(await self._ask(needs, match, lease_s, cap_nanos, verification))
                except LumarisError as error:
                    refusals.append(error)

            async with trio.open_nursery() as nursery:
                for match in batch:
                    nursery.start_soon(ask, match)
        if not offered:
            raise refusals[-1] if refusals else LumarisError("no_offers")
        offered.sort(key=lambda item: (item.price_nanos, item.quote.message.seller))
        return offered

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
            coordinator=self._terms.coordinator,
            fee_bps=self._terms.fee_bps,
            now=int(time.time()),
        )
        ours = codec.sign(draft, self._key, self._terms.network)
        try:
            with trio.fail_after(_REPLY_S):
                await offered.stream.send(Kind.ENVELOPE, ours.data)
                theirs = await offered.stream.expect(Kind.ENVELOPE)
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
            raise RefusedError("unreachable", "The seller went away before signing.") from None
        contract = agreements.join(ours.data, theirs, network=self._terms.network)
        return contract, session_key

    async def _ask(
        self,
        needs: Requirements,
        match: Match,
        lease_s: int,
        cap_nanos: int,
        verification: Verification,
    ) -> Offered:
        seller, now = match.advert.message.seller, int(time.time())
        request = codec.sign(
            QuoteRequest(
                request=ids.make_id("request", os.urandom(ids.ID_RANDOM_BYTES)),
                buyer=self._key.peer_id,
                seller=seller,
                certificate=self._terms.certificate(),
                requirements=structs.replace(needs, excluded=()),  # whom we avoid is our business
                lease_s=lease_s,
                cap_nanos=cap_nanos,
                verification=verification,
                nonce=os.urandom(16).hex(),
                issued_at=now,
                expires_at=now + math.ceil(_REPLY_S),
            ),
            self._key,
            self._terms.network,
        )
        try:
            with trio.fail_after(_REPLY_S):
                stream = FramedStream(await self._overlay.open_stream(seller, NEGOTIATE))
        except trio.TooSlowError:
            raise RefusedError("unreachable", f"{seller} does not answer.") from None
        try:
            with trio.fail_after(_REPLY_S):
                await stream.send(Kind.ENVELOPE, request.data)
                quote = codec.open_signed(
                    await stream.expect(Kind.ENVELOPE),
                    Quote,
                    network=self._terms.network,
                    signer=seller,
                )
            _check_quote(quote.message, request, match.advert, cap_nanos)
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.aclose()
            raise RefusedError("unreachable", f"{seller} went away.") from None
        except LumarisError:
            await stream.aclose()
            raise
        return Offered(request, quote, match.advert, stream)


def no_match(report: MatchReport) -> LumarisError:
    """Why nobody fits, with the constraint that excludes most first."""
    if not report.seen:
        return LumarisError("no_sellers")
    counts = sorted(report.excluded.items(), key=lambda item: -item[1])
    reasons = ", ".join(f"{code} {count}" for code, count in counts)
    return LumarisError("no_offers", f"None of {report.seen} sellers fits ({reasons}).")


def _check_quote(
    quote: Quote, request: Signed[QuoteRequest], advert: Signed[Advert], cap_nanos: int
) -> None:
    """The price shown must be the price signed: the quote may not exceed the advertised table."""
    asked = request.message
    rate = pricing.rate_nanos_per_s(advert.message.prices, asked.requirements.resources)
    fits = (
        quote.request_hash == request.hash
        and quote.buyer == asked.buyer
        and quote.seller == asked.seller
        and quote.resources == asked.requirements.resources
        and quote.lease_s == asked.lease_s
        and quote.terms.currency == asked.requirements.currency
        and quote.terms.rate_nanos_per_s <= rate
        and quote.terms.start_nanos <= advert.message.prices.start_nanos
        and (not cap_nanos or quote.terms.cap_nanos <= cap_nanos)
        and quote.hold_until <= asked.issued_at + 2 * QUOTE_HOLD_S_MAX
    )
    if not fits:
        raise RefusedError("terms_changed", "The quote does not match the seller's own advert.")
