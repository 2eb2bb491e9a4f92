"""Words that the machines refuse, so that a dispute later finds what it needs."""

from __future__ import annotations

from typing import Any

import pytest

from lumaris_protocol import codec, envelope, pleading, rulings
from lumaris_protocol import effects as fx
from lumaris_protocol.errors import ViolationError
from lumaris_protocol.ids import digest
from lumaris_protocol.limits import EVIDENCE_BYTES_MAX, EVIDENCE_DOCUMENTS_MAX, PAY_WAIT_S
from lumaris_protocol.machines.chain import SendChain
from lumaris_protocol.machines.words import Words
from lumaris_protocol.messages.base import SessionMessage
from lumaris_protocol.messages.dispute import DisputeOpen, Facts
from lumaris_protocol.messages.execution import (
    Acceptance,
    Cancel,
    Delivery,
    JobEvent,
    SessionReady,
    Usage,
    WorkOrder,
)
from lumaris_protocol.messages.payment import Close, Voucher
from lumaris_protocol.rulings import Case, Dossier
from tests.dispute_builders import opening
from tests.protocol import parties as p
from tests.protocol.pair import Pair

PRICE = 2_100  # of a second: the start and the rate


def said(did: list[fx.Effect], kind: type[SessionMessage]) -> list[bytes]:
    """What one side sent of a kind, oldest first."""
    sent = [effect.data for effect in did if isinstance(effect, fx.Send)]
    return [data for data in sent if envelope.type_of(data) == kind.TYPE]


def run(pair: Pair, *, ms: int = 1_000) -> int:
    """An order is run and delivered; its number. The buyer has not answered yet."""
    n = pair.order()
    pair.pump()
    pair.start()
    pair.pass_time(ms)
    pair.deliver()
    while pair.to_buyer:
        pair.pump_to_buyer()
    return n


def word(pair: Pair, n: int, total: int) -> bytes:
    """The buyer's own word, whatever its tab says."""
    return pair.buyer._chain.sign(Acceptance, n=n, accepted=True, total_nanos=total).data


def hears(pair: Pair, data: bytes, *, refused: bool) -> None:
    """The seller takes a word, or ends the session over it."""
    if refused:
        with pytest.raises(ViolationError) as found:
            pair.seller.receive(data, now=pair.now)
        assert found.value.code == "understated"
    else:
        pair.by_seller(pair.seller.receive(data, now=pair.now))


@pytest.mark.parametrize("less", [0, 1])
def test_a_seller_takes_no_word_below_what_was_accepted(less: int) -> None:
    pair = Pair(accepts=False).open()
    hears(pair, word(pair, run(pair), PRICE), refused=False)
    hears(pair, word(pair, run(pair), 2 * PRICE - less), refused=less > 0)
    assert pair.seller.orders_accepted == 2 - less


@pytest.mark.parametrize("less", [0, 1])
def test_a_word_must_hold_what_a_failed_order_cost(less: int) -> None:
    """Metered and vouchered, and then the guest failed: that stays with the seller."""
    pair = Pair(accepts=False).open()
    n, kept = half_done(pair)
    pair.fail(n, "failed", "exit_nonzero")
    pair.pump()
    hears(pair, word(pair, run(pair), kept + PRICE - less), refused=less > 0)


@pytest.mark.parametrize("less", [0, 1])
def test_a_word_must_hold_what_was_paid_for_a_delivery_without_an_answer(less: int) -> None:
    """The buyer accepts the second of two, and may refuse the first after that."""
    pair = Pair(accepts=False).open()
    _, paid = half_done(pair)
    pair.deliver()
    n = run(pair)
    hears(pair, word(pair, n, paid + PRICE - less), refused=less > 0)


def test_a_seller_works_on_no_longer_than_it_can_show_what_was_paid() -> None:
    """Orders that are paid while they run and fail by themselves, without one accepted total."""
    pair = Pair().open()
    while not pair.seller.machine.done:
        n, _ = half_done(pair)
        usage, pair.running = Usage(wall_ms=pair.wall_ms[n]), 0
        ended = pair.seller.failed(n, "failed", "exit_nonzero", now=pair.now, usage=usage)
        pair.by_seller(ended)
        pair.pump()
    assert pair.over()[1] == "lease_ended"
    assert 3 * pair.jobs <= EVIDENCE_DOCUMENTS_MAX - 4
    kinds = (WorkOrder, JobEvent)
    by_both = [data for kind in kinds for data in said(pair.buyer_did + pair.seller_did, kind)]
    shown = pleading.choose(by_both)
    paid = pair.stored()[1]
    assert _refund(pair, paid, shown) == 0


def test_a_word_lets_a_seller_work_on() -> None:
    words = Words()
    for number in range(3):
        for _ in range(16):
            words.keep(10, size_bytes=1)
        assert not words.too_few
        words.accept(100, 100 * (number + 1) + words.kept.nanos, kept=words.kept)
    words.keep(0, size_bytes=EVIDENCE_BYTES_MAX)
    assert not words.too_few
    words.keep(1, size_bytes=EVIDENCE_BYTES_MAX // 2)
    assert words.too_few


def test_a_session_of_many_orders_is_defended_with_its_last_word() -> None:
    """Each accepted and paid, and later denied: more of them than a side may show."""
    pair = Pair().open()
    for _ in range(EVIDENCE_DOCUMENTS_MAX // 2 + 1):
        pair.run_one(ms=10)
    paid = pair.seller.tab.vouchered_nanos
    assert _refund(pair, paid, (said(pair.buyer_did, Acceptance)[-1],)) == 0
    pair.by_buyer(pair.buyer.close())
    pair.pump()
    assert pair.over() == ("closed", "closed")
    assert _refund(pair, paid, (said(pair.buyer_did, Close)[-1],)) == 0


def half_done(pair: Pair) -> tuple[int, int]:
    """An order that runs on, and what was vouchered for it."""
    n = pair.order()
    pair.pump()
    pair.start()
    for _ in range(6):
        pair.pass_time(1_000)
        pair.pump()
    assert pair.seller.tab.vouchered_nanos > 0
    return n, pair.seller.tab.vouchered_nanos


def _refund(pair: Pair, paid: int, evidence: tuple[bytes, ...]) -> int:
    contract = pair.contract
    data = opening(contract, pair.grant, p.BUYER, "not_delivered", network=p.NETWORK, amount=paid)
    opened = codec.open_signed(data, DisputeOpen, network=p.NETWORK).message
    dossier = Dossier(contract, network=p.NETWORK)
    dossier.add(evidence, party=p.SELLER.peer_id)
    facts = Facts(
        paid_nanos=paid,
        claimed_nanos=paid,
        remainder_nanos=0,
        bond_nanos=1_000_000,
        stake_nanos=2 * paid,
        ended="done",
        opened_at=p.NOW,
        evidence_until=p.NOW,
        ends_at=contract.agreement.ends_at,
    )
    return rulings.rule(Case(contract, opened, dossier, facts)).refund_nanos


# --- ends ---


def test_taking_a_sellers_end_is_no_word_of_what_was_owed() -> None:
    """The seller ends it in the middle of a vouchered order, under whatever reason."""
    for reason in ("closed", "idle"):
        pair = Pair().open()
        _, paid = half_done(pair)
        pair.by_seller(pair.seller.end(reason))
        pair.pump()
        (close,) = said(pair.buyer_did, Close)
        assert codec.open_signed(close, Close, network=p.NETWORK).message.reason != "closed"
        assert _refund(pair, paid, (close,)) == paid


def test_a_seller_signs_no_end_that_leaves_the_buyers_word_open() -> None:
    """Under another reason than its own end, the buyer could deny later what it closed with."""
    pair = Pair().open()
    pair.run_one(ms=100)
    paid = pair.seller.tab.vouchered_nanos
    bad = pair.buyer._chain.sign(Close, total_nanos=paid, orders_accepted=1, reason="idle").data
    effects = pair.seller.receive(bad, now=pair.now)
    assert effects == [fx.SessionOver("terms_changed")]
    assert paid == pair.stored()[1]


def test_a_seller_takes_no_more_than_it_asked_for() -> None:
    """A gift would be claimed with the rest, and then denied: nothing was delivered for it."""
    pair = Pair(accepts=False).open()
    gift = pair.buyer._chain.sign(Voucher, total_nanos=1).data
    with pytest.raises(ViolationError, match="unasked"):
        pair.seller.receive(gift, now=pair.now)
    for extra, taken in ((0, PRICE), (1, 0)):
        for late in (False, True):
            pair = Pair(accepts=False).open()
            spoken = word(pair, run(pair), PRICE)
            data = pair.buyer._chain.sign(Voucher, total_nanos=PRICE + extra).data
            if late:
                pair.by_seller(pair.seller.end("idle"))
            pair.by_seller(pair.seller.receive(spoken, now=pair.now))
            if extra and not late:
                with pytest.raises(ViolationError, match="unasked"):
                    pair.seller.receive(data, now=pair.now)
            else:
                pair.by_seller(pair.seller.receive(data, now=pair.now))
            assert pair.stored()[1] == taken


def test_a_seller_that_ignores_a_cancel_is_paid_once() -> None:
    """The buyer gives the order up; what it paid for stays paid, and no more follows."""
    pair = Pair(accepts=False).open()
    n, paid = half_done(pair)
    pair.by_buyer(pair.buyer.cancel(n))
    pair.seller.receive(pair.to_seller.popleft(), now=pair.now)  # and does not stop it
    assert pair.buyer.give_up(n) == paid
    for _ in range(3):
        pair.pass_time(1_000)
        pair.pump()
    pair.deliver()
    pair.pump()
    assert pair.buyer.reject(n, "cancelled")
    assert pair.stored() == (paid, paid)
    pair.check()


# --- what is said twice ---


def test_a_seller_hears_one_cancel_of_an_order_and_no_late_ends() -> None:
    """Seventy of them would fill what the seller may show, and hide the order itself."""
    pair = Pair(accepts=False).open()
    n, _ = half_done(pair)
    pair.by_buyer(pair.buyer.cancel(n, grace_s=1))
    pair.pump()
    assert pair.buyer.cancel(n) == [], "an honest buyer asks once"
    again = pair.buyer._chain.sign(Cancel, n=n, grace_s=5).data
    with pytest.raises(ViolationError, match="cancelled before"):
        pair.seller.receive(again, now=pair.now)
    fields = {"total_nanos": 0, "orders_accepted": 0, "reason": "idle"}
    pair.by_seller(pair.seller.end("idle"))
    for refused in (False, False, True):
        close = pair.buyer._chain.sign(Close, **fields).data
        if refused:
            with pytest.raises(ViolationError, match="ended the session before"):
                pair.seller.receive(close, now=pair.now)
        else:
            pair.by_seller(pair.seller.receive(close, now=pair.now))
    cancel = pair.buyer._chain.sign(Cancel, n=n).data
    with pytest.raises(ViolationError, match="cancelled before"):
        pair.seller.receive(cancel, now=pair.now)


def test_a_buyer_hears_one_end_of_an_order_and_one_of_the_session() -> None:
    pair = Pair()
    chain = rogue(pair)
    n = pair.order()
    order_hash = digest(said(pair.buyer_did, WorkOrder)[0])
    fields: dict[str, Any] = {"n": n, "order_hash": order_hash, "at": p.NOW}
    ends = [chain.sign(JobEvent, state=state, **fields).data for state in ("failed", "killed")]
    pair.by_buyer(pair.buyer.receive(ends[0], now=pair.now))
    with pytest.raises(ViolationError, match="has ended before"):
        pair.buyer.receive(ends[1], now=pair.now)
    closing: dict[str, Any] = {"total_nanos": 0, "orders_accepted": 0, "reason": "idle"}
    pair.by_buyer(pair.buyer.receive(chain.sign(Close, **closing).data, now=pair.now))
    with pytest.raises(ViolationError, match="ended the session before"):
        pair.buyer.receive(chain.sign(Close, **closing).data, now=pair.now)


def test_a_delivery_is_paid_only_with_a_word_on_it() -> None:
    """Paid without one it could be denied later, with more others than a side may show."""
    pair = Pair(accepts=False).open()
    run(pair)
    data = pair.buyer._chain.sign(Voucher, total_nanos=PRICE).data
    with pytest.raises(ViolationError, match="unasked"):
        pair.seller.receive(data, now=pair.now)
    assert pair.stored()[1] == 0


def test_a_seller_waits_for_answers_while_it_can_still_show_what_was_paid() -> None:
    """Metered and paid while they run, then delivered, and no word on any of them."""
    pair = Pair(accepts=False).open()
    waiting = []
    while pair.gate_open and pair.jobs < EVIDENCE_DOCUMENTS_MAX:
        n, _ = half_done(pair)
        waiting.append(n)
        pair.deliver()
        pair.pump()
    assert len(waiting) == EVIDENCE_DOCUMENTS_MAX // 4
    paid = pair.stored()[1]
    kinds = (WorkOrder, Delivery, Voucher)
    by_both = [data for kind in kinds for data in said(pair.buyer_did + pair.seller_did, kind)]
    assert _refund(pair, paid, pleading.choose(by_both)) == 0
    pair.by_seller(pair.seller.tick(now=pair.now + PAY_WAIT_S + 1))
    assert not pair.seller.machine.done, "all that was asked for is paid"
    pair.by_buyer(pair.buyer.accept(waiting[-1], now=pair.now))
    pair.by_buyer(pair.buyer.accept(waiting[0], now=pair.now))
    pair.pump()
    assert pair.gate_open


@pytest.mark.parametrize("why", ["lease_ended", "buyer_lost", "malformed", "revoked", "unpaid"])
def test_what_a_session_leaves_to_its_seller_stands_in_a_dispute(why: str) -> None:
    """The buyer drops the line, breaks a rule, or lets the lease run out in the middle."""
    pair = Pair(accepts=False).open()
    n, paid = half_done(pair)
    if why == "lease_ended":
        pair.now = float(pair.contract.agreement.ends_at + 1)
        pair.by_seller(pair.seller.tick(now=pair.now))
    elif why == "unpaid":
        while pair.gate_open:  # its meters reach nobody
            pair.pass_time(1_000)
        pair.now += PAY_WAIT_S + 1
        pair.by_seller(pair.seller.tick(now=pair.now))
    else:
        pair.by_seller(pair.seller.end(why))
    assert pair.over()[1] == why
    assert pair.seller.failed(n, "killed", why, now=pair.now) == [], "it was said at once"
    kinds = (WorkOrder, JobEvent, Voucher, Close)
    by_both = [data for kind in kinds for data in said(pair.buyer_did + pair.seller_did, kind)]
    shown = pleading.choose(by_both)
    assert _refund(pair, pair.stored()[1], shown) == 0
    assert pair.seller.tab.paid_nanos(n) == 0
    assert pair.seller.tab.due_nanos == paid


@pytest.mark.parametrize(
    "reason",
    [
        "cancelled",
        "killed_deadline",
        "killed_fuel",
        "budget_exceeded",
        "killed_owner",
        "lease_ended",
        "buyer_lost",
        "unpaid",
    ],
)
def test_an_end_that_only_the_seller_says_costs_nothing(reason: str) -> None:
    """In the middle of a session, with figures that show no limit: both tabs give it back."""
    pair = Pair().open()
    n, paid = half_done(pair)
    pair.fail(n, "killed", reason)
    pair.pump()
    assert pair.buyer.costs[n] == 0 == pair.seller.tab.due_nanos
    pair.run_one(ms=1_000)
    (last,) = said(pair.buyer_did, Acceptance)
    message = codec.open_signed(last, Acceptance, network=p.NETWORK).message
    assert message.total_nanos == PRICE
    pair.by_buyer(pair.buyer.close())
    pair.pump()
    assert pair.over() == ("closed", "closed")
    (close,) = said(pair.buyer_did, Close)
    assert _refund(pair, paid, (close, last)) == paid - PRICE


def test_a_cancelled_order_costs_what_it_used() -> None:
    pair = Pair().open()
    n, paid = half_done(pair)
    pair.by_buyer(pair.buyer.cancel(n))
    pair.pump()
    pair.pump()
    assert pair.buyer.costs[n] == paid == pair.seller.tab.due_nanos


def test_a_seller_says_one_end_of_an_order() -> None:
    pair = Pair(accepts=False).open()
    n = run(pair)
    assert pair.seller.failed(n, "error", "platform_error", now=pair.now) == []
    pair.by_buyer(pair.buyer.accept(n, now=pair.now))
    pair.pump()
    assert pair.stored() == (PRICE, PRICE)


# --- another order's results ---


def rogue(pair: Pair) -> SendChain:
    """An opened session whose seller is the test itself."""
    agreement = pair.contract.agreement
    chain = SendChain(
        p.SELLER_SESSION, network=p.NETWORK, session=agreement.session, root=pair.contract.hash
    )
    pair.by_buyer(pair.buyer.open(pair.grant))
    ready = chain.sign(SessionReady, agreement_hash=pair.contract.hash)
    pair.by_buyer(pair.buyer.receive(ready.data, now=pair.now))
    return chain


@pytest.mark.parametrize("kind", [JobEvent, Delivery])
def test_a_buyer_takes_no_result_of_another_order(kind: type[SessionMessage]) -> None:
    pair = Pair()
    chain = rogue(pair)
    named = {"n": pair.order(), "order_hash": p.digest_of("another order")}
    fields: dict[str, Any] = {"state": "failed", "at": p.NOW}
    if kind is Delivery:
        fields = {
            "exit_status": 0,
            "outputs": (),
            "output_root": p.digest_of("none"),
            "stdout": p.file("stdout"),
            "stderr": p.file("stderr"),
            "usage": Usage(),
            "amount_nanos": 0,
            "environment": p.digest_of("environment"),
        }
    with pytest.raises(ViolationError) as refused:
        pair.buyer.receive(chain.sign(kind, **named, **fields).data, now=pair.now)
    assert refused.value.code == "broken_chain"


def test_all_that_a_seller_says_of_an_order_names_it() -> None:
    pair = Pair().open()
    pair.run_one()
    n = pair.order()
    pair.pump()
    pair.start()
    pair.fail(n, "failed", "exit_nonzero")
    pair.pump()
    assert pair.seller.failed(n, "failed", "exit_nonzero", now=pair.now) == []
    orders = said(pair.buyer_did, WorkOrder)
    names = {n: digest(data) for n, data in enumerate(orders, 1)}
    kinds: tuple[type[JobEvent | Delivery], ...] = (JobEvent, Delivery)
    for kind in kinds:
        for data in said(pair.seller_did, kind):
            message = codec.open_signed(data, kind, network=p.NETWORK).message
            assert message.order_hash == names[message.n]
    assert not said(pair.seller_did, Voucher)
