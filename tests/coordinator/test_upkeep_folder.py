"""A folder stays with its owner, its keys and its database, whatever a shell has in it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lumaris_coordinator.config import Settings
from lumaris_coordinator.identity import commands as people_commands
from lumaris_coordinator.store.port import first
from lumaris_coordinator.store.store import backend_of
from lumaris_coordinator.upkeep import commands, folder
from lumaris_protocol.errors import LumarisError
from tests.coordinator.builders import NETWORK
from tests.coordinator.conftest import open_market
from tests.coordinator.postgres import Server
from tests.sdk.cli.command import assert_one_message, call

ENV = "LUMARIS_COORDINATOR_DATABASE"
Command = Callable[[Settings, Path], object]
COMMANDS: dict[str, Command] = {
    "freeze": lambda found, _: commands.freeze(found, True),
    "look": lambda found, _: commands.freeze(found, None),
    "check": lambda found, _: commands.check(found),
    "backup": commands.backup,
    "migrate": lambda found, _: commands.migrate(found),
    "operator": lambda found, _: people_commands.create_operator(found, "ada"),
}


@pytest.mark.slow
def test_a_folder_of_a_server_is_not_used_without_its_address(
    tmp_path: Path, postgres_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address was in the environment of `init`, and is missing in the next shell."""
    state = tmp_path / "state"
    with postgres_server.database(empty=True) as dsn:
        monkeypatch.setenv(ENV, dsn)
        made = call("coordinator", "init", "--network", NETWORK, "--state", state)
        assert made.exit_code == 0, made.stderr
        assert "database: PostgreSQL" in made.stderr
        assert not (state / "coordinator.db").exists()
        monkeypatch.delenv(ENV)
        for words in (
            ("freeze", "on"),
            ("check",),
            ("backup", tmp_path / "b"),
            ("migrate",),
            ("operator", "create", "ada"),
            ("restore", tmp_path / "b"),
            ("up", "--port", "0", "--no-overlay"),
        ):
            refused = call("coordinator", *words, "--state", state)
            assert_one_message(refused.stderr, "config_invalid")
            assert "belongs to the database PostgreSQL" in refused.stderr
        assert not (state / "coordinator.db").exists()
        monkeypatch.setenv(ENV, dsn)
        frozen = call("coordinator", "freeze", "on", "--state", state)
        assert frozen.stdout == "on\n"
        assert "database: PostgreSQL" in frozen.stderr


@pytest.mark.slow
async def test_a_program_does_not_go_on_with_another_database(
    tmp_path: Path, postgres_server: Server
) -> None:
    state = tmp_path / "state"
    async with open_market(state):
        pass
    with postgres_server.database() as dsn:
        with pytest.raises(LumarisError, match="belongs to the database file"):
            async with open_market(state, database=dsn):
                pass
        # Nor does a folder of its own take over what another coordinator has.
        async with open_market(tmp_path / "first", database=dsn):
            pass
        with pytest.raises(LumarisError, match="belongs to coordinator"):
            async with open_market(tmp_path / "second", database=dsn):
                pass


async def test_data_that_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with open_market(state):
        pass
    for name in ("coordinator.db", "coordinator.db-wal", "coordinator.db-shm"):
        (state / name).unlink(missing_ok=True)
    with pytest.raises(LumarisError, match="holds nothing of this coordinator"):
        async with open_market(state):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("command", ["freeze", "look", "check", "backup", "operator"])
def test_an_empty_database_is_told_as_such(
    tmp_path: Path, postgres_server: Server, command: str
) -> None:
    state = tmp_path / "state"
    commands.prepare(Settings(state=state, network=NETWORK))
    (state / folder.MARKER).unlink()
    with (
        postgres_server.database(empty=True) as dsn,
        pytest.raises(LumarisError, match="holds no data of a coordinator"),
    ):
        COMMANDS[command](Settings(state=state, network=NETWORK, database=dsn), tmp_path / "backup")


@pytest.mark.parametrize("command", ["check", "operator", "freeze", "backup"])
def test_a_wrong_folder_gets_no_keys(tmp_path: Path, command: str) -> None:
    """The right data beside no keys, or those of another."""
    ours, wrong = tmp_path / "ours", tmp_path / "wrong"
    commands.prepare(Settings(state=ours, network=NETWORK))
    wrong.mkdir(mode=0o700)
    (wrong / "coordinator.db").write_bytes((ours / "coordinator.db").read_bytes())
    with pytest.raises(LumarisError, match="not_found"):
        COMMANDS[command](Settings(state=wrong, network=NETWORK), tmp_path / "backup")
    assert [path.name for path in wrong.iterdir()] == ["coordinator.db"]


@pytest.mark.parametrize("words", [("freeze", "on"), ("check",), ("keys", "list"), ("up",)])
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
def test_another_users_folder_is_left_alone(tmp_path: Path, words: tuple[str, ...]) -> None:
    state = tmp_path / "state"
    assert call("coordinator", "init", "--network", NETWORK, "--state", state).exit_code == 0
    os.chown(state, 65_534, 65_534)
    before = sorted(path.name for path in state.iterdir())
    refused = call("coordinator", *words, "--state", state)
    assert_one_message(refused.stderr, "config_invalid")
    assert "runuser -u" in refused.stderr
    assert sorted(path.name for path in state.iterdir()) == before


def test_a_folder_that_others_can_enter(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o755)
    (state / "something").touch()
    init = ("coordinator", "init", "--network", NETWORK, "--state", state)
    refused = call(*init)
    assert_one_message(refused.stderr, "unsafe_key_file")
    (state / "something").unlink()
    assert call(*init).exit_code == 0
    assert state.stat().st_mode & 0o777 == 0o700
    assert (state / "coordinator.db").stat().st_mode & 0o777 == 0o600


async def test_an_open_database_is_closed_to_others(tmp_path: Path) -> None:
    async with open_market(tmp_path / "state"):
        pass
    file = tmp_path / "state" / "coordinator.db"
    file.chmod(0o644)
    async with open_market(tmp_path / "state"):
        assert file.stat().st_mode & 0o777 == 0o600


def test_no_password_on_the_command_line(tmp_path: Path) -> None:
    for address in ("postgresql://a:secret@/x", "postgresql://a@/x?password=secret"):
        init = ("coordinator", "init", "--network", NETWORK, "--state", tmp_path / "s")
        refused = call(*init, "--database", address)
        assert_one_message(refused.stderr, "usage")
        assert "secret" not in refused.stderr
    assert not (tmp_path / "s").exists()


def test_an_init_that_failed_can_be_repeated(tmp_path: Path) -> None:
    init = ("coordinator", "init", "--network", NETWORK, "--state", tmp_path / "s")
    away = call(*init, "--database", f"postgresql://a@/x?host={tmp_path}")
    assert_one_message(away.stderr, "not_writable")
    assert call(*init).exit_code == 0


def test_the_switch_while_somebody_holds_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lumaris_coordinator.store.sqlite.LOCK_WAIT_S", 0.05)
    settings = Settings(state=tmp_path / "state", network=NETWORK)
    commands.prepare(settings)
    with closing(backend_of(settings.state, "").writer()) as held:
        held.execute("BEGIN IMMEDIATE")
        with pytest.raises(LumarisError, match="busy"):
            commands.freeze(settings, True)
    assert commands.freeze(settings, True)


def test_a_backup_does_not_follow_or_replace_what_lies_there(tmp_path: Path) -> None:
    settings = Settings(state=tmp_path / "state", network=NETWORK)
    commands.prepare(settings)
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    out.mkdir()
    (out / "backup.part").symlink_to(victim)
    commands.backup(settings, out / "backup")
    for name, target in (("dangling", tmp_path / "none"), ("link", victim)):
        (out / name).symlink_to(target)
        with pytest.raises(LumarisError, match="exists already"):
            commands.backup(settings, out / name)
    with pytest.raises(LumarisError, match="not_writable"):
        commands.backup(settings, tmp_path / "missing" / "backup")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "none").exists()
    assert sorted(path.name for path in out.iterdir()) == [
        "backup",
        "backup.part",
        "dangling",
        "link",
    ]


def forged(file: Path, change: Callable[[list[Any]], None]) -> None:
    """Another text with a right checksum: whoever can write the file can make that too."""
    lines = [json.loads(line) for line in file.read_bytes().splitlines()[:-1]]
    change(lines)
    text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    rows = sum(isinstance(line, list) for line in lines)
    foot = {"rows": rows, "sha256": hashlib.sha256(text).hexdigest()}
    file.write_bytes(text + json.dumps(foot).encode() + b"\n")


FORGED: dict[str, Callable[[list[Any]], None]] = {
    "no bytes": lambda lines: lines.insert(2, [{"b65": ""}, "x"]),
    "bytes that are a number": lambda lines: lines.insert(2, [{"b64": 1}, "x"]),
    "too many columns": lambda lines: lines.insert(2, ["a", "b", "c"]),
    "a row before its table": lambda lines: lines.insert(1, ["a", "b"]),
    "nothing": lambda lines: lines.insert(2, [None, None]),
    "a list": lambda lines: lines.insert(2, [[], []]),
    "a number too large": lambda lines: lines.insert(2, ["a", 2**70]),
    "an unknown table": lambda lines: lines.append({"table": "x; DROP", "columns": []}),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_backup_is_refused_in_words(tmp_path: Path, case: str) -> None:
    settings, file = Settings(state=tmp_path / "state", network=NETWORK), tmp_path / "backup"
    commands.prepare(settings)
    commands.backup(settings, file)
    forged(file, FORGED[case])
    fresh = replace(settings, state=emptied(settings.state))
    with pytest.raises(LumarisError, match="backup_invalid"):
        commands.restore(fresh, file)


@pytest.mark.slow
def test_a_forged_backup_is_refused_by_a_server_too(
    tmp_path: Path, postgres_server: Server
) -> None:
    settings, file = Settings(state=tmp_path / "state", network=NETWORK), tmp_path / "backup"
    commands.prepare(settings)
    commands.backup(settings, file)
    state, whole = emptied(settings.state), file.read_bytes()
    with postgres_server.database(empty=True) as dsn:
        fresh = replace(settings, state=state, database=dsn)
        for change in FORGED.values():
            file.write_bytes(whole)
            forged(file, change)
            with pytest.raises(LumarisError, match="backup_invalid"):
                commands.restore(fresh, file)
        file.write_bytes(whole)
        commands.restore(fresh, file)


def emptied(state: Path) -> Path:
    """The same folder without its data."""
    for name in ("coordinator.db", "coordinator.db-wal", "coordinator.db-shm", folder.MARKER):
        (state / name).unlink(missing_ok=True)
    return state


def test_a_backup_of_another_network_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    settings, file = Settings(state=tmp_path / "state", network=NETWORK), tmp_path / "backup"
    commands.prepare(settings)
    commands.backup(settings, file)
    forged(file, lambda lines: lines[0].update(network="elsewhere"))
    fresh = replace(settings, state=emptied(settings.state))
    with pytest.raises(LumarisError, match="of network elsewhere"):
        commands.restore(fresh, file)
    assert not (fresh.state / "coordinator.db").exists()


def test_the_kept_list_survives_a_restore(tmp_path: Path) -> None:
    settings, file = Settings(state=tmp_path / "state", network=NETWORK), tmp_path / "backup"
    commands.prepare(settings)
    commands.backup(settings, file)
    commands.restore(replace(settings, state=emptied(settings.state)), file)
    with closing(backend_of(settings.state, "").writer()) as connection:
        row = first(connection, "SELECT value FROM setting WHERE name = 'key_list'")
    assert row is not None
    assert base64.b64decode(row[0]) == (settings.state / "keys" / "list").read_bytes()
