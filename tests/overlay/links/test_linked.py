"""The overlay with links keeps the contract, with and without a direct connection."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from lumaris_overlay.links import Timing, open_links
from lumaris_overlay.ports import Overlay
from lumaris_overlay.simulated import open_network
from lumaris_overlay.socket import open_socket_overlay, serve_socket
from tests.overlay.conformance import Conformance, world_of
from tests.overlay.world import KEYS, NETWORK, key_of

QUICK = Timing(resume_s=0.1)


async def linked_world(
    stack: AsyncExitStack, listen: tuple[str, int] | None, sockets: Path | None = None
):
    keys = [key_of(name) for name in ("one", "two", "three")]
    network = await stack.enter_async_context(open_network(NETWORK, KEYS))
    hosts = [network.host(key) for key in keys]
    await hosts[1].connect([hosts[0].address])
    linked = []
    for number, host in enumerate(hosts):
        inner: Overlay = host
        if sockets is not None:
            path = sockets / f"{number}.sock"
            await stack.enter_async_context(serve_socket(host, path, network=NETWORK))
            inner = await stack.enter_async_context(open_socket_overlay(path))
        links = open_links(inner, listen=listen, timing=QUICK)
        linked.append(await stack.enter_async_context(links))

    async def kill() -> None:
        network.kill(hosts[0])
        for link in linked[0].links:
            link.stop()

    return world_of(linked, keys, (hosts[0].address,), kill)


class TestInside(Conformance):
    """No program listens: links stay inside the overlay."""

    @pytest.fixture
    async def world(self):
        async with AsyncExitStack() as stack:
            yield await linked_world(stack, None)


class TestDirect(Conformance):
    """Every program listens: links move to TLS while the tests run."""

    @pytest.fixture
    async def world(self):
        async with AsyncExitStack() as stack:
            yield await linked_world(stack, ("127.0.0.1", 0))


class TestBeforeTheSocket(Conformance):
    """As in a node: links in the program, the overlay in another process."""

    @pytest.fixture
    async def world(self, tmp_path):
        async with AsyncExitStack() as stack:
            yield await linked_world(stack, ("127.0.0.1", 0), tmp_path)
