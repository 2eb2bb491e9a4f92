"""Coordinators' notices for the overlay's tests."""

from __future__ import annotations

import time

import trio

from lumaris_overlay.ports import Notice
from lumaris_protocol import codec
from lumaris_protocol.keys import KeyPair, PeerId
from lumaris_protocol.messages.notice import KeyList, Revocations, Revoked, SigningKey
from tests.overlay.world import COORDINATOR, NETWORK, key_of

ROOT = key_of("root")
ROOTS: frozenset[PeerId] = frozenset({ROOT.peer_id})


def revocations(
    *peers: PeerId,
    seq: int = 1,
    after: int | None = None,
    serial: int = 0,
    at: float | None = None,
    signer: KeyPair = COORDINATOR,
    now: float | None = None,
) -> bytes:
    issued = int(time.time() if now is None else now)
    when = issued if at is None else int(at)
    return codec.sign(
        Revocations(
            coordinator=COORDINATOR.peer_id,
            after=seq - 1 if after is None else after,
            seq=seq,
            revoked=tuple(
                Revoked(peer=peer, serial=serial, at=when, reason="test") for peer in peers
            ),
            issued_at=issued,
        ),
        signer,
        NETWORK,
    ).data


def keys(seq: int = 1, *, root: KeyPair = ROOT, name: str = "a", now: float | None = None) -> bytes:
    issued = int(time.time() if now is None else now)
    held = SigningKey(peer=key_of(name).peer_id, not_before=issued, not_after=issued + 3600)
    message = KeyList(root=root.peer_id, seq=seq, keys=(held,), issued_at=issued)
    return codec.sign(message, root, NETWORK).data


async def next_notice(
    notices: trio.MemoryReceiveChannel[Notice], data: bytes, timeout_s: float = 10.0
) -> Notice:
    with trio.fail_after(timeout_s):
        while True:
            notice = await notices.receive()
            if notice.envelope == data:
                return notice
