"""/v1/identity, /v1/bootstrap."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lumaris_coordinator.edge import read_body
from lumaris_coordinator.http import coordinator_of, document_body, json_response
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.base import Peer

router = APIRouter(tags=["identity"])


class ChallengeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Who wants to prove its key."""

    peer: Peer


_DECODER: Final = msgspec.json.Decoder(ChallengeRequest)
_CHALLENGE_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["peer"],
                    "properties": {"peer": {"type": "string"}},
                    "additionalProperties": False,
                }
            }
        },
    }
}


@router.post("/v1/identity/challenge", openapi_extra=_CHALLENGE_BODY)
async def challenge(request: Request) -> Response:
    """A challenge to sign: {challenge, expires_at}."""
    try:
        found = _DECODER.decode(await read_body(request))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise LumarisError("malformed", f"The body is not {{peer}}: {error}") from None
    return json_response(coordinator_of(request).identity.challenge(found.peer))


@router.post("/v1/identity/register", openapi_extra=document_body("registration"))
async def register(request: Request) -> Response:
    """{certificate (base64), account, token, expires_at} for the signed challenge."""
    return json_response(await coordinator_of(request).identity.register(await read_body(request)))


@router.post("/v1/identity/tls-certificate", openapi_extra=document_body("tls_request"))
async def tls_certificate(request: Request) -> Response:
    """{certificate, ca, expires_at} in PEM: a TLS client certificate for the peer that signed."""
    coordinator = coordinator_of(request)
    body = await read_body(request)
    return json_response(await coordinator.identity.tls_certificate(body, coordinator.authority))


@router.get("/v1/bootstrap")
async def bootstrap(request: Request) -> Response:
    """{addresses} of some sellers: those with a bond first, one of each network."""
    return json_response({"addresses": await coordinator_of(request).identity.bootstrap()})
