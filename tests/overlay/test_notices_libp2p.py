"""Notices between real hosts: kept over restarts, refused at the handshake, safe from nonsense."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from lumaris_overlay.libp2p.host import Libp2pOverlay, open_host
from lumaris_protocol import frames
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import NOTICE_ASKS_BURST_PER_PEER
from lumaris_protocol.protocols import NOTICES
from tests.overlay.hosts import member
from tests.overlay.notice_documents import ROOTS, keys, next_notice, revocations
from tests.overlay.world import advert, certificate, key_of, until

pytestmark = pytest.mark.slow

EMPTY = frames.encode(Kind.HEADER, b"{}")
END = frames.encode(Kind.END)


async def addresses_of(host: Libp2pOverlay) -> tuple[str, ...]:
    return (await host.reachability()).addresses


async def ask(host: Libp2pOverlay, peer: str, data: bytes) -> bytes:
    """What a member answers to these bytes; b"" when it breaks the stream."""
    answer = b""
    with trio.fail_after(10):
        stream = await host.open_stream(peer, NOTICES)
        try:
            await stream.send_all(data)
            async for part in stream:
                answer += part
        except trio.BrokenResourceError:
            return b""
        finally:
            await stream.aclose()
    return answer


async def test_revocations_hold_over_a_restart(tmp_path: Path):
    bad = key_of("bad")
    data = revocations(bad.peer_id, at=time.time() + 60)
    async with open_host(member("one", state_dir=tmp_path)) as one:
        await one.publish_notice(data)
    async with (
        open_host(member("one", state_dir=tmp_path)) as one,
        open_host(member(bad)) as other,
        one.notices() as notices,
    ):
        await next_notice(notices, data)
        assert await one.connect(await addresses_of(other)) == 0
        assert not await one.peers()


async def test_one_revoked_certificate_leaves_room_for_the_next():
    one, two = key_of("one"), key_of("two")
    async with open_host(member(one)) as a, open_host(member(two)) as b:
        assert await b.connect(await addresses_of(a)) == 1
        await until(lambda: a.admission.admitted(two.peer_id))
        # The certificates of these tests have serial 1.
        await a.publish_notice(revocations(two.peer_id, serial=1))
        await until(lambda: not a.connections.live())
        assert not a.admission.admitted(two.peer_id)
        assert not a.admission.refused(two.peer_id)  # it may come back with another one


async def test_a_certificate_from_after_the_revocation_is_let_in():
    bad, now = key_of("bad"), time.time()
    async with open_host(member("one")) as one:
        await one.publish_notice(revocations(bad.peer_id, at=now - 10))
        fresh = certificate(bad.peer_id, now=now)
        async with open_host(member(bad, certificate=fresh)) as other:
            assert await other.connect(await addresses_of(one)) == 1
            await until(lambda: one.admission.admitted(bad.peer_id))


NONSENSE = (
    b"\xff\xff\xff\xff",
    frames.encode(Kind.HEADER, b"[" * 1000),
    frames.encode(Kind.HEADER, b'{"have":["AA=="]}'),
    frames.encode(Kind.HEADER, b'{"have":[],"more":1}'),
    EMPTY + frames.encode(Kind.DATA, b"x"),
    EMPTY + frames.encode(Kind.ENVELOPE, b"x") * 6 + END,
    EMPTY + frames.encode(Kind.ENVELOPE, b"x" * 30_000) + END,
)


async def test_nonsense_is_refused_and_the_host_goes_on():
    async with open_host(member("one")) as one, open_host(member("two")) as two:
        await one.publish_notice(revocations(key_of("x").peer_id))
        assert await two.connect(await addresses_of(one)) == 1
        for number, data in enumerate(NONSENSE):
            assert await ask(two, one.peer_id, data) == b"", number
        assert (await ask(two, one.peer_id, EMPTY + END)).endswith(END)


async def test_bad_documents_are_counted_and_strangers_words_are_not():
    async with open_host(member("one")) as one, open_host(member("two")) as two:
        faults: list[str] = []
        one.notice_board._fault = lambda peer, kind, detail: faults.append(kind)
        assert await two.connect(await addresses_of(one)) == 1
        foreign = revocations(signer=key_of("another coordinator"))
        wrong = advert(key_of("two"))
        for data in (foreign, wrong):
            await ask(two, one.peer_id, EMPTY + frames.encode(Kind.ENVELOPE, data) + END)
        assert faults == ["wrong_type"]
        assert not one.notice_board.board.documents()


async def test_who_asks_too_often_gets_no_answer():
    async with open_host(member("one")) as one, open_host(member("two")) as two:
        assert await two.connect(await addresses_of(one)) == 1
        answers = [
            await ask(two, one.peer_id, EMPTY + END) for _ in range(NOTICE_ASKS_BURST_PER_PEER + 1)
        ]
        assert answers[0] == END
        assert answers[-1] == b""


async def test_key_lists_of_a_known_root_travel(tmp_path: Path):
    settings = {"roots": ROOTS}
    async with open_host(member("one", **settings)) as one:
        first, second = keys(1), keys(2)
        await one.publish_notice(first)
        await one.publish_notice(second)
        async with open_host(member("two", **settings)) as two, two.notices() as notices:
            await two.connect(await addresses_of(one))
            await next_notice(notices, second)
            assert two.notice_board.board.documents() == (second,)
