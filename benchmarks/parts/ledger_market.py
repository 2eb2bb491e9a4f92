"""Documents made beforehand, and clients that cost little: what is measured is the server."""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from tests.coordinator.builders import Deal, Party
from tests.planet.storm import CAP, OPEN_PER_BUYER, Client


def deals(number: int, *, coordinator: str, now: int, cap: int = CAP) -> list[Deal]:
    """That many sessions, of as many buyers as it takes, with one seller."""
    seller = Party("seller")
    # Made beforehand: they may start long after they were signed.
    changes = {"start_by": now + 3_000, "ends_at": now + 3_600}
    return [
        Deal(
            Party(f"buyer-{n // OPEN_PER_BUYER}"),
            seller,
            coordinator,
            cap=cap,
            now=now,
            changes=changes,
        )
        for n in range(number)
    ]


def parties_of(made: Sequence[Deal]) -> list[Party]:
    """Everybody who trades."""
    return list(dict.fromkeys(party for deal in made for party in (deal.buyer, deal.seller)))


async def post_all(url: str, path: str, bodies: Sequence[bytes], *, clients: int) -> list[bytes]:
    """Send every body from some connections; the answers in order. Raises on any refusal."""
    answers = [b""] * len(bodies)
    numbers = iter(range(len(bodies)))

    async def one() -> None:
        client = Client()
        try:
            for number in numbers:
                status, answers[number] = await client.send(url, "POST", path, bodies[number])
                if status != 200:
                    raise RuntimeError(f"{path}: {status} {answers[number][:300]!r}")
        finally:
            await client.aclose()

    async with anyio.create_task_group() as tasks:
        for _ in range(clients):
            tasks.start_soon(one)
    return answers
