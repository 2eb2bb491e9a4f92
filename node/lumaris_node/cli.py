"""The node's command line: what `lumaris node` does with a node of this machine."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from lumaris_node import api, config
from lumaris_node.agent import Node
from lumaris_overlay.private_files import make_private_folder
from lumaris_overlay.tasks import first_of
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.advert import Tier

_DOWN_S = 30


def run(state: Path, **flags: Any) -> None:
    """Sell from this machine until a signal or `down`; prints `ready PEER ADDRESS` once.

    Raises LumarisError when the node cannot start.
    """
    make_private_folder(state)
    settings = config.load(state, **flags)
    logging.basicConfig(
        level=settings.log_level.upper(), format="level=%(levelname)s at=%(asctime)s %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    node = Node(state, settings)

    def on_ready(peer: str, address: str) -> None:
        print(f"ready {peer} {address}", flush=True)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_signal, node)
            await node.run(on_ready)
            nursery.cancel_scope.cancel()

    try:
        trio.run(main)
    except* LumarisError as group:
        raise first_of(group) from None


def status(state: Path) -> dict[str, Any]:
    """What the running node says of itself. Raises LumarisError `not_running`."""
    return trio.run(api.call, state / api.SOCKET_NAME, "status")


def selftest(state: Path, tier: Tier | None = None) -> list[dict[str, Any]]:
    """Attack this machine's tiers and say what held; the node need not run.

    `node_offers` is None unless a node that runs offers something else than what was seen; then it
    is asked to test again.
    """
    from lumaris_node.selftest import command

    found: list[dict[str, Any]] = command.run(state, tier=tier)
    offered: dict[str, bool] = {}
    with suppress(LumarisError):  # none runs
        offered = {said["tier"]: said["offered"] for said in status(state).get("tiers", ())}
    for record in found:
        says = offered.get(record["tier"])
        record["node_offers"] = None if says == bool(record["held"]) else says
    if any(record["node_offers"] is not None for record in found):
        with suppress(LumarisError):
            trio.run(api.call, state / api.SOCKET_NAME, "retest")
    return found


def down(state: Path) -> None:
    """Ask the running node to stop, and wait until it has. Raises LumarisError `not_running`."""
    trio.run(_down, state / api.SOCKET_NAME)


def pause(state: Path) -> dict[str, Any]:
    """Freeze every running job and sell nothing; what the owner is told.

    Raises LumarisError `not_running`.
    """
    return trio.run(api.call, state / api.SOCKET_NAME, "pause")


def resume(state: Path) -> dict[str, Any]:
    """Let jobs go on and sell again; what the owner is told. Raises LumarisError `not_running`."""
    return trio.run(api.call, state / api.SOCKET_NAME, "resume")


async def _down(path: Path) -> None:
    await api.call(path, "down")
    with trio.move_on_after(_DOWN_S) as waiting:
        while path.exists():  # noqa: ASYNC110 - another process removes it
            await trio.sleep(0.05)
    if waiting.cancelled_caught:
        raise LumarisError("timeout", f"The node has not stopped within {_DOWN_S} s.")


async def _stop_on_signal(node: Node) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            node.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m lumaris_node --state DIR [...]`: the process that `devnet` starts."""
    parser = argparse.ArgumentParser(prog="lumaris_node")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--coordinator")
    parser.add_argument("--coordinator-ca", metavar="FILE")
    parser.add_argument("--listen")
    parser.add_argument("--region")
    parser.add_argument("--modules", help="folder for compiled modules, shared between nodes")
    parser.add_argument("--log-level", choices=("debug", "info", "warning"))
    given = vars(parser.parse_args(arguments))
    state = given.pop("state")
    try:
        run(state, **given)
    except LumarisError as error:
        print(f"error {error.code} {error.message}", file=sys.stderr)
        return 1
    return 0
