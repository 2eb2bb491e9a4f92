"""Peers that are slow: honest ones get their file, and the others hold nothing for long."""

from __future__ import annotations

import hashlib
import socket
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from lumaris_overlay.bulk import fetch as fetching
from lumaris_overlay.bulk import gate, wire
from lumaris_overlay.bulk.part import drop_part, open_part, part_path
from lumaris_overlay.bulk.wire import Wire
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.simulated.stream import stream_pair
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import CHUNK_BYTES
from lumaris_protocol.protocols import BLOB, BlobHeader, BlobReply
from tests.overlay.bulk.test_hostile import bulk_connection, ticket
from tests.overlay.bulk.test_transfer import fetch
from tests.overlay.bulk.world import WAIT_S, Seller, World, chunks, digest, eventually


class SlowReader(socket.socket):
    """The kernel's side of one that reads a little in each `step_s`."""

    now, step_s, taken_bytes = 0.0, 0.0, 0

    def send(self, data: Any, flags: int = 0) -> int:
        limit_s = self.gettimeout()
        assert limit_s is not None
        self.now += min(self.step_s, limit_s)
        if self.step_s > limit_s:
            raise TimeoutError
        taken = min(len(data), 100)
        self.taken_bytes += taken
        return taken


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch):
    with SlowReader() as sock, monkeypatch.context() as patch:
        patch.setattr("lumaris_overlay.bulk.wire.time.monotonic", lambda: sock.now)
        yield sock


@pytest.mark.parametrize(("pieces", "step_s"), [(39, 0.1), (3, 1.3)])
def test_a_slow_reader_that_goes_on(reader: SlowReader, pieces: int, step_s: float):
    reader.step_s = step_s
    end = Wire(reader, stall_s=1.0)
    for _ in range(2):  # each chunk has its own time
        end.send(bytes(pieces * 100))
    assert reader.taken_bytes == 2 * pieces * 100
    assert reader.gettimeout() == 1.0


@pytest.mark.parametrize("step_s", [0.1, 0.9, 100.0])
def test_a_reader_that_drips_or_takes_nothing(reader: SlowReader, step_s: float):
    reader.step_s = step_s
    with pytest.raises(wire.Stalled):
        Wire(reader, stall_s=1.0).send(bytes(CHUNK_BYTES))
    assert reader.now <= wire.CHUNK_STALLS + step_s


async def test_nothing_follows_a_frame_that_was_cut_off(autojump_clock: MockClock):
    near, far = stream_pair(PeerId("buyer"), PeerId("seller"), BLOB)
    seller = FramedStream(far)
    with trio.move_on_after(1) as scope:
        for _ in range(3):
            await seller.send(Kind.DATA, b"\x01" * 200_000)
    assert scope.cancelled_caught
    with pytest.raises(trio.BrokenResourceError):
        await seller.send(Kind.END)
    await seller.refuse(LumarisError("busy", "Later."))
    with pytest.raises(trio.BrokenResourceError):
        await FramedStream(near).receive()


async def test_a_send_that_never_began_cuts_nothing():
    near, far = stream_pair(PeerId("buyer"), PeerId("seller"), BLOB)
    seller = FramedStream(far)
    with trio.CancelScope() as scope:
        scope.cancel()
        await seller.send(Kind.DATA, b"x")
    await seller.refuse(LumarisError("busy", "Later."))
    frame = await FramedStream(near).receive()
    assert frame is not None
    assert frame.kind == Kind.REFUSAL


class Hostage(Seller):
    """The first to name a list, whose last but one entry is a lie; then it says nothing."""

    async def answer(self, header: BlobHeader, framed: FramedStream) -> None:
        hasher, data = hashlib.sha256(), self.files[header.sha256].read_bytes()
        listed = []
        for at in range(0, len(data), CHUNK_BYTES):
            hasher.update(data[at : at + CHUNK_BYTES])
            listed.append(hasher.digest())
        listed[-2] = bytes(32)
        await framed.send(Kind.HEADER, msgspec.json.encode(BlobReply(state="ready")))
        if header.listed:
            await framed.send(Kind.DATA, b"".join(listed))
        else:
            await trio.sleep_forever()


class SecondToAnswer(Seller):
    first: Seller

    async def answer(self, header: BlobHeader, framed: FramedStream) -> None:
        await eventually(lambda: self.first.ended)
        await super().answer(header, framed)


async def test_a_liar_that_says_nothing_is_left_for_the_others(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fetching, "_PATIENCE_S", 0.1)
    data = chunks(4)
    liar = await world.seller(direct=False, kind=Hostage)
    honest = await world.seller(direct=False, kind=SecondToAnswer)
    assert isinstance(honest, SecondToAnswer)
    honest.first = liar
    liar.hold(data)
    honest.hold(data)
    with trio.fail_after(WAIT_S):  # a stall is noticed after 30 s
        await fetch(world, liar, honest, data=data)
    assert (world.inbox / "file").read_bytes() == data
    assert world.left() == ["file"]


async def test_one_network_does_not_shut_the_gate(world: World):
    data, seller = chunks(1), await world.seller()
    seller.hold(data)
    assert seller.target is not None
    silent = []
    for _ in range(gate._UNPROVEN_PER_NETWORK_MAX + 10):
        stream = await trio.open_tcp_stream(*seller.target.addresses[0])
        await stream.send_all(b"\x02")
        silent.append(stream)
    await eventually(lambda: seller.bulk_connections == len(silent))
    _, token = await ticket(seller, data)
    with pytest.raises(OSError):  # closed or reset, in the handshake
        await bulk_connection(seller, token)
    direct = await bulk_connection(seller, token, ip="127.0.0.2")
    await trio.to_thread.run_sync(direct.sendall, bytes([0, 0, 0, 0, 0, 0, 0, 1]))
    assert await trio.to_thread.run_sync(direct.recv, 1) == data[:1]
    direct.close()
    for stream in silent:
        with suppress(trio.BrokenResourceError):
            await stream.aclose()
    opened = seller.gate
    assert opened is not None
    await eventually(lambda: not opened._unproven_of)


async def test_a_part_that_nobody_comes_back_for(world: World):
    data, target = b"words", world.inbox / "file"
    drop_part(target, digest(data))
    part_path(target, digest(data)).write_bytes(b"w")
    part = open_part(target, sha256=digest(data), size_bytes=len(data))
    drop_part(target, digest(data))  # in use: stays
    assert world.left() == [part_path(target, digest(data)).name]
    part.keep(1)
    drop_part(target, digest(data))
    assert world.left() == []
