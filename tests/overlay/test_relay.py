"""Circuits through a relay: reservations, limits, and relays and peers that lie or cut."""

from __future__ import annotations

import socket
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio
from libp2p.host.exceptions import StreamFailure
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from lumaris_overlay.libp2p import circuit, connections, dht, overrides, punch, reach, relay
from lumaris_overlay.libp2p.host import HostConfig, open_host
from lumaris_overlay.libp2p.presence import ReachConfig
from lumaris_overlay.libp2p.relay import RelayLimits
from lumaris_protocol.errors import RemoteError
from lumaris_protocol.limits import PUNCH_ADDRESSES_MAX
from tests.overlay.world import KEYS, NETWORK, certificate, echo, key_of, until

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _only_circuits(monkeypatch):
    """On loopback everybody can be dialled: these tests say who is private and who meets whom."""
    monkeypatch.setattr(reach.Reach, "met", lambda self, peer: None)
    monkeypatch.setattr(dht.DhtRecords, "seen", lambda self, peer: None)
    # A punch on loopback is a plain dial, and would end the circuits that are looked at here.
    monkeypatch.setattr(punch.Punching, "met", lambda self, connection: None)
    # Nobody dials a remembered peer again by itself: circuits end when a test ends them.
    monkeypatch.setattr(connections, "_PEERS_WANTED", 0)


@asynccontextmanager
async def host(name: str, *, limits: RelayLimits | None = None, member: bool = True):
    key = key_of(name)
    config = HostConfig(
        key=key,
        network=NETWORK,
        coordinator_keys=KEYS,
        certificate=certificate(key.peer_id) if member else b"",
        reach=ReachConfig(relay=limits),
    )
    async with open_host(config) as overlay:
        yield overlay


@asynccontextmanager
async def world(*names: str, limits: RelayLimits | None = None):
    """A relay and hosts that are connected to it, and to nobody else."""
    async with AsyncExitStack() as stack:
        middle = await stack.enter_async_context(host("relay", limits=limits or RelayLimits()))
        address = (await middle.reachability()).addresses[0]
        others = []
        for name in names:
            other = await stack.enter_async_context(host(name))
            assert await other.connect([address]) == 1
            await until(lambda: other.host.get_id() in middle.host.get_network().connections)  # noqa: B023
            others.append(other)
        yield middle, *others


async def hide(overlay) -> tuple[str, ...]:
    """Make a host believe that nobody can dial it; its circuit addresses."""
    overlay.presence.reach.announcer.verdict = "private"
    overlay.presence.keeper.wake()
    await until(overlay.presence.keeper.relays)
    known = await overlay.reachability()
    return tuple(address for address in known.addresses if "/p2p-circuit/" in address)


def circuit_to(middle, target) -> str:
    address = str(middle.host.get_addrs()[0])
    return f"{address}/p2p-circuit/p2p/{target.peer_id}"


async def relayed(one, other) -> bool | None:
    return next((i.relayed for i in await one.peers() if i.peer == other.peer_id), None)


async def ask_relay(one, middle, **fields) -> int:
    """The status that the relay answers a request with."""
    stream = await one.host.new_stream(middle.host.get_id(), [circuit.HOP])
    with trio.fail_after(10):
        await circuit.send(stream, HopMessage(**fields))
        answer = await circuit.receive(stream, HopMessage)
    await circuit.reset(stream)
    return answer.status


def connect_message(target) -> HopMessage:
    message = HopMessage(type=HopMessage.CONNECT)
    message.peer.id = target.host.get_id().to_bytes()
    return message


async def broken(stream, data: bytes) -> None:
    """Echo until the stream breaks."""
    with trio.fail_after(20):
        try:
            while True:
                await stream.send_all(data)
                await stream.receive_some()
        except trio.BrokenResourceError:
            return


# --- the way it should be ---


async def test_a_hidden_seller_is_reached_through_its_relay():
    async with world("seller", "buyer") as (middle, seller, buyer):
        addresses = await hide(seller)
        assert addresses == (circuit_to(middle, seller),)
        assert (await seller.reachability()).relays == (middle.peer_id,)
        async with seller.serve("/echo/1", echo):
            stream = await buyer.open_stream(seller.peer_id, "/echo/1", addresses=addresses)
            async with stream:
                assert stream.peer == seller.peer_id
                await stream.send_all(b"x" * 100_000)
                got = 0
                with trio.fail_after(10):
                    while got < 100_000:
                        got += len(await stream.receive_some())
        assert await relayed(buyer, seller) is True
        assert await relayed(seller, buyer) is True
        assert await relayed(seller, middle) is False
        # The far end of the circuit went through the same upgrade as a direct connection.
        for held in seller.host.get_network().get_connections(buyer.host.get_id()):
            assert type(held.muxed_conn) is overrides.WholeFrameYamux
            assert held.muxed_conn.get_remote_address() is None
        assert seller.admission.admitted(buyer.peer_id)
        assert middle.presence.service.circuits.total() == 2
        await buyer.connections.drop(seller.host.get_id())
        await until(lambda: not middle.presence.service.circuits)


async def test_an_address_that_leads_nowhere_does_not_hold_up_the_relay():
    async with world("seller", "buyer") as (_, seller, buyer):
        circuits = await hide(seller)
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()  # accepts and never says a word
            dead = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{seller.peer_id}"
            async with seller.serve("/echo/1", echo):
                # Within the deadline of the call, which one silent address would use up.
                stream = await buyer.open_stream(
                    seller.peer_id, "/echo/1", addresses=(dead, dead + "x", *circuits)
                )
                await stream.aclose()
        assert await relayed(buyer, seller) is True


async def test_a_place_is_renewed_in_time_and_given_back():
    async with world("seller", limits=RelayLimits(reservation_s=4)) as (middle, seller):
        await hide(seller)
        reserved = middle.presence.service.reserved
        first = reserved[seller.host.get_id()][0]
        await until(lambda: reserved[seller.host.get_id()][0] > first)
        assert time.time() < first, "renewed before its end"
        seller.presence.reach.announcer.verdict = "public"
        await until(lambda: not seller.presence.keeper.relays())
        assert (await seller.reachability()).addresses == (
            str(seller.host.get_transport_addrs()[0]) + f"/p2p/{seller.peer_id}",
        )


async def test_a_relay_that_dies_is_replaced():
    async with world("seller") as (middle, seller):
        keeper = seller.presence.keeper
        async with host("relay 2", limits=RelayLimits()) as spare:
            await hide(seller)
            await seller.connect((await spare.reachability()).addresses)
            await until(lambda: set(keeper.relays()) == {middle.peer_id, spare.peer_id})
        await until(lambda: keeper.relays() == (middle.peer_id,))
        assert all(str(middle.peer_id) in each for each in keeper.circuits())
        async with host("relay 3", limits=RelayLimits()) as third:
            await seller.connect((await third.reachability()).addresses)
            await until(lambda: set(keeper.relays()) == {middle.peer_id, third.peer_id})


async def test_a_relay_that_forgot_us_is_asked_again():
    async with world("seller") as (middle, seller):
        await hide(seller)
        middle.presence.service.reserved.clear()
        await seller.connections.drop(middle.host.get_id())
        await seller.connect((await middle.reachability()).addresses)
        await until(lambda: seller.host.get_id() in middle.presence.service.reserved)
        await until(lambda: seller.presence.keeper.relays() == (middle.peer_id,))


async def test_who_can_be_dialled_asks_for_no_place():
    async with world("seller") as (middle, seller):
        keeper = seller.presence.keeper
        await keeper._look()
        assert keeper.relays() == ()
        assert middle.presence.service.reserved == {}


# --- limits ---


async def test_places_are_limited():
    limits = RelayLimits(reservations=2, reservations_per_ip=2)
    async with world("a", "b", "c", limits=limits) as (middle, a, b, c):
        for one in (a, b, a):
            assert await ask_relay(one, middle, type=HopMessage.RESERVE) == Status.OK
        assert await ask_relay(c, middle, type=HopMessage.RESERVE) == Status.RESERVATION_REFUSED
        # The place of a peer that left is free.
        a.connections._may_dial = lambda: False
        await a.connections.drop(middle.host.get_id())
        await until(lambda: a.host.get_id() not in middle.host.get_network().connections)
        assert await ask_relay(c, middle, type=HopMessage.RESERVE) == Status.OK
        assert len(middle.presence.service.reserved) == 2


async def test_places_of_one_ip_are_limited():
    async with world("a", "b", limits=RelayLimits(reservations_per_ip=1)) as (middle, a, b):
        assert await ask_relay(a, middle, type=HopMessage.RESERVE) == Status.OK
        assert await ask_relay(b, middle, type=HopMessage.RESERVE) == Status.RESERVATION_REFUSED


async def test_a_reservation_is_its_askers_whoever_it_names():
    async with world("a", "b") as (middle, a, b):
        message = HopMessage(type=HopMessage.RESERVE)
        message.peer.id = b.host.get_id().to_bytes()
        stream, answer = await circuit.ask_hop(a.host, middle.host.get_id(), message)
        await circuit.reset(stream)
        assert answer.status == Status.OK
        assert list(middle.presence.service.reserved) == [a.host.get_id()]


async def test_circuits_of_one_peer_are_limited():
    async with world("seller", "buyer", "late", limits=RelayLimits(circuits_per_peer=1)) as (
        middle,
        seller,
        buyer,
        late,
    ):
        (address,) = await hide(seller)
        assert await buyer.connections.dial(address)
        assert not await late.connections.dial(address)
        await buyer.connections.drop(seller.host.get_id())
        await until(lambda: not middle.presence.service.circuits)
        assert await late.connections.dial(address)


async def hold_circuits(one, middle, target, times: int) -> list[Any]:
    """What the relay answers when a peer asks for circuits and keeps them, saying nothing."""
    answers: list[Any] = []
    for _ in range(times):
        stream = await one.host.new_stream(middle.host.get_id(), [circuit.HOP])
        with trio.fail_after(10):
            await circuit.send(stream, connect_message(target))
            answers.append((await circuit.receive(stream, HopMessage)).status)
    return answers


FULL = Status.RESOURCE_LIMIT_EXCEEDED


async def test_no_source_keeps_others_from_a_target():
    limits = RelayLimits(circuits_per_peer=4)
    async with world("seller", "buyer", "greedy", limits=limits) as (
        middle,
        seller,
        buyer,
        greedy,
    ):
        (address,) = await hide(seller)
        assert await hold_circuits(greedy, middle, seller, 4) == [Status.OK] * 2 + [FULL] * 2
        assert await buyer.connections.dial(address)


async def test_circuits_of_one_source_are_limited():
    limits = RelayLimits(circuits_per_source=3)
    async with world("a", "b", "greedy", limits=limits) as (middle, a, b, greedy):
        for each in (a, b):
            await hide(each)
        assert await hold_circuits(greedy, middle, a, 2) == [Status.OK] * 2
        assert await hold_circuits(greedy, middle, b, 2) == [Status.OK, FULL]
        assert middle.presence.service._pairs.total() == 3
        await greedy.connections.drop(middle.host.get_id())
        await until(lambda: not middle.presence.service._pairs)


async def test_one_relay_takes_only_its_share_of_a_hosts_circuits(monkeypatch):
    monkeypatch.setattr(circuit, "CIRCUITS_IN_MAX", 4)
    async with world("seller", "buyer") as (middle, seller, buyer):
        await hide(seller)
        circuits = seller.presence.circuits
        # A relay that breaks its own rules, and a second one.
        monkeypatch.setattr(circuits, "_reserved", lambda relay: True)
        await seller.connect((await buyer.reachability()).addresses)
        for hostile, expected in (
            (middle, [Status.OK] * 2 + [FULL] * 2),
            (buyer, [Status.OK] * 2 + [FULL]),
        ):
            answers = []
            for _ in expected:
                stream = await hostile.host.new_stream(seller.host.get_id(), [circuit.STOP])
                message = StopMessage(type=StopMessage.CONNECT)
                message.peer.id = hostile.host.get_id().to_bytes()
                with trio.fail_after(10):
                    await circuit.send(stream, message)
                    answers.append((await circuit.receive(stream, StopMessage)).status)
                if answers[-1] == Status.OK:
                    await until(lambda: circuits._inbound[hostile.host.get_id()] == len(answers))  # noqa: B023
            assert answers == expected
        for each in (middle, buyer):
            await each.connections.drop(seller.host.get_id())
        await until(lambda: not circuits._inbound, timeout_s=20)


@pytest.mark.parametrize(
    "limits",
    [RelayLimits(circuit_bytes=200_000), RelayLimits(circuit_s=1.5)],
    ids=["bytes", "time"],
)
async def test_a_circuit_ends_at_its_limit(limits):
    async with world("seller", "buyer", limits=limits) as (middle, seller, buyer):
        addresses = await hide(seller)
        async with seller.serve("/echo/1", echo):
            stream = await buyer.open_stream(seller.peer_id, "/echo/1", addresses=addresses)
            await broken(stream, b"x" * 10_000)
        await until(lambda: not middle.presence.service.circuits)


async def test_strangers_get_nothing_from_a_relay():
    async with world("seller") as (middle, seller), host("stranger", member=False) as stranger:
        await hide(seller)
        stranger.connections._may_dial = lambda: True
        assert await stranger.connect((await middle.reachability()).addresses) == 1
        with pytest.raises(RemoteError), trio.fail_after(20):
            await stranger.presence.circuits.dial(middle.host.get_id(), seller.host.get_id())
        assert len(middle.presence.service.reserved) == 1


async def test_nonsense_to_a_relay_is_refused():
    async with world("seller", "buyer") as (middle, seller, buyer):
        relay_id = middle.host.get_id()
        assert await ask_relay(buyer, middle, type=HopMessage.STATUS) == Status.MALFORMED_MESSAGE
        assert await ask_relay(buyer, middle, type=HopMessage.CONNECT) == Status.MALFORMED_MESSAGE
        with pytest.raises(RemoteError):
            await circuit.ask_hop(buyer.host, relay_id, connect_message(seller))  # no reservation
        for junk in (b"\xff" * 64, b"\x05hello", b"\xff\xff\xff\x7f", b""):
            stream = await buyer.host.new_stream(relay_id, [circuit.HOP])
            await stream.write(junk)
            await stream.close()
        await hide(seller)
        assert await buyer.connections.dial(circuit_to(middle, seller))


async def test_no_circuit_over_a_circuit():
    async with world("seller", "buyer") as (_, seller, buyer):
        (address,) = await hide(seller)
        seller.presence.service = relay.RelayService(
            seller.host,
            admitted=lambda peer: True,
            remote_ip=lambda peer: circuit.remote_ip(seller.host, peer),
        )
        seller.presence.service.start()
        assert await buyer.connections.dial(address)
        status = await ask_relay(buyer, seller, type=HopMessage.RESERVE)
        assert status == Status.PERMISSION_DENIED


# --- liars ---


async def test_a_relay_cannot_put_another_in_a_peers_place(monkeypatch):
    async with world("seller", "buyer", "mallory") as (_, seller, buyer, mallory):
        (address,) = await hide(seller)
        await hide(mallory)
        honest = relay.RelayService._reach

        async def swap(self, source, target):
            return await honest(self, source, mallory.host.get_id())

        monkeypatch.setattr(relay.RelayService, "_reach", swap)
        assert not await buyer.connections.dial(address)
        assert await relayed(buyer, seller) is None
        assert await relayed(buyer, mallory) is None
        monkeypatch.setattr(relay.RelayService, "_reach", honest)
        assert await buyer.connections.dial(address)


async def test_a_relay_cannot_answer_itself_for_a_peer(monkeypatch):
    async with world("seller", "buyer") as (middle, seller, buyer):
        (address,) = await hide(seller)

        async def pose(self, stream, source, wanted):
            await self._say(stream, Status.OK)
            raw = circuit.CircuitConnection(stream, Multiaddr("/p2p-circuit"), initiator=False)
            await middle.host.upgrade_inbound_connection(raw, Multiaddr("/p2p-circuit"))

        monkeypatch.setattr(relay.RelayService, "_connect", pose)
        assert not await buyer.connections.dial(address)
        assert await relayed(buyer, seller) is None


async def test_a_relay_that_cuts_is_survived(monkeypatch):
    async with world("seller", "buyer") as (_, seller, buyer):
        (address,) = await hide(seller)
        cut = trio.Event()
        honest = relay.RelayService._join

        async def join(self, near, far):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(honest, self, near, far)
                await cut.wait()
                nursery.cancel_scope.cancel()

        monkeypatch.setattr(relay.RelayService, "_join", join)
        async with seller.serve("/echo/1", echo):
            stream = await buyer.open_stream(seller.peer_id, "/echo/1", addresses=[address])
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            cut.set()
            await broken(stream, b"x")
            monkeypatch.setattr(relay.RelayService, "_join", honest)
            await until(lambda: not buyer.host.get_network().get_connections(seller.host.get_id()))
            with trio.fail_after(15):
                again = await buyer.open_stream(seller.peer_id, "/echo/1", addresses=[address])
                async with again:
                    await again.send_all(b"y")
                    assert await again.receive_some() == b"y"


async def test_only_our_own_relays_open_circuits_to_us():
    async with world("seller", "buyer") as (middle, seller, buyer):
        await seller.connect((await buyer.reachability()).addresses)
        await until(lambda: seller.host.get_id() in buyer.host.get_network().connections)
        for sender, expected in ((buyer, Status.PERMISSION_DENIED), (middle, Status.OK)):
            if expected == Status.OK:
                await hide(seller)
            stream = await sender.host.new_stream(seller.host.get_id(), [circuit.STOP])
            message = StopMessage(type=StopMessage.CONNECT)
            message.peer.id = b"\x00 not an id"
            with trio.fail_after(10):
                await circuit.send(stream, message)
                assert (await circuit.receive(stream, StopMessage)).status == expected
            await circuit.reset(stream)
        # A relay may name anybody: what counts is the handshake, which never comes here.
        assert {i.peer for i in await seller.peers()} == {middle.peer_id, buyer.peer_id}


async def test_a_relay_cannot_have_a_third_party_dialled(monkeypatch):
    async with world("seller") as (middle, seller):
        theirs = Multiaddr("/ip4/203.0.113.9/tcp/22")
        monkeypatch.setattr(middle.host, "get_addrs", lambda: [theirs])
        announcer = seller.presence.reach.announcer
        announcer.verdict = "private"
        await seller.presence.keeper._look()
        assert seller.presence.keeper.relays() == ()
        assert seller.presence.keeper.circuits() == ()


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/127.0.0.1/tcp/1/p2p-circuit/p2p/{seller}",
        "{middle}/p2p-circuit",
        "{middle}/p2p-circuit/p2p/x",
        "{middle}/p2p-circuit/p2p/{seller}/p2p-circuit/p2p/{buyer}",
        "/p2p/x/p2p-circuit/p2p/{seller}",
        "{middle}/p2p-circuit/p2p/{buyer}",
    ],
)
async def test_bad_circuit_addresses_are_not_dialled(address):
    async with world("seller", "buyer") as (middle, seller, buyer):
        await hide(seller)
        text = address.format(
            middle=middle.host.get_addrs()[0], seller=seller.peer_id, buyer=buyer.peer_id
        )
        assert not await buyer.connections.dial(text)


# --- hole punching: what it may make us dial ---


def test_a_peer_may_not_have_our_own_network_dialled():
    inside = ["/ip4/192.168.1.1/tcp/80", "/ip4/127.0.0.1/tcp/22", "/ip4/0.0.0.0/tcp/1"]
    outside = [f"/ip4/203.0.113.{n}/tcp/4001" for n in range(1, 9)]
    message = HolePunch(
        type=HolePunch.CONNECT,
        ObsAddrs=[b"\xff", *(Multiaddr(a).to_bytes() for a in (*inside, *outside))],
    )
    assert punch._dialable(message) == outside[:PUNCH_ADDRESSES_MAX]


async def test_punching_is_bounded_and_for_members_over_circuits():
    async with world("seller", "buyer") as (_, seller, buyer):
        peer = buyer.host.get_id()
        # Over a direct connection there is nothing to punch.
        await seller.connect((await buyer.reachability()).addresses)
        with pytest.raises((StreamError, StreamFailure)), trio.fail_after(10):
            await (await seller.host.new_stream(peer, [punch.PROTOCOL])).read(1)
        punching = seller.presence.punching
        assert [punching._may(peer) for _ in range(punch._ROUNDS_PER_PEER + 1)] == [
            *[True] * punch._ROUNDS_PER_PEER,
            False,
        ]
        assert not punching._may(ID(b"\x00$" + b"x" * 36))
