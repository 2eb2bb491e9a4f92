"""An order whose image only its buyer has, or that must be fetched, told as it goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lumaris_node.images.content import ContentStore
from lumaris_node.images.service import ImageService
from lumaris_node.orders import OrderRun
from lumaris_overlay.image_archive import ImageArchive
from lumaris_protocol import ids
from lumaris_protocol.errors import LumarisError
from tests.node.images.tars import file, image, pack
from tests.node.images.test_service import Tier


class SentInputs:
    """A buyer that sends what it is asked for, if it has it."""

    def __init__(self, folder: Path, offered: dict[str, bytes]) -> None:
        self._folder, self._offered = folder, offered
        self.asked: list[dict[str, int]] = []

    def path(self, sha256: str) -> Path:
        return self._folder / sha256.removeprefix("sha256:")

    def has(self, sha256: str) -> bool:
        return self.path(sha256).exists()

    @contextmanager
    def wanting(self, sizes_max: Mapping[str, int]) -> Iterator[None]:
        self.asked.append(dict(sizes_max))
        yield

    async def arrived(self, sha256: str) -> None:
        if sha256 not in self._offered:
            raise LumarisError("cancelled")
        self.path(sha256).write_bytes(self._offered[sha256])

    async def drop(self, sha256: str) -> None:
        self.path(sha256).unlink(missing_ok=True)


def order_of(digest: str, tmp_path: Path, offered: dict[str, bytes], **options: Any) -> Any:
    (tmp_path / "inputs").mkdir()
    events: list[tuple[object, ...]] = []
    session = SimpleNamespace(
        inputs=SentInputs(tmp_path / "inputs", offered),
        images=ImageService(ContentStore(tmp_path / "content"), **options),
        machine=SimpleNamespace(
            preparing=lambda n, missing, now: [("preparing", missing)],
            progress=lambda n, what, done, total, now: [("progress", what, done, total)],
        ),
        apply=events.extend,
        now=lambda: 0.0,
        events=events,
    )
    order = SimpleNamespace(
        n=1, job="job", image=digest, image_source="", limits=SimpleNamespace(log_bytes=0)
    )
    tier = Tier(tmp_path / "roots")
    run = OrderRun(cast(Any, order), cast(Any, session), cast(Any, tier), tmp_path)
    run.machine.take("prepare")
    return run, session, tier


async def test_a_buyer_sends_its_own_image_part_by_part(tmp_path: Path) -> None:
    layers = [pack(file("a", b"1")), pack(file("b", b"2"))]
    archive, digest = image(tmp_path, *layers)
    config = ImageArchive(archive).raw_config
    offered = {ids.digest(data): data for data in (config, *layers)}
    run, session, tier = order_of(digest, tmp_path, offered)
    await run._image_from_buyer()
    assert tier.added == [digest]
    first, second = (list(asked) for asked in session.inputs.asked)
    assert first == [digest] and second == [ids.digest(layer) for layer in layers]
    assert session.events == [("preparing", (digest,)), ("preparing", tuple(second))]
    assert list((tmp_path / "inputs").iterdir()) == []
    assert await run._have_image()


async def test_what_a_buyer_does_not_send_leaves_nothing(tmp_path: Path) -> None:
    archive, digest = image(tmp_path, pack(file("a", b"1")))
    config = ImageArchive(archive).raw_config
    run, _, tier = order_of(digest, tmp_path, {digest: config})
    with pytest.raises(LumarisError):
        await run._image_from_buyer()
    assert tier.added == [] and list((tmp_path / "inputs").iterdir()) == []


async def test_a_configuration_that_is_none(tmp_path: Path) -> None:
    digest = ids.digest(b"no configuration")
    run, _, _ = order_of(digest, tmp_path, {digest: b"no configuration"})
    with pytest.raises(LumarisError) as caught:
        await run._image_from_buyer()
    assert caught.value.code == "bad_image"


async def test_an_owner_may_take_no_images_from_buyers(tmp_path: Path) -> None:
    run, session, _ = order_of(ids.digest(b"x"), tmp_path, {}, buyer_images=False)
    with pytest.raises(LumarisError) as caught:
        await run._image_from_buyer()
    assert caught.value.code == "bad_image" and session.inputs.asked == []


async def test_progress_is_told_once_a_second(tmp_path: Path, autojump_clock: object) -> None:
    run, session, _ = order_of(ids.digest(b"x"), tmp_path, {})
    for done in range(100):
        run._progress("peers", done, 100)
    assert session.events == [("progress", "peers", 0, 100)]
