"""The index answers as `matching.match` does, for any world, in any order of changes."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lumaris_protocol import keys, matching, slot_sets
from lumaris_protocol.codec import Signed
from lumaris_protocol.limits import NANOS_MAX
from lumaris_protocol.messages.advert import Advert, Gpu, PriceTable, Resources, Runtime
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.offer_index import OfferIndex
from lumaris_protocol.slot_sets import Ordered, Postings
from tests.protocol import parties as p

SELLERS: list[str] = [keys.KeyPair(bytes([n, n >> 8] * 16)).peer_id for n in range(150)]
IMAGES = [p.digest_of(f"image {n}") for n in range(4)]
GPUS = [
    (),
    (),
    (Gpu(model="A", vram_bytes=24, count=1),),
    (Gpu(model="A", vram_bytes=80, count=2), Gpu(model="B", vram_bytes=24, count=4)),
]
RUNTIMES = [
    Runtime(tier=tier, version="1", assurance=assurance)
    for tier in ("wasm", "container")
    for assurance in ("low", "high")
]


def resources(rng: random.Random, top: int) -> Resources:
    return Resources(
        cpu_millis=rng.randrange(top),
        memory_bytes=rng.randrange(top) << 28,
        disk_bytes=rng.randrange(top) << 28,
        gpus=rng.choice(GPUS),
    )


def prices(rng: random.Random, top: int) -> PriceTable:
    """Prices of which few, many or all differ; the dearest leave the range of money."""
    return PriceTable(
        currency=rng.choice(("TEST", "TEST", "TEST", "EUR")),
        start_nanos=rng.randrange(top),
        cpu_core_s_nanos=rng.choice((rng.randrange(top), rng.randrange(top), NANOS_MAX)),
        memory_gib_s_nanos=rng.randrange(top),
        disk_gib_s_nanos=rng.randrange(top),
        gpu_s_nanos=rng.randrange(top),
    )


def offer(rng: random.Random, seller: str, top: int, **changes: Any) -> Signed[Advert]:
    fields: dict[str, Any] = {
        "seller": seller,
        "region": rng.choice(("eu", "us", "asia")),
        "free": resources(rng, top),
        "total": resources(rng, top),
        "runtimes": tuple(rng.sample(RUNTIMES, rng.randrange(4))),
        "prices": prices(rng, top),
        "lease_s_max": rng.randrange(10),
        "cached": tuple(rng.sample(IMAGES, rng.randrange(3))),
        "withdrawn": rng.random() < 0.1,
        "expires_at": rng.randrange(100),
    }
    return Signed(structs.replace(ADVERT, **(fields | changes)), keys.PeerId(seller), b"")


ADVERT = p.advert().message


def needs(rng: random.Random, top: int) -> Requirements:
    return Requirements(
        resources=resources(rng, top),
        tier=rng.choice(("wasm", "container", "vm")),
        image=rng.choice((None, *IMAGES)),
        assurances=rng.choice(((), ("high",), ("low", "high"), ("other",))),
        regions=rng.choice(((), (), ("eu",), ("eu", "us", "mars"))),
        currency=rng.choice(("TEST", "TEST", "EUR", "OLD")),
        rate_nanos_max=rng.choice((0, 1 + rng.randrange(top), NANOS_MAX)),
        excluded=tuple(rng.sample(SELLERS, rng.choice((0, 0, 40)))),
    )


def idle(advert: Signed[Advert]) -> Signed[Advert]:
    return replace(advert, message=structs.replace(advert.message, free=advert.message.total))


def assert_same(index: OfferIndex, world: Mapping[str, Signed[Advert]], rng: random.Random) -> None:
    top = rng.choice((1, 3, 40))
    asked, lease_s, count = needs(rng, top), rng.randrange(10), rng.choice((0, 1, 3, 200))
    for as_if_idle in (False, True):
        adverts = [idle(advert) if as_if_idle else advert for advert in world.values()]
        expected = matching.match(asked, adverts, lease_s=lease_s)
        found = index.search(asked, lease_s=lease_s, count=count, as_if_idle=as_if_idle)
        assert (found.seen, found.fitting) == (len(world), len(expected.matches))
        assert found.excluded == expected.excluded
        shown = [(item.lease_nanos, item.has_image, item.advert.signer) for item in found.matches]
        assert shown == [
            (item.lease_nanos, item.has_image, item.advert.signer)
            for item in expected.matches[:count]
        ]
        assert all(item.advert is world[item.advert.signer] for item in found.matches)


@given(st.integers(min_value=0, max_value=1 << 32))
def test_any_small_world(seed: int) -> None:
    rng = random.Random(seed)
    top = rng.choice((1, 3, 40))
    world = {seller: offer(rng, seller, top) for seller in rng.sample(SELLERS, rng.randrange(12))}
    index = OfferIndex()
    for advert in world.values():
        index.put(advert)
    assert_same(index, world, rng)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_world_that_changes(seed: int) -> None:
    """Sellers come, change, expire and go, through every split and merge of the index."""
    rng = random.Random(seed)
    top = rng.choice((1, 3, 40))
    index, world = OfferIndex(), dict[str, Signed[Advert]]()
    now = 0
    for step in range(900):
        seller = rng.choice(SELLERS)
        # The world grows, shrinks to nothing, and grows again.
        grows = step % 600 < 400
        if rng.random() < (0.8 if grows else 0.1):
            world[seller] = offer(rng, seller, top, expires_at=now + 1 + rng.randrange(900))
            index.put(world[seller])
        elif rng.random() < 0.9:
            assert index.remove(seller) is (world.pop(seller, None) is not None)
        else:
            now += rng.randrange(10)
            gone = {name for name, item in world.items() if item.message.expires_at <= now}
            assert sorted(index.expire(now)) == sorted(gone)
            for name in gone:
                del world[name]
        assert len(index) == len(world)
        if step % 9 == 0:
            assert_same(index, world, rng)
    assert {advert.signer for advert in index.adverts} == world.keys()


def test_one_seller_is_explained() -> None:
    index = OfferIndex()
    index.put(p.advert())
    asked = p.requirements(tier="vm", currency="EUR")
    assert index.explain(asked, p.SELLER.peer_id, lease_s=1) == ("runtime_missing", "price_high")
    assert index.explain(p.requirements(), p.SELLER.peer_id, lease_s=1) == ()
    assert index.explain(asked, p.BUYER.peer_id, lease_s=1) is None
    held = index.get(p.SELLER.peer_id)
    assert held is not None
    assert held.data == p.advert().data


def test_replaced_adverts_do_not_pile_up() -> None:
    index, rng = OfferIndex(), random.Random(1)
    for n in range(1000):
        index.put(offer(rng, SELLERS[0], 3, expires_at=1000 + n))
    assert len(index._expiries) < 100
    assert index.expire(1998) == []
    assert index.expire(1999) == [SELLERS[0]]
    assert len(index) == 0
    assert not index._prices
    assert not list(index._labels)


# --- what it is made of ---


@given(st.lists(st.integers(min_value=0, max_value=300), max_size=40))
def test_a_set_of_slots_holds_what_was_put_in(slots: list[int]) -> None:
    bits = slot_sets.of_slots(slots)
    assert slot_sets.slots_of(bits) == sorted(set(slots))
    assert bits.bit_count() == len(set(slots))


@given(st.lists(st.integers(min_value=0, max_value=30), max_size=300), st.randoms())
def test_ordered_slots(values: list[int], rng: random.Random) -> None:
    order, held = Ordered(), dict(enumerate(values))
    for slot, value in held.items():
        order.add(value, slot)
    for slot in rng.sample(sorted(held), len(held) // 2):
        order.remove(held.pop(slot), slot)
    for value in range(-1, 32, 3):
        expected = {slot for slot, has in held.items() if has >= value}
        assert slot_sets.slots_of(order.at_least(value)) == sorted(expected)
    among = slot_sets.of_slots([slot for slot in held if slot % 3])
    ranked = sorted((has, slot) for slot, has in held.items() if slot % 3)
    assert order.first(among, 5) == [slot for _, slot in ranked[:5]]


def test_a_value_is_carried_until_its_last_slot_leaves() -> None:
    postings: Postings[str] = Postings()
    for slot in range(40):
        postings.add("common", slot)
    postings.add("rare", 7)
    assert postings.get("common") == (1 << 40) - 1
    assert sorted(postings) == ["common", "rare"]
    assert [postings.remove("common", slot) for slot in range(40)] == [True] * 39 + [False]
    assert not postings.remove("rare", 7)
    assert (list(postings), postings.get("rare")) == ([], 0)
