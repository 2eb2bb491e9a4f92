"""Opening a dispute: whether the claim can be made here and now, and what both sides put down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lumaris_coordinator.bounds import DISPUTES_OPEN_PER_PEER_MAX
from lumaris_coordinator.disputes import store
from lumaris_coordinator.disputes.cases import Papers, case_of
from lumaris_coordinator.disputes.store import Bundle, Dispute
from lumaris_coordinator.escrow.disputed import current, freeze
from lumaris_coordinator.escrow.store import Escrow
from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.identity.store import account_of
from lumaris_coordinator.ledger import bonds
from lumaris_coordinator.ledger.store import balance, wallet
from lumaris_coordinator.receipts.service import append_document
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import rulings
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.machines.dispute import DISPUTE
from lumaris_protocol.messages.dispute import DisputeOpen
from lumaris_protocol.money import format_credits
from lumaris_protocol.rulings import Case, Dossier
from lumaris_protocol.rulings.case import FREEZES, INSTANT, NEEDS_CLAIM
from lumaris_protocol.rulings.work import orders

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context


@dataclass(frozen=True)
class Opening:
    """A checked DisputeOpen and the agreement in it."""

    signed: Signed[DisputeOpen]
    contract: Contract


def open_dispute(
    context: Context, connection: Connection, opening: Opening, *, now: int
) -> Dispute:
    """Take the bonds, freeze what is disputed, and keep the opening. An operation of the writer.

    Raises LumarisError as `Disputes.open`; nothing has happened then.
    """
    message = opening.signed.message
    escrow = current(context, connection, opening.contract.hash, now=now)
    _check_escrow(context, connection, message, escrow, now=now)
    if store.open_of(connection, message.opener) >= DISPUTES_OPEN_PER_PEER_MAX:
        raise LumarisError(
            "too_many_holds", f"{DISPUTES_OPEN_PER_PEER_MAX} disputes of this peer are open here."
        )
    dispute = _drafted(context, connection, opening, escrow, now=now)
    _check_funds(connection, dispute)
    first = Bundle(0, message.opener, done=False, envelope=opening.signed.data)
    dossier = Dossier(opening.contract, network=context.settings.network)
    dossier.add(message.evidence, party=message.opener)
    papers = Papers(message, opening.contract, dossier, (first,))
    case = case_of(connection, dispute, papers, escrow, ended="evidence", now=now)
    _check_evidence(case)
    _put_down(connection, dispute, now=now)
    if dispute.frozen:
        freeze(context, connection, dispute.agreement_hash, evidence=opening.signed.hash, now=now)
    dispute = store.insert(connection, dispute, evidence=opening.signed.hash)
    store.add_bundle(connection, dispute.id, first, now=now)
    append_document(connection, opening.signed.data)
    emit(
        connection,
        "dispute.opened",
        ref=dispute.id,
        parties=(dispute.buyer, dispute.seller),
        body={
            "agreement_hash": dispute.agreement_hash,
            "claim": dispute.claim,
            "order": dispute.order_n,
            "opener": dispute.opener,
            "amount_nanos": dispute.amount,
            "evidence_until": dispute.evidence_until,
        },
        now=now,
    )
    return dispute


def _check_escrow(
    context: Context, connection: Connection, message: DisputeOpen, escrow: Escrow, *, now: int
) -> None:
    if message.amount_nanos > escrow.cap:
        raise LumarisError("over_cap", "No more can be asked than the escrow's cap.")
    if message.claim in FREEZES and escrow.final:
        raise LumarisError(
            "not_disputable", f"The escrow is {escrow.state}: it holds nothing to dispute."
        )
    taken = escrow.claimed_total is not None and escrow.state in ("settled", "disputed")
    if message.claim in NEEDS_CLAIM and not taken:
        raise LumarisError(
            "not_disputable",
            "The seller has taken nothing yet.",
            hint="What it does not claim returns to you; dispute what it takes once it has.",
        )
    if escrow.final:
        rested = store.settled_at(connection, escrow.agreement_hash)
        open_until = rested + context.settings.dispute_window_s
        if now > open_until + store.downtime_since(connection, rested):
            raise LumarisError("not_disputable", "The time to dispute this settlement is over.")


def _check_evidence(case: Case) -> None:
    """What an opening must show by itself. Raises LumarisError `evidence_insufficient`."""
    claim = case.opened.claim
    if claim in INSTANT and not rulings.proven(case):
        raise LumarisError("evidence_insufficient")
    if claim == "wrong_result":
        order = orders(case.session).get(case.opened.order)
        if order is None or rulings.disputed_result(case) is None:
            raise LumarisError(
                "evidence_insufficient", "Enclose the work order and the delivery that it led to."
            )
        if order.stdin:
            raise LumarisError("not_disputable", "An order with standard input is not repeatable.")


def _drafted(
    context: Context, connection: Connection, opening: Opening, escrow: Escrow, *, now: int
) -> Dispute:
    message, agreement = opening.signed.message, opening.contract.agreement
    other = agreement.seller if message.opener == agreement.buyer else agreement.buyer
    free = bonds.free(connection, other, escrow.currency)
    return Dispute(
        id=message.dispute,
        number=0,
        agreement_hash=opening.contract.hash,
        buyer=agreement.buyer,
        seller=agreement.seller,
        opener=message.opener,
        claim=message.claim,
        order_n=message.order,
        currency=escrow.currency,
        amount=message.amount_nanos,
        bond=rulings.opener_bond(message.amount_nanos),
        stake=min(free, rulings.stake_max(message, agreement)),
        frozen=int(message.claim in FREEZES),
        state=DISPUTE.initial,
        version=0,
        opened_at=now,
        evidence_until=now + context.settings.dispute_evidence_s,
        check_until=None,
        split_by_buyer=None,
        split_by_seller=None,
        withdrawal=None,
        ruling=None,
        ended_at=None,
    )


def _check_funds(connection: Connection, dispute: Dispute) -> None:
    if balance(connection, _wallet_of_opener(connection, dispute)) < dispute.bond:
        raise LumarisError(
            "no_funds",
            f"Opening this takes a bond of {format_credits(dispute.bond)}.",
            hint="It is returned unless the claim is refuted or withdrawn after an answer.",
        )


def _put_down(connection: Connection, dispute: Dispute, *, now: int) -> None:
    """The opener's bond from its wallet, the respondent's part from its bond."""
    source = _wallet_of_opener(connection, dispute)
    bonds.take(connection, source=source, ref=dispute.id, amount=dispute.bond, now=now)
    if dispute.stake:
        bond = bonds.account_of_bond(dispute.respondent, dispute.currency)
        bonds.take(connection, source=bond, ref=dispute.id, amount=dispute.stake, now=now)


def _wallet_of_opener(connection: Connection, dispute: Dispute) -> str:
    owner = account_of(connection, dispute.opener)
    assert owner is not None
    return wallet(owner, dispute.currency)
