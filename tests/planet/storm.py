"""Many clients, one coordinator, and a hand that kills it: what was acknowledged must be there.

Every client opens sessions and settles them with documents of its own, over one kept connection.
When the coordinator dies under a request, the client sends the same bytes again once there is a
coordinator again, and so learns whether the first ones were kept.
"""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import anyio
import anyio.abc
import anyio.to_thread
import httpx
import msgspec

from lumaris_coordinator.bounds import CREDIT_NANOS_MIN
from lumaris_protocol import merkle, receipts
from lumaris_protocol.ids import digest
from lumaris_protocol.keys import public_key_of
from tests.coordinator.builders import Deal, Party, credit_request, registration

CAP = 10_000
PAID = 4_000
FEE_BPS = 500
# Below the bound of open sessions that one buyer may have.
OPEN_PER_BUYER = 200
_ANSWER_S_MAX = 60.0
_START_S_MAX = 60.0
# A storm that stands still fails; a slow machine under load does ten operations a second.
_STORM_S_MAX, _OPERATION_S_MAX = 300.0, 0.1
# What is asked for again over HTTP; the file is compared whole.
_ASKED_AGAIN_MAX = 500
# Before the same bytes are sent again: a program needs about a second to start.
_AGAIN_S = 0.05


class Client:
    """One connection that is kept; requests are bytes, so it costs a tenth of a library's."""

    def __init__(self) -> None:
        self._stream: anyio.abc.SocketStream | None = None
        self._url = ""

    async def send(self, url: str, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """(status, body) of an answer. Raises OSError or an anyio error when there is none."""
        if self._stream is None or self._url != url:
            await self.aclose()
            found = urlsplit(url)
            assert found.hostname is not None
            assert found.port is not None
            self._stream = await anyio.connect_tcp(found.hostname, found.port)
            self._url = url
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: coordinator\r\n"
            f"Content-Type: application/octet-stream\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with anyio.fail_after(_ANSWER_S_MAX):
            await self._stream.send(head.encode() + body)
            return await self._answer(self._stream)

    async def aclose(self) -> None:
        """Let go of the connection."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(OSError, anyio.BrokenResourceError):
                await stream.aclose()

    async def _answer(self, stream: anyio.abc.SocketStream) -> tuple[int, bytes]:
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += await stream.receive()
        head = data[:end].decode("ascii").lower()
        length = int(head.partition("content-length:")[2].split("\r\n")[0])
        while len(data) < end + 4 + length:
            data += await stream.receive()
        return int(head.split(" ")[1]), data[end + 4 :]


T = TypeVar("T")
LOST = (OSError, anyio.EndOfStream, anyio.BrokenResourceError, TimeoutError)


@dataclass
class Program:
    """The coordinator's process; `url` changes with each start."""

    state: Path
    process: subprocess.Popen[bytes] | None = None
    peer: str = ""
    url: str = ""
    starts: int = 0

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        line = await anyio.to_thread.run_sync(self._start)
        word, self.peer, self.url = line.decode().split()
        assert word == "ready"
        self.starts += 1

    def _start(self) -> bytes:
        command = [sys.executable, "-m", "lumaris_coordinator", "--state", str(self.state)]
        command += ["--no-overlay"]  # the storm is about money alone
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def kill(self) -> None:
        """SIGKILL: nothing is finished, nothing is said."""
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait(_START_S_MAX)
        self.process.stdout.close()

    def cpu_s(self) -> float:
        """CPU seconds that the running process has used."""
        assert self.process is not None
        text = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii")
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def program(state: Path) -> AsyncIterator[Program]:
    """The program over a folder, killed in the end."""
    found = Program(state)
    try:
        await found.start()
        yield found
    finally:
        if found.process is not None and found.process.poll() is None:
            found.kill()


async def enrol(target: Program, parties: list[Party], *, funds: int) -> int:
    """Register every party and give it test credit; the coordinator's time."""
    async with httpx.AsyncClient(base_url=target.url, timeout=_ANSWER_S_MAX) as client:
        now = int((await client.get("/v1/info")).json()["time"])

        async def one(party: Party) -> None:
            asked = await client.post("/v1/identity/challenge", json={"peer": party.peer})
            challenge = asked.raise_for_status().json()["challenge"]
            body = registration(party, target.peer, challenge, now=now)
            (await client.post("/v1/identity/register", content=body)).raise_for_status()
            body = credit_request(party, target.peer, max(funds, CREDIT_NANOS_MIN), now=now)
            (await client.post("/v1/credits", content=body)).raise_for_status()

        async with anyio.create_task_group() as tasks:
            for party in parties:
                tasks.start_soon(one, party)
        return now


@dataclass
class Acknowledged:
    """What one session's client was told."""

    deal: Deal
    grant_request: bytes
    grant: bytes = b""
    claim: bytes = b""
    receipt: bytes = b""


@dataclass
class Storm:
    """A storm over one coordinator. `operations` counts acknowledged requests."""

    target: Program
    operations: int
    clients: int
    kills: int
    seed: int
    now: int = 0  # the coordinator's time at `began`
    began: float = field(default_factory=time.monotonic)
    done: int = 0
    repeated: int = 0
    killed: int = 0
    sessions: list[Acknowledged] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)

    async def run(self) -> None:
        """All operations, with the kills among them."""
        parties = [Party(f"buyer-{number}") for number in range(self.clients)]
        funds = (self.operations + self.clients) * CAP
        self.now = await enrol(self.target, [*parties, Party("seller")], funds=funds)
        self.began = time.monotonic()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._kill_now_and_then)
            for party in parties:
                tasks.start_soon(self._trade, party)

    async def _kill_now_and_then(self) -> None:
        """At random moments, one in each part of the storm, and in the midst of work."""
        dice = random.Random(self.seed)
        part = self.operations / (self.kills + 1)
        for number in range(self.kills):
            moment = (number + dice.random()) * part
            while self.done < moment:
                await anyio.sleep(0.001)
            await anyio.sleep(dice.random() / 100)
            self.target.kill()
            self.killed += 1
            await self.target.start()

    async def _trade(self, buyer: Party) -> None:
        client, seller = Client(), Party("seller")
        try:
            number = 0
            while self.done < self.operations:
                deal = self._deal(buyer, seller)
                session = Acknowledged(deal, deal.grant_request())
                session.grant = await self._until_answered(
                    client, "/v1/grants", session.grant_request
                )
                self.sessions.append(session)
                await self._settle(client, session, way=number % 3)
                number += 1
        finally:
            await client.aclose()

    def _deal(self, buyer: Party, seller: Party) -> Deal:
        """A session of this moment, that may start long after a kill."""
        now = self.now + int(time.monotonic() - self.began)
        changes = {"start_by": now + 3_000, "ends_at": now + 3_600}
        return Deal(buyer, seller, self.target.peer, cap=CAP, now=now, changes=changes)

    async def _settle(self, client: Client, session: Acknowledged, *, way: int) -> None:
        """By the seller alone, by both, or by the buyer before the seller."""
        deal, grant = session.deal, session.grant
        if way == 1:
            claim = deal.claim(deal.buyer, grant, PAID)
            await self._until_answered(client, "/v1/settle", claim)
        session.claim = deal.claim(deal.seller, grant, PAID, closed=way == 2)
        answer = await self._until_answered(client, "/v1/settle", session.claim)
        bundle = receipts.decode_bundle(answer)
        session.receipt = bundle.receipt
        self.notes.add(bundle.checkpoint)

    async def _until_answered(self, client: Client, path: str, body: bytes) -> bytes:
        """Send the same bytes until they are acknowledged."""
        while True:
            try:
                status, answer = await client.send(self.target.url, "POST", path, body)
            except LOST:
                await client.aclose()
                await anyio.sleep(_AGAIN_S)
                self.repeated += 1
                continue
            if status in (429, 503):
                await anyio.sleep(_AGAIN_S)
                continue
            assert status in (200, 202), answer[:500]
            self.done += 1
            return answer

    async def check(self) -> None:
        """Hold the coordinator, and its file, to everything that it acknowledged."""
        client = Client()
        try:
            await self._check_answers(client)
            await self._check_log(client)
            status, answer = await client.send(self.target.url, "GET", "/v1/ledger/audit")
            assert status == 200
            assert b'"balanced":true' in answer, answer
        finally:
            await client.aclose()
        self.target.kill()
        self._check_file()

    def _some(self, things: list[T]) -> list[T]:
        dice = random.Random(self.seed)
        return dice.sample(things, min(len(things), _ASKED_AGAIN_MAX))

    async def _check_answers(self, client: Client) -> None:
        """The same bytes get the same answer as before."""
        for session in self._some(self.sessions):
            again = await self._until_answered(client, "/v1/grants", session.grant_request)
            assert again == session.grant
            answer = await self._until_answered(client, "/v1/settle", session.claim)
            assert receipts.decode_bundle(answer).receipt == session.receipt

    async def _check_log(self, client: Client) -> None:
        """Every head that any client saw is a beginning of the log as it is now."""
        key = public_key_of(self.target.peer)
        _, note = await client.send(self.target.url, "GET", "/log/checkpoint")
        head = merkle.open_checkpoint(note.decode(), key)
        assert head.size >= len(self.sessions)
        for seen in self._some(sorted(self.notes)):
            older = merkle.open_checkpoint(seen, key)
            path = f"/log/consistency?old={older.size}&new={head.size}"
            status, answer = await client.send(self.target.url, "GET", path)
            assert status == 200, answer
            check_consistency(older, head, answer)

    def _check_file(self) -> None:
        """Exactly what was acknowledged, each once, by SQL of our own."""
        wanted = {session.deal.hash: session.grant for session in self.sessions}
        receipt_hashes = {digest(session.receipt) for session in self.sessions}
        assert len(wanted) == len(receipt_hashes) == len(self.sessions)
        database = sqlite3.connect(self.target.state / "coordinator.db")
        try:
            rows = database.execute(
                "SELECT agreement_hash, state, paid, budget_grant FROM escrow"
            ).fetchall()
            assert {row[0]: row[3] for row in rows} == wanted
            assert {row[1:3] for row in rows} == {("settled", PAID)}
            assert len(rows) == len(wanted)
            found = [digest(row[0]) for row in database.execute("SELECT envelope FROM receipt")]
            assert sorted(found) == sorted(receipt_hashes)
            self._check_money(database)
        finally:
            database.close()

    def _check_money(self, database: sqlite3.Connection) -> None:
        count = len(self.sessions)
        fee = PAID * FEE_BPS // 10_000
        balances = dict(database.execute("SELECT id, balance FROM account"))
        assert sum(balances.values()) == 0
        assert balances["fees:TEST"] == count * fee
        assert not [name for name in balances if name.startswith("escrow:") and balances[name]]
        moved: dict[str, int] = dict.fromkeys(balances, 0)
        for debit, credit, amount in database.execute("SELECT debit, credit, amount FROM transfer"):
            moved[debit] -= amount
            moved[credit] += amount
        assert moved == balances


def check_consistency(older: merkle.Checkpoint, newer: merkle.Checkpoint, answer: bytes) -> None:
    """The proof that one head of the log is a beginning of another."""
    names = msgspec.json.decode(answer)["hashes"]
    path = [bytes.fromhex(name.removeprefix("sha256:")) for name in names]
    assert merkle.verify_consistency(
        old=older.size, old_root=older.root, size=newer.size, root=newer.root, path=path
    )


async def storm(
    state: Path, *, operations: int, clients: int, kills: int, seed: int | None = None
) -> Storm:
    """Run a storm and check what is left of it. Its seed is part of every failure."""
    chosen = seed if seed is not None else time.time_ns() % 1_000_000
    print(f"seed={chosen}", file=sys.stderr)
    with anyio.fail_after(_STORM_S_MAX + operations * _OPERATION_S_MAX):
        async with program(state) as target:
            found = Storm(target, operations, clients, kills, chosen)
            await found.run()
            await found.check()
            return found
