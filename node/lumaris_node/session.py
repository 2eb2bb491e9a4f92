"""One session on this machine: the shell around `SellerSession`.

Four tasks share it: the reader takes the buyer's envelopes, the outbox stores and sends, the runner
works the orders one after another, the ticker ends what is over. The machine decides everything;
nothing here touches money.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from lumaris_node.capability.meter import Gpus
from lumaris_node.executors.port import Executor
from lumaris_node.images.service import ImageService
from lumaris_node.inputs import Inputs
from lumaris_node.live import LOG_LINGER_S
from lumaris_node.order_log import OrderLog
from lumaris_node.orders import OrderRun
from lumaris_node.store import Store
from lumaris_node.surroundings import Surroundings
from lumaris_node.workspace import LeaseWorkspace, Volumes, volume_bounds
from lumaris_node.workspace.workspace import KEPT_FILES_MAX
from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.bulk.serve import give_file
from lumaris_overlay.evidence import EvidenceLog
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.outbox import Outbox
from lumaris_protocol.effects import (
    Effect,
    KeepCloses,
    KeepGrant,
    KeepVoucher,
    RunOrder,
    Send,
    SessionOver,
    SetGate,
    StopOrder,
)
from lumaris_protocol.errors import EnvelopeError, LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import (
    INPUT_ALLOWANCE_BYTES,
    ORDERS_QUEUED_MAX,
    OUTPUT_FILES_MAX,
    PIDS_MAX,
)
from lumaris_protocol.machines.seller import SellerSession
from lumaris_protocol.messages.execution import WorkOrder
from lumaris_protocol.protocols import BlobHeader

log = logging.getLogger(__name__)

_TICK_S = 1
_METER_S = 0.25  # how often a running order is metered: a fraction of any voucher interval
# How often the tier is asked what the run consumed; the bill does not wait for its answer.
_SAMPLE_S = 1.0
_FLUSH_S = 5  # the last words of a session: a buyer that does not read them loses only them


class SessionHost:
    """Runs one session from its grant to its end."""

    def __init__(
        self,
        machine: SellerSession,
        stream: FramedStream,
        *,
        executor: Executor,
        volumes: Volumes,
        store: Store,
        clock: Callable[[], float],
        transfer_rate: Rate | None = None,
        pids_max: int = PIDS_MAX,
        images: ImageService | None = None,
        gpus: Gpus | None = None,
    ) -> None:
        agreement = machine.contract.agreement
        self.machine, self.resources = machine, agreement.resources
        self.session, self.buyer = agreement.session, agreement.buyer
        bytes_max, files_max = volume_bounds(agreement.resources.disk_bytes)
        self.workspace = LeaseWorkspace(
            volumes.volume(self.session, bytes_max=bytes_max, files_max=files_max)
        )
        self._transfer_rate = transfer_rate
        self.inputs = Inputs(
            self.workspace.blobs,
            disk_bytes=agreement.resources.disk_bytes,
            transfer_rate=transfer_rate,
            on_change=self.workspace.touched,
        )
        self.orders_done = 0
        self.pids_max = pids_max
        self.images = images
        self._gpus = gpus or Gpus(())
        self.surroundings = Surroundings(egress=agreement.egress)
        self._stream, self._store, self._executor = stream, store, executor
        self._clock = clock
        self._outbox = Outbox(stream, self._keep)
        self._evidence = EvidenceLog(store.evidence, self.session)
        self._queue_in, self._queue_out = trio.open_memory_channel[WorkOrder](ORDERS_QUEUED_MAX)
        self._stops: dict[int, StopOrder] = {}
        self._run: OrderRun | None = None
        self._done: dict[int, OrderRun] = {}  # delivered, kept until the buyer's word
        self._kept: dict[int, int] = {}  # bytes of delivered outputs, until they are wiped
        self._kept_files: dict[int, int] = {}
        self._wiped = trio.Event()
        self._logs: set[OrderLog] = set()  # of orders that ended, while they are read
        # Orders run only while neither the unpaid amount nor the owner holds them up.
        self._paid_for = True
        self._owner_paused = False
        self._gate_opened = trio.Event()
        self._gate_changed = trio.Event()
        self._wiping: trio.Nursery | None = None
        self._over = trio.Event()
        self._heard_out = trio.Event()  # nothing that the buyer may still say changes anything
        self._ending: Callable[[], None] = lambda: None
        self._freed: Callable[[], None] = lambda: None
        self._reason = ""

    def check(self, opening: bytes) -> None:
        """Take the buyer's first word. Raises LumarisError when its grant does not hold."""
        self.apply(self.machine.receive(opening, now=self.now()))

    async def run(self, *, ending: Callable[[], None], freed: Callable[[], None]) -> str:
        """Until the session is over; the reason. Never raises for what fails here.

        `ending` is called when it is over, `freed` once nothing of the lease runs, before its files
        are removed.
        """
        self._ending, self._freed = ending, freed
        try:
            await self._run_tasks()
        except* Exception as group:
            log.error("session broke session=%s", self.session, exc_info=group)
            self._end_broken()
            await self._stream.refuse(LumarisError("platform_error"))
        finally:
            with trio.CancelScope(shield=True):
                if not self._over.is_set():
                    self.end("shutting_down")
                await self._close_down()
        return self._reason

    async def _run_tasks(self) -> None:
        if self.resources.gpus:  # not before: what never ran has no end that gives them back
            try:
                self.surroundings.gpus = self._gpus.take(self.session, self.resources.gpus)
            except LumarisError as error:  # offered, and gone since; another seller may have them
                log.warning("no GPUs session=%s", self.session)
                self.end(error.code)
                await self._stream.refuse(error)
                return
        await trio.to_thread.run_sync(self.workspace.open)
        async with trio.open_nursery() as nursery:
            self._wiping = nursery
            for task in self._tasks:
                nursery.start_soon(task)
            await self._over.wait()
            with trio.move_on_after(_FLUSH_S):
                await self._outbox.flush()
                if self.machine.awaits_close:  # its signature gives the rest back to it
                    await self._heard_out.wait()
            nursery.cancel_scope.cancel()

    @property
    def _tasks(self) -> tuple[Callable[[], Awaitable[None]], ...]:
        # The meter and the sampler are the session's: most orders end before either looks.
        return (
            self._send,
            self._read,
            self._work,
            self._tick,
            self._meter,
            self._sample,
            self._gatekeeper,
        )

    def now(self) -> float:
        """Wall clock, for documents."""
        return self._clock()

    def end(self, reason: str) -> None:
        """End the session from this side."""
        self.apply(self.machine.end(reason))
        self._finish(reason)

    def apply(self, effects: list[Effect]) -> None:
        """Carry out a machine's decisions, in order; what stores or sends goes to the outbox."""
        for effect in effects:
            match effect:
                case RunOrder(order):
                    self._queue_in.send_nowait(order)
                case StopOrder(n):
                    self._stops[n] = effect
                    if self._run is not None and self._run.order.n == n:
                        self.regate()
                case SetGate(is_open):
                    self._paid_for = is_open
                    self.regate()
                case SessionOver(reason):
                    self._finish(reason)
                case _:
                    if isinstance(effect, Send):
                        self._evidence.note(effect.data)
                    if isinstance(effect, KeepCloses):
                        self._heard_out.set()
                    self._outbox.put(effect)

    async def room(self) -> None:
        """Wait for room in the outbox; keeps a flooding guest at the buyer's pace."""
        await self._outbox.room()

    def keep(self, run: OrderRun) -> None:
        """An order is delivered: its outputs stay until the buyer's word on it."""
        self._done[run.order.n] = run
        self._kept[run.order.n] = run.kept_bytes
        self._kept_files[run.order.n] = run.kept_files
        self.orders_done += 1

    @property
    def gate_open(self) -> bool:
        """Whether work may go on: the unpaid amount allows it, and so does the owner."""
        return self._paid_for and not self._owner_paused

    async def gate(self) -> None:
        """Wait until work may start."""
        while not self.gate_open:
            await self._gate_opened.wait()

    def regate(self) -> None:
        """Look again at what the running order may do: go on, wait or end."""
        self._gate_changed.set()

    def pause_by_owner(self, *, paused: bool) -> None:
        """The owner needs the machine, or has done with it."""
        self._owner_paused = paused
        self.regate()

    def find_live(self, n: int) -> OrderRun:
        """The order that is worked on, if that is its number. Raises RefusedError."""
        if self._run is None or self._run.order.n != n:
            raise RefusedError(
                "not_attached", "The order waits or has ended.", hint="`lumaris job show JOB` says."
            )
        return self._run

    # --- files ---

    async def make_room(self, order: WorkOrder) -> None:
        """Remove kept inputs until the order and its own fit beside the rest.

        Waits for the buyer's word on outputs that are in the way. Raises LumarisError `disk_short`.
        """
        inputs = self.inputs
        while True:
            outputs, disk_bytes = sum(self._kept.values()), order.limits.disk_bytes
            room = inputs.room(order.inputs, disk_bytes=disk_bytes, other_bytes=outputs)
            files = sum(self._kept_files.values())
            if room >= 0 and files <= KEPT_FILES_MAX - OUTPUT_FILES_MAX:
                break
            if not self._kept:
                raise LumarisError("disk_short", "The inputs do not fit beside the order's disk.")
            await self._wiped.wait()
        keep = {file.sha256 for file in order.inputs}
        await inputs.trim(room + inputs.size_of(order.inputs), keep=keep)

    async def serve_blob(self, header: BlobHeader, stream: FramedStream) -> None:
        """Take or give one file of this session. Raises LumarisError."""
        if header.op == "put":
            await self.inputs.take(header, stream)
        else:
            await self._give_blob(header, stream)

    async def _give_blob(self, header: BlobHeader, stream: FramedStream) -> None:
        for run in self._done.values():
            path = run.delivered_path(header.sha256)
            if path is not None:
                await give_file(stream, header, path, rate=self._transfer_rate)
                return
        raise RefusedError("not_found", "No delivered file of that hash.")

    # --- tasks ---

    async def _read(self) -> None:
        try:
            while True:
                await self._outbox.room()  # a buyer that does not read is not heard either
                frame = await self._stream.receive()
                if frame is None or frame.kind == Kind.REFUSAL:
                    break
                if frame.kind != Kind.ENVELOPE:
                    raise EnvelopeError("malformed", "A session carries envelopes only.")
                self.apply(self.machine.receive(frame.body, now=self.now()))
                self._evidence.note(frame.body)
                self._forget_answered()
        except LumarisError as error:
            log.warning("refused peer=%s session=%s code=%s", self.buyer, self.session, error.code)
            await self._stream.refuse(error)
            self.end(error.code)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self.end("buyer_lost")
        self._heard_out.set()

    async def _send(self) -> None:
        try:
            await self._outbox.run()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.end("buyer_lost")

    async def _work(self) -> None:
        async for order in self._queue_out:
            stop = self._stops.pop(order.n, None)
            if stop is not None:
                effects = self.machine.failed(order.n, "killed", stop.reason, now=self.now())
                self.apply(effects)
                continue
            self._run = OrderRun(order, self, self._executor, self.workspace.logs)
            try:
                await self._run.run()
            finally:
                self._keep_log(self._run.log)
                self._run = None
            self._forget_answered()
            await self.inputs.trim(INPUT_ALLOWANCE_BYTES)

    async def _gatekeeper(self) -> None:
        """Passes gate changes and stops on to the running order, outside the machine's calls."""
        while True:
            self._gate_changed = trio.Event()
            run = self._run
            if self.gate_open:
                self._gate_opened.set()
                self._gate_opened = trio.Event()
            if run is not None:
                try:
                    await self._pass_on(run)
                except Exception:
                    # A sandbox that cannot be stopped or frozen is destroyed.
                    log.exception("order not controlled job=%s", run.order.job)
                    run.abort()
            if not self._gate_changed.is_set():
                await self._gate_changed.wait()

    async def _pass_on(self, run: OrderRun) -> None:
        stop = self._stops.pop(run.order.n, None)
        if stop is not None:
            await run.stop(stop.reason, grace_s=stop.grace_s)
        else:
            await run.set_gate(is_open=self.gate_open)

    async def _tick(self) -> None:
        while True:
            await trio.sleep(_TICK_S)
            self.apply(self.machine.tick(now=self.now()))
            await self._evidence.flush()

    async def _meter(self) -> None:
        while True:
            await trio.sleep(_METER_S)
            run = self._run
            if run is not None:
                try:
                    run.meter()
                except Exception:
                    log.exception("order not metered job=%s", run.order.job)
                    run.abort()

    async def _sample(self) -> None:
        while True:
            await trio.sleep(_SAMPLE_S)
            if self._run is not None:
                await self._run.sample(within_s=_SAMPLE_S)

    # --- the end ---

    def _finish(self, reason: str) -> None:
        if not self._over.is_set():
            self._reason = reason
            self._over.set()
            self._ending()

    def _forget_answered(self) -> None:
        """Outputs are kept only until the buyer accepted or rejected them."""
        for n in [n for n in self._done if not self.machine.awaits_answer(n)]:
            run = self._done.pop(n)
            if not run.holds_outputs:
                self._count_wiped(run)
            elif self._wiping is not None:
                self._wiping.start_soon(self._wipe, run)

    def _keep_log(self, kept: OrderLog) -> None:
        """Readers get the rest of it, within bounds."""
        if kept.settled:
            return
        self._logs.add(kept)
        if self._wiping is not None:
            self._wiping.start_soon(self._drop_log, kept, LOG_LINGER_S)

    async def _drop_log(self, kept: OrderLog, within_s: float) -> None:
        await kept.aclose(within_s=within_s)
        self._logs.discard(kept)

    async def _drop_logs(self) -> None:
        for kept in tuple(self._logs):
            await self._drop_log(kept, 0)

    async def _release(self) -> None:
        await self._executor.release(self.session)

    async def _wipe(self, run: OrderRun) -> None:
        await run.wipe()
        self._count_wiped(run)

    def _count_wiped(self, run: OrderRun) -> None:
        self._kept.pop(run.order.n, None)
        self._kept_files.pop(run.order.n, None)
        self._wiped.set()
        self._wiped = trio.Event()

    def _end_broken(self) -> None:
        """The tasks have failed: what the machine still wants to say cannot be sent."""
        try:
            self.end("platform_error")
        except Exception as error:
            log.warning("session not ended cleanly session=%s error=%r", self.session, error)
        self._finish("platform_error")

    async def _close_down(self) -> None:
        """Every step, whatever became of the one before."""
        for step in (
            self._outbox.keep_rest,
            self._evidence.close,
            self._stream.aclose,
            self._release,
            self._give_back,
            self._drop_logs,
            self._remove,
            self._end_row,
        ):
            try:
                await step()
            except Exception as error:
                log.warning("session not closed cleanly session=%s error=%r", self.session, error)

    async def _remove(self) -> None:
        await trio.to_thread.run_sync(self.workspace.close)

    async def _give_back(self) -> None:
        self._gpus.give_back(self.session)
        self._freed()

    async def _end_row(self) -> None:
        await self._store.end_session(
            self.session, self._reason, orders=self.machine.orders_accepted, now=self.now()
        )

    async def _keep(self, effect: Effect) -> None:
        match effect:
            case KeepGrant(data):
                await self._store.keep_grant(self.session, data)
            case KeepVoucher(data, total_nanos):
                await self._store.keep_voucher(self.session, data, total_nanos)
            case KeepCloses(by_buyer, by_seller, total_nanos):
                await self._store.keep_closes(
                    self.session, by_buyer, by_seller, total_nanos=total_nanos
                )
            case _:
                raise AssertionError(effect)
