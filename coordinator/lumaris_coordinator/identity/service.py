"""Registration: a peer proves its key and gets an account, a certificate and a token."""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio

from lumaris_coordinator.bounds import (
    API_KEY_USED_GRAIN_S,
    BOOTSTRAP_ADDRESSES_MAX,
    BOOTSTRAP_KEPT_S,
    BOOTSTRAP_SELLERS_CONSIDERED,
    CERTIFICATE_LIFETIME_S,
    IDENTITY_PRUNED_AT_ONCE_MAX,
    IDENTITY_PRUNED_PER_ROUND_MAX,
    PEERS_MAX,
)
from lumaris_coordinator.identity import bootstrap, people, store
from lumaris_coordinator.identity.caller import Caller, Scope, peer_caller
from lumaris_coordinator.identity.challenges import Challenges
from lumaris_coordinator.identity.secrets import Vault, is_token, key_id, make_token
from lumaris_coordinator.ledger.bonds import band
from lumaris_coordinator.ledger.store import open_account
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import codec, keys
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import derive_id
from lumaris_protocol.limits import CHALLENGE_LIFETIME_S
from lumaris_protocol.messages.advert import MembershipCertificate
from lumaris_protocol.messages.budget import Registration
from lumaris_protocol.messages.identity import TlsRequest

if TYPE_CHECKING:
    from lumaris_coordinator.authority import Authority
    from lumaris_coordinator.context import Context

__all__ = ["Caller", "Identity", "Scope"]


class Identity:
    """Challenges, registrations and tokens."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._challenges = Challenges(context.keys.first.seed)
        self.vault = Vault(context.keys.first.seed)
        self._bootstrap: list[str] = []
        self._bootstrap_until = 0
        self._bootstrapping = anyio.Lock()

    def challenge(self, peer: str) -> dict[str, Any]:
        """A challenge for the peer to sign. Raises LumarisError `malformed` for no peer id."""
        try:
            keys.public_key_of(peer)
        except ValueError:
            raise LumarisError("malformed", "Not an Ed25519 peer id.") from None
        challenge, expires_at = self._challenges.make(peer, now=self._context.now())
        return {"challenge": challenge, "expires_at": expires_at}

    async def register(self, body: bytes) -> dict[str, Any]:
        """Check a signed Registration and answer it.

        Raises EnvelopeError, or LumarisError `replayed`, `unauthorized`, `expired`, `revoked`,
        `busy`.
        """
        context, now = self._context, self._context.now()
        found = codec.open_signed(body, Registration, network=context.settings.network)
        message = found.message
        if found.signer != message.peer:
            raise LumarisError("wrong_signer", "A peer can register only itself.")
        context.keys.check(message.coordinator)
        codec.check_times(
            issued_at=message.issued_at,
            expires_at=message.issued_at + CHALLENGE_LIFETIME_S,
            now=now,
            what="registration",
        )
        if not all(map(_is_address, message.addresses)):
            raise LumarisError("malformed", "An address is not printable ASCII text.")
        challenge_ends = self._challenges.check(message.challenge, message.peer, now=now)
        token = make_token()

        def operation(connection: Connection) -> tuple[str, bytes]:
            store.use_challenge(connection, message.challenge, expires_at=challenge_ends)
            account, certificate = self._certify(connection, message, now)
            store.save_token(
                connection,
                token_hash=self.vault.hash(token),
                holder=message.peer,
                expires_at=now + CERTIFICATE_LIFETIME_S,
            )
            return account, certificate

        account, certificate = await context.store.submit(operation)
        return {
            "certificate": base64.b64encode(certificate).decode(),
            "account": account,
            "token": token,
            "expires_at": now + CERTIFICATE_LIFETIME_S,
        }

    def _certify(
        self, connection: Connection, message: Registration, now: int
    ) -> tuple[str, bytes]:
        context = self._context
        account = store.member(connection, message.peer)
        if account is None:
            if store.is_full(connection, peers_max=PEERS_MAX):
                raise LumarisError("busy", "No more peers can register here.")
            account = derive_id("account", f"{context.keys.first.peer_id}{message.peer}".encode())
            open_account(connection, owner=account, kind="peer", currency=context.settings.currency)
        serial = store.next_serial(connection)
        certificate = codec.sign(
            MembershipCertificate(
                peer=message.peer,
                account=account,
                roles=message.roles,
                bond_band=band(connection, message.peer, context.settings.currency),
                serial=serial,
                issued_at=now,
                expires_at=now + CERTIFICATE_LIFETIME_S,
            ),
            context.key,
            context.settings.network,
        )
        store.save_peer(
            connection,
            peer=message.peer,
            account=account,
            seller="seller" in message.roles,
            addresses=json.dumps(message.addresses),
            serial=serial,
            certificate=certificate.data,
            now=now,
            expires_at=now + CERTIFICATE_LIFETIME_S,
        )
        return account, certificate.data

    async def tls_certificate(self, body: bytes, authority: Authority) -> dict[str, Any]:
        """A TLS client certificate for a signed TlsRequest; the peer need not be registered yet.

        Raises EnvelopeError, or LumarisError `replayed`, `unauthorized`, `expired`, `revoked`,
        `malformed`.
        """
        context, now = self._context, self._context.now()
        found = codec.open_signed(body, TlsRequest, network=context.settings.network)
        message = found.message
        if found.signer != message.peer:
            raise LumarisError("wrong_signer", "A peer can ask only for itself.")
        context.keys.check(message.coordinator)
        codec.check_times(
            issued_at=message.issued_at,
            expires_at=message.issued_at + CHALLENGE_LIFETIME_S,
            now=now,
            what="TLS request",
        )
        ends = self._challenges.check(message.challenge, message.peer, now=now)
        issued = authority.issue(message.csr, peer=message.peer, now=now)

        def operation(connection: Connection) -> None:
            store.use_challenge(connection, message.challenge, expires_at=ends)
            store.member(connection, message.peer)

        await context.store.submit(operation)
        return {
            "certificate": issued.decode(),
            "ca": authority.pem.decode(),
            "expires_at": now + CERTIFICATE_LIFETIME_S,
        }

    async def authenticate(self, authorization: str) -> Caller:
        """Whose `Authorization: Bearer …` header it is. Raises LumarisError `unauthorized`."""
        scheme, _, secret = authorization.partition(" ")
        found = None
        if scheme.lower() == "bearer" and is_token(secret):
            name = self.vault.hash(secret)
            found = await self._context.store.read(
                lambda connection: self._by_token(connection, name)
            )
        elif scheme.lower() == "bearer" and (key := key_id(secret)) is not None:
            found = await self._by_key(key, self.vault.hash(secret))
        if found is None:
            raise LumarisError("unauthorized")
        return found

    def _by_token(self, connection: Connection, token_hash: bytes) -> Caller | None:
        holder = store.holder_of(connection, token_hash, now=self._context.now())
        if holder is None:
            return None
        user = people.find(connection, holder)
        if user is not None:
            return people.caller(connection, user, frozenset(("read", "write")))
        account = store.account_of(connection, holder)
        return peer_caller(holder, account) if account is not None else None

    async def _by_key(self, name: str, key_hash: bytes) -> Caller | None:
        now = self._context.now()

        def look(connection: Connection) -> tuple[Caller, int] | None:
            row = people.find_key(connection, name, now=now)
            if row is None or not hmac.compare_digest(row.hash, key_hash):
                return None
            user = people.find(connection, row.holder)
            assert user is not None
            caller = people.caller(connection, user, frozenset(row.scopes))
            caller = replace(caller, counted_as=name, rate=row.rate, ends_at=row.expires_at)
            return caller, row.used_at

        found = await self._context.store.read(look)
        if found is None:
            return None
        caller, used_at = found
        if now - used_at >= API_KEY_USED_GRAIN_S:
            # A busy store is no reason to refuse a read.
            with contextlib.suppress(LumarisError):
                await self._context.store.submit(
                    lambda connection: people.key_used(connection, name, now=now)
                )
        return caller

    async def bootstrap(self) -> list[str]:
        """Addresses of sellers: where a newcomer's overlay begins. Of many it is kept a while."""
        async with self._bootstrapping:
            if self._context.now() >= self._bootstrap_until:
                await self._choose_bootstrap(self._context.now())
            return self._bootstrap

    async def _choose_bootstrap(self, now: int) -> None:
        currency = self._context.settings.currency

        def look(connection: Connection) -> tuple[list[str], list[str]]:
            most = BOOTSTRAP_SELLERS_CONSIDERED
            bonded = store.bonded_sellers(connection, now=now, currency=currency, limit=most)
            return bonded, store.sellers(connection, now=now, limit=most)

        bonded, others = await self._context.store.scan(look)
        self._bootstrap = bootstrap.choose(bonded, others)
        if len(others) >= BOOTSTRAP_ADDRESSES_MAX:
            self._bootstrap_until = now + BOOTSTRAP_KEPT_S

    async def prune(self) -> None:
        """Forget what has expired, in parts: nobody waits for all of it."""
        now, most = self._context.now(), IDENTITY_PRUNED_AT_ONCE_MAX
        for _ in range(IDENTITY_PRUNED_PER_ROUND_MAX // most):
            more = await self._context.store.submit(
                lambda connection: store.prune(connection, now=now, limit=most)
            )
            if not more:
                return


def _is_address(text: str) -> bool:
    return text.isascii() and text.isprintable() and bool(text)
