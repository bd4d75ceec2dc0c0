"""The ledger: what every decision took, told once a batch and read at any time from any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Final, get_args

from cascade.columns import Float64
from cascade.errors import CascadeError
from cascade.ledger.latency import LatencyHistogram
from cascade.ledger.machine import Machine, describe_machine
from cascade.ledger.sla import ObjectiveResult, Path, ServiceLevel, evaluate
from cascade.ledger.stage_clock import STAGES, Stage
from cascade.ledger.summary import (
    DeepCallFigures,
    EnergyFigure,
    EnergyTotal,
    LatencyFigures,
    LedgerSummary,
    PathFigures,
    QualityComparison,
    StageFigures,
)
from cascade.protocols import EnergyKind, EnergyMeter, EnergyReading

PATHS: Final[tuple[Path, ...]] = get_args(Path)

# Causes and reasons become label values of metrics: a bug that puts a message into them must not fill Prometheus.
LABELS_MAX: Final = 32
OTHER_LABEL: Final = "other"


@dataclass(slots=True)
class Counters:
    """The ledger's counts; a copy is consistent within itself."""

    paths: dict[Path, LatencyHistogram]
    stages: dict[Stage, LatencyHistogram]
    stage_cpu_s: dict[Stage, float]
    deep_calls: LatencyHistogram
    degraded_by_cause: dict[str, int]
    dead_letters: dict[str, int]
    deep_rows: int = 0
    labels: int = 0
    late_answers: int = 0
    recoveries: LatencyHistogram = field(default_factory=LatencyHistogram)
    sessions: int = 0
    offset_gaps: int = 0
    hedged_calls: int = 0
    escalation_raised: float = 0.0
    escalation_raised_max: float = 0.0

    @classmethod
    def empty(cls) -> Counters:
        """Counters before the first batch."""
        return cls(
            paths={path: LatencyHistogram() for path in PATHS},
            stages={stage: LatencyHistogram() for stage in STAGES},
            stage_cpu_s=dict.fromkeys(STAGES, 0.0),
            deep_calls=LatencyHistogram(),
            degraded_by_cause={},
            dead_letters={},
        )

    def copy(self) -> Counters:
        """An independent copy."""
        return replace(
            self,
            paths={path: histogram.copy() for path, histogram in self.paths.items()},
            stages={stage: histogram.copy() for stage, histogram in self.stages.items()},
            stage_cpu_s=dict(self.stage_cpu_s),
            deep_calls=self.deep_calls.copy(),
            degraded_by_cause=dict(self.degraded_by_cause),
            dead_letters=dict(self.dead_letters),
            recoveries=self.recoveries.copy(),
        )

    @property
    def decisions(self) -> int:
        """Decisions on all paths."""
        return sum(histogram.count for histogram in self.paths.values())


@dataclass(frozen=True, slots=True)
class MeterState:
    """The last word of one meter: joules since the ledger began, or the problem since which it gives none.

    `kind` stays known where a meter that once worked is lost, so that its kind's total is known to lack it.
    """

    meter: str
    kind: EnergyKind | None
    source: str
    energy_j: float | None
    problem: str | None


class _MeterAccount:
    """One meter's joules from the ledger's beginning, or from its first answer where that came later."""

    def __init__(self, meter: EnergyMeter) -> None:
        self._meter = meter
        self._first: EnergyReading | None = None

    def state(self) -> MeterState:
        try:
            reading = self._meter.read()
        except (CascadeError, OSError) as error:
            kind = None if self._first is None else self._first.kind
            return MeterState(self._meter.name, kind, "", None, str(error))
        self._first = self._first or reading
        return MeterState(self._meter.name, reading.kind, reading.source, reading.energy_j - self._first.energy_j, None)


class Ledger:
    """Counts decisions, latency and energy; the worker calls each `record_` once a batch.

    Any thread may call any method: one lock guards the counts (held for microseconds, and for the copy that readers
    take), another the meters, so that a slow counter never holds up the worker. Energy counts from the ledger's
    construction, whenever the meters were made; keep them sampled with an EnergySampler over `sample_energy`.
    `watts_per_core` prices the CPU seconds of stages. `bundle_version` and `screener` (how it scores) may be set anew
    when a bundle is swapped. `clock`: seconds, never going back.

    >>> import numpy as np
    >>> ledger = Ledger()
    >>> ledger.record_decisions("screened", np.full(99, 0.001))
    >>> ledger.record_decisions("degraded", np.array([0.020]), cause="deadline")
    >>> ledger.summary().degraded_share
    0.01
    """

    def __init__(
        self,
        *,
        meters: Sequence[EnergyMeter] = (),
        service_level: ServiceLevel | None = None,
        watts_per_core: float | None = None,
        bundle_version: str = "",
        screener: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meters = tuple(_MeterAccount(meter) for meter in meters)
        self._service_level = ServiceLevel() if service_level is None else service_level
        self._watts_per_core = watts_per_core
        self.bundle_version = bundle_version
        self.screener = screener
        self._clock = clock
        self._machine: Machine = describe_machine()
        self._counters = Counters.empty()
        self._counting = threading.Lock()
        self._metering = threading.Lock()
        self.started = datetime.now(UTC)
        self._start_s = clock()
        self.sample_energy()

    def record_stage(self, stage: Stage, wall_s: float, cpu_s: float, rows: int) -> None:
        """A stage took `wall_s` and `cpu_s` seconds for a batch of `rows`: each row spent `wall_s` in it."""
        with self._counting:
            self._counters.stages[stage].record_many(wall_s, rows)
            self._counters.stage_cpu_s[stage] += cpu_s

    def record_queue(self, values_s: Float64) -> None:
        """Seconds that each transaction of a batch waited before its work began, float64 [rows]."""
        with self._counting:
            self._counters.stages["queue"].record(values_s)

    def record_decisions(self, path: Path, latency_s: Float64, cause: str | None = None) -> None:
        """Decisions on `path`, with the seconds from append to decision, float64 [rows].

        `cause` belongs to `degraded`, and only there; raises ValueError otherwise.
        """
        if (cause is not None) != (path == "degraded"):
            raise ValueError(
                f"path {path!r} with cause {cause!r}: a cause belongs to degraded decisions, and only there"
            )
        with self._counting:
            self._counters.paths[path].record(latency_s)
            if cause is not None:
                _add(self._counters.degraded_by_cause, cause, len(latency_s))

    def count_dead_letters(self, reason: str, count: int) -> None:
        """`count` records could not be read, for `reason` (a short fixed word, never data)."""
        with self._counting:
            _add(self._counters.dead_letters, reason, count)

    def count_labels(self, count: int) -> None:
        """`count` labels arrived."""
        with self._counting:
            self._counters.labels += count

    def count_late(self, count: int) -> None:
        """`count` deep answers came after their transactions were decided."""
        with self._counting:
            self._counters.late_answers += count

    def record_recovery(self, seconds: float) -> None:
        """A partition's state was rebuilt, from its assignment to its first decision, in `seconds`."""
        with self._counting:
            self._counters.recoveries.record_many(seconds, 1)

    def count_session(self) -> None:
        """The worker has begun with connections made anew."""
        with self._counting:
            self._counters.sessions += 1

    def count_offset_gap(self) -> None:
        """A stretch of offsets without records was found in the log, and confirmed by a second fetch."""
        with self._counting:
            self._counters.offset_gaps += 1

    def set_hedged(self, calls: int) -> None:
        """So many deep calls were sent a second time, in all."""
        with self._counting:
            self._counters.hedged_calls = calls

    def set_escalation_raised(self, log_odds: float) -> None:
        """The escalation threshold now stands so far above the policy's, for overload."""
        with self._counting:
            self._counters.escalation_raised = log_odds
            self._counters.escalation_raised_max = max(self._counters.escalation_raised_max, log_odds)

    def add_deep_call(self, rows: int, wall_s: float) -> None:
        """One call to the deep model for `rows` transactions took `wall_s` seconds."""
        with self._counting:
            self._counters.deep_calls.record_many(wall_s, 1)
            self._counters.deep_rows += rows

    def counters(self) -> Counters:
        """A copy of all counts, consistent within itself."""
        with self._counting:
            return self._counters.copy()

    def sample_energy(self) -> tuple[MeterState, ...]:
        """Read every meter; one that fails stays in the list with its problem and without a reading."""
        with self._metering:
            return tuple(meter.state() for meter in self._meters)

    def objectives(self, counters: Counters) -> tuple[ObjectiveResult, ...]:
        """The service level against the given counts."""
        return evaluate(
            self._service_level,
            counters.paths,
            decisions=counters.decisions,
            degraded=counters.paths["degraded"].count,
        )

    def summary(self, quality: QualityComparison | None = None) -> LedgerSummary:
        """All figures up to now; `quality` is evaluated by the caller, who has the labels."""
        counters, meters = self.counters(), self.sample_energy()
        elapsed_s = self._clock() - self._start_s
        decisions = counters.decisions
        asked = counters.paths["escalated"].count + counters.paths["degraded"].count
        figures = tuple(_energy_figure(state, decisions) for state in meters)
        return LedgerSummary(
            started=self.started,
            ended=self.started + timedelta(seconds=elapsed_s),
            elapsed_s=elapsed_s,
            bundle_version=self.bundle_version,
            screener=self.screener,
            transactions=decisions,
            per_second=decisions / elapsed_s if elapsed_s > 0 else 0.0,
            paths=_path_figures(counters),
            escalation_share=_per(asked, decisions),
            degraded_share=_per(counters.paths["degraded"].count, decisions),
            degraded_by_cause=counters.degraded_by_cause,
            duplicate_share=_per(counters.paths["duplicate"].count, decisions),
            dead_letters=counters.dead_letters,
            labels=counters.labels,
            recovery=LatencyFigures.of(counters.recoveries),
            sessions=counters.sessions,
            offset_gaps=counters.offset_gaps,
            escalation_raised_max=counters.escalation_raised_max,
            deep=DeepCallFigures(
                calls=counters.deep_calls.count,
                rows=counters.deep_rows,
                rows_per_call=_per(counters.deep_rows, counters.deep_calls.count),
                latency=LatencyFigures.of(counters.deep_calls),
                late_answers=counters.late_answers,
                hedged_calls=counters.hedged_calls,
            ),
            stages=_stage_figures(counters, self._watts_per_core),
            watts_per_core=self._watts_per_core,
            energy=figures,
            energy_totals=_energy_totals(figures, decisions),
            objectives=self.objectives(counters),
            machine=self._machine,
            quality=quality,
        )


def _add(counts: dict[str, int], label: str, count: int) -> None:
    if label not in counts and len(counts) >= LABELS_MAX:
        label = OTHER_LABEL
    counts[label] = counts.get(label, 0) + count


def _per(amount: float, count: int) -> float | None:
    return amount / count if count else None


def _path_figures(counters: Counters) -> dict[str, PathFigures]:
    everything = LatencyHistogram()
    for histogram in counters.paths.values():
        everything.merge(histogram)
    histograms: list[tuple[str, LatencyHistogram]] = [*counters.paths.items(), ("all", everything)]
    return {
        path: PathFigures(
            decisions=histogram.count,
            share=_per(histogram.count, everything.count),
            latency=LatencyFigures.of(histogram),
        )
        for path, histogram in histograms
    }


def _stage_figures(counters: Counters, watts_per_core: float | None) -> dict[str, StageFigures]:
    figures: dict[str, StageFigures] = {}
    for stage, histogram in counters.stages.items():
        cpu_s = counters.stage_cpu_s[stage]
        modelled_j = None if watts_per_core is None else cpu_s * watts_per_core
        figures[stage] = StageFigures(
            latency=LatencyFigures.of(histogram),
            cpu_s=cpu_s,
            cpu_us_per_transaction=_per(1e6 * cpu_s, counters.decisions),
            modelled_mj_per_transaction=None if modelled_j is None else _per(1e3 * modelled_j, counters.decisions),
        )
    return figures


def _energy_figure(state: MeterState, decisions: int) -> EnergyFigure:
    return EnergyFigure(
        meter=state.meter,
        kind=state.kind,
        source=state.source,
        energy_j=state.energy_j,
        per_transaction_mj=None if state.energy_j is None else _per(1e3 * state.energy_j, decisions),
        problem=state.problem,
    )


def _energy_totals(figures: Sequence[EnergyFigure], decisions: int) -> tuple[EnergyTotal, ...]:
    """A total for each kind that occurs; unknown where one of its meters is."""
    totals = []
    for kind in get_args(EnergyKind):
        members = [figure for figure in figures if figure.kind == kind]
        if not members:
            continue
        known = [figure.energy_j for figure in members if figure.energy_j is not None]
        joules = sum(known) if len(known) == len(members) else None
        totals.append(
            EnergyTotal(
                kind=kind,
                meters=tuple(figure.meter for figure in members),
                energy_j=joules,
                per_transaction_mj=None if joules is None else _per(1e3 * joules, decisions),
            )
        )
    return tuple(totals)
