"""Passwords, as argon2id: slow on purpose, so only a few at a time and few may wait.

Strangers who register wait in a line of their own, so they keep nobody from logging in, and of one
caller only a few may stand in a line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final, TypeVar

import anyio
from anyio import to_thread
from nacl import pwhash
from nacl.exceptions import InvalidkeyError

from lumaris_coordinator.bounds import (
    PASSWORDS_AT_ONCE_MAX,
    PASSWORDS_PER_CALLER_MAX,
    PASSWORDS_WAITING_MAX,
    REGISTRATIONS_AT_ONCE_MAX,
)
from lumaris_protocol.errors import LumarisError

T = TypeVar("T")

_ARGON: Final = pwhash.argon2id


class _Line:
    """Runs calls in threads, so many at once; those that wait are counted from the first moment."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._limiter: anyio.CapacityLimiter | None = None
        self._callers: Counter[str] = Counter()

    async def run(self, caller: str, call: Callable[[], T]) -> T:
        """Wait and call. Raises LumarisError `busy`, for one `caller` ("" is nobody in particular)
        sooner than for all."""
        if self._callers.total() >= self._at_once + PASSWORDS_WAITING_MAX:
            raise LumarisError("busy", "Too many passwords are being checked.")
        if caller and self._callers[caller] >= PASSWORDS_PER_CALLER_MAX:
            raise LumarisError("busy", "Too many passwords of yours are being checked.")
        if self._limiter is None:  # it belongs to the event loop, which begins after us
            self._limiter = anyio.CapacityLimiter(self._at_once)
        self._callers[caller] += 1
        try:
            return await to_thread.run_sync(call, limiter=self._limiter)
        finally:
            self._callers[caller] -= 1
            if not self._callers[caller]:
                del self._callers[caller]


class Passwords:
    """Hashes and checks passwords in threads."""

    def __init__(
        self, *, ops: int = _ARGON.OPSLIMIT_INTERACTIVE, memory: int = _ARGON.MEMLIMIT_INTERACTIVE
    ) -> None:
        self._ops, self._memory = ops, memory
        self._logins = _Line(PASSWORDS_AT_ONCE_MAX)
        self._registrations = _Line(REGISTRATIONS_AT_ONCE_MAX)
        self._nobody: bytes | None = None

    async def hash(self, password: str, *, caller: str = "", known: bool = False) -> str:
        """What is kept of a password, of somebody new or `known`. Raises LumarisError `busy`."""
        line, data = self._logins if known else self._registrations, password.encode()
        return (await line.run(caller, lambda: self._hash(data))).decode()

    async def check(self, kept: str | None, password: str, *, caller: str = "") -> bool:
        """Whether it is the password. Without a kept one it costs the same and is False.

        Raises LumarisError `busy`.
        """
        held, data = kept.encode() if kept else b"", password.encode()
        return await self._logins.run(caller, lambda: self._check(held, data))

    def _hash(self, password: bytes) -> bytes:
        return _ARGON.str(password, opslimit=self._ops, memlimit=self._memory)

    def _check(self, kept: bytes, password: bytes) -> bool:
        # Made once, whoever asks first, so that the first unknown name takes no longer either.
        if self._nobody is None:
            self._nobody = self._hash(b"nobody")
        try:
            return pwhash.verify(kept or self._nobody, password) and bool(kept)
        except InvalidkeyError:
            return False
