"""`lumaris offers`: who sells what, for how much, and what keeps the others from fitting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from lumaris.cli.options import CONTEXT, SECONDS, SIZE, Settings, buyer_options
from lumaris.cli.output import credits_of, emit, note, peer_of, size_of, table
from lumaris.cli.work import open_client
from lumaris_protocol import codes
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris_protocol.messages.advert import Advert, Feature, Resources, Runtime, Tier
    from lumaris_protocol.messages.negotiation import Requirements

_S_PER_HOUR = 3600


@click.command("offers", context_settings=CONTEXT)
@click.option("--image", help="Only sellers that can run it.")
@click.option("--cpu", type=float, default=1.0, show_default=True, help="Hardware threads.")
@click.option("--memory", type=SIZE, default="512MiB", show_default=True)
@click.option("--disk", type=SIZE, default="64MiB", show_default=True)
@click.option("--duration", type=SECONDS, default="1h", show_default=True, help="Of the lease.")
@click.option("--region", "regions", multiple=True, help="Only there; repeatable.")
@click.option(
    "--tier",
    type=click.Choice(("wasm", "process", "container", "vm")),
    help="Only sellers that offer it.",
)
@click.option(
    "--feature",
    "features",
    multiple=True,
    type=click.Choice(("egress", "exec", "forward", "gpu", "stdin", "warm")),
    help="Only sellers whose tier offers it; repeatable.",
)
@click.option(
    "--assurance",
    "assurances",
    multiple=True,
    metavar="NAME",
    help="Only isolation of this kind; repeatable.",
)
@click.option(
    "--egress",
    multiple=True,
    metavar="HOST:PORT",
    help="Only sellers whose jobs may connect somewhere; repeatable.",
)
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="[MODEL:]COUNT",
    help="Whole GPUs; repeatable.",
)
@click.option("--why", is_flag=True, help="Show the others too, and count what excludes them.")
@buyer_options
@click.pass_obj
def offers(
    settings: Settings,
    image: str | None,
    cpu: float,
    memory: int,
    disk: int,
    duration: int,
    regions: tuple[str, ...],
    tier: Tier | None,
    features: tuple[Feature, ...],
    assurances: tuple[str, ...],
    egress: tuple[str, ...],
    gpus: tuple[str, ...],
    why: bool,
) -> int:
    """List sellers with their capacity and prices.

    The price is for one hour of the resources asked for, in credits.
    """
    import trio
    from msgspec import structs

    from lumaris import images
    from lumaris.client import parse_egress, parse_gpu
    from lumaris.market import no_match
    from lumaris_protocol import matching
    from lumaris_protocol.messages.advert import Resources
    from lumaris_protocol.messages.negotiation import Requirements

    if not 0.001 <= cpu <= 1024:
        raise LumarisError("usage", "--cpu is 0.001 to 1024.")
    wanted = Resources(
        cpu_millis=int(cpu * 1000),
        memory_bytes=memory,
        disk_bytes=disk,
        gpus=tuple(parse_gpu(text) for text in gpus),
    )
    resolved = trio.run(partial(images.resolve, image, tier=tier)) if image else None
    tier = resolved.tier if resolved else tier
    needs = Requirements(
        resources=wanted,
        tier=tier or "wasm",
        assurances=assurances,
        egress=parse_egress(egress),
        image=resolved.digest if resolved and resolved.tier != "wasm" else None,
        image_fetched=bool(resolved and resolved.fetched),
        features=features,
        regions=regions,
        currency="",
    )
    with open_client(settings) as client:
        adverts = [signed.message for signed in client.offers()]
    items = []
    for advert in adverts:
        # Without a word on it any tier will do.
        tiers = (tier,) if tier else tuple(runtime.tier for runtime in advert.runtimes) or ("wasm",)
        currency = advert.prices.currency
        asked = [structs.replace(needs, tier=each, currency=currency) for each in tiers]
        items.append(_item(advert, asked, duration))
    items.sort(key=lambda item: (bool(item["excluded_by"]), item["hour_nanos"], item["seller"]))
    excluded = Counter(code for item in items for code in item["excluded_by"])
    fitting = [item for item in items if not item["excluded_by"]]
    if not fitting and not why:
        raise no_match(len(items), excluded, matching.needed_features(needs))
    shown = items if why else fitting
    if settings.json:
        emit({"items": shown, "seen": len(items), "excluded": dict(excluded)})
        return 0
    _print(shown, why=why)
    note(f"{len(fitting)} of {len(items)} sellers fit")
    if why:
        for code, count in excluded.most_common():
            note(f"  {count} excluded by {code}: {codes.CODES[code].hint}")
    return 0


def _item(advert: Advert, asked: Sequence[Requirements], lease_s: int) -> dict[str, Any]:
    """A seller, excluded only by what keeps each of the ways it was asked from fitting."""
    from lumaris_protocol import matching, pricing

    rate = pricing.rate_nanos_per_s(advert.prices, asked[0].resources)
    excluded = min((matching.explain(needs, advert, lease_s=lease_s) for needs in asked), key=len)
    return {
        "seller": advert.seller,
        "region": advert.region,
        "tiers": {runtime.tier: runtime.assurance for runtime in advert.runtimes},
        "runtimes": [_runtime(runtime) for runtime in advert.runtimes],
        "benchmarks": dict(advert.benchmarks),
        "cached": list(advert.cached),
        "free": _resources(advert.free),
        "total": _resources(advert.total),
        "currency": advert.prices.currency,
        "start_nanos": advert.prices.start_nanos,
        "hour_nanos": rate * _S_PER_HOUR,
        "lease_s_max": advert.lease_s_max,
        "expires_at": advert.expires_at,
        "excluded_by": list(excluded),
    }


def _runtime(runtime: Runtime) -> dict[str, Any]:
    """A tier, what it can do, and the self-test that it passed (0 where none was run)."""
    return {
        "tier": runtime.tier,
        "version": runtime.version,
        "assurance": runtime.assurance,
        "features": list(runtime.features),
        "suite": runtime.suite,
        "tested_at": runtime.tested_at,
    }


def _resources(resources: Resources) -> dict[str, Any]:
    return {
        "cpu_millis": resources.cpu_millis,
        "memory_bytes": resources.memory_bytes,
        "disk_bytes": resources.disk_bytes,
        "gpus": [
            {"model": gpu.model, "vram_bytes": gpu.vram_bytes, "count": gpu.count}
            for gpu in resources.gpus
        ],
    }


def _shown(tier: str, assurance: str) -> str:
    """A tier, with its isolation where that is not the usual one of its kind."""
    return tier if assurance == tier else f"{tier} ({assurance})"


def _print(items: Sequence[dict[str, Any]], *, why: bool) -> None:
    headers = ["SELLER", "REGION", "FREE CPU", "FREE MEMORY", "GPUS", "TIERS", "START", "HOUR"]
    rows = []
    for item in items:
        free = item["free"]
        gpus = ", ".join(f"{gpu['count']} {gpu['model']}" for gpu in free["gpus"])
        row = [
            peer_of(item["seller"]),
            item["region"],
            f"{free['cpu_millis'] / 1000:g}",
            size_of(free["memory_bytes"]),
            gpus or "-",
            ", ".join(_shown(tier, held) for tier, held in item["tiers"].items()) or "-",
            credits_of(item["start_nanos"]),
            f"{credits_of(item['hour_nanos'])} {item['currency']}",
        ]
        rows.append([*row, ", ".join(item["excluded_by"]) or "fits"] if why else row)
    table([*headers, "WHY"] if why else headers, rows)
