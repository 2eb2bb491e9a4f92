"""API keys: shown once, kept as a hash, with scopes, an end and a rate of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lumaris_coordinator.bounds import (
    API_KEY_LIFETIME_S_MAX,
    API_KEY_OVERLAP_S,
    API_KEYS_PER_USER_MAX,
)
from lumaris_coordinator.identity import people
from lumaris_coordinator.identity.caller import Caller
from lumaris_coordinator.identity.people import ApiKey
from lumaris_coordinator.identity.secrets import Vault, make_key
from lumaris_coordinator.store.port import Connection
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context


@dataclass(frozen=True)
class Wanted:
    """What a new key shall be: its label, its scopes, its life and its requests a second."""

    name: str
    scopes: tuple[str, ...]
    lifetime_s: int
    rate: int


class ApiKeys:
    """Makes, lists, rotates and ends keys."""

    def __init__(self, context: Context, vault: Vault) -> None:
        self._context, self._vault = context, vault

    def create(self, connection: Connection, caller: Caller, wanted: Wanted) -> dict[str, Any]:
        """An operation: a new key, with its text this once. One that is made with a key ends with
        that key at the latest and gets no higher rate.

        Raises LumarisError: `forbidden` for scopes that the caller lacks or for a peer,
        `limit_reached`, `usage`.
        """
        if caller.kind == "peer":
            raise LumarisError("forbidden", "A peer has no API keys; its own key is enough.")
        for scope in wanted.scopes:
            caller.require(scope)  # type: ignore[arg-type]
        if not 0 < wanted.lifetime_s <= API_KEY_LIFETIME_S_MAX:
            raise LumarisError("usage", f"A key lives up to {API_KEY_LIFETIME_S_MAX} s.")
        now = self._context.now()
        held = self._held(connection, caller, now)
        if sum(not key.replaced for key in held) >= API_KEYS_PER_USER_MAX:
            raise LumarisError("limit_reached", f"{API_KEYS_PER_USER_MAX} keys exist.")
        return self._make(connection, caller, _within(wanted, caller, now), now)

    def _held(self, connection: Connection, caller: Caller, now: int) -> list[ApiKey]:
        found = people.keys_of(connection, caller.id, now=now)
        if len(found) >= 2 * API_KEYS_PER_USER_MAX:
            raise LumarisError("limit_reached", "Too many keys were replaced within a day.")
        return found

    def _make(
        self, connection: Connection, caller: Caller, wanted: Wanted, now: int
    ) -> dict[str, Any]:
        network = self._context.settings.network
        return issue(connection, self._vault, wanted, holder=caller.id, network=network, now=now)

    async def list(self, caller: Caller) -> dict[str, Any]:
        """The caller's keys, without their secrets."""
        now = self._context.now()
        found = await self._context.store.read(
            lambda connection: people.keys_of(connection, caller.id, now=now)
        )
        return {"keys": [key.shown() for key in found]}

    def rotate(self, connection: Connection, caller: Caller, name: str) -> dict[str, Any]:
        """An operation: a new key like that one, which stays valid for a while. Made with a user's
        key it ends as in `create`; an operator, who cannot log in, renews its own keys so.

        Raises LumarisError: `not_found`, `limit_reached`, or `usage` for one that was replaced
        before.
        """
        now = self._context.now()
        old = people.find_key(connection, name, now=now)
        if old is None or old.holder != caller.id:
            raise LumarisError("not_found", "There is no such key of yours.")
        for scope in old.scopes:
            caller.require(scope)  # type: ignore[arg-type]
        if old.replaced:
            raise LumarisError("usage", "The key was replaced before.")
        lifetime_s = old.expires_at - old.created_at
        self._held(connection, caller, now)
        people.replace_key(connection, name, ends=now + API_KEY_OVERLAP_S)
        wanted = Wanted(old.name, old.scopes, lifetime_s, old.rate)
        if caller.kind != "operator":
            wanted = _within(wanted, caller, now)
        return self._make(connection, caller, wanted, now)

    async def delete(self, caller: Caller, name: str) -> None:
        """End a key at once. Raises LumarisError `not_found`."""
        ended = await self._context.store.submit(
            lambda connection: people.delete_key(connection, name, caller.id)
        )
        if not ended:
            raise LumarisError("not_found", "There is no such key of yours.")


def _within(wanted: Wanted, caller: Caller, now: int) -> Wanted:
    """What a key makes is no more than the key itself: a stolen one ends when it was to end."""
    if not caller.ends_at:
        return wanted
    left = max(1, caller.ends_at - now)
    return replace(
        wanted, lifetime_s=min(wanted.lifetime_s, left), rate=min(wanted.rate, caller.rate)
    )


def issue(
    connection: Connection, vault: Vault, wanted: Wanted, *, holder: str, network: str, now: int
) -> dict[str, Any]:
    """An operation: a new key, and its text under `key`, which is kept nowhere."""
    made = make_key(network)
    key = ApiKey(
        id=made.id,
        holder=holder,
        hash=vault.hash(made.text),
        name=wanted.name,
        scopes=tuple(sorted(set(wanted.scopes))),
        rate=wanted.rate,
        created_at=now,
        expires_at=now + wanted.lifetime_s,
        used_at=0,
        replaced=False,
    )
    people.insert_key(connection, key)
    return {**key.shown(), "key": made.text}
