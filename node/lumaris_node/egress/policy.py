"""Which connections of a job are allowed, by name first and by address after.

A rule is `host:port` or `*.domain:port`; an owner's pattern may also be `*` for any host or any
port. A name that is allowed is resolved here, once, and only a public address of it is connected
to: what is private, link-local, a cloud's metadata service or this machine itself is never reached,
whatever a rule says and whatever a name resolves to.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from lumaris_protocol.errors import LumarisError

_RESOLVE_S = 10
# A name with more is not a better one; each is tried in turn.
_ADDRESSES_MAX = 4
_OWNER_PATTERN = re.compile(r"(\*|(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?):(\*|[0-9]{1,5})")
# Global to some versions of `ipaddress`, and yet not the public network: protocol assignments
# (Oracle's metadata among them), relays, test networks, Azure's host service, and IPv6 addresses
# that carry an IPv4 address inside them and reach it through a translator.
_NEVER = tuple(
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "168.63.129.16/32",
        "::/96",
        "64:ff9b::/96",
        "2001::/32",
        "2002::/16",
        "fec0::/10",
    )
)

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve(host: str, port: int) -> Sequence[str]:
    """The IPs of a name by this machine's resolver. Raises OSError."""
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


def check_patterns(patterns: Iterable[str]) -> None:
    """Raises LumarisError `config_invalid` for an owner's pattern that is none."""
    for pattern in patterns:
        found = _OWNER_PATTERN.fullmatch(pattern)
        if found is None or (found[4] != "*" and not 0 < int(found[4]) < 65_536):
            raise LumarisError(
                "config_invalid",
                f"accept.egress {pattern!r} is not HOST:PORT, *.DOMAIN:PORT or *:PORT.",
            )


def covers(patterns: Iterable[str], rule: str) -> bool:
    """Whether an owner's patterns allow everything that a rule of an agreement does."""
    host, _, port = rule.rpartition(":")
    return any(
        wide_port in ("*", port) and (wide == "*" or _matches(wide, host))
        for wide, _, wide_port in (pattern.rpartition(":") for pattern in patterns)
    )


def is_public(ip: str) -> bool:
    """Whether an IP belongs to the public network and to no machine's own surroundings."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    return not any(address in network for network in _NEVER)


class EgressPolicy:
    """The rules of one agreement, on this machine. `own` gives this machine's addresses."""

    def __init__(
        self,
        rules: Iterable[str],
        *,
        own: Callable[[], Iterable[str]],
        resolve: Resolve = resolve,
    ) -> None:
        self._rules, self._own, self._resolve = tuple(rules), own, resolve

    def allows(self, host: str, port: int) -> bool:
        """Whether a rule names this host and port."""
        host = host.lower().rstrip(".")
        return any(
            wanted == str(port) and _matches(name, host)
            for name, _, wanted in (rule.rpartition(":") for rule in self._rules)
        )

    async def addresses(self, host: str, port: int) -> tuple[str, ...]:
        """The public IPs to connect to. Raises LumarisError `egress_refused`, `unreachable`."""
        if not self.allows(host, port):
            raise LumarisError("egress_refused", f"The agreement does not name {host}:{port}.")
        try:
            with trio.fail_after(_RESOLVE_S):
                found = await self._resolve(host, port)
        except (OSError, UnicodeError, trio.TooSlowError) as error:
            raise LumarisError("unreachable", f"{host} has no address here.") from error
        own = {_plain(ip) for ip in self._own()}
        public = [ip for ip in found if is_public(ip) and _plain(ip) not in own]
        if not public:
            raise LumarisError(
                "egress_refused", f"{host} is private, link-local or this machine itself."
            )
        return tuple(public[:_ADDRESSES_MAX])


def own_addresses() -> set[str]:
    """The IPs of all interfaces of this machine."""
    import psutil

    return {
        entry.address.partition("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }


def _matches(pattern: str, host: str) -> bool:
    if pattern.startswith("*."):
        return pattern == host or host.removeprefix("*.").endswith(pattern[1:])
    return host == pattern


def _plain(ip: str) -> str:
    try:
        address = ipaddress.ip_address(ip.partition("%")[0])
    except ValueError:
        return ip
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)
