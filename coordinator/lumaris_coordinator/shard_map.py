"""The shard map: read from the operator's file, never taken back, served signed at /v1/shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lumaris_coordinator.bounds import SHARD_MAP_RENEWED_S, SHARD_MAP_SIGNED_S
from lumaris_coordinator.http import OCTETS, coordinator_of
from lumaris_coordinator.store.port import Connection, first
from lumaris_protocol import codec, shards
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import EnvelopeError, LumarisError
from lumaris_protocol.limits import SHARD_MAP_BYTES_MAX
from lumaris_protocol.messages.shard_map import Shard, ShardMap

if TYPE_CHECKING:
    from lumaris_coordinator.context import Context

router = APIRouter(tags=["shards"])

_SETTING = "shard_map"


class MapFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the operator writes."""

    version: int
    shards: tuple[Shard, ...]


class ShardMaps:
    """The map in force. Raises LumarisError `config_invalid` for a file that is none."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._map = shards.default_map(context.settings.network)
        self._signed: Signed[ShardMap] | None = None
        if context.settings.shard_map is not None:
            self._map = self._checked(_read(context.settings.shard_map))
            self.signed()

    def start(self, connection: Connection) -> None:
        """An operation: go on with the map of last time, or replace it by a newer one.

        Raises LumarisError `config_invalid` when the file would take a version back.
        """
        row = first(connection, "SELECT value FROM setting WHERE name = ?", (_SETTING,))
        kept = msgspec.json.decode(row[0], type=MapFile) if row is not None else None
        if self._context.settings.shard_map is None:
            if kept is not None:
                self._map = self._checked(kept)
                self._signed = None
            return
        ours = MapFile(self._map.version, self._map.shards)
        if kept is not None and kept.version >= ours.version and kept != ours:
            raise LumarisError(
                "config_invalid",
                f"The shard map's file has version {ours.version}, but version {kept.version} was"
                " served already and says something else.",
                hint="Raise the version in the file.",
            )
        connection.execute(
            "INSERT INTO setting (name, value) VALUES (?, ?)"
            " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (_SETTING, msgspec.json.encode(ours).decode()),
        )

    def signed(self) -> bytes:
        """The map as a signed document, at most an hour old and signed with the key of now.

        Raises LumarisError `config_invalid` when it is larger than such a document may be.
        """
        now, key = self._context.now(), self._context.key
        held = self._signed
        if held is not None and held.signer != key.peer_id:
            held = None
        if held is None or not 0 <= now - held.message.issued_at < SHARD_MAP_RENEWED_S:
            fresh = msgspec.structs.replace(
                self._map, issued_at=now, expires_at=now + SHARD_MAP_SIGNED_S
            )
            try:
                held = codec.sign(fresh, key, self._context.settings.network)
            except ValueError as error:
                raise LumarisError("config_invalid", f"The shard map: {error}.") from None
            self._signed = held
        return held.data

    def _checked(self, file: MapFile) -> ShardMap:
        found = msgspec.structs.replace(self._map, version=file.version, shards=file.shards)
        try:
            shards.check(found)
        except EnvelopeError as error:
            raise LumarisError("config_invalid", f"The shard map: {error.message}") from None
        return found


@router.get("/v1/shards", response_class=Response, responses={200: {"content": {OCTETS: {}}}})
async def shard_map(request: Request) -> Response:
    """The signed shard map: one shard for everything unless the operator divided the market."""
    data = coordinator_of(request).shard_maps.signed()
    return Response(data, headers={"Cache-Control": "no-cache"}, media_type=OCTETS)


def _read(path: Path) -> MapFile:
    try:
        with path.open("rb") as file:
            text = file.read(SHARD_MAP_BYTES_MAX + 1)
    except OSError as error:
        raise LumarisError("config_invalid", f"{path}: {error.strerror}.") from None
    if len(text) > SHARD_MAP_BYTES_MAX:
        raise LumarisError("config_invalid", f"{path} is longer than {SHARD_MAP_BYTES_MAX} bytes.")
    try:
        found = msgspec.json.decode(text, type=MapFile)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise LumarisError("config_invalid", f"{path} is no shard map: {error}.") from None
    if found.version < 1 or not found.shards:
        raise LumarisError("config_invalid", f"{path}: a version from 1 and shards are needed.")
    return found
