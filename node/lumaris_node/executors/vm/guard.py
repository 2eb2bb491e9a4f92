"""A small process between the node and one virtual machine: when the node is gone, so is it.

Started as a script with one argument, a JSON object; it imports nothing of ours. It holds the
reading end of a pipe as standard input: its end, however it comes, kills the machine. It has one
thread, so the kernel's death signal for its child means this process and not one of its threads.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys

CLONE_NEWIPC = 0x08000000
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
OPEN_FILES_MAX = 1024
FIRST_PASSED_FD = 3


def main() -> int:
    """Run the machine to its end, or to the end of standard input."""
    order = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ^C is for the node
    guard = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            _become_machine(order, guard)
        except BaseException as error:
            print(f"cannot start the machine: {error}", file=sys.stderr, flush=True)
        os._exit(127)
    last = max(int(name) for name in os.listdir("/proc/self/fd"))
    os.closerange(FIRST_PASSED_FD, last + 1)  # or the machine's sockets outlive it
    os.write(1, f"{pid}\n".encode())
    watched = select.poll()
    ended = os.pidfd_open(pid)
    watched.register(0, select.POLLIN | select.POLLHUP)
    watched.register(ended, select.POLLIN)
    watched.poll()
    os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its
    _, status = os.waitpid(pid, 0)
    return 0 if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0 else 1


def _become_machine(order: dict[str, object], guard: int) -> None:
    """Enter the bounds, lose every right, and become the emulator. Raises OSError."""
    argv, joins, uid, groups = order["argv"], order["joins"], order["uid"], order["groups"]
    assert isinstance(argv, list)
    assert isinstance(joins, list)
    assert isinstance(groups, list)
    os.setsid()
    for path in joins:
        with open(path, "w") as file:
            file.write("0")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = order["file_bytes"]
    assert isinstance(size, int)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES_MAX, OPEN_FILES_MAX))
    libc = ctypes.CDLL(None, use_errno=True)
    if isinstance(uid, int):
        if libc.unshare(CLONE_NEWNET | CLONE_NEWIPC) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        os.setgroups(groups)
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0 or os.getppid() != guard:
        raise OSError("the guard is gone")
    os.execv(argv[0], argv)  # noqa: S606 - becoming the emulator is what this process is for


if __name__ == "__main__":
    sys.exit(main())
