"""`/lumaris/attach/1`: a buyer reaches into its own running order.

The log, standard input, further commands and ports inside the sandbox each have a stream of their
own. Whoever reads slowly is waited for on that stream alone; every stream ends with its order.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import msgspec
import trio

from lumaris_node.executors.port import Attachment, Executor, Handle
from lumaris_node.order_log import OrderLog
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.tasks import StrangerLog
from lumaris_protocol.errors import EnvelopeError, LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import KIB
from lumaris_protocol.messages.execution import WorkOrder
from lumaris_protocol.protocols import LOG_STREAMS, AttachHeader, AttachReply, Resize

log = logging.getLogger(__name__)

_HEADER_S: Final = 10
# A command must have started within this.
_BEGIN_S: Final = 20
# Whoever takes no frame for so long has gone, or wants to hold what is ours.
_STALL_S: Final = 60
# After the order's end its log may be read for so long.
LOG_LINGER_S: Final = 10
# Each is a task and a few frames; a browser opens some ten connections to one page.
_STREAMS_PER_SESSION_MAX: Final = 32
_STREAMS_MAX: Final = 512
# Each is a process of the job besides.
_COMMANDS_PER_SESSION_MAX: Final = 8
_PIECE_BYTES: Final = 64 * KIB
_LOST: Final = (trio.BrokenResourceError, trio.ClosedResourceError)

_NUMBERS: Final = {stream: bytes([number]) for number, stream in LOG_STREAMS.items()}
# Joins a port of the network namespace that a process is in, within bounds of its own.
Connect = Callable[[int, int], Awaitable[trio.abc.HalfCloseableStream]]


class LiveOrder(Protocol):
    """The order that a session works on."""

    order: WorkOrder
    log: OrderLog
    ended: trio.Event

    @property
    def executor(self) -> Executor: ...

    def live_handle(self) -> Handle: ...


class LiveSession(Protocol):
    """What attaching needs of a session."""

    session: str
    buyer: str

    def find_live(self, n: int) -> LiveOrder: ...


class LiveDesk:
    """Answers attach streams. `find` gives the open session of an id, or None."""

    def __init__(self, find: Callable[[str], LiveSession | None], *, connect: Connect) -> None:
        self._find, self._connect = find, connect
        self._streams: Counter[tuple[str, str]] = Counter()  # by session and operation
        self._strangers = StrangerLog(log)

    async def serve(self, stream: OverlayStream) -> None:
        """One stream to an order; every refusal is told to the buyer."""
        framed = FramedStream(stream)
        try:
            await self._serve(framed, stream.peer)
        except Exception as error:
            await self._answer_failure(_cause(error), framed, stream.peer)
        finally:
            await framed.aclose()

    async def _serve(self, framed: FramedStream, peer: str) -> None:
        with trio.fail_after(_HEADER_S):
            header = await framed.expect_header(AttachHeader)
        session = self._find(header.session)
        if session is None or session.buyer != peer:
            raise RefusedError("not_found", "No open session of yours has that id.")
        with self._counted(header):
            await self._attach(session.find_live(header.n), header, framed)

    async def _answer_failure(self, error: Exception, framed: FramedStream, peer: str) -> None:
        match error:
            case LumarisError():
                self._strangers.note(peer, error.code, error.message)
                await framed.refuse(error)
            case trio.TooSlowError():
                await framed.refuse(LumarisError("timeout"))
            case trio.BrokenResourceError() | trio.ClosedResourceError():
                log.info("stream to an order ended early peer=%s error=%r", peer, error)
            case _:
                log.error("stream to an order failed peer=%s", peer, exc_info=error)
                await framed.refuse(LumarisError("platform_error"))

    @contextmanager
    def _counted(self, header: AttachHeader) -> Iterator[None]:
        of_session = {op: self._streams[header.session, op] for op in ("log", "exec", "forward")}
        limits = _STREAMS_PER_SESSION_MAX, _COMMANDS_PER_SESSION_MAX, _STREAMS_MAX
        counts = sum(of_session.values()), of_session["exec"], self._streams.total()
        full = [count >= limit for count, limit in zip(counts, limits, strict=True)]
        if full[0] or full[2] or (full[1] and header.op == "exec"):
            raise RefusedError("busy", "Too many streams to orders are open.")
        key = header.session, header.op
        if header.op == "stdin" and self._streams[key]:
            raise RefusedError(
                "not_attached", "Another stream has its standard input.", hint="End that one first."
            )
        self._streams[key] += 1
        try:
            yield
        finally:
            self._streams[key] -= 1
            if not self._streams[key]:
                del self._streams[key]

    async def _attach(self, run: LiveOrder, header: AttachHeader, framed: FramedStream) -> None:
        if header.op == "log":
            with run.log.reading():
                await _with_client(framed, _send_log, run, header.offset, framed)
            return
        if header.op == "stdin" and not run.order.stdin:
            raise RefusedError(
                "not_attached",
                "The order was sent without standard input.",
                hint="Start the job with `lumaris run --stdin-later`.",
            )
        handle = run.live_handle()
        tasks = {"stdin": self._stdin, "exec": self._exec, "forward": self._forward}
        async with trio.open_nursery() as nursery:

            async def end_with_order() -> None:
                await run.ended.wait()
                raise RefusedError(
                    "not_attached",
                    "The order has ended.",
                    hint="`lumaris job logs JOB` shows its output.",
                )

            nursery.start_soon(end_with_order)
            await tasks[header.op](run.executor, handle, header, framed)
            nursery.cancel_scope.cancel()

    # --- standard input ---

    async def _stdin(
        self, executor: Executor, handle: Handle, _: AttachHeader, framed: FramedStream
    ) -> None:
        """Its buffer is the guest's pipe: the next frame is read when the last one is written."""
        await _say(framed, AttachReply(state="ready"))
        while (data := await _next_data(framed)) is not None:
            if data:
                await executor.write_stdin(handle, data)
        await executor.write_stdin(handle, b"")
        await _say(framed, AttachReply(state="exited"))

    # --- commands ---

    async def _exec(
        self, executor: Executor, handle: Handle, header: AttachHeader, framed: FramedStream
    ) -> None:
        if not header.command:
            raise RefusedError("bad_command", "A command has at least the name of its program.")
        with trio.fail_after(_BEGIN_S):
            attachment = await executor.attach(
                handle,
                header.command,
                tty=header.tty,
                rows=header.rows or 24,
                columns=header.columns or 80,
            )
        try:
            await _say(framed, AttachReply(state="ready"))
            status = await self._converse(attachment, framed)
            await _say(framed, AttachReply(state="exited", exit_status=status))
        finally:
            with trio.CancelScope(shield=True):
                await attachment.aclose()

    async def _converse(self, attachment: Attachment, framed: FramedStream) -> int:
        """Pass on what both sides say until the command has ended; its status as a shell's."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_listen, attachment, framed)
            while (output := await attachment.receive()) is not None:
                stream, data = output
                for start in range(0, len(data), _PIECE_BYTES):
                    piece = data[start : start + _PIECE_BYTES]
                    await _send(framed, Kind.DATA, _NUMBERS[stream] + piece)
            status = await attachment.exit_status()
            nursery.cancel_scope.cancel()
        return status & 0xFF if status >= 0 else 128 + (-status & 0x7F)

    # --- ports ---

    async def _forward(
        self, executor: Executor, handle: Handle, header: AttachHeader, framed: FramedStream
    ) -> None:
        pid = await executor.network_pid(handle)
        if not header.port:  # asks only whether the job has ports
            await _say(framed, AttachReply(state="ready"))
            return
        inner = await self._connect(pid, header.port)
        try:
            await _say(framed, AttachReply(state="ready"))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_inward, framed, inner)
                await _outward(inner, framed)
        finally:
            await trio.aclose_forcefully(inner)


async def _with_client(
    framed: FramedStream, work: Callable[..., Awaitable[None]], *arguments: object
) -> None:
    """Do this while the client, which has nothing to say, is there."""
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            frame = await framed.receive()
            if frame is not None:
                raise EnvelopeError("malformed", "A reader of a log says nothing.")
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        await work(*arguments)
        nursery.cancel_scope.cancel()


async def _send_log(run: LiveOrder, offset: int, framed: FramedStream) -> None:
    kept = run.log
    if offset > kept.size:
        raise RefusedError("not_found", f"The log has {kept.size} bytes so far.")
    await _say(framed, AttachReply(state="ready"))
    while await kept.more(offset):
        for stream, data in await kept.read(offset):
            await _send(framed, Kind.DATA, _NUMBERS[stream] + data)
            offset += len(data)
    await _send(framed, Kind.END)


async def _listen(attachment: Attachment, framed: FramedStream) -> None:
    """What the client says to a command. Raises trio.BrokenResourceError when it went away."""
    open_ = True
    while True:
        frame = await framed.receive()
        if frame is None:
            raise trio.BrokenResourceError("the client went away")
        if frame.kind == Kind.HEADER:
            size = _resize(frame.body)
            await attachment.resize(size.rows, size.columns)
        elif frame.kind == Kind.DATA and open_:
            try:
                await attachment.send(frame.body)
            except _LOST:
                open_ = False  # it reads no more, and may still print
        elif frame.kind == Kind.END and open_:
            open_ = False
            await attachment.send_eof()
        elif frame.kind not in (Kind.DATA, Kind.END):
            raise EnvelopeError("malformed", f"A frame of kind {frame.kind.name} came instead.")


async def _inward(framed: FramedStream, inner: trio.abc.HalfCloseableStream) -> None:
    while (data := await _next_data(framed)) is not None:
        await inner.send_all(data)
    await inner.send_eof()


async def _outward(inner: trio.abc.HalfCloseableStream, framed: FramedStream) -> None:
    while data := await inner.receive_some(_PIECE_BYTES):
        await _send(framed, Kind.DATA, bytes(data))
    await _send(framed, Kind.END)


async def _next_data(framed: FramedStream) -> bytes | None:
    """The next bytes, None at their end. Raises trio.BrokenResourceError when the client left."""
    frame = await framed.receive()
    if frame is None:
        raise trio.BrokenResourceError("the client went away")
    if frame.kind == Kind.END:
        return None
    if frame.kind != Kind.DATA:
        raise EnvelopeError("malformed", f"A frame of kind {frame.kind.name} came instead.")
    return frame.body


async def _send(framed: FramedStream, kind: Kind, body: bytes = b"") -> None:
    with trio.fail_after(_STALL_S):
        await framed.send(kind, body)


async def _say(framed: FramedStream, reply: AttachReply) -> None:
    await _send(framed, Kind.HEADER, msgspec.json.encode(reply))


def _resize(body: bytes) -> Resize:
    try:
        return msgspec.json.decode(body, type=Resize)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EnvelopeError("malformed", f"A bad size: {error}") from None


def _cause(error: Exception) -> Exception:
    """The one failure of a group that says most: a bug of ours, then a refusal, then a loss."""
    if not isinstance(error, ExceptionGroup):
        return error
    leaves = [_cause(part) for part in error.exceptions]
    expected = (LumarisError, trio.TooSlowError, *_LOST)
    for leaf in leaves:
        if not isinstance(leaf, expected):
            return leaf
    return next((leaf for leaf in leaves if isinstance(leaf, LumarisError)), leaves[0])
