"""Sizes, times, files and environment from the command line."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from lumaris.cli.map import _folders
from lumaris.cli.options import SECONDS, SIZE, load
from lumaris.cli.run import walk_inputs
from lumaris.cli.work import pairs
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512MiB", 512 << 20),
        ("1GiB", 1 << 30),
        ("1.5GiB", 3 << 29),
        ("2gb", 2 * 10**9),
        ("64 KiB", 65_536),
        ("100B", 100),
        ("0.1KiB", 102),
    ],
)
def test_size(text: str, count: int) -> None:
    assert SIZE.convert(text, None, None) == count


@pytest.mark.parametrize("text", ["", "512", "x", "-1MiB", "1e9B", "1XiB", "9999999MiB", "1.MiB"])
def test_size_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        SIZE.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "count"), [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("30d", 2_592_000)]
)
def test_time(text: str, count: int) -> None:
    assert SECONDS.convert(text, None, None) == count


@pytest.mark.parametrize("text", ["", "m", "10x", "-5s", "1m x", "1.5h", "9" * 30])
def test_time_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        SECONDS.convert(text, None, None)


def test_environment() -> None:
    assert pairs(["A=1", "B=x=y", "C="]) == {"A": "1", "B": "x=y", "C": ""}
    for bad in ("A", "=1", ""):
        with pytest.raises(LumarisError, match="NAME=VALUE"):
            pairs([bad])


def _tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def test_inputs(tmp_path: Path) -> None:
    folder = _tree(tmp_path / "data", "a.txt", "deep/b.txt")
    assert walk_inputs([str(folder / "a.txt")]) == {"a.txt": folder / "a.txt"}
    assert list(walk_inputs([f"x/y={folder / 'a.txt'}"])) == ["x/y"]
    assert list(walk_inputs([f"/in/x={folder / 'a.txt'}"])) == ["x"]
    assert list(walk_inputs([str(folder)])) == ["data/a.txt", "data/deep/b.txt"]
    assert list(walk_inputs([f"in={folder}"])) == ["in/a.txt", "in/deep/b.txt"]
    assert list(walk_inputs([f"/in={folder}"])) == ["a.txt", "deep/b.txt"]


def test_a_file_whose_name_has_an_equals_sign(tmp_path: Path) -> None:
    folder = _tree(tmp_path, "a=b.txt")
    assert list(walk_inputs([str(folder / "a=b.txt")])) == ["a=b.txt"]


def test_inputs_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _tree(tmp_path / "data", "a.txt", "b.txt")
    cases = [
        [str(tmp_path / "none")],
        ["x="],
        [str(folder / "a.txt"), str(folder / "a.txt")],
    ]
    for values in cases:
        with pytest.raises(LumarisError) as caught:
            walk_inputs(values)
        assert caught.value.code == "bad_input"
    monkeypatch.setattr(limits, "INPUT_FILES_MAX", 1)
    with pytest.raises(LumarisError, match="More than 1"):
        walk_inputs([str(folder)])


def test_links_out_of_a_folder_are_not_sent_to_strangers(tmp_path: Path) -> None:
    secret = _tree(tmp_path / "home", "id_ed25519")
    folder = _tree(tmp_path / "data", "a.txt")
    (folder / "inside").symlink_to(folder / "a.txt")
    assert list(walk_inputs([str(folder)])) == ["data/a.txt", "data/inside"]
    for target in (secret / "id_ed25519", secret, tmp_path / "gone"):
        link = folder / "link"
        link.symlink_to(target)
        with pytest.raises(LumarisError, match="is a link"):
            walk_inputs([str(folder)])
        link.unlink()


def test_folder_names_of_a_map() -> None:
    files = [Path("a/x"), Path("b/x"), Path("x-2"), Path("c/x")]
    assert _folders(files) == ["x", "x-2", "x-2-2", "x-3"]


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LumarisError) as caught:
        load("lumaris_nowhere.cli:run", extra="node")
    assert caught.value.code == "missing_extra"
    assert "lumaris[node]" in caught.value.hint


def test_a_missing_module_of_ours_is_a_bug_and_no_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError):
        load("lumaris.cli.nowhere:run")
