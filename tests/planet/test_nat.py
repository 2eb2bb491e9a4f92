"""Two sellers behind separate NATs, in network namespaces: relays, hole punching, and liars."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from lumaris_overlay.private_files import write_key
from lumaris_overlay.socket import open_socket_overlay
from lumaris_overlay.socket.client import SocketOverlay
from lumaris_overlay.supervisor import OverlayConfig
from tests.overlay.nat import Kind, NatWorld, nat_world, need_namespaces
from tests.overlay.world import KEYS, NETWORK, advert, certificate, echo, key_of, next_of

pytestmark = [pytest.mark.planet, pytest.mark.slow]

PORT = 4001
T = TypeVar("T")


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    need_namespaces()


@asynccontextmanager
async def overlay_in(
    world: NatWorld, name: str, folder: Path, **settings: object
) -> AsyncGenerator[SocketOverlay]:
    """An overlay process inside a namespace, with a member's certificate, and its client."""
    state = folder / name
    state.mkdir(mode=0o700)
    key = write_key(state / "key", key_of(name).seed)
    config = OverlayConfig(
        key_file=state / "key",
        network=NETWORK,
        coordinator_keys=KEYS,
        state_dir=state,
        listen=f"{world.ip(name)}:{PORT}",
        log_level="info",
        **settings,  # type: ignore[arg-type]
    )
    with (state / "overlay.log").open("ab") as log:
        process = await trio.lowlevel.open_process(
            world.command(name, config.command()), stdout=subprocess.PIPE, stderr=log
        )
    assert process.stdout is not None
    try:
        with trio.fail_after(30):
            line = await process.stdout.receive_some(4096)
        assert line.startswith(b"ready "), (state / "overlay.log").read_text()
        async with open_socket_overlay(config.socket) as overlay:
            await overlay.present(certificate(key.peer_id))
            yield overlay
    finally:
        process.terminate()
        with trio.CancelScope(shield=True), trio.move_on_after(5):
            await process.wait()
        if process.returncode is None:
            process.kill()
        await trio.aclose_forcefully(process.stdout)


@asynccontextmanager
async def market(
    kind: Kind, folder: Path
) -> AsyncGenerator[tuple[NatWorld, dict[str, SocketOverlay]]]:
    """The relay `r`, a second public host `s`, and `a` and `b` behind NATs of this kind."""
    async with nat_world(kind) as world, AsyncExitStack() as stack:
        public = {
            name: f"/ip4/{world.ip(name)}/tcp/{PORT}/p2p/{key_of(name).peer_id}" for name in "rs"
        }
        hosts: dict[str, SocketOverlay] = {}
        for name in "rsab":
            others = tuple(address for host, address in public.items() if host != name)
            hosts[name] = await stack.enter_async_context(
                overlay_in(world, name, folder, bootstrap=others, relay_service=name == "r")
            )
        yield world, hosts


async def eventually(ask: Callable[[], Awaitable[T]], seconds: float = 30) -> T:
    """The first true answer."""
    with trio.fail_after(seconds):
        while not (found := await ask()):
            await trio.sleep(0.05)
    return found


async def relayed_to(overlay: SocketOverlay, name: str) -> bool | None:
    """Whether the way to a peer is relayed; None when not connected."""
    peer = key_of(name).peer_id
    return next((info.relayed for info in await overlay.peers() if info.peer == peer), None)


async def private_with_relay(overlay: SocketOverlay) -> tuple[str, ...]:
    """The circuit addresses of a host, once it knows that nobody can dial it."""

    async def found() -> tuple[str, ...]:
        reach = await overlay.reachability()
        if reach.verdict != "private" or not reach.relays:
            return ()
        assert reach.relays == (key_of("r").peer_id,)
        assert reach.confirmed_by == ()
        return reach.addresses

    return await eventually(found)


async def talk(one: SocketOverlay, name: str, addresses: tuple[str, ...] = ()) -> None:
    """An echo from another host."""
    with trio.fail_after(20):
        async with await one.open_stream(
            key_of(name).peer_id, "/echo/1", addresses=addresses
        ) as stream:
            await stream.send_all(b"over")
            assert await stream.receive_some() == b"over"


@pytest.mark.parametrize("kind", ["preserving", "random"])
async def test_two_sellers_behind_nats_meet(tmp_path, kind):
    async with market(kind, tmp_path) as (world, hosts):
        a, b = hosts["a"], hosts["b"]
        circuits = await private_with_relay(a)
        assert all("/p2p-circuit/" in address for address in circuits), circuits
        await private_with_relay(b)
        seen = (await a.reachability()).observed
        assert seen == (f"/ip4/{world.outside('a')}/tcp/{PORT}",)
        for name in "rs":

            async def public(name: str = name) -> bool:
                return (await hosts[name].reachability()).verdict == "public"

            await eventually(public)

        async with b.adverts() as events, a.serve("/echo/1", echo):
            await a.publish_advert(advert(key_of("a"), addresses=circuits))
            assert (await next_of(events, key_of("a").peer_id)).seq == 1
            await talk(b, "a")
            if kind == "preserving":

                async def direct() -> bool:
                    return not (await relayed_to(b, "a")) and not (await relayed_to(a, "b"))

                await eventually(direct)
                await talk(b, "a")
            else:
                assert await relayed_to(b, "a") is True
                log = trio.Path(tmp_path / "a" / "overlay.log")

                async def given_up() -> bool:
                    await talk(b, "a")  # the relay carries meanwhile
                    return "punch event=failed" in await log.read_text()

                await eventually(given_up, 60)
                await talk(b, "a")
                assert await relayed_to(b, "a") is True
            await a.publish_advert(advert(key_of("a"), 2, addresses=circuits))
            assert (await next_of(events, key_of("a").peer_id)).seq == 2


async def test_neighbours_find_each_other_by_multicast(tmp_path):
    """`r` and `s` share a network segment and know nothing of each other but what it carries."""
    async with nat_world() as world, AsyncExitStack() as stack:
        for name in "rs":
            # Without a route for it the kernel would refuse to send multicast.
            await world.run(name, "ip", "route", "add", "224.0.0.0/4", "dev", "wan")
        one, two = [
            await stack.enter_async_context(overlay_in(world, name, tmp_path, mdns=True))
            for name in "rs"
        ]

        async def met() -> bool:
            return await relayed_to(one, "s") is False and await relayed_to(two, "r") is False

        await eventually(met)
