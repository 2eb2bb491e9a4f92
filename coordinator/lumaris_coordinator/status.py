"""/v1/info, /healthz, /readyz, /metrics."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from lumaris_coordinator.http import caller_of, coordinator_of, json_response
from lumaris_coordinator.limits.limiter import LOCAL
from lumaris_coordinator.limits.middleware import address_of
from lumaris_protocol.errors import LumarisError

router = APIRouter(tags=["status"])
_PROMETHEUS: Final = "text/plain; version=0.0.4"


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
    """The store takes writes and is no older than what witnesses saw; 503 otherwise."""
    coordinator = coordinator_of(request)
    health, behind = coordinator.store.health(), coordinator.witnesses.behind
    if behind:
        raise LumarisError("busy", behind, hint="Stop it: see the code log_behind.")
    if not health.writes:
        raise LumarisError("busy", "The store does not take writes.")
    if not health.ready:
        raise LumarisError("busy", f"Only {health.free_bytes} bytes of disk are free.")
    return json_response(
        {
            "ready": True,
            "queue_depth": health.queue_depth,
            "last_commit_s": round(health.last_commit_s, 3),
            "free_bytes": health.free_bytes,
        }
    )


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text. With `metrics_public = false` only for this machine and operators' keys."""
    coordinator = coordinator_of(request)
    if not coordinator.settings.metrics_public and address_of(request) != LOCAL:
        await caller_of(request, "operator")
    gauges = await coordinator.gauges.read(coordinator)
    return PlainTextResponse(coordinator.metrics.text(gauges), media_type=_PROMETHEUS)
