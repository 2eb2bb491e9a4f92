"""Relays: the service that carries other peers' circuits, and the keeper of our own reservations.

A peer that nobody can dial asks two relays to hold its place; others then reach it at
`<relay's address>/p2p-circuit`. The keeper renews a reservation at half of its life and replaces
a relay that went away.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, Status, StopMessage
from multiaddr import Multiaddr

from lumaris_overlay.libp2p import circuit
from lumaris_overlay.libp2p.addresses import CIRCUIT, address_of, endpoint_of, same_ip
from lumaris_overlay.libp2p.overrides import strangers
from lumaris_protocol import limits
from lumaris_protocol.errors import RemoteError
from lumaris_protocol.keys import PeerId

logger = logging.getLogger(__name__)

_PUMP_BYTES = 64 * 1024
# After one side of a circuit has ended, the other may still say this long what it had to say.
_HALF_S = 10.0
_CHECK_S = 1.0
# A peer that is no relay, or is full, is asked again after a while, and ever more seldom.
_REFUSED_S_MIN, _REFUSED_S_MAX = 2.0, 300.0
_REFUSED_MAX = limits.OVERLAY_CONNECTIONS_MAX
_LIFE_S_MIN = 2.0

Admitted = Callable[[str], bool]
Remote = Callable[[Any], str | None]


@dataclass(frozen=True)
class RelayLimits:
    """What a relay gives to others."""

    reservations: int = limits.RELAY_RESERVATIONS_MAX
    reservations_per_ip: int = limits.RELAY_RESERVATIONS_PER_IP_MAX
    reservation_s: float = limits.RELAY_RESERVATION_S
    circuits: int = limits.RELAY_CIRCUITS_MAX
    circuits_per_peer: int = limits.RELAY_CIRCUITS_PER_PEER_MAX
    circuits_per_source: int = limits.RELAY_CIRCUITS_PER_SOURCE_MAX
    circuits_per_pair: int = limits.RELAY_CIRCUITS_PER_PAIR_MAX
    circuit_bytes: int = limits.RELAY_CIRCUIT_BYTES_MAX
    circuit_s: float = limits.RELAY_CIRCUIT_S_MAX


class RelayService:
    """Holds places and joins streams, for admitted peers and within limits.

    `remote_ip` gives the IP of the direct connection to a peer, None when there is none.
    """

    def __init__(
        self,
        host: Any,
        *,
        admitted: Admitted,
        remote_ip: Remote,
        limits: RelayLimits = RelayLimits(),
    ) -> None:
        self._host, self._admitted, self._remote_ip = host, admitted, remote_ip
        self.limits = limits
        self.reserved: dict[ID, tuple[float, str]] = {}
        self.circuits: Counter[ID] = Counter()  # by either end
        self._pairs: Counter[tuple[ID, ID]] = Counter()  # by source and target

    def start(self) -> None:
        """Answer reservations and circuits."""
        self._host.set_stream_handler(circuit.HOP, self._serve)

    async def _serve(self, stream: Any) -> None:
        peer = stream.muxed_conn.peer_id
        try:
            with trio.fail_after(circuit.MESSAGE_S):
                request = await circuit.receive(stream, HopMessage)
        except Exception as error:
            strangers.note(str(peer), "relay", error)
            await circuit.reset(stream)
            return
        # Only what comes directly: circuits over circuits would multiply our traffic.
        ip = self._remote_ip(peer)
        relayed = stream.muxed_conn.get_connection_type() == ConnectionType.RELAYED
        if relayed or ip is None or not self._admitted(str(peer)):
            await self._say(stream, Status.PERMISSION_DENIED)
        elif request.type == HopMessage.RESERVE:
            await self._reserve(stream, peer, ip)
        elif request.type == HopMessage.CONNECT and request.peer.id:
            await self._connect(stream, peer, request.peer.id)
        else:
            await self._say(stream, Status.MALFORMED_MESSAGE)

    async def _say(self, stream: Any, status: Any, **fields: Any) -> bool:
        """Send a status; ends the stream unless it is OK. Whether it was sent."""
        message = HopMessage(type=HopMessage.STATUS, status=status, **fields)
        try:
            with trio.fail_after(circuit.MESSAGE_S):
                await circuit.send(stream, message)
                if status != Status.OK or "reservation" in fields:
                    await stream.close()
        except Exception as error:
            logger.debug("answering a relay request: %r", error)
            await circuit.reset(stream)
            return False
        return True

    async def _reserve(self, stream: Any, peer: ID, ip: str) -> None:
        now = time.time()
        if peer not in self.reserved:
            self._forget(now)
            here = sum(held_ip == ip for _, held_ip in self.reserved.values())
            if (
                len(self.reserved) >= self.limits.reservations
                or here >= self.limits.reservations_per_ip
            ):
                await self._say(stream, Status.RESERVATION_REFUSED)
                return
        expire = now + self.limits.reservation_s
        self.reserved[peer] = (expire, ip)
        message = HopMessage()
        message.reservation.expire = int(expire)
        message.reservation.addrs.extend(
            address.to_bytes() for address in self._host.get_addrs() if CIRCUIT not in str(address)
        )
        await self._say(
            stream, Status.OK, reservation=message.reservation, limit=self._limit_message()
        )

    def _forget(self, now: float) -> None:
        """Make room: places of peers that left are free, and those not renewed."""
        for peer, (expire, _) in list(self.reserved.items()):
            if expire <= now or self._remote_ip(peer) is None:
                del self.reserved[peer]

    def _limit_message(self) -> Limit:
        return Limit(duration=int(self.limits.circuit_s), data=self.limits.circuit_bytes)

    async def _connect(self, stream: Any, source: ID, wanted: bytes) -> None:
        target = ID(wanted)
        expire, _ = self.reserved.get(target, (0.0, ""))
        if expire <= time.time() or self._remote_ip(target) is None:
            await self._say(stream, Status.NO_RESERVATION)
            return
        if not self._has_room(source, target):
            await self._say(stream, Status.RESOURCE_LIMIT_EXCEEDED)
            return
        self._pairs[source, target] += 1
        self.circuits.update((source, target))
        far = None
        try:
            far = await self._reach(source, target)
            if far is None:
                await self._say(stream, Status.CONNECTION_FAILED)
            elif await self._say(stream, Status.OK, limit=self._limit_message()):
                await self._join(stream, far)
        finally:
            self._pairs[source, target] -= 1
            self._pairs += Counter()  # forgets those without any
            self.circuits -= Counter((source, target))
            if far is not None:
                await circuit.reset(far)
                await circuit.reset(stream)

    def _has_room(self, source: ID, target: ID) -> bool:
        """Whether there may be another circuit: no source may keep the others from a target."""
        begun = sum(count for (by, _), count in self._pairs.items() if by == source)
        return (
            self._pairs[source, target] < self.limits.circuits_per_pair
            and begun < self.limits.circuits_per_source
            and max(self.circuits[source], self.circuits[target]) < self.limits.circuits_per_peer
            and self._pairs.total() < self.limits.circuits
        )

    async def _reach(self, source: ID, target: ID) -> Any | None:
        """A stream to the target that accepted the circuit."""
        stream = None
        message = StopMessage(type=StopMessage.CONNECT, limit=self._limit_message())
        message.peer.id = source.to_bytes()
        try:
            with trio.fail_after(circuit.MESSAGE_S):
                stream = await self._host.new_stream(target, [circuit.STOP])
                await circuit.send(stream, message)
                answer = await circuit.receive(stream, StopMessage)
            if answer.type == StopMessage.STATUS and answer.status == Status.OK:
                return stream
        except Exception as error:
            logger.debug("circuit target=%s error=%r", target, error)
        if stream is not None:
            await circuit.reset(stream)
        return None

    async def _join(self, near: Any, far: Any) -> None:
        """Carry bytes both ways until either limit is reached or both sides have ended."""
        budget = [self.limits.circuit_bytes]
        with trio.move_on_after(self.limits.circuit_s) as scope:
            async with trio.open_nursery() as nursery:

                async def pump(source: Any, sink: Any) -> None:
                    if await _carry(source, sink, budget):
                        # This direction has ended well: the other may finish.
                        scope.deadline = min(scope.deadline, trio.current_time() + _HALF_S)
                    else:
                        nursery.cancel_scope.cancel()

                nursery.start_soon(pump, near, far)
                nursery.start_soon(pump, far, near)


async def _carry(source: Any, sink: Any, budget: list[int]) -> bool:
    """Copy until the end of `source`; False when something broke or the budget is used up."""
    try:
        while data := await circuit.read_some(source, _PUMP_BYTES):
            budget[0] -= len(data)
            if budget[0] < 0:
                return False
            await sink.write(data)
        await sink.muxed_stream.close()
    except Exception as error:
        logger.debug("carrying a circuit: %r", error)
        return False
    return True


@dataclass
class _Place:
    """A reservation of ours. `renew_at` is on trio's clock."""

    addresses: tuple[str, ...]
    renew_at: float
    ends_at: float


class RelayKeeper:
    """Keeps reservations while `wanted()`.

    `candidates()` gives the peers to ask, best first.
    """

    def __init__(
        self,
        host: Any,
        *,
        candidates: Callable[[], list[ID]],
        remote_ip: Remote,
        wanted: Callable[[], bool],
    ) -> None:
        self._host, self._candidates, self._remote_ip = host, candidates, remote_ip
        self._wanted = wanted
        self._places: dict[ID, _Place] = {}
        self._refused: dict[ID, tuple[float, float]] = {}
        self._wake = trio.Event()

    def holds(self, relay: ID) -> bool:
        """Whether a relay may open circuits to us. One that was just given up still may."""
        return relay in self._places

    def relays(self) -> tuple[PeerId, ...]:
        """Who holds our place."""
        return tuple(PeerId(str(relay)) for relay in self._places)

    def circuits(self) -> tuple[str, ...]:
        """Where we can be reached through them, without our own peer id at the end."""
        found = [place.addresses for place in self._places.values()]
        # The first of each relay comes first: a list that is cut short still names every relay.
        width = max(map(len, found), default=0)
        ranked = [each[at] for at in range(width) for each in found if at < len(each)]
        return tuple(f"{address}{CIRCUIT}" for address in ranked)

    def lost(self, peer: Any) -> None:
        """A connection has ended. A relay that comes back may have forgotten our place."""
        if self._remote_ip(peer) is None:
            self._places.pop(peer, None)
            self._refused.pop(peer, None)
        self.wake()

    def wake(self) -> None:
        """Look again now: the need or the peers have changed."""
        self._wake.set()

    async def run(self) -> None:
        """Keep places until cancelled."""
        while True:
            await self._look()
            with trio.move_on_after(_CHECK_S):
                await self._wake.wait()
            self._wake = trio.Event()

    async def _look(self) -> None:
        now = trio.current_time()
        wanted = self._wanted()
        for relay, place in list(self._places.items()):
            if not wanted or place.ends_at <= now or self._remote_ip(relay) is None:
                del self._places[relay]
            elif place.renew_at <= now and not await self._ask(relay):
                # The old one holds until its end; it is asked for again in a while.
                place.renew_at = now + max((place.ends_at - now) / 4, _CHECK_S)
        if not wanted:
            return
        for relay in self._candidates():
            if len(self._places) >= limits.RELAYS_WANTED:
                return
            until, delay = self._refused.get(relay, (now, _REFUSED_S_MIN))
            if relay in self._places or until > now:
                continue
            if await self._ask(relay):
                self._refused.pop(relay, None)
            elif len(self._refused) < _REFUSED_MAX or relay in self._refused:
                until = trio.current_time() + delay * random.uniform(1, 1.5)  # noqa: S311 - not a secret
                self._refused[relay] = (until, min(delay * 2, _REFUSED_S_MAX))

    async def _ask(self, relay: ID) -> bool:
        try:
            stream, answer = await circuit.ask_hop(
                self._host, relay, HopMessage(type=HopMessage.RESERVE)
            )
        except RemoteError as error:
            logger.debug("reservation relay=%s error=%s", relay, error.message)
            return False
        await circuit.reset(stream)
        life_s = min(answer.reservation.expire - time.time(), limits.RELAY_RESERVATION_S)
        addresses = self._usable(relay, list(answer.reservation.addrs))
        if life_s < _LIFE_S_MIN or not addresses:
            strangers.note(str(relay), "relay", "a reservation without life or address")
            return False
        now = trio.current_time()
        self._places[relay] = _Place(addresses, now + life_s / 2, now + life_s)
        return True

    def _usable(self, relay: ID, found: list[bytes]) -> tuple[str, ...]:
        """The relay's addresses on the IP where we see it.

        Others will dial what we repeat, so a relay must not be able to name a third party.
        """
        ip = self._remote_ip(relay)
        out: dict[str, None] = {}
        for data in found[: limits.ADDRESSES_MAX]:
            try:
                endpoint = endpoint_of(str(Multiaddr(data)))
            except Exception:  # noqa: S112 - a relay's nonsense is no address
                continue
            if endpoint is not None and ip is not None and same_ip(endpoint[0], ip):
                out[f"{address_of(*endpoint)}/p2p/{relay}"] = None
        return tuple(out)[:2]
