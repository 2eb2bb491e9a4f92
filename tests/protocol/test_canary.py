"""The canary: guest and checker agree, a known round costs known fuel, wrong work is seen."""

from __future__ import annotations

import pytest
import wasmtime

from lumaris_protocol import canary
from lumaris_protocol.limits import CHALLENGE_PARALLEL_MAX, CHALLENGE_STATES_MAX

NONCE = "ab" * 16
Guest = tuple[wasmtime.Engine, wasmtime.Module]


@pytest.fixture(scope="module")
def guest() -> Guest:
    config = wasmtime.Config()
    config.consume_fuel = True
    engine = wasmtime.Engine(config)
    return engine, wasmtime.Module(engine, canary.guest_text())


def turned(guest: Guest, state: int, rounds: int) -> tuple[int, int]:
    """The guest's state so many rounds later, and the fuel that it took."""
    engine, module = guest
    store = wasmtime.Store(engine)
    store.set_wasi(wasmtime.WasiConfig())
    store.set_fuel(1 << 40)
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    exports = linker.instantiate(store, module).exports(store)
    memory, turn = exports["memory"], exports["turn"]
    assert isinstance(memory, wasmtime.Memory)
    assert isinstance(turn, wasmtime.Func)
    memory.write(store, state.to_bytes(32, "little"), 64)
    before = store.get_fuel()
    turn(store, rounds)
    return int.from_bytes(memory.read(store, 64, 96), "little"), before - store.get_fuel()


@pytest.mark.parametrize("state", [0, 1, (1 << 256) - 1, canary.first_state(NONCE, 7)])
def test_the_guest_computes_what_the_checker_does(guest: Guest, state: int):
    for rounds in (0, 1, 2, 257):
        assert turned(guest, state, rounds)[0] == canary.advance(state, rounds)


def test_a_round_costs_the_known_fuel(guest: Guest):
    one, other = (turned(guest, 5, rounds)[1] for rounds in (1_000, 3_000))
    assert other - one == 2_000 * canary.FUEL_PER_ROUND


def test_a_round_loses_nothing():
    """A permutation: M is odd, so both steps can be undone, and no two states meet."""
    state = canary.first_state(NONCE, 0)
    inverse = pow(canary.MULTIPLIER, -1, 1 << 256)
    back = (canary.advance(state, 1) - canary.CONSTANT) * inverse % (1 << 256)
    assert back ^ (back >> 128) == state


def test_lanes_and_nonces_begin_elsewhere():
    firsts = {canary.first_state(nonce, lane) for nonce in ("a" * 32, NONCE) for lane in range(64)}
    assert len(firsts) == 128


@pytest.mark.parametrize("parallel", [1, 2, 9, 10, 64, CHALLENGE_PARALLEL_MAX])
def test_states_fit_an_answer(parallel: int):
    pieces = canary.stretches(parallel)
    assert 1 <= pieces < CHALLENGE_STATES_MAX
    assert parallel * (pieces + 1) * 67 * 4 / 3 < 60_000


def lane_of(rounds: int, *, parallel: int = 1) -> list[str]:
    pieces = canary.stretches(parallel)
    states = [canary.first_state(NONCE, 0)]
    for _ in range(pieces):
        states.append(canary.advance(states[-1], rounds // pieces))
    return [canary.to_hex(state) for state in states]


def is_right(states: list[str], stretch: int, *, nonce: str = NONCE, rounds: int = 640) -> bool:
    return canary.check_lane(
        states, nonce=nonce, lane=0, rounds=rounds, parallel=1, stretch=stretch
    )


def test_right_work_is_right_everywhere():
    states = lane_of(640)
    assert all(is_right(states, stretch) for stretch in range(canary.stretches(1)))


def test_wrong_work_is_seen_where_it_is():
    states = lane_of(640)
    states[5] = canary.to_hex(1)
    wrong = [at for at in range(canary.stretches(1)) if not is_right(states, at)]
    assert wrong == [4, 5]


def test_work_for_another_nonce_or_amount_is_wrong():
    states = lane_of(640)
    assert not is_right(states, 3, nonce="cd" * 16)
    assert not is_right(states, 3, rounds=1280)
    assert not is_right(states, 3, rounds=641)
    assert not is_right(states[:-1], 3)
    assert not is_right([*states[:3], "zz" * 32, *states[4:]], 3)
    assert not is_right([*states[:3], "00" * 31, *states[4:]], 3)


def test_an_order_is_bounded():
    assert len(canary.order(0, rounds=64, pieces=64)) == 48
    with pytest.raises(ValueError, match="rounds"):
        canary.order(0, rounds=1 << 40, pieces=1)


def test_fills_differ():
    seeds = {canary.fill_seed(NONCE, lane) for lane in range(8)}
    assert len(seeds) == 8
    assert all(len(password) == len(salt) == 16 for password, salt in seeds)
