"""The escalation rules in worlds whose answer is known: what only the deep model sees, and where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from cascade.errors import DataError
from cascade.policy import RAW_MAX, uncertainty
from stages.calibration import fit_calibration, fit_combination
from stages.escalation.rules import Rule, ScoredRows, learn_rule, top_share
from stages.validation import escalation_threshold

ROWS = 60_000
BUDGET = 0.05
NAMES = ("region", "noise", "screener_score")
scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=60).map(np.array)


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-log_odds))


def world(seed: int, hidden_everywhere: bool) -> ScoredRows:
    """Frauds of which the screener sees one part, and the deep model also another: everywhere, or in one region only.

    The screener has the region as a feature and cannot use it, since frauds are no more frequent there.
    """
    chance = np.random.default_rng(seed)
    region = chance.random(ROWS) < 0.1
    seen = 1.2 * chance.standard_normal(ROWS)
    secret = chance.standard_normal(ROWS) * np.where(region | hidden_everywhere, 2.5, 0.0)
    fraud = chance.random(ROWS) < sigmoid(-4.5 + seen + secret - np.where(region & (not hidden_everywhere), 1.5, 0.0))
    screener_raw = -4.0 + seen
    deep_raw = screener_raw + secret + 0.3 * chance.standard_normal(ROWS)
    features = np.stack([region, chance.standard_normal(ROWS), screener_raw], axis=1).astype(np.float32)
    return ScoredRows(features, screener_raw, deep_raw, fraud, np.ones(ROWS), NAMES)


def cascade_precision(rows: ScoredRows, score: np.ndarray, budget: float = BUDGET) -> float:
    """The cascade's average precision if the rows of the highest escalation scores are escalated."""
    screener = fit_calibration(rows.screener_raw, rows.fraud).probability(rows.screener_raw)
    both = fit_combination(rows.screener_raw, rows.deep_raw, rows.fraud).probability(rows.screener_raw, rows.deep_raw)
    chosen = score > escalation_threshold(score, budget)
    assert 0.9 * budget < chosen.mean() <= budget
    return float(average_precision_score(rows.fraud, np.where(chosen, both, screener)))


@pytest.fixture(scope="module")
def one_region() -> Rule:
    return learn_rule(world(1, hidden_everywhere=False), BUDGET, seed=1)


def test_where_only_one_region_needs_the_deep_model_the_gain_rule_finds_it(one_region: Rule) -> None:
    later = world(2, hidden_everywhere=False)
    assert one_region.escalation.rule == "gain"
    by_gain = one_region.gain_model.predict(later.features)
    chosen = by_gain > escalation_threshold(by_gain, BUDGET)
    assert later.features[chosen, 0].mean() > 0.8
    by_uncertainty = uncertainty(later.screener_raw, one_region.escalation.centre)
    assert cascade_precision(later, by_gain) > cascade_precision(later, by_uncertainty) + 0.01


def test_the_rules_are_compared_on_rows_from_which_they_did_not_learn(one_region: Rule) -> None:
    found = one_region.average_precision
    assert set(found) == {"gain", "uncertainty"}
    assert found["gain"] > found["uncertainty"] + 0.005
    # what the comparison promises is what later rows show
    later = world(3, hidden_everywhere=False)
    assert found["gain"] == pytest.approx(
        cascade_precision(later, one_region.gain_model.predict(later.features)), abs=0.04
    )


def test_where_features_say_nothing_more_than_the_score_gain_brings_nothing_and_uncertainty_is_as_good() -> None:
    rule = learn_rule(world(1, hidden_everywhere=True), BUDGET, seed=1)
    later = world(2, hidden_everywhere=True)
    by_gain = cascade_precision(later, rule.gain_model.predict(later.features))
    by_uncertainty = cascade_precision(later, uncertainty(later.screener_raw, rule.escalation.centre))
    assert by_uncertainty > by_gain - 0.01
    screened = average_precision_score(later.fraud, later.screener_raw)
    assert min(by_gain, by_uncertainty) > screened + 0.02
    better = max(rule.average_precision, key=rule.average_precision.__getitem__)
    assert rule.escalation.rule == better


def misleading(rows: ScoredRows) -> ScoredRows:
    """The region changes sides in the second half, as after a drift: what the features taught is wrong there."""
    second = np.arange(ROWS) >= ROWS // 2
    features = rows.features.copy()
    features[second, 0] = 1.0 - features[second, 0]
    return ScoredRows(features, rows.screener_raw, rows.deep_raw, rows.fraud, rows.weight, rows.names)


def test_where_the_gain_model_fails_on_later_rows_uncertainty_is_chosen() -> None:
    rule = learn_rule(misleading(world(1, hidden_everywhere=False)), BUDGET, seed=1)
    assert rule.average_precision["uncertainty"] > rule.average_precision["gain"]
    assert rule.escalation.rule == "uncertainty"


def test_the_centre_is_where_the_budget_gains_most() -> None:
    rows = world(4, hidden_everywhere=True)
    centre = learn_rule(rows, BUDGET, seed=1).escalation.centre
    found = cascade_precision(rows, uncertainty(rows.screener_raw, centre))
    for other in np.quantile(rows.screener_raw, [0.5, 0.8, 0.9, 0.95, 0.99]):
        assert found > cascade_precision(rows, uncertainty(rows.screener_raw, float(other))) - 0.005


def test_genuine_rows_that_were_left_out_count_by_their_weights(one_region: Rule) -> None:
    rows = world(1, hidden_everywhere=False)
    kept = rows.fraud | (np.random.default_rng(5).random(ROWS) < 0.25)
    part = rows.take(kept)
    weighted = ScoredRows(
        part.features, part.screener_raw, part.deep_raw, part.fraud, np.where(part.fraud, 1.0, 4.0), NAMES
    )
    rule = learn_rule(weighted, BUDGET, seed=1)
    assert rule.escalation.rule == "gain"
    assert rule.average_precision["gain"] == pytest.approx(one_region.average_precision["gain"], abs=0.04)
    unweighted = learn_rule(part, BUDGET, seed=1)
    assert unweighted.average_precision["gain"] > rule.average_precision["gain"] + 0.1, "the weights matter"


def test_the_same_seed_gives_the_same_rule_and_the_threshold_is_left_to_the_policy(one_region: Rule) -> None:
    again = learn_rule(world(1, hidden_everywhere=False), BUDGET, seed=1)
    assert again.gain_model.model_to_string() == one_region.gain_model.model_to_string()
    assert again.escalation == one_region.escalation
    assert one_region.escalation.threshold == RAW_MAX
    assert one_region.escalation.budget == BUDGET
    assert one_region.gain_model.feature_name() == list(NAMES)


@pytest.mark.parametrize("budget", [0.0, 1.0])
def test_budgets_of_nothing_and_everything_can_be_learned(budget: float) -> None:
    rows = world(1, hidden_everywhere=True).take(slice(0, 8_000))
    found = learn_rule(rows, budget, seed=1).average_precision
    assert found["gain"] == pytest.approx(found["uncertainty"])


def test_too_few_frauds_for_two_halves_give_uncertainty_and_too_few_for_one_are_refused() -> None:
    rows = world(1, hidden_everywhere=False)
    frauds = np.flatnonzero(rows.fraud)

    def with_frauds(count: int) -> ScoredRows:
        return rows.take(np.sort(np.concatenate([np.flatnonzero(~rows.fraud)[:2_000], frauds[-count:]])))

    rule = learn_rule(with_frauds(30), BUDGET, seed=1)
    assert rule.escalation.rule == "uncertainty"
    assert rule.average_precision == {}
    with pytest.raises(DataError, match=r"has 19 frauds in \d+ transactions"):
        learn_rule(with_frauds(19), BUDGET, seed=1)


weights = st.integers(1, 4).map(float)


@given(rows=st.lists(st.tuples(st.integers(-3, 3).map(float), weights), min_size=1), share=st.floats(0.0, 1.0))
def test_ties_never_exceed_the_share_and_no_lower_score_would_fit(
    rows: list[tuple[float, float]], share: float
) -> None:
    score, weight = (np.array(column) for column in zip(*rows, strict=True))
    chosen = top_share(score, weight, share)
    allowed = share * weight.sum() * (1 + 1e-12)
    assert weight[chosen].sum() <= allowed
    if not chosen.all():
        following = score[~chosen].max()
        assert not chosen.any() or score[chosen].min() > following
        assert weight[score >= following].sum() > allowed


@given(score=scores, budget=st.floats(0.0, 0.999))
def test_equal_weights_choose_the_rows_that_a_threshold_would(score: np.ndarray, budget: float) -> None:
    by_threshold = score > escalation_threshold(score, budget)
    chosen = top_share(score, np.ones(len(score)), budget)
    # they differ at most where the budget is a whole number of rows but for rounding
    if abs(budget * len(score) - round(budget * len(score))) > 1e-9:
        np.testing.assert_array_equal(chosen, by_threshold)
