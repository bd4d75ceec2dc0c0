"""JSON that people can read."""

from __future__ import annotations

import msgspec


def readable(value: object) -> bytes:
    """A struct as indented JSON with a line break at its end, as the bundle's files and the reports have it."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
