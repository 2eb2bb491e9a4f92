"""Every rule, on the evidence that it is for and on the evidence that tries to bend it."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace as changed

from lumaris_protocol import pricing, rulings
from lumaris_protocol.limits import DISPUTE_BOND_NANOS_MIN, PENALTY_BPS
from lumaris_protocol.messages.execution import Usage
from lumaris_protocol.rulings import Case, Decision
from tests.dispute_builders import LIMITS, Work
from tests.protocol import parties as p
from tests.protocol.cases import (
    CAP,
    CHECKER,
    CHECKER_SESSION,
    EXPOSURE,
    PRICE,
    case,
    claim_of,
    contract,
    other_work,
    ruled,
    work,
)

# --- not delivered ---


def test_what_is_not_shown_was_not_delivered() -> None:
    """The default of a silent seller: all that it took goes back, and a tenth of it is lost."""
    found = ruled(work(), "not_delivered", paid_nanos=50_000)
    assert (found.fault, found.rule) == ("seller", "not_delivered")
    assert found.refund_nanos == 50_000
    assert found.slash_nanos == found.collected_nanos == 55_000
    assert (found.victim_nanos, found.fees_nanos) == (2_500, 2_500)
    assert found.bond_returned
    assert found.award_nanos == 0


def test_a_shown_delivery_refutes_the_claim() -> None:
    made = work()
    shown = (made.order(), made.delivery())
    found = ruled(made, "not_delivered", seller=shown, paid_nanos=PRICE)
    assert (found.fault, found.rule) == ("buyer", "delivered")
    assert found.refund_nanos == 0
    assert not found.bond_returned
    assert found.victim_nanos == found.fees_nanos == 500_000


def test_only_the_missing_part_is_refunded() -> None:
    made = work()
    shown = (made.order(), made.delivery())
    found = ruled(made, "not_delivered", seller=shown, paid_nanos=3 * PRICE)
    assert found.refund_nanos == 2 * PRICE


def test_no_more_than_asked_is_refunded() -> None:
    assert ruled(work(), "not_delivered", paid_nanos=50_000, amount=7).refund_nanos == 7


def test_a_short_stake_is_all_there_is_and_the_buyer_comes_first() -> None:
    found = ruled(work(), "not_delivered", paid_nanos=50_000, stake_nanos=50_001)
    assert (found.refund_nanos, found.slash_nanos, found.collected_nanos) == (
        50_000,
        55_000,
        50_001,
    )
    assert (found.victim_nanos, found.fees_nanos) == (0, 1)


@pytest.mark.parametrize(
    "shown",
    [
        lambda w: (w.delivery(),),  # nobody ordered it
        lambda w: (w.order(), w.delivery(exit_status=1)),
        lambda w: (w.order(), w.delivery(amount_nanos=0)),
        lambda w: (w.order(), w.delivery(wall_ms=66_001)),  # late by its own figures
        lambda w: (w.order(), w.event(at=w.contract.agreement.ends_at + 61), w.delivery()),
        lambda w: (w.order(), w.event(state="error", reason="platform_error")),
        lambda w: (w.order(), w.event(state="killed", reason="killed_owner")),
        lambda w: (w.order(), w.event(state="killed", reason="killed_deadline", wall_ms=1)),
        lambda w: (w.order(), w.event(state="killed", reason="killed_fuel")),
        lambda w: (w.order(), w.event(state="killed", reason="cancelled")),  # no Cancel shown
        lambda w: (w.order(2), w.delivery(1)),
    ],
)
def test_what_delivers_nothing(shown: Any) -> None:
    made = work()
    found = ruled(made, "not_delivered", seller=shown(made), paid_nanos=PRICE)
    assert (found.fault, found.refund_nanos) == ("seller", PRICE)


@pytest.mark.parametrize(
    "shown",
    [
        lambda w: (w.order(), w.cancel()),
        lambda w: (w.order(), w.cancel(), w.event(state="killed", reason="cancelled")),
        lambda w: (w.order(), w.event(reason="exit_nonzero", exit_status=3)),
        lambda w: (w.order(), w.event(state="killed", reason="killed_memory")),
        lambda w: (
            w.order(),
            w.event(state="killed", reason="killed_deadline", wall_ms=60_000),
        ),
        lambda w: (
            w.order(),
            w.event(
                state="killed",
                reason="killed_fuel",
                usage=Usage(wall_ms=1_000, fuel=LIMITS.fuel),
            ),
        ),
        lambda w: (w.order(), w.delivery(wall_ms=66_001), w.word(accepted=True)),
        lambda w: (w.order(), w.delivery(), w.word(accepted=False)),
        lambda w: (w.order(), w.delivery(), w.word(accepted=False), w.word(accepted=True)),
    ],
)
def test_what_the_seller_keeps(shown: Any) -> None:
    """The buyer's own Cancel, agreed limits, the guest's own failure, an accepted late delivery."""
    made = work()
    found = ruled(made, "not_delivered", seller=shown(made), paid_nanos=PRICE)
    assert (found.fault, found.refund_nanos) == ("buyer", 0)


def test_an_order_is_worth_no_more_than_its_agreed_price() -> None:
    made = work()
    limits = changed(LIMITS, cost_nanos=700)
    shown = (made.order(limits=limits), made.delivery(amount_nanos=CAP))
    found = ruled(made, "not_delivered", seller=shown, paid_nanos=PRICE)
    assert found.refund_nanos == PRICE - 700


def test_a_voucher_that_only_the_buyer_shows_is_no_loss() -> None:
    """It may never have reached the seller: only what was paid is refunded."""
    made = work()
    found = ruled(made, "not_delivered", buyer=(made.voucher(CAP),), paid_nanos=0)
    assert (found.fault, found.refund_nanos) == ("buyer", 0)


def test_the_buyers_own_word_stands_for_all_orders_before_it() -> None:
    made = work()
    word = made.word(9, accepted=True, total_nanos=40_000)
    shown = (word, made.order(9), made.delivery(9), made.order(10), made.delivery(10))
    found = ruled(made, "not_delivered", seller=shown, paid_nanos=50_000)
    assert found.refund_nanos == 10_000 - PRICE
    found = ruled(made, "unpaid_delivery", by=p.SELLER, seller=(word,), remainder_nanos=CAP)
    assert found.award_nanos == EXPOSURE  # it owes 40,000; more than this was never carried
    refusal = made.word(11, accepted=False, total_nanos=50_000)
    found = ruled(made, "not_delivered", seller=(refusal,), paid_nanos=50_000)
    assert found.refund_nanos == 50_000


# --- unpaid ---


def test_a_delivery_that_nobody_answered_is_paid_up_to_the_exposure() -> None:
    made = work()
    shown = (made.order(), made.delivery())
    found = ruled(made, "unpaid_delivery", by=p.SELLER, seller=shown, remainder_nanos=CAP)
    assert (found.fault, found.rule, found.award_nanos) == ("buyer", "unpaid", PRICE)
    assert found.slash_nanos == PRICE * PENALTY_BPS // 10_000
    long = (made.order(2), made.delivery(2, wall_ms=50_000))
    found = ruled(made, "unpaid_delivery", by=p.SELLER, seller=long, remainder_nanos=CAP)
    assert found.award_nanos == EXPOSURE < pricing.order_nanos(p.TERMS, 50_000)


def test_no_more_than_the_frozen_remainder_is_awarded() -> None:
    made = work()
    shown = (made.order(), made.delivery())
    found = ruled(made, "unpaid_delivery", by=p.SELLER, seller=shown, remainder_nanos=5)
    assert found.award_nanos == 5


def test_vouchers_are_paid_whatever_else_is_ruled() -> None:
    made = work()
    shown = (made.order(), made.delivery(), made.voucher(3 * PRICE))
    found = ruled(made, "unpaid_delivery", by=p.SELLER, seller=shown, remainder_nanos=CAP)
    assert (found.fault, found.rule, found.award_nanos) == ("seller", "paid", 3 * PRICE)
    assert not found.bond_returned


def test_a_rejected_delivery_is_shared() -> None:
    made = work()
    shown = (made.order(), made.delivery(), made.word(accepted=False))
    found = ruled(made, "unpaid_delivery", by=p.SELLER, seller=shown, remainder_nanos=CAP)
    assert (found.fault, found.rule, found.award_nanos) == ("neither", "rejected", PRICE // 2)
    assert found.bond_returned
    assert found.collected_nanos == 0


def test_a_seller_that_shows_nothing_loses_its_bond() -> None:
    found = ruled(work(), "unpaid_delivery", by=p.SELLER, remainder_nanos=CAP)
    assert (found.fault, found.award_nanos, found.bond_returned) == ("seller", 0, False)


# --- contradictions ---


def test_two_documents_under_one_number() -> None:
    made = work()
    twice = (made.delivery(1, seq=4), made.event(2, seq=4))
    found = ruled(made, "equivocation", buyer=twice)
    assert (found.fault, found.rule, found.slash_nanos) == ("seller", "equivocation", CAP)
    assert (found.refund_nanos, found.victim_nanos) == (0, CAP // 2)
    assert rulings.proven(case(made, "equivocation", buyer=twice))


@pytest.mark.parametrize("state", ["failed", "killed", "error"])
def test_two_ends_of_one_order(state: str) -> None:
    made = work()
    ends = (made.event(state=state), made.delivery())
    assert rulings.proven(case(made, "equivocation", buyer=ends))
    running = (made.event(2, state="running"), made.event(2, state="paused"), made.delivery(2))
    assert not rulings.proven(case(made, "equivocation", buyer=running))


@pytest.mark.parametrize("state", ["failed", "error"])
def test_a_delivery_beside_another_end_of_its_order_is_worth_nothing(state: str) -> None:
    """The seller said that the order failed, and shows a Delivery that it never sent."""
    made = work()
    shown = (made.order(), made.event(state=state, reason="platform_error"))
    found = ruled(made, "not_delivered", buyer=shown, seller=(made.delivery(),), paid_nanos=PRICE)
    assert (found.fault, found.rule, found.refund_nanos) == ("seller", "not_delivered", PRICE)


def test_a_seller_with_two_results_of_the_disputed_order_is_refuted_by_them() -> None:
    """Whatever a second run comes to, one of the two would be equal."""
    made, theirs = work(), other_work(CHECKER, CHECKER_SESSION)
    shown = (made.order(), made.event(reason="exit_nonzero", exit_status=1))
    late = made.delivery(output="right")
    for checked in ((), (*theirs.agreements, theirs.order(), theirs.delivery(output="right"))):
        found = case(
            made,
            "wrong_result",
            buyer=(*shown, *checked),
            seller=(late,),
            order=1,
            checkers=(CHECKER.peer_id,),
            paid_nanos=PRICE,
        )
        assert rulings.proven(found)
        decision = rulings.rule(found)
        assert (decision.fault, decision.rule) == ("seller", "equivocation")
        assert decision.refund_nanos == PRICE


def test_two_deliveries_of_one_order() -> None:
    made = work()
    assert rulings.proven(case(made, "equivocation", buyer=(made.delivery(), made.delivery())))


def test_a_buyer_can_equivocate_too() -> None:
    made = work()
    twice = (made.voucher(5, seq=1), made.voucher(6, seq=1))
    found = ruled(made, "equivocation", by=p.SELLER, seller=twice)
    assert (found.fault, found.slash_nanos, found.refund_nanos) == ("buyer", CAP, 0)


@pytest.mark.parametrize(
    "shown",
    [
        lambda w: (w.delivery(1), w.delivery(2)),
        lambda w: (w.delivery(1),) * 2,
        lambda w: (w.voucher(1, seq=1), w.voucher(2, seq=1)),  # the opener's own
        lambda w: (w.order(seq=3), w.delivery(seq=3)),  # two signers
    ],
)
def test_what_is_no_equivocation(shown: Any) -> None:
    made = work()
    assert not rulings.proven(case(made, "equivocation", buyer=shown(made)))


def test_a_forged_voucher() -> None:
    made = work()
    forged = made.voucher(CAP, key=p.STRANGER)
    shown = (claim_of(made, p.SELLER, CAP, forged),)
    found = ruled(made, "forged_voucher", buyer=shown)
    assert (found.fault, found.rule, found.slash_nanos) == ("seller", "forged_voucher", CAP)
    flipped = bytearray(made.voucher(CAP))
    flipped[-1] ^= 1
    shown = (claim_of(made, p.SELLER, CAP, bytes(flipped)),)
    assert rulings.proven(case(made, "forged_voucher", buyer=shown))


def test_what_is_no_forgery() -> None:
    made = work()
    honest = claim_of(made, p.SELLER, 5, made.voucher(5))
    own = claim_of(made, p.BUYER, 5, made.voucher(5, key=p.STRANGER))
    none = claim_of(made, p.SELLER, 0, None)
    for shown in (honest, own, none):
        assert not rulings.proven(case(made, "forged_voucher", buyer=(shown,)))


def test_a_stale_voucher() -> None:
    made = work()
    higher = made.voucher(9_000)
    shown = (higher, claim_of(made, p.BUYER, 4_000, made.voucher(4_000)))
    found = ruled(made, "stale_voucher", by=p.SELLER, seller=shown, remainder_nanos=CAP)
    assert (found.fault, found.rule, found.award_nanos) == ("buyer", "stale_voucher", 9_000)
    assert found.slash_nanos == 500


def test_a_close_alone_makes_nothing_stale() -> None:
    made = work()
    shown = (made.voucher(9_000), made.close(4_000))
    assert not rulings.proven(case(made, "stale_voucher", by=p.SELLER, seller=shown))
    by_seller = (made.voucher(9_500), made.close(4_000, by=p.SELLER_SESSION))
    assert not rulings.proven(case(made, "stale_voucher", by=p.SELLER, seller=by_seller))


# --- results ---


def result_case(theirs: Work, shown: tuple[bytes, ...], **known: Any) -> Case:
    """The buyer disputes order 1, paid for at its price, with a second run of it."""
    made = work()
    ours = (made.order(), made.delivery(output="wrong"))
    fields: dict[str, Any] = {"checkers": (CHECKER.peer_id,), "paid_nanos": PRICE}
    return case(
        made,
        "wrong_result",
        buyer=(*ours, *theirs.agreements, *shown),
        order=1,
        **(fields | known),
    )


def test_a_checker_that_finds_another_result() -> None:
    theirs = other_work(CHECKER, CHECKER_SESSION)
    shown = (theirs.order(7), theirs.delivery(7, output="right"))
    found = result_case(theirs, shown)
    assert rulings.proven(found)
    decision = rulings.rule(found)
    assert (decision.fault, decision.rule) == ("seller", "result_differs")
    assert (decision.refund_nanos, decision.slash_nanos) == (PRICE, 2 * PRICE)


def test_a_checker_that_finds_the_same_result() -> None:
    theirs = other_work(CHECKER, CHECKER_SESSION)
    decision = rulings.rule(
        result_case(theirs, (theirs.order(7), theirs.delivery(7, output="wrong")))
    )
    assert (decision.fault, decision.rule) == ("buyer", "result_equal")
    assert not decision.bond_returned


def test_a_checker_that_fails_with_a_status() -> None:
    theirs = other_work(CHECKER, CHECKER_SESSION)
    shown = (theirs.order(7), theirs.event(7, reason="exit_nonzero", exit_status=2))
    assert rulings.rule(result_case(theirs, shown)).rule == "result_differs"


def test_only_what_was_paid_for_the_order_is_refunded() -> None:
    theirs = other_work(CHECKER, CHECKER_SESSION)
    shown = (theirs.order(7), theirs.delivery(7))
    assert rulings.rule(result_case(theirs, shown, paid_nanos=0)).refund_nanos == 0
    assert rulings.rule(result_case(theirs, shown, paid_nanos=9)).refund_nanos == 9


@pytest.mark.parametrize(
    "shown",
    [
        lambda w: (),
        lambda w: (w.order(7),),
        lambda w: (w.delivery(7),),
        lambda w: (w.order(7, command="other"), w.delivery(7)),
        lambda w: (w.order(7, image=p.digest_of("other")), w.delivery(7)),
        lambda w: (w.order(7, environment={"A": "1"}), w.delivery(7)),
        lambda w: (w.order(7, input_root=p.digest_of("other")), w.delivery(7)),
        lambda w: (w.order(7, limits=changed(LIMITS, memory_bytes=1 << 20)), w.delivery(7)),
        lambda w: (w.order(7, stdin=True), w.delivery(7)),
        lambda w: (w.order(7), w.event(7, state="killed", reason="killed_owner")),
    ],
)
def test_what_is_no_check(shown: Any) -> None:
    theirs = other_work(CHECKER, CHECKER_SESSION)
    found = result_case(theirs, shown(theirs))
    assert not rulings.proven(found)
    decision = rulings.rule(found)
    assert (decision.fault, decision.rule) == ("neither", "check_missing")
    # Checks that would not please are kept back: it has its price, and not the whole bond.
    assert (decision.bond_returned, decision.collected_nanos) == (False, DISPUTE_BOND_NANOS_MIN)


def test_a_check_on_another_tier_does_not_count() -> None:
    theirs = other_work(CHECKER, CHECKER_SESSION, tier="process")
    shown = (theirs.order(7), theirs.delivery(7))
    assert rulings.rule(result_case(theirs, shown)).rule == "check_missing"


def test_a_checker_that_was_not_drawn_does_not_count() -> None:
    theirs = other_work(CHECKER, CHECKER_SESSION)
    shown = (theirs.order(7), theirs.delivery(7))
    other = result_case(theirs, shown, checkers=(p.STRANGER.peer_id,))
    assert rulings.rule(other).rule == "check_missing"
    assert rulings.rule(result_case(theirs, shown, checkers=())).rule == "no_checker"


def replica_case(*outputs: str, counted: int | None = None, drawn: int = 0, **known: Any) -> Case:
    made = work(contract(verification="repl"))
    shown = [made.order(), made.delivery(output="a")]
    names = []
    for number, output in enumerate(outputs):
        key, session = p.key_of(f"replica {number}"), p.key_of(f"replica session {number}")
        theirs = other_work(key, session)
        shown += [*theirs.agreements, theirs.order(3), theirs.delivery(3, output=output)]
        names.append(key.peer_id)
    names += [p.key_of(f"silent {number}").peer_id for number in range(drawn - len(names))]
    return case(
        made,
        "wrong_result",
        buyer=tuple(shown),
        order=1,
        paid_nanos=PRICE,
        checkers=tuple(names[:counted]),
        **known,
    )


def replicas(*outputs: str, **known: Any) -> Decision:
    return rulings.rule(replica_case(*outputs, **known))


def test_most_of_the_replicas_are_right() -> None:
    assert replicas("b", "b").rule == "majority_differs"
    assert replicas("b", "b").refund_nanos == PRICE
    assert replicas("a", "b").rule == "majority_equal"
    half = replicas("b", "c")
    assert (half.fault, half.rule, half.refund_nanos) == ("neither", "no_majority", PRICE // 2)
    assert half.victim_nanos == half.fees_nanos == 0
    assert replicas("a", "b", "b").rule == "no_majority"


def test_too_few_replicas_decide_nothing() -> None:
    assert replicas("b", "b", counted=1).rule == "no_checker"
    assert replicas("b", "b", counted=0).rule == "no_checker"
    missing = replicas("b", drawn=2)
    assert (missing.fault, missing.rule) == ("neither", "replicas_missing")
    assert missing.collected_nanos == DISPUTE_BOND_NANOS_MIN


def test_all_drawn_replicas_have_answered() -> None:
    """Then nothing can change any more; before, one of them may still turn it."""
    assert rulings.proven(replica_case("b", "b"))
    assert not rulings.proven(replica_case("b", "b", drawn=3))


def test_a_checkers_result_counts_whoever_bought_it() -> None:
    theirs = other_work(CHECKER, CHECKER_SESSION, buyer=p.SELLER)
    made = work()
    found = case(
        made,
        "wrong_result",
        buyer=(made.order(), made.delivery(output="wrong")),
        seller=(*theirs.agreements, theirs.order(7), theirs.delivery(7, output="wrong")),
        order=1,
        paid_nanos=PRICE,
        checkers=(CHECKER.peer_id,),
    )
    assert rulings.rule(found).rule == "result_equal"


def test_nothing_beyond_is_owed_for_what_the_seller_did_not_claim() -> None:
    theirs = other_work(CHECKER, CHECKER_SESSION)
    shown = (theirs.order(7), theirs.delivery(7))
    found = rulings.rule(result_case(theirs, shown, paid_nanos=PRICE, claimed_nanos=0))
    got = PRICE - PRICE * contract().agreement.fee_bps // 10_000
    assert (found.refund_nanos, found.slash_nanos) == (got, got)
