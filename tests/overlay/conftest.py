"""Hosts that several files of hostile peers attack."""

from __future__ import annotations

import pytest

from tests.overlay.attackers import friend_of, honest_and_stranger


@pytest.fixture
async def pair():
    async with honest_and_stranger() as found:
        yield found


@pytest.fixture
async def trio_of(pair):
    honest, stranger = pair
    async with friend_of(honest) as friend:
        yield honest, stranger, friend
