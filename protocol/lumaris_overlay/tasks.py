"""A nursery for a service's background tasks, and the log that strangers cannot flood."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

_SEEN_MAX = 1_024
_FORGET_S = 3600.0


@asynccontextmanager
async def background() -> AsyncGenerator[trio.Nursery]:
    """A nursery that is cancelled when the body ends.

    Its tasks guard themselves, so the only failure is the body's own, which leaves unwrapped: a
    caller sees the error that was raised, not a group around it.
    """
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) != 1:
            raise
        failure = first_of(group)
    if failure is not None:
        raise failure


def first_of(error: BaseException) -> BaseException:
    """The first error in a group, however deep; an error that is no group is itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def shielded(seconds: float) -> trio.CancelScope:
    """A scope for cleaning up: not cancelled from outside, but bounded in time."""
    return trio.CancelScope(deadline=trio.current_time() + seconds, shield=True)


class StrangerLog:
    """Logs what strangers do wrong: once per peer and kind, and never without bound."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._seen: set[tuple[str, str]] = set()
        self._fresh_since = time.monotonic()

    def note(self, peer: str, kind: str, detail: object = "") -> None:
        """Say once that `peer` did `kind`."""
        if (peer, kind) in self._seen:
            return
        if len(self._seen) >= _SEEN_MAX:
            # New names are free, so a crowd of them gets no more lines than this in a while.
            if time.monotonic() - self._fresh_since < _FORGET_S:
                return
            self._seen.clear()
            self._fresh_since = time.monotonic()
        self._seen.add((peer, kind))
        self._logger.warning("stranger peer=%s kind=%s detail=%.200r", peer, kind, str(detail))
