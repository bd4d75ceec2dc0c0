"""Draws for groups of rows."""

import numpy as np
import pytest

from cascade.simulator.draws import (
    order_within,
    pick_columns,
    position_in_group,
    running_within,
    times_within,
    zipf,
    zipf_weights,
)


def test_groups_are_counted_summed_and_sorted_each_by_itself() -> None:
    sizes = np.array([2, 0, 3])
    assert position_in_group(sizes).tolist() == [0, 1, 0, 1, 2]
    assert running_within(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), sizes).tolist() == [1.0, 3.0, 3.0, 7.0, 12.0]
    assert order_within(np.array([5.0, 1.0, 9.0, 7.0, 8.0]), sizes).tolist() == [1, 0, 3, 4, 2]


def test_times_ascend_and_end_before_the_duration() -> None:
    sizes = np.array([5, 1, 8])
    times = times_within(np.random.default_rng(1), np.array([1_000.0, 50.0, 9e6]), sizes)
    first, second, third = np.split(times, [5, 6])
    assert (np.diff(first) >= 0).all()
    assert (np.diff(third) > 0).all()
    assert first.max() < 1_000
    assert second.max() < 50
    assert third.max() < 9e6


def test_columns_and_positions_come_with_their_probabilities() -> None:
    rng = np.random.default_rng(2)
    picked = pick_columns(rng, np.array([[0.2, 1.0], [0.7, 1.0]]), np.repeat([0, 1], 50_000))
    assert picked[:50_000].mean() == pytest.approx(0.8, abs=0.01)
    assert picked[50_000:].mean() == pytest.approx(0.3, abs=0.01)
    share = np.bincount(zipf(rng, 4, 100_000), minlength=4) / 100_000
    assert share == pytest.approx(zipf_weights(4), abs=0.01)


def test_no_groups_are_no_rows() -> None:
    empty = np.zeros(0, np.int64)
    assert len(position_in_group(empty)) == len(times_within(np.random.default_rng(1), empty * 1.0, empty)) == 0
