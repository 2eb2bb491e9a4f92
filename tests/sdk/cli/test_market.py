"""The command against a market of real processes, from `devnet up` to `devnet down`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sdk.cli.command import assert_one_message, call, json_of, shape_of, spawn

pytestmark = [pytest.mark.planet, pytest.mark.slow]

_IMAGE = "python:3.12-wasi"
_WAIT_S = 60
_WALLET = {
    "account": "str",
    "peer": "str",
    "currency": "str",
    "free_nanos": "int",
    "held_nanos": "int",
    "free": "str",
    "held": "str",
    "disputed_nanos": "int",
    "disputed": "str",
}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A devnet of one seller, made and ended by the command itself."""
    folder = tmp_path_factory.mktemp("n") / "d"
    up = spawn("devnet", "up", "--state", folder, "--sellers", "1", "--json", state=folder)
    try:
        assert up.returncode == 0, up.stdout
        yield json.loads(up.stdout)
    finally:
        down = spawn("devnet", "down", "--state", folder, state=folder)
        assert down.returncode == 0, down.stderr
        assert not folder.exists()


def _words(net: dict[str, Any], *words: str) -> list[str]:
    return ["--coordinator", net["coordinator"]["url"], *words]


def _buy(net: dict[str, Any], *words: str) -> subprocess.CompletedProcess[str]:
    return spawn(*_words(net, *words), state=Path(net["buyer"]["state"]))


def test_devnet_status(net: dict[str, Any]) -> None:
    found = call("devnet", "status", "--state", net["state"])
    assert found.exit_code == 0
    assert [line.split()[0] for line in found.stdout.splitlines()[:3]] == [
        "PROGRAM",
        "coordinator",
        "seller",
    ]
    again = spawn("devnet", "up", "--state", net["state"], state=Path(net["state"]))
    assert_one_message(again.stderr, "already_running")


def test_wallet(net: dict[str, Any]) -> None:
    state = Path(net["buyer"]["state"])
    before = json_of(call(*_words(net, "wallet", "show", "--json"), state=state))
    assert shape_of(before) == _WALLET
    after = json_of(call(*_words(net, "wallet", "deposit", "0.5", "--json"), state=state))
    assert after["free_nanos"] == before["free_nanos"] + 500_000_000
    much = call(*_words(net, "wallet", "deposit", "5000000"), state=state)
    assert much.exit_code == 7
    assert_one_message(much.stderr, "credit_limit")
    assert "free" in call(*_words(net, "wallet", "show"), state=state).stdout
    taken = json_of(call(*_words(net, "wallet", "payout", "0.25", "--json"), state=state))
    assert (taken["amount_nanos"], taken["state"]) == (250_000_000, "held")
    rest = json_of(call(*_words(net, "wallet", "show", "--json"), state=state))
    assert rest["free_nanos"] == after["free_nanos"] - 250_000_000


def test_wallet_of_a_coordinator_that_was_set_up_anew(net: dict[str, Any], tmp_path: Path) -> None:
    assert call(*_words(net, "wallet", "show"), state=tmp_path).exit_code == 0
    cache = tmp_path / "membership.json"
    standing = json.loads(cache.read_text())
    cache.write_text(json.dumps({**standing, "token": "of-another-life"}))
    assert call(*_words(net, "wallet", "show"), state=tmp_path).exit_code == 0


def test_node_status(net: dict[str, Any]) -> None:
    found = call("node", "status", "--json", "--state", net["sellers"][0]["state"])
    assert json_of(found)["peer"] == net["sellers"][0]["peer"]


def test_buying(net: dict[str, Any], tmp_path: Path) -> None:
    """A run that fails, one that delivers, its log and its receipt, altered and not."""
    state = Path(net["buyer"]["state"])
    failed = _buy(net, "run", _IMAGE, "python", "-c", "import sys; sys.exit(7)")
    assert failed.returncode == 7, failed.stderr
    source, out = tmp_path / "in.txt", tmp_path / "out"
    source.write_text("six")
    code = "print(6 * 7); open('/out/r.txt', 'w').write(open('/in/in.txt').read() * 2)"
    words = ["run", "--json", "--in", str(source), "--out", str(out), _IMAGE, "python", "-c", code]
    found = _buy(net, *words)
    assert found.returncode == 0, found.stdout
    report = json.loads(found.stdout)
    assert report["stdout"] == "42\n"
    assert (out / "r.txt").read_text() == "sixsix"
    assert report["cost_nanos"] + report["released_nanos"] == report["plan"]["cap_nanos"]

    logs = call("job", "logs", report["job"], state=state)
    assert logs.stdout == "42\n"
    file = tmp_path / "receipt.json"
    assert call("receipt", "show", report["job"], "--out", file, state=state).exit_code == 0
    assert call("receipt", "verify", report["receipt"], state=state).exit_code == 0
    assert call("receipt", "verify", file, state=state).exit_code == 0
    assert call("receipt", "verify", file, state=tmp_path / "other").exit_code == 2
    file.write_text(file.read_text().replace('"size": ', '"size": 1'))
    assert call("receipt", "verify", file, state=state).exit_code == 1


def test_ctrl_c_cancels_and_returns_the_money(net: dict[str, Any]) -> None:
    state = Path(net["buyer"]["state"])
    words = _words(net, "run", _IMAGE, "python", "-c", "while True: pass")
    environment = {**os.environ, "LUMARIS_STATE": str(state)}
    with subprocess.Popen(
        [sys.executable, "-m", "lumaris.cli", *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if " running at " in line:
                break
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=_WAIT_S)
    assert process.returncode == 130
    assert_one_message(stderr, "interrupted")
    newest = json_of(call("job", "ls", "-n", "1", "--json", state=state))["items"][0]
    assert (newest["state"], newest["reason"]) == ("failed", "cancelled")
    _wait_for_nothing_held(net, state)
    paid = json_of(call("receipt", "show", newest["job"], "--json", state=state))["paid_nanos"]
    assert newest["cost_nanos"] == paid
    assert ("Money moved: " if paid else "No money moved.") in stderr


def _wait_for_nothing_held(net: dict[str, Any], state: Path) -> None:
    deadline = time.monotonic() + _WAIT_S
    while True:
        account = json_of(call(*_words(net, "wallet", "show", "--json"), state=state))
        if account["held_nanos"] == 0:
            return
        assert time.monotonic() < deadline, account
        time.sleep(0.05)
