"""Runs a script in a compiled interpreter: `MODULES DIGEST FOLDER SCRIPT`, and nothing around it.

The folder's in/ and out/ are the guest's; took.json gets the run's seconds, by the clock and of the
processor. Settings are a node's, since its code is loaded.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import wasmtime

from lumaris_node.executors.wasm.engine import engine_key
from lumaris_node.executors.wasm.guest import Guests
from lumaris_node.executors.wasm.modules import ModuleStore
from lumaris_protocol.limits import GIB

FUEL = 1 << 50


def main() -> None:
    """Run it; its exit status is ours."""
    modules, digest, folder, script = sys.argv[1:]
    store, guests = ModuleStore(Path(modules)), Guests()
    code = store.directory / f"{digest.removeprefix('sha256:')}-{engine_key()}.cwasm"
    wasi = wasmtime.WasiConfig()
    wasi.argv = ["python", f"/in/{script}"]
    wasi.env = [("PYTHONHASHSEED", "0")]
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    for name in ("in", "out"):
        wasi.preopen_dir(str(Path(folder, name)), f"/{name}")
    for guest, path in store.companions(digest):
        wasi.preopen_dir(str(path), guest)
    with code.open("rb") as file:
        module = guests.load(digest, file.fileno())
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    facts = guests.run(module, wasi, {"memory_bytes": GIB, "fuel": FUEL, "seed": "bare"})
    took = [time.perf_counter() - wall_s, time.process_time() - cpu_s]
    Path(folder, "took.json").write_text(json.dumps(took))
    if "trap" in facts:
        raise SystemExit(f"{facts['trap']}: {facts.get('detail')}")
    raise SystemExit(facts.get("exit", 0))


if __name__ == "__main__":
    main()
