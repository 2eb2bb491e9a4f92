"""The signed work of a session, and disputes about it, as parties would make them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lumaris_protocol import codec, envelope, merkle, rulings
from lumaris_protocol.agreements import Contract
from lumaris_protocol.ids import derive_id, digest
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.limits import KIB, MIB
from lumaris_protocol.messages.base import Message
from lumaris_protocol.messages.dispute import (
    DisputeEvidence,
    DisputeOpen,
    DisputeSplit,
    DisputeWithdraw,
)
from lumaris_protocol.messages.execution import (
    Acceptance,
    Cancel,
    Delivery,
    File,
    JobEvent,
    Limits,
    Usage,
    WorkOrder,
)
from lumaris_protocol.messages.payment import Close, Voucher

LIMITS = Limits(
    wall_s=60,
    memory_bytes=64 * MIB,
    disk_bytes=64 * MIB,
    fuel=1_000,
    log_bytes=64 * KIB,
    output_files=16,
)
NO_INPUTS = merkle.files_root(())


@dataclass
class Work:
    """Both sides of one session; documents are numbered by signer as they are made."""

    contract: Contract
    buyer: KeyPair
    seller: KeyPair
    network: str
    _seqs: dict[str, int] = field(default_factory=dict)
    _orders: dict[int, str] = field(default_factory=dict)

    def order(self, n: int = 1, *, command: str = "work", **changes: Any) -> bytes:
        fields: dict[str, Any] = {
            "n": n,
            "job": derive_id("job", f"{self.contract.hash}{n}".encode()),
            "image": digest(b"image"),
            "command": (command,),
            "input_root": NO_INPUTS,
            "limits": LIMITS,
            "idempotency_key": derive_id("job", f"{self.contract.hash}{n}".encode()),
        }
        data = self._sign(WorkOrder, self.buyer, fields, changes)
        self._orders.setdefault(n, digest(data))  # the seller gets the first of a number
        return data

    def delivery(
        self, n: int = 1, *, output: str = "right", wall_ms: int = 1_000, **changes: Any
    ) -> bytes:
        stdout = File(path="stdout", size_bytes=1, sha256=digest(output.encode()))
        fields: dict[str, Any] = {
            "n": n,
            "order_hash": self._orders.get(n, digest(b"no order")),
            "exit_status": 0,
            "outputs": (),
            "output_root": digest(output.encode()),
            "stdout": stdout,
            "stderr": stdout,
            "usage": Usage(wall_ms=wall_ms),
            "amount_nanos": 1_000_000_000,  # capped by the price of the time used
            "environment": digest(b"environment"),
        }
        return self._sign(Delivery, self.seller, fields, changes)

    def event(self, n: int = 1, *, wall_ms: int = 1_000, **changes: Any) -> bytes:
        fields: dict[str, Any] = {
            "n": n,
            "order_hash": self._orders.get(n, digest(b"no order")),
            "state": "failed",
            "usage": Usage(wall_ms=wall_ms),
            "at": self.contract.agreement.issued_at + 5,
        }
        return self._sign(JobEvent, self.seller, fields, changes)

    def word(self, n: int = 1, *, accepted: bool, **changes: Any) -> bytes:
        fields: dict[str, Any] = {"n": n, "accepted": accepted, "total_nanos": 0}
        return self._sign(Acceptance, self.buyer, fields, changes)

    def cancel(self, n: int = 1, **changes: Any) -> bytes:
        return self._sign(Cancel, self.buyer, {"n": n}, changes)

    def voucher(self, total: int, **changes: Any) -> bytes:
        return self._sign(Voucher, self.buyer, {"total_nanos": total}, changes)

    def close(self, total: int, *, by: KeyPair | None = None, **changes: Any) -> bytes:
        fields: dict[str, Any] = {"total_nanos": total, "orders_accepted": 0, "reason": "closed"}
        return self._sign(Close, by or self.buyer, fields, changes)

    def _sign(
        self, kind: type[Message], key: KeyPair, fields: dict[str, Any], changes: dict[str, Any]
    ) -> bytes:
        key = changes.pop("key", key)
        network = changes.pop("network", self.network)
        seq = self._seqs.get(key.peer_id, 0)
        chain = {
            "session": self.contract.agreement.session,
            "seq": seq,
            "prev": self.contract.hash,
        }
        self._seqs[key.peer_id] = seq + 1
        return codec.sign(kind(**(chain | fields | changes)), key, network).data

    @property
    def agreements(self) -> tuple[bytes, bytes]:
        """Both signed copies."""
        return self.contract.by_buyer, self.contract.by_seller


def opening(
    contract: Contract,
    grant: bytes,
    key: KeyPair,
    claim: Any,
    *,
    network: str,
    evidence: tuple[bytes, ...] = (),
    order: int = 0,
    amount: int = 100_000,
    signer: KeyPair | None = None,
    **changes: Any,
) -> bytes:
    """A signed DisputeOpen by the identity key of a party."""
    fields: dict[str, Any] = {
        "dispute": rulings.dispute_id(contract.hash, opener=key.peer_id, claim=claim, order=order),
        "coordinator": contract.agreement.coordinator,
        "opener": key.peer_id,
        "agreement_by_buyer": contract.by_buyer,
        "agreement_by_seller": contract.by_seller,
        "grant": grant,
        "claim": claim,
        "order": order,
        "amount_nanos": amount,
        "evidence": evidence,
        "issued_at": contract.agreement.issued_at,
    }
    return codec.sign(DisputeOpen(**(fields | changes)), signer or key, network).data


def bundle(
    contract: Contract,
    dispute: str,
    key: KeyPair,
    *evidence: bytes,
    network: str,
    n: int = 0,
    done: bool = False,
    **changes: Any,
) -> bytes:
    """A signed DisputeEvidence."""
    fields: dict[str, Any] = {
        "dispute": dispute,
        "agreement_hash": contract.hash,
        "party": key.peer_id,
        "n": n,
        "evidence": evidence,
        "done": done,
        "issued_at": contract.agreement.issued_at,
    }
    return codec.sign(DisputeEvidence(**(fields | changes)), key, network).data


def padded(data: bytes, key: KeyPair, blanks: int, *, network: str) -> bytes:
    """The same message, signed again with so many blanks that mean nothing."""
    found = envelope.decode(data, size_max=MIB)
    payload = found.payload[:-1] + b" " * blanks + b"}"
    return envelope.seal(key, network, found.payload_type, payload)


def withdrawal(contract: Contract, dispute: str, key: KeyPair, *, network: str) -> bytes:
    """A signed DisputeWithdraw."""
    message = DisputeWithdraw(
        dispute=dispute,
        agreement_hash=contract.hash,
        party=key.peer_id,
        issued_at=contract.agreement.issued_at,
    )
    return codec.sign(message, key, network).data


def split(
    contract: Contract, dispute: str, key: KeyPair, *, award: int, refund: int, network: str
) -> bytes:
    """One side's signed DisputeSplit."""
    message = DisputeSplit(
        dispute=dispute,
        agreement_hash=contract.hash,
        award_nanos=award,
        refund_nanos=refund,
        issued_at=contract.agreement.issued_at,
    )
    return codec.sign(message, key, network).data
