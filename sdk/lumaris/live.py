"""A running job from the buyer's side: its log, its input, commands and ports inside it.

All of it works from any program with the buyer's key, not only from the one that runs the job:
each opens streams of its own to the seller. `open_live` gives such a program its overlay.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import trio

from lumaris import daemon
from lumaris.jobs import Source, Stream
from lumaris.profile import Profile
from lumaris.store import Store
from lumaris_overlay.framed_stream import FramedStream, read_refusal
from lumaris_overlay.links import open_links
from lumaris_overlay.ports import Overlay
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.frames import Frame, Kind
from lumaris_protocol.limits import GRACE_S_MAX, KIB
from lumaris_protocol.protocols import ATTACH, LOG_STREAMS, AttachHeader, AttachReply, Resize

# A seller answers within this; a command may have to be started first.
_BEGIN_S: Final = 30
# A cut stream is opened again until nothing came for so long.
_RECONNECT_S: Final = 30.0
_RETRY_S: Final = 0.5
# Connections that a forwarded port carries at once; a seller takes few streams of one session.
_CONNECTIONS_MAX: Final = 24
_PIECE_BYTES: Final = 64 * KIB
_POLL_S: Final = 0.1
# A job that was asked to end has so much longer than its grace.
_CANCEL_S: Final = 20
_LOST: Final = (trio.BrokenResourceError, trio.ClosedResourceError)
_CUT: Final = ("unreachable", "truncated", "timeout", "overlay_failed")

Show = Callable[[Stream, bytes], Awaitable[None]]


@dataclass(frozen=True)
class Place:
    """Where a job runs: the order's number in a session with a seller."""

    job: str
    seller: str
    session: str
    n: int


@asynccontextmanager
async def open_live(profile: Profile) -> AsyncGenerator[Overlay]:
    """The overlay of a program that only reaches into jobs. Raises LumarisError."""
    async with (
        daemon.attached(profile) as inner,
        open_links(inner, listen=None, answer=False) as overlay,
    ):
        yield overlay


async def find_place(store: Store, job: str) -> Place:
    """Where a job of ours runs now. Raises LumarisError `not_found`, `not_attached`."""
    row = await store.job(job)
    if row is None:
        raise _unknown(job)
    if row["ended_at"] is not None:
        raise _ended(job, str(row["reason"] or row["state"]))
    if not row["n"]:
        raise LumarisError(
            "not_attached", "The job does not run yet.", hint="Try again in a moment."
        )
    return Place(job, seller=row["seller"], session=row["session"], n=row["n"])


def _unknown(job: str) -> LumarisError:
    text = f"There is no job {job[:80]!r} here."
    return LumarisError("not_found", text, hint="`lumaris job ls` lists jobs.")


def _ended(job: str, why: str = "") -> LumarisError:
    text = f"The job has ended: {why}." if why else "The job has ended."
    return LumarisError("not_attached", text, hint=f"`lumaris job logs {job}` shows its output.")


async def wait_until_ended(store: Store, job: str) -> dict[str, object]:
    """The job's row, once the program that runs it has noted its end."""
    while True:
        row = await store.job(job)
        if row is None or row["ended_at"] is not None:
            return row or {}
        await trio.sleep(_POLL_S)


async def cancel(store: Store, job: str, *, grace_s: int = 0) -> dict[str, object]:
    """End a job that any program of this buyer runs, and wait for its end; its row.

    Its guest is asked to end and killed `grace_s` later. Raises LumarisError `not_found`,
    `not_attached` for a job that has ended, `timeout` when the program does not answer.
    """
    if not 0 <= grace_s <= GRACE_S_MAX:
        raise LumarisError("usage", f"The grace is 0 to {GRACE_S_MAX} seconds.")
    await store.end_orphan_jobs(now=time.time())
    row = await store.job(job)
    if row is None:
        raise _unknown(job)
    if row["ended_at"] is not None:
        raise _ended(job, str(row["reason"] or row["state"]))
    await store.ask_cancel(job, grace_s, now=time.time())
    with trio.move_on_after(grace_s + _CANCEL_S):
        return await wait_until_ended(store, job)
    raise LumarisError("timeout", "The program that runs the job does not answer.")


# --- the log ---


async def follow_log(overlay: Overlay, place: Place, show: Show, *, offset: int = 0) -> int:
    """Pass on what the job prints from `offset` on until it has ended; the log's size.

    A cut stream is taken up again where it broke off. Raises LumarisError: `not_attached` and
    `not_found` when the order is over, `unreachable` when the seller stays away.
    """
    heard_at = trio.current_time()

    async def pass_on(stream: Stream, data: bytes) -> None:
        nonlocal offset, heard_at
        offset, heard_at = offset + len(data), trio.current_time()
        await show(stream, data)

    while True:
        try:
            await _read_log(overlay, place, offset, pass_on)
        except _LOST as error:
            cut = LumarisError("unreachable", f"The stream was cut: {error!r}.")
        except LumarisError as error:
            if error.code not in _CUT:
                raise
            cut = error
        else:
            return offset
        if trio.current_time() - heard_at > _RECONNECT_S:
            raise cut
        await trio.sleep(_RETRY_S)


async def _read_log(overlay: Overlay, place: Place, offset: int, show: Show) -> None:
    async with _attached(overlay, place, op="log", offset=offset) as framed:
        while True:
            frame = await framed.receive()
            if frame is not None and frame.kind == Kind.END:
                return
            if frame is None:
                raise EnvelopeError("truncated", "The other side ended the stream.")
            await show(*_output(frame))


# --- standard input ---


async def send_stdin(overlay: Overlay, place: Place, source: Source) -> None:
    """Feed a job's standard input to its end, as fast as the guest takes it.

    Raises LumarisError: `not_attached` when the job or its input ended before.
    """
    failure: LumarisError | None = None
    async with _attached(overlay, place, op="stdin") as framed, trio.open_nursery() as nursery:
        nursery.start_soon(_feed, framed, source)
        try:
            await framed.expect_header(AttachReply)
        except LumarisError as error:
            failure = error
        except _LOST:
            failure = LumarisError("unreachable", "The seller went away.")
        nursery.cancel_scope.cancel()
    if failure is not None:
        if failure.code == "truncated":
            raise _ended(place.job)
        raise failure


async def _feed(framed: FramedStream, source: Source) -> None:
    try:
        while data := await source():
            for start in range(0, len(data), _PIECE_BYTES):
                await framed.send(Kind.DATA, data[start : start + _PIECE_BYTES])
        await framed.send(Kind.END)
    except _LOST:
        return  # what the seller says about it is read beside this


# --- commands ---


class Command:
    """A further command in a job's sandbox. Made by `open_command`; leaving that kills it."""

    def __init__(self, framed: FramedStream, job: str) -> None:
        self._framed, self._job = framed, job
        self.exit_status: int | None = None

    async def send(self, data: bytes) -> None:
        """Bytes for its standard input. Raises trio.BrokenResourceError when it is gone."""
        for start in range(0, len(data), _PIECE_BYTES):
            await self._framed.send(Kind.DATA, data[start : start + _PIECE_BYTES])

    async def send_eof(self) -> None:
        """End its standard input."""
        await self._framed.send(Kind.END)

    async def resize(self, rows: int, columns: int) -> None:
        """Its terminal has another size now."""
        size = Resize(rows=max(1, rows), columns=max(1, columns))
        await self._framed.send(Kind.HEADER, msgspec.json.encode(size))

    async def receive(self) -> tuple[Stream, bytes] | None:
        """Its next output; None after its end, when `exit_status` is known.

        Raises LumarisError: `not_attached` when the job ended under it.
        """
        try:
            frame = await self._framed.receive()
        except _LOST:
            raise LumarisError("unreachable", "The seller went away.") from None
        if frame is None:
            raise _ended(self._job)
        if frame.kind == Kind.HEADER:
            self.exit_status = _exit_status(frame.body)
            return None
        return _output(frame)


@asynccontextmanager
async def open_command(
    overlay: Overlay,
    place: Place,
    command: tuple[str, ...],
    *,
    tty: bool = False,
    rows: int = 24,
    columns: int = 80,
) -> AsyncGenerator[Command]:
    """Run another command in a job's sandbox while the context lasts.

    Raises LumarisError: `not_supported`, `not_attached`, `bad_command`.
    """
    async with _attached(
        overlay, place, op="exec", command=command, tty=tty, rows=rows, columns=columns
    ) as framed:
        yield Command(framed, place.job)


# --- ports ---


async def forward(
    overlay: Overlay,
    place: Place,
    port: int,
    *,
    local: tuple[str, int] = ("127.0.0.1", 0),
    ready: Callable[[int], None],
    report: Callable[[LumarisError], None],
) -> None:
    """Listen locally and join each connection to `port` inside the job, until cancelled.

    `ready` gets the local port, once the seller has shown that the job has ports; `report` why a
    connection was not made. Returns when a connection finds that the job has ended. Raises
    LumarisError `port_in_use`, or why the job's ports cannot be reached at all.
    """
    await _ask_for_ports(overlay, place)
    try:
        listeners = await trio.open_tcp_listeners(local[1], host=local[0])
    except OSError as error:
        raise LumarisError("port_in_use", f"{local[0]}:{local[1]}: {error.strerror}.") from None
    open_count = 0
    over = trio.Event()

    async def join(client: trio.SocketStream) -> None:
        nonlocal open_count
        if open_count >= _CONNECTIONS_MAX:
            return
        open_count += 1
        try:
            await _join(overlay, place, port, client)
        except Exception as error:
            cause = _cause(error)
            if isinstance(cause, LumarisError):
                report(cause)
                if cause.code in ("not_attached", "not_supported"):
                    over.set()
            elif not isinstance(cause, (*_LOST, OSError)):
                raise
        finally:
            open_count -= 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, join, listeners)
        ready(listeners[0].socket.getsockname()[1])
        await over.wait()
        nursery.cancel_scope.cancel()


async def _ask_for_ports(overlay: Overlay, place: Place) -> None:
    """Raises LumarisError when this job has no ports for us.

    Port 0 connects to nothing: a server in the guest may well wait for one connection only.
    """
    async with _attached(overlay, place, op="forward", port=0):
        return


async def _join(overlay: Overlay, place: Place, port: int, client: trio.SocketStream) -> None:
    async with _attached(overlay, place, op="forward", port=port) as framed:

        async def upward() -> None:
            while data := await client.receive_some(_PIECE_BYTES):
                await framed.send(Kind.DATA, bytes(data))
            await framed.send(Kind.END)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(upward)
            while (frame := await framed.receive()) is not None and frame.kind == Kind.DATA:
                await client.send_all(frame.body)
            if frame is not None and frame.kind == Kind.REFUSAL:
                raise read_refusal(frame.body)
            await client.send_eof()


# --- streams ---


@asynccontextmanager
async def _attached(overlay: Overlay, place: Place, **header: Any) -> AsyncGenerator[FramedStream]:
    """A stream to the order that the seller has answered. Raises LumarisError."""
    asked = AttachHeader(session=place.session, n=place.n, **header)
    with trio.CancelScope(deadline=trio.current_time() + _BEGIN_S) as opening:
        framed = FramedStream(await overlay.open_stream(place.seller, ATTACH))
        try:
            try:
                await framed.send(Kind.HEADER, msgspec.json.encode(asked))
                await framed.expect_header(AttachReply)
            except _LOST:
                raise LumarisError("unreachable", "The seller went away.") from None
            opening.deadline = float("inf")
            yield framed
        finally:
            await framed.aclose()
    if opening.cancelled_caught:
        raise LumarisError("timeout", "The seller does not answer.")


def _output(frame: Frame) -> tuple[Stream, bytes]:
    if frame.kind == Kind.REFUSAL:
        raise read_refusal(frame.body)
    stream = LOG_STREAMS.get(frame.body[0]) if frame.kind == Kind.DATA and frame.body else None
    if stream is None:
        raise EnvelopeError("malformed", "The seller sent something else than output.")
    return stream, frame.body[1:]


def _exit_status(body: bytes) -> int:
    try:
        return msgspec.json.decode(body, type=AttachReply).exit_status
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EnvelopeError("malformed", f"A bad header: {error}") from None


def _cause(error: Exception) -> Exception:
    """The one failure of a group that says most: what was refused, then a bug, then a loss."""
    if not isinstance(error, ExceptionGroup):
        return error
    leaves = [_cause(part) for part in error.exceptions]
    for leaf in leaves:
        if isinstance(leaf, LumarisError) or not isinstance(leaf, (*_LOST, OSError)):
            return leaf
    return leaves[0]
