"""Files between two programs that have a link: the direct listener is the link's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from lumaris_overlay.bulk.fetch import get_file
from lumaris_overlay.bulk.gate import BulkGate
from lumaris_overlay.bulk.put import put_file
from lumaris_overlay.bulk.serve import give_file, take_file
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.links import LinkedOverlay, open_links
from lumaris_overlay.ports import OverlayStream
from lumaris_overlay.simulated import open_network
from lumaris_protocol.frames import Kind
from lumaris_protocol.protocols import BLOB, BlobHeader, BlobReply
from tests.overlay.bulk.world import SESSION, WAIT_S, chunks, digest
from tests.overlay.world import KEYS, NETWORK, key_of

pytestmark = pytest.mark.slow


class CountingGate(BulkGate):
    """Counts the connections it takes."""

    accepted = 0

    async def accept(self, *arguments: object) -> None:
        self.accepted += 1
        await super().accept(*arguments)  # type: ignore[arg-type]


@asynccontextmanager
async def linked(
    gate: BulkGate, folder: Path, *, listen: tuple[str, int] | None
) -> AsyncIterator[tuple[LinkedOverlay, str]]:
    """A buyer's overlay, and the peer id of a seller that keeps its files in `folder`."""

    async def serve(stream: OverlayStream) -> None:
        framed = FramedStream(stream)
        header = await framed.expect_header(BlobHeader)
        path = folder / header.sha256[-8:]
        if header.op == "get":
            await give_file(framed, header, path)
        else:
            await take_file(framed, header, path)
            await framed.send(Kind.HEADER, msgspec.json.encode(BlobReply(state="stored")))

    async with open_network(NETWORK, KEYS) as network:
        buyer, seller = network.host(key_of("buyer")), network.host(key_of("seller"))
        await buyer.connect([seller.address])
        async with (
            open_links(seller, listen=listen, gate=gate) as far,
            open_links(buyer, listen=None, answer=False) as near,
            far.serve(BLOB, serve),
        ):
            yield near, far.peer_id


async def migrated(overlay: LinkedOverlay, peer: str) -> None:
    """Until lanes say where the peer can be dialled."""
    while True:
        stream = await overlay.open_stream(peer, BLOB)
        there = stream.direct is not None
        await stream.reset()
        if there:
            return
        await trio.sleep(0.005)


@pytest.mark.parametrize("listen", [("127.0.0.1", 0), None], ids=["direct", "lane"])
async def test_files_over_a_link(tmp_path: Path, listen: tuple[str, int] | None):
    gate, data = CountingGate(), chunks(3, 7)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(data)
    with trio.fail_after(WAIT_S):
        async with linked(gate, tmp_path, listen=listen) as (overlay, peer):
            if listen is not None:
                await migrated(overlay, peer)
            await put_file(overlay, peer, SESSION, source, sha256=digest(data))
            assert (tmp_path / digest(data)[-8:]).read_bytes() == data
            await get_file(
                overlay, peer, SESSION, target, sha256=digest(data), size_bytes=len(data)
            )
    assert target.read_bytes() == data
    assert gate.accepted == (2 if listen else 0)
