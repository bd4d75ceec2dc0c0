"""Service-level objectives and their evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import msgspec
import numpy as np

from cascade.errors import SettingError
from cascade.ledger.latency import LatencyHistogram

DEGRADED_SHARE: Final = "degraded share"
Path = Literal["screened", "escalated", "degraded", "duplicate"]
Status = Literal["met", "missed", "no data"]


class LatencyObjective(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A share `quantile` of the decisions on `path` takes at most `limit_ms`. Raises SettingError if out of range."""

    path: Path
    quantile: float = 0.99
    limit_ms: float

    def __post_init__(self) -> None:
        if not 0.0 < self.quantile < 1.0:
            raise SettingError("sla", "latency.quantile", self.quantile, "must be between 0 and 1", "use 0.99, say")
        if not 0.0 < self.limit_ms <= 1e6:
            raise SettingError("sla", "latency.limit_ms", self.limit_ms, "must be in (0, 1e6]", "use 5.0, say")

    @property
    def name(self) -> str:
        """The name of the objective in figures and metrics, for example `p99 of screened`."""
        return f"p{100 * self.quantile:g} of {self.path}"


class ServiceLevel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The latency objectives, and the largest share of all decisions that may be degraded."""

    latency: tuple[LatencyObjective, ...] = (
        LatencyObjective(path="screened", limit_ms=5.0),
        LatencyObjective(path="escalated", limit_ms=20.0),
    )
    degraded_share_max: float = 0.001

    def __post_init__(self) -> None:
        if not 0.0 <= self.degraded_share_max <= 1.0:
            problem = "must be a share from 0 to 1"
            raise SettingError("sla", "degraded_share_max", self.degraded_share_max, problem, "use 0.001, say")


class ObjectiveResult(msgspec.Struct, frozen=True):
    """The result of one objective.

    limit, value: in `unit`, which is `ms` or `share` (0..1). `value` is None without data.
    status: `met`, `missed`, or `no data`.
    margin: the unused share of the limit: 0.2 if the value is a fifth below the limit, negative above it; None without
        data or for a limit of 0.
    """

    name: str
    unit: Literal["ms", "share"]
    limit: float
    value: float | None
    status: Status
    margin: float | None

    @property
    def met(self) -> bool:
        """True if there is data and the objective is met."""
        return self.status == "met"


class ObjectiveEvents(msgspec.Struct, frozen=True):
    """The counts of one objective, for error budgets and burn rates: of `events`, `breaches` missed it.

    `budget`: the share of events that may miss it. A latency in the histogram bucket of the limit counts as a breach.
    """

    name: str
    events: int
    breaches: int
    budget: float

    @property
    def burn(self) -> float | None:
        """The burn rate: share of breaches over the budget; None without events or without a budget."""
        allowed = self.budget * self.events
        return self.breaches / allowed if allowed else None

    @property
    def budget_left(self) -> float | None:
        """The unused share of the budget, negative if it is exceeded; None as `burn`."""
        burn = self.burn
        return None if burn is None else 1.0 - burn


def count_events(level: ServiceLevel, latency: Mapping[Path, LatencyHistogram]) -> tuple[ObjectiveEvents, ...]:
    """The events and breaches of each objective. `latency`: of the decisions, by path."""
    counts = []
    for objective in level.latency:
        histogram = latency[objective.path]
        breaches = histogram.count - int(histogram.counts_up_to(np.array([objective.limit_ms / 1e3]))[0])
        counts.append(ObjectiveEvents(objective.name, histogram.count, breaches, budget=1.0 - objective.quantile))
    decisions = sum(histogram.count for histogram in latency.values())
    return (*counts, ObjectiveEvents(DEGRADED_SHARE, decisions, latency["degraded"].count, level.degraded_share_max))


def evaluate(level: ServiceLevel, latency: Mapping[Path, LatencyHistogram]) -> tuple[ObjectiveResult, ...]:
    """The result of each objective. `latency`: of the decisions, by path."""
    results = []
    for objective in level.latency:
        histogram = latency[objective.path]
        value = 1e3 * histogram.quantile(objective.quantile) if histogram.count else None
        results.append(_result(objective.name, "ms", objective.limit_ms, value))
    decisions = sum(histogram.count for histogram in latency.values())
    share = latency["degraded"].count / decisions if decisions else None
    results.append(_result(DEGRADED_SHARE, "share", level.degraded_share_max, share))
    return tuple(results)


def _result(name: str, unit: Literal["ms", "share"], limit: float, value: float | None) -> ObjectiveResult:
    status: Status = "no data" if value is None else "met" if value <= limit else "missed"
    margin = None if value is None or not limit else (limit - value) / limit
    return ObjectiveResult(name, unit, limit, value, status, margin)
