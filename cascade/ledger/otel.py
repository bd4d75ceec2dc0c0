"""Converts the ledger's Prometheus families to OpenTelemetry metrics.

Names follow OpenTelemetry's semantic conventions: dots separate namespaces, and the unit (UCUM) is not part of the
name. Counters are monotonic sums and histograms have explicit buckets; both are cumulative since their worker began.
Importing this module requires the extra `otel`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

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
# The start time of every data point of its worker.
START: Final = "cascade_start_time_seconds"
# The supervisor counts these. It lives longer than its workers, so their start time does not apply.
SUPERVISORS: Final = frozenset({"cascade_worker_up", "cascade_worker_restarts"})
# From the Prometheus family to OpenTelemetry's name and unit. A unit in braces marks a count, which is an integer.
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
    "cascade_deep_replicas_ready": ("cascade.deep.replicas_ready", "{replica}"),
    "cascade_deep_replica_up": ("cascade.deep.replica.up", "1"),
    "cascade_deep_replica_calls": ("cascade.deep.replica.calls", "{call}"),
    "cascade_deep_replica_failures": ("cascade.deep.replica.failures", "{call}"),
    "cascade_hedged_calls": ("cascade.deep.hedged_calls", "{call}"),
    "cascade_recovery_duration_seconds": ("cascade.recovery.duration", "s"),
    "cascade_sessions": ("cascade.sessions", "{session}"),
    "cascade_offset_gaps": ("cascade.offset_gaps", "{gap}"),
    "cascade_escalation_budget_factor": ("cascade.escalation.budget_factor", "1"),
    "cascade_state_covered_ratio": ("cascade.state.covered", "1"),
    "cascade_early_records": ("cascade.clock.early_records", "{record}"),
    "cascade_clock_skew_bound_seconds": ("cascade.clock.skew_bound", "s"),
    "cascade_first_frauds": ("cascade.first_frauds", "{fraud}"),
    "cascade_certificate_recall_ratio": ("cascade.certificate.recall", "1"),
    "cascade_certificate_evidence_nats": ("cascade.certificate.evidence", "nat"),
    "cascade_certificate_alarm_nats": ("cascade.certificate.alarm", "nat"),
    "cascade_certificate_expires_seconds": ("cascade.certificate.expires", "s"),
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
    "cascade_assigned_partitions": ("cascade.partition.assigned", "{partition}"),
    "cascade_partition_lag_records": ("cascade.partition.lag", "{record}"),
    "cascade_worker_up": ("cascade.worker.up", "1"),
    "cascade_worker_restarts": ("cascade.worker.restarts", "{restart}"),
}
ATTRIBUTES: Final[dict[str, str]] = {
    "path": "cascade.decision.path",
    "decision_id": "cascade.decision.id",
    "caught": "cascade.fraud.caught",
    "cause": "cascade.degraded.cause",
    "reason": "cascade.dead_letter.reason",
    "stage": "cascade.stage.name",
    "meter": "cascade.meter.name",
    "replica": "server.address",
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
    """The metrics of all families.

    families: of Prometheus. resource: the service, as OpenTelemetry describes it.
    started_s: start time of data points whose worker has no `START`, seconds since the epoch.
    now_s: time of all data points, seconds since the epoch.
    """
    listed = list(families)
    starts = [sample for family in listed if family.name == START for sample in family.samples]
    started = {sample.labels.get("worker", ""): sample.value for sample in starts}
    metrics = [
        _metric(family, {} if family.name in SUPERVISORS else started, started_s, _nanoseconds(now_s))
        for family in listed
        if family.name != START and family.samples
    ]
    scope = ScopeMetrics(InstrumentationScope(SCOPE, cascade.__version__), metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _metric(family: Metric, started: Mapping[str, float], started_s: float, now_ns: int) -> OtelMetric:
    # a family that is not in NAMES keeps its own name
    name, unit = NAMES.get(family.name, (family.name.replace("cascade_", "cascade.", 1), ""))
    counted = unit.startswith("{")

    def start_ns(labels: Mapping[str, str]) -> int:
        return _nanoseconds(started.get(labels.get("worker", ""), started_s))

    def point(sample: Sample) -> NumberDataPoint:
        value = int(sample.value) if counted else float(sample.value)
        return NumberDataPoint(_attributes(sample.labels), start_ns(sample.labels), now_ns, value)

    data: Sum | Gauge | Histogram
    if family.type == "counter":
        points = [point(sample) for sample in family.samples if sample.name == f"{family.name}_total"]
        data = Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)
    elif family.type == "histogram":
        histograms = [
            _histogram(family.name, labels, samples, start_ns(labels), now_ns)
            for labels, samples in _by_labels(family.samples)
        ]
        data = Histogram(histograms, AggregationTemporality.CUMULATIVE)
    else:
        data = Gauge([point(sample) for sample in family.samples])
    return OtelMetric(name, family.documentation, unit, data)


def _by_labels(samples: Iterable[Sample]) -> Iterable[tuple[dict[str, str], list[Sample]]]:
    """The samples of each histogram of a family: its labels, without the limit `le` of a bucket, and its samples."""
    by_labels: dict[tuple[tuple[str, str], ...], list[Sample]] = {}
    for sample in samples:
        key = tuple((name, value) for name, value in sample.labels.items() if name != "le")
        by_labels.setdefault(key, []).append(sample)
    return [(dict(labels), found) for labels, found in by_labels.items()]


def _histogram(
    name: str, labels: Mapping[str, str], samples: Iterable[Sample], start_ns: int, now_ns: int
) -> HistogramDataPoint:
    """A data point of one histogram: Prometheus counts up to each limit, OpenTelemetry between two limits."""
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
    unknown: Any = None  # minimum and maximum
    attributes, bounds = _attributes(labels), limits[:-1]
    return HistogramDataPoint(
        attributes, start_ns, now_ns, below, total, counts, bounds, unknown, unknown, exemplars=exemplars
    )


def _attributes(labels: Mapping[str, str]) -> dict[str, str]:
    return {ATTRIBUTES.get(name, f"cascade.{name}"): value for name, value in labels.items()}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
