from __future__ import annotations

import numpy as np
import pytest

from cascade.errors import DataError
from cascade.policy import Costs, Policy
from stages.calibration import FRAUDS_MIN, calibrate, fit_calibration

ROWS = 40_000


def drawn(slope: float, intercept: float, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Raw scores, and frauds that are drawn with the probability that slope and intercept give them."""
    chance = np.random.default_rng(seed)
    raw = chance.normal(-2.0, 2.0, ROWS)
    return raw, chance.random(ROWS) < 1 / (1 + np.exp(-(slope * raw + intercept)))


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.5, -1.0), (2.0, 1.5)])
def test_slope_and_intercept_are_found_again(slope: float, intercept: float) -> None:
    found = fit_calibration(*drawn(slope, intercept))
    assert found.slope == pytest.approx(slope, rel=0.1)
    assert found.intercept == pytest.approx(intercept, abs=0.15)


def test_calibrated_probabilities_add_up_to_the_frauds() -> None:
    raw, fraud = drawn(0.7, -1.0)
    probability = fit_calibration(raw, fraud).probability(raw)
    # true at the maximum of an unpenalised likelihood, and only there
    assert probability.sum() == pytest.approx(fraud.sum(), rel=1e-3)


def test_no_penalty_pulls_the_slope_to_nought() -> None:
    raw, fraud = drawn(1.0, 0.0)
    small = fit_calibration(raw / 1_000, fraud)
    assert small.slope == pytest.approx(1_000 * fit_calibration(raw, fraud).slope, rel=0.01)


@pytest.mark.parametrize("frauds", [0, 1, FRAUDS_MIN - 1, 1_000 - FRAUDS_MIN + 1, 1_000])
def test_too_few_of_either_kind_are_refused(frauds: int) -> None:
    fraud = np.arange(1_000) < frauds
    with pytest.raises(DataError, match=f"has {frauds} frauds in 1000 transactions"):
        fit_calibration(np.linspace(3, -3, 1_000), fraud)


def test_as_many_as_needed_are_accepted() -> None:
    raw = np.random.default_rng(1).normal(size=1_000)
    raw[:FRAUDS_MIN] += 2
    assert fit_calibration(raw, np.arange(1_000) < FRAUDS_MIN).slope > 0


def test_a_model_that_learned_nothing_is_refused() -> None:
    raw, fraud = drawn(1.0, 0.0)
    with pytest.raises(DataError, match="learned nothing"):
        fit_calibration(-raw, fraud)


@pytest.mark.parametrize("budget", [0.001, 0.01, 0.1, 0.5])
def test_no_more_than_the_budget_is_escalated(budget: float) -> None:
    raw, fraud = drawn(1.0, 0.0)
    tied = np.round(raw, 1)
    for scores in (raw, tied):
        policy = calibrate(scores, raw, fraud, np.full(ROWS, 50.0), budget, Costs())
        assert policy.escalate(scores).mean() <= budget
    assert calibrate(raw, raw, fraud, np.full(ROWS, 50.0), budget, Costs()).escalate(raw).mean() > 0.9 * budget


def test_escalated_rows_are_judged_by_the_deep_model() -> None:
    raw, fraud = drawn(1.0, 0.0)
    oracle = np.where(fraud, 4.0, -4.0) + np.random.default_rng(2).normal(size=ROWS)
    amount, costs = np.full(ROWS, 100.0), Costs()
    policy = calibrate(raw, oracle, fraud, amount, 0.2, costs)
    blind = calibrate(raw, raw, fraud, amount, 0.2, costs)

    def cost(policy: Policy, deep: np.ndarray) -> float:
        probability = np.where(policy.escalate(raw), policy.deep.probability(deep), policy.screener.probability(raw))
        return float(costs.of_decisions(policy.actions(probability), fraud, amount).mean())

    assert cost(policy, oracle) < 0.8 * cost(blind, raw)


def test_rows_of_which_the_screener_is_certain_are_not_escalated() -> None:
    chance = np.random.default_rng(3)
    raw, fraud = drawn(1.0, 0.0)
    # the highest scores are all frauds; the deep model separates frauds from genuine rows only among the others
    certain = np.arange(ROWS) < ROWS // 20
    raw, fraud = np.where(certain, 20.0 + chance.random(ROWS), raw), fraud | certain
    oracle = np.where(certain, 20.0, np.where(fraud, 4.0, -4.0)) + chance.normal(size=ROWS)
    policy = calibrate(raw, oracle, fraud, np.full(ROWS, 50.0), 0.05, Costs())
    assert not policy.escalate(raw)[certain].any()
    assert 0.04 < policy.escalate(raw).mean() <= 0.05


def test_thresholds_follow_the_costs() -> None:
    raw, fraud = drawn(1.0, 0.0)
    amount = np.full(ROWS, 50.0)
    cheap = calibrate(raw, raw, fraud, amount, 0.01, Costs(review=1.0, false_decline=100.0))
    dear = calibrate(raw, raw, fraud, amount, 0.01, Costs(review=10.0, false_decline=100.0))
    assert cheap.review_from < dear.review_from
    # a review pays from p · 50 > 1 on, a decline from (1 − p) · 100 < 1 on
    assert cheap.review_from == pytest.approx(1 / 50, abs=0.01)
    assert cheap.decline_from == pytest.approx(0.99, abs=0.03)
