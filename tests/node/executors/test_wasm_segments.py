"""Joining data segments changes the module's form and nothing of its memory."""

from __future__ import annotations

import random

import pytest
import wasmtime
from hypothesis import given
from hypothesis import strategies as st

from lumaris_node.executors.wasm.segments import join_segments

SPAN = 20_000


def module(segments: list[tuple[int, bytes]], more: str = "") -> bytes:
    data = " ".join(f'(data (i32.const {at}) "{_escaped(text)}")' for at, text in segments)
    return bytes(wasmtime.wat2wasm(f'(module (memory (export "memory") 1) {data} {more})'))


def _escaped(data: bytes) -> str:
    return "".join(f"\\{byte:02x}" for byte in data)


def memory_of(code: bytes) -> bytes:
    store = wasmtime.Store()
    exports = wasmtime.Instance(store, wasmtime.Module(store.engine, code), []).exports(store)
    memory = exports["memory"]
    assert isinstance(memory, wasmtime.Memory)
    return bytes(memory.read(store, 0, 65_536))


@pytest.mark.parametrize("seed", range(40))
def test_memory_is_the_same_whatever_the_order_and_overlaps(seed: int):
    dice = random.Random(seed)
    segments = [
        (dice.randint(0, SPAN), dice.randbytes(dice.randint(0, 40)))
        for _ in range(dice.randint(64, 90))
    ]
    if seed % 2:
        segments.sort()
    code = module(segments)
    assert memory_of(join_segments(code)) == memory_of(code)


def test_neighbours_become_one():
    code = module([(at * 10, b"abc") for at in range(1000)])
    joined = join_segments(code)
    assert len(joined) < len(code) + 8000
    assert join_segments(joined) == joined, "few segments are left alone"
    assert memory_of(joined) == memory_of(code)


def test_what_may_be_named_by_an_instruction_is_left_alone():
    more = '(data "passive") (func (memory.init 0 (i32.const 0) (i32.const 0) (i32.const 1)))'
    code = module([(at * 10, b"abc") for at in range(100)], more)
    assert join_segments(code) == code


def test_a_segment_outside_its_memory_stays_there():
    code = module([*((at * 10, b"abc") for at in range(100)), (70_000, b"x")])
    joined = join_segments(code)
    for tried in (code, joined):
        with pytest.raises((wasmtime.Trap, wasmtime.WasmtimeError)):
            memory_of(tried)


@given(st.binary(max_size=200))
def test_junk_is_given_back(junk: bytes):
    assert join_segments(b"\0asm\1\0\0\0" + junk) is not None
    assert join_segments(junk) == junk or junk[:4] == b"\0asm" or len(junk) > 8
