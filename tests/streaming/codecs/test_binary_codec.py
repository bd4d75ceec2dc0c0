"""Fixed rows: what they hold, what is refused, and that it is refused as in the other codecs."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.columns import ColumnBatch
from cascade.errors import SettingError
from cascade.schema import Field
from streaming.codecs import RejectReason, codec
from streaming.codecs.binary import HEAD_BYTES, BinaryCodec
from tests.streaming.codecs.codec_cases import (
    BYTES_MAX,
    FIELDS,
    TIME_MS,
    Bad,
    any_octets,
    any_row,
    check_alone,
    check_as_msgpack,
    check_faults,
    each_position_once,
    reasons,
)

CODEC = BinaryCodec(FIELDS, BYTES_MAX)
GOOD = {
    "transaction_id": 1, "event_time": TIME_MS, "amount": 12.5, "card_id": b"K-1", "channel": 1, "note": b""
}  # fmt: skip


def row(**changes: Any) -> bytes:
    """A row as its page in the docs says, without numpy."""
    values = GOOD | changes
    return CODEC.head + struct.pack("<qqd8sB5s", *(values[name] for name in FIELDS))


def test_a_row_is_laid_out_as_documented() -> None:
    assert CODEC.head[:2] == b"\xca\x01"
    assert HEAD_BYTES == len(CODEC.head) == 8
    decoded = CODEC.decode([row(), row(amount=0.0, channel=0, note="é".encode())])
    assert decoded.rejects == []
    assert {name: decoded.batch[name].tolist() for name in FIELDS} == {
        "transaction_id": [1, 1], "event_time": [TIME_MS] * 2, "amount": [12.5, 0.0],
        "card_id": [b"K-1"] * 2, "channel": [1, 0], "note": [b"", "é".encode()],
    }  # fmt: skip
    assert [decoded.batch[name].dtype for name in FIELDS] == [field.dtype for field in FIELDS.values()]
    assert CODEC.encode(decoded.batch)[0] == row()


BAD: Bad = [
    (None, RejectReason.EMPTY),
    (b"", RejectReason.EMPTY),
    (row() + bytes(BYTES_MAX), RejectReason.OVERSIZED),
    (row()[:-1], RejectReason.SYNTAX),
    (row() + b"\0", RejectReason.SYNTAX),
    (row() + row(), RejectReason.SYNTAX),
    (row()[:5], RejectReason.SYNTAX),
    (b"{}", RejectReason.SYNTAX),
    (b"\xcb" + row()[1:], RejectReason.SYNTAX),
    (b"\xca\x02" + row()[2:], RejectReason.OTHER_SCHEMA),
    (row()[:7] + bytes([row()[7] ^ 1]) + row()[8:], RejectReason.OTHER_SCHEMA),
    (b"\xca\x01another" + bytes(30), RejectReason.OTHER_SCHEMA),
    (row(card_id=b"K\xff1"), RejectReason.ENCODING),
    (row(card_id=b"K\xed\xa0\x80"), RejectReason.ENCODING),
    (row(card_id="1234567é".encode()[:8]), RejectReason.ENCODING),
    (row(card_id=b"K\x001"), RejectReason.OUT_OF_LIMITS),
    (row(card_id=b"\x001"), RejectReason.OUT_OF_LIMITS),
    (row(card_id=b"K\n"), RejectReason.OUT_OF_LIMITS),
    (row(card_id=b"K\x7f"), RejectReason.OUT_OF_LIMITS),
    (row(card_id="a\u202e".encode()), RejectReason.OUT_OF_LIMITS),
    (row(card_id="a\x9f".encode()), RejectReason.OUT_OF_LIMITS),
    (row(amount=math.nan), RejectReason.NOT_FINITE),
    (row(amount=-math.inf), RejectReason.NOT_FINITE),
    (row(amount=10_000.01), RejectReason.OUT_OF_LIMITS),
    (row(transaction_id=-1), RejectReason.OUT_OF_LIMITS),
    (row(event_time=-(2**63)), RejectReason.OUT_OF_LIMITS),
    (row(channel=2), RejectReason.UNKNOWN_CATEGORY),
    (row(channel=255), RejectReason.UNKNOWN_CATEGORY),
    # the first fault counts, as in the other codecs
    (row(amount=math.nan, channel=2, transaction_id=-1), RejectReason.NOT_FINITE),
    (row(amount=math.nan, note=b"\xff"), RejectReason.ENCODING),
    (row(transaction_id=-1, note=b"\n"), RejectReason.OUT_OF_LIMITS),
]


def test_each_fault_has_its_reason_and_other_rows_are_read() -> None:
    each_position_once(check_faults(CODEC, lambda number: row(transaction_id=number), BAD), 2 * len(BAD) + 1)


def test_messages_of_two_wrong_lengths_do_not_make_up_for_each_other() -> None:
    good = row()
    for values in ([good[:-1], good + b"\0"], [good + good[:1], good[1:]], [good + good, b""], [good[:20], good[20:]]):
        decoded = CODEC.decode([*values, good])
        assert [reject.index for reject in decoded.rejects] == [0, 1]
        assert decoded.rows.tolist() == [2]


@pytest.mark.parametrize("values", [[], [None], [b"x"], [b"\xca\x01another" + bytes(len(row()) - 9)]])
def test_a_fetch_without_a_row_is_an_empty_batch(values: list[bytes | None]) -> None:
    decoded = CODEC.decode(values)
    each_position_once(decoded, len(values))
    assert decoded.batch.rows == 0


@pytest.mark.parametrize(
    "other",
    [
        FIELDS | {"channel": Field(type="category", values=("online", "chip"))},
        FIELDS | {"event_time": Field(type="timestamp", unit="us")},
        FIELDS | {"amount": Field(type="int64")},
        dict(reversed(list(FIELDS.items()))),
        {("Amount" if name == "amount" else name): field for name, field in FIELDS.items()},
        # of the same size, and the octets are the same too
        FIELDS | {"card_id": Field(type="string", max_length=5), "note": Field(type="string", max_length=8)},
    ],
)
def test_a_row_of_another_schema_is_rejected_and_never_misread(other: dict[str, Field]) -> None:
    columns: dict[str, Any] = {name: np.ones(1, field.dtype) for name, field in other.items()}
    written = BinaryCodec(other, BYTES_MAX).encode(ColumnBatch(columns, 1))
    assert list(reasons(CODEC.decode([*written, row()])).items()) == [(0, RejectReason.OTHER_SCHEMA)]


def test_limits_may_change_between_producer_and_reader() -> None:
    other = FIELDS | {"amount": Field(type="float64", minimum=5, maximum=6)}
    assert BinaryCodec(other, BYTES_MAX).head == CODEC.head


@pytest.mark.parametrize(("unit", "wire"), [("s", 1_530_000_000), ("ms", TIME_MS), ("us", 1.53e15)])
def test_times_become_milliseconds_whatever_their_unit(unit: str, wire: float) -> None:
    made = BinaryCodec({"paid-at": Field(type="timestamp", unit=unit)}, BYTES_MAX)
    value = made.head + struct.pack("<q", int(wire))
    assert made.decode([value]).batch["paid-at"].tolist() == [TIME_MS]
    assert made.encode(made.decode([value]).batch) == [value]


def test_many_categories_have_two_octets() -> None:
    made = BinaryCodec({"c": Field(type="category", values=tuple(map(str, range(300))))}, BYTES_MAX)
    decoded = made.decode([made.head + struct.pack("<H", code) for code in (0, 299, 300)])
    assert decoded.batch["c"].tolist() == [0, 299]
    assert reasons(decoded) == {2: RejectReason.UNKNOWN_CATEGORY}


def test_a_limit_below_the_size_of_a_row_stops_the_start() -> None:
    with pytest.raises(SettingError, match=r"worker\.message_bytes_max = 37: a binary row of this schema has 46 bytes"):
        codec("binary", FIELDS, 37)


def test_details_do_not_tell_the_value() -> None:
    values = [row(card_id=b"4000\n123"), row(card_id=b"4000123\xff"), row(transaction_id=-40001234)]
    decoded = CODEC.decode(values)
    assert len(decoded.rejects) == 3
    assert not any("4000" in reject.detail for reject in decoded.rejects)


# --- the same values in another codec ---------------------------------------------------------------------------------

CHANNELS = (b"chip", b"online", b"cash", b"")
binary_row = any_row(
    card_id=any_octets.map(lambda value: value[:8].rstrip(b"\0")),
    channel=st.sampled_from(range(len(CHANNELS))),
    note=any_octets.map(lambda value: value[:5].rstrip(b"\0")),
)


@settings(max_examples=300, deadline=None)
@given(found=st.lists(binary_row, max_size=5))
def test_the_same_values_are_read_and_refused_as_in_messagepack(found: list[dict[str, Any]]) -> None:
    decoded = CODEC.decode([row(**values) for values in found])
    check_as_msgpack(decoded, [values | {"channel": CHANNELS[values["channel"]]} for values in found])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_message_breaks_a_fetch(data: st.DataObject) -> None:
    spoilt = st.builds(
        lambda place, value: row()[:place] + value + row()[place + len(value) :],
        st.integers(0, len(row())),
        st.binary(min_size=1, max_size=9),
    )
    values = data.draw(st.lists(st.none() | st.binary(max_size=60) | spoilt | st.just(row()), max_size=12))
    decoded = check_alone(CODEC, values, FIELDS)
    assert CODEC.decode(CODEC.encode(decoded.batch)).rejects == []
