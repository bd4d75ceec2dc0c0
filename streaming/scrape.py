"""A service's metrics endpoint, asked now and then, and what happened between two answers."""

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
    """The service gave no metrics."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """All samples at a moment (seconds since the epoch): name, labels, value."""

    at_s: float
    samples: tuple[tuple[str, Mapping[str, str], float], ...]

    @classmethod
    def of(cls, text: str, at_s: float) -> Scrape:
        """From a text exposition; raises UnreachableError where it is none of ours."""
        try:
            families = list(text_string_to_metric_families(text))
        except ValueError as error:
            raise UnreachableError(f"no metrics in the answer ({error})") from error
        return cls._from(families, at_s)

    @classmethod
    def read(cls, registry: CollectorRegistry, at_s: float) -> Scrape:
        """The same from the registry itself, without a text between: 0.5 ms where the text takes 15."""
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
        """The samples of a name, added up by the values of these labels."""
        found: dict[tuple[str, ...], float] = {}
        for sample, given, value in self.samples:
            if sample == name:
                key = tuple(given.get(label, "") for label in labels)
                found[key] = found.get(key, 0.0) + value
        return found

    def total(self, name: str) -> float:
        """All samples of a name, added up."""
        return self.by(name).get((), 0.0)

    @property
    def started_s(self) -> float:
        """When the service began; its workers' first, where it has several."""
        return min(
            (value for name, _, value in self.samples if name == "cascade_start_time_seconds"), default=self.at_s
        )


@dataclass(frozen=True, slots=True)
class PathFrame:
    """A decision path: decisions a second, and percentiles in ms, NaN where nothing was decided."""

    path: str
    per_second: float
    p50_ms: float
    p99_ms: float
    p999_ms: float


@dataclass(frozen=True, slots=True)
class Frame:
    """What happened in `seconds`. Shares in 0..1, NaN without decisions.

    `budgets` by objective: the share of decisions that may break it; `burn`: the share that did, over that one.
    `watts` and `mj_per_decision` by kind, of the meters that were read at both ends. `carbon_g_per_million` by kind,
    empty where no carbon is accounted. `limits_ms` of the latency objectives by name. `lost_meters`: those that give no
    reading. `lag` in records, NaN where it is not known. `workers`: (running, all), None where the service is one
    process.
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
        """From two scrapes of one service; from its beginning where there is no earlier one, or it began anew."""
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
        limits_ms = {
            given["objective"]: 1e3 * value
            for name, given, value in now.samples
            if name == "cascade_objective_limit_seconds"
        }
        breaches = grown("cascade_objective_breaches_total", "objective")
        events = grown("cascade_objective_events_total", "objective")
        budgets = {
            given["objective"]: value for name, given, value in now.samples if name == "cascade_objective_budget_ratio"
        }
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
            limits_ms=limits_ms,
            lost_meters=tuple(
                sorted(
                    {given["meter"] for name, given, up in now.samples if name == "cascade_energy_meter_up" and not up}
                )
            ),
            lag=now.by("cascade_partition_lag_records").get((), math.nan),
            dead_letters=sum(grown("cascade_dead_letters_total").values()),
            workers=(round(sum(up)), len(up)) if up else None,
        )


def quantile_ms(buckets: Mapping[float, float], q: float) -> float:
    """The quantile of cumulative buckets (limit in seconds: count up to it), linear within a bucket; NaN if empty.

    As PromQL's `histogram_quantile`: beyond the highest limit that limit is told.
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
    """Ask the service; raises UnreachableError, one line, where it gives no metrics."""
    if not base.startswith(("http://", "https://")):
        raise UnreachableError(f"{base}: not an address; write it as {DEFAULT_URL}")
    try:
        with urllib.request.urlopen(f"{base.rstrip('/')}/metrics", timeout=ANSWER_S_MAX) as answer:  # noqa: S310 - checked
            text = answer.read(ANSWER_BYTES_MAX).decode("utf-8", "replace")
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise UnreachableError(f"{base}: no answer ({error}); is the service running, and health.enabled?") from error
    return Scrape.of(text, clock())


def _path(path: str, per_second: float, buckets: Mapping[tuple[str, ...], float]) -> PathFrame:
    own = {float(limit): count for (of, limit), count in buckets.items() if of == path}
    return PathFrame(path, per_second, *(quantile_ms(own, q) for q in (0.5, 0.99, 0.999)))


def _grown_by_kind(name: str, before: Scrape | None, now: Scrape) -> dict[str, float]:
    """What the meters of each kind have added; one that is lost, or back since, does not count, rather than as 0."""
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
