"""The ledger: what every decision took, told once a batch and read at any time from any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from cascade.columns import Float64
from cascade.errors import CascadeError
from cascade.ledger.account import Account, MeterState
from cascade.ledger.carbon import Carbon
from cascade.ledger.clock_skew import LeastWait
from cascade.ledger.counters import Counters, add
from cascade.ledger.exemplars import Exemplars, Ids, LatencyExemplar
from cascade.ledger.figures import objectives, summarise
from cascade.ledger.machine import Machine, describe_machine
from cascade.ledger.sla import ObjectiveEvents, ObjectiveResult, Path, ServiceLevel
from cascade.ledger.stage_clock import Stage
from cascade.ledger.summary import LedgerSummary, QualityComparison
from cascade.protocols import EnergyMeter, EnergyReading


class _MeterAccount:
    """One meter's joules from the ledger's beginning, or from its first answer where that came later.

    Their carbon is added up answer by answer, since the grid's intensity changes; unknown once, it stays unknown.
    """

    def __init__(self, meter: EnergyMeter, carbon: Carbon | None) -> None:
        self._meter, self._carbon = meter, carbon
        self._first: EnergyReading | None = None
        self._told_j = 0.0
        self._carbon_g: float | None = None if carbon is None else 0.0

    def state(self) -> MeterState:
        try:
            reading = self._meter.read()
        except (CascadeError, OSError) as error:
            kind = None if self._first is None else self._first.kind
            return MeterState.of(self._meter.name, kind, "", None, str(error))
        self._first = self._first or reading
        energy_j = reading.energy_j - self._first.energy_j
        self._add_carbon(energy_j - self._told_j)
        self._told_j = energy_j
        check_j = None if reading.check_j is None else reading.check_j - (self._first.check_j or 0.0)
        return MeterState.of(
            self._meter.name, reading.kind, reading.source, energy_j, None, self._carbon_g, reading.uncertainty, check_j
        )

    def _add_carbon(self, energy_j: float) -> None:
        if self._carbon is not None and self._carbon_g is not None:
            grams = self._carbon.operational_g(energy_j, datetime.now(UTC))
            self._carbon_g = None if grams is None else self._carbon_g + grams


class Ledger:
    """Counts decisions, latency and energy; the worker calls each `record_` once a batch.

    Any thread may call any method: one lock guards the counts (held for microseconds, and for the copy that readers
    take), another the meters, so that a slow counter never holds up the worker. Energy counts from the ledger's
    construction, whenever the meters were made; keep them sampled with an EnergySampler over `sample_energy`.
    `watts_per_core` prices the CPU seconds of stages; `gpu_idle_watts` is what a GPU draws without work, where stated.
    `bundle_version` and `screener` (how it scores) may be set anew when a bundle is swapped. `deep_backend`: what runs
    the deep model, as deep.backend names it. `carbon` turns joules into gCO2e. `clock`: seconds, never going back.

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
        gpu_idle_watts: float | None = None,
        bundle_version: str = "",
        screener: str = "",
        deep_backend: str = "",
        carbon: Carbon | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meters = tuple(_MeterAccount(meter, carbon) for meter in meters)
        self._carbon = carbon
        self._service_level = ServiceLevel() if service_level is None else service_level
        self._watts_per_core = watts_per_core
        self._gpu_idle_watts = gpu_idle_watts
        self.bundle_version = bundle_version
        self.screener = screener
        self._deep_backend = deep_backend
        self._clock = clock
        self._machine: Machine = describe_machine()
        self._counters = Counters.empty()
        self._waits = LeastWait(clock)
        self._exemplars = Exemplars()
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

    def record_arrival(self, least_wait_s: float, early: int = 0) -> None:
        """Of records fetched together: the least seconds that one had waited, and how many were stamped ahead of now.

        Both by the worker's clock against the records' stamps, so the wait is negative where that clock is behind.
        """
        with self._counting:
            self._waits.record(least_wait_s)
            self._counters.early_records += early

    def record_decisions(
        self, path: Path, latency_s: Float64, cause: str | None = None, ids: Ids | None = None
    ) -> None:
        """Decisions on `path`, with the seconds from append to decision, float64 [rows].

        `cause` belongs to `degraded`, and only there; raises ValueError otherwise. `ids` gives the decision ids of rows
        int64 [some], which become exemplars; it is asked for one row a bucket at most.
        """
        if (cause is not None) != (path == "degraded"):
            raise ValueError(
                f"path {path!r} with cause {cause!r}: a cause belongs to degraded decisions, and only there"
            )
        with self._counting:
            self._counters.paths[path].record(latency_s)
            if cause is not None:
                add(self._counters.degraded_by_cause, cause, len(latency_s))
        if ids is not None:
            self._exemplars.record(path, latency_s, ids, time.time())

    def count_dead_letters(self, reason: str, count: int) -> None:
        """`count` records could not be read, for `reason` (a short fixed word, never data)."""
        with self._counting:
            add(self._counters.dead_letters, reason, count)

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
            copy = self._counters.copy()
            least_s = self._waits.least_s
        copy.least_wait_s = None if least_s is None else (least_s, least_s)
        return copy

    def exemplars(self, path: Path) -> list[LatencyExemplar | None]:
        """A recent decision for each of the exported buckets, see `Exemplars.of`."""
        return self._exemplars.of(path)

    def sample_energy(self) -> tuple[MeterState, ...]:
        """Read every meter; one that fails stays in the list with its problem and without a reading."""
        with self._metering:
            return tuple(meter.state() for meter in self._meters)

    def objectives(self, counters: Counters) -> tuple[ObjectiveResult, ...]:
        """The service level against the given counts."""
        return objectives(self._service_level, counters)

    def objective_events(self, counters: Counters) -> tuple[ObjectiveEvents, ...]:
        """The service level as counts of events and breaches."""
        return counters.objective_events(self._service_level)

    def account(self) -> Account:
        """All that is known up to now, in a form that merges with the accounts of other ledgers."""
        meters, elapsed_s = self.sample_energy(), self._clock() - self._start_s
        return Account(
            started=self.started,
            ended=self.started + timedelta(seconds=elapsed_s),
            counters=self.counters(),
            meters=meters,
            service_level=self._service_level,
            watts_per_core=self._watts_per_core,
            bundle_versions=(self.bundle_version,) if self.bundle_version else (),
            screeners=(self.screener,) if self.screener else (),
            deep_backends=(self._deep_backend,) if self._deep_backend else (),
            machines=(self._machine,),
            carbon_bases=() if self._carbon is None else self._carbon.bases,
            embodied_g=None if self._carbon is None else self._carbon.embodied_g(elapsed_s),
            gpu_idle_watts=self._gpu_idle_watts,
        )

    def summary(self, quality: QualityComparison | None = None) -> LedgerSummary:
        """All figures up to now; `quality` is evaluated by the caller, who has the labels."""
        return summarise(self.account(), quality)
