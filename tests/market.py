"""A whole market in one process: real node, buyer and coordinator over the simulated network.

Only the edges are replaced: the overlay is the simulated twin, the coordinator is called through an
in-memory transport that can be taken down. Guests are real wasm processes.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import trio
import wasmtime

from lumaris.buyer import Buyer, open_buyer
from lumaris.coordinator import CoordinatorLink as BuyerLink
from lumaris.jobs import JobRequest
from lumaris.profile import Profile
from lumaris_coordinator import Coordinator, Settings, create_app
from lumaris_node.agent import Node
from lumaris_node.config import Accept, NodeConfig, Price
from lumaris_node.coordinator_link import CoordinatorLink as NodeLink
from lumaris_node.executors.port import Executor
from lumaris_node.selftest.keep import Assurance
from lumaris_overlay.links import Timing
from lumaris_overlay.ports import Overlay
from lumaris_overlay.private_files import load_or_create_key
from lumaris_overlay.simulated import SimulatedNetwork, SimulatedOverlay, open_network
from lumaris_overlay.supervisor import OverlayConfig
from lumaris_protocol.keys import KeyPair, PeerId
from lumaris_protocol.limits import MIB
from lumaris_protocol.messages.advert import Gpu, Resources, Runtime

NETWORK = "devnet"
URL = "http://coordinator"
CREDIT = 1_000_000_000
# The most that any condition is waited for; conditions come true in a fraction of it.
WAIT_S = 15.0
# A lost peer is given up soon: nobody here comes back.
_RESUME_S = 0.2

# One module for every behaviour: its first argument names it, with a nap in tenths of a second.
GUEST_TEXT = """(module
 (import "wasi_snapshot_preview1" "args_get" (func $args (param i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "fd_write"
  (func $write (param i32 i32 i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "path_open"
  (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "poll_oneoff"
  (func $poll (param i32 i32 i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
 (memory (export "memory") 4)
 (data (i32.const 1024) "hello\\n") (data (i32.const 1040) "a") (data (i32.const 1041) "b")
 (func $say (param $fd i32) (param $at i32) (param $size i32)
  (i32.store (i32.const 0) (local.get $at)) (i32.store (i32.const 4) (local.get $size))
  (drop (call $write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8))))
 (func $nap (param $ns i64)
  (i32.store8 (i32.const 72) (i32.const 0)) (i32.store (i32.const 80) (i32.const 1))
  (i64.store (i32.const 88) (local.get $ns))
  (drop (call $poll (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 8))))
 (func $at (param $fd i32) (param $name i32) (param $flags i32) (result i32)
  (drop (call $open (local.get $fd) (i32.const 0) (local.get $name) (i32.const 1)
   (local.get $flags) (select (i64.const 64) (i64.const 2) (local.get $flags)) (i64.const 0)
   (i32.const 0) (i32.const 12)))
  (i32.load (i32.const 12)))
 (func $copy (local $in i32)
  (local.set $in (call $at (i32.const 3) (i32.const 1040) (i32.const 0)))
  (i32.store (i32.const 0) (i32.const 4096)) (i32.store (i32.const 4) (i32.const 4096))
  (drop (call $read (local.get $in) (i32.const 0) (i32.const 1) (i32.const 8)))
  (call $say (call $at (i32.const 4) (i32.const 1041) (i32.const 1))
   (i32.const 4096) (i32.load (i32.const 8)))
  (call $say (i32.const 1) (i32.const 1024) (i32.const 6)))
 (func (export "_start") (local $what i32) (local $tenths i32)
  (local $file i32) (local $other i32)
  (drop (call $args (i32.const 256) (i32.const 512)))
  (local.set $what (i32.load8_u (i32.load (i32.const 260))))
  (local.set $tenths (i32.load8_u offset=1 (i32.load (i32.const 260))))
  (if (i32.gt_u (local.get $tenths) (i32.const 48)) (then (call $nap (i64.mul
   (i64.const 100000000) (i64.extend_i32_u (i32.sub (local.get $tenths) (i32.const 48)))))))
  (if (i32.eq (local.get $what) (i32.const 99)) (then (call $copy)))
  (if (i32.eq (local.get $what) (i32.const 100)) (then
   (local.set $other (call $at (i32.const 4) (i32.const 1040) (i32.const 1)))
   (local.set $file (call $at (i32.const 4) (i32.const 1041) (i32.const 1)))
   (loop (call $say (local.get $file) (i32.const 4096) (i32.const 65536))
    (call $say (local.get $other) (i32.const 4096) (i32.const 65536)) (br 0))))
  (if (i32.eq (local.get $what) (i32.const 101)) (then (call $exit (i32.const 3))))
  (if (i32.eq (local.get $what) (i32.const 103)) (then
   (loop (br_if 0 (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) unreachable))
  (if (i32.eq (local.get $what) (i32.const 104)) (then
   (call $say (i32.const 1) (i32.const 1024) (i32.const 6))))
  (if (i32.eq (local.get $what) (i32.const 108)) (then (loop (br 0))))
  (if (i32.eq (local.get $what) (i32.const 112)) (then
   (loop (call $say (i32.const 1) (i32.const 4096) (i32.const 65536)) (br 0))))
  (if (i32.eq (local.get $what) (i32.const 116)) (then unreachable))
  (if (i32.eq (local.get $what) (i32.const 119)) (then
   (call $say (i32.const 1) (i32.const 1024) (i32.const 6))
   (loop (call $nap (i64.const 50000000)) (br 0))))))"""
COPY, DISK_FLOOD, EXIT_3, MEMORY, HELLO = "c", "d", "e", "g", "h"
SPIN, LOG_FLOOD, TRAP, WAIT = "l", "p", "t", "w"


def after(what: str, tenths: int) -> str:
    """A behaviour after a nap."""
    return what + chr(48 + tenths)


_real_time = time.time


class Clock:
    """The wall clock of everybody in the market, which tests put forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return _real_time() + self.ahead_s


class Line(httpx.AsyncBaseTransport):
    """The way to the coordinator; `down` cuts it, `lose_answers` loses what comes back."""

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport
        self.down = False
        self.lose_answers = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.down:
            raise httpx.ConnectError("the coordinator is down")
        answer = await self._transport.handle_async_request(request)
        if self.lose_answers:
            raise httpx.ReadError("the answer was lost")
        return answer


class Trusting(Assurance):
    """Believes every tier: the attacks take seconds, and have tests of their own."""

    def standing(self, runtime: Runtime) -> Runtime:
        return runtime

    async def check(self, executor: Executor, runtime: Runtime) -> Runtime:
        return runtime


class SmallNode(Node):
    """A node with a capacity of the test's choice, that prepares for no other work."""

    total = Resources(cpu_millis=2000, memory_bytes=256 * MIB, disk_bytes=256 * MIB)

    def _capacity(self, gpus: tuple[Gpu, ...]) -> Resources:
        return self.total

    def _assurance(self) -> Assurance:
        return Trusting(self.state, clock=self.clock)

    async def _prepare(self) -> None:
        return


@dataclass
class Seller:
    """A running node and the places to look at it."""

    node: Node
    state: Path
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    host: SimulatedOverlay | None = None
    peer: str = ""
    gone: trio.Event = field(default_factory=trio.Event)

    @property
    def quotes(self) -> Any:
        return self.node._quotes

    async def assert_idle(self) -> None:
        """Everything came back: capacity, sessions, folders, claims."""
        await eventually(lambda: not self.node._sessions.hosts, "no session is open")
        self.node._desk.expire()
        await eventually(lambda: self.quotes.free == self.quotes.total, "the capacity is free")
        assert not self.node._desk._session_keys
        left = list(self.state.glob("volumes/*"))
        assert not left, left

    async def assert_settled(self) -> None:
        async def settled() -> bool:
            return not await self.node._store.unsettled()

        self.node._settler.wake()
        await eventually_async(settled, "every claim is settled")


@dataclass
class Market:
    """Who trades, and the machinery between them."""

    folder: Path
    modules: Path
    coordinator: Coordinator
    line: Line
    clock: Clock
    network: SimulatedNetwork
    nursery: trio.Nursery
    guest: str
    sellers: list[Seller] = field(default_factory=list)
    hosts: dict[str, SimulatedOverlay] = field(default_factory=dict)

    @asynccontextmanager
    async def open_overlay(self, config: OverlayConfig) -> AsyncIterator[Overlay]:
        """A simulated host in place of the overlay process."""
        async with self.open_host(load_or_create_key(config.key_file)) as host:
            await host.connect(config.bootstrap)
            yield host

    @asynccontextmanager
    async def open_host(self, key: KeyPair) -> AsyncIterator[SimulatedOverlay]:
        """A host of any key, connected to every seller."""
        host = self.network.host(key)
        self.hosts[key.peer_id] = host
        for seller in self.sellers:
            if seller.host is not None and not seller.gone.is_set():
                await host.connect([seller.host.address])
        try:
            yield host
        finally:
            self.network.kill(host)

    async def seller(
        self,
        name: str = "seller",
        *,
        total: Resources | None = None,
        price: Price | None = None,
        lease_s_max: int = 4 * 3600,
        modules: Path | None = None,
    ) -> Seller:
        """Start a node and wait until its offer is out."""
        state = self.folder / name
        state.mkdir(mode=0o700, exist_ok=True)
        config = NodeConfig(
            coordinator=URL,
            direct="off",  # a power cut in the simulated network would not be one on loopback
            modules=str(modules or self.modules),
            price=price or Price(),
            accept=Accept(runtimes=("wasm",), lease_s_max=lease_s_max),
        )
        node = SmallNode(
            state,
            config,
            clock=self.clock,
            open_overlay=self.open_overlay,
            open_link=lambda url: NodeLink(url, transport=self.line),
        )
        if total is not None:
            node.total = total
        seller = Seller(node, state)
        seller.peer = await self.nursery.start(self._run, seller)
        seller.host = self.hosts[seller.peer]
        self.sellers.append(seller)
        for host in list(self.hosts.values()):
            await host.connect([seller.host.address])
        return seller

    async def _run(self, seller: Seller, *, task_status: trio.TaskStatus[str]) -> None:
        with seller.scope:
            await seller.node.run(lambda peer, _: task_status.started(peer))
        seller.gone.set()

    def vanish(self, seller: Seller) -> None:
        """A power cut, as the network sees it."""
        assert seller.host is not None
        self.network.kill(seller.host)
        self.hosts.pop(seller.peer)

    @asynccontextmanager
    async def buyer(self, name: str = "buyer", *, credit: int = CREDIT) -> AsyncIterator[Buyer]:
        """A buyer with test credit that knows every seller."""
        state = self.folder / name
        state.mkdir(mode=0o700, exist_ok=True)
        async with open_buyer(
            Profile(state, URL),
            open_overlay=self.open_overlay,
            open_link=lambda url: BuyerLink(url, transport=self.line),
        ) as buyer:
            if credit:
                await buyer.deposit_test_credit(credit)
            known = len([seller for seller in self.sellers if not seller.gone.is_set()])
            await eventually(lambda: len(buyer.market.adverts) >= known, "every offer is seen")
            yield buyer

    def request(self, what: str, **changes: Any) -> JobRequest:
        """A job of the guest module."""
        fields: dict[str, Any] = {
            "image": self.guest,
            "command": ("guest", what),
            "memory_bytes": 16 * MIB,
            "disk_bytes": MIB,
            "wall_s": 30,
            "attempts": 1,
        }
        return JobRequest(**(fields | changes))

    def requests(self, route: str) -> int:
        """How often the coordinator was asked."""
        text = self.coordinator.metrics.text(())
        pattern = rf'lumaris_requests_total{{route="{re.escape(route)}"[^}}]*}} (\d+)'
        return sum(int(count) for count in re.findall(pattern, text))

    async def assert_at_rest(
        self, buyer: Buyer, *, cost_nanos: int, credit: int = CREDIT, lost_nanos: int = 0
    ) -> None:
        """After everything: money, capacity and folders are where they belong.

        `cost_nanos` is the sum of all vouchers, of which `lost_nanos` may not have arrived.
        """
        await buyer.pool.close_all()
        for seller in self.sellers:
            if not seller.gone.is_set():
                await seller.assert_idle()
                await seller.assert_settled()

        async def settled() -> bool:
            await buyer.pool.settle()
            return not await buyer.store.unsettled()

        await eventually_async(settled, "every session is settled")
        rows = await buyer.store.sessions(100)
        assert sum(row["total_nanos"] for row in rows) == cost_nanos
        account = await buyer.account()
        assert account.held_nanos == 0
        assert 0 <= account.free_nanos - (credit - cost_nanos) <= lost_nanos
        await self.assert_balanced(buyer)

    async def assert_balanced(self, buyer: Buyer) -> None:
        audit = await buyer.audit()
        assert audit.balanced
        assert audit.sum_nanos == 0


@asynccontextmanager
async def open_market(folder: Path, modules: Path) -> AsyncIterator[Market]:
    """A coordinator and a network; sellers end with the context."""
    guest = folder / "guest.wasm"
    guest.write_bytes(wasmtime.wat2wasm(GUEST_TEXT))
    clock = Clock()
    settings = Settings(state=folder / "coordinator", network=NETWORK)
    coordinator = Coordinator(settings, clock=clock)
    line = Line(httpx.ASGITransport(create_app(coordinator)))
    keys = frozenset({PeerId(coordinator.peer_id)})
    roots = frozenset({coordinator.context.keys.list.signer})
    async with (
        coordinator.running(),
        open_network(NETWORK, keys, now=clock, roots=roots) as network,
        trio.open_nursery() as nursery,
    ):
        with (
            mock.patch("time.time", clock),  # the clock of buyers
            mock.patch("lumaris_overlay.links.overlay.Timing", partial(Timing, resume_s=_RESUME_S)),
        ):
            yield Market(folder, modules, coordinator, line, clock, network, nursery, str(guest))
        nursery.cancel_scope.cancel()


async def eventually(holds: Callable[[], bool], what: str) -> None:
    """Wait until something holds, at most WAIT_S."""
    with trio.move_on_after(WAIT_S):
        while not holds():
            await trio.sleep(0.01)
        return
    raise AssertionError(f"still not: {what}")


async def eventually_async(holds: Any, what: str) -> None:
    """`eventually` for a condition that must be awaited."""
    with trio.move_on_after(WAIT_S):
        while not await holds():
            await trio.sleep(0.02)
        return
    raise AssertionError(f"still not: {what}")
