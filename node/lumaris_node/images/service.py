"""Having an image when an order needs it: what is here, then what peers hold, then a registry.

Nobody pays for this time. Orders that want the same image wait for one fetch; when the one that
fetched it is cancelled the next goes on with what came. A peer that gave what is not the image
costs time only: its hash is checked, and the next place is tried.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from lumaris_node.executors.port import Executor, Progress
from lumaris_node.images.archive import write_archive
from lumaris_node.images.content import ContentStore, ImageRecord, pieces_of
from lumaris_node.images.peers import ContentDesk, FindModule, fetch_image, fetch_module, holders
from lumaris_node.images.turns import Turns
from lumaris_overlay.bulk.rate import Rate
from lumaris_overlay.image_archive import check_here, parse_config
from lumaris_overlay.ports import Overlay
from lumaris_overlay.registry import FoundImage, Policy, Registry, parse_reference
from lumaris_protocol import ids
from lumaris_protocol.catalog import CATALOG
from lumaris_protocol.errors import LumarisError, RemoteError
from lumaris_protocol.limits import CACHED_DIGESTS_MAX, IMAGE_S_MAX

log = logging.getLogger(__name__)
T = TypeVar("T")

# Images fetched at once; each may take the whole line.
_FETCHES_MAX = 4
_USED_MAX = 1024
_ARCHIVE = ".archive-"
_PUBLIC_MODULES = frozenset(entry.digest for entry in CATALOG.values())
# An image with no other place to come from is asked for from peers again and again; others wait.
_PEERS_S_MAX = 900.0
# What we find ourselves in what peers gave, and may be right at the next place. Whatever peers say
# is theirs; and where there is another place, what they name may have needed more room than it.
_NEXT_CODES = frozenset(
    {"bad_image", "unsafe_archive", "disk_short", "output_mismatch", "unreachable"}
)

_WRONG_CODES = frozenset({"bad_image", "unsafe_archive"})
_SHORT = "disk_short"

OpenRegistry = Callable[[str], Registry]


class ImageService:
    """The images of a node. `ensure` for orders, `desk` for other sellers, `cached` for adverts."""

    def __init__(
        self,
        store: ContentStore,
        *,
        overlay: Overlay | None = None,
        policy: Policy | None = None,
        module: FindModule = lambda _: None,
        rate: Rate | None = None,
        buyer_images: bool = True,
        open_registry: OpenRegistry | None = None,
    ) -> None:
        """Without an overlay no peer is asked. `module` finds the file of a module held here.

        `buyer_images`: whether buyers may send container images of their own.
        """
        self.store, self._overlay, self.buyer_images = store, overlay, buyer_images
        policy = policy or Policy()
        self._open_registry = open_registry or (
            lambda source: Registry(parse_reference(source), policy)
        )
        self.desk = ContentDesk(store, module=_catalog_only(module), rate=rate)
        for left in store.directory.glob(f"{_ARCHIVE}*"):
            shutil.rmtree(left, ignore_errors=True)  # of a node that was killed
        self._turns, self._downloads = Turns(), Turns()  # by image, by part
        self._fetches = trio.CapacityLimiter(_FETCHES_MAX)
        self._listeners: dict[str, list[Progress]] = {}
        self._used: dict[str, None] = {}  # digests that orders asked for, the last one last

    async def ensure(
        self,
        image: str,
        executor: Executor,
        *,
        source: str = "",
        progress: Progress = lambda *_: None,
    ) -> bool:
        """Have the image on this tier; False when only the buyer may have it.

        `source` is a registry's reference by hash. Raises LumarisError `image_timeout`,
        `image_refused`, `bad_image`, `disk_short`, `unreachable`.
        """
        self._used.pop(image, None)
        self._used[image] = None
        while len(self._used) > _USED_MAX:
            self._used.pop(next(iter(self._used)))
        if await executor.has_image(image):
            return True
        try:
            with self._told(image, progress), trio.fail_after(IMAGE_S_MAX):
                async with self._turn(image):
                    return await self._have(image, executor, source)
        except trio.TooSlowError:
            raise LumarisError("image_timeout") from None

    async def cached(self, executors: Iterable[Executor]) -> tuple[str, ...]:
        """The digests to advertise: what orders used last, then of each tier and of the store."""
        executors = tuple(executors)
        held = [await executor.images() for executor in executors]
        if any(executor.tier != "wasm" for executor in executors):
            # What the owner imported is installed by the first order that names it.
            records = await trio.to_thread.run_sync(self.store.records)
            held.append(tuple(record.image for record in records))
        every = {digest for digests in held for digest in digests}
        used = [digest for digest in reversed(self._used) if digest in every]
        longest = max(map(len, held), default=0)
        rest = [digests[at] for at in range(longest) for digests in held if at < len(digests)]
        return tuple(dict.fromkeys([*used, *rest]))[:CACHED_DIGESTS_MAX]

    async def install(self, executor: Executor, config: bytes, layers: Sequence[Path]) -> None:
        """Hand an image of a buyer's own to a tier; its parts are not kept nor given to others.

        Raises LumarisError `bad_image`, `unsafe_archive`, `disk_short`, `image_timeout`.
        """
        diff_ids = parse_config(config).diff_ids
        write = partial(write_archive, config=config, layers=layers, diff_ids=diff_ids)
        try:
            with trio.fail_after(IMAGE_S_MAX):
                async with self._archive() as archive:
                    await _stoppable(partial(write, archive))
                    await executor.add_image(ids.digest(config), archive)
        except trio.TooSlowError:
            raise LumarisError("image_timeout") from None

    # --- one image ---

    async def _have(self, image: str, executor: Executor, source: str) -> bool:
        if await executor.has_image(image):
            return True  # another order fetched it meanwhile
        if executor.tier == "wasm":
            return await self._module_from_peers(image, executor)
        record = await trio.to_thread.run_sync(self.store.find, image)
        if record is not None and await self._installed(record, executor):
            return True
        record = await self._from_peers(image, other=bool(source))
        if record is not None and await self._installed(record, executor):
            return True
        if not source:
            return False
        record = await self._from_registry(image, source)
        try:
            await self._install(record, executor)
        except LumarisError as error:
            # What was kept of it may have gone bad on this disk; then it is fetched anew, once.
            if error.code not in _WRONG_CODES or not await self._drop_wrong(record):
                raise
            await self._install(await self._from_registry(image, source), executor)
        return True

    async def _module_from_peers(self, image: str, executor: Executor) -> bool:
        if image not in _PUBLIC_MODULES:
            return False  # nobody gives it, and its buyer is waiting to send it
        for peers in await self._holders(image):
            target = self.store.path(image)
            try:
                with self.store.pin([image]):
                    await fetch_module(self._peers_overlay, peers, image, target)
                    await executor.add_image(image, target)
            except LumarisError as error:  # its buyer may send it
                if not isinstance(error, RemoteError) and error.code not in _NEXT_CODES:
                    raise
                log.info("module not had from peers image=%s code=%s", image, error.code)
            else:
                return True
            finally:
                target.unlink(missing_ok=True)
        return False

    async def _from_peers(self, image: str, *, other: bool) -> ImageRecord | None:
        """The image from whoever advertises it; None when nobody gave it."""
        for peers in await self._holders(image):
            try:
                with trio.fail_after(_PEERS_S_MAX if other else IMAGE_S_MAX):
                    return await fetch_image(
                        self._peers_overlay,
                        peers,
                        image,
                        self.store,
                        progress=lambda done, total: self._tell(image, "peers", done, total),
                    )
            except trio.TooSlowError:
                log.info("image not had from peers in time image=%s", image)
            except LumarisError as error:
                ours = not isinstance(error, RemoteError)
                if ours and (error.code not in _NEXT_CODES or (error.code == _SHORT and not other)):
                    raise
                log.info("image not had from peers image=%s code=%s", image, error.code)
        return None

    async def _from_registry(self, image: str, source: str) -> ImageRecord:
        async with self._open_registry(source) as registry:
            found = await registry.find()
            if found.config.digest != image:
                raise LumarisError("bad_image", "The registry's image is another one.")
            check_here(parse_config(found.raw_config))
            with self.store.pin([image, *(layer.digest for layer in found.layers)]):
                await self._download(registry, found)
                record = ImageRecord(
                    image=image,
                    config_bytes=found.config.size,
                    layers=pieces_of(found.layers),
                    source=source,
                    share=True,
                )
                await trio.to_thread.run_sync(self.store.save, record)
        return record

    async def _download(self, registry: Registry, found: FoundImage) -> None:
        store, image = self.store, found.config.digest
        layers = tuple(dict.fromkeys(found.layers))
        total, done = sum(layer.size for layer in layers), 0
        await trio.to_thread.run_sync(store.add, found.raw_config)
        for layer in layers:

            def tell(size: int, before: int = done) -> None:
                self._tell(image, registry.reference.host, before + size, total)

            async with self._downloads.of(layer.digest):  # images share layers
                if not store.has(layer.digest):
                    part = store.part(layer.digest)
                    await trio.to_thread.run_sync(store.make_room, layer.size)
                    await registry.download(layer, part, progress=tell)
                    await _stoppable(partial(store.finish, layer.digest))
            done += layer.size

    async def _installed(self, record: ImageRecord, executor: Executor) -> bool:
        """Install what peers gave or an earlier fetch left; what is not the image is forgotten."""
        try:
            await self._install(record, executor)
        except LumarisError as error:
            if record.keep or error.code not in _WRONG_CODES:
                raise
            await self._drop_wrong(record)
            log.warning("image not what it should be image=%s why=%s", record.image, error.message)
            await trio.to_thread.run_sync(self.store.remove, record.image)
            return False
        return True

    async def _drop_wrong(self, record: ImageRecord) -> bool:
        """Whether parts had gone bad here; other images that have them must not keep them."""
        return await trio.to_thread.run_sync(self.store.drop_wrong, record)

    async def _install(self, record: ImageRecord, executor: Executor) -> None:
        """Hand an image to its tier, as an archive made of its parts for the time of that."""
        self._tell(record.image, "unpacking", 0, 0)
        with self.store.pin(part.digest for part in record.parts):
            async with self._archive() as archive:
                await _stoppable(partial(self.store.assemble, record, archive))
                await executor.add_image(record.image, archive)

    @asynccontextmanager
    async def _archive(self) -> AsyncIterator[Path]:
        """A file for an archive, gone afterwards."""
        folder = tempfile.mkdtemp(dir=self.store.directory, prefix=_ARCHIVE)
        try:
            yield Path(folder) / "image.tar"
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(shutil.rmtree, folder, True)

    # --- who is asked, who is told ---

    @property
    def _peers_overlay(self) -> Overlay:
        assert self._overlay is not None
        return self._overlay

    async def _holders(self, digest: str) -> list[tuple[str, ...]]:
        """The peers to ask: one group, or none."""
        if self._overlay is None:
            return []
        peers = await holders(self._overlay, digest)
        return [peers] if peers else []

    @asynccontextmanager
    async def _turn(self, image: str) -> AsyncIterator[None]:
        """One fetch for an image, and a few of all."""
        async with self._turns.of(image), self._fetches:
            yield

    @contextmanager
    def _told(self, image: str, progress: Progress) -> Iterator[None]:
        """Tell this one how far the image is, whoever fetches it."""
        told = self._listeners.setdefault(image, [])
        told.append(progress)
        try:
            yield
        finally:
            told.remove(progress)
            if not told:
                self._listeners.pop(image, None)

    def _tell(self, image: str, what: str, done: int, total: int) -> None:
        for listener in self._listeners.get(image, ()):
            listener(what, done, total)


async def _stoppable(work: Callable[..., T]) -> T:
    """Run work in a thread that asks whether it is cancelled, by its argument `check`."""
    check = trio.from_thread.check_cancelled
    return await trio.to_thread.run_sync(partial(work, check=check))


def _catalog_only(find: FindModule) -> FindModule:
    """Modules of the catalog are anyone's; what a buyer sent is that buyer's own."""
    return lambda digest: find(digest) if digest in _PUBLIC_MODULES else None
