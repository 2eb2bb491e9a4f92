"""Secures and muxes connections, and notices the dial-backs that we asked for."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import trio
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.transport.upgrader import TransportUpgrader


class DialBackSeen(Exception):  # noqa: N818 - no error: it was asked for
    """A peer that we asked has dialled us back and, as agreed, hung up after the handshake."""


class NotingUpgrader(TransportUpgrader):
    """Sets the event of a peer in `awaited` when its handshake arrives here."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.awaited: dict[ID, trio.Event] = {}
        self._asked_for: WeakSet[Any] = WeakSet()

    async def upgrade_security(
        self, raw_conn: Any, is_initiator: bool, peer_id: ID | None = None
    ) -> Any:
        """Secure a connection. A circuit proves nothing about our own port."""
        secured = await super().upgrade_security(raw_conn, is_initiator, peer_id)
        if not is_initiator and raw_conn.get_connection_type() == ConnectionType.DIRECT:
            arrived = self.awaited.get(secured.get_remote_peer())
            if arrived is not None:
                self._asked_for.add(secured)
                arrived.set()
        return secured

    async def upgrade_connection(self, conn: Any, peer_id: ID) -> Any:
        """Mux a connection. Raises DialBackSeen when it was only a dial-back."""
        try:
            return await super().upgrade_connection(conn, peer_id)
        except Exception as error:
            if conn in self._asked_for:
                raise DialBackSeen(str(peer_id)) from error
            raise
