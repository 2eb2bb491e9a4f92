"""`lumaris coordinator user` and `lumaris user`: a user that the operator makes, and its peers."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumaris_coordinator.identity import commands, secrets
from tests.coordinator.served import Served
from tests.sdk.cli.command import assert_one_message, call, json_of

pytestmark = pytest.mark.slow


def test_a_user_owns_the_peers_that_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, state, buyer = Served(tmp_path / "state"), tmp_path / "state", tmp_path / "buyer"
    monkeypatch.delenv("LUMARIS_API_KEY", raising=False)
    with served.running():
        here = ("--coordinator", served.url, "--state", buyer)

        def failing(*words: str | Path) -> str:
            found = call(*words)
            assert found.exit_code != 0
            return found.stderr

        assert_one_message(failing("user", "show", *here), "unauthorized")
        made = call("coordinator", "user", "create", "ada", "--state", state)
        key = made.stdout.strip()
        assert secrets.key_id(key) is not None
        again = failing("coordinator", "user", "create", "ada", "--state", state)
        assert_one_message(again, "name_taken")

        monkeypatch.setenv("LUMARIS_API_KEY", key)
        typo = tmp_path / "typo"
        elsewhere = failing("user", "link", "--coordinator", served.url, "--state", typo)
        assert_one_message(elsewhere, "not_found")
        assert not typo.exists()
        assert call("user", "show", *here).exit_code == 0
        assert_one_message(failing("user", "link", *here), "not_certified")
        peer = json_of(call("wallet", "deposit", "1", "--json", *here))["peer"]
        shown = json_of(call("user", "link", "--json", *here))
        assert (shown["name"], shown["operator"], shown["peers"]) == ("ada", False, [peer])
        assert f"peer  {peer}" in call("user", "show", *here).stdout

        other = call("coordinator", "user", "create", "bob", "--state", state).stdout.strip()
        monkeypatch.setenv("LUMARIS_API_KEY", other)
        assert_one_message(failing("user", "link", *here), "already_linked")
        assert_one_message(failing("user", "unlink", *here), "not_found")

        reads = json_of(call("coordinator", "user", "key", "ada", "--json", "--state", state))
        assert reads["scopes"] == ["read"]
        monkeypatch.setenv("LUMARIS_API_KEY", reads["key"])
        assert json_of(call("user", "show", "--json", *here))["peers"] == [peer]
        refused = failing("user", "unlink", *here)
        assert_one_message(refused, "forbidden")
        assert "--scope write" in refused
        monkeypatch.setenv("LUMARIS_API_KEY", key)
        assert json_of(call("user", "unlink", "--json", *here))["peers"] == []
        monkeypatch.setenv("LUMARIS_API_KEY", key + "x")
        refused = failing("user", "show", *here)
        assert_one_message(refused, "unauthorized")
        assert "its operator makes another one" in refused


def test_keys_are_for_users_that_exist_and_have_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    call("coordinator", "init", "--network", "devnet", "--state", state)
    call("coordinator", "operator", "create", "root", "--state", state)
    for name in ("nobody", "root"):  # an operator's key is no user's
        found = call("coordinator", "user", "key", name, "--state", state)
        assert_one_message(found.stderr, "not_found")
    call("coordinator", "user", "create", "ada", "--scope", "read", "--state", state)
    monkeypatch.setattr(commands, "API_KEYS_PER_USER_MAX", 2)
    more = ("coordinator", "user", "key", "ada", "--state", state)
    assert call(*more).exit_code == 0
    assert_one_message(call(*more).stderr, "limit_reached")
