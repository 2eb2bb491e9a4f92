"""The program: serve a coordinator until a signal ends it."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anyio
import uvicorn

from lumaris_coordinator import logs
from lumaris_coordinator.app import Coordinator, create_app
from lumaris_coordinator.bounds import (
    REQUESTS_CONCURRENT_MAX,
    SHUTDOWN_S_MAX,
    WEBSOCKET_BYTES_MAX,
)
from lumaris_coordinator.config import Settings
from lumaris_coordinator.identity.keys import network_of
from lumaris_coordinator.peers.service import can_run
from lumaris_coordinator.server import Server, protocol_behind
from lumaris_coordinator.tls import server_tls
from lumaris_coordinator.upkeep.folder import require_owner
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.money import parse_credits

_BACKLOG = 1_024
# An address with a password belongs neither on a command line nor in a process list.
DATABASE_ENV = "LUMARIS_COORDINATOR_DATABASE"
# The event loop and the writer's thread share the interpreter: shorter turns give the same CPU
# time a third less latency at the 99th percentile.
_SWITCH_INTERVAL_S = 0.0002


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Prints `ready <peer id> <url>` once requests are answered.

    Raises LumarisError: `port_in_use`, `already_running`, `not_writable`, `config_invalid`.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    logs.configure(form=settings.log_format, requests=settings.log_requests)
    require_owner(settings.state)
    with _listen(settings.host, settings.port) as listener:
        coordinator = Coordinator(settings)
        now = coordinator.context.now
        tls = server_tls(settings, lambda: coordinator.authority, now=now())
        scheme = "https" if tls is not None else "http"
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        config = uvicorn.Config(
            create_app(coordinator),
            http=protocol_behind(settings.proxies),
            ws="wsproto",
            ws_max_size=WEBSOCKET_BYTES_MAX,
            ws_per_message_deflate=False,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # whose word counts is the setting `proxies`, see limits
            limit_concurrency=REQUESTS_CONCURRENT_MAX,
            timeout_graceful_shutdown=SHUTDOWN_S_MAX,
            **(tls.options() if tls is not None else {}),
        )
        server = Server(
            config,
            ready=f"ready {coordinator.peer_id} {scheme}://{shown}:{port}",
            closing=coordinator.events.close,
        )

        async def serve() -> None:
            # The signals are taken before the store opens, so none can end it halfway.
            with server.capture_signals():
                async with coordinator.running(), anyio.create_task_group() as tasks:
                    if tls is not None:
                        tasks.start_soon(tls.keep, config, now)
                    await server.serve(sockets=[listener])
                    tasks.cancel_scope.cancel()

        anyio.run(serve)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; its exit status. Errors are one line on stderr: `error <code> <text>`."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s"
    )
    try:
        run(_settings(argv))
    except BaseExceptionGroup as group:
        known = group.subgroup(LumarisError)
        if known is None:
            raise
        return _fail(_leaf(known))
    except LumarisError as error:
        return _fail(error)
    return 0


def _fail(error: LumarisError) -> int:
    sys.stderr.write(f"error {error.code} {error.message} {error.hint}".rstrip() + "\n")
    return error.exit_code


def _leaf(group: BaseExceptionGroup[LumarisError]) -> LumarisError:
    error: LumarisError | BaseExceptionGroup[LumarisError] = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _settings(argv: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(prog="lumaris_coordinator", description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="directory of key and database")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 lets the system choose")
    parser.add_argument("--network", help="of a new folder: devnet unless told")
    parser.add_argument("--fee-bps", type=int)
    parser.add_argument("--settle-window", type=int, metavar="SECONDS")
    parser.add_argument("--test-credit", metavar="CREDITS", help="per account")
    parser.add_argument("--shard-map", type=Path, metavar="FILE", help="JSON: version, shards")
    parser.add_argument(
        "--overlay",
        action=argparse.BooleanOptionalAction,
        help="be a peer of the overlay; by default where the p2p extra is installed",
    )
    parser.add_argument("--overlay-listen", metavar="IP:PORT", help="port 0 lets the system choose")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM; with --tls-key")
    parser.add_argument("--tls-key", type=Path, metavar="FILE")
    parser.add_argument("--tls-name", action="append", default=[], metavar="HOST")
    parser.add_argument("--mutual-tls", action="store_true", help="callers need a certificate")
    parser.add_argument("--no-user-registration", action="store_true")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument("--log-requests", action="store_true", help="one line for each request")
    parser.add_argument("--webhooks-to-loopback", action="store_true", help="for trying things out")
    parser.add_argument("--proxy", action="append", default=[], metavar="IP", help="repeatable")
    found = parser.parse_args(argv)
    settings = Settings(
        state=found.state,
        database=os.environ.get(DATABASE_ENV, ""),
        host=found.host,
        port=found.port,
        network=found.network or network_of(found.state) or Settings.network,
        tls_cert=found.tls_cert,
        tls_key=found.tls_key,
        tls_names=tuple(found.tls_name),
        mutual_tls=found.mutual_tls,
        user_registration=not found.no_user_registration,
        proxies=tuple(found.proxy),
        log_format=found.log_format,
        log_requests=found.log_requests,
        webhooks_to_loopback=found.webhooks_to_loopback,
        overlay=can_run() if found.overlay is None else found.overlay,
    )
    if found.overlay_listen is not None:
        settings = replace(settings, overlay_listen=found.overlay_listen)
    if found.fee_bps is not None:
        settings = replace(settings, fee_bps=found.fee_bps)
    if found.settle_window is not None:
        settings = replace(settings, settle_window_s=found.settle_window)
    if found.test_credit is not None:
        try:
            given = parse_credits(found.test_credit)
        except ValueError as error:
            raise LumarisError("config_invalid", f"--test-credit: {error}.") from None
        settings = replace(settings, test_credit_nanos=given)
    if found.shard_map is not None:
        settings = replace(settings, shard_map=found.shard_map)
    return settings


def _listen(host: str, port: int) -> socket.socket:
    """Bind before anything else starts; the socket itself is handed on, so nobody can slip in.

    Raises LumarisError: `port_in_use`, or `config_invalid` for an address that is not ours.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise LumarisError("config_invalid", f"{host}: {error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise LumarisError("port_in_use", f"{host}:{port} is in use.") from None
        raise LumarisError("config_invalid", f"{host}:{port}: {error.strerror}") from None
    return listener
