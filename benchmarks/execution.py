"""Execution: what a sandbox costs to start, to compute in, to end, and what it leaves behind.

    python benchmarks/execution.py [--json] [--quick] [--only PART,PART]

Parts: process, container, wasm, deadlines, floods, overhead, simd, volumes, leftovers. Tiers are
opened as a node opens them and driven through their port; rivals do the same in the same run, in
turn with them. Bars in milliseconds are for the best of a row, ratios are within one round. Without
DOCKER_HOST an engine of its own is started, which needs root; what cannot be measured here has a
row that says so. The vm tier is left out: its parts are the machine's and the guest's kernel.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

# Started as a file, this folder is on the path and the one above is not.
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.execution_ends import measure_deadlines, measure_floods, measure_leftovers
from benchmarks.parts.execution_starts import measure_container, measure_process, measure_wasm
from benchmarks.parts.execution_work import measure_overhead, measure_simd, measure_volumes
from benchmarks.parts.execution_world import World, opened_world
from benchmarks.parts.report import Report

PARTS: dict[str, Callable[[World], Awaitable[None]]] = {
    "process": measure_process,
    "container": measure_container,
    "wasm": measure_wasm,
    "deadlines": measure_deadlines,
    "floods": measure_floods,
    "overhead": measure_overhead,
    "simd": measure_simd,
    "volumes": measure_volumes,
    "leftovers": measure_leftovers,
}
CORES = os.cpu_count() or 1
WITH_ENGINE = frozenset({"container", "deadlines", "floods", "overhead", "leftovers"})


def main() -> None:
    """Run the parts and print a table, or one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; under a minute")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - PARTS.keys():
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    logging.basicConfig(level=logging.ERROR)
    # The engine and the sandboxes end with this program, also when it is told to end.
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins without
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    measure(wanted, quick=options.quick, row=Report(as_json=options.json))


def measure(wanted: list[str], *, quick: bool, row: Report) -> None:
    """Run some parts, and report."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="lumaris-bench-") as name:
        folder, began = Path(name), time.perf_counter()
        temporary = folder / "tmp"
        temporary.mkdir(mode=0o711)
        tempfile.tempdir = str(temporary)  # what is left there is then left by us
        row("machine: processes that want one of its cores", os.getloadavg()[0], f"of {CORES}")
        try:
            engine = not WITH_ENGINE.isdisjoint(wanted)
            with opened_world(folder, row, quick=quick, engine=engine) as world:
                for part in wanted:
                    trio.run(PARTS[part], world)
        finally:
            tempfile.tempdir = before
        row("the whole run", time.perf_counter() - began, "s")
    row.finish()


if __name__ == "__main__":
    main()
