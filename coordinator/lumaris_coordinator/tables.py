"""The whole schema: the tables of every room, in the order in which they may name each other."""

from __future__ import annotations

from typing import Final

from lumaris_coordinator.disputes import tables as disputes
from lumaris_coordinator.escrow import tables as escrow
from lumaris_coordinator.events import tables as events
from lumaris_coordinator.identity import tables as identity
from lumaris_coordinator.ledger import tables as ledger
from lumaris_coordinator.money import tables as money
from lumaris_coordinator.receipts import tables as receipts
from lumaris_coordinator.store import tables as store
from lumaris_coordinator.webhooks import tables as webhooks

MIGRATIONS: Final = (
    *store.MIGRATIONS,
    *ledger.MIGRATIONS,
    *identity.MIGRATIONS,
    *escrow.MIGRATIONS,
    *receipts.MIGRATIONS,
    *disputes.MIGRATIONS,
    *events.MIGRATIONS,
    *webhooks.MIGRATIONS,
    *money.MIGRATIONS,
)
