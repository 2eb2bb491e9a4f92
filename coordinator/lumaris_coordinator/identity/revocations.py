"""Peers and certificates that the coordinator no longer vouches for, as signed numbered deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from lumaris_coordinator.events.outbox import emit
from lumaris_coordinator.identity import store
from lumaris_coordinator.store.port import Connection, all_rows, first
from lumaris_coordinator.webhooks import store as webhooks
from lumaris_protocol import codec
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import REVOCATIONS_PER_NOTICE_MAX
from lumaris_protocol.messages.notice import Revocations, Revoked

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context

# Below this no number is given any more: those of a time that a restore has forgotten.
FLOOR: Final = "revocation_floor"


class RevocationList:
    """Adds to the list and signs pages of it. Nothing is ever taken from it: a peer that is let in
    again gets a newer certificate, which the old entry does not cover."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def revoke(
        self, connection: Connection, wanted: Sequence[tuple[str, int]], *, reason: str
    ) -> dict[str, Any]:
        """An operation: revoke (peer, serial) each, serial 0 being the peer itself; {seq}.

        A revoked peer's tokens and webhooks end, and it gets no certificate or grant any more. What
        holds already stays revoked as it was. Raises LumarisError `not_found` for one that never
        registered.
        """
        now = self._context.now()
        for peer, serial in wanted:
            self._revoke_one(connection, peer, serial, reason, now)
        return {"seq": last(connection)}

    def _revoke_one(
        self, connection: Connection, peer: str, serial: int, reason: str, now: int
    ) -> None:
        row = first(connection, "SELECT owner, revoked_at FROM peer WHERE peer = ?", (peer,))
        if row is None:
            raise LumarisError("not_found", f"The peer {peer} never registered here.")
        owner, revoked_at = row
        known = serial and first(
            connection, "SELECT 1 FROM revocation WHERE peer = ? AND serial = ?", (peer, serial)
        )
        if revoked_at or known:
            return
        row = first(
            connection,
            "INSERT INTO revocation (seq, peer, serial, at, reason) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (peer, serial, at) DO NOTHING RETURNING seq",
            (last(connection) + 1, peer, serial, now, reason),
        )
        if serial == 0:
            connection.execute("UPDATE peer SET revoked_at = ? WHERE peer = ?", (now, peer))
            webhooks.disable_all(connection, peer, reason="revoked")
        store.end_tokens(connection, peer)
        parties = (peer, *((owner,) if owner else ()))
        body = {"peer": peer, "serial": serial, "reason": reason}
        emit(connection, "peer.revoked", ref=peer, parties=parties, body=body, now=now)

    async def reinstate(self, peer: str) -> None:
        """Let a revoked peer register again. Raises LumarisError `not_found`."""

        def operation(connection: Connection) -> bool:
            sql = "UPDATE peer SET revoked_at = 0 WHERE peer = ? AND revoked_at > 0"
            return connection.execute(sql, (peer,)).rowcount == 1

        if not await self._context.store.submit(operation):
            raise LumarisError("not_found", "The peer is not revoked.")

    async def page(self, after: int) -> bytes:
        """The signed revocations that follow number `after`; an empty one when there are none."""
        return await self._context.store.read(lambda connection: self._sign(connection, after))

    async def newest(self) -> bytes:
        """The last of them, as many as fit one document: what is passed on to everybody."""

        def look(connection: Connection) -> bytes:
            return self._sign(connection, max(0, last(connection) - REVOCATIONS_PER_NOTICE_MAX))

        return await self._context.store.read(look)

    async def publish(self) -> None:
        """Hand the newest to whoever passes notices on."""
        self._context.notices.publish(await self.newest())

    def _sign(self, connection: Connection, after: int) -> bytes:
        rows = all_rows(
            connection,
            "SELECT seq, peer, serial, at, reason FROM revocation WHERE seq > ?"
            " ORDER BY seq LIMIT ?",
            (after, REVOCATIONS_PER_NOTICE_MAX),
        )
        context = self._context
        message = Revocations(
            coordinator=context.peer,
            after=after,
            seq=rows[-1][0] if rows else after,
            revoked=tuple(
                Revoked(peer=peer, serial=serial, at=at, reason=reason)
                for _, peer, serial, at, reason in rows
            ),
            issued_at=context.now(),
        )
        return codec.sign(message, context.key, context.settings.network).data


def last(connection: Connection) -> int:
    """The number of the newest revocation; 0, or that of the last restore, when there is none."""
    row = first(
        connection,
        "SELECT coalesce((SELECT max(seq) FROM revocation),"
        " (SELECT CAST(value AS BIGINT) FROM setting WHERE name = ?), 0)",
        (FLOOR,),
    )
    return int(row[0]) if row else 0
