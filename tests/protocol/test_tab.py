"""The tab: vouchers are money, everything else is a note."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumaris_protocol.errors import ViolationError
from lumaris_protocol.machines.tab import Tab


def test_an_order_accrues_is_paid_and_leaves() -> None:
    tab = Tab(cap_nanos=1000)
    tab.accrue(1, 30)
    tab.accrue(1, 20)  # a smaller figure changes nothing
    assert (tab.unpaid_nanos, tab.delivered_unpaid_nanos) == (30, 0)
    tab.finish(1, 50)
    assert (tab.unpaid_nanos, tab.delivered_unpaid_nanos) == (50, 50)
    assert tab.voucher(20) == 20
    assert tab.voucher(50) == 30
    assert (tab.unpaid_nanos, tab.vouchered_nanos, tab._lines) == (0, 50, {})


def test_money_paid_ahead_pays_the_next_order() -> None:
    tab = Tab(cap_nanos=1000)
    tab.voucher(80)
    tab.finish(1, 50)
    tab.accrue(2, 50)
    assert tab.unpaid_nanos == 20


def test_the_oldest_is_paid_first() -> None:
    tab = Tab(cap_nanos=1000)
    tab.accrue(1, 50)
    tab.finish(2, 50)
    tab.voucher(60)
    assert tab.delivered_unpaid_nanos == 40


def test_a_struck_order_is_not_owed_but_its_vouchers_stay() -> None:
    tab = Tab(cap_nanos=1000)
    tab.accrue(1, 50)
    tab.voucher(30)
    assert tab.strike(1) == 30
    assert tab.strike(1) == 0
    assert (tab.unpaid_nanos, tab.vouchered_nanos) == (0, 30)
    tab.finish(2, 50)
    assert tab.unpaid_nanos == 50


def test_what_an_order_had_is_credit_when_nothing_of_it_counts() -> None:
    tab = Tab(cap_nanos=1000)
    tab.accrue(1, 50)
    tab.voucher(30)
    assert (tab.due_nanos, tab.amount_nanos(1)) == (30, 50)
    assert tab.strike(1, metered_nanos=0) == 0
    assert (tab.unpaid_nanos, tab.vouchered_nanos, tab.due_nanos, tab.amount_nanos(1)) == (
        0,
        30,
        0,
        0,
    )
    tab.finish(2, 20)
    assert (tab.unpaid_nanos, tab.vouchered_nanos, tab.due_nanos) == (0, 30, 20)


def test_what_is_given_back_comes_off_open_orders() -> None:
    tab = Tab(cap_nanos=1000)
    tab.finish(1, 50)
    tab.accrue(2, 40)
    tab.accrue(3, 40)
    tab.voucher(120)
    tab.give_back(70)
    assert (tab.due_nanos, tab.unpaid_nanos, tab.amount_nanos(2), tab.amount_nanos(3)) == (
        70,
        0,
        20,
        0,
    )
    tab.give_back(10)
    assert (tab.due_nanos, tab.unpaid_nanos) == (50, 0)


def test_what_was_meant_for_others_pays_them_when_an_order_is_struck() -> None:
    tab = Tab(cap_nanos=1000)
    tab.accrue(1, 50)
    tab.finish(2, 50)
    tab.voucher(60)
    assert tab.strike(1, metered_nanos=10) == 10
    assert tab.unpaid_nanos == 0


def test_a_smaller_final_amount_never_takes_back_a_voucher() -> None:
    tab = Tab(cap_nanos=1000)
    tab.accrue(1, 50)
    tab.voucher(50)
    tab.finish(1, 20)
    assert tab.unpaid_nanos == 0
    tab.accrue(2, 10)
    assert tab.unpaid_nanos == 10


@pytest.mark.parametrize("total", [0, 10, 9])
def test_a_voucher_must_rise(total: int) -> None:
    tab = Tab(cap_nanos=1000, vouchered_nanos=10)
    with pytest.raises(ViolationError, match="voucher_stale"):
        tab.voucher(total)


def test_a_voucher_must_stay_under_the_cap() -> None:
    tab = Tab(cap_nanos=1000)
    with pytest.raises(ViolationError, match="over_cap"):
        tab.voucher(1001)
    assert tab.vouchered_nanos == 0
    assert tab.voucher(1000) == 1000


_FACTS = st.tuples(
    st.sampled_from(["accrue", "finish", "strike", "voucher"]),
    st.integers(min_value=1, max_value=4),
    st.integers(min_value=0, max_value=400),
)


@given(st.lists(_FACTS, max_size=40))
def test_the_sums_always_hold(facts: list[tuple[str, int, int]]) -> None:
    tab = Tab(cap_nanos=1000)
    for fact, n, amount in facts:
        before = tab.vouchered_nanos
        if fact == "accrue":
            tab.accrue(n, amount)
        elif fact == "finish":
            tab.finish(n, amount)
        elif fact == "strike":
            tab.strike(n, metered_nanos=amount)
        elif before < before + amount <= tab.cap_nanos:
            tab.voucher(before + amount)
        paid = sum(line.paid_nanos for line in tab._lines.values())
        assert 0 <= tab.delivered_unpaid_nanos <= tab.unpaid_nanos
        assert before <= tab.vouchered_nanos <= tab.cap_nanos
        assert tab._credit_nanos >= 0
        assert paid + tab._credit_nanos <= tab.vouchered_nanos
        assert paid <= tab.due_nanos <= tab.vouchered_nanos
        assert tab._credit_nanos == 0 or tab.unpaid_nanos == 0
