"""`lumaris node image`: taking images in, listing and forgetting them, without a node."""

from __future__ import annotations

from pathlib import Path

from tests.node.images.tars import file, image, pack
from tests.sdk.cli.command import assert_one_message, call, json_of


def test_an_image_comes_and_goes(tmp_path: Path) -> None:
    state = tmp_path / "node"
    archive, digest = image(tmp_path, pack(file("bin/tool", b"x", 0o755)))
    found = call("node", "image", "import", archive, "--share", "--state", state)
    assert (found.exit_code, found.stdout.strip()) == (0, digest)
    (item,) = json_of(call("node", "image", "ls", "--json", "--state", state))["items"]
    assert (item["image"], item["share"], item["imported"]) == (digest, True, True)
    assert digest[:19] in call("node", "image", "ls", "--state", state).stdout
    gone = call("node", "image", "rm", digest[:15], "--json", "--state", state)
    assert json_of(gone) == {"removed": digest}
    assert json_of(call("node", "image", "ls", "--json", "--state", state)) == {"items": []}
    again = call("node", "image", "rm", digest, "--state", state)
    assert again.exit_code == 5
    assert_one_message(again.stderr, "not_found")


def test_the_tar_of_a_root_folder_becomes_an_image(tmp_path: Path) -> None:
    state, tar = tmp_path / "node", tmp_path / "rootfs.tar"
    tar.write_bytes(pack(*(file(f"etc/{number}", b"x") for number in range(20))))
    first = call("node", "image", "import", tar, "--state", state).stdout
    assert first.startswith("sha256:")
    assert call("node", "image", "import", tar, "--state", state).stdout == first
    (item,) = json_of(call("node", "image", "ls", "--json", "--state", state))["items"]
    assert (item["share"], item["layers"]) == (False, 1)


def test_a_short_digest_names_one_image_or_none(tmp_path: Path) -> None:
    state = tmp_path / "node"
    archive, digest = image(tmp_path, pack(file("bin/tool", b"x", 0o755)))
    assert call("node", "image", "import", archive, "--state", state).exit_code == 0
    for word, code in (("0" * 12, "not_found"), (digest[:10], "usage")):
        found = call("node", "image", "rm", word, "--state", state)
        assert_one_message(found.stderr, code)


def test_looking_makes_no_folder(tmp_path: Path) -> None:
    state = tmp_path / "slip"
    assert_one_message(call("node", "image", "ls", "--state", state).stderr, "not_found")
    assert_one_message(call("node", "selftest", "--state", state).stderr, "not_found")
    assert not state.exists()


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nothing of the kind" * 100)
    found = call("node", "image", "import", tmp_path / "x", "--state", tmp_path / "node")
    assert found.exit_code == 2
    assert_one_message(found.stderr, "unsafe_archive")
