"""Gains against brute force: one row moves, and scikit-learn computes the average precision again."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from stages.escalation.gains import GainTable, gains

ROWS = 400


def world(seed: int, fraud_share: float = 0.08) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores, others to move to, and frauds, of which both scores know something."""
    chance = np.random.default_rng(seed)
    fraud = chance.random(ROWS) < fraud_share
    score = chance.standard_normal(ROWS) + 1.2 * fraud
    moved = score + chance.standard_normal(ROWS) + np.where(fraud, 0.8, -0.2)
    return score, moved, fraud


def by_brute_force(score: np.ndarray, moved: np.ndarray, fraud: np.ndarray) -> np.ndarray:
    before = average_precision_score(fraud, score)
    found = np.empty(len(score))
    for row in range(len(score)):
        alone = score.copy()
        alone[row] = moved[row]
        found[row] = fraud.sum() * (average_precision_score(fraud, alone) - before)
    return found


def estimated(score: np.ndarray, moved: np.ndarray, fraud: np.ndarray) -> np.ndarray:
    return gains(GainTable.of(score, fraud, np.ones(len(score))), score, moved, fraud)


@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_is_the_change_of_average_precision_to_first_order(seed: int) -> None:
    score, moved, fraud = world(seed)
    exact, estimate = by_brute_force(score, moved, fraud), estimated(score, moved, fraud)
    for kind in (fraud, ~fraud):
        assert np.corrcoef(exact[kind], estimate[kind])[0, 1] > 0.94
    # among the first rows one row more or less is much; a fraud at the top counts 1
    assert np.abs(exact - estimate).max() < 1.0
    table = GainTable.of(score, fraud, np.ones(ROWS))
    beyond = (table.rows_above(score) >= 20) & (table.rows_above(moved) >= 20)
    error = np.abs(exact - estimate)[beyond]
    assert beyond.sum() > 300
    assert error.max() < 0.01
    assert error.mean() < 0.02 * np.abs(exact[beyond]).mean()


def test_a_rising_fraud_gains_exactly_that_much() -> None:
    score, moved, fraud = world(7)
    moved = np.maximum(moved, score)
    exact, estimate = by_brute_force(score, moved, fraud), estimated(score, moved, fraud)
    np.testing.assert_allclose(estimate[fraud], exact[fraud], atol=1e-12)
    assert exact[fraud].max() > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_no_gain_has_the_wrong_sign(seed: int) -> None:
    score, moved, fraud = world(seed)
    estimate, exact = estimated(score, moved, fraud), by_brute_force(score, moved, fraud)
    helps = fraud == (moved > score)
    assert (estimate[helps] >= 0).all()
    assert (estimate[~helps] <= 0).all()
    # both say of the same moves that they pass no fraud, or no row
    np.testing.assert_array_equal(np.abs(estimate) > 1e-12, np.abs(exact) > 1e-12)
    for kind in (fraud, ~fraud):
        assert (estimate[kind] > 0).any()
        assert (estimate[kind] < 0).any()


def test_a_row_that_stays_gains_nothing() -> None:
    score, _, fraud = world(1)
    assert not estimated(score, score, fraud).any()


def test_below_the_last_fraud_a_genuine_row_gains_nothing_and_a_fraud_does() -> None:
    score, fraud = np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, False, False])
    assert estimated(score, np.array([4.0, 2.5, 0.0, 3.5]), fraud).tolist() == [0.0] * 4
    falling = estimated(score, np.array([0.0, 3.0, 2.0, 1.0]), fraud)
    assert falling[0] < 0


def test_a_weight_stands_for_so_many_rows() -> None:
    score, moved, fraud = world(3)
    weight = np.where(fraud, 1.0, 3.0)
    copies = np.repeat(np.arange(ROWS), weight.astype(int))
    weighted = gains(GainTable.of(score, fraud, weight), score, moved, fraud)
    repeated = gains(GainTable.of(score[copies], fraud[copies], np.ones(len(copies))), score, moved, fraud)
    np.testing.assert_allclose(weighted, repeated, atol=1e-9)


def test_the_number_of_rows_above_counts_no_equal_ones() -> None:
    table = GainTable.of(np.array([0.5, 0.9, 0.5, 0.1]), np.array([True, False, False, True]), np.ones(4))
    assert table.rows_above(np.array([1.0, 0.9, 0.7, 0.5, 0.1, 0.0])).tolist() == [0, 0, 1, 1, 3, 4]
