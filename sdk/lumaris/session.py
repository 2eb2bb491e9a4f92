"""One session with a seller: the shell around `BuyerSession`.

The reader takes the seller's envelopes, the outbox stores and sends, a task for each delivery
fetches and checks its files before it is accepted. When the session ends, for whatever reason,
every order that has no end yet gets one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio

from lumaris import artifacts
from lumaris.jobs import Artifact, JobRequest, JobResult, JobUpdate, LogLine, Observer
from lumaris.store import Store
from lumaris_overlay.bulk.fetch import get_file
from lumaris_overlay.bulk.part import drop_part
from lumaris_overlay.bulk.put import put_file
from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.evidence import EvidenceLog
from lumaris_overlay.framed_stream import FramedStream, read_refusal
from lumaris_overlay.outbox import Outbox
from lumaris_overlay.ports import Overlay
from lumaris_protocol import ids
from lumaris_protocol.codes import CODES
from lumaris_protocol.effects import (
    Delivered,
    Effect,
    KeepCloses,
    KeepVoucher,
    LogArrived,
    Metered,
    OrderChanged,
    Send,
    SessionOver,
    SessionReadied,
)
from lumaris_protocol.errors import EnvelopeError, LumarisError, RefusedError, RemoteError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import LOG_BYTES_MAX, OUTPUT_FILES_MAX
from lumaris_protocol.machines.buyer import BuyerSession
from lumaris_protocol.messages.execution import Delivery, File, JobEvent, Limits, Usage
from lumaris_protocol.money import Nanos
from lumaris_protocol.protocols import SESSION

log = logging.getLogger(__name__)

_OPEN_S = 10
_CLOSE_S = 5
_TICK_S = 1
_FETCHES_AT_ONCE = 4
_TERMINAL = ("failed", "killed", "error")
# A seller that was asked to end an order has so much longer than the grace to say that it did.
_CANCEL_S = 10

# How an order goes: its number, its state and what it consumed so far.
Note = Callable[[int, str, Usage], None]


def _ignore(_n: int, _state: str, _usage: Usage) -> None:
    """The note that nobody takes."""


@dataclass
class _Order:
    job: str
    request: JobRequest
    files: Mapping[str, Path]  # by digest: what the seller may ask us to send
    observe: Observer
    folder: Path | None
    note: Note
    ended: trio.Event = field(default_factory=trio.Event)
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    state: str = "accepted"
    reason: str = ""
    detail: str = ""
    exit_status: int | None = None
    usage: Usage = field(default_factory=Usage)
    cost_nanos: int = 0
    asked: set[str] = field(default_factory=set)  # hashes the seller wants from us


class Session:
    """Orders to one seller under one grant. Used as a task: `run`, then `order` any number."""

    def __init__(
        self,
        machine: BuyerSession,
        overlay: Overlay,
        store: Store,
        *,
        region: str = "",
        transfer_rate: Rate | None = None,
    ) -> None:
        self._transfer_rate = transfer_rate
        agreement = machine.contract.agreement
        self.machine, self.region = machine, region
        self.session, self.seller = agreement.session, agreement.seller
        self.used_at = trio.current_time()
        self.ready, self.over = trio.Event(), trio.Event()
        self.reason = ""
        self._overlay, self._store = overlay, store
        self._evidence = EvidenceLog(store.evidence, self.session)
        self._orders: dict[int, _Order] = {}
        self._fetching = trio.CapacityLimiter(_FETCHES_AT_ONCE)
        self._outbox: Outbox | None = None
        self._nursery: trio.Nursery | None = None
        self._closed = trio.Event()

    @property
    def live(self) -> int:
        """Orders without an end."""
        return len(self._orders)

    @property
    def remaining_nanos(self) -> int:
        """What the grant still covers."""
        return self.machine.terms.cap_nanos - self.machine.tab.due_nanos

    async def run(self, opening: list[Effect]) -> None:
        """From the opening to the end; never raises for what the seller does."""
        try:
            with trio.fail_after(_OPEN_S):
                stream = FramedStream(await self._overlay.open_stream(self.seller, SESSION))
        except (LumarisError, trio.TooSlowError) as error:
            self._finish(error.code if isinstance(error, LumarisError) else "unreachable")
            self._closed.set()
            return
        self._outbox = Outbox(stream, self._keep)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._send)
                nursery.start_soon(self._read, stream)
                nursery.start_soon(self._watch_opening)
                nursery.start_soon(self._tick)
                self._apply(opening)
                await self.over.wait()
                with trio.move_on_after(_CLOSE_S):
                    await self._outbox.flush()
                nursery.cancel_scope.cancel()
        finally:
            self._nursery = None
            with trio.CancelScope(shield=True):
                self._finish("interrupted")
                await self._outbox.keep_rest()
                await stream.aclose()
                await self._evidence.close()
                await self._store.set_state(self.session, "ended", self.reason)
            self._closed.set()

    async def order(
        self,
        job: str,
        request: JobRequest,
        *,
        image: str,
        inputs: tuple[File, ...],
        files: Mapping[str, Path],
        folder: Path | None,
        observe: Observer,
        note: Note = _ignore,
        image_source: str = "",
    ) -> JobResult:
        """Run one order to its end. Cancelling the caller cancels the order at the seller.

        `note` hears of each state and of what was consumed.
        """
        if not self.ready.is_set():  # else at once: the order leaves with what is sent now
            await self.ready.wait()
        if self.over.is_set():
            raise RefusedError("seller_lost", f"The session ended: {self.reason}.")
        try:
            n, effects = self.machine.order(
                job=job,
                image=image,
                image_source=image_source,
                command=request.command,
                environment=dict(request.environment),
                inputs=inputs,
                limits=_limits(request),
                idempotency_key=job,
                stdin=request.stdin,
                now=trio.current_time(),
            )
        except ValueError as error:
            raise LumarisError("bad_command", f"The order is out of bounds: {error}") from None
        order = self._orders[n] = _Order(job, request, files, observe, folder, note)
        note(n, order.state, order.usage)
        self._apply(effects)
        try:
            await order.ended.wait()
        except trio.Cancelled:
            self._apply(self.machine.cancel(n))
            raise
        finally:
            self._orders.pop(n, None)
            self.used_at = trio.current_time()
        return self._result(order)

    def cancel(self, n: int, *, grace_s: int = 0) -> None:
        """Have the seller end an order; it is over here soon after the grace in any case."""
        if n in self._orders:
            self._apply(self.machine.cancel(n, grace_s=grace_s))
            self._in_background(self._give_up, n, grace_s + _CANCEL_S)

    async def _give_up(self, n: int, after_s: float) -> None:
        order = self._orders.get(n)
        if order is None:
            return
        with trio.move_on_after(after_s):
            await order.ended.wait()
        if not order.ended.is_set():
            order.reason = order.reason or "cancelled"
            order.cost_nanos = self.machine.give_up(n)
            order.ended.set()

    async def close(self) -> None:
        """End it by agreement, or by our own word when the seller does not answer."""
        with trio.move_on_after(_CLOSE_S):
            self._apply(self.machine.close())
            await self.over.wait()
        self._lose("unreachable")
        await self._closed.wait()

    def revoke(self) -> None:
        """The coordinator no longer vouches for a party: no work and no voucher is sent any more.

        What ran may run elsewhere; what was vouchered is settled.
        """
        for order in self._orders.values():
            if not order.ended.is_set():
                order.reason = order.reason or "seller_lost"
                order.detail = order.detail or "The coordinator no longer vouches for a party."
        self._lose("revoked")

    # --- tasks ---

    async def _read(self, stream: FramedStream) -> None:
        reason = "seller_lost"
        try:
            while True:
                frame = await stream.receive()
                if frame is None:
                    break
                if frame.kind == Kind.REFUSAL:
                    reason = read_refusal(frame.body).code
                    break
                if frame.kind != Kind.ENVELOPE:
                    raise EnvelopeError("malformed", "A session carries envelopes only.")
                self._apply(self.machine.receive(frame.body, now=trio.current_time()))
                self._evidence.note(frame.body)
        except RemoteError as error:
            log.warning("seller broke a rule peer=%s code=%s", self.seller, error.code)
            reason = error.code
            await stream.refuse(error)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self._lose(reason)

    async def _send(self) -> None:
        assert self._outbox is not None
        try:
            await self._outbox.run()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._lose("seller_lost")

    async def _watch_opening(self) -> None:
        with trio.move_on_after(_OPEN_S):
            await self.ready.wait()
            return
        self._lose("timeout")

    async def _tick(self) -> None:
        """Give up on a seller that says nothing or never ends."""
        while True:
            await trio.sleep(_TICK_S)
            self._apply(self.machine.tick(now=trio.current_time()))
            await self._evidence.flush()

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SessionReadied():
                    self.ready.set()
                case OrderChanged(event):
                    self._on_event(event)
                case Metered(n, usage):
                    self._on_meter(n, usage)
                case LogArrived(n, stream, data):
                    self._on_log(n, stream, data)
                case Delivered(delivery):
                    self._on_delivery(delivery)
                case SessionOver(reason):
                    self._finish(reason)
                case _:
                    if isinstance(effect, Send):
                        self._evidence.note(effect.data)
                    if self._outbox is not None:
                        self._outbox.put(effect)

    def _on_event(self, event: JobEvent) -> None:
        order = self._orders.get(event.n)
        if order is None:
            self.machine.costs.pop(event.n, None)
            return
        order.state = event.state
        order.note(event.n, event.state, order.usage)
        detail = event.reason or (event.detail if event.state == "preparing" else "")
        order.observe(
            JobUpdate(order.job, event.state, self.seller, detail, event.done, event.total)
        )
        wanted = tuple(sha256 for sha256 in event.missing if sha256 not in order.asked)
        if wanted:  # what was asked for before it has, or will
            order.asked.update(wanted)
            self._in_background(self._upload, event.n, wanted)
        if event.state in _TERMINAL:
            # The seller's word: a reason that exists, and never that a failure succeeded.
            known = event.reason in CODES and event.reason != "succeeded"
            order.exit_status, order.usage = event.exit_status, event.usage
            if not order.reason:  # else we stopped it ourselves and know better why
                order.reason = event.reason if known else "platform_error"
                order.detail = event.detail
            self._end_order(event.n)

    def _on_meter(self, n: int, usage: Usage) -> None:
        order = self._orders.get(n)
        if order is not None:
            order.usage = usage
            order.note(n, order.state, usage)

    def _on_log(self, n: int, stream: str, data: bytes) -> None:
        order = self._orders.get(n)
        if order is None:
            return
        (order.stdout if stream == "stdout" else order.stderr).extend(data)
        order.observe(LogLine(order.job, "stdout" if stream == "stdout" else "stderr", data))

    async def _upload(self, n: int, missing: tuple[str, ...]) -> None:
        order = self._orders.get(n)
        if order is None:
            return
        try:
            for sha256 in missing:
                source = order.files.get(sha256)
                if source is None:
                    raise LumarisError("bad_image", f"Neither side holds {sha256}.")
                async with self._fetching:
                    await put_file(
                        self._overlay,
                        self.seller,
                        self.session,
                        source,
                        sha256=sha256,
                        rate=self._transfer_rate,
                    )
        except (LumarisError, OSError) as error:
            known = isinstance(error, LumarisError)
            order.reason = error.code if isinstance(error, LumarisError) else "bad_input"
            order.detail = (
                error.message if isinstance(error, LumarisError) and known else str(error)
            )
            self._apply(self.machine.cancel(n))

    def _on_delivery(self, delivery: Delivery) -> None:
        """Only what was promised, fetched and checked, is accepted and owed."""
        n = delivery.n
        order = self._orders.get(n)
        if order is None:
            self._apply(self.machine.reject(n, "cancelled"))
            return
        try:
            self._check_log(order, delivery)
        except LumarisError as error:
            self._refuse_delivery(order, n, error)
            return
        if delivery.outputs and order.folder is not None:
            self._in_background(self._fetch_delivery, order, delivery)
        else:
            self._accept_delivery(order, delivery)

    async def _fetch_delivery(self, order: _Order, delivery: Delivery) -> None:
        try:
            await self._fetch(order, delivery)
        except (LumarisError, OSError) as error:
            self._refuse_delivery(order, delivery.n, error)
        else:
            self._accept_delivery(order, delivery)

    def _accept_delivery(self, order: _Order, delivery: Delivery) -> None:
        order.reason, order.exit_status = "succeeded", delivery.exit_status
        order.usage = delivery.usage
        self._apply(self.machine.accept(delivery.n, now=trio.current_time()))
        self._end_order(delivery.n)

    def _refuse_delivery(self, order: _Order, n: int, error: LumarisError | OSError) -> None:
        order.reason = error.code if isinstance(error, LumarisError) else "not_writable"
        order.detail = str(error)
        self._apply(self.machine.reject(n, order.reason))
        self._end_order(n)

    async def _fetch(self, order: _Order, delivery: Delivery) -> None:
        assert order.folder is not None
        for file in delivery.outputs:
            target = await artifacts.make_target(order.folder, file.path)
            try:
                async with self._fetching:
                    await get_file(
                        self._overlay,
                        self.seller,
                        self.session,
                        target,
                        sha256=file.sha256,
                        size_bytes=file.size_bytes,
                        rate=self._transfer_rate,
                    )
            except BaseException:  # the order ends, so nobody would come back for the rest
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(drop_part, target, file.sha256)
                raise
            order.artifacts[file.path] = Artifact(file.path, target, file.size_bytes, file.sha256)

    def _check_log(self, order: _Order, delivery: Delivery) -> None:
        received = (ids.digest(bytes(order.stdout)), ids.digest(bytes(order.stderr)))
        if received != (delivery.stdout.sha256, delivery.stderr.sha256):
            raise LumarisError("output_mismatch", "The log does not match its hash.")

    # --- ends ---

    def _end_order(self, n: int) -> None:
        order = self._orders.get(n)
        if order is not None:
            order.cost_nanos = self.machine.costs.pop(n, 0)
            order.ended.set()

    def _lose(self, reason: str) -> None:
        self._apply(self.machine.lost(reason))
        self._finish(reason)

    def _finish(self, reason: str) -> None:
        if not self.over.is_set():
            self.reason = reason
            self.over.set()
        self.ready.set()
        for n, order in self._orders.items():
            if not order.ended.is_set():
                order.cost_nanos = self.machine.tab.strike(n)  # vouchers given stay given
                order.reason = order.reason or ("seller_lost" if reason == "closed" else reason)
                order.ended.set()

    def _in_background(self, task: object, *arguments: object) -> None:
        if self._nursery is not None and callable(task):
            self._nursery.start_soon(task, *arguments)

    def _result(self, order: _Order) -> JobResult:
        return JobResult(
            job=order.job,
            session=self.session,
            seller=self.seller,
            reason=order.reason,
            exit_status=order.exit_status,
            stdout=bytes(order.stdout),
            stderr=bytes(order.stderr),
            artifacts=order.artifacts,
            cost_nanos=Nanos(order.cost_nanos),
            wall_ms=order.usage.wall_ms,
            cpu_ms=order.usage.cpu_ms,
            fuel=order.usage.fuel,
            memory_peak_bytes=order.usage.memory_peak_bytes,
            detail=order.detail,
        )

    async def _keep(self, effect: Effect) -> None:
        match effect:
            case KeepVoucher(data, total_nanos):
                await self._store.keep_voucher(self.session, data, total_nanos)
            case KeepCloses(by_buyer, by_seller, total_nanos):
                await self._store.keep_closes(
                    self.session, by_buyer, by_seller, total_nanos=total_nanos
                )
            case _:
                raise AssertionError(effect)


def _limits(request: JobRequest) -> Limits:
    return Limits(
        cost_nanos=request.max_cost_nanos,
        wall_s=request.wall_s,
        memory_bytes=request.memory_bytes,
        disk_bytes=request.disk_bytes,
        fuel=request.fuel,
        log_bytes=min(request.log_bytes, LOG_BYTES_MAX),
        output_files=OUTPUT_FILES_MAX,
        pids=request.pids,
    )
