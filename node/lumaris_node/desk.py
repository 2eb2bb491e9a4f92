"""The quote desk's shell: one stream of `/lumaris/negotiate/1` for a request and its agreement."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import trio

from lumaris_node.egress import policy
from lumaris_node.store import Store
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.tasks import StrangerLog
from lumaris_overlay.validate import refuse_revoked
from lumaris_protocol import agreements, codec, envelope
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import CLOCK_SKEW_S, QUOTE_HOLD_S_MAX, REPLY_BY_S_MAX
from lumaris_protocol.machines.desk import GRANT_WAIT_S, Hold, QuoteDesk
from lumaris_protocol.messages.advert import Advert
from lumaris_protocol.messages.negotiation import Agreement, Quote, QuoteRequest
from lumaris_protocol.revocations import RevokedSet

log = logging.getLogger(__name__)

# A lease that is over gives its capacity back within milliseconds, when its sandbox ends at once.
_ENDING_S_MAX = 0.5


@dataclass(frozen=True)
class Terms:
    """The coordinator whose grants this node takes, and its fee."""

    network: str
    coordinator: str
    fee_bps: int
    keys: Set[str] = frozenset()  # every key of the coordinator that counts; empty: that one

    @property
    def coordinators(self) -> Set[str]:
        """What grants and certificates may be signed with."""
        return self.keys or frozenset((self.coordinator,))


class Desk:
    """Negotiates with buyers. `changed` is called whenever free capacity changes.

    `egress` are the owner's patterns of what jobs may connect to.
    """

    def __init__(
        self,
        quotes: QuoteDesk,
        key: KeyPair,
        terms: Terms,
        *,
        store: Store,
        advert: Callable[[], Signed[Advert]],
        clock: Callable[[], float],
        changed: Callable[[], None],
        egress: Sequence[str] = (),
        revoked: RevokedSet | None = None,
    ) -> None:
        self.quotes = quotes
        self._key, self._terms, self._store = key, terms, store
        self._advert, self._clock, self._changed = advert, clock, changed
        self._egress = egress
        self._revoked = revoked if revoked is not None else RevokedSet()
        self._session_keys: dict[str, KeyPair] = {}  # by quote hash, for live holds
        self._ending: set[str] = set()  # quote hashes of sessions that are over
        self._released = trio.Event()
        self._strangers = StrangerLog(log)
        self.counts: dict[str, int] = {}  # how requests ended, for "why do no jobs come"

    async def serve(self, stream: OverlayStream) -> None:
        """One negotiation. Every refusal is told to the buyer and counted."""
        framed = FramedStream(stream)
        try:
            with trio.fail_after(REPLY_BY_S_MAX):
                hold = await self._quote(framed, stream.peer)
            try:
                with trio.fail_after(QUOTE_HOLD_S_MAX):
                    agreed = await self._agree(framed, hold)
                self._count("agreed" if agreed else "declined")
                await self._while_interested(framed, hold)
            finally:
                self._drop_offer(hold)
        except LumarisError as error:
            self._count(error.code)
            self._strangers.note(stream.peer, error.code, error.message)
            await framed.refuse(error)
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
            self._count("lapsed")
        except Exception:
            log.exception("negotiation broke peer=%s", stream.peer)
            self._count("internal")
            await framed.refuse(LumarisError("internal"))
        finally:
            await framed.aclose()

    def session_key(self, hold: Hold) -> KeyPair:
        """The key this node signs with in the session of a hold."""
        return self._session_keys[hold.quote.hash]

    async def _while_interested(self, framed: FramedStream, hold: Hold) -> None:
        """The buyer keeps this stream open until its session is; it closes when no grant comes."""
        with trio.move_on_after(GRANT_WAIT_S):
            while hold.machine.state == "agreed" and await framed.receive() is not None:
                pass

    def _drop_offer(self, hold: Hold) -> None:
        """Without the buyer's stream, what never became a session is free again."""
        if hold.machine.state in ("offered", "agreed"):
            hold.until = 0.0
            self.expire()

    def find_contract(self, session: str) -> Hold:
        """The agreed hold of a session. Raises RefusedError `quote_unknown`."""
        for hold in self.quotes.holds:
            if hold.contract is not None and hold.contract.agreement.session == session:
                return hold
        raise RefusedError("quote_unknown", "No agreement waits for this session.")

    def ending(self, hold: Hold) -> None:
        """A session is over, and will soon be released."""
        self._ending.add(hold.quote.hash)

    def release(self, hold: Hold) -> None:
        """A session is over, and nothing of it runs."""
        self.quotes.release(hold)
        self._ending.discard(hold.quote.hash)
        self._released.set()
        self._released = trio.Event()
        self._session_keys.pop(hold.quote.hash, None)
        self._changed()

    def expire(self) -> None:
        """Let lapsed holds go; called every second."""
        before = len(self.quotes.holds)
        self.quotes.expire(self._clock())
        live = {hold.quote.hash for hold in self.quotes.holds}
        self._session_keys = {name: key for name, key in self._session_keys.items() if name in live}
        if len(live) != before:
            self._changed()

    async def _quote(self, framed: FramedStream, peer: str) -> Hold:
        data = await framed.expect(Kind.ENVELOPE)
        now, network = self._clock(), self._terms.network
        request = codec.open_signed(data, QuoteRequest, network=network, signer=peer)
        message = request.message
        if message.seller != self._key.peer_id or message.buyer != peer:
            raise RefusedError("wrong_domain", "The request names other parties.")
        codec.check_times(
            issued_at=message.issued_at, expires_at=message.expires_at, now=now, what="request"
        )
        if message.expires_at > now + REPLY_BY_S_MAX + CLOCK_SKEW_S:
            raise RefusedError("malformed", "The request asks to be remembered too long.")
        certificate = agreements.open_certificate(
            message.certificate,
            network=network,
            coordinators=self._terms.coordinators,
            peer=peer,
            role="buyer",
            now=now,
        )
        refuse_revoked(self._revoked, certificate.message)
        self._check_egress(message.requirements.egress)
        session_key = KeyPair(os.urandom(32))
        offer = await self._offer(request, session_key)
        quote = codec.sign(offer, self._key, network)
        hold = self.quotes.hold(request, quote)
        self._session_keys[quote.hash] = session_key
        self._changed()
        await framed.send(Kind.ENVELOPE, quote.data)
        return hold

    async def _offer(self, request: Signed[QuoteRequest], session_key: KeyPair) -> Quote:
        """A buyer asks again as soon as its session is over; the sandbox is just being ended."""
        with trio.move_on_after(_ENDING_S_MAX):
            while True:
                try:
                    return self._offer_now(request, session_key)
                except RefusedError as error:
                    if error.code != "no_capacity" or not self._ending:
                        raise
                await self._released.wait()
        return self._offer_now(request, session_key)

    def _offer_now(self, request: Signed[QuoteRequest], session_key: KeyPair) -> Quote:
        return self.quotes.offer(
            request, self._advert(), seller_session_key=session_key.peer_id, now=self._clock()
        )

    def _check_egress(self, rules: Sequence[str]) -> None:
        for rule in rules:
            if not policy.covers(self._egress, rule):
                raise RefusedError("egress_refused", f"Jobs here may not connect to {rule}.")

    async def _agree(self, framed: FramedStream, hold: Hold) -> bool:
        """Whether the buyer took the quote. Raises LumarisError for what is no agreement."""
        frame = await framed.receive()
        if frame is None:
            return False
        buyer, network = hold.quote.message.buyer, self._terms.network
        signed = codec.open_signed(frame.body, Agreement, network=network, signer=buyer)
        found = self.quotes.find_quote(signed.message, now=self._clock())
        if found is not hold:
            raise RefusedError("quote_unknown", "The agreement names another quote.")
        self._check_terms(signed.message)
        ours = envelope.seal(
            self._key, network, Agreement.TYPE, envelope.decode(signed.data).payload
        )
        contract = agreements.join(signed.data, ours, network=network)
        await self._countersign(framed, hold, contract)
        return True

    async def _countersign(self, framed: FramedStream, hold: Hold, contract: Contract) -> None:
        """Store, then say: what we signed must survive us."""
        self.quotes.agree(hold, contract, now=self._clock())
        await self._store.add_session(contract, now=self._clock())
        await framed.send(Kind.ENVELOPE, contract.by_seller)

    def _check_terms(self, agreement: Agreement) -> None:
        terms = self._terms
        codec.check_times(
            issued_at=agreement.issued_at,
            expires_at=agreement.ends_at,
            now=self._clock(),
            what="agreement",
        )
        if agreement.coordinator not in terms.coordinators or agreement.fee_bps != terms.fee_bps:
            raise RefusedError("terms_changed", "The agreement names another coordinator or fee.")

    def _count(self, outcome: str) -> None:
        self.counts[outcome] = self.counts.get(outcome, 0) + 1
