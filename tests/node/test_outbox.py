"""The outbox of a session: nothing is sent before it is stored, nothing stored is lost."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.outbox import Outbox
from lumaris_protocol.effects import Effect, KeepVoucher, Send


class Disk:
    """Stores one effect at a time, when let."""

    def __init__(self) -> None:
        self.kept: list[Effect] = []
        self.asked, self.go = trio.Event(), trio.Event()

    async def keep(self, effect: Effect) -> None:
        self.asked.set()
        await self.go.wait()
        self.kept.append(effect)


async def test_a_message_waits_for_what_it_depends_on():
    ours, theirs = memory_stream_pair()
    disk, voucher = Disk(), KeepVoucher(b"v", 1)
    outbox, reader = Outbox(FramedStream(ours), disk.keep), FramedStream(theirs)
    outbox.put(Send(b"first"))
    outbox.put(voucher)
    outbox.put(Send(b"second"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        frame = await reader.receive()
        assert frame is not None
        assert frame.body == b"first"
        await disk.asked.wait()
        with trio.move_on_after(0.02) as scope:
            await reader.receive()
        assert scope.cancelled_caught, "sent before it was stored"
        disk.go.set()
        frame = await reader.receive()
        assert frame is not None
        assert frame.body == b"second"
        await outbox.flush()
        assert disk.kept == [voucher]
        nursery.cancel_scope.cancel()


async def test_what_is_said_in_one_turn_leaves_in_one_write():
    ours, theirs = memory_stream_pair()
    outbox = Outbox(FramedStream(ours), Disk().keep)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        await wait_all_tasks_blocked()
        outbox.put(Send(b"first"))
        nursery.start_soon(_put, outbox, b"second")
        await outbox.flush()
        written = await theirs.receive_some()
        assert b"first" in written and b"second" in written
        nursery.cancel_scope.cancel()


async def _put(outbox: Outbox, data: bytes) -> None:
    outbox.put(Send(data))


async def test_a_write_cut_off_is_made_up_for():
    """A voucher that was being stored when the session ended is stored all the same."""
    ours, _ = memory_stream_pair()
    disk, voucher = Disk(), KeepVoucher(b"v", 1)
    outbox = Outbox(FramedStream(ours), disk.keep)
    outbox.put(voucher)
    outbox.put(Send(b"lost"))
    outbox.put(KeepVoucher(b"w", 2))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        await disk.asked.wait()
        nursery.cancel_scope.cancel()
    assert disk.kept == []
    disk.go.set()
    await outbox.keep_rest()
    assert disk.kept == [voucher, KeepVoucher(b"w", 2)]


async def test_bulk_output_waits_for_a_slow_reader():
    ours, theirs = memory_stream_pair()
    outbox = Outbox(FramedStream(ours), Disk().keep)
    for _ in range(64):
        outbox.put(Send(b"x"))
    with trio.move_on_after(0.02) as scope:
        await outbox.room()
    assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        await outbox.room()
        nursery.cancel_scope.cancel()
    await theirs.aclose()


async def test_a_reader_that_is_gone_holds_nobody_up():
    ours, theirs = memory_stream_pair()
    outbox = Outbox(FramedStream(ours), Disk().keep)
    await theirs.aclose()
    for _ in range(100):
        outbox.put(Send(b"x"))
    with pytest.RaisesGroup(trio.BrokenResourceError):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outbox.run)
    with trio.fail_after(1):
        await outbox.room()
        await outbox.flush()


async def test_what_is_to_be_stored_waits_for_no_message():
    """A peer that does not read must not keep its vouchers off our disk."""
    ours, theirs = memory_stream_pair()
    ours.send_stream.send_all_hook = trio.sleep_forever
    disk, voucher = Disk(), KeepVoucher(b"v", 1)
    disk.go.set()
    outbox = Outbox(FramedStream(ours), disk.keep)
    outbox.put(Send(b"unread"))
    outbox.put(voucher)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    await theirs.aclose()
    assert disk.kept == [voucher]


async def test_a_peer_that_takes_nothing_is_gone(autojump_clock: MockClock):
    ours, theirs = memory_stream_pair()
    ours.send_stream.send_all_hook = trio.sleep_forever
    outbox = Outbox(FramedStream(ours), Disk().keep)
    outbox.put(Send(b"unread"))
    with trio.fail_after(60), pytest.raises(trio.BrokenResourceError):
        await outbox.run()
    await theirs.aclose()


async def test_a_disk_that_fails_is_told(autojump_clock: MockClock):
    async def keep(_: Effect) -> None:
        raise OSError("full")

    ours, theirs = memory_stream_pair()
    outbox = Outbox(FramedStream(ours), keep)
    outbox.put(KeepVoucher(b"v", 1))
    with trio.fail_after(60), pytest.RaisesGroup(OSError):
        await outbox.run()
    await theirs.aclose()
