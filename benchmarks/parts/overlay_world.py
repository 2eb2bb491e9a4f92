"""Hosts for the overlay's benchmarks: a coordinator's key, certificates, adverts and processes."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from lumaris_overlay.ports import AdvertEvent, Overlay
from lumaris_overlay.private_files import write_key
from lumaris_overlay.socket.client import SocketOverlay
from lumaris_overlay.supervisor import OverlayConfig, OverlayProcess
from lumaris_overlay.tasks import background
from lumaris_protocol import codec
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.advert import (
    Advert,
    MembershipCertificate,
    PriceTable,
    Resources,
    Runtime,
)
from lumaris_protocol.messages.negotiation import Requirements

NETWORK = "bench"
COORDINATOR = KeyPair(secrets.token_bytes(32))
KEYS = frozenset({COORDINATOR.peer_id})
_TICKS = os.sysconf("SC_CLK_TCK")
_LINKS = 3  # peers that each host dials; gossip does the rest


def new_key() -> KeyPair:
    """A fresh identity."""
    return KeyPair(secrets.token_bytes(32))


def certificate(key: KeyPair) -> bytes:
    """A membership in both roles."""
    now = int(time.time())
    return codec.sign(
        MembershipCertificate(
            peer=key.peer_id,
            account="acc_" + "a" * 24,
            roles=("buyer", "seller"),
            bond_band=0,
            serial=1,
            issued_at=now,
            expires_at=now + 24 * 3600,
        ),
        COORDINATOR,
        NETWORK,
    ).data


def advert(key: KeyPair, seq: int = 1, *, certified: bytes = b"", price: int = 1) -> bytes:
    """A signed advert of one hardware thread."""
    now = int(time.time())
    resources = Resources(cpu_millis=1000, memory_bytes=1 << 30, disk_bytes=1 << 30)
    return codec.sign(
        Advert(
            seller=key.peer_id,
            seq=seq,
            issued_at=now,
            expires_at=now + 900,
            region="local",
            total=resources,
            free=resources,
            runtimes=(Runtime(tier="wasm", version="1", assurance="wasm-1"),),
            benchmarks={},
            prices=PriceTable(
                currency="TEST", start_nanos=price, cpu_core_s_nanos=price, memory_gib_s_nanos=1
            ),
            lease_s_max=600,
            certificate=certified or certificate(key),
        ),
        key,
        NETWORK,
    ).data


NEEDS = Requirements(resources=Resources(cpu_millis=1000), tier="wasm", currency="TEST")


@dataclass
class Host:
    """One host and how to reach it."""

    overlay: Overlay
    key: KeyPair
    address: str
    process: OverlayProcess | None = None
    seq: int = 0

    async def publish(self) -> int:
        """Publish a newer advert; its sequence number."""
        self.seq += 1
        await self.overlay.publish_advert(advert(self.key, self.seq))
        return self.seq

    @property
    def pid(self) -> int:
        """The overlay process."""
        found = self.process.pid if self.process is not None else None
        assert found is not None, "the process runs"
        return found


class Processes:
    """Overlay processes under a folder, each joined to a few earlier ones."""

    def __init__(self, folder: Path, nursery: trio.Nursery, stack: AsyncExitStack) -> None:
        self._folder, self._nursery, self._stack = folder, nursery, stack
        self.hosts: list[Host] = []

    async def add(self, *, join: bool = True) -> Host:
        """Start one process and connect it to the newest hosts and the first."""
        key = new_key()
        state = self._folder / f"h{len(self.hosts)}"
        state.mkdir()
        write_key(state / "key", key.seed)
        known = self.hosts[-_LINKS:] + self.hosts[:1] if join else []
        config = OverlayConfig(
            key_file=state / "key",
            network=NETWORK,
            coordinator_keys=KEYS,
            state_dir=state,
            bootstrap=tuple(dict.fromkeys(host.address for host in known)),
        )
        process = OverlayProcess(config)
        self._stack.push_async_callback(process.end)
        await self._nursery.start(process.run)
        overlay = SocketOverlay(config.socket, self._nursery)
        await overlay.attach()
        await overlay.present(certificate(key))
        found = await overlay.reachability()
        host = Host(overlay, key, found.addresses[0], process)
        self.hosts.append(host)
        return host


@asynccontextmanager
async def processes(folder: Path) -> AsyncIterator[Processes]:
    """Overlay processes that end with the context."""
    async with AsyncExitStack() as stack, background() as nursery:
        try:
            yield Processes(folder, nursery, stack)
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await stack.aclose()


async def until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for a condition, at most so long."""
    with trio.fail_after(timeout_s):
        while not holds():  # noqa: ASYNC110 - conditions of many hosts have no common event
            await trio.sleep(0.002)


class Watch:
    """What one host has been told of: the newest sequence number of each seller, and when."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.seen: dict[str, tuple[int, float]] = {}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the host's adverts until cancelled."""
        async with self.host.overlay.adverts() as events:
            task_status.started()
            async for event in events:
                self._note(event)

    def _note(self, event: AdvertEvent) -> None:
        if event.envelope is not None:
            self.seen[event.seller] = (event.seq, time.perf_counter())

    def knows(self, seller: str, seq: int) -> bool:
        """Whether that advert has come."""
        return self.seen.get(seller, (0, 0.0))[0] >= seq


def cpu_s(pid: int) -> float:
    """Processor seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def memory_mib(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def percentile(values: list[float], percent: int) -> float:
    """The value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
