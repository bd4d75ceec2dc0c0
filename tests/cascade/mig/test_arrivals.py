"""Arrival processes have the rate and the index of dispersion that their parameters state."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.mig.arrivals import ArrivalProcess, Bursts
from tests.cascade.mig.turns import every_nth_call


@given(
    rate_per_s=st.floats(0.1, 1e5),
    replicas=st.integers(1, 7),
    bursts=st.one_of(
        st.none(),
        st.builds(Bursts, factor=st.floats(1.0, 50.0), share=st.floats(0.01, 0.9), mean_s=st.floats(1e-3, 100.0)),
    ),
)
@settings(deadline=None)
def test_the_mean_rate_is_the_stated_one(rate_per_s: float, replicas: int, bursts: Bursts | None) -> None:
    process = every_nth_call(rate_per_s, replicas, bursts)
    assert process.rate_per_s == pytest.approx(rate_per_s, rel=1e-6)
    assert process.rate_per_s_max >= rate_per_s * (1 - 1e-9)


def test_dispersion_is_one_for_poisson_and_one_over_the_replicas_for_turns() -> None:
    assert ArrivalProcess.at_replica(50.0).dispersion == pytest.approx(1.0)
    assert every_nth_call(50.0, 4).dispersion == pytest.approx(0.25)


def test_dispersion_of_bursts_is_that_of_the_switched_poisson_process() -> None:
    bursts = Bursts(factor=5.0, share=0.2, mean_s=2.0)
    quiet = 90.0 / (0.8 + 5.0 * 0.2)
    relaxation_s = 1.0 / (1.0 / 2.0 + 0.25 / 2.0)
    expected = 1.0 + 2.0 * (4.0 * quiet) ** 2 * 0.2 * 0.8 * relaxation_s / 90.0
    assert ArrivalProcess.at_replica(90.0, bursts).dispersion == pytest.approx(expected)
