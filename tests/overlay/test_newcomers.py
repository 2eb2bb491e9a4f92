"""Handshakes of strangers: counted by where they come from, refused before they cost anything."""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress

import pytest
import trio

from lumaris_overlay.libp2p import newcomers as newcomers_module
from lumaris_overlay.libp2p.host import Libp2pOverlay, open_host
from lumaris_overlay.libp2p.newcomers import Newcomers
from lumaris_overlay.networks import network_of
from lumaris_protocol import limits
from tests.overlay.attackers import dial_from, uncertified, works
from tests.overlay.hosts import member
from tests.overlay.world import until

HOSTILE, OTHER = "127.0.0.7", "127.0.0.8"
FEW = limits.NEWCOMERS_BURST_PER_IP
SHARED = limits.NEWCOMERS_BURST - limits.NEWCOMERS_RESERVED_BURST
SHARED_PER_S = limits.NEWCOMERS_PER_S - limits.NEWCOMERS_RESERVED_PER_S
MANY = FEW * limits.NEWCOMERS_MEMBER_FACTOR


@pytest.mark.parametrize(
    ("ip", "site"),
    [
        ("192.0.2.7", "192.0.2.0/24"),
        ("::ffff:192.0.2.7", "192.0.2.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1::/48"),
        ("", ""),
    ],
)
def test_a_site_has_many_networks(ip, site):
    assert network_of(ip, newcomers_module._SITE_BITS) == site


@pytest.mark.parametrize(
    ("ip", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_a_network_is_what_one_customer_has(ip, network):
    assert network_of(ip) == network


def admitted(newcomers: Newcomers, ip: str, times: int) -> int:
    return sum(newcomers.admit(ip) is not None for _ in range(times))


class TestAllowances:
    async def test_of_one_network_runs_out_and_comes_back(self, autojump_clock):
        newcomers = Newcomers()
        assert admitted(newcomers, HOSTILE, FEW + 5) == FEW
        assert newcomers.refused == 5
        assert admitted(newcomers, OTHER, 1) == 1
        await trio.sleep(3.01 / limits.NEWCOMERS_PER_S_PER_IP)
        assert admitted(newcomers, HOSTILE, 10) == 3

    async def test_is_given_back_by_members(self, autojump_clock):
        newcomers = Newcomers()
        for number in range(10 * FEW):
            beginning = newcomers.admit(OTHER)
            assert beginning is not None
            beginning.was_member(f"peer {number}")
        assert admitted(newcomers, OTHER, FEW + 5) == FEW

    async def test_is_not_given_back_by_a_member_that_comes_all_the_time(self, autojump_clock):
        newcomers = Newcomers()
        for _ in range(FEW + limits.RETURNS_BURST_PER_PEER):
            beginning = newcomers.admit(OTHER)
            assert beginning is not None
            beginning.was_member("peer")
        assert newcomers.admit(OTHER) is None

    async def test_is_larger_where_a_member_is(self, autojump_clock):
        here: list[str] = []
        newcomers = Newcomers(lambda: here)
        assert admitted(newcomers, HOSTILE, MANY) == FEW
        here.append(HOSTILE)
        await trio.sleep(1)
        assert admitted(newcomers, HOSTILE, MANY + 5) == MANY

    async def test_of_all_together_is_bounded_but_spares_networks_of_members(self, autojump_clock):
        newcomers = Newcomers(lambda: [OTHER])
        came = sum(admitted(newcomers, f"10.{a}.0.{b}", 1) for b in range(25) for a in range(10))
        assert came == SHARED
        assert newcomers.admit("10.0.0.99") is None
        assert newcomers.admit(OTHER) is not None

    @pytest.mark.parametrize("site", ["10.0.0.{}", "2001:db8:0:{:x}::1"])
    async def test_of_one_site_leaves_room_for_the_others(self, autojump_clock, site):
        newcomers = Newcomers()
        came = sum(admitted(newcomers, site.format(number), 3) for number in range(100))
        assert came == limits.NEWCOMERS_BURST_PER_SITE
        # However long it goes on: the site's owner has no end of networks.
        for number in range(400):
            newcomers.admit(site.format(number % 250))
            if number % 20 == 0:
                assert newcomers.admit(f"198.51.{number // 4}.1") is not None
            await trio.sleep(1 / 40)

    async def test_of_all_together_is_kept_in_part_for_news(self, autojump_clock):
        newcomers = Newcomers()
        flood = [f"10.{a}.{b}.1" for b in range(100) for a in range(16)]
        assert sum(admitted(newcomers, ip, 1) for ip in flood) == SHARED
        kept = limits.NEWCOMERS_RESERVED_BURST
        newer = sum(admitted(newcomers, f"{number}.1.1.1", 1) for number in range(11, 100))
        assert newer == kept
        await trio.sleep(1.01)
        # The flood has come back to what all may use by then, and to no more.
        assert sum(admitted(newcomers, ip, 1) for ip in flood) == SHARED_PER_S
        assert newcomers.admit("198.51.100.1") is not None

    async def test_networks_are_forgotten(self, autojump_clock, monkeypatch):
        monkeypatch.setattr(newcomers_module, "_NETWORKS_MAX", 8)
        newcomers = Newcomers()
        for number in range(50):
            newcomers.admit(f"10.0.0.{number}")
        assert len(newcomers._few._levels) == 8


def port_of(address: str) -> int:
    return int(address.split("/")[4])


async def hung_up(port: int, ip: str) -> bool:
    """Whether a connection from this address is closed before a byte is said."""
    stream = await trio.open_tcp_stream("127.0.0.1", port, local_address=ip)
    async with stream:
        with suppress(trio.BrokenResourceError):
            return not await stream.receive_some(1)  # the listener speaks first
        return True


async def address_of(host: Libp2pOverlay) -> str:
    (address,) = (await host.reachability()).addresses
    return address


async def knock(stack: AsyncExitStack, port: int, ip: str, times: int) -> None:
    """Connections that say nothing and stay."""
    for _ in range(times):
        stream = await trio.open_tcp_stream("127.0.0.1", port, local_address=ip)
        await stack.enter_async_context(stream)


@pytest.mark.slow
class TestHosts:
    async def test_strangers_are_refused_before_the_handshake(self):
        async with open_host(member("one")) as one, open_host(member("two")) as two:
            address = await address_of(one)
            swarm = one.host.get_network()
            for _ in range(FEW):
                assert not await hung_up(port_of(address), HOSTILE)
            while not await hung_up(port_of(address), HOSTILE):
                pass
            assert swarm.newcomers.refused == 1
            # Its neighbour is let in, and so is a member where strangers are refused: in its time.
            assert await two.connect([address]) == 1
            await works(one, two)

    async def test_a_key_that_shows_no_certificate_counts(self):
        async with open_host(member("one")) as one, open_host(uncertified("x")) as other:
            address = await address_of(one)
            dial_from(other, HOSTILE)
            came = 0
            with trio.fail_after(20):
                while await other.connect([address]):
                    came += 1
                    await other.connections.drop(one.host.get_id())
            assert came >= FEW

    async def test_member_comes_in_from_the_address_of_a_flood(self):
        """Nobody else is there but the flood: the member waits for the allowance to return."""
        async with open_host(member("one")) as one, open_host(member("two")) as two:
            address = await address_of(one)
            dial_from(two, HOSTILE)
            for _ in range(FEW + 20):
                await hung_up(port_of(address), HOSTILE)
            with trio.fail_after(20):
                while not await two.connect([address]):
                    await trio.sleep(0.05)
            await works(one, two)

    async def test_members_behind_one_address_come_in_during_a_flood(self):
        """One of them is connected, so the flood does not use up what they share."""
        async with (
            open_host(member("one")) as one,
            open_host(member("two")) as two,
            open_host(member("three")) as three,
            AsyncExitStack() as stack,
        ):
            address = await address_of(one)
            swarm = one.host.get_network()
            for each in (two, three):
                dial_from(each, HOSTILE)
            assert await two.connect([address]) == 1
            await until(lambda: HOSTILE in swarm._member_ips())
            swarm.newcomers._looked_at -= 1  # the last look was before it came
            await knock(stack, port_of(address), HOSTILE, 4 * FEW)
            assert await three.connect([address]) == 1
            await works(one, three)
            assert swarm.newcomers.refused == 0

    async def test_half_open_handshakes_count(self):
        async with open_host(member("one")) as one, AsyncExitStack() as stack:
            port = port_of(await address_of(one))
            await knock(stack, port, HOSTILE, 3 * FEW)
            swarm = one.host.get_network()
            await until(lambda: swarm.newcomers.refused >= FEW)
            assert len(swarm._shaking) <= 2 * FEW
