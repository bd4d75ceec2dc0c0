"""Sends to an OpenTelemetry collector with OpenTelemetry's exporter. Needs the extra `otel`: imported on demand."""

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
from streaming.service.web import is_loopback

EXPORT_S_MAX: Final = 10.0
_LOGGER: Final = "opentelemetry.exporter.otlp.proto.http.metric_exporter"


class Session(requests.Session):
    """Stores why a request failed: the exporter only logs it, and takes a redirect for success."""

    problem = ""

    def request(self, *arguments: Any, **more: Any) -> requests.Response:
        """As requests' own."""
        try:
            answer = super().request(*arguments, **more)
        except Exception as error:
            # the exporter's last try may have no time left: what the try before it met says more
            self.problem = self.problem or " ".join(str(error).split())
            raise
        succeeded = 200 <= (answer.status_code or 0) < 300
        self.problem = "" if succeeded else f"{answer.status_code} {answer.reason}"
        return answer


class OtelCollector:
    """Sends the metrics of `collect`.

    settings: endpoint, TLS, headers, interval. instance: `service.instance.id`; if empty, random at each start.
    started_s: the start of the counters, seconds since the epoch. Raises SettingError if the headers cannot be read.
    """

    def __init__(
        self, settings: OtelSettings, instance: str, collect: Callable[[], Iterable[Metric]], started_s: float
    ) -> None:
        self._collect, self._started_s = collect, started_s
        self._session = Session()
        # no proxy for this machine
        self._session.trust_env = not is_loopback(settings.endpoint)
        logger = logging.getLogger(_LOGGER)
        logger.handlers, logger.propagate = [logging.NullHandler()], False
        self._exporter = OTLPMetricExporter(
            endpoint=settings.endpoint,
            certificate_file=settings.ca_file or None,
            headers=settings.headers(),
            timeout=min(EXPORT_S_MAX, settings.interval_s),
            compression=Compression.Gzip,
            session=self._session,
        )
        own = {
            "service.name": "cascade",
            "service.version": cascade.__version__,
            "service.instance.id": instance or str(uuid.uuid4()),
        }
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES take precedence
        self._resource = Resource.create(own).merge(OTELResourceDetector().detect())

    def send(self) -> str:
        """Sends the present figures; returns the reason of a failure, else an empty text."""
        self._session.problem = ""
        result = self._exporter.export(metrics_data(self._collect(), self._resource, self._started_s, time.time()))
        return self._session.problem or ("" if result is MetricExportResult.SUCCESS else "not sent")

    def close(self) -> None:
        """Ends a request in progress."""
        self._exporter.shutdown()
