"""Container images as files: what `docker save` writes, or a tar of an OCI image layout.

An image is named by the SHA-256 of its configuration, which names the hash of every layer's
uncompressed tar (`rootfs.diff_ids`); so whoever reads all layers has checked all of it. Formats:
github.com/moby/docker-image-spec and github.com/opencontainers/image-spec.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lumaris_overlay.tar import TarReader, unsafe
from lumaris_protocol import ids
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import ENVIRONMENT_MAX, IMAGE_BYTES_MAX, LAYERS_MAX, MIB

# A configuration lists each step of the build; large ones have tens of kB.
CONFIG_BYTES_MAX = 1 * MIB
_MEMBERS_MAX = 16 * LAYERS_MAX  # each layer comes with a folder and two small files at most
# Gzip makes zeros a thousandth; file systems of programs come down to a third.
_RATIO_MAX = 200
_RATIO_FREE_BYTES = 64 * MIB
_CHUNK_BYTES = 1 * MIB
# Smaller, because what is not used of one is copied at each step.
_ZIPPED_BYTES = 64 * 1024
_GZIP_MEMBER_COST = 4096  # bytes charged for each, as one may hold nothing
_LINKS_MAX = 8
_ROOT_MEMBERS_MAX = 1_000_000
_DESCRIPTIONS = ("manifest.json", "index.json")
_GZIP = zlib.MAX_WBITS | 16
_ARCHITECTURES = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


def architecture() -> str:
    """This machine's processor, in the words of image configurations."""
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)


@dataclass(frozen=True)
class ImageConfig:
    """What an image says of the commands run in it, and the hashes of its layers."""

    environment: dict[str, str]
    user: str
    workdir: str
    architecture: str
    diff_ids: tuple[str, ...]


def parse_config(raw: bytes) -> ImageConfig:
    """A configuration blob, read strictly where it matters. Raises LumarisError `bad_image`."""
    found = _json(raw)
    inner = found.get("config") or {}
    rootfs = found.get("rootfs") or {}
    if not isinstance(inner, dict) or not isinstance(rootfs, dict):
        raise bad_image("has a configuration that cannot be read")
    diff_ids = rootfs.get("diff_ids")
    if not isinstance(diff_ids, list) or not 1 <= len(diff_ids) <= LAYERS_MAX:
        raise bad_image(f"does not have 1 to {LAYERS_MAX} layers")
    if found.get("os", "linux") != "linux":
        raise bad_image("is not for Linux")
    return ImageConfig(
        environment=_environment(inner.get("Env")),
        user=_short(inner.get("User")),
        workdir=_short(inner.get("WorkingDir")),
        architecture=_short(found.get("architecture")),
        diff_ids=tuple(check_digest(item) for item in diff_ids),
    )


def check_here(config: ImageConfig) -> None:
    """Raises LumarisError `bad_image` for an image of another processor."""
    if config.architecture not in ("", architecture()):
        raise bad_image(f"is for {config.architecture[:20]}, and this machine is {architecture()}")


def bad_image(why: str) -> LumarisError:
    """An image is refused."""
    return LumarisError("bad_image", f"The image {why}.")


def check_digest(text: object) -> str:
    """A digest of ours. Raises LumarisError `bad_image`."""
    if not isinstance(text, str) or not re.fullmatch(ids.DIGEST_PATTERN, text):
        raise bad_image("names a part by something that is no SHA-256")
    return text


class Allowance:
    """What reading an image may still cost, over all its layers. It is charged before it is spent.

    `check` is called often, in the thread that reads, and raises when nobody wants the image.
    """

    def __init__(
        self, *, bytes_max: int = IMAGE_BYTES_MAX, check: Callable[[], object] = lambda: None
    ) -> None:
        self._left, self._check = bytes_max, check

    def take(self, size: int) -> None:
        """Charge bytes of a layer's tar. Raises LumarisError `unsafe_archive`."""
        self._check()
        self._left -= size
        if self._left < 0:
            raise unsafe("unpacks to more bytes than an image may have")


@dataclass(frozen=True)
class ArchiveLayer:
    """Where a layer's bytes are in the archive's file, and the hash of its tar."""

    offset: int
    size: int
    diff_id: str


class ImageArchive:
    """An image in a file. `digest` is its configuration's; layers are checked as they are read."""

    def __init__(self, path: Path) -> None:
        """Read the index and the configuration, and no layer. Blocks.

        Raises LumarisError `bad_image` for another kind of file, `unsafe_archive`.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self._parts = _index(file)
                named = self._named(file)
                self.raw_config = self._blob(file, named[0])
        except OSError as error:
            raise LumarisError("bad_image", f"{path}: {error.strerror}") from None
        self.digest = ids.digest(self.raw_config)
        self.config = parse_config(self.raw_config)
        if len(named) - 1 != len(self.config.diff_ids):
            raise bad_image("does not have the layers that its configuration names")
        self.layers = tuple(
            ArchiveLayer(*self._place(name), diff_id)
            for name, diff_id in zip(named[1:], self.config.diff_ids, strict=True)
        )

    @contextmanager
    def open_layer(
        self, layer: ArchiveLayer, allowance: Allowance | None = None
    ) -> Iterator[LayerReader]:
        """A layer's uncompressed tar; at the end its hash is checked.

        Raises LumarisError `bad_image` when it is not what the configuration says.
        """
        with self.path.open("rb") as file:
            reader = LayerReader(file, layer, allowance or Allowance())
            yield reader
            reader.finish()

    def _named(self, file: BinaryIO) -> list[str]:
        """The names of the configuration and of the layers, the lowest first."""
        if "manifest.json" in self._parts:
            found = _json_list(self._blob(file, "manifest.json"))
            if len(found) != 1 or not isinstance(found[0], dict):
                raise bad_image("is an archive of several images, and one is wanted")
            return _names(found[0].get("Config"), found[0].get("Layers"))
        if "index.json" not in self._parts:
            raise bad_image("is no archive of a container image (manifest.json or index.json)")
        manifest = _json(self._blob(file, "index.json"))
        for _ in range(3):  # an index may name an index
            if not isinstance(manifest.get("manifests"), list):
                break
            name = _blob_name(choose_platform(manifest["manifests"]))
            manifest = _json(self._blob(file, name))
        layers = manifest.get("layers")
        if not isinstance(layers, list):
            raise bad_image("has a manifest that cannot be read")
        return _names(_blob_name(manifest.get("config")), [_blob_name(item) for item in layers])

    def _place(self, name: str) -> tuple[int, int]:
        """Offset and size of a member; old archives link layers that come twice."""
        for _ in range(_LINKS_MAX):
            found = self._parts.get(name)
            if found is None:
                break
            if isinstance(found, tuple):
                return found
            name = found
        raise bad_image(f"lacks its part {name[:100]!r}")

    def _blob(self, file: BinaryIO, name: str) -> bytes:
        offset, size = self._place(name)
        if size > CONFIG_BYTES_MAX:
            raise bad_image("has a description that is too large")
        file.seek(offset)
        return file.read(size)


class LayerReader:
    """A layer's tar, uncompressed and hashed as it is read."""

    def __init__(self, file: BinaryIO, layer: ArchiveLayer, allowance: Allowance) -> None:
        self._file, self._layer, self._left = file, layer, layer.size
        self._allowance = allowance
        self._hash, self._out, self._waiting = hashlib.sha256(), 0, b""
        file.seek(layer.offset)
        magic = file.read(4)
        file.seek(layer.offset)
        if magic[:4] == b"\x28\xb5\x2f\xfd":
            raise bad_image("has layers compressed with zstd, which is not read here; use gzip")
        self._unzip = zlib.decompressobj(_GZIP) if magic[:2] == b"\x1f\x8b" else None

    def read(self, size: int, /) -> bytes:
        """At most so many bytes of the tar."""
        found = self._file.read(min(size, self._left)) if self._unzip is None else self._more(size)
        if self._unzip is None:
            self._left -= len(found)
        self._out += len(found)
        self._allowance.take(len(found))
        self._hash.update(found)
        return found

    def finish(self) -> None:
        """Read what is left and check the hash. Raises LumarisError `bad_image`."""
        while self.read(_CHUNK_BYTES):
            pass
        if f"sha256:{self._hash.hexdigest()}" != self._layer.diff_id:
            raise bad_image("has a layer that is not what its configuration says")

    def _more(self, size: int) -> bytes:
        while True:
            assert self._unzip is not None
            if self._unzip.eof:  # of one gzip member; another may follow
                self._waiting = self._unzip.unused_data
                if not self._waiting and not self._left:
                    return b""
                self._unzip = zlib.decompressobj(_GZIP)
                self._allowance.take(_GZIP_MEMBER_COST)
            if not self._waiting:
                self._waiting = self._file.read(min(_ZIPPED_BYTES, self._left))
                self._left -= len(self._waiting)
            if not self._waiting:
                raise bad_image("has a layer that is cut off")
            try:
                found = self._unzip.decompress(self._waiting, size)
            except zlib.error as error:
                raise bad_image(f"has a damaged layer ({error})") from None
            self._waiting = self._unzip.unconsumed_tail
            read = self._layer.size - self._left
            if self._out + len(found) > _RATIO_FREE_BYTES + _RATIO_MAX * read:
                raise unsafe("unpacks to far more than it is")
            if found:
                return found


def choose_platform(manifests: object) -> dict[str, Any]:
    """Of an index's entries, the one for this machine. Raises LumarisError `bad_image`."""
    if not isinstance(manifests, list) or len(manifests) > 256:
        raise bad_image("has an index that cannot be read")
    entries = [item for item in manifests if isinstance(item, dict)]
    for item in entries:
        where = item.get("platform") or {}
        if isinstance(where, dict) and (where.get("os"), where.get("architecture")) == (
            "linux",
            architecture(),
        ):
            return item
    if len(entries) == 1 and not entries[0].get("platform"):
        return entries[0]
    raise bad_image(f"is not made for linux/{architecture()}")


def holds_image(path: Path) -> bool:
    """Whether a tar is an image's archive, and not that of a root folder.

    Raises LumarisError `unsafe_archive` for what is no tar, or OSError.
    """
    with path.open("rb") as file:
        reader = _Seeker(file)
        for member in TarReader(reader, members_max=_ROOT_MEMBERS_MAX):
            if member.kind == "file" and member.name.removeprefix("./") in _DESCRIPTIONS:
                return True
            reader.skip_to = reader.offset + member.size
    return False


def _index(file: BinaryIO) -> dict[str, tuple[int, int] | str]:
    """Offset and size of each file in the archive, or the member that it links to."""
    found: dict[str, tuple[int, int] | str] = {}
    reader = _Seeker(file)
    tar = TarReader(reader, members_max=_MEMBERS_MAX)
    for member in tar:
        name = member.name.removeprefix("./")
        if member.kind == "special":
            raise unsafe("has a device or a pipe")
        if member.kind == "folder":
            continue
        if name in found:
            raise unsafe("has a name twice")
        if member.kind == "file":
            found[name] = (reader.offset, member.size)
            reader.skip_to = reader.offset + member.size
        elif member.kind == "symlink":
            found[name] = _beside(name, member.link)
        else:
            found[name] = member.link.removeprefix("./")
    return found


class _Seeker:
    """An archive's file, in which a member's bytes are jumped over and not read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, 2)
        if self._size > IMAGE_BYTES_MAX:
            raise bad_image(f"is larger than {IMAGE_BYTES_MAX} bytes")
        self.offset = file.seek(0)
        self.skip_to = 0

    def read(self, size: int, /) -> bytes:
        """The next bytes; of a member that is skipped, zeros of the right number."""
        skipped = min(size, self.skip_to - self.offset, self._size - self.offset)
        if skipped > 0:
            self.offset += skipped
            self._file.seek(self.offset)
            return bytes(skipped)
        found = self._file.read(size)
        self.offset += len(found)
        return found


def _beside(name: str, link: str) -> str:
    """What a relative link in the archive means, as a name in it."""
    parts = name.split("/")[:-1]
    for part in link.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def _blob_name(descriptor: object) -> str:
    if not isinstance(descriptor, dict):
        raise bad_image("has a manifest that cannot be read")
    return "blobs/sha256/" + check_digest(descriptor.get("digest")).removeprefix("sha256:")


def _names(config: object, layers: object) -> list[str]:
    if not isinstance(layers, list) or len(layers) > LAYERS_MAX:
        raise bad_image(f"does not have 1 to {LAYERS_MAX} layers")
    names = [config, *layers]
    if not all(isinstance(name, str) for name in names):
        raise bad_image("has a manifest that cannot be read")
    return [str(name) for name in names]


def _environment(found: object) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, list) or len(found) > 4 * ENVIRONMENT_MAX:
        raise bad_image("has an environment that is not accepted")
    pairs = [item.partition("=") for item in found if isinstance(item, str) and "\0" not in item]
    return {name: value for name, _, value in pairs if name}


def _short(found: object) -> str:
    text = found if isinstance(found, str) else ""
    if len(text) > 1024 or "\0" in text:
        raise bad_image("has a configuration that is not accepted")
    return text


def _json(raw: bytes) -> dict[str, Any]:
    found = parse_json(raw)
    if not isinstance(found, dict):
        raise bad_image("has a description that cannot be read")
    return found


def _json_list(raw: bytes) -> list[Any]:
    found = parse_json(raw)
    if not isinstance(found, list):
        raise bad_image("has a description that cannot be read")
    return found


def parse_json(raw: bytes) -> object:
    """A stranger's JSON. Raises LumarisError `bad_image`."""
    try:
        found: object = json.loads(raw)
    except (ValueError, RecursionError):
        raise bad_image("has a description that cannot be read") from None
    return found
