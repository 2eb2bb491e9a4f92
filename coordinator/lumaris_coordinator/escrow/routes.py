"""/v1/grants, /v1/amendments, /v1/settle, /v1/escrows."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from lumaris_coordinator.bounds import ESCROWS_PAGE_MAX
from lumaris_coordinator.conditional import answer
from lumaris_coordinator.edge import read_body
from lumaris_coordinator.escrow import views
from lumaris_coordinator.http import (
    BEARER,
    OCTETS,
    caller_of,
    coordinator_of,
    document_body,
    json_response,
)
from lumaris_protocol.limits import SEQ_MAX

router = APIRouter(tags=["escrow"])
State = Literal["held", "claimed", "disputed", "settled", "expired"]


@router.post("/v1/grants", openapi_extra=document_body("grant_request"))
async def grant(request: Request) -> Response:
    """The signed BudgetGrant: the agreement's cap is held. Repeating it returns the same bytes."""
    found = await coordinator_of(request).grants.grant(await read_body(request))
    return Response(found, media_type=OCTETS)


@router.post("/v1/amendments", openapi_extra=document_body("amend_request"))
async def amend(request: Request) -> Response:
    """The BudgetGrant with what an amendment adds. Repeating it returns the same bytes."""
    found = await coordinator_of(request).grants.amend(await read_body(request))
    return Response(found, media_type=OCTETS)


@router.post("/v1/settle", openapi_extra=document_body("settle"))
async def settle(request: Request) -> Response:
    """200 with the receipt file, or 202 {state, settle_by, vouchered_nanos} while the seller may
    still claim or a dispute is open."""
    coordinator = coordinator_of(request)
    escrow = await coordinator.escrows.settle(await read_body(request))
    if escrow.final:
        file = await coordinator.receipts.file(escrow)
        return Response(file, media_type="application/json")
    return json_response(
        {
            "state": escrow.state,
            "settle_by": escrow.settle_by,
            "vouchered_nanos": escrow.voucher_total,
        },
        202,
    )


@router.get("/v1/escrows", openapi_extra=BEARER)
async def escrows(
    request: Request,
    after: Annotated[int, Query(ge=0, le=SEQ_MAX)] = 0,
    limit: Annotated[int, Query(ge=1, le=ESCROWS_PAGE_MAX)] = ESCROWS_PAGE_MAX,
    state: State | None = None,
) -> Response:
    """{escrows, next}: the sessions of the caller's peers, oldest first; `next` is `after`."""
    caller = await caller_of(request)
    context = coordinator_of(request).context
    found = await views.page(context, caller, after=after, limit=limit, state=state)
    return answer(request, found)


@router.get("/v1/escrows/{session}", openapi_extra=BEARER)
async def show(request: Request) -> Response:
    """The money of a session, for its parties; the ETag changes with what is shown."""
    session = request.path_params["session"]
    caller = await caller_of(request)
    return answer(request, await views.show(coordinator_of(request).context, session, caller))


@router.get("/v1/escrows/{session}/claims", openapi_extra=BEARER)
async def claims(request: Request) -> Response:
    """{claims, paid_nanos, buyer_bond_nanos, seller_bond_nanos, checkers}: of each party of a
    session the signed claims that may be evidence in a dispute: the buyer's last, and the first
    that enclosed a forged voucher; and what a dispute could win."""
    session = request.path_params["session"]
    caller = await caller_of(request)
    found = await views.claims(coordinator_of(request).context, session, caller)
    return json_response(found)
