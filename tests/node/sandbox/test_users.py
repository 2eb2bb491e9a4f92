"""Kernel users: no two roles share one, and no two sandboxes."""

from __future__ import annotations

import pytest

from lumaris_node import challenge_fill
from lumaris_node.executors.container import config
from lumaris_node.executors.process import order
from lumaris_node.executors.vm import machine
from lumaris_node.executors.wasm import executor as wasm
from lumaris_node.sandbox import users
from lumaris_node.sandbox.users import UserPool
from lumaris_protocol.errors import LumarisError


def test_roles_differ():
    roles = [
        config.GUEST_UID,
        wasm.GUEST_UID,
        wasm.COMPILER_UID,
        machine.EMULATOR_UID,
        challenge_fill.UID,
    ]
    assert len({*roles, *users.GUESTS}) == len(roles) + len(users.GUESTS)
    assert order.GUEST_UID == config.GUEST_UID
    assert 0 not in roles


def test_a_user_is_lent_once_and_again_when_it_came_back():
    pool = UserPool(range(5, 8))
    taken = [pool.take() for _ in range(3)]
    assert sorted(taken) == [5, 6, 7]
    with pytest.raises(LumarisError, match="too many"):
        pool.take()
    pool.give(taken[1])
    assert pool.take() == taken[1]
