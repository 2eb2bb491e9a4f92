"""An escrow brought to any of its states, as its parties and disputes do it."""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import Any

from lumaris_coordinator.escrow.disputed import award, freeze
from lumaris_coordinator.escrow.store import Escrow
from lumaris_protocol import codec, receipts
from lumaris_protocol.ids import derive_id, digest
from lumaris_protocol.messages.dispute import Facts, Ruling
from lumaris_protocol.messages.receipt import Receipt
from tests.coordinator.builders import (
    CAP,
    NETWORK,
    START,
    Deal,
    Market,
    Party,
)

FUNDS = 5 * CAP
NUMBERS = count(1)


async def setting(market: Market, name: str = "") -> tuple[Deal, bytes]:
    """A granted deal between a funded buyer and a seller."""
    buyer, seller = await market.party("buyer" + name, FUNDS), await market.party("seller" + name)
    deal = market.deal(buyer, seller)
    return deal, await market.grant(deal)


def receipt_of(body: bytes) -> Receipt:
    bundle = receipts.decode_bundle(body)
    return codec.open_signed(bundle.receipt, Receipt, network=NETWORK).message


async def state_of(market: Market, deal: Deal, party: Party) -> dict[str, Any]:
    answer = await market.client.get(f"/v1/escrows/{deal.session}", headers=market.bearer(party))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


SHOWN, ASKED, AWARD = 3_000, 5_000, 700


async def dispute(market: Market, deal: Deal) -> None:
    """Open a dispute, as the room of disputes does it."""
    await on_escrow(market, partial(freeze, evidence=digest(b"opened")), deal)


async def end_dispute(market: Market, deal: Deal, *, ruled: bool, nanos: int = AWARD) -> Escrow:
    """End one dispute with an award, or without one when it is withdrawn."""
    nanos, paper = (nanos, ruling_of(market, deal, nanos)) if ruled else (0, None)
    return await on_escrow(market, partial(award, award_nanos=nanos, ruling=paper), deal)


async def on_escrow(market: Market, operation: Any, deal: Deal) -> Escrow:
    context, now = market.coordinator.context, market.now
    found: Escrow = await market.coordinator.store.submit(
        lambda connection: operation(context, connection, deal.hash, now=now)
    )
    return found


def ruling_of(market: Market, deal: Deal, nanos: int) -> bytes:
    """A ruling signed by the coordinator; each is another dispute's."""
    facts = Facts(
        paid_nanos=SHOWN, claimed_nanos=SHOWN, remainder_nanos=CAP - SHOWN, bond_nanos=0,
        stake_nanos=0, ended="done", opened_at=START, evidence_until=START, ends_at=START,
    )  # fmt: skip
    ruling = Ruling(
        dispute=derive_id("dispute", f"{deal.hash}{next(NUMBERS)}".encode()),
        agreement_hash=deal.hash, claim="unpaid_delivery", order=1, opener=deal.seller.peer,
        buyer=deal.buyer.peer, seller=deal.seller.peer, currency="TEST", fault="buyer",
        rule="delivered", award_nanos=nanos, refund_nanos=0, slash_nanos=0, collected_nanos=0,
        victim_nanos=0, bond_returned=True, evidence_root=digest(b"evidence"), documents=1,
        facts=facts, issued_at=market.now,
    )  # fmt: skip
    return codec.sign(ruling, market.coordinator.context.key, NETWORK).data


async def prepare(market: Market, deal: Deal, grant: bytes, state: str) -> None:
    """Bring an escrow to a state."""
    if state == "claimed":
        answer = await market.settle(deal.claim(deal.buyer, grant, SHOWN))
        assert answer.status_code == 202
    elif state == "disputed":
        await prepare(market, deal, grant, "claimed")
        await dispute(market, deal)
    elif state == "settled":
        answer = await market.settle(deal.claim(deal.seller, grant, 4_000))
        assert answer.status_code == 200
    elif state == "expired":
        await end_window(market, deal)


async def end_window(market: Market, deal: Deal) -> None:
    market.clock.now = deal.agreement.ends_at + 30 * 24 * 3600 + 1
    await market.coordinator.escrows.expire_due()
    await market.register(deal.buyer)
    await market.register(deal.seller)
