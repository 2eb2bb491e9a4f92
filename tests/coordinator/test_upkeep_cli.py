"""`lumaris coordinator init|migrate|backup|restore|check|freeze`."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from lumaris.cli.coordinator import _settings
from lumaris_coordinator.config import Settings
from lumaris_coordinator.store import sqlite
from lumaris_coordinator.upkeep import commands
from tests.sdk.cli.command import assert_one_message, call, json_of


def test_the_life_of_a_folder(tmp_path: Path) -> None:
    state, file = tmp_path / "state", tmp_path / "backup"
    init = ("coordinator", "init", "--network", "town", "--fee-bps", "250", "--state", state)
    made = json_of(call(*init, "--json"))
    assert made["config"] == str(state / "coordinator.toml")
    assert state.stat().st_mode & 0o777 == 0o700
    again = call(*init)
    assert again.exit_code == 1
    assert_one_message(again.stderr, "not_writable")
    assert call("coordinator", "migrate", "--state", state).stdout == "up to date\n"
    assert call("coordinator", "freeze", "--state", state).stdout == "off\n"
    assert call("coordinator", "freeze", "on", "--state", state).stdout == "on\n"
    assert json_of(call("coordinator", "freeze", "--json", "--state", state)) == {"frozen": True}

    written = json_of(call("coordinator", "backup", file, "--json", "--state", state))
    assert (written["rows"], written["log_size"]) == (5, 0)
    new = tmp_path / "new"
    new.mkdir(mode=0o700)
    shutil.copy2(state / "coordinator.key", new)
    shutil.copytree(state / "keys", new / "keys")
    assert call("coordinator", "freeze", "off", "--state", state).stdout == "off\n"
    found = json_of(call("coordinator", "restore", file, "--json", "--state", new))
    assert found == {**written, "check": found["check"]}
    assert found["check"]["sound"]
    # What is restored stands still until somebody has looked at it.
    assert call("coordinator", "freeze", "--state", new).stdout == "on\n"


def test_data_is_not_restored_beside_the_keys_of_another(tmp_path: Path) -> None:
    state, file = tmp_path / "state", tmp_path / "backup"
    init = call("coordinator", "init", "--network", "town", "--json", "--state", state)
    peer = json_of(init)["coordinator"]
    call("coordinator", "backup", file, "--state", state)
    new = tmp_path / "new"
    none = call("coordinator", "restore", file, "--state", new)
    assert_one_message(none.stderr, "not_found")
    new.mkdir(mode=0o700)
    shutil.copytree(state / "keys", new / "keys")
    shutil.copy2(state / "coordinator.key", new)
    assert call("coordinator", "restore", file, "--state", new).exit_code == 0
    other = tmp_path / "other"
    call("coordinator", "init", "--network", "town", "--state", other)
    foreign = call("coordinator", "restore", file, "--state", other)
    assert_one_message(foreign.stderr, "config_invalid")
    assert peer in foreign.stderr
    shutil.copy2(new / "coordinator.db", other)
    for words in (("check",), ("freeze", "on"), ("backup", tmp_path / "x")):
        bad = call("coordinator", *words, "--state", other)
        assert_one_message(bad.stderr, "config_invalid")
        assert f"is of coordinator {peer}" in bad.stderr


def test_init_says_what_to_do_next(tmp_path: Path) -> None:
    found = call("coordinator", "init", "--network", "town", "--state", tmp_path / "state")
    assert "network: town, for ever" in found.stderr
    assert found.stdout.startswith("coordinator 12D3Koo")
    assert f"lumaris coordinator up --state {tmp_path / 'state'}" in found.stderr
    assert "root key offline" in found.stderr


def test_a_check_that_fails_exits_with_1(tmp_path: Path) -> None:
    call("coordinator", "init", "--network", "town", "--state", tmp_path / "state")
    good = call("coordinator", "check", "--state", tmp_path / "state")
    assert (good.exit_code, good.stdout) == (0, "")
    with closing(sqlite.connect(tmp_path / "state" / "coordinator.db")) as connection:
        connection.execute(
            "INSERT INTO account (id, owner, kind, currency, balance)"
            " VALUES ('acc_x:TEST', 'acc_x', 'peer', 'TEST', 5)"
        )
    bad = call("coordinator", "check", "--state", tmp_path / "state")
    assert bad.exit_code == 1
    assert "add up to 5 nanos instead of 0" in bad.stdout
    assert "NOT SOUND" in bad.stderr
    report = json_of(call("coordinator", "check", "--json", "--state", tmp_path / "state"))
    assert len(report["problems"]) == 3


def test_a_network_is_named_once_and_kept(tmp_path: Path) -> None:
    """By the start of a coordinator that has no configuration as well."""
    nameless = call("coordinator", "init", "--state", tmp_path / "new")
    assert_one_message(nameless.stderr, "usage")
    assert "--network NAME" in nameless.stderr
    assert not (tmp_path / "new").exists()

    state = tmp_path / "state"
    commands.prepare(Settings(state=state, network="mynet"))  # as `up --network mynet` does
    assert not (state / "coordinator.toml").exists()
    assert _settings(state, {}).network == "mynet"
    root = state / "keys" / "root.key"
    for words in (
        ("check",),
        ("keys", "list"),
        ("keys", "rotate", "--root", root),
        ("user", "create", "ada"),
        ("operator", "create", "eve"),
        ("freeze", "on"),
        ("backup", tmp_path / "backup"),
    ):
        found = call("coordinator", *words, "--state", state)
        assert found.exit_code == 0, (words, found.stderr)
    up = ("coordinator", "up", "--network", "other", "--port", "0", "--no-overlay")
    refused = call(*up, "--state", state)
    assert_one_message(refused.stderr, "config_invalid")
    assert f"{state} is of the network mynet, and other was named" in refused.stderr
    other = call("coordinator", "init", "--network", "other", "--state", state)
    assert "is of the network mynet" in other.stderr
    (state / "coordinator.toml").write_text("network = 'other'\n")
    for words in (("check",), ("freeze", "off")):
        edited = call("coordinator", *words, "--state", state)
        assert_one_message(edited.stderr, "config_invalid")
        assert "is of the network mynet" in edited.stderr


def test_what_is_missing_is_told_with_a_way_on(tmp_path: Path) -> None:
    state, file = tmp_path / "state", tmp_path / "backup"
    commands.prepare(Settings(state=state))
    file.touch()
    for words, way in (
        (("freeze", "--state", tmp_path / "typo"), "Is --state its folder?"),
        (("check", "--state", tmp_path / "typo"), "Is --state its folder?"),
        (("backup", file, "--state", state), "Name a new file"),
        (("user", "key", "nobody", "--state", state), "`lumaris coordinator user create`"),
        (("operator", "renew", "nobody", "--state", state), "`lumaris coordinator operator list`"),
    ):
        found = call("coordinator", *words)
        assert found.exit_code != 0
        assert way in found.stderr


def test_options_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "coordinator.toml").write_text("fee_bps = 100\nport = 1\ndatabase = ''\n")
    monkeypatch.setenv("LUMARIS_COORDINATOR_DATABASE", "postgresql://x:secret@/y")
    found = _settings(tmp_path, {"port": 2}, port=3, host="::1")
    assert (found.fee_bps, found.port, found.host) == (100, 2, "::1")
    assert found.database == "postgresql://x:secret@/y"
    assert "secret" not in repr(found)
