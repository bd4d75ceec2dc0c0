"""MessagePack messages: a map for each transaction, fields by name."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import msgspec

from cascade.schema import Field
from streaming.codecs.messages import NESTING_MAX, MessageCodec

# First octets of arrays and maps: fixmap, fixarray, array 16 and 32, map 16 and 32.
_CONTAINERS = bytes([*range(0x80, 0xA0), *range(0xDC, 0xE0)])
_MAPS = frozenset([*range(0x80, 0x90), 0xDE, 0xDF])


class MsgpackCodec(MessageCodec):
    """Codec for MessagePack (github.com/msgpack/msgpack, spec of 2017).

    >>> codec = MsgpackCodec({"card_id": Field(type="string", max_length=8)}, 1024)
    >>> codec.decode([msgspec.msgpack.encode({"card_id": "K-1"})]).batch["card_id"].tolist()
    [b'K-1']
    """

    name = "msgpack"
    decisions = "msgpack"

    def __init__(self, fields: dict[str, Field], message_bytes_max: int) -> None:
        super().__init__(msgspec.msgpack, fields, message_bytes_max)
        count = len(fields)
        # the shortest header of a map with this many entries; longer headers are read the slow way
        self._header = bytes([0x80 | count]) if count < 16 else b"\xde" + count.to_bytes(2, "big")
        self._begin = itemgetter(slice(len(self._header)))

    def _have_more(self, values: Sequence[bytes]) -> bool:
        return set(map(self._begin, values)) != {self._header}

    def _shape(self, value: bytes, entries: dict[str, msgspec.Raw]) -> tuple[int, int]:
        # an upper bound: the number of octets that can begin a container
        nesting = len(value) - len(value.translate(None, _CONTAINERS)) - 1
        return _entries(value), nesting if nesting <= NESTING_MAX else _nesting(value)


def _entries(value: bytes) -> int:
    """The number of entries that the header of a map announces."""
    return value[0] & 0x0F if value[0] < 0x90 else int.from_bytes(value[1 : 1 + _length_octets(value[0])], "big")


def _length_octets(first: int) -> int:
    """The number of octets after the first that encode a length; 0 if the first octet implies it, or there is none."""
    if 0xC4 <= first <= 0xC9:  # bin, ext
        return (1, 2, 4)[(first - 0xC4) % 3]
    if 0xD9 <= first <= 0xDB:  # str
        return (1, 2, 4)[first - 0xD9]
    return (2, 4)[first & 1] if first >= 0xDC and first <= 0xDF else 0  # array, map


def _fixed_octets(first: int) -> int:
    """The octets of a value whose length is implied by the first octet; 0 for other values."""
    if 0xA0 <= first <= 0xBF:  # fixstr
        return 1 + (first & 0x1F)
    if 0xCA <= first <= 0xD3:  # float 32 and 64, uint and int of 8 to 64 bits
        return 1 + (4, 8, 1, 2, 4, 8, 1, 2, 4, 8)[first - 0xCA]
    if 0xD4 <= first <= 0xD8:  # fixext
        return 2 + (1 << (first - 0xD4))
    return 0 if first in _CONTAINERS or _length_octets(first) else 1


_FIXED = bytes(map(_fixed_octets, range(256)))
_LENGTHS = bytes(map(_length_octets, range(256)))


def _nesting(value: bytes) -> int:
    """The nesting depth of the values of a well-formed map, at most a little more than NESTING_MAX.

    Takes at most a quarter of a microsecond for each octet, which is about the cost of an ordinary message.
    """
    position, deepest = 0, 0
    left = [1]  # values still to come, by level
    while left:
        if not left[-1]:
            left.pop()
            continue
        left[-1] -= 1
        first = value[position]
        if _FIXED[first]:
            position += _FIXED[first]
            continue
        start = position + 1 + _LENGTHS[first]
        length = int.from_bytes(value[position + 1 : start], "big") if _LENGTHS[first] else first & 0x0F
        position = start
        if first in _CONTAINERS:
            left.append(2 * length if first in _MAPS else length)
            deepest = max(deepest, len(left) - 2)
            if deepest > NESTING_MAX:
                break
        else:
            position += length + (0xC7 <= first <= 0xC9)  # an ext has its type before its octets
    return deepest
