"""The log and its witnesses: real nodes' witnesses over streams in memory."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import trio

from lumaris_coordinator import Settings
from lumaris_coordinator.bounds import WITNESS_PLACES
from lumaris_coordinator.receipts import witnesses
from lumaris_coordinator.receipts.witnesses import Gathered, Witnesses
from lumaris_node.witness import FILE_NAME, Witness
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.simulated.stream import stream_pair
from lumaris_protocol import codec, keys, log_policy, merkle, notes, receipts
from lumaris_protocol.coordinator_api import Request
from lumaris_protocol.errors import LumarisError, RemoteError
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import KeyPair, PeerId
from lumaris_protocol.messages.notice import CheckpointNotice
from lumaris_protocol.protocols import WITNESS
from lumaris_protocol.witnessing import Record, WitnessAsk, WitnessReply
from tests import independent_log as other
from tests.coordinator.builders import NETWORK, Clock, Market, key_of
from tests.coordinator.conftest import open_market
from tests.coordinator.test_log import log_some

T = TypeVar("T")


class Streets:
    """Witnesses by peer id, reached over streams in memory."""

    def __init__(self, market: Market, nursery: trio.Nursery, folder: Path) -> None:
        self.market, self.nursery, self.folder = market, nursery, folder
        self.serving: dict[str, Witness] = {}
        self.opened = 0

    def witness(self, name: str, *, coordinator: str = "") -> Witness:
        """A node that witnesses; its memory is on disk."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        found = Witness(
            key_of(name),
            network=NETWORK,
            folder=folder,
            coordinators=lambda: frozenset({coordinator or self.market.peer}),
            clock=self.market.clock,
        )
        self.serving[key_of(name).peer_id] = found
        return found

    async def open_stream(self, peer: str, protocol: str) -> OverlayStream:
        self.opened += 1
        assert protocol == WITNESS
        if peer not in self.serving:
            raise RemoteError("unreachable")
        ours, theirs = stream_pair(PeerId(self.market.peer), PeerId(peer), protocol)
        self.nursery.start_soon(self.serving[peer].serve, theirs)
        return ours

    async def gather(self, *names: str) -> Gathered:
        peers = [key_of(name).peer_id for name in names]
        return await self.market.coordinator.witnesses.gather(self.open_stream, peers)

    async def check_start(self, *names: str) -> None:
        coordinator = self.market.coordinator
        highest = await witnesses.highest_seen(
            self.open_stream,
            [key_of(name).peer_id for name in names],
            await coordinator.witnesses.memory(),
        )
        await coordinator.witnesses.require_current(highest)


@asynccontextmanager
async def open_streets(market: Market, folder: Path) -> AsyncIterator[Streets]:
    async with trio.open_nursery() as nursery:
        yield Streets(market, nursery, folder)
        nursery.cancel_scope.cancel()


class HttpLink:
    """A node's line to the coordinator."""

    def __init__(self, market: Market) -> None:
        self.market = market

    async def call(self, request: Request[T]) -> T:
        answer = await self.market.client.request(
            request.method, request.path, content=request.body, headers=request.headers
        )
        return request.read(answer.status_code, answer.content)


async def note_of(market: Market) -> str:
    return (await market.client.get("/log/checkpoint")).text


async def test_nodes_cosign_what_grows(market: Market, tmp_path: Path) -> None:
    for name in ("one", "two"):
        await market.party(name)
    async with open_streets(market, tmp_path) as streets:
        for name in ("one", "two"):
            streets.witness(name)
        peers = {key_of(name).peer_id for name in ("one", "two")}
        for count in (3, 5):
            await log_some(market, count, name=f"of {count}")
            gathered = await streets.gather("one", "two", "absent")
            assert set(gathered.cosigned) == peers
            assert gathered.refused == {key_of("absent").peer_id: "unreachable"}
            note = await note_of(market)
            assert other.cosigners(note, NETWORK) == dict.fromkeys(peers, market.now)
            assert merkle.open_checkpoint(note, keys.public_key_of(market.peer)).size in (3, 8)
        # From the second round on the log knows where each witness is: one stream is enough.
        before = streets.opened
        await log_some(market, 1, name="last")
        await streets.gather("one", "two")
        assert streets.opened == before + 2


async def test_a_witness_that_is_further_than_we_thought_is_asked_again(
    market: Market, tmp_path: Path
) -> None:
    """It cosigned, and the answer was lost."""
    await market.party("one")
    async with open_streets(market, tmp_path) as streets:
        streets.witness("one")
        await log_some(market, 4)
        peer = key_of("one").peer_id
        asks = await market.coordinator.witnesses.ask([peer])
        await witnesses.exchange(streets.open_stream, asks)
        await log_some(market, 4, name="more")
        assert (await streets.gather("one")).cosigned == [peer]
        assert list(other.cosigners(await note_of(market), NETWORK)) == [peer]


async def test_a_witness_that_lost_its_memory_starts_anew(market: Market, tmp_path: Path) -> None:
    await market.party("one")
    async with open_streets(market, tmp_path) as streets:
        streets.witness("one")
        await log_some(market, 4)
        await streets.gather("one")
        (tmp_path / "one" / FILE_NAME).unlink()
        streets.witness("one")
        await log_some(market, 4, name="more")
        assert (await streets.gather("one")).cosigned == [key_of("one").peer_id]


async def test_a_receipt_comes_with_the_best_cosigned_head(market: Market, tmp_path: Path) -> None:
    buyer, seller = await market.party("buyer", 1_000_000), await market.party("seller")
    deal = market.deal(buyer, seller, cap=1_000)
    first = (await market.settle(deal.claim(seller, await market.grant(deal), 7))).content
    assert "witness" not in receipts.decode_bundle(first).checkpoint
    names = ("w1", "w2", "w3")
    for name in names:
        await market.party(name)
    async with open_streets(market, tmp_path) as streets:
        for name in names:
            streets.witness(name)
        await log_some(market, 3)
        await streets.gather(*names)
        await log_some(market, 3, name="more")
        await streets.gather("w1")
    report = receipts.verify_bundle(first, trusted=frozenset({market.peer}))
    assert report.receipt is not None
    headers = market.bearer(buyer)
    answer = await market.client.get(f"/v1/receipts/{report.receipt.receipt}", headers=headers)
    receipt, cosigned = other.check_file(answer.content, coordinator=market.peer)
    assert receipt["receipt"] == report.receipt.receipt
    assert set(cosigned) == {key_of(name).peer_id for name in names}
    policy = policy_of(market.peer, names, "group most 2 w1 w2 w3\nquorum most")
    assert verdict(answer.content, policy) == "valid"
    assert verdict(first, policy) == "unknown"
    strict = policy_of(market.peer, (*names, "w4"), "group all all w1 w2 w3 w4\nquorum all")
    assert verdict(answer.content, strict) == "unknown"
    spoiled = answer.content.replace(b"witness/12D3KooW", b"witness/12D3KooX")
    assert verdict(spoiled, policy) in ("unknown", "invalid")


def policy_of(coordinator: str, names: tuple[str, ...], rules: str) -> log_policy.LogPolicy:
    log = notes.log_key(NETWORK, keys.public_key_of(coordinator)).vkey
    lines = "".join(
        f"witness {name} {notes.witness_key(NETWORK, key_of(name).peer_id).vkey}\n"
        for name in names
    )
    return log_policy.parse(f"log {log}\n{lines}{rules}\n".encode())


def verdict(data: bytes, policy: log_policy.LogPolicy) -> str:
    return receipts.verify_bundle(data, trusted=frozenset(), policy=policy).verdict


async def test_a_lying_coordinator_is_caught_by_its_witnesses(tmp_path: Path) -> None:
    """It shows one history to some and another to others: two databases under one key."""
    clock = Clock()
    async with open_market(tmp_path / "true", clock=clock) as honest:
        await honest.party("one")
        async with open_streets(honest, tmp_path / "nodes") as streets:
            witness, second = streets.witness("one"), streets.witness("two")
            await log_some(honest, 6)
            await streets.gather("one")
            lie = tmp_path / "lie"
            lie.mkdir(mode=0o700)
            shutil.copy2(tmp_path / "true" / "coordinator.key", lie / "coordinator.key")
            async with open_market(lie, clock=clock) as liar:
                await log_some(liar, 6, name="another past")
                streets.market = liar
                gathered = await streets.gather("one", "two")
                # Who saw the other history does not sign; who did not, cannot know.
                assert gathered.cosigned == [key_of("two").peer_id]
                assert gathered.refused[key_of("one").peer_id] == "log_behind"
                assert witness.status()["forks"] == 1
                # As soon as the two compare what they saw, both know.
                assert second.status()["forks"] == 0
                notice = await honest.coordinator.witnesses.notice()
                second.observe_notice(notice)
                assert second.status()["forks"] == 1
                assert liar.coordinator.witnesses.behind
            record = msgspec.json.decode(
                (tmp_path / "nodes" / "two" / FILE_NAME).read_bytes(), type=Record
            )
            (found,) = record.evidence
            public = keys.public_key_of(honest.peer)
            heads = [
                other.open_head(note, "lumaris.devnet/log", public)
                for note in (found.first, found.second)
            ]
            assert heads[0][0] == heads[1][0] == 6
            assert heads[0][1] != heads[1][1]


async def test_a_restored_older_log_does_not_start(tmp_path: Path) -> None:
    clock, state = Clock(), tmp_path / "state"
    async with open_market(state, clock=clock) as market:
        await market.party("one")
        await log_some(market, 4)
    shutil.copytree(state, tmp_path / "backup")
    async with (
        open_market(state, clock=clock) as market,
        open_streets(market, tmp_path / "nodes") as streets,
    ):
        streets.witness("one")
        await log_some(market, 3, name="later")
        await streets.gather("one")
        await streets.check_start("one")
    async with (
        open_market(tmp_path / "backup", clock=clock) as market,
        open_streets(market, tmp_path / "nodes") as streets,
    ):
        streets.witness("one")
        with pytest.raises(LumarisError, match="7 leaves of this log; there are 4"):
            await streets.check_start("one", "absent")
        # It went on alone, past that size, with another content: still seen.
        await log_some(market, 9, name="other")
        with pytest.raises(LumarisError, match="other leaves among the first 7"):
            await streets.check_start("one")


async def test_a_start_without_witnesses(tmp_path: Path) -> None:
    async with (
        open_market(tmp_path / "state") as market,
        open_streets(market, tmp_path) as streets,
    ):
        await streets.check_start("absent")
        await streets.check_start()
        coordinator = market.coordinator
        settings = replace(coordinator.settings, witnesses_required=1)
        context = replace(coordinator.context, settings=settings)
        coordinator.witnesses = Witnesses(context, coordinator.log)
        with pytest.raises(LumarisError, match="0 witnesses told of a head of this log, 1 are"):
            await streets.check_start("absent")
        streets.witness("one")
        await streets.check_start("one", "absent")


class Scripted:
    """A witness that answers what it is told to, or nothing."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)

    async def serve(self, stream: OverlayStream) -> None:
        framed = FramedStream(stream)
        await framed.expect_header(WitnessAsk)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            await stream.reset()
        elif isinstance(answer, bytes):
            await framed.send(Kind.HEADER, answer)
        else:
            await framed.send(Kind.HEADER, msgspec.json.encode(answer))


async def test_hostile_witnesses_get_nowhere(market: Market, tmp_path: Path) -> None:
    await market.party("one")
    await log_some(market, 4)
    note, liar = await note_of(market), key_of("one")
    forged = merkle.sign_checkpoint(merkle.Checkpoint("lumaris.devnet/log", 9, bytes(32)), liar)
    ours = notes.witness_key(NETWORK, liar.peer_id)
    bad = note + notes.line_of(notes.Line(ours.name, ours.id, bytes(72)))
    future = cosign(note, liar, market.now + 86_400)
    elsewhere = cosign(note, key_of("two"), market.now)
    async with open_streets(market, tmp_path) as streets:
        for answer, reason in (
            (WitnessReply(state="cosigned", note=note), "bad_signature"),
            (WitnessReply(state="cosigned", note=bad), "bad_signature"),
            (WitnessReply(state="cosigned", note=future), "not_yet_valid"),
            (WitnessReply(state="cosigned", note=elsewhere), "bad_signature"),
            (WitnessReply(state="cosigned", note="x"), "malformed"),
            (WitnessReply(state="elsewhere", note=forged), "bad_signature"),
            (WitnessReply(state="elsewhere", note=note), "elsewhere"),
            (WitnessReply(state="elsewhere"), "elsewhere"),
            (WitnessReply(state="inconsistent", note=note), "log_behind"),
            (WitnessReply(state="inconsistent"), "malformed"),
            (WitnessReply(state="latest"), "malformed"),
            (b"{}", "malformed"),
            (None, "unreachable"),
        ):
            streets.serving[liar.peer_id] = Scripted(answer)  # type: ignore[assignment]
            gathered = await streets.gather("one")
            assert (gathered.cosigned, list(gathered.refused.values())) == ([], [reason]), answer
            await streets.check_start("one")
    assert market.coordinator.witnesses.behind == ""
    assert other.cosigners(await note_of(market), NETWORK) == {}


async def test_a_silent_witness_holds_up_nobody(
    market: Market, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent:
        async def serve(self, _stream: OverlayStream) -> None:
            await trio.sleep_forever()

    await market.party("one")
    await log_some(market, 4)
    async with open_streets(market, tmp_path) as streets:
        streets.serving[key_of("two").peer_id] = Silent()  # type: ignore[assignment]
        with monkeypatch.context() as patched:
            patched.setattr(witnesses, "WITNESS_EXCHANGE_S", 0.01)
            gathered = await streets.gather("two")
        assert (gathered.cosigned, gathered.refused) == ([], {key_of("two").peer_id: "timeout"})
        streets.witness("one")
        assert (await streets.gather("one")).cosigned == [key_of("one").peer_id]


# --- over HTTP ---


async def test_a_node_witnesses_without_the_overlay(market: Market, tmp_path: Path) -> None:
    await market.party("one")
    link = HttpLink(market)
    async with open_streets(market, tmp_path) as streets:
        witness = streets.witness("one")
        await witness.fetch(link)  # an empty log: nothing to sign
        assert witness.status()["log_size"] == 0
        for size in (3, 6, 6):
            await log_some(market, size)
            await witness.fetch(link)
            assert witness.status() == {
                "log_size": size,
                "forks": 0,
                "unproven": 0,
                "readable": True,
            }
            assert list(other.cosigners(await note_of(market), NETWORK)) == [key_of("one").peer_id]
        # Its memory outlives it.
        assert streets.witness("one").status()["log_size"] == 6


async def test_a_shrunken_log_is_told_by_the_node_that_fetches(tmp_path: Path) -> None:
    clock, state = Clock(), tmp_path / "state"
    async with open_market(state, clock=clock) as market:
        await market.party("one")
        await log_some(market, 4)
    shutil.copytree(state, tmp_path / "backup")
    async with open_market(state, clock=clock) as market:
        await log_some(market, 3, name="later")
        async with open_streets(market, tmp_path / "nodes") as streets:
            await streets.witness("one").fetch(HttpLink(market))
    async with (
        open_market(tmp_path / "backup", clock=clock) as market,
        open_streets(market, tmp_path / "nodes") as streets,
    ):
        witness = streets.witness("one")
        with pytest.raises(LumarisError, match="7 leaves of this log"):
            await witness.fetch(HttpLink(market))
        assert market.coordinator.witnesses.behind
        assert witness.status()["log_size"] == 7
        # It grew again, to another history: no proof can be made, and that is kept.
        await log_some(market, 5, name="other")
        with pytest.raises(LumarisError):
            await witness.fetch(HttpLink(market))
        assert witness.status()["unproven"] == 1


async def add(market: Market, note: str | bytes) -> tuple[int, str]:
    body = note if isinstance(note, bytes) else note.encode()
    answer = await market.client.post("/log/add-cosignature", content=body)
    found = answer.json()
    return answer.status_code, str(found.get("code", found.get("kept")))


def cosign(note: str, key: KeyPair, now: int) -> str:
    text = note.rpartition("\n\n")[0] + "\n"
    name = notes.witness_key(NETWORK, key.peer_id).name
    return note + notes.cosign(text, key, name=name, now=now)


async def test_cosignatures_by_post(market: Market) -> None:
    await log_some(market, 4)
    note, now = await note_of(market), market.now
    await market.party("one")
    point = merkle.Checkpoint("lumaris.devnet/log", 9, bytes(32))
    key = market.coordinator.context.key
    assert await add(market, note) == (400, "bad_signature")
    assert await add(market, cosign(note, key_of("stranger"), now)) == (200, "0")
    assert await add(market, cosign(note, key_of("one"), now)) == (200, "1")
    assert await add(market, cosign(note, key_of("one"), now + 5)) == (200, "1")
    assert await add(market, cosign(note, key_of("one"), now + 1_000)) == (400, "not_yet_valid")
    assert other.cosigners(await note_of(market), NETWORK) == {key_of("one").peer_id: now}
    for bad in (b"", b"\xff", b"x\n\n", note.replace("4", "5", 1).encode(), b"x" * 40_000):
        assert (await add(market, bad))[0] in (400, 413)
    forged = merkle.sign_checkpoint(point, key_of("one"))
    assert await add(market, cosign(forged, key_of("one"), now)) == (400, "bad_signature")
    assert market.coordinator.witnesses.behind == ""
    ahead = merkle.sign_checkpoint(point, key)
    assert (await market.client.get("/readyz")).status_code == 200
    assert await add(market, cosign(ahead, key_of("one"), now)) == (409, "log_behind")
    assert market.coordinator.witnesses.behind
    assert (await market.client.get("/readyz")).status_code == 503


async def test_a_revoked_key_accuses_nobody(
    market: Market, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who stole a key that was revoked since cannot stop the coordinator with it."""
    await log_some(market, 4)
    await market.party("one")
    thief, log = key_of("thief"), market.coordinator.log
    point = merkle.Checkpoint("lumaris.devnet/log", 9, bytes(32))
    stolen = merkle.sign_checkpoint(point, thief)
    monkeypatch.setattr(log, "_known", lambda: [thief.peer_id])
    monkeypatch.setattr(log, "_revoked", lambda: [thief.peer_id])
    assert await add(market, cosign(stolen, key_of("one"), market.now)) == (400, "bad_signature")
    async with open_streets(market, tmp_path) as streets:
        answer = WitnessReply(state="elsewhere", note=stolen)
        streets.serving[key_of("one").peer_id] = Scripted(answer)  # type: ignore[assignment]
        gathered = await streets.gather("one")
    assert gathered.refused == {key_of("one").peer_id: "bad_signature"}
    assert market.coordinator.witnesses.behind == ""
    monkeypatch.setattr(log, "_revoked", list)
    assert await add(market, cosign(stolen, key_of("one"), market.now)) == (409, "log_behind")


async def test_a_head_that_was_never_published_is_not_cosigned(market: Market) -> None:
    await log_some(market, 4)
    coordinator = market.coordinator
    root = await coordinator.store.read(partial(coordinator.log.proofs.root, size=2))
    point = merkle.Checkpoint("lumaris.devnet/log", 2, root)
    note = merkle.sign_checkpoint(point, coordinator.context.key)
    await market.party("one")
    assert await add(market, cosign(note, key_of("one"), market.now)) == (404, "not_found")


async def test_places_are_bounded_and_chosen_witnesses_have_theirs(tmp_path: Path) -> None:
    chosen = key_of("chosen").peer_id
    async with open_market(tmp_path / "state", witnesses=(chosen,)) as market:
        await log_some(market, 4)
        note = await note_of(market)
        for number in range(WITNESS_PLACES + 2):
            await market.party(f"w{number}")
            kept = (await add(market, cosign(note, key_of(f"w{number}"), market.now)))[1]
            assert kept == ("1" if number < WITNESS_PLACES else "0")
        # Chosen by the operator: no need to be a member, nor to be early.
        assert await add(market, cosign(note, key_of("chosen"), market.now)) == (200, "1")
        full = await note_of(market)
        assert len(other.cosigners(full, NETWORK)) == WITNESS_PLACES + 1
        assert (await market.coordinator.witnesses.known())[0] == chosen
        policy = policy_of(market.peer, ("chosen",), "quorum chosen")
        assert log_policy.check(policy, full).enough


async def test_a_revoked_peer_witnesses_no_more(market: Market) -> None:
    await log_some(market, 4)
    await market.party("one")
    await market.coordinator.store.submit(
        lambda connection: (
            connection.execute(
                "UPDATE peer SET revoked_at = 1 WHERE peer = ?", (key_of("one").peer_id,)
            ).rowcount
        )
    )
    note = cosign(await note_of(market), key_of("one"), market.now)
    assert await add(market, note) == (200, "0")


async def test_the_notice_carries_the_cosigned_head(market: Market) -> None:
    await log_some(market, 4)
    await market.party("one")
    await add(market, cosign(await note_of(market), key_of("one"), market.now))
    data = await market.coordinator.witnesses.notice()
    message = codec.open_signed(data, CheckpointNotice, network=NETWORK, signer=market.peer).message
    assert message.checkpoint == await note_of(market)
    assert (message.seq, message.issued_at) == (market.now, market.now)


@pytest.mark.parametrize("settings", [{"witnesses": ("x",)}, {"witnesses_required": -1}])
def test_settings(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(LumarisError, match="witnesses"):
        Settings(state=tmp_path, **settings)  # type: ignore[arg-type]
