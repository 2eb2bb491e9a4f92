"""What one peer can take of a program: its links, and the handlers of its lanes."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from lumaris_overlay.links import LinkedOverlay, open_links, wire
from lumaris_overlay.links.lane import Lane
from lumaris_overlay.links.wire import Attach, Decoder, Kind
from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.simulated import SimulatedOverlay, open_network
from lumaris_protocol.limits import LINK_LANES_MAX
from lumaris_protocol.protocols import LINK
from tests.overlay.links.pair import ECHO, programs
from tests.overlay.world import KEYS, NETWORK, echo, key_of, until

SLOW = "/lumaris/slow/1"


class Slow:
    """A handler that is at something else than its stream."""

    def __init__(self) -> None:
        self.running = 0
        self.done = trio.Event()

    async def __call__(self, _stream) -> None:
        self.running += 1
        try:
            await self.done.wait()
        finally:
            self.running -= 1


async def test_a_lane_that_was_given_up_counts_while_its_handler_runs():
    slow = Slow()
    async with (
        programs(listen=None) as two,
        two.seller.serve(ECHO, echo),
        two.seller.serve(SLOW, slow),
    ):
        await two.buyer.open_stream(two.seller.peer_id, ECHO)
        await until(lambda: SLOW in (two.link.mux.serves or ()))
        for _ in range(3 * LINK_LANES_MAX):
            await (await two.buyer.open_stream(two.seller.peer_id, SLOW)).reset()
        await until(lambda: two.far.mux.received >= 6 * LINK_LANES_MAX)
        assert LINK_LANES_MAX <= slow.running < 2 * LINK_LANES_MAX
        slow.done.set()
        await until(lambda: not slow.running)
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"


async def test_handlers_of_links_that_ended_count_for_their_peer(monkeypatch):
    monkeypatch.setattr("lumaris_overlay.links.overlay.LINKS_PER_PEER_MAX", 1)
    monkeypatch.setattr("lumaris_overlay.links.overlay.LINK_LANES_MAX", 4)
    slow = Slow()
    async with programs(listen=None) as two, two.seller.serve(SLOW, slow):
        for _ in range(3):
            streams = [await two.buyer.open_stream(two.seller.peer_id, SLOW) for _ in range(3)]
            await until(lambda: slow.running >= 3)
            assert slow.running <= 4
            for stream in streams:
                await stream.aclose()
            two.link.stop()
            two.far.stop()
            await until(lambda: not two.buyer.links and not two.seller.links)
        assert slow.running == 4
        slow.done.set()
        await until(lambda: not two.seller._running)


@asynccontextmanager
async def full_seller(monkeypatch, *, links: int, per_peer: int):
    """A seller of few links, and how to make buyers for it."""
    monkeypatch.setattr("lumaris_overlay.links.overlay.LINKS_MAX", links)
    monkeypatch.setattr("lumaris_overlay.links.overlay.LINKS_PER_PEER_MAX", per_peer)
    async with open_network(NETWORK, KEYS) as network, AsyncExitStack() as stack:
        seller = network.host(key_of("seller"))
        far = await stack.enter_async_context(open_links(seller, listen=None))
        await stack.enter_async_context(far.serve(ECHO, echo))

        async def host(name: str) -> SimulatedOverlay:
            buyer = network.host(key_of(name))
            await buyer.connect([seller.address])
            return buyer

        async def program(buyer: SimulatedOverlay) -> LinkedOverlay:
            links = open_links(buyer, listen=None, answer=False)
            return await stack.enter_async_context(links)

        yield far, host, program


async def works(stream: OverlayStream) -> bool:
    with trio.fail_after(5):
        await stream.send_all(b"x")
        return bytes(await stream.receive_some()) == b"x"


async def test_who_has_most_links_makes_room_for_who_has_none(monkeypatch):
    async with full_seller(monkeypatch, links=4, per_peer=3) as (far, host, program):
        greedy, other = await host("greedy"), await host("other")
        taken = [await (await program(greedy)).open_stream(far.peer_id, ECHO) for _ in range(3)]
        kept = await (await program(other)).open_stream(far.peer_id, ECHO)
        assert await works(taken[0])  # so that the second is the one unused for longest
        honest = await (await program(await host("honest"))).open_stream(far.peer_id, ECHO)
        assert isinstance(honest, Lane)
        assert await works(honest) and await works(kept) and await works(taken[0])
        with pytest.raises(trio.BrokenResourceError):
            await works(taken[1])
        assert len(far.links) == 4
        # One more would leave the other with fewer than the newcomer.
        stream = await greedy.open_stream(far.peer_id, LINK)
        attach = Attach(link="ab" * 16, proof="cd" * 16, fresh=True)
        await stream.send_all(wire.encode_json(Kind.ATTACH, attach))
        [frame] = Decoder().feed(bytes(await stream.receive_some()))
        assert frame.kind is Kind.REFUSED
        assert await works(kept) and await works(taken[2])


async def test_who_gets_no_link_gets_plain_streams(monkeypatch):
    async with full_seller(monkeypatch, links=1, per_peer=1) as (far, host, program):
        first = await (await program(await host("first"))).open_stream(far.peer_id, ECHO)
        second = await program(await host("second"))
        plain = await second.open_stream(far.peer_id, ECHO)
        assert not isinstance(plain, Lane) and not second.links
        assert await works(plain) and await works(first)
        await first.aclose()
        await until(lambda: far.links[0].idle)
        assert isinstance(await second.open_stream(far.peer_id, ECHO), Lane)
