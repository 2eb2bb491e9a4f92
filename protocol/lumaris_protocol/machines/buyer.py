"""The buyer's side of one session.

It signs orders and vouchers, and pays only for what can be true: never more than the agreed rate
over the time that really passed here, never above the cap, never for an order that failed. What it
vouchered for an order that the seller's platform then failed pays later orders, or comes back with
the co-signed end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from lumaris_protocol import ends, merkle
from lumaris_protocol.agreements import Contract
from lumaris_protocol.effects import (
    Delivered,
    Effect,
    KeepCloses,
    KeepVoucher,
    LogArrived,
    Metered,
    OrderChanged,
    Send,
    SessionOver,
    SessionReadied,
)
from lumaris_protocol.errors import LocalError, LumarisError, ViolationError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import (
    CLOCK_SKEW_S,
    GRACE_S_DEFAULT,
    IMAGE_S_MAX,
    LINK_DEAD_S,
    LINK_RESUME_S,
    NANOS_MAX,
    PAY_WAIT_S,
    PREPARE_S_MAX,
    SILENCE_S,
)
from lumaris_protocol.machines.chain import ReceiveChain, SendChain, session_kinds
from lumaris_protocol.machines.tab import Tab
from lumaris_protocol.machines.table import Machine, Row, Table, late
from lumaris_protocol.messages.base import SessionMessage
from lumaris_protocol.messages.execution import (
    Acceptance,
    Cancel,
    Delivery,
    File,
    JobEvent,
    Limits,
    LogChunk,
    Meter,
    SessionOpen,
    SessionReady,
    WorkOrder,
)
from lumaris_protocol.messages.payment import BUYER_CLOSES, Close, Voucher
from lumaris_protocol.paths import check_tree

_FACTS: Final = ("session_ready", "job_event", "log_chunk", "meter", "delivery", "close")

BUYER_SESSION: Final = Table(
    "buyer session",
    initial="granted",
    final=("closed", "ended"),
    rows=(
        Row("granted", "session_ready", "open", "orders may be sent"),
        Row("granted", "close", "ended", "the seller declined; nothing was spent"),
        Row("granted", "over", "ended", "nothing was spent"),
        Row("granted", "job_event", "granted", refusal="out_of_sequence"),
        Row("granted", "log_chunk", "granted", refusal="out_of_sequence"),
        Row("granted", "meter", "granted", refusal="out_of_sequence"),
        Row("granted", "delivery", "granted", refusal="out_of_sequence"),
        Row("open", "session_ready", "open", refusal="replayed"),
        Row("open", "job_event", "open", "note the order's state"),
        Row("open", "log_chunk", "open", "pass the output on"),
        Row("open", "meter", "open", "voucher what is plausible"),
        Row("open", "delivery", "open", "fetch, check, accept, voucher"),
        Row("open", "close_sent", "closing", "voucher the rest; wait for the seller's signature"),
        Row("open", "close", "ended", "the seller ends it: co-sign what it asks for"),
        Row("open", "over", "ended", "claim with our highest voucher"),
        Row("closing", "job_event", "closing", ""),
        Row("closing", "log_chunk", "closing", ""),
        Row("closing", "meter", "closing", ""),
        Row("closing", "delivery", "closing", "too late: not accepted, not paid"),
        Row("closing", "close", "closed", "co-sign the seller's total; settle at once"),
        Row("closing", "over", "ended", "claim with our highest voucher"),
        Row("closing", "session_ready", "closing", refusal="replayed"),
        *late(("closed", "ended"), _FACTS),
    ),
)

_TERMINAL: Final = ("failed", "killed", "error")
# An amount is checked against our own clock; both clocks tick within this part of each other.
_CLOCK_TOLERANCE: Final = 1.01
# A word of the seller may reach us this late, and the next one at once: a broken link is noticed
# and resumed within that. So what it says of beginnings and pauses is only so exact.
_LATE_S: Final = LINK_DEAD_S + LINK_RESUME_S
_PROGRESS_S: Final = 0.2  # between two words on how far a preparation is; others are passed over


@dataclass
class _Order:
    limits: Limits
    hash: str
    sent_at: float
    offsets: dict[str, int] = field(default_factory=lambda: {"stdout": 0, "stderr": 0})
    delivery: Delivery | None = None
    state: str = ""
    progress: tuple[str, int, int] = ("", 0, 0)
    progress_at: float = -math.inf
    running_at: float | None = None
    paused_at: float | None = None
    ended_at: float | None = None
    paused_s: float = 0.0  # for certain
    claimed_nanos: int = 0  # the most the seller asked for it
    metered_nanos: int = 0  # the part of that on the tab
    given_up: bool = False
    cancelled: bool = False

    def note_state(self, state: str, now: float) -> None:
        """The seller says that it is in this state."""
        if state == "running":
            if self.running_at is None:
                self.running_at = now
            self.paused_s += self._pause_s(now)
            self.paused_at = None
        elif state == "paused" and self.running_at is not None and self.paused_at is None:
            self.paused_at = now

    def ran_s(self, now: float, *, since: float) -> float:
        """How long it can have run after `since`, by what was heard until `now`."""
        if self.running_at is None:
            return 0.0
        end = now if self.ended_at is None else self.ended_at
        began = max(self.sent_at, self.running_at - _LATE_S, since)
        return max(0.0, end - began - self.paused_s - self._pause_s(end))

    def _pause_s(self, now: float) -> float:
        return 0.0 if self.paused_at is None else max(0.0, now - self.paused_at - _LATE_S)


class BuyerSession:
    """One session, from the grant to its end."""

    def __init__(self, contract: Contract, key: KeyPair, *, network: str, now: float) -> None:
        agreement = contract.agreement
        self.contract, self.terms = contract, agreement.terms
        self.machine = Machine(BUYER_SESSION)
        self.tab = Tab(cap_nanos=agreement.terms.cap_nanos)
        self.orders_accepted = 0
        self.costs: dict[int, int] = {}  # of ended orders; the shell takes them out
        self._chain = SendChain(key, network=network, session=agreement.session, root=contract.hash)
        self._peer = ReceiveChain(
            agreement.seller_session_key,
            network=network,
            session=agreement.session,
            root=contract.hash,
            kinds=session_kinds(*_FACTS),
        )
        self._opened_at = self._heard_at = self._head_at = now
        self._lease_s = agreement.ends_at - agreement.issued_at
        self._orders_sent = 0
        self._live: dict[int, _Order] = {}
        # How long the ended orders can have run, one at a time, and when the last of them ended.
        self._ran_s, self._ran_until = 0.0, now
        self._accepted_nanos = 0
        self._our_close, self._our_total = b"", 0
        self._closes_heard = 0

    @property
    def live(self) -> int:
        """How many orders have no end yet."""
        return len(self._live)

    # --- what we want ---

    def open(self, grant: bytes) -> list[Effect]:
        """Begin: hand over the coordinator's grant."""
        opening = self._chain.sign(SessionOpen, agreement_hash=self.contract.hash, grant=grant)
        return [Send(opening.data)]

    def order(
        self,
        *,
        job: str,
        image: str,
        command: tuple[str, ...],
        environment: dict[str, str],
        inputs: tuple[File, ...],
        limits: Limits,
        idempotency_key: str,
        now: float,
        image_source: str = "",
        stdin: bool = False,
    ) -> tuple[int, list[Effect]]:
        """Order a run; its number in this session and what to send."""
        if self.machine.state != "open":
            raise LocalError("invalid_transition", f"The session is {self.machine.state}.")
        n = self._orders_sent + 1
        order = self._chain.sign(
            WorkOrder,
            n=n,
            job=job,
            image=image,
            image_source=image_source,
            stdin=stdin,
            command=command,
            environment=environment,
            inputs=inputs,
            input_root=merkle.files_root(inputs),
            limits=limits,
            idempotency_key=idempotency_key,
        )
        self._orders_sent = n  # only now: an order that cannot be signed uses up no number
        if not self._live:
            self._heard_at = self._head_at = now  # silence counts while something is expected
        self._live[n] = _Order(limits, order.hash, now)
        return n, [Send(order.data)]

    def accept(self, n: int, *, now: float) -> list[Effect]:
        """The outputs are here and match: owe the amount, voucher when due.

        Nothing is sent or owed when the seller took the order back or ended the session meanwhile.
        """
        if n not in self._live or self.machine.state != "open":
            return []
        order = self._live[n]
        assert order.delivery is not None, "only a delivered order can be accepted"
        del self._live[n]
        self.orders_accepted += 1
        self.tab.finish(n, order.delivery.amount_nanos)
        self.costs[n] = order.delivery.amount_nanos
        self._accepted_nanos += order.delivery.amount_nanos
        acceptance = self._chain.sign(
            Acceptance, n=n, accepted=True, total_nanos=self._due_delivered
        )
        effects: list[Effect] = [Send(acceptance.data)]
        due = self.tab.delivered_unpaid_nanos
        # Few signatures while orders stream through, none owed while the session idles.
        if not self._live or 4 * due >= self.terms.exposure_nanos:
            effects += self._voucher(self._due_delivered)
        return effects

    def reject(self, n: int, reason: str) -> list[Effect]:
        """The delivery fails a check: it is not owed."""
        if n not in self._live or self.machine.state != "open":
            return []
        del self._live[n]
        self.costs[n] = self.tab.strike(n)
        rejection = self._chain.sign(
            Acceptance, n=n, accepted=False, reason=reason, total_nanos=self._due_delivered
        )
        return [Send(rejection.data)]

    def cancel(self, n: int, *, grace_s: int = 0) -> list[Effect]:
        """Ask the seller to stop an order; its guest may end by itself within the grace."""
        if n not in self._live or self.machine.state != "open" or self._live[n].cancelled:
            return []  # it was asked for: what is said twice is refused
        self._live[n].cancelled = True
        return [Send(self._chain.sign(Cancel, n=n, grace_s=grace_s).data)]

    def give_up(self, n: int) -> int:
        """Wait for an order no longer; what it cost. The seller gets nothing more for it."""
        if n in self._live:
            self._live[n].given_up = True
        return self.tab.strike(n)

    def close(self) -> list[Effect]:
        """End the session: voucher what was accepted and propose the co-signed end."""
        if self.machine.state != "open":
            return []
        effects = self._voucher(self._due_delivered)
        self.machine.take("close_sent")
        self._our_total = self.tab.due_nanos
        self._our_close = self._close_message(BUYER_CLOSES, self._our_total)
        return [*effects, Send(self._our_close)]

    def lost(self, reason: str) -> list[Effect]:
        """The seller is gone or broke the rules: no more messages in this session."""
        if self.machine.done:
            return []
        self.machine.take("over")
        return [SessionOver(reason)]

    # --- what the seller says ---

    def receive(self, data: bytes, *, now: float) -> list[Effect]:
        """Take one envelope of the seller.

        Raises EnvelopeError or ViolationError; the shell then calls `lost`.
        """
        message = self._peer.open(data).message
        self._heard_at = now
        heads = min(self._live, default=0)
        effects = self._take(message, data, now)
        if min(self._live, default=0) != heads:
            self._head_at = now
        return effects

    def tick(self, *, now: float) -> list[Effect]:
        """Time passed: a seller that says nothing, or whose order overruns, is given up on.

        A seller repeats the state of its orders every few seconds, so silence means it is gone.
        """
        if self.machine.done or not self._live:
            return []
        head = self._live[min(self._live)]
        silent = now - self._heard_at > SILENCE_S
        # An image may be fetched, and then compiled or unpacked, before the inputs are staged.
        prepare_s = 2 * IMAGE_S_MAX + PREPARE_S_MAX
        allowed_s = prepare_s + head.limits.wall_s + PAY_WAIT_S + CLOCK_SKEW_S
        over = now - self._opened_at > self._lease_s + CLOCK_SKEW_S
        if silent or over or now - self._head_at > allowed_s:
            return self.lost("lease_ended" if over else "timeout")
        return []

    def _take(self, message: SessionMessage, data: bytes, now: float) -> list[Effect]:
        state, over = self.machine.state, self.machine.done
        self.machine.take(message.TYPE)
        if isinstance(message, Close):
            self._closes_heard += 1
            if self._closes_heard > 1:
                raise ViolationError("replayed", "The seller has ended the session before.")
        if over:
            return []
        if isinstance(message, SessionReady):
            return [SessionReadied()]
        if isinstance(message, Close):
            return self._on_close(message, data, closing=state == "closing")
        if isinstance(message, JobEvent):
            return self._on_event(message, now)
        if isinstance(message, LogChunk):
            return self._on_log(message)
        if isinstance(message, Meter):
            return self._on_meter(message, now)
        assert isinstance(message, Delivery)
        return self._on_delivery(message, now)

    def _on_event(self, message: JobEvent, now: float) -> list[Effect]:
        order = self._live.get(message.n)
        if order is None:
            if ends.is_end(message) and message.n <= self._orders_sent:
                # Where few can be shown, another one would hide the first.
                raise ViolationError("replayed", f"Order {message.n} has ended before.")
            return []
        _check_order(order, message)
        repeated = message.state == order.state and not message.missing
        order.state = message.state
        order.note_state(message.state, now)
        progress = message.detail, message.done, message.total
        if repeated:
            early = now - order.progress_at < _PROGRESS_S
            if early or progress in (("", 0, 0), order.progress):
                return []  # a sign of life
        order.progress, order.progress_at = progress, now
        if message.state in _TERMINAL:
            self._count_ended(order, now)
            del self._live[message.n]
            kept = NANOS_MAX if self._is_kept(order, message) else 0
            self.costs[message.n] = self.tab.strike(message.n, metered_nanos=kept)
        return [OrderChanged(message)]

    def _is_kept(self, order: _Order, end: JobEvent) -> bool:
        """Whether what was vouchered stays with the seller; else it is credit."""
        if end.state == "error" or end.reason == "cancelled":
            return end.state != "error" and order.cancelled
        vouchered = self.tab.vouchered_nanos
        return ends.is_kept(
            self.terms, order.limits, end.reason, end.usage, vouchered_nanos=vouchered
        )

    def _on_log(self, message: LogChunk) -> list[Effect]:
        order = self._live.get(message.n)
        if order is None:
            return []
        if message.offset != order.offsets[message.stream]:
            raise ViolationError("out_of_sequence", "A part of the log is missing.")
        order.offsets[message.stream] += len(message.data)
        if sum(order.offsets.values()) > order.limits.log_bytes:
            raise ViolationError("oversize", "The log is longer than the order allows.")
        return [LogArrived(message.n, message.stream, message.data)]

    def _on_meter(self, message: Meter, now: float) -> list[Effect]:
        if message.n not in self._live or self.machine.state != "open":
            return []
        self._check_amount(message.n, message.amount_nanos, now)
        order = self._live[message.n]
        order.metered_nanos = order.claimed_nanos
        if order.given_up:
            return []
        self.tab.accrue(message.n, message.amount_nanos)
        vouchers = self._voucher(self.tab.vouchered_nanos + self.tab.unpaid_nanos)
        return [Metered(message.n, message.usage), *vouchers]

    def _on_delivery(self, message: Delivery, now: float) -> list[Effect]:
        order = self._live.get(message.n)
        if order is None or self.machine.state != "open":
            return []
        if order.delivery is not None:
            raise ViolationError("replayed", f"Order {message.n} was delivered before.")
        _check_order(order, message)
        self._check_amount(message.n, message.amount_nanos, now)
        if message.output_root != merkle.files_root(message.outputs) or message.exit_status != 0:
            raise ViolationError("output_mismatch", "The delivery contradicts itself.")
        logged = (message.stdout.size_bytes, message.stderr.size_bytes)
        if logged != (order.offsets["stdout"], order.offsets["stderr"]):
            raise ViolationError("output_mismatch", "The delivered log is not the one sent.")
        if sum(file.size_bytes for file in message.outputs) > order.limits.disk_bytes:
            raise ViolationError("oversize", "The outputs are larger than the order allows.")
        try:
            check_tree(message.outputs, bytes_max=order.limits.disk_bytes)
        except LumarisError as error:
            raise ViolationError("output_mismatch", error.message) from None
        order.delivery = message
        self._count_ended(order, now)
        return [Delivered(message)]

    def _on_close(self, message: Close, data: bytes, *, closing: bool) -> list[Effect]:
        total = message.total_nanos
        if not self._can_close_with(total):
            return [SessionOver("terms_changed" if closing else message.reason)]
        self.tab.give_back(total)
        if closing and total == self._our_total:
            return [KeepCloses(self._our_close, data, total), SessionOver("closed")]
        # The seller's reckoning: taking it is no word of ours on what we owed, so that we may
        # still dispute what it took.
        reason = "lease_ended" if message.reason == BUYER_CLOSES else message.reason
        ours = self._close_message(reason, total)
        over = SessionOver("closed" if closing else message.reason)
        return [KeepCloses(ours, data, total), Send(ours), over]

    # --- inside ---

    @property
    def _due_delivered(self) -> int:
        """Everything that must be vouchered for accepted orders."""
        return self.tab.due_nanos + self.tab.delivered_unpaid_nanos

    def _can_close_with(self, total_nanos: int) -> bool:
        """No more than was vouchered; and no less than was accepted and vouchered.

        A seller that asks for less has not heard of that yet, and must not lose by it.
        """
        accepted = self._accepted_nanos - self.tab.delivered_unpaid_nanos
        return accepted <= total_nanos <= self.tab.vouchered_nanos

    def _check_amount(self, n: int, amount_nanos: int, now: float) -> None:
        """Orders of a session run one at a time, so time bounds each order and their sum."""
        rate, start = self.terms.rate_nanos_per_s * _CLOCK_TOLERANCE, self.terms.start_nanos
        order = self._live[n]
        if order.running_at is None:
            raise ViolationError("out_of_sequence", f"Order {n} costs before it runs.")
        ran_s = min(order.ran_s(now, since=-math.inf), order.limits.wall_s + GRACE_S_DEFAULT)
        order_max = start + rate * ran_s
        session_max = start * self._orders_sent + rate * self._session_ran_s(now)
        order.claimed_nanos = max(order.claimed_nanos, amount_nanos)
        # Deliveries that wait for our word are not on the tab yet, but their time has passed.
        waiting = sum(live.claimed_nanos - live.metered_nanos for live in self._live.values())
        owed = self.tab.vouchered_nanos + self.tab.unpaid_nanos + waiting
        if amount_nanos > order_max or owed > session_max:
            raise ViolationError("overcharged")
        if amount_nanos > (order.limits.cost_nanos or self.terms.cap_nanos):
            raise ViolationError("over_cap")

    def _session_ran_s(self, now: float) -> float:
        """How long its orders can have run together, one at a time."""
        going = [live for live in self._live.values() if live.ended_at is None]
        return self._ran_s + max(
            (live.ran_s(now, since=self._ran_until) for live in going), default=0
        )

    def _count_ended(self, order: _Order, now: float) -> None:
        if order.ended_at is None and order.running_at is not None:
            order.ended_at = now
            self._ran_s += order.ran_s(now, since=self._ran_until)
            self._ran_until = now

    def _voucher(self, total_nanos: int) -> list[Effect]:
        total = min(total_nanos, self.terms.cap_nanos)
        if total <= self.tab.vouchered_nanos:
            return []
        self.tab.voucher(total)
        voucher = self._chain.sign(Voucher, total_nanos=total)
        return [KeepVoucher(voucher.data, total), Send(voucher.data)]

    def _close_message(self, reason: str, total_nanos: int) -> bytes:
        return self._chain.sign(
            Close,
            total_nanos=total_nanos,
            orders_accepted=self.orders_accepted,
            reason=reason,
        ).data


def _check_order(order: _Order, message: JobEvent | Delivery) -> None:
    if message.order_hash != order.hash:
        raise ViolationError("broken_chain", f"Another order of the number {message.n} is named.")
