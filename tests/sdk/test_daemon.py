"""`netcheck` and `ping` on an overlay that says what a test wants, and the process's status."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from lumaris import daemon, net
from lumaris_overlay.ports import AdvertEvent, Overlay, PeerInfo, Ping, Reachability
from lumaris_protocol.errors import LumarisError, RemoteError
from lumaris_protocol.keys import KeyPair, PeerId

ONE, TWO, THREE, FOUR = (KeyPair(bytes([number]) * 32).peer_id for number in (1, 2, 3, 4))
OURS = ("/ip4/192.0.2.1/tcp/4001/p2p/x",)


@dataclass
class FakeOverlay:
    """Reachability in steps, some sellers, and peers that answer or do not."""

    verdicts: list[Reachability]
    sellers: dict[PeerId, bytes | None] = field(default_factory=dict)
    connected: tuple[PeerId, ...] = ()
    offsets: dict[str, float] = field(default_factory=dict)
    peer_id: PeerId = FOUR
    asked: list[str] = field(default_factory=list)

    async def reachability(self) -> Reachability:
        await trio.lowlevel.checkpoint()
        return self.verdicts.pop(0) if len(self.verdicts) > 1 else self.verdicts[0]

    async def peers(self) -> tuple[PeerInfo, ...]:
        await trio.lowlevel.checkpoint()
        return tuple(PeerInfo(peer, ("/ip4/192.0.2.7/tcp/1",)) for peer in self.connected)

    async def ping(self, peer: str, *, addresses: Sequence[str] = ()) -> Ping:
        await trio.lowlevel.checkpoint()
        self.asked.append(peer)
        if peer not in self.offsets:
            raise RemoteError("unreachable", f"The peer {peer} cannot be reached.")
        return Ping(0.004, self.offsets[peer], relayed=peer == TWO)

    @asynccontextmanager
    async def adverts(self) -> AsyncIterator[trio.MemoryReceiveChannel[AdvertEvent]]:
        send, receive = trio.open_memory_channel[AdvertEvent](100)
        for seller, envelope in self.sellers.items():
            send.send_nowait(AdvertEvent(seller, b"advert", 1))
            if envelope is None:
                send.send_nowait(AdvertEvent(seller, None, 2))
        with send, receive:
            yield receive


def opener(fake: FakeOverlay) -> net.OpenOverlay:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Overlay]:
        yield cast(Overlay, fake)

    return opened


async def check(fake: FakeOverlay) -> dict[str, Any]:
    return await net.netcheck(opener(fake))


async def test_a_public_machine_needs_nothing(autojump_clock: MockClock) -> None:
    unknown = Reachability(OURS, 2)
    public = Reachability(OURS, 2, "public", (ONE, TWO), (), ("/ip4/198.51.100.1/tcp/4001",))
    fake = FakeOverlay([unknown, unknown, public], connected=(ONE, TWO), offsets={ONE: 0.5})
    found = await check(fake)
    assert found["reachability"] == "public"
    assert found["confirmed_by"] == [ONE, TWO]
    assert found["observed"] == ["/ip4/198.51.100.1/tcp/4001"]
    assert (found["clock_offset_s"], found["clock_peers"]) == (0.5, 1)
    assert [peer["peer"] for peer in found["peers"]] == [ONE, TWO]
    assert found["next"] == ""


@pytest.mark.parametrize(
    ("reach", "offset_s", "word"),
    [
        (Reachability(OURS, 0), 0.0, "No peer answers"),
        (Reachability(OURS, 1, "private"), 0.0, "forward a TCP port"),
        (Reachability(OURS, 1, "private", (), (TWO,)), 0.0, "relay"),
        (Reachability(OURS, 1, "public", (ONE,)), 45.0, "45 s behind"),
        (Reachability(OURS, 1, "public", (ONE,)), -45.0, "45 s ahead"),
    ],
)
async def test_netcheck_says_what_to_do_next(
    autojump_clock: MockClock, reach: Reachability, offset_s: float, word: str
) -> None:
    connected = (ONE,) if reach.peers else ()
    found = await check(FakeOverlay([reach], connected=connected, offsets={ONE: offset_s}))
    assert word in found["next"]
    assert found["status"]


async def ping(fake: FakeOverlay, name: str, count: int = 2) -> dict[str, Any]:
    numbers: list[int] = []
    found = await net.ping(
        opener(fake), name, count=count, on_reply=lambda number, _: numbers.append(number)
    )
    assert len(numbers) == found["received"]
    return found


async def test_ping_takes_a_peer_id_or_the_end_of_one(autojump_clock: MockClock) -> None:
    fake = FakeOverlay(
        [Reachability(OURS, 1)],
        sellers={ONE: b"advert"},
        connected=(TWO,),
        offsets={ONE: 1.5, TWO: 0.0, THREE: 0.0},
    )
    found = await ping(fake, ONE[-10:])
    assert found["peer"] == ONE and found["path"] == "direct"
    assert found["round_trip_ms"] == {"min": 4.0, "median": 4.0, "max": 4.0}
    assert found["clock_offset_s"] == 1.5
    assert (await ping(fake, TWO[-10:]))["path"] == "relayed"
    assert (await ping(fake, THREE))["peer"] == THREE  # known to nobody here: the network may know
    assert len(fake.asked) == 6


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("nosuchpeer", "not_found"),
        ("", "usage"),
        ("x", "usage"),
        ("x" * 5000, "not_found"),
        ("SAME", "usage"),
    ],
)
async def test_a_name_of_nobody_or_of_two(autojump_clock: MockClock, name: str, code: str) -> None:
    twins = {PeerId(f"12D3KooW{letter}SAMEENDING"): b"advert" for letter in "AB"}
    fake = FakeOverlay([Reachability(OURS, 1)], sellers={**twins, ONE: None})
    with pytest.raises(LumarisError) as caught:
        await ping(fake, "SAMEENDING" if name == "SAME" else name)
    assert caught.value.code == code
    assert not fake.asked


async def test_nobody_pings_itself(autojump_clock: MockClock) -> None:
    with pytest.raises(LumarisError, match="usage"):
        await ping(FakeOverlay([Reachability(OURS, 1)], offsets={FOUR: 0.0}), FOUR[-10:])


async def test_a_withdrawn_seller_is_not_known(autojump_clock: MockClock) -> None:
    fake = FakeOverlay([Reachability(OURS, 1)], sellers={ONE: None}, offsets={ONE: 0.0})
    with pytest.raises(LumarisError, match="not_found"):
        await ping(fake, ONE[-10:])


async def test_a_peer_that_never_answers_is_unreachable(autojump_clock: MockClock) -> None:
    fake = FakeOverlay([Reachability(OURS, 1)], sellers={ONE: b"advert"})
    with pytest.raises(LumarisError) as caught:
        await ping(fake, ONE, count=4)
    assert caught.value.code == "unreachable" and caught.value.exit_code == 10
    assert len(fake.asked) == 4


async def test_nothing_runs_in_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(LumarisError) as caught:
        await daemon.status(tmp_path / "overlay")
    assert caught.value.code == "not_running" and caught.value.exit_code == 5
    found = await daemon.down(tmp_path / "overlay")
    assert (found["stopped"], found["pid"], found["started_again"]) == (False, None, False)
    assert not (tmp_path / "overlay").exists()
