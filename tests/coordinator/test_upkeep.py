"""The operator's commands: a restore drill, a check that finds what is wrong, and the switch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from lumaris_coordinator.config import Settings
from lumaris_coordinator.events import outbox
from lumaris_coordinator.identity import revocations
from lumaris_coordinator.store.port import Connection, all_rows
from lumaris_coordinator.store.store import backend_of
from lumaris_coordinator.tables import MIGRATIONS
from lumaris_coordinator.upkeep import backup, commands, config_file
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import NETWORK, Clock, Market, Party
from tests.coordinator.conftest import open_market
from tests.coordinator.postgres import Server

STORES = ("sqlite", "postgres")
CREDIT = 1_000_000


async def settle(market: Market, buyer: Party, seller: Party, total: int) -> httpx.Response:
    deal = market.deal(buyer, seller, cap=5_000)
    return await market.settle(deal.claim(seller, await market.grant(deal), total))


async def some_trade(market: Market, count: int = 3) -> tuple[Party, Party]:
    """Settled sessions and an open one."""
    buyer, seller = await market.party("buyer", CREDIT), await market.party("seller")
    for number in range(count):
        assert (await settle(market, buyer, seller, 1_000 + number)).status_code == 200
    await market.grant(market.deal(buyer, seller, cap=5_000))
    return buyer, seller


@pytest.fixture
def elsewhere(database: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """A second, empty database of the same kind."""
    if not database:
        yield ""
        return
    server: Server = request.getfixturevalue("postgres_server")
    with server.database(empty=True) as dsn:
        yield dsn


def keys_only(source: Path, target: Path) -> Path:
    """A new state with the keys of another, as an operator has them in a safe."""
    target.mkdir(mode=0o700)
    shutil.copy2(source / "coordinator.key", target)
    shutil.copytree(source / "keys", target / "keys")
    return target


@pytest.mark.slow
async def test_a_restore_drill(tmp_path: Path, database: str, elsewhere: str) -> None:
    """Back up, go on trading, lose the machine: what was backed up is there and adds up."""
    clock, file = Clock(), tmp_path / "backup"
    settings = Settings(state=tmp_path / "state", network=NETWORK, database=database)
    async with open_market(settings.state, clock=clock, database=database) as market:
        buyer, seller = await some_trade(market)
        free = await market.free(buyer), await market.free(seller)
        written = commands.backup(settings, file)  # while it serves
        assert (written.head.log_size, written.head.network) == (3, NETWORK)
        assert file.stat().st_mode & 0o777 == 0o600
        assert (await settle(market, buyer, seller, 2_000)).status_code == 200

    state = keys_only(settings.state, tmp_path / "new")
    fresh = replace(settings, state=state, database=elsewhere)
    summary, report = commands.restore(fresh, file)
    assert summary == written == backup.verify(file)
    assert report.sound, report.problems
    assert (report.escrows, report.log_size) == (4, 3)
    async with open_market(state, clock=clock, database=elsewhere) as market:
        for party in (buyer, seller):
            await market.register(party)
        commands.freeze(fresh, False)
        assert (await market.free(buyer), await market.free(seller)) == free
        assert (await settle(market, buyer, seller, 3_000)).status_code == 200
        assert (await market.audit())["balanced"]
    report = commands.check(fresh)
    assert report.sound, report.problems
    with pytest.raises(LumarisError, match="is not empty"):
        commands.restore(fresh, file)


def changes(line: bytes) -> bool:
    """Whether a restore changes such a line: tokens, numbers of events, the clock, the switch."""
    row = json.loads(line)
    settings = ("heartbeat", "frozen", "revocation_floor")
    if isinstance(row, dict) or row[0] in settings:
        return True
    event = len(row) == 5 and "." in str(row[1])
    party = len(row) == 2 and type(row[1]) is int
    token = len(row) == 4 and isinstance(row[1], dict)
    return event or party or token


@pytest.mark.slow
async def test_a_backup_moves_from_one_kind_of_store_to_the_other(
    tmp_path: Path, database: str, postgres_server: Server
) -> None:
    settings = Settings(state=tmp_path / "state", network=NETWORK, database=database)
    async with open_market(settings.state, database=database) as market:
        await some_trade(market)
    files = [tmp_path / "one", tmp_path / "two"]
    commands.backup(settings, files[0])
    state = keys_only(settings.state, tmp_path / "new")
    with postgres_server.database(empty=True) as dsn:
        moved = replace(settings, state=state, database="" if database else dsn)
        _, report = commands.restore(moved, files[0])
        assert report.sound, report.problems
        commands.backup(moved, files[1])
    lines = [
        [line for line in file.read_bytes().splitlines()[1:-1] if not changes(line)]
        for file in files
    ]
    assert sorted(lines[0]) == sorted(lines[1])
    assert len(lines[0]) > 50


def damaged(text: bytes) -> Iterator[bytes]:
    """Cut off, changed, reordered, of another format, or something else."""
    lines = text.splitlines(keepends=True)
    yield b""
    yield b"".join(lines[:-1])
    yield text[:-20]
    yield text.replace(b"1000000", b"9000000", 1)
    yield b"".join([lines[0], lines[2], lines[1], *lines[3:]])
    yield text.replace(b"lumaris-backup/1", b"lumaris-backup/9", 1)
    yield b"\xff" * 100
    yield b"[" * 100_000


@pytest.mark.slow
async def test_a_damaged_backup_restores_nothing(
    tmp_path: Path, database: str, elsewhere: str
) -> None:
    settings = Settings(state=tmp_path / "state", network=NETWORK, database=database)
    async with open_market(settings.state, database=database) as market:
        await some_trade(market, 1)
    file = tmp_path / "backup"
    commands.backup(settings, file)
    with pytest.raises(LumarisError, match="exists already"):
        commands.backup(settings, file)
    state = keys_only(settings.state, tmp_path / "new")
    fresh = replace(settings, state=state, database=elsewhere)
    for text in damaged(file.read_bytes()):
        (tmp_path / "bad").write_bytes(text)
        with pytest.raises(LumarisError, match="backup_invalid"):
            commands.restore(fresh, tmp_path / "bad")
    with pytest.raises(LumarisError, match="backup_invalid"):
        commands.restore(fresh, tmp_path / "missing")
    _, report = commands.restore(fresh, file)
    assert report.sound


TAMPERED = {
    "balance": ("UPDATE account SET balance = balance + 1 WHERE kind = 'peer'", "add up to"),
    "escrow": ("UPDATE escrow SET cap = cap + 1 WHERE state = 'held'", "does not hold"),
    "state": ("UPDATE escrow SET state = 'held' WHERE state = 'settled'", "has not ended"),
    "unpaid": ("UPDATE escrow SET state = 'settled' WHERE state = 'held'", "has no receipt"),
    "version": ("UPDATE escrow SET version = version + 1", "history of escrow"),
    "owner": (
        "UPDATE account SET owner = 'bond:nobody', kind = 'bond' WHERE kind = 'peer'",
        "bond",
    ),
    "transfer": ("DELETE FROM transfer WHERE id = 2", "numbers up to"),
    "receipt": ("UPDATE receipt SET envelope = salt WHERE leaf = 1", "leaf 1"),
    "checkpoint": ("UPDATE checkpoint SET note = replace(note, 'lumaris', 'other')", "checkpoint"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TAMPERED)
async def test_the_check_finds_what_does_not_add_up(
    tmp_path: Path, database: str, case: str
) -> None:
    settings = Settings(state=tmp_path / "state", network=NETWORK, database=database)
    async with open_market(settings.state, database=database) as market:
        await some_trade(market)
    assert commands.check(settings).sound
    sql, expected = TAMPERED[case]
    tamper(settings, sql)
    report = commands.check(settings)
    assert not report.sound
    assert any(expected in problem for problem in report.problems), report.problems


def tamper(settings: Settings, sql: str) -> None:
    """Change rows as one who owns the database can, past what guards them."""
    with closing(backend_of(settings.state, settings.database).writer()) as connection:
        if settings.database:
            connection.execute("SET session_replication_role = replica")
        else:
            connection.execute("PRAGMA foreign_keys = OFF")
            drop_triggers(connection)
        connection.execute(sql)


def drop_triggers(connection: Connection) -> None:
    names = all_rows(connection, "SELECT name FROM sqlite_master WHERE type = 'trigger'")
    for (name,) in names:
        connection.execute(f"DROP TRIGGER {name}")


async def test_forgotten_events_are_no_gap(tmp_path: Path, database: str) -> None:
    settings = Settings(state=tmp_path / "state", network=NETWORK, database=database)
    async with open_market(settings.state, database=database) as market:
        await some_trade(market)
    tamper(settings, "DELETE FROM event_party WHERE event < 4")
    tamper(settings, "DELETE FROM event WHERE id < 4")
    assert commands.check(settings).sound
    tamper(settings, "DELETE FROM event_party WHERE event = 5")
    tamper(settings, "DELETE FROM event WHERE id = 5")
    (problem,) = commands.check(settings).problems
    assert "table event" in problem


async def test_freezing_stops_what_is_new_and_nothing_else(market: Market) -> None:
    settings = market.coordinator.settings
    buyer, seller = await market.party("buyer", CREDIT), await market.party("seller")
    deal = market.deal(buyer, seller, cap=5_000)
    grant = await market.grant(deal)
    assert commands.freeze(settings, None) is False
    assert commands.freeze(settings, True) is True
    answer = await market.client.post(
        "/v1/grants", content=market.deal(buyer, seller).grant_request()
    )
    assert (answer.status_code, answer.json()["code"]) == (503, "frozen")
    assert "retry-after" in answer.headers
    with pytest.raises(AssertionError, match="frozen"):
        await market.fund(buyer, CREDIT)
    assert await market.grant(deal) == grant
    assert (await market.settle(deal.claim(seller, grant, 1_000))).status_code == 200
    assert commands.freeze(settings, False) is False
    await market.fund(buyer, CREDIT)


@pytest.mark.slow
def test_migrate_says_what_it_did(tmp_path: Path, elsewhere: str) -> None:
    settings = Settings(state=tmp_path, database=elsewhere)
    assert commands.migrate(settings) == [migration.name for migration in MIGRATIONS]
    assert commands.migrate(settings) == []


def test_every_setting_is_explained() -> None:
    assert set(config_file.names()) == set(config_file.MEANINGS)


def test_a_new_folder_says_every_setting_and_is_read_back(tmp_path: Path) -> None:
    state = tmp_path / "state"
    path = config_file.initialise(state, {"fee_bps": 250, "network": "town"})
    assert path.stat().st_mode & 0o777 == 0o600
    assert config_file.read(state) == {"fee_bps": 250, "network": "town"}
    every = path.read_text().replace("\n# ", "\n").splitlines()
    path.write_text("\n".join(line for line in every if " = " in line))
    found = Settings(state=state, **config_file.read(state))
    assert replace(found, port=0) == Settings(state=state, fee_bps=250, network="town")
    with pytest.raises(LumarisError, match="exists already"):
        config_file.initialise(state, {})


@pytest.mark.parametrize(
    "text",
    ["fee_bps = '1'", "fee = 1", "fee_bps = ", "\xff", "fee_bps = true", "x" * 70_000],
)
def test_a_bad_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / config_file.NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(LumarisError, match="config_invalid"):
        config_file.read(tmp_path)


@pytest.mark.parametrize("command", [commands.check, lambda found: commands.freeze(found, True)])
def test_looking_makes_no_database(tmp_path: Path, command: Callable[[Settings], object]) -> None:
    with pytest.raises(LumarisError, match="not_found"):
        command(Settings(state=tmp_path))
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == "[]"


@pytest.mark.slow
async def test_what_was_taken_away_after_a_backup_stays_away_until_somebody_looks(
    tmp_path: Path, database: str, elsewhere: str
) -> None:
    """Tokens end, nothing new is taken, and no number means two things."""
    clock, file = Clock(), tmp_path / "backup"
    settings = Settings(state=tmp_path / "state", network=NETWORK, database=database)
    async with open_market(settings.state, clock=clock, database=database) as market:
        buyer, _ = await some_trade(market, 1)
        tokens, look = dict(market.tokens), market.coordinator.store.read
        commands.backup(settings, file)
        thief = await market.party("thief")
        revoke = market.coordinator.revocations.revoke
        await market.coordinator.store.submit(
            lambda connection: revoke(connection, [(thief.peer, 0)], reason="thief")
        )
        seen, revoked = await look(outbox.head), await look(revocations.last)
    fresh = replace(settings, state=keys_only(settings.state, tmp_path / "new"), database=elsewhere)
    commands.restore(fresh, file)
    async with open_market(fresh.state, clock=clock, database=elsewhere) as market:
        market.tokens = tokens
        answer = await market.client.get("/v1/accounts/me", headers=market.bearer(buyer))
        assert answer.status_code == 401
        refused = await market.client.post(
            "/v1/grants", content=market.deal(buyer, Party("seller")).grant_request()
        )
        assert refused.json()["code"] == "frozen"
        await market.register(buyer)
        behind = await market.client.get(
            f"/v1/events/page?after={seen}", headers=market.bearer(buyer)
        )
        assert behind.json()["code"] == "cursor_expired"
        again = await market.client.get("/v1/events/page", headers=market.bearer(buyer))
        assert min(event["id"] for event in again.json()["events"]) > seen
        other = await market.party("other")
        await market.coordinator.store.submit(
            lambda connection: market.coordinator.revocations.revoke(
                connection, [(other.peer, 0)], reason="thief"
            )
        )
        assert await market.coordinator.store.read(revocations.last) > revoked + 1_000
    report = commands.check(fresh)
    assert report.sound, report.problems
