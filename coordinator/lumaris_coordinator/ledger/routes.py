"""/v1/credits, /v1/accounts, /v1/ledger."""

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
    """{account, peer, currency, free_nanos, held_nanos, sessions_open}."""
    return json_response(await coordinator_of(request).ledger.account(await caller_of(request)))


@router.get("/v1/accounts/me/transfers", openapi_extra=BEARER)
async def transfers(
    request: Request,
    after: Annotated[int, Query(ge=0, le=SEQ_MAX)] = 0,
    limit: Annotated[int, Query(ge=1, le=TRANSFERS_PAGE_MAX)] = TRANSFERS_PAGE_MAX,
) -> Response:
    """{transfers, next}: what moved on the account, oldest first; pass `next` as `after`."""
    caller = await caller_of(request)
    found = await coordinator_of(request).ledger.transfers(caller, after=after, limit=limit)
    return json_response(found)


@router.get("/v1/ledger/audit")
async def audit(request: Request) -> Response:
    """Whether every balance follows from the transfers; no account's own data."""
    return json_response(await coordinator_of(request).ledger.audit())
