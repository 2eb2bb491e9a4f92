"""Running one order: stage its inputs, run it on its tier, meter it, hash what it made.

The job machine says which step may follow which; every way out of here frees the sandbox.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from lumaris_node.executors.port import Executor, Handle, JobLimits, JobSpec, Outcome, Stream
from lumaris_node.executors.port import Usage as RunUsage
from lumaris_node.executors.supervise import disk_reason
from lumaris_node.images.service import ImageService
from lumaris_node.inputs import Inputs
from lumaris_node.order_log import OrderLog
from lumaris_node.surroundings import Surroundings
from lumaris_node.workspace import LeaseWorkspace
from lumaris_overlay.image_archive import CONFIG_BYTES_MAX, parse_config
from lumaris_protocol import ids
from lumaris_protocol.effects import Effect
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.limits import (
    FILE_BYTES_MAX,
    IMAGE_S_MAX,
    LOG_CHUNK_BYTES_MAX,
    MODULE_BYTES_MAX,
    PREPARE_S_MAX,
)
from lumaris_protocol.machines import job as job_machine
from lumaris_protocol.machines.seller import SellerSession
from lumaris_protocol.machines.table import Machine
from lumaris_protocol.messages.advert import Resources
from lumaris_protocol.messages.execution import File, Usage, WorkOrder, WorkState

log = logging.getLogger(__name__)

_PROGRESS_S = 1.0  # between two words on how far a preparation is
_MS = 1000


class SessionPort(Protocol):
    """What an order needs of its session."""

    machine: SellerSession
    resources: Resources
    images: ImageService | None
    inputs: Inputs
    workspace: LeaseWorkspace
    surroundings: Surroundings
    session: str
    pids_max: int

    @property
    def gate_open(self) -> bool: ...
    def now(self) -> float: ...
    def apply(self, effects: list[Effect]) -> None: ...
    def keep(self, run: OrderRun) -> None: ...
    async def room(self) -> None: ...
    async def gate(self) -> None: ...
    def regate(self) -> None: ...
    async def make_room(self, order: WorkOrder) -> None: ...


@dataclass
class _Log:
    """One output stream: how much was sent, and its hash so far."""

    offset: int = 0
    hasher: hashlib._Hash = field(default_factory=hashlib.sha256)


class OrderRun:
    """One order, from `accepted` to its end."""

    def __init__(
        self, order: WorkOrder, session: SessionPort, executor: Executor, logs: Path
    ) -> None:
        self.order, self.machine = order, Machine(job_machine.JOB)
        self._workspace: LeaseWorkspace | None = None
        self._session, self.executor = session, executor
        self.log = OrderLog(logs / f"{order.job}.log", bytes_max=order.limits.log_bytes)
        self.ended = trio.Event()
        self._used = RunUsage()
        self._logs: Mapping[str, _Log] = {"stdout": _Log(), "stderr": _Log()}
        self._handle: Handle | None = None
        self._waiting = self._destroyed = False
        self.holds_outputs = False  # in `kept/`, until they are wiped
        self._stop_reason = ""
        self._stopped = trio.CancelScope()
        self._wiping = trio.Lock()
        self._running_since: float | None = None
        self._ran_s = 0.0
        self._progress_at = -math.inf
        self._image_held = False
        self._received: list[str] = []  # parts of an image that the buyer sent
        self._delivered: dict[str, str] = {}
        self.kept_bytes = self.kept_files = 0  # outputs that wait for the buyer's word

    # --- from the session ---

    async def stop(self, reason: str, *, grace_s: float = 0) -> None:
        """End the order with a reason, in whatever state it is; a guest is asked to end first."""
        self._stop_reason = self._stop_reason or reason
        if self.machine.state in ("running", "paused") and self._handle is not None:
            if self.machine.state == "paused":
                grace_s = 0  # it cannot end by itself, and its owner wants the machine
            await self.executor.cancel(self._handle, reason, grace_s=grace_s)
        else:
            self._stopped.cancel()

    def abort(self) -> None:
        """End the order because this machine fails it, without a word to its sandbox."""
        self._stop_reason = "platform_error"
        self._stopped.cancel()

    async def set_gate(self, *, is_open: bool) -> None:
        """Freeze or continue the run as the exposure rule demands."""
        if self._handle is None:
            return
        fact = "resume" if is_open else "pause"
        if not self.machine.can(fact):
            return
        self.machine.take(fact)
        if is_open:
            await self.executor.resume(self._handle)
            self._running_since = trio.current_time()
        else:
            await self.executor.pause(self._handle)
            self._ran_s, self._running_since = self._elapsed_s(), None
        self._tell("running" if is_open else "paused")

    def meter(self) -> None:
        """Bill the run so far, if it runs now."""
        session = self._session
        if self._waiting and self.machine.state == "running":
            usage = self._usage(replace(self._used, wall_ms=int(self._elapsed_s() * _MS)))
            session.apply(session.machine.accrue(self.order.n, usage, now=session.now()))

    async def sample(self, *, within_s: float) -> None:
        """What the run consumed so far, for the meter; a tier that cannot say costs nothing."""
        if not self._waiting or self._handle is None:
            return
        try:
            with trio.move_on_after(within_s):
                self._used = await self.executor.usage(self._handle)
        except Exception as error:
            log.debug("usage not known job=%s error=%r", self.order.job, error)

    def live_handle(self) -> Handle:
        """The handle of the run. Raises RefusedError `not_attached` when it does not run."""
        if self.machine.state != "running" or self._handle is None:
            frozen = self.machine.state == "paused"
            text = "The order is frozen." if frozen else "The order does not run at the moment."
            raise RefusedError("not_attached", text, hint="Try again in a moment.")
        return self._handle

    def delivered_path(self, sha256: str) -> Path | None:
        """The output file of that hash, if this order delivered one."""
        path = self._delivered.get(sha256)
        if path is None or self._workspace is None:
            return None
        return self._workspace.kept(self.order.job) / path

    async def wipe(self) -> None:
        """Remove the order's outputs; what resists goes with the lease's volume."""
        if self._workspace is not None and self.holds_outputs:
            await self._remove(partial(self._workspace.forget, self.order.job))

    # --- the run ---

    async def run(self) -> None:
        """Until the order's end; the outputs of a delivered one are kept for the buyer."""
        try:
            await self._run()
        except Exception:
            # A bug of ours or of an executor: it costs this order, and not the session.
            log.exception("order broke job=%s", self.order.job)
            self._fail("platform_error", None, "This machine failed the order.")
        finally:
            self.ended.set()
            self.log.end()
            with trio.CancelScope(shield=True):
                await self._free(keep_outputs=self.machine.state == "succeeded")

    async def _run(self) -> None:
        outcome: Outcome | None = None
        try:
            with self._stopped:
                await self._prepare()
                outcome = await self._execute()
                if outcome.reason == "succeeded":
                    await self._deliver(outcome)
                    return
            self._fail(self._stop_reason or _reason(outcome), outcome)
        except LumarisError as error:
            self._fail(error.code, outcome, error.message)
        except (OSError, trio.TooSlowError) as error:
            log.warning("order failed job=%s error=%r", self.order.job, error)
            self._fail("platform_error", outcome, "This machine failed the order.")

    async def _prepare(self) -> None:
        order, session = self.order, self._session
        self.machine.take("prepare")
        self._image_held = await self._have_image()
        with _within(PREPARE_S_MAX, "prepare_timeout"):
            await session.make_room(order)
            if not self._image_held and self.executor.tier != "wasm":
                await self._image_from_buyer()
            await self._fetch(await self._missing())
            workspace = self._workspace = session.workspace
            if workspace.ready and not order.inputs:
                workspace.begin()
            else:
                await trio.to_thread.run_sync(self._stage, workspace)
        # An image may be compiled or unpacked now, which its tier bounds by itself.
        with _within(IMAGE_S_MAX, "image_timeout"):
            self._handle = await self.executor.prepare(self._spec(workspace), self._progress)
        self.machine.take("prepared")

    async def _have_image(self) -> bool:
        """Fetch the image from where others have it; False when only the buyer has it."""
        order, images = self.order, self._session.images
        if images is not None:
            return await images.ensure(
                order.image, self.executor, source=order.image_source, progress=self._progress
            )
        held = await self.executor.has_image(order.image)
        if order.image_source and not held:
            raise LumarisError("image_refused", "This seller fetches no images.")
        return held

    async def _image_from_buyer(self) -> None:
        """Have the buyer send a container image, part by part: each has its hash in the one before.

        The parts of an image are its configuration, named by the order, and its uncompressed
        layers, named by that.
        """
        image, inputs = self.order.image, self._session.inputs
        images = self._session.images
        if images is None or not images.buyer_images:
            raise LumarisError("bad_image", f"This seller does not hold {image}.")
        try:
            await self._receive({image: CONFIG_BYTES_MAX})
            config = await trio.Path(inputs.path(image)).read_bytes()
            layers = parse_config(config).diff_ids
            await self._receive(dict.fromkeys(layers, FILE_BYTES_MAX))
            paths = [inputs.path(layer) for layer in layers]
            await images.install(self.executor, config, paths)
        finally:
            with trio.CancelScope(shield=True):
                for digest in self._received:
                    await inputs.drop(digest)

    async def _receive(self, sizes_max: dict[str, int]) -> None:
        """Have the buyer send the parts that are not here."""
        session = self._session
        missing = {name: size for name, size in sizes_max.items() if not session.inputs.has(name)}
        if not missing:
            return
        self._received += missing
        with session.inputs.wanting(missing):
            session.apply(
                session.machine.preparing(self.order.n, tuple(missing), now=session.now())
            )
            for digest in missing:
                await session.inputs.arrived(digest)

    def _progress(self, what: str, done: int, total: int) -> None:
        """Tell the buyer how far a long preparation is, as often as it is worth reading."""
        session, now = self._session, trio.current_time()
        if now - self._progress_at >= _PROGRESS_S and self.machine.state == "preparing":
            self._progress_at = now
            session.apply(
                session.machine.progress(
                    self.order.n, what, done=done, total=total, now=session.now()
                )
            )

    async def _fetch(self, missing: dict[str, int]) -> None:
        """Have the buyer send what is not here. A module goes to the store of the modules."""
        if not missing:
            return
        order, session = self.order, self._session
        session.apply(session.machine.preparing(order.n, tuple(missing), now=session.now()))
        with session.inputs.wanting(missing):
            for sha256 in missing:
                await session.inputs.arrived(sha256)
                if sha256 == order.image:
                    await self.executor.add_image(sha256, session.inputs.path(sha256))
                    if all(file.sha256 != sha256 for file in order.inputs):
                        await session.inputs.drop(sha256)

    def _stage(self, workspace: LeaseWorkspace) -> None:
        """Show the inputs to the guest, and begin to count what it writes."""
        workspace.begin()
        for file in self.order.inputs:
            workspace.stage(file.path, self._session.inputs.use(file), file.size_bytes)
        workspace.mark()

    async def _execute(self) -> Outcome:
        session, handle = self._session, self._handle
        assert handle is not None
        await session.gate()
        async with session.surroundings.around(self.executor, handle):
            outcome = await self._run_guest(handle)
        if self.machine.state == "paused":
            self.machine.take("resume")  # it ended while frozen: a limit or a stop
        if self._stop_reason:
            return Outcome(self._stop_reason, None, outcome.usage, outcome.detail)
        if outcome.reason in ("exit_nonzero", "killed_trap"):
            full = await trio.to_thread.run_sync(disk_reason, handle.spec)
            if full:  # it met the limit and gave up before anyone looked
                return replace(outcome, reason=full, exit_status=None)
        if outcome.reason == "succeeded":
            self.machine.take("exited_zero")
            if session.machine.over_limit(self.order.n, self._usage(outcome.usage)):
                # It ended before its next metering; its outputs need not be hashed.
                return replace(outcome, reason="budget_exceeded")
        return outcome

    async def _run_guest(self, handle: Handle) -> Outcome:
        session = self._session
        await self.executor.start(handle, self._on_output)
        self.machine.take("start")
        self._running_since = trio.current_time()
        session.apply(session.machine.running(self.order.n, now=session.now()))
        if not session.gate_open:
            session.regate()  # it shut while the order started
        self._waiting = True
        try:
            return await self.executor.wait(handle)
        finally:
            self._waiting = False

    async def _deliver(self, outcome: Outcome) -> None:
        order, session = self.order, self._session
        await self._destroy()  # nothing of it may touch what is collected
        if not self._destroyed:
            raise LumarisError("platform_error", "The sandbox did not end.")
        outputs = await trio.to_thread.run_sync(self._collect)
        self.kept_files = len(outputs)
        self._delivered = {file.sha256: file.path for file in outputs}
        self.kept_bytes = sum(file.size_bytes for file in outputs)
        session.keep(self)  # the buyer may ask for files as soon as it reads the delivery
        self.machine.take("collected")
        runtime = f"{self.executor.tier}|{order.image}"
        session.apply(
            session.machine.delivered(
                order.n,
                outputs=outputs,
                stdout=self._log_file("stdout"),
                stderr=self._log_file("stderr"),
                usage=self._usage(outcome.usage),
                environment=ids.digest(runtime.encode()),
                now=session.now(),
            )
        )

    def _collect(self) -> tuple[File, ...]:
        bounds, workspace = self.order.limits, self._workspace
        assert workspace is not None, "collecting follows preparing"
        found = workspace.collect(files_max=bounds.output_files, bytes_max=bounds.disk_bytes)
        self.holds_outputs = True  # in part, should moving them fail
        self.holds_outputs = workspace.keep(self.order.job)
        if self._destroyed:  # the next order finds it empty, at no wait of its own
            with suppress(OSError):  # `_free` tries again
                workspace.clear()
        return tuple(
            File(path=item.path, size_bytes=item.size, sha256=item.digest) for item in found
        )

    def _fail(self, reason: str, outcome: Outcome | None, detail: str = "") -> None:
        session = self._session
        if not self.machine.done:  # it is when telling the end is what failed
            self.machine.take(self._fact_of(reason))
        states: dict[str, WorkState] = {"failed": "failed", "killed": "killed"}
        # Only of a run that ended by itself for this reason: one whose outputs are refused did not.
        own = outcome is not None and outcome.reason == reason
        exit_status = outcome.exit_status if outcome is not None and own else None
        session.apply(
            session.machine.failed(
                self.order.n,
                states.get(self.machine.state, "error"),
                reason,
                now=session.now(),
                usage=self._usage(outcome.usage) if outcome is not None else None,
                exit_status=None if exit_status is None else exit_status & 0xFF,
                detail=(detail or (outcome.detail if outcome is not None else ""))[:500],
            )
        )

    def _fact_of(self, reason: str) -> str:
        """The machine's fact for a reason. A session ends for reasons that are no job's own."""
        try:
            fact = job_machine.fact_of(reason)
        except KeyError:
            fact = "stopped" if self._stop_reason else "platform_failed"
        return fact if self.machine.can(fact) else "platform_failed"

    async def _free(self, *, keep_outputs: bool) -> None:
        await self._destroy()
        if not keep_outputs:
            await self.wipe()
        workspace = self._workspace
        if workspace is not None and not workspace.ready:
            await self._remove(workspace.clear)
            if not self._destroyed:
                workspace.touched()  # what lives on may write again

    async def _destroy(self) -> None:
        if self._handle is not None and not self._destroyed:
            try:
                await self.executor.destroy(self._handle)
                self._destroyed = True
            except Exception:
                log.exception("sandbox not destroyed job=%s", self.order.job)

    async def _remove(self, step: Callable[[], None]) -> None:
        async with self._wiping:  # two at once would trip over each other
            try:
                await trio.to_thread.run_sync(step)
            except OSError as error:
                log.warning("not wiped job=%s error=%r", self.order.job, error)

    # --- details ---

    async def _on_output(self, stream: Stream, data: bytes) -> None:
        session, state = self._session, self._logs[stream]
        await self.log.append(stream, data)
        for start in range(0, len(data), LOG_CHUNK_BYTES_MAX):
            part = data[start : start + LOG_CHUNK_BYTES_MAX]
            await session.room()
            session.apply(session.machine.log(self.order.n, stream, state.offset, part))
            state.offset += len(part)
            state.hasher.update(part)

    async def _missing(self) -> dict[str, int]:
        """Digests the buyer must send, with the most bytes each may have."""
        missing: dict[str, int] = {}
        if not self._image_held and self.executor.tier == "wasm":
            missing[self.order.image] = MODULE_BYTES_MAX
        for file in self.order.inputs:
            if not self._session.inputs.has(file.sha256):
                missing[file.sha256] = file.size_bytes
        return missing

    def _spec(self, workspace: LeaseWorkspace) -> JobSpec:
        order, resources = self.order, self._session.resources
        surroundings = self._session.surroundings
        return JobSpec(
            job=order.job,
            image=order.image,
            command=order.command,
            environment=surroundings.environment | order.environment,
            inputs=workspace.inputs,
            outputs=workspace.outputs,
            limits=JobLimits(
                cpu_millis=resources.cpu_millis,
                memory_bytes=order.limits.memory_bytes,
                disk_bytes=order.limits.disk_bytes,
                wall_s=float(order.limits.wall_s),
                fuel=order.limits.fuel,
                log_bytes=order.limits.log_bytes,
                output_bytes=order.limits.disk_bytes,
                output_files=order.limits.output_files,
                pids=min(order.limits.pids, self._session.pids_max),
            ),
            lease=self._session.session,
            disk_use=workspace.disk_use,
            stdin=order.stdin,
            gpus=surroundings.gpus,
        )

    def _log_file(self, stream: Stream) -> File:
        state = self._logs[stream]
        sha256 = f"sha256:{state.hasher.hexdigest()}"
        return File(path=stream, size_bytes=state.offset, sha256=sha256)

    def _usage(self, usage: RunUsage) -> Usage:
        gpu = self._session.surroundings.gpu_use
        return Usage(
            wall_ms=usage.wall_ms,
            cpu_ms=usage.cpu_ms,
            memory_peak_bytes=usage.memory_peak_bytes,
            fuel=usage.fuel,
            gpu_ms=gpu.gpu_ms,
            vram_peak_bytes=gpu.vram_peak_bytes,
        )

    def _elapsed_s(self) -> float:
        if self._running_since is None:
            return self._ran_s
        return self._ran_s + trio.current_time() - self._running_since

    def _tell(self, state: WorkState) -> None:
        session = self._session
        session.apply(session.machine.state(self.order.n, state, now=session.now()))


@contextmanager
def _within(seconds: float, code: str) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise LumarisError(code) from None


def _reason(outcome: Outcome | None) -> str:
    return "platform_error" if outcome is None else outcome.reason
