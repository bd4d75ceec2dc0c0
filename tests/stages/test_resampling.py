"""Standard errors by resampling days and cards: they cover what independent samples show."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t
from sklearn.metrics import average_precision_score

from stages.resampling import Ranking, quantile_t, standard_errors

tenths = st.integers(0, 10).map(lambda number: number / 10)


@given(st.lists(st.tuples(tenths, st.booleans(), st.integers(0, 3)), min_size=1, max_size=40))
def test_average_precision_is_that_of_scikit_learn_for_any_weights(rows: list[tuple[float, bool, int]]) -> None:
    score, fraud, weight = (np.array(column) for column in zip(*rows, strict=True))
    weight = weight.astype(np.float64)
    found = Ranking.of(score, fraud).average_precision(weight)
    if weight[fraud].sum() == 0:
        assert found == 0.0
    else:
        assert found == pytest.approx(average_precision_score(fraud, score, sample_weight=weight))


@pytest.mark.parametrize(("freedom", "error_max"), [(1, 0.25), (2, 0.04), (3, 0.01), (5, 2e-3), (30, 1e-5)])
def test_students_quantile_is_right_from_a_few_degrees_of_freedom_on(freedom: int, error_max: float) -> None:
    exact = float(t.ppf(0.975, freedom))
    assert quantile_t(0.975, freedom) == pytest.approx(exact, rel=error_max)


def mean_of(values: np.ndarray, day: np.ndarray, card: np.ndarray) -> tuple[float, int]:
    errors, freedom = standard_errors(
        lambda weight: np.array([(weight * values).sum() / weight.sum()]), day, card, replicates=200, seed=1
    )
    return float(errors[0]), freedom


@pytest.mark.parametrize("shared_by", ["nothing", "cards", "days"])
def test_the_standard_error_of_a_mean_is_known_whatever_rows_share(shared_by: str) -> None:
    rows, days, cards = 8_000, 84, 200
    chance = np.random.default_rng(2)
    day, card = np.arange(rows) * days // rows, chance.integers(cards, size=rows)
    own = chance.standard_normal(rows)
    if shared_by == "nothing":
        values, expected = own, 1.0 / np.sqrt(rows)
    elif shared_by == "cards":
        values, expected = own + 2.0 * chance.standard_normal(cards)[card], 2.0 / np.sqrt(cards)
    else:
        values, expected = own + 2.0 * chance.standard_normal(days)[day], 2.0 / np.sqrt(days)
    error, freedom = mean_of(values, day, card)
    assert 0.7 * expected < error < 1.5 * expected
    assert freedom == days // 7 - 1


@pytest.mark.parametrize(("days", "freedom"), [(1, 1), (4, 3), (12, 3), (28, 3), (70, 9)])
def test_a_short_span_has_shorter_blocks(days: int, freedom: int) -> None:
    chance = np.random.default_rng(3)
    day = np.repeat(np.arange(days), 40)
    error, found = mean_of(chance.standard_normal(len(day)), day, chance.integers(20, size=len(day)))
    assert found == freedom
    assert 0.0 < error < 10.0


def test_the_same_seed_gives_the_same_errors() -> None:
    values, day, card = np.arange(100.0), np.arange(100) // 10, np.arange(100) % 7
    assert mean_of(values, day, card) == mean_of(values, day, card)


def test_the_average_precision_without_a_fraud_is_0() -> None:
    score = np.linspace(0, 1, 10)
    assert Ranking.of(score, np.zeros(10, bool)).average_precision(np.ones(10)) == 0.0
    assert Ranking.of(score, score > 0.5).average_precision((score <= 0.5).astype(np.float64)) == 0.0
