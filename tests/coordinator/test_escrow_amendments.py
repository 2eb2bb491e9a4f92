"""More money and more time for a running session: held, signed, and never lowered."""

from __future__ import annotations

from pathlib import Path

import msgspec
import trio

from lumaris_protocol import agreements, receipts
from lumaris_protocol.agreements import Contract
from lumaris_protocol.limits import AMENDMENTS_MAX
from lumaris_protocol.messages.budget import BudgetGrant
from tests.coordinator.builders import CAP, NETWORK, START, Clock, Deal, Market, Party
from tests.coordinator.conftest import open_market

STORES = ("sqlite", "postgres")
FUNDS = 5 * CAP
HOUR = 3_600


async def setting(market: Market, **changes: int) -> tuple[Deal, bytes]:
    buyer, seller = await market.party("buyer", FUNDS), await market.party("seller")
    deal = market.deal(buyer, seller, **changes)
    return deal, await market.grant(deal)


def contract_of(deal: Deal) -> Contract:
    return agreements.join(deal.signed_by(deal.buyer), deal.signed_by(deal.seller), network=NETWORK)


def open_grant(market: Market, deal: Deal, data: bytes) -> BudgetGrant:
    return agreements.open_grant(
        data, contract_of(deal), network=NETWORK, coordinator=market.peer, now=market.now
    ).message


async def test_a_top_up_holds_the_difference(market: Market) -> None:
    deal, first = await setting(market)
    body = deal.amend_request(1, cap=2 * CAP)
    answers: list[bytes] = []

    async def ask() -> None:
        answer = await market.amend(body)
        assert answer.status_code == 200, answer.text
        answers.append(answer.content)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(ask)
    assert len(set(answers)) == 1
    before, after = open_grant(market, deal, first), open_grant(market, deal, answers[0])
    assert (after.grant, after.not_after) == (before.grant, before.not_after)
    assert after.cap_nanos == 2 * CAP
    assert after.serial > before.serial
    account = await market.account(deal.buyer)
    assert (account["free_nanos"], account["held_nanos"]) == (FUNDS - 2 * CAP, 2 * CAP)
    assert (await market.audit())["balanced"]


async def test_vouchers_above_the_first_cap_need_the_later_grant(market: Market) -> None:
    deal, first = await setting(market)
    later = (await market.amend(deal.amend_request(1, cap=2 * CAP))).content
    refused = await market.settle(deal.claim(deal.seller, first, CAP + 5_000))
    assert refused.json()["code"] == "over_cap"
    answer = await market.settle(deal.claim(deal.seller, later, CAP + 5_000))
    assert answer.status_code == 200, answer.text
    report = receipts.verify_bundle(answer.content, trusted=frozenset({market.peer}))
    assert report.verdict == "valid", report.checks
    assert report.receipt is not None
    assert (report.receipt.cap_nanos, report.receipt.paid_nanos) == (2 * CAP, CAP + 5_000)
    assert await market.free(deal.buyer) == FUNDS - CAP - 5_000
    assert (await market.audit())["balanced"]


async def test_a_longer_lease_needs_both_and_moves_every_deadline(market: Market) -> None:
    deal, first = await setting(market)
    alone = await market.amend(deal.amend_request(1, cap=CAP, longer_s=HOUR))
    assert alone.json()["code"] == "amendment_refused"
    answer = await market.amend(deal.amend_request(1, cap=CAP, longer_s=HOUR, by_seller=True))
    assert answer.status_code == 200, answer.text
    before, after = open_grant(market, deal, first), open_grant(market, deal, answer.content)
    assert after.not_after == before.not_after + HOUR
    assert after.settle_by == before.settle_by + HOUR
    market.clock.now = before.settle_by + 1
    settled = await market.settle(deal.claim(deal.seller, first, 5_000, closed=True))
    assert settled.status_code == 200, settled.text
    report = receipts.verify_bundle(settled.content, trusted=frozenset({market.peer}))
    assert report.verdict == "valid", report.checks


async def test_amendments_refused(market: Market) -> None:
    deal, _ = await setting(market)
    eve, seller = Party("eve"), deal.seller
    other = market.deal(deal.buyer, seller)
    assert (await market.amend(deal.amend_request(2, cap=2 * CAP))).status_code == 200
    cases = {
        "an old number": (deal.amend_request(1, cap=3 * CAP), "amendment_refused"),
        "the same number": (deal.amend_request(2, cap=3 * CAP), "amendment_refused"),
        "a lower cap": (deal.amend_request(3, cap=CAP), "amendment_refused"),
        "an earlier end": (
            deal.amend_request(3, cap=3 * CAP, longer_s=-1, by_seller=True),
            "amendment_refused",
        ),
        "nothing new": (deal.amend_request(3, cap=2 * CAP), "amendment_refused"),
        "beyond the keys": (
            deal.amend_request(3, cap=2 * CAP, longer_s=24 * HOUR, by_seller=True),
            "amendment_refused",
        ),
        "another end by the seller": (
            deal.amend_request(
                3,
                cap=2 * CAP,
                longer_s=HOUR,
                amendment_by_seller=deal.amendment(seller, 3, cap=2 * CAP, longer_s=2 * HOUR),
            ),
            "terms_changed",
        ),
        "not by the seller": (
            deal.amend_request(
                3,
                cap=2 * CAP,
                longer_s=HOUR,
                amendment_by_seller=deal.amendment(eve, 3, cap=2 * CAP, longer_s=HOUR),
            ),
            "wrong_signer",
        ),
        "not by the buyer": (
            deal.amend_request(3, cap=3 * CAP, amendment_by_buyer=deal.amendment(seller, 3, cap=1)),
            "wrong_signer",
        ),
        "sent by the seller": (deal.amend_request(3, cap=3 * CAP, signer=seller), "wrong_signer"),
        "of a stranger": (
            deal.amend_request(
                3,
                cap=3 * CAP,
                signer=eve,
                buyer=eve.peer,
                amendment_by_buyer=deal.amendment(eve, 3, cap=3 * CAP),
            ),
            "not_found",
        ),
        "of another agreement": (
            deal.amend_request(
                3, cap=3 * CAP, amendment_by_buyer=other.amendment(deal.buyer, 3, cap=3 * CAP)
            ),
            "amendment_refused",
        ),
        "without a grant": (other.amend_request(1, cap=2 * CAP), "not_found"),
        "elsewhere": (deal.amend_request(3, cap=3 * CAP, coordinator=eve.peer), "wrong_domain"),
        "from the future": (
            deal.amend_request(3, cap=3 * CAP, issued_at=deal.now + 61),
            "not_yet_valid",
        ),
        "above the funds": (deal.amend_request(3, cap=FUNDS + 1), "no_funds"),
    }
    for case, (body, code) in cases.items():
        answer = await market.amend(body)
        assert answer.json()["code"] == code, (case, answer.text)
        assert answer.json()["money_moved"] is False
    assert await market.free(deal.buyer) == FUNDS - 2 * CAP
    assert (await market.audit())["balanced"]


async def test_an_ended_agreement_is_not_amended(market: Market) -> None:
    deal, _ = await setting(market)
    market.clock.now = deal.agreement.ends_at + 61
    answer = await market.amend(deal.amend_request(1, cap=2 * CAP))
    assert answer.json()["code"] == "expired"


async def test_as_many_amendments_as_a_receipt_file_carries(market: Market) -> None:
    deal, data = await setting(market)
    for n in range(1, AMENDMENTS_MAX + 1):
        body = deal.amend_request(n, cap=CAP + n, longer_s=n, by_seller=True)
        answer = await market.amend(body)
        assert answer.status_code == 200, answer.text
        data = answer.content
    settled = await market.settle(deal.claim(deal.seller, data, CAP + AMENDMENTS_MAX))
    report = receipts.verify_bundle(settled.content, trusted=frozenset({market.peer}))
    assert report.verdict == "valid", report.checks
    bundle = receipts.decode_bundle(settled.content)
    for missing in (bundle.amendments[2:], bundle.amendments[:-2], ()):
        file = receipts.encode_bundle(msgspec.structs.replace(bundle, amendments=missing))
        expected = "valid" if missing == bundle.amendments[2:] else "invalid"
        report = receipts.verify_bundle(file, trusted=frozenset({market.peer}))
        assert report.verdict == expected


async def test_the_first_grant_is_had_again_after_an_amendment(tmp_path: Path) -> None:
    async with open_market(tmp_path / "state", clock=Clock()) as market:
        deal, first = await setting(market)
        later = (await market.amend(deal.amend_request(1, cap=2 * CAP))).content
        assert later != first
        assert await market.grant(deal) == later  # the newest one, which covers the agreement too
        assert open_grant(market, deal, later).issued_at == START
