"""Joins the data segments of a module, so that it compiles in a fraction of the time.

With memory that we map ourselves, the compiler makes one function that writes all data segments,
and a linker may leave thousands of them: CPython has 24,000, which cost twice as much as all of its
code. Neighbours are written as one, with zeros between them, as memory is before it is written.
Only where no instruction can name a segment: a module without a data count section (binary format,
sections 11 and 12).
"""

from __future__ import annotations

_HEADER_BYTES = 8
_DATA, _DATA_COUNT = 11, 12
_I32_CONST, _END = 0x41, 0x0B
# Fewer cost nothing worth saving.
_SEGMENTS_MIN = 64
# Zeros that may be written between two segments: less than what another segment costs.
_GAP_BYTES_MAX = 4096


def join_segments(module: bytes) -> bytes:
    """The module with its neighbouring data segments joined; as it is where that is not safe.

    What is no module is given back too: whoever compiles it says what is wrong.
    """
    try:
        return _joined(module)
    except (IndexError, ValueError):
        return module


def _joined(module: bytes) -> bytes:
    at, found = _HEADER_BYTES, None
    while at < len(module):
        kind, begin = module[at], at
        size, body = _unsigned(module, at + 1)
        at = body + size
        if kind == _DATA_COUNT or at > len(module):
            return module
        if kind == _DATA:
            found = (begin, body, at)
    if found is None:
        return module
    begin, body, end = found
    runs = _runs(module, body, end)
    if runs is None:
        return module
    data = _encoded(len(runs)) + b"".join(
        bytes([0, _I32_CONST]) + _signed_encoded(start) + bytes([_END]) + _encoded(len(run)) + run
        for start, run in runs
    )
    return module[:begin] + bytes([_DATA]) + _encoded(len(data)) + data + module[end:]


def _runs(module: bytes, at: int, end: int) -> list[tuple[int, bytearray]] | None:
    """Stretches of memory in the order of writing; None where a segment is of another kind."""
    count, at = _unsigned(module, at)
    if count < _SEGMENTS_MIN:
        return None
    runs: list[tuple[int, bytearray]] = []
    written = 0  # all memory from here on is still zero
    for _ in range(count):
        if module[at] != 0 or module[at + 1] != _I32_CONST:
            return None
        offset, at = _signed(module, at + 2)
        size, body = _unsigned(module, at + 1)
        if module[at] != _END or offset < 0 or body + size > end:
            return None
        at = body + size
        if runs:
            start, run = runs[-1]
            gap = offset - start - len(run)
            # Zeros may stand only where nothing was written yet.
            fits = gap <= 0 or (gap <= _GAP_BYTES_MAX and start + len(run) == written)
            if offset >= start and fits:
                run.extend(bytes(max(0, gap)))
                run[offset - start : offset - start + size] = module[body:at]
                written = max(written, start + len(run))
                continue
        runs.append((offset, bytearray(module[body:at])))
        written = max(written, offset + size)
    return runs if at == end else None


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 28:
            raise ValueError("a number of more than 32 bits")


def _signed(data: bytes, at: int) -> tuple[int, int]:
    begin = at
    value, at = _unsigned(data, at)
    bits = 7 * (at - begin)
    return (value - (1 << bits) if value >> (bits - 1) else value), at


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _signed_encoded(value: int) -> bytes:
    """Of a number that is not negative."""
    out = bytearray()
    while value > 0x3F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
