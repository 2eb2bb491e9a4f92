"""A dispute, from its opening until its money rests.

Appeals and drawn panels have their place here and are refused: no ruling can be appealed yet.
"""

from __future__ import annotations

from typing import Final

from lumaris_protocol.machines.table import Row, Table

_LATER: Final = ("appeal", "panel")
_OVER: Final = ("evidence", "draw", "decide", "agree", "withdraw")


def _waiting(state: str, *, after_evidence: str) -> tuple[Row, ...]:
    return (
        Row(state, "evidence", after_evidence, "keep the bundle; end early when both are done"),
        Row(state, "draw", "checking", "name a checker, or the next one for a silent one"),
        Row(state, "decide", "ruled", "sign the ruling that follows from what is there"),
        Row(state, "agree", "ruled", "sign the split that both parties signed"),
        Row(state, "withdraw", "withdrawn", "pay vouchers only; bonds as the rules say"),
        *(Row(state, fact, state, refusal="not_offered") for fact in _LATER),
    )


def _over(state: str) -> tuple[Row, ...]:
    return (
        *(Row(state, fact, state, refusal="dispute_closed") for fact in _OVER),
        *(Row(state, fact, state, refusal="not_offered") for fact in _LATER),
    )


DISPUTE: Final = Table(
    "dispute",
    initial="opened",
    final=("settled", "withdrawn"),
    rows=(
        *_waiting("opened", after_evidence="evidence"),
        *_waiting("evidence", after_evidence="evidence"),
        *_waiting("checking", after_evidence="checking"),
        Row("ruled", "pay", "settled", "move the money and log the ruling"),
        *_over("ruled"),
        *_over("settled"),
        *_over("withdrawn"),
    ),
)
OPEN: Final = frozenset(("opened", "evidence", "checking"))
