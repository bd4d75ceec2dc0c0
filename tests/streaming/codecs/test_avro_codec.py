"""Avro messages against fastavro as the oracle: what is read, what is promoted, what is refused."""

from __future__ import annotations

import io
import math
import random
import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import fastavro
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.errors import BrokerError, SettingError
from cascade.schema import Field
from streaming.codecs import Decoded, RejectReason, codec
from streaming.codecs.avro import AvroCodec
from streaming.codecs.avro_kernels import _is_utf8
from streaming.codecs.avro_schemas import FIELDS_MAX, SCHEMA_BYTES_MAX, schema_text
from streaming.codecs.avro_writers import ABSENT_S, KNOWN_MAX, MISS_S_MIN, MISSES_S_MAX, WINDOW_S, Writers
from tests.streaming.codecs.codec_cases import (
    BYTES_MAX,
    FIELDS,
    TIME_MS,
    Bad,
    any_octets,
    any_row,
    check_as_msgpack,
    check_faults,
    each_position_once,
    reasons,
)

GOOD: dict[str, Any] = {
    "transaction_id": 1, "event_time": TIME_MS, "amount": 12.5, "card_id": "K-1", "channel": "online", "note": ""
}  # fmt: skip
# times as plain numbers, so that the oracle makes no datetime of them
PLAIN = {"transaction_id": "long", "event_time": "long", "amount": "double", "card_id": "string", "channel": "string",
         "note": "string"}  # fmt: skip
OURS, PLAIN_NUMBER = 7, 1


class StoredSchemas:
    """Schemas that a test holds; `asked` counts."""

    def __init__(self, texts: Mapping[int, str] | None = None) -> None:
        self.texts = dict(texts or {})
        self.asked: list[int] = []
        self.down = False

    def text(self, number: int) -> str | None:
        self.asked.append(number)
        if self.down:
            raise BrokerError("the registry is down")
        return self.texts.get(number)

    def register(self, text: str) -> int:
        self.texts[OURS] = text
        return OURS


def record(types: Mapping[str, Any]) -> str:
    fields = [{"name": name, "type": kind} for name, kind in types.items()]
    return msgspec.json.encode({"type": "record", "name": "r", "fields": fields}).decode()


def written(types: Mapping[str, Any], values: Mapping[str, Any], number: int = PLAIN_NUMBER) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(msgspec.json.decode(record(types))), dict(values))
    return b"\0" + number.to_bytes(4, "big") + out.getvalue()


def made(types: Mapping[str, Any] = PLAIN, fields: dict[str, Field] = FIELDS) -> AvroCodec:
    return AvroCodec(fields, BYTES_MAX, StoredSchemas({PLAIN_NUMBER: record(types)}))


def good(**changes: Any) -> bytes:
    return written(PLAIN, GOOD | changes)


def only_reason(decoded: Decoded) -> RejectReason:
    assert decoded.batch.rows == 0
    return decoded.rejects[0].reason


# --- good messages ----------------------------------------------------------------------------------------------------


def test_what_we_write_is_what_fastavro_reads() -> None:
    stored = StoredSchemas()
    codec_ = AvroCodec(FIELDS, BYTES_MAX, stored)
    batch = made().decode([good(), good(card_id="é漢", channel="chip", transaction_id=2**63 - 1)]).batch
    messages = codec_.encode(batch)
    schema = fastavro.parse_schema(msgspec.json.decode(stored.texts[OURS]))
    read = [fastavro.schemaless_reader(io.BytesIO(record[5:]), schema) for record in messages]
    assert read[0] == GOOD | {"event_time": datetime.fromtimestamp(TIME_MS / 1e3, UTC)}
    assert [(record["card_id"], record["channel"], record["transaction_id"]) for record in read] == [
        ("K-1", "online", 1),
        ("é漢", "chip", 2**63 - 1),
    ]
    assert [record[:5] for record in messages] == [b"\0\0\0\0\x07"] * 2
    again = codec_.decode(messages)
    assert again.rejects == []
    assert all(again.batch[name].tolist() == batch[name].tolist() for name in FIELDS)
    assert [again.batch[name].dtype for name in FIELDS] == [field.dtype for field in FIELDS.values()]


def test_a_writer_may_have_more_fields_in_any_order_and_nullable_ones() -> None:
    types: dict[str, Any] = {
        "new_boolean": "boolean", "note": ["null", "string"], "new_fixed": {"type": "fixed", "name": "f", "size": 3},
        "channel": {"type": "enum", "name": "c", "symbols": ["online", "cash", "chip"]},
        "new_enum": {"type": "enum", "name": "e", "symbols": ["A", "B"]}, "new_again": "f",
        "amount": ["double", "null"],
        "new_union": ["null", "f", "int", "string", "double", "bytes", "float", "boolean"],
        "card_id": ["string"], "event_time": {"type": "long", "logicalType": "timestamp-millis"},
        "new_bytes": {"type": "bytes", "logicalType": "decimal", "precision": 9}, "new_null": "null",
        "transaction_id": ["null", "int", "long"], "new_long": ["null", "long"], "new_float": "float",
    }  # fmt: skip
    more = {
        "new_boolean": True, "new_fixed": b"abc", "new_enum": "B", "new_again": b"xyz", "new_bytes": b"\1\2",
        "new_null": None, "new_long": None, "new_float": 1.5, "channel": "chip",
        "event_time": datetime.fromtimestamp(TIME_MS / 1e3, UTC),
    }  # fmt: skip
    unions: list[Any] = [None, b"abc", 5, "text", 1e300, b"\xff", True]
    decoded = made(types).decode([written(types, GOOD | more | {"new_union": union}) for union in unions])
    assert decoded.rejects == []
    assert decoded.batch.rows == len(unions)
    for name, value in (GOOD | {"channel": 0, "card_id": b"K-1", "note": b""}).items():
        assert decoded.batch[name].tolist() == [value] * len(unions)


@pytest.mark.parametrize(("kind", "value"), [("int", -5), ("long", 2**53 + 1), ("float", 0.1), ("double", 0.1)])
def test_numbers_are_promoted(kind: str, value: float) -> None:
    codec_ = made({"n": kind}, {"n": Field(type="float64")})
    expected = np.float32(value) if kind == "float" else float(value)
    assert codec_.decode([written({"n": kind}, {"n": value})]).batch["n"].tolist() == [expected]


@pytest.mark.parametrize("value", [0, -1, 1, 63, 64, -64, -65, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)])
def test_every_length_of_a_number_is_read(value: int) -> None:
    codec_ = made({"n": "long"}, {"n": Field(type="int64")})
    messages = [written({"n": "long"}, {"n": value})]
    assert codec_.decode(messages).batch["n"].tolist() == [value]
    assert codec_.encode(codec_.decode(messages).batch)[0][5:] == messages[0][5:]


def test_the_writers_logical_type_gives_the_unit_of_a_time() -> None:
    fields = {"t": Field(type="timestamp", unit="s")}
    types = [
        "long",
        {"type": "long", "logicalType": "timestamp-millis"},
        {"type": "long", "logicalType": "timestamp-micros"},
    ]
    stored = StoredSchemas({number: record({"t": kind}) for number, kind in enumerate(types)})
    codec_ = AvroCodec(fields, BYTES_MAX, stored)
    wire = [TIME_MS // 1_000, TIME_MS, TIME_MS * 1_000 + 999]
    values = [written({"t": "long"}, {"t": value}, number) for number, value in enumerate(wire)] * 3
    # out of what milliseconds can count, by the one that counts in seconds
    values.insert(4, written({"t": "long"}, {"t": 2**62}, 0))
    decoded = codec_.decode(values)
    assert decoded.batch["t"].tolist() == [TIME_MS] * 9
    assert reasons(decoded) == {4: RejectReason.OUT_OF_LIMITS}


@pytest.mark.parametrize("logical", ["timestamp-nanos", "local-timestamp-millis", "time-micros"])
def test_a_time_in_a_unit_that_is_not_known_is_refused_and_not_read_wrong(logical: str) -> None:
    types = PLAIN | {"event_time": {"type": "long", "logicalType": logical}}
    assert only_reason(made(types).decode([good()])) is RejectReason.TYPE


# --- bad messages -----------------------------------------------------------------------------------------------------

HEAD = b"\0\0\0\0\1"
BODY = good()[5:]
BAD: Bad = [
    (None, RejectReason.EMPTY),
    (b"", RejectReason.EMPTY),
    (good() + bytes(BYTES_MAX), RejectReason.OVERSIZED),
    (b"{}", RejectReason.SYNTAX),
    (HEAD[:4], RejectReason.SYNTAX),
    (b"\1" + good()[1:], RejectReason.SYNTAX),
    (HEAD, RejectReason.SYNTAX),
    (good()[:-1], RejectReason.SYNTAX),
    (good() + b"\0", RejectReason.SYNTAX),
    (good() + good(), RejectReason.SYNTAX),
    (b"\0\0\0\0\2" + BODY, RejectReason.OTHER_SCHEMA),
    (b"\0\xff\xff\xff\xff" + BODY, RejectReason.OTHER_SCHEMA),
    (HEAD + b"\xff" * 9 + b"\2" + BODY[1:], RejectReason.SYNTAX),
    (HEAD + b"\x80" * 30 + BODY[1:], RejectReason.SYNTAX),
    (good().replace(b"\x06K-1", b"\x05K-1"), RejectReason.SYNTAX),
    (good().replace(b"\x06K-1", b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01K-1"), RejectReason.SYNTAX),
    (good().replace(b"\x06K-1", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01K-1"), RejectReason.SYNTAX),
    (good().replace(b"K-1", b"K\xff1"), RejectReason.ENCODING),
    (good().replace(b"K-1", b"\xed\xa0\x80"), RejectReason.ENCODING),
    (good().replace(b"online", b"\xffnline"), RejectReason.ENCODING),
    (good(card_id="K\x001"), RejectReason.OUT_OF_LIMITS),
    (good(card_id="K-1\x00"), RejectReason.OUT_OF_LIMITS),
    (good(card_id="K\n"), RejectReason.OUT_OF_LIMITS),
    (good(card_id="a\u202e"), RejectReason.OUT_OF_LIMITS),
    (good(card_id="123456789"), RejectReason.TOO_LONG),
    (good(card_id="ééééé"), RejectReason.TOO_LONG),
    (good(card_id="x" * 500), RejectReason.TOO_LONG),
    # what lies beyond the length counts too
    (good(card_id="123456789").replace(b"123456789", b"12345678\xff"), RejectReason.ENCODING),
    (good(amount=math.nan), RejectReason.NOT_FINITE),
    (good(amount=-math.inf), RejectReason.NOT_FINITE),
    (good(amount=10_000.01), RejectReason.OUT_OF_LIMITS),
    (good(transaction_id=-1), RejectReason.OUT_OF_LIMITS),
    (good(event_time=-(2**63)), RejectReason.OUT_OF_LIMITS),
    (good(channel="cash"), RejectReason.UNKNOWN_CATEGORY),
    (good(channel=""), RejectReason.UNKNOWN_CATEGORY),
    (good(channel="chip\0"), RejectReason.UNKNOWN_CATEGORY),
    (good(channel="é" * 20), RejectReason.UNKNOWN_CATEGORY),
    (good(amount=math.nan, channel="cash", transaction_id=-1), RejectReason.NOT_FINITE),
]


def test_each_fault_has_its_reason_and_other_rows_are_read() -> None:
    each_position_once(check_faults(made(), lambda number: good(transaction_id=number), BAD), 2 * len(BAD) + 1)


@pytest.mark.parametrize("values", [[], [None], [b"x"], [b"\0\0\0\0\2abc"]])
def test_a_fetch_without_a_row_is_an_empty_batch(values: list[bytes | None]) -> None:
    decoded = made().decode(values)
    each_position_once(decoded, len(values))
    assert decoded.batch.rows == 0


def test_malformed_unions_enums_booleans_and_ints_are_refused() -> None:
    types = {
        "n": ["null", "int"],
        "c": {"type": "enum", "name": "c", "symbols": ["a"]},
        "b": "boolean",
        "f": {"type": "fixed", "name": "x", "size": 2},
    }
    codec_ = made(types, {"n": Field(type="int64"), "c": Field(type="category", values=("a", "b"))})
    bodies = {
        b"\2\4\0\1ab": None, b"\4\4\0\1ab": "n: an unknown branch", b"\1\4\0\1ab": "n: an unknown branch",
        b"\0\0\1ab": "n: null", b"\2\4\2\1ab": "c: an unknown symbol", b"\2\4\1\1ab": "c: an unknown symbol",
        b"\2\4\0\2ab": "b: a boolean", b"\2\4\0\1a": "f: the message ends", b"\0\0\2ab": "b: a boolean",
        b"\2\x80\x80\x80\x80\x10\0\1ab": "n: an integer with more bits", b"\0\0\1abc": "f: more octets",
    }  # fmt: skip
    decoded = codec_.decode([HEAD + body for body in bodies])
    assert decoded.batch["n"].tolist() == [2]
    details = {reject.index: reject.detail for reject in decoded.rejects}
    for place, expected in enumerate(bodies.values()):
        assert (expected is None) == (place not in details)
        assert expected is None or details[place].startswith(expected)
    assert [reject.reason for reject in decoded.rejects if "null" in reject.detail] == [RejectReason.TYPE]


# --- writers' schemas -------------------------------------------------------------------------------------------------

OTHER, MISSING, TYPE = RejectReason.OTHER_SCHEMA, RejectReason.MISSING_FIELD, RejectReason.TYPE
WITHOUT = {name: kind for name, kind in PLAIN.items() if name != "amount"}
REFUSED: list[tuple[str, RejectReason]] = [
    ("", OTHER), ("not JSON", OTHER), ('"string"', OTHER), ("[]", OTHER), ("[" * 100_000, OTHER), ("{}", OTHER),
    ('{"type":"record","name":"r","fields":7}', OTHER), ('{"type":"record","name":"r","fields":[7]}', OTHER),
    (record(WITHOUT), MISSING),
    (record(PLAIN | {"amount": "string"}), TYPE),
    (record(PLAIN | {"amount": "null"}), TYPE),
    (record(PLAIN | {"amount": ["null", "string", "double"]}), TYPE),
    (record(PLAIN | {"amount": {"type": "bytes", "logicalType": "decimal", "precision": 9}}), TYPE),
    (record(PLAIN | {"transaction_id": "double"}), TYPE),
    (record(PLAIN | {"card_id": {"type": "bytes", "logicalType": "decimal", "precision": 9}}), TYPE),
    (record(PLAIN | {"card_id": {"type": "fixed", "name": "f", "size": 8}}), TYPE),
    (record(PLAIN | {"channel": "int"}), TYPE),
    (record(PLAIN | {"event_time": [{"type": "long", "logicalType": "timestamp-millis"}, "long"]}), TYPE),
    (record(PLAIN | {"new": {"type": "array", "items": "null"}}), OTHER),
    (record(PLAIN | {"new": {"type": "map", "values": "long"}}), OTHER),
    (record(PLAIN | {"new": {"type": "record", "name": "s", "fields": []}}), OTHER),
    (record(PLAIN | {"new": "r"}), OTHER),
    (record(PLAIN | {"new": ["null", "r"]}), OTHER),
    (record(PLAIN | {"new": []}), OTHER),
    (record(PLAIN | {"new": ["null"] * 33}), OTHER),
    (record(PLAIN | {"new": [["null"]]}), OTHER),
    (record(PLAIN | {"new": {"type": {"type": {"type": {"type": {"type": "long"}}}}}}), OTHER),
    (record(PLAIN | {"new": {"type": "fixed", "name": "f", "size": -1}}), OTHER),
    (record(PLAIN | {"new": {"type": "fixed", "name": "f", "size": True}}), OTHER),
    (record(PLAIN | {"new": {"type": "enum", "name": "e", "symbols": []}}), OTHER),
    (record(PLAIN | {"new": {"type": "enum", "symbols": ["A"]}}), OTHER),
    (record(PLAIN | {"a b": "long"}), OTHER),
    (record(PLAIN | {"x" * 101: "long"}), OTHER),
    (record(PLAIN | {f"new{number}": "null" for number in range(FIELDS_MAX)}), OTHER),
    (record(PLAIN)[:-2] + ',{"name":"amount","type":"double"}]}', OTHER),
    (record(PLAIN) + " " * SCHEMA_BYTES_MAX, OTHER),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(REFUSED)))
def test_a_schema_that_cannot_be_resolved_rejects_its_messages_and_no_others(place: int) -> None:
    text, reason = REFUSED[place]
    stored = StoredSchemas({2: text, PLAIN_NUMBER: record(PLAIN)})
    codec_ = AvroCodec(FIELDS, BYTES_MAX, stored)
    for _ in range(2):
        decoded = codec_.decode([good(), b"\0\0\0\0\2" + BODY, good()])
        assert reasons(decoded) == {1: reason}
        assert decoded.batch.rows == 2
    assert sorted(stored.asked) == [1, 2], "each schema is asked for once"


def test_a_field_name_that_avro_does_not_have_stops_the_start() -> None:
    with pytest.raises(SettingError, match=r"fields\.card-id: is not a name in Avro"):
        AvroCodec({"card-id": Field(type="int64")}, BYTES_MAX, StoredSchemas())
    with pytest.raises(SettingError, match=r"kafka\.codec = 'avro': has no source of schemas"):
        codec("avro", FIELDS, BYTES_MAX)


# --- a registry that is down, and who asks for what is not there ------------------------------------------------------


def test_where_the_registry_is_down_a_message_is_neither_a_row_nor_a_reject() -> None:
    stored = StoredSchemas({PLAIN_NUMBER: record(PLAIN)})
    codec_ = AvroCodec(FIELDS, BYTES_MAX, stored)
    stored.down = True
    for _ in range(3):
        with pytest.raises(BrokerError, match="the registry is down"):
            codec_.decode([good()])
    stored.down = False
    assert codec_.decode([good()]).rejects == []
    stored.down = True
    assert codec_.decode([good()] * 3).rejects == [], "what is known needs no registry"


def test_numbers_that_no_schema_has_cost_a_bounded_time_and_hide_no_known_schema() -> None:
    now_s, stored = [100.0], StoredSchemas({PLAIN_NUMBER: record(PLAIN)})
    writers = Writers(stored, FIELDS, lambda: now_s[0])
    assert not isinstance(writers.find(PLAIN_NUMBER), tuple)
    for number in range(10, 10_000):
        found = writers.find(number)
        assert isinstance(found, tuple)
        assert found[0] is RejectReason.OTHER_SCHEMA
    asked = len(stored.asked)
    assert asked <= 2 + MISSES_S_MAX / MISS_S_MIN
    assert not isinstance(writers.find(PLAIN_NUMBER), tuple)
    stored.texts[9_000] = record(PLAIN)
    assert isinstance(writers.find(9_000), tuple), "not asked for: too many of late"
    now_s[0] += WINDOW_S
    assert not isinstance(writers.find(9_000), tuple)


def test_a_slow_miss_spends_more_of_the_window() -> None:
    now_s = [100.0]

    class Slow(StoredSchemas):
        def text(self, number: int) -> str | None:
            now_s[0] += 0.4
            return super().text(number)

    stored = Slow()
    writers = Writers(stored, FIELDS, lambda: now_s[0])
    for number in range(100):
        writers.find(number)
    assert len(stored.asked) == 3


def test_a_number_that_was_not_there_is_asked_for_again_after_a_while() -> None:
    now_s, stored = [100.0], StoredSchemas()
    writers = Writers(stored, FIELDS, lambda: now_s[0])
    assert isinstance(writers.find(5), tuple)
    stored.texts[5] = record(PLAIN)
    assert isinstance(writers.find(5), tuple)
    now_s[0] += ABSENT_S
    assert not isinstance(writers.find(5), tuple)


def test_the_caches_are_bounded() -> None:
    now_s = [100.0]
    writers = Writers(StoredSchemas(dict.fromkeys(range(3 * KNOWN_MAX), "{}")), FIELDS, lambda: now_s[0])
    for number in range(3 * KNOWN_MAX):
        now_s[0] += WINDOW_S
        writers.find(number)
        writers.find(10**6 + number)
        assert len(writers._known) <= KNOWN_MAX
        assert len(writers._absent_until_s) <= KNOWN_MAX


# --- properties -------------------------------------------------------------------------------------------------------

channels = st.sampled_from([b"chip", b"online", b"cash", b"", b"\xff", "é".encode()])


def zigzag(value: int) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, {"type": "long"}, value)
    return out.getvalue()


def as_avro(values: dict[str, Any]) -> bytes:
    parts = [
        zigzag(len(value)) + value if isinstance(value, bytes)
        else struct.pack("<d", value) if isinstance(value, float) else zigzag(value)
        for value in (values[name] for name in FIELDS)
    ]  # fmt: skip
    return HEAD + b"".join(parts)


AVRO, WRITER = made(), AvroCodec(FIELDS, BYTES_MAX, StoredSchemas())


@settings(max_examples=300, deadline=None)
@given(found=st.lists(any_row(card_id=any_octets, channel=channels, note=any_octets), max_size=5))
def test_the_same_values_are_read_and_refused_as_in_messagepack(found: list[dict[str, Any]]) -> None:
    decoded = AVRO.decode([as_avro(values) for values in found])
    check_as_msgpack(decoded, found)
    assert AVRO.decode([HEAD + octets[5:] for octets in WRITER.encode(decoded.batch)]).rejects == []


def test_mutated_messages_are_read_as_fastavro_reads_them_or_refused() -> None:
    """What is read is what the oracle reads; what the oracle cannot read is refused."""
    chance = random.Random(3)
    schema = fastavro.parse_schema(msgspec.json.decode(record(PLAIN)))
    values = []
    for _ in range(20_000):
        spoilt = bytearray(BODY)
        for _ in range(chance.randint(0, 2)):
            place = chance.randrange(len(spoilt))
            spoilt[place : place + chance.randint(0, 1)] = chance.randbytes(chance.randint(0, 2))
        values.append(HEAD + bytes(spoilt))
    decoded = made().decode(values)
    assert sorted([*decoded.rows.tolist(), *reasons(decoded)]) == list(range(len(values)))
    assert 1_000 < decoded.batch.rows < 19_000
    for place, index in enumerate(decoded.rows.tolist()):
        body = io.BytesIO(values[index][5:])
        read: Any = fastavro.schemaless_reader(body, schema)
        assert body.read() == b""
        assert read == {
            name: decoded.batch[name][place].decode() if field.type == "string"
            else field.values[decoded.batch[name][place]] if field.type == "category" else decoded.batch[name][place]
            for name, field in FIELDS.items()
        }  # fmt: skip
    malformed = {index for index, reason in reasons(decoded).items() if reason is RejectReason.SYNTAX}
    assert malformed == {index for index, value in enumerate(values) if not well_formed(value[5:])}


def well_formed(body: bytes) -> bool:
    """Whether a body is one of PLAIN to its last octet, its numbers of 64 bits; the oracle is laxer than that."""
    place = 0
    for kind in PLAIN.values():
        if kind == "double":
            place += 8
            continue
        shown, shift = 0, 0
        while True:
            if place >= len(body):
                return False
            shown |= (body[place] & 0x7F) << shift
            shift += 7
            place += 1
            if not body[place - 1] & 0x80:
                break
        if shown >= 2**64 or shift > 70:
            return False
        if kind == "string":
            place += shown // 2
            if shown & 1 or place > len(body):
                return False
    return place == len(body)


@given(st.binary(max_size=12) | st.text(max_size=6).map(str.encode))
@settings(max_examples=500, deadline=None)
def test_utf8_is_what_python_takes_for_it(text: bytes) -> None:
    try:
        text.decode()
        expected = True
    except UnicodeDecodeError:
        expected = False
    assert _is_utf8(np.frombuffer(text + b"\x80", np.uint8), 0, len(text)) == expected


def test_the_readers_schema_is_valid_avro() -> None:
    for unit, logical in (("s", None), ("ms", "timestamp-millis"), ("us", "timestamp-micros")):
        fields = FIELDS | {"event_time": Field(type="timestamp", unit=unit)}
        parsed: Any = fastavro.parse_schema(msgspec.json.decode(schema_text(fields)))
        kind = parsed["fields"][1]["type"]
        assert kind == (logical is None and "long") or kind["logicalType"] == logical
