"""The overlay process: one libp2p host, served on a Unix socket, with a memory limit of its own."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from lumaris_overlay import process_file
from lumaris_overlay.networks import ip_and_port
from lumaris_overlay.private_files import make_private_folder, read_key
from lumaris_overlay.process_file import ProcessFacts
from lumaris_overlay.socket.server import SocketServer, serve_socket
from lumaris_overlay.tasks import background
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import MIB, OVERLAY_MEMORY_BYTES

if TYPE_CHECKING:
    from lumaris_overlay.libp2p.host import HostConfig, Libp2pOverlay
    from lumaris_overlay.libp2p.presence import ReachConfig

logger = logging.getLogger(__name__)

# What is resident counts. A flood between two looks must not take the machine either, so the
# kernel refuses what goes far beyond; thread stacks count there with 8 MiB each, used or not.
_MEMORY_CHECK_S = 0.5
_DATA_BEYOND_BYTES = 512 * MIB
MEMORY_STATUS = 70
_PORT_FILE = "port"
_PORTS_TRIED = 5  # a port that was free a moment ago may be taken by now
_LINGER_CHECK_S = 0.25
_FIRST_CLIENT_S = 15.0
_ORPHAN_GRACE_S = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Run until told to stop; the exit status."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    _set_up_logging(options.log_level)
    if options.with_parent:
        _watch_parent()
    _limit_memory(options.memory_max)
    _allow_descriptors()
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
    parser.add_argument("--coordinator-root", action="append", default=[], help="a peer id")
    parser.add_argument("--bootstrap", action="append", default=[], help="address of a peer")
    parser.add_argument("--announce", action="append", default=[], help="address to tell others")
    parser.add_argument("--relay-service", action="store_true", help="carry others' circuits")
    parser.add_argument("--mdns", action="store_true", help="find peers on the local network")
    parser.add_argument("--linger", type=float, help="seconds to stay after the last client")
    parser.add_argument("--memory-max", type=int, default=OVERLAY_MEMORY_BYTES, help="bytes")
    parser.add_argument("--with-parent", action="store_true", help="end when the parent does")
    parser.add_argument("--log-level", default="warning", help="debug, info, warning or error")
    return parser.parse_args(arguments)


async def _run(options: argparse.Namespace) -> None:
    # Loading libp2p takes a second: what can fail cheaply fails first.
    key = read_key(options.key)
    ip, port = ip_and_port("--listen", options.listen)
    make_private_folder(options.state)
    facts = ProcessFacts(
        pid=os.getpid(),
        started_ticks=process_file.start_ticks(os.getpid()),
        started_at=int(time.time()),
        network=options.network,
        linger_s=options.linger,
        memory_bytes_max=options.memory_max,
    )
    async with process_file.held(options.state, facts), background() as nursery:
        scope = nursery.cancel_scope
        nursery.start_soon(_until_signal, scope)
        from lumaris_overlay.libp2p.host import HostConfig

        config = HostConfig(
            key=key,
            network=options.network,
            coordinator_keys=frozenset(PeerId(text) for text in options.coordinator_key),
            listen_ip=ip,
            listen_port=port,
            bootstrap=tuple(options.bootstrap),
            state_dir=options.state,
            reach=_reach_of(options),
            roots=frozenset(PeerId(text) for text in options.coordinator_root),
        )
        async with AsyncExitStack() as stack:
            overlay = await _open_host(stack, config, options.state / _PORT_FILE)
            server = await stack.enter_async_context(
                serve_socket(
                    overlay,
                    options.socket,
                    network=options.network,
                    coordinator_keys=tuple(options.coordinator_key),
                    roots=tuple(options.coordinator_root),
                    shutdown=scope.cancel,
                )
            )
            known = (await overlay.reachability()).addresses
            # One write: the reader may close its end after the line's first byte has come.
            sys.stdout.write(f"ready {key.peer_id} {known[0] if known else '-'}\n")
            sys.stdout.flush()
            await _until_idle(server, options.linger)


async def _open_host(stack: AsyncExitStack, config: HostConfig, file: Path) -> Libp2pOverlay:
    """The host; where any port will do, the one of last time, which others have been told of."""
    from lumaris_overlay.libp2p.host import open_host

    _quiet_libp2p()  # its import sets a level of its own
    if config.listen_port:
        return await stack.enter_async_context(open_host(config))
    known = _read_port(file)
    for attempt in range(_PORTS_TRIED):
        port = (not attempt and known) or _free_port(config.listen_ip)
        try:
            overlay = await stack.enter_async_context(open_host(replace(config, listen_port=port)))
        except LumarisError as error:
            if error.code != "port_in_use":
                raise
            logger.warning("overlay event=port_taken port=%d", port)
            continue
        if port != known:
            file.write_text(str(port))
        return overlay
    raise LumarisError("port_in_use", f"No free port was found at {config.listen_ip}.")


def _free_port(ip: str) -> int:
    """A port nobody has at this moment; 0 leaves it to the host to refuse the address."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((ip, 0))
            return int(probe.getsockname()[1])
    except OSError:
        return 0


def _read_port(file: Path) -> int:
    try:
        text = file.read_text()[:8].strip()
    except (OSError, UnicodeDecodeError):
        return 0
    return int(text) if text.isascii() and text.isdecimal() and int(text) <= 65_535 else 0


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


def _limit_memory(bytes_max: int) -> None:
    """End the process when it holds more than this; whoever needs it starts it again.

    A thread of its own looks, since a flood may keep the event loop busy.
    """
    beyond = max(2 * bytes_max, bytes_max + _DATA_BEYOND_BYTES)
    _set_limit(resource.RLIMIT_DATA, beyond)

    def watch() -> None:
        try:
            while (held := process_file.resident_bytes(os.getpid())) <= bytes_max:
                time.sleep(_MEMORY_CHECK_S)
            logger.error("overlay event=memory_limit held_bytes=%d max_bytes=%d", held, bytes_max)
        finally:  # also when there was not even the memory to look
            os._exit(MEMORY_STATUS)

    threading.Thread(target=watch, name="memory-watch", daemon=True).start()


def _allow_descriptors() -> None:
    """Each stream of a client costs a descriptor, and the usual soft limit is 1,024."""
    _set_limit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def _set_limit(kind: int, wanted: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):  # some systems refuse what they report
        resource.setrlimit(kind, (wanted, hard))


def _reach_of(options: argparse.Namespace) -> ReachConfig:
    from lumaris_overlay.libp2p.addresses import checked_announce
    from lumaris_overlay.libp2p.presence import ReachConfig
    from lumaris_overlay.libp2p.relay import RelayLimits

    return ReachConfig(
        announce=checked_announce(options.announce),
        relay=RelayLimits() if options.relay_service else None,
        mdns=options.mdns,
    )


def _set_up_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("time=%(asctime)s level=%(levelname)s at=%(name)s %(message)s")
    )
    logging.basicConfig(handlers=[handler], level=level.upper())
    _quiet_libp2p()


def _quiet_libp2p() -> None:
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
