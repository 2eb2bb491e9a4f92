"""Root folders from archives: layers, what they take away, and what must never get out."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import stat
import tarfile
from functools import partial
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumaris_node.images import unpack
from lumaris_node.images.archive import make_image, pack_folder
from lumaris_node.images.rootfs import RootfsStore
from lumaris_overlay.image_archive import Allowance, ImageArchive
from lumaris_protocol import ids
from lumaris_protocol.errors import LumarisError
from tests.node.images.tars import (
    CONFIG,
    file,
    folder,
    hardlink,
    image,
    other,
    pack,
    raw_image,
    symlink,
)

ROOM = 1 << 30


@pytest.fixture
def store(tmp_path: Path) -> RootfsStore:
    return RootfsStore(tmp_path / "rootfs", bytes_max=ROOM)


def unpacked(store: RootfsStore, at: Path, *layers: bytes) -> Path:
    archive, digest = image(at, *layers)
    store.add(archive, digest)
    return store.path(digest)


def refused(store: RootfsStore, at: Path, *layers: bytes) -> str:
    with pytest.raises(LumarisError) as caught:
        unpacked(store, at, *layers)
    assert os.listdir(store.directory) == []
    return caught.value.code


def test_layers_cover_each_other(store: RootfsStore, tmp_path: Path) -> None:
    lower = pack(
        folder("etc"),
        file("etc/a", b"old"),
        file("etc/gone", b"x"),
        folder("usr/lib"),
        symlink("lib", "usr/lib"),
        file("opt/lower", b"x"),
        file("opt/deep/lower", b"x"),
        file("data/keep", b"x"),
    )
    upper = pack(
        file("etc/a", b"new"),
        file("etc/.wh.gone"),
        file("lib/libc.so", b"elf"),
        file("opt/upper", b"y"),
        file("opt/deep/upper", b"y"),
        file("opt/.wh..wh..opq"),
        file("bin/tool", b"#!", 0o4755),
        hardlink("bin/alias", "bin/tool"),
    )
    root = unpacked(store, tmp_path, lower, upper)
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())
    assert found == [
        "bin/alias",
        "bin/tool",
        "data/keep",
        "etc/a",
        "opt/deep/upper",
        "opt/upper",
        "usr/lib/libc.so",
    ]
    assert (root / "etc/a").read_bytes() == b"new"
    assert os.readlink(root / "lib") == "usr/lib"
    assert stat.S_IMODE((root / "bin/tool").stat().st_mode) == 0o755
    assert (root / "bin/tool").stat().st_nlink == 2


def test_files_keep_their_times(store: RootfsStore, tmp_path: Path) -> None:
    members = [file(name) for name in ("whole", "parts", "odd")]
    for (item, _), modified_s in zip(members, (1_700_000_000, 1_700_000_000.75, -5.5), strict=True):
        item.mtime = modified_s
    archive, digest = image(tmp_path, pack(*members))
    store.add(archive, digest)
    root = store.path(digest)
    times = [(root / item.name).stat().st_mtime for item, _ in members]
    assert times == [1_700_000_000, 1_700_000_000, 0]


def test_a_layer_may_replace_what_kind_a_name_is(store: RootfsStore, tmp_path: Path) -> None:
    lower = pack(file("a/b/c"), symlink("s", "a"), file("f"), folder("d"))
    upper = pack(
        file("a", b"1"), folder("s"), file("s/x"), symlink("f", "a"), file("d/y"), file("d")
    )
    root = unpacked(store, tmp_path, lower, upper)
    assert (root / "a").read_bytes() == b"1"
    assert (root / "s").is_dir() and not (root / "s").is_symlink()
    assert os.readlink(root / "f") == "a"
    assert (root / "d").is_file()


def test_links_lead_nowhere_but_into_the_image(store: RootfsStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    lower = pack(symlink("abs", str(outside)), symlink("up", "../../../.."), symlink("me", "."))
    upper = pack(file("abs/written", b"!"), file("up/written", b"!"), file("me/me2", b"!"))
    root = unpacked(store, tmp_path, lower, upper)
    assert list(outside.iterdir()) == []
    assert (root / str(outside).lstrip("/") / "written").read_bytes() == b"!"
    assert (root / "written").exists() and (root / "me2").exists()


@pytest.mark.parametrize(
    "layer",
    [
        pack(file("../escape")),
        pack(file("/etc/passwd")),
        pack(file("a/../../b")),
        pack(hardlink("shadow", "/etc/shadow")),
        pack(hardlink("shadow", "../../../../etc/shadow")),
        pack(hardlink("x", "missing")),
        pack(folder("d"), hardlink("x", "d")),
        pack(symlink("e", "/etc"), hardlink("x", "e/shadow")),
        pack(symlink("a", "b"), symlink("b", "a"), file("a/x")),
        pack(file("a"), file("a/b")),
        pack(file("/".join(["d"] * 80))),
        pack(file(".wh...")),
        pack(file("x", b"1234"))[:700],
        b"no tar at all, but as long as a block" * 20,
        pack(symlink("empty", "")),
    ],
)
def test_hostile_layers_leave_nothing(store: RootfsStore, tmp_path: Path, layer: bytes) -> None:
    assert refused(store, tmp_path, layer) == "unsafe_archive"


def test_devices_pipes_and_setuid_do_not_arrive(store: RootfsStore, tmp_path: Path) -> None:
    kinds = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    members = [other(f"dev/{number}", kind) for number, kind in enumerate(kinds)]
    root = unpacked(store, tmp_path, pack(*members, file("su", b"x", 0o6777), folder("d")))
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["su"]
    assert stat.S_IMODE((root / "su").stat().st_mode) == 0o755
    assert list((root / "dev").iterdir()) == []


def test_sparse_files_and_large_headers_are_refused(store: RootfsStore, tmp_path: Path) -> None:
    item, _ = file("s")
    item.pax_headers = {"GNU.sparse.realsize": str(1 << 40), "GNU.sparse.major": "1"}
    assert refused(store, tmp_path, pack((item, b""))) == "unsafe_archive"
    item, _ = file("n")
    item.pax_headers = {"comment": "x" * 100_000}
    assert refused(store, tmp_path, pack((item, b""))) == "unsafe_archive"
    assert refused(store, tmp_path, pack(other("g", tarfile.GNUTYPE_SPARSE))) == "unsafe_archive"


def test_bounds_hold_before_anything_is_written(
    store: RootfsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "ENTRIES_MAX", 3)
    assert refused(store, tmp_path, pack(*(file(str(n)) for n in range(4)))) == "unsafe_archive"
    small = RootfsStore(tmp_path / "small", bytes_max=20_000)
    assert refused(small, tmp_path, pack(*(file(str(n)) for n in range(3)), file("b", b"x" * 9000)))


def test_the_digest_commits_to_every_byte(store: RootfsStore, tmp_path: Path) -> None:
    layer = pack(file("a", b"1"))
    archive, digest = image(tmp_path, layer)
    with pytest.raises(LumarisError, match="another image"):
        store.add(archive, ids.digest(b"other"))
    raw = archive.read_bytes()
    archive.write_bytes(raw.replace(b"1" + bytes(511), b"2" + bytes(511)))
    with pytest.raises(LumarisError, match="not what its configuration says"):
        store.add(archive, digest)
    assert not store.has(digest)
    other_cpu = json.dumps(
        {**CONFIG, "architecture": "z80", "rootfs": {"diff_ids": [ids.digest(layer)]}}
    ).encode()
    with pytest.raises(LumarisError, match="is for z80"):
        store.add(raw_image(tmp_path, other_cpu, layer), ids.digest(other_cpu))


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"rootfs": []}',
        b'{"rootfs": {"diff_ids": ["sha256:00"]}}',
        b'{"rootfs": {"diff_ids": []}}',
        b'{"os": "windows", "rootfs": {"diff_ids": []}}',
    ],
)
def test_configurations_that_are_none(tmp_path: Path, config: bytes) -> None:
    with pytest.raises(LumarisError) as caught:
        ImageArchive(raw_image(tmp_path, config, b""))
    assert caught.value.code == "bad_image"


def test_an_oci_layout_with_compressed_layers(store: RootfsStore, tmp_path: Path) -> None:
    layer = pack(file("a", b"1" * 5000))
    config = json.dumps({**CONFIG, "rootfs": {"diff_ids": [ids.digest(layer)]}}).encode()
    middle = len(layer) // 2
    packed = gzip.compress(layer[:middle]) + gzip.compress(layer[middle:])
    manifest = json.dumps(
        {
            "config": {"digest": ids.digest(config)},
            "layers": [{"digest": ids.digest(packed), "size": len(packed)}],
        }
    ).encode()
    index = json.dumps({"manifests": [{"digest": ids.digest(manifest)}]}).encode()
    blobs = [
        file(f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}", blob)
        for blob in (config, packed, manifest)
    ]
    archive = tmp_path / "oci.tar"
    archive.write_bytes(pack(file("oci-layout", b"{}"), *blobs, file("index.json", index)))
    store.add(archive, ids.digest(config))
    assert (store.path(ids.digest(config)) / "a").read_bytes() == b"1" * 5000


@pytest.mark.slow
def test_a_bomb_of_gzip_is_refused(store: RootfsStore, tmp_path: Path) -> None:
    layer = pack(file("zeros", bytes(100 << 20)))
    config = json.dumps({**CONFIG, "rootfs": {"diff_ids": [ids.digest(layer)]}}).encode()
    archive = raw_image(tmp_path, config, gzip.compress(layer))
    with pytest.raises(LumarisError, match="far more than it is"):
        store.add(archive, ids.digest(config))


def test_the_least_used_go_first_but_not_those_in_use(tmp_path: Path) -> None:
    store = RootfsStore(tmp_path / "rootfs", bytes_max=3 * 4096 * 3)
    digests: list[str] = []
    with contextlib.ExitStack() as pins:
        for number in range(4):
            archive, digest = image(tmp_path, pack(file(f"f{number}", bytes(8192))))
            digests.append(digest)
            store.add(archive, digest)
            if number == 0:
                pins.enter_context(store.pin(digest))
            os.utime(store.directory / digest.removeprefix("sha256:"), (number, number))
        assert store.has(digests[0]) and not store.has(digests[1])
        assert store.digests()[0] == digests[3]
        with pytest.raises(LumarisError):
            store.remove(digests[0])
    store.remove(digests[0])
    assert not store.has(digests[0])
    assert not store.has("../../etc") and not store.has("")


def test_an_image_from_a_folder_is_always_the_same(store: RootfsStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "bin").mkdir(parents=True)
    (source / "bin/run").write_bytes(b"#!/bin/sh\n")
    (source / "bin/run").chmod(0o755)
    digests = set()
    for number in range(2):
        tar, archive = tmp_path / "rootfs.tar", tmp_path / f"image{number}.tar"
        os.utime(source / "bin/run", (number, number))
        pack_folder(source, tar)
        digests.add(make_image(tar, archive, environment={"A": "b=c"}, workdir="/bin"))
    (digest,) = digests
    assert (tmp_path / "image0.tar").read_bytes() == (tmp_path / "image1.tar").read_bytes()
    store.add(tmp_path / "image0.tar", digest)
    config = store.config(digest)
    assert (config.environment, config.workdir) == ({"A": "b=c"}, "/bin")
    assert os.access(store.path(digest) / "bin/run", os.X_OK)


# --- any archive at all ---

_names = st.sampled_from(
    ["a", "b", "c", "a/b", "b/c", "a/b/c", "c/..", "../x", "/x", ".wh.a", "a/.wh..wh..opq"]
)
_targets = st.sampled_from(
    ["a", "b", "../..", "/", "/etc", "/etc/passwd", "c/a", ".", "../outside"]
)
_members = st.one_of(
    st.builds(file, _names, st.binary(max_size=600), st.integers(0, 0o7777)),
    st.builds(folder, _names),
    st.builds(symlink, _names, _targets),
    st.builds(hardlink, _names, _targets),
    st.builds(lambda name: other(name, tarfile.CHRTYPE), _names),
)


def test_a_folder_is_cleared_once_in_a_layer(
    store: RootfsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[object] = []
    plain = os.listdir

    def counted(at: int) -> list[str]:
        listed.append(at)
        return plain(at)

    monkeypatch.setattr(os, "listdir", counted)
    opaque = file("d/.wh..wh..opq")
    layer = pack(file("d/new"), *[opaque] * 50, file("d/later"), *[opaque] * 50)
    root = unpacked(store, tmp_path, pack(file("d/old")), layer)
    assert len([at for at in listed if isinstance(at, int)]) == 1
    assert sorted(plain(root / "d")) == ["later", "new"]


def test_what_lies_behind_the_end_counts(
    store: RootfsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Allowance.__init__, "__kwdefaults__", {"bytes_max": 50_000, "check": bool})
    assert refused(store, tmp_path, pack(file("a")) + bytes(100_000)) == "unsafe_archive"


async def test_unpacking_ends_when_nobody_waits(store: RootfsStore, tmp_path: Path) -> None:
    archive, digest = image(tmp_path, pack(file("a")))
    work = partial(store.add, archive, digest, check=trio.from_thread.check_cancelled)

    def add() -> None:
        trio.from_thread.run_sync(scope.cancel)
        work()

    with trio.CancelScope() as scope:
        await trio.to_thread.run_sync(add)
    assert scope.cancelled_caught and os.listdir(store.directory) == []


_layers = st.lists(
    st.lists(_members, max_size=8).map(lambda found: pack(*found)), min_size=1, max_size=3
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(layers=_layers, cut=st.none() | st.integers(0, 4000), flip=st.none() | st.integers(0, 4000))
def test_whatever_an_archive_says_it_stays_inside(
    tmp_path_factory: pytest.TempPathFactory, layers: list[bytes], cut: int | None, flip: int | None
) -> None:
    at = tmp_path_factory.mktemp("any")
    outside = at / "outside"
    outside.write_bytes(b"untouched")
    if flip is not None and flip < len(layers[0]):
        changed = bytearray(layers[0])
        changed[flip] ^= 0x55
        layers[0] = bytes(changed)
    layers[0] = layers[0][:cut]
    store = RootfsStore(at / "store", bytes_max=ROOM)
    archive, digest = image(at, *layers)
    before = sorted(os.listdir(at))
    try:
        store.add(archive, digest)
    except LumarisError as error:
        assert error.code in ("unsafe_archive", "bad_image")  # noqa: PT017 - refusing is fine
        assert os.listdir(store.directory) == []
    else:
        for path in store.path(digest).rglob("*"):
            status = path.lstat()
            assert stat.S_IFMT(status.st_mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
            assert not status.st_mode & (stat.S_ISUID | stat.S_ISGID)
    assert outside.read_bytes() == b"untouched" and outside.stat().st_nlink == 1
    assert sorted(os.listdir(at)) == before
