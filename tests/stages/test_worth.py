"""What decisions are worth at each share: on rows where the deep model knows more, and on rows where it does not."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cascade.costs import Cell, Costs
from cascade.policy import Calibration, Combination, Escalation, Policy
from stages.calibration import calibrate
from stages.validation import ValidationRows
from stages.worth import SHARES, ways_to_decide

REVIEW_ONLY = Costs(review_fraud=Cell(fixed=5.0), review_genuine=Cell(fixed=5.0))


def rows(deep_knows: float, seed: int = 1) -> ValidationRows:
    """12,000 rows of 40 days, 3 % frauds. Both models see the fraud in noise, the deep one as well as `deep_knows`."""
    chance = np.random.default_rng(seed)
    count = 12_000
    fraud = chance.random(count) < 0.03
    screener = np.where(fraud, 1.5, -1.5) + chance.normal(0.0, 1.5, count) - 2.0
    deep = np.where(fraud, deep_knows, -deep_knows) + chance.normal(0.0, 1.5, count) - 2.0
    return ValidationRows.of(
        time_ms=(np.arange(count) * 40 * 86_400_000 // count).astype(np.int64),
        card=chance.integers(0, 2_000, count),
        fraud=fraud,
        amount=np.full(count, 100.0),
        screener_raw=screener,
        deep_raw=deep,
        gain=-np.abs(screener + 1.0),
    )


def policy(found: ValidationRows) -> Policy:
    return calibrate(found, Escalation(budget=0.01, rule="gain", threshold=0.0), REVIEW_ONLY)


def test_a_deep_model_that_knows_more_gains_with_each_share_and_its_interval_excludes_zero() -> None:
    found = rows(deep_knows=4.0)
    *shared, deep_only = ways_to_decide(found, policy(found), 1)
    assert [way.share for way in shared] == list(SHARES)
    assert deep_only.share is None
    screener, *_, five, both = shared
    assert screener.gain_on_screener.value == 0.0
    assert five.gain_on_screener.low > 0.0
    assert screener.average_precision.value < five.average_precision.value <= both.average_precision.value + 0.01
    assert five.gain_on_screener.value == pytest.approx(screener.cost_per_thousand.value - five.cost_per_thousand.value)
    assert five.gain_on_deep.value == pytest.approx(deep_only.cost_per_thousand.value - five.cost_per_thousand.value)
    assert deep_only.gain_on_deep.value == 0.0


def test_a_deep_model_that_knows_nothing_more_gains_nothing() -> None:
    found = rows(deep_knows=0.3)
    *shared, deep_only = ways_to_decide(found, policy(found), 1)
    assert all(way.gain_on_screener.low <= 0.0 for way in shared)
    assert shared[0].gain_on_deep.low > 0.0
    assert deep_only.average_precision.value < shared[0].average_precision.value


def test_costs_are_those_of_the_matrix_by_hand() -> None:
    """Perfect scores: every fraud is reviewed for 5, or declined for nothing, and nothing else is touched."""
    found = rows(deep_knows=4.0)
    perfect = np.where(found.fraud, 5.0, -5.0)
    known = ValidationRows(found.day, found.card, found.fraud, found.amount, perfect, perfect, found.gain)
    exact = Policy(
        escalation=Escalation(budget=0.01, rule="gain", threshold=0.0),
        screener=Calibration(1.0, 0.0),
        combined=Combination(0.5, 0.5, 0.0),
        deep=Calibration(1.0, 0.0),
        review_from=0.0,
        decline_from=0.0,
        costs=REVIEW_ONLY,
    )
    for way in ways_to_decide(known, exact, 1):
        assert way.cost_per_thousand.value == pytest.approx(0.0)
        assert way.caught.value == way.average_precision.value == pytest.approx(1.0)


def test_a_limit_of_reviews_is_kept_and_costs_money() -> None:
    found = rows(deep_knows=4.0)
    free = policy(found)
    dear = Costs(
        review_fraud=Cell(fixed=5.0),
        review_genuine=Cell(fixed=5.0),
        decline_genuine=Cell(fixed=1e4),
        reviews_per_day_max=2.0,
    )
    without = Costs(review_fraud=Cell(fixed=5.0), review_genuine=Cell(fixed=5.0), decline_genuine=Cell(fixed=1e4))
    limited = ways_to_decide(found, msgspec.structs.replace(free, costs=dear), 1)[0]
    unlimited = ways_to_decide(found, msgspec.structs.replace(free, costs=without), 1)[0]
    assert limited.cost_per_thousand.value > unlimited.cost_per_thousand.value
    assert limited.caught.value < unlimited.caught.value
