"""Liveness, readiness and metrics over HTTP, for probes and Prometheus."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from cascade.errors import SettingError
from streaming.health_state import HealthState

# an unfinished request occupies its thread no longer than this
_REQUEST_TIMEOUT_S = 5.0
# `close` waits this long at most
_CLOSE_CHECK_S = 0.5
ALWAYS_SENT = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
OPENMETRICS = "application/openmetrics-text"
# In an Accept header; browsers and Prometheus send fewer.
RANGES_MAX = 32


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that disconnect before the answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class HealthServer:
    """Serves health, metrics and more routes over HTTP in a thread; a context manager.

    state: for /healthz and /readyz. registry: for /metrics. host, port: the address; port 0 takes a free one, see the
    attribute `port`. more: further routes by path. Raises SettingError if the address cannot be bound.
    """

    def __init__(
        self,
        state: HealthState,
        registry: CollectorRegistry,
        host: str,
        port: int,
        more: Mapping[str, Route] | None = None,
    ) -> None:
        routes: dict[str, Route] = {
            "/healthz": lambda _: _report(state, state.not_alive()),
            "/readyz": lambda _: _report(state, state.not_ready()),
            "/metrics": lambda request: _metrics(registry, request.accept),
        }
        try:
            self._server = _Server((host, port), _handler(routes | dict(more or {})))
        except (OSError, OverflowError) as error:
            problem, remedy = f"cannot be bound ({error})", "choose another address, or port 0 for a free port"
            raise SettingError("configuration", "health.port", f"{host}:{port}", problem, remedy) from error
        self.host, self.port = host, int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_CLOSE_CHECK_S,), name="cascade-health", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving and release the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> HealthServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP response."""

    status: HTTPStatus
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request: its query, and two headers, empty if they were not sent."""

    query: str
    accept: str
    accept_language: str


Route = Callable[[Request], Answer]


def _handler(routes: Mapping[str, Route]) -> type[BaseHTTPRequestHandler]:

    class Handler(BaseHTTPRequestHandler):
        """GET only: the base class answers other methods with 501."""

        timeout = _REQUEST_TIMEOUT_S
        server_version = "cascade"
        sys_version = ""

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            route = routes.get(path)
            if route is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            header = self.headers.get
            answer = route(Request(query, header("Accept", ""), header("Accept-Language", "")))
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            self.send_header("Content-Length", str(len(answer.body)))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

        def end_headers(self) -> None:
            """Adds the headers that every response has, errors included."""
            for name, value in ALWAYS_SENT.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Logs nothing: probes come every second."""

    return Handler


def _metrics(registry: CollectorRegistry, accept: str) -> Answer:
    """OpenMetrics 1.0, which has exemplars, if the client accepts it as much as text; else the classic text."""
    asked = qualities(accept)
    if asked.get(OPENMETRICS, 0.0) > 0.0 and asked[OPENMETRICS] >= asked.get("text/plain", 0.0):
        text: bytes = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
        return Answer(HTTPStatus.OK, openmetrics.CONTENT_TYPE_LATEST, text)
    return Answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(registry))


def qualities(accept: str) -> dict[str, float]:
    """Returns the quality, 0 to 1, of each media type or language of an Accept header (RFC 9110, 12.5).

    Ignores what cannot be parsed, and all after the first RANGES_MAX.
    """
    found: dict[str, float] = {}
    for accepted in accept.split(",")[:RANGES_MAX]:
        kind, *parameters = (part.strip().lower() for part in accepted.split(";"))
        given = dict(part.split("=", 1) for part in parameters if "=" in part)
        try:
            quality = float(given.get("q", "1"))
        except ValueError:
            continue
        found[kind] = max(found.get(kind, 0.0), quality)
    return found


def _report(state: HealthState, reasons: list[str]) -> Answer:
    components = {
        name: {"status": part.status, "text": part.text, "for_s": round(state.since(part), 3)}
        for name, part in state.components().items()
    }
    body = json.dumps({"ok": not reasons, "waiting_for": reasons, "components": components}).encode()
    status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
    return Answer(status, "application/json", body)
