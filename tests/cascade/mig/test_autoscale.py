"""A simulated day: what the rules provision, what is late, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade.cli import main
from cascade.mig import shipped
from cascade.mig.autoscale import HOURLY, STEP_S, Crowd, Replicas, Rule, day_rates, rules, simulate_day
from cascade.mig.demand import Demand
from cascade.mig.evaluation import Evaluation
from cascade.mig.gpus import GPUS
from cascade.mig.hpa import Behavior
from cascade.mig.queueing import Batching
from cascade.mig.service_time import ServiceTimes
from cascade.mig.worker_day import simulate_worker_day, worker_behaviors

A100 = GPUS["a100-40gb"]
PROFILE = A100.profile("1g.5gb")
DEMAND = Demand(calls_per_s=9_000.0, calls_per_s_mean=9_000.0, p99_s=20e-3)
REPLICAS = Replicas(A100, PROFILE, Evaluation(DEMAND, ServiceTimes(A100), Batching(), seed=1))
CROWD = Crowd(factor=4.0, start_h=18.0, minutes=20.0)


def test_the_curve_has_its_busiest_hour_and_the_crowd_on_top() -> None:
    quiet, crowded = day_rates(9_000.0, None), day_rates(9_000.0, CROWD)
    assert quiet.max() == pytest.approx(9_000.0)
    assert quiet.argmax() * STEP_S == HOURLY.index(1.0) * 3_600
    assert crowded.max() == pytest.approx(4.0 * 9_000.0, rel=0.02)
    apart = np.flatnonzero(crowded != quiet) * STEP_S / 3_600
    assert apart.min() >= 18.0
    assert apart.max() <= 18.0 + 21.0 / 60.0 + 1e-9


def test_a_static_day_is_the_same_replicas_all_day() -> None:
    static = Rule(name="static", behavior=Behavior(replicas_min=8, replicas_max=8))
    day = simulate_day(A100, PROFILE, REPLICAS, day_rates(9_000.0, None), static, start_s=30.0)
    assert (day.replicas_min, day.replicas_max) == (8, 8)
    assert day.slice_hours == pytest.approx(8 * 24.0)
    # eight slices of 1g need a second GPU
    assert day.gpu_hours == pytest.approx(2 * 24.0)
    assert day.late_share < 1e-6
    idle_mj = 2 * A100.idle_w * 86_400.0 / (day_rates(9_000.0, None).sum() * STEP_S) * 1e3
    assert day.energy_mj > idle_mj


def test_too_few_slices_break_the_limit_in_the_crowd_and_only_there() -> None:
    one = Rule(name="one", behavior=Behavior(replicas_min=1, replicas_max=1))
    day = simulate_day(A100, PROFILE, REPLICAS, day_rates(9_000.0, CROWD), one, start_s=30.0)
    assert not day.kept
    assert 20 <= day.minutes_broken <= 22


def test_the_autoscaler_follows_the_day_and_a_slow_start_makes_calls_late() -> None:
    rates = day_rates(9_000.0, CROWD)
    behavior = Behavior(replicas_min=1, replicas_max=7)
    rule = Rule(name="autoscaled", behavior=behavior, in_flight=REPLICAS.state(5_000.0).in_flight)
    quick, slow = (simulate_day(A100, PROFILE, REPLICAS, rates, rule, start_s) for start_s in (5.0, 300.0))
    static = simulate_day(A100, PROFILE, REPLICAS, rates, rules(REPLICAS, 7, 1, float(rates.max()))[0], 30.0)
    assert quick.replicas_min == 1
    assert quick.replicas_max > 3
    assert quick.slice_hours < static.slice_hours / 2
    assert quick.late_share < slow.late_share
    # slices of a single GPU: the GPU is on all day, whatever the number of slices
    assert quick.gpu_hours == static.gpu_hours == pytest.approx(24.0)


def test_replicas_never_exceed_the_slices() -> None:
    rates = day_rates(9_000.0, Crowd(factor=50.0, start_h=12.0, minutes=10.0))
    days = [simulate_day(A100, PROFILE, REPLICAS, rates, rule, 30.0) for rule in rules(REPLICAS, 7, 2, rates.max())]
    assert max(day.replicas_max for day in days) == 7


def test_the_command_prints_a_row_for_each_rule_in_eighty_columns(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    figures = tmp_path / "days.json"
    status = main(["mig", "autoscale", "--gpu", "a100-40gb", "--rate", "900000", "--json", str(figures)])
    out = capsys.readouterr().out
    assert status == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    days = json.loads(figures.read_text())["triton"]
    assert [day["rule"]["name"] for day in days[:2]] == ["static, for the peak", "k8s/ as shipped"]
    assert all(day["rule"]["name"] in out for day in days)
    assert "ASSUMED" in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--p99", "1ms"), "keeps it at no rate"),
        (("--least-workers", "13"), "more than the 12 partitions"),
        (("--least", "8"), "have 7 slices 1g.5gb; lower it"),
        (("--profile", "5g.1gb"), "no such profile"),
    ],
)
def test_an_impossible_day_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], reason: str
) -> None:
    status = main(["mig", "autoscale", "--gpu", "a100-40gb", "--rate", "900000", *arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 1
    assert reason in line


def test_workers_never_exceed_the_partitions_and_their_lag_is_processed() -> None:
    rates = day_rates(100_000.0, Crowd(factor=3.0, start_h=18.0, minutes=20.0))
    behavior = worker_behaviors(12, 3, float(rates.max()), 20_000.0)["HPA default"]
    day = simulate_worker_day(rates, 20_000.0, "default", behavior, 30.0)
    # 300,000/s are more than 12 workers decide: the rest waits, and is decided after the crowd
    assert (day.workers_min, day.workers_max) == (3, 12)
    assert day.lag_max > 20 * 60 * (300_000.0 - 12 * 20_000.0) * 0.9
    assert 0.0 < day.late_share < 0.2


def test_workers_for_the_peak_have_no_lag_and_more_core_hours_than_those_that_follow_the_day() -> None:
    rates = day_rates(80_000.0, None)
    days = {
        name: simulate_worker_day(rates, 20_000.0, name, behavior, 30.0)
        for name, behavior in worker_behaviors(12, 3, float(rates.max()), 20_000.0).items()
    }
    static, shipped = days["static, for the peak"], days["k8s/ as shipped"]
    assert (static.late_share, static.lag_max, static.workers_max) == (0.0, 0.0, 7)
    assert shipped.late_share < 0.01
    assert shipped.core_hours < 0.9 * static.core_hours


@pytest.mark.parametrize(
    ("component", "behavior_of"), [("keda-triton", shipped.triton_behavior), ("keda", shipped.worker_behavior)]
)
def test_the_shipped_behavior_is_that_of_the_manifests(
    component: str, behavior_of: Callable[[int, int], Behavior]
) -> None:
    spec = manifest(component)
    behavior = behavior_of(spec["minReplicaCount"], spec["maxReplicaCount"])
    rules = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    for limits, direction in ((behavior.up, rules["scaleUp"]), (behavior.down, rules["scaleDown"])):
        assert [(limit.pods, limit.period_s) for limit in limits] == [
            (policy["value"], policy["periodSeconds"]) for policy in direction["policies"]
        ]
        assert {policy["type"] for policy in direction["policies"]} == {"Pods"}
    assert rules["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert rules["scaleDown"]["stabilizationWindowSeconds"] == behavior.down_window_s


def test_the_shipped_thresholds_are_those_of_the_manifests() -> None:
    waiting, in_flight = (trigger["metadata"] for trigger in manifest("keda-triton")["triggers"])
    assert "queue_duration" in waiting["query"]
    assert "request_duration" in in_flight["query"]
    assert (float(waiting["threshold"]), float(in_flight["threshold"])) == (shipped.WAITING, shipped.IN_FLIGHT)
    lag, busy = (trigger["metadata"] for trigger in manifest("keda")["triggers"])
    assert (float(lag["lagThreshold"]), float(busy["threshold"])) == (shipped.LAG, shipped.BUSY)


def manifest(component: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    path = Path(__file__).parents[3] / "k8s" / "components" / component / "scaled-object.yaml"
    spec: dict[str, Any] = yaml.safe_load(path.read_text())["spec"]
    return spec
