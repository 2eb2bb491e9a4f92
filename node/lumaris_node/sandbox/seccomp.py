"""Compiles the system call profile to a classic BPF program, for kernels without a library.

One profile serves both native tiers: `sandbox/seccomp.json`, in the format of Docker, lists what
is allowed; anything else fails with an error number. What decides by arguments is tested first,
then the allowed numbers as ranges. Another architecture's or x32's calls kill the process: they
would be other calls under the same numbers.
"""

from __future__ import annotations

import json
import platform
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

ALLOW = 0x7FFF0000
ERRNO = 0x00050000
KILL_PROCESS = 0x80000000
X32_BIT = 0x40000000
# AUDIT_ARCH_* of linux/audit.h.
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
INSTRUCTIONS_MAX = 4096  # BPF_MAXINSNS
# Offsets in struct seccomp_data; both architectures are little-endian.
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
_LOAD, _JEQ, _JGT, _JGE, _AND, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x54, 0x06
_WORD = 0xFFFFFFFF
_KNOWN_KEYS = {"names", "action", "args", "errnoRet", "comment"}


class ProfileError(Exception):
    """The profile asks for something that is not understood here, or this machine is unknown."""


@dataclass(frozen=True)
class Test:
    """An argument, masked, must equal a value; all are 64 bits wide."""

    index: int
    mask: int
    value: int


@dataclass(frozen=True)
class Rule:
    """A call gets `action` when every test holds."""

    tests: tuple[Test, ...]
    action: int


@dataclass(frozen=True)
class Profile:
    """For each call by name: rules in order, the first that holds decides; else `default`."""

    default: int
    rules: Mapping[str, tuple[Rule, ...]]


def load_profile(text: str | None = None) -> Profile:
    """The profile of this package, or of a text in Docker's format. Raises ProfileError."""
    if text is None:
        text = (resources.files("lumaris_node.sandbox") / "seccomp.json").read_text("utf-8")
    document = json.loads(text)
    rules: dict[str, list[Rule]] = {}
    for entry in document["syscalls"]:
        if unknown := set(entry) - _KNOWN_KEYS:
            raise ProfileError(f"not understood: {', '.join(sorted(unknown))}")
        tests = tuple(_test(argument) for argument in entry.get("args") or ())
        action = _action(entry["action"], entry.get("errnoRet", document.get("defaultErrnoRet", 1)))
        for name in entry["names"]:
            rules.setdefault(name, []).append(Rule(tests, action))
    default = _action(document["defaultAction"], document.get("defaultErrnoRet", 1))
    return Profile(default, {name: tuple(found) for name, found in rules.items()})


def syscall_numbers(machine: str | None = None) -> dict[str, int]:
    """Numbers of the system calls by name. Raises ProfileError for another machine."""
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise ProfileError(f"no system call numbers for {machine}")
    text = (resources.files("lumaris_node.sandbox") / "syscalls.json").read_text("utf-8")
    numbers: dict[str, int] = json.loads(text)[machine]
    return numbers


def compile_filter(profile: Profile | None = None, machine: str | None = None) -> bytes:
    """The program, as the kernel's `struct sock_filter[]`. Raises ProfileError."""
    profile, machine = profile or load_profile(), machine or platform.machine()
    numbers = syscall_numbers(machine)
    code = [
        _step(_LOAD, _ARCH),
        _step(_JEQ, ARCHITECTURES[machine], 1, 0),
        _step(_RETURN, KILL_PROCESS),
        _step(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        code += [_step(_JGE, X32_BIT, 0, 1), _step(_RETURN, KILL_PROCESS)]
    plain: dict[int, int] = {}
    for name, rules in profile.rules.items():
        if name not in numbers:
            continue  # of another architecture
        if rules[0].tests:
            code += _by_arguments(numbers[name], rules, profile.default)
        else:
            plain[numbers[name]] = rules[0].action
    for first, last, action in _ranges(plain):
        code += [
            _step(_JGT, last, 3, 0),
            _step(_JGE, first, 0, 1),
            _step(_RETURN, action),
            _step(_RETURN, profile.default),
        ]
    code.append(_step(_RETURN, profile.default))
    if len(code) > INSTRUCTIONS_MAX:
        raise ProfileError(f"{len(code)} instructions are more than the kernel takes")
    return b"".join(code)


def _by_arguments(number: int, rules: Sequence[Rule], default: int) -> list[bytes]:
    body: list[bytes] = []
    for rule in rules:
        tests = [step for test in rule.tests for step in _halves(test)]
        # Each half is a load, a mask, and a jump over the rest of this rule when it differs.
        for position, (offset, mask, value) in enumerate(tests):
            left = 3 * (len(tests) - position - 1) + 1
            body += [_step(_LOAD, offset), _step(_AND, mask), _step(_JEQ, value, 0, left)]
        body.append(_step(_RETURN, rule.action))
    body.append(_step(_RETURN, default))
    if len(body) > 255:
        raise ProfileError("too many rules for one call")
    return [_step(_JEQ, number, 0, len(body)), *body]


def _halves(test: Test) -> list[tuple[int, int, int]]:
    offset = _ARGUMENTS + 8 * test.index
    low = (offset, test.mask & _WORD, test.value & _WORD)
    high = (offset + 4, test.mask >> 32, test.value >> 32)
    return [low, high]


def _ranges(plain: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """Runs of neighbouring numbers with one action, ascending."""
    runs: list[tuple[int, int, int]] = []
    for number, action in sorted(plain.items()):
        if runs and runs[-1][1] + 1 == number and runs[-1][2] == action:
            runs[-1] = (runs[-1][0], number, action)
        else:
            runs.append((number, number, action))
    return runs


def _test(argument: Mapping[str, int | str]) -> Test:
    index, value = int(argument["index"]), int(argument["value"])
    if not 0 <= index <= 5:
        raise ProfileError(f"no argument has index {index}")
    if argument["op"] == "SCMP_CMP_EQ":
        return Test(index, 2**64 - 1, value)
    if argument["op"] == "SCMP_CMP_MASKED_EQ":
        return Test(index, value, int(argument.get("valueTwo", 0)))
    raise ProfileError(f"comparison not understood: {argument['op']}")


def _action(name: str, errno: int) -> int:
    if name == "SCMP_ACT_ALLOW":
        return ALLOW
    if name == "SCMP_ACT_ERRNO":
        return ERRNO | errno
    raise ProfileError(f"action not understood: {name}")


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
