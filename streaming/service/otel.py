"""Sends the metrics to an OpenTelemetry collector at intervals, if it is configured: OTLP over HTTP.

A separate thread reads and sends the metrics. The figures are cumulative, so a later success replaces failed attempts.
The log has a line when sending begins to fail, and a line when it works again.
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
    from streaming.service.otel_collector import OtelCollector

log = structlog.get_logger()
# The most that the last figures may delay the end of the service.
CLOSE_S: Final = 2.0
Collect = Callable[[], Iterable[Metric]]


@contextmanager
def otel_exported(config: Config, collect: Collect, started_s: float) -> Iterator[None]:
    """Sends the metrics of `collect` every `otel.interval_s`, and at the end; does nothing without an endpoint.

    `started_s`: the start of the counters, seconds since the epoch. Raises SettingError if the extra is not installed
    or the headers cannot be read.
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
    """Sends every `interval_s` seconds in a thread; logs when sending begins to fail, and when it works again."""

    def __init__(self, collector: OtelCollector, interval_s: float) -> None:
        self._collector, self._interval_s = collector, interval_s
        self._stop = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="cascade-otel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Sends the last figures within `CLOSE_S`, unless the last attempt failed."""
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
            # no error may end the thread
            problem = f"{type(error).__name__}: {error}"
        if problem and not self._failing:
            log.error("metrics do not reach the OpenTelemetry collector: retrying silently", reason=problem)
        elif self._failing and not problem:
            log.info("metrics reach the OpenTelemetry collector again")
        self._failing = bool(problem)


def _connect(config: Config, collect: Collect, started_s: float) -> OtelCollector:
    try:
        from streaming.service.otel_collector import OtelCollector
    except ImportError as error:
        problem = f"OpenTelemetry is not installed ({error})"
        remedy = "pip install 'cascade-fraud[otel]', or remove otel.endpoint"
        raise SettingError("configuration", "otel.endpoint", config.otel.endpoint, problem, remedy) from error
    return OtelCollector(config.otel, config.kafka.instance, collect, started_s)
