"""GET /v1/offers: what the overlay has told, the cheapest first, page by page."""

from __future__ import annotations

import base64
import random
import threading
from typing import Any

import anyio
import pytest

from lumaris_coordinator.offers import service
from lumaris_overlay.ports import AdvertEvent
from lumaris_protocol import codec, matching
from lumaris_protocol.codec import Signed
from lumaris_protocol.ids import digest
from lumaris_protocol.keys import PeerId
from lumaris_protocol.limits import GIB, MIB
from lumaris_protocol.messages.advert import Advert, Gpu, PriceTable, Resources, Runtime, Tier
from lumaris_protocol.messages.negotiation import Requirements
from lumaris_protocol.money import TEST_CURRENCY
from tests.coordinator.builders import NETWORK, Market, key_of

IMAGE = digest(b"image")
L4 = Gpu(model="L4", vram_bytes=24 * GIB, count=2)


def advert(
    market: Market,
    name: str,
    price: int = 1,
    *,
    seq: int = 1,
    region: str = "eu",
    tiers: tuple[Tier, ...] = ("wasm",),
    cpu_millis: int = 4_000,
    gpus: tuple[Gpu, ...] = (),
    cached: tuple[str, ...] = (),
    lifetime_s: int = 600,
    currency: str = TEST_CURRENCY,
) -> Signed[Advert]:
    free = Resources(cpu_millis=cpu_millis, memory_bytes=8 * GIB, disk_bytes=16 * GIB, gpus=gpus)
    message = Advert(
        seller=key_of(name).peer_id,
        seq=seq,
        issued_at=market.now,
        expires_at=market.now + lifetime_s,
        region=region,
        total=free,
        free=free,
        runtimes=tuple(Runtime(tier=tier, version="1", assurance=tier) for tier in tiers),
        benchmarks={},
        prices=PriceTable(
            currency=currency, start_nanos=0, cpu_core_s_nanos=price, memory_gib_s_nanos=0
        ),
        lease_s_max=7_200,
        addresses=(),
        cached=cached,
        certificate=b"checked by the overlay",
    )
    return codec.sign(message, key_of(name), NETWORK)


def tell(market: Market, *adverts: Signed[Advert]) -> None:
    for each in adverts:
        event = AdvertEvent(PeerId(each.message.seller), each.data, each.message.seq)
        market.coordinator.offers.take(event)


async def ask(market: Market, **query: Any) -> dict[str, Any]:
    answer = await market.client.get("/v1/offers", params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def sellers(market: Market, **query: Any) -> list[str]:
    return [offer["seller"] for offer in (await ask(market, **query))["offers"]]


def peers(*names: str) -> list[str]:
    return [str(key_of(name).peer_id) for name in names]


async def test_cheapest_first_with_their_signed_words(market: Market):
    given = {name: advert(market, name, price) for name, price in (("a", 3), ("b", 1), ("c", 2))}
    tell(market, *given.values())
    found = await ask(market)
    assert [offer["seller"] for offer in found["offers"]] == peers("b", "c", "a")
    first = found["offers"][0]
    data = base64.b64decode(first["advert"])
    assert codec.open_signed(data, Advert, network=NETWORK).message == given["b"].message
    assert first["hour_nanos"] == 3_600
    assert first["tiers"] == {"wasm": "wasm"}
    assert (first["expires_at"], first["region"]) == (market.now + 600, "eu")
    assert (found["seen"], found["hint"], found["next"]) == (3, True, None)
    assert found["as_of"] == market.now


async def test_nothing_heard_is_an_empty_list_as_old_as_never(market: Market):
    assert await ask(market) == {"offers": [], "next": None, "seen": 0, "as_of": 0, "hint": True}


async def test_pages_go_through_all_of_them_once(market: Market):
    names = [f"seller {number}" for number in range(25)]
    tell(market, *(advert(market, name, 1 + index % 4) for index, name in enumerate(names)))
    whole = await sellers(market, limit=100)
    assert len(whole) == 25
    paged, after = [], ""
    while True:
        page = await ask(market, limit=7, after=after)
        paged += [offer["seller"] for offer in page["offers"]]
        after = page["next"]
        if after is None:
            break
    assert paged == whole


async def test_a_page_goes_on_where_it_was_though_others_came_and_went(market: Market):
    tell(market, *(advert(market, f"s{number}", 10 + number) for number in range(6)))
    first = await ask(market, limit=2)
    tell(market, *(advert(market, f"new {number}", 1) for number in range(9)))
    market.coordinator.offers.take(AdvertEvent(key_of("s0").peer_id, None, 2))
    second = await ask(market, limit=2, after=first["next"])
    assert [offer["seller"] for offer in second["offers"]] == peers("s2", "s3")
    third = await ask(market, limit=5, after=second["next"])
    assert [offer["seller"] for offer in third["offers"]] == peers("s4", "s5")
    assert third["next"] is None


async def test_filters_mean_what_they_mean_to_a_buyer(market: Market):
    tell(
        market,
        advert(market, "eu", 1),
        advert(market, "us", 2, region="us"),
        advert(market, "gpu", 3, gpus=(L4,)),
        advert(market, "image", 4, tiers=("container",), cached=(IMAGE,)),
        advert(market, "small", 5, cpu_millis=500),
        advert(market, "other money", 1, currency="EUR"),
    )
    assert await sellers(market) == peers("eu", "us", "gpu", "image")
    assert await sellers(market, region="us") == peers("us")
    assert await sellers(market, region=["us", "eu"], limit=2) == peers("eu", "us")
    assert await sellers(market, gpu="1") == peers("gpu")
    assert await sellers(market, gpu="L4:2") == peers("gpu")
    assert await sellers(market, gpu="L4:3") == []
    assert await sellers(market, gpu="H100") == []
    assert await sellers(market, tier="container") == peers("image")
    assert await sellers(market, tier="container", image=IMAGE) == peers("image")
    assert await sellers(market, tier="container", image=digest(b"other")) == []
    assert await sellers(market, cpu_millis=500, rate_nanos_max=1) == peers("eu", "us", "gpu")
    assert await sellers(market, rate_nanos_max=2) == peers("eu", "us")
    assert await sellers(market, memory_bytes=9 * GIB) == []
    assert await sellers(market, disk_bytes=17 * GIB) == []
    assert await sellers(market, lease_s=7_201) == []


async def test_the_order_is_that_of_matching(market: Market):
    dice = random.Random(7)
    tiers: list[Tier] = ["wasm", "process", "container", "vm"]
    adverts = [
        advert(
            market,
            f"random {number}",
            dice.randrange(1, 6),
            tiers=tuple(dice.sample(tiers, dice.randrange(1, 4))),
            region=dice.choice(("eu", "us")),
            cached=(IMAGE,) if dice.random() < 0.3 else (),
        )
        for number in range(60)
    ]
    tell(market, *adverts)
    for tier in tiers:
        for image in (None, IMAGE):
            needs = Requirements(
                resources=Resources(cpu_millis=1_000, memory_bytes=512 * MIB, disk_bytes=64 * MIB),
                tier=tier,
                image=image,
                currency=TEST_CURRENCY,
            )
            report = matching.match(needs, adverts, lease_s=3_600)
            query = {"tier": tier, "limit": 100, **({"image": image} if image else {})}
            expected = [match.advert.message.seller for match in report.matches]
            assert await sellers(market, **query) == expected


async def test_expired_and_withdrawn_ones_never_appear(market: Market):
    tell(market, advert(market, "short", lifetime_s=60), advert(market, "long"))
    market.clock.now += 60
    found = await ask(market)
    assert [offer["seller"] for offer in found["offers"]] == peers("long")
    assert found["seen"] == 1
    market.coordinator.offers.take(AdvertEvent(key_of("long").peer_id, None, 2))
    assert await sellers(market) == []


async def test_what_is_not_signed_by_its_seller_is_not_taken(market: Market):
    good = advert(market, "a")
    offers = market.coordinator.offers
    offers.take(AdvertEvent(key_of("b").peer_id, good.data, 1))
    offers.take(AdvertEvent(key_of("a").peer_id, good.data[:-1] + b"\0", 1))
    offers.take(AdvertEvent(key_of("a").peer_id, b"x", 1))
    assert len(offers) == 0


async def test_the_index_is_bounded(market: Market, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(service, "DIRECTORY_ADVERTS_MAX", 2)
    tell(market, *(advert(market, name) for name in ("a", "b", "c")))
    assert len(market.coordinator.offers) == 2
    tell(market, advert(market, "a", 9, seq=2))  # who is known may say something new
    assert (await ask(market))["offers"][-1]["seller"] == peers("a")[0]


async def test_pages_end_at_the_depth(market: Market, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(service, "OFFERS_DEPTH_MAX", 5)
    tell(market, *(advert(market, f"s{number}", number) for number in range(1, 12)))
    first = await ask(market, limit=3)
    assert len(first["offers"]) == 3
    second = await ask(market, limit=3, after=first["next"])
    assert second["next"] is None


@pytest.mark.parametrize(
    "query",
    [
        {"cpu_millis": -1},
        {"cpu_millis": "many"},
        {"memory_bytes": 1 << 60},
        {"limit": 0},
        {"limit": 101},
        {"tier": "magic"},
        {"region": "x" * 65},
        {"region": "a b"},
        {"gpu": "L4:0"},
        {"gpu": "L4:x"},
        {"gpu": ["1"] * 17},
        {"image": "python"},
        {"rate_nanos_max": 1 << 60},
        {"lease_s": 0},
        {"after": "x"},
        {"after": "é"},
        {"after": "W10"},
        {"after": base64.urlsafe_b64encode(b'[[1,false,"a"],100000]').decode()},
        {"after": base64.urlsafe_b64encode(b"[" * 100).decode()},
        {"after": "x" * 201},
    ],
    ids=str,
)
async def test_a_query_that_makes_no_sense_is_refused(market: Market, query: dict[str, Any]):
    answer = await market.client.get("/v1/offers", params=query)
    assert answer.status_code == 400, answer.text
    assert answer.json()["code"] == "malformed"


async def test_a_search_holds_up_no_other_request(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    true = market.coordinator.offers.page

    def slow(*arguments: Any, **wanted: Any) -> Any:
        begun.set()
        assert go_on.wait(20)
        return true(*arguments, **wanted)

    monkeypatch.setattr(market.coordinator.offers, "page", slow)
    codes: list[int] = []

    async def search() -> None:
        codes.append((await market.client.get("/v1/offers")).status_code)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(search)
        while not begun.is_set():
            await anyio.lowlevel.checkpoint()
        assert (await market.client.get("/v1/info")).status_code == 200
        assert codes == []
        go_on.set()
    assert codes == [200]
