"""The coordinator's HTTP interface, without the HTTP: requests as data, answers as records.

Each part sends these through its own client (`request.method`, `request.path`, ...) and hands the
status and body to `request.read`, so the rules of the interface stand once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec

from lumaris_protocol import codes, receipts
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.limits import CONSISTENCY_HASHES_MAX, MIB
from lumaris_protocol.messages.base import Digest

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
    currencies: list[str] = []
    bond_release_s: int = 0


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


class TlsCertificate(msgspec.Struct, frozen=True):
    """A TLS client certificate and the authority that signed it, both in PEM."""

    certificate: str
    ca: str
    expires_at: int


class User(msgspec.Struct, frozen=True):
    """Somebody with a name, and the peers that belong to it."""

    user: str
    name: str
    operator: bool
    created_at: int
    peers: list[str]


class Peers(msgspec.Struct, frozen=True):
    """The peers of a user."""

    peers: list[str]


class Bootstrap(msgspec.Struct, frozen=True):
    """Where to find the network."""

    addresses: list[str]


class Wallet(msgspec.Struct, frozen=True):
    """Money in one currency: free, held in open sessions, and put down in open disputes."""

    currency: str
    free_nanos: int
    held_nanos: int
    sessions_open: int
    disputed_nanos: int = 0


class Account(msgspec.Struct, frozen=True):
    """A peer's own account: the main currency's money, and every wallet."""

    account: str
    peer: str
    currency: str
    free_nanos: int
    held_nanos: int
    wallets: list[Wallet] = []
    disputed_nanos: int = 0


class Credit(msgspec.Struct, frozen=True):
    """Test credit that was given."""

    account: str
    currency: str
    credited_nanos: int
    transaction: int


class Payout(msgspec.Struct, frozen=True):
    """Money on its way out of the market; `held` until the adapter has paid."""

    payout: str
    adapter: str
    currency: str
    amount_nanos: int
    state: str
    reference: str
    reason: str


class Claimed(msgspec.Struct, frozen=True):
    """A buyer's claim waits for the settle window."""

    state: str
    settle_by: int


class Escrow(msgspec.Struct, frozen=True):
    """The money of a session; `runway_s` is how long it lasts at the session's full rate."""

    number: int
    session: str
    agreement_hash: str
    buyer: str
    seller: str
    currency: str
    state: str
    version: int
    cap_nanos: int
    vouchered_nanos: int
    paid_nanos: int
    held_nanos: int
    disputes_open: int
    granted_at: int
    ends_at: int
    settle_by: int
    runway_s: int
    receipt: str | None


class EscrowClaim(msgspec.Struct, frozen=True):
    """A signed claim; `taken` is false for one that enclosed a forged voucher."""

    by: str
    taken: bool
    document: bytes
    at: int


class EscrowClaims(msgspec.Struct, frozen=True):
    """The claims on a session's money that may be evidence, and what a dispute could win: what was
    paid, what the bonds hold for one now, and how many sellers could be drawn to check."""

    claims: list[EscrowClaim]
    paid_nanos: int
    buyer_bond_nanos: int
    seller_bond_nanos: int
    checkers: int


class EscrowPage(msgspec.Struct, frozen=True):
    """Escrows, oldest first; `next` is the `after` of the next page, None at the end."""

    escrows: list[Escrow]
    next: int | None


class BondRelease(msgspec.Struct, frozen=True):
    """A part of a bond that was asked back and is paid when due."""

    amount_nanos: int
    due: int


class Bond(msgspec.Struct, frozen=True):
    """A peer's bond in a currency. What is locked next pays first what rulings are owed."""

    currency: str
    locked_nanos: int
    owed_nanos: int
    band: int
    releases: list[BondRelease]
    peer: str = ""


class Bonds(msgspec.Struct, frozen=True):
    """The bonds of one peer, or of each of the caller's."""

    bonds: list[Bond]


class Audit(msgspec.Struct, frozen=True):
    """The ledger recomputed from its transfers."""

    balanced: bool
    accounts: int
    transfers: int
    sum_nanos: int


class _Consistency(msgspec.Struct, frozen=True):
    hashes: Annotated[list[Digest], msgspec.Meta(max_length=CONSISTENCY_HASHES_MAX)]


class Dispute(msgspec.Struct, frozen=True):
    """A dispute as its parties see it; times are the coordinator's seconds.

    `owed_nanos` is what its ruling could not collect because of other disputes over the same bond;
    it is collected from what comes to the bond.
    """

    dispute: str
    number: int
    agreement_hash: str
    claim: str
    order: int
    opener: str
    buyer: str
    seller: str
    state: str
    currency: str
    amount_nanos: int
    bond_nanos: int
    stake_nanos: int
    owed_nanos: int
    opened_at: int
    evidence_until: int
    check_until: int | None
    ended_at: int | None


class DisputeRuling(msgspec.Struct, frozen=True):
    """What a ruling says; the dispute file proves it."""

    fault: str
    rule: str
    award_nanos: int
    refund_nanos: int
    slash_nanos: int
    collected_nanos: int
    victim_nanos: int
    bond_returned: bool


class ShownEvidence(msgspec.Struct, frozen=True):
    """One bundle by its hash; number 0 is the opening."""

    n: int
    by: str
    done: bool
    hash: str


class DisputeDetail(Dispute, frozen=True, kw_only=True):
    """A dispute with what was shown, who checks, and how it was ruled."""

    evidence: list[ShownEvidence]
    checkers: list[str]
    ruling: DisputeRuling | None


class DisputePage(msgspec.Struct, frozen=True):
    """Disputes, oldest first; `next` is the `after` of the next page, None at the end."""

    disputes: list[Dispute]
    next: int | None


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


def key_list() -> Request[bytes]:
    """The signed list of the coordinator's keys."""
    return Request("GET", "/.well-known/lumaris-keys", lambda _status, body: body)


def shards() -> Request[bytes]:
    """The signed shard map."""
    return Request("GET", "/v1/shards", lambda _status, body: body)


def revocations(after: int) -> Request[bytes]:
    """The signed revocations that follow a number."""
    return Request("GET", f"/v1/revocations?after={after}", lambda _status, body: body)


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


def tls_certificate(tls_request: bytes) -> Request[TlsCertificate]:
    """Send a signed TlsRequest."""
    return _post("/v1/identity/tls-certificate", tls_request, _json(TlsCertificate))


def user(token: str) -> Request[User]:
    """The user of a token or an API key."""
    return Request("GET", "/v1/users/me", _json(User), headers=_bearer(token))


def link_peer(peer_link: bytes, token: str) -> Request[Peers]:
    """Send a signed PeerLink: the peer belongs to the user from now on."""
    headers = {**_bearer(token), "content-type": ENVELOPE_MEDIA_TYPE}
    return Request("POST", "/v1/users/me/peers", _json(Peers), peer_link, headers)


def unlink_peer(peer: str, token: str) -> Request[bytes]:
    """Take a peer from its user; either may ask."""
    path = f"/v1/users/me/peers/{peer}"
    return Request("DELETE", path, lambda _status, body: body, headers=_bearer(token))


def credit(credit_request: bytes) -> Request[Credit]:
    """Send a signed CreditRequest."""
    return _post("/v1/credits", credit_request, _json(Credit))


def payout(payout_request: bytes) -> Request[Payout]:
    """Send a signed PayoutRequest."""
    return _post("/v1/payouts", payout_request, _json(Payout))


def payout_state(payout_id: str, token: str) -> Request[Payout]:
    """Where a payout of the caller's stands."""
    return Request("GET", f"/v1/payouts/{payout_id}", _json(Payout), headers=_bearer(token))


def grant(grant_request: bytes) -> Request[bytes]:
    """Send a signed GrantRequest; the answer is a BudgetGrant envelope."""
    return _post("/v1/grants", grant_request, lambda _status, body: body)


def amend(amend_request: bytes) -> Request[bytes]:
    """Send a signed AmendRequest; the answer is the new BudgetGrant envelope."""
    return _post("/v1/amendments", amend_request, lambda _status, body: body)


def bond(bond_request: bytes) -> Request[Bonds]:
    """Send a signed BondRequest; the answer is the peer's bonds."""
    return _post("/v1/bonds", bond_request, _json(Bonds))


def bonds(token: str) -> Request[Bonds]:
    """The bonds of the caller's peers."""
    return Request("GET", "/v1/bonds/me", _json(Bonds), headers=_bearer(token))


def escrows(token: str, *, after: int = 0, state: str = "") -> Request[EscrowPage]:
    """A page of the caller's escrows, of one state or of all."""
    only = f"&state={state}" if state else ""
    path = f"/v1/escrows?after={after}{only}"
    return Request("GET", path, _json(EscrowPage), headers=_bearer(token))


def escrow(session: str, token: str) -> Request[Escrow]:
    """The money of one of the caller's sessions."""
    return Request("GET", f"/v1/escrows/{session}", _json(Escrow), headers=_bearer(token))


def escrow_claims(session: str, token: str) -> Request[EscrowClaims]:
    """The claims on a session's money that may be evidence for its parties."""
    path = f"/v1/escrows/{session}/claims"
    return Request("GET", path, _json(EscrowClaims), headers=_bearer(token))


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


def log_checkpoint() -> Request[str]:
    """The newest head of the receipts log: a signed note."""
    return Request("GET", "/log/checkpoint", _text)


def log_consistency(old: int, new: int) -> Request[tuple[bytes, ...]]:
    """The proof that the log of `new` leaves extends that of `old`."""
    return Request("GET", f"/log/consistency?old={old}&new={new}", _read_hashes)


def add_cosignature(note: str) -> Request[bytes]:
    """Hand in a head of the log with a witness's cosignature."""
    headers = {"content-type": "text/plain; charset=utf-8"}
    return Request("POST", "/log/add-cosignature", lambda _, body: body, note.encode(), headers)


def open_dispute(opening: bytes) -> Request[Dispute]:
    """Send a signed DisputeOpen."""
    return _post("/v1/disputes", opening, _json(Dispute))


def add_evidence(dispute: str, bundle: bytes) -> Request[Dispute]:
    """Send a signed DisputeEvidence."""
    return _post(f"/v1/disputes/{dispute}/evidence", bundle, _json(Dispute))


def withdraw_dispute(dispute: str, withdrawal: bytes) -> Request[Dispute]:
    """Send a signed DisputeWithdraw."""
    return _post(f"/v1/disputes/{dispute}/withdraw", withdrawal, _json(Dispute))


def split_dispute(dispute: str, split: bytes) -> Request[Dispute]:
    """Send one side's signed DisputeSplit."""
    return _post(f"/v1/disputes/{dispute}/split", split, _json(Dispute))


def disputes(token: str, *, after: int = 0) -> Request[DisputePage]:
    """A page of the caller's disputes."""
    path = f"/v1/disputes?after={after}"
    return Request("GET", path, _json(DisputePage), headers=_bearer(token))


def dispute(dispute_id: str, token: str) -> Request[DisputeDetail]:
    """One dispute of the caller's."""
    path = f"/v1/disputes/{dispute_id}"
    return Request("GET", path, _json(DisputeDetail), headers=_bearer(token))


def dispute_document(dispute_id: str, token: str) -> Request[bytes]:
    """The dispute file, as `dispute_file.verify` replays it."""
    path = f"/v1/disputes/{dispute_id}/file"
    return Request("GET", path, lambda _status, body: body, headers=_bearer(token))


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


def _text(_status: int, body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise RefusedError("malformed", "The coordinator's answer is no text.") from None


def _read_hashes(status: int, body: bytes) -> tuple[bytes, ...]:
    found = _json(_Consistency)(status, body)
    return tuple(bytes.fromhex(name.removeprefix("sha256:")) for name in found.hashes)


def _read_settled(status: int, body: bytes) -> bytes | Claimed:
    if status == 202:
        return _json(Claimed)(status, body)
    receipts.decode_bundle(body)
    return body
