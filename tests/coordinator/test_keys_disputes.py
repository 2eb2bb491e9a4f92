"""A signing key is revoked while money is frozen: what follows counts, by the key list."""

from __future__ import annotations

from lumaris_coordinator.identity import keys
from lumaris_protocol import dispute_file
from tests.coordinator.builders import NETWORK, Market
from tests.coordinator.test_disputes_checks import by_peer, disputed, result_court, run_elsewhere
from tests.coordinator.test_keys import root_of, rotate

STORES = ("sqlite", "postgres")


async def test_a_ruling_after_its_key_was_revoked(market: Market) -> None:
    court = await result_court(market, checkers=1)
    dispute, old = await disputed(court), market.peer
    await court.passes(1)
    (peer,) = (await court.show(dispute))["checkers"]
    new, state = rotate(market), market.coordinator.settings.state
    market.clock.now += 60
    keys.revoke(state, root_of(state), old, network=NETWORK, now=market.now)
    await market.coordinator.run_chores()
    await court.add(dispute, court.buyer, *run_elsewhere(court, by_peer(court, peer), "b"))
    assert (await court.show(dispute))["state"] == "settled"
    data = await court.file(dispute)
    listed = market.coordinator.context.keys.list.message
    report = dispute_file.verify(data, trusted=frozenset(), listed=listed)
    assert (report.verdict, report.coordinator) == ("valid", new), report
    # Keys that are trusted apart may be two coordinators'.
    assert dispute_file.verify(data, trusted=frozenset({old, new})).verdict == "invalid"


async def test_a_ruling_from_before_is_shown_under_a_head_that_counts(market: Market) -> None:
    court = await result_court(market, checkers=1)
    dispute, old = await disputed(court), market.peer
    await court.passes(1)
    (peer,) = (await court.show(dispute))["checkers"]
    await court.add(dispute, court.buyer, *run_elsewhere(court, by_peer(court, peer), "b"))
    before = await court.file(dispute)
    rotate(market)
    state = market.coordinator.settings.state
    market.clock.now += 60
    keys.revoke(state, root_of(state), old, network=NETWORK, now=market.now)
    await market.coordinator.run_chores()
    listed = market.coordinator.context.keys.list.message
    verdicts = [
        dispute_file.verify(data, trusted=frozenset(), listed=listed).verdict
        for data in (before, await court.file(dispute))
    ]
    # The old head could as well be a thief's, who dates back.
    assert verdicts == ["unknown", "valid"]
