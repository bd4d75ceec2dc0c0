"""The ledger as Prometheus metrics, collected when scraped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

import cascade
from cascade.ledger.account import MeterState
from cascade.ledger.counters import Counters
from cascade.ledger.exemplars import BUCKETS_S, EXEMPLAR_LABEL, LatencyExemplar
from cascade.ledger.latency import LatencyHistogram
from cascade.ledger.ledger import Ledger
from cascade.ledger.sla import ObjectiveEvents, ObjectiveResult

_Buckets = list[tuple[str, float] | tuple[str, float, Exemplar]]


class LedgerCollector(Collector):
    """Metrics of one ledger, a consistent copy for each scrape, which also samples the energy meters.

    Histogram counts come from the ledger's finer buckets: one that a limit cuts is counted above it, so a count is at
    most 1.6 % of the limit's neighbourhood too low, and never too high. The latency of decisions has exemplars, which
    OpenMetrics shows: for each bucket a recent decision in it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def collect(self) -> Iterable[Metric]:
        """All families, at this moment."""
        counters = self._ledger.counters()
        yield from _decisions(counters, self._ledger)
        yield from _stages(counters)
        yield from _deep(counters)
        yield from _delivery(counters)
        yield from _clock(counters)
        yield from energy_metrics(self._ledger.sample_energy())
        yield from _objectives(self._ledger.objectives(counters))
        yield from _events(self._ledger.objective_events(counters))
        yield GaugeMetricFamily(
            "cascade_start_time_seconds", "When the ledger began, since the epoch.", self._ledger.started.timestamp()
        )
        ledger = self._ledger
        versions = {
            "version": cascade.__version__, "bundle_version": ledger.bundle_version, "screener": ledger.screener
        }  # fmt: skip
        yield InfoMetricFamily("cascade_build", "Versions that decide.", value=versions)


def ledger_registry(ledger: Ledger) -> CollectorRegistry:
    """A registry of its own that holds the ledger's collector, for `prometheus_client.exposition`."""
    registry = CollectorRegistry()
    registry.register(LedgerCollector(ledger))
    return registry


def _decisions(counters: Counters, ledger: Ledger) -> Iterable[Metric]:
    yield _counter(
        "cascade_decisions", "Decisions.", "path", ((path, held.count) for path, held in counters.paths.items())
    )
    latency = HistogramMetricFamily("cascade_decision_latency_seconds", "From append to decision.", labels=["path"])
    for path, held in counters.paths.items():
        latency.add_metric([path], _buckets(held, ledger.exemplars(path)), held.sum_s)
    yield latency
    yield _counter("cascade_degraded", "Degraded decisions.", "cause", counters.degraded_by_cause.items())
    yield _counter("cascade_dead_letters", "Records that could not be read.", "reason", counters.dead_letters.items())
    yield CounterMetricFamily("cascade_labels", "Labels that arrived.", counters.labels)


def _stages(counters: Counters) -> Iterable[Metric]:
    stages = ((stage, held) for stage, held in counters.stages.items() if held.count)
    yield _histogram("cascade_stage_duration_seconds", "Time that a transaction spends in a stage.", "stage", stages)
    cpu_s = ((stage, spent) for stage, spent in counters.stage_cpu_s.items() if spent)
    yield _counter("cascade_stage_cpu_seconds", "CPU time of a stage's thread.", "stage", cpu_s)


def _deep(counters: Counters) -> Iterable[Metric]:
    yield CounterMetricFamily("cascade_deep_rows", "Transactions sent to the deep model.", counters.deep_rows)
    yield CounterMetricFamily("cascade_late_answers", "Deep answers after the decision.", counters.late_answers)
    calls = HistogramMetricFamily("cascade_deep_call_duration_seconds", "Calls to the deep model.")
    calls.add_metric([], _buckets(counters.deep_calls), counters.deep_calls.sum_s)
    yield calls


def _delivery(counters: Counters) -> Iterable[Metric]:
    recovery = HistogramMetricFamily(
        "cascade_recovery_duration_seconds", "From a partition's assignment to its first decision."
    )
    recovery.add_metric([], _buckets(counters.recoveries), counters.recoveries.sum_s)
    yield recovery
    yield CounterMetricFamily("cascade_sessions", "Times that connections were made anew.", counters.sessions)
    yield CounterMetricFamily("cascade_offset_gaps", "Confirmed gaps in the log.", counters.offset_gaps)
    yield CounterMetricFamily("cascade_hedged_calls", "Deep calls sent a second time.", counters.hedged_calls)
    yield GaugeMetricFamily(
        "cascade_escalation_raised_log_odds",
        "How far overload has raised the escalation threshold.",
        counters.escalation_raised,
    )


def _clock(counters: Counters) -> Iterable[Metric]:
    yield CounterMetricFamily(
        "cascade_early_records", "Records stamped ahead of the worker's clock.", counters.early_records
    )
    bound = GaugeMetricFamily(
        "cascade_clock_skew_bound_seconds",
        "Least wait of a record in ten minutes, by its stamp: the worker's clock is ahead of the one that stamps"
        " records (the broker's, with LogAppendTime) by at most this; below zero, it is behind by at least as much.",
    )
    if counters.least_wait_s is not None:
        bound.add_metric([], counters.least_wait_s[0])
    yield bound


def energy_metrics(states: Iterable[MeterState]) -> Iterable[Metric]:
    """Joules, grams of CO2e where they are accounted, and whether each meter answers."""
    joules = CounterMetricFamily("cascade_energy_joules", "Energy since the start.", labels=["meter", "kind"])
    working = GaugeMetricFamily("cascade_energy_meter_up", "1 where the meter answers.", labels=["meter"])
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
    met = GaugeMetricFamily(
        "cascade_objective_met", "1 where met since the start; absent without data.", labels=["objective"]
    )
    use = GaugeMetricFamily(
        "cascade_objective_used_ratio", "Value over limit; absent without data.", labels=["objective"]
    )
    limit = GaugeMetricFamily(
        "cascade_objective_limit_seconds", "The limit of a latency objective.", labels=["objective"]
    )
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
    """For burn rates: breaches over events, over the budget."""
    events = CounterMetricFamily("cascade_objective_events", "Decisions an objective is about.", labels=["objective"])
    breaches = CounterMetricFamily("cascade_objective_breaches", "Those of them that broke it.", labels=["objective"])
    budget = GaugeMetricFamily("cascade_objective_budget_ratio", "The share that may break it.", labels=["objective"])
    for one in counts:
        events.add_metric([one.name], one.events)
        breaches.add_metric([one.name], one.breaches)
        budget.add_metric([one.name], one.budget)
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
        (limit, count) if one is None else (limit, count, _exemplar(one))
        for (limit, count), one in zip(named, exemplars, strict=True)
    ]


def _exemplar(one: LatencyExemplar) -> Exemplar:
    return Exemplar({EXEMPLAR_LABEL: one.decision_id}, one.latency_s, one.at_s)
