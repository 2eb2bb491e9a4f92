"""Guest memory that knows what it refused: address space reserved by us, grown by page protection.

wasmtime's own limiter refuses a growth without telling anyone, so that a guest which failed for
want of memory could not be told from one that failed for itself. As wasmtime asks, the whole
reservation and its guard follow each memory and stay inaccessible until the memory grows.
"""

from __future__ import annotations

import ctypes
import mmap
from ctypes import c_int, c_long, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

from wasmtime import Config
from wasmtime import _bindings as c_api

_PROT_NONE = 0
_MAP_NORESERVE = 0x4000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = c_void_p
_libc.mmap.argtypes = [c_void_p, c_size_t, c_int, c_int, c_int, c_long]
_libc.mprotect.argtypes = [c_void_p, c_size_t, c_int]
_libc.munmap.argtypes = [c_void_p, c_size_t]


@dataclass
class _Memory:
    base: int
    size_bytes: int
    reserved_bytes: int
    mapped_bytes: int


class GuestMemory:
    """Every linear memory of one engine. `limit_bytes` is for all of them together."""

    def __init__(self) -> None:
        self.limit_bytes = 0
        self.used_bytes = self.peak_bytes = 0
        self.refusals = 0
        self._memories: dict[int, _Memory] = {}
        self._last = 0
        # wasmtime keeps these addresses: they live as long as the engine's owner.
        self._get = c_api.wasmtime_memory_get_callback_t(self._describe)
        self._grow = c_api.wasmtime_memory_grow_callback_t(self._grown)
        self._free = ctypes.CFUNCTYPE(None, c_void_p)(self._freed)
        self._ignore = ctypes.CFUNCTYPE(None, c_void_p)(lambda _: None)
        self._new = c_api.wasmtime_new_memory_callback_t(self._made)
        self._creator = c_api.wasmtime_memory_creator_t(
            env=None, new_memory=self._new, finalizer=self._ignore
        )

    def serve(self, config: Config) -> None:
        """Have the engine of this configuration take its memories here."""
        config.memory_init_cow = False  # wasmtime shares initial pages only in its own mappings
        c_api.wasmtime_config_host_memory_creator_set(config.ptr(), ctypes.byref(self._creator))

    def begin(self, limit_bytes: int) -> None:
        """The next guest may have this much; what it was refused is counted from here."""
        self.limit_bytes = limit_bytes
        self.peak_bytes, self.refusals = self.used_bytes, 0

    def _made(
        self,
        _env: Any,
        _kind: Any,
        minimum: int,
        maximum: int,
        reserved: int,
        guard: int,
        result: Any,
    ) -> int:
        room = reserved or min(maximum, self.limit_bytes)
        if not self._fits(minimum) or minimum > room:
            return self._refuse()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        base = _libc.mmap(None, room + guard, _PROT_NONE, flags, -1, 0)
        if base == c_void_p(-1).value:
            return self._refuse()
        memory = _Memory(base, 0, room, room + guard)
        if not self._open(memory, minimum):
            _libc.munmap(base, room + guard)
            return self._refuse()
        self._last += 1
        self._memories[self._last] = memory
        made = result[0]
        made.env = self._last
        made.get_memory, made.grow_memory, made.finalizer = self._get, self._grow, self._free
        return 0

    def _describe(self, number: int, size: Any, maximum: Any) -> int:
        memory = self._memories[number]
        size[0], maximum[0] = memory.size_bytes, memory.reserved_bytes
        return memory.base

    def _grown(self, number: int, size: int) -> int:
        memory = self._memories[number]
        more = size - memory.size_bytes
        fits = size <= memory.reserved_bytes and self._fits(more)
        return 0 if fits and self._open(memory, size) else self._refuse()

    def _freed(self, number: int) -> None:
        memory = self._memories.pop(number)
        self.used_bytes -= memory.size_bytes
        _libc.munmap(memory.base, memory.mapped_bytes)

    def _fits(self, more_bytes: int) -> bool:
        return self.used_bytes + more_bytes <= self.limit_bytes

    def _open(self, memory: _Memory, size: int) -> bool:
        if size and _libc.mprotect(memory.base, size, mmap.PROT_READ | mmap.PROT_WRITE):
            return False
        self.used_bytes += size - memory.size_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        memory.size_bytes = size
        return True

    def _refuse(self) -> int:
        self.refusals += 1
        text = ctypes.create_string_buffer(b"memory limit")
        error = c_api.wasmtime_error_new(text)  # wasmtime takes it and frees it
        return ctypes.cast(error, c_void_p).value or 1
