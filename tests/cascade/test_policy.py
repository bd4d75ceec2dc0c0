"""The policy: no band exceeds its budget, thresholds cost the least, probabilities keep the order of the scores."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.errors import BundleError
from cascade.policy import ACTIONS, RAW_MAX, Calibration, Costs, Policy, decision_thresholds, escalation_band

finite = st.floats(-1e6, 1e6)
# few different scores, so that ties are the rule
scores = st.lists(st.one_of(st.integers(-3, 3).map(float), finite), min_size=1, max_size=60).map(np.array)
POLICY = Policy(0.01, 2.0, 3.0, Calibration(1.0, 0.0), Calibration(1.5, -1.0), 0.2, 0.8)


def escalated(raw: np.ndarray, budget: float, skip: float = 0.0) -> np.ndarray:
    threshold, ceiling = escalation_band(raw, budget, skip)
    return (raw >= threshold) & (raw < ceiling)


shares = st.floats(0.0, 1.0)


@given(raw=scores, budget=shares, skip=shares)
def test_escalations_never_exceed_the_budget(raw: np.ndarray, budget: float, skip: float) -> None:
    assert escalated(raw, budget, skip).sum() <= budget * len(raw) * (1 + 1e-12)


@given(raw=scores, budget=shares, skip=shares)
def test_no_lower_threshold_stays_in_the_budget(raw: np.ndarray, budget: float, skip: float) -> None:
    threshold, ceiling = escalation_band(raw, budget, skip)
    lower = raw[(raw < threshold) & (raw < ceiling)]
    if len(lower):
        assert ((raw >= lower.max()) & (raw < ceiling)).sum() > int(budget * len(raw))


@given(raw=scores, budget=shares, skip=shares)
def test_the_highest_scores_are_skipped_and_ties_with_them(raw: np.ndarray, budget: float, skip: float) -> None:
    _, ceiling = escalation_band(raw, budget, skip)
    skipped = int(skip * len(raw))
    assert (raw >= ceiling).sum() >= skipped
    assert (raw > ceiling).sum() < max(skipped, 1)


@pytest.mark.parametrize(
    ("raw", "budget", "skip", "rows"),
    [
        ([1.0, 2.0, 3.0, 4.0], 0.5, 0.0, [2, 3]),
        ([1.0, 2.0, 3.0, 4.0], 0.5, 0.25, [1, 2]),
        ([1.0, 2.0, 3.0, 4.0], 0.5, 0.75, [0]),
        ([1.0, 2.0, 3.0, 4.0], 0.5, 1.0, []),
        ([1.0, 2.0, 2.0, 2.0], 0.5, 0.0, []),
        ([1.0, 2.0, 2.0, 2.0], 0.5, 0.25, [0]),
        ([1.0, 2.0, 2.0, 3.0], 0.5, 0.0, [3]),
        ([1.0, 1.0, 1.0, 1.0], 1.0, 0.0, [0, 1, 2, 3]),
        ([1.0, 2.0, 3.0, 4.0], 0.2, 0.0, []),
        ([1.0, 2.0, 3.0, 4.0], 0.0, 0.5, []),
    ],
)
def test_bands_by_hand(raw: list[float], budget: float, skip: float, rows: list[int]) -> None:
    assert np.flatnonzero(escalated(np.array(raw), budget, skip)).tolist() == rows


def test_without_rows_nothing_is_escalated() -> None:
    assert escalation_band(np.array([]), 0.01) == (RAW_MAX, RAW_MAX)


def cost_of(
    pair: tuple[float, float], probability: np.ndarray, fraud: np.ndarray, amount: np.ndarray, costs: Costs
) -> float:
    policy = Policy(0.01, 0.0, 1.0, Calibration(1.0, 0.0), Calibration(1.0, 0.0), *pair, costs)
    return math.fsum(costs.of_decisions(policy.actions(probability), fraud, amount))


twentieths = st.integers(0, 20).map(lambda number: number / 20)
quarters = st.integers(0, 8_000).map(lambda number: number / 4)


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(st.tuples(twentieths, st.booleans(), quarters), max_size=12),
    review=st.sampled_from((0.0, 0.25, 5.0, 1e6)),
    false_decline=st.sampled_from((0.0, 1.0, 25.0, 1e6)),
)
def test_decision_thresholds_cost_as_little_as_any_pair(
    rows: list[tuple[float, bool, float]], review: float, false_decline: float
) -> None:
    probability, fraud, amount = (np.array([row[column] for row in rows]) for column in range(3))
    fraud, costs = fraud.astype(bool), Costs(review, false_decline)
    found = decision_thresholds(probability, fraud, amount, costs)
    cuts = [0.0, *np.unique(probability).tolist(), 2.0]
    least = min(cost_of((low, high), probability, fraud, amount, costs) for low in cuts for high in cuts if low <= high)
    assert 0.0 <= found[0] <= found[1]
    assert cost_of(found, probability, fraud, amount, costs) == least


def test_thresholds_lie_midway_between_rows() -> None:
    probability = np.array([0.1, 0.5, 0.9])
    fraud, amount = np.array([False, True, True]), np.array([50.0, 6.0, 500.0])
    assert decision_thresholds(probability, fraud, amount, Costs(7.0, 25.0)) == (pytest.approx(0.3),) * 2
    fraud = np.array([False, False, True])
    assert decision_thresholds(probability, fraud, amount, Costs(7.0, 25.0)) == (pytest.approx(0.7),) * 2


def test_a_threshold_separates_neighbouring_probabilities() -> None:
    genuine = np.nextafter(1.0, 0.0) - 2**-53
    found = [genuine - 2**-53 * shift for shift in range(2)]
    for low in found:
        probability = np.array([low, np.nextafter(low, 1.0)])
        thresholds = decision_thresholds(probability, np.array([False, True]), np.array([10.0, 1e5]), Costs())
        assert (probability >= thresholds[1]).tolist() == [False, True]


@given(slope=st.floats(1e-3, 10.0), intercept=st.floats(-20.0, 20.0), raw=st.lists(st.floats(-30, 30), min_size=2))
def test_calibration_keeps_the_order_and_stays_in_the_unit_interval(
    slope: float, intercept: float, raw: list[float]
) -> None:
    probability = Calibration(slope, intercept).probability(np.sort(np.array(raw)))
    assert (np.diff(probability) >= 0).all()
    assert ((probability >= 0) & (probability <= 1)).all()


def test_calibration_is_the_logistic_function() -> None:
    probability = Calibration(2.0, -1.0).probability(np.array([0.5, 1.0]))
    assert probability.tolist() == [0.5, 1 / (1 + math.exp(-1.0))]


def test_costs_of_the_three_decisions() -> None:
    actions = np.array([0, 0, 1, 1, 2, 2])
    fraud = np.array([True, False] * 3)
    cost = Costs(review=5.0, false_decline=25.0).of_decisions(actions, fraud, np.full(6, 80.0))
    assert cost.tolist() == [80.0, 0.0, 5.0, 5.0, 0.0, 25.0]


def test_thresholds_belong_to_the_stricter_side() -> None:
    actions = POLICY.actions(np.array([0.0, 0.1999, 0.2, 0.7999, 0.8, 1.0]))
    assert [ACTIONS[action] for action in actions] == ["approve", "approve", "review", "review", "decline", "decline"]
    assert POLICY.escalate(np.array([1.999, 2.0, 2.999, 3.0])).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"escalation_budget": 1.5}, "escalation_budget"),
        ({"escalation_budget": -0.1}, "escalation_budget"),
        ({"escalation_threshold": math.nan}, "escalation_threshold"),
        ({"escalation_ceiling": math.inf}, "escalation_ceiling"),
        ({"screener": Calibration(0.0, 1.0)}, "slopes"),
        ({"deep": Calibration(-1.0, 1.0)}, "slopes"),
        ({"review_from": 0.9}, "review_from ≤ decline_from"),
        ({"review_from": -0.1}, "review_from ≤ decline_from"),
        ({"decline_from": math.nan}, "review_from ≤ decline_from"),
    ],
)
def test_numbers_that_are_no_policy_are_refused(changes: dict[str, object], rule: str) -> None:
    POLICY.check("policy.json")
    with pytest.raises(BundleError, match=rule) as caught:
        msgspec.structs.replace(POLICY, **changes).check("policy.json")
    assert str(caught.value).startswith("policy.json: ")
    assert "\n" not in str(caught.value)


def test_a_row_at_the_ceiling_is_never_worth_escalating() -> None:
    raw = np.array([1.9, 2.0, 2.999, 3.0, 60.0])
    assert POLICY.escalation_scores(raw).tolist() == [1.9, 2.0, 2.999, -np.inf, -np.inf]
