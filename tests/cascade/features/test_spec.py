"""Feature files: an error names file, key, value and remedy, on a line of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import cascade
from cascade.errors import SettingError
from cascade.features import FeatureEngine, load_spec, parse_spec
from cascade.features.plan import resolve
from cascade.features.spec import LabelFunction, TransactionFunction, WindowFunction
from cascade.schema import load_schema

from .streams import START_MS, Item, play, row_of, schema_of, spec_of

SCHEMA = schema_of("int64")
SHIPPED = Path(cascade.__file__).parent / "schemas"
REFERENCE_PAGE = Path(cascade.__file__).parents[1] / "docs" / "features.md"
GOOD = """
version = 2
lateness = "1h"
[limits]
keys_max = 100
events_per_key_max = 20
events_per_key_mean = 10
[[transaction]]
functions = ["value", "hour"]
[[window]]
key = "card"
functions = ["count", "distinct"]
windows = ["1d", "7d"]
[[label_window]]
key = "terminal"
functions = ["fraud_rate"]
windows = ["7d"]
[[sequence]]
key = "card"
length = 16
fields = ["amount", "terminal_fraud_rate_7d"]
"""


def refusal(old: str, new: str) -> SettingError:
    """The error that GOOD gives with `old` replaced by `new`."""
    assert old in GOOD
    with pytest.raises(SettingError) as caught:
        FeatureEngine(parse_spec(GOOD.replace(old, new, 1).encode(), "features.toml"), SCHEMA)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("features.toml: ")
    assert caught.value.remedy in text
    return caught.value


def test_the_example_file_is_accepted() -> None:
    engine = FeatureEngine(parse_spec(GOOD.encode(), "features.toml"), SCHEMA)
    assert engine.names == (
        "amount",
        "hour",
        "terminal_fraud_rate_7d",
        "card_count_1d",
        "card_count_7d",
        "card_distinct_terminal_1d",
        "card_distinct_terminal_7d",
    )


@pytest.mark.parametrize(("old", "new", "key", "value", "remedy"), [
    ("version = 2", "version = 3", "version", 3, "use 2"),
    ("version = 2", "version = 1", "version", 1, "set version = 2, and write [[sequence]] in place of [sequence]"),
    ("version = 2", 'version = "1"', "version", "1", "use 2"),
    ("version = 2", "", "version", None, "use 2"),
    ("[[sequence]]", "[sequence]", "sequence", None, "write [[sequence]] in place of [sequence]"),
    ('[[sequence]]', '[[sequence]]\nkey = "pan"\nlength = 1\nfields = []\n[[sequence]]', "sequence", "pan", "one for"),
    ("keys_max = 100", "keys_max = 0", "limits.keys_max", 0, "use 1 to 100000000"),
    ("keys_max = 100", "keys_max = 100000001", "limits.keys_max", 100_000_001, "use 1 to 100000000"),
    ("events_per_key_max = 20", "events_per_key_max = 0", "limits.events_per_key_max", 0, "use 1 to 65536"),
    ("events_per_key_max = 20", "events_per_key_max = 65537", "limits.events_per_key_max", 65_537, "use 1 to 65536"),
    ("events_per_key_mean = 10", "events_per_key_mean = 21", "limits.events_per_key_mean", 21, "use 1 to 20"),
    ("length = 16", "length = 0", "sequence[0].length", 0, "use 1 to 20"),
    ("length = 16", "length = 21", "sequence[0].length", 21, "limits.events_per_key_max"),
    ("events_per_key_max = 20", "events_per_key_max = 15", "sequence[0].length", 16, "use 1 to 15"),
    ('lateness = "1h"', 'lateness = "soon"', "lateness", "soon", 'write "7d"'),
    ('"1d", "7d"', '"1d", "7 days"', "window[0].windows", "7 days", 'write "7d"'),
    ('"1d", "7d"', '"0d"', "window[0].windows", "0d", "use 1 ms to"),
    ('"1d", "7d"', "", "window[0].windows", None, "give windows such as"),
    ('"1d", "7d"', '"999999999999999999d"', "window[0].windows", "999999999999999999d", ""),
    ('windows = ["7d"]', 'windows = ["7w"]', "label_window[0].windows", "7w", 'write "7d"'),
    ('key = "card"', 'key = "merchant"', "window[0].key", "merchant", "use one of amount, at, card"),
    ('key = "card"', 'key = "amount"', "window[0].key", "amount", "it takes int64 or string or category"),
    ('key = "card"', 'key = "card"\nfield = "price"', "window[0].field", "price", "use one of"),
    ('key = "card"', 'key = "card"\nfield = "mode"', "window[0].field", "mode", "it takes float64 or int64"),
    ('key = "card"', 'key = "card"\ndistinct_field = "shops"', "window[0].distinct_field", "shops", "use one of"),
    ('key = "card"', 'key = "card"\ndistinct_field = "amount"', "window[0].distinct_field", "amount", "it takes"),
    ('"value", "hour"]', '"value"]\nfield = "price"', "transaction[0].field", "price", "use one of"),
    ('"value", "hour"]', '"value"]\nfield = "mode"', "transaction[0].field", "mode", "it takes float64 or int64"),
    ('"value", "hour"]', '"one_hot"]', "transaction[0].field", "amount", "it takes category"),
    ('"value", "hour"]', '"category"]', "transaction[0].field", "amount", "it takes category"),
    ('"value", "hour"]', '"bucket"]', "transaction[0].buckets", 0, "use 2 to 16777216"),
    ('"value", "hour"]', '"bucket"]\nbuckets = 16_777_217', "transaction[0].buckets", 16_777_217, "use 2 to 16777216"),
    ('"value", "hour"]', '"bucket"]\nbuckets = 9', "transaction[0].field", "amount", "it takes int64 or string"),
    ('"count", "distinct"', '"seen"]\ndistinct_field = "shops"\n#', "window[0].distinct_field", "shops", "use one"),
    ('"value", "hour"', '"value", "hour", "hour"', "features", "hour", "remove one"),
    ('"1d", "7d"', '"1d", "1d"', "features", "card_count_1d", "remove one"),
    ('"amount", "terminal_fraud_rate_7d"', '"amount", "card_mean"', "sequence[0].fields", "card_mean", "use some of"),
    ('[[sequence]]\nkey = "card"', '[[sequence]]\nkey = "price"', "sequence[0].key", "price", "use one of"),
])  # fmt: skip
def test_a_setting_that_does_not_fit_is_named(old: str, new: str, key: str, value: object, remedy: str) -> None:
    error = refusal(old, new)
    assert (error.key, error.value) == (key, value)
    assert remedy in error.remedy


@pytest.mark.parametrize(("old", "new", "problem"), [
    ("version = 2", "version = ", "Invalid value"),
    ("version = 2", "version = 2\nlatness = 3", "unknown field `latness`"),
    ("version = 2", 'version = 2\n"a\\nb" = 1', "unknown field"),
    ("keys_max", "key_max", "unknown field `key_max`"),
    ("[[window]]", "[[windows]]", "unknown field `windows`"),
    ("[[window]]", "[window]", "Expected `array`"),
    ('"count", "distinct"', '"count", "median"', "Invalid enum value 'median'"),
    ('"fraud_rate"', '"rate"', "Invalid enum value 'rate'"),
    ('key = "terminal"', 'key = "shop"', "Invalid enum value 'shop'"),
    ("[[sequence]]", "[[sequences]]", "sequence"),
])  # fmt: skip
def test_the_problem_of_a_broken_feature_file_is_named(old: str, new: str, problem: str) -> None:
    error = refusal(old, new)
    assert problem in str(error)
    assert error.remedy == "see docs/features.md for the form"


def test_a_file_that_is_no_text_is_refused() -> None:
    with pytest.raises(SettingError):
        parse_spec(b"\xff\xfe", "features.toml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"no\.toml: file: cannot be read \(No such file or directory\)"):
        load_spec(tmp_path / "no.toml")


@pytest.mark.parametrize("schema", ["handbook", "simulator"])
def test_the_shipped_file_fits_the_shipped_schemas(schema: str) -> None:
    spec = load_spec(SHIPPED / "features.toml")
    plan = resolve(spec, load_schema(SHIPPED / f"{schema}.toml"))
    assert plan.keys[-1] == plan.partition_key
    assert [sequence.name for sequence in plan.sequences] == ["card_sequence"]
    assert len(set(plan.names)) == len(plan.names)


def test_a_sequence_of_256_steps_is_the_longest() -> None:
    text = GOOD.replace("events_per_key_max = 20", "events_per_key_max = 1_000")
    longest = parse_spec(text.replace("length = 16", "length = 256").encode(), "features.toml")
    assert FeatureEngine(longest, SCHEMA).sequence_shapes == {"card_sequence": (256, 4)}
    with pytest.raises(SettingError, match=r"sequence\[0\]\.length = 257: out of range; use 1 to 256"):
        parse_spec(text.replace("length = 16", "length = 257").encode(), "features.toml")


def test_a_file_without_a_sequence_is_refused() -> None:
    text = GOOD[: GOOD.index("[[sequence]]")].replace("lateness", "sequence = []\nlateness", 1)
    with pytest.raises(SettingError, match=r"declare at least one \[\[sequence\]\]"):
        parse_spec(text.encode(), "features.toml")


def test_the_fingerprint_depends_on_the_content_not_on_the_layout() -> None:
    spec = parse_spec(GOOD.encode(), "a.toml")
    other = parse_spec(("# a comment\n" + GOOD.replace(" = ", "=")).encode(), "b.toml")
    assert spec.fingerprint() == other.fingerprint()
    assert spec.fingerprint() != parse_spec(GOOD.replace('"7d"', '"8d"').encode(), "a.toml").fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", spec.fingerprint())


def test_the_reference_page_has_an_example_that_works_its_columns_its_bytes_and_every_function() -> None:
    page = REFERENCE_PAGE.read_text(encoding="utf-8")
    block = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    listed = re.search(r"gives, in this order,\n\n((?:`\w+`,?\s)+)", page)
    total = re.search(r"`state_bytes_max\(\)`[^.]*?([\d,]+) bytes", page)
    assert block
    assert listed
    assert total
    spec = parse_spec(block[1].encode(), str(REFERENCE_PAGE))
    engine = FeatureEngine(spec, load_schema(SHIPPED / "simulator.toml"))
    assert tuple(re.findall(r"`(\w+)`", listed[1])) == engine.names
    assert int(total[1].replace(",", "")) == engine.state_bytes_max()
    functions = (TransactionFunction, WindowFunction, LabelFunction)
    for name in (name for function in functions for name in get_args(function)):
        assert f"\n| `{name}`" in page, name


def test_state_is_bounded_by_the_limits() -> None:
    small = FeatureEngine(spec_of(keys_max=10), SCHEMA).state_bytes_max()
    assert FeatureEngine(spec_of(keys_max=1_000), SCHEMA).state_bytes_max() < 200 * small
    engine = FeatureEngine(spec_of(keys_max=10), SCHEMA)
    features, _ = play(engine, [Item("row", row_of("int64", 1, START_MS))])
    assert np.isfinite(features).all()
    assert engine.state_bytes_max() == small
