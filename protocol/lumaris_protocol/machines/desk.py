"""The quote desk: who holds which part of a seller's capacity, and until when.

Every hold ends: a quote lapses after seconds, an agreement without a grant at `start_by`, a session
at `ends_at`. Capacity is derived from the holds that exist, so it cannot leak.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from msgspec import structs

from lumaris_protocol import agreements, matching, pricing
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import RefusedError
from lumaris_protocol.ids import derive_id
from lumaris_protocol.limits import (
    CLOCK_SKEW_S,
    QUOTE_HOLD_S_MAX,
    QUOTES_HELD_MAX,
    QUOTES_HELD_PER_BUYER_MAX,
    SESSIONS_MAX,
)
from lumaris_protocol.machines.table import Machine, Row, Table
from lumaris_protocol.messages.advert import Advert, Resources
from lumaris_protocol.messages.negotiation import Agreement, Quote, QuoteRequest

QUOTE: Final = Table(
    "quote",
    initial="offered",
    final=("lapsed", "released"),
    rows=(
        Row("offered", "agreed", "agreed", "countersign; keep the hold until start_by"),
        Row("offered", "time_out", "lapsed", "give the capacity back"),
        Row("offered", "granted", "offered", refusal="quote_unknown"),
        Row("agreed", "agreed", "agreed", refusal="quote_unknown"),
        Row("agreed", "granted", "in_session", "keep the hold until the session ends"),
        Row("agreed", "time_out", "lapsed", "give the capacity back"),
        Row("agreed", "ended", "released", "the buyer left before the session"),
        Row("in_session", "agreed", "in_session", refusal="quote_unknown"),
        Row("in_session", "granted", "in_session", refusal="quote_unknown"),
        Row("in_session", "ended", "released", "give the capacity back"),
        Row("in_session", "time_out", "released", "end the session; give the capacity back"),
    ),
)

# After an agreement the buyer still has to fetch its grant and open the session.
GRANT_WAIT_S: Final = 30


@dataclass
class Hold:
    """A part of the capacity that is spoken for."""

    request: Signed[QuoteRequest]
    quote: Signed[Quote]
    machine: Machine
    until: float
    contract: Contract | None = None

    @property
    def resources(self) -> Resources:
        """What is held."""
        return self.quote.message.resources


class QuoteDesk:
    """Answers requests out of a seller's capacity. `total` is what may be sold at once."""

    def __init__(self, total: Resources) -> None:
        self.total = total
        self.accepting = True
        self._holds: dict[str, Hold] = {}  # by quote hash
        self._used: dict[str, float] = {}  # request hashes answered, until they expire
        self._overdue: list[Hold] = []  # sessions past their end, until the caller has heard of it
        self._aside: list[Resources] = []

    @property
    def holds(self) -> tuple[Hold, ...]:
        """Every live hold."""
        return tuple(self._holds.values())

    @property
    def free(self) -> Resources:
        """The capacity nobody holds."""
        free = self.total
        held = [hold.resources for hold in self._holds.values()]
        for resources in (*held, *self._aside):
            rest = matching.subtract(free, resources)
            assert rest is not None, "holds never exceed the total"
            free = rest
        return free

    @contextmanager
    def aside(self, resources: Resources) -> Iterator[None]:
        """Sell none of this until the block ends. Raises RefusedError `no_capacity`."""
        if matching.subtract(self.free, resources) is None:
            raise RefusedError("no_capacity", "That much is not free now.")
        self._aside.append(resources)
        try:
            yield
        finally:
            self._aside.remove(resources)

    def offer(
        self,
        request: Signed[QuoteRequest],
        advert: Signed[Advert],
        *,
        seller_session_key: str,
        now: float,
    ) -> Quote:
        """The quote for a request; `hold` it once it is signed.

        Raises RefusedError with the constraint that fails, or `no_capacity`, `too_many_holds`,
        `not_accepting`, `replayed`, `not_disputable`.
        """
        self._lapse(now)
        message = request.message
        if not self.accepting:
            raise RefusedError("not_accepting")
        if request.hash in self._used:
            raise RefusedError("replayed")
        held = [hold for hold in self._holds.values() if hold.machine.state != "in_session"]
        of_buyer = [hold for hold in held if hold.request.message.buyer == message.buyer]
        if len(held) >= QUOTES_HELD_MAX or len(of_buyer) >= QUOTES_HELD_PER_BUYER_MAX:
            raise RefusedError("too_many_holds")
        wanted = message.requirements.resources
        if wanted.cpu_millis == 0:
            # Nothing runs without a processor; such holds would be free and never run out.
            raise RefusedError("cpu_short")
        if len(self._holds) >= SESSIONS_MAX or matching.subtract(self.free, wanted) is None:
            raise RefusedError("no_capacity")
        prices = advert.message.prices
        least = prices.start_nanos + pricing.rate_nanos_per_s(prices, wanted) // 10
        if 0 < message.cap_nanos < least:
            raise RefusedError("budget_exceeded", "The cap does not cover a tenth of a second.")
        # The advert's own `free` may lag behind; capacity was just checked against the truth.
        current = _with_free(advert.message, self.free)
        failures = matching.explain(message.requirements, current, lease_s=message.lease_s)
        if failures:
            raise RefusedError(failures[0])
        if not agreements.is_repeatable(message.requirements.tier, message.verification):
            raise RefusedError("not_disputable", "Results of this tier cannot be run again.")
        return Quote(
            quote=derive_id("quote", request.data),
            request_hash=request.hash,
            advert_hash=advert.hash,
            buyer=message.buyer,
            seller=message.seller,
            seller_session_key=seller_session_key,
            resources=wanted,
            terms=pricing.terms_for(
                advert.message.prices, wanted, lease_s=message.lease_s, cap_nanos=message.cap_nanos
            ),
            lease_s=message.lease_s,
            issued_at=int(now),
            hold_until=int(now) + QUOTE_HOLD_S_MAX,
        )

    def hold(self, request: Signed[QuoteRequest], quote: Signed[Quote]) -> Hold:
        """Reserve what a signed quote promises."""
        hold = Hold(request, quote, Machine(QUOTE), float(quote.message.hold_until))
        self._holds[quote.hash] = hold
        self._used[request.hash] = float(
            request.message.expires_at + CLOCK_SKEW_S + QUOTE_HOLD_S_MAX
        )
        return hold

    def find_quote(self, agreement: Agreement, *, now: float) -> Hold:
        """The hold a buyer-signed agreement builds on, checked against the quote's terms.

        Raises RefusedError: `quote_unknown` (also when it lapsed or was used), `terms_changed`.
        """
        self._lapse(now)
        hold = self._holds.get(agreement.quote_hash)
        if hold is None or not hold.machine.can("agreed"):
            raise RefusedError("quote_unknown")
        # The buyer dates the agreement, and its end counts from there.
        if abs(agreement.issued_at - now) > CLOCK_SKEW_S:
            raise RefusedError("terms_changed", "The agreement is not dated now.")
        agreements.check_against_quote(agreement, hold.request, hold.quote)
        return hold

    def agree(self, hold: Hold, contract: Contract, *, now: float) -> None:
        """Both signed: keep the hold while the buyer fetches its grant."""
        hold.machine.take("agreed")
        hold.contract = contract
        hold.until = now + GRANT_WAIT_S

    def granted(self, agreement_hash: str, *, now: float) -> Hold:
        """The session of an agreement begins.

        Raises RefusedError, or ViolationError when it began before: `quote_unknown`.
        """
        self._lapse(now)
        for hold in self._holds.values():
            if hold.contract is not None and hold.contract.hash == agreement_hash:
                hold.machine.take("granted")
                hold.until = float(hold.contract.agreement.ends_at)
                return hold
        raise RefusedError("quote_unknown", "No agreement of that hash is waiting for its grant.")

    def release(self, hold: Hold) -> None:
        """The session is over: the capacity is free again. Harmless when it already was."""
        if self._holds.pop(hold.quote.hash, None) is not None:
            hold.machine.take("ended")

    def expire(self, now: float) -> list[Hold]:
        """Let holds past their time go; those that were in session are returned, to be ended."""
        self._lapse(now)
        overdue, self._overdue = self._overdue, []
        return overdue

    def _lapse(self, now: float) -> None:
        late = [hold for hold in self._holds.values() if hold.until < now]
        for hold in late:
            del self._holds[hold.quote.hash]
            hold.machine.take("time_out")
        self._used = {name: until for name, until in self._used.items() if until >= now}
        self._overdue += [hold for hold in late if hold.machine.state == "released"]


def _with_free(advert: Advert, free: Resources) -> Advert:
    return structs.replace(advert, free=free, withdrawn=False)
