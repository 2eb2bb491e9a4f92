"""`lumaris dispute` and `lumaris verify dispute` against a whole market in this process."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
import trio
from click.testing import Result

from lumaris import checking
from lumaris.buyer import Buyer
from lumaris.cli.dispute_output import RULES
from lumaris.coordinator import CoordinatorLink
from lumaris.jobs import JobResult
from lumaris_protocol import codec, codes, notes
from lumaris_protocol.coordinator_api import DisputeDetail
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair, PeerId, public_key_of
from lumaris_protocol.messages.notice import KeyList, SigningKey
from tests import market as m
from tests.bonded import bonded, draw, lines, lying
from tests.market import Market
from tests.sdk.cli.command import assert_one_message, call, json_of, shape_of

ROOT, OTHER = KeyPair(bytes([1]) * 32), KeyPair(bytes([2]) * 32)
JOB, DISPUTE = "job_" + "a" * 24, "dsp_" + "a" * 24
_OPEN = ["dispute", "open", JOB, "--claim"]
_SUMMARY = {
    "dispute": "str",
    "number": "int",
    "agreement_hash": "str",
    "claim": "str",
    "order": "int",
    "opener": "str",
    "buyer": "str",
    "seller": "str",
    "state": "str",
    "currency": "str",
    "amount_nanos": "int",
    "bond_nanos": "int",
    "stake_nanos": "int",
    "owed_nanos": "int",
    "opened_at": "int",
    "evidence_until": "int",
    "check_until": None,
    "ended_at": None,
}
_DETAIL = {
    **_SUMMARY,
    "evidence": [{"n": "int", "by": "str", "done": "bool", "hash": "str"}],
    "checkers": [],
    "ruling": None,
    "you": "str",
    "next": "str",
    "rule_in_words": None,
}


class Bridge(httpx.AsyncBaseTransport):
    """Carries what a command asks, in its own loop, into the loop that the market lives in."""

    def __init__(self, line: httpx.AsyncBaseTransport, *, lossy: bool) -> None:
        self._line, self._lossy = line, lossy
        self._token = trio.lowlevel.current_trio_token()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        ask = partial(
            trio.from_thread.run, self._line.handle_async_request, request, trio_token=self._token
        )
        answer = await trio.to_thread.run_sync(ask)
        if self._lossy and request.method == "POST":
            raise httpx.ReadError("the answer was lost")
        return answer


_NAME = re.compile(r"`(\w+)`")


@dataclass
class Counter:
    """Where commands are typed."""

    market: Market
    buyer: Buyer
    sold: JobResult
    lossy: bool = False  # answers to what changes something are lost

    async def type(self, *words: str | Path, state: Path | None = None) -> Result:
        """Run a command with the buyer's folder, or another's."""
        arguments = ("--coordinator", m.URL, *words)
        run = partial(call, *arguments, state=state or self.buyer.profile.state)
        bridge = Bridge(self.market.line, lossy=self.lossy)
        with (
            lines(bridge),
            mock.patch(
                "lumaris.cli.account.open_link",
                return_value=CoordinatorLink(m.URL, transport=bridge),
            ),
        ):
            return await trio.to_thread.run_sync(run)

    async def reads(self, *words: str | Path, state: Path | None = None) -> Any:
        """What a command that succeeds says as JSON."""
        found = await self.type(*words, "--json", state=state)
        assert found.exit_code == 0, found.output
        return json_of(found)

    async def fails(self, code: str, *words: str | Path, state: Path | None = None) -> Result:
        """A command that fails in one clear message."""
        found = await self.type(*words, state=state)
        assert_one_message(found.stderr, code)
        assert found.exit_code == codes.CODES[code].exit_code
        return found

    async def open(self, *words: str) -> str:
        """Open a dispute about the job; its id."""
        found = await self.reads("dispute", "open", self.sold.job, *words, "--yes")
        return str(found["dispute"])

    @property
    def seller(self) -> Path:
        """The folder of the node that sold."""
        return next(one.state for one in self.market.sellers if one.peer == self.sold.seller)


@pytest.fixture
async def counter(market: Market) -> AsyncIterator[Counter]:
    """A job that a seller with a bond did honestly, settled."""
    await bonded(market, "one")
    async with market.buyer() as buyer:
        sold = await buyer.run(market.request(m.HELLO))
        await buyer.pool.close_all()
        await buyer.records.flush()
        yield Counter(market, buyer, sold)


@pytest.mark.slow
@pytest.mark.planet
async def test_from_the_opening_to_the_replay(counter: Counter, tmp_path: Path):
    """A claim that is refuted, by both sides' commands."""
    cost = f"{counter.sold.cost_nanos / 1e9:.9f}"
    claim = ("dispute", "open", counter.sold.session, "--claim", "not_delivered", "--amount", cost)
    asked = await counter.fails("declined", *claim)
    assert f"asked    {cost} TEST" in asked.stderr
    assert "bond     0.001000000 TEST is taken from your account now" in asked.stderr
    assert "against  the seller's bond has " in asked.stderr
    assert (await counter.reads("dispute", "ls")) == {"items": []}
    seller_only = await counter.fails(
        "not_disputable", "dispute", "open", counter.sold.session, "--claim", "stale_voucher"
    )
    assert "bond " not in seller_only.stderr, "what cannot be claimed has no plan"
    opened = await counter.type(*claim, "--yes")
    assert "next: the other side: show evidence until" in opened.stderr
    counter.market.clock.ahead_s += 1
    twice = await counter.fails("dispute_open", *claim, "--yes")
    assert "No money moved." in twice.stderr
    assert f"in the dispute {(await counter.reads('dispute', 'ls'))['items'][0]['dispute']}" in (
        twice.stderr
    )
    (listed,) = (await counter.reads("dispute", "show"))["items"]
    assert shape_of(listed) == {**_SUMMARY, "next": "str"}
    name = listed["dispute"]
    assert name in (await counter.type("dispute", "show")).stdout
    shown = await counter.reads("dispute", "show", name)
    assert shape_of(shown) == _DETAIL
    assert (shown["you"], shown["state"]) == ("buyer", "opened")

    file = tmp_path / "dispute.json"
    saved = await counter.type("dispute", "show", name, "--save", file)
    assert "there is no ruling yet" in saved.stderr
    early = await counter.type("verify", "dispute", file)
    assert (early.exit_code, "cannot tell" in early.stdout) == (2, True)
    await counter.fails("not_writable", "dispute", "show", name, "--save", "/dev/null/x")

    theirs = await counter.reads("dispute", "evidence", name, "--done", state=counter.seller)
    assert theirs["shown"] > 0
    said = await counter.reads("dispute", "show", name, state=counter.seller)
    assert (said["you"], said["next"][:14]) == ("seller", "the other side")
    await counter.fails("dispute_closed", "dispute", "evidence", name, state=counter.seller)
    await counter.fails("forbidden", "dispute", "withdraw", name, "--yes", state=counter.seller)
    last = await counter.type("dispute", "evidence", name, "--done")
    assert last.exit_code == 0
    ruled = await counter.type("dispute", "show", name, "--save", file)
    assert "delivered: the shown work is worth what was paid" in ruled.stdout
    assert "nothing: it is over" in ruled.stdout
    await counter.fails("dispute_closed", "dispute", "withdraw", name, "--yes")
    await _replayed(counter, file, tmp_path)
    await counter.market.assert_balanced(counter.buyer)


def _key_list(folder: Path, coordinator: str, revoked_at: int) -> Path:
    key = SigningKey(
        peer=PeerId(coordinator), not_before=0, not_after=1 << 40, revoked_at=revoked_at
    )
    message = KeyList(root=ROOT.peer_id, seq=1, keys=(key,), issued_at=1)
    path = folder / "keys"
    path.write_bytes(codec.sign(message, ROOT, m.NETWORK).data)
    return path


async def _replayed(counter: Counter, file: Path, folder: Path) -> None:
    """The file of a ruling: valid, unknown to strangers, and invalid with one character changed."""
    valid = await counter.type("verify", "dispute", file)
    assert valid.exit_code == 0
    assert valid.stdout.splitlines()[-1] == "valid: this ruling follows from this evidence"
    report = await counter.reads("verify", "dispute", file)
    assert shape_of(report["checks"]) == [{"name": "str", "holds": "bool", "detail": "str"}]
    assert (report["verdict"], report["ruling"]["rule"]) == ("valid", "delivered")
    coordinator = str(counter.market.coordinator.peer_id)
    other = folder / "other"
    for words, status in (
        ((), 2),
        (("--coordinator", coordinator), 0),
        (("--trust", coordinator), 0),
        (("--trust", counter.sold.seller), 2),
    ):
        assert call("verify", "dispute", file, *words, state=other).exit_code == status, words
    log = notes.log_key(m.NETWORK, public_key_of(coordinator)).vkey
    witness = notes.witness_key(m.NETWORK, counter.sold.seller).vkey
    foreign = notes.log_key(m.NETWORK, public_key_of(counter.sold.seller)).vkey
    policy = folder / "policy"
    for rules, status in (
        (f"log {log}\nquorum none\n", 0),
        (f"log {log}\nwitness one {witness}\nquorum one\n", 2),
        (f"log {foreign}\nquorum none\n", 2),
        ("nonsense", 2),
    ):
        policy.write_text(rules)
        found = call("verify", "dispute", file, "--policy", policy, state=other)
        assert found.exit_code == status, rules
    for revoked_at, root, status in ((0, ROOT, 0), (1, ROOT, 2), (0, OTHER, 2)):
        listed = _key_list(folder, coordinator, revoked_at)
        found = call(
            *("verify", "dispute", file, "--key-list", listed, "--root", root.peer_id), state=other
        )
        assert found.exit_code == status, (revoked_at, root.peer_id)
    alone = call("verify", "dispute", file, "--root", ROOT.peer_id, state=other)
    assert_one_message(alone.stderr, "usage")
    held = json.loads(file.read_text())
    ruling = held["ruling"]["ruling"]
    held["ruling"]["ruling"] = ruling[:200] + ("A" if ruling[200] != "A" else "B") + ruling[201:]
    file.write_text(json.dumps(held))
    altered = await counter.type("verify", "dispute", file)
    assert altered.exit_code == 1
    assert altered.stdout.splitlines()[-1] == "invalid: do not rely on this file"
    assert "FAILS" in altered.stdout


@pytest.mark.slow
@pytest.mark.planet
async def test_stray_documents_and_withdrawing(counter: Counter, tmp_path: Path):
    standing = counter.buyer.standing
    before = (await counter.buyer.account()).free_nanos
    name = await counter.open("--claim", "wrong_result")
    assert (await counter.buyer.account()).free_nanos == before - 1_000_000
    wallet = await counter.type("wallet", "show")
    assert "in disputes  0.001000000 TEST" in wallet.stdout
    declined = await counter.fails("declined", "dispute", "withdraw", name)
    assert "lost is 0.001000000, half of that to the other side" in declined.stderr
    nothing = await counter.fails("evidence_insufficient", "dispute", "evidence", name)
    assert "--done says so" in nothing.stderr
    early = await counter.fails("evidence_insufficient", "dispute", "evidence", name, "--done")
    assert "No second run of the order is shown" in early.stderr
    stray = tmp_path / "stray"
    claim = ("dispute", "open", counter.sold.session, "--claim", "equivocation", "--yes")
    await counter.fails("evidence_insufficient", *claim)
    for data, code in ((b"stray", "malformed"), (standing.certificate, "evidence_foreign")):
        stray.write_bytes(data)
        await counter.fails(code, *claim, "--document", stray)
        await counter.fails(code, "dispute", "evidence", name, "--document", stray)
    gone = await counter.type("dispute", "withdraw", name, "--yes")
    assert "withdrawn" in gone.stdout
    assert "lost      0.001000000 TEST, 0.000500000 of it to the other side" in gone.stdout
    assert (await counter.reads("wallet", "show"))["disputed_nanos"] == 0
    for again in (("withdraw", name, "--yes"), ("evidence", name)):
        over = await counter.fails("dispute_closed", "dispute", *again)
        assert "The dispute is over: withdrawn." in over.stderr
    assert before - 1_000_000 <= (await counter.buyer.account()).free_nanos <= before


@pytest.mark.slow
@pytest.mark.planet
async def test_a_seller_without_a_bond_has_nothing_to_lose(market: Market):
    await market.seller()
    async with market.buyer() as buyer:
        sold = await buyer.run(market.request(m.HELLO))
        await buyer.pool.close_all()
        await buyer.records.flush()
        counter = Counter(market, buyer, sold)
        plan = await counter.fails(
            "declined", "dispute", "open", sold.job, "--claim", "wrong_result"
        )
        assert "has 0.000000000 for this now; no more can be won unless" in plan.stderr
        assert "checkers nobody could be drawn to check now" in plan.stderr
        opened = await counter.type("dispute", "open", sold.job, "--claim", "wrong_result", "--yes")
        assert "the seller's bond has 0.000000000 for this now" in opened.stderr


@pytest.mark.slow
@pytest.mark.planet
async def test_a_token_that_is_not_taken(counter: Counter):
    """A buyer registers again by itself; a node's registration is its own."""
    for state in (counter.buyer.profile.state, counter.seller):
        cache = state / "membership.json"
        standing = json.loads(cache.read_text())
        cache.write_text(json.dumps({**standing, "token": "lum_" + "a" * 32}))
    assert await counter.reads("dispute", "show") == {"items": []}
    refused = await counter.fails("unauthorized", "dispute", "show", state=counter.seller)
    assert "start the node" in refused.stderr


@pytest.mark.slow
@pytest.mark.planet
async def test_a_lost_answer_opens_no_second_dispute(counter: Counter):
    before = (await counter.buyer.account()).free_nanos
    counter.lossy = True
    lost = await counter.fails(
        "busy", "dispute", "open", counter.sold.job, "--claim", "wrong_result", "--yes"
    )
    assert "oney moved" not in lost.stderr, "nobody knows"
    counter.lossy = False
    (listed,) = (await counter.reads("dispute", "show"))["items"]
    assert (await counter.buyer.account()).free_nanos == before - listed["bond_nanos"]


class CheckClient:
    """Checks with the buyer of the market's own loop, as `Client` does with its own."""

    def __init__(self, counter: Counter) -> None:
        self._counter, self._token = counter, trio.lowlevel.current_trio_token()
        self.peer = counter.buyer.key.peer_id
        self.cut = False

    def __enter__(self) -> CheckClient:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def check_dispute(
        self, dispute: str, *, sources: Any, image: str, max_cost: str, observe: Any, approve: Any
    ) -> checking.Checked:
        assert (list(sources), max_cost) == ([], "0.01")

        async def ask(plan: Any) -> bool:
            return bool(approve(plan))

        async def work() -> checking.Checked:
            buyer = self._counter.buyer
            due = await checking.due(buyer.disputes, dispute)
            return await checking.run(
                buyer,
                buyer.disputes,
                due,
                image=image,
                max_cost_nanos=10_000_000,
                approve=ask,
                observe=observe,
            )

        return trio.from_thread.run(work, trio_token=self._token)

    def dispute(self, dispute: str) -> DisputeDetail:
        if self.cut:
            raise LumarisError("coordinator_unreachable")
        show = self._counter.buyer.disputes.show
        return trio.from_thread.run(show, dispute, trio_token=self._token)


@pytest.mark.slow
@pytest.mark.planet
async def test_checking(market: Market, monkeypatch: pytest.MonkeyPatch):
    for name in ("one", "two"):
        await bonded(market, name)
    async with market.buyer() as buyer:
        with lying():
            sold = await buyer.run(market.request(m.HELLO))
            await buyer.pool.close_all()
        await buyer.records.flush()
        counter = Counter(market, buyer, sold)
        client = CheckClient(counter)
        monkeypatch.setattr("lumaris.cli.work.open_client", lambda _: client)
        name = await counter.open("--claim", "wrong_result")
        early = await counter.fails("not_disputable", "dispute", "check", name)
        assert "No checker is drawn yet." in early.stderr
        waits = await counter.reads("dispute", "show", name)
        assert waits["next"].startswith("the coordinator: draw a checker")
        await draw(market, buyer.disputes, name)
        drawn = await counter.reads("dispute", "show", name)
        assert drawn["next"].startswith("you: have it checked until ")
        other = await counter.reads("dispute", "show", name, state=counter.seller)
        assert other["next"].startswith("the opener: have it checked until ")
        check = ("dispute", "check", name)
        await counter.fails("bad_image", *check, "--image", "none.wasm")
        client.cut = True
        lost = await counter.fails("coordinator_unreachable", *check, "--image", market.guest)
        assert "The checker's answer is filed." in lost.stderr
        assert "Money moved." in lost.stderr
        assert f"checker  {drawn['checkers'][0][-10:]}" in lost.stderr
        shown = await counter.type("dispute", "show", name)
        assert "result_differs: the checker came to another result" in shown.stdout
        await counter.fails("dispute_closed", *check)
        await market.assert_balanced(buyer)


# --- before anything happens ---

TURNS = [
    ([*_OPEN, "not_delivered"], "coordinator_unreachable"),
    ([*_OPEN, "nonsense"], "usage"),
    (["dispute", "open", JOB], "usage"),
    (["dispute", "open", "--claim", "not_delivered"], "usage"),
    (["dispute", "open", "../x", "--claim", "not_delivered"], "not_found"),
    (["dispute", "open", DISPUTE, "--claim", "not_delivered"], "not_found"),
    ([*_OPEN, "not_delivered", "--order", "1"], "usage"),
    ([*_OPEN, "wrong_result", "--order", "0"], "usage"),
    ([*_OPEN, "not_delivered", "--amount", "lots"], "usage"),
    ([*_OPEN, "forged_voucher", "--document", "NONE"], "not_found"),
    (["dispute", "show"], "coordinator_unreachable"),
    (["dispute", "show", DISPUTE], "coordinator_unreachable"),
    (["dispute", "show", JOB], "not_found"),
    (["dispute", "show", "--save", "FILE"], "usage"),
    (["dispute", "evidence", DISPUTE], "coordinator_unreachable"),
    (["dispute", "evidence", "x"], "not_found"),
    (["dispute", "evidence", DISPUTE, "--document", "NONE"], "not_found"),
    (["dispute", "withdraw", DISPUTE], "coordinator_unreachable"),
    (["dispute", "withdraw"], "usage"),
    (["dispute", "check", DISPUTE], "coordinator_unreachable"),
    (["dispute", "check", "dsp_x"], "not_found"),
    (["dispute", "check", DISPUTE, "--input", "NONE"], "bad_input"),
    (["dispute", "check", DISPUTE, "--max-cost", "much"], "usage"),
    (["verify", "dispute"], "usage"),
    (["verify", "nonsense"], "usage"),
]


@pytest.mark.parametrize(("words", "code"), TURNS, ids=lambda value: " ".join(value)[:60])
def test_wrong_turn(words: list[str], code: str, tmp_path: Path) -> None:
    arguments = [str(tmp_path / word) if word == "NONE" else word for word in words]
    found = call(*arguments, state=tmp_path / "state")
    assert_one_message(found.stderr, code)
    assert found.exit_code == codes.CODES[code].exit_code
    assert not found.stdout


def test_an_interrupt_names_the_disputes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trio.run", stop)
    found = call("dispute", "show", DISPUTE, state=tmp_path)
    assert_one_message(found.stderr, "interrupted")
    assert "`lumaris dispute show`" in found.stderr


def test_choices_are_one_line_of_text(tmp_path: Path) -> None:
    found = call("dispute", "open", JOB, state=tmp_path)
    assert "Choose from: not_delivered, wrong_result" in found.stderr


def test_every_rule_has_words() -> None:
    text = (Path(__file__).parents[3] / "docs" / "disputes.md").read_text(encoding="utf-8")
    rows = text.partition("## Rules")[2].partition("\n## ")[0].splitlines()
    named = {
        rule
        for row in rows
        if row.startswith("| `")
        for rule in _NAME.findall(row[: row.index(" | ")])
    }
    assert named == set(RULES)


def test_a_node_that_never_ran(tmp_path: Path) -> None:
    (tmp_path / "node.key").write_bytes(b"")
    found = call("dispute", "show", "--state", tmp_path)
    assert_one_message(found.stderr, "not_found")
    assert "lumaris node up" in found.stderr


def test_what_cannot_be_replayed(tmp_path: Path) -> None:
    file = tmp_path / "dispute.json"
    for text in ("", "{}", "[" * 100_000, "x" * 1000):
        file.write_text(text)
        found = call("verify", "dispute", file, "--trust", "nobody", state=tmp_path)
        assert found.exit_code == 2, "the peer to trust is none"
        found = call("verify", "dispute", file, state=tmp_path)
        assert found.exit_code == 1
        assert found.stdout.splitlines()[-1] == "invalid: do not rely on this file"
    for words in (("none",), (tmp_path,), (file, "--policy", "none")):
        found = call("verify", "dispute", *words, state=tmp_path)
        assert found.exit_code == 2
        assert_one_message(found.stderr, "not_found")
