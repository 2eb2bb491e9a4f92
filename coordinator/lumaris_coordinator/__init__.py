"""The coordinator: identities, escrow, settlement and the public log of receipts."""

from lumaris_coordinator.app import Coordinator, create_app
from lumaris_coordinator.config import Settings

__all__ = ["Coordinator", "Settings", "create_app"]
