"""What an upload that was cut off leaves behind, and for how long."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import trio

from lumaris_node.inputs import Inputs
from lumaris_overlay.bulk.part import part_path
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.simulated.stream import stream_pair
from lumaris_protocol import ids
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import BLOB_CHUNK_BYTES_MAX, CHUNK_BYTES
from lumaris_protocol.protocols import BLOB, BlobHeader, BlobReply

DATA = bytes(range(256)) * (CHUNK_BYTES // 128)  # two chunks
HEADER = BlobHeader(
    session="ses_" + "a" * 24, op="put", sha256=ids.digest(DATA), size_bytes=len(DATA)
)


async def send(inputs: Inputs, *, end_at: int) -> int:
    """Upload from where the node wants to, up to `end_at` bytes; where that was, in chunks."""
    near, far = stream_pair(PeerId("seller"), PeerId("buyer"), BLOB)
    first = -1

    async def take() -> None:
        with suppress(trio.BrokenResourceError):
            await inputs.take(HEADER, FramedStream(far))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        stream = FramedStream(near)
        first = (await stream.expect_header(BlobReply)).first
        for at in range(first * CHUNK_BYTES, end_at, BLOB_CHUNK_BYTES_MAX):
            await stream.send(Kind.DATA, DATA[at : min(at + BLOB_CHUNK_BYTES_MAX, end_at)])
        if end_at == len(DATA):
            await stream.send(Kind.END)
            assert (await stream.expect_header(BlobReply)).state == "stored"
        else:
            while near._outward.buffer:  # what was sent is on its way to the disk
                await trio.sleep(0.001)
        await near.aclose()
    return first


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path, disk_bytes=0)


async def test_an_upload_goes_on_while_its_order_waits(inputs: Inputs, tmp_path: Path):
    with trio.fail_after(20), inputs.wanting({HEADER.sha256: len(DATA)}):
        assert await send(inputs, end_at=CHUNK_BYTES + CHUNK_BYTES // 2) == 0
        assert [path.name for path in tmp_path.iterdir()] == [
            part_path(inputs.path(HEADER.sha256), HEADER.sha256).name
        ]
        assert inputs.kept_bytes == 0
        assert await send(inputs, end_at=len(DATA)) == 1
    assert inputs.kept_bytes == len(DATA)
    assert inputs.path(HEADER.sha256).read_bytes() == DATA
    assert len(list(tmp_path.iterdir())) == 1


async def test_what_is_left_goes_with_its_order(inputs: Inputs, tmp_path: Path):
    with trio.fail_after(20), inputs.wanting({HEADER.sha256: len(DATA)}):
        await send(inputs, end_at=CHUNK_BYTES + CHUNK_BYTES // 2)
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
