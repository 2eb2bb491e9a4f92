"""Which records of a peer honest hosts take, and which of two is the newer."""

from __future__ import annotations

import time
from typing import Any

import pytest

from lumaris_overlay.records import EndpointSigner, RecordGate, newest
from lumaris_protocol import codec
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import CLOCK_SKEW_S, ENDPOINT_LIFETIME_S_MAX
from lumaris_protocol.messages.endpoint import Endpoint
from tests.overlay.world import KEYS, NETWORK, advert, certificate, key_of

PEER = key_of("peer")
GATE = RecordGate(NETWORK, KEYS)


def endpoint(
    key: KeyPair = PEER,
    *,
    now: float | None = None,
    lifetime_s: int = 3600,
    seq: int = 1,
    signer: KeyPair | None = None,
    cert: bytes | None = None,
    network: str = NETWORK,
    services: tuple[Any, ...] = (),
    shards: tuple[int, ...] = (),
    addresses: tuple[str, ...] = (),
) -> bytes:
    issued = int(time.time() if now is None else now)
    message = Endpoint(
        peer=key.peer_id,
        seq=seq,
        addresses=addresses,
        services=services,
        shards=shards,
        issued_at=issued,
        expires_at=issued + lifetime_s,
        certificate=certificate(key.peer_id, now=now, roles=("buyer",)) if cert is None else cert,
    )
    return codec.sign(message, signer or key, network).data


def refusal(data: bytes, now: float | None = None) -> str:
    with pytest.raises(EnvelopeError) as caught:
        GATE.check(data, time.time() if now is None else now)
    return caught.value.code


def test_an_endpoint_says_where_and_what():
    data = endpoint(services=("index", "relay"), shards=(1, 2), addresses=("/ip4/10.0.0.1/tcp/1",))
    record = GATE.check(data, time.time())
    assert (record.peer, record.services, record.shards) == (
        PEER.peer_id,
        ("index", "relay"),
        (1, 2),
    )
    assert record.addresses == ("/ip4/10.0.0.1/tcp/1",)
    assert (record.data, record.withdrawn) == (data, False)


def test_an_advert_is_a_record_too():
    record = GATE.check(advert(PEER, 7, addresses=("/ip4/10.0.0.1/tcp/1",)), time.time())
    assert (record.peer, record.seq, record.addresses) == (
        PEER.peer_id,
        7,
        ("/ip4/10.0.0.1/tcp/1",),
    )
    assert GATE.check(advert(PEER, 8, withdrawn=True), time.time()).withdrawn


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (lambda: b"", "malformed"),
        (lambda: b"junk" * 100, "malformed"),
        (lambda: endpoint() + b"x", "malformed"),
        (lambda: endpoint() + b"x" * 4000, "oversize"),
        (lambda: endpoint(signer=key_of("forger")), "wrong_signer"),
        (lambda: endpoint(network="other"), "bad_signature"),
        (lambda: endpoint(cert=certificate(PEER.peer_id, signer=PEER)), "not_certified"),
        (lambda: endpoint(cert=certificate(key_of("x").peer_id)), "not_certified"),
        (lambda: endpoint(lifetime_s=ENDPOINT_LIFETIME_S_MAX + 1), "malformed"),
        (lambda: endpoint(now=time.time() + 2 * CLOCK_SKEW_S), "not_yet_valid"),
        (lambda: endpoint(now=time.time() - 8000), "expired"),
        (lambda: certificate(PEER.peer_id), "wrong_type"),
        (lambda: advert(PEER, signer=key_of("forger")), "wrong_signer"),
    ],
)
def test_what_is_refused(data, code):
    assert refusal(data()) == code


def test_later_wins_then_the_higher_seq_then_one_of_two_for_all():
    now = time.time()
    early, late = (GATE.check(endpoint(now=now - back), now) for back in (5, 1))
    low, high = (GATE.check(endpoint(now=now, seq=seq), now) for seq in (1, 2))
    assert newest(early, late) is late
    assert newest(high, low) is high
    one, two = (
        GATE.check(endpoint(now=now, addresses=(f"/ip4/10.0.0.{n}/tcp/1",)), now) for n in (1, 2)
    )
    assert newest(one, two) is newest(two, one)
    assert newest(None, None) is None


def test_each_endpoint_we_sign_is_newer_than_the_last():
    signer = EndpointSigner(PEER, NETWORK)
    cert = certificate(PEER.peer_id)
    now = time.time()
    said = [
        GATE.check(signer.sign(certificate=cert, addresses=(), now=now, after=after), now)
        for after in (0, 0, int(now) + 10)
    ]
    assert [newest(*said[: n + 1]) for n in range(3)] == said
    assert said[2].issued_at > now + 10
