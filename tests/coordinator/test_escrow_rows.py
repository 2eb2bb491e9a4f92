"""Every row of the escrow's table, and that nothing outside it moves anything."""

from __future__ import annotations

import json
from functools import partial

import pytest

from lumaris_coordinator.context import Context
from lumaris_coordinator.escrow import store
from lumaris_coordinator.escrow.disputed import give_back
from lumaris_coordinator.escrow.store import Escrow
from lumaris_coordinator.events.outbox import newer
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import receipts
from lumaris_protocol.errors import InvalidTransition, LumarisError
from lumaris_protocol.machines.escrow import ESCROW
from lumaris_protocol.messages.receipt import Receipt
from tests.coordinator.builders import (
    CAP,
    Deal,
    Market,
)
from tests.coordinator.escrows import (
    ASKED,
    AWARD,
    FUNDS,
    SHOWN,
    dispute,
    end_dispute,
    end_window,
    on_escrow,
    prepare,
    receipt_of,
    setting,
    state_of,
)

STORES = ("sqlite", "postgres")

# state, fact -> the next state, what was paid by then, the receipt's outcome; or the refusal.
ROWS: dict[tuple[str, str], tuple[str, int, str] | str] = {
    ("held", "seller_claim"): ("settled", ASKED, "claimed"),
    ("held", "both_closed"): ("settled", ASKED, "closed"),
    ("held", "buyer_claim"): ("claimed", 0, ""),
    ("held", "window_ended"): ("expired", 0, "expired"),
    ("held", "amended"): ("held", 0, ""),
    ("held", "dispute_opened"): ("disputed", 0, ""),
    ("held", "appeal_opened"): "not_offered",
    ("claimed", "seller_claim"): ("settled", ASKED, "claimed"),
    ("claimed", "both_closed"): ("settled", ASKED, "closed"),
    ("claimed", "buyer_claim"): ("claimed", 0, ""),
    ("claimed", "window_ended"): ("expired", SHOWN, "expired"),
    ("claimed", "amended"): ("claimed", 0, ""),
    ("claimed", "dispute_opened"): ("disputed", SHOWN, ""),
    ("claimed", "appeal_opened"): "not_offered",
    ("disputed", "seller_claim"): ("disputed", ASKED, ""),
    ("disputed", "both_closed"): ("disputed", ASKED, ""),
    ("disputed", "buyer_claim"): ("disputed", ASKED, ""),
    ("disputed", "dispute_opened"): ("disputed", SHOWN, ""),
    ("disputed", "window_ended"): ("disputed", SHOWN, ""),
    ("disputed", "ruled_in_part"): ("disputed", SHOWN + AWARD, ""),
    ("disputed", "withdrawn_in_part"): ("disputed", SHOWN, ""),
    ("disputed", "ruled"): ("claimed", SHOWN + AWARD, ""),
    ("disputed", "dispute_withdrawn"): ("claimed", SHOWN, ""),
    ("disputed", "amended"): "in_dispute",
    ("disputed", "appeal_opened"): "not_offered",
    **{
        (state, fact): "already_settled"
        for state in ("settled", "expired")
        for fact in ("seller_claim", "buyer_claim", "both_closed", "amended", "dispute_opened")
    },
    ("settled", "appeal_opened"): "not_offered",
    ("expired", "appeal_opened"): "not_offered",
}
FACTS = tuple(dict.fromkeys(fact for _, fact in ROWS))


def test_every_row_of_the_table_is_listed_here() -> None:
    assert set(ROWS) == {(row.state, row.fact) for row in ESCROW.rows}


async def act(market: Market, deal: Deal, grant: bytes, fact: str) -> str:
    """Bring a fact about as its party would; the code of the refusal, or "" for none."""
    answer = None
    try:
        if fact in ("seller_claim", "buyer_claim", "both_closed"):
            party = deal.buyer if fact == "buyer_claim" else deal.seller
            body = deal.claim(party, grant, ASKED, closed=fact == "both_closed")
            answer = await market.settle(body)
        elif fact == "amended":
            answer = await market.amend(deal.amend_request(1, cap=CAP + 1))
        elif fact == "window_ended":
            await end_window(market, deal)
            await on_escrow(market, partial(give_back, keep=AWARD), deal)
        elif fact == "dispute_opened":
            await dispute(market, deal)
        elif fact == "appeal_opened":
            await on_escrow(market, partial(advance_by, fact="appeal_opened"), deal)
        else:
            if fact.endswith("_in_part"):
                await dispute(market, deal)
            await end_dispute(market, deal, ruled=fact.startswith("ruled"))
    except LumarisError as error:
        return error.code
    if answer is not None and answer.status_code >= 400:
        assert answer.json()["money_moved"] is False
        return str(answer.json()["code"])
    return ""


def advance_by(
    context: Context, connection: Connection, agreement_hash: str, *, fact: str, now: int
) -> Escrow:
    escrow = store.find(connection, agreement_hash)
    assert escrow is not None
    return store.advance(connection, escrow, fact, evidence="", now=now)


async def told(market: Market, deal: Deal) -> list[tuple[str, str]]:
    """(kind, state) of every event about an escrow, in order."""
    events = await market.coordinator.store.read(partial(newer, after=0, limit=1_000))
    return [
        (event.kind, json.loads(event.body)["state"])
        for event in events
        if event.ref == deal.hash and event.parties == {deal.buyer.peer, deal.seller.peer}
    ]


@pytest.mark.slow
@pytest.mark.parametrize("state", ESCROW.states)
async def test_rows(market: Market, state: str) -> None:
    for row in ESCROW.rows:
        if row.state == state:
            await check_row(market, state, row.fact)


async def check_row(market: Market, state: str, fact: str) -> None:
    deal, grant = await setting(market, fact)
    await prepare(market, deal, grant, state)
    before = await market.free(deal.seller), await market.free(deal.buyer)
    expected = ROWS[state, fact]
    refused = await act(market, deal, grant, fact)
    found = await state_of(market, deal, deal.buyer)
    assert (await market.audit())["balanced"]
    assert len(await told(market, deal)) == len(found["events"]) == found["version"] + 1
    if isinstance(expected, str):
        assert refused == expected, (state, fact)
        assert found["state"] == state
        assert (await market.free(deal.seller), await market.free(deal.buyer)) == before
        return
    next_state, paid, outcome = expected
    assert refused == ""
    assert (found["state"], found["paid_nanos"]) == (next_state, paid), (state, fact)
    assert (await told(market, deal))[-1][1] == next_state
    assert await market.free(deal.seller) == paid - paid * 500 // 10_000
    held = 0 if outcome else CAP - paid + (fact == "amended")
    if (state, fact) == ("disputed", "window_ended"):
        held = AWARD  # what is still asked for
    assert found["held_nanos"] == held
    assert await market.free(deal.buyer) == FUNDS - paid - held
    if outcome:
        receipt = await receipt_file(market, deal, found["receipt"])
        assert (receipt.outcome, receipt.paid_nanos) == (outcome, paid)


async def receipt_file(market: Market, deal: Deal, name: str) -> Receipt:
    """The seller's receipt file, which must verify."""
    answer = await market.client.get(f"/v1/receipts/{name}", headers=market.bearer(deal.seller))
    assert answer.status_code == 200, answer.text
    report = receipts.verify_bundle(answer.content, trusted=frozenset({market.peer}))
    assert report.verdict == "valid", report.checks
    return receipt_of(answer.content)


@pytest.mark.parametrize("state", ESCROW.states)
async def test_outside_the_table_nothing_moves(market: Market, state: str) -> None:
    deal, grant = await setting(market)
    await prepare(market, deal, grant, state)
    before = await state_of(market, deal, deal.buyer)
    for fact in [fact for fact in FACTS if (state, fact) not in ROWS]:
        with pytest.raises(InvalidTransition):
            await on_escrow(market, partial(advance_by, fact=fact), deal)
        if fact in ("ruled", "dispute_withdrawn"):
            with pytest.raises(InvalidTransition):
                await end_dispute(market, deal, ruled=fact == "ruled", nanos=0)
    assert await state_of(market, deal, deal.buyer) == before
    assert (await market.audit())["balanced"]
