"""The ledger's metrics as OpenTelemetry's, from the families that Prometheus gets, so that nothing is counted twice.

Names follow OpenTelemetry's semantic conventions: dots between namespaces, the unit (UCUM) beside the name and not in
it. Counters are monotonic sums and histograms have explicit buckets, both cumulative since their worker began.
Needs the extra `otel`, so nothing imports this module before it is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Metric as OtelMetric
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

import cascade

SCOPE: Final = "cascade.ledger"
# Every data point has it as its beginning.
START: Final = "cascade_start_time_seconds"
# Told by the supervisor, who lives longer than the worker that they are about.
SUPERVISORS: Final = frozenset({"cascade_worker_up", "cascade_worker_restarts"})
# Prometheus' family: OpenTelemetry's name and unit. What is counted is a whole number, and has its unit in braces.
NAMES: Final[dict[str, tuple[str, str]]] = {
    "cascade_decisions": ("cascade.decisions", "{decision}"),
    "cascade_decision_latency_seconds": ("cascade.decision.duration", "s"),
    "cascade_degraded": ("cascade.degraded_decisions", "{decision}"),
    "cascade_dead_letters": ("cascade.dead_letters", "{record}"),
    "cascade_labels": ("cascade.labels", "{label}"),
    "cascade_stage_duration_seconds": ("cascade.stage.duration", "s"),
    "cascade_stage_cpu_seconds": ("cascade.stage.cpu.time", "s"),
    "cascade_deep_rows": ("cascade.deep.rows", "{transaction}"),
    "cascade_late_answers": ("cascade.deep.late_answers", "{answer}"),
    "cascade_deep_call_duration_seconds": ("cascade.deep.call.duration", "s"),
    "cascade_hedged_calls": ("cascade.deep.hedged_calls", "{call}"),
    "cascade_recovery_duration_seconds": ("cascade.recovery.duration", "s"),
    "cascade_sessions": ("cascade.sessions", "{session}"),
    "cascade_offset_gaps": ("cascade.offset_gaps", "{gap}"),
    "cascade_escalation_raised_log_odds": ("cascade.escalation.raise", "1"),
    "cascade_early_records": ("cascade.clock.early_records", "{record}"),
    "cascade_clock_skew_bound_seconds": ("cascade.clock.skew_bound", "s"),
    "cascade_energy_joules": ("cascade.meter.energy", "J"),
    "cascade_carbon_grams": ("cascade.meter.carbon", "g"),
    "cascade_energy_meter_up": ("cascade.meter.up", "1"),
    "cascade_objective_met": ("cascade.objective.met", "1"),
    "cascade_objective_limit_seconds": ("cascade.objective.limit", "s"),
    "cascade_objective_used_ratio": ("cascade.objective.used", "1"),
    "cascade_objective_events": ("cascade.objective.events", "{decision}"),
    "cascade_objective_breaches": ("cascade.objective.breaches", "{decision}"),
    "cascade_objective_budget_ratio": ("cascade.objective.budget", "1"),
    "cascade_build": ("cascade.build", "1"),
    "cascade_partition_lag_records": ("cascade.partition.lag", "{record}"),
    "cascade_worker_up": ("cascade.worker.up", "1"),
    "cascade_worker_restarts": ("cascade.worker.restarts", "{restart}"),
}
ATTRIBUTES: Final[dict[str, str]] = {
    "path": "cascade.decision.path",
    "decision_id": "cascade.decision.id",
    "cause": "cascade.degraded.cause",
    "reason": "cascade.dead_letter.reason",
    "stage": "cascade.stage.name",
    "meter": "cascade.meter.name",
    "kind": "cascade.energy.kind",
    "objective": "cascade.objective.name",
    "version": "service.version",
    "bundle_version": "cascade.bundle.version",
    "screener": "cascade.screener.method",
    "deep_backend": "cascade.deep.backend",
    "worker": "cascade.worker.id",
    "topic": "messaging.destination.name",
    "partition": "messaging.destination.partition.id",
}


def metrics_data(families: Iterable[Metric], resource: Resource, started_s: float, now_s: float) -> MetricsData:
    """All families at `now_s`; `started_s`, both seconds since the epoch, is where a family names no beginning."""
    found = list(families)
    started = {one.labels.get("worker", ""): one.value for family in found if family.name == START
               for one in family.samples}  # fmt: skip
    metrics = [
        _metric(family, {} if family.name in SUPERVISORS else started, started_s, _nanoseconds(now_s))
        for family in found
        if family.name != START and family.samples
    ]
    scope = ScopeMetrics(InstrumentationScope(SCOPE, cascade.__version__), metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _metric(family: Metric, started: Mapping[str, float], started_s: float, now_ns: int) -> OtelMetric:
    # a family that is new here keeps its name until it gets a better one
    name, unit = NAMES.get(family.name, (family.name.replace("cascade_", "cascade.", 1), ""))
    counted = unit.startswith("{")

    def start_ns(labels: Mapping[str, str]) -> int:
        return _nanoseconds(started.get(labels.get("worker", ""), started_s))

    def point(sample: Sample) -> NumberDataPoint:
        value = int(sample.value) if counted else float(sample.value)
        return NumberDataPoint(_attributes(sample.labels), start_ns(sample.labels), now_ns, value)

    data: Sum | Gauge | Histogram
    if family.type == "counter":
        points = [point(one) for one in family.samples if one.name == f"{family.name}_total"]
        data = Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)
    elif family.type == "histogram":
        histograms = [
            _histogram(family.name, labels, samples, start_ns(labels), now_ns)
            for labels, samples in _by_labels(family.samples)
        ]
        data = Histogram(histograms, AggregationTemporality.CUMULATIVE)
    else:
        data = Gauge([point(one) for one in family.samples])
    return OtelMetric(name, family.documentation, unit, data)


def _by_labels(samples: Iterable[Sample]) -> Iterable[tuple[dict[str, str], list[Sample]]]:
    """The samples of each histogram of a family, by their labels without the bucket's limit."""
    found: dict[tuple[tuple[str, str], ...], list[Sample]] = {}
    for sample in samples:
        key = tuple((name, value) for name, value in sample.labels.items() if name != "le")
        found.setdefault(key, []).append(sample)
    return [(dict(labels), held) for labels, held in found.items()]


def _histogram(
    name: str, labels: Mapping[str, str], samples: Iterable[Sample], start_ns: int, now_ns: int
) -> HistogramDataPoint:
    """Prometheus counts up to each limit, OpenTelemetry between them; minimum and maximum are not known."""
    limits, counts, exemplars = [], [], []
    total, below = 0.0, 0
    for sample in samples:
        if sample.name == f"{name}_sum":
            total = float(sample.value)
        elif sample.name == f"{name}_bucket":
            limits.append(float(sample.labels["le"]))
            counts.append(int(sample.value) - below)
            below = int(sample.value)
            if sample.exemplar is not None:
                at_ns = _nanoseconds(float(sample.exemplar.timestamp or 0.0))
                exemplars.append(Exemplar(_attributes(sample.exemplar.labels), sample.exemplar.value, at_ns))
    return HistogramDataPoint(
        attributes=_attributes(labels), start_time_unix_nano=start_ns, time_unix_nano=now_ns, count=below, sum=total,
        bucket_counts=counts, explicit_bounds=limits[:-1], min=None, max=None,  # type: ignore[arg-type]  # left out
        exemplars=exemplars,
    )  # fmt: skip


def _attributes(labels: Mapping[str, str]) -> dict[str, str]:
    return {ATTRIBUTES.get(name, f"cascade.{name}"): value for name, value in labels.items()}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
