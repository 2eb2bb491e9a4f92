"""Random walks of the pair: whatever happens in whatever order, the money rules hold."""

from __future__ import annotations

import random
from collections import deque

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lumaris_protocol import codec, envelope, pricing
from lumaris_protocol import effects as fx
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.base import SessionMessage
from lumaris_protocol.messages.execution import (
    Acceptance,
    Cancel,
    Delivery,
    JobEvent,
    WorkOrder,
)
from lumaris_protocol.messages.payment import Close, Voucher
from lumaris_protocol.rulings import Session, work
from tests.protocol import parties as p
from tests.protocol.pair import Pair

TIGHT = msgspec.structs.replace(p.TERMS, cap_nanos=60_000, exposure_nanos=6_000)


_KINDS = (WorkOrder, JobEvent, Delivery, Acceptance, Cancel, Voucher, Close)
_SHOWN: dict[str, type[SessionMessage]] = {kind.TYPE: kind for kind in _KINDS}


class Walk(RuleBasedStateMachine):
    """Two honest sides with every delay and failure in between."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(TIGHT, accepts=False).open()
        self.waiting: list[int] = []
        self.errors: set[int] = set()
        self.accepted_nanos = 0
        self.cut = False

    def deliveries(self) -> None:
        seen = [e.delivery.n for e in self.pair.buyer_did if isinstance(e, fx.Delivered)]
        self.waiting = [n for n in seen if n in self.pair.buyer._live]

    @precondition(lambda self: self.pair.buyer.machine.state == "open")
    @rule()
    def order(self) -> None:
        self.pair.order()

    @precondition(lambda self: self.pair.queue and not self.pair.running and self.pair.gate_open)
    @rule()
    def start(self) -> None:
        if not self.pair.seller.machine.done:
            self.pair.start()

    @rule(ms=st.sampled_from([1, 50, 400, 1500]))
    def pass_time(self, ms: int) -> None:
        if self.pair.seller.machine.done:
            self.pair.now += ms / 1000
        else:
            self.pair.pass_time(ms)

    @precondition(lambda self: self.pair.running and not self.pair.seller.machine.done)
    @rule(end=st.sampled_from(["delivered", "failed", "error"]))
    def finish(self, end: str) -> None:
        if end == "error":
            self.errors.add(self.pair.running)
            self.pair.fail(self.pair.running, "error", "platform_error")
        elif end == "failed":
            self.pair.fail(self.pair.running, "failed", "exit_nonzero")
        else:
            self.pair.deliver()

    @precondition(lambda self: self.pair.to_seller)
    @rule()
    def to_seller(self) -> None:
        self.pair.pump_to_seller()

    @precondition(lambda self: self.pair.to_buyer)
    @rule()
    def to_buyer(self) -> None:
        self.pair.pump_to_buyer()

    @rule()
    def pump(self) -> None:
        self.pair.pump()

    @rule(accept=st.integers(min_value=0, max_value=4))
    def answer(self, accept: int) -> None:
        self.deliveries()
        for n in self.waiting[:2]:
            if accept:
                self.accept(n)
            else:
                self.pair.by_buyer(self.pair.buyer.reject(n, "output_mismatch"))

    def accept(self, n: int) -> None:
        answer = self.pair.buyer.accept(n, now=self.pair.now)
        self.accepted_nanos += self.pair.buyer.costs[n] if answer else 0
        self.pair.by_buyer(answer)

    @rule(n=st.integers(min_value=1, max_value=20))
    def cancel(self, n: int) -> None:
        self.pair.by_buyer(self.pair.buyer.cancel(n))

    @rule(chance=st.integers(min_value=0, max_value=15))
    def close(self, chance: int) -> None:
        if chance == 0:
            self.pair.by_buyer(self.pair.buyer.close())
        if chance == 1 and not self.pair.seller.machine.done:
            self.pair.by_seller(self.pair.seller.end("shutting_down"))
        if chance == 2:
            self.cut = True
            self.pair.to_seller = self.pair.to_buyer = deque(maxlen=0)
            self.pair.by_buyer(self.pair.buyer.lost("seller_lost"))
            self.pair.by_seller(self.pair.seller.end("buyer_lost"))

    @invariant()
    def money(self) -> None:
        self.pair.check()

    def teardown(self) -> None:
        """Everything arrives, the buyer closes: both have the same highest voucher."""
        pair = self.pair
        pair.pump()
        self.deliveries()
        for n in self.waiting:
            self.accept(n)
        pair.pump()
        if pair.buyer.live == 0 and pair.buyer.machine.state == pair.seller.machine.state == "open":
            # Nothing is owed by the buyer's tab, so the seller's must not wait for anything.
            capped = pair.buyer.tab.vouchered_nanos == TIGHT.cap_nanos
            assert pair.seller.tab.unpaid_nanos == 0 or capped
        pair.by_buyer(pair.buyer.close())
        pair.pump()
        assert pair.buyer.machine.done
        assert pair.seller.machine.done
        paid, taken = pair.stored()
        if pair.over() == ("closed", "closed"):
            assert paid == taken
        assert taken <= paid
        pair.check()
        self.check_end()

    def check_end(self) -> None:
        """What is paid with both signatures: for no order that the seller's platform failed."""
        pair = self.pair
        sides = [
            [e for e in did if isinstance(e, fx.KeepCloses)]
            for did in (pair.buyer_did, pair.seller_did)
        ]
        assert all(len(kept) <= 1 for kept in sides)
        owed = self.accepted_nanos - pair.buyer.tab.delivered_unpaid_nanos
        if not self.cut:
            assert pair.stored()[1] >= owed
            if sides[0]:
                assert sides[1] in (sides[0], [])
        prices = [
            pricing.order_nanos(pair.terms, ms)
            for n, ms in pair.wall_ms.items()
            if n not in self.errors
        ]
        for kept in sides[0] + sides[1]:
            assert owed <= kept.total_nanos <= pair.stored()[1]
            assert kept.total_nanos <= sum(prices) + pair.terms.exposure_nanos
        self.check_defence()

    def check_defence(self) -> None:
        """What the seller keeps by its tab it keeps in a dispute, by what both have signed."""
        pair = self.pair
        shown = Session(pair.contract)
        for effect in pair.buyer_did + pair.seller_did:
            if isinstance(effect, fx.Send) and envelope.type_of(effect.data) in _SHOWN:
                kind = _SHOWN[envelope.type_of(effect.data)]
                shown.add(codec.open_signed(effect.data, kind, network=p.NETWORK))
        assert work.against_refund(shown) >= pair.seller.tab.due_nanos


TestWalk = Walk.TestCase
TestWalk.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
TestWalk = pytest.mark.slow(TestWalk)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_wire_that_loses_repeats_or_swaps_is_always_noticed(seed: int) -> None:
    """On a bad wire a session may break off, but never with another amount than was signed."""
    print(f"seed={seed}")
    dice = random.Random(seed)
    pair = Pair(TIGHT).open()
    vouchered = 0
    try:
        for _ in range(200):
            _move(pair, dice)
            for line in (pair.to_seller, pair.to_buyer):
                if line and dice.random() < 0.02:
                    spot = dice.randrange(len(line))
                    if dice.random() < 0.5:
                        del line[spot]
                    else:
                        line.append(line[spot])
            pair.pump()
            pair.check()
            vouchered = pair.seller.tab.vouchered_nanos
    except LumarisError as error:
        if error.code not in ("replayed", "out_of_sequence"):
            raise
    pair.check()
    assert pair.seller.tab.vouchered_nanos >= vouchered


def _move(pair: Pair, dice: random.Random) -> None:
    if pair.buyer.machine.state == "open" and dice.random() < 0.5:
        pair.order()
    if pair.queue and not pair.running:
        pair.start()
    pair.pass_time(dice.choice([5, 100, 600]))
    if pair.running and dice.random() < 0.6:
        if dice.random() < 0.8:
            pair.deliver()
        else:
            pair.fail(pair.running, "failed", "exit_nonzero")
