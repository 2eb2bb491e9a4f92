"""The composition root: everything the coordinator is made of, wired once and closed in reverse."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, TypeVar

import anyio
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from lumaris_coordinator import idempotency, problems, status
from lumaris_coordinator.authority import Authority
from lumaris_coordinator.bounds import CHORES_EVERY_S
from lumaris_coordinator.clock import SteadyClock
from lumaris_coordinator.config import Settings
from lumaris_coordinator.context import Context
from lumaris_coordinator.direct import Direct
from lumaris_coordinator.disputes import store as dispute_store
from lumaris_coordinator.disputes.routes import router as disputes_router
from lumaris_coordinator.disputes.service import Disputes
from lumaris_coordinator.edge import Edge
from lumaris_coordinator.escrow.chores import add_downtime, beat, resume
from lumaris_coordinator.escrow.grants import Grants
from lumaris_coordinator.escrow.routes import router as escrow_router
from lumaris_coordinator.escrow.service import Escrows
from lumaris_coordinator.events import retention
from lumaris_coordinator.events.hub import Hub
from lumaris_coordinator.events.routes import router as events_router
from lumaris_coordinator.gauges import Gauges
from lumaris_coordinator.http import PROBLEMS
from lumaris_coordinator.identity import shared_list
from lumaris_coordinator.identity.api_keys import ApiKeys
from lumaris_coordinator.identity.keys import KeyRing
from lumaris_coordinator.identity.passwords import Passwords
from lumaris_coordinator.identity.revocations import RevocationList
from lumaris_coordinator.identity.routes import router as identity_router
from lumaris_coordinator.identity.service import Identity
from lumaris_coordinator.identity.trust_routes import router as trust_router
from lumaris_coordinator.identity.user_routes import router as user_router
from lumaris_coordinator.identity.users import Users
from lumaris_coordinator.ledger.bonding import Bonds
from lumaris_coordinator.ledger.routes import router as ledger_router
from lumaris_coordinator.ledger.service import Ledger
from lumaris_coordinator.limits.limiter import Limiter
from lumaris_coordinator.limits.middleware import Limits
from lumaris_coordinator.metrics import Metrics
from lumaris_coordinator.money.adapters.test_credit import TestCredit
from lumaris_coordinator.money.routes import router as money_router
from lumaris_coordinator.money.service import Money
from lumaris_coordinator.offers.routes import router as offers_router
from lumaris_coordinator.offers.service import Offers
from lumaris_coordinator.openapi import complete
from lumaris_coordinator.peers.rounds import WitnessRounds
from lumaris_coordinator.peers.service import OverlayPeer
from lumaris_coordinator.problems import BadDocuments
from lumaris_coordinator.receipts.log import log_of
from lumaris_coordinator.receipts.routes import router as receipts_router
from lumaris_coordinator.receipts.service import Receipts
from lumaris_coordinator.receipts.witnesses import Witnesses
from lumaris_coordinator.shard_map import ShardMaps
from lumaris_coordinator.shard_map import router as shards_router
from lumaris_coordinator.store.port import Connection
from lumaris_coordinator.store.store import Store
from lumaris_coordinator.tables import MIGRATIONS
from lumaris_coordinator.tls import CertificateNeeded
from lumaris_coordinator.upkeep import folder
from lumaris_coordinator.webhooks.delivery import Deliveries
from lumaris_coordinator.webhooks.outgoing import PinnedSender
from lumaris_coordinator.webhooks.routes import router as webhooks_router
from lumaris_coordinator.webhooks.service import Webhooks
from lumaris_overlay.ports import Overlay
from lumaris_overlay.private_files import make_private_folder
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import PeerId

log = logging.getLogger(__name__)

T = TypeVar("T")


# The busiest first: routes are tried in this order.
ROUTERS: Final = (
    escrow_router,
    identity_router,
    user_router,
    trust_router,
    ledger_router,
    receipts_router,
    shards_router,
    offers_router,
    disputes_router,
    events_router,
    webhooks_router,
    money_router,
    status.router,
)


class Coordinator:
    """One coordinator over one state directory. Use inside `running()`.

    Raises LumarisError `not_writable`, `unsafe_key_file` or `config_invalid`.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] | None = None) -> None:
        clock = clock or SteadyClock()
        make_private_folder(settings.state)
        keys = KeyRing(
            settings.state,
            network=settings.network,
            clock=clock,
            create=not folder.bound_to(settings.state),
        )
        self.settings = settings
        self.log = log_of(settings.network, keys)
        self.metrics = Metrics()
        self.store = Store(
            settings.state,
            migrations=MIGRATIONS,
            hooks=(self.log, self.metrics.commits),
            clock=clock,
            database=settings.database,
        )
        self.metrics.commits.stats = self.store.writer.stats
        self._beating = True  # whether the last heartbeat was written
        self.context = Context(settings, keys, clock, self.store)
        self.ledger = Ledger(self.context)
        self.limiter = Limiter(clock, address_rate=settings.address_rate)
        self.identity = Identity(self.context)
        vault = self.identity.vault
        self.users = Users(self.context, vault, self.limiter, Passwords())
        self.api_keys = ApiKeys(self.context, vault)
        self.revocations = RevocationList(self.context)
        self.receipts = Receipts(self.context, self.log)
        self.witnesses = Witnesses(self.context, self.log)
        self.grants = Grants(self.context)
        self.escrows = Escrows(self.context)
        self.bonds = Bonds(self.context)
        self.disputes = Disputes(self.context)
        self.shard_maps = ShardMaps(self.context)
        self.money = Money(self.context, [TestCredit(self.store, currency=settings.currency)])
        self.events = Hub(self.store)
        self.webhooks = Webhooks(self.context)
        self.deliveries = Deliveries(
            self.context, PinnedSender(loopback=settings.webhooks_to_loopback)
        )
        self.events.listen(self.deliveries.hear)
        self.offers = Offers(network=settings.network, now=self.context.now)
        self.overlay = self._overlay_peer() if settings.overlay else None
        self.rounds = WitnessRounds(self.context, self.witnesses, self._call_overlay)
        self.gauges = Gauges()
        self.bad_documents = BadDocuments()

    @cached_property
    def authority(self) -> Authority:
        """Who signs TLS client certificates; made when somebody first asks for one.

        Raises LumarisError `not_writable`, `unsafe_key_file` or `config_invalid`.
        """
        return Authority(self.settings.state, now=self.context.now())

    @property
    def peer_id(self) -> PeerId:
        """The coordinator's own peer id, which new agreements name."""
        return self.context.peer

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open the store, catch up with the time away, and keep the chores going.

        Raises LumarisError: `already_running`, `not_writable`, or `config_invalid` for the state of
        another network or key.
        """
        folder.require_database(self.settings.state, self.store.backend)
        async with self.store.running():
            self.context.keys.take(await self.store.submit(self._start))
            folder.bind(self.settings.state, self.store.backend)
            await self.events.start()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_chores)
                if self.overlay is not None:
                    tasks.start_soon(self.overlay.run)
                    tasks.start_soon(self.rounds.run)
                tasks.start_soon(self.store.follow)
                tasks.start_soon(self.events.run)
                tasks.start_soon(self.deliveries.run)
                tasks.start_soon(self.money.payouts.keep)
                if self.settings.witnesses_required:
                    await self.rounds.check_start()
                try:
                    yield
                finally:
                    tasks.cancel_scope.cancel()
                    with anyio.CancelScope(shield=True):
                        await self._beat()

    def _overlay_peer(self) -> OverlayPeer:
        return OverlayPeer(
            self.context,
            shards=self.shard_maps.signed,
            heard=self.offers.take,
            alive=self.offers.heard,
            bootstrap=self.identity.bootstrap,
            current=self._notices,
        )

    async def _notices(self) -> list[bytes]:
        """The notices that hold now, for peers that have not heard them."""
        return [self.context.keys.list.data, await self.revocations.newest()]

    async def _call_overlay(self, work: Callable[[Overlay], Awaitable[T]]) -> T:
        if self.overlay is None:
            raise LumarisError("overlay_failed", "This coordinator has no overlay.")
        return await self.overlay.call(work)

    def _start(self, connection: Connection) -> bytes:
        """An operation: claim the state for this network and key, open what must exist; the key
        list to go on with."""
        keys, settings = self.context.keys, self.settings
        folder.claim(connection, settings, keys.first.peer_id)
        listed = shared_list.exchange(connection, keys.list, network=settings.network)
        self.shard_maps.start(connection)
        self.ledger.open_accounts(connection)
        if self.store.others(connection):
            # Somebody could be asked to settle all the time: that was no downtime.
            beat(connection, now=self.context.now())
            return listed
        away = add_downtime(connection, now=self.context.now())
        if away:
            dispute_store.extend_open(connection, seconds=away)
            log.info("away for %d s: open deadlines are extended by as much", away)
        return listed

    async def _follow_keys(self) -> None:
        """Take up a changed list, or the one of another replica; a new key signs only after the
        data knows it, so that every replica can check what it signs."""
        keys, network = self.context.keys, self.settings.network
        found = keys.found()
        listed = await self.store.submit(
            lambda connection: shared_list.exchange(connection, found, network=network)
        )
        if keys.take(listed):
            self.context.notices.publish(listed)
        keys.warn()

    async def _keep_chores(self) -> None:
        while True:
            await anyio.sleep(CHORES_EVERY_S)
            try:
                await self.run_chores()
            except Exception:
                log.exception("the chores failed; they run again in %.0f s", CHORES_EVERY_S)

    async def run_chores(self) -> None:
        """One round: heartbeat, settle windows that have ended, what can be forgotten."""
        await self._beat()
        ended = await self.escrows.expire_due()
        if ended:
            log.info("%d settle windows ended", ended)
        await self.disputes.run_chores()
        await self.bonds.run_chores()
        await self.identity.prune()
        await self.users.prune()
        await self._follow_keys()
        await self.money.run_chores()
        await self.store.submit(
            lambda connection: idempotency.prune(connection, now=self.context.now())
        )
        await retention.prune(
            self.store, now=self.context.now(), kept_s=self.settings.events_kept_s
        )
        self.bad_documents.new_round()

    async def _beat(self) -> None:
        now, beating = self.context.now(), self._beating

        def operation(connection: Connection) -> int:
            if beating:
                beat(connection, now=now)
                return 0
            away = resume(connection, now=now)
            if away:
                dispute_store.extend_open(connection, seconds=away)
            return away

        self._beating = False
        away = await self.store.submit(operation)
        self._beating = True
        if away:
            log.warning("nothing was written for %d s: open deadlines are extended", away)

    def info(self) -> dict[str, Any]:
        """The public terms."""
        settings = self.settings
        return {
            "network": settings.network,
            "coordinator": self.peer_id,
            "currency": settings.currency,
            "currencies": list(settings.currencies),
            "fee_bps": settings.fee_bps,
            "settle_window_s": settings.settle_window_s,
            "bond_release_s": settings.bond_release_s,
            "dispute_window_s": settings.dispute_window_s,
            "dispute_evidence_s": settings.dispute_evidence_s,
            "dispute_check_s": settings.dispute_check_s,
            "test_credit_nanos": settings.test_credit_nanos,
            "log_origin": self.log.origin,
            "version": _version(),
            "time": self.context.now(),
        }


def create_app(coordinator: Coordinator) -> FastAPI:
    """The ASGI app over a coordinator. It serves while the coordinator is `running()`."""
    app = FastAPI(
        title="Lumaris coordinator",
        version=_version(),
        openapi_url="/v1/openapi.json",
        docs_url=None,  # the page that comes with the framework loads its code from strangers
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # our own is in edge.py
        responses=PROBLEMS,
    )
    app.state.coordinator = coordinator
    app.state.bad_documents = coordinator.bad_documents
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(LumarisError, problems.on_error)
    app.add_exception_handler(RequestValidationError, problems.on_invalid)
    app.add_exception_handler(HTTPException, problems.on_http)
    proxies = frozenset(coordinator.settings.proxies)
    app.add_middleware(Direct, routes=escrow_router.routes)
    if coordinator.settings.mutual_tls:
        app.add_middleware(CertificateNeeded)
    app.add_middleware(Limits, limiter=coordinator.limiter, proxies=proxies)
    app.add_middleware(Edge, metrics=coordinator.metrics)
    described = app.openapi  # a bound method: what it makes is completed once and kept

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = complete(described())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _version() -> str:
    try:
        return version("lumaris")
    except PackageNotFoundError:
        return "unknown"
