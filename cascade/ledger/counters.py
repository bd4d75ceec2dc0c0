"""The counts of a ledger."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, get_args

import numpy as np

from cascade.columns import Array
from cascade.ledger.buckets import HISTOGRAM
from cascade.ledger.latency import LatencyHistogram
from cascade.ledger.sla import Path
from cascade.ledger.stage_clock import STAGES, Stage

PATHS: Final[tuple[Path, ...]] = get_args(Path)
PATH_NUMBERS: Final = {path: number for number, path in enumerate(PATHS)}

# Causes and reasons become label values of metrics. The bound protects Prometheus from a bug that makes ever new ones.
LABELS_MAX: Final = 32
OTHER_LABEL: Final = "other"
# The counts of Counters that add up.
_SUMS: Final = (
    "deep_rows", "labels", "late_answers", "sessions", "offset_gaps", "hedged_calls", "early_records",
    "first_frauds_caught", "first_frauds_missed",
)  # fmt: skip


@dataclass(slots=True)
class Counters:
    """The counts of a ledger.

    paths, stages, deep_calls: latency of decisions by path, of stages, and of calls to the deep model.
    stage_cpu_s: CPU seconds of the worker's thread, by stage.
    deep_rows: transactions in calls to the deep model.
    late_answers: calls whose answer came too late for some or all of their transactions.
    recoveries: seconds from the assignment of a partition to its first decision.
    sessions: times that the worker opened its connections; offset_gaps: confirmed gaps in the log.
    hedged_calls: deep calls that were sent a second time.
    budget_factor, budget_factor_min: the part of the escalation budget that overload leaves now, and the lowest.
    state_covered, state_covered_min: the share of the longest window that the feature state covers now, and the lowest;
        None before the first decision.
    early_records: records with a stamp ahead of the worker's clock.
    first_frauds_caught, first_frauds_missed: cards' first frauds in a period, by labels, that had been reviewed or
        declined, and that had been approved; of the certificate's watch.
    least_wait_s: the lowest and the highest `LeastWait.least_s` of the merged ledgers; None without a record.
    """

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
    budget_factor: float = 1.0
    budget_factor_min: float = 1.0
    state_covered: float | None = None
    state_covered_min: float | None = None
    early_records: int = 0
    first_frauds_caught: int = 0
    first_frauds_missed: int = 0
    least_wait_s: tuple[float, float] | None = None

    @classmethod
    def empty(cls) -> Counters:
        """The counters before the first batch."""
        return cls.over(np.zeros(len(PATHS), HISTOGRAM), np.zeros(len(STAGES), HISTOGRAM))

    @classmethod
    def over(cls, paths: Array, stages: Array) -> Counters:
        """Counters that have their latencies by path and by stage in these tables (HISTOGRAM [paths], [stages])."""
        return cls(
            paths={path: LatencyHistogram(paths[number : number + 1]) for number, path in enumerate(PATHS)},
            stages={stage: LatencyHistogram(stages[number : number + 1]) for number, stage in enumerate(STAGES)},
            stage_cpu_s=dict.fromkeys(STAGES, 0.0),
            deep_calls=LatencyHistogram(),
            degraded_by_cause={},
            dead_letters={},
        )

    def copy(self) -> Counters:
        """An independent copy."""
        twin = Counters.empty()
        twin.merge(self)
        return twin

    def merge(self, other: Counters) -> None:
        """Adds the counts of `other`; `budget_factor` and `state_covered` become the lowest.

        `least_wait_s` becomes the range over both, because each worker has a clock of its own.
        """
        for path, histogram in other.paths.items():
            self.paths[path].merge(histogram)
        for stage, histogram in other.stages.items():
            self.stages[stage].merge(histogram)
            self.stage_cpu_s[stage] += other.stage_cpu_s[stage]
        self.deep_calls.merge(other.deep_calls)
        self.recoveries.merge(other.recoveries)
        for cause, count in other.degraded_by_cause.items():
            add(self.degraded_by_cause, cause, count)
        for reason, count in other.dead_letters.items():
            add(self.dead_letters, reason, count)
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.budget_factor = min(self.budget_factor, other.budget_factor)
        self.budget_factor_min = min(self.budget_factor_min, other.budget_factor_min)
        self.state_covered = _lowest(self.state_covered, other.state_covered)
        self.state_covered_min = _lowest(self.state_covered_min, other.state_covered_min)
        waits = [wait_s for wait_s in (self.least_wait_s, other.least_wait_s) if wait_s is not None]
        if waits:
            self.least_wait_s = (min(low for low, _ in waits), max(high for _, high in waits))

    def since(self, earlier: Counters) -> Counters:
        """The counts since `earlier`, a copy of these counters from an earlier time.

        `budget_factor`, `state_covered` and `least_wait_s` are those at the end. `budget_factor_min` and
        `state_covered_min` are exact if they are a new minimum, else an upper bound. Raises DataError if a latency
        count of `earlier` is higher than now.
        """
        factor = min(earlier.budget_factor, self.budget_factor)
        lowest = self.budget_factor_min if self.budget_factor_min < earlier.budget_factor_min else factor
        covered = _lowest(earlier.state_covered, self.state_covered)
        if self.state_covered_min != earlier.state_covered_min:
            covered = self.state_covered_min
        return Counters(
            paths={path: histogram.since(earlier.paths[path]) for path, histogram in self.paths.items()},
            stages={stage: histogram.since(earlier.stages[stage]) for stage, histogram in self.stages.items()},
            stage_cpu_s={stage: seconds - earlier.stage_cpu_s[stage] for stage, seconds in self.stage_cpu_s.items()},
            deep_calls=self.deep_calls.since(earlier.deep_calls),
            degraded_by_cause=_grown(self.degraded_by_cause, earlier.degraded_by_cause),
            dead_letters=_grown(self.dead_letters, earlier.dead_letters),
            recoveries=self.recoveries.since(earlier.recoveries),
            **{name: getattr(self, name) - getattr(earlier, name) for name in _SUMS},
            budget_factor=self.budget_factor,
            budget_factor_min=lowest,
            state_covered=self.state_covered,
            state_covered_min=covered,
            least_wait_s=self.least_wait_s,
        )

    @property
    def decisions(self) -> int:
        """The number of decisions on all paths."""
        return sum(histogram.count for histogram in self.paths.values())


def _lowest(first: float | None, second: float | None) -> float | None:
    """The lower of those that are known."""
    return min((share for share in (first, second) if share is not None), default=None)


def _grown(counts: dict[str, int], earlier: dict[str, int]) -> dict[str, int]:
    return {label: count - before for label, count in counts.items() if count > (before := earlier.get(label, 0))}


def add(counts: dict[str, int], label: str, count: int) -> None:
    """Adds to the count of a label; to that of `OTHER_LABEL` if there are LABELS_MAX labels already."""
    if label not in counts and len(counts) >= LABELS_MAX:
        label = OTHER_LABEL
    counts[label] = counts.get(label, 0) + count
