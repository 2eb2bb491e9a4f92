"""Grants and settlements: the two things the coordinator does for a session.

Both check every signature before they touch the store, then decide inside one operation of the
writer. Both are idempotent by the agreement: a lost answer is asked for again with the same bytes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from lumaris_coordinator.bounds import (
    CAP_NANOS_MIN,
    ESCROWS_OPEN_PER_BUYER_MAX,
    EXPIRIES_PER_BATCH,
    EXPIRIES_PER_ROUND_MAX,
)
from lumaris_coordinator.escrow import store
from lumaris_coordinator.escrow.store import Escrow
from lumaris_coordinator.identity.store import account_of
from lumaris_coordinator.ledger.store import FEES, Leg, move, open_account, wallet
from lumaris_coordinator.receipts.service import Filed, append
from lumaris_coordinator.receipts.service import find as find_receipt
from lumaris_coordinator.store.port import Connection, first
from lumaris_protocol import agreements, codec, settlement
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.ids import derive_id, digest
from lumaris_protocol.limits import CLOCK_SKEW_S
from lumaris_protocol.messages.budget import BudgetGrant, GrantRequest
from lumaris_protocol.messages.negotiation import Agreement
from lumaris_protocol.messages.payment import Settle
from lumaris_protocol.messages.receipt import Outcome
from lumaris_protocol.settlement import Claim

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context
    from lumaris_coordinator.identity.service import Caller

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settled:
    """Where a claim left the escrow; with its receipt when the money has come to rest."""

    escrow: Escrow
    receipt: Filed | None


class Escrows:
    """The rules of holding and paying."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def grant(self, body: bytes) -> bytes:
        """Hold an agreement's cap; the signed BudgetGrant. The same agreement, the same bytes.

        Raises EnvelopeError for documents that do not hold, and LumarisError: `wrong_domain`,
        `terms_refused`, `expired`, `not_certified`, `already_granted`, `too_many_holds`,
        `no_funds`, `busy`.
        """
        context, now = self._context, self._context.now()
        network = context.settings.network
        request = codec.open_signed(body, GrantRequest, network=network)
        message = request.message
        contract = agreements.join(
            message.agreement_by_buyer, message.agreement_by_seller, network=network
        )
        if not request.signer == message.buyer == contract.agreement.buyer:
            raise EnvelopeError("wrong_signer", "Only the agreement's buyer can ask for its grant.")
        if not message.coordinator == context.peer == contract.agreement.coordinator:
            raise EnvelopeError("wrong_domain", "The agreement names another coordinator.")
        if message.issued_at > now + CLOCK_SKEW_S:
            raise EnvelopeError("not_yet_valid", "The grant request is dated in the future.")
        return await context.store.submit(lambda connection: self._hold(connection, contract, now))

    def _hold(self, connection: Connection, contract: Contract, now: int) -> bytes:
        held = store.find(connection, contract.hash)
        if held is not None:
            return held.budget_grant
        agreement = contract.agreement
        # Only from here on: a buyer that lost its answer gets it whatever time and terms are now.
        self._check_terms(agreement, now)
        account = account_of(connection, agreement.buyer)
        if account is None or account_of(connection, agreement.seller) is None:
            raise LumarisError("not_certified", "Both parties must be registered here.")
        if store.session_taken(connection, buyer=agreement.buyer, session=agreement.session):
            # Two escrows of one session could both be claimed with the same voucher.
            raise LumarisError("already_granted", "Another agreement of this session has a grant.")
        if store.open_of_buyer(connection, agreement.buyer) >= ESCROWS_OPEN_PER_BUYER_MAX:
            raise LumarisError(
                "too_many_holds",
                f"{ESCROWS_OPEN_PER_BUYER_MAX} sessions of this buyer are open here.",
                hint="Close or settle open sessions first.",
            )
        grant = self._sign_grant(connection, contract, now)
        currency = grant.message.currency
        escrow_account = open_account(
            connection, owner=f"escrow:{grant.message.grant}", kind="escrow", currency=currency
        )
        legs = [Leg(wallet(account, currency), escrow_account, grant.message.cap_nanos)]
        move(connection, kind="hold", ref=agreement.session, legs=legs, now=now)
        store.insert(connection, contract, grant, account=escrow_account)
        return grant.data

    def _check_terms(self, agreement: Agreement, now: int) -> None:
        settings = self._context.settings
        if agreement.fee_bps != settings.fee_bps:
            raise LumarisError("terms_refused", f"The fee here is {settings.fee_bps} bps.")
        if agreement.terms.currency != settings.currency:
            raise LumarisError("terms_refused", f"The currency here is {settings.currency}.")
        if agreement.terms.cap_nanos < CAP_NANOS_MIN:
            raise LumarisError(
                "terms_refused", f"The smallest cap held here is {CAP_NANOS_MIN} nanos."
            )
        codec.check_times(
            issued_at=agreement.issued_at,
            expires_at=min(agreement.start_by, agreement.ends_at),
            now=now,
            what="agreement",
        )

    def _sign_grant(
        self, connection: Connection, contract: Contract, now: int
    ) -> Signed[BudgetGrant]:
        settings, agreement = self._context.settings, contract.agreement
        grant = BudgetGrant(
            grant=derive_id("grant", contract.hash.encode()),
            agreement_hash=contract.hash,
            session=agreement.session,
            buyer=agreement.buyer,
            seller=agreement.seller,
            currency=settings.currency,
            cap_nanos=agreement.terms.cap_nanos,
            serial=store.next_serial(connection),
            issued_at=now,
            not_after=agreement.ends_at,
            settle_by=max(now, agreement.ends_at) + settings.settle_window_s,
        )
        return codec.sign(grant, self._context.key, settings.network)

    async def settle(self, body: bytes) -> Settled:
        """Apply a party's claim. Claiming the same total again moves nothing.

        Raises EnvelopeError or RefusedError for a claim that does not hold, and LumarisError:
        `not_found`, `already_settled`, `busy`.
        """
        context, now = self._context, self._context.now()
        settle = codec.open_signed(body, Settle, network=context.settings.network)
        if settle.message.issued_at > now + CLOCK_SKEW_S:
            raise EnvelopeError("not_yet_valid", "The claim is dated in the future.")
        claim = settlement.open_claim(
            settle, network=context.settings.network, coordinator=context.peer
        )
        found = await context.store.submit(
            lambda connection: self._apply(connection, claim, settle.hash, now)
        )
        total = claim.total_nanos
        if found.escrow.final and total not in (found.escrow.paid, found.escrow.claimed_total):
            raise LumarisError(
                "already_settled", f"The session was settled with {found.escrow.paid} nanos."
            )
        return found

    def _apply(self, connection: Connection, claim: Claim, evidence: str, now: int) -> Settled:
        escrow = store.find(connection, claim.contract.hash)
        if escrow is None:
            raise LumarisError("not_found", "No money is held for this agreement.")
        if not escrow.final and now > escrow.settle_by:
            # The deadline decides, not the moment at which the chore gets to it.
            escrow = self._expire(connection, escrow, now)
        elif not escrow.final and claim.fact == "buyer_claim":
            escrow = self._record(connection, escrow, claim, evidence, now)
        elif not escrow.final:
            escrow = self._pay_claim(connection, escrow, claim, evidence, now)
        return Settled(escrow, find_receipt(connection, escrow.agreement_hash))

    def _record(
        self, connection: Connection, escrow: Escrow, claim: Claim, evidence: str, now: int
    ) -> Escrow:
        """The buyer alone: keep its voucher when it is higher. A repetition is no new event."""
        raised = claim.total_nanos > escrow.voucher_total
        if escrow.state == "claimed" and not raised:
            return escrow
        if raised and claim.voucher is not None:
            store.record_voucher(connection, escrow, claim.voucher)
        return store.advance(connection, escrow, "buyer_claim", evidence=evidence, now=now)

    def _pay_claim(
        self, connection: Connection, escrow: Escrow, claim: Claim, evidence: str, now: int
    ) -> Escrow:
        voucher, total = claim.voucher.data if claim.voucher else None, claim.total_nanos
        if claim.fact == "seller_claim" and escrow.voucher_total > total:
            # The buyer itself showed a higher voucher: the seller gets what the buyer signed.
            voucher, total = escrow.voucher, escrow.voucher_total
        after = store.advance(connection, escrow, claim.fact, evidence=evidence, now=now)
        after = replace(
            after, paid=total, claimed_total=claim.total_nanos, voucher=voucher, voucher_total=total
        )
        outcome: Outcome = "closed" if claim.fact == "both_closed" else "claimed"
        return self._pay(connection, after, claim.contract, outcome=outcome, now=now)

    def _expire(self, connection: Connection, escrow: Escrow, now: int) -> Escrow:
        """The window has ended: the recorded voucher is paid, the rest returns."""
        contract = agreements.join(
            escrow.by_buyer, escrow.by_seller, network=self._context.settings.network
        )
        after = store.advance(connection, escrow, "window_ended", evidence="", now=now)
        after = replace(after, paid=escrow.voucher_total)
        return self._pay(connection, after, contract, outcome="expired", now=now)

    def _pay(
        self,
        connection: Connection,
        escrow: Escrow,
        contract: Contract,
        *,
        outcome: Outcome,
        now: int,
    ) -> Escrow:
        """Empty the escrow's account to seller, fees and buyer, and log the receipt of it."""
        store.save_settlement(connection, escrow)
        receipt = settlement.make_receipt(
            contract,
            cap_nanos=escrow.cap,
            paid_nanos=escrow.paid,
            voucher_hash=digest(escrow.voucher) if escrow.voucher is not None else None,
            outcome=outcome,
            now=now,
        )
        buyer, seller = account_of(connection, escrow.buyer), account_of(connection, escrow.seller)
        assert buyer is not None
        assert seller is not None
        legs = [
            Leg(escrow.account, wallet(seller, receipt.currency), receipt.seller_nanos),
            Leg(escrow.account, wallet(FEES, receipt.currency), receipt.fee_nanos),
            Leg(escrow.account, wallet(buyer, receipt.currency), receipt.refund_nanos),
        ]
        move(connection, kind="settle", ref=escrow.session, legs=legs, now=now)
        append(connection, codec.sign(receipt, self._context.key, self._context.settings.network))
        return escrow

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
        escrow = store.find(connection, agreement_hash)
        if escrow is not None and not escrow.final and now > escrow.settle_by:
            self._expire(connection, escrow, now)

    async def show(self, session: str, caller: Caller) -> dict[str, Any]:
        """A party's view of its session's money. Raises LumarisError `not_found`."""
        return await self._context.store.read(
            lambda connection: self._view(connection, session, caller)
        )

    def _view(self, connection: Connection, session: str, caller: Caller) -> dict[str, Any]:
        escrow = store.find_of_party(connection, session, caller.peer)
        if escrow is None:
            raise LumarisError("not_found", "There is no such session of yours.")
        receipt = first(
            connection, "SELECT id FROM receipt WHERE agreement_hash = ?", (escrow.agreement_hash,)
        )
        return {
            "session": escrow.session,
            "agreement_hash": escrow.agreement_hash,
            "buyer": escrow.buyer,
            "seller": escrow.seller,
            "state": escrow.state,
            "cap_nanos": escrow.cap,
            "vouchered_nanos": escrow.voucher_total,
            "paid_nanos": escrow.paid,
            "settle_by": escrow.settle_by,
            "receipt": receipt[0] if receipt else None,
            "events": store.events(connection, escrow.agreement_hash),
        }
