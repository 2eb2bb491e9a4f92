"""What a wasm guest is and sees: engine settings, the module check, and the deterministic clock.

Imported by the zygote, so it may import nothing heavier than wasmtime. Settings are part of the
name of a compiled module (`engine_key`): code compiled under others is refused by wasmtime.
"""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path

import wasmtime

from lumaris_node.executors.wasm.memory import GuestMemory

# Raise it with any change of `make_engine` or of what is compiled, so that modules compiled before
# are compiled anew.
SETTINGS_VERSION = 3
WASM_STACK_BYTES_MAX = (
    1024 * 1024
)  # CPython recurses to its own limit within it; the C stack has 8 MiB
WASI = "wasi_snapshot_preview1"
# Guests start at 2024-01-01T00:00:00Z: late enough that no certificate or date library balks.
EPOCH_NS = 1_704_067_200 * 10**9
RANDOM_BLOCK_BYTES = 64 * 1024
ERRNO_INVAL = 28
HOST_CALL, NO_HOST = ("host", "call"), -1


def make_engine(memory: GuestMemory) -> wasmtime.Engine:
    """The engine of every guest: fuel is always counted, results do not depend on the host.

    `memory` must live as long as the engine.
    """
    config = wasmtime.Config()
    config.consume_fuel = True
    config.max_wasm_stack = WASM_STACK_BYTES_MAX
    config.wasm_threads = False
    config.wasm_relaxed_simd_deterministic = True
    memory.serve(config)
    return wasmtime.Engine(config)


def version() -> str:
    """The installed wasmtime's version."""
    return metadata.version("wasmtime")


def engine_key() -> str:
    """Names the compiler, its settings and this processor, in a compiled module's file name."""
    try:
        flags = next(
            line
            for line in Path("/proc/cpuinfo")
            .read_text(encoding="ascii", errors="replace")
            .split("\n")
            if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        flags = platform.processor()
    seen = f"{version()} {SETTINGS_VERSION} {platform.machine()} {flags}"
    return hashlib.sha256(seen.encode()).hexdigest()[:16]


def check_module(module: wasmtime.Module) -> str:
    """Why the module cannot be run here, or an empty text."""
    for imported in module.imports:
        if imported.module != WASI and (imported.module, imported.name) != HOST_CALL:
            return f"it imports {imported.module[:64]!r}; only {WASI} is offered"
    if entry_of(module):
        return ""
    return "it exports neither a _start without arguments and results nor _initialize and run"


def entry_of(module: wasmtime.Module) -> tuple[str, ...]:
    """The exports to call in order: of a command, or of an interpreter made to be embedded.

    The second kind has `_initialize`, and a `run` that takes its arguments as a command does and
    returns an exit status. Empty for a module of neither kind.
    """
    functions = {
        exported.name: ([str(p) for p in kind.params], [str(r) for r in kind.results])
        for exported in module.exports
        if isinstance(kind := exported.type, wasmtime.FuncType)
    }
    if functions.get("_start") == ([], []):
        return ("_start",)
    if functions.get("_initialize") == ([], []) and functions.get("run") == ([], ["i32"]):
        return ("_initialize", "run")
    return ()


def offer_no_host(linker: wasmtime.Linker) -> None:
    """Answer the call by which an embedded interpreter asks its host: there is none."""
    i32 = wasmtime.ValType.i32()
    kind = wasmtime.FuncType([i32] * 4, [i32])
    linker.define_func(*HOST_CALL, kind, lambda *_: NO_HOST)


class Determinism:
    """A clock driven by fuel and randomness drawn from a seed: the same run twice is the same.

    One unit of fuel is a nanosecond, so loops that wait for a time to come do end. Sleeping takes
    real time and moves this clock by nothing.
    """

    def __init__(self) -> None:
        self._seed = b""
        self._blocks = 0
        self._fuel = 0
        self._store: wasmtime.Store | None = None
        self._readings = 0

    def bind(self, store: wasmtime.Store, *, fuel: int, seed: bytes) -> None:
        """Start from the beginning, with the store whose fuel drives the clock."""
        self._store, self._fuel, self._seed = store, fuel, seed
        self._blocks = self._readings = 0

    def unbind(self) -> None:
        """Let go of the store."""
        self._store = None

    def define(self, linker: wasmtime.Linker) -> None:
        """Replace the linker's clock and randomness."""
        i32, i64 = wasmtime.ValType.i32(), wasmtime.ValType.i64()
        linker.allow_shadowing = True
        linker.define_func(
            WASI,
            "clock_time_get",
            wasmtime.FuncType([i32, i64, i32], [i32]),
            self._clock_time_get,
            access_caller=True,
        )
        linker.define_func(
            WASI,
            "random_get",
            wasmtime.FuncType([i32, i32], [i32]),
            self._random_get,
            access_caller=True,
        )

    def _clock_time_get(
        self, caller: wasmtime.Caller, clock: int, _precision: int, address: int
    ) -> int:
        memory = caller["memory"]
        if self._store is None or not isinstance(memory, wasmtime.Memory):
            return ERRNO_INVAL
        self._readings += 1  # two readings in a row differ, as on a real machine
        elapsed = self._fuel - self._store.get_fuel() + self._readings
        now = elapsed if clock != 0 else EPOCH_NS + elapsed
        memory.write(caller, now.to_bytes(8, "little"), address & 0xFFFFFFFF)
        return 0

    def _random_get(self, caller: wasmtime.Caller, address: int, length: int) -> int:
        memory = caller["memory"]
        if not isinstance(memory, wasmtime.Memory):
            return ERRNO_INVAL
        start, end = address & 0xFFFFFFFF, (address & 0xFFFFFFFF) + (length & 0xFFFFFFFF)
        if end > memory.data_len(caller):
            return ERRNO_INVAL
        for offset in range(start, end, RANDOM_BLOCK_BYTES):
            self._blocks += 1
            block = self._seed + self._blocks.to_bytes(8, "big")
            size = min(RANDOM_BLOCK_BYTES, end - offset)
            memory.write(caller, hashlib.shake_256(block).digest(size), offset)
        return 0
