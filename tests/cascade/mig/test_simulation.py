"""The simulation against closed forms that the model does not know of, and the model against the simulation."""

from __future__ import annotations

import builtins
import importlib
from typing import Any

import numpy as np
import pytest

from cascade.errors import DataError
from cascade.mig.arrivals import Bursts
from cascade.mig.queueing import Batching, solve
from cascade.mig.simulation import Load, Simulated, simulate
from tests.cascade.mig.turns import every_nth_call

SINGLE = Batching(delay_s=0.0, rows_max=1)


def constant(rows: float) -> float:
    return 1e-3


def rising(rows: float) -> float:
    return 1e-3 + 3e-5 * (rows - 1.0)


def test_single_calls_in_one_queue_take_the_time_of_pollaczek_and_khinchine() -> None:
    found = simulate(Load(rate_per_s=600.0), [constant], SINGLE, 40_000, seed=1)
    assert found.mean_s == pytest.approx(1e-3 * (1.0 + 0.6 / (2.0 * 0.4)), rel=0.05)
    assert found.busy_share == pytest.approx(0.6, rel=0.02)
    assert found.batch_mean == 1.0


def test_one_client_that_takes_two_replicas_in_turn_is_one_queue_with_two_servers() -> None:
    # D/D-like: with every second call each replica waits less than with a random half of them (M/D/1 at load 0.6)
    turns = simulate(Load(rate_per_s=1_200.0, clients=1), [constant] * 2, SINGLE, 40_000, seed=2)
    assert 1e-3 < turns.mean_s < 1e-3 * (1.0 + 0.6 / (2.0 * 0.4)) * 0.8


def test_a_full_queue_rejects_as_often_as_the_closed_form_says() -> None:
    found = simulate(Load(rate_per_s=1_500.0), [constant], Batching(delay_s=0.0, rows_max=1, queue_max=1), 30_000, 3)
    assert found.rejected_share == pytest.approx(1.0 - 1.0 / (np.exp(-1.5) + 1.5), rel=0.03)


def test_a_lone_call_waits_for_others_and_a_full_batch_does_not() -> None:
    lone = simulate(Load(rate_per_s=0.1), [constant], Batching(delay_s=2e-4), 200, seed=4)
    assert lone.p99_s == pytest.approx(1.2e-3)
    full = simulate(Load(rate_per_s=0.1), [constant], Batching(delay_s=2e-4, rows_max=1), 200, seed=4)
    assert full.p99_s == pytest.approx(1e-3)


def test_bursts_keep_the_mean_rate_and_a_seed_repeats_a_run() -> None:
    load = Load(rate_per_s=200.0, bursts=Bursts(factor=5.0, share=0.2, mean_s=0.05), rows_per_call=2.5)
    first, again = (simulate(load, [rising], Batching(), 30_000, seed=5) for _ in range(2))
    assert first == again
    assert first.batch_mean > 1.0
    # busy time ÷ calls × rate: were the rate another, this share would be too
    assert 0.15 < first.busy_share < 0.3


def modelled(load: Load, replicas: int) -> float:
    turns = replicas if load.clients == 1 else 1
    arrivals = every_nth_call(load.rate_per_s / replicas, turns, load.bursts)
    service_s = [rising(calls * load.rows_per_call) for calls in range(1, int(256 / load.rows_per_call) + 1)]
    return solve(arrivals, service_s, 2e-4, 256).quantile_s(0.99)


def simulated(load: Load, replicas: int) -> Simulated:
    return simulate(load, [rising] * replicas, Batching(), 15_000, seed=6)


@pytest.mark.parametrize("replicas", [1, 7])
@pytest.mark.parametrize(
    "load",
    [
        Load(rate_per_s=500.0),
        Load(rate_per_s=4_000.0),
        Load(rate_per_s=3_000.0, clients=1),
        Load(rate_per_s=1_500.0, rows_per_call=3.0),
        Load(rate_per_s=2_000.0, bursts=Bursts(factor=6.0, share=0.05, mean_s=0.05)),
    ],
    ids=["quiet", "busy", "one client", "calls of three rows", "bursts"],
)
def test_model_and_simulation_agree_at_p99(load: Load, replicas: int) -> None:
    assert modelled(load, replicas) == pytest.approx(simulated(load, replicas).p99_s, rel=0.10)


def test_a_missing_simpy_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **named: Any) -> Any:
        if name == "simpy":
            raise ModuleNotFoundError(name=name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    simulation = importlib.import_module("cascade.mig.simulation")
    with pytest.raises(DataError, match=r"pip install 'cascade-fraud\[plan\]'"):
        simulation.simulate(Load(rate_per_s=1.0), [constant], SINGLE, 10, seed=1)
