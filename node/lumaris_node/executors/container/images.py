"""Images in the engine: which are offered, taking one in from an archive, giving one out as one.

An archive never reaches the engine as it came: its layers are checked, and an archive of ours is
made around them as it is sent, with one image and no name in it.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio

from lumaris_node.executors.container.engine import Engine
from lumaris_node.executors.port import Progress
from lumaris_overlay.image_archive import Allowance, ImageArchive, check_digest, check_here
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError

# Only images under this name are offered: others on the machine may hold the owner's secrets.
OFFERED_PREFIX = "lumaris/"
_CACHE = "lumaris/cache"
_CHUNK_BYTES = 1 * limits.MIB
# A few dozen images; the owner's own are not counted.
CACHE_BYTES_MAX = 32 * limits.GIB
# Left free on the engine's disk, for what runs there.
_SPARE_BYTES = 1 * limits.GIB


def is_offered(image: dict[str, Any]) -> bool:
    """Whether the owner, or this node, put the image under the name of what is offered."""
    return any(tag.startswith(OFFERED_PREFIX) for tag in image.get("RepoTags") or ())


async def offered_image(engine: Engine, image: str) -> dict[str, Any] | None:
    """The engine's facts of an offered image with exactly this id."""
    try:
        found: dict[str, Any] = await engine.call("inspect_image", check_digest(image))
    except LumarisError:
        return None
    return found if found.get("Id") == image and is_offered(found) else None


class ImageCache:
    """The images that this node took into the engine, within `bytes_max` by least use.

    What the owner put there under another name is never removed.
    """

    def __init__(self, engine: Engine, *, bytes_max: int = CACHE_BYTES_MAX) -> None:
        self._engine, self._bytes_max = engine, bytes_max
        self._used: dict[str, float] = {}
        self._turn = trio.Lock()

    def touch(self, image: str) -> None:
        """An order uses the image now."""
        self._used[image] = trio.current_time()

    async def add(self, image: str, source: Path, progress: Progress | None) -> None:
        """Load an archive's image. Raises LumarisError `bad_image`, `disk_short`."""
        archive, sizes = await self._engine.threaded(lambda _: _checked(source, image))
        counted = _Counted(progress, sum(sizes))

        def load(api: Any) -> None:
            for _ in api.load_image(_canonical(archive, sizes, counted)):
                continue
            api.tag(image, _CACHE, image.removeprefix("sha256:")[:12])

        async with self._turn:  # two at once would each find the same room
            await self._make_room(sum(sizes))
            await self._engine.threaded(load)
        if await offered_image(self._engine, image) is None:
            raise LumarisError(
                "bad_image", "The engine does not name images by their configuration."
            )
        self.touch(image)

    async def _make_room(self, size: int) -> None:
        """Drop the images used longest ago; what a sandbox uses resists and stays."""
        found: list[dict[str, Any]] = await self._engine.call("images")
        cached = {item["Id"]: int(item["Size"]) for item in found if _is_cached(item)}
        self._used = {image: at for image, at in self._used.items() if image in cached}
        if size > self._bytes_max:
            raise LumarisError("disk_short", "The image is larger than all that is kept here.")
        for image in sorted(cached, key=lambda name: self._used.get(name, 0.0)):
            if sum(cached.values()) + size <= self._bytes_max:
                break
            try:
                await remove_image(self._engine, image)
            except LumarisError:
                continue
            del cached[image]
        if sum(cached.values()) + size > self._bytes_max:
            raise LumarisError("disk_short", "The images in use leave no room for this one.")
        root = str((await self._engine.call("info")).get("DockerRootDir") or "/")
        try:
            free = shutil.disk_usage(root).free
        except OSError:
            return  # the engine's disk is not seen from here
        # The engine unpacks an image beside what it received of it.
        if free < 2 * size + _SPARE_BYTES:
            raise LumarisError("disk_short", "The engine's disk has no room for the image.")


def _is_cached(image: dict[str, Any]) -> bool:
    """Whether we put it there, and nobody gave it another name."""
    tags = image.get("RepoTags") or ()
    return bool(tags) and all(tag.startswith(f"{_CACHE}:") for tag in tags)


def _checked(source: Path, image: str) -> tuple[ImageArchive, list[int]]:
    """The archive, when it holds this image and may run here, and the sizes of its layers."""
    archive = ImageArchive(source)
    if archive.digest != image:
        raise LumarisError("bad_image", f"The archive holds {archive.digest}, not {image}.")
    check_here(archive.config)
    return archive, _check_layers(archive)


async def remove_image(engine: Engine, image: str) -> None:
    """Take our own name off an image; it goes with its last name, and stays while it is used."""
    found = await offered_image(engine, image)
    for tag in (found or {}).get("RepoTags") or ():
        if tag.startswith(f"{_CACHE}:"):
            await engine.call("remove_image", tag)


class _Counted:
    """Tells how far a load is; called in the thread that sends."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            trio.from_thread.run_sync(self._progress, "loading", self._done, self._total)


def _check_layers(archive: ImageArchive) -> list[int]:
    """Read every layer once: the sizes of the tars, whose hashes were right."""
    sizes = []
    allowance = Allowance(check=trio.from_thread.check_cancelled)
    for layer in archive.layers:
        size = 0
        with archive.open_layer(layer, allowance) as reader:
            while chunk := reader.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > limits.IMAGE_BYTES_MAX:
                    raise LumarisError("bad_image", "The image unpacks to more than is taken.")
        sizes.append(size)
    if sum(sizes) > limits.IMAGE_BYTES_MAX:
        raise LumarisError("bad_image", "The image unpacks to more than is taken.")
    return sizes


def _canonical(archive: ImageArchive, sizes: list[int], counted: _Counted) -> Iterator[bytes]:
    """A docker-archive of this one image, without a name."""
    config = f"{archive.digest.removeprefix('sha256:')}.json"
    names = [f"{number}/layer.tar" for number in range(len(sizes))]
    manifest = [{"Config": config, "RepoTags": None, "Layers": names}]
    for name, raw in (
        (config, archive.raw_config),
        ("manifest.json", json.dumps(manifest).encode()),
    ):
        yield _member(name, len(raw)) + raw + _padding(len(raw))
    allowance = Allowance(check=trio.from_thread.check_cancelled)
    for name, size, layer in zip(names, sizes, archive.layers, strict=True):
        yield _member(name, size)
        with archive.open_layer(layer, allowance) as reader:
            while chunk := reader.read(_CHUNK_BYTES):
                counted.add(len(chunk))
                yield chunk
        yield _padding(size)
    yield bytes(2 * tarfile.BLOCKSIZE)


def _member(name: str, size: int) -> bytes:
    item = tarfile.TarInfo(name)
    item.size, item.mode = size, 0o644
    return item.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
