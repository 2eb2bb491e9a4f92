"""The key that signed everybody's certificate is revoked while the market runs; it goes on."""

from __future__ import annotations

import hashlib

import pytest

from lumaris_coordinator.identity import keys
from lumaris_coordinator.peers.guest import Guest
from lumaris_overlay.private_files import read_key
from lumaris_overlay.simulated import SimulatedOverlay
from lumaris_protocol import codec, envelope
from lumaris_protocol.key_list import TrustedKeys
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.advert import Advert
from tests import market as m
from tests.market import Market, eventually

pytestmark = [pytest.mark.slow, pytest.mark.planet]

OVERLAY_KEY = KeyPair(hashlib.sha256(b"the coordinator's overlay").digest())


async def replace_key(market: Market) -> str:
    """The emergency: another key at once, and the old one taken back. The new key."""
    coordinator = market.coordinator
    state, old = coordinator.settings.state, coordinator.peer_id
    root = read_key(state / keys.FOLDER / keys.ROOT_KEY)
    now = int(market.clock())
    new = keys.rotate(state, root, network=m.NETWORK, now=now, after_s=0).peer_id
    keys.revoke(state, root, old, network=m.NETWORK, now=now)
    await coordinator.run_chores()
    assert coordinator.peer_id == new
    return new


def sold_by(host: SimulatedOverlay) -> list[str]:
    """The issuers of the sellers' certificates, as one host sees them."""
    found = []
    for document in host.documents():
        advert = codec.decode_payload(envelope.decode(document).payload, Advert)
        found.append(str(envelope.decode(advert.certificate).signer))
    return found


async def attend(market: Market, shown: list[str]) -> None:
    """The coordinator as a peer of the overlay; `shown` gets the issuers of its certificates."""
    coordinator = market.coordinator
    guest = Guest(
        coordinator.context,
        OVERLAY_KEY,
        shards=coordinator.shard_maps.signed,
        heard=coordinator.offers.take,
    )
    coordinator.context.notices.listen(guest.say)
    async with market.open_host(OVERLAY_KEY) as host:
        present = host.present

        async def note(certificate: bytes) -> None:
            await present(certificate)
            shown.append(str(envelope.decode(certificate).signer))

        host.present = note  # type: ignore[method-assign]
        await guest.attend(host)


@pytest.mark.parametrize("way", ["gossip", "asked"])
async def test_a_market_goes_on_by_itself(
    market: Market, monkeypatch: pytest.MonkeyPatch, way: str
):
    monkeypatch.setattr("lumaris_node.membership._CHECK_S", 0.05)
    monkeypatch.setattr("lumaris.membership._RENEW_CHECK_S", 0.05)
    monkeypatch.setattr("lumaris_coordinator.peers.guest._CERTIFY_CHECK_S", 0.05)
    shown = list[str]()
    if way == "asked":
        monkeypatch.setattr("lumaris_overlay.notice_upkeep.REVOCATIONS_CHECK_S", 0.05)
    seller = await market.seller()
    if way == "gossip":
        market.nursery.start_soon(attend, market, shown)
        await eventually(lambda: bool(shown), "the coordinator is a peer")
    # One buyer was here and comes back, the other stays.
    async with market.buyer("early"):
        pass
    async with market.buyer("staying") as staying:
        assert (await staying.run(market.request(m.HELLO))).ok
        old = market.coordinator.peer_id
        new = await replace_key(market)
        host = seller.host
        assert host is not None
        await eventually(lambda: sold_by(host) == [new], "the seller registered anew")
        await eventually(lambda: staying.standing.info.coordinator == new, "so did the buyer")
        if way == "gossip":
            await eventually(lambda: shown[-1] == new, "and the coordinator's own peer")
            await host.present_shards(market.coordinator.shard_maps.signed())
        await staying.pool.close_all()
        assert (await staying.run(market.request(m.HELLO))).ok
        async with market.buyer("early", credit=0) as buyer:
            assert (await buyer.run(market.request(m.HELLO))).ok
            assert envelope.decode(buyer.standing.certificate).signer == new
            assert old not in buyer.certified.trusted
        await staying.pool.close_all()
    await seller.assert_settled()


async def test_a_buyer_whom_sellers_refuse_registers_anew_at_once(
    market: Market, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lumaris_node.membership._CHECK_S", 0.05)
    seller = await market.seller()
    async with market.buyer() as buyer:
        new = await replace_key(market)
        # The seller knows, the buyer has not heard of it yet.
        seller.node._trusted.learn(market.coordinator.context.keys.list.data)
        host = seller.host
        assert host is not None
        await eventually(lambda: sold_by(host) == [new], "the seller registered anew")
        buyer.certified.trusted = TrustedKeys(
            envelope.decode(buyer.standing.certificate).signer,
            network=m.NETWORK,
            clock=market.clock,
            data=buyer.standing.key_list,
        )
        assert (await buyer.run(market.request(m.HELLO))).ok
        assert envelope.decode(buyer.standing.certificate).signer == new
        await buyer.pool.close_all()
    await seller.assert_settled()
