"""`lumaris job` on the buyer's own records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from lumaris.cli import errors
from lumaris.cli.options import Settings
from lumaris.store import Store
from tests.sdk.cli.command import call, json_of, shape_of

_DONE = "job_" + "a" * 24
_RUNNING = "job_" + "b" * 24
_ROW: dict[str, Any] = {
    "job": _DONE,
    "session": "ses_" + "c" * 24,
    "seller": "12D3KooWseller",
    "image": "python:3.12-wasi",
    "command": '["python","-c","print(6 * 7)"]',
    "state": "failed",
    "reason": "exit_nonzero",
    "detail": "\x1b[2Jpainted",
    "exit_status": 3,
    "cost_nanos": 1_095,
    "wall_ms": 69,
    "cpu_ms": 60,
    "fuel": 10,
    "memory_peak_bytes": 5 << 20,
    "attempts": 1,
    "n": 1,
    "created_at": 1_790_000_000,
    "ended_at": 1_790_000_001,
}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    async def fill() -> None:
        store = Store(tmp_path / "buyer.db")
        running = {"job": _RUNNING, "state": "running", "created_at": 1_790_000_002}
        await store.put_jobs([_ROW, running])
        store.close()

    trio.run(fill)
    folder = tmp_path / "jobs" / _DONE
    folder.mkdir(parents=True)
    (folder / "stdout").write_bytes(b"out \xff\n")
    (folder / "stderr").write_bytes(b"err\n")
    return tmp_path


def test_ls(state: Path) -> None:
    found = call("job", "ls", state=state)
    lines = found.stdout.splitlines()
    assert lines[0].split()[:3] == ["JOB", "STATE", "REASON"]
    assert [line.split()[0] for line in lines[1:]] == [_RUNNING, _DONE]
    assert "0.000001095" in lines[2]
    assert len(call("job", "ls", "-n", "1", state=state).stdout.splitlines()) == 2


def test_ls_as_json(state: Path) -> None:
    report = json_of(call("job", "ls", "--json", state=state))
    kinds: dict[str, Any] = {name: type(value).__name__ for name, value in _ROW.items()}
    assert shape_of(report["items"][1]) == {**kinds, "command": ["str"], "cost": "str"}
    assert report["items"][1]["command"] == ["python", "-c", "print(6 * 7)"]
    assert json_of(call("job", "show", _DONE, "--json", state=state)) == report["items"][1]


def test_nothing_yet(tmp_path: Path) -> None:
    state = tmp_path / "none"
    assert json_of(call("job", "ls", "--json", state=state)) == {"items": []}
    assert call("job", "ls", state=state).exit_code == 0
    assert not state.exists(), "reading leaves nothing behind"


def test_show(state: Path) -> None:
    found = call("job", "show", _DONE, state=state)
    assert "reason    exit_nonzero" in found.stdout
    assert "\x1b" not in found.stdout
    assert call("job", "show", _RUNNING, state=state).exit_code == 0


def test_a_cost_that_is_not_known_yet_is_no_zero(state: Path) -> None:
    async def cut_off() -> None:
        store = Store(state / "buyer.db")
        row = {"job": _RUNNING, "session": "ses_1", "n": 1, "created_at": 1, "ended_at": 2}
        await store.put_jobs([row])
        store.close()

    trio.run(cut_off)
    report = json_of(call("job", "show", _RUNNING, "--json", state=state))
    assert (report["cost"], report["cost_nanos"]) == (None, None)
    assert (
        "- (known when its session is settled)" in call("job", "show", _RUNNING, state=state).stdout
    )
    assert "0.000000000" not in call("job", "ls", state=state).stdout


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ((8_281, 0), "Interrupted. Money moved: 0.000008281.\n"),
        ((0, 0), "Interrupted. No money moved.\n"),
        (
            (1, 1),
            "Money moved: 0.000000001. What else is held returns when its session is settled.",
        ),
        (None, "Interrupted.\n"),
    ],
)
def test_an_interrupt_says_what_was_spent(
    found: tuple[int, int] | None,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("lumaris.cli.local.read_store", lambda *_: found)
    assert errors.report(KeyboardInterrupt(), Settings()) == 130
    assert says in capsys.readouterr().err


def test_logs(state: Path) -> None:
    found = call("job", "logs", _DONE, state=state)
    assert found.stdout_bytes == b"out \xff\n"
    assert found.stderr == "err\n"
    assert json_of(call("--json", "job", "logs", _DONE, state=state)) == {
        "job": _DONE,
        "stdout": "out \ufffd\n",
        "stderr": "err\n",
    }
    silent = call("job", "logs", _RUNNING, state=state)
    assert (silent.exit_code, silent.stdout) == (0, "")


def test_a_database_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "buyer.db").write_text("not a database, but text that is long enough" * 100)
    found = call("job", "ls", state=tmp_path)
    assert found.exit_code == 1
    assert "error[not_writable]" in found.stderr
