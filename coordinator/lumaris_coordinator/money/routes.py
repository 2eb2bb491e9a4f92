"""/v1/payouts, /v1/operator/reconciliations."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from lumaris_coordinator.bounds import PAYOUTS_PAGE_MAX
from lumaris_coordinator.edge import read_body
from lumaris_coordinator.http import (
    BEARER,
    OCTETS,
    caller_of,
    coordinator_of,
    json_response,
    read_json,
)
from lumaris_coordinator.idempotency import idempotent
from lumaris_protocol.limits import SEQ_MAX
from lumaris_protocol.messages.base import Amount, Currency, Name, Peer

router = APIRouter(tags=["money"])

_PageSize = Annotated[int, Query(ge=1, le=PAYOUTS_PAGE_MAX)]
_CurrencyQuery = Annotated[str | None, Query(pattern=r"^[A-Z]{3,8}$")]


class PayoutOrdered(msgspec.Struct, forbid_unknown_fields=True):
    """What to take out, and through which adapter."""

    amount_nanos: Amount
    adapter: Name = "test-credit"
    currency: Currency = ""
    peer: Peer | None = None  # a revoked one, whose money an operator takes out


_PAYOUT_BODY: Final[dict[str, Any]] = {
    **BEARER,
    "requestBody": {
        "required": True,
        "description": "The bytes of a signed payout_request envelope, or JSON with a token and"
        " an Idempotency-Key.",
        "content": {
            OCTETS: {"schema": {"type": "string", "format": "binary", "title": "payout_request"}},
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["amount_nanos"],
                    "properties": {
                        "amount_nanos": {"type": "integer", "minimum": 0},
                        "adapter": {"type": "string"},
                        "currency": {"type": "string"},
                        "peer": {"type": "string"},
                    },
                    "additionalProperties": False,
                }
            },
        },
    },
}


@router.post("/v1/payouts", openapi_extra=_PAYOUT_BODY)
async def request_payout(request: Request) -> Response:
    """Take money out: {payout, state, amount_nanos, currency, adapter, ...}; `held` until paid. An
    operator names a revoked `peer` to take out what it left."""
    coordinator = coordinator_of(request)
    payouts = coordinator.money.payouts
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        return json_response(await payouts.request(await read_body(request)))
    caller = await caller_of(request, scope="write")
    found = await read_json(request, PayoutOrdered)
    operation = payouts.request_of(
        caller,
        adapter=found.adapter,
        currency=found.currency or coordinator.settings.currency,
        amount_nanos=found.amount_nanos,
        peer=found.peer or "",
    )
    answer = await idempotent(request, caller, operation)
    payouts.wake()
    return answer


@router.get("/v1/payouts", openapi_extra=BEARER)
async def payouts(
    request: Request,
    after: Annotated[int, Query(ge=0, le=SEQ_MAX)] = 0,
    limit: _PageSize = PAYOUTS_PAGE_MAX,
    currency: _CurrencyQuery = None,
) -> Response:
    """{payouts, next}: the caller's payouts, oldest first."""
    coordinator, caller = coordinator_of(request), await caller_of(request)
    found = await coordinator.money.payouts.listed(
        caller, currency=currency or coordinator.settings.currency, after=after, limit=limit
    )
    return json_response(found)


@router.get("/v1/payouts/{payout}", openapi_extra=BEARER)
async def payout(request: Request) -> Response:
    """One payout of the caller's."""
    caller = await caller_of(request)
    name = request.path_params["payout"]
    return json_response(await coordinator_of(request).money.payouts.show(caller, name))


@router.get("/v1/operator/reconciliations", openapi_extra=BEARER)
async def reconciliations(
    request: Request,
    before: Annotated[int | None, Query(ge=1, le=SEQ_MAX)] = None,
    limit: _PageSize = PAYOUTS_PAGE_MAX,
) -> Response:
    """{reconciliations, next}: the comparisons with the providers' books, newest first."""
    await caller_of(request, scope="operator")
    found = await coordinator_of(request).money.reconciliation.listed(before=before, limit=limit)
    return json_response(found)
