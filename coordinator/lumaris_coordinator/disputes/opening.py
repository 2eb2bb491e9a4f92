"""Opening a dispute: whether the claim can be made here and now, and what both sides put down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lumaris_coordinator.bounds import DISPUTES_OPEN_PER_PEER_MAX, DISPUTES_PER_PARTY_MAX
from lumaris_coordinator.disputes import liens, store
from lumaris_coordinator.disputes.cases import Papers, case_of, check_others, claimed_of
from lumaris_coordinator.disputes.checkers import make_list
from lumaris_coordinator.disputes.store import Bundle, Dispute
from lumaris_coordinator.escrow import store as escrows
from lumaris_coordinator.escrow.disputed import current, freeze
from lumaris_coordinator.escrow.store import Escrow
from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.identity.store import account_of
from lumaris_coordinator.ledger import bonds
from lumaris_coordinator.ledger.store import balance, wallet
from lumaris_coordinator.receipts.service import append_document
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import agreements, rulings
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.machines.dispute import DISPUTE
from lumaris_protocol.messages.dispute import DisputeOpen
from lumaris_protocol.money import format_credits
from lumaris_protocol.rulings import Case, Dossier
from lumaris_protocol.rulings.case import FREEZES, INSTANT, REFUNDS
from lumaris_protocol.rulings.work import orders, voucher_top

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context


@dataclass(frozen=True)
class Opening:
    """A checked DisputeOpen and all that is in it, opened."""

    signed: Signed[DisputeOpen]
    papers: Papers


def open_papers(signed: Signed[DisputeOpen], *, network: str) -> Opening:
    """Check an opening's documents, each by its signature. Touches no store.

    Raises EnvelopeError or RefusedError.
    """
    message = signed.message
    contract = agreements.join(
        message.agreement_by_buyer, message.agreement_by_seller, network=network
    )
    rulings.check_opening(message, contract)
    rulings.check_frame(signed)
    agreements.open_grant(
        message.grant,
        contract,
        network=network,
        coordinator=contract.agreement.coordinator,
        now=None,
    )
    dossier = Dossier(contract, network=network)
    dossier.add(message.evidence, party=message.opener)
    check_others(dossier, drawn=())
    first = Bundle(0, message.opener, done=False, hash=signed.hash, envelope=signed.data)
    return Opening(signed, Papers(message, contract, dossier, (first,)))


def check_early(connection: Connection, message: DisputeOpen) -> None:
    """What can be refused before the documents are opened. Raises LumarisError.

    The agreement is named by the copy that is shown: what it says is believed later.
    """
    escrow = escrows.find(connection, agreements.payload_hash(message.agreement_by_buyer))
    if escrow is None or message.opener not in (escrow.buyer, escrow.seller):
        raise LumarisError("not_found", "No money of yours is held for this agreement.")
    _check_bounds(connection, message, escrow)
    _check_funds(connection, message.opener, escrow.currency, message.amount_nanos)


def open_dispute(
    context: Context, connection: Connection, opening: Opening, *, now: int
) -> Dispute:
    """Take the bonds, freeze what is disputed, and keep the opening. An operation of the writer.

    Raises LumarisError as `Disputes.open`; nothing has happened then.
    """
    message, papers = opening.signed.message, opening.papers
    escrow = current(context, connection, papers.contract.hash, now=now)
    _check_bounds(connection, message, escrow)
    refundable = _refundable(connection, opening, escrow)
    _check_escrow(context, connection, message, escrow, refundable=refundable, now=now)
    dispute = _drafted(context, connection, opening, escrow, refundable=refundable, now=now)
    _check_funds(connection, dispute.opener, dispute.currency, dispute.amount)
    _check_evidence(case_of(connection, dispute, papers, escrow, ended="evidence"))
    _put_down(connection, dispute, now=now)
    if dispute.frozen:
        freeze(context, connection, dispute.agreement_hash, evidence=opening.signed.hash, now=now)
    append_document(connection, opening.signed.data)
    dispute = store.insert(connection, dispute, evidence=opening.signed.hash)
    if dispute.claim == "wrong_result":
        make_list(context, connection, dispute, papers, now=now)
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


def _check_bounds(connection: Connection, message: DisputeOpen, escrow: Escrow) -> None:
    if message.amount_nanos > escrow.cap:
        raise LumarisError("over_cap", "No more can be asked than the escrow's cap.")
    if store.open_of(connection, message.opener) >= DISPUTES_OPEN_PER_PEER_MAX:
        raise LumarisError(
            "too_many_holds", f"{DISPUTES_OPEN_PER_PEER_MAX} disputes of this peer are open here."
        )
    made = store.made_by(connection, escrow.agreement_hash, message.opener)
    if made >= DISPUTES_PER_PARTY_MAX:
        raise LumarisError(
            "too_many_holds", f"This party has opened {made} disputes about the agreement."
        )


def _refundable(connection: Connection, opening: Opening, escrow: Escrow) -> int:
    return rulings.refundable(
        paid=escrow.paid,
        claimed=claimed_of(connection, escrow),
        refunded=store.refunded(connection, escrow.agreement_hash),
        fee_bps=opening.papers.contract.agreement.fee_bps,
    )


def _check_escrow(
    context: Context,
    connection: Connection,
    message: DisputeOpen,
    escrow: Escrow,
    *,
    refundable: int,
    now: int,
) -> None:
    if message.claim in FREEZES and escrow.final:
        raise LumarisError(
            "not_disputable", f"The escrow is {escrow.state}: it holds nothing to dispute."
        )
    if message.claim in REFUNDS and not refundable:
        raise LumarisError(
            "not_disputable",
            "The seller was paid nothing that it could give back.",
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
    context: Context,
    connection: Connection,
    opening: Opening,
    escrow: Escrow,
    *,
    refundable: int,
    now: int,
) -> Dispute:
    message, agreement = opening.signed.message, opening.papers.contract.agreement
    # What earlier disputes may give back cannot be given back once more.
    left = refundable - store.refunds_asked(connection, opening.papers.contract.hash)
    price = rulings.price_of(opening.papers.dossier.main, message)
    stake = rulings.stake_max(message, agreement, refundable=left, price=price)
    evidence_until = now + context.settings.dispute_evidence_s
    other = agreement.seller if message.opener == agreement.buyer else agreement.buyer
    return Dispute(
        id=message.dispute,
        number=0,
        agreement_hash=opening.papers.contract.hash,
        buyer=agreement.buyer,
        seller=agreement.seller,
        opener=message.opener,
        opened=opening.signed.hash,
        claim=message.claim,
        order_n=message.order,
        currency=escrow.currency,
        amount=message.amount_nanos,
        bond=rulings.opener_bond(message.amount_nanos),
        stake=min(liens.left(connection, other, escrow.currency), stake),
        wanted=stake,
        refund_max=rulings.refund_max(message, refundable=left, price=price),
        vouchered=voucher_top(opening.papers.dossier.main),
        frozen=int(message.claim in FREEZES),
        state=DISPUTE.initial,
        version=0,
        opened_at=now,
        evidence_until=evidence_until,
        check_until=None,
        due_at=now if message.claim == "wrong_result" else evidence_until,
        split_by_buyer=None,
        split_by_seller=None,
        withdrawal=None,
        ruling=None,
        fault="",
        refunded=0,
        owed=0,
        owed_refund=0,
        ended_at=None,
    )


def _check_funds(connection: Connection, opener: str, currency: str, amount: int) -> None:
    bond = rulings.opener_bond(amount)
    if balance(connection, _wallet_of(connection, opener, currency)) < bond:
        raise LumarisError(
            "no_funds",
            f"Opening this takes a bond of {format_credits(bond)}.",
            hint="It is returned unless the claim is refuted, withdrawn, split or left unchecked.",
        )


def _put_down(connection: Connection, dispute: Dispute, *, now: int) -> None:
    """The opener's bond from its wallet, the respondent's part from its bond."""
    source = _wallet_of(connection, dispute.opener, dispute.currency)
    bonds.take(connection, source=source, ref=dispute.id, amount=dispute.bond, now=now)
    if dispute.stake:
        bond = bonds.account_of_bond(dispute.respondent, dispute.currency)
        bonds.take(connection, source=bond, ref=dispute.id, amount=dispute.stake, now=now)


def _wallet_of(connection: Connection, peer: str, currency: str) -> str:
    owner = account_of(connection, peer)
    assert owner is not None
    return wallet(owner, currency)
