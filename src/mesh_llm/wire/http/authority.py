"""Hosts and ports as HTTP's Host and Origin headers name them, read strictly: one reader for the API and the console.

RFC 9110, section 7.2: `Host = uri-host [ ":" port ]`. What does not match exactly is no authority: a lenient reader
would take `localhost:80@evil.example` or `[::1]evil.example` for this machine.
"""

import re
from ipaddress import ip_address

_AUTHORITY = re.compile(
    r"(?i)(?P<host>\[[0-9a-f:.]{2,45}\]|[0-9a-z_](?:[0-9a-z_.-]{0,251}[0-9a-z_])?)(?::(?P<port>\d{1,5}))?"
)
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


def split_authority(text: str) -> tuple[str, int | None] | None:
    """Host (lower-case; IPv6 with its brackets) and port of `host[:port]`; None where it is something else."""
    found = _AUTHORITY.fullmatch(text) if text.isascii() else None
    if found is None:
        return None
    port = int(found["port"]) if found["port"] is not None else None
    return None if port is not None and port > 65535 else (found["host"].lower(), port)


def host_of(text: str) -> str:
    """The host of `host[:port]`, lower-case; empty where the text is something else."""
    found = split_authority(text)
    return found[0] if found is not None else ""


def split_origin(text: str) -> tuple[str, str, int] | None:
    """Scheme, host and port of an origin such as `https://host:8443`; None where it is none of HTTP's."""
    scheme, separator, authority = text.partition("://")
    found = split_authority(authority) if separator else None
    default = _DEFAULT_PORTS.get(scheme.lower())
    if found is None or default is None:
        return None
    return scheme.lower(), found[0], default if found[1] is None else found[1]


def is_loopback_name(host: str) -> bool:
    """Whether a host, as `host_of` gives it, is a name by which every machine knows itself."""
    return host in _LOOPBACK_NAMES


def is_own_name(authority: str, bound: str) -> bool:
    """Whether a Host header names this machine: by a loopback name, or by the address that is bound (no brackets)."""
    host = host_of(authority)
    return is_loopback_name(host) or (bool(host) and host.strip("[]") == bound.lower())


def unbracketed(address: str) -> str:
    """An address to bind, without the brackets that URLs put around IPv6."""
    return address[1:-1] if address.startswith("[") and address.endswith("]") else address


def is_loopback_address(address: str) -> bool:
    """Whether an address to bind, without brackets, is reached from this machine only."""
    try:
        return address == "localhost" or ip_address(address).is_loopback
    except ValueError:
        return False
