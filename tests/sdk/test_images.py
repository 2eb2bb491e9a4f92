"""Images a buyer names: local archives, and registries' tags that become hashes."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from lumaris import images
from lumaris.images import Image
from lumaris.jobs import JobRequest
from lumaris_overlay.image_archive import ImageArchive
from lumaris_protocol import ids
from lumaris_protocol.errors import LumarisError
from tests.node.images.tars import file, image, pack
from tests.overlay.registries import Pusher, run_registry


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))
    return tmp_path / "cache" / "layers"


async def test_an_archive_becomes_the_files_that_sellers_ask_for(
    tmp_path: Path, cache: Path
) -> None:
    layers = [pack(file("a", b"1")), pack(file("b", b"2"))]
    archive, digest = image(tmp_path, *layers)
    for _ in range(2):
        found = await images.resolve(str(archive))
        assert (found.tier, found.digest, found.fetched) == ("container", digest, True)
        config, *parts = found.files.values()
        assert config.read_bytes() == ImageArchive(archive).raw_config
        assert [part.read_bytes() for part in parts] == layers
        assert list(found.files)[1:] == [ids.digest(layer) for layer in layers]
    assert len(list(cache.iterdir())) == 3


async def test_a_damaged_archive_is_seen_before_it_is_sent(tmp_path: Path, cache: Path) -> None:
    archive, _ = image(tmp_path, pack(file("a", b"1")))
    archive.write_bytes(archive.read_bytes().replace(b"1" + bytes(511), b"2" + bytes(511)))
    with pytest.raises(LumarisError) as caught:
        await images.resolve(str(archive))
    assert caught.value.code == "bad_image"
    assert len(list(cache.iterdir())) == 1


async def test_old_layers_leave_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_CACHE_BYTES_MAX", 0)
    archive, _ = image(tmp_path, pack(file("old", b"1")))
    await images.resolve(str(archive))
    archive, _ = image(tmp_path, pack(file("new", b"1")))
    found = await images.resolve(str(archive))
    assert {path.name for path in cache.iterdir()} == {path.name for path in found.files.values()}


async def test_the_tar_of_a_folder_is_named_as_such(tmp_path: Path, cache: Path) -> None:
    tar = tmp_path / "root.tar"
    tar.write_bytes(pack(file("etc/x", b"1")))
    with pytest.raises(LumarisError, match="tar of a folder") as caught:
        await images.resolve(str(tar))
    assert caught.value.code == "bad_image"
    assert "lumaris node image import" in caught.value.hint


async def test_the_tier_is_chosen(tmp_path: Path, cache: Path) -> None:
    digest = ids.digest(b"image")
    assert await images.resolve(digest, tier="process") == Image("process", digest)
    assert not (await images.resolve(digest)).fetched
    for name, tier in ((digest, "wasm"), ("python:3.12-wasi", "vm")):
        with pytest.raises(LumarisError) as caught:
            await images.resolve(name, tier=tier)  # type: ignore[arg-type]
        assert caught.value.code == "usage"
    assert JobRequest(image=digest, command=("x",)).tier is None


@pytest.mark.parametrize("name", ["python:9", "busybox", "sha256:12", "Team/App:1", "a//b:1"])
async def test_slips_are_not_looked_up(name: str) -> None:
    with pytest.raises(LumarisError) as caught:
        await images.resolve(name)
    assert caught.value.code == "bad_image"


@pytest.mark.slow
async def test_a_tag_becomes_a_hash(registry_program: str, tmp_path: Path) -> None:
    archive, digest = image(tmp_path, pack(file("a", b"1")))
    with run_registry(registry_program, tmp_path / "registry") as host:
        pusher = Pusher(host, "team/app")
        source = pusher.image(archive, "v1")
        pusher.close()
        for name in (f"{host}/team/app:v1", source):
            assert await images.resolve(name) == Image("container", digest, source=source)
