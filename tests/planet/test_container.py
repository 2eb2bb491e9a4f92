"""A container bought and paid on the market, when a Docker engine answers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import docker
import pytest

from lumaris.testing.devnet import Devnet

pytestmark = [pytest.mark.planet, pytest.mark.slow, pytest.mark.docker]


@pytest.fixture
def image(docker_engine: str) -> str:
    """The digest of the test image in the engine."""
    client = docker.DockerClient(base_url=docker_engine)
    try:
        return str(client.images.get("lumaris/busybox:test").id)
    finally:
        client.close()


def test_a_container_runs_with_files_in_and_out(image: str, net: Devnet, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("walter\nada\ngrace\n")
    with net.client() as client:
        give_up = time.monotonic() + 60
        while not any(  # a tier is offered once its self-test held
            runtime.tier == "container"
            for offer in client.offers()
            for runtime in offer.message.runtimes
        ):
            assert time.monotonic() < give_up, "the container tier is never offered"
            time.sleep(0.2)
        result = client.run(
            image,
            ["sh", "-c", "sort /in/names.txt > /out/sorted.txt; echo sorted; id -u >&2"],
            inputs={"names.txt": names},
        )
        assert result.ok, result
        assert result.stdout == b"sorted\n" and result.stderr.strip() != b"0"
        sorted_names = result.artifacts["sorted.txt"].file.read_text()
        assert sorted_names == "ada\ngrace\nwalter\n"
        assert result.cost_nanos > 0
        bad = client.run(image, ["no-such-program"])
        assert bad.reason == "bad_command" and bad.cost_nanos == 0
    engine = docker.DockerClient(base_url=os.environ["DOCKER_HOST"])
    try:  # a lease's sandbox goes with its session, which ends a moment after the client
        give_up = time.monotonic() + 20
        while engine.containers.list(all=True, filters={"label": "lumaris.node"}):
            assert time.monotonic() < give_up, "a container outlives its lease"
            time.sleep(0.1)
    finally:
        engine.close()
