"""Grants: the coordinator holds an agreement's cap, and later what its amendments add.

Every signature is checked before the store is touched; then one operation of the writer decides.
Both are idempotent by the agreement: a lost answer is asked for again with the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from lumaris_coordinator.bounds import CAP_NANOS_MIN, ESCROWS_OPEN_PER_BUYER_MAX
from lumaris_coordinator.escrow import store
from lumaris_coordinator.escrow.disputed import current
from lumaris_coordinator.escrow.paying import contract_of, tell
from lumaris_coordinator.escrow.store import Amended, Escrow
from lumaris_coordinator.identity.store import account_of, member
from lumaris_coordinator.ledger.store import Leg, move, open_account, open_wallet, wallet
from lumaris_coordinator.store.port import Connection
from lumaris_coordinator.upkeep.freeze import require_thawed
from lumaris_protocol import agreements, codec, envelope
from lumaris_protocol.agreements import Bounds, Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.ids import derive_id, digest
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import CLOCK_SKEW_S
from lumaris_protocol.messages.budget import AmendRequest, BudgetGrant, GrantRequest
from lumaris_protocol.messages.negotiation import Agreement
from lumaris_protocol.messages.payment import Amendment

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context


class Grants:
    """The rules of holding."""

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
        if message.coordinator != contract.agreement.coordinator:
            raise EnvelopeError("wrong_domain", "The agreement names another coordinator.")
        context.keys.check(message.coordinator)
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
        require_thawed(connection)
        buyer = member(connection, agreement.buyer)
        seller = member(connection, agreement.seller)
        if buyer is None or seller is None:
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
        for owner in (buyer, seller):
            open_wallet(connection, owner, currency)
        escrow_account = open_account(
            connection, owner=f"escrow:{grant.message.grant}", kind="escrow", currency=currency
        )
        legs = [Leg(wallet(buyer, currency), escrow_account, grant.message.cap_nanos)]
        move(connection, kind="hold", ref=agreement.session, legs=legs, now=now)
        tell(
            connection,
            store.insert(connection, contract, grant, escrow_account),
            "granted",
            now=now,
        )
        return grant.data

    def _check_terms(self, agreement: Agreement, now: int) -> None:
        settings = self._context.settings
        if agreement.fee_bps != settings.fee_bps:
            raise LumarisError("terms_refused", f"The fee here is {settings.fee_bps} bps.")
        if agreement.terms.currency not in settings.currencies:
            known = ", ".join(settings.currencies)
            raise LumarisError("terms_refused", f"The currencies here are: {known}.")
        if not agreements.is_repeatable(agreement.tier, agreement.verification):
            raise LumarisError("terms_refused", "Results of this tier cannot be run again: evid.")
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
            currency=agreement.terms.currency,
            cap_nanos=agreement.terms.cap_nanos,
            serial=store.next_serial(connection),
            issued_at=now,
            not_after=agreement.ends_at,
            settle_by=max(now, agreement.ends_at) + settings.settle_window_s,
        )
        return codec.sign(grant, self._signer(agreement), settings.network)

    def _signer(self, agreement: Agreement) -> KeyPair:
        # The key that the agreement names, though another may have taken over since.
        return self._context.keys.signer(agreement.coordinator)

    async def amend(self, body: bytes) -> bytes:
        """Hold what an amendment adds; the new BudgetGrant. The same amendment, the same bytes.

        Raises EnvelopeError or RefusedError for documents that do not hold, ViolationError
        `already_settled` or `in_dispute`, and LumarisError `not_found`, `expired`, `no_funds`,
        `revoked`, `busy`.
        """
        context, now = self._context, self._context.now()
        network = context.settings.network
        request = codec.open_signed(body, AmendRequest, network=network)
        message = request.message
        if request.signer != message.buyer:
            raise EnvelopeError("wrong_signer", "Only the buyer can ask to hold more.")
        context.keys.check(message.coordinator)
        if message.issued_at > now + CLOCK_SKEW_S:
            raise EnvelopeError("not_yet_valid", "The request is dated in the future.")
        codec.open_signed(
            message.amendment_by_buyer, Amendment, network=network, signer=message.buyer
        )
        return await context.store.submit(lambda connection: self._amend(connection, message, now))

    def _amend(self, connection: Connection, message: AmendRequest, now: int) -> bytes:
        escrow = store.find(connection, message.agreement_hash)
        if escrow is None or escrow.buyer != message.buyer:
            raise LumarisError("not_found", "No money of yours is held for this agreement.")
        known = store.amendments(connection, escrow.agreement_hash)
        for amended in known:
            if amended.by_buyer == message.amendment_by_buyer:
                return amended.budget_grant
        require_thawed(connection)
        for party in (escrow.buyer, escrow.seller):
            member(connection, party)
        context = self._context
        escrow = current(context, connection, escrow.agreement_hash, now=now)
        last = known[-1].n if known else 0
        contract = contract_of(context, escrow)
        after = agreements.amend(
            contract,
            Bounds(last, escrow.cap, escrow.not_after),
            message.amendment_by_buyer,
            message.amendment_by_seller,
            network=context.settings.network,
        )
        moved = store.advance(
            connection, escrow, "amended", evidence=digest(message.amendment_by_buyer), now=now
        )
        if now > escrow.not_after + CLOCK_SKEW_S:
            raise LumarisError("expired", "The agreement has ended.")
        grant = self._sign_amended(connection, escrow, contract, after, now)
        self._hold_more(connection, escrow, after.cap_nanos - escrow.cap, now)
        amended = Amended(
            after.n, message.amendment_by_buyer, message.amendment_by_seller, grant.data
        )
        tell(connection, store.amend(connection, moved, amended, grant), "amended", now=now)
        return grant.data

    def _hold_more(self, connection: Connection, escrow: Escrow, added: int, now: int) -> None:
        buyer = account_of(connection, escrow.buyer)
        assert buyer is not None
        legs = [Leg(wallet(buyer, escrow.currency), escrow.account, added)]
        if added:
            require_thawed(connection)
            move(connection, kind="hold", ref=escrow.session, legs=legs, now=now)

    def _sign_amended(
        self,
        connection: Connection,
        escrow: Escrow,
        contract: Contract,
        after: Bounds,
        now: int,
    ) -> Signed[BudgetGrant]:
        settings = self._context.settings
        # Our own row: the key that signed it may have been replaced since.
        first = codec.decode_payload(envelope.decode(escrow.budget_grant).payload, BudgetGrant)
        longer = after.ends_at > escrow.not_after
        window = after.ends_at + settings.settle_window_s if longer else 0
        grant = msgspec.structs.replace(
            first,
            cap_nanos=after.cap_nanos,
            serial=store.next_serial(connection),
            issued_at=now,
            not_after=after.ends_at,
            settle_by=max(escrow.settle_by, window),
        )
        return codec.sign(grant, self._signer(contract.agreement), settings.network)
