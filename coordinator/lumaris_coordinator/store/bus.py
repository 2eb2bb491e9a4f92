"""The wake-up after a commit, so that whoever follows a table need not ask it over and over.

It only says that there may be something new. What there is stands in the tables, so a wake-up that
is lost or comes twice harms nobody.
"""

from __future__ import annotations

import anyio


class Bus:
    """Counts the wake-ups. Take `count` before you read, and wait for more than that."""

    def __init__(self) -> None:
        self.count = 0
        self._next = anyio.Event()

    def wake(self) -> None:
        """Something was committed, here or by another replica. Called in the event loop."""
        self.count += 1
        event, self._next = self._next, anyio.Event()
        event.set()

    async def woken(self, after: int) -> int:
        """Wait until there were more than `after` wake-ups; how many there were."""
        while self.count <= after:
            await self._next.wait()
        return self.count
