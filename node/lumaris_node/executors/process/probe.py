"""The smallest program there is: it needs nothing of a root folder, and so can try a sandbox."""

from __future__ import annotations

import struct

PROBE_WORD = b"ok\n"
_BASE, _HEADERS, _PAGE = 0x400000, 64 + 56, 0x1000
# By machine: its number in ELF, and the code for write(1, word, 3); exit(0). The word follows it.
_CODE = {
    # eax=1 edi=1 rsi=word edx=3 syscall; eax=60 edi=0 syscall
    "x86_64": (62, "b801000000bf01000000488d3510000000ba030000000f05b83c00000031ff0f05"),
    # x0=1 x1=word x2=3 x8=64 svc; x0=0 x8=93 svc
    "aarch64": (183, "200080d2e1000010620080d2080880d2010000d4000080d2a80b80d2010000d4"),
}


def probe_program(machine: str) -> bytes:
    """An executable that prints PROBE_WORD; empty for another machine."""
    number, code = _CODE.get(machine, (0, ""))
    if not code:
        return b""
    body = bytes.fromhex(code) + PROBE_WORD
    size = _HEADERS + len(body)
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    entry = _BASE + _HEADERS
    head = struct.pack("<HHIQQQIHHHHHH", 2, number, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    loaded = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, _PAGE)
    return ident + head + loaded + body
