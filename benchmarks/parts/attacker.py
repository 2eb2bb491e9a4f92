"""The hostile side of `attacks.py`: a program that is told on its input whom to attack and how.

    python benchmarks/attacker.py CORE

Each line of input is an `Order` as JSON, or `stop`; each is answered with one line of JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils.varint import encode_varint_prefixed
from msgspec import structs

from lumaris_overlay.libp2p import index
from lumaris_overlay.libp2p.gossip import ADVERTS, topic_of
from lumaris_overlay.libp2p.host import HostConfig, Libp2pOverlay, open_host
from lumaris_protocol import codec, frames
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import ADVERTS_PER_S_PER_SELLER, INDEX_PAGE_ADVERTS_MAX
from lumaris_protocol.messages.advert import Advert
from lumaris_protocol.protocols import HELLO

# Started as a file, this folder is on the path and the one above is not.
sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.parts import overlay_world as world

GOSSIP = "/meshsub/1.1.0"
LOOPBACK = "127.0.0.1"
NOTHING = "no attack"
_SOCKETS = 400
_CROWD = 16
_STREAMS = 200
_DOCUMENTS = 400
_LINE_BYTES = 65_536


@dataclass
class Order:
    """Whom to attack, how, and where from. `deaf` names a protocol that nobody reads."""

    attack: str
    address: str
    coordinator: str
    source: str
    deaf: str


@dataclass
class Attack:
    """One attack under way. `sent` counts what its kind sends."""

    order: Order
    sent: int = 0
    hosts: list[Libp2pOverlay] = field(default_factory=list)

    @property
    def victim(self) -> ID:
        """Who is attacked."""
        return ID.from_base58(self.order.address.rpartition("/")[2])

    @property
    def port(self) -> int:
        """The port of who is attacked."""
        return int(self.order.address.split("/")[4])

    @property
    def connected(self) -> bool:
        """Whether the victim still holds a connection to one of our hosts."""
        return any(self.victim in host.connections.live() for host in self.hosts)

    @asynccontextmanager
    async def host(
        self, key: KeyPair | None = None, *, certified: bool = True, source: str = ""
    ) -> AsyncIterator[Libp2pOverlay]:
        """A host whose connections come from the order's address, not yet connected."""
        key = key or world.new_key()
        rogue = world.new_key()
        signer = world.COORDINATOR
        world.COORDINATOR = signer if certified else rogue
        shown = world.certificate(key)
        world.COORDINATOR = signer
        config = HostConfig(
            key=key,
            network=world.NETWORK,
            coordinator_keys=frozenset({signer.peer_id, rogue.peer_id}),
            certificate=shown,
        )
        async with open_host(config) as host:
            (transport,) = host.host.get_network().transport_manager.get_transports()
            # libp2p binds a socket to an address for hole punching only, by this method.
            dial = transport._dial_resolved  # noqa: SLF001
            address = (source or self.order.source, 0)
            transport._dial_resolved = partial(dial, source=address)  # noqa: SLF001
            self.hosts.append(host)
            yield host

    async def join(self, host: Libp2pOverlay) -> None:
        """Connect, again and again."""
        while not await host.connect([self.order.address]):  # noqa: ASYNC110 - it is a try
            await trio.sleep(0.05)

    async def stream(self, host: Libp2pOverlay, protocol: str) -> Any:
        """A stream without manners, connecting first where needed."""
        if self.victim not in host.connections.live():
            await self.join(host)
        return await host.host.new_stream(self.victim, [protocol])


Run = Callable[[Attack], Awaitable[None]]


def rpc(**fields: Any) -> bytes:
    """One gossip RPC as it goes over the wire."""
    return encode_varint_prefixed(rpc_pb2.RPC(**fields).SerializeToString())


async def _for_ever(attempt: Callable[[], Awaitable[None]], *, at_once: int = 1) -> None:
    """What fails is begun again: being sent away is no reason to stop."""

    async def try_again() -> None:
        while True:
            with suppress(Exception):
                await attempt()
            await trio.sleep(0.001)

    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(try_again)


async def nothing(attack: Attack) -> None:
    """No attack: how far the measure strays by itself."""
    await trio.sleep_forever()


# --- members -------------------------------------------------------------------------------------


async def _gossip(attack: Attack, host: Libp2pOverlay, data: bytes) -> None:
    await host.exchange.gossip.publish(ADVERTS, data)
    attack.sent += 1


async def advert_flood(attack: Attack) -> None:
    """Adverts that are sound, at ten times the rate that a seller may have."""
    key = world.new_key()
    async with attack.host(key) as host:
        await attack.join(host)
        certified = world.certificate(key)
        while True:
            data = world.advert(key, attack.sent + 1, certified=certified)
            await _gossip(attack, host, data)
            await trio.sleep(0.1 / ADVERTS_PER_S_PER_SELLER)


async def bad_signatures(attack: Attack) -> None:
    """Gossip whose signature is wrong, as fast as it goes."""
    async with attack.host() as host:
        sender = ID.from_base58(host.peer_id).to_bytes()
        topic = topic_of(world.NETWORK, ADVERTS)

        async def push() -> None:
            stream = await attack.stream(host, GOSSIP)
            while True:
                messages = [
                    rpc_pb2.Message(
                        data=os.urandom(64),
                        topicIDs=[topic],
                        from_id=sender,
                        seqno=os.urandom(8),
                        signature=bytes(64),
                    )
                    for _ in range(16)
                ]
                await stream.write(rpc(publish=messages))
                attack.sent += 16

        await _for_ever(push)


async def junk_frames(attack: Attack) -> None:
    """Nonsense on every protocol that a host answers."""
    junk = [b"\xff" * 400, os.urandom(4_000), frames.encode(Kind.HEADER, b"{}") * 50]
    async with attack.host() as host:
        served = [str(name) for name in host.host.multiselect.handlers if name]

        async def say() -> None:
            for protocol in served:
                for data in junk:
                    stream = await attack.stream(host, protocol)
                    with suppress(Exception):
                        await stream.write(data)
                        await stream.muxed_stream.close()
                    attack.sent += 1

        await _for_ever(say, at_once=_CROWD)


async def junk_rpcs(attack: Attack) -> None:
    """Gossip RPCs that do not parse, and empty ones."""
    async with attack.host() as host:

        async def push() -> None:
            stream = await attack.stream(host, GOSSIP)
            await stream.write(rpc() * 200)
            await stream.write(encode_varint_prefixed(os.urandom(2_000)))
            attack.sent += 201

        await _for_ever(push)


async def window_violation(attack: Attack) -> None:
    """More than the window allows, to a stream that nobody reads."""
    async with attack.host() as host:

        async def push() -> None:
            stream = await attack.stream(host, attack.order.deaf)
            while True:
                stream.muxed_stream.send_window = 1 << 30
                await stream.write(bytes(65_536))
                attack.sent += 65_536

        await _for_ever(push)


async def slow_streams(attack: Attack) -> None:
    """Streams that say one byte and stay."""
    async with attack.host() as host:
        held: list[Any] = []

        async def dribble() -> None:
            protocol = (index.PROTOCOL, HELLO)[attack.sent % 2]
            with trio.fail_after(2):
                stream = await attack.stream(host, protocol)
                await stream.write(b"\0")
            held.append(stream)
            attack.sent += 1
            if len(held) > _STREAMS:
                held.pop(0)

        await _for_ever(dribble, at_once=_CROWD)


async def replay(attack: Attack) -> None:
    """Old adverts after the newest one, each another document, over gossip and the index."""
    key = world.new_key()
    certified = world.certificate(key)
    old = [world.advert(key, number, certified=certified) for number in range(1, _DOCUMENTS)]
    async with attack.host(key) as host:
        await attack.join(host)
        await host.publish_advert(world.advert(key, 1_000, certified=certified))
        while True:
            for number, data in enumerate(old):
                await _gossip(attack, host, data)
                if number % 16 == 0:
                    await _push(attack, host, old[number : number + index.PUSHED_MAX])


async def stale_and_future(attack: Attack) -> None:
    """Adverts that have expired, and such that are not yet valid."""
    key = world.new_key()
    sound = world.advert(key)
    found = [_dated(key, sound, seq, -3_000 if seq % 2 else 600) for seq in range(1, _DOCUMENTS)]
    async with attack.host(key) as host:
        await attack.join(host)
        while True:
            for number, data in enumerate(found):
                await _gossip(attack, host, data)
                if number % 16 == 0:
                    await _push(attack, host, found[number : number + index.PUSHED_MAX])


def _dated(key: KeyPair, data: bytes, seq: int, ahead_s: int) -> bytes:
    """An advert again, as if signed at another time."""
    advert = codec.open_signed(data, Advert, network=world.NETWORK).message
    issued_at, expires_at = advert.issued_at + ahead_s, advert.expires_at + ahead_s
    other = structs.replace(advert, seq=seq, issued_at=issued_at, expires_at=expires_at)
    return codec.sign(other, key, world.NETWORK).data


async def _push(attack: Attack, host: Libp2pOverlay, documents: list[bytes]) -> None:
    with suppress(Exception):
        await attack.join(host)
        stream = await host.open_stream(str(attack.victim), index.PROTOCOL)
        async with stream:
            await index.exchange(stream, index.Query(count=1), documents, lambda data: None)
        attack.sent += len(documents)


async def lying_index(attack: Attack) -> None:
    """An index full of forgeries, and forgeries pushed into the victim's."""
    key, forger = world.new_key(), world.new_key()
    certified = world.certificate(key)
    forged = [
        world.advert(forger, number + 1, certified=certified)
        for number in range(INDEX_PAGE_ADVERTS_MAX)
    ]
    answer = frames.encode(Kind.HEADER, b"{}")
    answer += b"".join(frames.encode(Kind.ENVELOPE, data) for data in forged)
    async with attack.host(key) as host:

        async def lie(stream: Any) -> None:
            attack.sent += len(forged)
            await stream.send_all(answer + frames.encode(Kind.END))

        host.host.remove_stream_handler(index.PROTOCOL)
        async with host.serve(index.PROTOCOL, lie):
            await attack.join(host)
            while True:
                await _push(attack, host, forged[: index.PUSHED_MAX])
                await trio.sleep(0.001)


async def duplicate_identity(attack: Attack) -> None:
    """Two hosts of one key, coming in turn and saying different things."""
    key = world.new_key()
    async with attack.host(key) as one, attack.host(key) as two:

        async def come() -> None:
            for host in (one, two):
                with suppress(Exception):
                    await host.connections.drop(attack.victim)
                await host.connect([attack.order.address])
                await host.publish_advert(world.advert(key, attack.sent + 1))
                attack.sent += 1

        await _for_ever(come)


# --- strangers -----------------------------------------------------------------------------------


async def half_open(attack: Attack) -> None:
    """Connections that say nothing, as many as can be held."""
    async with AsyncExitStack() as stack:
        held: list[trio.SocketStream] = []

        def close_all() -> None:
            for stream in held:
                stream.socket.close()

        stack.callback(close_all)
        while True:
            with suppress(OSError):
                held.append(
                    await trio.open_tcp_stream(
                        LOOPBACK, attack.port, local_address=attack.order.source
                    )
                )
                attack.sent += 1
            if len(held) > _SOCKETS:
                held.pop(0).socket.close()


async def _reconnect(attack: Attack, source: str) -> None:
    async def come() -> None:
        async with attack.host(certified=False, source=source) as host:
            while True:
                attack.sent += 1
                await host.connect([attack.order.address])
                await host.connections.drop(attack.victim)

    async with trio.open_nursery() as nursery:
        for _ in range(_CROWD):
            nursery.start_soon(come)


async def strangers(attack: Attack) -> None:
    """Whole handshakes without a certificate, again and again."""
    await _reconnect(attack, attack.order.source)


async def strange_neighbours(attack: Attack) -> None:
    """The same from an address that members share."""
    await _reconnect(attack, LOOPBACK)


ATTACKS: dict[str, Run] = {
    NOTHING: nothing,
    "advert flood at 10x": advert_flood,
    "bad signatures": bad_signatures,
    "junk frames on every protocol": junk_frames,
    "junk gossip RPCs": junk_rpcs,
    "window violation": window_violation,
    "slow streams": slow_streams,
    "half-open handshakes": half_open,
    "strangers reconnecting": strangers,
    "strangers at a member's address": strange_neighbours,
    "replay of old adverts": replay,
    "stale and future adverts": stale_and_future,
    "lying index peer": lying_index,
    "duplicate identity": duplicate_identity,
}


# --- the program ---------------------------------------------------------------------------------


async def _lines() -> AsyncIterator[str]:
    rest = b""
    async with trio.lowlevel.FdStream(os.dup(0)) as stream:
        async for data in stream:
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield line.decode()


def _say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


async def _run() -> None:
    attack: Attack | None = None
    async with trio.open_nursery() as everything:
        scope, ended = trio.CancelScope(), trio.Event()
        ended.set()

        async def spin() -> None:
            # Two cores may be two threads of one: what is measured before an attack is measured
            # beside a core as busy as during it.
            while True:
                if ended.is_set() or (attack is not None and attack.order.attack == NOTHING):
                    sum(range(20_000))
                    await trio.lowlevel.checkpoint()
                else:
                    await trio.sleep(0.01)

        async def run(found: Attack) -> None:
            with scope:
                try:
                    await ATTACKS[found.order.attack](found)
                except Exception as error:
                    print(f"{found.order.attack}: {error!r}", file=sys.stderr, flush=True)
            ended.set()

        everything.start_soon(spin)
        async for line in _lines():
            if line == "stop" and attack is not None:
                held = attack.connected
                scope.cancel()
                await ended.wait()
                _say(sent=attack.sent, connected=held)
                continue
            order = Order(**json.loads(line))
            world.COORDINATOR = KeyPair(bytes.fromhex(order.coordinator))
            attack, scope, ended = Attack(order), trio.CancelScope(), trio.Event()
            everything.start_soon(run, attack)
            _say(begun=order.attack)


def main() -> None:
    """Attack on one core until the input ends."""
    os.sched_setaffinity(0, {int(sys.argv[1])})
    logging.getLogger("libp2p").setLevel(logging.CRITICAL + 1)
    logging.getLogger("lumaris_overlay").setLevel(logging.CRITICAL + 1)
    trio.run(_run)


if __name__ == "__main__":
    main()
