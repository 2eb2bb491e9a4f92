"""Settlement: what the parties claim, and what becomes of an escrow when its window ends.

Every signature is checked before the store is touched; then one operation of the writer decides.
Claims are idempotent by the agreement: a lost answer is asked for again with the same bytes.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import anyio

from lumaris_coordinator.bounds import EXPIRIES_PER_BATCH, EXPIRIES_PER_ROUND_MAX
from lumaris_coordinator.escrow import claims, paying, store
from lumaris_coordinator.escrow.disputed import current
from lumaris_coordinator.escrow.store import Change, Escrow
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import agreements, codec, settlement
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.limits import CLOCK_SKEW_S
from lumaris_protocol.messages.payment import Settle, Voucher
from lumaris_protocol.messages.receipt import Outcome
from lumaris_protocol.rulings import is_forged
from lumaris_protocol.settlement import Claim

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context

log = logging.getLogger(__name__)


class Escrows:
    """The rules of paying."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def settle(self, body: bytes) -> Escrow:
        """Apply a party's claim; the escrow after it. Claiming the same total again moves nothing.

        Raises EnvelopeError or RefusedError for a claim that does not hold, and LumarisError:
        `not_found`, `already_settled`, `busy`.
        """
        context, now = self._context, self._context.now()
        settle = codec.open_signed(body, Settle, network=context.settings.network)
        if settle.message.issued_at > now + CLOCK_SKEW_S:
            raise EnvelopeError("not_yet_valid", "The claim is dated in the future.")
        if settle.message.coordinator not in context.keys.names():
            raise EnvelopeError("wrong_domain", "The claim names another coordinator.")
        # What was checked when the money was held is compared with that and not checked again.
        name = agreements.payload_hash(settle.message.agreement_by_buyer)
        known = await context.store.read(partial(store.documents, agreement_hash=name))
        try:
            claim = settlement.open_claim(
                settle,
                network=context.settings.network,
                coordinator=settle.message.coordinator,
                known=known,
            )
        except EnvelopeError:
            await self._keep_forgery(settle, name, now)
            raise
        found = await context.store.submit(
            lambda connection: self._apply(connection, claim, settle, now)
        )
        total = claim.total_nanos
        if found.final and total not in (found.paid, found.claimed_total):
            raise LumarisError(
                "already_settled", f"The session was settled with {found.paid} nanos."
            )
        return found

    async def _keep_forgery(self, settle: Signed[Settle], name: str, now: int) -> None:
        """A party's signed claim with a forged voucher is evidence for the other side."""
        message, network = settle.message, self._context.settings.network

        def look(connection: Connection) -> bool:
            escrow = store.find(connection, name)
            if escrow is None or settle.signer not in (escrow.buyer, escrow.seller):
                return False
            found = claims.kept(connection, name)
            if any(one.party == settle.signer and not one.taken for one in found):
                return False
            agreement = paying.contract_of(self._context, escrow).agreement
            return is_forged(message.voucher, agreement, network=network)

        if message.party == settle.signer and await self._context.store.read(look):
            await self._context.store.submit(
                lambda connection: claims.keep(
                    connection, name, settle.signer, settle.data, taken=False, now=now
                )
            )

    def _apply(
        self, connection: Connection, claim: Claim, settle: Signed[Settle], now: int
    ) -> Escrow:
        escrow = current(self._context, connection, claim.contract.hash, now=now)
        if escrow.final:
            return escrow
        take = self._take_disputed if escrow.state == "disputed" else self._take
        after = take(connection, escrow, claim, settle.hash, now)
        if claim.fact == "buyer_claim" and after is not escrow:
            claims.keep(
                connection, escrow.agreement_hash, escrow.buyer, settle.data, taken=True, now=now
            )
        return after

    def _take_disputed(
        self, connection: Connection, escrow: Escrow, claim: Claim, evidence: str, now: int
    ) -> Escrow:
        """What the voucher adds is the seller's at once; the dispute goes on about the rest."""
        voucher, total = _highest(escrow, claim)
        heard = claim.fact == "seller_claim" and escrow.claimed_total is None
        if voucher is None and not heard:
            return escrow
        change = Change(
            paid=max(escrow.paid, total),
            voucher=voucher,
            claimed_total=claim.total_nanos if claim.fact == "seller_claim" else None,
        )
        after = store.advance(
            connection, escrow, claim.fact, evidence=evidence, now=now, change=change
        )
        paying.pay_up(connection, escrow, after, claim.contract, kind="vouchered", now=now)
        paying.tell(connection, after, claim.fact, now=now)
        return after

    def _take(
        self, connection: Connection, escrow: Escrow, claim: Claim, evidence: str, now: int
    ) -> Escrow:
        if claim.fact == "buyer_claim":
            return self._record(connection, escrow, claim, evidence, now)
        if claim.fact == "both_closed" and claim.total_nanos < escrow.paid:
            raise LumarisError("already_settled", f"{escrow.paid} nanos were paid in a dispute.")
        if claim.fact == "both_closed" and claim.total_nanos > escrow.payable:
            raise LumarisError("already_settled", f"{escrow.returned} nanos were returned.")
        # A buyer that showed a higher voucher itself owes it: the seller gets what was signed.
        voucher, total = _highest(escrow, claim)
        closes: tuple[bytes, bytes] | None = None
        outcome: Outcome = "claimed"
        if claim.fact == "both_closed":
            by_buyer, by_seller = claim.closes
            total, outcome, closes = claim.total_nanos, "closed", (by_buyer, by_seller)
        change = Change(
            paid=max(escrow.paid, total),
            voucher=voucher,
            claimed_total=claim.total_nanos,
            closes=closes,
        )
        after = store.advance(
            connection, escrow, claim.fact, evidence=evidence, now=now, change=change
        )
        paying.finish(
            self._context, connection, escrow, after, claim.contract, outcome=outcome, now=now
        )
        paying.tell(connection, after, claim.fact, now=now)
        return after

    def _record(
        self, connection: Connection, escrow: Escrow, claim: Claim, evidence: str, now: int
    ) -> Escrow:
        """The buyer alone: keep its voucher when it is higher. A repetition is no new event."""
        if escrow.state == "claimed" and claim.vouchered_nanos <= escrow.voucher_total:
            return escrow
        voucher, _ = _highest(escrow, claim)
        change = Change(voucher=voucher)
        after = store.advance(
            connection, escrow, "buyer_claim", evidence=evidence, now=now, change=change
        )
        paying.tell(connection, after, "buyer_claim", now=now)
        return after

    async def expire_due(self) -> int:
        """End every escrow whose window has passed, up to a bound per call; how many were tried."""
        context, now = self._context, self._context.now()
        tried: set[str] = set()
        while len(tried) < EXPIRIES_PER_ROUND_MAX:
            # What was tried and is still due could not be ended: the query must reach past it.
            limit = EXPIRIES_PER_BATCH + len(tried)
            names = await context.store.read(partial(store.due, now=now, limit=limit))
            fresh = [name for name in names if name not in tried][:EXPIRIES_PER_BATCH]
            if not fresh:
                break
            async with anyio.create_task_group() as tasks:
                for name in fresh:
                    tasks.start_soon(self._try_expire, name, now)
            tried.update(fresh)
        return len(tried)

    async def _try_expire(self, agreement_hash: str, now: int) -> None:
        """One escrow, on its own: a damaged one must not keep the others from ending."""
        try:
            await self._context.store.submit(
                lambda connection: self._expire_if_due(connection, agreement_hash, now)
            )
        except Exception:
            log.exception("the settle window of agreement %s could not be ended", agreement_hash)

    def _expire_if_due(self, connection: Connection, agreement_hash: str, now: int) -> None:
        current(self._context, connection, agreement_hash, now=now)


def _highest(escrow: Escrow, claim: Claim) -> tuple[Signed[Voucher] | None, int]:
    """The claim's voucher where it is higher than the one kept, and the higher total of the two.

    One that is shown when its money has been returned comes too late.
    """
    if claim.voucher is None or not escrow.voucher_total < claim.vouchered_nanos <= escrow.payable:
        return None, escrow.voucher_total
    return claim.voucher, claim.vouchered_nanos
