"""What reaches a terminal."""

from __future__ import annotations

import io
import os
import sys

import pytest

from lumaris.cli.output import (
    Background,
    GuestOutput,
    clean,
    credits_of,
    size_of,
    table,
    time_of,
)


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def bytes_out(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    return io.BytesIO()


def test_strangers_text_loses_its_control_characters() -> None:
    assert clean("a\x1b[2Jb\r\nc\x9b\u202ed") == "a?[2Jb??c??d"


def test_guest_output_in_a_pipe_is_untouched(
    bytes_out: io.BytesIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_out, "utf-8"))
    GuestOutput().write("stdout", b"\x1b[31m\xff\x00")
    assert bytes_out.getvalue() == b"\x1b[31m\xff\x00"


def test_guest_output_on_a_terminal_is_harmless(
    bytes_out: io.BytesIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = _Terminal(bytes_out, "utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    output = GuestOutput()
    for piece in (b"a\x1b]0;x\x07\tb\n\xc3", b"\xa9\xc2\x9b\xff"):
        output.write("stdout", piece)
    assert bytes_out.getvalue().decode() == "a?]0;x?\tb\n\u00e9?\ufffd"


def test_a_reader_that_left_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    output = GuestOutput()
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        output.write("stdout", b"1")
        output.write("stdout", b"2")


def test_background_keeps_order_and_the_first_failure() -> None:
    done: list[int] = []

    def fail() -> None:
        raise ValueError("first")

    with Background() as background:
        background.do(lambda: done.append(1))
        background.do(fail)
        background.do(lambda: done.append(2))
    assert done == [1, 2]
    assert str(background.error) == "first"


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    table(("A", "LONGER"), [("x\x1b", 1), ("yyyy", "")])
    assert capsys.readouterr().out == "A     LONGER\nx?    1\nyyyy\n"


@pytest.mark.parametrize(
    ("nanos", "text"), [(0, "0.000000000"), (1, "0.000000001"), (-1_500_000_000, "-1.500000000")]
)
def test_credits(nanos: int, text: str) -> None:
    assert credits_of(nanos) == text


def test_sizes_and_times() -> None:
    assert [size_of(n) for n in (0, 1023, 512 << 20, 3 << 29)] == [
        "0 B",
        "1023 B",
        "512 MiB",
        "1.5 GiB",
    ]
    assert [time_of(s) for s in (0, 0.0123, 59.9, 600, 3661)] == [
        "0 s",
        "0.0123 s",
        "59.9 s",
        "10m",
        "1h1m1s",
    ]
