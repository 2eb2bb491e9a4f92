"""What a session machine asks its shell to do, in order. The machine itself never does it.

`Keep*` comes before the `Send` that depends on it: what is promised is on disk before it is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lumaris_protocol.messages.execution import Delivery, JobEvent, Usage, WorkOrder


@dataclass(frozen=True)
class Send:
    """Send this envelope to the other side."""

    data: bytes


@dataclass(frozen=True)
class KeepGrant:
    """Store the coordinator's grant: with it the session can be settled."""

    data: bytes


@dataclass(frozen=True)
class KeepVoucher:
    """Store the highest voucher."""

    data: bytes
    total_nanos: int


@dataclass(frozen=True)
class KeepCloses:
    """Store both sides' co-signed end (buyer's first); from now on a claim names its total."""

    by_buyer: bytes
    by_seller: bytes
    total_nanos: int


@dataclass(frozen=True)
class RunOrder:
    """Seller: put the order in the queue."""

    order: WorkOrder


@dataclass(frozen=True)
class StopOrder:
    """Seller: end an order, queued or running, with a reason code.

    A running guest is asked to end first, and killed after `grace_s`.
    """

    n: int
    reason: str
    grace_s: int = 0


@dataclass(frozen=True)
class SetGate:
    """Seller: let orders run, or freeze them because the exposure is reached."""

    open: bool


@dataclass(frozen=True)
class SessionReadied:
    """Buyer: the seller took the grant."""


@dataclass(frozen=True)
class OrderChanged:
    """Buyer: the seller reports a state of an order."""

    event: JobEvent


@dataclass(frozen=True)
class Metered:
    """Buyer: what an order has consumed so far, by the seller's word."""

    n: int
    usage: Usage


@dataclass(frozen=True)
class LogArrived:
    """Buyer: output of an order, in order and without gaps."""

    n: int
    stream: Literal["stdout", "stderr"]
    data: bytes


@dataclass(frozen=True)
class Delivered:
    """Buyer: fetch and check the outputs, then accept or reject."""

    delivery: Delivery


@dataclass(frozen=True)
class SessionOver:
    """Nothing more will happen in this session; settle it."""

    reason: str


Effect = (
    Send
    | KeepGrant
    | KeepVoucher
    | KeepCloses
    | RunOrder
    | StopOrder
    | SetGate
    | SessionReadied
    | OrderChanged
    | Metered
    | LogArrived
    | Delivered
    | SessionOver
)
