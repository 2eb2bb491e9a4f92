"""Rulings on disputes: pure rules over typed, signed evidence.

evidence  what is admitted, and the checks that each document passes first
work      what shown work is worth by its own agreement
case      what a ruling is made from; bonds and stakes
rules     one rule for each claim, and what it comes to with the money that is there
draw      the checker of a result
"""

from lumaris_protocol.rulings.case import (
    REFUNDS,
    Case,
    Decision,
    Finding,
    check_claim,
    check_opening,
    dispute_id,
    evidence_root,
    opener_bond,
    other_side,
    refund_max,
    refundable,
    side_of,
    stake_max,
)
from lumaris_protocol.rulings.draw import check_candidates, draw
from lumaris_protocol.rulings.evidence import ADMITTED, Dossier, Session, check_frame
from lumaris_protocol.rulings.rules import (
    check_due,
    decide,
    disputed_result,
    is_forged,
    price_of,
    proven,
    rule,
    split,
    withdrawn,
)

__all__ = (
    "ADMITTED",
    "REFUNDS",
    "Case",
    "Decision",
    "Dossier",
    "Finding",
    "Session",
    "check_candidates",
    "check_claim",
    "check_due",
    "check_frame",
    "check_opening",
    "decide",
    "dispute_id",
    "disputed_result",
    "draw",
    "evidence_root",
    "is_forged",
    "opener_bond",
    "other_side",
    "price_of",
    "proven",
    "refund_max",
    "refundable",
    "rule",
    "side_of",
    "split",
    "stake_max",
    "withdrawn",
)
