"""The ledger goes to an OpenTelemetry collector as well, where that is wanted: OTLP over HTTP, at intervals.

A thread of its own reads the metrics and sends them. What is not taken costs nothing but itself: the figures are
cumulative, so the next that are taken make up for it. A collector that is away is told once, and once when it is back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import structlog
from prometheus_client.metrics_core import Metric

from cascade.config import Config
from cascade.errors import SettingError

if TYPE_CHECKING:
    from streaming.otel_collector import OtelCollector

log = structlog.get_logger()
# What the last figures may cost the end of a service.
CLOSE_S: Final = 2.0
Collect = Callable[[], Iterable[Metric]]


@contextmanager
def otel_exported(config: Config, collect: Collect, started_s: float) -> Iterator[None]:
    """Send what `collect` gives every `otel.interval_s`, and once more at the end; does nothing without an endpoint.

    `started_s`: since when it counts, seconds since the epoch. Raises SettingError where the extra is not installed or
    the headers cannot be read.
    """
    if not config.otel.endpoint:
        yield
        return
    pusher = _Pusher(_connect(config, collect, started_s), config.otel.interval_s)
    try:
        yield
    finally:
        pusher.close()


class _Pusher:
    """Sends every `interval_s` seconds in a thread of its own, and says when that begins to fail or to work."""

    def __init__(self, collector: OtelCollector, interval_s: float) -> None:
        self._collector, self._interval_s = collector, interval_s
        self._stop = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="cascade-otel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send the last figures, within `CLOSE_S`; a collector that did not answer is not asked again."""
        self._stop.set()
        self._thread.join(CLOSE_S)
        self._collector.close()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._push()
        if not self._failing:
            self._push()

    def _push(self) -> None:
        try:
            problem = self._collector.send()
        except Exception as error:
            # whatever it is, it ends no export but this one
            problem = f"{type(error).__name__}: {error}"
        if problem and not self._failing:
            log.error("metrics do not reach the OpenTelemetry collector: tried again, in silence", reason=problem)
        elif self._failing and not problem:
            log.info("metrics reach the OpenTelemetry collector again")
        self._failing = bool(problem)


def _connect(config: Config, collect: Collect, started_s: float) -> OtelCollector:
    try:
        from streaming.otel_collector import OtelCollector
    except ImportError as error:
        raise SettingError(
            "configuration", "otel.endpoint", config.otel.endpoint, f"OpenTelemetry is not installed ({error})",
            "pip install 'cascade-fraud[otel]', or leave the endpoint out",
        ) from error  # fmt: skip
    return OtelCollector(config.otel, config.kafka.instance, collect, started_s)
