"""Asking a provider: every wait for one has an end."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import anyio

from lumaris_coordinator.bounds import PROVIDER_S_MAX

T = TypeVar("T")


async def asked(answer: Awaitable[T]) -> T:
    """The provider's answer. Raises TimeoutError when it does not come in PROVIDER_S_MAX."""
    with anyio.fail_after(PROVIDER_S_MAX):
        return await answer
