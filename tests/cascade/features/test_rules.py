"""An example for each rule of the feature engine, with results calculated by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cascade.features import FeatureEngine

from .streams import CARD_COUNTS, START_MS, Item, batch_of, label_of, play, row_of, schema_of, spec_of

SCHEMA = schema_of("int64")


class Played:
    """An engine that folds rows one by one and returns their features by name.

    `sequence` float32 [1, length, width]: the card's, of the last row.
    """

    def __init__(self, **limits: Any) -> None:
        self.engine = FeatureEngine(spec_of(**limits), SCHEMA)
        self.number = 0

    def row(self, time_ms: int, amount: float = 10.0, **keys: Any) -> dict[str, float]:
        self.number += 1
        fields = row_of("int64", self.number, START_MS + time_ms, amount=amount, **keys)
        features, sequences = play(self.engine, [Item("row", fields)])
        length, width = self.engine.sequence_shapes["card_sequence"]
        self.sequence = sequences[:, : length * width].reshape(1, length, width)
        return dict(zip(self.engine.names, features[0].tolist(), strict=True))

    def label(self, number: int, time_ms: int, fraud: int, **keys: Any) -> None:
        play(self.engine, [label_of(row_of("int64", number, START_MS + time_ms, **keys), fraud)])


def test_aggregates_of_a_window() -> None:
    played = Played()
    played.row(0, 100.0)
    for time_ms, amount in ((1_000, 2.0), (2_000, 4.0), (3_000, 4.0), (3_000, 6.0)):
        played.row(time_ms, amount, terminal=time_ms)
    row = played.row(10_000, 8.0, terminal=2_000)
    assert row["card_count_10s"] == 5
    assert row["card_amount_sum_10s"] == 24.0
    assert row["card_amount_mean_10s"] == np.float32(4.8)
    assert row["card_amount_max_10s"] == 8.0
    assert row["card_amount_std_10s"] == np.float32(np.std([2.0, 4.0, 4.0, 6.0, 8.0]))
    assert row["card_amount_ratio_to_mean_10s"] == 2.0
    assert row["card_distinct_terminal_10s"] == 3
    assert row["card_seconds_since_last"] == 7.0
    assert row["card_count_1s"] == 1
    assert row["card_amount_ratio_to_mean_1s"] == 1.0


def test_a_first_row_counts_itself_alone() -> None:
    row = Played().row(0, 7.5)
    assert row["card_count_10s"] == row["card_distinct_terminal_10s"] == row["card_amount_ratio_to_mean_10s"] == 1.0
    assert row["card_amount_sum_10s"] == row["card_amount_mean_10s"] == row["card_amount_max_10s"] == 7.5
    assert row["card_amount_std_10s"] == 0.0
    assert row["card_seconds_since_last"] == row["terminal_seconds_since_last"] == -1.0
    assert row["terminal_fraud_rate_10s"] == row["terminal_labelled_count_10s"] == 0.0


@pytest.mark.parametrize(("age_ms", "count"), [(0, 2), (1, 2), (9_999, 2), (10_000, 1), (10_001, 1)])
def test_a_window_is_open_in_the_past_and_closed_at_the_row(age_ms: int, count: int) -> None:
    played = Played()
    played.row(0)
    assert played.row(age_ms)["card_count_10s"] == count


def test_a_negative_maximum_stays_negative() -> None:
    played = Played()
    played.row(0, -9.0)
    row = played.row(1, -5.0)
    assert row["card_amount_max_10s"] == -5.0
    assert row["card_amount_ratio_to_mean_10s"] == 1.0, "a mean that is not positive gives no ratio"


def test_spread_of_equal_large_amounts_is_zero() -> None:
    played = Played()
    for time_ms in range(50):
        row = played.row(time_ms, 99_999.99)
    assert row["card_amount_std_10s"] == 0.0
    assert row["card_amount_mean_10s"] == np.float32(99_999.99)


def test_clock_features_are_utc() -> None:
    row = Played().row(0)  # Friday 2021-01-01, 05:59:50
    assert row["hour"] == np.float32(5 + 59 / 60 + 50 / 3600)
    assert (row["weekday"], row["night"], row["weekend"]) == (4, 1, 0)
    row = Played().row(10_000)
    assert (row["hour"], row["night"]) == (6, 0)
    row = Played().row(86_400_000 - 5 * 3_600_000 - 59 * 60_000 - 50_000)
    assert (row["hour"], row["weekday"], row["night"], row["weekend"]) == (0, 5, 1, 1)


def test_one_hot_marks_the_category() -> None:
    row = Played().row(0, mode=2)
    assert (row["mode_chip"], row["mode_contactless"], row["mode_online"]) == (0, 0, 1)


def test_a_late_row_sees_its_own_past_and_is_inserted_by_its_time() -> None:
    played = Played()
    played.row(0)
    played.row(5_000)
    late = played.row(2_000)
    assert late["card_count_10s"] == 2, "the row at 5 s is later"
    assert late["card_seconds_since_last"] == 2.0
    assert played.row(6_000)["card_count_10s"] == 4
    assert played.row(11_500)["card_count_10s"] == 4, "rows at 2, 5, 6 s and itself"
    assert played.engine.statistics()["pan"].late == 1


@pytest.mark.parametrize(("late_ms", "stored"), [(16_999, 1), (17_000, 0)])
def test_a_row_older_than_the_horizon_is_scored_and_not_stored(late_ms: int, stored: int) -> None:
    """The horizon is delay 5 s + longest window 10 s + lateness 2 s."""
    played = Played()
    played.row(100_000)
    assert played.row(100_000 - late_ms)["card_count_10s"] == 1
    assert played.engine.statistics()["pan"].too_late == 1 - stored
    assert played.row(100_000 - late_ms + 1)["card_count_10s"] == 1 + stored


def test_beyond_the_limit_the_oldest_event_by_time_is_forgotten() -> None:
    played = Played(body=CARD_COUNTS, events_per_key_max=3)
    for time_ms in (1_000, 3_000, 2_000):
        played.row(time_ms)
    assert played.row(4_000)["card_count_10s"] == 4, "three stored rows and itself; then the row at 1 s is dropped"
    assert played.row(1_500)["card_count_10s"] == 1
    assert played.engine.statistics()["pan"].too_late == 1, "older than all stored rows"
    assert played.row(4_000)["card_count_10s"] == 4


def test_the_least_recently_used_key_is_forgotten_with_events_and_steps() -> None:
    played = Played(keys_max=2)
    played.row(0, card=1)
    played.row(1, card=2)
    played.row(2, card=1)
    played.row(3, card=3)
    assert played.row(4, card=1)["card_count_10s"] == 3, "card 1 was used after card 2"
    assert played.row(5, card=2)["card_count_10s"] == 1, "card 3 took the room of card 2"
    assert played.sequence[0, :, 0].tolist() == [0, 0, 1]
    assert played.engine.statistics()["pan"].evictions == 2


def test_a_label_that_comes_again_counts_once_and_zero_removes_it() -> None:
    played = Played()
    for time_ms in range(3):
        played.row(time_ms)
    for number in (1, 2, 2, 3, 1):
        played.label(number, number - 1, 1)
    assert played.row(6_000)["terminal_fraud_count_10s"] == 3
    for _ in range(2):
        played.label(2, 1, 0)
    assert played.row(6_001)["terminal_fraud_count_10s"] == 2
    played.label(2, 1, 1)
    assert played.row(6_002)["terminal_fraud_count_10s"] == 3
    assert played.row(6_003)["terminal_fraud_rate_10s"] == 1.0


def test_the_sequence_has_the_newest_rows_by_time_and_the_row_last() -> None:
    played = Played()
    for time_ms, amount in ((1_000, 1.0), (4_000, 4.0), (3_000, 3.0), (2_000, 2.0)):
        played.row(time_ms, amount)
    assert played.sequence[0, :, 2].tolist() == [0.0, 1.0, 2.0]
    assert played.sequence[0, :, 1].tolist() == [0.0, 1.0, 0.0]
    played.row(5_000, 5.0)
    assert played.sequence[0, :, 2].tolist() == [3.0, 4.0, 5.0]
    assert played.sequence[0, :, 1].tolist() == [2.0, 1.0, 0.0]
    played.row(500, 0.5)
    assert played.sequence[0, :, 0].tolist() == [0.0, 0.0, 1.0]
    played.row(5_000, 6.0)
    assert played.sequence[0, :, 2].tolist() == [4.0, 5.0, 6.0], "the row older than all steps was not stored"


def test_names_and_shapes_fit_the_results() -> None:
    engine = FeatureEngine(spec_of(), SCHEMA)
    names = "amount hour weekday night weekend mode_chip mode_contactless mode_online"
    assert engine.names[:8] == tuple(names.split())
    assert len(set(engine.names)) == engine.width
    assert engine.sequence_shapes == {"card_sequence": (3, 5), "terminal_sequence": (4, 6)}
    assert engine.categorical_names == ("mode_category",)
    found = engine.update(batch_of(SCHEMA.fields, [row_of("int64", 1, START_MS)]))
    features, sequences = found.features, found.sequences(np.array([0]))
    assert {name: part.shape for name, part in sequences.items()} == {
        "card_sequence": (1, 3, 5),
        "terminal_sequence": (1, 4, 6),
    }
    assert {part.dtype for part in (features, *sequences.values())} == {np.dtype(np.float32)}
    assert features.shape == (1, engine.width)


@pytest.mark.parametrize("size", [1e300, -1e300])
def test_numbers_beyond_float32_become_its_largest(size: float) -> None:
    played = Played()
    row = played.row(0, size)
    for name in ("amount", "card_amount_max_10s"):
        assert row[name] == np.sign(size) * float(np.finfo(np.float32).max)
    assert np.isfinite(list(row.values())).all()
    assert np.isfinite(played.sequence).all()


def test_a_value_counts_in_whole_ticks_within_the_limits_of_sums() -> None:
    """Without limits in the schema an amount has ticks of 10^-6, and a sum takes it for 2^51 ticks at most."""
    played = Played()
    for amount, counted in ((4.0, 4.0), (2e-6, 2e-6), (4e-7, 0.0), (-6e-7, -1e-6), (1e12, 2**51 / 1e6)):
        other = played.row(0, amount, card=2)
        assert other["card_amount_sum_10s"] == np.float32(counted)
        played = Played()
    played.row(0, 4e-7)
    assert played.row(1, 50.0)["card_amount_ratio_to_mean_10s"] == 1.0, "the earlier amount is no tick"


def test_a_sum_does_not_remember_what_has_left_the_window() -> None:
    played = Played()
    played.row(0, 1e9)
    played.row(1, 0.1)
    row = played.row(10_000, 0.2)
    assert row["card_amount_sum_10s"] == np.float32(0.3)
    assert row["card_amount_std_10s"] == np.float32(0.05)
    assert row["card_amount_max_10s"] == np.float32(0.2)
