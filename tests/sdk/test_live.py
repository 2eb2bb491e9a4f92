"""Reaching into a running order, from the buyer's side through the whole market."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from lumaris import live
from lumaris.buyer import Buyer
from lumaris.jobs import JobResult
from lumaris.live import Place
from lumaris.store import Store
from lumaris_node.live import LiveDesk
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import LOG_CHUNK_BYTES_MAX
from tests.market import WAIT_S, Market, Seller, eventually, eventually_async
from tests.node.puppet import USAGE, Guest, PuppetNode

pytestmark = pytest.mark.slow


@dataclass
class Scene:
    """A job that runs, and everybody around it."""

    market: Market
    seller: Seller
    buyer: Buyer
    guest: Guest
    place: Place
    results: list[JobResult | LumarisError] = field(default_factory=list)

    @property
    def store(self) -> Store:
        return self.buyer.store

    @property
    def desk(self) -> LiveDesk:
        return self.seller.node._sessions.live

    async def result(self) -> JobResult:
        await eventually(lambda: bool(self.results), "the job has ended")
        found = self.results[0]
        assert isinstance(found, JobResult), found
        return found


class Cutting:
    """An overlay whose streams the test can cut."""

    def __init__(self, overlay: Any) -> None:
        self._overlay = overlay
        self.streams: list[Any] = []

    async def open_stream(self, *arguments: Any, **options: Any) -> Any:
        stream = await self._overlay.open_stream(*arguments, **options)
        self.streams.append(stream)
        return stream


@asynccontextmanager
async def running(market: Market, **changes: Any) -> AsyncIterator[Scene]:
    """A job of the puppet that runs; it is ended with the context."""
    seller = await market.seller()
    assert isinstance(seller.node, PuppetNode)
    async with market.buyer() as buyer, trio.open_nursery() as nursery:
        results: list[JobResult | LumarisError] = []
        feed = changes.pop("feed", None)

        async def run() -> None:
            try:
                results.append(await buyer.run(market.request("w", **changes), stdin=feed))
            except LumarisError as error:
                results.append(error)

        nursery.start_soon(run)
        guest = await seller.node.puppet.guest()

        async def known() -> bool:
            return bool(await place_of(buyer.store))

        await eventually_async(known, "the records know where the job runs")
        found = await place_of(buyer.store)
        assert found is not None
        yield Scene(market, seller, buyer, guest, found, results)
        guest.end()


async def place_of(store: Store) -> Place | None:
    rows = await store.jobs(1)
    try:
        return await live.find_place(store, rows[0]["job"]) if rows else None
    except LumarisError:
        return None


@pytest.fixture(autouse=True)
def puppets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.market.SmallNode", PuppetNode)


async def code_of(awaitable: Any) -> str:
    with pytest.raises(LumarisError) as caught:
        await awaitable
    return caught.value.code


# --- the log ---


async def test_the_log_is_followed_to_its_end(market: Market):
    async with running(market) as scene, trio.open_nursery() as nursery:
        heard: list[tuple[str, bytes]] = []

        async def show(stream: str, data: bytes) -> None:
            heard.append((stream, data))

        await scene.guest.say(b"before ")
        sizes: list[int] = []

        async def follow() -> None:
            sizes.append(await live.follow_log(scene.buyer.overlay, scene.place, show))

        nursery.start_soon(follow)
        await eventually(lambda: heard == [("stdout", b"before ")], "the first part came")
        await scene.guest.say(b"oops", "stderr")
        await scene.guest.say(b"after")
        scene.guest.end()
        await eventually(lambda: bool(sizes), "the log has ended")
        assert sizes == [len(b"before oopsafter")]
        assert b"".join(data for _, data in heard) == b"before oopsafter"
        assert ("stderr", b"oops") in heard
        assert (await scene.result()).ok


async def test_a_cut_log_goes_on_where_it_was(market: Market):
    async with running(market) as scene, trio.open_nursery() as nursery:
        overlay, heard, done = Cutting(scene.buyer.overlay), bytearray(), trio.Event()

        async def show(_: str, data: bytes) -> None:
            heard.extend(data)

        async def follow() -> None:
            await live.follow_log(overlay, scene.place, show)  # type: ignore[arg-type]
            done.set()

        nursery.start_soon(follow)
        parts = [os.urandom(LOG_CHUNK_BYTES_MAX - 7) for _ in range(5)]
        said = 0
        for part in parts:
            await scene.guest.say(part)
            said += len(part)
            await eventually(partial(lambda size: len(heard) == size, said), "it came")
            if part is not parts[-1]:
                await overlay.streams[-1].reset()
        scene.guest.end()
        with trio.fail_after(WAIT_S):
            await done.wait()
        assert bytes(heard) == b"".join(parts), "nothing twice, nothing lost"
        assert len(overlay.streams) >= 3


async def test_a_reader_that_does_not_read_holds_nobody_up(market: Market):
    async with running(market, log_bytes=1 << 20) as scene, trio.open_nursery() as nursery:
        never, fast = trio.Event(), bytearray()

        async def stuck(_: str, data: bytes) -> None:
            await never.wait()

        async def show(_: str, data: bytes) -> None:
            fast.extend(data)

        nursery.start_soon(live.follow_log, scene.buyer.overlay, scene.place, stuck)
        nursery.start_soon(live.follow_log, scene.buyer.overlay, scene.place, show)
        part = os.urandom(LOG_CHUNK_BYTES_MAX)
        for _ in range(32):
            await scene.guest.say(part)
        await eventually(lambda: len(fast) == 1 << 20, "the other reader has it all")
        nursery.cancel_scope.cancel()


async def test_what_is_not_there_is_refused(market: Market):
    async with running(market) as scene:
        overlay, place = scene.buyer.overlay, scene.place

        async def show(_: str, data: bytes) -> None:
            return

        from dataclasses import replace

        assert await code_of(live.follow_log(overlay, replace(place, n=9), show)) == "not_attached"
        other = replace(place, session="ses_" + "a" * 24)
        assert await code_of(live.follow_log(overlay, other, show)) == "not_found"
        assert await code_of(live.follow_log(overlay, place, show, offset=10**6)) == "not_found"
        async with scene.market.buyer("thief") as thief:
            assert await code_of(live.follow_log(thief.overlay, place, show)) == "not_found"
        scene.guest.end()
        await scene.result()
        await eventually(lambda: not scene.desk._streams, "no stream is counted any more")


# --- standard input ---


async def test_standard_input_from_the_program_itself(market: Market):
    given = [b"one ", b"two", b""]

    async def feed() -> bytes:
        return given.pop(0)

    async with running(market, feed=feed, attempts=3) as scene:
        scene.guest.hungry.set()
        with trio.fail_after(WAIT_S):
            await scene.guest.stdin_ended.wait()
        assert scene.guest.spec.stdin
        assert b"".join(scene.guest.stdin) == b"one two"


async def test_standard_input_waits_for_the_guest(market: Market):
    async with running(market, stdin=True) as scene, trio.open_nursery() as nursery:
        sent = 0

        async def source() -> bytes:
            nonlocal sent
            sent += 1 << 16
            return b"x" * (1 << 16) if sent <= 16 << 20 else b""

        nursery.start_soon(live.send_stdin, scene.buyer.overlay, scene.place, source)
        await eventually(lambda: bool(scene.desk._streams), "it is attached")
        for _ in range(10):  # time in which a sender that is not held up would be done
            second = live.send_stdin(scene.buyer.overlay, scene.place, source)
            assert await code_of(second) == "not_attached", "there is one input"
        assert 0 < sent < 8 << 20, "what is on the way is bounded"
        scene.guest.hungry.set()
        with trio.fail_after(WAIT_S):
            await scene.guest.stdin_ended.wait()
        assert sum(map(len, scene.guest.stdin)) == 16 << 20


async def test_input_ends_with_the_order(market: Market):
    async with running(market, stdin=True) as scene, trio.open_nursery() as nursery:
        codes: list[str] = []

        async def source() -> bytes:
            await trio.sleep_forever()
            raise AssertionError

        async def send() -> None:
            codes.append(await code_of(live.send_stdin(scene.buyer.overlay, scene.place, source)))

        nursery.start_soon(send)
        await eventually(lambda: bool(scene.desk._streams), "it is attached")
        scene.guest.end()
        await eventually(lambda: codes == ["not_attached"], "the sender is told")


async def test_no_input_where_none_was_ordered(market: Market):
    async def source() -> bytes:
        return b""

    async with running(market) as scene:
        found = live.send_stdin(scene.buyer.overlay, scene.place, source)
        assert await code_of(found) == "not_attached"


# --- commands and ports ---


async def test_a_command_inside(market: Market):
    async with running(market) as scene:
        overlay = scene.buyer.overlay
        async with live.open_command(overlay, scene.place, ("cat",)) as command:
            await command.send(b"hello")
            assert await command.receive() == ("stderr", b"hello")
            await command.send_eof()
            assert await command.receive() is None
            assert command.exit_status == 7
        async with live.open_command(
            overlay, scene.place, ("sh",), tty=True, rows=5, columns=6
        ) as command:
            await command.resize(50, 60)
            await command.send(b"x")
            assert await command.receive() == ("stdout", b"x")
            assert scene.guest.commands[-1].sizes == [(5, 6), (50, 60)]
        with trio.fail_after(WAIT_S):
            await scene.guest.commands[-1].closed.wait()
        missing = live.open_command(overlay, scene.place, ("missing",)).__aenter__()
        assert await code_of(missing) == "bad_command"


async def test_a_command_ends_with_its_order(market: Market):
    async with (
        running(market) as scene,
        live.open_command(scene.buyer.overlay, scene.place, ("cat",)) as command,
    ):
        scene.guest.end()
        assert await code_of(command.receive()) == "not_attached"
        with trio.fail_after(WAIT_S):
            await scene.guest.commands[-1].closed.wait()


async def test_too_many_commands_are_refused(market: Market):
    async with running(market) as scene, trio.open_nursery() as nursery:

        async def hold() -> None:
            async with live.open_command(scene.buyer.overlay, scene.place, ("cat",)):
                await trio.sleep_forever()

        for _ in range(8):
            nursery.start_soon(hold)
        await eventually(lambda: len(scene.guest.commands) == 8, "they run")
        more = live.open_command(scene.buyer.overlay, scene.place, ("cat",)).__aenter__()
        assert await code_of(more) == "busy"
        nursery.cancel_scope.cancel()


async def test_a_port_inside(market: Market):
    async with running(market) as scene, trio.open_nursery() as nursery:
        asked: list[tuple[int, int]] = []
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        inside: int = listeners[0].socket.getsockname()[1]

        async def answer(stream: trio.SocketStream) -> None:
            data = b""
            while part := await stream.receive_some():
                data += bytes(part)
            await stream.send_all(data.upper())  # after the other half was closed

        async def connect(pid: int, port: int) -> trio.SocketStream:
            asked.append((pid, port))
            if port == 81:
                raise LumarisError("unreachable")
            return await trio.open_tcp_stream("127.0.0.1", inside)

        scene.desk._connect = connect
        nursery.start_soon(trio.serve_listeners, answer, listeners)
        ready: list[int] = []
        reports: list[str] = []

        def report(error: LumarisError) -> None:
            reports.append(error.code)

        async def forward(port: int) -> None:
            await live.forward(
                scene.buyer.overlay, scene.place, port, ready=ready.append, report=report
            )

        nursery.start_soon(forward, 80)
        await eventually(lambda: len(ready) == 1, "it listens")
        async with await trio.open_tcp_stream("127.0.0.1", ready[0]) as client:
            await client.send_all(b"x" * 300_000)
            await client.send_eof()
            got = b""
            with trio.fail_after(WAIT_S):
                while part := await client.receive_some():
                    got += bytes(part)
        assert got == b"X" * 300_000
        assert asked == [(4242, 80)]
        nursery.start_soon(forward, 81)
        await eventually(lambda: len(ready) == 2, "it listens")
        async with await trio.open_tcp_stream("127.0.0.1", ready[1]) as client:
            with trio.fail_after(WAIT_S):
                assert await client.receive_some() == b""
        assert reports == ["unreachable"]
        nursery.cancel_scope.cancel()


async def test_ports_are_not_announced_where_a_job_has_none(
    market: Market, monkeypatch: pytest.MonkeyPatch
):
    async def none(*_: Any) -> int:
        raise LumarisError("not_supported")

    async with running(market) as scene:
        ready: list[int] = []
        (run,) = [host._run for host in scene.seller.node._sessions.hosts if host._run]
        monkeypatch.setattr(run.executor, "network_pid", none)
        joined = live.forward(
            scene.buyer.overlay, scene.place, 80, ready=ready.append, report=lambda _: None
        )
        with trio.fail_after(WAIT_S):
            assert await code_of(joined) == "not_supported"
        assert ready == []


# --- usage and cancelling ---


async def test_usage_is_in_the_records_while_it_runs(market: Market):
    async with running(market) as scene:

        async def metered() -> bool:
            row = await scene.store.job(scene.place.job)
            return row is not None and row["cpu_ms"] == USAGE.cpu_ms

        await eventually_async(metered, "the meter has told")
        row = await scene.store.job(scene.place.job)
        assert row is not None
        assert row["memory_peak_bytes"] == USAGE.memory_peak_bytes
        assert row["fuel"] == USAGE.fuel
        assert row["wall_ms"] > USAGE.wall_ms, "what is billed is our own clock"
        assert row["state"] == "running"


async def test_another_program_cancels_with_grace(market: Market, tmp_path: Path):
    async with running(market) as scene:
        other = Store(scene.buyer.profile.database)
        try:
            row = await live.cancel(other, scene.place.job, grace_s=3)
            assert row["reason"] == "cancelled"
            assert scene.guest.graces == [3]
            assert (await scene.result()).reason == "cancelled"
            assert await code_of(live.cancel(other, scene.place.job)) == "not_attached"
            assert await code_of(live.cancel(other, "job_" + "z" * 24)) == "not_found"
        finally:
            other.close()


async def test_the_lease_is_released_and_named(market: Market):
    async with running(market) as scene:
        assert scene.guest.spec.lease == scene.place.session
        assert scene.guest.spec.limits.pids == 256
        scene.guest.end()
        await scene.result()
    node = scene.seller.node
    assert isinstance(node, PuppetNode)
    await eventually(lambda: node.puppet.released == [scene.place.session], "it is released")
