"""The ledger at an OpenTelemetry collector: what arrives is what Prometheus gets, and what is away stops nothing."""

from __future__ import annotations

import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from structlog.testing import capture_logs

import cascade
import streaming.service.otel
from cascade.bundle import SHIPPED_BUNDLE
from cascade.config import CarbonSettings, Config, OtelSettings
from cascade.ledger import CertifiedRecall, Ledger, ledger_registry, make_carbon
from cascade.ledger.otel import ATTRIBUTES, NAMES, START, metrics_data
from cascade.protocols import ReplicaState
from streaming.pipeline.deep_replicas import ReplicaCollector
from streaming.pipeline.table import Records
from streaming.service.lag import LagCollector
from streaming.service.otel import otel_exported
from streaming.service.worker_metrics import workers_registry
from tests.certificates import Authority, make_authority
from tests.otlp_receiver import OtlpReceiver, attributes
from tests.streaming.service.test_top import Meter
from tests.timing import wait_until

CUMULATIVE = 2  # AggregationTemporality of OTLP


def arrived(receiver: OtlpReceiver, count: int) -> None:
    wait_until(lambda: len(receiver.taken) >= count)


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    running = OtlpReceiver()
    yield running
    running.close()


def full_ledger() -> Ledger:
    meter = Meter("nvml")
    carbon = make_carbon(CarbonSettings(region="DEU"))
    certified = CertifiedRecall(0.6, 0.01, datetime(2100, 1, 1, tzinfo=UTC))
    ledger = Ledger(meters=[meter], carbon=carbon, bundle_version="b-1", certified=certified)
    meter.energy_j = 2.5
    places = Records("t", np.zeros(990, np.int64), np.arange(990))
    ledger.record_decisions("screened", np.full(990, 0.003), None, places)
    ledger.record_decisions("escalated", np.array([0.012, 0.4, 20.0]))
    ledger.record_decisions("degraded", np.array([0.1]), cause="deadline")
    ledger.record_stage("features", 0.1, 0.2, 1)
    ledger.add_deep_call(3, 0.01)
    ledger.count_dead_letters("syntax", 4)
    ledger.count_session()
    ledger.record_recovery(2.0)
    ledger.record_arrival(-0.004, 2)
    return ledger


class SeveralReplicas:
    def replicas(self) -> list[ReplicaState]:
        return [ReplicaState("10.0.0.1:8001", True, "", 5, 1)]


def registry_of(ledger: Ledger) -> CollectorRegistry:
    registry = ledger_registry(ledger)
    registry.register(LagCollector(lambda: None, lambda: {("transactions", 3): 17}))
    registry.register(ReplicaCollector(SeveralReplicas()))
    return registry


def config_of(url: str, **settings: Any) -> Config:
    return Config(otel=OtelSettings(endpoint=url, **({"interval_s": 1.0} | settings)))


def pushed(receiver: OtlpReceiver, registry: CollectorRegistry, started_s: float = 1_000.0, **settings: Any) -> None:
    """Once, at the end of a service that ends at once."""
    with otel_exported(config_of(receiver.url, **settings), registry.collect, started_s):
        pass
    arrived(receiver, 1)


def by(points: Any, name: str) -> dict[str, Any]:
    return {attributes(point)[name]: point for point in points}


def test_what_arrives_is_what_prometheus_gets(receiver: OtlpReceiver) -> None:
    ledger = full_ledger()
    pushed(receiver, registry_of(ledger))
    found = receiver.metrics
    decisions = found["cascade.decisions"]
    assert decisions.unit == "{decision}"
    assert decisions.sum.is_monotonic
    assert decisions.sum.aggregation_temporality == CUMULATIVE
    counts = {path: point.as_int for path, point in by(decisions.sum.data_points, "cascade.decision.path").items()}
    assert counts == {"screened": 990, "escalated": 3, "degraded": 1, "duplicate": 0}
    (energy,) = found["cascade.meter.energy"].sum.data_points
    assert energy.as_double == 2.5
    assert attributes(energy) == {"cascade.meter.name": "nvml", "cascade.energy.kind": "measured"}
    assert (found["cascade.meter.energy"].unit, found["cascade.meter.carbon"].unit) == ("J", "g")
    (lag,) = found["cascade.partition.lag"].gauge.data_points
    assert (lag.as_int, attributes(lag)["messaging.destination.partition.id"]) == (17, "3")
    (bound,) = found["cascade.clock.skew_bound"].gauge.data_points
    assert bound.as_double == -0.004
    start_ns = round(ledger.started.timestamp() * 1e9)
    assert {point.start_time_unix_nano for point in decisions.sum.data_points} == {start_ns}
    assert all(point.time_unix_nano > start_ns for point in decisions.sum.data_points)


def test_histograms_have_explicit_buckets_that_add_up_and_exemplars(receiver: OtlpReceiver) -> None:
    ledger = full_ledger()
    pushed(receiver, registry_of(ledger))
    metric = receiver.metrics["cascade.decision.duration"]
    assert metric.unit == "s"
    assert metric.histogram.aggregation_temporality == CUMULATIVE
    points = by(metric.histogram.data_points, "cascade.decision.path")
    escalated = points["escalated"]
    bounds, counts = list(escalated.explicit_bounds), list(escalated.bucket_counts)
    assert len(counts) == len(bounds) + 1
    assert (escalated.count, sum(counts), counts[-1]) == (3, 3, 1)
    assert [bounds[n] for n, count in enumerate(counts[:-1]) if count] == [0.02, 0.5]
    assert escalated.sum == pytest.approx(20.412)
    assert not escalated.HasField("min")
    assert not escalated.HasField("max")
    (exemplar,) = points["screened"].exemplars
    assert exemplar.as_double == 0.003
    (decision_id,) = exemplar.filtered_attributes
    assert (decision_id.key, decision_id.value.string_value) == ("cascade.decision.id", "t-0-989")


def test_the_resource_names_the_service_and_the_environment_takes_precedence(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(receiver, registry_of(Ledger()))
    headers, request = receiver.taken[-1]
    names = attributes(request.resource_metrics[0].resource)
    assert (names["service.name"], names["service.version"]) == ("cascade", cascade.__version__)
    assert names["service.instance.id"]
    assert headers["path"] == "/v1/metrics"
    assert headers["content-type"] == "application/x-protobuf"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "fraud")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    with otel_exported(config_of(receiver.url), lambda: [], 0.0):
        pass
    arrived(receiver, 2)
    names = attributes(receiver.taken[-1][1].resource_metrics[0].resource)
    assert (names["service.name"], names["deployment.environment.name"]) == ("fraud", "test")


def test_every_metric_has_a_name_and_every_label_too() -> None:
    ledger = full_ledger()
    supervisors = [
        GaugeMetricFamily("cascade_worker_up", "", 1.0),
        CounterMetricFamily("cascade_worker_restarts", "", 0),
    ]
    workers = workers_registry(lambda: {"0": [*registry_of(ledger).collect(), *supervisors]})
    families = list(workers.collect())
    assert {family.name for family in families} - {START} == set(NAMES)
    labels = {name for family in families for sample in family.samples for name in sample.labels}
    assert labels - {"le"} <= set(ATTRIBUTES)
    names = [name for name, _ in NAMES.values()]
    assert len(set(names)) == len(names)
    for name in names:
        assert not any(other.startswith(f"{name}.") for other in names), f"{name} is a namespace too"


def test_a_family_without_a_name_here_is_sent_all_the_same() -> None:
    data = metrics_data([GaugeMetricFamily("cascade_novelty_things", "New.", 4.0)], Resource({}), 1.0, 2.0)
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    assert (metric.name, metric.data.data_points[0].value) == ("cascade.novelty_things", 4.0)


def test_workers_each_have_their_beginning_and_the_supervisor_its_own(receiver: OtlpReceiver) -> None:
    ledgers = {"0": full_ledger(), "1": full_ledger()}
    restarts = CounterMetricFamily("cascade_worker_restarts", "Restarts.", 2)
    groups: dict[str, list[Metric]] = {
        worker: [*ledger_registry(ledger).collect(), restarts] for worker, ledger in ledgers.items()
    }
    pushed(receiver, workers_registry(lambda: groups | {"shared": []}), started_s=1_000.0)
    points = by(receiver.metrics["cascade.sessions"].sum.data_points, "cascade.worker.id")
    assert {worker: point.start_time_unix_nano for worker, point in points.items()} == {
        worker: round(ledger.started.timestamp() * 1e9) for worker, ledger in ledgers.items()
    }
    restarted = receiver.metrics["cascade.worker.restarts"].sum.data_points
    assert {point.start_time_unix_nano for point in restarted} == {1_000 * 10**9}
    assert len(receiver.metrics["cascade.decision.duration"].histogram.data_points) == 8


def test_it_is_sent_at_intervals_and_the_last_figures_at_the_end(receiver: OtlpReceiver) -> None:
    ledger = Ledger()

    def sessions(at: int) -> int:
        (scope,) = receiver.taken[at][1].resource_metrics[0].scope_metrics
        (metric,) = [metric for metric in scope.metrics if metric.name == "cascade.sessions"]
        return int(metric.sum.data_points[0].as_int)

    with otel_exported(config_of(receiver.url), ledger_registry(ledger).collect, 0.0):
        ledger.count_session()
        arrived(receiver, 2)
        ledger.count_session()
        before = len(receiver.taken)
    assert len(receiver.taken) > before
    assert (sessions(0), sessions(-1)) == (1, 2)


# --- a collector that is away ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "reason"), [(307, "307 Temporary Redirect"), (503, "503 Service Unavailable")])
def test_a_redirect_or_an_error_is_no_success_and_is_not_followed(
    receiver: OtlpReceiver, status: int, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    receiver.status = status
    with capture_logs() as lines, otel_exported(config_of(receiver.url), lambda: [], 0.0):
        wait_until(lambda: bool(lines))
    assert lines[0]["reason"] == reason
    assert capfd.readouterr().err == ""


def test_a_collector_that_fails_is_logged_once_and_once_when_it_works_again(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter(["refused", "refused", "refused", "", "", "refused"])
    done = threading.Event()

    def send() -> str:
        outcome = next(outcomes, None)
        if outcome is None:
            done.set()
        return outcome or ""

    collector = SimpleNamespace(send=send, close=lambda: None)
    monkeypatch.setattr(streaming.service.otel, "_connect", lambda *_: collector)
    config = Config(otel=OtelSettings(endpoint="http://a", interval_s=0.001))
    with capture_logs() as lines, otel_exported(config, lambda: [], 0.0):
        done.wait()
    assert [line["log_level"] for line in lines] == ["error", "info", "error", "info"]


def test_a_collector_that_hangs_delays_neither_ledger_nor_end(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request stays open until the test lets it be answered: what waits for it waits for ever."""
    ledger, exporter = Ledger(), streaming.service.otel_collector.OTLPMetricExporter
    monkeypatch.setattr(
        "streaming.service.otel_collector.OTLPMetricExporter",
        lambda **settings: exporter(**settings | {"timeout": 3_600}),
    )
    monkeypatch.setattr(streaming.service.otel, "CLOSE_S", 0.1)
    receiver.answering.clear()
    with otel_exported(config_of(receiver.url), ledger_registry(ledger).collect, 0.0):
        wait_until(lambda: receiver.requests > 0)
        ledger.record_decisions("screened", np.full(3, 0.001))
    assert ledger.counters().decisions == 3
    assert any(thread.name == "cascade-otel" for thread in threading.enumerate()), "the request is still open"
    receiver.answering.set()


def test_a_collector_that_refuses_connections_is_logged(receiver: OtlpReceiver) -> None:
    receiver.close()
    with capture_logs() as lines, otel_exported(config_of(receiver.url), lambda: [], 0.0):
        wait_until(lambda: bool(lines))
    assert "refused" in lines[0]["reason"]


def test_metrics_that_cannot_be_read_end_no_thread(receiver: OtlpReceiver) -> None:
    broken = [True]

    def collect() -> list[Metric]:
        if broken[0]:
            raise ValueError("a worker's answer")
        return []

    with capture_logs() as lines, otel_exported(config_of(receiver.url), collect, 0.0):
        wait_until(lambda: bool(lines))
        assert lines[0]["reason"] == "ValueError: a worker's answer"
        broken[0] = False
        arrived(receiver, 1)


# --- settings -------------------------------------------------------------------------------------------------------


def test_headers_come_from_the_environment_or_a_file(
    receiver: OtlpReceiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLLECTOR_HEADERS", "Authorization=Bearer%20abc, x-tenant=one")
    pushed(receiver, registry_of(Ledger()), headers_env="COLLECTOR_HEADERS")
    headers = receiver.taken[-1][0]
    assert (headers["authorization"], headers["x-tenant"]) == ("Bearer abc", "one")
    file = tmp_path / "headers"
    file.write_text("api-key=k\n")
    assert OtelSettings(endpoint="https://a", headers_file=str(file)).headers() == {"api-key": "k"}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("authority"))


def test_tls_is_by_the_authority_that_is_named_and_no_other(authority: Authority, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("collector", ["127.0.0.1"]))
    receiver = OtlpReceiver(context)
    pushed(receiver, registry_of(Ledger()), ca_file=str(authority.ca_file))
    other = make_authority(tmp_path / "other")
    with capture_logs() as lines, otel_exported(config_of(receiver.url, ca_file=str(other.ca_file)), lambda: [], 0.0):
        wait_until(lambda: bool(lines))
    assert "CERTIFICATE_VERIFY_FAILED" in lines[0]["reason"]
    assert len(receiver.taken) == 1
    receiver.close()


def test_without_an_endpoint_nothing_is_imported_and_nothing_sent() -> None:
    script = (
        "import sys, streaming.service.serve, streaming.service.supervisor\n"
        "from cascade.config import Config\n"
        "from streaming.service.otel import otel_exported\n"
        "with otel_exported(Config(), lambda: 1 / 0, 0.0): pass\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_service_without_the_extra_ends_with_one_line_and_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "cascade.toml"
    settings = {
        "bundle": {"path": str(SHIPPED_BUNDLE)},
        "deep": {"backend": "onnxruntime"},
        "health": {"port": 0},
        "otel": {"endpoint": "http://127.0.0.1:4318/v1/metrics"},
    }
    file.write_bytes(msgspec.toml.encode(settings))
    script = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith('opentelemetry'): raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from cascade.cli import main\n"
        f"sys.exit(main(['run', '--config', {str(file)!r}]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "otel.endpoint = 'http://127.0.0.1:4318/v1/metrics': OpenTelemetry is not installed" in line
    assert "pip install 'cascade-fraud[otel]'" in line


def test_settings_reach_the_workers_as_they_are() -> None:
    config = config_of("http://127.0.0.1:4318/v1/metrics")
    assert msgspec.json.decode(msgspec.json.encode(config), type=Config) == config
