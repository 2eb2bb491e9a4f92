"""Programs that die at the worst moment: the money is always where the ledger says."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from lumaris.client import AsyncClient, Client
from lumaris.jobs import JobResult, JobUpdate, LogLine
from lumaris.testing.devnet import Devnet
from lumaris_overlay.process_file import holder
from lumaris_protocol import receipts

pytestmark = [pytest.mark.planet, pytest.mark.slow]

IMAGE = "python:3.12-wasi"
QUICK = ["python", "-c", "print(6 * 7)"]
# Sleeps in real time: long enough to be killed in the middle.
LONG = ["python", "-c", "import time; time.sleep(30)"]
WAIT_S = 30.0


def eventually(holds: Callable[[], bool], what: str) -> None:
    """Wait until something holds, at most WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.05)


def overlay_runs(folder: Path) -> bool:
    return holder(folder / "overlay") is not None


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_finishes_and_settles_though_the_coordinator_is_gone(
    net: Devnet, number: signal.Signals
) -> None:
    with net.client() as client:
        assert client.run(IMAGE, QUICK).ok  # the grant is given here
        assert net.coordinator is not None
        net.coordinator.end(number)
        result = client.run(IMAGE, QUICK)
        assert result.ok and result.stdout == b"42\n"
        client.settle()
        assert not all(item["state"] == "settled" for item in client.sessions())
        net.start_coordinator()
        assert_money_rests(client)


def test_a_seller_killed_in_mid_job_costs_nothing_and_settles_when_it_returns(net: Devnet) -> None:
    with net.client() as client:
        before = client.account().free_nanos

        def kill(event: JobUpdate | LogLine) -> None:
            if isinstance(event, JobUpdate) and event.state == "running":
                os.kill(net.nodes[0].pid, signal.SIGKILL)

        result = client.run(IMAGE, LONG, observe=kill)
        assert result.reason == "seller_lost" and result.cost_nanos == 0
        assert client.account().held_nanos > 0
        net.nodes[0] = net.start_seller(net.nodes[0].role)
        assert_money_rests(client)
        assert client.account().free_nanos == before


def test_a_buyer_killed_in_mid_job_recovers_its_money(net: Devnet) -> None:
    net.client().close()
    program = (
        "import sys\nfrom lumaris import Client\n"
        "c = Client(state=sys.argv[1], coordinator=sys.argv[2], overlay_linger_s=1)\n"
        f"c.run({IMAGE!r}, {LONG!r}, observe=lambda e: print(getattr(e, 'state', ''), flush=True))"
    )
    buyer = subprocess.Popen(
        [sys.executable, "-c", program, str(net.buyer_state), net.url], stdout=subprocess.PIPE
    )
    assert buyer.stdout is not None
    with buyer.stdout as output:
        assert any(line.strip() == b"running" for line in output)
        buyer.kill()
        buyer.wait()
    with net.client() as client:
        assert_money_rests(client)
        assert client.account().free_nanos > 0


def test_the_coordinator_killed_among_settlements_loses_none(net: Devnet) -> None:
    with net.client() as client:
        for _ in range(3):
            assert client.run(IMAGE, QUICK).ok
            client.settle()
            assert net.coordinator is not None
            net.coordinator.end(signal.SIGKILL)
            net.start_coordinator()
        assert_money_rests(client)
        assert len(client.sessions()) == 3


def test_random_bytes_on_every_port_disturb_nobody(net: Devnet) -> None:
    address = net.nodes[0].address.split("/")  # /ip4/127.0.0.1/tcp/PORT/p2p/PEER
    ports = [int(address[4]), int(net.url.rpartition(":")[2])]
    for port in ports:
        for size in (1, 7, 64, 1000, 70_000):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as stream:
                try:
                    stream.sendall(os.urandom(size))
                    stream.shutdown(socket.SHUT_WR)
                    stream.settimeout(0.2)
                    stream.recv(1024)
                except OSError:
                    pass  # being cut off is one of the right answers
    with net.client() as client:
        assert client.run(IMAGE, QUICK).ok
        assert_money_rests(client)


def test_a_job_that_fails_or_runs_late_costs_nothing_and_says_why(net: Devnet) -> None:
    with net.client() as client:
        failed = client.run(IMAGE, ["python", "-c", "raise SystemExit(3)"])
        assert (failed.reason, failed.exit_status, failed.cost_nanos) == ("exit_nonzero", 3, 0)
        late = client.run(IMAGE, LONG, timeout_s=1)
        assert (late.reason, late.exit_status, late.cost_nanos) == ("killed_deadline", None, 0)
        assert client.run(IMAGE, QUICK).ok
        assert_money_rests(client)


def test_an_asyncio_program_that_gives_up_cancels_the_job_at_the_seller(net: Devnet) -> None:
    net.client().close()

    async def give_up() -> JobResult:
        async with AsyncClient(
            state=net.buyer_state, coordinator=net.url, overlay_linger_s=2
        ) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.run(IMAGE, LONG), timeout=5)
            # The seller's one core is free again although the guest would have slept on.
            return await asyncio.wait_for(client.run(IMAGE, QUICK), timeout=20)

    assert asyncio.run(give_up()).ok
    with net.client() as client:
        assert_money_rests(client)


@pytest.mark.parametrize("direct", [True, False])
def test_a_job_does_not_notice_that_both_overlay_processes_died(net: Devnet, direct: bool) -> None:
    seller = net.nodes[0]
    if not direct:
        seller.end()
        settings = Path(seller.state) / "node.toml"
        settings.write_text('direct = "off"\n')
        seller = net.nodes[0] = net.start_seller(seller.role)
    killed: list[int] = []

    def kill(event: JobUpdate | LogLine) -> None:
        if isinstance(event, JobUpdate) and event.state == "running":
            for folder in (Path(seller.state), net.buyer_state):
                overlay = holder(folder / "overlay")
                assert overlay is not None
                killed.append(overlay.pid)
                os.kill(overlay.pid, signal.SIGKILL)

    with net.client() as client:
        slow = ["python", "-c", "import time; time.sleep(6); print(6 * 7)"]
        result = client.run(IMAGE, slow, observe=kill)
        assert result.ok and result.stdout == b"42\n", result
        assert len(killed) == 2
        for folder in (Path(seller.state), net.buyer_state):
            eventually(partial(overlay_runs, folder), "its overlay process is back")
        assert client.run(IMAGE, QUICK).ok
        assert_money_rests(client)
