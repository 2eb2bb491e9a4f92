"""The provider inside: test credit, given on a signed request and taken back by payouts.

Its books are the rows of credits given and of payouts taken. They are written apart from the
ledger's transfers, so comparing the two finds a fault in either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from lumaris_coordinator.bounds import DEPOSITS_PAGE_MAX
from lumaris_coordinator.money.port import DepositEvent, PayoutOrder, PayoutStatus
from lumaris_coordinator.store.port import Connection, all_rows, first

if TYPE_CHECKING:
    from lumaris_coordinator.store.store import Store

NAME: Final = "test-credit"


class TestCredit:
    """Test credit of one currency."""

    __test__ = False  # a name that pytest would take for a test

    def __init__(self, store: Store, *, currency: str) -> None:
        self.name, self.currency = NAME, currency
        self._store = store

    async def deposits(self, after: str) -> Sequence[DepositEvent]:
        """Credits given behind a position; each was credited in the transaction that gave it."""
        rows = await self._store.read(
            lambda connection: all_rows(
                connection,
                "SELECT credit.txn, credit.account, nonce, amount FROM credit"
                " JOIN account ON account.id = credit.account"
                " WHERE credit.txn > ? AND currency = ? ORDER BY credit.txn LIMIT ?",
                (int(after or 0), self.currency, DEPOSITS_PAGE_MAX),
            )
        )
        return [
            DepositEvent(
                id=f"{account}/{nonce}",
                position=str(txn),
                account=account,
                amount_nanos=amount,
                fact="settled",
                txn=txn,
            )
            for txn, account, nonce, amount in rows
        ]

    async def pay(self, order: PayoutOrder) -> PayoutStatus:
        """Take the money back; at once."""

        def operation(connection: Connection) -> None:
            connection.execute(
                "INSERT INTO test_credit_payout (id, currency, amount) VALUES (?, ?, ?)"
                " ON CONFLICT (id) DO NOTHING",
                (order.id, order.currency, order.amount_nanos),
            )

        await self._store.submit(operation)
        return await self.status(order.id)

    async def status(self, payout: str) -> PayoutStatus:
        """Whether it was taken."""
        row = await self._store.read(
            lambda connection: first(
                connection, "SELECT 1 FROM test_credit_payout WHERE id = ?", (payout,)
            )
        )
        return PayoutStatus(state="paid" if row else "unknown", reference=payout if row else "")

    async def provider_total(self) -> int:
        """What was given and not taken back."""
        return await self._store.scan(self._total)

    def _total(self, connection: Connection) -> int:
        given = first(
            connection,
            "SELECT CAST(coalesce(sum(amount), 0) AS BIGINT) FROM credit"
            " JOIN account ON account.id = credit.account WHERE currency = ?",
            (self.currency,),
        )
        taken = first(
            connection,
            "SELECT CAST(coalesce(sum(amount), 0) AS BIGINT) FROM test_credit_payout"
            " WHERE currency = ?",
            (self.currency,),
        )
        assert given is not None
        assert taken is not None
        return int(given[0]) - int(taken[0])
