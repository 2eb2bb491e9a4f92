"""The vm tier: every job in a virtual machine of its own, with a kernel of the owner's choosing.

The machine boots while the job is prepared, unbilled, and waits for the word to go; it has no
network, no folder of this machine, and four ways out: two log streams, a status line, a tar of
/out. Usage of processor time is the emulator's, counted here; the peak of memory and what the job
died of are said by the guest's own kernel, which only a job that broke it could change.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import trio

from lumaris_node.executors.port import (
    Attachment,
    Handle,
    JobSpec,
    LogSink,
    Outcome,
    Progress,
    Stream,
    Usage,
)
from lumaris_node.executors.supervise import LogGate, RunClock, enforce_deadline, enforce_log
from lumaris_node.executors.vm.disks import ImageDisks, blank_disk, folder_disk
from lumaris_node.executors.vm.guest import (
    KERNEL_BYTES,
    base_archive,
    echo_order,
    job_order,
    order_archive,
)
from lumaris_node.executors.vm.machine import Accel, Machine, MarkedStream, Plan, reap
from lumaris_node.executors.vm.output import take_outputs
from lumaris_node.images.rootfs import RootfsStore
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.advert import Runtime

PROBE_S_MAX = {"kvm": 20, "tcg": 60}
# A machine boots in under a second with KVM, in a few without, in many with a tenth of a core.
BOOT_S_MAX = 120
# Once a job has ended, what it said arrives within this time, or it is given up.
DRAIN_S_MAX = 60
PROBE_BYTES = 256 * limits.MIB
END_FIELDS = 6
NODE_CHARS = 12
BUSYBOX = Path("/bin/busybox")


@dataclass(frozen=True)
class GuestFacts:
    """What the guest's init says of the end: numbers of its kernel."""

    status: int
    oom_kills: int
    pids_refused: int
    disk_bytes: int
    disk_files: int
    memory_peak_bytes: int


@dataclass
class VmRun:
    """The private part of a handle."""

    machine: Machine
    token: bytes
    command_there: bool
    streams: dict[Stream, MarkedStream] = field(default_factory=dict)
    clock: RunClock = field(default_factory=RunClock)
    gate: LogGate | None = None
    stdin_lock: trio.Lock = field(default_factory=trio.Lock)
    stdin_open: bool = False
    asked_to_end: trio.Event = field(default_factory=trio.Event)
    grace_s: float = 0
    started: bool = False
    paused: bool = False
    ended: bool = False
    facts: GuestFacts | None = None
    reason: str = ""
    outcome: Outcome | None = None
    cpu_ms_before: int = 0
    cpu_ms: int = 0


class VmExecutor:
    """The executor of tier `vm`; without a kernel it is there, and its probe answers None."""

    tier = "vm"
    why_not = ""

    def __init__(
        self,
        rootfs: RootfsStore,
        *,
        kernel: Path | None,
        modules: Path | None = None,
        accel: Accel = "kvm",
        qemu: str = "qemu-system-x86_64",
        directory: Path,
        node: str = "",
        busybox: Path = BUSYBOX,
    ) -> None:
        """`modules` is the kernel's module folder; when None, the one named as the kernel's file.

        `accel="tcg"` is for tests: its assurance is `vm-emulated`, which is never sold.
        """
        self._rootfs = rootfs
        self._kernel, self._busybox = kernel, busybox
        self._modules = modules or _modules_of(kernel)
        self._accel: Accel = accel
        self._qemu = qemu
        self._disks = ImageDisks(directory / "disks", rootfs)
        mark = re.sub(r"[^a-z0-9]", "-", node.lower())[:NODE_CHARS]
        self._prefix = f"lumaris-{mark}-vm-" if mark else "lumaris-vm-"
        self._runs: dict[str, Handle] = {}
        self._boot: tuple[bytes, bytes] | None = None

    async def probe(self) -> Runtime | None:
        """The runtime, after a machine booted and said a fresh word back in time."""
        word = secrets.token_hex(8)
        machine = None
        try:
            with trio.fail_after(PROBE_S_MAX[self._accel]):
                kernel, base = await self._boot_files()
                plan = Plan(
                    name=f"{self._prefix}probe-{word}",
                    qemu=self._qemu,
                    accel=self._accel,
                    kernel=kernel,
                    initrd=base + order_archive(echo_order(word)),
                    memory_bytes=PROBE_BYTES,
                    cpu_millis=1000,
                )
                machine = await Machine.boot(plan)
                if await machine.status.line() != b"echo " + word.encode():
                    self.why_not = "A machine booted and said something else than it was told."
                    return None
        except (LumarisError, OSError, trio.TooSlowError) as error:
            self.why_not = str(error) or "A machine did not boot in time."
            return None
        finally:
            if machine is not None:
                await machine.end()
        self.why_not = ""
        assurance = "vm" if self._accel == "kvm" else "vm-emulated"
        version = f"qemu-{machine.version}"
        return Runtime(tier="vm", version=version, assurance=assurance, features=("stdin",))

    async def has_image(self, image: str) -> bool:
        """Whether the image's root folder is here."""
        return await trio.to_thread.run_sync(self._rootfs.has, image)

    async def add_image(self, image: str, source: Path, progress: Progress | None = None) -> None:
        """Unpack an archive and make its disk. Raises LumarisError as `RootfsStore.add`."""
        if progress is not None:
            progress("unpacking", 0, 0)
        check = trio.from_thread.check_cancelled
        await trio.to_thread.run_sync(partial(self._rootfs.add, source, image, check=check))

    async def images(self) -> tuple[str, ...]:
        """Images held, the one used last first."""
        return await trio.to_thread.run_sync(self._rootfs.digests)

    async def remove_image(self, image: str) -> None:
        """Forget an image and its disk. Raises LumarisError `busy` while one is being made."""
        await trio.to_thread.run_sync(self._rootfs.remove, image)
        await trio.to_thread.run_sync(self._disks.remove, image)

    async def prepare(self, spec: JobSpec, progress: Progress | None = None) -> Handle:
        """Boot the job's machine. Raises `bad_image`, `bad_command`, `platform_error`."""
        if spec.job in self._runs:
            raise LumarisError("platform_error", f"{spec.job} is prepared already.")
        if spec.gpus:
            raise LumarisError("not_supported", "A virtual machine has no GPU here.")
        if not await self.has_image(spec.image):
            raise LumarisError("bad_image", f"The image {spec.image[:80]} is not here.")
        config = await trio.to_thread.run_sync(self._rootfs.config, spec.image)
        token = secrets.token_hex(16)
        order = job_order(spec, config.environment, token)
        try:
            kernel, base = await self._boot_files()
        except OSError as error:
            raise LumarisError("platform_error", f"No kernel: {error.strerror}.") from error
        if progress is not None:
            progress("booting", 0, 0)
        async with self._job_disks(spec) as disks:
            plan = Plan(
                name=f"{self._prefix}{spec.job}",
                qemu=self._qemu,
                accel=self._accel,
                kernel=kernel,
                initrd=base + order_archive(order),
                memory_bytes=spec.limits.memory_bytes + KERNEL_BYTES,
                cpu_millis=spec.limits.cpu_millis,
                disks=disks,
                writable="out",
            )
            machine = await Machine.boot(plan)
        try:
            run = VmRun(machine, token.encode(), await _ready(machine))
        except BaseException:
            await machine.end()
            raise
        for name in ("stdout", "stderr"):
            run.streams[name] = MarkedStream(machine.port(name), run.token)
        handle = Handle(spec, {"run": run})
        self._runs[spec.job] = handle
        return handle

    async def start(self, handle: Handle, log: LogSink) -> None:
        """Let the waiting machine go. Raises LumarisError `bad_command`."""
        run, spec = _run(handle), handle.spec
        assert not run.started, "started twice"
        if not run.command_there:
            raise LumarisError("bad_command", f"There is no program {spec.command[0][:80]!r}.")
        run.gate = LogGate(log, spec.limits.log_bytes)
        run.started = True
        run.stdin_open = spec.stdin
        run.cpu_ms_before = run.machine.cpu_ms()
        await run.machine.tell("go")
        run.clock.run()

    async def wait(self, handle: Handle) -> Outcome:
        """Until the job has ended, its output passed on and /out taken over."""
        run, spec = _run(handle), handle.spec
        if run.outcome is not None:
            return run.outcome
        assert run.gate is not None, "wait before start"
        end = self._ender(handle)
        async with trio.open_nursery() as watchers:
            watchers.start_soon(enforce_deadline, run.clock, spec.limits.wall_s, end)
            watchers.start_soon(enforce_log, run.gate, end)
            watchers.start_soon(_enforce_grace, run)
            async with trio.open_nursery() as readers:
                for name, stream in run.streams.items():
                    readers.start_soon(_pump, run.gate, name, stream)
                if not run.ended:  # a wait that was cancelled may have seen it
                    facts = await _read_end(run.machine)
                    run.facts, run.ended = facts, True
                    run.clock.stop()
                    run.cpu_ms = run.machine.cpu_ms() - run.cpu_ms_before
                readers.cancel_scope.deadline = trio.current_time() + DRAIN_S_MAX
            watchers.cancel_scope.cancel()
        with trio.CancelScope(shield=True):  # half of it cannot be done again
            run.outcome = outcome = await self._finish(handle)
        return outcome

    async def usage(self, handle: Handle) -> Usage:
        """Wall and processor time so far; the peak of memory is known at the end."""
        run = _run(handle)
        if run.outcome is not None:
            return run.outcome.usage
        cpu_ms = run.machine.cpu_ms() - run.cpu_ms_before if run.started else 0
        return Usage(wall_ms=int(run.clock.elapsed_s * 1000), cpu_ms=cpu_ms)

    async def pause(self, handle: Handle) -> None:
        """Stop the machine's processors; the wall clock stops with them."""
        run = _run(handle)
        if run.started and not run.ended and not run.paused:
            run.paused = True
            run.clock.stop()
            await run.machine.stop()

    async def resume(self, handle: Handle) -> None:
        """Let the machine's processors go on."""
        run = _run(handle)
        if run.started and not run.ended and run.paused:
            run.paused = False
            await run.machine.cont()
            run.clock.run()

    async def cancel(self, handle: Handle, reason: str, *, grace_s: float = 0) -> None:
        """End the job; `wait` kills its machine when the grace is over."""
        run = _run(handle)
        run.reason = run.reason or reason  # the first reason is the cause
        if not run.started or run.outcome is not None:
            return
        if grace_s <= 0 or run.paused:
            await self._end(handle, reason)
        elif not run.asked_to_end.is_set():
            run.grace_s = grace_s
            run.asked_to_end.set()
            await run.machine.tell("term")

    async def write_stdin(self, handle: Handle, data: bytes) -> None:
        """Bytes for standard input; b"" ends it. Raises LumarisError `not_attached`."""
        run = _run(handle)
        async with run.stdin_lock:
            if not run.stdin_open or run.outcome is not None:
                raise LumarisError("not_attached", "The job reads no input.")
            try:
                if data:
                    await run.machine.port("stdin").send_all(data)
                else:
                    run.stdin_open = False
                    await run.machine.port("stdin").send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                run.stdin_open = False
                raise LumarisError("not_attached", "The job has ended.") from error

    async def attach(
        self, handle: Handle, command: tuple[str, ...], *, tty: bool, rows: int, columns: int
    ) -> Attachment:
        """Refused: nothing further is run in a machine."""
        raise LumarisError("not_supported", "A job in a virtual machine cannot be entered.")

    async def network_pid(self, handle: Handle) -> int:
        """Refused: a machine has no network device."""
        raise LumarisError("not_supported", "A virtual machine has no network.")

    async def destroy(self, handle: Handle) -> None:
        """Kill the machine if it lives. Idempotent."""
        run = _run(handle)
        run.clock.stop()
        await run.machine.end()
        self._runs.pop(handle.spec.job, None)

    async def release(self, lease: str) -> None:
        """Nothing is kept: every job has a machine of its own."""

    async def reap_orphans(self) -> int:
        """Kill machines of a killed predecessor; how many still lived."""
        await trio.to_thread.run_sync(self._disks.drop_drafts)
        return await trio.to_thread.run_sync(reap, self._prefix)

    async def reap_left(self) -> int:
        """None: what a job held ends with it here."""
        return 0

    async def aclose(self) -> None:
        """End every machine."""
        for handle in list(self._runs.values()):
            await self.destroy(handle)

    def _ender(self, handle: Handle) -> Callable[[str], Awaitable[None]]:
        async def end(reason: str) -> None:
            await self._end(handle, reason)

        return end

    async def _end(self, handle: Handle, reason: str) -> None:
        run = _run(handle)
        run.reason = run.reason or reason
        if run.outcome is None:
            await run.machine.kill()

    async def _boot_files(self) -> tuple[bytes, bytes]:
        """The kernel and what all initial file systems share. Raises OSError."""
        if self._boot is None:
            kernel, modules = self._kernel, self._modules
            if kernel is None or modules is None:
                raise FileNotFoundError(0, "the owner named none")
            self._boot = await trio.to_thread.run_sync(
                lambda: (kernel.read_bytes(), base_archive(self._busybox, modules))
            )
        return self._boot

    @contextlib.asynccontextmanager
    async def _job_disks(self, spec: JobSpec) -> AsyncIterator[dict[str, int]]:
        """Descriptors of the job's disks, closed at the end: the emulator has its own then."""
        near, bounds = spec.outputs.parent, spec.limits
        files = min(bounds.scratch_files, limits.SCRATCH_FILES_MAX)
        makers: dict[str, Callable[[], int]] = {
            "root": lambda: self._disks.open(spec.image),
            "in": lambda: folder_disk(spec.inputs, near),
            "out": lambda: blank_disk(size_bytes=bounds.disk_bytes, files=files, near=near),
        }
        for number, (source, _) in enumerate(spec.mounts):
            makers[f"more{number}"] = lambda source=source: folder_disk(source, near)  # type: ignore[misc]
        disks: dict[str, int] = {}
        try:
            for name, make in makers.items():
                disks[name] = await trio.to_thread.run_sync(make)
            yield disks
        except OSError as error:
            raise LumarisError("platform_error", f"No disk: {error.strerror}.") from error
        finally:
            for descriptor in disks.values():
                os.close(descriptor)

    async def _finish(self, handle: Handle) -> Outcome:
        """Judge the end, take the outputs of a job that ended well, and free the machine."""
        run = _run(handle)
        words = run.machine.last_words() if run.facts is None else ""
        outcome = _judge(handle, run.facts, words)
        if outcome.reason == "succeeded":
            outcome = await _collect(handle, outcome)
        if run.reason:  # it may have come while the outputs did
            outcome = replace(outcome, reason=run.reason, exit_status=None, detail="")
        await run.machine.end()
        return outcome


async def _ready(machine: Machine) -> bool:
    """Wait until the guest is ready; whether it has the command. Raises `platform_error`."""
    with trio.move_on_after(BOOT_S_MAX):
        line = await machine.status.line()
        if line in (b"ready 0", b"ready 1"):
            return line == b"ready 1"
        words = line.decode("ascii", "replace")[:40] if line else machine.last_words()
        raise LumarisError("platform_error", f"The machine did not boot: {words}")
    raise LumarisError("platform_error", "The machine did not boot in time.")


async def _read_end(machine: Machine) -> GuestFacts | None:
    """What the guest says of its end; None when it went away or talks nonsense."""
    line = await machine.status.line()
    words = line.split() if line is not None else []
    if len(words) != END_FIELDS + 1 or words[0] != b"end":
        return None
    with contextlib.suppress(ValueError):
        return GuestFacts(*(int(word) for word in words[1:]))
    return None


def _judge(handle: Handle, facts: GuestFacts | None, words: str) -> Outcome:
    """How the run ended: by us, by a limit that its kernel met, or by itself."""
    run, bounds = _run(handle), handle.spec.limits
    usage = Usage(wall_ms=int(run.clock.elapsed_s * 1000), cpu_ms=max(0, run.cpu_ms))
    if facts is not None:
        peak = min(max(0, facts.memory_peak_bytes), bounds.memory_bytes)
        usage = replace(usage, memory_peak_bytes=peak)
    if run.reason:
        return Outcome(run.reason, None, usage)
    if facts is None:
        return Outcome("platform_error", None, usage, f"The machine ended. {words}".strip())
    met = (
        ("killed_memory", facts.oom_kills > 0),
        ("killed_pids", facts.pids_refused > 0),
        ("killed_disk", facts.disk_bytes > bounds.disk_bytes),
        ("killed_inodes", facts.disk_files > min(bounds.scratch_files, limits.SCRATCH_FILES_MAX)),
    )
    for reason, is_met in met:
        if is_met:
            return Outcome(reason, None, usage)
    reason = "succeeded" if facts.status == 0 else "exit_nonzero"
    return Outcome(reason, facts.status & 0xFF, usage)


async def _collect(handle: Handle, outcome: Outcome) -> Outcome:
    """Take over /out; an Outcome of its own when what comes cannot be taken."""
    run, spec = _run(handle), handle.spec
    await run.machine.tell("collect")
    try:
        await trio.to_thread.run_sync(_take, run.machine.port("output").socket.fileno(), spec)
    except LumarisError as error:
        return replace(outcome, reason=error.code, exit_status=None, detail=error.message)
    except OSError as error:
        detail = f"The outputs did not arrive: {error}"
        return replace(outcome, reason="platform_error", exit_status=None, detail=detail)
    return outcome


def _take(descriptor: int, spec: JobSpec) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as port:
        port.settimeout(DRAIN_S_MAX)
        with port.makefile("rb") as stream:
            take_outputs(
                stream,
                spec.outputs,
                files_max=spec.limits.output_files,
                bytes_max=spec.limits.output_bytes,
            )


async def _pump(gate: LogGate, name: Stream, stream: MarkedStream) -> None:
    while data := await stream.receive():
        await gate.put(name, data)


async def _enforce_grace(run: VmRun) -> None:
    await run.asked_to_end.wait()
    await trio.sleep(run.grace_s)
    await run.machine.kill()


def _modules_of(kernel: Path | None) -> Path | None:
    """The module folder of a kernel file that is named as distributions name it."""
    if kernel is None or not kernel.name.startswith("vmlinuz-"):
        return None
    return Path("/lib/modules") / kernel.name.removeprefix("vmlinuz-")


def _run(handle: Handle) -> VmRun:
    run = handle.private["run"]
    assert isinstance(run, VmRun)
    return run
