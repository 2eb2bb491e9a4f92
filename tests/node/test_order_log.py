"""The log of an order: the whole of it, for every reader, at its own pace."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import trio

from lumaris_node.executors.port import Stream
from lumaris_node.order_log import OrderLog
from lumaris_protocol.limits import LOG_CHUNK_BYTES_MAX


async def read_all(kept: OrderLog, offset: int = 0) -> list[tuple[Stream, bytes]]:
    found: list[tuple[Stream, bytes]] = []
    while await kept.more(offset):
        for stream, data in await kept.read(offset):
            found.append((stream, data))
            offset += len(data)
    return found


def joined(parts: list[tuple[Stream, bytes]]) -> dict[str, bytes]:
    return {
        name: b"".join(data for stream, data in parts if stream == name)
        for name in ("stdout", "stderr")
    }


@pytest.mark.parametrize("seed", range(5))
async def test_what_is_read_is_what_was_said(tmp_path: Path, seed: int):
    rng = random.Random(seed)
    kept = OrderLog(tmp_path / "log", bytes_max=1 << 20)
    said: list[tuple[Stream, bytes]] = []
    for _ in range(40):
        stream: Stream = rng.choice(("stdout", "stderr"))
        data = rng.randbytes(rng.choice((1, 100, 5_000, LOG_CHUNK_BYTES_MAX)))
        await kept.append(stream, data)
        said.append((stream, data))
    kept.end()
    whole = b"".join(data for _, data in said)
    assert kept.size == len(whole)
    assert joined(await read_all(kept)) == joined(said), f"seed={seed}"
    for offset in (0, 1, 65_535, 65_536, 65_537, kept.size - 1, kept.size):
        parts = await read_all(kept, offset)
        assert b"".join(data for _, data in parts) == whole[offset:], f"seed={seed}"
        assert all(len(data) <= LOG_CHUNK_BYTES_MAX for _, data in parts)
    await kept.aclose()
    assert list(tmp_path.iterdir()) == []


async def test_both_streams_at_once(tmp_path: Path):
    """Two pumps write side by side; neither loses a byte."""
    kept = OrderLog(tmp_path / "log")
    said = {name: os.urandom(400_000) for name in ("stdout", "stderr")}

    async def pump(stream: Stream) -> None:
        for start in range(0, len(said[stream]), 7_000):
            await kept.append(stream, said[stream][start : start + 7_000])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump, "stdout")
        nursery.start_soon(pump, "stderr")
    kept.end()
    assert joined(await read_all(kept)) == said
    await kept.aclose()


async def test_the_cap(tmp_path: Path):
    kept = OrderLog(tmp_path / "log", bytes_max=100_000)
    for _ in range(10):
        await kept.append("stdout", b"x" * 30_000)
    assert kept.size == 100_000
    await kept.aclose()


async def test_a_disk_that_is_full_ends_the_log_and_not_the_job(tmp_path: Path):
    kept = OrderLog(tmp_path / "gone" / "log")
    await kept.append("stdout", b"x" * 60_000)
    await kept.append("stdout", b"y" * 60_000)
    await kept.append("stdout", b"z" * 1_000)
    kept.end()
    assert kept.size == 60_000, "a gap would be worse than an early end"
    assert len(await read_all(kept)) == 2
    await kept.aclose()


async def test_a_small_log_touches_no_disk(tmp_path: Path):
    kept = OrderLog(tmp_path / "log")
    await kept.append("stdout", b"x" * 60_000)
    assert list(tmp_path.iterdir()) == []
    await kept.aclose()


async def test_closing_waits_for_readers_but_not_for_ever(tmp_path: Path):
    kept = OrderLog(tmp_path / "log")
    await kept.append("stdout", b"x" * 100_000)
    with kept.reading():
        await kept.aclose(within_s=0.01)
        with pytest.raises(trio.BrokenResourceError):
            await kept.more(10)  # never taken for the end of the log
    assert list(tmp_path.iterdir()) == []
    await kept.aclose()
