"""What a side shows of a session that left more than it may show."""

from __future__ import annotations

import pytest

from lumaris_protocol import codec, pleading
from lumaris_protocol.errors import RefusedError
from lumaris_protocol.limits import EVIDENCE_BUNDLES_MAX, EVIDENCE_DOCUMENTS_MAX, KIB
from lumaris_protocol.messages.dispute import DisputeEvidence
from lumaris_protocol.messages.execution import Acceptance, Delivery, JobEvent, WorkOrder
from lumaris_protocol.pleading import Room
from lumaris_protocol.rulings import Dossier
from tests.dispute_builders import Work
from tests.protocol import parties as p
from tests.protocol.cases import PRICE, work

MANY = 200


def _session(made: Work) -> list[bytes]:
    """Orders of a long session with all that was said of them, its last word 20 orders ago."""
    kept = []
    for n in range(1, MANY + 1):
        kept += [made.order(n), made.event(n, state="running"), made.delivery(n)]
        if n <= MANY - 20:
            kept += [made.word(n, accepted=True, total_nanos=n * PRICE), made.voucher(n * PRICE)]
    return [*kept, made.close(MANY * PRICE), made.close(MANY * PRICE, by=p.SELLER_SESSION)]


def _opened(made: Work, shown: tuple[bytes, ...]) -> Dossier:
    dossier = Dossier(made.contract, network=p.NETWORK)
    dossier.add(shown, party=p.BUYER.peer_id)
    return dossier


def test_a_long_session_fits_and_its_worth_is_shown_whole() -> None:
    made = work()
    kept = _session(made)
    shown = pleading.choose(kept, order=3)
    assert len(shown) == EVIDENCE_DOCUMENTS_MAX
    assert [data for data in kept if data in set(shown)] == list(shown), "in the order of the end"
    session = _opened(made, shown).main
    messages = [signed.message for signed in session.documents]
    assert {type(one) for one in messages if getattr(one, "n", 0) == 3} == {
        WorkOrder,
        Delivery,
        Acceptance,
    }
    assert max(one.total_nanos for one in messages if isinstance(one, Acceptance)) == PRICE * (
        MANY - 20
    )
    assert not any(isinstance(one, JobEvent) for one in messages), "progress decides nothing"
    # The last word stands for all before it, and the newest orders for those after it.
    paid = MANY * PRICE
    assert pleading.asked(session, "not_delivered", order=0, paid_nanos=paid) == 0
    assert pleading.asked(session, "not_delivered", order=0, paid_nanos=paid + 7) == 7
    assert pleading.asked(session, "wrong_result", order=3, paid_nanos=paid) == PRICE
    assert pleading.asked(session, "wrong_result", order=4, paid_nanos=paid) == 0


def test_a_contradiction_comes_first() -> None:
    made = work()
    kept = [*_session(made), made.delivery(5, output="other")]
    shown = pleading.choose(kept, room=Room(documents=2))
    messages = [signed.message for signed in _opened(made, shown).main.documents]
    assert [(type(one), getattr(one, "n", 0)) for one in messages] == [(Delivery, 5)] * 2


def test_what_is_no_evidence_is_left_out() -> None:
    made = work()
    order = made.order()
    kept = [b"", b"{}", b"\xff" * 100, made.contract.by_buyer, order, order]
    assert pleading.choose(kept) == (order,)
    assert pleading.shows_another_run(kept)
    assert not pleading.shows_another_run([b"", order])
    assert pleading.only([b"x", order, made.order(2), made.cancel()], 1) == (order,)


def test_one_order_alone_is_what_a_checker_shows() -> None:
    made = work()
    first = [made.order(), made.event(state="running"), made.event(), made.delivery()]
    second = [made.order(2), made.event(2), made.delivery(2), made.word(2, accepted=True)]
    assert pleading.only([*first, *second], 1) == (first[0], first[2], first[3])


def test_room_is_left_beside_what_was_shown() -> None:
    made = work()
    kept = _session(made)
    before = pleading.choose(kept, room=pleading.first_bundle_room())
    fresh = [data for data in kept if data not in set(before)]
    room = Room().less(before)
    after = pleading.choose(fresh, room=room)
    assert EVIDENCE_DOCUMENTS_MAX - 2 <= len(before) + len(after) <= EVIDENCE_DOCUMENTS_MAX
    _opened(made, (*before, *after))
    assert Room().less(kept).documents == 0
    assert pleading.choose(kept, room=Room(0, 0)) == ()


def test_bundles_are_numbered_and_only_the_last_says_done() -> None:
    made = work()
    large = [b"x" * (100 * KIB)] * 5
    signed = pleading.bundles(
        p.id_of("dispute", "1"),
        made.contract.hash,
        p.BUYER,
        large,
        n=2,
        done=True,
        network=p.NETWORK,
        now=p.NOW,
    )
    opened = [codec.open_signed(one, DisputeEvidence, network=p.NETWORK).message for one in signed]
    assert [(one.n, len(one.evidence), one.done) for one in opened] == [
        (2, 2, False),
        (3, 2, False),
        (4, 1, True),
    ]
    with pytest.raises(RefusedError) as full:
        pleading.bundles(
            p.id_of("dispute", "1"),
            made.contract.hash,
            p.BUYER,
            (),
            n=EVIDENCE_BUNDLES_MAX,
            done=True,
            network=p.NETWORK,
            now=p.NOW,
        )
    assert full.value.code == "oversize"
