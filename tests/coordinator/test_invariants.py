"""A random market against a model: money is conserved whatever anybody does in whatever order."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
)

from lumaris_coordinator import Coordinator, Settings
from lumaris_coordinator.bounds import CAP_NANOS_MIN
from lumaris_coordinator.escrow import store as escrows
from lumaris_coordinator.identity.store import save_peer
from lumaris_coordinator.ledger import store as ledger
from lumaris_coordinator.ledger.store import TEST_CREDIT, Leg
from lumaris_coordinator.store.port import all_rows
from lumaris_protocol import agreements, codec, settlement
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.payment import Settle
from tests.coordinator.builders import NETWORK, START, Clock, Deal, Party

PARTIES = tuple(Party(f"party{number}") for number in range(3))
FUNDS = 20_000


@dataclass
class Model:
    """What must be true of one session, by independent book-keeping."""

    deal: Deal
    grant: bytes
    shown: int = 0
    paid: int | None = None


class MarketMachine(RuleBasedStateMachine):
    """Grants, claims, closes and time, through the very operations that the writer runs."""

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.state = Path(tempfile.mkdtemp(prefix="lumaris-invariants-"))
        self.coordinator = Coordinator(
            Settings(state=self.state, network=NETWORK), clock=self.clock
        )
        self.coordinator.store._migrate()
        self.connection = self.coordinator.store.connect_writer()
        self.connection.execute("PRAGMA synchronous = OFF")
        self.models: list[Model] = []
        self.given = 0
        self.apply(self.coordinator._start)
        for serial, party in enumerate(PARTIES):
            self.apply(lambda connection, p=party, n=serial: self.join(connection, p, n))

    def teardown(self) -> None:
        self.connection.close()
        shutil.rmtree(self.state)

    def join(self, connection: Any, party: Party, serial: int) -> None:
        ledger.open_account(connection, party.name, kind="peer", currency="TEST")
        save_peer(
            connection, peer=party.peer, account=party.name, seller=True, addresses="[]",
            serial=serial, certificate=b"", now=START, expires_at=START,
        )  # fmt: skip
        legs = [Leg(TEST_CREDIT, party.name, FUNDS)]
        ledger.move(connection, kind="test_credit", ref="", legs=legs, now=START)
        self.given += FUNDS

    def apply(self, operation: Any) -> Any:
        """One batch of one operation, as the writer commits it."""
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            found = operation(self.connection)
        except BaseException:
            self.connection.execute("ROLLBACK")
            raise
        self.coordinator.log.before_commit(self.connection, int(self.clock.now))
        self.connection.execute("COMMIT")
        self.coordinator.log.committed()
        return found

    @rule(
        target=sessions,
        who=st.permutations(range(3)),
        cap=st.integers(CAP_NANOS_MIN - 1, FUNDS + 1),
    )
    def grant(self, who: list[int], cap: int) -> Any:
        buyer, seller = PARTIES[who[0]], PARTIES[who[1]]
        now = int(self.clock.now)
        deal = Deal(buyer, seller, self.coordinator.peer_id, cap=cap, now=now)
        contract = agreements.join(deal.signed_by(buyer), deal.signed_by(seller), network=NETWORK)
        free = ledger.balance(self.connection, buyer.name)
        service = self.coordinator.escrows
        try:
            data = self.apply(lambda connection: service._hold(connection, contract, now))
        except LumarisError as error:
            refused, data = error.code, b""
        else:
            refused = ""
        expected = "terms_refused" if cap < CAP_NANOS_MIN else "no_funds" if free < cap else ""
        assert refused == expected
        if refused:
            return multiple()
        assert self.apply(lambda connection: service._hold(connection, contract, now)) == data
        assert ledger.balance(self.connection, buyer.name) == free - cap
        self.models.append(Model(deal, data))
        return self.models[-1]

    @rule(model=sessions, by_buyer=st.booleans(), closed=st.booleans(), part=st.integers(0, 110))
    def claim(self, model: Model, by_buyer: bool, closed: bool, part: int) -> None:
        deal = model.deal
        total = deal.cap * part // 100
        party = deal.buyer if by_buyer else deal.seller
        body = deal.claim(party, model.grant, total, closed=closed)
        signed = codec.open_signed(body, Settle, network=NETWORK)
        try:
            claim = settlement.open_claim(
                signed, network=NETWORK, coordinator=self.coordinator.peer_id
            )
        except LumarisError as error:
            refused = error.code
        else:
            refused = ""
        assert refused == ("over_cap" if total > deal.cap else "")
        if refused:
            return
        now, service = int(self.clock.now), self.coordinator.escrows
        late = model.paid is None and now > self.deadline(model)
        found = self.apply(lambda connection: service._apply(connection, claim, "", now))
        if late:
            model.paid = model.shown
        elif model.paid is None and (closed or not by_buyer):
            model.paid = total if closed else max(total, model.shown)
        elif model.paid is None:
            model.shown = max(model.shown, total)
        assert found.escrow.final == (model.paid is not None)

    def deadline(self, model: Model) -> int:
        found = escrows.find(self.connection, model.deal.hash)
        assert found is not None
        return found.settle_by

    @precondition(lambda self: self.models)
    @rule(seconds=st.sampled_from([1, 3_600, 31 * 24 * 3600]))
    def time_passes(self, seconds: int) -> None:
        self.clock.now += seconds
        now = int(self.clock.now)
        names = escrows.due(self.connection, now=now, limit=100)
        for model in self.models:
            if model.deal.hash in names:
                model.paid = model.shown
        for name in names:
            self.apply(lambda c, n=name: self.coordinator.escrows._expire_if_due(c, n, now))

    @invariant()
    def money_is_conserved(self) -> None:
        found = ledger.audit(self.connection)
        assert found["balanced"], found
        assert found["sum_nanos"] == 0
        assert ledger.balance(self.connection, TEST_CREDIT) == -self.given

    @invariant()
    def every_session_is_as_the_model_says(self) -> None:
        expected = {party.name: FUNDS for party in PARTIES}
        fees = 0
        for model in self.models:
            escrow = escrows.find(self.connection, model.deal.hash)
            assert escrow is not None
            expected[model.deal.buyer.name] -= escrow.cap
            if model.paid is None:
                assert escrow.voucher_total == model.shown
                assert ledger.balance(self.connection, escrow.account) == escrow.cap
                continue
            assert escrow.final
            assert escrow.paid == model.paid <= escrow.cap
            assert ledger.balance(self.connection, escrow.account) == 0
            fee = model.paid * 500 // 10_000
            fees += fee
            expected[model.deal.seller.name] += model.paid - fee
            expected[model.deal.buyer.name] += escrow.cap - model.paid
        for name, amount in expected.items():
            assert ledger.balance(self.connection, name) == amount
        assert ledger.balance(self.connection, "fees") == fees

    @invariant()
    def one_receipt_per_settled_session(self) -> None:
        rows = all_rows(self.connection, "SELECT leaf FROM receipt ORDER BY leaf")
        settled = sum(model.paid is not None for model in self.models)
        assert [row[0] for row in rows] == list(range(settled))
        assert self.coordinator.log.head.size == settled


MarketMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
class TestMarketMachine(MarketMachine.TestCase):  # type: ignore[misc, valid-type]
    """Runs the machine."""
