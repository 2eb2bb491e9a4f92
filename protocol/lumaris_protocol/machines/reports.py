"""What a seller tells of its orders: every event names its order, and each order has one end.

Only the end and what is shown with it decide a dispute, so the sizes of those papers are kept.
"""

from __future__ import annotations

from lumaris_protocol.effects import Effect, Send
from lumaris_protocol.limits import KEEPALIVE_S
from lumaris_protocol.machines.chain import SendChain
from lumaris_protocol.messages.execution import JobEvent, Usage, WorkState


class Reports:
    """The events of one session, signed onto its chain."""

    def __init__(self, chain: SendChain) -> None:
        self._chain = chain
        # Of orders that something may still be said of: the hash, and what showing it takes.
        self._papers: dict[int, tuple[str, int]] = {}
        self._states: dict[int, WorkState] = {}  # the last said of each live order
        self._said_at = 0.0

    def open(self, n: int, order_hash: str, size_bytes: int) -> None:
        """Order `n` came, in an envelope of this size."""
        self._papers[n] = order_hash, size_bytes

    def speaks_of(self, n: int) -> bool:
        """Whether something may still be said of order `n`."""
        return n in self._papers

    def order_hash(self, n: int) -> str:
        """Of an order that is spoken of. Raises KeyError."""
        return self._papers[n][0]

    def size_bytes(self, n: int) -> int:
        """What showing the order and its delivery takes; 0 for one that is not spoken of."""
        return self._papers.get(n, ("", 0))[1]

    def deliver(self, n: int, size_bytes: int) -> None:
        """The delivery of order `n` takes this much more to show; it is no longer live."""
        name, before = self._papers[n]
        self._papers[n] = name, before + size_bytes
        self._states.pop(n, None)

    def forget(self, n: int) -> None:
        """The buyer has answered: nothing more is said of order `n`."""
        self._papers.pop(n, None)
        self._states.pop(n, None)

    def say(
        self,
        n: int,
        state: WorkState,
        *,
        now: float,
        reason: str = "",
        detail: str = "",
        exit_status: int | None = None,
        missing: tuple[str, ...] = (),
        usage: Usage | None = None,
        done: int = 0,
        total: int = 0,
    ) -> list[Effect]:
        """An event of order `n`; nothing when its end was said before."""
        if n not in self._papers:
            return []
        self._states[n], self._said_at = state, now
        event = self._chain.sign(
            JobEvent,
            n=n,
            order_hash=self._papers[n][0],
            state=state,
            reason=reason,
            detail=detail,
            exit_status=exit_status,
            missing=missing,
            usage=usage or Usage(),
            done=done,
            total=total,
            at=int(now),
        )
        return [Send(event.data)]

    def end(
        self,
        n: int,
        state: WorkState,
        reason: str,
        *,
        now: float,
        usage: Usage | None = None,
        exit_status: int | None = None,
        detail: str = "",
    ) -> list[Effect]:
        """The end of order `n`; nothing more is said of it."""
        effects = self.say(
            n, state, now=now, reason=reason, usage=usage, exit_status=exit_status, detail=detail
        )
        self.forget(n)
        return effects

    def keep_alive(self, n: int, *, now: float) -> list[Effect]:
        """A sign of life of live order `n`: what was last said of it, when that was long ago."""
        if now - self._said_at < KEEPALIVE_S:
            return []
        return self.say(n, self._states.get(n, "accepted"), now=now)
