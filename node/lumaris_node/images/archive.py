"""Making an image's archive without an engine: from layers, or from the tar of a root folder.

The bytes follow from what goes in, so the same folder gives the same image everywhere. Reading
archives is `lumaris_overlay.image_archive`; both sides of the market do it.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from lumaris_overlay.image_archive import ImageArchive, architecture
from lumaris_protocol import ids

_CHUNK_BYTES = 1024 * 1024


def build_archive(target: Path, config: Mapping[str, Any], layers: Sequence[Path]) -> str:
    """Write a docker-archive of uncompressed layer tars; the image's digest. Blocks.

    `config` is a configuration of the image specification; its `rootfs` is made here.
    """
    hashes = [_hash(layer) for layer in layers]
    whole = {**config, "rootfs": {"type": "layers", "diff_ids": hashes}}
    raw = json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()
    return write_archive(target, raw, layers, hashes)


def write_archive(
    target: Path,
    config: bytes,
    layers: Sequence[Path],
    diff_ids: Sequence[str],
    *,
    check: Callable[[], object] = lambda: None,
) -> str:
    """Write a docker-archive around a configuration as it is; the image's digest. Blocks.

    `check` is called often and raises to stop the work.
    """
    digest = ids.digest(config)
    config_name = f"{digest.removeprefix('sha256:')}.json"
    names = [f"{diff_id.removeprefix('sha256:')}/layer.tar" for diff_id in diff_ids]
    manifest = [{"Config": config_name, "RepoTags": None, "Layers": names}]
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, layer in dict(zip(names, layers, strict=True)).items():
            with layer.open("rb") as file:
                tar.addfile(_member(name, layer.stat().st_size), _Checked(file, check))
        for name, raw in ((config_name, config), ("manifest.json", json.dumps(manifest).encode())):
            tar.addfile(_member(name, len(raw)), BytesIO(raw))
    return digest


def make_image(
    rootfs_tar: Path,
    target: Path,
    *,
    environment: Mapping[str, str] | None = None,
    user: str = "",
    workdir: str = "",
) -> str:
    """Make an image of one layer from the tar of a root folder; its digest. Blocks.

    Raises LumarisError `bad_image` when the engine's own readers would refuse it.
    """
    settings: dict[str, Any] = {
        "Env": [f"{name}={value}" for name, value in sorted((environment or {}).items())],
        "User": user,
        "WorkingDir": workdir,
    }
    config = {"architecture": architecture(), "os": "linux", "config": settings}
    digest = build_archive(target, config, [rootfs_tar])
    assert ImageArchive(target).digest == digest
    return digest


def pack_folder(folder: Path, target: Path) -> None:
    """Write a folder as a tar for `make_image`; owners and times are left out. Blocks."""

    def plain(item: tarfile.TarInfo) -> tarfile.TarInfo:
        item.uid = item.gid = 0
        item.uname = item.gname = ""
        item.mtime = 0
        return item

    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            tar.add(path, arcname=name, recursive=False, filter=plain)


class _Checked(BytesIO):
    """A layer's file, as `tarfile` copies it."""

    def __init__(self, file: IO[bytes], check: Callable[[], object]) -> None:
        super().__init__()
        self._file, self._check = file, check

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes of the file."""
        self._check()
        return self._file.read(-1 if size is None else size)


def _member(name: str, size: int) -> tarfile.TarInfo:
    item = tarfile.TarInfo(name)
    item.size, item.mode = size, 0o644
    return item


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
