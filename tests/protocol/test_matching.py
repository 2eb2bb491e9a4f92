"""Matching and prices: one explanation for both sides, every rounding in the buyer's favour."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumaris_protocol import codes, matching, pricing
from lumaris_protocol.limits import GIB, NANOS_MAX
from lumaris_protocol.messages.advert import Gpu, PriceTable, Resources, Runtime
from tests.protocol import parties as p


def gpu(model: str, vram: int, count: int) -> Gpu:
    return Gpu(model=model, vram_bytes=vram, count=count)


def gpus(*kinds: Gpu) -> Resources:
    return Resources(gpus=kinds)


def fits(wanted: Resources, free: Resources) -> bool:
    failures = matching.explain(
        p.requirements(resources=wanted), p.advert(free=free).message, lease_s=1
    )
    assert ("gpu_short" in failures) is (matching.subtract(free, wanted) is None)
    return not failures


@pytest.mark.parametrize(
    ("code", "needs", "offers"),
    [
        ("withdrawn", {}, {"withdrawn": True}),
        ("peer_excluded", {"excluded": (p.SELLER.peer_id,)}, {}),
        ("region_excluded", {"regions": ("us", "asia")}, {}),
        ("runtime_missing", {"tier": "vm"}, {}),
        ("assurance_low", {"assurances": ("gvisor",)}, {}),
        ("feature_missing", {"features": ("stdin",)}, {}),
        ("feature_missing", {"egress": ("example.org:443",)}, {}),
        (
            "image_missing",
            {"tier": "container", "image": p.digest_of("image")},
            {"runtimes": (Runtime(tier="container", version="1", assurance="runc"),)},
        ),
        ("cpu_short", {"resources": Resources(cpu_millis=1001)}, {}),
        ("memory_short", {"resources": Resources(memory_bytes=GIB + 1)}, {}),
        ("disk_short", {"resources": Resources(disk_bytes=GIB + 1)}, {}),
        ("gpu_short", {"resources": gpus(gpu("A", 1, 1))}, {}),
        ("duration_long", {}, {"lease_s_max": 59}),
        ("price_high", {"rate_nanos_max": 1999}, {}),
        ("price_high", {"currency": "EUR"}, {}),
    ],
)
def test_each_constraint_has_its_code(
    code: str, needs: dict[str, Any], offers: dict[str, Any]
) -> None:
    found = matching.explain(p.requirements(**needs), p.advert(**offers).message, lease_s=60)
    assert found == (code,)
    assert code in codes.CODES


def test_what_just_fits_fits() -> None:
    needs = p.requirements(regions=("eu-north",), assurances=("x", "sandbox"), rate_nanos_max=2000)
    assert matching.explain(needs, p.advert().message, lease_s=3600) == ()
    wasm = p.requirements(image=p.digest_of("image"))  # a buyer can bring a wasm module itself
    assert matching.explain(wasm, p.advert().message, lease_s=1) == ()


def test_all_failures_are_named() -> None:
    needs = p.requirements(tier="vm", resources=Resources(cpu_millis=9999), currency="EUR")
    found = matching.explain(needs, p.advert().message, lease_s=99_999)
    assert found == ("runtime_missing", "cpu_short", "duration_long", "price_high")


def test_the_cheapest_comes_first_then_who_holds_the_image() -> None:
    image = p.digest_of("image")
    cheap = PriceTable(currency="TEST", start_nanos=1, cpu_core_s_nanos=1, memory_gib_s_nanos=0)
    adverts = [
        p.advert(seller=p.BUYER.peer_id),
        p.advert(seller=p.STRANGER.peer_id, cached=(image,)),
        p.advert(seller=p.SELLER.peer_id, prices=cheap),
        p.advert(withdrawn=True),
        p.advert(region="us"),
    ]
    needs = p.requirements(image=image, regions=("eu-north",))
    report = matching.match(needs, adverts, lease_s=10)
    sellers = [match.advert.message.seller for match in report.matches]
    assert sellers == [p.SELLER.peer_id, p.STRANGER.peer_id, p.BUYER.peer_id]
    assert [match.lease_nanos for match in report.matches] == [11, 20_100, 20_100]
    assert [match.has_image for match in report.matches] == [False, True, False]
    assert (report.seen, report.excluded) == (5, {"withdrawn": 1, "region_excluded": 1})


def test_gpus_fit_by_model_memory_and_count() -> None:
    free = gpus(gpu("A", 80, 2), gpu("A", 24, 1), gpu("B", 24, 4))
    assert fits(gpus(gpu("A", 80, 2)), free)
    assert fits(gpus(gpu("A", 0, 1), gpu("A", 80, 2)), free)
    assert not fits(gpus(gpu("A", 80, 3)), free)
    assert not fits(gpus(gpu("A", 81, 1)), free)
    assert not fits(gpus(gpu("C", 0, 1)), free)
    assert not fits(gpus(gpu("B", 24, 3), gpu("B", 24, 2)), free)


def test_the_smallest_gpu_that_is_enough_is_taken() -> None:
    free = gpus(gpu("A", 80, 2), gpu("A", 24, 1))
    assert matching.subtract(free, gpus(gpu("A", 20, 1))) == gpus(gpu("A", 80, 2))
    assert matching.subtract(free, gpus(gpu("A", 40, 1))) == gpus(gpu("A", 80, 1), gpu("A", 24, 1))


_AMOUNT = st.integers(min_value=0, max_value=10)
_GPUS = st.lists(
    st.builds(gpu, st.sampled_from(["A", "B"]), st.sampled_from([0, 24, 80]), st.integers(1, 4)),
    max_size=3,
    unique_by=lambda item: (item.model, item.vram_bytes),
).map(tuple)
_RESOURCES = st.builds(
    Resources, cpu_millis=_AMOUNT, memory_bytes=_AMOUNT, disk_bytes=_AMOUNT, gpus=_GPUS
)


def gpu_count(resources: Resources) -> int:
    return sum(item.count for item in resources.gpus)


@given(_RESOURCES, _RESOURCES)
def test_a_difference_is_never_negative_and_adds_up(left: Resources, right: Resources) -> None:
    rest = matching.subtract(left, right)
    if rest is None:
        return
    assert rest.cpu_millis == left.cpu_millis - right.cpu_millis >= 0
    assert rest.memory_bytes == left.memory_bytes - right.memory_bytes >= 0
    assert rest.disk_bytes == left.disk_bytes - right.disk_bytes >= 0
    assert gpu_count(rest) == gpu_count(left) - gpu_count(right)
    assert all(item.count > 0 for item in rest.gpus)


@given(_RESOURCES)
def test_all_of_it_leaves_nothing(resources: Resources) -> None:
    assert matching.subtract(resources, resources) == Resources()


# --- prices ---


def table(**changes: int) -> PriceTable:
    fields: dict[str, Any] = {"start_nanos": 0, "cpu_core_s_nanos": 0, "memory_gib_s_nanos": 0}
    return PriceTable(currency="TEST", **(fields | changes))


def test_a_rate_is_the_sum_over_what_is_reserved() -> None:
    prices = table(
        cpu_core_s_nanos=10, memory_gib_s_nanos=100, disk_gib_s_nanos=1000, gpu_s_nanos=10_000
    )
    reserved = Resources(
        cpu_millis=2000,
        memory_bytes=3 * GIB,
        disk_bytes=4 * GIB,
        gpus=(gpu("A", 1, 5), gpu("B", 1, 1)),
    )
    assert pricing.rate_nanos_per_s(prices, reserved) == 20 + 300 + 4000 + 60_000


def test_each_part_of_a_rate_is_floored() -> None:
    prices = table(cpu_core_s_nanos=1, memory_gib_s_nanos=1)
    almost = Resources(cpu_millis=1999, memory_bytes=2 * GIB - 1)
    assert pricing.rate_nanos_per_s(prices, almost) == 2


def test_prices_never_leave_the_range_of_money() -> None:
    dear = table(start_nanos=NANOS_MAX, cpu_core_s_nanos=NANOS_MAX)
    reserved = Resources(cpu_millis=1_000_000)
    assert pricing.rate_nanos_per_s(dear, reserved) == NANOS_MAX
    assert pricing.lease_nanos(dear, reserved, 3600) == NANOS_MAX
    terms = pricing.terms_for(dear, reserved, lease_s=3600, cap_nanos=0)
    assert (terms.cap_nanos, terms.exposure_nanos) == (NANOS_MAX, NANOS_MAX)
    assert pricing.order_nanos(terms, 10**9) == NANOS_MAX


def test_terms_follow_from_the_table_and_the_cap_asked_for() -> None:
    terms = pricing.terms_for(p.PRICES, p.RESOURCES, lease_s=60, cap_nanos=0)
    assert terms.cap_nanos == 100 + 2000 * 60
    assert terms.exposure_nanos == 2000 * 10 + 100 * 8
    assert pricing.terms_for(p.PRICES, p.RESOURCES, lease_s=60, cap_nanos=5).cap_nanos == 5


@given(st.integers(min_value=0, max_value=10**12), st.integers(min_value=0, max_value=10**8))
def test_an_order_is_billed_by_the_floored_millisecond(rate: int, wall_ms: int) -> None:
    terms = msgspec.structs.replace(p.TERMS, rate_nanos_per_s=rate)
    cost = pricing.order_nanos(terms, wall_ms)
    exact = terms.start_nanos * 1000 + rate * wall_ms
    assert cost == NANOS_MAX or 0 <= exact - cost * 1000 < 1000
    assert pricing.order_nanos(terms, wall_ms + 1) >= cost
