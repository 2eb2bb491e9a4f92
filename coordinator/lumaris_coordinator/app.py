"""The composition root: everything the coordinator is made of, wired once and closed in reverse."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import anyio
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from lumaris_coordinator import problems, status
from lumaris_coordinator.bounds import CHORES_EVERY_S
from lumaris_coordinator.config import Settings
from lumaris_coordinator.context import Context
from lumaris_coordinator.edge import Edge
from lumaris_coordinator.escrow.chores import add_downtime, beat
from lumaris_coordinator.escrow.routes import router as escrow_router
from lumaris_coordinator.escrow.service import Escrows
from lumaris_coordinator.http import PROBLEMS, SECURITY_SCHEMES
from lumaris_coordinator.identity.routes import router as identity_router
from lumaris_coordinator.identity.service import Identity
from lumaris_coordinator.ledger.routes import router as ledger_router
from lumaris_coordinator.ledger.service import Ledger
from lumaris_coordinator.metrics import Metrics
from lumaris_coordinator.problems import BadDocuments
from lumaris_coordinator.receipts.log import ReceiptLog
from lumaris_coordinator.receipts.routes import router as receipts_router
from lumaris_coordinator.receipts.service import Receipts
from lumaris_coordinator.shard_map import ShardMaps
from lumaris_coordinator.shard_map import router as shards_router
from lumaris_coordinator.store.port import Connection, first
from lumaris_coordinator.store.store import Store
from lumaris_coordinator.tables import MIGRATIONS
from lumaris_overlay.private_files import load_or_create_key, make_private_folder
from lumaris_protocol.errors import LumarisError

log = logging.getLogger(__name__)


class Coordinator:
    """One coordinator over one state directory. Use inside `running()`.

    Raises LumarisError `not_writable`, `unsafe_key_file` or `config_invalid`.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.time) -> None:
        make_private_folder(settings.state)
        key = load_or_create_key(settings.state / "coordinator.key")
        self.settings, self.peer_id = settings, key.peer_id
        self.log = ReceiptLog(network=settings.network, key=key)
        self.store = Store(settings.state, migrations=MIGRATIONS, hooks=(self.log,), clock=clock)
        self.context = Context(settings, key, clock, self.store)
        self.ledger = Ledger(self.context)
        self.identity = Identity(self.context)
        self.receipts = Receipts(self.context, self.log)
        self.escrows = Escrows(self.context)
        self.shard_maps = ShardMaps(self.context)
        self.metrics = Metrics()
        self.bad_documents = BadDocuments()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open the store, catch up with the time away, and keep the chores going.

        Raises LumarisError: `already_running`, `not_writable`, or `config_invalid` for the state of
        another network or key.
        """
        async with self.store.running():
            await self.store.submit(self._start)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_chores)
                try:
                    yield
                finally:
                    tasks.cancel_scope.cancel()
                    with anyio.CancelScope(shield=True):
                        await self._beat()

    def _start(self, connection: Connection) -> None:
        """An operation: claim the state for this network and key, open what must exist."""
        settings = self.settings
        for name, value in (
            ("network", settings.network),
            ("coordinator", self.peer_id),
            ("currency", settings.currency),
        ):
            row = first(connection, "SELECT value FROM setting WHERE name = ?", (name,))
            if row is not None and row[0] != value:
                raise LumarisError(
                    "config_invalid", f"The state belongs to {name} {row[0]}, not {value}."
                )
            connection.execute(
                "INSERT INTO setting (name, value) VALUES (?, ?) ON CONFLICT DO NOTHING",
                (name, value),
            )
        self.shard_maps.start(connection)
        self.ledger.open_accounts(connection)
        away = add_downtime(connection, now=self.context.now())
        if away:
            log.info("away for %d s: open deadlines are extended by as much", away)

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
        await self.identity.prune()
        self.bad_documents.new_round()

    async def _beat(self) -> None:
        now = self.context.now()
        await self.store.submit(lambda connection: beat(connection, now=now))

    def info(self) -> dict[str, Any]:
        """The public terms."""
        settings = self.settings
        return {
            "network": settings.network,
            "coordinator": self.peer_id,
            "currency": settings.currency,
            "fee_bps": settings.fee_bps,
            "settle_window_s": settings.settle_window_s,
            "test_credit_nanos": settings.test_credit_nanos,
            "log_origin": self.log.origin,
            "version": _version(),
            "time": self.context.now(),
        }


def create_app(coordinator: Coordinator) -> FastAPI:
    """The ASGI app over a coordinator. It serves while the coordinator is `running()`."""
    app = FastAPI(
        title="Lumaris coordinator", version=_version(), redoc_url=None, responses=PROBLEMS
    )
    app.state.coordinator = coordinator
    app.state.bad_documents = coordinator.bad_documents
    for router in (
        identity_router,
        ledger_router,
        escrow_router,
        receipts_router,
        shards_router,
        status.router,
    ):
        app.include_router(router)
    app.add_exception_handler(LumarisError, problems.on_error)
    app.add_exception_handler(RequestValidationError, problems.on_invalid)
    app.add_exception_handler(HTTPException, problems.on_http)
    app.add_middleware(Edge, metrics=coordinator.metrics)
    described = app.openapi  # a bound method: what it makes is completed once and kept

    def openapi() -> dict[str, Any]:
        found = described()
        found.setdefault("components", {})["securitySchemes"] = SECURITY_SCHEMES
        return found

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _version() -> str:
    try:
        return version("lumaris")
    except PackageNotFoundError:
        return "unknown"
