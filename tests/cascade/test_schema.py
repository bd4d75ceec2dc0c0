"""Schemas: what is wrong is named, limits find their offenders, key codes are the same everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cascade
from cascade.columns import ColumnBatch
from cascade.errors import SettingError
from cascade.schema import Schema, key_codes, load_schema, out_of_limits, parse_schema

SHIPPED = Path(cascade.__file__).parent / "schemas"
GOOD = """
name = "shop"
version = 1

[roles]
transaction_id = "id"
event_time = "at"
amount = "paid"
card = "pan"
terminal = "shop"

[fields.id]
type = "int64"

[fields.at]
type = "timestamp"
unit = "s"
minimum = 2020-01-01T00:00:00Z
maximum = 2030-01-01T00:00:00+01:00

[fields.paid]
type = "float64"
minimum = 0.5
maximum = 100

[fields.pan]
type = "string"
max_length = 20

[fields.shop]
type = "int64"
minimum = -5

[fields.mode]
type = "category"
values = ["chip", "online"]

[label]
field = "fraud"
delay = "7d"
"""


def refusal(old: str, new: str) -> SettingError:
    """The error that GOOD gives with `old` replaced by `new`."""
    assert old in GOOD
    with pytest.raises(SettingError) as caught:
        parse_schema(GOOD.replace(old, new, 1).encode(), "schema.toml")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("schema.toml: ")
    assert text.endswith(caught.value.remedy)
    return caught.value


@pytest.fixture(scope="module")
def schema() -> Schema:
    return parse_schema(GOOD.encode(), "schema.toml")


@pytest.mark.parametrize(
    ("old", "new", "key", "value", "remedy"),
    [
        ('card = "pan"', 'card = "card"', "roles.card", "card", "add [fields.card] or name another"),
        ('transaction_id = "id"', 'transaction_id = "paid"', "fields.paid.type", "float64", "use int64 or string"),
        ('event_time = "at"', 'event_time = "id"', "fields.id.type", "int64", "use timestamp"),
        ('amount = "paid"', 'amount = "id"', "fields.id.type", "int64", "use float64"),
        ('card = "pan"', 'card = "mode"', "fields.mode.type", "category", "use int64 or string"),
        ('terminal = "shop"', 'terminal = "at"', "fields.at.type", "timestamp", "use int64 or string"),
        ('delay = "7d"', 'delay = "a week"', "label.delay", "a week", 'write for example "7d"'),
        ('delay = "7d"', 'delay = "0d"', "label.delay", "0d", 'write for example "7d"'),
        ('field = "fraud"', 'field = "mode"', "label.field", "mode", "remove it from [fields]"),
        ('unit = "s"', 'unit = "minutes"', "fields.at.unit", "minutes", "use s, ms or us"),
        ('unit = "s"', "", "fields.at.unit", "", "use s, ms or us"),
        ('values = ["chip", "online"]', "", "fields.mode.values", (), "list them"),
        ('type = "string"', 'type = "string"\nvalues = ["a"]', "fields.pan.values", ("a",), "list them"),
        ("max_length = 20", "max_length = 0", "fields.pan.max_length", 0, "use 1 to 256 bytes"),
        ("max_length = 20", "max_length = 257", "fields.pan.max_length", 257, "use 1 to 256 bytes"),
        ("max_length = 20", "minimum = 1", "fields.pan.minimum", 1.0, "remove it"),
        ('values = ["chip", "online"]', 'values = ["chip"]\nmaximum = 2', "fields.mode.maximum", 2.0, "remove it"),
        ("minimum = 2020-01-01T00:00:00Z", "minimum = 5", "fields.at.minimum", 5.0, "write a date such as"),
        ("minimum = 0.5", "minimum = 101", "fields.paid.minimum", 101.0, "swap them"),
    ],
)
def test_what_does_not_fit_is_named(old: str, new: str, key: str, value: object, remedy: str) -> None:
    error = refusal(old, new)
    assert (error.key, error.value) == (key, value)
    assert remedy in error.remedy


def test_dates_need_a_zone_and_belong_to_timestamps() -> None:
    assert refusal("minimum = 2020-01-01T00:00:00Z", "minimum = 2020-01-01T00:00:00").problem == "has no time zone"
    assert refusal("minimum = 0.5", "minimum = 2020-01-01T00:00:00Z").problem == "does not fit the type"
    assert refusal("maximum = 2030", "maximum = 2019").key == "fields.at.minimum"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('name = "shop"', "name = ", "Invalid value"),
        ('name = "shop"', "", "missing required field `name`"),
        ("version = 1", 'version = "1"', "Expected `int`, got `str`"),
        ('terminal = "shop"', "", "missing required field `terminal`"),
        ("max_length", "length_max", "unknown field `length_max`"),
        ('type = "int64"', 'type = "int32"', "Invalid enum value 'int32'"),
        ("[label]", "[labels]", "label"),
    ],
)
def test_what_is_no_schema_is_named(old: str, new: str, problem: str) -> None:
    error = refusal(old, new)
    assert problem in str(error)
    assert error.remedy == "see docs/schema.md for the form"


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"schema\.toml"):
        parse_schema(b"\xff\xfe", "schema.toml")
    with pytest.raises(SettingError, match=r"no\.toml: file: cannot be read \(No such file or directory\)"):
        load_schema(tmp_path / "no.toml")


def test_columns_have_the_types_of_their_fields(schema: Schema) -> None:
    found = {name: field.dtype.str for name, field in schema.fields.items()}
    assert found == {"id": "<i8", "at": "<i8", "paid": "<f8", "pan": "|S20", "shop": "<i8", "mode": "<i8"}


def test_limits_are_in_the_unit_of_the_column(schema: Schema) -> None:
    assert schema.fields["at"].limits() == (1_577_836_800_000, 1_893_452_400_000)
    assert schema.fields["paid"].limits() == (0.5, 100.0)
    assert schema.fields["shop"].limits() == (-5.0, np.inf)


def test_a_label_message_has_the_keys_and_the_label(schema: Schema) -> None:
    fields = schema.label_fields()
    assert list(fields) == ["id", "at", "pan", "shop", "fraud"]
    assert fields["fraud"].limits() == (0, 1)
    assert schema.label.delay_ms == 7 * 86_400_000


def batch(**columns: object) -> ColumnBatch:
    """Three rows inside the limits, with some columns replaced."""
    good = {
        "id": np.array([1, 2, 3]),
        "at": np.full(3, 1_600_000_000_000),
        "paid": np.array([0.5, 50.0, 100.0]),
        "pan": np.array([b"a", b"b", b""], "S20"),
        "shop": np.array([-5, 0, 2**62]),
        "mode": np.array([0, 1, 0]),
    }
    return ColumnBatch(good | columns, 3)


def test_limits_are_inclusive(schema: Schema) -> None:
    assert out_of_limits(schema.fields, batch()) == {}
    first_and_last = np.array([1_577_836_800_000, 1_893_452_400_000, 1_600_000_000_000])
    assert out_of_limits(schema.fields, batch(at=first_and_last)) == {}


@pytest.mark.parametrize(
    ("name", "values", "bad"),
    [
        ("paid", [0.499, 50.0, 100.001], [True, False, True]),
        ("paid", [np.nan, np.inf, -np.inf], [True, True, True]),
        ("shop", [-6, -5, 0], [True, False, False]),
        ("at", [1_577_836_799_999, 1_577_836_800_000, 1_893_452_400_001], [True, False, True]),
    ],
)
def test_offenders_are_marked_by_field(schema: Schema, name: str, values: list[float], bad: list[bool]) -> None:
    found = out_of_limits(schema.fields, batch(**{name: np.array(values)}))
    assert {field: mask.tolist() for field, mask in found.items()} == {name: bad}


def test_a_number_without_limits_must_still_be_finite() -> None:
    schema = parse_schema(GOOD.replace("minimum = 0.5\nmaximum = 100", "").encode(), "schema.toml")
    found = out_of_limits(schema.fields, batch(paid=np.array([-1e300, np.inf, np.nan])))
    assert found["paid"].tolist() == [False, True, True]


def fnv_1a(octets: bytes) -> int:
    """RFC 9923, section 2, 64 bits, as a signed integer."""
    state = 0xCBF29CE484222325
    for octet in octets:
        state = (state ^ octet) * 0x100000001B3 % 2**64
    return state - 2**64 if state >= 2**63 else state


def test_codes_of_strings_are_known_values() -> None:
    """Test vectors of the authors (http://www.isthe.com/chongo/src/fnv/test_fnv.c)."""
    found = key_codes(np.array([b"", b"a", b"foobar"]))
    assert found.view(np.uint64).tolist() == [0xCBF29CE484222325, 0xAF63DC4C8601EC8C, 0x85944171F73967E8]


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)


@given(values=st.lists(texts, min_size=1, max_size=20), more=st.integers(0, 40))
def test_codes_are_equal_for_any_length_of_the_column(values: list[str], more: int) -> None:
    octets = [value.encode() for value in values]
    width = max(1, *map(len, octets))
    found = key_codes(np.array(octets, f"S{width}"))
    assert found.tolist() == [fnv_1a(value) for value in octets]
    assert np.array_equal(found, key_codes(np.array(octets, f"S{width + more}")))
    assert np.array_equal(found[::2], key_codes(np.array(octets, f"S{width}")[::2]))
    assert len(set(found.tolist())) == len(set(octets))


def test_codes_of_integers_are_the_integers() -> None:
    keys = np.array([0, -1, 2**63 - 1, -(2**63)])
    assert np.array_equal(key_codes(keys), keys)
    assert key_codes(np.array([3, -3], np.int32)).dtype == np.int64


def test_the_fingerprint_is_of_the_content_not_of_the_layout(schema: Schema) -> None:
    assert schema.fingerprint() == parse_schema(GOOD.replace(" = ", "=").encode(), "other.toml").fingerprint()
    assert schema.fingerprint() != parse_schema(GOOD.replace("0.5", "0.25").encode(), "schema.toml").fingerprint()


@pytest.mark.parametrize("name", ["handbook", "simulator"])
def test_the_shipped_schemas_are_sound(name: str) -> None:
    schema = load_schema(SHIPPED / f"{name}.toml")
    assert (schema.name, schema.label.delay) == (name, "7d")
    assert "TX_FRAUD_SCENARIO" not in schema.fields, "it is part of the answer"
