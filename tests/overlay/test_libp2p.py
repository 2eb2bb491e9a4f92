"""The real host keeps the contract, with three hosts on loopback in this process."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from lumaris_overlay.libp2p.host import open_host
from lumaris_overlay.socket import open_socket_overlay, serve_socket
from lumaris_overlay.tasks import background
from tests.overlay.conformance import Conformance, World, world_of
from tests.overlay.hosts import member
from tests.overlay.world import advert, key_of, next_of, until

pytestmark = pytest.mark.slow


class Running:
    """A host in its own task, so that a test can end it."""

    def __init__(self, **settings) -> None:
        self.settings = settings
        self.scope = trio.CancelScope()
        self.ended = trio.Event()

    async def run(self, task_status=trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            async with open_host(member(**self.settings)) as overlay:
                task_status.started(overlay)
                await trio.sleep_forever()
        self.ended.set()

    async def end(self) -> None:
        self.scope.cancel()
        await self.ended.wait()


@pytest.fixture
async def world():
    keys = [key_of(name) for name in ("one", "two", "three")]
    async with background() as nursery:
        running = [Running(who=key) for key in keys]
        hosts = [await nursery.start(each.run) for each in running]
        addresses = (await hosts[0].reachability()).addresses
        assert await hosts[1].connect(addresses) == 1
        await until(lambda: hosts[0].host.get_network().connections)
        yield world_of(hosts, keys, addresses, running[0].end)
        for each in running:
            await each.end()


class TestLibp2p(Conformance):
    pass


class TestSocketBeforeLibp2p(Conformance):
    """The whole stack but for the process: client, socket, server, host, network."""

    @pytest.fixture
    async def world(self, world: World, tmp_path: Path):
        peers = [world.one, world.two, world.three]
        async with AsyncExitStack() as stack:
            clients = []
            for number, peer in enumerate(peers):
                path = tmp_path / f"{number}.sock"
                await stack.enter_async_context(serve_socket(peer.overlay, path))
                clients.append(await stack.enter_async_context(open_socket_overlay(path)))
            yield world_of(clients, [peer.key for peer in peers], world.addresses, world.kill_one)


async def test_restarted_host_knows_the_sellers_of_before(tmp_path: Path):
    data = advert(key_of("seller"))
    async with open_host(member("one", state_dir=tmp_path)) as one:
        await one.publish_advert(data)
    async with open_host(member("one", state_dir=tmp_path)) as one, one.adverts() as events:
        assert (await next_of(events, key_of("seller").peer_id)).envelope == data
        assert not await one.peers()
