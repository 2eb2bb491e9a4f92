"""A wasm worker: the process that runs one lease's orders, one after another.

Between orders it keeps the engine and the compiled modules, nothing of a guest: each order has a
store, an instance, memory, folders and streams of its own, which are gone before its result is
told. Forked from the zygote, it may import nothing heavier than wasmtime.
"""

from __future__ import annotations

import array
import contextlib
import gc
import json
import os
import resource
import signal
import socket
import stat
import time
from typing import Any, NoReturn

import wasmtime

from lumaris_node.executors.wasm import confine
from lumaris_node.executors.wasm.engine import Determinism, entry_of, make_engine, offer_no_host
from lumaris_node.executors.wasm.memory import GuestMemory

# What one order takes with it: stdin, stdout, stderr, the module's code, an order that is too long
# for the message, and its folders.
FOLDERS_MAX = 16
DESCRIPTORS_MAX = 5 + FOLDERS_MAX
MESSAGE_BYTES_MAX = 64 * 1024
ORDER_BYTES_MAX = 64 * 1024 * 1024
RESULT_BYTES_MAX = 4096
TABLE_ELEMENTS_MAX = 1_000_000
DETAIL_CHARS_MAX = 400
MODULES_KEPT = 8
EMPTY_GUEST = '(module (memory (export "memory") 1) (func (export "_start")))'


class Guests:
    """What every worker inherits ready-made: engine, linker, the latest modules."""

    def __init__(self) -> None:
        self.memory = GuestMemory()
        self.engine = make_engine(self.memory)
        self.same = Determinism()
        self.linker = wasmtime.Linker(self.engine)
        self.linker.define_wasi()
        self.same.define(self.linker)
        offer_no_host(self.linker)
        self.empty = wasmtime.Module.deserialize(self.engine, compile_apart(EMPTY_GUEST))
        self.modules: dict[str, wasmtime.Module] = {}
        self.filter = confine.guest_filter()

    def keep(self, name: str, fd: int) -> None:
        """Load a module for the workers to come; one that does not load fails its own order."""
        with contextlib.suppress(wasmtime.WasmtimeError):
            self.load(name, fd)

    def load(self, name: str, fd: int) -> wasmtime.Module:
        """The module of that name, from the open file of its code if it is not loaded yet."""
        module = self.modules.pop(name, None)
        if module is None:
            module = wasmtime.Module.deserialize_file(self.engine, f"/proc/self/fd/{fd}")
        self.modules[name] = module  # last is the latest used
        if len(self.modules) > MODULES_KEPT:
            del self.modules[next(iter(self.modules))]
        return module

    def run(
        self, module: wasmtime.Module, wasi: wasmtime.WasiConfig, order: dict[str, Any]
    ) -> dict[str, Any]:
        """Run the guest; the facts are exit status, trap or refusal, fuel and memory used."""
        facts: dict[str, Any] = {}
        self.memory.begin(order["memory_bytes"])
        store = wasmtime.Store(self.engine)
        try:
            store.set_limits(table_elements=TABLE_ELEMENTS_MAX, instances=1, tables=8, memories=1)
            store.set_fuel(order["fuel"])
            store.set_wasi(wasi)
            self.same.bind(store, fuel=order["fuel"], seed=order["seed"].encode())
            self.call(store, module, facts)
            facts["fuel"] = order["fuel"] - store.get_fuel()
        finally:
            self.same.unbind()
            store.close()
        facts["memory_bytes"] = self.memory.peak_bytes
        facts["refusals"] = self.memory.refusals
        return facts

    def call(self, store: wasmtime.Store, module: wasmtime.Module, facts: dict[str, Any]) -> None:
        """Instantiate and call what the module starts with."""
        try:
            exports = self.linker.instantiate(store, module).exports(store)
            for name in entry_of(module):
                function = exports[name]
                assert isinstance(function, wasmtime.Func)
                facts["exit"] = function(store) or 0
        except wasmtime.ExitTrap as ended:
            facts["exit"] = ended.code
        except wasmtime.Trap as trap:
            facts["trap"] = trap.trap_code.name if trap.trap_code else "HOST"
            facts["detail"] = first_lines(trap.message)
        except wasmtime.WasmtimeError as error:
            facts["trap"] = "HOST"
            facts["detail"] = first_lines(str(error))


def receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One message and the descriptors that came with it."""
    space = socket.CMSG_SPACE(DESCRIPTORS_MAX * 4)
    data, ancillary, _, _ = sock.recvmsg(MESSAGE_BYTES_MAX, space)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def send(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    """One message with descriptors."""
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def compile_apart(text: str) -> bytes:
    """Compile in a child: compiling starts threads, and this process must stay without."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with os.fdopen(writer, "wb") as out:
            out.write(wasmtime.Module(make_engine(GuestMemory()), text).serialize())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as code:
        compiled = code.read()
    os.waitpid(pid, 0)
    return compiled


def run_worker(guests: Guests, uid: int, parent: int, control: int) -> NoReturn:
    """The worker's process: give everything up, wait for a lease, run its orders to its end."""
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control = keep_only(control)
        confine.limit(uid)
        confine.die_with(parent)
        confine.filter_calls(guests.filter)
        wasi = wasmtime.WasiConfig()
        guests.run(guests.empty, wasi, {"memory_bytes": 65536, "fuel": 9, "seed": ""})
        with socket.socket(fileno=control) as taken:
            _, fds = receive(taken)
        if fds:
            with socket.socket(fileno=fds[0]) as orders:
                serve_lease(guests, orders)
        code = 0
    except BaseException:  # nothing may unwind into the zygote's loop
        code = 1
    finally:
        os._exit(code)


def serve_lease(guests: Guests, orders: socket.socket) -> None:
    """Orders until the node closes the socket, which is the lease's end."""
    while True:
        data, fds = receive(orders)
        if not data:
            return
        try:
            facts = run_order(guests, data, fds)
        except Exception as error:
            facts = {"failed": f"{type(error).__name__}: {error}"[:DETAIL_CHARS_MAX]}
        close_streams()  # the node reads the guest's streams to their end
        orders.send(json.dumps(facts).encode()[:RESULT_BYTES_MAX])
        gc.collect()


def run_order(guests: Guests, data: bytes, fds: list[int]) -> dict[str, Any]:
    """Set up this order's streams, folders and limits, then run its guest."""
    cpu_before = time.process_time()
    try:
        stdout, stderr, code, *rest = fds
        order = json.loads(data)
        stdin = rest.pop(0) if order["stdin"] else -1
        if order.get("long"):
            order = read_order(rest.pop(0))
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        module = guests.load(order["module"], code)
        wasi = wasmtime.WasiConfig()
        wasi.argv = order["argv"]
        wasi.env = order["env"]
        if order["stdin"]:
            open_stdin(wasi, stdin)
        wasi.inherit_stdout()
        wasi.inherit_stderr()
        for (guest, writable), fd in zip(order["folders"], rest, strict=True):
            wasi.preopen_dir(f"/proc/self/fd/{fd}", guest, writable)
    finally:
        for fd in fds:
            os.close(fd)
    # Soft limits, which the next order may have otherwise; a guest cannot change them.
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], hard))
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_before) + 1 + order["cpu_s"], hard))
    facts = guests.run(module, wasi, order)
    facts["cpu_ms"] = int((time.process_time() - cpu_before) * 1000)
    return facts


def open_stdin(wasi: wasmtime.WasiConfig, fd: int) -> None:
    """Open the pipe anew: what the process inherits as a stream would be shared between orders."""
    path = f"/proc/self/fd/{fd}"
    # Opening a pipe to read waits for a writer, and the node may have closed it already.
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        wasi.stdin_file = path
    finally:
        os.close(writer)


def close_streams() -> None:
    """What the guest printed to is closed."""
    os.dup2(0, 1)
    os.dup2(0, 2)


def keep_only(control: int) -> int:
    """Descriptors become 0 to 2 nothing, 3 the control socket; no other pipe or socket."""
    high = os.dup(control)
    while high < 4:
        high = os.dup(high)
    nothing = os.open("/dev/null", os.O_RDWR)
    for target, fd in enumerate((nothing, nothing, nothing, high)):
        os.dup2(fd, target, inheritable=False)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        with contextlib.suppress(OSError):  # the listing's own is gone
            # Regular files are the code of loaded modules, which wasmtime maps when it needs it.
            if fd > 3 and not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
    return 3


def read_order(fd: int) -> dict[str, Any]:
    """The part of an order that is too long for a message, from an anonymous file of the node."""
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
