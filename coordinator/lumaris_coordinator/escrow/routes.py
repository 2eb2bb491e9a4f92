"""/v1/grants, /v1/settle, /v1/escrows."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lumaris_coordinator.edge import read_body
from lumaris_coordinator.http import (
    BEARER,
    OCTETS,
    caller_of,
    coordinator_of,
    document_body,
    json_response,
)

router = APIRouter(tags=["escrow"])


@router.post("/v1/grants", openapi_extra=document_body("grant_request"))
async def grant(request: Request) -> Response:
    """The signed BudgetGrant: the agreement's cap is held. Repeating it returns the same bytes."""
    found = await coordinator_of(request).escrows.grant(await read_body(request))
    return Response(found, media_type=OCTETS)


@router.post("/v1/settle", openapi_extra=document_body("settle"))
async def settle(request: Request) -> Response:
    """200 with the receipt file, or 202 {state, settle_by} while the seller may still claim."""
    coordinator = coordinator_of(request)
    found = await coordinator.escrows.settle(await read_body(request))
    escrow = found.escrow
    if found.receipt is not None:
        bundle = coordinator.receipts.bundle(escrow, found.receipt)
        return Response(bundle, media_type="application/json")
    return json_response(
        {
            "state": escrow.state,
            "settle_by": escrow.settle_by,
            "vouchered_nanos": escrow.voucher_total,
        },
        202,
    )


@router.get("/v1/escrows/{session}", openapi_extra=BEARER)
async def show(request: Request) -> Response:
    """The money of a session, for its parties."""
    session = request.path_params["session"]
    caller = await caller_of(request)
    return json_response(await coordinator_of(request).escrows.show(session, caller))
