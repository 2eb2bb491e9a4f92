"""The engine thread, called from plain code, asyncio and trio."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest
import trio

from lumaris.engine import Engine
from lumaris_protocol.errors import LumarisError

WAIT_S = 10


@pytest.fixture
def engine() -> Iterator[Engine]:
    found = Engine()
    yield found
    found.close()


class Work:
    """Work that sleeps until it is cancelled, and cleans up slowly."""

    def __init__(self) -> None:
        self.started, self.cleaned = threading.Event(), threading.Event()

    async def __call__(self) -> None:
        self.started.set()
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.02)
            self.cleaned.set()


async def answer() -> int:
    await trio.lowlevel.checkpoint()
    return 42


async def fail() -> None:
    raise LumarisError("no_offers")


def test_from_plain_code(engine: Engine):
    assert engine.call(answer) == 42
    with pytest.raises(LumarisError):
        engine.call(fail)
    assert engine.call(answer) == 42


def started() -> set[threading.Thread | None]:
    """Every engine's thread in this process; other tests may have one running."""
    return {thread for thread in threading.enumerate() if thread.name == "lumaris-engine"}


def test_from_many_threads(engine: Engine):
    before = started()
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(engine.call(answer))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert found == [42] * 8
    assert started() - before == {engine._thread}


def test_from_asyncio(engine: Engine):
    async def main() -> int:
        with pytest.raises(LumarisError):
            await engine.call_async(fail)
        return await engine.call_async(answer)

    assert asyncio.run(main()) == 42


async def test_from_trio(engine: Engine):
    assert await engine.call_async(answer) == 42
    with pytest.raises(LumarisError):
        await engine.call_async(fail)


async def test_cancelled_in_trio(engine: Engine):
    work = Work()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.call_async, work)
        await trio.to_thread.run_sync(work.started.wait, WAIT_S)
        nursery.cancel_scope.cancel()
    assert work.cleaned.is_set(), "the caller goes on only after the clean-up"


def test_cancelled_in_asyncio(engine: Engine):
    work = Work()

    async def main() -> None:
        task = asyncio.create_task(engine.call_async(work))
        await asyncio.to_thread(work.started.wait, WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.cleaned.is_set()

    asyncio.run(main())


def test_ctrl_c_cancels_and_waits(engine: Engine):
    work = Work()

    def interrupt() -> None:
        work.started.wait(WAIT_S)
        os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            engine.call(work)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert work.cleaned.is_set()
    assert engine.call(answer) == 42


def test_a_call_inside_the_engine_would_block(engine: Engine):
    async def inner() -> None:
        engine.call(answer)

    with pytest.raises(LumarisError) as caught:
        engine.call(inner)
    assert caught.value.code == "usage"


def test_closing_leaves_nobody_waiting(engine: Engine):
    work, ended = Work(), threading.Event()

    def call() -> None:
        with pytest.raises(BaseException):  # noqa: B017 - a cancelled future's own error
            engine.call(work)
        ended.set()

    thread = threading.Thread(target=call)
    thread.start()
    assert work.started.wait(WAIT_S)
    engine.close()
    assert work.cleaned.is_set()
    assert ended.wait(WAIT_S)
    thread.join(WAIT_S)
    assert engine.call(answer) == 42, "it starts again on use"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork_the_child_has_its_own(engine: Engine):
    assert engine.call(answer) == 42
    child = os.fork()
    if child == 0:
        try:
            os._exit(engine.call(answer))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 42
    assert engine.call(answer) == 42
