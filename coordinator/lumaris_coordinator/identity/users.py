"""Users: a name and a password, the peers they own, and tokens for as long as a day's work."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lumaris_coordinator.bounds import (
    PEER_LINK_LIFETIME_S,
    PEERS_PER_USER_MAX,
    USER_FORGOTTEN_S,
    USER_TOKEN_LIFETIME_S,
    USERS_LOOKED_AT_PER_ROUND,
    USERS_MAX,
)
from lumaris_coordinator.identity import people, store
from lumaris_coordinator.identity.caller import Caller
from lumaris_coordinator.identity.passwords import Passwords
from lumaris_coordinator.identity.people import User
from lumaris_coordinator.identity.secrets import Vault, make_token
from lumaris_coordinator.ledger.store import open_account
from lumaris_coordinator.limits.limiter import LOCAL, UNKNOWN, Limiter
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import codec
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import ID_RANDOM_BYTES, make_id
from lumaris_protocol.messages.identity import PeerLink

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context


_HINT: Final = "Check the name and the password."


@dataclass
class _Guess:
    right: bool = False


class Users:
    """Registers users, lets them in, and keeps the list of what is theirs."""

    def __init__(
        self, context: Context, vault: Vault, limiter: Limiter, passwords: Passwords
    ) -> None:
        self._context, self._vault = context, vault
        self._limiter, self._passwords = limiter, passwords
        self._pruned_to = 0  # the number of the user looked at last

    async def register(self, name: str, password: str, *, address: str) -> dict[str, Any]:
        """Make a user with an account of its own.

        Raises LumarisError: `forbidden` where registration is closed, `name_taken`, `rate_limited`
        for too many of one address, `busy`.
        """
        if not self._context.settings.user_registration:
            raise LumarisError("forbidden", "New users are made by the operator here.")
        if await self._context.store.read(lambda connection: people.by_name(connection, name)):
            raise LumarisError("name_taken")  # before a hash is paid for
        self._limiter.registered(address)
        kept = await self._passwords.hash(password, caller=_line_of(address))
        user = new_user(name, kept, operator=False, now=self._context.now())
        await self._context.store.submit(lambda connection: add(connection, user, self._currency))
        return {"user": user.id, "name": name, "created_at": user.created_at}

    async def login(self, name: str, password: str, *, address: str) -> dict[str, Any]:
        """A token for a name and its password. An unknown name fails alike and costs the same.

        Raises LumarisError: `unauthorized`, `rate_limited` after too many failures, `busy`.
        """
        with self._guess(name, address) as guess:
            user = await self._context.store.read(
                lambda connection: people.by_name(connection, name)
            )
            guess.right = await self._passwords.check(
                user.password if user else None, password, caller=_line_of(address)
            )
        if user is None or not guess.right:
            raise LumarisError("unauthorized", "The name or the password is wrong.", hint=_HINT)
        token, now = make_token(), self._context.now()
        expires_at = now + USER_TOKEN_LIFETIME_S

        def operation(connection: Connection) -> None:
            fresh = people.find(connection, user.id)
            if fresh is None or fresh.password != user.password:
                raise LumarisError("unauthorized", "The password was changed just now.")
            store.save_token(
                connection,
                token_hash=self._vault.hash(token),
                holder=user.id,
                expires_at=expires_at,
            )

        await self._context.store.submit(operation)
        return {"user": user.id, "token": token, "expires_at": expires_at}

    async def logout(self, caller: Caller, token: str) -> None:
        """End the token that was shown. Raises LumarisError `forbidden` for an API key."""
        name = self._vault.hash(token)
        ended = await self._context.store.submit(
            lambda connection: store.end_token(connection, caller.id, name)
        )
        if not ended:
            raise LumarisError("forbidden", "This is an API key; delete it at /v1/api-keys.")

    async def change_password(
        self, caller: Caller, old: str, new: str, *, token: str, address: str
    ) -> None:
        """Replace the password and end all other tokens.

        Raises LumarisError: `forbidden` for who has no password, `unauthorized` for a wrong one,
        `rate_limited`, `busy`.
        """
        user = await self._context.store.read(lambda connection: people.find(connection, caller.id))
        if user is None or not user.password:
            raise LumarisError("forbidden", "Only a user has a password.")
        with self._guess(user.name, address) as guess:
            guess.right = await self._passwords.check(user.password, old, caller=user.id)
        if not guess.right:
            raise LumarisError("unauthorized", "The old password is wrong.", hint=_HINT)
        kept = await self._passwords.hash(new, caller=user.id, known=True)
        current = self._vault.hash(token)

        def operation(connection: Connection) -> None:
            people.set_password(connection, user.id, kept)
            store.end_tokens(connection, user.id, but=current)

        await self._context.store.submit(operation)

    @contextmanager
    def _guess(self, name: str, address: str) -> Iterator[_Guess]:
        """Count a failure in advance, or many guesses at once would count as one; give it back
        when the guess was right or could not be checked. Raises LumarisError `rate_limited`."""
        self._limiter.check_login(name, address)
        self._limiter.login_failed(name, address)
        guess = _Guess()
        try:
            yield guess
        except BaseException:
            guess.right = True
            raise
        finally:
            if guess.right:
                self._limiter.login_succeeded(name, address)

    async def show(self, caller: Caller) -> dict[str, Any]:
        """The caller itself. Raises LumarisError `forbidden` for a peer."""
        user = await self._context.store.read(lambda connection: people.find(connection, caller.id))
        if user is None:
            raise LumarisError("forbidden", "These are a peer's credentials, not a user's.")
        return {
            "user": user.id,
            "name": user.name,
            "operator": user.operator,
            "created_at": user.created_at,
            "peers": sorted(caller.peers),
        }

    async def link(self, caller: Caller, body: bytes) -> dict[str, Any]:
        """Make a peer the caller's: its own signature says so.

        Raises EnvelopeError, or LumarisError: `forbidden`, `not_certified`, `already_linked`,
        `limit_reached`, `revoked`, `replayed` for a link older than the last change.
        """
        context, now = self._context, self._context.now()
        found = codec.open_signed(body, PeerLink, network=context.settings.network)
        message = found.message
        context.keys.check(message.coordinator)
        if found.signer != message.peer:
            raise LumarisError("wrong_signer", "Only the peer itself can name its owner.")
        if caller.kind == "peer" or message.user != caller.id:
            raise LumarisError("forbidden", "The link names another user.")
        codec.check_times(
            issued_at=message.issued_at,
            expires_at=message.issued_at + PEER_LINK_LIFETIME_S,
            now=now,
            what="peer link",
        )

        def operation(connection: Connection) -> list[str]:
            self._link(connection, message, now)
            return people.peers_of(connection, caller.id)

        return {"peers": await context.store.submit(operation)}

    def _link(self, connection: Connection, message: PeerLink, now: int) -> None:
        store.member(connection, message.peer)
        row = people.owner_of(connection, message.peer)
        if row is None:
            raise LumarisError("not_certified", "The peer is not registered here.")
        owner, changed_at = row
        if owner == message.user:
            return
        if owner is not None:
            raise LumarisError("already_linked")
        if message.issued_at < changed_at:
            raise LumarisError("replayed", "The peer was unlinked after it signed this.")
        if len(people.peers_of(connection, message.user)) >= PEERS_PER_USER_MAX:
            raise LumarisError("limit_reached", f"{PEERS_PER_USER_MAX} peers are linked.")
        people.set_owner(connection, message.peer, message.user, now=now)

    async def unlink(self, caller: Caller, peer: str) -> None:
        """Take a peer from its owner; either may. Raises LumarisError `not_found`."""
        now = self._context.now()

        def operation(connection: Connection) -> None:
            row = people.owner_of(connection, peer)
            if row is None or row[0] is None or caller.id not in (row[0], peer):
                raise LumarisError("not_found", "There is no such peer of yours.")
            # A link signed in the same second must not bring it back.
            people.set_owner(connection, peer, None, now=now + 1)

        await self._context.store.submit(operation)

    async def prune(self) -> int:
        """Forget users who never had anything, a part of the table each time; how many."""
        after, before = self._pruned_to, self._context.now() - USER_FORGOTTEN_S
        found = await self._context.store.scan(
            lambda connection: people.page(connection, after, USERS_LOOKED_AT_PER_ROUND)
        )
        self._pruned_to = found[-1][1] if len(found) == USERS_LOOKED_AT_PER_ROUND else 0
        old = [user for user, _, created_at in found if created_at <= before]
        if not old:
            return 0

        def operation(connection: Connection) -> int:
            return sum(people.forget(connection, user, before=before) for user in old)

        return await self._context.store.submit(operation)

    @property
    def _currency(self) -> str:
        return self._context.settings.currency


def _line_of(address: str) -> str:
    """Whose share of the waiting line it is: nobody's where everybody may be behind an address."""
    return "" if address in (LOCAL, UNKNOWN) else address


def new_user(name: str, password: str, *, operator: bool, now: int) -> User:
    """A user with a fresh id."""
    name_id = make_id("user", secrets.token_bytes(ID_RANDOM_BYTES))
    return User(name_id, name, password, operator, now)


def add(connection: Connection, user: User, currency: str) -> None:
    """An operation: a new user with its account. Raises LumarisError `name_taken` or `busy`."""
    if people.by_name(connection, user.name) is not None:
        raise LumarisError("name_taken")
    if not user.operator and people.count(connection) >= USERS_MAX:
        raise LumarisError("busy", "No more users can be made here.")
    people.insert(connection, user)
    open_account(connection, owner=user.id, kind="user", currency=currency)
