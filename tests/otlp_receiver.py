"""A receiver of OpenTelemetry's protocol, OTLP over HTTP, of our own: it decodes what the exporter sends."""

from __future__ import annotations

import gzip
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)


class OtlpReceiver:
    """`taken`: the requests, decoded, with their headers; `status` is what it answers, after `delay_s`."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.taken: list[tuple[dict[str, str], ExportMetricsServiceRequest]] = []
        self.status, self.delay_s = 200, 0.0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                request = ExportMetricsServiceRequest.FromString(body)
                time.sleep(receiver.delay_s)
                if receiver.status == 200:
                    receiver.taken.append(
                        ({"path": self.path} | {key.lower(): one for key, one in self.headers.items()}, request)
                    )
                answer = ExportMetricsServiceResponse().SerializeToString()
                self.send_response(receiver.status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                """Not told."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.server_address[1]}/v1/metrics"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def metrics(self) -> dict[str, Any]:
        """Of the last request, by name."""
        (resource,) = self.taken[-1][1].resource_metrics
        (scope,) = resource.scope_metrics
        return {metric.name: metric for metric in scope.metrics}


def attributes(holder: Any) -> dict[str, str]:
    """Of a data point or a resource, by name; all of ours are text."""
    return {one.key: one.value.string_value for one in holder.attributes}
