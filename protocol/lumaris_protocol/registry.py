"""Every message type by its wire name: what `wire.lock` and the golden vectors are made from."""

from __future__ import annotations

from typing import Final

from lumaris_protocol.messages import (
    advert,
    budget,
    challenge,
    demand,
    dispute,
    endpoint,
    execution,
    identity,
    money,
    negotiation,
    notice,
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
        budget.AmendRequest,
        budget.BondRequest,
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
        payment.Amendment,
        payment.Settle,
        receipt.Receipt,
        dispute.DisputeOpen,
        dispute.DisputeEvidence,
        dispute.DisputeWithdraw,
        dispute.DisputeSplit,
        dispute.CheckerList,
        dispute.CheckerDraw,
        dispute.Ruling,
        shard_map.ShardMap,
        identity.PeerLink,
        identity.TlsRequest,
        notice.Revocations,
        notice.KeyList,
        notice.CheckpointNotice,
        money.PayoutRequest,
        endpoint.Endpoint,
    )
}
