"""Which IP addresses are private, however they are written."""

from __future__ import annotations

import ipaddress

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""Through it an IPv6 network reaches IPv4 addresses, which are the last four bytes."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_private(text: str) -> bool:
    """Whether this address is of a private network, of this machine, or of no single place on the internet.

    An IPv4 address within an IPv6 one counts as itself. Raises ValueError for what is no IP address.
    """
    address = _innermost(ipaddress.ip_address(text))
    return not address.is_global or address.is_multicast or address.is_reserved


def is_literal(host: str) -> bool:
    """Whether this host is written as an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _innermost(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else address)
