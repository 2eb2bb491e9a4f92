"""/v1/webhooks."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response

from lumaris_coordinator.conditional import answer, etag_of, require_match
from lumaris_coordinator.http import (
    BEARER,
    caller_of,
    coordinator_of,
    json_body,
    json_response,
    read_json,
)
from lumaris_coordinator.idempotency import idempotent
from lumaris_protocol.limits import SEQ_MAX, WEBHOOK_URL_CHARS_MAX

router = APIRouter(tags=["webhooks"])


class WebhookRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Where to send which kinds of events; an empty list is all of them."""

    url: Annotated[str, msgspec.Meta(min_length=1, max_length=WEBHOOK_URL_CHARS_MAX)]
    kinds: Annotated[
        list[Annotated[str, msgspec.Meta(max_length=64)]], msgspec.Meta(max_length=64)
    ] = []


@router.post("/v1/webhooks", status_code=201, openapi_extra={**BEARER, **json_body(WebhookRequest)})
async def create(request: Request) -> Response:
    """A new endpoint for what happens from now on. Its `secret` is shown here and never again."""
    caller = await caller_of(request, "write")
    coordinator = coordinator_of(request)
    found = await read_json(request, WebhookRequest)
    webhooks, now = coordinator.webhooks, coordinator.context.now()
    webhooks.check(found.url, found.kinds)

    def operation(connection: Any) -> dict[str, Any]:
        return webhooks.create(connection, caller, url=found.url, kinds=found.kinds, now=now)

    return await idempotent(request, caller, operation, status=201)


@router.get("/v1/webhooks", openapi_extra=BEARER)
async def list_all(request: Request) -> Response:
    """{webhooks}: the caller's endpoints."""
    caller = await caller_of(request)
    found = await coordinator_of(request).webhooks.all(caller)
    return json_response({"webhooks": [webhook.shown() for webhook in found]})


@router.get("/v1/webhooks/{webhook}", openapi_extra=BEARER)
async def show(request: Request, webhook: str) -> Response:
    """One endpoint: how far it is, and whether it is failing."""
    caller = await caller_of(request)
    found = await coordinator_of(request).webhooks.find(caller, webhook)
    return answer(request, found.shown())


@router.delete("/v1/webhooks/{webhook}", status_code=204, openapi_extra=BEARER)
async def delete(request: Request, webhook: str) -> Response:
    """Forget an endpoint. With `If-Match` only if it is still as it was read."""
    caller = await caller_of(request, "write")
    webhooks = coordinator_of(request).webhooks
    await webhooks.delete(
        caller, webhook, check=lambda found: require_match(request, etag_of(found.shown()))
    )
    return Response(status_code=204)


@router.get("/v1/webhooks/{webhook}/deliveries", openapi_extra=BEARER)
async def deliveries(request: Request, webhook: str) -> Response:
    """{deliveries}: the last attempts, newest first."""
    caller = await caller_of(request)
    found = await coordinator_of(request).webhooks.deliveries(caller, webhook)
    return json_response({"deliveries": found})


@router.post("/v1/webhooks/{webhook}/replay", openapi_extra=BEARER)
async def replay(
    request: Request, webhook: str, after: Annotated[int, Query(ge=0, le=SEQ_MAX)]
) -> Response:
    """Deliver everything after an event (again), in order; enables a disabled endpoint."""
    caller = await caller_of(request, "write")
    coordinator = coordinator_of(request)
    webhooks, now = coordinator.webhooks, coordinator.context.now()

    def operation(connection: Any) -> dict[str, Any]:
        return webhooks.replay(connection, caller, webhook, after=after, now=now)

    found = await idempotent(request, caller, operation)
    coordinator.deliveries.wake()
    return found
