"""Scrapes of a service's metrics, and the figures between two scrapes."""

from __future__ import annotations

import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from cascade.errors import CascadeError

DEFAULT_URL = "http://127.0.0.1:9464"
ANSWER_S_MAX = 5.0
ANSWER_BYTES_MAX = 16 << 20
PATHS = ("screened", "escalated", "degraded", "duplicate")


class UnreachableError(CascadeError):
    """The service did not answer with its metrics."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """All samples (name, labels, value) at a time in seconds since the epoch."""

    at_s: float
    samples: tuple[tuple[str, Mapping[str, str], float], ...]

    @classmethod
    def of(cls, text: str, at_s: float) -> Scrape:
        """From a text exposition; raises UnreachableError if it is not that of a Cascade service."""
        try:
            families = list(text_string_to_metric_families(text))
        except ValueError as error:
            raise UnreachableError(f"the answer has no metrics ({error})") from error
        return cls._from(families, at_s)

    @classmethod
    def read(cls, registry: CollectorRegistry, at_s: float) -> Scrape:
        """From the registry, without a text: in 0.5 ms instead of 15."""
        return cls._from(registry.collect(), at_s)

    @classmethod
    def _from(cls, families: Iterable[Metric], at_s: float) -> Scrape:
        samples = tuple(
            (sample.name, sample.labels, float(sample.value)) for family in families for sample in family.samples
        )
        if not any(name == "cascade_decisions_total" for name, _, _ in samples):
            raise UnreachableError("these are not the metrics of a Cascade service")
        return cls(at_s, samples)

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """The sums of a name's samples, by the values of these labels."""
        found: dict[tuple[str, ...], float] = {}
        for sample, given, value in self.samples:
            if sample == name:
                key = tuple(given.get(label, "") for label in labels)
                found[key] = found.get(key, 0.0) + value
        return found

    def total(self, name: str) -> float:
        """The sum of a name's samples."""
        return self.by(name).get((), 0.0)

    @property
    def started_s(self) -> float:
        """The start of the service, of its first worker if it has several."""
        starts = (value for name, _, value in self.samples if name == "cascade_start_time_seconds")
        return min(starts, default=self.at_s)


@dataclass(frozen=True, slots=True)
class PathFrame:
    """A decision path: decisions per second, and percentiles in ms, NaN without decisions."""

    path: str
    per_second: float
    p50_ms: float
    p99_ms: float
    p999_ms: float


@dataclass(frozen=True, slots=True)
class Frame:
    """The figures of `seconds`. Shares are in 0..1, NaN without decisions.

    `budgets`: by objective, the share of decisions that may miss it. `burn`: the share that missed it over that budget.
    `watts`, `mj_per_decision`: by kind, of the meters that were read at both ends. `carbon_g_per_million`: by kind,
    empty if no carbon is accounted. `limits_ms`: by latency objective. `lost_meters`: those without a reading. `lag`:
    in records, NaN if unknown. `workers`: (running, all), None if the service is a single process.
    """

    seconds: float
    per_second: float
    escalated_share: float
    degraded_share: float
    paths: tuple[PathFrame, ...]
    budgets: dict[str, float]
    burn: dict[str, float]
    watts: dict[str, float]
    mj_per_decision: dict[str, float]
    carbon_g_per_million: dict[str, float]
    limits_ms: dict[str, float]
    lost_meters: tuple[str, ...]
    lag: float
    dead_letters: float
    workers: tuple[int, int] | None

    @classmethod
    def between(cls, before: Scrape | None, now: Scrape) -> Frame:
        """From two scrapes; from the start of the service if `before` is None or of an earlier start."""
        if before is not None and (before.started_s != now.started_s or before.at_s >= now.at_s):
            before = None
        seconds = max(now.at_s - (now.started_s if before is None else before.at_s), 1e-3)

        def grown(name: str, *labels: str) -> dict[tuple[str, ...], float]:
            earlier = {} if before is None else before.by(name, *labels)
            return {key: max(value - earlier.get(key, 0.0), 0.0) for key, value in now.by(name, *labels).items()}

        decided = {path: count for (path,), count in grown("cascade_decisions_total", "path").items()}
        all_of_them = sum(decided.values())
        share = _over(1.0, all_of_them)
        buckets = grown("cascade_decision_latency_seconds_bucket", "path", "le")
        joules = _grown_by_kind("cascade_energy_joules_total", before, now)
        grams = _grown_by_kind("cascade_carbon_grams_total", before, now)
        limits_s, budgets = (
            {given["objective"]: value for name, given, value in now.samples if name == f"cascade_objective_{figure}"}
            for figure in ("limit_seconds", "budget_ratio")
        )
        breaches = grown("cascade_objective_breaches_total", "objective")
        events = grown("cascade_objective_events_total", "objective")
        lost = {given["meter"] for name, given, up in now.samples if name == "cascade_energy_meter_up" and not up}
        up = [value for name, _, value in now.samples if name == "cascade_worker_up"]
        return cls(
            seconds=seconds,
            per_second=all_of_them / seconds,
            escalated_share=share * (decided.get("escalated", 0.0) + decided.get("degraded", 0.0)),
            degraded_share=share * decided.get("degraded", 0.0),
            paths=tuple(_path(path, decided[path] / seconds, buckets) for path in PATHS if path in decided),
            budgets=budgets,
            burn={
                name: _over(_over(breaches.get((name,), 0.0), events.get((name,), 0.0)), budget)
                for name, budget in budgets.items()
            },
            watts={kind: value / seconds for kind, value in joules.items()},
            mj_per_decision={kind: 1e3 * value * share for kind, value in joules.items()},
            carbon_g_per_million={kind: 1e6 * value * share for kind, value in grams.items()},
            limits_ms={objective: 1e3 * limit_s for objective, limit_s in limits_s.items()},
            lost_meters=tuple(sorted(lost)),
            lag=now.by("cascade_partition_lag_records").get((), math.nan),
            dead_letters=sum(grown("cascade_dead_letters_total").values()),
            workers=(round(sum(up)), len(up)) if up else None,
        )


def quantile_ms(buckets: Mapping[float, float], q: float) -> float:
    """The quantile in ms of cumulative buckets (limit in seconds: count up to it), linear within a bucket.

    NaN without samples. Beyond the highest finite limit it is that limit, as in PromQL's `histogram_quantile`.
    """
    limits = sorted(buckets)
    total = buckets[limits[-1]] if limits else 0.0
    if not total:
        return math.nan
    rank, low, below = q * total, 0.0, 0.0
    for limit in limits:
        if buckets[limit] >= rank and buckets[limit] > below:
            if math.isinf(limit):
                return 1e3 * low
            return 1e3 * (low + (limit - low) * (rank - below) / (buckets[limit] - below))
        low, below = limit, buckets[limit]
    return 1e3 * low


def scrape(base: str, clock: Callable[[], float] = time.time) -> Scrape:
    """Reads the metrics of the service at `base`; raises UnreachableError."""
    if not base.startswith(("http://", "https://")):
        raise UnreachableError(f"{base}: not an address; use the form {DEFAULT_URL}")
    try:
        with urllib.request.urlopen(f"{base.rstrip('/')}/metrics", timeout=ANSWER_S_MAX) as answer:  # noqa: S310 - checked
            text = answer.read(ANSWER_BYTES_MAX).decode("utf-8", "replace")
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise UnreachableError(
            f"{base}: no answer ({error}); check that the service runs and that health.enabled is true"
        ) from error
    return Scrape.of(text, clock())


def _path(path: str, per_second: float, buckets: Mapping[tuple[str, ...], float]) -> PathFrame:
    own = {float(limit): count for (of, limit), count in buckets.items() if of == path}
    return PathFrame(path, per_second, *(quantile_ms(own, q) for q in (0.5, 0.99, 0.999)))


def _grown_by_kind(name: str, before: Scrape | None, now: Scrape) -> dict[str, float]:
    """The increase by kind of meter; a meter without a reading at both ends does not count, not even as 0."""
    labels = ("worker", "meter", "kind")
    earlier = None if before is None else before.by(name, *labels)
    grown: dict[str, float] = {}
    for key, value in now.by(name, *labels).items():
        if earlier is None or key in earlier:
            since = value if earlier is None else max(value - earlier[key], 0.0)
            grown[key[-1]] = grown.get(key[-1], 0.0) + since
    return grown


def _over(value: float, by: float) -> float:
    return value / by if by else math.nan
