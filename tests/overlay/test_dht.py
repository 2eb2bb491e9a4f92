"""The DHT finds the newest record of a peer, among the dead and among liars."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.value_store import ValueStore
from libp2p.peer.id import ID
from libp2p.records.validator import NamespacedValidator, Validator

from lumaris_overlay.libp2p import dht, dht_wire
from lumaris_overlay.libp2p.dht_store import RecordStore
from lumaris_overlay.libp2p.dht_wire import (
    CLOSER_MAX,
    MessageReader,
    Named,
    Question,
    peer_key,
)
from lumaris_overlay.libp2p.host import HostConfig, Libp2pOverlay, open_host
from lumaris_overlay.records import RecordGate
from lumaris_overlay.tasks import background
from lumaris_protocol import envelope
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import KeyPair
from tests.overlay.test_records import endpoint
from tests.overlay.world import KEYS, NETWORK, advert, certificate, echo, key_of, until

GATE = RecordGate(NETWORK, KEYS)


class Node:
    """A host in its own task, so that a test can end it."""

    def __init__(self, name: str, **settings) -> None:
        self.key = key_of(name)
        self.peer = str(self.key.peer_id)
        self.settings = settings
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.overlay: Libp2pOverlay

    @property
    def dht(self) -> dht.DhtRecords:
        return self.overlay.dht

    async def run(self, task_status=trio.TASK_STATUS_IGNORED) -> None:
        config = HostConfig(
            key=self.key,
            network=NETWORK,
            coordinator_keys=KEYS,
            certificate=certificate(self.key.peer_id, roles=("buyer", "seller")),
            **self.settings,
        )
        with self.scope:
            async with open_host(config) as self.overlay:
                task_status.started()
                await trio.sleep_forever()
        self.ended.set()

    async def know(self, *others: Node) -> None:
        for other in others:
            addresses = (await other.overlay.reachability()).addresses
            assert await self.overlay.connect(addresses[:1]) == 1

    async def end(self) -> None:
        self.scope.cancel()
        await self.ended.wait()


@asynccontextmanager
async def market(count: int, **settings) -> AsyncGenerator[list[Node]]:
    """Hosts of which each knows two that came before it; their records are where they belong."""
    rng = random.Random(count)
    async with background() as nursery:
        nodes = [Node(f"dht {number}", **settings) for number in range(count)]
        for number, node in enumerate(nodes):
            await nursery.start(node.run)
            await node.know(*rng.sample(nodes[:number], min(number, 2)))
        await until(lambda: all(len(node.dht.table) for node in nodes), 20)
        for node in nodes:
            await published(node)
        yield nodes
        async with trio.open_nursery() as closing:
            for node in nodes:
                closing.start_soon(node.end)


async def published(node: Node) -> None:
    """The node's record lies with others."""
    with trio.fail_after(30):
        while not await node.dht.publish():
            await trio.sleep(0.1)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy machine must not look like dead peers; and each test puts when it wants to."""
    monkeypatch.setattr(dht, "_SETTLE_S", 3_600.0)
    monkeypatch.setattr(dht, "_ASK_S", 20.0)
    monkeypatch.setattr(dht, "_LOOKUP_S", 60.0)
    monkeypatch.setattr("lumaris_overlay.libp2p.dht_lookup._GRACE_S", 20.0)


def seq_of(data: bytes | None) -> int:
    assert data is not None
    return GATE.check(data, time.time()).seq


@pytest.mark.slow
async def test_found_updated_and_expired_everywhere():
    async with market(6) as nodes:
        seller = nodes[3]
        for node in nodes:
            found = await node.overlay.find_peer(seller.peer)
            assert found is not None
            assert GATE.check(found, time.time()).addresses
        await seller.dht.put_own(advert(seller.key, 1))
        await seller.dht.put_own(advert(seller.key, 2, now=time.time() + 2))
        await published(seller)
        assert [seq_of(await node.dht.find(seller.peer)) for node in nodes] == [2] * 6
        assert await nodes[0].overlay.find_peer(key_of("nobody").peer_id) is None
        assert await nodes[0].overlay.find_peer("not a peer id") is None


@pytest.mark.slow
async def test_records_are_put_without_being_asked_to(monkeypatch):
    monkeypatch.setattr(dht, "_SETTLE_S", 0.01)
    monkeypatch.setattr(dht, "_PUTS_BURST", 100)
    async with background() as nursery:
        nodes = [Node(f"dht {number}", index_shards=(0,)) for number in range(3)]
        for number, node in enumerate(nodes):
            await nursery.start(node.run)
            await node.know(*nodes[:number])
        one, two, three = nodes

        def held() -> list[tuple[int, bool]]:
            """Seq of what the others hold of the first, and whether it is an endpoint."""
            records = [node.dht.store.peer(one.peer, time.time()) for node in (two, three)]
            return [(r.seq, bool(r.services)) for r in records if r is not None]

        await until(lambda: len(held()) == 2, 30)
        now = time.time()
        await one.overlay.publish_advert(advert(one.key, 300, now=now + 10))
        await until(lambda: held() == [(300, False)] * 2, 30)
        await one.overlay.publish_advert(advert(one.key, 301, now=now + 11, withdrawn=True))
        await until(lambda: [endpoint for _, endpoint in held()] == [True] * 2, 30)
        for node in nodes:
            await node.end()


@pytest.mark.slow
async def test_a_held_copy_never_hides_a_newer_one():
    async with market(6) as nodes:
        seller, holder = nodes[1], nodes[4]
        old = advert(seller.key, 1, now=time.time() - 5)
        new = advert(seller.key, 2)
        for node in nodes:
            node.dht.store = RecordStore(node.key.peer_id, GATE)
        holder.dht.store.put(peer_key(seller.peer), old, time.time())
        nodes[5].dht.store.put(peer_key(seller.peer), new, time.time())
        assert seq_of(await holder.dht.find(seller.peer)) == 2


@pytest.mark.slow
async def test_found_after_a_third_was_killed():
    async with market(9) as nodes:
        dead, alive = nodes[::3], [node for node in nodes if node not in nodes[::3]]
        for node in dead:
            await node.end()
        for number, node in enumerate(alive):
            target = alive[(number + 3) % len(alive)]
            assert await node.dht.find(target.peer) is not None


@pytest.mark.slow
async def test_a_stream_is_opened_to_a_peer_known_only_to_the_dht():
    async with market(5) as nodes:
        first, last = nodes[0], Node("stranger to most")
        async with background() as nursery:
            await nursery.start(last.run)
            await last.know(nodes[4])
            await until(lambda: len(last.dht.table))
            await published(last)
            for peer in list(last.overlay.connections.live()):
                await last.overlay.connections.drop(peer)
            async with last.overlay.serve("/lumaris/test/1", echo):
                assert not first.overlay.directory.addresses(last.peer)
                stream = await first.overlay.open_stream(last.peer, "/lumaris/test/1")
                await stream.send_all(b"x")
                with trio.fail_after(10):
                    assert await stream.receive_some() == b"x"
                await stream.aclose()
            await last.end()


@pytest.mark.slow
async def test_index_peers_are_found():
    async with market(6) as nodes, background() as nursery:
        index = Node("index peer", index_shards=(0, 7))
        await nursery.start(index.run)
        await index.know(nodes[0], nodes[3])
        await until(lambda: len(index.dht.table))
        await published(index)
        for shard in (0, 7):
            (found,) = await nodes[5].dht.find_index_peers(shard)
            assert GATE.check(found, time.time()).peer == index.peer
        assert await nodes[5].dht.find_index_peers(1) == ()
        await index.end()


def liars_kind(liar: Node) -> int:
    """0 stale, 1 forged, 2 foreign, 3 junk; all of them name only each other, or nobody real."""
    return LIARS.index(liar.key.peer_id) % 4


LIARS = [key_of(f"dht {number}").peer_id for number in (1, 3, 6, 8)]


def lies(liar: Node, victims: list[Node], fellows: list[Node]) -> Callable[..., bytes | None]:
    """The answers of a hostile host."""
    stale = {v.peer: endpoint(v.key, now=time.time() - 50, seq=1) for v in victims}
    kind = liars_kind(liar)

    def value(key: bytes, peer: str) -> bytes:
        forger: KeyPair = liar.key
        victim = next((v.key for v in victims if v.peer == peer), forger)
        return (
            stale.get(peer, b"junk"),
            endpoint(victim, signer=forger),
            endpoint(forger),
            b"\xff" * 900,
        )[kind]

    def answer(asker: str, question: Question) -> bytes | None:
        closer = [Named(fellow.peer, ("/ip4/127.0.0.1/tcp/1",)) for fellow in fellows]
        if kind == 0:
            closer = [
                Named(key_of(f"{liar.peer} {number}").peer_id, ("/ip4/127.0.0.1/tcp/1",))
                for number in range(CLOSER_MAX)
            ]
        if question.kind == dht_wire.PUT:
            return dht_wire.encode_answer(question, question.value, ())
        try:
            told = dht_wire.read_key(question.key)
        except EnvelopeError:
            told = ""
        data = value(question.key, told) if isinstance(told, str) else None
        return dht_wire.encode_answer(question, data, closer[:CLOSER_MAX])

    return answer


@pytest.mark.slow
async def test_found_among_40_percent_liars():
    async with market(10) as nodes:
        liars = [node for node in nodes if node.peer in LIARS]
        honest = [node for node in nodes if node not in liars]
        for liar in liars:
            liar.dht._answer = lies(liar, honest, liars)  # type: ignore[method-assign]
        for number, node in enumerate(honest):
            target = honest[(number + 2) % len(honest)]
            found = await node.dht.find(target.peer)
            assert found is not None
            record = GATE.check(found, time.time())
            assert record.peer == target.peer
            # The stale one is validly signed; newer ones exist, and win.
            assert record.issued_at > time.time() - 45
        assert sum(node.dht.counts["bad_answers"] for node in honest) > 0


async def speak(node: Node, other: Node, data: bytes) -> bytes | None:
    """What a host answers to these bytes; None when it resets the stream."""
    stream = await node.overlay.open_stream(other.peer, node.dht.protocol)
    try:
        await stream.send_all(data)
        with trio.fail_after(5):
            return await MessageReader(stream, 1 << 20).next()
    except trio.BrokenResourceError:
        return None
    finally:
        await stream.reset()


@pytest.fixture
async def pair():
    async with market(2) as nodes:
        yield nodes


@pytest.mark.slow
async def test_abuse_is_refused_and_the_host_goes_on(pair):
    one, two = pair
    key = peer_key(two.peer)
    stranger = key_of("stranger")
    abuses = [
        b"\xff" * 20,
        b"\xff\xff\xff\xff\x7f",
        b"\x05junk!",
        dht_wire.encode_question(Question(dht_wire.GET, b"/pk/x")),
        dht_wire.encode_question(Question(dht_wire.PUT, key, b"")),
        dht_wire.encode_question(Question(dht_wire.PUT, key, b"x" * 4000)),
        dht_wire.encode_question(Question(dht_wire.PUT, key, b"x" * 100_000)),
        dht_wire.encode_question(Question(dht_wire.PUT, key, endpoint(stranger))),
        dht_wire.encode_question(
            Question(dht_wire.PUT, key, endpoint(two.key, now=time.time() + 1000))
        ),
        dht_wire.encode_question(
            Question(dht_wire.PUT, key, endpoint(two.key, now=time.time() - 9000))
        ),
        b"\x04\x08\x02\x12\x00",  # ADD_PROVIDER
    ]
    for abuse in abuses:
        assert await speak(two, one, abuse) is None
    held = len(one.dht.store)
    assert held <= 2
    assert await one.dht.find(two.peer) is not None
    assert await two.dht.find(one.peer) is not None


@pytest.mark.slow
async def test_a_peer_named_with_a_dead_address_is_found_at_its_own(pair):
    one, two = pair
    dead = Named(two.peer, ("/ip4/127.0.0.1/tcp/1",))
    question = Question(dht_wire.FIND_NODE, peer_key(two.peer))
    where = (await two.overlay.reachability()).addresses
    one.dht.table.seen(two.peer, where, trio.current_time())
    await one.overlay.connections.drop(ID.from_base58(two.peer))
    assert await one.dht._ask(dead, question) is not None
    assert two.peer in one.dht.table


@pytest.mark.slow
async def test_many_names_of_one_place_are_one_dial(pair, monkeypatch):
    one, _ = pair
    question = Question(dht_wire.FIND_NODE, b"x")
    dialled: list[str] = []

    async def dial(address: str) -> bool:
        await trio.lowlevel.checkpoint()
        dialled.append(address)
        return False

    monkeypatch.setattr(one.overlay.connections, "dial", dial)
    places = ("/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/22", "/dns4/example.org/tcp/80")
    for number in range(5):
        named = Named(key_of(f"invented {number}").peer_id, places)
        assert await one.dht._ask(named, question) is None
    assert [address.partition("/p2p/")[0] for address in dialled] == ["/ip4/127.0.0.1/tcp/1"]


@pytest.mark.slow
async def test_a_flood_of_puts_is_bounded(pair):
    one, two = pair
    keys = [key_of(f"flood {number}") for number in range(40)]
    kept = 0
    for key in keys:
        put = Question(dht_wire.PUT, peer_key(key.peer_id), endpoint(key))
        kept += await speak(two, one, dht_wire.encode_question(put)) is not None
    assert 0 < kept < len(keys)
    assert len(one.dht.store) <= kept + 2


@pytest.mark.slow
async def test_streams_of_one_peer_are_bounded(pair):
    one, two = pair
    streams = [await two.overlay.open_stream(one.peer, two.dht.protocol) for _ in range(8)]
    await until(lambda: one.dht.counts["refused"] >= 4)
    for stream in streams:
        await stream.reset()
    await until(lambda: not one.dht._serving)
    assert await two.dht.find(one.peer) is not None


@pytest.mark.slow
async def test_libp2ps_own_client_reads_our_answers(pair, monkeypatch):
    one, two = pair
    monkeypatch.setattr("libp2p.kad_dht.value_store.PROTOCOL_ID", TProtocol(two.dht.protocol))
    client = ValueStore(two.overlay.host, two.overlay.host.get_id())
    found = await client._get_from_peer(ID.from_base58(one.peer), peer_key(one.peer))
    assert isinstance(found, bytes)
    assert envelope.decode(found).signer == one.peer


class Anything(Validator):
    def validate(self, key: str, value: bytes) -> None:
        pass

    def select(self, key: str, values: list[bytes]) -> int:
        return 0


@pytest.mark.slow
async def test_b14_the_stock_node_answers_from_its_cache(pair, monkeypatch):
    """Why libp2p's `KadDHT` is not used: what it once saw it never asks for again."""
    host = pair[0].overlay.host
    validator = NamespacedValidator({"x": Anything()})
    stock = KadDHT(host, DHTMode.CLIENT, validator=validator, validator_changed=True)
    stock.value_store.put(b"/x/1", b"old")

    async def asked(key: bytes, count: int = 20) -> list[ID]:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(stock.peer_routing, "find_closest_peers_network", asked)
    assert await stock.get_value("/x/1") == b"old"
