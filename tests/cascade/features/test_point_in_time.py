"""No row sees what comes after it, nor a label before its day."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.features import FeatureEngine

from .streams import (
    START_MS,
    Item,
    Move,
    label_of,
    moves,
    play,
    row_of,
    rows_of,
    schema_of,
    spec_of,
    stream,
)

DELAY_MS = 5_000
SCHEMA = schema_of("int64")


@settings(deadline=None, max_examples=80)
@given(found=moves(keys=3), other=moves(keys=3), data=st.data())
def test_later_rows_change_no_earlier_row_of_the_same_batch(
    found: list[Move], other: list[Move], data: st.DataObject
) -> None:
    rows = [item for item in stream("int64", found) if item.kind == "row"]
    others = [item for item in stream("int64", other) if item.kind == "row"]
    kept = data.draw(st.integers(0, len(rows)))
    spec = spec_of(keys_max=2, events_per_key_mean=1)
    first = play(FeatureEngine(spec, SCHEMA), rows)
    second = play(FeatureEngine(spec, SCHEMA), rows[:kept] + others)
    assert np.array_equal(first[0][:kept], second[0][:kept])
    assert np.array_equal(first[1][:kept], second[1][:kept])


@settings(deadline=None, max_examples=80)
@given(found=moves(keys=3))
def test_labels_told_before_they_are_due_change_nothing(found: list[Move]) -> None:
    """Every row's label is told at once; those not due at any later row must not be seen."""
    items = stream("int64", found)
    rows = [item for item in items if item.kind == "row"]
    told: list[Item] = []
    for position, item in enumerate(rows):
        told.append(item)
        last_ms = max((later.fields["at"] for later in rows[position + 1 :]), default=item.fields["at"])
        if last_ms < item.fields["at"] + DELAY_MS:
            told.append(label_of(item.fields, 1))
    without, with_labels = play(FeatureEngine(spec_of(), SCHEMA), rows), play(FeatureEngine(spec_of(), SCHEMA), told)
    assert np.array_equal(without[0], with_labels[0])
    assert np.array_equal(without[1], with_labels[1])


@settings(deadline=None, max_examples=80)
@given(found=moves(keys=3), data=st.data())
def test_a_label_told_early_is_as_good_as_one_told_on_its_day(found: list[Move], data: st.DataObject) -> None:
    """All frauds told right after their rows, or just before the first row that may see them."""
    rows = sorted((item for item in stream("int64", found) if item.kind == "row"), key=lambda item: item.fields["at"])
    fraud = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    early: list[Item] = []
    late: list[Item] = []
    waiting: list[Item] = []
    for item, is_fraud in zip(rows, fraud, strict=True):
        label = label_of(item.fields, int(is_fraud))
        early += [item, label]
        due = [told for told in waiting if told.fields["at"] + DELAY_MS <= item.fields["at"]]
        waiting = [told for told in waiting if told not in due] + [label]
        late += [*due, item]
    first, second = play(FeatureEngine(spec_of(), SCHEMA), early), play(FeatureEngine(spec_of(), SCHEMA), late)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


@pytest.mark.parametrize(("age_ms", "frauds"), [
    (DELAY_MS - 1, 0), (DELAY_MS, 1), (DELAY_MS + 999, 1), (DELAY_MS + 1_000, 0),
])  # fmt: skip
def test_a_fraud_shows_from_the_delay_on_until_the_window_ends(age_ms: int, frauds: int) -> None:
    fraud = row_of("int64", 1, START_MS)
    engine = FeatureEngine(spec_of(), SCHEMA)
    features, _ = play(
        engine, [Item("row", fraud), label_of(fraud, 1), Item("row", row_of("int64", 2, START_MS + age_ms))]
    )
    row = dict(zip(engine.names, features[1].tolist(), strict=True))
    assert row["terminal_fraud_count_1s"] == frauds
    assert row["terminal_labelled_count_1s"] == frauds
    assert row["terminal_fraud_rate_1s"] == frauds
    assert row["card_fraud_rate_10s"] == (age_ms >= DELAY_MS)


def test_the_label_of_a_row_is_no_part_of_its_own_features() -> None:
    fraud = row_of("int64", 1, START_MS)
    items = [label_of(fraud, 1), Item("row", fraud)]
    engine, other = FeatureEngine(spec_of(), SCHEMA), FeatureEngine(spec_of(), SCHEMA)
    assert np.array_equal(play(engine, items)[0], play(other, items[1:])[0])
    assert len(rows_of(items)) == 1
