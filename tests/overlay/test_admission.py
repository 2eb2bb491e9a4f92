"""Members and strangers: who is let in, for how long, and what a stranger may do."""

from __future__ import annotations

import time
from contextlib import suppress

import msgspec
import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.custom_types import TProtocol
from libp2p.host.exceptions import StreamFailure
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as StockNoise
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from lumaris_overlay.frame_reader import FrameReader
from lumaris_overlay.libp2p import admission as admission_module
from lumaris_overlay.libp2p import index
from lumaris_overlay.libp2p.admission import Admission
from lumaris_overlay.libp2p.hello import Greeting
from lumaris_overlay.libp2p.host import Libp2pOverlay, open_host
from lumaris_overlay.libp2p.streams import Libp2pStream
from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.validate import MembershipGate
from lumaris_protocol import frames
from lumaris_protocol.errors import EnvelopeError, RemoteError
from lumaris_protocol.frames import Kind
from lumaris_protocol.protocols import HELLO
from tests.overlay.attackers import ROGUE, uncertified
from tests.overlay.hosts import member, stranger
from tests.overlay.world import (
    KEYS,
    NETWORK,
    advert,
    certificate,
    demand,
    echo,
    key_of,
    next_of,
    read_all,
    until,
)

ONE, TWO = key_of("one"), key_of("two")


def admission_at(now: list[float]) -> Admission:
    return Admission(MembershipGate(NETWORK, KEYS), ONE.peer_id, clock=lambda: now[0])


class TestCertificates:
    def test_admission_ends_with_the_certificate_and_its_tolerance(self):
        now = [1_000_000.0]
        found = admission_at(now)
        assert not found.admitted(TWO.peer_id)
        held = found.admit(TWO.peer_id, certificate(TWO.peer_id, now=now[0], lifetime_s=100))
        assert held.account.startswith("acc_")
        assert held.roles == ("buyer", "seller")
        now[0] += 160
        assert found.admitted(TWO.peer_id)
        now[0] += 1
        assert not found.admitted(TWO.peer_id)

    def test_renewal_extends_and_an_older_certificate_does_not_shorten(self):
        now = [1_000_000.0]
        found = admission_at(now)
        short = certificate(TWO.peer_id, now=now[0], lifetime_s=100)
        found.admit(TWO.peer_id, short)
        now[0] += 50
        found.admit(TWO.peer_id, certificate(TWO.peer_id, now=now[0], lifetime_s=3600))
        found.admit(TWO.peer_id, short)
        now[0] += 1000
        assert found.admitted(TWO.peer_id)

    @pytest.mark.parametrize(
        ("wrong", "code"),
        [
            (certificate(key_of("x").peer_id, now=1_000_000), "not_certified"),
            (certificate(TWO.peer_id, signer=ROGUE, now=1_000_000), "not_certified"),
            (certificate(TWO.peer_id, now=990_000, lifetime_s=60), "expired"),
            (certificate(TWO.peer_id, now=1_000_100), "not_yet_valid"),
            (certificate(TWO.peer_id, now=1_000_000, lifetime_s=10**7), "not_certified"),
            (advert(TWO, now=1_000_000), "wrong_type"),
            (b"", "malformed"),
            (b"x" * 5000, "oversize"),
        ],
        ids=["another's", "rogue", "expired", "early", "long", "advert", "empty", "large"],
    )
    def test_other_documents_admit_nobody(self, wrong, code):
        found = admission_at([1_000_000.0])
        with pytest.raises(EnvelopeError) as caught:
            found.admit(TWO.peer_id, wrong)
        assert caught.value.code == code
        assert len(found) == 0

    def test_members_are_bounded_and_those_that_left_make_room_first(self, monkeypatch):
        monkeypatch.setattr(admission_module, "_MEMBERS_MAX", 3)
        now = [1_000_000.0]
        found = admission_at(now)
        for name in "abcde":
            peer = key_of(name).peer_id
            found.admit(peer, certificate(peer, now=now[0]))
        assert len(found) == 3
        found.part(key_of("e").peer_id)
        assert found.admitted(key_of("e").peer_id)
        found.admit(key_of("a").peer_id, certificate(key_of("a").peer_id, now=now[0]))
        assert not found.admitted(key_of("e").peer_id)
        assert found.admitted(key_of("c").peer_id)


async def addresses_of(host: Libp2pOverlay) -> tuple[str, ...]:
    return (await host.reachability()).addresses


async def greet(stream: OverlayStream, **fields: object) -> Greeting:
    """Say hello by hand."""
    body = msgspec.json.encode(Greeting(time_ms=int(time.time() * 1000), **fields))  # type: ignore[arg-type]
    await stream.send_all(frames.encode(Kind.HEADER, body))
    return msgspec.json.decode(await FrameReader(stream).expect(Kind.HEADER), type=Greeting)


@pytest.mark.slow
class TestStrangers:
    async def test_gets_hello_and_nothing_else(self):
        async with (
            open_host(member("one")) as one,
            open_host(uncertified("x")) as other,
            one.serve("/mine/1", echo),
        ):
            assert await other.connect(await addresses_of(one)) == 1
            await until(lambda: len(one.strangers) == 1)
            assert await one.peers() == ()
            for protocol in ("/mine/1", index.PROTOCOL, "/meshsub/1.1.0", "/ipfs/id/1.0.0"):
                with pytest.raises(RemoteError):
                    await other.open_stream(one.peer_id, protocol)
            found = await other.ping(one.peer_id)
            assert abs(found.clock_offset_s) < 5
            # Nor do we open anything to it.
            with pytest.raises(RemoteError):
                await one.open_stream(other.peer_id, "/mine/1")
            gossip = one.exchange.gossip._pubsub
            assert other.host.get_id() not in gossip.peers
            assert not gossip._reading

    async def test_is_sent_away_when_its_time_is_up(self, monkeypatch):
        monkeypatch.setattr(admission_module, "STRANGER_S", 0.3)
        async with open_host(member("one")) as one, open_host(uncertified("x")) as other:
            assert await other.connect(await addresses_of(one)) == 1
            await until(lambda: len(one.strangers) == 1)
            await until(lambda: not one.connections.live())
            await until(lambda: not other.connections.live())
            assert len(one.strangers) == 0

    async def test_only_few_are_kept(self, monkeypatch):
        monkeypatch.setattr(admission_module, "STRANGERS_MAX", 2)
        async with open_host(member("one")) as one, open_host(member("two")) as two:
            addresses = await addresses_of(one)
            await two.connect(addresses)
            async with (
                open_host(uncertified("a")) as a,
                open_host(uncertified("b")) as b,
                open_host(uncertified("c")) as c,
                open_host(uncertified("d")) as d,
            ):
                for each in (a, b, c, d):
                    await each.connect(addresses)
                await until(lambda: len(one.connections.live()) == 3)
                assert len(one.strangers) <= 2
                assert [info.peer for info in await one.peers()] == [two.peer_id]

    async def test_that_gets_a_certificate_is_admitted_by_hello(self):
        async with open_host(member("one")) as one, open_host(stranger("late")) as late:
            assert await one.connect(await addresses_of(late)) == 1
            assert await one.peers() == ()
            async with one.adverts() as at_one, late.adverts() as at_late:
                await one.publish_advert(advert(ONE))
                await late.present(certificate(late.peer_id))
                await until(lambda: one.admission.admitted(late.peer_id))
                await late.publish_advert(advert(key_of("late")))
                await next_of(at_one, late.peer_id)
                await next_of(at_late, one.peer_id)
                # And by gossip, not only over the index.
                await until(lambda: one.exchange.gossip.in_mesh(late.host.get_id()))
                await until(lambda: late.exchange.gossip.in_mesh(one.host.get_id()))
                await one.publish_advert(advert(ONE, 2))
                assert (await next_of(at_late, one.peer_id)).seq == 2
            assert [info.peer for info in await one.peers()] == [late.peer_id]
            assert len(one.strangers) == 1  # the next look finds it gone
            await until(lambda: len(one.strangers) == 0)

    async def test_dials_nobody_itself(self):
        async with open_host(member("one")) as one:
            addresses = await addresses_of(one)
            async with open_host(stranger("new", bootstrap=addresses)) as new:
                assert await new.connect(addresses) == 0
                with pytest.raises(RemoteError):
                    await new.open_stream(one.peer_id, HELLO, addresses=addresses)
                assert new.connections.live() == []
                await new.present(certificate(new.peer_id))
                await until(one.connections.live)
                assert one.admission.admitted(new.peer_id)

    async def test_in_stock_libp2p_shows_its_certificate_in_hello(self):
        """Another implementation cannot put it into the handshake: hello is enough."""
        pair = create_new_key_pair(key_of("other make").seed)
        noise = StockNoise(pair, noise_privkey=create_x25519().private_key)
        other = new_host(
            key_pair=pair,
            sec_opt={NOISE: noise},
            muxer_opt={TProtocol(YAMUX): Yamux},
            listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")],
        )
        async with open_host(member("one")) as one, one.serve("/mine/1", echo):
            (address,) = await addresses_of(one)
            async with other.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]), trio.open_nursery() as tasks:
                await other.connect(info_from_p2p_addr(Multiaddr(address)))
                await until(lambda: len(one.strangers) == 1)
                peer = str(other.get_id())

                async def open_stream(protocol: str) -> Libp2pStream:
                    net_stream = await other.new_stream(one.host.get_id(), [TProtocol(protocol)])
                    return Libp2pStream(net_stream, protocol, tasks)

                with pytest.raises(StreamFailure):
                    await open_stream("/mine/1")
                hello = await open_stream(HELLO)
                said = await greet(hello, certificate=certificate(key_of("other make").peer_id))
                assert said.observed.startswith("/ip4/127.0.0.1/tcp/")
                assert one.admission.admitted(peer)
                stream = await open_stream("/mine/1")
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"
                await stream.reset()
                await other.disconnect(one.host.get_id())
                await until(lambda: not one.connections.live())
                tasks.cancel_scope.cancel()

    async def test_member_is_a_stranger_between_expiry_and_renewal(self, monkeypatch):
        async with open_host(member("one")) as one, open_host(member("two")) as two:
            await two.connect(await addresses_of(one))
            await until(lambda: one.exchange.gossip.in_mesh(two.host.get_id()))
            ahead_s = 0.0
            monkeypatch.setattr(one.admission, "_clock", lambda: time.time() + ahead_s)
            ahead_s = 3700.0
            assert await one.peers() == ()
            await until(lambda: two.host.get_id() not in one.exchange.gossip._pubsub.peers)
            await two.present(certificate(two.peer_id, lifetime_s=7200))
            await until(lambda: one.admission.admitted(two.peer_id))
            await until(lambda: one.exchange.gossip.in_mesh(two.host.get_id()))

    async def test_newer_advert_renews(self):
        async with open_host(member("one")) as one, open_host(member("two")) as two:
            await two.connect(await addresses_of(one))
            await until(lambda: one.admission.admitted(two.peer_id))
            before = one.admission.member(two.peer_id)
            newer = certificate(two.peer_id, lifetime_s=7200)
            async with one.adverts() as events:
                await two.publish_advert(advert(TWO, cert=newer))
                await next_of(events, two.peer_id)
            after = one.admission.member(two.peer_id)
            assert before is not None
            assert after is not None
            assert after.until > before.until

    async def test_banned_peer_is_refused_in_the_handshake(self):
        async with open_host(member("one")) as one, open_host(member("two")) as two:
            addresses = await addresses_of(one)
            assert await two.connect(addresses) == 1
            await until(one.connections.live)
            one.conduct.ban(two.peer_id, "for the test")
            await until(lambda: not one.connections.live())
            await until(lambda: not two.connections.live())
            await two.connect(addresses)
            await until(lambda: not two.connections.live())
            assert not one.connections.live()


@pytest.mark.slow
class TestHello:
    async def test_observed_addresses_are_what_members_say(self):
        async with open_host(member("one")) as one, open_host(member("two")) as two:
            await two.connect(await addresses_of(one))
            await until(two.hello.observed)
            (seen,) = two.hello.observed()
            assert seen.startswith("/ip4/127.0.0.1/tcp/")
            assert two.hello.observers() == {one.peer_id: seen}
            for lie in ("/ip4/0.0.0.0/tcp/1", "/ip4/1.2.3.4/tcp/99999", "/dns4/x/tcp/1", "junk"):
                stream = await one.open_stream(two.peer_id, HELLO)
                await greet(stream, observed=lie)
                await stream.aclose()
            assert two.hello.observed() == (seen,)
            await one.connections.drop(two.host.get_id())
            await until(lambda: not two.hello.observed())

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\0\0\0\0",
            b"\xff\xff\xff\xff\x03",
            frames.encode(Kind.HEADER, b"{}"),
            frames.encode(Kind.HEADER, b'{"time_ms":-1}'),
            frames.encode(Kind.HEADER, b'{"time_ms":1,"more":1}'),
            frames.encode(Kind.HEADER, b'{"time_ms":1,"protocols":["' + b"x" * 99 + b'"]}'),
            frames.encode(Kind.HEADER, b"[" * 5000),
            frames.encode(Kind.DATA, b"x"),
            frames.encode(Kind.HEADER, b"x" * 50_000),
        ],
        ids=range(10),
    )
    async def test_nonsense_ends_only_its_stream(self, data):
        async with open_host(member("one")) as one, open_host(uncertified("x")) as other:
            await other.connect(await addresses_of(one))
            stream = await other.open_stream(one.peer_id, HELLO)
            with trio.fail_after(10):
                await stream.send_all(data)
                await stream.send_eof()
                with pytest.raises(trio.BrokenResourceError):
                    await read_all(stream)
            await stream.aclose()
            await other.ping(one.peer_id)

    async def test_is_answered_only_so_often(self):
        async with open_host(member("one")) as one, open_host(member("two")) as two:
            await two.connect(await addresses_of(one))
            answered = 0
            with suppress(RemoteError):
                while answered < 200:
                    await two.ping(one.peer_id)
                    answered += 1
            assert 15 <= answered < 200


@pytest.mark.slow
async def test_demand_of_a_forger_goes_no_further():
    async with open_host(member("one")) as one, open_host(member("two")) as two:
        await two.connect(await addresses_of(one))
        await until(lambda: one.exchange.gossip.in_mesh(two.host.get_id(), "demands"))
        await until(lambda: two.exchange.gossip.in_mesh(one.host.get_id(), "demands"))
        async with one.demands() as events:
            await two.exchange.gossip.publish("demands", demand(TWO, signer=key_of("forger")))
            good = demand(TWO, 2)
            await two.publish_demand(good)
            with trio.fail_after(10):
                assert (await events.receive()).envelope == good
