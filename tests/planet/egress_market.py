"""A market of its own inside a network namespace: `python -m tests.planet.egress_market FOLDER`.

The seller, the buyer and the jobs are in the namespace that this process was started in. It prints
what each job found as one JSON object; the test around it made the network and judges.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from pathlib import Path

from lumaris_node.selftest import image
from tests.planet.execution import Shelf, arena

PORT = 8080
ALLOWED, UNNAMED, METADATA = "5.5.5.5", "5.5.5.6", "169.254.169.254"
OWN, LOOPBACK = "5.5.5.1", "127.0.0.1"
TARGETS = (ALLOWED, UNNAMED, METADATA, OWN, LOOPBACK)
WORD = b"reached"

# Each target through the proxy, then without it. The proxy's first line says 200, 403 or 502.
GUEST = f"""
import json, socket
found = {{}}
for host in {TARGETS!r}:
    said = []
    try:
        with socket.create_connection(('127.0.0.1', 3128), 10) as s:
            s.sendall(f'CONNECT {{host}}:{PORT} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'.encode())
            text = b''
            while part := s.recv(4096):
                text += part
            head, _, body = text.partition(b'\\r\\n\\r\\n')
            said.append(head.split(b' ', 2)[1].decode())
            if said == ['200']:
                said.append(body.decode())
    except OSError:
        said.append('no proxy')
    try:
        socket.create_connection((host, {PORT}), 2).close()
        said.append('direct')
    except OSError:
        pass
    found[host] = said
print(json.dumps(found))
"""


def serve(address: str) -> None:
    """Say the word to whoever connects, until this process ends."""
    with socket.create_server((address, PORT), backlog=16) as listener:
        while True:
            stream, _ = listener.accept()
            with stream:
                stream.sendall(WORD)


def main() -> None:
    """Open the market, run a job with a way out and one without on each tier."""
    folder, names = Path(sys.argv[1]), tuple(sys.argv[2].split(","))
    for address in (OWN, LOOPBACK):  # what a job must not reach, although it answers
        threading.Thread(target=serve, args=(address,), daemon=True).start()
    (folder / "modules").mkdir()
    shelf = Shelf(image.build(folder), folder / "modules")
    found = {}
    with arena(folder, shelf, names, egress=f"*:{PORT}") as market:
        for tier in names:
            rules = tuple(f"{host}:{PORT}" for host in TARGETS if host != UNNAMED)
            for way, egress in (("out", rules), ("none", ())):
                result = market.run(tier, GUEST, egress=egress)
                said = result.stdout.decode() or json.dumps(f"{result.reason} {result.detail}")
                found[f"{tier} {way}"] = json.loads(said)
        market.settle()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
