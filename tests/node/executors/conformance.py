"""What every tier must do, written once. A subclass supplies `bench`.

A test that takes `tier` runs twice: for an order that shares with no one, and within a lease.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio

from lumaris_node.executors.port import Executor, Handle, JobLimits, JobSpec, Outcome
from lumaris_node.workspace import collect_outputs
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
# A variable by which the processes of a test's jobs are told from all others of this machine.
MARK = "LUMARIS_TEST_MARK"


@dataclass
class Bench:
    """An executor under test. `guest` maps the name of a behaviour to an image and a command.

    `signals`: a guest of this tier can receive SIGTERM.
    """

    executor: Executor
    folder: Path
    guest: Callable[[str], tuple[str, tuple[str, ...]]]
    signals: bool = True
    patience_s: float = 20  # for one run of a guest, its preparation included
    jobs: int = 0
    lease: str = ""
    mark: str = field(default_factory=lambda: os.urandom(8).hex())

    def folders(self, job: str) -> tuple[Path, Path]:
        """`in` and `out` of an order, empty: within a lease always the same two."""
        root = self.folder / "work" / (self.lease or job)
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, mode in (("in", 0o755), ("out", 0o777)):
            folder = root / name
            folder.mkdir(exist_ok=True)
            folder.chmod(mode)
            for entry in folder.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        return root / "in", root / "out"

    def spec(self, behaviour: str, **bounds: float) -> JobSpec:
        image, command = self.guest(behaviour)
        self.jobs += 1
        job = derive_id("job", f"{self.mark}-{self.jobs}".encode())
        inputs, outputs = self.folders(job)
        limits = replace(LIMITS, **bounds)  # type: ignore[arg-type]
        marked = {MARK: self.mark}
        return JobSpec(job, image, command, marked, inputs, outputs, limits, lease=self.lease)

    def survivors(self) -> list[int]:
        """Processes of this bench's jobs that live, as far as this kernel runs them."""
        mark, found = f"{MARK}={self.mark}".encode(), []
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    if mark in Path("/proc", name, "environ").read_bytes():
                        found.append(int(name))
                except OSError:
                    continue
        return found

    async def features(self) -> tuple[str, ...]:
        runtime = await self.executor.probe()
        assert runtime is not None
        return runtime.features


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
    with trio.fail_after(bench.patience_s):
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


@asynccontextmanager
async def running(
    bench: Bench, spec: JobSpec, log: Log
) -> AsyncIterator[tuple[Handle, list[Outcome]]]:
    """A started job with its wait in the background; what it returned is in the list at the end."""
    ended: list[Outcome] = []

    async def wait() -> None:
        ended.append(await bench.executor.wait(handle))

    async with started(bench, spec, log) as handle, trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        yield handle, ended


async def until(condition: Callable[[], bool], within_s: float = 10) -> None:
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.01)


class Conformance:
    """Inherit, and provide the fixture `bench`."""

    @pytest.fixture(params=["", "lease"], ids=["alone", "leased"])
    async def tier(self, bench: Bench, request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
        if request.param:
            bench.lease = derive_id("session", bench.mark.encode())
        yield bench
        if bench.lease:
            await bench.executor.release(bench.lease)
            await bench.executor.release(bench.lease)
        assert bench.survivors() == []

    async def test_success_keeps_both_streams_in_order(self, tier: Bench):
        outcome, log = await run(tier, tier.spec("print"))
        assert (outcome.reason, outcome.exit_status) == ("succeeded", 0), outcome
        assert log.stdout == b"one\ntwo\n"
        assert log.stderr == b"three\n"

    async def test_exit_status(self, tier: Bench):
        outcome, _ = await run(tier, tier.spec("exit3"))
        assert (outcome.reason, outcome.exit_status) == ("exit_nonzero", 3)

    async def test_inputs_are_read_only_and_outputs_are_collected(self, tier: Bench):
        for content in (b"hello", b"again"):  # within a lease the folders are the same
            spec = tier.spec("copy")
            (spec.inputs / "a").write_bytes(content)
            (spec.inputs / "a").chmod(0o644)
            outcome, log = await run(tier, spec)
            assert outcome.reason == "succeeded", (outcome, log)
            assert b"refused" in log.stdout
            assert sorted(os.listdir(spec.inputs)) == ["a"]
            files = collect_outputs(spec.outputs, files_max=5, bytes_max=100)
            assert [(file.path, file.size) for file in files] == [("b", 5)]
            assert (spec.outputs / "b").read_bytes() == content

    async def test_deadline(self, tier: Bench):
        began = trio.current_time()
        outcome, _ = await run(tier, tier.spec("spin", wall_s=0.4))
        assert (outcome.reason, outcome.exit_status) == ("killed_deadline", None)
        assert outcome.usage.wall_ms >= 400
        assert trio.current_time() - began < 10

    async def test_blocking_sleep_is_killed_too(self, tier: Bench):
        outcome, _ = await run(tier, tier.spec("sleep", wall_s=0.4))
        assert outcome.reason == "killed_deadline"

    async def test_cancel(self, tier: Bench):
        log = Log()
        async with started(tier, tier.spec("spin"), log) as handle:
            await until_it_prints(tier, handle, log)
            await tier.executor.cancel(handle, "cancelled")
            await tier.executor.cancel(handle, "killed_owner")
            assert (await tier.executor.wait(handle)).reason == "cancelled"
            assert (await tier.executor.wait(handle)).reason == "cancelled"

    async def test_a_cancel_with_grace_lets_the_guest_finish(self, tier: Bench):
        log = Log()
        async with started(tier, tier.spec("polite"), log) as handle:
            await until_it_prints(tier, handle, log)
            began = trio.current_time()
            await tier.executor.cancel(handle, "cancelled", grace_s=15)
            outcome = await tier.executor.wait(handle)
            assert (outcome.reason, outcome.exit_status) == ("cancelled", None)
            assert trio.current_time() - began < 10
            assert not tier.signals or b"bye" in log.stdout

    async def test_grace_ends_for_one_who_ignores_it(self, tier: Bench):
        log = Log()
        async with started(tier, tier.spec("spin"), log) as handle:
            await until_it_prints(tier, handle, log)
            await tier.executor.cancel(handle, "cancelled", grace_s=0.3)
            assert (await tier.executor.wait(handle)).reason == "cancelled"

    async def test_a_cancelled_wait_leaves_the_job_running(self, tier: Bench):
        log = Log()
        async with started(tier, tier.spec("short"), log) as handle:
            with trio.move_on_after(0.05) as scope:
                await tier.executor.wait(handle)
            assert scope.cancelled_caught
            assert (await tier.executor.wait(handle)).reason == "succeeded"

    async def test_a_pause_stops_the_clock(self, tier: Bench):
        log = Log()
        async with started(tier, tier.spec("spin", wall_s=1.5), log) as handle:
            await until_it_prints(tier, handle, log)
            await tier.executor.pause(handle)
            with trio.move_on_after(2) as scope:
                await tier.executor.wait(handle)
            assert scope.cancelled_caught, "a paused job reached its deadline"
            await tier.executor.resume(handle)
            assert (await tier.executor.wait(handle)).reason == "killed_deadline"

    async def test_a_paused_job_can_be_cancelled(self, tier: Bench):
        log = Log()
        async with started(tier, tier.spec("spin"), log) as handle:
            await until_it_prints(tier, handle, log)
            await tier.executor.pause(handle)
            await tier.executor.cancel(handle, "killed_owner")
            assert (await tier.executor.wait(handle)).reason == "killed_owner"

    async def test_log_flood(self, tier: Bench):
        outcome, log = await run(tier, tier.spec("flood", log_bytes=10_000))
        assert outcome.reason == "killed_log"
        assert len(log.stdout) == 10_000

    async def test_disk_flood(self, tier: Bench):
        spec = tier.spec("fill", disk_bytes=4 * MIB)
        outcome, log = await run(tier, spec)
        assert outcome.reason == "killed_disk", (outcome, log)

    async def test_usage_grows_while_it_runs(self, tier: Bench):
        log = Log()
        async with running(tier, tier.spec("spin"), log) as (handle, _):
            seen = (await tier.executor.usage(handle)).cpu_ms
            for _ in range(2):
                with trio.fail_after(10):
                    while (now := (await tier.executor.usage(handle)).cpu_ms) <= seen:
                        await trio.sleep(0.02)
                seen = now
            await tier.executor.cancel(handle, "cancelled")

    async def test_standard_input(self, tier: Bench):
        executor, log = tier.executor, Log()
        if "stdin" not in await tier.features():
            pytest.skip(f"the tier {executor.tier} has no standard input here")
        spec = replace(tier.spec("echo"), stdin=True)
        async with running(tier, spec, log) as (handle, ended):
            await executor.write_stdin(handle, b"hello\n")
            await until(lambda: log.stdout == b"hello\n")
            await executor.write_stdin(handle, b"more\n")
            await executor.write_stdin(handle, b"")
            await until(lambda: bool(ended))
            with pytest.raises(LumarisError) as caught:
                await executor.write_stdin(handle, b"late")
            assert caught.value.code == "not_attached"
        assert ended[0].reason == "succeeded"
        assert log.stdout == b"hello\nmore\n"

    async def test_without_standard_input_it_is_empty(self, tier: Bench):
        log = Log()
        async with started(tier, tier.spec("echo"), log) as handle:
            with pytest.raises(LumarisError) as caught:
                await tier.executor.write_stdin(handle, b"x")
            assert caught.value.code in {"not_attached", "not_supported"}
            assert (await tier.executor.wait(handle)).reason == "succeeded"
        assert log.stdout == b""

    async def test_standard_input_waits_for_a_guest_that_is_behind(self, tier: Bench):
        if "stdin" not in await tier.features():
            pytest.skip(f"the tier {tier.executor.tier} has no standard input here")
        spec = replace(tier.spec("sleep"), stdin=True)
        async with started(tier, spec, Log()) as handle:
            with trio.move_on_after(0.5) as scope:
                for _ in range(256):
                    await tier.executor.write_stdin(handle, bytes(64 * 1024))
            assert scope.cancelled_caught, "16 MiB were taken from a buyer whose guest reads none"

    async def test_nothing_of_an_order_is_left_for_the_next(self, tier: Bench):
        first = replace(tier.spec("leave"), environment={MARK: tier.mark, "SECRET": "1"})
        outcome, log = await run(tier, first)
        assert outcome.reason == "succeeded", (outcome, log)
        assert tier.survivors() == []
        outcome, log = await run(tier, tier.spec("look"))
        assert (outcome.reason, log.stdout) == ("succeeded", b"clean\n"), (outcome, log)

    async def test_unknown_image(self, tier: Bench):
        spec = replace(tier.spec("print"), image="sha256:" + "0" * 64)
        assert not await tier.executor.has_image(spec.image)
        with pytest.raises(LumarisError) as caught:
            await tier.executor.prepare(spec)
        assert caught.value.code == "bad_image"

    async def test_destroy_ends_a_running_job(self, tier: Bench):
        log = Log()
        async with started(tier, tier.spec("spin"), log) as handle:
            await until_it_prints(tier, handle, log)
        assert tier.survivors() == []

    async def test_destroy_of_a_prepared_job(self, tier: Bench):
        handle = await tier.executor.prepare(tier.spec("print"))
        await tier.executor.destroy(handle)
        await tier.executor.destroy(handle)
        assert tier.survivors() == []
        assert (await run(tier, tier.spec("print")))[0].reason == "succeeded"

    async def test_the_network_namespace_is_named_where_it_can_be(self, tier: Bench):
        handle = await tier.executor.prepare(tier.spec("short"))
        try:
            if not {"forward", "egress"} & set(await tier.features()):
                with pytest.raises(LumarisError) as caught:
                    await tier.executor.network_pid(handle)
                assert caught.value.code == "not_supported"
                return
            before = os.readlink(f"/proc/{await tier.executor.network_pid(handle)}/ns/net")
            await tier.executor.start(handle, Log())
            after = os.readlink(f"/proc/{await tier.executor.network_pid(handle)}/ns/net")
            assert before == after != os.readlink("/proc/self/ns/net")
            assert (await tier.executor.wait(handle)).reason == "succeeded"
        finally:
            await tier.executor.destroy(handle)

    async def test_leases_do_not_meet(self, bench: Bench):
        for name in (b"first", b"second"):
            bench.lease = derive_id("session", bench.mark.encode() + name)
            outcome, log = await run(bench, bench.spec("look"))
            assert (outcome.reason, log.stdout) == ("succeeded", b"clean\n"), (outcome, log)
            assert (await run(bench, bench.spec("leave")))[0].reason == "succeeded"
            await bench.executor.release(bench.lease)
        assert bench.survivors() == []

    async def test_a_release_of_a_lease_nobody_knows(self, bench: Bench):
        await bench.executor.release(derive_id("session", b"nobody"))
        await bench.executor.release("")

    async def test_probe_and_images(self, bench: Bench):
        runtime = await bench.executor.probe()
        assert runtime is not None
        assert runtime.tier == bench.executor.tier
        assert bench.guest("print")[0] in await bench.executor.images()


# Shell text of the behaviours above, for tiers whose images have a POSIX shell at /bin/sh.
SHELL = {
    "print": "echo one; echo two; echo three >&2",
    "exit3": "exit 3",
    "copy": "touch /in/x 2>/dev/null || echo refused; cat /in/a > /out/b",
    "spin": "trap '' TERM; echo on; while :; do :; done",
    "polite": "trap 'echo bye; exit 0' TERM; echo on; while :; do sleep 0.05; done",
    "sleep": "sleep 600",
    "short": "sleep 0.5",
    "flood": "yes xxxxxxxxxxxxxxxxxxxx",
    "fill": "for n in 1 2 3 4 5 6 7 8; do dd if=/dev/zero of=/out/$n bs=1M count=1; done; sleep 60",
    "echo": "cat",
    "leave": "echo x > /tmp/left; mkdir -p /dev/shm/left /tmp/dir; echo x > /tmp/dir/.hidden;"
    " (trap '' TERM HUP; sleep 600 & sleep 600) >/dev/null 2>&1 & exit 0",
    "look": 'test -z "$(ls -A /tmp /dev/shm | grep -v \':$\')" && test -z "$SECRET"'
    " && ! ps | grep -v grep | grep -q 'sleep 600' && echo clean",
    # Bombs.
    "forks": "trap '' TERM; while :; do sleep 600 & done",
    "double": "trap '' TERM HUP; for n in 1 2 3; do (setsid sh -c 'trap \"\" TERM HUP;"
    " sleep 600' >/dev/null 2>&1 & ) & done; echo on; sleep 600",
    "memory": "dd if=/dev/zero of=/dev/null bs=600M count=1",
    "shm": "dd if=/dev/zero of=/tmp/big bs=1M count=1000; dd if=/dev/zero of=/dev/shm/big bs=1M"
    " count=1000; echo; df /tmp /dev/shm >&2; rm -f /tmp/big /dev/shm/big; echo survived",
    "inodes": "i=0; while [ $i -lt 200000 ]; do : > /out/$i; i=$((i+1)); done; sleep 60",
    "files": 'i=3; while [ $i -lt 4000 ]; do eval "exec $i</dev/null" || break; i=$((i+1)); done;'
    " echo $i",
    "huge": "dd if=/dev/zero of=/out/huge bs=1 count=1 seek=100G; echo $?",
}


class NativeConformance(Conformance):
    """For tiers whose guests are native programs with a shell: bombs, and what survives them."""

    async def test_fork_bomb(self, tier: Bench):
        outcome, log = await run(tier, tier.spec("forks", pids=40))
        assert outcome.reason == "killed_pids", (outcome, log)
        assert tier.survivors() == []
        assert (await run(tier, tier.spec("print")))[0].reason == "succeeded"

    async def test_memory_bomb(self, tier: Bench):
        outcome, log = await run(tier, tier.spec("memory", memory_bytes=64 * MIB))
        assert outcome.reason == "killed_memory", (outcome, log)
        assert (await run(tier, tier.spec("print")))[0].reason == "succeeded"

    async def test_inode_bomb(self, tier: Bench):
        outcome, log = await run(tier, tier.spec("inodes", scratch_files=500))
        assert outcome.reason == "killed_inodes", (outcome, log)

    async def test_file_descriptor_bomb(self, tier: Bench):
        outcome, log = await run(tier, tier.spec("files", open_files=128))
        assert outcome.reason in {"succeeded", "exit_nonzero"}, (outcome, log)
        assert int(log.stdout or b"0") <= 128

    async def test_sparse_file_bomb(self, tier: Bench):
        spec = tier.spec("huge", file_bytes=4 * MIB)
        outcome, log = await run(tier, spec)
        assert outcome.reason in {"succeeded", "exit_nonzero"}, (outcome, log)
        assert all(entry.stat().st_size <= 4 * MIB for entry in spec.outputs.iterdir())

    async def test_double_forkers_die_with_the_job(self, tier: Bench):
        log = Log()
        async with started(tier, tier.spec("double"), log) as handle:
            await until_it_prints(tier, handle, log)
            await tier.executor.cancel(handle, "cancelled", grace_s=0.1)
            assert (await tier.executor.wait(handle)).reason == "cancelled"
        assert tier.survivors() == []

    async def test_memory_file_systems_are_bounded(self, tier: Bench):
        outcome, log = await run(tier, tier.spec("shm"))
        assert outcome.reason in {"succeeded", "killed_memory"}, (outcome, log)
