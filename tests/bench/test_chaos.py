"""Chaos: the plans are fair and repeat, and a short run on real parts finds nothing wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bench.chaos import FAULTS, Cycle, plans, recoveries, run_chaos


def test_a_seed_gives_the_same_plans_and_another_seed_others() -> None:
    assert plans(1, 30, 3) == plans(1, 30, 3)
    assert plans(1, 30, 3) != plans(2, 30, 3)


def test_two_hundred_cycles_have_every_fault_every_worker_and_every_kind_of_pause() -> None:
    found = plans(1, 200, 3)
    faults = Counter(one.fault for one in found)
    assert min(faults[name] for name in FAULTS) >= 200 // (2 * len(FAULTS)) - 1
    assert 80 <= faults[None] <= 120
    assert min(Counter(one.worker for one in found).values()) > 40
    assert sum(one.pause_s == 0 for one in found) > 60
    assert sum(one.pause_s > 10 for one in found) > 15
    assert {one.node for one in found} == {0, 1, 2}


def test_recovery_times_are_given_for_each_kind_of_cycle() -> None:
    told = [Cycle(plan=one, recovery_s=float(number), ready_s=None) for number, one in enumerate(plans(1, 100, 3))]
    found = recoveries(told)
    assert (found["all"].kills, found["all"].p50_s, found["all"].max_s) == (100, 50.0, 99.0)
    apart = ("kill alone", "with a broker fault", "with a Triton fault")
    assert sum(found[name].kills for name in apart) == 100
    assert "with a broker fault" not in recoveries([one for one in told if one.plan.fault is None])


@pytest.mark.kafka
@pytest.mark.triton
@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_short_run_loses_nothing_decides_nothing_twice_and_ends_with_the_same_state(
    tmp_path: Path, kafka_parts: Path, triton_parts: Path
) -> None:
    report = run_chaos(tmp_path / "chaos", cycles=2, workers=2, partitions=4, rate=150.0, seed=5)
    assert report.check.sent > 1_000
    assert report.check.escalated > 50
    assert (report.check.lost, report.check.twice, report.check.strays, report.check.order_violations) == (0, 0, 0, 0)
    assert report.settled
    assert sorted(one.partition for one in report.states if one.equal) == [0, 1, 2, 3]
    assert report.recovery["all"].kills == report.kills == 2
    assert report.ok
