"""Looking up names that others choose, without keeping the program's own threads."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import partial
from typing import cast

import trio

# A resolver keeps a thread for many seconds when a name's server is silent. These threads are not
# those that the program works with, and whoever chooses names has a share of them.
_LOOKUPS_MAX = 16
_LOOKUPS_EACH_MAX = 4
_all: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("lookups")


class Resolver:
    """This machine's resolver, for one who chooses names. Made and used in a trio program."""

    def __init__(self) -> None:
        self._own = trio.CapacityLimiter(_LOOKUPS_EACH_MAX)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """The IPs of a name, each once. Raises OSError, UnicodeError."""
        found = await trio.to_thread.run_sync(
            partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM),
            abandon_on_cancel=True,
            limiter=cast("trio.CapacityLimiter", _Both(self._own, _of_all())),
        )
        return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


class _Both:
    """Two limiters as one. A lookup nobody waits for any more counts until its thread has ended."""

    def __init__(self, first: trio.CapacityLimiter, second: trio.CapacityLimiter) -> None:
        self._first, self._second = first, second

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        await self._first.acquire_on_behalf_of(borrower)
        try:
            await self._second.acquire_on_behalf_of(borrower)
        except BaseException:
            self._first.release_on_behalf_of(borrower)
            raise

    def release_on_behalf_of(self, borrower: object) -> None:
        self._second.release_on_behalf_of(borrower)
        self._first.release_on_behalf_of(borrower)


def _of_all() -> trio.CapacityLimiter:
    try:
        return _all.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_LOOKUPS_MAX)
        _all.set(limiter)
        return limiter
