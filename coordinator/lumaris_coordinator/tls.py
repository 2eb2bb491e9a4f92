"""TLS for the server, and what a client certificate says of who asks.

With mutual TLS a connection without a certificate still comes in, since a peer must reach us to get
its first one; it may use the few routes for that and no other.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from typing import Any, Final

import anyio
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from lumaris_coordinator import problems
from lumaris_coordinator.authority import FOLDER, Authority, peer_of
from lumaris_coordinator.bounds import SERVER_CERTIFICATE_LIFETIME_S, TLS_LOOK_EVERY_S
from lumaris_coordinator.config import Settings
from lumaris_overlay.private_files import write_private_file
from lumaris_protocol.errors import LumarisError

log = logging.getLogger(__name__)

SERVER_FILE: Final = "server.pem"
STATE: Final = "tls_peer"
# What a peer needs to get its first certificate, and what supervises us; /metrics has a rule of its
# own, the setting `metrics_public`.
OPEN: Final = frozenset(
    (
        "/v1/info",
        "/.well-known/lumaris-keys",
        "/v1/identity/challenge",
        "/v1/identity/tls-certificate",
        "/healthz",
        "/readyz",
        "/metrics",
    )
)


class ServerTls:
    """The server's certificate, which may change while it serves.

    Raises LumarisError `config_invalid`, or as the authority does.
    """

    def __init__(self, settings: Settings, authority: Callable[[], Authority], *, now: int) -> None:
        self._settings, self._authority = settings, authority
        if settings.tls_cert is None or settings.tls_key is None:
            self._made_at = 0
            self._files = (settings.state / FOLDER / SERVER_FILE,) * 2
            self._make(now)
        else:
            self._files = (settings.tls_cert, settings.tls_key)
        self._seen = self._look()
        try:
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        except (OSError, ssl.SSLError) as error:
            raise LumarisError("config_invalid", f"The TLS certificate: {error}") from None

    def options(self) -> dict[str, Any]:
        """The keyword arguments of uvicorn's Config."""
        certificate, key = self._files
        found: dict[str, Any] = {"ssl_certfile": certificate, "ssl_keyfile": key}
        if self._settings.mutual_tls:
            # A certificate that is shown must hold: the handshake fails for a foreign or old one.
            clients = self._authority().ca_file
            found |= {"ssl_ca_certs": str(clients), "ssl_cert_reqs": ssl.CERT_OPTIONAL}
        return found

    def refresh(self, context: ssl.SSLContext, *, now: int) -> bool:
        """Serve from now on what the files hold, if it is another certificate than before; our own
        is made anew at half its life. Whether it is another one."""
        own = self._settings.tls_cert is None
        if own and now - self._made_at >= SERVER_CERTIFICATE_LIFETIME_S // 2:
            self._make(now)
        seen = self._look()
        if seen == self._seen:
            return False
        try:
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # is it whole?
            self._load(context)
        except (OSError, ssl.SSLError) as error:
            log.warning("the TLS certificate was replaced and cannot be used yet: %s", error)
            return False
        self._seen = seen
        return True

    async def keep(self, config: uvicorn.Config, now: Callable[[], int]) -> None:
        """Refresh the certificate of a server until cancelled."""
        while True:
            await anyio.sleep(TLS_LOOK_EVERY_S)
            if config.ssl is None:
                continue  # it has not started yet
            try:
                if self.refresh(config.ssl, now=now()):
                    log.info("another TLS certificate is served")
            except (LumarisError, OSError) as error:
                log.warning("the TLS certificate was not renewed: %s", error)

    def _make(self, now: int) -> None:
        made = self._authority().serve(self._settings.tls_names, now=now)
        try:
            write_private_file(self._files[0], made)
        except OSError as error:
            raise LumarisError("not_writable", f"{self._files[0]}: {error.strerror}") from None
        self._made_at = now

    def _look(self) -> list[tuple[int, int, int]]:
        try:
            found = [os.stat(file) for file in self._files]
        except OSError:
            return []
        return [(file.st_ino, file.st_mtime_ns, file.st_size) for file in found]

    def _load(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(*self._files)


def server_tls(
    settings: Settings, authority: Callable[[], Authority], *, now: int
) -> ServerTls | None:
    """What the settings ask for; None is plain HTTP. Raises LumarisError as `ServerTls` does."""
    return ServerTls(settings, authority, now=now) if settings.serves_tls else None


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
        error = LumarisError("certificate_needed")
        name = str(scope.get("lumaris.request_id", ""))
        await problems.respond(error, name)(scope, receive, send)
