"""A download that never finishes leaves nothing in the buyer's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lumaris_overlay.bulk.part import part_path
from lumaris_protocol.errors import RefusedError
from tests import market as m
from tests.market import Market

pytestmark = [pytest.mark.slow, pytest.mark.planet]


async def test_parts_end_with_their_order(market: Market, tmp_path: Path):
    (tmp_path / "a").write_bytes(b"words")
    await market.seller()
    parts: list[Path] = []

    async def lost(*to: Any, sha256: str, **_: Any) -> None:
        parts.append(part_path(to[-1], sha256))
        parts[-1].write_bytes(b"wo")
        raise RefusedError("unreachable", "The seller went away during a download.")

    async with market.buyer() as buyer:
        request = market.request(m.COPY, inputs={"a": tmp_path / "a"})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lumaris.session.get_file", lost)
            result = await buyer.run(request)
        assert (result.reason, result.cost_nanos) == ("unreachable", 0)
        assert len(parts) == 1
        assert not parts[0].exists()
        assert (await buyer.run(request)).ok
