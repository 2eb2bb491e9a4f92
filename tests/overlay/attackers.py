"""Hosts that say what they are told to and bad documents, for the tests of hostile peers."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair as Libp2pKeyPair
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.validators import PUBSUB_SIGNING_PREFIX
from libp2p.utils.varint import encode_varint_prefixed

from lumaris_overlay.libp2p import build, overrides
from lumaris_overlay.libp2p.admission import Admission
from lumaris_overlay.libp2p.gossip import ADVERTS, topic_of
from lumaris_overlay.libp2p.guarded_pubsub import GuardedPubsub, GuardedRouter, Judgement, Manners
from lumaris_overlay.libp2p.host import HostConfig, Libp2pOverlay, open_host
from lumaris_overlay.validate import MembershipGate
from tests.overlay.hosts import member
from tests.overlay.world import (
    COORDINATOR,
    KEYS,
    NETWORK,
    advert,
    certificate,
    echo,
    key_of,
    until,
)

STRANGER = key_of("stranger")
# An attack that starves the honest makes them wait for seconds; a busy machine for tenths.
PATIENCE_S = 20.0
ROGUE = key_of("rogue coordinator")
TOPIC = topic_of(NETWORK, ADVERTS)
SENDER = create_new_key_pair(b"s" * 32)
SENDER_ID = ID.from_pubkey(SENDER.public_key)


def uncertified(name: str) -> HostConfig:
    """A host that dials, but shows the word of a coordinator that nobody here knows."""
    key = key_of(name)
    return HostConfig(
        key=key,
        network=NETWORK,
        coordinator_keys=frozenset({ROGUE.peer_id, COORDINATOR.peer_id}),
        certificate=certificate(key.peer_id, signer=ROGUE),
    )


@asynccontextmanager
async def honest_and_stranger() -> AsyncIterator[tuple[Libp2pOverlay, Libp2pOverlay]]:
    """An honest host, and a certified one that is connected to it and says what it is told to."""
    async with open_host(member("one")) as honest, open_host(member(STRANGER)) as stranger:
        assert await stranger.connect((await honest.reachability()).addresses) == 1
        yield honest, stranger


@asynccontextmanager
async def friend_of(honest: Libp2pOverlay) -> AsyncIterator[Libp2pOverlay]:
    """Another honest host that is connected to the honest one alone."""
    async with open_host(member("friend")) as friend:
        assert await friend.connect((await honest.reachability()).addresses) == 1
        await until(lambda: friend.exchange.gossip.in_mesh(honest.host.get_id()))
        yield friend


def dial_from(overlay: Libp2pOverlay, ip: str) -> None:
    """Let a host's connections come from this address of this machine."""
    (transport,) = overlay.host.get_network().transport_manager.get_transports()
    transport._dial_resolved = partial(transport._dial_resolved, source=(ip, 0))


async def works(one: Libp2pOverlay, two: Libp2pOverlay) -> None:
    """The host `one` is alive: it still answers."""
    protocol = f"/alive/{os.urandom(4).hex()}"
    async with one.serve(protocol, echo):
        stream = await two.open_stream(
            one.peer_id, protocol, addresses=(await one.reachability()).addresses
        )
        with trio.fail_after(10):
            async with stream:
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"


async def raw_stream(attacker: Libp2pOverlay, honest: Libp2pOverlay, protocol: str) -> Any:
    """A stream without any of our own manners."""
    return await attacker.host.new_stream(honest.host.get_id(), [protocol])


def rpc_bytes(**fields: object) -> bytes:
    """One gossip RPC as it goes over the wire."""
    return encode_varint_prefixed(rpc_pb2.RPC(**fields).SerializeToString())  # type: ignore[arg-type]


def gossip_message(key: Libp2pKeyPair, data: bytes, topics: list[str]) -> rpc_pb2.Message:
    """A signed message, as `Pubsub.publish` makes it."""
    sender = ID.from_pubkey(key.public_key)
    message = rpc_pb2.Message(
        data=data, topicIDs=topics, from_id=sender.to_bytes(), seqno=os.urandom(8)
    )
    message.signature = key.private_key.sign(
        PUBSUB_SIGNING_PREFIX.encode() + message.SerializeToString()
    )
    message.key = key.public_key.serialize()
    return message


def forgeries() -> list[bytes]:
    """Adverts that nobody may believe."""
    now = time.time()
    return [
        b"",
        os.urandom(300),
        advert(STRANGER)[:-3],
        advert(STRANGER, signer=key_of("forger")),
        advert(STRANGER, cert=certificate(STRANGER.peer_id, signer=STRANGER)),
        advert(STRANGER, cert=certificate(key_of("x").peer_id)),
        advert(STRANGER, now=now - 3000),
        advert(STRANGER, now=now + 300, cert=certificate(STRANGER.peer_id)),
        advert(STRANGER, network="other"),
        advert(STRANGER) + b"x" * 4000,
    ]


async def latency_s(asker: Libp2pOverlay, asked: Libp2pOverlay, times: int = 5) -> float:
    """The middle of some round trips over a new stream each; a test protocol of no limit."""
    found = []
    for _ in range(times):
        with trio.fail_after(PATIENCE_S):
            began = trio.current_time()
            stream = await asker.open_stream(asked.peer_id, "/still/1")
            async with stream:
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"
            found.append(trio.current_time() - began)
    return sorted(found)[times // 2]


async def attacked(
    friend: Libp2pOverlay, honest: Libp2pOverlay, attack: Callable[[], Awaitable[None]]
) -> None:
    """Run the attack; the honest go on answering each other meanwhile and afterwards."""
    async with honest.serve("/still/1", echo), trio.open_nursery() as nursery:
        before_s = await latency_s(friend, honest)
        nursery.start_soon(attack)
        during_s = await latency_s(friend, honest)
        nursery.cancel_scope.cancel()
    print(f"latency before={before_s * 1000:.1f}ms during={during_s / before_s:.1f}x")


def idle_host(name: str = "one") -> overrides.GuardedHost:
    """A host that is not running."""
    key = key_of(name)
    admission = Admission(MembershipGate(NETWORK, KEYS), key.peer_id)
    return build.build_host(key, lambda found: found, overrides.ClosingTCP(), admission)


def content_id(message: rpc_pb2.Message) -> bytes:
    return bytes(message.data)


def guarded_pubsub(judge=lambda forwarder, data: Judgement.PASS) -> Any:
    router = GuardedRouter(
        protocols=[TProtocol("/meshsub/1.1.0")], degree=6, degree_low=4, degree_high=12
    )
    found = GuardedPubsub(idle_host(), router, msg_id_constructor=content_id, manners=Manners())
    found.judges[TOPIC] = judge
    return found
