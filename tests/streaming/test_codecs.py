from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascade.columns import ColumnBatch
from cascade.schema import Field
from streaming.codecs import Codec, Decoded, RejectReason, codec

BYTES_MAX = 1_000
FIELDS = {
    "transaction_id": Field(type="int64", minimum=0),
    "event_time": Field(
        type="timestamp", unit="ms", minimum=datetime(2018, 1, 1, tzinfo=UTC), maximum=datetime(2030, 1, 1, tzinfo=UTC)
    ),
    "amount": Field(type="float64", minimum=0, maximum=10_000),
    "card-id": Field(type="string", max_length=8),
    "channel": Field(type="category", values=("chip", "online")),
}
GOOD: dict[str, Any] = {
    "transaction_id": 1,
    "event_time": 1_530_000_000_000,
    "amount": 12.5,
    "card-id": "K-1",
    "channel": "online",
}
ENCODE = {"json": msgspec.json.encode, "msgpack": msgspec.msgpack.encode}
CODECS = ["json", "msgpack"]


def make(name: str, fields: dict[str, Field] = FIELDS) -> Codec:
    return codec(name, fields, BYTES_MAX)  # type: ignore[arg-type]


def message(name: str, **changes: Any) -> bytes:
    return ENCODE[name](GOOD | changes)


def each_position_once(decoded: Decoded, count: int) -> None:
    rejected = [reject.index for reject in decoded.rejects]
    assert sorted([*decoded.rows.tolist(), *rejected]) == list(range(count))
    assert rejected == sorted(rejected)
    assert decoded.rows.tolist() == sorted(decoded.rows.tolist())
    assert decoded.batch.rows == len(decoded.rows)
    for field_name, field in FIELDS.items():
        assert decoded.batch[field_name].dtype == field.dtype
        assert len(decoded.batch[field_name]) == decoded.batch.rows


def without(name: str, field: str) -> bytes:
    return ENCODE[name]({key: value for key, value in GOOD.items() if key != field})


def bad_messages(name: str) -> list[tuple[bytes | None, RejectReason]]:
    common: list[tuple[bytes | None, RejectReason]] = [
        (None, RejectReason.EMPTY),
        (b"", RejectReason.EMPTY),
        (message(name, padding="x" * BYTES_MAX), RejectReason.OVERSIZED),
        (message(name)[:-1], RejectReason.SYNTAX),
        (message(name) + message(name), RejectReason.SYNTAX),
        (ENCODE[name]([GOOD]), RejectReason.TYPE),
        (ENCODE[name](None), RejectReason.TYPE),
        (message(name, amount="12.5"), RejectReason.TYPE),
        (message(name, amount=True), RejectReason.TYPE),
        (message(name, amount=None), RejectReason.TYPE),
        (message(name, transaction_id=1.0), RejectReason.TYPE),
        (message(name, transaction_id=True), RejectReason.TYPE),
        (message(name, transaction_id=2**63), RejectReason.TYPE),
        (message(name, **{"card-id": 7}), RejectReason.TYPE),
        (message(name, channel=1), RejectReason.TYPE),
        (message(name, event_time="2018-06-01T00:00:00Z"), RejectReason.TYPE),
        *((without(name, field), RejectReason.MISSING_FIELD) for field in FIELDS),
        (message(name, amount=-0.01), RejectReason.OUT_OF_LIMITS),
        (message(name, amount=10_000.01), RejectReason.OUT_OF_LIMITS),
        (message(name, transaction_id=-1), RejectReason.OUT_OF_LIMITS),
        (message(name, event_time=0), RejectReason.OUT_OF_LIMITS),
        (message(name, event_time=2**63 - 1), RejectReason.OUT_OF_LIMITS),
        (message(name, channel="cash"), RejectReason.UNKNOWN_CATEGORY),
        (message(name, channel=""), RejectReason.UNKNOWN_CATEGORY),
        (message(name, **{"card-id": "123456789"}), RejectReason.TOO_LONG),
        (message(name, **{"card-id": "ééééé"}), RejectReason.TOO_LONG),
        (message(name, **{"card-id": "a\x00"}), RejectReason.OUT_OF_LIMITS),
        (message(name, **{"card-id": "a\n"}), RejectReason.OUT_OF_LIMITS),
        (message(name, **{"card-id": "a\x9f"}), RejectReason.OUT_OF_LIMITS),
        (message(name).replace(b"K-1", b"K\xff1"), RejectReason.ENCODING),
        (b"not a message", RejectReason.SYNTAX if name == "json" else RejectReason.TYPE),
    ]
    only: dict[str, list[tuple[bytes | None, RejectReason]]] = {
        "json": [
            (message(name).replace(b"12.5", b"NaN"), RejectReason.SYNTAX),
            (message(name).replace(b"12.5", b"-Infinity"), RejectReason.SYNTAX),
            (message(name).replace(b"12.5", b"1e999"), RejectReason.NOT_FINITE),
            (message(name).replace(b"12.5", b"1" + b"0" * 400), RejectReason.NOT_FINITE),
            (message(name).replace(b":1,", b":1" + b"0" * 400 + b",", 1), RejectReason.TYPE),
            (message(name).replace(b"K-1", b"\\ud800"), RejectReason.SYNTAX),
            (message("json").decode().encode("utf-16"), RejectReason.ENCODING),
            (b"\xef\xbb\xbf" + message(name), RejectReason.SYNTAX),
            (b"   ", RejectReason.SYNTAX),
        ],
        "msgpack": [
            (message(name, amount=math.nan), RejectReason.NOT_FINITE),
            (message(name, amount=math.inf), RejectReason.NOT_FINITE),
            (message(name, amount=-math.inf), RejectReason.NOT_FINITE),
            (message(name, **{"card-id": b"K-1"}), RejectReason.TYPE),
            (b"\xc1", RejectReason.SYNTAX),
            (b"\xdf\xff\xff\xff\xff", RejectReason.SYNTAX),
        ],
    }
    return common + only[name]


@pytest.mark.parametrize("name", CODECS)
def test_each_fault_has_its_reason_and_spares_its_neighbours(name: str) -> None:
    bad = bad_messages(name)
    values: list[bytes | None] = [message(name)]
    for value, _ in bad:
        values += [value, message(name)]
    decoded = make(name).decode(values)
    each_position_once(decoded, len(values))
    found = {reject.index: reject.reason for reject in decoded.rejects}
    assert found == {2 * place + 1: reason for place, (_, reason) in enumerate(bad)}
    assert set(decoded.batch["card-id"].tolist()) == {b"K-1"}


def test_every_reason_is_tried() -> None:
    tried = {reason for name in CODECS for _, reason in bad_messages(name)}
    assert tried == set(RejectReason)


@pytest.mark.parametrize("name", CODECS)
def test_details_do_not_tell_the_value(name: str) -> None:
    secret = "4000123412341234"
    values = [
        message(name, **{"card-id": secret}), message(name, **{"card-id": int(secret)}),
        message(name, amount=secret), message(name, channel=secret), message(name, event_time=int(secret)),
        message(name, transaction_id=-int(secret)), message(name)[:-1] + secret.encode(),
    ]  # fmt: skip
    decoded = make(name).decode(values)
    assert len(decoded.rejects) == len(values)
    assert all(secret not in reject.detail for reject in decoded.rejects)


@pytest.mark.parametrize("name", CODECS)
def test_nesting_without_end_is_a_reject(name: str) -> None:
    opened = {"json": b'{"x":' + b"[" * 500_000, "msgpack": b"\x81\xa1x" + b"\x91" * 500_000}[name]
    decoded = codec(name, FIELDS, 1_000_000).decode([opened, message(name)])  # type: ignore[arg-type]
    assert [reject.reason for reject in decoded.rejects] == [RejectReason.SYNTAX]
    assert decoded.rows.tolist() == [1]


@pytest.mark.parametrize("name", CODECS)
def test_one_message_never_counts_for_two(name: str) -> None:
    good = message(name)
    halves = [good[: len(good) // 2], good[len(good) // 2 :]]
    joined = good + (b"," if name == "json" else b"") + good
    for values in ([joined, *halves], [joined, b"{", b"}"], [good + b"\n" + good, halves[0]], [joined, b"", good]):
        decoded = make(name).decode(values)
        each_position_once(decoded, len(values))
        assert [values[row] for row in decoded.rows] == [value for value in values if value == good]


@pytest.mark.parametrize("name", CODECS)
def test_unknown_fields_and_the_order_of_fields_do_not_matter(name: str) -> None:
    shuffled = dict(reversed(list(GOOD.items()))) | {"new": {"deep": [1, None, "x"]}}
    decoded = make(name).decode([ENCODE[name](shuffled)])
    assert decoded.rejects == []
    assert decoded.batch["amount"].tolist() == [12.5]
    assert decoded.batch["channel"].tolist() == [1]


@pytest.mark.parametrize("name", CODECS)
def test_limits_themselves_are_within(name: str) -> None:
    decoded = make(name).decode([message(name, amount=0), message(name, amount=10_000), message(name, amount=1e4)])
    assert decoded.rejects == []


@pytest.mark.parametrize("name", CODECS)
def test_an_empty_fetch_is_an_empty_batch(name: str) -> None:
    each_position_once(make(name).decode([]), 0)
    each_position_once(make(name).decode([None]), 1)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    ("unit", "wire"), [("s", 1_530_000_000), ("ms", 1_530_000_000_000), ("us", 1_530_000_000_000_999)]
)
def test_times_become_milliseconds_whatever_their_unit(name: str, unit: str, wire: int) -> None:
    made = make(name, {"t": Field(type="timestamp", unit=unit)})
    decoded = made.decode([ENCODE[name]({"t": wire})])
    assert decoded.batch["t"].tolist() == [1_530_000_000_000]
    assert made.decode(made.encode(decoded.batch)).batch["t"].tolist() == [1_530_000_000_000]


@pytest.mark.parametrize("name", CODECS)
def test_seconds_that_milliseconds_cannot_count_are_rejected_without_limits(name: str) -> None:
    most = (2**63 - 1) // 1_000
    decoded = make(name, {"t": Field(type="timestamp", unit="s")}).decode(
        [ENCODE[name]({"t": seconds}) for seconds in (2**63 - 1, -(2**63), most + 1, -most - 1, most, 5)]
    )
    assert [reject.reason for reject in decoded.rejects] == [RejectReason.OUT_OF_LIMITS] * 4
    assert decoded.batch["t"].tolist() == [most * 1_000, 5_000]


rows = st.fixed_dictionaries(
    {
        "transaction_id": st.integers(0, 2**63 - 1),
        "event_time": st.integers(1_514_764_800_000, 1_893_456_000_000),
        "amount": st.floats(0, 10_000),
        "card-id": st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=8).filter(
            lambda text: len(text.encode()) <= 8
        ),
        "channel": st.sampled_from(["chip", "online"]),
    }
)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=60, deadline=None)
@given(found=st.lists(rows, max_size=20))
def test_encode_and_decode_give_back_the_same_batch(name: str, found: list[dict[str, Any]]) -> None:
    made = make(name)
    decoded = made.decode([ENCODE[name](row) for row in found])
    assert decoded.rejects == []
    again = made.decode(made.encode(decoded.batch))
    assert again.rejects == []
    for field in FIELDS:
        assert np.array_equal(again.batch[field], decoded.batch[field])
    assert decoded.batch["card-id"].tolist() == [row["card-id"].encode() for row in found]
    assert decoded.batch["transaction_id"].tolist() == [row["transaction_id"] for row in found]


@st.composite
def hostile(draw: st.DrawFn, name: str) -> bytes:
    octets = bytearray(ENCODE[name](draw(rows)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(octets)))
        kind = draw(st.sampled_from(["put", "cut", "change"]))
        if kind == "put":
            octets[place:place] = draw(st.binary(min_size=1, max_size=6))
        elif kind == "cut":
            del octets[place : place + draw(st.integers(1, 6))]
        elif place < len(octets):
            octets[place] = draw(st.integers(0, 255))
    return bytes(octets)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_message_breaks_a_fetch(name: str, data: st.DataObject) -> None:
    one = st.one_of(st.none(), st.binary(max_size=60), hostile(name), st.just(message(name)))
    values = data.draw(st.lists(one, max_size=12))
    decoded = make(name).decode(values)
    each_position_once(decoded, len(values))
    for place, row in enumerate(decoded.rows.tolist()):
        alone = make(name).decode([values[row]])
        assert alone.rejects == []
        for field in FIELDS:
            assert alone.batch[field][0] == decoded.batch[field][place]
    assert np.isfinite(decoded.batch["amount"]).all()
    assert ((decoded.batch["amount"] >= 0) & (decoded.batch["amount"] <= 10_000)).all()


@pytest.mark.parametrize("name", CODECS)
def test_a_batch_of_columns_encodes_to_named_fields(name: str) -> None:
    batch = ColumnBatch(
        {
            "transaction_id": np.array([1], np.int64), "event_time": np.array([1_530_000_000_000], np.int64),
            "amount": np.array([12.5]), "card-id": np.array([b"K-1"], "S8"), "channel": np.array([1], np.int64),
        },
        1,
    )  # fmt: skip
    assert make(name).encode(batch) == [message(name)]
