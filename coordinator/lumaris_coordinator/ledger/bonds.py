"""Bonds: money of a peer that answers for its conduct. Runs inside an operation of the writer.

A peer's bond in a currency is the account of the owner `bond:<peer>`. What a dispute takes, from a
bond or from a wallet, lies in the account of `dispute:<id>` until the dispute gives it out again.
"""

from __future__ import annotations

from collections.abc import Iterable

from lumaris_coordinator.identity.store import account_of
from lumaris_coordinator.ledger.store import (
    Leg,
    balance,
    currency_of,
    move,
    open_account,
    open_wallet,
    wallet,
)
from lumaris_coordinator.store.port import Connection, first
from lumaris_protocol.money import bond_band


def account_of_bond(peer: str, currency: str) -> str:
    """The account of a peer's bond."""
    return wallet(f"bond:{peer}", currency)


def account_of_dispute(dispute: str, currency: str) -> str:
    """The account of what a dispute has taken and not given out yet."""
    return wallet(f"dispute:{dispute}", currency)


def free(connection: Connection, peer: str, currency: str) -> int:
    """Nanos of a peer's bond that a dispute can take now. What waits for its release is among
    them: that is what the wait is for."""
    return balance(connection, account_of_bond(peer, currency))


def take(connection: Connection, *, source: str, ref: str, amount: int, now: int) -> None:
    """Move nanos from a bond's or wallet's account into the dispute `ref`.

    Raises LumarisError `no_funds` when the account has less.
    """
    currency = currency_of(source)
    target = open_account(connection, owner=f"dispute:{ref}", kind="dispute", currency=currency)
    move(connection, kind="dispute_take", ref=ref, legs=[Leg(source, target, amount)], now=now)


def give(connection: Connection, *, ref: str, to: str, amount: int, now: int) -> None:
    """Move nanos out of the dispute `ref` to an account, which must exist.

    Raises LumarisError `no_funds` when the dispute has taken less.
    """
    source = account_of_dispute(ref, currency_of(to))
    move(connection, kind="dispute_give", ref=ref, legs=[Leg(source, to, amount)], now=now)


def give_out(
    connection: Connection, *, ref: str, parts: Iterable[tuple[str, int]], now: int
) -> None:
    """`give` to each of these accounts its nanos; parts of nothing are left out."""
    for to, amount in parts:
        if amount:
            give(connection, ref=ref, to=to, amount=amount, now=now)


def wallet_of(connection: Connection, peer: str, currency: str) -> str:
    """The wallet of a registered peer's owner, made when there is none yet."""
    owner = account_of(connection, peer)
    assert owner is not None
    return open_wallet(connection, owner, currency)


def band(connection: Connection, peer: str, currency: str) -> int:
    """The band of what the peer has locked and not asked back, for its certificate."""
    return bond_band(free(connection, peer, currency) - releasing(connection, peer, currency))


def releasing(connection: Connection, peer: str, currency: str) -> int:
    """Nanos of a peer's bond that wait for their release."""
    row = first(
        connection,
        "SELECT coalesce(sum(amount), 0) FROM bond_release"
        " WHERE peer = ? AND currency = ? AND paid IS NULL",
        (peer, currency),
    )
    return int(row[0]) if row else 0


def extend_releases(connection: Connection, *, seconds: int) -> None:
    """Move every release by some downtime: nobody could dispute meanwhile."""
    connection.execute("UPDATE bond_release SET due = due + ? WHERE paid IS NULL", (seconds,))
