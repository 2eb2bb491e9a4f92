"""`receipt show` and `receipt verify` on the golden receipts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.protocol import parties
from tests.sdk.cli.command import ERROR_SHAPE, assert_one_message, call, json_of, shape_of

VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "vectors" / "receipts.json").read_text()
)
PAID = VECTORS[1]
RECEIPT_SHAPE = {
    "receipt": "str",
    "session": "str",
    "buyer": "str",
    "seller": "str",
    "currency": "str",
    "outcome": "str",
    "verification": "str",
    "cap_nanos": "int",
    "paid_nanos": "int",
    "seller_nanos": "int",
    "fee_nanos": "int",
    "refund_nanos": "int",
    "issued_at": "int",
    "guarantees": ["str"],
    "not_guaranteed": ["str"],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "receipt.json"
    path.write_text(PAID["file"])
    return path


def _trusting(folder: Path, coordinator: str) -> Path:
    """A buyer's state that was told about a coordinator."""
    info = {
        "network": "n",
        "coordinator": coordinator,
        "currency": "TEST",
        "fee_bps": 0,
        "settle_window_s": 0,
        "test_credit_nanos": 0,
        "version": "1",
        "time": 0,
    }
    standing = {
        "url": "http://127.0.0.1:9",
        "info": info,
        "certificate": "",
        "account": "",
        "token": "",
        "expires_at": 0,
        "bootstrap": [],
    }
    folder.mkdir()
    (folder / "membership.json").write_text(json.dumps(standing))
    return folder


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["receipt_id"][:8])
def test_valid(vector: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_text(vector["file"])
    found = call("receipt", "verify", path, "--trust", vector["trusted"], state=tmp_path / "none")
    assert found.exit_code == 0
    assert found.stdout.splitlines()[-1] == "valid: every check holds"
    assert not (tmp_path / "none").exists(), "verifying leaves nothing behind"


def test_the_buyers_own_coordinator_is_trusted(file: Path, tmp_path: Path) -> None:
    state = _trusting(tmp_path / "state", PAID["trusted"])
    assert call("receipt", "verify", file, state=state).exit_code == 0
    stranger = call("receipt", "verify", file, "--trust", parties.BUYER.peer_id, state=state)
    assert stranger.exit_code == 2, "--trust replaces the default"


def test_cannot_tell(file: Path, tmp_path: Path) -> None:
    found = call("receipt", "verify", file, state=tmp_path)
    assert found.exit_code == 2
    assert "cannot tell" in found.stdout
    for name in (tmp_path / "none", "rcp_" + "a" * 24, tmp_path, "\0"):
        found = call("receipt", "verify", name, state=tmp_path)
        assert found.exit_code == 2
        assert_one_message(found.stderr, "not_found")
    found = call("receipt", "verify", file, "--trust", "12D3KooWnobody", state=tmp_path)
    assert found.exit_code == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: "[" * 100_000,
        lambda text: text.replace('"index": ', '"index": 1'),
        lambda text: text + "x" * (2 << 20),
        lambda text: _flip(text),  # noqa: PLW0108 - defined below
    ],
)
def test_invalid(damage: Any, file: Path) -> None:
    file.write_text(damage(PAID["file"]))
    found = call("receipt", "verify", file, "--trust", PAID["trusted"])
    assert found.exit_code == 1
    assert found.stdout.splitlines()[-1] == "invalid: do not rely on this receipt"
    shown = call("receipt", "verify", file, "--trust", PAID["trusted"], "--json")
    assert shown.exit_code == 1
    assert json_of(shown)["verdict"] == "invalid"


def _flip(text: str) -> str:
    """Change one character of the receipt itself."""
    bundle = json.loads(text)
    receipt = bundle["receipt"]
    bundle["receipt"] = receipt[:200] + ("A" if receipt[200] != "A" else "B") + receipt[201:]
    return json.dumps(bundle)


def test_verify_as_json(file: Path) -> None:
    found = call("--json", "receipt", "verify", file, "--trust", PAID["trusted"])
    assert shape_of(json_of(found)) == {
        "verdict": "str",
        "coordinator": "str",
        "checks": [{"name": "str", "holds": "bool", "detail": "str"}],
        "receipt": RECEIPT_SHAPE,
    }
    missing = call("receipt", "verify", "none", "--json")
    assert shape_of(json_of(missing)) == ERROR_SHAPE


def test_show(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    found = call("receipt", "show", file, "--out", copy)
    assert found.exit_code == 0
    assert PAID["receipt_id"] in found.stdout
    assert "0.000123457" in found.stdout
    assert copy.read_bytes() == file.read_bytes()
    assert shape_of(json_of(call("receipt", "show", file, "--json"))) == RECEIPT_SHAPE


def test_show_into_nowhere(file: Path) -> None:
    found = call("receipt", "show", file, "--out", "/dev/null/x")
    assert found.exit_code == 1
    assert_one_message(found.stderr, "not_writable")


def test_show_of_a_corrupted_receipt(file: Path) -> None:
    file.write_text(_flip(PAID["file"]))
    found = call("receipt", "show", file)
    assert found.exit_code == 9
