"""The buyer's records on this machine; nobody is contacted."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import trio

from lumaris import profile as profiles
from lumaris.cli.options import Settings
from lumaris.store import Store
from lumaris_protocol import codec, receipts
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.messages.receipt import Receipt

if TYPE_CHECKING:
    from lumaris.membership import Standing

T = TypeVar("T")


def state_folder(settings: Settings) -> Path:
    """Where the buyer's profile is, without touching it."""
    return Path(settings.state or os.environ.get("LUMARIS_STATE") or profiles.default_state())


def read_store(folder: Path, work: Callable[[Store], Awaitable[T]]) -> T | None:
    """Read the buyer's records; None when there are none yet. Raises LumarisError."""
    database = folder / "buyer.db"
    try:
        if not database.exists():
            return None
    except OSError as error:
        raise LumarisError("not_writable", f"{database}: {error.strerror}") from None

    async def read() -> T:
        store = Store(database)
        try:
            return await work(store)
        finally:
            store.close()

    return trio.run(read)


def standing_of(folder: Path) -> Standing | None:
    """What the coordinator last told this buyer, if anything."""
    from lumaris.membership import Standing

    try:
        return msgspec.json.decode((folder / "membership.json").read_bytes(), type=Standing)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def open_receipt(data: bytes) -> Receipt:
    """The receipt in a receipt file. Raises LumarisError."""
    bundle = receipts.decode_bundle(data)
    return codec.open_signed(bundle.receipt, Receipt, network=bundle.network).message
