"""Witnesses that lie, that forgot, or that are too many: whose word counts, and for what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lumaris_coordinator.bounds import WITNESS_PLACES
from lumaris_coordinator.receipts import witnesses
from lumaris_coordinator.receipts.witnesses import Witnesses
from lumaris_protocol import keys, merkle, notes, witnessing
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.witnessing import Submission, WitnessAsk, WitnessReply
from tests.coordinator.builders import NETWORK, Market, Party, bond_request, key_of
from tests.coordinator.conftest import open_market
from tests.coordinator.test_log import log_some
from tests.coordinator.test_log_witnesses import Scripted, add, cosign, note_of, open_streets


async def test_a_witness_without_memory_vouches_for_an_empty_log_only(tmp_path: Path) -> None:
    async with (
        open_market(tmp_path / "state", witnesses_required=0) as market,
        open_streets(market, tmp_path) as streets,
    ):
        coordinator = market.coordinator
        settings = replace(coordinator.settings, witnesses_required=1)
        context = replace(coordinator.context, settings=settings)
        coordinator.witnesses = Witnesses(context, coordinator.log)
        streets.witness("one")
        await streets.check_start("one")
        await log_some(market, 3)
        with pytest.raises(LumarisError, match="0 witnesses told"):
            await streets.check_start("one")
        await market.party("one")
        await streets.gather("one")
        await streets.check_start("one")


async def test_only_chosen_witnesses_are_counted(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"witnesses": (key_of("chosen").peer_id,)}
    async with (
        open_market(tmp_path / "state", **settings) as market,
        open_streets(market, tmp_path) as streets,
    ):
        await log_some(market, 3)
        coordinator = market.coordinator
        required = replace(coordinator.settings, witnesses_required=1)
        context = replace(coordinator.context, settings=required)
        coordinator.witnesses = Witnesses(context, coordinator.log)
        for name in ("chosen", "stranger"):
            streets.witness(name)
            await market.party(name)
        await streets.gather("stranger")
        with pytest.raises(LumarisError, match="0 witnesses told"):
            await streets.check_start("chosen", "stranger")
        await streets.gather("chosen")
        await streets.check_start("chosen", "stranger")


async def test_a_head_under_a_key_that_was_lost_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of yesterday with a store of yesterday: only a chosen witness knows better."""
    chosen, lost = key_of("one").peer_id, key_of("lost key")
    async with (
        open_market(tmp_path / "state", witnesses=(chosen,)) as market,
        open_streets(market, tmp_path) as streets,
    ):
        await log_some(market, 4)
        point = merkle.Checkpoint("lumaris.devnet/log", 9, bytes(32))
        note = cosign(merkle.sign_checkpoint(point, lost), key_of("one"), market.now)
        for name in ("one", "two"):
            answer = WitnessReply(state="latest", note=note)
            streets.serving[key_of(name).peer_id] = Scripted(answer)  # type: ignore[assignment]
        await streets.check_start("two")  # anybody may show anything
        with pytest.raises(LumarisError, match="no key of ours has signed") as caught:
            await streets.check_start("one")
        assert caught.value.code == "log_behind"
        log = market.coordinator.log
        monkeypatch.setattr(log, "_known", lambda: [lost.peer_id])
        monkeypatch.setattr(log, "_revoked", lambda: [lost.peer_id])
        await streets.check_start("one")  # whoever stole a revoked key stops nobody


async def test_a_false_line_hides_no_head(market: Market, tmp_path: Path) -> None:
    """Anybody may add a line of the coordinator's other key to what a witness is shown."""
    # It sorts first.
    others = (key_of(f"other key {number}") for number in range(100))
    other_key = next(key for key in others if key.peer_id < market.peer)
    both = frozenset({other_key.peer_id, market.peer})
    async with open_streets(market, tmp_path) as streets:
        witness = streets.witness("one")
        witness._coordinators = lambda: both
        await log_some(market, 4)
        await streets.gather("one")
        origin = notes.log_origin(NETWORK)
        named = notes.NoteKey(origin, notes.ED25519, other_key.public_key)
        junk = notes.line_of(notes.Line(origin, named.id, bytes(64)))
        head = (await note_of(market)).partition("\n— lumaris.devnet/witness")[0].rstrip() + "\n"
        submitted = Submission(4, (), head + junk)
        async with open_streets(market, tmp_path) as strangers:
            strangers.serving = streets.serving
            asks: dict[str, WitnessAsk] = {key_of("one").peer_id: cosign_ask(submitted)}
            (answer,) = (await witnesses.exchange(strangers.open_stream, asks)).values()
        assert answer.state == "cosigned"
        assert junk not in answer.note
        spoiled = cosign(head + junk, key_of("two"), market.now)
        streets.serving[key_of("two").peer_id] = Scripted(  # type: ignore[assignment]
            WitnessReply(state="latest", note=spoiled)
        )
        peers = [key_of(name).peer_id for name in ("one", "two")]
        true = keys.public_key_of(market.peer)
        for ours in ((true, other_key.public_key), (other_key.public_key, true)):
            memory = witnesses.Memory(NETWORK, ours)
            highest = await witnesses.highest_seen(streets.open_stream, peers, memory)
            assert [point.size for point in highest.heads] == [4, 4]


def cosign_ask(found: Submission) -> WitnessAsk:
    return WitnessAsk(op="cosign", body=witnessing.encode_submission(found))


async def test_many_new_names_keep_no_old_witness_out(market: Market) -> None:
    for name in ("old", "bonded"):
        await market.party(name, 10**9)
    await log_some(market, 2)
    assert await add(market, cosign(await note_of(market), key_of("old"), market.now)) == (200, "1")
    market.clock.now += 60
    await log_some(market, 2, name="later")
    note = await note_of(market)
    for number in range(WITNESS_PLACES + 2):
        await market.party(f"sybil{number}")
        kept = (await add(market, cosign(note, key_of(f"sybil{number}"), market.now)))[1]
        assert kept == ("1" if number < WITNESS_PLACES - 1 else "0")  # one place is old's
    for name in ("old", "bonded"):
        if name == "bonded":
            assert await add(market, cosign(note, key_of(name), market.now)) == (200, "0")
            locked = bond_request(Party(name), market.peer, "lock", 10**9, now=market.now)
            assert (await market.client.post("/v1/bonds", content=locked)).status_code == 200
        assert await add(market, cosign(note, key_of(name), market.now)) == (200, "1")
    assert (await market.coordinator.witnesses.known())[:2] == (
        key_of("bonded").peer_id,
        key_of("old").peer_id,
    )


async def test_lines_of_strangers_are_not_verified(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    await log_some(market, 4)
    await market.party("one")
    note = cosign(await note_of(market), key_of("one"), market.now)
    for number in range(8):
        note = cosign(note, key_of(f"stranger{number}"), market.now)
    verified: list[str] = []

    def verify(found: notes.Note, key: notes.NoteKey) -> int | None:
        verified.append(key.name.rpartition("/")[2])
        return true(found, key)

    true = notes.verify
    monkeypatch.setattr(notes, "verify", verify)
    assert await add(market, note) == (200, "1")
    assert [name for name in verified if name != "log"] == [key_of("one").peer_id]
