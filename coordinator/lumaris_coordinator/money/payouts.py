"""Payouts: money leaves a wallet when it is asked for, and the market when the provider has paid.

In between it stands in an account of its own, so no step can be lost or done twice: the state is
stored before the provider is asked, and the provider is asked under our id until it answers what
became of it. What it refuses goes back to the wallet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from lumaris_coordinator.bounds import (
    PAYOUT_NANOS_MIN,
    PAYOUT_REQUEST_LIFETIME_S,
    PAYOUT_RETRY_S_MAX,
    PAYOUT_RETRY_S_MIN,
    PAYOUT_ROUND_S,
    PAYOUTS_OPEN_PER_ACCOUNT_MAX,
    PAYOUTS_PER_ROUND_MAX,
)
from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.identity.store import member, revoked_account
from lumaris_coordinator.ledger.store import Leg, balance, move, open_account, wallet
from lumaris_coordinator.money import store
from lumaris_coordinator.money.port import FundingAdapter, PayoutOrder, PayoutStatus
from lumaris_coordinator.money.provider import asked
from lumaris_coordinator.money.store import Payout
from lumaris_coordinator.store.port import Connection
from lumaris_coordinator.upkeep.freeze import is_frozen, require_thawed
from lumaris_protocol import codec
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import derive_id
from lumaris_protocol.messages.money import PayoutRequest
from lumaris_protocol.money import format_credits

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context
    from lumaris_coordinator.identity.service import Caller

log = logging.getLogger(__name__)


class Payouts:
    """Takes requests and sees them through."""

    def __init__(
        self,
        context: Context,
        adapters: Mapping[tuple[str, str], FundingAdapter],
        *,
        steady: anyio.Lock,
    ) -> None:
        self._context, self._adapters = context, adapters
        self._steady = steady  # held while providers are told to pay, and while books are compared
        self._wake = anyio.Event()

    async def request(self, body: bytes) -> dict[str, Any]:
        """Hold what a signed PayoutRequest takes out; the same nonce is the same payout.

        Raises EnvelopeError, and LumarisError: `wrong_domain`, `not_certified`, `revoked`,
        `usage`, `idempotency_mismatch`, `too_many`, `no_funds`, `payouts_frozen`, `frozen`, `busy`.
        """
        context, now = self._context, self._context.now()
        found = codec.open_signed(body, PayoutRequest, network=context.settings.network)
        message = found.message
        if found.signer != message.peer:
            raise LumarisError("wrong_signer", "A peer can take out only its own money.")
        if message.coordinator not in context.keys.peers():
            raise LumarisError("wrong_domain", "The request names another coordinator.")

        def operation(connection: Connection) -> dict[str, Any]:
            name = derive_id("transfer", f"{message.peer}/{message.nonce}".encode())
            known = store.find(connection, name)
            if known is not None:
                return _repeated(known, message)
            owner = member(connection, message.peer)
            if owner is None:
                raise LumarisError("not_certified", "The peer is not registered here.")
            codec.check_times(
                issued_at=message.issued_at,
                expires_at=message.issued_at + PAYOUT_REQUEST_LIFETIME_S,
                now=now,
                what="payout request",
            )
            return self._open(
                connection,
                payout=name,
                party=message.peer,
                owner=owner,
                adapter=message.adapter,
                currency=message.currency,
                amount=message.amount_nanos,
                now=now,
            )

        answer = await context.store.submit(operation)
        self.wake()
        return answer

    def request_of(
        self, caller: Caller, *, adapter: str, currency: str, amount_nanos: int, peer: str = ""
    ) -> Callable[[Connection], dict[str, Any]]:
        """The operation of an unsigned request, to be run once under its Idempotency-Key.

        With `peer` an operator takes out what a revoked peer left: its own key no longer can. It
        raises as `request` does, and `forbidden` or `not_found` for a peer that is not revoked.
        """
        now = self._context.now()
        if peer:
            caller.require("operator")

        def operation(connection: Connection) -> dict[str, Any]:
            owner = caller.account
            if peer:
                owner = revoked_account(connection, peer)
            elif caller.kind == "peer":
                member(connection, caller.peer)  # it may have been revoked since it was let in
            account = wallet(owner, currency)
            count = store.number_of_account(connection, account)
            name = derive_id("transfer", f"{caller.id}/{account}/{count}".encode())
            return self._open(
                connection,
                payout=name,
                party=caller.id,
                owner=owner,
                adapter=adapter,
                currency=currency,
                amount=amount_nanos,
                now=now,
            )

        return operation

    def _open(
        self,
        connection: Connection,
        *,
        payout: str,
        party: str,
        owner: str,
        adapter: str,
        currency: str,
        amount: int,
        now: int,
    ) -> dict[str, Any]:
        require_thawed(connection)
        key = (adapter, currency)
        if key not in self._adapters:
            raise LumarisError("usage", f"{adapter} does not pay out {currency} here.")
        if amount < PAYOUT_NANOS_MIN:
            least = format_credits(PAYOUT_NANOS_MIN)
            raise LumarisError("usage", f"The smallest payout is {least}.")
        if store.differing(connection, [key]):
            raise LumarisError("payouts_frozen")
        account = wallet(owner, currency)
        if store.open_of_account(connection, account) >= PAYOUTS_OPEN_PER_ACCOUNT_MAX:
            raise LumarisError(
                "too_many", f"{PAYOUTS_OPEN_PER_ACCOUNT_MAX} payouts of this account are under way."
            )
        if balance(connection, account) < amount:
            raise LumarisError("no_funds", "The free balance is below the payout.")
        held_in = open_account(
            connection, owner=f"payout:{payout}", kind="escrow", currency=currency
        )
        legs = [Leg(account, held_in, amount)]
        move(connection, kind="payout_hold", ref=payout, legs=legs, now=now)
        asked_for = store.insert(
            connection,
            payout=payout,
            party=party,
            account=account,
            held_in=held_in,
            adapter=adapter,
            currency=currency,
            amount=amount,
            now=now,
        )
        held = store.advance(connection, asked_for, "held", now=now)
        _tell(connection, "payout.requested", held, now)
        return held.view()

    async def listed(
        self, caller: Caller, *, currency: str, after: int, limit: int
    ) -> dict[str, Any]:
        """A page of the caller's payouts; `next` continues after it, null at the end."""
        account = wallet(caller.account, currency)
        found = await self._context.store.read(
            lambda connection: store.of_account(connection, account, after=after, limit=limit + 1)
        )
        page = [payout.view() for payout in found[:limit]]
        return {"payouts": page, "next": page[-1]["number"] if len(found) > limit else None}

    async def show(self, caller: Caller, payout: str) -> dict[str, Any]:
        """One payout of the caller's. Raises LumarisError `not_found`."""
        found = await self._context.store.read(lambda connection: store.find(connection, payout))
        own = found is not None and wallet(caller.account, found.currency) == found.account
        if found is None or not (own or found.party == caller.id):
            raise LumarisError("not_found", "There is no such payout of yours.")
        return found.view()

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    async def keep(self) -> None:
        """Send what is due, at once when woken, for as long as the program runs."""
        while True:
            with anyio.move_on_after(PAYOUT_ROUND_S):
                await self._wake.wait()
            self._wake = anyio.Event()
            try:
                await self.round()
            except Exception:
                log.exception("the round of payouts failed; the next is in %d s", PAYOUT_ROUND_S)

    async def round(self) -> int:
        """Ask the providers about every payout that is due, up to a bound; how many came to rest.

        Safe to be repeated and to run in several replicas: the state decides, and a provider pays
        one id once.
        """
        done = 0
        async with self._steady:
            now = self._context.now()
            due = await self._context.store.read(
                lambda connection: store.due(connection, now=now, limit=PAYOUTS_PER_ROUND_MAX)
            )
            for payout in due:
                # Asked anew for each: what is turned off must stop what is under way as well.
                stopped = await self._context.store.read(partial(self._stopped, payout))
                done += await self._follow(payout, may_pay=not stopped)
        return done

    def _stopped(self, payout: Payout, connection: Connection) -> bool:
        """Whether no provider may be told to pay it: the switch is on, or its books differ."""
        key = (payout.adapter, payout.currency)
        return is_frozen(connection) or bool(store.differing(connection, [key]))

    async def _follow(self, payout: Payout, *, may_pay: bool) -> bool:
        adapter = self._adapters.get((payout.adapter, payout.currency))
        status = PayoutStatus(state="pending")
        try:
            if adapter is not None and (may_pay or payout.state == "sent"):
                status = await self._ask(adapter, payout, may_pay=may_pay)
        except Exception:
            log.exception("payout %s could not be followed; it is tried again", payout.id)
        return await self._context.store.submit(
            lambda connection: _apply(connection, payout.id, status, now=self._context.now())
        )

    async def _ask(self, adapter: FundingAdapter, payout: Payout, *, may_pay: bool) -> PayoutStatus:
        """What became of it; told to pay when it was not asked before."""
        if payout.state == "held":
            now = self._context.now()
            await self._context.store.submit(
                lambda connection: _mark_sent(connection, payout.id, now=now)
            )
        else:
            status = await asked(adapter.status(payout.id))
            if status.state != "unknown" or not may_pay:
                return status
        order = PayoutOrder(
            id=payout.id,
            account=payout.account,
            currency=payout.currency,
            amount_nanos=payout.amount,
        )
        return await asked(adapter.pay(order))


def _mark_sent(connection: Connection, payout: str, *, now: int) -> None:
    """Before the provider is asked: from here on only the provider knows what became of it."""
    found = store.find(connection, payout)
    if found is not None and found.state == "held":
        store.advance(connection, found, "sent", now=now)


def _apply(connection: Connection, payout: str, status: PayoutStatus, *, now: int) -> bool:
    """Take what the provider says; whether the payout has come to rest by it."""
    found = store.find(connection, payout)
    if found is None or found.state not in ("held", "sent"):
        return False
    if found.state == "sent" and status.state == "paid":
        _pay(connection, found, status, now)
        return True
    if found.state == "sent" and status.state == "refused":
        _return(connection, found, status, now)
        return True
    wait = min(PAYOUT_RETRY_S_MAX, PAYOUT_RETRY_S_MIN << min(found.tries, 16))
    store.postpone(connection, payout, next_at=now + wait)
    return False


def _pay(connection: Connection, payout: Payout, status: PayoutStatus, now: int) -> None:
    outside = open_account(
        connection,
        owner=f"external:{payout.adapter}",
        kind="external",
        currency=payout.currency,
        may_negative=True,
    )
    legs = [Leg(payout.held_in, outside, payout.amount)]
    move(connection, kind="payout", ref=payout.id, legs=legs, now=now)
    paid = store.advance(connection, payout, "paid", now=now, reference=status.reference[:200])
    _tell(connection, "payout.paid", paid, now)


def _return(connection: Connection, payout: Payout, status: PayoutStatus, now: int) -> None:
    reason = status.reason[:200]
    failed = store.advance(connection, payout, "refused", now=now, reason=reason)
    legs = [Leg(payout.held_in, payout.account, payout.amount)]
    move(connection, kind="payout_return", ref=payout.id, legs=legs, now=now)
    returned = store.advance(connection, failed, "returned", now=now)
    _tell(connection, "account.credited", returned, now)


def _tell(connection: Connection, kind: str, payout: Payout, now: int) -> None:
    emit(connection, kind, ref=payout.id, parties=[payout.party], body=payout.view(), now=now)


def _repeated(known: Payout, message: PayoutRequest) -> dict[str, Any]:
    if (known.amount, known.currency, known.adapter) != (
        message.amount_nanos,
        message.currency,
        message.adapter,
    ):
        raise LumarisError("idempotency_mismatch", "The nonce was used for another payout.")
    return known.view()
