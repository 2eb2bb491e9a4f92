"""The program a warm sandbox idles in, since an image may hold no shell: 118 bytes of code.

It is process 1 of the container. It ignores SIGCHLD, so that the kernel reaps orphans for it, and
waits for SIGTERM; then it kills every other process in its namespace with one `kill(-1, SIGKILL)`,
which the kernel does under one lock: a fork bomb cannot run ahead of it. With an argument it exits
with status 0 at once, which is how a runtime is tried. In C:

    int main(int argc) {
        if (argc > 1) _exit(0);
        signal(SIGCHLD, SIG_IGN);
        sigprocmask(SIG_BLOCK, &only_sigterm, NULL);
        for (;;)
            if (sigtimedwait(&only_sigterm, NULL, NULL) == SIGTERM) kill(-1, SIGKILL);
    }
"""

from __future__ import annotations

import platform
import struct
from pathlib import Path

_LOAD_AT = 0x400000
_HEADERS_BYTES = 64 + 56
_X86_64 = (
    "48833c24017f666a006a006a006a01b80d000000bf110000004889e631d241ba080000000f056800400000b8"
    "0e00000031ff4889e631d241ba080000000f05b8800000004889e731f631d241ba080000000f0583f80f75e7"
    "b83e00000048c7c7ffffffffbe090000000f05ebd2b83c00000031ff0f05"
)
_AARCH64 = (
    "e00340f91f0400f14c040054ffc300d1200080d2e00300f9ff0700f9ff0b00f9ff0f00f9c81080d2200280d2"
    "e1030091e2031faa030180d2010000d4000088d2e01300f9e81080d2e0031faae1830091e2031faa030180d2"
    "010000d4281180d2e0830091e1031faae2031faa030180d2010000d41f3c007121ffff54281080d200008092"
    "210180d2010000d4f4ffff17a80b80d2e0031faa010000d4"
)
# The machine number of the ELF header, and the code.
_MACHINES = {"x86_64": (62, _X86_64), "aarch64": (183, _AARCH64)}


def idle_program(machine: str = "") -> bytes | None:
    """The ELF file for a processor, this one's by default; None where there is none."""
    found = _MACHINES.get(machine or platform.machine())
    if found is None:
        return None
    number, code = found[0], bytes.fromhex(found[1])
    size = _HEADERS_BYTES + len(code)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    entry = _LOAD_AT + _HEADERS_BYTES
    header = struct.pack("<HHIQQQIHHHHHH", 2, number, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _LOAD_AT, _LOAD_AT, size, size, 0x1000)
    return ident + header + segment + code


def write_idle_program(folder: Path, *, readable: bool) -> Path | None:
    """Put it into a folder, executable. Blocks. None where there is none for this processor.

    Not readable, its process is closed to debuggers of the same uid; a kernel in user space
    (gVisor) cannot load it then.
    """
    program = idle_program()
    if program is None:
        return None
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target, fresh = folder / ("idle-readable" if readable else "idle"), folder / "idle.new"
    fresh.unlink(missing_ok=True)
    fresh.write_bytes(program)
    fresh.chmod(0o555 if readable else 0o111)
    fresh.replace(target)
    return target
