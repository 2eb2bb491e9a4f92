"""The wasm zygote: a small single-threaded process that forks one killable child for each job.

It runs as a program, imports only the standard library and wasmtime, and holds an engine, a linker
and the latest modules, which children inherit. The node speaks to it over one SOCK_SEQPACKET
socket: `start` carries seven descriptors, `kill`, `stop` and `cont` name a job. When a guest has
ended, or its child was killed, the job's status pipe gets one JSON object and is closed; a child
that ran to its end takes some milliseconds more to leave.

Children are forked in advance: they have given up every right and have run an empty guest, so that
a job waits for neither. A child serves one job and ends.

When the node goes away the socket ends, every child is killed and so is this process; should this
process be killed, the kernel kills the children (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import stat
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn

import wasmtime

from lumaris_node.executors.wasm_engine import Determinism, make_engine

MESSAGE_BYTES_MAX = 4096
# order, stdout, stderr, status, module, /in, /out
START_DESCRIPTORS = 7
RESULT_BYTES_MAX = 4096  # one atomic pipe write
ORDER_BYTES_MAX = 64 * 1024 * 1024
GUEST_FDS_MAX = 256
TABLE_ELEMENTS_MAX = 1_000_000
DETAIL_CHARS_MAX = 400
MODULES_KEPT = 8
FORK_DELAY_MS = 2
SPARES = 2  # one to take the next job while the other is being made ready
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
EMPTY_GUEST = '(module (memory (export "memory") 1) (func (export "_start")))'

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Child:
    """A forked process: where it takes its job, where its result comes, what the node reads."""

    pid: int
    orders: socket.socket
    result: int
    job: str = ""
    status: int = -1

    def answer(self, facts: dict[str, Any]) -> None:
        """Tell the node how the job ended, once."""
        report(self.status, facts)
        os.close(self.status)
        self.status = -1


class Zygote:
    """Forks, signals and reaps; never blocks on a child and never reads what a guest wrote."""

    def __init__(self, control: socket.socket, uid: int) -> None:
        self.control = control
        self.guests = Guests(uid)
        self.children: dict[int, Child] = {}
        self.spares: list[Child] = []
        self.poll = select.poll()
        self.results: dict[int, Child] = {}

    def run(self) -> None:
        """Serve until the node goes away."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)  # the node decides when this process ends
        poll = self.poll
        poll.register(self.control, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        gc.collect()
        gc.freeze()  # a collection in a child would copy every page
        gc.disable()
        self.fork_spares()
        self.control.send(b"ready")
        while True:
            # Forking waits until a job has had the processors for itself, unless no child is left.
            for fd, _ in poll.poll(None if len(self.spares) == SPARES else FORK_DELAY_MS) or [
                (-1, 0)
            ]:
                if fd < 0:
                    self.fork_spares()
                elif fd in self.results:
                    self.hear(self.results[fd])
                elif fd == wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                    self.reap()
                elif fd == self.control.fileno() and not self.serve():
                    return

    def serve(self) -> bool:
        """Handle one message; False when the node is gone."""
        try:
            data, fds = receive(self.control)
        except OSError:
            return False
        if not data:
            return False
        message = json.loads(data)
        if message["op"] == "start":
            self.start(message, data, fds)
            return True
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "cont": signal.SIGCONT}
        for child in self.children.values():
            if child.job == message["job"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, number[message["op"]])
        return True

    def start(self, message: dict[str, Any], data: bytes, fds: list[int]) -> None:
        """Give the job to the child that waits, then fork the next."""
        order, stdout, stderr, status, module, inputs, outputs = fds
        if not self.spares:
            self.fork_spares()
        child = self.spares.pop(0) if self.spares else None
        try:
            if child is None:
                raise OSError("no child could be forked")
            child.job, child.status = message["job"], status
            send(child.orders, data, [order, stdout, stderr, module, inputs, outputs])
            child.orders.close()
        except OSError as error:  # a child that died before its job is reported when it is reaped
            if child is None:
                report(status, {"failed": str(error)})
                os.close(status)
        self.guests.keep(message["module"], module)
        for fd in (order, stdout, stderr, module, inputs, outputs):
            os.close(fd)

    def fork_spares(self) -> None:
        """Fork the children of the next jobs; fewer when the system has no room for them."""
        while len(self.spares) < SPARES and self.fork_spare():
            pass

    def fork_spare(self) -> bool:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        result_read, result_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(result_read, False)
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            pid = -1
        if pid == 0:
            run_child(self.guests, parent, there.fileno(), result_write)
        there.close()
        os.close(result_write)
        if pid < 0:
            here.close()
            os.close(result_read)
            return False
        self.children[pid] = Child(pid, here, result_read)
        self.spares.append(self.children[pid])
        self.results[result_read] = self.children[pid]
        self.poll.register(result_read, select.POLLIN)
        return True

    def reap(self) -> None:
        """Report every ended child: what it said of itself, its signal and what it used."""
        while self.children:
            pid, wait_status, usage = os.wait4(-1, os.WNOHANG)
            if pid == 0:
                return
            child = self.children.pop(pid)
            if child in self.spares:
                self.spares.remove(child)
            if child.result >= 0:
                self.hear(child)
            child.orders.close()
            if child.status >= 0:
                facts = {"signal": os.WTERMSIG(wait_status)} if os.WIFSIGNALED(wait_status) else {}
                facts["cpu_ms"] = int((usage.ru_utime + usage.ru_stime) * 1000)
                facts["rss_bytes"] = usage.ru_maxrss * 1024
                child.answer(facts)

    def hear(self, child: Child) -> None:
        """Pass on what a child says of itself; a silent one is answered for when reaped."""
        try:
            said = os.read(child.result, RESULT_BYTES_MAX)
        except BlockingIOError:
            return  # the event was of an earlier pipe with this number
        self.poll.unregister(child.result)
        del self.results[child.result]
        os.close(child.result)
        child.result = -1
        if said and child.status >= 0:
            child.answer(json.loads(said))

    def kill_all(self) -> None:
        """The node is gone: nothing outlives it."""
        for child in self.children.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        for child in self.children.values():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, 0)


class Guests:
    """What every child inherits ready-made: engine, linker, the latest modules."""

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.engine = make_engine()
        self.same = Determinism()
        self.linker = wasmtime.Linker(self.engine)
        self.linker.define_wasi()
        self.same.define(self.linker)
        self.empty = wasmtime.Module.deserialize(self.engine, compile_apart(EMPTY_GUEST))
        self.modules: dict[str, wasmtime.Module] = {}

    def keep(self, name: str, fd: int) -> None:
        """Load a module for the children to come; one that does not load fails its own job."""
        if name in self.modules:
            self.modules[name] = self.modules.pop(name)  # last is the latest used
            return
        with contextlib.suppress(wasmtime.WasmtimeError):
            self.modules[name] = wasmtime.Module.deserialize_file(
                self.engine, f"/proc/self/fd/{fd}"
            )
        if len(self.modules) > MODULES_KEPT:
            del self.modules[next(iter(self.modules))]

    def run(
        self, module: wasmtime.Module, wasi: wasmtime.WasiConfig, order: dict[str, Any]
    ) -> dict[str, Any]:
        """Run `_start`; the facts are exit status, trap or refusal, fuel and memory used."""
        store = wasmtime.Store(self.engine)
        store.set_limits(
            memory_size=order["memory_bytes"],
            table_elements=TABLE_ELEMENTS_MAX,
            instances=1,
            tables=8,
            memories=1,
        )
        store.set_fuel(order["fuel"])
        store.set_wasi(wasi)
        self.same.bind(store, fuel=order["fuel"], seed=order["seed"].encode())
        facts: dict[str, Any] = {"memory_bytes": 0}
        memory: wasmtime.Memory | None = None
        try:
            exports = self.linker.instantiate(store, module).exports(store)
            exported = exports.get("memory")
            memory = exported if isinstance(exported, wasmtime.Memory) else None
            start = exports["_start"]
            assert isinstance(start, wasmtime.Func)
            start(store)
            facts["exit"] = 0
        except wasmtime.ExitTrap as ended:
            facts["exit"] = ended.code
        except wasmtime.Trap as trap:
            facts["trap"] = trap.trap_code.name if trap.trap_code else "HOST"
            facts["detail"] = first_lines(trap.message)
        except wasmtime.WasmtimeError as error:
            refused = memory is None and "memory" in str(error)
            facts["trap"] = "MEMORY_LIMIT" if refused else "HOST"
            facts["detail"] = first_lines(str(error))
        facts["fuel"] = order["fuel"] - store.get_fuel()
        if memory is not None:
            facts["memory_bytes"] = memory.data_len(store)
        return facts


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One message and the descriptors that came with it."""
    space = socket.CMSG_SPACE(START_DESCRIPTORS * 4)
    data, ancillary, _, _ = sock.recvmsg(MESSAGE_BYTES_MAX, space)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def send(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    """One message with descriptors."""
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def report(fd: int, facts: dict[str, Any]) -> None:
    """One small JSON object; a node that stopped listening is no error."""
    with contextlib.suppress(OSError):
        os.write(fd, json.dumps(facts).encode()[:RESULT_BYTES_MAX])


def compile_apart(text: str) -> bytes:
    """Compile in a child: compiling starts threads, and this process must stay without."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with os.fdopen(writer, "wb") as out:
            out.write(wasmtime.Module(make_engine(), text).serialize())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as code:
        compiled = code.read()
    os.waitpid(pid, 0)
    return compiled


def run_child(guests: Guests, parent: int, orders: int, result: int) -> NoReturn:
    """The job's process: give everything up, wait for the job, run it and say how it ended."""
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        orders, result = keep_only(orders, result)
        confine(guests.uid, parent)
        wasi = wasmtime.WasiConfig()
        guests.run(guests.empty, wasi, {"memory_bytes": 65536, "fuel": 9, "seed": ""})
        control = socket.socket(fileno=orders)
        data, fds = receive(control)
        control.close()
        if data:
            report(result, run_job(guests, json.loads(data), fds))
            code = 0
    except BaseException as error:  # nothing may unwind into the zygote's loop
        report(result, {"failed": f"{type(error).__name__}: {error}"[:DETAIL_CHARS_MAX]})
    finally:
        os._exit(code)


def run_job(guests: Guests, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Set up this job's streams, folders and limits, then run its guest."""
    cpu_before = time.process_time()
    order_fd, stdout, stderr, code, inputs, outputs = fds
    order = read_order(order_fd)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    module = guests.modules.get(message["module"])
    if module is None:
        module = wasmtime.Module.deserialize_file(guests.engine, f"/proc/self/fd/{code}")
    wasi = wasmtime.WasiConfig()
    wasi.argv = order["argv"]
    wasi.env = order["env"]
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    wasi.preopen_dir(f"/proc/self/fd/{inputs}", "/in", False)
    wasi.preopen_dir(f"/proc/self/fd/{outputs}", "/out", True)
    for fd in fds:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], order["file_bytes"]))
    cpu_s = order["cpu_s"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    facts = guests.run(module, wasi, order)
    facts["cpu_ms"] = int((time.process_time() - cpu_before) * 1000)
    os.dup2(0, 1)  # the node reads the guest's streams to their end
    os.dup2(0, 2)
    return facts


def keep_only(orders: int, result: int) -> tuple[int, int]:
    """Descriptors become 0 to 2 nothing, 3 the orders, 4 the result; no other pipe or socket."""
    high = [os.dup(fd) for fd in (orders, result)]
    while min(high) < 5:
        high = [os.dup(fd) for fd in high]
    nothing = os.open("/dev/null", os.O_RDWR)
    for target, fd in enumerate((nothing, nothing, nothing, *high)):
        os.dup2(fd, target, inheritable=False)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        with contextlib.suppress(OSError):  # the listing's own is gone
            # Regular files are the code of loaded modules, which wasmtime maps when it needs it.
            if fd > 4 and not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
    return 3, 4


def confine(uid: int, parent: int) -> None:
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
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise RuntimeError("the zygote is gone")


def read_order(fd: int) -> dict[str, Any]:
    """The order, written by the node into an anonymous file."""
    size = os.fstat(fd).st_size
    if size > ORDER_BYTES_MAX:
        raise ValueError("the order is too large")
    data = b""
    while len(data) < size:
        part = os.pread(fd, size - len(data), len(data))
        if not part:
            raise ValueError("the order is cut short")
        data += part
    order: dict[str, Any] = json.loads(data)
    return order


def first_lines(text: str) -> str:
    """A trap's message without the depth of its backtrace."""
    lines = (line.strip() for line in text.splitlines()[:4])
    return " / ".join(line for line in lines if line)[:DETAIL_CHARS_MAX]


def main() -> None:
    """Entry point: the socket's descriptor and the guests' user, 0 to stay who we are."""
    zygote = Zygote(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    try:
        zygote.run()
    finally:
        zygote.kill_all()


if __name__ == "__main__":
    main()
