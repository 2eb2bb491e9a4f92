"""What a sandbox costs those who compute in it, and what files cost on their way in and out."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import trio

from benchmarks.parts.execution_rivals import bare_command
from benchmarks.parts.execution_starts import NO_OP, add_module
from benchmarks.parts.execution_world import World, in_turn, timed_command, timed_run
from lumaris_node.executors.port import Executor
from lumaris_node.workspace import LeaseWorkspace, Volumes, collect_outputs, volume_bounds
from lumaris_node.workspace.volumes import Encryption
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import GIB, MIB
from lumaris_protocol.messages.advert import Tier

KINDS: tuple[Encryption, ...] = ("off", "fscrypt", "gocryptfs", "tmpfs", "memory")
CHUNK_BYTES = MIB
CHAINS, RATE = 8, 3.7
# As a compiler does, so that the loop itself, where a guest's fuel is counted, is not all there is.
UNROLLED = 4


async def measure_overhead(world: World) -> None:
    """One program that only computes, in a sandbox and bare: the best of each, net of a start."""
    steps = 300_000 if world.quick else 1_000_000
    text = f"BEGIN {{ for (i = 0; i < {steps}; i++) x = (x + i * i) % 1000003; print x }}"
    work, nothing = ("/bin/awk", text), ("/bin/awk", "BEGIN { }")
    tiers: tuple[Tier, ...] = ("process", "container")
    async with AsyncExitStack() as stack:
        ways: dict[str, Callable[[], Awaitable[float]]] = {}
        for tier in tiers:
            executor = await stack.enter_async_context(world.executor(tier))
            if executor is None:
                continue
            for name, command in (("work", work), ("nothing", nothing)):
                ways[f"{tier} {name}"] = partial(_timed_order, world, executor, command)
        for name, command in (("work", work), ("nothing", nothing)):
            ways[f"bare {name}"] = partial(_timed, bare_command(world, command))
        found = await in_turn(ways, world.rounds(5, 3))
    net = {
        tier: min(found[f"{tier} work"]) - min(found[f"{tier} nothing"])
        for tier in ("bare", *tiers)
        if f"{tier} work" in found
    }
    for tier in tiers:
        if tier in net:
            times = net[tier] / net["bare"]
            world.row(f"{tier}: computing / bare", times, "x", "<= 1.10", times <= 1.10)


async def measure_simd(world: World) -> None:
    """The same vector arithmetic as a wasm guest and as a native program."""
    compiler = shutil.which("cc")
    if compiler is None:
        world.note("wasm SIMD against native: no C compiler")
        return
    steps = 5_000_000 if world.quick else 20_000_000
    source, program = world.folder / "simd.c", world.folder / "simd"
    source.write_text(_simd_c(steps))
    command = [compiler, "-O2", "-o", str(program), str(source)]
    await trio.to_thread.run_sync(partial(subprocess.run, command, check=True))
    async with world.executor("wasm") as executor:
        if executor is None:
            return
        work = await add_module(world, executor, _simd_wat(steps))
        nothing = await add_module(world, executor, NO_OP)
        lease = world.lease()
        found = await in_turn(
            {
                "native": partial(_timed, [str(program)]),
                "wasm": lambda: timed_run(executor, world.spec(work, ("x",), lease=lease)),
                "nothing": lambda: timed_run(executor, world.spec(nothing, ("x",), lease=lease)),
            },
            world.rounds(5, 3),
        )
        await executor.release(lease)
    best = min(found["wasm"]) - min(found["nothing"])
    times = best / min(found["native"])
    world.row("wasm SIMD / native -O2", times, "x", "<= 2", times <= 2)


def _simd_c(steps: int) -> str:
    """Chains of x = r x (1 - x), four numbers in each, with the compiler's own vectors."""
    begin = "\n".join(
        f"v x{n} = {{ {', '.join(f'0.{n + 1}{k + 1}f' for k in range(4))} }};"
        for n in range(CHAINS)
    )
    body = "\n".join(f"x{n} = r * x{n} * (one - x{n});" for n in range(CHAINS)) * UNROLLED
    total = " + ".join(f"x{n}" for n in range(CHAINS))
    return f"""typedef float v __attribute__((vector_size(16)));
volatile v sink;
int main(void) {{
v one = {{1, 1, 1, 1}}, r = {{{", ".join([f"{RATE}f"] * 4)}}};
{begin}
for (long n = 0; n < {steps}; n++) {{ {body} }}
sink = {total};
return 0; }}
"""


def _simd_wat(steps: int) -> str:
    begin = "\n".join(
        f"(local.set $x{n} (v128.const f32x4 {' '.join(f'0.{n + 1}{k + 1}' for k in range(4))}))"
        for n in range(CHAINS)
    )
    body = "\n".join(
        f"(local.set $x{n} (f32x4.mul (f32x4.mul (local.get $r) (local.get $x{n}))"
        f" (f32x4.sub (local.get $one) (local.get $x{n}))))"
        for n in range(CHAINS)
    )
    body *= UNROLLED
    stores = "\n".join(
        f"(v128.store (i32.const {16 * n}) (local.get $x{n}))" for n in range(CHAINS)
    )
    chains = " ".join(f"(local $x{n} v128)" for n in range(CHAINS))
    return f"""(module (memory (export "memory") 1) (func (export "_start")
(local $n i32) (local $one v128) (local $r v128) {chains}
(local.set $one (f32x4.splat (f32.const 1)))
(local.set $r (f32x4.splat (f32.const {RATE})))
{begin}
(loop {body}
(local.set $n (i32.add (local.get $n) (i32.const 1)))
(br_if 0 (i32.lt_u (local.get $n) (i32.const {steps}))))
{stores}))"""


async def measure_volumes(world: World) -> None:
    """Each kind of volume: opening, closing, files in, files out. `off` is our own cost alone."""
    for kind in KINDS:
        await trio.to_thread.run_sync(_measure_volume, world, kind)


def _measure_volume(world: World, kind: Encryption) -> None:
    directory = world.folder / f"volumes-{kind}"
    try:
        volumes = Volumes.open(directory, encryption=kind)
    except LumarisError as error:
        world.note(f"{kind} volumes: {str(error)[:60]}")
        return
    size, files = volume_bounds(GIB)
    opens, closes = [], []
    for _ in world.rounds(5, 3):
        volume = volumes.volume(world.lease(), bytes_max=size, files_max=files)
        opens.append(_ms(volume.open))
        closes.append(_ms(volume.close))
    row = world.row
    row(f"{kind} volume: open best", min(opens), "ms")
    row(f"{kind} volume: close best", min(closes), "ms")
    workspace = LeaseWorkspace(volumes.volume(world.lease(), bytes_max=size, files_max=files))
    workspace.open()
    try:
        ours = kind == "off"
        speed = _stage(world, workspace)
        bar, holds = (">= 300", speed >= 300) if ours else ("", None)
        row(f"{kind} volume: staging in", speed, "MB/s", bar, holds)
        if ours:
            target = workspace.blobs / "copy"
            copied = min(
                _ms(lambda: shutil.copyfile(world.folder / "input", target)) for _ in "abc"
            )
            size_mb = target.stat().st_size / 1e6
            row("a plain copy, not checked", 1e3 * size_mb / copied, "MB/s")
        rate = _collect(world, workspace)
        bar, holds = (">= 10000", rate >= 10_000) if ours else ("", None)
        row(f"{kind} volume: collecting out", rate, "files/s", bar, holds)
        full = _ms(workspace.close)
    finally:
        workspace.close()
    row(f"{kind} volume: close when used", full, "ms")


def _stage(world: World, workspace: LeaseWorkspace) -> float:
    """MB/s from a file of the machine to a checked input that a guest sees; the best of three."""
    size = (32 if world.quick else 128) * MIB
    source = world.folder / "input"
    if not source.exists():
        block = os.urandom(MIB)
        with source.open("wb") as file:
            for _ in range(size // MIB):
                file.write(block)
    best = 0.0
    for number in range(3):
        workspace.begin()
        blob = workspace.blobs / f"{number}"
        began, seen = time.perf_counter(), hashlib.sha256()
        with source.open("rb") as given, blob.open("wb") as taken:
            while chunk := given.read(CHUNK_BYTES):
                seen.update(chunk)
                taken.write(chunk)
        workspace.stage("data/input", blob, size)
        best = max(best, size / 1e6 / (time.perf_counter() - began))
        blob.unlink()
    return best


def _collect(world: World, workspace: LeaseWorkspace) -> float:
    """Files a second, checked and hashed, from a folder with many small ones; the best of three."""
    workspace.begin()
    count, data = (1_000 if world.quick else 5_000), os.urandom(1024)
    for number in range(count):
        if number % 100 == 0:
            (workspace.outputs / str(number // 100)).mkdir()
        Path(workspace.outputs / str(number // 100) / str(number)).write_bytes(data)
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        found = collect_outputs(workspace.outputs, files_max=count, bytes_max=GIB)
        best = max(best, len(found) / (time.perf_counter() - began))
    return best


def _ms(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


async def _timed_order(world: World, executor: Executor, command: tuple[str, ...]) -> float:
    return await timed_run(executor, world.spec(world.image, command))


async def _timed(command: list[str]) -> float:
    return await trio.to_thread.run_sync(timed_command, command)
