"""Which sellers fit, and why the others do not.

One function explains a single pair; the buyer uses it over its directory, the seller on a request,
so both always give the same answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lumaris_protocol import pricing
from lumaris_protocol.codec import Signed
from lumaris_protocol.messages.advert import Advert, Feature, Gpu, Resources
from lumaris_protocol.messages.negotiation import Requirements


@dataclass(frozen=True)
class Match:
    """A seller that fits, with what one order over the whole lease would cost there."""

    advert: Signed[Advert]
    lease_nanos: int
    has_image: bool


@dataclass(frozen=True)
class MatchReport:
    """The sellers that fit, best first, and how many each constraint excluded.

    `fitting` counts all that fit, when `matches` holds only the best of them.
    """

    matches: tuple[Match, ...]
    seen: int
    excluded: dict[str, int]
    fitting: int


def explain(needs: Requirements, advert: Advert, *, lease_s: int) -> tuple[str, ...]:
    """Codes of every constraint that keeps this seller from fitting; empty when it fits."""
    free, wanted, prices = advert.free, needs.resources, advert.prices
    runtimes = [runtime for runtime in advert.runtimes if runtime.tier == needs.tier]
    failures = {
        "withdrawn": advert.withdrawn,
        "peer_excluded": advert.seller in needs.excluded,
        "region_excluded": bool(needs.regions) and advert.region not in needs.regions,
        "runtime_missing": not runtimes,
        "assurance_low": bool(needs.assurances and runtimes)
        and not any(runtime.assurance in needs.assurances for runtime in runtimes),
        "image_missing": needs.tier != "wasm"
        and needs.image is not None
        and not needs.image_fetched
        and needs.image not in advert.cached,
        "feature_missing": bool(runtimes)
        and not needed_features(needs).issubset(
            feature for runtime in runtimes for feature in runtime.features
        ),
        "cpu_short": free.cpu_millis < wanted.cpu_millis,
        "memory_short": free.memory_bytes < wanted.memory_bytes,
        "disk_short": free.disk_bytes < wanted.disk_bytes,
        "gpu_short": not gpus_fit(wanted.gpus, free.gpus),
        "duration_long": lease_s > advert.lease_s_max,
        "price_high": prices.currency != needs.currency
        or 0 < needs.rate_nanos_max < pricing.rate_nanos_per_s(prices, wanted),
    }
    return tuple(code for code, failed in failures.items() if failed)


def needed_features(needs: Requirements) -> set[Feature]:
    """What a tier must offer: what is asked by name, and what follows from the rest."""
    features = set(needs.features)
    if needs.egress:
        features.add("egress")
    return features


def match(needs: Requirements, adverts: Iterable[Signed[Advert]], *, lease_s: int) -> MatchReport:
    """Sort adverts into fitting and excluded; cheapest first, then those that hold the image."""
    matches: list[Match] = []
    excluded: Counter[str] = Counter()
    seen = 0
    for advert in adverts:
        seen += 1
        failures = explain(needs, advert.message, lease_s=lease_s)
        excluded.update(failures)
        if failures:
            continue
        price = pricing.lease_nanos(advert.message.prices, needs.resources, lease_s)
        holds = needs.image is not None and needs.image in advert.message.cached
        matches.append(Match(advert, price, holds))
    matches.sort(
        key=lambda item: (item.lease_nanos, not item.has_image, item.advert.message.seller)
    )
    return MatchReport(tuple(matches), seen, dict(excluded), len(matches))


def subtract(left: Resources, right: Resources) -> Resources | None:
    """`left` without `right`, or None when it does not fit inside."""
    cpu = left.cpu_millis - right.cpu_millis
    memory = left.memory_bytes - right.memory_bytes
    disk = left.disk_bytes - right.disk_bytes
    if min(cpu, memory, disk) < 0 or not gpus_fit(right.gpus, left.gpus):
        return None
    taken = Counter({(gpu.model, gpu.vram_bytes): 0 for gpu in left.gpus})
    for wanted in _choosy_first(right.gpus):
        taken[_place(wanted, left.gpus, taken)] += wanted.count
    gpus = tuple(
        Gpu(model=gpu.model, vram_bytes=gpu.vram_bytes, count=gpu.count - used)
        for gpu in left.gpus
        if (used := taken[gpu.model, gpu.vram_bytes]) < gpu.count
    )
    return Resources(cpu_millis=cpu, memory_bytes=memory, disk_bytes=disk, gpus=gpus)


def gpus_fit(wanted: tuple[Gpu, ...], free: tuple[Gpu, ...]) -> bool:
    """Whether all wanted GPUs can be taken from the free ones at once."""
    taken: Counter[tuple[str, int]] = Counter()
    for gpu in _choosy_first(wanted):
        try:
            taken[_place(gpu, free, taken)] += gpu.count
        except LookupError:
            return False
    return True


def _choosy_first(wanted: tuple[Gpu, ...]) -> list[Gpu]:
    """Those that name a model before those that take any."""
    return sorted(wanted, key=lambda gpu: (not gpu.model, -gpu.vram_bytes))


def _place(wanted: Gpu, free: tuple[Gpu, ...], taken: Counter[tuple[str, int]]) -> tuple[str, int]:
    """The kind of free GPU that serves a wanted one: the smallest of its model that is enough.

    A wanted one without a model takes any.
    """
    fitting = [
        (gpu.vram_bytes, gpu.model)
        for gpu in free
        if wanted.model in ("", gpu.model)
        and gpu.vram_bytes >= wanted.vram_bytes
        and gpu.count - taken[gpu.model, gpu.vram_bytes] >= wanted.count
    ]
    if not fitting:
        raise LookupError(wanted.model)
    vram, model = min(fitting)
    return model, vram
