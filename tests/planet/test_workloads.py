"""A program nobody here wrote, sold by a real seller: its output is that of the program run bare.

`benchmarks/workloads.py` does the same with larger ones in every tier.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import workloads
from benchmarks.parts.workload_images import TOOLS, Built, UnavailableError, build
from benchmarks.parts.workload_set import XZ_ALONE
from lumaris import processes
from lumaris.testing.devnet import Devnet

pytestmark = [pytest.mark.planet, pytest.mark.slow]


@pytest.fixture
def image(native_sandbox: None, tmp_path: Path) -> Built:
    """xz and a shell out of Debian's packages. Without apt: skipped, or failed where required."""
    try:
        return build(TOOLS, tmp_path / "work")
    except UnavailableError as error:
        if os.environ.get("LUMARIS_REQUIRE_APT") == "1":
            pytest.fail(str(error))
        pytest.skip(str(error))


def test_a_debian_program_makes_the_same_bytes_in_a_sellers_sandbox(
    image: Built, tmp_path: Path
) -> None:
    work, net = tmp_path / "work", Devnet(tmp_path / "net", sellers=1)
    bench = workloads.Bench(work, {TOOLS.name: image}, 1, held=image)
    bench.make_input(XZ_ALONE)
    workloads.prepare_seller(net, work, image)
    with net, net.client() as client:
        assert "process" in workloads.wait_offered(client, ("process",))
        bench.run_group(client, "process", (XZ_ALONE,))
    (row,) = bench.rows
    assert row.same and row.cost_nanos > 0 and row.cpu_s > 0
    assert processes.naming(str(net.state)) == []
