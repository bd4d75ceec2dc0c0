"""JSON: the kernel and msgspec read the same values, and reject the same messages for the same reasons."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.fuzz import Target, make_batch, make_targets
from cascade.columns import ByteColumn, ColumnBatch
from cascade.schema import Field
from streaming.codecs import Decoded, codec
from streaming.codecs.json import JsonCodec
from streaming.codecs.json_columns import PlainReader, can_be_plain
from streaming.codecs.messages import MessageCodec

BYTES_MAX = 400
DAY = datetime(2018, 1, 1, tzinfo=UTC)
FIELDS = {
    "id": Field(type="int64", minimum=-(10**15), maximum=10**15),
    "paid at": Field(type="timestamp", unit="us", minimum=DAY, maximum=datetime(2030, 1, 1, tzinfo=UTC)),
    "since_s": Field(type="timestamp", unit="s"),
    "sent_ms": Field(type="timestamp", unit="ms"),
    "amount": Field(type="float64", minimum=-1e9, maximum=10_000),
    "free": Field(type="float64"),
    "card": Field(type="string", max_length=8),
    "way": Field(type="category", values=("chip", "chi", "con tact", 'q"t', "b\\s", "é", "chip2")),
    "c:d": Field(type="string", max_length=3),
}
GOOD: dict[str, Any] = {
    "id": 7, "paid at": 1_530_000_000_000_001, "since_s": 1_530_000_000, "sent_ms": 0, "amount": 12.5, "free": -0.1,
    "card": "K-1", "way": "chip", "c:d": "",
}  # fmt: skip
PLAIN = msgspec.json.encode(GOOD)


def made(fields: dict[str, Field] = FIELDS, bytes_max: int = BYTES_MAX) -> JsonCodec:
    return JsonCodec(fields, bytes_max)


def doubts(values: Sequence[bytes | None], fields: dict[str, Field] = FIELDS) -> list[bool]:
    _, doubtful, count = PlainReader(fields, BYTES_MAX).read(ByteColumn.of(values))
    assert count == doubtful.sum()
    found: list[bool] = doubtful.tolist()
    return found


def check_same(found: Decoded, expected: Decoded) -> None:
    assert found.rejects == expected.rejects
    assert found.rows.tolist() == expected.rows.tolist()
    assert found.batch.rows == expected.batch.rows
    assert list(found.batch.columns) == list(expected.batch.columns)
    for name, column in expected.batch.columns.items():
        assert found.batch[name].dtype == column.dtype
        assert found.batch[name].tobytes() == column.tobytes()


def check_as_msgspec(codec_: JsonCodec, values: Sequence[bytes | None]) -> Decoded:
    expected = MessageCodec.decode(codec_, values)
    check_same(codec_.decode(values), expected)
    check_same(codec_.decode(ByteColumn.of(values)), expected)
    return expected


# --- generated messages -----------------------------------------------------------------------------------------------

_digits = st.integers(0, 10**20).map(str) | st.integers(0, 999).map(str) | st.from_regex(r"\A[0-9]{1,19}\Z")
_number = (
    st.tuples(
        st.sampled_from(["", "", "", "-", "+", "--"]),
        _digits,
        st.sampled_from(["", "", "."]),
        st.just("") | st.from_regex(r"\A[0-9]{0,25}\Z"),
        st.sampled_from(["", "", "", "", "e0", "E+5", "e-300", "e400", "e", "x"]),
    ).map("".join)
    | st.floats(allow_nan=False, allow_infinity=False).map(repr)
    | st.integers(-(2**66), 2**66).map(str)
    | st.sampled_from(["-0", "-0.0", "0.0", "0", "00", "9007199254740992", "9007199254740993", "0.000000000000000001"])
    | st.integers(-(2**63) - 1, 2**63).map(str)
)
_odd_text = st.text(st.sampled_from('aB-9 ~"\\\x00\x1f\x7f\x80é\u202e漢{}[],:'), max_size=10)
_text = st.builds(lambda text, ascii_: json.dumps(text, ensure_ascii=ascii_), _odd_text, st.booleans())
_raw_text = _odd_text.map(lambda text: f'"{text}"')
_word = st.sampled_from([json.dumps(word, ensure_ascii=False) for word in (*FIELDS["way"].values, "cash", "", "chip ")])
_other = st.sampled_from(["null", "true", "false", "[]", "{}", "[1]", '{"id":1}', "NaN", "Infinity", "", '"'])
_plain_of = {name: json.dumps(value) for name, value in GOOD.items()}


def _entries(draw: st.DrawFn) -> list[tuple[str, str]]:
    entries = []
    for name, field in FIELDS.items():
        odd = _number if field.type in ("int64", "float64", "timestamp") else _word if name == "way" else _text
        value = draw(st.just(_plain_of[name]) | odd | odd | _raw_text | _other) if draw(st.booleans()) else None
        entries.append((json.dumps(name), _plain_of[name] if value is None else value))
    return draw(st.permutations(entries)) if draw(st.booleans()) else entries


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A message with some odd values, in any order, perhaps with too few or too many keys."""
    entries = _entries(draw)
    if draw(st.integers(0, 5)) == 0:
        entries.pop(draw(st.integers(0, len(entries) - 1)))
    change = draw(st.sampled_from(["", "", "", "", "repeat", "new", "escaped"]))
    if change:
        extra = {
            "repeat": draw(st.sampled_from(entries)), "new": ('"new"', draw(_number)), "escaped": ('"\\u0069d"', "1"),
        }[change]  # fmt: skip
        entries.insert(draw(st.integers(0, len(entries))), extra)
    comma, colon = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,", ":"), (",\n", ":\t"), (",  ", " : ")]))
    begin, end = draw(
        st.sampled_from([("{", "}")] * 6 + [("{ ", " }"), (" {", "}\n"), ("{", "},"), ("[", "]"), ("", "")])
    )
    text = begin + comma.join(name + colon + value for name, value in entries) + end
    return text.encode("utf-8", "surrogatepass")


@st.composite
def mutated(draw: st.DrawFn) -> bytes | None:
    """A plain message with an octet changed, removed or added; or cut, doubled, empty or absent."""
    style = draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    octets = bytearray(json.dumps(GOOD, separators=style).encode())
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(octets) - 1))
        kind = draw(st.sampled_from(["set", "delete", "insert", "cut"]))
        octet = draw(st.integers(0, 255) | st.sampled_from(b'{}[]",:.-+eE0 9\\'))
        if kind == "set":
            octets[place] = octet
        elif kind == "insert":
            octets.insert(place, octet)
        elif len(octets) > 2:
            del octets[place : place + 1 if kind == "delete" else None]
        if not octets:
            break
    return draw(
        st.sampled_from([bytes(octets)] * 12 + [bytes(octets) * 2, bytes(octets) + b" " * BYTES_MAX, b"", None])
    )


@settings(deadline=None, max_examples=400)
@given(st.lists(messages() | mutated() | st.just(PLAIN), min_size=1, max_size=6))
def test_any_messages_are_read_as_msgspec_reads_them(values: list[bytes | None]) -> None:
    check_as_msgspec(made(), values)


@settings(deadline=None, max_examples=300)
@given(st.floats(-1e9, 1e4, allow_nan=False) | st.decimals(-1_000, 10_000, places=2).map(float), st.booleans())
def test_numbers_are_the_nearest_doubles(number: float, fixed: bool) -> None:
    text = f"{number:.6f}" if fixed else repr(number)
    message = PLAIN.replace(b"12.5", text.encode())
    decoded = check_as_msgspec(made(), [message])
    assert decoded.batch["amount"].tolist() == ([float(text)] if float(text) >= -1e9 else [])


@pytest.fixture(scope="module")
def targets() -> list[Target]:
    return [target for target in make_targets() if target.name == "json"]


@pytest.mark.parametrize("number", range(1, 7))
def test_hostile_messages_are_read_as_msgspec_reads_them(targets: list[Target], number: int) -> None:
    for target in targets:
        assert isinstance(target.codec, JsonCodec)
        check_as_msgspec(target.codec, make_batch(target, 11, number))


# --- what is plain, and what is not -----------------------------------------------------------------------------------


def test_usual_messages_are_plain_in_any_order() -> None:
    names = list(GOOD)
    values = [PLAIN, json.dumps(GOOD).encode()]
    for seed in range(30):
        random.Random(seed).shuffle(names)
        values.append(msgspec.json.encode({name: GOOD[name] for name in names}))
    assert not any(doubts(values))
    decoded = check_as_msgspec(made(), values)
    assert decoded.batch.rows == len(values)


def test_amounts_of_any_size_with_two_decimals_are_plain() -> None:
    values = [PLAIN.replace(b"12.5", b"%.2f" % (10.0**power / 3)) for power in range(-2, 5)]
    assert not any(doubts(values))
    assert made().decode(values).batch["amount"].tolist() == [
        float("%.2f" % (10.0**power / 3)) for power in range(-2, 5)
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"id":7', b'"id":07'), (b'"id":7', b'"id":-0'), (b'"id":7', b'"id":7.0'), (b'"id":7', b'"id":7e0'),
        (b'"id":7', b'"id":1234567890123456789'), (b'"id":7', b'"id":'), (b'"id":7', b'"id":-'),
        (b'"id":7', b'"id":+7'), (b'"since_s"', b'"sent_ms"'), (b'"since_s":1530000000', b'"id":7'),
        (b'"sent_ms":0', b'"sent_ms":18446744073709551617'), (b'"sent_ms":0', b'"sent_ms":-9223372036854775809'),
        (b'"id":7', b'"id":true'), (b'"id":7', b'"id":null'), (b'"id":7', b'"id":"7"'), (b'"id":7', b'"id":[7]'),
        (b'"id":7', b'"id":  7'), (b'"id":7', b'"id" :7'), (b'"id":7', b'"id":7 '), (b'"id":7', b'"ix":7'),
        (b'"id":7', b'"id":7,"id":7'), (b'"id":7', b'"id":7,"new":7'), (b'"id":7,', b""), (b'"id"', b'"\\u0069d"'),
        (b'"id":7', b'"id":-1000000000000001'), (b'"id":7', b'"id":1000000000000001'),
        (b":1530000000,", b":1530000000000000,"), (b"1530000000000001", b"1"), (b"12.5", b"1e1"), (b"12.5", b".5"),
        (b"12.5", b"12."), (b"12.5", b"012.5"), (b"12.5", b"-0.0"), (b"12.5", b"9007199254740992"),
        (b"12.5", b"12.5000000000000000000"), (b"12.5", b"10000.01"), (b"12.5", b"NaN"), (b"12.5", b"-"),
        (b"K-1", b"K\\u002d1"), (b"K-1", "é".encode()), (b"K-1", b"K\x7f1"), (b"K-1", b"K\n1"),
        (b"K-1", b"123456789"),
        (b'"K-1"', b"K-1"), (b'"chip"', b'"cash"'), (b'"chip"', b'"chip2'), (b'"chip"', b'"b\\\\s"'),
        (b'"chip"', '"é"'.encode()), (b"{", b"{ "), (b"{", b" {"), (b"{", b"["), (b"}", b" }"), (b"}", b"}\n"),
        (b"}", b"},"), (b"}", b""), (b",", b", ,"), (b",", b",  "), (b'"c:d":""', b'"c:d":"'),
    ],
)  # fmt: skip
def test_every_doubt_is_left_to_msgspec(old: bytes, new: bytes) -> None:
    assert PLAIN.count(old) >= 1
    value = PLAIN.replace(old, new, 1)
    assert doubts([PLAIN, value, PLAIN]) == [False, True, False]
    check_as_msgspec(made(), [PLAIN, value, PLAIN])


def test_messages_that_are_absent_empty_or_too_long_are_left_to_msgspec() -> None:
    long = PLAIN.replace(b"K-1", b" " * BYTES_MAX)
    assert doubts([None, PLAIN, b"", long]) == [True, False, True, True]
    check_as_msgspec(made(), [None, PLAIN, b"", long])
    exact = made(bytes_max=len(PLAIN))
    assert exact.decode([PLAIN]).batch.rows == 1
    check_as_msgspec(made(bytes_max=len(PLAIN) - 1), [PLAIN])


def test_columns_have_no_remains_of_other_messages() -> None:
    """Texts and categories of doubtful messages leave nothing in the rows of the others."""
    half = PLAIN.replace(b'"K-1"', b'"LONGTEXT"')[:-1]
    values = [half, PLAIN, half, PLAIN.replace(b'"K-1"', b'"L"'), PLAIN.replace(b'"K-1"', b'"\\u004c"'), half]
    decoded = check_as_msgspec(made(), values)
    assert decoded.batch["card"].tolist() == [b"K-1", b"L", b"L"]
    assert decoded.rows.tolist() == [1, 3, 4]


def test_names_that_json_escapes_and_too_many_fields_do_without_the_kernel() -> None:
    whole = Field(type="int64")
    for names in (['a"b'], ["a\\b"], ["é"], ["a\n"], [f"f{number}" for number in range(63)], []):
        assert not can_be_plain(dict.fromkeys(names, whole))
    for names in (["é", "c"], [f"f{number}" for number in range(70)], [f"f{number}" for number in range(62)]):
        fields = dict.fromkeys(names, whole)
        values = [json.dumps({name: number for number, name in enumerate(names)}).encode() for _ in range(3)]
        assert check_as_msgspec(made(fields, 10_000), values).batch.rows == 3


def test_a_category_that_the_schema_has_twice_has_the_same_position_for_both_readers() -> None:
    fields = {"way": Field(type="category", values=("a", "b", "a"))}
    decoded = check_as_msgspec(made(fields), [b'{"way":"a"}', b'{"way":"b"}'])
    assert decoded.batch["way"].tolist() == [2, 1]


@pytest.mark.parametrize("name", ["json", "msgpack", "binary"])
def test_a_column_of_octets_is_read_as_a_list_is(name: str) -> None:
    fields = {key: field for key, field in FIELDS.items() if key != "way"}
    one = codec(name, fields, 1_000)  # type: ignore[arg-type]
    row = GOOD | {"paid at": 1_530_000_000_000, "since_s": 1_530_000_000_000}
    batch = ColumnBatch({key: np.array([row[key]] * 4, field.dtype) for key, field in fields.items()}, 4)
    good = one.encode(batch)
    for values in (good, [None, *good, b"", good[0][:-1], good[1], b"\xff" * len(good[0])], [None], []):
        decoded = one.decode(values)
        check_same(one.decode(ByteColumn.of(values)), decoded)
        assert decoded.batch.rows == sum(value in good for value in values)
        part = ByteColumn.of([good[0], *values, good[0]])[1:-1]
        check_same(one.decode(part), decoded)
