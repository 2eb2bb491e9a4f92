"""A devnet: one coordinator, some sellers and a funded buyer, each its own process on loopback.

Everything lives in one folder; `devnet.json` in it names the processes by pid and start time, so
that only processes this devnet started are ever ended.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from lumaris.client import Client
from lumaris_overlay.private_files import make_private_folder
from lumaris_overlay.process_file import start_ticks
from lumaris_protocol import codes
from lumaris_protocol.errors import LumarisError

NETWORK = "devnet"
BUYER_CREDIT = "100"
_READY_S = 60.0
# A node that offers no wasm attacks its other tiers first, and its neighbours do at the same time.
_TESTED_READY_S = 300.0
_STOP_S = 15.0
_POLL_S = 0.02
_LINGER_S = 2  # the buyer's overlay outlives a client only long enough for the next one


@dataclass
class Program:
    """One process of the devnet. `started` tells it from a later process with the same pid."""

    role: str
    state: str
    pid: int
    started: int
    peer: str
    address: str

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return self.started != 0 and start_ticks(self.pid) == self.started

    def end(self, number: int = signal.SIGTERM, *, wait_s: float = _STOP_S) -> None:
        """Signal it and wait until it is gone; SIGKILL when it does not go."""
        if not self.alive:
            return
        os.kill(self.pid, number)
        if not _wait_gone(self, wait_s) and self.alive:
            os.kill(self.pid, signal.SIGKILL)
            _wait_gone(self, wait_s)

    def describe(self) -> dict[str, Any]:
        """For status output."""
        return {**asdict(self), "alive": self.alive}


@dataclass
class Devnet:
    """A running devnet. As a context manager it ends everything and removes its folder.

    `sellers` is the number of nodes, `keep` leaves the folder for a look afterwards, `tiers` are
    what they offer: all that work here when empty. `egress` is what their jobs may connect to.
    """

    state: Path
    sellers: int = 3
    keep: bool = False
    tiers: tuple[str, ...] = ()
    egress: tuple[str, ...] = ()
    coordinator: Program | None = None
    nodes: list[Program] = field(default_factory=list)
    # Every process from the moment it exists, so that an interrupted start leaves none behind.
    _launched: list[_Launch] = field(default_factory=list)

    def __enter__(self) -> Devnet:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        if not self.keep:
            self.remove()

    @property
    def url(self) -> str:
        """The coordinator's address."""
        if self.coordinator is None:
            raise LumarisError("not_running", "The devnet is not up.")
        return self.coordinator.address

    @property
    def buyer_state(self) -> Path:
        """The funded buyer's folder."""
        return self.state / "buyer"

    def start(self) -> None:
        """Start everything and fund the buyer. Raises LumarisError; call `stop` then."""
        make_private_folder(self.state)
        self.start_coordinator()
        self.save()
        with ThreadPoolExecutor(max_workers=max(1, self.sellers)) as pool:
            starts = [
                pool.submit(self.start_seller, f"seller-{index + 1}")
                for index in range(self.sellers)
            ]
            # Even when one fails or we are interrupted, the others are known and can be ended.
            wait(starts)
        self.nodes = [start.result() for start in starts]
        self.save()

    def start_coordinator(self) -> None:
        """Start the coordinator, on its old port when it had one."""
        folder = self.state / "coordinator"
        port = self.coordinator.address.rpartition(":")[2] if self.coordinator else "0"
        arguments = ["--state", str(folder), "--network", NETWORK, "--port", port]
        self.coordinator = self._spawn("coordinator", "lumaris_coordinator", folder, arguments)

    def start_seller(self, name: str) -> Program:
        """Start a node in its folder, new or left from before."""
        folder = self.state / name
        modules = self.state / "modules"
        make_private_folder(modules)
        accepted = {"runtimes": self.tiers, "egress": self.egress}
        lines = [f"{key} = {json.dumps(words)}\n" for key, words in accepted.items() if words]
        if lines:
            make_private_folder(folder)
            (folder / "node.toml").write_text("".join(["[accept]\n", *lines]))
        arguments = ["--state", str(folder), "--coordinator", self.url, "--modules", str(modules)]
        return self._spawn(name, "lumaris_node", folder, arguments)

    def _spawn(self, role: str, module: str, folder: Path, arguments: Sequence[str]) -> Program:
        program = _launch(role, module, folder, arguments, self._launched)
        quick = not self.tiers or "wasm" in self.tiers
        _wait_ready(program, folder / "log", _READY_S if quick else _TESTED_READY_S)
        return program.named()

    def client(self) -> Client:
        """The devnet's buyer, funded on first use. Its overlay process ends with it."""
        client = Client(state=self.buyer_state, coordinator=self.url, overlay_linger_s=_LINGER_S)
        try:
            account = client.account()
            if account.free_nanos + account.held_nanos == 0:
                client.deposit_test_credit(BUYER_CREDIT)
        except BaseException:
            client.close()
            raise
        return client

    def seller(self, peer: str) -> Program:
        """The node with a peer id."""
        return next(node for node in self.nodes if node.peer == peer)

    def save(self) -> None:
        """Write `devnet.json`."""
        assert self.coordinator is not None
        record = {
            "coordinator": asdict(self.coordinator),
            "sellers": [asdict(node) for node in self.nodes],
        }
        part = self.state / "devnet.part"
        part.write_text(json.dumps(record, indent=2))
        part.replace(self.state / "devnet.json")

    def stop(self) -> None:
        """End every process, sellers before the coordinator so that they can settle."""
        _end_buyer_overlay(self.buyer_state)
        known = {program.pid for program in _programs(self)}
        for launch in self._launched:
            if launch.process.pid not in known:
                launch.process.terminate()
        with ThreadPoolExecutor(max_workers=max(1, len(self.nodes))) as pool:
            list(pool.map(Program.end, self.nodes))
        if self.coordinator is not None:
            self.coordinator.end()
        for launch in self._launched:
            try:
                launch.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                launch.process.kill()
                launch.process.wait()

    def remove(self) -> None:
        """Remove what this devnet made, and its folder when nothing else is in it."""
        names = [f"seller-{index + 1}" for index in range(self.sellers)]
        for name in (*names, "coordinator", "buyer", "modules"):
            shutil.rmtree(self.state / name, ignore_errors=True)
        for name in ("devnet.json", "devnet.part"):
            (self.state / name).unlink(missing_ok=True)
        try:
            self.state.rmdir()
        except OSError:
            return  # a file of the user's own lies in it


def up(
    state: Path, sellers: int = 3, *, tiers: tuple[str, ...] = (), egress: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Start a devnet that outlives this command. Raises LumarisError `already_running`."""
    state = state.resolve()
    found = _load(state)
    if found is not None and any(program.alive for program in _programs(found)):
        raise LumarisError("already_running", f"A devnet runs in {state}.")
    net = Devnet(state, sellers, tiers=tiers, egress=egress)
    try:
        net.start()
        net.client().close()
    except BaseException:
        net.stop()
        raise
    return status(state)


def down(state: Path) -> dict[str, Any]:
    """End a devnet and remove its folder. Raises LumarisError `not_running`."""
    net = _load(state)
    if net is None:
        raise LumarisError("not_running", f"There is no devnet in {state}.")
    ended = sum(program.alive for program in _programs(net))
    net.stop()
    net.remove()
    return {"ended": ended, "state": str(state)}


def status(state: Path) -> dict[str, Any]:
    """What runs. Raises LumarisError `not_running`."""
    net = _load(state)
    if net is None or net.coordinator is None:
        raise LumarisError("not_running", f"There is no devnet in {state}.")
    return {
        "state": str(state),
        "coordinator": {**net.coordinator.describe(), "url": net.coordinator.address},
        "sellers": [node.describe() for node in net.nodes],
        "buyer": {"state": str(net.buyer_state)},
    }


def _load(state: Path) -> Devnet | None:
    try:
        record = json.loads((state / "devnet.json").read_text())
        nodes = [Program(**item) for item in record["sellers"]]
        return Devnet(state, len(nodes), coordinator=Program(**record["coordinator"]), nodes=nodes)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LumarisError("config_invalid", f"{state}/devnet.json: {error}") from None


def _programs(net: Devnet) -> list[Program]:
    return [*net.nodes, *([net.coordinator] if net.coordinator else [])]


@dataclass
class _Launch:
    """A started process that may not be ready yet."""

    role: str
    state: str
    process: subprocess.Popen[bytes]
    log_position: int
    words: list[str] = field(default_factory=list)

    def named(self) -> Program:
        """The process with the peer and address it announced."""
        pid = self.process.pid
        return Program(self.role, self.state, pid, start_ticks(pid), self.words[1], self.words[2])


def _launch(
    role: str, module: str, folder: Path, arguments: Sequence[str], launched: list[_Launch]
) -> _Launch:
    """Start a program and put it on the list at once."""
    make_private_folder(folder)
    with (folder / "log").open("ab") as errors:
        position = errors.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    launch = _Launch(role, str(folder), process, position)
    launched.append(launch)
    return launch


def _wait_ready(launch: _Launch, log: Path, within_s: float) -> None:
    """Wait for `ready PEER ADDRESS`. Raises the LumarisError that the program printed instead."""
    process = launch.process
    assert process.stdout is not None, "it was started with a pipe"
    with process.stdout as output:
        ready, _, _ = select.select([output], [], [], within_s)
        launch.words = output.readline().decode(errors="replace").split() if ready else []
    if len(launch.words) != 3 or launch.words[0] != "ready":
        process.kill()
        process.wait()
        raise _why(launch.role, log, launch.log_position)
    threading.Thread(target=process.wait, daemon=True).start()  # leaves no zombie behind


def _why(role: str, log: Path, position: int) -> LumarisError:
    with log.open("rb") as file:
        file.seek(position)
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        words = line.split(" ", 2)
        if len(words) == 3 and words[0] == "error" and words[1] in codes.CODES:
            return LumarisError(words[1], f"{role}: {words[2]}")
    return LumarisError("internal", f"{role} did not start; see {log}.")


def _wait_gone(program: Program, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while program.alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _end_buyer_overlay(buyer: Path) -> None:
    """The buyer's overlay may linger after its last command: it is told to go."""
    import trio

    from lumaris_overlay.socket.client import open_socket_overlay

    path = buyer / "overlay" / "overlay.sock"
    if not path.exists():
        return

    async def end() -> None:
        with trio.move_on_after(_STOP_S):
            try:
                async with open_socket_overlay(path) as overlay:
                    await overlay.shutdown()
                while path.exists():  # noqa: ASYNC110 - another process removes it
                    await trio.sleep(_POLL_S)
            except LumarisError:
                path.unlink(missing_ok=True)

    trio.run(end)
