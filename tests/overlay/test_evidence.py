"""Evidence files: what both sides signed is found again, within bounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lumaris_overlay import evidence
from lumaris_overlay.evidence import EvidenceLog, prune_evidence, read_evidence
from lumaris_protocol import envelope
from lumaris_protocol.ids import derive_id
from lumaris_protocol.keys import KeyPair

KEY = KeyPair(bytes(32))
SESSION = derive_id("session", b"one")


def make(kind: str, size: int = 10) -> bytes:
    return envelope.seal(KEY, "devnet", kind, b"x" * size)


async def test_what_proves_something_is_found_in_order(tmp_path: Path) -> None:
    kept = EvidenceLog(tmp_path / "evidence", SESSION)
    said = [make("work_order"), make("delivery", 70_000), make("voucher")]
    for data in (said[0], make("log_chunk"), said[1], make("meter"), b"", b"\n$ not an envelope"):
        kept.note(data)
    await kept.flush()
    kept.note(said[2])
    await kept.close()
    assert read_evidence(tmp_path / "evidence", SESSION) == said


async def test_a_record_cut_short_by_a_crash_ends_the_list(tmp_path: Path) -> None:
    kept = EvidenceLog(tmp_path, SESSION)
    kept.note(make("voucher"))
    kept.note(make("close"))
    await kept.close()
    file = tmp_path / f"{SESSION}.evidence"
    for cut in (1, 60, file.stat().st_size - 2):
        data = file.read_bytes()
        file.write_bytes(data[:-1] if cut == 1 else data[: len(data) - cut])
        assert read_evidence(tmp_path, SESSION) in ([make("voucher")], [])
    file.write_bytes(b"\xff\xff\xff\xff" + b"x" * 100)
    assert read_evidence(tmp_path, SESSION) == []


async def test_a_long_session_keeps_its_newest_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "_FILE_BYTES_MAX", 2_000)
    kept = EvidenceLog(tmp_path, SESSION)
    for number in range(100):
        kept.note(make("voucher", 10 + number))
        await kept.flush()
    found = read_evidence(tmp_path, SESSION)
    assert found[-1] == make("voucher", 109)
    assert 2_000 <= sum(map(len, found)) <= 6_000
    assert found == [make("voucher", 110 - len(found) + n) for n in range(len(found))]


async def test_the_oldest_sessions_make_room(tmp_path: Path) -> None:
    names = [derive_id("session", bytes([number])) for number in range(3)]
    for age, name in enumerate(names):
        kept = EvidenceLog(tmp_path, name)
        kept.note(make("voucher"))
        await kept.close()
        os.utime(tmp_path / f"{name}.evidence", (1_000 - age, 1_000 - age))
    (tmp_path / "other").write_bytes(b"x" * 10_000)
    assert prune_evidence(tmp_path, bytes_max=2 * len(make("voucher")) + 20) == 1
    assert [bool(read_evidence(tmp_path, name)) for name in names] == [True, True, False]
    assert (tmp_path / "other").exists()


async def test_a_folder_that_cannot_be_written_loses_no_session(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    kept = EvidenceLog(tmp_path / "file" / "evidence", SESSION)
    kept.note(make("voucher"))
    await kept.close()


@pytest.mark.parametrize("name", ["../../etc/passwd", "ses_x", "", SESSION + "\n"])
def test_only_a_session_names_a_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a session id"):
        read_evidence(tmp_path, name)


@pytest.mark.parametrize("data", [b"", b"\n", make("voucher")[:39], bytes(60)])
def test_the_type_of_other_bytes_is_none(data: bytes) -> None:
    assert envelope.type_of(data) == ""
