"""The rules, one for each claim: pure functions from a case to what follows from it.

`rule` is what the coordinator decides with and what a dispute file is replayed with years later. In
every ruling over frozen money the highest voucher shown is paid: vouchers are money.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from lumaris_protocol import codec, ends, envelope
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.limits import DISPUTE_BOND_NANOS_MIN
from lumaris_protocol.messages.base import SessionMessage
from lumaris_protocol.messages.dispute import DisputeOpen
from lumaris_protocol.messages.execution import Delivery, JobEvent, WorkOrder
from lumaris_protocol.messages.negotiation import Agreement
from lumaris_protocol.messages.payment import Voucher
from lumaris_protocol.rulings import work
from lumaris_protocol.rulings.case import REFUNDS, Case, Decision, Finding, penalty
from lumaris_protocol.rulings.evidence import Session
from lumaris_protocol.rulings.work import Result

Key = tuple[int, str, str]

# Two that agree outvote the disputed result.
_REPLICAS_MIN: Final = 2


def rule(case: Case) -> Decision:
    """The decision that follows from a case with everything that will ever be in it."""
    if case.opened.claim in REFUNDS and work.ordered_twice(case.session):
        # Nothing tells which of the two the seller got, and only the buyer can have signed both.
        return decide(case, Finding("buyer", "equivocation"))
    return decide(case, _RULES[case.opened.claim](case))


def proven(case: Case) -> bool:
    """Whether the evidence alone decides now: nothing that may still come can change it."""
    claim = case.opened.claim
    if claim == "wrong_result":
        # Without a result for the disputed order nothing was disputed.
        disputed = disputed_result(case)
        return disputed is not None and (_contradicted(case) or _enough_checked(case))
    return claim in _INSTANT_RULES and _RULES[claim](case).fault == case.respondent


def check_due(case: Case) -> bool:
    """Whether a disputed result still waits for second runs: until then nobody's last word counts,
    or the run that one side keeps back could not be shown by the other."""
    if case.opened.claim != "wrong_result":
        return False
    enough = _REPLICAS_MIN if case.agreement.verification == "repl" else 1
    return len(_checked(case)) < enough


def disputed_result(case: Case) -> Result | None:
    """The respondent's result of the disputed order; it needs the buyer's order beside it."""
    return work.result_of(case.session, case.opened.order)


def price_of(session: Session, opened: DisputeOpen) -> int:
    """What the result costs that an opening disputes, in nanos; 0 where it disputes none."""
    result = work.result_of(session, opened.order) if opened.order else None
    return result.price_nanos if result is not None else 0


def split(case: Case, *, award_nanos: int, refund_nanos: int) -> Decision:
    """What both parties agreed to, as far as there is money for it. It costs the opener the least
    bond: accomplices could hold a bond for nothing, while others wait for it.

    The seller itself pays the refund: a bond that its owner can send away answers for nothing.
    """
    cost = decide(case, _undecided("split", cost=DISPUTE_BOND_NANOS_MIN))
    return replace(
        cost,
        award_nanos=min(award_nanos, case.facts.remainder_nanos),
        refund_nanos=min(refund_nanos, case.refundable),
    )


def withdrawn(case: Case, *, answered: bool) -> Decision:
    """The opener took its claim back: it loses its bond once the other side has answered, and the
    least bond before, since the other side's money was held meanwhile.

    Nothing is awarded: the vouchers of an escrow stay good without the dispute.
    """
    if answered:
        return decide(case, Finding(case.opener, "withdrawn"))
    return decide(case, Finding("neither", "withdrawn", cost=DISPUTE_BOND_NANOS_MIN))


def decide(case: Case, finding: Finding) -> Decision:
    """Hold a finding against the money that is there.

    A refund comes out of the seller's stake only. At most half of what is collected beyond it goes
    to the other party, so that nobody gains by slashing itself.
    """
    facts = case.facts
    award = min(finding.award, facts.remainder_nanos)
    refund = min(finding.refund, case.refundable) if case.respondent == "seller" else 0
    lost = facts.bond_nanos if finding.fault == case.opener else finding.cost
    if lost:
        refund, owed, there = 0, lost, facts.bond_nanos
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
        bond_returned=not lost,
    )


# --- contradictions ---


def _equivocation(case: Case) -> Finding:
    """Two documents of one signer under one number, or two orders or two ends of one number."""
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
    if isinstance(message, WorkOrder):
        names.append((message.TYPE, message.n))
    if isinstance(message, JobEvent | Delivery) and ends.is_end(message):
        names.append(("end", message.n))
    return names


def _forged_voucher(case: Case) -> Finding:
    """A claim of the respondent encloses a voucher that the buyer's session key did not sign."""
    agreement = case.agreement
    respondent = agreement.buyer if case.respondent == "buyer" else agreement.seller
    for settle in case.session.settles:
        if settle.signer == respondent and is_forged(
            settle.message.voucher, agreement, network=case.dossier.network
        ):
            return _fraud(case, "forged_voucher")
    return _unproven(case)


def is_forged(voucher: bytes | None, agreement: Agreement, *, network: str) -> bool:
    """Whether an enclosed voucher is not signed by the buyer's session key."""
    if voucher is None:
        return False
    try:
        found = envelope.decode(voucher)
        codec.open_decoded(found, Voucher, network=network, signer=agreement.buyer_session_key)
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
        # Nothing beyond is owed for a voucher that only the buyer showed.
        fine = penalty(min(missing, case.facts.claimed_nanos))
        return Finding("seller", "not_delivered", refund=missing, penalty=fine)
    if case.facts.refunded_nanos and _overpaid(case, again=True):
        return _undecided("refunded")
    return Finding("buyer", "delivered")


def _unpaid_delivery(case: Case) -> Finding:
    """The shown deliveries are worth more than was vouchered.

    What the buyer refused by its signed word is shared: nothing mechanical says who is right.
    """
    found = work.worth(case.session, ends_at=case.facts.ends_at)
    vouchered = _vouchered(case)
    # A seller agreed to carry no more than the exposure, whatever it is made of.
    exposure, asked = case.agreement.terms.exposure_nanos, case.opened.amount_nanos
    owed = min(max(0, found.delivered - vouchered), exposure, asked)
    contested = max(0, found.delivered + found.rejected - max(vouchered, found.delivered))
    share = min(min(contested, exposure - owed) // 2, asked - owed)
    due = _vouchers_due(case) + owed + share
    if owed:
        return Finding("buyer", "unpaid", due, penalty=penalty(owed))
    if share:
        return Finding("neither", "rejected", due)
    return Finding("seller", "paid", due)


def _overpaid(case: Case, *, without: int = 0, again: bool = False) -> int:
    """What was paid, and not given back yet, beyond the worth of the shown work.

    The order `without` counts as worth nothing, like those whose results were found wrong before.
    With `again` it is not asked what was given back.
    """
    facts = case.facts
    kept = facts.paid_nanos - (0 if again else facts.refunded_nanos)
    left_out = frozenset((without, *facts.refunded_orders))
    worth = work.against_refund(case.session, ends_at=facts.ends_at, without=left_out)
    return max(0, kept - worth)


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
    if _contradicted(case):
        return _differs(case, disputed, "equivocation")
    repl = case.agreement.verification == "repl"
    if len(case.facts.checkers) < (_REPLICAS_MIN if repl else 1):
        return _undecided("no_checker", cost=DISPUTE_BOND_NANOS_MIN)
    checked = _checked(case)
    if repl:
        return _by_replicas(case, disputed, checked)
    if not checked:
        return _undecided("check_missing", cost=DISPUTE_BOND_NANOS_MIN)
    # Of several checkers the one drawn first among those that answered.
    return _compared(case, disputed, equal=_key(checked[0]) == _key(disputed), by="result")


def _by_replicas(case: Case, disputed: Result, checked: list[Result]) -> Finding:
    """Most of the results of one order, the disputed one among them, are right."""
    votes = Counter(_key(result) for result in (disputed, *checked))
    if len(checked) < _REPLICAS_MIN:
        return _undecided("replicas_missing", cost=DISPUTE_BOND_NANOS_MIN)
    winner, number = votes.most_common(1)[0]
    if 2 * number <= votes.total():
        return Finding("neither", "no_majority", refund=_lost(case, disputed) // 2)
    return _compared(case, disputed, equal=winner == _key(disputed), by="majority")


def _compared(case: Case, disputed: Result, *, equal: bool, by: str) -> Finding:
    if equal:
        return Finding(case.opener, f"{by}_equal")
    return _differs(case, disputed, f"{by}_differs")


def _contradicted(case: Case) -> bool:
    """Whether the seller itself says two ends of the disputed order."""
    return work.ended_twice(case.session, case.opened.order)


def _differs(case: Case, disputed: Result, name: str) -> Finding:
    asked = min(disputed.price_nanos, case.opened.amount_nanos, case.facts.claimed_nanos)
    fine = penalty(asked, wrong=True)
    return Finding("seller", name, refund=_lost(case, disputed), penalty=fine)


def _lost(case: Case, disputed: Result) -> int:
    """What was paid for the disputed order: its price, as far as the rest does not use it up."""
    price = disputed.price_nanos
    return min(price, case.opened.amount_nanos, _overpaid(case, without=case.opened.order))


def _checked(case: Case) -> list[Result]:
    """What the drawn sellers came to, by the order of their draws, whoever had them run it."""
    found = []
    for checker in case.facts.checkers:
        sessions = [
            session
            for session in case.dossier.others.values()
            if session.contract.agreement.seller == checker
        ]
        results = (_same_order_result(case, session) for session in sessions)
        first = next((result for result in results if result is not None), None)
        if first is not None:
            found.append(first)
    return found


def _enough_checked(case: Case) -> bool:
    """Whether no further result of a drawn seller would count."""
    if case.agreement.verification == "repl":
        drawn = len(case.facts.checkers)
        return drawn >= _REPLICAS_MIN and len(_checked(case)) == drawn
    return bool(_checked(case))


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


def _unproven(case: Case) -> Finding:
    return Finding(case.opener, "unproven")


def _undecided(name: str, *, cost: int = 0) -> Finding:
    return Finding("neither", name, cost=cost)


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
