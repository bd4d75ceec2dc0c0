"""Seeded hostile messages: valid messages of a schema, mutated as an attacker or a broken producer would.

Each kind of mutation is a function that makes a message from a `Maker`; `KINDS` has the weight of each.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from itertools import accumulate
from random import Random

import msgspec

from cascade.columns import ColumnBatch
from cascade.config import CodecName
from cascade.schema import Field
from streaming.codecs import Codec, codec
from streaming.codecs.avro import HEAD_BYTES as AVRO_HEAD_BYTES
from streaming.codecs.avro_schemas import schema_text
from streaming.codecs.binary import HEAD_BYTES as BINARY_HEAD_BYTES

Message = bytes | None
# Codecs whose messages are a head and the values of the fields in order, without their names.
HEADS: dict[CodecName, int] = {"binary": BINARY_HEAD_BYTES, "avro": AVRO_HEAD_BYTES}

INT_EXTREMES = (
    0, -1, 1, 127, 128, 255, 256, 2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**53 - 1, 2**53 + 1, 2**63 - 1, -(2**63),
    2**63, 2**64 - 1, 946_684_800_000, 946_684_799_999, 4_102_444_800_000, 4_102_444_800_001, 253_402_300_800_000,
)  # fmt: skip
FLOAT_EXTREMES = (
    -0.0, 5e-324, -5e-324, 2.2250738585072014e-308, 1e-7, 0.1 + 0.2, 100_000.0, 100_000.00000000001, 1e16, 1e22, 1e23,
    1.7976931348623157e308, -1.7976931348623157e308,
)  # fmt: skip
TEXT_EXTREMES = (
    "", " ", "chip", "CHIP", "chip ", "online\u200b", "\u202echip", "\ufeffchip", "ch\u0131p", "a\u0300" * 30,
    "\U0001f4b3", "\x7f", "x" * 23, "x" * 24, "x" * 25, "é" * 12, "é" * 13, "x" * 1_000, "NaN", "null", "1", "\u2028",
    "'; --", "${x}", "\U000e0001", "\u3164", "4000123412341234",
)  # fmt: skip
OTHER_TYPES: tuple[object, ...] = (None, True, False, [], {}, [1], {"a": 1}, "1", 1, 1.5, [[]], {"": {"": ""}})

# Encoded values that an encoder does not make: numbers beyond a double or a 64-bit integer, octets that are not UTF-8.
RAW_VALUES: dict[CodecName, tuple[bytes, ...]] = {
    "json": (
        b"1e999", b"-1e999", b"1e-999", b"-0", b"-0.0", b"0.0e0", b"00", b"+1", b".5", b"5.", b"1e", b"0x10", b"NaN",
        b"nan", b"Infinity", b"-Infinity", b"1_000", b"9" * 25, b"9" * 400, b"0." + b"0" * 400 + b"1",
        b"1" * 400 + b"e-400", b"1e+0000000000000000001", b"1E3", b'"\\ud800"', b'"\\udc00\\ud800"',
        b'"\\ud83d\\udcb3"', b'"\\u0000"', b'"\\u202e"', b'"\\x41"', b'"\\"', b'"\x00"', b'"\xff"', b'"\xc0\xaf"',
        b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b'"\xe2\x82"', b"'chip'", b"tru", b"truee", b"nulll", b"undefined",
        b"//", b"/**/1", b"1,", b"[1,]", b'{"a":}', b'{a:1}', b"", b" ", b"\xef\xbb\xbf1", b"\t\r\n 1 \n",
        b'{"amount":1,"amount":2}', b'"\xe2\x80\xae"',
    ),
    "msgpack": (
        b"\xd3" + bytes(8), b"\xcf" + bytes(7) + b"\x07", b"\xcd\x00\x01", b"\xd2\xff\xff\xff\xff",
        b"\xcf" + b"\xff" * 8, b"\xca\x7f\xc0\x00\x00", b"\xca\x7f\x80\x00\x00", b"\xca\xff\x80\x00\x00",
        b"\xcb\x7f\xf0" + bytes(6), b"\xcb\xff\xf8" + bytes(6), b"\xcb\x7f\xf0" + bytes(5) + b"\x01",
        b"\xcb" + bytes(7) + b"\x01", b"\xd9\x04chip", b"\xda\x00\x04chip", b"\xdb\x00\x00\x00\x04chip",
        b"\xc4\x04chip", b"\xc7\x04\x05chip", b"\xd4\x05x", b"\xd6\xff\xff\xff\xff\xff", b"\xd7\xff" + b"\xff" * 8,
        b"\xc7\x0c\xff" + b"\xff" * 12, b"\xc1", b"\xa1\xff", b"\xa2\xc0\xaf", b"\xa3\xed\xa0\x80",
        b"\xdb\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
        b"\xc9\x7f\xff\xff\xff\x01", b"\xdc\x00\x00", b"\xde\x00\x00", b"\x81\x81\x01\x01\x01",
        b"\x82\xa1a\x01\xa1a\x02", b"",
    ),
    "binary": (
        b"\xff" * 8, bytes(7) + b"\x80", bytes(6) + b"\xf0\x7f", bytes(6) + b"\xf0\xff",
        b"\x01" + bytes(5) + b"\xf8\x7f", b"\xff" * 24, b"a\x00b", b"\x00a", b"\xc0\xaf", b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80", b"x" * 23 + b"\xc3", b"",
    ),
    "avro": (
        b"\xff" * 9 + b"\x01", b"\xff" * 9 + b"\x02", b"\xff" * 10, b"\x80" * 40, b"\x80\x00", b"\x81\x80\x80\x00",
        b"\xfe\xff\xff\xff\x0f", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01chip", b"\x02\xff", b"\x04\xc0\xaf",
        b"\x06\xed\xa0\x80", b"\x08\xf4\x90\x80\x80", b"\x06a\x00b", b"\x04\x00a", bytes(6) + b"\xf0\x7f", b"",
    ),
}  # fmt: skip
RAW_KEYS: dict[CodecName, tuple[bytes, ...]] = {
    "json": (
        b'"am\\u006funt"', b'"\\u0061mount"', b'"amount\\u0000"', b'"amount "', b'"Amount"', b'""', b'"\\u003a"',
        b'":"', b'"\xff"', b'"\\ud800"', b"amount", b"1", b"null", b'"\xef\xbb\xbfamount"', b'"amoun\xd1\x82"',
        b'"a\\/b"', b'"\\\\"',
    ),
    "msgpack": (
        b"\xd9\x06amount", b"\xda\x00\x06amount", b"\xdb\x00\x00\x00\x06amount", b"\xc4\x06amount", b"\xa6Amount",
        b"\xa0", b"\xa1\xff", b"\x01", b"\xc0", b"\x90", b"\x80", b"\xcb" + bytes(8), b"\xd4\x05x",
        b"\xdb\xff\xff\xff\xff",
    ),
    # without keys: octets between two values
    "binary": (b"\x00", b"\xff", bytes(8), b"\xca\x01"),
    "avro": (b"\x00", b"\xff", b"\x80", bytes(5)),
}  # fmt: skip
# Complete messages of the kind that have broken parsers.
CORPUS: dict[CodecName, tuple[Message, ...]] = {
    "json": (
        None, b"", b" ", b"\x00", b"{", b"}", b"[", b"{}", b"[]", b"[{}]", b"{}{}", b"null", b"true", b"0", b'""', b'"',
        b"{:}", b'{"":', b'{"a"}', b"{,}", b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"\xfe\xff\x00{\x00}",
        b"[" * 60_000, b'{"a":' * 10_000, b"[" * 30_000 + b"]" * 30_000, b'{"x":' + b"9" * 60_000 + b"}",
        b'"' + b"\\" * 60_001 + b'"', b"-" * 60_000, b"\x80" * 100, b"/*" * 100, b" " * 60_000,
        b'{"x":"' + b"\\ud800" * 100 + b'"}', b"<?xml version='1.0'?><a/>", b"a=1&b=2", b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00\x00\x00\x01\x02", b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    ),
    "msgpack": (
        None, b"", b"\x00", b"\x80", b"\x90", b"\xc0", b"\xc1", b"\x81", b"\x81\xa1a", b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xde\xff\xff", b"\xde\x00", b"\xdf", b"\x91" * 60_000,
        b"\x81\xa1a" * 15_000, b"\x81" * 60_000, b"\x9f" * 60_000, b"\xc9\xff\xff\xff\xff\xff", b"\xd9", b"\xc7\xff",
        b"{}", b'{"amount":1}', b"\x81\xc0\xc0", b"\x8f" + b"\xa0\xc0" * 15, b"\xd6\xff\xff\xff\xff\xff",
        b"\x00\x00\x00\x00\x01\x02", b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    ),
    "binary": (
        None, b"", b"\x00", b"\xca", b"\xca\x01", b"\xca\x02" + bytes(47), b"\xca\x01" + bytes(47), b"\xca" * 49,
        bytes(49), bytes(60_000), b"{}", b'{"amount":1}', b"\x00\x00\x00\x00\x01\x02",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    ),
    "avro": (
        None, b"", b"\x00", b"\x00\x00\x00\x00\x01", b"\x00\x00\x00\x00\x02\x02", b"\x00\x7f\xff\xff\xff\x02",
        b"\x00\xff\xff\xff\xff\x02", b"\x00\x80\x00\x00\x00", b"\x00\x00\x00\x00\x01" + b"\x80" * 60_000, bytes(60_000),
        b"\x00\x00\x00\x00\x01" + b"\xff" * 60_000, b"Obj\x01\x04", b"\xc3\x01" + bytes(20), b"{}", b'{"amount":1}',
    ),
}  # fmt: skip


class SingleSchemaRegistry:
    """A schema registry with a single schema, of id 1."""

    def __init__(self, fields: dict[str, Field]) -> None:
        self._text = schema_text(fields)

    def text(self, number: int) -> str | None:
        """The schema with this id, None if there is none."""
        return self._text if number == 1 else None

    def register(self, text: str) -> int:
        """The id of the schema, which is registered already."""
        del text
        return 1


def codec_with_registry(name: CodecName, fields: dict[str, Field], message_bytes_max: int) -> Codec:
    """A codec, with a schema registry of its own if it is Avro."""
    return codec(name, fields, message_bytes_max, SingleSchemaRegistry(fields) if name == "avro" else None)


class Maker:
    """Makes hostile messages from valid ones; the same seed of `chance` gives the same messages.

    name: of the codec.
    batch: valid rows of `fields`.
    message_bytes_max: the limit of the codec; longer messages are oversized.

    `valid`: the encoded rows. `rows`: their encoded values, in the order of the fields. `keys`: encoded field names.
    `extremes`, `other_keys`: encoded values and keys that mutations insert. `tokens`: octets that they insert anywhere.
    """

    def __init__(
        self, name: CodecName, fields: dict[str, Field], batch: ColumnBatch, message_bytes_max: int, chance: Random
    ) -> None:
        self.name = name
        self.chance = chance
        self.valid = codec_with_registry(name, fields, message_bytes_max).encode(batch)
        self.bytes_max = message_bytes_max
        self.encode: Callable[[object], bytes] = VALUE_ENCODERS[name]
        if name in HEADS:
            self.head = self.valid[0][: HEADS[name]]
            self.keys = [b""] * len(fields)
            columns = [
                [
                    message[HEADS[name] :]
                    for message in codec_with_registry(name, {field: kind}, message_bytes_max).encode(batch)
                ]
                for field, kind in fields.items()
            ]
            self.rows = [list(row) for row in zip(*columns, strict=True)]
        else:
            library = msgspec.json if name == "json" else msgspec.msgpack
            self.keys = [self.encode(field) for field in fields]
            decoded = [library.decode(message) for message in self.valid]
            self.rows = [[self.encode(value) for value in row.values()] for row in decoded]
        self.extremes = [*RAW_VALUES[name], *map(self.encode, (*INT_EXTREMES, *FLOAT_EXTREMES, *TEXT_EXTREMES))]
        self.extremes += [self.encode(value) for value in OTHER_TYPES]
        if name != "json":
            self.extremes += [self.encode(value) for value in (math.nan, math.inf, -math.inf)]
        self.other_keys = [*RAW_KEYS[name], *map(self.encode, ("new", "a:b", "x" * 300, "é"))]
        self.tokens = [*self.extremes, *self.other_keys, *self.keys, *(bytes([octet]) for octet in b'{}[],:"\\\0')]
        self._kinds = list(KINDS)
        self._bounds = list(accumulate(KINDS.values()))

    def message(self) -> Message:
        """A message of a kind drawn by weight."""
        return self.messages(1)[0]

    def messages(self, count: int) -> list[Message]:
        """`count` messages of kinds drawn by weight."""
        return [kind(self) for kind in self.chance.choices(self._kinds, cum_weights=self._bounds, k=count)]

    def below(self, count: int) -> int:
        """A random number from 0 to `count` - 1."""
        return int(self.chance.random() * count)

    def choice(self, choices: Sequence[bytes]) -> bytes:
        """A random element."""
        return choices[self.below(len(choices))]

    def valid_message(self) -> bytes:
        """A valid message."""
        return self.choice(self.valid)

    def entries(self) -> list[list[bytes]]:
        """Encoded keys and values of a valid message."""
        row = self.rows[self.below(len(self.rows))]
        return [[key, value] for key, value in zip(self.keys, row, strict=True)]

    def join(self, entries: Sequence[Sequence[bytes]]) -> bytes:
        """The message with these encoded keys and values."""
        if self.name == "json":
            return b"{" + b",".join([key + b":" + value for key, value in entries]) + b"}"
        if self.name in HEADS:
            return self.head + b"".join([key + value for key, value in entries])
        count = len(entries)
        header = bytes([0x80 | count]) if count < 16 else b"\xde" + count.to_bytes(2, "big")
        return header + b"".join([key + value for key, value in entries])

    def instead_of(self, old: bytes, new: bytes) -> bytes:
        """A new value in the place of an old one, cut or padded to its size if the codec has fixed sizes."""
        return new[: len(old)].ljust(len(old), b"\0") if self.name == "binary" else new

    def nested(self, depth: int) -> bytes:
        """A value of nested containers, not always closed; other octets for codecs without containers."""
        if self.name in HEADS:
            return b"\x02" * depth
        if self.name == "msgpack":
            return self.choice((b"\x91", b"\x81\xa1a")) * depth + b"\xc0"
        if self.chance.random() < 0.5:
            return b"[" * depth + b"]" * (depth - (self.chance.random() < 0.1))
        return b'{"a":' * depth + b"1" + b"}" * depth


def _encode_binary(value: object) -> bytes:
    """Eight octets of a number, or the octets of a text; nothing of other types."""
    if isinstance(value, int):
        return (value & 2**64 - 1).to_bytes(8, "little")
    if isinstance(value, float):
        return struct.pack("<d", value)
    return value.encode() if isinstance(value, str) else b""


def _encode_avro(value: object) -> bytes:
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, str):
        return _encode_avro(len(value.encode())) + value.encode()
    if not isinstance(value, int):
        return b"\0"
    zigzag, octets = (value << 1 if value >= 0 else -2 * value - 1), b""
    while zigzag > 0x7F:
        octets += bytes([zigzag & 0x7F | 0x80])
        zigzag >>= 7
    return octets + bytes([zigzag])


VALUE_ENCODERS: dict[CodecName, Callable[[object], bytes]] = {
    "json": msgspec.json.Encoder().encode,
    "msgpack": msgspec.msgpack.Encoder().encode,
    "binary": _encode_binary,
    "avro": _encode_avro,
}


def _untouched(make: Maker) -> Message:
    return make.valid_message()


def _bits_flipped(make: Maker) -> Message:
    octets = bytearray(make.valid_message())
    for _ in range(1 + make.below(4)):
        octets[make.below(len(octets))] ^= 1 << make.below(8)
    return bytes(octets)


def _cut_short(make: Maker) -> Message:
    message = make.valid_message()
    return message[: make.below(len(message))]


def _piece_moved(make: Maker) -> Message:
    """A piece is omitted, or copied to another position."""
    message = make.valid_message()
    low, high = sorted((make.below(len(message)), make.below(len(message))))
    position = make.below(len(message))
    if position & 1:
        return message[:low] + message[high:]
    return message[:position] + message[low:high] + message[position:]


def _two_spliced(make: Maker) -> Message:
    first, second = make.valid_message(), make.valid_message()
    return first[: make.below(len(first))] + second[make.below(len(second)) :]


def _two_concatenated(make: Maker) -> Message:
    return make.valid_message() + make.choice((b"", b",", b"\n", b"\x00", b" ")) + make.valid_message()


def _token_inserted(make: Maker) -> Message:
    message = make.valid_message()
    position = make.below(len(message))
    token = make.choice(make.tokens)
    return message[:position] + token + message[position + (len(token) if make.chance.random() < 0.5 else 0) :]


def _value_extreme(make: Maker) -> Message:
    entries = make.entries()
    entry = entries[make.below(len(entries))]
    entry[1] = make.instead_of(entry[1], make.choice(make.extremes))
    return make.join(entries)


def _values_swapped(make: Maker) -> Message:
    entries = make.entries()
    first, second = make.below(len(entries)), make.below(len(entries))
    entries[first][1], entries[second][1] = entries[second][1], entries[first][1]
    return make.join(entries)


def _key_repeated(make: Maker) -> Message:
    entries = make.entries()
    key = entries[make.below(len(entries))][0]
    value = make.choice(make.extremes) if make.chance.random() < 0.5 else entries[make.below(len(entries))][1]
    entries.insert(make.below(len(entries) + 1), [key, value])
    return make.join(entries)


def _key_removed(make: Maker) -> Message:
    entries = make.entries()
    del entries[make.below(len(entries))]
    return make.join(entries)


def _key_renamed(make: Maker) -> Message:
    entries = make.entries()
    entries[make.below(len(entries))][0] = make.choice(make.other_keys)
    return make.join(entries)


def _fields_added(make: Maker) -> Message:
    """Unknown fields, with all fields in random order. The codec accepts such a message if the values are readable."""
    entries = make.entries()
    for _ in range(1 + make.below(4)):
        entries.append([make.choice(make.other_keys), make.choice(make.extremes)])
    make.chance.shuffle(entries)
    return make.join(entries)


def _nested(make: Maker) -> Message:
    entries = make.entries()
    junk = make.nested(1 + make.below(70))
    if make.chance.random() < 0.7:
        entries.append([make.choice(make.other_keys), junk])
    else:
        entries[make.below(len(entries))][1] = junk
    return make.join(entries)


def _random_octets(make: Maker) -> Message:
    return make.chance.randbytes(make.below(200))


def _of_the_corpus(make: Maker) -> Message:
    corpus = CORPUS[make.name]
    return corpus[make.below(len(corpus))]


def _oversized(make: Maker) -> Message:
    entries = make.entries()
    entries.append([make.other_keys[-1], make.encode("x" * (make.bytes_max + make.below(3) - 1))])
    return make.join(entries)


def costliest(make: Maker) -> bytes:
    """A message of nearly the longest length, of what is costliest to read: many keys, containers, escapes, digits.

    For codecs without keys: texts that are not ASCII.
    """
    entries, room = make.entries(), make.bytes_max - 1_000
    if make.name in HEADS:
        text = "é" * (room // 2 if make.below(2) else 12)
        position = make.below(len(entries))
        entries[position][1] = make.instead_of(entries[position][1], make.encode(text))
        return make.join(entries)
    kind, new = make.below(7), make.encode("new")
    if kind == 0:
        entries += [[make.encode(f"k{number}"), make.encode(number)] for number in range(room // 14)]
    elif kind == 1:
        entries.append([new, make.encode([[]] * (room // 3))])
    elif kind == 2:
        entries += [[new, make.encode(['"\\'] * (room // 8))], [make.encode("more"), make.encode([[]] * 40)]]
    elif kind == 3:
        entries += [[new, make.encode("\\{[:" * (room // 8))], [make.encode("more"), make.nested(33)]]
    elif kind == 4:
        entries += [[new, make.nested(room // 12)]]
    elif kind == 5:
        entries[make.below(len(entries))][1] = b"9" * room
    else:
        entries += [[new, make.encode([1] * (room // 2))], [make.encode("more"), make.encode([[]] * 40)]]
    return make.join(entries)


Kind = Callable[[Maker], Message]
# The weight of each kind. The costliest messages are rare here; they have batches of their own (see bench.fuzz).
KINDS: dict[Kind, float] = {
    _untouched: 12,
    _bits_flipped: 14,
    _cut_short: 5,
    _piece_moved: 8,
    _two_spliced: 8,
    _two_concatenated: 2,
    _token_inserted: 10,
    _value_extreme: 10,
    _values_swapped: 4,
    _key_repeated: 5,
    _key_removed: 2,
    _key_renamed: 3,
    _fields_added: 5,
    _nested: 3,
    _random_octets: 4,
    _of_the_corpus: 3,
    _oversized: 0.2,
    costliest: 0.02,
}
