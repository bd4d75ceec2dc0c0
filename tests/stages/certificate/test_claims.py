"""Worlds whose truth is known: over 200 samples of each, a bound may fail as often as it says, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import average_precision_score

from bench.certificate import ASKED, QUICK, World, alarmed, campaigns, samples_of, shops, single_frauds, truth_of
from cascade.certificate import Claim
from stages.certificate import Asked, LabelledDecisions, first_frauds, make_claims, make_power, make_recall
from stages.certificate.decisions import PERIOD_DAYS, mean_losses

SAMPLES = 200
# a correct bound passes with probability 0.999
FAILURES_MAX = int(binom.ppf(0.999, SAMPLES, ASKED.level))
ShopClaims = tuple[dict[str, float], list[dict[str, Claim]]]


def claims_of(decisions: LabelledDecisions, asked: Asked = ASKED) -> dict[str, Claim]:
    return {claim.name: claim for claim in make_claims(decisions, asked)}


def samples(world: World, seed: int = 1) -> Iterator[LabelledDecisions]:
    return samples_of(world, SAMPLES, seed)


def test_with_independent_frauds_each_bound_fails_at_most_as_often_as_it_says() -> None:
    by_unit = dict.fromkeys(("each fraud", "each card", "each terminal"), 0)
    for decisions in samples(lambda rng: single_frauds(rng, cards=500, lost=0.06)):
        for bound in claims_of(decisions, QUICK)["frauds"].bounds:
            by_unit[bound.unit] += bound.value > 1 - 0.06
    assert max(by_unit.values()) <= FAILURES_MAX


def test_with_frauds_in_campaigns_the_bound_on_frauds_fails_at_most_as_often_as_it_says() -> None:
    lost = 0.06
    shown, by_unit = 0, dict.fromkeys(("each fraud", "each card", "each terminal"), 0)
    for decisions in samples(lambda rng: campaigns(rng, cards=500, lost=lost)):
        claim = claims_of(decisions, QUICK)["frauds"]
        shown += claim.shown > 1 - lost
        for bound in claim.bounds:
            by_unit[bound.unit] += bound.value > 1 - lost
    assert shown <= FAILURES_MAX
    assert by_unit["each card"] <= FAILURES_MAX
    # what the bound for independent frauds does in this world: the reason for the others
    assert by_unit["each fraud"] > FAILURES_MAX


def test_a_cascade_that_loses_a_little_too_much_is_certified_at_most_as_often_as_the_level_says() -> None:
    holds = sequence = 0
    for decisions in samples(lambda rng: campaigns(rng, cards=600, lost=0.051)):
        claim = claims_of(decisions, QUICK)["frauds"]
        holds += claim.holds
        sequence += claim.largest is not None and claim.largest > 1 - 0.051
    assert holds <= FAILURES_MAX
    assert sequence <= FAILURES_MAX


def test_a_cascade_that_loses_little_is_certified_as_often_as_the_power_says() -> None:
    world = partial(campaigns, cards=600, lost=0.025)
    expected = make_power(world(np.random.default_rng(0)), QUICK).chance["each card"]
    holds = sum(claims_of(decisions, QUICK)["frauds"].bounds[1].value >= 0.95 for decisions in samples(world))
    assert holds / SAMPLES == pytest.approx(expected, abs=0.12)
    assert expected > 0.5


@pytest.mark.parametrize("name", ["average precision", "escalated", "false alarms"])
def test_the_approximate_bounds_fail_about_as_often_as_they_say(name: str, shop_claims: ShopClaims) -> None:
    truth, claims = shop_claims
    wrong = sum(
        claim[name].shown > truth[name] if claim[name].sense == "at least" else claim[name].shown < truth[name]
        for claim in claims
    )
    assert wrong <= FAILURES_MAX
    # a bound so wide that it never fails would certify nothing
    distance = np.mean([abs(claim[name].shown - truth[name]) for claim in claims])
    assert distance < 5 * np.std([claim[name].observed for claim in claims])


@pytest.fixture(scope="module")
def shop_claims() -> ShopClaims:
    """The truth of the world of shops, from two hundred other samples joined, and the claims of each sample."""
    return truth_of(samples(shops, seed=2)), [claims_of(decisions) for decisions in samples(shops)]


def test_the_claims_are_those_of_the_data() -> None:
    decisions = shops(np.random.default_rng(3))
    claims = claims_of(decisions)
    fraud = decisions.fraud
    kept = (fraud & decisions.by_deep & decisions.by_cascade).sum() / (fraud & decisions.by_deep).sum()
    assert claims["frauds"].observed == pytest.approx(kept)
    ratio = average_precision_score(fraud, decisions.cascade) / average_precision_score(fraud, decisions.deep)
    assert claims["average precision"].observed == pytest.approx(ratio)
    assert claims["escalated"].observed == decisions.escalated.mean()
    assert [claim.approximate for claim in claims.values()] == [False, True, True, True]
    for claim in claims.values():
        assert claim.shown <= claim.observed if claim.sense == "at least" else claim.shown >= claim.observed
    assert "at least 95 %" in claims["frauds"].statement
    assert "at most 5 %" in claims["escalated"].statement


def test_the_same_seed_gives_the_same_claims() -> None:
    decisions = shops(np.random.default_rng(4))
    assert make_claims(decisions, ASKED) == make_claims(decisions, ASKED)


def test_a_cards_loss_is_the_share_of_its_frauds() -> None:
    lost, card = np.array([True, False, False, True, False]), np.array([7, 7, 7, 7, 9])
    assert mean_losses(lost, card) == (0.5, 2)


def test_the_first_fraud_of_a_card_counts_once_in_a_period() -> None:
    day = np.array([0, 1, 2, 29, 30, 31])
    fraud = np.array([0, 1, 1, 1, 1, 1], bool)
    card = np.array([5, 5, 5, 6, 5, 5])
    assert PERIOD_DAYS == 30
    assert first_frauds(fraud, card, day).tolist() == [1, 3, 4]


@pytest.mark.parametrize(("drift", "least", "most"), [(0.0, 0.0, 0.06), (0.2, 0.95, 1.0)])
def test_the_watch_finds_drift_between_certification_and_use_and_is_silent_without(
    drift: float, least: float, most: float
) -> None:
    """The recall falls from 0.78 by `drift`. Without drift, a false alarm is as rare as both levels together."""
    alarms = 0
    for seed in range(SAMPLES):
        rng = np.random.default_rng(seed)
        certified = make_recall(campaigns(rng, cards=800, lost=0.025), QUICK)
        later = campaigns(rng, cards=800, lost=0.025, caught=0.8 - drift)
        alarms += alarmed(later, certified.at_least, QUICK.alarm_level)
    assert least * SAMPLES <= alarms <= binom.ppf(0.999, SAMPLES, most)
