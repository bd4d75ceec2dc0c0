"""The ledger: counts decisions, latency and energy batch by batch. Any thread may read it at any time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

import numpy as np

from cascade.columns import Float64
from cascade.errors import CascadeError
from cascade.ledger.account import Account, CertifiedRecall, MeterState
from cascade.ledger.buckets import HISTOGRAM, NO_TOPIC
from cascade.ledger.carbon import Carbon
from cascade.ledger.clock_skew import LeastWait
from cascade.ledger.counters import PATH_NUMBERS, PATHS, Counters, add
from cascade.ledger.exemplars import DecidedRecords, Exemplars, LatencyExemplar
from cascade.ledger.figures import summarise
from cascade.ledger.machine import Machine, describe_machine
from cascade.ledger.sla import Path, ServiceLevel
from cascade.ledger.stage_clock import STAGE_NUMBERS, STAGES, Stage, StageLaps
from cascade.ledger.summary import LedgerSummary, QualityComparison
from cascade.protocols import EnergyMeter, EnergyReading

_QUEUE = STAGE_NUMBERS["queue"]
_NO_RECORDS = np.zeros(0, np.int64)


class _MeterAccount:
    """The joules of a meter since the ledger began, or since the first successful reading if that came later.

    Each reading adds the carbon of its own joules, because the intensity of the grid changes. Once the intensity was
    unknown, the carbon stays unknown.
    """

    def __init__(self, meter: EnergyMeter, carbon: Carbon | None) -> None:
        self._meter, self._carbon = meter, carbon
        self._first: EnergyReading | None = None
        self._last_j = 0.0
        self._carbon_g: float | None = None if carbon is None else 0.0

    def state(self) -> MeterState:
        try:
            reading = self._meter.read()
        except (CascadeError, OSError) as error:
            kind = None if self._first is None else self._first.kind
            return MeterState(self._meter.name, kind, (), None, str(error))
        self._first = self._first or reading
        energy_j = reading.energy_j - self._first.energy_j
        self._add_carbon(energy_j - self._last_j)
        self._last_j = energy_j
        return MeterState(
            self._meter.name,
            reading.kind,
            (reading.source,) if reading.source else (),
            energy_j,
            problem=None,
            carbon_g=self._carbon_g,
            uncertainty=reading.uncertainty,
            check_j=None if reading.check_j is None else reading.check_j - (self._first.check_j or 0.0),
        )

    def _add_carbon(self, energy_j: float) -> None:
        if self._carbon is not None and self._carbon_g is not None:
            grams = self._carbon.operational_g(energy_j, datetime.now(UTC))
            self._carbon_g = None if grams is None else self._carbon_g + grams


class Ledger:
    """Counts decisions, latency and energy; the worker calls each `record_` method once for a batch.

    The arrays of these methods are contiguous: for other arrays the kernels would have to be compiled anew.

    Any thread may call any method. One lock guards the counts, for microseconds at a time; another guards the meters,
    so that a slow meter never delays the worker. Energy counts from the construction of the ledger; an EnergySampler
    must call `sample_energy`, so that no counter wraps unnoticed.

    meters: the sources of joules.
    service_level: the objectives; None for the default ones.
    watts_per_core: watts of a busy core, for the energy of stages; None if not stated.
    gpu_idle_watts: watts of a GPU without work; None if not stated.
    bundle_version, screener: the version of the bundle, and how its screener scores; a new bundle sets them again.
    deep_backend: the backend of the deep model, as in the setting deep.backend.
    carbon: converts joules to gCO2e; None for no carbon accounting.
    certified: what the bundle's certificate states of the recall; None without one.
    clock: seconds that never go back.

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
        certified: CertifiedRecall | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meters = tuple(_MeterAccount(meter, carbon) for meter in meters)
        self._carbon = carbon
        self.service_level = ServiceLevel() if service_level is None else service_level
        self._watts_per_core = watts_per_core
        self._gpu_idle_watts = gpu_idle_watts
        self.bundle_version = bundle_version
        self.screener = screener
        self._deep_backend = deep_backend
        self.certified = certified
        self._clock = clock
        self._machine: Machine = describe_machine()
        # numba takes longer to load than a command takes that only reads ledgers
        from cascade.ledger.recording_kernels import add_decisions, add_stages

        self._add_decisions, self._add_stages = add_decisions, add_stages
        self._paths, self._stages = np.zeros(len(PATHS), HISTOGRAM), np.zeros(len(STAGES), HISTOGRAM)
        self._stage_cpu_s = np.zeros(len(STAGES))
        self._counters = Counters.over(self._paths, self._stages)
        self._waits = LeastWait(clock)
        self._exemplars = Exemplars(len(PATHS))
        self._counting = threading.Lock()
        self._metering = threading.Lock()
        self.started = datetime.now(UTC)
        self._start_s = clock()
        self.sample_energy()

    def warm_up(self) -> None:
        """Compiles the kernels, so that the first batch is not slow; records nothing."""
        nothing = np.zeros(0)
        self.record_batch(StageLaps(), nothing)
        self.record_decisions("screened", nothing)
        self.record_stage("deep", 0.0, 0.0, 0)
        self._counters.stages["queue"].record(nothing)

    def record_batch(self, laps: StageLaps, queue_s: Float64) -> None:
        """Adds the stages of a batch; each row of a stage counts with the wall time of the whole batch.

        laps: of the stages that have ended. queue_s: seconds that transactions of the batch have waited before its work
        began, float64 [n]. Raises ValueError if there is a NaN.
        """
        share = laps.cpu_share()
        with self._counting:
            self._add_stages(self._stages, self._stage_cpu_s, laps.wall_s, share, laps.rows, _QUEUE, queue_s)

    def record_stage(self, stage: Stage, wall_s: float, cpu_s: float, rows: int) -> None:
        """Adds a stage's seconds for a batch of `rows`; each row counts with the `wall_s` of the whole batch."""
        with self._counting:
            self._counters.stages[stage].record_many(wall_s, rows)
            self._stage_cpu_s[STAGE_NUMBERS[stage]] += cpu_s

    def record_arrival(self, least_wait_s: float, early: int = 0) -> None:
        """Adds the least wait of records that were fetched together, and the number with a stamp ahead of now.

        `least_wait_s`: seconds by the worker's clock since the record's stamp, negative if that clock is behind.
        """
        with self._counting:
            self._waits.record(least_wait_s)
            self._counters.early_records += early

    def record_decisions(
        self,
        path: Path,
        latency_s: Float64,
        cause: str | None = None,
        records: DecidedRecords | None = None,
    ) -> None:
        """Adds the decisions of a batch on one path.

        latency_s: seconds from append to decision, float64 [rows].
        cause: why they are degraded; required on the path `degraded` and not allowed elsewhere, else ValueError.
        records: of the decisions, for exemplars; None for no exemplars.

        Raises ValueError if there is a NaN, or if decisions and records differ in number.
        """
        if (cause is not None) != (path == "degraded"):
            raise ValueError(f"path {path!r} with cause {cause!r}: exactly the degraded decisions must have a cause")
        topic, partition_ids, offsets = NO_TOPIC, _NO_RECORDS, _NO_RECORDS
        with self._counting:
            if records is not None:
                topic = self._exemplars.number_of(records.topic)
                partition_ids, offsets = records.partition_ids, records.offsets
            self._add_decisions(
                self._paths, PATH_NUMBERS[path], latency_s, self._exemplars.table, topic, partition_ids, offsets,
                time.time(),
            )  # fmt: skip
            if cause is not None:
                add(self._counters.degraded_by_cause, cause, len(latency_s))

    def count_dead_letters(self, reason: str, count: int) -> None:
        """Adds records that were dead-lettered for `reason`, a short fixed word that contains no data."""
        with self._counting:
            add(self._counters.dead_letters, reason, count)

    def count_labels(self, count: int) -> None:
        """Adds labels that arrived."""
        with self._counting:
            self._counters.labels += count

    def count_first_frauds(self, caught: int, missed: int) -> None:
        """Adds cards' first frauds, by labels, that had been reviewed or declined, and that had been approved."""
        with self._counting:
            self._counters.first_frauds_caught += caught
            self._counters.first_frauds_missed += missed

    def count_late(self, count: int) -> None:
        """Adds deep calls whose answer came too late for some or all of their transactions."""
        with self._counting:
            self._counters.late_answers += count

    def record_recovery(self, seconds: float) -> None:
        """Adds the seconds from the assignment of a partition to its first decision."""
        with self._counting:
            self._counters.recoveries.record_many(seconds, 1)

    def count_session(self) -> None:
        """Counts that the worker has opened its connections."""
        with self._counting:
            self._counters.sessions += 1

    def count_offset_gap(self) -> None:
        """Counts a gap in the offsets of the log that a second fetch has confirmed."""
        with self._counting:
            self._counters.offset_gaps += 1

    def set_hedged(self, calls: int) -> None:
        """Sets the total number of deep calls that were sent a second time."""
        with self._counting:
            self._counters.hedged_calls = calls

    def set_budget_factor(self, factor: float) -> None:
        """Sets the part of the escalation budget that overload leaves, above 0, at most 1."""
        with self._counting:
            self._counters.budget_factor = factor
            self._counters.budget_factor_min = min(self._counters.budget_factor_min, factor)

    def set_state_covered(self, share: float) -> None:
        """Sets the share of the longest window that the feature state covers, 0 to 1."""
        with self._counting:
            lowest = self._counters.state_covered_min
            self._counters.state_covered = share
            self._counters.state_covered_min = share if lowest is None else min(lowest, share)

    def add_deep_call(self, rows: int, wall_s: float) -> None:
        """Adds a call to the deep model for `rows` transactions, of `wall_s` seconds."""
        with self._counting:
            self._counters.deep_calls.record_many(wall_s, 1)
            self._counters.deep_rows += rows

    def counters(self) -> Counters:
        """A consistent copy of all counts."""
        with self._counting:
            copy = self._counters.copy()
            copy.stage_cpu_s = dict(zip(STAGES, self._stage_cpu_s.tolist(), strict=True))
            least_s = self._waits.least_s
        copy.least_wait_s = None if least_s is None else (least_s, least_s)
        return copy

    def exemplars(self, path: Path) -> list[LatencyExemplar | None]:
        """A recent decision for each exported bucket, as `Exemplars.of`."""
        with self._counting:
            return self._exemplars.of(PATH_NUMBERS[path])

    def sample_energy(self) -> tuple[MeterState, ...]:
        """Reads every meter. The state of a meter that fails has a problem and no joules."""
        with self._metering:
            return tuple(meter.state() for meter in self._meters)

    def account(self) -> Account:
        """The account up to now; `merge_accounts` merges it with those of other ledgers."""
        meters, elapsed_s = self.sample_energy(), self._clock() - self._start_s
        return Account(
            started=self.started,
            ended=self.started + timedelta(seconds=elapsed_s),
            counters=self.counters(),
            meters=meters,
            service_level=self.service_level,
            watts_per_core=self._watts_per_core,
            bundle_versions=(self.bundle_version,) if self.bundle_version else (),
            screeners=(self.screener,) if self.screener else (),
            deep_backends=(self._deep_backend,) if self._deep_backend else (),
            machines=(self._machine,),
            carbon_bases=() if self._carbon is None else self._carbon.bases,
            embodied_g=None if self._carbon is None else self._carbon.embodied_g(elapsed_s),
            gpu_idle_watts=self._gpu_idle_watts,
            certified=self.certified,
        )

    def summary(self, quality: QualityComparison | None = None) -> LedgerSummary:
        """All figures up to now. The caller evaluates `quality`, because a ledger has no labels."""
        return summarise(self.account(), quality)
