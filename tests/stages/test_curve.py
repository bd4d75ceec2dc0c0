"""The curve of average precision over escalated shares."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from cascade.escalation_budget import EscalationBudget
from stages.curve import DISTANCE, GAIN, HIGHEST, ORACLE, RANDOM, SHARES, UNCERTAINTY, Curve, curve
from stages.validation import ValidationRows
from tests.stages.scored_rows import drawn_rows, policy_of


@pytest.fixture(scope="module")
def rows() -> ValidationRows:
    return drawn_rows()


@pytest.fixture(scope="module")
def found(rows: ValidationRows) -> Curve:
    return curve(rows, policy_of(rows), seed=3)


def test_each_way_has_a_figure_for_each_share(found: Curve) -> None:
    assert SHARES == found.shares == (0.0025, 0.005, 0.01, 0.02, 0.05)
    assert list(found.average_precision) == [GAIN, UNCERTAINTY, HIGHEST, RANDOM, DISTANCE, ORACLE]
    assert all(len(values) == len(SHARES) for values in found.average_precision.values())


def test_the_ends_are_the_models_alone_and_together(rows: ValidationRows, found: Curve) -> None:
    both = policy_of(rows).combined.probability(rows.screener_raw, rows.deep_raw)
    assert found.screener == average_precision_score(rows.fraud, rows.screener_raw)
    assert found.deep == average_precision_score(rows.fraud, rows.deep_raw)
    assert found.both == average_precision_score(rows.fraud, both)
    assert found.screener < found.deep <= found.both + 0.01


@pytest.mark.parametrize("way", [GAIN, UNCERTAINTY, HIGHEST])
def test_a_figure_is_that_of_the_cascade_with_that_budget_held(rows: ValidationRows, found: Curve, way: str) -> None:
    policy = policy_of(rows)
    centre = policy.escalation.centre
    scores = {GAIN: rows.gain, UNCERTAINTY: -np.abs(rows.screener_raw - centre), HIGHEST: rows.screener_raw}
    for share, value in zip(SHARES, found.average_precision[way], strict=True):
        threshold = np.sort(scores[way])[::-1][int(share * len(rows))]
        chosen = EscalationBudget(share, threshold).choose(scores[way], np.zeros(len(rows), bool))
        probability = policy.screener.probability(rows.screener_raw)
        combined = policy.combined.probability(rows.screener_raw, rows.deep_raw)
        probability[chosen] = combined[chosen]
        assert value == pytest.approx(average_precision_score(rows.fraud, probability))


def test_who_knows_the_labels_is_best_and_chance_brings_next_to_nothing(found: Curve) -> None:
    for place in range(len(SHARES)):
        values = {way: found.average_precision[way][place] for way in found.average_precision}
        assert max(values, key=values.__getitem__) == ORACLE
        assert values[RANDOM] < values[DISTANCE] < values[ORACLE]
    oracle = found.average_precision[ORACLE]
    assert oracle[-1] > found.screener + 0.1
    assert abs(found.average_precision[RANDOM][0] - found.screener) < 0.01


def test_the_same_seed_gives_the_same_curve(rows: ValidationRows, found: Curve) -> None:
    assert curve(rows, policy_of(rows), seed=3) == found
    other = curve(rows, policy_of(rows), seed=4).average_precision
    assert [way for way in other if other[way] != found.average_precision[way]] == [RANDOM]
