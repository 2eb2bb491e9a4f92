"""/v1/credits, /v1/accounts, /v1/bonds, /v1/ledger."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from lumaris_coordinator.bounds import TRANSFERS_PAGE_MAX
from lumaris_coordinator.edge import read_body
from lumaris_coordinator.http import (
    BEARER,
    caller_of,
    coordinator_of,
    document_body,
    json_response,
)
from lumaris_protocol.limits import SEQ_MAX

router = APIRouter(tags=["ledger"])


@router.post("/v1/credits", openapi_extra=document_body("credit_request"))
async def give_credit(request: Request) -> Response:
    """Test credit, up to the account's limit."""
    return json_response(await coordinator_of(request).ledger.give_credit(await read_body(request)))


@router.get("/v1/accounts/me", openapi_extra=BEARER)
async def account(request: Request) -> Response:
    """{account, peer, currency, free_nanos, held_nanos, sessions_open, disputed_nanos, wallets}:
    `wallets` by currency, the main one first and repeated before them."""
    return json_response(await coordinator_of(request).ledger.account(await caller_of(request)))


@router.get("/v1/accounts/me/transfers", openapi_extra=BEARER)
async def transfers(
    request: Request,
    after: Annotated[int, Query(ge=0, le=SEQ_MAX)] = 0,
    limit: Annotated[int, Query(ge=1, le=TRANSFERS_PAGE_MAX)] = TRANSFERS_PAGE_MAX,
    currency: Annotated[str | None, Query(pattern=r"^[A-Z]{3,8}$")] = None,
) -> Response:
    """{transfers, next}: what moved on the wallet, oldest first; pass `next` as `after`."""
    caller = await caller_of(request)
    found = await coordinator_of(request).ledger.transfers(
        caller, currency=currency, after=after, limit=limit
    )
    return json_response(found)


@router.post("/v1/bonds", openapi_extra=document_body("bond_request"))
async def bond(request: Request) -> Response:
    """{peer, account, bonds}: money is locked, or its release begins."""
    found = await coordinator_of(request).bonds.apply(await read_body(request))
    return Response(found, media_type="application/json")


@router.get("/v1/bonds/me", openapi_extra=BEARER)
async def bonds(request: Request) -> Response:
    """{bonds: [{peer, currency, locked_nanos, releases}]} of the caller's peers."""
    return json_response(await coordinator_of(request).bonds.show(await caller_of(request)))


@router.get("/v1/ledger/audit")
async def audit(request: Request) -> Response:
    """Whether every balance follows from the transfers; no account's own data."""
    return json_response(await coordinator_of(request).ledger.audit())
