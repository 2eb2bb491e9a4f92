"""The seller's side of one session.

The shell feeds it the buyer's envelopes (`receive`) and what happens to orders on this machine, and
carries out the effects. It enforces the two rules that keep the seller from working for nothing: an
order runs only under a grant, and work stops while the unpaid amount is at the agreed exposure.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from lumaris_protocol import agreements, ends, merkle, pricing
from lumaris_protocol.agreements import Contract
from lumaris_protocol.codec import Signed
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
from lumaris_protocol.errors import LumarisError, ViolationError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import (
    IDLE_S_MAX,
    INPUT_BYTES_MAX,
    ORDERS_QUEUED_MAX,
    PAY_WAIT_S,
)
from lumaris_protocol.machines.chain import ReceiveChain, SendChain, session_kinds
from lumaris_protocol.machines.reports import Reports
from lumaris_protocol.machines.tab import Tab
from lumaris_protocol.machines.table import Machine, Row, Table, late
from lumaris_protocol.machines.words import Kept, Words
from lumaris_protocol.messages.base import SessionMessage
from lumaris_protocol.messages.execution import (
    Acceptance,
    Cancel,
    Delivery,
    File,
    LogChunk,
    Meter,
    SessionOpen,
    SessionReady,
    Usage,
    WorkOrder,
    WorkState,
)
from lumaris_protocol.messages.payment import BUYER_CLOSES, Close, Voucher
from lumaris_protocol.paths import check_tree

_FACTS: Final = ("session_open", "work_order", "acceptance", "voucher", "cancel", "close")

SELLER_SESSION: Final = Table(
    "seller session",
    initial="agreed",
    final=("closed", "ended"),
    rows=(
        Row("agreed", "session_open", "open", "keep the grant; say ready"),
        Row("agreed", "work_order", "agreed", refusal="grant_invalid"),
        Row("agreed", "acceptance", "agreed", refusal="grant_invalid"),
        Row("agreed", "voucher", "agreed", refusal="grant_invalid"),
        Row("agreed", "cancel", "agreed", refusal="grant_invalid"),
        Row("agreed", "close", "closed", "co-sign nothing spent"),
        Row("agreed", "over", "ended", "give the capacity back"),
        Row("open", "session_open", "open", refusal="replayed"),
        Row("open", "work_order", "open", "queue it"),
        Row("open", "acceptance", "open", "put it on the tab, or strike it off"),
        Row("open", "voucher", "open", "keep it; open the gate when enough is paid"),
        Row("open", "cancel", "open", "stop the order"),
        Row("open", "close", "closed", "co-sign what is due, or name it; stop the orders"),
        Row("open", "over", "ended", "name what is due; settle"),
        *late(("closed", "ended"), _FACTS),
    ),
)

# Retries come soon after; the hash chain already refuses a replayed order of any age.
_KEYS_REMEMBERED: Final = 4096
# A buyer's own end and ours may cross; then it signs ours as well.
_CLOSES_MAX: Final = 2


class SellerSession:
    """One session, from the countersigned agreement to its end."""

    def __init__(self, contract: Contract, key: KeyPair, *, network: str) -> None:
        agreement = contract.agreement
        self.contract, self.terms = contract, agreement.terms
        self.machine = Machine(SELLER_SESSION)
        self.tab = Tab(cap_nanos=agreement.terms.cap_nanos)
        self.orders_accepted = 0
        self._network = network
        self._chain = SendChain(key, network=network, session=agreement.session, root=contract.hash)
        self._peer = ReceiveChain(
            agreement.buyer_session_key,
            network=network,
            session=agreement.session,
            root=contract.hash,
            kinds=session_kinds(*_FACTS),
        )
        self._last_n = 0
        self._live: dict[int, WorkOrder] = {}
        self._cancelled: set[int] = set()  # of these, by the buyer's own word
        self._reports = Reports(self._chain)
        self._delivered: dict[int, tuple[int, Kept]] = {}  # waiting for the buyer's word
        self._words = Words()
        self._orders = self._cancels = self._closes = 0
        self._keys_seen: deque[str] = deque(maxlen=_KEYS_REMEMBERED)
        self._metered: dict[int, int] = {}  # what the buyer was told of orders without an end
        self._asked_nanos = 0  # by meters and deliveries, since the session began
        self._used: dict[int, Usage] = {}  # by live orders that run
        self._now = 0.0
        self._gate_open = True
        self._unpaid, self._unpaid_at = False, 0.0
        self._metered_at = 0.0
        self._busy_at = 0.0
        self._written_off_nanos = 0
        self._our_close = b""
        self._our_total: int | None = None
        self._co_signed = False

    # --- what the buyer says ---

    def receive(self, data: bytes, *, now: float) -> list[Effect]:
        """Take one envelope of the buyer.

        Raises EnvelopeError, ViolationError, or RefusedError for a grant that does not cover the
        agreement; the shell then refuses, and ends the session.
        """
        signed = self._peer.open(data)
        message = signed.message
        if isinstance(message, SessionOpen) and self.machine.state == "agreed":
            self._check_grant(message, now)  # before the state moves: a bad one opens nothing
        over = self.machine.done
        self.machine.take(message.TYPE)
        self._busy_at = self._now = now
        self._count(message)
        if over:
            return self._on_late(message, signed)
        if isinstance(message, SessionOpen):
            return self._on_open(message, now)
        if isinstance(message, WorkOrder):
            return self._on_order(message, signed, now)
        if isinstance(message, Acceptance):
            return self._on_acceptance(message, now)
        if isinstance(message, Voucher):
            return self._on_voucher(message, signed, now)
        if isinstance(message, Cancel):
            return self._on_cancel(message)
        assert isinstance(message, Close)
        return self._on_close(message, data)

    def _count(self, message: SessionMessage) -> None:
        """Of what decides a dispute little can be shown, so nothing of it is said in vain."""
        if isinstance(message, WorkOrder):
            self._orders += 1  # also a late one, that its buyer may cancel
        elif isinstance(message, Cancel):
            self._cancels += 1
            if message.n in self._cancelled or self._cancels > self._orders:
                raise ViolationError("replayed", f"Order {message.n} was cancelled before.")
        elif isinstance(message, Close):
            self._closes += 1
            if self._closes > _CLOSES_MAX:
                raise ViolationError("replayed", "The buyer has ended the session before.")

    def _on_cancel(self, message: Cancel) -> list[Effect]:
        if message.n not in self._live:
            return []
        self._cancelled.add(message.n)
        return [StopOrder(message.n, "cancelled", message.grace_s)]

    def _on_late(self, message: SessionMessage, signed: Signed[SessionMessage]) -> list[Effect]:
        """A voucher that crossed our own end still counts, until the buyer signs that end too."""
        if self._co_signed:
            return []
        if isinstance(message, Acceptance) and message.accepted:
            amount, _ = self._delivered.pop(message.n, (0, Kept()))
            self._ask(message.n, amount)
        taken = self.tab.vouchered_nanos
        if isinstance(message, Voucher) and taken < message.total_nanos <= self._asked_nanos:
            self.tab.voucher(message.total_nanos)
            return [KeepVoucher(signed.data, message.total_nanos)]
        if isinstance(message, Close) and message.total_nanos == self._our_total:
            self._co_signed = True
            return [KeepCloses(signed.data, self._our_close, message.total_nanos)]
        return []

    def _check_grant(self, message: SessionOpen, now: float) -> None:
        agreement = self.contract.agreement
        agreements.open_grant(
            message.grant,
            self.contract,
            network=self._network,
            coordinator=agreement.coordinator,
            now=now,
        )

    def _on_open(self, message: SessionOpen, now: float) -> list[Effect]:
        self._metered_at = now
        ready = self._chain.sign(SessionReady, agreement_hash=self.contract.hash)
        return [KeepGrant(message.grant), Send(ready.data)]

    def _on_order(
        self, order: WorkOrder, signed: Signed[SessionMessage], now: float
    ) -> list[Effect]:
        if order.n != self._last_n + 1:
            raise ViolationError("out_of_sequence", f"Order {self._last_n + 1} is missing.")
        self._last_n = order.n
        self._reports.open(order.n, signed.hash, len(signed.data))
        reason = self._why_not(order, now)
        if reason:
            return self._reports.end(order.n, "error", reason, now=now)
        self._keys_seen.append(order.idempotency_key)
        self._live[order.n] = order
        return [RunOrder(order)]

    def _why_not(self, order: WorkOrder, now: float) -> str:
        resources = self.contract.agreement.resources
        if order.idempotency_key in self._keys_seen:
            return "replayed"
        if len(self._live) >= ORDERS_QUEUED_MAX:
            return "queue_full"
        if now >= self.contract.agreement.ends_at:
            return "lease_ended"
        if order.limits.memory_bytes > resources.memory_bytes:
            return "memory_short"
        if order.limits.disk_bytes > resources.disk_bytes:
            return "disk_short"
        try:
            check_tree(order.inputs, bytes_max=INPUT_BYTES_MAX)
        except LumarisError as error:
            return error.code
        if order.input_root != merkle.files_root(order.inputs):
            return "bad_input"
        if self._spent + self.terms.start_nanos > self.terms.cap_nanos:
            return "budget_exceeded"
        return ""

    def _on_acceptance(self, message: Acceptance, now: float) -> list[Effect]:
        found = self._delivered.pop(message.n, None)
        if found is None:
            raise ViolationError("out_of_sequence", f"Order {message.n} was not delivered.")
        amount, kept = found
        if message.accepted:
            # It knows of all that came before, and may refuse the rest of that later.
            before = sum(
                min(self.tab.paid_nanos(n), self._metered.get(n, 0))
                for n in self._delivered
                if n < message.n
            )
            self._words.accept(amount, message.total_nanos - before, kept=kept)
            self.orders_accepted += 1
            self._ask(message.n, amount)
            self.tab.finish(message.n, amount)
        else:
            self._strike(message.n)
        self._metered.pop(message.n, None)
        self._reports.forget(message.n)
        return [*self._gate(now), *self._bad_debt()]

    def _on_voucher(
        self, message: Voucher, signed: Signed[SessionMessage], now: float
    ) -> list[Effect]:
        if message.total_nanos > self._asked_nanos:
            # A gift that is claimed with the rest, and then denied: a delivery is paid only with
            # the word on it, and no word could be held against this.
            raise ViolationError("unasked")
        self.tab.voucher(message.total_nanos)
        return [KeepVoucher(signed.data, message.total_nanos), *self._gate(now)]

    def _on_close(self, message: Close, data: bytes) -> list[Effect]:
        stops: list[Effect] = [StopOrder(n, "cancelled") for n in self._live]
        for n in (*self._live, *self._delivered):
            self._strike(n)  # too late to be accepted
        total, due = message.total_nanos, self.tab.due_nanos
        if total > self.tab.vouchered_nanos or message.reason != BUYER_CLOSES:
            return [*stops, SessionOver("terms_changed")]
        # What is on its way sets the tabs apart; what that can be worth is the exposure.
        if due <= total <= due + self.terms.exposure_nanos:
            ours, self._co_signed = self._close(message.reason, total), True
            return [*stops, KeepCloses(data, ours, total), Send(ours), SessionOver("closed")]
        return [*stops, Send(self._close(message.reason, due)), SessionOver("closed")]

    # --- what happens here ---

    def preparing(self, n: int, missing: tuple[str, ...], *, now: float) -> list[Effect]:
        """The order needs these input hashes from the buyer."""
        return self._reports.say(n, "preparing", now=now, missing=missing)

    def progress(self, n: int, what: str, *, done: int, total: int, now: float) -> list[Effect]:
        """Preparing goes on: `done` of `total` of what is fetched or compiled."""
        return self._reports.say(n, "preparing", now=now, detail=what, done=done, total=total)

    def running(self, n: int, *, now: float) -> list[Effect]:
        """The sandbox runs: the bill begins with the start fee."""
        # The interval counts from the start, so a short order that fails is free.
        self._metered_at = now
        self.tab.accrue(n, pricing.order_nanos(self.terms, 0))
        return [*self._reports.say(n, "running", now=now), *self._gate(now)]

    def log(self, n: int, stream: str, offset: int, data: bytes) -> list[Effect]:
        """Output of the guest; at most LOG_CHUNK_BYTES_MAX at a time."""
        chunk = self._chain.sign(LogChunk, n=n, stream=stream, offset=offset, data=data)
        return [Send(chunk.data)]

    def accrue(self, n: int, usage: Usage, *, now: float) -> list[Effect]:
        """The order has run this long; meter it when due, freeze it at the exposure."""
        amount = pricing.order_nanos(self.terms, usage.wall_ms)
        self.tab.accrue(n, amount)
        self._now, self._used[n] = now, usage
        if self._spent > self.terms.cap_nanos or self.over_limit(n, usage):
            return [StopOrder(n, "budget_exceeded")]
        effects: list[Effect] = []
        waited = now - self._metered_at >= self.terms.voucher_interval_s
        if waited or 2 * self.tab.unpaid_nanos >= self.terms.exposure_nanos:
            self._ask(n, amount)
            self._metered_at, self._metered[n] = now, amount
            meter = self._chain.sign(Meter, n=n, amount_nanos=amount, usage=usage)
            effects.append(Send(meter.data))
        return [*effects, *self._gate(now)]

    def delivered(
        self,
        n: int,
        *,
        outputs: tuple[File, ...],
        stdout: File,
        stderr: File,
        usage: Usage,
        environment: str,
        now: float,
    ) -> list[Effect]:
        """The order succeeded and its outputs are hashed.

        More or longer file names than a delivery can carry make it `killed_output` instead.
        """
        if not self._reports.speaks_of(n):
            return []  # its end was said with that of the session
        amount = pricing.order_nanos(self.terms, usage.wall_ms)
        if self.over_limit(n, usage):
            return self.failed(n, "killed", "budget_exceeded", now=now, usage=usage)
        try:
            delivery = self._chain.sign(
                Delivery,
                n=n,
                order_hash=self._reports.order_hash(n),
                exit_status=0,
                outputs=outputs,
                output_root=merkle.files_root(outputs),
                stdout=stdout,
                stderr=stderr,
                usage=usage,
                amount_nanos=amount,
                environment=environment,
            )
        except ValueError:  # a guest chooses its file names
            return self.failed(n, "killed", "killed_output", now=now, usage=usage)
        self.tab.accrue(n, amount)
        del self._live[n]
        self._used.pop(n, None)
        self._delivered[n] = amount, self._words.kept
        self._reports.deliver(n, len(delivery.data))
        return [Send(delivery.data), *self._gate(now)]

    def failed(
        self,
        n: int,
        state: WorkState,
        reason: str,
        *,
        now: float,
        usage: Usage | None = None,
        exit_status: int | None = None,
        detail: str = "",
    ) -> list[Effect]:
        """The order ended without a delivery: its unpaid part is struck off.

        Unless the guest or the buyer ended it, what was vouchered for it is credit again. Of an
        order that was delivered nothing is said any more: two ends of one order are a fraud.
        """
        if n not in self._live:
            return []
        kept = state != "error" and self._is_kept(n, reason, usage or Usage())
        self._live.pop(n, None)
        self._strike(n, kept=kept)
        self._cancelled.discard(n)
        self._busy_at = now
        self._used.pop(n, None)
        event = self._reports.end(
            n, state, reason, now=now, usage=usage, exit_status=exit_status, detail=detail
        )
        return [*event, *self._gate(now), *self._bad_debt(by_us=not kept)]

    def _is_kept(self, n: int, reason: str, usage: Usage) -> bool:
        if reason == "cancelled":
            return n in self._cancelled
        limits, vouchered = self._live[n].limits, self.tab.vouchered_nanos
        return ends.is_kept(self.terms, limits, reason, usage, vouchered_nanos=vouchered)

    def state(self, n: int, state: WorkState, *, now: float) -> list[Effect]:
        """Tell the buyer a state that changes no money (paused, collecting)."""
        return self._reports.say(n, state, now=now)

    def tick(self, *, now: float) -> list[Effect]:
        """Time passed: unpaid, idle and finished sessions end; busy ones give a sign of life."""
        if self.machine.state != "open":
            return []
        self._now = now
        if self._live or self._delivered:
            self._busy_at = now
        if self._unpaid and now - self._unpaid_at > PAY_WAIT_S:
            return self.end("unpaid")
        if now > self.contract.agreement.ends_at:
            return self.end("lease_ended")
        if now - self._busy_at > IDLE_S_MAX:
            return self.end("idle")
        return self._reports.keep_alive(min(self._live), now=now) if self._live else []

    def end(self, reason: str, *, told: str = "") -> list[Effect]:
        """End the session from this side; live orders are stopped and told why: `told`, or what
        follows from the reason."""
        if self.machine.done:
            return []
        self.machine.take("over")
        told = told or ends.session_end(reason)
        stops: list[Effect] = [StopOrder(n, told) for n in self._live]
        for n in self._live:
            self._strike(n, kept=told in ends.BY_SESSION)
        close = Send(self._close(reason, self.tab.due_nanos))
        # Said here and now: nobody may be left to say it when the order has stopped.
        state: WorkState = "error" if told == "platform_error" else "killed"
        said = [
            effect
            for n, usage in self._used.items()
            if n in self._live
            for effect in self._reports.end(n, state, told, now=self._now, usage=usage)
        ]
        self._used.clear()
        return [*stops, close, *said, SessionOver(reason)]

    def over_limit(self, n: int, usage: Usage) -> bool:
        """Whether the order costs more than it may: asking for that would break a rule."""
        order = self._live.get(n)
        cost_max = (order.limits.cost_nanos if order is not None else 0) or self.terms.cap_nanos
        return pricing.order_nanos(self.terms, usage.wall_ms) > min(cost_max, self.terms.cap_nanos)

    def awaits_answer(self, n: int) -> bool:
        """Whether the buyer still has to accept or reject order `n`."""
        return n in self._delivered

    @property
    def awaits_close(self) -> bool:
        """Whether we ended it for less than was vouchered, and the buyer has yet to sign that."""
        ours = self._our_total
        return ours is not None and not self._co_signed and ours < self.tab.vouchered_nanos

    # --- inside ---

    def _ask(self, n: int, amount_nanos: int) -> None:
        self._asked_nanos += max(0, amount_nanos - self._metered.get(n, 0))

    def _strike(self, n: int, *, kept: bool = True) -> None:
        amount, metered = self.tab.amount_nanos(n), self._metered.pop(n, 0)
        paid = self.tab.strike(n, metered_nanos=metered if kept else 0)
        self._words.keep(paid, size_bytes=self._reports.size_bytes(n))
        self._written_off_nanos += max(0, amount - paid)

    def _bad_debt(self, *, by_us: bool = False) -> list[Effect]:
        """Work given away is bounded like work unpaid: by the exposure and what was vouchered."""
        if self._words.too_few:
            # Orders without an end run on under another lease; for these the buyer is gone.
            return self.end("lease_ended", told="buyer_lost")
        bound = self.terms.exposure_nanos + self.tab.vouchered_nanos
        if self.terms.exposure_nanos == 0 or self._written_off_nanos < bound:
            return []
        if by_us:
            return self.end("platform_error")
        return self.end("unpaid", told="buyer_lost")  # what runs may well be paid

    @property
    def _unanswered(self) -> Kept:
        """Of delivered orders without the buyer's word: what was paid for them while they ran."""
        paid = {n: min(self.tab.paid_nanos(n), self._metered.get(n, 0)) for n in self._delivered}
        sizes = [self._reports.size_bytes(n) for n, nanos in paid.items() if nanos]
        return Kept(sum(paid.values()), len(sizes), sum(sizes))

    @property
    def _spent(self) -> int:
        return self.tab.due_nanos + self.tab.unpaid_nanos

    def _close(self, reason: str, total_nanos: int) -> bytes:
        self._our_total = total_nanos
        self._our_close = self._chain.sign(
            Close,
            total_nanos=total_nanos,
            orders_accepted=self.orders_accepted,
            reason=reason,
        ).data
        return self._our_close

    def _gate(self, now: float) -> list[Effect]:
        unpaid = self.tab.unpaid_nanos >= self.terms.exposure_nanos
        if self.terms.exposure_nanos == 0:
            unpaid = False  # a free session has no exposure to reach
        if unpaid and not self._unpaid:
            self._unpaid_at = now
        self._unpaid = unpaid
        # Too much is paid and not answered: that can wait, all of it is paid.
        should_open = not unpaid and not self._words.is_full(self._unanswered)
        if should_open == self._gate_open:
            return []
        self._gate_open = should_open
        return [SetGate(should_open)]
