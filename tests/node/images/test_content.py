"""What is kept of images: records, room, and images that an owner puts there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lumaris_node.images.content import ContentStore, ImageRecord, Piece
from lumaris_node.images.rootfs import RootfsStore
from lumaris_protocol import ids
from lumaris_protocol.errors import LumarisError
from tests.node.images.tars import file, image, pack


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "content", bytes_max=100_000)


def remember(store: ContentStore, name: str, size: int, *, keep: bool = False) -> ImageRecord:
    config, layer = store.add(name.encode()), store.add(name[:1].encode() * size)
    record = ImageRecord(
        image=config, config_bytes=len(name), layers=(Piece(layer, size),), keep=keep
    )
    store.save(record)
    for at, digest in ((1, config), (1, layer)):
        os.utime(store.path(digest), (at, at))
    return record


def test_an_imported_image_comes_out_as_it_was(store: ContentStore, tmp_path: Path) -> None:
    archive, digest = image(tmp_path, pack(file("a", b"1")), pack(file("b", b"2")))
    record = store.take_archive(archive, share=False)
    assert (record.image, record.keep, record.share) == (digest, True, False)
    assert store.find(digest) == record
    again = tmp_path / "again.tar"
    store.assemble(record, again)
    roots = RootfsStore(tmp_path / "roots", bytes_max=1 << 30)
    roots.add(again, digest)
    assert sorted(os.listdir(roots.path(digest))) == ["a", "b"]
    assert store.remove(digest)
    assert not store.records() and not list((store.directory / "blobs").iterdir())
    assert not store.remove(digest)


def test_a_damaged_archive_is_not_imported(store: ContentStore, tmp_path: Path) -> None:
    archive, _ = image(tmp_path, pack(file("a", b"1")))
    archive.write_bytes(archive.read_bytes().replace(b"1" + bytes(511), b"2" + bytes(511)))
    with pytest.raises(LumarisError):
        store.take_archive(archive, share=True)
    assert store.records() == ()
    assert [path for folder in store.directory.iterdir() for path in folder.iterdir()] == []


def test_room_is_made_of_what_was_used_longest_ago(store: ContentStore) -> None:
    old, kept = remember(store, "old", 40_000), remember(store, "kept", 30_000, keep=True)
    pinned = remember(store, "pinned", 20_000)
    with store.pin(part.digest for part in pinned.parts):
        store.make_room(45_000)
        assert store.find(old.image) is None
        assert store.find(kept.image) is not None
        assert store.find(pinned.image) is not None
        with pytest.raises(LumarisError) as caught:
            store.make_room(60_000)
        assert caught.value.code == "disk_short"
    for part in pinned.parts:
        os.utime(store.path(part.digest), (1, 1))
    store.make_room(60_000)
    assert store.find(pinned.image) is None


def test_parts_of_two_images_outlive_one(store: ContentStore) -> None:
    one, two = remember(store, "xone", 10), remember(store, "xtwo", 10)
    assert one.layers == two.layers
    store.remove(one.image)
    assert store.find(two.image) == two


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "sha256:..", "sha256:" + "g" * 64])
def test_only_digests_become_paths(store: ContentStore, name: str) -> None:
    for use in (store.path, store.part, store.find, store.remove):
        with pytest.raises(LumarisError):
            use(name)


def test_records_that_cannot_be_read_do_not_count(store: ContentStore) -> None:
    record = remember(store, "one", 10)
    (store.directory / "images" / f"{'0' * 64}.json").write_bytes(b"{")
    (store.directory / "images" / f"{'1' * 64}.json").write_bytes(b"\xff" * 100)
    assert store.records() == (record,)
    assert store.find(ids.digest(b"none")) is None
