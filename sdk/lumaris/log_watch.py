"""A buyer's eye on the coordinator's receipts log: every head it is shown must be of one history.

Nothing is signed and nothing asked: the heads in receipts and in the gossip are compared, so a
coordinator that shows this buyer another log than its sellers is found out by either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from lumaris_protocol import codec, witnessing
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import public_key_of
from lumaris_protocol.messages.notice import CheckpointNotice
from lumaris_protocol.notes import log_origin
from lumaris_protocol.witnessing import Evidence, Record

log = logging.getLogger(__name__)


class LogWatch:
    """Remembers the heads of this run of the program, and two that contradict each other."""

    def __init__(self, network: str, coordinators: Callable[[], Iterable[str]]) -> None:
        """`coordinators` are the peer ids whose keys may sign the log."""
        self._network, self._coordinators = network, coordinators
        self._record = Record(origin=log_origin(network))

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """Pairs of signed heads that cannot both be true."""
        return self._record.evidence

    def heard(self, envelope: bytes) -> None:
        """A CheckpointNotice of the gossip. Never raises for what is in it."""
        try:
            signed = codec.open_signed(envelope, CheckpointNotice, network=self._network)
        except LumarisError as error:
            log.warning("checkpoint not taken code=%s", error.code)
            return
        self.shown(signed.message.checkpoint)

    def shown(self, note: str) -> None:
        """A head from a receipt. Never raises for what is in it."""
        keys = [public_key_of(peer) for peer in self._coordinators()]
        try:
            record = witnessing.observe(self._record, note, keys=keys)
        except LumarisError as error:
            log.warning("checkpoint not taken code=%s", error.code)
            return
        for found in record.evidence[len(self._record.evidence) :]:
            log.critical(
                "the coordinator shows two histories of its receipts log:\n%s\n%s",
                found.first,
                found.second,
            )
        self._record = record
