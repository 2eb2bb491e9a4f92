"""Streams over real sockets: they flow while the server serves, and do not keep it from ending."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from lumaris_coordinator.bounds import SHUTDOWN_S_MAX
from tests.coordinator.served import Served


@pytest.mark.slow
def test_a_stream_is_told_that_the_server_ends(tmp_path: Path) -> None:
    served = Served(tmp_path / "state")
    lines: list[str] = []
    with httpx.Client() as client:
        with served.running():
            headers = {"authorization": f"Bearer {served.token}"}
            request = client.build_request("GET", f"{served.url}/v1/events", headers=headers)
            answer = client.send(request, stream=True)
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            found = answer.iter_lines()
            lines.append(next(found))
            begun = time.monotonic()
        assert time.monotonic() - begun < SHUTDOWN_S_MAX  # nobody's patience was needed
        lines += [line for line in found if line]
        answer.close()
    assert lines[0] == ": alive"
    assert lines[-2:] == ["event: end", 'data: {"reason":"restarting","after":0}']
