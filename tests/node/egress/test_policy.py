"""Names first, addresses after: what a job may connect to."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumaris_node.egress.policy import (
    EgressPolicy,
    check_patterns,
    covers,
    own_addresses,
)
from lumaris_overlay.networks import is_public
from lumaris_protocol.errors import LumarisError

PUBLIC = "151.101.1.1"


def policy(
    *rules: str, answers: Mapping[str, Sequence[str]] | None = None, own: str = ""
) -> EgressPolicy:
    async def resolve(host: str, port: int) -> Sequence[str]:
        found = (answers or {}).get(host)
        if found is None:
            raise OSError("no such name")
        return found

    return EgressPolicy(rules, own=lambda: [own] if own else [], resolve=resolve)


async def code_of(found: EgressPolicy, host: str, port: int = 443) -> str:
    with pytest.raises(LumarisError) as caught:
        await found.addresses(host, port)
    return caught.value.code


async def test_only_what_a_rule_names_is_resolved():
    found = policy("a.org:443", "*.b.org:80", answers={"a.org": [PUBLIC], "x.b.org": [PUBLIC]})
    assert await found.addresses("a.org", 443) == (PUBLIC,)
    assert await found.addresses("x.b.org", 80) == (PUBLIC,)
    for host, port in (("a.org", 80), ("b.org", 80), ("xb.org", 80), ("a.org.evil.net", 443)):
        assert await code_of(found, host, port) == "egress_refused", host


@pytest.mark.parametrize(
    "ip",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "0.0.0.0",
        "255.255.255.255",
        "224.0.0.1",
        "203.0.113.9",
        "::1",
        "fe80::1",
        "fd00:ec2::254",
        "::ffff:169.254.169.254",
        "::ffff:10.0.0.1",
        "::10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
        "ff02::1",
        "not an ip",
    ],
)
async def test_no_name_leads_to_a_private_place(ip: str):
    assert not is_public(ip)
    assert await code_of(policy("a.org:443", answers={"a.org": [ip]}), "a.org") == "egress_refused"


async def test_a_mixed_answer_keeps_its_public_part():
    found = policy("a.org:443", answers={"a.org": ["10.0.0.1", PUBLIC, "::1"]})
    assert await found.addresses("a.org", 443) == (PUBLIC,)


async def test_this_machine_is_never_reached():
    answers = {"a.org": [PUBLIC, f"::ffff:{PUBLIC}"]}
    found = policy("a.org:443", answers=answers, own=PUBLIC)
    assert await code_of(found, "a.org") == "egress_refused"
    assert "127.0.0.1" in own_addresses()


async def test_a_literal_address_needs_a_rule_and_a_public_one():
    found = policy(
        "10.0.0.1:80", f"{PUBLIC}:80", answers={"10.0.0.1": ["10.0.0.1"], PUBLIC: [PUBLIC]}
    )
    assert await found.addresses(PUBLIC, 80) == (PUBLIC,)
    assert await code_of(found, "10.0.0.1", 80) == "egress_refused"


async def test_a_name_without_an_address():
    assert await code_of(policy("a.org:443"), "a.org") == "unreachable"


@given(st.integers(0, 2**32 - 1))
def test_mapped_addresses_are_judged_as_what_they_map(number: int):
    ip = ipaddress.IPv4Address(number)
    assert is_public(str(ip)) == is_public(f"::ffff:{ip}")
    if ip.is_private or ip.is_link_local or ip.is_loopback or ip.is_multicast:
        assert not is_public(str(ip))


@pytest.mark.parametrize(
    ("pattern", "rule", "covered"),
    [
        ("*:443", "a.org:443", True),
        ("*:443", "*.a.org:443", True),
        ("*:443", "a.org:80", False),
        ("*:*", "a.org:80", True),
        ("*.a.org:443", "x.a.org:443", True),
        ("*.a.org:443", "*.a.org:443", True),
        ("*.a.org:443", "*.x.a.org:443", True),
        ("*.a.org:443", "a.org:443", False),
        ("x.a.org:443", "*.a.org:443", False),
        ("a.org:443", "a.org:443", True),
        ("a.org:443", "b.a.org:443", False),
    ],
)
def test_what_an_owner_allows(pattern: str, rule: str, covered: bool):
    check_patterns([pattern])
    assert covers([pattern], rule) is covered
    assert not covers([], rule)


@pytest.mark.parametrize("pattern", ["a.org", "a.org:0", "a.org:70000", "*a.org:1", "http://a:1"])
def test_a_false_pattern_is_named(pattern: str):
    with pytest.raises(LumarisError, match="egress"):
        check_patterns([pattern])
