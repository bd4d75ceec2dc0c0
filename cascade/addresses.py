"""Addresses in the configuration: `host:port`, several separated by commas."""

from __future__ import annotations

PORT_MAX = 65_535


def parse_addresses(text: str) -> list[tuple[str, int]]:
    """Host and port of each address; an IPv6 address stands in brackets. Raises ValueError for anything else.

    >>> parse_addresses("triton:8001, [::1]:8002")
    [('triton', 8001), ('::1', 8002)]
    """
    return [_parse(address.strip()) for address in text.split(",")]


def _parse(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{address!r} is not host:port")
    valid = host.isprintable() and not any(character in host for character in " /") and port.isascii()
    if not (host and valid and port.isdigit() and 1 <= int(port) <= PORT_MAX):
        raise ValueError(f"{address!r} is not host:port")
    return host, int(port)
