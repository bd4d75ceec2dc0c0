"""The policy: calibrations keep the order of scores, thresholds belong to the stricter side, nonsense is refused."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.errors import BundleError
from cascade.policy import ACTIONS, RAW_MAX, Calibration, Combination, Escalation, Policy, uncertainty
from cascade.policy_kernels import judge

POLICY = Policy(
    escalation=Escalation(budget=0.01, rule="uncertainty", threshold=-0.5, centre=-1.25),
    screener=Calibration(1.0, 0.0),
    combined=Combination(0.25, 0.75, -0.5),
    deep=Calibration(1.5, -1.0),
    review_from=0.2,
    decline_from=0.8,
)
logits = st.floats(-30, 30)


@given(slope=st.floats(1e-3, 10.0), intercept=st.floats(-20.0, 20.0), raw=st.lists(logits, min_size=2))
def test_calibration_keeps_the_order_and_stays_in_the_unit_interval(
    slope: float, intercept: float, raw: list[float]
) -> None:
    probability = Calibration(slope, intercept).probability(np.sort(np.array(raw)))
    assert (np.diff(probability) >= 0).all()
    assert ((probability >= 0) & (probability <= 1)).all()


def test_calibration_is_the_logistic_function() -> None:
    probability = Calibration(2.0, -1.0).probability(np.array([0.5, 1.0]))
    assert probability.tolist() == [0.5, 1 / (1 + math.exp(-1.0))]


def test_combination_is_the_logistic_function_of_both_scores() -> None:
    probability = Combination(0.25, 2.0, -1.0).probability(np.array([2.0, -4.0]), np.array([0.25, 1.5]))
    assert probability.tolist() == [0.5, 1 / (1 + math.exp(-1.0))]


@given(raw=logits, deep=logits)
def test_combination_uses_the_screeners_score_as_the_deep_model_gets_it(raw: float, deep: float) -> None:
    # the service keeps the score of a waiting transaction as the deep model's input, in float32
    combination = Combination(0.7, 0.4, -0.3)
    narrow = np.array([raw]).astype(np.float32)
    found = combination.probability(np.array([raw]), np.array([deep]))
    assert found == combination.probability(narrow, np.array([deep]))
    assert found == combination.probability(narrow.astype(np.float64), np.array([deep]))
    log_odds = 0.7 * float(narrow[0]) + 0.4 * deep - 0.3
    assert found[0] == pytest.approx(1 / (1 + math.exp(-log_odds)), rel=1e-12)
    assert found.dtype == np.float64


def test_a_score_that_float32_cannot_hold_is_rounded() -> None:
    raw = np.array([1.0 + 2**-30])
    assert Combination(1.0, 1e-9, 0.0).probability(raw, np.zeros(1)) == Calibration(1.0, 0.0).probability(np.ones(1))


def test_the_nearer_to_the_centre_the_higher_is_the_uncertainty() -> None:
    assert uncertainty(np.array([-3.0, -1.0, 0.0, 4.0]), centre=1.0).tolist() == [-4.0, -2.0, -1.0, -3.0]


@given(raw=st.lists(logits, max_size=40).map(np.array), centre=logits)
def test_compiled_judgement_equals_the_formulas_to_the_bit(raw: np.ndarray, centre: float) -> None:
    raw = raw.astype(np.float64)
    policy = msgspec.structs.replace(
        POLICY,
        screener=Calibration(1.2, -0.1),
        escalation=msgspec.structs.replace(POLICY.escalation, centre=centre),
    )
    probability, scores = judge(policy, raw)
    np.testing.assert_array_equal(probability, policy.screener.probability(raw))
    np.testing.assert_array_equal(scores, uncertainty(raw, centre))


def test_thresholds_belong_to_the_stricter_side() -> None:
    actions = POLICY.actions(np.array([0.0, 0.1999, 0.2, 0.7999, 0.8, 1.0]))
    assert [ACTIONS[action] for action in actions] == ["approve", "approve", "review", "review", "decline", "decline"]


def test_with_equal_thresholds_nothing_is_reviewed() -> None:
    policy = msgspec.structs.replace(POLICY, review_from=0.5, decline_from=0.5)
    assert policy.actions(np.array([0.49, 0.5, 0.51])).tolist() == [0, 2, 2]


def escalation(**changes: Any) -> dict[str, Escalation]:
    return {"escalation": msgspec.structs.replace(POLICY.escalation, **changes)}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (escalation(budget=1.5), r"escalation\.budget"),
        (escalation(budget=-0.1), r"escalation\.budget"),
        (escalation(budget=math.nan), r"escalation\.budget"),
        (escalation(threshold=math.nan), r"escalation\.threshold"),
        (escalation(threshold=math.inf), r"escalation\.threshold"),
        (escalation(centre=-math.inf), r"escalation\.centre"),
        ({"screener": Calibration(0.0, 1.0)}, "slopes"),
        ({"screener": Calibration(1.0, math.nan)}, "calibration"),
        ({"screener": Calibration(math.inf, 0.0)}, "calibration"),
        ({"deep": Calibration(-1.0, 1.0)}, "slopes"),
        ({"deep": Calibration(1.0, -math.inf)}, "calibration"),
        ({"combined": Combination(1.0, -0.5, 0.0)}, "not fall with the deep score"),
        ({"combined": Combination(1.0, math.inf, 0.0)}, "combination"),
        ({"combined": Combination(math.nan, 1.0, 0.0)}, "combination"),
        ({"combined": Combination(1.0, 1.0, math.inf)}, "combination"),
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
    assert str(caught.value).endswith("; train the bundle again")
    assert "\n" not in str(caught.value)


def test_a_policy_may_escalate_everything_or_nothing_and_weigh_the_screener_against_the_deep_model() -> None:
    for threshold in (-RAW_MAX, RAW_MAX):
        msgspec.structs.replace(POLICY, **escalation(threshold=threshold)).check("policy.json")
    msgspec.structs.replace(POLICY, combined=Combination(-0.2, 1.2, 0.0)).check("policy.json")


@pytest.mark.parametrize("rule", ["band", "", None])
def test_a_policy_with_an_unknown_rule_cannot_be_read(rule: str | None) -> None:
    content = msgspec.json.decode(msgspec.json.encode(POLICY))
    assert msgspec.convert(content, Policy) == POLICY
    content["escalation"]["rule"] = rule
    with pytest.raises(msgspec.ValidationError, match="rule"):
        msgspec.convert(content, Policy)
