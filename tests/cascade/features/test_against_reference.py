"""The engine equals a plain reference on any stream, to the last bit of each feature (float32)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.features import FeatureEngine, FeatureSpec

from .reference import Reference
from .streams import (
    CARD_COUNTS,
    EVERYTHING,
    KEY_KINDS,
    QUICK,
    Item,
    KeyKind,
    Move,
    label_of,
    moves,
    play,
    play_reference,
    random_moves,
    rows_of,
    schema_of,
    spec_of,
    stream,
)


def assert_equal(spec: FeatureSpec, kind: KeyKind, items: Sequence[Item]) -> FeatureEngine:
    """Fold the stream with both; fails with the first row and column that differ."""
    schema = schema_of(kind)
    engine, reference = FeatureEngine(spec, schema), Reference(spec, schema)
    assert engine.names == reference.names
    features, sequences = play(engine, items)
    expected, expected_sequences = play_reference(reference, items)
    rows = rows_of(items)
    assert len(features) == len(rows)
    for row, column in np.argwhere(features != expected.reshape(features.shape)):
        pytest.fail(
            f"row {row} {rows[row]}: {engine.names[column]} is {features[row, column]}, "
            f"the reference has {expected[row, column]}"
        )
    for row in np.flatnonzero((sequences != expected_sequences.reshape(sequences.shape)).any(axis=1)):
        pytest.fail(f"row {row} {rows[row]}: sequences {sequences[row]}, the reference has {expected_sequences[row]}")
    assert engine.statistics() == reference.statistics()
    return engine


@pytest.mark.parametrize("kind", KEY_KINDS)
@QUICK
@given(drawn=moves(keys=3))
def test_any_stream_over_few_keys_gives_what_the_reference_gives(kind: KeyKind, drawn: list[Move]) -> None:
    assert_equal(spec_of(), kind, stream(kind, drawn))


@QUICK
@given(drawn=moves(keys=4), events_max=st.sampled_from((1, 2, 7, 8, 9, 17)))
def test_keys_with_more_events_than_the_limit_give_what_the_reference_gives(drawn: list[Move], events_max: int) -> None:
    assert_equal(spec_of(events_per_key_max=events_max), "int64", stream("int64", drawn))


@pytest.mark.parametrize("kind", KEY_KINDS)
@QUICK
@given(drawn=moves(keys=8), keys_max=st.integers(1, 8))
def test_more_keys_than_the_limit_give_what_the_reference_gives(
    kind: KeyKind, drawn: list[Move], keys_max: int
) -> None:
    assert_equal(spec_of(keys_max=keys_max), kind, stream(kind, drawn))


@QUICK
@given(
    drawn=moves(keys=6),
    keys_max=st.integers(1, 4),
    events_mean=st.integers(1, 5),
    lateness=st.sampled_from(("0ms", "2s", "40s")),
)
def test_a_pool_too_small_for_the_events(drawn: list[Move], keys_max: int, events_mean: int, lateness: str) -> None:
    spec = spec_of(keys_max=keys_max, events_per_key_mean=events_mean, lateness=lateness)
    assert_equal(spec, "int64", stream("int64", drawn))


@pytest.mark.parametrize("kind", KEY_KINDS)
@pytest.mark.parametrize(
    ("keys_max", "events_max", "events_mean", "lateness"),
    [
        (100, 256, 32, "2s"),
        (100, 5, 5, "2s"),
        (3, 256, 1, "2s"),
        (7, 40, 3, "1m"),
        (1, 256, 9, "1m"),
        (11, 256, 1, "10m"),
    ],
)
def test_long_streams(kind: KeyKind, keys_max: int, events_max: int, events_mean: int, lateness: str) -> None:
    spec = spec_of(EVERYTHING, keys_max, events_max, events_mean, lateness)
    for seed in range(3):
        assert_equal(spec, kind, stream(kind, random_moves(seed, 150, keys=12)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("keys_max", "events_max"), [(2, 256), (5, 256), (12, 20)])
def test_long_streams_of_frauds_alone(seed: int, keys_max: int, events_max: int) -> None:
    """The pool of frauds runs out; it is small, since frauds are rare."""
    rows = [item for item in stream("int64", random_moves(seed, 150, keys=6)) if item.kind == "row"]
    items = [message for row in rows for message in (row, label_of(row.fields, 1))]
    assert_equal(spec_of(EVERYTHING, keys_max, events_max, 1, "2s"), "int64", items)


def test_a_pool_too_small_evicts_in_the_long_streams() -> None:
    """The tests above reach their limits."""
    spec = spec_of(EVERYTHING, 11, 256, 1, "10m")
    engine = assert_equal(spec, "int64", stream("int64", random_moves(0, 150, keys=12)))
    figures = engine.statistics()["pan"]
    assert figures.evictions > 20
    assert figures.keys < 11
    assert figures.late > 20


@QUICK
@given(drawn=moves(keys=12), keys_max=st.integers(1, 12))
def test_no_labels_and_no_fields_in_the_sequence(drawn: list[Move], keys_max: int) -> None:
    items = [item for item in stream("int64", drawn) if item.kind == "row"]
    assert_equal(spec_of(CARD_COUNTS, keys_max=keys_max), "int64", items)
