"""TLS over a socket for one reader and one writer, without a pass of the scheduler too many.

The general stream of trio costs several times what TLS itself does for a small message. Here what
fits the kernel's buffer is sent at once, by whoever has it (`send_now`), and a reader takes all
that has arrived. Only the writing side touches the outgoing bytes, so their order is kept.
"""

from __future__ import annotations

import socket
import ssl

import trio

_READ_BYTES = 64 * 1024
# OpenSSL hands out one record (16 KiB) at a time: enough of them to fill a few frames.
_TAKE_BYTES = 256 * 1024


class TlsStream(trio.abc.Stream):
    """A TLS connection on a non-blocking socket, which it owns."""

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool = False
    ) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._unsent = memoryview(b"")
        self._closed = False

    @property
    def certificate(self) -> bytes:
        """The peer's certificate (DER)."""
        return self._tls.getpeercert(binary_form=True) or b""

    @property
    def has_rest(self) -> bool:
        """Whether `send_now` could not send all."""
        return bool(self._unsent)

    async def do_handshake(self) -> None:
        """Agree on keys. Raises OSError or trio.BrokenResourceError."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                if not await self._fill():
                    raise trio.BrokenResourceError(
                        "the connection ended in the handshake"
                    ) from None
            else:
                await self._flush()
                return

    def send_now(self, data: bytes) -> bool:
        """Send without waiting; False when the writer has to send the rest, or to fail."""
        if self._unsent or self._closed:
            raise trio.BusyResourceError("something is being sent")
        self._encrypt(data)
        try:
            return self._send_some()
        except OSError:
            return False  # the writer meets it again

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send, waiting for room. Raises OSError or trio.ClosedResourceError."""
        self._encrypt(data)
        await self._flush()

    async def wait_send_all_might_not_block(self) -> None:
        """Until there is room in the kernel's buffer."""
        await trio.lowlevel.wait_writable(self.sock)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has arrived, or b"" at the end. Raises OSError or trio.ClosedResourceError."""
        size_max = max_bytes or _TAKE_BYTES
        while True:
            data = self._decrypt(size_max)
            if data is not None:
                return data
            if not await self._fill():
                return b""

    async def aclose(self) -> None:
        """Close the socket at once."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close the socket at once; whoever waits for it is told."""
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self.sock)
            self.sock.close()

    def _encrypt(self, data: bytes | bytearray | memoryview) -> None:
        if self._closed:
            raise trio.ClosedResourceError("the connection was closed")
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view) :]

    def _decrypt(self, size_max: int) -> bytes | None:
        """What can be read now; b"" at the end, None when more has to arrive first."""
        parts: list[bytes] = []
        size = 0
        try:
            while size < size_max:
                part = self._tls.read(min(size_max - size, 1 << 14))
                if not part:
                    break
                parts.append(part)
                size += len(part)
        except ssl.SSLWantReadError:
            if not parts:
                return None
        except ssl.SSLZeroReturnError:
            pass
        return b"".join(parts)

    async def _fill(self) -> bool:
        """Take in what has arrived, waiting for the first of it; False at the end."""
        size = self._receive()
        if size is None:
            while size is None:
                await trio.lowlevel.wait_readable(self.sock)
                size = self._receive()
        else:
            await trio.lowlevel.checkpoint()
        return size > 0

    def _receive(self) -> int | None:
        """Take in what has arrived; how much that was, None when nothing."""
        if self._closed:
            raise trio.ClosedResourceError("the connection was closed")
        try:
            size = self.sock.recv_into(self._buffer)
        except BlockingIOError:
            return None
        self._incoming.write(self._buffer[:size])
        return size

    def _send_some(self) -> bool:
        """Send as much as the kernel takes; whether that was all."""
        if not self._unsent:
            self._unsent = memoryview(self._outgoing.read())
        while self._unsent:
            try:
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
            except BlockingIOError:
                return False
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
        return True

    async def _flush(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._send_some():
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        while not self._send_some():
            if self._closed:
                raise trio.ClosedResourceError("the connection was closed")
            await trio.lowlevel.wait_writable(self.sock)
