"""Results run again by a drawn checker or by replicas, time, other tenants, and the file."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as changed

from lumaris_coordinator.upkeep.check import check
from lumaris_protocol import agreements, dispute_file
from lumaris_protocol.limits import CHECKERS_MAX, DISPUTE_BOND_NANOS_MIN
from tests.coordinator.builders import NETWORK, Clock, Market, Party
from tests.coordinator.conftest import open_market
from tests.coordinator.court import (
    HOUR,
    PRICE,
    Court,
    bond_of,
    code,
    court_of,
    lock_bond,
)
from tests.dispute_builders import Work


async def result_court(market: Market, *, checkers: int = 0, **changes: Any) -> Court:
    """A settled session whose order 1 was paid for, and sellers with bonds."""
    court = await court_of(market, **changes)
    await court.claimed(PRICE)
    for number in range(checkers):
        seller = await market.party(f"checker {number}", 5_000_000)
        await lock_bond(market, seller, 1_000_000 * (number + 1))
    return court


async def disputed(court: Court, **changes: Any) -> str:
    shown = (court.work.order(), court.work.delivery(output="a"))
    fields: dict[str, Any] = {"order": 1, "evidence": shown, "amount": PRICE} | changes
    return await court.opened(court.buyer, "wrong_result", **fields)


def run_elsewhere(court: Court, seller: Party, output: str) -> tuple[bytes, ...]:
    """The buyer has the same order run by another seller: its agreement, order and delivery."""
    deal = court.market.deal(court.buyer, seller)
    copies = [deal.signed_by(party) for party in (court.buyer, seller)]
    contract = agreements.join(*copies, network=NETWORK)
    work = Work(contract, court.buyer.session_key, seller.session_key, NETWORK)
    return (*work.agreements, work.order(), work.delivery(output=output))


def by_peer(court: Court, peer: str) -> Party:
    return next(Party(name) for name in court.market.tokens if Party(name).peer == peer)


@pytest.mark.parametrize(("output", "rule"), [("b", "result_differs"), ("a", "result_equal")])
async def test_a_drawn_checker_settles_a_result(market: Market, output: str, rule: str) -> None:
    court = await result_court(market, checkers=3)
    dispute = await disputed(court)
    await court.passes(1)  # the opening stands in a signed head now
    found = await court.show(dispute)
    assert found["state"] == "checking"
    (peer,) = found["checkers"]
    assert peer not in (court.buyer.peer, court.seller.peer)
    shown = run_elsewhere(court, by_peer(court, peer), output)
    answer = await court.add(dispute, court.buyer, *shown)
    assert answer.json()["state"] == "settled"
    ruling = await court.settles(dispute)
    assert ruling["rule"] == rule
    assert ruling["refund_nanos"] == (PRICE if output == "b" else 0)


async def test_who_was_not_drawn_settles_nothing(market: Market) -> None:
    court = await result_court(market, checkers=2)
    dispute = await disputed(court)
    await court.passes(1)
    (peer,) = (await court.show(dispute))["checkers"]
    other = next(
        Party(name)
        for name in market.tokens
        if name.startswith("checker") and Party(name).peer != peer
    )
    answer = await court.add(dispute, court.buyer, *run_elsewhere(court, other, "b"))
    assert code(answer) == "evidence_foreign"


@pytest.mark.slow
async def test_a_silent_checker_is_replaced_until_none_is_left(market: Market) -> None:
    court = await result_court(market, checkers=CHECKERS_MAX + 1)
    dispute = await disputed(court)
    before = await court.money()
    for round_ in range(CHECKERS_MAX):
        await court.passes(24 * HOUR + 1)  # the next list is logged
        await court.passes(1)  # and drawn from
        drawn = (await court.show(dispute))["checkers"]
        assert len(drawn) == len(set(drawn)) == round_ + 1
    await court.passes(24 * HOUR + 1)
    ruling = await court.settles(dispute)
    assert (ruling["fault"], ruling["rule"]) == ("neither", "check_missing")
    buyer, seller, bond = await court.money()
    # Nobody knows, and the other side's money was held: the least bond is its price.
    assert (buyer, seller) == (before[0], before[1] + DISPUTE_BOND_NANOS_MIN // 2)
    assert bond == before[2] + 2 * PRICE  # all that was staked came back


async def test_nobody_to_check(market: Market) -> None:
    court = await result_court(market)
    dispute = await disputed(court)
    await court.passes(72 * HOUR)
    assert (await court.show(dispute))["state"] == "opened"
    await court.passes(1)
    assert (await court.settles(dispute))["rule"] == "no_checker"


async def test_a_party_and_its_owners_peers_are_never_drawn(market: Market) -> None:
    court = await result_court(market, checkers=2)
    owner = "usr_" + "a" * 24

    def link(connection: Any) -> None:
        connection.execute(
            "INSERT INTO users (id, number, name, password, operator, created_at)"
            " VALUES (?, 99, 'owner', '', 0, 0)",
            (owner,),
        )
        for party in (court.seller, Party("checker 1")):
            connection.execute("UPDATE peer SET owner = ? WHERE peer = ?", (owner, party.peer))

    await market.coordinator.store.submit(link)
    await lock_bond(market, court.buyer, 1_000_000)
    dispute = await disputed(court)
    await court.passes(1)
    assert (await court.show(dispute))["checkers"] == [Party("checker 0").peer]
    await court.passes(24 * HOUR + 1)
    assert len((await court.show(dispute))["checkers"]) == 1


@pytest.mark.parametrize(
    ("outputs", "rule", "returned"),
    [
        (("b", "b"), "majority_differs", True),
        (("b", "a"), "majority_equal", False),
        (("b", "b", "c"), "no_majority", True),
        (("b",), "replicas_missing", False),
    ],
)
async def test_drawn_replicas_settle_a_result(
    market: Market, outputs: tuple[str, ...], rule: str, returned: bool
) -> None:
    court = await result_court(market, checkers=5, changes={"verification": "repl"})
    dispute = await disputed(court)
    await court.passes(1)
    drawn = (await court.show(dispute))["checkers"]
    assert len(set(drawn)) == CHECKERS_MAX
    shown: list[bytes] = []
    for peer, output in zip(drawn, outputs, strict=False):
        shown += run_elsewhere(court, by_peer(court, peer), output)
    assert (await court.add(dispute, court.buyer, *shown, done=True)).status_code == 200
    if len(outputs) < CHECKERS_MAX:  # with all their results nothing can change
        await court.add(dispute, court.seller, done=True)
    if len(outputs) < 2:  # the second may still come, from either side
        assert (await court.show(dispute))["state"] == "checking"
        await court.passes(72 * HOUR + 1)
    ruling = await court.settles(dispute)
    assert (ruling["rule"], ruling["bond_returned"]) == (rule, returned)


@pytest.mark.slow
async def test_nobodys_last_word_ends_a_result_before_its_check(market: Market) -> None:
    """The seller had said all that it had, and the buyer keeps back a run that shows it right."""
    court = await result_court(market, checkers=1)
    dispute = await disputed(court)
    await court.add(dispute, court.seller, done=True)
    await court.add(dispute, court.buyer, done=True)
    await court.passes(1)
    found = await court.show(dispute)
    assert found["state"] == "checking"
    (peer,) = found["checkers"]
    seller = replace(court, buyer=court.seller)  # which buys there now
    shown = run_elsewhere(seller, by_peer(court, peer), "a")
    assert (await court.add(dispute, court.seller, *shown, n=1)).status_code == 200
    assert (await court.settles(dispute))["rule"] == "result_equal"


async def test_replicas_that_were_not_drawn_decide_nothing(market: Market) -> None:
    """Two that a party brings along would be the majority, for either side."""
    court = await result_court(market, changes={"verification": "repl"})
    shown: list[bytes] = [court.work.order(), court.work.delivery(output="a")]
    for number in range(2):
        puppet = await market.party(f"puppet {number}", 5_000_000)
        await lock_bond(market, puppet, 1_000_000)
        shown += run_elsewhere(court, puppet, "b")
    answer = await court.open(
        court.buyer, "wrong_result", order=1, amount=PRICE, evidence=tuple(shown)
    )
    assert code(answer) == "evidence_foreign"
    dispute = await disputed(court, evidence=tuple(shown[:2]))
    answer = await court.add(dispute, court.buyer, *shown[2:])
    assert code(answer) == "evidence_foreign"


async def test_a_result_that_is_not_checkable(market: Market) -> None:
    court = await result_court(market, changes={"verification": "evid"})
    shown = (court.work.order(), court.work.delivery())
    answer = await court.open(court.buyer, "wrong_result", order=1, evidence=shown)
    assert code(answer) == "not_disputable"


# --- time ---


@pytest.mark.slow
async def test_deadlines_wait_while_the_coordinator_is_away(tmp_path: Path) -> None:
    clock, state = Clock(), tmp_path / "state"
    async with open_market(state, clock=clock) as market:
        court = await result_court(market)
        dispute = await court.opened(court.buyer, "not_delivered", amount=PRICE)
        until = (await court.show(dispute))["evidence_until"]
    clock.now += 80 * HOUR
    async with open_market(state, clock=clock) as market:
        court = replace(court, market=market)
        market.tokens = {"buyer": "", "seller": ""}
        await court.passes(0)
        found = await court.show(dispute)
        assert (found["state"], found["evidence_until"]) == ("opened", until + 80 * HOUR)
        shown = (court.work.order(), court.work.delivery())
        assert (await court.add(dispute, court.seller, *shown)).status_code == 200
        await court.passes(72 * HOUR + 1)
        assert (await court.settles(dispute))["rule"] == "delivered"


async def test_late_evidence_is_not_taken(market: Market) -> None:
    court = await result_court(market)
    dispute = await court.opened(court.buyer, "not_delivered", amount=PRICE)
    market.clock.now += 72 * HOUR + 1
    assert code(await court.add(dispute, court.seller)) == "dispute_closed"


# --- who sees what ---


async def test_only_parties_see_a_dispute(market: Market) -> None:
    court = await result_court(market)
    dispute = await court.opened(court.buyer, "not_delivered", amount=PRICE)
    outsider = await market.party("outsider")
    client = market.client
    for path in (f"/v1/disputes/{dispute}", f"/v1/disputes/{dispute}/file"):
        for party in (court.buyer, court.seller):
            assert (await client.get(path, headers=market.bearer(party))).status_code == 200
        answer = await client.get(path, headers=market.bearer(outsider))
        assert (answer.status_code, code(answer)) == (404, "not_found")
        assert (await client.get(path)).status_code == 401
    mine = await client.get("/v1/disputes", headers=market.bearer(outsider))
    assert mine.json() == {"disputes": [], "next": None}


async def test_disputes_are_listed_in_pages(market: Market) -> None:
    court = await result_court(market)
    shown = (court.work.delivery(), court.work.delivery(output="b"))
    first = await court.opened(court.buyer, "not_delivered", amount=PRICE)
    second = await court.opened(court.buyer, "equivocation", evidence=shown, amount=0)
    headers = market.bearer(court.seller)
    page = await market.client.get("/v1/disputes?limit=1", headers=headers)
    assert [row["dispute"] for row in page.json()["disputes"]] == [first]
    after = page.json()["next"]
    page = await market.client.get(f"/v1/disputes?after={after}", headers=headers)
    assert [row["dispute"] for row in page.json()["disputes"]] == [second]
    assert page.json()["next"] is None


async def test_one_peers_open_disputes_are_bounded(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    court = await result_court(market)
    monkeypatch.setattr("lumaris_coordinator.disputes.opening.DISPUTES_OPEN_PER_PEER_MAX", 1)
    await court.opened(court.buyer, "not_delivered", amount=PRICE)
    shown = (court.work.order(), court.work.delivery())
    answer = await court.open(court.buyer, "wrong_result", order=1, evidence=shown)
    assert code(answer) == "too_many_holds"


async def test_a_damaged_dispute_does_not_keep_others_from_ending(market: Market) -> None:
    court = await result_court(market)
    good = await court.opened(court.buyer, "not_delivered", amount=PRICE)

    def damage(connection: Any) -> None:
        row = connection.execute("SELECT * FROM dispute").fetchall()[0]
        bad = ("dsp_" + "a" * 24, 0, *row[2:])
        connection.execute(f"INSERT INTO dispute VALUES ({', '.join('?' * len(bad))})", bad)
        connection.execute("UPDATE dispute SET opened = 'nothing' WHERE number = 0")

    await market.coordinator.store.submit(damage)
    await court.passes(72 * HOUR + 1)
    assert (await court.show(good))["state"] == "settled"
    report = await market.coordinator.store.scan(partial(check, log=market.coordinator.log))
    assert any("opening of dispute dsp_aaa" in problem for problem in report.problems)


# --- the file ---


async def test_every_flipped_bit_of_the_file_is_noticed(market: Market) -> None:
    """One bit of every signed document, and of every proof."""
    court = await result_court(market, checkers=2)
    dispute = await disputed(court)
    open_file = await court.file(dispute)
    assert dispute_file.verify(open_file, trusted=frozenset({market.peer})).verdict == "unknown"
    await court.passes(1)
    (peer,) = (await court.show(dispute))["checkers"]
    await court.add(dispute, court.buyer, *run_elsewhere(court, by_peer(court, peer), "b"))
    data, trusted = await court.file(dispute), frozenset({market.peer})
    assert dispute_file.verify(data, trusted=trusted).verdict == "valid"
    assert dispute_file.verify(data, trusted=frozenset()).verdict == "unknown"
    found = json.loads(data)
    places = [("opened",), ("evidence", 0), ("draws", 0, "draw")]
    places += [("draws", 0, "candidates"), ("draws", 0, "salt")]
    places += [("ruling", "ruling"), ("ruling", "salt"), ("ruling", "proof", "hashes", 0)]
    places += [("draws", 0, "proof", "hashes", 0), ("ruling", "checkpoint")]
    for place in places:
        forged = dispute_file.verify(_flipped(found, place), trusted=trusted)
        assert forged.verdict == "invalid", place
    for name, value in (("evidence", []), ("draws", []), ("network", "othernet")):
        cut = json.dumps(found | {name: value}).encode()
        assert dispute_file.verify(cut, trusted=trusted).verdict == "invalid", name


def _flipped(found: dict[str, Any], place: tuple[Any, ...]) -> bytes:
    copy = json.loads(json.dumps(found))
    node = copy
    for step in place[:-1]:
        node = node[step]
    text = node[place[-1]]
    if place[-1] == "checkpoint":
        position = text.index("\n\n") - 4
        node[place[-1]] = (
            text[:position] + ("A" if text[position] != "A" else "B") + text[position + 1 :]
        )
    elif text.startswith("sha256:"):
        node[place[-1]] = text[:-1] + ("0" if text[-1] != "0" else "1")
    else:
        data = bytearray(base64.b64decode(text))
        data[len(data) // 2] ^= 1
        node[place[-1]] = base64.b64encode(bytes(data)).decode()
    return json.dumps(copy).encode()


async def test_a_ruling_that_does_not_follow_is_invalid(market: Market) -> None:
    """The coordinator itself cannot sign another amount than the rules give."""
    from lumaris_protocol import codec
    from lumaris_protocol.messages.dispute import Ruling

    court = await result_court(market)
    dispute = await court.opened(court.buyer, "not_delivered", amount=PRICE)
    await court.passes(72 * HOUR + 1)
    found = dispute_file.decode(await court.file(dispute))
    assert found.ruling is not None
    ruling = codec.open_signed(found.ruling.ruling, Ruling, network=NETWORK).message
    key = market.coordinator.context.key
    for change in (
        {"refund_nanos": ruling.refund_nanos - 1},
        {"fault": "neither"},
        {"bond_returned": False},
        {"award_nanos": 1},
        {"facts": changed(ruling.facts, paid_nanos=0)},
        {"facts": changed(ruling.facts, bond_nanos=1)},
        {"facts": changed(ruling.facts, ended="done")},
        {"facts": changed(ruling.facts, ended="evidence")},
        {"issued_at": ruling.facts.evidence_until},
        {"documents": 2},
        {"seller": court.buyer.peer},
    ):
        forged = codec.sign(changed(ruling, **change), key, NETWORK).data
        entry = changed(found.ruling, ruling=forged)
        data = dispute_file.encode(changed(found, ruling=entry))
        report = dispute_file.verify(data, trusted=frozenset({market.peer}))
        assert report.verdict == "invalid", change
        assert not report.checks[-1].holds
        assert report.checks[-1].name in ("ruling", "decision"), change


def test_junk_is_invalid_and_never_raises() -> None:
    for data in (b"", b"{}", b"null", b"[" * 100_000, b"\xff", b" " * (5 << 20)):
        report = dispute_file.verify(data, trusted=frozenset())
        assert (report.verdict, report.checks[-1].name) == ("invalid", "form")


async def test_a_dispute_takes_no_more_from_a_bond_than_can_be_lost(market: Market) -> None:
    court = await result_court(market)
    before = await bond_of(market, court.seller)
    await court.opened(court.buyer, "not_delivered", amount=PRICE)
    assert await bond_of(market, court.seller) == before - PRICE - PRICE // 10


async def test_two_wrong_results_of_one_session_are_both_refunded(market: Market) -> None:
    """What the first order was worth is not held against the refund of the second."""
    court = await court_of(market)
    await court.claimed(2 * PRICE)
    work = court.work
    for number in range(2):
        checker = await market.party(f"checker {number}", 5_000_000)
        await lock_bond(market, checker, 1_000_000)
    shown = {n: (work.order(n), work.delivery(n, output="a")) for n in (1, 2)}
    for n, other in ((1, 2), (2, 1)):
        name = await court.opened(
            court.buyer, "wrong_result", order=n, evidence=shown[n], amount=PRICE
        )
        await court.add(name, court.seller, *shown[other])
        await court.passes(1)
        (peer,) = (await court.show(name))["checkers"]
        await court.add(name, court.buyer, *run_elsewhere(court, by_peer(court, peer), "b"))
        ruling = await court.settles(name)
        assert (ruling["rule"], ruling["refund_nanos"]) == ("result_differs", PRICE)
    answer = await court.open(court.buyer, "not_delivered", amount=PRICE)
    assert code(answer) == "not_disputable"  # all of it was given back
