"""Commands beside an order's own: paced together, and none outlives the order. No engine needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lumaris_node.executors.container.engine import Engine
from lumaris_node.executors.container.executor import ContainerExecutor
from lumaris_node.executors.container.run import Command, ContainerAttachment, Pace, Run
from lumaris_node.executors.container.sandbox import Sandbox
from lumaris_node.executors.port import Handle, JobSpec, Stream
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import KIB, MIB
from tests.node.executors.conformance import LIMITS


class Output:
    """A guest's stream that never ends."""

    async def receive(self) -> tuple[Stream, bytes]:
        await trio.lowlevel.checkpoint()
        return "stdout", bytes(32 * KIB)

    async def aclose(self) -> None:
        pass


class Removed(Sandbox):
    """A sandbox of a lease, clean whenever it is asked."""

    ended = False

    async def clean(self, engine: Engine) -> bool:
        return not self.dirty

    async def end(self, engine: Engine) -> bool:
        self.ended = True
        return True


class Order:
    """A running order whose engine starts commands when the test says so."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.executor = ContainerExecutor("node", base_url="unix:///none")
        self.engine = self.executor._engine
        spec = JobSpec("job", "", ("x",), {}, folder, folder, LIMITS, lease="lease")
        self.sandbox = Removed("c", {}, ())
        self.run = Run(self.engine, spec, self.sandbox, command=self.command())
        self.executor._warm["lease"] = self.executor._live["c"] = self.sandbox
        self.handle = Handle(spec, {"run": self.run})
        self.begins = trio.Event()
        self.closed = 0
        self.fails: Callable[[], None] = lambda: None
        monkeypatch.setattr(Command, "begin", self._begin)
        monkeypatch.setattr(Command, "aclose", self._aclose)

    def command(self) -> Command:
        return Command(self.engine, "exec", Output())  # type: ignore[arg-type]

    async def _begin(self, *_: object, **__: object) -> Command:
        await self.begins.wait()
        self.fails()
        return self.command()

    async def _aclose(self) -> None:
        self.closed += 1

    async def attach(self) -> ContainerAttachment:
        return await self.executor.attach(self.handle, ("x",), tty=False, rows=0, columns=0)


@pytest.fixture
async def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    return Order(tmp_path, monkeypatch)


async def refused(order: Order) -> None:
    with pytest.raises(LumarisError) as caught:
        await order.attach()
    assert caught.value.code == "not_attached"


async def test_nothing_begins_once_the_end_was_seen(order: Order):
    order.run.ending = True
    await refused(order)


async def test_what_began_while_the_order_ended_is_killed(order: Order):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(refused, order)
        await wait_all_tasks_blocked()
        order.run.ending = True
        order.begins.set()
    assert order.closed == 1
    await order.executor.destroy(order.handle)
    assert not order.sandbox.ended, "nothing is under way: it is proven clean and kept"


async def test_a_sandbox_in_which_a_command_is_still_started_is_not_kept(order: Order):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(refused, order)
        await wait_all_tasks_blocked()
        order.run.ending = True
        await order.executor.destroy(order.handle)
        assert order.sandbox.ended
        order.begins.set()


@pytest.mark.parametrize(("code", "kept"), [("bad_command", True), ("platform_error", False)])
async def test_a_start_that_may_still_happen_costs_the_sandbox(order: Order, code: str, kept: bool):
    def fails() -> None:
        raise LumarisError(code)

    order.fails = fails
    order.begins.set()
    with pytest.raises(LumarisError, match=code):
        await order.attach()
    await order.executor.destroy(order.handle)
    assert order.sandbox.ended is not kept


async def test_a_start_that_nobody_waits_for_costs_the_sandbox(order: Order):
    with trio.move_on_after(0.01):
        await order.attach()
    await order.executor.destroy(order.handle)
    assert order.sandbox.ended


async def test_all_output_of_a_sandbox_has_one_pace(order: Order, autojump_clock: MockClock):
    read = 0

    async def one() -> None:
        nonlocal read
        attachment = ContainerAttachment(order.command(), order.sandbox, order.run.pace, tty=False)
        while part := await attachment.receive():
            read += len(part[1])

    with trio.move_on_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one)
    assert 20 * MIB < read < 23 * MIB


async def test_little_output_waits_for_nothing(autojump_clock: MockClock):
    pace, began = Pace(), trio.current_time()
    for _ in range(16):
        await pace.take(64 * KIB)
    assert trio.current_time() == began
