"""What accounts may ask of the ledger: their money, test credit, and whether it all adds up."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import anyio

from lumaris_coordinator.bounds import (
    AUDIT_FAST_S,
    AUDIT_REST_FACTOR,
    CREDIT_NANOS_MIN,
    CREDITS_PER_ACCOUNT_MAX,
    REQUEST_CREDIT_LIFETIME_S,
)
from lumaris_coordinator.disputes.store import bonds_in
from lumaris_coordinator.escrow.store import held_of_buyers
from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.identity.store import member
from lumaris_coordinator.ledger import store
from lumaris_coordinator.ledger.store import FEES, TEST_CREDIT
from lumaris_coordinator.store.port import Connection, first
from lumaris_coordinator.upkeep.freeze import require_thawed
from lumaris_protocol import codec
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.budget import CreditRequest
from lumaris_protocol.money import format_credits

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context
    from lumaris_coordinator.identity.service import Caller


class Ledger:
    """Accounts of the peers, the fees and the world outside."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._audited: dict[str, Any] | None = None
        self._audit_after = 0.0
        self._auditing = anyio.Lock()

    def open_accounts(self, connection: Connection) -> None:
        """The accounts that always exist. An operation for the writer."""
        settings = self._context.settings
        for currency in settings.currencies:
            store.open_account(connection, owner=FEES, kind="fees", currency=currency)
        store.open_account(
            connection,
            owner=TEST_CREDIT,
            kind="external",
            currency=settings.currency,
            may_negative=True,
        )

    async def give_credit(self, body: bytes) -> dict[str, Any]:
        """Test credit for a signed CreditRequest; the same nonce is the same credit and answer.

        Raises LumarisError: `usage` for less than CREDIT_NANOS_MIN, `credit_limit`,
        `not_certified`, `revoked`, `idempotency_mismatch`, `busy`.
        """
        context, now = self._context, self._context.now()
        request = codec.open_signed(body, CreditRequest, network=context.settings.network)
        message = request.message
        if request.signer != message.peer:
            raise LumarisError("wrong_signer")
        context.keys.check(message.coordinator)
        codec.check_times(
            issued_at=message.issued_at,
            expires_at=message.issued_at + REQUEST_CREDIT_LIFETIME_S,
            now=now,
            what="credit request",
        )
        if message.amount_nanos < CREDIT_NANOS_MIN:
            raise LumarisError(
                "usage",
                f"The smallest credit is {format_credits(CREDIT_NANOS_MIN)}.",
                hint="Ask for more at once.",
            )
        return await context.store.submit(lambda connection: self._give(connection, message, now))

    def _give(self, connection: Connection, message: CreditRequest, now: int) -> dict[str, Any]:
        owner = member(connection, message.peer)
        if owner is None:
            raise LumarisError("not_certified", "The peer is not registered here.")
        account = store.wallet(owner, self._context.settings.currency)
        given = first(
            connection,
            "SELECT amount, txn FROM credit WHERE account = ? AND nonce = ?",
            (account, message.nonce),
        )
        if given is None:
            txn = self._give_new(connection, account, message, now)
        elif given[0] == message.amount_nanos:
            txn = given[1]
        else:
            raise LumarisError("idempotency_mismatch", "The nonce was used for another amount.")
        # A signed document may be carried by anybody: what it answers is no look at a wallet.
        return {
            "account": owner,
            "peer": message.peer,
            "currency": store.currency_of(account),
            "credited_nanos": message.amount_nanos,
            "transaction": txn,
        }

    def _give_new(
        self, connection: Connection, account: str, message: CreditRequest, now: int
    ) -> int:
        require_thawed(connection)
        given, number = store.credit_given(connection, account)
        limit = self._context.settings.test_credit_nanos
        if given + message.amount_nanos > limit:
            raise LumarisError(
                "credit_limit", f"{given} of {limit} nanos of test credit were given before."
            )
        if number >= CREDITS_PER_ACCOUNT_MAX:
            raise LumarisError("credit_limit", f"Test credit was given {number} times before.")
        txn = store.give_credit(
            connection, account, nonce=message.nonce, amount_nanos=message.amount_nanos, now=now
        )
        emit(
            connection,
            "account.credited",
            ref=account,
            parties=(message.peer,),
            body={
                "kind": "test_credit",
                "currency": store.currency_of(account),
                "amount_nanos": message.amount_nanos,
                "transaction": txn,
            },
            now=now,
        )
        return txn

    async def account(self, caller: Caller) -> dict[str, Any]:
        """The caller's money by currency: free, held in open sessions, and put down in
        open disputes."""
        return await self._context.store.read(
            lambda connection: self._summary(connection, caller.account, caller.peer, caller.peers)
        )

    def _summary(
        self, connection: Connection, account: str, peer: str, peers: Collection[str]
    ) -> dict[str, Any]:
        main, held = self._context.settings.currency, held_of_buyers(connection, sorted(peers))
        disputed = bonds_in(connection, sorted(peers))
        names = dict.fromkeys((main, *store.currencies_of(connection, account), *held, *disputed))
        wallets = [
            {
                "currency": currency,
                "free_nanos": store.balance(connection, store.wallet(account, currency)),
                "held_nanos": held.get(currency, (0, 0))[0],
                "sessions_open": held.get(currency, (0, 0))[1],
                "disputed_nanos": disputed.get(currency, 0),
            }
            for currency in names
        ]
        return {"account": account, "peer": peer, **wallets[0], "wallets": wallets}

    async def transfers(
        self, caller: Caller, *, currency: str | None, after: int, limit: int
    ) -> dict[str, Any]:
        """A page of the transfers of the caller's wallet in a currency, the main one without;
        `next` continues after it, null at the end."""
        account = store.wallet(caller.account, currency or self._context.settings.currency)
        found = await self._context.store.read(
            lambda connection: store.transfers(connection, account, after=after, limit=limit + 1)
        )
        page = found[:limit]
        more = len(found) > limit
        return {"transfers": page, "next": page[-1]["transfer"] if more else None}

    async def audit(self) -> dict[str, Any]:
        """As `store.audit`, in a thread. Computed once per state of the ledger, by one at a time,
        and rarely when it is slow: `last_transfer` says how far it looked."""
        async with self._auditing:
            newest = await self._context.store.read(store.last_transfer)
            known, begun = self._audited, time.monotonic()
            if known is None or (known["last_transfer"] != newest and begun >= self._audit_after):
                self._audited = known = await self._context.store.scan(store.audit)
                took = time.monotonic() - begun
                rest = AUDIT_REST_FACTOR * took if took > AUDIT_FAST_S else 0.0
                self._audit_after = begun + took + rest
            return known
