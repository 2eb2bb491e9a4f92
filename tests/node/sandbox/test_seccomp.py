"""The compiled filter, run by an interpreter of its own and compared with the profile's words."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumaris_node.sandbox import seccomp
from lumaris_node.sandbox.seccomp import ALLOW, ARCHITECTURES, ERRNO, KILL_PROCESS

MACHINES = sorted(ARCHITECTURES)
PROFILE = seccomp.load_profile()
PROGRAMS = {machine: seccomp.compile_filter(PROFILE, machine) for machine in MACHINES}
NAMES = {
    machine: {number: name for name, number in seccomp.syscall_numbers(machine).items()}
    for machine in MACHINES
}
# Calls by which others got out of sandboxes; none may ever come into the profile by mistake.
NEVER = [
    "add_key",
    "bpf",
    "chroot",
    "clock_settime",
    "delete_module",
    "finit_module",
    "fsconfig",
    "fsmount",
    "fsopen",
    "init_module",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "kcmp",
    "kexec_load",
    "keyctl",
    "mount",
    "mount_setattr",
    "move_mount",
    "name_to_handle_at",
    "open_by_handle_at",
    "open_tree",
    "perf_event_open",
    "pivot_root",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "quotactl",
    "reboot",
    "request_key",
    "setdomainname",
    "sethostname",
    "setns",
    "swapoff",
    "swapon",
    "syslog",
    "umount2",
    "unshare",
    "userfaultfd",
]


@dataclass(frozen=True)
class Call:
    number: int
    arguments: tuple[int, ...] = ()


def run(program: bytes, arch: int, call: Call) -> int:
    """What the kernel would answer: seccomp_data is number, arch, address, six arguments."""
    arguments = (call.arguments + (0,) * 6)[:6]
    data = struct.pack("<IIQ6Q", call.number & 0xFFFFFFFF, arch, 0, *arguments)
    steps = list(struct.iter_unpack("<HBBI", program))
    accumulator = position = 0
    while True:
        code, if_true, if_false, value = steps[position]
        position += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x06:
            return int(value)
        else:
            holds = {
                0x15: accumulator == value,
                0x25: accumulator > value,
                0x35: accumulator >= value,
            }
            position += if_true if holds[code] else if_false


def expected(machine: str, call: Call) -> int:
    """The same from the JSON text, read as Docker's documentation words it."""
    text = json.loads((resources.files("lumaris_node.sandbox") / "seccomp.json").read_text())
    name = NAMES[machine].get(call.number)
    arguments = (call.arguments + (0,) * 6)[:6]
    for entry in text["syscalls"]:
        if name not in entry["names"]:
            continue
        if all(
            arguments[test["index"]] == test["value"]
            if test["op"] == "SCMP_CMP_EQ"
            else arguments[test["index"]] & test["value"] == test["valueTwo"]
            for test in entry.get("args", ())
        ):
            if entry["action"] == "SCMP_ACT_ALLOW":
                return ALLOW
            return ERRNO | int(entry.get("errnoRet", text["defaultErrnoRet"]))
    return ERRNO | int(text["defaultErrnoRet"])


@pytest.mark.parametrize("machine", MACHINES)
def test_every_number_is_answered_as_the_profile_says(machine: str):
    for number in (*range(1024), 0x3FFFFFFF):
        answer = run(PROGRAMS[machine], ARCHITECTURES[machine], Call(number))
        assert answer == expected(machine, Call(number)), NAMES[machine].get(number)


@given(
    machine=st.sampled_from(MACHINES),
    name=st.sampled_from(["socket", "clone", "clone3", "read", "personality"]),
    first=st.one_of(
        st.integers(0, 64), st.integers(0, 2**64 - 1), st.sampled_from([1 << n for n in range(64)])
    ),
)
def test_arguments_decide_as_the_profile_says(machine: str, name: str, first: int):
    call = Call(seccomp.syscall_numbers(machine)[name], (first,))
    assert run(PROGRAMS[machine], ARCHITECTURES[machine], call) == expected(machine, call)


@given(
    machine=st.sampled_from(MACHINES),
    number=st.integers(0, 2**32 - 1),
    arch=st.integers(0, 2**32 - 1),
)
def test_another_architecture_is_killed(machine: str, number: int, arch: int):
    if arch != ARCHITECTURES[machine]:
        assert run(PROGRAMS[machine], arch, Call(number)) == KILL_PROCESS


@given(st.integers(0x40000000, 2**32 - 1))
def test_x32_is_killed(number: int):
    assert run(PROGRAMS["x86_64"], ARCHITECTURES["x86_64"], Call(number)) == KILL_PROCESS


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_never_allowed(machine: str):
    numbers, arch = seccomp.syscall_numbers(machine), ARCHITECTURES[machine]
    for name in NEVER:
        assert run(PROGRAMS[machine], arch, Call(numbers[name])) & ALLOW != ALLOW, name
    families = [
        n for n in range(64) if run(PROGRAMS[machine], arch, Call(numbers["socket"], (n,))) == ALLOW
    ]
    assert families == [1, 2, 10]
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert run(PROGRAMS[machine], arch, Call(numbers["clone"], (flag | 17,))) != ALLOW
    assert run(PROGRAMS[machine], arch, Call(numbers["clone"], (0x3D0F00,))) == ALLOW  # a thread
    assert run(PROGRAMS[machine], arch, Call(numbers["clone3"])) == ERRNO | 38


def test_every_name_of_the_profile_is_a_call():
    known = set(NAMES["x86_64"].values()) | set(NAMES["aarch64"].values())
    assert set(PROFILE.rules) - known <= {"waitpid"}  # of 32-bit machines


def test_a_profile_that_is_not_understood_is_refused():
    text = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []}
    allow = {"names": ["read"], "action": "SCMP_ACT_ALLOW"}
    for change in (
        {"includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"action": "SCMP_ACT_TRACE"},
        {"args": [{"index": 0, "value": 1, "op": "SCMP_CMP_GT"}]},
        {"args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]},
    ):
        with pytest.raises(seccomp.ProfileError):
            seccomp.load_profile(json.dumps({**text, "syscalls": [{**allow, **change}]}))
    with pytest.raises(seccomp.ProfileError):
        seccomp.compile_filter(PROFILE, "riscv64")
