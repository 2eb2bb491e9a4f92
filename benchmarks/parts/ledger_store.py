"""The group-commit writer against a transaction for each operation, on both databases.

The unit of work is two balances, a transfer and an idempotency row: the same statements on every
side, so that only the way they are committed differs. Rivals take turns in the same run.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import anyio

from benchmarks.parts.report import Report
from lumaris_coordinator.store import postgres, sqlite
from lumaris_coordinator.store.port import Connection
from lumaris_coordinator.store.writer import Writer

ACCOUNTS = 512
RICH = 10**15
HOT = "hot"
CLIENTS = (16, 64, 256)
TABLES = (
    "CREATE TABLE account (id TEXT PRIMARY KEY, balance BIGINT NOT NULL CHECK (balance >= 0))",
    """CREATE TABLE transfer (
        id TEXT PRIMARY KEY,
        debit TEXT NOT NULL REFERENCES account (id),
        credit TEXT NOT NULL REFERENCES account (id),
        amount BIGINT NOT NULL CHECK (amount > 0)
    )""",
    "CREATE TABLE idem (key TEXT PRIMARY KEY, answer TEXT NOT NULL)",
)
_numbers = count()


@dataclass
class World:
    """Where the databases are, and how long a measurement takes."""

    folder: Path
    row: Report
    seconds: float
    rounds: int
    dsn: str = ""


def operation(number: int, *, hot: bool) -> Callable[[Connection], None]:
    """One payment."""
    debit = f"a{number % ACCOUNTS:04}"
    credit = HOT if hot else f"a{(number * 7 + 1) % ACCOUNTS:04}"
    name = f"{os.getpid()}/{number:012}"

    def run(connection: Connection) -> None:
        # In the order of the accounts' names: sessions that write side by side cannot deadlock.
        for account, change in sorted(((debit, -1), (credit, 1))):
            connection.execute(
                "UPDATE account SET balance = balance + ? WHERE id = ?", (change, account)
            )
        connection.execute(
            "INSERT INTO transfer (id, debit, credit, amount) VALUES (?, ?, ?, ?)",
            (name, debit, credit, 1),
        )
        connection.execute("INSERT INTO idem (key, answer) VALUES (?, ?)", (name, "{}"))

    return run


def prepare(connection: Connection) -> None:
    """The tables, and accounts with money."""
    for statement in TABLES:
        connection.execute(statement)
    connection.execute("BEGIN IMMEDIATE")
    for name in (HOT, *(f"a{number:04}" for number in range(ACCOUNTS))):
        connection.execute("INSERT INTO account (id, balance) VALUES (?, ?)", (name, RICH))
    connection.execute("COMMIT")


def fdatasync_rate(folder: Path, seconds: float) -> float:
    """How often the disk keeps 4 KiB, in a second."""
    page, done = b"x" * 4_096, 0
    with (folder / "probe").open("wb") as file:
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            file.write(page)
            file.flush()
            os.fdatasync(file.fileno())
            done += 1
        return done / (time.perf_counter() - began)


def batch_rate(connection: Connection, size: int, seconds: float) -> float:
    """Operations in a second when each transaction has `size` of them, without any queue."""
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        connection.execute("BEGIN IMMEDIATE")
        for _ in range(size):
            connection.execute("SAVEPOINT one")
            operation(next(_numbers), hot=False)(connection)
            connection.execute("RELEASE one")
        connection.execute("COMMIT")
        done += size
    return done / (time.perf_counter() - began)


def group_rate(
    connect: Callable[[], Connection], clients: int, seconds: float, *, hot: bool = False
) -> float:
    """Operations in a second of clients that each wait for their own, through the writer."""
    return anyio.run(_group_rate, connect, clients, seconds, hot)


async def _group_rate(
    connect: Callable[[], Connection], clients: int, seconds: float, hot: bool
) -> float:
    writer = Writer(connect, clock=time.time)
    done = 0

    async def client(ends: float) -> None:
        nonlocal done
        while time.perf_counter() < ends:
            await writer.submit(operation(next(_numbers), hot=hot))
            done += 1

    async with writer.running():
        began = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for _ in range(clients):
                tasks.start_soon(client, began + seconds)
        return done / (time.perf_counter() - began)


def direct_rate(dsn: str, clients: int, seconds: float, *, hot: bool = False) -> float:
    """Operations in a second of clients with a session each, a transaction for each operation."""
    counts = [0] * clients
    ready, ended = threading.Barrier(clients + 1), threading.Event()

    def client(index: int) -> None:
        connection = postgres.connect(dsn)
        try:
            ready.wait()
            while not ended.is_set():
                connection.execute("BEGIN")
                operation(next(_numbers), hot=hot)(connection)
                connection.execute("COMMIT")
                counts[index] += 1
        finally:
            connection.close()

    threads = [threading.Thread(target=client, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    time.sleep(seconds)
    done, took = sum(counts), time.perf_counter() - began
    ended.set()
    for thread in threads:
        thread.join()
    return done / took


def costs(dsn: str, size: int, seconds: float) -> tuple[float, float, float]:
    """(round trips, our microseconds of processor, operations in a second) of batches of `size`;
    the first two for each operation, and without the event loop."""
    session = postgres.write(dsn, "benchmark")
    try:
        done, before = 0, session.round_trips
        began, processor = time.perf_counter(), time.thread_time()
        while time.perf_counter() - began < seconds:
            session.execute("BEGIN IMMEDIATE")
            for _ in range(size):
                session.execute("SAVEPOINT operation")
                operation(next(_numbers), hot=False)(session)
                session.execute("RELEASE operation")
            session.execute("COMMIT")
            done += size
        used, took = time.thread_time() - processor, time.perf_counter() - began
        return (session.round_trips - before) / done, used / done * 1e6, done / took
    finally:
        session.close()


def replicas_rate(dsn: str, replicas: int, clients: int, seconds: float) -> float:
    """Operations in a second of several coordinators' writers on one hot account."""
    command = [
        *(sys.executable, "-m", "benchmarks.parts.ledger_replica"),
        *(dsn, str(clients // replicas), str(seconds)),
    ]
    root = Path(__file__).parents[2]
    running = [
        subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(replicas)
    ]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    return sum(float(process.communicate(timeout=60)[0]) for process in running)


def measure_sqlite(world: World) -> None:
    """Batches on one file, and what the disk itself allows."""
    path = world.folder / "ledger.db"
    connection = sqlite.connect(path)
    prepare(connection)
    found: dict[str, list[float]] = {}
    for _ in range(world.rounds):
        found.setdefault("sync", []).append(fdatasync_rate(world.folder, world.seconds / 2))
        for size in (1, 64):
            rate = batch_rate(connection, size, world.seconds)
            found.setdefault(f"batch {size}", []).append(rate)
        for clients in CLIENTS:
            rate = group_rate(lambda: sqlite.connect(path), clients, world.seconds)
            found.setdefault(f"group {clients}", []).append(rate)
        rate = group_rate(lambda: sqlite.connect(path), 64, world.seconds, hot=True)
        found.setdefault("hot", []).append(rate)
    connection.close()
    row = world.row
    row("fdatasync of 4 KiB", statistics.median(found["sync"]), "1/s")
    row("SQLite: one transaction each", statistics.median(found["batch 1"]), "op/s")
    for clients in CLIENTS:
        row(
            f"SQLite: group commit, {clients} clients",
            statistics.median(found[f"group {clients}"]),
            "op/s",
        )
    for clients, least in zip(CLIENTS, (4, 6, 8), strict=True):
        name = f"SQLite: group / single, {clients} clients"
        tell(row, name, found, f"group {clients}", "batch 1", least)
    tell(row, "SQLite: batch 64 / fdatasync", found, "batch 64", "sync", 6)
    tell(row, "SQLite: batch 1 / fdatasync", found, "batch 1", "sync", 0.3)
    tell(row, "SQLite: hot / spread, 64 clients", found, "hot", "group 64", 0.9)


def measure_postgres(world: World) -> None:
    """The same writer on a server, against a session and a transaction for each client."""
    dsn = world.dsn

    def connect() -> Connection:
        return postgres.write(dsn, "benchmark")

    prepare_once = connect()
    prepare(prepare_once)
    prepare_once.close()
    found: dict[str, list[float]] = {}
    for _ in range(world.rounds):
        # In this order every ratio below is one of neighbours.
        for name, clients, hot in (
            ("single hot", 64, True),
            ("group hot", 64, True),
            ("group 64", 64, False),
            ("single 64", 64, False),
            ("single 256", 256, False),
            ("group 256", 256, False),
        ):
            rate = (
                group_rate(connect, clients, world.seconds, hot=hot)
                if name.startswith("group")
                else direct_rate(dsn, clients, world.seconds, hot=hot)
            )
            found.setdefault(name, []).append(rate)
        for number in (1, 2):
            found.setdefault(f"replicas {number}", []).append(
                replicas_rate(dsn, number, 64, world.seconds)
            )
    row = world.row
    trips, processor, rate = costs(dsn, 64, world.seconds)
    row("PostgreSQL: round trips / operation, batches of 64", trips, "")
    row("PostgreSQL: our processor, batches of 64", processor, "us/op")
    row("PostgreSQL: batches of 64, no queue", rate, "op/s")
    for name, rates in found.items():
        row(f"PostgreSQL: {name}", statistics.median(rates), "op/s")
    for clients, least in ((64, 4), (256, 5)):
        name = f"PostgreSQL: group / single, {clients} clients"
        tell(row, name, found, f"group {clients}", f"single {clients}", least)
    tell(row, "PostgreSQL: group / single, hot account", found, "group hot", "single hot", 10)
    tell(row, "PostgreSQL: hot / spread, group", found, "group hot", "group 64", 0.9)
    tell(row, "PostgreSQL: two replicas / one, hot", found, "replicas 2", "replicas 1", 0.8)


def tell(
    row: Report, name: str, found: dict[str, list[float]], ours: str, rival: str, least: float
) -> None:
    """A ratio of neighbours in time: the middle of the rounds, and whether its bar holds."""
    times = statistics.median(paired(found[ours], found[rival]))
    row(name, times, "x", f">= {least:g}", times >= least)


def paired(ours: list[float], rivals: list[float]) -> Iterator[float]:
    """The ratio in each round."""
    return (one / other for one, other in zip(ours, rivals, strict=True))
