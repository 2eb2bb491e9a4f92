"""What a side shows of a session whose other side said the same again and again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lumaris_protocol import envelope, pleading
from lumaris_protocol.limits import EVIDENCE_DOCUMENTS_MAX
from lumaris_protocol.messages.execution import Acceptance, Cancel, JobEvent, WorkOrder
from lumaris_protocol.messages.payment import Close
from tests.dispute_builders import Work
from tests.protocol import parties as p
from tests.protocol.cases import PRICE, ruled, work

MANY = EVIDENCE_DOCUMENTS_MAX + 6
PAID = 100 * PRICE


def _cancels(made: Work) -> list[bytes]:
    return [made.cancel() for _ in range(MANY)]


def _strays(made: Work) -> list[bytes]:
    return [made.event(n) for n in range(2, MANY)] + [made.cancel(n) for n in range(2, MANY)]


def _words(made: Work) -> list[bytes]:
    return [made.word(accepted=number % 2 == 0) for number in range(MANY)]


def _orders(made: Work) -> list[bytes]:
    return [made.order(command=f"other {number}") for number in range(MANY)]


def _closes(made: Work) -> list[bytes]:
    return [made.close(0, reason="idle") for _ in range(MANY)]


@pytest.mark.parametrize("flood", [_cancels, _strays, _words, _orders, _closes])
def test_a_buyer_that_repeats_itself_hides_no_order(flood: Callable[[Work], list[bytes]]) -> None:
    """Groups too large for the room were skipped, and with them the papers of the order."""
    made = work()
    own = [made.order(), made.delivery()]
    closes = [made.close(PRICE), made.close(PRICE, by=p.SELLER_SESSION)]
    shown = pleading.choose([*own, *flood(made), *closes])
    assert set(own) <= set(shown)
    assert set(closes) <= set(shown) or flood is _orders
    assert len(shown) <= 10 or flood is _strays
    found = ruled(made, "not_delivered", seller=shown, paid_nanos=PRICE)
    assert (found.fault, found.refund_nanos) == ("buyer", 0)


def test_a_seller_that_repeats_an_end_hides_no_order() -> None:
    made = work()
    order = made.order()
    said = [made.event(detail=str(number)) for number in range(MANY)]
    late = made.delivery()
    for documents in ((order, *said, late), (order, late, *said)):
        shown = pleading.choose(documents, order=1, room=pleading.first_bundle_room())
        assert order in shown
        assert len(shown) <= 6
        only = pleading.only(documents, 1)
        assert only == tuple(data for data in documents if data in (order, said[0], late))


def test_the_end_of_the_order_that_was_run_is_shown() -> None:
    made = work()
    run = made.order()
    other, foreign = made.order(command="other"), made.event(order_hash=p.digest_of("none"))
    end = made.event(state="killed", reason="killed_memory")
    assert pleading.only([other, foreign, run, end], 1) == (run, end)
    assert pleading.only([other], 1) == (other,)


def test_each_side_is_held_to_one_of_its_ends() -> None:
    made = work()
    voucher = made.voucher(PAID)
    by_buyer = [made.close(3), made.close(9), made.close(50, reason="idle")]
    by_seller = [made.close(total, by=p.SELLER_SESSION) for total in (8, 2, 7)]
    shown = pleading.choose([voucher, *by_buyer, *by_seller])
    assert shown == (voucher, by_buyer[1], by_seller[1])
    types = [envelope.type_of(data) for data in shown]
    assert types.count(Close.TYPE) == 2


def test_one_contradiction_of_a_kind_is_enough() -> None:
    made = work()
    orders = [made.order(n) for n in range(1, MANY)]
    again = [made.order(n, command="again") for n in range(1, MANY)]
    shown = pleading.choose([*orders, *again], room=pleading.Room(documents=3))
    assert shown[:1] == (orders[0],)
    assert again[0] in shown
    kinds = {envelope.type_of(data) for data in shown}
    assert kinds == {WorkOrder.TYPE}
    assert not kinds & {Cancel.TYPE, Acceptance.TYPE, JobEvent.TYPE}
