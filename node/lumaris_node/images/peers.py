"""Images and modules between sellers, by hash: `/lumaris/content/1`.

Only members of the network reach this. What an owner put here himself is given only if he said
so; what came from elsewhere is anyone's already. Whoever takes a file checks its hash.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import trio

from lumaris_node.images.content import ContentStore, ImageRecord, Piece
from lumaris_overlay.bulk.ask import Source
from lumaris_overlay.bulk.fetch import fetch_file
from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.bulk.serve import give_file
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.image_archive import CONFIG_BYTES_MAX, parse_config
from lumaris_overlay.ports import Overlay, OverlayStream
from lumaris_protocol.errors import EnvelopeError, LumarisError, RefusedError, RemoteError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import (
    BULK_SOURCES_MAX,
    FILE_BYTES_MAX,
    GIB,
    IMAGE_BYTES_MAX,
    MODULE_BYTES_MAX,
)
from lumaris_protocol.protocols import (
    CONTENT,
    BlobHeader,
    ContentHeader,
    ContentPart,
    ContentParts,
)

log = logging.getLogger(__name__)

_HEADER_S = 10.0
_ANSWER_S = 20.0
# One image of 128 layers from this seller, several times over; then two questions a second.
_ASKS_BURST, _ASKS_PER_S = 500.0, 2.0
# The largest image at once, then 1 GiB a minute: a fleet shares, nobody is drained. Twice, since
# who takes a file from several asks each for the list of its hashes first, and then for ranges.
_GIVEN_BURST, _GIVEN_PER_S = 2.0 * IMAGE_BYTES_MAX, 2 * GIB / 60
_PEERS_MAX = 1024
# The directory's first adverts come at once; this long after the last one they are all there.
_QUIET_S, _LOOK_S = 0.2, 2.0

# Where a module that may be given lies; None for any other digest.
FindModule = Callable[[str], Path | None]


class _Budget:
    """What one peer may still ask for; both grow with time."""

    def __init__(self, now: float) -> None:
        self._asks, self._bytes, self._at = _ASKS_BURST, _GIVEN_BURST, now

    def take(self, size: int, now: float) -> bool:
        passed, self._at = now - self._at, now
        self._asks = min(_ASKS_BURST, self._asks + passed * _ASKS_PER_S)
        self._bytes = min(_GIVEN_BURST, self._bytes + passed * _GIVEN_PER_S)
        if self._asks < 1 or self._bytes < size:
            return False
        self._asks, self._bytes = self._asks - 1, self._bytes - size
        return True


class ContentDesk:
    """Answers other sellers from what is kept here."""

    def __init__(
        self, store: ContentStore, *, module: FindModule, rate: Rate | None = None
    ) -> None:
        self._store, self._module, self._rate = store, module, rate
        self._budgets: dict[str, _Budget] = {}  # the peer that asked last at the end

    async def serve(self, stream: OverlayStream) -> None:
        """One question."""
        framed = FramedStream(stream)
        try:
            with trio.fail_after(_HEADER_S):
                header = await framed.expect_header(ContentHeader)
            size = header.size_bytes if header.op == "get" else 0
            if not self._budget(stream.peer).take(size, trio.current_time()):
                raise RefusedError("busy", "This seller has given you much; try again later.")
            if header.op == "parts":
                await self._tell_parts(framed, header.digest)
            else:
                await self._give(framed, header)
        except (LumarisError, trio.TooSlowError) as error:
            refusal = error if isinstance(error, LumarisError) else EnvelopeError("truncated")
            await framed.refuse(refusal)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        except OSError as error:  # it was dropped to make room
            log.info("content not given error=%r", error)
            await framed.refuse(RefusedError("not_found", "That is no longer here."))

    async def _tell_parts(self, stream: FramedStream, digest: str) -> None:
        found = await trio.to_thread.run_sync(self._parts_of, digest)
        parts = tuple(ContentPart(digest=part.digest, size_bytes=part.size) for part in found)
        await stream.send(Kind.HEADER, msgspec.json.encode(ContentParts(parts=parts)))

    async def _give(self, stream: FramedStream, header: ContentHeader) -> None:
        path = await trio.to_thread.run_sync(self._path_of, header.digest)
        asked = BlobHeader(
            session="",
            op="get",
            sha256=header.digest,
            size_bytes=header.size_bytes,
            direct=header.direct,
            listed=header.listed,
        )
        with self._store.pin([header.digest]):
            await give_file(stream, asked, path, rate=self._rate)

    def _parts_of(self, digest: str) -> tuple[Piece, ...]:
        """Raises RefusedError `not_found`: also for what is here and private."""
        module = self._module(digest)
        if module is not None:
            return (Piece(digest, module.stat().st_size),)
        record = self._store.find(digest)
        if record is None or not record.share:
            raise RefusedError("not_found", "This seller has no such image to give.")
        return record.parts

    def _path_of(self, digest: str) -> Path:
        module = self._module(digest)
        if module is not None:
            return module
        for record in self._store.records():
            if record.share and any(part.digest == digest for part in record.parts):
                return self._store.path(digest)
        raise RefusedError("not_found", "This seller has no such file to give.")

    def _budget(self, peer: str) -> _Budget:
        budget = self._budgets.pop(peer, None) or _Budget(trio.current_time())
        self._budgets[peer] = budget
        while len(self._budgets) > _PEERS_MAX:
            self._budgets.pop(next(iter(self._budgets)))
        return budget


async def holders(overlay: Overlay, digest: str) -> tuple[str, ...]:
    """Sellers whose adverts name the digest; at most as many as a file is fetched from."""
    found: dict[str, None] = {}
    word = digest.encode()  # adverts are JSON, carried as it was written
    with trio.move_on_after(_LOOK_S):
        async with overlay.adverts() as adverts:
            while len(found) < BULK_SOURCES_MAX:
                event = None
                with trio.move_on_after(_QUIET_S):
                    event = await adverts.receive()
                if event is None:
                    break
                if event.envelope is None or word not in event.envelope:
                    found.pop(event.seller, None)
                elif event.seller != overlay.peer_id:
                    found[event.seller] = None
    return tuple(found)


async def ask_parts(overlay: Overlay, peer: str, digest: str) -> tuple[Piece, ...]:
    """What the parts of an image or module are, as a peer says. Raises RemoteError."""
    try:
        with trio.fail_after(_ANSWER_S):
            stream = FramedStream(await overlay.open_stream(peer, CONTENT))
            try:
                header = ContentHeader(op="parts", digest=digest)
                await stream.send(Kind.HEADER, msgspec.json.encode(header))
                answer = await stream.expect_header(ContentParts)
            finally:
                await stream.aclose()
    except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError):
        raise RefusedError("unreachable", "The peer does not answer.") from None
    parts = tuple(Piece(part.digest, part.size_bytes) for part in answer.parts)
    if parts[0].digest != digest or sum(part.size for part in parts) > IMAGE_BYTES_MAX:
        raise EnvelopeError("malformed", "The peer names the parts of another image.")
    return parts


async def fetch_image(
    overlay: Overlay,
    peers: Sequence[str],
    image: str,
    store: ContentStore,
    *,
    progress: Callable[[int, int], None],
) -> ImageRecord:
    """Fetch an image's parts from peers that say they hold it, into the store.

    That the layers are the image's is known when it is unpacked. Room is made for each part when
    it is its turn, so that peers who name much and give nothing take the room of one. Raises
    LumarisError: RemoteError when no peer gave it, `disk_short`.
    """
    parts, sources = await _agreed_parts(overlay, peers, image)
    if len(parts) < 2 or parts[0].size > CONFIG_BYTES_MAX:
        raise EnvelopeError("malformed", "The peers name parts that no image has.")
    missing = [part for part in dict.fromkeys(parts) if not store.has(part.digest)]
    if any(part.size > FILE_BYTES_MAX for part in missing):
        raise RefusedError("oversize", "A layer is larger than peers give to each other.")
    total = sum(part.size for part in parts)
    done = total - sum(part.size for part in missing)
    with store.pin(part.digest for part in parts):
        for part in missing:
            progress(done, total)
            await trio.to_thread.run_sync(store.make_room, part.size)
            await fetch_file(
                sources, store.path(part.digest), sha256=part.digest, size_bytes=part.size
            )
            done += part.size
            if part.digest == image:
                await trio.to_thread.run_sync(_check_layers, store.path(image), len(parts) - 1)
        record = ImageRecord(image=image, config_bytes=parts[0].size, layers=parts[1:], share=True)
        await trio.to_thread.run_sync(store.save, record)
    return record


def _check_layers(config: Path, count: int) -> None:
    """The image's own configuration says how many layers it has."""
    if len(parse_config(config.read_bytes()).diff_ids) != count:
        raise EnvelopeError("malformed", "The peers name parts that the image does not have.")


async def fetch_module(overlay: Overlay, peers: Sequence[str], digest: str, target: Path) -> None:
    """Fetch a module from peers. Raises RemoteError, LumarisError `disk_short`."""
    parts, sources = await _agreed_parts(overlay, peers, digest)
    if len(parts) != 1 or parts[0].size > MODULE_BYTES_MAX:
        raise EnvelopeError("malformed", "The peers name parts that no module has.")
    await fetch_file(sources, target, sha256=digest, size_bytes=parts[0].size)


async def _agreed_parts(
    overlay: Overlay, peers: Sequence[str], digest: str
) -> tuple[tuple[Piece, ...], list[Source]]:
    """The parts that most of the peers name, and the peers that name them."""
    answers: dict[tuple[Piece, ...], list[Source]] = {}
    failures: list[RemoteError] = []

    async def ask_one(peer: str) -> None:
        try:
            found = await ask_parts(overlay, peer, digest)
        except RemoteError as error:
            failures.append(error)
        else:
            answers.setdefault(found, []).append(Source(overlay, peer))

    async with trio.open_nursery() as nursery:
        for peer in peers[:BULK_SOURCES_MAX]:
            nursery.start_soon(ask_one, peer)
    if not answers:
        raise failures[0] if failures else RefusedError("not_found", "No peer holds it.")
    return max(answers.items(), key=lambda item: len(item[1]))
