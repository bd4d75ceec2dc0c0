"""The worker records the difference of its clock from the broker's: the real worker on the simulator's clocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.faults.run import Simulation
from bench.faults.schedule import ProcessFaults, derive
from cascade.ledger.counters import Counters


def counters_of(jump_s: float, seed: int = 1) -> Counters:
    """Of one worker whose clock is set by `jump_s` before the first record."""
    options = replace(derive(seed), workers=1, processes=ProcessFaults())
    simulation = Simulation(options)
    simulation.world.at(0.051, lambda: [process.clock.jump(jump_s) for process in simulation.live()])
    assert simulation.run() == []
    (process,) = simulation.processes
    assert process.ledger.counters().decisions > 0
    return process.ledger.counters()


@pytest.mark.parametrize("behind_s", [0.1, 5.0])
def test_a_clock_behind_the_brokers_is_recorded_and_makes_no_negative_wait(behind_s: float) -> None:
    counters = counters_of(-behind_s)
    assert counters.least_wait_s is not None
    low_s, high_s = counters.least_wait_s
    assert -behind_s <= low_s == high_s < -0.8 * behind_s
    assert counters.early_records > 0
    assert counters.stages["queue"].clamped == 0


def test_clocks_that_agree_tell_the_least_delay() -> None:
    counters = counters_of(0.0)
    assert counters.early_records == 0
    assert counters.least_wait_s is not None
    # the simulator's stamps are whole milliseconds too
    assert 0.0 <= counters.least_wait_s[0] < 0.05


def test_a_clock_that_is_ahead_is_bounded_from_above() -> None:
    counters = counters_of(5.0)
    assert counters.early_records == 0
    assert counters.least_wait_s is not None
    assert 5.0 <= counters.least_wait_s[0] < 5.05
