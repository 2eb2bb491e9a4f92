"""A buyer compares the heads of the log that it is shown."""

from __future__ import annotations

import logging

import pytest

from lumaris.log_watch import LogWatch
from lumaris_protocol import codec, merkle, notes
from lumaris_protocol.messages.notice import CheckpointNotice
from tests import independent_log as other
from tests.protocol import parties as p

ORIGIN = notes.log_origin(p.NETWORK)


def head(size: int, root: int, *, key: object = p.COORDINATOR, origin: str = ORIGIN) -> str:
    point = merkle.Checkpoint(origin, size, bytes([root]) * 32)
    return merkle.sign_checkpoint(point, key)  # type: ignore[arg-type]


def notice(note: str) -> bytes:
    message = CheckpointNotice(seq=1, checkpoint=note, issued_at=1)
    return codec.sign(message, p.COORDINATOR, p.NETWORK).data


def test_a_second_history_is_found_and_told(caplog: pytest.LogCaptureFixture) -> None:
    watch = LogWatch(p.NETWORK, lambda: [p.COORDINATOR.peer_id])
    watch.shown(head(3, 1))
    watch.heard(notice(head(3, 1)))
    watch.heard(notice(head(5, 2)))
    assert list(watch.evidence) == []
    with caplog.at_level(logging.CRITICAL):
        watch.heard(notice(head(3, 9)))
        watch.heard(notice(head(3, 9)))
    (found,) = watch.evidence
    heads = [
        other.open_head(note, ORIGIN, p.COORDINATOR.public_key)
        for note in (found.first, found.second)
    ]
    assert heads == [(3, bytes([1]) * 32), (3, bytes([9]) * 32)]
    assert len(caplog.records) == 1
    assert head(3, 9) in caplog.text


@pytest.mark.parametrize(
    "note", ["x", "", head(3, 9, key=p.STRANGER), head(3, 9, origin="lumaris.other/log")]
)
def test_what_the_log_did_not_sign_says_nothing(note: str) -> None:
    watch = LogWatch(p.NETWORK, lambda: [p.COORDINATOR.peer_id])
    watch.shown(head(3, 1))
    watch.shown(note)
    watch.heard(b"x")
    watch.heard(notice("x"))
    assert list(watch.evidence) == []
