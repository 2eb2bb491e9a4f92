"""The node, wired: one visible block builds everything, and it is closed in reverse."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import trio
from msgspec import to_builtins

from lumaris_node import api, guardian
from lumaris_node.capability import benchmark
from lumaris_node.capability.advert import AdvertPublisher, Offer
from lumaris_node.capability.capacity import for_sale
from lumaris_node.capability.gpu import count_gpus, find_devices
from lumaris_node.capability.meter import Gpus
from lumaris_node.capability.upkeep import OfferUpkeep
from lumaris_node.challenges import Belonging, Challenges
from lumaris_node.config import NodeConfig, direct_address
from lumaris_node.coordinator_link import CoordinatorLink
from lumaris_node.desk import Desk, Terms
from lumaris_node.disputes import Disputes
from lumaris_node.executors.port import Executor
from lumaris_node.images.manage import open_store
from lumaris_node.images.service import ImageService
from lumaris_node.membership import Enrolment, Standing
from lumaris_node.notices import Notices
from lumaris_node.owner import Owner
from lumaris_node.selftest.keep import Assurance
from lumaris_node.sessions import Sessions
from lumaris_node.settle import Settler
from lumaris_node.store import Store
from lumaris_node.tender import Tenders
from lumaris_node.tiers import Tiers, make_executor
from lumaris_node.warming import warm_catalog
from lumaris_node.witness import Witness
from lumaris_node.workspace import Volumes
from lumaris_overlay.bulk.gate import BulkGate
from lumaris_overlay.bulk.rate import make_rate
from lumaris_overlay.coordinator_tls import FILE_NAME, CoordinatorTls
from lumaris_overlay.links import open_links
from lumaris_overlay.notice_upkeep import pass_on_keys
from lumaris_overlay.ports import Overlay
from lumaris_overlay.private_files import load_or_create_key, make_private_folder
from lumaris_overlay.registry import policy_of
from lumaris_overlay.shard_upkeep import keep_shards
from lumaris_overlay.supervisor import OverlayConfig, run_overlay
from lumaris_overlay.validate import DemandGate
from lumaris_protocol import coordinator_api, matching
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import MIB
from lumaris_protocol.machines.desk import QuoteDesk
from lumaris_protocol.messages.advert import Gpu, Resources, Tier
from lumaris_protocol.protocols import (
    ATTACH,
    BLOB,
    CHALLENGE,
    CONTENT,
    NEGOTIATE,
    SESSION,
    WITNESS,
)

log = logging.getLogger(__name__)

_EXPIRE_S = 1.0
# The last words of sessions and the removal of their sandboxes, then claims: together less than
# `down` waits.
_DRAIN_S, _SETTLE_S = 12.0, 8.0
_PRUNE_S = 3600.0


OpenOverlay = Callable[[OverlayConfig], AbstractAsyncContextManager[Overlay]]
OpenLink = Callable[[str], CoordinatorLink]


class Node:
    """A running node. `run` lasts until `stop` is called or the task is cancelled.

    `open_overlay` and `open_link` let a whole market run in one process.
    """

    def __init__(
        self,
        state: Path,
        config: NodeConfig,
        *,
        clock: Callable[[], float] = time.time,
        open_overlay: OpenOverlay = run_overlay,
        open_link: OpenLink | None = None,
    ) -> None:
        self.state, self.config, self.clock = state, config, clock
        self._overlay_opener, self._link_opener = open_overlay, open_link
        self._stopping = trio.Event()
        self._started_at = clock()
        self._transfer_rate = make_rate(config.share.transfer_mib_s * MIB or None)

    def stop(self) -> None:
        """Begin the clean shutdown."""
        self._stopping.set()

    async def run(self, on_ready: Callable[[str, str], None]) -> None:
        """Sell until stopped. `on_ready` gets our peer id and address when offers are out.

        Raises LumarisError when it cannot start; nothing is left behind then either.
        """
        async with AsyncExitStack() as stack:
            await self._build(stack)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._settler.run)
                nursery.start_soon(self._disputes.run)
                nursery.start_soon(self._expire_holds)
                nursery.start_soon(self._prune)
                nursery.start_soon(self._keep_certified)
                nursery.start_soon(keep_shards, self._overlay, self._shard_map)
                nursery.start_soon(
                    self._notices.run,
                    self._overlay,
                    self._link,
                    self._witness,
                    self._sessions.end_revoked,
                )
                nursery.start_soon(self._upkeep.run)
                nursery.start_soon(self._owner.run)
                nursery.start_soon(self._adverts.run)
                nursery.start_soon(self._tenders.run)
                nursery.start_soon(self._prepare)
                nursery.start_soon(self._witness.keep, self._link)
                await self._serve(stack)
                await nursery.start(self._serve_api)
                await self._tiers.settled()
                on_ready(self._key.peer_id, ",".join(self._adverts.offer.addresses))
                await self._stopping.wait()
                await self._shut_down()
                nursery.cancel_scope.cancel()

    async def status(self) -> dict[str, Any]:
        """What the owner wants to know, the sentence first."""
        self._desk.expire()
        free = self._quotes.free
        held = matching.subtract(self._quotes.total, free)
        assert held is not None, "what is free is part of the total"
        reach = await self._overlay.reachability()
        sessions = len(self._sessions.hosts)
        summary = await self._store.summary()
        sentence = f"Selling: {sessions} sessions, {reach.peers} peers connected."
        if not self._owner.selling:
            sentence = str(self._owner.status()["status"])
        if self._settler.last_error:
            sentence += f" Settlements wait: {self._settler.last_error}."
        disputes = self._disputes.status()
        if disputes["open"]:
            sentence += f" Disputes open: {disputes['open']}; see `lumaris dispute show`."
        return {
            "status": sentence,
            "peer": self._key.peer_id,
            "network": self._info.network,
            "coordinator": self.config.coordinator,
            "addresses": list(reach.addresses),
            "reach": {
                "verdict": reach.verdict,
                "confirmed_by": list(reach.confirmed_by),
                "relays": list(reach.relays),
                "observed": list(reach.observed),
            },
            "peers": reach.peers,
            "uptime_s": int(self.clock() - self._started_at),
            "runtimes": [runtime.tier for runtime in self._adverts.offer.runtimes],
            "tiers": self._tiers.report(),
            "encryption": self._volumes.kind,
            "images": list(self._adverts.offer.cached),
            "gpus": to_builtins(self._quotes.total.gpus),
            "challenges": dict(self._challenges.counts),
            "witness": self._witness.status(),
            "disputes": disputes,
            "total": _plain(self._quotes.total),
            "free": _plain(free),
            "held": _plain(held),
            "holds": dict(Counter(hold.machine.state for hold in self._quotes.holds)),
            "sessions": sessions,
            "demand": dict(self._desk.counts),
            "currency": self._info.currency,
            **summary,
        }

    # --- wiring ---

    async def _build(self, stack: AsyncExitStack) -> None:
        state, config = self.state, self.config
        # Asked before anything that a running node may be using is touched.
        await api.check_free(state / api.SOCKET_NAME)
        make_private_folder(self._shared)
        key = self._key = load_or_create_key(state / "node.key")
        store = self._store = Store(state / "node.db")
        stack.callback(store.close)
        link = self._link = (self._link_opener or self._open_link)(config.coordinator)
        stack.push_async_callback(link.aclose)
        enrolment = self._enrolment = Enrolment(
            link, key, state / "membership.json", url=config.coordinator, clock=self.clock
        )
        info = self._info = (await enrolment.join()).info
        keys = self._trusted = enrolment.trusted
        terms = Terms(info.network, info.coordinator, info.fee_bps, keys)
        overlay = self._overlay = await self._open_overlay(stack, enrolment.standing)
        await overlay.present(enrolment.standing.certificate)
        await enrolment.announce(await self._addresses())
        devices = await trio.to_thread.run_sync(find_devices) if config.accept.gpu else ()
        await self._guard(stack)
        tiers = self._tiers = Tiers(
            config, make=self._make_executor, assurance=self._assurance(), gpus=bool(devices)
        )
        await tiers.open(stack)
        self._volumes = await self._open_volumes()
        self._images = await self._open_images(overlay)
        total = await trio.to_thread.run_sync(self._capacity, count_gpus(devices))
        quotes = self._quotes = QuoteDesk(total)
        self._notices = Notices(self.clock, keys)
        self._adverts = AdvertPublisher(
            overlay,
            store,
            key,
            await self._offer(total, enrolment.standing),
            network=info.network,
            free=lambda: quotes.free,
            clock=self.clock,
        )
        self._upkeep = OfferUpkeep(
            self._adverts, overlay=overlay, tiers=tiers, images=self._images, speeds=self._shared
        )
        self._desk = Desk(
            quotes,
            key,
            terms,
            store=store,
            advert=self._adverts.current,
            clock=self.clock,
            changed=self._adverts.changed,
            egress=config.accept.egress,
            revoked=self._notices.revoked,
        )
        gate = DemandGate(info.network, keys, self._notices.revoked)
        self._tenders = Tenders(
            overlay, self._adverts, gate, free=lambda: quotes.free, clock=self.clock
        )
        disputes = self._disputes = Disputes(
            link,
            store,
            key,
            network=info.network,
            token=lambda: enrolment.standing.token,
            clock=self.clock,
        )
        self._settler = Settler(
            link,
            store,
            key,
            terms,
            token=lambda: enrolment.standing.token,
            clock=self.clock,
            dispute=disputes.open_unpaid if config.settle.dispute_unpaid else None,
            disputed=disputes.wake,
        )
        self._sessions = Sessions(
            self._desk,
            tiers.executors,
            network=info.network,
            volumes=self._volumes,
            store=store,
            clock=self.clock,
            ended=self._settler.wake,
            transfer_rate=self._transfer_rate,
            pids_max=config.share.pids_max,
            images=self._images,
            gpus=Gpus(devices),
            revoked=self._notices.revoked,
        )
        self._owner = Owner(self._sessions, self._adverts, config.schedule, clock=self.clock)
        self._challenges = Challenges(
            key,
            Belonging(info.network, keys),
            wasm=tiers.executors.get("wasm"),
            folder=state / "challenges",
            aside=quotes.aside,
            selling=lambda: self._owner.selling,
            clock=self.clock,
        )
        self._witness = Witness(
            key,
            network=info.network,
            folder=state,
            coordinators=lambda: frozenset(keys),
            clock=self.clock,
        )
        await self._recover()

    def _open_link(self, url: str) -> CoordinatorLink:
        authority = self.config.coordinator_ca
        tls = CoordinatorTls(
            url,
            ca_file=Path(authority) if authority else None,
            key=self._key,
            file=self.state / FILE_NAME,
            clock=self.clock,
        )
        return CoordinatorLink(url, tls=tls)

    async def _open_overlay(self, stack: AsyncExitStack, standing: Standing) -> Overlay:
        info = standing.info
        config = OverlayConfig(
            key_file=self.state / "node.key",
            network=info.network,
            coordinator_keys=frozenset(self._trusted),
            roots=self._trusted.roots,
            state_dir=self.state / "overlay",
            listen=self.config.listen,
            bootstrap=(*self.config.bootstrap, *standing.bootstrap),
            memory_bytes_max=self.config.overlay_memory_mib * MIB,
            announce=self.config.network.announce,
            relay_service=self.config.network.relay_service,
            mdns=self.config.network.mdns,
        )
        inner = await stack.enter_async_context(self._overlay_opener(config))
        listen = direct_address(self.config)
        return await stack.enter_async_context(
            open_links(inner, listen=listen, gate=BulkGate(rate=self._transfer_rate))
        )

    def _make_executor(self, tier: Tier) -> Executor:
        return make_executor(tier, self.state, self.config, self._key.peer_id)

    def _assurance(self) -> Assurance:
        return Assurance(self.state, reports=self._shared, clock=self.clock)

    async def _guard(self, stack: AsyncExitStack) -> None:
        """From here on nothing that is made outlives this process, however it ends."""
        # Guests first: what they use is removed after them.
        marks = [guardian.REAP_GROUPS, guardian.REAP_VOLUMES]
        if "container" in self.config.accept.runtimes:
            marks.insert(1, guardian.REAP_CONTAINERS)
        held = await guardian.start(self.state, tuple(marks), node=self._key.peer_id)
        stack.push_async_callback(held.aclose)

    async def _open_volumes(self) -> Volumes:
        """After the tiers have ended what a predecessor ran: it may still use its volumes."""
        encryption = self.config.share.encryption
        return await trio.to_thread.run_sync(
            partial(Volumes.open, self.state / "volumes", encryption=encryption)
        )

    async def _open_images(self, overlay: Overlay) -> ImageService:
        accept = self.config.accept
        content = await trio.to_thread.run_sync(open_store, self.state)
        return ImageService(
            content,
            overlay=overlay,
            policy=policy_of(accept.registries),
            module=self._find_module,
            rate=self._transfer_rate,
            buyer_images=accept.buyer_images,
        )

    def _find_module(self, digest: str) -> Path | None:
        wasm = self._tiers.wasm
        return wasm.modules.path(digest) if wasm and wasm.modules.holds(digest) else None

    def _capacity(self, gpus: tuple[Gpu, ...]) -> Resources:
        return for_sale(
            self.state,
            self.config.share,
            gpus=gpus,
            memory_backed=self._volumes.memory_backed,
        )

    async def _offer(self, total: Resources, standing: Standing) -> Offer:
        config = self.config
        return Offer(
            region=config.region,
            total=total,
            prices=config.price.table(),
            lease_s_max=config.accept.lease_s_max,
            benchmarks=benchmark.kept(self._shared, total.cpu_millis) or {},
            runtimes=self._tiers.runtimes,
            cached=await self._images.cached(self._tiers.executors.values()),
            addresses=await self._addresses(),
            certificate=standing.certificate,
        )

    async def _prepare(self) -> None:
        """What nobody waits for: the catalog is compiled, and this machine's speed measured."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(warm_catalog, self._tiers, lambda: self._sessions.hosts)
            nursery.start_soon(self._upkeep.measure)

    @property
    def _shared(self) -> Path:
        """Where nodes of one owner keep what is true of the whole machine."""
        return Path(self.config.modules) if self.config.modules else self.state

    async def _addresses(self) -> tuple[str, ...]:
        return (await self._overlay.reachability()).addresses

    async def _recover(self) -> None:
        """Answer for what a killed predecessor left: its files are gone, its money is settled."""
        cut_off = await self._store.recover(now=self.clock())
        await self._store.prune(now=self.clock())
        if cut_off:
            log.warning("sessions cut off by the last stop count=%d", cut_off)

    # --- serving ---

    async def _serve(self, stack: AsyncExitStack) -> None:
        overlay = self._overlay
        await stack.enter_async_context(overlay.serve(NEGOTIATE, self._desk.serve))
        await stack.enter_async_context(overlay.serve(SESSION, self._sessions.serve))
        await stack.enter_async_context(overlay.serve(BLOB, self._sessions.serve_blob))
        await stack.enter_async_context(overlay.serve(ATTACH, self._sessions.live.serve))
        await stack.enter_async_context(overlay.serve(CONTENT, self._images.desk.serve))
        await stack.enter_async_context(overlay.serve(CHALLENGE, self._challenges.serve))
        await stack.enter_async_context(overlay.serve(WITNESS, self._witness.serve))

    async def _serve_api(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        await api.serve(
            self.state / api.SOCKET_NAME,
            status=self.status,
            stop=self.stop,
            calls={
                "pause": self._owner.pause,
                "resume": self._owner.resume,
                "retest": self._retest,
            },
            task_status=task_status,
        )

    async def _retest(self) -> dict[str, Any]:
        """The owner saw something else than what is offered: look again."""
        self._tiers.retest()
        return {"status": "Testing every tier again."}

    async def _expire_holds(self) -> None:
        while True:
            await trio.sleep(_EXPIRE_S)
            self._desk.expire()

    async def _prune(self) -> None:
        while True:
            await trio.sleep(_PRUNE_S)
            try:
                await self._store.prune(now=self.clock())
            except sqlite3.Error as error:
                log.warning("store not pruned error=%r", error)

    async def _keep_certified(self) -> None:
        await self._enrolment.keep(self._upkeep.look_around, self._certified)

    async def _certified(self, standing: Standing) -> None:
        """The coordinator has spoken again: show its word, and find whom it knows."""
        # First, for it may name the key that signed the certificate.
        await pass_on_keys(self._overlay, standing.key_list)
        self._adverts.offer.certificate = standing.certificate
        self._adverts.changed(always=True)
        try:
            await self._overlay.present(standing.certificate)
            await self._overlay.connect(standing.bootstrap)
        except LumarisError as error:
            log.warning("certificate not shown code=%s", error.code)

    async def _shard_map(self) -> bytes:
        return await self._link.call(coordinator_api.shards())

    async def _shut_down(self) -> None:
        """Withdraw the offer, end sessions with their money kept, settle what can be settled."""
        self._quotes.accepting = False
        with trio.move_on_after(_DRAIN_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._withdraw)
                self._sessions.close("shutting_down")
                while self._sessions.hosts:  # noqa: ASYNC110 - bounded by the drain time above
                    await trio.sleep(_EXPIRE_S / 20)
        # A time of its own: what is not settled now waits for the next start of this node.
        with trio.move_on_after(_SETTLE_S):
            await self._settler.settle_all()

    async def _withdraw(self) -> None:
        try:
            await self._adverts.publish(withdrawn=True)
        except LumarisError as error:
            log.warning("offer not withdrawn code=%s", error.code)


def _plain(resources: Resources) -> dict[str, Any]:
    return {
        "cpu_millis": resources.cpu_millis,
        "memory_bytes": resources.memory_bytes,
        "disk_bytes": resources.disk_bytes,
        "gpus": sum(gpu.count for gpu in resources.gpus),
    }
