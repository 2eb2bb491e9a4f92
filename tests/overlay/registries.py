"""A real registry on loopback, and putting images into it."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from lumaris_overlay.image_archive import ImageArchive, architecture
from lumaris_protocol import ids

_CONFIG = """\
version: 0.1
log: {{level: info, formatter: text}}
storage: {{filesystem: {{rootdir: {root}}}}}
http: {{addr: "127.0.0.1:0", secret: test}}
"""
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
INDEX = "application/vnd.oci.image.index.v1+json"


@contextlib.contextmanager
def run_registry(program: str, folder: Path) -> Iterator[str]:
    """Its host and port, on a port that the system chose."""
    folder.mkdir()
    config = folder / "config.yml"
    config.write_text(_CONFIG.format(root=folder / "data"))
    with subprocess.Popen([program, "serve", config], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = None
            for line in process.stderr:  # ends when the program does
                if found := re.search(r"listening on (127\.0\.0\.1:[0-9]+)", line):
                    break
            assert found is not None, "the registry did not start"
            yield found[1]
        finally:
            process.kill()


class Pusher:
    """Puts images into a repository."""

    def __init__(self, host: str, name: str) -> None:
        self._base, self._name = f"http://{host}", name
        self._client = httpx.Client(trust_env=False, timeout=20)

    def blob(self, data: bytes) -> dict[str, Any]:
        begun = self._client.post(f"{self._base}/v2/{self._name}/blobs/uploads/")
        assert begun.status_code == 202, begun.text
        url = httpx.URL(begun.headers["location"]).copy_merge_params({"digest": ids.digest(data)})
        put = self._client.put(url, content=data)
        assert put.status_code == 201, put.text
        return {"digest": ids.digest(data), "size": len(data), "mediaType": "application/x"}

    def manifest(self, tag: str, content: dict[str, Any], kind: str) -> dict[str, Any]:
        raw = json.dumps({"schemaVersion": 2, "mediaType": kind, **content}).encode()
        put = self._client.put(
            f"{self._base}/v2/{self._name}/manifests/{tag}",
            content=raw,
            headers={"Content-Type": kind},
        )
        assert put.status_code == 201, put.text
        return {"digest": ids.digest(raw), "size": len(raw), "mediaType": kind}

    def image(self, archive: Path, tag: str, *, compress: bool = True) -> str:
        """Push an archive below an index, as public images are; the reference to the image."""
        found = ImageArchive(archive)
        layers = []
        for layer in found.layers:
            with archive.open("rb") as file:
                file.seek(layer.offset)
                data = file.read(layer.size)
            kind = "application/vnd.docker.image.rootfs.diff.tar"
            pushed = self.blob(gzip.compress(data, mtime=0) if compress else data)
            layers.append({**pushed, "mediaType": f"{kind}.gzip" if compress else kind})
        config = {
            **self.blob(found.raw_config),
            "mediaType": "application/vnd.docker.container.image.v1+json",
        }
        manifest = self.manifest(
            f"{tag}-one", {"config": config, "layers": layers}, DOCKER_MANIFEST
        )
        entry = {**manifest, "platform": {"os": "linux", "architecture": architecture()}}
        self.manifest(tag, {"manifests": [entry]}, INDEX)
        return f"{self._base.removeprefix('http://')}/{self._name}@{manifest['digest']}"

    def close(self) -> None:
        self._client.close()
