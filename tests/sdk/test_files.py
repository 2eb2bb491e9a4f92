"""What a buyer names: inputs, output paths, images."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumaris import artifacts, images
from lumaris_protocol import ids, limits
from lumaris_protocol.catalog import CATALOG
from lumaris_protocol.errors import LumarisError


async def test_inputs_are_described_by_hash(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"words")
    [file] = await artifacts.describe_inputs({"in/a.txt": tmp_path / "a"})
    assert (file.path, file.size_bytes, file.sha256) == ("in/a.txt", 5, ids.digest(b"words"))


@pytest.mark.parametrize("path", ["/a", "../a", "a/../b", "", "a//b", "a\0b", "a\\b"])
async def test_unsafe_names_never_leave(tmp_path: Path, path: str):
    (tmp_path / "a").touch()
    with pytest.raises(LumarisError) as caught:
        await artifacts.describe_inputs({path: tmp_path / "a"})
    assert caught.value.code == "bad_input"


async def test_inputs_that_cannot_be_read(tmp_path: Path):
    for source in (tmp_path, tmp_path / "none"):
        with pytest.raises(LumarisError) as caught:
            await artifacts.describe_inputs({"a": source})
        assert caught.value.code == "bad_input"
        assert str(source) in caught.value.message


async def test_inputs_that_are_too_large(tmp_path: Path, monkeypatch):
    (tmp_path / "a").write_bytes(b"words")
    for name in ("FILE_BYTES_MAX", "INPUT_BYTES_MAX"):
        with monkeypatch.context() as patch:
            patch.setattr(limits, name, 4)
            with pytest.raises(LumarisError):
                await artifacts.describe_inputs({"a": tmp_path / "a"})
    many = {str(n): tmp_path / "a" for n in range(limits.INPUT_FILES_MAX + 1)}
    with pytest.raises(LumarisError):
        await artifacts.describe_inputs(many)


async def test_outputs_stay_in_their_folder(tmp_path: Path):
    target = await artifacts.make_target(tmp_path / "out", "a/b")
    assert target == tmp_path / "out" / "a" / "b"
    assert target.parent.is_dir()
    with pytest.raises(LumarisError):
        await artifacts.make_target(tmp_path / "out", "../evil")


async def test_images(tmp_path: Path):
    name, entry = next(iter(CATALOG.items()))
    assert (await images.resolve(name)).digest == entry.digest
    digest = ids.digest(b"an image")
    assert (await images.resolve(digest)).tier == "container"
    module = tmp_path / "m.wasm"
    module.write_bytes(b"\0asm\1\0\0\0")
    image = await images.resolve(str(module))
    assert (image.tier, image.files) == ("wasm", {image.digest: module})


@pytest.mark.parametrize("name", ["", "ubuntu", "sha256:abc", "sha256:" + "0" * 65, "none.wasm"])
async def test_names_that_are_no_image(name: str):
    with pytest.raises(LumarisError) as caught:
        await images.resolve(name)
    assert caught.value.code == "bad_image"


async def test_a_file_that_is_no_module(tmp_path: Path):
    (tmp_path / "m.wasm").write_bytes(b"#!/bin/sh")
    with pytest.raises(LumarisError) as caught:
        await images.resolve(str(tmp_path / "m.wasm"))
    assert caught.value.code == "bad_image"
