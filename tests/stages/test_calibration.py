from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.costs import Cell, Costs
from cascade.errors import DataError
from cascade.policy import RAW_MAX, Combination, Escalation
from stages.calibration import (
    FRAUDS_MIN,
    calibrate,
    fit_calibration,
    fit_combination,
    reviews_max,
)
from stages.validation import ValidationRows, escalation_threshold
from tests.stages.scored_rows import drawn_rows

ROWS = 40_000
BUDGETS = (0.001, 0.01, 0.1, 0.5)


def drawn(slope: float, intercept: float, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Raw scores, and frauds that are drawn with the probability that slope and intercept give them."""
    chance = np.random.default_rng(seed)
    raw = chance.normal(-2.0, 2.0, ROWS)
    return raw, chance.random(ROWS) < 1 / (1 + np.exp(-(slope * raw + intercept)))


def rows_of(
    screener_raw: np.ndarray, deep_raw: np.ndarray, fraud: np.ndarray, amount: float = 50.0, days: int = 10
) -> ValidationRows:
    rows = len(fraud)
    time_ms = np.arange(rows) * (days * 86_400_000) // rows
    return ValidationRows.of(
        time_ms, np.arange(rows), fraud, np.full(rows, amount), screener_raw, deep_raw, gain=screener_raw
    )


def by_gain(budget: float) -> Escalation:
    return Escalation(budget, "gain", 0.0)


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


def test_weights_undo_the_sampling_of_genuine_rows() -> None:
    raw, fraud = drawn(1.0, 0.0)
    kept = fraud | (np.random.default_rng(5).random(ROWS) < 0.25)
    weight = np.where(fraud, 1.0, 4.0)[kept]
    whole = fit_calibration(raw, fraud)
    sampled, blind = fit_calibration(raw[kept], fraud[kept], weight), fit_calibration(raw[kept], fraud[kept])
    assert sampled.intercept == pytest.approx(whole.intercept, abs=0.1)
    assert blind.intercept > whole.intercept + 1.0


def test_both_weights_of_the_combination_are_found_again() -> None:
    chance = np.random.default_rng(2)
    screener, deep = chance.normal(-2, 2, ROWS), chance.normal(0, 1.5, ROWS)
    fraud = chance.random(ROWS) < 1 / (1 + np.exp(-(0.4 * screener + 1.2 * deep - 1.0)))
    found = fit_combination(screener, deep, fraud)
    assert (found.screener, found.deep, found.intercept) == (
        pytest.approx(0.4, abs=0.05),
        pytest.approx(1.2, abs=0.08),
        pytest.approx(-1.0, abs=0.15),
    )
    assert found.probability(screener, deep).sum() == pytest.approx(fraud.sum(), rel=1e-3)


def test_the_combination_ranks_better_than_either_model() -> None:
    rows = drawn_rows()
    combined = fit_combination(rows.screener_raw, rows.deep_raw, rows.fraud)

    def loss(log_odds: np.ndarray) -> float:
        return float(np.logaddexp(0.0, np.where(rows.fraud, -log_odds, log_odds)).mean())

    both = combined.screener * rows.screener_raw + combined.deep * rows.deep_raw + combined.intercept
    for raw in (rows.screener_raw, rows.deep_raw):
        alone = fit_calibration(raw, rows.fraud)
        assert loss(both) < loss(alone.slope * raw + alone.intercept)


@pytest.mark.parametrize("frauds", [0, 1, FRAUDS_MIN - 1, 1_000 - FRAUDS_MIN + 1, 1_000])
def test_too_few_of_either_kind_are_refused(frauds: int) -> None:
    fraud, raw = np.arange(1_000) < frauds, np.linspace(3, -3, 1_000)
    with pytest.raises(DataError, match=f"has {frauds} frauds in 1000 transactions"):
        fit_calibration(raw, fraud)
    with pytest.raises(DataError, match=f"has {frauds} frauds in 1000 transactions"):
        fit_combination(raw, raw**3, fraud)


def test_as_many_as_needed_are_accepted() -> None:
    raw = np.random.default_rng(1).normal(size=1_000)
    raw[:FRAUDS_MIN] += 2
    assert fit_calibration(raw, np.arange(1_000) < FRAUDS_MIN).slope > 0


def test_a_model_that_learned_nothing_is_refused() -> None:
    raw, fraud = drawn(1.0, 0.0)
    with pytest.raises(DataError, match="learned nothing"):
        fit_calibration(-raw, fraud)


def test_a_deep_model_that_knows_nothing_more_has_no_weight() -> None:
    raw, fraud = drawn(1.0, 0.0)
    combined, alone = fit_combination(raw, -raw + np.where(fraud, -1.0, 1.0), fraud), fit_calibration(raw, fraud)
    assert combined == Combination(alone.slope, 0.0, alone.intercept)


# few different scores, so that ties are the rule
scores = st.lists(
    st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6)), min_size=1, max_size=60
).map(np.array)  # fmt: skip


@given(score=scores, budget=st.floats(0.0, 1.0))
def test_escalations_never_exceed_the_budget(score: np.ndarray, budget: float) -> None:
    assert (score > escalation_threshold(score, budget)).sum() <= budget * len(score) * (1 + 1e-12)


@given(score=scores, budget=st.floats(0.0, 1.0))
def test_no_lower_threshold_stays_in_the_budget(score: np.ndarray, budget: float) -> None:
    lower = score[score <= escalation_threshold(score, budget)]
    if len(lower):
        assert (score >= lower.max()).sum() > int(budget * len(score))


@pytest.mark.parametrize(
    ("score", "budget", "rows"),
    [
        ([1.0, 2.0, 3.0, 4.0], 0.5, [2, 3]),
        ([4.0, 1.0, 3.0, 2.0], 0.25, [0]),
        ([1.0, 2.0, 2.0, 2.0], 0.5, []),
        ([1.0, 2.0, 2.0, 3.0], 0.5, [3]),
        ([1.0, 1.0, 1.0, 1.0], 1.0, [0, 1, 2, 3]),
        ([1.0, 2.0, 3.0, 4.0], 0.2, []),
        ([1.0, 2.0, 3.0, 4.0], 0.0, []),
    ],
)
def test_escalated_rows_by_hand(score: list[float], budget: float, rows: list[int]) -> None:
    found = np.array(score)
    assert np.flatnonzero(found > escalation_threshold(found, budget)).tolist() == rows


def test_without_rows_nothing_is_escalated() -> None:
    assert escalation_threshold(np.array([]), 0.01) == RAW_MAX


@pytest.mark.parametrize("budget", BUDGETS)
def test_no_more_than_the_budget_is_escalated(budget: float) -> None:
    raw, fraud = drawn(1.0, 0.0)
    deep = raw + np.random.default_rng(3).normal(size=ROWS) + fraud
    for scores in (raw, np.round(raw, 1)):
        rows = rows_of(scores, deep, fraud)
        policy = calibrate(rows, by_gain(budget), Costs())
        assert policy.escalation.budget == budget
        assert rows.escalated(policy).mean() <= budget
    rows = rows_of(raw, deep, fraud)
    assert rows.escalated(calibrate(rows, by_gain(budget), Costs())).mean() > 0.9 * budget


def test_each_probability_has_a_calibration_of_its_own() -> None:
    rows = drawn_rows()
    policy = calibrate(rows, by_gain(0.05), Costs())
    assert policy.screener == fit_calibration(rows.screener_raw, rows.fraud)
    assert policy.deep == fit_calibration(rows.deep_raw, rows.fraud)
    assert policy.combined == fit_combination(rows.screener_raw, rows.deep_raw, rows.fraud)
    for probability in (
        policy.screener.probability(rows.screener_raw),
        policy.deep.probability(rows.deep_raw),
        policy.combined.probability(rows.screener_raw, rows.deep_raw),
    ):
        assert probability.sum() == pytest.approx(rows.fraud.sum(), rel=2e-3)


def test_escalated_rows_are_judged_by_both_models() -> None:
    raw, fraud = drawn(1.0, 0.0)
    chance = np.random.default_rng(2)
    oracle = np.where(fraud, 4.0, -4.0) + chance.normal(size=ROWS)
    # of this deep model nothing is learned but by chance
    noise = chance.normal(size=ROWS) + 0.05 * fraud

    def cost(deep: np.ndarray) -> float:
        rows = rows_of(raw, deep, fraud, amount=100.0)
        policy = calibrate(rows, by_gain(0.2), Costs())
        actions = policy.actions(rows.cascade(policy))
        return float(policy.costs.of_decisions(actions, rows.fraud, rows.amount).mean())

    assert cost(oracle) < 0.8 * cost(noise)


def test_decision_thresholds_are_those_of_the_cascade_and_cost_the_least() -> None:
    rows = drawn_rows()
    policy = calibrate(rows, by_gain(0.05), Costs())
    by_action = policy.costs.of_actions(rows.fraud, rows.amount)
    probability = rows.cascade(policy)

    def cost(review_from: float, decline_from: float) -> float:
        actions = (probability >= review_from).astype(int) + (probability >= decline_from)
        return float(np.take_along_axis(by_action, actions[:, None], axis=1).sum())

    least = cost(policy.review_from, policy.decline_from)
    grid = np.concatenate([[0.0], np.geomspace(1e-3, 1.1, 60)])
    assert all(cost(low, high) >= least - 1e-6 for low in grid for high in grid if low <= high)


def test_thresholds_follow_the_costs() -> None:
    raw, fraud = drawn(1.0, 0.0)
    rows = rows_of(raw, raw + np.random.default_rng(3).normal(size=ROWS) + 0.1 * fraud, fraud)

    def review_of(cost: float) -> Costs:
        return Costs(review_fraud=Cell(cost), review_genuine=Cell(cost), decline_genuine=Cell(100.0))

    cheap, dear = (calibrate(rows, by_gain(0.01), review_of(cost)) for cost in (1.0, 10.0))
    assert cheap.review_from < dear.review_from
    # a review pays from p · 50 > 1 on, a decline from (1 − p) · 100 < 1 on
    assert cheap.review_from == pytest.approx(1 / 50, abs=0.01)
    assert cheap.decline_from == pytest.approx(0.99, abs=0.03)


@pytest.mark.parametrize("per_day", [0.0, 3.0, 20.0])
def test_no_more_rows_are_reviewed_than_people_can(per_day: float) -> None:
    rows = drawn_rows(days=28)
    free = calibrate(rows, by_gain(0.05), Costs())
    bound = calibrate(rows, by_gain(0.05), Costs(reviews_per_day_max=per_day))

    def reviews_per_day(policy: object) -> float:
        return float((policy.actions(rows.cascade(policy)) == 1).sum()) / rows.days  # type: ignore[attr-defined]

    assert reviews_per_day(bound) <= per_day < reviews_per_day(free)
    assert reviews_per_day(bound) >= 0.5 * per_day


def test_reviews_of_a_period_are_those_of_its_days() -> None:
    assert reviews_max(Costs(), 10) is None
    assert reviews_max(Costs(reviews_per_day_max=2.5), 10) == 25
    assert reviews_max(Costs(reviews_per_day_max=0.0), 10) == 0


def test_the_rule_and_its_centre_stay() -> None:
    rows = drawn_rows()
    policy = calibrate(rows, Escalation(0.05, "uncertainty", 3.0, centre=-1.5), Costs())
    escalation = policy.escalation
    assert (escalation.rule, escalation.centre, escalation.budget) == ("uncertainty", -1.5, 0.05)
    assert escalation.threshold == escalation_threshold(-np.abs(rows.screener_raw + 1.5), 0.05)
    assert isinstance(policy.combined, Combination)
