"""Peers that lie, stall, replay, flood and drip; disks that are full; targets that are odd."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from lumaris_overlay.bulk import ask, gate, serve, turns, wire
from lumaris_overlay.bulk.fetch import fetch_file
from lumaris_overlay.bulk.part import part_path
from lumaris_overlay.bulk.put import put_file
from lumaris_overlay.bulk.serve import give_file
from lumaris_overlay.bulk.wire import Wire
from lumaris_overlay.framed_stream import FramedStream, read_refusal
from lumaris_overlay.links.target import DirectTarget
from lumaris_protocol.errors import RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import CHUNK_BYTES
from lumaris_protocol.protocols import BlobHeader, BlobReply
from tests.overlay.bulk.test_transfer import both_ways, fetch, refused, upload
from tests.overlay.bulk.world import (
    SESSION,
    WAIT_S,
    Seller,
    World,
    chunks,
    digest,
    eventually,
)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "_PAUSES_S", (0.0,))


async def open_lane(seller: Seller, **fields: Any) -> FramedStream:
    """A lane with a header of the test's own making."""
    stream = FramedStream(await seller.open_stream("", ""))
    await stream.send(Kind.HEADER, msgspec.json.encode({"session": SESSION} | fields))
    return stream


def about(data: bytes, **changes: Any) -> dict[str, Any]:
    return {"sha256": digest(data), "size_bytes": len(data)} | changes


async def answer_of(stream: FramedStream) -> str:
    """The state or the refusal's code that comes next."""
    with trio.fail_after(WAIT_S):
        frame = await stream.receive()
    assert frame is not None
    if frame.kind == Kind.REFUSAL:
        return read_refusal(frame.body).code
    return msgspec.json.decode(frame.body, type=BlobReply).state


# --- several sources ---


class Liar(Seller):
    """Names the right list and gives other bytes."""

    async def answer(self, header: BlobHeader, framed: FramedStream) -> None:
        await give_file(framed, header, self.files[header.sha256 if header.listed else "false"])


@pytest.mark.slow
@both_ways
async def test_a_liar_among_honest_sources(world: World, direct: bool):
    data = chunks(26, 3)
    sellers = [await world.seller(direct=direct) for _ in range(2)]
    liar = await world.seller(direct=direct, kind=Liar)
    for seller in (*sellers, liar):
        seller.hold(data)
    false = bytearray(data)
    for at in range(0, len(data), CHUNK_BYTES):
        false[at] ^= 1
    liar.hold(bytes(false), sha256="false")
    await fetch(world, *sellers, liar, data=data)
    assert (world.inbox / "file").read_bytes() == data
    assert world.left() == ["file"]


@pytest.mark.slow
@both_ways
async def test_only_liars(world: World, direct: bool):
    data = chunks(3)
    liars = [await world.seller(direct=direct, kind=Liar) for _ in range(3)]
    for liar in liars:
        liar.hold(data)
        liar.hold(chunks(3, seed="other"), sha256="false")
    assert await refused(fetch(world, *liars, data=data)) == "output_mismatch"
    assert world.left() == []


class ListLiar(Seller):
    """Names the hashes of its own false bytes, but for the last, and gives those bytes."""

    wrong_from = 2

    async def answer(self, header: BlobHeader, framed: FramedStream) -> None:
        if not header.listed:
            await give_file(framed, header, self.files["false"])
            return
        hasher, false = hashlib.sha256(), self.files["false"].read_bytes()
        listed = b""
        for at in range(0, len(false), CHUNK_BYTES):
            hasher.update(false[at : at + CHUNK_BYTES])
            listed += hasher.digest()
        listed = listed[:-32] + bytes.fromhex(header.sha256.removeprefix("sha256:"))
        await framed.send(Kind.HEADER, msgspec.json.encode(BlobReply(state="ready")))
        await framed.send(Kind.DATA, listed)


@pytest.mark.slow
async def test_lying_lists_in_the_majority(world: World):
    data = chunks(10, 3)
    honest = await world.seller()
    liars = [await world.seller(kind=ListLiar) for _ in range(2)]
    honest.hold(data)
    for liar in liars:
        liar.hold(data[: 2 * CHUNK_BYTES] + chunks(8, 3, seed="other"), sha256="false")
    await fetch(world, *liars, honest, data=data)
    assert (world.inbox / "file").read_bytes() == data
    assert world.left() == ["file"]


@pytest.mark.parametrize("listed", [b"", b"x" * 32, b"x" * 96, b"x" * 97])
async def test_a_list_that_does_not_end_in_the_files_hash(world: World, listed: bytes):
    class Lister(Seller):
        async def answer(self, header: BlobHeader, framed: FramedStream) -> None:
            await framed.send(Kind.HEADER, msgspec.json.encode(BlobReply(state="ready")))
            await framed.send(Kind.DATA, listed)

    data, honest = chunks(2, 1), await world.seller()
    honest.hold(data)
    liar = await world.seller(kind=Lister)
    await fetch(world, liar, honest, data=data)
    assert (world.inbox / "file").read_bytes() == data


class Staller(Seller):
    """Names its list and gives some chunks, then nothing."""

    async def answer(self, header: BlobHeader, framed: FramedStream) -> None:
        if header.listed:
            await give_file(framed, header, self.files[header.sha256])
        else:
            await framed.send(Kind.HEADER, msgspec.json.encode(BlobReply(state="ready")))
            await framed.receive()
            for _ in range(10):
                await framed.send(Kind.DATA, self.files[header.sha256].read_bytes()[:100_000])
            await trio.sleep_forever()


@pytest.mark.slow
async def test_a_source_that_stalls_is_not_waited_for(world: World):
    data = chunks(30, 3)
    staller, honest = await world.seller(direct=False, kind=Staller), await world.seller()
    staller.hold(data)
    honest.hold(data)
    with trio.fail_after(WAIT_S / 2):  # a stall is noticed after 30 s
        await fetch(world, staller, honest, data=data)
    assert (world.inbox / "file").read_bytes() == data


async def test_the_only_source_stalls(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wire, "STALL_S", 0.1)
    data, staller = chunks(2), await world.seller(direct=False, kind=Staller)
    staller.hold(data)
    assert await refused(fetch(world, staller, data=data)) == "unreachable"


async def test_sources_that_are_gone_do_not_matter(world: World):
    data, honest, empty = chunks(5), await world.seller(), await world.seller()
    honest.hold(data)

    class Gone(Seller):
        async def open_stream(self, *_: Any, **__: Any) -> Any:
            raise RefusedError("unreachable")

    gone = await world.seller(kind=Gone)
    await fetch(world, gone, empty, honest, data=data)
    assert (world.inbox / "file").read_bytes() == data
    assert await refused(fetch(world, gone, empty, data=data)) == "not_found"


async def test_the_number_of_sources_is_bounded(world: World):
    seller = await world.seller()
    with pytest.raises(ValueError, match="sources"):
        await fetch_file([seller.source] * 9, world.inbox / "file", **about(b""))


# --- a stranger's bulk connections ---


async def bulk_connection(seller: Seller, token: bytes, ip: str = "127.0.0.1") -> socket.socket:
    """A TLS connection to the seller's gate that has shown a token."""
    assert seller.target is not None
    address = seller.target.addresses[0]

    def dial() -> socket.socket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        raw = socket.create_connection(address, timeout=WAIT_S, source_address=(ip, 0))
        raw.sendall(b"\x02")
        tls = context.wrap_socket(raw)
        tls.sendall(token)
        return tls

    return await trio.to_thread.run_sync(dial)


async def is_hung_up(sock: socket.socket) -> bool:
    def read() -> bool:
        try:
            return sock.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True

    try:
        return await trio.to_thread.run_sync(read)
    finally:
        sock.close()


async def ticket(seller: Seller, data: bytes) -> tuple[FramedStream, bytes]:
    lane = await open_lane(seller, op="get", direct=True, **about(data))
    reply = await lane.expect_header(BlobReply)
    assert reply.token is not None
    return lane, bytes.fromhex(reply.token)


async def test_a_token_is_good_once(world: World):
    data, seller = chunks(1), await world.seller()
    seller.hold(data)
    lane, token = await ticket(seller, data)
    first = await bulk_connection(seller, token)
    await eventually(lambda: seller.gate is not None and not seller.gate._tickets)
    assert await is_hung_up(await bulk_connection(seller, token))
    await trio.to_thread.run_sync(first.sendall, bytes([0, 0, 0, 0, 0, 0, 0, 1]))
    received = await trio.to_thread.run_sync(first.recv, 1)
    assert received == data[:1]
    first.close()
    await lane.aclose()
    await eventually(lambda: seller.ended == 1)


async def test_a_token_expires(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gate, "TOKEN_S", -1.0)
    data, seller = chunks(1), await world.seller()
    seller.hold(data)
    _, token = await ticket(seller, data)
    assert await is_hung_up(await bulk_connection(seller, token))


async def test_a_token_ends_with_its_lane(world: World):
    data, seller = chunks(1), await world.seller()
    seller.hold(data)
    lane, token = await ticket(seller, data)
    await lane.aclose()
    await eventually(lambda: seller.ended == 1)
    assert await is_hung_up(await bulk_connection(seller, token))


@pytest.mark.parametrize("token", [bytes(32), b"\xff" * 32, bytes(64)])
async def test_a_guessed_token(world: World, token: bytes):
    seller = await world.seller()
    assert await is_hung_up(await bulk_connection(seller, token))


async def test_bytes_that_are_no_tls(world: World):
    seller = await world.seller()
    assert seller.target is not None
    for junk in (b"\x02", b"\x02GET / HTTP/1.1\r\n\r\n", b"\x02" + os.urandom(5000)):
        stream = await trio.open_tcp_stream(*seller.target.addresses[0])
        await stream.send_all(junk)
        await stream.send_eof()
        with trio.fail_after(WAIT_S):
            try:
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
        await stream.aclose()
    data = chunks(1)
    seller.hold(data)
    await fetch(world, seller, data=data)


@pytest.mark.slow
async def test_silent_connections_are_few_and_short(world: World, monkeypatch):
    monkeypatch.setattr(gate, "DIAL_S", 0.3)
    data, seller = chunks(2), await world.seller()
    seller.hold(data)
    assert seller.target is not None
    silent = []
    for _ in range(20):
        stream = await trio.open_tcp_stream(*seller.target.addresses[0])
        await stream.send_all(b"\x02")
        silent.append(stream)
    await eventually(lambda: seller.bulk_connections == 20)
    await fetch(world, seller, data=data)  # on the lane, if none of the places is free yet
    assert (world.inbox / "file").read_bytes() == data
    with trio.fail_after(WAIT_S):
        for stream in silent:
            with suppress(trio.BrokenResourceError):
                assert await stream.receive_some() == b""
            await stream.aclose()


@pytest.mark.parametrize("pin", ["0" * 64, "", "é"])
async def test_another_certificate_gets_no_token(world: World, pin: str):
    data, seller = chunks(2), await world.seller()
    seller.hold(data)
    assert seller.target is not None
    seller.target = DirectTarget(seller.target.addresses, pin)
    seen: list[bytes] = []
    original = Wire.receive

    def receive(self: Wire, view: memoryview) -> None:
        original(self, view)
        if not self.plain:
            seen.append(bytes(view))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wire, "receive", receive)
        await fetch(world, seller, data=data)
    assert (world.inbox / "file").read_bytes() == data
    assert seen == []


async def test_an_address_where_nobody_listens(world: World):
    data, seller = chunks(2), await world.seller()
    seller.hold(data)
    assert seller.target is not None
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        seller.target = DirectTarget((unused.getsockname(),), seller.target.pin)
        await fetch(world, seller, data=data)
    assert (world.inbox / "file").read_bytes() == data


# --- a client that asks for the wrong things ---


@pytest.mark.parametrize(
    "record",
    [(0, 0), (0, 4), (3, 1), (1, 3), (2**32 - 1, 2**32 - 1), (0, 2**32 - 1)],
)
async def test_chunks_that_do_not_exist(world: World, record: tuple[int, int]):
    data, seller = chunks(2, 1), await world.seller()
    seller.hold(data)
    lane = await open_lane(seller, op="get", **about(data))
    assert await answer_of(lane) == "ready"
    first, count = record
    await lane.send(Kind.DATA, first.to_bytes(4, "big") + count.to_bytes(4, "big"))
    assert await answer_of(lane) == "malformed"
    await lane.aclose()


async def test_chunks_asked_for_again_and_again(world: World):
    data, seller = b"words", await world.seller()
    seller.hold(data)
    lane = await open_lane(seller, op="get", **about(data))
    assert await answer_of(lane) == "ready"
    for _ in range(2):
        await lane.send(Kind.DATA, bytes([0, 0, 0, 0, 0, 0, 0, 1]))
        assert await lane.expect(Kind.DATA) == data
    await lane.send(Kind.DATA, bytes([0, 0, 0, 0, 0, 0, 0, 1]))
    assert await answer_of(lane) in ("malformed", "oversize")
    await lane.aclose()


@pytest.mark.parametrize("kind", [Kind.HEADER, Kind.ENVELOPE])
@pytest.mark.parametrize("fields", [{"direct": True}, {}])
async def test_other_frames_on_the_lane(world: World, kind: Kind, fields: dict[str, Any]):
    data, seller = chunks(1), await world.seller()
    seller.hold(data)
    for op in ("get", "put"):
        lane = await open_lane(seller, op=op, **about(data), **fields)
        assert await answer_of(lane) == "ready"
        await lane.send(kind, b"{}")
        assert await answer_of(lane) == "malformed"
        await lane.aclose()


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([b"12345", b"6"], "oversize"),
        ([b"123456"], "oversize"),
        ([b"1234"], "output_mismatch"),
        ([], "output_mismatch"),
        ([b"12344"], "output_mismatch"),
        ([b"12", b"345"], "stored"),
    ],
)
async def test_uploads_of_another_size(world: World, parts: list[bytes], code: str):
    seller = await world.seller()
    lane = await open_lane(seller, op="put", **about(b"12345"))
    assert await answer_of(lane) == "ready"
    for part in parts:
        await lane.send(Kind.DATA, part)
    await lane.send(Kind.END)
    assert await answer_of(lane) == code
    assert len(list(seller.folder.iterdir())) == (code == "stored")
    await lane.aclose()


async def test_an_upload_on_both_connections_at_once(world: World):
    data, seller = chunks(2), await world.seller()
    lane = await open_lane(seller, op="put", direct=True, **about(data))
    reply = await lane.expect_header(BlobReply)
    assert reply.token is not None
    direct = await bulk_connection(seller, bytes.fromhex(reply.token))
    await trio.to_thread.run_sync(direct.sendall, data[:100])
    await eventually(lambda: seller.gate is not None and not seller.gate._tickets)
    await lane.send(Kind.DATA, data[:100])
    assert await answer_of(lane) == "malformed"
    direct.close()
    await lane.aclose()


async def test_one_peer_has_a_few_turns_only(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "_PER_PEER_MAX", 2)
    monkeypatch.setattr(turns, "_WAIT_STALLS", 0.001)
    monkeypatch.setattr(ask, "_BUSY_S", 0.0)
    monkeypatch.setattr(ask, "_BUSY_PAUSES_S", (0.01,))
    data, seller = chunks(1), await world.seller()
    seller.hold(data)
    lanes = [await open_lane(seller, op="get", **about(data)) for _ in range(2)]
    assert [await answer_of(lane) for lane in lanes] == ["ready", "ready"]
    assert await refused(fetch(world, seller, data=data)) == "busy"
    assert await refused(upload(world, seller, data)) == "busy"
    monkeypatch.setattr(ask, "_BUSY_S", WAIT_S)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: fetch(world, seller, data=data))
        nursery.start_soon(lambda: upload(world, seller, data))
        await eventually(lambda: seller.lanes > 10)  # asked again and again
        assert world.left() != ["file"]
        for lane in lanes:
            await lane.aclose()
    assert world.left() == ["file"]
    assert seller.uploaded(digest(data)).read_bytes() == data


async def test_a_client_that_never_comes(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "TOKEN_S", 0.05)
    monkeypatch.setattr(serve, "DIAL_S", 0.0)
    data, seller = chunks(1), await world.seller()
    seller.hold(data)
    lane = await open_lane(seller, op="get", direct=True, **about(data))
    assert await answer_of(lane) == "ready"
    assert await answer_of(lane) == "unreachable"
    await lane.aclose()


def test_a_peer_that_drips(monkeypatch: pytest.MonkeyPatch):
    now = 0.0

    class Dripping(socket.socket):
        def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
            nonlocal now
            now += 0.9
            return 1

    with Dripping() as sock, monkeypatch.context() as patch:
        patch.setattr("lumaris_overlay.bulk.wire.time.monotonic", lambda: now)
        end = Wire(sock, stall_s=1.0)
        end.receive(memoryview(bytearray(4)))
        with pytest.raises(wire.Stalled):
            end.receive(memoryview(bytearray(100)))
    assert now < 10


async def test_a_seller_that_says_it_holds_more_than_there_is(world: World):
    class Boaster(Seller):
        async def answer(self, header: BlobHeader, framed: FramedStream) -> None:
            reply = BlobReply(state="ready", first=3)
            await framed.send(Kind.HEADER, msgspec.json.encode(reply))
            await framed.receive()

    seller = await world.seller(kind=Boaster)
    assert await refused(upload(world, seller, chunks(2))) == "malformed"


# --- targets and disks ---


def make_link(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def make_hard_link(path: Path, secret: Path) -> None:
    path.hardlink_to(secret)


def make_folder(path: Path, secret: Path) -> None:
    path.mkdir()


def make_pipe(path: Path, secret: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [make_link, make_hard_link, make_folder, make_pipe])
async def test_something_else_in_the_place_of_the_part(
    world: World, tmp_path: Path, make: Callable[[Path, Path], None]
):
    data, seller = chunks(2), await world.seller()
    seller.hold(data)
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    part = part_path(world.inbox / "file", digest(data))
    make(part, secret)
    await fetch(world, seller, data=data)
    assert secret.read_bytes() == b"secret"
    assert (world.inbox / "file").read_bytes() == data
    assert world.left() == [part.name, "file"]


async def test_a_target_that_is_a_link_is_replaced(world: World, tmp_path: Path):
    data, seller = chunks(1), await world.seller()
    seller.hold(data)
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (world.inbox / "file").symlink_to(secret)
    await fetch(world, seller, data=data)
    assert secret.read_bytes() == b"secret"
    assert not (world.inbox / "file").is_symlink()
    assert (world.inbox / "file").read_bytes() == data


async def test_a_target_that_cannot_be_written(world: World):
    data, seller = chunks(1), await world.seller()
    seller.hold(data)
    (world.inbox / "file").mkdir()
    assert await refused(fetch(world, seller, data=data)) == "not_writable"
    assert world.left() == ["file"]
    (world.inbox / "file").rmdir()
    world.inbox.rmdir()
    assert await refused(fetch(world, seller, data=data)) == "not_writable"


async def test_sources_that_are_no_files(world: World, tmp_path: Path):
    seller = await world.seller()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        put = put_file(seller.source.overlay, seller.peer, SESSION, path, sha256=digest(b""))
        assert await refused(put) == "bad_input"
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    seller.hold(b"x")
    seller.files[digest(b"x")].unlink()
    seller.files[digest(b"x")].symlink_to(secret)
    assert await refused(fetch(world, seller, data=b"x")) == "platform_error"


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@both_ways
async def test_a_full_disk(world: World, direct: bool):
    data, seller = chunks(4), await world.seller(direct=direct)
    seller.hold(data)
    source = world.file(data)
    with files_no_larger_than(5 * CHUNK_BYTES // 2):
        assert await refused(fetch(world, seller, data=data)) == "disk_short"
        put = put_file(seller.source.overlay, seller.peer, SESSION, source, sha256=digest(data))
        assert await refused(put) == "disk_short"
    assert world.left() == []
    assert [path.name for path in seller.folder.iterdir()] == [seller.files[digest(data)].name]
