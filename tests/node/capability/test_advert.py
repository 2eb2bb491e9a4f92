"""What a node tells the network of itself fits into an advert."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lumaris_node.capability.advert import AdvertPublisher, Offer
from lumaris_node.store import Store
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import ADDRESSES_MAX, ADVERT_BYTES_MAX, CACHED_DIGESTS_MAX
from lumaris_protocol.messages.advert import PriceTable, Resources, Runtime, Tier

KEY = KeyPair(b"a" * 32)
PRICES = PriceTable(currency="TEST", start_nanos=1, cpu_core_s_nanos=1, memory_gib_s_nanos=1)
TIERS: tuple[Tier, ...] = ("wasm", "process", "container", "vm")


@pytest.mark.parametrize("addresses", [1, ADDRESSES_MAX])
async def test_what_there_is_no_room_for_is_left_out(tmp_path: Path, addresses: int) -> None:
    sent: list[bytes] = []

    async def publish(data: bytes) -> None:
        sent.append(data)

    offer = Offer(
        region="somewhere",
        total=Resources(cpu_millis=64_000, memory_bytes=1 << 40),
        prices=PRICES,
        lease_s_max=3600,
        benchmarks={f"benchmark_{number}": 100_000 for number in range(5)},
        runtimes=tuple(
            Runtime(tier=tier, version="1.2.3", assurance=tier, features=("exec", "stdin", "warm"))
            for tier in TIERS
        ),
        cached=tuple(f"sha256:{number:064x}" for number in range(CACHED_DIGESTS_MAX)),
        addresses=tuple(f"/dns/{'a' * 200}/tcp/{number}" for number in range(addresses)),
        certificate=bytes(320),
    )
    store = Store(tmp_path / "node.db")
    publisher = AdvertPublisher(
        cast(Any, SimpleNamespace(publish_advert=publish)),
        store,
        KEY,
        offer,
        network="test",
        free=lambda: offer.total,
        clock=lambda: 1_800_000_000.0,
    )
    try:
        await publisher.publish()
    finally:
        store.close()
    advert = publisher.current().message
    assert len(sent[0]) <= ADVERT_BYTES_MAX
    assert advert.cached == offer.cached[: len(advert.cached)]
    assert advert.addresses == offer.addresses[: len(advert.addresses)]
    assert advert.runtimes == offer.runtimes and advert.benchmarks == offer.benchmarks
    assert advert.addresses
    assert bool(advert.cached) == (addresses == 1)
