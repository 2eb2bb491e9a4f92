"""Connections through a relay (circuit relay v2): the messages, the dialling and the answering.

A circuit is a stream to the relay that the relay joins to a stream of its own to the other peer.
On it the two peers do the same Noise handshake as on TCP, so the relay carries bytes and can
neither read them nor pose as the peer. libp2p's own transport is not used: its dialler asks for a
reservation first, polls, and believes stored addresses; its relay believes the peer id that a
reservation message names.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import trio
from libp2p.abc import IRawConnection
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from lumaris_overlay.libp2p.addresses import CIRCUIT
from lumaris_overlay.libp2p.overrides import strangers
from lumaris_overlay.tasks import shielded
from lumaris_protocol.errors import RemoteError
from lumaris_protocol.limits import CIRCUITS_IN_MAX, RELAY_MESSAGE_BYTES_MAX, RELAYS_WANTED

logger = logging.getLogger(__name__)

HOP = TProtocol("/libp2p/circuit/relay/0.2.0/hop")
STOP = TProtocol("/libp2p/circuit/relay/0.2.0/stop")
MESSAGE_S = 5.0
_CLOSE_S = 1.0

M = TypeVar("M", HopMessage, StopMessage)


async def send(stream: Any, message: Any) -> None:
    """Send one message with its length."""
    await stream.write(encode_varint_prefixed(message.SerializeToString()))


async def receive(stream: Any, kind: type[M]) -> M:
    """One message. Raises whatever a broken stream or bad bytes raise."""
    data = await read_varint_prefixed_bytes_limited(stream, RELAY_MESSAGE_BYTES_MAX)
    return kind.FromString(data)


async def ask_hop(host: Any, relay: ID, message: HopMessage) -> tuple[Any, HopMessage]:
    """Send a request to a relay: the stream and its answer.

    Raises RemoteError `unreachable` when it does not answer or refuses.
    """
    stream = None
    try:
        with trio.fail_after(MESSAGE_S):
            stream = await host.new_stream(relay, [HOP])
            await send(stream, message)
            answer = await receive(stream, HopMessage)
    except BaseException as error:
        if stream is not None:
            await reset(stream)
        if not isinstance(error, Exception):
            raise
        raise RemoteError("unreachable", f"The relay {relay} does not answer.") from error
    if answer.type != HopMessage.STATUS or answer.status != Status.OK:
        await reset(stream)
        raise RemoteError("unreachable", f"The relay {relay} refused with {answer.status}.")
    return stream, answer


async def read_some(stream: Any, n: int | None) -> bytes:
    """Up to `n` bytes; b"" at the end of the stream, which libp2p raises."""
    try:
        data: bytes = await stream.read(n)
    except StreamEOF:
        return b""
    return data


def is_relayed(host: Any, peer: Any) -> bool:
    """Whether our only way to a peer is through another."""
    held = [each for each in host.get_network().get_connections(peer) if not each.is_closed]
    return bool(held) and not any(_is_direct(each) for each in held)


def remote_ip(host: Any, peer: Any) -> str | None:
    """The IP of the direct connection to a peer; None when there is none."""
    for held in host.get_network().get_connections(peer):
        if not held.is_closed and _is_direct(held):
            remote = held.muxed_conn.get_remote_address()
            return str(remote[0]) if remote is not None else None
    return None


def _is_direct(connection: Any) -> bool:
    return bool(connection.get_connection_type() == ConnectionType.DIRECT)


async def reset(stream: Any) -> None:
    """Give a stream up at once. Never raises."""
    with shielded(_CLOSE_S):
        try:
            await stream.reset()
        except Exception as error:
            logger.debug("resetting a circuit: %r", error)


class CircuitConnection(IRawConnection):
    """The bytes of a circuit, to be secured and muxed like a TCP connection."""

    def __init__(self, stream: Any, address: Multiaddr, *, initiator: bool) -> None:
        self.is_initiator = initiator
        self._stream, self._address = stream, address
        self._closed = False

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes; b"" at the end."""
        try:
            return await read_some(self._stream, n)
        except Exception as error:
            raise RawConnError("the circuit broke") from error

    async def write(self, data: bytes) -> None:
        """Send all of `data`."""
        try:
            await self._stream.write(data)
        except Exception as error:
            raise RawConnError("the circuit broke") from error

    async def close(self) -> None:
        """End our direction; the relay ends the other. Never raises."""
        if self._closed:
            return
        self._closed = True
        with shielded(_CLOSE_S) as scope:
            try:
                await self._stream.close()
            except Exception as error:
                logger.debug("closing a circuit: %r", error)
                await reset(self._stream)
        if scope.cancelled_caught:
            await reset(self._stream)

    async def abort(self) -> None:
        """End both directions at once. Never raises."""
        self._closed = True
        await reset(self._stream)

    def get_remote_address(self) -> tuple[str, int] | None:
        """None: the relay's address says nothing about the peer."""
        return None

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The circuit's address."""
        return [self._address]

    def get_connection_type(self) -> ConnectionType:
        """Always relayed."""
        return ConnectionType.RELAYED


class Circuits:
    """Dials peers through relays, and answers circuits from relays that hold our reservation."""

    def __init__(self, host: Any, *, reserved: Callable[[ID], bool]) -> None:
        self._host, self._reserved = host, reserved
        self._inbound: Counter[ID] = Counter()

    def start(self) -> None:
        """Answer relays."""
        self._host.set_stream_handler(STOP, self._serve_stop)

    async def dial(self, relay: ID, target: ID) -> None:
        """Connect to a peer through a relay that we are connected to.

        Raises RemoteError `unreachable`; also when whoever answers is not that peer.
        """
        request = HopMessage(type=HopMessage.CONNECT)
        request.peer.id = target.to_bytes()
        stream, _ = await ask_hop(self._host, relay, request)
        raw = CircuitConnection(stream, _address(relay, target), initiator=True)
        try:
            await self._host.upgrade_outbound_connection(raw, target)
        except BaseException as error:
            await reset(stream)
            if not isinstance(error, Exception):
                raise
            raise RemoteError(
                "unreachable", f"The peer {target} did not answer through the relay {relay}."
            ) from error

    async def _serve_stop(self, stream: Any) -> None:
        relay = stream.muxed_conn.peer_id
        try:
            with trio.fail_after(MESSAGE_S):
                request = await receive(stream, StopMessage)
                status = self._judge(relay, stream, request)
                answer = StopMessage(type=StopMessage.STATUS, status=status)
                await send(stream, answer)
            if status != Status.OK:
                await stream.close()
                return
            # Only a name for the log and the address: the handshake says who it really is.
            claimed = ID(request.peer.id)
        except Exception as error:
            strangers.note(str(relay), "circuit", error)
            await reset(stream)
            return
        await self._answer(stream, relay, claimed)

    def _judge(self, relay: ID, stream: Any, request: StopMessage) -> Status.ValueType:
        if request.type != StopMessage.CONNECT or not request.peer.id:
            return Status.MALFORMED_MESSAGE
        relayed = stream.muxed_conn.get_connection_type() == ConnectionType.RELAYED
        if relayed or not self._reserved(relay):
            return Status.PERMISSION_DENIED
        share = CIRCUITS_IN_MAX // RELAYS_WANTED
        if self._inbound[relay] >= share or self._inbound.total() >= CIRCUITS_IN_MAX:
            return Status.RESOURCE_LIMIT_EXCEEDED
        return Status.OK

    async def _answer(self, stream: Any, relay: ID, source: ID) -> None:
        self._inbound[relay] += 1
        try:
            address = _address(relay, source)
            raw = CircuitConnection(stream, address, initiator=False)
            muxed = await self._host.upgrade_inbound_connection(raw, address)
            await muxed.event_closed.wait()
        except Exception as error:
            strangers.note(str(relay), "circuit_handshake", error)
            await reset(stream)
        finally:
            self._inbound[relay] -= 1
            self._inbound += Counter()  # forgets relays without any


def _address(relay: ID, target: ID) -> Multiaddr:
    return Multiaddr(f"/p2p/{relay}{CIRCUIT}/p2p/{target}")
