"""The coordinator as a peer: what it says, what it hears, and that nothing depends on it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio

from lumaris_coordinator import Coordinator, Settings
from lumaris_coordinator.identity import keys
from lumaris_coordinator.peers.guest import Guest
from lumaris_coordinator.peers.rounds import WitnessRounds
from lumaris_coordinator.peers.service import OverlayPeer
from lumaris_coordinator.receipts.witnesses import highest_seen
from lumaris_node.witness import Witness
from lumaris_overlay.ports import Notice, Overlay
from lumaris_overlay.private_files import load_or_create_key, read_key
from lumaris_overlay.simulated import SimulatedOverlay, open_network
from lumaris_overlay.supervisor import OverlayConfig, run_overlay
from lumaris_protocol import codec
from lumaris_protocol.errors import LumarisError, RemoteError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.messages.advert import (
    Advert,
    MembershipCertificate,
    PriceTable,
    Resources,
    Runtime,
)
from lumaris_protocol.money import TEST_CURRENCY
from lumaris_protocol.protocols import WITNESS
from tests.coordinator.builders import NETWORK, Clock, Market, Party, key_of
from tests.coordinator.conftest import open_market
from tests.coordinator.test_program import end, running


@asynccontextmanager
async def town(market: Market) -> AsyncIterator[Any]:
    """A simulated network that trusts this coordinator."""
    keys = market.coordinator.context.keys
    async with open_network(
        NETWORK,
        frozenset(map(PeerId, keys.peers())),
        now=market.clock,
        roots=frozenset({keys.list.signer}),
    ) as network:
        yield network


def guest_of(market: Market) -> Guest:
    coordinator = market.coordinator
    return Guest(
        coordinator.context,
        key_of("the coordinator's overlay"),
        shards=coordinator.shard_maps.signed,
        heard=coordinator.offers.take,
    )


def certificate(market: Market, peer: str, *, at: int) -> bytes:
    message = MembershipCertificate(
        peer=peer,
        account="acc_" + "a" * 24,
        roles=("buyer", "seller"),
        bond_band=0,
        serial=1,
        issued_at=at,
        expires_at=at + 3_600,
    )
    return codec.sign(message, market.coordinator.context.key, NETWORK).data


def advert(market: Market, party: Party, shown: bytes, *, at: int, seq: int = 1) -> bytes:
    free = Resources(cpu_millis=4_000, memory_bytes=1 << 33, disk_bytes=1 << 33)
    message = Advert(
        seller=party.peer,
        seq=seq,
        issued_at=at,
        expires_at=at + 600,
        region="eu",
        total=free,
        free=free,
        runtimes=(Runtime(tier="wasm", version="1", assurance="wasm-1"),),
        benchmarks={},
        prices=PriceTable(
            currency=TEST_CURRENCY, start_nanos=1, cpu_core_s_nanos=1, memory_gib_s_nanos=1
        ),
        lease_s_max=7_200,
        addresses=(),
        certificate=shown,
    )
    return codec.sign(message, party.key, NETWORK).data


async def until(condition: Callable[[], Any], timeout_s: float = 15.0) -> None:
    with trio.fail_after(timeout_s):
        while not condition():
            await trio.sleep(0.01)


async def heard(
    notices: trio.MemoryReceiveChannel[Notice], kind: str, timeout_s: float = 15.0
) -> Notice:
    with trio.fail_after(timeout_s):
        while True:
            notice = await notices.receive()
            if notice.kind == kind:
                return notice


async def revoke(market: Market, peer: str) -> None:
    """As an operator does."""
    held = market.coordinator.revocations
    await market.coordinator.store.submit(
        lambda connection: held.revoke(connection, [(peer, 0)], reason="test")
    )
    await held.publish()


async def test_adverts_are_offers_until_their_seller_is_revoked(market: Market):
    seller = await market.party("seller")
    guest = guest_of(market)
    market.coordinator.context.notices.listen(guest.say)
    async with town(market) as network, trio.open_nursery() as nursery:
        host, ours = network.host(seller.key), network.host(key_of("the coordinator's overlay"))
        await ours.connect([host.address])
        nursery.start_soon(guest.attend, ours)
        shown = certificate(market, seller.peer, at=market.now)
        await host.publish_advert(advert(market, seller, shown, at=market.now))
        await until(lambda: len(market.coordinator.offers) == 1)
        answer = (await market.client.get("/v1/offers")).json()
        assert [offer["seller"] for offer in answer["offers"]] == [seller.peer]
        await revoke(market, seller.peer)
        await until(lambda: len(market.coordinator.offers) == 0)
        assert (await market.client.get("/v1/offers")).json()["offers"] == []
        nursery.cancel_scope.cancel()


async def test_what_was_said_before_there_was_an_overlay_is_said_then(market: Market):
    guest, other = guest_of(market), key_of("other")
    peer = await market.party("peer")
    guest.say(market.coordinator.context.keys.list.data)
    await revoke(market, peer.peer)
    guest.say(await market.coordinator.revocations.newest())
    async with town(market) as network, trio.open_nursery() as nursery:
        host, ours = network.host(other), network.host(key_of("the coordinator's overlay"))
        await ours.connect([host.address])
        async with host.notices() as notices:
            nursery.start_soon(guest.attend, ours)
            await heard(notices, "key_list")
            await heard(notices, "revocations")
        nursery.cancel_scope.cancel()


async def test_the_certificate_shown_is_ours_and_no_sellers(market: Market):
    guest, shown = guest_of(market), []
    async with town(market) as network:
        ours = network.host(key_of("the coordinator's overlay"))
        present = ours.present

        async def spy(data: bytes) -> None:
            shown.append(data)
            await present(data)

        ours.present = spy
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.attend, ours)
            await until(lambda: shown)
            nursery.cancel_scope.cancel()
    found = codec.open_signed(shown[0], MembershipCertificate, network=NETWORK, signer=market.peer)
    assert found.message.roles == ("buyer",)


class _InThread:
    """A simulated overlay made in the thread that opens it, with another host beside it."""

    def __init__(self, market: Market, *, failures: int = 0) -> None:
        self._market, self.failures = market, failures
        self.opened = 0
        self.other: SimulatedOverlay | None = None

    @asynccontextmanager
    async def open(self, config: OverlayConfig) -> AsyncIterator[Overlay]:
        self.opened += 1
        if self.opened <= self.failures:
            raise LumarisError("overlay_failed", "Not this time.")
        async with town(self._market) as network:
            ours = network.host(load_or_create_key(config.key_file))
            self.other = network.host(key_of("other"))
            await ours.connect([self.other.address])
            yield ours


def peer_of(market: Market, opener: _InThread) -> OverlayPeer:
    coordinator = market.coordinator

    async def current() -> list[bytes]:
        return [coordinator.context.keys.list.data]

    return OverlayPeer(
        coordinator.context,
        shards=coordinator.shard_maps.signed,
        heard=coordinator.offers.take,
        alive=coordinator.offers.heard,
        bootstrap=coordinator.identity.bootstrap,
        current=current,
        open_overlay=opener.open,
    )


async def test_the_thread_answers_calls_and_ends_with_its_task(market: Market):
    opener = _InThread(market)
    peer = peer_of(market, opener)
    with pytest.raises(LumarisError) as caught:
        await peer.call(_count_peers)
    assert caught.value.code == "overlay_failed"
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(peer.run)
        await until(lambda: peer.connected)
        assert await peer.call(_count_peers) == 1
        with pytest.raises(RemoteError):
            await peer.call(_open_nothing)
        await until(lambda: market.coordinator.offers._heard_at == market.now)
        tasks.cancel_scope.cancel()
    assert "lumaris-overlay" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(LumarisError) as caught:
        await peer.call(_count_peers)
    assert caught.value.code == "overlay_failed"


async def test_an_overlay_that_fails_is_tried_again(
    market: Market, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lumaris_coordinator.peers.service.OVERLAY_RETRY_S_MIN", 0.01)
    opener = _InThread(market, failures=3)
    peer = peer_of(market, opener)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(peer.run)
        await until(lambda: peer.connected)
        assert opener.opened == 4
        assert (await market.client.get("/v1/info")).status_code == 200
        tasks.cancel_scope.cancel()


async def test_a_new_head_is_cosigned_by_connected_peers_and_told(market: Market, tmp_path: Path):
    seller, buyer = await market.party("seller"), await market.party("buyer", 100_000_000)
    deal = market.deal(buyer, seller)
    grant = await market.grant(deal)
    answer = await market.settle(deal.claim(seller, grant, 1_000, closed=True))
    assert answer.status_code == 200, answer.text
    coordinator, told = market.coordinator, list[bytes]()
    coordinator.context.notices.listen(told.append)
    async with town(market) as network:
        host, ours = network.host(seller.key), network.host(key_of("the coordinator's overlay"))
        await ours.connect([host.address])

        async def call(work: Callable[[Overlay], Awaitable[Any]]) -> Any:
            return await work(ours)

        witness = Witness(
            seller.key,
            network=NETWORK,
            folder=tmp_path,
            coordinators=lambda: frozenset({market.peer}),
            clock=market.clock,
        )
        rounds = WitnessRounds(coordinator.context, coordinator.witnesses, call)
        async with host.serve(WITNESS, witness.serve):
            gathered = await rounds.round()
            assert (gathered.cosigned, gathered.refused) == ([seller.peer], {})
            assert not (await rounds.round()).cosigned  # nothing new
            await rounds.check_start()
            # The store of yesterday: the witness remembers more than it holds.
            async with open_market(tmp_path / "old", clock=market.clock) as old:
                forgotten = WitnessRounds(coordinator.context, old.coordinator.witnesses, call)
                old.coordinator.witnesses._log = coordinator.log
                old.coordinator.settings.__dict__["witnesses"] = (seller.peer,)
                with pytest.raises(LumarisError) as caught:
                    await forgotten.check_start()
            assert caught.value.code == "log_behind"
        assert len(told) == 1
        async with host.notices() as notices:
            await ours.publish_notice(told[0])
            await heard(notices, "checkpoint_notice")


async def test_the_head_is_cosigned_again_under_a_key_that_replaces_a_revoked_one(
    market: Market, tmp_path: Path
):
    seller, buyer = await market.party("seller"), await market.party("buyer", 100_000_000)
    deal = market.deal(buyer, seller)
    grant = await market.grant(deal)
    assert (await market.settle(deal.claim(seller, grant, 9, closed=True))).status_code == 200
    coordinator = market.coordinator
    async with town(market) as network:
        host, ours = network.host(seller.key), network.host(key_of("the coordinator's overlay"))
        await ours.connect([host.address])

        async def call(work: Callable[[Overlay], Awaitable[Any]]) -> Any:
            return await work(ours)

        witness = Witness(
            seller.key,
            network=NETWORK,
            folder=tmp_path,
            coordinators=lambda: frozenset(coordinator.context.keys.peers()),
            clock=market.clock,
        )
        rounds = WitnessRounds(coordinator.context, coordinator.witnesses, call)
        async with host.serve(WITNESS, witness.serve):
            assert (await rounds.round()).cosigned == [seller.peer]
            state, old = coordinator.settings.state, market.peer
            root = read_key(state / keys.FOLDER / keys.ROOT_KEY)
            keys.rotate(state, root, network=NETWORK, now=market.now, after_s=0)
            keys.revoke(state, root, old, network=NETWORK, now=market.now)
            await coordinator.run_chores()
            gathered = await rounds.round()
            assert (gathered.cosigned, gathered.refused) == ([seller.peer], {})
            found = await highest_seen(
                ours.open_stream, [seller.peer], await coordinator.witnesses.memory()
            )
            assert found.answered == 1


async def _count_peers(overlay: Overlay) -> int:
    return len(await overlay.peers())


async def _open_nothing(overlay: Overlay) -> None:
    await overlay.open_stream(key_of("nobody").peer_id, "/nothing/1")


# --- with real processes ---


@asynccontextmanager
async def seller_overlay(market: Market, folder: Path, name: str) -> AsyncIterator[Overlay]:
    """A registered seller's overlay process."""
    party = Party(name)
    await market.register(party)
    folder.mkdir(mode=0o700)
    (folder / "key").write_text(party.key.seed.hex())
    (folder / "key").chmod(0o600)
    keys = market.coordinator.context.keys
    config = OverlayConfig(
        key_file=folder / "key",
        network=NETWORK,
        coordinator_keys=frozenset(map(PeerId, keys.peers())),
        state_dir=folder / "overlay",
        roots=frozenset({keys.list.signer}),
    )
    async with run_overlay(config) as overlay:
        await overlay.present(certificate(market, party.peer, at=int(time.time())))
        await market.register(party, addresses=(await overlay.reachability()).addresses)
        yield overlay


@pytest.mark.planet
@pytest.mark.slow
async def test_a_revocation_reaches_running_nodes_and_the_peer_is_refused(tmp_path: Path):
    clock = Clock(time.time())
    async with (
        open_market(tmp_path / "state", clock=clock, overlay=True) as market,
        seller_overlay(market, tmp_path / "good", "good") as good,
        seller_overlay(market, tmp_path / "bad", "bad") as bad,
    ):
        await good.connect((await bad.reachability()).addresses)
        coordinator, revoked = market.coordinator, Party("bad")
        now = int(time.time())
        shown = certificate(market, revoked.peer, at=now)
        await bad.publish_advert(advert(market, revoked, shown, at=now))
        await until(lambda: len(coordinator.offers) == 1, 30.0)
        async with good.notices() as notices:
            await heard(notices, "key_list")
            clock.now = time.time() + 1  # later than the certificates
            began = trio.current_time()
            await revoke(market, revoked.peer)
            await heard(notices, "revocations", 5.0)
            assert trio.current_time() - began < 5
        await until(lambda: len(coordinator.offers) == 0, 5.0)
        await _left(good, revoked.peer)
        with pytest.raises(RemoteError):
            await good.open_stream(revoked.peer, "/lumaris/hello/1")
        # The dialler sees its connection up for a moment, until the other side has looked at it.
        await bad.connect((await good.reachability()).addresses)
        await _left(bad, good.peer_id)
        assert revoked.peer not in [info.peer for info in await good.peers()]


@pytest.mark.planet
@pytest.mark.slow
async def test_the_market_goes_on_when_the_overlay_process_is_killed(tmp_path: Path):
    state = tmp_path / "state"
    async with open_market(state, clock=Clock(time.time()), overlay=True) as market:
        overlay = market.coordinator.overlay
        assert overlay is not None
        await until(lambda: overlay.connected, 30.0)
        before = _holder(state)
        os.kill(before, signal.SIGKILL)
        seller, buyer = await market.party("seller"), await market.party("buyer", 100_000_000)
        deal = market.deal(buyer, seller)
        grant = await market.grant(deal)
        assert (await market.settle(deal.claim(seller, grant, 9, closed=True))).status_code == 200
        assert (await market.client.get("/v1/offers")).status_code == 200
        await until(lambda: _holder(state) not in (0, before), 30.0)
        after = _holder(state)
    with pytest.raises(ProcessLookupError):
        os.kill(after, 0)


@pytest.mark.planet
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_program_leaves_no_overlay_process(tmp_path: Path, number: signal.Signals):
    state = tmp_path / "state"
    async with running(state, "--overlay") as program:
        await until(lambda: _holder(state), 30.0)
        held = _holder(state)
        assert await end(program, number) == (0 if number == signal.SIGTERM else -number)
    await until(lambda: not _runs(held), 10.0)


def test_where_it_is_to_listen_is_looked_at_first(tmp_path: Path):
    settings = Settings(state=tmp_path, overlay=True, overlay_listen="everywhere")
    with pytest.raises(LumarisError) as caught:
        Coordinator(settings)
    assert caught.value.code == "config_invalid"


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def _left(overlay: Overlay, peer: str) -> None:
    with trio.fail_after(5):
        while peer in [info.peer for info in await overlay.peers()]:
            await trio.sleep(0.02)


def _holder(state: Path) -> int:
    """The overlay process of a coordinator; 0 for none."""
    from lumaris_overlay import process_file

    facts = process_file.holder(state / "overlay")
    return facts.pid if facts is not None else 0
