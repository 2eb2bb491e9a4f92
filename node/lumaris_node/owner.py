"""The owner comes first: pausing by hand, and the hours in which this machine sells.

A pause freezes what runs, and lasts for jobs only so long: then their sessions end, and cost what
was vouchered. Outside its hours the node takes no new work and leaves what runs alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

import trio

from lumaris_node.config import DAYS, Schedule

log = logging.getLogger(__name__)

# A frozen job holds its buyer's work and our memory: the buyer is better served elsewhere then.
PAUSE_S_MAX: Final = 600
_LOOK_S: Final = 1.0
_REASON: Final = "paused_by_owner"


class _Host(Protocol):
    def end(self, reason: str) -> None: ...


class _Sessions(Protocol):
    @property
    def hosts(self) -> tuple[_Host, ...]: ...
    def pause_by_owner(self, *, paused: bool) -> None: ...


class _Adverts(Protocol):
    withdrawn_for: str

    def changed(self, *, always: bool = False) -> None: ...


class Owner:
    """What the owner wants of this machine now. `clock` is the wall clock, in seconds."""

    def __init__(
        self,
        sessions: _Sessions,
        adverts: _Adverts,
        schedule: Schedule,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._sessions, self._adverts = sessions, adverts
        self._schedule, self._clock = schedule, clock
        self._paused_at: float | None = None  # by trio's clock
        self._ended = False
        self._apply()

    @property
    def paused(self) -> bool:
        """Whether the owner has paused the node by hand."""
        return self._paused_at is not None

    @property
    def selling(self) -> bool:
        """Whether new work is taken now."""
        return not self.paused and is_open(self._schedule, self._now())

    async def run(self) -> None:
        """Follow the hours, and end what is frozen for too long."""
        while True:
            await trio.sleep(_LOOK_S)
            self._apply()
            if self._paused_at is None or self._ended:
                continue
            if trio.current_time() - self._paused_at > PAUSE_S_MAX:
                self._ended = True
                for host in self._sessions.hosts:
                    host.end("killed_owner")

    async def pause(self) -> dict[str, Any]:
        """Freeze every job and take no new work; pausing again changes nothing."""
        if self._paused_at is None:
            self._paused_at, self._ended = trio.current_time(), False
            self._sessions.pause_by_owner(paused=True)
            self._apply()
            log.info("paused by the owner sessions=%d", len(self._sessions.hosts))
        return self.status()

    async def resume(self) -> dict[str, Any]:
        """Let jobs go on, and take new work if the hours allow it."""
        if self._paused_at is not None:
            self._paused_at = None
            self._sessions.pause_by_owner(paused=False)
            self._apply()
            log.info("resumed by the owner sessions=%d", len(self._sessions.hosts))
        return self.status()

    def status(self) -> dict[str, Any]:
        """For the owner, the sentence first."""
        sessions = len(self._sessions.hosts)
        frozen = f"{sessions} session{'' if sessions == 1 else 's'}"
        text = "Selling."
        if self._paused_at is not None:
            left_s = max(0, round(self._paused_at + PAUSE_S_MAX - trio.current_time()))
            text = f"Paused: nothing is sold, {frozen} frozen"
            text += f" and ended in {left_s} s." if sessions else "."
        elif not self.selling:
            text = f"Outside its hours: no new work; {frozen} running to the end."
        return {"status": text, "paused": self.paused, "selling": self.selling}

    def _apply(self) -> None:
        reason = "" if self.selling else _REASON
        if self._adverts.withdrawn_for != reason:
            self._adverts.withdrawn_for = reason
            self._adverts.changed(always=True)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock())  # noqa: DTZ006 - hours are the owner's own


def is_open(schedule: Schedule, now: datetime) -> bool:
    """Whether new work is taken at a local time."""
    if not schedule.hours:
        return DAYS[now.weekday()] in schedule.days
    return any(_within(hours, schedule, now) for hours in schedule.hours)


def _within(hours: str, schedule: Schedule, now: datetime) -> bool:
    begin, end = (_minutes(text) for text in hours.split("-"))
    minute = now.hour * 60 + now.minute
    today = DAYS[now.weekday()] in schedule.days
    if begin < end:
        return today and begin <= minute < end
    yesterday = DAYS[(now - timedelta(days=1)).weekday()] in schedule.days
    return (today and minute >= begin) or (yesterday and minute < end)


def _minutes(text: str) -> int:
    hour, minute = text.split(":")
    return int(hour) * 60 + int(minute)
