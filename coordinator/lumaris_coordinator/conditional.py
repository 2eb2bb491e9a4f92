"""ETag, If-None-Match and If-Match (RFC 9110 section 13) for answers that are read repeatedly."""

from __future__ import annotations

import hashlib

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lumaris_protocol.errors import LumarisError


def etag_of(value: object) -> str:
    """A strong tag: it follows from the bytes that are answered."""
    return _tag(msgspec.json.encode(value))


def answer(request: Request, value: object) -> Response:
    """The value as JSON with its tag, or 304 when the caller has just that already."""
    body = msgspec.json.encode(value)
    tag = _tag(body)
    # Kept by the caller alone, and asked for again each time.
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if _names(request.headers.get("if-none-match", ""), tag, weak=True):
        return Response(status_code=304, headers=headers)
    return Response(body, 200, headers, "application/json")


def require_match(request: Request, tag: str) -> None:
    """Raises LumarisError `precondition_failed` when If-Match is given and names another state."""
    given = request.headers.get("if-match")
    if given is not None and not _names(given, tag, weak=False):
        raise LumarisError("precondition_failed")


def _names(header: str, tag: str, *, weak: bool) -> bool:
    given = [part.strip() for part in header.split(",")]
    if weak:
        given = [part.removeprefix("W/") for part in given]
    return tag in given or given == ["*"]


def _tag(body: bytes) -> str:
    return f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
