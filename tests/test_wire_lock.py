"""The wire changes only on purpose."""

from __future__ import annotations

import re

import pytest

from lumaris_protocol.registry import MESSAGES
from tests import wire_lock


def test_the_lock_is_current() -> None:
    assert wire_lock.LOCK.read_text(encoding="utf-8") == wire_lock.text(), (
        "wire.lock differs: the wire changed. Say why in the commit, raise the version in the "
        "signing domain when an older reader would refuse or misread it, then run "
        "`python -m tests.wire_lock`."
    )


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_message_is_locked(kind: str) -> None:
    assert f"\nmessage {kind} size_max=" in wire_lock.text()


def test_everything_a_stranger_sends_is_bounded() -> None:
    """Text, bytes, lists, maps and numbers all have an upper bound, or a pattern of one length."""
    unbounded = []
    for line in wire_lock.text().splitlines():
        for found in re.finditer(r"\b(int|str|bytes|list|map)\b((?: \w+=\S+)*)", line):
            kind, bounds = found.groups()
            bound = {"int": "le="}.get(kind, "max_length=")
            fixed = re.search(r"pattern=\S*\{\d+(,\d+)?\}\\Z", bounds)
            if line.startswith("  ") and bound not in bounds and not fixed:
                unbounded.append(line)
    assert unbounded == []


def test_no_floats_are_on_the_wire() -> None:
    assert not re.search(r"\b(float|decimal|any|datetime)\b", wire_lock.text())
