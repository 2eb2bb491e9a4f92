"""The direct listener among strangers: pins, tokens, bounds."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress

import pytest
import trio

from lumaris_overlay.links import direct, open_links, wire
from lumaris_overlay.links.carrier import LOST
from lumaris_overlay.links.wire import Attach, Kind
from lumaris_overlay.simulated import open_network
from tests.overlay.links.pair import ECHO, LOOPBACK, Programs, is_direct, programs
from tests.overlay.world import KEYS, NETWORK, echo, key_of, until


async def attach(two, link: str, token: str) -> Kind | None:
    """What a dialler is told; None when it is cut off."""
    listener = two.listener
    carrier = await direct.dial(("127.0.0.1", listener.port), listener.pin)
    try:
        await carrier.send(wire.encode_json(Kind.ATTACH, Attach(link=link, proof=token)))
        with trio.fail_after(5):
            return (await carrier.frame()).kind
    except LOST:
        return None
    finally:
        await carrier.drop()


async def test_token_opens_its_link_once(monkeypatch):
    said = []
    make = wire.encode_json

    def note(kind, body):
        if kind is Kind.ATTACH:
            said.append(body)
        return make(kind, body)

    async with programs() as two, two.seller.serve(ECHO, echo):
        monkeypatch.setattr(wire, "encode_json", note)
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        await two.direct()
        monkeypatch.undo()
        [begun, moved] = said
        assert begun.fresh and not moved.fresh and begun.link == moved.link
        carrier = two.far.carrier
        for proof in (moved.proof, begun.proof, "00" * 16):  # used up, the secret, a guess
            assert await attach(two, moved.link, proof) is Kind.REFUSED
        assert await attach(two, "00" * 16, moved.proof) is Kind.REFUSED
        assert two.far.carrier is carrier
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"


async def test_wrong_pin_is_refused_before_the_token_is_said():
    heard = []

    def on_attach(carrier, said):
        heard.append(said)
        return False

    listener = await direct.open_listener("127.0.0.1", 0, on_attach)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.run, nursery)
        with pytest.raises(direct.PinMismatchError):
            await direct.dial(("127.0.0.1", listener.port), "00" * 32)
        await until(lambda: not listener.half_open)
        nursery.cancel_scope.cancel()
    assert not heard


async def test_link_stays_inside_when_somebody_else_answers_at_the_address(monkeypatch):
    refused = trio.Event()
    dial = direct.dial

    async def elsewhere(address, pin):
        try:
            return await dial(address, pin[::-1])
        except direct.PinMismatchError:
            refused.set()
            raise

    monkeypatch.setattr(direct, "dial", elsewhere)
    async with programs() as two, two.seller.serve(ECHO, echo):
        stream = await two.buyer.open_stream(two.seller.peer_id, ECHO)
        await refused.wait()
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        assert not is_direct(two.link)


async def test_each_listener_has_a_certificate_of_its_own():
    contexts = [await direct.open_listener("127.0.0.1", 0, lambda *_: False) for _ in range(2)]
    assert contexts[0].pin != contexts[1].pin
    for listener in contexts:
        await listener._listener.aclose()


async def test_old_tls_is_refused():
    listener = await direct.open_listener("127.0.0.1", 0, lambda *_: False)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.run, nursery)
        stream = await trio.open_tcp_stream("127.0.0.1", listener.port)
        await stream.send_all(direct.FIRST_LINK)
        with pytest.raises(trio.BrokenResourceError):
            await trio.SSLStream(stream, old).do_handshake()
        await trio.aclose_forcefully(stream)
        nursery.cancel_scope.cancel()


async def test_half_open_connections_are_bounded_and_given_up(autojump_clock):
    listener = await direct.open_listener("127.0.0.1", 0, lambda *_: False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.run, nursery)
        streams = [await trio.open_tcp_stream("127.0.0.1", listener.port) for _ in range(60)]
        for stream in streams[:10]:
            await stream.send_all(direct.FIRST_LINK)
        closed = 0
        for stream in streams[::-1][:20]:  # one too many is closed at once
            with trio.move_on_after(0.5):
                try:
                    closed += await stream.receive_some() == b""
                except trio.BrokenResourceError:
                    closed += 1
        assert closed >= 20
        assert listener.half_open.total() <= direct._HALF_OPEN_PER_IP_MAX
        await trio.sleep(direct._HANDSHAKE_S + 1)
        assert not listener.half_open
        await (await direct.dial(("127.0.0.1", listener.port), listener.pin)).drop()
        for stream in streams:
            await stream.aclose()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "junk",
    [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x01GET / HTTP/1.1\r\n\r\n", b"\x02x", b"\x01" * 9000],
)
async def test_junk_is_cut_off_and_the_next_dialler_served(junk):
    async with programs() as two, two.seller.serve(ECHO, echo):
        stream = await trio.open_tcp_stream("127.0.0.1", two.listener.port)
        async with stream:
            await stream.send_all(junk)
            with trio.fail_after(5), suppress(trio.BrokenResourceError):
                await stream.send_eof()
                while await stream.receive_some():
                    pass
        await two.buyer.open_stream(two.seller.peer_id, ECHO)
        await two.direct()


@pytest.mark.parametrize(
    "frame", [b"\xff" * 64, wire.encode(Kind.OPEN, 1, b"/x/1"), wire.encode(Kind.ATTACH, 0, b"{}")]
)
async def test_junk_inside_tls_is_cut_off(frame):
    async with programs() as two:
        listener = two.listener
        carrier = await direct.dial(("127.0.0.1", listener.port), listener.pin)
        await carrier.send(frame)
        with trio.fail_after(5), pytest.raises(LOST):
            await carrier.frame()
        await carrier.drop()
        assert not two.seller.links


class Gate:
    """Takes what the listener hands over."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, bool]] = []

    async def accept(self, sock, context):
        self.seen.append((await sock.recv(100), isinstance(context, ssl.SSLContext)))
        await sock.send(b"taken")
        sock.shutdown(socket.SHUT_WR)


async def test_bulk_connections_go_to_the_gate_and_lanes_know_it():
    gate = Gate()
    lanes = []

    async def look(stream):
        lanes.append(stream)
        await echo(stream)

    async with open_network(NETWORK, KEYS) as network:
        buyer, seller = network.host(key_of("buyer")), network.host(key_of("seller"))
        await buyer.connect([seller.address])
        async with (
            open_links(seller, listen=LOOPBACK, gate=gate) as far,  # type: ignore[arg-type]
            open_links(buyer, listen=None, answer=False) as near,
            far.serve(ECHO, look),
        ):
            await near.open_stream(seller.peer_id, ECHO)
            await until(lambda: lanes and lanes[0].gate is gate)
            bulk = await trio.open_tcp_stream(
                "127.0.0.1", Programs(network, buyer, seller, near, far).listener.port
            )
            await bulk.send_all(direct.FIRST_BULK + b"hello")
            with trio.fail_after(5):
                assert await bulk.receive_some() == b"taken"
            await bulk.aclose()
    assert gate.seen == [(b"hello", True)]


@pytest.mark.parametrize("ip", ["0.0.0.0", "::", "224.0.0.1", "240.0.0.1", "example", "1.2.3", ""])
def test_addresses_that_are_no_programs_are_not_dialled(ip):
    assert not direct.may_dial(ip)


@pytest.mark.parametrize("ip", ["127.0.0.1", "10.1.2.3", "2001:db8::1", "8.8.8.8", "::1"])
def test_addresses_that_may_be_programs_are_dialled(ip):
    assert direct.may_dial(ip)
