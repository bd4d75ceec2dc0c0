"""Service-level objectives, and what the ledger's figures say of them."""

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
    """A share `quantile` of the decisions on `path` takes at most `limit_ms`; raises SettingError out of range."""

    path: Path
    quantile: float = 0.99
    limit_ms: float

    def __post_init__(self) -> None:
        if not 0.0 < self.quantile < 1.0:
            raise SettingError("sla", "latency.quantile", self.quantile, "out of range", "use 0.99, say")
        if not 0.0 < self.limit_ms <= 1e6:
            raise SettingError("sla", "latency.limit_ms", self.limit_ms, "out of range", "use 5.0, say")


class ServiceLevel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The agreement: latency objectives, and the largest share of all decisions that may be degraded."""

    latency: tuple[LatencyObjective, ...] = (
        LatencyObjective(path="screened", limit_ms=5.0),
        LatencyObjective(path="escalated", limit_ms=20.0),
    )
    degraded_share_max: float = 0.001

    def __post_init__(self) -> None:
        if not 0.0 <= self.degraded_share_max <= 1.0:
            raise SettingError("sla", "degraded_share_max", self.degraded_share_max, "not a share", "use 0.001, say")


class ObjectiveResult(msgspec.Struct, frozen=True, kw_only=True):
    """One objective against the figures; `value` and `limit` in `unit` (`ms`, or `share` in 0..1).

    `value` is None where there is no data, and then the objective is not met. `margin` is what is left of the limit,
    as a share of it: 0.2 is a fifth below, negative is above; None where there is no data or the limit is 0.
    """

    name: str
    unit: Literal["ms", "share"]
    limit: float
    value: float | None
    status: Status
    margin: float | None

    @property
    def met(self) -> bool:
        """True only where data shows it."""
        return self.status == "met"


class ObjectiveEvents(msgspec.Struct, frozen=True, kw_only=True):
    """An objective as counts, for error budgets and burn rates: of `events`, `breaches` broke it.

    `budget`: the share that may. A latency in the histogram's bucket that the limit cuts counts as a breach.
    """

    name: str
    events: int
    breaches: int
    budget: float

    @property
    def burn(self) -> float | None:
        """The share of breaches over the budget: 1 uses it up exactly. None without events or without a budget."""
        allowed = self.budget * self.events
        return self.breaches / allowed if allowed else None

    @property
    def budget_left(self) -> float | None:
        """The share of the budget that was not used, negative where more was; None as `burn`."""
        burn = self.burn
        return None if burn is None else 1.0 - burn


def count_events(
    level: ServiceLevel, latency: Mapping[Path, LatencyHistogram], *, decisions: int, degraded: int
) -> tuple[ObjectiveEvents, ...]:
    """Each objective's counts; arguments as of `evaluate`."""
    counts = []
    for objective in level.latency:
        histogram = latency.get(objective.path, LatencyHistogram())
        within = int(histogram.counts_up_to(np.array([objective.limit_ms / 1e3]))[0])
        counts.append(
            ObjectiveEvents(
                name=_latency_name(objective), events=histogram.count, breaches=histogram.count - within,
                budget=1.0 - objective.quantile,
            )
        )  # fmt: skip
    counts.append(
        ObjectiveEvents(name=DEGRADED_SHARE, events=decisions, breaches=degraded, budget=level.degraded_share_max)
    )
    return tuple(counts)


def evaluate(
    level: ServiceLevel, latency: Mapping[Path, LatencyHistogram], *, decisions: int, degraded: int
) -> tuple[ObjectiveResult, ...]:
    """Each objective's result; `latency` by path, `degraded` of `decisions` counted."""
    results = []
    for objective in level.latency:
        histogram = latency.get(objective.path)
        value = 1e3 * histogram.quantile(objective.quantile) if histogram is not None and histogram.count else None
        results.append(_result(_latency_name(objective), "ms", objective.limit_ms, value))
    share = degraded / decisions if decisions else None
    results.append(_result(DEGRADED_SHARE, "share", level.degraded_share_max, share))
    return tuple(results)


def _latency_name(objective: LatencyObjective) -> str:
    return f"p{100 * objective.quantile:g} of {objective.path}"


def _result(name: str, unit: Literal["ms", "share"], limit: float, value: float | None) -> ObjectiveResult:
    status: Status = "no data" if value is None else "met" if value <= limit else "missed"
    margin = None if value is None or not limit else (limit - value) / limit
    return ObjectiveResult(name=name, unit=unit, limit=limit, value=value, status=status, margin=margin)
