"""What a peer says of itself with its key: whose it is, and which TLS key it uses."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from lumaris_protocol import limits
from lumaris_protocol.messages.base import Id, Message, Nonce, Peer, Time


class PeerLink(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A peer names the user that owns it."""

    TYPE: ClassVar[str] = "peer_link"
    peer: Peer
    coordinator: Peer
    user: Id
    issued_at: Time


class TlsRequest(Message, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A peer asks for a TLS client certificate. `csr` is a PKCS #10 request in DER; of it only the
    key and the proof of holding it count, the name is the peer's."""

    TYPE: ClassVar[str] = "tls_request"
    peer: Peer
    coordinator: Peer
    challenge: Nonce
    csr: Annotated[bytes, Meta(max_length=limits.CSR_BYTES_MAX)]
    issued_at: Time
