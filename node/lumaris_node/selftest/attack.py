"""What a hostile guest would try, as a program that runs inside a sandbox and harms nothing.

Standard library only: the interpreter is all that its image holds. It refuses to run where the
marker with its nonce is missing, so never outside the sandbox's own root. It finds out what it may
do by opening for write and closing again, and by calls that fail late. Each attempt prints a line
`{"row": ..., "open": bool, "detail": ...}`: open means that the attempt succeeded.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import platform
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator

MARKER = "/lumaris-selftest"
# The guest's own places, which every tier makes for it alone.
TMP, SHM = "/tmp", "/dev/shm"  # noqa: S108 - see above
EXIT_NOT_IN_SANDBOX = 97
# A bomb that nothing stops, stops itself here.
FORKS_MAX, FILES_MAX, BYTES_MAX, OPEN_MAX = 600, 20_000, 512 << 20, 5_000
BLOCK = bytes(1 << 20)
# A folder without a volume is bounded by looking at it, which a burst into the page cache outruns.
BLOCK_S = 0.005
HOLD_S = 5.0

NUMBERS: dict[str, tuple[int, int]] = {  # x86_64, and the table that newer machines share
    "acct": (163, 89), "add_key": (248, 217), "bpf": (321, 280), "chroot": (161, 51),
    "delete_module": (176, 106), "finit_module": (313, 273), "init_module": (175, 105),
    "io_uring_setup": (425, 425), "kexec_load": (246, 104), "keyctl": (250, 219),
    "mount": (165, 40), "open_by_handle_at": (304, 265), "perf_event_open": (298, 241),
    "personality": (135, 92), "pivot_root": (155, 41), "process_vm_readv": (310, 270),
    "ptrace": (101, 117), "reboot": (169, 142), "request_key": (249, 218),
    "sethostname": (170, 161), "setns": (308, 268), "settimeofday": (164, 170),
    "swapon": (167, 224), "syslog": (103, 116), "umount2": (166, 39), "unshare": (272, 97),
    "userfaultfd": (323, 282),
}  # fmt: skip
REFUSED = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS})
# Nothing there, or nobody: as good as a refusal for files, devices and addresses.
ABSENT = REFUSED | {
    errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.EROFS, errno.EAFNOSUPPORT, errno.ENOTDIR,
    errno.EPROTONOSUPPORT, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED,
    errno.ENETDOWN, errno.EADDRNOTAVAIL, errno.ESOCKTNOSUPPORT, errno.EISDIR,
}  # fmt: skip
# What further refuses some rows: a user namespace without that id, one that allows none inside.
FURTHER = {
    "become_root": REFUSED | {errno.EINVAL},
    "become_group": REFUSED | {errno.EINVAL},
    "setns": REFUSED | {errno.ENOENT, errno.EINVAL},
    "unshare_user": REFUSED | {errno.ENOSPC, errno.EUSERS},
}
# Settings of the whole machine; others belong to a namespace, which the sandbox has of its own.
SYSTEM_WIDE = (
    "kernel/modprobe", "kernel/panic", "kernel/kptr_restrict", "kernel/randomize_va_space",
    "kernel/yama/ptrace_scope", "kernel/unprivileged_bpf_disabled",
    "vm/overcommit_memory", "vm/drop_caches", "vm/mmap_min_addr", "fs/suid_dumpable",
    "fs/file-max", "fs/protected_symlinks", "fs/binfmt_misc/register",
)  # fmt: skip
NEWUSER, NEWNS, NEWNET = 0x10000000, 0x20000, 0x40000000
CHILD_S_MAX = 3
_LIBC = ctypes.CDLL(None, use_errno=True)


def say(row: str, opened: bool, detail: object = "") -> None:
    """One line of the report."""
    print(json.dumps({"row": row, "open": opened, "detail": str(detail)[:200]}), flush=True)


def kernel(name: str, *arguments: object) -> int:
    """A raw system call. Raises OSError."""
    column = 0 if platform.machine() in ("x86_64", "AMD64") else 1
    ctypes.set_errno(0)
    plain = [ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
    result = int(_LIBC.syscall(ctypes.c_long(NUMBERS[name][column]), *plain))
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def attempt(row: str, work: Callable[[], object], refusals: frozenset[int] = REFUSED) -> None:
    """Try in a child process, since what succeeds may change the process that did it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(CHILD_S_MAX)
        try:
            found = work()
            opened, detail = found is not False, "" if found in (None, True, False) else str(found)
        except OSError as error:
            opened = error.errno not in refusals
            detail = errno.errorcode.get(error.errno or 0, str(error))
        except Exception as error:  # a probe's own fault must be seen
            opened, detail = True, repr(error)
        os.write(writer, json.dumps([opened, detail[:200]]).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    if said:
        opened, detail = json.loads(said)
        say(row, opened, detail)
    else:  # seccomp may kill instead of refusing; a time-out is nobody's refusal
        ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        say(row, ended != signal.SIGSYS, f"signal {ended}")


# --- probes that change nothing ------------------------------------------------------------------


def system_calls() -> dict[str, Callable[[], object]]:
    """Calls of the administrator, with arguments that fail late where they are permitted."""
    nothing = ctypes.c_char_p(b"/nonesuch")
    tmp = ctypes.c_char_p(b"/tmp")
    zeros = ctypes.create_string_buffer(256)
    handle = ctypes.create_string_buffer(struct.pack("ii", 8, 1) + bytes(8))

    def setns() -> int:
        with open("/proc/1/ns/mnt", "rb") as file:
            return kernel("setns", file.fileno(), 0)

    def ptrace() -> int:
        child = os.fork()
        if child == 0:
            time.sleep(CHILD_S_MAX)
            os._exit(0)
        try:
            return kernel("ptrace", 16, child, 0, 0)  # PTRACE_ATTACH
        finally:
            os.kill(child, signal.SIGKILL)

    return {
        "mount": lambda: kernel("mount", nothing, tmp, ctypes.c_char_p(b"nonesuchfs"), 0, 0),
        "umount": lambda: kernel("umount2", tmp, 2),
        "pivot_root": lambda: kernel("pivot_root", tmp, tmp),
        "setns": setns,
        "unshare_mount": lambda: kernel("unshare", NEWNS),
        "unshare_network": lambda: kernel("unshare", NEWNET),
        "unshare_user": lambda: kernel("unshare", NEWUSER),
        "chroot": lambda: kernel("chroot", ctypes.c_char_p(b"/tmp")),
        "io_uring": lambda: kernel("io_uring_setup", 1, zeros),
        "ptrace": ptrace,
        "process_vm_readv": lambda: kernel("process_vm_readv", os.getppid(), 0, 0, 0, 0, 0),
        "personality": lambda: kernel("personality", 0x0040000),
        "bpf": lambda: kernel("bpf", 0, zeros, 48),
        "perf_event": lambda: kernel("perf_event_open", zeros, 0, -1, -1, 0),
        "userfaultfd": lambda: kernel("userfaultfd", 1),
        "keyctl": lambda: kernel("keyctl", 0, -3, 0),
        "add_key": lambda: kernel("add_key", ctypes.c_char_p(b"user"), nothing, zeros, 1, -2),
        "request_key": lambda: kernel("request_key", ctypes.c_char_p(b"user"), nothing, 0, 0),
        "kexec": lambda: kernel("kexec_load", 0, 99, 0, 0),
        "init_module": lambda: kernel("init_module", 0, 0, 0),
        "finit_module": lambda: kernel("finit_module", -1, 0, 0),
        "delete_module": lambda: kernel("delete_module", nothing, 0),
        "dmesg": lambda: kernel("syslog", 3, zeros, 256),
        "clock": lambda: kernel("settimeofday", 0, 0),
        "hostname": lambda: kernel("sethostname", 0, -1),
        "swap": lambda: kernel("swapon", nothing, 0),
        "accounting": lambda: kernel("acct", nothing),
        "reboot": lambda: kernel("reboot", 0, 0, 0, 0),
        "file_handle": lambda: kernel("open_by_handle_at", -100, handle, 0),
        "mknod_block": lambda: os.mknod(f"{TMP}/b", 0o60600, os.makedev(8, 0)),
        "mknod_char": lambda: os.mknod(f"{TMP}/c", 0o20600, os.makedev(1, 1)),
        "real_time_priority": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
        "nice": lambda: os.nice(-5),
        "become_root": lambda: os.setuid(0),
        "become_group": lambda: os.setgroups([0]),
    }


def sockets(port: int, abstract: str) -> dict[str, Callable[[], object]]:
    """Ways out over the network, to this host and to sockets without a name in a file system."""

    def connects(family: int, address: tuple[str, int] | str) -> Callable[[], None]:
        def work() -> None:
            with socket.socket(family, socket.SOCK_STREAM) as trial:
                trial.settimeout(1)
                try:
                    trial.connect(address)
                except TimeoutError:
                    raise OSError(errno.ENETUNREACH, "nobody answers") from None

        return work

    def opens(family: int, kind: int, protocol: int = 0) -> Callable[[], None]:
        return lambda: socket.socket(family, kind, protocol).close()

    def interfaces() -> object:
        with open("/proc/net/dev", encoding="ascii") as file:
            names = [line.split(":")[0].strip() for line in file if ":" in line]
        return [name for name in names if name not in ("lo", "sit0", "ip6tnl0", "tunl0")] or False

    return {
        "raw_socket": opens(socket.AF_INET, socket.SOCK_RAW, 1),
        "packet_socket": opens(17, socket.SOCK_RAW, 0x0300),
        "vsock": opens(40, socket.SOCK_STREAM),
        "netlink_audit": opens(16, socket.SOCK_RAW, 9),
        "host_loopback": connects(socket.AF_INET, ("127.0.0.1", port)),
        "host_abstract_socket": connects(socket.AF_UNIX, f"\0{abstract}"),
        "metadata_route": connects(socket.AF_INET, ("169.254.169.254", 80)),
        "internet_route": connects(socket.AF_INET, ("192.0.2.1", 80)),
        "other_interfaces": interfaces,
    }


def may_write(*patterns: str) -> Callable[[], object]:
    """The first of the files that opens for write; None of them is written to."""

    def work() -> object:
        for pattern in patterns:
            for name in sorted(glob.glob(pattern, recursive=True))[:200] or [pattern]:
                with contextlib.suppress(OSError):
                    os.close(os.open(name, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
                    return name
        return False

    return work


def may_read(*patterns: str) -> Callable[[], object]:
    """The first of the files that opens and has a first byte, or folder that has an entry."""

    def work() -> object:
        for pattern in patterns:
            for name in sorted(glob.glob(pattern))[:200]:
                with contextlib.suppress(OSError):
                    if os.path.isdir(name):
                        if os.listdir(name):
                            return name
                        continue
                    handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                    try:
                        if os.read(handle, 1):
                            return name
                    finally:
                        os.close(handle)
        return False

    return work


def files() -> dict[str, Callable[[], object]]:
    """Files and devices of the host, and places that must not take a file."""

    def kallsyms() -> object:
        with open("/proc/kallsyms", encoding="ascii") as file:
            return any(int(line.split()[0], 16) for _, line in zip(range(50), file, strict=False))

    def creates(name: str) -> Callable[[], None]:
        def work() -> None:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            os.unlink(name)

        return work

    def runs_from(folder: str) -> Callable[[], object]:
        def work() -> object:
            target = f"{folder}/program"
            with open(sys.executable, "rb") as source, open(target, "wb") as copy:
                while block := source.read(1 << 20):
                    copy.write(block)
            os.chmod(target, 0o700)
            try:
                os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
                os.execv(target, [target, "-V"])  # noqa: S606 - no shell is wanted
            finally:
                os.unlink(target)

        return work

    return {
        "core_pattern": may_write("/proc/sys/kernel/core_pattern"),
        "proc_sys": may_write(*(f"/proc/sys/{name}" for name in SYSTEM_WIDE)),
        "sysrq": may_write("/proc/sysrq-trigger"),
        "cgroup_files": may_write("/sys/fs/cgroup/*", "/sys/fs/cgroup/**/*.max",
                                  "/sys/fs/cgroup/**/*limit_in_bytes",
                                  "/sys/fs/cgroup/**/cgroup.procs"),
        "release_agent": may_write("/sys/fs/cgroup/**/release_agent"),
        "sys_write": may_write("/sys/kernel/*", "/sys/kernel/mm/*/*", "/sys/power/*",
                               "/sys/module/*/parameters/*"),
        "kcore": may_read("/proc/kcore"),
        "kmsg": may_read("/dev/kmsg", "/proc/kmsg"),
        "debugfs": may_read("/sys/kernel/debug", "/sys/kernel/tracing"),
        "memory_device": may_read("/dev/mem", "/dev/port"),
        "block_devices": may_read("/dev/sd*", "/dev/vd*", "/dev/nvme*", "/dev/loop*", "/dev/dm-*"),
        "other_devices": may_write("/dev/kvm", "/dev/fuse", "/dev/net/tun", "/dev/vhost*",
                                   "/dev/loop-control", "/dev/uinput", "/dev/snapshot"),
        "engine_socket": may_read("/var/run/docker.sock", "/run/docker.sock", "/run/containerd",
                                  "/var/lib/docker"),
        "host_secrets": may_read("/etc/shadow", "/root/.ssh", "/var/run/secrets", "/home/*"),
        "kernel_addresses": kallsyms,
        "host_information": may_read("/proc/cmdline", "/proc/keys", "/proc/timer_list",
                                     "/proc/sched_debug"),
        "write_root": creates("/selftest-file"),
        "write_inputs": creates("/in/selftest-file"),
        "write_interpreter": may_write(os.__file__, sys.executable),
        "run_from_tmp": runs_from(TMP),
    }  # fmt: skip


def standing() -> Iterator[tuple[str, bool, str]]:
    """What this process is: its user, capabilities, filters, limits, environment, descriptors."""
    with open("/proc/self/status", encoding="ascii") as file:
        facts = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    yield "guest_is_root", 0 in (os.getuid(), os.geteuid(), os.getgid()), f"uid {os.getuid()}"
    yield "groups", 0 in os.getgroups(), os.getgroups().__repr__()
    names = ("CapInh", "CapPrm", "CapEff", "CapAmb")
    held = [name for name in names if int(facts.get(name, "0"), 16)]
    yield "capabilities", bool(held), " ".join(f"{name} {facts[name]}" for name in held)
    bounding = facts.get("CapBnd", "0")
    yield "capability_bounds", bool(int(bounding, 16)), bounding
    yield "setuid_programs", facts.get("NoNewPrivs", "0") != "1", "no_new_privs"
    yield "no_filter", facts.get("Seccomp", "0") != "2", f"Seccomp {facts.get('Seccomp')}"
    core = resource.getrlimit(resource.RLIMIT_CORE)
    yield "core_dumps", core != (0, 0), repr(core)
    plain = {"PATH", "HOME", "HOSTNAME", "PWD", "SHLVL", "LANG", "LC_CTYPE", "TMPDIR", "_", "TERM"}
    odd = sorted(set(os.environ) - plain - {"LD_LIBRARY_PATH", "PYTHONHOME"})
    yield "environment", bool(odd), " ".join(odd)
    with os.scandir("/proc/self/fd") as entries:
        handles = {int(entry.name): _target(entry.path) for entry in entries}
    extra = [f"{n} {name}" for n, name in handles.items() if n > 2 and "/fd" not in name]
    yield "inherited_descriptors", bool(extra), " ".join(extra)


def _target(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return "/fd"  # the scan's own


def namespaces(host: dict[str, str]) -> Iterator[tuple[str, bool, str]]:
    """Which of the host's namespaces this process is still in."""
    for name, theirs in host.items():
        try:
            ours = os.readlink(f"/proc/self/ns/{name}")
        except OSError:
            ours = "none"
        yield f"namespace_{name}", ours == theirs, ours


def host_processes(nonce: str) -> Iterator[tuple[str, bool, str]]:
    """Processes in /proc that are not of this job."""
    strange = []
    for name in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError), open(name, "rb") as file:
            line = file.read(4096)
            pid = int(name.split("/")[2])
            if line and nonce.encode() not in line and pid > 16:
                strange.append(f"{pid} {line[:40]!r}")
    yield "host_processes", bool(strange), " ".join(strange[:3])


def own_limits() -> dict[str, Callable[[], object]]:
    """Limits that are tried without a bomb."""

    def sparse() -> None:
        handle = os.open("/out/sparse", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.ftruncate(handle, 1 << 40)
        finally:
            os.close(handle)
            os.unlink("/out/sparse")

    def descriptors() -> None:
        for _ in range(OPEN_MAX):
            os.open("/", os.O_RDONLY)

    def spare_from_kill() -> None:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("-1000")

    return {
        "sparse_file": sparse,
        "descriptor_flood": descriptors,
        "spare_from_memory_kill": spare_from_kill,
    }


def probe(order: dict[str, object]) -> None:
    """Every row that needs no bomb."""
    host, nonce = order["namespaces"], str(order["nonce"])
    assert isinstance(host, dict)
    for rows in (standing(), namespaces(host), host_processes(nonce)):
        for row, opened, detail in rows:
            say(row, opened, detail)
    say("host_name", os.uname().nodename == order["hostname"], os.uname().nodename)
    for row, work in system_calls().items():
        attempt(row, work, FURTHER.get(row, REFUSED))
    for row, work in sockets(int(str(order["port"])), str(order["abstract"])).items():
        attempt(row, work, ABSENT)
    for row, work in files().items():
        attempt(row, work, ABSENT)
    limits = REFUSED | {errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOSPC}
    for row, work in own_limits().items():
        attempt(row, work, limits)


# --- bombs, each in a job of its own with small limits ------------------------------------------


def fork_bomb(_order: dict[str, object]) -> None:
    """Processes until refused, then hold them."""
    made, refused = 0, ""
    while made < FORKS_MAX and not refused:
        try:
            if os.fork() == 0:
                signal.pause()
                os._exit(0)
            made += 1
        except OSError as error:
            refused = errno.errorcode.get(error.errno or 0, "")
    say("fork_bomb", not refused, f"{made} processes {refused}")
    time.sleep(HOLD_S)


def memory_bomb(_order: dict[str, object]) -> None:
    """Memory that is really used."""
    held: list[bytearray] = []
    with contextlib.suppress(MemoryError):
        while len(held) < BYTES_MAX // len(BLOCK):
            held.append(bytearray(b"\1") * len(BLOCK))
    say("memory_bomb", len(held) * len(BLOCK) >= BYTES_MAX, f"{len(held)} MiB")


def fill_bomb(_order: dict[str, object]) -> None:
    """Bytes into every place that a guest may write beside its outputs; each is emptied again."""
    for row, folder in (("fill_tmp", TMP), ("fill_shm", SHM), ("fill_root", "/")):
        name, written, why = f"{folder}/fill", 0, "nothing"
        try:
            handle = os.open(name, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                while written < BYTES_MAX:
                    written += os.write(handle, BLOCK)
            finally:
                os.close(handle)
                os.unlink(name)
        except OSError as error:
            why = errno.errorcode.get(error.errno or 0, "")
        say(row, written >= BYTES_MAX, f"{written >> 20} MiB, then {why}")
    made, why = 0, "nothing"
    try:
        for made in range(FILES_MAX):
            os.close(os.open(f"{TMP}/{made}", os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError as error:
        why = errno.errorcode.get(error.errno or 0, "")
    say("files_in_tmp", made >= FILES_MAX - 1, f"{made} files, then {why}")


def disk_bomb(_order: dict[str, object]) -> None:
    """Bytes into /out until something stops it."""
    written = 0
    with contextlib.suppress(OSError):
        for number in range(64):
            with open(f"/out/{number}", "wb", buffering=0) as file:
                for _ in range(8):
                    written += file.write(BLOCK)
                    time.sleep(BLOCK_S)
    say("disk_bomb", written >= BYTES_MAX, f"{written >> 20} MiB")
    time.sleep(HOLD_S)


def file_bomb(_order: dict[str, object]) -> None:
    """Files into /out until something stops it."""
    made = 0
    with contextlib.suppress(OSError):
        for made in range(FILES_MAX):
            os.close(os.open(f"/out/{made}", os.O_WRONLY | os.O_CREAT, 0o600))
            if made % 64 == 0:
                time.sleep(BLOCK_S)
    say("file_bomb", made >= FILES_MAX - 1, f"{made} files")
    time.sleep(HOLD_S)


def cpu_hog(_order: dict[str, object]) -> None:
    """Four processes that compute for a second."""
    until = time.monotonic() + 1
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            while time.monotonic() < until:
                pass
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    say("cpu_hog", False, "judged from outside")


def survivors(_order: dict[str, object]) -> None:
    """Leave a process behind that asks for no mercy."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if os.fork() == 0:
            os.write(writer, struct.pack("i", os.getpid()))
            for handle in (0, 1, 2, reader, writer):
                os.close(handle)
            time.sleep(600)
        os._exit(0)
    os.read(reader, 4)
    say("survivors", False, "judged from outside")


MODES: dict[str, Callable[[dict[str, object]], None]] = {
    "probe": probe,
    "fork": fork_bomb,
    "memory": memory_bomb,
    "fill": fill_bomb,
    "disk": disk_bomb,
    "files": file_bomb,
    "cpu": cpu_hog,
    "survivors": survivors,
}


def in_sandbox(nonce: str, marker: str = MARKER) -> bool:
    """Whether the root file system is the one that was made for this run."""
    try:
        with open(marker, encoding="ascii") as file:
            return len(nonce) >= 32 and file.read(200).strip() == nonce
    except (OSError, ValueError):
        return False


def main(arguments: list[str]) -> int:
    """`attack.py NONCE MODE [FACTS]`, with the facts of the host as JSON."""
    if len(arguments) < 2 or not in_sandbox(arguments[0]):
        print("refused: this is not a sandbox made for the self-test", file=sys.stderr)
        return EXIT_NOT_IN_SANDBOX
    facts: dict[str, object] = json.loads(arguments[2]) if len(arguments) > 2 else {}
    MODES[arguments[1]]({**facts, "nonce": arguments[0]})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
