"""File transfer between two processes: the direct channel, the lane, and plain trio TLS.

    python benchmarks/transfer.py [--json] [--sizes MIB,MIB] [--rounds N] [--folder DIR]

Loopback, both directions. Ours is encrypted, hashed and written to a file that is read from
another; the rival is trio's SSLStream with 256 KiB writes, no hash and no file. The lane is carried
by that same TLS stream, so it is what remains where a peer's port cannot be dialled. Each round
runs everything once, in turn; the table has the best round of each, and ratios within one round.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import multiprocessing
import random
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import msgspec
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lumaris_overlay.bulk.fetch import get_file
from lumaris_overlay.bulk.gate import BulkGate
from lumaris_overlay.bulk.put import put_file
from lumaris_overlay.bulk.serve import give_file, take_file
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.links.target import DirectTarget
from lumaris_overlay.ports import Overlay, OverlayStream
from lumaris_protocol.frames import Kind
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import KIB, MIB
from lumaris_protocol.protocols import BLOB, BlobHeader, BlobReply

# Started as a file, this folder is on the path and the one above is not.
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.parts.report import Report

SESSION = "ses_" + "a" * 24
PLAIN_WRITE_BYTES = 256 * KIB
LANE, PLAIN_UP, PLAIN_DOWN = b"L", b"U", b"D"  # what a connection of the benchmark is for


def main() -> None:
    """Run every transfer and print a table, or one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sizes", default="64,1024", help="MiB, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where the files lie (default: a new one)")
    options = parser.parse_args()
    row = Report(as_json=options.json)

    sizes = [int(size) for size in options.sizes.split(",")]
    with tempfile.TemporaryDirectory(prefix="lumaris-bench-", dir=options.folder) as folder:
        near, far = multiprocessing.Pipe()
        seller = multiprocessing.get_context("spawn").Process(
            target=run_seller, args=(Path(folder) / "seller", make_files(Path(folder), sizes), far)
        )
        seller.start()
        try:
            port, pin = near.recv()
            for size in sizes:
                trio.run(measure, Path(folder), size, options.rounds, port, pin, row)
        finally:
            near.send(None)
            seller.join()
    row.finish()


def make_files(folder: Path, sizes: Sequence[int]) -> dict[str, Path]:
    """A source file of each size in MiB, by digest."""
    (folder / "seller").mkdir()
    files, block = {}, random.Random(1).randbytes(MIB)
    for size in sizes:
        path, hasher = folder / f"source{size}", hashlib.sha256()
        with path.open("wb") as file:
            for _ in range(size):
                file.write(block)
                hasher.update(block)
        files[f"sha256:{hasher.hexdigest()}"] = path
    return files


# --- the buyer -----------------------------------------------------------------------------------


async def measure(
    folder: Path, size: int, rounds: int, port: int, pin: str, row: Callable[..., None]
) -> None:
    """Every way of moving one file, `rounds` times."""
    source = folder / f"source{size}"
    with source.open("rb") as file:
        sha256 = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    target, size_bytes = folder / "target", size * MIB

    async def get(overlay: Overlay) -> None:
        await get_file(overlay, "seller", SESSION, target, sha256=sha256, size_bytes=size_bytes)
        target.unlink()

    async def put(overlay: Overlay) -> None:
        await put_file(overlay, "seller", SESSION, source, sha256=sha256)

    direct, lane = Lanes(port, pin), Lanes(port, None)
    ways: dict[str, Callable[[], Awaitable[None]]] = {
        "plain TLS up": lambda: plain_up(port, size_bytes),
        "direct up": lambda: put(cast(Overlay, direct)),
        "lane up": lambda: put(cast(Overlay, lane)),
        "plain TLS down": lambda: plain_down(port, size_bytes),
        "direct down": lambda: get(cast(Overlay, direct)),
        "lane down": lambda: get(cast(Overlay, lane)),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            await way()
            speeds[name].append(size_bytes / 1e6 / (time.perf_counter() - began))
    for way_name, found in speeds.items():
        fast = way_name.startswith("direct")
        best = max(found)
        bar, holds = (">= 300", best >= 300) if fast else ("", None)
        row(f"{size} MiB {way_name}", best, "MB/s", bar, holds)
    for direction in ("up", "down"):
        plain = speeds[f"plain TLS {direction}"]
        for kind in ("direct", "lane"):
            pairs = zip(speeds[f"{kind} {direction}"], plain, strict=True)
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            bar, holds = (">= 0.6", ratio >= 0.6) if kind == "direct" else ("", None)
            row(f"{size} MiB {kind} / plain TLS {direction}", ratio, "x", bar, holds)


class Lanes:
    """Opens lanes to the seller as an overlay does; `pin` also lets it be dialled."""

    def __init__(self, port: int, pin: str | None) -> None:
        self._port = port
        self._target = None if pin is None else DirectTarget((("127.0.0.1", port),), pin)

    async def open_stream(self, peer: str, protocol: str) -> TlsLane:
        """A lane on a connection of its own."""
        lane = TlsLane(await connect(self._port, LANE), PeerId(peer))
        lane.direct = self._target
        return lane


class TlsLane(OverlayStream):
    """A TLS stream in the place of a link's lane."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream], peer: PeerId) -> None:
        self.peer, self.protocol, self._stream = peer, BLOB, stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Never waits."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive."""
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_eof(self) -> None:
        """TLS has no half-closed state; a lane's END frame says it."""

    async def aclose(self) -> None:
        """Close without waiting for the other side."""
        await trio.aclose_forcefully(self._stream)

    async def reset(self) -> None:
        """Close."""
        await self.aclose()


async def connect(port: int, purpose: bytes) -> trio.SSLStream[trio.SocketStream]:
    """A plain trio TLS stream to the seller."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(purpose)
    return trio.SSLStream(stream, context, https_compatible=True)


async def plain_up(port: int, size_bytes: int) -> None:
    """The rival, sending."""
    stream = await connect(port, PLAIN_UP)
    await stream.send_all(size_bytes.to_bytes(8, "big"))
    await send_plain(stream, size_bytes)
    await stream.receive_some(1)
    await trio.aclose_forcefully(stream)


async def plain_down(port: int, size_bytes: int) -> None:
    """The rival, receiving."""
    stream = await connect(port, PLAIN_DOWN)
    await stream.send_all(size_bytes.to_bytes(8, "big"))
    await receive_plain(stream, size_bytes)
    await trio.aclose_forcefully(stream)


async def send_plain(stream: trio.abc.SendStream, size_bytes: int) -> None:
    """So many bytes, as fast as trio's TLS goes."""
    piece = random.Random(2).randbytes(PLAIN_WRITE_BYTES)
    for _ in range(size_bytes // PLAIN_WRITE_BYTES):
        await stream.send_all(piece)


async def receive_plain(stream: trio.abc.ReceiveStream, size_bytes: int) -> None:
    """So many bytes, thrown away."""
    while size_bytes > 0:
        data = await stream.receive_some(MIB)
        if not data:
            raise EOFError
        size_bytes -= len(data)


# --- the seller, in its own process --------------------------------------------------------------


def run_seller(folder: Path, files: dict[str, Path], pipe: Connection) -> None:
    """Serve until the pipe says so."""
    trio.run(Seller(folder, files).run, pipe)


class Seller:
    """Serves lanes, bulk connections and the rival's plain streams on one port."""

    def __init__(self, folder: Path, files: dict[str, Path]) -> None:
        self._folder, self._files = folder, files
        self._gate = BulkGate()
        self._context, self._pin = make_context(folder)

    async def run(self, pipe: Connection) -> None:
        """Until told to end."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        pipe.send((listeners[0].socket.getsockname()[1], self._pin))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._serve, listeners)
            await trio.to_thread.run_sync(pipe.recv)
            nursery.cancel_scope.cancel()

    async def _serve(self, raw: trio.SocketStream) -> None:
        purpose = await raw.receive_some(1)
        if purpose == b"\x02":
            await self._gate.accept(raw.socket, self._context)
            return
        stream = trio.SSLStream(
            raw,
            self._context,
            server_side=True,
            https_compatible=True,
        )
        if purpose == LANE:
            await self._serve_lane(stream)
            return
        wanted = int.from_bytes(await stream.receive_some(8), "big")
        if purpose == PLAIN_UP:
            await receive_plain(stream, wanted)
            await stream.send_all(b"x")
        else:
            await send_plain(stream, wanted)

    async def _serve_lane(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        lane = TlsLane(stream, PeerId("buyer"))
        lane.gate = self._gate
        framed = FramedStream(lane)
        try:
            header = await framed.expect_header(BlobHeader)
            if header.op == "get":
                await give_file(framed, header, self._files[header.sha256])
            else:
                target = self._folder / "uploaded"
                await take_file(framed, header, target)
                await framed.send(Kind.HEADER, msgspec.json.encode(BlobReply(state="stored")))
                target.unlink()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # a buyer that has all it wants hangs up
        finally:
            await framed.aclose()


def make_context(folder: Path) -> tuple[ssl.SSLContext, str]:
    """A TLS 1.3 server with a throw-away certificate, and its pin."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bench")])
    now, day = dt.datetime.now(dt.UTC), dt.timedelta(days=1)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(1)
    builder = builder.not_valid_before(now - day).not_valid_after(now + day)
    certificate = builder.public_key(key.public_key()).sign(key, hashes.SHA256())
    pem = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "key.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version, context.num_tickets = ssl.TLSVersion.TLSv1_3, 0
    context.load_cert_chain(folder / "key.pem")
    der = certificate.public_bytes(serialization.Encoding.DER)
    return context, hashlib.sha256(der).hexdigest()


if __name__ == "__main__":
    main()
