"""Escrows as their parties see them."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from lumaris_coordinator.disputes.store import sellers_with_bond
from lumaris_coordinator.escrow import store
from lumaris_coordinator.escrow.claims import kept
from lumaris_coordinator.escrow.store import Escrow
from lumaris_coordinator.ledger import bonds
from lumaris_coordinator.store.port import Connection, first
from lumaris_protocol import codec, envelope
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.negotiation import Agreement, PriceTerms

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context
    from lumaris_coordinator.identity.service import Caller


async def show(context: Context, session: str, caller: Caller) -> dict[str, Any]:
    """A party's view of its session's money. Raises LumarisError `not_found`."""
    return await context.store.read(lambda connection: _show(context, connection, session, caller))


def _show(context: Context, connection: Connection, session: str, caller: Caller) -> dict[str, Any]:
    escrow = store.find_of_parties(connection, session, sorted(caller.peers))
    if escrow is None:
        raise LumarisError("not_found", "There is no such session of yours.")
    return {
        **_view(context, connection, escrow),
        "events": store.events(connection, escrow.agreement_hash),
    }


async def claims(context: Context, session: str, caller: Caller) -> dict[str, Any]:
    """The claims on a session's money that may be evidence, each as it was signed, in base64, and
    what a dispute could win: what was paid, both sides' bonds, and how many sellers could check.

    Raises LumarisError `not_found`.
    """

    def look(connection: Connection) -> dict[str, Any]:
        escrow = store.find_of_parties(connection, session, sorted(caller.peers))
        if escrow is None:
            raise LumarisError("not_found", "There is no such session of yours.")
        checkers = sellers_with_bond(
            connection,
            parties=(escrow.buyer, escrow.seller),
            currency=escrow.currency,
            drawn=(),
            now=context.now(),
        )
        return {
            "paid_nanos": escrow.paid,
            "buyer_bond_nanos": bonds.free(connection, escrow.buyer, escrow.currency),
            "seller_bond_nanos": bonds.free(connection, escrow.seller, escrow.currency),
            "checkers": len(checkers),
            "claims": [
                {
                    "by": one.party,
                    "taken": one.taken,
                    "document": base64.b64encode(one.document).decode(),
                    "at": one.at,
                }
                for one in kept(connection, escrow.agreement_hash)
            ],
        }

    return await context.store.read(look)


async def page(
    context: Context, caller: Caller, *, after: int, limit: int, state: str | None
) -> dict[str, Any]:
    """A page of the caller's escrows, oldest first; `next` continues after it, null at the end."""

    def look(connection: Connection) -> dict[str, Any]:
        found = store.page_of_parties(
            connection, sorted(caller.peers), after=after, limit=limit + 1, state=state
        )
        shown = found[:limit]
        more = len(found) > limit
        return {
            "escrows": [_view(context, connection, escrow) for escrow in shown],
            "next": shown[-1].number if more else None,
        }

    return await context.store.read(look)


def _view(context: Context, connection: Connection, escrow: Escrow) -> dict[str, Any]:
    receipt = first(
        connection, "SELECT id FROM receipt WHERE agreement_hash = ?", (escrow.agreement_hash,)
    )
    return {
        "number": escrow.number,
        "session": escrow.session,
        "agreement_hash": escrow.agreement_hash,
        "buyer": escrow.buyer,
        "seller": escrow.seller,
        "currency": escrow.currency,
        "state": escrow.state,
        "version": escrow.version,
        "cap_nanos": escrow.cap,
        "vouchered_nanos": escrow.voucher_total,
        "paid_nanos": escrow.paid,
        "held_nanos": escrow.remainder,
        "disputes_open": escrow.disputes,
        "granted_at": escrow.granted_at,
        "ends_at": escrow.not_after,
        "settle_by": escrow.settle_by,
        "runway_s": _runway(context, escrow),
        "receipt": receipt[0] if receipt else None,
    }


def _runway(context: Context, escrow: Escrow) -> int:
    """Seconds for which the session can still run at its full rate: until what was not vouchered
    here is spent, and no longer than the agreement lasts."""
    if escrow.state != "held":
        return 0
    terms = _terms(escrow)
    left = max(0, escrow.not_after - context.now())
    if not terms.rate_nanos_per_s:
        return left
    return min(left, (escrow.cap - escrow.voucher_total) // terms.rate_nanos_per_s)


def _terms(escrow: Escrow) -> PriceTerms:
    # Our own row: its signatures were checked when the money was held.
    payload = envelope.decode(escrow.by_buyer).payload
    return codec.decode_payload(payload, Agreement).terms
