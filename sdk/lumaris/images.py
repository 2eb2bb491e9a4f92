"""What a buyer may name as an image: a catalog name, a digest, a local file, or a registry's."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import platformdirs
import trio

from lumaris import artifacts
from lumaris_overlay.image_archive import ArchiveLayer, ImageArchive, holds_image
from lumaris_overlay.private_files import make_private_folder
from lumaris_protocol.catalog import CATALOG
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import DIGEST_PATTERN
from lumaris_protocol.limits import FILE_BYTES_MAX, GIB
from lumaris_protocol.messages.advert import Tier

_WASM_MAGIC = b"\0asm"
_RESOLVE_S = 60.0
_PIECE_BYTES = 1024 * 1024
_CACHE_BYTES_MAX = 4 * GIB  # layers of local archives, to be sent
_DRAFT = ".draft"
_ALIKE = 0.85  # of 1: a letter or two of a catalog name are wrong


@dataclass(frozen=True)
class Image:
    """A resolved image: its tier, its digest, and where a seller that lacks it finds it.

    `files` are local files by digest that a seller may ask for; `source` is a registry's
    reference by hash.
    """

    tier: Tier
    digest: str
    files: Mapping[str, Path] = field(default_factory=dict)
    source: str = ""

    @property
    def fetched(self) -> bool:
        """Whether any seller can have it, and not only those that hold it."""
        return bool(self.files or self.source)


async def resolve(name: str, command: Sequence[str] = (), *, tier: Tier | None = None) -> Image:
    """The image of a name; `tier` is where a container image is to run, `container` if not said.

    A tag is looked up in its registry now, so that what runs is what was there now. Raises
    LumarisError `bad_image`, `image_refused`, `unreachable`, or `usage` for a tier that does not
    run the image. A module runs whatever its command is called, so a mistyped program of a
    catalog image is refused here (`bad_command`), before it costs anything.
    """
    found = await _resolve(name, command)
    if tier is None or tier == found.tier:
        return found
    if "wasm" in (tier, found.tier):
        raise LumarisError("usage", f"{name} runs on the tier {found.tier}, not on {tier}.")
    return Image(tier, found.digest, found.files, found.source)


async def _resolve(name: str, command: Sequence[str]) -> Image:
    entry = CATALOG.get(name)
    if entry is not None:
        if command and command[0] not in entry.programs:
            known = ", ".join(entry.programs)
            raise LumarisError(
                "bad_command", f"{name} has no program {command[0]!r}, but: {known}."
            )
        return Image(entry.tier, entry.digest)
    if re.match(DIGEST_PATTERN, name):
        return Image("container", name)
    path = Path(name)
    if path.suffix == ".wasm":
        return await trio.to_thread.run_sync(_local_module, path)
    if path.suffix == ".tar":
        return await trio.to_thread.run_sync(_local_archive, path)
    if "/" not in name:  # a registry's name that looks like ours can be given with its host
        for meant in get_close_matches(name, CATALOG, n=1, cutoff=_ALIKE):
            raise LumarisError(
                "bad_image",
                f"{name!r} is not in the catalog. Did you mean {meant}?",
                hint=f"If a registry has it, say so: docker.io/library/{name}.",
            )
    if _names_registry(name):
        return await _in_registry(name)
    known = ", ".join(sorted(CATALOG))
    raise LumarisError("bad_image", f"{name!r} is no image. Catalog: {known}.")


def _names_registry(name: str) -> bool:
    """Whether a name is meant for a registry: with a tag or a path, and no slip in another kind."""
    families = {entry.partition(":")[0] for entry in CATALOG}
    first, colon, _ = name.partition(":")
    return ("/" in name or bool(colon)) and first not in {*families, "sha256"}


async def _in_registry(name: str) -> Image:
    from lumaris_overlay.registry import Registry, parse_reference  # httpx, only when it is needed

    reference = parse_reference(name)
    try:
        with trio.fail_after(_RESOLVE_S):
            async with Registry(reference) as registry:
                found = await registry.find()
    except trio.TooSlowError:
        raise LumarisError("unreachable", f"{reference.host} does not answer in time.") from None
    return Image("container", found.config.digest, source=found.reference.source)


def _local_archive(path: Path) -> Image:
    """An archive's parts as files: sellers ask for the configuration, then for layers by hash."""
    try:
        image = ImageArchive(path)
    except LumarisError:
        if not _is_root_folder(path):
            raise
        raise LumarisError(
            "bad_image",
            f"{path} is the tar of a folder, not of an image.",
            hint="A seller makes an image of it with `lumaris node image import FILE`, which prints"
            " the sha256:<digest> to run.",
        ) from None
    folder = Path(platformdirs.user_cache_dir("lumaris")) / "layers"
    make_private_folder(folder)
    files = {image.digest: _cached(folder, image.digest, lambda: [image.raw_config])}
    for layer in image.layers:
        files[layer.diff_id] = _cached(folder, layer.diff_id, partial(_layer, image, layer))
    if sum(file.stat().st_size for file in files.values()) > FILE_BYTES_MAX:
        raise LumarisError("bad_image", f"{path} is too large to send; put it into a registry.")
    _trim(folder, keep={file.name for file in files.values()})
    return Image("container", image.digest, files)


def _is_root_folder(path: Path) -> bool:
    try:
        return not holds_image(path)
    except (LumarisError, OSError):
        return False


def _layer(image: ImageArchive, layer: ArchiveLayer) -> Iterator[bytes]:
    with image.open_layer(layer) as reader:
        while piece := reader.read(_PIECE_BYTES):
            yield piece


def _cached(folder: Path, digest: str, pieces: Callable[[], Iterable[bytes]]) -> Path:
    """A part of an image in the cache, written there if it is new. Raises `disk_short`."""
    target = folder / digest.removeprefix("sha256:")
    if target.exists():
        os.utime(target)
        return target
    handle, name = tempfile.mkstemp(dir=folder, suffix=_DRAFT)
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in pieces():
                file.write(piece)
        os.replace(name, target)
    except OSError as error:
        raise LumarisError("disk_short", f"{folder}: {error.strerror}") from None
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _trim(folder: Path, keep: set[str]) -> None:
    """Drop the layers used longest ago; what another command writes right now stays."""
    files = [file for file in folder.iterdir() if file.suffix != _DRAFT]
    files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > _CACHE_BYTES_MAX and file.name not in keep:
            file.unlink(missing_ok=True)


def _local_module(path: Path) -> Image:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_WASM_MAGIC))
    except OSError as error:
        raise LumarisError("bad_image", f"{path}: {error.strerror}") from None
    if magic != _WASM_MAGIC:
        raise LumarisError("bad_image", f"{path} is not a WebAssembly module.")
    _, digest = artifacts.hash_file(path)
    return Image("wasm", digest, {digest: path})
