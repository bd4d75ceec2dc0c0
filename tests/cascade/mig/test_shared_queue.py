"""The recursion over batches is the simulation of one Triton, and with one instance what the model computes."""

from __future__ import annotations

import numpy as np
import pytest

from cascade.mig.arrivals import ArrivalProcess, draw_arrivals_s
from cascade.mig.queueing import Batching, ReplicaQueue, solve
from cascade.mig.shared_queue import follow
from cascade.mig.simulation import Load, simulate

SERVICE_S = 1e-3 + 3e-5 * np.arange(256)


def followed(rate_per_s: float, instances: int, calls_max: int = 256) -> ReplicaQueue:
    arrivals_s = draw_arrivals_s(rate_per_s, None, 30_000, np.random.default_rng(1))
    return follow(arrivals_s, SERVICE_S[:calls_max], 2e-4, instances)


@pytest.mark.parametrize("instances", [1, 2, 4])
@pytest.mark.parametrize("rate_per_s", [300.0, 3_000.0, 12_000.0])
def test_it_agrees_with_the_simulation(rate_per_s: float, instances: int) -> None:
    found = followed(rate_per_s, instances)
    load = Load(rate_per_s=rate_per_s)
    checked = simulate(load, [lambda rows: 1e-3 + 3e-5 * (rows - 1)], Batching(), 15_000, 2, instances)
    assert found.quantile_s(0.99) == pytest.approx(checked.p99_s, rel=0.05)
    assert found.busy_share == pytest.approx(checked.busy_share, rel=0.05)
    assert found.batch_mean == pytest.approx(checked.batch_mean, rel=0.05)


@pytest.mark.parametrize("calls_max", [4, 256])
def test_with_one_instance_it_agrees_with_the_model(calls_max: int) -> None:
    found = followed(1_500.0, 1, calls_max)
    expected = solve(ArrivalProcess.at_replica(1_500.0), SERVICE_S[:calls_max], 2e-4, 256)
    assert found.quantile_s(0.99) == pytest.approx(expected.quantile_s(0.99), rel=0.03)
    assert found.mean_s == pytest.approx(expected.mean_s, rel=0.02)


def test_a_batch_that_is_full_does_not_wait() -> None:
    arrivals_s = np.array([0.0, 1e-5, 2e-5, 1.0])
    found = follow(arrivals_s, np.array([1e-3, 1e-3]), 2e-4, 1)
    # two at once, the third after the first batch, the last alone after the delay
    assert found.times_s == pytest.approx(sorted([1.01e-3, 1e-3, 1.99e-3, 1.2e-3]))
