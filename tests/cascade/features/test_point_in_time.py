"""No row sees a later row, or a label before it is due."""

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
    schema_of,
    spec_of,
    stream,
)

DELAY_MS = 5_000
SCHEMA = schema_of("int64")


@settings(deadline=None, max_examples=80)
@given(drawn=moves(keys=3), other=moves(keys=3), data=st.data())
def test_later_rows_change_no_earlier_row_of_the_same_batch(
    drawn: list[Move], other: list[Move], data: st.DataObject
) -> None:
    rows = [item for item in stream("int64", drawn) if item.kind == "row"]
    others = [item for item in stream("int64", other) if item.kind == "row"]
    shared = data.draw(st.integers(0, len(rows)))
    spec = spec_of(keys_max=2, events_per_key_mean=1)
    first = play(FeatureEngine(spec, SCHEMA), rows)
    second = play(FeatureEngine(spec, SCHEMA), rows[:shared] + others)
    assert np.array_equal(first[0][:shared], second[0][:shared])
    assert np.array_equal(first[1][:shared], second[1][:shared])


@settings(deadline=None, max_examples=80)
@given(drawn=moves(keys=3))
def test_labels_that_are_not_due_change_nothing(drawn: list[Move]) -> None:
    """A label follows its row at once, if it is not due at any later row. No row may see it."""
    items = stream("int64", drawn)
    rows = [item for item in items if item.kind == "row"]
    labelled: list[Item] = []
    for position, item in enumerate(rows):
        labelled.append(item)
        last_ms = max((later.fields["at"] for later in rows[position + 1 :]), default=item.fields["at"])
        if last_ms < item.fields["at"] + DELAY_MS:
            labelled.append(label_of(item.fields, 1))
    with_labels, without = (play(FeatureEngine(spec_of(), SCHEMA), part) for part in (labelled, rows))
    np.testing.assert_equal(with_labels, without)


@settings(deadline=None, max_examples=80)
@given(drawn=moves(keys=3), data=st.data())
def test_a_label_that_comes_early_counts_like_one_that_comes_when_due(drawn: list[Move], data: st.DataObject) -> None:
    """All labels come right after their rows, or just before the first row that may see them."""
    rows = sorted((item for item in stream("int64", drawn) if item.kind == "row"), key=lambda item: item.fields["at"])
    fraud = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    early: list[Item] = []
    late: list[Item] = []
    waiting: list[Item] = []
    for item, is_fraud in zip(rows, fraud, strict=True):
        label = label_of(item.fields, int(is_fraud))
        early += [item, label]
        due = [waited for waited in waiting if waited.fields["at"] + DELAY_MS <= item.fields["at"]]
        waiting = [waited for waited in waiting if waited not in due] + [label]
        late += [*due, item]
    np.testing.assert_equal(play(FeatureEngine(spec_of(), SCHEMA), early), play(FeatureEngine(spec_of(), SCHEMA), late))


@pytest.mark.parametrize(
    ("age_ms", "frauds"), [(DELAY_MS - 1, 0), (DELAY_MS, 1), (DELAY_MS + 999, 1), (DELAY_MS + 1_000, 0)]
)
def test_a_fraud_counts_from_the_delay_on_until_the_window_ends(age_ms: int, frauds: int) -> None:
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
