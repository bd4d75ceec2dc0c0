"""An OpenTelemetry collector, by OpenTelemetry's own exporter. Needs the extra `otel`: imported only when wanted."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Final

import requests
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import MetricExportResult
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from prometheus_client.metrics_core import Metric

import cascade
from cascade.config import OtelSettings
from cascade.ledger.otel import metrics_data
from streaming.web import is_loopback

EXPORT_S_MAX: Final = 10.0
_LOGGER: Final = "opentelemetry.exporter.otlp.proto.http.metric_exporter"


class Session(requests.Session):
    """Keeps why its last request failed: the exporter tells its logger only, and takes a redirect for success."""

    problem = ""

    def request(self, *arguments: Any, **more: Any) -> requests.Response:
        """As requests' own."""
        self.problem = ""
        try:
            answer = super().request(*arguments, **more)
        except Exception as error:
            self.problem = " ".join(str(error).split())
            raise
        if not 200 <= (answer.status_code or 0) < 300:
            self.problem = f"{answer.status_code} {answer.reason}"
        return answer


class OtelCollector:
    """Sends what `collect` gives; `started_s`, seconds since the epoch: since when that counts.

    `instance` is the service's name among others, another at each start where empty. Raises SettingError where the
    headers cannot be read.
    """

    def __init__(
        self, settings: OtelSettings, instance: str, collect: Callable[[], Iterable[Metric]], started_s: float
    ) -> None:
        self._collect, self._started_s = collect, started_s
        self._session = Session()
        # a proxy is for others than this machine
        self._session.trust_env = not is_loopback(settings.endpoint)
        logger = logging.getLogger(_LOGGER)
        logger.handlers, logger.propagate = [logging.NullHandler()], False
        self._exporter = OTLPMetricExporter(
            endpoint=settings.endpoint, certificate_file=settings.ca_file or None, headers=settings.headers(),
            timeout=min(EXPORT_S_MAX, settings.interval_s), compression=Compression.Gzip, session=self._session,
        )  # fmt: skip
        own = {
            "service.name": "cascade", "service.version": cascade.__version__,
            "service.instance.id": instance or str(uuid.uuid4()),
        }  # fmt: skip
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say it better
        self._resource = Resource.create(own).merge(OTELResourceDetector().detect())

    def send(self) -> str:
        """Send the figures as they are now; returns why that failed, empty where it did not."""
        result = self._exporter.export(metrics_data(self._collect(), self._resource, self._started_s, time.time()))
        return self._session.problem or ("" if result is MetricExportResult.SUCCESS else "they were not sent")

    def close(self) -> None:
        """Give up what is under way."""
        self._exporter.shutdown()
