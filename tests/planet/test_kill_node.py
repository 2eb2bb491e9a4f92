"""A node killed in every state of a job: its guests and volumes go at once, the money stays right.

What is left is looked for before the node is ever started again: only then is it known that the
guardian, and the small processes that hold the sandboxes, did their work.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import trio

from lumaris.jobs import JobRequest, JobResult
from lumaris_node import api
from lumaris_protocol.limits import MIB
from tests.planet.execution import (
    QUICK,
    WASM_IMAGE,
    Arena,
    Shelf,
    arena,
    assert_money_rests,
    eventually,
    family,
    settled,
)

pytestmark = [pytest.mark.planet, pytest.mark.slow]

# How long the guests and volumes of a killed node may live on, on a crowded machine.
GONE_S = 20.0
HOLD = "import time\nprint('on', flush=True)\nwhile True: time.sleep(1)"
DONE = (
    "f = open('/out/x', 'wb')\nfor _ in range({}): f.write(bytes(1 << 20))\n"
    "f.close()\nprint('on', flush=True)"
)


@pytest.fixture(scope="module")
def market(
    tmp_path_factory: pytest.TempPathFactory, shelf: Shelf, tiers: tuple[str, ...]
) -> Iterator[Arena]:
    """One seller that is killed and started again."""
    with arena(tmp_path_factory.mktemp("kill"), shelf, tiers) as found:
        for tier in tiers:  # its image is there
            assert found.run(tier, QUICK).ok
        yield found
        found.settle()


def kill(market: Arena, *, guardian_too: bool = False) -> None:
    """Kill the node and wait until all that it started is gone, and all that it made."""
    processes = family(market.seller.pid)
    for process in processes if guardian_too else processes[:1]:
        process.kill()
    _, alive = psutil.wait_procs(processes, timeout=GONE_S)
    assert alive == []


def killed_and_back(market: Arena, *jobs: Future[JobResult], cost_max: int = 0) -> None:
    """After a kill: nothing is left, each job has its end; the next start settles everything."""
    eventually(lambda: not market.left(), "the killed node left nothing", why=market.left)
    for job in jobs:
        result = job.result(60)
        assert result.reason == "seller_lost" and result.cost_nanos <= cost_max, result
    market.restart()
    back(market)


def back(market: Arena) -> None:
    """The seller that was started again settles what it had earned, and sells."""
    client = market.client()
    eventually(lambda: settled(client), "its sessions are settled")
    assert client.account().held_nanos == 0 and client.audit().balanced
    assert market.run("process", QUICK).stdout == b"42\n"


def tell(market: Arena, word: str) -> None:
    trio.run(api.call, market.folder / api.SOCKET_NAME, word)


def test_running(market: Arena, tiers: tuple[str, ...]) -> None:
    with ExitStack() as stack:
        jobs = [stack.enter_context(market.running(tier, HOLD, until="on")) for tier in tiers]
        assert market.left().keys() >= {"processes", "groups", "mounts", "loops", "volumes"}
        kill(market)
        killed_and_back(market, *jobs)


def test_paused(market: Arena, tiers: tuple[str, ...]) -> None:
    with ExitStack() as stack:
        jobs = [stack.enter_context(market.running(tier, HOLD, until="on")) for tier in tiers]
        tell(market, "pause")
        kill(market)
        killed_and_back(market, *jobs)


def test_ready(market: Arena) -> None:
    assert market.run("process", QUICK).ok  # the session of the next order
    tell(market, "pause")
    with market.running("process", HOLD, until="ordered") as job:
        eventually(lambda: "groups" in market.left(), "its sandbox waits for its start")
        kill(market)
        killed_and_back(market, job)


def test_preparing_with_an_image_on_its_way(market: Arena, tmp_path: Path) -> None:
    module = tmp_path / "long.wasm"
    module.write_bytes(b"\0asm\1\0\0\0" + custom_section(64 * MIB))
    request = JobRequest(str(module), ("x",), cpu_millis=500, attempts=1)
    with market.running("wasm", "", until="preparing", request=request) as job:
        kill(market)
        killed_and_back(market, job)


def custom_section(size: int) -> bytes:
    """A section of a module that means nothing, of so many bytes and a few."""
    body = b"\x01x" + os.urandom(size)
    length, number = b"", len(body)
    while True:
        number, low = number >> 7, number & 0x7F
        length += bytes([low | (0x80 if number else 0)])
        if not number:
            return b"\0" + length + body


def test_collecting(market: Arena) -> None:
    code = DONE.format(48)
    with market.running("process", code, until="on", disk_bytes=64 * MIB) as job:
        eventually(lambda: reads_outputs(market) or job.done(), "outputs are collected")
        kill(market)
        killed_and_back(market, job)


def reads_outputs(market: Arena) -> bool:
    """Whether the node has a file of its volumes open."""
    volumes = str(market.folder / "volumes")
    for entry in Path(f"/proc/{market.seller.pid}/fd").glob("*"):
        try:
            if os.readlink(entry).startswith(volumes):
                return True
        except OSError:
            continue
    return False


def test_delivered_and_not_answered(market: Arena) -> None:
    program = (
        "import os, signal, sys\nfrom lumaris import Client\n"
        "def stop(event):\n"
        " if getattr(event, 'data', b'').strip() == b'on':\n"
        "  print('stopping', flush=True); os.kill(os.getpid(), signal.SIGSTOP)\n"
        "c = Client(state=sys.argv[1], coordinator=sys.argv[2], overlay_linger_s=1)\n"
        "c.deposit_test_credit('1')\n"
        f"r = c.run({WASM_IMAGE!r}, ['python', '-c', {DONE.format(1)!r}], observe=stop, cpu=0.5)\n"
        "print(r.reason, r.cost_nanos, flush=True); c.close()"
    )
    state = market.net.state / "stopped"
    arguments = [sys.executable, "-c", program, str(state), market.net.url]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as buyer:
        assert buyer.stdout is not None
        try:
            assert buyer.stdout.readline() == "stopping\n"
            eventually(lambda: delivered(market), "the job is delivered")
            kill(market)
            eventually(lambda: not market.left(), "nothing is left", why=market.left)
            os.kill(buyer.pid, signal.SIGCONT)
            assert buyer.stdout.readline().split() == ["seller_lost", "0"]
        finally:
            buyer.kill()
    killed_and_back(market)
    assert_money_rests(market.client("stopped"))


def delivered(market: Arena) -> bool:
    """Whether outputs wait for a buyer's word."""
    return any((market.folder / "volumes").glob("ses_*/disk/data/kept/job_*/x"))


def test_killed_with_its_guardian(market: Arena, tiers: tuple[str, ...]) -> None:
    """Nobody is left to clear up: the next start does it, before it sells."""
    with ExitStack() as stack:
        jobs = [stack.enter_context(market.running(tier, HOLD, until="on")) for tier in tiers]
        kill(market, guardian_too=True)
        assert market.left().keys() >= {"mounts", "volumes"}
        for job in jobs:
            assert job.result(60).reason == "seller_lost"
        market.restart()
        market.nothing_left()
        back(market)
