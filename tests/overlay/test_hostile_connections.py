"""What peers may do with connections and streams alone: others get theirs."""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from libp2p.peer.id import ID

from lumaris_overlay.libp2p import admission as admission_module
from lumaris_overlay.libp2p import index, overrides
from lumaris_overlay.libp2p.host import open_host
from lumaris_protocol.limits import (
    HANDSHAKES_MAX,
    STREAMS_BURST_PER_PEER,
    STREAMS_PER_S_PER_PEER,
)
from lumaris_protocol.protocols import HELLO
from tests.overlay.attackers import (
    PATIENCE_S,
    attacked,
    raw_stream,
    uncertified,
    works,
)
from tests.overlay.hosts import member
from tests.overlay.world import until

pytestmark = pytest.mark.slow


async def test_window_violation_ends_the_connection(trio_of):
    honest, stranger, friend = trio_of
    release = trio.Event()

    async def deaf(stream) -> None:
        await release.wait()

    async with honest.serve("/deaf/1", deaf):
        stream = await raw_stream(stranger, honest, "/deaf/1")
        muxed = stream.muxed_stream

        async def push() -> None:
            with suppress(Exception):
                while True:
                    muxed.send_window = 1 << 30
                    await stream.write(b"x" * 65_536)
            await trio.sleep_forever()

        await attacked(friend, honest, push)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(push)
            await until(lambda: honest.conduct.banned(stranger.peer_id))
            nursery.cancel_scope.cancel()
        await until(lambda: stranger.host.get_id() not in honest.connections.live())
        release.set()
    assert friend.host.get_id() in honest.connections.live()


async def test_slow_streams_hold_nothing_for_long(trio_of, monkeypatch):
    """A byte and then silence, on what answers strangers and members."""
    honest, stranger, friend = trio_of
    monkeypatch.setattr(index, "_EXCHANGE_S", 0.5)
    opened = []

    async def dribble() -> None:
        for number in range(60):
            protocol = (index.PROTOCOL, HELLO)[number % 2]
            with suppress(Exception):
                stream = await raw_stream(stranger, honest, protocol)
                await stream.write(b"\0")
                opened.append(stream)
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attacked, friend, honest, dribble)

    def held() -> int:
        mine = stranger.host.get_id()
        found = honest.host.get_network().connections.get(mine, ())
        return sum(len(connection.muxed_conn.streams) for connection in found)

    assert opened
    # Some streams stay by right: gossip, hellos and health checks.
    await until(lambda: held() <= 8, PATIENCE_S)


async def test_half_open_handshakes_keep_nobody_out(monkeypatch):
    async with (
        open_host(member("one")) as honest,
        open_host(member("friend")) as friend,
        AsyncExitStack() as stack,
    ):
        (address,) = (await honest.reachability()).addresses
        swarm = honest.host.get_network()
        port = int(address.split("/")[4])
        for _ in range(400):
            stack.push_async_callback(
                trio.aclose_forcefully, await trio.open_tcp_stream("127.0.0.1", port)
            )
        await until(lambda: swarm._shaking)
        with trio.fail_after(PATIENCE_S):
            while not await friend.connect([address]):
                await trio.sleep(0.05)
        assert len(swarm._shaking) <= HANDSHAKES_MAX
        await works(honest, friend)


async def test_crowd_of_strangers(monkeypatch):
    monkeypatch.setattr(admission_module, "STRANGERS_MAX", 4)
    async with open_host(member("one")) as honest, open_host(member("friend")) as friend:
        addresses = (await honest.reachability()).addresses
        await friend.connect(addresses)

        async def crowd() -> None:
            async def come(number: int) -> None:
                async with open_host(uncertified(f"crowd {number}")) as each:
                    me = each.host.get_id()
                    while True:
                        await each.connect(addresses)
                        # Sent away, or one of those that may stay for a while.
                        with trio.move_on_after(1):
                            await until(lambda: me not in honest.connections.live())
                        await trio.sleep(0.5)

            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(come, number)

        await attacked(friend, honest, crowd)
        assert len(honest.strangers) <= 4
        await until(lambda: friend.host.get_id() in honest.connections.live(), PATIENCE_S)
        assert [info.peer for info in await honest.peers()] == [friend.peer_id]


async def test_streams_of_one_peer_are_taken_in_at_a_rate(autojump_clock):
    wire: Any = SimpleNamespace(is_initiator=True)
    muxer = overrides.WholeFrameYamux(wire, ID(b"peer"), is_initiator=True)
    await trio.sleep(1)
    began = trio.current_time()
    for _ in range(STREAMS_BURST_PER_PEER):
        await muxer.wait_turn()
    assert trio.current_time() == began
    async with trio.open_nursery() as nursery:
        for _ in range(STREAMS_PER_S_PER_PEER):
            nursery.start_soon(muxer.wait_turn)
    assert trio.current_time() - began == pytest.approx(1, abs=0.02)


async def test_streams_that_say_nothing_wait_for_each_other_alone(trio_of):
    honest, stranger, friend = trio_of
    (connection,) = stranger.host.get_network().connections[honest.host.get_id()]
    (theirs,) = honest.host.get_network().connections[stranger.host.get_id()]
    for _ in range(50):
        await connection.muxed_conn.open_stream()
    await until(lambda: theirs.muxed_conn.negotiating.value == 0)
    await works(honest, friend)


async def test_strangers_are_asked_nothing():
    async with open_host(member("one")) as one, open_host(uncertified("x")) as other:
        assert await other.connect((await one.reachability()).addresses) == 1
        await until(lambda: len(one.strangers) == 1)
        assert other.host.get_id() not in one.host._identify_inflight
        assert not one.host._identify_tasks
