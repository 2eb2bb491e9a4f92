"""A third of the hosts dies at once; the living go on, hear of new sellers, and none restarts."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from lumaris_overlay.private_files import write_key
from lumaris_overlay.socket.client import SocketOverlay
from lumaris_overlay.supervisor import OverlayConfig, OverlayProcess
from lumaris_overlay.tasks import background
from lumaris_protocol.keys import KeyPair, PeerId
from tests.overlay.world import KEYS, NETWORK, advert, certificate, echo, key_of, read_all

pytestmark = [pytest.mark.planet, pytest.mark.slow]

HOSTS = 24
# Which hosts die: another seed is another third.
SEED = 7
# Processes share two cores while they start.
STARTING = 4
# The bound of a crowded machine; on a quiet one all of it takes a second or two.
FOUND_S = 60.0
PROTOCOL = "/lumaris/test/1"


@dataclass
class Host:
    """One overlay process, its client, and the supervision that is ended before it is killed."""

    key: KeyPair
    process: OverlayProcess
    overlay: SocketOverlay
    supervision: trio.CancelScope
    address: str

    def kill(self) -> None:
        assert self.process.pid is not None
        self.supervision.cancel()
        os.kill(self.process.pid, signal.SIGKILL)


class Town:
    """The hosts, their tasks, and the folder of their state."""

    def __init__(self, folder: Path, nursery: trio.Nursery, stack: AsyncExitStack) -> None:
        self.folder, self.nursery, self.stack = folder, nursery, stack
        self.hosts: dict[int, Host] = {}
        self._starting = trio.CapacityLimiter(STARTING)

    async def add(self, number: int, known: list[Host]) -> None:
        """Start one host that is told of these."""
        key = key_of(f"third {number}")
        state = self.folder / f"h{number}"
        state.mkdir()
        write_key(state / "key", key.seed)
        config = OverlayConfig(
            key_file=state / "key",
            network=NETWORK,
            coordinator_keys=KEYS,
            state_dir=state,
            bootstrap=tuple(host.address for host in known),
        )
        process = OverlayProcess(config)
        self.stack.push_async_callback(process.end)
        async with self._starting:
            supervision = await self.nursery.start(self._supervise, process)
            overlay = SocketOverlay(config.socket, self.nursery)
            await overlay.attach()
            await overlay.present(certificate(key.peer_id))
        address = (await overlay.reachability()).addresses[0]
        self.hosts[number] = Host(key, process, overlay, supervision, address)

    async def _supervise(
        self,
        process: OverlayProcess,
        task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(process.run)
            task_status.started(nursery.cancel_scope)


async def hear_of(hosts: list[Host], sellers: dict[PeerId, int]) -> float:
    """Seconds until the directories of all these hosts have all these adverts, by their seq."""
    began = time.monotonic()

    async def one(host: Host) -> None:
        missing = set(sellers)
        async with host.overlay.adverts() as events:
            while missing:
                event = await events.receive()
                if event.envelope is not None and event.seq >= sellers.get(event.seller, 0):
                    missing.discard(event.seller)

    with trio.fail_after(FOUND_S):
        async with trio.open_nursery() as nursery:
            for host in hosts:
                nursery.start_soon(one, host)
    return time.monotonic() - began


async def test_the_living_go_on_when_a_third_dies(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    async with AsyncExitStack() as stack, background() as nursery:
        try:
            town = Town(tmp_path, nursery, stack)
            await town.add(0, [])
            for wave in range(1, HOSTS, 2 * STARTING):
                known = list(town.hosts.values())
                async with trio.open_nursery() as starting:
                    for number in range(wave, min(wave + 2 * STARTING, HOSTS)):
                        few = [known[0], *rng.sample(known, min(len(known), 3))]
                        starting.start_soon(town.add, number, few)
            await live_through_it(town, rng)
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await stack.aclose()


async def live_through_it(town: Town, rng: random.Random) -> None:
    everybody = list(town.hosts.values())
    for host in everybody:
        await host.overlay.publish_advert(advert(host.key, 1, addresses=(host.address,)))
    await hear_of(everybody, {host.key.peer_id: 1 for host in everybody})
    # The one that all were told of dies too.
    doomed = {0, *rng.sample(range(1, HOSTS), HOSTS // 3 - 1)}
    for number in doomed:
        town.hosts[number].kill()
    living = [host for number, host in town.hosts.items() if number not in doomed]
    for host in living:
        await host.overlay.publish_advert(advert(host.key, 2, addresses=(host.address,)))
    updated_s = await hear_of(living, {host.key.peer_id: 2 for host in living})
    await town.add(HOSTS, [living[-1]])
    new = town.hosts[HOSTS]
    await new.overlay.publish_advert(advert(new.key, 1, addresses=(new.address,)))
    newcomer_s = await hear_of(living, {new.key.peer_id: 1})
    print(f"seed={SEED} updates after {updated_s:.1f} s, newcomer after {newcomer_s:.1f} s")
    # The newcomer finds those that live, and can talk to them.
    await hear_of([new], {host.key.peer_id: 2 for host in living})
    async with living[0].overlay.serve(PROTOCOL, echo):
        for caller in (new, living[-1]):
            with trio.fail_after(FOUND_S):
                stream = await caller.overlay.open_stream(living[0].key.peer_id, PROTOCOL)
                async with stream:
                    await stream.send_all(b"alive")
                    await stream.send_eof()
                    assert await read_all(stream) == b"alive"
    assert [host.process.starts for host in (*living, new)] == [1] * (len(living) + 1)
