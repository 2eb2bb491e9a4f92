"""What strangers may do to a real host: it lives, it believes nothing, it forgets nothing."""

from __future__ import annotations

import os
import time
from contextlib import suppress

import msgspec
import pytest
import trio

from lumaris_overlay.libp2p import index
from lumaris_overlay.libp2p.host import HostConfig, open_host
from lumaris_protocol import frames
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import BAD_ADVERTS_BURST_PER_PEER
from tests.overlay.test_canaries import works
from tests.overlay.world import KEYS, NETWORK, advert, certificate, key_of, next_of, read_all, until

pytestmark = pytest.mark.slow

STRANGER = key_of("stranger")


def forgeries() -> list[bytes]:
    now = time.time()
    return [
        b"",
        os.urandom(300),
        advert(STRANGER)[:-3],
        advert(STRANGER, signer=key_of("forger")),
        advert(STRANGER, cert=certificate(STRANGER.peer_id, signer=STRANGER)),
        advert(STRANGER, cert=certificate(key_of("x").peer_id)),
        advert(STRANGER, now=now - 3000),
        advert(STRANGER, network="other"),
        advert(STRANGER) + b"x" * 4000,
    ]


@pytest.fixture
async def pair():
    """An honest host, and one that says what it is told to."""
    one = HostConfig(key=key_of("one"), network=NETWORK, coordinator_keys=KEYS)
    two = HostConfig(key=STRANGER, network=NETWORK, coordinator_keys=KEYS)
    async with open_host(one) as honest, open_host(two) as stranger:
        assert await stranger.connect((await honest.reachability()).addresses) == 1
        yield honest, stranger


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
async def test_forged_advert_over_gossip(pair, number):
    honest, stranger = pair
    await until(lambda: stranger.exchange.gossip.in_mesh(honest.host.get_id()))
    await stranger.exchange.gossip.publish(forgeries()[number])
    async with honest.adverts() as events:
        good = advert(key_of("good seller"))
        await stranger.publish_advert(good)
        assert (await next_of(events, key_of("good seller").peer_id)).envelope == good
    assert len(honest.directory) == 1


@pytest.mark.parametrize("number", range(8))
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


async def test_peer_that_keeps_sending_forgeries_is_disconnected(pair):
    honest, stranger = pair
    bad = advert(STRANGER, cert=certificate(STRANGER.peer_id, signer=STRANGER))
    for _ in range(BAD_ADVERTS_BURST_PER_PEER + 5):
        honest.exchange._take(stranger.peer_id, bad)
    await until(lambda: not honest.connections.live())


async def test_lying_index_server_gives_a_joiner_nothing():
    liar_config = HostConfig(key=STRANGER, network=NETWORK, coordinator_keys=KEYS)
    joiner_config = HostConfig(key=key_of("joiner"), network=NETWORK, coordinator_keys=KEYS)
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
    key, now = key_of("one"), time.time()
    one = HostConfig(key=key, network=NETWORK, coordinator_keys=KEYS)
    two = HostConfig(key=key_of("two"), network=NETWORK, coordinator_keys=KEYS)
    async with open_host(one) as full, open_host(two) as joiner:
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
