"""/.well-known/lumaris-keys, /v1/revocations, /v1/operator/revocations."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Query
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from lumaris_coordinator.bounds import REVOCATIONS_PER_REQUEST_MAX
from lumaris_coordinator.http import (
    BEARER,
    OCTETS,
    caller_of,
    coordinator_of,
    json_body,
    read_json,
)
from lumaris_coordinator.idempotency import idempotent
from lumaris_protocol.limits import NAME_CHARS_MAX, SEQ_MAX
from lumaris_protocol.messages.base import Count, Peer

router = APIRouter(tags=["trust"])

_DOCUMENT: Final[dict[int | str, dict[str, Any]]] = {200: {"content": {OCTETS: {}}}}


class Target(msgspec.Struct, forbid_unknown_fields=True):
    """A certificate; serial 0 is the peer with all of them."""

    peer: Peer
    serial: Count = 0


class NewRevocations(msgspec.Struct, forbid_unknown_fields=True):
    """What shall count no more, and why; everybody can read the reason."""

    revoked: Annotated[
        tuple[Target, ...], Meta(min_length=1, max_length=REVOCATIONS_PER_REQUEST_MAX)
    ]
    reason: Annotated[str, Meta(max_length=NAME_CHARS_MAX)] = ""


@router.get("/.well-known/lumaris-keys", response_class=Response, responses=_DOCUMENT)
async def keys(request: Request) -> Response:
    """The coordinator's signing keys, signed by its root key."""
    data = coordinator_of(request).context.keys.list.data
    return Response(data, headers={"Cache-Control": "no-cache"}, media_type=OCTETS)


@router.get("/v1/revocations", response_class=Response, responses=_DOCUMENT)
async def revocations(
    request: Request, after: Annotated[int, Query(ge=0, le=SEQ_MAX)] = 0
) -> Response:
    """The signed revocations that follow number `after`; ask on with its `seq` until that stays."""
    data = await coordinator_of(request).revocations.page(after)
    return Response(data, headers={"Cache-Control": "no-cache"}, media_type=OCTETS)


@router.post("/v1/operator/revocations", openapi_extra={**BEARER, **json_body(NewRevocations)})
async def revoke(request: Request) -> Response:
    """{seq}: the peers' tokens end, and everybody is told."""
    caller = await caller_of(request, "operator")
    found = await read_json(request, NewRevocations)
    wanted = [(target.peer, target.serial) for target in found.revoked]
    held = coordinator_of(request).revocations
    answer = await idempotent(
        request,
        caller,
        lambda connection: held.revoke(connection, wanted, reason=found.reason),
    )
    await held.publish()
    return answer


@router.delete("/v1/operator/revocations/{peer}", status_code=204, openapi_extra=BEARER)
async def reinstate(request: Request, peer: str) -> Response:
    """Let a revoked peer register again; the certificates from before stay revoked."""
    await caller_of(request, "operator")
    await coordinator_of(request).revocations.reinstate(peer)
    return Response(status_code=204)
