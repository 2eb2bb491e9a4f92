"""Every message type by its wire name: what `wire.lock` and the golden vectors are made from."""

from __future__ import annotations

from typing import Final

from lumaris_protocol.messages import (
    advert,
    budget,
    challenge,
    demand,
    endpoint,
    execution,
    negotiation,
    payment,
    receipt,
    shard_map,
)
from lumaris_protocol.messages.base import Message

MESSAGES: Final[dict[str, type[Message]]] = {
    kind.TYPE: kind
    for kind in (
        advert.MembershipCertificate,
        advert.Advert,
        demand.Demand,
        challenge.Challenge,
        challenge.ChallengeAnswer,
        negotiation.QuoteRequest,
        negotiation.Quote,
        negotiation.Agreement,
        budget.Registration,
        budget.CreditRequest,
        budget.GrantRequest,
        budget.BudgetGrant,
        execution.SessionOpen,
        execution.SessionReady,
        execution.WorkOrder,
        execution.JobEvent,
        execution.LogChunk,
        execution.Meter,
        execution.Delivery,
        execution.Acceptance,
        execution.Cancel,
        payment.Voucher,
        payment.Close,
        payment.Settle,
        receipt.Receipt,
        shard_map.ShardMap,
        endpoint.Endpoint,
    )
}
