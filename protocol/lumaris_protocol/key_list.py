"""A coordinator's key list: signed by one root for ever, never taken back, keys valid in windows.

The root is pinned when a program first meets the coordinator. From then on a list counts only when
that root signed it and its number is not below the one already known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set

from lumaris_protocol import codec, envelope
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import CLOCK_SKEW_S
from lumaris_protocol.messages.notice import KeyList, SigningKey


def open_list(data: bytes, *, network: str, root: str | None = None) -> Signed[KeyList]:
    """Check a key list's bytes; with `root`, that it is the pinned root's.

    Raises EnvelopeError: `root_changed`, `wrong_signer`, `malformed` for a repeated key or a window
    that ends before it begins, otherwise as `open_signed` does.
    """
    found = codec.open_signed(data, KeyList, network=network)
    message = found.message
    if found.signer != message.root:
        raise EnvelopeError("wrong_signer", "The key list is not signed by the root it names.")
    if root is not None and found.signer != root:
        raise EnvelopeError("root_changed")
    peers = {key.peer for key in message.keys}
    if len(peers) != len(message.keys) or message.root in peers:
        raise EnvelopeError("malformed", "The key list repeats a key, or holds its own root.")
    if any(key.not_after <= key.not_before for key in message.keys):
        raise EnvelopeError("malformed", "A key of the list ends before it begins.")
    return found


def check(
    data: bytes, *, network: str, now: float, held: Signed[KeyList] | None = None
) -> Signed[KeyList]:
    """The list to go on with: a newer one than `held`, or `held` itself.

    Raises EnvelopeError as `open_list` does, `list_stale` for a list that goes back or contradicts
    the held one, `not_yet_valid` for one from the future.
    """
    found = open_list(data, network=network, root=held.signer if held is not None else None)
    if found.message.issued_at > now + CLOCK_SKEW_S:
        raise EnvelopeError("not_yet_valid", "The key list is dated in the future.")
    if held is None or found.message.seq > held.message.seq:
        return found
    # A signature may be made twice, so what was signed is compared, not the envelope.
    if found.message == held.message:
        return held
    raise EnvelopeError("list_stale")


def is_valid(key: SigningKey, now: float) -> bool:
    """Whether what the key signs at this time counts."""
    revoked = key.revoked_at and now >= key.revoked_at
    return not revoked and key.not_before - CLOCK_SKEW_S <= now <= key.not_after + CLOCK_SKEW_S


def valid(message: KeyList, *, now: float) -> frozenset[str]:
    """The peer ids of the keys that count at this time."""
    return frozenset(key.peer for key in message.keys if is_valid(key, now))


def stands_for(message: KeyList | None, signer: str, named: str) -> bool:
    """Whether a key signs for the coordinator that a document names: it is that key, or both are of
    the list. Money must come to rest whatever happened to the key that was named."""
    listed = {key.peer for key in message.keys} if message is not None else set()
    return signer == named or {signer, named} <= listed


def never_revoked(message: KeyList) -> frozenset[str]:
    """The keys under which a head of the log counts: a thief can date back what it signs, but its
    log is no other's."""
    return frozenset(key.peer for key in message.keys if not key.revoked_at)


def newest(message: KeyList, *, now: float) -> str | None:
    """The valid key that was begun last: the one that new agreements name. None: there is none."""
    # Signing early for the skew of others would meet those whose clocks are behind.
    usable = [key for key in message.keys if key.not_before <= now and is_valid(key, now)]
    return max(usable, key=lambda key: (key.not_before, key.peer)).peer if usable else None


def is_another(data: bytes, held: TrustedKeys, *, coordinator: str, network: str) -> bool:
    """Whether a coordinator and its list (empty: it has none) have nothing in common with the one
    known: another root, other keys. A changed root alone is no new coordinator; it is refused.
    Raises EnvelopeError."""
    if not data:
        return coordinator not in held.ever
    found = open_list(data, network=network)
    named = {coordinator, *(key.peer for key in found.message.keys)}
    return found.signer not in held.roots and named.isdisjoint(held.ever)


class TrustedKeys(Set[PeerId]):
    """The keys of one coordinator that count now. What shares it follows a rotation at once.

    `coordinator` is the key that was met first; it counts alone until a list is known.
    """

    def __init__(
        self,
        coordinator: str,
        *,
        network: str,
        clock: Callable[[], float],
        data: bytes = b"",
    ) -> None:
        self._first, self._network, self._clock = PeerId(coordinator), network, clock
        self._held = open_list(data, network=network) if data else None

    @property
    def data(self) -> bytes:
        """The list in force, to be kept; empty when none is known."""
        return self._held.data if self._held is not None else b""

    @property
    def roots(self) -> frozenset[PeerId]:
        """The pinned root, when a list is known."""
        return frozenset((self._held.signer,)) if self._held is not None else frozenset()

    @property
    def ever(self) -> frozenset[str]:
        """Every key that the coordinator is known to have had."""
        listed = self._held.message.keys if self._held is not None else ()
        return frozenset((self._first, *(key.peer for key in listed)))

    def meet(self, coordinator: str, data: bytes) -> None:
        """Take in what a coordinator says of itself: its key, and its list if it has one.

        Raises EnvelopeError as `learn` does, `list_stale` when a list was known and none is shown,
        `wrong_signer` for a key that the list does not name.
        """
        if data:
            self.learn(data)
        elif self._held is not None:
            raise EnvelopeError("list_stale", "The coordinator shows no key list any more.")
        if coordinator not in self:
            raise EnvelopeError("wrong_signer", "The coordinator's key is not in its own list.")

    def learn(self, data: bytes) -> bool:
        """Take in a list; whether it is another one. Raises EnvelopeError as `check` does, and
        `wrong_signer` for a first list that does not name the key that was met."""
        found = check(data, network=self._network, now=self._clock(), held=self._held)
        if self._held is None and self._first not in valid(found.message, now=self._clock()):
            raise EnvelopeError("wrong_signer", "The key list does not name its coordinator.")
        fresh = found is not self._held
        self._held = found
        return fresh

    def signed(self, document: bytes) -> bool:
        """Whether a key that counts now is named as the signer of a document that was checked when
        it came, such as our own certificate."""
        try:
            return envelope.decode(document).signer in self
        except EnvelopeError:
            return False

    def _now(self) -> frozenset[str]:
        if self._held is None:
            return frozenset((self._first,))
        return valid(self._held.message, now=self._clock())

    def __contains__(self, peer: object) -> bool:
        return peer in self._now()

    def __iter__(self) -> Iterator[PeerId]:
        return map(PeerId, sorted(self._now()))

    def __len__(self) -> int:
        return len(self._now())
