"""The image that the attack program runs in: an interpreter, the program, and a marker.

This process's own interpreter is copied, with the modules and libraries that the program loads and
nothing else, so that a tier is tested without a network and without folders of the host in it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lumaris_node.images.archive import make_image, pack_folder
from lumaris_node.selftest import attack
from lumaris_protocol.errors import LumarisError

HOME = "lumaris"
# Everywhere one program: its command begins so.
COMMAND = (f"/{HOME}/bin/python", "-I", "-S", "-B", f"/{HOME}/attack.py")
ENVIRONMENT = {"LD_LIBRARY_PATH": f"/{HOME}/lib"}
FOLDERS = ("in", "out", "tmp", "proc", "dev", "sys", "etc", "run", "var", "root", "home")
_LIST_S_MAX = 20
# Loads what the program loads, then says which files that took.
_LIST = """
import json, sys, runpy, encodings.ascii, encodings.idna, encodings.latin_1, os
runpy.run_path(sys.argv[1], run_name="listed")
names = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
with open("/proc/self/maps") as maps:
    code = [line.split()[-1] for line in maps if "r-xp" in line]
real = os.path.realpath
print(json.dumps([sorted({real(name) for name in names if name}),
                  sorted({real(name) for name in code if name.startswith("/")})]))
"""


@dataclass(frozen=True)
class GuestImage:
    """An archive for `Executor.add_image`, its digest, and the nonce of its marker file."""

    archive: Path
    digest: str
    nonce: str


def build(folder: Path) -> GuestImage:
    """Write the archive into `folder`, with a nonce of its own. Blocks about a second.

    Raises LumarisError `platform_error` where the interpreter cannot be copied.
    """
    nonce = os.urandom(32).hex()
    target = folder / "guest.tar"
    try:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            root = Path(made, "root")
            _fill(root, nonce)
            packed = Path(made, "root.tar")
            pack_folder(root, packed)
            image = make_image(packed, target)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        why = f"The self-test cannot copy its interpreter: {error}"
        raise LumarisError("platform_error", why) from error
    return GuestImage(target, image, nonce)


def _fill(root: Path, nonce: str) -> None:
    program = Path(attack.__file__)
    modules, mapped = _listed(program)
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    python = Path(sys.executable).resolve()
    for name in FOLDERS:
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    _copy(python, root / COMMAND[0][1:], 0o755)
    _copy(program, root / COMMAND[-1][1:])
    (root / attack.MARKER[1:]).write_text(nonce, encoding="ascii")
    for file in modules:
        if file.is_relative_to(stdlib):
            _copy(file, root / HOME / "lib" / stdlib.name / file.relative_to(stdlib))
    for file in mapped:
        if file.is_relative_to(stdlib):
            _copy(file, root / HOME / "lib" / stdlib.name / file.relative_to(stdlib))
        elif file != python:
            for name in _names(file):
                _copy(file, root / HOME / "lib" / name, 0o755)
    loader = _loader(python)
    _copy(Path(loader).resolve(), root / loader[1:], 0o755)
    for path in root.rglob("*"):
        if path.is_dir() and path != root / "tmp":
            path.chmod(0o755)  # whatever this process's mask is
    root.chmod(0o755)


def _listed(program: Path) -> tuple[list[Path], list[Path]]:
    """Modules that the program imports, and files that are mapped as code meanwhile."""
    command = [sys.executable, "-I", "-S", "-B", "-c", _LIST, str(program)]
    said = subprocess.run(command, capture_output=True, check=True, timeout=_LIST_S_MAX).stdout
    modules, mapped = json.loads(said)
    return [Path(name) for name in modules], [Path(name) for name in mapped]


def _names(library: Path) -> list[str]:
    """What a library is loaded by: a versioned link beside it, or its own name."""
    stem = library.name.split(".so")[0]
    links = [
        entry.name
        for entry in library.parent.glob(f"{stem}.so.*")
        if entry.is_symlink() and entry.resolve() == library
    ]
    return sorted({*links, library.name})


def _loader(python: Path) -> str:
    """The dynamic loader that the interpreter names in its first page."""
    with python.open("rb") as file:
        found = re.search(rb"/[\w./-]*/ld-[\w.-]+\.so\.\d+", file.read(4096))
    if found is None:
        raise ValueError("it names no dynamic loader")
    return found.group().decode()


def _copy(source: Path, target: Path, mode: int = 0o644) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)
