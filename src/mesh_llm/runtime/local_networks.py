"""Which addresses are on a network of this machine: what comes from there needs no router."""

import ipaddress
import socket
from collections.abc import Iterable
from typing import TypeAlias

import psutil

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


def local_networks() -> tuple[Network, ...]:
    """The networks of all interfaces that are up."""
    up = {name for name, status in psutil.net_if_stats().items() if status.isup}
    found: list[Network] = []
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries if name in up else ():
            if entry.family not in {socket.AF_INET, socket.AF_INET6} or not entry.netmask:
                continue
            network = _network(entry.address.partition("%")[0], entry.netmask)
            if network is not None:
                found.append(network)
    return tuple(dict.fromkeys(found))


def multicast_addresses() -> tuple[str, ...]:
    """IPv4 addresses of the interfaces on which others can be found: up, and not loopback."""
    up = {name for name, status in psutil.net_if_stats().items() if status.isup}
    return tuple(
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up and entry.family == socket.AF_INET and not ipaddress.ip_address(entry.address).is_loopback
    )


def is_near(address: str, networks: Iterable[Network]) -> bool:
    """Whether `ip:port` or an address alone is on one of these networks, or link-local. A relay's word is not."""
    host = _host(address)
    if host is None or host.is_multicast or host.is_unspecified:
        return False
    return host.is_link_local or any(host.version == network.version and host in network for network in networks)


def _host(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    for text in (address, address.rpartition(":")[0]):
        try:
            parsed = ipaddress.ip_address(text.strip("[]").partition("%")[0])
        except ValueError:
            continue
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
            return parsed.ipv4_mapped
        return parsed
    return None


def _network(address: str, netmask: str) -> Network | None:
    try:
        if ":" in address:
            bits = int(ipaddress.IPv6Address(netmask)).bit_count()
            return ipaddress.ip_network((address, bits), strict=False)
        return ipaddress.ip_network(f"{address}/{netmask}", strict=False)
    except ValueError:
        return None
