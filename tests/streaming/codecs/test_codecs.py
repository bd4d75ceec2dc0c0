from __future__ import annotations

import math
import random
import sys
import unicodedata
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascade.columns import ColumnBatch
from cascade.features import FeatureEngine, FeatureSpec
from cascade.schema import Field, load_schema
from streaming.codecs import Codec, Decoded, RejectReason, codec, too_far_ahead
from streaming.codecs.messages import NESTING_MAX
from tests.streaming.codecs.codec_cases import BYTES_MAX, TIME_MS, Bad, check_alone, check_faults, each_position_once
from tests.streaming.codecs.codec_cases import FIELDS as CASES

SIMULATOR = Path(__file__).parents[3] / "cascade" / "schemas" / "simulator.toml"
# a name need not be an identifier
FIELDS = {name.replace("card_", "card-"): field for name, field in CASES.items() if name != "note"}
GOOD: dict[str, Any] = {
    "transaction_id": 1,
    "event_time": TIME_MS,
    "amount": 12.5,
    "card-id": "K-1",
    "channel": "online",
}
ENCODE = {"json": msgspec.json.encode, "msgpack": msgspec.msgpack.encode}
CODECS = ["json", "msgpack"]


@pytest.fixture(params=CODECS, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def make(name: str, fields: dict[str, Field] = FIELDS, bytes_max: int = BYTES_MAX) -> Codec:
    return codec(name, fields, bytes_max)  # type: ignore[arg-type]


def message(name: str, **changes: Any) -> bytes:
    return ENCODE[name](GOOD | changes)


def without(name: str, field: str) -> bytes:
    return ENCODE[name]({key: value for key, value in GOOD.items() if key != field})


def object_of(name: str, *entries: tuple[str | bytes, Any]) -> bytes:
    """A message with these entries in this order; keys and values given as bytes are taken as they are."""
    encode = ENCODE[name]
    pairs = [[part if isinstance(part, bytes) else encode(part) for part in entry] for entry in entries]
    if name == "json":
        return b"{" + b",".join(b":".join(pair) for pair in pairs) + b"}"
    return b"\xde" + len(pairs).to_bytes(2, "big") + b"".join(b"".join(pair) for pair in pairs)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def repeating(name: str) -> list[bytes]:
    """Messages that have a key twice, one way or another."""
    good = list(GOOD.items())
    found = [object_of(name, *good, entry) for entry in good]
    found += [object_of(name, *[("amount", 1)] * 3, *good), object_of(name, ("new", 1), *good, ("new", 1))]
    found += [object_of(name, *good, ("a:b", ":"), ("a:b", {":": [":"]})), object_of(name, *good, ("", 1), ("", 2))]
    found += [object_of(name, *good, ("card-id", 'quo"ted \\ {[:'))]
    if name == "json":
        # the same key, spelled otherwise; the colon that an escape hides must not make up for the one of the repetition
        found += [object_of(name, *good, (b'"am\\u006funt"', 99)), object_of(name, (b'"\\u003a"', 1), *good, good[0])]
        found += [object_of(name, *good, ("amount", 1)).replace(b",", b"\n,\t ").replace(b":", b" : ")]
    else:
        # the same key behind a header longer than it needs
        found += [object_of(name, *good, (b"\xdb\0\0\0\x06amount", 99))]
    return found


def bad_messages(name: str) -> Bad:
    common: Bad = [
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
        *(
            (message(name, **{"card-id": f"a{character}"}), RejectReason.OUT_OF_LIMITS)
            for character in "\u202e\u200b\ufeff\u2028\xad"
        ),
        *((octets, RejectReason.REPEATED_KEY) for octets in repeating(name)),
        (object_of(name, *GOOD.items(), ("x", nested(NESTING_MAX + 1))), RejectReason.SYNTAX),
        (message(name).replace(b"K-1", b"K\xff1"), RejectReason.ENCODING),
        (b"not a message", RejectReason.SYNTAX if name == "json" else RejectReason.TYPE),
    ]
    only: dict[str, Bad] = {
        "json": [
            (message(name).replace(b"12.5", b"NaN"), RejectReason.SYNTAX),
            (message(name).replace(b"12.5", b"-Infinity"), RejectReason.SYNTAX),
            (message(name).replace(b"12.5", b"1e999"), RejectReason.NOT_FINITE),
            (message(name).replace(b"12.5", b"1" + b"0" * 400), RejectReason.NOT_FINITE),
            (message(name).replace(b":1,", b":1" + b"0" * 400 + b",", 1), RejectReason.TYPE),
            (message(name).replace(b":1,", b":1e0,", 1), RejectReason.TYPE),
            (message(name).replace(b":1,", b":01,", 1), RejectReason.SYNTAX),
            (message(name).replace(b":1,", b":+1,", 1), RejectReason.SYNTAX),
            (message(name).replace(b"12.5", b"0x10"), RejectReason.SYNTAX),
            (message(name).replace(b"12.5", b"-1e999"), RejectReason.NOT_FINITE),
            (message(name).replace(b"K-1", b"\\u0000"), RejectReason.OUT_OF_LIMITS),
            (message(name).replace(b"K-1", b"\\u202e1"), RejectReason.OUT_OF_LIMITS),
            (message(name).replace(b"K-1", b"\xc0\xaf"), RejectReason.ENCODING),  # overlong
            (message(name).replace(b"K-1", b"\xed\xa0\x80"), RejectReason.ENCODING),  # a surrogate
            (object_of(name, *GOOD.items(), (b'"\xff"', 1)), RejectReason.ENCODING),
            (object_of(name, *GOOD.items(), ("x", b'"\xff"')), RejectReason.ENCODING),
            (message(name) + b"\x00", RejectReason.SYNTAX),
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
            (message(name).replace(b"\xa3K-1", b"\xc7\x03\x05K-1"), RejectReason.TYPE),  # ext
            (message(name, event_time=datetime(2020, 1, 1, tzinfo=UTC)), RejectReason.TYPE),
            (object_of(name, *GOOD.items(), (7, 1)), RejectReason.TYPE),
            (object_of(name, *GOOD.items(), (b"\xa1\xff", 1)), RejectReason.ENCODING),
            (message(name).replace(b"K-1", b"\xed\xa0\x80"), RejectReason.ENCODING),  # a surrogate
            (object_of(name, *GOOD.items(), ("x", b"\xdf\xff\xff\xff\xff")), RejectReason.SYNTAX),
            (object_of(name, *GOOD.items(), ("x", b"\xc9\xff\xff\xff\xff\x01")), RejectReason.SYNTAX),
            (b"\xc1", RejectReason.SYNTAX),
            (b"\xdf\xff\xff\xff\xff", RejectReason.SYNTAX),
        ],
    }
    return common + only[name]


def test_each_fault_has_its_reason_and_other_rows_are_read(name: str) -> None:
    bad = bad_messages(name)
    decoded = check_faults(make(name), lambda number: message(name, transaction_id=number), bad)
    each_position_once(decoded, 2 * len(bad) + 1, FIELDS)
    assert set(decoded.batch["card-id"].tolist()) == {b"K-1"}


def test_every_reason_is_tried() -> None:
    tried = {reason for name in CODECS for _, reason in bad_messages(name)}
    # these codecs' messages name their fields and no schema
    assert tried == set(RejectReason) - {RejectReason.FUTURE_EVENT, RejectReason.OTHER_SCHEMA}


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


def test_keys_are_distinguished_at_any_position(name: str) -> None:
    """What looks like a repetition and is none: in values, in nested objects, as part of other keys."""
    good = list(GOOD.items())
    values = [
        object_of(name, *good, *more)
        for more in (
            [("note", '"amount":1,"amount":2')], [("note", {"amount": 1}), ("other", {"amount": 1})],
            [("amount2", 1), ("Amount", 2)], [("note", "\\\""), ("x:y", ":")],
            [("note", object_of(name, ("a", 1), ("a", 2)))], [("é", "é"), ("e\u0301", ":\\:")], [("note", "[{" * 90)],
            [("a:b", 1), (":", 2)],
            [(f"new-{number}", number) for number in range(300)], [("note", [["[", {"{": "\\"}], ["]"]] * 60)],
        )
    ]  # fmt: skip
    decoded = make(name, bytes_max=100_000).decode(values)
    assert decoded.rejects == []
    assert decoded.batch["amount"].tolist() == [12.5] * len(values)


def test_the_depth_of_unknown_fields_has_a_fixed_bound(name: str) -> None:
    """Not the interpreter's, which depends on who calls: a replay must read the same messages."""

    def from_a_deep_stack(levels: int, values: list[bytes]) -> Decoded:
        return from_a_deep_stack(levels - 1, values) if levels else make(name, bytes_max=100_000).decode(values)

    shapes: list[tuple[int, Any]] = [(depth, nested(depth)) for depth in (1, 31, 32, 33, 34, 60, 800)]
    shapes += [(33, {"a": nested(32)}), (32, {"a": nested(31)}), (2, [[1], [2]] * 500), (3, [{"[": [b"x" * 40]}] * 50)]
    values = [object_of(name, *GOOD.items(), ("x", value)) for _, value in shapes]
    for levels in (0, 100):
        decoded = from_a_deep_stack(levels, values)
        assert decoded.rows.tolist() == [place for place, (depth, _) in enumerate(shapes) if depth <= NESTING_MAX]
        assert {reject.detail for reject in decoded.rejects} == {f"nested deeper than {NESTING_MAX}"}


def test_every_kind_of_msgpack_value_is_stepped_over_by_its_length() -> None:
    """A step too short lands on an octet that opens an array, one too long swallows the first of what nests deepest."""
    sized = {0xC4: b"", 0xC7: b"\x05", 0xD9: b""}  # bin, ext, str: lengths in one, two and four octets
    kinds = [bytes([0xCA + place]) + b"\x91" * octets for place, octets in enumerate((4, 8, 1, 2, 4, 8, 1, 2, 4, 8))]
    kinds += [bytes([0xD4 + power]) + b"\x05" + b"\x91" * (1 << power) for power in range(5)]
    kinds += [bytes([0xA0 | count]) + b"\x91" * count for count in (0, 1, 31)]
    for first, kind in sized.items():
        kinds += [bytes([first + p]) + (40).to_bytes(1 << p, "big") + kind + b"\x91" * 40 for p in range(3)]
    for counted, items in (((0x91, 0xDC, 0xDD), 1), ((0x81, 0xDE, 0xDF), 2)):
        headers = [
            bytes([counted[0]]),
            *(bytes([first]) + (1).to_bytes(2 + 2 * p, "big") for p, first in enumerate(counted[1:])),
        ]
        kinds += [header + b"\x01" * items for header in headers]
    kinds += [b"\xc0", b"\xc2", b"\xc3", b"\x7f", b"\xe0", b"\xff", b"\x90", b"\x80", b"\xdc\0\0", b"\xdf\0\0\0\0"]
    filler = ("filler", [[]] * 40)
    for kind in kinds:
        flat, deep = (
            object_of("msgpack", *GOOD.items(), filler, ("x", b"\x92" + kind + msgspec.msgpack.encode(nested(depth))))
            for depth in (NESTING_MAX - 1, NESTING_MAX)
        )
        assert make("msgpack").decode([flat, deep]).rows.tolist() == [0], kind


def test_nesting_without_end_is_a_reject(name: str) -> None:
    opened = {"json": b'{"x":' + b"[" * 500_000, "msgpack": b"\x81\xa1x" + b"\x91" * 500_000}[name]
    decoded = make(name, bytes_max=1_000_000).decode([opened, message(name)])
    assert [reject.reason for reject in decoded.rejects] == [RejectReason.SYNTAX]
    assert decoded.rows.tolist() == [1]


def test_one_message_never_counts_for_two(name: str) -> None:
    good = message(name)
    halves = [good[: len(good) // 2], good[len(good) // 2 :]]
    joined = good + (b"," if name == "json" else b"") + good
    for values in ([joined, *halves], [joined, b"{", b"}"], [good + b"\n" + good, halves[0]], [joined, b"", good]):
        decoded = make(name).decode(values)
        each_position_once(decoded, len(values), FIELDS)
        assert [values[row] for row in decoded.rows] == [value for value in values if value == good]


@pytest.mark.parametrize("seed", range(5))
def test_a_fetch_is_read_as_its_messages_are_one_by_one(name: str, seed: int) -> None:
    chance = random.Random(seed)
    bad = [value for value, _ in bad_messages(name)]
    odd = [message(name, more=1), message(name, **{"card-id": ":"})]
    # long runs of good ones, which are read together, and now and then one that is not
    values = [chance.choice(bad + odd) if chance.random() < 0.02 else message(name) for _ in range(600)]
    made = make(name)
    alone = [made.decode([value]) for value in values]
    decoded = made.decode(values)
    each_position_once(decoded, len(values), FIELDS)
    assert decoded.rows.tolist() == [index for index, part in enumerate(alone) if part.batch.rows]
    for field in FIELDS:
        assert decoded.batch[field].tolist() == [value for part in alone for value in part.batch[field].tolist()]
    found = [(reject.index, reject.reason, reject.detail) for reject in decoded.rejects]
    assert found == [
        (index, reject.reason, reject.detail) for index, part in enumerate(alone) for reject in part.rejects
    ]


def test_no_message_lacks_what_its_neighbour_has_twice(name: str) -> None:
    twice = object_of(name, ("amount", 1.0), *GOOD.items())
    decoded = make(name).decode([message(name), twice, without(name, "amount"), message(name)])
    assert decoded.rows.tolist() == [0, 3]
    assert [reject.reason for reject in decoded.rejects] == [RejectReason.REPEATED_KEY, RejectReason.MISSING_FIELD]


def test_unknown_fields_and_the_order_of_fields_do_not_matter(name: str) -> None:
    shuffled = dict(reversed(list(GOOD.items()))) | {"new": {"deep": [1, None, "x"]}}
    decoded = make(name).decode([ENCODE[name](shuffled)])
    assert decoded.rejects == []
    assert decoded.batch["amount"].tolist() == [12.5]
    assert decoded.batch["channel"].tolist() == [1]


def test_odd_spellings_of_good_values_are_read(name: str) -> None:
    changes: dict[str, Any] = {"amount": -0.0, "transaction_id": 2**63 - 1, "card-id": "Ω-漢"}
    spelled = {"json": b"-0", "msgpack": b"\xd3" + bytes(8)}[name]
    tiny = {"json": b"5e-324", "msgpack": b"\xcb" + bytes(7) + b"\x01"}[name]
    entries = [entry for entry in GOOD.items() if entry[0] not in ("transaction_id", "amount")]
    values = [
        message(name, **changes),
        object_of(name, *entries, ("transaction_id", spelled), ("amount", tiny)),
    ]
    decoded = make(name).decode(values)
    assert decoded.rejects == []
    assert decoded.batch["transaction_id"].tolist() == [2**63 - 1, 0]
    assert decoded.batch["amount"].tolist() == [0.0, 5e-324]


def test_no_id_contains_an_invisible_character(name: str) -> None:
    unseen = [
        chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Cc", "Cf", "Zl", "Zp")
    ] + list("\u034f\u115f\u3164\ufe0f\uffa0\U000e01ef")
    decoded = make(name).decode([message(name, **{"card-id": f"a{character}b"}) for character in unseen])
    assert decoded.batch.rows == 0
    assert {reject.detail for reject in decoded.rejects} == {"card-id: contains a control or invisible character"}


def test_limits_themselves_are_within(name: str) -> None:
    decoded = make(name).decode([message(name, amount=0), message(name, amount=10_000), message(name, amount=1e4)])
    assert decoded.rejects == []


def test_an_empty_fetch_is_an_empty_batch(name: str) -> None:
    each_position_once(make(name).decode([]), 0, FIELDS)
    each_position_once(make(name).decode([None]), 1, FIELDS)


@pytest.mark.parametrize(
    ("unit", "wire"), [("s", 1_530_000_000), ("ms", 1_530_000_000_000), ("us", 1_530_000_000_000_999)]
)
def test_times_become_milliseconds_whatever_their_unit(name: str, unit: str, wire: int) -> None:
    made = make(name, {"t": Field(type="timestamp", unit=unit)})
    decoded = made.decode([ENCODE[name]({"t": wire})])
    assert decoded.batch["t"].tolist() == [TIME_MS]
    assert made.decode(made.encode(decoded.batch)).batch["t"].tolist() == [TIME_MS]


def test_seconds_that_milliseconds_cannot_count_are_rejected_without_limits(name: str) -> None:
    most = (2**63 - 1) // 1_000
    decoded = make(name, {"t": Field(type="timestamp", unit="s")}).decode(
        [ENCODE[name]({"t": seconds}) for seconds in (2**63 - 1, -(2**63), most + 1, -most - 1, most, 5)]
    )
    assert [reject.reason for reject in decoded.rejects] == [RejectReason.OUT_OF_LIMITS] * 4
    assert decoded.batch["t"].tolist() == [most * 1_000, 5_000]


UNSEEN: Any = ["Cc", "Cf", "Cn", "Cs", "Zl", "Zp", "Mn"]
FILLERS = "\u115f\u1160\u3164\uffa0"
rows = st.fixed_dictionaries(
    {
        "transaction_id": st.integers(0, 2**63 - 1),
        "event_time": st.integers(1_514_764_800_000, 1_893_456_000_000),
        "amount": st.floats(0, 10_000),
        "card-id": st.text(st.characters(exclude_categories=UNSEEN, exclude_characters=FILLERS), max_size=8).filter(
            lambda text: len(text.encode()) <= 8
        ),
        "channel": st.sampled_from(["chip", "online"]),
    }
)


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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_message_breaks_a_fetch(name: str, data: st.DataObject) -> None:
    value = st.one_of(st.none(), st.binary(max_size=200), hostile(name), st.just(message(name)))
    values = data.draw(st.lists(value, max_size=12))
    decoded = check_alone(make(name), values, FIELDS)
    assert np.isfinite(decoded.batch["amount"]).all()
    assert ((decoded.batch["amount"] >= 0) & (decoded.batch["amount"] <= 10_000)).all()


def test_a_batch_of_columns_encodes_to_named_fields(name: str) -> None:
    batch = ColumnBatch(
        {
            "transaction_id": np.array([1], np.int64), "event_time": np.array([TIME_MS], np.int64),
            "amount": np.array([12.5]), "card-id": np.array([b"K-1"], "S8"), "channel": np.array([1], np.int64),
        },
        1,
    )  # fmt: skip
    assert make(name).encode(batch) == [message(name)]


# --- events from the future -----------------------------------------------------------------------------------------

HOUR_MS = 3_600_000
SEQUENCE = {"key": "card", "length": 2, "fields": ["card_count_30d"]}


def test_an_event_may_be_ahead_of_its_record_by_the_tolerance_and_no_more() -> None:
    ahead_ms = np.array([-(10**12), 0, HOUR_MS, HOUR_MS + 1, 10**12], np.int64)
    found = too_far_ahead(TIME_MS + ahead_ms, np.full(5, TIME_MS), HOUR_MS)
    assert found.tolist() == [False, False, False, True, True]
    assert found.dtype == np.bool_


def test_times_at_the_edge_of_int64_do_not_wrap() -> None:
    most = 2**63 - 1
    events = np.array([most, most, -most, most], np.int64)
    appended = np.array([most, 0, most, most - HOUR_MS - 1], np.int64)
    assert too_far_ahead(events, appended, HOUR_MS).tolist() == [False, True, False, True]


def test_a_record_without_a_time_of_append_is_not_judged() -> None:
    assert too_far_ahead(np.array([TIME_MS]), np.array([-1]), HOUR_MS).tolist() == [False]


def counts_of_a_card(ahead_ms: int) -> list[float]:
    """Its transactions in 30 days, seen by one an hour for two days after one that is ahead by so much."""
    window = {"key": "card", "functions": ["count"], "windows": ["30d"]}
    limits = {"keys_max": 16, "events_per_key_max": 4_096, "events_per_key_mean": 256}
    declared = {"version": 2, "lateness": "1h", "limits": limits, "window": [window], "sequence": [SEQUENCE]}
    engine = FeatureEngine(msgspec.convert(declared, FeatureSpec), load_schema(SIMULATOR))
    days_ms = 24 * HOUR_MS
    history = TIME_MS - 30 * days_ms + np.arange(0, 30 * days_ms, HOUR_MS)
    times = np.concatenate([history, [TIME_MS + ahead_ms], TIME_MS + np.arange(0, 2 * days_ms, HOUR_MS)])
    fields = load_schema(SIMULATOR).fields
    columns = {name: np.ones(len(times), field.dtype) for name, field in fields.items()} | {"event_time": times}
    return engine.update(ColumnBatch(columns, len(times))).features[len(history) + 1 :, 0].tolist()


def test_what_an_event_ahead_costs_the_card_that_it_names() -> None:
    """Within `lateness`, its history stays whole; a day ahead takes a day of it; a year ahead takes all, for good."""
    undisturbed = 30 * 24
    assert min(counts_of_a_card(HOUR_MS)) >= undisturbed - 1
    assert undisturbed - 24 <= min(counts_of_a_card(24 * HOUR_MS)) < undisturbed - 12
    assert max(counts_of_a_card(365 * 24 * HOUR_MS)) == 1


# --- whatever comes -------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_message_is_refused_for_a_repeated_key_exactly_where_one_repeats(name: str, data: st.DataObject) -> None:
    keys = st.sampled_from([*GOOD, "x", "a:b", "\\", '"', "é"]) | st.text(max_size=4)
    lists = [[], [{"card-id": 1}, {"card-id": "a:b"}], [[["]["]]]]
    values = st.text(max_size=9) | st.sampled_from([None, True, -1.5, "a:b", '"', "\\", "}{", {"x": {"x": 1}}, *lists])
    more = data.draw(st.lists(st.tuples(keys, values), max_size=6))
    more = [(key, value) for key, value in more if key not in GOOD] + [
        (key, GOOD[key]) for key, _ in more if key in GOOD
    ]
    entries = data.draw(st.permutations([*GOOD.items(), *more]))
    decoded = make(name, bytes_max=100_000).decode([object_of(name, *entries)])
    repeats = len({key for key, _ in entries}) < len(entries)
    assert [reject.reason for reject in decoded.rejects] == [RejectReason.REPEATED_KEY] * repeats
