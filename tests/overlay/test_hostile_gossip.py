"""What certified peers may do to a host over gossip: it stays quick for the others."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
import trio
from libp2p.pubsub.pb import rpc_pb2

from lumaris_overlay.libp2p.gossip import ADVERTS
from lumaris_protocol.limits import (
    ADVERTS_BURST_PER_SELLER,
    OVERLAY_CONNECTIONS_MAX,
)
from tests.overlay.attackers import (
    PATIENCE_S,
    SENDER,
    STRANGER,
    TOPIC,
    attacked,
    forgeries,
    gossip_message,
    raw_stream,
    rpc_bytes,
    works,
)
from tests.overlay.world import advert, key_of, next_of, until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", range(10))
async def test_forged_advert_over_gossip(pair, number):
    honest, stranger = pair
    await until(lambda: stranger.exchange.gossip.in_mesh(honest.host.get_id()))
    await stranger.exchange.gossip.publish(ADVERTS, forgeries()[number])
    async with honest.adverts() as events:
        good = advert(key_of("good seller"))
        await stranger.publish_advert(good)
        assert (await next_of(events, key_of("good seller").peer_id)).envelope == good
    assert len(honest.directory) == 1


async def test_advert_flood_is_passed_on_only_so_fast(trio_of):
    """Ten times what a seller may say: neighbours of neighbours get the allowed rate."""
    honest, stranger, friend = trio_of
    await until(lambda: stranger.exchange.gossip.in_mesh(honest.host.get_id()))
    said, heard = 0, 0

    async def flood() -> None:
        nonlocal said
        while True:
            said += 1
            await stranger.exchange.gossip.publish(ADVERTS, advert(STRANGER, said))
            await trio.sleep(0.02)

    async with friend.adverts() as events:
        began = trio.current_time()
        await attacked(friend, honest, flood)
        await honest.publish_advert(advert(key_of("one")))
        with trio.fail_after(PATIENCE_S):
            while (event := await events.receive()).seller != honest.peer_id:
                heard += event.seller == STRANGER.peer_id
        allowed = ADVERTS_BURST_PER_SELLER + 2 * (trio.current_time() - began) + 1
    assert heard <= allowed
    assert len(honest.directory) <= 2


async def test_bad_signatures_end_the_connection(trio_of):
    honest, stranger, friend = trio_of
    stream = await raw_stream(stranger, honest, "/meshsub/1.1.0")

    async def flood() -> None:
        with suppress(Exception):
            while True:
                message = gossip_message(SENDER, os.urandom(64), [TOPIC])
                message.signature = bytes(64)
                await stream.write(rpc_bytes(publish=[message]))
        await trio.sleep_forever()

    await attacked(friend, honest, flood)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        await until(lambda: honest.conduct.banned(stranger.peer_id))
        nursery.cancel_scope.cancel()
    await until(lambda: stranger.host.get_id() not in honest.connections.live())
    assert friend.host.get_id() in honest.connections.live()


async def test_flood_of_gossip_is_read_slowly_and_then_ended(trio_of, monkeypatch):
    honest, stranger, friend = trio_of
    pubsub = honest.exchange.gossip._pubsub
    monkeypatch.setattr(pubsub._waits, "_burst", 10)
    stream = await raw_stream(stranger, honest, "/meshsub/1.1.0")

    async def flood() -> None:
        empty = rpc_bytes() * 200
        with suppress(Exception):
            while True:
                await stream.write(empty)
        await trio.sleep_forever()

    await attacked(friend, honest, flood)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        await until(lambda: honest.conduct.banned(stranger.peer_id), PATIENCE_S)
        nursery.cancel_scope.cancel()
    assert len(pubsub._tolls._levels) <= OVERLAY_CONNECTIONS_MAX


@pytest.mark.parametrize(
    "fields",
    [
        {"publish": [rpc_pb2.Message(data=b"x", topicIDs=[TOPIC])] * 600},
        {"control": rpc_pb2.ControlMessage(iwant=[rpc_pb2.ControlIWant(messageIDs=[b"x"] * 5000)])},
        {
            "control": rpc_pb2.ControlMessage(
                graft=[rpc_pb2.ControlGraft(topicID=f"{number}") for number in range(2000)]
            )
        },
        {"publish": [rpc_pb2.Message(data=b"x" * 70_000, topicIDs=[TOPIC])]},
    ],
    ids=["messages", "ids", "grafts", "bytes"],
)
async def test_rpc_that_asks_for_too_much_is_refused(pair, fields):
    honest, stranger = pair
    stream = await raw_stream(stranger, honest, "/meshsub/1.1.0")
    await stream.write(rpc_bytes(**fields))
    with trio.fail_after(10):
        with suppress(Exception):
            while await stream.read(1):
                pass
    await works(honest, stranger)


async def test_subscriptions_are_bounded(pair):
    honest, stranger = pair
    stream = await raw_stream(stranger, honest, "/meshsub/1.1.0")
    options = rpc_pb2.RPC.SubOpts
    for kind in ("junk", "adverts"):
        for start in range(0, 300, 30):
            topics = [f"/lumaris/test/{kind}/{number}" for number in range(start, start + 30)]
            found = [options(subscribe=True, topicid=topic) for topic in topics]
            await stream.write(rpc_bytes(subscriptions=found))
    await works(honest, stranger)
    followed = honest.exchange.gossip._pubsub.peer_topics
    assert len(followed) <= 33
    assert not any("junk" in topic for topic in followed)
