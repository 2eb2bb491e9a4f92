"""Staging, collecting and wiping trees that a stranger chose or filled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumaris_node.workspace import LeaseWorkspace, Volumes, collect_outputs, open_output, tree
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import derive_id, digest
from lumaris_protocol.paths import safe_parts

JOB = derive_id("job", b"1")


@pytest.fixture
def space(tmp_path: Path) -> Iterator[LeaseWorkspace]:
    volumes = Volumes.open(tmp_path / "volumes", encryption="off")
    lease = derive_id("session", b"1")
    found = LeaseWorkspace(volumes.volume(lease, bytes_max=1 << 20, files_max=5000))
    found.open()
    yield found
    found.close()
    assert list((tmp_path / "volumes").iterdir()) == []


def blob(space: LeaseWorkspace, data: bytes) -> Path:
    path = space.blobs / digest(data).removeprefix("sha256:")
    path.write_bytes(data)
    return path


BAD = [
    "",
    "/a",
    "a/../b",
    "..",
    "./a",
    "a//b",
    "a/",
    "a\0b",
    "a\nb",
    "a\\b",
    "x" * 256,
    "/".join("a" * 17),
    "\ud800",
]


@pytest.mark.parametrize("text", BAD)
def test_unsafe_paths_are_refused(text: str):
    with pytest.raises(LumarisError) as caught:
        safe_parts(text)
    assert caught.value.code == "bad_input"


def test_safe_paths_are_kept():
    assert safe_parts("a/b c/.d-é") == ("a", "b c", ".d-é")


def test_a_job_name_must_be_an_id(space: LeaseWorkspace):
    with pytest.raises(ValueError):
        space.kept("../x")


def test_staging_shows_a_file_once(space: LeaseWorkspace):
    source = blob(space, b"hello")
    space.begin()
    space.stage("d/a", source, 5)
    space.stage("b", source, 5)
    assert (space.inputs / "d/a").read_bytes() == b"hello"
    assert (space.inputs / "d/a").stat().st_ino == source.stat().st_ino, "no copy"
    for path in ("d/a", "d/a/b"):
        with pytest.raises(LumarisError, match="bad_input"):
            space.stage(path, source, 5)


def test_nothing_of_one_job_is_seen_by_the_next(space: LeaseWorkspace):
    space.begin()
    space.stage("a/b", blob(space, b"1"), 1)
    (space.outputs / ".wipe-0").mkdir()
    (space.outputs / ".wipe-0" / "x").write_bytes(b"2")
    folders = [space.inputs.stat().st_ino, space.outputs.stat().st_ino]
    space.begin()
    assert os.listdir(space.inputs) == os.listdir(space.outputs) == []
    assert [space.inputs.stat().st_ino, space.outputs.stat().st_ino] == folders, "still mounted"
    assert space.outputs.stat().st_mode & 0o777 == 0o777


def test_what_the_last_job_left_clean_is_not_cleared_again(
    space: LeaseWorkspace, monkeypatch: pytest.MonkeyPatch
):
    space.begin()
    assert not space.ready, "a job uses it"
    assert not space.keep(JOB), "it made nothing"
    assert not space.kept(JOB).exists()
    space.clear()
    assert space.ready
    with monkeypatch.context() as patch:
        patch.setattr(space, "clear", lambda: pytest.fail("cleared again"))
        space.begin()
    (space.outputs / "x").write_bytes(bytes(9000))
    assert space.disk_use() >= (9000, 1)


def test_a_blob_that_goes_between_jobs_is_no_gain_of_the_next(space: LeaseWorkspace):
    source = blob(space, bytes(50_000))
    space.clear()
    source.unlink()
    space.touched()
    space.begin()
    (space.outputs / "x").write_bytes(bytes(9000))
    assert space.disk_use() >= (9000, 1), "what the last job's input took is not this one's"


def test_delivered_outputs_wait_apart(space: LeaseWorkspace):
    space.begin()
    (space.outputs / "d").mkdir()
    (space.outputs / "d" / "x").write_bytes(bytes(5000))
    space.keep(JOB)
    space.begin()
    assert (space.kept(JOB) / "d" / "x").read_bytes() == bytes(5000)
    space.mark()
    (space.outputs / "y").write_bytes(bytes(9000))
    before = space.disk_use()
    assert before[0] >= 9000 and before[1] == 1
    space.forget(JOB)
    space.forget(JOB)
    assert space.disk_use() == before, "what another job left is not this one's"


def test_collecting_lists_files_in_order(space: LeaseWorkspace):
    (space.outputs / "b").write_bytes(b"22")
    (space.outputs / "a").mkdir()
    (space.outputs / "a/c").write_bytes(b"1")
    found = space.collect(files_max=2, bytes_max=3)
    assert [(f.path, f.size, f.digest) for f in found] == [
        ("a/c", 1, digest(b"1")),
        ("b", 2, digest(b"22")),
    ]
    fd = open_output(space.outputs, "a/c")
    assert os.read(fd, 9) == b"1"
    os.close(fd)


def plant(space: LeaseWorkspace, trick: str) -> None:
    out = space.outputs
    match trick:
        case "symlink":
            (out / "x").symlink_to("/etc/passwd")
        case "folder link":
            (out / "x").symlink_to("/etc")
        case "hard link":
            (out / "x").write_bytes(b"1")
            os.link(out / "x", out / "y")
        case "fifo":
            os.mkfifo(out / "x")
        case "sparse":
            with (out / "x").open("wb") as file:
                file.truncate(1 << 30)
        case "newline":
            (out / "x\ny").write_bytes(b"1")
        case "not text":
            (out / os.fsdecode(b"\xff")).write_bytes(b"1")
        case "many":
            for n in range(11):
                (out / str(n)).write_bytes(b"1")
        case "large":
            (out / "x").write_bytes(bytes(101))
        case "deep":
            (out / "/".join("d" * 20)).mkdir(parents=True)


LINKS = ["symlink", "folder link", "hard link", "fifo"]
TRICKS = [*LINKS, "sparse", "newline", "not text", "many", "large", "deep"]


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_in_the_outputs_are_refused_and_wiped(space: LeaseWorkspace, trick: str):
    plant(space, trick)
    with pytest.raises(LumarisError) as caught:
        space.collect(files_max=10, bytes_max=100)
    assert caught.value.code == "killed_output"
    space.begin()
    assert os.listdir(space.outputs) == []
    assert Path("/etc/passwd").exists()


def test_wiping_takes_odd_modes_and_thousands_of_levels(space: LeaseWorkspace):
    (space.outputs / "locked").mkdir()
    (space.outputs / "locked/x").write_bytes(b"1")
    (space.outputs / "locked").chmod(0)
    folder = os.open(space.outputs, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    space.begin()
    assert os.listdir(space.outputs) == []


def test_a_folder_that_cannot_be_read_counts_as_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Root reads every folder, so the refusal is made here."""
    (tmp_path / "shut").mkdir()

    def refuse(name: str, folder: int) -> int:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(tree, "open_folder", refuse)
    assert tree.disk_use(tmp_path, files_max=5)[1] == 6
    with pytest.raises(LumarisError, match="cannot be read"):
        collect_outputs(tmp_path, files_max=5, bytes_max=5)
