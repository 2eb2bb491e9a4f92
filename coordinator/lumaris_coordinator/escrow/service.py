"""Settlement: what the parties claim, and what becomes of an escrow when its window ends.

Every signature is checked before the store is touched; then one operation of the writer decides.
Claims are idempotent by the agreement: a lost answer is asked for again with the same bytes.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import anyio

from lumaris_coordinator.bounds import EXPIRIES_PER_BATCH, EXPIRIES_PER_ROUND_MAX
from lumaris_coordinator.escrow import paying, store
from lumaris_coordinator.escrow.disputed import current
from lumaris_coordinator.escrow.store import Escrow
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import codec, settlement
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.limits import CLOCK_SKEW_S
from lumaris_protocol.messages.payment import Settle
from lumaris_protocol.messages.receipt import Outcome
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
        claim = settlement.open_claim(
            settle, network=context.settings.network, coordinator=settle.message.coordinator
        )
        found = await context.store.submit(
            lambda connection: self._apply(connection, claim, settle.hash, now)
        )
        total = claim.total_nanos
        if found.final and total not in (found.paid, found.claimed_total):
            raise LumarisError(
                "already_settled", f"The session was settled with {found.paid} nanos."
            )
        return found

    def _apply(self, connection: Connection, claim: Claim, evidence: str, now: int) -> Escrow:
        escrow = current(self._context, connection, claim.contract.hash, now=now)
        if escrow.final:
            return escrow
        take = self._take_disputed if escrow.state == "disputed" else self._take
        return take(connection, escrow, claim, evidence, now)

    def _take_disputed(
        self, connection: Connection, escrow: Escrow, claim: Claim, evidence: str, now: int
    ) -> Escrow:
        """What the voucher adds is the seller's at once; the dispute goes on about the rest."""
        raised = claim.vouchered_nanos > escrow.voucher_total
        heard = claim.fact == "seller_claim" and escrow.claimed_total is None
        if not raised and not heard:
            return escrow
        after = self._raise_voucher(connection, escrow, claim)
        after = store.advance(connection, after, claim.fact, evidence=evidence, now=now)
        if claim.fact == "seller_claim":
            after = replace(after, claimed_total=claim.total_nanos)
        after = paying.pay_up(
            connection, after, claim.contract, after.voucher_total, kind="vouchered", now=now
        )
        store.save_settlement(connection, after)
        paying.tell(connection, after, claim.fact, now=now)
        return after

    def _take(
        self, connection: Connection, escrow: Escrow, claim: Claim, evidence: str, now: int
    ) -> Escrow:
        if claim.fact == "buyer_claim":
            return self._record(connection, escrow, claim, evidence, now)
        if claim.fact == "both_closed" and claim.total_nanos < escrow.paid:
            raise LumarisError("already_settled", f"{escrow.paid} nanos were paid in a dispute.")
        # A buyer that showed a higher voucher itself owes it: the seller gets what was signed.
        after = self._raise_voucher(connection, escrow, claim)
        after = store.advance(connection, after, claim.fact, evidence=evidence, now=now)
        after = replace(after, claimed_total=claim.total_nanos)
        total = after.voucher_total
        outcome: Outcome = "claimed"
        if claim.fact == "both_closed":
            total, outcome = claim.total_nanos, "closed"
            by_buyer, by_seller = claim.closes
            after = replace(after, close_by_buyer=by_buyer, close_by_seller=by_seller)
        after = paying.finish(
            self._context,
            connection,
            after,
            claim.contract,
            total=total,
            outcome=outcome,
            now=now,
        )
        paying.tell(connection, after, claim.fact, now=now)
        return after

    def _record(
        self, connection: Connection, escrow: Escrow, claim: Claim, evidence: str, now: int
    ) -> Escrow:
        """The buyer alone: keep its voucher when it is higher. A repetition is no new event."""
        if escrow.state == "claimed" and claim.vouchered_nanos <= escrow.voucher_total:
            return escrow
        after = self._raise_voucher(connection, escrow, claim)
        after = store.advance(connection, after, "buyer_claim", evidence=evidence, now=now)
        paying.tell(connection, after, "buyer_claim", now=now)
        return after

    def _raise_voucher(self, connection: Connection, escrow: Escrow, claim: Claim) -> Escrow:
        if claim.voucher is None or claim.vouchered_nanos <= escrow.voucher_total:
            return escrow
        return store.record_voucher(connection, escrow, claim.voucher)

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
