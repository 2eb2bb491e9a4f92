"""The real program: how it starts, stops, refuses to start, and survives kill -9."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio

from lumaris_protocol import receipts
from lumaris_protocol.keys import KeyPair
from tests.coordinator.builders import Deal, Party, credit_request, registration

pytestmark = [pytest.mark.planet, pytest.mark.slow]

FUNDS = 100_000_000
CAP = 10_000


def command(state: Path, *extra: str) -> list[str]:
    start = [sys.executable, "-m", "lumaris_coordinator", "--state", str(state), "--no-overlay"]
    return [*start, *extra]


@dataclass
class Program:
    """A running coordinator process."""

    process: trio.Process
    peer: str
    client: httpx.AsyncClient
    clock_now: int = 0


@asynccontextmanager
async def running(state: Path, *extra: str) -> AsyncIterator[Program]:
    """Start the program and wait for its `ready` line; kill it in the end if it still runs."""
    process = await trio.lowlevel.open_process(command(state, *extra), stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        line = b""
        with trio.fail_after(30):
            while not line.endswith(b"\n"):
                part = await process.stdout.receive_some(1_024)
                assert part, "the program ended before it was ready"
                line += part
        word, peer, url = line.decode().split()
        assert word == "ready"
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            info = (await client.get("/v1/info")).json()
            assert info["coordinator"] == peer
            yield Program(process, peer, client, info["time"])
    finally:
        if process.poll() is None:
            process.kill()
        with trio.CancelScope(shield=True), trio.move_on_after(10):
            await process.wait()
        await process.stdout.aclose()


async def end(program: Program, number: signal.Signals) -> int:
    program.process.send_signal(number)
    with trio.fail_after(15):
        return await program.process.wait()


async def test_it_starts_serves_and_stops_cleanly(tmp_path: Path) -> None:
    async with running(tmp_path / "state", "--network", "town", "--fee-bps", "250") as program:
        info = (await program.client.get("/v1/info")).json()
        assert (info["network"], info["fee_bps"]) == ("town", 250)
        assert await end(program, signal.SIGTERM) == 0
        peer = program.peer
    key = tmp_path / "state" / "coordinator.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert KeyPair(bytes.fromhex(key.read_text())).peer_id == peer
    # A clean end leaves one file of data: nothing waits in a write-ahead log.
    assert not (tmp_path / "state" / "coordinator.db-wal").exists()


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        found = subprocess.run(
            command(tmp_path / "state", "--port", port),
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert found.returncode == 1
    assert found.stderr.startswith("error port_in_use ")
    assert found.stdout == ""
    assert not (tmp_path / "state").exists()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = subprocess.run(
        command(tmp_path / "file" / "state"),
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert found.returncode == 1
    assert found.stderr.startswith("error not_writable ")


async def test_a_second_program_on_one_directory(tmp_path: Path) -> None:
    async with running(tmp_path / "state") as program:
        second = await trio.run_process(
            command(tmp_path / "state"), capture_stdout=True, capture_stderr=True, check=False
        )
        assert second.returncode == 1
        assert second.stderr.startswith(b"error already_running ")
        assert (await program.client.get("/readyz")).status_code == 200


@dataclass
class Acknowledged:
    """What clients were told before the kill."""

    grants: dict[int, tuple[Deal, bytes]] = field(default_factory=dict)
    receipts: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)


async def register(program: Program, name: str) -> Party:
    party = Party(name)
    answer = await program.client.post("/v1/identity/challenge", json={"peer": party.peer})
    body = registration(party, program.peer, answer.json()["challenge"], now=program.clock_now)
    answer = await program.client.post("/v1/identity/register", content=body)
    assert answer.status_code == 200, answer.text
    return party


async def keep_trading(
    program: Program, buyer: Party, seller: Party, told: Acknowledged, *, worker: int
) -> None:
    """Grant and settle one session after the other until the connection breaks."""
    try:
        for number in range(worker * 10_000, (worker + 1) * 10_000):
            deal = Deal(buyer, seller, program.peer, cap=CAP, now=program.clock_now, number=number)
            answer = await program.client.post("/v1/grants", content=deal.grant_request())
            assert answer.status_code == 200, answer.text
            told.grants[number] = deal, answer.content
            claim = deal.claim(seller, answer.content, number % CAP)
            answer = await program.client.post("/v1/settle", content=claim)
            assert answer.status_code == 200, answer.text
            told.receipts[number] = claim, receipts.decode_bundle(answer.content).receipt
    except httpx.TransportError:
        return


# The client library leaves the body's generator open when the connection breaks under it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    told = Acknowledged()
    state = tmp_path / "state"
    async with running(state) as program:
        buyer, seller = await register(program, "buyer"), await register(program, "seller")
        body = credit_request(buyer, program.peer, FUNDS, now=program.clock_now)
        assert (await program.client.post("/v1/credits", content=body)).status_code == 200
        with trio.fail_after(40):
            async with trio.open_nursery() as nursery:
                for worker in range(16):
                    nursery.start_soon(
                        partial(keep_trading, program, buyer, seller, told, worker=worker)
                    )
                while len(told.receipts) < 150:
                    await trio.sleep(0.005)
                os.kill(program.process.pid, signal.SIGKILL)
    async with running(state) as program:
        audit = (await program.client.get("/v1/ledger/audit")).json()
        assert audit["balanced"], audit
        size = int((await program.client.get("/log/checkpoint")).text.split("\n")[1])
        assert size >= len(told.receipts)
        for deal, grant in told.grants.values():
            answer = await program.client.post("/v1/grants", content=deal.grant_request())
            assert answer.content == grant
        for claim, receipt in told.receipts.values():
            answer = await program.client.post("/v1/settle", content=claim)
            assert receipts.decode_bundle(answer.content).receipt == receipt
        again = (await program.client.get("/v1/ledger/audit")).json()
        assert again == audit  # repeating everything that was acknowledged moved nothing
