"""What the routes share: who calls, how answers look, how binary bodies are documented."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

if TYPE_CHECKING:
    from lumaris_coordinator.app import Coordinator
    from lumaris_coordinator.identity.service import Caller

OCTETS: Final = "application/octet-stream"


def coordinator_of(request: Request) -> Coordinator:
    """The program behind the app."""
    return cast("Coordinator", request.app.state.coordinator)


async def caller_of(request: Request) -> Caller:
    """Whose Bearer token it is. Raises LumarisError `unauthorized`."""
    header = request.headers.get("authorization", "")
    return await coordinator_of(request).identity.authenticate(header)


def json_response(value: object, status: int = 200) -> Response:
    """A JSON answer. It is about one account or one moment, so nothing on the way may keep it."""
    return Response(
        msgspec.json.encode(value), status, {"Cache-Control": "no-store"}, "application/json"
    )


def document_body(name: str) -> dict[str, Any]:
    """The OpenAPI of a request body that is one signed document."""
    schema = {"type": "string", "format": "binary", "title": name}
    content = {OCTETS: {"schema": schema}}
    description = f"The bytes of a signed {name} envelope."
    return {"requestBody": {"required": True, "description": description, "content": content}}


BEARER: Final[dict[str, Any]] = {"security": [{"bearer": []}]}
SECURITY_SCHEMES: Final[dict[str, Any]] = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "The token that a registration answers.",
    }
}
PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    "default": {
        "description": "An RFC 9457 problem with `code`, `hint` and `money_moved`.",
        "content": {"application/problem+json": {"schema": {"type": "object"}}},
    }
}
