"""The quote desk: capacity is sold once and always comes back."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumaris_protocol import codec, limits, matching
from lumaris_protocol.codec import Signed
from lumaris_protocol.errors import RefusedError, ViolationError
from lumaris_protocol.keys import KeyPair
from lumaris_protocol.machines.desk import GRANT_WAIT_S, Hold, QuoteDesk
from lumaris_protocol.messages.advert import Gpu, Resources, Runtime
from lumaris_protocol.messages.negotiation import Quote, QuoteRequest
from tests.protocol import parties as p

BIG = Resources(
    cpu_millis=8000,
    memory_bytes=8 * limits.GIB,
    disk_bytes=8 * limits.GIB,
    gpus=(Gpu(model="A", vram_bytes=24, count=2), Gpu(model="A", vram_bytes=80, count=2)),
)

BUYERS: dict[str, KeyPair] = {
    key.peer_id: key for key in (p.BUYER, *(p.key_of(f"buyer {n}") for n in range(6)))
}


def ask(
    desk: QuoteDesk, name: str, *, now: float = p.NOW, key: KeyPair = p.BUYER, **needs: Any
) -> Hold:
    """One request, quoted, signed and held."""
    asked = p.request(name, key=key, requirements=p.requirements(**needs))
    return desk.hold(asked, quoted(desk, asked, now))


def quoted(desk: QuoteDesk, asked: Signed[QuoteRequest], now: float) -> Signed[Quote]:
    text = desk.offer(
        asked,
        p.advert(total=desk.total, free=Resources()),
        seller_session_key=p.SELLER_SESSION.peer_id,
        now=now,
    )
    return codec.sign(text, p.SELLER, p.NETWORK)


def agreed(desk: QuoteDesk, hold: Hold, *, now: int = p.NOW) -> str:
    """Both sign; the agreement's hash."""
    text = p.agreement(hold.request, hold.quote, now=now)
    assert desk.find_quote(text, now=now) is hold
    contract = p.sign_contract(text, key=BUYERS[text.buyer])
    desk.agree(hold, contract, now=now)
    return contract.hash


def test_a_quote_repeats_the_request_and_holds_the_capacity() -> None:
    desk = QuoteDesk(p.RESOURCES)
    hold = ask(desk, "1")
    text = hold.quote.message
    assert (text.request_hash, text.buyer) == (hold.request.hash, p.BUYER.peer_id)
    assert text.hold_until == p.NOW + limits.QUOTE_HOLD_S_MAX
    assert text.terms.cap_nanos == p.TERMS.cap_nanos
    assert desk.free.cpu_millis == 0
    assert desk.holds == (hold,)


def test_the_way_from_quote_to_session_and_back() -> None:
    desk = QuoteDesk(p.RESOURCES)
    hold = ask(desk, "1")
    name = agreed(desk, hold)
    assert desk.granted(name, now=p.NOW + GRANT_WAIT_S) is hold
    assert desk.expire(p.NOW + 3600) == []
    desk.release(hold)
    desk.release(hold)
    assert desk.free == p.RESOURCES
    assert hold.machine.state == "released"


def test_capacity_is_not_sold_twice() -> None:
    desk = QuoteDesk(p.RESOURCES)
    ask(desk, "1")
    with pytest.raises(RefusedError, match="no_capacity"):
        ask(desk, "2")


def test_a_quote_lapses_and_gives_its_capacity_back() -> None:
    desk = QuoteDesk(p.RESOURCES)
    hold = ask(desk, "1")
    later = p.NOW + limits.QUOTE_HOLD_S_MAX + 1
    with pytest.raises(RefusedError, match="quote_unknown"):
        desk.find_quote(p.agreement(hold.request, hold.quote, now=later), now=later)
    assert desk.free == p.RESOURCES
    assert hold.machine.state == "lapsed"


def test_an_agreement_without_a_grant_lapses() -> None:
    desk = QuoteDesk(p.RESOURCES)
    hold = ask(desk, "1")
    name = agreed(desk, hold)
    with pytest.raises(RefusedError, match="quote_unknown"):
        desk.granted(name, now=p.NOW + GRANT_WAIT_S + 1)
    assert desk.free == p.RESOURCES


def test_a_buyer_that_leaves_before_the_grant_frees_its_capacity() -> None:
    desk = QuoteDesk(p.RESOURCES)
    hold = ask(desk, "1")
    agreed(desk, hold)
    desk.release(hold)
    assert hold.machine.state == "released"
    assert desk.free == p.RESOURCES


def test_a_session_past_its_end_is_handed_out_once_whoever_noticed_it() -> None:
    desk = QuoteDesk(p.RESOURCES)
    hold = ask(desk, "1")
    desk.granted(agreed(desk, hold), now=p.NOW)
    later = p.NOW + 3601
    with pytest.raises(RefusedError):
        desk.granted("sha256:none", now=later)  # any call may notice that it is over
    assert desk.expire(later) == [hold]
    assert desk.expire(later) == []


def test_a_grant_opens_one_session() -> None:
    desk = QuoteDesk(p.RESOURCES)
    name = agreed(desk, ask(desk, "1"))
    desk.granted(name, now=p.NOW)
    with pytest.raises(ViolationError, match="quote_unknown"):
        desk.granted(name, now=p.NOW)


def test_a_grant_finds_its_own_agreement() -> None:
    desk = QuoteDesk(BIG)
    small = Resources(cpu_millis=1)
    agreed(desk, ask(desk, "1", resources=small))
    second = ask(desk, "2", resources=small)
    ask(desk, "3", resources=small)
    assert desk.granted(agreed(desk, second), now=p.NOW) is second


def test_a_quote_is_agreed_to_once() -> None:
    desk = QuoteDesk(p.RESOURCES)
    hold = ask(desk, "1")
    agreed(desk, hold)
    again = p.agreement(hold.request, hold.quote, buyer_session_key=p.STRANGER.peer_id)
    with pytest.raises(RefusedError, match="quote_unknown"):
        desk.find_quote(again, now=p.NOW)


@pytest.mark.parametrize("shift", [-61, 61, 10**9])
def test_an_agreement_is_dated_now(shift: int) -> None:
    """Its end counts from its date: a later one would hold the capacity for as long as it likes."""
    desk = QuoteDesk(p.RESOURCES)
    hold = ask(desk, "1")
    with pytest.raises(RefusedError, match="terms_changed"):
        desk.find_quote(p.agreement(hold.request, hold.quote, now=p.NOW + shift), now=p.NOW)


@pytest.mark.parametrize(
    "changes",
    [
        {"ends_at": p.NOW + 7200},
        {"start_by": p.NOW + 60},
        {"seller_session_key": p.STRANGER.peer_id},
        {"buyer": p.STRANGER.peer_id},
        {"session": p.id_of("session", "mine")},
        {"verification": "evid"},
        {"tier": "vm"},
        {"advert_hash": p.digest_of("x")},
        {"terms": msgspec.structs.replace(p.TERMS, rate_nanos_per_s=1)},
        {"resources": Resources(cpu_millis=9)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_agreement_repeats_its_quote(changes: dict[str, Any]) -> None:
    desk = QuoteDesk(p.RESOURCES)
    hold = ask(desk, "1")
    text = msgspec.structs.replace(p.agreement(hold.request, hold.quote), **changes)
    with pytest.raises(RefusedError, match="terms_changed"):
        desk.find_quote(text, now=p.NOW)


@pytest.mark.parametrize("verification", ["det", "repl"])
def test_results_that_no_second_run_can_check_are_not_promised(verification: str) -> None:
    """A guest outside of wasm reads clocks and dice: its honest seller would lose every check."""
    desk = QuoteDesk(p.RESOURCES)
    runtime = Runtime(tier="container", version="x", assurance="sandbox")
    needs = p.requirements(tier="container")
    for wish in (verification, "evid"):
        asked = p.request(wish, requirements=needs, verification=wish)
        advert = p.advert(runtimes=(runtime,))
        key = p.SELLER_SESSION.peer_id
        if wish == "evid":
            desk.offer(asked, advert, seller_session_key=key, now=p.NOW)
        else:
            with pytest.raises(RefusedError, match="not_disputable"):
                desk.offer(asked, advert, seller_session_key=key, now=p.NOW)


def test_a_request_is_answered_once() -> None:
    desk = QuoteDesk(BIG)
    ask(desk, "1")
    with pytest.raises(RefusedError, match="replayed"):
        ask(desk, "1")
    later = p.NOW + 30 + limits.CLOCK_SKEW_S + limits.QUOTE_HOLD_S_MAX + 1
    ask(desk, "1", now=later)
    assert len(desk._used) == 1


def test_one_buyer_cannot_hold_everything() -> None:
    desk = QuoteDesk(BIG)
    small = Resources(cpu_millis=1)
    for n in range(limits.QUOTES_HELD_PER_BUYER_MAX):
        ask(desk, f"{n}", resources=small)
    with pytest.raises(RefusedError, match="too_many_holds"):
        ask(desk, "more", resources=small)
    ask(desk, "other", key=p.STRANGER, resources=small)


def test_all_buyers_together_hold_only_so_many_quotes() -> None:
    desk = QuoteDesk(BIG)
    small = Resources(cpu_millis=1)
    for n in range(limits.QUOTES_HELD_MAX):
        ask(desk, f"{n}", key=p.key_of(f"buyer {n // 4}"), resources=small)
    with pytest.raises(RefusedError, match="too_many_holds"):
        ask(desk, "more", key=p.STRANGER, resources=small)


def test_sessions_have_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lumaris_protocol.machines.desk.SESSIONS_MAX", 1)
    desk = QuoteDesk(BIG)
    desk.granted(agreed(desk, ask(desk, "1", resources=Resources(cpu_millis=1))), now=p.NOW)
    with pytest.raises(RefusedError, match="no_capacity"):
        ask(desk, "2", resources=Resources(cpu_millis=1))


def test_a_desk_that_does_not_accept_says_so() -> None:
    desk = QuoteDesk(BIG)
    desk.accepting = False
    with pytest.raises(RefusedError, match="not_accepting"):
        ask(desk, "1")


def test_a_request_that_does_not_match_is_refused_with_the_constraint() -> None:
    desk = QuoteDesk(BIG)
    with pytest.raises(RefusedError, match="runtime_missing"):
        ask(desk, "1", tier="vm")


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "agree", "grant", "release", "wait"]),
        st.integers(min_value=0, max_value=5),
        st.integers(min_value=0, max_value=4),
    ),
    max_size=40,
)


@settings(max_examples=50, deadline=None)
@given(_STEPS)
def test_capacity_always_comes_back(steps: list[tuple[str, int, int]]) -> None:
    desk, now = QuoteDesk(BIG), p.NOW
    names: dict[str, str] = {}
    for count, (step, which, size) in enumerate(steps):
        holds = desk.holds
        hold = holds[which % len(holds)] if holds else None
        try:
            if step == "ask":
                gpus = (Gpu(model="A", vram_bytes=size * 20, count=1 + which % 2),)
                wanted = Resources(cpu_millis=500 * size, gpus=gpus if which else ())
                asked = p.request(
                    f"{count}",
                    key=p.key_of(f"buyer {which}"),
                    requirements=p.requirements(resources=wanted),
                    issued_at=now,
                    expires_at=now + 30,
                )
                desk.hold(asked, quoted(desk, asked, now))
            elif step == "wait":
                now += (1, 11, 31, 600, 4000)[size]
                desk.expire(now)
            elif hold is not None and step == "agree":
                names[hold.quote.hash] = agreed(desk, hold, now=now)
            elif hold is not None and step == "grant" and hold.quote.hash in names:
                desk.granted(names[hold.quote.hash], now=now)
            elif hold is not None and step == "release" and hold.machine.can("ended"):
                desk.release(hold)
        except (RefusedError, ViolationError):
            pass
        taken = sum(hold.resources.cpu_millis for hold in desk.holds)
        assert desk.free.cpu_millis == BIG.cpu_millis - taken
        assert matching.subtract(BIG, desk.free) is not None
    desk.expire(now + 100_000)
    assert desk.free == BIG
    assert desk.holds == ()
    assert desk._used == {}
