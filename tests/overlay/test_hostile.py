"""What peers may do to a real host: it lives, believes nothing and forgets nothing.

The attackers are certified: whoever is not gets no further than `test_admission.py` shows.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

import msgspec
import pytest
import trio
from libp2p.utils.varint import encode_varint_prefixed

from lumaris_overlay.libp2p import index
from lumaris_overlay.libp2p.host import open_host
from lumaris_protocol import frames
from lumaris_protocol.errors import RemoteError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import (
    BAD_ADVERTS_BURST_PER_PEER,
)
from lumaris_protocol.protocols import HELLO
from tests.overlay.attackers import (
    STRANGER,
    forgeries,
    raw_stream,
    works,
)
from tests.overlay.hosts import member
from tests.overlay.world import advert, certificate, key_of, next_of, read_all, until

pytestmark = pytest.mark.slow


async def test_random_bytes_on_the_port(pair):
    honest, stranger = pair
    port = int((await honest.reachability()).addresses[0].split("/")[4])
    for data in (b"", os.urandom(2000), b"\x13/multistream/1.0.0\n\x07/noise\n" + os.urandom(500)):
        async with await trio.open_tcp_stream("127.0.0.1", port) as raw:
            with trio.move_on_after(0.2), suppress(trio.BrokenResourceError):
                await raw.send_all(data)
                await raw.send_eof()
                while await raw.receive_some():
                    pass
    await works(honest, stranger)


@pytest.mark.parametrize("number", range(9))
async def test_forged_advert_over_the_index(pair, number):
    honest, stranger = pair
    stream = await stranger.open_stream(honest.peer_id, index.PROTOCOL)
    query = index.Query(count=10)
    async with stream:
        await index.exchange(stream, query, [forgeries()[number]], lambda data: None)
    assert len(honest.directory) == 0
    await works(honest, stranger)


HEADER = frames.encode(Kind.HEADER, msgspec.json.encode(index.Query(count=1)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        b"\xff\xff\xff\xff\x01",
        frames.encode(Kind.HEADER, b"{}")[:-1],
        frames.encode(Kind.HEADER, b'{"count":100000000}'),
        frames.encode(Kind.HEADER, b'{"count":-1}'),
        frames.encode(Kind.HEADER, b"[" * 3000),
        frames.encode(Kind.DATA, b"x"),
        HEADER + frames.encode(Kind.ENVELOPE, b"x" * 3000),
        HEADER + frames.encode(Kind.ENVELOPE, b"x") * (index.PUSHED_MAX + 1),
        HEADER + frames.encode(Kind.HEADER, b"{}"),
    ],
    ids=range(11),
)
async def test_bad_index_frames(pair, data):
    honest, stranger = pair
    stream = await stranger.open_stream(honest.peer_id, index.PROTOCOL)
    with trio.fail_after(10):
        await stream.send_all(data)
        await stream.send_eof()
        with pytest.raises(trio.BrokenResourceError):
            await read_all(stream)
    await stream.aclose()
    await works(honest, stranger)


@pytest.mark.parametrize("protocol", [index.PROTOCOL, HELLO])
async def test_junk_is_a_fault_and_an_early_end_is_not(pair, monkeypatch, protocol):
    honest, stranger = pair
    faults: list[str] = []

    def fault(peer: str, kind: str, detail: object = "") -> None:
        faults.append(peer)

    monkeypatch.setattr(honest.conduct, "fault", fault)
    monkeypatch.setattr(honest.hello, "_fault", fault)
    for data in (b"", frames.encode(Kind.HEADER, b"{}")[:-1], frames.encode(Kind.DATA, b"x")):
        assert faults == []
        stream = await stranger.open_stream(honest.peer_id, protocol)
        with trio.fail_after(10):
            await stream.send_all(data)
            await stream.send_eof()
            with pytest.raises(trio.BrokenResourceError):
                await read_all(stream)
        await stream.aclose()
    assert faults == [stranger.peer_id]


async def test_peer_that_keeps_sending_forgeries_is_disconnected(pair):
    honest, stranger = pair
    bad = advert(STRANGER, cert=certificate(STRANGER.peer_id, signer=STRANGER))
    for _ in range(BAD_ADVERTS_BURST_PER_PEER + 5):
        honest.exchange._take(stranger.peer_id, bad)
    await until(lambda: not honest.connections.live())
    assert honest.conduct.banned(stranger.peer_id)


async def test_lying_index_server_gives_a_joiner_nothing():
    liar_config, joiner_config = member(STRANGER), member("joiner")
    asked = trio.Event()
    async with open_host(liar_config) as liar, open_host(joiner_config) as joiner:

        async def lie(stream):
            out = frames.encode(Kind.HEADER, b"{}")
            out += b"".join(frames.encode(Kind.ENVELOPE, data) for data in forgeries()[:-1])
            await stream.send_all(out + frames.encode(Kind.END))
            asked.set()

        liar.host.remove_stream_handler(index.PROTOCOL)
        async with liar.serve(index.PROTOCOL, lie):
            await joiner.connect((await liar.reachability()).addresses)
            with trio.fail_after(10):
                await asked.wait()
        await works(liar, joiner)
        assert len(joiner.directory) == 0


async def test_late_joiner_gets_a_thousand_adverts():
    now = time.time()
    async with open_host(member("one")) as full, open_host(member("two")) as joiner:
        for number in range(1000):
            full.directory.offer(advert(key_of(f"seller {number}")), now)
        await joiner.connect((await full.reachability()).addresses)
        await until(lambda: len(joiner.directory) == 1000)


async def test_index_answers_one_peer_only_so_often(pair):
    honest, stranger = pair
    answered = 0
    try:
        while answered < 100:
            stream = await stranger.open_stream(honest.peer_id, index.PROTOCOL)
            async with stream:
                await index.exchange(stream, index.Query(count=1), [], lambda data: None)
            answered += 1
    except trio.BrokenResourceError:
        pass
    assert 0 < answered < 60


JUNK = [
    b"\xff" * 400,
    os.urandom(4000),
    b"\0\0\0\1",
    frames.encode(Kind.HEADER, b"{}") * 50,
    encode_varint_prefixed(os.urandom(200)),
]


async def test_junk_on_every_protocol_we_serve():
    async with open_host(member("one")) as honest, open_host(member("friend")) as friend:
        addresses = (await honest.reachability()).addresses
        await friend.connect(addresses)
        served = [str(name) for name in honest.host.multiselect.handlers if name]
        assert HELLO in served
        assert index.PROTOCOL in served
        for protocol in served:
            async with open_host(member(f"junk {protocol}")) as attacker:
                await attacker.connect(addresses)
                for junk in JUNK:
                    with trio.move_on_after(0.05), suppress(Exception):
                        stream = await raw_stream(attacker, honest, protocol)
                        await stream.write(junk)
                        await stream.muxed_stream.close()
                        while await stream.read(65536):
                            pass
            await works(honest, friend)
        assert len(honest.directory) == 0


async def test_old_advert_comes_back_to_nobody_after_a_restart():
    seller = key_of("seller")
    old, newest = advert(seller, 1), advert(seller, 5)
    async with (
        open_host(member("friend")) as friend,
        open_host(member(STRANGER)) as stranger,
    ):
        await friend.publish_advert(newest)
        stranger.directory.offer(old, time.time())
        for addresses in ((friend, stranger), (stranger, friend)):
            async with open_host(member("one")) as restarted, restarted.adverts() as events:
                for host in addresses:
                    await restarted.connect((await host.reachability()).addresses)
                with trio.fail_after(10):
                    while (await next_of(events, seller.peer_id)).seq != 5:
                        pass
                stream = await stranger.open_stream(restarted.peer_id, index.PROTOCOL)
                async with stream:
                    await index.exchange(stream, index.Query(), [old], lambda data: None)
                assert restarted.directory.holds(newest)


async def test_two_hosts_of_one_key_harm_nobody_else(trio_of):
    honest, stranger, friend = trio_of
    addresses = (await honest.reachability()).addresses
    async with open_host(member(STRANGER)) as twin:
        for _ in range(3):
            await twin.connect(addresses)
            await stranger.connect(addresses)
        async with friend.adverts() as events:
            for seq, host in ((1, stranger), (2, twin)):
                with suppress(RemoteError):
                    await host.publish_advert(advert(STRANGER, seq))
            await honest.publish_advert(advert(key_of("one")))
            await next_of(events, honest.peer_id)
        await works(honest, friend)
    assert len(honest.admission) <= 3
