"""A lane as a blocking connection: its DATA frames pumped through a socket pair.

For a peer that cannot be dialled. Threads see a socket either way.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress

import trio

from lumaris_overlay.bulk import wire as wires
from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.bulk.threads import together
from lumaris_overlay.bulk.wire import Stalled, Wire
from lumaris_overlay.framed_stream import FramedStream, read_refusal
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.frames import Frame, Kind
from lumaris_protocol.limits import BLOB_CHUNK_BYTES_MAX


class LaneWire:
    """A lane's thread end, and what came of the lane."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.ended = False  # the peer said END


@asynccontextmanager
async def lane_wire(
    stream: FramedStream,
    *,
    first: Frame | None = None,
    bytes_max: Callable[[Wire], int],
    rate: Rate | None = None,
) -> AsyncGenerator[LaneWire]:
    """A wire over a lane while the context lasts; then what was sent is flushed.

    A peer that ends, cuts or breaks the rules is raised in the body: RemoteError, or
    trio.BrokenResourceError. `bytes_max` says how much the peer may have sent by now.
    """
    near, far = socket.socketpair()
    near.setblocking(False)
    lane = LaneWire(Wire(far, rate=rate))
    with trio.socket.from_stdlib_socket(near) as sock:
        try:
            async with together() as nursery:
                nursery.start_soon(_inward, stream, sock, lane, first, bytes_max)
                flushed = trio.Event()
                nursery.start_soon(_outward, sock, stream, flushed)
                yield lane
                far.close()
                with trio.move_on_after(wires.BUFFER_STALLS * wires.STALL_S):
                    await flushed.wait()
                if not flushed.is_set():
                    raise Stalled("The other side does not take the last bytes.")
        finally:
            lane.wire.stop()
            far.close()


async def _inward(
    stream: FramedStream,
    sock: trio.socket.SocketType,
    lane: LaneWire,
    frame: Frame | None,
    bytes_max: Callable[[Wire], int],
) -> None:
    """Lane to thread."""
    received = 0
    while True:
        frame = frame or await stream.receive()
        if frame is None:
            raise trio.BrokenResourceError("the lane was cut")
        if frame.kind == Kind.REFUSAL:
            raise read_refusal(frame.body)
        if frame.kind == Kind.END:
            lane.ended = True
            with suppress(OSError):  # the thread has hung up
                sock.shutdown(socket.SHUT_WR)
            return
        if frame.kind != Kind.DATA:
            raise EnvelopeError("malformed", "Not a part of a file.")
        received += len(frame.body)
        if received > bytes_max(lane.wire):
            raise EnvelopeError("oversize", "The file is longer than announced.")
        await send_all(sock, frame.body)
        frame = None


async def _outward(sock: trio.socket.SocketType, stream: FramedStream, flushed: trio.Event) -> None:
    """Thread to lane, until the thread's end is closed."""
    while data := await sock.recv(BLOB_CHUNK_BYTES_MAX):
        await stream.send(Kind.DATA, data)
    flushed.set()


async def send_all(sock: trio.socket.SocketType, data: bytes) -> None:
    """All of it, to a thread that may have hung up."""
    view = memoryview(data)
    try:
        while view:
            view = view[await sock.send(view) :]
    except OSError:
        raise trio.BrokenResourceError("the transfer has ended") from None
