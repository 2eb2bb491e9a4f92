"""/v1/info, /healthz, /readyz, /metrics."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from lumaris_coordinator.http import coordinator_of, json_response
from lumaris_protocol.errors import LumarisError

router = APIRouter(tags=["status"])


@router.get("/v1/info")
async def info(request: Request) -> Response:
    """What a peer must know before it registers; the terms an agreement must name."""
    return json_response(coordinator_of(request).info())


@router.get("/healthz")
async def healthz() -> Response:
    """The process answers."""
    return json_response({"ok": True})


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """The store takes writes; 503 otherwise."""
    writer = coordinator_of(request).store.writer
    if not writer.alive:
        raise LumarisError("busy", "The store does not take writes.")
    return json_response({"ready": True, "queue_depth": writer.depth})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    coordinator = coordinator_of(request)
    return PlainTextResponse(coordinator.metrics.text(coordinator.store.writer))
