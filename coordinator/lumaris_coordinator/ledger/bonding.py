"""Locking and releasing bonds: what a peer asks, and the timers that pay it back once."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from lumaris_coordinator.bounds import (
    BOND_NANOS_MIN,
    BOND_RELEASES_PER_PEER_MAX,
    BOND_RELEASES_PER_ROUND_MAX,
    BOND_REQUEST_KEPT_S,
    BOND_REQUEST_LIFETIME_S,
)
from lumaris_coordinator.disputes import liens, store
from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.identity.store import member
from lumaris_coordinator.ledger import bonds
from lumaris_coordinator.ledger.store import Leg, currencies_of, move, open_account, open_wallet
from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_protocol import codec
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.budget import BondRequest
from lumaris_protocol.money import format_credits

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context
    from lumaris_coordinator.identity.service import Caller

log = logging.getLogger(__name__)

# A bond stays while a dispute that its owner did not open itself is open.
_DUE: Final = (
    "SELECT id, peer, currency, amount FROM bond_release WHERE paid IS NULL AND due <= ?"
    " AND NOT EXISTS (SELECT 1 FROM dispute WHERE opener <> bond_release.peer"
    " AND bond_release.peer IN (buyer, seller) AND state IN ('opened', 'evidence', 'checking'))"
)


class Bonds:
    """The bonds of all peers."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def apply(self, body: bytes) -> bytes:
        """Apply a signed BondRequest; the peer's bonds as JSON. The same bytes, the same answer.

        Raises EnvelopeError, or LumarisError: `usage`, `terms_refused`, `not_certified`,
        `revoked`, `no_funds`, `too_many_holds`, `idempotency_mismatch`, `busy`.
        """
        context, now = self._context, self._context.now()
        request = codec.open_signed(body, BondRequest, network=context.settings.network)
        message = request.message
        if request.signer != message.peer:
            raise LumarisError("wrong_signer")
        context.keys.check(message.coordinator)
        codec.check_times(
            issued_at=message.issued_at,
            expires_at=message.issued_at + BOND_REQUEST_LIFETIME_S,
            now=now,
            what="bond request",
        )
        if message.amount_nanos < BOND_NANOS_MIN:
            raise LumarisError(
                "usage",
                f"The least that is locked or released is {format_credits(BOND_NANOS_MIN)}.",
            )
        return await context.store.submit(
            lambda connection: self._apply(connection, message, request.hash, now)
        )

    def _apply(
        self, connection: Connection, message: BondRequest, document: str, now: int
    ) -> bytes:
        known = first(
            connection,
            "SELECT document, answer FROM bond_request WHERE peer = ? AND nonce = ?",
            (message.peer, message.nonce),
        )
        if known is not None and known[0] != document:
            raise LumarisError("idempotency_mismatch", "The nonce was used for another request.")
        if known is not None:
            return bytes(known[1])
        owner = member(connection, message.peer)
        if owner is None:
            raise LumarisError("not_certified", "The peer is not registered here.")
        if message.action == "lock":
            self._lock(connection, message, owner, now)
        else:
            self._ask_back(connection, message, now)
        answer = msgspec.json.encode(
            {"peer": message.peer, "account": owner, "bonds": _bonds_of(connection, message.peer)}
        )
        connection.execute(
            "INSERT INTO bond_request (peer, nonce, document, answer, at) VALUES (?, ?, ?, ?, ?)",
            (message.peer, message.nonce, document, answer, now),
        )
        return answer

    def _lock(self, connection: Connection, message: BondRequest, owner: str, now: int) -> None:
        currency = message.currency
        if currency not in self._context.settings.currencies:
            raise LumarisError("terms_refused", f"There is no currency {currency} here.")
        source = open_wallet(connection, owner, currency)
        target = open_account(
            connection, owner=f"bond:{message.peer}", kind="bond", currency=currency
        )
        legs = [Leg(source, target, message.amount_nanos)]
        move(connection, kind="bond_lock", ref=message.peer, legs=legs, now=now)
        liens.serve(connection, message.peer, currency, now=now)
        _tell(connection, "bond.locked", message.peer, currency, message.amount_nanos, now)

    def _ask_back(self, connection: Connection, message: BondRequest, now: int) -> None:
        peer, currency = message.peer, message.currency
        left = bonds.free(connection, peer, currency) - bonds.releasing(connection, peer, currency)
        if message.amount_nanos > left:
            raise LumarisError("no_funds", f"{max(0, left)} nanos are locked and not asked back.")
        row = first(
            connection,
            "SELECT count(*) FROM bond_release WHERE peer = ? AND paid IS NULL",
            (peer,),
        )
        if row is not None and row[0] >= BOND_RELEASES_PER_PEER_MAX:
            raise LumarisError("too_many_holds", f"{row[0]} releases of this peer are waiting.")
        connection.execute(
            "INSERT INTO bond_release (id, peer, currency, amount, due)"
            " VALUES ((SELECT coalesce(max(id), 0) + 1 FROM bond_release), ?, ?, ?, ?)",
            (peer, currency, message.amount_nanos, now + self._context.settings.bond_release_s),
        )

    async def show(self, caller: Caller) -> dict[str, Any]:
        """The bonds of the caller's peers."""
        return await self._context.store.read(
            lambda connection: {
                "bonds": [
                    {"peer": peer, **bond}
                    for peer in sorted(caller.peers)
                    for bond in _bonds_of(connection, peer)
                ]
            }
        )

    async def run_chores(self) -> int:
        """Pay the releases that are due, up to a bound per round, what is owed before, and forget
        requests that could not be repeated anyway; how many releases were paid."""
        context, now = self._context, self._context.now()
        owing = await context.store.read(
            partial(store.bonds_owing, limit=BOND_RELEASES_PER_ROUND_MAX)
        )
        for peer, currency in owing:
            await context.store.submit(partial(liens.serve, peer=peer, currency=currency, now=now))
        names = await context.store.read(lambda connection: _due(connection, now))
        paid = 0
        for number in names:
            try:
                paid += await context.store.submit(partial(_release, number=number, now=now))
            except Exception:
                log.exception("bond release %d could not be paid", number)
        await context.store.submit(
            lambda connection: (
                connection.execute(
                    "DELETE FROM bond_request WHERE at < ?", (now - BOND_REQUEST_KEPT_S,)
                ).rowcount
            )
        )
        return paid


def _due(connection: Connection, now: int) -> list[int]:
    rows = all_rows(connection, _DUE + " ORDER BY due LIMIT ?", (now, BOND_RELEASES_PER_ROUND_MAX))
    return [int(row[0]) for row in rows]


def _release(connection: Connection, *, number: int, now: int) -> int:
    """Pay one release once; 1 when it was paid. What a dispute took is not there any more."""
    row = first(connection, _DUE + " AND id = ?", (now, number))
    if row is None:
        return 0
    peer, currency, asked = str(row[1]), str(row[2]), int(row[3])
    free = bonds.free(connection, peer, currency)
    if free and store.owed_by(connection, peer, currency, limit=1):
        return 0  # what is owed comes first, in the next rounds
    amount = min(asked, free)
    target = bonds.wallet_of(connection, peer, currency)
    legs = [Leg(bonds.account_of_bond(peer, currency), target, amount)]
    if amount:
        move(connection, kind="bond_release", ref=peer, legs=legs, now=now)
    connection.execute("UPDATE bond_release SET paid = ? WHERE id = ?", (amount, number))
    _tell(connection, "bond.released", peer, currency, amount, now)
    return 1


def _bonds_of(connection: Connection, peer: str) -> list[dict[str, Any]]:
    return [
        {
            "currency": currency,
            "locked_nanos": bonds.free(connection, peer, currency),
            "owed_nanos": store.owed_in_all(connection, peer, currency),
            "band": bonds.band(connection, peer, currency),
            "releases": [
                {"amount_nanos": amount, "due": due}
                for amount, due in all_rows(
                    connection,
                    "SELECT amount, due FROM bond_release"
                    " WHERE peer = ? AND currency = ? AND paid IS NULL ORDER BY due LIMIT ?",
                    (peer, currency, BOND_RELEASES_PER_PEER_MAX),
                )
            ],
        }
        for currency in currencies_of(connection, f"bond:{peer}")
    ]


def _tell(
    connection: Connection, kind: str, peer: str, currency: str, amount: int, now: int
) -> None:
    body = {"peer": peer, "currency": currency, "amount_nanos": amount}
    emit(connection, kind, ref=peer, parties=(peer,), body=body, now=now)
