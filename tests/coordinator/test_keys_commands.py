"""`lumaris coordinator keys|operator`, from the command line to the files."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result

from lumaris_coordinator.identity import keys, secrets
from tests.coordinator.builders import Party
from tests.sdk.cli.command import assert_one_message, call, json_of


def made(tmp_path: Path) -> Path:
    state = tmp_path / "state"
    assert call("coordinator", "init", "--network", "devnet", "--state", state).exit_code == 0
    return state


def listed(state: Path) -> list[tuple[str, str]]:
    found = json_of(call("coordinator", "keys", "list", "--state", state, "--json"))
    return [(key["peer"], key["state"]) for key in found["keys"]]


def test_the_life_of_a_key(tmp_path: Path) -> None:
    state = made(tmp_path)
    ((first, _),) = listed(state)
    root = tmp_path / "root.key"
    (state / "keys" / "root.key").rename(root)
    rotate = ("coordinator", "keys", "rotate", "--root", root, "--state", state)
    waiting = json_of(call(*rotate, "--json"))["peer"]
    assert listed(state) == [(first, "current"), (waiting, "waiting")]
    shown = call("coordinator", "keys", "list", "--state", state)
    assert f"{waiting}  waiting  from 20" in shown.stdout
    twice = call(*rotate)
    assert_one_message(twice.stderr, "usage")
    assert f"{waiting} waits already" in twice.stderr
    found = call(*rotate, "--now")
    now = found.stdout.strip()
    assert f"{waiting} was added before and takes over from it" in found.stderr
    assert listed(state) == [(first, "old"), (waiting, "waiting"), (now, "current")]
    revoke = ("coordinator", "keys", "revoke", first, "--root", root, "--state", state)
    assert call(*revoke).exit_code == 0
    assert listed(state)[0] == (first, "revoked")
    shown = call("coordinator", "keys", "list", "--state", state)
    assert f"{now}  current" in shown.stdout
    assert "move keys/root.key" not in shown.stderr


def test_a_root_that_still_lies_there_is_told(tmp_path: Path) -> None:
    shown = call("coordinator", "keys", "list", "--state", made(tmp_path))
    assert "move keys/root.key to a place offline" in shown.stderr


def test_wrong_roots_and_keys(tmp_path: Path) -> None:
    state = made(tmp_path)
    other = made(tmp_path / "other")
    root = state / keys.FOLDER / keys.ROOT_KEY
    foreign = other / keys.FOLDER / keys.ROOT_KEY
    for words, code in (
        (("rotate", "--root", foreign), "root_changed"),
        (("rotate", "--root", tmp_path / "none"), "not_found"),
        (("revoke", Party("x").peer, "--root", root), "not_found"),
        (("revoke", listed(state)[0][0], "--root", root), "usage"),
    ):
        found = call("coordinator", "keys", *words, "--state", state)
        assert found.exit_code != 0
        assert_one_message(found.stderr, code)
        assert "cached membership" not in found.stderr
        assert "with the `ls` command" not in found.stderr


def test_a_key_that_waits_can_be_replaced(tmp_path: Path) -> None:
    state = made(tmp_path)
    root = state / keys.FOLDER / keys.ROOT_KEY
    rotate = ("coordinator", "keys", "rotate", "--root", root, "--json", "--state", state)
    first = json_of(call(*rotate))
    assert first["waiting"] == []
    revoke = ("coordinator", "keys", "revoke", first["peer"], "--root", root, "--state", state)
    assert call(*revoke).exit_code == 0
    second = json_of(call(*rotate))
    assert second["waiting"] == []
    waiting = {"peer": second["peer"], "starts_at": second["starts_at"]}
    assert json_of(call(*rotate, "--now"))["waiting"] == [waiting]


def test_an_operator_is_made_with_a_key(tmp_path: Path) -> None:
    state = made(tmp_path)
    create = ("coordinator", "operator", "create", "root", "--state", state)
    found = call(*create)
    assert secrets.key_id(found.stdout.strip()) is not None
    again = call(*create)
    assert_one_message(again.stderr, "name_taken")


def test_an_operators_keys_are_taken_back(tmp_path: Path) -> None:
    state = made(tmp_path)

    def run(*words: str) -> Result:
        return call("coordinator", "operator", *words, "--state", state)

    first, other = run("create", "ada").stdout.strip(), run("create", "bob").stdout.strip()
    ada, bob = json_of(run("list", "--json"))
    assert [key["id"] for key in ada["keys"]] == [secrets.key_id(first)]
    assert ada["keys"][0]["id"] in run("list").stdout
    renewed = run("renew", "ada").stdout.strip()
    (ada, bob) = json_of(run("list", "--json"))
    assert [key["id"] for key in ada["keys"]] == [secrets.key_id(renewed)]
    assert "1 keys of ada have ended" in run("revoke", "ada").stderr
    (ada, bob) = json_of(run("list", "--json"))
    assert (ada["name"], ada["keys"]) == ("ada", [])
    assert [key["id"] for key in bob["keys"]] == [secrets.key_id(other)]
    assert_one_message(run("revoke", "eve").stderr, "not_found")
    user = call("coordinator", "user", "create", "carl", "--state", state)
    assert user.exit_code == 0
    assert_one_message(run("renew", "carl").stderr, "not_found")


@pytest.mark.parametrize("name", ["", "a", "a\nb", "a\x1b[2J", " ada", "a" * 65])
def test_names_that_would_mislead(tmp_path: Path, name: str) -> None:
    state = made(tmp_path)
    for kind in ("operator", "user"):
        refused = call("coordinator", kind, "create", name, "--state", state)
        assert refused.exit_code != 0
        assert_one_message(refused.stderr, "usage")
