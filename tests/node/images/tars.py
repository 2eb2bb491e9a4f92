"""Archives for tests, honest and hostile."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path

from lumaris_node.images.archive import build_archive
from lumaris_overlay.image_archive import architecture

CONFIG = {"architecture": architecture(), "os": "linux", "config": {}}


def file(name: str, data: bytes = b"", mode: int = 0o644) -> tuple[tarfile.TarInfo, bytes]:
    item = tarfile.TarInfo(name)
    item.size, item.mode = len(data), mode
    return item, data


def other(name: str, kind: bytes, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    item = tarfile.TarInfo(name)
    item.type, item.linkname, item.mode = kind, link, 0o755
    return item, b""


def folder(name: str) -> tuple[tarfile.TarInfo, bytes]:
    return other(name, tarfile.DIRTYPE)


def symlink(name: str, to: str) -> tuple[tarfile.TarInfo, bytes]:
    return other(name, tarfile.SYMTYPE, to)


def hardlink(name: str, to: str) -> tuple[tarfile.TarInfo, bytes]:
    return other(name, tarfile.LNKTYPE, to)


def pack(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for item, data in members:
            tar.addfile(item, BytesIO(data))
    return out.getvalue()


def image(at: Path, *layers: bytes, **settings: object) -> tuple[Path, str]:
    """A docker-archive of these layers, and the image's digest."""
    paths = []
    for number, layer in enumerate(layers):
        paths.append(at / f"layer{number}.tar")
        paths[-1].write_bytes(layer)
    target = at / "image.tar"
    return target, build_archive(target, {**CONFIG, **settings}, paths)


def raw_image(at: Path, config: bytes, *layers: bytes) -> Path:
    """An archive around any configuration at all."""
    members = [file(f"{number}/layer.tar", layer) for number, layer in enumerate(layers)]
    names = [item.name for item, _ in members]
    manifest = json.dumps([{"Config": "c.json", "Layers": names}]).encode()
    target = at / "raw.tar"
    target.write_bytes(pack(*members, file("c.json", config), file("manifest.json", manifest)))
    return target
