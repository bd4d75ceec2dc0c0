"""Liveness, readiness and metrics over HTTP, for probes and Prometheus."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from cascade.errors import SettingError

ComponentStatus = Literal["ok", "waiting", "failed"]
# a probe that does not finish its request holds a thread no longer than this
_REQUEST_TIMEOUT_S = 5.0
ALWAYS_SENT = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
OPENMETRICS = "application/openmetrics-text"


@dataclass(frozen=True, slots=True)
class Component:
    """How one part is: its status, a line of text, and since when (seconds of the state's clock)."""

    status: ComponentStatus
    text: str
    since_s: float


class HealthState:
    """What the worker tells about itself; any thread may read and write it.

    Ready: at least one component was named and all are `ok`. Alive: none has failed and the loop has called
    `progress` within `stall_s_max` seconds.

    >>> state = HealthState(stall_s_max=60)
    >>> state.waiting("broker", "connecting to 127.0.0.1:9092")
    >>> state.not_ready()
    ['broker: connecting to 127.0.0.1:9092']
    """

    def __init__(self, stall_s_max: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.stall_s_max = stall_s_max
        self._clock = clock
        self._lock = threading.Lock()
        self._components: dict[str, Component] = {}
        self._progress_s = clock()

    def ok(self, name: str, text: str = "") -> None:
        """The component works."""
        self._set(name, "ok", text)

    def waiting(self, name: str, text: str) -> None:
        """The component is not there yet; `text` says what for."""
        self._set(name, "waiting", text)

    def failed(self, name: str, text: str) -> None:
        """The component will not come back by itself: the process should be restarted."""
        self._set(name, "failed", text)

    def forget(self, name: str) -> None:
        """The component is no longer ours."""
        with self._lock:
            self._components.pop(name, None)

    def waits(self, name: str) -> bool:
        """Whether the component is waited for."""
        component = self._components.get(name)
        return component is not None and component.status == "waiting"

    def progress(self) -> None:
        """The loop has gone round."""
        now_s = self._clock()
        with self._lock:
            self._progress_s = now_s

    def components(self) -> dict[str, Component]:
        """All components as they are now."""
        with self._lock:
            return dict(self._components)

    def not_ready(self) -> list[str]:
        """What readiness waits for, a line each; empty where ready."""
        components = self.components()
        if not components:
            return ["starting"]
        return [f"{name}: {part.text or part.status}" for name, part in components.items() if part.status != "ok"]

    def not_alive(self) -> list[str]:
        """Why the process should be restarted, a line each; empty where alive."""
        with self._lock:
            components, stalled_s = dict(self._components), self._clock() - self._progress_s
        reasons = [f"{name}: {part.text}" for name, part in components.items() if part.status == "failed"]
        if stalled_s > self.stall_s_max:
            reasons.append(f"loop: no progress for {stalled_s:.0f} s, at most {self.stall_s_max:.0f} s")
        return reasons

    def since(self, component: Component) -> float:
        """Seconds that a component has had its status."""
        return self._clock() - component.since_s

    def _set(self, name: str, status: ComponentStatus, text: str) -> None:
        now_s = self._clock()
        with self._lock:
            before = self._components.get(name)
            since_s = before.since_s if before is not None and before.status == status else now_s
            self._components[name] = Component(status, text, since_s)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A probe that goes away before its answer is no error of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class HealthServer:
    """Serves a HealthState, a metrics registry and `more` in a thread of its own, until closed; a context manager.

    `port` 0 takes a free one; the attribute `port` says which. Raises SettingError where the address cannot be had.
    """

    def __init__(
        self, state: HealthState, registry: CollectorRegistry, host: str, port: int,
        more: Mapping[str, Route] | None = None,
    ) -> None:  # fmt: skip
        routes: dict[str, Route] = {
            "/healthz": lambda _: _report(state, state.not_alive()),
            "/readyz": lambda _: _report(state, state.not_ready()),
            "/metrics": lambda request: _metrics(registry, request.accept),
        }
        try:
            self._server = _Server((host, port), _handler(routes | dict(more or {})))
        except (OSError, OverflowError) as error:
            raise SettingError(
                "configuration",
                "health.port",
                f"{host}:{port}",
                f"cannot be had ({error})",
                "choose another address, or port 0 for a free one",
            ) from error
        self.host, self.port = host, int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="cascade-health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and release the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> HealthServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent back."""

    status: HTTPStatus
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """What an answer may depend on: the query, and two headers, empty where they are not sent."""

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
            """With every answer, a refusal too."""
            for name, value in ALWAYS_SENT.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """A probe a second is not worth a line."""

    return Handler


def _metrics(registry: CollectorRegistry, accept: str) -> Answer:
    """OpenMetrics 1.0, which has exemplars, where it is asked for at least as much as text; else the classic text."""
    asked = _qualities(accept)
    if asked.get(OPENMETRICS, 0.0) > 0.0 and asked[OPENMETRICS] >= asked.get("text/plain", 0.0):
        return Answer(HTTPStatus.OK, openmetrics.CONTENT_TYPE_LATEST, _openmetrics_text(registry))
    return Answer(HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(registry))


def _openmetrics_text(registry: CollectorRegistry) -> bytes:
    text: bytes = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
    return text


def _qualities(accept: str) -> dict[str, float]:
    """How much each media type is wanted, 0 to 1 (RFC 9110, 12.5.1); a range that cannot be read is passed over."""
    found: dict[str, float] = {}
    for media_range in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in media_range.split(";"))
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
