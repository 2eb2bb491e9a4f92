"""A link at work: it moves to TLS, survives what it can, and ends when its peer is gone."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio
import trio.testing

from lumaris_overlay.links import Timing, direct, open_links, wire
from lumaris_overlay.links.carrier import Carrier
from lumaris_overlay.links.link import Link
from lumaris_overlay.links.wire import Attach, Attached, Decoder, Kind
from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.simulated import SimulatedOverlay, open_network
from lumaris_protocol.errors import LumarisError, RemoteError
from lumaris_protocol.limits import LINK_RESUME_S, LINKS_PER_PEER_MAX
from lumaris_protocol.protocols import LINK
from tests.overlay.links.pair import ECHO, LOOPBACK, Programs, cut, is_direct, programs
from tests.overlay.world import KEYS, NETWORK, echo, key_of, read_all, until

MIB = 1024 * 1024


def changed(link: Link, before: Carrier | None) -> bool:
    return link.carrier is not before


async def say(stream, data: bytes) -> bytes:
    await stream.send_all(data)
    out = b""
    while len(out) < len(data):
        out += await stream.receive_some()
    return out


async def test_link_moves_to_tls_and_lanes_learn_where():
    async with programs() as two, two.seller.serve(ECHO, echo):
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        assert stream.direct is None
        assert await say(stream, b"inside") == b"inside"
        await two.direct()
        assert await say(stream, b"direct") == b"direct"
        listener = two.seller.listener
        assert stream.direct is not None and listener is not None
        assert stream.direct.addresses == (("127.0.0.1", listener.port),)
        assert stream.direct.pin == listener.pin
        second = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        assert second.direct == stream.direct
        assert len(two.buyer.links) == len(two.seller.links) == 1


async def test_overlay_going_away_does_not_disturb_a_link_on_tls():
    async with programs() as two, two.seller.serve(ECHO, echo):
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        await two.direct()
        two.network.cut(two.buyer_host, two.seller_host)
        two.network.kill(two.seller_host)
        assert await say(stream, b"still") == b"still"
        assert await say(await two.buyer.open_stream(two.seller.peer_id, ECHO), b"x") == b"x"


@pytest.mark.slow
@pytest.mark.parametrize(
    "harm", [lambda _: None, lambda two: cut(two.link), lambda two: cut(two.far)]
)
async def test_nothing_is_lost_while_moving_and_after_cuts(harm):
    payload = os.urandom(4 * MIB)
    async with programs() as two, two.seller.serve(ECHO, echo):
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        cuts = 0

        async def send() -> None:
            nonlocal cuts
            for start in range(0, len(payload), MIB // 4):
                await stream.send_all(payload[start : start + MIB // 4])
                if is_direct(two.link) and is_direct(two.far):
                    harm(two)
                    cuts += 1
            await stream.send_eof()

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                assert await read_all(stream) == payload
        assert cuts


async def test_cut_before_the_next_message_is_not_noticed():
    async with programs() as two, two.seller.serve(ECHO, echo):
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        for number in range(5):
            await two.direct()
            before = two.link.carrier
            cut(two.far if number % 2 else two.link)
            assert await say(stream, b"%d" % number) == b"%d" % number
            await until(partial(changed, two.link, before))


async def test_link_falls_back_to_the_overlay_when_the_port_closes_and_the_peer_lives(monkeypatch):
    async def unreachable(address, pin):
        raise OSError("no route to host")

    async with programs() as two, two.seller.serve(ECHO, echo):
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        await two.direct()
        monkeypatch.setattr(direct, "dial", unreachable)
        cut(two.link)
        assert await say(stream, b"relayed") == b"relayed"
        assert not is_direct(two.link)
        assert stream.direct is None
        # What breaks inside the overlay is resumed there too.
        two.network.cut(two.buyer_host, two.seller_host)
        await two.buyer_host.connect([two.seller_host.address])
        assert await say(stream, b"again") == b"again"


@pytest.mark.parametrize(
    "error", [OSError("no route"), ConnectionRefusedError(), trio.TooSlowError()]
)
async def test_link_stays_inside_when_the_port_cannot_be_reached(monkeypatch, error):
    tried = trio.Event()

    async def unreachable(address, pin):
        tried.set()
        raise error

    monkeypatch.setattr(direct, "dial", unreachable)
    async with programs() as two, two.seller.serve(ECHO, echo):
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        with trio.fail_after(5):
            await tried.wait()
        assert await say(stream, b"inside") == b"inside"
        assert not is_direct(two.link)


@asynccontextmanager
async def mortal_seller(host):
    """A linked seller that ends without a word."""
    async with open_links(host, listen=LOOPBACK) as seller, seller.serve(ECHO, echo):
        yield seller
        for link in seller.links:  # what a kill does: no farewell
            link.closing = True
            assert link._carrying is not None
            link._carrying.cancel()
            link._running.cancel()


async def test_killed_peer_ends_the_lanes_at_once(autojump_clock):
    async with open_network(NETWORK, KEYS) as network:
        buyer, seller = network.host(key_of("buyer")), network.host(key_of("seller"))
        await buyer.connect([seller.address])
        async with open_links(buyer, listen=None, answer=False) as near:
            async with mortal_seller(seller) as far:
                stream = await near.open_stream(seller.peer_id, ECHO)
                assert await say(stream, b"x") == b"x"
                two = Programs(network, buyer, seller, near, far)
                await two.direct()
                link = two.link
            began = trio.current_time()
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(b"x")
            assert trio.current_time() - began < 1
            assert link.over.is_set() and not near.links


async def refused(address, pin):
    raise ConnectionRefusedError


async def test_a_peer_that_moved_is_found_inside_the_overlay(monkeypatch):
    async with programs() as two, two.seller.serve(ECHO, echo):
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        await two.direct()
        monkeypatch.setattr(direct, "dial", refused)
        cut(two.link)
        with trio.fail_after(5):
            assert await say(stream, b"inside") == b"inside"
        monkeypatch.undo()
        cut_off = two.link.carrier
        assert cut_off is not None and not cut_off.direct
        await cut_off.drop()
        assert await say(stream, b"again") == b"again"
        await two.direct()


async def test_a_peer_that_refuses_and_is_not_found_inside_soon_is_gone(monkeypatch):
    monkeypatch.setattr("lumaris_overlay.links.link._GONE_S", 0.05)
    async with programs(timing=Timing(resume_s=60.0)) as two, two.seller.serve(ECHO, echo):
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        await two.direct()
        monkeypatch.setattr(direct, "dial", refused)

        async def never(*_arguments, **_named):
            await trio.sleep_forever()

        two.buyer_host.open_stream = never  # type: ignore[method-assign]
        cut(two.link)
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


async def test_restarted_peer_ends_the_lanes_and_gets_a_new_link():
    async with open_network(NETWORK, KEYS) as network:
        buyer, seller = network.host(key_of("buyer")), network.host(key_of("seller"))
        await buyer.connect([seller.address])
        async with (
            open_links(buyer, listen=None, answer=False) as near,
            open_links(seller, listen=None) as far,
            far.serve(ECHO, echo),
        ):
            stream = await near.open_stream(seller.peer_id, ECHO)
            assert await say(stream, b"x") == b"x"
            far.links[0].stop()
            await until(lambda: not far.links)
            with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            again = await near.open_stream(seller.peer_id, ECHO)
            assert await say(again, b"x") == b"x"


class Puppet:
    """The far side of a link, played by the test over plain simulated streams."""

    def __init__(self, host: SimulatedOverlay) -> None:
        self.host = host
        self.carriers: list[Carrier] = []
        self.attaches: list[Attach] = []
        self.frames: list[wire.Frame] = []
        self.serves = (ECHO,)
        self.silent = False
        self.hollow = ""  # what it does after each beginning: "hangs up" or "is silent"

    async def answer(self, stream) -> None:
        carrier = Carrier(stream, direct=False)
        if not self.silent:
            frame = await carrier.frame()
            self.attaches.append(wire.decode_json(frame, Kind.ATTACH, Attach))
            await carrier.send(wire.encode_json(Kind.ATTACHED, Attached(received=0)))
            await carrier.frame()
            if self.hollow == "hangs up":
                return
            if self.hollow:
                await trio.sleep_forever()
            await carrier.send(wire.encode_serves(self.serves))
            self.carriers.append(carrier)
            while frames := await carrier.frames():
                self.frames += frames
                if any(frame.kind is Kind.CLOSE for frame in frames):
                    return
        await trio.sleep_forever()


@asynccontextmanager
async def puppet_world(timing=None):
    async with open_network(NETWORK, KEYS) as network:
        buyer, seller = network.host(key_of("buyer")), network.host(key_of("seller"))
        await buyer.connect([seller.address])
        puppet = Puppet(seller)
        async with (
            seller.serve(LINK, puppet.answer),
            open_links(buyer, listen=None, answer=False, timing=timing) as near,
        ):
            yield near, puppet


async def test_frozen_peer_is_noticed_in_seconds(autojump_clock):
    async with puppet_world() as (near, puppet):
        stream = await near.open_stream(puppet.host.peer_id, ECHO)
        began = trio.current_time()
        puppet.silent = True
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        assert trio.current_time() - began == pytest.approx(LINK_RESUME_S)
        assert any(frame.kind is Kind.PING for frame in puppet.frames)
        assert not near.links


async def test_a_lane_on_a_link_that_was_idle_has_the_whole_time_and_no_more(autojump_clock):
    async with puppet_world() as (near, puppet):
        await (await near.open_stream(puppet.host.peer_id, ECHO)).aclose()
        puppet.silent = True
        await trio.sleep(30)
        began = trio.current_time()
        stream = await near.open_stream(puppet.host.peer_id, ECHO)
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        assert trio.current_time() - began == pytest.approx(LINK_RESUME_S)


@pytest.mark.parametrize("lost_s", [0.0, 0.05])
async def test_a_link_that_was_idle_comes_back_for_a_new_lane(autojump_clock, lost_s):
    async with programs(listen=None) as two, two.seller.serve(ECHO, echo):
        await (await two.buyer.open_stream(two.seller.peer_id, ECHO)).aclose()
        first, inner = two.link, two.buyer_host.open_stream

        async def slow(*arguments, **named):
            await trio.sleep(2)
            return await inner(*arguments, **named)

        two.buyer_host.open_stream = slow  # type: ignore[method-assign]
        await trio.sleep(30)
        assert first.carrier is not None
        assert isinstance(first.carrier.stream, OverlayStream)
        await first.carrier.stream.reset()
        await trio.sleep(lost_s)
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        assert await say(stream, b"x") == b"x"
        assert two.link is first


@pytest.mark.parametrize("hollow", ["hangs up", "is silent"])
async def test_to_begin_connections_is_no_sign_of_life(autojump_clock, hollow):
    async with puppet_world() as (near, puppet):
        stream = await near.open_stream(puppet.host.peer_id, ECHO)
        puppet.hollow = hollow
        began = trio.current_time()
        await puppet.carriers[0].drop()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        assert trio.current_time() - began <= LINK_RESUME_S + 0.5
        assert 2 <= len(puppet.attaches) < 20


@pytest.mark.slow
async def test_peer_that_answers_pings_is_kept_for_ever(autojump_clock):
    async with programs(listen=None) as two, two.seller.serve(ECHO, echo):
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        before = two.link.carrier
        await trio.sleep(600)
        assert two.link.carrier is before
        assert await say(stream, b"x") == b"x"


async def test_a_quiet_lane_keeps_its_connection_however_short_the_resuming(autojump_clock):
    timing = Timing(resume_s=0.1)
    async with programs(listen=None, timing=timing) as two, two.seller.serve(ECHO, echo):
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        assert await say(stream, b"x") == b"x"
        before = two.link.carrier
        await trio.sleep(10)
        assert two.link.carrier is before


async def test_link_without_lanes_is_closed_and_begun_again(autojump_clock):
    async with programs(listen=None) as two, two.seller.serve(ECHO, echo):
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        first = two.link
        await stream.aclose()
        await trio.sleep(50)
        assert two.link is first
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        await trio.sleep(50)
        await stream.aclose()
        assert two.link is first
        await trio.sleep(65)
        assert not two.buyer.links and not two.seller.links
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        assert await say(stream, b"x") == b"x"


@pytest.mark.parametrize(
    "bad",
    [
        b"junk that is no frame",
        wire.encode(Kind.OPEN, 1, b"/x/1"),
        wire.encode(Kind.DATA, 9, b"x"),
        wire.encode(Kind.ACK, 0, b"\xff" * 8),
        wire.encode(Kind.DATA, 1, bytes(65_000)) * 20,
        wire.encode(Kind.REFUSED),
    ],
)
async def test_peer_that_breaks_a_rule_loses_its_link_only(bad):
    async with puppet_world() as (near, puppet):
        stream = await near.open_stream(puppet.host.peer_id, ECHO)
        with suppress(trio.BrokenResourceError):
            await puppet.carriers[0].send(bad)
        await until(lambda: not near.links)
        with pytest.raises(trio.BrokenResourceError):
            await read_all(stream)
        await near.open_stream(puppet.host.peer_id, ECHO)
        assert len(puppet.carriers) == 2


async def test_peer_without_links_gets_plain_streams_and_is_not_asked_again():
    asked = []
    async with open_network(NETWORK, KEYS) as network:
        buyer, seller = network.host(key_of("buyer")), network.host(key_of("seller"))
        await buyer.connect([seller.address])
        inner = buyer.open_stream

        async def open_stream(peer, protocol, *, addresses=()):
            asked.append(protocol)
            return await inner(peer, protocol, addresses=addresses)

        buyer.open_stream = open_stream  # type: ignore[method-assign]
        async with open_links(buyer, listen=None) as near, seller.serve(ECHO, echo):
            for _ in range(2):
                stream = await near.open_stream(seller.peer_id, ECHO)
                assert await say(stream, b"plain") == b"plain"
            assert asked == [LINK, ECHO, ECHO]


async def test_a_peer_that_was_too_slow_once_is_asked_for_a_link_again():
    async with programs(listen=None) as two, two.seller.serve(ECHO, echo):
        inner = two.buyer_host.open_stream
        failed: list[str] = []

        async def once(peer, protocol, *, addresses=()):
            if protocol == LINK and not failed:
                failed.append(protocol)
                raise RemoteError("unreachable", f"The peer {peer} did not answer in time.")
            return await inner(peer, protocol, addresses=addresses)

        two.buyer_host.open_stream = once  # type: ignore[method-assign]
        for links in (0, 1):
            stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
            assert await say(stream, b"x") == b"x"
            assert len(two.buyer.links) == links


async def test_plain_streams_are_answered_beside_lanes():
    async with programs() as two, two.seller.serve(ECHO, echo):
        stream = await two.buyer_host.open_stream(two.seller.peer_id, ECHO)
        assert await say(stream, b"plain") == b"plain"


async def test_many_first_opens_at_once_make_one_link():
    async with programs() as two, two.seller.serve(ECHO, echo):

        async def one() -> None:
            async with await two.buyer.open_stream(two.seller.peer_id, ECHO) as stream:
                assert await say(stream, b"x") == b"x"

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(one)
        assert len(two.buyer.links) == 1


async def test_last_words_arrive_when_the_program_ends():
    heard = []
    done = trio.Event()

    async def listen(stream) -> None:
        heard.append(await read_all(stream))
        done.set()

    async with open_network(NETWORK, KEYS) as network:
        buyer, seller = network.host(key_of("buyer")), network.host(key_of("seller"))
        await buyer.connect([seller.address])
        async with open_links(seller, listen=LOOPBACK) as far, far.serve(ECHO, listen):
            async with open_links(buyer, listen=None, answer=False) as near:
                stream = await near.open_stream(seller.peer_id, ECHO)
                await until(lambda: is_direct(near.links[0]) and is_direct(far.links[0]))
                await stream.send_all(b"last words" * 10_000)
                await stream.aclose()
            with trio.fail_after(5):
                await done.wait()
            await until(lambda: not far.links)
    assert heard == [b"last words" * 10_000]


async def test_too_many_streams_are_refused_with_a_reason():
    async with programs() as two, two.seller.serve(ECHO, echo):
        streams = [await two.buyer.open_stream(two.seller.peer_id, ECHO) for _ in range(256)]
        with pytest.raises(RemoteError) as caught:
            await two.buyer.open_stream(two.seller.peer_id, ECHO)
        assert caught.value.code == "unreachable"
        await streams[0].aclose()
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        assert await say(stream, b"x") == b"x"


async def test_links_of_one_peer_are_bounded_and_idle_ones_make_room():
    async with programs(listen=None) as two, two.seller.serve(ECHO, echo):
        for number in range(LINKS_PER_PEER_MAX + 5):
            stream = await two.buyer_host.open_stream(two.seller.peer_id, LINK)
            attach = Attach(link=f"{number:032x}", proof="0" * 32, fresh=True)
            await stream.send_all(wire.encode_json(Kind.ATTACH, attach))
            [frame] = Decoder().feed(bytes(await stream.receive_some()))
            assert frame.kind is Kind.ATTACHED
            assert len(two.seller.links) <= LINKS_PER_PEER_MAX


@pytest.mark.parametrize(
    ("who", "link", "proof"),
    [("buyer", "ab" * 16, None), ("buyer", None, "ab" * 16), ("thief", None, None)],
    ids=["unknown", "wrong secret", "wrong peer"],
)
async def test_nobody_else_can_resume_a_link(who, link, proof):
    async with programs() as two, two.seller.serve(ECHO, echo):
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        await two.direct()
        mine = two.link
        host = two.network.find(key_of(who).peer_id) or two.network.host(key_of(who))
        await host.connect([two.seller_host.address])
        theft = await host.open_stream(two.seller.peer_id, LINK)
        attach = Attach(link=link or mine.number, proof=proof or mine._secret)
        await theft.send_all(wire.encode_json(Kind.ATTACH, attach))
        [frame] = Decoder().feed(bytes(await theft.receive_some()))
        assert frame.kind is Kind.REFUSED
        assert is_direct(two.far) and await say(stream, b"x") == b"x"


async def test_unread_bytes_of_all_links_are_bounded(monkeypatch):
    monkeypatch.setattr("lumaris_overlay.links.overlay.LINKS_UNREAD_BYTES_MAX", 100_000)

    async def never_reads(stream) -> None:
        await trio.sleep_forever()

    async with programs() as two, two.seller.serve(ECHO, never_reads):
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await stream.send_all(bytes(MIB))


async def test_listening_where_one_cannot_is_said():
    async with open_network(NETWORK, KEYS) as network:
        host = network.host(key_of("one"))
        async with open_links(host, listen=LOOPBACK) as linked:
            assert linked.listener is not None
            taken = ("127.0.0.1", linked.listener.port)
            with pytest.raises(LumarisError) as caught:
                async with open_links(host, listen=taken):
                    pass
            assert caught.value.code == "port_in_use"
        for listen in (("192.0.2.1", 0), ("localhost", 0)):
            with pytest.raises(LumarisError) as caught:
                async with open_links(host, listen=listen):
                    pass
            assert caught.value.code == "config_invalid"


async def test_listening_everywhere_offers_the_addresses_others_know():
    async with programs(listen=("0.0.0.0", 0)) as two:
        target = await two.seller._make_target()
        assert target is not None
        assert [address.ip for address in target.addresses] == ["10.0.0.1"]


async def test_timing_is_the_callers():
    async with puppet_world(Timing(ping_s=0.01, dead_s=0.03, resume_s=0.05)) as (near, puppet):
        stream = await near.open_stream(puppet.host.peer_id, ECHO)
        puppet.silent = True
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


@pytest.mark.slow
async def test_a_program_that_leaves_in_the_middle_of_a_move_takes_its_lanes_along():
    """At whatever step of the move the links are closed, the peer's handlers end at once."""
    async with programs() as two:
        for steps in range(0, 60, 3):
            ended = trio.Event()

            async def wait(stream: OverlayStream, ended: trio.Event = ended) -> None:
                try:
                    while await stream.receive_some():
                        pass
                except trio.BrokenResourceError:
                    pass
                ended.set()

            async with two.seller.serve(ECHO, wait):
                async with open_links(two.buyer_host, listen=None, answer=False) as leaving:
                    stream = await leaving.open_stream(two.seller.peer_id, ECHO)
                    await stream.send_all(b"here")
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    await stream.aclose()
                with trio.fail_after(3):
                    await ended.wait()
