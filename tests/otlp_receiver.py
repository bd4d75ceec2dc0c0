"""A receiver of OpenTelemetry's protocol, OTLP over HTTP, of our own: it decodes what the exporter sends."""

from __future__ import annotations

import gzip
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)


class OtlpReceiver:
    """`taken`: the decoded requests with their headers. It answers with `status`, once `answering` is set."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.taken: list[tuple[dict[str, str], ExportMetricsServiceRequest]] = []
        self.status, self.requests = 200, 0
        self.answering = threading.Event()
        self.answering.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                request = ExportMetricsServiceRequest.FromString(body)
                receiver.requests += 1
                receiver.answering.wait()
                if receiver.status == 200:
                    receiver.taken.append(
                        ({"path": self.path} | {key.lower(): value for key, value in self.headers.items()}, request)
                    )
                answer = ExportMetricsServiceResponse().SerializeToString()
                self.send_response(receiver.status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                """Logs nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        # a client that has gone is no error of the test
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
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
    return {attribute.key: attribute.value.string_value for attribute in holder.attributes}
