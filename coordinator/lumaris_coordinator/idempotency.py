"""Unsigned requests that are applied once, however often they are sent (the IETF draft's header).

The answer is stored in the transaction of the change itself. Two requests under one key are never
run side by side: the writer runs one operation at a time, so the second finds what the first
stored and answers it, byte for byte. A request that was refused changed nothing and stores
nothing: it may be repeated under its key. An answer is repeated only to the credentials that got
it: a user's login, a peer's own token, or one API key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from lumaris_coordinator.bounds import (
    IDEMPOTENCY_KEPT_S,
    IDEMPOTENCY_KEYS_PER_PRINCIPAL_MAX,
    IDEMPOTENCY_PRUNED_PER_ROUND_MAX,
)
from lumaris_coordinator.edge import read_body
from lumaris_coordinator.http import coordinator_of
from lumaris_coordinator.sealing import Sealer
from lumaris_coordinator.store.port import Connection, first
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import IDEMPOTENCY_KEY_CHARS_MAX

if TYPE_CHECKING:
    from lumaris_coordinator.identity.service import Caller

REPLAYED: Final = "Idempotency-Replayed"


@dataclass(frozen=True)
class Stored:
    """An answer as it was first given."""

    status: int
    body: bytes
    replayed: bool


async def idempotent(
    request: Request,
    caller: Caller | None,
    operation: Callable[[Connection], object],
    *,
    status: int = 200,
) -> Response:
    """Run an operation of the writer once per key and answer its value as JSON with `status`.

    `caller` None is an anonymous request. Raises LumarisError `idempotency_missing`,
    `idempotency_mismatch`, `too_many`, and what the operation raises.
    """
    key = key_of(request)
    body = getattr(request.state, "body", None)
    if body is None:
        body = await read_body(request)
    principal = caller.id if caller is not None else ""
    names = Names(principal, _hash(key.encode()), _fingerprint(request, body, caller))
    context = coordinator_of(request).context
    sealer, now = Sealer(context.keys.first.seed), context.now()

    def once(connection: Connection) -> Stored:
        return run_once(
            connection, names, sealer, lambda: operation(connection), status=status, now=now
        )

    found = await context.store.submit(once)
    headers = {"Cache-Control": "no-store"}
    if found.replayed:
        headers[REPLAYED] = "true"
    return Response(found.body, found.status, headers, "application/json")


@dataclass(frozen=True)
class Names:
    """Under which an answer is kept, and of which request it is."""

    principal: str
    key_hash: bytes
    request_hash: bytes


def run_once(
    connection: Connection,
    names: Names,
    sealer: Sealer,
    operation: Callable[[], object],
    *,
    status: int,
    now: int,
) -> Stored:
    """The stored answer, or that of the operation, which is stored with it.

    Raises LumarisError `idempotency_mismatch` or `too_many`.
    """
    row = first(
        connection,
        "SELECT request_hash, status, body FROM idempotency"
        " WHERE principal = ? AND key_hash = ? AND at > ?",
        (names.principal, names.key_hash, now - IDEMPOTENCY_KEPT_S),
    )
    if row is not None:
        if bytes(row[0]) != names.request_hash:
            raise LumarisError("idempotency_mismatch")
        return Stored(int(row[1]), sealer.open(bytes(row[2])), replayed=True)
    number = _next_number(connection, names.principal, now=now)
    body = msgspec.json.encode(operation())
    connection.execute(
        "DELETE FROM idempotency WHERE principal = ? AND key_hash = ?",
        (names.principal, names.key_hash),
    )
    connection.execute(
        "INSERT INTO idempotency (principal, key_hash, number, request_hash, status, body, at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            names.principal,
            names.key_hash,
            number,
            names.request_hash,
            status,
            sealer.seal(body),
            now,
        ),
    )
    return Stored(status, body, replayed=False)


def _next_number(connection: Connection, principal: str, *, now: int) -> int:
    """The number of a principal's next answer. Raises LumarisError `too_many` at the bound."""
    row = first(
        connection,
        "SELECT coalesce(max(number), 0) + 1 FROM idempotency WHERE principal = ?",
        (principal,),
    )
    number = int(row[0]) if row else 1
    # Numbers are dense, so the one that far back still being kept means that the share is used up.
    full = first(
        connection,
        "SELECT 1 FROM idempotency WHERE principal = ? AND number = ? AND at > ?",
        (principal, number - IDEMPOTENCY_KEYS_PER_PRINCIPAL_MAX, now - IDEMPOTENCY_KEPT_S),
    )
    if full is not None and principal:
        raise LumarisError("too_many", "Too many requests are remembered for this account.")
    return number


def prune(connection: Connection, *, now: int) -> None:
    """Forget answers older than 72 hours. An operation for the writer."""
    connection.execute(
        "DELETE FROM idempotency WHERE (principal, key_hash) IN (SELECT principal, key_hash"
        " FROM idempotency WHERE at <= ? ORDER BY at LIMIT ?)",
        (now - IDEMPOTENCY_KEPT_S, IDEMPOTENCY_PRUNED_PER_ROUND_MAX),
    )


def key_of(request: Request) -> str:
    """The request's key. Raises LumarisError `idempotency_missing` or `malformed`."""
    found = request.headers.getlist("idempotency-key")
    if not found or not found[0]:
        raise LumarisError("idempotency_missing")
    key = found[0]
    if len(found) > 1 or len(key) > IDEMPOTENCY_KEY_CHARS_MAX or not key.isascii():
        raise LumarisError(
            "malformed",
            f"An Idempotency-Key is one ASCII text of at most {IDEMPOTENCY_KEY_CHARS_MAX}"
            " characters.",
        )
    return key


def _fingerprint(request: Request, body: bytes, caller: Caller | None) -> bytes:
    """Which request it is, and by which credentials: an answer may hold a secret or tell what other
    credentials of the same principal must not know, so they are told that the key is taken."""
    url = request.url
    lines = [request.method, url.path, url.query]
    if caller is not None:
        lines += [caller.counted_as, " ".join(sorted(caller.scopes))]
    return _hash("\n".join((*lines, "")).encode(errors="replace") + body)


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()
