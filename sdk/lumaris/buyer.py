"""The buyer, wired: key, store, coordinator, overlay, market, sessions. Everything here is trio.

`Client` and `AsyncClient` are thin fronts of this. The composition root is `open_buyer`.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial

import trio
from msgspec import structs

from lumaris import artifacts, coordinator, images, live, membership
from lumaris.certified import Certified
from lumaris.coordinator import CoordinatorLink
from lumaris.disputes import DisputeDesk
from lumaris.images import Image
from lumaris.job_logs import JobLogs
from lumaris.job_records import JobRecords
from lumaris.jobs import JobRequest, JobResult, JobUpdate, LogLine, Observer, Source, ignore
from lumaris.log_watch import LogWatch
from lumaris.market import BuyerTerms, Market, SellerError
from lumaris.membership import Standing
from lumaris.pool import LEASE_S, Approve, Pool, plan_of_session
from lumaris.profile import Profile
from lumaris.session import Session
from lumaris.settling import Settling
from lumaris.store import Store
from lumaris_overlay.bulk.rate import make_rate
from lumaris_overlay.links import open_links
from lumaris_overlay.notice_upkeep import keep_keys
from lumaris_overlay.ports import Overlay
from lumaris_overlay.private_files import load_or_create_key
from lumaris_overlay.shard_upkeep import keep_shards
from lumaris_overlay.supervisor import OverlayConfig, attach_or_spawn
from lumaris_protocol import coordinator_api, ids, matching
from lumaris_protocol.codec import Signed
from lumaris_protocol.coordinator_api import Account, Audit
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.advert import Advert
from lumaris_protocol.messages.execution import File, Usage
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.money import Nanos

log = logging.getLogger(__name__)

# Ends that say nothing about the job itself: it is run again with another seller.
RETRYABLE = frozenset(
    (
        "seller_lost",
        "unreachable",
        "platform_error",
        "tier_unavailable",
        "shutting_down",
        "killed_owner",
        "not_accepting",
        "paused_by_owner",
        "no_capacity",
        "quote_unknown",
        "quote_expired",
        "too_many_holds",
        "prepare_timeout",
        "out_of_sequence",
        "broken_chain",
        "bad_signature",
        "overcharged",
        "output_mismatch",
        "timeout",
        "truncated",
        "lease_ended",
        "unpaid",
        "idle",
    )
)
# How soon a job is cancelled that another program wants cancelled.
_CANCEL_LOOK_S = 0.25
# How long to wait for the market to change before asking again.
RETRY_S = 0.5


class Buyer:
    """What a buyer can do. Made by `open_buyer`."""

    def __init__(
        self,
        profile: Profile,
        key: KeyPair,
        store: Store,
        link: CoordinatorLink,
        certified: Certified,
        overlay: Overlay,
        nursery: trio.Nursery,
    ) -> None:
        self.profile, self.key, self.certified = profile, key, certified
        self.store, self.overlay = store, overlay
        self._link = link
        standing, trusted = certified.standing, certified.trusted
        terms = BuyerTerms(
            network=standing.info.network,
            coordinator=lambda: self.standing.info.coordinator,
            fee_bps=standing.info.fee_bps,
            certificate=lambda: self.standing.certificate,
            token=lambda: self.standing.token,
            trusted=trusted,
            log=LogWatch(standing.info.network, lambda: trusted),
        )
        self.market = Market(overlay, key, terms)
        self._settling = Settling(link, store, key, terms, overlay)
        self.pool = Pool(
            self.market,
            overlay,
            store,
            self._settling,
            network=standing.info.network,
            currency=standing.info.currency,
            transfer_rate=make_rate(profile.transfer_bytes_per_s),
        )
        self.pool.attach(nursery)
        self.market.on_revoked = self.pool.end_revoked
        self._nursery = nursery
        self._running: dict[str, tuple[Session, int]] = {}  # with the order's number
        self._cancelled: set[str] = set()
        self.records = JobRecords(store, JobLogs(profile.jobs))

    @property
    def standing(self) -> Standing:
        """What the coordinator last told us."""
        return self.certified.standing

    # --- work ---

    async def run(
        self,
        request: JobRequest,
        *,
        observe: Observer = ignore,
        approve: Approve | None = None,
        stdin: Source | None = None,
    ) -> JobResult:
        """Run one job to its end, on another seller when one fails it.

        `stdin` feeds the job's standard input; such a job is tried once, for what was read is gone.
        Raises LumarisError when no seller could be bought; a job that ran and failed is a result.
        """
        if stdin is not None:
            request = replace(request, stdin=True, attempts=1)
        image = await images.resolve(request.image, request.command, tier=request.tier)
        inputs = await artifacts.describe_inputs(request.inputs)
        job, failed, spent_nanos = new_job(), list[str](), 0
        last: JobResult | LumarisError = LumarisError("budget_exceeded")
        for attempt in range(1, request.attempts + 1):
            left = replace(request, max_cost_nanos=request.max_cost_nanos - spent_nanos)
            if left.max_cost_nanos <= 0:
                break
            try:
                session = await self._one_session(left, image, failed, approve)
                approve = None
                result = await self.order(
                    session, left, image, inputs, observe, job=job, attempt=attempt, stdin=stdin
                )
            except LumarisError as error:
                if isinstance(last, JobResult):
                    return last  # nobody else is left: the last failure is the answer
                if error.code not in RETRYABLE:
                    raise
                if isinstance(error, SellerError):
                    failed.append(error.seller)
                last = error
                await self.market.change(RETRY_S)
                continue
            spent_nanos += result.cost_nanos
            last = replace(result, cost_nanos=Nanos(spent_nanos))
            if result.ok or result.reason not in RETRYABLE:
                return last
            failed.append(result.seller)
        if isinstance(last, LumarisError):
            raise last
        return last

    async def map(
        self,
        requests: Sequence[JobRequest],
        *,
        sellers: int = 3,
        budget_nanos: int,
        observe: Observer = ignore,
        on_result: Callable[[int, JobResult], None] | None = None,
    ) -> list[JobResult]:
        """Run many jobs of one shape over several sellers; results in the order of the requests.

        `budget_nanos` bounds the sum of all grants that are open or spent at any time.
        """
        if not requests:
            return []
        from lumaris.fanout import FanOut

        image = await images.resolve(requests[0].image, requests[0].command, tier=requests[0].tier)
        run = FanOut(self, image, requests, sellers, budget_nanos, observe, on_result)
        return await run.run()

    async def plan(self, request: JobRequest) -> matching.MatchReport:
        """Who could run this, without asking anyone."""
        image = await images.resolve(request.image, request.command, tier=request.tier)
        needs = self.pool.needs(request, image)
        return await self.market.search(needs, lease_s=LEASE_S)

    async def offers(self) -> tuple[Signed[Advert], ...]:
        """Every advert known now; waits a moment for the first ones."""
        await self.market.settle_in()
        return self.market.adverts

    # --- money ---

    async def account(self) -> Account:
        """Free and held balance."""
        return await self._link.call(coordinator_api.account(self.standing.token))

    async def deposit_test_credit(self, amount_nanos: int) -> Account:
        """Ask the coordinator for test credit."""
        return await membership.deposit_test_credit(
            self._link,
            self.key,
            self.standing,
            amount_nanos=amount_nanos,
            nonce=os.urandom(16).hex(),
        )

    async def audit(self) -> Audit:
        """Whether the coordinator's ledger balances."""
        return await self._link.call(coordinator_api.audit())

    # --- disputes ---

    @property
    def disputes(self) -> DisputeDesk:
        """What this buyer can do about disputes."""
        return DisputeDesk(
            self._link,
            self.key,
            self.standing,
            self.profile.state,
            self.profile.database,
            flush=self.records.flush,
        )

    # --- inside ---

    async def _one_session(
        self, request: JobRequest, image: Image, failed: list[str], approve: Approve | None
    ) -> Session:
        needs = structs.replace(self.pool.needs(request, image), excluded=tuple(failed))
        session = self.pool.find_idle(
            needs, wall_s=request.wall_s, cost_nanos_max=request.max_cost_nanos
        )
        if session is not None:
            plan = plan_of_session(session, request.max_cost_nanos)
            if approve is not None and not await approve(plan):
                raise LumarisError("declined")
            return session
        bought = await self.buy(needs, cap_nanos=request.max_cost_nanos, approve=approve)
        return bought[0]

    async def buy(
        self,
        needs: Requirements,
        *,
        cap_nanos: int,
        count: int = 1,
        approve: Approve | None = None,
    ) -> list[Session]:
        """`Pool.buy`, again with another certificate when ours counts no more. Raises
        LumarisError."""
        buy = partial(self.pool.buy, needs, cap_nanos=cap_nanos, count=count, approve=approve)
        try:
            return await buy()
        except LumarisError as error:
            if error.code != "not_certified" or not await self.certified.replace():
                raise
        return await buy()

    async def order(
        self,
        session: Session,
        request: JobRequest,
        image: Image,
        inputs: tuple[File, ...],
        observe: Observer,
        *,
        job: str,
        attempt: int,
        stdin: Source | None = None,
    ) -> JobResult:
        """One attempt of a job in an open session; `inputs` describes the request's files."""
        files = dict(image.files)
        for described, source in zip(inputs, request.inputs.values(), strict=True):
            files[described.sha256] = source
        folder = self.profile.jobs / job / "out"
        if attempt > 1:  # nothing of a failed attempt is taken for a result
            await trio.to_thread.run_sync(shutil.rmtree, folder, True)
            await self.records.forget_log(job)
        self.records.begin(job, session, request, attempt)
        observe(JobUpdate(job, "ordered", session.seller))
        feeding = trio.CancelScope()
        starts = trio.Event()
        if stdin is not None:
            self._nursery.start_soon(self._feed, job, stdin, starts, feeding)

        def watch(event: JobUpdate | LogLine) -> None:
            if isinstance(event, LogLine):
                self.records.add_log(job, event)
            observe(event)

        def note(n: int, state: str, usage: Usage) -> None:
            self._running[job] = session, n
            self.records.progress(job, n, state, usage)
            if state == "running":
                starts.set()

        try:
            if job in self._cancelled:
                raise LumarisError("cancelled")
            result = await session.order(
                job if attempt == 1 else new_job(),
                request,
                image=image.digest,
                image_source=image.source,
                inputs=inputs,
                files=files,
                folder=folder,
                observe=watch,
                note=note,
            )
        except (trio.Cancelled, LumarisError) as error:
            self.records.fail(job, error.code if isinstance(error, LumarisError) else "cancelled")
            raise
        finally:
            feeding.cancel()
            self._running.pop(job, None)
        result = replace(result, job=job, attempts=attempt)
        self._cancelled.discard(job)
        await self.records.finish(result)
        return result

    def cancel(self, job: str, *, grace_s: int = 0) -> None:
        """End a job of this program: its guest is asked to, and killed after the grace."""
        self._cancelled.add(job)
        if job in self._running:
            session, n = self._running[job]
            session.cancel(n, grace_s=grace_s)

    async def watch_cancels(self) -> None:
        """Cancel what other programs want cancelled, for as long as the client lives."""
        while True:
            await trio.sleep(_CANCEL_LOOK_S)
            if self._running:
                found = await self.store.take_cancels(self._running.keys(), now=time.time())
                for job, grace_s in found.items():
                    self.cancel(job, grace_s=grace_s)

    async def _feed(
        self, job: str, source: Source, starts: trio.Event, scope: trio.CancelScope
    ) -> None:
        with scope:
            await starts.wait()
            session, n = self._running[job]
            place = live.Place(job, seller=session.seller, session=session.session, n=n)
            try:
                await live.send_stdin(self.overlay, place, source)
            except LumarisError as error:
                # The guest may well end before its input does.
                log.info("standard input ended early job=%s code=%s", job, error.code)

    async def shard_map(self) -> bytes:
        """How the coordinator divides the market. Raises LumarisError."""
        return await self._link.call(coordinator_api.shards())


OpenOverlay = Callable[[OverlayConfig], AbstractAsyncContextManager[Overlay]]
OpenLink = Callable[[str], CoordinatorLink]


@asynccontextmanager
async def open_buyer(
    profile: Profile,
    *,
    open_overlay: OpenOverlay = attach_or_spawn,
    open_link: OpenLink | None = None,
) -> AsyncIterator[Buyer]:
    """Wire a buyer, and close it in reverse: sessions are ended and settled, nothing is left.

    `open_overlay` and `open_link` let a whole market run in one process.
    """
    key = load_or_create_key(profile.key_file)
    store = Store(profile.database)
    link = open_link(profile.coordinator) if open_link else coordinator.open_link(profile)
    try:
        standing = await membership.enter(link, key, profile)
        config = membership.overlay_config(profile, standing)
        async with (
            open_overlay(config) as inner,
            open_links(inner, listen=None, answer=False) as overlay,
            trio.open_nursery() as nursery,
        ):
            standing = await membership.present(overlay, link, key, profile, standing)
            cache = profile.state / membership.CACHE_NAME
            certified = Certified(link, key, cache, overlay, standing)
            buyer = Buyer(profile, key, store, link, certified, overlay, nursery)
            nursery.start_soon(buyer.market.follow)
            nursery.start_soon(buyer.pool.run, nursery)
            nursery.start_soon(buyer.records.run)
            nursery.start_soon(buyer.watch_cancels)
            nursery.start_soon(_greet, overlay, standing.bootstrap)
            nursery.start_soon(certified.keep)
            nursery.start_soon(keep_keys, overlay, certified.trusted, certified.key_list)
            nursery.start_soon(keep_shards, overlay, buyer.shard_map)
            nursery.start_soon(buyer.pool.settle)
            await store.end_orphan_jobs(now=time.time())
            try:
                yield buyer
            finally:
                with trio.CancelScope(shield=True):
                    await buyer.pool.close_all()
                    await buyer.records.flush()
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await link.aclose()
        store.close()


async def _greet(overlay: Overlay, addresses: tuple[str, ...]) -> None:
    """A warm overlay may know sellers by the addresses they had yesterday."""
    try:
        await overlay.connect(addresses)
    except LumarisError as error:
        log.info("no peer answered code=%s", error.code)


def new_job() -> str:
    return ids.make_id("job", os.urandom(ids.ID_RANDOM_BYTES))
