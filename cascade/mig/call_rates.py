"""Deep calls a second in a window: of all workers, and of each Triton pod.

Sources: the workers' metrics and Triton's in Prometheus; a service's own metrics endpoint; or its journals.
"""

from __future__ import annotations

import http.client
import time
import urllib.request
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from cascade.errors import CascadeError, DataError
from cascade.ledger.journal import read_journal
from cascade.mig.prometheus import Sample, Series

DEEP_CALLS: Final = "cascade_deep_call_duration_seconds_count"
START: Final = "cascade_start_time_seconds"
# Triton's own count; it exists on a MIG slice too, unlike Triton's metrics of GPUs.
TRITON_REQUESTS: Final = "nv_inference_request_success"
METRICS: Final = (DEEP_CALLS, TRITON_REQUESTS)
_ANSWER_S_MAX: Final = 5.0
_ANSWER_BYTES_MAX: Final = 16 << 20


class ServiceMetricsError(CascadeError):
    """The service did not answer with its metrics."""


def deep_calls_per_s(series: Iterable[Series], start_s: float, end_s: float) -> float | None:
    """Deep calls a second of all workers in Prometheus; None if it has no worker's metrics."""
    rates = [_rate(found, start_s, end_s) for found in series if found.name == DEEP_CALLS]
    known = [rate for rate in rates if rate is not None]
    return sum(known) if known else None


def triton_calls_per_s(series: Iterable[Series], start_s: float, end_s: float) -> dict[str, float]:
    """Requests a second of each Triton pod in Prometheus, by the pod's name; a sum over its models."""
    by_pod: dict[str, float] = {}
    for found in series:
        rate = _rate(found, start_s, end_s) if found.name == TRITON_REQUESTS else None
        if rate is not None and found.labels.get("pod"):
            by_pod[found.labels["pod"]] = by_pod.get(found.labels["pod"], 0.0) + rate
    return by_pod


def _rate(found: Series, start_s: float, end_s: float) -> float | None:
    """The growth of a counter over the time between its own samples. After a restart it counts from 0."""
    inside = [sample for sample in found.samples if start_s <= sample.at_s <= end_s and 0.0 <= sample.value < 1e15]
    if len(inside) < 2:
        return None
    return _growth(inside) / (inside[-1].at_s - inside[0].at_s)


def _growth(samples: Sequence[Sample]) -> float:
    pairs = ((before.value, after.value) for before, after in pairwise(samples))
    return sum(after - before if after >= before else after for before, after in pairs)


class ServiceCalls:
    """The calls of a service that Prometheus does not know, from its metrics endpoint or its journals.

    source: an address such as http://127.0.0.1:9464, or a journal's directory.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._is_address = source.startswith(("http://", "https://"))
        self._before: Sample | None = None
        if not self._is_address and not Path(source).exists():
            raise DataError(f"--ledger {source}: no such directory, and not an address such as http://127.0.0.1:9464")

    def per_s(self, start_s: float, end_s: float) -> float | None:
        """Deep calls a second; None right after the service's start. Raises ServiceMetricsError or DataError.

        From an address: since the last time that this was called, at first since the start of the service. From a
        journal: of its lines between both moments, in seconds since the epoch.
        """
        return self._from_address() if self._is_address else self._from_journal(start_s, end_s)

    def _from_journal(self, start_s: float, end_s: float) -> float:
        start, end = (datetime.fromtimestamp(moment, UTC) for moment in (start_s, end_s))
        parts = [part for run in read_journal([Path(self._source)]) if (part := run.between(start, end)) is not None]
        rates = [
            part.counters.deep_calls.count / seconds
            for part in parts
            if (seconds := (part.ended - part.started).total_seconds()) > 0
        ]
        if not rates:
            raise ServiceMetricsError(
                f"--ledger {self._source}: no line in the window; the service writes one each ledger.interval_s, "
                "so --interval must be longer"
            )
        return sum(rates)

    def _from_address(self) -> float | None:
        found = self._scrape()
        calls = [value for name, value in found if name == DEEP_CALLS]
        if not calls:
            raise ServiceMetricsError(f"{self._source}: these are not the metrics of a Cascade service")
        now = Sample(time.time(), sum(calls))
        started = [value for name, value in found if name == START]
        before = self._before or Sample(min(started, default=now.at_s), 0.0)
        self._before = now
        if now.at_s <= before.at_s:
            return None
        return _growth([before, now]) / (now.at_s - before.at_s)

    def _scrape(self) -> list[tuple[str, float]]:
        try:
            with urllib.request.urlopen(f"{self._source.rstrip('/')}/metrics", timeout=_ANSWER_S_MAX) as answer:  # noqa: S310 - checked
                text = answer.read(_ANSWER_BYTES_MAX).decode("utf-8", "replace")
            families = list(text_string_to_metric_families(text))
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServiceMetricsError(f"{self._source}: no answer with metrics ({error}); check --ledger") from error
        return [(sample.name, sample.value) for family in families for sample in family.samples]
