"""A session's speed: cold run, negotiation, warm no-op, and how often the coordinator is asked.

    python benchmarks/session.py [--json] [--jobs N]

Real processes on loopback: one coordinator, one seller, this buyer. The rival in the same run is
Dask's `submit` on one worker process when `distributed` is installed (dependency group `bench`);
the physical limit is starting and reaping one child process of this interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import trio

from lumaris import profile
from lumaris.buyer import Buyer, open_buyer
from lumaris.client import make_request
from lumaris.jobs import JobRequest
from lumaris.testing.devnet import Devnet

# Started as a file, this folder is on the path and the one above is not.
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.report import Report

# (module) a guest that does nothing at all, as a binary: magic, version, one empty _start.
NO_OP = bytes.fromhex(
    "0061736d01000000"  # magic, version
    "010401600000"  # one type: () -> ()
    "03020100"  # one function of that type
    "0503010001"  # one memory of one page
    "071302065f73746172740000066d656d6f72790200"  # exports: _start and memory
    "0a040102000b"  # its empty body
)
COLD_RUNS, WARM_RUNS, CHILDREN = 20, 200, 100


def main() -> None:
    """Run everything and print a table, or one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--jobs", type=int, default=1000)
    options = parser.parse_args()
    row = Report(as_json=options.json)

    with tempfile.TemporaryDirectory(prefix="lumaris-bench-") as folder:
        module = Path(folder) / "no_op.wasm"
        module.write_bytes(NO_OP)
        with Devnet(Path(folder) / "net", sellers=1) as net:
            net.client().close()  # funds the buyer
            trio.run(measure, net, module, options.jobs, row)
    limit = [timed(spawn_child) for _ in range(CHILDREN)]
    warm = next(item["value"] for item in row.rows if item["name"] == "warm no-op p50")
    row("child process start to end p50", 1e3 * statistics.median(limit), "ms")
    row("warm no-op / child process", warm / (1e3 * statistics.median(limit)), "x")
    dask = measure_dask()
    if dask is not None:
        latency, rate = dask
        ours = next(item["value"] for item in row.rows if item["name"] == "map of no-ops")
        row("Dask submit to result p50", latency, "ms")
        row("Dask no-ops", rate, "tasks/s")
        row("map of no-ops / Dask", ours / rate, "x", ">= 1", ours >= rate)
    row.finish()


async def measure(net: Devnet, module: Path, jobs: int, row: Callable[..., None]) -> None:
    """Everything that needs a running buyer."""
    request = make_request(str(module), ["no-op"], timeout_s=60, max_cost="0.01")
    settings = profile.load(state=net.buyer_state, coordinator=net.url, overlay_linger_s=2)
    async with open_buyer(settings) as buyer:
        await buyer.run(request)  # compiles the module and connects: not what is measured
        await buyer.pool.close_all()
        cold, negotiation = await measure_cold(buyer, request)
        row("cold run p50", percentile(cold, 50), "ms", "<= 500", percentile(cold, 50) <= 500)
        row("cold run p99", percentile(cold, 99), "ms")
        middle = percentile(negotiation, 50)
        row("negotiation p50, open connection", middle, "ms", "<= 20", middle <= 20)
        row("negotiation p99, open connection", percentile(negotiation, 99), "ms")
        await buyer.run(request)
        warm = [1e3 * await timed_async(lambda: buyer.run(request)) for _ in range(WARM_RUNS)]
        row("warm no-op p50", percentile(warm, 50), "ms", "<= 5", percentile(warm, 50) <= 5)
        row("warm no-op p99", percentile(warm, 99), "ms")
        await buyer.pool.close_all()
        before = requests_served(net.url)
        began = time.perf_counter()
        results = await buyer.map([request] * jobs, sellers=1, budget_nanos=100_000_000)
        elapsed = time.perf_counter() - began
        await buyer.pool.close_all()
        await trio.sleep(1)  # the seller's own settlement follows the session's end
        failed = sum(not result.ok for result in results)
        row("map of no-ops", jobs / elapsed, "tasks/s", ">= 400", jobs / elapsed >= 400)
        row("failed jobs", failed, "jobs", "0", failed == 0)
        asked = (requests_served(net.url) - before) * 1000 / jobs
        row("coordinator requests per 1,000 jobs", asked, "requests", "<= 4", asked <= 4)


async def measure_cold(buyer: Buyer, request: JobRequest) -> tuple[list[float], list[float]]:
    """Milliseconds from nothing held to a result, and of the negotiation inside."""
    market = buyer.market
    quotes, agree = market.quotes, market.agree
    began = 0.0
    negotiation: list[float] = []

    async def timed_quotes(*arguments: Any, **named: Any) -> Any:
        nonlocal began  # a round that is refused begins again
        began = time.perf_counter()
        return await quotes(*arguments, **named)

    async def timed_agree(*arguments: Any) -> Any:
        result = await agree(*arguments)
        negotiation.append(1e3 * (time.perf_counter() - began))
        return result

    market.quotes, market.agree = timed_quotes, timed_agree  # type: ignore[method-assign, assignment]
    cold = []
    for _ in range(COLD_RUNS):
        cold.append(1e3 * await timed_async(lambda: buyer.run(request)))
        await buyer.pool.close_all()
    market.quotes, market.agree = quotes, agree  # type: ignore[method-assign]
    return cold, negotiation


def requests_served(url: str) -> float:
    """Requests the coordinator has answered, without those for its own metrics."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    lines = re.findall(r"^\w*requests_total\{([^}]*)\} ([0-9.e+]+)$", text, re.MULTILINE)
    return sum(float(value) for labels, value in lines if "/metrics" not in labels)


def measure_dask() -> tuple[float, float] | None:
    """(milliseconds a no-op, no-ops per second) of a Dask worker process; None without Dask."""
    try:
        distributed = importlib.import_module("distributed")
    except ImportError:
        return None
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.submit(abs, -1).result()
        single = [
            timed(lambda: client.submit(abs, -1, pure=False).result()) for _ in range(WARM_RUNS)
        ]
        began = time.perf_counter()
        client.gather(client.map(abs, range(1000), pure=False))
        return 1e3 * statistics.median(single), 1000 / (time.perf_counter() - began)


def spawn_child() -> None:
    """Start this interpreter with nothing to do and wait for it."""
    subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True, env={"PATH": os.defpath})


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


async def timed_async(work: Callable[[], Any]) -> float:
    """Seconds of one awaited call."""
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


def percentile(values: list[float], percent: int) -> float:
    """The value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


if __name__ == "__main__":
    main()
