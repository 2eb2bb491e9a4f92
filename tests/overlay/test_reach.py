"""Who can reach us: what is announced, the verdict, dial-backs, and peers that lie about them."""

from __future__ import annotations

import socket
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import pytest
import trio
from multiaddr import Multiaddr

from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.libp2p import addresses, build, reach
from lumaris_overlay.libp2p.host import HostConfig, open_host
from lumaris_overlay.libp2p.presence import ReachConfig
from lumaris_overlay.libp2p.reach import Answer, Ask, Finding, judge
from lumaris_overlay.libp2p.streams import Libp2pStream
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from tests.overlay.world import KEYS, NETWORK, certificate, key_of, until

PUBLIC, OTHER = "/ip4/203.0.113.7/tcp/4001", "/ip4/198.51.100.9/tcp/4001"
LAN, LOOP = "/ip4/192.168.1.2/tcp/4001", "/ip4/127.0.0.1/tcp/4001"
CIRCUIT = "/ip4/203.0.113.1/tcp/4001/p2p/12D3KooWrelay/p2p-circuit"


@asynccontextmanager
async def hosts(*names: str, **settings):
    """Members on loopback that know nobody yet."""
    async with AsyncExitStack() as stack:
        found = []
        for name in names:
            key = key_of(name)
            config = HostConfig(
                key=key,
                network=NETWORK,
                coordinator_keys=KEYS,
                certificate=certificate(key.peer_id),
                **settings,
            )
            found.append(await stack.enter_async_context(open_host(config)))
        yield found


async def meet(one, other) -> None:
    assert await one.connect((await other.reachability()).addresses) == 1
    await until(lambda: one.host.get_id() in other.host.get_network().connections)


# --- what is announced ---


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        pytest.param({"listening": [LOOP]}, [LOOP], id="loopback alone"),
        pytest.param({"listening": [LAN]}, [LAN], id="a private network"),
        pytest.param({"listening": [LAN], "observed": [LAN]}, [LAN], id="seen inside only"),
        pytest.param({"listening": [LAN], "observed": [PUBLIC]}, [], id="seen outside"),
        pytest.param({"listening": [LOOP], "observed": [PUBLIC]}, [], id="loopback, seen outside"),
        pytest.param({"listening": [PUBLIC]}, [PUBLIC], id="public"),
        pytest.param({"listening": [PUBLIC], "verdict": "private"}, [], id="public but walled"),
        pytest.param(
            {"listening": ["/ip4/0.0.0.0/tcp/4001"], "own_ips": ["203.0.113.7", "2001:db8::1"]},
            [PUBLIC],
            id="a wildcard becomes the machine's own",
        ),
        pytest.param({"listening": ["/ip4/0.0.0.0/tcp/4001"]}, [], id="never a wildcard"),
        pytest.param({"listening": ["/ip6/::/tcp/4001"]}, [], id="never a wildcard of six"),
        pytest.param(
            {"listening": ["/ip4/0.0.0.0/tcp/4001"], "own_ips": ["10.0.0.5"], "observed": [PUBLIC]},
            [],
            id="a wildcard behind a NAT",
        ),
        pytest.param(
            {"listening": [LAN], "observed": [PUBLIC], "confirmed": [PUBLIC], "verdict": "public"},
            [PUBLIC],
            id="a forwarded port",
        ),
        pytest.param(
            {"listening": [LAN], "observed": [PUBLIC], "circuits": [CIRCUIT], "verdict": "private"},
            [CIRCUIT],
            id="behind a NAT with a relay",
        ),
        pytest.param(
            {"listening": [PUBLIC], "circuits": [CIRCUIT], "verdict": "public"},
            [PUBLIC],
            id="no circuit for who can be dialled",
        ),
        pytest.param(
            {"listening": [LAN], "configured": [OTHER], "observed": [PUBLIC], "verdict": "private"},
            [OTHER],
            id="the owner's word stands",
        ),
        pytest.param(
            {"listening": [f"/ip4/203.0.113.{n}/tcp/1" for n in range(1, 30)]},
            [f"/ip4/203.0.113.{n}/tcp/1" for n in range(1, limits.ADDRESSES_MAX + 1)],
            id="bounded",
        ),
    ],
)
def test_announced(facts, told):
    assert addresses.announced(**facts) == tuple(told)


@pytest.mark.parametrize(
    ("ip", "scope"),
    [
        ("0.0.0.0", "any"),
        ("::", "any"),
        ("127.9.9.9", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("10.1.2.3", "private"),
        ("172.31.0.1", "private"),
        ("192.168.0.1", "private"),
        ("169.254.1.1", "private"),
        ("100.64.0.1", "private"),
        ("fd00::1", "private"),
        ("fe80::1", "private"),
        ("172.32.0.1", "public"),
        ("203.0.113.1", "public"),
        ("2001:db8::1", "public"),
        ("::ffff:203.0.113.1", "public"),
    ],
)
def test_scope(ip, scope):
    assert addresses.scope_of(ip) == scope


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/ip4/203.0.113.1",
        "/ip4/203.0.113.1/udp/4001",
        "/ip4/203.0.113.1/tcp/0",
        "/ip4/203.0.113.1/tcp/65536",
        "/ip4/203.0.113.1/tcp/-1",
        "/ip4/203.0.113.1/tcp/\u0664",
        "/ip6/203.0.113.1/tcp/1",
        "/ip4/host/tcp/1",
        "/dns4/example.org/tcp/1",
        f"{PUBLIC}/ws",
        f"{PUBLIC}/p2p/x/p2p-circuit",
        f"x{PUBLIC}",
    ],
)
def test_no_endpoint(text):
    assert addresses.endpoint_of(text) is None


def test_endpoint_and_circuit_round_trip():
    assert addresses.endpoint_of(PUBLIC) == ("203.0.113.7", 4001)
    assert addresses.endpoint_of(f"{PUBLIC}/p2p/12D3") == ("203.0.113.7", 4001)
    assert addresses.address_of("203.0.113.7", 4001) == PUBLIC
    relay = f"{PUBLIC}/p2p/12D3relay"
    assert addresses.split_circuit(f"{relay}/p2p-circuit/p2p/12D3far") == (relay, "12D3far")
    for bad in (PUBLIC, f"{PUBLIC}/p2p-circuit/p2p/x", f"{relay}/p2p-circuit", "", "/p2p-circuit"):
        assert addresses.split_circuit(bad) is None
    twice = f"{relay}/p2p-circuit/p2p/a/p2p-circuit/p2p/b"
    assert addresses.split_circuit(twice) is None


def test_an_owner_announces_only_what_can_be_dialled():
    assert addresses.checked_announce([PUBLIC]) == (PUBLIC,)
    for bad in ("203.0.113.7:4001", "/ip4/0.0.0.0/tcp/1", CIRCUIT, f"{PUBLIC}/p2p/x"):
        with pytest.raises(LumarisError) as caught:
            addresses.checked_announce([bad])
        assert caught.value.code == "config_invalid"


FAR = "12D3KooWfar"


@pytest.mark.parametrize(
    ("named", "own", "dialled"),
    [
        pytest.param([PUBLIC], [PUBLIC], [PUBLIC], id="public"),
        pytest.param([PUBLIC], [], [PUBLIC], id="public, by who announces nothing"),
        pytest.param([PUBLIC, OTHER], [], [PUBLIC], id="one IP"),
        pytest.param([f"/ip4/203.0.113.7/tcp/{n}" for n in (1, 2, 3)], [], None, id="two ports"),
        pytest.param([LAN, LOOP], [], [], id="inside, by who announces nothing"),
        pytest.param([LAN, LOOP], [PUBLIC, LAN], [], id="inside, by a public host"),
        pytest.param([LAN, LOOP], [CIRCUIT], [], id="inside, by who is behind a relay"),
        pytest.param([LOOP, LAN, PUBLIC], [LAN], [LAN], id="in a private network"),
        pytest.param([LOOP], [LOOP], [LOOP], id="on one machine"),
        pytest.param(["/dns4/example.org/tcp/1", f"{PUBLIC}/ws", "junk", ""], [], [], id="names"),
        pytest.param(
            [f"/ip4/{ip}/tcp/1" for ip in ("0.0.0.0", "0.1.2.3", "224.0.0.1", "255.255.255.255")],
            [LOOP],
            [],
            id="no host",
        ),
        pytest.param([f"{CIRCUIT}/p2p/{FAR}"], [], [], id="a relay we do not know"),
    ],
)
def test_what_a_stranger_names_is_dialled_only_where_it_hurts_nobody(named, own, dialled):
    expected = named[:2] if dialled is None else dialled
    assert addresses.dialable(named, own=own) == tuple(expected)


def test_a_circuit_is_dialled_through_a_relay_at_hand():
    named = [f"{CIRCUIT}/p2p/{FAR}"]
    assert addresses.dialable(named, own=[], relays={"12D3KooWrelay"}) == (
        f"/p2p/12D3KooWrelay/p2p-circuit/p2p/{FAR}",
    )


def test_a_place_is_dialled_once_a_minute_until_its_peer_answers():
    pace = addresses.DialPace()
    both = ["/ip4/203.0.113.7/tcp/1/p2p/a", "/ip4/203.0.113.7/tcp/1/p2p/b"]
    assert pace.admit(both, 0.0) == (both[0],)
    assert pace.admit(both, 59.0) == ()
    assert pace.admit(both[:1], 60.0) == (both[0],)
    pace.answered(both[:1])
    assert pace.admit(both[:1], 61.0) == (both[0],)
    assert pace.admit(["/p2p/relay/p2p-circuit/p2p/a"] * 2, 0.0) != ()
    for port in range(1, 6_000):
        pace.admit([f"/ip4/203.0.113.8/tcp/{port}"], 0.0)
    assert len(pace._dialled) <= 4_096


def seen(peer: str, ip: str, worked: bool = True, *, tester: str) -> Finding:
    return Finding(peer, ip, (4001,) if worked else (), False, tester)  # type: ignore[arg-type]


def announces(*rounds: list[Finding], listening: str = LAN) -> list[str]:
    announcer = reach.Announcer()
    for findings in rounds:
        announcer.learn(findings)
    return [str(address) for address in announcer([Multiaddr(listening)])]


MINE, LIE = "203.0.113.7", "192.0.2.66"
A, B, C = "198.51.100.1", "192.0.2.1", "203.0.113.200"


@pytest.mark.parametrize(
    ("rounds", "told"),
    [
        pytest.param([[seen("a", MINE, tester=A)]], [PUBLIC], id="one, not contradicted"),
        pytest.param(
            [[seen("l", LIE, tester=C), seen("h", "192.168.1.2", tester="")]],
            [LAN],
            id="a liar and an honest one",
        ),
        pytest.param(
            [[seen("l", LIE, tester=C), seen("a", MINE, tester=A)]], [], id="two that differ"
        ),
        pytest.param(
            [[seen("l", LIE, tester=C), seen("a", MINE, tester=A), seen("b", MINE, tester=B)]],
            [PUBLIC],
            id="two networks agree",
        ),
        pytest.param(
            [[seen("l", LIE, tester=C), seen("k", LIE, tester=C), seen("a", MINE, tester=A)]],
            [],
            id="two of one network agree",
        ),
        pytest.param(
            [
                [seen("a", MINE, tester=A)],
                [seen("l", LIE, tester=C), seen("a", MINE, tester=A)],
            ],
            [PUBLIC],
            id="what worked stays",
        ),
        pytest.param(
            [[seen("a", MINE, tester=A)], [seen("a", LIE, tester=A)]],
            [f"/ip4/{LIE}/tcp/4001"],
            id="the one that said so says otherwise",
        ),
        pytest.param(
            [
                [seen("a", LIE, tester=A)],
                [seen("b", MINE, tester=B), seen("c", MINE, tester=C)],
            ],
            [PUBLIC],
            id="two that agree overrule one",
        ),
        pytest.param(
            [[seen("n", "192.168.1.2", tester="192.168.1.9"), seen("a", MINE, tester=A)]],
            [LAN, PUBLIC],
            id="a neighbour does not contradict",
        ),
        pytest.param([[seen("n", LIE, tester="192.168.1.9")]], [LAN], id="a neighbour cannot know"),
    ],
)
def test_one_tester_does_not_decide_what_is_announced(rounds, told):
    assert announces(*rounds) == told


def test_testers_come_from_outside():
    ips = {"a": "192.168.1.1", "b": "203.0.113.2", "c": "10.0.0.1", "d": "198.51.100.1"}
    for _ in range(20):
        assert {*reach.choose(list(ips), ips.get)} == {"b", "d"}  # type: ignore[arg-type]


def found(ip: str, worked: bool, *, translated: bool = False, peer: str = "p") -> Finding:
    return Finding(peer, ip, (4001,) if worked else (), translated)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("findings", "verdict"),
    [
        ([], "unknown"),
        ([found("203.0.113.7", True)], "public"),
        ([found("127.0.0.1", True)], "public"),
        ([found("203.0.113.7", False)], "unknown"),
        ([found("203.0.113.7", False, translated=True)], "private"),
        ([found("203.0.113.7", False), found("203.0.113.7", False)], "private"),
        ([found("203.0.113.7", True), found("203.0.113.7", False)], "public"),
        # A neighbour behind the same NAT reaches us and proves nothing about the rest.
        (
            [found("192.168.1.2", True), found("203.0.113.7", False, translated=True)],
            "private",
        ),
    ],
)
def test_verdict(findings, verdict):
    assert judge(findings) == verdict


def test_testers_come_from_different_networks():
    ips = {"a": "203.0.113.1", "b": "203.0.113.2", "c": "198.51.100.1", "d": None}
    for _ in range(20):
        chosen = reach.choose(list(ips), ips.get)  # type: ignore[arg-type]
        assert len(chosen) == 2
        assert "c" in chosen
    assert {*reach.choose(["a", "b"], ips.get)} == {"a", "b"}  # type: ignore[list-item]


@pytest.mark.parametrize(("taken", "wanted"), [("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1")])
def test_a_port_is_refused_however_the_other_listens(taken, wanted):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((taken, 0))
        other.listen()
        with pytest.raises(LumarisError) as caught:
            build.refuse_used_port(wanted, other.getsockname()[1])
        assert caught.value.code == "port_in_use"


# --- dial-backs ---


@pytest.mark.slow
async def test_two_peers_confirm_that_we_can_be_reached():
    async with hosts("one", "two", "three") as (one, two, three):
        await meet(one, two)
        await meet(one, three)
        with trio.fail_after(15):
            while len((await one.reachability()).confirmed_by) < 2:
                await trio.sleep(0.02)
        known = await one.reachability()
        assert known.verdict == "public"
        assert set(known.confirmed_by) == {two.peer_id, three.peer_id}
        assert known.observed == (known.addresses[0].partition("/p2p/")[0],)
        assert known.relays == ()
        # The dial-backs came as new connections and left none behind.
        for peer in (two, three):
            assert len(one.host.get_network().get_connections(peer.host.get_id())) == 1


async def ask(host, peer, body: bytes) -> Answer:
    stream = await host._new_stream(str(peer.peer_id), reach.PROTOCOL)
    async with stream:
        framed = FramedStream(stream)
        await framed.send(Kind.HEADER, body)
        return await framed.expect_header(Answer)


@pytest.mark.slow
async def test_only_the_askers_own_address_and_key_count(monkeypatch):
    monkeypatch.setattr(reach.Reach, "met", lambda self, peer: None)
    async with hosts("one", "two", "three") as (one, two, three):
        await meet(one, two)
        await meet(one, three)
        [mine, theirs] = [
            addresses.endpoint_of((await host.reachability()).addresses[0]) for host in (one, three)
        ]
        with socket.socket() as silent, trio.fail_after(20):
            silent.bind(("127.0.0.1", 0))
            closed = silent.getsockname()[1]
            assert mine is not None and theirs is not None
            body = msgspec.json.encode(Ask("n", (mine[1], theirs[1], closed)))
            answer = await ask(one, two, body)
        assert answer == Answer("n", "127.0.0.1", (mine[1],))


@pytest.mark.slow
async def test_a_request_cannot_name_a_third_party(monkeypatch):
    monkeypatch.setattr(reach.Reach, "met", lambda self, peer: None)
    async with hosts("one", "two") as (one, two):
        await meet(one, two)
        dialled = []
        monkeypatch.setattr(trio, "open_tcp_stream", lambda *to: dialled.append(to))
        for body in (
            b'{"nonce":"n","addresses":["/ip4/203.0.113.9/tcp/22"]}',
            b'{"nonce":"n","ports":[22],"addresses":["/ip4/203.0.113.9/tcp/22"]}',
            b'{"nonce":"n","ports":[]}',
            b'{"nonce":"n","ports":[0]}',
            b'{"nonce":"n","ports":[1,2,3,4,5]}',
            b"[" * 1000,
        ):
            with pytest.raises(RefusedError), trio.fail_after(10):
                await ask(one, two, body)
        assert dialled == []


@pytest.mark.slow
async def test_a_peer_that_asks_too_often_is_refused(monkeypatch):
    monkeypatch.setattr(reach.Reach, "met", lambda self, peer: None)
    async with hosts("one", "two") as (one, two):
        await meet(one, two)
        body = msgspec.json.encode(Ask("n", (9,)))
        with trio.fail_after(20):
            for _ in range(limits.REACH_ASKS_BURST_PER_PEER):
                assert (await ask(one, two, body)).worked == ()
            with pytest.raises(RefusedError) as caught:
                await ask(one, two, body)
        assert caught.value.code == "dial_back_refused"


@pytest.mark.slow
@pytest.mark.parametrize("lie", ["no_dial", "other_nonce", "other_port", "wildcard", "nonsense"])
async def test_a_lying_tester_is_not_believed(monkeypatch, lie):
    monkeypatch.setattr(reach.Reach, "met", lambda self, peer: None)
    monkeypatch.setattr(reach, "_ARRIVAL_S", 0.2)
    async with hosts("one", "liar") as (one, liar):

        async def answer(net_stream) -> None:
            framed = FramedStream(Libp2pStream(net_stream, reach.PROTOCOL, liar._nursery))
            asked = await framed.expect_header(Ask)
            said = Answer(asked.nonce, "203.0.113.7", asked.ports)
            if lie == "other_nonce":
                said = msgspec.structs.replace(said, nonce="x", worked=())
            elif lie == "other_port":
                said = msgspec.structs.replace(said, worked=(asked.ports[0] - 1,))
            elif lie == "wildcard":
                said = msgspec.structs.replace(said, observed="0.0.0.0", worked=())
            elif lie == "nonsense":
                said = msgspec.structs.replace(said, observed="/etc/passwd", worked=())
            await framed.send(Kind.HEADER, msgspec.json.encode(said))
            await framed.aclose()

        liar.host.set_stream_handler(reach.PROTOCOL, answer)
        await meet(one, liar)
        with trio.fail_after(10):
            await one.presence.reach.test()
        known = await one.reachability()
        assert (known.verdict, known.confirmed_by, known.observed) == ("unknown", (), ())


@pytest.mark.slow
async def test_an_owners_address_is_told():
    async with hosts("one", "two", reach=ReachConfig(announce=(OTHER,))) as (one, _):
        told = (await one.reachability()).addresses
        assert told[0] == f"{OTHER}/p2p/{one.peer_id}"
