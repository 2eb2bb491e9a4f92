"""The same programs without a market: in the image's root folder, and in a bare wasm runtime."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_CHROOT = shutil.which("chroot") or "chroot"


@dataclass(frozen=True)
class Ended:
    """How a bare run went; seconds."""

    wall_s: float
    cpu_s: float
    stdout: bytes
    outputs: Mapping[str, Path] = field(default_factory=dict)


def run_chroot(
    root: Path, command: tuple[str, ...], inputs: Mapping[str, Path], environment: Mapping[str, str]
) -> Ended:
    """Run a program of a root folder as root, with no limit and no sandbox. Blocks.

    `outputs` are the files that it left in /out, until the next run in the same folder.
    """
    _lay_out(root, inputs)
    ended = _timed([_CHROOT, str(root), *command], environment)
    outputs = {path.name: path for path in (root / "out").iterdir()}
    return Ended(ended.wall_s, ended.cpu_s, ended.stdout, outputs)


def run_wasm(modules: Path, digest: str, folder: Path, script: Path) -> Ended:
    """Run a script in an interpreter that a node compiled into `modules`, in a plain process.

    There is only the wasm runtime, with a node's settings; its own start is not counted. Blocks.
    """
    _lay_out(folder, {script.name: script})
    program = Path(__file__).with_name("workload_wasm.py")
    words = [sys.executable, str(program), str(modules), digest, str(folder), script.name]
    ended = _timed(words, os.environ)
    outputs = {path.name: path for path in (folder / "out").iterdir()}
    wall_s, cpu_s = json.loads((folder / "took.json").read_text())
    return Ended(wall_s, cpu_s, ended.stdout, outputs)


def _lay_out(root: Path, inputs: Mapping[str, Path]) -> None:
    for name in ("in", "out"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir(parents=True)
    for name, source in inputs.items():
        shutil.copyfile(source, root / "in" / name)


def _timed(words: list[str], environment: Mapping[str, str]) -> Ended:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=dict(environment)
        )
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            raise RuntimeError(f"{words} ended with {process.returncode}: {errors.read()[-500:]!r}")
        out.seek(0)
        return Ended(wall_s, used.ru_utime + used.ru_stime, out.read())
