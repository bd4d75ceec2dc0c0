from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from cascade.columns import Bool
from cascade.evidence import STAKES, alarm_nats, evidence_nats

LEVEL = 0.01
LIMIT = 0.55


def alarms(share: np.ndarray | float, runs: int, labels: int, seed: int) -> Bool:
    """Whether the evidence ever reaches the alarm in each run; `share`: caught, of each label or of all."""
    caught = np.cumsum(np.random.default_rng(seed).random((runs, labels)) < share, axis=1)
    missed = np.arange(1, labels + 1) - caught
    gains = [stake * LIMIT / (1 - LIMIT) for stake in STAKES]
    wealth = np.mean(
        [
            np.exp(caught * np.log1p(-stake) + missed * np.log1p(gain))
            for stake, gain in zip(STAKES, gains, strict=True)
        ],
        axis=0,
    )
    last = evidence_nats(int(caught[0, -1]), int(missed[0, -1]), LIMIT)
    assert last == pytest.approx(np.log(wealth[0, -1]), rel=1e-9)
    reached: Bool = (np.log(wealth) >= alarm_nats(LEVEL)).any(axis=1)
    return reached


def test_at_the_limit_the_alarm_is_as_rare_as_it_says_although_it_is_read_after_each_label() -> None:
    runs = 1_500
    false = int(alarms(LIMIT, runs, labels=1_500, seed=1).sum())
    assert false <= binom.ppf(0.999, runs, LEVEL)
    # a bound that is never used up would be worth nothing
    assert false >= 1


def test_a_share_that_wanders_above_the_limit_raises_no_more_alarms() -> None:
    waves = LIMIT + 0.05 + 0.05 * np.sin(np.arange(1_500) / 100)
    assert alarms(waves, runs=1_000, labels=1_500, seed=2).sum() <= binom.ppf(0.999, 1_000, LEVEL)


@pytest.mark.parametrize(("fall", "labels", "least"), [(0.2, 200, 0.9), (0.1, 800, 0.9), (0.05, 3_000, 0.9)])
def test_a_fall_below_the_limit_is_found_within_so_many_labels(fall: float, labels: int, least: float) -> None:
    assert alarms(LIMIT - fall, runs=200, labels=labels, seed=3).mean() >= least


def test_the_evidence_has_a_mean_of_one_at_the_limit_and_is_finite() -> None:
    counts = np.arange(41)
    wealth = [math.exp(evidence_nats(int(count), 40 - int(count), LIMIT)) for count in counts]
    assert float(np.dot(binom.pmf(counts, 40, LIMIT), wealth)) == pytest.approx(1.0, rel=1e-9)
    assert evidence_nats(0, 0, LIMIT) == pytest.approx(0.0)
    assert math.isfinite(evidence_nats(0, 10**7, 0.999))
    assert evidence_nats(10**7, 0, 0.5) < -1e5


def test_the_evidence_of_two_workers_adds_up_to_a_test_at_the_same_level() -> None:
    """The mean of the product of both wealths is 1 at the limit, as that of one."""
    counts = np.arange(21)
    chances = np.outer(binom.pmf(counts, 20, LIMIT), binom.pmf(counts, 20, LIMIT))
    nats = np.array([evidence_nats(int(count), 20 - int(count), LIMIT) for count in counts])
    assert float((chances * np.exp(nats[:, np.newaxis] + nats)).sum()) == pytest.approx(1.0, rel=1e-9)
