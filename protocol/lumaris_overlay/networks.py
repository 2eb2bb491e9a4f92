"""IP texts: the network around an address, whose it is, and IP:PORT settings. Pure functions."""

from __future__ import annotations

import ipaddress

from lumaris_protocol.errors import LumarisError

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
        "64:ff9b:1::/48",
        "2001::/32",
        "2002::/16",
        "fec0::/10",
        "3fff::/20",
    )
)


def network_of(ip: str, bits: tuple[int, int] = (32, 64)) -> str:
    """The network of these bits (IPv4, IPv6) around an address, by default one customer's.

    That is an IPv4 address, or the /64 of an IPv6 address. What is no IP is returned as it is.
    """
    try:
        address = ipaddress.ip_address(ip.partition("%")[0])
    except ValueError:
        return ip
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    length = bits[address.version == 6]
    if length == address.max_prefixlen:
        return str(address)
    return str(ipaddress.ip_network((int(address), length), strict=False))


def is_public(ip: str) -> bool:
    """Whether an IP belongs to the public network and to no machine's own surroundings."""
    try:
        address = ipaddress.ip_address(ip.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    return not any(address in network for network in _NEVER)


def ip_and_port(name: str, text: str) -> tuple[str, int]:
    """The two halves of the setting `name`, an IPv6 address in brackets or without.

    Raises LumarisError `config_invalid`.
    """
    ip, _, port = text.rpartition(":")
    ip = ip.strip("[]")
    try:
        ipaddress.ip_address(ip)
        if not 0 <= int(port) <= 65_535:
            raise ValueError(port)
    except ValueError:
        raise LumarisError("config_invalid", f"{name} {text!r} is not IP:PORT.") from None
    return ip, int(port)
