"""What is said to the coordinator about money that leaves the market."""

from __future__ import annotations

from typing import ClassVar

from lumaris_protocol.messages.base import Amount, Currency, Message, Name, Nonce, Peer, Time


class PayoutRequest(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A peer takes money out of its account; `nonce` makes a repeated request the same request."""

    TYPE: ClassVar[str] = "payout_request"
    peer: Peer
    coordinator: Peer
    adapter: Name
    amount_nanos: Amount
    currency: Currency
    nonce: Nonce
    issued_at: Time
