"""The generic cell rate algorithm: one number for each caller says all about its past."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What a bucket said. Times are seconds; `retry_after_s` is 0 where it was allowed."""

    policy: str
    allowed: bool
    burst: int
    window_s: int
    left: int
    retry_after_s: int


class Buckets:
    """A bucket per name that fills at `rate` a second up to `burst`; a full one is not kept.

    At most `size` names are held: beyond, the one unused for longest is forgotten.
    """

    def __init__(self, policy: str, *, rate: float, burst: int, size: int) -> None:
        self.policy, self._rate, self._burst, self._size = policy, rate, burst, size
        # Until when each bucket lacks something: the theoretical arrival time.
        self._until: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def take(self, name: str, *, now: float, rate: float = 0.0, cost: int = 1) -> Outcome:
        """Take from a name's bucket, when it holds as much; `rate` counts in place of the usual."""
        outcome, until = self._look(name, now, rate or self._rate, cost)
        if outcome.allowed and cost:
            self._until[name] = until
            self._until.move_to_end(name)
            while len(self._until) > self._size:
                self._until.popitem(last=False)
        return outcome

    def give_back(self, name: str, *, now: float) -> None:
        """Undo one `take`."""
        until = self._until.get(name)
        if until is None:
            return
        if until - 1 / self._rate <= now:
            del self._until[name]
        else:
            self._until[name] = until - 1 / self._rate

    def peek(self, name: str, *, now: float) -> Outcome:
        """What `take` would say."""
        return self._look(name, now, self._rate, 1)[0]

    def _look(self, name: str, now: float, rate: float, cost: int) -> tuple[Outcome, float]:
        fill_s = self._burst / rate
        # A clock that went back must not lock anybody out for longer than a whole bucket takes.
        known = min(max(self._until.get(name, now), now), now + fill_s)
        until = known + cost / rate
        late = until - now - fill_s
        allowed = late <= 1e-9
        spent = (until if allowed else known) - now
        left = max(0, math.floor(self._burst - spent * rate + 1e-6))
        retry = 0 if allowed else max(1, math.ceil(late))
        outcome = Outcome(self.policy, allowed, self._burst, math.ceil(fill_s), left, retry)
        return outcome, until
