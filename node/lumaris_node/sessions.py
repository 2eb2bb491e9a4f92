"""All sessions of this node: the streams that open them, their files, their end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

import trio

from lumaris_node.capability.meter import Gpus
from lumaris_node.desk import Desk
from lumaris_node.executors.port import Executor
from lumaris_node.images.service import ImageService
from lumaris_node.live import Connect, LiveDesk
from lumaris_node.session import SessionHost
from lumaris_node.store import Store
from lumaris_node.workspace import Volumes
from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.tasks import StrangerLog
from lumaris_protocol import agreements, codec, envelope
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import PIDS_MAX
from lumaris_protocol.machines.desk import Hold
from lumaris_protocol.machines.seller import SellerSession
from lumaris_protocol.messages.advert import Tier
from lumaris_protocol.messages.execution import SessionOpen
from lumaris_protocol.messages.negotiation import Agreement
from lumaris_protocol.protocols import BlobHeader
from lumaris_protocol.revocations import RevokedSet

log = logging.getLogger(__name__)

_OPENING_S = 10
_HEADER_S = 10


class Sessions:
    """Answers `/lumaris/session/1` and `/lumaris/blob/1`; `live.serve` answers `/lumaris/attach/1`.

    `ended` is called after each session.
    """

    def __init__(
        self,
        desk: Desk,
        executors: Mapping[Tier, Executor],
        *,
        network: str,
        volumes: Volumes,
        store: Store,
        clock: Callable[[], float],
        ended: Callable[[], None],
        transfer_rate: Rate | None = None,
        pids_max: int = PIDS_MAX,
        connect: Connect | None = None,
        images: ImageService | None = None,
        gpus: Gpus | None = None,
        revoked: RevokedSet | None = None,
    ) -> None:
        self._gpus = gpus
        self._revoked = revoked if revoked is not None else RevokedSet()
        self._images = images
        self._paused = False
        self._pids_max = pids_max
        self._transfer_rate = transfer_rate
        self._desk, self._executors = desk, executors
        self._network, self._volumes, self._store = network, volumes, store
        self._clock, self._ended = clock, ended
        self._hosts: dict[str, SessionHost] = {}
        self.live = LiveDesk(self._hosts.get, connect=connect or _connect)
        self._closing = False
        self._strangers = StrangerLog(log)

    @property
    def hosts(self) -> tuple[SessionHost, ...]:
        """The sessions that are open now."""
        return tuple(self._hosts.values())

    def pause_by_owner(self, *, paused: bool) -> None:
        """Freeze what runs, and what will open meanwhile; or let it go on."""
        self._paused = paused
        for host in self.hosts:
            host.pause_by_owner(paused=paused)

    def close(self, reason: str) -> None:
        """End every session, and open no other."""
        self._closing = True
        for host in self.hosts:
            host.end(reason)

    def end_revoked(self) -> None:
        """End the sessions of which a party was revoked since it agreed: what was vouchered stands,
        and nothing more is taken."""
        for host in self.hosts:
            if self._is_revoked(host.machine.contract.agreement):
                host.end("revoked")

    def _is_revoked(self, agreement: Agreement) -> bool:
        parties = agreement.buyer, agreement.seller
        return self._revoked.ends(*parties, agreed_at=agreement.issued_at)

    async def serve(self, stream: OverlayStream) -> None:
        """One session, from its opening to its end."""
        framed = FramedStream(stream)
        try:
            with trio.fail_after(_OPENING_S):
                opening = await framed.expect(Kind.ENVELOPE)
            await self._run(opening, framed, stream.peer)
        except LumarisError as error:
            self._strangers.note(stream.peer, error.code, error.message)
            await framed.refuse(error)
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
            log.info("session not opened peer=%s", stream.peer)
        except Exception:
            log.exception("session not opened peer=%s", stream.peer)
            await framed.refuse(LumarisError("platform_error"))
        finally:
            await framed.aclose()

    async def _run(self, opening: bytes, framed: FramedStream, peer: str) -> None:
        found = envelope.decode(opening)
        if found.payload_type != SessionOpen.TYPE:
            raise RefusedError("wrong_type", "A session begins with session_open.")
        # Only the session's id is read before the machine has checked the signature.
        first = codec.decode_payload(found.payload, SessionOpen)
        try:
            hold, host = self._open(opening, first.session, framed, peer)
        except RefusedError as error:
            if error.code in ("quote_unknown", "shutting_down"):
                await self._end_lapsed(first, peer)
            raise
        await self._host(host, hold)

    def _open(
        self, opening: bytes, session: str, framed: FramedStream, peer: str
    ) -> tuple[Hold, SessionHost]:
        if self._closing:
            raise RefusedError("shutting_down")
        hold = self._desk.find_contract(session)
        contract = hold.contract
        assert contract is not None, "find_contract returns agreed holds only"
        if peer != contract.agreement.buyer or session in self._hosts:
            raise RefusedError("wrong_signer", "Another peer's session, or one already open.")
        if self._is_revoked(contract.agreement):
            raise RefusedError("revoked")
        executor = self._executors.get(contract.agreement.tier)
        if executor is None:
            raise RefusedError("tier_unavailable")
        host = SessionHost(
            SellerSession(contract, self._desk.session_key(hold), network=self._network),
            framed,
            executor=executor,
            volumes=self._volumes,
            store=self._store,
            clock=self._clock,
            transfer_rate=self._transfer_rate,
            pids_max=self._pids_max,
            images=self._images,
            gpus=self._gpus,
        )
        host.pause_by_owner(paused=self._paused)
        host.check(opening)
        self._desk.quotes.granted(contract.hash, now=self._clock())
        return hold, host

    async def _host(self, host: SessionHost, hold: Hold) -> None:
        session, reason = host.session, "platform_error"
        self._hosts[session] = host
        try:
            reason = await host.run(
                ending=partial(self._desk.ending, hold), freed=partial(self._desk.release, hold)
            )
        finally:
            del self._hosts[session]
            self._desk.release(hold)  # where it did not come so far
            self._ended()
            log.info(
                "session over session=%s reason=%s orders=%d", session, reason, host.orders_done
            )

    async def _end_lapsed(self, opening: SessionOpen, peer: str) -> None:
        """A grant for an agreement that lapsed: claim nothing, so that the buyer's money is freed.

        The grant speaks for itself: the coordinator signed it for this one agreement, and the buyer
        may have lost its session key. Raises LumarisError for another's; nothing changes then.
        """
        found = await self._store.find_ungranted(opening.session)
        if found is None:
            return
        contract = agreements.join(*found, network=self._network)
        agreement = contract.agreement
        if peer != agreement.buyer:
            raise RefusedError("wrong_signer", "Another peer's session.")
        agreements.open_grant(
            opening.grant,
            contract,
            network=self._network,
            coordinator=agreement.coordinator,
            now=None,
        )
        await self._store.end_ungranted(opening.session, opening.grant, now=self._clock())
        self._ended()

    async def serve_blob(self, stream: OverlayStream) -> None:
        """One file of an open session."""
        framed = FramedStream(stream)
        try:
            with trio.fail_after(_HEADER_S):
                header = await framed.expect_header(BlobHeader)
            host = self._hosts.get(header.session)
            if host is None or host.buyer != stream.peer:
                raise RefusedError("not_found", "No open session of yours has that id.")
            await host.serve_blob(header, framed)
        except LumarisError as error:
            self._strangers.note(stream.peer, error.code, error.message)
            await framed.refuse(error)
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            log.info("transfer ended early peer=%s error=%r", stream.peer, error)
        except Exception as error:
            log.warning("transfer failed peer=%s error=%r", stream.peer, error)
            await framed.refuse(LumarisError("platform_error"))
        finally:
            await framed.aclose()


async def _connect(pid: int, port: int) -> trio.SocketStream:
    from lumaris_node.sandbox import netns  # needs Linux, and only for forwarding

    return await netns.connect(pid, port)
