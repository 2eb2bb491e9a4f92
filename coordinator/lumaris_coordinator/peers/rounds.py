"""Rounds of witnessing: the newest head of the log is cosigned by peers and told to everybody.

What is asked and what an answer means is decided beside the store (`receipts.witnesses`); only the
exchange itself runs in the overlay's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio

from lumaris_coordinator.bounds import WITNESS_EVERY_S, WITNESS_ROUNDS_MAX, WITNESS_START_S_MAX
from lumaris_coordinator.receipts.witnesses import (
    Gathered,
    Highest,
    Memory,
    Witnesses,
    exchange,
    highest_seen,
)
from lumaris_overlay.ports import Overlay
from lumaris_protocol.errors import LumarisError

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context

log = logging.getLogger(__name__)

T = TypeVar("T")
_RETRY_S = 0.5


class Call(Protocol):
    """Runs work where the overlay is."""

    async def __call__(self, work: Callable[[Overlay], Awaitable[T]]) -> T:
        """Raises LumarisError `overlay_failed` or `timeout`."""
        ...


class WitnessRounds:
    """Has each new head cosigned, at most every `WITNESS_EVERY_S`."""

    def __init__(self, context: Context, witnesses: Witnesses, call: Call) -> None:
        self._context, self._witnesses, self._call = context, witnesses, call
        self._told = ""  # the head that everybody was told of

    async def run(self) -> None:
        """Go on until cancelled. What fails is tried again with the next round.

        Raises LumarisError `log_behind` when witnesses saw what is not in this log.
        """
        if not self._context.settings.witnesses_required:
            try:
                await self.check_start()
            except LumarisError as error:
                if error.code == "log_behind":
                    raise
                log.warning("witnesses of before not asked code=%s", error.code)
        while True:
            await anyio.sleep(WITNESS_EVERY_S)
            try:
                await self.round()
            except LumarisError as error:
                log.info("log not witnessed code=%s", error.code)
            except Exception:
                log.exception("log not witnessed")

    async def round(self) -> Gathered:
        """Have the newest head cosigned if that was not done; who did. Raises LumarisError."""
        gathered = Gathered()
        head = await self._head()
        if head is None or head == self._told:
            return gathered
        asks = await self._witnesses.ask(await self._peers())
        for _ in range(WITNESS_ROUNDS_MAX):
            if not asks:
                break
            asked = partial(_exchange, asks, gathered)
            asks = await self._witnesses.take(await self._call(asked), gathered)
        if gathered.cosigned:
            self._told = head
        self._context.notices.publish(await self._witnesses.notice())
        return gathered

    async def check_start(self) -> None:
        """The witnesses that we know have seen nothing of the log that is not here.

        Waits for the overlay, `WITNESS_START_S_MAX` at most. Raises LumarisError `log_behind`.
        """
        known = await self._witnesses.known()
        required = self._context.settings.witnesses_required
        if not known and not required:
            return
        look = partial(_highest, known, await self._witnesses.memory())
        found = Highest(0, ())
        with anyio.move_on_after(WITNESS_START_S_MAX):
            while found.answered < max(1, required) and not found.unknown:
                try:
                    found = await self._call(look)
                except LumarisError as error:
                    log.debug("witnesses not asked yet code=%s", error.code)
                await anyio.sleep(_RETRY_S)
        if not found.answered:
            log.warning("no witness of the log could be asked what it saw")
        await self._witnesses.require_current(found)

    async def _head(self) -> str | None:
        """The text of the newest head and our key; None while the log is empty.

        Under another key it is cosigned again: witnesses must not be left with a head whose
        signature was revoked, which tells a later start nothing.
        """
        text = (await self._witnesses.checkpoint()).partition("\n\n")[0]
        return None if text.split("\n")[1:2] == ["0"] else f"{text}\n{self._context.peer}"

    async def _peers(self) -> tuple[str, ...]:
        """The witnesses of before, then whoever is connected: any peer may become one."""
        connected = await self._call(_connected)
        return tuple(dict.fromkeys((*await self._witnesses.known(), *connected)))


async def _exchange(asks: Any, gathered: Gathered, overlay: Overlay) -> Any:
    return await exchange(overlay.open_stream, asks, gathered)


async def _highest(known: tuple[str, ...], memory: Memory, overlay: Overlay) -> Highest:
    return await highest_seen(overlay.open_stream, known, memory)


async def _connected(overlay: Overlay) -> list[str]:
    return [info.peer for info in await overlay.peers()]
