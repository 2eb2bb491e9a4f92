"""What a stranger, a bug or a broken disk can cost a seller: one order, one session, a bound."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from lumaris_node.desk import Terms
from lumaris_node.inputs import Inputs
from lumaris_node.orders import OrderRun
from lumaris_node.session import SessionHost
from lumaris_node.settle import Settler
from lumaris_node.store import Store
from lumaris_node.workspace import Volumes
from lumaris_overlay.framed_stream import FramedStream
from lumaris_protocol import limits
from lumaris_protocol.coordinator_api import Request
from lumaris_protocol.effects import RunOrder
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.machines.seller import SellerSession
from lumaris_protocol.messages.execution import File
from lumaris_protocol.settlement import Papers
from tests import market as m
from tests.market import Market, eventually, eventually_async
from tests.protocol import parties as p
from tests.protocol.pair import Pair

# --- the disk ---


def file(name: str, size_bytes: int) -> File:
    return File(path=name, size_bytes=size_bytes, sha256=p.digest_of(name))


def put(inputs: Inputs, item: File) -> None:
    """As if the buyer had sent it."""
    inputs.path(item.sha256).write_bytes(b"")
    inputs._sizes[item.sha256] = item.size_bytes


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inputs:
    """Of an agreement over 100 bytes, with an allowance of 50."""
    monkeypatch.setattr("lumaris_node.inputs.INPUT_ALLOWANCE_BYTES", 50)
    return Inputs(tmp_path, disk_bytes=100)


def test_inputs_count_against_the_disk(inputs: Inputs):
    fits, much = (file("a", 50),), (file("a", 50), file("b", 1))
    assert inputs.room(fits, disk_bytes=100, other_bytes=0) == 0
    assert inputs.room(much, disk_bytes=100, other_bytes=0) < 0
    assert inputs.room(fits, disk_bytes=100, other_bytes=1) < 0, "outputs count"
    assert inputs.room((file("c", 50), file("c", 50)), disk_bytes=100, other_bytes=0) == 0, "once"


async def test_the_oldest_inputs_go_first(inputs: Inputs, tmp_path: Path):
    items = [file(name, 10) for name in "abcd"]
    for item in items:
        put(inputs, item)
    inputs.use(items[0])
    await inputs.trim(20, keep={items[2].sha256})
    assert [inputs.has(item.sha256) for item in items] == [True, False, True, False]
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(LumarisError, match="bad_input"):
        inputs.use(file("a", 9))


def host_of(tmp_path: Path, **changes: Any) -> tuple[SessionHost, FramedStream, Any]:
    """An open session, the buyer's end of its stream, and both machines."""
    pair = Pair().open()
    ours, theirs = memory_stream_pair()
    session = SessionHost(
        pair.seller,
        FramedStream(ours),
        executor=cast(Any, changes.get("executor")),
        volumes=Volumes.open(tmp_path / "volumes", encryption="off"),
        store=cast(Any, changes.get("store") or Rows()),
        clock=lambda: pair.now,
    )
    return session, FramedStream(theirs), pair


class Rows:
    """A store that notes how sessions end."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.evidence = Path("/nonexistent/evidence")  # where nothing can be kept

    async def keep_voucher(self, *_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    async def end_session(self, _session: str, reason: str, **_: object) -> None:
        self.reasons.append(reason)


async def test_an_order_that_cannot_fit_is_refused(tmp_path: Path):
    session, _, pair = host_of(tmp_path)
    disk = pair.contract.agreement.resources.disk_bytes
    order = SimpleNamespace(
        inputs=(file("a", limits.INPUT_ALLOWANCE_BYTES + 1),),
        limits=SimpleNamespace(disk_bytes=disk),
    )
    with pytest.raises(LumarisError, match="disk_short"):
        await session.make_room(cast(Any, order))
    order.inputs = (file("a", 1),)
    session._kept[1] = disk + limits.INPUT_ALLOWANCE_BYTES
    waited = False

    async def answer() -> None:
        nonlocal waited
        waited = True
        await session._wipe(cast(Any, SimpleNamespace(wipe=trio.lowlevel.checkpoint, order=pair_1)))

    pair_1 = SimpleNamespace(n=1)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            await session.make_room(cast(Any, order))
    assert waited, "unanswered outputs are waited for"


async def test_one_upload_of_a_file_at_a_time(inputs: Inputs):
    item = file("a", 10)
    header = cast(Any, SimpleNamespace(sha256=item.sha256, size_bytes=10))
    ours, _theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        with inputs.wanting({item.sha256: 10}):
            nursery.start_soon(inputs.take, header, FramedStream(ours))
            await wait_all_tasks_blocked()
            with pytest.raises(RefusedError, match="busy"):
                await inputs.take(header, FramedStream(ours))
            nursery.cancel_scope.cancel()


# --- the buyer that does not read ---


async def test_a_buyer_that_does_not_read_is_not_heard_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lumaris_overlay.outbox._STALL_S", 0.1)
    rows = Rows()
    session, theirs, pair = host_of(tmp_path, store=rows)
    session._stream.stream.send_stream.send_all_hook = trio.sleep_forever  # type: ignore[attr-defined]
    queued = 0

    async def flood() -> None:
        nonlocal queued
        for _ in range(500):
            pair.order(key=p.id_of("job", "same"))
            data = pair.to_seller.popleft()
            try:
                await theirs.send(Kind.ENVELOPE, data)
            except trio.BrokenResourceError:
                return  # the session has hung up on us, as it should
            await trio.lowlevel.checkpoint()
            queued = max(queued, session._outbox.waiting)

    with trio.fail_after(m.WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            reason = await session.run(ending=lambda: None, freed=lambda: None)
            nursery.cancel_scope.cancel()
    assert reason == "buyer_lost"
    assert rows.reasons == ["buyer_lost"]
    assert queued <= 70


# --- what breaks here ---


async def test_a_broken_store_ends_the_session_with_a_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rows = Rows()
    session, theirs, pair = host_of(tmp_path, store=rows)
    pair.order()
    pair.pump()
    pair.start()
    pair.deliver()
    while pair.to_buyer:
        pair.pump_to_buyer()
    reasons: list[str] = []

    async def run() -> None:
        reasons.append(await session.run(ending=lambda: None, freed=lambda: None))

    with trio.fail_after(m.WAIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            for data in pair.to_seller:
                await theirs.send(Kind.ENVELOPE, data)
            frames = []
            while frame := await theirs.receive():
                frames.append(frame)
    assert frames[-1].kind == Kind.REFUSAL
    assert b"platform_error" in frames[-1].body
    assert reasons == rows.reasons == ["platform_error"]
    traces = [record for record in caplog.records if record.exc_info]
    assert len(traces) == 1, "logged once"


class Broken:
    """An executor with a bug."""

    tier = "wasm"

    async def has_image(self, _digest: str) -> bool:
        raise RuntimeError("a bug")


async def test_a_bug_costs_one_order(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    session, _theirs, pair = host_of(tmp_path, executor=Broken())
    n = pair.order()
    [run] = pair.seller.receive(pair.to_seller.popleft(), now=pair.now)
    assert isinstance(run, RunOrder)
    order = OrderRun(run.order, session, cast(Any, Broken()), tmp_path / "jobs")
    await order.run()
    [(_, told)] = session._outbox._sends
    assert b'"platform_error"' in told.data
    assert n not in pair.seller._live
    assert not (tmp_path / "jobs").exists()
    assert [record for record in caplog.records if record.exc_info]


async def test_an_end_that_cannot_be_told_is_told_plainly(tmp_path: Path, monkeypatch):
    session, _theirs, pair = host_of(tmp_path, executor=Broken())
    pair.order()
    [run] = pair.seller.receive(pair.to_seller.popleft(), now=pair.now)
    assert isinstance(run, RunOrder)
    real, calls = SellerSession.failed, []

    def failed(self: SellerSession, *args: Any, **fields: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise ValueError("does not fit")
        return real(self, *args, **fields)

    async def no_image(_: str) -> bool:
        raise LumarisError("bad_image")

    monkeypatch.setattr(SellerSession, "failed", failed)
    executor = cast(Any, SimpleNamespace(tier="wasm", has_image=no_image))
    await OrderRun(run.order, session, executor, tmp_path / "jobs").run()
    assert [args[2] for args in calls] == ["bad_image", "platform_error"]


# --- claims ---


class Line:
    """A coordinator that answers each claim as told."""

    def __init__(self, answers: dict[str, Callable[[], bytes]]) -> None:
        self.answers, self.asked = answers, []  # type: ignore[var-annotated]

    async def call(self, request: Request[Any]) -> Any:
        self.asked.append(request.path)
        return self.answers[request.path]()


def refuses(code: str) -> Callable[[], bytes]:
    def answer() -> bytes:
        raise RefusedError(code)

    return answer


class Claims:
    """Unsettled sessions."""

    def __init__(self, *names: str) -> None:
        self.names, self.given_up = list(names), {}  # type: ignore[var-annotated]

    async def unsettled(self) -> list[Papers]:
        return [Papers(name, b"", b"", b"grant", None, 0) for name in self.names]

    async def give_up(self, name: str, reason: str) -> None:
        self.names.remove(name)
        self.given_up[name] = reason


def settler(store: Any, settle: Callable[[Papers], Awaitable[None]]) -> Settler:
    found = Settler(
        cast(Any, None),
        store,
        KeyPair(bytes(32)),
        Terms("devnet", "coordinator", 0),
        token=lambda: "token",
        clock=lambda: 0.0,
    )
    found._settle = settle  # type: ignore[method-assign, assignment]
    return found


@pytest.mark.parametrize("fault", [LumarisError("internal"), ValueError("a bug")])
async def test_a_bad_claim_holds_up_no_other(
    fault: Exception, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
):
    claims, tried = Claims("bad", "good"), []

    async def settle(item: Papers) -> None:
        tried.append(item.session)
        if item.session == "bad":
            raise fault
        claims.names.remove(item.session)

    found = settler(claims, settle)
    assert not await found.settle_all()
    assert claims.names == ["bad"]
    assert found.last_error == "internal"
    assert not await found.settle_all()
    assert tried == ["bad", "good"], "it waits for its own turn"
    await trio.sleep(0.6)
    await found.settle_all()
    await trio.sleep(0.6)
    await found.settle_all()
    assert tried.count("bad") == 2, "and then for longer"
    assert len([record for record in caplog.records if record.exc_info]) <= 1


async def test_an_outage_is_not_asked_about_every_claim():
    claims, tried = Claims("one", "two"), []

    async def settle(item: Papers) -> None:
        tried.append(item.session)
        raise RefusedError("busy")

    assert not await settler(claims, settle).settle_all()
    assert tried == ["one"]


# --- rows ---


async def test_old_rows_go_and_their_sums_stay(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("lumaris_node.store._SETTLED_MAX", 2)
    store = Store(tmp_path / "node.db")
    rows = [
        ("old_agreed", None, "agreed", 0, 0, 0),
        ("old_lapsed", None, "settled", 0, 1, 0),
        ("new_agreed", None, "agreed", 9000, 0, 0),
        ("ended", b"g", "ended", 0, 3, 5),
        *((f"s{n}", b"g", "settled", 0, n, 10) for n in range(4, 8)),
    ]
    for name, grant, state, started_at, ended_at, earned in rows:
        store._connection.execute(
            'INSERT INTO session (session, buyer, by_buyer, by_seller, "grant", state, started_at,'
            " ended_at, earned_nanos, orders_done) VALUES (?, '', '', '', ?, ?, ?, ?, ?, 1)",
            (name, grant, state, started_at, ended_at, earned),
        )
    assert await store.prune(now=10_000) == 4
    assert await store.prune(now=10_000) == 0
    left = {row[0] for row in store._connection.execute("SELECT session FROM session")}
    assert left == {"new_agreed", "ended", "s6", "s7"}
    found = await store.summary()
    assert (found["earned_nanos"], found["sessions_settled"]) == (45, 4)
    store.close()


# --- in the market ---


@pytest.mark.slow
@pytest.mark.planet
async def test_a_session_opened_as_its_hold_lapses_frees_the_money(market: Market, monkeypatch):
    """Between the look at the agreement and its beginning the hold's time ran out."""
    seller = await market.seller()

    def lapsed(agreement_hash: str, *, now: float) -> Any:
        raise RefusedError("quote_unknown")

    async with market.buyer() as buyer:
        monkeypatch.setattr(seller.node._quotes, "granted", lapsed)
        with pytest.raises(LumarisError):
            await buyer.run(market.request(m.HELLO))

        async def freed() -> bool:
            await buyer.pool.settle()
            return (await buyer.account()).held_nanos == 0

        await eventually_async(freed, "nothing is held")
        market.clock.ahead_s += 60
        await seller.assert_idle()


@pytest.mark.slow
@pytest.mark.planet
async def test_a_session_settled_with_another_total_has_its_receipt(market: Market):
    seller = await market.seller()
    async with market.buyer() as buyer:
        result = await buyer.run(market.request(m.HELLO))
        await buyer.pool.close_all()
        await seller.assert_idle()
        await seller.assert_settled()
        earned = (await seller.node._store.summary())["earned_nanos"]
        assert earned > 0
        seller.node._store._connection.execute(
            "UPDATE session SET state = 'ended', earned_nanos = 0, voucher = NULL,"
            " total_nanos = 0, close_buyer = NULL, close_seller = NULL"
        )
        await seller.assert_settled()
        assert (await seller.node._store.summary())["earned_nanos"] == earned
        assert result.cost_nanos > 0


@pytest.mark.slow
@pytest.mark.planet
async def test_status_names_what_is_held(market: Market):
    seller = await market.seller()
    async with market.buyer() as buyer:
        await buyer.run(market.request(m.HELLO))
        status = await seller.node.status()
        assert status["holds"] == {"in_session": 1}
        assert status["held"]["memory_bytes"] == 16 * limits.MIB
        assert (
            status["held"]["disk_bytes"] + status["free"]["disk_bytes"]
            == (status["total"]["disk_bytes"])
        )
        await buyer.pool.close_all()
        await eventually(lambda: not seller.node._sessions.hosts, "the session is over")
        assert (await seller.node.status())["holds"] == {}
