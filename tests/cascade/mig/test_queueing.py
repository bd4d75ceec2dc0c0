"""The computed queue of a replica against closed forms, and what must hold for any load."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.mig.arrivals import ArrivalProcess, Bursts
from cascade.mig.queueing import ReplicaQueue, solve
from tests.cascade.mig.turns import every_nth_call

SERVICE_S = 1e-3
BURSTS = Bursts(factor=8.0, share=0.1, mean_s=0.02)


def queue(
    rate_per_s: float, *, calls_max: int = 256, row_s: float = 0.0, delay_s: float = 0.0, queue_max: int = 256
) -> ReplicaQueue:
    service_s = SERVICE_S + row_s * np.arange(calls_max)
    return solve(ArrivalProcess.at_replica(rate_per_s), service_s, delay_s, queue_max)


@given(load=st.floats(0.02, 0.8))
@settings(max_examples=20, deadline=None)
def test_without_batches_the_mean_is_that_of_pollaczek_and_khinchine(load: float) -> None:
    single = queue(load / SERVICE_S, calls_max=1, delay_s=2e-4)
    assert single.mean_s == pytest.approx(SERVICE_S * (1.0 + load / (2.0 * (1.0 - load))), rel=1e-4)
    assert single.busy_share == pytest.approx(load, rel=1e-6)
    assert single.batch_mean == 1.0


@given(load=st.floats(0.01, 20.0))
@settings(max_examples=20, deadline=None)
def test_batches_without_limit_and_of_equal_time_have_the_closed_form(load: float) -> None:
    # the instance is busy for s, then waits 1 ÷ rate if nobody came in s; half of s is left when a call arrives
    rate_per_s = load / SERVICE_S
    taken = queue(rate_per_s)
    busy = SERVICE_S / (SERVICE_S + math.exp(-load) / rate_per_s)
    assert taken.busy_share == pytest.approx(busy, rel=1e-6)
    assert taken.mean_s == pytest.approx(SERVICE_S * (1.0 + busy / 2.0), rel=1e-4)


@given(load=st.floats(0.1, 3.0))
@settings(max_examples=20, deadline=None)
def test_with_room_for_one_waiting_call_the_loss_has_the_closed_form(load: float) -> None:
    # M/D/1/2: a departure leaves nobody behind with the probability of no arrival, exp(−load)
    small = queue(load / SERVICE_S, calls_max=1, queue_max=1)
    assert small.rejected_share == pytest.approx(1.0 - 1.0 / (math.exp(-load) + load), rel=1e-6)


def test_without_load_a_call_takes_the_delay_and_the_time_of_one() -> None:
    alone = queue(1e-3, row_s=1e-5, delay_s=2e-4)
    assert alone.quantile_s(0.5) == alone.quantile_s(0.99) == pytest.approx(SERVICE_S + 2e-4)
    assert alone.busy_share == pytest.approx(1e-3 * SERVICE_S, rel=1e-3)


@given(
    rates=st.tuples(st.floats(1.0, 15_000.0), st.floats(1.0, 15_000.0)).map(sorted),
    row_s=st.floats(0.0, 5e-5),
    delay_s=st.floats(0.0, 3e-4),
)
@settings(max_examples=20, deadline=None)
def test_more_calls_are_never_faster_and_no_call_is_faster_than_a_batch_of_one(
    rates: list[float], row_s: float, delay_s: float
) -> None:
    slow, fast = (queue(rate, row_s=row_s, delay_s=delay_s) for rate in rates)
    assert slow.quantile_s(0.99) <= fast.quantile_s(0.99) * 1.01
    assert slow.busy_share <= fast.busy_share + 1e-6
    assert slow.times_s[0] >= SERVICE_S * (1.0 - 1e-9)


@given(
    rate_per_s=st.floats(10.0, 4_000.0),
    replicas=st.sampled_from([1, 2, 5]),
    bursts=st.sampled_from([None, BURSTS]),
    calls_max=st.sampled_from([8, 64, 256]),
)
@settings(max_examples=15, deadline=None)
def test_every_call_is_in_one_batch_or_rejected(
    rate_per_s: float, replicas: int, bursts: Bursts | None, calls_max: int
) -> None:
    arrivals = every_nth_call(rate_per_s, replicas, bursts)
    found = solve(arrivals, SERVICE_S + 1e-5 * np.arange(calls_max), 2e-4, 256)
    answered_per_s = found.batches_per_s * found.batch_mean
    assert answered_per_s == pytest.approx(rate_per_s * (1.0 - found.rejected_share), rel=2e-3)
    assert found.weights.sum() == pytest.approx(1.0)
    assert found.weights.min() >= 0.0


def test_a_dispatcher_that_takes_replicas_in_turn_makes_calls_faster_and_bursts_make_them_slower() -> None:
    service_s = SERVICE_S + 1e-5 * np.arange(256)
    p99_s = {
        name: solve(arrivals, service_s, 2e-4, 256).quantile_s(0.99)
        for name, arrivals in (
            ("turns", every_nth_call(400.0, 7)),
            ("random", ArrivalProcess.at_replica(400.0)),
            ("bursts", ArrivalProcess.at_replica(400.0, BURSTS)),
        )
    }
    assert p99_s["turns"] < p99_s["random"] < p99_s["bursts"]


def test_a_delay_longer_than_a_full_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="full batch"):
        queue(10.0, delay_s=2 * SERVICE_S)
