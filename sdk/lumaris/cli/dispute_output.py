"""How disputes look: who must do what until when, what was shown, what was ruled and paid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from lumaris.cli.output import credits_of, date_of, fields, peer_of

if TYPE_CHECKING:
    from lumaris_protocol.coordinator_api import Dispute, DisputeDetail, DisputeRuling

# Each rule of docs/disputes.md in words.
RULES: Final = {
    "equivocation": "the signer of two documents that cannot both be true loses its stake",
    "forged_voucher": "the claimed voucher was not signed by the buyer; its user loses its stake",
    "stale_voucher": "the buyer held back a voucher it had signed; it is paid, with 10 % on top",
    "not_delivered": "more was taken than the shown work is worth; it is refunded, and 10 % more",
    "refunded": "what was paid for nothing was given back before",
    "delivered": "the shown work is worth what was paid; the claim is refuted",
    "unpaid": "delivered work was not vouchered; it is paid from the escrow",
    "rejected": "the buyer refused the delivery; half of it is paid",
    "paid": "the delivered work was paid; the claim is refuted",
    "result_differs": "the checker came to another result; the order's price is refunded",
    "result_equal": "the checker came to the same result; the claim is refuted",
    "majority_differs": "most sellers came to another result; the order's price is refunded",
    "majority_equal": "most sellers came to the same result; the claim is refuted",
    "no_majority": "no result has a majority; half of the price is refunded",
    "no_checker": "no seller could be drawn to check; the least bond is lost",
    "check_missing": "no result of a drawn checker was shown; the least bond is lost",
    "replicas_missing": "fewer than two drawn sellers' results were shown; the least bond is lost",
    "unproven": "what was shown does not prove the claim",
    "split": "both sides signed this end; the least bond is lost",
    "withdrawn": "the opener took its claim back",
}
OPEN: Final = ("opened", "evidence", "checking")
_NANOS: Final = (
    "award_nanos",
    "refund_nanos",
    "slash_nanos",
    "collected_nanos",
    "victim_nanos",
)


def next_step(found: Dispute, us: str) -> str:
    """Who must do what, until when."""
    if found.owed_nanos:
        return "the coordinator: collect the rest once the bond has it"
    if found.state not in OPEN:
        return "nothing: it is over"
    until = date_of(found.evidence_until)
    if found.claim == "wrong_result" and found.check_until is not None:
        by = date_of(found.check_until)
        if found.opener == us:
            return f"you: have it checked until {by}: `lumaris dispute check {found.dispute}`"
        return f"the opener: have it checked until {by}"
    if found.claim == "wrong_result" and found.opener == us:
        return "the coordinator: draw a checker, within minutes"
    if found.opener == us or us in _done(found):
        return f"the other side: show evidence until {until}"
    return f"you: show evidence until {until}: `lumaris dispute evidence {found.dispute}`"


def _done(found: Dispute) -> set[str]:
    """Who has said that it has no more to show, as far as the answer tells."""
    return {one.by for one in getattr(found, "evidence", ()) if one.done}


def summary_json(found: Dispute) -> dict[str, Any]:
    import msgspec

    builtins: dict[str, Any] = msgspec.to_builtins(found)
    return builtins


def detail_json(found: DisputeDetail, us: str) -> dict[str, Any]:
    you = "buyer" if us == found.buyer else "seller"
    rule = RULES.get(found.ruling.rule, "") if found.ruling else None
    return {**summary_json(found), "you": you, "next": next_step(found, us), "rule_in_words": rule}


def print_state(found: Dispute) -> None:
    fields(
        [
            ("dispute", found.dispute),
            ("state", found.state),
            ("claim", found.claim),
            ("asked", f"{credits_of(found.amount_nanos)} {found.currency}"),
            ("bond", f"{credits_of(found.bond_nanos)} {found.currency}"),
            ("other's stake", f"{credits_of(found.stake_nanos)} {found.currency}"),
        ]
    )


def print_lost(found: Dispute) -> None:
    """What a claim that was taken back has cost, where the ruling is known."""
    ruling = getattr(found, "ruling", None)
    if ruling is None:
        return
    lost, victim = ruling.collected_nanos, ruling.victim_nanos
    shares = f", {credits_of(victim)} of it to the other side" if lost else ""
    fields(
        [
            ("lost", f"{credits_of(lost)} {found.currency}{shares}"),
            ("returned", f"{credits_of(found.bond_nanos - lost)} {found.currency}"),
        ]
    )


def print_detail(found: DisputeDetail, us: str) -> None:
    shown = [
        ("dispute", found.dispute),
        ("state", found.state),
        ("claim", f"{found.claim}, order {found.order}" if found.order else found.claim),
        ("opener", f"{found.opener}{' (you)' if found.opener == us else ''}"),
        ("buyer", found.buyer),
        ("seller", found.seller),
        ("agreement", found.agreement_hash),
        ("asked", f"{credits_of(found.amount_nanos)} {found.currency}"),
        ("opener's bond", credits_of(found.bond_nanos)),
        ("other's stake", credits_of(found.stake_nanos)),
        ("opened", date_of(found.opened_at)),
        ("evidence until", date_of(found.evidence_until)),
        ("check until", date_of(found.check_until)),
        ("ended", date_of(found.ended_at)),
        ("still owed", credits_of(found.owed_nanos) if found.owed_nanos else ""),
        *((f"checker {round_}", peer) for round_, peer in enumerate(found.checkers, 1)),
        *(
            (f"evidence {one.n}", f"{peer_of(one.by)}{', done' if one.done else ''} {one.hash}")
            for one in found.evidence
        ),
        ("next", next_step(found, us)),
    ]
    fields([*((name, value) for name, value in shown if value), *_ruling(found.ruling)])


def _ruling(ruling: DisputeRuling | None) -> list[tuple[str, str]]:
    if ruling is None:
        return []
    return [
        ("ruling", f"{ruling.rule}: {RULES.get(ruling.rule, '')}".rstrip(": ")),
        ("at fault", ruling.fault),
        *((name.removesuffix("_nanos"), credits_of(getattr(ruling, name))) for name in _NANOS),
        ("opener's bond", "returned" if ruling.bond_returned else "lost"),
    ]
