"""The ledger as Prometheus metrics, collected at each scrape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

import cascade
from cascade.evidence import alarm_nats, evidence_nats
from cascade.ledger.account import CertifiedRecall, MeterState
from cascade.ledger.buckets import BUCKETS_S
from cascade.ledger.counters import Counters
from cascade.ledger.exemplars import EXEMPLAR_LABEL, LatencyExemplar
from cascade.ledger.latency import LatencyHistogram
from cascade.ledger.ledger import Ledger
from cascade.ledger.sla import ObjectiveEvents, ObjectiveResult, count_events, evaluate

_Buckets = list[tuple[str, float] | tuple[str, float, Exemplar]]


class LedgerCollector(Collector):
    """Metrics of one ledger. Each scrape reads the energy meters and takes a consistent copy of the counts.

    The histogram counts come from the ledger's finer buckets, 1.6 % wide. A fine bucket that contains a limit counts
    above the limit, so that a count is never too high. The latency of decisions has exemplars, which only OpenMetrics
    contains: a recent decision for each bucket.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def collect(self) -> Iterable[Metric]:
        """All metric families."""
        counters = self._ledger.counters()
        yield from _decisions(counters, self._ledger)
        yield from _stages(counters)
        yield from _deep(counters)
        yield from _delivery(counters)
        yield from _clock(counters)
        if self._ledger.certified is not None:
            yield from _watch(counters, self._ledger.certified)
        yield from energy_metrics(self._ledger.sample_energy())
        yield from _objectives(evaluate(self._ledger.service_level, counters.paths))
        yield from _events(count_events(self._ledger.service_level, counters.paths))
        yield GaugeMetricFamily(
            "cascade_start_time_seconds", "When the ledger began, since the epoch.", self._ledger.started.timestamp()
        )
        versions = {"bundle_version": self._ledger.bundle_version, "screener": self._ledger.screener}
        versions["version"] = cascade.__version__
        yield InfoMetricFamily("cascade_build", "Versions that decide.", value=versions)


def ledger_registry(ledger: Ledger) -> CollectorRegistry:
    """A new registry with the ledger's collector, for `prometheus_client.exposition`."""
    registry = CollectorRegistry()
    registry.register(LedgerCollector(ledger))
    return registry


def _decisions(counters: Counters, ledger: Ledger) -> Iterable[Metric]:
    counts = ((path, histogram.count) for path, histogram in counters.paths.items())
    yield _counter("cascade_decisions", "Decisions.", "path", counts)
    latency = HistogramMetricFamily("cascade_decision_latency_seconds", "From append to decision.", labels=["path"])
    for path, histogram in counters.paths.items():
        latency.add_metric([path], _buckets(histogram, ledger.exemplars(path)), histogram.sum_s)
    yield latency
    yield _counter("cascade_degraded", "Degraded decisions.", "cause", counters.degraded_by_cause.items())
    yield _counter("cascade_dead_letters", "Records that could not be read.", "reason", counters.dead_letters.items())
    yield CounterMetricFamily("cascade_labels", "Labels that arrived.", counters.labels)


def _stages(counters: Counters) -> Iterable[Metric]:
    stages = ((stage, histogram) for stage, histogram in counters.stages.items() if histogram.count)
    yield _histogram("cascade_stage_duration_seconds", "Time that a transaction spends in a stage.", "stage", stages)
    cpu_s = ((stage, seconds) for stage, seconds in counters.stage_cpu_s.items() if seconds)
    yield _counter("cascade_stage_cpu_seconds", "CPU time of a stage's thread.", "stage", cpu_s)


def _deep(counters: Counters) -> Iterable[Metric]:
    yield CounterMetricFamily("cascade_deep_rows", "Transactions sent to the deep model.", counters.deep_rows)
    yield CounterMetricFamily("cascade_late_answers", "Deep calls answered too late.", counters.late_answers)
    calls = HistogramMetricFamily("cascade_deep_call_duration_seconds", "Calls to the deep model.")
    calls.add_metric([], _buckets(counters.deep_calls), counters.deep_calls.sum_s)
    yield calls


def _delivery(counters: Counters) -> Iterable[Metric]:
    recovery = HistogramMetricFamily(
        "cascade_recovery_duration_seconds", "From a partition's assignment to its first decision."
    )
    recovery.add_metric([], _buckets(counters.recoveries), counters.recoveries.sum_s)
    yield recovery
    yield CounterMetricFamily("cascade_sessions", "Times that the worker opened its connections.", counters.sessions)
    yield CounterMetricFamily("cascade_offset_gaps", "Confirmed gaps in the log.", counters.offset_gaps)
    yield CounterMetricFamily("cascade_hedged_calls", "Deep calls sent a second time.", counters.hedged_calls)
    yield GaugeMetricFamily(
        "cascade_escalation_budget_factor",
        "The part of the escalation budget that overload leaves.",
        counters.budget_factor,
    )
    covered = GaugeMetricFamily(
        "cascade_state_covered_ratio", "Share of the longest window that the feature state covers; absent at first."
    )
    if counters.state_covered is not None:
        covered.add_metric([], counters.state_covered)
    yield covered


def _clock(counters: Counters) -> Iterable[Metric]:
    yield CounterMetricFamily(
        "cascade_early_records", "Records stamped ahead of the worker's clock.", counters.early_records
    )
    bound = GaugeMetricFamily(
        "cascade_clock_skew_bound_seconds",
        "Least wait of a record in ten minutes. The worker's clock is ahead of the clock that stamps records (the"
        " broker's, with LogAppendTime) by at most this; if negative, it is behind by at least as much.",
    )
    if counters.least_wait_s is not None:
        bound.add_metric([], counters.least_wait_s[0])
    yield bound


def _watch(counters: Counters, certified: CertifiedRecall) -> Iterable[Metric]:
    """What labels say of the certificate. Evidence of several workers adds up."""
    caught, missed = counters.first_frauds_caught, counters.first_frauds_missed
    help_text = "Cards' first frauds in a period, by labels, by whether they had been reviewed or declined."
    yield _counter("cascade_first_frauds", help_text, "caught", (("yes", caught), ("no", missed)))
    gauges = {
        "cascade_certificate_recall_ratio": ("Least recall of first frauds, certified.", certified.at_least),
        "cascade_certificate_evidence_nats": (
            "Evidence that the recall is lower.", evidence_nats(caught, missed, certified.at_least)
        ),
        "cascade_certificate_alarm_nats": ("Evidence that is an alarm.", alarm_nats(certified.alarm_level)),
        "cascade_certificate_expires_seconds": (
            "End of the certificate, since the epoch.", certified.expires.timestamp()
        ),
    }  # fmt: skip
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(name, text, value)


def energy_metrics(states: Iterable[MeterState]) -> Iterable[Metric]:
    """Joules of each meter, grams of CO2e with carbon accounting, and whether the meter answers."""
    joules = CounterMetricFamily("cascade_energy_joules", "Energy since the start.", labels=["meter", "kind"])
    working = GaugeMetricFamily("cascade_energy_meter_up", "1 if the meter answers.", labels=["meter"])
    grams = CounterMetricFamily("cascade_carbon_grams", "CO2e of the energy since the start.", labels=["meter", "kind"])
    for state in states:
        working.add_metric([state.meter], float(state.energy_j is not None))
        if state.energy_j is not None and state.kind is not None:
            joules.add_metric([state.meter, state.kind], state.energy_j)
            if state.carbon_g is not None:
                grams.add_metric([state.meter, state.kind], state.carbon_g)
    yield joules
    yield grams
    yield working


def _objectives(results: Iterable[ObjectiveResult]) -> Iterable[Metric]:
    labels = ["objective"]
    met = GaugeMetricFamily("cascade_objective_met", "1 if met since the start; absent without data.", labels=labels)
    use = GaugeMetricFamily("cascade_objective_used_ratio", "Value over limit; absent without data.", labels=labels)
    limit = GaugeMetricFamily("cascade_objective_limit_seconds", "Limit of a latency objective.", labels=labels)
    for result in results:
        if result.unit == "ms":
            limit.add_metric([result.name], result.limit / 1e3)
        if result.value is not None:
            met.add_metric([result.name], float(result.met))
            if result.limit:
                use.add_metric([result.name], result.value / result.limit)
    yield met
    yield use
    yield limit


def _events(counts: Iterable[ObjectiveEvents]) -> Iterable[Metric]:
    """The terms of a burn rate: breaches over events, over the budget."""
    labels = ["objective"]
    events = CounterMetricFamily("cascade_objective_events", "Decisions that an objective covers.", labels=labels)
    breaches = CounterMetricFamily("cascade_objective_breaches", "Decisions that missed it.", labels=labels)
    budget = GaugeMetricFamily("cascade_objective_budget_ratio", "Share that may miss it.", labels=labels)
    for objective in counts:
        events.add_metric([objective.name], objective.events)
        breaches.add_metric([objective.name], objective.breaches)
        budget.add_metric([objective.name], objective.budget)
    yield from (events, breaches, budget)


def _counter(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in values:
        family.add_metric([value], count)
    return family


def _histogram(
    name: str, text: str, label: str, histograms: Iterable[tuple[str, LatencyHistogram]]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=[label])
    for value, histogram in histograms:
        family.add_metric([value], _buckets(histogram), histogram.sum_s)
    return family


def _buckets(histogram: LatencyHistogram, exemplars: Sequence[LatencyExemplar | None] = ()) -> _Buckets:
    counts = [*histogram.counts_up_to(np.array(BUCKETS_S)).tolist(), histogram.count]
    named = zip([*map(str, BUCKETS_S), "+Inf"], map(float, counts), strict=True)
    if not exemplars:
        return list(named)
    return [
        (limit, count) if exemplar is None else (limit, count, _exemplar(exemplar))
        for (limit, count), exemplar in zip(named, exemplars, strict=True)
    ]


def _exemplar(exemplar: LatencyExemplar) -> Exemplar:
    return Exemplar({EXEMPLAR_LABEL: exemplar.decision_id}, exemplar.latency_s, exemplar.at_s)
