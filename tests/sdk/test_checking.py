"""Which drawn seller a disputed order is run on next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lumaris import checking
from lumaris_protocol import pleading
from lumaris_protocol.errors import LumarisError


class Desk:
    """Our sessions by the seller they were bought of, each with the agreement that we signed."""

    key = SimpleNamespace(peer_id="us")

    def __init__(self, **sessions: str) -> None:
        self._sessions = sessions

    async def sessions_with(self, seller: str) -> list[str]:
        return [name for name, of in self._sessions.items() if of == seller]

    async def papers(self, session: str) -> Any:
        return SimpleNamespace(by_buyer=session.encode())


async def test_each_drawn_replica_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bytes] = []
    monkeypatch.setattr(pleading, "shown_by", lambda file, party: SimpleNamespace(documents=shown))
    desk: Any = Desk(first="a", other="b")
    file: Any = None
    drawn = ("a", "b", "c")
    assert await checking._next_replica(desk, file, drawn) == ("a",)
    shown.append(b"first")
    assert await checking._next_replica(desk, file, drawn) == ("b",)
    shown.append(b"other")
    assert await checking._next_replica(desk, file, drawn) == ("c",)
    with pytest.raises(LumarisError, match="not_disputable"):
        await checking._next_replica(desk, file, drawn[:2])
