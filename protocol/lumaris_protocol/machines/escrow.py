"""The escrow of one grant, from the moment the buyer's money is held until it rests again."""

from __future__ import annotations

from typing import Final

from lumaris_protocol.machines.table import Row, Table

ESCROW: Final = Table(
    "escrow",
    initial="held",
    final=("settled", "expired"),
    rows=(
        Row("held", "seller_claim", "settled", "pay the voucher, return the rest"),
        Row("held", "both_closed", "settled", "pay the co-signed total, return the rest"),
        Row(
            "held", "buyer_claim", "claimed", "record the voucher; the seller may still claim more"
        ),
        Row("held", "window_ended", "expired", "return everything"),
        Row("claimed", "seller_claim", "settled", "pay the higher voucher, return the rest"),
        Row("claimed", "both_closed", "settled", "pay the co-signed total, return the rest"),
        Row("claimed", "buyer_claim", "claimed", "record the voucher when it is higher"),
        Row("claimed", "window_ended", "expired", "pay the recorded voucher, return the rest"),
        Row("settled", "seller_claim", "settled", refusal="already_settled"),
        Row("settled", "buyer_claim", "settled", refusal="already_settled"),
        Row("settled", "both_closed", "settled", refusal="already_settled"),
        Row("expired", "seller_claim", "expired", refusal="already_settled"),
        Row("expired", "buyer_claim", "expired", refusal="already_settled"),
        Row("expired", "both_closed", "expired", refusal="already_settled"),
    ),
)
