"""What may be offered: the least of machine, cgroup and the owner's share; and its speed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path

from lumaris_protocol.messages.advert import Gpu, Resources

BENCHMARK_FILE = "benchmarks.json"
BENCHMARK_S = 0.1  # for each number
SHA256_BLOCK_BYTES = 1024 * 1024
FUEL_SLICE = 20_000_000
# cgroup v1 writes a number near 2**63 for "no limit".
UNLIMITED_BYTES = 1 << 60
# i counts up; each round is a handful of instructions, as metered.
FUEL_GUEST = """(module (func (export "spin") (local i32)
 (loop (local.set 0 (i32.add (local.get 0) (i32.const 1))) (br 0))))"""


def total_resources(
    state: Path,
    *,
    cpu_millis_share: int | None = None,
    memory_bytes_share: int | None = None,
    disk_bytes_share: int | None = None,
    gpus: tuple[Gpu, ...] = (),
    cgroup_root: Path = Path("/sys/fs/cgroup"),
) -> Resources:
    """What this node may offer. Shares are the owner's upper bounds; None means all there is."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = [(cores or 1) * 1000, _cgroup_cpu_millis(cgroup_root), cpu_millis_share]
    memory = [psutil.virtual_memory().total, _cgroup_memory(cgroup_root), memory_bytes_share]
    disk = [shutil.disk_usage(state).free, disk_bytes_share]
    return Resources(
        cpu_millis=_least(cpu), memory_bytes=_least(memory), disk_bytes=_least(disk), gpus=gpus
    )


def benchmarks(state: Path) -> dict[str, int]:
    """Measured speed, kept in `state` until the next boot or version. Blocks up to 0.3 s."""
    key = f"{metadata.version('lumaris')} {_boot()}"
    file = state / BENCHMARK_FILE
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return {str(name): int(value) for name, value in kept["values"].items()}
    values = {"sha256_mb_s": _sha256_mb_s()}
    fuel = _wasm_fuel_s()
    if fuel:
        values["wasm_mfuel_s"] = fuel // 1_000_000
    handle, name = tempfile.mkstemp(dir=state)
    with os.fdopen(handle, "w", encoding="utf-8") as writer:
        json.dump({"key": key, "values": values}, writer)
    Path(name).replace(file)
    return values


def _least(bounds: list[int | None]) -> int:
    return max(0, min(bound for bound in bounds if bound is not None))


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        import psutil

        return str(int(psutil.boot_time()))


def _own_cgroups() -> dict[str, str]:
    """Controller to path of this process; the empty name is v2's."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                found[controller] = path.lstrip("/")
    return found


def _folders(root: Path, controller: str) -> list[Path]:
    """Where limits of this process may stand: its own group, its parents, the root."""
    own = _own_cgroups()
    bases = [(root / controller, own.get(controller, "")), (root, own.get("", ""))]
    folders: list[Path] = []
    for base, path in bases:
        inner = base / path
        folders += [inner, *(parent for parent in inner.parents if parent.is_relative_to(base))]
    return folders


def _numbers(file: Path) -> list[int]:
    try:
        words = file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []
    return [int(word) if word.lstrip("-").isdigit() else -1 for word in words]


def _cgroup_memory(root: Path) -> int | None:
    found: list[int | None] = []
    for folder in _folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            found += [n for n in _numbers(folder / name) if 0 < n < UNLIMITED_BYTES]
    return _least(found) if found else None


def _cgroup_cpu_millis(root: Path) -> int | None:
    found: list[int | None] = []
    for folder in _folders(root, "cpu"):
        v2 = _numbers(folder / "cpu.max")
        v1 = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        found.extend(
            quota[0] * 1000 // quota[1]
            for quota in (v2, v1)
            if len(quota) == 2 and quota[0] > 0 and quota[1] > 0
        )
    return _least(found) if found else None


def _sha256_mb_s() -> int:
    block, blocks = bytes(SHA256_BLOCK_BYTES), 0
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < BENCHMARK_S:
        hashlib.sha256(block).digest()
        blocks += 1
    return int(blocks * SHA256_BLOCK_BYTES / spent / 1_000_000)


def _wasm_fuel_s() -> int:
    """Fuel a second of one thread, 0 without wasmtime. The guest is ours, so it runs in here."""
    try:
        import wasmtime
    except ImportError:
        return 0
    config = wasmtime.Config()
    config.consume_fuel = True
    store = wasmtime.Store(wasmtime.Engine(config))
    module = wasmtime.Module(store.engine, FUEL_GUEST)
    spin = wasmtime.Instance(store, module, []).exports(store)["spin"]
    assert isinstance(spin, wasmtime.Func)
    used = 0
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < BENCHMARK_S:
        store.set_fuel(FUEL_SLICE)
        with contextlib.suppress(wasmtime.Trap):
            spin(store)
        used += FUEL_SLICE
    return int(used / spent)
