"""What a seller may charge is bounded by the time its orders can have run, as was heard of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumaris_protocol import effects as fx
from lumaris_protocol import merkle
from lumaris_protocol.errors import ViolationError
from lumaris_protocol.machines.buyer import _LATE_S
from lumaris_protocol.machines.chain import SendChain
from lumaris_protocol.messages.execution import (
    Delivery,
    JobEvent,
    Meter,
    SessionReady,
    Usage,
    WorkState,
)
from tests.protocol import parties as p
from tests.protocol.pair import Pair

START, RATE = p.TERMS.start_nanos, p.TERMS.rate_nanos_per_s
_TOLERANCE = 1.01


class Seller:
    """Says what it is told to, at the buyer's time `pair.now`."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        agreement = pair.contract.agreement
        self.chain = SendChain(
            p.SELLER_SESSION,
            network=p.NETWORK,
            session=agreement.session,
            root=pair.contract.hash,
        )
        pair.by_buyer(pair.buyer.open(pair.grant))
        self.hear(self.chain.sign(SessionReady, agreement_hash=pair.contract.hash).data)

    def hear(self, data: bytes) -> list[fx.Effect]:
        return self.pair.by_buyer(self.pair.buyer.receive(data, now=self.pair.now))

    def state(self, n: int, state: WorkState, **fields: object) -> list[fx.Effect]:
        named = self.pair.about(n)
        return self.hear(self.chain.sign(JobEvent, **named, state=state, at=p.NOW, **fields).data)

    def meter(self, n: int, amount: int) -> None:
        self.hear(self.chain.sign(Meter, n=n, amount_nanos=amount, usage=Usage()).data)

    def deliver(self, n: int, amount: int) -> None:
        self.hear(
            self.chain.sign(
                Delivery,
                **self.pair.about(n),
                exit_status=0,
                outputs=(),
                output_root=merkle.files_root(()),
                stdout=p.file("stdout"),
                stderr=p.file("stderr"),
                usage=Usage(),
                amount_nanos=amount,
                environment=p.digest_of("environment"),
            ).data
        )


def cost(ran_s: float) -> int:
    return int(START + RATE * ran_s)


def test_preparing_costs_nothing():
    seller = Seller(pair := Pair())
    n = pair.order()
    for _ in range(60):
        seller.state(n, "preparing")
        pair.now += 5
    seller.state(n, "running")
    pair.now += 0.5
    with pytest.raises(ViolationError, match="overcharged"):
        seller.meter(n, cost(_TOLERANCE * (0.5 + _LATE_S)) + 1)
    assert pair.stored()[0] == 0


def test_a_pause_costs_nothing():
    seller = Seller(pair := Pair())
    n = pair.order()
    seller.state(n, "running")
    pair.now += 5
    seller.state(n, "paused")
    pair.now += 40
    seller.state(n, "running")
    pair.now += 5
    seller.meter(n, cost(10))
    with pytest.raises(ViolationError, match="overcharged"):
        seller.meter(n, cost(_TOLERANCE * (10 + _LATE_S + _LATE_S)) + 1)


def test_what_was_delivered_costs_no_more_while_its_answer_is_waited_for():
    seller = Seller(pair := Pair(accepts=False))
    n = pair.order()
    pair.now += 30
    seller.state(n, "running")
    pair.now += 1
    seller.deliver(n, cost(1))
    pair.now += 30
    with pytest.raises(ViolationError, match="overcharged"):
        seller.meter(n, cost(_TOLERANCE * (1 + _LATE_S)) + 1)


def test_orders_together_cost_no_more_than_their_time_one_after_another():
    """Each preparation is longer than what may be late; so each order's late start is free once."""
    seller = Seller(pair := Pair())
    orders = [pair.order() for _ in range(5)]
    for n in orders:
        seller.state(n, "running")
    pair.now += _LATE_S
    for n in orders[:-1]:
        seller.deliver(n, cost(_LATE_S / len(orders)))
    with pytest.raises(ViolationError, match="overcharged"):
        seller.deliver(orders[-1], cost(_TOLERANCE * _LATE_S))


@dataclass
class Ran:
    """One order: what it did, in seconds, and how late each word of it arrives."""

    prepares: float
    runs: list[float]
    pauses: list[float]
    late: list[float]


seconds = st.floats(min_value=0, max_value=40)
late = st.floats(min_value=0, max_value=_LATE_S)
ran = st.builds(
    Ran,
    prepares=st.floats(min_value=0, max_value=400),
    runs=st.lists(st.floats(min_value=0, max_value=15), min_size=1, max_size=3),
    pauses=st.lists(seconds, min_size=2, max_size=2),
    late=st.lists(late, min_size=9, max_size=9),
)


@settings(max_examples=200)
@given(orders=st.lists(ran, min_size=1, max_size=6))
def test_an_honest_seller_is_paid_however_late_its_words_are(orders: list[Ran]):
    seller = Seller(pair := Pair())
    for _ in orders:
        pair.order()
    there = pair.now  # the seller's time

    def arrives(late_s: float) -> None:
        pair.now = max(pair.now, there + late_s)  # in order

    for n, order in enumerate(orders, 1):
        words = iter(order.late)
        seller.state(n, "preparing")
        there += order.prepares
        arrives(next(words))
        seller.state(n, "running")
        total = 0.0
        for run_s, pause_s in zip(order.runs, [*order.pauses, 0][: len(order.runs)], strict=True):
            there, total = there + run_s, total + run_s
            arrives(next(words))
            seller.meter(n, cost(total))
            seller.state(n, "paused")
            there += pause_s
            arrives(next(words))
            seller.state(n, "running")
        arrives(next(words))
        seller.deliver(n, cost(total))
    assert pair.buyer.orders_accepted == len(orders)
    assert pair.stored()[0] == sum(cost(sum(order.runs)) for order in orders)


@settings(max_examples=200)
@given(
    orders=st.lists(st.tuples(seconds, seconds, st.floats(0, 60)), min_size=1, max_size=6),
)
def test_no_seller_gets_more_than_its_time_and_what_may_be_late(
    orders: list[tuple[float, float, float]],
):
    """Orders of 0 to 40 s that are claimed to have run for as long as is believed."""
    seller = Seller(pair := Pair())
    true_s = 0.0
    for prepares, runs, claims in orders:
        n = pair.order()
        seller.state(n, "preparing")
        pair.now += prepares
        seller.state(n, "running")
        pair.now += runs
        true_s += runs + _LATE_S
        try:
            seller.meter(n, cost(claims))
        except ViolationError:
            break
        seller.state(n, "failed", reason="exit_nonzero")
    most = _TOLERANCE * RATE * true_s + START * len(orders)
    assert pair.stored()[0] <= most


def test_how_far_a_preparation_is_is_passed_on_now_and_then():
    seller = Seller(pair := Pair())
    n = pair.order()
    heard: list[tuple[str, int, int]] = []
    for step in range(40):
        if step % 4 == 3:
            effects = seller.state(n, "preparing")  # a sign of life only
        else:
            effects = seller.state(n, "preparing", detail="layer", done=step, total=40)
        heard += [
            (effect.event.detail, effect.event.done, effect.event.total)
            for effect in effects
            if isinstance(effect, fx.OrderChanged)
        ]
        pair.now += 0.06
    assert heard[0] == ("layer", 0, 40)
    assert all(detail == "layer" for detail, _, _ in heard)
    assert 8 <= len(heard) <= 13
    detail, done, total = heard[-1]
    pair.now += 5
    assert seller.state(n, "preparing", detail=detail, done=done, total=total) == []
