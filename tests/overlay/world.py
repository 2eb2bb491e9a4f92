"""Signed adverts and keys for the overlay's tests."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import trio

from lumaris_overlay.ports import AdvertEvent, Overlay, OverlayStream
from lumaris_protocol import codec, ids
from lumaris_protocol.errors import RemoteError
from lumaris_protocol.keys import KeyPair, PeerId
from lumaris_protocol.messages.advert import (
    Advert,
    MembershipCertificate,
    PriceTable,
    Resources,
    Runtime,
)
from lumaris_protocol.messages.demand import Demand
from lumaris_protocol.messages.negotiation import Requirements

NETWORK = "test"


def key_of(name: str) -> KeyPair:
    return KeyPair(hashlib.sha256(f"overlay test {name}".encode()).digest())


COORDINATOR = key_of("coordinator")
KEYS: frozenset[PeerId] = frozenset({COORDINATOR.peer_id})


def certificate(
    peer: PeerId,
    *,
    signer: KeyPair = COORDINATOR,
    now: float | None = None,
    lifetime_s: int = 3600,
    roles: tuple[Any, ...] = ("buyer", "seller"),
) -> bytes:
    issued = int(time.time() if now is None else now)
    return codec.sign(
        MembershipCertificate(
            peer=peer,
            account="acc_" + "a" * 24,
            roles=roles,
            bond_band=0,
            serial=1,
            issued_at=issued,
            expires_at=issued + lifetime_s,
        ),
        signer,
        NETWORK,
    ).data


def advert(
    key: KeyPair,
    seq: int = 1,
    *,
    now: float | None = None,
    lifetime_s: int = 600,
    withdrawn: bool = False,
    signer: KeyPair | None = None,
    cert: bytes | None = None,
    addresses: tuple[str, ...] = (),
    network: str = NETWORK,
) -> bytes:
    issued = int(time.time() if now is None else now)
    return codec.sign(
        Advert(
            seller=key.peer_id,
            seq=seq,
            issued_at=issued,
            expires_at=issued + lifetime_s,
            region="local",
            total=Resources(cpu_millis=1000),
            free=Resources(cpu_millis=1000),
            runtimes=(Runtime(tier="wasm", version="1", assurance="wasm-1"),),
            benchmarks={},
            prices=PriceTable(
                currency="TEST", start_nanos=1, cpu_core_s_nanos=1, memory_gib_s_nanos=1
            ),
            lease_s_max=600,
            addresses=addresses,
            certificate=certificate(key.peer_id, now=now) if cert is None else cert,
            withdrawn=withdrawn,
        ),
        signer or key,
        network,
    ).data


def demand(
    key: KeyPair,
    number: int = 1,
    *,
    now: float | None = None,
    lifetime_s: int = 20,
    signer: KeyPair | None = None,
    cert: bytes | None = None,
) -> bytes:
    issued = int(time.time() if now is None else now)
    return codec.sign(
        Demand(
            demand=ids.make_id("demand", number.to_bytes(ids.ID_RANDOM_BYTES, "big")),
            buyer=key.peer_id,
            certificate=certificate(key.peer_id, now=now) if cert is None else cert,
            requirements=Requirements(
                resources=Resources(cpu_millis=1000), tier="wasm", currency="TEST"
            ),
            lease_s=60,
            answers_max=4,
            issued_at=issued,
            expires_at=issued + lifetime_s,
        ),
        signer or key,
        NETWORK,
    ).data


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    with trio.fail_after(timeout_s):
        while not condition():
            await trio.sleep(0.005)


async def next_of(
    events: trio.MemoryReceiveChannel[AdvertEvent], seller: PeerId, timeout_s: float = 10.0
) -> AdvertEvent:
    with trio.fail_after(timeout_s):
        while True:
            event = await events.receive()
            if event.seller == seller:
                return event


async def seen_all(
    events: trio.MemoryReceiveChannel[AdvertEvent], sellers: set[str], timeout_s: float = 10.0
) -> None:
    """Wait until each of these sellers was told of; the order between sellers is free."""
    missing = set(sellers)
    with trio.fail_after(timeout_s):
        while missing:
            missing.discard((await events.receive()).seller)


async def read_all(stream: OverlayStream) -> bytes:
    out = bytearray()
    while data := await stream.receive_some():
        out += data
    return bytes(out)


async def echo(stream: OverlayStream) -> None:
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


async def open_when_ready(
    overlay: Overlay, peer: PeerId, protocol: str, timeout_s: float = 20.0
) -> OverlayStream:
    """A stream, as soon as the other side answers."""
    deadline = trio.current_time() + timeout_s
    while True:
        try:
            return await overlay.open_stream(peer, protocol)
        except RemoteError:
            if trio.current_time() > deadline:
                raise
        await trio.sleep(0.02)
