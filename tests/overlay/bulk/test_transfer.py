"""Files in both directions, over both kinds of connection, cut, resumed and given up."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Any

import pytest
import trio

from lumaris_overlay.bulk import ask, wire
from lumaris_overlay.bulk import fetch as fetching
from lumaris_overlay.bulk.fetch import fetch_file
from lumaris_overlay.bulk.part import part_path
from lumaris_overlay.bulk.put import put_file
from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.simulated.stream import SimulatedStream
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import CHUNK_BYTES, KIB
from tests.overlay.bulk.world import SESSION, WAIT_S, Seller, World, chunks, digest, eventually

both_ways = pytest.mark.parametrize("direct", [True, False], ids=["direct", "lane"])
sizes = pytest.mark.parametrize(
    "size",
    [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 5],
)


async def fetch(world: World, *sellers: Seller, data: bytes, **changes: Any) -> None:
    options: dict[str, Any] = {"sha256": digest(data), "size_bytes": len(data)} | changes
    await fetch_file([seller.source for seller in sellers], world.inbox / "file", **options)


async def upload(world: World, seller: Seller, data: bytes, **changes: Any) -> None:
    options: dict[str, Any] = {"sha256": digest(data)} | changes
    overlay = seller.source.overlay
    await put_file(overlay, seller.peer, SESSION, world.file(data), **options)


async def refused(awaitable: Any) -> str:
    with pytest.raises(LumarisError) as caught:
        await awaitable
    return caught.value.code


@both_ways
@sizes
async def test_a_file_arrives(world: World, direct: bool, size: int):
    seller, data = await world.seller(direct=direct), chunks(0, size)
    seller.hold(data)
    await fetch(world, seller, data=data)
    assert (world.inbox / "file").read_bytes() == data
    assert world.left() == ["file"]
    assert seller.bulk_connections == (direct and size >= CHUNK_BYTES)
    await eventually(lambda: seller.ended == seller.lanes)


@both_ways
@sizes
async def test_a_file_is_sent(world: World, direct: bool, size: int):
    seller, data = await world.seller(direct=direct), chunks(0, size)
    await upload(world, seller, data)
    assert seller.uploaded(digest(data)).read_bytes() == data
    assert [path.name for path in seller.folder.iterdir()] == [digest(data)[-8:]]
    assert seller.bulk_connections == (direct and size >= CHUNK_BYTES)
    await eventually(lambda: seller.ended == seller.lanes)


@both_ways
async def test_other_bytes_of_the_same_size(world: World, direct: bool):
    seller, data = await world.seller(direct=direct), chunks(2, 7)
    seller.hold(chunks(2, 7, seed="other"), sha256=digest(data))
    assert await refused(fetch(world, seller, data=data)) == "output_mismatch"
    assert world.left() == []
    other = upload(world, seller, chunks(2, 7, seed="other"), sha256=digest(data))
    assert await refused(other) == "output_mismatch"
    assert [path.name for path in seller.folder.iterdir()] == [seller.files[digest(data)].name]


@both_ways
async def test_another_size(world: World, direct: bool):
    seller, data = await world.seller(direct=direct), chunks(2)
    for other in (data[:-1], data + b"x"):
        seller.hold(other, sha256=digest(data))
        assert await refused(fetch(world, seller, data=data)) == "not_found"
    assert world.left() == []


async def test_nothing_at_all_has_one_hash(world: World):
    seller = await world.seller()
    assert await refused(fetch(world, seller, data=b"", sha256=digest(b"x"))) == "output_mismatch"
    assert await refused(upload(world, seller, b"", sha256=digest(b"x"))) == "output_mismatch"
    assert world.left() == [path.name for path in seller.folder.iterdir()] == []


@both_ways
async def test_a_source_that_shrinks_while_it_is_sent(
    world: World, direct: bool, monkeypatch: pytest.MonkeyPatch
):
    seller, data = await world.seller(direct=direct), chunks(3)
    seller.hold(data)

    def shrink(*_: object) -> None:
        raise EOFError

    monkeypatch.setattr(wire, "send_chunks", shrink)
    assert await refused(fetch(world, seller, data=data)) == "platform_error"
    if direct:
        assert await refused(upload(world, seller, data)) == "bad_input"
    assert world.left() == []


class Cutting:
    """Replaces `send_chunks`: each call ends in a cut after some bytes of its first chunk."""

    def __init__(self, send_bytes: int) -> None:
        self.calls: list[int] = []
        self._send_bytes = send_bytes

    def __call__(self, to: wire.Wire, file: int, first: int, count: int, size_bytes: int) -> None:
        self.calls.append(first)
        to.send(os.pread(file, self._send_bytes, first * CHUNK_BYTES))
        end = min((first + 1) * CHUNK_BYTES, size_bytes)
        if first * CHUNK_BYTES + self._send_bytes < end or first + 1 < -(
            -size_bytes // CHUNK_BYTES
        ):
            hang_up(to)


def hang_up(end: wire.Wire) -> None:
    """Lose the connection once the other side has all that was sent."""
    if end.plain:
        end.stop()
    else:
        socket.socket.shutdown(end.sock, socket.SHUT_WR)
        with suppress(OSError):
            while end.sock.recv(1000):
                pass
    raise wire.Cut


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "_PAUSES_S", (0.0,))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_retries")
async def test_a_download_cut_at_every_chunk(world: World, monkeypatch: pytest.MonkeyPatch):
    seller, data = await world.seller(), chunks(6, 9)
    seller.hold(data)
    cutting = Cutting(CHUNK_BYTES)
    monkeypatch.setattr(wire, "send_chunks", cutting)
    await fetch(world, seller, data=data)
    assert (world.inbox / "file").read_bytes() == data
    assert cutting.calls == list(range(7))
    assert world.left() == ["file"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_retries")
async def test_an_upload_cut_at_every_chunk(world: World, monkeypatch: pytest.MonkeyPatch):
    seller, data = await world.seller(), chunks(6, 9)
    cutting = Cutting(CHUNK_BYTES)
    monkeypatch.setattr(wire, "send_chunks", cutting)
    await upload(world, seller, data)
    assert seller.uploaded(digest(data)).read_bytes() == data
    assert cutting.calls == list(range(7))


class CutLanes(Seller):
    """Each lane is lost after the buyer took or gave this many bytes."""

    bytes_max = 2 * CHUNK_BYTES

    async def open_stream(self, *arguments: Any, **options: Any) -> SimulatedStream:
        await eventually(lambda: self.ended == len(self.streams))  # else its part is in use
        stream = await super().open_stream(*arguments, **options)
        receive, send, moved = stream.receive_some, stream.send_all, 0

        def count(size: int) -> None:
            nonlocal moved
            moved += size
            if moved > self.bytes_max:
                stream.lose()

        async def receive_some(max_bytes: int | None = None) -> bytes:
            data = await receive(max_bytes)
            count(len(data))
            return data

        async def send_all(data: bytes | bytearray | memoryview) -> None:
            await send(data)
            count(len(data))

        stream.receive_some, stream.send_all = receive_some, send_all  # type: ignore[method-assign]
        return stream


@pytest.mark.slow
@pytest.mark.usefixtures("quick_retries")
async def test_a_lane_that_is_cut_again_and_again(world: World):
    seller, data = await world.seller(direct=False, kind=CutLanes), chunks(6, 9)
    seller.hold(data)
    await fetch(world, seller, data=data)
    assert (world.inbox / "file").read_bytes() == data
    assert seller.lanes > 3
    seller.lanes = 0
    await upload(world, seller, data)
    assert seller.uploaded(digest(data)).read_bytes() == data
    assert seller.lanes > 3


@pytest.mark.slow
@both_ways
@pytest.mark.usefixtures("quick_retries")
async def test_cuts_without_progress_are_given_up(
    world: World, direct: bool, monkeypatch: pytest.MonkeyPatch
):
    seller, data = await world.seller(direct=direct), chunks(3)
    seller.hold(data)
    cutting = Cutting(CHUNK_BYTES - 1)
    monkeypatch.setattr(wire, "send_chunks", cutting)
    assert await refused(fetch(world, seller, data=data)) == "unreachable"
    assert cutting.calls == [0] * (ask.RETRIES + 1)
    assert world.left() == []
    if direct:  # then the upload takes the lane, which is not cut here
        await upload(world, seller, data)
        assert cutting.calls == [0] * (ask.RETRIES + 1 + ask.DIRECT_TRIES)
        assert seller.uploaded(digest(data)).read_bytes() == data


async def leave_part(
    world: World, seller: Seller, data: bytes, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """A call that ends after some chunks."""
    original = wire.send_chunks

    def send(to: wire.Wire, file: int, first: int, wanted: int, size_bytes: int) -> None:
        original(to, file, first, count - first, size_bytes)
        hang_up(to)

    with monkeypatch.context() as patch:
        patch.setattr(wire, "send_chunks", send)
        assert await refused(fetch(world, seller, data=data)) == "unreachable"
    part = part_path(world.inbox / "file", digest(data))
    assert world.left() == [part.name]
    assert part.read_bytes() == data[: count * CHUNK_BYTES]


@pytest.mark.slow
@both_ways
@pytest.mark.usefixtures("quick_retries")
async def test_the_next_call_goes_on(world: World, direct: bool, monkeypatch: pytest.MonkeyPatch):
    seller, data = await world.seller(), chunks(5, 1)
    seller.hold(data)
    await leave_part(world, seller, data, monkeypatch, 3)
    if not direct:
        seller.target = None
    asked: list[tuple[int, int]] = []
    original = wire.send_chunks

    def send(to: wire.Wire, file: int, first: int, count: int, size_bytes: int) -> None:
        asked.append((first, count))
        original(to, file, first, count, size_bytes)

    monkeypatch.setattr(wire, "send_chunks", send)
    await fetch(world, seller, data=data)
    assert asked == [(3, 3)]
    assert (world.inbox / "file").read_bytes() == data
    assert world.left() == ["file"]


@pytest.mark.slow
@both_ways
@pytest.mark.parametrize("wrong", ["changed", "zeros", "whole", "longer"])
async def test_a_part_file_proves_nothing(world: World, direct: bool, wrong: str):
    seller, data = await world.seller(direct=direct), chunks(4, 1)
    seller.hold(data)
    part = part_path(world.inbox / "file", digest(data))
    part.write_bytes(
        {
            "changed": b"x" + data[1 : 2 * CHUNK_BYTES],
            "zeros": data[:CHUNK_BYTES] + bytes(2 * CHUNK_BYTES),
            "whole": bytes(len(data)),
            "longer": data + b"x",
        }[wrong]
    )
    await fetch(world, seller, data=data)
    assert (world.inbox / "file").read_bytes() == data
    assert world.left() == ["file"]


async def test_a_whole_part_file_needs_no_source(world: World):
    seller, data = await world.seller(), chunks(2, 1)
    part_path(world.inbox / "file", digest(data)).write_bytes(data)
    await fetch(world, seller, data=data)
    assert (world.inbox / "file").read_bytes() == data
    assert seller.lanes == 0


@both_ways
@pytest.mark.usefixtures("quick_retries")
async def test_a_seller_with_a_wrong_part_of_an_upload(world: World, direct: bool):
    seller, data = await world.seller(direct=direct), chunks(3, 1)
    part = part_path(seller.uploaded(digest(data)), digest(data))
    part.write_bytes(chunks(2, seed="other"))
    await upload(world, seller, data)
    assert seller.uploaded(digest(data)).read_bytes() == data
    assert seller.lanes == 2
    assert not part.exists()


async def test_two_calls_for_one_file_in_one_folder(world: World):
    seller, data = await world.seller(), chunks(3)
    seller.hold(data)
    async with trio.open_nursery() as nursery:
        for name in ("a", "b", "c"):
            nursery.start_soon(get_as, world, seller, name, data)
    assert world.left() == ["a", "b", "c"]
    assert all((world.inbox / name).read_bytes() == data for name in ("a", "b", "c"))


async def get_as(world: World, seller: Seller, name: str, data: bytes) -> None:
    source = seller.source
    await fetching.get_file(
        source.overlay,
        source.peer,
        source.session,
        world.inbox / name,
        sha256=digest(data),
        size_bytes=len(data),
    )


@pytest.mark.slow
@both_ways
async def test_a_cancelled_transfer_lets_its_thread_go(
    world: World, direct: bool, monkeypatch: pytest.MonkeyPatch
):
    seller, data = await world.seller(direct=direct), chunks(6)
    seller.hold(data)
    began = trio.Event()
    token = trio.lowlevel.current_trio_token()
    original = wire.send_chunks

    def send(to: wire.Wire, file: int, first: int, count: int, size_bytes: int) -> None:
        original(to, file, first, 2, size_bytes)
        token.run_sync_soon(began.set)
        to.receive(memoryview(bytearray(1)))  # nothing comes: waits for a stall

    monkeypatch.setattr(wire, "send_chunks", send)
    with trio.fail_after(WAIT_S / 2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: fetch(world, seller, data=data))
            await began.wait()
            part = part_path(world.inbox / "file", digest(data))
            await eventually(lambda: part.stat().st_size == 2 * CHUNK_BYTES)
            nursery.cancel_scope.cancel()
        await eventually(lambda: seller.ended == seller.lanes)
    assert world.left() == [part.name]  # what came is where the next call begins
    monkeypatch.undo()
    await fetch(world, seller, data=data)
    assert world.left() == ["file"]


@both_ways
async def test_a_cancelled_upload_lets_its_threads_go(world: World, direct: bool):
    seller, data = await world.seller(direct=direct), chunks(2)

    async def never(header: object, framed: object) -> None:
        await trio.sleep_forever()

    seller.answer = never  # type: ignore[method-assign]
    with trio.fail_after(WAIT_S / 2):
        with trio.move_on_after(0.05) as scope:
            await upload(world, seller, data)
    assert scope.cancelled_caught


@both_ways
async def test_every_byte_is_paid_for_under_a_cap(world: World, direct: bool, monkeypatch):
    seller, data = await world.seller(direct=direct), chunks(2, 3)
    seller.hold(data)
    paid = {"near": 0, "far": 0}

    class Counting(Rate):
        def __init__(self, side: str) -> None:
            super().__init__(64 * KIB)
            self._side = side

        def reserve(self, size_bytes: int) -> float:
            paid[self._side] += size_bytes
            return 0.0

    near = Counting("near")
    if seller.gate is not None:
        seller.gate.rate = Counting("far")
    await fetch(world, seller, data=data, rate=near)
    assert len(data) <= paid["near"] <= len(data) + 100
    paid["near"] = 0
    await upload(world, seller, data, rate=near)
    assert len(data) <= paid["near"] <= len(data) + 100
    if seller.gate is not None:
        assert 2 * len(data) <= paid["far"] <= 2 * len(data) + 200
        paid["far"], seller.target = 0, None
        await fetch(world, seller, data=data)  # on the lane
        assert len(data) <= paid["far"] <= len(data) + 100


def test_a_rate_holds_over_all_that_share_it():
    now = 100.0
    rate = Rate(1_000_000, clock=lambda: now)
    waits = [rate.reserve(250_000) for _ in range(5)]
    assert waits == pytest.approx([0.25 - 0.0, 0.5, 0.75, 1.0, 1.25], abs=0.11)
    now += 10
    assert rate.reserve(100_000) == pytest.approx(0.0)
    assert rate.reserve(1_000_000) == pytest.approx(1.0, abs=0.11)
    with pytest.raises(ValueError, match="looks like a stall"):
        Rate(1)
