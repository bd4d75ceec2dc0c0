"""Running totals equal totals that are added up anew, to the last bit, whatever happens to the state between rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.features import FeatureEngine, FeatureSpec, totals
from cascade.features.handles import VISIBILITY
from cascade.features.layout import TOTALS_VISIBILITY
from cascade.features.state import ticks_per_unit
from cascade.schema import Field

from .streams import (
    QUICK,
    START_MS,
    Item,
    Move,
    batch_of,
    label_of,
    moves,
    partition_of,
    play,
    random_moves,
    row_of,
    schema_of,
    spec_of,
    stream,
)
from .test_against_reference import assert_equal
from .test_batch_boundaries import in_cents

SCHEMA = schema_of("int64")
UNUSED = 7
WORDS = st.integers(0, 2**64 - 1)


# --- numbers of 128 bits ----------------------------------------------------------------------------------------


def number(words: tuple[int, int]) -> int:
    return (int(words[0]) << 64) | int(words[1])


def halves(value: int) -> tuple[np.uint64, np.uint64]:
    return np.uint64(value >> 64), np.uint64(value & (2**64 - 1))


@QUICK
@given(first=WORDS, second=WORDS)
def test_a_product_has_all_its_bits(first: int, second: int) -> None:
    assert number(totals.multiply(np.uint64(first), np.uint64(second))) == first * second


@QUICK
@given(first=st.integers(0, 2**127 - 1), second=st.integers(0, 2**127 - 1))
def test_sums_and_differences_carry(first: int, second: int) -> None:
    assert number(totals.plus(*halves(first), *halves(second))) == first + second
    larger, smaller = max(first, second), min(first, second)
    assert number(totals.minus(*halves(larger), *halves(smaller))) == larger - smaller


@QUICK
@given(values=st.lists(st.integers(-(2**51), 2**51), min_size=1, max_size=257))
def test_the_spread_of_integers_is_exact(values: list[int]) -> None:
    squares = sum(value * value for value in values)
    expected = len(values) * squares - sum(values) ** 2
    assert totals.spread(len(values), sum(values), *halves(squares)) == pytest.approx(expected, rel=1e-15)
    assert (totals.spread(len(values), sum(values), *halves(squares)) == 0.0) == (expected == 0)


@pytest.mark.parametrize(
    ("kind", "limit", "ticks_max", "ticks"),
    [
        ("float64", 100_000.0, 1 << 51, 1e10),
        ("float64", None, 1 << 51, 1e6),
        ("float64", 1e300, 1 << 51, 1e-285),
        ("float64", 0.0, 1 << 51, 1e21),
        ("int64", 5.0, 1 << 51, 1.0),
        ("int64", None, 1 << 43, 1.0),
        ("int64", 1e18, 1 << 51, 1e-3),
    ],
)
def test_ticks_are_the_smallest_that_fit(kind: Any, limit: float | None, ticks_max: int, ticks: float) -> None:
    assert ticks_per_unit(Field(type=kind, minimum=None if limit is None else 0.0, maximum=limit), ticks_max) == ticks


# --- running totals ---------------------------------------------------------------------------------------------


def compare(spec: FeatureSpec, items: list[Item], calls: list[tuple[int, str, int]]) -> FeatureEngine:
    """Fold rows one by one into an engine, and into one whose totals become invalid before each row."""
    running, anew = FeatureEngine(spec, SCHEMA), FeatureEngine(spec, SCHEMA)
    for position, item in enumerate(items):
        for _, name, partition_id in (call for call in calls if call[0] == position):
            for engine in (running, anew):
                if name == "absorb":
                    arrays = engine.export_state()
                    engine.forget(partition_id)
                    engine.absorb(arrays, [partition_id], labels=True)
                else:
                    getattr(engine, name)(partition_id)
        anew.hide(UNUSED)
        anew.show(UNUSED)
        found, expected = (play(engine, [item], partition=partition_of) for engine in (running, anew))
        assert np.array_equal(found[0], expected[0]), (position, item, running.names)
        assert np.array_equal(found[1], expected[1])
    assert running.digest(0) == anew.digest(0)
    return running


CALLS = st.lists(
    st.tuples(st.integers(0, 80), st.sampled_from(("hide", "show", "forget", "absorb")), st.integers(0, 2)), max_size=8
)


@QUICK
@given(
    drawn=moves(keys=4),
    calls=CALLS,
    keys_max=st.sampled_from((2, 100)),
    events_max=st.sampled_from((1, 2, 9, 256)),
    lateness=st.sampled_from(("0ms", "2s", "1m")),
)
def test_running_totals_equal_totals_added_up_anew(
    drawn: list[Move], calls: list[tuple[int, str, int]], keys_max: int, events_max: int, lateness: str
) -> None:
    spec = spec_of(keys_max=keys_max, events_per_key_max=events_max, events_per_key_mean=1, lateness=lateness)
    compare(spec, in_cents(stream("int64", drawn)), calls)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("keys_max", "events_max", "lateness"), [(100, 256, "2s"), (5, 20, "1m"), (100, 9, "0ms")])
def test_running_totals_of_long_streams(seed: int, keys_max: int, events_max: int, lateness: str) -> None:
    rng = np.random.default_rng(seed)
    names = ("hide", "show", "forget", "absorb")
    calls = [(int(rng.integers(250)), str(rng.choice(names)), int(rng.integers(3))) for _ in range(20)]
    spec = spec_of(keys_max=keys_max, events_per_key_max=events_max, events_per_key_mean=3, lateness=lateness)
    compare(spec, in_cents(stream("int64", random_moves(seed, 250, keys=8))), calls)


@QUICK
@given(drawn=moves(keys=3))
def test_sums_of_any_amounts_are_those_of_the_reference(drawn: list[Move]) -> None:
    assert_equal(spec_of(), "int64", in_cents(stream("int64", drawn)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("events_max", [12, 256])
def test_sums_of_any_amounts_of_long_streams_are_those_of_the_reference(seed: int, events_max: int) -> None:
    items = in_cents(stream("int64", random_moves(seed, 300, keys=3)))
    assert_equal(spec_of(events_per_key_max=events_max), "int64", items)


def has_totals(engine: FeatureEngine) -> bool:
    """Whether the totals of the first card are valid."""
    part = engine._parts[-1]
    return bool(part.state.totals[1, TOTALS_VISIBILITY] == part.handle[VISIBILITY, 0])


def fold(engine: FeatureEngine, time_ms: int, partition_id: int = 0) -> None:
    engine.update(batch_of(SCHEMA.fields, [row_of("int64", time_ms, START_MS + time_ms)]), np.array([partition_id]))


def test_totals_stay_valid_with_late_rows_and_rows_of_the_same_hidden_partition() -> None:
    """The tests above compare running totals, and not always two that are added up."""
    engine = FeatureEngine(spec_of(), SCHEMA)
    for time_ms in (0, 5_000, 2_000, 5_000):
        fold(engine, time_ms)
        assert has_totals(engine)
    engine.hide(0)
    assert not has_totals(engine)
    for time_ms in (6_000, 5_500, 60_000):
        fold(engine, time_ms)
        assert has_totals(engine), "only rows of the hidden partition see them"
    fold(engine, 61_000, partition_id=1)
    assert has_totals(engine)
    engine.hide(1)
    fold(engine, 62_000, partition_id=1)
    assert not has_totals(engine), "events of two hidden partitions"
    engine.forget(0)
    fold(engine, 63_000, partition_id=1)
    assert has_totals(engine)
    engine.forget(1)
    play(engine, [label_of(row_of("int64", 1, START_MS), 1)])
    fold(engine, 64_000, partition_id=1)
    assert has_totals(engine)
