"""The overlay process: one libp2p host, served on a Unix socket, with a memory limit of its own."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import trio

from lumaris_overlay.private_files import read_key
from lumaris_overlay.socket.server import SocketServer, serve_socket
from lumaris_overlay.tasks import background
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import PeerId

# The host needs about 100 MB; this only stops a fault or an attack from taking the machine.
_DATA_BYTES_MAX = 2 * 1024**3
_LINGER_CHECK_S = 0.25
_FIRST_CLIENT_S = 15.0
_ORPHAN_GRACE_S = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Run until told to stop; the exit status."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    _set_up_logging(options.log_level)
    if options.with_parent:
        _watch_parent()
    resource.setrlimit(resource.RLIMIT_DATA, (_DATA_BYTES_MAX, _DATA_BYTES_MAX))
    try:
        trio.run(_run, options)
    except LumarisError as error:
        _say_error(error)
        return 1
    except BaseExceptionGroup as group:
        known, rest = group.split(LumarisError)
        if known is None or rest is not None:
            raise
        _say_error(_first(known))
        return 1
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m lumaris_overlay", description=__doc__)
    parser.add_argument("--key", type=Path, required=True, help="file with the identity key")
    parser.add_argument("--network", required=True, help="name of the network")
    parser.add_argument("--listen", default="127.0.0.1:0", help="IP:PORT; port 0 is any")
    parser.add_argument("--socket", type=Path, required=True, help="where to serve the port")
    parser.add_argument("--state", type=Path, required=True, help="directory for what is kept")
    parser.add_argument("--coordinator-key", action="append", default=[], help="a peer id")
    parser.add_argument("--bootstrap", action="append", default=[], help="address of a peer")
    parser.add_argument("--linger", type=float, help="seconds to stay after the last client")
    parser.add_argument("--with-parent", action="store_true", help="end when the parent does")
    parser.add_argument("--log-level", default="warning", help="debug, info, warning or error")
    return parser.parse_args(arguments)


async def _run(options: argparse.Namespace) -> None:
    # Loading libp2p takes a second: what can fail cheaply fails first.
    key = read_key(options.key)
    ip, port = _listen_of(options.listen)
    options.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    from lumaris_overlay.libp2p.host import HostConfig, open_host

    config = HostConfig(
        key=key,
        network=options.network,
        coordinator_keys=frozenset(PeerId(text) for text in options.coordinator_key),
        listen_ip=ip,
        listen_port=port,
        bootstrap=tuple(options.bootstrap),
        state_dir=options.state,
    )
    async with background() as nursery:
        scope = nursery.cancel_scope
        nursery.start_soon(_until_signal, scope)
        async with (
            open_host(config) as overlay,
            serve_socket(
                overlay,
                options.socket,
                network=options.network,
                coordinator_keys=tuple(options.coordinator_key),
                shutdown=scope.cancel,
            ) as server,
        ):
            found = await overlay.reachability()
            # One write: the reader may close its end after the line's first byte has come.
            sys.stdout.write(f"ready {key.peer_id} {found.addresses[0]}\n")
            sys.stdout.flush()
            await _until_idle(server, options.linger)


async def _until_idle(server: SocketServer, linger_s: float | None) -> None:
    while True:
        await trio.sleep(_LINGER_CHECK_S)
        if linger_s is None or server.connections:
            continue
        # Whoever started us may be slow to come, so the first client is given longer.
        patience_s = linger_s if server.served else max(linger_s, _FIRST_CLIENT_S)
        if trio.current_time() - server.idle_since >= patience_s:
            return


async def _until_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()


def _watch_parent() -> None:
    """End with the parent, which holds the other end of our standard input while it lives.

    The kernel's own signal for this (PR_SET_PDEATHSIG) follows the thread that started us, and
    trio starts processes from worker threads that end after ten idle seconds. A thread of ours
    notices the end even when the event loop is stuck.
    """

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_ORPHAN_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _listen_of(text: str) -> tuple[str, int]:
    ip, _, port = text.rpartition(":")
    if not ip or not port.isdecimal() or int(port) > 65_535:
        raise LumarisError("config_invalid", f"--listen {text!r} is not IP:PORT.")
    return ip.strip("[]"), int(port)


def _set_up_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("time=%(asctime)s level=%(levelname)s at=%(name)s %(message)s")
    )
    logging.basicConfig(handlers=[handler], level=level.upper())
    # libp2p logs each stranger's mistake as an error of ours, without bound.
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    logging.getLogger("libp2p").propagate = False


def _say_error(error: LumarisError) -> None:
    print(f"error {error.code} {error.message}", file=sys.stderr, flush=True)


def _first(group: BaseExceptionGroup[LumarisError]) -> LumarisError:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, LumarisError)
    return found
