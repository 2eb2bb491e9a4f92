"""Which notices a peer keeps, and whom it refuses by them."""

from __future__ import annotations

import pytest

from lumaris_overlay.directory import Directory
from lumaris_overlay.notices import NoticeBoard, NoticeGate, revoked_in
from lumaris_overlay.simulated import open_network
from lumaris_overlay.validate import AdvertGate, MembershipGate
from lumaris_protocol import codec
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.limits import NOTICES_KEPT_MAX, REVOCATIONS_REMEMBERED_MAX
from lumaris_protocol.messages.notice import Revocations, Revoked
from lumaris_protocol.revocations import REMEMBERED_S, RevokedSet
from tests.overlay.notice_documents import ROOT, ROOTS, keys, next_notice, revocations
from tests.overlay.world import COORDINATOR, KEYS, NETWORK, advert, certificate, key_of, next_of

NOW = 1_800_000_000
PEER = key_of("one").peer_id


def board() -> NoticeBoard:
    return NoticeBoard(NoticeGate(NETWORK, KEYS, ROOTS))


def code_of(data: bytes, now: float = NOW) -> str:
    with pytest.raises(EnvelopeError) as caught:
        board().offer(data, now)
    return caught.value.code


def test_newest_of_each_type_is_kept():
    found = board()
    first, second = keys(1, now=NOW), keys(2, now=NOW)
    assert found.offer(second, NOW) is not None
    assert found.offer(first, NOW) is None  # it came late
    assert found.offer(second, NOW) is None
    said = found.offer(revocations(PEER, now=NOW), NOW)
    assert said is not None
    assert (said.kind, said.signer, said.seq) == ("revocations", COORDINATOR.peer_id, 1)
    assert [notice.kind for notice in found.notices()] == ["key_list", "revocations"]


def test_a_second_word_under_one_number_is_seen_and_a_third_is_not():
    found = board()
    assert found.offer(keys(1, name="a", now=NOW), NOW)
    assert found.offer(keys(1, name="b", now=NOW), NOW)
    assert found.offer(keys(1, name="c", now=NOW), NOW) is None
    assert found.offer(keys(2, now=NOW), NOW)
    assert len(found.notices()) == 1


def test_what_no_honest_peer_accepts():
    assert code_of(revocations(PEER, signer=key_of("other"), now=NOW)) == "wrong_signer"
    assert code_of(keys(root=key_of("other"), now=NOW)) == "wrong_signer"
    assert code_of(revocations(PEER, now=NOW + 61)) == "not_yet_valid"
    assert code_of(revocations(PEER, now=NOW - REMEMBERED_S - 1)) == "expired"
    assert code_of(advert(key_of("one"), now=NOW)) == "wrong_type"
    assert code_of(b"x" * 30_000) == "oversize"
    good = revocations(PEER, now=NOW)
    assert code_of(good[:-1] + bytes((good[-1] ^ 1,))) == "bad_signature"
    foreign = codec.sign(
        Revocations(coordinator=COORDINATOR.peer_id, after=0, seq=1, revoked=(), issued_at=NOW),
        COORDINATOR,
        "another",
    )
    assert code_of(foreign.data) == "bad_signature"


def test_a_key_list_of_the_coordinator_itself_is_no_list():
    assert code_of(keys(root=COORDINATOR, now=NOW)) == "wrong_signer"


def test_the_board_is_bounded_and_keeps_the_newest_links_and_the_keys():
    found = board()
    found.offer(keys(now=NOW), NOW)
    for seq in range(1, NOTICES_KEPT_MAX + 20):
        found.offer(revocations(key_of(f"p{seq}").peer_id, seq=seq, now=NOW), NOW)
    kept = found.notices()
    assert len(kept) == NOTICES_KEPT_MAX
    assert kept[0].kind == "key_list"
    assert kept[-1].seq == NOTICES_KEPT_MAX + 19
    assert found.revoked.names(key_of("p1").peer_id)  # what it said still holds


def test_what_is_too_old_to_matter_goes():
    found = board()
    found.offer(revocations(PEER, now=NOW), NOW)
    found.offer(keys(now=NOW + REMEMBERED_S + 1), NOW + REMEMBERED_S + 1)
    assert [notice.kind for notice in found.notices()] == ["key_list"]


def test_one_certificate_or_all_of_a_peer():
    found = RevokedSet()
    message = Revocations(
        coordinator=COORDINATOR.peer_id,
        after=0,
        seq=2,
        revoked=(
            Revoked(peer=PEER, serial=0, at=NOW, reason=""),
            Revoked(peer=ROOT.peer_id, serial=7, at=NOW, reason=""),
        ),
        issued_at=NOW,
    )
    assert found.add(message, NOW) == {PEER, ROOT.peer_id}
    assert found.add(message, NOW) == frozenset()
    assert found.covers(PEER, serial=3, issued_at=NOW)
    assert not found.covers(PEER, serial=4, issued_at=NOW + 1)  # vouched for again
    assert found.names(PEER)
    assert found.covers(ROOT.peer_id, serial=7, issued_at=NOW + 5)
    assert not found.covers(ROOT.peer_id, serial=8, issued_at=NOW - 5)
    assert not found.names(ROOT.peer_id)
    assert found.known(COORDINATOR.peer_id) == 2


def test_a_gap_is_not_taken_for_known():
    found = RevokedSet()

    def add(after: int, seq: int) -> None:
        found.add(
            Revocations(
                coordinator=COORDINATOR.peer_id,
                after=after,
                seq=seq,
                revoked=(Revoked(peer=key_of(str(seq)).peer_id, serial=0, at=NOW, reason=""),),
                issued_at=NOW,
            ),
            NOW,
        )

    add(4, 5)
    assert (found.known(COORDINATOR.peer_id), len(found)) == (0, 1)
    add(0, 4)
    add(4, 5)
    assert found.known(COORDINATOR.peer_id) == 5


def test_the_set_forgets_and_is_bounded(monkeypatch: pytest.MonkeyPatch):
    assert REVOCATIONS_REMEMBERED_MAX >= 10_000
    monkeypatch.setattr("lumaris_protocol.revocations.REVOCATIONS_REMEMBERED_MAX", 3)
    found = RevokedSet()
    for number in range(5):
        message = Revocations(
            coordinator=COORDINATOR.peer_id,
            after=number,
            seq=number + 1,
            revoked=(Revoked(peer=key_of(str(number)).peer_id, serial=0, at=NOW, reason=""),),
            issued_at=NOW,
        )
        found.add(message, NOW)
    assert len(found) == 3
    found.add(
        Revocations(coordinator=COORDINATOR.peer_id, after=5, seq=5, revoked=(), issued_at=NOW),
        NOW + REMEMBERED_S + 1,
    )
    assert len(found) == 0


def test_revoked_adverts_leave_the_directory_and_do_not_come_back():
    found, key = board(), key_of("one")
    directory = Directory(AdvertGate(NETWORK, KEYS, found.revoked))
    data, other = advert(key, now=NOW), advert(key_of("two"), now=NOW)
    directory.offer(data, NOW)
    directory.offer(other, NOW)
    notice = found.offer(revocations(key.peer_id, now=NOW), NOW)
    assert notice is not None
    gone = directory.revoke(revoked_in(notice), NOW)
    assert [(event.seller, event.envelope) for event in gone] == [(key.peer_id, None)]
    assert directory.page("", 10)[0] == [other]
    with pytest.raises(EnvelopeError) as caught:
        directory.offer(advert(key, 2, now=NOW), NOW)
    assert caught.value.code == "revoked"


def test_a_revoked_certificate_is_refused_and_a_later_one_is_not():
    found = board()
    gate = MembershipGate(NETWORK, KEYS, found.revoked)
    before, later = certificate(PEER, now=NOW), certificate(PEER, now=NOW + 1)
    gate.check(before, PEER, NOW)
    found.offer(revocations(PEER, now=NOW), NOW)
    with pytest.raises(EnvelopeError) as caught:
        gate.check(before, PEER, NOW)
    assert caught.value.code == "revoked"
    gate.check(later, PEER, NOW + 1)


async def test_two_parts_that_meet_tell_each_other():
    names = ("a", "b", "c", "d")
    async with open_network(NETWORK, KEYS, roots=ROOTS) as network:
        a, b, c, d = (network.host(key_of(name)) for name in names)
        await a.connect([b.address])
        await c.connect([d.address])
        listed, revoked = keys(), revocations(key_of("e").peer_id)
        await a.publish_notice(listed)
        await d.publish_notice(revoked)
        async with a.notices() as at_a, d.notices() as at_d:
            await b.connect([c.address])
            await next_notice(at_a, revoked)
            await next_notice(at_d, listed)


async def test_a_revoked_seller_is_cut_off_everywhere():
    names = ("a", "b", "c")
    async with open_network(NETWORK, KEYS) as network:
        a, b, c = (network.host(key_of(name)) for name in names)
        await a.connect([b.address])
        await b.connect([c.address])
        async with a.adverts() as events:
            await c.publish_advert(advert(key_of("c")))
            assert (await next_of(events, c.peer_id)).envelope
            await a.publish_notice(revocations(c.peer_id))
            assert (await next_of(events, c.peer_id)).envelope is None
        assert [info.peer for info in await b.peers()] == [a.peer_id]
        assert await c.connect([a.address]) == 0
