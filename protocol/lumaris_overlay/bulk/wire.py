"""A blocking connection that carries chunks, used from one worker thread at a time.

A client of `get` asks for chunks with fixed records of two 32-bit numbers, the first chunk and how
many; the bytes follow in that order. A client of `put` sends the bytes from the first chunk that
the receiver lacks.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from contextlib import suppress

from lumaris_overlay.bulk.rate import Rate
from lumaris_protocol.limits import CHUNK_BYTES, KIB

DIGEST_BYTES = 32  # of SHA-256: an entry of a chunk list
STALL_S = 30.0  # a peer that sends or takes nothing for this long is gone
# One chunk may take this many stalls: a peer that drips bytes does not hold a thread for hours.
CHUNK_STALLS = 4
# What was sent may still lie in buffers on the way, several MiB over a slow line: the other side
# may be silent for so many stalls although it reads all the time.
BUFFER_STALLS = 8
# Many transfers may share the lowest rate, and none of them may look stalled.
_PACED_BYTES = 16 * KIB
_RANGE = struct.Struct(">II")


class Cut(Exception):  # noqa: N818 - what happened to the connection
    """The connection is lost. The transfer may go on over another one."""


class Stalled(Cut):
    """The peer sent or took nothing for too long."""


class Wire:
    """Moves exact numbers of bytes. Raises Cut, or Stalled."""

    def __init__(
        self, sock: socket.socket, *, rate: Rate | None = None, stall_s: float | None = None
    ) -> None:
        self.sock, self.plain = sock, type(sock) is socket.socket
        self.expected_bytes = 0  # what was asked for; a lane refuses more
        self.rate, self._stall_s = rate, STALL_S if stall_s is None else stall_s
        self._stopped = threading.Event()
        sock.settimeout(self._stall_s)

    def stop(self) -> None:
        """Break the connection under whoever uses it. From any thread; never blocks."""
        self._stopped.set()
        with suppress(OSError):
            # Not SSLSocket's own, which would go on in plain text on the same object.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket. Only when no thread uses it."""
        self.sock.close()

    def send(self, data: memoryview | bytes) -> None:
        """Send all of it, at the rate that is allowed.

        Buffers on the way empty in steps of up to a MiB, so that a slow reader looks still for a
        while: only the time for all of it counts.
        """
        view = memoryview(data)
        deadline = time.monotonic() + CHUNK_STALLS * self._stall_s
        at, size = 0, len(view)
        step = size if self.rate is None else _PACED_BYTES
        try:
            while at < size:
                piece = view[at : at + step]
                deadline += self._pace(len(piece))  # our own slowness is not the other side's
                self._send_piece(piece, deadline)
                at += len(piece)
            self._check()
        except TimeoutError:
            raise Stalled("The other side takes nothing, or too slowly.") from None
        except OSError as error:
            raise Cut(str(error)) from None
        finally:
            self.sock.settimeout(self._stall_s)

    def _send_piece(self, piece: memoryview, deadline: float) -> None:
        while piece:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self.sock.settimeout(left_s)
            piece = piece[self.sock.send(piece) :]

    def receive(self, view: memoryview) -> None:
        """Fill the view."""
        deadline = time.monotonic() + CHUNK_STALLS * self._stall_s
        at, size = 0, len(view)
        step = size if self.rate is None else _PACED_BYTES
        try:
            while at < size:
                taken = self.sock.recv_into(view[at : at + step])
                if not taken:
                    raise Cut("The other side ended the connection early.")
                at += taken
                if time.monotonic() > deadline:
                    raise Stalled("The other side drips.")
                deadline += self._pace(taken)  # our own slowness is not the other side's
            self._check()
        except TimeoutError:
            raise Stalled("The other side sends nothing.") from None
        except OSError as error:
            raise Cut(str(error)) from None

    def receive_end(self) -> None:
        """The end of the other side's bytes, which must come now. Only on a plain socket."""
        try:
            more = self.sock.recv(1)
        except TimeoutError:
            raise Stalled("The other side does not end.") from None
        except OSError as error:
            raise Cut(str(error)) from None
        self._check()
        if more:
            raise Cut("More came than was announced.")

    def ask(self, first: int, count: int, size_bytes: int) -> None:
        """Ask for `count` chunks of a file of `size_bytes`, from `first` on."""
        self.expected_bytes += range_bytes(first, count, size_bytes)
        self.send(_RANGE.pack(first, count))

    def next_range(self, *, stalls: int = 1) -> tuple[int, int] | None:
        """What the other side asks for; None when it is done and hung up.

        Raises Stalled when it says nothing for so many stalls.
        """
        record = bytearray(_RANGE.size)
        try:
            self.sock.settimeout(stalls * self._stall_s)
            taken = self.sock.recv_into(record)
        except TimeoutError:
            raise Stalled("The other side asks for nothing.") from None
        except OSError:
            taken = 0
        finally:
            self.sock.settimeout(self._stall_s)
        if not taken:
            return None
        self.receive(memoryview(record)[taken:])
        first, count = _RANGE.unpack(record)
        return first, count

    def _pace(self, size_bytes: int) -> float:
        """Wait as long as the cap says; the seconds."""
        if self.rate is None:
            return 0.0
        wait_s = self.rate.reserve(size_bytes)
        if self._stopped.wait(wait_s):
            self._check()
        return wait_s

    def _check(self) -> None:
        if self._stopped.is_set():  # a connection broken by us ends as a clean one would
            raise Cut("The transfer was given up.")


def chunks_of(size_bytes: int) -> int:
    """The number of chunks of a file."""
    return -(-size_bytes // CHUNK_BYTES)


def chunk_bytes(index: int, size_bytes: int) -> int:
    """The size of one chunk of a file; the last may be shorter."""
    return min(CHUNK_BYTES, size_bytes - index * CHUNK_BYTES)


def range_bytes(first: int, count: int, size_bytes: int) -> int:
    """The bytes of some chunks of a file that follow one another."""
    return min(count * CHUNK_BYTES, size_bytes - first * CHUNK_BYTES) if count else 0


def send_chunks(wire: Wire, file: int, first: int, count: int, size_bytes: int) -> None:
    """Send chunks of an open file. Raises Cut, or EOFError when the file became shorter."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, size_bytes)))
    for index in range(first, first + count):
        piece = buffer[: chunk_bytes(index, size_bytes)]
        if os.preadv(file, [piece], index * CHUNK_BYTES) != len(piece):
            raise EOFError("The file became shorter while it was sent.")
        wire.send(piece)


def tune(sock: socket.socket) -> None:
    """Set a TCP socket up for bulk data."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
