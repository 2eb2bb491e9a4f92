"""The two session machines against each other, through bytes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest

from lumaris_protocol import codec, envelope, limits, merkle, pricing
from lumaris_protocol import effects as fx
from lumaris_protocol.effects import KeepVoucher, StopOrder
from lumaris_protocol.errors import (
    EnvelopeError,
    LocalError,
    RefusedError,
    ViolationError,
)
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import (
    CLOCK_SKEW_S,
    IDLE_S_MAX,
    IMAGE_S_MAX,
    KEEPALIVE_S,
    PAY_WAIT_S,
    PREPARE_S_MAX,
    SILENCE_S,
)
from lumaris_protocol.machines.buyer import BuyerSession
from lumaris_protocol.machines.chain import SendChain
from lumaris_protocol.machines.seller import SellerSession
from lumaris_protocol.messages.base import SessionMessage
from lumaris_protocol.messages.execution import (
    Acceptance,
    Delivery,
    JobEvent,
    LogChunk,
    Meter,
    SessionOpen,
    SessionReady,
    Usage,
    WorkOrder,
)
from lumaris_protocol.messages.payment import Close, Voucher
from lumaris_protocol.registry import MESSAGES
from tests.protocol import parties as p
from tests.protocol.pair import Pair
from tests.protocol.samples import samples


def of(did: list[fx.Effect], kind: type[fx.Effect]) -> list[fx.Effect]:
    return [effect for effect in did if isinstance(effect, kind)]


def types_of(data: bytes) -> str:
    return envelope.decode(data).payload_type


def reasons(pair: Pair) -> list[tuple[str, str]]:
    events = [e.event for e in pair.buyer_did if isinstance(e, fx.OrderChanged)]
    return [(event.state, event.reason) for event in events if event.reason]


def chain_of_seller(pair: Pair, key: KeyPair = p.SELLER_SESSION) -> SendChain:
    """A seller's chain that has said nothing yet: for what an honest machine never says."""
    agreement = pair.contract.agreement
    return SendChain(key, network=p.NETWORK, session=agreement.session, root=pair.contract.hash)


def say_running(pair: Pair, chain: SendChain, *orders: int) -> None:
    """The rogue seller says that orders run: only then may they cost anything."""
    for n in orders:
        event = chain.sign(JobEvent, **pair.about(n), state="running", at=p.NOW)
        pair.buyer.receive(event.data, now=pair.now)


def rogue_seller(pair: Pair) -> SendChain:
    """An opened session whose seller is the test itself."""
    chain = chain_of_seller(pair)
    ready = chain.sign(SessionReady, agreement_hash=pair.contract.hash)
    pair.by_buyer(pair.buyer.open(pair.grant))
    pair.by_buyer(pair.buyer.receive(ready.data, now=pair.now))
    return chain


def hear(pair: Pair, side: BuyerSession | SellerSession, sent: list[bytes]) -> None:
    """One side takes several messages."""
    carry_out = pair.by_buyer if side is pair.buyer else pair.by_seller
    for data in sent:
        carry_out(side.receive(data, now=pair.now))


def first_word(kind: str, pair: Pair) -> bytes:
    """A well signed message as the very first of its signer."""
    message, key = samples()[kind]
    session, prev = pair.contract.agreement.session, pair.contract.hash
    return codec.sign(
        msgspec.structs.replace(message, session=session, seq=0, prev=prev), key, p.NETWORK
    ).data


def delivery_fields(pair: Pair, n: int, amount_nanos: int) -> dict[str, Any]:
    return pair.about(n) | {
        "exit_status": 0,
        "outputs": (),
        "output_root": merkle.files_root(()),
        "stdout": p.file("stdout"),
        "stderr": p.file("stderr"),
        "usage": Usage(),
        "amount_nanos": amount_nanos,
        "environment": p.digest_of("environment"),
    }


# --- the happy path ---


def test_one_order_is_delivered_paid_and_closed_by_both() -> None:
    pair = Pair().open()
    n = pair.run_one(ms=1500)
    cost = pricing.order_nanos(pair.terms, 1500)
    assert n == 1
    assert pair.stored() == (cost, cost)
    pair.by_buyer(pair.buyer.close())
    pair.pump()
    assert pair.over() == ("closed", "closed")
    (ours,), (theirs,) = of(pair.buyer_did, fx.KeepCloses), of(pair.seller_did, fx.KeepCloses)
    assert ours == theirs
    assert pair.buyer.orders_accepted == pair.seller.orders_accepted == 1
    assert (pair.buyer.machine.state, pair.seller.machine.state) == ("closed", "closed")
    pair.check()


def test_many_orders_stream_with_few_vouchers() -> None:
    pair = Pair().open()
    for _ in range(60):
        pair.order()
    pair.pump()
    for _ in range(60):
        pair.start()
        pair.pass_time(10)
        pair.deliver()
        pair.pump()
    total = 60 * pricing.order_nanos(pair.terms, 10)
    assert pair.stored() == (total, total)
    assert pair.buyer.live == 0
    assert len(of(pair.buyer_did, fx.KeepVoucher)) < 10
    assert pair.seller.tab.unpaid_nanos == pair.buyer.tab.unpaid_nanos == 0
    pair.check()


def test_the_log_arrives_in_order() -> None:
    pair = Pair().open()
    pair.order()
    pair.pump()
    pair.start()
    pair.print(b"hello ")
    pair.print(b"world")
    pair.deliver()
    pair.pump()
    text = b"".join(e.data for e in pair.buyer_did if isinstance(e, fx.LogArrived))
    assert text == b"hello world"
    assert pair.buyer.live == 0


def test_what_is_promised_is_kept_first() -> None:
    pair = Pair().open()
    pair.run_one()
    for did in (pair.buyer_did, pair.seller_did):
        for before, after in pairwise(did):
            if isinstance(before, fx.KeepGrant | fx.KeepCloses):
                assert isinstance(after, fx.Send)
    vouchers = [
        (before, after)
        for before, after in pairwise(pair.buyer_did)
        if isinstance(after, fx.Send) and types_of(after.data) == "voucher"
    ]
    assert vouchers
    assert all(isinstance(before, fx.KeepVoucher) for before, _ in vouchers)


def test_missing_inputs_and_plain_states_reach_the_buyer() -> None:
    pair = Pair().open()
    n = pair.order(inputs=(p.file("a", b"a"),))
    pair.pump()
    pair.by_seller(pair.seller.preparing(n, (p.digest_of("x"),), now=pair.now))
    pair.by_seller(pair.seller.state(n, "collecting", now=pair.now))
    pair.pump()
    events = [e.event for e in pair.buyer_did if isinstance(e, fx.OrderChanged)]
    assert [(event.state, event.missing) for event in events] == [
        ("preparing", (p.digest_of("x"),)),
        ("collecting", ()),
    ]


# --- money while it runs ---


def test_a_long_order_is_metered_and_vouchered_as_it_runs() -> None:
    pair = Pair().open()
    pair.order()
    pair.pump()
    pair.start()
    for _ in range(60):
        pair.pass_time(1000)
        pair.pump()
        assert pair.seller.tab.unpaid_nanos < pair.terms.exposure_nanos
        assert pair.gate_open
        pair.check()
    paid, _ = pair.stored()
    assert paid >= pricing.order_nanos(pair.terms, 54_000)
    pair.deliver()
    pair.pump()
    total = pricing.order_nanos(pair.terms, 60_000)
    assert pair.stored() == (total, total)


def test_the_gate_shuts_at_the_exposure_and_a_voucher_opens_it() -> None:
    pair = Pair().open()
    pair.order()
    pair.pump()
    pair.start()
    while pair.gate_open:
        pair.pass_time(1000)  # the meters are under way, no voucher comes back
    assert pair.seller.tab.unpaid_nanos >= pair.terms.exposure_nanos
    stopped_at = pair.wall_ms[1]
    pair.pass_time(5000)
    assert pair.wall_ms[1] == stopped_at
    pair.pump()
    assert pair.gate_open
    pair.by_seller(pair.seller.tick(now=pair.now + PAY_WAIT_S + 1))
    assert not pair.seller.machine.done
    pair.check()


def test_an_unpaid_session_ends_after_the_wait() -> None:
    pair = Pair().open()
    pair.order()
    pair.pump()
    pair.start()
    while pair.gate_open:
        pair.pass_time(1000)
    pair.by_seller(pair.seller.tick(now=pair.now + PAY_WAIT_S - 1))
    assert not pair.seller.machine.done
    pair.now += PAY_WAIT_S + 1
    pair.by_seller(pair.seller.tick(now=pair.now))
    assert pair.over()[1] == "unpaid"
    assert pair.seller.tick(now=pair.now) == []
    assert pair.seller.end("again") == []


def test_a_free_session_never_shuts_its_gate() -> None:
    terms = msgspec.structs.replace(
        p.TERMS, start_nanos=0, rate_nanos_per_s=0, exposure_nanos=0, cap_nanos=0
    )
    pair = Pair(terms).open()
    pair.run_one(ms=60_000)
    assert pair.gate_open
    assert pair.stored() == (0, 0)
    pair.by_buyer(pair.buyer.close())
    pair.pump()
    assert pair.over() == ("closed", "closed")


def test_the_cap_stops_the_running_order_and_refuses_the_next() -> None:
    terms = msgspec.structs.replace(p.TERMS, cap_nanos=10_200, exposure_nanos=4_000)
    pair = Pair(terms).open()
    pair.order()
    pair.pump()
    pair.start()
    for _ in range(10):
        pair.pass_time(1000)
        pair.pump()
    assert reasons(pair) == [("killed", "budget_exceeded")]
    assert pair.stored() == (10_100, 10_100)
    pair.order()
    pair.pump()
    assert pair.queue == [2], "the cap has room for one more start"
    pair.start()
    pair.deliver()
    pair.pump()
    assert pair.stored() == (10_200, 10_200)
    pair.order()
    pair.pump()
    assert reasons(pair)[1:] == [("error", "budget_exceeded")]
    pair.check()


def test_a_failed_order_without_a_meter_costs_nothing() -> None:
    pair = Pair().open()
    n = pair.order()
    pair.pump()
    pair.start()
    pair.pass_time(3000)
    pair.fail(n, "failed", "exit_nonzero")
    pair.pump()
    assert pair.stored() == (0, 0)
    assert reasons(pair) == [("failed", "exit_nonzero")]
    assert pair.buyer.live == 0
    assert pair.seller.tab.unpaid_nanos == 0
    pair.by_buyer(pair.buyer.close())
    pair.pump()
    assert pair.over() == ("closed", "closed")


def test_a_metered_order_that_fails_costs_only_what_was_vouchered() -> None:
    pair = Pair().open()
    n = pair.order()
    pair.pump()
    pair.start()
    for _ in range(12):
        pair.pass_time(1000)
        pair.pump()
    paid = pair.stored()
    pair.fail(n, "failed", "exit_nonzero")
    pair.pump()
    assert pair.stored() == paid
    assert pair.seller.tab.unpaid_nanos == pair.buyer.tab.unpaid_nanos == 0
    assert pair.seller.tab.due_nanos == pair.buyer.tab.due_nanos == pair.buyer.costs[n] == paid[0]


def test_the_next_order_after_a_failure_is_paid_in_full() -> None:
    pair = Pair().open()
    n = pair.order()
    pair.pump()
    pair.start()
    for _ in range(12):
        pair.pass_time(1000)
        pair.pump()
    pair.fail(n, "failed", "exit_nonzero")
    pair.pump()
    before, _ = pair.stored()
    pair.run_one(ms=700)
    cost = pricing.order_nanos(pair.terms, 700)
    assert pair.stored() == (before + cost, before + cost)
    assert pair.seller.tab.unpaid_nanos == 0


def test_a_rejected_delivery_is_not_paid() -> None:
    pair = Pair(accepts=False).open()
    n = pair.run_one()
    pair.by_buyer(pair.buyer.reject(n, "output_mismatch"))
    pair.pump()
    assert pair.stored() == (0, 0)
    assert pair.seller.orders_accepted == pair.buyer.orders_accepted == 0
    assert not pair.seller.awaits_answer(n)
    assert pair.seller.tab.unpaid_nanos == 0
    assert pair.buyer.reject(n, "again") == []


def test_a_rejected_order_costs_what_was_vouchered_while_it_ran() -> None:
    pair = Pair(accepts=False).open()
    pair.order()
    pair.pump()
    pair.start()
    for _ in range(12):
        pair.pass_time(1000)
        pair.pump()
    paid, _ = pair.stored()
    n = pair.deliver()
    pair.pump()
    pair.by_buyer(pair.buyer.reject(n, "output_mismatch"))
    pair.pump()
    assert pair.stored() == (paid, paid)
    assert pair.buyer.costs == {n: paid}
    assert pair.seller.tab.unpaid_nanos == 0


def test_a_rejection_does_not_set_the_two_tabs_apart() -> None:
    """The second order is accepted and paid before the first is rejected."""
    terms = msgspec.structs.replace(p.TERMS, exposure_nanos=6_000)
    pair = Pair(terms, accepts=False).open()
    for _ in range(8):
        first, second = pair.run_one(ms=1000), pair.run_one(ms=1000)
        pair.by_buyer(pair.buyer.accept(second, now=pair.now))
        pair.by_buyer(pair.buyer.reject(first, "output_mismatch"))
        pair.pump()
        assert pair.seller.tab.unpaid_nanos == pair.buyer.tab.unpaid_nanos == 0
        assert pair.gate_open
    total = 8 * pricing.order_nanos(terms, 1000)
    assert pair.stored() == (total, total)


def test_a_seller_that_never_delivers_is_paid_only_for_time() -> None:
    pair = Pair().open()
    pair.order()
    pair.pump()
    pair.start()
    for _ in range(20):
        pair.pass_time(1000)
        pair.pump()
    pair.by_buyer(pair.buyer.lost("seller_lost"))
    pair.check()
    assert pair.over()[0] == "seller_lost"
    assert pair.buyer.lost("again") == []


# --- what the seller declines ---


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"memory_bytes": 2 * limits.GIB}, "memory_short"),
        ({"disk_bytes": 2 * limits.GIB}, "disk_short"),
    ],
)
def test_an_order_beyond_the_resources_is_declined(changes: dict[str, int], reason: str) -> None:
    pair = Pair().open()
    pair.order(limits=msgspec.structs.replace(p.LIMITS, **changes))
    pair.pump()
    assert reasons(pair) == [("error", reason)]
    assert pair.run_one() == 2


def test_a_repeated_idempotency_key_is_not_run_twice() -> None:
    pair = Pair().open()
    key = p.id_of("job", "same")
    pair.order(key=key)
    pair.order(key=key)
    pair.pump()
    assert pair.queue == [1]
    assert reasons(pair) == [("error", "replayed")]


def test_the_queue_has_an_end() -> None:
    pair = Pair().open()
    for _ in range(limits.ORDERS_QUEUED_MAX + 2):
        pair.order()
    pair.pump()
    assert len(pair.queue) == limits.ORDERS_QUEUED_MAX
    assert reasons(pair) == [("error", "queue_full")] * 2


def test_no_order_is_taken_after_the_lease() -> None:
    pair = Pair().open()
    pair.now = float(pair.contract.agreement.ends_at)
    pair.order()
    pair.pump()
    assert reasons(pair) == [("error", "lease_ended")]
    pair.now += 1
    pair.by_seller(pair.seller.tick(now=pair.now))
    pair.pump()
    assert pair.over() == ("lease_ended", "lease_ended")
    assert of(pair.buyer_did, fx.KeepCloses)


def test_an_input_root_that_is_not_of_the_inputs_is_declined() -> None:
    pair = Pair().open()
    chain = pair.buyer._chain
    order = chain.sign(
        WorkOrder,
        n=1,
        job=p.id_of("job", "1"),
        image=p.digest_of("image"),
        command=("true",),
        inputs=(p.file("a"),),
        input_root=p.digest_of("other"),
        limits=p.LIMITS,
        idempotency_key=p.id_of("job", "1"),
    )
    pair.by_seller(pair.seller.receive(order.data, now=pair.now))
    event = codec.open_signed(pair.to_buyer[-1], JobEvent, network=p.NETWORK).message
    assert (event.state, event.reason) == ("error", "bad_input")


def test_more_output_names_than_a_delivery_carries_fail_the_order() -> None:
    """A guest chooses its file names; a thousand long ones do not fit and must not stop a node."""
    pair = Pair().open()
    pair.order()
    pair.pump()
    pair.start()
    outputs = tuple(
        p.file(f"{n:04d}/" + "x" * (limits.PATH_CHARS_MAX - 5))
        for n in range(limits.OUTPUT_FILES_MAX)
    )
    pair.deliver(outputs=outputs)
    pair.pump()
    assert reasons(pair) == [("killed", "killed_output")]
    assert pair.stored() == (0, 0)
    assert pair.run_one() == 2


def test_an_order_that_cannot_be_signed_uses_up_no_number() -> None:
    pair = Pair().open()
    with pytest.raises(ValueError, match="exceeds"):
        pair.order(command=("x" * limits.ARGUMENT_CHARS_MAX,) * 9)
    with pytest.raises(ValueError, match="breaks its own bounds"):
        pair.order(command=("x",) * (limits.ARGUMENTS_MAX + 1))
    assert pair.buyer.live == 0
    assert pair.run_one() == 1


# --- cancel and close ---


def test_a_cancelled_order_ends_and_costs_nothing() -> None:
    pair = Pair().open()
    first, second = pair.order(), pair.order()
    pair.pump()
    pair.start()
    for n in (first, second):
        pair.by_buyer(pair.buyer.cancel(n))
    pair.pump()
    assert reasons(pair) == [("killed", "cancelled")] * 2
    assert pair.stored() == (0, 0)
    assert pair.buyer.cancel(first) == []


def test_a_cancel_that_crosses_the_delivery_changes_nothing() -> None:
    pair = Pair().open()
    n = pair.order()
    pair.pump()
    pair.start()
    pair.deliver()
    pair.by_buyer(pair.buyer.cancel(n))
    pair.pump()
    assert pair.seller.orders_accepted == 1


def test_the_buyer_may_close_before_the_grant() -> None:
    pair = Pair()
    close = SendChain(
        p.BUYER_SESSION,
        network=p.NETWORK,
        session=pair.contract.agreement.session,
        root=pair.contract.hash,
    ).sign(Close, total_nanos=0, orders_accepted=0, reason="closed")
    pair.by_seller(pair.seller.receive(close.data, now=pair.now))
    assert pair.over()[1] == "closed"
    assert pair.seller.machine.state == "closed"


def test_the_seller_may_decline_before_it_is_ready() -> None:
    pair = Pair()
    pair.by_buyer(pair.buyer.open(pair.grant))
    assert pair.buyer.close() == []
    pair.by_seller(pair.seller.end("shutting_down"))
    pair.pump()
    assert pair.over() == ("shutting_down", "shutting_down")
    assert pair.stored() == (0, 0)


def test_the_seller_ends_an_open_session_and_both_sign_its_total() -> None:
    pair = Pair().open()
    pair.run_one()
    n = pair.order()
    pair.pump()
    pair.by_seller(pair.seller.end("shutting_down"))
    assert fx.StopOrder(n, "shutting_down") in pair.seller_did
    pair.pump()
    assert pair.over() == ("shutting_down", "shutting_down")
    assert of(pair.buyer_did, fx.KeepCloses)
    assert pair.buyer.close() == []
    with pytest.raises(LocalError):
        pair.order()


def test_both_close_at_once_and_nobody_is_blamed() -> None:
    pair = Pair(accepts=False).open()
    n = pair.run_one()
    pair.by_buyer(pair.buyer.accept(n, now=pair.now))  # acceptance and voucher are on the way
    pair.by_buyer(pair.buyer.close())
    pair.by_seller(pair.seller.end("lease_ended"))
    pair.pump()
    assert pair.over() == ("terms_changed", "lease_ended")
    assert pair.buyer.machine.done
    assert pair.seller.machine.state == "ended"


def test_closing_with_work_in_hand_stops_it_unpaid() -> None:
    pair = Pair(accepts=False).open()
    n = pair.run_one()
    pair.order()
    pair.pump()
    pair.start()
    pair.by_buyer(pair.buyer.close())
    pair.pass_time(100)
    pair.print(b"late")
    pair.deliver()
    assert pair.buyer.accept(n, now=pair.now) == []
    assert pair.buyer.reject(n, "late") == []
    pair.pump()
    assert pair.over() == ("closed", "closed")
    assert pair.stored() == (0, 0)


def test_a_seller_that_closes_with_another_total_gets_no_signature() -> None:
    for closing in (False, True):
        pair = Pair()
        chain = rogue_seller(pair)
        if closing:
            pair.by_buyer(pair.buyer.close())
        bad = chain.sign(Close, total_nanos=5, orders_accepted=0, reason="closed")
        pair.by_buyer(pair.buyer.receive(bad.data, now=pair.now))
        assert pair.over()[0] == ("terms_changed" if closing else "closed")
        assert not of(pair.buyer_did, fx.KeepCloses)


def test_a_buyer_that_closes_with_another_total_gets_no_signature() -> None:
    pair = Pair().open()
    bad = pair.buyer._chain.sign(Close, total_nanos=5, orders_accepted=0, reason="closed")
    pair.by_seller(pair.seller.receive(bad.data, now=pair.now))
    assert pair.over()[1] == "terms_changed"
    assert not of(pair.seller_did, fx.KeepCloses)


def test_what_is_said_after_the_end_is_ignored() -> None:
    pair = Pair().open()
    pair.order()
    pair.pump()
    pair.start()
    pair.seller._asked_nanos = 60
    pair.by_seller(pair.seller.end("shutting_down"))
    pair.order()
    pair.by_buyer(pair.buyer.cancel(1))
    late = pair.buyer._chain.sign(Voucher, total_nanos=50)
    pair.to_seller.append(late.data)
    stale = pair.buyer._chain.sign(Voucher, total_nanos=50)
    pair.to_seller.append(stale.data)
    pair.pump()  # the seller's close, then the failure of an order that it stopped
    assert pair.queue == []
    assert pair.over() == ("shutting_down", "shutting_down")
    # Money that crossed the end still counts; what comes after both have signed it does not.
    assert of(pair.seller_did, KeepVoucher) == [KeepVoucher(late.data, 50)]
    after = pair.buyer._chain.sign(Voucher, total_nanos=60)
    assert pair.seller.receive(after.data, now=pair.now) == []


# --- a hostile peer ---


def test_no_order_runs_without_a_valid_grant() -> None:
    for bad in (
        p.grant(p.contract(name="2")).data,
        p.grant(p.contract(), key=p.STRANGER).data,
        p.grant(p.contract(), cap_nanos=1).data,
        p.grant(p.contract(), not_after=p.NOW - 3600, issued_at=p.NOW - 7200).data,
        b"nonsense",
    ):
        pair = Pair()
        pair.by_buyer(pair.buyer.open(bad))
        with pytest.raises((RefusedError, EnvelopeError)):
            pair.pump()
        assert pair.seller.machine.state == "agreed"
        chain = pair.buyer._chain
        voucher = chain.sign(Voucher, total_nanos=50)
        with pytest.raises(ViolationError, match="grant_invalid"):
            pair.seller.receive(voucher.data, now=pair.now)


@pytest.mark.parametrize("kind", ["work_order", "acceptance", "voucher", "cancel"])
def test_nothing_is_taken_before_the_grant(kind: str) -> None:
    pair = Pair()
    message = first_word(kind, pair)
    with pytest.raises(ViolationError, match="grant_invalid"):
        pair.seller.receive(message, now=pair.now)
    assert pair.seller.machine.state == "agreed"


@pytest.mark.parametrize("kind", ["job_event", "log_chunk", "meter", "delivery"])
def test_nothing_is_believed_before_ready(kind: str) -> None:
    pair = Pair()
    pair.by_buyer(pair.buyer.open(pair.grant))
    with pytest.raises(ViolationError, match="out_of_sequence"):
        pair.buyer.receive(first_word(kind, pair), now=pair.now)


def test_opening_or_readying_twice_is_refused() -> None:
    pair = Pair().open()
    again = pair.buyer._chain.sign(SessionOpen, agreement_hash=pair.contract.hash, grant=pair.grant)
    with pytest.raises(ViolationError, match="replayed"):
        pair.seller.receive(again.data, now=pair.now)
    ready = pair.seller._chain.sign(SessionReady, agreement_hash=pair.contract.hash)
    with pytest.raises(ViolationError, match="replayed"):
        pair.buyer.receive(ready.data, now=pair.now)


def test_a_replayed_message_is_refused_by_both() -> None:
    pair = Pair().open()
    pair.run_one()
    for did, receive in (
        (pair.buyer_did, pair.seller.receive),
        (pair.seller_did, pair.buyer.receive),
    ):
        for sent in [effect for effect in did if isinstance(effect, fx.Send)]:
            with pytest.raises(ViolationError, match="replayed"):
                receive(sent.data, now=pair.now)


def test_a_dropped_message_is_noticed() -> None:
    pair = Pair().open()
    pair.order()
    pair.order()
    pair.to_seller.popleft()
    with pytest.raises(ViolationError, match="out_of_sequence"):
        pair.pump()


def test_reordered_messages_are_noticed() -> None:
    pair = Pair().open()
    pair.order()
    pair.order()
    pair.to_seller.reverse()
    with pytest.raises(ViolationError, match="out_of_sequence"):
        pair.pump()


def test_a_fork_is_noticed() -> None:
    """Two histories of one signer: the message that continues the other one has another past."""
    pair = Pair().open()
    fork = SendChain(
        p.BUYER_SESSION,
        network=p.NETWORK,
        session=pair.contract.agreement.session,
        root=pair.contract.hash,
    )
    fork.sign(Voucher, total_nanos=1)
    with pytest.raises(ViolationError, match="broken_chain"):
        pair.seller.receive(fork.sign(Voucher, total_nanos=50).data, now=pair.now)


def test_a_message_of_another_session_is_refused() -> None:
    pair = Pair()
    other = p.contract(name="2")
    chain = SendChain(
        p.BUYER_SESSION, network=p.NETWORK, session=other.agreement.session, root=other.hash
    )
    opening = chain.sign(SessionOpen, agreement_hash=other.hash, grant=p.grant(other).data)
    with pytest.raises(ViolationError, match="wrong_domain"):
        pair.seller.receive(opening.data, now=pair.now)


def test_a_message_of_another_key_network_or_kind_is_refused() -> None:
    pair = Pair().open()
    chain = chain_of_seller(pair, p.STRANGER)
    stranger = chain.sign(Meter, n=1, amount_nanos=1, usage=Usage())
    with pytest.raises(EnvelopeError, match="wrong_signer"):
        pair.buyer.receive(stranger.data, now=pair.now)
    own = pair.buyer._chain.sign(Voucher, total_nanos=1)
    with pytest.raises(EnvelopeError, match="wrong_type"):
        pair.buyer.receive(own.data, now=pair.now)
    foreign = SendChain(
        p.BUYER_SESSION,
        network="othernet",
        session=pair.contract.agreement.session,
        root=pair.contract.hash,
    ).sign(Voucher, total_nanos=1)
    with pytest.raises(EnvelopeError, match="bad_signature"):
        pair.seller.receive(foreign.data, now=pair.now)


def test_an_order_out_of_number_or_an_acceptance_of_nothing_is_refused() -> None:
    pair = Pair().open()
    accept = pair.buyer._chain.sign(Acceptance, n=1, accepted=True, total_nanos=0)
    with pytest.raises(ViolationError, match="was not delivered"):
        pair.seller.receive(accept.data, now=pair.now)
    pair = Pair().open()
    pair.buyer._orders_sent = 5
    pair.order()
    with pytest.raises(ViolationError, match="Order 1 is missing"):
        pair.pump()


def test_a_stale_or_excessive_voucher_is_refused() -> None:
    for totals, code in (((50, 50), "voucher_stale"), ((50, 49), "voucher_stale"), ((0,), "stale")):
        pair = Pair().open()
        pair.seller._asked_nanos = 50
        sent = [pair.buyer._chain.sign(Voucher, total_nanos=total).data for total in totals]
        with pytest.raises(ViolationError, match=code):
            hear(pair, pair.seller, sent)
    pair = Pair().open()
    pair.seller._asked_nanos = 2 * pair.terms.cap_nanos
    data = pair.buyer._chain.sign(Voucher, total_nanos=pair.terms.cap_nanos + 1).data
    with pytest.raises(ViolationError, match="over_cap"):
        pair.seller.receive(data, now=pair.now)
    assert pair.seller.tab.vouchered_nanos == 0


def test_an_overcharging_meter_or_delivery_is_refused() -> None:
    for kind in (Meter, Delivery):
        pair = Pair()
        chain = rogue_seller(pair)
        pair.order()
        say_running(pair, chain, 1)
        pair.now += 1  # a second at 2000 a second, and a start of 100
        meter = {"n": 1, "amount_nanos": 5000, "usage": Usage()}
        fields = meter if kind is Meter else delivery_fields(pair, 1, 5000)
        data = chain.sign(kind, **fields).data
        with pytest.raises(ViolationError, match="overcharged"):
            pair.buyer.receive(data, now=pair.now)
        assert pair.stored()[0] == 0


def test_orders_that_run_one_by_one_cannot_each_cost_all_the_time() -> None:
    """A full queue, each order billed for the whole wait: the sum is impossible, so is the bill."""
    for wait in (True, False):
        pair = Pair(accepts=not wait)
        chain = rogue_seller(pair)
        for _ in range(10):
            say_running(pair, chain, pair.order())
        pair.now += 10
        sent = [chain.sign(Delivery, **delivery_fields(pair, n, 20_100)).data for n in range(1, 11)]
        with pytest.raises(ViolationError, match="overcharged"):
            hear(pair, pair.buyer, sent)
        pair.check()


def test_an_amount_above_the_cap_is_refused() -> None:
    pair = Pair(msgspec.structs.replace(p.TERMS, cap_nanos=1000))
    chain = rogue_seller(pair)
    pair.order()
    say_running(pair, chain, 1)
    pair.now += 10
    data = chain.sign(Meter, n=1, amount_nanos=1001, usage=Usage()).data
    with pytest.raises(ViolationError, match="over_cap"):
        pair.buyer.receive(data, now=pair.now)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"output_root": p.digest_of("x")}, "output_mismatch"),
        ({"exit_status": 1}, "output_mismatch"),
        ({"stdout": p.file("stdout", b"unsent")}, "output_mismatch"),
        ({"stderr": p.file("stderr", b"unsent")}, "output_mismatch"),
    ],
)
def test_a_delivery_that_contradicts_itself_is_refused(changes: dict[str, Any], code: str) -> None:
    pair = Pair()
    chain = rogue_seller(pair)
    pair.order()
    say_running(pair, chain, 1)
    data = chain.sign(Delivery, **(delivery_fields(pair, 1, 0) | changes)).data
    with pytest.raises(ViolationError, match=code):
        pair.buyer.receive(data, now=pair.now)


def test_a_second_delivery_and_too_much_output_are_refused() -> None:
    pair = Pair(accepts=False)
    chain = rogue_seller(pair)
    say_running(pair, chain, pair.order())
    for expected in ("", "replayed"):
        data = chain.sign(Delivery, **delivery_fields(pair, 1, 0)).data
        if expected:
            with pytest.raises(ViolationError, match=expected):
                pair.buyer.receive(data, now=pair.now)
        else:
            pair.buyer.receive(data, now=pair.now)
    pair = Pair()
    chain = rogue_seller(pair)
    say_running(pair, chain, pair.order())
    big = msgspec.structs.replace(p.file("a"), size_bytes=p.LIMITS.disk_bytes + 1)
    fields = delivery_fields(pair, 1, 0) | {
        "outputs": (big,),
        "output_root": merkle.files_root((big,)),
    }
    with pytest.raises(ViolationError, match="oversize"):
        pair.buyer.receive(chain.sign(Delivery, **fields).data, now=pair.now)


def test_a_log_with_a_hole_or_without_end_is_refused() -> None:
    pair = Pair()
    chain = rogue_seller(pair)
    pair.order()
    hole = chain.sign(LogChunk, n=1, stream="stdout", offset=1, data=b"x")
    with pytest.raises(ViolationError, match="missing"):
        pair.buyer.receive(hole.data, now=pair.now)
    pair = Pair()
    chain = rogue_seller(pair)
    pair.order()
    step = limits.LOG_CHUNK_BYTES_MAX
    sent = [
        chain.sign(LogChunk, n=1, stream="stderr", offset=part * step, data=bytes(step)).data
        for part in range(3)
    ]
    with pytest.raises(ViolationError, match="oversize"):
        hear(pair, pair.buyer, sent)


def test_words_about_orders_that_do_not_exist_are_ignored() -> None:
    pair = Pair()
    chain = rogue_seller(pair)
    spoken: list[tuple[type[SessionMessage], dict[str, Any]]] = [
        (JobEvent, pair.about(9) | {"state": "failed", "at": p.NOW}),
        (LogChunk, {"n": 9, "stream": "stdout", "offset": 0, "data": b"x"}),
        (Meter, {"n": 9, "amount_nanos": 10**9, "usage": Usage()}),
        (Delivery, delivery_fields(pair, 9, 10**9)),
    ]
    for kind, fields in spoken:
        assert pair.buyer.receive(chain.sign(kind, **fields).data, now=pair.now) == []


def test_a_seller_that_takes_a_delivery_back_leaves_nothing_to_accept() -> None:
    """The outputs are still being fetched when the seller says that the order failed."""
    pair = Pair(accepts=False)
    chain = rogue_seller(pair)
    n = pair.order()
    say_running(pair, chain, n)
    pair.buyer.receive(chain.sign(Delivery, **delivery_fields(pair, n, 0)).data, now=pair.now)
    event = chain.sign(JobEvent, **pair.about(n), state="error", reason="platform_error", at=p.NOW)
    pair.buyer.receive(event.data, now=pair.now)
    assert pair.buyer.accept(n, now=pair.now) == []
    assert pair.buyer.reject(n, "output_mismatch") == []
    assert pair.buyer.live == 0


def test_accepting_what_was_not_delivered_is_our_bug() -> None:
    pair = Pair().open()
    n = pair.order()
    with pytest.raises(AssertionError):
        pair.buyer.accept(n, now=pair.now)
    assert pair.buyer.live == 1


def test_session_messages_are_the_chained_ones() -> None:
    chained = {name for name, kind in MESSAGES.items() if issubclass(kind, SessionMessage)}
    named = {"session_open", "work_order", "acceptance", "voucher", "cancel", "close"}
    named |= {"session_ready", "job_event", "log_chunk", "meter", "delivery"}
    assert chained == named


# --- time, and work given away ---


def test_nothing_is_paid_for_an_order_that_was_never_said_to_run() -> None:
    pair = Pair()
    chain = rogue_seller(pair)
    pair.order()
    pair.now += 100
    meter = chain.sign(Meter, n=1, amount_nanos=100, usage=Usage())
    with pytest.raises(ViolationError, match="out_of_sequence"):
        pair.buyer.receive(meter.data, now=pair.now)
    assert pair.stored()[0] == 0


def test_an_order_costs_no_more_than_its_own_time_limit() -> None:
    pair = Pair()
    chain = rogue_seller(pair)
    say_running(pair, chain, pair.order())
    pair.now += 10 * p.LIMITS.wall_s
    amount = pair.terms.start_nanos + pair.terms.rate_nanos_per_s * 2 * p.LIMITS.wall_s
    meter = chain.sign(Meter, n=1, amount_nanos=amount, usage=Usage())
    with pytest.raises(ViolationError, match="overcharged"):
        pair.buyer.receive(meter.data, now=pair.now)


def test_a_silent_seller_is_given_up_and_a_busy_one_is_not() -> None:
    pair = Pair().open()
    pair.order()
    pair.pump()
    for _ in range(SILENCE_S):  # preparing for long, and saying so
        pair.now += KEEPALIVE_S
        pair.by_seller(pair.seller.tick(now=pair.now))
        pair.pump()
        assert pair.buyer.tick(now=pair.now) == []
    pair.now += SILENCE_S + 1
    pair.by_buyer(pair.buyer.tick(now=pair.now))
    assert pair.over()[0] == "timeout"


def test_a_seller_that_only_says_it_lives_is_given_up_in_the_end() -> None:
    pair = Pair().open()
    pair.order()
    pair.pump()
    limit = pair.now + 2 * IMAGE_S_MAX + PREPARE_S_MAX + p.LIMITS.wall_s + PAY_WAIT_S + CLOCK_SKEW_S
    while pair.now <= limit:
        assert pair.buyer.tick(now=pair.now) == []
        pair.now += KEEPALIVE_S
        pair.by_seller(pair.seller.tick(now=pair.now))
        pair.pump()
    pair.by_buyer(pair.buyer.tick(now=pair.now))
    assert pair.buyer.machine.done  # at the latest with its lease


def test_a_session_without_orders_gives_its_capacity_back() -> None:
    pair = Pair().open()
    pair.now += IDLE_S_MAX + 1
    pair.by_seller(pair.seller.tick(now=pair.now))
    pair.pump()
    assert pair.over() == ("idle", "idle")


def test_work_given_away_is_bounded_by_the_exposure() -> None:
    """A buyer that rejects every delivery, or whose every job fails, is not served for ever."""
    for rejects in (True, False):
        pair = Pair(accepts=False).open()
        given = 0
        for _ in range(1000):
            if pair.seller.machine.done:
                break
            n = pair.order()
            pair.pump()
            pair.start()
            pair.pass_time(500)
            given += pair.terms.start_nanos
            if rejects:
                pair.deliver()
                pair.pump()
                pair.by_buyer(pair.buyer.reject(n, "output_mismatch"))
            else:
                pair.fail(n, "failed", "exit_nonzero")
            pair.pump()
        assert pair.seller.machine.done
        assert pair.over()[1] == "unpaid"
        assert given <= 2 * pair.terms.exposure_nanos


def test_an_order_stops_at_its_own_cost_limit() -> None:
    pair = Pair().open()
    limits = msgspec.structs.replace(p.LIMITS, cost_nanos=pair.terms.start_nanos + 1)
    n = pair.order(limits=limits)
    pair.pump()
    pair.start()
    pair.pass_time(1000)
    assert StopOrder(n, "budget_exceeded") in pair.seller_did
