"""Corrections of libp2p 0.8.1, each for one fault; `tests/overlay/test_canaries.py` shows each.

What can be a subclass is one and is handed in by `host.py`, which builds the host from these parts
instead of calling `libp2p.new_host`. Two names are replaced inside libp2p's modules (`install`),
because its muxer names its stream class itself and every reader imports `read_exactly` by name.
"""

from __future__ import annotations

import logging
import struct
import sys
from typing import Any

import trio
from libp2p.abc import IMuxedConn
from libp2p.host.basic_host import BasicHost
from libp2p.io import utils as io_utils
from libp2p.io.exceptions import IncompleteReadError
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.pubsub.pubsub import Pubsub
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux import yamux
from libp2p.transport.tcp.tcp import TCP

from lumaris_overlay.tasks import StrangerLog

logger = logging.getLogger(__name__)
strangers = StrangerLog(logger)

# A stream's receive window grows to this; libp2p's 16 MiB would let few streams fill our memory.
WINDOW_BYTES_MAX = 2 * 1024 * 1024
_FRAME_BYTES = yamux.MAX_MESSAGE_SIZE - yamux.HEADER_SIZE
_RESET_S = 1.0
# Writers wake at once when the window opens; this only bounds how late they see a closed stream.
_CLOSED_CHECK_S = 0.5


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


class WholeFrameYamux(yamux.Yamux):
    """A muxer whose frames are never cut short by the cancellation of one writer."""

    async def _write_frame(self, data: bytes) -> None:
        # A frame cut in half, or a Noise nonce used up for bytes not sent, kills the connection
        # with all its streams. A stuck socket is ended by the health check, not by a writer.
        with trio.CancelScope(shield=True):
            async with self._write_lock:
                await self.secured_conn.write(data)
        await trio.lowlevel.checkpoint()


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
    """

    async def _do_handle_inbound_connection(
        self, read_write_closer: Any, maddr: Any, failure_event: Any
    ) -> None:
        remote = self._build_remote_multiaddr(read_write_closer)
        if remote is not None and not await self.connection_gate.is_allowed(remote):
            await _close_quietly(read_write_closer)
            return
        try:
            muxed: IMuxedConn = await self.upgrade_inbound_raw_conn(
                RawConnection(read_write_closer, False), maddr
            )
            async with trio.open_nursery() as nursery:

                async def stop() -> None:
                    await self.manager.wait_finished()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(stop)
                await muxed.event_closed.wait()  # type: ignore[attr-defined]  # of Yamux
                nursery.cancel_scope.cancel()
        except Exception as error:
            strangers.note(str(remote).partition("/tcp/")[0], "handshake", error)
        finally:
            with trio.CancelScope(shield=True):
                await _close_quietly(read_write_closer)


class GuardedHost(BasicHost):
    """A host that survives what leaves a stream handler; stock, it takes the swarm down."""

    async def _swarm_stream_handler(self, net_stream: Any) -> None:
        try:
            await super()._swarm_stream_handler(net_stream)
        except Exception as error:
            strangers.note(str(net_stream.muxed_conn.peer_id), "stream", error)
            with trio.move_on_after(_RESET_S):
                await net_stream.reset()


class GuardedPubsub(Pubsub):
    """Pubsub that drops a peer for bytes it cannot parse; stock, such bytes end the process."""

    async def continuously_read_stream(self, stream: Any) -> None:
        """Read one peer's messages until it leaves or sends nonsense."""
        try:
            await super().continuously_read_stream(stream)
        except Exception as error:
            peer = stream.muxed_conn.peer_id
            strangers.note(str(peer), "gossip_rpc", error)
            with trio.move_on_after(_RESET_S):
                await stream.reset()
            self._handle_dead_peer(peer)

    async def push_msg(self, msg_forwarder: ID, msg: Any) -> None:
        """Take one message in; a key that does not parse must not end the service."""
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception as error:
            if msg_forwarder == self.host.get_id():
                raise
            strangers.note(str(msg_forwarder), "gossip_message", error)


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
    stock = io_utils.read_exactly
    if stock is read_exactly:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("libp2p.") and getattr(module, "read_exactly", None) is stock:
            module.read_exactly = read_exactly  # type: ignore[attr-defined]


async def _close_quietly(closer: Any) -> None:
    try:
        with trio.move_on_after(_RESET_S):
            await closer.close()
    except Exception as error:
        logger.debug("closing a refused connection: %r", error)
