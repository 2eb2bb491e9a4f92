"""What an owner may do with its webhooks."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lumaris_coordinator.bounds import WEBHOOKS_MAX, WEBHOOKS_PER_PRINCIPAL_MAX
from lumaris_coordinator.events import outbox
from lumaris_coordinator.events.retention import check_cursor
from lumaris_coordinator.sealing import Sealer
from lumaris_coordinator.store.port import Connection
from lumaris_coordinator.webhooks import signing, store
from lumaris_coordinator.webhooks.outgoing import check_url
from lumaris_coordinator.webhooks.store import Webhook
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import ID_RANDOM_BYTES, make_id

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context
    from lumaris_coordinator.identity.service import Caller


class Webhooks:
    """Endpoints of the callers. What is not one's own is not found."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sealer = Sealer(context.keys.first.seed)

    def check(self, url: str, kinds: Sequence[str]) -> None:
        """Raises LumarisError `unsafe_url`, or `malformed` for a kind of event that is none."""
        check_url(url, loopback=self._context.settings.webhooks_to_loopback)
        unknown = sorted(set(kinds) - outbox.KINDS)
        if unknown:
            raise LumarisError("malformed", f"There are no events of the kind {unknown[0][:64]!r}.")

    def create(
        self, connection: Connection, caller: Caller, *, url: str, kinds: Sequence[str], now: int
    ) -> dict[str, Any]:
        """An operation: a new endpoint, with its secret, for what happens from now on.

        Raises LumarisError `too_many`.
        """
        if store.count(connection, caller.id) >= WEBHOOKS_PER_PRINCIPAL_MAX:
            raise LumarisError("too_many", f"{WEBHOOKS_PER_PRINCIPAL_MAX} webhooks are the most.")
        if store.count(connection) >= WEBHOOKS_MAX:
            raise LumarisError("busy", "No more webhooks can be kept here.")
        secret = signing.make_secret()
        webhook = Webhook(
            id=make_id("webhook", secrets.token_bytes(ID_RANDOM_BYTES)),
            principal=caller.id,
            url=url,
            kinds=tuple(sorted(set(kinds))),
            secret=self._sealer.seal(secret.encode()),
            state="active",
            reason="",
            seen=outbox.head(connection),
            failures=0,
            failing_since=None,
            version=1,
            created_at=now,
        )
        store.insert(connection, webhook)
        return {**webhook.shown(), "secret": secret}

    async def all(self, caller: Caller) -> list[Webhook]:
        """The caller's endpoints."""
        return await self._context.store.read(
            lambda connection: store.of_principal(connection, caller.id)
        )

    async def find(self, caller: Caller, webhook: str) -> Webhook:
        """One of the caller's endpoints. Raises LumarisError `not_found`."""
        return await self._context.store.read(lambda connection: own(connection, caller, webhook))

    async def deliveries(self, caller: Caller, webhook: str) -> list[dict[str, Any]]:
        """The last attempts, newest first. Raises LumarisError `not_found`."""

        def look(connection: Connection) -> list[dict[str, Any]]:
            own(connection, caller, webhook)
            return store.deliveries(connection, webhook)

        return await self._context.store.read(look)

    async def delete(
        self, caller: Caller, webhook: str, *, check: Callable[[Webhook], None]
    ) -> None:
        """Forget an endpoint as it is when `check` returns. Raises LumarisError `not_found`, and
        what `check` raises."""

        def operation(connection: Connection) -> None:
            check(own(connection, caller, webhook))
            store.delete(connection, webhook)

        await self._context.store.submit(operation)

    def replay(
        self, connection: Connection, caller: Caller, webhook: str, *, after: int, now: int
    ) -> dict[str, Any]:
        """An operation: deliver everything after an event (again); enables a disabled endpoint.

        Raises LumarisError `not_found` or `cursor_expired`.
        """
        own(connection, caller, webhook)
        # A place that is yet to come would leave out events that nobody has seen.
        place = min(after, outbox.head(connection))
        check_cursor(connection, place)
        store.rewind(connection, webhook, after=place, now=now)
        return own(connection, caller, webhook).shown()


def own(connection: Connection, caller: Caller, webhook: str) -> Webhook:
    """The caller's endpoint. Raises LumarisError `not_found`."""
    found = store.find(connection, webhook)
    if found is None or found.principal != caller.id:
        raise LumarisError("not_found", "There is no such webhook of yours.")
    return found
