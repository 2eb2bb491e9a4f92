"""Receipts verify offline; the log agrees with an independent implementation of RFC 6962."""

from __future__ import annotations

import base64
import hashlib
from functools import partial
from pathlib import Path

import msgspec
import pytest
from pymerkle import InmemoryTree

from lumaris_coordinator.store.port import all_rows
from lumaris_coordinator.store.sqlite import Connection, connect
from lumaris_protocol import keys, merkle, receipts
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.receipt import ReceiptBundle
from tests import independent_log
from tests.coordinator.builders import Clock, Market
from tests.coordinator.conftest import open_market

STORES = ("sqlite", "postgres")


async def settle_some(market: Market, count: int) -> list[bytes]:
    """Receipt files of `count` settled sessions."""
    buyer, seller = await market.party("buyer", 1_000_000), await market.party("seller")
    found = []
    for number in range(count):
        deal = market.deal(buyer, seller, cap=1_000)
        claim = deal.claim(seller, await market.grant(deal), number)
        found.append((await market.settle(claim)).content)
    return found


async def checkpoint(market: Market) -> merkle.Checkpoint:
    note = (await market.client.get("/log/checkpoint")).text
    return merkle.open_checkpoint(note, keys.public_key_of(market.peer))


async def test_receipts_verify_offline(market: Market) -> None:
    for data in await settle_some(market, 5):
        report = receipts.verify_bundle(data, trusted=frozenset({market.peer}))
        assert report.verdict == "valid", report.checks
        receipt, _ = independent_log.check_file(data, coordinator=market.peer)
        assert report.receipt is not None
        assert receipt["receipt"] == report.receipt.receipt
        assert receipts.verify_bundle(data, trusted=frozenset()).verdict == "unknown"
        changed = receipts.decode_bundle(data)
        flipped = bytearray(changed.receipt)
        flipped[-1] ^= 1
        bad = receipts.encode_bundle(msgspec.structs.replace(changed, receipt=bytes(flipped)))
        report = receipts.verify_bundle(bad, trusted=frozenset({market.peer}))
        assert report.verdict == "invalid"
        with pytest.raises(independent_log.Wrong):
            independent_log.check_file(bad, coordinator=market.peer)


@pytest.mark.slow
async def test_the_log_is_the_tree_of_an_independent_implementation(market: Market) -> None:
    count = 13
    bundles = [receipts.decode_bundle(data) for data in await settle_some(market, count)]
    oracle = InmemoryTree(algorithm="sha256")
    for bundle in bundles:
        oracle.append_entry(merkle.commitment(bundle.salt, bundle.receipt))
    head = await checkpoint(market)
    assert (head.size, head.root, head.origin) == (count, oracle.get_root(), "lumaris.devnet/log")
    for bundle in bundles:
        size, index = bundle.proof.size, bundle.proof.index
        signed = merkle.open_checkpoint(bundle.checkpoint, keys.public_key_of(market.peer))
        assert (signed.size, signed.root) == (size, oracle.get_root(size))
        fold = merkle.leaf_hash(hashlib.sha256(bundle.salt + bundle.receipt).digest())
        path = oracle.prove_inclusion(index + 1, size).serialize()["path"]
        assert [fold.hex(), *hex_of(bundle.proof.hashes)] == path
    for old in range(1, count + 1):
        for new in range(old, count + 1):
            answer = await market.client.get(f"/log/consistency?old={old}&new={new}")
            names = hex_of(answer.json()["hashes"])
            hashes = [bytes.fromhex(text) for text in names]
            assert merkle.verify_consistency(
                old=old,
                old_root=oracle.get_root(old),
                size=new,
                root=oracle.get_root(new),
                path=hashes,
            )


def hex_of(digests: tuple[str, ...] | list[str]) -> list[str]:
    return [text.removeprefix("sha256:") for text in digests]


@pytest.mark.parametrize("query", ["old=1&new=3", "old=2&new=1", "old=0&new=1", "old=x&new=1", ""])
async def test_consistency_of_sizes_that_never_were(market: Market, query: str) -> None:
    await settle_some(market, 2)
    answer = await market.client.get(f"/log/consistency?{query}")
    assert answer.status_code in (400, 404)
    assert answer.json()["money_moved"] is False


async def test_an_empty_log_has_a_head(market: Market) -> None:
    assert await checkpoint(market) == merkle.Checkpoint("lumaris.devnet/log", 0, merkle.EMPTY_ROOT)


async def test_receipts_are_for_the_parties(market: Market) -> None:
    (data,) = await settle_some(market, 1)
    bundle = receipts.decode_bundle(data)
    report = receipts.verify_bundle(data, trusted=frozenset({market.peer}))
    assert report.receipt is not None
    path = f"/v1/receipts/{report.receipt.receipt}"
    eve = await market.party("eve")
    answers = [await market.client.get(path, headers=h) for h in (market.bearer(eve), {})]
    assert [answer.status_code for answer in answers] == [404, 401]
    for name in ("buyer", "seller"):
        headers = {"authorization": f"Bearer {market.tokens[name]}"}
        found = await market.client.get(path, headers=headers)
        assert msgspec.json.decode(found.content, type=ReceiptBundle).receipt == bundle.receipt


async def test_the_log_outlives_a_restart_and_old_proofs_stay_good(tmp_path: Path) -> None:
    clock = Clock()
    async with open_market(tmp_path / "state", clock=clock) as market:
        first = await settle_some(market, 3)
        before = await checkpoint(market)
    async with open_market(tmp_path / "state", clock=clock) as market:
        assert await checkpoint(market) == before
        await settle_some(market, 2)
        after = await checkpoint(market)
        answer = await market.client.get("/log/consistency?old=3&new=5")
        path = [bytes.fromhex(text) for text in hex_of(answer.json()["hashes"])]
        assert merkle.verify_consistency(
            old=3, old_root=before.root, size=5, root=after.root, path=path
        )
        for data in first:
            report = receipts.verify_bundle(data, trusted=frozenset({market.peer}))
            assert report.verdict == "valid"


async def test_a_log_that_was_tampered_with_is_not_served(tmp_path: Path) -> None:
    clock = Clock()
    async with open_market(tmp_path / "state", clock=clock) as market:
        await settle_some(market, 2)
    connection: Connection = connect(tmp_path / "state" / "coordinator.db")
    connection.execute("DROP TRIGGER receipt_no_update")
    connection.execute("UPDATE receipt SET envelope = x'00' WHERE leaf = 1")
    connection.close()
    with pytest.raises(LumarisError, match="not the one last signed"):
        async with open_market(tmp_path / "state", clock=clock):
            pass


async def test_one_checkpoint_per_batch_with_receipts(market: Market) -> None:
    await settle_some(market, 4)
    sql = "SELECT size, note FROM checkpoint ORDER BY size"
    rows = await market.coordinator.store.read(partial(all_rows, sql=sql))
    assert [size for size, _ in rows] == [1, 2, 3, 4]
    assert base64.b64encode((await checkpoint(market)).root).decode() in rows[-1][1]
