"""Container images out of Debian packages, unpacked into a folder: no debootstrap, no engine.

apt finds and checks the packages (a whole closure, as for an empty machine), `dpkg-deb` unpacks
them, and the few links that their scripts would have made are made here. The folder is what the
bare runs use, so the bare program and the sold one are the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lumaris_node.images.archive import make_image, pack_folder

LIBRARIES = f"usr/lib/{platform.machine()}-linux-gnu"
PATH = "/usr/bin:/bin"
_DOWNLOAD_S, _UNPACK_S = 300, 120
# Nothing here is read by a program that runs: documents, compilers' halves, graphics drivers.
_LEFT_OUT = (
    "./usr/share/doc",
    "./usr/share/man",
    "./usr/share/locale",
    "./usr/include",
    "./usr/lib/gcc",
    "./usr/bin/*-linux-gnu-*",
    "./usr/lib/*/dri",
    "./usr/lib/*/libLLVM*",
    "*.a",
)
_MERGED = ("bin", "sbin", "lib", "lib64")
_EMPTY = ("in", "out", "tmp", "dev", "proc", "etc")


class UnavailableError(Exception):
    """What the workloads need and this machine lacks."""


@dataclass(frozen=True)
class Recipe:
    """An image: its packages, the links their scripts would make, folders of Python to compile."""

    name: str
    packages: tuple[str, ...]
    links: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    python: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """An image as a root folder and as an archive; sizes in bytes."""

    digest: str
    root: Path
    archive: Path
    download_bytes: int
    archive_bytes: int
    packages: int


MEDIA = Recipe(
    "media",
    ("ffmpeg", "imagemagick", "xz-utils", "openssl", "coreutils", "dash"),
    {
        f"{LIBRARIES}/libblas.so.3": "blas/libblas.so.3",
        f"{LIBRARIES}/liblapack.so.3": "lapack/liblapack.so.3",
        "usr/bin/convert": "convert-im6.q16",
    },
    {"PATH": PATH},
)
SCIENCE = Recipe(
    "science",
    ("python3-sklearn", "libopenblas0-pthread", "coreutils", "dash"),
    {
        f"{LIBRARIES}/{name}": f"openblas-pthread/{name}"
        for name in ("libblas.so.3", "liblapack.so.3", "libopenblas.so.0")
    },
    {"PATH": PATH, "OPENBLAS_NUM_THREADS": "1"},
    (
        "usr/lib/python3.11",
        *(
            f"usr/lib/python3/dist-packages/{name}"
            for name in ("numpy", "scipy", "sklearn", "joblib")
        ),
    ),
)
TOOLS = Recipe("tools", ("xz-utils", "coreutils", "dash"), environment={"PATH": PATH})


def build(recipe: Recipe, work: Path) -> Built:
    """The image of a recipe, made or found in `work`. Raises UnavailableError."""
    check()
    folder, key = work / recipe.name, _key(recipe)
    note = folder / "built.json"
    if note.exists() and (found := json.loads(note.read_text())).pop("key") == key:
        return Built(**{**found, "root": Path(found["root"]), "archive": Path(found["archive"])})
    shutil.rmtree(folder, ignore_errors=True)
    root, archive = folder / "root", folder / f"{recipe.name}.tar"
    packages = _download(recipe, folder)
    _unpack(recipe, packages, root)
    tar = folder / "root.tar"
    pack_folder(root, tar)
    digest = make_image(tar, archive, environment=recipe.environment)
    tar.unlink()
    # Programs open it; a tier has its own, and an image cannot hold one.
    os.mknod(root / "dev/null", 0o20666, os.makedev(1, 3))
    built = Built(
        digest,
        root,
        archive,
        sum(file.stat().st_size for file in packages),
        archive.stat().st_size,
        len(packages),
    )
    note.write_text(json.dumps({"key": key, **asdict(built)}, default=str))
    return built


def check() -> None:
    """Raises UnavailableError when images cannot be made or run bare here."""
    for program in ("apt-get", "dpkg-deb", "chroot"):
        if shutil.which(program) is None:
            raise UnavailableError(f"needs {program} (a Debian machine)")
    if os.geteuid() != 0:
        raise UnavailableError("needs root: the bare runs use chroot")


def _download(recipe: Recipe, folder: Path) -> list[Path]:
    """The packages and all they depend on, as apt would install them on an empty machine."""
    target = folder / "packages"
    (target / "partial").mkdir(parents=True)
    (folder / "status").touch()
    settings = {
        "Dir::State::status": folder / "status",
        "Dir::Cache::archives": f"{target}/",
        "Debug::NoLocking": 1,  # other users of this machine's apt go on
        "APT::Sandbox::User": "root",
        "APT::Install-Recommends": 0,
    }
    words = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    ended = subprocess.run(
        ["apt-get", *words, "-qq", "-y", "-d", "install", *recipe.packages],
        capture_output=True,
        text=True,
        timeout=_DOWNLOAD_S,
        check=False,
    )
    if ended.returncode != 0:
        last = (ended.stderr.strip() or ended.stdout.strip()).splitlines()[-1:]
        raise UnavailableError(f"apt-get cannot download {recipe.name}: {' '.join(last)}")
    return sorted(target.glob("*.deb"))


def _unpack(recipe: Recipe, packages: list[Path], root: Path) -> None:
    for name in _MERGED:
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(f"usr/{name}")
    left_out = [f"--exclude={pattern}" for pattern in _LEFT_OUT]
    for package in packages:
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE
        ) as reader:
            subprocess.run(
                ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", root, *left_out],
                stdin=reader.stdout,
                timeout=_UNPACK_S,
                check=True,
            )
        assert reader.returncode == 0, package
    for name in _EMPTY:
        (root / name).mkdir(exist_ok=True)
    for link, target in recipe.links.items():
        (root / link).symlink_to(target)
    if recipe.python:  # what the packages' own scripts do; by hash, since images carry no times
        mode = ("--invalidation-mode", "unchecked-hash")
        subprocess.run(
            ["chroot", root, "python3", "-m", "compileall", "-q", *mode, *recipe.python],
            timeout=_UNPACK_S,
            check=True,
        )


def _key(recipe: Recipe) -> str:
    seen = json.dumps([asdict(recipe), _LEFT_OUT], sort_keys=True)
    return hashlib.sha256(seen.encode()).hexdigest()
