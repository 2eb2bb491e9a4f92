"""Both machines of a session, joined by frames in memory, on a clock that the test moves.

The seller runs one order at a time, as nodes do; the buyer accepts each delivery at once unless
told otherwise. Everything a shell would store or do is noted in plain lists for the checks.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from lumaris_protocol import effects as fx
from lumaris_protocol import frames
from lumaris_protocol.effects import Effect
from lumaris_protocol.frames import Kind
from lumaris_protocol.ids import digest
from lumaris_protocol.limits import ORDERS_QUEUED_MAX
from lumaris_protocol.machines.buyer import BuyerSession
from lumaris_protocol.machines.seller import SellerSession
from lumaris_protocol.messages.execution import File, Limits, Usage, WorkState
from lumaris_protocol.messages.negotiation import PriceTerms
from tests.protocol import parties as p


class Pair:
    """A buyer and a seller under one contract."""

    def __init__(self, terms: PriceTerms = p.TERMS, *, accepts: bool = True) -> None:
        self.contract = p.contract(terms)
        self.terms = terms
        self.grant = p.grant(self.contract).data
        self.now = float(p.NOW)
        self.buyer = BuyerSession(self.contract, p.BUYER_SESSION, network=p.NETWORK, now=self.now)
        self.seller = SellerSession(self.contract, p.SELLER_SESSION, network=p.NETWORK)
        self.accepts = accepts
        self.to_seller: deque[bytes] = deque()
        self.to_buyer: deque[bytes] = deque()
        self.buyer_did: list[Effect] = []
        self.seller_did: list[Effect] = []
        self.queue: list[int] = []
        self.running = 0
        self.wall_ms: dict[int, int] = {}
        self.gate_open = True
        self.log: dict[int, int] = {}
        self.jobs = 0
        self.hashes: dict[int, str] = {}

    # --- the wire ---

    def by_buyer(self, effects: list[Effect]) -> list[Effect]:
        """Carry out the buyer's effects."""
        for effect in effects:
            self.buyer_did.append(effect)
            if isinstance(effect, fx.Send):
                self.to_seller.append(effect.data)
            if isinstance(effect, fx.Delivered) and self.accepts:
                self.by_buyer(self.buyer.accept(effect.delivery.n, now=self.now))
        return effects

    def by_seller(self, effects: list[Effect]) -> list[Effect]:
        """Carry out the seller's effects; orders stop after that, as a shell is not re-entered."""
        stops = [effect for effect in effects if isinstance(effect, fx.StopOrder)]
        for effect in effects:
            self.seller_did.append(effect)
            match effect:
                case fx.Send(data):
                    self.to_buyer.append(data)
                case fx.RunOrder(order):
                    self.queue.append(order.n)
                case fx.SetGate(is_open):
                    self.gate_open = is_open
        for stop in stops:
            self.fail(stop.n, "killed", stop.reason)
        return effects

    def pump_to_seller(self) -> None:
        """Deliver the oldest message to the seller, as a frame."""
        data = _through_frames(self.to_seller.popleft())
        self.by_seller(self.seller.receive(data, now=self.now))

    def pump_to_buyer(self) -> None:
        """Deliver the oldest message to the buyer, as a frame."""
        data = _through_frames(self.to_buyer.popleft())
        self.by_buyer(self.buyer.receive(data, now=self.now))

    def pump(self) -> None:
        """Deliver everything, both ways, until nothing is on the way."""
        for _ in range(100_000):
            if self.to_seller:
                self.pump_to_seller()
            elif self.to_buyer:
                self.pump_to_buyer()
            else:
                return
        raise AssertionError("the two sides never stop talking")

    # --- what happens ---

    def open(self) -> Pair:
        """Bring the session to `open` on both sides."""
        self.by_buyer(self.buyer.open(self.grant))
        self.pump()
        return self

    def order(
        self,
        *,
        key: str = "",
        limits: Limits = p.LIMITS,
        inputs: tuple[File, ...] = (),
        command: tuple[str, ...] = ("true",),
    ) -> int:
        """The buyer orders a run; its number."""
        self.jobs += 1
        n, effects = self.buyer.order(
            job=p.id_of("job", str(self.jobs)),
            image=p.digest_of("image"),
            command=command,
            environment={},
            inputs=inputs,
            limits=limits,
            idempotency_key=key or p.id_of("job", f"key {self.jobs}"),
            now=self.now,
        )
        self.hashes[n] = next(digest(e.data) for e in effects if isinstance(e, fx.Send))
        self.by_buyer(effects)
        return n

    def about(self, n: int) -> dict[str, Any]:
        """What the seller names an order by: its number, and its hash if there is one."""
        return {"n": n, "order_hash": self.hashes.get(n, p.digest_of("no order"))}

    def start(self) -> int:
        """The seller starts its oldest queued order; its number."""
        self.running = self.queue.pop(0)
        self.wall_ms[self.running] = 0
        self.by_seller(self.seller.running(self.running, now=self.now))
        return self.running

    def pass_time(self, ms: int) -> None:
        """Time passes; a running order runs while the gate is open."""
        self.now += ms / 1000
        if self.running and self.gate_open:
            self.wall_ms[self.running] += ms
            usage = Usage(wall_ms=self.wall_ms[self.running])
            self.by_seller(self.seller.accrue(self.running, usage, now=self.now))

    def print(self, data: bytes) -> None:
        """The running order prints."""
        offset = self.log.get(self.running, 0)
        self.by_seller(self.seller.log(self.running, "stdout", offset, data))
        self.log[self.running] = offset + len(data)

    def deliver(self, *, outputs: tuple[File, ...] = (), wall_ms: int | None = None) -> int:
        """The running order succeeds; its number."""
        n, self.running = self.running, 0
        printed = self.log.get(n, 0)
        self.by_seller(
            self.seller.delivered(
                n,
                outputs=outputs,
                stdout=File(path="stdout", size_bytes=printed, sha256=p.digest_of("log")),
                stderr=p.file("stderr"),
                usage=Usage(wall_ms=self.wall_ms[n] if wall_ms is None else wall_ms),
                environment=p.digest_of("environment"),
                now=self.now,
            )
        )
        return n

    def fail(self, n: int, state: WorkState, reason: str) -> None:
        """An order ends without a delivery."""
        if n == self.running:
            self.running = 0
        elif n in self.queue:
            self.queue.remove(n)
        usage = Usage(wall_ms=self.wall_ms.get(n, 0))
        self.by_seller(self.seller.failed(n, state, reason, now=self.now, usage=usage))

    def run_one(self, ms: int = 100) -> int:
        """Order, run and deliver one order with the wire quiet between; its number."""
        n = self.order()
        self.pump()
        self.start()
        self.pass_time(ms)
        self.deliver()
        self.pump()
        return n

    # --- what it came to ---

    def over(self) -> tuple[str, str]:
        """The reasons for which the session ended: (buyer's, seller's)."""
        return _reason(self.buyer_did), _reason(self.seller_did)

    def stored(self) -> tuple[int, int]:
        """The highest voucher each side has stored: (buyer's, seller's)."""
        return _highest(self.buyer_did), _highest(self.seller_did)

    def check(self) -> None:
        """What holds at every moment, whatever was said."""
        paid, taken = self.stored()
        assert self.buyer.tab.vouchered_nanos == paid
        assert self.seller.tab.vouchered_nanos == taken
        assert taken <= paid <= self.terms.cap_nanos
        elapsed_s = self.now - p.NOW
        possible = self.terms.start_nanos * self.jobs + self.terms.rate_nanos_per_s * elapsed_s
        assert paid <= 1.01 * possible
        assert len(self.queue) <= ORDERS_QUEUED_MAX
        for did in (self.buyer_did, self.seller_did):
            _check_stored_before_sent(did)


def _check_stored_before_sent(did: list[Effect]) -> None:
    totals = [effect.total_nanos for effect in did if isinstance(effect, fx.KeepVoucher)]
    assert totals == sorted(set(totals)), "vouchers only rise"
    assert sum(isinstance(effect, fx.SessionOver) for effect in did) <= 1


def _through_frames(data: bytes) -> bytes:
    (frame,) = frames.Decoder().feed(frames.encode(Kind.ENVELOPE, data))
    return frame.body


def _reason(did: list[Effect]) -> str:
    return next((effect.reason for effect in did if isinstance(effect, fx.SessionOver)), "")


def _highest(did: list[Effect]) -> int:
    return max((e.total_nanos for e in did if isinstance(e, fx.KeepVoucher)), default=0)
