"""What was vouchered for an order that the seller's platform failed: credit, then given back."""

from __future__ import annotations

import msgspec
import pytest

from lumaris_protocol import codec, pricing
from lumaris_protocol import effects as fx
from lumaris_protocol.messages.execution import Acceptance
from lumaris_protocol.messages.payment import Close
from tests.protocol import parties as p
from tests.protocol.pair import Pair


def run_on(pair: Pair, seconds: int) -> int:
    """An order runs for so long, is metered and vouchered; its number."""
    n = pair.order()
    pair.pump()
    pair.start()
    for _ in range(seconds):
        pair.pass_time(1000)
        pair.pump()
    return n


def break_down(pair: Pair, seconds: int = 12) -> int:
    """The same, and then the seller's platform fails it; what was vouchered so far."""
    n = run_on(pair, seconds)
    pair.fail(n, "error", "platform_error")
    pair.pump()
    assert pair.buyer.costs[n] == 0
    return pair.stored()[0]


def ends(pair: Pair) -> list[int]:
    """The total of the co-signed end at the buyer and at the seller, where they have one."""
    kept = [
        next((e for e in did if isinstance(e, fx.KeepCloses)), None)
        for did in (pair.buyer_did, pair.seller_did)
    ]
    for one in kept:
        if one is not None:
            for data in (one.by_buyer, one.by_seller):
                close = codec.open_signed(data, Close, network=p.NETWORK).message
                assert close.total_nanos == one.total_nanos
    return [one.total_nanos for one in kept if one is not None]


@pytest.mark.parametrize("by_seller", [False, True])
def test_a_platform_error_costs_nothing_whoever_ends_the_session(by_seller: bool) -> None:
    pair = Pair().open()
    assert break_down(pair) > 0
    if by_seller:
        pair.by_seller(pair.seller.end("idle"))
        assert pair.seller.awaits_close
    else:
        pair.by_buyer(pair.buyer.close())
    pair.pump()
    assert ends(pair) == [0, 0]
    assert not pair.seller.awaits_close
    pair.check()


def test_credit_pays_the_next_orders_first() -> None:
    pair = Pair().open()
    before = break_down(pair)
    pair.run_one(ms=700)
    cost = pricing.order_nanos(pair.terms, 700)
    assert pair.stored() == (before, before)
    assert pair.buyer.tab.due_nanos == pair.seller.tab.due_nanos == cost
    words = [
        codec.open_signed(e.data, Acceptance, network=p.NETWORK).message
        for e in pair.buyer_did
        if isinstance(e, fx.Send) and b"acceptance" in e.data
    ]
    assert [word.total_nanos for word in words] == [cost]
    run_on(pair, 20)
    pair.deliver()
    pair.pump()
    total = cost + pricing.order_nanos(pair.terms, 20_000)
    assert pair.stored() == (total, total)
    assert total > before
    pair.by_buyer(pair.buyer.close())
    pair.pump()
    assert ends(pair) == [total, total]


def test_credit_keeps_the_gate_open_and_leaves_room_under_the_cap() -> None:
    terms = msgspec.structs.replace(p.TERMS, cap_nanos=30_000, exposure_nanos=6_000)
    pair = Pair(terms).open()
    break_down(pair)
    n = pair.order()
    pair.pump()
    pair.start()
    for _ in range(9):  # no word reaches the buyer: what is vouchered covers it
        pair.pass_time(1000)
    assert pair.gate_open
    pair.pump()
    pair.deliver()
    pair.pump()
    cost = pricing.order_nanos(terms, 9000)
    assert pair.buyer.costs[n] == cost
    pair.by_buyer(pair.buyer.close())
    pair.pump()
    assert ends(pair) == [cost, cost]


def test_what_is_on_its_way_leaves_the_buyers_total_standing() -> None:
    """The error crosses the buyer's end, which the seller signs: one exposure at the most."""
    pair = Pair().open()
    n = run_on(pair, 6)
    paid = pair.stored()[0]
    assert 0 < paid <= pair.terms.exposure_nanos
    pair.fail(n, "error", "platform_error")
    pair.by_buyer(pair.buyer.close())
    pair.pump()
    assert ends(pair) == [paid, paid]


def test_a_larger_error_on_its_way_is_given_back_by_the_sellers_own_reckoning() -> None:
    pair = Pair().open()
    n = run_on(pair, 30)
    assert pair.stored()[0] > pair.terms.exposure_nanos
    pair.fail(n, "error", "platform_error")
    pair.by_buyer(pair.buyer.close())
    pair.pump()
    assert ends(pair) == [0, 0]
    assert pair.buyer.costs[n] == 0
    assert pair.over() == ("closed", "closed")


def test_a_meter_on_its_way_when_the_buyer_ends_it_is_paid_from_credit() -> None:
    pair = Pair().open()
    before = break_down(pair)
    pair.order()
    pair.pump()
    pair.start()
    for _ in range(6):
        pair.pass_time(1000)
    pair.by_buyer(pair.buyer.close())
    pair.pump()
    assert pair.over() == ("closed", "closed")
    (total, same) = ends(pair)
    assert total == same
    assert 0 < total <= pricing.order_nanos(pair.terms, 6000) < before


def test_a_buyer_that_takes_back_what_it_vouchered_gets_no_signature_for_it() -> None:
    pair = Pair().open()
    pair.run_one(ms=3000)
    cost = pair.stored()[1]
    low = pair.buyer._chain.sign(Close, total_nanos=cost - 1, orders_accepted=1, reason="closed")
    pair.by_seller(pair.seller.receive(low.data, now=pair.now))
    assert ends(pair) == []
    assert not pair.seller.awaits_close
    said = codec.open_signed(pair.to_buyer[-1], Close, network=p.NETWORK).message
    assert said.total_nanos == cost


def test_a_seller_that_forgives_what_crosses_its_end_changes_the_cost() -> None:
    """The last voucher crosses the seller's end, which both then sign without it."""
    pair = Pair().open()
    n = run_on(pair, 12)
    before = pair.stored()[1]
    while pair.stored()[0] == before:
        pair.pass_time(1000)
        while pair.to_buyer:
            pair.pump_to_buyer()
    pair.by_seller(pair.seller.end("lease_ended"))
    pair.pump()
    assert ends(pair) == [before, before]
    assert pair.buyer.tab.strike(n) == before < pair.stored()[0]


def test_errors_that_give_away_more_than_was_vouchered_end_the_session() -> None:
    pair = Pair().open()
    errors = 0
    while not pair.seller.machine.done:
        break_down(pair)
        errors += 1
    assert errors == 2
    assert pair.over() == ("platform_error", "platform_error")
    assert ends(pair) == [0, 0]


def test_a_lost_session_leaves_the_highest_voucher_to_both() -> None:
    pair = Pair().open()
    paid = break_down(pair)
    pair.by_buyer(pair.buyer.lost("seller_lost"))
    pair.by_seller(pair.seller.end("buyer_lost"))
    assert ends(pair) == []
    assert pair.stored() == (paid, paid)
