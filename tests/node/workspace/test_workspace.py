"""Staging, collecting and wiping trees that a stranger chose or filled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lumaris_node.workspace import Workspace, open_output, reap
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import derive_id, digest
from lumaris_protocol.paths import safe_parts


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "work", derive_id("job", b"1"))


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


def test_a_job_name_must_be_an_id(tmp_path: Path):
    with pytest.raises(ValueError):
        Workspace(tmp_path, "../x")


def test_staging_checks_digest_and_name(space: Workspace):
    space.stage_chunks("d/a", [b"he", b"llo"], digest(b"hello"))
    assert (space.inputs / "d/a").read_bytes() == b"hello"
    for path, data, named in (("d/a", b"x", b"x"), ("d/a/b", b"x", b"x"), ("e", b"x", b"y")):
        with pytest.raises(LumarisError) as caught:
            space.stage_chunks(path, [data], digest(named))
        assert caught.value.code == "bad_input"
    assert not (space.inputs / "e").exists()


def test_collecting_lists_files_in_order(space: Workspace):
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


def plant(space: Workspace, trick: str) -> None:
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
def test_tricks_in_the_outputs_are_refused_and_wiped(space: Workspace, trick: str):
    plant(space, trick)
    with pytest.raises(LumarisError) as caught:
        space.collect(files_max=10, bytes_max=100)
    assert caught.value.code == "killed_output"
    space.destroy()
    assert not space.root.exists()
    assert Path("/etc/passwd").exists()


def test_wiping_takes_odd_modes_and_thousands_of_levels(space: Workspace):
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
    space.destroy()
    space.destroy()
    assert not space.root.exists()


def test_reaping_removes_what_a_killed_node_left(space: Workspace):
    (space.root.parent / "kept").mkdir()
    assert reap(space.root.parent) == 1
    assert reap(space.root.parent) == 0
    assert os.listdir(space.root.parent) == ["kept"]
