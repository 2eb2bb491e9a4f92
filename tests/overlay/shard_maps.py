"""Signed shard maps and adverts of regions for the overlay's tests."""

from __future__ import annotations

import time
from typing import Any

from msgspec import structs

from lumaris_protocol import codec
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.advert import Advert, Gpu, Resources
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.messages.shard_map import Shard, ShardMap
from tests.overlay.world import COORDINATOR, NETWORK, advert

GPUS = (Gpu(model="x", vram_bytes=1, count=1),)


def shard_map(
    *regions: tuple[str, ...],
    version: int = 1,
    signer: KeyPair = COORDINATOR,
    now: float | None = None,
    **changes: Any,
) -> bytes:
    """A map with shard 0 for the rest, and shards 1, 2, … for these groups of regions."""
    issued = int(time.time() if now is None else now)
    found = ShardMap(
        network=NETWORK,
        version=version,
        shards=tuple(
            Shard(id=number, regions=names, classes=("cpu", "gpu"))
            for number, names in enumerate(((), *regions))
        ),
        issued_at=issued,
        expires_at=issued + 3600,
    )
    return codec.sign(structs.replace(found, **changes), signer, NETWORK).data


def regional(key: KeyPair, region: str, seq: int = 1, **settings: Any) -> bytes:
    """An advert of this region."""
    signed = codec.open_signed(advert(key, seq, **settings), Advert, network=NETWORK)
    return codec.sign(structs.replace(signed.message, region=region), key, NETWORK).data


def needs(*regions: str, gpus: tuple[Gpu, ...] = ()) -> Requirements:
    """What a buyer asks of these regions."""
    resources = Resources(cpu_millis=1000, gpus=gpus)
    return Requirements(resources=resources, tier="wasm", currency="TEST", regions=regions)
