"""The shard map covers every region and class once, only grows, and comes from the coordinator."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from lumaris_protocol import codec, shards
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.limits import (
    SHARD_MAP_BYTES_MAX,
    SHARD_MAP_LIFETIME_S_MAX,
    SHARDS_MAX,
)
from lumaris_protocol.messages.advert import Gpu, Resources
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.messages.shard_map import Shard, ShardMap
from lumaris_protocol.shards import ShardPlan
from tests.protocol import parties as p

GPU = Resources(gpus=(Gpu(model="x", vram_bytes=1, count=1),))
CPU = Resources(cpu_millis=1000)
REGIONS = ["eu", "us", "asia", "eu-west", "moon"]


def make(*parts: Shard, version: int = 1, **changes: Any) -> ShardMap:
    """A map of these shards."""
    fields: dict[str, Any] = {
        "network": p.NETWORK,
        "version": version,
        "shards": parts,
        "issued_at": p.NOW,
        "expires_at": p.NOW + 3600,
    }
    return ShardMap(**{**fields, **changes})


def shard(number: int, *regions: str, classes: tuple[Any, ...] = ("cpu", "gpu")) -> Shard:
    """One shard."""
    return Shard(id=number, regions=regions, classes=classes)


DIVIDED = make(
    shard(1, "eu", "eu-west", classes=("cpu",)),
    shard(2, "us", classes=("cpu",)),
    shard(3, "eu", "us", classes=("gpu",)),
    shard(4, classes=("cpu",)),
    shard(5, classes=("gpu",)),
)


@st.composite
def good_maps(draw: st.DrawFn) -> ShardMap:
    """Any division: each pair is dealt to one shard of its class, the rest to a catch-all."""
    together = draw(st.booleans())
    groups = [("cpu", "gpu")] if together else [("cpu",), ("gpu",)]
    ids = iter(draw(st.permutations(range(SHARDS_MAX))))
    parts = []
    for classes in groups:
        parts.append(shard(next(ids), classes=classes))
        named = draw(st.lists(st.sampled_from(REGIONS), unique=True))
        while named:
            size = draw(st.integers(1, len(named)))
            parts.append(shard(next(ids), *named[:size], classes=classes))
            named = named[size:]
    return make(*draw(st.permutations(parts)))


def needs(resources: Resources = CPU, *regions: str) -> Requirements:
    """What a buyer may ask for."""
    return Requirements(resources=resources, tier="wasm", currency="TEST", regions=regions)


@given(good_maps(), st.sampled_from([*REGIONS, "somewhere"]), st.sampled_from(["cpu", "gpu"]))
def test_every_region_and_class_has_exactly_one_shard(
    found: ShardMap, region: str, kind: Any
) -> None:
    shards.check(found)
    number = shards.shard_of(found, region, kind)
    (owner,) = [each for each in found.shards if each.id == number]
    assert kind in owner.classes
    assert owner.regions == () or region in owner.regions
    if not owner.regions:
        assert all(region not in each.regions for each in found.shards if kind in each.classes)


@given(
    good_maps(),
    st.lists(st.sampled_from([*REGIONS, "somewhere"]), unique=True),
    st.sampled_from([CPU, GPU]),
    st.sampled_from([*REGIONS, "nowhere"]),
    st.sampled_from([CPU, GPU]),
)
def test_a_buyer_follows_the_shard_of_every_seller_that_may_fit(
    found: ShardMap, regions: list[str], wanted: Resources, region: str, total: Resources
) -> None:
    chosen = shards.shards_for(found, needs(wanted, *regions))
    assert len(set(chosen)) == len(chosen)
    fits = (not regions or region in regions) and (bool(total.gpus) or not wanted.gpus)
    if fits:
        assert shards.shard_of(found, region, shards.class_of(total)) in chosen


@given(good_maps(), st.data())
def test_a_map_with_a_pair_twice_or_a_missing_rest_is_refused(
    found: ShardMap, data: st.DataObject
) -> None:
    one = data.draw(st.sampled_from(found.shards))
    free = next(n for n in range(SHARDS_MAX) if n not in {each.id for each in found.shards})
    for parts in (
        (*found.shards, one),
        (*found.shards, structs.replace(one, id=free)),
        tuple(each for each in found.shards if each.regions),
    ):
        if parts:
            with pytest.raises(EnvelopeError) as caught:
                shards.check(structs.replace(found, shards=parts))
            assert caught.value.code == "map_invalid"


def test_likely_shards_come_first() -> None:
    assert shards.shards_for(DIVIDED, needs(CPU, "us", "eu")) == (2, 1, 3)
    assert shards.shards_for(DIVIDED, needs(GPU, "us", "eu")) == (3,)
    assert shards.shards_for(DIVIDED, needs(GPU)) == (3, 5)
    assert shards.shards_for(DIVIDED, needs(CPU, "moon")) == (4, 5)
    assert shards.shards_for(shards.default_map("testnet"), needs(CPU, "moon")) == (0,)


def open_it(found: ShardMap, known: ShardMap, key: Any = p.COORDINATOR, **changes: Any) -> ShardMap:
    """Sign and open."""
    signed = codec.sign(found, key, p.NETWORK)
    arguments: dict[str, Any] = {
        "network": p.NETWORK,
        "signers": {p.COORDINATOR.peer_id},
        "now": p.NOW,
    }
    return shards.open_map(signed.data, known, **{**arguments, **changes}).message


def test_the_version_only_grows() -> None:
    first, known = make(shard(0)), shards.default_map(p.NETWORK)
    assert open_it(first, known) == first
    again = structs.replace(first, issued_at=p.NOW + 5)
    assert open_it(again, first) == again
    newer = structs.replace(DIVIDED, version=2)
    assert open_it(newer, first) == newer
    for older, held in ((first, newer), (structs.replace(DIVIDED, version=1), first)):
        with pytest.raises(EnvelopeError) as caught:
            open_it(older, held)
        assert caught.value.code == "map_stale"


@pytest.mark.parametrize(
    ("found", "changes", "code"),
    [
        (DIVIDED, {"signers": {p.STRANGER.peer_id}}, "not_certified"),
        (DIVIDED, {"now": p.NOW + 3600 + 61}, "expired"),
        (DIVIDED, {"now": p.NOW - 61}, "not_yet_valid"),
        (structs.replace(DIVIDED, network="other"), {}, "wrong_domain"),
        (
            structs.replace(DIVIDED, expires_at=p.NOW + SHARD_MAP_LIFETIME_S_MAX + 1),
            {},
            "malformed",
        ),
        (make(shard(0, "eu")), {}, "map_invalid"),
        (make(shard(0, classes=("cpu", "cpu")), shard(1, classes=("gpu",))), {}, "map_invalid"),
    ],
)
def test_a_map_that_is_refused(found: ShardMap, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(EnvelopeError) as caught:
        open_it(found, shards.default_map(p.NETWORK), **changes)
    assert caught.value.code == code


def test_a_kept_map_stays_good_while_the_coordinator_is_away() -> None:
    data = codec.sign(DIVIDED, p.COORDINATOR, p.NETWORK).data
    signers = {p.COORDINATOR.peer_id}
    assert shards.open_kept(data, network=p.NETWORK, signers=signers).message == DIVIDED


def test_junk_is_refused_by_its_size_first() -> None:
    with pytest.raises(EnvelopeError) as caught:
        shards.open_kept(bytes(SHARD_MAP_BYTES_MAX + 1), network=p.NETWORK, signers=())
    assert caught.value.code == "oversize"


def test_a_seller_is_found_by_both_maps_for_one_refresh() -> None:
    old, new = make(shard(0)), structs.replace(DIVIDED, version=2)
    plan = ShardPlan(old)
    assert plan.of_seller("eu", "cpu", p.NOW) == (0,)
    plan = plan.next(new, p.NOW)
    assert plan.of_seller("eu", "cpu", p.NOW) == (1, 0)
    assert plan.for_buyer(needs(CPU, "eu"), p.NOW) == (1, 3, 0)
    again = plan.next(structs.replace(new, issued_at=p.NOW + 9), p.NOW + 9)
    assert again.of_seller("eu", "cpu", p.NOW + 9) == (1, 0)
    after = p.NOW + shards.OVERLAP_S
    assert again.of_seller("eu", "cpu", after) == (1,)
    assert again.for_buyer(needs(CPU, "eu"), after) == (1, 3)


@given(good_maps(), good_maps(), st.sampled_from(REGIONS), st.sampled_from([CPU, GPU]))
def test_during_a_change_a_buyer_with_either_map_finds_the_seller(
    old: ShardMap, new: ShardMap, region: str, total: Resources
) -> None:
    newer = structs.replace(new, version=2)
    seller = ShardPlan(old).next(newer, 0.0)
    topics = set(seller.of_seller(region, shards.class_of(total), 1.0))
    for buyer in (ShardPlan(old), ShardPlan(newer), seller):
        assert topics & set(buyer.for_buyer(needs(total, region), 1.0))


@given(st.binary(max_size=200))
def test_junk_is_no_map(data: bytes) -> None:
    with pytest.raises(EnvelopeError):
        shards.open_map(
            data,
            shards.default_map(p.NETWORK),
            network=p.NETWORK,
            signers={p.COORDINATOR.peer_id},
            now=p.NOW,
        )
