"""A market whose sellers really run strangers' code, and how to see that nothing of it is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from lumaris.client import Client
from lumaris.jobs import JobRequest, JobResult, JobUpdate, LogLine, Observer, ignore
from lumaris.testing.devnet import Devnet, Program
from lumaris_node.sandbox.cgroups import mark_of
from lumaris_node.selftest import image as guests
from lumaris_overlay.private_files import make_private_folder
from lumaris_protocol import receipts
from lumaris_protocol.limits import MIB
from lumaris_protocol.messages.advert import Tier

WASM_IMAGE = "python:3.12-wasi"
# The bound of a crowded machine; on a quiet one each wait is a second or two.
WAIT_S = 90.0
# What a native guest's environment holds, so that its processes are told from all others.
MARK = "LUMARIS_TEST_MARK"
TIERS = ("process", "wasm", pytest.param("container", marks=pytest.mark.docker))
NATIVE = ("process", pytest.param("container", marks=pytest.mark.docker))
QUICK = "print(6 * 7)"
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Shelf:
    """What is made once for all tests: a guest image, and what sellers keep with their modules."""

    guest: guests.GuestImage
    modules: Path

    def stock(self, net: Devnet, settings: str) -> None:
        """Give a devnet that has not started its seller's settings, and what is kept."""
        seller, modules = net.state / "seller-1", net.state / "modules"
        for folder in (net.state, seller, modules):
            make_private_folder(folder)
        (seller / "node.toml").write_text(settings)
        for file in self.modules.iterdir():
            os.link(file, modules / file.name)

    def keep(self, net: Devnet) -> None:
        """Take native code and reports of self-tests: the next seller need not make them."""
        for file in (net.state / "modules").iterdir():
            target = self.modules / file.name
            if file.suffix in (".cwasm", ".json") and not target.exists():
                os.link(file, target)


def settings(*tiers: str, egress: str = "", more: str = "") -> str:
    """The `node.toml` of a seller with these tiers and two cores for sale."""
    names = ", ".join(f'"{tier}"' for tier in tiers)
    rules = f'egress = ["{egress}"]\n' if egress else ""
    return f"{more}[share]\ncpu_threads = 2\n[accept]\nruntimes = [{names}]\n{rules}"


@dataclass
class Arena:
    """A running devnet with one seller, its tiers, and buyers by name."""

    net: Devnet
    shelf: Shelf
    tiers: tuple[str, ...]
    mark: str = field(default_factory=lambda: os.urandom(8).hex())
    clients: dict[str, Client] = field(default_factory=dict)
    containers: set[str] = field(default_factory=set)

    @property
    def seller(self) -> Program:
        return self.net.nodes[0]

    @property
    def folder(self) -> Path:
        return Path(self.seller.state)

    def client(self, name: str = "buyer") -> Client:
        """A funded buyer."""
        if name not in self.clients:
            if name == "buyer":
                self.clients[name] = self.net.client()
            else:
                state = self.net.state / name
                client = Client(state=state, coordinator=self.net.url, overlay_linger_s=1)
                self.clients[name] = client
                client.deposit_test_credit("100")
        return self.clients[name]

    def log(self) -> str:
        """The end of what the seller wrote."""
        return read(self.folder / "log")[-4000:]

    def close(self) -> None:
        """Close the buyers, also the folders of those that the devnet does not know."""
        for name, client in self.clients.items():
            client.close()
            if name != "buyer":
                folder = self.net.state / name
                overlay = folder / "overlay" / "overlay.sock"
                eventually(lambda: not overlay.exists(), "its overlay has ended")  # noqa: B023
                eventually(lambda: removed(folder), "its folder is gone")  # noqa: B023
        self.clients.clear()

    def request(self, tier: str, code: str, **more: object) -> JobRequest:
        """A job of that code in Python; native guests have only a small part of its library."""
        wasm = tier == "wasm"
        command = ("python", "-c", code) if wasm else (*guests.COMMAND[:4], "-c", code)
        image = WASM_IMAGE if wasm else str(self.shelf.guest.archive)
        named: Tier | None = None if wasm else ("process" if tier == "process" else "container")
        fields: dict[str, object] = {
            "environment": {MARK: self.mark} | ({} if wasm else guests.ENVIRONMENT),
            "cpu_millis": 500,
            "memory_bytes": 256 * MIB,
            "wall_s": 60,
            "attempts": 1,
        }
        return JobRequest(image, command, tier=named, **(fields | more))  # type: ignore[arg-type]

    def run(
        self,
        tier: str,
        code: str,
        *,
        buyer: str = "buyer",
        observe: Observer = ignore,
        request: JobRequest | None = None,
        **more: object,
    ) -> JobResult:
        """Run one job, that code or a request, to its end."""

        def look(event: JobUpdate | LogLine) -> None:
            if tier == "container" and isinstance(event, JobUpdate) and event.state == "running":
                self.containers.update(self.listed_containers())
            observe(event)

        wanted = request or self.request(tier, code, **more)
        return self.client(buyer).run_request(wanted, observe=look)

    @contextmanager
    def running(
        self, tier: str, code: str, *, until: str = "running", buyer: str = "buyer", **more: Any
    ) -> Iterator[Future[JobResult]]:
        """A job that runs in another thread; the block begins once it is in that state."""
        there = threading.Event()

        def observe(event: JobUpdate | LogLine) -> None:
            seen = event.state if isinstance(event, JobUpdate) else event.data.decode().strip()
            if seen == until:
                there.set()

        self.client(buyer)
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(self.run, tier, code, buyer=buyer, observe=observe, **more)
            job.add_done_callback(lambda _: there.set())
            assert there.wait(WAIT_S), f"the job was never {until}"
            assert not job.done(), job.result()
            yield job

    def offered(self) -> set[str]:
        """The tiers that the seller's offer names now."""
        return {
            runtime.tier
            for offer in self.client().offers()
            if offer.message.seller == self.seller.peer
            for runtime in offer.message.runtimes
        }

    def restart(self) -> None:
        """Start the seller again in its folder."""
        self.net.nodes[0] = self.net.start_seller(self.seller.role)
        eventually(lambda: set(self.tiers) <= self.offered(), "all tiers are offered again")

    # --- what is left ---

    def listed_containers(self) -> set[str]:
        """Full ids of the seller's containers; none without an engine."""
        if "container" not in self.tiers:
            return set()
        label = f"label=lumaris.node={self.seller.peer}"
        command = ["docker", "ps", "-aq", "--no-trunc", "--filter", label]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        return set(found.stdout.split())

    def left(self) -> dict[str, list[str]]:
        """Everything of this seller's guests that this machine still holds, by kind."""
        mark, state = mark_of(self.seller.peer), str(self.net.state)
        containers = sorted(self.listed_containers())
        found = {
            "processes": [*marked(self.mark), *shims_of(self.containers)],
            "containers": containers,
            "groups": [
                path
                for path, _, _ in os.walk(CGROUPS)
                if Path(path).name.startswith(mark) or Path(path).name in self.containers
            ],
            "mounts": [line for line in read(Path("/proc/mounts")).splitlines() if state in line],
            "loops": [
                str(path)
                for path in Path("/sys/block").glob("loop*/loop/backing_file")
                if state in read(path)
            ],
            "volumes": [str(path) for path in (self.folder / "volumes").glob("*")],
            "temporary": [str(path) for path in (self.net.state.parent / "tmp").glob("*")],
        }
        return {kind: names for kind, names in found.items() if names}

    def nothing_left(self) -> None:
        """Wait until nothing is left; within the time that sessions take to end."""
        eventually(lambda: not self.left(), "nothing is left", why=self.left)

    def settle(self) -> None:
        """End all sessions; then nothing is left, and the money rests."""
        for client in self.clients.values():
            assert_money_rests(client)
        self.nothing_left()


@contextmanager
def arena(
    folder: Path, shelf: Shelf, tiers: tuple[str, ...], *, egress: str = "", wait: bool = True
) -> Iterator[Arena]:
    """A market with one seller of these tiers. At its end nothing of it is left."""
    net = Devnet(folder / "net", sellers=1)
    shelf.stock(net, settings(*tiers, egress=egress))
    temporary = folder / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        with net:
            found = Arena(net, shelf, tiers)
            try:
                if wait:
                    eventually(
                        lambda: set(tiers) <= found.offered(), "all tiers offered", why=found.log
                    )
                    shelf.keep(net)
                yield found
                shelf.keep(net)
            finally:
                found.close()
    assert not net.state.exists()


def eventually(
    holds: Callable[[], bool], what: str, *, why: Callable[[], object] | None = None
) -> None:
    """Wait until something holds, at most WAIT_S; `why` tells more of a failure."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"still not: {what}: {why() if why else ''}")
        time.sleep(0.05)


def read(path: Path) -> str:
    """A small file's text; "" when it is gone."""
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def marked(mark: str) -> list[str]:
    """Processes of this machine whose environment holds the mark, or that an ended one left."""
    return [
        f"{entry.name} {read(entry / 'cmdline')[:80]!r}"
        for entry in Path("/proc").glob("[0-9]*")
        if f"{MARK}={mark}" in read(entry / "environ")
    ]


def removed(folder: Path) -> bool:
    """Remove a folder; an ending process may still write its last file there."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def shims_of(containers: set[str]) -> list[str]:
    """Processes that an engine keeps for these containers."""
    return [
        line
        for entry in Path("/proc").glob("[0-9]*")
        if "containerd-shim" in (line := read(entry / "cmdline"))
        and any(name in line for name in containers)
    ]


def family(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def settled(client: Client) -> bool:
    client.settle()
    return all(item["state"] == "settled" for item in client.sessions())


def assert_money_rests(client: Client) -> None:
    """Everything is settled, the ledger balances, and every receipt verifies offline."""
    eventually(lambda: settled(client), "all sessions settled")
    audit = client.audit()
    assert audit.balanced and audit.sum_nanos == 0
    assert client.account().held_nanos == 0
    trusted = frozenset({client.coordinator})
    for item in client.sessions():
        bundle = client.receipt(item["session"])
        assert bundle is not None
        assert receipts.verify_bundle(bundle, trusted=trusted).verdict == "valid"
