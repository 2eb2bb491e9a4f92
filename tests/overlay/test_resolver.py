"""Names whose servers never answer keep no thread that anybody else needs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from lumaris_overlay.resolver import Resolver

ANSWER = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.7", 443))


class Server:
    """What the names' servers do: nothing, until `answer` is set. `begun` are those asked."""

    def __init__(self) -> None:
        self.answer, self.begun = threading.Event(), list[str]()

    def look_up(self, host: str, *_: object, **__: object) -> list[object]:
        self.begun.append(host)
        self.answer.wait(20)
        return [ANSWER, ANSWER]

    async def asked(self, count: int) -> None:
        with trio.fail_after(10):
            while len(self.begun) < count:
                await trio.sleep(0.001)
        await wait_all_tasks_blocked()
        assert len(self.begun) == count


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server()
    monkeypatch.setattr(socket, "getaddrinfo", found.look_up)
    yield found
    found.answer.set()


async def test_an_address_counts_once(server: Server):
    server.answer.set()
    assert await Resolver()("a.org", 443) == ("192.0.2.7",)


async def test_one_who_asks_for_silent_names_keeps_four_threads_and_none_of_the_programs(
    server: Server,
):
    limiter = trio.to_thread.current_default_thread_limiter()
    one, other = Resolver(), Resolver()
    async with trio.open_nursery() as nursery:
        for number in range(64):
            nursery.start_soon(one, f"n{number}.evil.org", 443)
        await server.asked(4)
        assert limiter.borrowed_tokens == 0
        nursery.start_soon(other, "a.org", 443)
        await server.asked(5)
        server.answer.set()


async def test_all_together_keep_sixteen(server: Server):
    async with trio.open_nursery() as nursery:
        for _ in range(6):
            one = Resolver()
            for number in range(4):
                nursery.start_soon(one, f"n{number}.evil.org", 443)
        await server.asked(16)
        server.answer.set()
    assert len(server.begun) == 24


async def test_a_lookup_that_was_given_up_counts_until_its_thread_ends(server: Server):
    one = Resolver()
    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(one, f"n{number}.evil.org", 443)
        await server.asked(4)
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, "again.evil.org", 443)
        await wait_all_tasks_blocked()
        assert len(server.begun) == 4
        server.answer.set()
    assert len(server.begun) == 5
