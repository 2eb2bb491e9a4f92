"""How fast this machine is, as a vector of numbers that come out the same again.

Each number is the best of many short slices, measured in the processor time that a slice got: what
others run meanwhile takes slices away and does not slow those that are left. Disk and memory
bandwidth are not in it: others' use of them is seen by every slice, and they came out 10 % apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from lumaris_node.capability.probe import boot_id
from lumaris_overlay.private_files import write_private_file
from lumaris_protocol import canary

FILE = "benchmarks.json"
_LOCK = "benchmarks.lock"
# What a virtual machine with two threads of an AMD EPYC of 2023 does: its index is 100 throughout.
REFERENCE = {
    "sha256_all_mb_s": 3_360,
    "sha256_mb_s": 1_700,
    "wasm_all_mfuel_s": 39_500,
    "wasm_mfuel_s": 20_000,
}
# Enough slices that some are undisturbed; the deadline holds where the machine is not ours.
_SLICES = 24
_SLICE_S = 0.012
_NUMBER_S_MAX = 0.5
_SHA256_BLOCK = bytes(1024 * 1024)
_ROUNDS = 200_000
_THREADS_MAX = 64
_FUEL = 1 << 60

# Does a piece of work and says how many units it was.
Work = Callable[[], int]


def benchmarks(folder: Path, cpu_millis: int | None = None) -> dict[str, int]:
    """Measured speed, kept in `folder` until the next boot, version or share. Blocks up to 3 s.

    `cpu_millis` is what is offered: the numbers of all cores are of that much, and of one core at
    most of one. Nodes that share the folder take turns, and all but the first read.
    """
    with (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        values = kept(folder, cpu_millis)
        if values is None:
            values = measure(_offered(cpu_millis))
            text = json.dumps({"key": _key(cpu_millis), "values": values})
            write_private_file(folder / FILE, text.encode())
    return values


def kept(folder: Path, cpu_millis: int | None = None) -> dict[str, int] | None:
    """What an earlier measurement of the same machine and share found, if there was one."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if found["key"] == _key(cpu_millis):
            return {str(name): int(value) for name, value in found["values"].items()}
    return None


def _offered(cpu_millis: int | None) -> int:
    return cpu_millis or 1000 * (os.cpu_count() or 1)


def _key(cpu_millis: int | None) -> str:
    return f"{metadata.version('lumaris')} {boot_id()} {_offered(cpu_millis)}"


def measure(cpu_millis: int) -> dict[str, int]:
    """The vector for so much of this machine, measured now. Blocks up to 3 s."""
    threads = max(1, min(-(-cpu_millis // 1000), os.cpu_count() or 1, _THREADS_MAX))
    share = min(1.0, cpu_millis / (threads * 1000))
    rates = {
        "sha256_all_mb_s": _rate(_hashing, threads) * share,
        "sha256_mb_s": _rate(_hashing, 1) * min(1.0, cpu_millis / 1000),
    }
    with contextlib.suppress(ImportError):  # then there is no such tier either
        rates["wasm_all_mfuel_s"] = _rate(_computing, threads) * share
        rates["wasm_mfuel_s"] = _rate(_computing, 1) * min(1.0, cpu_millis / 1000)
    return {name: int(rate / 1_000_000) for name, rate in rates.items()}


def index(values: dict[str, int]) -> dict[str, int]:
    """The vector against the reference machine, whose numbers are 100."""
    return {name: values[name] * 100 // REFERENCE[name] for name in REFERENCE if name in values}


def _rate(make: Callable[[], Work], threads: int) -> float:
    """Units a second of processor time, summed over threads that run at the same time."""
    found = [0.0] * threads
    works = [make() for _ in range(threads)]
    together = threading.Barrier(threads)

    def run(at: int) -> None:
        together.wait(timeout=_NUMBER_S_MAX * 10)
        found[at] = _best(works[at])

    crew = [threading.Thread(target=run, args=(at,)) for at in range(1, threads)]
    for thread in crew:
        thread.start()
    run(0)
    for thread in crew:
        thread.join()
    return sum(found)


def _best(work: Work) -> float:
    """The best slice's units a second of this thread's time."""
    work()  # the first one fills caches
    best, deadline = 0.0, time.monotonic() + _NUMBER_S_MAX
    for _ in range(_SLICES):
        units, began = 0, time.thread_time()
        while (spent := time.thread_time() - began) < _SLICE_S:
            units += work()
        best = max(best, units / spent)
        if time.monotonic() > deadline:
            break
    return best


def _hashing() -> Work:
    def work() -> int:
        hashlib.sha256(_SHA256_BLOCK).digest()
        return len(_SHA256_BLOCK)

    return work


def _computing() -> Work:
    """The canary guest on this thread. It is ours, so it runs in this process."""
    import wasmtime

    config = wasmtime.Config()
    config.consume_fuel = True
    engine = wasmtime.Engine(config)
    store = wasmtime.Store(engine)
    store.set_wasi(wasmtime.WasiConfig())
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    guest = linker.instantiate(store, wasmtime.Module(engine, canary.guest_text()))
    turn = guest.exports(store)["turn"]
    assert isinstance(turn, wasmtime.Func)
    store.set_fuel(_FUEL)

    def work() -> int:
        turn(store, _ROUNDS)
        return _ROUNDS * canary.FUEL_PER_ROUND

    return work
