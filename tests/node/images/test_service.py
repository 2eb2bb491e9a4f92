"""Having an image: from here, from peers, from a registry; and what peers may ask of us."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing

from lumaris_node.executors.port import Executor, Progress
from lumaris_node.images import peers as peering
from lumaris_node.images.content import ContentStore
from lumaris_node.images.peers import ask_parts, holders
from lumaris_node.images.rootfs import RootfsStore
from lumaris_node.images.service import ImageService
from lumaris_overlay.framed_stream import FramedStream
from lumaris_overlay.image_archive import ImageArchive
from lumaris_overlay.registry import ANY_REGISTRY, Blob, FoundImage, Reference, Registry
from lumaris_overlay.simulated.network import SimulatedOverlay, open_network
from lumaris_protocol import codec, ids
from lumaris_protocol.catalog import CATALOG
from lumaris_protocol.errors import LumarisError, RefusedError
from lumaris_protocol.frames import Kind
from lumaris_protocol.limits import GIB
from lumaris_protocol.messages.advert import Advert
from lumaris_protocol.protocols import CONTENT, ContentHeader, ContentPart, ContentParts
from tests.node.images.tars import file, image, pack
from tests.overlay import world
from tests.overlay.registries import Pusher, run_registry

MODULE = next(iter(CATALOG.values())).digest


class Tier:
    """A tier that keeps images as root folders, and modules as files."""

    def __init__(self, folder: Path, tier: str = "process") -> None:
        self.tier, self.roots = tier, RootfsStore(folder, bytes_max=1 << 30)
        self.added: list[str] = []

    async def has_image(self, image: str) -> bool:
        return image in self.added

    async def add_image(self, image: str, source: Path, progress: Progress | None = None) -> None:
        if self.tier != "wasm":
            await trio.to_thread.run_sync(self.roots.add, source, image)
        elif ids.digest(source.read_bytes()) != image:
            raise LumarisError("bad_image")
        self.added.append(image)

    async def images(self) -> tuple[str, ...]:
        return tuple(self.added)


class Peer:
    """A node's images and its place in the network."""

    def __init__(self, folder: Path, overlay: SimulatedOverlay, name: str) -> None:
        self.overlay, self.name, self.seq = overlay, name, 0
        self.store = ContentStore(folder / name / "content")
        self.tier = Tier(folder / name / "roots")
        self.modules: dict[str, Path] = {}
        self.service = ImageService(
            self.store, overlay=overlay, policy=ANY_REGISTRY, module=self.modules.get
        )

    async def advertise(self, *digests: str) -> None:
        self.seq += 1
        key = world.key_of(self.name)
        whole = codec.open_signed(
            world.advert(key, self.seq, cert=world.certificate(key.peer_id)),
            Advert,
            network=world.NETWORK,
        ).message
        changed = msgspec.structs.replace(whole, cached=digests)
        await self.overlay.publish_advert(codec.sign(changed, key, world.NETWORK).data)


@asynccontextmanager
async def peers(folder: Path, *names: str) -> AsyncIterator[list[Peer]]:
    async with open_network(world.NETWORK, world.KEYS) as network:
        found = []
        for name in names:
            overlay = network.host(world.key_of(name))
            await overlay.present(world.certificate(world.key_of(name).peer_id))
            found.append(Peer(folder, overlay, name))
        async with trio.open_nursery() as nursery:
            for peer in found:
                nursery.start_soon(_serve, peer)
                await peer.overlay.connect([other.overlay.address for other in found])
            await trio.testing.wait_all_tasks_blocked()
            yield found
            nursery.cancel_scope.cancel()


async def _serve(peer: Peer) -> None:
    async with peer.overlay.serve(CONTENT, peer.service.desk.serve):
        await trio.sleep_forever()


def tier_of(peer: Peer) -> Executor:
    return cast(Executor, cast(Any, peer.tier))


async def give(peer: Peer, at: Path, name: str, *, share: bool = True) -> str:
    """An image that the peer keeps and advertises."""
    (at / name).mkdir()
    archive, digest = image(at / name, pack(file(name, b"x" * 5000)), pack(file("top", b"y")))
    peer.store.take_archive(archive, share=share)
    await peer.advertise(digest)
    return digest


@pytest.mark.slow
async def test_an_image_comes_from_peers(tmp_path: Path) -> None:
    async with peers(tmp_path, "one", "two", "three") as (one, two, three):
        digest = await give(one, tmp_path, "a")
        told: list[tuple[str, int, int]] = []
        assert await two.service.ensure(
            digest, tier_of(two), progress=lambda *found: told.append(found)
        )
        assert (two.tier.roots.path(digest) / "a").read_bytes() == b"x" * 5000
        assert told[0][0] == "peers" and told[-1][0] == "unpacking"
        assert await two.service.ensure(digest, tier_of(two))
        assert two.tier.added == [digest]
        # What came from a peer is given on, and from several.
        await two.advertise(digest)
        assert set(await holders(three.overlay, digest)) == {
            one.overlay.peer_id,
            two.overlay.peer_id,
        }
        assert await three.service.ensure(digest, tier_of(three))
        assert await three.service.cached([tier_of(three)]) == (digest,)


async def test_what_the_owner_imported_is_advertised_before_it_was_used(tmp_path: Path) -> None:
    async with peers(tmp_path, "one") as (one,):
        digest = await give(one, tmp_path, "a", share=False)
        assert not await one.tier.has_image(digest)
        assert await one.service.cached([tier_of(one)]) == (digest,)
        one.tier.tier = "wasm"
        assert await one.service.cached([tier_of(one)]) == ()


@pytest.mark.slow
async def test_orders_share_one_fetch(tmp_path: Path) -> None:
    async with peers(tmp_path, "one", "two") as (one, two):
        digest = await give(one, tmp_path, "a")
        results: list[bool] = []

        async def want() -> None:
            results.append(await two.service.ensure(digest, tier_of(two)))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(want)
            cancelled = trio.CancelScope()
            cancelled.cancel()
            with cancelled:
                await want()
        assert results == [True] * 5 and two.tier.added == [digest]
        assert not list(two.store.directory.glob(".archive*"))


@pytest.mark.slow
async def test_private_images_stay(tmp_path: Path) -> None:
    async with peers(tmp_path, "one", "two") as (one, two):
        digest = await give(one, tmp_path, "a", share=False)
        assert not await two.service.ensure(digest, tier_of(two))
        layer = one.store.records()[0].layers[0]
        for asked in (digest, layer.digest, ids.digest(b"none")):
            with pytest.raises(RefusedError) as caught:
                await ask_parts(two.overlay, one.overlay.peer_id, asked)
            assert caught.value.code == "not_found"
            stream = FramedStream(await two.overlay.open_stream(one.overlay.peer_id, CONTENT))
            header = ContentHeader(op="get", digest=asked, size_bytes=layer.size)
            await stream.send(Kind.HEADER, msgspec.json.encode(header))
            with pytest.raises(RefusedError, match="not_found"):
                await stream.expect(Kind.HEADER)
            await stream.aclose()


@pytest.mark.slow
async def test_catalog_modules_are_given_and_others_are_not(tmp_path: Path) -> None:
    async with peers(tmp_path, "one", "two") as (one, two):
        own = tmp_path / "own"
        own.write_bytes(b"\0asm own")
        for digest in (MODULE, ids.digest(b"\0asm own")):
            one.modules[digest] = own
        await one.advertise(*one.modules)
        two.tier.tier = "wasm"
        for digest in one.modules:  # one is private, and the other is not what it says
            assert not await two.service.ensure(digest, tier_of(two))
        assert (await ask_parts(two.overlay, one.overlay.peer_id, MODULE))[0].size == 8
        assert not list((two.store.directory / "blobs").glob("[0-9a-f]*"))


@pytest.mark.slow
async def test_a_peer_that_lies_costs_time_only(tmp_path: Path) -> None:
    async with peers(tmp_path, "liar", "two") as (liar, two):
        (tmp_path / "x").mkdir()
        archive, digest = image(tmp_path / "x", pack(file("a", b"1")))
        wrong = pack(file("a", b"2"))
        record = liar.store.take_archive(archive, share=True)
        layer = liar.store.add(wrong)
        parts = (record.layers[0].__class__(layer, len(wrong)),)
        liar.store.save(msgspec.structs.replace(record, layers=parts))
        await liar.advertise(digest)
        assert not await two.service.ensure(digest, tier_of(two))
        assert two.store.records() == () and two.tier.added == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        [ids.digest(b"other")],
        [None],
        [None, ids.digest(b"never given")],
    ],
)
async def test_parts_that_lie(tmp_path: Path, parts: list[str | None]) -> None:
    digest = ids.digest(b"image")

    async def answer(stream: Any) -> None:
        framed = FramedStream(stream)
        header = await framed.expect_header(ContentHeader)
        if header.op == "get":
            await framed.refuse(RefusedError("not_found"))
            return
        named = tuple(ContentPart(digest=part or digest, size_bytes=5) for part in parts)
        await framed.send(Kind.HEADER, msgspec.json.encode(ContentParts(parts=named)))

    async with peers(tmp_path, "two", "three") as (two, three):
        async with open_extra(two, answer) as key:
            await key.advertise(digest)
            assert not await two.service.ensure(digest, tier_of(two))
        assert not await three.service.ensure(digest, tier_of(three))


@asynccontextmanager
async def open_extra(peer: Peer, answer: Any) -> AsyncIterator[Peer]:
    """Another host of the same network, that answers as it likes."""
    network = peer.overlay._network
    overlay = network.host(world.key_of("extra"))
    await overlay.present(world.certificate(overlay.peer_id))
    await overlay.connect([peer.overlay.address])
    async with overlay.serve(CONTENT, answer):
        yield Peer(peer.store.directory.parent, overlay, "extra")


@pytest.mark.slow
@pytest.mark.parametrize("code", ["disk_short", "image_refused", "cancelled", ""])
async def test_what_a_peer_says_does_not_stop_the_next_place(tmp_path: Path, code: str) -> None:
    digest, asked = ids.digest(b"image"), []

    async def answer(stream: Any) -> None:
        framed = FramedStream(stream)
        await framed.expect_header(ContentHeader)
        if code:
            await framed.refuse(RefusedError(code))
            return
        parts = [ContentPart(digest=digest, size_bytes=100)]  # and much more that is nowhere
        parts += [ContentPart(digest=ids.digest(b"%d" % n), size_bytes=GIB - 7) for n in range(16)]
        await framed.send(Kind.HEADER, msgspec.json.encode(ContentParts(parts=tuple(parts))))

    def registry(source: str) -> Any:
        asked.append(source)
        raise LumarisError("unreachable")

    async with peers(tmp_path, "two") as (two,):
        (tmp_path / "held").mkdir()
        archive, held = image(tmp_path / "held", pack(file("a", b"1")))
        record = two.store.take_archive(archive, share=True)
        two.store.save(msgspec.structs.replace(record, keep=False))
        two.service._open_registry = registry
        async with open_extra(two, answer) as extra:
            await extra.advertise(digest)
            with pytest.raises(LumarisError, match="unreachable"):
                await two.service.ensure(digest, tier_of(two), source="x")
        assert asked == ["x"] and two.store.find(held) is not None


class _Slow(Registry):
    """A registry whose bytes are right, and come in pieces with a pause before each."""

    def __init__(self, archive: Path, layers: list[bytes], pause_s: float) -> None:
        raw = ImageArchive(archive).raw_config
        found = tuple(Blob(ids.digest(layer), len(layer)) for layer in layers)
        self.reference = Reference("registry.test", "a")
        self.found = FoundImage(self.reference, Blob(ids.digest(raw), len(raw)), raw, found)
        self._blobs = {ids.digest(layer): layer for layer in layers}
        self._pause_s = pause_s

    async def __aenter__(self) -> Registry:
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    async def find(self) -> FoundImage:
        return self.found

    async def _pieces(self, blob: Blob, start: int) -> AsyncGenerator[tuple[int, bytes]]:
        data = self._blobs[blob.digest]
        for at in range(start, len(data), 1000):
            await trio.sleep(self._pause_s)
            yield at, data[at : at + 1000]


@pytest.mark.slow
async def test_images_that_share_a_layer_are_fetched_at_once(tmp_path: Path) -> None:
    base, found = pack(file("base", b"b" * 20_000)), {}
    for name, pause_s in (("a", 0.001), ("b", 0.004)):
        (tmp_path / name).mkdir()
        layers = [base, pack(file("top", name.encode()))]
        archive, digest = image(tmp_path / name, *layers)
        found[name] = (digest, _Slow(archive, layers, pause_s))
    store, tier = ContentStore(tmp_path / "content"), Tier(tmp_path / "roots")
    service = ImageService(store, open_registry=lambda source: found[source][1])
    executor = cast(Executor, cast(Any, tier))
    async with trio.open_nursery() as nursery:
        for name, (digest, _) in found.items():
            nursery.start_soon(partial(service.ensure, digest, executor, source=name))
    assert sorted(tier.added) == sorted(digest for digest, _ in found.values())
    assert store.path(ids.digest(base)).read_bytes() == base
    # What goes bad on this disk is noticed when it is used, and fetched anew.
    store.path(ids.digest(base)).write_bytes(b"bad" * 9000)
    tier.added.clear()
    digest = found["a"][0]
    tier.roots.remove(digest)
    assert await service.ensure(digest, executor, source="a")
    assert store.path(ids.digest(base)).read_bytes() == base


async def test_a_list_of_hashes_costs_as_much_as_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peering, "_GIVEN_BURST", 25_000.0)
    monkeypatch.setattr(peering, "_GIVEN_PER_S", 0.0)
    async with peers(tmp_path, "one", "two") as (one, two):
        await give(one, tmp_path, "a")
        layer, codes = one.store.records()[0].layers[0], []
        for _ in range(4):
            stream = FramedStream(await two.overlay.open_stream(one.overlay.peer_id, CONTENT))
            header = ContentHeader(
                op="get", digest=layer.digest, size_bytes=layer.size, listed=True
            )
            await stream.send(Kind.HEADER, msgspec.json.encode(header))
            try:
                await stream.expect(Kind.HEADER)
            except RefusedError as error:
                codes.append(error.code)
            await stream.aclose()
        assert layer.size * 3 > 25_000 and codes == ["busy", "busy"]


async def test_who_asks_too_much_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peering, "_ASKS_BURST", 3.0)
    monkeypatch.setattr(peering, "_ASKS_PER_S", 0.0)
    async with peers(tmp_path, "one", "two") as (one, two):
        codes = []
        for _ in range(5):
            with pytest.raises(RefusedError) as caught:
                await ask_parts(two.overlay, one.overlay.peer_id, MODULE)
            codes.append(caught.value.code)
        assert codes == ["not_found"] * 3 + ["busy"] * 2


@pytest.mark.slow
async def test_an_image_comes_from_a_registry_then_from_its_buyer_to_peers(
    registry_program: str, tmp_path: Path
) -> None:
    archive, digest = image(tmp_path, pack(file("a", b"1" * 9000)), pack(file("b", b"2")))
    with run_registry(registry_program, tmp_path / "registry") as host:
        pusher = Pusher(host, "team/app")
        source = pusher.image(archive, "v1")
        pusher.close()
        async with peers(tmp_path, "one", "two") as (one, two):
            with pytest.raises(LumarisError, match="another one"):
                await one.service.ensure(ids.digest(b"x"), tier_of(one), source=source)
            strict = ImageService(one.store)
            with pytest.raises(LumarisError) as caught:
                await strict.ensure(digest, tier_of(one), source=source)
            assert caught.value.code == "image_refused"
            assert await one.service.ensure(digest, tier_of(one), source=source)
            assert (one.tier.roots.path(digest) / "a").read_bytes() == b"1" * 9000
            await one.advertise(digest)
            assert await two.service.ensure(digest, tier_of(two))  # compressed layers and all
            assert two.tier.added == [digest]


async def test_a_buyers_own_image_is_installed_and_not_kept(tmp_path: Path) -> None:
    layer = pack(file("a", b"1"))
    archive, digest = image(tmp_path, layer)
    (tmp_path / "part").write_bytes(layer)
    async with peers(tmp_path, "one") as (one,):
        config = ImageArchive(archive).raw_config
        await one.service.install(tier_of(one), config, [tmp_path / "part"])
        assert one.tier.added == [digest] and one.store.records() == ()
        (tmp_path / "part").write_bytes(pack(file("a", b"2")))
        one.tier.roots.remove(digest)
        with pytest.raises(LumarisError):
            await one.service.install(tier_of(one), config, [tmp_path / "part"])


@pytest.mark.slow
async def test_an_image_that_takes_too_long(
    tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with peers(tmp_path, "one") as (one,):

        async def for_ever(*_: object) -> bool:
            await trio.sleep_forever()
            return False

        monkeypatch.setattr(one.service, "_have", for_ever)
        with pytest.raises(LumarisError) as caught:
            await one.service.ensure(ids.digest(b"x"), tier_of(one))
        assert caught.value.code == "image_timeout"
