"""What is said of one order counts for that order alone, and once."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace as changed

from lumaris_protocol import pleading, rulings
from lumaris_protocol.ids import digest
from lumaris_protocol.limits import CLOCK_SKEW_S
from lumaris_protocol.rulings import work as worth
from tests.dispute_builders import LIMITS
from tests.protocol import parties as p
from tests.protocol.cases import (
    CAP,
    CHECKER,
    CHECKER_SESSION,
    EXPOSURE,
    PRICE,
    case,
    other_work,
    ruled,
    work,
)

START = p.TERMS.start_nanos


def checked(
    ours: tuple[bytes, ...], theirs: tuple[bytes, ...], *, paid_nanos: int = PRICE, **more: Any
) -> rulings.Case:
    """The buyer disputes order 1, with what a drawn checker is said to have run."""
    elsewhere = other_work(CHECKER, CHECKER_SESSION)
    return case(
        work(),
        "wrong_result",
        buyer=(*ours, *elsewhere.agreements, *theirs),
        order=1,
        checkers=(CHECKER.peer_id,),
        paid_nanos=paid_nanos,
        **more,
    )


# --- one number, two orders ---


def test_a_second_order_under_the_number_of_a_delivery_disputes_nothing() -> None:
    """Signed after the fact, and never sent to the seller: its honest result is not for it."""
    made = work()
    real, delivered = made.order(command="real"), made.delivery(output="of the real one")
    fake = made.order(command="fake", seq=4_711)
    theirs = other_work(CHECKER, CHECKER_SESSION)
    run = (theirs.order(command="fake"), theirs.delivery(output="of the fake one"))
    found = checked((fake, delivered), run)
    assert rulings.disputed_result(found) is None
    assert not rulings.proven(found)
    assert rulings.rule(found).fault == "buyer"
    both = checked((fake, real, delivered), run)
    assert rulings.rule(both).refund_nanos == 0
    assert (rulings.rule(both).fault, rulings.rule(both).rule) == ("buyer", "equivocation")
    shown = (real, fake)
    fraud = case(made, "equivocation", by=p.SELLER, seller=shown)
    assert rulings.proven(fraud)
    assert rulings.rule(fraud).slash_nanos == CAP


def test_a_second_order_in_the_checkers_session_is_no_check() -> None:
    """The checker ran what it was sent; the court is shown another order under its number."""
    made, theirs = work(), other_work(CHECKER, CHECKER_SESSION)
    ours = (made.order(command="real"), made.delivery(output="right"))
    theirs.order(command="another")
    result = theirs.delivery(output="of another")
    found = checked(ours, (theirs.order(command="real", seq=4_711), result))
    assert not rulings.proven(found)
    assert rulings.rule(found).rule == "check_missing"
    assert rulings.rule(found).refund_nanos == 0


def test_a_second_order_takes_no_delivery_back() -> None:
    made = work()
    real, delivered = made.order(), made.delivery()
    fake = made.order(seq=99, limits=changed(LIMITS, cost_nanos=1))
    shown: dict[str, Any] = {"buyer": (fake,), "seller": (real, delivered), "paid_nanos": PRICE}
    found = ruled(made, "not_delivered", **shown)
    assert (found.fault, found.rule, found.refund_nanos) == ("buyer", "equivocation", 0)
    assert worth.orders(case(made, "not_delivered", **shown).session)[1].limits == LIMITS


def test_two_orders_of_one_number_are_shown_first() -> None:
    made = work()
    kept = [made.order(n) for n in range(1, 20)]
    pair = (kept[3], made.order(4, command="fake", seq=4_711))
    chosen = pleading.choose((*kept, pair[1]), room=pleading.Room(3, 1 << 20))
    assert set(pair) <= set(chosen)


def test_an_end_or_a_late_event_of_another_order_does_not_count() -> None:
    made = work()
    order, other = made.order(), digest(b"another order")
    failed = made.event(reason="exit_nonzero", exit_status=1, order_hash=other)
    found = ruled(made, "not_delivered", seller=(order, failed), paid_nanos=PRICE)
    assert found.refund_nanos == PRICE
    late = made.event(state="running", at=made.contract.agreement.ends_at + 61, order_hash=other)
    shown = (order, late, made.delivery())
    assert ruled(made, "not_delivered", seller=shown, paid_nanos=PRICE).refund_nanos == 0


# --- the buyer's own word ---


def test_a_buyers_own_close_is_its_word_of_what_it_owed() -> None:
    made, total = work(), 100 * PRICE
    for reason, refund in (("closed", 0), ("idle", total)):
        close = made.close(total, reason=reason)
        shown = (close, made.close(total, by=p.SELLER_SESSION), made.voucher(total))
        found = ruled(made, "not_delivered", seller=shown, paid_nanos=total)
        assert found.refund_nanos == refund, reason
    below = (made.close(total - 1),)
    assert ruled(made, "not_delivered", seller=below, paid_nanos=total).refund_nanos == 1
    by_seller = (made.close(total, by=p.SELLER_SESSION),)
    assert ruled(made, "not_delivered", seller=by_seller, paid_nanos=total).refund_nanos == total


def test_a_close_does_not_save_the_price_of_a_wrong_result() -> None:
    made, theirs = work(), other_work(CHECKER, CHECKER_SESSION)
    ours = (made.order(), made.delivery(output="wrong"), made.close(PRICE))
    decision = rulings.rule(checked(ours, (theirs.order(), theirs.delivery(output="right"))))
    assert (decision.rule, decision.refund_nanos) == ("result_differs", PRICE)


def test_what_a_refused_order_was_paid_before_is_given_back_too() -> None:
    """Vouchered while it ran, then refused: the buyer's later totals hold that."""
    made, theirs = work(), other_work(CHECKER, CHECKER_SESSION)
    refused = (made.order(), made.delivery(output="wrong"), made.word(accepted=False))
    taken = made.word(2, accepted=True, total_nanos=2 * PRICE)
    run = (theirs.order(), theirs.delivery(output="right"))
    found = checked((*refused, taken), run, paid_nanos=2 * PRICE)
    assert rulings.rule(found).refund_nanos == PRICE


def test_what_was_accepted_counts_without_its_papers() -> None:
    made = work()
    words = tuple(made.word(n, accepted=True, total_nanos=0) for n in range(1, 51))
    found = ruled(made, "not_delivered", seller=words, paid_nanos=50 * PRICE)
    assert found.refund_nanos == 50 * (PRICE - START)


def test_words_out_of_order_count_no_order_twice() -> None:
    """Order 2 was accepted before order 1: the later word holds both."""
    made = work()
    shown = (
        made.order(2),
        made.delivery(2),
        made.word(2, accepted=True, total_nanos=PRICE),
        made.word(1, accepted=True, total_nanos=2 * PRICE),
    )
    found = ruled(made, "not_delivered", seller=shown, paid_nanos=3 * PRICE)
    assert found.refund_nanos == PRICE


# --- paid back once, and late by the lease that holds ---


def test_what_was_given_back_is_not_given_back_again() -> None:
    made = work()
    late = (made.order(), made.delivery(wall_ms=70_000))
    first = ruled(made, "not_delivered", buyer=late, paid_nanos=PRICE)
    assert first.refund_nanos == PRICE
    again = ruled(made, "not_delivered", buyer=late, paid_nanos=PRICE, refunded_nanos=PRICE)
    assert (again.fault, again.rule, again.refund_nanos) == ("neither", "refunded", 0)
    assert again.bond_returned
    made, theirs = work(), other_work(CHECKER, CHECKER_SESSION)
    ours = (made.order(), made.delivery(output="wrong"))
    run = (theirs.order(), theirs.delivery(output="right"))
    result = rulings.rule(checked(ours, run, refunded_nanos=PRICE))
    assert (result.rule, result.refund_nanos) == ("result_differs", 0)
    part = rulings.rule(checked(ours, run, refunded_nanos=PRICE - 7))
    assert part.refund_nanos == 7


@pytest.mark.parametrize("refunded", [0, PRICE, 2 * PRICE])
def test_a_refund_of_one_order_leaves_the_others(refunded: int) -> None:
    """Two orders paid, of which nothing is shown."""
    found = ruled(
        work(), "not_delivered", paid_nanos=2 * PRICE, refunded_nanos=refunded, amount=2 * PRICE
    )
    assert found.refund_nanos == 2 * PRICE - refunded


def test_work_inside_an_extended_lease_is_not_late() -> None:
    made = work()
    end = made.contract.agreement.ends_at
    shown = (made.order(), made.event(state="running", at=end + 3_000), made.delivery())
    for ends_at, refund in ((end, PRICE), (end + 3_000 - CLOCK_SKEW_S, 0)):
        found = ruled(made, "not_delivered", seller=shown, paid_nanos=PRICE, ends_at=ends_at)
        assert found.refund_nanos == refund
        unpaid = ruled(
            made,
            "unpaid_delivery",
            by=p.SELLER,
            seller=shown,
            remainder_nanos=CAP,
            ends_at=ends_at,
        )
        assert unpaid.award_nanos == PRICE - refund


def test_no_more_than_the_exposure_is_owed_beyond_vouchers() -> None:
    """Delivered and unpaid, and refused besides: together the seller agreed to carry so much."""
    made, shown = work(), []
    for n in range(1, 11):
        shown += [made.order(n), made.delivery(n)]
    for n in range(11, 25):
        shown += [made.order(n), made.delivery(n), made.word(n, accepted=False)]
    found = ruled(
        made,
        "unpaid_delivery",
        by=p.SELLER,
        seller=tuple(shown[:32]),
        remainder_nanos=CAP,
    )
    assert (found.fault, found.award_nanos) == ("buyer", EXPOSURE)


def test_half_of_what_was_refused_is_bounded_by_the_exposure() -> None:
    made, shown = work(), []
    for n in range(1, 17):
        shown += [made.order(n), made.delivery(n, wall_ms=20_000), made.word(n, accepted=False)]
    found = ruled(made, "unpaid_delivery", by=p.SELLER, seller=tuple(shown), remainder_nanos=CAP)
    assert (found.fault, found.rule, found.award_nanos) == ("neither", "rejected", EXPOSURE // 2)
