"""/v1/disputes. What changes a dispute is signed; what shows one asks for a token."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from lumaris_coordinator.bounds import DISPUTES_PAGE_MAX
from lumaris_coordinator.disputes import views
from lumaris_coordinator.edge import read_body
from lumaris_coordinator.http import (
    BEARER,
    caller_of,
    coordinator_of,
    document_body,
    json_response,
)
from lumaris_protocol.limits import SEQ_MAX

router = APIRouter(tags=["disputes"])


@router.post("/v1/disputes", openapi_extra=document_body("dispute_open"))
async def open_(request: Request) -> Response:
    """The dispute: opened, or ruled on at once when the evidence is a contradiction."""
    found = await coordinator_of(request).disputes.open(await read_body(request))
    return json_response(views.summary(found))


@router.get("/v1/disputes", openapi_extra=BEARER)
async def disputes(
    request: Request,
    after: Annotated[int, Query(ge=0, le=SEQ_MAX)] = 0,
    limit: Annotated[int, Query(ge=1, le=DISPUTES_PAGE_MAX)] = DISPUTES_PAGE_MAX,
) -> Response:
    """{disputes, next}: the disputes of the caller's peers, oldest first; `next` is `after`."""
    caller = await caller_of(request)
    context = coordinator_of(request).context
    return json_response(await views.page(context, caller, after=after, limit=limit))


@router.get("/v1/disputes/{dispute}", openapi_extra=BEARER)
async def show(request: Request) -> Response:
    """One dispute with its evidence by hash, its checkers and its ruling, for its parties."""
    caller = await caller_of(request)
    name = request.path_params["dispute"]
    return json_response(await views.show(coordinator_of(request).context, name, caller))


@router.get("/v1/disputes/{dispute}/file", openapi_extra=BEARER)
async def file(request: Request) -> Response:
    """The dispute file, for its parties: all evidence, the draws and the ruling, to be replayed."""
    caller = await caller_of(request)
    coordinator, name = coordinator_of(request), request.path_params["dispute"]
    found = await views.file(coordinator.context, coordinator.log, name, caller)
    return Response(found, headers={"Cache-Control": "no-store"}, media_type="application/json")


@router.post("/v1/disputes/{dispute}/evidence", openapi_extra=document_body("dispute_evidence"))
async def evidence(request: Request) -> Response:
    """The dispute with a party's evidence. Sending the same bytes again changes nothing."""
    service, name = coordinator_of(request).disputes, request.path_params["dispute"]
    return json_response(views.summary(await service.add_evidence(name, await read_body(request))))


@router.post("/v1/disputes/{dispute}/withdraw", openapi_extra=document_body("dispute_withdraw"))
async def withdraw(request: Request) -> Response:
    """The dispute, taken back by its opener."""
    service, name = coordinator_of(request).disputes, request.path_params["dispute"]
    return json_response(views.summary(await service.withdraw(name, await read_body(request))))


@router.post("/v1/disputes/{dispute}/split", openapi_extra=document_body("dispute_split"))
async def split(request: Request) -> Response:
    """The dispute; it ends when the second party has signed the same split."""
    service, name = coordinator_of(request).disputes, request.path_params["dispute"]
    return json_response(views.summary(await service.split(name, await read_body(request))))
