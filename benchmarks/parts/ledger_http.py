"""Settlements end to end: signed documents over HTTP to the real program."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import anyio

from benchmarks.parts.ledger_market import deals, parties_of, post_all
from benchmarks.parts.ledger_store import World, group_rate, prepare
from lumaris_coordinator import Coordinator, Settings
from lumaris_coordinator.bounds import CREDIT_NANOS_MIN
from lumaris_coordinator.store import sqlite
from tests.coordinator.builders import Party, credit_request, registration
from tests.planet.storm import CAP, PAID, Program, enrol, program, storm

T = TypeVar("T")
CLIENTS = 64
TICKS = (10, 100_000)


def measure_http(world: World) -> None:
    """Settlements a second, beside the bare writer and the same service without HTTP."""
    anyio.run(_measure, world)


async def _measure(world: World) -> None:
    number = 600 if world.seconds < 1 else 3_000
    row = world.row
    async with program(world.folder / "http") as target:
        settled, granted = await _over_http(target, number)
        row(f"HTTP: settlements, {CLIENTS} clients", settled[0], "op/s")
        row("HTTP: CPU of a settlement", settled[1], "us")
        row(f"HTTP: grants, {CLIENTS} clients", granted[0], "op/s")
        row("HTTP: CPU of a grant", granted[1], "us")
    path = world.folder / "bare.db"
    connection = sqlite.connect(path)
    prepare(connection)
    connection.close()
    bare = await anyio.to_thread.run_sync(
        lambda: group_rate(lambda: sqlite.connect(path), CLIENTS, world.seconds)
    )
    row(f"bare group commit, {CLIENTS} clients", bare, "op/s")
    times = settled[0] / bare
    row("HTTP settlement / bare group commit", times, "x", ">= 0.15", times >= 0.15)
    rate, cpu = await _in_process(world, number)
    row(f"service without HTTP: settlements, {CLIENTS} clients", rate, "op/s")
    row("service without HTTP: CPU of a settlement", cpu, "us")
    row("HTTP settlement / service, CPU", settled[1] / cpu, "x")


async def _over_http(
    target: Program, number: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(op/s, CPU us) of settlements and of grants."""
    buyers = parties_of(deals(number, coordinator=target.peer, now=0))
    now = await enrol(target, buyers, funds=number * CAP)
    made = deals(number, coordinator=target.peer, now=now)
    requests = [deal.grant_request() for deal in made]
    grants, granted = await _timed(target, "/v1/grants", requests)
    claims = [
        deal.claim(deal.seller, grant, PAID) for deal, grant in zip(made, grants, strict=True)
    ]
    _, settled = await _timed(target, "/v1/settle", claims)
    return settled, granted


async def _timed(
    target: Program, path: str, bodies: list[bytes]
) -> tuple[list[bytes], tuple[float, float]]:
    cpu, began = target.cpu_s(), time.perf_counter()
    answers = await post_all(target.url, path, bodies, clients=CLIENTS)
    took = time.perf_counter() - began
    return answers, (len(bodies) / took, 1e6 * (target.cpu_s() - cpu) / len(bodies))


async def _in_process(world: World, number: int) -> tuple[float, float]:
    """The service's own settlements: checks, writer and receipts, without a server."""
    coordinator = Coordinator(Settings(state=world.folder / "inside"))
    async with coordinator.running():
        made = deals(number, coordinator=coordinator.peer_id, now=int(time.time()))
        await register_inside(coordinator, parties_of(made), funds=number * CAP)
        grants = await _each(coordinator.grants.grant, [deal.grant_request() for deal in made])
        claims = [
            deal.claim(deal.seller, grant, PAID) for deal, grant in zip(made, grants, strict=True)
        ]
        cpu, began = time.process_time(), time.perf_counter()
        await _each(coordinator.escrows.settle, claims)
        took = time.perf_counter() - began
        return len(claims) / took, 1e6 * (time.process_time() - cpu) / len(claims)


def measure_storm(world: World) -> None:
    """Clients that go on while the program is killed; it ends with an error when anything that was
    acknowledged is not there."""
    anyio.run(_measure_storm, world)


async def _measure_storm(world: World) -> None:
    operations, kills = (1_000, 3) if world.seconds < 1 else (100_000, 20)
    began = time.perf_counter()
    found = await storm(world.folder / "storm", operations=operations, clients=CLIENTS, kills=kills)
    took = time.perf_counter() - began
    world.row("storm: acknowledged operations", found.done, "")
    world.row("storm: kills", found.killed, "")
    world.row("storm: requests that lost their answer", found.repeated, "")
    world.row("storm: acknowledged and not there", 0, "", "0", True)
    world.row("storm: operations, starts and checks included", found.done / took, "op/s")


def measure_writes(world: World) -> None:
    """How often a session is written, whatever it is charged for: by design, and counted."""
    anyio.run(_measure_writes, world)


async def _measure_writes(world: World) -> None:
    counts = []
    for ticks in TICKS:
        coordinator = Coordinator(Settings(state=Path(world.folder / f"ticks-{ticks}")))
        async with coordinator.running():
            deal = deals(1, coordinator=coordinator.peer_id, now=int(time.time()), cap=10**6)[0]
            await register_inside(coordinator, parties_of([deal]), funds=10**9)
            before = coordinator.store.writer.stats.operations
            grant = (await _each(coordinator.grants.grant, [deal.grant_request()]))[0]
            # The ticks are vouchers from peer to peer; only the last one is ever shown here.
            last = [deal.voucher(tick, seq=tick) for tick in range(1, ticks + 1)][-1]
            claim = deal.claim(deal.seller, grant, ticks, voucher=last)
            await _each(coordinator.escrows.settle, [claim])
            counts.append(coordinator.store.writer.stats.operations - before)
    for ticks, found in zip(TICKS, counts, strict=True):
        world.row(f"writes of a session, {ticks:,} ticks", found, "")
    world.row("writes: most ticks / few", counts[1] / counts[0], "x", "1", counts[0] == counts[1])


async def register_inside(
    coordinator: Coordinator, parties: Sequence[Party], *, funds: int
) -> None:
    """As `register`, by the services' own methods."""
    now = int(time.time())
    for party in parties:
        challenge = coordinator.identity.challenge(party.peer)["challenge"]
        body = registration(party, coordinator.peer_id, challenge, now=now)
        await coordinator.identity.register(body)
        body = credit_request(party, coordinator.peer_id, max(funds, CREDIT_NANOS_MIN), now=now)
        await coordinator.ledger.give_credit(body)


async def _each(call: Callable[[bytes], Awaitable[T]], bodies: Sequence[bytes]) -> list[T]:
    """Every body, by CLIENTS callers side by side; the results in order."""
    found: dict[int, T] = {}
    numbers = iter(range(len(bodies)))

    async def one() -> None:
        for number in numbers:
            found[number] = await call(bodies[number])

    async with anyio.create_task_group() as tasks:
        for _ in range(CLIENTS):
            tasks.start_soon(one)
    return [found[number] for number in range(len(bodies))]
