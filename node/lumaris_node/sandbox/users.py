"""The kernel users that guests and our own confined programs run as: every number is here, once.

The kernel counts some things by user over the whole machine (signals, watches, locked memory), and
lets a user signal its own processes; so what does not belong together shares no number.
"""

from __future__ import annotations

import os
import threading

from lumaris_protocol.errors import LumarisError

# What a native guest sees itself as; the users outside a user namespace are GUESTS.
GUEST = 10001
WASM_GUEST = 10002
COMPILER = 10003
CHALLENGE = 10004
EMULATOR = 10005
# One for each sandbox that has a user namespace. More sandboxes than this run on no machine.
GUESTS = range(10100, 10612)


class UserPool:
    """Kernel users lent to one sandbox each. Its methods may be called from any thread."""

    def __init__(self, users: range = GUESTS) -> None:
        self._lock = threading.Lock()
        # Another node of this machine begins elsewhere; one just given back is lent last.
        first = int.from_bytes(os.urandom(4), "big") % len(users)
        self._free: list[int] = [*users[first:], *users[:first]]

    def take(self) -> int:
        """A user that no other sandbox of this node has. Raises LumarisError `platform_error`."""
        with self._lock:
            if not self._free:
                raise LumarisError("platform_error", "This machine runs too many sandboxes.")
            return self._free.pop(0)

    def give(self, user: int) -> None:
        """Give one back; nothing of it may live."""
        with self._lock:
            self._free.append(user)
