"""One file being received: which chunk comes from whom, and whether it is right.

Connections put chunks in from their own threads; a thread of the assembly writes them and hashes
them from the front on. A chunk that came early waits on disk for those before it. Nothing is hashed
twice, and each source is held to its own word: the list of hashes it gave.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable
from enum import IntEnum

from lumaris_overlay.bulk.part import Part
from lumaris_overlay.bulk.wire import DIGEST_BYTES, Cut, Wire, chunk_bytes
from lumaris_protocol.errors import RefusedError
from lumaris_protocol.limits import CHUNK_BYTES

# Chunks in memory: those being received, written and hashed, and a little slack between them.
_BUFFERS = 6
# Chunks asked for at once when there are several sources: few, so that a slow one holds up little.
_RANGE_CHUNKS = 8
_LOOK_S = 1.0
_EMPTY = f"sha256:{hashlib.sha256().hexdigest()}"


class _State(IntEnum):
    MISSING = 0
    ASKED = 1
    HERE = 2  # written, and waits for those before it
    RIGHT = 3


_Item = tuple[int, int, bytearray] | threading.Event | None


class Dropped(Exception):  # noqa: N818 - what became of the source
    """The source gave a chunk that its own list denies."""


class Assembly:
    """Thread-safe. `close` must be called; it ends the thread."""

    def __init__(
        self,
        part: Part,
        *,
        sources: int = 1,
        restarts: bool = True,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.part = part
        self.error: Exception | None = None
        self.frontier = 0  # the chunks from the front on that are right
        self._sources, self._restarts, self._changed = sources, restarts, changed
        self._list: bytes | None = None
        self._states = [_State.MISSING] * part.count
        self._owners = [-1] * part.count
        self._twice: dict[int, int] = {}  # chunks asked of a second source
        self._dropped: set[int] = set()
        self._halted: set[int] = set()
        self._hasher = hashlib.sha256()
        self._resumed = 0  # chunks of an earlier attempt: nobody's word stands behind them
        self._closed = False
        self._lock = threading.Condition()
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(min(_BUFFERS * sources, part.count)):
            self._free.put(bytearray(min(CHUNK_BYTES, part.size_bytes)))
        self._full: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        if not part.count and part.sha256 != _EMPTY:
            self.error = RefusedError("output_mismatch", "Nothing at all has another hash.")
        self._thread = threading.Thread(target=self._work, name="bulk-assembly", daemon=True)
        self._thread.start()

    @property
    def complete(self) -> bool:
        """Whether every chunk is right."""
        return self.frontier == self.part.count and self.error is None

    @property
    def received(self) -> int:
        """The chunks that need not be asked for again."""
        with self._lock:
            return sum(state >= _State.HERE for state in self._states)

    def close(self) -> None:
        """End the thread, once it has written what was received."""
        self.give_up()
        self._full.put(None)
        self._thread.join()

    def give_up(self) -> None:
        """Make every waiting call end. From any thread; never blocks for long."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._free.put(bytearray())  # whoever waits for a buffer passes it on to the next

    # --- before the chunks come ---

    def resume(self) -> None:
        """Hash what an earlier attempt left, as far as there is no list that denies it."""
        buffer = bytearray(min(CHUNK_BYTES, self.part.size_bytes))
        for index in range(self.frontier, self.part.whole_chunks):
            if self._closed or not self._extend(index, self.part.read(index, buffer)):
                break
            self._resumed = self.frontier
        self.part.truncate(self.frontier)

    def follow(self, chunk_list: bytes | None) -> None:
        """Hold the sources to come to this list; what it denies, or may deny, is forgotten.

        Only while no source is at work.
        """
        with self._lock:
            before, self._list = self._list, chunk_list
            if chunk_list is None or chunk_list == before:
                return
            # Held to another's list, a source would be dropped for what it never claimed.
            for index in range(self.frontier, self.part.count):
                self._forget(index)
            agreed = self.frontier
            if agreed and _entry(chunk_list, agreed - 1) != self._hasher.digest():
                agreed = _agreement(before, chunk_list, agreed)
        if agreed < self.frontier:
            self._restart(agreed)

    # --- a connection's calls ---

    def join(self, source: int) -> None:
        """A connection of this source begins."""
        with self._lock:
            self._halted.discard(source)

    def halt(self, source: int) -> None:
        """Make the calls of this source's connection end. From any thread."""
        with self._lock:
            self._halted.add(source)
            self._lock.notify_all()

    def take(self, source: int, *, wait: bool) -> tuple[int, int] | None:
        """The next chunks to ask a source for; None when there are none (now, or ever)."""
        with self._lock:
            while True:
                self._check(source)
                if self.complete:
                    return None
                found = self._next_range(source)
                if found is None and wait:
                    found = self._second_ask(source)
                if found is not None or not wait:
                    return found
                self._lock.wait()

    def receive(self, wire: Wire, source: int, first: int, count: int) -> None:
        """Take chunks off a connection. Raises Cut, Dropped, or what failed here."""
        for index in range(first, first + count):
            buffer = self._free.get()
            try:
                self._check(source)
                wire.receive(memoryview(buffer)[: chunk_bytes(index, self.part.size_bytes)])
            except BaseException:
                self._free.put(buffer)
                raise
            self._full.put((source, index, buffer))

    def leave(self, source: int) -> None:
        """A connection of this source ended: others may be asked for what it did not send."""
        settled = threading.Event()
        self._full.put(settled)
        while not settled.wait(_LOOK_S) and self._thread.is_alive():
            pass
        with self._lock:
            for index, owner in enumerate(self._owners):
                if owner == source and self._states[index] == _State.ASKED:
                    self._forget(index)
            for index in [index for index, owner in self._twice.items() if owner == source]:
                del self._twice[index]
            self._lock.notify_all()

    def wait(self) -> None:
        """Until what was received is hashed. Raises what failed here."""
        with self._lock:
            while not self.complete:
                self._check(0)
                self._lock.wait()

    # --- the thread ---

    def _work(self) -> None:
        scratch = bytearray(min(CHUNK_BYTES, self.part.size_bytes))
        while (item := self._full.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            source, index, buffer = item
            try:
                if self.error is None:
                    self._take_in(source, index, buffer, scratch)
            except Exception as error:
                self._fail(error)
            self._free.put(buffer)

    def _take_in(self, source: int, index: int, buffer: bytearray, scratch: bytearray) -> None:
        with self._lock:
            if source in self._dropped or self._states[index] >= _State.HERE:
                return
        data = memoryview(buffer)[: chunk_bytes(index, self.part.size_bytes)]
        self.part.write(index, data)
        with self._lock:
            self._states[index], self._owners[index] = _State.HERE, source
        while self.frontier < self.part.count and self._states[self.frontier] == _State.HERE:
            at = self.frontier
            if not self._extend(at, data if at == index else self.part.read(at, scratch)):
                self._deny(at)
                return

    def _extend(self, index: int, data: memoryview) -> bool:
        """Whether a chunk is the next right one; then it counts."""
        hasher = self._hasher.copy()
        hasher.update(data)
        last = index + 1 == self.part.count
        if self._list is not None and hasher.digest() != _entry(self._list, index):
            return False
        if last and f"sha256:{hasher.hexdigest()}" != self.part.sha256:
            return False
        with self._lock:
            self._hasher, self._states[index] = hasher, _State.RIGHT
            self.frontier += 1
            if last:
                self._lock.notify_all()
        if last:
            self._changed()
        return True

    def _deny(self, index: int) -> None:
        """The chunk at the frontier, or one before it that had no list, is wrong."""
        if self._list is not None:
            self._drop(self._owners[index])
        elif self._resumed and self._restarts:
            self._restart(0)
        else:
            raise RefusedError("output_mismatch", "A transferred file does not match its hash.")

    def _drop(self, source: int) -> None:
        with self._lock:
            self._dropped.add(source)
            for index, owner in enumerate(self._owners):
                if owner == source and self._states[index] < _State.RIGHT:
                    self._forget(index)
            self._lock.notify_all()
        self._changed()

    def _restart(self, chunks: int) -> None:
        """Go on with only the first chunks, whose hash is known or which are hashed again."""
        self.part.truncate(chunks)
        hasher, buffer = hashlib.sha256(), bytearray(min(CHUNK_BYTES, self.part.size_bytes))
        for index in range(chunks):
            hasher.update(self.part.read(index, buffer))
        with self._lock:
            self._hasher, self.frontier, self._resumed = hasher, chunks, 0
            for index in range(chunks, self.part.count):
                self._forget(index)
            self._lock.notify_all()

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self.error = self.error or error
            self._lock.notify_all()
        self._changed()

    # --- details ---

    def _forget(self, index: int) -> None:
        self._states[index], self._owners[index] = _State.MISSING, -1
        self._twice.pop(index, None)

    def _check(self, source: int) -> None:
        if self.error is not None:
            raise self.error
        if self._closed or source in self._halted:
            raise Cut("The transfer was given up.")
        if source in self._dropped:
            raise Dropped

    def _next_range(self, source: int) -> tuple[int, int] | None:
        states, count_max = self._states, self.part.count
        if self._sources > 1:
            count_max = _RANGE_CHUNKS
        try:
            first = states.index(_State.MISSING, self.frontier)
        except ValueError:
            return None
        end = first
        while end < len(states) and end - first < count_max and states[end] == _State.MISSING:
            self._states[end], self._owners[end] = _State.ASKED, source
            end += 1
        return first, end - first

    def _second_ask(self, source: int) -> tuple[int, int] | None:
        """A chunk that another source is slow to send, the last one first."""
        for index in range(self.part.count - 1, self.frontier - 1, -1):
            asked = self._states[index] == _State.ASKED and self._owners[index] != source
            if asked and index not in self._twice:
                self._twice[index] = source
                return index, 1
        return None


def _entry(chunk_list: bytes, index: int) -> bytes:
    return chunk_list[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]


def _agreement(before: bytes | None, after: bytes, chunks: int) -> int:
    """How many chunks two lists agree on, at most `chunks`: one equal hash proves all before it."""
    while chunks and (before is None or _entry(before, chunks - 1) != _entry(after, chunks - 1)):
        chunks -= 1
    return chunks
