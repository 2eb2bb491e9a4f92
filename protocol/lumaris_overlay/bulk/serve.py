"""The answering side of `/lumaris/blob/1`: give a file to a peer, or take one from it."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import msgspec
import trio

from lumaris_overlay.bulk import wire as wires
from lumaris_overlay.bulk.assembly import Assembly
from lumaris_overlay.bulk.gate import TOKEN_S, BulkGate, Ticket
from lumaris_overlay.bulk.lane import lane_wire
from lumaris_overlay.bulk.part import Part, chunk_list, open_part
from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.bulk.threads import DIAL_S, in_thread, together
from lumaris_overlay.bulk.turns import Turns
from lumaris_overlay.bulk.wire import Cut, Stalled, Wire
from lumaris_overlay.framed_stream import FramedStream, read_refusal
from lumaris_overlay.ports import OverlayStream
from lumaris_protocol.errors import EnvelopeError, LumarisError, RefusedError
from lumaris_protocol.frames import Frame, Kind
from lumaris_protocol.protocols import BlobHeader, BlobReply

_RANGE_BYTES = 8
# A client may ask for a chunk again after it found what an earlier attempt left to be wrong.
_ASKS_PER_CHUNK = 2

_turns: trio.lowlevel.RunVar[Turns] = trio.lowlevel.RunVar("bulk_turns")


async def give_file(
    stream: FramedStream, header: BlobHeader, path: Path, *, rate: Rate | None = None
) -> None:
    """Give the file at `path` to the peer that asked for it with `header`.

    Raises RemoteError for what the peer does, OSError for our own file, and
    trio.BrokenResourceError when the peer is gone.
    """
    async with _turn(stream):
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_size != header.size_bytes:
                raise RefusedError("not_found", "The file of that hash has another size.")
            listed = None
            if header.listed:
                stopped = threading.Event()
                listed = await in_thread(
                    partial(chunk_list, file, header.size_bytes, stopped), stop=stopped.set
                )
            await _exchange(
                stream,
                header,
                work=partial(_answer_ranges, file, header.size_bytes),
                bytes_max=_RANGE_BYTES * _ASKS_PER_CHUNK * wires.chunks_of(header.size_bytes),
                chunk_hashes=listed,
                rate=rate,
            )
        except EOFError:
            raise LumarisError("platform_error", "The file changed while it was sent.") from None
        finally:
            os.close(file)


async def take_file(
    stream: FramedStream, header: BlobHeader, target: Path, *, rate: Rate | None = None
) -> None:
    """Take the file that a peer announced with `header`; it stands at `target` only when right.

    Raises RemoteError, LumarisError `disk_short` or `not_writable` (nothing is left then), or
    trio.BrokenResourceError when the peer is gone (whole chunks stay for its next attempt).
    """
    async with _turn(stream):
        part = await trio.to_thread.run_sync(
            partial(open_part, target, sha256=header.sha256, size_bytes=header.size_bytes)
        )
        assembly = Assembly(part, restarts=False)
        keep = True
        try:
            await _take(stream, header, assembly, rate)
            await trio.to_thread.run_sync(part.finish, target)
        except LumarisError:
            keep = False
            raise
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(end_attempt, assembly, part, keep)


def end_attempt(assembly: Assembly, part: Part, keep: bool) -> None:
    """Close an assembly and its part file; what was right so far may stay for the next attempt."""
    assembly.close()
    part.keep(assembly.frontier if keep else 0)


async def _take(
    stream: FramedStream, header: BlobHeader, assembly: Assembly, rate: Rate | None
) -> None:
    await in_thread(assembly.resume, stop=assembly.give_up)
    first, count = assembly.frontier, assembly.part.count
    if assembly.error is not None:
        raise assembly.error
    if assembly.complete:
        return

    def work(wire: Wire) -> None:
        assembly.receive(wire, 0, first, count - first)
        if wire.plain:
            wire.receive_end()
        assembly.wait()

    await _exchange(
        stream,
        header,
        work=work,
        bytes_max=wires.range_bytes(first, count - first, header.size_bytes),
        first=first,
        rate=rate,
    )


def _answer_ranges(file: int, size_bytes: int, wire: Wire) -> None:
    """Send what is asked for until the client hangs up."""
    count = wires.chunks_of(size_bytes)
    left = _ASKS_PER_CHUNK * count
    stalls = 1
    while (asked := wire.next_range(stalls=stalls)) is not None:
        first, wanted = asked
        stalls = wires.BUFFER_STALLS
        left -= wanted
        if not wanted or first + wanted > count or left < 0:
            raise EnvelopeError("malformed", "Chunks were asked for that the file does not have.")
        wires.send_chunks(wire, file, first, wanted, size_bytes)


async def _exchange(
    stream: FramedStream,
    header: BlobHeader,
    *,
    work: Callable[[Wire], None],
    bytes_max: int,
    first: int = 0,
    chunk_hashes: bytes | None = None,
    rate: Rate | None,
) -> None:
    """Answer the header and do the work on whichever connection the client takes."""
    gate = stream.stream.gate if isinstance(stream.stream, OverlayStream) else None
    ticket = gate.issue(work, rate=rate) if gate is not None and header.direct else None
    try:
        token = None if ticket is None else ticket.token
        reply = BlobReply(state="ready", first=first, token=token)
        await stream.send(Kind.HEADER, msgspec.json.encode(reply))
        if chunk_hashes is not None:
            await stream.send(Kind.DATA, chunk_hashes)
        frame = None
        if ticket is not None and gate is not None:
            frame = await _bulk_or_lane(stream, gate, ticket)
            if frame is None:
                return
        if rate is None and gate is not None:
            rate = gate.rate
        async with lane_wire(stream, first=frame, bytes_max=lambda _: bytes_max, rate=rate) as lane:
            try:
                await in_thread(partial(work, lane.wire), stop=lane.wire.stop)
            except Cut:
                if lane.ended:
                    raise RefusedError(
                        "output_mismatch", "The file is shorter than announced."
                    ) from None
                raise
    finally:
        if ticket is not None and gate is not None:
            gate.revoke(ticket)


async def _bulk_or_lane(stream: FramedStream, gate: BulkGate, ticket: Ticket) -> Frame | None:
    """None once the work was done on a direct connection, or the lane's first frame instead."""
    found: Frame | None = None

    async def watch_lane(whole: trio.CancelScope) -> None:
        nonlocal found
        frame = await stream.receive()
        if frame is not None and frame.kind == Kind.REFUSAL:
            raise read_refusal(frame.body)
        if frame is not None and frame.kind not in (Kind.DATA, Kind.END):
            raise EnvelopeError("malformed", "Not a part of a file.")
        if frame is not None and not ticket.claimed.is_set():
            found = frame
            gate.revoke(ticket)
            whole.cancel()
        elif frame is None or frame.kind == Kind.END:
            if not ticket.claimed.is_set():
                raise trio.BrokenResourceError("the lane was cut")
            ticket.stop()  # the client has all it wants, or is gone
        else:
            raise EnvelopeError("malformed", "Data came on the lane and beside it.")

    async with together() as nursery:
        nursery.start_soon(watch_lane, nursery.cancel_scope)
        with trio.move_on_after(TOKEN_S + 2 * DIAL_S):
            await ticket.claimed.wait()
        if not ticket.claimed.is_set():
            raise Stalled("Nobody came for the file.")
        await ticket.done.wait()
    if found is None and ticket.error is not None:
        raise ticket.error
    return found


@contextmanager
def _cuts_as_broken() -> Iterator[None]:
    try:
        yield
    except Stalled:
        raise RefusedError("unreachable", "The other side stalled in a transfer.") from None
    except Cut as error:
        raise trio.BrokenResourceError(str(error)) from None


@asynccontextmanager
async def _turn(stream: FramedStream) -> AsyncGenerator[None]:
    """One of the transfers at a time of a peer and of all. Raises RefusedError `busy`."""
    try:
        turns = _turns.get()
    except LookupError:
        turns = Turns()
        _turns.set(turns)
    peer = stream.stream.peer if isinstance(stream.stream, OverlayStream) else ""
    async with turns.turn(peer):
        with _cuts_as_broken():
            yield
