"""TLS for the server, and what a client certificate says of who asks.

With mutual TLS a connection without a certificate still comes in, since a peer must reach us to get
its first one; it may use the few routes for that and no other.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from starlette.types import ASGIApp, Receive, Scope, Send

from lumaris_coordinator import problems
from lumaris_coordinator.authority import peer_of
from lumaris_coordinator.config import Settings
from lumaris_protocol.errors import LumarisError

STATE: Final = "tls_peer"
# What a peer needs to get its first certificate, and what supervises us.
OPEN: Final = frozenset(
    (
        "/v1/info",
        "/.well-known/lumaris-keys",
        "/v1/identity/challenge",
        "/v1/identity/tls-certificate",
        "/healthz",
        "/readyz",
    )
)


@dataclass(frozen=True)
class ServerTls:
    """The keyword arguments of uvicorn's Config for TLS."""

    certificate: Path
    key: Path
    clients: Path | None

    def options(self) -> dict[str, Any]:
        """As uvicorn takes them."""
        found: dict[str, Any] = {"ssl_certfile": self.certificate, "ssl_keyfile": self.key}
        if self.clients is not None:
            # A certificate that is shown must hold: the handshake fails for a foreign or old one.
            found |= {"ssl_ca_certs": str(self.clients), "ssl_cert_reqs": ssl.CERT_OPTIONAL}
        return found


def server_tls(settings: Settings, clients: Path | None) -> ServerTls | None:
    """What the settings ask for; None is plain HTTP. `clients` is the file of the authority whose
    client certificates are taken. Raises LumarisError `config_invalid`."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    found = ServerTls(settings.tls_cert, settings.tls_key, clients)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(found.certificate, found.key)
    except (OSError, ssl.SSLError) as error:
        raise LumarisError("config_invalid", f"The TLS certificate: {error}") from None
    return found


def state_of(transport: Any) -> dict[str, str]:
    """The entry of the ASGI state that a connection's certificate makes; none without TLS."""
    connection = transport.get_extra_info("ssl_object")
    return {STATE: peer_of(connection.getpeercert())} if connection is not None else {}


def tls_peer(scope: Scope) -> str:
    """The peer whose certificate the connection showed; "" for none."""
    return str(scope.get("state", {}).get(STATE, ""))


class CertificateNeeded:
    """The ASGI layer of mutual TLS: without a certificate only the open routes answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        known = scope["type"] not in ("http", "websocket") or tls_peer(scope)
        if known or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "unauthorized"})
            return
        error = LumarisError(
            "unauthorized",
            "This coordinator asks for a TLS client certificate.",
            hint="Get one at /v1/identity/tls-certificate.",
        )
        name = str(scope.get("lumaris.request_id", ""))
        await problems.respond(error, name)(scope, receive, send)
