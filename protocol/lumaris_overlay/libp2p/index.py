"""`/lumaris/index/1`: how a newcomer gets the whole directory in one exchange.

The asker sends a HEADER {after, count, shards, wanted}, then its own newest documents as ENVELOPE
frames, then END. The answer is a HEADER {next}, ENVELOPE frames and END. Both directions carry
signed adverts, so neither side trusts the other for more than bytes; each is checked as if it came
by gossip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import msgspec
import trio
from msgspec import Meta

from lumaris_overlay.advert_filter import AdvertFacts, AdvertFilter, passes
from lumaris_overlay.directory import Directory
from lumaris_overlay.frame_reader import FrameReader
from lumaris_overlay.ports import OverlayStream
from lumaris_protocol import frames, protocols
from lumaris_protocol.errors import EnvelopeError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import (
    ADVERT_BYTES_MAX,
    INDEX_PAGE_ADVERTS_MAX,
    SHARDS_MAX,
)
from lumaris_protocol.messages.shard_map import ShardId

PROTOCOL = protocols.INDEX
# One side's own documents in a push: a host sells under one key; tests and relays hold a few.
PUSHED_MAX = 16
_EXCHANGE_S = 20.0
_FRAME_MAX = ADVERT_BYTES_MAX + 64
_WRITE_BYTES = 128 * 1024
# Checking an advert costs two signatures; let other tasks run between batches.
_BATCH = 16

Take = Callable[[bytes], object]
Among = Callable[[tuple[int, ...], AdvertFacts], bool]
H = TypeVar("H")


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the asker wants: up to `count` documents of sellers behind `after`.

    Without shards those of all are meant; `wanted` leaves out what cannot fit the asker's needs.
    """

    after: Annotated[str, Meta(max_length=64)] = ""
    count: Annotated[int, Meta(ge=0, le=INDEX_PAGE_ADVERTS_MAX)] = 0
    shards: Annotated[tuple[ShardId, ...], Meta(max_length=SHARDS_MAX)] = ()
    wanted: AdvertFilter = AdvertFilter()


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the next page begins; "" when there is none."""

    next: Annotated[str, Meta(max_length=64)] = ""


_QUERY = msgspec.json.Decoder(Query)
_ANSWER = msgspec.json.Decoder(Answer)


async def exchange(stream: OverlayStream, query: Query, own: Sequence[bytes], take: Take) -> Answer:
    """One page: send the query and our documents, take the answer's documents.

    Raises EnvelopeError when the peer breaks the format, trio.TooSlowError when it stalls.
    """
    with trio.fail_after(_EXCHANGE_S):
        out = frames.encode(Kind.HEADER, msgspec.json.encode(query))
        out += b"".join(frames.encode(Kind.ENVELOPE, data) for data in own[:PUSHED_MAX])
        await stream.send_all(out + frames.encode(Kind.END))
        reader = FrameReader(stream, size_max=_FRAME_MAX)
        answer = _decode(_ANSWER, await reader.expect(Kind.HEADER))
        await _take_documents(reader, query.count, take)
    return answer


async def serve(stream: OverlayStream, directory: Directory, take: Take, among: Among) -> None:
    """Answer one exchange. `among` says whether an advert is in one of the shards asked for.

    Raises EnvelopeError when the peer breaks the format.
    """
    with trio.fail_after(_EXCHANGE_S):
        reader = FrameReader(stream, size_max=_FRAME_MAX)
        query = _decode(_QUERY, await reader.expect(Kind.HEADER))
        await _take_documents(reader, PUSHED_MAX, take)
        documents, cursor = directory.page(
            query.after, query.count, lambda facts: _admits(query, facts, among)
        )
        out = bytearray(frames.encode(Kind.HEADER, msgspec.json.encode(Answer(cursor))))
        for data in documents:
            out += frames.encode(Kind.ENVELOPE, data)
            if len(out) >= _WRITE_BYTES:
                await stream.send_all(bytes(out))
                out = bytearray()
        await stream.send_all(bytes(out) + frames.encode(Kind.END))
        await stream.send_eof()


def _admits(query: Query, facts: AdvertFacts, among: Among) -> bool:
    return passes(query.wanted, facts) and (not query.shards or among(query.shards, facts))


async def _take_documents(reader: FrameReader, count_max: int, take: Take) -> None:
    for number in range(count_max + 1):
        frame = await reader.next()
        if frame is None:
            raise EnvelopeError("truncated", "The index exchange ended early.")
        if frame.kind == Kind.END:
            return
        if frame.kind != Kind.ENVELOPE or number == count_max:
            break
        take(frame.body)
        if number % _BATCH == _BATCH - 1:
            await trio.lowlevel.checkpoint()
    raise EnvelopeError("malformed", "The index exchange carries something else than was asked.")


def _decode(decoder: msgspec.json.Decoder[H], body: bytes) -> H:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise EnvelopeError("malformed", "The index header is not understood.") from None
