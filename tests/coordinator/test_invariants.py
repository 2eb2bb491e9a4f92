"""A random market against a model: money is conserved whatever anybody does in whatever order.

The operations are those of the writer, on the real store of both kinds. LUMARIS_EXAMPLES sets how
many random markets are tried.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from lumaris_coordinator import Coordinator, Settings
from lumaris_coordinator.bounds import BOND_NANOS_MIN, CAP_NANOS_MIN
from lumaris_coordinator.escrow import disputed
from lumaris_coordinator.escrow import store as escrows
from lumaris_coordinator.identity.store import save_peer
from lumaris_coordinator.ledger import bonding, bonds
from lumaris_coordinator.ledger import store as ledger
from lumaris_coordinator.ledger.store import TEST_CREDIT, Leg, open_account, open_wallet, wallet
from lumaris_coordinator.receipts.log import checkpoint_of
from lumaris_coordinator.store.port import Connection, all_rows
from lumaris_coordinator.store.writer import _Job
from lumaris_protocol import agreements, codec, merkle, receipts, settlement
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import derive_id, digest
from lumaris_protocol.machines.escrow import ESCROW
from lumaris_protocol.messages.budget import AmendRequest, BondRequest
from lumaris_protocol.messages.dispute import Facts, Ruling
from lumaris_protocol.messages.payment import Settle
from tests.coordinator.builders import NETWORK, START, Clock, Deal, Party, bond_request
from tests.coordinator.postgres import Server

PARTIES = tuple(Party(f"party{number}") for number in range(3))
CURRENCIES = ("TEST", "EUR")
FUNDS = 20 * BOND_NANOS_MIN
CAPS = st.sampled_from([33_333, FUNDS // 7, CAP_NANOS_MIN, CAP_NANOS_MIN - 1, FUNDS + 1])
PARTS = st.sampled_from([33, 50, 1, 0, 99, 100, 110])
WINDOW_S = 30 * 24 * 3600
Places = Callable[[], AbstractContextManager[str]]


@dataclass
class Model:
    """What must be true of one session, by independent book-keeping."""

    deal: Deal
    grant: bytes
    cap: int
    ends_at: int
    settle_by: int
    state: str = "held"
    shown: int = 0
    paid: int = 0
    returned: int = 0
    disputes: int = 0
    opened: int = 0
    heard: bool = False
    amended: int = 0
    moves: int = 1

    @property
    def final(self) -> bool:
        return self.state in ESCROW.final

    @property
    def payable(self) -> int:
        return self.cap - self.returned

    def end(self, state: str, paid: int) -> None:
        self.state, self.paid = state, max(self.paid, paid)
        self.moves += 1


class MarketMachine(RuleBasedStateMachine):
    """Grants, amendments, claims, disputes, bonds and time."""

    sessions = Bundle("sessions")

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.exit = ExitStack()
        self.clock = Clock()
        state = Path(tempfile.mkdtemp(prefix="lumaris-invariants-"))
        self.exit.callback(shutil.rmtree, state)
        database = self.exit.enter_context(places())
        self.coordinator = Coordinator(
            Settings(state=state, network=NETWORK, currencies=CURRENCIES, database=database),
            clock=self.clock,
        )
        self.coordinator.store.prepare()
        self.connection = self.coordinator.store.writer._open()
        self.exit.callback(self.connection.close)
        if not database:
            self.connection.execute("PRAGMA synchronous = OFF")
        self.models: list[Model] = []
        self.locked: Counter[tuple[str, str]] = Counter()
        self.releases: list[tuple[int, str, str, int]] = []  # due, peer, currency, nanos
        self.checkpoints: list[tuple[int, bytes]] = []
        self.apply(self.coordinator._start)
        for serial, party in enumerate(PARTIES):
            self.apply(partial(self.join, party=party, serial=serial))

    def teardown(self) -> None:
        self.exit.close()

    @property
    def now(self) -> int:
        return int(self.clock.now)

    def join(self, connection: Connection, party: Party, serial: int) -> None:
        save_peer(
            connection, peer=party.peer, account=party.name, seller=True, addresses="[]",
            serial=serial, certificate=b"", now=START, expires_at=START,
        )  # fmt: skip
        for currency in CURRENCIES:
            outside = open_account(
                connection, owner=TEST_CREDIT, kind="external", currency=currency, may_negative=True
            )
            legs = [Leg(outside, open_wallet(connection, party.name, currency), FUNDS)]
            ledger.move(connection, kind="test_credit", ref="", legs=legs, now=START)

    def free(self, party: Party, currency: str) -> int:
        return ledger.balance(self.connection, wallet(party.name, currency))

    def apply(self, operation: Callable[[Connection], Any]) -> Any:
        """One batch of one operation, as the writer commits it."""
        writer, job = self.coordinator.store.writer, _Job(operation)
        self.connection.execute("BEGIN IMMEDIATE")
        writer._commit(self.connection, [job])
        for hook in writer._hooks:
            hook.committed()
        if job.error is not None:
            raise job.error
        return job.value

    def refusal(self, operation: Callable[[Connection], Any]) -> tuple[str, Any]:
        """(code, "") of what refuses, or ("", value). What was done once is done the same way when
        it is asked for again, and moves nothing."""
        try:
            found = self.apply(operation)
        except LumarisError as error:
            return error.code, ""
        moved = ledger.last_transfer(self.connection)
        assert self.apply(operation) == found
        assert ledger.last_transfer(self.connection) == moved
        return "", found

    @initialize(target=sessions)
    def begin(self) -> Any:
        """Two sessions to begin with."""
        return multiple(
            self.grant([0, 1, 2], FUNDS // 3, "TEST"), self.grant([1, 0, 2], FUNDS // 3, "EUR")
        )

    @rule(
        target=sessions,
        who=st.permutations(range(3)),
        cap=CAPS,
        currency=st.sampled_from(CURRENCIES),
    )
    def grant(self, who: list[int], cap: int, currency: str) -> Any:
        buyer, seller = PARTIES[who[0]], PARTIES[who[1]]
        deal = Deal(
            buyer, seller, self.coordinator.peer_id, cap=cap, now=self.now,
            changes={"currency": currency},
        )  # fmt: skip
        contract = agreements.join(deal.signed_by(buyer), deal.signed_by(seller), network=NETWORK)
        free = self.free(buyer, currency)
        hold = self.coordinator.grants._hold
        refused, data = self.refusal(lambda connection: hold(connection, contract, self.now))
        expected = "terms_refused" if cap < CAP_NANOS_MIN else "no_funds" if free < cap else ""
        assert refused == expected
        if refused:
            return multiple()
        ends_at = deal.agreement.ends_at
        self.models.append(Model(deal, data, cap, ends_at, ends_at + WINDOW_S))
        return self.models[-1]

    @rule(
        model=sessions,
        more=st.sampled_from([1, 50_000, 0, FUNDS]),
        longer_s=st.sampled_from([0, 3_600, 22 * 3_600]),
        by_seller=st.sampled_from([True, True, False]),
    )
    def amend(self, model: Model, more: int, longer_s: int, by_seller: bool) -> None:
        deal, n = model.deal, model.amended + 1
        total_s = model.ends_at + longer_s - deal.agreement.ends_at
        body = deal.amend_request(n, cap=model.cap + more, longer_s=total_s, by_seller=by_seller)
        request = codec.open_signed(body, AmendRequest, network=NETWORK).message
        currency = deal.agreement.terms.currency
        self.end_if_due(model)
        free = self.free(deal.buyer, currency)
        amend = self.coordinator.grants._amend
        refused, data = self.refusal(lambda connection: amend(connection, request, self.now))
        sensible = (more or longer_s) and (by_seller or not longer_s)
        too_long = model.ends_at + longer_s - deal.agreement.issued_at > 24 * 3_600
        if not sensible or (longer_s and too_long):
            assert refused == "amendment_refused"
        elif model.final or model.state == "disputed":
            assert refused == ("already_settled" if model.final else "in_dispute")
        elif self.now > model.ends_at + 60:
            assert refused == "expired"
        else:
            assert refused == ("no_funds" if more > free else "")
        if refused:
            return
        model.amended, model.cap, model.grant = n, model.cap + more, data
        model.ends_at += longer_s
        model.settle_by = max(model.settle_by, model.ends_at + WINDOW_S if longer_s else 0)
        model.moves += 1

    @rule(
        model=sessions,
        fact=st.sampled_from(["seller_claim", "buyer_claim", "both_closed"]),
        part=PARTS,
        off=st.sampled_from([0, 1, 5_000]),
    )
    def claim(self, model: Model, fact: str, part: int, off: int) -> None:
        deal, vouchered = model.deal, model.cap * part // 100
        total = max(0, vouchered - off) if fact == "both_closed" else vouchered
        closes = deal.closes(total) if fact == "both_closed" else ()
        party = deal.buyer if fact == "buyer_claim" else deal.seller
        body = deal.claim(party, model.grant, vouchered, total_nanos=total, closes=closes)
        signed = codec.open_signed(body, Settle, network=NETWORK)
        check = partial(
            settlement.open_claim, signed, network=NETWORK, coordinator=self.coordinator.peer_id
        )
        if vouchered > model.cap:
            with pytest.raises(LumarisError, match="over_cap"):
                check()
            return
        claim = check()
        self.catch_up(model)
        take = self.coordinator.escrows._apply
        refused, _ = self.refusal(lambda connection: take(connection, claim, signed, self.now))
        if model.final:
            return
        if vouchered > model.payable:
            vouchered = model.shown  # it comes too late: its money has been returned
        raised = vouchered > model.shown
        if model.state == "disputed":
            fresh = fact == "seller_claim" and not model.heard
            model.heard = model.heard or fresh
            model.moves += raised or fresh
            model.shown = max(model.shown, vouchered)
            model.paid = max(model.paid, model.shown)
        elif fact == "buyer_claim":
            model.moves += raised or model.state == "held"
            model.state, model.shown = "claimed", max(model.shown, vouchered)
        elif fact == "both_closed" and total < model.paid:
            assert refused == "already_settled"
        else:
            model.shown = max(model.shown, vouchered)
            model.end("settled", total if fact == "both_closed" else model.shown)

    @rule(model=sessions, shown=PARTS, later=PARTS, heard=st.booleans(), given=PARTS)
    def quarrel(self, model: Model, shown: int, later: int, heard: bool, given: int) -> None:
        """The whole way of a dispute, which random steps seldom go."""
        self.claim(model, "buyer_claim", shown, 0)
        self.dispute(model)
        if heard:
            self.claim(model, "seller_claim", later, 0)
        self.end_dispute(model, True, given)

    @rule(model=sessions)
    def dispute(self, model: Model) -> None:
        self.end_if_due(model)
        context = self.coordinator.context
        freeze = partial(
            disputed.freeze, context, agreement_hash=model.deal.hash, evidence="", now=self.now
        )
        if model.final or model.opened >= 3:
            return
        self.apply(lambda connection: freeze(connection=connection))
        model.disputes, model.opened = model.disputes + 1, model.opened + 1
        model.state, model.paid = "disputed", max(model.paid, model.shown)
        model.moves += 1

    @rule(model=sessions, part=PARTS, waits=st.booleans())
    def give_back(self, model: Model, part: int, waits: bool) -> None:
        """The window ends while a dispute is open: what it does not ask for returns."""
        if model.state == "disputed" and waits:
            self.time_passes(max(0, model.settle_by - self.now) + 1)
        held = model.payable - model.paid
        keep = held * part // 100
        give = partial(
            disputed.give_back, self.coordinator.context, agreement_hash=model.deal.hash,
            keep=keep, now=self.now,
        )  # fmt: skip
        self.end_if_due(model)
        self.apply(lambda connection: give(connection=connection))
        if model.state == "disputed" and self.now > model.settle_by and keep < held:
            model.returned, model.moves = model.returned + held - keep, model.moves + 1

    @rule(model=sessions, ruled=st.booleans(), part=PARTS)
    def end_dispute(self, model: Model, ruled: bool, part: int) -> None:
        if model.state != "disputed":
            return
        nanos = (model.payable - model.paid) * part // 100 if ruled else 0
        ruling = self.ruling(model, nanos) if ruled else None
        end = partial(
            disputed.award, self.coordinator.context, agreement_hash=model.deal.hash,
            award_nanos=nanos, ruling=ruling, now=self.now,
        )  # fmt: skip
        if nanos > model.payable - model.paid:
            with pytest.raises(LumarisError, match="no_funds"):
                self.apply(lambda connection: end(connection=connection))
            return
        self.apply(lambda connection: end(connection=connection))
        model.paid, model.disputes, model.moves = (
            model.paid + nanos,
            model.disputes - 1,
            model.moves + 1,
        )
        if model.disputes == 0:
            model.state = "claimed"
            if model.heard:
                model.end("settled", model.paid)

    def ruling(self, model: Model, nanos: int) -> bytes:
        deal = model.deal
        facts = Facts(
            paid_nanos=model.paid, claimed_nanos=0, remainder_nanos=model.cap - model.paid,
            bond_nanos=0, stake_nanos=0, ended="done", opened_at=START, evidence_until=START,
            ends_at=START,
        )  # fmt: skip
        ruling = Ruling(
            dispute=derive_id("dispute", f"{deal.hash}{model.moves}".encode()),
            agreement_hash=deal.hash, claim="unpaid_delivery", order=1, opener=deal.seller.peer,
            buyer=deal.buyer.peer, seller=deal.seller.peer, currency="TEST", fault="buyer",
            rule="delivered", award_nanos=nanos, refund_nanos=0, slash_nanos=0, collected_nanos=0,
            victim_nanos=0, bond_returned=True, evidence_root=digest(b""), documents=1,
            facts=facts, issued_at=self.now,
        )  # fmt: skip
        return codec.sign(ruling, self.coordinator.context.key, NETWORK).data

    @rule(
        who=st.integers(0, 2),
        currency=st.sampled_from(CURRENCIES),
        action=st.sampled_from(["lock", "release"]),
        amount=st.integers(1, 5),
    )
    def bond(self, who: int, currency: str, action: str, amount: int) -> None:
        party, nanos = PARTIES[who], amount * BOND_NANOS_MIN
        body = bond_request(
            party, self.coordinator.peer_id, action, nanos, now=self.now, currency=currency
        )
        signed = codec.open_signed(body, BondRequest, network=NETWORK)
        waiting = sum(one[3] for one in self.releases if one[1:3] == (party.peer, currency))
        left = self.locked[party.peer, currency] - waiting
        free = self.free(party, currency)
        ask = self.coordinator.bonds._apply
        refused, _ = self.refusal(
            lambda connection: ask(connection, signed.message, signed.hash, self.now)
        )
        if nanos > (free if action == "lock" else left):
            assert refused == "no_funds"
        elif action == "lock":
            assert refused == ""
            self.locked[party.peer, currency] += nanos
        elif not refused:
            due = self.now + self.coordinator.settings.bond_release_s
            self.releases.append((due, party.peer, currency, nanos))
        else:
            assert refused == "too_many_holds"

    @rule(seconds=st.sampled_from([1, 3_600, 8 * 24 * 3600, 31 * 24 * 3600]))
    def time_passes(self, seconds: int) -> None:
        self.clock.now += seconds
        names = escrows.due(self.connection, now=self.now, limit=100)
        end = self.coordinator.escrows._expire_if_due
        for model in self.models:
            assert (model.deal.hash in names) == self.catch_up(model)
        for name in names:
            for _ in range(2):  # a timer fires once
                self.apply(partial(end, agreement_hash=name, now=self.now))
        due = [one for one in self.releases if one[0] <= self.now]
        numbers = bonding._due(self.connection, self.now)
        assert len(numbers) == len(due)
        for number in numbers:
            release = partial(bonding._release, number=number, now=self.now)
            assert [self.apply(release), self.apply(release)] == [1, 0]
        for one in due:
            self.releases.remove(one)
            self.locked[one[1], one[2]] -= one[3]

    def end_if_due(self, model: Model) -> None:
        """End it as the chore does: what is refused afterwards is rolled back with all it did."""
        if self.catch_up(model):
            end = self.coordinator.escrows._expire_if_due
            self.apply(partial(end, agreement_hash=model.deal.hash, now=self.now))

    def catch_up(self, model: Model) -> bool:
        """The deadline decides; whether it ended the session now."""
        if model.state not in ("held", "claimed") or self.now <= model.settle_by:
            return False
        model.end("expired", model.shown)
        return True

    @invariant()
    def money_is_conserved(self) -> None:
        found = ledger.audit(self.connection)
        assert found["balanced"], found
        assert found["sums_nanos"] == dict.fromkeys(CURRENCIES, 0)
        assert not all_rows(
            self.connection, "SELECT id FROM account WHERE balance < 0 AND kind <> 'external'"
        )

    @invariant()
    def every_session_is_as_the_model_says(self) -> None:
        expected = Counter({(party.name, name): FUNDS for party in PARTIES for name in CURRENCIES})
        for party in PARTIES:
            for name in CURRENCIES:
                expected[party.name, name] -= self.locked[party.peer, name]
                assert (
                    bonds.free(self.connection, party.peer, name) == self.locked[party.peer, name]
                )
        for model in self.models:
            self.check_session(model, expected)
        for (owner, name), amount in expected.items():
            assert ledger.balance(self.connection, wallet(owner, name)) == amount

    def check_session(self, model: Model, expected: Counter[tuple[str, str]]) -> None:
        escrow = escrows.find(self.connection, model.deal.hash)
        assert escrow is not None
        assert (escrow.state, escrow.cap, escrow.paid) == (model.state, model.cap, model.paid)
        assert (escrow.voucher_total, escrow.disputes) == (model.shown, model.disputes)
        assert (escrow.not_after, escrow.settle_by) == (model.ends_at, model.settle_by)
        assert escrow.version + 1 == model.moves
        held = 0 if model.final else model.payable - model.paid
        assert ledger.balance(self.connection, escrow.account) == held == escrow.remainder
        fee = model.paid * 500 // 10_000
        expected["fees", escrow.currency] += fee
        expected[model.deal.seller.name, escrow.currency] += model.paid - fee
        expected[model.deal.buyer.name, escrow.currency] -= model.paid + held

    @invariant()
    def only_listed_moves_and_one_event_for_each(self) -> None:
        rows = all_rows(
            self.connection, "SELECT agreement_hash, fact, before, after FROM escrow_event"
        )
        for _, fact, before, after in rows:
            move = ESCROW.find(before, fact)
            assert fact == "granted" or (move is not None and move.next == after)
        events = all_rows(self.connection, "SELECT id, kind, ref, body FROM event ORDER BY id")
        assert [event[0] for event in events] == list(range(1, len(events) + 1))
        told = Counter(
            (ref, msgspec.json.decode(body)["fact"])
            for _, kind, ref, body in events
            if kind.startswith("escrow.")
        )
        assert told == Counter((row[0], row[1]) for row in rows)

    @invariant()
    def the_log_only_grows(self) -> None:
        head = self.coordinator.log.head(self.connection)
        settled = sum(model.final for model in self.models)
        assert head.size == settled
        checkpoint = checkpoint_of(head)
        if not self.checkpoints or self.checkpoints[-1][0] < head.size:
            if self.checkpoints and self.checkpoints[-1][0]:
                old, root = self.checkpoints[-1]
                proof = self.coordinator.log.consistency(self.connection, old, head.size)
                assert merkle.verify_consistency(
                    old=old, old_root=root, size=head.size, root=checkpoint.root, path=proof
                )
            self.checkpoints.append((head.size, checkpoint.root))
            self.verify_receipts()

    def verify_receipts(self) -> None:
        """Every receipt file follows from its documents, offline."""
        trusted = frozenset({self.coordinator.peer_id})
        for model in self.models:
            if model.final:
                escrow = escrows.find(self.connection, model.deal.hash)
                assert escrow is not None
                # What is not looked for after a single move is not there.
                looked = escrows.enclosed(self.connection, replace(escrow, version=99))
                assert escrows.enclosed(self.connection, escrow) == looked
                file = self.coordinator.receipts._bundle(self.connection, escrow)
                report = receipts.verify_bundle(file, trusted=trusted)
                assert report.verdict == "valid", report.checks
                assert report.receipt is not None
                assert report.receipt.paid_nanos == model.paid


EXAMPLES = int(os.environ.get("LUMARIS_EXAMPLES", "9"))
PROFILE = settings(
    max_examples=EXAMPLES,
    stateful_step_count=24,
    deadline=None,
    derandomize="LUMARIS_EXAMPLES" not in os.environ,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


def in_a_file() -> AbstractContextManager[str]:
    """No database but the file in the state directory."""
    return nullcontext("")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_random_markets(kind: str, request: pytest.FixtureRequest) -> None:
    places: Places = in_a_file
    profile = PROFILE
    if kind == "postgres":
        server: Server = request.getfixturevalue("postgres_server")
        places = server.database
        profile = settings(PROFILE, max_examples=max(1, EXAMPLES // 3))  # three times as slow
    run_state_machine_as_test(partial(MarketMachine, places), settings=profile)  # type: ignore[arg-type]
