"""Chaos: the plans are fair and reproducible, a cycle restarts what has ended, a bounded run on real parts passes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.chaos import FAULTS, Conductor, Cycle, Plan, plans, recoveries, run_chaos


def test_a_seed_gives_the_same_plans_and_another_seed_others() -> None:
    assert plans(1, 30, 3) == plans(1, 30, 3)
    assert plans(1, 30, 3) != plans(2, 30, 3)


def test_two_hundred_cycles_have_every_fault_every_worker_and_every_kind_of_pause() -> None:
    found = plans(1, 200, 3)
    faults = Counter(plan.fault for plan in found)
    assert min(faults[name] for name in FAULTS) >= 200 // (2 * len(FAULTS)) - 1
    assert 80 <= faults[None] <= 120
    assert min(Counter(plan.worker for plan in found).values()) > 40
    assert sum(plan.pause_s == 0 for plan in found) > 60
    assert sum(plan.pause_s > 10 for plan in found) > 15
    assert sum(plan.pause_s == 0 and not plan.standby for plan in found) > 15
    assert {plan.node for plan in found} == {0, 1, 2}


def test_recovery_times_are_reported_for_each_kind_of_cycle() -> None:
    cycles = [
        Cycle(plan=plan, recovery_s=float(number), ready_s=None, waits_for=None)
        for number, plan in enumerate(plans(1, 100, 3))
    ]
    found = recoveries(cycles)
    assert (found["all"].kills, found["all"].p50_s, found["all"].max_s) == (100, 50.0, 99.0)
    disjoint = ("kill alone", "with a broker fault", "with a Triton fault")
    assert sum(found[name].kills for name in disjoint) == 100
    alone = [name for name in found if name.startswith("kill alone, ")]
    assert len(alone) == 4
    assert sum(found[name].kills for name in alone) == found["kill alone"].kills
    assert "with a broker fault" not in recoveries([cycle for cycle in cycles if cycle.plan.fault is None])


class FakeParts:
    """Parts without processes: a service and Triton, which note what the conductor does with them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr("bench.chaos.end_offsets", lambda config, topic: {0: 7})
        monkeypatch.setattr("bench.chaos.POLL_S", 0.0)
        topics = SimpleNamespace(transactions="transactions")
        self.service: Any = SimpleNamespace(
            running=True,
            waiting_for=lambda: None,
            log_tail=lambda: "out of memory",
            config=SimpleNamespace(kafka=SimpleNamespace(topics=topics)),
            **self._noted("service", "start"),
        )
        self.processes: Any = SimpleNamespace(
            standby_ready=lambda: self.calls.append("standby awaited") or True,
            kill=lambda number, with_standby: self.calls.append(f"kill {number}{' and standby' * with_standby}"),
            **self._noted("supervisor", "freeze", "thaw"),
        )
        triton = SimpleNamespace(pid=1, **self._noted("Triton", "stop", "kill", "freeze", "thaw", "start"))
        watch = SimpleNamespace(done=True, seen_s=float("inf"))
        parts: Any = SimpleNamespace(triton=triton, broker=None)
        self.watched: list[dict[int, int]] = []
        follower: Any = SimpleNamespace(watch=lambda ends: self.watched.append(ends) or watch)
        self.conductor = Conductor(parts, self.service, self.processes, follower)

    def _noted(self, name: str, *methods: str) -> dict[str, Any]:
        return {method: lambda method=method: self.calls.append(f"{name} {method}") for method in methods}


def plan_of(fault: Any, pause_s: float = 0.0, standby: bool = False) -> Plan:
    return Plan(worker=1, pause_s=pause_s, standby=standby, fault=fault, node=0, lead_s=0.0, fault_s=0.0)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> FakeParts:
    return FakeParts(monkeypatch)


def test_a_cycle_kills_one_worker_within_the_fault_and_waits_for_later_transactions(fakes: FakeParts) -> None:
    cycle = fakes.conductor.run(plan_of("triton stopped"))
    assert fakes.calls == ["Triton stop", "kill 1 and standby", "Triton thaw", "Triton start"]
    assert fakes.watched == [{0: 7}]
    assert cycle.recovery_s == float("inf")
    assert cycle.ready_s is not None


def test_the_supervisor_stands_still_while_a_worker_is_away_and_a_standby_that_stays_is_waited_for(
    fakes: FakeParts,
) -> None:
    fakes.conductor.run(plan_of(None, pause_s=0.01, standby=True))
    assert fakes.calls == ["standby awaited", "supervisor freeze", "kill 1", "supervisor thaw"]


def test_parts_that_end_by_themselves_are_restarted_and_reported(fakes: FakeParts) -> None:
    fakes.service.running = False
    fakes.conductor.restart_ended()
    assert fakes.calls == ["service start"]
    fakes.conductor.note_restarts(2)
    assert fakes.conductor.ended_by_themselves == ["service: out of memory", "worker", "worker"]


def test_a_fault_and_a_standstill_end_even_if_the_kill_fails(fakes: FakeParts) -> None:
    fakes.processes.kill = lambda number, with_standby: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fakes.conductor.run(plan_of("triton stopped", pause_s=0.01))
    assert fakes.calls == ["Triton stop", "supervisor freeze", "supervisor thaw", "Triton thaw", "Triton start"]


@pytest.mark.kafka
@pytest.mark.triton
@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_bounded_run_loses_nothing_decides_nothing_twice_and_ends_with_the_same_state(
    tmp_path: Path, kafka_parts: Path, triton_parts: Path
) -> None:
    report = run_chaos(tmp_path / "chaos", cycles=4, workers=2, partitions=4, rate=150.0, seed=5)
    assert report.check.sent > 1_000
    assert report.check.escalated > 50
    assert (report.check.lost, report.check.twice, report.check.strays, report.check.order_violations) == (0, 0, 0, 0)
    assert report.settled
    assert sorted(state.partition for state in report.states if state.equal) == [0, 1, 2, 3]
    assert report.recovery["all"].kills == report.kills == 4
    assert report.ok
