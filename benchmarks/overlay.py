"""The overlay: how fast sellers become visible, what it costs, and how soon it recovers.

    python benchmarks/overlay.py [--json] [--quick] [--only PART,PART]

Parts: visible, crowd, snapshot, match, negotiation, exchange, recovery. Real overlay processes on
loopback, driven through their sockets by this program, which knows every clock; `crowd` holds its
hosts in this one process instead. Where many processes share few cores, waiting for a core is part
of a latency: the rows of processor time are the ones to compare between machines.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import trio

from lumaris_overlay.libp2p.host import HostConfig, Libp2pOverlay, open_host
from lumaris_overlay.tasks import background

# Started as a file, this folder is on the path and the one above is not.
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.overlay_latency import (
    Row,
    measure_exchange,
    measure_match,
    measure_negotiation,
)
from benchmarks.parts.overlay_world import (
    KEYS,
    NETWORK,
    Host,
    Processes,
    Watch,
    advert,
    certificate,
    cpu_s,
    memory_mib,
    new_key,
    percentile,
    processes,
    until,
)
from benchmarks.parts.report import Report

PROCESSES, CROWD = (3, 20, 50), 200
SNAPSHOTS = (1_000, 5_000)
ADVERTS = 40
IDLE_S = 10.0
# A host's first seconds hold its reach test and DHT refresh: idle is what comes after.
SETTLE_S = 8.0


def main() -> None:
    """Run the parts and print a table, or one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few hosts, few repetitions")
    parser.add_argument("--only", default="", help="parts, separated by commas")
    options = parser.parse_args()
    logging.getLogger("libp2p").setLevel(logging.CRITICAL + 1)
    row = Report(as_json=options.json, widths=(58, 12, 8, 10))

    parts = _parts(row, quick=options.quick)
    chosen = options.only.split(",") if options.only else list(parts)
    for name in chosen:
        if name not in parts:
            parser.error(f"no part {name!r}; there are {', '.join(parts)}")
        for work in parts[name]:
            work()
    row.finish()


def _parts(row: Row, *, quick: bool) -> dict[str, list[Callable[[], None]]]:
    counts = (3, 6) if quick else PROCESSES
    sizes = (200,) if quick else SNAPSHOTS

    def run(work: Callable[..., Awaitable[None]], *arguments: Any) -> Callable[[], None]:
        return partial(trio.run, work, row, *arguments)

    return {
        "visible": [run(measure_visible, count) for count in counts],
        "crowd": [run(measure_crowd, 8 if quick else CROWD)],
        "snapshot": [run(measure_snapshot, size) for size in sizes],
        "match": [partial(measure_match, row)],
        "negotiation": [partial(measure_negotiation, row)],
        "exchange": [run(measure_exchange, 50 if quick else 500)],
        "recovery": [run(measure_recovery)],
    }


# --- processes -----------------------------------------------------------------------------------


async def measure_visible(row: Row, count: int) -> None:
    """A network of `count` processes: joining it, an advert's way, and what both cost."""
    with tempfile.TemporaryDirectory(prefix="lumaris-bench-") as folder:
        async with processes(Path(folder)) as net, background() as nursery:
            for _ in range(count - 1):
                await net.add()
            await net.hosts[0].publish()
            late = await net.add(join=False)
            watch = Watch(late)
            await nursery.start(watch.run)
            began = time.perf_counter()
            await late.overlay.connect([net.hosts[-2].address])
            await until(lambda: watch.knows(net.hosts[0].key.peer_id, 1))
            joined = 1e3 * (time.perf_counter() - began)
            bar = 500 if count == 3 else 1_000
            row(f"join to first match, {count} processes", joined, "ms")
            await trio.sleep(SETTLE_S)
            watches = [watch]
            for host in net.hosts[:-1]:
                watches.append(Watch(host))
                await nursery.start(watches[-1].run)
            await _measure_idle(row, net, count)
            before = sum(cpu_s(host.pid) for host in net.hosts)
            delays = await _publish_and_watch(net.hosts, watches, ADVERTS)
            used = sum(cpu_s(host.pid) for host in net.hosts) - before
            middle, slow = percentile(delays, 50), percentile(delays, 99)
            row(f"advert visible p50, {count} processes", middle, "ms", f"<= {bar}", middle <= bar)
            row(f"advert visible p99, {count} processes", slow, "ms")
            per = 1e3 * used / (ADVERTS * count)
            # Twelve adverts a second may take six hundredths of a core: 5 ms each.
            row(f"processor time per advert and node, {count}", per, "ms", "<= 5", per <= 5)


async def _publish_and_watch(hosts: list[Host], watches: list[Watch], adverts: int) -> list[float]:
    """Milliseconds from publishing to each other host's directory, for adverts one by one."""
    delays = []
    for number in range(adverts):
        host = hosts[number % len(hosts)]
        began = time.perf_counter()
        seq, seller = await host.publish(), host.key.peer_id
        others = [watch for watch in watches if watch.host is not host]
        with trio.move_on_after(30):
            for watch in others:
                await until(partial(watch.knows, seller, seq))
        for watch in others:
            seen = watch.seen.get(seller, (0, 0.0))
            delays.append(1e3 * (seen[1] - began) if seen[0] >= seq else 30_000.0)
    return delays


async def _measure_idle(row: Row, net: Processes, count: int) -> None:
    before = {host.pid: cpu_s(host.pid) for host in net.hosts}
    await trio.sleep(IDLE_S)
    shares = [100 * (cpu_s(pid) - was) / IDLE_S for pid, was in before.items()]
    mean = sum(shares) / len(shares)
    row(f"idle node, share of a core, mean of {count}", mean, "%", "<= 1", mean <= 1)
    memory = max(memory_mib(host.pid) for host in net.hosts)
    row(f"idle node, resident memory, largest of {count}", memory, "MiB")


async def measure_snapshot(row: Row, size: int) -> None:
    """A host that joins late and gets the whole directory."""
    with tempfile.TemporaryDirectory(prefix="lumaris-bench-") as folder:
        async with processes(Path(folder)) as net, background() as nursery:
            holder, late = await net.add(join=False), await net.add(join=False)
            for _ in range(size):
                await holder.overlay.publish_advert(advert(new_key()))
            watch = Watch(late)
            await nursery.start(watch.run)
            before = cpu_s(late.pid)
            began = time.perf_counter()
            await late.overlay.connect([holder.address])
            await until(lambda: len(watch.seen) >= size, 120)
            taken = time.perf_counter() - began
            bar = {"bar": "<= 1", "holds": taken <= 1} if size <= 1_000 else {}
            row(f"snapshot of {size} adverts", taken, "s", **bar)
            row(f"snapshot of {size}, newcomer's processor", cpu_s(late.pid) - before, "s")


async def measure_recovery(row: Row) -> None:
    """A host killed, and a host frozen, among eight."""
    with tempfile.TemporaryDirectory(prefix="lumaris-bench-") as folder:
        async with processes(Path(folder)) as net, background() as nursery:
            for _ in range(8):
                await net.add()
            watch = Watch(net.hosts[0])
            await nursery.start(watch.run)
            victim = net.hosts[-1]
            began = time.perf_counter()
            os.kill(victim.pid, signal.SIGKILL)
            seq = await victim.publish()  # waits for the process that is started in its place
            await until(lambda: watch.knows(victim.key.peer_id, seq))
            row("killed host sells again after", time.perf_counter() - began, "s")
            frozen = net.hosts[1]
            began = time.perf_counter()
            os.kill(frozen.pid, signal.SIGSTOP)
            try:
                host = net.hosts[2]
                seq = await host.publish()
                await until(lambda: watch.knows(host.key.peer_id, seq))
                row("advert past a frozen host", 1e3 * (time.perf_counter() - began), "ms")
                await _until_left(net.hosts[0], frozen)
                row("frozen host noticed after", time.perf_counter() - began, "s")
            finally:
                os.kill(frozen.pid, signal.SIGCONT)


async def _until_left(host: Host, other: Host) -> None:
    with trio.fail_after(60):
        connected = True
        while connected:
            peers = await host.overlay.peers()
            connected = other.key.peer_id in {info.peer for info in peers}
            await trio.sleep(0.1)


# --- one process ---------------------------------------------------------------------------------


async def measure_crowd(row: Row, count: int) -> None:
    """`count` hosts in this process: only the processor's time, since they share one core."""
    async with AsyncExitStack() as stack:
        hosts: list[Libp2pOverlay] = []
        keys = [new_key() for _ in range(count)]
        for key in keys:
            config = HostConfig(
                key=key, network=NETWORK, coordinator_keys=KEYS, certificate=certificate(key)
            )
            host = await stack.enter_async_context(open_host(config))
            for other in hosts[-3:]:
                await host.connect((await other.reachability()).addresses)
            hosts.append(host)
        await trio.sleep(SETTLE_S)
        delays: list[float] = []
        before = time.process_time()
        for number in range(ADVERTS // 4):
            place = number % count
            data = advert(keys[place], number + 1)
            began = time.perf_counter()
            await hosts[place].publish_advert(data)
            left = [host for host in hosts if not host.directory.holds(data)]
            with trio.move_on_after(60):
                while left:
                    await trio.sleep(0.001)
                    late = [host for host in left if not host.directory.holds(data)]
                    delays += [1e3 * (time.perf_counter() - began)] * (len(left) - len(late))
                    left = late
            delays += [60_000.0] * len(left)
        used = time.process_time() - before
        row(f"advert visible p50, {count} hosts in one process", percentile(delays, 50), "ms")
        row(f"advert visible p99, {count} hosts in one process", percentile(delays, 99), "ms")
        per = 1e3 * used / (len(delays) or 1)
        row(f"processor time per advert and node, {count} in one process", per, "ms")


if __name__ == "__main__":
    main()
