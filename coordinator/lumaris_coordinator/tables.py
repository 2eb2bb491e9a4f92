"""The whole schema: the tables of every room, in the order in which they may name each other."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.escrow import tables as escrow
from lumaris_coordinator.identity import tables as identity
from lumaris_coordinator.ledger import tables as ledger
from lumaris_coordinator.receipts import tables as receipts
from lumaris_coordinator.store import tables as store

MIGRATIONS: Final = (
    *store.MIGRATIONS,
    *ledger.MIGRATIONS,
    *identity.MIGRATIONS,
    *escrow.MIGRATIONS,
    *receipts.MIGRATIONS,
)
