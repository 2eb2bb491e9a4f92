"""The public log: tiles, restarts at any size, several replicas, and what the operator's check
finds."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from pymerkle import InmemoryTree

from lumaris_coordinator.receipts import tree
from lumaris_coordinator.receipts.audit import audit
from lumaris_coordinator.receipts.log import ReceiptLog
from lumaris_coordinator.receipts.service import Filed, append_document, find_document
from lumaris_coordinator.store.port import Connection, all_rows
from lumaris_coordinator.store.sqlite import connect
from lumaris_protocol import keys, merkle, tiles
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import digest
from tests import independent_log as other
from tests.coordinator.builders import Clock, Market
from tests.coordinator.conftest import open_market

STORES = ("sqlite", "postgres")


async def log_some(market: Market, count: int, *, name: str = "document") -> list[Filed]:
    """Put so many documents into the log, in one batch."""

    def operation(connection: Connection) -> list[Filed]:
        return [append_document(connection, f"{name} {n}".encode()) for n in range(count)]

    return await market.coordinator.store.submit(operation)


async def head_of(market: Market) -> tuple[int, bytes]:
    note = (await market.client.get("/log/checkpoint")).text
    return other.open_head(note, "lumaris.devnet/log", keys.public_key_of(market.peer))


async def tile(market: Market, path: str) -> bytes:
    answer = await market.client.get(f"/log/tile/{path}")
    assert answer.status_code == 200, path
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["content-type"] == "application/octet-stream"
    return answer.content


def hashes_in(data: bytes) -> list[bytes]:
    return [data[at : at + 32] for at in range(0, len(data), 32)]


async def test_a_client_follows_the_log_by_tiles_alone(market: Market) -> None:
    """Entries hash to level 0, full tiles to level 1, and all of it to the signed root."""
    await log_some(market, 600)
    size, root = await head_of(market)
    assert size == 600
    leaves: list[bytes] = []
    for path in ("000", "001", "002.p/88"):
        bundle = await tile(market, f"entries/{path}")
        width = 88 if ".p" in path else 256
        assert len(bundle) == width * 34
        entries = [bundle[at + 2 : at + 34] for at in range(0, len(bundle), 34)]
        assert {bundle[at : at + 2] for at in range(0, len(bundle), 34)} == {b"\x00\x20"}
        assert hashes_in(await tile(market, f"0/{path}")) == list(map(other.leaf_hash, entries))
        leaves += map(other.leaf_hash, entries)
    assert other.tree_head(leaves) == root
    above = hashes_in(await tile(market, "1/000.p/2"))
    assert above == [other.tree_head(leaves[:256]), other.tree_head(leaves[256:512])]
    # A tile that is full now is still served as the part it was.
    assert hashes_in(await tile(market, "0/000.p/7")) == leaves[:7]


async def test_tiles_that_are_not_there(market: Market) -> None:
    await log_some(market, 600)
    for path in (
        "0/002",
        "0/002.p/89",
        "0/003.p/1",
        "1/000",
        "1/000.p/3",
        "2/000.p/1",
        "63/000",
        "entries/002",
        "entries/x001/000",
        "0/0",
        "64/000",
        "..",
        "0/000.p/256",
    ):
        answer = await market.client.get(f"/log/tile/{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert "immutable" not in answer.headers.get("cache-control", "")


async def test_an_empty_log_has_no_tiles(market: Market) -> None:
    assert (await head_of(market))[0] == 0
    for path in ("0/000.p/1", "entries/000.p/1"):
        assert (await market.client.get(f"/log/tile/{path}")).status_code == 404


async def test_the_log_tells_nothing_of_its_documents(market: Market) -> None:
    """Two logs of the same documents have nothing in common: each leaf has its own salt."""
    first = await log_some(market, 3)
    bundle = await tile(market, "entries/000.p/3")
    assert b"document" not in bundle
    assert len({filed.salt for filed in first}) == 3
    for filed in first:
        assert filed.commitment in bundle
        assert digest(filed.envelope).removeprefix("sha256:") not in bundle.hex()


async def test_a_document_has_one_leaf(market: Market) -> None:
    first = await log_some(market, 5)
    again = await log_some(market, 6)
    assert again[:5] == first
    assert [filed.leaf for filed in again] == list(range(6))
    found = await market.coordinator.store.read(partial(find_document, name=digest(b"document 2")))
    assert found == first[2]
    assert (await head_of(market))[0] == 6


async def test_a_document_is_proven_like_a_receipt(market: Market) -> None:
    filed = (await log_some(market, 300))[123]
    coordinator = market.coordinator
    proof, note = await coordinator.store.read(
        lambda connection: coordinator.receipts.prove(connection, filed)
    )
    size, root = other.open_head(note, "lumaris.devnet/log", keys.public_key_of(market.peer))
    path = [bytes.fromhex(name.removeprefix("sha256:")) for name in proof.hashes]
    leaf = other.leaf_hash(filed.commitment)
    assert other.root_from_path(leaf, 123, size, path) == root


@pytest.mark.slow
async def test_the_log_goes_on_from_any_size(tmp_path: Path, database: str) -> None:
    """Restarted at the edges of tiles; the tree is that of pymerkle over the public entries."""
    clock, at, heads = Clock(), 0, {}
    for size in (1, 255, 256, 257, 511, 513, 520):
        async with open_market(tmp_path / "state", clock=clock, database=database) as market:
            await log_some(market, size - at, name=f"to {size}")
            at = size
            found, heads[size] = await head_of(market)
            assert found == size
    oracle = InmemoryTree(algorithm="sha256")
    async with open_market(tmp_path / "state", clock=clock, database=database) as market:
        entries = await market.coordinator.store.read(
            partial(tree.commitments, start=0, end=tiles.WIDTH * 3)
        )
        for entry in entries:
            oracle.append_entry(entry)
        for size, root in heads.items():
            assert oracle.get_root(size) == root
            answer = await market.client.get(f"/log/consistency?old={size}&new=520")
            path = [bytes.fromhex(name.removeprefix("sha256:")) for name in answer.json()["hashes"]]
            assert other.roots_from_proof(size, 520, path, root) == (root, heads[520])
        assert await checked(market) == []


async def checked(market: Market) -> list[str]:
    return await market.coordinator.store.scan(
        lambda connection: audit(connection, market.coordinator.log)
    )


async def test_the_check_finds_nothing_in_a_good_log(market: Market) -> None:
    assert await checked(market) == []
    await log_some(market, 300)
    await log_some(market, 20, name="more")
    assert await checked(market) == []


@pytest.mark.parametrize(
    ("table", "change", "finding"),
    [
        ("logged", "UPDATE logged SET envelope = x'00' WHERE leaf = 3", "leaf 3"),
        ("logged", "UPDATE logged SET salt = x'00' WHERE leaf = 4", "leaf 4"),
        ("logged", "DELETE FROM logged WHERE leaf = 5", "leaf 5"),
        ("leaf", "UPDATE leaf SET commitment = zeroblob(32) WHERE leaf = 6", "leaf 6"),
        ("tile", "UPDATE tile SET hashes = zeroblob(8192)", "tile 0/000"),
        ("tile", "DELETE FROM tile", "tile 0/000"),
        ("checkpoint", "UPDATE checkpoint SET note = 'x' WHERE size = 300", "checkpoint of 300"),
        ("checkpoint", "DELETE FROM checkpoint WHERE size = 320", "320 leaves"),
    ],
)
async def test_the_check_finds_what_was_changed(
    tmp_path: Path, table: str, change: str, finding: str
) -> None:
    async with open_market(tmp_path / "state") as market:
        await log_some(market, 300)
        await log_some(market, 20, name="more")
        connection = connect(tmp_path / "state" / "coordinator.db")
        connection.execute("PRAGMA foreign_keys = OFF")
        for verb in ("update", "delete"):
            connection.execute(f"DROP TRIGGER {table}_no_{verb}")
        connection.execute(change)
        connection.close()
        assert any(finding in problem for problem in await checked(market))


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE logged SET envelope = x'00' WHERE leaf = 310",
        "UPDATE leaf SET commitment = zeroblob(32) WHERE leaf = 310",
        "UPDATE tile SET root = zeroblob(32)",
        "DELETE FROM tile",
        "DELETE FROM leaf WHERE leaf = 319",
        "INSERT INTO leaf (leaf, commitment) VALUES (320, zeroblob(32))",
        "DELETE FROM checkpoint WHERE size = 320",
    ],
)
async def test_a_changed_end_is_noticed_at_the_start(tmp_path: Path, change: str) -> None:
    async with open_market(tmp_path / "state") as market:
        await log_some(market, 300)
        await log_some(market, 20, name="more")
    connection = connect(tmp_path / "state" / "coordinator.db")
    connection.execute("PRAGMA foreign_keys = OFF")
    for table in ("logged", "leaf", "tile", "checkpoint"):
        for verb in ("update", "delete"):
            connection.execute(f"DROP TRIGGER {table}_no_{verb}")
    connection.execute(change)
    connection.close()
    with pytest.raises(LumarisError, match=r"last signed|gap"):
        async with open_market(tmp_path / "state"):
            pass


async def test_a_changed_document_is_not_handed_out(tmp_path: Path) -> None:
    """Further back than what a start looks at: found when it is to be proven."""
    async with open_market(tmp_path / "state") as market:
        filed = (await log_some(market, 600))[3]
        coordinator = market.coordinator
        other_document = Filed(filed.leaf, filed.salt, b"another")
        with pytest.raises(LumarisError, match="not what was logged"):
            await coordinator.store.read(
                lambda connection: coordinator.receipts.prove(connection, other_document)
            )


async def test_another_key_does_not_go_on_with_the_log(tmp_path: Path) -> None:
    async with open_market(tmp_path / "state") as market:
        await log_some(market, 3)
        connection = connect(tmp_path / "state" / "coordinator.db", read_only=True)
        stranger = keys.KeyPair(bytes(32))
        with pytest.raises(LumarisError, match="bad_signature"):
            ReceiptLog(network="devnet", key=lambda: stranger, known=list).opened(connection)
        # After a rotation it does: the former key is known.
        log = ReceiptLog(network="devnet", key=lambda: stranger, known=lambda: [market.peer])
        log.opened(connection)
        assert log.head(connection).size == 3
        connection.close()


@pytest.mark.slow
async def test_replicas_write_one_log(tmp_path: Path, postgres_server: object) -> None:
    """Two coordinators with one key and one PostgreSQL take turns, and every tile is right."""
    first, second = tmp_path / "first", tmp_path / "second"
    with postgres_server.database() as dsn:  # type: ignore[attr-defined]
        async with open_market(first, database=dsn) as one:
            second.mkdir(mode=0o700)
            shutil.copy2(first / "coordinator.key", second / "coordinator.key")
            shutil.copytree(first / "keys", second / "keys")
            async with open_market(second, database=dsn) as two:
                for number, count in enumerate((3, 250, 5, 300, 1, 256)):
                    market = one if number % 2 else two
                    await log_some(market, count, name=f"turn {number}")
                    assert await head_of(one) == await head_of(two)
                assert (await head_of(one))[0] == 815
                assert await checked(one) == await checked(two) == []
                rows = await one.coordinator.store.read(
                    partial(all_rows, sql="SELECT level, n FROM tile ORDER BY level, n")
                )
                assert rows == [(0, 0), (0, 1), (0, 2)]


async def test_what_a_batch_lost_is_not_in_the_log(market: Market) -> None:
    await log_some(market, 3)

    def fails(connection: Connection) -> None:
        append_document(connection, b"never")
        raise LumarisError("busy")

    with pytest.raises(LumarisError, match="busy"):
        await market.coordinator.store.submit(fails)
    await log_some(market, 1, name="after")
    assert (await head_of(market))[0] == 4
    assert await checked(market) == []


def test_commitments_need_a_whole_salt() -> None:
    with pytest.raises(ValueError, match="salt"):
        merkle.commitment(b"short", b"document")
