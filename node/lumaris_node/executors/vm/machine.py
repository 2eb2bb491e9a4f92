"""One running virtual machine: the emulator's process, its ports, its clock's switch and its end.

The emulator gets open descriptors and no path of ours: sockets for the guest's ports and for its
own control, files for its disks. It runs as a user that owns nothing, in a network namespace with
nothing in it, without the right to start programs; a guard kills it when this node is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import trio

from lumaris_node.executors.vm.guest import PORTS
from lumaris_node.sandbox import users
from lumaris_node.sandbox.cgroups import Cgroups, CgroupsUnavailableError, Group
from lumaris_protocol import limits
from lumaris_protocol.errors import LumarisError

Accel = Literal["kvm", "tcg"]
# The emulator's own user when the node runs as root; it owns no file.
EMULATOR_UID = users.EMULATOR
GUARD = Path(__file__).with_name("guard.py")
# The emulator's heap, its buffers and translated code, on top of the guest's memory.
EMULATOR_BYTES = 256 * limits.MIB
EMULATOR_THREADS_MAX = 128
CPUS_MAX = 64
CONTROL_S_MAX = 10
REAP_S_MAX = 10
# Lines of the guest's status port and of the emulator's control: ours are below 200 bytes.
LINE_BYTES_MAX = 64 * limits.KIB
ERROR_BYTES_MAX = 500
RECEIVE_BYTES = 64 * limits.KIB
# The small `microvm` machine would do, but hangs now and then under emulation while the kernel
# measures its clock. Its `pc` devices that no guest of ours needs are switched off.
MACHINE = "q35,usb=off,sata=off,smbus=off,vmport=off,graphics=off"
KERNEL_LINE = "quiet panic=-1 random.trust_cpu=on mitigations=auto"
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class Plan:
    """A machine to boot. Disks are descriptors by the name the guest finds them by, ours to close.

    `writable` names the one disk that the guest may write.
    """

    name: str
    qemu: str
    accel: Accel
    kernel: bytes
    initrd: bytes
    memory_bytes: int
    cpu_millis: int
    disks: Mapping[str, int] = field(default_factory=dict)
    writable: str = ""


class LineReader:
    """Lines from a socket, however they are cut; a cancelled `line` loses nothing."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._data = b""

    async def line(self) -> bytes | None:
        """The next line without its end; None when there is no more, or it is too long."""
        while b"\n" not in self._data:
            if len(self._data) > LINE_BYTES_MAX:
                return None
            try:
                part = await self._stream.receive_some(RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                part = b""
            if not part:
                return None
            self._data += part
        line, self._data = self._data.split(b"\n", 1)
        return line


class MarkedStream:
    """A guest's output up to a mark that no job knows; without the mark, up to the end."""

    def __init__(self, stream: trio.SocketStream, mark: bytes) -> None:
        self._stream, self._mark = stream, mark
        self._held = b""
        self._ended = False

    async def receive(self) -> bytes:
        """The next bytes, b"" at the end. Only what could begin the mark is held back."""
        while not self._ended:
            try:
                part = await self._stream.receive_some(RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                part = b""
            data = self._held + part
            found = data.find(self._mark)
            self._ended = found >= 0 or not part
            keep = 0 if self._ended else _overlap(data, self._mark)
            ready = data[:found] if found >= 0 else data[: len(data) - keep]
            self._held = data[len(ready) :] if not self._ended else b""
            if ready:
                return ready
        return b""


class Machine:
    """A machine from `boot` on. `kill` and `ended` are its only end."""

    def __init__(self, process: trio.Process, group: Group | None, errors: int) -> None:
        self._process, self._group, self._errors = process, group, errors
        self._streams: dict[str, trio.SocketStream] = {}
        self._control_lock = trio.Lock()
        self._cpu_ms = 0
        self._dead = trio.Event()
        self._ending = trio.Lock()
        self.pid = 0
        self.version = ""

    @classmethod
    async def boot(cls, plan: Plan) -> Machine:
        """Start the emulator and wait for its first word. Raises LumarisError `platform_error`."""
        qemu = shutil.which(plan.qemu)
        if qemu is None:
            raise LumarisError("platform_error", f"There is no {plan.qemu}.")
        group = await trio.to_thread.run_sync(_make_group, plan)
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            sockets = {}
            argv = [qemu]
            passed = []
            for name in ("monitor", *PORTS):
                here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                sockets[name] = ours.enter_context(here)
                passed.append(theirs.enter_context(there).fileno())
                argv += ["-chardev", f"socket,id={name},fd={there.fileno()}"]
            errors = os.memfd_create("errors", os.MFD_CLOEXEC)
            ours.callback(os.close, errors)
            files = [_memory_file(data, theirs) for data in (plan.kernel, plan.initrd)]
            argv += _arguments(plan, *files)
            argv += _disk_arguments(plan)
            try:
                process = await trio.lowlevel.open_process(
                    [sys.executable, "-I", "-S", str(GUARD), _order(plan, argv, group)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    pass_fds=(*passed, *files, *plan.disks.values()),
                )
            except BaseException as error:
                with trio.CancelScope(shield=True):
                    await _remove(group)
                if isinstance(error, OSError):
                    text = f"No machine: {error.strerror}"
                    raise LumarisError("platform_error", text) from error
                raise
            machine = cls(process, group, errors)
            ours.pop_all()
        for name, here in sockets.items():
            machine._streams[name] = trio.SocketStream(trio.socket.from_stdlib_socket(here))
        machine.status = LineReader(machine.port("status"))
        try:
            await machine._greet()
        except BaseException:
            await machine.end()
            raise
        return machine

    status: LineReader

    def port(self, name: str) -> trio.SocketStream:
        """The host's end of a port."""
        return self._streams[name]

    def cpu_ms(self) -> int:
        """Processor time of the emulator and with it of the guest, in milliseconds."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8", errors="replace")
            fields = text.rsplit(")", 1)[1].split()
            ticks = int(fields[11]) + int(fields[12])
            self._cpu_ms = max(self._cpu_ms, ticks * 1000 // os.sysconf("SC_CLK_TCK"))
        return self._cpu_ms

    async def tell(self, word: str) -> None:
        """An order for the guest's init. One that is gone is told nothing."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            with trio.move_on_after(CONTROL_S_MAX):
                await self.port("control").send_all(f"{word}\n".encode())

    async def stop(self) -> None:
        """Freeze the guest. Raises LumarisError `platform_error`."""
        await self._command("stop")

    async def cont(self) -> None:
        """Let it go on. Raises LumarisError `platform_error`."""
        await self._command("cont")

    async def kill(self) -> None:
        """End it now; everything it sent can still be read. Returns at once."""
        self.cpu_ms()
        if self._process.stdin is not None:
            await self._process.stdin.aclose()  # the guard sees the end and kills

    async def end(self) -> None:
        """Kill it, wait until it is reaped and free what it had. Idempotent, never raises."""
        with trio.CancelScope(shield=True):
            async with self._ending:
                if self._dead.is_set():
                    return
                await self.kill()
                with trio.move_on_after(REAP_S_MAX) as late:
                    await self._process.wait()
                if late.cancelled_caught:  # stuck in the kernel: it dies when that lets go
                    self._process.kill()
                for stream in self._streams.values():
                    await stream.aclose()
                if self._process.stdout is not None:
                    await self._process.stdout.aclose()
                os.close(self._errors)
                await _remove(self._group)
                self._dead.set()

    def last_words(self) -> str:
        """The end of what the emulator complained of, before `end`."""
        try:
            size = os.fstat(self._errors).st_size
            data = os.pread(self._errors, ERROR_BYTES_MAX, max(0, size - ERROR_BYTES_MAX))
        except OSError:
            return ""
        return " ".join(data.decode("utf-8", "replace").split())

    async def _greet(self) -> None:
        """The guard says the emulator's pid; the emulator says its version and takes commands."""
        assert self._process.stdout is not None
        self._monitor = LineReader(self.port("monitor"))
        with trio.move_on_after(CONTROL_S_MAX):
            with contextlib.suppress(ValueError):
                self.pid = int(bytes(await self._process.stdout.receive_some(32)))
            line = await self._monitor.line()
            found = re.search(rb'"micro": (\d+), "minor": (\d+), "major": (\d+)', line or b"")
            if found is not None:
                micro, minor, major = (int(part) for part in found.groups())
                self.version = f"{major}.{minor}.{micro}"
                await self._command("qmp_capabilities")
                return
        raise LumarisError("platform_error", f"The machine did not start. {self.last_words()}")

    async def _command(self, name: str) -> None:
        message = json.dumps({"execute": name}).encode() + b"\n"
        try:
            async with self._control_lock:
                with trio.fail_after(CONTROL_S_MAX):
                    await self.port("monitor").send_all(message)
                    while (line := await self._monitor.line()) is not None:
                        if line.startswith((b'{"return"', b'{"error"')):
                            return  # what stands between are events
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass
        raise LumarisError("platform_error", f"The machine does not answer. {self.last_words()}")


def reap(prefix: str) -> int:
    """Kill machines that a killed predecessor left, by their groups. Blocks.

    Without control groups there is only the guard, which outlives its node by milliseconds.
    """
    try:
        return Cgroups().reap(prefix)
    except CgroupsUnavailableError:
        return 0


def _overlap(data: bytes, mark: bytes) -> int:
    """How many bytes at the end of `data` could be the beginning of `mark`."""
    for size in range(min(len(data), len(mark) - 1), 0, -1):
        if data.endswith(mark[:size]):
            return size
    return 0


def _make_group(plan: Plan) -> Group | None:
    try:
        return Cgroups().create(
            plan.name,
            memory_bytes=plan.memory_bytes + EMULATOR_BYTES,
            cpu_millis=plan.cpu_millis,
            pids=EMULATOR_THREADS_MAX,
        )
    except CgroupsUnavailableError:
        return None  # the guest's own limits and the size of the machine remain
    except OSError as error:
        raise LumarisError("platform_error", f"No control group: {error.strerror}") from error


async def _remove(group: Group | None) -> None:
    if group is not None:
        await trio.to_thread.run_sync(lambda: group.kill() and group.remove())


def _memory_file(data: bytes, stack: contextlib.ExitStack) -> int:
    """A file without a name that the emulator's user can open again, and nobody can change."""
    descriptor = os.memfd_create("boot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    stack.callback(os.close, descriptor)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.fchmod(descriptor, 0o444)
    return descriptor


def _arguments(plan: Plan, kernel: int, initrd: int) -> list[str]:
    accel = "kvm" if plan.accel == "kvm" else "tcg,tb-size=64"
    argv = [
        "-name", plan.name,
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-sandbox", SANDBOX,
        "-M", MACHINE,
        "-accel", accel,
        "-cpu", "host" if plan.accel == "kvm" else "max",
        "-m", f"{-(-plan.memory_bytes // limits.MIB)}M",
        "-smp", str(min(CPUS_MAX, max(1, -(-plan.cpu_millis // 1000)))),
        "-kernel", f"/proc/self/fd/{kernel}",
        "-initrd", f"/proc/self/fd/{initrd}",
        "-append", KERNEL_LINE,
        "-mon", "chardev=monitor,mode=control",
        "-device", f"virtio-serial-pci,max_ports={len(PORTS) + 1}",
    ]  # fmt: skip
    for number, name in enumerate(PORTS, start=1):
        argv += ["-device", f"virtserialport,chardev={name},name={name},nr={number}"]
    return argv


def _disk_arguments(plan: Plan) -> list[str]:
    argv = []
    for number, (name, descriptor) in enumerate(plan.disks.items()):
        mode = "off" if name == plan.writable else "on"
        file = f"driver=file,node-name=disk{number},filename=/dev/fdset/{number},locking=off"
        argv += ["-add-fd", f"fd={descriptor},set={number}"]
        argv += ["-blockdev", f"{file},read-only={mode}"]
        argv += ["-device", f"virtio-blk-pci,drive=disk{number},serial={name},werror=report"]
    return argv


def _order(plan: Plan, argv: list[str], group: Group | None) -> str:
    root = os.geteuid() == 0
    groups = []
    if root and plan.accel == "kvm":
        with contextlib.suppress(OSError):
            groups = [os.stat("/dev/kvm").st_gid]
    sizes = [os.fstat(descriptor).st_size for descriptor in plan.disks.values()]
    return json.dumps(
        {
            "argv": argv,
            "joins": [str(path) for path in group.joins] if group is not None else [],
            "uid": EMULATOR_UID if root else None,
            "groups": groups,
            "file_bytes": max([limits.MIB, *sizes]),
        }
    )
