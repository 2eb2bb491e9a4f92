"""What can go wrong before anything happens: one clear message, its exit code, no trace."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lumaris.cli import errors
from lumaris.cli.options import Settings
from lumaris_protocol import codes
from lumaris_protocol.errors import LumarisError
from tests.sdk.cli.command import ERROR_SHAPE, NOBODY, assert_one_message, call, shape_of, spawn

_IMAGE = "python:3.12-wasi"
_JOB = "job_" + "a" * 24

# What is typed, the code it ends with. FILE is a file, NONE a name of nothing.
TURNS = [
    (["run", _IMAGE, "python"], "coordinator_unreachable"),
    (["map", _IMAGE, "python", "{}", "--each", "FILE"], "coordinator_unreachable"),
    (["offers"], "coordinator_unreachable"),
    (["wallet", "show"], "coordinator_unreachable"),
    (["wallet", "deposit", "5"], "coordinator_unreachable"),
    (["wallet", "show", "--coordinator", "not a url"], "coordinator_unreachable"),
    (["wallet", "deposit", "5x"], "usage"),
    (["wallet", "deposit", "--", "-5"], "usage"),
    (["run", "--max-cost", "1,5", _IMAGE, "python"], "usage"),
    (["map", "--budget", "much", _IMAGE, "python", "--each", "FILE"], "usage"),
    (["run", "python:9", "python"], "bad_image"),
    (["run", "NONE.wasm", "x"], "bad_image"),
    (["run", "FILE.wasm", "x"], "bad_image"),
    (["offers", "--image", "python:9"], "bad_image"),
    (["map", "python:9", "x", "--each", "FILE"], "bad_image"),
    (["run", "--in", "NONE", _IMAGE, "python"], "bad_input"),
    (["map", _IMAGE, "python", "{}", "--each", "NONE"], "bad_input"),
    (["run", "--env", "A", _IMAGE, "python"], "usage"),
    (["run", "--memory", "12", _IMAGE, "python"], "usage"),
    (["run", "--timeout", "soon", _IMAGE, "python"], "usage"),
    (["run", "--timeout", "99999d", _IMAGE, "python"], "usage"),
    (["run", "--cpu", "0", _IMAGE, "python"], "usage"),
    (["run", "--cpu", "nan", _IMAGE, "python"], "usage"),
    (["offers", "--cpu", "nan"], "usage"),
    (["offers", "--gpu", "nonsense:x"], "usage"),
    (["offers", "--egress", "nowhere"], "usage"),
    (["run", "--gpu", "nonsense:x", _IMAGE, "python"], "usage"),
    (["run", _IMAGE], "usage"),
    (["run", "--nonsense", _IMAGE, "python"], "usage"),
    (["map", _IMAGE, "python", "--each"], "usage"),
    (["map", _IMAGE, "python"], "usage"),
    (["run", "--out", "FILE/out", _IMAGE, "python"], "not_writable"),
    (["nonsense"], "usage"),
    (["job", "show", _JOB], "not_found"),
    (["job", "logs", "../../etc/passwd"], "not_found"),
    (["receipt", "show", "rcp_" + "a" * 24], "not_found"),
    (["receipt", "show", "NONE"], "not_found"),
    (["receipt", "show", "FILE"], "malformed"),
    (["demo", "--input", "NONE"], "usage"),
    (["devnet", "up", "--sellers", "0"], "usage"),
    (["devnet", "status", "--state", "NONE"], "not_running"),
    (["devnet", "down", "--state", "NONE"], "not_running"),
    (["daemon", "up"], "coordinator_unreachable"),
    (["daemon", "status", "--state", "NONE"], "not_running"),
    (["netcheck"], "coordinator_unreachable"),
    (["netcheck", "--node", "--state", "NONE"], "not_running"),
    (["ping", "abcdefgh"], "coordinator_unreachable"),
    (["ping", "--node", "--state", "NONE", "abcdefgh"], "not_running"),
    (["ping", "-c", "0", "abcdefgh"], "usage"),
    (["node", "status", "--state", "NONE"], "not_running"),
    (["node", "down", "--state", "NONE"], "not_running"),
    (["node", "selftest", "--state", "NONE"], "not_found"),
    (["node", "image", "ls", "--state", "NONE"], "not_found"),
    (["node", "image", "rm", "--state", "NONE", "abcdef"], "not_found"),
    (["node", "up", "--state", "FILE"], "usage"),
    (["coordinator", "up"], "usage"),
    (["coordinator", "up", "--state", "NONE", "--port", "65536"], "usage"),
    (["coordinator", "up", "--state", "NONE", "--test-credit", "lots"], "usage"),
    (["coordinator", "up", "--state", "NONE", "--network", "a/b"], "config_invalid"),
]


def _typed(words: list[str], folder: Path) -> list[str]:
    (folder / "FILE").write_text("text")
    (folder / "FILE.wasm").write_text("no module")
    names = ("FILE", "NONE")
    return [str(folder / word) if word.startswith(names) else word for word in words]


@pytest.mark.parametrize(("words", "code"), TURNS, ids=lambda value: " ".join(value)[:60])
def test_wrong_turn(words: list[str], code: str, tmp_path: Path) -> None:
    arguments = _typed(words, tmp_path)
    found = call(*arguments, state=tmp_path / "state")
    assert_one_message(found.stderr, code)
    assert found.exit_code == codes.CODES[code].exit_code
    assert not found.stdout


@pytest.mark.parametrize(("words", "code"), TURNS[::4], ids=lambda value: " ".join(value)[:60])
def test_wrong_turn_as_json(words: list[str], code: str, tmp_path: Path) -> None:
    arguments = _typed(words, tmp_path)
    found = call("--json", *arguments, state=tmp_path / "state")
    error = json.loads(found.stdout)
    assert shape_of(error) == ERROR_SHAPE
    assert error["error"]["code"] == code
    assert found.exit_code == codes.CODES[code].exit_code


def test_a_slip_in_a_catalog_name_is_no_registrys_image(tmp_path: Path) -> None:
    found = call("run", "pyton:3.12-wasi", "python", state=tmp_path)
    assert_one_message(found.stderr, "bad_image")
    assert "Did you mean python:3.12-wasi?" in found.stderr


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["job", "show", _JOB], "`lumaris job ls` lists jobs"),
        (["job", "cancel", _JOB], "--state names another folder."),
        (["verify", "dispute", "nope.json"], "Check the path."),
    ],
)
def test_a_hint_leads_somewhere(words: list[str], hint: str, tmp_path: Path) -> None:
    assert hint in call(*words, state=tmp_path).stderr


def test_json_after_the_command_counts_for_errors_too(tmp_path: Path) -> None:
    found = call("job", "show", "--json", _JOB, state=tmp_path)
    assert json.loads(found.stdout)["error"]["code"] == "not_found"
    found = call("job", "ls", "--json", "--nonsense", state=tmp_path)
    assert json.loads(found.stdout)["error"]["code"] == "usage"


def test_an_error_says_whether_money_moved(capsys: pytest.CaptureFixture[str]) -> None:
    for moved, sentence in ((False, "No money moved."), (True, "Money moved.")):
        errors.report(LumarisError("seller_lost", money_moved=moved), Settings())
        assert sentence in capsys.readouterr().err


def test_text_of_strangers_cannot_paint_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    errors.report(LumarisError("rejected", "\x1b[2J\rfine", hint="\x9b1m"), Settings())
    assert not {"\x1b", "\r", "\x9b"} & set(capsys.readouterr().err)


def test_a_group_shows_the_failure_a_user_can_act_on(capsys: pytest.CaptureFixture[str]) -> None:
    group = ExceptionGroup("x", [ValueError("y"), ExceptionGroup("z", [LumarisError("busy")])])
    assert errors.report(group, Settings()) == codes.CODES["busy"].exit_code
    assert_one_message(capsys.readouterr().err, "busy")
    stop = BaseExceptionGroup("x", [LumarisError("busy"), KeyboardInterrupt()])
    assert errors.report(stop, Settings()) == 130


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> Path:
        raise RuntimeError("the unexpected")

    monkeypatch.setattr("lumaris.cli.local.state_folder", fail)


@pytest.mark.usefixtures("broken")
def test_the_unexpected_is_one_line_and_a_trace_on_request() -> None:
    found = call("job", "ls")
    assert found.exit_code == 1
    assert_one_message(found.stderr, "internal")
    assert "--debug" in found.stderr
    shown = call("job", "ls", "--debug")
    assert "Traceback" in shown.stderr
    assert "RuntimeError: the unexpected" in shown.stderr


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("lumaris.cli.local.state_folder", stop)
    found = call("job", "ls")
    assert found.exit_code == 130
    assert_one_message(found.stderr.strip(), "interrupted")


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (["node", "status"], "lumaris_node.cli"),
        (["node", "up", "--state", "x"], "lumaris_node.cli"),
        (["coordinator", "up", "--state", "x"], "lumaris_coordinator.cli"),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_missing_extra(words: list[str], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def import_module(name: str, *rest: str) -> object:
        if name == package:
            raise ModuleNotFoundError("No module named 'psutil'", name="psutil")
        return real(name, *rest)

    monkeypatch.setattr("importlib.import_module", import_module)
    found = call(*words)
    assert_one_message(found.stderr, "missing_extra")
    assert f"lumaris[{words[0]}]" in found.stderr
    assert found.exit_code == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_state_as_a_user(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    found = call("wallet", "show", state=tmp_path / "state")
    assert_one_message(found.stderr, "not_writable")


@pytest.mark.parametrize(
    "words", [["wallet", "show"], ["offers"], ["run", _IMAGE, "python"]], ids=" ".join
)
def test_unwritable_state(words: list[str]) -> None:
    """Below a file no folder can be made, not even by root."""
    found = call(*words, state=Path("/dev/null/state"))
    assert_one_message(found.stderr, "not_writable")
    assert found.exit_code == 1


# --- whole processes ---


@pytest.mark.planet
@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["run", _IMAGE, "python"], "coordinator_unreachable"),
        (["run", "python:9", "python"], "bad_image"),
        (["node", "up", "--state", "/dev/null/x"], "not_writable"),
        (["node", "up", "--state", "NONE"], "coordinator_unreachable"),
        (["coordinator", "up", "--state", "/dev/null/x", "--port", "0"], "not_writable"),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_wrong_turn_of_a_process(words: list[str], code: str, tmp_path: Path) -> None:
    arguments = _typed(words, tmp_path)
    if words[0] == "node":
        arguments += ["--coordinator", NOBODY]
    found = spawn(*arguments, state=tmp_path / "state")
    assert_one_message(found.stderr, code)
    assert found.returncode == codes.CODES[code].exit_code


@pytest.mark.planet
@pytest.mark.slow
def test_port_taken(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        found = spawn("coordinator", "up", "--state", tmp_path, "--port", port, state=tmp_path)
    assert_one_message(found.stderr, "port_in_use")
    assert found.returncode == 1


@pytest.mark.planet
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_coordinator_ends_in_order_on_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    words = ["coordinator", "up", "--state", str(tmp_path), "--port", "0", "--network", "test"]
    with subprocess.Popen(
        [sys.executable, "-m", "lumaris.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready 12D3Koo")
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in stderr
    assert "error" not in stderr
