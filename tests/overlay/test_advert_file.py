"""What a restarted peer knows at once: saved adverts, through the same gate as any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumaris_overlay.advert_file import AdvertFile
from lumaris_overlay.directory import Directory
from lumaris_overlay.validate import AdvertGate
from lumaris_protocol import frames
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import ADVERT_BYTES_MAX
from tests.overlay.world import KEYS, NETWORK, advert, key_of

NOW = 1_700_000_000
ADVERTS = [advert(key_of(f"seller {n}"), now=NOW) for n in range(5)]


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "adverts"
    assert AdvertFile(path).load() == []
    assert AdvertFile(path).save(ADVERTS)
    assert AdvertFile(path).load() == ADVERTS
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_directory_is_the_same_after_a_restart(tmp_path: Path) -> None:
    before = Directory(AdvertGate(NETWORK, KEYS))
    for data in ADVERTS:
        before.offer(data, NOW)
    file = AdvertFile(tmp_path / "adverts")
    file.save(before.snapshot())
    after = Directory(AdvertGate(NETWORK, KEYS))
    for data in file.load():
        after.offer(data, NOW + 1)
    assert after.events() == before.events()
    for data in file.load():
        with pytest.raises(EnvelopeError, match="expired"):
            Directory(AdvertGate(NETWORK, KEYS)).offer(data, NOW + 3600)


def test_the_disk_is_written_now_and_then(tmp_path: Path) -> None:
    now = [0.0]
    file = AdvertFile(tmp_path / "adverts", clock=lambda: now[0])
    assert file.save(ADVERTS[:1])
    assert not file.save(ADVERTS)
    assert len(file.load()) == 1
    assert file.save(ADVERTS, now=True)
    now[0] = 100.0
    assert file.save(ADVERTS[:2])
    assert file.load() == ADVERTS[:2]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x00\x00",
        b"\xff\xff\xff\xff\x01",
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x02\x63x",
        frames.encode(Kind.ENVELOPE, bytes(2 * ADVERT_BYTES_MAX)),
    ],
)
def test_a_damaged_file_gives_what_stands_before_the_damage(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "adverts"
    path.write_bytes(damage)
    assert AdvertFile(path).load() == []
    whole = b"".join(frames.encode(Kind.ENVELOPE, data) for data in ADVERTS)
    path.write_bytes(whole + damage)
    # The decoder hands out nothing of a batch that holds a bad frame.
    assert AdvertFile(path).load() in (ADVERTS, [])


def test_a_file_that_cannot_be_read_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "adverts").mkdir()
    assert AdvertFile(tmp_path / "adverts").load() == []
    with pytest.raises(OSError, match="adverts"):
        AdvertFile(tmp_path / "adverts").save(ADVERTS)
