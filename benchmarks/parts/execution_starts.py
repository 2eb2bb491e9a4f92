"""How soon a sandbox runs something: cold and warm, against programs told to do the same."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import trio
import wasmtime

from benchmarks.parts.execution_rivals import (
    bubblewrap_command,
    docker_command,
    runc_command,
)
from benchmarks.parts.execution_world import (
    World,
    in_turn,
    ratio,
    tell,
    timed_command,
    timed_run,
)
from lumaris_node.executors.port import Executor
from lumaris_protocol.catalog import CATALOG
from lumaris_protocol.ids import digest

TRUE = ("/bin/true",)
IN_FLIGHT = 4
NO_OP = '(module (memory (export "memory") 1) (func (export "_start")))'
PYTHON = CATALOG["python:3.12-wasi"]


async def measure_process(world: World) -> None:
    """A sandbox of the process tier against bubblewrap alone with the same options."""
    async with world.executor("process") as executor:
        if executor is None:
            return
        bare = bubblewrap_command(world, TRUE)
        ways: dict[str, Callable[[], Awaitable[float]]] = {
            "ours": lambda: timed_run(executor, world.spec(world.image, TRUE)),
            "bare": partial(_timed, bare),
        }
        found = await in_turn(ways, world.rounds(40, 15))
    tell(world.row, "process: cold", found["ours"], 40)
    tell(world.row, "bare bubblewrap, same options", found["bare"])
    times = ratio(found["ours"], found["bare"])
    world.row("process / bare bubblewrap", times, "x", "<= 3", times <= 3)


async def measure_container(world: World) -> None:
    """A cold and a warm order of the container tier against `docker run` and runc."""
    async with world.executor("container") as executor:
        if executor is None:
            return
        lease = world.lease()
        ways: dict[str, Callable[[], Awaitable[float]]] = {
            "cold": lambda: timed_run(executor, world.spec(world.image, TRUE)),
            "warm": lambda: timed_run(executor, world.spec(world.image, TRUE, lease=lease)),
            "docker": partial(_timed, docker_command(world, TRUE)),
        }
        runc = runc_command(world, TRUE)
        if runc is None:
            world.note("raw runc: not installed, or no root")
        else:
            ways["runc"] = partial(_timed, runc)
        found = await in_turn(ways, world.rounds(10, 3))
        await executor.release(lease)
        await _measure_rate(world, executor)
    row = world.row
    tell(row, "container: cold", found["cold"])
    tell(row, "container: warm in a lease", found["warm"])
    tell(row, "docker run, same flags", found["docker"])
    times = ratio(found["cold"], found["docker"])
    row("container / docker run", times, "x", "<= 1.15", times <= 1.15)
    if runc is not None:
        tell(row, "raw runc, same limits", found["runc"])
        times = ratio(found["cold"], found["runc"])
        row("container / raw runc", times, "x", "<= 10", times <= 10)
    times = ratio(found["warm"], found["cold"])
    row("container: warm / cold", times, "x", "<= 0.35", times <= 0.35)


async def _measure_rate(world: World, executor: Executor) -> None:
    """Cold orders in a second when four run at once."""
    count = len(world.rounds(16, 8))
    limiter = trio.CapacityLimiter(IN_FLIGHT)

    async def one() -> None:
        async with limiter:
            await timed_run(executor, world.spec(world.image, TRUE))

    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    rate = count / (time.perf_counter() - began)
    world.row(f"container: orders/s, {IN_FLIGHT} in flight", rate, "1/s", ">= 4", rate >= 4)


async def measure_wasm(world: World) -> None:
    """An instance in a live worker, a fresh worker, and CPython's start in one."""
    async with world.executor("wasm") as executor:
        if executor is None:
            return
        no_op = await add_module(world, executor, NO_OP)
        lease = world.lease()
        # No more than an interpreter that starts and ends, as the fresh worker's rival.
        bare = [sys.executable, "-I", "-S", "-c", ""]
        ways: dict[str, Callable[[], Awaitable[float]]] = {
            "warm": lambda: timed_run(executor, world.spec(no_op, ("x",), lease=lease)),
            "fresh": lambda: timed_run(executor, world.spec(no_op, ("x",))),
            "python": partial(_timed, bare),
        }
        found = await in_turn(ways, world.rounds(40, 15))
        row = world.row
        tell(row, "wasm: instance in a live worker", found["warm"], 2)
        tell(row, "wasm: fresh worker", found["fresh"], 150)
        tell(row, "bare Python", found["python"])
        row("wasm: fresh worker / bare Python", ratio(found["fresh"], found["python"]), "x")
        await executor.release(lease)
        if world.quick:
            world.note("CPython on wasm: compiling it takes longer than a quick run")
            return
        if not await executor.has_image(PYTHON.digest):
            world.note(f"CPython on wasm: the extra {PYTHON.extra} is not installed")
            return
        lease, command = world.lease(), ("python", "-S", "-c", "pass")
        began = time.perf_counter()
        await timed_run(executor, world.spec(PYTHON.digest, command, lease=lease))
        row("CPython on wasm: first ever, compiled", time.perf_counter() - began, "s")
        times = [
            await timed_run(executor, world.spec(PYTHON.digest, command, lease=lease))
            for _ in world.rounds(20, 8)
        ]
        tell(row, "CPython on wasm: no-op, compiled", times, 80)
        await executor.release(lease)


async def add_module(world: World, executor: Executor, text: str) -> str:
    """Give the tier a module; its digest."""
    data = bytes(wasmtime.wat2wasm(text))
    name = digest(data)
    file: Path = world.folder / "module.wasm"
    file.write_bytes(data)
    await executor.add_image(name, file)
    return name


async def _timed(command: list[str]) -> float:
    return await trio.to_thread.run_sync(timed_command, command)
