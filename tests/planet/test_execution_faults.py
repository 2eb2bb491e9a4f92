"""Bombs bought on the market: each ends with its own reason and harms nobody else."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from lumaris.jobs import JobResult
from lumaris_protocol.limits import MIB, OPEN_FILES_MAX, OUTPUT_FILES_MAX
from tests.node.executors.test_container_faults import own_engine
from tests.planet.execution import (
    NATIVE,
    QUICK,
    TIERS,
    WAIT_S,
    WASM_IMAGE,
    Arena,
    Shelf,
    arena,
    assert_money_rests,
    eventually,
    marked,
)

pytestmark = [pytest.mark.planet, pytest.mark.slow]

# A job beside a bomb on a crowded machine; alone it takes well under a second.
NEIGHBOUR_S = 20.0
RSS_MAX = 96 * MIB
# A run that is over sooner was never paid for in advance.
VOUCHER_MS = 1000


@dataclass(frozen=True)
class Bomb:
    """Guest code, how it must end, and the limits it meets."""

    code: str
    reason: str
    limits: dict[str, Any]


SPIN = "import time\nwhile True: time.sleep(1)"
BOMBS = {
    "memory": Bomb(
        "b = []\nwhile True: b.append(b'x' * (1 << 20))",
        "killed_memory",
        {"memory_bytes": 64 * MIB},
    ),
    "disk": Bomb(
        # Several files: one alone meets the limit of a file first, an error that it sees.
        "try:\n for n in range(64): open(f'/out/{n}', 'wb').write(bytes(1 << 20))\n"
        f"except OSError: pass\n{SPIN}",
        "killed_disk",
        {"disk_bytes": 16 * MIB},
    ),
    "inodes": Bomb(
        "import os\nn = 0\n"
        "try:\n while True:\n  os.close(os.open(f'/out/{n}', os.O_CREAT | os.O_WRONLY)); n += 1\n"
        f"except OSError: pass\n{SPIN}",
        "killed_inodes",
        {},
    ),
    "descriptors": Bomb(
        "import os\nn = 0\n"
        "try:\n while True: os.open('/out', os.O_RDONLY); n += 1\n"
        "except OSError: print(n)",
        "succeeded",
        {},
    ),
    "output": Bomb(
        f"for n in range({OUTPUT_FILES_MAX + 1}): open(f'/out/{{n}}', 'w').close()",
        "killed_output",
        {},
    ),
    "log": Bomb("while True: print('x' * 65536)", "killed_log", {"log_bytes": 65536}),
    "late": Bomb("while True: pass", "killed_deadline", {"wall_s": 1}),
    "links": Bomb("import os; os.symlink('y', '/out/x')", "killed_output", {}),
    "sparse": Bomb("open('/out/x', 'wb').truncate(8 << 20)", "killed_output", {}),
}
NATIVE_BOMBS = {
    "forks": Bomb(
        "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
        "killed_pids",
        {"pids": 64},
    ),
    "stubborn": Bomb(
        "import signal, time\n"
        "for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
        "while True: time.sleep(1)",
        "killed_deadline",
        {"wall_s": 1},
    ),
    "survivors": Bomb(
        "import os, signal, time\n"
        "for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
        "if os.fork() == 0:\n os.setsid()\n"
        " if os.fork() == 0:\n  os.close(1); os.close(2)\n  while True: time.sleep(1)\n"
        " os._exit(0)",
        "succeeded",
        {},
    ),
    "fifo": Bomb("import os; os.mkfifo('/out/x')", "killed_output", {}),
    "second name": Bomb(
        "import os; open('/out/x', 'w').close(); os.link('/out/x', '/out/y')",
        "killed_output",
        {},
    ),
}
# The rest are memory and processors that a guest would have to share with others, in a moment.
KILLERS = ("log", "memory", "links", "output")


@pytest.fixture(scope="module")
def market(
    tmp_path_factory: pytest.TempPathFactory, shelf: Shelf, tiers: tuple[str, ...]
) -> Iterator[Arena]:
    """One seller for all bombs: what one leaves, the next would meet."""
    with arena(tmp_path_factory.mktemp("bombs"), shelf, tiers) as found:
        yield found
        found.settle()


@pytest.fixture
def tier(request: pytest.FixtureRequest) -> str:
    if request.param == "container":
        request.getfixturevalue("docker_engine")
    return str(request.param)


def try_bomb(market: Arena, tier: str, bomb: Bomb) -> JobResult:
    """Run it beside a neighbour's job, and one more in its own lease afterwards."""
    limits = {"memory_bytes": 256 * MIB} | bomb.limits
    market.client("bomber").settle()  # idle sessions of other tiers hold the seller's cores
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(market.run, tier, bomb.code, buyer="bomber", **limits)
        began, rounds = time.monotonic(), 0
        while rounds == 0 or not job.done():
            beside = market.run("process", QUICK, buyer="neighbour")
            took_s, began = time.monotonic() - began, time.monotonic()
            assert beside.ok and beside.stdout == b"42\n", beside
            assert took_s < NEIGHBOUR_S
            rounds += 1
        result = job.result()
    assert result.reason == bomb.reason, result
    if result.reason != "succeeded":
        assert result.exit_status is None, result
        # Vouchers that were given while it ran stay given, and nothing else is owed.
        assert result.cost_nanos == 0 or result.wall_ms > VOUCHER_MS, result
    assert result.artifacts == {}
    assert marked(market.mark) == []
    after = market.run(tier, QUICK, buyer="bomber", **limits)
    assert after.ok and after.stdout == b"42\n", after
    return result


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("tier", TIERS, indirect=True)
def test_a_bomb_harms_nobody(market: Arena, tier: str, name: str) -> None:
    result = try_bomb(market, tier, BOMBS[name])
    if name == "descriptors":
        assert 0 < int(result.stdout) <= OPEN_FILES_MAX


@pytest.mark.parametrize("name", NATIVE_BOMBS)
@pytest.mark.parametrize("tier", NATIVE, indirect=True)
def test_a_native_bomb_harms_nobody(market: Arena, tier: str, name: str) -> None:
    try_bomb(market, tier, NATIVE_BOMBS[name])


def test_a_buyer_that_does_not_read_its_log_holds_up_only_its_own_job(market: Arena) -> None:
    flood = "import sys\nwhile True: sys.stdout.write('x' * 65536)"
    program = (
        "import os, signal, sys\nfrom lumaris import Client\nstopped = []\n"
        "def stop(event):\n"
        " if hasattr(event, 'data') and not stopped:\n"
        "  stopped.append(1); print('stopping', flush=True); os.kill(os.getpid(), signal.SIGSTOP)\n"
        "c = Client(state=sys.argv[1], coordinator=sys.argv[2], overlay_linger_s=1)\n"
        "c.deposit_test_credit('1')\n"
        f"r = c.run({WASM_IMAGE!r}, ['python', '-c', {flood!r}], observe=stop, cpu=0.5)\n"
        "print(r.reason, r.cost_nanos, flush=True); c.close()"
    )
    arguments = [sys.executable, "-c", program, str(market.net.state / "slow"), market.net.url]
    node = psutil.Process(market.seller.pid)
    before = node.memory_info().rss
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as buyer:
        assert buyer.stdout is not None
        try:
            assert buyer.stdout.readline() == "stopping\n"
            for _ in range(5):
                beside = market.run("wasm", QUICK, buyer="neighbour")
                assert beside.ok, beside
            assert node.memory_info().rss - before < RSS_MAX
            psutil.Process(buyer.pid).resume()
            assert buyer.stdout.readline().split() == ["killed_log", "0"]
            assert buyer.wait(60) == 0
        finally:
            buyer.kill()
    market.client("slow")  # closed with the others


def test_a_hundred_killed_jobs_leave_nothing(market: Arena, tiers: tuple[str, ...]) -> None:
    market.settle()  # four sessions are all that the seller has room for
    names = [f"buyer-{number}" for number in range(4)]
    for number, name in enumerate(names):  # sessions exist, and what a first job makes is there
        market.client(name)
        assert market.run(tiers[number % len(tiers)], QUICK, buyer=name).ok
    market.settle()
    files, processes = held_files(market), held_processes(market)
    killed: list[str] = []
    lock = threading.Lock()

    def lane(name: str, tier: str) -> None:  # of one tier: a session of another holds more cores
        while True:
            with lock:
                number = len(killed)
                if number >= 100:
                    return
                killed.append("")
            bomb = BOMBS[KILLERS[number % len(KILLERS)]]
            limits = {"memory_bytes": 64 * MIB} | bomb.limits
            result = market.run(tier, bomb.code, buyer=name, **limits)
            assert result.reason == bomb.reason, result
            assert result.cost_nanos == 0 or result.wall_ms > VOUCHER_MS, result
            killed[number] = result.reason

    with ThreadPoolExecutor(len(names)) as pool:
        lanes = [(name, tiers[number % len(tiers)]) for number, name in enumerate(names)]
        for done in [pool.submit(lane, *each) for each in lanes]:
            done.result()
    assert len(killed) == 100 and all(killed)
    market.settle()
    # The idle workers of the wasm tier are other ones now; there are no more of them.
    eventually(lambda: len(held_processes(market)) <= len(processes), "no process more than before")
    assert held_files(market) == files


def held_files(market: Arena) -> list[str]:
    """All files of the seller, by name, but for the evidence that it keeps of every session."""
    folder: Path = market.folder
    names = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(str(name) for name in names if name.parts[0] != "evidence")


def held_processes(market: Arena) -> list[int]:
    """All processes of the seller; wasm workers carry no mark of a test."""
    node = psutil.Process(market.seller.pid)
    return sorted(child.pid for child in node.children(recursive=True))


def test_what_is_left_would_be_seen(market: Arena) -> None:
    market.settle()
    with market.running("process", SPIN, wall_s=30, buyer="seen"):
        kinds = {"processes", "groups", "mounts", "loops", "volumes"}
        # Told that it runs, a sandbox still has to become its program.
        eventually(lambda: kinds <= market.left().keys(), "everything of a running job is seen")
        market.clients.pop("seen").close()
    market.nothing_left()
    market.client("seen")  # its folder goes with the others


def vouchered(market: Arena) -> int:
    """What all sessions of the buyer come to by its own book-keeping."""
    return sum(item["total_nanos"] for item in market.client().sessions())


@pytest.mark.docker
def test_an_engine_that_is_absent_goes_and_returns(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own_engine() as engine:
        monkeypatch.setenv("DOCKER_HOST", engine.url)
        with arena(tmp_path, shelf, ("process", "container"), wait=False) as market:
            eventually(lambda: market.offered() == {"process"}, "only what works is offered")
            engine.up()
            spent = 0
            for number in (signal.SIGKILL, signal.SIGTERM):
                eventually(lambda: "container" in market.offered(), "it is offered", why=market.log)
                with market.running(
                    "container", f"print('on', flush=True)\n{SPIN}", until="on"
                ) as job:
                    eventually(lambda: vouchered(market) > spent, "it is vouchered")  # noqa: B023
                    engine.signal(number)
                    result = job.result(WAIT_S)
                assert (result.reason, result.cost_nanos) == ("platform_error", 0), result
                assert_money_rests(market.client())
                assert vouchered(market) == spent, "what was vouchered for it came back"
                eventually(lambda: market.offered() == {"process"}, "it is withdrawn")
                quick = market.run("process", QUICK)
                assert quick.ok
                assert_money_rests(market.client())
                spent += quick.cost_nanos
                assert vouchered(market) == spent
                engine.up()
            eventually(lambda: "container" in market.offered(), "it is offered", why=market.log)
            assert market.run("container", QUICK).ok
            market.settle()
