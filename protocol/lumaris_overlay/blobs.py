"""Files between two peers: a header, chunks, and a hash that must come out right.

Both ends know the hash and the size before the first byte; a receiver never keeps more than that,
and a file stands under its final name only when its hash was checked.
"""

from __future__ import annotations

import hashlib
import secrets
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from lumaris_overlay.framed_stream import FramedStream, read_refusal
from lumaris_overlay.ports import Overlay
from lumaris_protocol.errors import EnvelopeError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import BLOB_CHUNK_BYTES_MAX
from lumaris_protocol.protocols import BLOB, BlobHeader, BlobReply

# A peer that sends or takes nothing for this long is gone.
_STALL_S = 30


async def put_file(overlay: Overlay, peer: str, session: str, source: Path, *, sha256: str) -> None:
    """Send a file to the seller of a session. Raises RemoteError, or OSError for our own file."""
    size_bytes = (await trio.Path(source).stat()).st_size
    header = BlobHeader(session=session, op="put", sha256=sha256, size_bytes=size_bytes)
    stream = FramedStream(await overlay.open_stream(peer, BLOB))
    try:
        await stream.send(Kind.HEADER, msgspec.json.encode(header))
        reply = await _reply(stream)
        if reply.state == "ready":
            await send_chunks(stream, source)
            await _reply(stream)
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
        raise RefusedError("unreachable", "The seller went away during an upload.") from None
    finally:
        await stream.aclose()


async def get_file(
    overlay: Overlay, peer: str, session: str, target: Path, *, sha256: str, size_bytes: int
) -> None:
    """Fetch a delivered file into `target`. Raises RemoteError; then `target` does not exist."""
    header = BlobHeader(session=session, op="get", sha256=sha256, size_bytes=size_bytes)
    stream = FramedStream(await overlay.open_stream(peer, BLOB))
    try:
        await stream.send(Kind.HEADER, msgspec.json.encode(header))
        await _reply(stream)
        await receive_chunks(stream, target, sha256=sha256, size_bytes=size_bytes)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise RefusedError("unreachable", "The seller went away during a download.") from None
    finally:
        await stream.aclose()


async def send_chunks(stream: FramedStream, source: Path) -> None:
    """Send a file's bytes as DATA frames and an END."""
    async with await trio.open_file(source, "rb") as file:
        while data := await file.read(BLOB_CHUNK_BYTES_MAX):
            with trio.fail_after(_STALL_S):
                await stream.send(Kind.DATA, data)
    await stream.send(Kind.END)


async def receive_chunks(
    stream: FramedStream, target: Path, *, sha256: str, size_bytes: int
) -> None:
    """Write DATA frames aside and move them to `target` once size and hash are right.

    Raises EnvelopeError `oversize` or RefusedError `output_mismatch`; nothing is left behind.
    """
    part = target.with_name(f".{secrets.token_hex(8)}.part")
    hasher, received = hashlib.sha256(), 0
    try:
        async with await trio.open_file(part, "wb") as file:
            while True:
                with trio.fail_after(_STALL_S):
                    frame = await stream.receive()
                if frame is None:
                    raise EnvelopeError("truncated", "The file ended early.")
                if frame.kind == Kind.END:
                    break
                if frame.kind == Kind.REFUSAL:
                    raise read_refusal(frame.body)
                if frame.kind != Kind.DATA:
                    raise EnvelopeError("malformed", "Not a part of a file.")
                received += len(frame.body)
                if received > size_bytes:
                    raise EnvelopeError("oversize", "The file is longer than announced.")
                hasher.update(frame.body)
                await file.write(frame.body)
        if received != size_bytes or f"sha256:{hasher.hexdigest()}" != sha256:
            raise RefusedError("output_mismatch", "A transferred file does not match its hash.")
        await trio.Path(part).rename(target)
    except trio.TooSlowError:
        raise RefusedError("unreachable", "The other side stalled in a transfer.") from None
    finally:
        with trio.CancelScope(shield=True), suppress(FileNotFoundError):
            await trio.Path(part).unlink()


async def _reply(stream: FramedStream) -> BlobReply:
    try:
        with trio.fail_after(_STALL_S):
            return await stream.expect_header(BlobReply)
    except trio.TooSlowError:
        raise RefusedError("unreachable", "The seller does not answer a transfer.") from None
