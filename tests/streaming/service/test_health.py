from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from prometheus_client import CollectorRegistry, Counter

from cascade.errors import SettingError
from streaming.health_state import HealthState
from streaming.service.health import HealthServer
from tests.timing import SetClock, wait_until


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def state(clock: SetClock) -> HealthState:
    return HealthState(stall_s_max=30, clock=clock.monotonic)


@pytest.fixture
def server(state: HealthState) -> Iterator[HealthServer]:
    registry = CollectorRegistry()
    Counter("decisions", "Decisions made.", registry=registry).inc(3)
    with HealthServer(state, registry, "127.0.0.1", 0) as server:
        yield server


def ask(server: HealthServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of the answer."""
    with closing(http.client.HTTPConnection(server.host, server.port, timeout=5)) as connection:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


# what Prometheus 2.5x and 3 send, and others
OPENMETRICS_ASKED = (
    "application/openmetrics-text",
    "application/openmetrics-text;version=1.0.0;q=0.75,application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=0.0.4;q=0.25,*/*;q=0.1",
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,*/*;q=0.2",
    "text/plain, Application/OpenMetrics-Text ; q=1.0",
)
TEXT_ASKED = (
    "", "*/*", "text/plain", "application/json", "application/openmetrics-text;q=0", "application/openmetrics-text;q=x",
    "text/plain;q=0.9,application/openmetrics-text;q=0.1", ",;,=;q",
)  # fmt: skip


@pytest.mark.parametrize("accept", OPENMETRICS_ASKED)
def test_metrics_are_openmetrics_where_that_is_asked_for(server: HealthServer, accept: str) -> None:
    status, headers, body = ask(server, "/metrics", Accept=accept)
    assert (status, headers["Content-Type"]) == (200, "application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert "decisions_total 3.0" in body
    assert body.endswith("# EOF\n")


@pytest.mark.parametrize("accept", TEXT_ASKED)
def test_metrics_are_the_classic_text_else(server: HealthServer, accept: str) -> None:
    status, headers, body = ask(server, "/metrics", **({"Accept": accept} if accept else {}))
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=1.0.0; charset=utf-8")
    assert "decisions_total 3.0" in body
    assert "# EOF" not in body


def test_readiness_names_what_it_waits_for(server: HealthServer, state: HealthState) -> None:
    assert ask(server, "/readyz")[0] == 503
    state.ok("broker")
    state.waiting("triton", "loading fraud_deep")
    status, _, body = ask(server, "/readyz")
    assert status == 503
    assert json.loads(body)["waiting_for"] == ["triton: loading fraud_deep"]
    state.ok("triton")
    assert ask(server, "/readyz")[0] == 200


def test_liveness_fails_when_the_loop_makes_no_progress(
    server: HealthServer, state: HealthState, clock: SetClock
) -> None:
    assert ask(server, "/healthz")[0] == 200
    clock.now_s += 31
    status, _, body = ask(server, "/healthz")
    assert status == 503
    assert "no progress for 31 s" in body
    state.progress()
    assert ask(server, "/healthz")[0] == 200


def test_waiting_is_alive_but_failing_is_not(server: HealthServer, state: HealthState) -> None:
    state.waiting("broker", "connecting")
    assert ask(server, "/healthz")[0] == 200
    state.failed("broker", "fenced")
    status, _, body = ask(server, "/healthz")
    assert status == 503
    assert "broker: fenced" in body


def test_the_time_of_a_status_changes_only_with_the_status(state: HealthState, clock: SetClock) -> None:
    state.waiting("broker", "first try")
    clock.now_s += 5
    state.waiting("broker", "second try")
    assert state.since(state.components()["broker"]) == 5
    state.ok("broker")
    assert state.since(state.components()["broker"]) == 0


def test_only_get_and_only_known_paths(server: HealthServer) -> None:
    assert ask(server, "/")[0] == 404
    assert ask(server, "/../etc/passwd")[0] == 404
    assert ask(server, "/healthz?full=1")[0] == 200
    for method in ("POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"):
        assert ask(server, "/healthz", method)[0] == 501


def test_a_silent_client_does_not_hold_up_a_probe(server: HealthServer) -> None:
    with socket.create_connection((server.host, server.port)):
        assert ask(server, "/healthz")[0] == 200


def test_a_port_in_use_is_one_line(server: HealthServer, state: HealthState) -> None:
    with pytest.raises(SettingError, match=r"health\.port"):
        HealthServer(state, CollectorRegistry(), server.host, server.port)


def test_the_port_is_free_after_close(state: HealthState) -> None:
    with HealthServer(state, CollectorRegistry(), "127.0.0.1", 0) as server:
        port = server.port
    with HealthServer(state, CollectorRegistry(), "127.0.0.1", port):
        pass


def test_a_probe_that_goes_away_before_its_answer_leaves_no_trace(capfd: pytest.CaptureFixture[str]) -> None:
    state = HealthState(60)
    # more than the socket's buffers take, so that the answer meets the end of the connection
    state.waiting("broker", "x" * 20_000_000)
    with HealthServer(state, CollectorRegistry(), "127.0.0.1", 0) as server:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", server.port)) as probe:
                probe.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
                probe.recv(1)
                # closed at once, with a reset
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_until(lambda: not any("process_request" in thread.name for thread in threading.enumerate()))
    assert capfd.readouterr().err == ""
