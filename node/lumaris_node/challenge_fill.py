"""One fill of memory, as a process of its own: Argon2id over what standard input names.

Reads one line of JSON (password, salt, bytes), prints the tag in hex. It ends when its parent does,
for then standard input ends; it runs as nobody where it may, with room for the fill and no more.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading

from nacl.pwhash import argon2id

from lumaris_node.sandbox import users

UID = users.CHALLENGE
_ORDER_BYTES_MAX = 4096
# The interpreter and its libraries beside the fill itself.
_ROOM_BYTES = 512 * 1024 * 1024
_CPU_S_MAX = 60


def main() -> int:
    """Fill once and say the tag."""
    order = json.loads(sys.stdin.buffer.readline(_ORDER_BYTES_MAX))
    size = int(order["bytes"])
    resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM_BYTES, size + _ROOM_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S_MAX, _CPU_S_MAX))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(UID, UID, UID)
        os.setresuid(UID, UID, UID)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    password, salt = bytes.fromhex(order["password"]), bytes.fromhex(order["salt"])
    tag = argon2id.kdf(32, password, salt, opslimit=1, memlimit=size)
    sys.stdout.write(tag.hex())
    sys.stdout.flush()
    return 0


def _end_with_parent() -> None:
    """The fill itself does not look up for seconds."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
