"""Independent parsers of the four message formats, with which `bench.fuzz` compares the codecs' rows."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from cascade.config import CodecName
from cascade.schema import Field


def _parse_json(message: bytes, fields: Iterable[str]) -> dict[str, Any]:
    """The fields as Python's parser reads them; raises ValueError if the outermost object has a key twice."""

    def parse_int(digits: str) -> float:
        return int(digits) if len(digits) < 30 else math.inf

    pairs = json.loads(message.decode(), object_pairs_hook=tuple, parse_int=parse_int)
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    found = dict(pairs)
    return {name: found[name] for name in fields}


def _parse_msgpack(message: bytes, fields: Iterable[str]) -> dict[str, Any]:
    """The fields as msgspec reads them without their types."""
    entries = msgspec.msgpack.Decoder(dict[str, msgspec.Raw]).decode(message)
    return {name: msgspec.msgpack.decode(entries[name]) for name in fields}


def _parse_binary(message: bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The fields according to docs/messages.md; raises ValueError for a wrong head or length."""
    layout: list[list[Any]] = []
    for name, kind in fields.items():
        details: dict[str, Any] = {"string": [kind.max_length], "category": [kind.values], "timestamp": [kind.unit]}
        layout.append([name, kind.type, *details.get(kind.type, ())])
    text = json.dumps(layout, separators=(",", ":"))
    if message[:8] != b"\xca\x01" + hashlib.sha256(text.encode()).digest()[:6]:
        raise ValueError("wrong head")
    position, found = 8, {}
    for name, kind in fields.items():
        size = kind.max_length if kind.type == "string" else 1 if kind.type == "category" else 8
        octets = message[position : position + size]
        position += size
        if kind.type == "string":
            found[name] = octets.rstrip(b"\0").decode()
        elif kind.type == "category":
            found[name] = kind.values[octets[0]]
        else:
            found[name] = struct.unpack("<d" if kind.type == "float64" else "<q", octets)[0]
    if position != len(message):
        raise ValueError("wrong length")
    return found


def _parse_avro(message: bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The fields according to the Avro specification; raises ValueError or IndexError for what it does not allow."""
    if message[:5] != b"\0\0\0\0\1":
        raise ValueError("wrong head")
    position = 5
    found: dict[str, Any] = {}

    def long() -> int:
        nonlocal position
        zigzag, shift = 0, 0
        while True:
            octet = message[position]
            zigzag, shift, position = zigzag | (octet & 0x7F) << shift, shift + 7, position + 1
            if octet < 0x80:
                break
        if zigzag >= 2**64:
            raise ValueError("more than 64 bits")
        return -(zigzag // 2) - 1 if zigzag & 1 else zigzag // 2

    for name, kind in fields.items():
        if kind.type in ("int64", "timestamp"):
            found[name] = long()
            continue
        size = 8 if kind.type == "float64" else long()
        octets = message[position : position + size]
        position += size
        found[name] = struct.unpack("<d", octets)[0] if kind.type == "float64" else octets.decode()
    if position != len(message):
        raise ValueError("wrong length")
    return found


PARSERS: dict[CodecName, Callable[[bytes, Mapping[str, Field]], dict[str, Any]]] = {
    "json": _parse_json,
    "msgpack": _parse_msgpack,
    "binary": _parse_binary,
    "avro": _parse_avro,
}
