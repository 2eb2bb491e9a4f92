"""Volumes of every kind this machine can make: bounded, unreadable once closed, never left over."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumaris_node.workspace import Volume, Volumes, fscrypt, volume_bounds
from lumaris_node.workspace import volumes as volumes_module
from lumaris_node.workspace.memory import PlainVolume
from lumaris_node.workspace.mounts import mounts_below
from lumaris_node.workspace.volumes import reap
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import derive_id
from lumaris_protocol.limits import GIB, KIB, MIB

LEASE = derive_id("session", b"1")
KINDS = ["fscrypt", "gocryptfs", "tmpfs", "memory", "off"]
MOUNTED = ["fscrypt", "gocryptfs", "tmpfs"]
ON_DISK = ["fscrypt", "gocryptfs"]
SECRET = b"the buyer's own words, which nobody else may ever read"
NAME = "a-name-that-says-much"


def made(directory: Path, kind: str) -> Volumes:
    """Volumes of a kind; without what it needs the test is skipped, or fails where required."""
    try:
        return Volumes.open(directory, encryption=kind)  # type: ignore[arg-type]
    except LumarisError as error:
        if os.environ.get("LUMARIS_REQUIRE_VOLUMES") == "1":
            raise
        pytest.skip(f"needs root, loop devices and the {kind} tools: {error}")


@contextlib.contextmanager
def volume(
    directory: Path, kind: str, *, bytes_max: int = 8 * MIB, files_max: int = 256
) -> Iterator[Volume]:
    found = made(directory, kind).volume(LEASE, bytes_max=bytes_max, files_max=files_max)
    found.open()
    try:
        yield found
    finally:
        found.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_volume_counts_what_is_in_it_and_goes(tmp_path: Path, kind: str):
    with volume(tmp_path, kind) as found:
        assert found.used() == (0, 0)
        (found.path / "a").write_bytes(os.urandom(MIB))
        size, files = found.used()
        assert MIB <= size <= MIB + 256 * KIB
        assert files == 1
        (found.path / "a").unlink()
        assert found.used()[0] <= 64 * KIB
    assert not found.folder.exists()
    assert not found.path.exists()
    assert mounts_below(tmp_path) == []
    found.close()


@pytest.mark.parametrize("kind", MOUNTED)
def test_the_kernel_bounds_bytes_and_files(tmp_path: Path, kind: str):
    with volume(tmp_path, kind) as found:
        with pytest.raises(OSError) as caught, (found.path / "a").open("wb") as file:  # noqa: PT012
            for _ in range(80):
                file.write(os.urandom(MIB))
                file.flush()
        assert caught.value.errno in (errno.ENOSPC, errno.EDQUOT)
        assert found.used()[0] >= 8 * MIB, "no less than was asked for"
        (found.path / "a").unlink()
        with pytest.raises(OSError) as caught:  # noqa: PT012
            for n in range(1000):
                (found.path / str(n)).touch()
        assert caught.value.errno == errno.ENOSPC
        assert found.used()[1] >= 256


@pytest.mark.parametrize("kind", ["fscrypt", "tmpfs"])
@pytest.mark.parametrize("bytes_max", [MIB, 100 * MIB, 3 * GIB, 200 * GIB])
def test_every_size_holds_what_it_should(tmp_path: Path, kind: str, bytes_max: int):
    _, files_max = volume_bounds(0)
    with volume(tmp_path, kind, bytes_max=bytes_max, files_max=files_max) as found:
        status = os.statvfs(found.path)
        assert status.f_bavail * status.f_frsize >= bytes_max
        assert status.f_favail >= files_max


@pytest.mark.parametrize("kind", MOUNTED)
def test_what_a_guest_makes_has_no_powers(tmp_path: Path, kind: str):
    with volume(tmp_path, kind) as found:
        flags = os.statvfs(found.path).f_flag
        assert flags & os.ST_NOSUID
        assert flags & os.ST_NODEV
        assert not flags & os.ST_NOEXEC, "a job runs what it has built"
        assert found.folder.stat().st_mode & 0o077 == 0


def device_of(found: Volume) -> Path:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if words[4] == str(found.folder / "disk"):
            return Path(words[words.index("-") + 2])
    raise AssertionError("not mounted")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ON_DISK)
def test_the_disk_never_holds_plain_text(tmp_path: Path, kind: str, monkeypatch):
    keys: list[bytes] = []
    real = os.urandom

    def random(size: int) -> bytes:
        keys.append(real(size))
        return keys[-1]

    found = made(tmp_path, kind).volume(LEASE, bytes_max=8 * MIB, files_max=256)
    monkeypatch.setattr(os, "urandom", random)
    found.open()
    monkeypatch.undo()
    [key] = keys
    try:
        (found.path / NAME).mkdir()
        for n in range(20):
            (found.path / NAME / f"{NAME}{n}").write_bytes(SECRET * 500)
        os.sync()
        with device_of(found).open("rb") as raw:
            before = raw.read()
            found.close()
            raw.seek(0)
            after = raw.read()
    finally:
        found.close()
    for data in (before, after):
        assert len(data) > 8 * MIB
        for plain in (SECRET, NAME.encode(), key, key.hex().encode()):
            assert plain not in data
    assert list(tmp_path.iterdir()) == []


def test_gocryptfs_shows_its_key_to_nobody(tmp_path: Path):
    def shown() -> list[bytes]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_bytes()
                if os.fsencode(tmp_path) in command:
                    found += (command + (process / "environ").read_bytes()).split(b"\0")
        return found

    with volume(tmp_path, "gocryptfs"):
        assert b"-masterkey=stdin" in shown()
        assert not any(len(word) >= 64 and word.isalnum() for word in shown())
    assert shown() == [], "it has ended"


@pytest.mark.parametrize("kind", KINDS)
def test_reaping_removes_what_a_killed_node_left(tmp_path: Path, kind: str):
    first, other = made(tmp_path / "ours", kind), made(tmp_path / "others", kind)
    left = first.volume(LEASE, bytes_max=MIB, files_max=64)
    theirs = other.volume(LEASE, bytes_max=MIB, files_max=64)
    left.open()
    theirs.open()
    (left.path / "file").write_bytes(SECRET)
    try:
        with (left.path / "file").open("rb"):  # a straggler still reads
            assert reap(tmp_path / "ours") == 1
        assert reap(tmp_path / "ours") == 0
        assert not left.folder.exists()
        assert mounts_below(tmp_path / "ours") == []
        assert theirs.path.exists(), "another node's"
    finally:
        left.close()
        theirs.close()


def test_a_trial_that_was_killed_is_no_obstacle(tmp_path: Path):
    (tmp_path / "trial").mkdir()
    made(tmp_path, "off")


def test_nothing_is_plain_unless_the_owner_says_so(tmp_path: Path, monkeypatch):
    kinds = dict.fromkeys(volumes_module._KINDS, Broken)
    monkeypatch.setattr(volumes_module, "_KINDS", kinds)
    with pytest.raises(LumarisError, match="volume_failed") as caught:
        Volumes.open(tmp_path)
    assert "encryption" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


class Broken(PlainVolume):
    def _make(self) -> None:
        raise OSError("does not work here")


def test_a_lease_must_be_an_id(tmp_path: Path):
    with pytest.raises(ValueError):
        made(tmp_path, "off").volume("../x", bytes_max=1, files_max=1)


@pytest.mark.parametrize("kind", ["tmpfs", "memory"])
def test_memory_is_said_to_be_memory(tmp_path: Path, kind: str):
    assert made(tmp_path, kind).memory_backed


def test_loop_devices_come_back(tmp_path: Path):
    def attached() -> int:
        shown = subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True)
        return shown.stdout.count("image (deleted)")

    made(tmp_path, "fscrypt")
    before = attached()
    for _ in range(10):
        with volume(tmp_path, "fscrypt"):
            pass
    assert attached() <= before + 1, "another test may run beside this one"


def test_a_key_is_taken_away_until_no_file_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The kernel answers that files are open; the numbers are those of <linux/fscrypt.h>."""
    busy, asked = 2, 0

    def ioctl(fd: int, request: int, answer: bytearray, mutate: bool) -> int:
        nonlocal asked
        asked += 1
        answer[40:44] = (1 if asked <= busy else 0).to_bytes(4, "little")
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(fscrypt, "_REMOVE_TRY_S", 0)
    fscrypt.forget_key(tmp_path, bytes(16))
    assert asked == 3
    busy = 10**6
    with pytest.raises(OSError, match="still open"):
        fscrypt.forget_key(tmp_path, bytes(16))
