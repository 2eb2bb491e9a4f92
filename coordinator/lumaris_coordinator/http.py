"""What the routes share: who calls, how answers look, how binary bodies are documented."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lumaris_coordinator.edge import read_body
from lumaris_coordinator.limits.middleware import count_caller
from lumaris_coordinator.tls import tls_peer
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris_coordinator.app import Coordinator
    from lumaris_coordinator.identity.service import Caller, Scope

T = TypeVar("T")

OCTETS: Final = "application/octet-stream"
# The only spelling of it in JSON: an escape, whose backslash is not itself escaped.
_NUL: Final = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


def coordinator_of(request: Request) -> Coordinator:
    """The program behind the app."""
    return cast("Coordinator", request.app.state.coordinator)


async def caller_of(request: Request, scope: Scope = "read") -> Caller:
    """Whose Bearer token or API key it is, counted against its rate.

    Raises LumarisError: `unauthorized`, `rate_limited`, or `forbidden` without the scope.
    """
    header = request.headers.get("authorization", "")
    coordinator = coordinator_of(request)
    caller = await coordinator.identity.authenticate(header)
    if (
        coordinator.settings.mutual_tls
        and caller.kind == "peer"
        and (caller.peer != tls_peer(request.scope))
    ):
        raise LumarisError("unauthorized", "The TLS certificate and the token name two peers.")
    count_caller(request, coordinator.limiter, caller)
    caller.require(scope)
    return caller


def json_response(value: object, status: int = 200) -> Response:
    """A JSON answer. It is about one account or one moment, so nothing on the way may keep it."""
    return Response(
        msgspec.json.encode(value), status, {"Cache-Control": "no-store"}, "application/json"
    )


async def read_json(request: Request, kind: type[T]) -> T:
    """The body as a record. Raises LumarisError `malformed`, `oversize` or `timeout`."""
    body = await read_body(request)
    if _NUL.search(body):
        raise LumarisError("malformed", "The body holds a NUL, which no database keeps.")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        hint = "The route's description in /v1/openapi.json shows the body that it takes."
        raise LumarisError("malformed", f"The body: {error}", hint=hint) from None


def json_body(kind: type) -> dict[str, Any]:
    """The OpenAPI of a request body that `read_json` takes."""
    (schema,), components = msgspec.json.schema_components([kind], ref_template="{name}")
    content = {"application/json": {"schema": _whole(schema, components)}}
    return {"requestBody": {"required": True, "content": content}}


def _whole(schema: Any, components: dict[str, Any]) -> Any:
    """A schema with what it refers to in its place, and with patterns as ECMA-262 has them."""
    if isinstance(schema, list):
        return [_whole(part, components) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _whole(components[schema["$ref"]], components)
    found = {name: _whole(part, components) for name, part in schema.items()}
    if isinstance(found.get("pattern"), str):
        found["pattern"] = found["pattern"].replace(r"\Z", "$")
    return found


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
        "description": "The token of a registration or login, or an API key.",
    }
}
PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    "default": {
        "description": "An RFC 9457 problem with `code`, `hint` and `money_moved`.",
        "content": {"application/problem+json": {"schema": {"type": "object"}}},
    }
}
