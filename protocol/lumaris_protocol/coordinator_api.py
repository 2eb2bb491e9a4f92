"""The coordinator's HTTP interface, without the HTTP: requests as data, answers as records.

Each part sends these through its own client (`request.method`, `request.path`, ...) and hands the
status and body to `request.read`, so the rules of the interface stand once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import msgspec

from lumaris_protocol import codes, receipts
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.limits import MIB

T = TypeVar("T")

# Refusals that the same request may not meet again: what was asked may even have been done.
TRANSIENT: Final = frozenset(
    ("coordinator_unreachable", "busy", "internal", "timeout", "unauthorized")
)
# The largest answer is a page of transfers; anything longer is not our coordinator.
ANSWER_BYTES_MAX: Final = 4 * MIB
ENVELOPE_MEDIA_TYPE: Final = "application/octet-stream"


class Info(msgspec.Struct, frozen=True):
    """What a coordinator says of itself."""

    network: str
    coordinator: str
    currency: str
    fee_bps: int
    settle_window_s: int
    test_credit_nanos: int
    version: str
    time: int


class Challenge(msgspec.Struct, frozen=True):
    """A nonce to sign."""

    challenge: str
    expires_at: int


class Membership(msgspec.Struct, frozen=True):
    """The result of a registration."""

    certificate: bytes
    account: str
    token: str
    expires_at: int


class Bootstrap(msgspec.Struct, frozen=True):
    """Where to find the network."""

    addresses: list[str]


class Account(msgspec.Struct, frozen=True):
    """A peer's own account."""

    account: str
    peer: str
    currency: str
    free_nanos: int
    held_nanos: int


class Claimed(msgspec.Struct, frozen=True):
    """A buyer's claim waits for the settle window."""

    state: str
    settle_by: int


class Audit(msgspec.Struct, frozen=True):
    """The ledger recomputed from its transfers."""

    balanced: bool
    accounts: int
    transfers: int
    sum_nanos: int


class _Problem(msgspec.Struct, frozen=True):
    code: str = ""
    detail: str = ""
    hint: str = ""
    money_moved: bool = False


@dataclass(frozen=True)
class Request(Generic[T]):
    """One call: what to send, and how to read the answer."""

    method: str
    path: str
    parse: Callable[[int, bytes], T]
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def read(self, status: int, body: bytes) -> T:
        """The answer's record. Raises the LumarisError that the coordinator sent."""
        if len(body) > ANSWER_BYTES_MAX:
            raise RefusedError("oversize", "The coordinator's answer is too long.")
        if status >= 400:
            raise problem_of(status, body)
        return self.parse(status, body)


def problem_of(status: int, body: bytes) -> LumarisError:
    """The error in a problem document; a plain one when the answer is none of ours."""
    try:
        problem = msgspec.json.decode(body, type=_Problem)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        problem = _Problem()
    if problem.code not in codes.CODES:
        return RefusedError("coordinator_unreachable", f"The coordinator answered {status}.")
    return RefusedError(
        problem.code, problem.detail, hint=problem.hint, money_moved=problem.money_moved
    )


def info() -> Request[Info]:
    """Network, key and terms."""
    return Request("GET", "/v1/info", _json(Info))


def bootstrap() -> Request[Bootstrap]:
    """Addresses of peers."""
    return Request("GET", "/v1/bootstrap", _json(Bootstrap))


def shards() -> Request[bytes]:
    """The signed shard map."""
    return Request("GET", "/v1/shards", lambda _status, body: body)


def challenge(peer: str) -> Request[Challenge]:
    """Ask for a nonce for a peer."""
    body = msgspec.json.encode({"peer": peer})
    return Request(
        "POST",
        "/v1/identity/challenge",
        _json(Challenge),
        body,
        {"content-type": "application/json"},
    )


def register(registration: bytes) -> Request[Membership]:
    """Send a signed Registration."""
    return _post("/v1/identity/register", registration, _json(Membership))


def credit(credit_request: bytes) -> Request[Account]:
    """Send a signed CreditRequest."""
    return _post("/v1/credits", credit_request, _json(Account))


def grant(grant_request: bytes) -> Request[bytes]:
    """Send a signed GrantRequest; the answer is a BudgetGrant envelope."""
    return _post("/v1/grants", grant_request, lambda _status, body: body)


def settle(claim: bytes) -> Request[bytes | Claimed]:
    """Send a signed Settle; the answer is a receipt file, or that the claim waits."""
    return _post("/v1/settle", claim, _read_settled)


def account(token: str) -> Request[Account]:
    """The caller's own balances."""
    return Request("GET", "/v1/accounts/me", _json(Account), headers=_bearer(token))


def receipt(receipt_id: str, token: str) -> Request[bytes]:
    """A receipt file by its id."""
    return Request(
        "GET", f"/v1/receipts/{receipt_id}", lambda _status, body: body, headers=_bearer(token)
    )


def audit() -> Request[Audit]:
    """Whether the ledger balances."""
    return Request("GET", "/v1/ledger/audit", _json(Audit))


def _bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def _post(path: str, body: bytes, parse: Callable[[int, bytes], T]) -> Request[T]:
    return Request("POST", path, parse, body, {"content-type": ENVELOPE_MEDIA_TYPE})


def _json(kind: type[T]) -> Callable[[int, bytes], T]:
    def parse(_status: int, body: bytes) -> T:
        try:
            record: Any = msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RefusedError("malformed", f"The coordinator's answer: {error}") from None
        return record  # type: ignore[no-any-return]

    return parse


def _read_settled(status: int, body: bytes) -> bytes | Claimed:
    if status == 202:
        return _json(Claimed)(status, body)
    receipts.decode_bundle(body)
    return body
