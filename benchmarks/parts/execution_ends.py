"""How a run ends: deadlines that are ignored, floods of output, and what a hundred kills leave."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import trio

from benchmarks.parts.execution_starts import add_module
from benchmarks.parts.execution_world import LIMITS, World, discard, run
from lumaris_node.executors.port import Executor, JobSpec
from lumaris_node.workspace import LeaseWorkspace, Volumes, volume_bounds
from lumaris_protocol.messages.advert import Tier

STUBBORN = ("/bin/sh", "-c", "trap '' TERM; while :; do :; done")
# Orphans in sessions of their own, which ignore what asks them to end.
ORPHANS = (
    *("/bin/sh", "-c"),
    "trap '' TERM HUP; (setsid sh -c 'trap \"\" TERM HUP; sleep 600' &); while :; do :; done",
)
FLOOD = ("/bin/yes", "x" * 78)
SPIN = '(module (memory (export "memory") 1) (func (export "_start") (loop (br 0))))'
DEADLINE_S = 0.3
LEASE_JOBS = 10
GUESTS: dict[Tier, tuple[str, ...]] = {
    "process": ORPHANS,
    "container": ORPHANS,
    "wasm": ("x",),
}


async def measure_deadlines(world: World) -> None:
    """From a deadline until the run is over and nothing of it lives; SIGTERM does nothing."""
    for tier in ("process", "container"):
        async with world.executor(tier) as executor:
            if executor is None:
                continue
            late = [await _late(world, executor) for _ in world.rounds(8, 3)]
        middle = statistics.median(late)
        world.row(f"{tier}: deadline to reaped p50", middle, "ms", "<= 500", middle <= 500)
        world.row(f"{tier}: deadline to reaped worst", max(late), "ms")


async def _late(world: World, executor: Executor) -> float:
    handle = await executor.prepare(world.spec(world.image, STUBBORN, wall_s=DEADLINE_S))
    try:
        began = time.perf_counter()
        await executor.start(handle, discard)
        outcome = await executor.wait(handle)
        late = time.perf_counter() - began - DEADLINE_S
        if outcome.reason != "killed_deadline" or world.survivors():
            raise RuntimeError(f"{executor.tier}: {outcome}, {world.survivors()} live")
    finally:
        await executor.destroy(handle)
    return 1e3 * late


async def measure_floods(world: World) -> None:
    """Processor time of node and engine while a guest prints as fast as it can, to the log's cap.

    The log goes nowhere: what the node's own log file costs is not in it.
    """
    for tier in ("process", "container"):
        async with world.executor(tier) as executor:
            if executor is None:
                continue
            handle = await executor.prepare(world.spec(world.image, FLOOD))
            try:
                engine = world.engine_processes() if tier == "container" else []
                began, node, theirs = time.perf_counter(), time.process_time(), _cpu_s(engine)
                await executor.start(handle, discard)
                outcome = await executor.wait(handle)
                node, theirs = time.process_time() - node, _cpu_s(engine) - theirs
                elapsed = time.perf_counter() - began
            finally:
                await executor.destroy(handle)
        if outcome.reason != "killed_log":
            raise RuntimeError(f"{tier}: {outcome}")
        row = world.row
        row(f"{tier}: flood until killed at the log's cap", elapsed, "s")
        row(f"{tier}: node's processor time for it", 1e3 * node, "ms")
        if tier == "container":
            share = 100 * node / elapsed
            row("container: node's share of a core", share, "%", "<= 10", share <= 10)
            share = 100 * theirs / elapsed
            row("container: engine's share of a core", share, "%", "<= 10", share <= 10)


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


async def measure_leftovers(world: World) -> None:
    """What is on the machine after many killed orders, in encrypted volumes, that was not before.

    Orders end by a cancel, by their deadline, and by being destroyed while they run.
    """
    for tier, command in GUESTS.items():
        looked = Leftovers(world)
        before = looked.counts()
        count, began = len(world.rounds(100, 20)), time.perf_counter()
        async with world.executor(tier) as executor:
            if executor is None:
                continue
            image = await add_module(world, executor, SPIN) if tier == "wasm" else world.image
            spec = world.spec(image, command, wall_s=60)
            await executor.destroy(await executor.prepare(spec))
            stay = looked.files()  # a module, and the native code made of it
            for number in range(0, count, LEASE_JOBS):
                await _kill_lease(world, executor, spec, min(LEASE_JOBS, count - number))
                looked.note_containers()
            looked.made |= looked.files() - stay
        elapsed = time.perf_counter() - began
        found = {name: value - before[name] for name, value in looked.counts().items()}
        for name, value in found.items():
            if tier == "container" or name not in ("containers", "shims"):
                world.row(f"{tier}: {name} left by {count} kills", value, "", "0", value == 0)
        world.row(f"{tier}: one killed order, its share of a volume", 1e3 * elapsed / count, "ms")


async def _kill_lease(world: World, executor: Executor, spec: JobSpec, count: int) -> None:
    """Some orders of one lease, in a volume of its own."""
    volumes = await trio.to_thread.run_sync(Volumes.open, world.folder / "sessions")
    size, files = volume_bounds(LIMITS.disk_bytes)
    lease = world.lease()
    workspace = LeaseWorkspace(volumes.volume(lease, bytes_max=size, files_max=files))
    await trio.to_thread.run_sync(workspace.open)
    try:
        for number in range(count):
            await trio.to_thread.run_sync(workspace.begin)
            workspace.mark()
            one = world.spec(spec.image, spec.command)
            one = replace(
                one,
                lease=lease,
                inputs=workspace.inputs,
                outputs=workspace.outputs,
                disk_use=workspace.disk_use,
            )
            await _kill(executor, one, number)
    finally:
        await executor.release(lease)
        await trio.to_thread.run_sync(workspace.close)


async def _kill(executor: Executor, spec: JobSpec, number: int) -> None:
    if number % 3 == 1:
        bounded = replace(spec, limits=replace(spec.limits, wall_s=0.02))
        await run(executor, bounded)
        return
    handle = await executor.prepare(spec)
    try:
        await executor.start(handle, discard)
        if number % 3 == 0:
            await executor.cancel(handle, "cancelled", grace_s=0.01)
            await executor.wait(handle)
    finally:
        await executor.destroy(handle)


class Leftovers:
    """Counts what this world's orders have on the machine."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._containers: set[str] = set()
        self.made: set[Path] = set()

    def counts(self) -> Counter[str]:
        """How many of each kind there are now."""
        here = str(self._world.folder)
        return Counter(
            {
                "containers": len(self._listed()),
                "control groups": self._groups(),
                "mounts": Path("/proc/self/mounts").read_text().count(f" {here}/"),
                "loop devices": sum(here in name for name in _backing_files()),
                "shims": sum(_is_shim(item) for item in self._world.engine_processes()),
                "processes": self._world.survivors(),
                "files": sum(path.exists() for path in self.made),
            }
        )

    def files(self) -> set[Path]:
        """What lies in the tiers' folders, among the volumes, and among temporary files."""
        places = [self._world.folder / "sessions", Path(tempfile.gettempdir())]
        states = (self._world.folder / "state").rglob("*")
        return {*states, *(path for place in places if place.exists() for path in place.iterdir())}

    def note_containers(self) -> None:
        """Remember containers that live, so that their control groups can be looked for."""
        self._containers.update(self._listed())

    def _listed(self) -> list[str]:
        if not self._world.engine:
            return []
        mark = f"label=lumaris.node={self._world.node}"
        command = ["docker", "ps", "--all", "--quiet", "--no-trunc", "--filter", mark]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        return found.stdout.split()

    def _groups(self) -> int:
        prefix, found = f"lumaris-{self._world.node[:12]}-", 0
        for _, folders, _ in os.walk("/sys/fs/cgroup"):
            found += sum(
                name.startswith(prefix) or name.split("-")[-1] in self._containers
                for name in folders
            )
        return found


def _backing_files() -> list[str]:
    found = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found.append(file.read_text())
        except OSError:  # it was detached since
            continue
    return found


def _is_shim(process: psutil.Process) -> bool:
    return str(process.info["name"]).startswith("containerd-shim")
