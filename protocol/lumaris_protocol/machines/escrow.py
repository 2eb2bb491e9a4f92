"""The escrow of one grant, from the moment the buyer's money is held until it rests again."""

from __future__ import annotations

from typing import Final

from lumaris_protocol.machines.table import Row, Table

_FINAL: Final = ("settled", "expired")
# What both parties may still send to an escrow whose money has come to rest.
_LATE: Final = ("seller_claim", "buyer_claim", "both_closed", "amended", "dispute_opened")


def _open(state: str, *, ended: str) -> tuple[Row, ...]:
    """The rows of a state in which nothing is disputed."""
    return (
        Row(state, "seller_claim", "settled", "pay the highest voucher, return the rest"),
        Row(state, "both_closed", "settled", "pay the co-signed total, return the rest"),
        Row(state, "buyer_claim", "claimed", "record the voucher when it is higher"),
        Row(state, "window_ended", "expired", ended),
        Row(state, "amended", state, "hold more, or for longer"),
        Row(state, "dispute_opened", "disputed", "pay the vouchered part, freeze the rest"),
        Row(state, "appeal_opened", state, refusal="not_offered"),
    )


ESCROW: Final = Table(
    "escrow",
    initial="held",
    final=_FINAL,
    rows=(
        *_open("held", ended="return everything"),
        *_open("claimed", ended="pay the recorded voucher, return the rest"),
        Row("disputed", "seller_claim", "disputed", "pay what the voucher adds at once"),
        Row("disputed", "both_closed", "disputed", "pay what the voucher adds at once"),
        Row("disputed", "buyer_claim", "disputed", "pay what the voucher adds at once"),
        Row("disputed", "dispute_opened", "disputed", "one more dispute; all must end"),
        Row("disputed", "window_ended", "disputed", "return what no dispute asks for"),
        Row("disputed", "ruled_in_part", "disputed", "pay the award; another dispute is open"),
        Row("disputed", "withdrawn_in_part", "disputed", "another dispute is open"),
        # The vouchers of a seller that was not heard yet stay good until the window ends, so
        # that a buyer's dispute with itself cannot settle the escrow under its seller.
        Row("disputed", "ruled", "claimed", "pay the award; the seller's claim or the window ends"),
        Row("disputed", "dispute_withdrawn", "claimed", "the window goes on"),
        Row("disputed", "amended", "disputed", refusal="in_dispute"),
        Row("disputed", "appeal_opened", "disputed", refusal="not_offered"),
        *(Row(state, fact, state, refusal="already_settled") for state in _FINAL for fact in _LATE),
        *(Row(state, "appeal_opened", state, refusal="not_offered") for state in _FINAL),
    ),
)
