"""Which shards one host is in, and why. No I/O but the map's file; time is an argument.

A host is in the shards of the sellers it publishes, and in those that its buyers' latest
requirements need, up to a few; beyond that it asks index peers. A requirement that was not
repeated for a while is forgotten, and the shards only it needed are left. With the undivided map a
host is always in the one shard there is.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lumaris_overlay.advert_filter import AdvertFacts, facts_of
from lumaris_overlay.private_files import write_private_file
from lumaris_protocol import shards
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import ENDPOINT_SHARDS_MAX, SHARD_MAP_BYTES_MAX, SHARDS_FOLLOWED_MAX
from lumaris_protocol.messages.advert import Advert, Resources
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.shards import ShardPlan

logger = logging.getLogger(__name__)

# A buyer that runs jobs now and then keeps its shards; one that has left costs us nothing.
FOLLOW_IDLE_S = 300.0
# Different requirements of one machine's programs; the oldest is forgotten.
_NEEDS_MAX = 16
# A host sells under one key; simulations publish for a few thousand.
_SELLERS_MAX = 20_000


@dataclass(frozen=True)
class Sought:
    """Where the sellers that may fit are: shards that are followed, and shards to be asked."""

    followed: tuple[int, ...]
    asked: tuple[int, ...]


class ShardDesk:
    """The shard map of one host and what follows from it."""

    def __init__(self, network: str, signers: Collection[PeerId], file: Path | None = None) -> None:
        self._network, self._signers, self._file = network, signers, file
        self._plan = ShardPlan(shards.default_map(network))
        self._selling: dict[str, AdvertFacts] = {}
        self._needs: dict[Requirements, float] = {}
        self._followed: tuple[int, ...] = ()
        if file is not None:
            self._load(file)

    @property
    def version(self) -> int:
        """The version of the map in force; 0 for the undivided market."""
        return self._plan.current.version

    def sold_in(self, now: float) -> tuple[int, ...]:
        """The shards of our own sellers, whose directory we hold for others as well."""
        if not self.divided(now):
            return ()
        found = (shard for facts in self._selling.values() for shard in self._of(facts, now))
        return tuple(dict.fromkeys(found))[:ENDPOINT_SHARDS_MAX]

    def divided(self, now: float) -> bool:
        """Whether any map in force has more than one shard."""
        return any(len(each.shards) > 1 for each in self._plan.maps(now))

    def adopt(self, data: bytes, now: float) -> bool:
        """Take a signed map in; whether it divides the market anew. Raises EnvelopeError."""
        known = self._plan.current
        signed = shards.open_map(data, known, network=self._network, signers=self._signers, now=now)
        if signed.message.version == known.version:
            return False
        if self._file is not None:
            try:
                write_private_file(self._file, data)
            except OSError as error:
                # It is told again by the programs; a full disk must not stop the overlay.
                logger.warning("shards event=not_saved error=%s", error)
        if self._selling or self._needs:
            self._plan = self._plan.next(signed.message, now)
        else:  # nobody looks for us where we have not been
            self._plan = ShardPlan(signed.message)
        logger.info("shards event=adopted version=%d", signed.message.version)
        return signed.message.shards != known.shards

    def sell(self, advert: Advert) -> None:
        """A seller publishes here."""
        self._selling.pop(advert.seller, None)
        while len(self._selling) >= _SELLERS_MAX:
            del self._selling[next(iter(self._selling))]
        self._selling[advert.seller] = facts_of(advert)

    def seek(self, needs: Requirements, now: float) -> Sought:
        """A buyer looks for sellers: what to follow from now on, and what to ask for."""
        # Only where it may be matters here, so that all jobs of one kind are one entry.
        place = Requirements(
            resources=Resources(gpus=needs.resources.gpus),
            tier=needs.tier,
            regions=needs.regions,
            currency=needs.currency,
        )
        self._needs.pop(place, None)
        self._needs[place] = now
        while len(self._needs) > _NEEDS_MAX:
            del self._needs[next(iter(self._needs))]
        member = self.joined(now)
        wanted = self._plan.for_buyer(needs, now)
        return Sought(
            tuple(shard for shard in wanted if shard in member),
            tuple(shard for shard in wanted if shard not in member),
        )

    def joined(self, now: float) -> tuple[int, ...]:
        """The shards to be in now."""
        if not self.divided(now):
            return tuple(each.shards[0].id for each in self._plan.maps(now))
        own = [shard for facts in self._selling.values() for shard in self._of(facts, now)]
        return tuple(dict.fromkeys((*own, *self._following(now))))

    def published_in(self, advert: Advert, now: float) -> tuple[int, ...]:
        """The shards in which a seller's advert belongs: one, or two while a new map spreads."""
        return self._plan.of_advert(advert, now)

    def demanded_in(self, needs: Requirements, now: float) -> tuple[int, ...]:
        """The shards whose sellers are asked; the likely ones, when there are many."""
        return self._plan.for_buyer(needs, now)[:SHARDS_FOLLOWED_MAX]

    def belongs(self, facts: AdvertFacts, within: Collection[int], now: float) -> bool:
        """Whether an advert with these facts is in one of these shards."""
        return any(shard in within for shard in self._of(facts, now))

    def _of(self, facts: AdvertFacts, now: float) -> tuple[int, ...]:
        return self._plan.of_seller(facts.region, facts.kind, now)

    def _following(self, now: float) -> tuple[int, ...]:
        for needs, asked_at in list(self._needs.items()):
            if now - asked_at >= FOLLOW_IDLE_S:
                del self._needs[needs]
        wanted = dict.fromkeys(
            shard for needs in reversed(self._needs) for shard in self._plan.for_buyer(needs, now)
        )
        # What is followed stays while anyone wants it: leaving and joining costs a snapshot.
        kept = [shard for shard in self._followed if shard in wanted]
        fresh = [shard for shard in wanted if shard not in kept]
        self._followed = (*kept, *fresh)[:SHARDS_FOLLOWED_MAX]
        return self._followed

    def _load(self, file: Path) -> None:
        try:
            with file.open("rb") as opened:
                data = opened.read(SHARD_MAP_BYTES_MAX + 1)
        except OSError:
            return
        try:
            kept = shards.open_kept(data, network=self._network, signers=self._signers)
        except EnvelopeError as error:
            logger.warning("shards event=unreadable file=%s error=%s", file, error)
            return
        self._plan = ShardPlan(kept.message)
