"""Signed claims on an escrow that may be evidence for its other side.

A claim goes to the coordinator alone, so whoever is to dispute it has it from here. Kept are the
last claim of the buyer that was recorded, and the first of each party that enclosed a forgery: at
most three of an escrow, whatever is sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from lumaris_coordinator.store.port import Connection, all_rows


@dataclass(frozen=True)
class Kept:
    """A signed claim that may be evidence for the other side."""

    party: str
    taken: bool
    document: bytes
    at: int


def keep(
    connection: Connection,
    agreement_hash: str,
    party: str,
    document: bytes,
    *,
    taken: bool,
    now: int,
) -> None:
    """Keep the last claim of a party that was taken, or the first that was refused as forged."""
    connection.execute(
        "INSERT INTO escrow_claim (agreement_hash, party, taken, document, at)"
        " VALUES (?, ?, ?, ?, ?) ON CONFLICT (agreement_hash, party, taken)"
        " DO UPDATE SET document = excluded.document, at = excluded.at WHERE excluded.taken = 1",
        (agreement_hash, party, int(taken), document, now),
    )


def kept(connection: Connection, agreement_hash: str) -> list[Kept]:
    """The kept claims on an escrow: at most two of each party."""
    rows = all_rows(
        connection,
        "SELECT party, taken, document, at FROM escrow_claim WHERE agreement_hash = ?"
        " ORDER BY at, party, taken",
        (agreement_hash,),
    )
    return [
        Kept(str(party), bool(taken), bytes(document), int(at))
        for party, taken, document, at in rows
    ]
