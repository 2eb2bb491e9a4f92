"""The fronts of `Buyer`: `Client` for plain code and notebooks, `AsyncClient` for the rest.

Both run the buyer in the process's engine thread; neither needs a loop of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import trio

from lumaris import checking
from lumaris import profile as profiles
from lumaris.buyer import Buyer, open_buyer
from lumaris.checking import Checked
from lumaris.engine import Engine
from lumaris.jobs import JobRequest, JobResult, Observer, Plan, Source, ignore
from lumaris.pool import Approve
from lumaris.profile import Profile
from lumaris_protocol import limits
from lumaris_protocol.codec import Signed
from lumaris_protocol.coordinator_api import Account, Audit, Dispute, DisputeDetail
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.matching import MatchReport
from lumaris_protocol.messages.advert import Advert, Gpu, Tier
from lumaris_protocol.messages.dispute import DisputeClaim
from lumaris_protocol.messages.negotiation import EgressRules
from lumaris_protocol.money import parse_credits

T = TypeVar("T")

_ENGINE = Engine()
# What a program may spend when it names no cap.
DEFAULT_MAX_COST = "0.01"
DEFAULT_BUDGET = "0.1"


class _Holder:
    """Keeps one `Buyer` open in the engine between calls."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._ready = trio.Event()
        self._stop = trio.Event()
        self._closed = trio.Event()
        self._scope = trio.CancelScope()  # ends an opening that nobody waits for any more
        self._buyer: Buyer | None = None
        self._error: BaseException | None = None

    async def open(self) -> None:
        """Start the buyer. Raises what its wiring raises."""
        trio.lowlevel.spawn_system_task(self._hold)
        try:
            await self._ready.wait()
        except trio.Cancelled:
            self._scope.cancel()
            raise
        if self._error is not None:
            raise self._error

    @property
    def buyer(self) -> Buyer:
        """The open buyer. Raises LumarisError `not_running` after its end."""
        if self._buyer is None:
            raise LumarisError("not_running", "The client is closed.")
        return self._buyer

    async def close(self) -> None:
        """End sessions, settle, free everything."""
        self._stop.set()
        await self._closed.wait()

    async def _hold(self) -> None:
        try:
            with self._scope:
                async with open_buyer(self._profile) as self._buyer:
                    self._ready.set()
                    await self._stop.wait()
        except* Exception as group:
            self._error = _first(group)
        finally:
            self._buyer = None
            self._ready.set()
            self._closed.set()


class Client:
    """Buys compute from sync code. A context manager; closing settles every session.

    `state` is the folder of the key and the records, `coordinator` the coordinator's URL; both
    default to `LUMARIS_STATE`, `LUMARIS_COORDINATOR_URL` and the user's own directories.
    """

    def __init__(
        self,
        *,
        state: str | Path | None = None,
        coordinator: str | None = None,
        overlay_linger_s: int | None = None,
    ) -> None:
        profile = profiles.load(
            state=state, coordinator=coordinator, overlay_linger_s=overlay_linger_s
        )
        self.profile = profile

        async def start() -> _Holder:
            holder = _Holder(profile)
            await holder.open()
            return holder

        self._holder = _ENGINE.call(start)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(
        self,
        image: str,
        command: Sequence[str],
        *,
        inputs: Mapping[str, str | Path] | None = None,
        environment: Mapping[str, str] | None = None,
        max_cost: str = DEFAULT_MAX_COST,
        timeout_s: int = 600,
        cpu: float = 1.0,
        memory_bytes: int = 512 * limits.MIB,
        disk_bytes: int = 64 * limits.MIB,
        observe: Observer = ignore,
        approve: Callable[[Plan], bool] | None = None,
    ) -> JobResult:
        """Run one command on a seller's machine and return how it ended.

        `max_cost` in credits is a hard cap: the coordinator holds no more than that. `inputs` maps
        guest paths under /in to local files. Raises LumarisError when nothing could be run.
        """
        request = make_request(
            image,
            command,
            inputs=inputs,
            environment=environment,
            max_cost=max_cost,
            timeout_s=timeout_s,
            cpu=cpu,
            memory_bytes=memory_bytes,
            disk_bytes=disk_bytes,
        )
        return self.run_request(request, observe=observe, approve=approve)

    def run_request(
        self,
        request: JobRequest,
        *,
        observe: Observer = ignore,
        approve: Callable[[Plan], bool] | None = None,
        stdin: Source | None = None,
    ) -> JobResult:
        """`run` with a prepared request. `approve` sees the plan before money is held.

        `stdin` gives the next bytes of the job's standard input; it is called in a trio loop.
        """
        ask = _in_thread(approve)
        return _ENGINE.call(
            lambda: self._holder.buyer.run(request, observe=observe, approve=ask, stdin=stdin)
        )

    def map(
        self,
        requests: Iterable[JobRequest],
        *,
        sellers: int = 3,
        budget: str = DEFAULT_BUDGET,
        observe: Observer = ignore,
        on_result: Callable[[int, JobResult], None] | None = None,
    ) -> list[JobResult]:
        """Run many jobs of one shape over several sellers; results in the order of the requests.

        `budget` in credits bounds everything the map can spend.
        """
        jobs, budget_nanos = list(requests), parse_amount(budget, "budget")
        return _ENGINE.call(
            lambda: self._holder.buyer.map(
                jobs,
                sellers=sellers,
                budget_nanos=budget_nanos,
                observe=observe,
                on_result=on_result,
            )
        )

    def plan(self, request: JobRequest) -> MatchReport:
        """Which sellers could run a request, best first, and what excludes the others."""
        return _ENGINE.call(lambda: self._holder.buyer.plan(request))

    def offers(self) -> tuple[Signed[Advert], ...]:
        """Every advert known now; waits a moment for the first ones."""
        return _ENGINE.call(self._holder.buyer.offers)

    def account(self) -> Account:
        """Free and held balance."""
        return _ENGINE.call(self._holder.buyer.account)

    def deposit_test_credit(self, amount: str) -> Account:
        """Get test credit from a coordinator that gives it."""
        nanos = parse_amount(amount, "amount")
        return _ENGINE.call(lambda: self._holder.buyer.deposit_test_credit(nanos))

    def audit(self) -> Audit:
        """Whether the coordinator's ledger balances."""
        return _ENGINE.call(self._holder.buyer.audit)

    def disputes(self) -> list[Dispute]:
        """Our disputes, oldest first."""
        return _ENGINE.call(self._holder.buyer.disputes.disputes)

    def dispute(self, dispute: str) -> DisputeDetail:
        """One dispute with its evidence, checkers and ruling. Raises LumarisError `not_found`."""
        return _ENGINE.call(lambda: self._holder.buyer.disputes.show(dispute))

    def open_dispute(
        self, name: str, claim: DisputeClaim, *, order: int = 0, amount: str | None = None
    ) -> Dispute:
        """Dispute a session, or a job's, with the evidence kept of it; takes a bond.

        Raises LumarisError; then nothing has happened.
        """
        nanos = parse_amount(amount, "amount") if amount is not None else None

        async def work() -> Dispute:
            desk = self._holder.buyer.disputes
            return await desk.open(await desk.draft(name, claim, order=order, amount_nanos=nanos))

        return _ENGINE.call(work)

    def check_dispute(
        self,
        dispute: str,
        *,
        sources: Sequence[str | Path] = (),
        image: str = "",
        max_cost: str = DEFAULT_MAX_COST,
        observe: Observer = ignore,
        approve: Callable[[Plan], bool] | None = None,
    ) -> Checked:
        """Have the drawn checker run the disputed order again, and file what it signed.

        `sources` are the files that were the order's inputs, `image` the local module if it was
        one. Raises LumarisError.
        """
        nanos, ask = parse_amount(max_cost, "max_cost"), _in_thread(approve)

        async def work() -> Checked:
            buyer = self._holder.buyer
            desk = buyer.disputes
            return await checking.run(
                buyer,
                desk,
                await checking.due(desk, dispute),
                sources=[Path(source) for source in sources],
                image=image,
                max_cost_nanos=nanos,
                approve=ask,
                observe=observe,
            )

        return _ENGINE.call(work)

    def settle(self) -> None:
        """End idle sessions and settle everything that can be settled now."""
        _ENGINE.call(self._holder.buyer.pool.close_all)

    def sessions(self, count: int = 100) -> list[dict[str, Any]]:
        """The newest sessions with their state and vouchered total."""
        return _ENGINE.call(lambda: self._holder.buyer.store.sessions(count))

    @property
    def coordinator(self) -> str:
        """The coordinator's peer id: the key that receipts are checked with."""
        return self._holder.buyer.standing.info.coordinator

    @property
    def peer(self) -> str:
        """This buyer's peer id."""
        return self._holder.buyer.key.peer_id

    def receipt(self, name: str) -> bytes | None:
        """A receipt file by the id of a receipt, session or job."""
        return _ENGINE.call(lambda: self._holder.buyer.store.receipt(name))

    def close(self) -> None:
        """End sessions, settle them, and free everything. Harmless when already closed."""
        _ENGINE.call(self._holder.close)


class AsyncClient:
    """The same for asyncio and trio: `async with AsyncClient() as client`."""

    def __init__(
        self,
        *,
        state: str | Path | None = None,
        coordinator: str | None = None,
        overlay_linger_s: int | None = None,
    ) -> None:
        self.profile = profiles.load(
            state=state, coordinator=coordinator, overlay_linger_s=overlay_linger_s
        )
        self._holder: _Holder | None = None

    async def __aenter__(self) -> AsyncClient:
        async def start() -> _Holder:
            holder = _Holder(self.profile)
            await holder.open()
            return holder

        self._holder = await _ENGINE.call_async(start)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def run(
        self,
        image: str,
        command: Sequence[str],
        *,
        inputs: Mapping[str, str | Path] | None = None,
        environment: Mapping[str, str] | None = None,
        max_cost: str = DEFAULT_MAX_COST,
        timeout_s: int = 600,
        cpu: float = 1.0,
        memory_bytes: int = 512 * limits.MIB,
        disk_bytes: int = 64 * limits.MIB,
        observe: Observer = ignore,
    ) -> JobResult:
        """As `Client.run`; cancelling the caller cancels the job."""
        request = make_request(
            image,
            command,
            inputs=inputs,
            environment=environment,
            max_cost=max_cost,
            timeout_s=timeout_s,
            cpu=cpu,
            memory_bytes=memory_bytes,
            disk_bytes=disk_bytes,
        )
        buyer = self._buyer
        return await _ENGINE.call_async(lambda: buyer.run(request, observe=observe))

    async def map(
        self,
        requests: Iterable[JobRequest],
        *,
        sellers: int = 3,
        budget: str = DEFAULT_BUDGET,
        observe: Observer = ignore,
        on_result: Callable[[int, JobResult], None] | None = None,
    ) -> list[JobResult]:
        """As `Client.map`."""
        jobs, budget_nanos = list(requests), parse_amount(budget, "budget")
        buyer = self._buyer
        return await _ENGINE.call_async(
            lambda: buyer.map(
                jobs,
                sellers=sellers,
                budget_nanos=budget_nanos,
                observe=observe,
                on_result=on_result,
            )
        )

    async def offers(self) -> tuple[Signed[Advert], ...]:
        """As `Client.offers`."""
        buyer = self._buyer
        return await _ENGINE.call_async(buyer.offers)

    async def account(self) -> Account:
        """As `Client.account`."""
        buyer = self._buyer
        return await _ENGINE.call_async(buyer.account)

    async def aclose(self) -> None:
        """As `Client.close`."""
        if self._holder is not None:
            await _ENGINE.call_async(self._holder.close)

    @property
    def _buyer(self) -> Buyer:
        if self._holder is None:
            raise LumarisError("not_running", "Use `async with AsyncClient()`.")
        return self._holder.buyer


def make_request(
    image: str,
    command: Sequence[str],
    *,
    inputs: Mapping[str, str | Path] | None = None,
    environment: Mapping[str, str] | None = None,
    max_cost: str = DEFAULT_MAX_COST,
    timeout_s: int = 600,
    cpu: float = 1.0,
    memory_bytes: int = 512 * limits.MIB,
    disk_bytes: int = 64 * limits.MIB,
    pids: int = limits.PIDS_DEFAULT,
    tier: Tier | None = None,
    assurances: Sequence[str] = (),
    egress: Sequence[str] = (),
    gpus: Sequence[str] = (),
    regions: Sequence[str] = (),
    attempts: int = 3,
) -> JobRequest:
    """A request from friendly values, checked before anything is contacted.

    `gpus` are texts such as `2` or `NVIDIA L4:1`. Raises LumarisError `usage` or `bad_command`.
    """
    if isinstance(command, str) or not command:
        raise LumarisError("bad_command", "The command is a list: the program, then its arguments.")
    if not 1 <= timeout_s <= limits.WALL_S_MAX:
        raise LumarisError("usage", f"The time limit is 1 to {limits.WALL_S_MAX} seconds.")
    if not 0.001 <= cpu <= 1024 or memory_bytes < limits.MIB or attempts < 1:
        raise LumarisError("usage", "CPU, memory or attempts are out of range.")
    if not 1 <= pids <= limits.PIDS_MAX:
        raise LumarisError("usage", f"A job has 1 to {limits.PIDS_MAX} processes and threads.")
    return JobRequest(
        image=image,
        command=tuple(command),
        inputs={name: Path(source) for name, source in (inputs or {}).items()},
        environment=dict(environment or {}),
        cpu_millis=int(cpu * 1000),
        memory_bytes=memory_bytes,
        disk_bytes=disk_bytes,
        wall_s=timeout_s,
        max_cost_nanos=parse_amount(max_cost, "max_cost"),
        pids=pids,
        tier=tier,
        assurances=tuple(assurances),
        egress=parse_egress(egress),
        gpus=tuple(parse_gpu(text) for text in gpus),
        regions=tuple(regions),
        attempts=attempts,
    )


def parse_egress(rules: Sequence[str]) -> tuple[str, ...]:
    """Checked `host:port` rules. Raises LumarisError `usage`."""
    try:
        return msgspec.convert([rule.lower() for rule in rules], EgressRules)
    except msgspec.ValidationError:
        raise LumarisError(
            "usage",
            f"--egress takes HOST:PORT or *.DOMAIN:PORT, {limits.EGRESS_RULES_MAX} at most.",
        ) from None


def parse_gpu(text: str) -> Gpu:
    """Wanted GPUs, from text such as `2`, `NVIDIA L4` or `NVIDIA L4:1`. Raises `usage`."""
    model, colon, count = text.rpartition(":")
    if not colon and not count.isdecimal():
        model, count = text, "1"
    try:
        return msgspec.convert({"model": model, "vram_bytes": 0, "count": int(count)}, Gpu)
    except (msgspec.ValidationError, ValueError):
        raise LumarisError(
            "usage", f"--gpu takes COUNT, MODEL or MODEL:COUNT, not {text!r}."
        ) from None


def parse_amount(text: str, name: str) -> int:
    """Nanos of an amount in credits. Raises LumarisError `usage` naming the argument."""
    try:
        return parse_credits(text)
    except ValueError as error:
        raise LumarisError("usage", f"{name}: {error}.") from None


def _in_thread(decide: Callable[[Plan], bool] | None) -> Approve | None:
    """A question to a person, off the thread that keeps sessions alive."""
    if decide is None:
        return None

    async def ask(plan: Plan) -> bool:
        return await trio.to_thread.run_sync(decide, plan, abandon_on_cancel=True)

    return ask


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
