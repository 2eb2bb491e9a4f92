"""Compiles one stranger's wasm module, alone in a process with limits: bytes in, native code out.

Standard input is the module, standard output receives the compiled code. Exit status 0 is success,
3 a module that is not accepted (its reason on standard error), anything else a failure of ours.
"""

from __future__ import annotations

import os
import resource
import select
import sys
import threading

import wasmtime

from lumaris_node.executors.wasm.engine import check_module, make_engine
from lumaris_node.executors.wasm.memory import GuestMemory
from lumaris_node.executors.wasm.segments import join_segments

REFUSED = 3
NICE = 5  # it uses every core: jobs that run come first
# CPython, 26 MB of wasm, peaks at about 1 GB; address space also holds stacks and reservations.
ADDRESS_BYTES_MAX = 6 * 1024**3
CODE_BYTES_MAX = 1024**3


def main() -> int:
    """Entry point: the user to become (0 to stay), the module's bound, seconds of processor."""
    uid, size_max, cpu_s = (int(argument) for argument in sys.argv[1:4])
    os.nice(NICE)
    threading.Thread(target=_end_with_node, daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES_MAX, ADDRESS_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_FSIZE, (CODE_BYTES_MAX, CODE_BYTES_MAX))
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    source = sys.stdin.buffer.read(size_max + 1)
    memory = GuestMemory()  # lives as long as its engine
    try:
        if len(source) > size_max:
            raise ValueError("it is too large")
        if not source.startswith(b"\0asm"):
            raise ValueError("it is not a WebAssembly binary")
        module = wasmtime.Module(make_engine(memory), join_segments(source))
        refusal = check_module(module)
        if refusal:
            raise ValueError(refusal)
    except (ValueError, wasmtime.WasmtimeError) as error:
        sys.stderr.write(str(error)[:500])
        return REFUSED
    sys.stdout.buffer.write(module.serialize())
    sys.stdout.buffer.flush()
    return 0


def _end_with_node() -> None:
    """A large module takes minutes of every core, which nobody waits for once the node is gone."""
    watched = select.poll()
    # The node reads standard error: an error there, the one thing asked for, is its end.
    watched.register(sys.stderr.fileno(), 0)
    watched.poll()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
