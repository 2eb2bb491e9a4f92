"""The adverts that the coordinator's own overlay has heard, searchable by what a buyer needs.

A search costs by how many it answers, not by how many there are: `OfferIndex` finds the cheapest
that fit without a look at the rest. What is not named by a query may be anything.
"""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Callable
from typing import Any, Final, get_args

import anyio
import msgspec
from msgspec import structs

from lumaris_coordinator.bounds import OFFERS_DEPTH_MAX, OFFERS_SEARCHES_MAX
from lumaris_overlay.ports import AdvertEvent
from lumaris_protocol import codec, pricing
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.limits import DIRECTORY_ADVERTS_MAX
from lumaris_protocol.matching import Match
from lumaris_protocol.messages.advert import Advert, Resources, Tier
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.offer_index import OfferIndex

log = logging.getLogger(__name__)

_S_PER_HOUR: Final = 3600
_TIERS: Final[tuple[Tier, ...]] = get_args(Tier)


class Place(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Where in the order of all that fit an offer stands: the cheapest first, as in matching."""

    price: int
    image_missing: bool
    seller: str


class Cursor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The last offer of a page, and how many there were up to it."""

    place: Place
    count: int


class Offers:
    """The newest advert of each seller. `take` is called in one thread, `page` in another."""

    def __init__(self, *, network: str, now: Callable[[], int]) -> None:
        self._network, self._now = network, now
        self._index = OfferIndex()
        self._lock = threading.Lock()
        self._heard_at = 0
        self._searching: anyio.CapacityLimiter | None = None

    def __len__(self) -> int:
        return len(self._index)

    def searching(self) -> anyio.CapacityLimiter:
        """Who looks through the offers at once: more threads would only wait for each other."""
        if self._searching is None:  # it belongs to the event loop, which begins after us
            self._searching = anyio.CapacityLimiter(OFFERS_SEARCHES_MAX)
        return self._searching

    def heard(self) -> None:
        """The overlay is there: what it has not changed is still so."""
        self._heard_at = self._now()

    def take(self, event: AdvertEvent) -> None:
        """Take a change of the overlay's directory in. What is wrong with it is logged."""
        advert = None
        if event.envelope is not None:
            try:
                advert = codec.open_signed(
                    event.envelope, Advert, network=self._network, signer=event.seller
                )
            except EnvelopeError as error:
                log.warning("advert refused seller=%s code=%s", event.seller, error.code)
                return
        self.heard()
        with self._lock:
            if advert is None:
                self._index.remove(event.seller)
            elif self._index.get(event.seller) or len(self._index) < DIRECTORY_ADVERTS_MAX:
                self._index.put(advert)

    def page(
        self, needs: Requirements, *, tier: Tier | None, lease_s: int, limit: int, after: str
    ) -> dict[str, Any]:
        """{offers, next, seen, as_of, hint}: the next cheapest `limit` that fit behind `after`.

        Without `tier` any will do, whatever `needs` say. Raises LumarisError `malformed` for a
        cursor that is none.
        """
        behind = _decode(after) if after else None
        tiers = (tier,) if tier is not None else _TIERS
        asked = [structs.replace(needs, tier=each) for each in tiers]
        with self._lock:
            self._index.expire(self._now())
            found, seen = self._behind(asked, behind, lease_s, limit), len(self._index)
        shown = found[:limit]
        more = len(found) > limit and shown[-1][1] < OFFERS_DEPTH_MAX
        return {
            "offers": [_shown(match.advert, needs.resources) for _, _, match in shown],
            "next": _encode(Cursor(shown[-1][0], shown[-1][1])) if more else None,
            "seen": seen,
            "as_of": self._heard_at,
            "hint": True,
        }

    def _behind(
        self, asked: list[Requirements], behind: Cursor | None, lease_s: int, limit: int
    ) -> list[tuple[Place, int, Match]]:
        """What follows a cursor, one more than `limit` if there is: (place, its number, match)."""
        count = min((behind.count if behind else 0) + limit + 1, OFFERS_DEPTH_MAX + 1)
        while True:
            reports = [self._index.search(each, lease_s=lease_s, count=count) for each in asked]
            merged = {_place(match): match for report in reports for match in report.matches}
            ordered = sorted(merged.items())[:count]
            found = [
                (place, number, match)
                for number, (place, match) in enumerate(ordered, 1)
                if behind is None or place > behind.place
            ]
            # Cheaper ones may have come since the last page: look further, but not without end.
            exhausted = all(report.fitting <= count for report in reports)
            if len(found) > limit or exhausted or count > OFFERS_DEPTH_MAX:
                return found
            count = min(2 * count, OFFERS_DEPTH_MAX + 1)


def _place(match: Match) -> Place:
    return Place(match.lease_nanos, not match.has_image, match.advert.message.seller)


def _shown(advert: Signed[Advert], wanted: Resources) -> dict[str, Any]:
    message = advert.message
    prices = message.prices
    return {
        "seller": message.seller,
        "region": message.region,
        "tiers": {runtime.tier: runtime.assurance for runtime in message.runtimes},
        "free": message.free,
        "total": message.total,
        "currency": prices.currency,
        "start_nanos": prices.start_nanos,
        "hour_nanos": pricing.rate_nanos_per_s(prices, wanted) * _S_PER_HOUR,
        "lease_s_max": message.lease_s_max,
        "expires_at": message.expires_at,
        "advert": advert.data,
    }


def _encode(cursor: Cursor) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode(cursor)).decode().rstrip("=")


def _decode(text: str) -> Cursor:
    try:
        data = base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
        found = msgspec.json.decode(data, type=Cursor)
    except (ValueError, msgspec.MsgspecError, RecursionError):
        raise LumarisError("malformed", "`after` is not a cursor of this list.") from None
    if not 0 <= found.count <= OFFERS_DEPTH_MAX:
        raise LumarisError("malformed", "`after` is not a cursor of this list.")
    return found
