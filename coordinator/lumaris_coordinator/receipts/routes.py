"""/v1/receipts, /log."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from lumaris_coordinator.http import BEARER, caller_of, coordinator_of, json_response
from lumaris_protocol.limits import SEQ_MAX

router = APIRouter(tags=["receipts"])

LogSize = Annotated[int, Query(ge=1, le=SEQ_MAX)]


@router.get("/v1/receipts/{receipt}", openapi_extra=BEARER)
async def receipt(request: Request) -> Response:
    """The receipt file, for the session's parties."""
    name = request.path_params["receipt"]
    found = await coordinator_of(request).receipts.bundle_of(name, await caller_of(request))
    return Response(found, media_type="application/json")


@router.get("/log/checkpoint")
async def checkpoint(request: Request) -> Response:
    """The newest signed head of the receipts log (C2SP tlog-checkpoint)."""
    note = coordinator_of(request).log.head.note
    return PlainTextResponse(note, headers={"Cache-Control": "no-cache"})


@router.get("/log/consistency")
async def consistency(request: Request, old: LogSize, new: LogSize) -> Response:
    """{old, new, hashes}: the log of `new` leaves extends the log of `old` (RFC 6962)."""
    hashes = coordinator_of(request).log.consistency(old, new)
    return json_response({"old": old, "new": new, "hashes": hashes})
