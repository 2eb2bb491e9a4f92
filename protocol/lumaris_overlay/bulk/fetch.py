"""Fetching a file from a peer, or from several at once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from lumaris_overlay.bulk import ask as asking
from lumaris_overlay.bulk import wire as wires
from lumaris_overlay.bulk.ask import Exchange, Patience, Source, ask
from lumaris_overlay.bulk.assembly import Assembly, Dropped
from lumaris_overlay.bulk.lane import lane_wire
from lumaris_overlay.bulk.part import Part, open_part
from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.bulk.serve import end_attempt
from lumaris_overlay.bulk.threads import in_thread, together
from lumaris_overlay.bulk.wire import DIGEST_BYTES, Cut, Stalled, Wire
from lumaris_overlay.ports import Overlay
from lumaris_protocol.errors import LumarisError, RefusedError, RemoteError
from lumaris_protocol.limits import BULK_SOURCES_MAX, CHUNK_BYTES, KIB
from lumaris_protocol.protocols import BlobHeader

# Once one source has named its hashes, the others have this long; a seller hashes 1 GiB in 1-2 s.
_LIST_GRACE_S = 5.0
_ASKED_AHEAD = 2  # ranges on their way: the next is asked for before this one is here
# A group of sources that agree is left for another one when it brought less than this for so long.
_POOR_BYTES_PER_S = 256 * KIB
_PATIENCE_S = 8.0


async def get_file(
    overlay: Overlay,
    peer: str,
    session: str,
    target: Path,
    *,
    sha256: str,
    size_bytes: int,
    rate: Rate | None = None,
) -> None:
    """Fetch a delivered file into `target`, as `fetch_file` does from one source."""
    await fetch_file(
        [Source(overlay, peer, session)],
        target,
        sha256=sha256,
        size_bytes=size_bytes,
        rate=rate,
    )


async def fetch_file(
    sources: Sequence[Source],
    target: Path,
    *,
    sha256: str,
    size_bytes: int,
    rate: Rate | None = None,
) -> None:
    """Fetch a file from whichever sources have it; `target` exists only when its hash is right.

    Raises RemoteError when no source gave it, LumarisError `disk_short` or `not_writable`. Whole
    chunks stay beside the target for the next call, unless they were shown to be wrong.
    """
    if not 1 <= len(sources) <= BULK_SOURCES_MAX:
        raise ValueError(f"{len(sources)} sources")
    part = await trio.to_thread.run_sync(
        partial(open_part, target, sha256=sha256, size_bytes=size_bytes)
    )
    fetch = _Fetch(sources, part, rate)
    keep = True
    try:
        await fetch.run()
        await trio.to_thread.run_sync(part.finish, target)
    except LumarisError as error:
        keep = error.code == "unreachable"
        raise
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(end_attempt, fetch.assembly, part, keep)


class _Fetch:
    def __init__(self, sources: Sequence[Source], part: Part, rate: Rate | None) -> None:
        self._sources, self._part, self._rate = sources, part, rate
        self._trio = trio.lowlevel.current_trio_token()
        self._changed = trio.Event()
        self._failures: list[LumarisError] = []
        self.assembly = Assembly(part, sources=len(sources), changed=self._poke)

    async def run(self) -> None:
        """Until the file is complete. Raises what kept it from being so."""
        assembly = self.assembly
        await in_thread(assembly.resume, stop=assembly.give_up)
        self._raise_local()
        if assembly.complete:
            return
        if len(self._sources) == 1:
            await self._fetch_from([0])
        else:
            lists = await self._lists()
            groups: dict[bytes, list[int]] = {}
            for source, chunk_list in lists.items():
                groups.setdefault(chunk_list, []).append(source)
            await self._fetch_in_turn(groups)
        if not assembly.complete:
            raise self._worst()

    # --- several sources ---

    async def _lists(self) -> dict[int, bytes]:
        """What each source says the hashes of the file's beginnings are."""
        lists: dict[int, bytes] = {}

        async def ask_one(source: int, scope: trio.CancelScope) -> None:
            try:
                found = await self._list_of(source)
            except (Cut, trio.BrokenResourceError, trio.ClosedResourceError):
                self._failures.append(_gone())
            except RemoteError as error:
                self._failures.append(error)
            else:
                if f"sha256:{found[-DIGEST_BYTES:].hex()}" != self._part.sha256:
                    self._failures.append(_lied())
                    return
                lists[source] = found
                scope.deadline = min(scope.deadline, trio.current_time() + _LIST_GRACE_S)

        with trio.move_on_after(2 * wires.STALL_S) as scope:
            async with trio.open_nursery() as nursery:
                for source in range(len(self._sources)):
                    nursery.start_soon(ask_one, source, scope)
        return lists

    async def _list_of(self, source: int) -> bytes:
        header, patience = self._header(source, listed=True), Patience()
        while True:
            try:
                async with ask(self._sources[source], header) as exchange:
                    return await exchange.receive_list(self._part.count)
            except RemoteError as error:
                if error.code not in asking.RETRY_CODES or not await patience.wait():
                    raise

    async def _fetch_in_turn(self, groups: dict[bytes, list[int]]) -> None:
        """From sources that agree, one group after the other: at most one list is right.

        A group that is slow makes room for the others and comes again later, for longer: one that
        lies must not hold the fetch, and the right one may have a slow line.
        """
        # The largest group first: only a guess, and a cheap one.
        waiting = deque(sorted(groups, key=lambda found: -len(groups[found])))
        patience_s = dict.fromkeys(groups, _PATIENCE_S)
        while waiting and not self.assembly.complete:
            chunk_list = waiting.popleft()
            await in_thread(partial(self.assembly.follow, chunk_list), stop=self.assembly.give_up)
            limit_s = patience_s[chunk_list] if waiting else math.inf
            left = await self._fetch_from(groups[chunk_list], patience_s=limit_s)
            if left:
                groups[chunk_list] = left
                patience_s[chunk_list] *= 2
                waiting.append(chunk_list)

    async def _fetch_from(self, group: list[int], *, patience_s: float = math.inf) -> list[int]:
        """Until the file is complete or no source of the group is left.

        Or until little that is right came for so long; then the sources that are left.
        """
        left, slow = set(group), False

        async def work(source: int) -> None:
            try:
                await self._serve_source(source)
            finally:
                left.discard(source)
                self._poke_here()

        async def watch() -> None:
            nonlocal slow
            bytes_min = self._poor_bytes_per_s * patience_s
            while True:
                before = self.assembly.frontier
                await trio.sleep(patience_s)
                if (self.assembly.frontier - before) * CHUNK_BYTES < bytes_min:
                    slow = True
                    self._poke_here()
                    return

        async with together() as nursery:
            for source in group:
                nursery.start_soon(work, source)
            if patience_s < math.inf:
                nursery.start_soon(watch)
            while not (slow or self.assembly.complete or self.assembly.error) and left:
                await self._changed.wait()
                self._changed = trio.Event()
            remaining = [] if self.assembly.complete else sorted(left)
        self._raise_local()
        return remaining

    # --- one source ---

    async def _serve_source(self, source: int) -> None:
        """Take chunks from a source until all are here or it fails."""
        tries, patience = 0, None
        while True:
            before = self.assembly.received
            try:
                await self._attempt(source, direct=tries < asking.DIRECT_TRIES)
                return
            except Dropped:
                self._failures.append(_lied())
                return
            except Stalled:
                stalled = RefusedError("unreachable", "The seller stalled in a download.")
                self._failures.append(stalled)
                return
            except Cut:
                self._failures.append(_gone())
            except LumarisError as error:
                if error.code in asking.RETRY_CODES:
                    patience = patience or Patience()
                    if await patience.wait():
                        continue
                self._failures.append(error)
                return
            patience = None
            tries = 1 if self.assembly.received > before else tries + 1
            if tries > asking.RETRIES:
                return
            await asking.pause(tries)

    async def _attempt(self, source: int, *, direct: bool) -> None:
        header = self._header(source)
        async with ask(self._sources[source], header, direct=direct) as exchange:
            wire = await exchange.dial(self._rate)
            if wire is None:
                await self._pull_on_lane(exchange, source)
                return
            try:
                await self._pull(wire, source)
            except Stalled:
                raise
            except Cut:
                await exchange.raise_last_word()
                raise
            finally:
                wire.close()

    async def _pull_on_lane(self, exchange: Exchange, source: int) -> None:
        async with lane_wire(
            exchange.stream, bytes_max=lambda wire: wire.expected_bytes, rate=self._rate
        ) as lane:
            try:
                await self._pull(lane.wire, source)
            except Cut:
                if lane.ended:
                    raise _lied() from None
                raise

    async def _pull(self, wire: Wire, source: int) -> None:
        assembly = self.assembly
        assembly.join(source)

        def stop() -> None:
            wire.stop()
            assembly.halt(source)

        await in_thread(partial(_pull, wire, assembly, source), stop=stop)

    # --- details ---

    @property
    def _poor_bytes_per_s(self) -> float:
        cap = math.inf if self._rate is None else self._rate.bytes_per_s / 2
        return min(_POOR_BYTES_PER_S, cap)

    def _header(self, source: int, *, listed: bool = False) -> BlobHeader:
        return BlobHeader(
            session=self._sources[source].session,
            op="get",
            sha256=self._part.sha256,
            size_bytes=self._part.size_bytes,
            listed=listed,
        )

    def _poke(self) -> None:
        """From the assembly's thread."""
        with suppress(trio.RunFinishedError):
            self._trio.run_sync_soon(self._poke_here, idempotent=True)

    def _poke_here(self) -> None:
        self._changed.set()

    def _raise_local(self) -> None:
        if self.assembly.error is not None:
            raise self.assembly.error

    def _worst(self) -> LumarisError:
        """The failure that says most: a lie before a refusal before an absence."""
        rank = {"output_mismatch": 0, "oversize": 0, "unreachable": 2}
        return min(self._failures, key=lambda error: rank.get(error.code, 1), default=_gone())


def _pull(wire: Wire, assembly: Assembly, source: int) -> None:
    """In a thread: ask for what is missing, the next before the last is here."""
    asked: deque[tuple[int, int]] = deque()
    try:
        while True:
            while len(asked) < _ASKED_AHEAD:
                found = assembly.take(source, wait=not asked)
                if found is None:
                    break
                wire.ask(*found, assembly.part.size_bytes)
                asked.append(found)
            if not asked:
                return
            assembly.receive(wire, source, *asked.popleft())
    finally:
        assembly.leave(source)


def _gone() -> LumarisError:
    return RefusedError("unreachable", "The seller went away during a download.")


def _lied() -> LumarisError:
    return RefusedError("output_mismatch", "A transferred file does not match its hash.")
