"""The canaries (`test_canaries.py`) for the faults of libp2p's pubsub."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from libp2p.custom_types import TProtocol
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub

from lumaris_overlay.libp2p.gossip import Gossip
from tests.overlay.attackers import (
    SENDER,
    SENDER_ID,
    TOPIC,
    content_id,
    gossip_message,
    guarded_pubsub,
    idle_host,
)
from tests.overlay.world import NETWORK

pytestmark = pytest.mark.slow


def stock_pubsub() -> Any:
    router = GossipSub(
        protocols=[TProtocol("/meshsub/1.1.0")], degree=6, degree_low=4, degree_high=12
    )
    return Pubsub(idle_host(), router, msg_id_constructor=content_id)


def count_published(pubsub: Any) -> list[bytes]:
    """What the router is asked to pass on from now on."""
    published: list[bytes] = []

    async def publish(forwarder, message):
        await trio.lowlevel.checkpoint()
        published.append(bytes(message.data))

    pubsub.router.publish = publish
    return published


def test_b12_no_message_is_lost_to_a_count_by_forwarder():
    stock, ours = stock_pubsub().router, Gossip(idle_host(), NETWORK, {})._router
    answers = [
        stock._check_spam_protection(SENDER_ID, gossip_message(SENDER, b"%d" % n, [TOPIC]))
        for n in range(11)
    ]
    assert answers == [True] * 10 + [False]
    assert all(
        ours._check_spam_protection(SENDER_ID, gossip_message(SENDER, b"%d" % n, [TOPIC]))
        for n in range(50)
    )
    assert stock.heartbeat_interval == 120
    assert ours.heartbeat_interval == 1
    assert list(ours.protocols) == ["/meshsub/1.1.0", "/meshsub/1.0.0"]


async def test_b13_a_document_that_comes_twice_at_once_is_passed_on_once():
    async def validate(forwarder, message):
        await trio.lowlevel.checkpoint()
        return True

    stock, ours = stock_pubsub(), guarded_pubsub()
    stock.set_topic_validator(TOPIC, validate, is_async_validator=True)
    for pubsub, times in ((stock, 2), (ours, 1)):
        published = count_published(pubsub)
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                message = gossip_message(SENDER, b"the same", [TOPIC])
                nursery.start_soon(pubsub.push_msg, SENDER_ID, message)
        assert len(published) == times


async def test_b22_a_verdict_is_about_a_message_and_not_about_its_data():
    """Else whoever sends a new advert under a wrong topic first bars the honest copy."""

    def validate(forwarder, message) -> bool:
        return list(message.topicIDs) == [TOPIC]

    stock, ours = stock_pubsub(), guarded_pubsub()
    stock.set_topic_validator(TOPIC, validate, is_async_validator=False)
    for pubsub, passed in ((stock, []), (ours, [b"advert"])):
        published = count_published(pubsub)
        await pubsub.push_msg(SENDER_ID, gossip_message(SENDER, b"advert", [TOPIC, TOPIC]))
        await pubsub.push_msg(SENDER_ID, gossip_message(SENDER, b"advert", [TOPIC]))
        assert published == passed


async def test_b23_delivery_times_are_let_go_of():
    for pubsub, kept in ((stock_pubsub(), 9), (guarded_pubsub(), 0)):
        for number in range(9):
            await pubsub.push_msg(SENDER_ID, gossip_message(SENDER, b"%d" % number, [TOPIC]))
        assert len(pubsub.router.recent_message_deliveries[TOPIC]) == kept


async def test_b24_topics_we_do_not_follow_leave_nothing_behind():
    topics = [TOPIC, *(f"junk {number}" for number in range(100))]
    for pubsub, kept in ((stock_pubsub(), 101), (guarded_pubsub(), 0)):
        pubsub.router.spam_protection_enabled = False
        await pubsub.push_msg(SENDER_ID, gossip_message(SENDER, b"x", topics))
        tables = pubsub.router.scorer.first_message_deliveries
        assert len(tables[SENDER_ID]) == kept
    control = rpc_pb2.ControlMessage(
        graft=[rpc_pb2.ControlGraft(topicID=topic) for topic in topics],
        ihave=[rpc_pb2.ControlIHave(topicID=topic, messageIDs=[b"00"]) for topic in topics],
        iwant=[rpc_pb2.ControlIWant(messageIDs=[b"00"] * 500)],
    )
    guarded_pubsub()._strip(control)
    assert [graft.topicID for graft in control.graft] == [TOPIC]
    assert [ihave.topicID for ihave in control.ihave] == [TOPIC]
    assert list(control.iwant[0].messageIDs) == [b"00"]


async def test_b25_a_restarted_peer_may_use_a_sequence_number_again():
    for pubsub, passed in ((stock_pubsub(), False), (guarded_pubsub(), True)):
        found = None
        for data in (b"before", b"after"):
            message = gossip_message(SENDER, data, [TOPIC])
            message.seqno = b"12345678"
            found = pubsub.router._check_equivocation(message)
        assert found is passed
