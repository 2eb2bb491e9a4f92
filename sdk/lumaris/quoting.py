"""Asking several sellers for their price at once, and keeping the best answers.

The best sellers by the directory are asked together. While too few have answered, a slow or
refusing seller is made up for by asking the next one. Enough answers end it: at once when nobody
who is still silent advertises less, else after a short grace. What is not taken is declined before
the caller goes on, so that no seller holds capacity for nothing.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio
from msgspec import structs

from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.networks import network_of
from lumaris_overlay.ports import Overlay
from lumaris_overlay.tasks import shielded
from lumaris_overlay.validate import refuse_revoked_seller
from lumaris_protocol import codec, envelope, ids, pricing
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import QUOTE_HOLD_S_MAX
from lumaris_protocol.matching import Match
from lumaris_protocol.messages.advert import Advert, MembershipCertificate, Verification
from lumaris_protocol.messages.negotiation import Quote, QuoteRequest, Requirements
from lumaris_protocol.protocols import NEGOTIATE
from lumaris_protocol.revocations import RevokedSet

log = logging.getLogger(__name__)

REPLY_S = 3.0
_SPARE = 2  # sellers asked beyond those needed, so that one that is gone costs no time
_HEDGE_S = 0.15  # an honest seller answers in a tenth of this
_GRACE_S = 0.05
_SUBNET_BITS = (24, 48)  # IPv4, IPv6: what one owner has at once
_ASKED_MAX = 64
_DECLINE_S = 1.0


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
class Wish:
    """What is asked of every seller alike."""

    needs: Requirements
    lease_s: int
    cap_nanos: int
    verification: Verification


class Asker:
    """Asks one seller for one quote."""

    def __init__(
        self,
        overlay: Overlay,
        key: KeyPair,
        network: str,
        certificate: Callable[[], bytes],
        revoked: RevokedSet | None = None,
    ) -> None:
        self._overlay, self._key = overlay, key
        self._network, self._certificate = network, certificate
        self._revoked = revoked if revoked is not None else RevokedSet()

    async def ask(self, wish: Wish, match: Match) -> Offered:
        """The seller's quote, checked. Raises LumarisError; then no stream is left open."""
        seller = match.advert.message.seller
        refuse_revoked_seller(self._revoked, match.advert.message)
        request = self._request(wish, seller)
        try:
            with trio.fail_after(REPLY_S):
                stream = FramedStream(await self._open(match.advert.message))
        except trio.TooSlowError:
            raise RefusedError("unreachable", f"{seller} does not answer.") from None
        taken = False
        try:
            with trio.fail_after(REPLY_S):
                await stream.send(Kind.ENVELOPE, request.data)
                quote = codec.open_signed(
                    await stream.expect(Kind.ENVELOPE), Quote, network=self._network, signer=seller
                )
            _check_quote(quote.message, request, match.advert, wish.cap_nanos)
            taken = True
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
            raise RefusedError("unreachable", f"{seller} went away.") from None
        finally:
            if not taken:
                with shielded(_DECLINE_S):
                    await stream.aclose()
        return Offered(request, quote, match.advert, stream)

    async def _open(self, advert: Advert) -> trio.abc.HalfCloseableStream:
        # The advert may have come from the seller itself, and the overlay not know its addresses.
        return await self._overlay.open_stream(advert.seller, NEGOTIATE, addresses=advert.addresses)

    def _request(self, wish: Wish, seller: str) -> Signed[QuoteRequest]:
        now = int(time.time())
        request = QuoteRequest(
            request=ids.make_id("request", os.urandom(ids.ID_RANDOM_BYTES)),
            buyer=self._key.peer_id,
            seller=seller,
            certificate=self._certificate(),
            requirements=structs.replace(wish.needs, excluded=()),  # whom we avoid is our business
            lease_s=wish.lease_s,
            cap_nanos=wish.cap_nanos,
            verification=wish.verification,
            nonce=os.urandom(16).hex(),
            issued_at=now,
            expires_at=now + math.ceil(REPLY_S),
        )
        return codec.sign(request, self._key, self._network)


class Round:
    """One round of asking, until `count` sellers have quoted or nobody is left to ask.

    `more` gives further sellers when those at hand are used up, without those asked already.
    """

    def __init__(
        self,
        ask: Callable[[Match], Awaitable[Offered]],
        matches: Sequence[Match],
        more: Callable[[frozenset[str]], Sequence[Match]],
        *,
        count: int,
    ) -> None:
        self._ask, self._more, self._count = ask, more, count
        self._queue = spread(matches)
        self._waiting: dict[str, int] = {}  # the advertised price of whoever has not answered
        self._asked: set[str] = set()
        self._offered: list[Offered] = []
        self._refusals: list[LumarisError] = []
        self._changed = trio.Event()

    async def run(self) -> list[Offered]:
        """The best quotes, cheapest first, at most `count`. Raises the last refusal for none."""
        chosen: list[Offered] = []
        try:
            async with trio.open_nursery() as nursery:
                await self._gather(nursery)
                nursery.cancel_scope.cancel()
            self._offered.sort(key=lambda item: (item.price_nanos, item.quote.message.seller))
            chosen = self._offered[: self._count]
        finally:
            # When we are cancelled, nothing is chosen and everything goes back.
            await self._decline(self._offered[len(chosen) :])
        if not chosen:
            raise self._refusals[-1] if self._refusals else LumarisError("no_offers")
        return chosen

    async def _gather(self, nursery: trio.Nursery) -> None:
        self._refill(nursery)
        while self._waiting and len(self._offered) < self._count:
            with trio.move_on_after(_HEDGE_S) as slow:
                await self._news()
            if slow.cancelled_caught:
                self._ask_next(nursery)
            else:
                self._refill(nursery)
        with trio.move_on_after(_GRACE_S):
            while self._waiting and not self._settled():
                await self._news()

    def _settled(self) -> bool:
        """Whether nobody who is still silent advertises less than what we would take."""
        prices = sorted(item.price_nanos for item in self._offered)[: self._count]
        return not prices or min(self._waiting.values()) >= prices[-1]

    async def _news(self) -> None:
        self._changed = trio.Event()
        await self._changed.wait()

    def _refill(self, nursery: trio.Nursery) -> None:
        """Have as many under way as are needed, and some to spare."""
        missing = self._count - len(self._offered)
        while missing > 0 and len(self._waiting) < missing + _SPARE:
            if not self._ask_next(nursery):
                return

    def _ask_next(self, nursery: trio.Nursery) -> bool:
        if not self._queue and len(self._asked) < _ASKED_MAX:
            self._queue = spread(self._more(frozenset(self._asked)))
        if not self._queue or len(self._asked) >= _ASKED_MAX:
            return False
        match = self._queue.pop(0)
        seller = match.advert.message.seller
        self._asked.add(seller)
        self._waiting[seller] = match.lease_nanos
        nursery.start_soon(self._one, match)
        return True

    async def _one(self, match: Match) -> None:
        try:
            self._offered.append(await self._ask(match))
        except LumarisError as error:
            self._refusals.append(error)
        del self._waiting[match.advert.message.seller]
        self._changed.set()

    async def _decline(self, losers: Sequence[Offered]) -> None:
        if losers:
            with shielded(_DECLINE_S):
                async with trio.open_nursery() as nursery:
                    for offered in losers:
                        nursery.start_soon(offered.decline)


def spread(matches: Sequence[Match]) -> list[Match]:
    """The same sellers, but first one of each subnet and owner, each group in its old order.

    So one operator with many machines is not all that is asked. It is a preference: where there is
    only one subnet, as on one machine, everybody is asked in the old order.
    """
    subnets, owners = set[str](), set[str]()
    first: list[Match] = []
    rest: list[Match] = []
    for match in matches:
        subnet, owner = subnet_of(match.advert.message), _owner_of(match.advert.message)
        if subnet in subnets or owner in owners:
            rest.append(match)
            continue
        subnets.add(subnet)
        owners.add(owner)
        first.append(match)
    return first + rest


def subnet_of(advert: Advert) -> str:
    """The /24 or /48 of the first public address; "" for sellers that show none."""
    for address in advert.addresses:
        # A relay's address says where the relay is.
        _, kind, host, *rest = [*address.split("/"), "", ""]
        if kind not in ("ip4", "ip6") or "p2p-circuit" in rest:
            continue
        try:
            found = ipaddress.ip_address(host)
        except ValueError:
            continue
        if found.is_global:
            return network_of(host, _SUBNET_BITS)
    return ""


def _owner_of(advert: Advert) -> str:
    """The account in the certificate, which the overlay has verified."""
    try:
        payload = envelope.decode(advert.certificate).payload
        return codec.decode_payload(payload, MembershipCertificate).account
    except LumarisError:
        return advert.seller


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
