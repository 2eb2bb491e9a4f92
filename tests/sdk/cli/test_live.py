"""The commands that reach into a running job; the streams themselves are played."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from lumaris import live
from lumaris.cli import live as commands
from lumaris.live import Place
from lumaris.store import Store
from lumaris_protocol.errors import LumarisError
from tests.sdk.cli.command import assert_one_message, call, json_of

_JOB = "job_" + "b" * 24
_DONE = "job_" + "a" * 24
_PLACE = Place(_JOB, seller="12D3KooWseller", session="ses_" + "c" * 24, n=2)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    async def fill() -> None:
        store = Store(tmp_path / "buyer.db")
        running = {
            "job": _JOB,
            "state": "running",
            "seller": _PLACE.seller,
            "session": _PLACE.session,
            "n": _PLACE.n,
            "owner": store._owner,
            "created_at": int(time.time()),
            "cpu_ms": 1_500,
            "memory_peak_bytes": 3 << 20,
        }
        done = {"job": _DONE, "state": "failed", "reason": "exit_nonzero", "ended_at": 1}
        await store.put_jobs([running, {**done, "created_at": 1}])
        store.close()

    trio.run(fill)

    @asynccontextmanager
    async def no_overlay(_: Any) -> AsyncIterator[str]:
        yield "overlay"

    monkeypatch.setattr(live, "open_live", no_overlay)
    return tmp_path


class Repeater:
    """A command that says back what it hears and ends with its input."""

    def __init__(self) -> None:
        self.exit_status: int | None = None
        self.sizes: list[tuple[int, int]] = []
        self._heard, self._said = trio.open_memory_channel[bytes](8)

    async def send(self, data: bytes) -> None:
        await self._heard.send(data)

    async def send_eof(self) -> None:
        self._heard.close()

    async def resize(self, rows: int, columns: int) -> None:
        self.sizes.append((rows, columns))

    async def receive(self) -> tuple[str, bytes] | None:
        try:
            return "stdout", await self._said.receive()
        except trio.EndOfChannel:
            self.exit_status = 9
            return None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []

    @asynccontextmanager
    async def open_command(overlay: Any, place: Place, words: Any, **more: Any) -> Any:
        found.append((overlay, place, words, more["tty"]))
        yield Repeater()

    monkeypatch.setattr(live, "open_command", open_command)
    return found


@contextmanager
def standard_input(data: bytes) -> Any:
    """Bytes at descriptor 0, where commands read them."""
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    before = os.dup(0)
    os.dup2(reader, 0)
    os.close(reader)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_exec(state: Path, asked: list[Any]) -> None:
    with standard_input(b"hello\n"):
        found = call("job", "exec", _JOB, "--", "cat", "-n", state=state)
    assert (found.exit_code, found.stdout) == (9, "hello\n")
    assert asked == [("overlay", _PLACE, ("cat", "-n"), False)]


def test_exec_as_json_without_input(state: Path, asked: list[Any]) -> None:
    found = call("job", "exec", "--json", "--no-stdin", _JOB, "true", state=state)
    assert found.exit_code == 9
    expected = {"job": _JOB, "exit_status": 9, "stdout": "", "stderr": ""}
    assert json_of(found) == expected


def test_a_shell_needs_a_terminal(state: Path) -> None:
    found = call("job", "shell", _JOB, state=state)
    assert found.exit_code == 2
    assert_one_message(found.stderr, "usage")
    assert call("job", "shell", "--json", _JOB, state=state).exit_code == 2


@pytest.mark.parametrize(
    ("words", "job", "code", "status"),
    [
        (("exec",), _DONE, "not_attached", 5),
        (("exec",), "job_" + "z" * 24, "not_found", 5),
        (("exec",), "../../etc", "not_found", 5),
        (("cancel",), _DONE, "not_attached", 5),
        (("stdin",), "job_" + "z" * 24, "not_found", 5),
        (("logs", "-f"), "job_" + "z" * 24, "not_found", 5),
        (("cancel", "--grace", "31s"), _JOB, "usage", 2),
        (("forward",), _JOB, "usage", 2),
    ],
)
def test_wrong_turns(state: Path, words: tuple[str, ...], job: str, code: str, status: int) -> None:
    tail = {"exec": ["true"], "forward": ["port"]}.get(words[0], [])
    found = call("job", *words, job, *tail, state=state)
    assert found.exit_code == status
    assert_one_message(found.stderr, code)


def test_nothing_was_ever_run(tmp_path: Path) -> None:
    found = call("job", "cancel", _JOB, state=tmp_path / "none")
    assert found.exit_code == 5
    assert not (tmp_path / "none").exists()


def test_stdin(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[bytes] = []

    async def send_stdin(overlay: Any, place: Place, source: Any) -> None:
        assert place == _PLACE
        while data := await source():
            got.append(data)

    monkeypatch.setattr(live, "send_stdin", send_stdin)
    with standard_input(b"some input"):
        found = call("job", "stdin", _JOB, "--json", state=state)
    assert json_of(found) == {"job": _JOB, "sent_bytes": 10}
    assert got == [b"some input"]


async def test_input_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"lines\n")
    before = os.dup(0)
    with (tmp_path / "file").open("rb") as file:
        os.dup2(file.fileno(), 0)
    try:
        assert [await commands.read_stdin(), await commands.read_stdin()] == [b"lines\n", b""]
    finally:
        os.dup2(before, 0)
        os.close(before)


@pytest.mark.parametrize(("words", "local"), [("8080:80", 8080), ("0:80", 0), ("80", 80)])
def test_forward(state: Path, monkeypatch: pytest.MonkeyPatch, words: str, local: int) -> None:
    asked: list[Any] = []

    async def forward(overlay: Any, place: Place, port: int, **more: Any) -> None:
        asked.append((port, more["local"]))
        more["ready"](12_345)
        more["report"](LumarisError("unreachable"))

    monkeypatch.setattr(live, "forward", forward)
    found = call("job", "forward", _JOB, words, state=state)
    assert found.exit_code == 0
    assert found.stdout == f"127.0.0.1:12345 is port 80 of {_JOB}\n"
    assert "error[unreachable]" in found.stderr
    assert asked == [(80, ("127.0.0.1", local))]


def test_ctrl_c_is_the_usual_end(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "forward", interrupted)
    monkeypatch.setattr(live, "follow_log", interrupted)
    for words in (("forward", _JOB, "80"), ("logs", "-f", _JOB)):
        found = call("job", *words, state=state)
        assert (found.exit_code, found.stderr) == (0, "")


def test_cancel(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancel(store: Store, job: str, *, grace_s: int) -> dict[str, object]:
        assert grace_s == 5
        return {"job": job, "state": "failed", "reason": "cancelled", "cost_nanos": 7}

    monkeypatch.setattr(live, "cancel", cancel)
    found = call("job", "cancel", _JOB, "--grace", "5s", state=state)
    assert found.stdout == f"{_JOB} ended: cancelled; cost 0.000000007\n"
    found = call("job", "cancel", _JOB, "--grace", "5s", "--json", state=state)
    assert json_of(found)["reason"] == "cancelled"


def test_logs_are_followed_and_made_whole(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stream did not bring, the records have."""
    folder = state / "jobs" / _JOB
    offsets: list[int] = []

    async def follow_log(overlay: Any, place: Place, show: Any, *, offset: int) -> int:
        offsets.append(offset)
        if offset == 0:
            await show("stdout", b"one ")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stdout").write_bytes(b"one two")
        (folder / "stderr").write_bytes(b"oops")
        store = Store(state / "buyer.db")
        await store.put_jobs([{"job": _JOB, "state": "succeeded", "ended_at": 5}])
        store.close()
        raise LumarisError("not_attached")

    monkeypatch.setattr(live, "follow_log", follow_log)
    found = call("job", "logs", "-f", _JOB, state=state)
    assert (found.exit_code, found.stdout, found.stderr) == (0, "one two", "oops")
    assert offsets == [0]


def test_usage_is_listed_while_it_runs(state: Path) -> None:
    line = call("job", "ls", state=state).stdout.splitlines()[1]
    assert _JOB in line
    assert "1.5 s" in line
    assert "3 MiB" in line
