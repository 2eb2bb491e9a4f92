"""What a wasm guest's process gives up on Linux before it sees an order.

wasmtime keeps a guest inside its memory and its folders. Should it fail, what is left is a process
without a network, of a user that owns nothing, and with the few system calls that wasmtime makes.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct

from lumaris_node.sandbox.seccomp import (
    ALLOW,
    ERRNO,
    Profile,
    Rule,
    Test,
    compile_filter,
)

GUEST_FDS_MAX = 256
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 4, 38, 22
PR_SET_NAME = 15
SECCOMP_MODE_FILTER = 2
CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = (
    0x04000000,
    0x08000000,
    0x10000000,
    0x40000000,
)
CLONE_THREAD = 0x00010000
EPERM, ENOSYS = 1, 38

_libc = ctypes.CDLL(None, use_errno=True)

# Python and wasmtime: files below open folders, memory, threads, time; messages on sockets that
# are open already. No exec, no new socket, no ptrace, no mount, no namespace, no keyring, no bpf.
_ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close
open openat openat2 stat fstat lstat newfstatat statx access faccessat faccessat2 statfs fstatfs
readlink readlinkat getdents64 mkdirat unlinkat renameat renameat2 linkat symlinkat ftruncate
fallocate fadvise64 utimensat fsync fdatasync sync_file_range copy_file_range sendfile flock
fcntl ioctl dup dup2 dup3 fchdir getcwd
brk mmap munmap mremap mprotect madvise msync mincore membarrier memfd_create
futex set_robust_list get_robust_list set_tid_address rseq gettid getpid getppid tgkill sched_yield
sched_getaffinity sched_setaffinity getcpu getuid geteuid getgid getegid
rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack
clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage
getrlimit setrlimit prlimit64 sysinfo uname getrandom
poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2
pipe2 recvmsg sendmsg recvfrom sendto getsockname getsockopt shutdown restart_syscall
exit exit_group
"""


def guest_filter() -> bytes:
    """The filter program of a worker. Raises ProfileError on a processor without names of calls."""
    rules = dict.fromkeys(_ALLOWED.split(), (Rule((), ALLOW),))
    rules["clone"] = (Rule((Test(0, CLONE_THREAD, CLONE_THREAD),), ALLOW),)
    # glibc makes threads by clone when clone3, whose flags no filter sees, does not exist.
    rules["clone3"] = (Rule((), ERRNO | ENOSYS),)
    rules["prctl"] = (Rule((Test(0, 2**64 - 1, PR_SET_NAME),), ALLOW),)
    return compile_filter(Profile(ERRNO | EPERM, rules))


def leave_networks() -> bool:
    """Give this process, and those it forks, an empty network of its own; whether that worked.

    Without root it needs a user namespace, which some systems forbid: then the filter stands alone.
    """
    spaces = CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    return not _libc.unshare(spaces) or not _libc.unshare(spaces | CLONE_NEWUSER)


def limit(uid: int) -> None:
    """Limits first, then the user, then what a change of user clears; before any thread exists."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (GUEST_FDS_MAX, GUEST_FDS_MAX))
    # No RLIMIT_NPROC: the kernel counts threads of all jobs, so one would starve another.
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with(parent: int) -> None:
    """End when the single-threaded parent ends. Raises RuntimeError when it has already."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise RuntimeError("the zygote is gone")


def filter_calls(program: bytes) -> None:
    """From here on only the calls that the program of `guest_filter` allows. Raises OSError."""
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: how many instructions of 8 bytes, and where they are
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    if _libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "the system call filter was not taken")
