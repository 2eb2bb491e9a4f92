"""Where signed notices go once they are true: an in-process list of listeners, often empty."""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class Notices:
    """Hands each notice to whoever passes them on. Called from the event loop's thread only."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[bytes], None]] = []

    def listen(self, listener: Callable[[bytes], None]) -> None:
        """Have each notice from now on; the listener must return at once."""
        self._listeners.append(listener)

    def publish(self, notice: bytes) -> None:
        """Pass a signed notice on. What a listener raises is logged: the notice stands anyway."""
        for listener in self._listeners:
            try:
                listener(notice)
            except Exception:
                log.exception("a notice could not be passed on")
