"""Passwords, as argon2id: slow on purpose, so only a few at a time and few may wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

import anyio
from anyio import to_thread
from nacl import pwhash
from nacl.exceptions import InvalidkeyError

from lumaris_coordinator.bounds import PASSWORDS_AT_ONCE_MAX, PASSWORDS_WAITING_MAX
from lumaris_protocol.errors import LumarisError

T = TypeVar("T")

_ARGON: Final = pwhash.argon2id


class Passwords:
    """Hashes and checks passwords in threads."""

    def __init__(
        self, *, ops: int = _ARGON.OPSLIMIT_INTERACTIVE, memory: int = _ARGON.MEMLIMIT_INTERACTIVE
    ) -> None:
        self._ops, self._memory = ops, memory
        self._limiter: anyio.CapacityLimiter | None = None
        self._nobody: bytes | None = None

    async def hash(self, password: str) -> str:
        """What is kept of a password. Raises LumarisError `busy`."""
        return (await self._run(self._hash, password.encode())).decode()

    async def check(self, kept: str | None, password: str) -> bool:
        """Whether it is the password. Without a kept one it costs the same and is False.

        Raises LumarisError `busy`.
        """
        return await self._run(self._check, kept.encode() if kept else b"", password.encode())

    async def _run(self, call: Callable[..., T], *values: object) -> T:
        if self._limiter is None:  # it belongs to the event loop, which begins after us
            self._limiter = anyio.CapacityLimiter(PASSWORDS_AT_ONCE_MAX)
        if self._limiter.statistics().tasks_waiting >= PASSWORDS_WAITING_MAX:
            raise LumarisError("busy", "Too many passwords are being checked.")
        return await to_thread.run_sync(call, *values, limiter=self._limiter)

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
