"""Registration: a peer proves its key and gets an account, a certificate and a token."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lumaris_coordinator.bounds import (
    BOOTSTRAP_ADDRESSES_MAX,
    BOOTSTRAP_ADDRESSES_PER_PEER,
    CERTIFICATE_LIFETIME_S,
    PEERS_MAX,
)
from lumaris_coordinator.identity import store
from lumaris_coordinator.identity.challenges import Challenges
from lumaris_coordinator.ledger.store import open_account
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import codec, keys
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.ids import derive_id
from lumaris_protocol.limits import CHALLENGE_LIFETIME_S
from lumaris_protocol.messages.advert import MembershipCertificate
from lumaris_protocol.messages.budget import Registration

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context

TOKEN_PREFIX: Final = "lum_"  # noqa: S105 - the public prefix of every token
_TOKEN_BYTES: Final = 24
_TOKEN_CHARS_MAX: Final = 64


@dataclass(frozen=True)
class Caller:
    """Whom a token belongs to."""

    peer: str
    account: str


class Identity:
    """Challenges, registrations and tokens."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._challenges = Challenges(context.key.seed)
        self._token_key = hashlib.blake2b(context.key.seed, person=b"lumaris-token").digest()

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

        Raises EnvelopeError, or LumarisError `replayed`, `unauthorized`, `expired`, `busy`.
        """
        context, now = self._context, self._context.now()
        found = codec.open_signed(body, Registration, network=context.settings.network)
        message = found.message
        if found.signer != message.peer:
            raise LumarisError("wrong_signer", "A peer can register only itself.")
        if message.coordinator != context.peer:
            raise LumarisError("wrong_domain", "The registration names another coordinator.")
        codec.check_times(
            issued_at=message.issued_at,
            expires_at=message.issued_at + CHALLENGE_LIFETIME_S,
            now=now,
            what="registration",
        )
        if not all(map(_is_address, message.addresses)):
            raise LumarisError("malformed", "An address is not printable ASCII text.")
        challenge_ends = self._challenges.check(message.challenge, message.peer, now=now)
        token = TOKEN_PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)

        def operation(connection: Connection) -> tuple[str, bytes]:
            if not store.use_challenge(connection, message.challenge, expires_at=challenge_ends):
                raise LumarisError("replayed", "The challenge was answered before.")
            account, certificate = self._certify(connection, message, now)
            store.save_token(
                connection,
                token_hash=self._hash(token),
                peer=message.peer,
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
        account = store.account_of(connection, message.peer)
        if account is None:
            if store.is_full(connection, peers_max=PEERS_MAX):
                raise LumarisError("busy", "No more peers can register here.")
            account = derive_id("account", f"{context.peer}{message.peer}".encode())
            open_account(connection, owner=account, kind="peer", currency=context.settings.currency)
        serial = store.next_serial(connection)
        certificate = codec.sign(
            MembershipCertificate(
                peer=message.peer,
                account=account,
                roles=message.roles,
                bond_band=0,
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

    async def authenticate(self, authorization: str) -> Caller:
        """Whose `Authorization: Bearer …` header it is. Raises LumarisError `unauthorized`."""
        scheme, _, token = authorization.partition(" ")
        found = None
        if (
            scheme.lower() == "bearer"
            and token.startswith(TOKEN_PREFIX)
            and len(token) <= _TOKEN_CHARS_MAX
        ):
            name, now = self._hash(token), self._context.now()
            found = await self._context.store.read(
                lambda connection: store.find_token(connection, name, now=now)
            )
        if found is None:
            raise LumarisError("unauthorized")
        return Caller(*found)

    async def bootstrap(self) -> list[str]:
        """Addresses of sellers that registered lately: where a newcomer's overlay begins."""
        now = self._context.now()
        lists = await self._context.store.read(
            lambda connection: store.sellers(connection, now=now, limit=BOOTSTRAP_ADDRESSES_MAX)
        )
        addresses = [
            address for text in lists for address in json.loads(text)[:BOOTSTRAP_ADDRESSES_PER_PEER]
        ]
        return addresses[:BOOTSTRAP_ADDRESSES_MAX]

    async def prune(self) -> None:
        """Forget what has expired."""
        now = self._context.now()
        await self._context.store.submit(lambda connection: store.prune(connection, now=now))

    def _hash(self, token: str) -> bytes:
        # A keyed fast hash suffices: the token is 192 random bits, there is nothing to guess.
        return hashlib.blake2b(
            token.encode(errors="replace"), key=self._token_key, digest_size=32
        ).digest()


def _is_address(text: str) -> bool:
    return text.isascii() and text.isprintable() and bool(text)
