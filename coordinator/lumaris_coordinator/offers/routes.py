"""/v1/offers."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import msgspec
from anyio import to_thread
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from lumaris_coordinator.bounds import OFFERS_CURSOR_CHARS_MAX, OFFERS_PAGE_MAX
from lumaris_coordinator.http import coordinator_of, json_response
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.advert import Gpu, Tier
from lumaris_protocol.messages.negotiation import Requirements

router = APIRouter(tags=["offers"])

_Count = Annotated[int, Query(ge=0, le=limits.SEQ_MAX)]
_Name = Annotated[str, Query(max_length=limits.NAME_CHARS_MAX)]


@router.get("/v1/offers")
async def offers(
    request: Request,
    cpu_millis: _Count = 1_000,
    memory_bytes: Annotated[int, Query(ge=0, le=limits.MEMORY_BYTES_MAX)] = 512 * limits.MIB,
    disk_bytes: _Count = 64 * limits.MIB,
    gpu: Annotated[list[_Name] | None, Query(max_length=limits.GPUS_MAX)] = None,
    tier: Annotated[Tier | None, Query()] = None,
    region: Annotated[list[_Name] | None, Query(max_length=limits.REGIONS_MAX)] = None,
    image: Annotated[str | None, Query(pattern=r"^sha256:[0-9a-f]{64}$")] = None,
    rate_nanos_max: Annotated[int, Query(ge=0, le=limits.NANOS_MAX)] = 0,
    lease_s: Annotated[int, Query(ge=1, le=limits.SESSION_KEY_LIFETIME_S_MAX)] = 3_600,
    limit: Annotated[int, Query(ge=1, le=OFFERS_PAGE_MAX)] = 20,
    after: Annotated[str, Query(max_length=OFFERS_CURSOR_CHARS_MAX)] = "",
) -> Response:
    """Sellers that fit, the cheapest first: {offers, next, seen, as_of, hint}.

    A hint, as old as `as_of`: each offer holds the seller's signed `advert` (base64), and only the
    seller itself can promise anything. `gpu` is COUNT, MODEL or MODEL:COUNT and may be repeated, as
    may `region`; a GPU's COUNT defaults to 1. Pass `next` as `after`; null at the end.
    """
    coordinator = coordinator_of(request)
    fields = {
        "resources": {
            "cpu_millis": cpu_millis,
            "memory_bytes": memory_bytes,
            "disk_bytes": disk_bytes,
            "gpus": [_gpu(text) for text in gpu or ()],
        },
        "tier": tier or "wasm",
        "regions": region or (),
        "image": image,
        "currency": coordinator.settings.currency,
        "rate_nanos_max": rate_nanos_max,
    }
    try:
        needs = msgspec.convert(fields, Requirements)
    except msgspec.ValidationError as error:
        raise LumarisError("malformed", f"The query: {error}") from None
    look = partial(
        coordinator.offers.page, needs, tier=tier, lease_s=lease_s, limit=limit, after=after
    )
    # A deep page of a large market takes longer than everybody else's requests should wait.
    return json_response(await to_thread.run_sync(look, limiter=coordinator.offers.searching()))


def _gpu(text: str) -> Gpu:
    """Wanted GPUs, in the words of `lumaris offers --gpu`. Raises LumarisError `malformed`."""
    model, colon, count = text.rpartition(":")
    if not colon and not (count.isascii() and count.isdecimal()):
        model, count = text, "1"
    try:
        return msgspec.convert({"model": model, "vram_bytes": 0, "count": int(count)}, Gpu)
    except (msgspec.ValidationError, ValueError):
        raise LumarisError("malformed", "gpu is COUNT, MODEL or MODEL:COUNT.") from None
