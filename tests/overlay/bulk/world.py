"""A seller that gives and takes files, and lanes to it, without a network or a session."""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import random
import ssl
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lumaris_overlay.bulk.ask import Source
from lumaris_overlay.bulk.gate import BulkGate
from lumaris_overlay.bulk.serve import give_file, take_file
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.links.target import DirectTarget
from lumaris_overlay.ports import Overlay
from lumaris_overlay.simulated.stream import SimulatedStream, stream_pair
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import CHUNK_BYTES
from lumaris_protocol.protocols import BLOB, BlobHeader, BlobReply

SESSION = "ses_" + "a" * 24
WAIT_S = 20


def noise(seed: str, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def chunks(count: int, rest: int = 0, *, seed: str = "file") -> bytes:
    return noise(seed, count * CHUNK_BYTES + rest)


@functools.cache
def server_context() -> tuple[ssl.SSLContext, str]:
    """A TLS 1.3 context with a throw-away certificate, and its pin."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bulk")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version, context.num_tickets = ssl.TLSVersion.TLSv1_3, 0
    with tempfile.NamedTemporaryFile() as file:
        file.write(certificate.public_bytes(serialization.Encoding.PEM))
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        file.flush()
        context.load_cert_chain(file.name)
    der = certificate.public_bytes(serialization.Encoding.DER)
    return context, hashlib.sha256(der).hexdigest()


class Seller:
    """Serves blob lanes as a session does; `files` by digest, uploads go to `folder`."""

    def __init__(self, folder: Path, nursery: trio.Nursery, name: str) -> None:
        self.folder, self.peer = folder, PeerId(name)
        self.files: dict[str, Path] = {}
        self.gate: BulkGate | None = None
        self.target: DirectTarget | None = None
        self.lanes = self.bulk_connections = 0
        self.streams: list[SimulatedStream] = []
        self.ended = 0
        self._nursery = nursery

    def hold(self, data: bytes, *, sha256: str | None = None) -> str:
        sha256 = sha256 or digest(data)
        path = self.folder / f"held {sha256[-8:]}"
        path.write_bytes(data)
        self.files[sha256] = path
        return sha256

    @property
    def source(self) -> Source:
        return Source(cast(Overlay, self), self.peer, SESSION)

    async def open_stream(
        self, peer: str, protocol: str, *, addresses: Sequence[str] = ()
    ) -> SimulatedStream:
        await trio.lowlevel.checkpoint()
        near, far = stream_pair(PeerId("buyer"), self.peer, BLOB)
        near.direct, far.gate = self.target, self.gate
        self.lanes += 1
        self.streams.append(near)
        self._nursery.start_soon(self.serve, far)
        return near

    async def serve(self, stream: SimulatedStream) -> None:
        framed = FramedStream(stream)
        try:
            await self.answer(await framed.expect_header(BlobHeader), framed)
        except LumarisError as error:
            await framed.refuse(error)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except OSError:
            await framed.refuse(LumarisError("platform_error"))
        finally:
            self.ended += 1
            await framed.aclose()

    async def answer(self, header: BlobHeader, framed: FramedStream) -> None:
        if header.op == "get":
            path = self.files.get(header.sha256)
            if path is None:
                raise LumarisError("not_found")
            await give_file(framed, header, path)
        else:
            await take_file(framed, header, self.uploaded(header.sha256))
            await framed.send(Kind.HEADER, msgspec.json.encode(BlobReply(state="stored")))

    def uploaded(self, sha256: str) -> Path:
        return self.folder / sha256[-8:]

    async def listen(self, **options: Any) -> None:
        """Take bulk connections from now on."""
        self.gate = BulkGate(**options)
        context, pin = server_context()
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.target = DirectTarget((listeners[0].socket.getsockname()[:2],), pin)
        self._nursery.start_soon(self._accept, listeners[0], context)

    async def _accept(self, listener: trio.SocketListener, context: ssl.SSLContext) -> None:
        async with listener:
            while True:
                stream = await listener.accept()
                self._nursery.start_soon(self._dispatch, stream, context)

    async def _dispatch(self, stream: trio.SocketStream, context: ssl.SSLContext) -> None:
        assert self.gate is not None
        if await stream.receive_some(1) == b"\x02":
            self.bulk_connections += 1
            await self.gate.accept(stream.socket, context)
        stream.socket.close()


class World:
    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self._folder, self._nursery = folder, nursery
        self.inbox = folder / "inbox"
        self.inbox.mkdir()
        self._sellers = 0

    async def seller(self, *, direct: bool = True, kind: type[Seller] = Seller) -> Seller:
        self._sellers += 1
        folder = self._folder / f"seller {self._sellers}"
        folder.mkdir()
        seller = kind(folder, self._nursery, f"seller{self._sellers}")
        if direct:
            await seller.listen()
        return seller

    def file(self, data: bytes, name: str = "source") -> Path:
        path = self._folder / name
        path.write_bytes(data)
        return path

    def left(self) -> list[str]:
        """Everything in the buyer's folder."""
        return sorted(path.name for path in self.inbox.iterdir())


@asynccontextmanager
async def open_world(folder: Path) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(folder, nursery)
        nursery.cancel_scope.cancel()


async def eventually(holds: Any) -> None:
    with trio.fail_after(WAIT_S):
        while not holds():
            await trio.sleep(0.005)
