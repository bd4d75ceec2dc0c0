from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import beta, binom

from stages.certificate.exact import (
    CLAIMS,
    PValue,
    binomial_cdf,
    binomial_p_value,
    chance,
    hoeffding_bentkus_p_value,
    largest_claim,
    units_min,
    units_needed,
    upper_bound,
)

LEVEL = 0.05
BOTH = pytest.mark.parametrize("p_value", [binomial_p_value, hoeffding_bentkus_p_value])


@pytest.mark.parametrize(
    ("successes", "trials", "probability"),
    [(0, 299, 0.01), (3, 773, 0.01), (6_311, 746_461, 0.0086), (500, 1_000, 0.5), (900, 1_000, 0.5), (2_000, 2_001, 1)],
)
def test_the_binomial_is_that_of_scipy(successes: int, trials: int, probability: float) -> None:
    expected = binom.cdf(successes, trials, probability)
    assert binomial_cdf(successes, trials, probability) == pytest.approx(expected, rel=1e-7, abs=1e-15)


def test_the_edges_of_the_binomial() -> None:
    assert binomial_cdf(-1, 10, 0.5) == 0.0
    assert binomial_cdf(10, 10, 0.5) == 1.0
    assert binomial_cdf(0, 10, 0.0) == 1.0


@pytest.mark.parametrize(("losses", "units"), [(0, 299), (1, 500), (12, 1_500), (192, 1_525)])
def test_the_bound_is_that_of_clopper_and_pearson(losses: int, units: int) -> None:
    expected = beta.ppf(1 - LEVEL, losses + 1, units - losses)
    assert upper_bound(binomial_p_value, losses, units, LEVEL) == pytest.approx(expected, abs=1e-8)


def test_all_lost_bounds_nothing() -> None:
    assert upper_bound(binomial_p_value, 30, 30, LEVEL) == 1.0
    assert upper_bound(hoeffding_bentkus_p_value, 30.0, 30, LEVEL) == 1.0


@BOTH
def test_a_p_value_falls_with_the_limit_so_that_a_fixed_sequence_ends_at_the_bound(p_value: PValue) -> None:
    losses, units = 4, 900
    values = [p_value(losses, units, 1 - kept) for kept in CLAIMS]
    assert values == sorted(values)
    largest = largest_claim(lambda kept: p_value(losses, units, 1 - kept), LEVEL)
    bound = 1 - upper_bound(p_value, losses, units, LEVEL)
    assert largest == max(kept for kept in CLAIMS if kept <= bound)
    assert largest_claim(lambda kept: 1.0, LEVEL) is None


def test_a_claim_behind_one_that_is_not_shown_does_not_count() -> None:
    assert largest_claim(lambda kept: 1.0 if kept == CLAIMS[1] else 0.0, LEVEL) == CLAIMS[0]


@pytest.mark.parametrize("spread", [0.3, 3.0, 300.0])
def test_losses_within_0_and_1_at_the_limit_are_certified_as_rarely_as_the_level_says(spread: float) -> None:
    """A mean loss just above the limit must be certified in at most LEVEL of all samples, whatever the distribution."""
    rng = np.random.default_rng(7)
    limit, units, runs = 0.05, 400, 2_000
    losses = rng.beta(limit * spread, (1 - limit) * spread, (runs, units)).sum(axis=1)
    wrong = sum(hoeffding_bentkus_p_value(float(total), units, limit) <= LEVEL for total in losses)
    assert wrong <= binom.ppf(0.999, runs, LEVEL)


def test_no_losses_cost_hoeffding_and_bentkus_nothing() -> None:
    assert hoeffding_bentkus_p_value(0.0, 299, 0.01) == pytest.approx(binomial_p_value(0, 299, 0.01), rel=1e-9)
    assert hoeffding_bentkus_p_value(4.0, 299, 0.01) == 1.0


def test_the_fewest_units_are_just_enough() -> None:
    units = units_min(0.01, LEVEL)
    assert units == 299
    assert binomial_p_value(0, units, 0.01) <= LEVEL < binomial_p_value(0, units - 1, 0.01)


@BOTH
def test_the_units_needed_reach_the_power_that_was_asked(p_value: PValue) -> None:
    needed = units_needed(p_value, 0.004, 0.01, LEVEL, 0.8)
    assert needed is not None
    assert chance(p_value, 0.004, needed, 0.01, LEVEL) >= 0.8
    assert chance(p_value, 0.004, needed // 2, 0.01, LEVEL) < 0.8
    assert units_needed(p_value, 0.01, 0.01, LEVEL, 0.8) is None
    assert units_needed(p_value, 0.00999, 0.01, LEVEL, 0.8) is None


def test_the_chance_is_the_share_of_samples_that_are_certified() -> None:
    rng = np.random.default_rng(3)
    losses = rng.binomial(800, 0.005, 4_000)
    shown = np.mean([binomial_p_value(int(lost), 800, 0.01) <= LEVEL for lost in losses])
    expected = chance(binomial_p_value, 0.005, 800, 0.01, LEVEL)
    assert shown == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 4_000))
