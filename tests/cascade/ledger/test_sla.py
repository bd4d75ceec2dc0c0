"""Objectives: met, missed, and never met without data."""

import msgspec
import numpy as np
import pytest

from cascade.errors import SettingError
from cascade.ledger import LatencyObjective, Path, ServiceLevel
from cascade.ledger.counters import Counters
from cascade.ledger.latency import LatencyHistogram
from cascade.ledger.sla import ObjectiveEvents, ObjectiveResult, count_events, evaluate


def _paths(screened_s: np.ndarray, degraded: int = 0) -> dict[Path, LatencyHistogram]:
    paths = Counters.empty().paths
    paths["screened"].record(screened_s)
    paths["degraded"].record_many(0.05, degraded)
    return paths


def _result(screened_s: np.ndarray, degraded: int = 0) -> dict[str, ObjectiveResult]:
    return {result.name: result for result in evaluate(ServiceLevel(), _paths(screened_s, degraded))}


def test_an_objective_within_its_limit_is_met_and_has_its_margin() -> None:
    result = _result(np.full(100, 0.004))["p99 of screened"]
    assert result.met
    assert result.value == pytest.approx(4.0, rel=0.01)
    assert result.margin == pytest.approx(0.2, abs=0.01)


def test_a_slow_decision_in_fifty_misses_the_p99() -> None:
    result = _result(np.append(np.full(98, 0.001), [0.009, 0.009]))["p99 of screened"]
    assert result.status == "missed"
    assert result.margin is not None
    assert result.margin < 0


def test_an_objective_without_data_is_not_met() -> None:
    results = _result(np.array([]))
    assert {result.status for result in results.values()} == {"no data"}
    assert not any(result.met for result in results.values())
    assert all(result.value is None and result.margin is None for result in results.values())


@pytest.mark.parametrize(("degraded", "status"), [(1, "met"), (2, "missed")])
def test_the_degraded_share_is_over_all_decisions(degraded: int, status: str) -> None:
    assert _result(np.full(1_000 - degraded, 0.001), degraded)["degraded share"].status == status


def test_the_service_level_is_read_from_toml_and_checked() -> None:
    text = b'degraded_share_max = 0.01\n[[latency]]\npath = "escalated"\nquantile = 0.999\nlimit_ms = 50.0\n'
    level = msgspec.toml.decode(text, type=ServiceLevel)
    assert level.latency == (LatencyObjective(path="escalated", quantile=0.999, limit_ms=50.0),)
    with pytest.raises(SettingError, match="quantile"):
        LatencyObjective(path="screened", quantile=99.0, limit_ms=5.0)
    with pytest.raises(SettingError, match="limit_ms"):
        LatencyObjective(path="screened", limit_ms=0.0)
    with pytest.raises(SettingError, match="degraded_share_max"):
        ServiceLevel(degraded_share_max=1.5)


def test_the_events_and_breaches_of_objectives_are_counted() -> None:
    paths = _paths(np.array([0.001] * 95 + [0.0051] * 2 + [0.1] * 3), degraded=7)
    screened, escalated, degraded = count_events(ServiceLevel(), paths)
    assert (screened.name, screened.events, screened.breaches) == ("p99 of screened", 100, 5)
    assert screened.budget == pytest.approx(0.01)
    assert (escalated.events, escalated.breaches) == (0, 0)
    assert degraded == ObjectiveEvents(name="degraded share", events=107, breaches=7, budget=0.001)
    results = evaluate(ServiceLevel(), paths)
    assert [result.name for result in results] == [counts.name for counts in (screened, escalated, degraded)]
