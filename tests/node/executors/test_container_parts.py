"""Parts of the container tier that need no engine: requests, facts, the idle program, runtimes."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from lumaris_node.executors.container.cgroup import ContainerGroup, Facts
from lumaris_node.executors.container.config import container_request, seccomp_profile
from lumaris_node.executors.container.engine import GuestStream
from lumaris_node.executors.container.idle import idle_program, write_idle_program
from lumaris_node.executors.container.runtime import candidates
from lumaris_node.executors.container.sandbox import folder_identity
from lumaris_node.executors.port import JobSpec
from tests.node.executors.conformance import LIMITS

IMAGE = "sha256:" + "1" * 64
INFO = {
    "SecurityOptions": ["name=seccomp,profile=default"],
    "Runtimes": {"runc": {}},
    "DefaultRuntime": "runc",
}
# None of these may be asked for by a guest; see the attack suite for what answers.
DENIED = {
    "io_setup",  # of a number that all of the machine shares
    "io_submit",
    "io_uring_setup",
    "io_uring_enter",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "personality",
    "userfaultfd",
    "keyctl",
    "add_key",
    "request_key",
    "unshare",
    "setns",
    "mount",
    "umount2",
    "pivot_root",
    "move_mount",
    "open_tree",
    "fsopen",
    "bpf",
    "perf_event_open",
    "kexec_load",
    "init_module",
    "finit_module",
    "delete_module",
    "clock_settime",
    "settimeofday",
    "sethostname",
    "setdomainname",
    "swapon",
    "reboot",
    "acct",
    "iopl",
    "ioperm",
    "mlockall",
    "open_by_handle_at",
    "name_to_handle_at",
    "lookup_dcookie",
    "kcmp",
    "pidfd_getfd",
    "quotactl",
    "fanotify_init",
    "syslog",
    "vhangup",
    "chroot",
}


def spec(**changes: object) -> JobSpec:
    made = JobSpec("job", IMAGE, ("/bin/true",), {}, Path("/a"), Path("/b"), LIMITS, lease="l")
    return replace(made, **changes)  # type: ignore[arg-type]


def host(made: JobSpec, runtime: str = "") -> dict[str, object]:
    found = container_request(made, Path("/idle"), node="n", runtime=runtime)["HostConfig"]
    assert isinstance(found, dict)
    return found


def test_gpus_are_asked_for_by_name():
    assert host(spec(gpus=("GPU-1", "GPU-2")))["DeviceRequests"] == [
        {
            "Driver": "nvidia",
            "Count": 0,
            "DeviceIDs": ["GPU-1", "GPU-2"],
            "Capabilities": [["gpu", "compute", "utility"]],
            "Options": {},
        }
    ]
    assert "DeviceRequests" not in host(spec())


def test_what_hardens_a_sandbox():
    found = host(spec(mounts=((Path("/tools"), "/tools"),)))
    assert found["CapDrop"] == ["ALL"]
    assert found["ReadonlyRootfs"] is True
    assert found["NetworkMode"] == "none"
    assert found["Memory"] == found["MemorySwap"] == LIMITS.memory_bytes
    assert found["PidsLimit"] == LIMITS.pids + 16
    assert found["LogConfig"] == {"Type": "none", "Config": {}}
    options = found["SecurityOpt"]
    assert isinstance(options, list)
    assert options[0] == "no-new-privileges"
    mounts = found["Mounts"]
    assert isinstance(mounts, list)
    assert [(item["Target"], item["ReadOnly"]) for item in mounts] == [
        ("/in", True),
        ("/out", False),
        ("/.lumaris/idle", True),
        ("/tools", True),
    ]
    assert "Runtime" not in found
    assert host(spec(), "runsc-x")["Runtime"] == "runsc-x"
    assert host(spec(), "runsc-x")["PidsLimit"] == 1024


def test_orders_that_ask_for_the_same_share_a_sandbox():
    one, two = (container_request(spec(job=job), Path("/i"), node="n", runtime="") for job in "ab")
    assert one == two
    smaller = spec(limits=replace(LIMITS, memory_bytes=LIMITS.memory_bytes // 2))
    assert container_request(smaller, Path("/i"), node="n", runtime="") != one


def test_the_profile_denies_what_attacks_need():
    profile = json.loads(seccomp_profile())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    allowed = [rule for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW"]
    plain = {name for rule in allowed if not rule.get("args") for name in rule["names"]}
    assert plain.isdisjoint(DENIED)
    assert plain.isdisjoint({"socket", "clone", "clone3"})
    families = {
        rule["args"][0]["value"]
        for rule in allowed
        if rule["names"] == ["socket"] and rule["args"][0]["op"] == "SCMP_CMP_EQ"
    }
    assert families == {1, 2, 10}  # unix, inet, inet6


@pytest.mark.parametrize(
    ("runtimes", "options", "wanted", "found"),
    [
        (["runc"], [], "", [("", "container")]),
        (["runc"], ["name=userns"], "", [("", "container+userns")]),
        (["runc", "runsc"], [], "", [("runsc", "gvisor"), ("", "container")]),
        (
            ["kata-qemu", "runc", "runsc"],
            [],
            "",
            [("kata-qemu", "kata"), ("runsc", "gvisor"), ("", "container")],
        ),
        (["runc", "runsc"], [], "runc", [("", "container")]),
        (["crun", "runc"], [], "crun", [("crun", "container")]),
        (["runc", "runsc"], [], "runsc", [("runsc", "gvisor")]),
        (["runc"], [], "runsc", []),
    ],
)
def test_the_strongest_runtime_is_tried_first(
    runtimes: list[str], options: list[str], wanted: str, found: list[tuple[str, str]]
):
    info = INFO | {
        "Runtimes": {name: {} for name in runtimes},
        "SecurityOptions": ["name=seccomp,profile=default", *options],
    }
    assert [(item.runtime, item.assurance) for item in candidates(info, wanted)] == found


def test_without_seccomp_nothing_is_offered():
    assert candidates(INFO | {"SecurityOptions": []}, "") == []


def test_facts_of_version_2(tmp_path: Path):
    files = {
        "cpu.stat": "usage_usec 1234567\nuser_usec 1\n",
        "memory.current": "4096\n",
        "memory.peak": "8192\n",
        "memory.events": "low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\noom_group_kill 0\n",
        "pids.events": "max 5\n",
        "cgroup.procs": "7\n8\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    group = ContainerGroup(tmp_path, tmp_path, tmp_path, unified=True)
    assert group.facts() == Facts(1234, 4096, 8192, 2, 5)
    assert group.processes() == [7, 8]
    assert not group.reset_peak()
    gone = ContainerGroup(tmp_path / "x", tmp_path / "x", tmp_path / "x", unified=True)
    assert gone.facts() == Facts()
    assert gone.processes() == []


def test_facts_of_version_1(tmp_path: Path):
    files = {
        "cpuacct.usage": "1234567890\n",
        "memory.usage_in_bytes": "4096\n",
        "memory.max_usage_in_bytes": "8192\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        "pids.events": "max 5\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    group = ContainerGroup(tmp_path, tmp_path, tmp_path, unified=False)
    assert group.facts() == Facts(1234, 4096, 8192, 2, 5)
    assert group.reset_peak()


def test_a_process_of_another_group_is_not_taken_for_the_container():
    assert ContainerGroup.of(1, "0" * 64) is None
    assert ContainerGroup.of(2**22 + 1, "0" * 64) is None


@pytest.mark.slow
def test_the_idle_program_runs_here(tmp_path: Path):
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("needs a processor that the idle program is made for")
    hidden = write_idle_program(tmp_path, readable=False)
    shown = write_idle_program(tmp_path, readable=True)
    assert hidden is not None
    assert shown is not None
    assert (hidden.stat().st_mode & 0o777, shown.stat().st_mode & 0o777) == (0o111, 0o555)
    assert subprocess.run([shown, "x"], check=False).returncode == 0


def test_the_idle_program_of_each_processor():
    for machine, number in (("x86_64", 62), ("aarch64", 183)):
        program = idle_program(machine)
        assert program is not None
        assert program[:4] == b"\x7fELF"
        assert int.from_bytes(program[18:20], "little") == number
    assert idle_program("vax") is None


def test_a_folder_made_anew_is_another(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    before = folder_identity(folder)
    folder.rename(tmp_path / "kept")
    folder.mkdir()
    assert folder_identity(folder) != before


async def test_frames_are_put_together_from_any_pieces():
    import trio
    import trio.testing

    whole = (
        b"\x01\0\0\0\0\0\0\x05hello\x02\0\0\0\0\0\0\x03err\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\x02ok"
    )
    for size in range(1, len(whole) + 1):
        ours, theirs = trio.testing.memory_stream_pair()
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        stream = GuestStream(ours, pieces[0], tty=False)  # type: ignore[arg-type]
        for piece in pieces[1:]:
            await theirs.send_all(piece)
        await theirs.send_eof()
        out: dict[str, bytes] = {"stdout": b"", "stderr": b""}
        while (part := await stream.receive()) is not None:
            out[part[0]] += part[1]
        assert out == {"stdout": b"hellook", "stderr": b"err"}
