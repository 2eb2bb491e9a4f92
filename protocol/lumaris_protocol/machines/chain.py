"""The two hash chains of a session: what we sign, and what the other side signs.

Each signer numbers its messages from 0 and names the hash of its previous envelope, starting from
the agreement. Dropping, re-ordering, replaying or forking is then refused, and two messages with
one number are evidence against their signer.
"""

from __future__ import annotations

from typing import Any, TypeVar

from lumaris_protocol import codec, envelope
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, ViolationError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.messages.base import SessionMessage
from lumaris_protocol.registry import MESSAGES

S = TypeVar("S", bound=SessionMessage)


class SendChain:
    """Numbers, links and signs our own messages of one session."""

    def __init__(self, key: KeyPair, *, network: str, session: str, root: str) -> None:
        self._key, self._network, self._session = key, network, session
        self.seq, self.head = 0, root

    def sign(self, kind: type[S], /, **fields: Any) -> Signed[S]:
        """The next message, signed. `fields` are those of the message without its chain part."""
        message = kind(session=self._session, seq=self.seq, prev=self.head, **fields)
        signed = codec.sign(message, self._key, self._network)
        self.seq, self.head = self.seq + 1, signed.hash
        return signed


class ReceiveChain:
    """Checks the other side's messages, in order."""

    def __init__(
        self,
        signer: str,
        *,
        network: str,
        session: str,
        root: str,
        kinds: tuple[type[SessionMessage], ...],
    ) -> None:
        self._signer, self._network, self._session = signer, network, session
        self._kinds = {kind.TYPE: kind for kind in kinds}
        self._size_max = max(kind.SIZE_MAX for kind in kinds)
        self.seq, self.head = 0, root

    def open(self, data: bytes) -> Signed[SessionMessage]:
        """The next message of the other side.

        Raises EnvelopeError for bad bytes and ViolationError `replayed`, `out_of_sequence`,
        `broken_chain` or `wrong_domain` for a signed message out of place.
        """
        found = envelope.decode(data, size_max=self._size_max)
        kind = self._kinds.get(found.payload_type)
        if kind is None:
            raise EnvelopeError("wrong_type", "This message does not belong in a session here.")
        signed = codec.open_decoded(found, kind, network=self._network, signer=self._signer)
        message = signed.message
        if message.session != self._session:
            raise ViolationError("wrong_domain", "The message belongs to another session.")
        if message.seq < self.seq:
            raise ViolationError("replayed", f"Message {message.seq} was seen before.")
        if message.seq > self.seq:
            raise ViolationError("out_of_sequence", f"Message {self.seq} is missing.")
        if message.prev != self.head:
            raise ViolationError("broken_chain")
        self.seq, self.head = self.seq + 1, signed.hash
        return signed


def session_kinds(*names: str) -> tuple[type[SessionMessage], ...]:
    """The session message types of some wire names."""
    kinds = [MESSAGES[name] for name in names]
    assert all(issubclass(kind, SessionMessage) for kind in kinds)
    return tuple(kind for kind in kinds if issubclass(kind, SessionMessage))
