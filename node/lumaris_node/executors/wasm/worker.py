"""The wasm zygote: a small single-threaded process that forks one killable worker for each lease.

It runs as a program, imports only the standard library and wasmtime, and holds an engine, a linker
and the latest modules, which workers inherit. The node speaks to it over one SOCK_SEQPACKET socket:
`take` gives a worker to a lease, with the socket on which the node sends it orders, a lifeline, and
the code of the module it will most likely need; `kill`, `stop` and `cont` name a lease. The
lifeline gets the worker's process id at once and, when the worker was reaped, what it used and the
signal that ended it; it is open for as long as the worker lives.

Workers are forked in advance: they have given up every right and have run an empty guest, so that
a lease waits for neither. A worker serves one lease and ends with it.

When the node goes away the socket ends, every worker is killed and so is this process; should this
process be killed, the kernel kills the workers (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

from lumaris_node.executors.wasm import confine
from lumaris_node.executors.wasm.guest import Guests, receive, run_worker, send

RESULT_BYTES_MAX = 4096  # one atomic pipe write
FORK_DELAY_MS = 5
SPARES = 2  # one to take the next lease while the other is being made ready
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "cont": signal.SIGCONT}


@dataclass
class Worker:
    """A forked process, where it is told its lease, and where the node learns of its end."""

    pid: int
    control: socket.socket
    lease: str = ""
    lifeline: int = -1


class Zygote:
    """Forks, signals and reaps; never waits for a worker and never reads what one wrote."""

    def __init__(self, control: socket.socket, uid: int) -> None:
        self.control, self.uid = control, uid
        self.guests = Guests()
        self.workers: dict[int, Worker] = {}
        self.spares: list[Worker] = []

    def run(self) -> None:
        """Serve until the node goes away."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)  # the node decides when this process ends
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        confine.leave_networks()
        gc.collect()
        gc.freeze()  # a collection in a worker would copy every page
        gc.disable()
        self.fork_spares()
        self.control.send(b"ready")
        while True:
            # Forking waits until an order has had the processors for itself, unless none is left.
            ready = poll.poll(None if len(self.spares) == SPARES else FORK_DELAY_MS)
            if not ready:
                self.fork_spares()
            for fd, _ in ready:
                if fd == wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                    self.reap()
                elif not self.serve():
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
        if message["op"] == "take":
            self.take(message, fds)
            return True
        for worker in self.workers.values():
            if worker.lease == message["lease"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, SIGNALS[message["op"]])
        return True

    def take(self, message: dict[str, Any], fds: list[int]) -> None:
        """Give the lease the worker that waits; the next is forked later."""
        orders, lifeline, module = fds
        if not self.spares:
            self.fork_spares()
        worker = self.spares.pop(0) if self.spares else None
        if worker is None:
            report(lifeline, {"failed": "no worker could be forked"})
            os.close(lifeline)
        else:
            worker.lease, worker.lifeline = message["lease"], lifeline
            report(lifeline, {"pid": worker.pid})
            with contextlib.suppress(OSError):  # one that died is reported when it is reaped
                send(worker.control, b"take", [orders])
            worker.control.close()
        os.close(orders)
        self.guests.keep(message["module"], module)
        os.close(module)

    def fork_spares(self) -> None:
        """Fork the workers of the next leases; fewer when the system has no room for them."""
        while len(self.spares) < SPARES and self.fork_spare():
            pass

    def fork_spare(self) -> bool:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            pid = -1
        if pid == 0:
            run_worker(self.guests, self.uid, parent, there.fileno())
        there.close()
        if pid < 0:
            here.close()
            return False
        self.workers[pid] = Worker(pid, here)
        self.spares.append(self.workers[pid])
        return True

    def reap(self) -> None:
        """Report every ended worker: its signal and what it used."""
        while self.workers:
            pid, wait_status, usage = os.wait4(-1, os.WNOHANG)
            if pid == 0:
                return
            worker = self.workers.pop(pid)
            if worker in self.spares:
                self.spares.remove(worker)
            worker.control.close()
            if worker.lifeline >= 0:
                facts = {"signal": os.WTERMSIG(wait_status)} if os.WIFSIGNALED(wait_status) else {}
                facts["cpu_ms"] = int((usage.ru_utime + usage.ru_stime) * 1000)
                facts["rss_bytes"] = usage.ru_maxrss * 1024
                report(worker.lifeline, facts)
                os.close(worker.lifeline)

    def kill_all(self) -> None:
        """The node is gone: nothing outlives it."""
        for worker in self.workers.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
        for worker in self.workers.values():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(worker.pid, 0)


def report(fd: int, facts: dict[str, Any]) -> None:
    """One small JSON object on a line; a node that stopped listening is no error."""
    with contextlib.suppress(OSError):
        os.write(fd, json.dumps(facts).encode()[:RESULT_BYTES_MAX] + b"\n")


def main() -> None:
    """Entry point: the socket's descriptor and the guests' user, 0 to stay who we are."""
    zygote = Zygote(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    try:
        zygote.run()
    finally:
        zygote.kill_all()


if __name__ == "__main__":
    main()
