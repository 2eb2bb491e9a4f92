"""What every tier must do, written once. A subclass supplies `bench`."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio

from lumaris_node.executors.port import Executor, Handle, JobLimits, JobSpec, Outcome
from lumaris_node.workspace import Workspace
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import derive_id

MIB = 1024 * 1024
LIMITS = JobLimits(
    cpu_millis=1000,
    memory_bytes=256 * MIB,
    disk_bytes=64 * MIB,
    wall_s=20,
    fuel=0,
    log_bytes=256 * 1024,
    output_bytes=8 * MIB,
    output_files=10,
)


@dataclass
class Bench:
    """An executor under test. `guest` maps the name of a behaviour to an image and a command."""

    executor: Executor
    folder: Path
    guest: Callable[[str], tuple[str, tuple[str, ...]]]
    jobs: int = 0
    workspaces: list[Workspace] = field(default_factory=list)

    def workspace(self) -> Workspace:
        self.jobs += 1
        made = Workspace(self.folder / "work", derive_id("job", str(self.jobs).encode()))
        self.workspaces.append(made)
        return made

    def spec(self, behaviour: str, **bounds: float) -> JobSpec:
        image, command = self.guest(behaviour)
        space = self.workspace()
        limits = replace(LIMITS, **bounds)  # type: ignore[arg-type]
        return JobSpec(space.root.name, image, command, {}, space.inputs, space.outputs, limits)


@dataclass
class Log:
    stdout: bytes = b""
    stderr: bytes = b""
    grew: trio.Event = field(default_factory=trio.Event)

    async def __call__(self, stream: str, data: bytes) -> None:
        setattr(self, stream, getattr(self, stream) + data)
        self.grew.set()


@asynccontextmanager
async def started(bench: Bench, spec: JobSpec, log: Log) -> AsyncIterator[Handle]:
    with trio.fail_after(20):
        handle = await bench.executor.prepare(spec)
        try:
            await bench.executor.start(handle, log)
            yield handle
        finally:
            await bench.executor.destroy(handle)
            await bench.executor.destroy(handle)


async def until_it_prints(bench: Bench, handle: Handle, log: Log) -> None:
    """The guest is running its own code; the wait that read this is cancelled again."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.executor.wait, handle)
        await log.grew.wait()
        nursery.cancel_scope.cancel()


async def run(bench: Bench, spec: JobSpec) -> tuple[Outcome, Log]:
    log = Log()
    async with started(bench, spec, log) as handle:
        return await bench.executor.wait(handle), log


class Conformance:
    """Inherit, and provide the fixture `bench`."""

    async def test_success_keeps_both_streams_in_order(self, bench: Bench):
        outcome, log = await run(bench, bench.spec("print"))
        assert (outcome.reason, outcome.exit_status) == ("succeeded", 0), outcome
        assert log.stdout == b"one\ntwo\n"
        assert log.stderr == b"three\n"

    async def test_exit_status(self, bench: Bench):
        outcome, _ = await run(bench, bench.spec("exit3"))
        assert (outcome.reason, outcome.exit_status) == ("exit_nonzero", 3)

    async def test_inputs_are_read_only_and_outputs_are_collected(self, bench: Bench):
        spec = bench.spec("copy")
        (spec.inputs / "a").write_bytes(b"hello")
        (spec.inputs / "a").chmod(0o644)
        outcome, log = await run(bench, spec)
        assert outcome.reason == "succeeded", (outcome, log)
        assert b"refused" in log.stdout
        assert sorted(os.listdir(spec.inputs)) == ["a"]
        files = bench.workspaces[-1].collect(files_max=5, bytes_max=100)
        assert [(file.path, file.size) for file in files] == [("b", 5)]

    async def test_deadline(self, bench: Bench):
        began = trio.current_time()
        outcome, _ = await run(bench, bench.spec("spin", wall_s=0.4))
        assert (outcome.reason, outcome.exit_status) == ("killed_deadline", None)
        assert outcome.usage.wall_ms >= 400
        assert trio.current_time() - began < 10

    async def test_blocking_sleep_is_killed_too(self, bench: Bench):
        outcome, _ = await run(bench, bench.spec("sleep", wall_s=0.4))
        assert outcome.reason == "killed_deadline"

    async def test_cancel(self, bench: Bench):
        log = Log()
        async with started(bench, bench.spec("spin"), log) as handle:
            await until_it_prints(bench, handle, log)
            await bench.executor.cancel(handle, "cancelled")
            await bench.executor.cancel(handle, "killed_owner")
            assert (await bench.executor.wait(handle)).reason == "cancelled"
            assert (await bench.executor.wait(handle)).reason == "cancelled"

    async def test_a_cancelled_wait_leaves_the_job_running(self, bench: Bench):
        log = Log()
        async with started(bench, bench.spec("short"), log) as handle:
            with trio.move_on_after(0.05) as scope:
                await bench.executor.wait(handle)
            assert scope.cancelled_caught
            assert (await bench.executor.wait(handle)).reason == "succeeded"

    async def test_a_pause_stops_the_clock(self, bench: Bench):
        log = Log()
        async with started(bench, bench.spec("spin", wall_s=1.5), log) as handle:
            await until_it_prints(bench, handle, log)
            await bench.executor.pause(handle)
            with trio.move_on_after(2) as scope:
                await bench.executor.wait(handle)
            assert scope.cancelled_caught, "a paused job reached its deadline"
            await bench.executor.resume(handle)
            assert (await bench.executor.wait(handle)).reason == "killed_deadline"

    async def test_log_flood(self, bench: Bench):
        outcome, log = await run(bench, bench.spec("flood", log_bytes=10_000))
        assert outcome.reason == "killed_log"
        assert len(log.stdout) == 10_000

    async def test_disk_flood(self, bench: Bench):
        spec = bench.spec("fill", disk_bytes=4 * MIB)
        outcome, log = await run(bench, spec)
        assert outcome.reason == "killed_disk", (outcome, log)

    async def test_unknown_image(self, bench: Bench):
        spec = replace(bench.spec("print"), image="sha256:" + "0" * 64)
        assert not await bench.executor.has_image(spec.image)
        with pytest.raises(LumarisError) as caught:
            await bench.executor.prepare(spec)
        assert caught.value.code == "bad_image"

    async def test_destroy_ends_a_running_job(self, bench: Bench):
        log = Log()
        async with started(bench, bench.spec("spin"), log) as handle:
            await until_it_prints(bench, handle, log)

    async def test_probe_and_images(self, bench: Bench):
        runtime = await bench.executor.probe()
        assert runtime is not None
        assert runtime.tier == bench.executor.tier
        assert bench.guest("print")[0] in await bench.executor.images()
