"""Topics by kind and shard, and what a peer's conduct costs it."""

from __future__ import annotations

import os
import time

import pytest
import trio
from libp2p.pubsub.score import PeerScorer

from lumaris_overlay.libp2p.conduct import Conduct
from lumaris_overlay.libp2p.gossip import ADVERTS, DEMANDS, _OurTopics, score_params, topic_of
from lumaris_overlay.libp2p.guarded_pubsub import Judgement
from lumaris_overlay.libp2p.host import open_host
from lumaris_overlay.validate import TokenBuckets
from lumaris_protocol.limits import BAD_ADVERTS_BURST_PER_PEER, BAN_S
from tests.overlay.attackers import SENDER, SENDER_ID, TOPIC, gossip_message, guarded_pubsub
from tests.overlay.hosts import member
from tests.overlay.world import NETWORK, advert, key_of, until


def test_peers_may_follow_our_kinds_in_any_shard_and_nothing_else():
    ours = _OurTopics(("/lumaris/test/adverts/", "/lumaris/test/demands/"))
    assert topic_of(NETWORK, ADVERTS) in ours
    assert topic_of(NETWORK, DEMANDS, 4095) in ours
    for other in (
        topic_of("other", ADVERTS),
        "/lumaris/test/adverts/",
        "/lumaris/test/adverts/00",
        "/lumaris/test/adverts/-1",
        "/lumaris/test/adverts/1/2",
        "/lumaris/test/adverts/\N{ARABIC-INDIC DIGIT ONE}",
        "/lumaris/test/adverts/" + "9" * 5000,
        "",
    ):
        assert other not in ours


def test_six_invalid_messages_mute_a_peer_and_time_forgives():
    scorer = PeerScorer(score_params())
    for number in range(10):
        assert scorer.allow_publish(SENDER_ID, [TOPIC]) is (number < 6)
        scorer.on_invalid_message(SENDER_ID, TOPIC)
    assert scorer.is_graylisted(SENDER_ID, [TOPIC])
    for _ in range(10):
        scorer.on_heartbeat()
    assert scorer.allow_publish(SENDER_ID, [TOPIC])


def test_penalties_lower_the_score():
    scorer = PeerScorer(score_params())
    scorer.on_first_delivery(SENDER_ID, TOPIC)
    good = scorer.score(SENDER_ID, [TOPIC])
    assert good > 0
    scorer.on_invalid_message(SENDER_ID, TOPIC)
    assert scorer.score(SENDER_ID, [TOPIC]) < 0
    scorer.penalize_behavior(SENDER_ID, 50)
    assert scorer.score(SENDER_ID, [TOPIC]) < -40


async def test_what_a_judge_says_is_what_happens():
    said = {b"pass": Judgement.PASS, b"ignore": Judgement.IGNORE, b"reject": Judgement.REJECT}
    pubsub = guarded_pubsub(lambda forwarder, data: said[data])
    published: list[bytes] = []

    async def publish(forwarder, message):
        await trio.lowlevel.checkpoint()
        published.append(bytes(message.data))

    pubsub.router.publish = publish
    for data in (b"ignore", b"reject", b"pass", b"pass"):
        await pubsub.push_msg(SENDER_ID, gossip_message(SENDER, data, [TOPIC]))
    assert published == [b"pass"]
    assert pubsub.router.scorer.invalid_messages[SENDER_ID][TOPIC] == 1
    assert not pubsub._is_msg_seen(gossip_message(SENDER, b"ignore", [TOPIC]))


async def test_conduct_bans_for_a_while(autojump_clock):
    sent_away: list[str] = []
    conduct = Conduct()
    conduct.send_away = sent_away.append
    for _ in range(BAD_ADVERTS_BURST_PER_PEER):
        conduct.fault("peer", "test")
    assert not conduct.banned("peer")
    for _ in range(5):
        conduct.fault("peer", "test")
    assert sent_away == ["peer"]
    assert conduct.banned("peer")
    await trio.sleep(BAN_S + 1)
    assert not conduct.banned("peer")
    for number in range(3000):
        conduct.ban(f"peer {number}", "test")
    assert len(conduct._until) <= 1024


def test_buckets_take_several_at_once():
    buckets = TokenBuckets(per_s=10, burst=20, names_max=2)
    assert buckets.take("a", 0.0, 15)
    assert not buckets.take("a", 0.0, 10)
    assert buckets.take("a", 0.5, 10)
    assert not buckets.take("a", 0.5, 21)


@pytest.mark.slow
async def test_topics_are_joined_and_left():
    async with open_host(member("one")) as one, open_host(member("two")) as two:
        mine, other = one.exchange.gossip, two.exchange.gossip
        heard: list[bytes] = []

        def judge(shard: int, forwarder: str, data: bytes) -> Judgement:
            heard.append(data)
            return Judgement.PASS

        other._judges[ADVERTS] = judge
        await mine.join(ADVERTS, 7)
        # The other follows the shard only after it was told that we do.
        assert await two.connect((await one.reachability()).addresses) == 1
        await other.join(ADVERTS, 7)
        await until(lambda: mine.in_mesh(two.host.get_id(), ADVERTS, 7))
        first = advert(key_of("one"), 1, now=time.time())
        await mine.publish(ADVERTS, first, 7)
        await until(lambda: heard == [first])
        await other.leave(ADVERTS, 7)
        assert topic_of(NETWORK, ADVERTS, 7) not in other.topics()
        await until(lambda: not mine.in_mesh(two.host.get_id(), ADVERTS, 7))
        await mine.publish(ADVERTS, os.urandom(10), 7)
        await until(lambda: mine.in_mesh(two.host.get_id()))
        assert heard == [first]
        with pytest.raises(ValueError, match="shard"):
            await mine.join(ADVERTS, 5000)


@pytest.mark.slow
async def test_greetings_at_once_open_one_stream_and_a_lost_one_is_replaced():
    async with open_host(member("one")) as one, open_host(member("two")) as two:
        mine, peer = one.exchange.gossip, two.host.get_id()
        heard: list[bytes] = []

        def judge(shard: int, forwarder: str, data: bytes) -> Judgement:
            heard.append(data)
            return Judgement.PASS

        two.exchange.gossip._judges[ADVERTS] = judge
        await two.exchange.gossip.join(ADVERTS, 7)
        await mine.join(ADVERTS, 7)
        assert await two.connect((await one.reachability()).addresses) == 1
        await until(lambda: mine.in_mesh(peer, ADVERTS, 7))

        opened: list[object] = []
        new_stream = one.host.new_stream

        async def count(*arguments: object) -> object:
            opened.append(arguments)
            return await new_stream(*arguments)

        one.host.new_stream = count
        pubsub = mine._pubsub
        pubsub._drop_stream(peer)
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(pubsub._handle_new_peer, peer)
        assert len(opened) == 1
        assert pubsub._greeting == {}

        await pubsub.peers[peer].reset()  # as after the loss of one of two connections
        await mine.publish(ADVERTS, b"after the loss", 7)
        await until(lambda: heard == [b"after the loss"])
        assert peer in mine.followers(ADVERTS, 7)
