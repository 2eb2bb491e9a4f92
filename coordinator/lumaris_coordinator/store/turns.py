"""Work that one thread hands to the event loop's, and waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lumaris_coordinator.bounds import WRITE_S_MAX
from lumaris_coordinator.store.port import Late


class Turn:
    """One piece of work: post `run` to the event loop and `wait` in the other thread. It is run
    whole or, when the loop does not come to it in time, not at all."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._guard = threading.Lock()
        self._over = threading.Event()
        self._late = False
        self._error: BaseException | None = None

    def run(self) -> None:
        """In the event loop's thread."""
        with self._guard:
            if self._late:
                return
            try:
                self._work()
            except (Exception, Late) as error:
                self._error = error
            except BaseException:
                # It is meant for this thread, and the work is half done.
                self._error = RuntimeError("the event loop was interrupted")
                raise
            finally:
                self._over.set()

    def wait(self) -> None:
        """In the other thread. Raises what the work raises, and TimeoutError."""
        if not self._over.wait(WRITE_S_MAX):
            with self._guard:  # what runs right now is waited for
                self._late = not self._over.is_set()
            if self._late:
                raise TimeoutError(f"the event loop stood still for {WRITE_S_MAX:.0f} s")
        if self._error is not None:
            raise self._error
