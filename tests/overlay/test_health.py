"""Peers that fall silent or stop reading are given up, and hold up nobody else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.peer.id import ID
from libp2p.stream_muxer.yamux import yamux

from lumaris_overlay.libp2p import health, overrides
from lumaris_overlay.libp2p.host import open_host
from tests.overlay.hosts import member
from tests.overlay.world import until

BARE = b"f" * yamux.HEADER_SIZE
DATA = b"d" * 100
GIVEN_UP_S = 17.0


class Wire:
    """A secured connection whose peer takes frames while it `reads`."""

    def __init__(self) -> None:
        self.is_initiator = True
        self.reads = trio.Event()
        self.taken: list[bytes] = []
        self.aborted = False
        self.conn = SimpleNamespace(read_writer=SimpleNamespace(read_write_closer=self))

    async def write(self, data: bytes) -> None:
        await self.reads.wait()
        self.taken.append(data)

    async def abort(self) -> None:
        self.aborted = True


def muxer_on(wire: Any) -> Any:
    return overrides.WholeFrameYamux(wire, ID(b"peer"), is_initiator=True)


class TestFrames:
    async def test_a_peer_that_takes_nothing_is_given_up(self, autojump_clock):
        wire = Wire()
        began = trio.current_time()
        with trio.fail_after(10), pytest.raises(ConnectionClosedError):
            await muxer_on(wire)._write_frame(DATA)
        assert wire.aborted
        assert trio.current_time() - began == pytest.approx(8)

    async def test_who_waits_for_a_turn_keeps_a_deadline(self, autojump_clock):
        wire = Wire()
        muxer = muxer_on(wire)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(muxer._write_frame, DATA)
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(1) as scope:
                await muxer._write_frame(b"never" + DATA)
            assert scope.cancelled_caught
            assert trio.current_time() - scope.deadline < 0.1
            wire.reads.set()
        assert wire.taken == [DATA]
        assert not wire.aborted

    async def test_a_frame_is_sent_whole_or_not_at_all(self, autojump_clock):
        wire = Wire()
        muxer = muxer_on(wire)
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(until_then, 1, scope.cancel)
                nursery.start_soon(until_then, 2, wire.reads.set)
                await muxer._write_frame(DATA)
        assert wire.taken == [DATA]

    async def test_the_end_of_a_cancelled_tasks_stream_is_told(self, autojump_clock):
        wire = Wire()
        muxer = muxer_on(wire)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(muxer._write_frame, DATA)
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(1):
                await muxer._write_frame(BARE)
            wire.reads.set()
        assert wire.taken == [DATA, BARE]
        with trio.CancelScope() as scope:
            scope.cancel()
            await muxer._write_frame(BARE)
        assert wire.taken == [DATA, BARE, BARE]

    async def test_what_cancelled_writers_leave_is_bounded(self, autojump_clock, monkeypatch):
        monkeypatch.setattr(overrides, "_OWED_MAX", 3)
        wire = Wire()
        muxer = muxer_on(wire)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(muxer._write_frame, DATA)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(5):
                with trio.move_on_after(0.1):
                    await muxer._write_frame(BARE)
            wire.reads.set()
        assert wire.taken == [DATA, 3 * BARE]


async def until_then(delay_s: float, act: Any) -> None:
    await trio.sleep(delay_s)
    act()


class Muxed:
    """A muxed connection that can be cut."""

    def __init__(self) -> None:
        self.peer_id = ID(b"peer")
        self.event_closed = trio.Event()

    async def cut(self) -> None:
        self.event_closed.set()


class Connection:
    """A connection to a peer that answers pings while it `lives`."""

    def __init__(self, *, misses: int = 0) -> None:
        self.muxed_conn = Muxed()
        self.lives, self.misses, self.pings = True, misses, 0

    @property
    def is_closed(self) -> bool:
        return self.muxed_conn.event_closed.is_set()

    async def answer(self) -> bool:
        self.pings += 1
        if not self.lives or self.pings <= self.misses:
            await trio.sleep_forever()
        return True


class TestPings:
    @pytest.fixture(autouse=True)
    def _answers(self, monkeypatch):
        async def ask(pings: Any) -> bool:
            return bool(await pings._connection.answer())

        monkeypatch.setattr(health._Pings, "_ask", ask)

    async def test_silent_peers_are_given_up_in_time_and_hide_nobody(self, autojump_clock):
        connections = [Connection() for _ in range(50)]
        steady, late = Connection(), Connection(misses=1)
        async with trio.open_nursery() as nursery:
            for each in (*connections, steady, late):
                nursery.start_soon(health._look_after, each)
            await trio.sleep(60)
            for each in connections:
                each.lives = False
            await trio.sleep(GIVEN_UP_S)
            assert all(each.is_closed for each in connections)
            assert not steady.is_closed
            assert not late.is_closed
            assert steady.pings >= 7
            nursery.cancel_scope.cancel()

    async def test_the_task_ends_with_its_connection(self, autojump_clock):
        connection = Connection()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(health._look_after, connection)
            await trio.sleep(1)
            connection.muxed_conn.event_closed.set()
        assert trio.current_time() < 9
        assert connection.pings == 0


@pytest.mark.slow
async def test_a_real_peer_that_stops_reading_is_given_up_and_another_stays(monkeypatch):
    monkeypatch.setattr(health, "_PERIOD_S", (0.1, 0.2))
    monkeypatch.setattr(overrides, "_FRAME_S", 1.0)
    frozen: set[int] = set()
    stock = TrioTCPStream.read

    async def read(self: Any, n: int | None = None) -> bytes:
        if self.stream.socket.getsockname()[1] in frozen:
            await trio.sleep_forever()
        return await stock(self, n)

    monkeypatch.setattr(TrioTCPStream, "read", read)
    async with (
        open_host(member("one")) as one,
        open_host(member("stuck")) as stuck,
        open_host(member("steady")) as steady,
    ):
        for each in (stuck, steady):
            assert await one.connect((await each.reachability()).addresses) == 1
        (held,) = one.host.get_network().connections[stuck.host.get_id()]
        (kept,) = one.host.get_network().connections[steady.host.get_id()]
        stream = await one.host.new_stream(stuck.host.get_id(), ["/lumaris/hello/1"])
        frozen.add(int((await stuck.reachability()).addresses[0].split("/")[4]))

        async def flood() -> None:
            stream.muxed_stream.send_window = 1 << 30
            with pytest.raises(Exception, match="takes nothing"):
                await stream.write(bytes(40 << 20))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            await until(lambda: held.is_closed, 20)
        assert stuck.host.get_id() not in one.connections.live()
        assert not kept.is_closed
