"""Sending a file to a peer that waits for it."""

from __future__ import annotations

import os
import stat
from functools import partial
from pathlib import Path

import trio

from lumaris_overlay.bulk import ask as asking
from lumaris_overlay.bulk import wire as wires
from lumaris_overlay.bulk.ask import Exchange, Patience, Source, ask
from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.bulk.threads import in_thread, together
from lumaris_overlay.bulk.wire import Cut, Stalled, Wire
from lumaris_overlay.ports import Overlay
from lumaris_protocol.errors import EnvelopeError, LumarisError, RefusedError, RemoteError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import BLOB_CHUNK_BYTES_MAX, CHUNK_BYTES
from lumaris_protocol.protocols import BlobHeader


async def put_file(
    overlay: Overlay,
    peer: str,
    session: str,
    source: Path,
    *,
    sha256: str,
    rate: Rate | None = None,
) -> None:
    """Send a file to the seller of a session.

    Raises RemoteError, LumarisError `bad_input` when the file is not what it was, or OSError.
    """
    file = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise LumarisError("bad_input", f"{source.name} is not a plain file.")
        header = BlobHeader(session=session, op="put", sha256=sha256, size_bytes=found.st_size)
        await _Upload(Source(overlay, peer, session), file, header, rate).run()
    except EOFError:
        raise LumarisError("bad_input", f"{source.name} changed while it was sent.") from None
    finally:
        os.close(file)


class _Upload:
    def __init__(self, to: Source, file: int, header: BlobHeader, rate: Rate | None) -> None:
        self._to, self._file, self._header, self._rate = to, file, header, rate
        self._count = wires.chunks_of(header.size_bytes)
        self._first = 0  # what the seller said it holds

    async def run(self) -> None:
        """Until the seller has stored it, over as many connections as make progress."""
        tries, furthest, patience = 0, 0, None
        while True:
            try:
                await self._attempt(direct=tries < asking.DIRECT_TRIES)
                return
            except Stalled:
                raise RefusedError("unreachable", "The seller stalled in an upload.") from None
            except Cut:
                failure: LumarisError = RefusedError(
                    "unreachable", "The seller went away during an upload."
                )
                if self._first > furthest:
                    tries, furthest = 0, self._first
            except RemoteError as error:
                if error.code in asking.RETRY_CODES:
                    patience = patience or Patience()
                    if await patience.wait():
                        continue
                    raise
                # What an earlier attempt left may be wrong; the seller has removed it then.
                if error.code != "output_mismatch" or not self._first:
                    raise
                failure = error
            patience = None
            tries += 1
            if tries > asking.RETRIES:
                raise failure
            await asking.pause(tries)

    async def _attempt(self, *, direct: bool) -> None:
        self._first = 0
        async with ask(self._to, self._header, direct=direct) as exchange:
            if exchange.reply.state == "stored":
                return
            if exchange.reply.first > self._count:
                raise EnvelopeError("malformed", "The seller holds more than the file has.")
            self._first = exchange.reply.first
            try:
                await self._send_and_hear(exchange)
            except Cut:
                await exchange.raise_last_word()
                raise

    async def _send_and_hear(self, exchange: Exchange) -> None:
        """Send, while listening: the seller may refuse before the end."""
        sent = trio.Event()
        async with together() as nursery:
            nursery.start_soon(self._send, exchange, sent)
            answering = trio.CancelScope()
            nursery.start_soon(_limit_after, sent, answering)
            with answering:
                try:
                    await exchange.stream.expect_header(type(exchange.reply))
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise Cut(str(error)) from None
            if answering.cancelled_caught:
                raise Stalled("The seller does not answer.")

    async def _send(self, exchange: Exchange, sent: trio.Event) -> None:
        wire = await exchange.dial(self._rate)
        if wire is None:
            await self._send_on_lane(exchange)
        else:
            try:
                await in_thread(partial(self._send_direct, wire), stop=wire.stop)
                sent.set()
                await trio.sleep_forever()  # closing could overtake what is still on its way
            finally:
                wire.close()
        sent.set()

    def _send_direct(self, wire: Wire) -> None:
        count = self._count - self._first
        wires.send_chunks(wire, self._file, self._first, count, self._header.size_bytes)

    async def _send_on_lane(self, exchange: Exchange) -> None:
        size_bytes, at = self._header.size_bytes, self._first * CHUNK_BYTES
        while at < size_bytes:
            length = min(BLOB_CHUNK_BYTES_MAX, size_bytes - at)
            data = await trio.to_thread.run_sync(os.pread, self._file, length, at)
            if len(data) != length:
                raise EOFError
            if self._rate is not None:
                await trio.sleep(self._rate.reserve(length))
            await _in_time(exchange, Kind.DATA, data)
            at += length
        await _in_time(exchange, Kind.END, b"")


async def _in_time(exchange: Exchange, kind: Kind, data: bytes) -> None:
    try:
        # The peer gives room as it reads, in steps of half a MiB.
        with trio.fail_after(wires.CHUNK_STALLS * wires.STALL_S):
            await exchange.stream.send(kind, data)
    except trio.TooSlowError:
        raise Stalled("The seller takes nothing.") from None
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise Cut(str(error)) from None


async def _limit_after(sent: trio.Event, scope: trio.CancelScope) -> None:
    await sent.wait()
    scope.deadline = trio.current_time() + wires.BUFFER_STALLS * wires.STALL_S
