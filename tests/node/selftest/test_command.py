"""`lumaris node selftest`: the table, the exit code, and that no node is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lumaris.cli.root import root
from lumaris_node import api
from lumaris_node.selftest import command, suite
from lumaris_node.selftest.rows import Row
from lumaris_node.selftest.suite import Report


def call(*words: str) -> int:
    code = root.main(list(words), standalone_mode=False)
    assert isinstance(code, int)
    return code


@pytest.mark.slow
def test_a_machine_that_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "node").mkdir()
    state = ("--state", str(tmp_path / "node"))
    assert call("node", "selftest", *state, "--tier", "wasm") == 0
    said = capsys.readouterr()
    assert "path_above" in said.out
    assert "wasm is offered" in said.err
    assert not [path for path in (tmp_path / "node").glob("*") if path.name != "wasm"]


def report(*rows: Row) -> Report:
    return Report("wasm", "wasmtime-1", "wasm", 1, 5, 0.1, rows)


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ((Row("mount", True), Row("leak", False, counts=False)), 0),
        ((Row("mount", False, detail="\x1b[31mred"), Row("chroot", True)), 1),
    ],
)
@pytest.mark.slow
def test_the_exit_code_says_whether_it_held(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rows: tuple[Row, ...],
    code: int,
):
    async def run(*_: Any, **__: Any) -> Report:
        return report(*rows)

    monkeypatch.setattr(suite, "run", run)
    (tmp_path / "node").mkdir()
    words = ("node", "selftest", "--state", str(tmp_path / "node"), "--tier", "wasm")
    assert call(*words) == code
    said = capsys.readouterr()
    assert ("FAILED" in said.out) == bool(code)
    assert "\x1b" not in said.out, "a guest's words are cleaned"
    assert call(*words, "--json") == code
    found = json.loads(capsys.readouterr().out)
    assert found["held"] == (not code)
    assert [row["name"] for row in found["tiers"][0]["rows"]] == sorted(row.name for row in rows)


def test_a_tier_that_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Missing:
        why_not = "No container engine answers."

        async def probe(self) -> None:
            return None

        async def aclose(self) -> None:
            return None

    monkeypatch.setattr(command, "make_executor", lambda *_: Missing())
    (tmp_path / "node").mkdir()
    words = ("node", "selftest", "--state", str(tmp_path / "node"), "--tier", "container")
    assert call(*words) == 1
    assert "container: not tested: No container engine answers." in capsys.readouterr().err
    assert call(*words, "--json") == 1
    assert json.loads(capsys.readouterr().out)["held"] is False
    held = {"tier": "wasm", "held": True, "version": "1", "assurance": "wasm-sandbox", "rows": []}
    held |= {"suite": 1, "seconds": 1.0}
    absent: dict[str, Any] = {
        "tier": "container",
        "held": None,
        "code": "tier_unavailable",
        "why": "",
        "rows": [],
    }
    for found, code in (([held, absent], 0), ([absent], 1), ([absent, {**held, "held": False}], 1)):
        monkeypatch.setattr(command, "run", lambda *_, found=found, **__: [{**x} for x in found])
        assert call(*words[:-2]) == code


def test_a_node_that_offers_something_else_is_asked_to_look_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked: list[str] = []
    record: dict[str, Any] = {"tier": "wasm", "held": None, "why": "It needs Linux.", "rows": []}

    async def ask(_: Path, name: str) -> dict[str, Any]:
        asked.append(name)
        return {"tiers": [{"tier": "wasm", "offered": True}, {"tier": "vm", "offered": False}]}

    monkeypatch.setattr(command, "run", lambda *_, **__: [dict(record)])
    monkeypatch.setattr(api, "call", ask)
    assert call("node", "selftest", "--state", str(tmp_path)) == 1
    assert "the running node offers wasm" in capsys.readouterr().err
    assert asked == ["status", "retest"]
    asked.clear()
    record["tier"] = "vm"
    assert call("node", "selftest", "--state", str(tmp_path)) == 1
    assert asked == ["status"]
