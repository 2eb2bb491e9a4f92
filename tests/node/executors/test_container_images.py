"""Container images in and out of an engine, without a registry."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import docker
import pytest

from lumaris_node.executors.container import images as container_images
from lumaris_node.executors.container.executor import ContainerExecutor
from lumaris_node.images.archive import make_image, pack_folder
from lumaris_protocol.errors import LumarisError
from tests.node.executors.conformance import SHELL, Bench, run

pytestmark = [pytest.mark.slow, pytest.mark.docker]


@pytest.fixture
async def executor(docker_engine: str) -> AsyncIterator[ContainerExecutor]:
    made = ContainerExecutor(f"images-{os.getpid()}", base_url=docker_engine, runtime="runc")
    yield made
    assert await made.reap_orphans() == 0
    await made.aclose()


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, str]:
    """An archive of a new image with a shell, and its digest."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("needs busybox (Debian package busybox-static)")
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    shutil.copy(busybox, root / "bin/busybox")
    for applet in ("sh", "cat", "echo", "env"):
        (root / "bin" / applet).symlink_to("busybox")
    (root / "unique").write_bytes(os.urandom(16))
    pack_folder(root, tmp_path / "root.tar")
    target = tmp_path / "image.tar"
    digest = make_image(tmp_path / "root.tar", target, environment={"FROM_IMAGE": "yes"})
    return target, digest


async def test_an_image_comes_runs_and_goes(
    executor: ContainerExecutor, archive: tuple[Path, str], tmp_path: Path
):
    source, digest = archive
    seen: list[tuple[str, int, int]] = []
    assert not await executor.has_image(digest)
    await executor.add_image(digest, source, lambda *what: seen.append(what))
    try:
        assert seen[-1][1] == seen[-1][2] > 0
        assert await executor.has_image(digest)
        assert digest in await executor.images()
        bench = Bench(executor, tmp_path, lambda name: (digest, ("/bin/sh", "-c", SHELL[name])))
        assert (await run(bench, bench.spec("print")))[1].stdout == b"one\ntwo\n"
        await executor.remove_image(digest)
        assert not await executor.has_image(digest)
    finally:
        await executor.remove_image(digest)
    await executor.remove_image(digest)
    assert not await executor.has_image(digest)


async def test_an_archive_of_another_image_is_refused(
    executor: ContainerExecutor, archive: tuple[Path, str], tmp_path: Path
):
    source, digest = archive
    other = "sha256:" + "2" * 64
    (tmp_path / "text").write_text("not a tar")
    for image, file in ((other, source), (digest, tmp_path / "text"), ("no digest", source)):
        with pytest.raises(LumarisError) as caught:
            await executor.add_image(image, file)
        assert caught.value.code in ("bad_image", "unsafe_archive")
    assert not await executor.has_image(digest)


async def test_an_archive_names_nothing_in_the_engine(
    executor: ContainerExecutor, archive: tuple[Path, str], docker_engine: str, tmp_path: Path
):
    source, digest = archive
    hostile = tmp_path / "hostile.tar"
    with tarfile.open(source) as old, tarfile.open(hostile, "w") as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            raw = file.read()
            if member.name == "manifest.json":
                manifest = json.loads(raw)
                manifest[0]["RepoTags"] = ["lumaris/busybox:test", "debian:latest"]
                raw = json.dumps(manifest).encode()
            member.size = len(raw)
            new.addfile(member, io.BytesIO(raw))
    await executor.add_image(digest, hostile)
    client = docker.DockerClient(base_url=docker_engine)
    try:
        assert client.images.get(digest).tags == [f"lumaris/cache:{digest[7:19]}"]
    finally:
        client.close()
        await executor.remove_image(digest)


def small_image(folder: Path, size: int) -> tuple[Path, str]:
    """An archive of an image of random bytes, and its digest."""
    name = os.urandom(4).hex()
    (folder / name).mkdir()
    (folder / name / "data").write_bytes(os.urandom(size))
    pack_folder(folder / name, folder / f"{name}.tar")
    return folder / f"{name}-image.tar", make_image(
        folder / f"{name}.tar", folder / f"{name}-image.tar"
    )


async def test_the_image_used_longest_ago_makes_room(docker_engine: str, tmp_path: Path):
    images = [small_image(tmp_path, 300_000) for _ in range(3)]
    executor = ContainerExecutor(
        f"images-{os.getpid()}", base_url=docker_engine, runtime="runc", cache_bytes_max=0
    )
    try:
        # Whatever else this engine holds of ours counts too.
        found = await executor._engine.call("images")
        held = sum(item["Size"] for item in found if container_images._is_cached(item))
        executor._cache._bytes_max = held + 750_000
        for source, digest in images[:2]:
            await executor.add_image(digest, source)
        for digest in {item["Id"] for item in found} | {images[0][1]}:
            executor._cache.touch(digest)
        await executor.add_image(images[2][1], images[2][0])
        here = [await executor.has_image(digest) for _, digest in images]
        assert here == [True, False, True]
        source, digest = small_image(tmp_path, 2_000_000 + held)
        with pytest.raises(LumarisError) as caught:
            await executor.add_image(digest, source)
        assert caught.value.code == "disk_short"
    finally:
        for _, digest in images:
            await executor.remove_image(digest)
        await executor.aclose()


async def test_what_the_owner_put_there_stays(executor: ContainerExecutor):
    owned = (await executor.images())[0]
    await executor.remove_image(owned)
    assert await executor.has_image(owned)


async def test_a_link_in_an_image_does_not_lead_to_this_machines_files(
    executor: ContainerExecutor, tmp_path: Path
):
    """An image whose /tmp is a link: what empties /tmp must not follow it outside."""
    busybox = shutil.which("busybox")
    assert busybox is not None
    root, victim = tmp_path / "r", Path(tempfile.mkdtemp(dir="/var/tmp"))
    (victim / "kept").write_text("kept")
    (root / "bin").mkdir(parents=True)
    (root / str(victim).lstrip("/")).mkdir(parents=True)
    (root / "tmp").symlink_to(victim)
    shutil.copy(busybox, root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    pack_folder(root, tmp_path / "r.tar")
    digest = make_image(tmp_path / "r.tar", tmp_path / "r-image.tar")
    await executor.add_image(digest, tmp_path / "r-image.tar")
    try:
        bench = Bench(executor, tmp_path, lambda name: (digest, ("/bin/sh", "-c", "exit 0")))
        bench.lease = "lease"
        for _ in range(2):
            assert (await run(bench, bench.spec("print")))[0].reason == "succeeded"
        assert (victim / "kept").read_text() == "kept"
        await executor.release("lease")
    finally:
        await executor.remove_image(digest)
        shutil.rmtree(victim)
