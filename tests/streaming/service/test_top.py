"""`cascade top` on a real metrics endpoint, with a ledger behind it."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from rich.console import Console

from cascade.cli import main
from cascade.ledger import Ledger, ledger_registry
from cascade.protocols import EnergyKind, EnergyReading
from streaming.health_state import HealthState
from streaming.service.health import HealthServer
from streaming.service.lag import LagCollector
from streaming.service.scrape import Frame, Scrape, UnreachableError, quantile_ms, scrape
from streaming.service.top import render_frame
from streaming.service.worker_metrics import workers_registry


class Meter:
    """A fake for hardware that is absent: joules as set, no reading below zero."""

    def __init__(self, name: str, kind: EnergyKind = "measured") -> None:
        self.name, self.kind, self.energy_j = name, kind, 0.0

    def read(self) -> EnergyReading:
        if self.energy_j < 0:
            raise OSError("gone")
        return EnergyReading(self.energy_j, self.kind, "a counter")


class Scene:
    def __init__(self) -> None:
        self.gpu, self.cpu = Meter("gpu0"), Meter("cpu-model", "modelled")
        self.ledger = Ledger(meters=[self.gpu, self.cpu])
        self.registry = ledger_registry(self.ledger)
        self.registry.register(LagCollector(lambda: None, lambda: {("t", 0): 5, ("t", 1): 7}))
        self.start_s = self.ledger.started.timestamp()

    def scrape(self, after_s: float, registry: CollectorRegistry | None = None) -> Scrape:
        return Scrape.of(generate_latest(registry or self.registry).decode(), self.start_s + after_s)


@pytest.fixture
def scene() -> Scene:
    scene = Scene()
    scene.ledger.record_decisions("screened", np.full(990, 0.003))
    scene.ledger.record_decisions("escalated", np.full(8, 0.03))
    scene.ledger.record_decisions("degraded", np.full(2, 0.03), cause="deadline")
    scene.gpu.energy_j, scene.cpu.energy_j = 20.0, 10.0
    return scene


def test_a_first_frame_is_since_the_service_began(scene: Scene) -> None:
    frame = Frame.between(None, scene.scrape(10.0))
    assert frame.seconds == pytest.approx(10.0)
    assert frame.per_second == pytest.approx(100.0)
    assert frame.escalated_share == pytest.approx(0.01)
    assert frame.degraded_share == pytest.approx(0.002)
    assert frame.watts == {"measured": pytest.approx(2.0), "modelled": pytest.approx(1.0)}
    assert frame.mj_per_decision == {"measured": pytest.approx(20.0), "modelled": pytest.approx(10.0)}
    assert frame.lag == 12
    assert frame.burn["p99 of screened"] == 0.0
    assert frame.burn["p99 of escalated"] == pytest.approx(100.0)
    assert frame.burn["degraded share"] == pytest.approx(2.0)
    assert frame.workers is None


def test_the_next_frame_is_of_what_came_between(scene: Scene) -> None:
    before = scene.scrape(10.0)
    scene.ledger.record_decisions("screened", np.full(300, 0.2))
    scene.ledger.count_dead_letters("syntax", 4)
    scene.gpu.energy_j = -1.0
    scene.cpu.energy_j = 13.0
    frame = Frame.between(before, scene.scrape(12.0))
    assert frame.per_second == pytest.approx(150.0)
    assert frame.escalated_share == 0.0
    screened = frame.paths[0]
    assert (screened.path, screened.per_second) == ("screened", pytest.approx(150.0))
    assert 100 < screened.p50_ms <= 250
    assert math.isnan(frame.paths[1].p99_ms)
    assert frame.dead_letters == 4
    assert frame.lost_meters == ("gpu0",)
    assert frame.watts["modelled"] == pytest.approx(1.5)
    assert frame.burn["p99 of screened"] == pytest.approx(100.0)


def test_a_restarted_service_is_shown_from_its_start(scene: Scene) -> None:
    before = scene.scrape(1_000.0)
    again = Scene()
    again.ledger.record_decisions("screened", np.full(10, 0.001))
    again.start_s += 2_000.0
    fresh = Scrape(again.start_s + 5.0, tuple(
        (name, labels, again.start_s if name == "cascade_start_time_seconds" else value)
        for name, labels, value in again.scrape(0.0).samples
    ))  # fmt: skip
    assert Frame.between(before, fresh).per_second == pytest.approx(2.0)


def test_workers_count_together(scene: Scene) -> None:
    metrics = list(scene.registry.collect())
    groups = {
        str(number): [*metrics, GaugeMetricFamily("cascade_worker_up", "", value=up)]
        for number, up in enumerate((1, 0))
    }
    frame = Frame.between(None, scene.scrape(10.0, workers_registry(lambda: groups)))
    assert frame.per_second == pytest.approx(200.0)
    assert frame.escalated_share == pytest.approx(0.01)
    assert frame.burn["degraded share"] == pytest.approx(2.0)
    assert frame.workers == (1, 2)


@pytest.mark.parametrize(
    ("buckets", "q", "expected_ms"),
    [
        ({}, 0.5, math.nan),
        ({0.001: 0.0, math.inf: 0.0}, 0.5, math.nan),
        ({0.001: 0.0, 0.002: 10.0, math.inf: 10.0}, 0.5, 1.5),
        ({0.001: 10.0, 0.002: 10.0, math.inf: 10.0}, 1.0, 1.0),
        ({0.001: 5.0, 0.002: 5.0, math.inf: 10.0}, 0.99, 2.0),
    ],
)
def test_quantiles_of_buckets(buckets: dict[float, float], q: float, expected_ms: float) -> None:
    assert quantile_ms(buckets, q) == pytest.approx(expected_ms, nan_ok=True)


@pytest.mark.parametrize("width", [20, 44, 60, 80, 200])
def test_a_frame_fits_the_terminal(scene: Scene, width: int) -> None:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render_frame(Frame.between(None, scene.scrape(10.0)), "http://here:9464", width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "100/s" in text
    assert ("p99.9" in text) == (width >= 72)
    assert ("objective" in text) == (width >= 44)


@pytest.fixture
def served(scene: Scene) -> Iterator[str]:
    with HealthServer(HealthState(60.0), scene.registry, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.port}"


def test_once_prints_a_frame(served: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--url", served]) == 0
    out = capsys.readouterr().out
    assert "1 % escalated" in out
    assert "degraded share" in out
    assert "mJ per decision" in out


def test_what_is_no_service_is_one_line(served: str, capsys: pytest.CaptureFixture[str]) -> None:
    for url, text in (("http://127.0.0.1:1", "no answer"), ("file:///etc/passwd", "not an address")):
        assert main(["top", "--once", "--url", url]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line
    assert scrape(served).total("cascade_decisions_total") == 1_000
    with (
        HealthServer(HealthState(60.0), CollectorRegistry(), "127.0.0.1", 0) as other,
        pytest.raises(UnreachableError, match="not the metrics of a Cascade service"),
    ):
        scrape(f"http://127.0.0.1:{other.port}")
