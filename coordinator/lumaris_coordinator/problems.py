"""Every failure as an RFC 9457 problem document, with the protocol's stable code."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from typing import Final

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lumaris_coordinator.bounds import (
    BAD_DOCUMENTS_LOGGED_PER_ROUND_MAX,
    BAD_DOCUMENTS_REMEMBERED_MAX,
    RETRY_AFTER_S,
)
from lumaris_protocol.codes import CODES
from lumaris_protocol.errors import EnvelopeError, LumarisError

log = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"
STATUS: Final = {
    "malformed": 400,
    "unknown_field": 400,
    "bad_signature": 400,
    "wrong_domain": 400,
    "wrong_type": 400,
    "wrong_signer": 400,
    "expired": 400,
    "not_yet_valid": 400,
    "usage": 400,
    "idempotency_missing": 400,
    "unauthorized": 401,
    "certificate_needed": 401,
    "no_funds": 402,
    "forbidden": 403,
    "revoked": 403,
    "rate_limited": 429,
    "name_taken": 409,
    "already_linked": 409,
    "limit_reached": 409,
    "not_found": 404,
    "timeout": 408,
    "replayed": 409,
    "already_settled": 409,
    "dispute_open": 409,
    "dispute_closed": 409,
    "log_behind": 409,
    "already_granted": 409,
    "in_dispute": 409,
    "method_not_allowed": 405,
    "cursor_expired": 410,
    "precondition_failed": 412,
    "oversize": 413,
    "idempotency_mismatch": 422,
    "unsafe_url": 422,
    "too_many": 429,
    "too_many_holds": 429,
    "internal": 500,
    "invalid_transition": 500,
    "payouts_frozen": 503,
    "busy": 503,
    "frozen": 503,
}
_OTHER: Final = 422


def respond(error: LumarisError, request_id: str, *, status: int | None = None) -> Response:
    """The problem document of an error."""
    found = status or STATUS.get(error.code, _OTHER)
    body = {
        "type": f"urn:lumaris:error:{error.code}",
        "title": CODES[error.code].meaning,
        "status": found,
        "detail": error.message,
        "code": error.code,
        "hint": error.hint,
        "money_moved": error.money_moved,
        "request_id": request_id,
    }
    headers = {"Retry-After": str(RETRY_AFTER_S)} if found == 503 else None
    if found == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return Response(msgspec.json.encode(body), found, headers, MEDIA_TYPE)


async def on_error(request: Request, error: Exception) -> Response:
    """Handler of LumarisError."""
    assert isinstance(error, LumarisError)
    if isinstance(error, EnvelopeError):
        _bad_documents(request).note(getattr(request.state, "body", b""), error)
    return respond(error, request_id(request))


async def on_invalid(request: Request, error: Exception) -> Response:
    """Handler of a parameter that does not fit; only its name and rule are told, not its value."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()[0] if error.errors() else {"loc": (), "msg": "not valid"}
    where = ".".join(map(str, found["loc"]))
    return respond(LumarisError("malformed", f"{where}: {found['msg']}"), request_id(request))


async def on_http(request: Request, error: Exception) -> Response:
    """Handler of what the router itself refuses: an unknown route or method."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        problem = LumarisError("not_found", f"There is no {asked}.")
    elif error.status_code == 405:
        problem = LumarisError("method_not_allowed", f"There is no {asked}.")
    else:
        problem = LumarisError("malformed", str(error.detail)[:200])
    response = respond(problem, request_id(request), status=error.status_code)
    response.headers.update(error.headers or {})
    return response


def request_id(request: Request) -> str:
    """The id given to the request at the door."""
    return str(request.scope.get("lumaris.request_id", ""))


class BadDocuments:
    """Logs each bad document once, and not more than a few in a while."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._logged = 0

    def note(self, body: bytes, error: LumarisError) -> None:
        """A document was refused."""
        name = hashlib.sha256(body).digest()
        if name in self._seen or self._logged >= BAD_DOCUMENTS_LOGGED_PER_ROUND_MAX:
            return
        self._seen[name] = None
        self._logged += 1
        while len(self._seen) > BAD_DOCUMENTS_REMEMBERED_MAX:
            self._seen.popitem(last=False)
        log.warning("bad document sha256:%s of %d bytes: %s", name.hex(), len(body), error)

    def new_round(self) -> None:
        """Allow another round's worth of lines."""
        self._logged = 0


def _bad_documents(request: Request) -> BadDocuments:
    found = request.app.state.bad_documents
    assert isinstance(found, BadDocuments)
    return found
