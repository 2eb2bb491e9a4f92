"""The advert gate and the directory, with the clock as an argument."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
from msgspec import structs

from lumaris_overlay.directory import Directory
from lumaris_overlay.ports import AdvertEvent
from lumaris_overlay.validate import AdvertGate, DemandGate, TokenBuckets
from lumaris_protocol import codec, ids
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import ADVERT_LIFETIME_S_MAX, CERTIFICATE_LIFETIME_S_MAX
from lumaris_protocol.messages.advert import Resources
from lumaris_protocol.messages.demand import Demand
from lumaris_protocol.messages.negotiation import Requirements
from tests.overlay.world import KEYS, NETWORK, advert, certificate, key_of

NOW = 1_700_000_000
SELLER = key_of("seller")
GATE = AdvertGate(NETWORK, KEYS)


def offer(directory: Directory, data: bytes, now: float = NOW) -> AdvertEvent:
    """What is told of a document that says something new."""
    event = directory.offer(data, now)
    assert event is not None
    return event


def good(seq: int = 1, **changes: Any) -> bytes:
    return advert(SELLER, seq, now=changes.pop("now", NOW), **changes)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "oversize": (lambda: good() + b"x" * 2048, "oversize"),
    "empty": (lambda: b"", "malformed"),
    "cut": (lambda: good()[:-1], "malformed"),
    "altered": (lambda: good().replace(b'"local"', b'"lokal"'), "bad_signature"),
    "other network": (lambda: good(network="main"), "bad_signature"),
    "other signer": (lambda: good(signer=key_of("x")), "wrong_signer"),
    "expired": (lambda: good(now=NOW - 700), "expired"),
    "from the future": (lambda: good(now=NOW + 61), "not_yet_valid"),
    "too long": (lambda: good(lifetime_s=ADVERT_LIFETIME_S_MAX + 1), "malformed"),
    "not an advert": (lambda: certificate(SELLER.peer_id, now=NOW), "wrong_type"),
    "no certificate": (lambda: good(cert=b""), "malformed"),
    "self-made certificate": (
        lambda: good(cert=certificate(SELLER.peer_id, now=NOW, signer=SELLER)),
        "not_certified",
    ),
    "another's certificate": (
        lambda: good(cert=certificate(key_of("x").peer_id, now=NOW)),
        "not_certified",
    ),
    "buyer's certificate": (
        lambda: good(cert=certificate(SELLER.peer_id, now=NOW, roles=("buyer",))),
        "not_certified",
    ),
    "expired certificate": (
        lambda: good(cert=certificate(SELLER.peer_id, now=NOW - 7200)),
        "expired",
    ),
    "endless certificate": (
        lambda: good(
            cert=certificate(SELLER.peer_id, now=NOW, lifetime_s=CERTIFICATE_LIFETIME_S_MAX + 1)
        ),
        "not_certified",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_gate_refuses(name):
    make, code = BAD[name]
    with pytest.raises(EnvelopeError) as caught:
        GATE.check(make(), NOW)
    assert caught.value.code == code


def test_highest_seq_counts():
    directory = Directory(GATE)
    assert offer(directory, good(2)).seq == 2
    assert directory.offer(good(2), NOW) is None
    assert directory.offer(good(1), NOW) is None
    assert offer(directory, good(3)).seq == 3
    assert directory.snapshot() == [good(3)]
    assert directory.holds(good(3))
    assert not directory.holds(good(2))


def test_withdrawn_and_expired_sellers_cannot_be_replayed():
    directory = Directory(GATE)
    directory.offer(good(1, lifetime_s=900), NOW)
    event = offer(directory, good(2, lifetime_s=10, withdrawn=True))
    assert (event.envelope, event.seq) == (None, 2)
    for later in range(0, 1000, 50):
        assert directory.expire(NOW + later) == []
        # Past its expiry the gate refuses it; until then the directory remembers.
        with nullcontext() if later <= 960 else pytest.raises(EnvelopeError):
            assert directory.offer(good(1, lifetime_s=900), NOW + later) is None
    assert len(directory) == 0
    directory.expire(NOW + 2000)
    assert directory.page("", 10) == ([], "")


def test_expiry_is_told_once_and_a_newer_advert_comes_back():
    directory = Directory(GATE)
    directory.offer(good(1, lifetime_s=100), NOW)
    assert directory.expire(NOW + 159) == []
    assert [(e.envelope, e.seq) for e in directory.expire(NOW + 161)] == [(None, 1)]
    assert directory.expire(NOW + 162) == []
    assert offer(directory, good(2, now=NOW + 162), NOW + 162).seq == 2


def test_withdrawal_of_an_unknown_seller_is_kept_but_not_told():
    directory = Directory(GATE)
    assert directory.offer(good(2, withdrawn=True), NOW) is None
    assert directory.offer(good(1), NOW) is None
    assert directory.events() == []


def test_size_is_bounded():
    directory = Directory(GATE, size_max=2)
    for name in "ab":
        directory.offer(advert(key_of(name), now=NOW), NOW)
    with pytest.raises(EnvelopeError) as caught:
        directory.offer(advert(key_of("c"), now=NOW), NOW)
    assert caught.value.code == "directory_full"
    assert offer(directory, advert(key_of("a"), 2, now=NOW)).seq == 2


def test_pages_cover_everything_once():
    directory = Directory(GATE)
    for number in range(7):
        directory.offer(advert(key_of(f"p{number}"), now=NOW), NOW)
    seen, cursor = [], ""
    while True:
        page, cursor = directory.page(cursor, 3)
        seen += page
        if not cursor:
            break
    assert sorted(seen) == sorted(directory.snapshot())


def test_buckets_refill_and_forget():
    buckets = TokenBuckets(per_s=1, burst=2, names_max=2)
    assert [buckets.take("a", 0) for _ in range(3)] == [True, True, False]
    assert buckets.take("a", 1.0)
    assert not buckets.take("a", 1.5)
    for name in "bcd":
        assert buckets.take(name, 2)


def test_time_is_looked_at_only_when_something_is_due():
    directory = Directory(GATE)
    directory.offer(good(1, lifetime_s=600), NOW)
    directory.offer(advert(key_of("b"), now=NOW, lifetime_s=100), NOW)
    assert directory.expire(NOW + 159) == []
    [gone] = directory.expire(NOW + 161)
    assert gone.seller == key_of("b").peer_id
    offer(directory, good(2, lifetime_s=700))
    assert directory.expire(NOW + 700) == []
    assert [event.seller for event in directory.expire(NOW + 761)] == [SELLER.peer_id]
    assert directory.expire(NOW + 2000) == []
    assert directory.page("", 10) == ([], "")


# --- demands ---

BUYER = key_of("buyer")
NEEDS = Requirements(resources=Resources(cpu_millis=1), tier="wasm", currency="TEST")
DEMANDS = DemandGate(NETWORK, KEYS)


def demand(*, signer: KeyPair = BUYER, network: str = NETWORK, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "demand": ids.derive_id("demand", b"1"),
        "buyer": BUYER.peer_id,
        "certificate": certificate(BUYER.peer_id, now=NOW, roles=("buyer",)),
        "requirements": NEEDS,
        "lease_s": 60,
        "answers_max": 8,
        "addresses": (f"/ip4/127.0.0.1/tcp/1/p2p/{BUYER.peer_id}",),
        "issued_at": NOW,
        "expires_at": NOW + 30,
    }
    return codec.sign(Demand(**(fields | changes)), signer, network).data


BAD_DEMANDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "oversize": (lambda: demand() + bytes(4096), "oversize"),
    "an advert": (good, "wrong_type"),
    "altered": (lambda: demand().replace(b'"wasm"', b'"wasn"'), "bad_signature"),
    "other network": (lambda: demand(network="main"), "bad_signature"),
    "other signer": (lambda: demand(signer=key_of("x")), "wrong_signer"),
    "expired": (lambda: demand(issued_at=NOW - 91, expires_at=NOW - 61), "expired"),
    "from the future": (lambda: demand(issued_at=NOW + 61, expires_at=NOW + 62), "not_yet_valid"),
    "too long": (lambda: demand(expires_at=NOW + 31), "malformed"),
    "backwards": (lambda: demand(expires_at=NOW - 1), "malformed"),
    "names sellers": (
        lambda: demand(requirements=structs.replace(NEEDS, excluded=(SELLER.peer_id,))),
        "malformed",
    ),
    "another's address": (
        lambda: demand(addresses=(f"/ip4/8.8.8.8/tcp/1/p2p/{SELLER.peer_id}",)),
        "malformed",
    ),
    "two places": (
        lambda: demand(
            addresses=tuple(f"/ip4/8.8.8.{n}/tcp/1/p2p/{BUYER.peer_id}" for n in (1, 2))
        ),
        "malformed",
    ),
    "a name": (
        lambda: demand(addresses=(f"/dns4/example.org/tcp/1/p2p/{BUYER.peer_id}",)),
        "malformed",
    ),
    "a bare address": (lambda: demand(addresses=("/ip4/8.8.8.8/tcp/1",)), "malformed"),
    "a seller": (
        lambda: demand(certificate=certificate(BUYER.peer_id, now=NOW, roles=("seller",))),
        "not_certified",
    ),
    "another's certificate": (
        lambda: demand(certificate=certificate(SELLER.peer_id, now=NOW, roles=("buyer",))),
        "not_certified",
    ),
}


def test_a_demand_passes():
    found = DEMANDS.check(demand(), NOW)
    assert (found.signer, found.message.answers_max) == (BUYER.peer_id, 8)
    relay = f"/ip4/198.51.100.1/tcp/1/p2p/{SELLER.peer_id}/p2p-circuit"
    places = ("/ip4/203.0.113.7/tcp/1", "/ip4/203.0.113.7/tcp/2", relay)
    DEMANDS.check(demand(addresses=tuple(f"{p}/p2p/{BUYER.peer_id}" for p in places)), NOW)


@pytest.mark.parametrize("name", BAD_DEMANDS)
def test_a_bad_demand_goes_no_further(name):
    make, code = BAD_DEMANDS[name]
    with pytest.raises(EnvelopeError) as caught:
        DEMANDS.check(make(), NOW)
    assert caught.value.code == code


def test_a_buyer_demands_so_often():
    gate = DemandGate(NETWORK, KEYS)
    assert [gate.admit(BUYER.peer_id, 0.0) for _ in range(6)] == [True] * 5 + [False]
    assert gate.admit(SELLER.peer_id, 0.0)
    assert gate.admit(BUYER.peer_id, 5.0)
    assert not gate.admit(BUYER.peer_id, 5.0)
