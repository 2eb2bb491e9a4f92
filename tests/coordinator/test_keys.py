"""The coordinator's own keys: rotation with overlap, revocation, and an offline root."""

from __future__ import annotations

import base64
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from lumaris_coordinator import Coordinator, Settings
from lumaris_coordinator.bounds import KEY_STARTS_AFTER_S, SIGNING_KEY_LIFETIME_S
from lumaris_coordinator.identity import keys
from lumaris_overlay.private_files import read_key
from lumaris_protocol import agreements, codec, key_list, merkle, receipts
from lumaris_protocol.errors import LumarisError
from lumaris_protocol.keys import KeyPair, public_key_of
from lumaris_protocol.messages.budget import BudgetGrant
from lumaris_protocol.messages.notice import KeyList
from tests.coordinator.builders import NETWORK, START, Clock, Market, Party
from tests.coordinator.conftest import open_market
from tests.coordinator.postgres import Server
from tests.coordinator.test_log import log_some


def root_of(state: Path) -> KeyPair:
    return read_key(state / "keys" / "root.key")


def rotate(market: Market, after_s: int = 0) -> str:
    """Another key that takes over at once; its peer id."""
    state = market.coordinator.settings.state
    made = keys.rotate(state, root_of(state), network=NETWORK, now=market.now, after_s=after_s)
    return str(made.peer_id)


async def the_list(market: Market) -> KeyList:
    answer = await market.client.get("/.well-known/lumaris-keys")
    return key_list.open_list(answer.content, network=NETWORK).message


async def test_the_first_list_names_the_first_key(market: Market) -> None:
    found = await the_list(market)
    assert [key.peer for key in found.keys] == [market.peer]
    state = market.coordinator.settings.state
    assert found.root == root_of(state).peer_id
    # The coordinator goes on without its root, which belongs elsewhere.
    (state / "keys" / "root.key").unlink()
    again = Coordinator(Settings(state=state, network=NETWORK), clock=market.clock)
    assert again.peer_id == market.peer
    assert again.context.keys.list.message == found
    assert not (state / "keys" / "root.key").exists()


async def test_a_rotation_takes_over_later_and_the_old_key_signs_what_names_it(
    market: Market,
) -> None:
    buyer, seller = await market.party("buyer", 50_000_000), await market.party("seller")
    old = market.peer
    before = market.deal(buyer, seller)
    grant = await market.grant(before)
    heard: list[bytes] = []
    market.coordinator.context.notices.listen(heard.append)
    new = rotate(market, KEY_STARTS_AFTER_S)
    await market.coordinator.run_chores()
    assert heard == [market.coordinator.context.keys.list.data]
    assert market.peer == old
    assert (await market.client.get("/v1/info")).json()["coordinator"] == old
    market.clock.now += KEY_STARTS_AFTER_S
    assert market.peer == new
    found = await market.register(buyer)
    await market.register(seller)
    both = market.coordinator.context.keys.peers()
    assert both == {old, new}
    certificate = agreements.open_certificate(
        base64.b64decode(found["certificate"]),
        network=NETWORK,
        coordinators=both,
        peer=buyer.peer,
        now=market.now,
    )
    assert certificate.signer == new
    # The session from before is settled under the key that it names, a new one under the new.
    settled = await market.settle(before.claim(seller, grant, 1_000))
    assert settled.status_code == 200, settled.text
    report = receipts.verify_bundle(settled.content, trusted=both)
    assert report.verdict == "valid", report
    assert report.coordinator == old
    after = market.deal(buyer, seller)
    assert after.coordinator == new
    fresh = codec.open_signed(await market.grant(after), BudgetGrant, network=NETWORK)
    assert fresh.signer == new


async def test_an_agreement_may_still_name_the_old_key(market: Market) -> None:
    buyer, seller = await market.party("buyer", 50_000_000), await market.party("seller")
    deal = market.deal(buyer, seller)
    rotate(market)
    await market.coordinator.run_chores()
    assert market.peer != deal.coordinator
    grant = codec.open_signed(await market.grant(deal), BudgetGrant, network=NETWORK)
    assert grant.signer == deal.coordinator


async def test_a_revoked_key_signs_nothing_and_strands_no_money(market: Market) -> None:
    buyer, seller = await market.party("buyer", 50_000_000), await market.party("seller")
    held = market.deal(buyer, seller)
    grant, old = await market.grant(held), market.peer
    state = market.coordinator.settings.state
    with pytest.raises(LumarisError, match="No valid key would be left"):
        keys.revoke(state, root_of(state), old, network=NETWORK, now=market.now)
    new = rotate(market)
    keys.revoke(state, root_of(state), old, network=NETWORK, now=market.now)
    await market.coordinator.run_chores()
    assert market.coordinator.context.keys.peers() == {new}
    other = market.deal(buyer, seller)
    other.coordinator = old
    refused = await market.client.post("/v1/grants", content=other.grant_request())
    assert refused.json()["code"] in ("wrong_domain", "revoked")
    settled = await market.settle(held.claim(seller, grant, 1_000))
    assert settled.status_code == 200, settled.text
    listed = market.coordinator.context.keys.list.message
    report = receipts.verify_bundle(settled.content, trusted=frozenset(), key_list=listed)
    assert (report.verdict, report.coordinator) == ("valid", new), report
    with pytest.raises(LumarisError, match="counts no more"):
        market.coordinator.context.keys.check(old)


async def test_a_receipt_from_before_is_shown_under_a_head_that_counts(market: Market) -> None:
    buyer, seller = await market.party("buyer", 50_000_000), await market.party("seller")
    deal = market.deal(buyer, seller)
    settled = await market.settle(deal.claim(seller, await market.grant(deal), 1_000))
    state, old = market.coordinator.settings.state, market.peer
    rotate(market)
    market.clock.now += 60
    keys.revoke(state, root_of(state), old, network=NETWORK, now=market.now)
    await market.coordinator.run_chores()
    listed = market.coordinator.context.keys.list.message
    report = receipts.verify_bundle(settled.content, trusted=frozenset(), key_list=listed)
    assert (report.verdict, report.checks[-1].name) == ("unknown", "trust")
    path = f"/v1/receipts/{report.receipt.receipt}" if report.receipt else ""
    again = await market.client.get(path, headers=market.bearer(seller))
    report = receipts.verify_bundle(again.content, trusted=frozenset(), key_list=listed)
    assert report.verdict == "valid", report
    note = (await market.client.get("/log/checkpoint")).text
    assert merkle.open_checkpoint(note, public_key_of(market.peer)).size == 1


async def test_a_restart_keeps_keys_accounts_and_tokens(tmp_path: Path) -> None:
    clock = Clock()
    async with open_market(tmp_path / "state", clock=clock) as market:
        buyer = await market.party("buyer", 1_000_000)
        old, tokens = market.peer, market.tokens
        rotate(market)
    async with open_market(tmp_path / "state", clock=clock) as market:
        market.tokens = tokens
        assert market.peer != old
        assert await market.free(buyer) == 1_000_000
        assert market.coordinator.log.head is not None


def test_only_the_root_may_change_the_list(tmp_path: Path) -> None:
    Coordinator(Settings(state=tmp_path, network=NETWORK), clock=Clock())
    with pytest.raises(LumarisError, match="root_changed"):
        keys.rotate(tmp_path, KeyPair(os.urandom(32)), network=NETWORK, now=START)
    with pytest.raises(LumarisError, match="not_found"):
        keys.revoke(tmp_path, root_of(tmp_path), Party("x").peer, network=NETWORK, now=START)


def test_the_list_is_bounded_and_lets_ended_keys_go(tmp_path: Path) -> None:
    keys.KeyRing(tmp_path, network=NETWORK, clock=Clock())
    for number in range(31):
        keys.rotate(tmp_path, root_of(tmp_path), network=NETWORK, now=START + number, after_s=0)
    with pytest.raises(LumarisError, match="limit_reached"):
        keys.rotate(tmp_path, root_of(tmp_path), network=NETWORK, now=START + 40)
    later = START + SIGNING_KEY_LIFETIME_S + 10
    keys.rotate(tmp_path, root_of(tmp_path), network=NETWORK, now=later)
    found = keys.read_list(tmp_path / "keys" / "list", NETWORK)
    assert len(found.message.keys) < 32


def test_a_list_that_goes_back_is_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring = keys.KeyRing(tmp_path, network=NETWORK, clock=Clock())
    path = tmp_path / "keys" / "list"
    first = path.read_bytes()
    made = keys.rotate(tmp_path, root_of(tmp_path), network=NETWORK, now=START, after_s=0)
    assert ring.reload()
    assert not ring.reload()
    assert ring.current.peer_id == made.peer_id
    for bad in (first, b"", b"x" * 100_000):
        path.write_bytes(bad)
        assert not ring.reload()
        assert ring.current.peer_id == made.peer_id
    assert "is not used" in caplog.text


def test_a_key_without_its_file_cannot_sign(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As long as an older one is valid that one signs; the log names what is to be copied."""
    made = keys.KeyRing(tmp_path, network=NETWORK, clock=Clock())
    root = root_of(tmp_path)
    key = keys.rotate(tmp_path, root, network=NETWORK, now=START, after_s=0)
    (tmp_path / "keys" / f"{key.peer_id}.key").unlink()
    made.reload()
    assert made.current == made.first
    made.warn()
    assert f"{key.peer_id}.key" in caplog.text
    keys.revoke(tmp_path, root, made.first.peer_id, network=NETWORK, now=START)
    made.reload()
    with pytest.raises(LumarisError, match="No signing key"):
        _ = made.current


def test_of_two_changes_at_once_one_is_refused(tmp_path: Path) -> None:
    keys.KeyRing(tmp_path, network=NETWORK, clock=Clock())
    folder = os.open(tmp_path / "keys", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with pytest.raises(LumarisError, match="busy"):
            keys.rotate(tmp_path, root_of(tmp_path), network=NETWORK, now=START)
    finally:
        os.close(folder)
    keys.rotate(tmp_path, root_of(tmp_path), network=NETWORK, now=START)
    assert keys.read_list(tmp_path / "keys" / "list", NETWORK).message.seq == 2
    assert len(list((tmp_path / "keys").glob("12D3*.key"))) == 1


async def test_an_older_list_in_the_folder_is_not_gone_back_to(tmp_path: Path) -> None:
    """A copy of the folder from before a revocation comes back: the data knows better."""
    state, clock = tmp_path / "state", Clock()
    async with open_market(state, clock=clock) as market:
        before = (state / "keys" / "list").read_bytes()
        old = market.peer
        new = rotate(market)
        keys.revoke(state, root_of(state), old, network=NETWORK, now=market.now)
        await market.coordinator.run_chores()
    (state / "keys" / "list").write_bytes(before)
    async with open_market(state, clock=clock) as market:
        assert market.peer == new
        assert old not in market.coordinator.context.keys.peers()
    assert keys.read_list(state / "keys" / "list", NETWORK).message.seq == 3


async def test_two_lists_with_one_number_are_told_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    async with open_market(state) as market:
        before = (state / "keys" / "list").read_bytes()
        rotate(market, KEY_STARTS_AFTER_S)
        await market.coordinator.run_chores()
        (state / "keys" / "list").write_bytes(before)
        rotate(market, KEY_STARTS_AFTER_S)
        await market.coordinator.run_chores()
        assert "contradicts" in caplog.text or "is not used" in caplog.text
    with pytest.raises(LumarisError, match="Two key lists"):
        async with open_market(state):
            pass


@pytest.mark.parametrize("lost", ["coordinator.key", "keys"])
async def test_a_folder_that_was_used_gets_no_new_keys(tmp_path: Path, lost: str) -> None:
    state = tmp_path / "state"
    async with open_market(state):
        pass
    (state / lost).rename(tmp_path / "elsewhere")
    with pytest.raises(LumarisError, match="its keys are gone"):
        Coordinator(Settings(state=state, network=NETWORK), clock=Clock())
    assert not (state / lost).exists()


async def test_data_does_not_take_another_root(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with open_market(state):
        pass
    (state / "keys").rename(tmp_path / "elsewhere")
    (state / "coordinator.database").unlink()
    with pytest.raises(LumarisError, match="another root"):
        async with open_market(state):
            pass


@pytest.mark.slow
async def test_a_replica_without_the_new_key_goes_on(
    tmp_path: Path, postgres_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """A rotation at one replica: the other checks what the new key signs, and still writes."""
    clock, folders = Clock(), [tmp_path / "one", tmp_path / "two"]
    with postgres_server.database() as dsn:
        async with open_market(folders[0], clock=clock, database=dsn) as one:
            folders[1].mkdir(mode=0o700)
            shutil.copy2(folders[0] / "coordinator.key", folders[1])
            shutil.copytree(folders[0] / "keys", folders[1] / "keys")
            async with open_market(folders[1], clock=clock, database=dsn) as two:
                new, old = rotate(one), two.peer
                await one.coordinator.run_chores()
                assert (one.peer, two.peer) == (new, old)
                await log_some(one, 2)  # its head is signed with the new key
                buyer = await two.party("buyer", 50_000_000)
                await log_some(two, 1)
                await two.coordinator.run_chores()
                assert f"{new}.key" in caplog.text
                assert two.coordinator.context.keys.peers() == {old, new}
                deal, seller = one.deal(buyer, await two.party("seller")), Party("seller")
                assert deal.coordinator == new
                refused = await two.client.post("/v1/grants", content=deal.grant_request())
                assert (refused.status_code, refused.json()["code"]) == (503, "busy")
                assert "was not given the key" in refused.json()["detail"]
                await one.grant(deal)
                older = two.deal(buyer, seller)
                settled = await two.settle(older.claim(seller, await two.grant(older), 1_000))
                assert settled.status_code == 200, settled.text
                shutil.copy2(folders[0] / "keys" / f"{new}.key", folders[1] / "keys")
                await two.coordinator.run_chores()
                assert two.peer == new
                await two.grant(two.deal(buyer, seller))
            # A start of the one whose folder is older than the head in the data.
            (folders[1] / "keys" / f"{new}.key").unlink()
            async with open_market(folders[1], clock=clock, database=dsn) as two:
                assert two.peer == old


def test_the_end_of_a_key_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    ring = keys.KeyRing(tmp_path, network=NETWORK, clock=clock)
    ring.warn()
    assert not caplog.text
    clock.now += SIGNING_KEY_LIFETIME_S - 3600
    ring.warn()
    assert "ends soon" in caplog.text


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    keys.KeyRing(tmp_path, network=NETWORK, clock=Clock())
    made = keys.rotate(tmp_path, root_of(tmp_path), network=NETWORK, now=START)
    (tmp_path / "keys" / f"{made.peer_id}.key").chmod(0o644)
    with pytest.raises(LumarisError, match="unsafe_key_file"):
        keys.KeyRing(tmp_path, network=NETWORK, clock=Clock())
