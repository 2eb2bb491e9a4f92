"""How a dispute ends: the ruling is signed, logged, and its money moved, in one operation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from msgspec import structs

from lumaris_coordinator.disputes import liens, store
from lumaris_coordinator.disputes.cases import Papers, case_of
from lumaris_coordinator.disputes.store import Dispute
from lumaris_coordinator.escrow.disputed import award, current
from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.ledger import bonds
from lumaris_coordinator.ledger.store import FEES, wallet
from lumaris_coordinator.receipts.service import append_document
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import codec, dispute_file, rulings
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.dispute import Ended, Ruling
from lumaris_protocol.rulings import Case, Decision

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context


def rule(
    context: Context,
    connection: Connection,
    dispute: Dispute,
    papers: Papers,
    *,
    ended: Ended,
    now: int,
) -> Dispute:
    """End a dispute as its evidence says."""
    escrow = current(context, connection, dispute.agreement_hash, now=now)
    case = case_of(connection, dispute, papers, escrow, ended=ended)
    decision = rulings.rule(case)
    missing = _missing(decision)
    if missing:
        # What came to the bond since answers too, as far as no earlier dispute may take it.
        dispute = _hold_more(connection, dispute, missing, now=now)
        case = case_of(connection, dispute, papers, escrow, ended=ended)
        decision = rulings.rule(case)
    owed = min(_missing(decision), liens.later(connection, dispute))
    return _end(context, connection, dispute, papers, case, decision, owed=owed, now=now)


def _missing(decision: Decision) -> int:
    """What the respondent owes and its stake does not cover."""
    return decision.slash_nanos - decision.collected_nanos if decision.bond_returned else 0


def _owed_refund(case: Case, decision: Decision, owed: int) -> int:
    """The refund in what is owed; it comes first, as at the ruling."""
    facts = structs.replace(case.facts, stake_nanos=decision.slash_nanos)
    full = rulings.rule(replace(case, facts=facts))
    return min(owed, full.refund_nanos - decision.refund_nanos)


def _hold_more(connection: Connection, dispute: Dispute, nanos: int, *, now: int) -> Dispute:
    respondent, currency = dispute.respondent, dispute.currency
    more = min(nanos, liens.left(connection, respondent, currency, number=dispute.number))
    if not more:
        return dispute
    source = bonds.account_of_bond(respondent, currency)
    bonds.take(connection, source=source, ref=dispute.id, amount=more, now=now)
    return store.add_stake(connection, dispute, more)


def agree(
    context: Context, connection: Connection, dispute: Dispute, papers: Papers, *, now: int
) -> Dispute:
    """End a dispute with the split that both parties signed.

    Raises RefusedError `dispute_invalid` when the two copies differ, LumarisError `over_cap` for
    more than there is and `no_funds` when the seller cannot pay the refund.
    """
    escrow = current(context, connection, dispute.agreement_hash, now=now)
    case = case_of(connection, dispute, papers, escrow, ended="agreed")
    split = dispute_file.open_split(dispute.agreed, case, network=context.settings.network)
    remainder, refundable = case.facts.remainder_nanos, case.refundable
    if split.award_nanos > remainder or split.refund_nanos > refundable:
        raise LumarisError(
            "over_cap", f"{remainder} nanos are frozen, and {refundable} can be given back."
        )
    decision = rulings.split(case, award_nanos=split.award_nanos, refund_nanos=split.refund_nanos)
    return _end(context, connection, dispute, papers, case, decision, now=now)


def withdraw(
    context: Context,
    connection: Connection,
    dispute: Dispute,
    papers: Papers,
    withdrawal: bytes,
    *,
    now: int,
) -> Dispute:
    """The opener takes its claim back."""
    escrow = current(context, connection, dispute.agreement_hash, now=now)
    case = case_of(connection, dispute, papers, escrow, ended="agreed")
    decision = rulings.withdrawn(case, answered=papers.answered(dispute.opener))
    signed = _sign(context, dispute, papers, case, decision, now=now)
    after = store.advance(
        connection,
        dispute,
        "withdraw",
        evidence=signed.hash,
        now=now,
        withdrawal=withdrawal,
        ruling=signed.data,
        ended_at=now,
    )
    _pay(context, connection, after, case, decision, now=now, ruling=None)
    append_document(connection, signed.data)
    _tell(connection, after, signed.message, now=now)
    return after


def _end(
    context: Context,
    connection: Connection,
    dispute: Dispute,
    papers: Papers,
    case: Case,
    decision: Decision,
    *,
    owed: int = 0,
    now: int,
) -> Dispute:
    owed_refund = _owed_refund(case, decision, owed) if owed else 0
    signed = _sign(context, dispute, papers, case, decision, now=now)
    fact = "agree" if decision.rule == "split" else "decide"
    after = store.advance(
        connection,
        dispute,
        fact,
        evidence=signed.hash,
        now=now,
        ruling=signed.data,
        fault=decision.fault,
        refunded=decision.refund_nanos,
        owed=owed,
        owed_refund=owed_refund,
    )
    append_document(connection, signed.data)
    # What is given back now is not owed for any other reason.
    liens.cut(connection, dispute.agreement_hash, case.refundable - decision.refund_nanos)
    _pay(context, connection, after, case, decision, now=now, ruling=signed.data)
    after = store.advance(connection, after, "pay", evidence=signed.hash, now=now, ended_at=now)
    _tell(connection, after, signed.message, now=now)
    return after


def _sign(
    context: Context,
    dispute: Dispute,
    papers: Papers,
    case: Case,
    decision: Decision,
    *,
    now: int,
) -> codec.Signed[Ruling]:
    envelopes = [bundle.envelope for bundle in papers.bundles]
    ruling = Ruling(
        dispute=dispute.id,
        agreement_hash=dispute.agreement_hash,
        claim=case.opened.claim,
        order=case.opened.order,
        opener=dispute.opener,
        buyer=dispute.buyer,
        seller=dispute.seller,
        currency=dispute.currency,
        fault=decision.fault,
        rule=decision.rule,
        award_nanos=decision.award_nanos,
        refund_nanos=decision.refund_nanos,
        slash_nanos=decision.slash_nanos,
        collected_nanos=decision.collected_nanos,
        victim_nanos=decision.victim_nanos,
        bond_returned=decision.bond_returned,
        evidence_root=rulings.evidence_root(envelopes[0], envelopes[1:]),
        documents=len(envelopes),
        facts=case.facts,
        issued_at=now,
    )
    key = context.keys.signer(case.agreement.coordinator)
    return codec.sign(ruling, key, context.settings.network)


def _pay(
    context: Context,
    connection: Connection,
    dispute: Dispute,
    case: Case,
    decision: Decision,
    *,
    now: int,
    ruling: bytes | None,
) -> None:
    """Thaw the escrow, and give out all that the dispute holds: nothing may stay in it."""
    if dispute.frozen:
        award(
            context,
            connection,
            dispute.agreement_hash,
            award_nanos=decision.award_nanos,
            ruling=ruling,
            now=now,
        )
    opener, respondent = dispute.opener, dispute.respondent
    if decision.rule == "split" and decision.refund_nanos:  # the seller signed to pay it
        seller = bonds.wallet_of(connection, dispute.seller, dispute.currency)
        bonds.take(connection, source=seller, ref=dispute.id, amount=decision.refund_nanos, now=now)
    back_to_bond = bonds.account_of_bond(respondent, dispute.currency)
    lost = 0 if decision.bond_returned else decision.collected_nanos
    taken = decision.collected_nanos - lost
    victim = opener if decision.bond_returned else respondent
    parts = (
        (bonds.wallet_of(connection, opener, dispute.currency), dispute.bond - lost),
        (back_to_bond, dispute.stake - taken),
        (bonds.wallet_of(connection, dispute.buyer, dispute.currency), decision.refund_nanos),
        (bonds.wallet_of(connection, victim, dispute.currency), decision.victim_nanos),
        (wallet(FEES, dispute.currency), decision.fees_nanos),
    )
    bonds.give_out(connection, ref=dispute.id, parts=parts, now=now)
    liens.serve(connection, respondent, dispute.currency, now=now)


def _tell(connection: Connection, dispute: Dispute, ruling: Ruling, *, now: int) -> None:
    emit(
        connection,
        "dispute.withdrawn" if dispute.state == "withdrawn" else "dispute.ruled",
        ref=dispute.id,
        parties=(dispute.buyer, dispute.seller),
        body={
            "agreement_hash": dispute.agreement_hash,
            "claim": dispute.claim,
            "fault": ruling.fault,
            "rule": ruling.rule,
            "award_nanos": ruling.award_nanos,
            "refund_nanos": ruling.refund_nanos,
            "collected_nanos": ruling.collected_nanos,
        },
        now=now,
    )
