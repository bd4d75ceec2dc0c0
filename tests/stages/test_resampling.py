from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t
from sklearn.metrics import average_precision_score

from stages.resampling import Ranking, quantile_t, standard_errors


def test_the_average_precision_is_that_of_scikit_learn_with_ties_and_weights() -> None:
    rng = np.random.default_rng(5)
    score, fraud = np.round(rng.random(3_000), 2), rng.random(3_000) < 0.03
    for weight in (np.ones(3_000), rng.integers(0, 4, 3_000).astype(np.float64)):
        expected = average_precision_score(fraud, score, sample_weight=weight)
        assert Ranking.of(score, fraud).average_precision(weight) == pytest.approx(expected, rel=1e-12)


def test_the_average_precision_without_a_fraud_is_0() -> None:
    score = np.linspace(0, 1, 10)
    assert Ranking.of(score, np.zeros(10, bool)).average_precision(np.ones(10)) == 0.0
    assert Ranking.of(score, score > 0.5).average_precision((score <= 0.5).astype(np.float64)) == 0.0


@pytest.mark.parametrize("freedom", [3, 5, 8, 20, 200])
def test_students_quantile_is_that_of_scipy(freedom: int) -> None:
    assert quantile_t(0.95, freedom) == pytest.approx(t.ppf(0.95, freedom), rel=0.005)


def errors_of_mean(by: str, seed: int) -> float:
    """The standard error of a mean of 60 days and 80 cards, a row for each card on each day, with effects of `by`."""
    rng = np.random.default_rng(seed)
    day, card = np.repeat(np.arange(60), 80), np.tile(np.arange(80), 60)
    effects = {"day": rng.normal(size=60)[day], "card": rng.normal(size=80)[card], "neither": 0.0}
    value = rng.normal(size=len(day)) + effects[by]
    errors, _ = standard_errors(lambda weight: np.array([weight @ value / weight.sum()]), day, card, 200, seed)
    return float(errors[0])


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("day", np.sqrt(1 / 60 + 1 / 4_800)),
        ("card", np.sqrt(1 / 80 + 1 / 4_800)),
        # the larger of two noisy variances, where neither is large
        ("neither", 1.2 * np.sqrt(1 / 4_800)),
    ],
)
def test_the_standard_error_has_the_effects_of_days_and_of_cards(by: str, expected: float) -> None:
    found = float(np.mean([errors_of_mean(by, seed) for seed in range(8)]))
    assert found == pytest.approx(expected, rel=0.3)
    if by != "neither":
        assert found > 5 * np.sqrt(1 / 4_800)
