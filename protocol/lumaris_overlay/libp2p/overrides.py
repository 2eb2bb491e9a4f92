"""Corrections of libp2p 0.8.1, each for one fault; `tests/overlay/test_canaries.py` shows each.

What can be a subclass is one and is handed in by `host.py`, which builds the host from these parts
instead of calling `libp2p.new_host`. Two names are replaced inside libp2p's modules (`install`),
because its muxer names its stream class itself and every reader imports `read_exactly` by name.
"""

from __future__ import annotations

import logging
import math
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio
from libp2p.abc import IMuxedConn
from libp2p.connection_types import ConnectionType
from libp2p.host.basic_host import BasicHost
from libp2p.io import utils as io_utils
from libp2p.io.exceptions import ConnectionClosedError, IncompleteReadError
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer import muxer_multistream
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux import yamux
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from lumaris_overlay.libp2p.newcomers import Newcomers
from lumaris_overlay.libp2p.upgrader import DialBackSeen
from lumaris_overlay.tasks import StrangerLog, shielded
from lumaris_protocol.limits import (
    HANDSHAKES_MAX,
    OVERLAY_CONNECTIONS_MAX,
    STREAMS_BURST_PER_PEER,
    STREAMS_PER_S_PER_PEER,
)

logger = logging.getLogger(__name__)
strangers = StrangerLog(logger)

# A stream's receive window grows to this; libp2p's 16 MiB would let few streams fill our memory.
WINDOW_BYTES_MAX = 2 * 1024 * 1024
_FRAME_BYTES = yamux.MAX_MESSAGE_SIZE - yamux.HEADER_SIZE
_RESET_S = 1.0
_NEGOTIATE_S = 5
# Writers wake at once when the window opens; this only bounds how late they see a closed stream.
_CLOSED_CHECK_S = 0.5
# An honest peer opens a few streams at a time, and negotiates each within one round trip.
_NEGOTIATING_MAX = 8
# A frame is 64 KiB at most: a peer that does not take one in this time reads no more.
_FRAME_S = 8.0
# Frames without data whose writers were cancelled: a few for each stream, 12 bytes each.
_OWED_MAX = 1_024
# Close at once and forget: a refused peer must not leave us a socket that waits for minutes.
_LINGER_NOT = struct.pack("ii", 1, 0)


class WindowViolation(trio.TooSlowError):
    """A peer sent more than its window. The muxer closes the connection on a TooSlowError."""


class BoundedStream(yamux.YamuxStream):
    """A muxed stream that enforces its receive window and never gives up on a slow reader.

    The stock stream only logs a peer that ignores the window, sends a window update for every
    read, polls for window every 10 ms, and fails a write after 5 s without window.
    """

    def __init__(self, stream_id: int, conn: yamux.Yamux, is_initiator: bool) -> None:
        self._room = trio.Event()
        self._order = trio.Lock()
        self._send_window = 0
        self._recv_window = 0
        super().__init__(stream_id, conn, is_initiator)

    @property
    def recv_window(self) -> int:
        """Bytes the peer may still send."""
        return self._recv_window

    @recv_window.setter
    def recv_window(self, value: int) -> None:
        if value < 0:
            strangers.note(str(self.conn.peer_id), "window_violation", value)
            swarm = getattr(self.conn, "swarm", None)  # set when the connection is registered
            if isinstance(swarm, ReleasingSwarm):
                swarm.on_violation(str(self.conn.peer_id))
            raise WindowViolation("the peer sent more than its window")
        self._recv_window = value

    @property
    def send_window(self) -> int:
        """Bytes we may still send."""
        return self._send_window

    @send_window.setter
    def send_window(self, value: int) -> None:
        self._send_window = value
        if value > 0:
            self._room.set()

    async def write(self, data: bytes) -> None:
        """Send all of `data`, waiting for window as long as the caller does."""
        view = memoryview(data)
        async with self._order:
            while view:
                if self.send_closed or self.closed:
                    raise MuxedStreamError("the stream is closed for sending")
                if self.send_window <= 0:
                    self._room = trio.Event()
                    with trio.move_on_after(_CLOSED_CHECK_S):
                        await self._room.wait()
                    continue
                piece = view[: min(self.send_window, _FRAME_BYTES)]
                view = view[len(piece) :]
                self.send_window -= len(piece)
                header = struct.pack(
                    yamux.YAMUX_HEADER_FORMAT, 0, yamux.TYPE_DATA, 0, self.stream_id, len(piece)
                )
                await self.conn._write_frame(header + piece)  # noqa: SLF001 - the muxer's own call

    async def _auto_tune_and_send_window_update(self, *, bytes_read: int = 0) -> None:
        self._pending_recv_release += bytes_read
        if self._pending_recv_release * 2 < self.target_recv_window:
            return
        growth = min(self.target_recv_window, WINDOW_BYTES_MAX - self.target_recv_window)
        credit = self._pending_recv_release + max(growth, 0)
        self.target_recv_window += max(growth, 0)
        self._pending_recv_release = 0
        self.recv_window += credit
        await self.send_window_update(credit)


class WakingEvents(dict[int, trio.Event]):
    """Events by stream, each set when it is let go of: its reader looks again and finds the end.

    Stock, a stream that was reset before its connection closed is forgotten with its reader still
    waiting, and so is the task of the whole connection.
    """

    def pop(self, key: int, *default: Any) -> Any:
        """Let go of one."""
        found = super().pop(key, *default)
        if isinstance(found, trio.Event):
            found.set()
        return found

    def __delitem__(self, key: int) -> None:
        self.pop(key)

    def clear(self) -> None:
        """Let go of all."""
        for event in self.values():
            event.set()
        super().clear()


class WholeFrameYamux(yamux.Yamux):
    """A muxer whose frames are never cut short by the cancellation of one writer.

    A peer that does not read holds its writers for some seconds, and is then given up. And one
    peer's new streams are taken in one after the other, at a rate: each costs us some
    milliseconds, whatever is said on it.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.stream_events = WakingEvents(self.stream_events)
        self.negotiating = trio.Semaphore(_NEGOTIATING_MAX)
        self._turn = -math.inf
        self._owed: list[bytes] = []

    async def wait_turn(self) -> None:
        """Wait until the peer may have another stream; the muxer bounds how many wait."""
        now, step = trio.current_time(), 1 / STREAMS_PER_S_PER_PEER
        self._turn = max(self._turn + step, now - STREAMS_BURST_PER_PEER * step)
        await trio.sleep(max(0.0, self._turn - now))

    async def _write_frame(self, data: bytes) -> None:
        # A writer may be cancelled until its turn comes, and has then sent nothing. After that a
        # frame cut in half, or a Noise nonce used up for bytes not sent, would kill the
        # connection with all its streams; only a peer that does not read at all ends it so.
        bare = len(data) == yamux.HEADER_SIZE
        try:
            if bare and not self._write_lock.locked():
                self._write_lock.acquire_nowait()  # the end of a cancelled task's stream is told
            else:
                await self._write_lock.acquire()
        except trio.Cancelled:
            # Without it the peer would keep the stream: whoever writes sends it too.
            if bare and len(self._owed) < _OWED_MAX:
                self._owed.append(data)
            raise
        try:
            with shielded(_FRAME_S) as scope:
                self._owed.append(data)
                while self._owed:
                    frames, self._owed = b"".join(self._owed), []
                    await self.secured_conn.write(frames)
        finally:
            self._write_lock.release()
        if scope.cancelled_caught:
            strangers.note(str(self.peer_id), "reads_nothing")
            await self.cut()
            raise ConnectionClosedError("the peer takes nothing", transport="tcp")
        # A cancelled writer hears of it here, once its frame has gone out whole.
        await trio.lowlevel.checkpoint()

    async def cut(self) -> None:
        """End the connection at once, whatever was to be sent; our own reader finds the end."""
        raw = self.secured_conn.conn.read_writer.read_write_closer  # type: ignore[attr-defined]
        if isinstance(raw, RawConnection):
            _refuse(raw.stream.stream.socket)  # type: ignore[attr-defined]  # of TrioTCPStream
        else:
            await raw.abort()


class NoAutoConnector(AutoConnector):
    """Dials nobody. The stock one dials every address it ever heard of up to half its maximum."""

    async def maybe_connect(self) -> None:
        """Leave dialling to the overlay, which knows whom it wants."""
        await trio.lowlevel.checkpoint()


class ClosingTCP(TCP):
    """TCP that can close what it dialled; a connection lost in mid-upgrade keeps its socket."""

    def __init__(self) -> None:
        super().__init__()
        self._dialled: list[trio.SocketStream] = []

    async def dial(self, maddr: Any) -> Any:
        """Dial and remember the socket until it is closed."""
        raw: Any = await super().dial(maddr)
        self._dialled = [held for held in self._dialled if held.socket.fileno() >= 0]
        self._dialled.append(raw.stream.stream)
        return raw

    async def close_all(self) -> None:
        """Close every socket that this transport opened."""
        for stream in self._dialled:
            await trio.aclose_forcefully(stream)
        self._dialled.clear()


class ReleasingSwarm(Swarm):
    """A swarm that gives an inbound connection's slot back when that connection ends.

    The stock one holds slot and task until the swarm stops: connection 251 is refused for ever.
    Handshakes that somebody began and left have places of their own, and the oldest makes room.
    Networks that only send strangers are refused before the handshake.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.admitted: Callable[[str], bool] = lambda peer: True
        self.newcomers = Newcomers(self._member_ips)
        self.on_violation: Callable[[str], None] = lambda peer: None
        self._shaking: dict[Any, None] = {}
        self._inbound_limiter = trio.CapacityLimiter(OVERLAY_CONNECTIONS_MAX + HANDSHAKES_MAX)

    def _member_ips(self) -> list[str]:
        found = []
        for peer, held in self.connections.items():
            if not self.admitted(str(peer)):
                continue
            for connection in held:
                if connection.get_connection_type() == ConnectionType.DIRECT:
                    remote = connection.muxed_conn.get_remote_address()  # type: ignore[attr-defined]
                    found.append(str(remote[0]) if remote is not None else "")
        return found

    async def _shake_hands(self, read_write_closer: Any, maddr: Any) -> IMuxedConn:
        while len(self._shaking) >= HANDSHAKES_MAX:
            oldest = next(iter(self._shaking))
            del self._shaking[oldest]
            # Closed and not cancelled: libp2p tidies up after an error only.
            oldest.stream.socket.close()
        self._shaking[read_write_closer] = None
        try:
            return await self.upgrade_inbound_raw_conn(
                RawConnection(read_write_closer, False), maddr
            )
        finally:
            self._shaking.pop(read_write_closer, None)

    async def _do_handle_inbound_connection(
        self, read_write_closer: Any, maddr: Any, failure_event: Any
    ) -> None:
        address = read_write_closer.get_remote_address()
        beginning = self.newcomers.admit(str(address[0]) if address is not None else "")
        if beginning is None:
            _refuse(read_write_closer.stream.socket)
            return
        remote = self._build_remote_multiaddr(read_write_closer)
        if remote is not None and not await self.connection_gate.is_allowed(remote):
            await _close_quietly(read_write_closer)
            return
        try:
            muxed = await self._shake_hands(read_write_closer, maddr)
            if self.admitted(str(muxed.peer_id)):
                beginning.was_member(str(muxed.peer_id))
            async with trio.open_nursery() as nursery:

                async def stop() -> None:
                    await self.manager.wait_finished()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(stop)
                await muxed.event_closed.wait()  # type: ignore[attr-defined]  # of Yamux
                nursery.cancel_scope.cancel()
        except DialBackSeen as error:
            beginning.was_member(str(error))
            logger.debug("dial-back peer=%s", error)
        except Exception as error:
            strangers.note(str(remote).partition("/tcp/")[0], "handshake", error)
        finally:
            with trio.CancelScope(shield=True):
                await _close_quietly(read_write_closer)


class GuardedHost(BasicHost):
    """A host that survives what leaves a stream handler; stock, it takes the swarm down.

    Streams of peers that are not `admitted` reach only the handlers of `for_strangers`.
    """

    def __init__(self, *, admitted: Callable[[str], bool], **settings: Any) -> None:
        super().__init__(**settings)
        self._admitted = admitted
        swarm = self.get_network()
        if isinstance(swarm, ReleasingSwarm):
            swarm.admitted = admitted
        self.for_strangers = Multiselect()

    def get_transport_addrs(self) -> list[Multiaddr]:
        """Where we listen. Stock, whoever asks while we stop gets an error: a gossip task does, and
        takes the host down with it."""
        found: list[Multiaddr] = []
        for listener in self.get_network().listeners.values():
            with suppress(OSError):
                found += listener.get_addrs()
        return found

    def get_addrs(self) -> list[Multiaddr]:
        """What we tell others, with our peer id. Stock, a circuit loses all behind its relay's."""
        assert self._addrs_factory is not None, "the host was built with one"
        told = self._addrs_factory(list(self.get_transport_addrs()))
        return [address.encapsulate(Multiaddr(f"/p2p/{self.get_id()}")) for address in told]

    async def _swarm_stream_handler(self, net_stream: Any) -> None:
        peer = str(net_stream.muxed_conn.peer_id)
        try:
            await self._answer(net_stream, peer)
        except Exception as error:
            strangers.note(peer, "stream", error)
            with trio.move_on_after(_RESET_S):
                await net_stream.reset()

    async def _answer(self, net_stream: Any, peer: str) -> None:
        muxed = net_stream.muxed_conn
        await muxed.wait_turn()
        async with muxed.negotiating:
            served = self.multiselect if self._admitted(peer) else self.for_strangers
            try:
                protocol, handler = await served.negotiate(
                    MultiselectCommunicator(net_stream), _NEGOTIATE_S
                )
            except MultiselectError:
                protocol, handler = None, None
        if protocol is None or handler is None:
            await net_stream.reset()
            return
        net_stream.set_protocol(protocol)
        await handler(net_stream)

    def _schedule_identify(self, peer_id: ID, *, reason: str) -> None:
        # A stranger answers no question of ours, and asking costs more than its handshake.
        if self._admitted(str(peer_id)):
            super()._schedule_identify(peer_id, reason=reason)


async def read_exactly(reader: Any, n: int, retry_count: int = 0) -> bytes:
    """Exactly `n` bytes however small the pieces; the stock one gives up after 100 of them.

    Raises IncompleteReadError when the connection ends first. `retry_count` is not used.
    """
    buffer = bytearray()
    while len(buffer) < n:
        piece = await reader.read(n - len(buffer))
        if not piece:
            raise IncompleteReadError(
                f"the connection ended after {len(buffer)} of {n} bytes",
                expected_bytes=n,
                received_bytes=len(buffer),
            )
        buffer += piece
    return bytes(buffer)


def install() -> None:
    """Replace the names that cannot be handed in. Idempotent."""
    yamux.YamuxStream = BoundedStream  # type: ignore[misc]
    # It makes this class by name, whatever class it was handed for the protocol.
    muxer_multistream.Yamux = WholeFrameYamux  # type: ignore[attr-defined]
    stock = io_utils.read_exactly
    if stock is read_exactly:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("libp2p.") and getattr(module, "read_exactly", None) is stock:
            module.read_exactly = read_exactly  # type: ignore[attr-defined]


def _refuse(raw: Any) -> None:
    try:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    except OSError as error:  # it has left by itself
        logger.debug("refusing a connection: %r", error)
    raw.close()


async def _close_quietly(closer: Any) -> None:
    try:
        with trio.move_on_after(_RESET_S):
            await closer.close()
    except Exception as error:
        logger.debug("closing a refused connection: %r", error)
