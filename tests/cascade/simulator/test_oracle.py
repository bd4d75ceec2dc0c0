"""The oracle: calibrated, blind to outcomes, and better than any single column."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from cascade.simulator import (
    Kind,
    Simulation,
    SimulatorSettings,
    ceiling,
    fraud_probability,
    label_probability,
    simulate_with_states,
)
from cascade.simulator.oracle import average_precision
from cascade.simulator.simulation import is_fraud


@pytest.fixture(scope="module")
def probability(simulation: Simulation) -> np.ndarray:
    return fraud_probability(simulation)


def test_probabilities_are_calibrated(simulation: Simulation, probability: np.ndarray) -> None:
    truth = is_fraud(simulation.rows.kind)
    for low, high in ((0.0, 0.02), (0.02, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1.01)):
        rows = (probability >= low) & (probability < high)
        expected, spread = probability[rows].sum(), np.sqrt((probability * (1 - probability))[rows].sum())
        assert rows.sum() > 50
        # four standard deviations, and two in a hundred for the order of rows, which the oracle does not use
        assert abs(truth[rows].sum() - expected) < 4 * spread + 0.02 * expected + 3, f"{low} to {high}"


def test_no_fraud_is_impossible_to_the_oracle(simulation: Simulation, probability: np.ndarray) -> None:
    assert (probability[is_fraud(simulation.rows.kind)] > 0).all()
    assert probability.max() <= 1.0
    assert np.isfinite(probability).all()


def test_the_oracle_does_not_see_outcomes(simulation: Simulation, probability: np.ndarray) -> None:
    kind = simulation.rows.kind.copy()
    others = np.flatnonzero(kind != Kind.SUBSCRIPTION)
    kind[others] = np.random.default_rng(3).permutation(kind[others])
    delay_ms = np.full(len(kind), -1, np.int64)
    blind = replace(simulation, rows=replace(simulation.rows, kind=kind), report_delay_ms=delay_ms)
    assert np.array_equal(fraud_probability(blind), probability)


def test_the_oracle_beats_every_column(simulation: Simulation) -> None:
    label = simulation.frame["fraud"].to_numpy() == 1
    best = average_precision(label, label_probability(simulation))
    time_of_day = (simulation.rows.time_ms % 86_400_000).astype(np.float64)
    rows, terminals = simulation.rows, simulation.world.terminals
    for column in (rows.amount, time_of_day, rows.device, terminals.category[rows.terminal]):
        for sign in (1.0, -1.0):
            assert average_precision(label, sign * column) < 0.3 < best


def test_the_ceiling_is_below_one_and_far_above_a_guess(simulation: Simulation) -> None:
    best = ceiling(simulation)
    assert best is not None
    assert 0.85 < best.average_precision < 0.97
    assert best.average_precision < best.average_precision_truth < 1.0
    assert best.frauds == simulation.frame["fraud"].sum()
    # false reports are beyond anyone
    assert 0.01 < best.indistinguishable_share <= best.unlikely_share < 0.06


def test_unreported_frauds_lower_the_ceiling_as_much_as_they_are(simulation: Simulation) -> None:
    label, truth = simulation.report_delay_ms >= 0, is_fraud(simulation.rows.kind)
    perfect = average_precision(label, truth.astype(np.float64))
    best = ceiling(simulation)
    assert best is not None
    assert best.average_precision <= perfect + 0.01


def test_without_frauds_there_is_no_ceiling() -> None:
    settings = SimulatorSettings(cards=60, terminals=80, days=10, seed=2, fraud_share=0.0)
    assert ceiling(simulate_with_states(settings)) is None


def test_average_precision_is_the_one_of_scikit_learn() -> None:
    rng = np.random.default_rng(5)
    label, score = rng.random(5_000) < 0.05, np.round(rng.random(5_000), 2)
    assert average_precision(label, score) == pytest.approx(average_precision_score(label, score))
