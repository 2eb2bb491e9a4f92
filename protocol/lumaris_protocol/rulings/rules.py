"""The rules, one for each claim: pure functions from a case to what follows from it.

`rule` is what the coordinator decides with and what a dispute file is replayed with years later. In
every ruling over frozen money the highest voucher shown is paid: vouchers are money.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from lumaris_protocol import codec, envelope
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.messages.base import SessionMessage
from lumaris_protocol.messages.execution import Delivery
from lumaris_protocol.messages.payment import Settle, Voucher
from lumaris_protocol.rulings import work
from lumaris_protocol.rulings.case import Case, Decision, Finding, penalty
from lumaris_protocol.rulings.evidence import Session
from lumaris_protocol.rulings.work import Result

Key = tuple[int, str, str]


def rule(case: Case) -> Decision:
    """The decision that follows from a case with everything that will ever be in it."""
    return decide(case, _RULES[case.opened.claim](case))


def proven(case: Case) -> bool:
    """Whether the evidence alone decides now: nothing that may still come can change it."""
    claim = case.opened.claim
    if claim == "wrong_result":
        return case.agreement.verification == "det" and _checked(case) is not None
    return claim in _INSTANT_RULES and _RULES[claim](case).fault == case.respondent


def disputed_result(case: Case) -> Result | None:
    """The respondent's result of the disputed order; it needs the buyer's order beside it."""
    return work.result_of(case.session, case.opened.order)


def split(case: Case, *, award_nanos: int, refund_nanos: int) -> Decision:
    """What both parties agreed to, as far as there is money for it. Bonds go back."""
    return decide(case, Finding("neither", "split", award=award_nanos, refund=refund_nanos))


def withdrawn(case: Case, *, answered: bool) -> Decision:
    """The opener took its claim back; after the other side has answered, its bond is lost.

    Nothing is awarded: the vouchers of an escrow stay good without the dispute.
    """
    return decide(case, Finding(case.opener if answered else "neither", "withdrawn"))


def decide(case: Case, finding: Finding) -> Decision:
    """Hold a finding against the money that is there.

    A refund comes out of the seller's stake only. At most half of what is collected beyond it goes
    to the other party, so that nobody gains by slashing itself.
    """
    facts = case.facts
    award = min(finding.award, facts.remainder_nanos)
    refund = finding.refund if case.respondent == "seller" else 0
    if finding.fault == case.opener:
        refund, owed, there = 0, facts.bond_nanos, facts.bond_nanos
    else:
        fine = finding.penalty if finding.fault == case.respondent else 0
        owed, there = refund + fine, facts.stake_nanos
    collected = min(owed, there)
    refund = min(refund, collected)
    victim = (collected - refund) // 2
    return Decision(
        fault=finding.fault,
        rule=finding.rule,
        award_nanos=award,
        refund_nanos=refund,
        slash_nanos=owed,
        collected_nanos=collected,
        victim_nanos=victim,
        fees_nanos=collected - refund - victim,
        bond_returned=finding.fault != case.opener,
    )


# --- contradictions ---


def _equivocation(case: Case) -> Finding:
    """Two documents of one signer under one number, or two deliveries of one order."""
    agreement = case.agreement
    buyer = case.respondent == "buyer"
    key = agreement.buyer_session_key if buyer else agreement.seller_session_key
    numbers: dict[object, str] = {}
    for signed in case.session.by(key):
        for name in _exclusive(signed):
            if numbers.setdefault(name, signed.hash) != signed.hash:
                return _fraud(case, "equivocation")
    return _unproven(case)


def _exclusive(signed: Signed[SessionMessage]) -> list[object]:
    message = signed.message
    names: list[object] = [("seq", message.seq)]
    return [*names, ("delivery", message.n)] if isinstance(message, Delivery) else names


def _forged_voucher(case: Case) -> Finding:
    """A claim of the respondent encloses a voucher that the buyer's session key did not sign."""
    agreement = case.agreement
    respondent = agreement.buyer if case.respondent == "buyer" else agreement.seller
    for settle in case.session.settles:
        if settle.signer == respondent and _encloses_forgery(case, settle):
            return _fraud(case, "forged_voucher")
    return _unproven(case)


def _encloses_forgery(case: Case, settle: Signed[Settle]) -> bool:
    if settle.message.voucher is None:
        return False
    try:
        found = envelope.decode(settle.message.voucher)
        codec.open_decoded(
            found,
            Voucher,
            network=case.dossier.network,
            signer=case.agreement.buyer_session_key,
        )
    except EnvelopeError as error:
        return error.code in ("bad_signature", "wrong_signer")
    return False


def _stale_voucher(case: Case) -> Finding:
    """The buyer claimed with less than a voucher that it had signed."""
    agreement = case.agreement
    documents = [s.message for s in case.session.by(agreement.buyer_session_key)]
    vouchers = [m for m in documents if isinstance(m, Voucher)]
    # A close alone moves no money, and with both closes the seller agreed to the lower total.
    said = [
        s.message.total_nanos
        for s in case.session.settles
        if s.signer == agreement.buyer and len(s.message.closes) < 2
    ]
    highest = max((voucher.total_nanos for voucher in vouchers), default=0)
    lower = [total for total in said if total < highest]
    if not lower:
        return _unproven(case)
    held_back = min(_vouchered(case) - min(lower), case.opened.amount_nanos)
    fine = penalty(max(0, held_back))
    return Finding("buyer", "stale_voucher", award=_vouchers_due(case), penalty=fine)


# --- work and money ---


def _not_delivered(case: Case) -> Finding:
    """The seller took more than its shown work is worth; what is not shown was not done."""
    missing = min(_overpaid(case), case.opened.amount_nanos)
    if missing:
        return Finding("seller", "not_delivered", refund=missing, penalty=penalty(missing))
    return Finding("buyer", "delivered")


def _unpaid_delivery(case: Case) -> Finding:
    """The shown deliveries are worth more than was vouchered.

    What the buyer refused by its signed word is shared: nothing mechanical says who is right.
    """
    found = work.worth(case.session)
    vouchered, asked = _vouchered(case), case.opened.amount_nanos
    owed = min(_beyond(case, found.delivered - vouchered), asked)
    contested = _beyond(case, found.delivered + found.rejected - max(vouchered, found.delivered))
    share = min(contested // 2, asked - owed)
    due = _vouchers_due(case) + owed + share
    if owed:
        return Finding("buyer", "unpaid", due, penalty=penalty(owed))
    if share:
        return Finding("neither", "rejected", due)
    return Finding("seller", "paid", due)


def _overpaid(case: Case, *, less: int = 0) -> int:
    """What was paid beyond the worth of the shown work, of which `less` does not count."""
    found = work.worth(case.session)
    return max(0, case.facts.paid_nanos - max(0, found.total - less))


def _beyond(case: Case, nanos: int) -> int:
    """What a seller can be owed beyond vouchers: it agreed to carry no more than the exposure."""
    return min(max(0, nanos), case.agreement.terms.exposure_nanos)


def _vouchered(case: Case) -> int:
    """The highest voucher of the buyer that the escrow can still pay."""
    held = case.facts.paid_nanos + case.facts.remainder_nanos
    return max(case.facts.paid_nanos, min(work.voucher_top(case.session), held))


def _vouchers_due(case: Case) -> int:
    """Vouchered, and not yet paid."""
    return _vouchered(case) - case.facts.paid_nanos


# --- results ---


def _wrong_result(case: Case) -> Finding:
    disputed = disputed_result(case)
    if disputed is None:
        return _unproven(case)
    if case.agreement.verification == "repl":
        return _by_replicas(case, disputed)
    if not case.facts.checkers:
        return _undecided(case, "no_checker")
    checked = _checked(case)
    if checked is None:
        return _undecided(case, "check_missing")
    return _compared(case, disputed, equal=_key(checked) == _key(disputed), by="result")


def _by_replicas(case: Case, disputed: Result) -> Finding:
    """Most of the results of one order, the disputed one among them, are right."""
    votes = Counter([_key(disputed)])
    for session in case.dossier.others.values():
        seller = session.contract.agreement.seller
        found = _same_order_result(case, session)
        if seller in case.facts.replicas and found is not None:
            votes[_key(found)] += 1
    if votes.total() < 3:
        return _unproven(case, "replicas_missing")
    winner, number = votes.most_common(1)[0]
    if 2 * number <= votes.total():
        return Finding("neither", "no_majority", refund=_lost(case, disputed) // 2)
    return _compared(case, disputed, equal=winner == _key(disputed), by="majority")


def _compared(case: Case, disputed: Result, *, equal: bool, by: str) -> Finding:
    if equal:
        return Finding(case.opener, f"{by}_equal")
    asked = min(disputed.price_nanos, case.opened.amount_nanos)
    fine = penalty(asked, wrong=True)
    return Finding("seller", f"{by}_differs", refund=_lost(case, disputed), penalty=fine)


def _lost(case: Case, disputed: Result) -> int:
    """What was paid for the disputed order: its price, as far as the rest does not use it up."""
    price = disputed.price_nanos
    return min(price, case.opened.amount_nanos, _overpaid(case, less=price))


def _checked(case: Case) -> Result | None:
    """The result of the checker drawn first among those that answered."""
    for checker in case.facts.checkers:
        for session in case.dossier.others.values():
            agreement = session.contract.agreement
            if agreement.seller == checker and agreement.buyer == case.opened.opener:
                found = _same_order_result(case, session)
                if found is not None:
                    return found
    return None


def _same_order_result(case: Case, session: Session) -> Result | None:
    ours = work.orders(case.session).get(case.opened.order)
    theirs = session.contract.agreement
    if ours is None or theirs.tier != case.agreement.tier or theirs.egress:
        return None
    for n, order in work.orders(session).items():
        if work.same_order(ours, order):
            found = work.result_of(session, n)
            if found is not None:
                return found
    return None


def _key(result: Result) -> Key:
    """What must be equal. A failing run has no output that counts."""
    if result.exit_status:
        return (result.exit_status, "", "")
    return (0, result.output_root, result.stdout)


# --- shared ---


def _fraud(case: Case, name: str) -> Finding:
    return Finding(case.respondent, name, penalty=case.agreement.terms.cap_nanos)


def _unproven(case: Case, name: str = "unproven") -> Finding:
    return Finding(case.opener, name)


def _undecided(case: Case, name: str) -> Finding:
    return Finding("neither", name)


_INSTANT_RULES: Final[dict[str, Callable[[Case], Finding]]] = {
    "equivocation": _equivocation,
    "forged_voucher": _forged_voucher,
    "stale_voucher": _stale_voucher,
}
_RULES: Final[dict[str, Callable[[Case], Finding]]] = {
    **_INSTANT_RULES,
    "not_delivered": _not_delivered,
    "unpaid_delivery": _unpaid_delivery,
    "wrong_result": _wrong_result,
}
