"""Hole punching (DCUtR): two peers behind address translators make their relayed connection direct.

The side that was dialled through the relay opens `/libp2p/dcutr` over the relayed connection; each
tells where it expects its own port to appear outside, and both dial at the same moment from their
listening port. Translators that keep the port let the two connection attempts meet. The relayed
connection stays until the direct one has taken over, and for good where punching fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import trio
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch as Message
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from lumaris_overlay.libp2p import addresses, circuit
from lumaris_overlay.libp2p.overrides import strangers
from lumaris_protocol.errors import RemoteError
from lumaris_protocol.limits import (
    PUNCH_ADDRESSES_MAX,
    PUNCHES_AT_ONCE_MAX,
    RELAY_MESSAGE_BYTES_MAX,
)

logger = logging.getLogger(__name__)

PROTOCOL = TProtocol("/libp2p/dcutr")
_MESSAGE_S = 5.0
# A translator that drops the first attempt lets the kernel's repetition after a second through.
_DIAL_S = 4.0
_ATTEMPTS = 3
_PAUSE_S = 1.0
# A peer that keeps asking must not make us dial without end.
_ROUNDS_PER_PEER, _FORGET_S, _PEERS_MAX = 6, 600.0, 1_024
# Streams that are in use on the relayed connection get this long to finish.
_RETIRE_S = 30.0


class Punching:
    """Makes relayed connections direct, bounded in attempts.

    `candidates()` gives where we may appear outside, `listening()` our own IPs and ports,
    `is_relayed` whether our only way to a peer is through another.
    """

    def __init__(
        self,
        host: Any,
        nursery: trio.Nursery,
        *,
        admitted: Callable[[str], bool],
        candidates: Callable[[], tuple[str, ...]],
        listening: Callable[[], list[tuple[str, int]]],
        is_relayed: Callable[[Any], bool],
    ) -> None:
        self._host, self._nursery, self._admitted = host, nursery, admitted
        self._candidates, self._listening = candidates, listening
        self._is_relayed = is_relayed
        self._rounds: dict[ID, tuple[int, float]] = {}
        self._busy: set[ID] = set()

    def start(self) -> None:
        """Answer peers."""
        self._host.set_stream_handler(PROTOCOL, self._serve)

    def met(self, connection: Any) -> None:
        """A connection is up: one that was opened to us through a relay is worth a try."""
        relayed = connection.get_connection_type() == ConnectionType.RELAYED
        inbound = not connection.muxed_conn.is_initiator
        if relayed and inbound and len(self._busy) < PUNCHES_AT_ONCE_MAX:
            self._nursery.start_soon(self._drive, connection.muxed_conn.peer_id)

    async def _drive(self, peer: ID) -> None:
        if peer in self._busy:
            return
        self._busy.add(peer)
        try:
            for _ in range(_ATTEMPTS):
                # A member's handshake is over; its hello may still be on its way.
                await trio.sleep(_PAUSE_S / 4)
                if not self._is_relayed(peer) or not self._may(peer):
                    return
                if await self._initiate(peer):
                    logger.info("punch event=direct peer=%s", peer)
                    return
                await trio.sleep(_PAUSE_S)
            logger.info("punch event=failed peer=%s", peer)
        finally:
            self._busy.discard(peer)

    def _may(self, peer: ID) -> bool:
        """Whether this peer has a round left; takes one."""
        if not self._admitted(str(peer)):
            return False
        now = trio.current_time()
        if len(self._rounds) >= _PEERS_MAX:
            self._rounds = {
                p: (n, at) for p, (n, at) in self._rounds.items() if at + _FORGET_S > now
            }
        rounds, since = self._rounds.get(peer, (0, now))
        if since + _FORGET_S <= now:
            rounds, since = 0, now
        if rounds >= _ROUNDS_PER_PEER or len(self._rounds) >= _PEERS_MAX:
            return False
        self._rounds[peer] = (rounds + 1, since)
        return True

    async def _initiate(self, peer: ID) -> bool:
        stream = None
        try:
            with trio.fail_after(_MESSAGE_S):
                stream = await self._host.new_stream(peer, [PROTOCOL])
                began = trio.current_time()
                await _send(stream, self._connect_message())
                theirs = _dialable(await _receive(stream, Message.CONNECT))
                round_trip_s = trio.current_time() - began
                await _send(stream, Message(type=Message.SYNC))
                await stream.close()  # a reset could overtake what was just sent
                # They dial when this arrives; we dial at the same moment.
                await trio.sleep(round_trip_s / 2)
        except Exception as error:
            logger.debug("punch peer=%s error=%r", peer, error)
            if stream is not None:
                await circuit.reset(stream)
            return False
        return await self._dial(peer, theirs, as_responder=True)

    async def _serve(self, stream: NetStream) -> None:
        peer = stream.muxed_conn.peer_id
        relayed = stream.muxed_conn.get_connection_type() == ConnectionType.RELAYED
        if not relayed or not self._may(peer) or len(self._busy) >= PUNCHES_AT_ONCE_MAX:
            await circuit.reset(stream)
            return
        self._busy.add(peer)
        try:
            with trio.fail_after(_MESSAGE_S):
                theirs = _dialable(await _receive(stream, Message.CONNECT))
                await _send(stream, self._connect_message())
                await _receive(stream, Message.SYNC)
            await self._dial(peer, theirs, as_responder=False)
        except Exception as error:
            strangers.note(str(peer), "punch", error)
        finally:
            self._busy.discard(peer)
            await circuit.reset(stream)

    def _connect_message(self) -> Message:
        found = [Multiaddr(address).to_bytes() for address in self._candidates()]
        return Message(type=Message.CONNECT, ObsAddrs=found[:PUNCH_ADDRESSES_MAX])

    async def _dial(self, peer: ID, theirs: list[str], *, as_responder: bool) -> bool:
        """Dial all at once from our listening port; whether a direct connection is up."""
        network = self._host.get_network()
        dial = network.dial_addr_as_responder if as_responder else network.dial_addr

        async def one(address: str, source: tuple[str, int] | None) -> None:
            try:
                await dial(Multiaddr(address), peer, source)
            except Exception as error:
                logger.debug("punch address=%s error=%r", address, error)
                return
            done.cancel()

        with trio.move_on_after(_DIAL_S) as done:
            async with trio.open_nursery() as nursery:
                for address in theirs:
                    nursery.start_soon(one, address, self._source(address))
        if self._is_relayed(peer):
            return False
        self._nursery.start_soon(self._retire, peer)
        return True

    def _source(self, address: str) -> tuple[str, int] | None:
        """Our listening IP and port of the same family: a translator keeps what it knows."""
        six = address.startswith("/ip6/")
        for ip, port in self._listening():
            if (":" in ip) == six:
                return ip, port
        return None

    async def _retire(self, peer: ID) -> None:
        """Close the relayed connection once the direct one has proved itself."""
        await trio.sleep(_RETIRE_S)
        if self._is_relayed(peer):
            return
        for held in list(self._host.get_network().get_connections(peer)):
            if held.get_connection_type() == ConnectionType.RELAYED:
                try:
                    await held.close()
                except Exception as error:
                    logger.debug("retiring peer=%s error=%r", peer, error)


async def _send(stream: Any, message: Message) -> None:
    await stream.write(encode_varint_prefixed(message.SerializeToString()))


async def _receive(stream: Any, kind: Any) -> Message:
    data = await read_varint_prefixed_bytes_limited(stream, RELAY_MESSAGE_BYTES_MAX)
    message = Message.FromString(data)
    if message.type != kind:
        raise RemoteError("malformed", "A hole punching message came out of order.")
    return message


def _dialable(message: Message) -> list[str]:
    """What a peer may have us dial: few addresses, and none inside our own network.

    Two peers in one private network reach each other without a relay.
    """
    out: dict[str, None] = {}
    for data in message.ObsAddrs[: 4 * PUNCH_ADDRESSES_MAX]:
        try:
            found = addresses.endpoint_of(str(Multiaddr(data)))
        except Exception:  # noqa: S112 - a peer's nonsense is no address
            continue
        if found is not None and addresses.scope_of(found[0]) == "public":
            out[addresses.address_of(*found)] = None
    return list(out)[:PUNCH_ADDRESSES_MAX]
