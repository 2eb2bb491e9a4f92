"""/v1/receipts, /log: the log is public, in the form of C2SP tlog-tiles."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Final

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from lumaris_coordinator.edge import read_body
from lumaris_coordinator.http import (
    BEARER,
    OCTETS,
    caller_of,
    coordinator_of,
    json_response,
)
from lumaris_coordinator.receipts import tree
from lumaris_coordinator.store.port import Connection
from lumaris_protocol import merkle, tiles
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.limits import CHECKPOINT_CHARS_MAX, SEQ_MAX
from lumaris_protocol.tiles import TileName

router = APIRouter(tags=["receipts"])

LogSize = Annotated[int, Query(ge=1, le=SEQ_MAX)]
# A tile never changes once it is there.
_FOR_EVER: Final = {"Cache-Control": "public, max-age=31536000, immutable"}
_NOTE: Final = {
    "requestBody": {
        "required": True,
        "description": "A checkpoint of this log with cosignatures (C2SP tlog-cosignature).",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
}


@router.get("/v1/receipts/{receipt}", openapi_extra=BEARER)
async def receipt(request: Request) -> Response:
    """The receipt file, for the session's parties, under the best cosigned checkpoint there is."""
    name = request.path_params["receipt"]
    found = await coordinator_of(request).receipts.bundle_of(name, await caller_of(request))
    return Response(found, media_type="application/json", headers={"Cache-Control": "no-store"})


@router.get("/log/checkpoint")
async def checkpoint(request: Request) -> Response:
    """The newest signed head of the log with its cosignatures (C2SP tlog-checkpoint)."""
    note = await coordinator_of(request).witnesses.checkpoint()
    return PlainTextResponse(note, headers={"Cache-Control": "no-cache"})


@router.get("/log/consistency")
async def consistency(request: Request, old: LogSize, new: LogSize) -> Response:
    """{old, new, hashes}: the log of `new` leaves extends the log of `old` (RFC 6962)."""
    coordinator = coordinator_of(request)
    path = await coordinator.store.read(partial(coordinator.log.consistency, old=old, new=new))
    hashes = [merkle.digest_of_hash(node) for node in path]
    return json_response({"old": old, "new": new, "hashes": hashes})


@router.get("/log/tile/{name:path}")
async def tile(request: Request) -> Response:
    """A tile of hashes (`<level>/<n>`) or of entries (`entries/<n>`), with `.p/<width>` for one
    that is not full (C2SP tlog-tiles). An entry is the salted commitment to a receipt."""
    found = tiles.parse_path(request.path_params["name"])
    coordinator = coordinator_of(request)
    data = None
    if found is not None:
        data = await coordinator.store.read(partial(_tile, name=found))
    if data is None:
        raise LumarisError("not_found", "The log has no such tile.")
    return Response(data, media_type=OCTETS, headers=_FOR_EVER)


@router.post("/log/add-cosignature", openapi_extra=_NOTE)
async def add_cosignature(request: Request) -> Response:
    """{size, kept}: cosignatures of a head of this log, by members that witness it."""
    body = await read_body(request)
    if len(body) > 4 * CHECKPOINT_CHARS_MAX:
        raise LumarisError("oversize", "The note is too long.")
    try:
        note = body.decode()
    except UnicodeDecodeError:
        raise LumarisError("malformed", "The note is no UTF-8 text.") from None
    return json_response(await coordinator_of(request).witnesses.add(note))


def _tile(connection: Connection, name: TileName) -> bytes | None:
    head = tree.newest(connection)
    return tree.tile_bytes(connection, name, head.size) if head is not None else None
